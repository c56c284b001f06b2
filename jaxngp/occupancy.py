"""The occupancy grid: which cells of the unit cube may hold density (paper appendix E.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.bitsets import count_bits, nth_bit, pack_bits
from jaxngp.config import MarchConfig
from jaxngp.device import by_device, fusion_barrier, largest, largest_of_shares, num_shares, share_index

DensityFn = Callable[[jax.Array], jax.Array]
"""position (N, 3) in scene units -> density (N,) per scene unit."""

EMPTY = -1.0
"""The stored density of a cell that stays empty: no camera sees it, a silhouette excludes it, or no point is in it."""

_CHUNK = 2**15  # cells whose density is evaluated at once: the network's activations stay in a CPU's cache
_CHUNKS_AT_ONCE = 8  # on a GPU, which waits for the host before each turn


@dataclass(frozen=True)
class Cells:
    """K nested cubes of G^3 cells each, all about the middle of the unit cube.

    Cascade k has the side 2^(k - K + 1): the outermost, K - 1, is the unit cube. A point belongs to the smallest
    cascade that contains it, so the middle of every cascade but the first is never read. Cell (x, y, z) of cascade k
    has the number x + G (y + G (z + G k)). With one cascade, tracing leaves out all that is for several.
    """

    resolution: int  # G
    num_cascades: int = 1  # K, 1 to 8

    @property
    def num_cells(self) -> int:
        return self.num_cascades * self.resolution**3

    def at(self, x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Column, row, layer and cascade (...) i32 of the cells that hold the points, or are nearest to them."""
        cascade = jnp.zeros(x.shape, jnp.int32)
        if self.num_cascades > 1:
            x, y, z = x - 0.5, y - 0.5, z - 0.5
            distance = jnp.maximum(jnp.maximum(jnp.abs(x), jnp.abs(y)), jnp.abs(z))
            for k in range(self.num_cascades - 1):
                cascade = cascade + (distance > 2.0 ** (k - self.num_cascades)).astype(jnp.int32)
            zoom = (1 << (self.num_cascades - 1 - cascade)).astype(jnp.float32)
            x, y, z = x * zoom + 0.5, y * zoom + 0.5, z * zoom + 0.5
        end = self.resolution - 1
        column, row, layer = (jnp.clip((p * self.resolution).astype(jnp.int32), 0, end) for p in (x, y, z))
        return column, row, layer, cascade

    def read(self, words: jax.Array, x: jax.Array, y: jax.Array, z: jax.Array, *, width: int = 1) -> jax.Array:
        """The bits (...) u32 of the cells that hold the points; of the nearest cell for a point outside the cube.

        words (K, G^3 / 32 width) u32. A width of 2 is for pairs, as `interleave` makes them: the first set's bit is the
        lower. One array (...) per axis spares (..., 3) temporaries.
        """
        column, row, layer, cascade = self.at(x, y, z)
        shift = 5 - (width - 1)  # 2^shift cells to a word
        # Rows of cells are whole words, so the place in a word depends on the column alone: of the cell's number, used
        # for both, XLA:GPU would make an array in memory.
        row = row + self.resolution * (layer + self.resolution * cascade)
        word = (column >> shift) + (self.resolution >> shift) * row
        place = width * (column & (2**shift - 1))
        found = words.reshape(-1).at[word].get(mode="promise_in_bounds")
        return (found >> place.astype(jnp.uint32)) & np.uint32(2**width - 1)

    def centre(self, cell: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The centres of cells (...) i32 in scene units, one array (...) f32 per axis."""
        size = self.resolution
        column, row, layer = cell % size, cell // size % size, cell // size**2 % size
        x, y, z = ((place.astype(jnp.float32) + 0.5) / size for place in (column, row, layer))
        if self.num_cascades == 1:
            return x, y, z
        side = self.side(cell)
        return (x - 0.5) * side + 0.5, (y - 0.5) * side + 0.5, (z - 0.5) * side + 0.5

    def side(self, cell: jax.Array) -> jax.Array:
        """The sides (...) f32 of the cascades that cells (...) i32 belong to; a cell is G times smaller."""
        if self.num_cascades == 1:
            return jnp.ones(cell.shape, jnp.float32)
        return (1 << (cell // self.resolution**3)).astype(jnp.float32) * 2.0 ** (1 - self.num_cascades)

    def readable(self) -> jax.Array:
        """(K, G^3) bool: whether any point belongs to a cell, and not to the next smaller cascade."""
        size = self.resolution
        place = jnp.arange(size, dtype=jnp.int32)
        middle = (place >= size // 4) & (place < 3 * size // 4)
        covered = (middle[:, None, None] & middle[:, None] & middle).reshape(-1)
        outer = jnp.arange(self.num_cascades, dtype=jnp.int32)[:, None] > 0
        return ~(outer & covered)


@struct.dataclass
class OccupancyGrid:
    """density (K, G^3) f32 per scene unit, or EMPTY; occupied and opaque (K, G^3 / 32) u32, one bit a cell.

    Opaque cells are a guess at where a ray ends, for training only; an opaque cell is occupied. bounds (2, 3) f32:
    the lower and the upper corner of a box that holds all occupied cells, in scene units.
    """

    density: jax.Array
    occupied: jax.Array
    opaque: jax.Array
    bounds: jax.Array

    @property
    def cells(self) -> Cells:
        num_cascades, num_cells = self.density.shape[-2:]
        return Cells(resolution=round(num_cells ** (1 / 3)), num_cascades=num_cascades)

    @property
    def resolution(self) -> int:
        return self.cells.resolution


def init_occupancy(candidates: jax.Array) -> OccupancyGrid:
    """A grid in which every candidate cell is occupied and every other stays empty.

    candidates (K, G^3) bool, or (G^3,) for a single cascade. Cells that no point belongs to are no candidates.
    """
    candidates = jnp.atleast_2d(candidates)
    if candidates.shape[0] > 1:
        resolution = round(candidates.shape[1] ** (1 / 3))
        candidates = candidates & Cells(resolution, candidates.shape[0]).readable()
    occupied = pack_bits(candidates)
    return OccupancyGrid(
        density=jnp.where(candidates, jnp.float32(0), jnp.float32(EMPTY)),
        occupied=occupied,
        opaque=jnp.zeros_like(occupied),
        bounds=occupied_bounds(occupied),
    )


def occupied_bounds(words: jax.Array) -> jax.Array:
    """The smallest box (2, 3) around the cells whose bits are set in words (K, G^3 / 32) u32; of no size if none is."""
    num_cascades = words.shape[0]
    if num_cascades == 1:
        return _cascade_bounds(words[0])
    side = np.float32(2) ** np.arange(1 - num_cascades, 1, dtype=np.float32)
    bounds = (jax.vmap(_cascade_bounds)(words) - 0.5) * side[:, None, None] + 0.5  # (K, 2, 3)
    some = jnp.any(words != 0, axis=1)[:, None]
    low = jnp.min(jnp.where(some, bounds[:, 0], 1), axis=0)
    return jnp.stack([low, jnp.maximum(jnp.max(jnp.where(some, bounds[:, 1], 0), axis=0), low)])


def _cascade_bounds(words: jax.Array) -> jax.Array:
    """`occupied_bounds` of one cascade (G^3 / 32,) u32, as if it were the unit cube."""
    resolution = round((words.shape[0] * 32) ** (1 / 3))
    layers = words.reshape(resolution, resolution, resolution // 32)  # z, y, x / 32
    columns = lax.reduce(layers, np.uint32(0), lax.bitwise_or, (0, 1))
    in_x = ((columns[:, None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(-1) != 0
    bounds = []
    for flags in (in_x, jnp.any(layers != 0, axis=(0, 2)), jnp.any(layers != 0, axis=(1, 2))):
        low, high = lax.argmax(flags, 0, jnp.int32), resolution - lax.argmax(flags[::-1], 0, jnp.int32)
        bounds.append(jnp.stack([low, jnp.where(jnp.any(flags), high, low)]))
    return jnp.stack(bounds, axis=1).astype(jnp.float32) / resolution


def is_occupied(grid: OccupancyGrid, position: jax.Array) -> jax.Array:
    """Whether the cells that hold the points are occupied. position (..., 3) in [0, 1] -> (...) bool."""
    return grid.cells.read(grid.occupied, *(position[..., axis] for axis in range(3))) != 0


def update_occupancy(
    grid: OccupancyGrid, key: jax.Array, density_fn: DensityFn, warmup: jax.Array, *, config: MarchConfig
) -> OccupancyGrid:
    """One refresh: decay every cell, look at some of them at a random point each, keep the larger density.

    Devices that share a program take turns with chunks of the looks, whose random numbers are those of one alone.
    While `warmup` () bool is True every candidate cell is looked at; afterwards a quarter as many drawn from all
    candidates and as many from the occupied ones. A cell is occupied above min(mean density, threshold), so that of
    a density which is the same everywhere and below the threshold, none is.
    """
    cells, occupied = grid.cells, grid.occupied.reshape(-1)
    candidates = pack_bits(grid.density.reshape(-1) >= 0)
    ends = count_bits(candidates), count_bits(occupied)
    num_candidates, num_occupied = ends[0][-1], ends[1][-1]
    num_uniform = jnp.where(warmup, num_candidates, num_candidates // 4)
    num_looks = num_uniform + jnp.where(warmup, 0, jnp.minimum(num_candidates // 4, num_occupied))

    def choose(bits: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cell (C,) i32 and the point (C, 3) of each look."""
        drawn = [(bits[:, 0] % jnp.maximum(end[-1], 1).astype(jnp.uint32)).astype(jnp.int32) for end in ends]
        uniform = nth_bit(candidates, ends[0], jnp.where(warmup, rank, drawn[0]))
        cell = jnp.where(rank < num_uniform, uniform, nth_bit(occupied, ends[1], drawn[1]))
        offset = (bits[:, 1:] >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
        offset = offset / cells.resolution * cells.side(cell)[:, None]
        return cell, jnp.stack(cells.centre(cell), axis=-1) + offset

    def look(turn: jax.Array, fresh: jax.Array, *, at_once: int) -> jax.Array:
        chunk = (turn * at_once + jnp.arange(at_once, dtype=jnp.int32)) * num_shares() + share_index()
        rank = (chunk[:, None] * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)).reshape(-1)
        bits = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (_CHUNK, 4), jnp.uint32))(chunk)
        # Chosen once, and not once per axis and level of whatever encodes it.
        cell, position = fusion_barrier(choose, bits.reshape(-1, 4), rank)
        return fresh.at[cell].max(jnp.where(rank < num_looks, density_fn(position), EMPTY))

    def look_around(at_once: int) -> jax.Array:
        size = _CHUNK * at_once * num_shares()
        num_turns = largest((num_looks + size - 1) // size)
        fresh = jnp.full(cells.num_cells, EMPTY, jnp.float32)
        return lax.fori_loop(0, num_turns, functools.partial(look, at_once=at_once), fresh)

    fresh = by_device(cpu=lambda: look_around(1), gpu=lambda: look_around(_CHUNKS_AT_ONCE))
    fresh = largest_of_shares(fresh).reshape(grid.density.shape)
    density = jnp.where(grid.density < 0, EMPTY, jnp.maximum(grid.density * config.occupancy.decay, fresh))
    opaque = density > _density_of(max(config.opaque_thickness, config.occupancy.threshold), config)
    occupied = pack_bits(density > _threshold(density, config))
    return OccupancyGrid(density=density, occupied=occupied, opaque=pack_bits(opaque), bounds=occupied_bounds(occupied))


def _threshold(density: jax.Array, config: MarchConfig) -> jax.Array:
    """(K, 1) f32: the mean of a density (K, G^3) over the cube, EMPTY counted as 0, but no more than configured."""
    share = 8.0 ** np.arange(1 - len(density), 1)  # of the cube; what a smaller cascade covers is EMPTY in a larger one
    means = [jnp.mean(jnp.maximum(cascade, 0)) * part for cascade, part in zip(density, share.tolist(), strict=True)]
    return jnp.minimum(sum(means), _density_of(config.occupancy.threshold, config))


def _density_of(thickness: float, config: MarchConfig) -> np.ndarray:
    """(K, 1) f32: the density per scene unit at which a step has an optical thickness, in each cascade."""
    num_cascades = config.occupancy.num_cascades
    return np.array([[thickness / config.step_size_at(k)] for k in range(num_cascades)], np.float32)
