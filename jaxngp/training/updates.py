"""What every training step does with a gradient, and a program that takes several such steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxngp.config import RunConfig
from jaxngp.fields import Params, make_half_table
from jaxngp.training.optimizer import make_optimizer
from jaxngp.training.state import TrainState


class StepMetrics(Protocol):
    """What the metrics of every task hold, of one step or averaged over several; a flax dataclass of () f32."""

    loss: jax.Array
    samples: jax.Array  # used
    skipped: jax.Array  # 1 where the update was left out, since loss or gradient was no finite number

    def headline(self) -> str:
        """How good the fit is, for a person who watches."""
        ...


M = TypeVar("M", bound=StepMetrics)
GradientFn = Callable[[jax.Array, Params, jax.Array | None], tuple[Params, M]]
"""Number of the step in its dispatch, parameters, half_table of the table -> gradient, metrics."""


def take_step(
    state: TrainState,
    half_table: jax.Array | None,
    i: jax.Array,
    learning_rate: jax.Array,
    gradient_fn: GradientFn[M],
    *,
    config: RunConfig,
) -> tuple[TrainState, jax.Array | None, M]:
    """Take the gradient of a batch and apply Adam. half_table, of state.params, is brought up to date as well.

    Where loss or gradient is no finite number, only the count of steps goes on: the next one draws another batch.
    """
    gradient, metrics = gradient_fn(i, state.params, half_table)
    updates, opt_state = make_optimizer(config.optimizer).update(gradient, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    sound = jnp.isfinite(metrics.loss) & _is_finite(gradient)
    old, new = (state.params, state.opt_state), (params, opt_state)
    params, opt_state = jax.tree.map(functools.partial(jnp.where, sound), new, old)
    state = replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    metrics = replace(metrics, skipped=1 - sound.astype(jnp.float32))  # type: ignore[type-var]
    return state, make_half_table(params, config=config.field), metrics


def _is_finite(gradient: Params) -> jax.Array:
    """Whether all of a gradient is, () bool, by that of the networks alone.

    What reaches the table has gone through them: a cotangent that is no finite number makes their gradient one too,
    and to look at all of the table's would take as long as half of Adam.
    """
    networks = [array for name, part in gradient.items() if name != "encoding" for array in jax.tree.leaves(part)]
    return jnp.isfinite(sum(jnp.sum(jnp.abs(array)) for array in networks))


def take_steps(
    state: TrainState,
    learning_rates: jax.Array,
    num_steps: jax.Array,
    gradient_fn: GradientFn[M],
    *,
    kind: type[M],
    config: RunConfig,
) -> tuple[TrainState, M]:
    """The first num_steps () i32, at most K, of the steps whose learning_rates (K,) are given; and their mean metrics.

    kind: the type of the metrics, named so that a step is traced only once.

    The number is an argument, so that one program serves the last, shorter dispatch of a run too. A CPU stops there.
    Elsewhere all K steps run, so that the host need not be asked before each whether there is another, and those
    beyond leave everything as it was. The average of the weights is brought up to date once, with the decay of
    num_steps steps.
    """
    max_steps = len(learning_rates)
    num_steps = jnp.minimum(num_steps, max_steps)
    rounds = lax.platform_dependent(num_steps, cpu=lambda n: n, default=lambda _: jnp.int32(max_steps))
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]

    def one(i: jax.Array, carry: tuple) -> tuple:
        state, half_table, sums = carry
        *new, metrics = take_step(state, half_table, i, learning_rates[i], gradient_fn, config=config)
        new.append(sums + jnp.stack([getattr(metrics, name) for name in names]))
        taken = lax.platform_dependent(i < num_steps, cpu=jnp.ones_like, default=lambda taken: taken)
        return jax.tree.map(functools.partial(jnp.where, taken), tuple(new), carry)

    start = (state, make_half_table(state.params, config=config.field), jnp.zeros(len(names)))
    state, _, sums = lax.fori_loop(0, rounds, one, start)
    if config.optimizer.ema_decay:
        keep = config.optimizer.ema_decay ** num_steps.astype(jnp.float32)
        ema = jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, state.ema_params, state.params)
        state = replace(state, ema_params=ema)
    means = sums / jnp.maximum(num_steps, 1)
    return state, kind(**dict(zip(names, means, strict=True)))
