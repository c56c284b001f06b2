"""Scenes without a network: a field as a function, and what a ray sees of it in closed form, in float64.

A body has constant density s. Along a ray that is inside it from t0 on for a length L, the light that reaches the
origin is the integral of s exp(-s u) over u in [0, L]; colours are quadratic in u, so that the moments
M_k = integral of u^k s exp(-s u) give everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxngp.cameras import Cameras, PosedImages, image_size, make_cameras, pose_images
from jaxngp.compositing import RenderOutput

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Slab:
    """The part of the unit cube with low <= z < high, of one colour."""

    low: float
    high: float
    density: float
    rgb: Colour

    @property
    def field(self) -> Partial:
        return Partial(self.evaluate)

    def evaluate(self, position: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = position[:, 2]
        rgb = jnp.broadcast_to(jnp.asarray(self.rgb), position.shape)
        return jnp.where((z >= self.low) & (z < self.high), self.density, 0.0), rgb

    def seen(self, origin: np.ndarray, direction: np.ndarray, background: Any) -> RenderOutput:
        """What rays (..., 3) see, as numpy arrays."""
        t0, t1 = slab_interval(origin, direction, np.array([0, 0, self.low]), np.array([1, 1, self.high]))
        _, moments = exponential_moments(self.density, t1 - t0)
        return over(moments[0][..., None] * np.array(self.rgb), t0, moments, background)


@dataclass(frozen=True)
class Ball:
    """A ball inside the unit cube whose colour goes from `inner` to `outer` with the square of the radius."""

    centre: Colour
    radius: float
    density: float
    inner: Colour
    outer: Colour

    @property
    def field(self) -> Partial:
        return Partial(self.evaluate)

    def evaluate(self, position: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        inner, outer = jnp.asarray(self.inner), jnp.asarray(self.outer)
        square = jnp.sum((position - jnp.asarray(self.centre)) ** 2, axis=-1) / self.radius**2
        return jnp.where(square < 1, self.density, 0.0), inner + jnp.minimum(square, 1)[:, None] * (outer - inner)

    def chord(self, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rays are inside, t0 >= 0 and t1; t1 = t0 where they miss."""
        offset = np.asarray(origin, np.float64) - np.array(self.centre)
        along = np.sum(offset * direction, axis=-1)
        square = along**2 - np.sum(offset**2, axis=-1) + self.radius**2
        half = np.sqrt(np.maximum(square, 0))
        t0, t1 = np.maximum(-along - half, 0), np.maximum(-along + half, 0)
        return t0, np.where(square > 0, t1, t0)

    def seen(self, origin: np.ndarray, direction: np.ndarray, background: Any) -> RenderOutput:
        """What rays (..., 3) see, as numpy arrays."""
        direction = np.asarray(direction, np.float64)
        t0, t1 = self.chord(origin, direction)
        _, moments = exponential_moments(self.density, t1 - t0)
        entry = np.asarray(origin, np.float64) + t0[..., None] * direction - np.array(self.centre)
        # The square of the radius at u is |entry|^2 + 2 u (entry . direction) + u^2.
        square = (
            np.sum(entry**2, axis=-1) * moments[0] + 2 * np.sum(entry * direction, axis=-1) * moments[1] + moments[2]
        )
        inner, outer = np.array(self.inner), np.array(self.outer)
        rgb = moments[0][..., None] * inner + (square / self.radius**2)[..., None] * (outer - inner)
        return over(rgb, t0, moments, background)


BALL = Ball(centre=(0.5, 0.45, 0.55), radius=0.3, density=20.0, inner=(0.9, 0.6, 0.1), outer=(0.1, 0.3, 0.8))


def slab_interval(
    origin: np.ndarray, direction: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where rays are inside a box, t0 >= 0 and t1 >= t0, axis by axis in float64."""
    origin, direction = np.broadcast_arrays(np.asarray(origin, np.float64), np.asarray(direction, np.float64))
    t0, t1 = np.zeros(origin.shape[:-1]), np.full(origin.shape[:-1], np.inf)
    for o, d, lo, hi in zip(np.moveaxis(origin, -1, 0), np.moveaxis(direction, -1, 0), low, high, strict=True):
        parallel = d == 0
        safe = np.where(parallel, 1, d)
        a, b = np.sort([(lo - o) / safe, (hi - o) / safe], axis=0)
        inside = (o >= lo) & (o < hi)
        t0 = np.maximum(t0, np.where(parallel, np.where(inside, 0, np.inf), a))
        t1 = np.minimum(t1, np.where(parallel, np.inf, b))
    missed = t1 <= t0
    return np.where(missed, 0, t0), np.where(missed, 0, t1)


def cell_numbers(position: np.ndarray, resolution: int, num_cascades: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The numbers (...) of the occupancy cells that hold points (..., 3), and whether float32 can tell, in float64."""
    offset = np.asarray(position, np.float64) - 0.5
    half_sides = 2.0 ** (np.arange(num_cascades) - num_cascades)
    outside = np.max(np.abs(offset), axis=-1)[..., None] > half_sides
    cascade = np.minimum(outside.sum(axis=-1), num_cascades - 1)
    place = (offset / (2 * half_sides[cascade])[..., None] + 0.5) * resolution
    x, y, z = np.moveaxis(np.clip(np.floor(place), 0, resolution - 1).astype(int), -1, 0)
    certain = np.abs(place - np.round(place)).min(axis=-1) > 1e-3
    return x + resolution * (y + resolution * (z + resolution * cascade)), certain


def exponential_moments(density: float, length: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The transmittance behind a length, and M_0, M_1, M_2."""
    through = np.exp(-density * length)
    first = (1 - through) / density - length * through
    return through, (1 - through, first, 2 * first / density - length**2 * through)


def over(rgb: np.ndarray, t0: np.ndarray, moments: tuple[np.ndarray, ...], background: Any) -> RenderOutput:
    opacity = moments[0]
    depth = np.where(opacity > 0, t0 + moments[1] / np.where(opacity > 0, opacity, 1), 0)
    return RenderOutput(rgb + (1 - opacity)[..., None] * np.asarray(background, np.float64), opacity, depth)  # type: ignore[arg-type]


# Cameras, in numpy.


def make_camera(width: int, height: int, focal: float, c2w: Any = np.eye(3, 4)) -> Cameras:
    """Cameras (...) of poses (..., 3, 4), with square pixels and the principal point in the middle."""
    centre = (width / 2, height / 2)
    return make_cameras(c2w, focal_xy=(focal, focal), centre_xy=centre, width=width, height=height)


def look_at(origin: Any, target: Any = (0.5, 0.5, 0.5)) -> np.ndarray:
    """c2w (3, 4) f32 of a camera at `origin` that looks at `target`, with z up."""
    origin = np.asarray(origin, np.float64)
    backward = (origin - np.asarray(target)) / np.linalg.norm(origin - np.asarray(target))
    right = np.cross([0, 0, 1] if abs(backward[2]) < 0.99 else [0, 1, 0], backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward, origin], axis=1).astype(np.float32)


def poses_around(num: int, distance: float) -> np.ndarray:
    """(num, 3, 4): cameras spread over the sphere around the middle of the cube, all looking at it."""
    z = 1 - (2 * np.arange(num) + 1) / num
    angle = np.pi * (1 + 5**0.5) * np.arange(num)
    ring = np.sqrt(1 - z**2)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=-1)
    return np.stack([look_at(0.5 + distance * point) for point in points])


def pixel_rays(camera: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Origin and unit direction (H, W, 3) of the rays through all pixel centres of a single camera, in float64."""
    c2w, centre, focal = (np.asarray(a, np.float64) for a in (camera.c2w, camera.centre_xy, camera.focal_xy))
    width, height = image_size(camera)
    y, x = np.mgrid[:height, :width] + 0.5
    local = np.stack([(x - centre[0]) / focal[0], -(y - centre[1]) / focal[1], -np.ones_like(x)], axis=-1)
    direction = local @ c2w[:, :3].T
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    return np.broadcast_to(c2w[:, 3], direction.shape), direction


def photograph(ball: Ball, cameras: Cameras) -> PosedImages:
    """What cameras (V,), of any sizes, see of a ball: colour not multiplied by alpha."""
    views = []
    for view in range(len(cameras)):
        out = ball.seen(*pixel_rays(cameras[view]), background=0.0)
        colour = np.asarray(out.rgb) / np.maximum(np.asarray(out.opacity), 1e-9)[..., None]
        rgba = np.concatenate([colour, np.asarray(out.opacity)[..., None]], axis=-1)
        views.append(np.round(rgba.clip(0, 1) * 255).astype(np.uint8))
    return pose_images(cameras, views)


# Surfaces of a closed form.


@dataclass(frozen=True)
class Bodies:
    """The union of balls, a box and what lies below a plane, as a distance that is `scale` times the true one."""

    balls: tuple[tuple[float, float, float, float], ...] = ()  # centre and radius, at most two
    box: tuple[Colour, Colour] | None = None
    plane: tuple[float, float, float, float] | None = None  # unit normal, and how far along it
    scale: float = 1.0

    def params(self) -> dict[str, np.ndarray]:
        """As arrays of the same shapes for all, so that one program does: what is not there is far away."""
        low, high = self.box or ((-91, -91, -91), (-90, -90, -90))
        arrays = {
            "balls": [*self.balls, *[(-90, -90, -90, 1)] * (2 - len(self.balls))],
            "box": [low, high],
            "plane": self.plane or (0, 0, 1, -90),
            "scale": self.scale,
        }
        return {name: np.asarray(array, np.float32) for name, array in arrays.items()}

    @property
    def field(self) -> Partial:
        """What tracing and meshing take: one program does for all bodies."""
        return Partial(_distance, self.params())

    def distance(self, position: np.ndarray) -> np.ndarray:
        """(N, 3) -> (N,), in float64; of the union, and so too small in the overlap of two bodies."""
        exact = {name: array.astype(np.float64) for name, array in self.params().items()}
        return bodies_distance(exact, np.asarray(position, np.float64), np)

    def entry(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """The t (R,) at which rays (R, 3), unit directions, first meet a body, from outside of all; inf if never."""
        origin, direction = (np.asarray(a, np.float64) for a in (origin, direction))
        found = [np.full(len(origin), np.inf)]
        for *centre, radius in self.balls:
            t0, t1 = Ball(tuple(centre), radius, 1.0, (0, 0, 0), (0, 0, 0)).chord(origin, direction)  # type: ignore[arg-type]
            found.append(np.where(t1 > t0, t0, np.inf))
        if self.box:
            t0, t1 = slab_interval(origin, direction, *np.asarray(self.box, np.float64))
            found.append(np.where(t1 > t0, t0, np.inf))
        if self.plane:
            *normal, offset = self.plane
            speed = direction @ normal
            t = (offset - origin @ normal) / np.where(speed == 0, 1, speed)
            found.append(np.where(speed < 0, t, np.inf))
        return np.min(found, axis=0)


def bodies_distance(params: Any, position: Any, xp: Any) -> Any:
    """The distance of `Bodies.params`, (N, 3) -> (N,), by jax.numpy or numpy."""
    balls = xp.sqrt(xp.sum((position[:, None] - params["balls"][:, :3]) ** 2, axis=-1)) - params["balls"][:, 3]
    low, high = params["box"]
    beyond = xp.abs(position - (low + high) / 2) - (high - low) / 2
    outside = xp.sqrt(xp.sum(xp.maximum(beyond, 0) ** 2, axis=-1))
    box = outside + xp.minimum(xp.max(beyond, axis=-1), 0)
    plane = xp.sum(position * params["plane"][:3], axis=-1) - params["plane"][3]
    return params["scale"] * xp.minimum(xp.minimum(xp.min(balls, axis=1), box), plane)


def _distance(params: Any, position: jax.Array) -> jax.Array:
    return bodies_distance(params, position, jnp)
