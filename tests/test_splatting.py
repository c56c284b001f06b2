"""The rasteriser of splats beside the judge's, its derivative beside differences, and refinement on a soft ball."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import splat_picture
from scenes import poses_around
from scipy.spatial.transform import Rotation
from soft_ball import TRANSFORM, TURN, SoftBall, ball_run, cameras
from strategies import jit_to_numpy

from jaxngp.cameras import image_size, make_cameras
from jaxngp.encodings import sh_encode
from jaxngp.exporting import refining, splats, splatting
from jaxngp.exporting.splats import SplatOptions
from jaxngp.exporting.splatting import Gaussians
from jaxngp.lenses import make_lens
from jaxngp.rendering import render_view


def gaussians(count, *, scale, logit=(-1.0, 2.0), degree=1, seed=0):
    """Random ones about the middle of the box."""
    rng = np.random.default_rng(seed)
    return Gaussians(
        rng.uniform(0.2, 0.8, (3, count)).astype(np.float32),
        np.log(rng.uniform(*scale, (3, count))).astype(np.float32),
        rng.normal(size=(4, count)).astype(np.float32),
        rng.uniform(*logit, count).astype(np.float32),
        rng.normal(size=((degree + 1) ** 2, 3, count)).astype(np.float32),
    )


def camera(width, height, focal):
    poses = poses_around(12, 1.4)[3]
    return make_cameras(poses, focal_xy=focal, centre_xy=(width / 2, height / 2), width=width, height=height)


project, draw = jax.jit(splatting.project), jit_to_numpy(splatting.draw)
harmonics_of = jit_to_numpy(sh_encode, static_argnames="degree")


def drawn(values, view):
    """(H, W, 4): colours on black and transmittances."""
    width, height = image_size(view)
    bins = splatting.sort_into_tiles(project(values, view), width, height)
    return splatting.as_picture(draw(values, view, bins), bins, width, height)


def judged(view, place, scale, turn, opacity, harmonics):
    """The judge's picture (H, W, 3) on white of splats in scene units, with harmonics (N, J, 3)."""
    direction = place - np.asarray(view.c2w)[:, 3]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    basis = harmonics_of(direction.astype(np.float32), degree=round(harmonics.shape[1] ** 0.5))
    colours = np.maximum(0.5 + np.einsum("nj,njc->nc", basis, harmonics), 0)
    return splat_picture(view, place, scale, turn, opacity, colours)


@pytest.mark.parametrize(("count", "scale", "logit"), [(60, (0.01, 0.08), (-1, 2)), (3000, (0.02, 0.04), (3, 4))])
def test_pictures_are_those_of_the_judge(count, scale, logit):
    """Also of an opaque crowd, where tiles end early: of what lies behind, 1e-4 of a colour of 4 at most is missing.

    A splat's rim is a step: rounding may put a pixel on its other side.
    """
    values, view = gaussians(count, scale=scale, logit=logit), camera(60, 44, 80)
    seen = drawn(values, view)
    position, log_scale, quaternion, log_odds, harmonics = (
        np.asarray(a, np.float64).T for a in jax.tree.leaves(values)
    )
    turn, opacity = Rotation.from_quat(quaternion).as_matrix(), 1 / (1 + np.exp(-log_odds))
    expected = judged(view, position, np.exp(log_scale), turn, opacity, np.swapaxes(harmonics, 1, 2))
    wrong = np.abs(seen[..., :3] + seen[..., 3:] - expected).max(axis=-1)
    assert np.quantile(wrong, 0.99) < 5e-4
    assert wrong.max() < 3 / 255 * 4


def test_the_derivative_is_that_of_differences():
    """Of splats that are wider than the picture: their rims, whose steps have no derivative, lie outside."""
    values, view = gaussians(12, scale=(0.5, 0.8), logit=(-2, 0)), camera(16, 16, 16)
    bins = splatting.sort_into_tiles(project(values, view), 16, 16)
    rng = np.random.default_rng(1)
    target = rng.normal(size=(len(bins.start) - 1, 4, splatting.TILE**2, splatting.GROUP)).astype(np.float32)

    @jit_to_numpy
    @jax.value_and_grad
    def value_and_slope(values):
        return jnp.sum(splatting.draw(values, view, bins) * target)

    slope, step = value_and_slope(values)[1], 4e-3
    for field in dataclasses.fields(Gaussians):
        start = getattr(values, field.name)
        way = rng.normal(size=start.shape).astype(np.float32)
        ends = [value_and_slope(values.replace(**{field.name: start + t * way}))[0] for t in (step, -step)]
        expected = (float(ends[0]) - float(ends[1])) / (2 * step)
        # float32: the sums are good to about 1e-4, and so the differences to 1e-4 / 8e-3.
        found = float(np.sum(getattr(slope, field.name) * way))
        assert found == pytest.approx(expected, rel=0.03, abs=0.05), field.name


def test_a_tile_without_splats_is_clear():
    values = gaussians(1, scale=(1e-3, 2e-3))
    seen = drawn(values.replace(position=np.array([[0.5], [0.5], [9.0]], np.float32)), camera(32, 32, 40))
    assert np.all(seen == [0, 0, 0, 1])


@pytest.mark.slow
def test_refinement_approaches_the_field():
    """From a view that it has not seen, in 30 steps."""
    run = ball_run(SoftBall(), cameras(6))
    view = make_cameras(poses_around(7, 1.4)[2], focal_xy=80, centre_xy=32, width=64, height=64)
    exact = render_view(run.field, view, run.occupancy, jnp.ones(3), sampler=run.config.sampler).rgb
    errors = []
    for steps in (0, 30):
        found = splats.make_splats(run, SplatOptions(splats=500, degree=1, steps=steps))
        turn = np.array(TURN) @ Rotation.from_quat(found.rotation).as_matrix()
        place = TRANSFORM.to_scene(found.position)
        # The ball's colours do not depend on the direction, so the frame of the harmonics matters little here.
        seen = judged(view, place, found.scale / TRANSFORM.side, turn, found.opacity, found.harmonics[:, :1])
        errors.append(np.mean((seen - exact) ** 2))
    assert errors[1] < 0.6 * errors[0]


def test_harmonics_turn_into_the_world():
    """A direction of the world sees of the splats written what its direction in the scene saw of those refined."""
    rng = np.random.default_rng(0)
    harmonics, direction = rng.normal(size=(5, 16, 3)), rng.normal(size=(9, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    one = np.ones((5, 3))
    found = splats._in_world(ball_run(None), one, one, np.tile([0, 0, 0, 1.0], (5, 1)), np.ones(5), harmonics)
    basis = functools.partial(harmonics_of, degree=4)
    before = np.einsum("dj,njc->ndc", basis(direction.astype(np.float32)), harmonics)
    after = np.einsum("dj,njc->ndc", basis((direction @ np.array(TURN)).astype(np.float32)), found.harmonics)
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_views_are_refined_as_small_pinholes():
    focal, centre = np.array([[800.0, 800.0]]), np.array([[400.0, 300.0]])
    lens, _ = make_lens("fisheye", [[0.05, *[0.0] * 12]], size=[[800, 600]], focal_xy=focal, centre_xy=centre)
    poses = poses_around(3, 1.4)[:1]
    view = make_cameras(poses, focal_xy=focal, centre_xy=centre, width=800, height=600, lens=lens)[0]
    small = refining.pinhole(view, 200)
    assert small.lens is None
    assert image_size(small) == (200, 150)
    np.testing.assert_allclose(small.focal_xy, 200)
    np.testing.assert_allclose(small.centre_xy, [100, 75])
    assert image_size(refining.pinhole(view, 1000)) == (800, 600)
