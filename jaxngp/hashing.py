"""From the vertices of a grid to rows of a table: integers only (paper section 3, Eq. 2-4).

A cell or vertex is given as its D coordinates along the first axis: an array (D, ...) or a tuple of D arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.config import HashGridConfig

PRIMES = (1, 2654435761, 805459861)
"""The factors pi_1, pi_2, pi_3 of Eq. 4; the first is 1 for cache coherence along x."""

Coordinates = jax.Array | Sequence[jax.Array]


@functools.cache
def level_resolutions(grid: HashGridConfig) -> tuple[int, ...]:
    """N_l = floor(N_min b^l) with b = (N_max / N_min)^(1 / (L - 1)), Eq. 2-3: cells per axis of each level.

    Computed as the integer root it is, since in floating point the finest level often comes out as N_max - 1.

    >>> level_resolutions(HashGridConfig(num_levels=4, min_resolution=16, max_resolution=128))
    (16, 32, 64, 128)
    """
    last = max(grid.num_levels - 1, 1)
    return tuple(
        _integer_root(grid.min_resolution ** (last - level) * grid.max_resolution**level, last)
        for level in range(grid.num_levels)
    )


def _integer_root(value: int, degree: int) -> int:
    """The largest n with n**degree <= value."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low


def num_vertices(grid: HashGridConfig, resolution: int) -> int:
    """Vertices per axis of a level; the half voxel offset makes the first and last cell stick out by half."""
    return resolution + (2 if grid.half_voxel_offset else 1)


def is_dense(grid: HashGridConfig, resolution: int) -> bool:
    """Whether all vertices of a level fit the table, so that it is stored 1:1 and never collides."""
    return grid.dense_levels and num_vertices(grid, resolution) ** grid.num_dims <= grid.table_size


@functools.cache
def level_sizes(grid: HashGridConfig) -> tuple[int, ...]:
    """Table rows of each level."""
    return tuple(
        num_vertices(grid, n) ** grid.num_dims if is_dense(grid, n) else grid.table_size
        for n in level_resolutions(grid)
    )


def level_offsets(grid: HashGridConfig) -> tuple[int, ...]:
    """First row of each level in the table that holds them all, and at the end the number of rows."""
    return (0, *np.cumsum(level_sizes(grid), dtype=np.int64).tolist())


def corner_offsets(num_dims: int) -> np.ndarray:
    """(2^D, D) of 0 and 1: the corners of a cell; bit d of the row number is the offset along axis d.

    >>> corner_offsets(2).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return (np.arange(2**num_dims)[:, None] >> np.arange(num_dims)) & 1


def spatial_hash(cell: Coordinates, *, table_size: int) -> jax.Array:
    """Eq. 4: the XOR over axes of coordinate times prime modulo 2^32, modulo a power of two T. u32 -> u32 in [0, T).

    >>> int(spatial_hash(jnp.array([3, 0, 0], jnp.uint32), table_size=2**14))
    3
    """
    result = jnp.uint32(0)
    for coordinate, prime in zip(cell, PRIMES, strict=False):
        result = result ^ (coordinate.astype(jnp.uint32) * np.uint32(prime))
    return result & np.uint32(table_size - 1)


def dense_index(cell: Coordinates, *, vertices_per_axis: int | np.ndarray) -> jax.Array:
    """The rank of a vertex in x-fastest order: a bijection onto [0, vertices_per_axis^D). u32 -> u32, modulo 2^32."""
    result, stride = jnp.uint32(0), np.asarray(1, np.uint64)
    for coordinate in cell:
        result = result + coordinate.astype(jnp.uint32) * (stride & np.uint64(2**32 - 1)).astype(np.uint32)
        stride = stride * np.asarray(vertices_per_axis, np.uint64)
    return result


def vertex_row(grid: HashGridConfig, level: int, vertex: Coordinates) -> jax.Array:
    """The row, counted from the level's first, that holds a vertex of a level. u32 -> u32."""
    resolution = level_resolutions(grid)[level]
    if is_dense(grid, resolution):
        return dense_index(vertex, vertices_per_axis=num_vertices(grid, resolution))
    return spatial_hash(vertex, table_size=grid.table_size)
