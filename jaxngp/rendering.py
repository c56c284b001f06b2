"""From rays to colours: `render_rays` for a batch in training, `render_view` for whole views."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from jaxngp.bitsets import count_bits, nth_bit_of_row
from jaxngp.cameras import Cameras, Rays, view_rays
from jaxngp.compositing import RenderOutput, blend, composite, optical_weights
from jaxngp.config import MarchConfig, StratifiedConfig
from jaxngp.device import (
    CPU_BATCHING,
    PARTS,
    Batching,
    compiler_options,
    default_batching,
    default_placement,
    fusion_barrier,
    largest,
)
from jaxngp.marching import (
    Candidates,
    Field,
    Samples,
    find_candidates,
    jitter_shape,
    sample_rays,
)
from jaxngp.occupancy import OccupancyGrid

Sampler = MarchConfig | StratifiedConfig


def render_rays(
    field: Field,
    rays: Rays,
    grid: OccupancyGrid | None,
    jitter: jax.Array,
    background: jax.Array,
    known_depth: jax.Array | None = None,
    *,
    sampler: Sampler,
) -> tuple[RenderOutput, Samples]:
    """The colour of R rays: sample, evaluate the field, composite. Differentiable in the field and the background.

    jitter: uniform noise of `marching.jitter_shape`; all 0.5 is deterministic. background (R, 3) sRGB. known_depth (R,)
    is for `RenderOutput.depth_error`. A ray whose samples did not fit the buffer (samples.ray_complete is False)
    has no meaningful colour.
    """
    rays = jax.tree.map(jnp.asarray, rays)
    samples = fusion_barrier(functools.partial(sample_rays, field=field, sampler=sampler), rays, grid, jitter)
    origin, direction = rays.origin[samples.ray], rays.direction[samples.ray]
    density, rgb = field(origin + samples.t[:, None] * direction, direction)
    return composite(density, rgb, samples.t, samples.dt, samples.ray, background, known_depth), samples


# A whole view. Training spends a fixed budget of samples and may leave rays out; a view must take every sample of
# every ray. Rays end at very different depths, so a fixed number of lanes each carry one ray, take its next few
# samples in every round, and when it ends (no sample left, or too little light gets through) write it out and
# pick up the next ray in line. No sample is evaluated behind an opaque surface, and none is dropped.


@struct.dataclass
class _Lanes:
    """What each lane holds: the place of its ray in the queue, samples taken, and the sums over them."""

    place: jax.Array  # (lanes,) i32; the queue's length or more where the lane idles
    taken: jax.Array  # (lanes,) i32
    transmittance: jax.Array  # (lanes,)
    sums: jax.Array  # (lanes, 5): weighted sums of rgb, 1 and t


@functools.partial(jax.jit, static_argnames=("sampler", "batching"))
def render_chunk(
    field: Field,
    rays: Rays,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    sampler: Sampler,
    batching: Batching = CPU_BATCHING,
) -> tuple[RenderOutput, jax.Array]:
    """The colour of R rays, every sample taken. background (3,). Also the number of field evaluations () f32."""
    if isinstance(sampler, StratifiedConfig):
        return _render_stratified(field, rays, background, sampler)
    if grid is None:
        raise ValueError("grid = None: marching needs an OccupancyGrid")
    return _render_marched(field, rays, grid, background, sampler, batching)


def _render_stratified(
    field: Field, rays: Rays, background: jax.Array, sampler: StratifiedConfig
) -> tuple[RenderOutput, jax.Array]:
    def one_ray(ray: Rays) -> RenderOutput:
        ray = jax.tree.map(lambda a: a[None], ray)
        jitter = jnp.full(jitter_shape(1, sampler=sampler), 0.5, jnp.float32)
        out, _ = render_rays(field, ray, None, jitter, background[None], sampler=sampler)
        return jax.tree.map(lambda a: a[0], out)

    out = lax.map(one_ray, rays, batch_size=2**9)
    samples = jnp.full(out.opacity.shape, sampler.num_bins, jnp.int32)
    return out.replace(samples=samples), jnp.float32(samples.size * sampler.num_bins)


def _render_marched(
    field: Field, rays: Rays, grid: OccupancyGrid, background: jax.Array, sampler: MarchConfig, batching: Batching
) -> tuple[RenderOutput, jax.Array]:
    num_rays = rays.origin.shape[0]
    num_lanes = min(batching.lanes, num_rays)
    # Behind the barrier it is data like any other: knowing it, XLA:GPU moves its sums out of the march, to memory.
    jitter = lax.optimization_barrier(jnp.full(num_rays, 0.5, jnp.float32))
    candidates = fusion_barrier(functools.partial(find_candidates, config=sampler), rays, grid, jitter)
    ends = fusion_barrier(count_bits, candidates.words)
    counts = ends[:, -1]
    queue, length = longest_first(counts, batching.samples)

    def unfinished(carry: tuple) -> jax.Array:
        lanes, *_ = carry
        return largest(jnp.any(lanes.place < length))

    def advance(carry: tuple) -> tuple:
        lanes, sums, samples, next_place, rounds = carry
        ray = queue[jnp.minimum(lanes.place, num_rays - 1)]
        active = lanes.place < length
        count = jnp.where(active, counts[ray], 0)
        lanes = _take_samples(field, lanes, rays, candidates, ends, ray, count, batching.samples)
        ended = (lanes.taken >= counts[ray]) | (lanes.transmittance < sampler.min_transmittance)
        row = jnp.where(ended & active, ray, num_rays)
        sums = sums.at[row].set(lanes.sums, mode="drop")
        samples = samples.at[row].set(jnp.minimum(lanes.taken, counts[ray]), mode="drop")
        refilled, next_place = _refill(lanes, ended, next_place), next_place + jnp.sum(ended, dtype=jnp.int32)
        return refilled, sums, samples, next_place, rounds + 1

    lanes = _Lanes(
        place=jnp.arange(num_lanes, dtype=jnp.int32),
        taken=jnp.zeros(num_lanes, jnp.int32),
        transmittance=jnp.ones(num_lanes, jnp.float32),
        sums=jnp.zeros((num_lanes, 5), jnp.float32),
    )
    sums, samples = jnp.zeros((num_rays, 5), jnp.float32), jnp.zeros(num_rays, jnp.int32)
    carry = (lanes, sums, samples, jnp.int32(num_lanes), jnp.int32(0))
    _, sums, samples, _, rounds = lax.while_loop(unfinished, advance, carry)
    out = blend(sums[:, :3], sums[:, 3], sums[:, 4], background).replace(samples=samples)  # type: ignore[attr-defined]
    return out, rounds.astype(jnp.float32) * (num_lanes * batching.samples)


def longest_first(counts: jax.Array, per_round: int) -> tuple[jax.Array, jax.Array]:
    """The rays (R,) i32 that have any of the counts (R,) of samples, and behind them others; and how many () i32.

    In four classes, those with the most rounds before them first: started last, they would keep a few lanes busy and
    all others waiting. Within a class in image order, for neighbours read neighbouring table rows.
    """
    num_rays = len(counts)
    rank = jnp.sum(counts[:, None] <= per_round * np.array([16, 8, 4]), axis=1, dtype=jnp.int32)
    member = (rank[:, None] == np.arange(4)) & (counts > 0)[:, None]
    number = jnp.cumsum(member, axis=0, dtype=jnp.int32)
    size = number[-1]
    before = jnp.cumsum(size, dtype=jnp.int32) - size
    place = jnp.sum(jnp.where(member, number - 1 + before, 0), axis=1, dtype=jnp.int32)
    places = jnp.where(counts > 0, place, num_rays)
    queue = jnp.zeros(num_rays, jnp.int32).at[places].set(jnp.arange(num_rays, dtype=jnp.int32), mode="drop")
    return queue, jnp.sum(size, dtype=jnp.int32)


def _take_samples(
    field: Field,
    lanes: _Lanes,
    rays: Rays,
    candidates: Candidates,
    ends: jax.Array,
    ray: jax.Array,
    count: jax.Array,
    num_samples: int,
) -> _Lanes:
    """Every lane takes the next `num_samples` samples of its ray, those that are left of `count` (lanes,)."""
    num_lanes = ray.shape[0]
    number = lanes.taken[:, None] + jnp.arange(num_samples, dtype=jnp.int32)
    lane_ray = jnp.repeat(ray, num_samples)
    step = nth_bit_of_row(candidates.words, ends, lane_ray, number.reshape(-1)).reshape(number.shape)
    steps = candidates.steps[ray][:, None]
    t = steps.t_at(step)
    direction = rays.direction[ray][:, None]
    position = rays.origin[ray][:, None] + t[..., None] * direction
    direction = jnp.broadcast_to(direction, position.shape)
    density, rgb = field(position.reshape(-1, 3), direction.reshape(-1, 3))

    dt = jnp.where(number < count[:, None], steps.dt_at(step), 0.0)
    weights, through = jax.vmap(optical_weights)(density.reshape(dt.shape), dt)
    weights = weights * lanes.transmittance[:, None]
    rgb = rgb.reshape(num_lanes, num_samples, 3)
    terms = jnp.concatenate([rgb, jnp.ones_like(t)[..., None], t[..., None]], axis=-1)
    return _Lanes(
        place=lanes.place,
        taken=lanes.taken + num_samples,
        transmittance=lanes.transmittance * through,
        sums=lanes.sums + jnp.sum(weights[..., None] * terms, axis=1),
    )


def _refill(lanes: _Lanes, ended: jax.Array, next_place: jax.Array) -> _Lanes:
    """Lanes whose ray ended start on the next rays in line, in the order of the lanes."""
    rank = jnp.cumsum(ended, dtype=jnp.int32) - 1
    return _Lanes(
        place=jnp.where(ended, next_place + rank, lanes.place),
        taken=jnp.where(ended, 0, lanes.taken),
        transmittance=jnp.where(ended, 1.0, lanes.transmittance),
        sums=jnp.where(ended[:, None], 0.0, lanes.sums),
    )


def render_view(
    field: Field,
    camera: Cameras,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    sampler: Sampler,
    batching: Batching | None = None,
) -> RenderOutput:
    """The view of a single camera as numpy arrays: rgb (H, W, 3), opacity (H, W), depth (H, W). background (3,)."""
    return render_ray_grid(field, view_rays(camera), grid, background, sampler=sampler, batching=batching)


@functools.lru_cache(maxsize=64)
def chunk_program(
    sampler: Sampler, batching: Batching, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., tuple[RenderOutput, jax.Array]]:
    """`render_chunk` with the device's compiler options, which only the outermost program can give.

    mesh: devices that take equal parts of the rays, of which `placement.local` has the axis.
    """
    chunk: Callable[..., Any] = functools.partial(render_chunk, sampler=sampler, batching=batching)
    if mesh is not None:
        chunk = _in_parts(chunk, mesh)
    return jax.jit(chunk, compiler_options=compiler_options())


def _in_parts(chunk: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    parts, whole = PartitionSpec(PARTS), PartitionSpec()

    def part(field: Field, rays: Rays, grid: OccupancyGrid | None, background: jax.Array) -> Any:
        out, evaluations = chunk(field, rays, grid, background)
        return out, lax.psum(evaluations, PARTS)

    specs = (whole, parts, whole, whole)
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(parts, whole), check_vma=False)


def render_ray_grid(
    field: Field,
    rays: Rays,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    sampler: Sampler,
    batching: Batching | None = None,
) -> RenderOutput:
    """Rays (H, W), or of any other shape, in equal chunks that one compiled program serves; as numpy arrays.

    The last chunk is filled up with copies of the last ray, which are thrown away. batching: by default
    `device.default_batching()`, for each of the devices of this process that `device.placed_on` names.
    """
    batching, place = batching or default_batching(), default_placement().local
    shape = rays.origin.shape[:-1]
    total, count = int(np.prod(shape)), place.num_shares
    num_chunks = -(-total // (batching.rays * count))
    chunk = -(-total // (num_chunks * count)) * count
    index = np.minimum(np.arange(num_chunks * chunk), total - 1).reshape(num_chunks, chunk)
    # The devices take turns with the rays, so that none has the sky for itself.
    index = index.reshape(num_chunks, -1, count).swapaxes(1, 2).reshape(num_chunks, chunk)
    flat = jax.tree.map(lambda a: a.reshape(-1, 3), rays)
    program, parts = chunk_program(sampler, batching, place.mesh), []
    if default_placement().mesh is not None:
        field, flat, grid, background = place.put((field, flat, grid, background))
    for rows in index:
        part = jax.tree.map(lambda a, rows=rows: a[rows], flat) if num_chunks * count > 1 else flat
        out, _ = program(field, part, grid, background)
        parts.append(jax.tree.map(np.asarray, out))  # off the device: a view may be larger than what is left of it
    order = np.argsort(index.reshape(-1), kind="stable")[:total] if count > 1 else slice(total)
    return jax.tree.map(lambda *a: np.concatenate(a)[order].reshape(*shape, *a[0].shape[1:]), *parts)
