"""The built-in image: one picture whatever the tiles, sizes and threads it is drawn with, and a file of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxngp.config import InputError
from jaxngp.data import atlas, image

SIZE = (700, 500)  # width, height
LARGE = (32768, 20000)
CHECKSUM = 5056735881144


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path))
    return tmp_path / "images"


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return atlas.draw(0, 0, SIZE[1], SIZE[0], size=SIZE)


@given(st.integers(0, SIZE[1] - 1), st.integers(0, SIZE[0] - 1), st.integers(1, 150), st.integers(1, 150))
def test_every_part_is_a_part_of_one_picture(picture: np.ndarray, y: int, x: int, height: int, width: int) -> None:
    height, width = min(height, SIZE[1] - y), min(width, SIZE[0] - x)
    part = atlas.draw(y, x, height, width, size=SIZE)
    np.testing.assert_array_equal(part, picture[y : y + height, x : x + width])


@settings(max_examples=8)
@given(st.integers(0, LARGE[1] - 120), st.integers(0, LARGE[0] - 120), st.integers(1, 119), st.integers(1, 119))
def test_parts_of_a_large_picture_fit_together(y: int, x: int, down: int, across: int) -> None:
    whole = atlas.draw(y, x, 120, 120, size=LARGE)
    parts = [
        [atlas.draw(y + a, x + b, h, w, size=LARGE) for b, w in ((0, across), (across, 120 - across))]
        for a, h in ((0, down), (down, 120 - down))
    ]
    np.testing.assert_array_equal(np.block([[[part] for part in row] for row in parts]), whole)


def test_blocks_and_strips_leave_no_trace(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "BLOCK", 130)
    monkeypatch.setattr(atlas, "STRIP", 7)
    np.testing.assert_array_equal(atlas.draw(0, 0, SIZE[1], SIZE[0], size=SIZE), picture)


def test_the_picture_stays_what_it_is(picture: np.ndarray) -> None:
    """A change of this sum is a change of the picture, and needs a new VERSION; it is the same on every machine."""
    assert atlas.VERSION == "v1"
    weights = np.arange(1, picture.size + 1, dtype=np.uint64) % np.uint64(65521)
    assert int((picture.ravel() * weights).sum()) == CHECKSUM


def test_there_is_detail_on_every_scale() -> None:
    """As in a photograph, halving the resolution takes away part of the contrast and never most of it."""
    level = atlas.draw(6000, 20000, 1024, 1024, size=LARGE).astype(np.float32).mean(axis=-1)
    spreads = []
    while len(level) >= 32:
        coarse = level.reshape(len(level) // 2, 2, -1, 2).mean(axis=(1, 3))
        spreads.append(np.std(level - np.repeat(np.repeat(coarse, 2, axis=0), 2, axis=1)))
        level = coarse
    assert min(spreads) > 2  # of 255
    assert spreads[0] < 40  # no noise


@pytest.mark.parametrize("size", [(16, 16), (17, 300), (16, 65536), (65536, 65536)])
def test_pictures_of_any_shape(size: tuple[int, int]) -> None:
    part = atlas.draw(size[1] - 16, size[0] - 16, 16, 16, size=size)
    assert part.shape == (16, 16, 3)
    assert part.std() > 0


def test_a_part_must_lie_in_the_picture() -> None:
    for y, x, height, width in ((-1, 0, 4, 4), (0, -1, 4, 4), (0, 0, 21, 4), (0, 0, 4, 31), (20, 0, 1, 1)):
        with pytest.raises(ValueError, match="expected a part of 20 x 30"):
            atlas.draw(y, x, height, width, size=(30, 20))


@pytest.mark.parametrize("size", [(15, 100), (100, 0), (65537, 100)])
def test_a_size_out_of_range_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected 16 to 65536 a side"):
        atlas.builtin_image(*size)


def test_a_small_picture_is_kept_in_memory(picture: np.ndarray, cache: Path) -> None:
    stored = atlas.builtin_image(*SIZE)
    np.testing.assert_array_equal(stored.pixels, picture)
    assert (stored.width, stored.height, stored.peak, stored.num_bytes) == (*SIZE, 255, SIZE[0] * SIZE[1] * 3)
    assert not cache.exists()


def test_a_large_picture_is_written_once(picture: np.ndarray, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "PIXELS_IN_MEMORY", 1)
    monkeypatch.setattr(atlas, "BAND", 200)
    for _ in range(2):
        stored = atlas.builtin_image(*SIZE)
        assert isinstance(stored.pixels, np.memmap)
        np.testing.assert_array_equal(stored.pixels, picture)
        assert [path.name for path in cache.iterdir()] == ["atlas-v1-700x500.npy"]
        monkeypatch.setattr(atlas, "_draw_block", None)  # for the second time


def test_processes_draw_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40, 2 * atlas.BAND + 100
    whole = np.concatenate([*atlas._bands(*size)])
    np.testing.assert_array_equal(whole, atlas.draw(0, 0, size[1], size[0], size=size))
    bands = atlas._draw_together(*size, 2)
    np.testing.assert_array_equal(np.concatenate([*bands]), whole)


def test_a_process_that_ends_early_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "PIXELS_IN_MEMORY", 1)
    monkeypatch.setattr(atlas, "PIXELS_ALONE", 1)
    monkeypatch.setattr(atlas, "BAND", 200)
    monkeypatch.setattr(atlas.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(atlas.sys, "executable", shutil.which("true"))
    with pytest.raises(InputError, match="a process that draws it ended early"):
        atlas.builtin_image(*SIZE)
    assert not [*cache.iterdir()]


def test_a_full_disk_is_said_before_anything_is_drawn(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    monkeypatch.setattr(atlas, "_draw_block", None)
    with pytest.raises(InputError, match=r"12\.9 GB are needed and 1\.07 GB are free; .* JAXNGP_CACHE"):
        atlas.builtin_image(65536, 65536)
    assert not [*cache.iterdir()]


def test_what_fails_half_way_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atlas, "PIXELS_IN_MEMORY", 1)
    monkeypatch.setattr(atlas, "_draw_block", fail)
    with pytest.raises(InputError, match="No space left on device"):
        atlas.builtin_image(*SIZE)
    assert not [*cache.iterdir()]
