"""Encodings of positions and directions: multiresolution hash (paper section 3), spherical harmonics, frequencies."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from jaxngp.config import HashGridConfig
from jaxngp.fusion import walled
from jaxngp.hashing import corner_offsets, level_offsets, level_resolutions, level_sizes, num_vertices, vertex_row


def init_table(key: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The rows of all levels, one after the other: (rows, F) f32, uniform in [-init_scale, init_scale]."""
    shape = (level_offsets(grid)[-1], grid.num_features)
    return jax.random.uniform(key, shape, jnp.float32, -grid.init_scale, grid.init_scale)


def multilinear_weights(fraction: jax.Array) -> jax.Array:
    """Weights of the 2^D corners of a cell. fraction (D,) in [0, 1] -> (2^D,), in the order of `corner_offsets`."""
    return jnp.stack([_corner_weight(fraction, offset) for offset in corner_offsets(len(fraction))])


def hash_encode(table: jax.Array, position: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The multiresolution hash encoding (paper section 3).

    table (rows, F): the rows of all levels as `init_table` lays them out. position (N, D): clipped to [0, 1].
    Returns (N, L * F), coarsest level first. Differentiable in both arguments; each level is interpolated on its
    own, so the gradient in position is piecewise constant along an axis (continuous with smoothstep).
    """
    rows, width = level_offsets(grid)[-1], grid.num_features
    if table.shape != (rows, width):
        raise ValueError(f"table has shape {table.shape}: this grid needs {(rows, width)}")
    if position.ndim != 2 or position.shape[1] != grid.num_dims:
        raise ValueError(f"position has shape {position.shape}: expected (N, {grid.num_dims})")
    return _encode(grid, table, position)


# Every formula below exists once, for one level; the two backends differ only in how they loop over the levels
# and corners. Unrolled (CPU): no array of (N, L, 2^D, F) is ever formed, and the levels' scatters run side by
# side. Broadcast (GPU): one gather and one scatter over all levels and corners, which XLA fuses into one kernel.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _encode(grid: HashGridConfig, table: jax.Array, position: jax.Array) -> jax.Array:
    def features(table: jax.Array, position: jax.Array) -> jax.Array:
        return lax.platform_dependent(
            table,
            position,
            cpu=functools.partial(encode_unrolled, grid=grid),
            default=functools.partial(encode_broadcast, grid=grid),
        )

    return walled(features, table, position)  # whatever consumes it, be it a sum, would else be computed in the gather


def _encode_fwd(grid: HashGridConfig, table: CustomVJPPrimal, position: CustomVJPPrimal) -> tuple[jax.Array, tuple]:
    # Which gradients anybody asks for is known here, and passed on as the presence of an array.
    wanted = tuple(jnp.zeros(()) if primal.perturbed else None for primal in (table, position))
    return _encode(grid, table.value, position.value), (table.value, position.value, wanted)


def _encode_bwd(grid: HashGridConfig, saved: tuple, gradient: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    # Without the barrier XLA:GPU shares rows and weights with the forward pass and stores them all in between.
    table, position, wanted = saved
    table, position, gradient = lax.optimization_barrier((table, position, gradient))
    table_gradient = position_gradient = None
    if wanted[0] is not None:
        table_gradient = lax.platform_dependent(
            position,
            gradient,
            cpu=functools.partial(table_gradient_unrolled, grid=grid),
            default=functools.partial(table_gradient_broadcast, grid=grid),
        )
    if wanted[1] is not None:
        _, position_vjp = jax.vjp(functools.partial(encode_unrolled, table, grid=grid), position)
        (position_gradient,) = position_vjp(gradient)
    return table_gradient, position_gradient


_encode.defvjp(_encode_fwd, _encode_bwd, symbolic_zeros=True)


def encode_unrolled(table: jax.Array, position: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """`hash_encode` as a program unrolled over levels and corners."""
    features = []
    for level, start in enumerate(level_offsets(grid)[:-1]):
        corners = _corners(position, grid, level)
        rows = (weight[:, None] * _fetch(table, row + np.uint32(start)) for row, weight in corners)
        features.append(functools.reduce(operator.add, rows))
    return jnp.concatenate(features, axis=1)


def table_gradient_unrolled(position: jax.Array, gradient: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The transpose of `encode_unrolled` in the table: gradient (N, L * F) -> (rows, F).

    A wall around each level: fused across levels, the scatters take three times as long.
    """
    width = grid.num_features
    return jnp.concatenate(
        [
            walled(
                functools.partial(_level_gradient, grid=grid, level=level),
                position,
                gradient[:, level * width : (level + 1) * width],
            )
            for level in range(grid.num_levels)
        ]
    )


def _level_gradient(position: jax.Array, gradient: jax.Array, *, grid: HashGridConfig, level: int) -> jax.Array:
    """The gradient in the rows of one level, from that in its features (N, F)."""
    table = jnp.zeros((level_sizes(grid)[level], grid.num_features), gradient.dtype)
    for row, weight in _corners(position, grid, level):
        table = table.at[row].add(weight[:, None] * gradient, mode="promise_in_bounds")
    return table


def encode_broadcast(table: jax.Array, position: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """`hash_encode` as one gather over all points, levels and corners: the definition, and what a GPU runs."""
    row, weight = all_corners(position, grid)
    features = jnp.sum(weight[..., None] * _fetch(table, row), axis=2)
    return features.reshape(len(position), grid.num_outputs)


def table_gradient_broadcast(position: jax.Array, gradient: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The transpose of `encode_broadcast` in the table, as one scatter: gradient (N, L * F) -> (rows, F)."""
    row, weight = all_corners(position, grid)
    update = weight[..., None] * gradient.reshape(len(position), grid.num_levels, 1, grid.num_features)
    table = jnp.zeros((level_offsets(grid)[-1], grid.num_features), gradient.dtype)
    return table.at[row].add(update, mode="promise_in_bounds")


def all_corners(position: jax.Array, grid: HashGridConfig) -> tuple[jax.Array, jax.Array]:
    """Rows of the table (N, L, 2^D) u32, and weights (N, L, 2^D), of all corners of the cells that hold the points."""
    rows, weights = [], []
    for level, start in enumerate(level_offsets(grid)[:-1]):
        row, weight = zip(*_corners(position, grid, level), strict=True)
        rows.append(jnp.stack(row, axis=1) + np.uint32(start))
        weights.append(jnp.stack(weight, axis=1))
    return jnp.stack(rows, axis=1), jnp.stack(weights, axis=1)


def _corners(position: jax.Array, grid: HashGridConfig, level: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For each corner of the cells that hold the points: its row in the level (N,) u32, and its weight (N,)."""
    cell, fraction = _cell(position, grid, level)
    for offset in corner_offsets(grid.num_dims):
        vertex = [coordinate + np.uint32(o) for coordinate, o in zip(cell, offset, strict=True)]
        yield vertex_row(grid, level, vertex), _corner_weight(fraction, offset)


def _cell(position: jax.Array, grid: HashGridConfig, level: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Along each axis the cell (N,) u32 that holds the points, and where in it they lie (N,) in [0, 1].

    The far face of the cube belongs to the last cell, where the fraction is 1. A position that is no number gives
    a valid cell and a fraction that is no number, so the rows stay in bounds and the features show it.
    """
    resolution = level_resolutions(grid)[level]
    last_cell = num_vertices(grid, resolution) - 2
    cells, fractions = [], []
    for axis in range(grid.num_dims):
        scaled = jnp.clip(position[:, axis], 0, 1) * resolution + (0.5 if grid.half_voxel_offset else 0)
        cell = jnp.clip(jnp.floor(scaled).astype(jnp.int32), 0, last_cell)
        fraction = scaled - cell.astype(scaled.dtype)
        cells.append(cell.astype(jnp.uint32))
        fractions.append(fraction**2 * (3 - 2 * fraction) if grid.smoothstep else fraction)
    return cells, fractions


def _corner_weight(fraction: list[jax.Array] | jax.Array, offset: np.ndarray) -> jax.Array:
    """The product over axes of the fraction where the corner lies on the far side, one minus it on the near side."""
    return functools.reduce(operator.mul, [f if o else 1 - f for f, o in zip(fraction, offset, strict=True)])


def _fetch(table: jax.Array, row: jax.Array) -> jax.Array:
    # Rows are in bounds by construction; saying so saves a clamp per read.
    return table.at[row].get(mode="promise_in_bounds")


def sh_encode(direction: jax.Array, *, degree: int) -> jax.Array:
    """Real spherical harmonics of bands 0 to degree - 1. direction (..., 3) unit -> (..., degree^2).

    Y_lm at index l^2 + l + m, orthonormal on the sphere, with the Condon-Shortley sign. A harmonic is
    Re or Im of (x + iy)^|m| times a polynomial in z, which obeys the recurrence of the associated Legendre functions.
    """
    if degree < 1:
        raise ValueError(f"degree = {degree}: expected at least 1")
    x, y, z = direction[..., 0], direction[..., 1], direction[..., 2]
    harmonics: dict[int, jax.Array] = {}
    cosine, sine = jnp.ones_like(x), jnp.zeros_like(x)  # Re, Im of (x + iy)^m
    for m in range(degree):
        before, polynomial = jnp.zeros_like(z), jnp.full_like(z, math.prod(range(1, 2 * m, 2)))
        for band in range(m, degree):
            ratio = math.factorial(band - m) / math.factorial(band + m)
            scale = (-1) ** m * math.sqrt((2 * band + 1) / (4 * math.pi) * ratio * (2 if m else 1))
            harmonics[band * (band + 1) + m] = scale * polynomial * cosine
            if m:
                harmonics[band * (band + 1) - m] = scale * polynomial * sine
            after = ((2 * band + 1) * z * polynomial - (band + m) * before) / (band + 1 - m)
            before, polynomial = polynomial, after
        cosine, sine = x * cosine - y * sine, x * sine + y * cosine
    return jnp.stack([harmonics[index] for index in range(degree**2)], axis=-1)


def frequency_encode(direction: jax.Array, *, num_frequencies: int) -> jax.Array:
    """The input, then sin(2^j x) and cos(2^j x) for each j. (..., D) -> (..., D + 2 * D * num_frequencies).

    Frequencies start at 1, not pi, as in the 100-line reference (NeRF, section 5.1, has 2^j pi).
    """
    waves = [wave(2**j * direction) for j in range(num_frequencies) for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate([direction, *waves], axis=-1)
