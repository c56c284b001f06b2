"""Where `normalise` puts a capture in the scene's box: laws of similarities, and what overrides what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxngp.cameras import Cameras, look_at, make_cameras
from jaxngp.config import SceneConfig
from jaxngp.data import Capture, normalise
from jaxngp.data.capture import FAR, INNER, Box, SceneTransform

AUTO = SceneConfig(name="-")
seeds = st.integers(0, 2**32 - 1)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)


def captured(c2w: np.ndarray, **rest: object) -> Capture:
    """A capture of opaque photographs of 40x30 pixels with the given poses (V, 3, 4)."""
    cameras = make_cameras(c2w, focal_xy=40.0, centre_xy=(20.0, 15.0), width=40, height=30)
    count = len(c2w)
    plain = Cameras(np.asarray(c2w, np.float64), *(cameras.focal_xy, cameras.centre_xy, cameras.size))  # type: ignore[arg-type]
    given = {"cameras": plain, "has_alpha": (False,) * count} | rest
    return Capture(Path("-"), tuple(map(str, range(count))), ("train",) * count, **given)  # type: ignore[arg-type]


def ring(rng: np.random.Generator) -> np.ndarray:
    """Poses (12, 3, 4) f64 around a point at different heights, which all look at it."""
    angle = np.arange(12) * np.pi / 6 + rng.uniform(0, 0.3, 12)
    place = np.stack([2 * np.cos(angle), 2 * np.sin(angle), rng.uniform(0.2, 1.0, 12)], axis=-1) + (1.0, -2.0, 0.5)
    return np.stack([look_at(p, (1.0, -2.0, 0.5), (0, 0, 1)) for p in place]).astype(np.float64)


@given(seeds, st.floats(0.01, 100))
def test_a_moved_capture_lies_where_it_lay(seed: int, scale: float) -> None:
    """Turned, moved and scaled as a whole, it comes out the same but for a turn about the vertical."""
    rng = np.random.default_rng(seed)
    c2w = ring(rng)
    turn, shift = random_rotation(rng), rng.normal(size=3)
    moved = np.concatenate([turn @ c2w[..., :3], scale * c2w[..., 3:] @ np.eye(1)], axis=-1)
    moved[..., 3] = scale * c2w[..., 3] @ turn.T + shift
    points = rng.normal(size=(50, 3))
    before = normalise(captured(c2w, points=points), AUTO)
    after = normalise(captured(moved, points=scale * points @ turn.T + shift), AUTO)
    assert before.num_cascades == after.num_cascades
    a, b = (placed.transform.pose_to_scene(poses)[..., 3] - 0.5 for placed, poses in ((before, c2w), (after, moved)))
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1), rtol=1e-3)
    np.testing.assert_allclose(a[:, 2], b[:, 2], atol=1e-3)
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-3)


@given(seeds)
def test_cameras_stand_upright_inside_the_box(seed: int) -> None:
    rng = np.random.default_rng(seed)
    turn = random_rotation(rng)
    c2w = turn @ ring(rng)
    placed = normalise(captured(c2w), AUTO)
    scene = placed.transform.pose_to_scene(c2w)
    assert np.all((scene[..., 3] > 0) & (scene[..., 3] < 1))
    np.testing.assert_allclose(scene[:, :, 1].mean(axis=0)[:2], 0, atol=1e-3)
    assert scene[:, 2, 1].mean() > 0.5
    inner = 2.0 ** (1 - placed.num_cascades)
    distance = np.median(np.linalg.norm(scene[..., 3] - 0.5, axis=1))
    np.testing.assert_allclose(inner, INNER * distance, rtol=1e-3)


def test_far_points_ask_for_more_cascades() -> None:
    c2w = ring(np.random.default_rng(0))
    counts = [normalise(captured(c2w, points=np.eye(3) * far), AUTO).num_cascades for far in (1.0, 6.0, 12.0, 1e6)]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] <= counts[3] == FAR


def test_what_is_given_comes_first() -> None:
    """The box of the config, then that of the source, then its own; `scale` shrinks all but the first."""
    c2w = ring(np.random.default_rng(0))
    boxed = captured(c2w, box=Box((1.0, 2.0, 3.0), 8.0, 3))
    given_box = replace(AUTO, box_centre=(4.0, 5.0, 6.0), box_side=2.0, scale=4.0)
    assert normalise(boxed, given_box).transform == SceneTransform((4.0, 5.0, 6.0), 2.0)
    assert normalise(boxed, AUTO).transform == SceneTransform((1.0, 2.0, 3.0), 8.0)
    assert normalise(boxed, AUTO).num_cascades == 3
    assert normalise(boxed, replace(AUTO, scale=2.0)).transform.side == 4.0
    own = [normalise(captured(c2w), replace(AUTO, scale=scale)).transform.side for scale in (1.0, 2.0)]
    assert own[0] == pytest.approx(2 * own[1])


@pytest.mark.parametrize("up", ["x", "y", "z", "-x", "-y", "-z"])
def test_the_direction_called_up_becomes_z(up: str) -> None:
    scene = replace(AUTO, up=up)  # type: ignore[arg-type]
    transform = normalise(captured(ring(np.random.default_rng(1)), up=(0.6, 0.0, 0.8)), scene).transform
    axis = np.zeros(3)
    axis["xyz".index(up[-1])] = -1 if up[0] == "-" else 1
    moved = transform.to_scene(transform.to_world(np.full(3, 0.5)) + axis) - 0.5
    np.testing.assert_allclose(moved * transform.side, (0, 0, 1), atol=1e-9)
    assert np.linalg.det(np.array(transform.rotation)) == pytest.approx(1)


def test_images_with_alpha_fill_the_box() -> None:
    """The cube about what they look at is as wide as the image is at its distance; nothing is around it."""
    c2w = ring(np.random.default_rng(2))
    placed = normalise(captured(c2w, has_alpha=(True,) * 12), AUTO)
    assert placed.num_cascades == 1
    distance = np.median(np.linalg.norm(c2w[:, :, 3] - (1.0, -2.0, 0.5), axis=1))
    assert placed.transform.side == pytest.approx(distance * 40 / 40, rel=1e-3)
