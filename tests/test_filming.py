"""Frames against what closed-form scenes show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import BALL, Slab, look_at, make_camera

from jaxngp import filming
from jaxngp.cameras import Rays, through_aperture, view_rays
from jaxngp.compositing import RenderOutput
from jaxngp.config import MarchConfig, OccupancyConfig
from jaxngp.occupancy import init_occupancy
from jaxngp.rendering import render_view

SAMPLER = MarchConfig(num_steps=512, num_samples=512, occupancy=OccupancyConfig(resolution=32))
GRID = init_occupancy(jnp.ones(32**3, bool))
WHITE = jnp.ones(3, jnp.float32)
CAMERA = make_camera(24, 16, 20.0, look_at((1.6, -0.7, 1.1)))


def film(samples: int = 1, **options: float) -> RenderOutput:
    return filming.film(BALL.field, CAMERA, GRID, WHITE, sampler=SAMPLER, samples=samples, **options)


def exact(rays: Rays) -> RenderOutput:
    return BALL.seen(np.asarray(rays.origin, np.float64), np.asarray(rays.direction, np.float64), 1.0)


def test_one_sample_is_the_view() -> None:
    view = render_view(BALL.field, CAMERA, GRID, WHITE, sampler=SAMPLER)
    jax.tree.map(np.testing.assert_array_equal, film(), view)


def test_samples_are_averaged_evenly_over_the_pixel() -> None:
    """The mean of four rays a pixel is nearer to that of 256 exact ones than one ray is."""
    offsets = (np.arange(16) + 0.5) / 16
    fine = np.mean([exact(view_rays(CAMERA, (x, y))).rgb for x in offsets for y in offsets], axis=0)
    one, sixteen = (np.abs(np.asarray(film(n).rgb) - fine).mean() for n in (1, 16))
    assert sixteen < one / 2
    assert np.abs(np.asarray(film(16).rgb) - fine).max() < 0.05


@pytest.mark.parametrize("focus", [0.5, 2.0])
def test_an_aperture_keeps_its_plane_in_focus(focus: float) -> None:
    rays = view_rays(CAMERA)
    place = np.random.default_rng(0).uniform(-0.2, 0.2, (16, 24, 2)).astype(np.float32)
    bent = through_aperture(CAMERA, rays, jnp.asarray(place), jnp.float32(focus))
    axis = -np.asarray(CAMERA.c2w[:, 2], np.float64)
    points = []
    for ray in (rays, bent):
        origin, direction = (np.asarray(a, np.float64) for a in (ray.origin, ray.direction))
        t = (focus - (origin - np.asarray(CAMERA.c2w[:, 3])) @ axis) / (direction @ axis)
        points.append(origin + t[..., None] * direction)
    np.testing.assert_allclose(*points, atol=1e-5 * focus)
    away = np.linalg.norm(np.asarray(bent.origin) - np.asarray(rays.origin), axis=-1)
    np.testing.assert_allclose(away, np.linalg.norm(place, axis=-1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(bent.direction, axis=-1), 1, atol=1e-6)


def test_places_on_the_lens_fill_the_disc() -> None:
    """Each pixel's places have the disc's centre and its mean square radius, 1/2."""
    places = np.stack([filming._lens_places(i, 64, (5, 4)) for i in range(64)])
    assert places.shape == (64, 4, 5, 2)
    assert np.max(np.sum(places**2, axis=-1)) < 1
    np.testing.assert_allclose(np.mean(np.sum(places**2, axis=-1), axis=0), 0.5, atol=1e-6)
    np.testing.assert_allclose(np.mean(places, axis=0), 0, atol=0.05)


def test_an_aperture_blurs_what_is_out_of_focus() -> None:
    sharp, focused, blurred = (
        np.asarray(film(16, aperture=a, focus=f).rgb) for a, f in ((0.0, 1.0), (0.15, 1.5), (0.15, 0.4))
    )
    assert np.abs(focused - sharp).mean() < np.abs(blurred - sharp).mean() / 3


def test_depth_along_the_axis_is_that_of_a_plane() -> None:
    """A slab at right angles to the axis has one depth, whatever the angle of the ray."""
    slab = Slab(0.2, 0.4, 5000.0, (0.2, 0.4, 0.6))
    camera = make_camera(16, 16, 40.0, np.column_stack([np.eye(3), [0.5, 0.5, 0.9]]))
    out = render_view(slab.field, camera, GRID, WHITE, sampler=SAMPLER)
    depth = filming.depth_along_axis(camera, out)
    np.testing.assert_allclose(depth, 0.5, atol=SAMPLER.step_size)
    assert np.ptp(out.depth) > 0.01


@pytest.mark.parametrize("far", [1e-4, 0.7, 65.535, 66.0, 1e5])
def test_depth_steps_reach_as_far_as_they_must(far: float) -> None:
    step = filming.depth_step(far)
    assert far <= step * filming.DEPTH_STEPS * (1 + 1e-9)
    assert step * filming.DEPTH_STEPS < 10.001 * far
    assert np.log10(step) == pytest.approx(round(np.log10(step)))


def test_straight_alpha_goes_over_any_background() -> None:
    black = render_view(BALL.field, CAMERA, GRID, jnp.zeros(3), sampler=SAMPLER)
    rgba = filming.straight_alpha(film(), WHITE)
    np.testing.assert_allclose(rgba[..., :3] * rgba[..., 3:], black.rgb, atol=2e-6)
    np.testing.assert_array_equal(rgba[..., 3], black.opacity)


def test_normals_of_a_ball_are_its_radii() -> None:
    """Within what one pixel's place and the march can tell; at the border the surface turns away within a pixel."""
    camera = make_camera(64, 64, 160.0, look_at((1.6, -0.7, 1.1), BALL.centre))
    rays = view_rays(camera)
    origin, direction = (np.asarray(a, np.float64) for a in (rays.origin, rays.direction))
    t0, t1 = BALL.chord(origin, direction)
    hit = RenderOutput(rgb=np.zeros((64, 64, 3)), opacity=(t1 > t0).astype(float), depth=t0)
    normal = filming.surface_normals(rays, hit)
    radius = (origin + t0[..., None] * direction - np.array(BALL.centre)) / BALL.radius
    facing = (t1 > t0) & (-np.sum(radius * direction, axis=-1) > 0.3)
    assert facing.mean() > 0.3
    assert np.min(np.sum(normal * radius, axis=-1)[facing]) > np.cos(np.radians(8))
    assert not normal[t1 <= t0].any()


def test_an_edge_has_the_normals_of_both_its_sides() -> None:
    """Of two planes across the axis, one before the other, all pixels look back along it, up to the edge and behind."""
    camera = make_camera(16, 12, 30.0, np.column_stack([np.eye(3), [0.5, 0.5, 0.9]]))
    rays = view_rays(camera)
    along = -np.asarray(rays.direction, np.float64)[..., 2]
    plane = np.where((np.arange(16) < 7) ^ (np.arange(12)[:, None] < 5), 0.3, 0.6)
    out = RenderOutput(rgb=np.zeros((12, 16, 3)), opacity=np.ones((12, 16)), depth=plane / along)
    normal = filming.surface_normals(rays, out)
    np.testing.assert_allclose(normal, np.broadcast_to([0, 0, 1], normal.shape), atol=1e-5)
