"""Rays against parts, in closed form: the nearest hit, what is in the light, and how much sky is seen.

A vector of N rays is (3, N) here: XLA:CPU vectorises over the last axis.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.data.bricks.harbour import build_parts
from jaxngp.data.bricks.parts import BRICKS_BOUNDS, PATTERNS, STUD, Array, Part, Vec, corners


@struct.dataclass
class Toy:
    """P parts, boxes first, then frusta, then spheres; world units."""

    shape: Array  # (P, 19): centre 3, axes 9, size 3, cut 4
    paint: Array  # (P, 10): linear colour 3, linear second 3, pattern, scale, gloss, glow
    corners: Array  # (P, 8, 3) of the oriented boxes around the parts
    sky: Array  # (X, Y, Z) fraction of the sky seen from each point of a lattice over the bounds
    starts: tuple[int, ...] = struct.field(pytree_node=False)  # (4,): where each kind begins, and P


def _linear(colour: str) -> list[float]:
    """Linear light of an sRGB hex colour."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return list(np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4))


def pack(parts: Sequence[Part]) -> Toy:
    """Parts that are sorted by kind as arrays, under an open sky."""
    shape = [np.concatenate([p.centre, p.axes.ravel(), p.size, p.cut]) for p in parts]
    paint = []
    for p in (part.paint for part in parts):
        numbers = [PATTERNS.index(p.pattern), p.scale, p.gloss, p.glow]
        paint.append(_linear(p.colour) + _linear(p.second) + numbers)
    kinds = [p.kind for p in parts]
    return Toy(
        shape=np.array(shape, np.float32),
        paint=np.array(paint, np.float32),
        corners=np.array([corners(p) for p in parts], np.float32),
        sky=np.ones((2, 2, 2), np.float32),
        starts=(*(kinds.index(kind) for kind in range(3)), len(kinds)),
    )


@contextlib.contextmanager
def plain_jax() -> Iterator[None]:
    """JAX on the CPU, where small programs with loops start fastest, and in 32 bits, whatever the process is set to."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to do without
        host = None
    with jax.default_device(host), jax.enable_x64(False):
        yield


# Closed-form hits. o, d are (3, N); each returns the distances (N,) at which rays enter and leave a convex part.


def dot(a: Vec, b: Vec) -> jax.Array:
    """Written out, because XLA:CPU fuses sums of rows and not a reduction."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(v: Vec) -> Vec:
    """v scaled to unit length."""
    scale = 1 / jnp.sqrt(dot(v, v) + 1e-20)
    return [x * scale for x in v]


def _to_local(row: jax.Array, o: Vec, d: Vec) -> tuple[Vec, Vec, jax.Array]:
    """The ray in the part's frame, started at `shift` where it is nearest the part: keeps float32 digits."""
    offset = [o[i] - row[i] for i in range(3)]
    shift = -(offset[0] * d[0] + offset[1] * d[1] + offset[2] * d[2])
    offset = [offset[i] + shift * d[i] for i in range(3)]
    axes = [[row[3 + 3 * i + j] for j in range(3)] for i in range(3)]
    local_o = [a[0] * offset[0] + a[1] * offset[1] + a[2] * offset[2] for a in axes]
    local_d = [a[0] * d[0] + a[1] * d[1] + a[2] * d[2] for a in axes]
    return local_o, local_d, shift


def _nonzero(x: jax.Array) -> jax.Array:
    """x, moved away from 0 far enough to divide by."""
    return jnp.where(jnp.abs(x) > 1e-7, x, jnp.where(x < 0, -1e-7, 1e-7))


def _slab(o: jax.Array, d: jax.Array, half: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = 1 / _nonzero(d)
    middle, reach = -o * inverse, jnp.abs(inverse) * half
    return middle - reach, middle + reach


def _cross_box(row: jax.Array, o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    o, d, shift = _to_local(row, o, d)
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o[i], d[i], row[12 + i]) for i in range(3))
    rate = _nonzero(row[15] * d[0] + row[16] * d[1] + row[17] * d[2])
    cut = (row[18] - row[15] * o[0] - row[16] * o[1] - row[17] * o[2]) / rate
    enter = jnp.maximum(jnp.maximum(x0, y0), jnp.maximum(z0, jnp.where(rate < 0, cut, -jnp.inf)))
    leave = jnp.minimum(jnp.minimum(x1, y1), jnp.minimum(z1, jnp.where(rate > 0, cut, jnp.inf)))
    return enter + shift, leave + shift


def _cross_frustum(row: jax.Array, o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    o, d, shift = _to_local(row, o, d)
    slope = (row[13] - row[12]) / (2 * row[14])
    radius, growth = (row[12] + row[13]) / 2 + slope * o[2], slope * d[2]
    a = _nonzero(d[0] * d[0] + d[1] * d[1] - growth * growth)
    b = o[0] * d[0] + o[1] * d[1] - radius * growth
    discriminant = b * b - a * (o[0] * o[0] + o[1] * o[1] - radius * radius)
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    near, far = (-b - root) / a, (-b + root) / a
    # Where a < 0 the ray is steeper than the cone: it stays inside beyond one root, on the side where the cone widens.
    steep = a < 0
    enter = jnp.where(steep, jnp.where(growth > 0, near, -jnp.inf), near)
    leave = jnp.where(steep, jnp.where(growth > 0, jnp.inf, far), far)
    low, high = _slab(o[2], d[2], row[14])
    enter, leave = jnp.maximum(enter, low), jnp.minimum(leave, high)
    return jnp.where(discriminant > 0, enter + shift, jnp.inf), leave + shift


def _cross_sphere(row: jax.Array, o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    o, _, shift = _to_local(row, o, d)  # o is now the point of the ray that is nearest the centre
    square = row[12] * row[12] - (o[0] * o[0] + o[1] * o[1] + o[2] * o[2])
    root = jnp.sqrt(jnp.maximum(square, 0))
    return jnp.where(square > 0, shift - root, jnp.inf), shift + root


_CROSS: tuple[Callable, ...] = (_cross_box, _cross_frustum, _cross_sphere)


_BATCH = 2  # parts tried in one turn of a loop: a turn costs XLA:CPU microseconds; more gained nothing


def _distances(kind: int, rows: jax.Array, o: Vec, d: Vec) -> jax.Array:
    """Distances (B, N) at which rays enter each of B parts from outside, else inf."""
    enter, leave = jax.vmap(_CROSS[kind], in_axes=(0, None, None))(rows, o, d)
    return jnp.where((enter < leave) & (enter > 1e-5), enter, jnp.inf)


def _visit_parts(toy: Toy, near: jax.Array, o: Vec, d: Vec, visit: Callable, start: Any) -> Any:
    """Folds visit(result, distance (N,), part index) over the parts that are `near` (P,), and perhaps a few more."""
    result = start
    for kind in range(3):
        begin, end = toy.starts[kind : kind + 2]
        size = -(-(end - begin) // _BATCH) * _BATCH
        index = begin + jnp.nonzero(near[begin:end], size=size, fill_value=0)[0]
        rows = jnp.asarray(toy.shape)[index]

        def turn(i: jax.Array, result: Any, kind: int = kind, index: jax.Array = index, rows: jax.Array = rows) -> Any:
            some = lax.dynamic_slice_in_dim(rows, i * _BATCH, _BATCH)
            # A branch, so that XLA:CPU computes t once: it would fuse it into each of its uses otherwise.
            blank = jnp.zeros((_BATCH, *o[0].shape))
            t = lax.cond(i >= 0, lambda: _distances(kind, some, o, d), lambda: blank)
            for b in range(_BATCH):
                result = visit(result, t[b], index[i * _BATCH + b])
            return result

        result = lax.fori_loop(0, -(-jnp.sum(near[begin:end]) // _BATCH), turn, result)
    return result


def closest(toy: Toy, near: jax.Array, o: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distance (N,) to the first of the parts that are `near`, inf where there is none, and its index (N,)."""

    def nearer(best: tuple, t: jax.Array, part: jax.Array) -> tuple:
        return jnp.minimum(t, best[0]), jnp.where(t < best[0], part, best[1])

    nothing = jnp.full_like(o[0], jnp.inf), jnp.zeros(o.shape[1:], jnp.int32)
    return _visit_parts(toy, near, o, d, nearer, nothing)


def _blocked(toy: Toy, near: jax.Array, o: jax.Array, d: jax.Array) -> jax.Array:
    """Which rays (N,) meet one of the parts that are `near`."""
    start = jnp.zeros(o.shape[1:], bool)
    return _visit_parts(toy, near, o, d, lambda blocked, t, _: blocked | (t < jnp.inf), start)


def frame(direction: np.ndarray) -> np.ndarray:
    """(3, 3) rows: two unit vectors across a unit direction, and the direction."""
    side = np.cross([0.0, 0.0, 1.0], direction)
    side = side / np.linalg.norm(side) if np.linalg.norm(side) > 1e-6 else np.array([1.0, 0.0, 0.0])
    return np.stack([side, np.cross(direction, side), direction]).astype(np.float32)


def in_light(toy: Toy, frame: Array, point: jax.Array, valid: jax.Array) -> jax.Array:
    """Which of the valid points (3, N) see a light at infinity along frame[2].

    Only parts whose shadow meets the box around the points, seen along the light, can block it.
    """
    seen = jnp.einsum("ij,pkj->ipk", frame, toy.corners, precision=lax.Precision.HIGHEST)
    local = jnp.stack([dot(row, point) for row in frame])
    low = jnp.min(jnp.where(valid, local, jnp.inf), axis=1)[:, None] - 1e-3
    high = jnp.max(jnp.where(valid, local, -jnp.inf), axis=1)[:, None] + 1e-3
    part_low, part_high = seen.min(axis=2), seen.max(axis=2)
    meets = (part_high >= low) & (part_low <= high)
    near = meets[0] & meets[1] & (part_high[2] >= low[2, 0])
    direction = jnp.broadcast_to(frame[2][:, None], point.shape)
    return ~_blocked(toy, near, point, direction)


# Sky light, baked once on a coarse lattice over the toy.

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
            enter, leave = _CROSS[kind](rows[i], point, up)
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
