"""Learning a function of position from points where its value is known: an image, or a signed distance."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxngp.config import ImageConfig, PointConfig, SdfConfig
from jaxngp.device import fusion_barrier
from jaxngp.fields import Params, evaluate_points
from jaxngp.images import Taps, blend_taps, pixel_taps, stratified_positions
from jaxngp.losses import colour_loss, relative_error
from jaxngp.metrics import psnr
from jaxngp.training.state import TrainState
from jaxngp.training.updates import take_steps


@struct.dataclass
class ImagePixels:
    """An image that the device holds: (H, W, 3) of u8, u16 or f32, sRGB."""

    pixels: jax.Array


@struct.dataclass
class FetchedPixels:
    """Of an image that the device does not hold, the values at the taps of K steps, (K, N, C, 3), and its size."""

    values: jax.Array
    width: int = struct.field(pytree_node=False)
    height: int = struct.field(pytree_node=False)


@struct.dataclass
class DistanceSamples:
    """Points to learn a signed distance from, in scene units, each set in random order."""

    surface: jax.Array  # (S, 3) f32, where the distance is 0
    position: jax.Array  # (Q, 3) f32, three near the surface for each one anywhere
    distance: jax.Array  # (Q,) f32, negative inside


PointData = ImagePixels | FetchedPixels | DistanceSamples


@struct.dataclass
class PointBatch:
    """N points: position (N, D) f32 in [0, 1], and the target (N, outputs) f32 of the field there."""

    position: jax.Array
    target: jax.Array


@struct.dataclass
class ImageMetrics:
    """Of one step, or averaged over several."""

    loss: jax.Array
    psnr: jax.Array  # of the batch, in dB
    samples: jax.Array
    skipped: jax.Array  # 1 where the update was left out, since loss or gradient was no finite number

    def headline(self) -> str:
        """How good the fit is, for a person who watches."""
        return f"PSNR {float(self.psnr):.2f} dB"


@struct.dataclass
class SdfMetrics:
    """Of one step, or averaged over several."""

    loss: jax.Array  # the mean relative error
    error: jax.Array  # the mean absolute error, scene units
    samples: jax.Array
    skipped: jax.Array  # as above

    def headline(self) -> str:
        """How good the fit is, for a person who watches."""
        return f"error {float(self.error):.2e}"


# Batches. All of a dispatch are drawn before its first step, each from fold_in(key, its number).


def draw_bits(step: jax.Array, key: jax.Array, *, num_steps: int, config: PointConfig) -> jax.Array:
    """All random bits of K steps from a given one on, (K, N, 2) u32 for an image and (K, N) for a distance."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(step + jnp.arange(num_steps))
    shape = (config.train.num_points, 2) if isinstance(config, ImageConfig) else (config.train.num_points,)
    return jax.vmap(lambda key: jax.random.bits(key, shape))(keys)


def draw_taps(step: jax.Array, key: jax.Array, *, width: int, height: int, num_steps: int, config: ImageConfig) -> Taps:
    """Positions of K steps from a given one on, and the pixels they need: Taps (K, N, ...)."""
    bits = draw_bits(step, key, num_steps=num_steps, config=config)

    def taps(bits: jax.Array) -> Taps:
        return pixel_taps(stratified_positions(bits), width=width, height=height, snap=config.train.snap)

    return jax.vmap(taps)(bits)


def draw_batches(
    step: jax.Array, key: jax.Array, data: PointData, *, num_steps: int, config: PointConfig
) -> PointBatch:
    """The batches (K, N, ...) of K steps from a given one on."""
    if isinstance(data, DistanceSamples):
        return _pick_samples(draw_bits(step, key, num_steps=num_steps, config=config), data)
    if isinstance(data, ImagePixels):
        height, width, _ = data.pixels.shape
    else:
        height, width = data.height, data.width
    assert isinstance(config, ImageConfig)
    taps = draw_taps(step, key, width=width, height=height, num_steps=num_steps, config=config)
    values = data.pixels[taps.row, taps.column] if isinstance(data, ImagePixels) else data.values
    return PointBatch(taps.position, blend_taps(values, taps.weight))


def _pick_samples(bits: jax.Array, data: DistanceSamples) -> PointBatch:
    """The first half from the surface, the second from the points beside it. bits (K, N) u32."""
    half = bits.shape[1] // 2
    on, off = bits[:, :half] % np.uint32(len(data.surface)), bits[:, half:] % np.uint32(len(data.distance))
    position = jnp.concatenate([data.surface[on], data.position[off]], axis=1)
    distance = jnp.concatenate([jnp.zeros(on.shape), data.distance[off]], axis=1)
    return PointBatch(position, distance[..., None])


# Steps.


def point_loss(
    params: Params, batch: PointBatch, *, config: PointConfig, half_table: jax.Array | None = None
) -> tuple[jax.Array, ImageMetrics | SdfMetrics]:
    """The mean loss of a batch: squared error of a colour, relative error of a distance."""
    prediction = evaluate_points(params, batch.position, config=config.field, half_table=half_table)
    samples, skipped = jnp.float32(len(batch.position)), jnp.float32(0)
    if isinstance(config, SdfConfig):
        loss = jnp.mean(relative_error(prediction, batch.target))
        error = jnp.mean(jnp.abs(prediction - batch.target))
        return loss, SdfMetrics(loss=loss, error=error, samples=samples, skipped=skipped)
    loss = jnp.mean(colour_loss(prediction, batch.target, loss="l2"))
    return loss, ImageMetrics(loss=loss, psnr=psnr(loss), samples=samples, skipped=skipped)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def point_steps(
    state: TrainState, data: PointData, learning_rates: jax.Array, num_steps: jax.Array, *, config: PointConfig
) -> tuple[TrainState, ImageMetrics | SdfMetrics]:
    """Up to num_steps () i32 steps at the learning_rates (K,), and their mean metrics: see `updates.take_steps`."""
    draw = functools.partial(draw_batches, num_steps=len(learning_rates), config=config)
    batches = fusion_barrier(draw, state.step, state.key, data)

    def gradient_fn(i: jax.Array, params: Params, half_table: jax.Array | None) -> tuple[Params, Any]:
        batch = jax.tree.map(lambda a: a[i], batches)
        return jax.grad(point_loss, has_aux=True)(params, batch, config=config, half_table=half_table)

    kind: Any = SdfMetrics if isinstance(config, SdfConfig) else ImageMetrics
    return take_steps(state, learning_rates, num_steps, gradient_fn, kind=kind, config=config)
