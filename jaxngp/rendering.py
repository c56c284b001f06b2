"""From rays to colours: `render_rays` for a batch in training, `render_image` for whole views."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Camera, Rays, view_rays
from jaxngp.compositing import RenderOutput, blend, composite, optical_weights
from jaxngp.config import MarchConfig, StratifiedConfig
from jaxngp.fusion import walled
from jaxngp.marching import Candidates, Samples, find_candidates, jitter_shape, nth_candidate, sample_rays
from jaxngp.occupancy import OccupancyGrid

FieldFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""position (N, 3), direction (N, 3) -> density (N,) per scene unit, rgb (N, 3)."""

Sampler = MarchConfig | StratifiedConfig


def render_rays(
    field_fn: FieldFn,
    rays: Rays,
    grid: OccupancyGrid | None,
    jitter: jax.Array,
    background: jax.Array,
    *,
    sampler: Sampler,
) -> tuple[RenderOutput, Samples]:
    """The colour of R rays: sample, evaluate the field, composite. Differentiable in the field and the background.

    jitter: uniform noise of `marching.jitter_shape`; all 0.5 is deterministic. background (R, 3) sRGB. A ray whose
    samples did not fit the buffer (samples.ray_complete is False) has no meaningful colour.
    """
    rays = jax.tree.map(jnp.asarray, rays)
    samples = walled(functools.partial(sample_rays, sampler=sampler), rays, grid, jitter)
    origin, direction = rays.origin[samples.ray], rays.direction[samples.ray]
    density, rgb = field_fn(origin + samples.t[:, None] * direction, direction)
    return composite(density, rgb, samples.t, samples.dt, samples.ray, background), samples


# A whole view. Training spends a fixed budget of samples and may leave rays out; a view must take every sample of
# every ray. Rays end at very different depths, so a fixed number of lanes each carry one ray, take its next few
# samples in every round, and when it ends (no sample left, or too little light gets through) write it out and
# pick up the next ray in line. No sample is evaluated behind an opaque surface, and none is dropped.

_MAX_CHUNK = 2**18  # rays in one call of the compiled program
_LANES = 2**13
_SAMPLES_PER_ROUND = 8


@struct.dataclass
class _Lanes:
    """What each lane holds: the place of its ray in the queue, samples taken, and the sums over them."""

    place: jax.Array  # (lanes,) i32; the queue's length or more where the lane idles
    taken: jax.Array  # (lanes,) i32
    transmittance: jax.Array  # (lanes,)
    sums: jax.Array  # (lanes, 5): weighted sums of rgb, 1 and t


@functools.partial(jax.jit, static_argnames=("make_field", "sampler"))
def render_chunk(
    params: Any,
    rays: Rays,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    make_field: Callable[[Any], FieldFn],
    sampler: Sampler,
) -> tuple[RenderOutput, jax.Array]:
    """The colour of R rays, every sample taken. background (3,). Also the number of field evaluations () i32.

    The field is make_field(params); make_field is static, so pass the same function object every time.
    """
    field_fn = make_field(params)
    if isinstance(sampler, StratifiedConfig):
        return _render_stratified(field_fn, rays, background, sampler)
    if grid is None:
        raise ValueError("grid = None: marching needs an OccupancyGrid")
    return _render_marched(field_fn, rays, grid, background, sampler)


def _render_stratified(
    field_fn: FieldFn, rays: Rays, background: jax.Array, sampler: StratifiedConfig
) -> tuple[RenderOutput, jax.Array]:
    def one_ray(ray: Rays) -> RenderOutput:
        ray = jax.tree.map(lambda a: a[None], ray)
        jitter = jnp.full(jitter_shape(1, sampler=sampler), 0.5)
        out, _ = render_rays(field_fn, ray, None, jitter, background[None], sampler=sampler)
        return jax.tree.map(lambda a: a[0], out)

    evaluations = jnp.int32(rays.origin.shape[0] * sampler.num_bins)
    return lax.map(one_ray, rays, batch_size=2**9), evaluations


def _render_marched(
    field_fn: FieldFn, rays: Rays, grid: OccupancyGrid, background: jax.Array, sampler: MarchConfig
) -> tuple[RenderOutput, jax.Array]:
    num_rays = rays.origin.shape[0]
    num_lanes = min(_LANES, num_rays)
    jitter = jnp.full(num_rays, 0.5)
    candidates = walled(functools.partial(find_candidates, config=sampler), rays, grid, jitter)
    counts = jnp.sum(lax.population_count(candidates.words), axis=-1, dtype=jnp.int32)
    # The rays that meet an occupied cell, in image order: neighbours read neighbouring table rows.
    queue = jnp.nonzero(counts > 0, size=num_rays, fill_value=0)[0].astype(jnp.int32)
    length = jnp.sum(counts > 0, dtype=jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        lanes, *_ = carry
        return jnp.any(lanes.place < length)

    def advance(carry: tuple) -> tuple:
        lanes, sums, next_place, rounds = carry
        ray = queue[jnp.minimum(lanes.place, num_rays - 1)]
        active = lanes.place < length
        lanes = _take_samples(field_fn, lanes, rays, candidates, ray, jnp.where(active, counts[ray], 0), sampler)
        ended = (lanes.taken >= counts[ray]) | (lanes.transmittance < sampler.min_transmittance)
        sums = sums.at[jnp.where(ended & active, ray, num_rays)].set(lanes.sums, mode="drop")
        return _refill(lanes, ended, next_place), sums, next_place + jnp.sum(ended, dtype=jnp.int32), rounds + 1

    lanes = _Lanes(
        place=jnp.arange(num_lanes, dtype=jnp.int32),
        taken=jnp.zeros(num_lanes, jnp.int32),
        transmittance=jnp.ones(num_lanes),
        sums=jnp.zeros((num_lanes, 5)),
    )
    carry = (lanes, jnp.zeros((num_rays, 5)), jnp.int32(num_lanes), jnp.int32(0))
    _, sums, _, rounds = lax.while_loop(unfinished, advance, carry)
    out = blend(sums[:, :3], sums[:, 3], sums[:, 4], background)
    return out, rounds * num_lanes * _SAMPLES_PER_ROUND


def _take_samples(
    field_fn: FieldFn,
    lanes: _Lanes,
    rays: Rays,
    candidates: Candidates,
    ray: jax.Array,
    count: jax.Array,
    sampler: MarchConfig,
) -> _Lanes:
    """Every lane takes the next samples of its ray, those that are left of `count` (lanes,)."""
    num_lanes = ray.shape[0]
    number = lanes.taken[:, None] + jnp.arange(_SAMPLES_PER_ROUND)
    lane_ray = jnp.repeat(ray, _SAMPLES_PER_ROUND)
    step = nth_candidate(candidates.words, lane_ray, number.reshape(-1)).reshape(number.shape)
    t = candidates.t_start[ray][:, None] + (step + 0.5) * sampler.step_size
    direction = rays.direction[ray][:, None]
    position = rays.origin[ray][:, None] + t[..., None] * direction
    direction = jnp.broadcast_to(direction, position.shape)
    density, rgb = field_fn(position.reshape(-1, 3), direction.reshape(-1, 3))

    dt = jnp.where(number < count[:, None], sampler.step_size, 0.0)
    weights, through = jax.vmap(optical_weights)(density.reshape(dt.shape), dt)
    weights = weights * lanes.transmittance[:, None]
    rgb = rgb.reshape(num_lanes, _SAMPLES_PER_ROUND, 3)
    terms = jnp.concatenate([rgb, jnp.ones_like(t)[..., None], t[..., None]], axis=-1)
    return _Lanes(
        place=lanes.place,
        taken=lanes.taken + _SAMPLES_PER_ROUND,
        transmittance=lanes.transmittance * through,
        sums=lanes.sums + jnp.sum(weights[..., None] * terms, axis=1),
    )


def _refill(lanes: _Lanes, ended: jax.Array, next_place: jax.Array) -> _Lanes:
    """Lanes whose ray ended start on the next rays in line, in the order of the lanes."""
    rank = jnp.cumsum(ended.astype(jnp.int32)) - 1
    return _Lanes(
        place=jnp.where(ended, next_place + rank, lanes.place),
        taken=jnp.where(ended, 0, lanes.taken),
        transmittance=jnp.where(ended, 1.0, lanes.transmittance),
        sums=jnp.where(ended[:, None], 0.0, lanes.sums),
    )


def render_image(
    params: Any,
    camera: Camera,
    c2w: jax.Array,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    make_field: Callable[[Any], FieldFn],
    sampler: Sampler,
) -> RenderOutput:
    """A whole view as numpy arrays: rgb (H, W, 3), opacity (H, W), depth (H, W). c2w (3, 4), background (3,)."""
    rays = jax.jit(view_rays)(camera, c2w)
    return render_ray_grid(params, rays, grid, background, make_field=make_field, sampler=sampler)


def render_ray_grid(
    params: Any,
    rays: Rays,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    make_field: Callable[[Any], FieldFn],
    sampler: Sampler,
) -> RenderOutput:
    """Rays (H, W), or of any other shape, in equal chunks that one compiled program serves; as numpy arrays.

    The last chunk is filled up with copies of the last ray, which are thrown away.
    """
    shape = rays.origin.shape[:-1]
    total = int(np.prod(shape))
    num_chunks = -(-total // _MAX_CHUNK)
    chunk = -(-total // num_chunks)
    index = np.minimum(np.arange(num_chunks * chunk), total - 1).reshape(num_chunks, chunk)
    flat = jax.tree.map(lambda a: a.reshape(-1, 3), rays)
    parts = []
    for rows in index:
        part = jax.tree.map(lambda a, rows=rows: a[rows], flat) if num_chunks > 1 else flat
        out, _ = render_chunk(params, part, grid, background, make_field=make_field, sampler=sampler)
        parts.append(jax.tree.map(np.asarray, out))  # off the device: a view may be larger than what is left of it
    return jax.tree.map(lambda *a: np.concatenate(a)[:total].reshape(*shape, *a[0].shape[1:]), *parts)
