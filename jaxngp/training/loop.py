"""A training run as a generator: it yields every few steps, and the caller decides what happens in between."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.config import ImageConfig, InputError, NerfConfig, RunConfig, SdfConfig, program_config
from jaxngp.device import default_placement, slow_scatter_warning
from jaxngp.processes import of_first
from jaxngp.refinement import Rates, weighted
from jaxngp.refinement import rates as camera_rates
from jaxngp.training import image, nerf, sdf
from jaxngp.training.optimizer import learning_rate
from jaxngp.training.state import TrainState
from jaxngp.training.step import Programs, StepMetrics

TASKS: dict[type, ModuleType] = {NerfConfig: nerf, ImageConfig: image, SdfConfig: sdf}
"""What a config of each type trains: a module with `Field`, `init_state`, `compile_programs`, `training_warnings`."""


def task_of(config: RunConfig) -> ModuleType:
    """The module that a config's task is: the one place that picks it."""
    return TASKS[type(config)]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands. The next iteration donates the buffers of `state`: copy or save what is to be kept.

    `seconds` is the time spent in training since step 0, earlier runs included; compilation, and whatever the caller
    does between two iterations, is not in it. `compile_seconds` is what compilation took in this process.
    """

    config: RunConfig
    state: TrainState
    metrics: StepMetrics | None  # means over the steps since the last yield; None before the first
    step: int
    seconds: float
    compile_seconds: float
    num_samples: float  # used in all steps so far

    @property
    def fraction(self) -> float:
        """How much of the budget of steps or seconds is spent, whichever is more. In [0, 1]."""
        train = self.config.train
        by_time = self.seconds / train.max_seconds if train.max_seconds else 0.0
        return min(max(self.step / train.max_steps, by_time), 1.0)

    @property
    def finished(self) -> bool:
        return self.fraction >= 1

    @property
    def field(self) -> Any:
        """What has been learned so far: a `RadianceField`, an `ImageField` or a `DistanceField`.

        Its arrays are those of `state`, so the next iteration takes them.
        """
        params = weighted(self.state.eval_params, self.state.refinement, grid=self.config.field.encoding)
        return task_of(self.config).Field.of(params, config=self.config.field)


def init_state(seed: int, *, config: RunConfig) -> TrainState:
    """The state before step 0. Equal seeds give equal states.

    Takes a seed, not a key: training donates the state's buffers, and would delete a key that the caller holds.
    """
    return _init_state(np.uint32(seed), config=program_config(config))


@functools.partial(jax.jit, static_argnames="config")  # a dozen small programs otherwise
def _init_state(seed: np.uint32, *, config: RunConfig) -> TrainState:
    return task_of(config).init_state(jax.random.key(seed), config=config)


def train(config: RunConfig, data: Any, *, resume: Progress | None = None) -> Iterator[Progress]:
    """Train from scratch, or from where `resume` stands, until the budget of steps or seconds is spent.

    The config says what is learned, and so what the data is: `PosedImages` or a `RayTable` for a NerfConfig,
    `ImagePixels` or a `StoredImage` for an ImageConfig, `DistanceSamples` for an SdfConfig. Raises InputError where no
    camera sees the scene's box, and after MAX_SKIPPED updates in a row with a non-finite loss or gradient.

    Within `device.placed_on` several devices share every step; in several processes each gives its own views.

    Yields once before the first step and after every train.calls_in_flight calls of up to train.steps_per_dispatch
    steps each. A run may be resumed with a larger budget: its schedule is then that of the new budget, entered where
    the run stands. Where the budget leaves no step to take, that is warned of, and `resume` is yielded.
    """
    if message := slow_scatter_warning(config.field.precision):
        warnings.warn(message, stacklevel=2)
    if resume:
        resume = dataclasses.replace(resume, config=config)
        if resume.finished:
            warnings.warn(_nothing_left(resume), stacklevel=2)
            yield resume
            return
    state = resume.state if resume else init_state(config.train.seed, config=config)
    state = default_placement().put(state)
    started = time.perf_counter()
    programs = task_of(config).compile_programs(state, data, config)
    compiled = time.perf_counter()
    if resume:
        progress = dataclasses.replace(resume, state=state, compile_seconds=compiled - started)
    else:
        state = programs.begin(state)
        progress = Progress(config, state, None, 0, of_first(time.perf_counter() - compiled), compiled - started, 0.0)
    yield progress
    skipped = 0  # updates in a row
    while not progress.finished:
        before = progress.step
        progress = _dispatch(progress, programs)
        assert progress.metrics is not None
        skipped = skipped + progress.step - before if float(progress.metrics.skipped) == 1 else 0
        if skipped >= MAX_SKIPPED:
            raise InputError(_diagnosis(progress, skipped))
        yield progress


MAX_SKIPPED = 16
"""Updates in a row that may be skipped, as loss or gradient was non-finite, before a run stops."""


def _nothing_left(progress: Progress) -> str:
    train = progress.config.train
    budget = f"{train.max_steps} steps" + (f" or {train.max_seconds:g} s" if train.max_seconds else "")
    return (
        f"the run stands at step {progress.step} after {progress.seconds:.1f} s, and the budget is {budget}: nothing "
        "is left to train; raise train.max_steps or train.max_seconds"
    )


def _diagnosis(progress: Progress, skipped: int) -> str:
    assert progress.metrics is not None
    largest = max(float(jnp.max(jnp.abs(array))) for array in jax.tree.leaves(progress.state.params))
    rate = progress.config.optimizer.learning_rate
    return (
        f"step {progress.step}: the last {skipped} updates were skipped, since the loss ({progress.metrics.loss:.3g}) "
        f"or its gradient was non-finite; the largest parameter is {largest:.3g}. The last checkpoint is intact. "
        f"Train from scratch with a lower optimizer.learning_rate than {rate:g}, by --override"
    )


def _dispatch(progress: Progress, programs: Programs) -> Progress:
    started, config = time.perf_counter(), progress.config
    size, every = config.train.steps_per_dispatch, programs.refresh_every
    state, step, parts = progress.state, progress.step, []
    # The device has its next work while the host sees to the one after: nothing here waits before the last.
    for _ in range(config.train.calls_in_flight):
        num_steps = min(size, config.train.max_steps - step)
        if num_steps == 0:
            break
        rates: Any = learning_rates(step, progress.fraction, size, config)
        state, metrics = programs.steps(state, step, rates, num_steps)
        parts.append((num_steps, metrics))
        if every and (step + num_steps) // every > step // every:
            state = programs.refresh(state)
        step += num_steps
    jax.block_until_ready((state, parts))
    return dataclasses.replace(
        progress,
        state=state,
        metrics=_mean(parts),
        step=step,
        seconds=progress.seconds + of_first(time.perf_counter() - started),
        num_samples=progress.num_samples + sum(number * float(metrics.samples) for number, metrics in parts),
    )


def _mean(parts: Sequence[tuple[int, StepMetrics]]) -> StepMetrics:
    """Average of means, weighted by the number of steps of each."""
    if len(parts) == 1:
        return parts[0][1]
    numbers, metrics = zip(*parts, strict=True)
    return jax.tree.map(lambda *means: np.average(np.asarray(means), weights=numbers), *metrics)


def learning_rates(step: int, fraction: float, size: int, config: RunConfig) -> np.ndarray | Rates:
    """(size,) f32 from a step on: by step where the budget is one of steps, else as of the fraction spent."""
    steps = step + np.arange(size)
    fractions = np.maximum(steps / config.train.max_steps, fraction)
    found = learning_rate(steps, fractions, config=config.optimizer)
    if isinstance(config, NerfConfig) and config.refine.any:
        return camera_rates(found, fractions, config=config)
    return found
