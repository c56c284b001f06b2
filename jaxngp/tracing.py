"""From rays to the surface of a signed distance: sphere tracing (Hart 1996), normals, and how a surface looks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Rays
from jaxngp.device import CPU_BATCHING, default_batching, largest
from jaxngp.marching import box_interval

Distance = Callable[[jax.Array], jax.Array]
"""position (N, 3) scene units -> signed distance (N,), negative inside; a pytree where it crosses a jit, as a
`fields.DistanceField` or a `jax.tree_util.Partial` is."""

ROUND = 4
"""Evaluations of a lane before the rays that ended make room for others."""

SHRINK = (1, 8, 64)
"""By which the number of lanes is divided as fewer rays are left; else the last few would keep all lanes waiting."""


@struct.dataclass
class Hits:
    """Where R rays meet a surface: distance t along the ray (R,), and whether they do (R,)."""

    t: jax.Array
    hit: jax.Array
    unfinished: jax.Array  # () i32: rays that took max_steps without meeting it or leaving the box, counted as misses


@functools.partial(jax.jit, static_argnames=("lanes", "max_steps"))
def trace_rays(
    distance: Distance,
    rays: Rays,
    box: jax.Array,
    *,
    tolerance: float = 1e-4,
    lanes: int = CPU_BATCHING.tracing_lanes,
    max_steps: int = 256,
) -> Hits:
    """Walk R rays through a box (2, 3), by the distance to the surface at each step, until it is within `tolerance`.

    A step into the solid is taken back by its negative distance; but a ray that starts in the solid, or enters the box
    in it, meets it there. Rays end at very different numbers of steps, so that in every round only `lanes` of those
    still on their way are evaluated; the result does not depend on how many.
    """
    num_rays = len(rays.origin)
    near, far = box_interval(rays, box[0], box[1])
    t, steps, active, hit = near, jnp.zeros(num_rays, jnp.int32), near < far, jnp.zeros(num_rays, bool)

    def advance(carry: tuple, *, width: int) -> tuple:
        t, steps, active, hit = carry
        index = jnp.nonzero(active, size=width, fill_value=num_rays)[0].astype(jnp.int32)
        # Lanes without a ray write to places of their own beyond the end: a GPU then needs no atomic operations.
        index = jnp.where(index < num_rays, index, num_rays + jnp.arange(width, dtype=jnp.int32))
        picked = jnp.minimum(index, num_rays - 1)
        origin, direction = rays.origin[picked], rays.direction[picked]
        first, end = near[picked], far[picked]
        lane_t, lane_steps = t[picked], steps[picked]

        def step(_: int, lane: tuple) -> tuple:
            t, steps, going, found = lane
            to_surface = distance(origin + t[:, None] * direction)
            found |= going & ((jnp.abs(to_surface) < tolerance) | (to_surface < 0) & (t <= first))
            going &= ~found
            t, steps = jnp.where(going, t + to_surface, t), steps + going
            return t, steps, going & (t < end) & (steps < max_steps), found

        lane = (lane_t, lane_steps, index < num_rays, jnp.zeros(width, bool))
        lane_t, lane_steps, going, found = lax.fori_loop(0, ROUND, step, lane)
        return (
            t.at[index].set(lane_t, mode="drop", unique_indices=True),
            steps.at[index].set(lane_steps, mode="drop", unique_indices=True),
            active.at[index].set(going, mode="drop", unique_indices=True),
            hit.at[index].set(found, mode="drop", unique_indices=True),
        )

    carry = (t, steps, active, hit)
    widths = [max(1, min(lanes, num_rays) // shrink) for shrink in SHRINK]
    for width, least in zip(widths, [*widths[1:], 0], strict=True):
        many = functools.partial(_more_than, least)
        carry = lax.while_loop(many, functools.partial(advance, width=width), carry)
    t, steps, _, hit = carry
    return Hits(t, hit, jnp.sum((steps >= max_steps) & ~hit & (t < far), dtype=jnp.int32))


def _more_than(least: int, carry: tuple) -> jax.Array:
    """Whether more than so many rays are on their way."""
    return largest(jnp.sum(carry[2], dtype=jnp.int32)) > least


def surface_normals(distance: Distance, position: jax.Array, *, width: float) -> jax.Array:
    """The direction in which the distance grows: (N, 3) -> unit (N, 3), outwards.

    By differences over the corners of a tetrahedron `width` away: the gradient itself jumps at every face of the
    encoding's cells, which on a picture are facets.
    """
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], np.float32)
    moved = position[:, None] + width / 3**0.5 * corners
    values = distance(moved.reshape(-1, 3)).reshape(-1, 4, 1)
    gradient = jnp.sum(values * corners, axis=1)
    return gradient / jnp.maximum(jnp.linalg.norm(gradient, axis=1, keepdims=True), 1e-12)


SKY, LAMP = (np.array(rgb, np.float32) for rgb in ((0.76, 0.80, 0.86), (0.52, 0.48, 0.42)))


@struct.dataclass
class SurfaceView:
    """What R rays see of a surface."""

    rgb: jax.Array  # (R, 3) sRGB, white where nothing is
    normal: jax.Array  # (R, 3) unit, scene units; 0 where nothing is
    depth: jax.Array  # (R,) distance along the ray
    opacity: jax.Array  # (R,) 1 or 0
    unfinished: jax.Array  # () i32, as in Hits


def draw_surface(
    distance: Distance,
    rays: Rays,
    box: jax.Array,
    light: jax.Array,
    up: jax.Array,
    *,
    normal_width: float = 1e-3,
    shadows: bool = True,
    lanes: int | None = None,
) -> SurfaceView:
    """R rays, traced and shaded: a matt surface under a sky, and one lamp far away.

    light, up (3,) unit: where the lamp is, and where the sky is brightest. Shadows are traced from the surface towards
    the lamp. lanes: by default those of `device.default_batching()`.
    """
    lanes = lanes or default_batching().tracing_lanes
    # Programs of their own, not one: the walk, of which most is compiled, is the same for both kinds of rays.
    trace = functools.partial(trace_rays, distance, box=box, lanes=lanes)
    hits = trace(rays)
    position = rays.origin + hits.t[:, None] * rays.direction
    normal = _normals_of_hits(distance, hits.hit, position, normal_width, lanes=lanes)
    shadow = jnp.zeros_like(hits.hit)
    if shadows:
        shadow = trace(_shadow_rays(hits.hit, position, normal, light, box, 4 * normal_width)).hit
    return _shade(hits, normal, shadow, light, up)


@jax.jit
def _shadow_rays(
    hit: jax.Array, position: jax.Array, normal: jax.Array, light: jax.Array, box: jax.Array, gap: float
) -> Rays:
    """From where the surface is seen and turned to the lamp, `gap` above it; all others start outside and leave."""
    facing = (hit & (normal @ light > 0))[:, None]
    return Rays(
        origin=jnp.where(facing, position + gap * normal, box[0] - 1),
        direction=jnp.where(facing, light, np.array([-1, 0, 0], np.float32)),
    )


@jax.jit
def _shade(hits: Hits, normal: jax.Array, shadow: jax.Array, light: jax.Array, up: jax.Array) -> SurfaceView:
    lit = jnp.where(shadow, 0, jnp.maximum(normal @ light, 0))[:, None]
    open_sky = 0.5 + 0.5 * (normal @ up)[:, None]
    rgb = SKY * (0.2 + 0.4 * open_sky) + LAMP * lit
    return SurfaceView(
        rgb=jnp.where(hits.hit[:, None], jnp.clip(rgb, 0, 1), 1.0),
        normal=normal,
        depth=hits.t,
        opacity=hits.hit.astype(jnp.float32),
        unfinished=hits.unfinished,
    )


@functools.partial(jax.jit, static_argnames="lanes")
def _normals_of_hits(distance: Distance, hit: jax.Array, position: jax.Array, width: float, *, lanes: int) -> jax.Array:
    """The normals (R, 3) where `hit`, evaluated `lanes` at a time and nowhere else; 0 elsewhere."""
    num_rays = len(position)
    lanes = min(lanes, num_rays)
    found = jnp.nonzero(hit, size=num_rays, fill_value=num_rays)[0].astype(jnp.int32)
    order = jnp.concatenate([found, jnp.full(lanes, num_rays, jnp.int32)])
    order = jnp.where(
        order < num_rays, order, num_rays + jnp.arange(num_rays + lanes, dtype=jnp.int32)
    )  # as in trace_rays

    def one(carry: tuple) -> tuple:
        first, normals = carry
        index = lax.dynamic_slice(order, (first,), (lanes,))
        found = surface_normals(distance, position[jnp.minimum(index, num_rays - 1)], width=width)
        return first + lanes, normals.at[index].set(found, mode="drop", unique_indices=True)

    start = (jnp.int32(0), jnp.zeros((num_rays, 3), jnp.float32))
    count = largest(jnp.sum(hit, dtype=jnp.int32))
    return lax.while_loop(lambda carry: carry[0] < count, one, start)[1]
