"""Encodings of positions and directions: multiresolution hash (paper section 3), spherical harmonics, frequencies."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal
from numpy.polynomial import Polynomial

from jaxngp.config import HashGridConfig
from jaxngp.device import by_device, fusion_barrier
from jaxngp.hashing import (
    corner_offsets,
    dense_index,
    is_dense,
    level_offsets,
    level_resolutions,
    level_sizes,
    num_vertices,
    spatial_hash,
    vertex_row,
)


def init_table(key: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The rows of all levels, one after the other: (rows, F) f32, uniform in [-init_scale, init_scale]."""
    shape = (level_offsets(grid)[-1], grid.num_features)
    return jax.random.uniform(key, shape, jnp.float32, -grid.init_scale, grid.init_scale)


def multilinear_weights(fraction: jax.Array) -> jax.Array:
    """Weights of the 2^D corners of a cell. fraction (D,) in [0, 1] -> (2^D,), in the order of `corner_offsets`.

    >>> multilinear_weights(jnp.array([0.25, 0.5])).tolist()
    [0.375, 0.125, 0.375, 0.125]
    """
    return jnp.stack([_corner_weight(fraction, offset) for offset in corner_offsets(len(fraction))])


def hash_encode(
    table: jax.Array,
    position: jax.Array,
    *,
    grid: HashGridConfig,
    half_table: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """The multiresolution hash encoding (paper section 3).

    table (rows, F): the rows of all levels as `init_table` lays them out. position (N, D): clipped to [0, 1].
    Returns (N, L * F), coarsest level first, of `dtype`, the table's if none is given; it is interpolated in float32
    or more. Differentiable in both arguments; each level is interpolated on its own, so the gradient in position is
    piecewise constant along an axis (continuous with smoothstep).

    half_table: a copy of the table in fewer bits, which is read in its place: half the bytes to fetch at random places.
    The gradient still goes to the table, in the table's precision; the half_table gets none.
    """
    rows, width = level_offsets(grid)[-1], grid.num_features
    for name, array in (("table", table), ("half_table", table if half_table is None else half_table)):
        if array.shape != (rows, width):
            raise ValueError(f"{name} has shape {array.shape}: this grid needs {(rows, width)}")
    if position.ndim != 2 or position.shape[1] != grid.num_dims:
        raise ValueError(f"position has shape {position.shape}: expected (N, {grid.num_dims})")
    return _encode(grid, jnp.dtype(dtype or table.dtype), table, half_table, position)


# Every formula below exists once, for arrays or numbers of a level; the two backends differ only in how they loop
# over the levels and corners. Unrolled (CPU): no array of (N, L, 2^D, F) is ever formed, and the levels' scatters run
# side by side. Broadcast (GPU): levels are an axis of every array, so that XLA makes one kernel with one gather a
# corner, and one kernel with one scatter. Unrolled there, a thread would branch over all levels and corners.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode(
    grid: HashGridConfig, dtype: jnp.dtype, table: jax.Array, half_table: jax.Array | None, position: jax.Array
) -> jax.Array:
    def features(table: jax.Array, position: jax.Array) -> jax.Array:
        return by_device(
            table,
            position,
            cpu=functools.partial(encode_unrolled, grid=grid, dtype=dtype),
            gpu=functools.partial(encode_broadcast, grid=grid, dtype=dtype),
        )

    # Otherwise XLA fuses the consumer into the gather.
    return fusion_barrier(features, table if half_table is None else half_table, position)


def _encode_fwd(
    grid: HashGridConfig,
    dtype: jnp.dtype,
    table: CustomVJPPrimal,
    half_table: CustomVJPPrimal | None,
    position: CustomVJPPrimal,
) -> tuple[jax.Array, tuple]:
    # Which gradients are needed is known here; it is encoded in which array is present.
    wanted = tuple(jnp.zeros((), jnp.float32) if primal.perturbed else None for primal in (table, position))
    read = None if half_table is None else half_table.value
    return _encode(grid, dtype, table.value, read, position.value), (table.value, read, position.value, wanted)


def _encode_bwd(
    grid: HashGridConfig, dtype: jnp.dtype, saved: tuple, gradient: jax.Array
) -> tuple[jax.Array | None, None, jax.Array | None]:
    # Without the barrier XLA:GPU shares rows and weights with the forward pass and stores them all in between.
    table, half_table, position, wanted = saved
    position, gradient = lax.optimization_barrier((position, gradient))
    table_gradient = position_gradient = None
    if wanted[0] is not None:
        table_gradient = by_device(
            position,
            gradient,
            cpu=functools.partial(table_gradient_unrolled, grid=grid),
            gpu=functools.partial(table_gradient_broadcast, grid=grid),
        ).astype(table.dtype)
    if wanted[1] is not None:
        read = table if half_table is None else half_table
        _, position_vjp = jax.vjp(functools.partial(encode_unrolled, read, grid=grid, dtype=dtype), position)
        (position_gradient,) = position_vjp(gradient)
    return table_gradient, None, position_gradient


_encode.defvjp(_encode_fwd, _encode_bwd, symbolic_zeros=True)


def encode_unrolled(
    table: jax.Array, position: jax.Array, *, grid: HashGridConfig, dtype: jnp.dtype | None = None
) -> jax.Array:
    """`hash_encode` as a program unrolled over levels and corners."""
    features = []
    for level, start in enumerate(level_offsets(grid)[:-1]):
        corners = _corners(position, grid, level)
        rows = (weight[:, None] * _fetch(table, row + np.uint32(start)) for row, weight in corners)
        features.append(functools.reduce(operator.add, rows))
    return jnp.concatenate(features, axis=1).astype(dtype or table.dtype)


def table_gradient_unrolled(position: jax.Array, gradient: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The transpose of `encode_unrolled` in the table: gradient (N, L * F) -> (rows, F), in float32 or more.

    A fusion barrier around each level: fused across levels, the scatters take three times as long.
    """
    width, gradient = grid.num_features, _widened(gradient)
    return jnp.concatenate(
        [
            fusion_barrier(
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


def encode_broadcast(
    table: jax.Array, position: jax.Array, *, grid: HashGridConfig, dtype: jnp.dtype | None = None
) -> jax.Array:
    """`hash_encode` with the levels as an axis: one gather a corner, all in one kernel of N L threads.

    What a thread needs for its F features is broadcast to them here, at the start: broadcast later, XLA takes it for
    work to be shared between threads, and stores 8 weights for each point and level in between.
    """
    levels = _levels(grid)
    clipped = jnp.clip(_widened(position), 0, 1)
    along = [clipped[:, axis, None] for axis in range(grid.num_dims)]  # (N, 1)
    wide_shape = (len(position), grid.num_levels, grid.num_features)
    cell = [_cell_along(x, levels.resolution, levels.last_cell, grid)[0] for x in along]
    fraction = [
        _cell_along(
            jnp.broadcast_to(x[..., None], wide_shape), levels.resolution[:, None], levels.last_cell[:, None], grid
        )[1]
        for x in along
    ]
    features = jnp.zeros((), _widened(table[:0]).dtype)
    for offset in corner_offsets(grid.num_dims):
        vertex = [coordinate + np.uint32(o) for coordinate, o in zip(cell, offset, strict=True)]
        features = features + _corner_weight(fraction, offset) * _fetch(table, levels.row(vertex, grid))
    return features.reshape(len(position), grid.num_outputs).astype(dtype or table.dtype)


def table_gradient_broadcast(position: jax.Array, gradient: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """The transpose of `encode_broadcast` in the table, as one scatter: gradient (N, L * F) -> (rows, F).

    Of (L, N, 2^D) updates, a thread each: the corners of a cell and the samples of a ray are neighbours in memory,
    and so in the order of updates; and one level's part of the gradient stays in the L2 cache until it is done.
    """
    levels = _levels(grid)
    width, num_points = grid.num_features, len(position)
    corners = corner_offsets(grid.num_dims)
    rows_shape = (grid.num_levels, num_points, len(corners))
    clipped = jnp.clip(_widened(position), 0, 1)
    update = jnp.swapaxes(_widened(gradient).reshape(num_points, grid.num_levels, 1, width), 0, 1)
    vertex = []
    for axis in range(grid.num_dims):
        x, far = clipped[None, :, axis, None], corners[:, axis]
        resolution, last_cell = levels.resolution[:, None, None], levels.last_cell[:, None, None]
        cell, _ = _cell_along(jnp.broadcast_to(x, rows_shape), resolution, last_cell, grid)
        vertex.append(cell + far.astype(np.uint32))
        x = jnp.broadcast_to(x[..., None], (*rows_shape, width))
        _, fraction = _cell_along(x, resolution[..., None], last_cell[..., None], grid)
        # The fraction on the far side, one minus it on the near side, exactly.
        near = (1 - far).astype(np.float32)[:, None]
        update = update * (near + (1 - 2 * near) * fraction)
    table = jnp.zeros((level_offsets(grid)[-1], width), update.dtype)
    return table.at[levels.row(vertex, grid)].add(update, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class _Levels:
    """What distinguishes the levels of a grid, (L,) each: constants that a kernel looks up."""

    resolution: np.ndarray  # f32
    last_cell: np.ndarray  # i32
    vertices_per_axis: np.ndarray  # u32
    dense: np.ndarray  # bool
    start: np.ndarray  # u32, the first row

    def row(self, vertex: list[jax.Array], grid: HashGridConfig) -> jax.Array:
        """The rows of the vertices: coordinates (N, L), or (L, N, 2^D), for each axis -> rows of that shape."""
        over_levels = (-1,) if vertex[0].ndim == 2 else (-1, 1, 1)
        side, dense, start = (a.reshape(over_levels) for a in (self.vertices_per_axis, self.dense, self.start))
        hashed = spatial_hash(vertex, table_size=grid.table_size)
        return jnp.where(dense, dense_index(vertex, vertices_per_axis=side), hashed) + start


@functools.cache
def _levels(grid: HashGridConfig) -> _Levels:
    resolutions = level_resolutions(grid)
    vertices = np.array([num_vertices(grid, n) for n in resolutions], np.uint32)
    return _Levels(
        resolution=np.array(resolutions, np.float32),
        last_cell=vertices.astype(np.int32) - 2,
        vertices_per_axis=vertices,
        dense=np.array([is_dense(grid, n) for n in resolutions]),
        start=np.array(level_offsets(grid)[:-1], np.uint32),
    )


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
    """Along each axis the cell (N,) u32 that holds the points, and where in it they lie (N,) in [0, 1]."""
    resolution = level_resolutions(grid)[level]
    last_cell = num_vertices(grid, resolution) - 2
    along = [
        _cell_along(jnp.clip(_widened(position[:, axis]), 0, 1), resolution, last_cell, grid)
        for axis in range(grid.num_dims)
    ]
    return [cell for cell, _ in along], [fraction for _, fraction in along]


def _cell_along(
    x: jax.Array, resolution: int | np.ndarray, last_cell: int | np.ndarray, grid: HashGridConfig
) -> tuple[jax.Array, jax.Array]:
    """The cell u32 that holds x, and where in it x lies, in [0, 1], at levels of a resolution that broadcasts to x.

    The far face of the cube belongs to the last cell, where the fraction is 1. A NaN position gives a valid cell and a
    NaN fraction, so the rows stay in bounds and the features show it.
    """
    scaled = x * resolution + (0.5 if grid.half_voxel_offset else 0)
    cell = jnp.clip(jnp.floor(scaled).astype(jnp.int32), 0, last_cell)
    fraction = scaled - cell.astype(scaled.dtype)
    return cell.astype(jnp.uint32), fraction**2 * (3 - 2 * fraction) if grid.smoothstep else fraction


def _corner_weight(fraction: list[jax.Array] | jax.Array, offset: np.ndarray) -> jax.Array:
    """The product over axes of the fraction where the corner lies on the far side, one minus it on the near side."""
    return functools.reduce(operator.mul, [f if o else 1 - f for f, o in zip(fraction, offset, strict=True)])


def _fetch(table: jax.Array, row: jax.Array) -> jax.Array:
    # Rows are in bounds by construction; saying so saves a clamp per read.
    return _widened(table.at[row].get(mode="promise_in_bounds"))


def _widened(array: jax.Array) -> jax.Array:
    """In float32, or in float64 where it is that already."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def sh_encode(direction: jax.Array, *, degree: int) -> jax.Array:
    """Real spherical harmonics of bands 0 to degree - 1. direction (..., 3) unit -> (..., degree^2).

    Y_lm at index l^2 + l + m, orthonormal on the sphere, with the Condon-Shortley sign. A harmonic is
    Re or Im of (x + iy)^|m| times a polynomial in z, which obeys the recurrence of the associated Legendre functions.
    """
    if degree < 1:
        raise ValueError(f"degree = {degree}: expected at least 1")
    return by_device(
        direction,
        cpu=functools.partial(sh_encode_unrolled, degree=degree),
        gpu=functools.partial(sh_encode_broadcast, degree=degree),
    )


def sh_encode_unrolled(direction: jax.Array, *, degree: int) -> jax.Array:
    """`sh_encode`, one harmonic after the other."""
    x, y, z = direction[..., 0], direction[..., 1], direction[..., 2]
    harmonics: dict[int, jax.Array] = {}
    cosine, sine = jnp.ones_like(x), jnp.zeros_like(x)  # Re, Im of (x + iy)^m
    for m in range(degree):
        before, polynomial = jnp.zeros_like(z), jnp.full_like(z, math.prod(range(1, 2 * m, 2)))
        for band in range(m, degree):
            scale = _sh_scale(band, m)
            harmonics[band * (band + 1) + m] = scale * polynomial * cosine
            if m:
                harmonics[band * (band + 1) - m] = scale * polynomial * sine
            after = ((2 * band + 1) * z * polynomial - (band + m) * before) / (band + 1 - m)
            before, polynomial = polynomial, after
        cosine, sine = x * cosine - y * sine, x * sine + y * cosine
    return jnp.stack([harmonics[index] for index in range(degree**2)], axis=-1)


def sh_encode_broadcast(direction: jax.Array, *, degree: int) -> jax.Array:
    """`sh_encode` with the harmonics as an axis: all do the same with numbers of their own, so threads do not part."""
    orders, polynomials = _sh_tables(degree)
    x, y, z = (direction[..., axis, None] for axis in range(3))
    cosine, sine = jnp.ones_like(x), jnp.zeros_like(x)
    around = jnp.zeros_like(x)
    for m in range(degree):
        around = around + orders[m].astype(x.dtype) * cosine
        if m:
            around = around + orders[-m].astype(x.dtype) * sine
        cosine, sine = x * cosine - y * sine, x * sine + y * cosine
    along = jnp.zeros_like(z)
    for coefficient in reversed(polynomials):  # by Horner's rule
        along = along * z + coefficient.astype(z.dtype)
    return around * along


@functools.cache
def _sh_tables(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each harmonic k of degree^2: whether its m is that of a row, (2 degree - 1, degree^2), row -m from the end;
    and its polynomial in z with its scale, (degree, degree^2), the constant term first.
    """
    orders = np.zeros((2 * degree - 1, degree**2))
    polynomials = np.zeros((degree, degree**2))
    for m in range(degree):
        before, polynomial = Polynomial([0.0]), Polynomial([float(math.prod(range(1, 2 * m, 2)))])
        for band in range(m, degree):
            for sign in {m, -m}:
                index = band * (band + 1) + sign
                orders[sign, index] = 1
                polynomials[: len(polynomial), index] = (_sh_scale(band, m) * polynomial).coef
            after = ((2 * band + 1) * Polynomial([0.0, 1.0]) * polynomial - (band + m) * before) / (band + 1 - m)
            before, polynomial = polynomial, after
    return orders, polynomials


def _sh_scale(band: int, m: int) -> float:
    ratio = math.factorial(band - m) / math.factorial(band + m)
    return (-1) ** m * math.sqrt((2 * band + 1) / (4 * math.pi) * ratio * (2 if m else 1))


def frequency_encode(direction: jax.Array, *, num_frequencies: int) -> jax.Array:
    """The input, then sin(2^j x) and cos(2^j x) for each j. (..., D) -> (..., D + 2 * D * num_frequencies).

    Frequencies start at 1, not pi, as in the 100-line reference (NeRF, section 5.1, has 2^j pi).
    """
    waves = [wave(2**j * direction) for j in range(num_frequencies) for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate([direction, *waves], axis=-1)
