"""A soft ball, a field in closed form, and a run of it whose source is turned, scaled and far from the origin."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from flax import struct
from judges import averaged
from scenes import Ball, pixel_rays, poses_around

from jaxngp.cameras import Cameras, make_cameras
from jaxngp.config import MarchConfig, NerfConfig, OccupancyConfig
from jaxngp.data import SceneTransform
from jaxngp.occupancy import init_occupancy

CENTRE, RADIUS, LEVEL = np.array([0.5, 0.45, 0.55]), 0.3, 80.0
TURN = ((0.0, 0.8, 0.6), (-1.0, 0.0, 0.0), (0.0, -0.6, 0.8))
TRANSFORM = SceneTransform((10.0, -20.0, 30.0), 4.0, TURN)


@struct.dataclass
class SoftBall:
    """A ball whose density falls off exponentially through LEVEL at its surface; hollow inside; colour by direction."""

    hollow: float = struct.field(pytree_node=False, default=0.0)

    def density(self, position):
        radius = jnp.linalg.norm(position - CENTRE.astype(np.float32), axis=-1)
        density = LEVEL * jnp.exp(jnp.minimum((RADIUS - radius) / 0.01, 3))
        return jnp.where(radius < self.hollow, 0.0, density)

    def __call__(self, position, direction):
        normal = (position - CENTRE.astype(np.float32)) / RADIUS
        return self.density(position), jnp.clip(0.5 + 0.4 * normal + 0 * direction, 0, 1)


def cameras(count=12, distance=1.4, size=64):
    return make_cameras(poses_around(count, distance), focal_xy=80, centre_xy=size / 2, width=size, height=size)


def ball_run(field, views=None):
    resolution = 32
    place = (np.arange(resolution) + 0.5) / resolution
    x, y, z = np.meshgrid(place, place, place, indexing="ij")
    near = np.linalg.norm(np.stack([x, y, z], -1) - CENTRE, axis=-1) < RADIUS + 0.08
    grid = init_occupancy(jnp.asarray(near.transpose(2, 1, 0).reshape(-1)))
    sampler = MarchConfig(num_steps=256, num_samples=2**15, occupancy=OccupancyConfig(resolution=resolution))
    config = dataclasses.replace(NerfConfig(), sampler=sampler)
    train = dataclasses.replace(config.train, num_rays=512)
    config = dataclasses.replace(config, train=train)
    return SimpleNamespace(
        field=field, occupancy=grid, cameras=views, transform=TRANSFORM, config=config, workdir="run"
    )


def cast_ball(view: Cameras, radius: float = RADIUS) -> np.ndarray:
    """What a camera sees (H, W, 3) of a hard ball with the soft one's colours, on white, by 16 rays a pixel."""
    fine = view.replace(focal_xy=4 * view.focal_xy, centre_xy=4 * view.centre_xy, size=4 * view.size)
    origin, direction = pixel_rays(fine)
    t0, t1 = Ball(tuple(CENTRE), radius, 1.0, (0, 0, 0), (0, 0, 0)).chord(origin, direction)
    colour = 0.5 + 0.4 * (origin + t0[..., None] * direction - CENTRE) / radius
    return averaged(np.where((t1 > t0)[..., None], colour, 1.0), 4)
