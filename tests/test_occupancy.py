"""Occupancy: cells against float64, and what may never happen: a cell that holds something marked as empty."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scenes import Ball, cell_numbers
from strategies import TINY_MARCH, arrays32, jit_to_numpy, points, seeds

from jaxngp import bitsets, occupancy
from jaxngp.config import MarchConfig, OccupancyConfig
from jaxngp.device import formulation
from jaxngp.occupancy import EMPTY, Cells, OccupancyGrid

G = 32
CONFIG = OccupancyConfig(resolution=G)


def bits(packed: np.ndarray) -> np.ndarray:
    """u32 words of any shape -> all their bits, the lowest first."""
    return np.unpackbits(np.ravel(packed).astype("<u4").view(np.uint8), bitorder="little").astype(bool)


def random_flags(seed: int, share: float, resolution: int = G, num_cascades: int = 1) -> np.ndarray:
    """(K G^3,)"""
    return np.random.default_rng(seed).uniform(size=num_cascades * resolution**3) < share


def cell_coordinates(resolution: int = G) -> np.ndarray:
    """(G^3, 3): the x, y, z of each cell number, x fastest."""
    return np.indices((resolution,) * 3).reshape(3, -1)[::-1].T


# Looking up.

is_occupied = jit_to_numpy(occupancy.is_occupied)
init_occupancy = jit_to_numpy(occupancy.init_occupancy)
pack_bits = jit_to_numpy(bitsets.pack_bits)


def flat_cells(num_cascades: int, resolution: int = G) -> tuple[np.ndarray, np.ndarray]:
    """The lower corners (K G^3, 3) and the sides (K G^3,) of all cells, in scene units."""
    side = np.repeat(2.0 ** np.arange(1 - num_cascades, 1), resolution**3)
    unit = np.tile(cell_coordinates(resolution) / resolution, (num_cascades, 1))
    return (unit - 0.5) * side[:, None] + 0.5, side / resolution


def readable(num_cascades: int, resolution: int = G) -> np.ndarray:
    """(K G^3,): the cells that do not lie inside the next smaller cascade."""
    low, size = flat_cells(num_cascades, resolution)
    half = np.repeat(2.0 ** np.arange(-1 - num_cascades, -1), resolution**3)  # of the next smaller one's side
    reach = np.maximum(np.abs(low - 0.5), np.abs(low + size[:, None] - 0.5)).max(axis=1)
    return (reach > half) | (np.arange(len(low)) < resolution**3)


@pytest.mark.parametrize("num_cascades", [1, 2, 3])
@settings(max_examples=20)
@given(points(64), seeds, st.sampled_from([0.0, 0.1, 0.9, 1.0]), st.sampled_from([1.0, 0.5, 0.2]))
def test_a_point_is_occupied_where_its_cell_is(
    num_cascades: int, position: np.ndarray, seed: int, share: float, scale: float
) -> None:
    position = ((position - np.float32(0.5)) * np.float32(scale) + np.float32(0.5)).astype(np.float32)
    flags = random_flags(seed, share, num_cascades=num_cascades)
    number, certain = cell_numbers(position, G, num_cascades)
    grid = init_occupancy(flags.reshape(num_cascades, -1))
    np.testing.assert_array_equal(is_occupied(grid, position)[certain], flags[number][certain])
    if num_cascades == 1:  # G is a power of two, so that faces are exact
        np.testing.assert_array_equal(is_occupied(grid, position), flags[number])


@pytest.mark.parametrize("num_cascades", [1, 2])
@settings(max_examples=20)
@given(points(64), seeds)
def test_a_pair_of_bits_is_read_as_both_sets_hold(num_cascades: int, position: np.ndarray, seed: int) -> None:
    cells = Cells(G, num_cascades)
    sets = [random_flags(seed + i, 0.5, num_cascades=num_cascades).reshape(num_cascades, -1) for i in range(2)]
    found, *bits_of_sets = read_pairs(cells, *(pack_bits(flags) for flags in sets), position)
    np.testing.assert_array_equal(found, np.asarray(bits_of_sets[0]) + 2 * np.asarray(bits_of_sets[1]))


@functools.partial(jit_to_numpy, static_argnames="cells")
def read_pairs(cells: Cells, first: jax.Array, second: jax.Array, position: jax.Array) -> tuple[jax.Array, ...]:
    axes = position.T
    pairs = cells.read(bitsets.interleave(first, second), *axes, width=2)
    return pairs, cells.read(first, *axes), cells.read(second, *axes)


@pytest.mark.parametrize("num_cascades", [1, 3])
def test_every_cell_is_found_at_its_centre(num_cascades: int) -> None:
    """Those of an outer cascade that lie inside a smaller one are not: there a smaller cell is."""
    cells = Cells(G, num_cascades)
    number = np.arange(cells.num_cells, dtype=np.int32)
    centre = np.stack(jit_to_numpy(cells.centre)(number), axis=-1)
    low, size = flat_cells(num_cascades)
    np.testing.assert_allclose(centre, low + size[:, None] / 2, atol=3e-7)
    np.testing.assert_allclose(jax.jit(cells.side)(number), size * G, rtol=0)
    column, row, layer, cascade = jit_to_numpy(cells.at)(*centre.T)
    found = column + G * (row + G * (layer + G * cascade))
    np.testing.assert_array_equal(found == number, readable(num_cascades))
    np.testing.assert_array_equal(np.ravel(jax.jit(cells.readable)()), readable(num_cascades))


@pytest.mark.parametrize("num_cascades", [1, 8])
@given(arrays32((16, 3), -10, 10))
def test_a_point_outside_the_cube_reads_a_valid_cell(num_cascades: int, position: np.ndarray) -> None:
    column, row, layer, cascade = at(Cells(G, num_cascades), position)
    for place in (column, row, layer):
        assert ((place >= 0) & (place < G)).all()
    outside = np.abs(position - 0.5).max(axis=1) > 0.5
    assert (cascade[outside] == num_cascades - 1).all()
    assert ((cascade >= 0) & (cascade < num_cascades)).all()


@functools.partial(jit_to_numpy, static_argnames="cells")
def at(cells: Cells, position: jax.Array) -> tuple[jax.Array, ...]:
    return cells.at(*position.T)


@pytest.mark.parametrize("num_cascades", [1, 3])
def test_a_fresh_grid_occupies_its_candidates_only(num_cascades: int) -> None:
    flags = random_flags(0, 0.3, num_cascades=num_cascades)
    grid = init_occupancy(flags.reshape(num_cascades, -1))
    flags = flags & readable(num_cascades)
    np.testing.assert_array_equal(bits(grid.occupied), flags)
    np.testing.assert_array_equal(np.ravel(grid.density), np.where(flags, 0, EMPTY))
    assert not np.asarray(grid.opaque).any()


def test_flat_candidates_are_one_cascade() -> None:
    flags = random_flags(0, 0.3)
    jax.tree.map(np.testing.assert_array_equal, init_occupancy(flags), init_occupancy(flags[None]))


@pytest.mark.parametrize("num_cascades", [1, 5])
@pytest.mark.parametrize("resolution", range(32, 513, 32))
def test_a_grid_knows_its_cells(resolution: int, num_cascades: int) -> None:
    density = jax.ShapeDtypeStruct((num_cascades, resolution**3), jnp.float32)
    grid = OccupancyGrid(density=density, occupied=density, opaque=density, bounds=density)
    assert grid.cells == Cells(resolution, num_cascades)
    assert grid.resolution == resolution


# Bounds.


def bounds_by_numpy(flags: np.ndarray, resolution: int = G) -> np.ndarray:
    """(2, 3): the corners of the smallest box around the cells of flags (G^3,), of which there are some."""
    cells = cell_coordinates(resolution)[flags]
    return np.stack([cells.min(axis=0), cells.max(axis=0) + 1]) / resolution


occupied_bounds = jit_to_numpy(occupancy.occupied_bounds)


@given(hnp.arrays(np.int64, (3, 3), elements=st.integers(0, G - 1) | st.sampled_from([0, G - 1])), st.integers(1, 3))
def test_bounds_are_the_smallest_box_around_the_cells(cells: np.ndarray, num_cells: int) -> None:
    """Of one to three cells, those at the cube's faces, edges and corners among them."""
    flags = np.zeros(G**3, bool)
    flags[cells[:num_cells] @ [1, G, G**2]] = True
    found = occupied_bounds(pack_bits(flags[None]))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, bounds_by_numpy(flags))  # multiples of 1 / G, a power of 2, are exact


@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_bounds_hold_for_every_width_of_the_grid(resolution: int) -> None:
    """A row of cells takes one, two or three words."""
    for seed in range(4):
        flags = random_flags(seed, 2.0 * resolution**-3, resolution)  # two cells, more or less
        flags[seed] = True
        found = occupied_bounds(pack_bits(flags[None]))
        np.testing.assert_allclose(found, bounds_by_numpy(flags, resolution), rtol=2**-21)  # a rounded quotient


@given(hnp.arrays(np.int64, 2, elements=st.integers(0, 3 * G**3 - 1)), st.integers(1, 2))
def test_bounds_hold_the_cells_of_all_cascades(numbers: np.ndarray, num_cells: int) -> None:
    flags = np.zeros(3 * G**3, bool)
    flags[numbers[:num_cells]] = True
    low, size = flat_cells(3)
    expected = [low[flags].min(axis=0), (low + size[:, None])[flags].max(axis=0)]
    np.testing.assert_array_equal(occupied_bounds(pack_bits(flags.reshape(3, -1))), expected)


@pytest.mark.parametrize("num_cascades", [1, 3])
def test_bounds_of_all_cells_and_of_none(num_cascades: int) -> None:
    """Those of all are the cube; those of none have no size."""
    full = np.ones((num_cascades, G**3), bool)
    np.testing.assert_array_equal(init_occupancy(full).bounds, [[0, 0, 0], [1, 1, 1]])
    low, high = init_occupancy(~full).bounds
    np.testing.assert_array_equal(low, high)
    assert ((np.asarray(low) >= 0) & (np.asarray(low) <= 1)).all()


# Refreshes.

MARCH = replace(TINY_MARCH, occupancy=replace(CONFIG, decay=0.5))
DT = MARCH.step_size
LIMIT = MARCH.occupancy.threshold / DT


def density_of_cells(cell_density: jax.Array, position: jax.Array) -> jax.Array:
    """Constant in each cell; a point on a face, as rounding may give, has the larger of its two neighbours'."""
    values = []
    for offset in (-1e-6, 1e-6):
        x, y, z = jnp.clip(((position + offset) * G).astype(jnp.int32), 0, G - 1).T
        values.append(cell_density[x + G * (y + G * z)])
    return jnp.maximum(*values)


def refresh(
    grid: OccupancyGrid, seed: int, cell_density: np.ndarray, warmup: bool, config: MarchConfig = MARCH
) -> OccupancyGrid:
    return refresh_program(grid, np.uint32(seed), np.float32(cell_density), np.bool_(warmup), config=config)


@functools.partial(jit_to_numpy, static_argnames="config")
def refresh_program(
    grid: OccupancyGrid, seed: jax.Array, cell_density: jax.Array, warmup: jax.Array, *, config: MarchConfig
) -> OccupancyGrid:
    density_fn = functools.partial(density_of_cells, cell_density)
    return occupancy.update_occupancy(grid, jax.random.key(seed), density_fn, warmup, config=config)


def some_grid(seed: int, share_of_candidates: float) -> OccupancyGrid:
    """Candidates with densities from 0 to 2, of which a random eighth is marked as occupied."""
    rng = np.random.default_rng(seed)
    flags = random_flags(seed, share_of_candidates)
    density = np.where(flags, rng.uniform(0, 2, G**3), EMPTY).astype(np.float32)
    marked = flags & (rng.uniform(size=G**3) < 0.125)
    packed = pack_bits(marked[None])
    bounds = occupied_bounds(packed)
    return OccupancyGrid(density=density[None], occupied=packed, opaque=np.zeros_like(packed), bounds=bounds)


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.sampled_from([0.001, 0.1, 1.0]))
def test_warmup_never_marks_a_dense_cell_empty(seed: int, share_of_candidates: float, share_dense: float) -> None:
    grid = some_grid(seed, share_of_candidates)
    dense = random_flags(seed + 1, share_dense)
    new = refresh(grid, seed, np.where(dense, 1.01 * LIMIT, 0), True)
    flags = np.ravel(grid.density) >= 0
    assert bits(new.occupied)[dense & flags].all()
    assert (np.ravel(new.density)[dense & flags] >= np.float32(1.01 * LIMIT)).all()
    assert not bits(new.occupied)[~flags].any()
    np.testing.assert_array_equal(np.ravel(new.density)[~flags], EMPTY)


@pytest.mark.parametrize("warmup", [True, False])
@settings(max_examples=5)
@given(hnp.arrays(np.int64, (2, 3), elements=st.integers(0, G)), seeds)
def test_a_refreshed_grid_knows_its_bounds(warmup: bool, corners: np.ndarray, seed: int) -> None:
    """Candidates everywhere, density in a box only; after warmup only some of it is found."""
    cells = cell_coordinates()
    inside = np.all((cells >= corners.min(axis=0)) & (cells < corners.max(axis=0)), axis=1)
    grid = replace(some_grid(seed, 1.0), density=np.zeros((1, G**3), np.float32))
    new = refresh(grid, seed, np.where(inside, 2 * LIMIT, 0), warmup)
    flags = bits(new.occupied)
    low, high = np.asarray(new.bounds)
    if flags.any():
        np.testing.assert_array_equal(new.bounds, bounds_by_numpy(flags))
    else:
        np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize("warmup", [True, False])
def test_without_density_every_cell_decays(warmup: bool) -> None:
    grid = some_grid(0, 0.5)
    new = refresh(grid, 0, np.zeros(G**3), warmup)
    np.testing.assert_allclose(new.density, np.where(grid.density >= 0, 0.5 * grid.density, EMPTY), rtol=1e-6)


@settings(max_examples=15)
@given(seeds, st.booleans(), st.sampled_from([0.01, 1.0, 100.0]))
def test_occupied_means_above_the_mean_or_threshold(seed: int, warmup: bool, scale: float) -> None:
    rng = np.random.default_rng(seed)
    cell_density = (scale * rng.exponential(size=G**3) * random_flags(seed + 2, 0.3)).astype(np.float32)
    new = refresh(some_grid(seed, 0.7), seed, cell_density, warmup)
    density = np.ravel(new.density).astype(np.float64)
    limit = min(np.maximum(density, 0).mean(), LIMIT)
    certain = np.abs(density - limit) > 1e-5 * limit
    np.testing.assert_array_equal(bits(new.occupied)[certain], (density > limit)[certain])
    assert certain.mean() > 0.99


@pytest.mark.parametrize(("opaque_thickness", "threshold"), [(0.5, 0.01), (1e-3, 0.3)])
def test_opaque_means_above_a_steps_thickness(opaque_thickness: float, threshold: float) -> None:
    config = replace(MARCH, opaque_thickness=opaque_thickness, occupancy=replace(CONFIG, threshold=threshold))
    cell_density = np.random.default_rng(0).exponential(0.5 / DT, size=G**3).astype(np.float32)
    new = refresh(some_grid(0, 0.7), 0, cell_density, True, config=config)
    thickness = np.ravel(new.density).astype(np.float64) * DT
    limit = max(opaque_thickness, threshold)
    certain = np.abs(thickness - limit) > 1e-5
    opaque = bits(new.opaque)
    np.testing.assert_array_equal(opaque[certain], (thickness > limit)[certain])
    assert 0.1 < opaque.mean() < 0.9
    assert not (opaque & ~bits(new.occupied)).any()


@pytest.mark.parametrize(("resolution", "num_cascades"), [(64, 1), (32, 3)])
def test_warmup_looks_into_every_candidate(resolution: int, num_cascades: int) -> None:
    """Inside its own cell, also where there are more than fit one chunk. The density tells where the look was."""
    config = replace(MARCH, occupancy=OccupancyConfig(resolution=resolution, num_cascades=num_cascades, decay=0.5))
    flags = random_flags(0, 0.9, resolution, num_cascades)
    grid = init_occupancy(flags.reshape(num_cascades, -1))
    flags = flags & readable(num_cascades, resolution)
    low, size = flat_cells(num_cascades, resolution)

    @jit_to_numpy
    def look(grid: OccupancyGrid, axis: jax.Array) -> OccupancyGrid:
        place = lambda p: 1 + jnp.take(p, axis, axis=1)  # noqa: E731
        return occupancy.update_occupancy(grid, jax.random.key(axis), place, jnp.array(True), config=config)

    for axis in range(3):
        density = np.ravel(look(grid, axis).density)
        np.testing.assert_array_equal(density >= 0, flags)
        place = (density.astype(np.float64) - 1 - low[:, axis]) / size
        assert (place[flags] > -1e-3).all()
        assert (place[flags] < 1 + 1e-3).all()
        np.testing.assert_allclose(place[flags].mean(), 0.5, atol=0.01)
        np.testing.assert_allclose(place[flags].std(), 12**-0.5, atol=0.01)


@functools.cache
def refresh_of(device: Literal["cpu", "gpu"]) -> Callable[[OccupancyGrid, np.bool_], OccupancyGrid]:
    """A refresh of more cells than a CPU looks into in one turn; the density tells where the look was."""
    config = replace(MARCH, occupancy=OccupancyConfig(resolution=64))

    def refresh(grid: OccupancyGrid, warmup: jax.Array) -> OccupancyGrid:
        with formulation(device):
            return occupancy.update_occupancy(grid, jax.random.key(0), lambda p: 1 + p[:, 0], warmup, config=config)

    return jit_to_numpy(refresh)


@pytest.mark.parametrize("warmup", [False, True])
def test_both_formulations_look_into_the_same_cells(warmup: bool) -> None:
    """At the same points, where a CPU takes several turns and a GPU one."""
    grid = init_occupancy(random_flags(0, 0.9, 64, 1).reshape(1, -1))
    jax.tree.map(np.testing.assert_array_equal, *(refresh_of(d)(grid, np.bool_(warmup)) for d in ("cpu", "gpu")))


def test_after_warmup_some_cells_are_drawn() -> None:
    grid = some_grid(0, 0.5)
    new = refresh(grid, 3, np.full(G**3, 100.0), False)
    looked, flags, marked = np.ravel(new.density) == 100, np.ravel(grid.density) >= 0, bits(grid.occupied)
    assert not looked[~flags].any()
    # Draws with replacement miss a cell with probability exp(-draws per cell). Of the occupied, an eighth of the
    # candidates, as many are drawn as there are, which is less than a quarter of the candidates.
    np.testing.assert_allclose(looked[flags & ~marked].mean(), 1 - np.exp(-0.25), atol=0.02)
    np.testing.assert_allclose(looked[marked].mean(), 1 - np.exp(-1.25), atol=0.04)


def test_keys_decide_where_a_refresh_looks() -> None:
    grid, dense = some_grid(0, 0.5), np.full(G**3, 100.0)
    first, again, other = (refresh(grid, seed, dense, False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.density, again.density)
    assert not np.array_equal(first.density, other.density)


@pytest.mark.parametrize("warmup", [True, False])
def test_a_grid_without_candidates_stays_empty(warmup: bool) -> None:
    grid = init_occupancy(np.zeros(G**3, bool))
    new = refresh(grid, 0, np.full(G**3, 100.0), warmup)
    assert not np.asarray(new.occupied).any()
    np.testing.assert_array_equal(new.density, EMPTY)


# Refreshes of several cascades.

SHELLS = 3
NESTED = replace(MARCH, occupancy=replace(CONFIG, num_cascades=SHELLS))


@settings(max_examples=5)
@given(arrays32(3, 0.3, 0.7), st.sampled_from([0.05, 0.1, 0.28]), seeds)
def test_refreshes_find_a_ball_in_all_cascades(centre: np.ndarray, radius: float, seed: int) -> None:
    """What lies wholly inside the ball is occupied, what it does not touch is not: in the cells that a point reads."""
    ball = Ball(tuple(centre.tolist()), radius, 2 * LIMIT, (0, 0, 0), (0, 0, 0))
    full = init_occupancy(np.ones((SHELLS, G**3), bool))
    new = refresh_ball(full, centre, radius, seed)
    low, size = flat_cells(SHELLS)
    high = low + size[:, None]
    nearest = np.linalg.norm(np.clip(ball.centre, low, high) - ball.centre, axis=1)
    farthest = np.linalg.norm(np.maximum(np.abs(low - ball.centre), np.abs(high - ball.centre)), axis=1)
    occupied = bits(new.occupied)
    assert occupied[(farthest < ball.radius - 1e-5) & readable(SHELLS)].all()
    assert not occupied[(nearest > ball.radius + 1e-5) | ~readable(SHELLS)].any()
    np.testing.assert_array_equal(np.ravel(new.density) == EMPTY, ~readable(SHELLS))
    bounds = [low[occupied].min(axis=0), high[occupied].max(axis=0)]
    np.testing.assert_array_equal(new.bounds, bounds)


def refresh_ball(grid: OccupancyGrid, centre: np.ndarray, radius: float, seed: int) -> OccupancyGrid:
    return refresh_ball_program(grid, np.float32(centre), np.float32(radius), np.uint32(seed))


@jit_to_numpy
def refresh_ball_program(grid: OccupancyGrid, centre: jax.Array, radius: jax.Array, seed: jax.Array) -> OccupancyGrid:
    def density_fn(position: jax.Array) -> jax.Array:
        return jnp.where(jnp.sum((position - centre) ** 2, axis=-1) < radius**2, 2 * LIMIT, 0.0)

    return occupancy.update_occupancy(grid, jax.random.key(seed), density_fn, jnp.array(True), config=NESTED)


def test_the_mean_of_all_cascades_is_that_of_the_cube() -> None:
    """A cell of a smaller cascade counts for its volume: here the mean, below the threshold, is what decides."""
    density = np.where(readable(SHELLS), np.random.default_rng(0).uniform(0, LIMIT, SHELLS * G**3), EMPTY)
    grid = OccupancyGrid(
        density=density.reshape(SHELLS, -1).astype(np.float32),  # type: ignore[arg-type]
        occupied=np.zeros((SHELLS, G**3 // 32), np.uint32),  # type: ignore[arg-type]
        opaque=np.zeros((SHELLS, G**3 // 32), np.uint32),  # type: ignore[arg-type]
        bounds=np.zeros((2, 3), np.float32),  # type: ignore[arg-type]
    )
    new = refresh_ball(grid, np.zeros(3), 0.0, 0)  # nothing there: the density decays
    _, size = flat_cells(SHELLS)
    density = np.ravel(new.density).astype(np.float64)
    mean = np.sum(np.maximum(density, 0) * size**3)
    assert mean < LIMIT
    certain = np.abs(density - mean) > 1e-4 * mean
    np.testing.assert_array_equal(bits(new.occupied)[certain], (density > mean)[certain])
