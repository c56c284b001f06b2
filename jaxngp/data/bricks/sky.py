"""Sky light, baked once on a coarse lattice over the toy."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxngp.data.bricks.casting import CROSS, Toy, frame, in_light, pack, plain_jax
from jaxngp.data.bricks.harbour import build_parts
from jaxngp.data.bricks.parts import BRICKS_BOUNDS, STUD, Array, Vec

SKY_CELL = STUD / 2  # world units


def _bake_sky(toy: Toy) -> np.ndarray:
    """(X, Y, Z) fraction of the upper hemisphere that each lattice point over BRICKS_BOUNDS sees."""
    low, high = (np.array(corner) for corner in BRICKS_BOUNDS)
    block = 8
    count = (np.ceil(((high - low) / SKY_CELL + 1) / block) * block).astype(int)
    lattice = np.stack(np.meshgrid(*(np.arange(n) for n in count), indexing="ij"), axis=-1) * SKY_CELL + low
    shape = [n for size in count for n in (size // block, block)]
    blocks = lattice.reshape(*shape, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, block**3, 3)
    frames = np.stack([frame(direction) for direction in _hemisphere(40)])
    seen, inside = _sky_blocks(toy, blocks.transpose(0, 2, 1).astype(np.float32), frames)

    def spread(x: jax.Array) -> np.ndarray:
        return np.asarray(x).reshape(*shape[::2], block, block, block).transpose(0, 3, 1, 4, 2, 5).reshape(count)

    return _fill(spread(seen), spread(inside))


def _hemisphere(count: int) -> np.ndarray:
    """(count, 3) directions spread evenly over the upper hemisphere (a golden-angle spiral)."""
    z = (np.arange(count) + 0.5) / count
    angle = np.arange(count) * np.pi * (3 - 5**0.5)
    return np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], axis=-1)


@jax.jit
def _sky_blocks(toy: Toy, blocks: Array, frames: Array) -> tuple[jax.Array, jax.Array]:
    """Sky fraction and whether it is inside a part, of each point of (B, 3, N) -> two (B, N)."""

    def one_block(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        valid = jnp.ones(point.shape[1:], bool)

        def add(total: jax.Array, frame: Any) -> tuple[jax.Array, None]:
            return total + in_light(toy, frame, point, valid), None

        total, _ = lax.scan(add, jnp.zeros(point.shape[1:]), frames)
        return total / len(frames), _inside(toy, point)

    return lax.map(one_block, blocks)


def _inside(toy: Toy, point: jax.Array) -> jax.Array:
    """Which points (3, N) lie inside a part."""
    up = jnp.broadcast_to(jnp.asarray([[0.0], [0.0], [1.0]]), point.shape)
    inside = jnp.zeros(point.shape[1:], bool)
    for kind in range(3):
        begin, end = toy.starts[kind : kind + 2]
        rows = jnp.asarray(toy.shape)[begin:end]

        def visit(i: jax.Array, inside: jax.Array, kind: int = kind, rows: jax.Array = rows) -> jax.Array:
            enter, leave = CROSS[kind](rows[i], point, up)
            return inside | ((enter < 0) & (leave > 0))

        inside = lax.fori_loop(0, end - begin, visit, inside)
    return inside


def _fill(value: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Lattice values with those inside parts replaced by their outer neighbours', so that none darkens a surface."""
    known = ~inside
    value = np.where(known, value, 0.0)
    for _ in range(4):
        total, weight = np.zeros_like(value), np.zeros_like(value)
        for axis in range(3):
            for step in (-1, 1):
                total += np.roll(np.where(known, value, 0.0), step, axis)
                weight += np.roll(known, step, axis)
        value = np.where(known, value, total / np.maximum(weight, 1))
        known = known | (weight > 0)
    return value.astype(np.float32)


def sky_at(sky: Array, point: Vec) -> jax.Array:
    """The baked sky fraction (N,) at points, trilinear."""
    at = [(point[i] - BRICKS_BOUNDS[0][i]) / SKY_CELL for i in range(3)]
    at = [jnp.clip(x, 0, size - 1.001) for x, size in zip(at, sky.shape, strict=True)]
    cell = [jnp.floor(x).astype(jnp.int32) for x in at]
    fraction = [x - c for x, c in zip(at, cell, strict=True)]
    flat, total = jnp.asarray(sky).reshape(-1), jnp.zeros_like(at[0])
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (cell[i] + corner[i] for i in range(3))
        weights = [fraction[i] if corner[i] else 1 - fraction[i] for i in range(3)]
        value = flat.at[(x * sky.shape[1] + y) * sky.shape[2] + z].get(mode="promise_in_bounds")
        total = total + weights[0] * weights[1] * weights[2] * value
    return total


@functools.cache
def baked_toy() -> Toy:
    """The toy with its baked sky light; numpy, so that importing and tracing touch no device."""
    toy = pack(build_parts())
    with jax.ensure_compile_time_eval(), plain_jax():
        return replace(toy, sky=_bake_sky(toy))
