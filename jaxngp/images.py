"""An image as a function of position: where its pixels lie, and its colour between them.

The image fills the unit square whatever its shape: x to the right and y down, and the centre of pixel (i, j) of
W x H lies at ((i + 0.5) / W, (j + 0.5) / H).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Taps:
    """The pixels that the colour at N positions is made of: C of them each, 1 or 4, and what each counts for."""

    position: jax.Array  # (N, 2) f32 in [0, 1]
    row: jax.Array  # (N, C) i32
    column: jax.Array  # (N, C) i32
    weight: jax.Array  # (N, C) f32, sums to 1


def stratified_positions(bits: jax.Array) -> jax.Array:
    """One position in each rectangle of a grid over the unit square, row by row. bits (N, 2) u32 -> (N, 2) in (0, 1).

    The grid has the largest divisor of N up to its root for rows. So every part of the image gets its share of every
    batch, which is less noise in the gradient than N independent positions.
    """
    num_points = len(bits)
    rows = max(n for n in range(1, int(num_points**0.5) + 1) if num_points % n == 0)
    columns = num_points // rows
    number = jnp.arange(num_points, dtype=jnp.int32)
    corner = jnp.stack([number % columns, number // columns], axis=1).astype(jnp.float32)
    # In the middle of one of 2^k parts of the rectangle: so many that no rounding leads out of it.
    k = max(21 - (columns - 1).bit_length(), 1)
    jitter = ((bits >> (32 - k)).astype(jnp.float32) + 0.5) * 2.0**-k
    return (corner + jitter) / jnp.array([columns, rows], jnp.float32)


def pixel_taps(position: jax.Array, *, width: int, height: int, snap: bool) -> Taps:
    """What the image's colour at positions (N, 2) in [0, 1] is made of.

    With `snap` the position moves to the centre of the pixel it lies in, whose colour it gets. Else it stays, and
    gets the bilinear interpolation of the four nearest centres; outside the outermost ones the image is constant.
    """
    size = jnp.array([width, height], jnp.float32)
    limit = jnp.array([width - 1, height - 1], jnp.int32)
    if snap:
        pixel = jnp.clip(jnp.floor(position * size).astype(jnp.int32), 0, limit)
        centre = (pixel.astype(jnp.float32) + 0.5) / size
        return Taps(centre, pixel[:, 1:], pixel[:, :1], jnp.ones((len(pixel), 1), jnp.float32))
    scaled = jnp.clip(position * size - 0.5, 0, limit.astype(jnp.float32))
    low = jnp.minimum(scaled.astype(jnp.int32), jnp.maximum(limit - 1, 0))
    fraction, high = scaled - low, jnp.minimum(low + 1, limit)
    x, y = (jnp.stack([1 - fraction[:, axis], fraction[:, axis]], axis=1) for axis in (0, 1))
    columns, rows = (jnp.stack([low[:, axis], high[:, axis]], axis=1) for axis in (0, 1))
    num_points = len(position)
    return Taps(
        position,
        jnp.broadcast_to(rows[:, :, None], (num_points, 2, 2)).reshape(num_points, 4),
        jnp.broadcast_to(columns[:, None, :], (num_points, 2, 2)).reshape(num_points, 4),
        (y[:, :, None] * x[:, None, :]).reshape(num_points, 4),
    )


def decode(values: jax.Array) -> jax.Array:
    """Stored values, u8, u16 or f32, as f32 in which 1 is the largest that an integer holds. Any shape."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(jnp.float32)
    return values.astype(jnp.float32) / jnp.iinfo(values.dtype).max


def blend_taps(values: jax.Array, weight: jax.Array) -> jax.Array:
    """The colour at N positions, from the stored values (N, C, 3) of their taps and the weights (N, C). f32 (N, 3)."""
    return jnp.sum(decode(values) * weight[..., None], axis=-2)


def tile_centres(left: jax.Array, top: jax.Array, *, size: int, width: int, height: int) -> jax.Array:
    """Positions (size * size, 2) of the centres of a square of pixels, row by row; beyond the image, of its edge.

    left, top () i32: the column and row of its first pixel.
    """
    number = jnp.arange(size * size, dtype=jnp.int32)
    column = jnp.minimum(left + number % size, width - 1)
    row = jnp.minimum(top + number // size, height - 1)
    xy = jnp.stack([column, row], axis=1).astype(jnp.float32)
    return (xy + 0.5) / jnp.array([width, height], jnp.float32)
