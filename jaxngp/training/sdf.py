"""Learning the signed distance to a solid from points whose distance is known (paper section 5.2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxngp.config import SdfConfig, program_config
from jaxngp.device import compiled, default_placement, fusion_barrier, num_shares, over_shares, own_share
from jaxngp.fields import DistanceField
from jaxngp.losses import relative_error
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

Field = DistanceField
init_state = fresh_state


@struct.dataclass
class DistanceSamples:
    """Points to learn a signed distance from, in scene units, each set in random order."""

    surface: jax.Array  # (S, 3) f32, where the distance is 0
    position: jax.Array  # (Q, 3) f32, three near the surface for each one anywhere
    distance: jax.Array  # (Q,) f32, negative inside


@struct.dataclass
class DistanceBatch:
    """N positions (N, 3) f32 in [0, 1], and the distance (N,) f32 there."""

    position: jax.Array
    distance: jax.Array


@struct.dataclass
class SdfMetrics:
    """Of one step, or averaged over several."""

    loss: jax.Array  # the mean relative error
    error: jax.Array  # the mean absolute error, scene units
    samples: jax.Array
    skipped: jax.Array  # 1 where the update was skipped because loss or gradient was non-finite

    def headline(self) -> str:
        """Quality of the fit in one phrase, for the progress bar."""
        return f"error {float(self.error):.2e}"


def draw_batches(
    step: jax.Array, key: jax.Array, data: DistanceSamples, *, num_steps: int, config: SdfConfig
) -> DistanceBatch:
    """The batches (K, N, ...) of K steps from a given one on: half on the surface, half from the points beside it."""
    bits = draw_bits(step, key, (config.train.num_points,), num_steps=num_steps)
    half = bits.shape[1] // 2
    on, off = bits[:, :half] % np.uint32(len(data.surface)), bits[:, half:] % np.uint32(len(data.distance))
    position = jnp.concatenate([data.surface[on], data.position[off]], axis=1)
    distance = jnp.concatenate([jnp.zeros(on.shape, jnp.float32), data.distance[off]], axis=1)
    return DistanceBatch(position, distance)


def sdf_loss(field: DistanceField, batch: DistanceBatch) -> tuple[jax.Array, SdfMetrics]:
    """The mean relative error of a batch, () f32, and the metrics of the step.

    Devices that share a program each return their part of the loss, and the metrics of the whole.
    """
    samples, batch = jnp.float32(len(batch.position)), own_share(batch)
    prediction = field(batch.position)
    part = jnp.mean(relative_error(prediction, batch.distance)) / num_shares()
    error = jnp.mean(jnp.abs(prediction - batch.distance)) / num_shares()
    loss, error = over_shares((part, error))
    return part, SdfMetrics(loss=loss, error=error, samples=samples, skipped=jnp.float32(0))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def sdf_steps(
    state: TrainState, data: DistanceSamples, learning_rates: jax.Array, num_steps: jax.Array, *, config: SdfConfig
) -> tuple[TrainState, SdfMetrics]:
    """Up to num_steps () i32 steps at the learning_rates (K,), and their mean metrics."""
    max_steps = len(learning_rates)
    draw = functools.partial(draw_batches, num_steps=max_steps, config=config)
    batches = fusion_barrier(draw, state.step, state.key, data)

    def one(i: jax.Array, carry: Carry) -> Carry:
        batch = jax.tree.map(lambda a: a[i], batches)

        def loss(params: Any) -> tuple[jax.Array, SdfMetrics]:
            return sdf_loss(DistanceField(params, carry.half_table, config.field), batch)

        gradient, metrics = jax.grad(loss, has_aux=True)(carry.params)
        return apply_gradient(carry, gradient, metrics, learning_rates[i], config=config)

    carry = begin_steps(state, SdfMetrics, config=config)
    carry = repeat_steps(one, carry, num_steps, max_steps=max_steps)
    return finish_steps(carry, SdfMetrics, num_steps, max_steps=max_steps, config=config)


def compile_programs(state: TrainState, data: DistanceSamples, config: SdfConfig) -> Programs:
    """The programs of a run."""
    data = default_placement().put(data)
    arguments = (state, data, zero_rates(config), NO_STEPS)
    steps = compiled(sdf_steps, *arguments, options=step_options(config), donate=True, config=program_config(config))
    return Programs(lambda state, _, rates, number: steps(state, data, rates, np.int32(number)))


def training_warnings(metrics: SdfMetrics, *, step: int, finished: bool, config: SdfConfig) -> dict[str, str]:  # noqa: ARG001
    """No warnings of its own."""
    return {}
