"""Solids whose signed distance is learned, and the samples that it is learned from.

A solid is either an analytic shape (`shapes`) or a mesh from a file (`meshes`). Everything is in scene units: the
unit cube [0, 1]^3 holds the solid. All arrays are numpy, and float64 unless a function says otherwise.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from tqdm import tqdm

INFLATION = 0.005  # of the largest side, by which a solid's box is wider on each of its sides (instant-ngp's)
OFFSET = 1 / 1024  # standard deviation of a near sample, as a fraction of half the box's diagonal (paper appendix C)
NEAR_OF_FOUR = 3  # of four samples with a distance, so many lie near the surface and one anywhere in the box
CHUNK = 2**18  # points whose distance is asked for at a time: some 40 MB


class Solid(Protocol):
    """A closed body in the unit cube. Points are (N, 3) f64 in scene units, and may lie outside the cube."""

    @property
    def name(self) -> str: ...

    @property
    def box(self) -> np.ndarray:
        """(2, 3) lower and upper corner of its bounding box, wider by `INFLATION` and clipped to the cube."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its user should know of it, in sentences without a full stop."""

    def distance(self, points: np.ndarray) -> np.ndarray:
        """(N,) distance to the surface, negative inside."""

    def unsigned_distance(self, points: np.ndarray) -> np.ndarray:
        """(N,) distance to the surface; cheaper than `distance` for a mesh."""

    def inside(self, points: np.ndarray) -> np.ndarray:
        """(N,) bool, whether a point lies in the solid; much cheaper than `distance` for a mesh."""

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` points, uniform by area and independent, and the unit normals there that point out; (count, 3)."""

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """Points in scene units -> in the coordinates of the file that the solid came from; (N, 3)."""


def inflated(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The box (2, 3) of a solid between the corners `low` and `high` (3,)."""
    margin = INFLATION * (high - low).max()
    return np.stack([low - margin, high + margin]).clip(0.0, 1.0)


def surface_samples(solid: Solid, seed: int, count: int) -> np.ndarray:
    """(count, 3) f32 points on the surface, uniform by area, clipped to the unit cube. Equal for equal seeds."""
    points, _ = solid.surface(np.random.default_rng(seed), count)
    return _in_cube(points)


def distance_samples(solid: Solid, seed: int, count: int, *, offset: float = OFFSET) -> tuple[np.ndarray, np.ndarray]:
    """Points near the surface and in the box, three to one, and their signed distance. (count, 3), (count,) f32.

    A near point is a uniform point of the surface, moved along each axis by logistic noise whose standard deviation
    is `offset` times half the diagonal of the box (paper appendix C.1; instant-ngp's numbers). Where that leaves the
    unit cube it is clipped to it. The order is random, so any part of the samples has the mix. The distance is that
    of the rounded position. Equal for equal seeds, whatever `CHUNK` is.
    """
    rng = np.random.default_rng(seed)
    low, high = solid.box
    num_near = round(count * NEAR_OF_FOUR / 4)
    points, _ = solid.surface(rng, num_near)
    deviation = offset * 0.5 * float(np.linalg.norm(high - low))
    points += rng.logistic(scale=deviation * math.sqrt(3) / math.pi, size=points.shape)
    anywhere = rng.uniform(low, high, (count - num_near, 3))
    position = _in_cube(np.concatenate([points, anywhere]))
    distance = _distances(solid, position)  # before the order is lost: a mesh answers neighbours faster
    order = rng.permutation(count)
    return position[order], distance[order]


def _in_cube(points: np.ndarray) -> np.ndarray:
    return points.clip(0.0, 1.0).astype(np.float32)


def _distances(solid: Solid, position: np.ndarray) -> np.ndarray:
    """(N,) f32 for positions (N, 3) f32; computed in float64."""
    distance = np.empty(len(position), np.float32)
    with tqdm(total=len(position), desc=solid.name, delay=1.0, disable=None, leave=False, unit="point") as bar:
        for start in range(0, len(position), CHUNK):
            part = slice(start, start + CHUNK)
            distance[part] = solid.distance(position[part].astype(np.float64))
            bar.update(len(position[part]))
    return distance
