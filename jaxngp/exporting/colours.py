"""The colour of a surface: what the field shows of its points to the training views that see them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.compositing import optical_weights
from jaxngp.exporting.surface import Field, Surface, in_calls, some_views, visibility
from jaxngp.runs import Run

NUM_VIEWS = 8  # that a point's colour is taken from
REACH = 2.5  # lattice spacings before and behind a point in which the field is looked at
SAMPLES = 8  # in there


def surface_colours(run: Run, surface: Surface, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """sRGB (N, 3) f32 of points (N, 3) on a surface, with unit normals (N, 3): `colour_points` by what views see."""
    views, seen = some_views(run.cameras), np.zeros((0, len(points)), bool)
    if views is not None:
        seen = visibility(views, surface.vertices, points, surface.spacing)
    return colour_points(run.field, views, seen, points, normals, surface.spacing)


def colour_points(
    field: Field, views: Cameras | None, visible: np.ndarray, points: np.ndarray, normals: np.ndarray, spacing: float
) -> np.ndarray:
    """sRGB (N, 3) f32 in [0, 1] of surface points (N, 3) with unit normals (N, 3).

    The median of what NUM_VIEWS views see, evenly taken from those that see the point, as visible (V, N) says; against
    the normal where there are none. Of shiny things that is the colour away from highlights.
    """
    look = functools.partial(_look, reach=REACH * spacing)
    directions = _directions(views, visible, points, normals)
    seen = [in_calls(look, field, points, along, said="colours") for along in directions]
    return np.median(seen, axis=0).clip(0, 1).astype(np.float32)


def _directions(views: Cameras | None, visible: np.ndarray, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """The unit directions (NUM_VIEWS, N, 3) in which points are looked at; one where no view sees anything."""
    count = visible.sum(axis=0)
    if views is None or not count.any():
        return -normals[None]
    rank, position = np.cumsum(visible, axis=0), np.asarray(views.c2w, np.float64)[:, :, 3]
    found = []
    for number in range(NUM_VIEWS):
        # Not drawn at random: neighbouring points see nearly the same views, and should choose the same.
        view = np.argmax(rank > (number + 0.5) * count // NUM_VIEWS, axis=0)
        along = points - position[view]
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-12)
        found.append(np.where((count > 0)[:, None], along, -normals))
    return np.stack(found)


@functools.partial(jax.jit, static_argnames="reach")
def _look(field: Field, points: jax.Array, direction: jax.Array, *, reach: float) -> jax.Array:
    """The colour (N, 3) that a short piece of a ray through each point shows."""
    dt = np.float32(2 * reach / SAMPLES)
    t = (np.arange(SAMPLES, dtype=np.float32) + 0.5) * dt - np.float32(reach)
    position = points[:, None] + t[:, None] * direction[:, None]
    density, rgb = field(position.reshape(-1, 3), jnp.repeat(direction, SAMPLES, axis=0))
    weights, _ = jax.vmap(optical_weights)(density.reshape(-1, SAMPLES), jnp.full((len(points), SAMPLES), dt))
    weights = weights + 1e-6  # where nothing is, all count alike
    return jnp.einsum("ns,nsc->nc", weights, rgb.reshape(-1, SAMPLES, 3)) / jnp.sum(weights, axis=1)[:, None]
