"""Captures in the formats of other programs: they say the same, and what they say is honoured or refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dialects import DIALECTS, Scene, expressed, scene_path, small_scene, write, write_ply
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import changed_bytes, changed_json, fuzz, or_input_error

from jaxngp import data, runs
from jaxngp.cameras import project_axes, unproject
from jaxngp.config import InputError, SceneConfig
from jaxngp.data import sparse
from jaxngp.data.capture import Box, Capture, DepthMap, Mask
from jaxngp.data.points import read_ply_points

SCENE = small_scene()
PLAIN = replace(small_scene(4), k1=0.0, k2=0.0, p1=0.0, p2=0.0)  # compiles nothing
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)
cast = jax.jit(unproject)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where scenes are written."""
    return tmp_path / "scene"


def capture_at(path: Path, *splits: str) -> Capture:
    location = data.locate(SceneConfig(name=str(path)))
    return location.read(*(splits or location.splits))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        capture_at(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def edit(
    folder: Path, change: dict[str, Any], frame: dict[str, Any] | None = None, *, all_frames: bool = False
) -> None:
    """Change keys at the top of a transforms file, and of its frame 1 or of all; the value ... takes a key out."""
    path = next(folder.glob("transforms*.json"))
    plain = json.loads(path.read_text())
    frames = plain["frames"] if all_frames else plain["frames"][1:2]
    for holder, changes in ((plain, change), *((f, frame or {}) for f in frames)):
        holder.update({key: value for key, value in changes.items() if value is not ...})
        for key in [key for key, value in changes.items() if value is ...]:
            holder.pop(key, None)
    path.write_text(json.dumps(plain))


# All dialects.


def ray_error(capture: Capture, scene: Scene) -> float:
    """By how many pixels rays miss their pixels, where the scene itself projects a point on each of them."""
    share = np.stack(np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 7)), axis=-1).reshape(-1, 2)
    pixel = (share * scene.sizes[:, None]).astype(np.float32)  # (V, P, 2)
    assert capture.cameras is not None
    rays = cast(capture.cameras[:, None], pixel)
    points = np.asarray(rays.origin, np.float64) + 3.0 * np.asarray(rays.direction, np.float64)
    return max(float(np.abs(scene.project(v, points[v]) - pixel[v]).max()) for v in range(len(pixel)))


@every_dialect
def test_rays_of_all_dialects_agree(folder: Path, dialect: str) -> None:
    """To 1e-3 px: with the formula that the scene was written by, and so with each other."""
    write(dialect, folder, SCENE)
    capture = capture_at(scene_path(dialect, folder))
    scene = expressed(dialect, SCENE)
    assert len(capture.names) == len(SCENE.names)
    np.testing.assert_array_equal(capture.cameras.size, scene.sizes)
    assert (capture.cameras.lens is None) == (scene.k1 == 0)
    assert ray_error(capture, scene) < 1e-3


@every_dialect
def test_every_eighth_view_by_name_is_held_out(folder: Path, dialect: str) -> None:
    write(dialect, folder, SCENE)
    config = SceneConfig(name=str(scene_path(dialect, folder)))
    held_out, training = data.load_evaluation(config), data.load_training(config)
    assert [name[-1] for name in held_out.views] == ["0", "8"]
    assert training.num_views == 8
    expected = expressed(dialect, SCENE).images[8]
    if dialect not in ("polycam", "record3d"):  # theirs are JPEG
        np.testing.assert_array_equal(held_out.images.image(1)[..., :3], expected)


@every_dialect
def test_a_format_says_what_it_knows(folder: Path, dialect: str) -> None:
    write(dialect, folder, PLAIN)
    capture = capture_at(scene_path(dialect, folder))
    names = ("Blender", "instant-ngp", "nerfstudio", "COLMAP", "COLMAP", "LLFF", "Polycam", "Record3D")
    assert capture.format == dict(zip(DIALECTS, names, strict=True))[dialect]
    ups = {"blender": (0, 0, 1), "instant-ngp": (0, 0, 1), "polycam": (0, 1, 0), "record3d": (0, 1, 0)}
    assert capture.up == ups.get(dialect)
    assert capture.metres == (1.0 if dialect in ("polycam", "record3d") else None)
    boxes = {"blender": Box((0, 0, 0), 3.0), "instant-ngp": Box((0, 0, 0), 4 / 0.33, 3)}
    assert capture.box == boxes.get(dialect)
    if dialect in ("nerfstudio", "colmap-text", "colmap-binary"):
        np.testing.assert_allclose(capture.points, PLAIN.points, atol=1e-6)
    else:
        assert capture.points is None


@pytest.mark.parametrize(
    "layout", ["sparse/0", "sparse", "colmap/sparse/0", "the model itself", "a json", "downscaled"]
)
def test_where_a_scene_may_be(folder: Path, layout: str) -> None:
    """The other layouts of COLMAP, the path of a transforms file itself, and images at a half alone."""
    write("instant-ngp" if layout == "a json" else "colmap-binary", folder, PLAIN)
    path = folder
    if layout == "a json":
        path = folder / "transforms.json"
    elif layout == "the model itself":
        path = folder / "sparse" / "0"
    elif layout == "downscaled":
        (folder / "images").rename(folder / "images_2")
        for file in (folder / "images_2").iterdir():
            image = Image.open(file)
            image.resize((image.width // 2, image.height // 2)).save(file)
    elif layout != "sparse/0":
        (folder / layout).parent.mkdir(parents=True, exist_ok=True)
        model = (folder / "sparse" / "0").rename(folder / "model")
        if layout == "sparse":
            (folder / "sparse").rmdir()
        model.rename(folder / layout)
    capture = capture_at(path)
    scale = 0.5 if layout == "downscaled" else 1.0
    np.testing.assert_allclose(capture.cameras.focal_xy, PLAIN.focal * scale)
    np.testing.assert_allclose(capture.cameras.centre_xy, PLAIN.centre * scale)
    assert any("scaled to" in note for note in capture.unusual) == (layout == "downscaled")


def test_downscaling_takes_images_that_are_there(folder: Path) -> None:
    """images_2, of another extension and rounded sizes; without them the box filter."""
    write("colmap-text", folder, PLAIN)
    config = SceneConfig(name=str(folder), downscale=2, hold_out_every=0)
    box = data.load_training(config).images
    (folder / "images_2").mkdir()
    for name in PLAIN.names:
        Image.fromarray(np.full((13, 17, 3), 9, np.uint8)).save(folder / "images_2" / f"{name}.bmp")
    images = data.load_training(config).images
    assert (images.rgba[:, :3] == 9).all()
    np.testing.assert_array_equal(images.cameras.size, [[17, 13]] * 4)
    np.testing.assert_allclose(images.cameras.focal_xy[0], PLAIN.focal[0] * (17 / 32, 13 / 24), rtol=1e-6)
    np.testing.assert_allclose(box.cameras.focal_xy[0], PLAIN.focal[0] / 2, rtol=1e-6)


# Paths.


@pytest.mark.parametrize("key", ["file_path", "mask_path", "depth_file_path", "ply_file_path"])
def test_a_path_may_be_written_on_windows(folder: Path, key: str) -> None:
    """With backslashes, or absolute on a machine that is not this one: then it is looked for in the scene's folder."""
    write("nerfstudio", folder, PLAIN)
    (folder / "more").mkdir()
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "more" / "a b ü.PNG")
    write_ply(folder / "more" / "a b ü.ply", PLAIN.points)
    name = "a b ü.ply" if key.startswith("ply") else "a b ü.PNG"
    for written in (rf".\more\{name}", rf"C:\Users\me\scene\more\{name}", f"/home/me/scene/more/{name}"):
        edit(folder, *(({key: written}, {}) if key.startswith("ply") else ({}, {key: written})))
        capture = capture_at(folder)
        found = (folder / "more" / name).resolve()
        descriptors = [capture.files, [m.file for m in capture.masks if m], [d.file for d in capture.depths if d]]
        files = [file.resolve() for some in descriptors for file in some]
        assert found in files or len(capture.points) == len(PLAIN.points)
        assert any("absolute path" in note for note in capture.unusual) == (not written.startswith("."))


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "PNG", "bmp", "webp", "tiff"])
def test_an_extension_may_be_left_out(folder: Path, suffix: str) -> None:
    write("instant-ngp", folder, PLAIN)
    (folder / "images" / "view_001.png").unlink()
    Image.fromarray(PLAIN.images[1]).save(folder / "images" / f"a.b.{suffix}")
    edit(folder, {}, {"file_path": "images/a.b"})
    assert f"a.b.{suffix}" in [file.name for file in capture_at(folder).files]


def test_names_are_sorted_as_their_program_does(folder: Path) -> None:
    """instant-ngp by numbers, nerfstudio by characters, COLMAP too."""
    for dialect, expected in (("instant-ngp", ["2", "10", "a1", "a3"]), ("nerfstudio", ["10", "2", "a1", "a3"])):
        write(dialect, folder / dialect, PLAIN)
        names = dict(zip(PLAIN.names, ("a3", "10", "2", "a1"), strict=True))
        for old, new in names.items():
            (folder / dialect / "images" / f"{old}.png").rename(folder / dialect / "images" / f"{new}.png")
        path = folder / dialect / "transforms.json"
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(old, new)
        path.write_text(text)
        assert [*capture_at(folder / dialect).names] == expected


# Images that are missing, or unusual.


def test_missing_images_of_instant_ngp_are_noted_once(folder: Path) -> None:
    """Where the file rates its images by sharpness; else they are an error, with their count."""
    write("instant-ngp", folder, PLAIN)
    for i in (0, 2):
        (folder / "images" / f"view_00{i}.png").unlink()
    capture = capture_at(folder)
    assert capture.names == ("view_001", "view_003")
    (note,) = [note for note in capture.unusual if "are missing" in note]
    assert "2 of 4 images are missing, such as 'images/view_000.png'" in note
    edit(folder, {}, {"sharpness": ...}, all_frames=True)
    assert "view_000.png: the image is missing, and 1 more of 4 are" in refusal(folder)


@pytest.mark.parametrize("dialect", ["nerfstudio", "colmap-text", "colmap-binary", "polycam"])
def test_missing_images_are_an_error_with_a_count(folder: Path, dialect: str) -> None:
    write(dialect, folder, PLAIN)
    images = next(p for p in folder.rglob("*images") if p.is_dir())
    for file in sorted(images.iterdir())[1:]:
        file.unlink()
    assert "the image is missing, and 2 more of 4 are" in refusal(folder)


def test_what_exif_and_16_bits_say_is_noted(folder: Path) -> None:
    """A pose belongs to the pixels as they are stored; grey of 16 bits is rounded to 8."""
    write("nerfstudio", folder, PLAIN)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PLAIN.images[1]).save(folder / "images" / "view_001.png", exif=exif)
    deep = np.arange(32 * 24, dtype=np.uint16).reshape(24, 32) * 85
    Image.fromarray(deep).save(folder / "images" / "view_002.png")
    split = data.load_training(SceneConfig(name=str(folder), hold_out_every=0))
    assert any("view_001.png: says in EXIF" in note for note in split.notes)
    assert any("view_002.png: has 16 bits" in note for note in split.notes)
    np.testing.assert_array_equal(split.images.image(1)[..., :3], PLAIN.images[1])
    np.testing.assert_array_equal(split.images.image(2)[..., 0], np.rint(deep / 257))


def test_a_size_that_only_a_turned_image_has(folder: Path) -> None:
    write("nerfstudio", folder, PLAIN)
    edit(folder, {}, {"w": 24, "h": 32})
    assert "w, h = 24, 32 but the image is 32x24" in (text := refusal(folder))
    assert "EXIF" in text


# A transforms.json: what its keys mean.


def test_comments_are_legal(folder: Path) -> None:
    write("instant-ngp", folder, PLAIN)
    path = folder / "transforms.json"
    path.write_text('// of "instant-ngp"\n' + path.read_text().replace('"frames"', '/* all\n */ "frames"'))
    assert len(capture_at(folder).names) == 4
    path.write_text("/* no end " + path.read_text())
    assert "is not JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("top", "own", "expected"),
    [
        ({"aabb_scale": 1}, {}, 20.0),
        ({"applied_scale": 1.0}, {}, 30.0),
        ({}, {"colmap_im_id": 1}, 30.0),
        ({"camera_angle_y": 1.0}, {}, 20.0),
        ({}, {}, None),
        ({"aabb_scale": 1, "camera_model": "OPENCV"}, {}, None),
    ],
)
def test_whose_values_count(folder: Path, top: dict, own: dict, expected: float | None) -> None:
    """A frame's for instant-ngp and those at the top for nerfstudio; where the file leaves it open it is refused."""
    write("nerfstudio", folder, PLAIN)
    gone = dict.fromkeys(("camera_model", "applied_transform", "ply_file_path", "k1", "k2", "p1", "p2"), ...)
    edit(
        folder,
        gone | {"fl_x": 30.0} | top,
        {**dict.fromkeys(("colmap_im_id", "k1", "p2", "fl_y"), ...)},
        all_frames=True,
    )
    edit(folder, {}, {"fl_x": 20.0, **own}, all_frames=True)
    if expected is None:
        assert "fl_x = 20.0 but 30.0 at the top of the file" in refusal(folder)
    else:
        capture = capture_at(folder)
        np.testing.assert_allclose(capture.cameras.focal_xy[:, 0], expected)
        assert any("those at the top count" in note for note in capture.unusual) == (expected == 30)


def test_intrinsics_may_be_in_frames_alone(folder: Path) -> None:
    """Of any dialect, and with a field of view at the top as well."""
    write("blender", folder, PLAIN)
    own = {"fl_x": 35.0, "fl_y": 34.0, "cx": 15.0, "cy": 12.5, "camera_angle_x": ...}
    edit(folder, {"camera_angle_x": 0.691}, own, all_frames=True)
    for change in ({}, {"camera_angle_x": ...}):
        edit(folder, change)
        np.testing.assert_allclose(capture_at(folder).cameras.focal_xy, [[35, 34]] * 4)


def test_degrees_radians_and_a_missing_axis(folder: Path) -> None:
    write("instant-ngp", folder, PLAIN)
    gone = dict.fromkeys(("fl_x", "fl_y", "k1", "k2", "p1", "p2"), ...)
    edit(folder, gone | {"x_fov": 60.0, "fl_x": 5.0, "camera_angle_x": 2.0}, gone, all_frames=True)
    focal = capture_at(folder).cameras.focal_xy
    np.testing.assert_allclose(focal[0], [16 / np.tan(np.pi / 6)] * 2)
    edit(folder, {"x_fov": ..., "fl_x": ..., "camera_angle_y": 1.0})
    np.testing.assert_allclose(capture_at(folder).cameras.focal_xy[0], [16 / np.tan(1), 12 / np.tan(0.5)])


@pytest.mark.parametrize("of_file", [False, True])
def test_a_stale_size_of_instant_ngp(folder: Path, of_file: bool) -> None:
    """Images at half the size that w and h say: fl_x is of w, unless the field of view says that it is of the file."""
    write("instant-ngp", folder, PLAIN)
    angle = 2 * np.arctan(32 / 40)
    stale = {"w": 64, "h": 48, "cx": 30.0, "cy": 24.0, "fl_x": 20.0 if of_file else 40.0, "camera_angle_x": angle}
    edit(folder, {"k1": ...}, stale | {"fl_y": ...})
    capture = capture_at(folder)
    np.testing.assert_allclose(capture.cameras.focal_xy[1], 20)
    np.testing.assert_allclose(capture.cameras.centre_xy[1], [15, 12])
    assert any("scaled to" in note for note in capture.unusual)


@pytest.mark.parametrize(
    ("change", "model"),
    [
        ({"is_fisheye": True}, "fisheye"),
        ({"is_fisheye": True, "p1": 0.0, "p2": 0.0, "k3": 0.01, "k4": -0.002}, "fisheye"),
        ({"camera_model": "OPENCV_FISHEYE"}, "fisheye"),
        ({"camera_model": "OPENCV", "k1": 0.1}, "perspective"),
        ({"camera_model": "EQUIRECTANGULAR", "fl_x": 16.0, "fl_y": 32.0, "cx": 16.0, "cy": 16.0}, "equirectangular"),
        ({"latlong": True}, "equirectangular"),
    ],
)
def test_a_lens_is_what_the_file_says(folder: Path, change: dict, model: str) -> None:
    write("blender", folder, PLAIN)
    edit(folder, {}, change, all_frames=True)
    capture = capture_at(folder)
    lens = capture.cameras.lens
    assert lens.model == model
    known = dict(zip(("k1", "k2", "k3", "k4"), np.asarray(lens.coefficients)[0], strict=False))
    assert all(known[key] == np.float32(value) for key, value in change.items() if key in known)
    if model == "equirectangular":
        np.testing.assert_allclose(capture.cameras.focal_xy[0, 0], 32 / (2 * np.pi))
    split = data.load_training(SceneConfig(name=str(folder), downscale=2))
    np.testing.assert_array_equal(split.images.cameras.lens.coefficients, lens.coefficients[1:])


def test_distortion_params_are_six_numbers(folder: Path) -> None:
    write("nerfstudio", folder, PLAIN)
    gone = dict.fromkeys(("k1", "k2", "p1", "p2"), ...)
    edit(folder, gone | {"distortion_params": [0.1, 0.02, 0.003, 0.0004, 0.005, 0.006]}, gone, all_frames=True)
    found = np.asarray(capture_at(folder).cameras.lens.coefficients)[0]
    np.testing.assert_allclose(found[[0, 1, 2, 3, 7, 8]], [0.1, 0.02, 0.003, 0.0004, 0.005, 0.006], rtol=1e-6)
    edit(folder, {"distortion_params": [0.1]})
    assert "distortion_params = [0.1]: expected 6 finite numbers" in refusal(folder)


def test_lenses_of_several_models_are_refused(folder: Path) -> None:
    write("instant-ngp", folder, SCENE)
    edit(folder, {}, {"is_fisheye": True, "p1": 0.0, "p2": 0.0})
    assert "OPENCV (9), is_fisheye (1)" in refusal(folder)


def test_the_corners_beyond_a_fisheye_are_noted(folder: Path) -> None:
    """A circle within the image is a lens; one that covers less than the rectangle in its middle is not."""
    scene = replace(PLAIN, focal=np.full((4, 2), 9.0), centre=PLAIN.sizes / 2)
    write("instant-ngp", folder, scene)
    edit(folder, {}, {"is_fisheye": True, "k1": -0.055}, all_frames=True)
    (note,) = [note for note in capture_at(folder).unusual if "ends before" in note]
    assert "ends before the corners of the image, and those of 3 more views" in note
    edit(folder, {}, {"k1": -0.4}, all_frames=True)
    assert "is_fisheye (k1 = -0.4, focal length 9) folds over inside the image" in refusal(folder)


def test_lists_of_names_are_splits(folder: Path) -> None:
    write("nerfstudio", folder, PLAIN)
    names = [rf".\images\{name}.png" for name in PLAIN.names]
    edit(folder, {"train_filenames": names[:2], "val_filenames": names[3:], "test_filenames": names[3:]})
    location = data.locate(SceneConfig(name=str(folder)))
    assert location.splits == ("train", "val", "test")
    assert location.read("train").names == ("view_000", "view_001")
    assert location.read("test").names == location.read("val").names == ("view_003",)
    assert data.load_evaluation(SceneConfig(name=str(folder))).name == "test"
    edit(folder, {"val_filenames": ["images/none.png"]})
    assert "val_filenames: names 1 that no frame has, such as 'images/none.png'" in refusal(folder)


def test_a_file_of_one_split_may_list_its_views(folder: Path) -> None:
    write("blender", folder, PLAIN)
    edit(folder, {"train_filenames": ["train/view_002"]})
    assert capture_at(folder).names == ("view_002",)
    edit(folder, {"test_filenames": ["train/view_001"]})
    assert "test_filenames: the file is that of the train split alone" in refusal(folder)


def test_masks_mean_opposite_things(folder: Path) -> None:
    """mask_path of nerfstudio leaves out black, dynamic_mask_<stem>.png of instant-ngp all but black."""
    write("nerfstudio", folder, PLAIN)
    mask = Image.fromarray(np.zeros((24, 32), np.uint8))
    mask.save(folder / "m.png")
    mask.save(folder / "images" / "dynamic_mask_view_000.png")
    edit(folder, {}, {"mask_path": "m.png"})  # of view_002, as frames are in reverse
    dynamic = Mask(folder / "images" / "dynamic_mask_view_000.png", keep="zero")
    assert capture_at(folder).masks == (dynamic, None, Mask(folder / "m.png", keep="non-zero"), None)
    mask.save(folder / "images" / "dynamic_mask_view_002.png")
    assert "mask_path, but" in refusal(folder)


@pytest.mark.parametrize("key", ["mask_path", "depth_file_path"])
def test_missing_masks_and_depths_are_named_once(folder: Path, key: str) -> None:
    write("nerfstudio", folder, PLAIN)
    edit(folder, {}, {key: "no/such/one.png"}, all_frames=True)
    what = "mask" if key == "mask_path" else "depth map"
    assert f"no/such/one.png: the {what} is missing, and 3 more of 4 are" in refusal(folder)


def test_depths_have_the_unit_that_the_file_says(folder: Path) -> None:
    write("nerfstudio", folder, PLAIN)
    for name in ("d.png", "d.npy"):
        (folder / name).touch()
    edit(folder, {"applied_scale": 0.5}, {"depth_file_path": "d.npy"})
    capture = capture_at(folder)
    assert capture.depths == (None, None, DepthMap(folder / "d.npy", 0.5e-3, "axis"), None)
    assert capture.metres == 2.0
    other = folder / "other"
    write("instant-ngp", other, PLAIN)
    (other / "d.png").touch()
    edit(other, {"integer_depth_scale": 0.002}, {"depth_path": "d.png"})
    assert capture_at(other).depths[1] == DepthMap(other / "d.png", 0.002, "axis")
    edit(other, {"enable_depth_loading": False})
    capture = capture_at(other)
    assert not capture.depths
    assert any("depth_path: not read" in note for note in capture.unusual)


def test_an_alpha_file_is_the_alpha(folder: Path) -> None:
    """Its red channel, taken from sRGB to linear and rounded down, as instant-ngp does."""
    write("instant-ngp", folder, PLAIN)
    alpha = np.zeros((24, 32, 3), np.uint8)
    alpha[:, :16, 0] = 188
    Image.fromarray(alpha).save(folder / "images" / "view_001.png.alpha.png")
    split = data.load_training(SceneConfig(name=str(folder), hold_out_every=0))
    assert split.has_alpha
    assert (split.images.image(1)[:, :16, 3] == int(255 * ((188 / 255 + 0.055) / 1.055) ** 2.4)).all()
    assert (split.images.image(1)[:, 16:, 3] == 0).all()
    assert (split.images.image(0)[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("change", "box"),
    [
        ({"aabb_scale": 1}, Box((0, 0, 0), 1 / 0.33)),
        ({"aabb_scale": 16, "scale": 0.25}, Box((0, 0, 0), 64, 5)),
        ({"aabb_scale": 2, "scale": 0.5, "offset": [0.5, 1.0, 0.0]}, Box((0, -1, 1), 4, 2)),
        ({"aabb_scale": 2, "scale": 0.5, "offset": 0.25}, Box((0.5, 0.5, 0.5), 4, 2)),
        ({"aabb_scale": 2, "aabb": [[-1, 0, 2], [1, 4, 3]]}, Box((0, 2, 2.5), 8, 2)),
    ],
)
def test_the_box_is_that_of_instant_ngp(folder: Path, change: dict, box: Box) -> None:
    """The cube of side aabb_scale about 1/2, of positions scale p + offset."""
    write("instant-ngp", folder, PLAIN)
    edit(folder, change | {"up": [0, 3, 0]})
    capture = capture_at(folder)
    np.testing.assert_allclose([*capture.box.centre, capture.box.side], [*box.centre, box.side], atol=1e-12)
    assert capture.box.num_cascades == box.num_cascades
    assert capture.up == (0, 1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"aabb_scale": 3}, {"aabb_scale": 256}, {"scale": 0}, {"offset": [1, 2]}, {"aabb": [[0, 0, 0]]},
        {"n_frames": 0}, {"up": [0, 0, 0]}, {"integer_depth_scale": "1"}, {"from_na": True}, {"ftheta_p0": 0.0},
        {"orthographic": True}, {"black_transparent": True}, {"sharpen": 0.5}, {"rolling_shutter": [0, 0, 1, 0]},
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(folder: Path, change: dict) -> None:
    write("instant-ngp", folder, PLAIN)
    (folder / "d.png").touch()
    edit(folder, change, {"depth_path": "d.png"})
    assert next(iter(change)) in refusal(folder)


@pytest.mark.parametrize("change", [{"ply_file_path": 3}, {"applied_scale": -1}, {"camera_model": "VR180_L"}])
def test_what_nerfstudio_has_no_sense_for_is_named(folder: Path, change: dict) -> None:
    write("nerfstudio", folder, PLAIN)
    (folder / "d.png").touch()
    edit(folder, change, {"depth_file_path": "d.png"})
    assert next(iter(change)) in refusal(folder)


# COLMAP.


def test_names_with_spaces_and_blank_points_lines(folder: Path) -> None:
    write("colmap-text", folder, PLAIN)
    (folder / "images" / "view_001.png").rename(folder / "images" / "ä b  c.png")
    path = folder / "sparse" / "0" / "images.txt"
    path.write_text(path.read_text().replace("view_001.png", "ä b  c.png"))
    assert capture_at(folder).names == ("view_000", "view_002", "view_003", "ä b  c")


def test_binary_precedes_text_others_are_named(folder: Path) -> None:
    write("colmap-binary", folder, PLAIN)
    model = folder / "sparse" / "0"
    for name in ("cameras", "images"):
        (model / f"{name}.txt").write_text("broken")
    (model / "points3D.bin").unlink()
    (folder / "sparse" / "1").mkdir()
    for name in ("cameras", "images"):
        (folder / "sparse" / "1" / f"{name}.txt").touch()
    capture = capture_at(folder)
    assert capture.points is None
    assert any("1 beside it are not" in note for note in capture.unusual)


COLMAP_CAMERAS = {
    "SIMPLE_PINHOLE": [30, 16, 12],
    "PINHOLE": [30, 31, 15, 13],
    "SIMPLE_RADIAL": [30, 16, 12, 0.1],
    "RADIAL": [30, 16, 12, 0.1, -0.05],
    "OPENCV": [30, 31, 15, 13, 0.1, -0.05, 0.003, -0.002],
    "OPENCV_FISHEYE": [20, 21, 15, 13, 0.03, -0.02, 0.004, -0.001],
    "FULL_OPENCV": [30, 31, 15, 13, 0.2, 0.1, 0.003, -0.002, 0.01, 0.15, 0.05, 0.002],
    "FOV": [20, 21, 15, 13, 0.9],
    "SIMPLE_RADIAL_FISHEYE": [20, 16, 12, 0.03],
    "RADIAL_FISHEYE": [20, 16, 12, 0.03, -0.01],
    "THIN_PRISM_FISHEYE": [20, 21, 15, 13, 0.03, -0.02, 0.003, -0.002, 0.004, -0.001, 0.002, -0.003],
    "SIMPLE_DIVISION": [30, 16, 12, -0.15],
    "DIVISION": [30, 31, 15, 13, -0.15],
    "SIMPLE_FISHEYE": [20, 16, 12],
    "FISHEYE": [20, 21, 15, 13],
    "EUCM": [25, 26, 15, 13, 0.55, 1.1],
    "EQUIRECTANGULAR": [32, 24],
}
_PEER = """
import json, sys, numpy as np, pycolmap
cameras, points = json.load(sys.stdin)
out = {}
for name, parameters in cameras.items():
    camera = pycolmap.Camera(model=name, width=32, height=24, params=parameters)
    out[name] = np.asarray(camera.img_from_cam(np.array(points))).tolist()
json.dump(out, sys.stdout)
"""


def write_colmap_camera(folder: Path, name: str) -> None:
    """The first view alone, with a camera of that model."""
    write("colmap-text", folder, replace(small_scene(1), sizes=np.array([[32, 24]]), images=PLAIN.images[:1]))
    parameters = " ".join(map(str, COLMAP_CAMERAS.get(name, [1.0] * 16)))
    (folder / "sparse" / "0" / "cameras.txt").write_text(f"5 {name} 32 24 {parameters}\n")


@pytest.mark.skipif(importlib.util.find_spec("pycolmap") is None, reason="pycolmap is not installed")
def test_colmap_cameras_are_those_of_colmap(tmp_path: Path) -> None:
    """Asked in a process of its own: its zlib and Pillow's do not go together."""
    points = np.random.default_rng(0).uniform(-0.3, 0.3, (50, 3)) + (0, 0, 1.0)
    said = subprocess.run(
        [sys.executable, "-c", _PEER],
        input=json.dumps([COLMAP_CAMERAS, points.tolist()]),
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    for name, expected in json.loads(said.stdout).items():
        write_colmap_camera(tmp_path / name, name)
        capture = capture_at(tmp_path / name)
        assert capture.lens_models == (name,)
        assert capture.cameras is not None
        camera: Any = capture.cameras[0]
        world = camera.c2w[:, 3] + points * (1, -1, -1) @ camera.c2w[:, :3].T
        x, y, depth = project_axes(camera, *np.split(np.float32(world).T, 3))
        assert (np.asarray(depth) > 0).all()
        np.testing.assert_allclose(np.concatenate([x, y]).T, expected, atol=1e-4, err_msg=name)


def test_every_camera_of_colmap_is_read_or_named(tmp_path: Path) -> None:
    for name in sparse.MODEL_NUMBERS:
        if name not in COLMAP_CAMERAS:
            write_colmap_camera(tmp_path / name, name)
            assert f"camera model {name} is not supported" in refusal(tmp_path / name)


# Broken and hostile files.

FUZZED = [
    *(("colmap-binary", f"sparse/0/{name}.bin") for name in ("cameras", "images", "points3D")),
    *(("colmap-text", f"sparse/0/{name}.txt") for name in ("cameras", "images", "points3D")),
    ("llff", "poses_bounds.npy"),
    ("nerfstudio", "points.ply"),
    ("record3d", "capture.r3d"),
    ("polycam", "keyframes/corrected_cameras/view_001.json"),
]


@pytest.mark.parametrize(("dialect", "name"), FUZZED, ids=[f"{d} {Path(n).name}" for d, n in FUZZED])
@fuzz
@given(drawn=st.data())
def test_a_changed_file_is_read_or_refused(tmp_path: Path, drawn: st.DataObject, dialect: str, name: str) -> None:
    scene = tmp_path / "fuzzed"
    if not scene.exists():
        write(dialect, scene, PLAIN)
        (scene / "copy").write_bytes((scene / name).read_bytes())
    (scene / name).write_bytes(drawn.draw(changed_bytes((scene / "copy").read_bytes())))
    os.utime(scene / name, ns=(0, drawn.draw(st.integers(0, 2**60))))  # or what was unpacked before would be taken
    capture = or_input_error(lambda: capture_at(scene_path(dialect, scene)))
    if capture is not None:
        assert np.isfinite(capture.cameras.c2w).all()
        assert np.isfinite(capture.cameras.focal_xy).all()


NERFSTUDIO = {
    "camera_model": "OPENCV", "applied_scale": 1.0, "ply_file_path": "points.ply",
    "train_filenames": ["images/view_000.png"],
    "fl_x": 30.0, "cx": 16.0, "w": 32, "h": 24, "k1": 0.0, "distortion_params": [0.0] * 6, "up": [0, 0, 1.0],
    "aabb_scale": 4, "offset": [0.5, 0.5, 0.5], "aabb": [[0, 0, 0], [1, 1, 1]], "integer_depth_scale": 0.001,
    "frames": [
        {"file_path": f"images/view_00{i}.png", "transform_matrix": np.eye(4).tolist(), "sharpness": 9.0,
         "fl_x": 30.0, "mask_path": "images/view_000.png", "depth_file_path": "images/view_000.png",
         "depth_path": "images/view_001.png"}
        for i in range(3)
    ],
}  # fmt: skip


@fuzz
@given(changed_json(NERFSTUDIO))
def test_a_changed_transforms_json_is_read_or_refused(tmp_path: Path, plain: Any) -> None:
    scene = tmp_path / "fuzzed"
    if not scene.exists():
        write("nerfstudio", scene, PLAIN)
    (scene / "transforms.json").write_text(json.dumps(plain))
    capture = or_input_error(lambda: capture_at(scene, "train"))
    if capture is not None:
        assert np.isfinite(capture.cameras.focal_xy).all()


def test_points_of_a_ply(tmp_path: Path) -> None:
    write_ply(tmp_path / "a.ply", PLAIN.points)
    np.testing.assert_array_equal(read_ply_points(tmp_path / "a.ply"), np.float32(PLAIN.points))
    rows = ["1 2 3 x", "4 nan 6 x", "7 8 9 x"]
    head = "ply\r\nformat ascii 1.0\r\ncomment c\r\nelement vertex 3\r\nproperty double y\r\nproperty float x\r\n"
    head += "property float z\r\nproperty uchar red\r\nelement face 0\r\nproperty list uchar int i\r\nend_header\r\n"
    (tmp_path / "b.ply").write_bytes((head + "\r\n".join(rows) + "\r\n").encode())
    np.testing.assert_array_equal(read_ply_points(tmp_path / "b.ply"), [[2, 1, 3], [8, 7, 9]])


# What a run keeps of them.


def test_a_lens_is_kept_in_scene_json_and_noticed(folder: Path) -> None:
    """It comes back bit for bit, a file without lenses is one of pinholes, and another coefficient is other data."""
    write("instant-ngp", folder, SCENE)
    config = SceneConfig(name=str(folder))
    split = data.load_training(config)
    path = folder / "scene.json"
    plain = json.loads(json.dumps(runs._describe(split)))
    path.write_text(json.dumps(plain))
    jax.tree.map(np.testing.assert_array_equal, runs._read_cameras(path), split.images.cameras)
    edit(folder, {}, {"k2": -0.051})
    assert data.changed(plain["fingerprint"], data.fingerprint(data.load_training(config))) == (
        "1 of 8 views have other intrinsics"
    )
    del plain["cameras"]["lens"]
    path.write_text(json.dumps(plain))
    assert runs._read_cameras(path).lens is None
    plain["cameras"]["lens"] = {"model": "none"}
    path.write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"lens\.model"):
        runs._read_cameras(path)
