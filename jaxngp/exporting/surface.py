"""The surface of a radiance field as triangles, and what of it the training views see.

A field knows where light is absorbed, not where a surface is. The surface is put where one march step absorbs a stated
share of the light that enters it. What lies behind no view sees, so nothing was learned there: hollows in it are filled
before triangles are made, or objects would have second skins inside.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxngp.cameras import Cameras, project
from jaxngp.config import InputError, MarchConfig
from jaxngp.console import bar_interval
from jaxngp.occupancy import OccupancyGrid, is_occupied
from jaxngp.rendering import Sampler

CALL = 2**15  # points
MAX_VIEWS = 100  # that are asked what they see; of more, evenly spaced ones
BEHIND = 2.5  # lattice spacings by which a point may lie behind what a view meets first, and count as seen
RINGS = 3  # faces around those that are seen that count as seen too
MAX_SIDE = 1536  # px, of the depth buffers


class Field(Protocol):
    """What is exported: a pytree, such as `fields.RadianceField`."""

    def __call__(self, position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]: ...
    def density(self, position: jax.Array) -> jax.Array: ...


@dataclass(frozen=True)
class Lattice:
    """values (X, Y, Z) f32 at the points first + spacing (i, j, k), scene units."""

    first: np.ndarray  # (3,) f64
    spacing: float
    values: np.ndarray

    def points(self, place: np.ndarray) -> np.ndarray:
        """The points (N, 3) f64 at lattice coordinates (N, 3)."""
        return self.first + self.spacing * place


@dataclass(frozen=True)
class Surface:
    """Triangles in scene units, counter-clockwise when seen from outside."""

    vertices: np.ndarray  # (V, 3) f64
    faces: np.ndarray  # (F, 3) i64
    spacing: float  # of the lattice that they were found on

    def keep(self, faces: np.ndarray) -> Surface:
        """Some of the faces, by a mask (F,), with the vertices that they need."""
        left, number = np.unique(self.faces[faces], return_inverse=True)
        return Surface(self.vertices[left], number.reshape(-1, 3), self.spacing)

    @functools.cached_property
    def areas(self) -> np.ndarray:
        """(F, 3) normals of the faces, outward, as long as twice their area."""
        a, b, c = self.vertices[self.faces.T]
        return np.cross(b - a, c - a)

    @functools.cached_property
    def normals(self) -> np.ndarray:
        """(V, 3) unit, outward: the mean of the faces', by area."""
        corners = self.faces.ravel()
        total = [np.bincount(corners, np.repeat(axis, 3), len(self.vertices)) for axis in self.areas.T]
        normals = np.stack(total, axis=1)
        return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)


def step_size(sampler: Sampler) -> float:
    """The length of a step along a ray, in the innermost cascade, in scene units."""
    if isinstance(sampler, MarchConfig):
        return sampler.step_size_at(0)
    return (sampler.far - sampler.near) / sampler.num_bins


def opaque_density(sampler: Sampler, opacity: float) -> float:
    """The density per scene unit of which a step absorbs this share of the light."""
    return -math.log1p(-opacity) / step_size(sampler)


def extract(
    field: Field,
    grid: OccupancyGrid | None,
    views: Cameras | None,
    *,
    box: np.ndarray,
    resolution: int,
    level: float,
    smallest: float = 0.0,
    hidden: bool = False,
) -> Surface:
    """The surface at which the density is `level` per scene unit, within a box (2, 3). Raises InputError without any.

    resolution: lattice points along the longest side of the occupied part of the box. views (V,): by what they see,
    hollows are filled and, unless `hidden`, faces that none of them sees left out; with those the surface is closed.
    smallest: connected parts are left out that have a smaller share of the area.
    """
    lattice = sample_density(field, grid, box, resolution)
    solid = lattice.values >= level
    if not solid.any():
        raise InputError(f"no density reaches {level:.3g} per scene unit: there is no surface; lower --opacity")
    # A learned density is nearly exponential where it rises, so that between two points its logarithm is a line.
    logs = np.log(np.maximum(lattice.values, np.float32(1e-3 * level)))
    if views is not None:
        logs[_hollow(lattice, solid, views)] = math.log(level) + 1
    surface = _march_cubes(logs, math.log(level), lattice)
    if views is not None and not hidden:
        surface = surface.keep(_seen(surface, views))
    return surface.keep(_large(surface, smallest)) if smallest else surface


def _march_cubes(values: np.ndarray, level: float, lattice: Lattice) -> Surface:
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise InputError("scikit-image, which extracts meshes, is not installed: pip install .[mesh]") from None
    vertices, faces, _, _ = marching_cubes(values, level, gradient_direction="ascent", allow_degenerate=False)
    return Surface(lattice.points(vertices.astype(np.float64)), faces.astype(np.int64), lattice.spacing)


def _seen(surface: Surface, views: Cameras) -> np.ndarray:
    """Which faces (F,) a view sees, or lie within RINGS faces of one: pinholes remain closed."""
    seen = np.asarray(visibility(views, surface.vertices, surface.vertices, surface.spacing).any(axis=0))
    for _ in range(RINGS):
        seen[surface.faces[seen[surface.faces].any(axis=1)]] = True
    return seen[surface.faces].any(axis=1)


def _large(surface: Surface, smallest: float) -> np.ndarray:
    """Which faces (F,) belong to a connected part with at least this share of the area."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, (a, b, c) = len(surface.vertices), surface.faces.T
    edges = coo_array((np.ones(2 * len(a), bool), (np.concatenate([a, b]), np.concatenate([b, c]))), (count, count))
    _, part = connected_components(edges, directed=False)
    area = np.bincount(part[a], np.linalg.norm(surface.areas, axis=1))
    return (area >= smallest * area.sum())[part[a]]


# The density on a lattice.


def sample_density(field: Field, grid: OccupancyGrid | None, box: np.ndarray, resolution: int) -> Lattice:
    """The density on a lattice over the occupied part of a box (2, 3): 0 where the grid is empty, and on its rim."""
    if grid is not None:
        box = np.clip(np.asarray(grid.bounds, np.float64), *box)
    spacing = max(float((box[1] - box[0]).max()), 1e-6) / (resolution - 1)
    shape = np.ceil((box[1] - box[0]) / spacing - 1e-9).astype(int) + 3
    lattice = Lattice(box.mean(axis=0) - 0.5 * spacing * (shape - 1), spacing, np.zeros(shape, np.float32))
    layer = np.indices(shape[1:]).reshape(2, -1).T
    layer = layer[((layer > 0) & (layer < shape[1:] - 1)).all(axis=1)]
    places = []
    for x in range(1, shape[0] - 1):
        place = np.insert(layer, 0, x, axis=1).astype(np.int32)
        if grid is not None:
            place = place[occupied(grid, lattice.points(place))]
        places.append(place)
    place = np.concatenate(places)
    lattice.values[tuple(place.T)] = in_calls(density_at, field, lattice.points(place), said="sampling")
    return lattice


_is_occupied = jax.jit(is_occupied)


def occupied(grid: OccupancyGrid, points: np.ndarray) -> np.ndarray:
    """(N,) bool: whether the cells that hold points (N, 3) are occupied."""
    return np.asarray(_is_occupied(grid, points.astype(np.float32)))


@jax.jit
def density_at(field: Field, points: jax.Array) -> jax.Array:
    """(N,) per scene unit, at points (N, 3)."""
    return field.density(points)


def in_calls(function: Any, field: Field, *arrays: np.ndarray, said: str) -> Any:
    """function(field, *arrays) for arrays (N, ...), as numpy f32 in calls of one size, with a progress bar."""
    count, found = len(arrays[0]), []
    for first in tqdm(
        range(0, max(count, 1), CALL), desc=said, unit="call", mininterval=bar_interval(), delay=1.0, leave=False
    ):
        part = [np.asarray(array[first : first + CALL], np.float32) for array in arrays]
        size = len(part[0])
        padded = [np.concatenate([a, np.zeros((CALL - size, *a.shape[1:]), np.float32)]) for a in part]
        found.append(jax.tree.map(lambda a, size=size: np.asarray(a)[:size], function(field, *padded)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


# What the views see.


def some_views(cameras: Cameras | None, most: int = MAX_VIEWS) -> Cameras | None:
    """At most so many of the cameras (V,), evenly spaced."""
    if cameras is None or len(cameras) <= most:
        return cameras
    return cameras[np.arange(most) * len(cameras) // most]


def _hollow(lattice: Lattice, solid: np.ndarray, views: Cameras) -> np.ndarray:
    """Which points (X, Y, Z) are not solid, and neither seen nor connected with the rim by what is seen."""
    from scipy.ndimage import label

    inner = solid.copy()
    for axis, step in itertools.product(range(3), (1, -1)):
        inner &= np.roll(solid, step, axis)
    shell, open_ = np.argwhere(solid & ~inner), np.argwhere((lattice.values > 0) & ~solid)
    seen = np.zeros(solid.shape, bool)
    seen[tuple(open_.T)] = visibility(views, lattice.points(shell), lattice.points(open_), lattice.spacing).any(axis=0)
    filled = ~solid & (lattice.values > 0) & ~seen
    parts, _ = label(~(solid | filled))
    return filled | ((parts != parts[0, 0, 0]) & ~solid & ~seen)


def visibility(views: Cameras, surface: np.ndarray, points: np.ndarray, spacing: float) -> np.ndarray:
    """(V, N) bool: whether each view sees points (N, 3) past the points (M, 3) of a surface, `spacing` apart or less.

    By depth buffers whose pixels are as wide as the spacing where the surface is near.
    """
    zoom, side = _buffer_size(views, surface, spacing)
    near, far = jnp.asarray(surface, jnp.float32), jnp.asarray(points, jnp.float32)
    found = np.zeros((len(views), len(points)), bool)
    for view in tqdm(
        range(len(views)), desc="looking", unit="view", mininterval=bar_interval(), delay=1.0, leave=False
    ):
        camera = jax.tree.map(jnp.asarray, views[view])
        found[view] = _sees(camera, near, far, jnp.float32(zoom[view]), jnp.float32(BEHIND * spacing), side=side)
    return found


def _buffer_size(views: Cameras, surface: np.ndarray, spacing: float) -> tuple[np.ndarray, int]:
    """By how much (V,) each view's image is scaled for its depth buffer, and the side that holds all of them."""
    some = jnp.asarray(surface[:: max(len(surface) // 1000, 1)], jnp.float32)
    _, depth = project(jax.tree.map(lambda a: np.asarray(a)[:, None], views), some)
    near = np.nanquantile(np.where(depth > 0, depth, np.nan), 0.1, axis=1) if len(some) else np.ones(len(views))
    near = np.nan_to_num(np.asarray(near), nan=1.0)
    zoom = near / (spacing * np.asarray(views.focal_xy).max(axis=1))
    longest = np.asarray(views.size).max(axis=1)
    zoom = np.minimum(zoom, MAX_SIDE / longest)
    return zoom, int(np.ceil((zoom * longest).max()))


@functools.partial(jax.jit, static_argnames="side")
def _sees(
    camera: Cameras, surface: jax.Array, points: jax.Array, zoom: jax.Array, behind: jax.Array, *, side: int
) -> jax.Array:
    size = camera.size * zoom

    def inside(depth: jax.Array, pixel: jax.Array) -> jax.Array:
        return (depth > 0) & jnp.all((pixel >= 0) & (pixel < size), axis=-1)

    xy, depth = project(camera, surface)
    buffer = jnp.full(side * side, jnp.inf)
    for step in np.ndindex(2, 2):  # what lies between four pixel centres covers all four: no holes
        pixel = jnp.floor(xy * zoom - 0.5).astype(jnp.int32) + np.array(step, np.int32)
        number = jnp.where(inside(depth, pixel), pixel[:, 0] + side * pixel[:, 1], side * side)
        buffer = buffer.at[number].min(depth, mode="drop")
    xy, depth = project(camera, points)
    pixel = jnp.floor(xy * zoom).astype(jnp.int32)
    shown = inside(depth, pixel)
    return shown & (depth <= buffer[jnp.where(shown, pixel[:, 0] + side * pixel[:, 1], 0)] + behind)
