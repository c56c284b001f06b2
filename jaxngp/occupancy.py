"""The occupancy grid: which cells of the unit cube may hold density (paper appendix E.2).

A cell (x, y, z) has the number x + G (y + G z); bit i % 32 of word i // 32 says whether cell i is occupied.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.config import MarchConfig
from jaxngp.device import fusion_barrier

DensityFn = Callable[[jax.Array], jax.Array]
"""position (N, 3) in scene units -> density (N,) per scene unit."""

EMPTY = -1.0
"""The stored density of a cell that stays empty: no camera sees it, or a silhouette excludes it."""

_CHUNK = 2**15  # cells whose density is evaluated at once: the network's activations stay in a CPU's cache


@struct.dataclass
class OccupancyGrid:
    """density (G^3,) f32 per scene unit, or EMPTY; occupied and opaque (G^3 / 32,) u32, one bit a cell.

    Opaque cells are a guess at where a ray ends, for training only; an opaque cell is occupied. bounds (2, 3) f32:
    the lower and the upper corner of a box that holds all occupied cells.
    """

    density: jax.Array
    occupied: jax.Array
    opaque: jax.Array
    bounds: jax.Array

    @property
    def resolution(self) -> int:
        return round(self.density.shape[0] ** (1 / 3))


def pack_bits(flags: jax.Array) -> jax.Array:
    """(..., 32 n) bool -> (..., n) u32, the first flag in the lowest bit."""
    words = flags.reshape(*flags.shape[:-1], -1, 32).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def even_bits(words: jax.Array) -> jax.Array:
    """The 16 bits at even places of u32 words (...), moved together into the lower half."""
    words = words & np.uint32(0x55555555)
    for shift, mask in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        words = (words | (words >> shift)) & np.uint32(mask)
    return words


def interleave(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Two sets of bits (n,) u32 as one of pairs, (2 n,) u32: bit i of the first in place 2 i, of the second in 2 i + 1.

    `even_bits` takes them apart again.
    """
    halves = jnp.stack([words >> shift & 0xFFFF for shift in (0, 16) for words in (even, odd)], axis=1)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        halves = (halves | (halves << shift)) & np.uint32(mask)
    return (halves[:, 0::2] | (halves[:, 1::2] << 1)).reshape(-1)


def nth_set_bit(word: jax.Array, n: jax.Array) -> jax.Array:
    """The place (0 to 31) of the n-th set bit, counted from 0, of a u32 word that has more than n of them."""
    place = jnp.zeros_like(word)
    n = n.astype(jnp.uint32)
    for width in (16, 8, 4, 2, 1):
        below = lax.population_count(word & np.uint32((1 << width) - 1))
        above = n >= below
        n = jnp.where(above, n - below, n)
        place = place + jnp.where(above, np.uint32(width), np.uint32(0))
        word = jnp.where(above, word >> width, word)
    return place


def init_occupancy(candidates: jax.Array) -> OccupancyGrid:
    """A grid in which every candidate cell is occupied and every other stays empty. candidates (G^3,) bool."""
    occupied = pack_bits(candidates)
    return OccupancyGrid(
        density=jnp.where(candidates, 0.0, EMPTY),
        occupied=occupied,
        opaque=jnp.zeros_like(occupied),
        bounds=occupied_bounds(occupied),
    )


def occupied_bounds(words: jax.Array) -> jax.Array:
    """The smallest box (2, 3) around the cells whose bits are set in words (G^3 / 32,) u32; of no size if none is."""
    resolution = round((words.shape[0] * 32) ** (1 / 3))
    layers = words.reshape(resolution, resolution, resolution // 32)  # z, y, x / 32
    columns = lax.reduce(layers, np.uint32(0), lax.bitwise_or, (0, 1))
    in_x = ((columns[:, None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(-1) != 0
    bounds = []
    for flags in (in_x, jnp.any(layers != 0, axis=(0, 2)), jnp.any(layers != 0, axis=(1, 2))):
        low, high = jnp.argmax(flags), resolution - jnp.argmax(flags[::-1])
        bounds.append(jnp.stack([low, jnp.where(jnp.any(flags), high, low)]) / resolution)
    return jnp.stack(bounds, axis=1).astype(jnp.float32)


def is_occupied(grid: OccupancyGrid, position: jax.Array) -> jax.Array:
    """Whether the cells that hold the points are occupied. position (..., 3) in [0, 1] -> (...) bool."""
    x, y, z = (position[..., axis] for axis in range(3))
    return bit_at(grid.occupied, x, y, z, resolution=grid.resolution) != 0


def bit_at(words: jax.Array, x: jax.Array, y: jax.Array, z: jax.Array, *, resolution: int) -> jax.Array:
    """The bits (...) u32, 0 or 1, of the cells that hold the points; the nearest cell for a point outside the cube.

    One array (...) per axis spares (..., 3) temporaries.
    """
    return _bits_at(words, x, y, z, resolution=resolution, width=1)


def pair_at(pairs: jax.Array, x: jax.Array, y: jax.Array, z: jax.Array, *, resolution: int) -> jax.Array:
    """`bit_at` for words of pairs as `interleave` makes them: both bits (...) u32, the first set's the lower."""
    return _bits_at(pairs, x, y, z, resolution=resolution, width=2)


def _bits_at(words: jax.Array, x: jax.Array, y: jax.Array, z: jax.Array, *, resolution: int, width: int) -> jax.Array:
    column, row, layer = cells_at(x, y, z, resolution=resolution)
    shift = 5 - (width - 1)  # 2^shift cells to a word
    # Rows of cells are whole words, so the place in a word depends on the column alone: of the cell's number, used
    # for both, XLA:GPU would make an array in memory.
    word = (column >> shift) + (resolution >> shift) * (row + resolution * layer)
    place = width * (column & (2**shift - 1))
    return (words.at[word].get(mode="promise_in_bounds") >> place.astype(jnp.uint32)) & np.uint32(2**width - 1)


def cells_at(x: jax.Array, y: jax.Array, z: jax.Array, *, resolution: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Column, row and layer (...) i32 of the cells that hold the points, or are nearest to them."""
    column, row, layer = (jnp.clip((p * resolution).astype(jnp.int32), 0, resolution - 1) for p in (x, y, z))
    return column, row, layer


def cell_centre(cell: jax.Array, *, resolution: int) -> jax.Array:
    """(...) i32 cell numbers -> (..., 3) scene units."""
    return jnp.stack(cell_axes(cell, resolution=resolution), axis=-1)


def cell_axes(cell: jax.Array, *, resolution: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cell_centre` as one array (...) per axis."""
    x, y, z = cell % resolution, cell // resolution % resolution, cell // resolution**2
    return (x + 0.5) / resolution, (y + 0.5) / resolution, (z + 0.5) / resolution


def count_bits(words: jax.Array) -> jax.Array:
    """(n,) u32 -> (n,) i32: the number of bits that are set in each word and all before it."""
    return jnp.cumsum(lax.population_count(words).astype(jnp.int32))


def nth_bit(words: jax.Array, end: jax.Array, choice: jax.Array) -> jax.Array:
    """The numbers of the set bits of given ranks. choice (M,) i32 in [0, number of set bits) -> (M,) i32.

    words (n,) u32 and end = count_bits(words). With no bit set there is nothing to choose; the result is then a valid
    number that means nothing.
    """
    found = jnp.searchsorted(end, choice, side="right", method="scan_unrolled")
    word = jnp.minimum(found, words.shape[0] - 1).astype(jnp.int32)
    count = lax.population_count(words[word]).astype(jnp.int32)
    place = nth_set_bit(words[word], jnp.clip(choice - (end[word] - count), 0, 31))
    return jnp.clip(word * 32 + place.astype(jnp.int32), 0, words.shape[0] * 32 - 1)


def update_occupancy(
    grid: OccupancyGrid, key: jax.Array, density_fn: DensityFn, warmup: jax.Array, *, config: MarchConfig
) -> OccupancyGrid:
    """One refresh: decay every cell, look at some of them at a random point each, keep the larger density.

    While `warmup` () bool is True every candidate cell is looked at; afterwards a quarter as many drawn from all
    candidates and as many from the occupied ones. A cell is occupied above min(mean density, threshold), so that of
    a density which is the same everywhere and below the threshold, none is.
    """
    candidates = pack_bits(grid.density >= 0)
    ends = count_bits(candidates), count_bits(grid.occupied)
    num_candidates, num_occupied = ends[0][-1], ends[1][-1]
    num_uniform = jnp.where(warmup, num_candidates, num_candidates // 4)
    num_looks = num_uniform + jnp.where(warmup, 0, jnp.minimum(num_candidates // 4, num_occupied))

    def choose(bits: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cell (C,) i32 and the point (C, 3) of each look."""
        drawn = [(bits[:, 0] % jnp.maximum(end[-1], 1).astype(jnp.uint32)).astype(jnp.int32) for end in ends]
        uniform = nth_bit(candidates, ends[0], jnp.where(warmup, rank, drawn[0]))
        cell = jnp.where(rank < num_uniform, uniform, nth_bit(grid.occupied, ends[1], drawn[1]))
        offset = (bits[:, 1:] >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
        return cell, cell_centre(cell, resolution=grid.resolution) + offset / grid.resolution

    def look(chunk: jax.Array, fresh: jax.Array) -> jax.Array:
        rank = chunk * _CHUNK + jnp.arange(_CHUNK)
        bits = jax.random.bits(jax.random.fold_in(key, chunk), (_CHUNK, 4))
        cell, position = fusion_barrier(
            choose, bits, rank
        )  # once, and not once per axis and level of whatever encodes it
        return fresh.at[cell].max(jnp.where(rank < num_looks, density_fn(position), EMPTY))

    num_chunks = (num_looks + _CHUNK - 1) // _CHUNK
    fresh = lax.fori_loop(0, num_chunks, look, jnp.full_like(grid.density, EMPTY))
    density = jnp.where(grid.density < 0, EMPTY, jnp.maximum(grid.density * config.occupancy.decay, fresh))
    opaque = density > max(config.opaque_thickness, config.occupancy.threshold) / config.step_size
    occupied = pack_bits(density > _threshold(density, config))
    return OccupancyGrid(density=density, occupied=occupied, opaque=pack_bits(opaque), bounds=occupied_bounds(occupied))


def _threshold(density: jax.Array, config: MarchConfig) -> jax.Array:
    mean = jnp.mean(jnp.maximum(density, 0))
    return jnp.minimum(mean, config.occupancy.threshold / config.step_size)
