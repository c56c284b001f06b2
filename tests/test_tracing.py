"""Sphere tracing: where rays meet balls, boxes and planes in closed form, their normals, and the light on them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.tree_util import Partial
from scenes import Bodies, look_at, make_camera, slab_interval
from strategies import directions, points, seeds

from jaxngp import cameras, tracing
from jaxngp.cameras import Rays
from jaxngp.tracing import Hits, SurfaceView

R = 201
TOLERANCE = 1e-4
UNIT = np.asarray([[0, 0, 0], [1, 1, 1]], np.float32)
BALL = Bodies(balls=((0.5, 0.45, 0.55, 0.3),))
TWO = Bodies(balls=((0.3, 0.4, 0.5, 0.2), (0.7, 0.6, 0.55, 0.15)))
BOX = Bodies(box=((0.25, 0.375, 0.3), (0.75, 0.625, 0.5)))
PLANE = Bodies(plane=(0.6, 0.0, 0.8, 0.6))
ALL = replace(TWO, box=((0.1, 0.7, 0.1), (0.4, 0.9, 0.9)), plane=(0, 0, 1, 0.15))
SCENES = {"ball": BALL, "two": TWO, "box": BOX, "plane": PLANE, "all": ALL}
every_scene = pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)


def trace(scene: Bodies, rays: Rays, box: np.ndarray = UNIT, **options: Any) -> Hits:
    found = tracing.trace_rays(scene.field, rays, np.asarray(box, np.float32), **options)
    return jax.tree.map(np.asarray, found)


def rays_toward(target: np.ndarray, seed: int, distance: float) -> Rays:
    """(R,) rays through the targets (R, 3), from so far away."""
    direction = np.random.default_rng(seed).normal(size=(R, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return Rays(origin=(target - distance * direction).astype(np.float32), direction=direction.astype(np.float32))


def some_rays(seed: int, distance: float = 2.0) -> Rays:
    return rays_toward(np.random.default_rng(seed + 1).uniform(0.1, 0.9, (R, 3)), seed, distance)


def positions(rays: Rays, t: np.ndarray) -> np.ndarray:
    return np.asarray(rays.origin, np.float64) + np.asarray(t, np.float64)[:, None] * np.asarray(rays.direction)


def grown(scene: Bodies, by: float) -> Bodies:
    low, high = scene.box or ((0, 0, 0), (0, 0, 0))
    return replace(
        scene,
        balls=tuple((*ball[:3], ball[3] + by) for ball in scene.balls),
        box=scene.box and (tuple(x - by for x in low), tuple(x + by for x in high)),
        plane=scene.plane and (*scene.plane[:3], scene.plane[3] + by),
    )


def check_hits(scene: Bodies, rays: Rays, hits: Hits, box: np.ndarray = UNIT) -> None:
    """Against the closed form, for rays that start outside of all bodies, and enter the box outside of them."""
    near, far = slab_interval(rays.origin, rays.direction, *box.astype(np.float64))
    near = np.where(near < far, near, 0)
    start = positions(rays, near)
    entry, wider = (near + body.entry(start, rays.direction) for body in (scene, grown(scene, 5e-3)))
    expected = (near < far) & (entry < far)
    clear = np.where(expected, far - entry > 5e-3, (near >= far) | (wider >= far))
    # A ray that glides along a body just above the tolerance takes thousands of steps.
    glides = ~hits.hit & (near < far) & (hits.t < far - 1e-6)
    assert hits.unfinished == np.sum(glides) <= 0.01 * R
    assert np.abs(scene.distance(positions(rays, hits.t)[glides])).max(initial=0) < 10 * TOLERANCE
    clear &= ~glides
    np.testing.assert_array_equal(hits.hit[clear], expected[clear])
    met, t = hits.hit & clear, hits.t.astype(np.float64)
    assert np.abs(scene.distance(positions(rays, t)[met])).max(initial=0) < TOLERANCE + 1e-6
    # Nothing was missed on the way, and the rest of the way is as long as the slope says.
    assert (t <= entry + 2e-6)[met].all()
    here, there = (gradient(scene, positions(rays, np.where(met, at, 0))) for at in (t, entry - 2 * TOLERANCE))
    entry = np.where(met, entry, t)
    same = met & (np.sum(here * there, axis=1) > 0.9)  # as it also meets a body that it passes within the tolerance
    slope = -np.sum(there * rays.direction, axis=1)
    assert ((entry - t) * slope < 2 * TOLERANCE)[same & (slope > 0.2)].all()
    assert (entry - t)[same].max(initial=0) < 0.05
    assert np.sum(same) >= 0.9 * np.sum(met)


def gradient(scene: Bodies, position: np.ndarray) -> np.ndarray:
    axes = 1e-6 * np.eye(3)
    return np.stack([scene.distance(position + e) - scene.distance(position - e) for e in axes], axis=1) / 2e-6


def outside(scene: Bodies, rays: Rays, box: np.ndarray = UNIT) -> np.ndarray:
    """Which rays (R,) start, in the box, outside of all bodies."""
    near, far = slab_interval(rays.origin, rays.direction, *box.astype(np.float64))
    start = np.where((near < far)[:, None], positions(rays, near), np.float64(rays.origin))
    return scene.distance(start) > 2 * TOLERANCE


def only(rays: Rays, chosen: np.ndarray) -> Rays:
    """The chosen rays; the others are pointed away from the box, so that the shape stays."""
    away = np.float32([-1, -1, -1])
    return Rays(
        origin=np.where(chosen[:, None], rays.origin, away),
        direction=np.where(chosen[:, None], rays.direction, np.float32([-1, 0, 0])),
    )


# Where rays meet a surface.


@every_scene
@settings(max_examples=15)
@given(seeds)
def test_rays_meet_the_surface_of_the_closed_form(scene: Bodies, seed: int) -> None:
    rays = some_rays(seed)
    rays = only(rays, outside(scene, rays))
    hits = trace(scene, rays)
    assert 0.05 < hits.hit.mean() < 0.95
    check_hits(scene, rays, hits)


@every_scene
@settings(max_examples=15)
@given(seeds)
def test_a_ray_from_inside_the_box_goes_forwards_only(scene: Bodies, seed: int) -> None:
    rays = some_rays(seed, distance=0.2)
    rays = only(rays, outside(scene, rays))
    check_hits(scene, rays, trace(scene, rays))


@settings(max_examples=15)
@given(points(2), seeds)
def test_what_lies_outside_the_box_is_not_seen(corners: np.ndarray, seed: int) -> None:
    box, rays = np.sort(corners, axis=0), some_rays(seed)
    rays = only(rays, outside(TWO, rays, box))
    hits = trace(TWO, rays, box)
    check_hits(TWO, rays, hits, box)
    at = positions(rays, hits.t)[hits.hit]
    assert (np.abs(at - np.clip(at, *box)).max(initial=0)) < 1e-5


@given(directions(R))
def test_a_ball_is_met_one_radius_from_its_middle(direction: np.ndarray) -> None:
    """From any direction."""
    *centre, radius = BALL.balls[0]
    rays = Rays(origin=(centre - 2 * direction).astype(np.float32), direction=direction)
    hits = trace(BALL, rays)
    assert hits.hit.all()
    np.testing.assert_allclose(hits.t, 2 - radius, atol=2 * TOLERANCE)


@every_scene
def test_a_ray_that_starts_in_a_body_meets_it_there(scene: Bodies) -> None:
    """As one does that enters the box in it: what is cut off by the box is not looked for outside."""
    target = np.random.default_rng(0).uniform(0, 1, (40_000, 3))
    target = target[scene.distance(target) < -0.01][:R]
    assert len(target) == R
    within = trace(scene, rays_toward(target, 0, 0.0))
    assert within.hit.all()
    np.testing.assert_array_equal(within.t, 0)
    low, high = target - 0.02, target + 0.02
    for index in range(3):
        box = np.stack([low[index], high[index]])
        rays = rays_toward(np.tile(target[index], (R, 1)), index, 2.0)
        hits = trace(scene, rays, box.astype(np.float32))
        near, _ = slab_interval(rays.origin, rays.direction, *box)
        inside = scene.distance(positions(rays, near)) < -TOLERANCE
        assert inside.any()
        assert hits.hit[inside].all()
        np.testing.assert_allclose(hits.t[inside], near[inside], atol=2e-6)


@pytest.mark.parametrize(("height", "expected"), [(-1e-2, True), (-5e-4, True), (5e-5, True), (5e-4, False)])
def test_a_ray_that_grazes_a_ball_ends(height: float, expected: bool) -> None:
    """Within the tolerance it has met the ball."""
    *centre, radius = BALL.balls[0]
    angle = np.linspace(0, 2 * np.pi, R, endpoint=False)
    sideways = np.stack([np.zeros(R), np.cos(angle), np.sin(angle)], axis=1)
    origin = np.array(centre) - [2, 0, 0] + (radius + height) * sideways
    hits = trace(BALL, Rays(origin=np.float32(origin), direction=np.tile(np.float32([1, 0, 0]), (R, 1))))
    assert hits.unfinished == 0
    np.testing.assert_array_equal(hits.hit, expected)


@pytest.mark.parametrize("scene", [replace(BALL, scale=1.5), replace(BALL, scale=0.4)], ids=["too far", "too short"])
def test_a_wrongly_scaled_distance_leads_there_too(scene: Bodies) -> None:
    """From the far side by a step back, if the step was not so long that it led through a body."""
    rays = some_rays(3)
    entry, hits = BALL.entry(rays.origin, rays.direction), trace(scene, rays)
    slope = -np.sum(gradient(BALL, positions(rays, np.minimum(entry, 9))) * rays.direction, axis=1)
    met = np.isfinite(entry) & (slope > 0.5)
    assert met.sum() > R / 4
    assert hits.unfinished == 0
    assert hits.hit[met].all()
    np.testing.assert_allclose(hits.t[met], entry[met], atol=4 * TOLERANCE / 0.4)


# How the work is done does not matter.


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lanes", [1, 37])
def test_hits_do_not_depend_on_the_number_of_lanes(lanes: int) -> None:
    rays = some_rays(0)
    assert_same(trace(ALL, rays), trace(ALL, rays, lanes=lanes))


@given(seeds)
def test_hits_do_not_depend_on_the_order_of_rays(seed: int) -> None:
    rays, order = some_rays(0), np.random.default_rng(seed).permutation(R)
    expected, found = trace(ALL, rays), trace(ALL, jax.tree.map(lambda a: a[order], rays))
    assert_same((expected.t[order], expected.hit[order], expected.unfinished), found_parts(found))


def found_parts(hits: Hits) -> tuple:
    return hits.t, hits.hit, hits.unfinished


def test_rays_of_too_many_steps_are_counted_as_misses() -> None:
    rays = only(some_rays(0), outside(ALL, some_rays(0)))
    expected, found = trace(ALL, rays), trace(ALL, rays, max_steps=3)
    assert expected.unfinished == 0
    assert 0 < found.unfinished < R
    assert (expected.hit | ~found.hit).all()
    both = found.hit & expected.hit
    np.testing.assert_array_equal(found.t[both], expected.t[both])
    near, far = slab_interval(rays.origin, rays.direction, *np.asarray(UNIT, np.float64))
    left = ~found.hit & (found.t >= far - 1e-6)
    assert found.unfinished == R - np.sum(found.hit | left | (near >= far))


def test_a_ray_that_leaves_with_its_last_step_ended() -> None:
    """One step from anywhere leads farther than the box is wide."""
    far_away = Bodies(plane=(0, 0, 1, -90))
    hits = trace(far_away, some_rays(0), max_steps=3)
    assert hits.unfinished == 0
    assert trace(far_away, some_rays(0), max_steps=1).unfinished == 0
    assert not hits.hit.any()


@pytest.mark.parametrize("box", [UNIT, np.float32([[5, 5, 5], [6, 6, 6]])], ids=["behind", "elsewhere"])
def test_rays_that_all_miss_the_box_hit_nothing(box: np.ndarray) -> None:
    rays = some_rays(0)
    hits = trace(ALL, replace(rays, direction=-np.asarray(rays.direction)), box)
    assert not hits.hit.any()
    assert hits.unfinished == 0
    assert np.isfinite(hits.t).all()


def test_a_non_finite_distance_is_a_miss() -> None:
    hits = trace(replace(ALL, scale=np.nan), some_rays(0))
    assert not hits.hit.any()
    assert hits.unfinished == 0


# Normals.


@functools.partial(jax.jit, static_argnames="noise")
def normals(distance: Partial, position: jax.Array, width: float, noise: float = 0.0) -> jax.Array:
    def rippled(position: jax.Array) -> jax.Array:
        waves = jnp.sin(jnp.sum(position * jnp.array([9e4, -7e4, 8e4]), axis=1))
        return distance(position) + noise * waves

    return tracing.surface_normals(rippled, position, width=width)


@every_scene
@pytest.mark.parametrize("width", [1e-3, 1e-2])
def test_normals_are_of_unit_length_and_lead_away(scene: Bodies, width: float) -> None:
    rays = only(some_rays(1), outside(scene, some_rays(1)))
    hits = trace(scene, rays)
    at = positions(rays, hits.t)
    found = np.asarray(normals(scene.field, at.astype(np.float32), width))
    np.testing.assert_allclose(np.linalg.norm(found[hits.hit], axis=1), 1, atol=1e-6)
    expected = gradient(scene, at)
    # Of one body, and of one face of the box: elsewhere the distance has an edge within the width.
    smooth = [
        np.abs(gradient(scene, at + width * e) - expected).max(axis=1) for e in np.array([*np.ndindex(2, 2, 2)]) * 2 - 1
    ]
    clear = hits.hit & (np.max(smooth, axis=0) < 0.2)
    assert clear.sum() > R / 10
    np.testing.assert_allclose(found[clear], expected[clear], atol=2e-6 / width + 4 * width)


def test_normals_see_through_narrow_ripples() -> None:
    """The gradient itself is off by 50 degrees; its differences over the width are by no more than 1e-5 / width."""
    target = np.random.default_rng(0).uniform(0.2, 0.8, (R, 3)).astype(np.float32)
    found = np.asarray(normals(PLANE.field, target, 1e-2, noise=1e-5))
    error = np.abs(found - np.float32(PLANE.plane[:3])).max()
    assert 1e-4 < error < 3**0.5 * 1e-5 / 1e-2 + 1e-4


# Views.

LIGHT = np.array([0.0, 0.6, 0.8])
UP = np.array([0.0, 0.0, 1.0])
SHADED = Bodies(balls=((0.5, 0.4, 0.35, 0.25), (0.5, 0.64, 0.7, 0.12)), plane=(0, 0, 1, 0.05))
WIDTH = 1e-3


def views() -> list[Rays]:
    seen = [make_camera(24, 24, 30.0, look_at(eye)) for eye in ((2.0, 0.3, 1.4), (0.4, 1.7, 1.6))]
    return [jax.tree.map(lambda a: np.asarray(a).reshape(-1, 3), cameras.view_rays(camera)) for camera in seen]


def draw(rays: Rays, distance: Partial | None = None, **options: Any) -> SurfaceView:
    light, up = np.float32(LIGHT), np.float32(UP)
    distance = distance or SHADED.field
    picture = tracing.draw_surface(distance, rays, UNIT, light, up, normal_width=WIDTH, **options)
    return jax.tree.map(np.asarray, picture)


def in_shadow(rays: Rays, hit: np.ndarray, t: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points have a body between them and the lamp, and of which the closed form can tell for sure."""
    start = positions(rays, t) + 4 * WIDTH * normal
    toward = np.tile(LIGHT, (len(start), 1))
    balls = replace(SHADED, plane=None)
    maybe, sure = (np.isfinite(grown(balls, by).entry(start, toward)) for by in (0.01, -0.01))
    return hit & sure, hit & (sure == maybe)


@pytest.mark.parametrize("shadows", [True, False])
def test_a_view_is_a_matt_surface_under_sky_and_lamp(shadows: bool) -> None:
    num_dark = 0
    for rays in views():
        picture = draw(rays, shadows=shadows)
        hits = trace(SHADED, rays)
        assert_same(
            (picture.depth, picture.opacity, picture.unfinished), (hits.t, np.float32(hits.hit), hits.unfinished)
        )
        seen = picture.opacity > 0
        assert 0.2 < seen.mean() < 0.95
        np.testing.assert_array_equal(picture.rgb[~seen], 1)
        np.testing.assert_array_equal(picture.normal[~seen], 0)
        normal = gradient(SHADED, positions(rays, picture.depth))
        dark, sure = in_shadow(rays, seen, picture.depth, normal)
        facing = np.maximum(normal @ LIGHT, 0)
        lit = np.where(dark & shadows, 0, facing)
        expected = tracing.SKY * (0.4 + 0.2 * (normal @ UP))[:, None] + tracing.LAMP * lit[:, None]
        edge = np.abs(normal - picture.normal).max(axis=1) > 1e-2  # between two bodies
        check = seen & (sure | (facing == 0)) & ~edge & (facing > 0.02) | seen & ~edge & (facing == 0)
        assert check.sum() > 0.7 * seen.sum()
        np.testing.assert_allclose(picture.rgb[check], np.clip(expected, 0, 1)[check], atol=0.01)
        num_dark += np.sum(check & dark & (facing > 0.3))
    assert num_dark > 20


def test_a_view_does_not_depend_on_the_number_of_lanes() -> None:
    for rays in views():
        one, other = draw(rays), draw(rays, lanes=50)
        assert_same((one.depth, one.opacity, one.unfinished), (other.depth, other.opacity, other.unfinished))
        np.testing.assert_allclose(one.normal, other.normal, atol=1e-4)  # compiled otherwise, it rounds otherwise
        shadow_edge = np.abs(one.rgb - other.rgb).max(axis=1) > 1e-3
        assert shadow_edge.sum() < 3


def test_a_view_of_nothing_is_white() -> None:
    rays = views()[0]
    picture = draw(replace(rays, direction=-rays.direction))
    np.testing.assert_array_equal(picture.rgb, 1)
    np.testing.assert_array_equal(picture.opacity, 0)
    np.testing.assert_array_equal(picture.normal, 0)


def test_all_views_and_the_shadows_share_the_programs() -> None:
    traced = []

    def counted(distance: Partial, position: jax.Array) -> jax.Array:
        traced.append(position.shape)
        return distance(position)

    first, second = views()
    distance = Partial(counted, SHADED.field)
    draw(first, distance, shadows=False)
    programs = len(traced)  # the walk and the normals
    draw(first, distance)
    draw(second, distance)
    assert len(traced) == programs > 0
