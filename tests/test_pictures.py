"""Arrays as pictures, read back from their files."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from jaxngp import pictures

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def gradient_image(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(width=32)))
def test_to_uint8_clips_and_rounds(values: np.ndarray) -> None:
    result = pictures.to_uint8(values)
    inside = (values >= 0) & (values <= 1)
    assert result.dtype == np.uint8
    assert np.all(np.abs(result[inside] - 255 * values[inside]) <= 0.5 + 1e-4)
    assert np.all(result[values > 1] == 255)
    assert np.all(result[(values < 0) | np.isnan(values)] == 0)


def test_every_byte_survives_the_way_to_float() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pictures.to_uint8(levels / np.float32(255)), levels)
    np.testing.assert_array_equal(pictures.to_uint8(jnp.asarray(levels) / 255), levels)


def test_error_image_is_black_where_equal() -> None:
    truth = np.full((2, 2, 3), 0.5, np.float32)
    assert not pictures.error_image(truth, truth).any()
    assert np.all(pictures.error_image(truth + 0.1, truth, gain=4) == round(0.4 * 255))
    assert np.all(pictures.error_image(truth - 0.1, truth, gain=2) == round(0.2 * 255))


def test_nearer_is_brighter_and_nothing_is_black() -> None:
    depth = np.linspace(1, 2, 65)[None]
    luminance = pictures.depth_image(depth, np.ones_like(depth))[0] @ LUMINANCE
    assert np.all(np.diff(luminance) < 0)
    assert luminance[-1] > 30  # the farthest surface is not lost in the background
    assert not pictures.depth_image(depth, np.zeros_like(depth)).any()


def test_depth_range_is_of_opaque_pixels_or_given() -> None:
    depth, opacity = np.array([[1.0, 2.0, 1e6, np.nan]]), np.array([[1.0, 1.0, 0.0, 0.0]])
    image = pictures.depth_image(depth, opacity)
    assert image[0, 0].sum() > image[0, 1].sum() > 0
    assert not image[0, 2:].any()
    np.testing.assert_array_equal(pictures.depth_image(depth, opacity, near_far=(1.01, 1.99))[0, :2], image[0, :2])
    assert pictures.depth_image(depth, opacity, near_far=(1.0, 10.0))[0, 1].sum() > image[0, 1].sum()


@pytest.mark.parametrize("opacity", [0.0, 1.0])
def test_depth_of_an_empty_or_flat_view_is_a_picture(opacity: float) -> None:
    image = pictures.depth_image(np.full((3, 4), 1.5), np.full((3, 4), opacity))
    assert image.shape == (3, 4, 3)
    assert image.dtype == np.uint8


def test_contact_sheet_holds_every_image_whole() -> None:
    images = [[np.full((8 + 3 * r, 50, 3), 40 + 60 * r + 20 * c, np.uint8) for c in range(3)] for r in range(2)]
    sheet = pictures.contact_sheet(images, ["a", "error x4", "a caption wider than its image"])
    assert sheet.dtype == np.uint8
    for image in np.concatenate([[i[0, 0, 0] for i in row] for row in images]):
        assert np.sum(np.all(sheet == image, axis=-1)) >= 8 * 50
    assert np.any(sheet[: pictures._CAPTION_HEIGHT] < 128)  # something is written
    assert np.all(sheet[-pictures._GAP :] == 255)


def test_contact_sheet_refuses_a_shorter_row() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] holds 1 images: expected one for each of 2 labels"):
        pictures.contact_sheet([[gradient_image()] * 2, [gradient_image()]], ["a", "b"])


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_png_round_trip(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new folder" / "a.png"
    pictures.write_png(path, image)
    with Image.open(path) as read:
        np.testing.assert_array_equal(np.asarray(read), image)
    assert list(path.parent.iterdir()) == [path]


def turning_frames(num_frames: int = 12) -> list[np.ndarray]:
    return [np.roll(gradient_image(), 2 * index, axis=1) for index in range(num_frames)]


@pytest.mark.parametrize(("name", "tolerance"), [("a.gif", 8), ("a.webp", 12)])
def test_animation_round_trip(tmp_path: Path, name: str, tolerance: float) -> None:
    frames = turning_frames()
    pictures.write_animation(tmp_path / name, frames, fps=20)
    with Image.open(tmp_path / name) as animation:
        assert animation.n_frames == len(frames)  # type: ignore[attr-defined]
        assert animation.info["loop"] == 0
        for index, frame in enumerate(frames):
            animation.seek(index)
            read = np.asarray(animation.convert("RGB")).astype(int)
            assert animation.info["duration"] == 50
            assert np.mean(np.abs(read - frame)) < tolerance


def test_a_still_gif_does_not_flicker(tmp_path: Path) -> None:
    frames = turning_frames()
    for frame in frames:
        frame[:, :15] = gradient_image()[:, :15]
    pictures.write_animation(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as animation:
        still = []
        for index in range(len(frames)):
            animation.seek(index)
            still.append(np.asarray(animation.convert("RGB"))[:, :15])
    assert np.all(np.array(still) == still[0])


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_animation_of_one_frame_of_one_colour(tmp_path: Path, name: str) -> None:
    pictures.write_animation(tmp_path / name, [np.zeros((3, 3, 3), np.uint8)])
    with Image.open(tmp_path / name) as animation:
        assert animation.size == (3, 3)


@pytest.mark.parametrize(
    ("name", "num_frames", "fps", "message"),
    [
        ("a.mp4", 1, 24, "ends in .gif or .webp"),
        ("a.gif", 0, 24, "at least one"),
        ("a.gif", 1, 0, "fps"),
        ("a.gif", 1, 51, "fps"),
    ],
)
def test_animation_refuses(tmp_path: Path, name: str, num_frames: int, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.write_animation(tmp_path / name, [gradient_image()] * num_frames, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(40, 48), (39, 47)])
def test_video_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    av = pytest.importorskip("av", reason="the extra video is not installed")
    y, x = np.mgrid[: size[0], : size[1]]
    frames = [
        np.stack([128 + 60 * np.sin((x + 3 * i) / 9), 128 + 60 * np.cos(y / 7), 0 * x + 90], axis=-1).astype(np.uint8)
        for i in range(9)
    ]
    assert pictures.write_video(tmp_path / "a.mp4", iter(frames), fps=12.5) == 9
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert float(file.streams.video[0].average_rate) == 12.5
        read = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(read) == 9
    assert all(side % 2 == 0 for side in read[0].shape[:2])
    for one, other in zip(read, frames, strict=True):
        assert np.mean(np.abs(one[: size[0], : size[1]].astype(int) - other)) < 6


def test_an_empty_video_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    with pytest.raises(ValueError, match="at least one"):
        pictures.write_video(tmp_path / "a.mp4", [])
    assert not list(tmp_path.iterdir())
