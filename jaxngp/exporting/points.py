"""A point cloud: where rays of the training views lose half of their light."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tqdm import tqdm

from jaxngp.cameras import Cameras
from jaxngp.compositing import composite, optical_depth_before
from jaxngp.config import Bounds, Config, InputError
from jaxngp.console import bar_interval
from jaxngp.exporting.files import axes_of, positions, to_byte, write_ply
from jaxngp.exporting.surface import Field
from jaxngp.marching import jitter_shape, sample_rays
from jaxngp.occupancy import OccupancyGrid
from jaxngp.rendering import Sampler
from jaxngp.runs import Run

HALF = math.log(2)  # the optical depth at which half of the light is lost
FRUITLESS = 50  # calls in a row that find no point


@dataclass(frozen=True)
class PointOptions(Config):
    """How many points."""

    count: Annotated[int, Bounds(1, 2**26), "number of points"] = 500_000
    seed: Annotated[int, Bounds(0, below=2**32), "seed of the random rays"] = 0


@struct.dataclass
class Points:
    """position (N, 3), unit normal (N, 3), sRGB (N, 3), distance (N,) from the view's camera; f32, scene units."""

    position: jax.Array
    normal: jax.Array
    rgb: jax.Array
    distance: jax.Array


def write(run: Run, path: Path, options: PointOptions) -> str:
    """Write a binary PLY with positions, normals and colours."""
    points = find_points(run, options.count, options.seed)
    columns = axes_of("x y z", positions(run.transform.to_world(np.asarray(points.position)), run.transform.side))
    columns |= axes_of("nx ny nz", np.asarray(points.normal @ np.array(run.transform.rotation), np.float32))
    write_ply(path, columns | axes_of("red green blue", to_byte(np.asarray(points.rgb))))
    return f"{options.count:,} points"


def find_points(run: Run, count: int, seed: int = 0) -> Points:
    """Points on rays through random places of the training views, as numpy arrays. Raises InputError."""
    if run.cameras is None:
        raise InputError(f"{run.workdir}: was trained on rays without cameras, by which points are found")
    cameras = jax.tree.map(jnp.asarray, run.cameras)
    program = functools.partial(_deposit, sampler=run.config.sampler, num_rays=run.config.train.num_rays)
    key, parts, left, fruitless = jax.random.key(seed), [], count, 0
    with tqdm(
        total=count, desc="points", unit_scale=True, mininterval=bar_interval(), delay=1.0, leave=False
    ) as progress:
        while left > 0:
            key, call = jax.random.split(key)
            points, valid = program(run.field, run.occupancy, cameras, call)
            rows = np.flatnonzero(valid)[:left]
            parts.append(jax.tree.map(lambda a, rows=rows: np.asarray(a)[rows], points))
            found = len(rows)
            left, fruitless = left - found, 0 if found else fruitless + 1
            progress.update(found)
            if fruitless == FRUITLESS:
                raise InputError(f"{run.workdir}: no ray of a training view meets anything opaque; train longer")
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


@functools.partial(jax.jit, static_argnames=("sampler", "num_rays"))
def _deposit(
    field: Field, grid: OccupancyGrid | None, cameras: Cameras, key: jax.Array, *, sampler: Sampler, num_rays: int
) -> tuple[Points, jax.Array]:
    """The points of random rays (R,), and which are any (R,): those of rays that lose half of their light."""
    keys = jax.random.split(key, 3)
    view = jax.random.randint(keys[0], (num_rays,), 0, len(cameras.c2w))
    rays = cameras.cast(view, jax.random.uniform(keys[1], (num_rays, 2)) * cameras.size[view])
    jitter = jax.random.uniform(keys[2], jitter_shape(num_rays, sampler=sampler))
    samples = sample_rays(rays, grid, jitter, sampler=sampler)
    direction = rays.direction[samples.ray]
    density, rgb = field(rays.origin[samples.ray] + samples.t[:, None] * direction, direction)
    thickness = density * samples.dt
    before = optical_depth_before(thickness, samples.ray, num_rays)
    crosses = (before < HALF) & (before + thickness >= HALF) & samples.valid
    within = (HALF - before) / jnp.maximum(thickness, 1e-9) - 0.5
    place = jnp.where(crosses, samples.ray, num_rays)
    distance = jnp.zeros(num_rays).at[place].set(samples.t + within * samples.dt, mode="drop")
    found = jnp.zeros(num_rays, bool).at[place].set(True, mode="drop")
    position = rays.origin + distance[:, None] * rays.direction
    seen = composite(density, rgb, samples.t, samples.dt, samples.ray, jnp.zeros((num_rays, 3)))
    colour = seen.rgb / jnp.maximum(seen.opacity, 0.5)[:, None]
    inside = jnp.all((position > 0) & (position < 1), axis=1)
    normal = _normal(field, position, rays.direction, 1.5 * jnp.max(samples.dt))
    return Points(position, normal, colour, distance), found & samples.ray_complete & inside


def _normal(field: Field, position: jax.Array, direction: jax.Array, reach: jax.Array) -> jax.Array:
    """The unit direction (N, 3) in which the density falls fastest, by differences, turned against the view's."""
    steps = jnp.concatenate([jnp.eye(3), -jnp.eye(3)]) * reach
    around = (position[:, None] + steps).reshape(-1, 3)
    logs = jnp.log(field.density(jnp.clip(around, 0, 1)) + 1e-3).reshape(-1, 2, 3)
    slope = logs[:, 1] - logs[:, 0]
    slope = jnp.where(jnp.sum(slope * direction, axis=1, keepdims=True) > 0, -slope, slope)
    length = jnp.linalg.norm(slope, axis=1, keepdims=True)
    return jnp.where(length > 1e-6, slope / jnp.maximum(length, 1e-6), -direction)
