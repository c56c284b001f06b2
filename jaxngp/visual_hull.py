"""The visual hull: which cells may hold anything, by the views' silhouettes, and which pixels can show those cells."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.bitsets import count_bits, nth_bit, pack_bits
from jaxngp.cameras import Cameras, Pixels, project_axes
from jaxngp.config import OccupancyConfig
from jaxngp.device import any_share, fusion_barrier, largest, num_shares, unfolded_true
from jaxngp.occupancy import Cells

_FIRST_VIEWS = 8
"""Views that look at all cells; the others look only at what these leave open, a fraction of them."""

_CHUNK = 2**16  # cells looked at together: what is computed of them stays in a CPU's cache


class Silhouettes(Pixels, Protocol):
    """What is read of views, such as `PosedImages`: their cameras, alpha and masks."""

    @property
    def alpha(self) -> jax.Array | None: ...  # (P,) u8; None where all pixels are opaque
    @property
    def keep(self) -> jax.Array | None: ...  # (P,) bool, whether a pixel takes part; None where all do


@struct.dataclass
class PixelSet:
    """Some of the P pixels of a set of views, by their numbers in `PosedImages`.

    words (n,) u32, one bit a pixel, filled up with zeros; end (n,) i32, how many are set in each word and all before.
    """

    words: jax.Array
    end: jax.Array

    @property
    def size(self) -> jax.Array:
        return self.end[-1]

    def nth(self, rank: jax.Array) -> jax.Array:
        """The numbers (...) i32 of the pixels of given ranks (...) in [0, size)."""
        return nth_bit(self.words, self.end, rank)


def pixel_set(flags: jax.Array) -> PixelSet:
    """The pixels whose flag (P,) bool is True."""
    words = pack_bits(jnp.pad(flags, (0, -flags.size % 32)))
    return PixelSet(words=words, end=count_bits(words))


def visual_hull(images: Silhouettes, *, config: OccupancyConfig) -> tuple[jax.Array, PixelSet]:
    """`candidate_cells`, and the pixels to draw from.

    Those are all pixels, or, with `config.carve`, those whose ray may meet a candidate. The others have no sample and
    no gradient, whatever the field, so leaving them out changes the objective by nothing but a constant factor. Masked
    pixels are never among them.
    """
    candidates = candidate_cells(images, config=config)
    everywhere = taking_part(images)
    if not config.carve:
        return candidates, set_of_all(everywhere, images)
    # Where little of the cube is excluded, few pixels would be, and looking for them takes longest. Counted in cells of
    # the outermost cascade, of which those of the next one inwards are an eighth each.
    counts = jnp.sum(candidates, axis=1, dtype=jnp.int32)
    volume = jnp.sum(counts * np.float32(8.0) ** np.arange(1 - len(counts), 1, dtype=np.float32))
    worthwhile = 4 * volume < candidates.shape[1]
    look = functools.partial(_facing_pixels, cells=_cells(config))
    any_worthwhile = largest(worthwhile.astype(jnp.int32)) > 0
    flags = lax.cond(any_worthwhile, look, lambda *_: everywhere, candidates, images) | ~worthwhile
    return candidates, set_of_all(flags if images.keep is None else flags & images.keep, images)


def taking_part(images: Silhouettes) -> jax.Array:
    """(P,) bool: the pixels that no mask excludes; data also without masks, for XLA computes the sums of a constant
    while it compiles, which takes it a minute.
    """
    return jnp.full(images.num_pixels, unfolded_true(images.cameras.c2w)) if images.keep is None else images.keep


def set_of_all(flags: jax.Array, images: Any) -> PixelSet:
    """The set of flags (P,); where devices share the views and each has those of its own, of all pixels of all."""
    if num_shares() == 1:
        return pixel_set(flags)
    number = jnp.arange(flags.size, dtype=jnp.int32)
    place = jnp.where(number < images.count, images.first + number, images.num_pixels_of_all)
    return pixel_set(any_share(jnp.zeros(images.num_pixels_of_all, bool).at[place].set(flags, mode="drop")))


def candidate_cells(images: Silhouettes, *, config: OccupancyConfig) -> jax.Array:
    """(K, G^3) bool: the cells that at least one camera sees and, with `config.carve`, that no silhouette excludes.

    A view excludes a cell whose footprint lies inside its image and has alpha 0 everywhere: light through those
    pixels met nothing, so the cell holds nothing. Views whose pixels are all opaque exclude nothing. A masked pixel is
    as if it lay outside the image: it excludes no cell, and a cell whose footprint has no other is not seen.
    """
    cells, num_views = _cells(config), len(images.cameras)
    stride = -(-num_views // _FIRST_VIEWS)
    first = np.arange(num_views) % stride == 0

    cell, none = jnp.arange(cells.num_cells, dtype=jnp.int32), jnp.zeros(cells.num_cells, bool)
    seen, excluded = _look(images, np.flatnonzero(first), cell, jnp.int32(cells.num_cells), (none, none), config)
    if not first.all():
        # A cell is settled when it is excluded; without `carve`, already when it is seen.
        unsettled = ~(excluded if config.carve else seen)
        cell = jnp.nonzero(unsettled, size=cells.num_cells, fill_value=0)[0].astype(jnp.int32)
        count = jnp.sum(unsettled, dtype=jnp.int32)
        others = _look(images, np.flatnonzero(~first), cell, count, (seen[cell], none), config)
        listed = jnp.arange(cells.num_cells, dtype=jnp.int32) < count
        seen, excluded = (
            known.at[cell].max(more & listed) for known, more in zip((seen, excluded), others, strict=True)
        )
    found = any_share(seen) & ~any_share(excluded)  # each device looks through its own views
    found = found.reshape(cells.num_cascades, -1)
    return found if cells.num_cascades == 1 else found & cells.readable()


def _cells(config: OccupancyConfig) -> Cells:
    return Cells(config.resolution, config.num_cascades)


def _look(
    images: Silhouettes,
    views: np.ndarray,
    cells: jax.Array,
    count: jax.Array,
    known: tuple[jax.Array, jax.Array],
    config: OccupancyConfig,
) -> tuple[jax.Array, jax.Array]:
    """Which of the first `count` cells (n,) some views see, and which they exclude, beside those already known."""
    size = min(_CHUNK, cells.size)
    num_chunks = largest(-(-count // size))

    def add_view(known: tuple[jax.Array, jax.Array], view: tuple[Cameras, jax.Array]) -> tuple:
        camera, offset = view
        shown, kept = _silhouette(images, camera, offset)

        def add_chunk(i: jax.Array, known: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # The last chunk is pushed back to the end of the list; what it looks at twice stays what it was.
            start = jnp.minimum(i * size, cells.size - size)
            cell, seen, excluded = (_slice(a, start, size) for a in (cells, *known))
            x, y, radius, inside = fusion_barrier(functools.partial(_footprint, cells=_cells(config)), camera, cell)
            if config.carve and shown is not None:
                excluded = excluded | (inside & _is_empty(shown, camera, x, y, radius))
            if kept is not None:
                inside = inside & _meets(kept, camera, x, y, radius)
            seen, excluded = (
                lax.dynamic_update_slice(whole, part, (start,))
                for whole, part in zip(known, (seen | inside, excluded), strict=True)
            )
            return seen, excluded

        return lax.fori_loop(0, num_chunks, add_chunk, known), None

    return lax.scan(add_view, known, (images.cameras[views], images.offset[views]))[0]


def _facing_pixels(candidates: jax.Array, images: Silhouettes, *, cells: Cells) -> jax.Array:
    """(P,) bool: at least the pixels whose centres some candidate cell (K, G^3) covers.

    In each view the pixels in which the cells' centres lie are marked, and the marks are grown by the largest
    radius of a cell, in pixels, that the view shows.
    """
    num_cells, (width, height) = candidates.size, images.max_size
    size = min(_CHUNK, num_cells)
    cell_list = jnp.nonzero(candidates.reshape(-1), size=num_cells, fill_value=num_cells)[0].astype(jnp.int32)
    num_chunks = largest(-(-jnp.sum(candidates, dtype=jnp.int32) // size))

    def mark(flags: jax.Array, view: tuple[Cameras, jax.Array]) -> tuple[jax.Array, None]:
        camera, offset = view
        last_x, last_y = camera.size[0] - 1, camera.size[1] - 1

        def add_chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            marks, radius_of_all = carry
            cell = _slice(cell_list, jnp.minimum(i * size, num_cells - size), size)
            x, y, radius, shown = fusion_barrier(
                functools.partial(_extent, cells=cells), camera, jnp.minimum(cell, num_cells - 1)
            )
            shown = shown & (cell < num_cells)
            # A centre outside the image is moved to its edge, which is nearer to all pixels that the cell covers.
            column, row = (
                jnp.clip(jnp.floor(v), 0, last.astype(jnp.float32)).astype(jnp.int32)
                for v, last in ((x, last_x), (y, last_y))
            )
            marks = marks.at[jnp.where(shown, row * width + column, height * width)].set(True, mode="drop")
            return marks, jnp.maximum(radius_of_all, jnp.max(jnp.where(shown, radius, 0)))

        start = jnp.zeros(height * width, bool), jnp.float32(0)
        marks, radius = lax.fori_loop(0, num_chunks, add_chunk, start)
        grown = _grow(marks.reshape(height, width), jnp.minimum(jnp.floor(radius), width + height).astype(jnp.int32))
        return _write(flags, grown, images, camera, offset), None

    flags = jnp.zeros(images.num_pixels, bool)
    return lax.scan(mark, flags, (images.cameras, images.offset))[0]


def _silhouette(images: Silhouettes, camera: Cameras, offset: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """Of one view, the summed areas of the pixels that are not known to be empty, and of those that take part.

    None where those are all pixels.
    """
    if images.keep is None:
        if images.alpha is None:
            return None, None
        return _summed_area(_read(images.alpha, images, camera, offset) > 0), None
    keep = _read(images.keep, images, camera, offset)
    shown = None if images.alpha is None else _summed_area((_read(images.alpha, images, camera, offset) > 0) | ~keep)
    return shown, _summed_area(keep)


# Views of any size, one after the other, each in an array of the largest size.


def _read(pixels: jax.Array, images: Silhouettes, camera: Cameras, offset: jax.Array) -> jax.Array:
    """The values (P,) of one view's pixels as (max H, max W); 0 outside the view."""
    width, height = images.max_size
    if _equal_sizes(images):
        return _slice(pixels, offset, height * width).reshape(height, width)
    return pixels.at[_pixel_numbers(images, camera, offset)].get(mode="fill", fill_value=0)


def _write(pixels: jax.Array, values: jax.Array, images: Silhouettes, camera: Cameras, offset: jax.Array) -> jax.Array:
    """The values (P,), with those of one view's pixels set to `values` (max H, max W)."""
    if _equal_sizes(images):
        return lax.dynamic_update_slice(pixels, values.reshape(-1), (offset,))
    return pixels.at[_pixel_numbers(images, camera, offset)].set(values, mode="drop")


def _pixel_numbers(images: Silhouettes, camera: Cameras, offset: jax.Array) -> jax.Array:
    """(max H, max W) i32: the numbers of a view's pixels, and P outside it."""
    width, height = images.max_size
    x, y = jnp.arange(width, dtype=jnp.int32), jnp.arange(height, dtype=jnp.int32)[:, None]
    inside = (x < camera.size[0]) & (y < camera.size[1])
    return jnp.where(inside, offset + x + camera.size[0] * y, images.num_pixels)


def _equal_sizes(images: Silhouettes) -> bool:
    """Whether every view has the largest size: then its pixels are a slice."""
    return images.num_pixels == len(images.cameras) * images.max_size[0] * images.max_size[1]


def _slice(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice(array, (start,), (size,))


# Footprints of cells.


def _extent(camera: Cameras, cell: jax.Array, *, cells: Cells) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`_footprint`, but the last is whether any part of the cell may be in view, and the radius is right next to it."""
    x, y, radius, _ = _footprint(camera, cell, cells=cells)
    width, height = (camera.size[axis].astype(jnp.float32) for axis in range(2))
    depth = project_axes(camera, *cells.centre(cell))[2]
    diagonal = 3**0.5 / cells.resolution * cells.side(cell)
    radius = jnp.where(depth > diagonal, radius, width + height)  # it may surround the camera
    overlaps = (x >= -radius) & (x <= width + radius) & (y >= -radius) & (y <= height + radius)
    return x, y, radius, (depth > -diagonal) & (overlaps | (depth <= diagonal))


def _footprint(camera: Cameras, cell: jax.Array, *, cells: Cells) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of cells: the pixel x, y of the centre, a radius in pixels around all of it, and whether the centre is in view.

    The ball around a cell, of half its diagonal r, looks the larger the further it is off the optical axis:
    |d(x / z)| <= |(1, x / z)| r / (z - r). Half a pixel more is for the pixel's own extent. With a lens the angle at
    which the ball is seen counts, times how far the lens moves places for an angle.
    """
    x, y, depth = project_axes(camera, *cells.centre(cell))
    width, height = (camera.size[axis].astype(jnp.float32) for axis in range(2))
    inside = (depth > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    half_diagonal = 0.5 * 3**0.5 / cells.resolution * cells.side(cell)
    if camera.lens is not None:
        angle = jnp.arcsin(jnp.minimum(half_diagonal / jnp.maximum(jnp.abs(depth), 1e-6), 1))
        return x, y, jnp.max(camera.focal_xy) * camera.lens.stretch * angle + 0.5, inside
    slope_x = jnp.abs(x - camera.centre_xy[0]) / camera.focal_xy[0]
    slope_y = jnp.abs(y - camera.centre_xy[1]) / camera.focal_xy[1]
    spread = half_diagonal / jnp.maximum(depth - half_diagonal, 1e-6)
    radius = jnp.max(camera.focal_xy) * spread * jnp.sqrt(1 + jnp.maximum(slope_x, slope_y) ** 2) + 0.5
    return x, y, radius, inside


def _summed_area(mask: jax.Array) -> jax.Array:
    """(H, W) bool -> (H + 1, W + 1) i32: how many are set above and to the left."""
    rows = jnp.cumsum(mask.astype(jnp.int32), axis=0, dtype=jnp.int32)
    return jnp.pad(jnp.cumsum(rows, axis=1, dtype=jnp.int32), ((1, 0), (1, 0)))


def _is_empty(area: jax.Array, camera: Cameras, x: jax.Array, y: jax.Array, radius: jax.Array) -> jax.Array:
    """Whether the squares of half-side radius (N,) around pixels x, y (N,) lie in the image and hold nothing.

    By the summed area (max H + 1, max W + 1) of the view: four reads a square, whatever its size.
    """
    left, top = (jnp.floor(v - radius).astype(jnp.int32) for v in (x, y))
    right, bottom = (jnp.ceil(v + radius).astype(jnp.int32) for v in (x, y))
    within = (left >= 0) & (top >= 0) & (right <= camera.size[0]) & (bottom <= camera.size[1])
    return within & (_count(area, left, top, right, bottom) == 0)


def _meets(area: jax.Array, camera: Cameras, x: jax.Array, y: jax.Array, radius: jax.Array) -> jax.Array:
    """Whether the part in the image of the squares of half-side radius (N,) around x, y (N,) holds anything."""
    left, top = (jnp.maximum(jnp.floor(v - radius).astype(jnp.int32), 0) for v in (x, y))
    right, bottom = (jnp.ceil(v + radius).astype(jnp.int32) for v in (x, y))
    right, bottom = jnp.minimum(right, camera.size[0]), jnp.minimum(bottom, camera.size[1])
    return _count(area, left, top, right, bottom) > 0


def _count(area: jax.Array, left: jax.Array, top: jax.Array, right: jax.Array, bottom: jax.Array) -> jax.Array:
    """How many are set in rectangles (N,), by the summed area (H + 1, W + 1), to which they are clipped."""
    height, width = area.shape

    def count(row: jax.Array, column: jax.Array) -> jax.Array:
        index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
        return area.reshape(-1).at[index].get(mode="promise_in_bounds")

    return count(bottom, right) - count(top, right) - count(bottom, left) + count(top, left)


def _grow(mask: jax.Array, radius: jax.Array) -> jax.Array:
    """Whether the square of side 2 radius + 1 around each pixel of mask (H, W) holds a set one. radius () i32."""
    area = _summed_area(mask)
    height, width = mask.shape
    row, column = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    top, left = jnp.maximum(row - radius, 0), jnp.maximum(column - radius, 0)
    bottom, right = jnp.minimum(row + radius + 1, height), jnp.minimum(column + radius + 1, width)
    strips = area[bottom] - area[top]
    return strips[:, right] - strips[:, left] > 0
