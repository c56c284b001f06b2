"""The occupancy grid: which cells of the unit cube may hold density (paper appendix E.2).

A cell (x, y, z) has the number x + G (y + G z); bit i % 32 of word i // 32 says whether cell i is occupied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Camera, PosedImages, project
from jaxngp.config import MarchConfig, OccupancyConfig
from jaxngp.fusion import walled

DensityFn = Callable[[jax.Array], jax.Array]
"""position (N, 3) in scene units -> density (N,) per scene unit."""

EMPTY = -1.0
"""The stored density of a cell that stays empty: no camera sees it, or a silhouette excludes it."""

_CHUNK = 2**15  # cells whose density is evaluated at once: the network's activations stay in a CPU's cache


@struct.dataclass
class OccupancyGrid:
    """density (G^3,) f32 per scene unit, or EMPTY; occupied and opaque (G^3 / 32,) u32, one bit a cell.

    Opaque cells are a guess at where a ray ends, for training only; an opaque cell is occupied.
    """

    density: jax.Array
    occupied: jax.Array
    opaque: jax.Array

    @property
    def resolution(self) -> int:
        return round(self.density.shape[0] ** (1 / 3))


def pack_bits(flags: jax.Array) -> jax.Array:
    """(..., 32 n) bool -> (..., n) u32, the first flag in the lowest bit."""
    words = flags.reshape(*flags.shape[:-1], -1, 32).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


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
    return OccupancyGrid(density=jnp.where(candidates, 0.0, EMPTY), occupied=occupied, opaque=jnp.zeros_like(occupied))


def is_occupied(grid: OccupancyGrid, position: jax.Array) -> jax.Array:
    """Whether the cells that hold the points are occupied. position (..., 3) in [0, 1] -> (...) bool."""
    x, y, z = (position[..., axis] for axis in range(3))
    return bit_at(grid.occupied, x, y, z, resolution=grid.resolution)


def bit_at(words: jax.Array, x: jax.Array, y: jax.Array, z: jax.Array, *, resolution: int) -> jax.Array:
    """The bits, (...) bool, of the cells that hold the points; one array (...) per axis spares (..., 3) temporaries."""
    column, row, layer = (jnp.clip((p * resolution).astype(jnp.int32), 0, resolution - 1) for p in (x, y, z))
    cell = column + resolution * (row + resolution * layer)
    word = words.at[cell >> 5].get(mode="promise_in_bounds")
    return (word >> (cell & 31).astype(jnp.uint32)) & 1 != 0


def cell_centre(cell: jax.Array, *, resolution: int) -> jax.Array:
    """(...) i32 cell numbers -> (..., 3) scene units."""
    return jnp.stack(cell_axes(cell, resolution=resolution), axis=-1)


def cell_axes(cell: jax.Array, *, resolution: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cell_centre` as one array (...) per axis."""
    x, y, z = cell % resolution, cell // resolution % resolution, cell // resolution**2
    return (x + 0.5) / resolution, (y + 0.5) / resolution, (z + 0.5) / resolution


def candidate_cells(images: PosedImages, *, config: OccupancyConfig) -> jax.Array:
    """(G^3,) bool: the cells that at least one camera sees and, if carving, that no silhouette excludes.

    A view excludes a cell whose footprint lies inside its image and has alpha 0 everywhere: light through those
    pixels met nothing, so the cell holds nothing. Views whose pixels are all opaque exclude nothing.
    """
    camera, resolution = images.camera, config.resolution
    axes = cell_axes(jnp.arange(resolution**3), resolution=resolution)

    def add_view(carry: tuple[jax.Array, jax.Array], view: tuple[jax.Array, jax.Array]) -> tuple:
        seen, excluded = carry
        c2w, alpha = view
        footprint = functools.partial(_footprint, resolution=resolution)
        pixel_x, pixel_y, radius, inside = walled(footprint, c2w, camera, axes)
        empty = inside & _is_empty(alpha > 0, pixel_x, pixel_y, radius) if config.carve else excluded
        return (seen | inside, excluded | empty), None

    none = jnp.zeros(resolution**3, bool)
    (seen, excluded), _ = lax.scan(add_view, (none, none), (images.c2w, images.rgba[..., 3]))
    return seen & ~excluded


def _footprint(
    c2w: jax.Array, camera: Camera, axes: tuple[jax.Array, jax.Array, jax.Array], *, resolution: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of cells: the pixel x, y of the centre, a radius in pixels around all of it, and whether the centre is in view.

    The ball around a cell, of half its diagonal r, looks the larger the further it is off the optical axis:
    |d(x / z)| <= |(1, x / z)| r / (z - r). Half a pixel more is for the pixel's own extent.
    """
    x, y, depth = project(camera, c2w, *axes)
    inside = (depth > 0) & (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)
    slope_x = jnp.abs(x - camera.centre_xy[0]) / camera.focal_xy[0]
    slope_y = jnp.abs(y - camera.centre_xy[1]) / camera.focal_xy[1]
    half_diagonal = 0.5 * 3**0.5 / resolution
    spread = half_diagonal / jnp.maximum(depth - half_diagonal, 1e-6)
    radius = jnp.max(camera.focal_xy) * spread * jnp.sqrt(1 + jnp.maximum(slope_x, slope_y) ** 2) + 0.5
    return x, y, radius, inside


def _is_empty(mask: jax.Array, x: jax.Array, y: jax.Array, radius: jax.Array) -> jax.Array:
    """Whether the squares of half-side radius (N,) around pixels x, y (N,) lie in the image and `mask` is False there.

    mask (H, W). By a summed-area table: four reads a square, whatever its size.
    """
    height, width = mask.shape
    area = jnp.pad(jnp.cumsum(jnp.cumsum(mask.astype(jnp.int32), axis=0), axis=1), ((1, 0), (1, 0)))
    left, top = (jnp.floor(v - radius).astype(jnp.int32) for v in (x, y))
    right, bottom = (jnp.ceil(v + radius).astype(jnp.int32) for v in (x, y))
    within = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)

    def count(row: jax.Array, column: jax.Array) -> jax.Array:
        index = jnp.clip(row, 0, height) * (width + 1) + jnp.clip(column, 0, width)
        return area.reshape(-1).at[index].get(mode="promise_in_bounds")

    return within & (count(bottom, right) - count(top, right) - count(bottom, left) + count(top, left) == 0)


def sample_cells(words: jax.Array, choice: jax.Array) -> jax.Array:
    """The numbers of the set bits of given ranks. words (n,) u32, choice (M,) i32 in [0, number of set bits) -> (M,).

    With no bit set there is nothing to choose; the result is then a valid cell that means nothing.
    """
    end = jnp.cumsum(lax.population_count(words).astype(jnp.int32))
    word = jnp.minimum(jnp.searchsorted(end, choice, side="right"), words.shape[0] - 1).astype(jnp.int32)
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
    num_candidates = jnp.sum(lax.population_count(candidates), dtype=jnp.int32)
    num_occupied = jnp.sum(lax.population_count(grid.occupied), dtype=jnp.int32)
    num_uniform = jnp.where(warmup, num_candidates, num_candidates // 4)
    num_looks = num_uniform + jnp.where(warmup, 0, jnp.minimum(num_candidates // 4, num_occupied))

    def look(chunk: jax.Array, fresh: jax.Array) -> jax.Array:
        cell_key, uniform_key, point_key = jax.random.split(jax.random.fold_in(key, chunk), 3)
        rank = chunk * _CHUNK + jnp.arange(_CHUNK)
        drawn = jax.random.randint(cell_key, rank.shape, 0, jnp.maximum(num_candidates, 1))
        uniform = sample_cells(candidates, jnp.where(warmup, rank, drawn))
        drawn = jax.random.randint(uniform_key, rank.shape, 0, jnp.maximum(num_occupied, 1))
        cell = jnp.where(rank < num_uniform, uniform, sample_cells(grid.occupied, drawn))
        offset = (jax.random.uniform(point_key, (_CHUNK, 3)) - 0.5) / grid.resolution
        density = density_fn(cell_centre(cell, resolution=grid.resolution) + offset)
        return fresh.at[cell].max(jnp.where(rank < num_looks, density, EMPTY))

    num_chunks = (num_looks + _CHUNK - 1) // _CHUNK
    fresh = lax.fori_loop(0, num_chunks, look, jnp.full_like(grid.density, EMPTY))
    density = jnp.where(grid.density < 0, EMPTY, jnp.maximum(grid.density * config.occupancy.decay, fresh))
    opaque = density > max(config.opaque_thickness, config.occupancy.threshold) / config.step_size
    return OccupancyGrid(
        density=density, occupied=pack_bits(density > _threshold(density, config)), opaque=pack_bits(opaque)
    )


def _threshold(density: jax.Array, config: MarchConfig) -> jax.Array:
    mean = jnp.mean(jnp.maximum(density, 0))
    return jnp.minimum(mean, config.occupancy.threshold / config.step_size)
