"""Masks: read either way round, a masked pixel excludes no cell, is never drawn, and counts in no metric."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scenes import BALL, make_camera, photograph, poses_around

from jaxngp import metrics, pictures, visual_hull
from jaxngp.cameras import Cameras, PosedImages, make_cameras
from jaxngp.config import InputError, OccupancyConfig, SceneConfig, StratifiedConfig
from jaxngp.data import splits
from jaxngp.data.capture import Capture, Mask, Placement, SceneTransform
from jaxngp.data.fingerprint import changed, fingerprint
from jaxngp.data.photos import read_masks
from jaxngp.data.splits import Split
from jaxngp.evaluation import evaluate_views
from jaxngp.training.pixels import Silhouettes

WIDTH, HEIGHT = 8, 4
SIZES = np.array([[WIDTH, HEIGHT]])
flags = hnp.arrays(bool, (HEIGHT, WIDTH))


def write_mask(path: Path, black: np.ndarray, mode: str = "L") -> Path:
    """A mask that is black where `black` is True, and of some other value elsewhere."""
    values = np.where(black, 0, 200).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(values)
    (image if mode == "I;16" else image.convert(mode, dither=Image.Dither.NONE)).save(path)
    return path


# Reading.


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("keep", ["zero", "non-zero"])
def test_masks_are_read_either_way_round(tmp_path: Path, mode: str, keep: Literal["zero", "non-zero"]) -> None:
    black = np.random.default_rng(0).uniform(size=(HEIGHT, WIDTH)) < 0.3
    file = write_mask(tmp_path / "mask.png", black, mode)
    (found,) = read_masks([Mask(file, keep)], SIZES, 1, "")
    np.testing.assert_array_equal(found, black if keep == "zero" else ~black)


@pytest.mark.parametrize("keep", ["zero", "non-zero"])
@settings(max_examples=20)
@given(flags)
def test_a_reduced_pixel_needs_all_its_pixels(
    tmp_path_factory: pytest.TempPathFactory, keep: Literal["zero", "non-zero"], black: np.ndarray
) -> None:
    file = write_mask(tmp_path_factory.getbasetemp() / "mask.png", black)
    (found,) = read_masks([Mask(file, keep)], SIZES, 2, "")
    full = black if keep == "zero" else ~black
    for y, x in np.ndindex(HEIGHT // 2, WIDTH // 2):
        assert found[y, x] == full[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].all()


def test_a_view_without_a_mask_is_whole(tmp_path: Path) -> None:
    file = write_mask(tmp_path / "mask.png", np.zeros((HEIGHT, WIDTH), bool))
    masked, whole = read_masks([Mask(file, "zero"), None], np.repeat(SIZES, 2, axis=0), 2, "")
    assert not masked.any()
    assert whole.all()
    assert whole.shape == (2, 4)


def test_a_mask_that_does_not_fit_is_named(tmp_path: Path) -> None:
    small = write_mask(tmp_path / "small.png", np.zeros((2, 4), bool))
    with pytest.raises(InputError, match=r"small\.png: the mask is 4x2 and its image 8x4"):
        read_masks([Mask(small, "zero")], SIZES, 1, "")
    with pytest.raises(InputError, match=r"none\.png: the mask is missing"):
        read_masks([Mask(tmp_path / "none.png", "zero")], SIZES, 1, "")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 4), np.uint8)).save(tmp_path / "clear.png")
    with pytest.raises(InputError, match=r"clear\.png: the mask has transparent pixels"):
        read_masks([Mask(tmp_path / "clear.png", "zero")], SIZES, 1, "")


# Splits.


def capture(folder: Path, black: list[np.ndarray | None]) -> Capture:
    """Opaque views of noise, with masks that keep what is not black."""
    files, masks = [], []
    for i, flag in enumerate(black):
        files.append(folder / f"r_{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(files[i])
        masks.append(None if flag is None else Mask(write_mask(folder / f"mask_{i}.png", flag), "non-zero"))
    cameras = make_camera(WIDTH, HEIGHT, 10.0, poses_around(len(black), 4.0))
    names = tuple(f"r_{i}" for i in range(len(black)))
    kinds = {"has_alpha": (False,) * len(black), "masks": tuple(masks)}
    return Capture(folder, names, ("train",) * len(black), tuple(files), cameras, **kinds)


def load(capture: Capture, **changes: Any) -> Split:
    scene = replace(SceneConfig(name="here"), **changes)
    return splits._load(scene, capture, "train", np.arange(len(capture.names)), Placement(SceneTransform()))


def test_a_split_holds_masks_in_the_order_of_pixels(tmp_path: Path) -> None:
    black = [np.random.default_rng(i).uniform(size=(HEIGHT, WIDTH)) < 0.5 for i in range(3)]
    images = load(capture(tmp_path, [black[0], None, black[2]])).images
    assert isinstance(images, PosedImages)
    expected = ~black[0], np.ones((HEIGHT, WIDTH), bool), ~black[2]
    for view, keep in enumerate(expected):
        np.testing.assert_array_equal(images.mask(view), keep)
    np.testing.assert_allclose(images.masked_share(), [1 - keep.mean() for keep in expected])
    without = load(replace(capture(tmp_path, black), masks=())).images
    assert isinstance(without, PosedImages)
    assert without.keep is None
    assert changed(fingerprint(without), fingerprint(images)) == "3 of 3 views have other pixels"


def test_a_wholly_masked_view_is_left_out_and_named(tmp_path: Path) -> None:
    none, all_of_it = np.zeros((HEIGHT, WIDTH), bool), np.ones((HEIGHT, WIDTH), bool)
    split = load(capture(tmp_path, [none, all_of_it, none]))
    assert split.views == ("r_0", "r_2")
    assert split.notes == (f"{tmp_path}: left out, as their masks leave no pixel: r_1",)
    assert isinstance(split.images, PosedImages)
    np.testing.assert_array_equal(split.images.image(1)[..., :3], np.asarray(Image.open(tmp_path / "r_2.png")))
    with pytest.raises(InputError, match=r"mask_0\.png: like the masks of all other views, leaves no pixel"):
        load(capture(tmp_path, [all_of_it, all_of_it]))


# The visual hull.

G = 32
CONFIG = OccupancyConfig(resolution=G)
hull = jax.jit(visual_hull.visual_hull, static_argnames="config")


def some_cameras(sizes: Literal["equal", "several"]) -> Cameras:
    c2w = poses_around(4, 1.6)
    size = np.array([[40, 30]] * 4 if sizes == "equal" else [[40, 30], [20, 36], [33, 12], [24, 30]])
    return make_cameras(c2w, focal_xy=1.1 * size, centre_xy=0.5 * size, width=size[:, 0], height=size[:, 1])


@functools.cache
def ball_views(sizes: Literal["equal", "several"]) -> PosedImages:
    return photograph(BALL, some_cameras(sizes))


def blocks(images: PosedImages, seed: int) -> np.ndarray:
    """(P,) bool: rectangles of the views, about half of all pixels."""
    rng, keep = np.random.default_rng(seed), []
    for width, height in np.asarray(images.cameras.size):
        coarse = rng.uniform(size=(height // 8 + 1, width // 8 + 1)) < 0.5
        keep.append(np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[:height, :width].ravel())
    return np.concatenate(keep)


nth = jax.jit(visual_hull.PixelSet.nth)


def members(pixels: visual_hull.PixelSet, count: int) -> np.ndarray:
    """(count,) bool: those of all ranks; beyond the last rank numbers say nothing."""
    found = np.zeros(count, bool)
    found[np.asarray(nth(pixels, np.arange(count)))[: int(pixels.size)]] = True
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["equal", "several"])
@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_what_a_mask_covers_makes_no_difference(sizes: Literal["equal", "several"], seed: int) -> None:
    """To the cells and to the pixels to draw, of which no masked one is."""
    images = ball_views(sizes)
    keep = blocks(images, seed)
    noise = np.random.default_rng(seed).integers(0, 2, images.num_pixels) * np.uint8(255)
    alpha = np.where(keep, np.asarray(images.alpha), noise)
    other = replace(images, rgba=np.column_stack([np.asarray(images.rgba)[:, :3], alpha]), keep=keep)
    (cells, pixels), (cells_2, pixels_2) = (hull(i, config=CONFIG) for i in (replace(images, keep=keep), other))
    np.testing.assert_array_equal(cells, cells_2)
    np.testing.assert_array_equal(pixels.words, pixels_2.words)
    assert np.any(cells)
    assert not members(pixels, len(keep))[~keep].any()


@pytest.mark.parametrize("sizes", ["equal", "several"])
def test_a_mask_excludes_no_cell(sizes: Literal["equal", "several"]) -> None:
    """One view sees the whole ball through a mask that leaves a rim; the cells it saw empty are candidates again."""
    images = ball_views(sizes)
    plain = np.ravel(hull(images, config=CONFIG)[0])
    keep = np.ones(images.num_pixels, bool)
    masked = np.ravel(hull(replace(images, keep=keep), config=CONFIG)[0])
    np.testing.assert_array_equal(masked, plain)  # a mask of nothing
    for view, (width, height) in enumerate(np.asarray(images.cameras.size)):
        middle = np.zeros((height, width), bool)
        middle[2:-2, 2:-2] = True
        start = images.offset[view]
        some = keep.copy()
        some[start : start + width * height] = ~middle.ravel()
        masked = np.ravel(hull(replace(images, keep=some), config=CONFIG)[0])
        assert (masked >= plain).all()  # the other views see all of these cells too
        assert masked.sum() > plain.sum()


@pytest.mark.parametrize("carve", [True, False])
def test_what_is_only_seen_masked_is_not_seen(carve: bool) -> None:
    images = ball_views("equal")
    keep = np.zeros((4, 30, 40), bool)
    keep[0, :, :20] = True  # the left half of one view
    cells, pixels = hull(replace(images, keep=keep.ravel()), config=replace(CONFIG, carve=carve))
    same = [0] * 4  # that view and no other, as often as there are views: one program serves both
    alone = replace(images, cameras=images.cameras[same], offset=images.offset[same], keep=np.ones(keep.size, bool))
    seen = np.ravel(hull(alone, config=replace(CONFIG, carve=False))[0])
    found = np.ravel(cells)
    assert (found <= seen).all()
    assert 0.2 < found.sum() / seen.sum() < 0.8
    assert not members(pixels, keep.size)[~keep.ravel()].any()
    if not carve:
        assert pixels.size == keep.sum()


def test_opaque_views_need_no_alpha() -> None:
    """A hull without alpha is that of views that are all opaque; masks count all the same."""

    images = ball_views("several")
    opaque = replace(images, rgba=np.full_like(images.rgba, 255), keep=blocks(images, 0))
    for some in (opaque, replace(opaque, keep=None)):
        views = Silhouettes(some.cameras, some.offset, None, some.keep, some.max_size, some.num_pixels)
        cells, pixels = hull(views, config=CONFIG)
        expected_cells, expected_pixels = hull(some, config=CONFIG)
        np.testing.assert_array_equal(cells, expected_cells)
        np.testing.assert_array_equal(pixels.words, expected_pixels.words)


# Metrics.

unit_images = hnp.arrays(np.float32, (16, 14, 3), elements=st.floats(0, 1, width=32))
masks = hnp.arrays(bool, (16, 14))
mean_squared_error, ssim = jax.jit(metrics.mean_squared_error), jax.jit(metrics.ssim)
ssim_of_each = jax.jit(jax.vmap(metrics.ssim))


@settings(deadline=None)
@given(unit_images, unit_images, masks)
def test_the_error_is_the_mean_over_kept_pixels(a: np.ndarray, b: np.ndarray, keep: np.ndarray) -> None:
    found = float(mean_squared_error(a, b, keep))
    if keep.any():
        expected = np.mean((a.astype(np.float64) - b)[keep] ** 2)
        np.testing.assert_allclose(found, expected, rtol=(a.size + 8) * 2.0**-24, atol=1e-12)  # of a sum in any order
    else:
        assert np.isnan(found)


@settings(deadline=None, max_examples=20)
@given(unit_images, unit_images, st.lists(st.tuples(st.integers(0, 15), st.integers(0, 13)), min_size=1, max_size=2))
def test_ssim_is_the_mean_over_kept_windows(a: np.ndarray, b: np.ndarray, holes: list[tuple[int, int]]) -> None:
    """Each window alone is an image of its size."""
    keep = np.ones((16, 14), bool)
    for hole in holes:
        keep[hole] = False
    windows = [[i[y : y + 11, x : x + 11] for y, x in np.ndindex(6, 4)] for i in (a, b, keep)]
    kept = np.all(windows[2], axis=(1, 2))
    found = float(ssim(a, b, keep))
    if kept.any():
        expected = np.asarray(ssim_of_each(*map(np.stack, windows[:2])))[kept]
        np.testing.assert_allclose(found, np.mean(expected), atol=2e-5)
    else:
        assert np.isnan(found)


def test_views_are_scored_by_their_kept_pixels() -> None:
    """Whatever the truth is under the mask; and a mask of nothing changes no score."""
    images = photograph(BALL, make_camera(40, 30, 44.0, poses_around(2, 1.6)))
    keep = np.ones((2, 30, 40), bool)
    keep[:, :, 25:] = False
    spoilt = np.where(keep.reshape(-1, 1), np.asarray(images.rgba), np.uint8(77))
    sampler = StratifiedConfig(num_bins=32, near=1.0, far=2.2)

    def scores(images: PosedImages) -> list[tuple[float, float]]:
        split = Split("test", ("a", "b"), images, has_alpha=True)
        views = evaluate_views(BALL.field, None, split, sampler=sampler)
        return [(score.psnr, score.ssim) for score, _ in views]

    plain, masked = scores(images), scores(replace(images, keep=keep.ravel()))
    assert masked == scores(replace(images, rgba=spoilt, keep=keep.ravel()))
    assert plain != masked
    whole = scores(replace(images, keep=np.ones(images.num_pixels, bool)))
    np.testing.assert_allclose(whole, plain, rtol=1e-5)


def test_masked_pixels_are_hatched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    keep = np.random.default_rng(1).uniform(size=(20, 30)) < 0.5
    found = pictures.hatched(image, keep)
    np.testing.assert_array_equal(found[keep], image[keep])
    assert len(np.unique(found[~keep], axis=0)) == 2
    assert (found[~keep] == found[~keep][:, :1]).all()  # grey
