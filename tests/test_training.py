"""Training: a run learns, resumes bit for bit, ends on time and compiles once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from hypothesis import given, settings
from scenes import BALL as LARGE_BALL
from scenes import make_camera, photograph, pixel_rays, poses_around
from strategies import TINY_FIELD, TINY_GRID, seeds

from jaxngp.cameras import PosedImages, Rays
from jaxngp.checkpoints import Checkpoints
from jaxngp.config import (
    InputError,
    MarchConfig,
    NerfConfig,
    OccupancyConfig,
    OptimizerConfig,
    StratifiedConfig,
    TrainConfig,
    program_config,
)
from jaxngp.data.rays import RayTable
from jaxngp.device import compiled, formulation
from jaxngp.fields import Params, RadianceField, make_half_table
from jaxngp.losses import colour_loss
from jaxngp.occupancy import OccupancyGrid
from jaxngp.presets import PRESETS
from jaxngp.training import nerf
from jaxngp.training.loop import init_state, train
from jaxngp.training.nerf import NerfMetrics, PixelBatch, StepNoise
from jaxngp.training.state import TrainState
from jaxngp.training.step import apply_gradient, begin_steps
from jaxngp.visual_hull import PixelSet, pixel_set

SIZE = 20
CONFIG = NerfConfig(
    field=replace(TINY_FIELD, encoding=replace(TINY_GRID, num_levels=1, min_resolution=16, table_size=2**11)),
    sampler=MarchConfig(
        num_steps=64, num_samples=2**12, occupancy=OccupancyConfig(resolution=32, refresh_every=20, warmup_steps=40)
    ),
    optimizer=OptimizerConfig(warmup_steps=5),
    train=TrainConfig(num_rays=256, max_steps=110, steps_per_dispatch=8, seed=3),
)
"""Of all that trains here, so that the programs of a run are compiled once. One level, since each takes a second."""


BALL = replace(LARGE_BALL, radius=0.2)
"""So small that carving leaves some pixels out."""


@functools.cache
def ball_views() -> PosedImages:
    """Eight small views of the ball, from its closed form."""
    return photograph(BALL, make_camera(SIZE, SIZE, 40.0, poses_around(8, 1.8)))


def call(function: Any, *args: Any, donate: bool = False) -> Any:
    """function(*args, config=CONFIG) by the program that `train` has of it."""
    return compiled(function, *args, donate=donate, config=program_config(CONFIG))(*args)


@functools.cache
def hull() -> tuple[OccupancyGrid, PixelSet]:
    """On the host: to a jitted function, arrays of a program with a place are others than those without."""
    return jax.device_get(call(nerf.hull_of_views, ball_views()))


def unpacked(words: Any, count: int) -> np.ndarray:
    """(count,) bool: the lowest bits first."""
    bits = np.unpackbits(np.asarray(words, "<u4").reshape(-1).view(np.uint8), bitorder="little")
    return bits[:count].astype(bool)


def leaves(tree: Any) -> list[np.ndarray]:
    """On the host, where arithmetic compiles nothing; keys as their words."""
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(a) if is_key(a) else a) for a in jax.tree.leaves(tree)]


def assert_equal_bits(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of 14 dispatches, the last of them shorter: what it yielded, compiled, and saved at step 40."""
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
    steps = [*range(0, 110, 8), 110]
    assert [p.step for p in whole_run["yielded"]] == steps
    assert [p.finished for p in whole_run["yielded"]] == [False] * 14 + [True]
    assert int(whole_run["final"].state.step) == 110
    np.testing.assert_allclose([p.fraction for p in whole_run["yielded"]], np.array(steps) / 110)


def test_programs_are_compiled_once_before_step_one(whole_run: dict[str, Any]) -> None:
    before, *_, after = whole_run["compiled"]
    for name in ("nerf_steps", "refresh_occupancy", "hull_of_views"):
        assert sum(count for function, count in before.items() if name in function) == 1, before
    # Saving copies arrays, which compiles a few words; nothing of ours is compiled while training.
    later = after - before
    assert not [name for name in later if any(word in name for word in ("nerf", "occupancy", "hull"))], later
    assert whole_run["compiled"][1] == whole_run["compiled"][2]


def test_dispatches_given_together_are_the_same_run(whole_run: dict[str, Any]) -> None:
    """Twelve of them, then the thirteenth and what is left of the fourteenth."""
    config = replace(CONFIG, train=replace(CONFIG.train, calls_in_flight=12))
    alone, yielded = whole_run["yielded"][1:], []
    for progress in train(config, ball_views()):
        yielded.append(replace(progress, state=None))
        final = progress
    assert [p.step for p in yielded] == [0, 96, 110]
    assert_equal_bits(final.state, whole_run["final"].state)
    np.testing.assert_allclose(yielded[-1].num_samples, alone[-1].num_samples, rtol=1e-6)
    for progress, parts, weights in ((yielded[1], alone[:12], None), (yielded[2], alone[12:], (8, 6))):
        for name in ("loss", "psnr", "samples"):
            expected = np.average([float(getattr(p.metrics, name)) for p in parts], weights=weights)
            np.testing.assert_allclose(getattr(progress.metrics, name), expected, rtol=1e-6)


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


def test_the_grid_keeps_the_ball_within_its_hull(whole_run: dict[str, Any]) -> None:
    grid = whole_run["final"].state.occupancy
    flags, candidates = (unpacked(occupied, 32**3) for occupied in (grid.occupied, hull()[0].occupied))
    assert not flags[~candidates].any()
    centre = (np.indices((32,) * 3).reshape(3, -1)[::-1].T + 0.5) / 32
    distance = np.linalg.norm(centre - BALL.centre, axis=1)
    assert flags[np.abs(distance - 0.9 * BALL.radius) < 0.03].mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["base", "hundred_lines"])
def test_any_preset_resumes_bit_for_bit(preset: str, tmp_path: Path) -> None:
    """Its samplers, precision, optimiser and all, with a field that compiles in a moment."""
    whole = PRESETS[preset]
    field = replace(whole.field, encoding=replace(TINY_GRID, num_levels=1), hidden_width=8, colour_layers=1)
    config = replace(whole, field=field, train=replace(whole.train, num_rays=64, max_steps=22, max_seconds=0.0))
    config = replace(config, train=replace(config.train, steps_per_dispatch=min(4, whole.train.steps_per_dispatch)))
    if isinstance(whole.sampler, MarchConfig):
        occupancy = replace(whole.sampler.occupancy, resolution=32, refresh_every=8, warmup_steps=8)
        sampler = replace(whole.sampler, num_steps=64, num_samples=2**10, occupancy=occupancy)
    else:
        sampler = replace(whole.sampler, num_bins=8)
    config = replace(config, sampler=sampler)
    with Checkpoints(tmp_path) as checkpoints:
        for progress in train(config, ball_views()):
            if not checkpoints.latest_step() and progress.step >= PRESET_STOPS[preset]:
                checkpoints.save(progress)
        resume = checkpoints.restore(config)
        assert resume is not None
        assert 0 < resume.step < 22
        *_, last = train(config, ball_views(), resume=resume)
    assert_equal_bits(last.state, progress.state)


PRESET_STOPS = {"base": 8, "hundred_lines": 7}


def test_a_resumed_run_is_the_same_bit_for_bit(whole_run: dict[str, Any]) -> None:
    with Checkpoints(whole_run["workdir"]) as checkpoints:
        resumed = checkpoints.restore(CONFIG)
    assert resumed is not None
    assert resumed.step == int(resumed.state.step) == 40
    assert resumed.seconds == whole_run["yielded"][5].seconds
    assert resumed.num_samples == whole_run["yielded"][5].num_samples
    yielded = []
    for progress in train(CONFIG, ball_views(), resume=resumed):
        final = progress
        yielded.append(replace(progress, state=None))
    assert [p.step for p in yielded] == [*range(40, 110, 8), 110]
    assert_equal_bits(final.state, whole_run["final"].state)
    for found, expected in zip(yielded[1:], whole_run["yielded"][6:], strict=True):
        assert jax.tree.leaves(found.metrics) == jax.tree.leaves(expected.metrics)
        assert found.num_samples == expected.num_samples


# States.


def test_a_run_depends_on_the_seed_alone() -> None:
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


def test_training_leaves_what_the_caller_holds() -> None:
    state, other = init_state(0, config=CONFIG), init_state(0, config=CONFIG)
    data, pixels, rates = jax.device_put((ball_views(), hull()[1], RATES))
    held = jax.random.key(0)
    new, _ = call(nerf.nerf_steps, state, data, pixels, rates, np.int32(2), donate=True)
    assert state.params["encoding"]["table"].is_deleted()
    assert int(new.step) == 2
    for alive in (data, pixels, rates, other.params):
        assert not any(a.is_deleted() for a in jax.tree.leaves(alive))
    jax.random.uniform(held)
    np.testing.assert_array_equal(jax.random.key_data(new.key), jax.random.key_data(other.key))


RATES = np.full(CONFIG.train.steps_per_dispatch, 1e-2, np.float32)


def nerf_steps(state: TrainState, pixels: PixelSet, number: int) -> tuple[TrainState, NerfMetrics]:
    return call(nerf.nerf_steps, state, ball_views(), pixels, RATES, np.int32(number), donate=True)


def advance(seed: int, num_steps: list[int]) -> TrainState:
    state = init_state(seed, config=CONFIG)
    for number in num_steps:
        state, _ = nerf_steps(state, hull()[1], number)
    return state


def test_steps_do_not_depend_on_their_dispatch() -> None:
    """But for the average of the weights, which is brought up to date once a dispatch."""
    one, other = advance(0, [4]), advance(0, [1, 3])
    assert_equal_bits(one.replace(ema_params={}), other.replace(ema_params={}))
    assert not np.array_equal(advance(1, [4]).params["encoding"]["table"], one.params["encoding"]["table"])


def test_every_step_draws_anew() -> None:
    """From the key, which never changes, and the number of the step."""
    losses = []
    for step in (0, 1, 0):
        state = init_state(0, config=CONFIG).replace(step=jnp.int32(step))
        _, metrics = nerf_steps(state, hull()[1], 1)
        losses.append(float(metrics.loss))
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_no_step_changes_nothing() -> None:
    assert_equal_bits(advance(0, [0]), init_state(0, config=CONFIG))


def test_the_average_moves_as_by_so_many_steps() -> None:
    start, state = init_state(0, config=CONFIG), advance(0, [3])
    keep = CONFIG.optimizer.ema_decay**3
    for e, s, p in zip(*map(leaves, (state.ema_params, start.params, state.params)), strict=True):
        np.testing.assert_allclose(e, keep * s + (1 - keep) * p, rtol=1e-5, atol=1e-7)
    assert state.eval_params is state.ema_params
    assert replace(state, ema_params={}).eval_params is state.params


# Numbers that are none.


def spoilt(params: Params) -> Params:
    return jax.tree.map(lambda a: np.full_like(a, np.nan), params)


@functools.partial(jax.jit, static_argnames="config")
def update(
    state: TrainState, half_table: jax.Array | None, gradient: Params, metrics: NerfMetrics, *, config: NerfConfig
) -> tuple[TrainState, jax.Array | None, NerfMetrics]:
    run = replace(begin_steps(state, NerfMetrics, config=config), half_table=half_table)
    run = apply_gradient(run, gradient, metrics, jnp.float32(1e-2), config=config)
    return run.state, run.half_table, NerfMetrics(*run.sums)


def loss_of(
    params: Params,
    batch: PixelBatch,
    noise: StepNoise,
    grid: OccupancyGrid | None,
    *,
    config: NerfConfig,
    half_table: jax.Array | None = None,
) -> tuple[jax.Array, NerfMetrics]:
    field = RadianceField(params, half_table, config.field)
    return nerf.nerf_loss(field, jax.tree.map(jnp.asarray, ball_views().cameras), batch, noise, grid, config=config)


nerf_loss = jax.jit(loss_of, static_argnames="config")
loss_gradient = jax.jit(jax.grad(loss_of, has_aux=True), static_argnames="config")


def test_a_non_finite_update_is_left_out_and_counted() -> None:
    state = init_state(0, config=CONFIG)
    batch, noise = batch_and_noise(CONFIG)
    for value, skipped in ((np.nan, 1), (np.inf, 1), (0.5, 0)):
        rgba = np.ones_like(batch.rgba)
        rgba[:, 0] = value
        gradient, metrics = loss_gradient(state.params, batch.replace(rgba=rgba), noise, state.occupancy, config=CONFIG)
        new, _, metrics = update(state, None, gradient, metrics, config=CONFIG)
        assert int(new.step) == 1
        assert metrics.skipped == skipped
        same = jax.tree.map(np.array_equal, (state.params, state.opt_state), (new.params, new.opt_state))
        assert all(jax.tree.leaves(same)) == bool(skipped)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params))


def test_more_pixels_than_can_be_counted_are_refused() -> None:
    images = ball_views()
    many = images.replace(rgba=np.broadcast_to(np.uint8(0), (2**31, 4)))
    with pytest.raises(InputError, match="2147483648 pixels"):
        next(train(CONFIG, many))


def test_a_run_with_nan_loss_stops_and_is_not_saved(tmp_path: Path) -> None:
    start = next(train(CONFIG, ball_views()))
    broken = replace(start, state=start.state.replace(params=spoilt(start.state.params)))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="non-finite"):
        checkpoints.save(broken)
    assert not list(tmp_path.glob("checkpoints/*"))
    run = train(CONFIG, ball_views(), resume=broken)
    assert [next(run).step for _ in range(2)] == [0, 8]
    with pytest.raises(InputError, match=r"step 16: the last 16 updates were skipped.*the largest parameter is nan"):
        next(run)


# Refreshes of the grid.


def refreshed_density(step: int, *, change: Callable[[TrainState], TrainState] = lambda state: state) -> np.ndarray:
    """After a refresh of a fresh grid, before a certain step. A fresh field has density everywhere."""
    state = change(init_state(0, config=CONFIG).replace(step=jnp.int32(step)))
    return np.asarray(call(nerf.refresh_occupancy, state, donate=True).occupancy.density)


def test_a_refresh_sees_all_cells_only_in_warmup() -> None:
    warmup_steps = CONFIG.sampler.occupancy.warmup_steps
    assert (refreshed_density(0) > 0).all()
    assert (refreshed_density(warmup_steps - 1) > 0).all()
    looked = [refreshed_density(warmup_steps + more) > 0 for more in (0, 20, 0)]
    # Half as many draws, with replacement, as there are cells.
    np.testing.assert_allclose([share.mean() for share in looked], 1 - np.exp(-0.5), atol=0.02)
    np.testing.assert_array_equal(looked[0], looked[2])
    # Of independent looks, those at one cell both times are the product of the shares.
    np.testing.assert_allclose((looked[0] & looked[1]).mean(), (1 - np.exp(-0.5)) ** 2, atol=0.02)


def test_a_refresh_uses_the_weights_not_their_average() -> None:
    """The samples of the next steps are those of the weights that they change."""

    def spoil_average(state: TrainState) -> TrainState:
        return state.replace(ema_params=spoilt(state.ema_params))

    np.testing.assert_array_equal(refreshed_density(0, change=spoil_average), refreshed_density(0))


# What a GPU runs: other formulas of the same, which a CPU can compute too.


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_as_a_gpu_runs_them_are_the_steps(precision: str) -> None:
    """All of a step in its other formulation, and the rounds beyond the last step that only a GPU runs."""
    config = replace(CONFIG, field=replace(CONFIG.field, precision=precision))

    def three_steps() -> tuple[TrainState, NerfMetrics]:
        steps = functools.partial(nerf.nerf_steps.__wrapped__, config=config)
        return jax.jit(steps)(init_state(0, config=config), ball_views(), hull()[1], RATES, np.int32(3))

    expected, expected_metrics = three_steps()
    with formulation("gpu"):
        found, metrics = three_steps()
    assert int(found.step) == 3
    assert int(found.opt_state[1].count) == 3
    # Sums are in another order, and Adam divides gradients by their size: of most entries the third step is the same.
    for a, b in zip(leaves(expected), leaves(found), strict=True):
        assert np.mean(np.isclose(a, b, rtol=2e-2, atol=2e-4)) > 0.98
    for a, b in zip(*map(jax.tree.leaves, (expected_metrics, metrics)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_a_dispatch_draws_what_its_steps_draw_alone() -> None:
    pixels = hull()[1]
    draw = jax.jit(nerf.draw_batches, static_argnames=("num_steps", "config"))
    together = jax.device_get(draw(np.int32(7), jax.random.key(5), ball_views(), pixels, num_steps=3, config=CONFIG))
    for i in range(3):
        bits = draw_bits(5, 7 + i, config=CONFIG)
        alone = pick_pixels(bits[:, 0], ball_views(), pixels), make_noise(bits[:, 1:], config=CONFIG)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_half_table_is_read_and_follows_its_table() -> None:
    config = replace(CONFIG, field=replace(CONFIG.field, precision="bfloat16"))
    state = init_state(0, config=config)
    state = state.replace(params=jax.tree.map(lambda a: 1e3 * a if a.ndim == 2 and len(a) > 50 else a, state.params))
    batch, noise = nerf.draw_batches(state.step, state.key, ball_views(), None, num_steps=1, config=config)
    batch, noise = jax.tree.map(lambda a: a[0], (batch, noise))
    half_table = make_half_table(state.params, config=config.field)
    gradient, metrics = loss_gradient(state.params, batch, noise, state.occupancy, config=config, half_table=half_table)
    new, found, _ = update(state, half_table, gradient, metrics, config=config)
    assert found.dtype == jnp.float16
    assert new.params["encoding"]["table"].dtype == jnp.float32
    np.testing.assert_array_equal(found, make_half_table(new.params, config=config.field))
    assert not np.array_equal(found, half_table)
    # The loss does not look at the table itself; a dispatch begins with the half_table of its own.
    unknown = jax.tree.map(lambda a: a * np.nan if len(a) > 50 else a, state.params)
    loss_with = functools.partial(nerf_loss, batch=batch, noise=noise, grid=state.occupancy, config=config)
    loss, _ = loss_with(state.params, half_table=half_table)
    assert loss_with(unknown, half_table=half_table)[0] == loss
    assert loss_with(state.params, half_table=jnp.zeros_like(half_table))[0] != loss
    rates = jnp.zeros(1)
    _, metrics = nerf.nerf_steps(state, ball_views(), None, rates, jnp.int32(1), config=config)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)


# One step.

pick_pixels = jax.jit(nerf.pick_pixels)
set_of = jax.jit(pixel_set)
make_noise = jax.jit(nerf.make_noise, static_argnames="config")


@functools.partial(jax.jit, static_argnames="shape")
def _random_bits(seed: np.uint32, step: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(jax.random.fold_in(jax.random.key(seed), step), shape, jnp.uint32)


def draw_bits(seed: int, step: int = 0, *, config: NerfConfig) -> np.ndarray:
    """(R, 1 + B + 3) u32 of a step: a ray's pixel, its B jitters, its background."""
    return np.asarray(
        _random_bits(np.uint32(seed), step, (config.train.num_rays, 1 + config.sampler.jitters_per_ray + 3))
    )


@jax.jit
def cast(source: Any, batch: PixelBatch) -> Rays:
    return source.cast(batch.view, batch.xy)


def batch_and_noise(config: NerfConfig, seed: int = 0) -> tuple[PixelBatch, StepNoise]:
    """On the host."""
    bits = draw_bits(seed, config=config)
    return jax.device_get((pick_pixels(bits[:, 0], ball_views(), None), make_noise(bits[:, 1:], config=config)))


def test_a_drawn_pixel_has_the_ray_and_colour_it_names() -> None:
    views = ball_views()
    batch, _ = batch_and_noise(CONFIG)
    rays = cast(views.cameras, batch)
    all_rays = [pixel_rays(views.cameras[view]) for view in range(8)]
    direction = np.stack([d for _, d in all_rays]).reshape(-1, 3)
    origin = np.stack([o for o, _ in all_rays]).reshape(-1, 3)
    rgba = np.asarray(views.rgba).reshape(-1, 4)
    seen = set()
    for o, d, colour in zip(*map(np.asarray, (rays.origin, rays.direction, batch.rgba)), strict=True):
        (index,) = np.flatnonzero((np.abs(direction - d) + np.abs(origin - o)).sum(axis=1) < 1e-4)
        np.testing.assert_allclose(colour, rgba[index] / 255, atol=1e-6)
        seen.add(int(index))
    assert {i // SIZE**2 for i in seen} == set(range(8))  # all views
    assert {i % SIZE for i in seen} == {i // SIZE % SIZE for i in seen} == set(range(SIZE))  # all columns and rows


def test_a_row_of_a_ray_table_is_an_opaque_pixel() -> None:
    rng = np.random.default_rng(0)
    origin, direction, rgb = rng.uniform(size=(3, 9, 3)).astype(np.float32)
    table = RayTable(rays=Rays(origin=origin, direction=direction), rgb=rgb, width=0, height=0)
    batch = pick_pixels(rng.integers(0, 2**32, 100, np.uint32), table, None)
    rays = cast(table, batch)
    rows = [int(np.flatnonzero((origin == o).all(axis=1))[0]) for o in np.asarray(rays.origin)]
    assert set(rows) == set(range(9))
    np.testing.assert_array_equal(rays.direction, direction[rows])
    np.testing.assert_array_equal(batch.rgba, np.column_stack([rgb[rows], np.ones(100)]))


MANY = replace(CONFIG, train=replace(CONFIG.train, num_rays=2**15))
"""So many rays that frequencies tell."""


def numbered_views() -> PosedImages:
    """Views whose pixels show their own numbers."""
    number = np.arange(8 * SIZE**2, dtype="<u4").reshape(-1, 1)
    return replace(ball_views(), rgba=number.view(np.uint8))


def numbers(batch: PixelBatch) -> np.ndarray:
    return np.round(np.asarray(batch.rgba, np.float64) * 255).astype(np.int64) @ 256 ** np.arange(4)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.02], ids=["all", "half", "few"])
@settings(max_examples=3)
@given(seeds)
def test_pixels_of_the_set_are_drawn_uniformly(share: float, seed: int) -> None:
    flags = np.random.default_rng(seed).uniform(size=8 * SIZE**2) < share
    bits = draw_bits(seed, config=MANY)[:, 0]
    counts = np.bincount(numbers(pick_pixels(bits, numbered_views(), set_of(flags))), minlength=len(flags))
    assert not counts[~flags].any()
    assert_equally_often(counts[flags])


def test_without_a_set_pixels_are_drawn_uniformly() -> None:
    bits = draw_bits(0, config=MANY)[:, 0]
    assert_equally_often(np.bincount(numbers(pick_pixels(bits, numbered_views(), None)), minlength=8 * SIZE**2))


def assert_equally_often(counts: np.ndarray) -> None:
    """Chi-square, of n - 1 degrees of freedom, within six of its standard deviations."""
    mean, freedom = counts.mean(), len(counts) - 1
    assert abs(np.sum((counts - mean) ** 2) / mean - freedom) < 6 * (2 * freedom) ** 0.5


def test_a_pixel_of_a_set_keeps_its_ray() -> None:
    flags = np.random.default_rng(0).uniform(size=8 * SIZE**2) < 0.3
    batch = pick_pixels(np.arange(flags.sum(), dtype=np.uint32), ball_views(), set_of(flags))
    direct = pick_pixels(np.flatnonzero(flags).astype(np.uint32), ball_views(), None)
    found, expected = (np.column_stack([b.view, b.xy, b.rgba]) for b in (batch, direct))
    order = [np.lexsort(a.T) for a in (found, expected)]
    np.testing.assert_array_equal(found[order[0]], expected[order[1]])


@pytest.mark.parametrize(("background", "expected"), [("white", 1.0), ("black", 0.0)])
def test_a_fixed_background_is_that_colour(background: Any, expected: float) -> None:
    np.testing.assert_array_equal(nerf.background(np.full((5, 3), 0.3), background), np.full((5, 3), expected))


def test_a_random_background_differs_from_ray_to_ray() -> None:
    colours = np.asarray(batch_and_noise(MANY)[1].background)[:1000]
    assert len(np.unique(colours)) > 2900
    np.testing.assert_allclose(colours.mean(axis=0), 0.5, atol=0.05)


BINS = replace(CONFIG, sampler=StratifiedConfig(num_bins=5), train=replace(CONFIG.train, num_rays=2**15))


@pytest.mark.parametrize("config", [MANY, BINS], ids=["march", "bins"])
def test_all_noise_is_below_one_whatever_the_bits(config: NerfConfig) -> None:
    """A jitter of 1 would put a sample into the next step."""
    num_bits = config.sampler.jitters_per_ray + 3
    for bits in (0, 1, 2**31, 2**32 - 256, 2**32 - 1):
        noise = make_noise(np.full((config.train.num_rays, num_bits), bits, np.uint32), config=config)
        for number in (*np.unique(noise.jitter), *np.unique(noise.background)):
            assert 0 <= number < 1
            np.testing.assert_allclose(number, bits / 2**32, atol=2**-24)  # as fine as float32 is below 1


@pytest.mark.parametrize("config", [MANY, BINS], ids=["march", "bins"])
def test_what_a_step_draws_is_uniform_and_independent(config: NerfConfig) -> None:
    """Pixels, jitters and backgrounds; also those of the next ray, and of the next step."""
    columns = []
    for step in range(2):
        bits = draw_bits(7, step, config=config)
        noise = make_noise(bits[:, 1:], config=config)
        number = numbers(pick_pixels(bits[:, 0], numbered_views(), None))
        jitter = np.asarray(noise.jitter).reshape(len(bits), -1)
        columns += [(number + 0.5) / (8 * SIZE**2), *jitter.T, *np.asarray(noise.background).T]
    drawn = np.array(columns, np.float64)
    count = drawn.shape[1]
    # Kolmogorov and Smirnov: sqrt(count) times the largest distance is above 2.5 once in 10^5 times.
    distance = np.abs(np.sort(drawn, axis=1) - (np.arange(count) + 0.5) / count).max(axis=1)
    assert (distance < 2.5 / count**0.5 + 1 / (8 * SIZE**2)).all()
    drawn = np.concatenate([drawn, np.roll(drawn, 1, axis=1)])
    # The correlation of two independent columns has standard deviation 1 / sqrt(count).
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 5 / count**0.5


# Pixels that show nothing.


def facing_and_others() -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the pixels of the survey, and of those that it leaves out."""
    flags = unpacked(hull()[1].words, 8 * SIZE**2)
    return np.flatnonzero(flags), np.flatnonzero(~flags)


def gradient_of_pixels(number: np.ndarray, noise: StepNoise) -> Any:
    batch = pick_pixels(number.astype(np.uint32), ball_views(), None)
    params = jax.device_get(advance(0, [4]).params)
    gradient, metrics = loss_gradient(params, batch, noise, hull()[0], config=CONFIG)
    assert metrics.rays == len(number)  # all fit
    return gradient


def test_leaving_pixels_out_only_scales_the_gradient() -> None:
    """Half a batch that shows nothing, and in its place the other half once more: that doubles the gradient."""
    facing, others = facing_and_others()
    assert min(len(facing), len(others)) > 128
    rng = np.random.default_rng(0)
    half, nothing = rng.choice(facing, 128, replace=False), rng.choice(others, 128, replace=False)
    noise = jax.tree.map(lambda a: np.concatenate([a[:128], a[:128]]), batch_and_noise(CONFIG)[1])
    with_others = gradient_of_pixels(np.concatenate([half, nothing]), noise)
    without = gradient_of_pixels(np.concatenate([half, half]), noise)
    for a, b in zip(jax.tree.leaves(with_others), jax.tree.leaves(without), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(2 * np.asarray(a), b, rtol=1e-4, atol=1e-5 * np.abs(b).max())  # sums in other orders


def test_pixels_that_face_no_candidate_get_no_gradient() -> None:
    _, others = facing_and_others()
    for number in (others[:256], others[-256:]):
        for leaf in jax.tree.leaves(gradient_of_pixels(number, batch_and_noise(CONFIG)[1])):
            np.testing.assert_array_equal(leaf, 0)


def test_a_step_draws_from_the_set_that_it_is_given() -> None:
    """From pixels that show nothing it learns nothing; weights decay all the same."""
    facing, others = facing_and_others()
    changed = []
    for number in (facing, others):
        flags = np.zeros(8 * SIZE**2, bool)
        flags[number] = True
        start = init_state(0, config=CONFIG).replace(occupancy=jax.tree.map(np.asarray, hull()[0]))
        table = np.array(start.params["encoding"]["table"])
        state, metrics = nerf_steps(start, set_of(flags), 4)
        changed.append(not np.array_equal(state.params["encoding"]["table"], table))
        assert (metrics.samples > 0) == changed[-1]
    assert changed == [True, False]


@functools.partial(jax.jit, static_argnames="config")
def both_losses(params: Params, batch: PixelBatch, noise: StepNoise, *, config: NerfConfig) -> dict[str, Any]:
    """In one program, which renders once."""
    configs = {loss: replace(config, train=replace(config.train, loss=loss)) for loss in ("l2", "huber")}
    return {loss: loss_of(params, batch, noise, None, config=config) for loss, config in configs.items()}


def test_the_loss_is_the_mean_over_rays() -> None:
    """Bins, so that no grid is needed; the colours come from the definition of each stage."""
    sampler = StratifiedConfig(num_bins=16, near=1.0, far=2.6)
    config = replace(CONFIG, sampler=sampler)
    num_rays, params = config.train.num_rays, init_state(0, config=CONFIG).params
    batch, noise = batch_and_noise(config)
    edges = np.linspace(1.0, 2.6, 16)
    lower = np.append(edges[0], (edges[1:] + edges[:-1]) / 2)
    upper = np.append((edges[1:] + edges[:-1]) / 2, edges[-1])
    t = lower + (upper - lower) * noise.jitter.astype(np.float64)
    dt = np.concatenate([np.diff(t), np.full((num_rays, 1), sampler.last_interval)], axis=1)
    rays = cast(ball_views().cameras, batch)
    origin, direction = (np.asarray(a)[:, None] for a in (rays.origin, rays.direction))
    position = (origin + t[..., None] * direction).astype(np.float32).reshape(-1, 3)
    field = RadianceField.of(params, config=config.field)
    density, rgb = jax.jit(RadianceField.__call__)(field, position, np.repeat(direction[:, 0], 16, axis=0))
    thickness = np.asarray(density, np.float64).reshape(num_rays, 16) * dt
    before = np.cumsum(thickness, axis=1)[:, :-1]
    weights = np.exp(-np.concatenate([np.zeros((num_rays, 1)), before], axis=1)) * -np.expm1(-thickness)
    through = 1 - weights.sum(axis=1, keepdims=True)
    colour = np.sum(weights[..., None] * np.asarray(rgb).reshape(num_rays, 16, 3), axis=1) + through * noise.background
    alpha = batch.rgba[:, 3:]
    target = alpha * batch.rgba[:, :3] + (1 - alpha) * noise.background
    for loss, (found, metrics) in both_losses(params, batch, noise, config=config).items():
        losses = colour_loss(colour.astype(np.float32), target, loss=loss)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, np.mean(losses), rtol=1e-4)
        np.testing.assert_allclose(metrics.psnr, -10 * np.log10(np.mean((colour - target) ** 2)), rtol=1e-4)


def test_rays_that_do_not_fit_are_counted_and_left_out() -> None:
    params, full = init_state(0, config=CONFIG).params, init_state(0, config=CONFIG).occupancy
    batch, noise = batch_and_noise(CONFIG)

    def metrics_of(batch: PixelBatch) -> NerfMetrics:
        return loss_gradient(params, batch, noise, full, config=CONFIG)[1]

    def only(chosen: np.ndarray) -> PixelBatch:
        """The rays chosen; the others miss the cube, take no sample, and show what they should."""
        return batch.replace(
            xy=np.where(chosen[:, None], batch.xy, -1e4), rgba=np.where(chosen[:, None], batch.rgba, 0)
        )

    metrics, number = metrics_of(batch), np.arange(256)
    assert 0 < metrics.rays < 256
    assert 0 < metrics.samples <= CONFIG.sampler.num_samples
    quarters = [metrics_of(only(number // 64 == quarter)) for quarter in range(4)]
    assert [part.dropped_samples for part in quarters] == [0] * 4
    assert metrics.samples + metrics.dropped_samples == sum(part.samples for part in quarters)
    # The first rays fit, and the mean is over them: it is that of a batch to which the others add nothing.
    used = number < int(metrics.rays)
    alone, share = metrics_of(only(used)), float(metrics.rays) / 256
    assert alone.rays == 256
    assert alone.samples == metrics.samples
    assert alone.dropped_samples == 0
    np.testing.assert_allclose(alone.loss, share * metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(10 ** (-alone.psnr / 10), share * 10 ** (-metrics.psnr / 10), rtol=1e-5)
    # What the others should have been makes no difference.
    other = np.where(used[:, None], batch.rgba, 1 - batch.rgba)
    assert metrics_of(batch.replace(rgba=other)).loss == metrics.loss
    other = np.where(number[:, None] == metrics.rays - 1, np.float32([0.2, 0.5, 0.7, 1.0]), batch.rgba)
    assert metrics_of(batch.replace(rgba=other)).loss != metrics.loss
