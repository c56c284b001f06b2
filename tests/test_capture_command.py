"""Structure from motion: the cameras of renders are found again, the sharp frames of a video, and what is refused.

What needs the extra `capture` is skipped without it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entrypoints import Entrypoint
from PIL import Image

from jaxngp import capture, flags
from jaxngp.cameras import look_at
from jaxngp.config import InputError, SceneConfig
from jaxngp.data import bricks, locate, motion, video
from jaxngp.data.bricks import pictures

run = Entrypoint("jaxngp.capture", flags.define_capture_flags, capture.main)
SIZE, NUM_VIEWS = 400, 40

# find_spec, for pycolmap must not be imported here: see jaxngp.data.colmap.
needs_colmap = pytest.mark.skipif(not importlib.util.find_spec("pycolmap"), reason="pycolmap is not installed")
needs_av = pytest.mark.skipif(not importlib.util.find_spec("av"), reason="av is not installed")


def write_images(folder: Path, names: list[str], seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return folder


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of all that is in a folder."""
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*")}


# The law: the cameras of the built-in scene's pictures are found again.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An orbit around the built-in scene before white, without alpha."""
    folder = tmp_path_factory.mktemp("bricks") / "images"
    folder.mkdir()
    poses = bricks.bricks_cameras("test")
    files = [folder / f"view_{index}.png" for index in range(len(poses))]
    pictures._write_pictures([*zip(files, poses, strict=True)], SIZE, progress=False)
    for file in files:
        with Image.open(file) as image:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
        white.convert("RGB").save(file)
    return folder


@pytest.fixture(scope="module")
def captured(photographs: Path) -> Path:
    """What the command writes about them, in a folder beside them."""
    before = contents(photographs)
    run(f"--images={photographs}", f"--out={photographs.parent / 'out'}")
    assert contents(photographs) == before
    return photographs.parent / "out"


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale s, rotation R, offset t for which s R source + t is nearest to target, (N, 3) each (Umeyama 1991)."""
    means = source.mean(axis=0), target.mean(axis=0)
    a, b = source - means[0], target - means[1]
    u, d, v = np.linalg.svd(b.T @ a)
    signs = np.array([1, 1, np.sign(np.linalg.det(u @ v))])
    rotation = u @ np.diag(signs) @ v
    scale = float((d * signs).sum() / np.square(a).sum())
    return scale, rotation, means[1] - scale * rotation @ means[0]


def angle(rotation: np.ndarray) -> np.ndarray:
    """Degrees of rotations (..., 3, 3)."""
    return np.degrees(np.arccos(np.clip((np.trace(rotation, axis1=-2, axis2=-1) - 1) / 2, -1, 1)))


@pytest.mark.slow
@needs_colmap
def test_the_cameras_of_renders_are_found_again(captured: Path) -> None:
    """Of 95 % of the views at least, within half a degree after the similarity that aligns them best."""
    plain = json.loads((captured / "transforms.json").read_text())
    truth = bricks.bricks_cameras("test").astype(np.float64)
    assert len(plain["frames"]) >= 0.95 * NUM_VIEWS
    numbers = [int(Path(frame["file_path"]).stem.removeprefix("view_")) for frame in plain["frames"]]
    found = np.array([frame["transform_matrix"] for frame in plain["frames"]])[:, :3]
    truth = truth[numbers]
    scale, rotation, offset = similarity(found[:, :, 3], truth[:, :, 3])
    errors = angle(np.swapaxes(truth[:, :, :3], 1, 2) @ rotation @ found[:, :, :3])
    assert errors.max() < 0.5
    radius = np.linalg.norm(truth[:, :, 3], axis=1).mean()
    positions = scale * found[:, :, 3] @ rotation.T + offset
    assert np.linalg.norm(positions - truth[:, :, 3], axis=1).max() < 0.02 * radius
    # z is up and the origin where the cameras look, as in the truth; the mean distance is 4.
    assert np.degrees(np.arccos(rotation[2, 2])) < 2
    assert np.linalg.norm(offset) < 0.02 * radius
    np.testing.assert_allclose(np.linalg.norm(found[:, :, 3], axis=1).mean(), 4, rtol=1e-6)


@pytest.mark.slow
@needs_colmap
def test_what_is_written_is_whole(captured: Path) -> None:
    plain = json.loads((captured / "transforms.json").read_text())
    frames = plain["frames"]
    assert all((captured / frame["file_path"]).is_file() for frame in frames)
    assert {str(Path(frame["file_path"]).parent) for frame in frames} == {"../images"}
    focal = 0.5 * SIZE / np.tan(0.5 * pictures.CAMERA_ANGLE_X)
    assert (plain["camera_model"], plain["w"], plain["h"]) == ("OPENCV", SIZE, SIZE)
    np.testing.assert_allclose([plain["fl_x"], plain["fl_y"]], focal, rtol=0.02)
    assert {"cx", "cy", "k1", "k2", "p1", "p2", "camera_angle_x"} <= {*plain}
    assert plain["aabb_scale"] in (1, 2)
    header, _, rows = (captured / plain["ply_file_path"]).read_text().partition("end_header\n")
    points = np.loadtxt(rows.splitlines())
    assert f"element vertex {len(points)}" in header
    assert np.quantile(np.linalg.norm(points[:, :3], axis=1), 0.9) < 2  # the toy is 1.3 in radius, 4 away
    assert (captured / "colmap" / "sparse" / "0" / "cameras.bin").is_file()
    rotation = np.array(plain["applied_transform"])[:, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)


@pytest.mark.slow
@needs_colmap
def test_what_is_written_is_a_scene(captured: Path) -> None:
    """One trains from it: the views, their lens and the points are read back."""
    plain = json.loads((captured / "transforms.json").read_text())
    place = locate(SceneConfig(name=str(captured)))
    views = place.read(*place.splits)
    assert len(views.names) == len(plain["frames"])
    poses = {frame["file_path"]: frame["transform_matrix"] for frame in plain["frames"]}
    for file, c2w in zip(views.files, np.asarray(views.cameras.c2w), strict=True):
        np.testing.assert_allclose(c2w, poses[f"../images/{file.name}"][:3], atol=1e-6)
    np.testing.assert_allclose(np.asarray(views.cameras.focal_xy)[0], [plain["fl_x"], plain["fl_y"]], rtol=1e-6)
    assert views.cameras.lens is not None
    assert len(views.points) > 100


@pytest.mark.slow
@needs_colmap
def test_the_same_again_maps_nothing_anew(
    captured: Path, photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = captured / "colmap" / "sparse" / "0"
    before, text = contents(model), (captured / "transforms.json").read_text()
    run(f"--images={photographs}", f"--out={captured}")
    assert (contents(model), (captured / "transforms.json").read_text()) == (before, text)
    said = capsys.readouterr().out
    assert "40 of 40 images registered; mean reprojection error 0." in said
    assert f"python -m jaxngp.train --scene={captured}" in said
    monkeypatch.chdir(captured.parent)
    run(f"--images={photographs}", f"--out={captured.name}")
    assert f"python -m jaxngp.train --scene=./{captured.name}\n" in capsys.readouterr().out
    error = run.refusal(capsys, f"--images={photographs}", f"--out={captured}", "--camera_model=PINHOLE")
    assert "camera_model" in error
    assert "--restart" in error


@needs_colmap
def test_images_without_anything_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "noise", [f"{i}.png" for i in range(3)], size=(160, 120))
    error = run.refusal(capsys, f"--images={images}", f"--out={tmp_path / 'out'}")
    assert "no two of the 3 images have enough in common" in error
    assert "overlap" in error
    assert not (tmp_path / "out" / "transforms.json").exists()
    for index in range(3):
        Image.fromarray(np.full((120, 160, 3), 40 * index, np.uint8)).save(images / f"{index}.png")
    assert "--restart" in run.refusal(capsys, f"--images={images}", f"--out={tmp_path / 'out'}")
    again = ("--restart", "--matching=sequential", "--camera_model=OPENCV_FISHEYE")
    assert "enough in common" in run.refusal(capsys, f"--images={images}", f"--out={tmp_path / 'out'}", *again)


# Videos.


def write_video(path: Path, *, turn: int = 0, num_frames: int = 30) -> Path:
    """Frames of which each third is sharp and the others blurred, from the second on; red in their first corner."""
    import av

    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 255, (16, 24, 1)).repeat(4, axis=0).repeat(4, axis=1).repeat(3, axis=2).astype(np.float64)
    blurred = sharp
    for _ in range(6):
        blurred = np.mean([np.roll(blurred, s, axis) for axis in (0, 1) for s in (-1, 1)], axis=0)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for index in range(num_frames):
            pixels = (sharp if index % 3 == 1 else blurred).astype(np.uint8)
            pixels[:8, :8] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@needs_av
def test_the_sharp_frames_of_a_video_are_kept(tmp_path: Path) -> None:
    frames = video.sharp_frames(write_video(tmp_path / "walk.mp4"), tmp_path / "frames", 10)
    assert [frame.name for frame in frames] == [f"frame_{i:06d}.jpg" for i in range(1, 30, 3)]
    assert sorted(tmp_path.glob("frames/*")) == frames
    few = video.sharp_frames(tmp_path / "walk.mp4", tmp_path / "few", 3)
    assert [int(frame.stem[-6:]) % 3 for frame in few] == [1, 1, 1]
    assert len(video.sharp_frames(tmp_path / "walk.mp4", tmp_path / "all", 1000)) == 30
    assert {path.name for path in tmp_path.iterdir()} == {"walk.mp4", "frames", "few", "all"}


@needs_av
@pytest.mark.parametrize(("turn", "corner"), [(0, (3, 3)), (90, (3, 92)), (-90, (60, 3)), (180, (92, 60))])
def test_frames_of_a_turned_video_are_upright(turn: int, corner: tuple[int, int], tmp_path: Path) -> None:
    """A display matrix turns counter-clockwise, by `turn` degrees."""
    frame, _ = video.sharp_frames(write_video(tmp_path / "v.mp4", turn=turn, num_frames=3), tmp_path / "frames", 2)
    with Image.open(frame) as image:
        assert image.size == ((96, 64) if turn % 180 == 0 else (64, 96))
        red, green, blue = np.asarray(image.convert("RGB"))[corner[1], corner[0]].tolist()
    assert red > 200 > 60 > max(green, blue)


@needs_av
def test_what_is_no_video_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'out'}"
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(write_video(tmp_path / "whole.mp4").read_bytes()[:2000])
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "cut.mp4", "empty.mp4"):
        error = run.refusal(capsys, f"--video={tmp_path / name}", out)
        assert f"{name}: cannot be read as a video" in error
    assert "is no file" in run.refusal(capsys, f"--video={tmp_path / 'missing.mp4'}", out)
    assert not (tmp_path / "out" / "images").exists()


@needs_av
def test_frames_of_a_video_are_taken_once(tmp_path: Path) -> None:
    walk, out = write_video(tmp_path / "walk.mp4"), tmp_path / "out"
    folder = capture.video_frames(walk, out, 5, restart=False)
    before = contents(folder)
    assert capture.video_frames(walk, out, 5, restart=False) == folder
    assert contents(folder) == before
    with pytest.raises(InputError, match="--restart"):
        capture.video_frames(walk, out, 6, restart=False)
    assert len([*capture.video_frames(walk, out, 6, restart=True).iterdir()]) == 6
    (out / "video.json").unlink()
    with pytest.raises(InputError, match=r"give another --out$"):  # they might be anybody's
        capture.video_frames(walk, out, 6, restart=True)


# What is refused, and what is said.


def test_one_of_images_and_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "either --images" in run.refusal(capsys)
    assert "either --images" in run.refusal(capsys, f"--images={tmp_path}", "--video=a.mp4")


@needs_colmap
def test_a_folder_without_photographs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'out'}"
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"x")
    assert "holds no images (but files that end in .heic)" in run.refusal(capsys, f"--images={tmp_path / 'phone'}", out)
    assert "is no folder" in run.refusal(capsys, f"--images={tmp_path / 'missing'}", out)
    assert "holds 1 image;" in run.refusal(capsys, f"--images={write_images(tmp_path / 'one', ['a.png'])}", out)
    broken = write_images(tmp_path / "broken", ["a.png", "b.png"])
    (broken / "b.png").write_text("no image")
    assert "b.png: cannot be read as an image" in run.refusal(capsys, f"--images={broken}", out)


@pytest.mark.parametrize(("module", "flag"), [("pycolmap", "--images"), ("av", "--video")])
def test_the_extra_is_named_where_it_is_missing(
    module: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    write_images(tmp_path, ["a.png", "b.png"])
    error = run.refusal(capsys, f"{flag}={tmp_path}", f"--out={tmp_path / 'out'}")
    assert module in error
    assert "pip install .[capture]" in error


def test_names_of_captures() -> None:
    assert capture.default_name(Path("/home/me/fox/images")) == "fox"
    assert capture.default_name(Path("/home/me/holiday")) == "holiday"
    assert capture.default_name(Path("/home/me/walk.mp4")) == "walk"


def test_advice_where_few_images_are_registered() -> None:
    names = tuple(f"{i}.jpg" for i in range(30))
    sparse = motion.Reconstruction(Path("transforms.json"), names[:12], names[12:], (), 100, 0.5, 2)
    assert not sparse.enough
    left_out, said = capture.advice(sparse)
    assert "12.jpg" in left_out
    assert "21.jpg and 8 more" in left_out
    assert "only 40 % of the images" in said
    assert "2 parts that do not connect" in said
    assert "overlap" in said
    good = motion.Reconstruction(Path("transforms.json"), names[:29], names[29:], (), 100, 0.5, 1)
    assert [("29.jpg" in line) for line in capture.advice(good)] == [True]
    assert capture.advice(motion.Reconstruction(Path("transforms.json"), names, (), (), 100, 0.5, 1)) == []


# Parts.


def test_lenses_are_told_apart(tmp_path: Path) -> None:
    """By folder, size, and the camera and focal length that EXIF names."""
    names = ["a.jpg", "b.jpg", "sub/a.jpg", "large.jpg", "zoomed.jpg"]
    write_images(tmp_path, names)
    write_images(tmp_path, ["large.jpg"], size=(80, 48))
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x920A] = 35.0
    with Image.open(tmp_path / "zoomed.jpg") as image:
        image.load()
    image.save(tmp_path / "zoomed.jpg", exif=exif)
    groups = motion._groups(tmp_path, motion._find_images(tmp_path, tmp_path / "out"))
    assert sorted(groups) == [["a.jpg", "b.jpg"], ["large.jpg"], ["sub/a.jpg"], ["zoomed.jpg"]]


def test_images_are_found_in_natural_order(tmp_path: Path) -> None:
    names = ["2.png", "10.png", "a/1.JPG", "a/b.webp"]
    write_images(tmp_path, [*names, ".hidden/3.png", "colmap/4.png"])
    (tmp_path / "notes.txt").write_text("mine")
    assert motion._find_images(tmp_path, tmp_path) == names


def test_pairs_of_a_sequence() -> None:
    names = [f"{i:03d}.jpg" for i in range(300)]
    assert motion._pairs(names[:200], "auto") == []  # all
    pairs = {(int(a[:3]), int(b[:3])) for a, b in motion._pairs(names, "auto")}
    assert {(i, i + step) for step in range(1, 11) for i in range(300 - step)} <= pairs
    assert (0, 294) in pairs  # where an orbit closes
    assert len(pairs) < 300 * 299 / 2 / 6
    with pytest.raises(InputError, match="spaces"):
        motion._pairs(["a b.jpg", "c.jpg"], "sequential")


def orbit(turns: np.ndarray, height: float = 2.0) -> np.ndarray:
    positions = np.stack([3 * np.cos(turns), 3 * np.sin(turns), np.full(len(turns), height)], axis=-1)
    return np.stack([look_at(position, np.zeros(3), (0.0, 0.0, 1.0)) for position in positions]).astype(np.float64)


def turned(c2w: np.ndarray, rotation: np.ndarray, offset: tuple[float, float, float], scale: float) -> np.ndarray:
    return np.concatenate(
        [rotation @ c2w[:, :, :3], scale * (rotation @ c2w[:, :, 3:]) + np.reshape(offset, (3, 1))], -1
    )


ANY = look_at((1.0, 2.0, 3.0), (0.0, 0.5, 0.0), (1.0, 0.0, 0.3))[:, :3].astype(np.float64)


@pytest.mark.parametrize("turns", [np.arange(12) * np.pi / 6, np.linspace(0, 2, 9)], ids=["orbit", "third"])
def test_a_capture_is_put_upright(turns: np.ndarray) -> None:
    """Also where cameras that look down stand on one side only, so that their mean up leans."""
    truth = orbit(turns)
    world = turned(truth, ANY, (5.0, -7.0, 1.0), 0.2)
    ups = np.tile([0, 1], (len(turns), 1))
    rotation, centre, scale = motion.orientation(world, np.zeros((0, 3)), ups)
    np.testing.assert_allclose(rotation @ ANY @ [0, 0, 1], [0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(centre, (5, -7, 1), atol=1e-5)
    np.testing.assert_allclose(0.2 * scale * np.sqrt(13), motion.CAMERA_DISTANCE, rtol=1e-5)


def test_photographs_that_are_stored_on_their_side() -> None:
    """EXIF says so: the stored pixels of a phone are turned by a quarter, and their up is not the photograph's."""
    truth = orbit(np.arange(12) * np.pi / 6)
    sideways = truth.copy()
    sideways[:, :, 0], sideways[:, :, 1] = -truth[:, :, 1], truth[:, :, 0]  # stored: x down, y to the right
    ups = np.tile(motion._UPWARDS[6], (12, 1))
    rotation, _, _ = motion.orientation(sideways, np.zeros((0, 3)), ups)
    np.testing.assert_allclose(rotation, np.eye(3), atol=1e-5)


def test_cameras_that_look_one_way() -> None:
    """Their axes meet nowhere and their level is one line: the mean up, and the middle of the points."""
    pose = look_at((0.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 1.0)).astype(np.float64)
    c2w = np.stack([pose] * 5)
    c2w[:, 0, 3] = np.arange(5)
    points = np.array([[2.0, 5.0, 1.0], [2.0, 6.0, 1.0], [2.0, 7.0, 1.0]])
    rotation, centre, _ = motion.orientation(c2w, points, np.tile([0, 1], (5, 1)))
    np.testing.assert_allclose(rotation, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(centre, (2, 6, 1))


def test_any_up_is_turned_to_z() -> None:
    for up in (*np.eye(3), *-np.eye(3), np.array([0.6, 0.0, -0.8])):
        rotation = motion._turn_to_z(up)
        np.testing.assert_allclose(rotation @ up, (0, 0, 1), atol=1e-12)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) > 0


def test_boxes_of_instant_ngp() -> None:
    spread = np.random.default_rng(0).uniform(-1, 1, (1000, 3))
    assert [motion._aabb_scale(size * spread) for size in (0.1, 1.4, 3.0, 6.0, 1e6)] == [1, 1, 2, 4, 128]
