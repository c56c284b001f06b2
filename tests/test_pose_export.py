"""Export of cameras: what is written is read back by our own readers, in the coordinates of the scene's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dialects import small_scene, write
from hypothesis import given
from strategies import seeds

from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, NerfConfig, RefineConfig, SceneConfig
from jaxngp.data import Capture, load_training, read_views
from jaxngp.exporting.poses import PoseOptions, quaternion, write_colmap, write_transforms
from jaxngp.lenses import COEFFICIENTS
from jaxngp.refinement import init_refinement
from jaxngp.runs import Run

REFINE = RefineConfig(poses=True, focal=True, lens=True)


def refined_run(folder: Path, *, refine: RefineConfig = REFINE, dialect: str = "nerfstudio") -> Run:
    """A run on a small capture, with random corrections: nothing is trained."""
    write(dialect, folder / "scene", small_scene())
    config = NerfConfig(scene=SceneConfig(name=str(folder / "scene"), hold_out_every=4, downscale=2), refine=refine)
    training = load_training(config.scene)
    assert isinstance(training.images, PosedImages)
    learned = init_refinement(training.images.cameras, config=config) if refine.any else None
    if learned is not None:
        rng = np.random.default_rng(0)
        learned = replace(
            learned, free=jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 1e-3, a.dtype), learned.free)
        )
    progress: Any = SimpleNamespace(state=SimpleNamespace(refinement=learned))
    return Run(folder, config, progress, {}, training.images.cameras, training.transform)


def read_back(path: Path, format: str) -> tuple[Capture, tuple[str, ...]]:  # noqa: A002
    capture, roles, _ = read_views(SceneConfig(name=str(path), hold_out_every=0))
    assert format in capture.format
    return capture, roles


def written(run: Run, format: str) -> tuple[Capture, tuple[str, ...]]:  # noqa: A002
    folder = Path(run.config.scene.name)
    if format == "COLMAP":
        assert "cameras" in write_colmap(run, folder / "sparse" / "0", PoseOptions())
        (folder / "transforms.json").unlink()
        return read_back(folder, format)
    path = folder / "refined.json"
    assert "refined cameras" in write_transforms(run, path, PoseOptions())
    return read_back(path, format)


@pytest.mark.parametrize("format", ["nerfstudio", "COLMAP"])
def test_refined_cameras_are_read_back(tmp_path: Path, format: str) -> None:  # noqa: A002
    """Poses in world units, intrinsics in the pixels of the files, of a run on images of half their size."""
    run = refined_run(tmp_path)
    before, roles, _ = read_views(run.config.scene)
    names = [name for name, role in zip(before.names, roles, strict=True) if role == "train"]
    capture, _ = written(run, format)
    own = [capture.names.index(name) for name in names]
    found = jax.tree.map(lambda a: np.asarray(a)[own], capture.cameras)
    np.testing.assert_allclose(found.c2w, run.transform.pose_to_world(np.asarray(run.cameras.c2w)), atol=2e-5)
    np.testing.assert_allclose(found.focal_xy, 2 * np.asarray(run.cameras.focal_xy), rtol=1e-5)
    np.testing.assert_allclose(found.centre_xy, 2 * np.asarray(run.cameras.centre_xy), atol=1e-3)
    np.testing.assert_allclose(found.lens.coefficients, run.cameras.lens.coefficients, atol=1e-6)
    assert np.abs(found.lens.coefficients[:, COEFFICIENTS["perspective"].index("k1")]).max() > 0


def test_the_split_is_written(tmp_path: Path) -> None:
    run = refined_run(tmp_path)
    _, before, _ = read_views(run.config.scene)
    _, after = written(run, "nerfstudio")
    assert sorted(after) == sorted("test" if role == "held-out" else role for role in before)


def test_without_refinement_cameras_are_as_given(tmp_path: Path) -> None:
    run = refined_run(tmp_path, refine=RefineConfig())
    path = tmp_path / "scene" / "given.json"
    assert "given cameras" in write_transforms(run, path, PoseOptions())
    before, _, _ = read_views(run.config.scene)
    capture, _ = read_back(path, "nerfstudio")
    order = [before.names.index(name) for name in capture.names]
    np.testing.assert_allclose(capture.cameras.c2w, np.asarray(before.cameras.c2w)[order], atol=1e-9)


def test_a_changed_scene_is_refused(tmp_path: Path) -> None:
    run = refined_run(tmp_path)
    moved = run.given_cameras.replace(c2w=np.asarray(run.given_cameras.c2w) + np.float32(0.1))
    with pytest.raises(InputError, match="not those that"):
        write_transforms(replace(run, given_cameras=moved), tmp_path / "x.json", PoseOptions())


@given(seeds)
def test_quaternions_are_those_of_the_rotation(seed: int) -> None:
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    w, x, y, z = quaternion(rotation)
    vector, cross = np.array([x, y, z]), np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    expected = (w * w - vector @ vector) * np.eye(3) + 2 * np.outer(vector, vector) + 2 * w * cross
    np.testing.assert_allclose(rotation, expected, atol=1e-12)
