"""Hashing: integers, so every law holds exactly."""

from __future__ import annotations

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import jit_to_numpy

from jaxngp import hashing
from jaxngp.config import HashGridConfig, InputError

spatial_hash = jit_to_numpy(hashing.spatial_hash, static_argnames="table_size")
dense_index = jit_to_numpy(hashing.dense_index, static_argnames="vertices_per_axis")
vertex_row = jit_to_numpy(hashing.vertex_row, static_argnums=(0, 1))

cells = hnp.arrays(np.uint32, (3, 16), elements=st.integers(0, 2**32 - 1))
GRIDS = [
    HashGridConfig(num_dims=num_dims, num_levels=3, table_size=2**8, min_resolution=3, max_resolution=40, **options)
    for num_dims in (2, 3)
    for options in ({}, {"half_voxel_offset": True}, {"dense_levels": False})
]


def hash_by_definition(cell: list[int], table_size: int) -> int:
    """Eq. 4 with integers of any size."""
    result = 0
    for coordinate, prime in zip(cell, (1, 2654435761, 805459861), strict=False):
        result ^= coordinate * prime % 2**32
    return result % table_size


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("table_size", [1, 2**14, 2**28])
@given(cell=cells)
def test_the_hash_is_an_xor_of_products(num_dims: int, table_size: int, cell: np.ndarray) -> None:
    """The xor of coordinate times prime, modulo 2^32, modulo the table size."""
    found = spatial_hash(cell[:num_dims], table_size=table_size)
    assert found.dtype == np.uint32
    assert found.tolist() == [hash_by_definition(column.tolist(), table_size) for column in cell[:num_dims].T]


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_dense_index_is_a_bijection_with_x_fastest(num_dims: int, side: int) -> None:
    vertices = [v[::-1] for v in itertools.product(range(side), repeat=num_dims)]
    found = dense_index(np.array(vertices, np.uint32).T, vertices_per_axis=side)
    assert found.tolist() == list(range(side**num_dims))


def test_dense_index_reaches_the_largest_table() -> None:
    last = np.full((3, 1), 2**9 - 1, np.uint32)
    assert dense_index(last, vertices_per_axis=2**9).tolist() == [2**27 - 1]


@given(st.integers(1, 2**10), st.integers(0, 2**20 - 2**10), st.integers(1, 32))
def test_levels_rise_from_coarsest_to_finest_exactly(low: int, more: int, num_levels: int) -> None:
    grid = HashGridConfig(num_levels=num_levels, min_resolution=low, max_resolution=low + more)
    levels = hashing.level_resolutions(grid)
    assert len(levels) == num_levels
    assert levels[0] == low
    assert levels[-1] == low + more or num_levels == 1
    assert list(levels) == sorted(levels)


@given(st.integers(1, 2**10), st.integers(0, 2**12), st.integers(2, 32))
def test_levels_are_the_floor_of_equation_2(low: int, more: int, num_levels: int) -> None:
    """Wherever float64 can tell."""
    grid = HashGridConfig(num_levels=num_levels, min_resolution=low, max_resolution=low + more)
    growth = math.exp((math.log(low + more) - math.log(low)) / (num_levels - 1))
    for level, resolution in enumerate(hashing.level_resolutions(grid)):
        real = low * growth**level
        if abs(real - round(real)) > 1e-6:
            assert resolution == math.floor(real)
        else:
            assert round(real) - 1 <= resolution <= round(real)


def test_levels_of_an_integer_growth_are_its_powers() -> None:
    """Where the floor is of a whole number, floating point ends now at it and now one below."""
    for low, growth in itertools.product([1, 3, 16], [2, 3, 4, 5, 6, 7, 10]):
        powers = [low]
        while powers[-1] * growth <= 2**20:
            powers.append(powers[-1] * growth)
            grid = HashGridConfig(num_levels=len(powers), min_resolution=low, max_resolution=powers[-1])
            assert list(hashing.level_resolutions(grid)) == powers


def test_levels_of_the_paper() -> None:
    assert hashing.level_resolutions(HashGridConfig()) == (
        *(16, 22, 30, 42, 58, 80, 111, 153, 212, 294, 406, 561, 776, 1072, 1482, 2048),
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_a_level_is_dense_iff_its_vertices_fit(grid: HashGridConfig) -> None:
    sizes = hashing.level_sizes(grid)
    for resolution, size in zip(hashing.level_resolutions(grid), sizes, strict=True):
        vertices = (resolution + 1 + grid.half_voxel_offset) ** grid.num_dims
        dense = grid.dense_levels and vertices <= grid.table_size
        assert hashing.is_dense(grid, resolution) == dense
        assert size == (vertices if dense else grid.table_size)
    assert len(set(sizes)) > 1 or not grid.dense_levels  # both kinds are met


@pytest.mark.parametrize("grid", GRIDS)
def test_offsets_are_the_running_sum_of_sizes(grid: HashGridConfig) -> None:
    assert hashing.level_offsets(grid) == (0, *itertools.accumulate(hashing.level_sizes(grid)))


def test_offsets_do_not_overflow() -> None:
    grid = HashGridConfig(num_levels=8, num_features=1, table_size=2**28, dense_levels=False)
    assert hashing.level_offsets(grid)[-1] == 2**31
    with pytest.raises(InputError, match="product"):  # a row number would not fit 32 bits
        HashGridConfig(num_levels=20, table_size=2**28)


@pytest.mark.parametrize("grid", GRIDS)
def test_dense_rows_are_unique_and_hashed_in_bounds(grid: HashGridConfig) -> None:
    """Dense levels give every vertex a row of its own, hashed ones the row of the hash."""
    for level, (resolution, size) in enumerate(
        zip(hashing.level_resolutions(grid), hashing.level_sizes(grid), strict=True)
    ):
        side = hashing.num_vertices(grid, resolution)
        vertices = np.indices((side,) * grid.num_dims).reshape(grid.num_dims, -1).astype(np.uint32)
        rows = vertex_row(grid, level, vertices)
        assert rows.max() < size
        if hashing.is_dense(grid, resolution):
            assert sorted(rows.tolist()) == list(range(size))
        else:
            some = slice(None, None, 37)  # Python's integers are slow
            assert rows[some].tolist() == [hash_by_definition(v, size) for v in vertices.T[some].tolist()]


def test_rows_of_the_finest_grid_stay_in_the_table() -> None:
    resolution = 2**20
    grid = HashGridConfig(num_levels=1, min_resolution=resolution, max_resolution=resolution, half_voxel_offset=True)
    extremes = [0, 1, resolution, resolution + 1]
    vertices = np.array(list(itertools.product(extremes, repeat=3)), np.uint32).T
    assert vertex_row(grid, 0, vertices).max() < grid.table_size


@pytest.mark.parametrize("num_dims", [2, 3])
def test_corner_offsets_have_x_in_the_lowest_bit(num_dims: int) -> None:
    offsets = hashing.corner_offsets(num_dims)
    assert offsets.tolist() == [list(o[::-1]) for o in itertools.product((0, 1), repeat=num_dims)]


def test_a_tuple_of_coordinates_is_an_array_of_them() -> None:
    cell = np.arange(12, dtype=np.uint32).reshape(3, 4)
    for function in (
        lambda c: hashing.spatial_hash(c, table_size=64),
        lambda c: hashing.dense_index(c, vertices_per_axis=12),
    ):
        both = jax.jit(lambda cell, function=function: (function(tuple(cell)), function(cell)))
        np.testing.assert_array_equal(*both(cell))
