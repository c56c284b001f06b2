"""Images as functions of position: one sample a rectangle, the pixels a colour is made of, and tiles, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import arrays32, points

from jaxngp import images
from jaxngp.images import Taps

N = 32
SIZES = [(1, 7), (7, 1), (2, 2), (5, 3), (64, 48)]  # width, height
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
LARGEST = 2**16
ULP = 2.0**-23  # of float32: a division, or a product with a rounded reciprocal, is off by up to one and a half

stratified_positions = jax.jit(images.stratified_positions)
_pixel_taps = jax.jit(images.pixel_taps, static_argnames=("width", "height", "snap"))
_tile_centres = jax.jit(images.tile_centres, static_argnames=("size", "width", "height"))


def pixel_taps(position: np.ndarray, size: tuple[int, int], *, snap: bool) -> Taps:
    return _pixel_taps(position, width=size[0], height=size[1], snap=snap)


def scaled(position: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Positions in pixels, where the first pixel's centre is 0, moved to between the outermost centres."""
    return np.clip(position.astype(np.float64) * size - 0.5, 0, np.array(size) - 1)


# One position in each rectangle.


def place_in_rectangle(bits: np.ndarray) -> np.ndarray:
    """(N, 2) f64: how far along its own rectangle each position is, which is in (0, 1) if it is inside."""
    num = len(bits)
    rows = next(n for n in range(int(num**0.5), 0, -1) if num % n == 0)
    columns = num // rows
    position = np.asarray(stratified_positions(bits))
    assert position.dtype == np.float32
    assert position.min() >= 0
    assert position.max() < 1
    row, column = np.divmod(np.arange(num), columns)
    return position.astype(np.float64) * [columns, rows] - np.stack([column, row], axis=1)


words = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 2**8, 2**32 - 1])


@pytest.mark.parametrize("num", [1, 2, 7, 12, 36])
@given(data=st.data())
def test_each_rectangle_holds_one_position(num: int, data: st.DataObject) -> None:
    bits = data.draw(hnp.arrays(np.uint32, (num, 2), elements=words))
    np.testing.assert_allclose(place_in_rectangle(bits), (bits + 0.5) / 2**32, atol=2e-5)


@pytest.mark.parametrize("num", [1000, 4099, 15_015, 2**18, 2**18 - 5, 999_983, 2**22])
def test_no_rounding_leads_out_of_a_rectangle(num: int) -> None:
    """A prime number of positions is one row, of the narrowest rectangles."""
    for word in (0, 2**32 - 1):
        place = place_in_rectangle(np.full((num, 2), word, np.uint32))
        assert place.min() > 0
        assert place.max() < 1


@pytest.mark.parametrize("num", [15_015, 2**18])
def test_positions_are_uniform_in_their_rectangles(num: int) -> None:
    bits = np.random.default_rng(0).integers(2**32, size=(num, 2), dtype=np.uint32)
    place = place_in_rectangle(bits)
    # Half of one of the parts into which a rectangle is cut is up to 2^-21 columns; rounding adds a tenth.
    np.testing.assert_allclose(place, bits / 2**32, atol=2.0**-20 * num**0.5)
    for power in (1, 2, 3):
        np.testing.assert_allclose((place**power).mean(axis=0), 1 / (power + 1), atol=2 * num**-0.5)


# Taps.


@every_size
@given(position=points(N, 2))
def test_a_snapped_position_is_its_pixel_centre(size: tuple[int, int], position: np.ndarray) -> None:
    taps = pixel_taps(position, size, snap=True)
    pixel = np.concatenate([taps.column, taps.row], axis=1)
    exact = position.astype(np.float64) * size
    expected = np.clip(np.floor(exact), 0, np.array(size) - 1)
    edge = (np.abs(exact - np.round(exact)) < 1e-6 * np.array(size)) & (exact != np.round(exact))
    np.testing.assert_array_equal(np.where(edge, expected, pixel), expected)
    np.testing.assert_allclose(taps.position, (pixel + 0.5) / size, rtol=1e-6)
    assert (np.abs(taps.position - position) <= 0.5 / np.array(size) + 1e-6).all()
    np.testing.assert_array_equal(taps.weight, np.ones((N, 1)))


@every_size
@given(position=points(N, 2))
def test_bilinear_weights_are_tents_around_centres(size: tuple[int, int], position: np.ndarray) -> None:
    taps = pixel_taps(position, size, snap=False)
    row, column, weight = (np.asarray(a) for a in (taps.row, taps.column, taps.weight))
    assert row.shape == column.shape == weight.shape == (N, 4)
    np.testing.assert_array_equal(taps.position, position)
    for index, limit in ((column, size[0]), (row, size[1])):
        assert index.min() >= 0
        assert index.max() < limit
    assert weight.min() >= 0
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-6)
    found = np.zeros((N, size[1], size[0]))
    np.add.at(found, (np.arange(N)[:, None], row, column), weight)
    x, y = (np.maximum(0, 1 - np.abs(scaled(position, size)[:, a, None] - np.arange(size[a]))) for a in (0, 1))
    np.testing.assert_allclose(found, y[:, :, None] * x[:, None, :], atol=1e-5)


@every_size
@given(position=points(N, 2))
def test_a_linear_image_is_reproduced(size: tuple[int, int], position: np.ndarray) -> None:
    """Between the outermost centres; outside of them it is constant."""
    y, x = np.mgrid[: size[1], : size[0]]
    image = np.stack([x, y, 2 * x - 3 * y + 1], axis=-1).astype(np.float32)
    taps = pixel_taps(position, size, snap=False)
    found = images.blend_taps(jnp.asarray(image[taps.row, taps.column]), taps.weight)
    x, y = scaled(position, size).T
    np.testing.assert_allclose(found, np.stack([x, y, 2 * x - 3 * y + 1], axis=1), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("size", [(16, 4), (1, 1), (1, 8), (LARGEST, LARGEST)], ids=str)
def test_at_a_centre_only_that_pixel_counts(size: tuple[int, int]) -> None:
    """To the last digit, where the size is a power of two: all centres of so many pixels are numbers of float32."""
    rng = np.random.default_rng(0)
    pixel = np.stack([rng.integers(0, side, 4 * N) for side in size], axis=1)
    pixel[:2] = [[0, 0], np.array(size) - 1]
    position = ((pixel + 0.5) / size).astype(np.float32)
    np.testing.assert_array_equal(position.astype(np.float64), (pixel + 0.5) / size)
    taps = pixel_taps(position, size, snap=False)
    here = (np.asarray(taps.column) == pixel[:, :1]) & (np.asarray(taps.row) == pixel[:, 1:])
    np.testing.assert_array_equal(np.sum(np.where(here, taps.weight, 0), axis=1), 1)


@pytest.mark.parametrize("size", [(LARGEST, LARGEST - 1), (50_021, 40_000)], ids=str)
def test_pixels_of_a_large_image_have_distinct_centres(size: tuple[int, int]) -> None:
    """Each column and row, and snapping a centre changes nothing."""
    for axis in (0, 1):
        number = np.arange(LARGEST) % size[axis]
        position = np.full((LARGEST, 2), 0.5, np.float32)
        position[:, axis] = (number + 0.5) / size[axis]
        snapped = pixel_taps(position, size, snap=True)
        np.testing.assert_array_equal((snapped.column, snapped.row)[axis][:, 0], number)
        np.testing.assert_allclose(snapped.position[:, axis], position[:, axis], rtol=4 * ULP)
        again = pixel_taps(np.asarray(snapped.position), size, snap=True)
        for a, b in zip(jax.tree.leaves(snapped), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
        taps = pixel_taps(position, size, snap=False)
        mean = np.sum(np.asarray((taps.column, taps.row)[axis]) * np.asarray(taps.weight, np.float64), axis=1)
        np.testing.assert_allclose(mean, number, atol=size[axis] * 2.0**-23)


@every_size
def test_corners_of_the_square_are_corner_pixels(size: tuple[int, int]) -> None:
    position = np.tile(np.float32([[0, 0], [1, 0], [0, 1], [1, 1]]), (N // 4, 1))
    expected = position[:, ::-1] * (np.array(size)[::-1] - 1)  # row and column
    snapped = pixel_taps(position, size, snap=True)
    np.testing.assert_array_equal(np.concatenate([snapped.row, snapped.column], axis=1), expected)
    taps = pixel_taps(position, size, snap=False)
    for index, end in ((taps.row, expected[:, 0]), (taps.column, expected[:, 1])):
        np.testing.assert_array_equal(np.sum(np.asarray(index) * np.asarray(taps.weight), axis=1), end)


# Colours.


@pytest.mark.parametrize(("dtype", "most"), [(np.uint8, 255), (np.uint16, 65535)])
def test_integers_are_fractions_of_the_largest(dtype: type, most: int) -> None:
    values: np.ndarray = np.arange(most + 1).astype(dtype)
    found = images.decode(jnp.asarray(values))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.arange(most + 1) / most, rtol=1e-6)
    assert found[-1] == 1


def test_floating_point_is_taken_as_it_is() -> None:
    values = jnp.asarray(np.float32([[-1.5, 0], [0.25, 7e4]]))
    np.testing.assert_array_equal(images.decode(values), values)


@given(hnp.arrays(np.uint8, (N, 4, 3)), arrays32((N, 4), 0, 1))
def test_a_colour_is_the_weighted_sum_of_its_taps(values: np.ndarray, weight: np.ndarray) -> None:
    expected = np.einsum("nck,nc->nk", values / 255, weight.astype(np.float64))
    found = jax.jit(images.blend_taps)(values, weight)
    np.testing.assert_allclose(found, expected, atol=2e-6)


# Tiles.


def tile_pixels(left: int, top: int, side: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels (side * side, 2), column and row, in which a tile's positions lie; each is the centre of its own."""
    centres = np.asarray(_tile_centres(jnp.int32(left), jnp.int32(top), size=side, width=size[0], height=size[1]))
    assert centres.dtype == np.float32
    pixel = np.floor(centres.astype(np.float64) * size)
    np.testing.assert_allclose(centres, (pixel + 0.5) / size, rtol=4 * ULP)
    return pixel.astype(np.int64)


@pytest.mark.parametrize("side", [1, 3, 4, 16])
def test_tiles_cover_the_image_and_repeat_its_edge(side: int) -> None:
    width, height = size = (13, 7)
    drawn = np.full((height + side, width + side, 2), -1)
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = tile_pixels(left, top, side, size).reshape(side, side, 2)
            drawn[top : top + side, left : left + side] = tile
    y, x = np.mgrid[:height, :width]
    np.testing.assert_array_equal(drawn[:height, :width], np.stack([x, y], axis=-1))
    beyond = drawn[drawn[..., 0] >= 0]
    assert beyond.max(axis=0).tolist() == [width - 1, height - 1]


@pytest.mark.parametrize("size", [(LARGEST, LARGEST), (LARGEST - 1, 40_013)], ids=str)
def test_tiles_of_a_large_image_are_as_exact(size: tuple[int, int]) -> None:
    side = 32
    row, column = np.divmod(np.arange(side * side), side)
    for left, top in ((0, 0), (12_345, 40_000), (size[0] - 7, size[1] - 9), (size[0] - side, 0)):
        expected = np.minimum(np.stack([left + column, top + row], axis=1), np.array(size) - 1)
        np.testing.assert_array_equal(tile_pixels(left, top, side, size), expected)
