"""Warnings about runs: said where they apply, and only there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import TINY_MARCH

from jaxngp.config import NerfConfig
from jaxngp.console import TrainingWarnings
from jaxngp.training.loop import Progress
from jaxngp.training.nerf import NerfMetrics

LAST = 64
CONFIG = NerfConfig(sampler=TINY_MARCH)
CONFIG = replace(CONFIG, train=replace(CONFIG.train, num_rays=100, max_steps=LAST))


def progress(step: int = 16, **values: float) -> Progress:
    sound = {"loss": 0.1, "psnr": 20.0, "rays": 60.0, "samples": 500.0, "dropped_samples": 0.0, "skipped": 0.0}
    metrics = NerfMetrics(**{k: np.float32(v) for k, v in {**sound, "occupied_fraction": 0.1, **values}.items()})
    return Progress(CONFIG, SimpleNamespace(refinement=None), metrics, step, 1.0, 1.0, 1.0)


def test_nothing_is_said_of_a_sound_run() -> None:
    warnings = TrainingWarnings(CONFIG)
    assert warnings.about(progress()) == warnings.about(progress(LAST)) == []


@pytest.mark.parametrize(
    ("step", "values", "said"),
    [
        (16, {"occupied_fraction": 0.0}, "the occupancy grid is empty"),
        (16, {"skipped": 0.25}, "4 updates were skipped"),
        (LAST, {"rays": 10.0}, "only 10% of the rays drawn"),
    ],
)
def test_a_warning_is_said_once(step: int, values: dict[str, float], said: str) -> None:
    warnings = TrainingWarnings(CONFIG)
    (warning,) = warnings.about(progress(step, **values))
    assert said in warning
    assert warnings.about(progress(step + 16, **values)) == []
