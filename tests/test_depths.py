"""Depth maps: what is stored becomes a distance along the ray, whatever holds it, and training is drawn to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image
from scenes import look_at, make_camera
from strategies import floats32

from jaxngp.cameras import Cameras, make_cameras, project, view_rays
from jaxngp.config import InputError
from jaxngp.data.capture import DepthMap
from jaxngp.data.depths import read_depth, read_depths
from jaxngp.lenses import make_lens

WIDTH, HEIGHT = 12, 8
POSE = look_at((1.7, -0.4, 0.9))[None]


def save(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".exr":
        openexr = pytest.importorskip("OpenEXR", reason="the extra image is not installed")
        header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
        with openexr.File(header, {"Z": values}) as file:
            file.write(str(path))
    else:
        Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".png", "u2"), (".png", "u1"), (".npy", "u2"), (".npy", "f4"), (".npy", "f8"), (".tif", "f4"), (".exr", "f4")],
)
def test_a_depth_map_is_read_as_it_is_stored(tmp_path: Path, suffix: str, dtype: str) -> None:
    values = np.random.default_rng(0).uniform(0, 250, (HEIGHT, WIDTH)).astype(dtype)
    np.testing.assert_array_equal(read_depth(save(tmp_path / f"depth{suffix}", values)), values)


def test_an_array_may_have_an_axis_of_one(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(0, 9, (HEIGHT, WIDTH))
    for i, stored in enumerate((values[None], values[..., None])):
        np.testing.assert_array_equal(read_depth(save(tmp_path / f"{i}.npy", stored)), values)


def test_what_is_no_depth_map_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    np.save(tmp_path / "cube.npy", np.zeros((3, 4, 5)))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (tmp_path / "broken.exr").write_bytes(b"\x76\x2f\x31\x01" + bytes(50))
    for name in ("text.png", "colour.png", "cube.npy", "objects.npy", "broken.exr", "missing.png"):
        with pytest.raises(InputError, match=name):
            read_depths([DepthMap(tmp_path / name, 1.0, "ray")], make_camera(4, 4, 5.0, POSE), 1.0, "")


def fisheye() -> Cameras:
    arrays: Any = {"focal_xy": [[5.0, 5.0]], "centre_xy": [[6.0, 4.0]]}
    lens, _ = make_lens("fisheye", [[0.05, *[0.0] * 12]], size=[[WIDTH, HEIGHT]], **arrays)
    return make_cameras(POSE, width=WIDTH, height=HEIGHT, lens=lens, **arrays)


@pytest.mark.parametrize("kind", ["pinhole", "fisheye"])
@settings(max_examples=20)
@given(hnp.arrays(np.float32, (HEIGHT, WIDTH), elements=floats32(0.5, 8)))
def test_depth_along_the_axis_becomes_that_of_the_ray(
    tmp_path_factory: pytest.TempPathFactory, kind: str, stored: np.ndarray
) -> None:
    """The point at that distance along the ray has the depth that is stored."""
    cameras = make_camera(WIDTH, HEIGHT, 9.0, POSE) if kind == "pinhole" else fisheye()
    file = save(tmp_path_factory.getbasetemp() / "depth.npy", stored)
    found = read_depths([DepthMap(file, 0.25, "axis")], cameras, 2.0, "").reshape(HEIGHT, WIDTH)
    rays = view_rays(cameras[0])
    point = np.asarray(rays.origin) + found[..., None].astype(np.float64) * np.asarray(rays.direction)
    along = (point - POSE[0, :, 3]) @ -POSE[0, :, 2]
    np.testing.assert_allclose(along, stored * 0.125, rtol=1e-3)
    if kind == "pinhole":
        np.testing.assert_allclose(project(cameras[0], jnp.asarray(point, jnp.float32))[1], along, rtol=1e-4)


def test_depth_along_the_ray_only_changes_its_unit(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).uniform(100, 60000, (HEIGHT, WIDTH)).astype(np.uint16)
    file = save(tmp_path / "depth.png", stored)
    found = read_depths([DepthMap(file, 1e-3, "ray")], make_camera(WIDTH, HEIGHT, 9.0, POSE), 4.0, "")
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, stored.ravel() * 0.25e-3, rtol=2**-11)


@pytest.mark.parametrize("along", ["axis", "ray"])
def test_unknown_depths_are_zero(tmp_path: Path, along: Literal["axis", "ray"]) -> None:
    """What is not positive and finite, or beyond what the dtype holds, and a view without a depth map."""
    stored = np.full((HEIGHT, WIDTH), 2.0)
    stored[0, :7] = 0, -1, np.nan, np.inf, -np.inf, 1e300, 1e-300
    file = save(tmp_path / "depth.npy", stored)
    cameras = make_camera(WIDTH, HEIGHT, 9.0, np.repeat(POSE, 2, axis=0))
    found = read_depths([DepthMap(file, 1.0, along), None], cameras, 1.0, "").reshape(2, HEIGHT, WIDTH)
    assert not found[1].any()
    assert not found[0, 0, :7].any()
    assert (found[0] > 0).sum() == stored.size - 7


@pytest.mark.parametrize("size", [(4, 3), (24, 16), (12, 8), (30, 5)])
def test_a_pixel_takes_the_value_nearest_its_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    stored = np.arange(1, width * height + 1, dtype=np.float32).reshape(height, width)
    file = save(tmp_path / "depth.npy", stored)
    found = read_depths([DepthMap(file, 1.0, "ray")], make_camera(WIDTH, HEIGHT, 9.0, POSE), 1.0, "")
    for y, x in np.ndindex(HEIGHT, WIDTH):
        row, column = int((y + 0.5) * height / HEIGHT), int((x + 0.5) * width / WIDTH)
        assert found.reshape(HEIGHT, WIDTH)[y, x] == stored[row, column]
