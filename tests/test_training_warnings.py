"""Warnings about runs: said where they apply, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jaxngp.training.steps import Metrics
from strategies import TINY_MARCH

from jaxngp.config import NerfConfig
from jaxngp.training.loop import Progress
from jaxngp.training.progress import TrainingWarnings


def progress(step: int = 16, finished: bool = False, **values: float) -> Progress:
    sound = {"loss": 0.1, "psnr": 20.0, "rays": 60.0, "samples": 500.0, "dropped_samples": 0.0, "skipped": 0.0}
    metrics = Metrics(**{**sound, "occupied_fraction": 0.1, **values})
    return Progress(None, metrics, step, 1.0, 1.0, 1.0, 1.0 if finished else 0.5)  # type: ignore[arg-type]


CONFIG = NerfConfig(sampler=TINY_MARCH)
CONFIG = replace(CONFIG, train=replace(CONFIG.train, num_rays=100))


def test_a_sound_run_raises_no_doubts() -> None:
    assert TrainingWarnings(CONFIG).about(progress()) == TrainingWarnings(CONFIG).about(progress(finished=True)) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"occupied_fraction": 0.0}, "the occupancy grid is empty"),
        ({"skipped": 0.25}, "4 updates were left out"),
        ({"rays": 10.0, "finished": True}, "only 10% of the rays that were drawn fitted"),
    ],
)
def test_a_doubt_is_said_once(values: dict, said: str) -> None:
    doubts = TrainingWarnings(CONFIG)
    (warning,) = doubts.about(progress(**values))
    assert said in warning
    assert doubts.about(progress(step=32, **values)) == []
