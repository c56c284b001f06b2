"""Solids with a closed form: the signed distance is exact to rounding everywhere, inside and outside.

Distances after Inigo Quilez, https://iquilezles.org/articles/distfunctions. Each primitive lies around the origin
of its own frame, with its axis along z, and is symmetric in that point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxngp.data.solids import inflated


class Primitive(Protocol):
    """A shape in its own frame. Points and normals are (N, 3) f64."""

    @property
    def area(self) -> float: ...

    def support(self, direction: np.ndarray) -> float:
        """The largest dot product of one of its points with `direction` (3,): half its width that way."""

    def distance(self, points: np.ndarray) -> np.ndarray:
        """(N,) signed distance, negative inside."""

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Points uniform by area, and their normals."""


@dataclass(frozen=True)
class Sphere:
    """A ball of some radius."""

    radius: float

    @property
    def area(self) -> float:
        return 4 * math.pi * self.radius**2

    def support(self, direction: np.ndarray) -> float:
        return self.radius * float(np.linalg.norm(direction))

    def distance(self, points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points, axis=1) - self.radius

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        normals = _unit_vectors(rng, count)
        return self.radius * normals, normals


@dataclass(frozen=True)
class Box:
    """A cuboid, by half its sides."""

    half: tuple[float, float, float]

    @property
    def area(self) -> float:
        return 2 * sum(self._areas())

    def support(self, direction: np.ndarray) -> float:
        return float(np.abs(direction) @ np.asarray(self.half))

    def distance(self, points: np.ndarray) -> np.ndarray:
        return _corner_distance(np.abs(points) - self.half)

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        axis = rng.choice(3, count, p=np.asarray(self._areas()) / sum(self._areas()))
        sign = rng.choice([-1.0, 1.0], count)
        half = np.asarray(self.half)
        points, normals = rng.uniform(-half, half, (count, 3)), np.zeros((count, 3))
        rows = np.arange(count)
        points[rows, axis], normals[rows, axis] = sign * half[axis], sign
        return points, normals

    def _areas(self) -> tuple[float, float, float]:
        """Of one face across x, y and z."""
        x, y, z = self.half
        return 4 * y * z, 4 * x * z, 4 * x * y


@dataclass(frozen=True)
class Torus:
    """A tube of radius `minor` around a circle of radius `major` in the plane of x and y; minor < major."""

    major: float
    minor: float

    @property
    def area(self) -> float:
        return 4 * math.pi**2 * self.major * self.minor

    def support(self, direction: np.ndarray) -> float:
        return self.major * math.hypot(*direction[:2]) + self.minor * float(np.linalg.norm(direction))

    def distance(self, points: np.ndarray) -> np.ndarray:
        return np.hypot(np.hypot(*points[:, :2].T) - self.major, points[:, 2]) - self.minor

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The density of the angle around the tube goes with 1 + k cos(angle), k = minor / major.

        A uniform angle is kept with probability (1 + k cos(angle)) / 2, else mirrored to pi - angle: what comes from
        both has just that density, and nothing is drawn twice.
        """
        around, along = rng.uniform(0, 2 * math.pi, (2, count))
        kept = 2 * rng.random(count) < 1 + self.minor / self.major * np.cos(around)
        around = np.where(kept, around, math.pi - around)
        outwards = np.stack([np.cos(along), np.sin(along), np.zeros(count)], axis=1)
        normals = np.cos(around)[:, None] * outwards
        normals[:, 2] = np.sin(around)
        return self.major * outwards + self.minor * normals, normals


@dataclass(frozen=True)
class Capsule:
    """All within `radius` of a segment of the z axis from -half_length to half_length."""

    half_length: float
    radius: float

    @property
    def area(self) -> float:
        return 4 * math.pi * self.radius * (self.half_length + self.radius)

    def support(self, direction: np.ndarray) -> float:
        return self.half_length * abs(float(direction[2])) + self.radius * float(np.linalg.norm(direction))

    def distance(self, points: np.ndarray) -> np.ndarray:
        beyond = np.maximum(np.abs(points[:, 2]) - self.half_length, 0)
        return np.hypot(np.hypot(*points[:, :2].T), beyond) - self.radius

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        on_side = rng.random(count) * (self.half_length + self.radius) < self.half_length
        ball, circle = _unit_vectors(rng, count), _circle(rng, count)
        height = rng.uniform(-self.half_length, self.half_length, count)
        normals = np.where(on_side[:, None], circle, ball)
        points = self.radius * normals
        points[:, 2] += np.where(on_side, height, np.copysign(self.half_length, ball[:, 2]))
        return points, normals


@dataclass(frozen=True)
class Cylinder:
    """Around the z axis from -half_height to half_height, with flat ends."""

    half_height: float
    radius: float

    @property
    def area(self) -> float:
        return 2 * math.pi * self.radius * (2 * self.half_height + self.radius)

    def support(self, direction: np.ndarray) -> float:
        return self.half_height * abs(float(direction[2])) + self.radius * math.hypot(*direction[:2])

    def distance(self, points: np.ndarray) -> np.ndarray:
        beside = np.hypot(*points[:, :2].T) - self.radius
        return _corner_distance(np.stack([beside, np.abs(points[:, 2]) - self.half_height], axis=1))

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        on_side = rng.random(count) * (2 * self.half_height + self.radius) < 2 * self.half_height
        circle, end = _circle(rng, count), rng.choice([-1.0, 1.0], count)
        ring = self.radius * np.where(on_side, 1.0, np.sqrt(rng.random(count)))
        points = ring[:, None] * circle
        points[:, 2] = self.half_height * np.where(on_side, rng.uniform(-1, 1, count), end)
        return points, np.where(on_side[:, None], circle, end[:, None] * (0.0, 0.0, 1.0))


def _corner_distance(excess: np.ndarray) -> np.ndarray:
    """(N,) distance to where all of `excess` (N, K) is negative, the coordinates being orthogonal."""
    return np.minimum(excess.max(axis=1), 0) + np.linalg.norm(np.maximum(excess, 0), axis=1)


def _unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _circle(rng: np.random.Generator, count: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi, count)
    return np.stack([np.cos(angle), np.sin(angle), np.zeros(count)], axis=1)


# In the cube.

CENTRE = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Placed:
    """A primitive at `centre`, turned by `tilt` degrees about the x axis, then by `turn` about the z axis."""

    primitive: Primitive
    centre: tuple[float, float, float] = CENTRE
    tilt: float = 0.0
    turn: float = 0.0

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3), from the primitive's frame to the scene's."""
        (c, s), (d, t) = ((math.cos(a), math.sin(a)) for a in (math.radians(self.tilt), math.radians(self.turn)))
        return np.array([[d, -t, 0], [t, d, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])

    @property
    def half_sides(self) -> np.ndarray:
        """(3,) of its bounding box, whose centre is its own."""
        return np.array([self.primitive.support(axis) for axis in self.rotation])

    def distance(self, points: np.ndarray) -> np.ndarray:
        return self.primitive.distance((points - self.centre) @ self.rotation)

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        points, normals = self.primitive.surface(rng, count)
        return points @ self.rotation.T + self.centre, normals @ self.rotation.T


@dataclass(frozen=True)
class Shape:
    """One or more primitives that do not touch, as a `Solid`.

    The smallest of their distances is then exact everywhere: the surface of all is that of each, and from within one
    the way to another crosses its own surface first. Of overlapping parts it would be wrong inside.
    """

    name: str
    parts: tuple[Placed, ...]
    notes: tuple[str, ...] = field(default=(), init=False)

    @property
    def box(self) -> np.ndarray:
        low = np.min([np.asarray(part.centre) - part.half_sides for part in self.parts], axis=0)
        high = np.max([np.asarray(part.centre) + part.half_sides for part in self.parts], axis=0)
        return inflated(low, high)

    def distance(self, points: np.ndarray) -> np.ndarray:
        return np.min([part.distance(points) for part in self.parts], axis=0)

    def unsigned_distance(self, points: np.ndarray) -> np.ndarray:
        return np.abs(self.distance(points))

    def inside(self, points: np.ndarray) -> np.ndarray:
        return self.distance(points) < 0

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        areas = np.array([part.primitive.area for part in self.parts])
        chosen = rng.choice(len(areas), count, p=areas / areas.sum())
        points, normals = np.empty((count, 3)), np.empty((count, 3))
        for index, part in enumerate(self.parts):
            rows = chosen == index
            points[rows], normals[rows] = part.surface(rng, int(rows.sum()))
        return points, normals

    def to_world(self, points: np.ndarray) -> np.ndarray:
        return points


_STILL_LIFE = (  # a planet with its ring above a box, a cylinder and a capsule; z is up
    Placed(Sphere(0.18), (0.5, 0.5, 0.66)),
    Placed(Torus(0.33, 0.05), (0.5, 0.5, 0.66), tilt=24.0, turn=35.0),
    Placed(Box((0.12, 0.12, 0.12)), (0.27, 0.34, 0.2), turn=30.0),
    Placed(Cylinder(0.13, 0.1), (0.73, 0.34, 0.21)),
    Placed(Capsule(0.13, 0.09), (0.5, 0.76, 0.17), tilt=90.0, turn=75.0),
)
_SHAPES = (
    Shape("sphere", (Placed(Sphere(0.4)),)),
    Shape("box", (Placed(Box((0.4, 0.3, 0.2))),)),
    Shape("torus", (Placed(Torus(0.3, 0.12)),)),
    Shape("capsule", (Placed(Capsule(0.25, 0.17)),)),
    Shape("cylinder", (Placed(Cylinder(0.3, 0.25)),)),
    Shape("shapes", _STILL_LIFE),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _SHAPES}
