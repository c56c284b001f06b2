"""Learning a radiance field from posed images or a table of rays: draw pixels, cast rays, compare colours."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp import refinement
from jaxngp.cameras import Cameras, PosedImages, Rays
from jaxngp.config import Background, InputError, MarchConfig, NerfConfig, program_config
from jaxngp.data.rays import RayTable
from jaxngp.device import compiled, compiler_options, default_placement, fusion_barrier, over_shares
from jaxngp.fields import Params, RadianceField
from jaxngp.losses import colour_loss
from jaxngp.marching import jitter_shape
from jaxngp.metrics import psnr
from jaxngp.occupancy import OccupancyGrid, init_occupancy, update_occupancy
from jaxngp.processes import any_of
from jaxngp.rendering import render_rays
from jaxngp.training.pixels import (
    DeviceStore,
    HostStore,
    SharedSilhouettes,
    SharedStore,
    TrainingData,
    num_pixels_of_all,
    on_host,
    widened,
)
from jaxngp.training.state import TrainState, fresh_state
from jaxngp.training.step import (
    NO_STEPS,
    Carry,
    Programs,
    apply_gradient,
    begin_steps,
    draw_bits,
    finish_steps,
    repeat_steps,
    step_options,
    zero_rates,
)
from jaxngp.visual_hull import PixelSet, Silhouettes, pixel_set, set_of_all, taking_part, visual_hull

Field = RadianceField


class RaySource(Protocol):
    """Where the rays of pixels come from: `Cameras`, or the rows of a `RayTable`."""

    def cast(self, view: jax.Array, xy: jax.Array) -> Rays:
        """The rays (R,) through pixel coordinates xy (R, 2) of views (R,) i32."""
        ...


@struct.dataclass
class PixelBatch:
    """R pixels: their view, centre coordinates and rgba (R, 4) f32 in [0, 1], colour not multiplied by alpha."""

    view: jax.Array  # (R,) i32, a view, or a row of a ray table
    xy: jax.Array  # (R, 2) f32 px
    rgba: jax.Array
    depth: jax.Array | None = None  # (R,) f32, distance along the ray, 0 where unknown; None without depths


@struct.dataclass
class StepNoise:
    """All randomness of a step after the choice of pixels."""

    jitter: jax.Array  # of jitter_shape, in [0, 1)
    background: jax.Array  # (R, 3) sRGB


@struct.dataclass
class NerfMetrics:
    """Of one step, or averaged over several."""

    loss: jax.Array
    psnr: jax.Array  # of the batch, from its mean squared error
    rays: jax.Array  # used: those whose samples fit the buffer
    samples: jax.Array  # used
    dropped_samples: jax.Array  # did not fit the buffer; their rays left the loss
    skipped: jax.Array  # 1 where the update was skipped because loss or gradient was non-finite
    occupied_fraction: jax.Array  # of the grid's cells

    def headline(self) -> str:
        """Quality of the fit in one phrase, for the progress bar."""
        return f"PSNR {float(self.psnr):.2f} dB"


def init_state(key: jax.Array, *, config: NerfConfig) -> TrainState:
    """The state before step 0; every cell of its occupancy grid is occupied."""
    state = fresh_state(key, config=config)
    if not isinstance(config.sampler, MarchConfig):
        return state
    cells = (config.sampler.occupancy.num_cascades, config.sampler.occupancy.resolution**3)
    return replace(state, occupancy=init_occupancy(jnp.ones(cells, bool)))


# Drawing.


def draw_batches(
    step: jax.Array, key: jax.Array, data: TrainingData, pixels: PixelSet | None, *, num_steps: int, config: NerfConfig
) -> tuple[PixelBatch, StepNoise]:
    """Pixels and noise of num_steps steps from a given one on, (K, R, ...), each from fold_in(key, its number)."""
    num_rays = config.train.num_rays
    bits = draw_bits(step, key, _shape_of_draw(config), num_steps=num_steps)
    batch = pick_pixels(bits[..., 0].reshape(-1), data, pixels)
    batch = jax.tree.map(lambda a: a.reshape(num_steps, num_rays, *a.shape[1:]), batch)
    return batch, jax.vmap(functools.partial(make_noise, config=config))(bits[..., 1:])


def pick_pixels(bits: jax.Array, data: TrainingData, pixels: PixelSet | None) -> PixelBatch:
    """Pixels drawn uniformly and independently from a set of all pixels of all views, or from all. bits (R,) u32.

    Of n pixels some are likelier than others by a factor of at most 1 + n / 2^32.
    """
    number = pick_numbers(bits, data.num_pixels, pixels)
    return PixelBatch(*data.pixel(number), depth=data.pixel_depth(number))


def pick_numbers(bits: jax.Array, num_pixels: int, pixels: PixelSet | None) -> jax.Array:
    """The numbers (R,) i32 of the pixels that `pick_pixels` draws. bits (R,) u32."""
    return _below(bits, num_pixels) if pixels is None else pixels.nth(_below(bits, pixels.size))


@functools.partial(jax.jit, static_argnames=("num_pixels", "config"))
def draw_numbers(
    step: jax.Array, key: jax.Array, pixels: PixelSet | None, *, num_pixels: int, config: NerfConfig
) -> jax.Array:
    """The numbers (K R,) i32 of the pixels that the K steps of a call of `nerf_steps` draw, from a given one on."""
    bits = draw_bits(step, key, _shape_of_draw(config), num_steps=config.train.steps_per_dispatch)
    return pick_numbers(bits[..., 0].reshape(-1), num_pixels, pixels)


def _shape_of_draw(config: NerfConfig) -> tuple[int, int]:
    """Random numbers of one step: of each ray its pixel, its jitters, and a background colour."""
    return config.train.num_rays, 1 + config.sampler.jitters_per_ray + 3


def _below(bits: jax.Array, count: int | jax.Array) -> jax.Array:
    """(R,) i32 in [0, count), or 0 if count is."""
    return (bits % jnp.maximum(jnp.uint32(count), jnp.uint32(1))).astype(jnp.int32)


def make_noise(bits: jax.Array, *, config: NerfConfig) -> StepNoise:
    """Jitter, and a background colour per ray. bits (R, B + 3) u32."""
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24  # as fine as float32 is below 1, and never 1
    shape = jitter_shape(config.train.num_rays, sampler=config.sampler)
    return StepNoise(
        jitter=uniform[:, :-3].reshape(shape), background=background(uniform[:, -3:], config.train.background)
    )


def background(uniform: jax.Array, kind: Background) -> jax.Array:
    """(R, 3) sRGB: random colours, one a ray, or the fixed one. uniform (R, 3) in [0, 1)."""
    return uniform if kind == "random" else jnp.full_like(uniform, 1.0 if kind == "white" else 0.0)


# The loss.


def nerf_loss(
    field: RadianceField,
    source: RaySource,
    batch: PixelBatch,
    noise: StepNoise,
    grid: OccupancyGrid | None,
    log_gain: jax.Array | None = None,
    *,
    config: NerfConfig,
) -> tuple[jax.Array, NerfMetrics]:
    """The mean loss over the rays whose samples fit, each over its own background, and the metrics of the step.

    Devices that share a program each return their part of the loss, and the metrics of the whole.
    Differentiable in the field's parameters, and in the poses and intrinsics of `source` where it is `Cameras`.
    log_gain (R, 3): of the exposure of each ray's photograph, see `refinement.exposed`.
    """
    # Behind the barrier a ray is cast once, and not once per sample.
    rays = fusion_barrier(lambda source, view, xy: source.cast(view, xy), source, batch.view, batch.xy)
    depth = batch.depth if config.train.depth_weight else None
    out, samples = render_rays(field, rays, grid, noise.jitter, noise.background, depth, sampler=config.sampler)
    alpha = batch.rgba[:, 3:]
    target = batch.rgba[:, :3] * alpha + noise.background * (1 - alpha)
    if log_gain is not None:
        out = out.replace(rgb=refinement.exposed(out.rgb, out.opacity, noise.background, log_gain))  # type: ignore[attr-defined]
    # Of each ray, whether it is used, its loss and its squared error: summed over rays together, in one pass.
    losses = jnp.sum(colour_loss(out.rgb, target, loss=config.train.loss), axis=-1)
    if depth is not None and out.depth_error is not None:  # unknown where it is 0
        losses = losses + 3 * config.train.depth_weight * jnp.where(depth > 0, out.depth_error, 0)
    terms = jnp.stack([jnp.ones_like(out.opacity), losses, jnp.sum((out.rgb - target) ** 2, axis=-1)])
    sums = jnp.sum(jnp.where(samples.ray_complete, terms, 0), axis=1)
    (num_used, loss, squared_error), num_samples, num_dropped = over_shares(
        (sums, samples.num_samples, samples.num_dropped)
    )
    count = 3 * jnp.maximum(num_used, 1)
    metrics = NerfMetrics(
        loss=loss / count,
        psnr=psnr(squared_error / count),
        rays=num_used,
        samples=num_samples.astype(jnp.float32),
        dropped_samples=num_dropped.astype(jnp.float32),
        skipped=jnp.float32(0),
        occupied_fraction=occupied_fraction(grid),
    )
    return sums[1] / count, metrics


def occupied_fraction(grid: OccupancyGrid | None) -> jax.Array:
    """The share of cells that are occupied, () f32; 1 without a grid."""
    if grid is None:
        return jnp.float32(1)
    occupied = jnp.sum(lax.population_count(grid.occupied), dtype=jnp.uint32)
    return occupied.astype(jnp.float32) / jnp.float32(grid.density.size)


def _refined(
    params: Params, learned: refinement.Refinement, data: TrainingData, batch: PixelBatch, config: NerfConfig
) -> tuple[RadianceField, RaySource, jax.Array | None]:
    """Field, cameras and log gains (R, 3) of a step that refines cameras."""
    params = refinement.weighted(params, learned, grid=config.field.encoding)
    assert isinstance(data.source, Cameras)
    cameras = refinement.corrected(data.source, learned, refine=config.refine)
    gain = refinement.log_gain(learned)
    return RadianceField.of(params, config=config.field), cameras, None if gain is None else gain[batch.view]


# The programs.


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def nerf_steps(
    state: TrainState,
    data: TrainingData,
    pixels: PixelSet | None,
    learning_rates: jax.Array | refinement.Rates,
    num_steps: jax.Array,
    *,
    config: NerfConfig,
) -> tuple[TrainState, NerfMetrics]:
    """Up to num_steps () i32 steps at the learning_rates (K,), and their mean metrics."""
    rates = learning_rates
    if isinstance(rates, refinement.Rates):
        learning_rates, state = rates.field, replace(state, refinement=rates.weigh(state.refinement))
    assert isinstance(learning_rates, jax.Array)
    max_steps = len(learning_rates)
    draw = functools.partial(draw_batches, num_steps=max_steps, config=config)
    batches = fusion_barrier(draw, state.step, state.key, data, pixels)

    def one(i: jax.Array, carry: Carry) -> Carry:
        batch, noise = jax.tree.map(lambda a: a[i], batches)
        learned = carry.state.refinement

        def loss(params: Params, free: refinement.Free | None) -> tuple[jax.Array, NerfMetrics]:
            if learned is None:
                field = RadianceField(params, carry.half_table, config.field)
                return nerf_loss(field, data.source, batch, noise, state.occupancy, config=config)
            field, source, gain = _refined(params, replace(learned, free=free), data, batch, config)  # type: ignore[arg-type]
            return nerf_loss(field, source, batch, noise, state.occupancy, gain, config=config)

        free = learned.free if learned else None
        (gradient, camera_gradient), metrics = jax.grad(loss, (0, 1), has_aux=True)(carry.params, free)
        # Not summed over steps, in none of which it changes: to count the bits of the grid takes a kernel.
        metrics = replace(metrics, occupied_fraction=jnp.float32(0))
        carry = apply_gradient(carry, gradient, metrics, learning_rates[i], config=config)
        if not isinstance(rates, refinement.Rates):
            return carry
        learned = refinement.update(learned, camera_gradient, rates.cameras[i], rates.exposure[i])
        return replace(carry, state=replace(carry.state, refinement=learned))

    carry = begin_steps(state, NerfMetrics, config=config)
    carry = repeat_steps(one, carry, num_steps, max_steps=max_steps)
    new, metrics = finish_steps(carry, NerfMetrics, num_steps, max_steps=max_steps, config=config)
    return new, replace(metrics, occupied_fraction=occupied_fraction(state.occupancy))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def refresh_occupancy(state: TrainState, *, config: NerfConfig) -> TrainState:
    """The state with its occupancy grid brought up to date (paper appendix E.2)."""
    assert isinstance(config.sampler, MarchConfig)
    assert state.occupancy is not None
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**31)
    params = refinement.weighted(state.params, state.refinement, grid=config.field.encoding)
    density = RadianceField(params, None, config.field).density
    warmup = state.step < config.sampler.occupancy.warmup_steps
    return replace(state, occupancy=update_occupancy(state.occupancy, key, density, warmup, config=config.sampler))


@functools.partial(jax.jit, static_argnames="config")
def hull_of_views(images: Silhouettes, *, config: NerfConfig) -> tuple[OccupancyGrid | None, PixelSet]:
    """The grid before the first step, and the pixels to draw from: see `visual_hull.visual_hull`.

    Where no rays march there is no grid, and the pixels are those that are not masked.
    """
    if isinstance(images, SharedSilhouettes):
        images = images.own
    if not isinstance(config.sampler, MarchConfig):
        return None, set_of_all(taking_part(images), images)
    candidates, pixels = visual_hull(images, config=config.sampler.occupancy)
    return init_occupancy(candidates), pixels


def compile_programs(state: TrainState, data: PosedImages | RayTable, config: NerfConfig) -> Programs:
    """The programs of a run. Raises InputError where there are too many pixels, or no camera sees the scene's box.

    They compile in threads: XLA compiles several programs at once, and while it does Python traces the next. The
    visual hull is computed while the other programs compile.
    """
    num_pixels = num_pixels_of_all(data)
    if num_pixels >= 2**31:
        raise InputError(f"the views have {num_pixels} pixels, and 2^31 are too many: give a --downscale")
    marching = isinstance(config.sampler, MarchConfig)
    (masked,) = any_of(isinstance(data, PosedImages) and data.keep is not None)
    chosen = isinstance(data, PosedImages) and (marching or masked)  # whether not all pixels are drawn
    every = config.sampler.occupancy.refresh_every if marching else 0  # type: ignore[union-attr]
    static, options = program_config(config), compiler_options()
    hull: Callable[[], tuple[Any, Any]] = lambda: (None, None)  # noqa: E731
    refresh: Any = None
    pixels = jax.eval_shape(pixel_set, jax.ShapeDtypeStruct((num_pixels,), bool)) if chosen else None
    if config.refine.any and default_placement().mesh is not None:
        raise InputError("--refine trains on a single device: leave --mesh away")
    if config.refine.any and state.refinement is None:
        state = replace(state, refinement=init_refinement(data, config))
    learned = state.refinement
    store = _make_store(state, data, pixels, config)
    # A thread starts without the context of its caller, in which `device.formulation` may have been chosen.
    contexts = [contextvars.copy_context() for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        if chosen:

            def find_hull() -> tuple[OccupancyGrid | None, PixelSet]:
                views: Any = store.views()
                if config.refine.cameras and isinstance(data, PosedImages):
                    views = widened(data, config.refine.margin)
                return compiled(hull_of_views, views, options=options, config=static)(views)

            hull = threads.submit(contexts[0].run, find_hull).result
        if marching:
            refresh = threads.submit(
                contexts[1].run, compiled, refresh_occupancy, state, options=options, donate=True, config=static
            )
        zero = zero_rates(config)
        some_rates = refinement.rates(np.asarray(zero), np.zeros(len(zero)), config=config) if learned else zero
        arguments = (state, store.data, pixels, some_rates, NO_STEPS)
        steps = compiled(nerf_steps, *arguments, options=step_options(config), donate=True, config=static)
        grid, pixels = hull()

    def with_hull(state: TrainState) -> TrainState:
        jax.block_until_ready((grid, pixels))
        if learned is not None:
            state = replace(state, refinement=default_placement().put(learned))
        if grid is None:
            return state
        _check_candidates(grid)
        return replace(state, occupancy=grid)

    def take_steps(state: TrainState, step: int, rates: jax.Array, number: int) -> tuple[TrainState, NerfMetrics]:
        return steps(state, store.drawn(step, state.key, pixels), pixels, rates, np.int32(number))

    return Programs(
        steps=take_steps,
        begin=with_hull,
        refresh=refresh.result() if refresh else lambda state: state,
        refresh_every=every,
    )


def init_refinement(data: PosedImages | RayTable, config: NerfConfig) -> refinement.Refinement:
    """No corrections yet. Raises InputError for rays that come from no cameras."""
    if not isinstance(data, PosedImages):
        raise InputError("--refine corrects cameras, and a table of rays has none: train on it without")
    return refinement.init_refinement(data.cameras, config=config)


def _make_store(
    state: TrainState, data: PosedImages | RayTable, pixels: PixelSet | None, config: NerfConfig
) -> DeviceStore | SharedStore | HostStore:
    if not on_host(data, config.train.images_on):
        shared = isinstance(data, PosedImages) and default_placement().mesh is not None
        return SharedStore(data) if shared else DeviceStore(data)  # type: ignore[arg-type]
    assert isinstance(data, PosedImages)
    static: Any = {"num_pixels": num_pixels_of_all(data), "config": program_config(config)}
    draw = compiled(draw_numbers, NO_STEPS, state.key, pixels, options=compiler_options(), **static)
    size = config.train.steps_per_dispatch
    return HostStore(data, draw, steps_per_call=size, pixels_per_call=size * config.train.num_rays)


def _check_candidates(grid: OccupancyGrid) -> None:
    if not np.any(np.asarray(grid.occupied)):
        raise InputError(
            "no camera sees anything in the scene's box: set scene.box_centre and scene.box_side by --override, in the "
            "units of the poses"
        )


# Training warnings.

FEW_RAYS = 0.15
"""Of those drawn; a well-configured run ends far above it."""


def training_warnings(metrics: NerfMetrics, *, step: int, finished: bool, config: NerfConfig) -> dict[str, str]:
    """Warnings about the last steps, by a name under which each is said once."""
    found = {}
    if float(metrics.occupied_fraction) == 0:
        found["empty"] = (
            f"step {step}: the occupancy grid is empty, so no samples are taken and training cannot recover. "
            "Train from scratch with a lower optimizer.learning_rate or sampler.occupancy.threshold, by --override"
        )
    used = float(metrics.rays) / config.train.num_rays
    if finished and isinstance(config.sampler, MarchConfig) and used < FEW_RAYS:
        found["dropped"] = (
            f"only {used:.0%} of the rays drawn in the last steps fitted the sample buffer, and the others were "
            "wasted: raise sampler.num_samples or lower train.num_rays, by --override"
        )
    return found
