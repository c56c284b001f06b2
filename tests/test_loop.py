"""The loop between its programs, which here do nothing: what is dispatched, at which rates, and when the grid is."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxngp.config import CosineDecay, MarchConfig, NerfConfig, OccupancyConfig, OptimizerConfig, TrainConfig
from jaxngp.training import loop, nerf
from jaxngp.training.loop import Progress
from jaxngp.training.nerf import NerfMetrics as Metrics
from jaxngp.training.optimizer import learning_rate
from jaxngp.training.step import Programs

ZEROS = Metrics(**dict.fromkeys([field.name for field in fields(Metrics)], 0.0))

configs = st.builds(
    lambda train, every: NerfConfig(
        train=train,
        sampler=MarchConfig(occupancy=OccupancyConfig(refresh_every=every)),
        optimizer=OptimizerConfig(warmup_steps=5, decay=CosineDecay()),
    ),
    st.builds(
        TrainConfig,
        max_steps=st.integers(1, 40),
        steps_per_dispatch=st.integers(1, 9),
        calls_in_flight=st.integers(1, 4),
    ),
    st.integers(1, 20),
)


class Run:
    """A run of which the state is the number of steps that were taken."""

    def __init__(self, config: NerfConfig, seconds_a_look: float = 0.0) -> None:
        self.ends = [0]
        self.rates: list[float] = []
        self.refreshed: list[int] = []
        self.yielded: list[Any] = []
        programs = Programs(
            steps=self.steps,
            refresh=self.refresh,
            refresh_every=config.sampler.occupancy.refresh_every,
        )
        clock = mock.Mock(perf_counter=itertools.count(0.0, seconds_a_look).__next__)
        with mock.patch.object(loop, "time", clock), mock.patch.object(nerf, "compile_programs", return_value=programs):
            self.yielded += loop.train(config, None, resume=Progress(config, 0, None, 0, 0.0, 0.0, 0.0))

    def steps(self, state: int, step: int, rates: jax.Array, number: int) -> tuple[int, Metrics]:
        assert step == state
        self.rates += np.asarray(rates)[:number].tolist()
        self.ends.append(state + number)
        return self.ends[-1], ZEROS

    def refresh(self, state: int) -> int:
        self.refreshed.append(state)
        return state


@given(configs)
def test_rates_follow_the_step_however_dispatched(config: NerfConfig) -> None:
    total = config.train.max_steps
    run = Run(config)
    expected = learning_rate(np.arange(total), np.arange(total) / total, config=config.optimizer)
    np.testing.assert_allclose(run.rates, expected, rtol=1e-6)
    assert run.yielded[-1].step == run.yielded[-1].state == total


@given(configs)
def test_the_grid_is_refreshed_at_its_interval(config: NerfConfig) -> None:
    every = config.sampler.occupancy.refresh_every
    run = Run(config)
    expected = [b for a, b in itertools.pairwise(run.ends) if any(step % every == 0 for step in range(a + 1, b + 1))]
    assert run.refreshed == expected


@given(configs, st.integers(1, 30))
def test_rates_follow_the_share_of_seconds_spent(config: NerfConfig, limit: int) -> None:
    """A clock that is a second further at every look: two looks for what is dispatched together."""
    config = replace(config, train=replace(config.train, max_steps=10**6, max_seconds=float(limit)))
    run = Run(config, seconds_a_look=1.0)
    assert [p.fraction for p in run.yielded] == [min(i / limit, 1.0) for i in range(limit + 1)]
    together = config.train.steps_per_dispatch * config.train.calls_in_flight
    number = np.arange(limit * together)
    expected = learning_rate(number, number // together / limit, config=config.optimizer)
    np.testing.assert_allclose(run.rates, expected, rtol=1e-6)
