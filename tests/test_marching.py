"""Marching: which steps are taken, in float64; how they are packed, by a loop over rays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scenes import cell_numbers, slab_interval
from strategies import TINY_MARCH, arrays32, directions, floats32, jit_to_numpy, points, seeds

from jaxngp import marching, occupancy
from jaxngp.bitsets import pack_bits
from jaxngp.cameras import Rays
from jaxngp.config import MarchConfig, StratifiedConfig
from jaxngp.device import formulation
from jaxngp.marching import Candidates, Samples, Steps
from jaxngp.occupancy import OccupancyGrid
from jaxngp.presets import PRESETS

R = 16
CONFIG = TINY_MARCH  # 64 steps, a buffer of 64 samples
ROOMY = replace(CONFIG, num_samples=R * CONFIG.num_steps)
G = CONFIG.occupancy.resolution
DT = CONFIG.step_size

init_occupancy = jit_to_numpy(occupancy.init_occupancy)
occupied_bounds = jit_to_numpy(occupancy.occupied_bounds)
packed = jit_to_numpy(pack_bits)
box_interval = jit_to_numpy(marching.box_interval)
find_candidates = jit_to_numpy(marching.find_candidates, static_argnames="config")
find_visible = jit_to_numpy(marching.find_visible, static_argnames="config")
march_rays = jit_to_numpy(marching.march_rays, static_argnames="config")
stratified_samples = jit_to_numpy(marching.stratified_samples, static_argnames=("num_rays", "config"))


@jit_to_numpy
def sample_gradient(rays: Rays, grid: OccupancyGrid, jitter: jax.Array, cotangent: jax.Array) -> tuple:
    """The samples, and the gradient in the rays' origins of the sum of their t times a cotangent."""

    def total(origin: jax.Array) -> tuple[jax.Array, Samples]:
        samples = marching.march_rays(replace(rays, origin=origin), grid, jitter, config=ROOMY)
        return jnp.sum(jnp.where(samples.valid, samples.t, 0) * cotangent), samples

    gradient, samples = jax.grad(total, has_aux=True)(rays.origin)
    return samples, gradient


FULL = init_occupancy(np.ones(G**3, bool))
EMPTY = init_occupancy(np.zeros(G**3, bool))
BOXED = init_occupancy(np.pad(np.ones((9, 20, 12), bool), ((11, 12), (6, 6), (20, 0))).reshape(-1))
jitters = arrays32(R, 0, float(np.nextafter(np.float32(1), 0)))


@st.composite
def rays(draw: st.DrawFn) -> Rays:
    """Toward the cube, along axes, from inside, from faces, and past it.

    No number is tiny but not 0: how long a ray stays within 1e-12 of a face is nothing that float32 could tell.
    """
    special = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])
    origin = draw(hnp.arrays(np.float32, (R, 3), elements=floats32(-2, 3) | special))
    toward = (draw(points(R)).astype(np.float64) - origin) * draw(st.sampled_from([1, 1, 1, -1]))
    length = np.linalg.norm(toward, axis=1, keepdims=True)
    toward = np.where(length > 1e-2, toward / np.maximum(length, 1e-2), [0, 0, 1]).astype(np.float32)
    any_direction = draw(hnp.arrays(bool, (R, 1)))
    direction = np.where(any_direction, draw(directions(R)), toward)
    origin, direction = (np.where(np.abs(a) < 1e-6, np.float32(0), a) for a in (origin, direction))
    return Rays(origin=origin, direction=direction)  # type: ignore[arg-type]


@st.composite
def awkward_rays(draw: st.DrawFn) -> Rays:
    """At grazing angles and along axes, with components that are subnormal or -0; from inside, on and behind faces.

    What moves by less than 1e-12 a unit does not move: on a face of the cube this alone would say whether it is inside.
    """
    place = st.sampled_from([-1.0, 0.0, 0.25, 0.2501, 0.3, 0.5, 0.9999, 1.0, 2.0])
    slope = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-20, 1e-13, -1e-11, 1e-7, -1e-6, 1e-4, -1e-3, 0.02])
    origin = draw(hnp.arrays(np.float32, (R, 3), elements=place.map(lambda x: float(np.float32(x)))))
    toward = draw(hnp.arrays(np.float64, (R, 3), elements=slope))
    axis = draw(hnp.arrays(np.int64, R, elements=st.integers(0, 2)))
    toward[np.arange(R), axis] = draw(hnp.arrays(np.float64, R, elements=st.sampled_from([1.0, -1.0])))
    on_a_face = ((origin == 0) | (origin == 1)) & (np.abs(toward) < 1e-12)
    origin = np.where(on_a_face, np.float32(0.3), origin)
    direction = (toward / np.linalg.norm(toward, axis=1, keepdims=True)).astype(np.float32)
    return Rays(origin=origin, direction=direction)  # type: ignore[arg-type]


def in_box(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(G^3,): the cells from one corner to another, which it leaves out."""
    cells = np.indices((G,) * 3).reshape(3, -1)[::-1].T
    return np.all((cells >= low) & (cells < high), axis=1)


@st.composite
def boxes(draw: st.DrawFn) -> np.ndarray:
    """(G^3,): all cells, or those of a box, which may be one cell or none."""
    corners = draw(hnp.arrays(np.int64, (2, 3), elements=st.integers(0, G)))
    return in_box(*np.sort(corners, axis=0)) if draw(st.booleans()) else np.ones(G**3, bool)


@st.composite
def grids(draw: st.DrawFn, num_cascades: int = 1) -> OccupancyGrid:
    share, seed = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])), draw(seeds)
    flags = np.random.default_rng(seed).uniform(size=(num_cascades, G**3)) < share
    return init_occupancy(flags & np.stack([draw(boxes()) for _ in range(num_cascades)]))


@st.composite
def half_opaque_grids(draw: st.DrawFn) -> OccupancyGrid:
    """Grids of which some occupied cells are opaque."""
    rng = np.random.default_rng(draw(seeds))
    occupied = (rng.uniform(size=G**3) < draw(st.sampled_from([0.3, 1.0]))) & draw(boxes())
    opaque = occupied & (rng.uniform(size=G**3) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    return replace(init_occupancy(occupied), opaque=packed(opaque[None]))


def unpack(words: jax.Array) -> np.ndarray:
    """(R, W) u32 -> (R, 32 W) bool."""
    words = np.asarray(words, "<u4")
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)


def steps_by_definition(rays: Rays, grid: OccupancyGrid, jitter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which steps (R, S), from the cube on, are in occupied cells, and of which float32 can tell, in float64."""
    t_near, t_far = slab_interval(rays.origin, rays.direction, np.zeros(3), np.ones(3))
    t = t_near[:, None] + (np.arange(CONFIG.num_steps) + jitter[:, None].astype(np.float64)) * DT
    position = (
        np.asarray(rays.origin, np.float64)[:, None] + t[..., None] * np.asarray(rays.direction, np.float64)[:, None]
    )
    cell, off_faces = cell_numbers(position, G, len(grid.occupied))
    flags = unpack(grid.occupied).reshape(-1)[cell]
    from_end = np.abs(t - t_far[:, None])
    # A ray that slides along a face of the cube, or cuts a corner off it, may count as a miss.
    grazes = (t_far - t_near)[:, None] < 1e-4
    return flags & (t < t_far[:, None]), off_faces & (from_end > 1e-4) & ~grazes


# Steps.


@jit_to_numpy
def look_at_steps(steps: Steps) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the first 64 steps (R, 64) start, how long they are, and where their samples lie."""
    rows, step = steps[:, None], jnp.arange(64, dtype=jnp.int32)
    edges = replace(rows, jitter=jnp.zeros_like(rows.jitter))
    length = rows.dt_at(jnp.broadcast_to(step, (R, 64)))
    return edges.t_at(step), length, rows.t_at(step)


@pytest.mark.parametrize("growth", [0.0, 0.04, 0.1])
@given(start=arrays32(R, 0, 2), jitter=jitters)
def test_steps_tile_a_ray_and_grow(start: np.ndarray, jitter: np.ndarray, growth: float) -> None:
    """Each is max(length, growth t) long, with the t where it starts, but for the one in which that changes."""
    length = 0.02
    found = look_at_steps(Steps(start, jitter, length, growth))  # type: ignore[arg-type]
    edge, dt, t = (np.asarray(a, np.float64) for a in found)
    np.testing.assert_allclose(edge[:, 0], start, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dt, np.maximum(length, growth * edge), rtol=1e-4)
    rounding = 1e-4 * dt[:, :-1]
    changes = (growth * edge[:, :-1] < length) & (growth * edge[:, 1:] > length)
    assert np.all(np.abs(np.diff(edge) - dt[:, :-1]) < rounding + changes * growth * dt[:, :-1])
    assert np.all((t[:, :-1] > edge[:, :-1] - rounding) & (t[:, :-1] < edge[:, 1:] + rounding))


@jit_to_numpy
def count_steps(steps: Steps, until: jax.Array) -> tuple:
    """The number until some t (R,), where the last of them and the one after it begin, and what is left of a skip."""
    edges, count = replace(steps, jitter=jnp.zeros_like(steps.jitter)), steps.num_until(until)
    skipped = steps.skip_to(until)
    every = edges[:, None].t_at(jnp.arange(512, dtype=jnp.int32))
    off = jnp.min(jnp.abs(every - skipped.t_start[:, None]), axis=1)
    return count, edges.t_at(count - 1), edges.t_at(count), skipped.t_start, skipped.dt_at(jnp.zeros(R, jnp.int32)), off


@pytest.mark.parametrize("growth", [0.0, 0.04, 0.1])
@given(start=arrays32(R, 0, 1), until=arrays32(R, 0, 3))
def test_steps_are_counted_and_skipped_alike(start: np.ndarray, until: np.ndarray, growth: float) -> None:
    """The last of the counted steps begins before t, the next does not; a skip ends at a step that holds t."""
    steps = Steps(start, np.full(R, 0.5, np.float32), 0.01, growth)  # type: ignore[arg-type]
    count, last, after, first, dt, off = (np.asarray(a) for a in count_steps(steps, until))
    assert np.all((count == 0) | (last < until + 1e-4))
    assert np.all(after > until - 1e-4)
    assert np.all(first <= np.maximum(until, start) + 1e-4)
    assert np.all(first + dt >= until - 1e-4)
    assert off.max() < 1e-4


# The box.


def check_interval(rays: Rays, interval: tuple[jax.Array, jax.Array], corners: np.ndarray) -> None:
    t_near, t_far = (np.asarray(t, np.float64) for t in interval)
    low, high = slab_interval(rays.origin, rays.direction, *corners)
    assert (t_near >= 0).all()
    clear = high - low > 1e-4
    np.testing.assert_allclose(t_near[clear], low[clear], rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(t_far[clear], high[clear], rtol=2e-6, atol=2e-5)
    assert (t_far - t_near < 2e-4)[~clear].all()


@settings(max_examples=100)
@given(rays() | awkward_rays())
def test_the_interval_in_the_box_is_that_of_slabs(rays: Rays) -> None:
    check_interval(rays, box_interval(rays), np.array([np.zeros(3), np.ones(3)]))


@given(rays(), points(2))
def test_any_other_box_has_its_interval_too(rays: Rays, corners: np.ndarray) -> None:
    corners = np.sort(np.where(corners < 1e-6, np.float32(0), corners), axis=0)  # as of rays: tiny, but not 0
    check_interval(rays, box_interval(rays, *corners), corners)


@pytest.mark.parametrize(
    ("origin", "direction", "expected"),
    [
        ((0.5, 0.5, -2.0), (0, 0, 1), (2, 3)),
        ((0.5, 0.5, 0.25), (0, 0, 1), (0, 0.75)),
        ((0.5, 0.5, 0.25), (0, 0, -1), (0, 0.25)),
        ((-1.0, -1.0, -1.0), (1, 1, 1), (3**0.5, 2 * 3**0.5)),
        ((0.0, 0.0, 0.0), (1, 1, 1), (0, 3**0.5)),
        ((0.0, 0.5, 0.5), (1, 0, 0), (0, 1)),
        ((0.5, 0.5, 2.0), (0, 0, 1), None),  # behind
        ((1.5, 0.5, -2.0), (0, 0, 1), None),  # beside, parallel to it
        ((-0.5, 0.5, -2.0), (-0.0, 0, 1), None),
        ((2.0, 2.0, 0.5), (-1, 1, 0), None),
    ],
)
def test_the_interval_of_a_known_ray(origin: tuple, direction: tuple, expected: tuple[float, float] | None) -> None:
    unit = np.array(direction, np.float32) / np.linalg.norm(direction).astype(np.float32)
    rays = Rays(*(np.tile(np.float32(a), (R, 1)) for a in (origin, unit)))
    t_near, t_far = (np.asarray(t) for t in box_interval(rays))
    if expected is None:
        assert (t_far <= t_near).all()
    else:
        np.testing.assert_allclose(t_near, expected[0], atol=1e-6)
        np.testing.assert_allclose(t_far, expected[1], atol=1e-6)


@given(rays(), jitters)
def test_points_of_the_interval_are_in_the_box(rays: Rays, fraction: np.ndarray) -> None:
    t_near, t_far = (np.asarray(t, np.float64) for t in box_interval(rays))

    def outside(t: np.ndarray) -> np.ndarray:
        """How far outside the box."""
        position = rays.origin + t[:, None] * np.asarray(rays.direction, np.float64)
        return np.max(np.maximum(-position, position - 1), axis=1)

    met = t_far - t_near > 1e-3
    assert (outside(t_near + fraction * (t_far - t_near)) < 1e-5)[met].all()
    assert (outside(t_far + 1e-3 + fraction) > -1e-5)[met].all()
    assert (outside(fraction * t_near) > -1e-5)[met & (t_near > 0)].all()


# Which steps.


@settings(max_examples=150)
@given(rays() | awkward_rays(), grids() | grids(num_cascades=3), jitters)
def test_candidates_are_the_steps_in_occupied_cells(rays: Rays, grid: OccupancyGrid, jitter: np.ndarray) -> None:
    """Numbered from t_start on, a whole number of steps behind where the ray enters the cube."""
    expected, certain = steps_by_definition(rays, grid, jitter)
    candidates = find_candidates(rays, grid, jitter, config=CONFIG)
    found = unpack(candidates.words)
    skipped = (np.asarray(candidates.steps.t_start, np.float64) - np.asarray(box_interval(rays)[0])) / DT
    assert (skipped >= 0).all()
    any_step = found.any(axis=1) | (expected & certain).any(axis=1)
    np.testing.assert_allclose(skipped[any_step], np.round(skipped[any_step]), atol=1e-3)
    # A ray that misses what is occupied may start anywhere, and has no step.
    number = np.minimum(np.round(skipped), CONFIG.num_steps).astype(int)[:, None] + np.arange(CONFIG.num_steps)
    by_number = np.zeros((R, 2 * CONFIG.num_steps), bool)
    np.put_along_axis(by_number, number, found, axis=1)
    np.testing.assert_array_equal(by_number[:, : CONFIG.num_steps][certain], expected[certain])
    assert not by_number[:, CONFIG.num_steps :].any()


@given(rays(), boxes(), jitters)
def test_steps_count_from_the_last_before_the_bounds(rays: Rays, flags: np.ndarray, jitter: np.ndarray) -> None:
    grid = init_occupancy(flags)
    candidates = find_candidates(rays, grid, jitter, config=CONFIG)
    enter, leave = slab_interval(rays.origin, rays.direction, *np.asarray(grid.bounds, np.float64))
    near, far = slab_interval(rays.origin, rays.direction, np.zeros(3), np.ones(3))
    clear = (leave - enter > 1e-4) & (far - near > 1e-4)
    before = enter - np.asarray(candidates.steps.t_start, np.float64)
    # To the margin and its rounding: a step that begins 1e-5 before the bounds may count as inside.
    assert (before > -3e-5)[clear].all()
    assert (before < DT + 3e-5)[clear].all()
    enter, leave = slab_interval(rays.origin, rays.direction, *np.asarray(grid.bounds) + [[-1e-4], [1e-4]])
    assert not unpack(candidates.words)[leave == enter].any()


@functools.cache
def at_once() -> Callable[..., tuple[Candidates, Candidates]]:
    """`find_visible` and `find_candidates` in the formulation for accelerators."""
    args = Rays(np.zeros((R, 3), np.float32), np.ones((R, 3), np.float32)), FULL, np.zeros(R, np.float32)

    def both(*args: Any) -> tuple[Candidates, Candidates]:
        return marching.find_visible(*args, config=CONFIG), marching.find_candidates(*args, config=CONFIG)

    with formulation("gpu"):
        return jax.jit(both).lower(*args).compile()


@given(rays() | awkward_rays(), half_opaque_grids(), jitters)
def test_both_formulations_find_the_same_steps(rays: Rays, grid: OccupancyGrid, jitter: np.ndarray) -> None:
    """They may round differently where a sample is on a face; that hides or shows all that lies behind it."""
    _, certain = steps_by_definition(rays, grid, jitter)
    for found, other in zip(
        (f(rays, grid, jitter, config=CONFIG) for f in (find_visible, find_candidates)),
        at_once()(rays, grid, jitter),
        strict=True,
    ):
        np.testing.assert_allclose(found.steps.t_start, other.steps.t_start, rtol=1e-6)
        same = np.all(unpack(found.words) == unpack(other.words), axis=1)
        assert same[certain.all(axis=1)].all()


@given(rays() | awkward_rays(), grids() | grids(num_cascades=3), jitters)
def test_samples_lie_in_the_box_and_in_occupied_cells(rays: Rays, grid: OccupancyGrid, jitter: np.ndarray) -> None:
    samples = march_rays(rays, grid, jitter, config=ROOMY)
    valid = np.asarray(samples.valid)
    ray, t = np.asarray(samples.ray)[valid], np.asarray(samples.t, np.float64)[valid]
    position = rays.origin[ray] + t[:, None] * np.asarray(rays.direction, np.float64)[ray]
    assert (np.abs(position - 0.5) <= 0.5 + 1e-5).all()
    cell, certain = cell_numbers(position, G, len(grid.occupied))
    assert unpack(grid.occupied).reshape(-1)[cell][certain].all()


@given(rays(), grids(), jitters)
def test_t_rises_by_multiples_of_dt_along_a_ray(rays: Rays, grid: OccupancyGrid, jitter: np.ndarray) -> None:
    samples = march_rays(rays, grid, jitter, config=ROOMY)
    valid = np.asarray(samples.valid)
    ray, t = np.asarray(samples.ray)[valid], np.asarray(samples.t, np.float64)[valid]
    step = (t - np.asarray(box_interval(rays)[0])[ray]) / DT - jitter[ray]
    np.testing.assert_allclose(step, np.round(step), atol=1e-3)
    assert (np.diff(np.round(step))[np.diff(ray) == 0] >= 1).all()
    np.testing.assert_array_equal(np.asarray(samples.dt), np.where(valid, np.float32(DT), 0))


@given(rays(), jitters)
def test_an_empty_grid_gives_no_samples(rays: Rays, jitter: np.ndarray) -> None:
    samples = march_rays(rays, EMPTY, jitter, config=CONFIG)
    assert not np.asarray(samples.valid).any()
    assert np.asarray(samples.ray_complete).all()
    assert samples.num_dropped == 0
    assert np.isfinite(samples.t).all()


@settings(max_examples=100)
@given(rays() | awkward_rays(), jitters)
def test_a_full_grid_gives_every_step_in_the_box(rays: Rays, jitter: np.ndarray) -> None:
    samples = march_rays(rays, FULL, jitter, config=ROOMY)
    low, high = slab_interval(rays.origin, rays.direction, np.zeros(3), np.ones(3))
    counts = np.bincount(np.asarray(samples.ray)[np.asarray(samples.valid)], minlength=R)
    expected = (high - low) / DT - jitter
    clear = (high - low > 1e-4) & (np.abs(expected - np.round(expected)) > 1e-2)
    np.testing.assert_array_equal(counts[clear], np.maximum(np.ceil(expected[clear]), 0))


def diagonal() -> Rays:
    """One ray along the diagonal of the box; the others, of which there are as many as everywhere, miss it."""
    origin = np.full((R, 3), -1, np.float32)
    origin[1:, 0] = 9
    return Rays(origin, np.full((R, 3), 3**-0.5, np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_steps_reach_through_the_diagonal_of_the_box(jitter: float) -> None:
    samples = march_rays(diagonal(), FULL, np.full(R, jitter, np.float32), config=CONFIG)
    np.testing.assert_allclose(np.sum(samples.dt, dtype=np.float64), 3**0.5, rtol=1e-5)


@given(rays(), jitters, arrays32(ROOMY.num_samples, -1, 1))
def test_samples_move_with_the_face_their_ray_enters(rays: Rays, jitter: np.ndarray, cotangent: np.ndarray) -> None:
    """t is where the ray enters the cube and a fixed distance more, and constant for a ray that starts inside."""
    origin, direction = (np.asarray(a, np.float64) for a in (rays.origin, rays.direction))
    moving = np.abs(direction) > 1e-6
    planes = np.where(moving, (np.where(direction > 0, 0.0, 1.0) - origin) / np.where(moving, direction, 1), -np.inf)
    low, high = slab_interval(rays.origin, rays.direction, np.zeros(3), np.ones(3))
    _, second, first = np.sort(planes, axis=1).T
    is_face = planes == first[:, None]
    slope = np.sum(direction * is_face, axis=1)
    # Where float32 can tell which face it is, and that the ray starts outside.
    clear = (high - low > 1e-2) & (first - second > 1e-3) & (np.abs(first) > 1e-3) & (np.abs(slope) > 0.05)
    samples, gradient = sample_gradient(rays, BOXED, jitter, cotangent)
    valid = np.asarray(samples.valid)
    total = np.bincount(np.asarray(samples.ray)[valid], cotangent[valid].astype(np.float64), R)
    moved = -total / np.where(clear, slope, 1) * (first > 0)
    expected = is_face * moved[:, None]
    # A sum of up to 64 numbers below 1 in float32, over a slope above 0.05.
    np.testing.assert_allclose(np.asarray(gradient)[clear], expected[clear], rtol=1e-5, atol=64 * 1e-6 / 0.05)


# What lies behind opaque cells.


@pytest.mark.parametrize("opaque_steps", [0, 1, 4])
@given(rays(), half_opaque_grids(), jitters)
def test_training_rays_end_in_opaque_cells(
    opaque_steps: int, rays: Rays, grid: OccupancyGrid, jitter: np.ndarray
) -> None:
    config = replace(CONFIG, opaque_cells=opaque_steps * CONFIG.step_size * CONFIG.occupancy.resolution)
    assert config.opaque_steps == opaque_steps
    all_steps = unpack(find_candidates(rays, grid, jitter, config=CONFIG).words)
    # The bounds stay those of the occupied cells, which hold the opaque ones too, so that steps have the same numbers.
    opaque = unpack(find_candidates(rays, replace(grid, occupied=grid.opaque), jitter, config=CONFIG).words)
    expected = all_steps & (np.cumsum(opaque, axis=1) - opaque < opaque_steps) if opaque_steps else all_steps
    np.testing.assert_array_equal(unpack(find_visible(rays, grid, jitter, config=config).words), expected)


# Packing.


def packed_by_definition(candidates: Candidates, jitter: np.ndarray, size: int) -> tuple[list, list[bool], int]:
    """(ray, t) of every sample, whether each ray is complete, and how many were dropped, one ray after the other."""
    kept: list[tuple[int, float]] = []
    complete: list[bool] = []
    total = 0
    for ray, flags in enumerate(unpack(candidates.words)):
        steps = np.flatnonzero(flags)
        total += len(steps)
        complete.append(total <= size)
        if complete[-1]:
            kept += [(ray, float(candidates.steps.t_start[ray] + (s + jitter[ray]) * DT)) for s in steps]
    return kept, complete, total - len(kept)


def check_packing(samples: Samples, candidates: Candidates, jitter: np.ndarray, config: MarchConfig) -> None:
    kept, complete, num_dropped = packed_by_definition(candidates, jitter, config.num_samples)
    assert samples.t.shape == samples.dt.shape == samples.ray.shape == samples.valid.shape == (config.num_samples,)
    np.testing.assert_array_equal(samples.valid, np.arange(config.num_samples) < len(kept))
    np.testing.assert_array_equal(samples.ray_complete, complete)
    assert samples.num_dropped == num_dropped
    np.testing.assert_array_equal(samples.ray[: len(kept)], [ray for ray, _ in kept])
    np.testing.assert_allclose(samples.t[: len(kept)], [t for _, t in kept], rtol=1e-6, atol=1e-6)
    ray = np.asarray(samples.ray)
    assert (np.diff(ray) >= 0).all()
    assert ((ray >= 0) & (ray < R)).all()
    np.testing.assert_array_equal(np.asarray(samples.dt)[len(kept) :], 0)


@pytest.mark.parametrize("config", [CONFIG, ROOMY], ids=["overflows", "fits"])
@given(rays(), grids() | half_opaque_grids(), jitters)
def test_candidates_are_packed_once_or_counted(
    config: MarchConfig, rays: Rays, grid: OccupancyGrid, jitter: np.ndarray
) -> None:
    samples = march_rays(rays, grid, jitter, config=config)
    check_packing(samples, find_visible(rays, grid, jitter, config=config), jitter, config)
    if config is ROOMY:
        assert samples.num_dropped == 0


def test_a_full_buffer_keeps_the_first_rays() -> None:
    """Along x every ray takes 37 of the 64 places; rays 0 and 2 miss."""
    origin = np.tile(np.float32([-1, 0.51, 0.51]), (R, 1))
    origin[[0, 2], 1] = 3
    rays = Rays(origin, np.tile(np.float32([1, 0, 0]), (R, 1)))  # type: ignore[arg-type]
    samples = march_rays(rays, FULL, np.full(R, 0.5, np.float32), config=CONFIG)
    assert np.asarray(samples.ray_complete).tolist() == [True, True, True] + [False] * (R - 3)
    assert np.sum(samples.valid) == 37
    assert samples.num_dropped == (R - 3) * 37


def test_a_buffer_that_is_exactly_full_drops_nothing() -> None:
    samples = march_rays(diagonal(), FULL, np.full(R, 0.5, np.float32), config=CONFIG)
    assert np.asarray(samples.valid).all()
    assert samples.num_dropped == 0


# What light reaches.


def thick(position: Any, direction: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """A field that lets light through here and not there, by a steep wave; its steps have a thickness of 0 to 20.

    Rounding moves a point by 2e-7, and so the thickness before it by less than 0.02.
    """
    wave = 0.5 + 0.5 * xp.sin(position @ xp.array([31.0, 17.0, 23.0]))
    return 20 / DT * wave**8, 0 * direction


THICK = jax.tree_util.Partial(thick)


@pytest.mark.parametrize(
    ("num_candidates", "min_transmittance"),
    [(CONFIG.num_steps, 0.2), (ROOMY.num_samples, 1e-4)],
    ids=["overflows", "fits"],
)
@given(rays(), grids() | half_opaque_grids(), jitters)
def test_samples_are_the_steps_that_light_reaches(
    num_candidates: int, min_transmittance: float, rays: Rays, grid: OccupancyGrid, jitter: np.ndarray
) -> None:
    """Of each ray that fits the first ones, up to where too little light gets through; the others are left out."""
    config = replace(ROOMY, num_candidates=num_candidates, min_transmittance=min_transmittance)
    samples = march_rays(rays, grid, jitter, THICK, config=config)
    full = march_rays(rays, grid, jitter, config=ROOMY)
    ray, t, valid = np.asarray(full.ray), np.asarray(full.t, np.float64), np.asarray(full.valid)
    position = np.asarray(rays.origin)[ray] + t[:, None] * np.asarray(rays.direction)[ray]
    thickness = thick(position, 0, np)[0] * DT
    limit, counts = -np.log(min_transmittance), np.bincount(ray[valid], minlength=R)
    fits = np.cumsum(counts) <= num_candidates
    np.testing.assert_array_equal(samples.ray_complete, fits)
    assert samples.num_dropped == counts[~fits].sum()
    for number in range(R):
        own = t[valid & (ray == number)]
        kept = np.asarray(samples.t)[np.asarray(samples.valid) & (np.asarray(samples.ray) == number)]
        if not fits[number]:
            assert len(kept) == 0
            continue
        np.testing.assert_array_equal(kept, own[: len(kept)].astype(np.float32))
        before = np.concatenate([[0.0], np.cumsum(thickness[valid & (ray == number)])])
        assert len(kept) == 0 or before[len(kept) - 1] < limit + 0.02
        assert len(kept) == len(own) or before[len(kept)] > limit - 0.02


def test_the_light_that_reaches_a_step_has_no_gradient() -> None:
    """Which steps are samples is a choice; how they look follows from them alone."""
    config = replace(CONFIG, num_candidates=CONFIG.num_steps)

    @jax.jit
    @jax.grad
    def slope(scale: jax.Array, rays: Rays, jitter: jax.Array) -> jax.Array:
        field = jax.tree_util.Partial(lambda scale, p, d: (scale * thick(p, d)[0], d), scale)
        return jnp.sum(marching.march_rays(rays, FULL, jitter, field, config=config).t)

    assert slope(1.0, diagonal(), np.full(R, 0.5, np.float32)) == 0


# Bins.

BINS = StratifiedConfig(num_bins=6, near=0.5, far=2.0, last_interval=100.0)


@given(arrays32((3, 6), 0, 1))
def test_stratified_samples_lie_in_their_bins(jitter: np.ndarray) -> None:
    samples = stratified_samples(3, jitter, config=BINS)
    points_between = np.linspace(0.5, 2.0, 6)
    middles = (points_between[1:] + points_between[:-1]) / 2
    lower, upper = np.append(0.5, middles), np.append(middles, 2.0)
    t, dt = np.asarray(samples.t).reshape(3, 6), np.asarray(samples.dt).reshape(3, 6)
    np.testing.assert_allclose(t, lower + (upper - lower) * jitter.astype(np.float64), atol=1e-6)
    assert (np.diff(t, axis=1) >= 0).all()
    np.testing.assert_allclose(dt[:, :-1], np.diff(t, axis=1), atol=1e-6)
    np.testing.assert_array_equal(dt[:, -1], 100.0)
    np.testing.assert_array_equal(samples.ray, np.repeat(np.arange(3), 6))
    assert np.asarray(samples.valid).all()
    assert np.asarray(samples.ray_complete).all()
    assert samples.num_dropped == 0


@pytest.mark.parametrize("sampler", [CONFIG, BINS], ids=["march", "bins"])
def test_noise_has_the_shape_that_the_sampler_takes(sampler: MarchConfig | StratifiedConfig) -> None:
    rays = Rays(np.full((R, 3), 0.5, np.float32), np.tile(np.float32([0, 0, 1]), (R, 1)))  # type: ignore[arg-type]
    jitter = np.full(marching.jitter_shape(R, sampler=sampler), 0.5, np.float32)
    samples = jax.eval_shape(functools.partial(marching.sample_rays, sampler=sampler), rays, FULL, jitter)
    assert samples.ray_complete.shape == (R,)


def test_marching_without_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid = None: marching needs an OccupancyGrid"):
        marching.sample_rays(diagonal(), None, np.zeros(R, np.float32), sampler=CONFIG)


@pytest.mark.parametrize("preset", ["base", "small"])
def test_no_single_opaque_cell_hides_what_is_behind(preset: str) -> None:
    """A thin wire makes its whole cell opaque; rays through the empty part of the cell must see the wall behind."""
    sampler = PRESETS[preset].sampler
    assert isinstance(sampler, MarchConfig)
    size = sampler.occupancy.resolution
    flags = np.zeros((size, size, size), bool)  # z, y, x
    flags[size // 2, size // 2, size // 4] = flags[size // 2, size // 2, 3 * size // 4] = True
    words = packed(flags.reshape(1, -1))
    bounds = occupied_bounds(words)
    grid = OccupancyGrid(np.zeros((1, size**3), np.float32), occupied=words, opaque=words, bounds=bounds)
    turn = np.array([[1.0, 0.0, 0.0], [1.0, 1e-3, 2e-3]], np.float32)
    direction = turn / np.linalg.norm(turn, axis=1, keepdims=True)
    origin = np.array([0.5, 0.5, 0.5], np.float32) + np.float32(0.3 / size) - 0.9 * direction
    samples = march_rays(Rays(origin, direction), grid, np.full(2, 0.5, np.float32), config=sampler)
    for ray in range(2):
        t = np.asarray(samples.t)[np.asarray(samples.valid) & (np.asarray(samples.ray) == ray)]
        assert t.min() < 0.7 < 1.1 < t.max()


# Steps.


@given(jitters, arrays32(R, 0, 2), arrays32(R, 0, 1))
def test_steps_tile_the_ray_and_count_from_anywhere(jitter: np.ndarray, start: np.ndarray, beyond: np.ndarray) -> None:
    """A sample lies `jitter` of its step behind the step's start; skipping steps moves none of those that are left."""
    t, dt, first, skipped, count = take_steps(start, jitter, start + beyond)
    number = np.arange(8)
    exact = start.astype(np.float64)[:, None] + (number + jitter.astype(np.float64)[:, None]) * DT
    np.testing.assert_allclose(t, exact, atol=1e-6)
    np.testing.assert_array_equal(dt, np.float32(DT))
    # The step from which on they are counted is the last one that begins before t, to rounding.
    behind = (start.astype(np.float64) + beyond - np.asarray(first)) / DT
    assert (behind > -1e-3).all()
    assert (behind < 1 + 1e-3).all()
    np.testing.assert_allclose((first - start) / DT, np.round((first - start) / DT), atol=1e-3)
    np.testing.assert_allclose(skipped[:, 0], first + jitter * DT, atol=1e-6)
    expected = beyond.astype(np.float64) / DT
    clear = np.abs(expected - np.round(expected)) > 1e-3
    np.testing.assert_array_equal(np.asarray(count)[clear], np.ceil(expected[clear]))


@jit_to_numpy
def take_steps(t_start: jax.Array, jitter: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
    steps, number = Steps(t_start=t_start, jitter=jitter, length=DT), jnp.arange(8)
    skipped = steps.skip_to(t)
    every = steps[:, None]
    dt = every.dt_at(jnp.broadcast_to(number, (R, 8)))
    return every.t_at(number), dt, skipped.t_start, skipped[:, None].t_at(number), steps.num_until(t)
