"""What the training views tell before the first step: which cells may hold anything, and which pixels can show it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Cameras, PosedImages, project_axes
from jaxngp.config import OccupancyConfig
from jaxngp.device import fusion_barrier
from jaxngp.occupancy import cell_axes, count_bits, nth_bit, pack_bits

_FIRST_VIEWS = 8
"""Views that look at all cells; the others look only at what these leave open, a fraction of them."""

_CHUNK = 2**16  # cells looked at together: what is computed of them stays in a CPU's cache


@struct.dataclass
class PixelSet:
    """Some of the pixels of V views. A pixel has the number x + W (y + H view).

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
    """The pixels whose flag (V H W,) bool is True."""
    words = pack_bits(jnp.pad(flags, (0, -flags.size % 32)))
    return PixelSet(words=words, end=count_bits(words))


def visual_hull(images: PosedImages, *, config: OccupancyConfig) -> tuple[jax.Array, PixelSet]:
    """`candidate_cells`, and the pixels to draw from.

    Those are all pixels, or, if carving, those whose ray may meet a candidate. The others have no sample and no
    gradient, whatever is learned, so leaving them out changes the objective by nothing but a constant factor.
    """
    candidates = candidate_cells(images, config=config)
    width, height = images.max_size
    everywhere = jnp.ones((len(images.cameras), height, width), bool)
    if not config.carve:
        return candidates, pixel_set(everywhere.reshape(-1))
    # Where few cells are excluded, few pixels would be, and looking for them takes longest.
    worthwhile = 4 * jnp.sum(candidates) < candidates.size
    look = functools.partial(_facing_pixels, resolution=config.resolution)
    flags = lax.cond(worthwhile, look, lambda *_: everywhere, candidates, images)
    return candidates, pixel_set(flags.reshape(-1))


def candidate_cells(images: PosedImages, *, config: OccupancyConfig) -> jax.Array:
    """(G^3,) bool: the cells that at least one camera sees and, if carving, that no silhouette excludes.

    A view excludes a cell whose footprint lies inside its image and has alpha 0 everywhere: light through those
    pixels met nothing, so the cell holds nothing. Views whose pixels are all opaque exclude nothing.
    """
    num_cells, num_views = config.resolution**3, len(images.cameras)
    stride = -(-num_views // _FIRST_VIEWS)
    first = np.arange(num_views) % stride == 0

    cells, none = jnp.arange(num_cells), jnp.zeros(num_cells, bool)
    seen, excluded = _look(images, np.flatnonzero(first), cells, jnp.int32(num_cells), (none, none), config)
    if first.all():
        return seen & ~excluded
    # A cell is settled when it is excluded; without carving, already when it is seen.
    unsettled = ~(excluded if config.carve else seen)
    cells, count = jnp.nonzero(unsettled, size=num_cells, fill_value=0)[0], jnp.sum(unsettled)
    others = _look(images, np.flatnonzero(~first), cells, count, (seen[cells], none), config)
    listed = jnp.arange(num_cells) < count
    candidate = others[0] & ~others[1] & listed
    settled = jnp.zeros(num_cells, bool) if config.carve else seen
    return settled.at[cells].max(candidate)


def _look(
    images: PosedImages,
    views: np.ndarray,
    cells: jax.Array,
    count: jax.Array,
    known: tuple[jax.Array, jax.Array],
    config: OccupancyConfig,
) -> tuple[jax.Array, jax.Array]:
    """Which of the first `count` cells (n,) some views see, and which they exclude, beside what is known of them."""
    size = min(_CHUNK, cells.size)

    def add_view(known: tuple[jax.Array, jax.Array], view: tuple[jax.Array, jax.Array]) -> tuple:
        camera, alpha = view
        area = _summed_area(alpha > 0)

        def add_chunk(i: jax.Array, known: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # The last chunk is pushed back to the end of the list; what it looks at twice stays what it was.
            start = jnp.minimum(i * size, cells.size - size)
            cell, seen, excluded = (_slice(a, start, size) for a in (cells, *known))
            footprint = functools.partial(_footprint, resolution=config.resolution)
            x, y, radius, inside = fusion_barrier(footprint, camera, cell)
            if config.carve:
                excluded = excluded | (inside & _is_empty(area, x, y, radius))
            seen, excluded = (
                lax.dynamic_update_slice(whole, part, (start,))
                for whole, part in zip(known, (seen | inside, excluded), strict=True)
            )
            return seen, excluded

        return lax.fori_loop(0, -(-count // size), add_chunk, known), None

    return lax.scan(
        add_view,
        known,
        (
            images.cameras[views],
            images.rgba[:, 3].reshape(len(images.cameras), images.max_size[1], images.max_size[0])[views],
        ),
    )[0]


def _facing_pixels(candidates: jax.Array, images: PosedImages, *, resolution: int) -> jax.Array:
    """(V, H, W) bool: at least the pixels whose centres some candidate cell (G^3,) covers.

    In each view the pixels in which the cells' centres lie are marked, and the marks are grown by the largest
    radius of a cell, in pixels, that the view shows.
    """
    num_cells = candidates.size
    width, height = images.max_size
    size = min(_CHUNK, num_cells)
    cells = jnp.nonzero(candidates, size=num_cells, fill_value=num_cells)[0].astype(jnp.int32)
    num_chunks = -(-jnp.sum(candidates) // size)

    def mark(camera: Cameras) -> jax.Array:
        def add_chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            marks, largest = carry
            cell = _slice(cells, jnp.minimum(i * size, num_cells - size), size)
            x, y, radius, shown = fusion_barrier(
                functools.partial(_extent, resolution=resolution), camera, jnp.minimum(cell, num_cells - 1)
            )
            shown = shown & (cell < num_cells)
            # A centre outside the image is moved to its edge, which is nearer to all pixels that the cell covers.
            column, row = (jnp.clip(jnp.floor(v), 0, end - 1).astype(jnp.int32) for v, end in ((x, width), (y, height)))
            marks = marks.at[jnp.where(shown, row * width + column, height * width)].set(True, mode="drop")
            return marks, jnp.maximum(largest, jnp.max(jnp.where(shown, radius, 0)))

        start = jnp.zeros(height * width, bool), jnp.float32(0)
        marks, largest = lax.fori_loop(0, num_chunks, add_chunk, start)
        return _grow(marks.reshape(height, width), jnp.minimum(jnp.floor(largest), width + height).astype(jnp.int32))

    return lax.map(mark, images.cameras)


def _slice(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice(array, (start,), (size,))


def _extent(camera: Cameras, cell: jax.Array, *, resolution: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`_footprint`, but the last is whether any part of the cell may be in view, and the radius is right next to it."""
    x, y, radius, _ = _footprint(camera, cell, resolution=resolution)
    depth = project_axes(camera, *cell_axes(cell, resolution=resolution))[2]
    diagonal = 3**0.5 / resolution
    radius = jnp.where(depth > diagonal, radius, camera.size[0] + camera.size[1])  # it may surround the camera
    overlaps = (x >= -radius) & (x <= camera.size[0] + radius) & (y >= -radius) & (y <= camera.size[1] + radius)
    return x, y, radius, (depth > -diagonal) & (overlaps | (depth <= diagonal))


def _footprint(
    camera: Cameras, cell: jax.Array, *, resolution: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of cells: the pixel x, y of the centre, a radius in pixels around all of it, and whether the centre is in view.

    The ball around a cell, of half its diagonal r, looks the larger the further it is off the optical axis:
    |d(x / z)| <= |(1, x / z)| r / (z - r). Half a pixel more is for the pixel's own extent.
    """
    x, y, depth = project_axes(camera, *cell_axes(cell, resolution=resolution))
    inside = (depth > 0) & (x >= 0) & (x < camera.size[0]) & (y >= 0) & (y < camera.size[1])
    slope_x = jnp.abs(x - camera.centre_xy[0]) / camera.focal_xy[0]
    slope_y = jnp.abs(y - camera.centre_xy[1]) / camera.focal_xy[1]
    half_diagonal = 0.5 * 3**0.5 / resolution
    spread = half_diagonal / jnp.maximum(depth - half_diagonal, 1e-6)
    radius = jnp.max(camera.focal_xy) * spread * jnp.sqrt(1 + jnp.maximum(slope_x, slope_y) ** 2) + 0.5
    return x, y, radius, inside


def _summed_area(mask: jax.Array) -> jax.Array:
    """(H, W) bool -> (H + 1, W + 1) i32: how many are set above and to the left."""
    return jnp.pad(jnp.cumsum(jnp.cumsum(mask.astype(jnp.int32), axis=0), axis=1), ((1, 0), (1, 0)))


def _is_empty(area: jax.Array, x: jax.Array, y: jax.Array, radius: jax.Array) -> jax.Array:
    """Whether the squares of half-side radius (N,) around pixels x, y (N,) lie in the image and hold nothing.

    By the image's summed area (H + 1, W + 1): four reads a square, whatever its size.
    """
    height, width = area.shape[0] - 1, area.shape[1] - 1
    left, top = (jnp.floor(v - radius).astype(jnp.int32) for v in (x, y))
    right, bottom = (jnp.ceil(v + radius).astype(jnp.int32) for v in (x, y))
    within = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)

    def count(row: jax.Array, column: jax.Array) -> jax.Array:
        index = jnp.clip(row, 0, height) * (width + 1) + jnp.clip(column, 0, width)
        return area.reshape(-1).at[index].get(mode="promise_in_bounds")

    return within & (count(bottom, right) - count(top, right) - count(bottom, left) + count(top, left) == 0)


def _grow(mask: jax.Array, radius: jax.Array) -> jax.Array:
    """Whether the square of side 2 radius + 1 around each pixel of mask (H, W) holds a set one. radius () i32."""
    area = _summed_area(mask)
    height, width = mask.shape
    row, column = jnp.arange(height), jnp.arange(width)
    top, left = jnp.maximum(row - radius, 0), jnp.maximum(column - radius, 0)
    bottom, right = jnp.minimum(row + radius + 1, height), jnp.minimum(column + radius + 1, width)
    strips = area[bottom] - area[top]
    return strips[:, right] - strips[:, left] > 0
