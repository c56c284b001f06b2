"""A training run as a generator: it yields every few steps, and whoever iterates decides what to do then."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.config import InputError, RunConfig
from jaxngp.device import slow_scatter_warning
from jaxngp.training.optimizer import learning_rate
from jaxngp.training.programs import Data, Programs, compile_programs
from jaxngp.training.state import TrainState, init_state
from jaxngp.training.updates import StepMetrics


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands. The next iteration donates the buffers of `state`: copy or save what is to be kept.

    `seconds` is the time spent in training since step 0, earlier runs included; compilation, and whatever the caller
    does between two iterations, is not in it. `compile_seconds` is what compilation took when the run began.
    """

    state: TrainState
    metrics: StepMetrics | None  # means over the steps since the last yield; None before the first
    step: int
    seconds: float
    compile_seconds: float
    num_samples: float  # used in all steps so far
    fraction: float  # of the budget of steps or seconds, whichever is further

    @property
    def finished(self) -> bool:
        return self.fraction >= 1


def train(config: RunConfig, data: Data, *, resume: Progress | None = None) -> Iterator[Progress]:
    """Train from scratch, or from where `resume` stands, until the budget of steps or seconds is spent.

    The config says what is learned, and so what the data is: views or a ray table for a NerfConfig, an image for an
    ImageConfig, distances for an SdfConfig. Raises InputError where no camera sees the scene's box, and where the loss
    is no finite number any more.

    Yields once before the first step and after every train.calls_in_flight dispatches of up to
    train.steps_per_dispatch steps each; of a run that is finished, only where it stands.
    """
    if resume and resume.finished:
        yield resume
        return
    if message := slow_scatter_warning(config.field.precision):
        warnings.warn(message, stacklevel=2)
    state = resume.state if resume else init_state(config.train.seed, config=config)
    # By name: restored arrays are bound to their device and fresh ones are not, and jax compiles for each anew.
    state = jax.device_put(state, jax.devices()[0])
    programs = compile_programs(state, data, config)
    started = time.perf_counter()
    begun = programs.begin(state)
    if resume:
        progress = resume
    else:
        seconds = time.perf_counter() - started
        progress = Progress(begun, None, 0, seconds, programs.seconds, 0.0, budget_fraction(0, seconds, config))
    yield progress
    skipped = 0  # updates in a row
    while not progress.finished:
        before = progress.step
        progress = _dispatch(progress, programs, config)
        assert progress.metrics is not None
        skipped = skipped + progress.step - before if float(progress.metrics.skipped) == 1 else 0
        if skipped >= MAX_SKIPPED:
            raise InputError(_diagnosis(progress, skipped, config))
        yield progress


MAX_SKIPPED = 16
"""Updates in a row that may be left out, as loss or gradient was no finite number, before a run stops."""


def _diagnosis(progress: Progress, skipped: int, config: RunConfig) -> str:
    assert progress.metrics is not None
    largest = max(float(jnp.max(jnp.abs(array))) for array in jax.tree.leaves(progress.state.params))
    return (
        f"step {progress.step}: the last {skipped} updates were left out, since the loss ({progress.metrics.loss:.3g}) "
        f"or its gradient was no finite number; the largest parameter is {largest:.3g}. The last checkpoint stands. "
        f"Train anew with a lower optimizer.learning_rate than {config.optimizer.learning_rate:g}, by --override"
    )


def budget_fraction(step: int, seconds: float, config: RunConfig) -> float:
    """How much of the budget is spent, by steps or by seconds, whichever is more. In [0, 1]."""
    limit = config.train.max_seconds
    return min(max(step / config.train.max_steps, seconds / limit if limit else 0.0), 1.0)


def _dispatch(progress: Progress, programs: Programs, config: RunConfig) -> Progress:
    started = time.perf_counter()
    size, every = config.train.steps_per_dispatch, programs.refresh_every
    state, step, parts = progress.state, progress.step, []
    # The device has its next work while the host sees to the one after: nothing here waits before the last.
    for _ in range(config.train.calls_in_flight):
        num_steps = min(size, config.train.max_steps - step)
        if num_steps == 0:
            break
        rates = jnp.asarray(_learning_rates(step, progress.fraction, size, config))
        state, metrics = programs.steps(state, step, rates, num_steps)
        parts.append((num_steps, metrics))
        if every and (step + num_steps) // every > step // every:
            state = programs.refresh(state)
        step += num_steps
    jax.block_until_ready((state, parts))
    seconds = progress.seconds + time.perf_counter() - started
    num_samples = progress.num_samples + sum(number * float(metrics.samples) for number, metrics in parts)
    fraction = budget_fraction(step, seconds, config)
    return Progress(state, _mean(parts), step, seconds, progress.compile_seconds, num_samples, fraction)


def _mean(parts: Sequence[tuple[int, StepMetrics]]) -> StepMetrics:
    """The mean over steps of means over so many of them each."""
    if len(parts) == 1:
        return parts[0][1]
    numbers, metrics = zip(*parts, strict=True)
    return jax.tree.map(lambda *means: np.average(np.asarray(means), weights=numbers), *metrics)


def _learning_rates(step: int, fraction: float, size: int, config: RunConfig) -> np.ndarray:
    """(size,) f32 from a step on: by step where the budget is one of steps, else as of the fraction spent."""
    steps = step + np.arange(size)
    fractions = np.maximum(steps / config.train.max_steps, fraction)
    return learning_rate(steps, fractions, config=config.optimizer)
