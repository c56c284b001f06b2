"""The loss of a NeRF and its steps: what the compiled training programs compute."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxngp.cameras import PosedImages, Rays, pixel_to_ray
from jaxngp.config import Background, MarchConfig, NerfConfig
from jaxngp.data.rays import RayTable
from jaxngp.device import fusion_barrier
from jaxngp.fields import Params, evaluate_density, evaluate_field
from jaxngp.losses import colour_loss
from jaxngp.marching import jitter_shape
from jaxngp.metrics import psnr
from jaxngp.occupancy import OccupancyGrid, init_occupancy, update_occupancy
from jaxngp.rendering import render_rays
from jaxngp.training.state import TrainState
from jaxngp.training.updates import take_steps
from jaxngp.visual_hull import PixelSet, survey

TrainingData = PosedImages | RayTable


@struct.dataclass
class PixelBatch:
    """R pixels: their rays and rgba (R, 4) f32 in [0, 1], colour not multiplied by alpha."""

    rays: Rays
    rgba: jax.Array


@struct.dataclass
class StepNoise:
    """All randomness of a step after the choice of pixels."""

    jitter: jax.Array  # of jitter_shape, in [0, 1)
    background: jax.Array  # (R, 3) sRGB


@struct.dataclass
class Metrics:
    """Of one step, or averaged over several."""

    loss: jax.Array
    psnr: jax.Array  # of the batch, from its mean squared error
    rays: jax.Array  # used: those whose samples fit the buffer
    samples: jax.Array  # used
    dropped_samples: jax.Array  # did not fit the buffer; their rays left the loss
    skipped: jax.Array  # 1 where the update was left out, since loss or gradient was no finite number
    occupied_fraction: jax.Array  # of the grid's cells

    def headline(self) -> str:
        """How good the fit is, for a person who watches."""
        return f"PSNR {float(self.psnr):.2f} dB"


def draw_bits(key: jax.Array, *, config: NerfConfig) -> jax.Array:
    """All random bits of a step, (R, 1 + B + 3) u32: a ray's pixel, its B jitters, its background.

    In one call: on a CPU each costs as much as a layer of the network, however little it draws.
    """
    num_rays = config.train.num_rays
    num_jitters = math.prod(jitter_shape(num_rays, sampler=config.sampler)) // num_rays
    return jax.random.bits(key, (num_rays, 1 + num_jitters + 3))


def pick_pixels(bits: jax.Array, data: TrainingData, pixels: PixelSet | None) -> PixelBatch:
    """Pixels drawn uniformly and independently from a set of all pixels of all views, or from all. bits (R,) u32.

    Of n pixels some are likelier than others by a factor of at most 1 + n / 2^32.
    """
    if isinstance(data, RayTable):
        row = _below(bits, data.rgb.shape[0])
        rays = jax.tree.map(lambda a: a[row], data.rays)
        return PixelBatch(rays=rays, rgba=jnp.concatenate([data.rgb[row], jnp.ones((len(bits), 1))], axis=1))
    num_views, height, width, _ = data.rgba.shape
    number = _below(bits, num_views * height * width) if pixels is None else pixels.nth(_below(bits, pixels.size))
    view, y, x = number // (height * width), number // width % height, number % width
    rays = pixel_to_ray(data.camera, data.c2w[view], jnp.stack([x, y], axis=-1) + 0.5)
    return PixelBatch(rays=rays, rgba=data.rgba.reshape(-1, 4)[number].astype(jnp.float32) / 255)


def _below(bits: jax.Array, count: int | jax.Array) -> jax.Array:
    """(R,) i32 in [0, count), or 0 if count is."""
    return (bits % jnp.maximum(jnp.uint32(count), 1)).astype(jnp.int32)


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


def nerf_loss(
    params: Params,
    batch: PixelBatch,
    noise: StepNoise,
    grid: OccupancyGrid | None,
    *,
    config: NerfConfig,
    half_table: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The mean loss over the rays whose samples fit, each before its own background, and what happened on the way.

    half_table: the table that the field reads in place of that in params; see `fields.make_half_table`.
    """
    field_fn = functools.partial(evaluate_field, params, config=config.field, half_table=half_table)
    out, samples = render_rays(field_fn, batch.rays, grid, noise.jitter, noise.background, sampler=config.sampler)
    alpha = batch.rgba[:, 3:]
    target = batch.rgba[:, :3] * alpha + noise.background * (1 - alpha)
    # Of each ray, whether it is used, its loss and its squared error: summed over rays together, in one pass.
    terms = jnp.stack(
        [jnp.ones_like(out.opacity)]
        + [jnp.sum(e, axis=-1) for e in (colour_loss(out.rgb, target, loss=config.train.loss), (out.rgb - target) ** 2)]
    )
    num_used, loss, squared_error = jnp.sum(jnp.where(samples.ray_complete, terms, 0), axis=1)
    count = 3 * jnp.maximum(num_used, 1)
    metrics = Metrics(
        loss=loss / count,
        psnr=psnr(squared_error / count),
        rays=num_used,
        samples=samples.num_samples.astype(jnp.float32),
        dropped_samples=samples.num_dropped.astype(jnp.float32),
        skipped=jnp.float32(0),
        occupied_fraction=occupied_fraction(grid),
    )
    return loss / count, metrics


def occupied_fraction(grid: OccupancyGrid | None) -> jax.Array:
    """The share of cells that are occupied, () f32; 1 without a grid."""
    if grid is None:
        return jnp.float32(1)
    return jnp.sum(lax.population_count(grid.occupied)) / jnp.float32(grid.density.shape[0])


def draw_batches(
    step: jax.Array, key: jax.Array, data: TrainingData, pixels: PixelSet | None, *, num_steps: int, config: NerfConfig
) -> tuple[PixelBatch, StepNoise]:
    """Pixels and noise of num_steps steps from a given one on, (K, R, ...), each from fold_in(key, its number).

    All in a few kernels, where K steps would launch K times as many for little work each.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(step + jnp.arange(num_steps))
    bits = jax.vmap(functools.partial(draw_bits, config=config))(keys)
    batch = pick_pixels(bits[..., 0].reshape(-1), data, pixels)
    batch = jax.tree.map(lambda a: a.reshape(num_steps, -1, *a.shape[1:]), batch)
    return batch, jax.vmap(functools.partial(make_noise, config=config))(bits[..., 1:])


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def nerf_steps(
    state: TrainState,
    data: TrainingData,
    pixels: PixelSet | None,
    learning_rates: jax.Array,
    num_steps: jax.Array,
    *,
    config: NerfConfig,
) -> tuple[TrainState, Metrics]:
    """Up to num_steps () i32 steps at the learning_rates (K,), and their mean metrics: see `updates.take_steps`."""
    draw = functools.partial(draw_batches, num_steps=len(learning_rates), config=config)
    batches = fusion_barrier(draw, state.step, state.key, data, pixels)

    def gradient_fn(i: jax.Array, params: Params, half_table: jax.Array | None) -> tuple[Params, Metrics]:
        batch, noise = jax.tree.map(lambda a: a[i], batches)
        gradient, metrics = jax.grad(nerf_loss, has_aux=True)(
            params, batch, noise, state.occupancy, config=config, half_table=half_table
        )
        # Not summed over steps, in none of which it changes: to count the bits of the grid takes a kernel.
        return gradient, replace(metrics, occupied_fraction=jnp.float32(0))

    state, metrics = take_steps(state, learning_rates, num_steps, gradient_fn, kind=Metrics, config=config)
    return state, replace(metrics, occupied_fraction=occupied_fraction(state.occupancy))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def refresh_occupancy(state: TrainState, *, config: NerfConfig) -> TrainState:
    """The state with its occupancy grid brought up to date (paper appendix E.2)."""
    if not isinstance(config.sampler, MarchConfig) or state.occupancy is None:
        return state
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**31)
    density_fn = functools.partial(evaluate_density, state.params, config=config.field)
    warmup = state.step < config.sampler.occupancy.warmup_steps
    return replace(state, occupancy=update_occupancy(state.occupancy, key, density_fn, warmup, config=config.sampler))


@functools.partial(jax.jit, static_argnames="config")
def survey_views(images: PosedImages, *, config: NerfConfig) -> tuple[OccupancyGrid, PixelSet]:
    """The grid before the first step, and the pixels to draw from: see `carving.survey`."""
    assert isinstance(config.sampler, MarchConfig)
    candidates, pixels = survey(images, config=config.sampler.occupancy)
    return init_occupancy(candidates), pixels
