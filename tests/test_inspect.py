"""Faults of captures, planted one at a time: `jaxngp.inspect` names each, and has nothing to say of good captures."""

from __future__ import annotations

import functools
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dialects import Scene, scene_path, write
from entrypoints import refusal, run
from photographs import photograph, photographed, room
from PIL import Image, ImageFilter

from jaxngp.cameras import make_cameras
from jaxngp.config import SceneConfig
from jaxngp.data import load_evaluation, load_training, read_views
from jaxngp.data.checks import check, dataset_warnings, examine, of_capture
from jaxngp.data.checks.agreement import Matches, camera_rays, meet
from jaxngp.data.checks.readings import from_quaternion, to_quaternion
from jaxngp.presets import scene_config

DATA = Path(os.environ.get("JAXNGP_DATA", "nowhere"))
FLIP = np.diag([1.0, -1.0, -1.0])


def codes(scene: SceneConfig) -> list[str]:
    """The names of what is found, and their sentences printed."""
    began = time.perf_counter()
    capture, roles, placement = read_views(scene)
    evidence = of_capture(capture, roles, placement)
    found = check(evidence, examine(evidence))
    for finding in found:
        print(finding.code, finding.sentence)
    print(f"{time.perf_counter() - began:.1f} s")
    return [finding.code for finding in found]


def save(
    folder: Path,
    scene: Scene,
    *,
    images: list[np.ndarray] | None = None,
    suffix: str = ".png",
    name: str = "transforms.json",
    frames: Callable[[int], dict[str, Any]] = lambda _: {},
    **top: Any,
) -> Path:
    """A transforms.json of a scene's views, with more keys of frames and of the top."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    listed = []
    for view, image in enumerate(images if images is not None else scene.images):
        file = f"images/{scene.names[view]}{suffix}"
        Image.fromarray(image).save(folder / file)
        matrix = [*scene.c2w[view].tolist(), [0, 0, 0, 1]]
        listed.append({"file_path": file, "transform_matrix": matrix} | frames(view))
    focal = dict(zip(("fl_x", "fl_y"), scene.focal[0].tolist(), strict=True))
    (folder / name).write_text(json.dumps(focal | top | {"frames": listed}))
    return folder


def posed(scene: Scene, rotation: np.ndarray | None = None, position: np.ndarray | None = None) -> Scene:
    parts = (scene.c2w[..., :3] if rotation is None else rotation, scene.c2w[..., 3] if position is None else position)
    return replace(scene, c2w=np.concatenate([parts[0], parts[1][..., None]], axis=-1))


@functools.cache
def things() -> list[np.ndarray]:
    """Where the box or the ball is in each view of the room, (H, W) bool."""
    return [photograph(room(), view)[2] for view in range(len(room().images))]


def with_alpha(soft: bool = True) -> list[np.ndarray]:
    """The box and the ball of the room alone, with a soft edge of straight alpha."""
    found = []
    for image, thing in zip(room().images, things(), strict=True):
        alpha = Image.fromarray(255 * thing.astype(np.uint8))
        alpha = alpha.filter(ImageFilter.GaussianBlur(2)) if soft else alpha
        found.append(np.dstack([image, np.asarray(alpha)]))
    return found


# The faults.


def opencv_axes(folder: Path) -> Path:
    return save(folder, posed(room(), room().c2w[..., :3] @ FLIP))


def world_to_camera(folder: Path) -> Path:
    back = np.swapaxes(room().c2w[..., :3] @ FLIP, 1, 2)
    return save(folder, posed(room(), back, -(back @ room().c2w[..., 3:])[..., 0]))


def quaternion_order(folder: Path) -> Path:
    return save(folder, posed(room(), from_quaternion(np.roll(to_quaternion(room().c2w[..., :3]), 1, axis=-1))))


def mirrored(folder: Path) -> Path:
    return save(folder, posed(room(), position=room().c2w[..., 3] * (1, -1, 1)))


def rounded_poses(folder: Path) -> Path:
    scene = room()
    return save(folder, posed(scene, scene.c2w[..., :3].round(4), scene.c2w[..., 3].round(1)))


def focal_length(folder: Path) -> Path:
    return save(folder, replace(room(), focal=2 * room().focal))


def lens_slots(folder: Path) -> Path:
    bent = room(lens=(0.05, -0.02, 0.02, -0.015))
    return save(folder, bent, camera_model="OPENCV", k1=bent.k1, k2=bent.k2, k3=bent.p1, k4=bent.p2)


def inverted_mask(folder: Path) -> Path:
    scene = room()
    (folder / "masks").mkdir(parents=True)
    for thing, name in zip(things(), scene.names, strict=True):
        Image.fromarray(255 * (~thing).astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    return save(folder, scene, frames=lambda view: {"mask_path": f"masks/{scene.names[view]}.png"})


def depth_unit(folder: Path) -> Path:
    scene = room()
    (folder / "depths").mkdir(parents=True)
    for view, name in enumerate(scene.names):
        millimetres = np.round(1000 * photograph(scene, view)[1]).astype(np.uint16)
        Image.fromarray(millimetres).save(folder / "depths" / f"{name}.png")
    return save(
        folder, scene, integer_depth_scale=1.0, frames=lambda view: {"depth_path": f"depths/{scene.names[view]}.png"}
    )


def unseen_box(folder: Path) -> Path:
    return save(folder, room(), aabb_scale=1, aabb=[[30, 30, 30], [32, 32, 32]])


def inside_out(folder: Path) -> Path:
    return save(folder, posed(room(), room().c2w[..., :3] * (-1, 1, -1)))


def shared_views(folder: Path) -> Path:
    scene, few = room(), slice(4)
    save(folder, scene, name="transforms_train.json")
    moved = posed(scene, position=scene.c2w[..., 3] + 0.01)  # so that it has to be told by the images
    return save(folder, replace(moved, c2w=moved.c2w[few], images=scene.images[few]), name="transforms_test.json")


def duplicates(folder: Path) -> Path:
    images = list(room().images)
    images[5] = images[6]
    return save(folder, room(), images=images)


def premultiplied(folder: Path) -> Path:
    images = with_alpha()
    for image in images:
        image[..., :3] = np.round(image[..., :3] * (image[..., 3:] / 255))
    return save(folder, room(), images=images)


def transparent(folder: Path) -> Path:
    return save(folder, room(), images=[np.dstack([i, np.zeros(i.shape[:2], np.uint8)]) for i in room().images])


def linear(folder: Path) -> Path:
    save(folder, room())
    for name, image in zip(room().names, room().images, strict=True):
        write_deep(folder / "images" / f"{name}.png", np.round(65535 * (image / 255) ** 2.4).astype(np.uint16))
    return folder


def write_deep(path: Path, image: np.ndarray) -> None:
    """An image (H, W, 3) u16 as a PNG, which Pillow cannot write."""
    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 1)))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def exif_rotation(folder: Path, orientation: int = 3) -> Path:
    turns = {3: 2, 6: 1, 8: 3}[orientation]
    save(folder, room(), suffix=".jpg")
    for name, image in zip(room().names, room().images, strict=True):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(np.rot90(image, turns)))
        stored.save(folder / "images" / f"{name}.jpg", exif=exif, quality=95)
    return folder


def exposure(folder: Path) -> Path:
    gains = np.where(np.arange(len(room().images)) % 3 == 0, 0.45, 1.0)
    images = [np.round(gain * image).astype(np.uint8) for gain, image in zip(gains, room().images, strict=True)]
    return save(folder, room(), images=images)


def blurred(folder: Path) -> Path:
    images = list(room().images)
    images[7] = np.asarray(Image.fromarray(images[7]).filter(ImageFilter.GaussianBlur(2)))
    return save(folder, room(), images=images)


FAULTS = (
    opencv_axes,
    world_to_camera,
    quaternion_order,
    mirrored,
    rounded_poses,
    focal_length,
    lens_slots,
    inverted_mask,
    depth_unit,
    unseen_box,
    inside_out,
    shared_views,
    duplicates,
    premultiplied,
    transparent,
    linear,
    exif_rotation,
    exposure,
    blurred,
)

MAY_FOLLOW = {"linear": {"sixteen_bits"}, "duplicates": {"pose_outlier"}}
"""What else may be said of a fault."""


QUICK = (opencv_axes, inverted_mask, unseen_box, duplicates, premultiplied, transparent)
"""Those that `make test` plants; the others wait for `make test-slow`."""


@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f.__name__, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS]
)
def test_a_planted_fault_is_named(fault: Callable[[Path], Path], tmp_path: Path) -> None:
    found = codes(SceneConfig(name=str(fault(tmp_path / "capture"))))
    assert fault.__name__ in found
    assert {*found} <= {fault.__name__, *MAY_FOLLOW.get(fault.__name__, ())}


@pytest.mark.slow
@pytest.mark.parametrize("orientation", [6, 8])
def test_images_turned_by_a_quarter_are_named(orientation: int, tmp_path: Path) -> None:
    assert codes(SceneConfig(name=str(exif_rotation(tmp_path / "capture", orientation)))) == ["exif_rotation"]


def test_missing_files_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their number, and with the file of another extension that is there."""
    folder = save(tmp_path / "capture", room(), suffix=".jpg")
    text = (folder / "transforms.json").read_text()
    (folder / "transforms.json").write_text(text.replace(".jpg", ".png"))
    message = refusal(capsys, "inspect", str(folder), f"--out={tmp_path / 'x.png'}")
    assert "the image is missing, and 19 more of 20 are (but view_000.jpg is there" in message


@pytest.mark.parametrize("dialect", ["nerfstudio", "colmap-binary", "instant-ngp", "llff"])
def test_nothing_is_said_of_a_good_capture(dialect: str, tmp_path: Path) -> None:
    write(dialect, tmp_path / dialect, room() if dialect == "llff" else room(lens=(0.05, -0.02, 0.002, -0.001)))
    assert codes(SceneConfig(name=str(scene_path(dialect, tmp_path / dialect)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("soft", [True, False])
def test_nothing_is_said_of_straight_alpha(soft: bool, tmp_path: Path) -> None:
    assert codes(SceneConfig(name=str(save(tmp_path / "capture", room(), images=with_alpha(soft))))) == []


@pytest.mark.slow
def test_nothing_is_said_of_good_masks_and_depths(tmp_path: Path) -> None:
    scene = room()
    for kind in ("masks", "depths"):
        (tmp_path / kind).mkdir()
    for view, name in enumerate(scene.names):
        _, depth, thing = photograph(scene, view)
        Image.fromarray(255 * thing.astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(np.round(1000 * depth).astype(np.uint16)).save(tmp_path / "depths" / f"{name}.png")
    keys = lambda view: {  # noqa: E731
        "mask_path": f"masks/{scene.names[view]}.png", "depth_file_path": f"depths/{scene.names[view]}.png"
    }  # fmt: skip
    assert codes(SceneConfig(name=str(save(tmp_path, scene, frames=keys)))) == []


TURN = np.linspace(0, 2 * np.pi, 16, endpoint=False)
AHEAD = np.array([-1.0, 0.0, 0.0])
ROW = np.stack([np.full(16, 2.6), np.linspace(-1, 1, 16), 0.4 + 0.2 * np.cos(5 * TURN)], axis=1)
RING = np.stack([2.5 * np.cos(TURN), 2.5 * np.sin(TURN), np.full(16, 0.6)], axis=1)
APPROACH = np.stack([np.linspace(3.5, 1.2, 16), 0.05 * np.sin(9 * TURN), np.full(16, 0.4)], axis=1)
OUTWARD = 0.3 * RING + (1.5, 1.8, 0.2)
PATHS = {
    "facing forward": (ROW, ROW + AHEAD),
    "a ring": (RING, np.zeros((16, 3))),
    "an approach": (APPROACH, np.zeros((16, 3))),
    "looking outward": (OUTWARD, OUTWARD + RING * (1, 1, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_said_of_a_good_path(path: str, tmp_path: Path) -> None:
    assert codes(SceneConfig(name=str(save(tmp_path / "capture", photographed(*PATHS[path]))))) == []


def test_parallel_cameras_tell_no_focal_length() -> None:
    """By how many pixels a match misses its line is then the same for every focal length."""
    rng = np.random.default_rng(0)
    c2w = np.tile(np.eye(3, 4), (4, 1, 1))
    c2w[:, :, 3] = rng.normal(size=(4, 3)) * (1, 1, 0)
    views = np.stack([rng.integers(0, 2, 50), rng.integers(2, 4, 50)])
    matches = Matches(views, rng.uniform(size=(2, 50, 2)), np.zeros(50, int), np.zeros((2, 50, 2), int))
    misses = []
    for focal in (50.0, 200.0, 800.0):
        cameras = make_cameras(c2w, focal_xy=focal, centre_xy=(100, 80), width=200, height=160)
        misses.append(meet(cameras, camera_rays(cameras, matches), matches).miss)
    np.testing.assert_allclose(misses[0], misses[1], rtol=1e-3)
    np.testing.assert_allclose(misses[2], misses[1], rtol=1e-3)


def test_places_that_rounding_tells_apart_are_one() -> None:
    """A reading may put all cameras into one place, up to what float64 makes of it on this machine."""
    rng = np.random.default_rng(0)
    c2w = np.concatenate(
        [np.linalg.qr(rng.normal(size=(4, 3, 3)))[0], np.tile([[2.0], [-1.0], [0.3]], (4, 1, 1))], axis=2
    )
    views = np.stack([rng.integers(0, 2, 50), rng.integers(2, 4, 50)])
    matches = Matches(views, rng.uniform(size=(2, 50, 2)), np.zeros(50, int), np.zeros((2, 50, 2), int))
    cameras = make_cameras(c2w, focal_xy=200.0, centre_xy=(100, 80), width=200, height=160)
    rounded = c2w + np.pad(rng.uniform(-1e-15, 1e-15, (4, 3, 1)), [(0, 0), (0, 0), (3, 0)])
    exact, other = (meet(cameras.replace(c2w=a), camera_rays(cameras, matches), matches) for a in (c2w, rounded))
    np.testing.assert_array_equal(other.fits, exact.fits)
    np.testing.assert_allclose(other.miss, exact.miss, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.01])
def test_cameras_that_turn_on_the_spot_are_named(apart: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    position = np.array([2.6, 0.0, 0.5]) + rng.uniform(-apart / 2, apart / 2, (16, 3))
    scene = photographed(position, rng.uniform(-0.4, 0.4, (16, 3)))
    assert codes(SceneConfig(name=str(save(tmp_path / "capture", scene)))) == ["no_parallax"]


def test_one_pose_out_of_place_is_named(tmp_path: Path) -> None:
    c2w = np.array(room().c2w)
    c2w[4] = c2w[12]
    folder = save(tmp_path / "capture", replace(room(), c2w=c2w))
    assert codes(SceneConfig(name=str(folder), hold_out_every=0)) == ["pose_outlier"]


@pytest.mark.slow
def test_nothing_is_said_of_the_built_in_scene() -> None:
    assert codes(scene_config("bricks")) == []


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "nerf_synthetic" / "lego").is_dir(), reason="needs lego in JAXNGP_DATA")
def test_nothing_is_said_of_lego() -> None:
    assert codes(scene_config("lego")) == []


@pytest.mark.skipif(not (DATA / "fox").is_dir(), reason="needs fox in JAXNGP_DATA")
def test_nothing_is_said_of_fox() -> None:
    assert codes(SceneConfig(name=str(DATA / "fox"))) == []


def test_training_says_the_same(tmp_path: Path) -> None:
    scene = SceneConfig(name=str(opencv_axes(tmp_path / "capture")))
    (warning,) = dataset_warnings(load_training(scene), load_evaluation(scene))
    assert warning.startswith("the poses have the camera axes of OpenCV")


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = opencv_axes(tmp_path / "capture"), tmp_path / "new" / "drawing.png"
    run("inspect", str(folder), f"--out={out}")
    text = capsys.readouterr().out
    for word in ("17 to train on, 3 held out", "240x180", "no distortion", "opencv_axes:", "-> negate", str(out)):
        assert word in text
    with Image.open(out) as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 100


def test_the_scene_may_be_given_as_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "capture", room())
    run("inspect", f"--scene={folder}", f"--out={tmp_path / 'x.png'}")
    assert "nothing suspicious was found" in capsys.readouterr().out


def test_a_path_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a path that exists" in refusal(capsys, "inspect", f"{tmp_path}/nothing")
