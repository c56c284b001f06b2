"""Registration: the camera of a photograph of a scene in closed form, from a guess that is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scenes import make_camera, poses_around

from jaxngp.cameras import Cameras, view_rays
from jaxngp.config import InputError, NerfConfig, StratifiedConfig
from jaxngp.refinement import exposed, moved, pose_errors
from jaxngp.registration import Registration, localise, register_view
from jaxngp.rendering import render_ray_grid

SAMPLER = StratifiedConfig(num_bins=96, near=0.8, far=2.0)
SIZE = 48


def marbled(position: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A ball without any symmetry: its colours are waves of different directions."""
    offset = position - 0.5
    # Soft, so that what is seen does not jump as samples cross a surface.
    density = 40 * jax.nn.sigmoid((0.35 - jnp.sqrt(jnp.sum(offset**2, axis=-1))) / 0.02)
    waves = jnp.array([[7.0, 3.0, 1.0], [-2.0, 6.0, 4.0], [1.0, -5.0, 8.0]])
    return density, 0.5 + 0.4 * jnp.sin(offset @ waves.T + jnp.array([0.0, 1.0, 2.0]))


@dataclass(frozen=True)
class Scene:
    field: Any = Partial(marbled)
    occupancy: None = None
    config: NerfConfig = NerfConfig(sampler=SAMPLER)


def camera(view: int) -> Cameras:
    return jax.tree.map(np.asarray, make_camera(SIZE, SIZE, 50.0, poses_around(6, 1.4))[view])


def photograph(own: Cameras, gain: float = 0.0) -> np.ndarray:
    out = render_ray_grid(Scene().field, view_rays(own), None, jnp.ones(3), sampler=SAMPLER)
    rgb = exposed(out.rgb, out.opacity, np.ones(3, np.float32), np.full(3, gain, np.float32))
    return np.clip(np.asarray(rgb), 0, 1)


def off(own: Cameras, degrees: float, distance: float, seed: int) -> Cameras:
    away = np.random.default_rng(seed).normal(size=(2, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    twist = jnp.asarray(np.concatenate([distance * away[0], np.radians(degrees) * away[1]]), jnp.float32)
    return own.replace(c2w=np.asarray(moved(jnp.asarray(own.c2w), twist)))


def error(found: Registration, own: Cameras) -> tuple[float, float]:
    degrees, distance = pose_errors(np.asarray(found.camera.c2w)[None], np.asarray(own.c2w)[None])
    return float(degrees[0]), float(distance[0])


@pytest.mark.slow
def test_a_photograph_is_found_from_far() -> None:
    own = camera(1)
    found = localise(Scene(), photograph(own), off(own, 10.0, 0.1, 0))
    degrees, distance = error(found, own)
    assert degrees < 0.1
    assert distance < 0.003
    assert found.difference < 0.01
    assert found.rotation_error < 0.1


@pytest.mark.slow
def test_a_pose_is_found_on_half_an_image() -> None:
    own = camera(2)
    image, keep = photograph(own), np.broadcast_to(np.arange(SIZE) < SIZE // 2, (SIZE, SIZE))
    start = off(own, 1.0, 0.01, 1)
    spoiled = np.where(keep[..., None], image, 0)  # what is masked is not looked at
    found = register_view(Scene().field, None, start, spoiled, keep, sampler=SAMPLER, pose=True, exposure=False)
    assert error(found, own)[0] < 0.1
    assert not found.log_gain.any()


@pytest.mark.slow
def test_an_exposure_is_found_alone() -> None:
    own = camera(3)
    keep = np.ones((SIZE, SIZE), bool)
    found = register_view(
        Scene().field, None, own, photograph(own, -0.3), keep, sampler=SAMPLER, pose=False, exposure=True
    )
    np.testing.assert_allclose(found.log_gain, -0.3, atol=0.01)
    np.testing.assert_array_equal(found.camera.c2w, own.c2w)
    assert not found.covariance.any()


def test_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="another size"):
        localise(Scene(), np.zeros((SIZE, SIZE + 1, 3), np.uint8), camera(0))
