"""Rendering: analytic scenes against their closed forms, and whole views against single batches of rays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.tree_util import Partial
from scenes import BALL, Ball, Slab, look_at, make_camera, pixel_rays
from strategies import TINY_FIELD, arrays32, jit_to_numpy, seeds

from jaxngp import occupancy, rendering
from jaxngp.cameras import Rays
from jaxngp.compositing import RenderOutput
from jaxngp.config import MarchConfig, OccupancyConfig, StratifiedConfig
from jaxngp.device import Batching, formulation
from jaxngp.fields import RadianceField, init_params

G, R = 32, 77
STEPS = 512
CONFIG = MarchConfig(num_steps=STEPS, num_samples=R * STEPS, occupancy=OccupancyConfig(resolution=G))
DT = CONFIG.step_size
init_occupancy = jit_to_numpy(occupancy.init_occupancy)
FULL = init_occupancy(np.ones(G**3, bool))
BACKGROUND = np.array([0.2, 0.7, 0.4], np.float32)
SLAB = Slab(low=100 * DT, high=160 * DT, density=7.0, rgb=(0.9, 0.2, 0.1))
FOG = Slab(low=0.0, high=1.0, density=3.0, rgb=(0.9, 0.2, 0.1))
BINS = StratifiedConfig(num_bins=600, near=0.5, far=3.0)


def some_rays(seed: int = 0, spread: float = 0.5) -> Rays:
    """(R,) rays from all around toward the middle, more or less."""
    rng = np.random.default_rng(seed)
    outward = rng.normal(size=(R, 3))
    origin = 0.5 + 1.6 * outward / np.linalg.norm(outward, axis=1, keepdims=True)
    direction = rng.uniform(0.5 - spread, 0.5 + spread, (R, 3)) - origin
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return Rays(origin.astype(np.float32), direction.astype(np.float32))  # type: ignore[arg-type]


@functools.partial(jit_to_numpy, static_argnames="sampler")
def render_batch(field: Any, rays: Rays, grid: Any, jitter: jax.Array, sampler: Any = CONFIG) -> RenderOutput:
    background = jnp.broadcast_to(jnp.asarray(BACKGROUND), (R, 3))
    return rendering.render_rays(field, rays, grid, jitter, background, sampler=sampler)[0]


def ball_at(numbers: dict[str, jax.Array], position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
    return Ball(**numbers).evaluate(position, direction)  # type: ignore[arg-type]


def slab_at(numbers: dict[str, jax.Array], position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
    return Slab(**numbers).evaluate(position, direction)  # type: ignore[arg-type]


def field_of(scene: Slab | Ball) -> Partial:
    """The field of a scene whose numbers are arguments of a program, so that one program does for all balls."""
    numbers = {name: np.asarray(value, np.float32) for name, value in vars(scene).items()}
    return Partial(ball_at if isinstance(scene, Ball) else slab_at, numbers)


render_chunk = jit_to_numpy(rendering.render_chunk, static_argnames=("sampler", "batching"))


def batching(rays: int = R, lanes: int = 2**13, samples: int = 8) -> Batching:
    return Batching(rays=rays, lanes=lanes, tracing_lanes=1, samples=samples)


def assert_close(found: RenderOutput, expected: RenderOutput, atol: float, depth_atol: float | None = None) -> None:
    np.testing.assert_allclose(found.rgb, expected.rgb, atol=atol)
    np.testing.assert_allclose(found.opacity, expected.opacity, atol=atol)
    met = np.asarray(expected.opacity) > 0.1  # else depth is the mean over next to nothing
    atol = 10 * atol if depth_atol is None else depth_atol
    np.testing.assert_allclose(np.asarray(found.depth)[met], np.asarray(expected.depth)[met], atol=atol)


def boundary_error(scene: Slab | Ball, dt: float) -> float:
    """A body's two ends fall inside a step: its thickness is off by up to one step's, and so is its light."""
    return 1.2 * scene.density * dt


# Closed forms.


@given(arrays32((R, 2), 0.01, 0.99))
def test_a_slab_of_whole_steps_is_its_closed_form(xy: np.ndarray) -> None:
    origin = np.concatenate([xy, np.full((R, 1), -1, np.float32)], axis=1)
    rays = Rays(origin=origin, direction=np.tile(np.float32([0, 0, 1]), (R, 1)))  # type: ignore[arg-type]
    out = render_batch(field_of(SLAB), rays, FULL, np.full(R, 0.5, np.float32))
    assert_close(out, SLAB.seen(origin, rays.direction, BACKGROUND), atol=2e-5, depth_atol=1e-4)


@pytest.mark.parametrize("scene", [SLAB, BALL], ids=["slab", "ball"])
@settings(max_examples=10)
@given(seeds, arrays32(R, 0, 0.99))
def test_any_ray_sees_the_closed_form_of_a_scene(scene: Any, seed: int, jitter: np.ndarray) -> None:
    rays = some_rays(seed)
    expected = scene.seen(rays.origin, rays.direction, BACKGROUND)
    assert_close(
        render_batch(field_of(scene), rays, FULL, jitter), expected, atol=boundary_error(scene, DT), depth_atol=4 * DT
    )


def test_a_view_shows_the_closed_form_of_a_scene() -> None:
    camera = make_camera(24, 16, 26.0, look_at((1.6, 0.1, 1.3)))
    out = rendering.render_view(field_of(BALL), camera, FULL, BACKGROUND, sampler=CONFIG)
    expected = BALL.seen(*pixel_rays(camera), BACKGROUND)
    assert isinstance(out.rgb, np.ndarray)
    assert out.rgb.shape == (16, 24, 3)
    assert out.opacity.shape == out.depth.shape == (16, 24)
    assert 0.1 < np.mean(np.asarray(expected.opacity) > 0.5) < 0.9
    assert_close(out, expected, atol=boundary_error(BALL, DT), depth_atol=4 * DT)


def test_a_camera_in_the_scene_sees_what_is_before_it() -> None:
    rays = replace(some_rays(), origin=np.tile(np.float32(BALL.centre), (R, 1)))
    expected = BALL.seen(rays.origin, rays.direction, BACKGROUND)
    out = render_batch(field_of(BALL), rays, FULL, np.full(R, 0.5, np.float32))
    assert_close(out, expected, atol=boundary_error(BALL, DT), depth_atol=4 * DT)


def test_bins_see_the_closed_form_of_a_scene() -> None:
    rays = some_rays()
    out = render_batch(field_of(BALL), rays, None, np.full((R, BINS.num_bins), 0.5, np.float32), BINS)
    expected = BALL.seen(rays.origin, rays.direction, BACKGROUND)
    dt = (BINS.far - BINS.near) / (BINS.num_bins - 1)
    assert_close(out, expected, atol=boundary_error(BALL, dt), depth_atol=4 * dt)


def test_the_backgrounds_gradient_is_what_gets_through() -> None:
    @jax.jit
    @jax.grad
    def gradient(background: jax.Array, field: Any, rays: Rays, grid: Any, jitter: jax.Array) -> jax.Array:
        return jnp.sum(rendering.render_rays(field, rays, grid, jitter, background, sampler=CONFIG)[0].rgb)

    args = field_of(BALL), some_rays(), FULL, np.full(R, 0.5, np.float32)
    out = render_batch(*args)
    found = gradient(np.zeros((R, 3), np.float32), *args)
    np.testing.assert_allclose(found, np.tile(1 - out.opacity[:, None], (1, 3)), atol=1e-6)


def cloud(position: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Density and colours without edges, so that what is seen has a slope; of no density near the cube's faces."""
    offset = position - jnp.array([0.5, 0.55, 0.45])
    return 20 * jnp.exp(-0.5 * jnp.sum(offset**2, axis=-1) / 0.06**2), 0.5 + 0.4 * jnp.sin(8 * offset + 1)


@jit_to_numpy
def cloud_and_gradient(rays: Rays, grid: occupancy.OccupancyGrid, cotangent: jax.Array) -> tuple:
    """What each ray sees of the cloud, times a cotangent (R, 3), and its gradient in the ray's origin."""

    def seen(origin: jax.Array) -> tuple[jax.Array, jax.Array]:
        jitter, background = jnp.full(R, 0.5), jnp.broadcast_to(jnp.asarray(BACKGROUND), (R, 3))
        out, _ = rendering.render_rays(cloud, replace(rays, origin=origin), grid, jitter, background, sampler=CONFIG)
        colour = jnp.sum(out.rgb * cotangent, axis=1)
        return jnp.sum(colour), colour

    gradient, colour = jax.grad(seen, has_aux=True)(rays.origin)
    return colour, gradient


@pytest.mark.parametrize("width", [G, 20], ids=["all occupied", "a box in the middle"])
def test_a_colours_gradient_in_the_origin_is_its_slope(width: int) -> None:
    """Also where steps are counted from somewhere inside the cube: as of a camera's pose, say."""
    grid = init_occupancy(np.pad(np.ones((width,) * 3, bool), (G - width) // 2).reshape(-1))
    rays, cotangent = some_rays(spread=0.1), np.random.default_rng(0).uniform(0.5, 1, (R, 3)).astype(np.float32)
    _, gradient = cloud_and_gradient(rays, grid, cotangent)
    h, slopes = 2e-3, []
    for step in h * np.eye(3, dtype=np.float32):
        ahead, behind = (
            cloud_and_gradient(replace(rays, origin=rays.origin + s), grid, cotangent)[0] for s in (step, -step)
        )
        slopes.append((ahead - behind) / (2 * h))
    assert np.median(np.abs(slopes)) > 0.1
    # The third derivative is of the order of 1 / 0.06^3, times h^2 / 6; and float32 has 1e-6 / h.
    np.testing.assert_allclose(gradient, np.stack(slopes, axis=1), rtol=1e-2, atol=h**2 / 6 / 0.06**3 + 1e-3)


# Whole views against batches.


def patchy_grid(seed: int = 0) -> occupancy.OccupancyGrid:
    """Cells in some of 4^3 blocks: rays of very different numbers of samples."""
    blocks = np.random.default_rng(seed).uniform(size=(4, 4, 4)) < 0.5
    return init_occupancy(np.kron(blocks, np.ones((8, 8, 8))).astype(bool).reshape(-1))


@pytest.mark.parametrize(
    ("lanes", "per_round", "scene"),
    [(16, 8, replace(BALL, density=400.0)), (5, 3, FOG)],
    ids=["few lanes", "few samples"],
)
def test_a_chunk_is_the_batch_with_a_buffer_for_all(lanes: int, per_round: int, scene: Slab | Ball) -> None:
    size = batching(lanes=lanes, samples=per_round)
    out, _ = render_chunk(field_of(scene), some_rays(), patchy_grid(), BACKGROUND, sampler=CONFIG, batching=size)
    expected = render_batch(field_of(scene), some_rays(), patchy_grid(), np.full(R, 0.5, np.float32))
    assert np.ptp(np.asarray(expected.opacity)) > 0.5
    assert_close(out, expected, atol=1.2e-4, depth_atol=1e-3)


@pytest.mark.slow
def test_ending_rays_early_costs_little_and_saves_work() -> None:
    """Less light than the limit, and fewer evaluations of the field."""
    results = []
    for limit in (0.0, 0.3):
        sampler = replace(CONFIG, min_transmittance=limit)
        results.append(
            rendering.render_chunk(field_of(BALL), some_rays(), FULL, np.zeros(3, np.float32), sampler=sampler)
        )
    (exact, most), (early, fewer) = results
    missing = np.asarray(exact.opacity) - np.asarray(early.opacity)
    assert (missing > -1e-5).all()
    assert 1e-3 < missing.max() < 0.3
    assert np.abs(np.asarray(early.rgb) - exact.rgb).max() < 0.3
    assert fewer < most


def test_work_follows_the_samples_that_are_there() -> None:
    """Where no cell is occupied, there are none."""
    grid, size = init_occupancy(np.zeros(G**3, bool)), batching(lanes=16)
    out, evaluations = render_chunk(field_of(BALL), some_rays(), grid, BACKGROUND, sampler=CONFIG, batching=size)
    assert evaluations == 0
    np.testing.assert_array_equal(out.rgb, np.tile(BACKGROUND, (R, 1)))
    np.testing.assert_array_equal(out.opacity, 0)
    np.testing.assert_array_equal(out.depth, 0)


def test_rays_that_all_miss_the_box_see_the_background() -> None:
    rays = some_rays()
    away = replace(rays, direction=-np.asarray(rays.direction))
    size = batching(lanes=16)
    out, evaluations = render_chunk(field_of(BALL), away, FULL, BACKGROUND, sampler=CONFIG, batching=size)
    assert evaluations == 0
    np.testing.assert_array_equal(out.rgb, np.tile(BACKGROUND, (R, 1)))


@pytest.mark.parametrize(("max_chunk", "sampler"), [(32, CONFIG), (76, BINS)], ids=["march", "bins"])
def test_chunks_make_up_the_whole_whatever_their_size(max_chunk: int, sampler: Any) -> None:
    rays = jax.tree.map(lambda a: a.reshape(7, 11, 3), some_rays())
    grid = FULL if sampler is CONFIG else None
    size, whole = batching(rays=max_chunk, lanes=16), batching(lanes=16)
    expected, _ = render_chunk(field_of(BALL), some_rays(), grid, BACKGROUND, sampler=sampler, batching=whole)
    out = rendering.render_ray_grid(field_of(BALL), rays, grid, BACKGROUND, sampler=sampler, batching=size)
    assert out.rgb.shape == (7, 11, 3)
    assert out.depth.shape == (7, 11)
    for name in ("rgb", "opacity", "depth"):
        found = getattr(out, name).reshape(R, -1)
        np.testing.assert_allclose(found, getattr(expected, name).reshape(R, -1), atol=2e-6)


def test_all_chunks_share_one_program() -> None:
    traced, size = [], batching(rays=20, lanes=8)

    def evaluate(position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        traced.append(position.shape)
        return BALL.evaluate(position, direction)

    for seed in (0, 1):
        rendering.render_ray_grid(Partial(evaluate), some_rays(seed), FULL, BACKGROUND, sampler=CONFIG, batching=size)
    assert len(traced) == 1


def test_a_chunk_of_bins_is_the_batch_of_bins() -> None:
    size = batching(lanes=16)
    out, evaluations = render_chunk(field_of(BALL), some_rays(), None, BACKGROUND, sampler=BINS, batching=size)
    expected = render_batch(field_of(BALL), some_rays(), None, np.full((R, BINS.num_bins), 0.5, np.float32), BINS)
    assert_close(out, expected, atol=3e-6)
    assert evaluations == R * BINS.num_bins


@given(hnp.arrays(np.int32, R, elements=st.integers(0, 40) | st.just(0)), st.integers(1, 3))
def test_rays_queue_by_rounds_and_then_in_image_order(counts: np.ndarray, per_round: int) -> None:
    queue, length = longest_first(counts, per_round)
    rank = np.searchsorted(per_round * np.array([4, 8, 16]), counts)
    expected = sorted(np.flatnonzero(counts), key=lambda ray: (-rank[ray], ray))
    np.testing.assert_array_equal(queue[:length], expected)
    assert ((queue >= 0) & (queue < R)).all()


longest_first = jit_to_numpy(rendering.longest_first)


def test_marching_without_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid = None: marching needs an OccupancyGrid"):
        rendering.render_chunk(field_of(BALL), some_rays(), None, BACKGROUND, sampler=CONFIG)


# Many fields at once, and both formulations.

TINY = MarchConfig(num_steps=64, num_samples=R * 64, occupancy=OccupancyConfig(resolution=G))


@jit_to_numpy
def tiny_field(seed: jax.Array) -> RadianceField:
    params = init_params(jax.random.key(seed), config=TINY_FIELD)
    return RadianceField.of(jax.tree.map(lambda a: 3 * a, params), config=TINY_FIELD)


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


@pytest.mark.slow
def test_stacked_fields_render_as_each_alone() -> None:
    """Two scenes in one program, as batches of training and as views, which end their rays early."""
    fields, grids = [tiny_field(0), tiny_field(1)], [patchy_grid(0), patchy_grid(1)]
    jitter, background = jnp.full(R, 0.3, jnp.float32), jnp.broadcast_to(jnp.asarray(BACKGROUND), (R, 3))

    def batch(field: Any, grid: Any) -> RenderOutput:
        return rendering.render_rays(field, some_rays(), grid, jitter, background, sampler=TINY)[0]

    def chunk(field: Any, grid: Any) -> RenderOutput:
        size = batching(lanes=16)
        return rendering.render_chunk(field, some_rays(), grid, jnp.asarray(BACKGROUND), sampler=TINY, batching=size)[0]

    for render in (batch, chunk):
        both = jax.jit(jax.vmap(render))(stacked(*fields), stacked(*grids))
        alone = stacked(*map(jax.jit(render), fields, grids))
        assert np.abs(np.asarray(alone.rgb)[0] - np.asarray(alone.rgb)[1]).max() > 0.05
        assert_close(both, alone, atol=3e-5)


@given(seeds)
@settings(max_examples=20)
def test_samples_that_light_does_not_reach_change_nothing(seed: int) -> None:
    """Left out, they change a colour, which is in [0, 1], by no more than the light that gets to them."""
    field, grid = tiny_field(np.uint32(seed)), patchy_grid(seed % 3)
    denser = jax.tree.map(lambda a: 4 * a, field.params["density_mlp"])
    field = field.replace(params={**field.params, "density_mlp": denser})
    jitter, background = np.full(R, 0.5, np.float32), np.zeros((R, 3), np.float32)
    (all_of_them, full), (cut, few) = (
        batch_of("cpu", sampler)(field, some_rays(), grid, jitter, background)
        for sampler in (TINY, replace(TINY, num_candidates=TINY.num_samples, min_transmittance=0.01))
    )
    assert few.num_samples <= full.num_samples
    np.testing.assert_allclose(cut.rgb, all_of_them.rgb, atol=0.01 + 1e-5)
    np.testing.assert_allclose(cut.opacity, all_of_them.opacity, atol=0.01 + 1e-5)


@functools.cache
def batch_of(device: Literal["cpu", "gpu"], sampler: MarchConfig) -> Callable[..., tuple]:
    """`render_rays` in the formulation for a device: a function of its own, for jax keeps what it has traced."""

    def batch(*args: Any) -> tuple:
        with formulation(device):
            return rendering.render_rays(*args, sampler=sampler)

    return jit_to_numpy(batch)


def chunk_of(device: Literal["cpu", "gpu"]) -> Callable[..., tuple]:
    """`render_chunk` likewise."""

    def chunk(*args: Any) -> tuple:
        with formulation(device):
            return rendering.render_chunk.__wrapped__(*args, sampler=TINY, batching=batching(lanes=16))

    return jit_to_numpy(chunk)


@pytest.mark.parametrize("render", ["batch", "chunk"])
def test_both_formulations_render_the_same(render: str) -> None:
    """Light to 3e-8 of each sample's optical depth, which the fixed point of a GPU rounds, and to float32's sums."""
    args = tiny_field(np.uint32(0)), some_rays(), patchy_grid()
    if render == "batch":
        args += np.full(R, 0.5, np.float32), np.zeros((R, 3), np.float32)
        outs = [batch_of(device, TINY)(*args)[0] for device in ("cpu", "gpu")]
    else:
        outs = [chunk_of(device)(*args, np.zeros(3, np.float32))[0] for device in ("cpu", "gpu")]
    assert np.ptp(outs[0].opacity) > 0.2
    assert_close(outs[0], outs[1], atol=2e-5)
