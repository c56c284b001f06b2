"""Occupancy: bits against numpy, and what may never happen: a cell that holds something marked as empty."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import TINY_MARCH, arrays32, points, seeds

from jaxngp import occupancy
from jaxngp.config import MarchConfig, OccupancyConfig
from jaxngp.occupancy import EMPTY, OccupancyGrid

G = 32
CONFIG = OccupancyConfig(resolution=G)
words = hnp.arrays(np.uint32, 8, elements=st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1]))


def bits(packed: np.ndarray) -> np.ndarray:
    """(n,) u32 -> (32 n,) bool, the lowest bit first."""
    return np.unpackbits(np.asarray(packed, "<u4").view(np.uint8), bitorder="little").astype(bool)


def random_flags(seed: int, share: float, resolution: int = G) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=resolution**3) < share


def cell_coordinates(resolution: int = G) -> np.ndarray:
    """(G^3, 3): the x, y, z of each cell number, x fastest."""
    return np.indices((resolution,) * 3).reshape(3, -1)[::-1].T


# Bits.


@given(words)
def test_packing_puts_the_first_flag_into_the_lowest_bit(packed: np.ndarray) -> None:
    found = occupancy.pack_bits(jnp.asarray(bits(packed)))
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, packed)
    np.testing.assert_array_equal(occupancy.pack_bits(bits(packed).reshape(2, 128)), packed.reshape(2, 4))


@given(st.integers(1, 2**32 - 1) | st.sampled_from([2**k for k in range(32)]))
def test_the_nth_set_bit_is_the_nth_set_bit(word: int) -> None:
    places = np.flatnonzero(bits(np.array([word], np.uint32)))
    ranks = np.minimum(np.arange(32), len(places) - 1)
    found = jax.jit(occupancy.nth_set_bit)(jnp.full(32, word, jnp.uint32), jnp.asarray(ranks))
    np.testing.assert_array_equal(found, places[ranks])


@given(words)
def test_the_even_bits_move_together_into_the_lower_half(packed: np.ndarray) -> None:
    flags = bits(packed).reshape(8, 32)
    expected = np.concatenate([flags[:, ::2], np.zeros((8, 16), bool)], axis=1)
    np.testing.assert_array_equal(bits(jax.jit(occupancy.even_bits)(packed)).reshape(8, 32), expected)


@given(words, words)
def test_interleaved_sets_come_apart_again(even: np.ndarray, odd: np.ndarray) -> None:
    pairs = jax.jit(occupancy.interleave)(even, odd)
    for shift, packed in enumerate((even, odd)):
        apart = np.asarray(occupancy.even_bits(pairs >> shift)).reshape(8, 2)
        np.testing.assert_array_equal(apart[:, 0] | (apart[:, 1] << 16), packed)


@given(words)
def test_the_bits_of_a_word_and_all_before_it_are_counted(packed: np.ndarray) -> None:
    end = jax.jit(occupancy.count_bits)(packed)
    assert end.dtype == jnp.int32
    np.testing.assert_array_equal(end, np.cumsum(bits(packed).reshape(8, 32).sum(axis=1)))


@given(words)
def test_choosing_bits_by_rank_lists_the_set_ones_in_order(packed: np.ndarray) -> None:
    cells = np.flatnonzero(bits(packed))
    ranks = np.arange(256)
    found = np.asarray(jax.jit(occupancy.nth_bit)(packed, occupancy.count_bits(packed), ranks))
    np.testing.assert_array_equal(found[: len(cells)], cells)
    assert ((found >= 0) & (found < 256)).all()  # a valid cell, whatever the rank


# Looking up.

bit_at = jax.jit(occupancy.bit_at, static_argnames="resolution")
pair_at = jax.jit(occupancy.pair_at, static_argnames="resolution")


@settings(max_examples=20)
@given(points(64), seeds, st.sampled_from([0.0, 0.1, 0.9, 1.0]))
def test_a_point_is_occupied_where_its_cell_is(position: np.ndarray, seed: int, share: float) -> None:
    flags = random_flags(seed, share)
    cell = np.minimum(np.floor(position * np.float32(G)), G - 1).astype(int)
    expected = flags[cell[:, 0] + G * (cell[:, 1] + G * cell[:, 2])]
    grid = occupancy.init_occupancy(jnp.asarray(flags))
    np.testing.assert_array_equal(jax.jit(occupancy.is_occupied)(grid, position), expected)
    np.testing.assert_array_equal(bit_at(grid.occupied, *position.T, resolution=G), expected)
    pairs = occupancy.interleave(occupancy.pack_bits(flags[::-1]), grid.occupied)
    first = flags[::-1][cell[:, 0] + G * (cell[:, 1] + G * cell[:, 2])]
    np.testing.assert_array_equal(pair_at(pairs, *position.T, resolution=G), first + 2 * expected)


def test_every_cell_is_found_at_its_centre_by_its_number() -> None:
    centre = occupancy.cell_centre(jnp.arange(G**3), resolution=G)
    np.testing.assert_allclose(centre, (cell_coordinates() + 0.5) / G, atol=1e-7)
    flags = random_flags(0, 0.5)
    np.testing.assert_array_equal(occupancy.is_occupied(occupancy.init_occupancy(jnp.asarray(flags)), centre), flags)


@given(arrays32((16, 3), -10, 10))
def test_a_point_outside_the_cube_reads_a_valid_cell(position: np.ndarray) -> None:
    grid = occupancy.init_occupancy(jnp.ones(G**3, bool))
    assert np.asarray(occupancy.is_occupied(grid, jnp.asarray(position))).all()


def test_a_fresh_grid_occupies_its_candidates_and_nothing_else() -> None:
    flags = random_flags(0, 0.3)
    grid = occupancy.init_occupancy(jnp.asarray(flags))
    np.testing.assert_array_equal(bits(grid.occupied), flags)
    np.testing.assert_array_equal(grid.density, np.where(flags, 0, EMPTY))
    assert not np.asarray(grid.opaque).any()


@pytest.mark.parametrize("resolution", range(32, 513, 32))
def test_a_grid_knows_its_resolution(resolution: int) -> None:
    density = jax.ShapeDtypeStruct((resolution**3,), jnp.float32)
    grid = OccupancyGrid(density=density, occupied=density, opaque=density, bounds=density)
    assert grid.resolution == resolution


# Bounds.


def bounds_by_numpy(flags: np.ndarray, resolution: int = G) -> np.ndarray:
    """(2, 3): the corners of the smallest box around the cells of flags (G^3,), of which there are some."""
    cells = cell_coordinates(resolution)[flags]
    return np.stack([cells.min(axis=0), cells.max(axis=0) + 1]) / resolution


occupied_bounds = jax.jit(occupancy.occupied_bounds)


@given(hnp.arrays(np.int64, (3, 3), elements=st.integers(0, G - 1) | st.sampled_from([0, G - 1])), st.integers(1, 3))
def test_the_bounds_are_the_smallest_box_around_the_occupied_cells(cells: np.ndarray, num_cells: int) -> None:
    """Of one to three cells, those at the cube's faces, edges and corners among them."""
    flags = np.zeros(G**3, bool)
    flags[cells[:num_cells] @ [1, G, G**2]] = True
    found = occupied_bounds(occupancy.pack_bits(jnp.asarray(flags)))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, bounds_by_numpy(flags))  # multiples of 1 / G, a power of 2, are exact


@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_the_bounds_hold_for_every_width_of_the_grid(resolution: int) -> None:
    """A row of cells takes one, two or three words."""
    for seed in range(4):
        flags = random_flags(seed, 2.0 * resolution**-3, resolution)  # two cells, more or less
        flags[seed] = True
        found = occupied_bounds(occupancy.pack_bits(jnp.asarray(flags)))
        np.testing.assert_allclose(found, bounds_by_numpy(flags, resolution), rtol=2**-23)  # a division's rounding


def test_the_bounds_of_all_cells_are_the_cube_and_those_of_none_have_no_size() -> None:
    np.testing.assert_array_equal(occupancy.init_occupancy(jnp.ones(G**3, bool)).bounds, [[0, 0, 0], [1, 1, 1]])
    low, high = occupancy.init_occupancy(jnp.zeros(G**3, bool)).bounds
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


@functools.partial(jax.jit, static_argnames="config")
def refresh(
    grid: OccupancyGrid, seed: int, cell_density: jax.Array, warmup: bool, config: MarchConfig = MARCH
) -> OccupancyGrid:
    density_fn = functools.partial(density_of_cells, cell_density)
    return occupancy.update_occupancy(grid, jax.random.key(seed), density_fn, jnp.asarray(warmup), config=config)


def some_grid(seed: int, share_of_candidates: float) -> OccupancyGrid:
    """Candidates with densities from 0 to 2, of which a random eighth is marked as occupied."""
    rng = np.random.default_rng(seed)
    flags = random_flags(seed, share_of_candidates)
    density = np.where(flags, rng.uniform(0, 2, G**3), EMPTY).astype(np.float32)
    marked = flags & (rng.uniform(size=G**3) < 0.125)
    packed = occupancy.pack_bits(jnp.asarray(marked))
    return OccupancyGrid(
        density=jnp.asarray(density),
        occupied=packed,
        opaque=jnp.zeros_like(packed),
        bounds=occupancy.occupied_bounds(packed),
    )


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.sampled_from([0.001, 0.1, 1.0]))
def test_a_cell_with_density_is_never_marked_empty_by_a_refresh_in_warmup(
    seed: int, share_of_candidates: float, share_dense: float
) -> None:
    grid = some_grid(seed, share_of_candidates)
    dense = random_flags(seed + 1, share_dense)
    new = refresh(grid, seed, np.where(dense, 1.01 * LIMIT, 0).astype(np.float32), True)
    flags = np.asarray(grid.density) >= 0
    assert bits(new.occupied)[dense & flags].all()
    assert (np.asarray(new.density)[dense & flags] >= np.float32(1.01 * LIMIT)).all()
    assert not bits(new.occupied)[~flags].any()
    np.testing.assert_array_equal(np.asarray(new.density)[~flags], EMPTY)


@pytest.mark.parametrize("warmup", [True, False])
@settings(max_examples=5)
@given(hnp.arrays(np.int64, (2, 3), elements=st.integers(0, G)), seeds)
def test_a_refreshed_grid_knows_its_bounds(warmup: bool, corners: np.ndarray, seed: int) -> None:
    """Candidates everywhere, density in a box only; after warmup only some of it is found."""
    cells = cell_coordinates()
    inside = np.all((cells >= corners.min(axis=0)) & (cells < corners.max(axis=0)), axis=1)
    grid = replace(some_grid(seed, 1.0), density=jnp.zeros(G**3))
    new = refresh(grid, np.uint32(seed), np.where(inside, 2 * LIMIT, 0).astype(np.float32), warmup)
    flags = bits(new.occupied)
    low, high = np.asarray(new.bounds)
    if flags.any():
        np.testing.assert_array_equal(new.bounds, bounds_by_numpy(flags))
    else:
        np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize("warmup", [True, False])
def test_without_density_every_cell_decays(warmup: bool) -> None:
    grid = some_grid(0, 0.5)
    new = refresh(grid, 0, jnp.zeros(G**3), warmup)
    np.testing.assert_allclose(new.density, np.where(grid.density >= 0, 0.5 * grid.density, EMPTY), rtol=1e-6)


@settings(max_examples=15)
@given(seeds, st.booleans(), st.sampled_from([0.01, 1.0, 100.0]))
def test_a_cell_is_occupied_above_the_mean_or_the_threshold_whichever_is_less(
    seed: int, warmup: bool, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    cell_density = (scale * rng.exponential(size=G**3) * random_flags(seed + 2, 0.3)).astype(np.float32)
    new = refresh(some_grid(seed, 0.7), seed, cell_density, warmup)
    density = np.asarray(new.density, np.float64)
    limit = min(np.maximum(density, 0).mean(), LIMIT)
    certain = np.abs(density - limit) > 1e-5 * limit
    np.testing.assert_array_equal(bits(new.occupied)[certain], (density > limit)[certain])
    assert certain.mean() > 0.99


@pytest.mark.parametrize(("opaque_thickness", "threshold"), [(0.5, 0.01), (1e-3, 0.3)])
def test_a_cell_is_opaque_above_the_thickness_of_a_step_and_then_it_is_occupied(
    opaque_thickness: float, threshold: float
) -> None:
    config = replace(MARCH, opaque_thickness=opaque_thickness, occupancy=replace(CONFIG, threshold=threshold))
    cell_density = np.random.default_rng(0).exponential(0.5 / DT, size=G**3).astype(np.float32)
    new = refresh(some_grid(0, 0.7), 0, cell_density, True, config=config)
    thickness = np.asarray(new.density, np.float64) * DT
    limit = max(opaque_thickness, threshold)
    certain = np.abs(thickness - limit) > 1e-5
    opaque = bits(new.opaque)
    np.testing.assert_array_equal(opaque[certain], (thickness > limit)[certain])
    assert 0.1 < opaque.mean() < 0.9
    assert not (opaque & ~bits(new.occupied)).any()


@pytest.mark.parametrize("resolution", [32, 64])
def test_in_warmup_every_candidate_is_looked_at_inside_its_own_cell(resolution: int) -> None:
    """Also where there are more cells than fit one chunk. The density tells where the look was."""
    config = replace(MARCH, occupancy=replace(CONFIG, resolution=resolution))
    flags = random_flags(0, 0.9, resolution)
    grid = occupancy.init_occupancy(jnp.asarray(flags))
    look = jax.jit(
        lambda axis: occupancy.update_occupancy(
            grid, jax.random.key(axis), lambda p: 1 + jnp.take(p, axis, axis=1), jnp.array(True), config=config
        )
    )
    for axis in range(3):
        place = (np.asarray(look(axis).density, np.float64) - 1) * resolution - cell_coordinates(resolution)[:, axis]
        assert (place[flags] > -1e-3).all()
        assert (place[flags] < 1 + 1e-3).all()
        np.testing.assert_allclose(place[flags].mean(), 0.5, atol=0.01)
        np.testing.assert_allclose(place[flags].std(), 12**-0.5, atol=0.01)


def test_after_warmup_a_quarter_is_drawn_from_all_candidates_and_as_much_from_the_occupied() -> None:
    grid = some_grid(0, 0.5)
    new = refresh(grid, 3, jnp.full(G**3, 100.0), False)
    looked, flags, marked = np.asarray(new.density) == 100, np.asarray(grid.density) >= 0, bits(grid.occupied)
    assert not looked[~flags].any()
    # Draws with replacement miss a cell with probability exp(-draws per cell). Of the occupied, an eighth of the
    # candidates, as many are drawn as there are, which is less than a quarter of the candidates.
    np.testing.assert_allclose(looked[flags & ~marked].mean(), 1 - np.exp(-0.25), atol=0.02)
    np.testing.assert_allclose(looked[marked].mean(), 1 - np.exp(-1.25), atol=0.04)


def test_equal_keys_give_equal_grids_and_other_keys_look_elsewhere() -> None:
    grid, dense = some_grid(0, 0.5), jnp.full(G**3, 100.0)
    first, again, other = (refresh(grid, seed, dense, False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.density, again.density)
    assert not np.array_equal(first.density, other.density)


@pytest.mark.parametrize("warmup", [True, False])
def test_a_grid_without_candidates_stays_empty(warmup: bool) -> None:
    grid = occupancy.init_occupancy(jnp.zeros(G**3, bool))
    new = refresh(grid, 0, jnp.full(G**3, 100.0), warmup)
    assert not np.asarray(new.occupied).any()
    np.testing.assert_array_equal(new.density, EMPTY)
