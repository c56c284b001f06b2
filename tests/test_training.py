"""Training: a run learns, resumes bit for bit, ends on time and compiles once."""

from __future__ import annotations

import collections
import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scenes import BALL, make_camera, photograph, pixel_rays, poses_around
from strategies import TINY_FIELD, TINY_GRID, seeds

from jaxngp.cameras import PosedImages, Rays
from jaxngp.config import MarchConfig, NerfConfig, OccupancyConfig, OptimizerConfig, StratifiedConfig, TrainConfig
from jaxngp.data.rays import RayTable
from jaxngp.fields import evaluate_field
from jaxngp.losses import colour_loss
from jaxngp.marching import find_candidates
from jaxngp.occupancy import candidate_cells, init_occupancy
from jaxngp.training import steps
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.loop import Progress, train
from jaxngp.training.state import TrainState, init_state
from jaxngp.training.steps import PixelBatch, StepNoise

SIZE = 20
CONFIG = NerfConfig(
    field=replace(TINY_FIELD, encoding=replace(TINY_GRID, table_size=2**11, num_features=4), hidden_width=16),
    sampler=MarchConfig(
        num_steps=64, num_samples=2**12, occupancy=OccupancyConfig(resolution=32, refresh_every=20, warmup_steps=40)
    ),
    optimizer=OptimizerConfig(warmup_steps=5),
    train=TrainConfig(num_rays=256, max_steps=110, steps_per_dispatch=20, seed=3),
)


@functools.cache
def ball_views() -> PosedImages:
    """Eight small views of the ball of tests/scenes.py, from its closed form."""
    return photograph(BALL, make_camera(SIZE, SIZE, 40.0), poses_around(8, 1.8))


def run(config: NerfConfig, data: Any = None, **options: Any) -> list[Progress]:
    """All that a run yields, without the states: the next dispatch has taken their buffers."""
    return [replace(p, state=None) for p in train(config, data or ball_views(), **options)]


def leaves(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))]


def assert_equal_bits(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


class Compilations:
    """Counts, by the name of the function, what jax compiles."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, _: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.counts[str(details.get("fun_name"))] += 1


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of six dispatches, the last of them shorter: what it yielded, compiled, and saved at step 40."""
    workdir = tmp_path_factory.mktemp("run")
    yielded, compiled = [], []
    with Compilations() as compilations, Checkpoints(workdir) as checkpoints:
        for progress in train(CONFIG, ball_views()):
            compiled.append(compilations.counts.copy())
            if progress.step == 40:
                checkpoints.save(progress)
            final = progress
            yielded.append(replace(progress, state=None))
    return {"yielded": yielded, "compiled": compiled, "final": final, "workdir": workdir}


def test_the_loss_falls_and_psnr_rises(whole_run: dict[str, Any]) -> None:
    first, *_, last = whole_run["yielded"][1:]
    assert last.metrics.loss < 0.5 * first.metrics.loss
    assert last.metrics.psnr > first.metrics.psnr + 3


def test_a_run_ends_exactly_at_its_last_step(whole_run: dict[str, Any]) -> None:
    assert [p.step for p in whole_run["yielded"]] == [0, 20, 40, 60, 80, 100, 110]
    assert [p.finished for p in whole_run["yielded"]] == [False] * 6 + [True]
    assert int(whole_run["final"].state.step) == 110
    np.testing.assert_allclose(
        [p.fraction for p in whole_run["yielded"]], np.array([0, 20, 40, 60, 80, 100, 110]) / 110
    )


def test_every_program_is_compiled_once_before_the_first_step(whole_run: dict[str, Any]) -> None:
    before, *_, after = whole_run["compiled"]
    for name in ("nerf_steps", "refresh_occupancy", "restrict_occupancy"):
        assert sum(count for function, count in before.items() if name in function) == 1, before
    # Saving copies arrays, which compiles a few words; nothing of ours is compiled while training.
    later = after - before
    assert not [name for name in later if "nerf" in name or "occupancy" in name], later
    assert whole_run["compiled"][1] == whole_run["compiled"][2]


def test_a_run_counts_its_samples_and_seconds(whole_run: dict[str, Any]) -> None:
    yielded = whole_run["yielded"]
    total = sum((b.step - a.step) * float(b.metrics.samples) for a, b in itertools.pairwise(yielded))
    np.testing.assert_allclose(yielded[-1].num_samples, total, rtol=1e-6)
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(yielded))
    assert yielded[0].compile_seconds == yielded[-1].compile_seconds > 0
    for progress in yielded[1:]:
        assert progress.metrics.dropped_samples == 0
        assert progress.metrics.rays == 256
        assert 0 < progress.metrics.occupied_fraction < 1


def test_the_grid_keeps_the_ball_and_nothing_that_a_silhouette_excludes(whole_run: dict[str, Any]) -> None:
    grid = whole_run["final"].state.occupancy
    flags = np.unpackbits(np.asarray(grid.occupied, "<u4").view(np.uint8), bitorder="little").astype(bool)
    candidates = np.asarray(candidate_cells(ball_views(), config=CONFIG.sampler.occupancy))
    assert not flags[~candidates].any()
    centre = (np.indices((32,) * 3).reshape(3, -1)[::-1].T + 0.5) / 32
    distance = np.linalg.norm(centre - BALL.centre, axis=1)
    assert flags[np.abs(distance - 0.9 * BALL.radius) < 0.03].mean() > 0.8


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole_run: dict[str, Any]) -> None:
    with Checkpoints(whole_run["workdir"]) as checkpoints:
        resumed = checkpoints.restore(CONFIG)
    assert resumed is not None
    assert resumed.step == int(resumed.state.step) == 40
    assert resumed.seconds == whole_run["yielded"][2].seconds
    assert resumed.num_samples == whole_run["yielded"][2].num_samples
    yielded = []
    for progress in train(CONFIG, ball_views(), resume=resumed):
        final = progress
        yielded.append(replace(progress, state=None))
    assert [p.step for p in yielded] == [40, 60, 80, 100, 110]
    assert_equal_bits(final.state, whole_run["final"].state)
    for found, expected in zip(yielded[1:], whole_run["yielded"][3:], strict=True):
        assert jax.tree.leaves(found.metrics) == jax.tree.leaves(expected.metrics)
        assert found.num_samples == expected.num_samples


# States.


def test_equal_seeds_give_equal_states_and_other_seeds_others() -> None:
    first, again, other = (init_state(seed, config=CONFIG) for seed in (0, 0, 1))
    assert_equal_bits(first, again)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True):
        assert not np.array_equal(a, b)


@settings(max_examples=3)
@given(seeds)
def test_no_two_arrays_of_a_state_share_a_buffer(seed: int) -> None:
    """Donation would free one of them twice."""
    state = init_state(seed, config=CONFIG)
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state.replace(key=state.step)) if a.size > 1]
    assert len(set(pointers)) == len(pointers)


def test_training_takes_the_state_and_leaves_what_the_caller_holds() -> None:
    state, other = init_state(0, config=SHORT), init_state(0, config=SHORT)
    data = jax.device_put(ball_views())
    rates = jnp.full(4, 1e-2)
    held = jax.random.key(0)
    new, _ = steps.nerf_steps(state, data, rates, jnp.int32(2), config=SHORT)
    assert state.params["encoding"]["table"].is_deleted()
    assert int(new.step) == 2
    for alive in (data, rates, other.params):
        assert not any(a.is_deleted() for a in jax.tree.leaves(alive))
    jax.random.uniform(held)
    np.testing.assert_array_equal(jax.random.key_data(new.key), jax.random.key_data(other.key))


SHORT = replace(
    CONFIG,
    field=replace(TINY_FIELD, encoding=replace(TINY_GRID, num_levels=1)),
    train=replace(CONFIG.train, steps_per_dispatch=4, background="white"),
)
"""Compiles faster."""


def advance(seed: int, num_steps: list[int]) -> TrainState:
    state, data = init_state(seed, config=SHORT), ball_views()
    for number in num_steps:
        state, _ = steps.nerf_steps(state, data, jnp.full(4, 1e-2), jnp.int32(number), config=SHORT)
    return state


def test_steps_do_not_depend_on_how_they_are_dispatched() -> None:
    """But for the average of the weights, which is brought up to date once a dispatch."""
    one, other = advance(0, [4]), advance(0, [1, 3])
    assert_equal_bits(one.replace(ema_params={}), other.replace(ema_params={}))
    assert not np.array_equal(advance(1, [4]).params["encoding"]["table"], one.params["encoding"]["table"])


def test_every_step_draws_anew() -> None:
    """From the key, which never changes, and the number of the step."""
    losses = []
    for step in (0, 1, 0):
        state = init_state(0, config=SHORT).replace(step=jnp.int32(step))
        _, metrics = steps.nerf_steps(state, ball_views(), jnp.full(4, 1e-2), jnp.int32(1), config=SHORT)
        losses.append(float(metrics.loss))
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_no_step_changes_nothing() -> None:
    assert_equal_bits(advance(0, [0]), init_state(0, config=SHORT))


def test_the_average_moves_as_by_so_many_steps() -> None:
    start, state = init_state(0, config=SHORT), advance(0, [3])
    keep = SHORT.optimizer.ema_decay**3
    for e, s, p in zip(*map(jax.tree.leaves, (state.ema_params, start.params, state.params)), strict=True):
        np.testing.assert_allclose(e, keep * s + (1 - keep) * p, rtol=1e-5, atol=1e-7)
    assert state.eval_params is state.ema_params
    assert replace(state, ema_params={}).eval_params is state.params


# One step.

draw_pixels = jax.jit(steps.draw_pixels, static_argnames="num_rays")
draw_noise = jax.jit(steps.draw_noise, static_argnames="config")
nerf_loss = jax.jit(steps.nerf_loss, static_argnames="config")


def batch_and_noise(config: NerfConfig, seed: int = 0) -> tuple[PixelBatch, StepNoise]:
    keys = jax.random.split(jax.random.key(seed))
    data = jax.tree.map(jnp.asarray, ball_views())
    return draw_pixels(keys[0], data, num_rays=config.train.num_rays), draw_noise(keys[1], config=config)


def test_a_drawn_pixel_has_the_ray_and_the_colour_of_the_view() -> None:
    views = ball_views()
    batch, _ = batch_and_noise(CONFIG)
    all_rays = [pixel_rays(views.camera, pose) for pose in views.c2w]
    direction = np.stack([d for _, d in all_rays]).reshape(-1, 3)
    origin = np.stack([o for o, _ in all_rays]).reshape(-1, 3)
    rgba = np.asarray(views.rgba).reshape(-1, 4)
    seen = set()
    for o, d, colour in zip(*map(np.asarray, (batch.rays.origin, batch.rays.direction, batch.rgba)), strict=True):
        (index,) = np.flatnonzero((np.abs(direction - d) + np.abs(origin - o)).sum(axis=1) < 1e-4)
        np.testing.assert_allclose(colour, rgba[index] / 255, atol=1e-6)
        seen.add(int(index))
    assert {i // SIZE**2 for i in seen} == set(range(8))  # all views
    assert {i % SIZE for i in seen} == {i // SIZE % SIZE for i in seen} == set(range(SIZE))  # all columns and rows


def test_a_row_of_a_ray_table_is_an_opaque_pixel() -> None:
    rng = np.random.default_rng(0)
    rays = Rays(origin=jnp.asarray(rng.normal(size=(9, 3))), direction=jnp.asarray(rng.normal(size=(9, 3))))
    table = RayTable(rays=rays, rgb=jnp.asarray(rng.uniform(size=(9, 3))), width=0, height=0)
    batch = draw_pixels(jax.random.key(0), table, num_rays=100)
    rows = [int(np.flatnonzero((np.asarray(rays.origin) == o).all(axis=1))[0]) for o in np.asarray(batch.rays.origin)]
    assert set(rows) == set(range(9))
    np.testing.assert_array_equal(batch.rays.direction, rays.direction[np.array(rows)])
    np.testing.assert_array_equal(batch.rgba, np.column_stack([np.asarray(table.rgb)[rows], np.ones(100)]))


@pytest.mark.parametrize(("background", "expected"), [("white", 1.0), ("black", 0.0)])
def test_a_fixed_background_is_that_colour(background: Any, expected: float) -> None:
    np.testing.assert_array_equal(
        steps.draw_background(jax.random.key(0), 5, background=background), np.full((5, 3), expected)
    )


def test_a_random_background_differs_from_ray_to_ray() -> None:
    colours = np.asarray(steps.draw_background(jax.random.key(0), 1000, background="random"))
    assert len(np.unique(colours)) > 2900
    np.testing.assert_allclose(colours.mean(axis=0), 0.5, atol=0.05)


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_loss_is_the_mean_over_rays_before_their_own_backgrounds(loss: Any) -> None:
    """Bins, so that no grid is needed; the colours come from the definition of each stage."""
    sampler = StratifiedConfig(num_bins=16, near=1.0, far=2.6)
    config = replace(SHORT, sampler=sampler, train=replace(CONFIG.train, num_rays=32, loss=loss))
    params = init_state(0, config=config).params
    batch, noise = batch_and_noise(config)
    found, metrics = nerf_loss(params, batch, noise, None, config=config)
    edges = np.linspace(1.0, 2.6, 16)
    lower = np.append(edges[0], (edges[1:] + edges[:-1]) / 2)
    upper = np.append((edges[1:] + edges[:-1]) / 2, edges[-1])
    t = lower + (upper - lower) * np.asarray(noise.jitter, np.float64)
    dt = np.concatenate([np.diff(t), np.full((32, 1), sampler.last_interval)], axis=1)
    origin, direction = (np.asarray(a)[:, None] for a in (batch.rays.origin, batch.rays.direction))
    position = jnp.asarray(origin + t[..., None] * direction, jnp.float32).reshape(-1, 3)
    density, rgb = jax.jit(evaluate_field, static_argnames="config")(
        params, position, jnp.asarray(np.repeat(direction[:, 0], 16, axis=0)), config=config.field
    )
    thickness = np.asarray(density, np.float64).reshape(32, 16) * dt
    before = np.cumsum(thickness, axis=1)[:, :-1]
    weights = np.exp(-np.concatenate([np.zeros((32, 1)), before], axis=1)) * -np.expm1(-thickness)
    through = 1 - weights.sum(axis=1, keepdims=True)
    colour = np.sum(weights[..., None] * np.asarray(rgb).reshape(32, 16, 3), axis=1) + through * noise.background
    alpha = batch.rgba[:, 3:]
    target = alpha * batch.rgba[:, :3] + (1 - alpha) * noise.background
    losses = colour_loss(jnp.asarray(colour), target, loss=loss)
    errors = (colour - target) ** 2
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics.psnr, -10 * np.log10(np.mean(errors)), rtol=1e-4)


def test_rays_that_do_not_fit_are_counted_and_leave_the_loss() -> None:
    full = init_occupancy(np.ones(32**3, bool))
    params = init_state(0, config=SHORT).params
    batch, noise = batch_and_noise(SHORT)
    small = replace(SHORT, sampler=replace(SHORT.sampler, num_samples=2**9))
    _, metrics = nerf_loss(params, batch, noise, full, config=small)
    count = jax.jit(find_candidates, static_argnames="config")
    candidates = count(batch.rays, full, noise.jitter, config=small.sampler)
    assert 0 < metrics.samples <= 2**9
    assert metrics.samples + metrics.dropped_samples == np.bitwise_count(np.asarray(candidates.words)).sum()
    assert 0 < metrics.rays < 256
    # The first rays fit; what the others should have been makes no difference.
    used = int(metrics.rays)
    rgba = jnp.where(jnp.arange(256)[:, None] < used, batch.rgba, 1 - batch.rgba)
    changed, _ = nerf_loss(params, batch.replace(rgba=rgba), noise, full, config=small)
    assert changed == metrics.loss
    rgba = batch.rgba.at[used - 1].set(1 - batch.rgba[used - 1])
    changed, _ = nerf_loss(params, batch.replace(rgba=rgba), noise, full, config=small)
    assert changed != metrics.loss
