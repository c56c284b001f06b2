"""What rays see of the toy: normals, patterns and light at the nearest hit, as sRGB."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Rays
from jaxngp.data.bricks.casting import SKY_CELL, Toy, baked_toy, closest, dot, frame, in_light, sky_at, unit
from jaxngp.data.bricks.parts import BOX, FRUSTUM, PATTERNS, SPHERE, STUD, Vec

_SUN_FRAME = frame(np.array([-0.42, -0.62, 0.66]) / np.linalg.norm([-0.42, -0.62, 0.66]))
_SUN = _SUN_FRAME[2]
_SUN_COLOUR = (2.55, 2.35, 2.0)  # linear light
_SKY_COLOUR = (0.62, 0.74, 0.92)
_BOUNCE_COLOUR = (0.36, 0.33, 0.29)
_BEVEL = 0.07 * STUD  # width over which an edge's shading normal is rounded


def _normals(kind: jax.Array, row: jax.Array, point: Vec, d: Vec) -> tuple[Vec, Vec, jax.Array, Vec]:
    """Geometric normal, shading normal with rounded edges, edge weight (N,) and local point.

    row (19, N) holds each ray's part. The face is the one that the point is nearest to among those that face the ray.
    """
    axes = [row[3 + 3 * i : 6 + 3 * i] for i in range(3)]
    offset = [point[i] - row[i] for i in range(3)]
    local, local_d = ([dot(a, v) for a in axes] for v in (offset, d))
    faces = _faces(kind, row, local)
    is_ball = kind == SPHERE
    score = [jnp.where(usable & (dot(n, local_d) < 0), gap, -jnp.inf) for n, gap, usable in faces]
    best = functools.reduce(jnp.maximum, score)
    normal, bent, edge, taken = unit(local), [0.0, 0.0, 0.0], jnp.zeros_like(row[0]), is_ball
    for (n, gap, usable), s in zip(faces, score, strict=True):
        chosen = (s == best) & ~taken
        taken = taken | chosen
        weight = jnp.where(usable & ~chosen, jnp.clip(1 + gap / _BEVEL, 0, 1) ** 2, 0)
        normal = [jnp.where(chosen, a, b) for a, b in zip(n, normal, strict=True)]
        bent = [b + weight * a for a, b in zip(n, bent, strict=True)]
        edge = jnp.maximum(edge, weight)
    bent = unit([a + 0.7 * b for a, b in zip(normal, bent, strict=True)])
    columns = [[axes[j][i] for j in range(3)] for i in range(3)]
    return [dot(c, normal) for c in columns], [dot(c, bent) for c in columns], edge, local


def _faces(kind: jax.Array, row: jax.Array, local: Vec) -> list[tuple[Vec, jax.Array, jax.Array]]:
    """Each face a part may have: local outward normal, signed distance (N,) of the point, whether it has it (N,)."""
    is_box, is_frustum = kind == BOX, kind == FRUSTUM
    sign = [jnp.where(x < 0, -1.0, 1.0) for x in local]
    gap = [jnp.abs(local[i]) - row[12 + i] for i in range(3)]
    slope = (row[13] - row[12]) / (2 * row[14])
    flat = 1 / jnp.sqrt(1 + slope * slope)
    reach = jnp.sqrt(local[0] ** 2 + local[1] ** 2 + 1e-20)
    side = [local[0] / reach * flat, local[1] / reach * flat, -slope * flat]
    side_gap = (reach - (row[12] + row[13]) / 2 - slope * local[2]) * flat
    cut = row[15:18]
    return [
        ([sign[0], 0.0, 0.0], gap[0], is_box),
        ([0.0, sign[1], 0.0], gap[1], is_box),
        ([0.0, 0.0, sign[2]], jnp.where(is_box, gap[2], jnp.abs(local[2]) - row[14]), is_box | is_frustum),
        (cut, dot(cut, local) - row[18], is_box & (row[18] < 0.9)),
        (side, side_gap, is_frustum),
    ]


def _fraction(x: jax.Array) -> jax.Array:
    return x - jnp.floor(x)


def _odd(x: jax.Array) -> jax.Array:
    """1 where floor(x) is odd, else 0."""
    whole = jnp.floor(x)
    return whole - 2 * jnp.floor(whole / 2)


def _noise(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """A hash in [0, 1) of the integer cell of each point."""
    x, y, z = (jnp.floor(v).astype(jnp.int32).astype(jnp.uint32) for v in (x, y, z))
    h = x * np.uint32(73856093) ^ y * np.uint32(19349663) ^ z * np.uint32(83492791)
    h = (h ^ (h >> 13)) * np.uint32(0x5BD1E995)
    return ((h ^ (h >> 15)) & np.uint32(0xFFFF)).astype(jnp.float32) / 65536


def _pattern(pattern: jax.Array, scale: jax.Array, local: Vec, point: Vec) -> jax.Array:
    """How much (N,) of the second colour shows at local and world points."""
    x, y, z = (v * (scale / STUD) for v in local)
    u, v, w = (p / STUD for p in point)
    board = jnp.abs(_fraction(y) - 0.5)
    grain = 0.3 * (jnp.sin(7 * y + 3 * jnp.sin(1.7 * x + 2.5 * jnp.floor(y))) > 0.3)
    column = x + 0.5 * _odd(y)
    joint = (jnp.abs(_fraction(column) - 0.5) > 0.43) | (_fraction(y) < 0.16)
    course = z / 0.6 + 1
    block = jnp.arctan2(y, x) * (9 / np.pi) + 0.5 * _odd(course)
    muntin = jnp.maximum(jnp.abs(_fraction(y + 0.5) - 0.5), jnp.abs(_fraction(z + 0.5) - 0.5))
    crest = jnp.sin((3.1 * u + 2.2 * v) * scale + 1.6 * jnp.sin(1.3 * v))
    mixes = {
        "checker": 1.0 * (_odd(x) != _odd(z)),
        "planks": jnp.where(board > 0.44, 1.0, grain),
        "shingles": jnp.where(joint, 1.0, 0.35 * _noise(column, y, 0 * y)),
        "bands": _odd(z),
        "masonry": 0.55 * ((_fraction(block) < 0.07) | (_fraction(course) < 0.09)),
        "panes": 1.0 * (muntin > 0.44),
        "waves": 0.45 * jnp.clip(6 * crest - 4.6, 0, 1),
        "speckle": 0.8 * _noise(u * scale, v * scale, w * scale),
    }
    mix = jnp.zeros_like(x)
    for name, value in mixes.items():
        mix = jnp.where(pattern == PATTERNS.index(name), value, mix)
    return mix


def _environment(x: jax.Array, y: jax.Array, z: jax.Array) -> Vec:
    """Light that a reflection towards (x, y, z) sees: a bright horizon, a deeper zenith, a soft window on one side."""
    glow = 0.5 + 0.9 * jnp.exp(-3 * jnp.abs(z))
    window = 1.6 * jnp.clip(8 * (0.55 * x - 0.35 * y + 0.76 * z - 0.86), 0, 1)
    return [jnp.where(z > 0, _SKY_COLOUR[i] * glow, _BOUNCE_COLOUR[i]) + window for i in range(3)]


def _shade(paint: jax.Array, mix: jax.Array, sky: jax.Array, sunlit: jax.Array, n: Vec, edge: jax.Array, d: Vec) -> Vec:
    """Linear light that leaves each point towards its ray's origin. paint (10, N), n the normal to shade by.

    Sun and sky on a matt base under a clear coat, which reflects by Schlick's term and shows the sun by Blinn-Phong's.
    """
    gloss, glow = paint[8], paint[9]
    facing = jnp.maximum(dot(n, _SUN), 0) * sunlit
    cosine = jnp.maximum(-dot(n, d), 0)
    shine = jnp.maximum(dot(n, unit([_SUN[i] - d[i] for i in range(3)])), 0)
    highlight = gloss * sunlit * (facing > 0) * (1.1 * shine**120 + 0.06 * shine**20)
    fresnel = gloss * (0.04 + 0.6 * (1 - cosine) ** 5)
    mirrored = _environment(*(d[i] + 2 * cosine * n[i] for i in range(3)))
    from_sky, from_below = (0.47 + 0.38 * n[2]) * sky, (0.42 - 0.34 * n[2]) * (0.4 + 0.6 * sky)
    light = []
    for i in range(3):
        albedo = (paint[i] + mix * (paint[3 + i] - paint[i])) * (1 - 0.3 * edge)
        received = 0.62 * _SUN_COLOUR[i] * facing + _SKY_COLOUR[i] * from_sky + _BOUNCE_COLOUR[i] * from_below
        coat = fresnel * sky * mirrored[i] + highlight * _SUN_COLOUR[i]
        light.append(albedo * (received * (1 - fresnel) + glow) + coat)
    return light


def _encode(linear: jax.Array) -> jax.Array:
    """sRGB of linear light, with a soft shoulder above 0.8 so that highlights keep their shape."""
    soft = 0.8 + 0.2 * jnp.tanh((linear - 0.8) / 0.4)
    x = jnp.clip(jnp.where(linear > 0.8, soft, linear), 0, 1)
    return jnp.where(x <= 0.0031308, 12.92 * x, 1.055 * jnp.maximum(x, 0.0031308) ** (1 / 2.4) - 0.055)


def surface(toy: Toy, near: jax.Array, o: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    """rgb (3, N) sRGB, alpha (N,), depth (N,), normal (3, N) of rays (3, N) against the parts that are `near`."""
    depth, part = closest(toy, near, o, d)
    hit = depth < jnp.inf
    reach = jnp.where(hit, depth, 0)
    point = [o[i] + d[i] * reach for i in range(3)]

    # Branches, because XLA:CPU would fuse all stages into one and compute the early ones once per use.
    def stage(compute: Callable[[], Any]) -> Any:
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
        return lax.cond(hit.any(), compute, lambda: blank)

    kind = (part >= toy.starts[1]).astype(jnp.int32) + (part >= toy.starts[2])
    row, paint = stage(lambda: (jnp.asarray(toy.shape)[part].T, jnp.asarray(toy.paint)[part].T))
    normal, bent, edge, local = stage(lambda: _normals(kind, row, point, d))
    lit = hit & (dot(normal, _SUN) > 0)
    start = jnp.stack([point[i] + 2e-4 * normal[i] for i in range(3)])
    sunlit = 1.0 * (in_light(toy, _SUN_FRAME, start, lit) & lit)
    mix = stage(lambda: _pattern(paint[6], paint[7], local, point))
    sky = stage(lambda: sky_at(toy.sky, [point[i] + 0.6 * SKY_CELL * bent[i] for i in range(3)]))
    light = stage(lambda: _shade(paint, mix, sky, sunlit, bent, edge, d))
    rgb = stage(lambda: [_encode(channel) for channel in light])
    return jnp.stack([c * hit for c in rgb]), 1.0 * hit, depth, jnp.stack([n * hit for n in normal])


@struct.dataclass
class Surface:
    """What a ray meets first; zeros where it meets nothing."""

    rgb: jax.Array  # (..., 3) sRGB in [0, 1], not multiplied by alpha
    alpha: jax.Array  # (...), 1 at a hit and 0 at a miss
    depth: jax.Array  # (...), world units along the ray's unit direction; inf at a miss
    normal: jax.Array  # (..., 3) unit, outward, geometric


@jax.jit
def _cast(toy: Toy, rays: Rays) -> Surface:
    shape = rays.direction.shape[:-1]
    o, d = (jnp.broadcast_to(x, (*shape, 3)).reshape(-1, 3).T for x in (rays.origin, rays.direction))
    rgb, alpha, depth, normal = surface(toy, jnp.ones(toy.starts[-1], bool), o, d)
    return Surface(rgb.T.reshape(*shape, 3), alpha.reshape(shape), depth.reshape(shape), normal.T.reshape(*shape, 3))


def cast_rays(rays: Rays) -> Surface:
    """What rays (...) in world units meet first: the point sample, without antialiasing.

    Tests every part against every ray; `write_scene` tests only those that a tile of pixels can see. A ray that
    starts inside a part does not see that part.
    """
    with jax.enable_x64(False):
        return _cast(baked_toy(), rays)
