"""Learning a signed distance: what is drawn, the loss, and that a small budget suffices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from test_image_training import CONFIG as IMAGE
from test_image_training import Trained, assert_resumes, assert_whole, run_saved

from jaxngp.checkpoints import Checkpoints
from jaxngp.config import (
    CosineDecay,
    HashGridConfig,
    InputError,
    OptimizerConfig,
    PointFieldConfig,
    SdfConfig,
    SdfTrainConfig,
)
from jaxngp.data.shapes import SHAPES
from jaxngp.data.solids import distance_samples, surface_samples
from jaxngp.training import sdf
from jaxngp.training.loop import init_state
from jaxngp.training.sdf import DistanceBatch, DistanceSamples

CONFIG = SdfConfig(
    field=PointFieldConfig(
        encoding=HashGridConfig(num_levels=2, num_features=4, table_size=2**15, max_resolution=31), hidden_width=32
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, decay=CosineDecay()),
    train=SdfTrainConfig(num_points=2**11, max_steps=300, steps_per_dispatch=20, seed=5),
)
SOLID = SHAPES["torus"]


@functools.cache
def samples() -> DistanceSamples:
    surface, beside = surface_samples(SOLID, 0, 2**17), distance_samples(SOLID, 1, 2**17)
    return jax.device_put(DistanceSamples(surface, *beside))


# Runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run_saved(CONFIG, samples(), tmp_path_factory.mktemp("run"))


def test_a_run_is_whole_and_compiles_once(trained: Trained) -> None:
    assert_whole(trained, CONFIG, "sdf_steps")


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(trained: Trained) -> None:
    assert_resumes(trained, CONFIG, samples())


def test_a_checkpoint_of_another_task_is_refused(trained: Trained) -> None:
    with Checkpoints(trained.workdir) as checkpoints, pytest.raises(InputError, match="not a usable"):
        checkpoints.restore(IMAGE)


def test_a_signed_distance_is_learned(trained: Trained) -> None:
    """Its inside is the solid's: intersection over union."""
    points = np.random.default_rng(9).uniform(*SOLID.box, (2**15, 3)).astype(np.float32)
    found = np.asarray(evaluate(trained.last.field, points)) < 0
    true = SOLID.inside(points.astype(np.float64))
    assert np.sum(true & found) / np.sum(true | found) > 0.96


# Batches.

draw = jax.jit(sdf.draw_batches, static_argnames=("num_steps", "config"))
evaluate = jax.jit(sdf.DistanceField.__call__)
KEY = jax.random.key(3)


def drawn(step: int = 0, count: int = 2, data: Any = None) -> DistanceBatch:
    return jax.device_get(draw(np.int32(step), KEY, data or samples(), num_steps=count, config=CONFIG))


def test_half_of_the_points_lie_on_the_surface() -> None:
    """And the rest have their distance."""
    batch, half = drawn(), CONFIG.train.num_points // 2
    true = SOLID.distance(batch.position.reshape(-1, 3).astype(np.float64)).reshape(batch.distance.shape)
    np.testing.assert_array_equal(batch.distance[:, :half], 0)
    np.testing.assert_allclose(batch.distance, true, atol=1e-6)
    near = np.abs(true[:, half:]) < 5e-3
    assert 0.7 < near.mean() < 0.82  # three of four, and few of those anywhere


def test_every_step_draws_anew_as_it_would_alone() -> None:
    two, later = drawn(), drawn(step=1)
    np.testing.assert_array_equal(two.position[1], later.position[0])
    np.testing.assert_array_equal(two.distance[1], later.distance[0])
    assert not np.array_equal(two.position[0], two.position[1])


def test_all_samples_are_drawn() -> None:
    """Of a few, in 40 steps; drawn uniformly, one in e^-10 is missed."""
    few = jax.tree.map(lambda a: a[: 2**12], samples())
    batch = drawn(count=40, data=few)
    assert len(np.unique(batch.position.reshape(-1, 3), axis=0)) > 2 * 2**12 - 5


# The loss.


def test_the_loss_is_the_mean_relative_error() -> None:
    batch = jax.tree.map(lambda a: a[0], drawn())
    field = sdf.DistanceField.of(init_state(0, config=CONFIG).params, config=CONFIG.field)
    loss, metrics = jax.jit(sdf.sdf_loss)(field, batch)
    error = np.abs(np.asarray(evaluate(field, batch.position), np.float64) - batch.distance)
    expected = np.mean(error / (np.abs(batch.distance) + 0.01))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.error, np.mean(error), rtol=1e-5)
    assert metrics.samples == CONFIG.train.num_points
