"""What every training step does with a gradient, whatever is learned: check it, apply Adam, average, add up metrics.

A task's program (`nerf.nerf_steps`, `image.image_steps`, `sdf.sdf_steps`) draws its batches, then takes several steps:

    carry = begin_steps(state, ...)
    carry = repeat_steps(one, carry, ...)   # one(i, carry): gradient of the loss, then apply_gradient(carry, ...)
    state, metrics = finish_steps(carry, ...)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.config import RunConfig
from jaxngp.device import all_shares, by_device, num_shares, over_shares, own_tile, scattered_sum, step_compiler_options
from jaxngp.fields import Params, make_half_table
from jaxngp.training.optimizer import is_table, make_optimizer
from jaxngp.training.state import TrainState


class StepMetrics(Protocol):
    """What the metrics of every task hold, of one step or averaged over several; a flax dataclass of () f32."""

    loss: jax.Array
    samples: jax.Array  # used
    skipped: jax.Array  # 1 where the update was skipped because loss or gradient was non-finite

    def headline(self) -> str:
        """Quality of the fit in one phrase, for the progress bar."""
        ...


M = TypeVar("M", bound=StepMetrics)


@struct.dataclass
class Carry:
    """What goes from step to step of one call: the state, its table in half precision, and the sums of the metrics.

    Devices that share a program each have, of the table and of what Adam keeps about it, the rows that they update;
    `table` is the whole one, for all of them to read. Where it is read in half precision, only its shape counts.
    """

    state: TrainState
    half_table: jax.Array | None
    sums: jax.Array  # one a metric, in the order of its fields
    table: jax.Array | None = None

    @property
    def params(self) -> Params:
        """What the loss is a function of."""
        params = self.state.params
        return params if self.table is None else {**params, "encoding": {**params["encoding"], "table": self.table}}


def begin_steps(state: TrainState, metrics: type[M], *, config: RunConfig) -> Carry:
    """Before the first step of a call."""
    num_metrics = len(dataclasses.fields(metrics))  # type: ignore[arg-type]
    half_table = make_half_table(state.params, config=config.field)
    carry = Carry(state, half_table, jnp.zeros(num_metrics, jnp.float32))
    if num_shares() == 1:
        return carry
    params, opt_state = _of_tables(own_tile, (state.params, state.opt_state))
    state, table = replace(state, params=params, opt_state=opt_state), state.params["encoding"]["table"]
    return replace(carry, state=state, table=table)


def apply_gradient(carry: Carry, gradient: Params, metrics: M, learning_rate: jax.Array, *, config: RunConfig) -> Carry:
    """One step of Adam.

    Where loss or gradient is non-finite, only the count of steps goes on: the next one draws another batch.
    gradient: of devices that share a program, that of their part of the loss.
    """
    state = carry.state
    if num_shares() > 1:
        gradient = _of_tables(scattered_sum, gradient, others=over_shares)
    updates, opt_state = make_optimizer(config.optimizer).update(gradient, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    finite = jnp.isfinite(metrics.loss) & _is_finite(gradient)
    old, new = (state.params, state.opt_state), (params, opt_state)
    params, opt_state = jax.tree.map(functools.partial(jnp.where, finite), new, old)
    metrics = replace(metrics, skipped=1 - finite.astype(jnp.float32))  # type: ignore[type-var]
    carry = replace(
        carry,
        state=replace(state, step=state.step + 1, params=params, opt_state=opt_state),
        half_table=make_half_table(params, config=config.field),
        sums=carry.sums + jnp.stack([getattr(metrics, field.name) for field in dataclasses.fields(metrics)]),  # type: ignore[arg-type]
    )
    return carry if carry.table is None else _exchange(carry, len(carry.table))


def _exchange(carry: Carry, num_rows: int) -> Carry:
    """Every device gets the rows of the table that the others have updated, in the precision in which it reads them."""
    if carry.half_table is not None:
        return replace(carry, half_table=all_shares(carry.half_table)[:num_rows])
    return replace(carry, table=all_shares(carry.state.params["encoding"]["table"])[:num_rows])


def _of_tables(call: Callable[[jax.Array], jax.Array], tree: Any, others: Any = lambda array: array) -> Any:
    """`call` for the tables in a tree of parameters, `others` for the rest."""
    return jax.tree.map_with_path(lambda path, a: (call if is_table(path) else others)(a), tree)


def _is_finite(gradient: Params) -> jax.Array:
    """Whether all of a gradient is finite, () bool, judged by that of the networks alone.

    What reaches the table has gone through them: a non-finite cotangent makes their gradient non-finite too, and to
    look at all of the table's would take as long as half of Adam.
    """
    networks = [array for name, part in gradient.items() if name != "encoding" for array in jax.tree.leaves(part)]
    return jnp.isfinite(sum(jnp.sum(jnp.abs(array)) for array in networks))


def repeat_steps(
    one: Callable[[jax.Array, Carry], Carry], carry: Carry, num_steps: jax.Array, *, max_steps: int
) -> Carry:
    """one(i, carry) for i = 0 ... num_steps - 1, at most max_steps times. num_steps () i32.

    The number is an argument, so that one program serves the last, shorter call of a training too. A CPU stops there.
    Elsewhere all max_steps rounds run, so that the host need not be asked before each whether there is another, and
    rounds past the last step keep the state unchanged.
    """
    num_steps = jnp.minimum(num_steps, max_steps)
    rounds = by_device(num_steps, cpu=lambda n: n, gpu=lambda _: jnp.int32(max_steps))

    def round_(i: jax.Array, carry: Carry) -> Carry:
        taken = by_device(i < num_steps, cpu=jnp.ones_like, gpu=lambda taken: taken)
        return jax.tree.map(functools.partial(jnp.where, taken), one(i, carry), carry)

    return lax.fori_loop(0, rounds, round_, carry)


def finish_steps(
    carry: Carry, metrics: type[M], num_steps: jax.Array, *, max_steps: int, config: RunConfig
) -> tuple[TrainState, M]:
    """The state after a call, and its mean metrics.

    The average of the weights is brought up to date once, with the decay of as many steps as were taken.
    """
    num_steps = jnp.minimum(num_steps, max_steps)
    state = carry.state
    if carry.table is not None:
        whole = lambda array: all_shares(array)[: len(carry.table)]  # noqa: E731
        params = carry.params if carry.half_table is None else _of_tables(whole, state.params)
        state = replace(state, params=params, opt_state=_of_tables(whole, state.opt_state))
    if config.optimizer.ema_decay:
        keep = config.optimizer.ema_decay ** num_steps.astype(jnp.float32)
        ema = jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, state.ema_params, state.params)
        state = replace(state, ema_params=ema)
    means = carry.sums / jnp.maximum(num_steps, 1)
    return state, metrics(*means)


def draw_bits(step: jax.Array, key: jax.Array, shape: tuple[int, ...], *, num_steps: int) -> jax.Array:
    """Random bits (K, *shape) u32 of K steps from a given one on, each from fold_in(key, its number).

    All in a few kernels, where K steps would launch K times as many for little work each; and one call a step, for on
    a CPU each call costs as much as a layer of the network, however little it draws.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(step + jnp.arange(num_steps, dtype=jnp.int32))
    return jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys)


@dataclass(frozen=True)
class Programs:
    """What a run calls, each compiled once, before the clock starts."""

    steps: Callable[[TrainState, int, jax.Array, int], tuple[TrainState, Any]]
    """State, its step as the host knows it, learning rates (K,), number of steps to take -> state, mean metrics."""

    begin: Callable[[TrainState], TrainState] = lambda state: state  # before step 0
    refresh: Callable[[TrainState], TrainState] = lambda state: state
    refresh_every: int = 0  # steps; 0 is never


def zero_rates(config: RunConfig) -> jax.Array:
    """Learning rates of the shape that the steps' program takes."""
    return jnp.zeros(config.train.steps_per_dispatch, jnp.float32)


def step_options(config: RunConfig) -> dict[str, Any]:
    """The compiler options of a program that takes training steps."""
    return step_compiler_options(config.field.precision, deterministic=config.train.deterministic)


NO_STEPS = np.int32(0)
