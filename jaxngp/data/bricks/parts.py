"""The solids that the built-in scene is made of: convex parts in world units, and their paint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

STUD = 0.13  # world units between studs
PLATE = 0.4 * STUD  # height of a plate; a brick is three
FLOOR = -0.57  # world z of the underside of the toy
BRICKS_BOUNDS = ((-1.05, -1.05, -0.58), (1.05, 1.05, 1.29))
"""World box of the object: low corner, high corner."""


Vector = Sequence[float] | np.ndarray
Array = jax.Array | np.ndarray
Vec = Any  # three (N,) arrays, as a list or as the rows of a (3, N) array


@dataclass(frozen=True)
class Paint:
    """Colours are sRGB hex; `pattern` mixes `colour` with `second` over the part, `scale` in cycles per stud."""

    colour: str
    second: str = "#000000"
    pattern: str = "plain"
    scale: float = 1.0
    gloss: float = 0.5  # strength of the clear coat
    glow: float = 0.0  # light given off, as a multiple of the colour


PATTERNS = ("plain", "checker", "planks", "shingles", "bands", "masonry", "panes", "waves", "speckle")

BOX, FRUSTUM, SPHERE = range(3)


@dataclass(frozen=True)
class Part:
    """A convex solid in world units.

    A box has half sizes `size` and loses what lies beyond its cut; a frustum has radii size[0] at its lower and
    size[1] at its upper end and the half length size[2] along its third axis; a sphere has the radius size[0].
    """

    kind: int
    centre: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 3), rows are the unit local axes
    size: np.ndarray  # (3,)
    paint: Paint
    cut: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)  # local n, c: keeps n.x <= c


def _world(position: Vector) -> np.ndarray:
    """Toy units (studs, studs, plates) to world units."""
    return np.array([position[0] * STUD, position[1] * STUD, FLOOR + position[2] * PLATE])


def box(low: Vector, high: Vector, paint: Paint) -> Part:
    """The axis-aligned box between two corners in toy units."""
    a, b = _world(low), _world(high)
    return Part(BOX, (a + b) / 2, np.eye(3), (b - a) / 2, paint)


def rod(start: Vector, end: Vector, radius: float, paint: Paint, end_radius: float | None = None) -> Part:
    """A cylinder, or a cone, between two points in toy units; radii in studs."""
    a, b = _world(start), _world(end)
    axis = (b - a) / np.linalg.norm(b - a)
    side = np.cross(axis, [0.0, 1.0, 0.0] if abs(axis[1]) < 0.9 else [1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    axes = np.stack([side, np.cross(axis, side), axis])
    size = np.array([radius * STUD, (radius if end_radius is None else end_radius) * STUD, np.linalg.norm(b - a) / 2])
    return Part(FRUSTUM, (a + b) / 2, axes, size, paint)


def pillar(x: float, y: float, low: float, high: float, radius: float, paint: Paint, top: float = -1.0) -> Part:
    """An upright cylinder, or a cone whose upper radius is `top`; radii in studs."""
    return rod((x, y, low), (x, y, high), radius, paint, radius if top < 0 else top)


def ball(centre: Vector, radius: float, paint: Paint) -> Part:
    """A sphere; centre in toy units, radius in studs."""
    return Part(SPHERE, _world(centre), np.eye(3), np.full(3, radius * STUD), paint)


def turned(part: Part, axis: int, degrees: float) -> Part:
    """A part turned about its own centre, around a world axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn = np.eye(3)
    turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return replace(part, axes=part.axes @ turn.T)


def sliced(part: Part, normal: Vector, through: Vector) -> Part:
    """A box less what lies beyond the plane through a local point, given in fractions of the half sizes.

    The normal is in the same fractions, so that (1, 0, 1) always cuts from edge to edge.
    """
    n = np.asarray(normal, float) / part.size
    n /= np.linalg.norm(n)
    return replace(part, cut=(*n, float(n @ (np.asarray(through) * part.size))))


def brick(low: Vector, size: Vector, paint: Paint, *, studs: bool = True) -> list[Part]:
    """A brick of size (studs, studs, plates) with its low corner at `low`, and its studs."""
    high = np.add(low, size)
    parts = [box(low, high, paint)]
    if studs:
        xs, ys = (np.arange(round(n)) + at + 0.5 for n, at in zip(size[:2], low[:2], strict=True))
        plain = replace(paint, pattern="plain") if paint.pattern != "speckle" else paint
        parts += [pillar(x, y, high[2], high[2] + 0.5, 0.3, plain) for x in xs for y in ys]
    return parts


def ring(x: float, y: float, z: float, ring_radius: float, radius: float, paint: Paint, count: int) -> list[Part]:
    """A ring of straight rods, in toy units."""
    angle = np.linspace(0, 2 * np.pi, count + 1)
    points = [(x + ring_radius * np.cos(a), y + ring_radius * np.sin(a), z) for a in angle]
    return [rod(a, b, radius, paint) for a, b in zip(points[:-1], points[1:], strict=True)]


def contains(part: Part, position: np.ndarray) -> np.ndarray:
    """Which positions (..., 3) lie inside a part, by more than rounding."""
    local = (position - part.centre) @ part.axes.T
    if part.kind == SPHERE:
        return np.linalg.norm(local, axis=-1) < part.size[0] - 1e-5
    if part.kind == BOX:
        inside = (np.abs(local) < part.size - 1e-5).all(axis=-1)
        return inside & (local @ np.array(part.cut[:3]) < part.cut[3] - 1e-5)
    low, high, half = part.size
    radius = (low + high) / 2 + (high - low) / (2 * half) * local[..., 2]
    return (np.abs(local[..., 2]) < half - 1e-5) & (np.linalg.norm(local[..., :2], axis=-1) < radius - 1e-5)


def corners(part: Part) -> np.ndarray:
    """(8, 3) corners of the oriented box around a part."""
    half = part.size
    if part.kind == FRUSTUM:
        half = np.array([max(part.size[:2]), max(part.size[:2]), part.size[2]])
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return part.centre + (signs * half) @ part.axes
