"""Scenes of views: what is read is what was written, a missing split is said, and what is wrong is one line."""

import json
import math
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from strategies import arrays32, floats32, rotations

from jaxngp import data
from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, SceneConfig
from jaxngp.data import photos, transforms

ANGLE = 0.7


def pose(seed: int) -> np.ndarray:
    """A random rotation and position, (4, 4)."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation[:, 0] *= np.linalg.det(rotation)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, rng.normal(size=3)
    return matrix


def pixels(seed: int, width: int = 8, height: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4)).astype(np.uint8)


def write_split(folder: Path, split: str, count: int, **extra: object) -> None:
    """`count` views of 8x4 pixels; view i of any split has pose(i) and pixels(i)."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    frames = []
    for i in range(count):
        Image.fromarray(pixels(i)).save(folder / split / f"r_{i}.png")
        frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": pose(i).tolist()})
    plain = {"camera_angle_x": ANGLE, "frames": frames} | extra
    (folder / f"transforms_{split}.json").write_text(json.dumps(plain))


def edit(folder: Path, change: dict[str, object], frame: dict[str, object] | None = None) -> None:
    """Changes keys of the train split's json, and of its frame 1; a key with the value ... is taken out."""
    path = folder / "transforms_train.json"
    plain = json.loads(path.read_text())
    for target, changes in ((plain, change), (plain["frames"][1], frame or {})):
        target.update(changes)
        for key in [key for key, value in changes.items() if value is ...]:
            del target[key]
    path.write_text(json.dumps(plain))


def posed(split: data.Split) -> PosedImages:
    assert isinstance(split.images, PosedImages)
    return split.images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "scene", "train", 3)
    return tmp_path / "scene"


@pytest.fixture(autouse=True)
def no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is found or written, and nothing is downloaded."""
    monkeypatch.delenv("JAXNGP_DATA", raising=False)
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):  # port 9 refuses at once, as it is with no network
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def scene_at(path: Path, **changes: object) -> SceneConfig:
    return replace(SceneConfig(name=str(path)), **changes)


def message(path: Path, **changes: object) -> str:
    """The one line with which loading the training views fails."""
    with pytest.raises(InputError) as caught:
        data.load_training(scene_at(path, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read.


def test_views_come_back_as_they_were_written(folder: Path) -> None:
    split = data.load_training(scene_at(folder))
    views = posed(split)
    assert split.views == ("r_1", "r_2")  # r_0 is held out, as there is no other split
    assert split.name == "train"
    assert split.num_views == 2
    assert split.resolution == (8, 4)
    assert split.has_alpha
    cameras = views.cameras
    floats = (cameras.c2w, cameras.focal_xy, cameras.centre_xy)
    assert {type(a).__name__ for a in (*floats, cameras.size, views.rgba, views.offset)} == {"ndarray"}
    assert {a.dtype for a in floats} == {np.dtype(np.float32)}
    for view in range(2):
        np.testing.assert_array_equal(views.image(view), pixels(view + 1))
    np.testing.assert_allclose(cameras.focal_xy, np.full((2, 2), 4 / math.tan(ANGLE / 2)), rtol=1e-6)
    np.testing.assert_array_equal(cameras.centre_xy, [[4, 2]] * 2)
    np.testing.assert_array_equal(cameras.size, [[8, 4]] * 2)


def test_poses_are_in_scene_units(folder: Path) -> None:
    centre, side = (0.5, -1.0, 2.0), 2.5
    split = data.load_training(scene_at(folder, box_centre=centre, box_side=side))
    expected = np.stack([pose(1), pose(2)])[:, :3]
    assert split.transform == data.SceneTransform(centre, side)
    np.testing.assert_allclose(split.transform.pose_to_world(posed(split).cameras.c2w), expected, atol=2e-6)
    expected[..., 3] = (expected[..., 3] - centre) / side + 0.5
    np.testing.assert_allclose(posed(split).cameras.c2w, expected, atol=1e-6)


@given(rotations(), arrays32(3, -5, 5), floats32(0.01, 100))
def test_a_transform_is_a_similarity(rotation: np.ndarray, centre: np.ndarray, side: float) -> None:
    """It scales all distances by 1 / side, moves the centre to the middle, keeps axes, is undone and survives JSON."""
    axes = np.linalg.qr(rotation.astype(np.float64))[0]
    axes *= np.sign(np.sum(axes * rotation, axis=0))  # a rotation to float64
    transform = data.SceneTransform(tuple(centre.tolist()), side, tuple(map(tuple, axes.tolist())))
    assert data.SceneTransform.from_plain(json.loads(json.dumps(transform.to_plain()))) == transform
    c2w = np.stack([pose(seed)[:3] for seed in range(4)])
    moved = transform.pose_to_scene(c2w)
    np.testing.assert_allclose(transform.pose_to_world(moved), c2w, atol=1e-12)
    np.testing.assert_allclose(transform.to_world(transform.to_scene(c2w[..., 3])), c2w[..., 3], atol=1e-12)
    np.testing.assert_allclose(transform.to_scene(centre), 0.5, atol=1e-12)
    np.testing.assert_allclose(moved[..., :3], axes @ c2w[..., :3], atol=1e-12)
    ahead = c2w @ np.array([0.0, 0.0, -side, 1.0])  # a point seen by each camera, and where it is in scene units
    np.testing.assert_allclose(transform.to_scene(ahead), moved @ np.array([0, 0, -1.0, 1.0]), rtol=1e-9, atol=1e-9)


def test_downscale_keeps_the_field_of_view(folder: Path) -> None:
    full, half = (posed(data.load_training(scene_at(folder, downscale=d))) for d in (1, 2))
    np.testing.assert_array_equal(half.cameras.size, [[4, 2]] * 2)
    np.testing.assert_allclose(half.cameras.focal_xy * 2, full.cameras.focal_xy, rtol=1e-6)
    np.testing.assert_allclose(half.cameras.centre_xy * 2, full.cameras.centre_xy)
    np.testing.assert_array_equal(half.image(1), photos.box_downscale(pixels(2), 2))


def test_intrinsics_in_pixels_scale_with_the_images(folder: Path) -> None:
    edit(folder, {"fl_x": 100.0, "fl_y": 90.0, "cx": 17.0, "cy": 7.0, "w": 32, "h": 16, "camera_angle_x": ...})
    cameras = posed(data.load_training(scene_at(folder, downscale=2))).cameras  # 8x4 images of what was 32x16
    np.testing.assert_allclose(cameras.focal_xy, [[12.5, 11.25]] * 2)
    np.testing.assert_allclose(cameras.centre_xy, [[2.125, 0.875]] * 2)


def test_intrinsics_of_a_frame_precede_shared_ones(folder: Path) -> None:
    """View 1 has its own, view 2 those at the top; a frame's field of view also precedes a shared focal length."""
    edit(folder, {"fl_x": 20.0, "cx": 3.0}, {"fl_x": 9.0, "fl_y": 10.0, "cy": 1.0})
    cameras = posed(data.load_training(scene_at(folder))).cameras
    np.testing.assert_allclose(cameras.focal_xy, [[9, 10], [20, 20]])
    np.testing.assert_allclose(cameras.centre_xy, [[3, 1], [3, 2]])
    edit(folder, {}, {"fl_x": ..., "fl_y": ..., "camera_angle_x": 1.0})
    cameras = posed(data.load_training(scene_at(folder))).cameras
    np.testing.assert_allclose(cameras.focal_xy, [[4 / math.tan(0.5)] * 2, [20, 20]], rtol=1e-6)


def test_intrinsics_may_be_given_by_frames_alone(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2, camera_angle_x=1.0)
    plain = json.loads((tmp_path / "transforms_train.json").read_text())
    del plain["camera_angle_x"]
    for frame in plain["frames"]:
        frame.update(fl_x=50.0, fl_y=60.0, cx=4.0, cy=2.0, w=8, h=4)
    (tmp_path / "transforms_train.json").write_text(json.dumps(plain))
    np.testing.assert_allclose(posed(data.load_training(scene_at(tmp_path))).cameras.focal_xy, [[50, 60]])


@pytest.mark.parametrize(
    ("change", "frame", "focal"),
    [
        ({"fl_x": 20.0, "w": 8, "h": 4}, {}, [20, 10]),
        ({}, {"fl_x": 5.0}, [4 / math.tan(ANGLE / 2), 5]),
        ({}, {}, [4 / math.tan(ANGLE / 2), 2 / math.tan(ANGLE / 2)]),
    ],
    ids=["of a known size", "of each frame", "as an angle"],
)
def test_images_may_be_of_several_sizes(tmp_path: Path, change: dict, frame: dict, focal: list) -> None:
    """Where it is clear which size the intrinsics belong to."""
    write_split(tmp_path / "scene", "train", 2)
    Image.fromarray(pixels(1, 4, 2)).save(tmp_path / "scene" / "train" / "r_1.png")
    edit(tmp_path / "scene", change, frame)
    split = data.load_training(scene_at(tmp_path / "scene", hold_out_every=0))
    views = posed(split)
    np.testing.assert_array_equal(views.cameras.size, [[8, 4], [4, 2]])
    np.testing.assert_array_equal(views.image(0), pixels(0))
    np.testing.assert_array_equal(views.image(1), pixels(1, 4, 2))
    np.testing.assert_allclose(np.asarray(views.cameras.focal_xy)[:, 0], focal, rtol=1e-6)
    assert split.resolution == (8, 4)
    assert any("2 sizes" in note for note in split.notes)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint8, (8, 12, 4)), st.sampled_from([2, 4]))
def test_box_filter_averages_premultiplied_colours(rgba: np.ndarray, downscale: int) -> None:
    values = rgba.astype(np.float64) / 255
    values[..., :3] *= values[..., 3:]
    blocks = values.reshape(8 // downscale, downscale, 12 // downscale, downscale, 4).mean(axis=(1, 3))
    alpha = blocks[..., 3:]
    expected = 255 * np.concatenate([blocks[..., :3] / np.where(alpha > 0, alpha, 1), alpha], axis=-1)
    # Half a level of rounding, and the last bits of a tie.
    assert np.abs(photos.box_downscale(rgba, downscale) - expected).max() <= 0.5 + 1e-9


def test_box_filter_ignores_transparent_colours() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 50, 255)
    rgba[1, 1] = (255, 255, 255, 0)
    np.testing.assert_array_equal(photos.box_downscale(rgba, 2), [[[200, 100, 50, 64]]])
    np.testing.assert_array_equal(photos.box_downscale(rgba * 0, 2), np.zeros((1, 1, 4)))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P"])
def test_other_pixel_formats_are_converted(folder: Path, mode: str) -> None:
    opaque = pixels(7)
    opaque[..., 3] = 255
    for i in range(3):
        Image.fromarray(opaque).convert("RGB").convert(mode).save(folder / "train" / f"r_{i}.png")
    split = data.load_training(scene_at(folder))
    assert split.has_alpha == (mode == "LA")
    assert (posed(split).rgba[..., 3] == 255).all()
    if mode == "RGB":
        np.testing.assert_array_equal(posed(split).image(0), opaque)


@pytest.mark.parametrize("kind", ["absolute", "backslashes", "outside", "link", "linked folder"])
def test_the_users_own_paths_are_followed(folder: Path, kind: str) -> None:
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    image = (folder / "train" / "r_1.png").rename(outside / "r_1.png")
    if kind in ("link", "backslashes"):
        (folder / "train" / "r_1.png").symlink_to(image)
    (folder / "linked").symlink_to(outside)
    paths = {"absolute": str(image), "backslashes": ".\\train\\r_1.png", "outside": "../elsewhere/r_1"}
    paths |= {"link": "train/r_1", "linked folder": "linked/r_1.png"}
    edit(folder, {}, {"file_path": paths[kind]})
    split = data.load_training(scene_at(folder))
    assert split.views == ("r_1", "r_2")
    np.testing.assert_array_equal(posed(split).image(0), pixels(1))


def test_missing_images_are_one_line_with_a_count(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 5)
    for i in (1, 3, 4):
        (tmp_path / "train" / f"r_{i}.png").unlink()
    assert f"{tmp_path}/train/r_1.png: the image is missing, and 2 more of 5 are; put" in message(tmp_path)
    Image.fromarray(pixels(1)[..., :3]).save(tmp_path / "train" / "r_1.JPG")
    edit(tmp_path, {}, {"file_path": "train/r_1.png"})
    assert "but r_1.JPG is there" in message(tmp_path)


def test_unknown_keys_are_named_once(folder: Path) -> None:
    edit(folder, {"exposure": 1}, {"shutter": 2, "rotation": 0.1})
    (note,) = data.load_training(scene_at(folder)).notes
    assert note.endswith("unknown: 'exposure', 'shutter'")


def test_a_file_path_may_have_an_extension(folder: Path) -> None:
    Image.fromarray(pixels(1)[..., :3]).save(folder / "train" / "r_1.jpg")
    edit(folder, {}, {"file_path": "train/r_1.jpg"})
    assert data.load_training(scene_at(folder)).views == ("r_1", "r_2")
    edit(folder, {}, {"file_path": "train/r_1.png"})
    assert data.load_training(scene_at(folder)).views == ("r_1", "r_2")


def test_views_of_one_file_name_are_told_apart(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "train" / "r_1.png").rename(folder / "more" / "r_2.png")
    edit(folder, {}, {"file_path": "more/r_2"})
    assert data.load_training(scene_at(folder)).views == ("more/r_2.png", "train/r_2.png")


# Splits.


def test_auto_takes_test_then_val_then_held_out(folder: Path) -> None:
    scene = scene_at(folder)
    assert data.load_evaluation(scene).name == "held-out"
    write_split(folder, "val", 2)
    assert data.load_evaluation(scene).name == "val"
    write_split(folder, "test", 4)
    assert data.load_evaluation(scene).name == "test"
    assert data.locate(scene) == data.Location(folder, data.FORMATS[0], ("train", "val", "test"))
    assert [data.load_evaluation(scene, name).num_views for name in ("train", "val", "test")] == [3, 2, 4]
    assert data.load_training(scene).num_views == 3  # nothing is held out now


def test_every_8th_view_is_held_out_from_training(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 18)
    held_out = data.load_evaluation(scene_at(tmp_path))
    assert held_out.views == ("r_0", "r_8", "r_16")
    training = data.load_training(scene_at(tmp_path))
    assert training.num_views == 15
    assert not set(training.views) & set(held_out.views)
    assert data.load_evaluation(scene_at(tmp_path), "train").views == training.views
    np.testing.assert_array_equal(posed(held_out).image(1), pixels(8))


def test_hold_out_every_says_how_many_are_held_out(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 5)
    scene = scene_at(tmp_path, hold_out_every=2)
    assert data.load_training(scene).views == ("r_1", "r_3")
    assert data.load_evaluation(scene).views == ("r_0", "r_2", "r_4")


def test_with_no_view_held_out_training_views_are_used(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2)
    scene = scene_at(tmp_path, hold_out_every=0)
    assert data.load_training(scene).views == ("r_0", "r_1")
    evaluation = data.load_evaluation(scene)
    assert (evaluation.name, evaluation.views) == ("train", ("r_0", "r_1"))
    assert "no view is held out" in evaluation.notes[0]
    assert data.load_evaluation(scene, "train").notes == ()  # as it was asked for
    with pytest.raises(InputError, match="no 'held-out' split, only train"):
        data.load_evaluation(scene, "held-out")


def test_a_single_view_is_trained_and_evaluated_on(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 1)
    assert data.load_training(scene_at(tmp_path)).num_views == 1
    evaluation = data.load_evaluation(scene_at(tmp_path))
    assert (evaluation.name, evaluation.num_views) == ("train", 1)
    assert "no view is held out" in evaluation.notes[0]
    with pytest.raises(InputError, match="one view"):
        data.load_evaluation(scene_at(tmp_path), "held-out")


@pytest.mark.parametrize("split", ["test", "val", "dev"])
def test_a_missing_split_is_said(folder: Path, split: str) -> None:
    with pytest.raises(InputError, match=f"no {split!r} split, only train, held-out"):
        data.load_evaluation(scene_at(folder), split)


def test_with_a_val_split_nothing_is_held_out(folder: Path) -> None:
    write_split(folder, "val", 2)
    with pytest.raises(InputError, match="no 'held-out' split, only train, val"):
        data.load_evaluation(scene_at(folder), "held-out")


def test_a_test_split_alone_can_be_evaluated(tmp_path: Path) -> None:
    write_split(tmp_path, "test", 2)
    assert data.load_evaluation(scene_at(tmp_path)).name == "test"
    assert "no 'train' split, only test" in message(tmp_path)


def test_evaluation_views_are_evenly_spaced(folder: Path) -> None:
    write_split(folder, "val", 10)
    scene = scene_at(folder)
    assert data.load_evaluation(scene, num_views=5).views == ("r_0", "r_2", "r_4", "r_6", "r_8")
    assert data.load_evaluation(scene, num_views=3).views == ("r_0", "r_3", "r_6")
    assert data.load_evaluation(scene, num_views=0).num_views == 10
    for count in (11, -1):
        with pytest.raises(InputError, match="has 10 val views"):
            data.load_evaluation(scene, num_views=count)


# Where.


def test_a_name_is_looked_up_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In data_dir alone where it is given, else in the environment's folder, else in the cache."""
    own, env, cache = (tmp_path / name for name in ("own", "env", "cache"))
    monkeypatch.setenv("JAXNGP_DATA", str(env))
    for place in (cache / "nerf_synthetic" / "chair", env / "nerf_synthetic" / "chair", env / "chair"):
        write_split(place, "train", 2)
        assert data.locate(SceneConfig(name="chair")).path == place
    for place in (own / "nerf_synthetic" / "chair", own / "chair"):
        write_split(place, "train", 2)
        assert data.locate(SceneConfig(name="chair", data_dir=str(own))).path == place


def test_data_dir_may_be_the_scene_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.locate(SceneConfig(name="ship", data_dir=str(folder))).path == folder
    monkeypatch.setenv("JAXNGP_DATA", str(folder))  # but this folder might be any scene
    with pytest.raises(InputError):
        data.locate(SceneConfig(name="ship"))
    monkeypatch.setenv("JAXNGP_DATA", str(folder.rename(folder.parent / "ship")))
    assert data.locate(SceneConfig(name="ship")).path == folder.parent / "ship"


@pytest.mark.parametrize("name", ["lego", "drums"])
def test_a_scene_that_is_nowhere_is_one_paragraph(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXNGP_DATA", str(tmp_path / "mine"))
    with pytest.raises(InputError) as caught:
        data.load_training(SceneConfig(name=name))
    text = str(caught.value)
    assert "\n" not in text
    for part in (str(tmp_path / "mine" / name), str(tmp_path / "cache"), "transforms_train.json", "--scene=bricks"):
        assert part in text


def test_data_dir_relocates_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the scene's new folder, or one in which the scene lies under its old name; ~ is expanded."""
    moved = folder.rename(folder.parent / "moved")
    assert data.locate(scene_at(folder, data_dir=str(moved))).path == moved
    monkeypatch.setenv("HOME", str(folder.parent))
    assert data.locate(scene_at(folder, data_dir="~/moved")).path == Path(moved)
    (folder.parent / "new").mkdir()
    kept = moved.rename(folder.parent / "new" / "scene")
    for name in (folder, Path("scene")):
        assert data.locate(scene_at(name, data_dir=str(kept.parent))).path == kept


@pytest.mark.parametrize("name", ["lego", "bricks", "./scene", "gone/scene"])
def test_a_data_dir_without_the_scene_is_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the scene is found without it."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("JAXNGP_DATA", str(folder.parent))
    write_split(folder.parent / "lego", "train", 2)
    (folder.parent / "empty").mkdir()
    for place in ("empty", "nowhere"):
        text = message(Path(name), data_dir=place) if "/" in name else ""
        with pytest.raises(InputError, match="data_dir = ") as caught:
            data.locate(SceneConfig(name=name, data_dir=place))
        assert f"{place}/" in str(caught.value)
        assert not text or "transforms_train.json" in text


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("JAXNGP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert data.cache_dir() == Path("/xdg/jaxngp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert data.cache_dir() == Path("/home/x/.cache/jaxngp")


def test_the_built_in_scene_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from jaxngp.data import bricks

    written = []

    def write_scene(folder: Path, image_size: int) -> None:
        written.append(image_size)
        write_split(folder, "train", 2)
        write_split(folder, "test", 2)

    monkeypatch.setattr(bricks, "write_scene", write_scene)
    for _ in range(2):
        assert data.locate(SceneConfig(image_size=32)).path == tmp_path / "cache" / "bricks-v1-32"
    assert data.load_evaluation(SceneConfig(image_size=32)).name == "test"
    assert written == [32]


@pytest.mark.parametrize("name", ["nowhere/at/all", "legos", "./" + "x" * 300, "a\0b/c"])
def test_an_unknown_scene_is_one_line(name: str) -> None:
    message(Path(name))


def test_a_path_without_a_scene_is_one_line(tmp_path: Path) -> None:
    assert "expected a folder with transforms_train.json" in message(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    assert "expected a folder with transforms_train.json" in message(tmp_path / "notes.txt")


# What is wrong.


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\xff", '{"a": 1' + "0" * 5000 + "}", "[" * 100_000, '{"camera_angle_x": 1}'],
    ids=["empty", "open", "list", "null", "binary", "long number", "deep", "no frames"],
)
def test_a_transforms_file_that_is_none_is_one_line(folder: Path, text: str) -> None:
    (folder / "transforms_train.json").write_bytes(text.encode("latin1"))
    assert str(folder / "transforms_train.json") in message(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"camera_angle_x": ...}, "'camera_angle_x' is missing"),
        ({"camera_angle_x": 0}, "between 0 and pi"),
        ({"camera_angle_x": 3.2}, "between 0 and pi"),
        ({"camera_angle_x": float("nan")}, "= nan: expected radians"),
        ({"camera_angle_x": "0.7"}, "= '0.7': expected radians"),
        ({"camera_angle_x": True}, "= True: expected radians"),
        ({"camera_angle_x": 10**400}, "expected radians"),
        ({"cx": float("nan")}, "expected a finite number"),
        ({"fl_x": -1}, "positive"),
        ({"w": 10, "h": 30}, "aspect ratio"),
        ({"k1": "0.1"}, "finite"),
        ({"k1": -100.0}, "folds over"),
        ({"k4": 0.1}, "k4 = 0.1 without a fisheye"),
        ({"is_fisheye": True, "p1": 0.1}, "p1, p2 with a fisheye"),
        ({"camera_model": "FISHEYE624"}, "camera_model"),
        ({"rolling_shutter": [0, 0, 1, 0]}, "rolling_shutter = [0, 0, 1, 0]: a rolling shutter is not supported"),
        ({"equirectangular": True}, "equirectangular"),
        ({"white_transparent": True}, "white_transparent"),
        ({"frames": ...}, "'frames'"),
        ({"frames": []}, "'frames'"),
        ({"frames": {"0": 1}}, "'frames'"),
        ({"frames": [3]}, "'frames'"),
    ],
)
def test_a_wrong_value_in_the_json_is_one_line(folder: Path, change: dict, said: str) -> None:
    edit(folder, change)
    text = message(folder)
    assert said in text
    assert "transforms_train.json" in text


IDENTITY = np.eye(4).tolist()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"file_path": ...}, "file_path"),
        ({"file_path": 3}, "file_path"),
        ({"file_path": ""}, "file_path"),
        ({"file_path": "a\nb"}, "file_path"),
        ({"file_path": "../r_0"}, "r_0.png: the image is missing"),
        ({"file_path": "train/none"}, "none.png: the image is missing"),
        ({"file_path": "train/" + "n" * 300}, "the image is missing"),
        ({"camera_model": "FISHEYE"}, "frame 1: camera_model"),
        ({"k1": True}, "frame 1: k1"),
        ({"fl_x": -1}, "frame 1: fl_x"),
        ({"transform_matrix": ...}, "transform_matrix"),
        ({"transform_matrix": 1}, "transform_matrix"),
        ({"transform_matrix": []}, "transform_matrix"),
        ({"transform_matrix": IDENTITY[:2]}, "transform_matrix"),
        ({"transform_matrix": [row[:3] for row in IDENTITY]}, "transform_matrix"),
        ({"transform_matrix": [[math.inf] * 4] * 4}, "finite"),
        ({"transform_matrix": [["1"] * 4] * 4}, "finite"),
        ({"transform_matrix": np.zeros((4, 4)).tolist()}, "not a pose"),
        ({"transform_matrix": (2 * np.eye(4)).tolist()}, "not a pose"),
        ({"transform_matrix": np.diag([1.0, 1.0, -1.0, 1.0]).tolist()}, "not a pose"),
        ({"transform_matrix": (np.eye(4) + np.eye(4, k=3) * 1e300).tolist()}, "not a pose"),
        ({"transform_matrix": [*IDENTITY[:3], [0, 0, 0, 2]]}, "not a pose"),
    ],
)
def test_a_wrong_frame_is_one_line(folder: Path, frame: dict, said: str) -> None:
    edit(folder, {}, frame)
    assert said in message(folder)


def test_a_matrix_of_three_rows_is_a_pose(folder: Path) -> None:
    edit(folder, {}, {"transform_matrix": pose(1)[:3].tolist()})
    data.load_training(scene_at(folder))


def test_a_broken_image_is_one_line(folder: Path) -> None:
    path = folder / "train" / "r_2.png"
    whole = path.read_bytes()
    for broken in (b"", b"no image", whole[: len(whole) // 2], whole[:40] + b"\0" * 60 + whole[100:]):
        path.write_bytes(broken)
        text = message(folder)
        assert str(path) in text
    path.unlink()
    assert f"{path}: the image is missing" in message(folder)


def test_a_decompression_bomb_is_one_line(folder: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side in (10_000, 100_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
        body = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        for name in ("r_1.png", "r_2.png"):
            (folder / "train" / name).write_bytes(body)
        assert str(folder / "train" / "r_1.png") in message(folder)


def test_images_of_different_sizes_are_one_line(folder: Path) -> None:
    Image.fromarray(pixels(2, 4, 4)).save(folder / "train" / "r_2.png")
    assert "r_2.png: is 4x4 but r_0.png is 8x4" in message(folder)


def test_an_unsupported_pixel_format_is_one_line(folder: Path) -> None:
    Image.fromarray(pixels(2)).convert("CMYK").save(folder / "train" / "r_2.png", "TIFF")
    assert "is not supported; convert it" in message(folder)


def test_a_wrong_downscale_names_those_that_divide(folder: Path) -> None:
    assert "use one of 1, 2, 4" in message(folder, downscale=3)


def test_a_file_that_cannot_be_read_is_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        transforms.read(folder, ("val",))


# The real thing.


def lego_root() -> str:
    for root in (os.environ.get("JAXNGP_DATA", ""), str(Path(__file__).parents[2] / "shared" / "data")):
        if root and any(
            (Path(root) / sub / "lego" / "transforms_train.json").is_file() for sub in ("", "nerf_synthetic")
        ):
            return root
    return ""


LEGO = lego_root()
needs_lego = pytest.mark.skipif(not LEGO, reason="NeRF-synthetic lego is neither in JAXNGP_DATA nor ../shared/data")


@needs_lego
def test_lego_is_read() -> None:
    split = data.load_evaluation(SceneConfig(name="lego", data_dir=LEGO, downscale=4), "val", num_views=4)
    assert split.views == ("r_0", "r_25", "r_50", "r_75")
    assert split.resolution == (200, 200)
    assert split.has_alpha
    np.testing.assert_allclose(posed(split).cameras.focal_xy, 1111.1111 / 4, rtol=1e-6)
    covered = (posed(split).rgba[:, 3].reshape(4, -1) > 127).mean(axis=1)
    assert ((covered > 0.1) & (covered < 0.6)).all()
    # The cameras stand on a sphere of radius 4.03 around the model, and look at it.
    offset = posed(split).cameras.c2w[..., 3] - 0.5
    np.testing.assert_allclose(np.linalg.norm(offset, axis=-1), 4.0311 / 3, rtol=1e-3)
    np.testing.assert_allclose(posed(split).cameras.c2w[:, :, 2] * 4.0311 / 3, offset, atol=1e-3)


@needs_lego
def test_lego_downscaled_is_the_float64_box_filter() -> None:
    full, small = (
        posed(data.load_evaluation(SceneConfig(name="lego", data_dir=LEGO, downscale=d), "train", 1)) for d in (1, 4)
    )
    values = full.image(0).astype(np.float64)
    values[..., :3] *= values[..., 3:]
    blocks = values.reshape(200, 4, 200, 4, 4).mean(axis=(1, 3))
    expected = np.concatenate([blocks[..., :3] / np.maximum(blocks[..., 3:], 1e-9), blocks[..., 3:]], axis=-1)
    assert np.abs(small.image(0) - expected).max() <= 0.5 + 1e-9
