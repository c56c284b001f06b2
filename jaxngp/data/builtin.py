"""The built-in scene `bricks`: a toy harbour of studded bricks, made by our own analytic ray caster.

    _build_parts --> parts (boxes, frusta, spheres) --> _Toy (arrays + baked sky light) --> cast_rays --> Surface
                                                                                              |
                                                            bricks_cameras --> write_scene: PNGs, transforms_*.json

Every part is convex and its nearest hit is closed form, so colour, alpha, depth and normal are exact. Shading is
linear light (one sun with hard shadows, a sky, gloss) and leaves as sRGB. A picture averages sRGB *multiplied by
alpha* over its subsamples, which is what a volume renderer that composites in sRGB can reproduce exactly.

Frames: parts are built in *toy units* (x, y in studs, z in plates of 0.4 stud) and cast in world units, z up. Inside
the caster a vector of N rays is (3, N): XLA:CPU vectorises over the last axis.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from PIL import Image
from tqdm import tqdm

from jaxngp.cameras import Camera, Rays, pixel_to_ray, point_to_pixel

STUD = 0.13  # world units between studs
PLATE = 0.4 * STUD  # height of a plate; a brick is three
FLOOR = -0.57  # world z of the underside of the toy
BRICKS_BOUNDS = ((-1.05, -1.05, -0.58), (1.05, 1.05, 1.29))
"""World box of the object: low corner, high corner."""

CAMERA_ANGLE_X = 0.6911112070083618  # radians, horizontal field of view of NeRF-synthetic
CAMERA_RADIUS = 4.031128874149275  # world units, as in NeRF-synthetic
NUM_VIEWS = {"train": 100, "val": 20, "test": 40}
TILE = 10  # pixels per side of the packets of rays that share their candidates; an odd number of rays is 4x slower
SUBSAMPLES = 3  # per pixel and axis

Vector = Sequence[float] | np.ndarray
Array = jax.Array | np.ndarray
Vec = Any  # three (N,) arrays, as a list or as the rows of a (3, N) array


@struct.dataclass
class Surface:
    """What a ray meets first; zeros where it meets nothing."""

    rgb: jax.Array  # (..., 3) sRGB in [0, 1], not multiplied by alpha
    alpha: jax.Array  # (...), 1 at a hit and 0 at a miss
    depth: jax.Array  # (...), world units along the ray's unit direction; inf at a miss
    normal: jax.Array  # (..., 3) unit, outward, geometric


# Paint and parts.


@dataclass(frozen=True)
class _Paint:
    """Colours are sRGB hex; `pattern` mixes `colour` with `second` over the part, `scale` in cycles per stud."""

    colour: str
    second: str = "#000000"
    pattern: str = "plain"
    scale: float = 1.0
    gloss: float = 0.5  # strength of the clear coat
    glow: float = 0.0  # light given off, as a multiple of the colour


_PATTERNS = ("plain", "checker", "planks", "shingles", "bands", "masonry", "panes", "waves", "speckle")

_BOX, _FRUSTUM, _SPHERE = range(3)


@dataclass(frozen=True)
class _Part:
    """A convex solid in world units.

    A box has half sizes `size` and loses what lies beyond its cut; a frustum has radii size[0] at its lower and
    size[1] at its upper end and the half length size[2] along its third axis; a sphere has the radius size[0].
    """

    kind: int
    centre: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 3), rows are the unit local axes
    size: np.ndarray  # (3,)
    paint: _Paint
    cut: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)  # local n, c: keeps n.x <= c


def _world(position: Vector) -> np.ndarray:
    """Toy units (studs, studs, plates) to world units."""
    return np.array([position[0] * STUD, position[1] * STUD, FLOOR + position[2] * PLATE])


def _box(low: Vector, high: Vector, paint: _Paint) -> _Part:
    """The axis-aligned box between two corners in toy units."""
    a, b = _world(low), _world(high)
    return _Part(_BOX, (a + b) / 2, np.eye(3), (b - a) / 2, paint)


def _rod(start: Vector, end: Vector, radius: float, paint: _Paint, end_radius: float | None = None) -> _Part:
    """A cylinder, or a cone, between two points in toy units; radii in studs."""
    a, b = _world(start), _world(end)
    axis = (b - a) / np.linalg.norm(b - a)
    side = np.cross(axis, [0.0, 1.0, 0.0] if abs(axis[1]) < 0.9 else [1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    axes = np.stack([side, np.cross(axis, side), axis])
    size = np.array([radius * STUD, (radius if end_radius is None else end_radius) * STUD, np.linalg.norm(b - a) / 2])
    return _Part(_FRUSTUM, (a + b) / 2, axes, size, paint)


def _pillar(x: float, y: float, low: float, high: float, radius: float, paint: _Paint, top: float = -1.0) -> _Part:
    """An upright cylinder, or a cone whose upper radius is `top`; radii in studs."""
    return _rod((x, y, low), (x, y, high), radius, paint, radius if top < 0 else top)


def _ball(centre: Vector, radius: float, paint: _Paint) -> _Part:
    return _Part(_SPHERE, _world(centre), np.eye(3), np.full(3, radius * STUD), paint)


def _turned(part: _Part, axis: int, degrees: float) -> _Part:
    """A part turned about its own centre, around a world axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn = np.eye(3)
    turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return replace(part, axes=part.axes @ turn.T)


def _sliced(part: _Part, normal: Vector, through: Vector) -> _Part:
    """A box less what lies beyond the plane through a local point, given in fractions of the half sizes.

    The normal is in the same fractions, so that (1, 0, 1) always cuts from edge to edge.
    """
    n = np.asarray(normal, float) / part.size
    n /= np.linalg.norm(n)
    return replace(part, cut=(*n, float(n @ (np.asarray(through) * part.size))))


def _brick(low: Vector, size: Vector, paint: _Paint, *, studs: bool = True) -> list[_Part]:
    """A brick of size (studs, studs, plates) with its low corner at `low`, and its studs."""
    high = np.add(low, size)
    parts = [_box(low, high, paint)]
    if studs:
        xs, ys = (np.arange(round(n)) + at + 0.5 for n, at in zip(size[:2], low[:2], strict=True))
        plain = replace(paint, pattern="plain") if paint.pattern != "speckle" else paint
        parts += [_pillar(x, y, high[2], high[2] + 0.5, 0.3, plain) for x in xs for y in ys]
    return parts


def _ring(x: float, y: float, z: float, ring_radius: float, radius: float, paint: _Paint, count: int) -> list[_Part]:
    """A ring of straight rods, in toy units."""
    angle = np.linspace(0, 2 * np.pi, count + 1)
    points = [(x + ring_radius * np.cos(a), y + ring_radius * np.sin(a), z) for a in angle]
    return [_rod(a, b, radius, paint) for a, b in zip(points[:-1], points[1:], strict=True)]


# The toy.

_RED, _WHITE, _CREAM = _Paint("#c8281e"), _Paint("#f1eee6"), _Paint("#f0dcae")
_YELLOW, _ORANGE, _DARK = _Paint("#f5b417"), _Paint("#e8731a"), _Paint("#30353c", gloss=0.7)
_GREY, _STEEL = _Paint("#8d949b"), _Paint("#b9c0c8", gloss=1.0)
_ROCKS = tuple(_Paint(c, "#565a5f", "speckle", 5.0, 0.15) for c in ("#8a8c8d", "#7b7e81", "#9a9a96"))
_SANDS = tuple(_Paint(c, "#c39d62", "speckle", 6.0, 0.2) for c in ("#e6c98d", "#dfbf80", "#ecd29b"))
_GRASSES = tuple(_Paint(c) for c in ("#4f9a3c", "#5aa845", "#468e3a", "#6bb54c"))
_SEAS = tuple(_Paint(c, "#4fb3d9", "waves", 1.0, 1.0) for c in ("#1668a8", "#1a74b4", "#125c9a", "#1f80bd"))
_FOAM = tuple(_Paint(c, "#f4fbff", "waves", 1.6, 0.9) for c in ("#5fbfd6", "#74cbdc", "#4fb2cf"))
_WOOD = _Paint("#a8703a", "#5d3717", "planks", 2.0, 0.25)
_GLASS = _Paint("#27506e", "#f6f3ea", "panes", 1.0, 1.0)
_LEAVES = (_Paint("#1f6b3a"), _Paint("#2a7d42"), _Paint("#37904a"))


def _disc(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    """The 16 x 16 cells, indexed [x + 8, y + 8], whose centres lie in an ellipse."""
    cell = np.arange(16) - 7.5
    return ((cell[:, None] - x) / radius_x) ** 2 + ((cell[None, :] - y) / radius_y) ** 2 < 1


def _mosaic(
    cells: np.ndarray, z: float, height: float, paints: Sequence[_Paint], rng: np.random.Generator
) -> list[_Part]:
    """The cells of a 16 x 16 mask covered by bricks of mixed sizes and paints, largest that fits first."""
    parts, free = [], cells.copy()
    for x, y in np.argwhere(cells):
        sizes = [(2, 4), (4, 2), (2, 3), (3, 2), (2, 2), (2, 1), (1, 2), (1, 1)]
        first = int(rng.integers(5))
        for nx, ny in sizes[first:5] + sizes[:first] + sizes[5:]:
            if x + nx <= 16 and y + ny <= 16 and free[x : x + nx, y : y + ny].all():
                free[x : x + nx, y : y + ny] = False
                paint = paints[int(rng.integers(len(paints)))]
                parts += _brick((x - 8, y - 8, z), (nx, ny, height), paint)
                break
    return parts


def _island(rng: np.random.Generator) -> list[_Part]:
    """Sea, foam, sand, grass and the rocks under the lighthouse."""
    sea = np.zeros((16, 16), bool)
    sea[0:16, 4:12] = sea[2:14, 2:14] = sea[4:12, 0:16] = True
    sand = (_disc(-0.4, 2.2, 6.6, 4.9) | _disc(3.2, -1.2, 3.2, 3.4)) & sea
    foam = sea & (_disc(-0.4, 2.0, 7.6, 6.0) | _disc(3.2, -1.4, 4.3, 4.4)) & ~sand
    grass = (_disc(-0.2, 2.6, 5.6, 3.9) | _disc(3.4, 0.6, 2.2, 3.2)) & sand
    parts = [
        _box((-8, -4, 0), (8, 4, 1), _DARK),
        *(_box((-6, y, 0), (6, y + 2, 1), _DARK) for y in (-6, 4)),
        *(_box((-4, y, 0), (4, y + 2, 1), _DARK) for y in (-8, 6)),
    ]
    parts += _mosaic(sea & ~foam & ~sand, 1, 1, _SEAS, rng)
    parts += _mosaic(foam, 1, 1, _FOAM, rng)
    parts += _mosaic(sand, 1, 2, _SANDS, rng)
    parts += _mosaic(grass, 3, 1, _GRASSES, rng)
    parts += _mosaic(_disc(-2.0, 2.5, 3.3, 3.0), 4, 2, _ROCKS, rng)
    parts += _mosaic(_disc(-2.0, 2.5, 2.9, 2.6), 6, 1, _ROCKS, rng)
    for x, y, z in ((-7, -1, 2), (-6, -2, 2), (-6, -1, 2), (-7, 0, 2), (6, 2, 2), (6, 3, 2), (-1, 7, 2), (5, 4, 3)):
        parts += _brick((x, y, z), (1, 1, float(rng.integers(1, 4))), _ROCKS[x % 3])
    return parts


def _window(centre: Vector, turn: float, half_width: float, half_height: float, paint: _Paint) -> list[_Part]:
    """A painted frame and its panes on a wall that faces `turn` degrees from +x; studs wide, plates high."""
    pane = replace(_GLASS, scale=1.35 / half_width)
    parts = []
    for depth, margin, coat in ((0.14, 0.0, paint), (0.18, 0.1, pane)):
        half = np.array([depth, half_width - margin, half_height - margin / 0.4])
        parts.append(_turned(_box(centre - half, centre + half, coat), 2, turn))
    return parts


def _lighthouse(x: float, y: float, base: float) -> list[_Part]:
    """A round tower of red and white courses with gallery, lantern and cap; about 28 plates high."""
    parts = []
    radius = np.linspace(1.95, 1.2, 7)
    for course in range(6):
        low = base + 3 * course
        colour = ("#c8281e", "#f1eee6")[course % 2]
        paint = _Paint(colour, ("#7c130d", "#b5aea0")[course % 2], "masonry", 1.0, 0.6)
        parts.append(_pillar(x, y, low, low + 2.92, radius[course], paint, radius[course + 1]))
        parts.append(_pillar(x, y, low + 2.92, low + 3, radius[course + 1] - 0.05, _DARK))
    deck = base + 18
    parts += [_pillar(x, y, deck, deck + 0.6, 1.3, _DARK, 1.8), _pillar(x, y, deck + 0.6, deck + 1.2, 1.8, _DARK)]
    angles = np.arange(12) * np.pi / 6
    for a in angles:
        c, s = np.cos(a), np.sin(a)
        parts.append(_pillar(x + 1.68 * c, y + 1.68 * s, deck + 1.2, deck + 3.6, 0.05, _STEEL))
    for z in (2.0, 2.8, 3.6):
        parts += _ring(x, y, deck + z, 1.68, 0.04, _STEEL, 12)
    lamp = deck + 1.2
    parts.append(_pillar(x, y, lamp, lamp + 0.9, 1.0, _RED))
    parts.append(_pillar(x, y, lamp + 0.9, lamp + 3.9, 0.72, _Paint("#ffd25a", "#fff3b0", "bands", 4.0, 1.0, 0.75)))
    for a in angles[::2] + 0.2:
        c, s = 0.86 * np.cos(a), 0.86 * np.sin(a)
        parts.append(_pillar(x + c, y + s, lamp + 0.9, lamp + 3.9, 0.06, _DARK))
    parts += [
        _pillar(x, y, lamp + 3.9, lamp + 4.4, 1.15, _WHITE),
        _pillar(x, y, lamp + 4.4, lamp + 6.6, 1.1, _RED, 0.2),
    ]
    parts += [_ball((x, y, lamp + 6.9), 0.24, _YELLOW), _pillar(x, y, lamp + 7.2, lamp + 9.2, 0.05, _STEEL, 0.03)]
    for turn, z in ((-90, 4.2), (-60, 9.0), (-120, 13.6), (100, 9.0), (30, 12.0), (170, 5.0)):
        a = np.radians(turn)
        r = np.interp(z + 0.9, [0, 18], [1.95, 1.2])
        at = (x + r * np.cos(a), y + r * np.sin(a), base + z + 0.9)
        parts += _window(at, turn, 0.36, 1.05, _WHITE)
    return parts


def _cottage(x: float, y: float, base: float) -> list[_Part]:
    """A keeper's cottage of 5 x 4 studs with a shingled roof; (x, y) is its low corner."""
    parts = []
    for course in range(3):
        z, shift = base + 2 * course, course % 2
        for low, size in (((0, 0), 2 + shift), ((2 + shift, 0), 3 - shift)):
            parts += _brick((x + low[0], y, z), (size, 4, 2), _WHITE if course else _GREY, studs=False)
    eaves = base + 6
    for side in (0, 1):  # the gable, in two mirrored wedges
        wedge = _box((x, y + 2 * side, eaves), (x + 5, y + 2 + 2 * side, eaves + 4.5), _WHITE)
        parts.append(_sliced(wedge, (0, 1 if side else -1, 1), (0, 0, 0)))
    slope = np.degrees(np.arctan2(4.5 * 0.4, 2))
    roof = _Paint("#bf4f27", "#74250f", "shingles", 2.2, 0.35)
    for side in (-1, 1):
        centre = np.array([x + 2.5, y + 2 + 1.12 * side, eaves + 2.3])
        slab = _box(centre - (2.85, 1.62, 0.28), centre + (2.85, 1.62, 0.28), roof)
        parts.append(_turned(slab, 0, -side * slope))
    parts.append(_rod((x - 0.36, y + 2, eaves + 4.95), (x + 5.36, y + 2, eaves + 4.95), 0.2, _Paint("#8d3216")))
    parts += _brick(
        (x + 3.6, y + 2.6, eaves), (1, 1, 6), _Paint("#a5442c", "#d9c6b0", "checker", 3.0, 0.2), studs=False
    )
    parts.append(_pillar(x + 4.1, y + 3.1, eaves + 6, eaves + 7, 0.3, _DARK, 0.24))
    blue = _Paint("#2f6f9f")
    for at in (0.95, 4.0):
        parts += _window((x + at, y, base + 3.4), -90, 0.62, 1.5, blue)
    parts.append(_box((x + 2.0, y - 0.12, base), (x + 3.1, y, base + 4.6), _Paint("#2f6f9f", "#1c4666", "planks", 3.0)))
    parts.append(_ball((x + 2.9, y - 0.16, base + 2.2), 0.09, _YELLOW))
    for at, turn in ((0.0, 180), (5.0, 0)):
        parts += _window((x + at, y + 2, base + 3.4), turn, 0.62, 1.5, blue)
        parts.append(_rod((x + at - 0.1, y + 2, eaves + 1.9), (x + at + 0.1, y + 2, eaves + 1.9), 0.42, blue))
    return parts


def _lattice(start: Vector, end: Vector, width: float, bays: int, paint: _Paint) -> list[_Part]:
    """A square truss of four chords with zigzag braces on each face; toy units, width in studs."""
    a, b = np.asarray(start, float), np.asarray(end, float)
    upright = abs(b[2] - a[2]) > 1e-6
    across = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * width / 2
    step = (lambda u, v: (u, v, 0.0)) if upright else (lambda u, v: (0.0, u, v / 0.4))
    parts = []
    for (u0, v0), (u1, v1) in zip(across, np.roll(across, -1, axis=0), strict=True):
        here, there = step(u0, v0), step(u1, v1)
        parts.append(_rod(a + here, b + here, 0.065, paint))
        for bay in range(bays):
            p, q = (a + (b - a) * f / bays for f in (bay, bay + 1))
            ends = (p + here, q + there) if bay % 2 else (p + there, q + here)
            parts.append(_rod(*ends, 0.04, paint))
    return parts


def _crane(x: float, y: float, base: float) -> list[_Part]:
    """A harbour crane with lattice mast and jib, its load a striped crate."""
    parts = _brick((x - 1.5, y - 1.5, base), (3, 3, 2), _GREY)
    parts += _brick((x - 1, y - 1, base + 2), (2, 2, 1), _DARK, studs=False)
    top = base + 17
    parts += _lattice((x, y, base + 3), (x, y, top), 0.9, 6, _YELLOW)
    parts.append(_pillar(x, y, top, top + 0.8, 0.75, _DARK))
    parts.append(_box((x - 0.7, y - 0.6, top + 0.8), (x + 0.7, y + 0.6, top + 3.6), _YELLOW))
    parts.append(_box((x - 0.76, y - 0.45, top + 1.6), (x - 0.5, y + 0.45, top + 3.2), replace(_GLASS, scale=1.6)))
    parts.append(_pillar(x, y, top + 3.6, top + 6.4, 0.16, _YELLOW, 0.1))
    tip, tail = (x - 5.6, y, top + 2.0), (x + 1.6, y, top + 1.6)
    parts += _lattice((x - 0.7, y, top + 2.0), tip, 0.6, 7, _YELLOW)
    parts += [_box(np.subtract(tail, (1.0, 0.4, 0.5)), np.add(tail, (0.4, 0.4, 1.4)), _DARK)]
    peak = (x, y, top + 6.3)
    parts += [_rod(peak, np.add(tip, (0.6, 0, 0.8)), 0.03, _STEEL), _rod(peak, np.add(tail, (0, 0, 1.2)), 0.03, _STEEL)]
    load = np.array([x - 5.0, y, base + 7.5])
    parts.append(_rod(np.add(tip, (0.6, 0, -0.8)), load + (0, 0, 3.0), 0.03, _DARK))
    parts.append(_ball(load + (0, 0, 3.0), 0.16, _RED))
    for dx, dy in ((-0.6, -0.6), (0.6, -0.6), (-0.6, 0.6), (0.6, 0.6)):
        parts.append(_rod(load + (0, 0, 3.0), load + (dx, dy, 0.2), 0.025, _DARK))
    crate = _Paint("#b9803f", "#6e451c", "planks", 3.0, 0.2)
    parts.append(_box(load - (0.7, 0.7, 3.0), load + (0.7, 0.7, 0.3), crate))
    for z in (-2.7, 0.0):
        parts.append(_box(load + (-0.75, -0.75, z - 0.18), load + (0.75, 0.75, z + 0.18), _ORANGE))
    return parts


def _boat(x: float, y: float, base: float) -> list[_Part]:
    """A sailing boat that heads for -x, its sail printed with bands."""
    hull, trim = _Paint("#16324f", gloss=0.9), _WHITE
    parts = [_box((x - 1.2, y - 0.9, base), (x + 1.8, y + 0.9, base + 2), hull)]
    for side in (-1, 1):
        low, high = sorted((0.0, 0.9 * side))
        bow = _box((x - 2.6, y + low, base), (x - 1.2, y + high, base + 2), hull)
        parts.append(_sliced(bow, (-1, side, 0), (0, 0, 0)))
        rail = _box((x - 2.7, y + low * 1.06, base + 2), (x - 1.2, y + high * 1.06, base + 2.4), trim)
        parts.append(_sliced(rail, (-1, side, 0), (0, 0, 0)))
    parts += _brick((x - 1.2, y - 1, base + 2), (3, 2, 0.4), _WOOD, studs=False)
    parts += _brick((x + 0.2, y - 0.5, base + 2.4), (1, 1, 1.6), _RED)
    mast, top = x - 0.5, base + 14
    parts += [_pillar(mast, y, base + 2, top, 0.08, _WOOD, 0.05), _ball((mast, y, top), 0.1, _YELLOW)]
    parts.append(_rod((mast, y, base + 4.9), (mast + 2.5, y, base + 4.9), 0.05, _WOOD))
    cloth = _Paint("#fbf7ec", "#e8731a", "bands", 1.5, 0.1)
    sail = _box((mast + 0.12, y - 0.035, base + 5.2), (mast + 2.4, y + 0.035, top - 0.4), cloth)
    parts.append(_sliced(sail, (1, 0, 1), (0, 0, 0)))
    plain = replace(cloth, pattern="plain")
    jib = _box((mast - 1.9, y - 0.03, base + 3.6), (mast - 0.12, y + 0.03, top - 2.5), plain)
    parts.append(_sliced(jib, (-1, 0, 1), (0, 0, 0)))
    return parts + [_rod((mast, y, top), (x + end, y, base + 2.4), 0.02, _DARK) for end in (-2.5, 1.7)]


def _jetty(x: float, start: float, end: float, base: float) -> list[_Part]:
    """A plank walk along y on posts, with a lamp and a railing of rope."""
    parts = [_box((x - 0.8, end, base + 2.2), (x + 0.8, start, base + 2.8), _WOOD)]
    for y in np.linspace(end + 0.3, start - 0.4, 4):
        for side in (-0.8, 0.8):
            parts.append(_pillar(x + side, y, base, base + 4.6, 0.13, _WOOD))
            parts.append(_ball((x + side, y, base + 4.6), 0.13, _WHITE))
    posts = np.linspace(end + 0.3, start - 0.4, 4)
    for a, b in zip(posts[:-1], posts[1:], strict=True):
        parts += [_rod((x + s, a, base + 4.1), (x + s, b, base + 4.1), 0.03, _CREAM) for s in (-0.8, 0.8)]
    return parts


def _pine(x: float, y: float, base: float, height: float) -> list[_Part]:
    """A trunk and three cones; height in plates."""
    parts = [_pillar(x, y, base, base + 0.25 * height, 0.22, _Paint("#6b4423"))]
    for tier, paint in enumerate(_LEAVES):
        low = base + height * (0.18 + 0.25 * tier)
        parts.append(_pillar(x, y, low, low + 0.36 * height, 1.02 - 0.22 * tier, paint, 0.12))
    parts.append(_pillar(x, y, base + height * 1.03, base + height * 1.09, 0.12, _LEAVES[2]))
    return parts


def _apple_tree(x: float, y: float, base: float) -> list[_Part]:
    """A trunk, a round crown and five apples."""
    crown = np.array([x, y, base + 5.4])
    parts = [_pillar(x, y, base, base + 4, 0.2, _Paint("#6b4423")), _ball(crown, 0.95, _LEAVES[2])]
    for turn, rise in ((0, 0.3), (75, -0.3), (140, 0.5), (215, -0.1), (290, 0.6)):
        c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        flat = 0.93 * np.sqrt(1 - rise * rise)
        parts.append(_ball(crown + (flat * c, flat * s, 0.93 * rise / 0.4), 0.15, _RED))
    return parts


def _trimmings(rng: np.random.Generator) -> list[_Part]:
    """Trees and flowers."""
    parts = _pine(-5.2, 3.6, 4, 9) + _pine(-4.6, 5.3, 3, 7) + _pine(1.5, 5.5, 4, 10) + _pine(5.5, 0.5, 3, 6)
    parts += _apple_tree(4.0, 5.6, 2)
    for x, y in ((-5.5, 1.5), (-4.5, 0.5), (-3.5, -0.5), (0.5, 0.5), (-1.5, -0.5), (1.5, -0.5), (0.5, 4.5), (5.5, 4.5)):
        colour = ("#e8408a", "#f7c51e", "#f4f1ea", "#e2401f", "#8e5bd0")[int(rng.integers(5))]
        parts.append(_pillar(x, y, 4.5, 5.4, 0.08, _LEAVES[1]))
        parts += [_pillar(x, y, 5.4, 5.8, 0.36, _Paint(colour), 0.3), _ball((x, y, 5.9), 0.14, _YELLOW)]
    return parts


def _flag(x: float, y: float, base: float) -> list[_Part]:
    """A flag of checks on a pole."""
    top = base + 11
    cloth = _Paint("#f4f1ea", "#1f5fa8", "checker", 2.5, 0.1)
    parts = [_pillar(x, y, base, top, 0.07, _WHITE), _ball((x, y, top + 0.2), 0.14, _YELLOW)]
    return [*parts, _box((x + 0.07, y - 0.03, top - 3.6), (x + 2.07, y + 0.03, top - 0.6), cloth)]


def _buoy(x: float, y: float, base: float) -> list[_Part]:
    body = _Paint("#e3341f", "#f6f3ea", "bands", 2.4, 0.8)
    return [
        _pillar(x, y, base, base + 0.8, 0.45, _DARK),
        _pillar(x, y, base + 0.8, base + 3.6, 0.42, body, 0.12),
        _ball((x, y, base + 4.0), 0.2, _Paint("#ffd25a", gloss=1.0, glow=0.5)),
    ]


def _cart(x: float, y: float, base: float) -> list[_Part]:
    """A hand cart on two big wheels with a barrel in it."""
    parts = [_box((x - 0.9, y - 0.5, base + 1.3), (x + 0.9, y + 0.5, base + 1.8), _WOOD)]
    for side in (-0.62, 0.62):
        out = 0.12 if side > 0 else -0.12
        parts.append(_rod((x, y + side, base + 1.25), (x, y + side + out, base + 1.25), 0.5, _DARK))
        parts.append(_rod((x, y + side, base + 1.25), (x, y + side + 1.5 * out, base + 1.25), 0.3, _RED))
        parts.append(_rod((x + 0.9, y + side * 0.7, base + 1.5), (x + 2.0, y + side * 0.7, base + 0.3), 0.05, _WOOD))
    barrel = _Paint("#8a5a2b", "#3a3f45", "bands", 1.8, 0.3)
    return [*parts, _pillar(x - 0.3, y, base + 1.8, base + 4.2, 0.42, barrel)]


def _build_parts() -> list[_Part]:
    """All parts of the toy, without studs that another part covers, sorted by kind."""
    rng = np.random.default_rng(7)
    parts = _island(rng) + _lighthouse(-2.0, 2.5, 7) + _cottage(1.2, 0.6, 4) + _trimmings(rng)
    parts += _crane(4.5, -3.2, 3) + _boat(-4.4, -4.2, 2) + _jetty(-0.5, -1.6, -7.4, 2) + _flag(-4.5, -0.4, 3)
    parts += _buoy(-6.6, -2.4, 2) + _buoy(2.6, -6.8, 2) + _cart(2.2, -2.2, 3)
    return sorted(_without_buried_studs(parts), key=lambda part: part.kind)


def _without_buried_studs(parts: list[_Part]) -> list[_Part]:
    """The parts less each stud whose middle or rim lies in another part: it would poke through or be wasted."""
    size = 0.3 * STUD, 0.3 * STUD, 0.25 * PLATE
    studs = [i for i, part in enumerate(parts) if part.kind == _FRUSTUM and np.allclose(part.size, size)]
    probes = size[0] * np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    position = np.stack([parts[i].centre for i in studs])[:, None] + probes
    owners = np.array(studs)[:, None]
    buried = np.zeros(len(studs), bool)
    for i, part in enumerate(parts):
        buried |= (_contains(part, position) & (owners != i)).any(axis=1)
    dropped = {i for i, hidden in zip(studs, buried, strict=True) if hidden}
    return [part for i, part in enumerate(parts) if i not in dropped]


def _contains(part: _Part, position: np.ndarray) -> np.ndarray:
    """Which positions (..., 3) lie inside a part, by more than rounding."""
    local = (position - part.centre) @ part.axes.T
    if part.kind == _SPHERE:
        return np.linalg.norm(local, axis=-1) < part.size[0] - 1e-5
    if part.kind == _BOX:
        inside = (np.abs(local) < part.size - 1e-5).all(axis=-1)
        return inside & (local @ np.array(part.cut[:3]) < part.cut[3] - 1e-5)
    low, high, half = part.size
    radius = (low + high) / 2 + (high - low) / (2 * half) * local[..., 2]
    return (np.abs(local[..., 2]) < half - 1e-5) & (np.linalg.norm(local[..., :2], axis=-1) < radius - 1e-5)


# The toy as arrays.


@struct.dataclass
class _Toy:
    """P parts, boxes first, then frusta, then spheres; world units."""

    shape: Array  # (P, 19): centre 3, axes 9, size 3, cut 4
    paint: Array  # (P, 10): linear colour 3, linear second 3, pattern, scale, gloss, glow
    corners: Array  # (P, 8, 3) of the oriented boxes around the parts
    sky: Array  # (X, Y, Z) fraction of the sky seen from each point of a lattice over the bounds
    starts: tuple[int, ...] = struct.field(pytree_node=False)  # (4,): where each kind begins, and P


def _linear(colour: str) -> list[float]:
    """Linear light of an sRGB hex colour."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return list(np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4))


def _pack(parts: Sequence[_Part]) -> _Toy:
    shape = [np.concatenate([p.centre, p.axes.ravel(), p.size, p.cut]) for p in parts]
    paint = []
    for p in (part.paint for part in parts):
        numbers = [_PATTERNS.index(p.pattern), p.scale, p.gloss, p.glow]
        paint.append(_linear(p.colour) + _linear(p.second) + numbers)
    kinds = [p.kind for p in parts]
    return _Toy(
        shape=np.array(shape, np.float32),
        paint=np.array(paint, np.float32),
        corners=np.array([_corners(p) for p in parts], np.float32),
        sky=np.ones((2, 2, 2), np.float32),
        starts=(*(kinds.index(kind) for kind in range(3)), len(kinds)),
    )


def _corners(part: _Part) -> np.ndarray:
    """(8, 3) corners of the oriented box around a part."""
    half = part.size
    if part.kind == _FRUSTUM:
        half = np.array([max(part.size[:2]), max(part.size[:2]), part.size[2]])
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return part.centre + (signs * half) @ part.axes


@functools.cache
def _toy() -> _Toy:
    """The toy with its baked sky light; numpy, so that importing and tracing touch no device."""
    toy = _pack(_build_parts())
    with jax.ensure_compile_time_eval(), jax.default_device(_host()):
        return replace(toy, sky=_bake_sky(toy))


def _host() -> jax.Device | None:
    """The CPU, on which small programs with loops start fastest, or None where JAX was told to do without."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


# Closed-form hits. o, d are (3, N); each returns the distances (N,) at which rays enter and leave a convex part.


def _dot(a: Vec, b: Vec) -> jax.Array:
    """Written out, because XLA:CPU fuses sums of rows and not a reduction."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(v: Vec) -> Vec:
    scale = 1 / jnp.sqrt(_dot(v, v) + 1e-20)
    return [x * scale for x in v]


def _to_local(row: jax.Array, o: Vec, d: Vec) -> tuple[Vec, Vec, jax.Array]:
    """The ray in the part's frame, started at `shift` where it is nearest the part: keeps float32 digits."""
    offset = [o[i] - row[i] for i in range(3)]
    shift = -(offset[0] * d[0] + offset[1] * d[1] + offset[2] * d[2])
    offset = [offset[i] + shift * d[i] for i in range(3)]
    axes = [[row[3 + 3 * i + j] for j in range(3)] for i in range(3)]
    local_o = [a[0] * offset[0] + a[1] * offset[1] + a[2] * offset[2] for a in axes]
    local_d = [a[0] * d[0] + a[1] * d[1] + a[2] * d[2] for a in axes]
    return local_o, local_d, shift


def _nonzero(x: jax.Array) -> jax.Array:
    """x, moved away from 0 far enough to divide by."""
    return jnp.where(jnp.abs(x) > 1e-7, x, jnp.where(x < 0, -1e-7, 1e-7))


def _slab(o: jax.Array, d: jax.Array, half: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = 1 / _nonzero(d)
    middle, reach = -o * inverse, jnp.abs(inverse) * half
    return middle - reach, middle + reach


def _cross_box(row: jax.Array, o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    o, d, shift = _to_local(row, o, d)
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o[i], d[i], row[12 + i]) for i in range(3))
    rate = _nonzero(row[15] * d[0] + row[16] * d[1] + row[17] * d[2])
    cut = (row[18] - row[15] * o[0] - row[16] * o[1] - row[17] * o[2]) / rate
    enter = jnp.maximum(jnp.maximum(x0, y0), jnp.maximum(z0, jnp.where(rate < 0, cut, -jnp.inf)))
    leave = jnp.minimum(jnp.minimum(x1, y1), jnp.minimum(z1, jnp.where(rate > 0, cut, jnp.inf)))
    return enter + shift, leave + shift


def _cross_frustum(row: jax.Array, o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    o, d, shift = _to_local(row, o, d)
    slope = (row[13] - row[12]) / (2 * row[14])
    radius, growth = (row[12] + row[13]) / 2 + slope * o[2], slope * d[2]
    a = _nonzero(d[0] * d[0] + d[1] * d[1] - growth * growth)
    b = o[0] * d[0] + o[1] * d[1] - radius * growth
    discriminant = b * b - a * (o[0] * o[0] + o[1] * o[1] - radius * radius)
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    near, far = (-b - root) / a, (-b + root) / a
    # Where a < 0 the ray is steeper than the cone: it stays inside beyond one root, on the side where the cone widens.
    steep = a < 0
    enter = jnp.where(steep, jnp.where(growth > 0, near, -jnp.inf), near)
    leave = jnp.where(steep, jnp.where(growth > 0, jnp.inf, far), far)
    low, high = _slab(o[2], d[2], row[14])
    enter, leave = jnp.maximum(enter, low), jnp.minimum(leave, high)
    return jnp.where(discriminant > 0, enter + shift, jnp.inf), leave + shift


def _cross_sphere(row: jax.Array, o: Vec, d: Vec) -> tuple[jax.Array, jax.Array]:
    o, _, shift = _to_local(row, o, d)  # o is now the point of the ray that is nearest the centre
    square = row[12] * row[12] - (o[0] * o[0] + o[1] * o[1] + o[2] * o[2])
    root = jnp.sqrt(jnp.maximum(square, 0))
    return jnp.where(square > 0, shift - root, jnp.inf), shift + root


_CROSS: tuple[Callable, ...] = (_cross_box, _cross_frustum, _cross_sphere)


_BATCH = 2  # parts tried in one turn of a loop: a turn costs XLA:CPU microseconds; more gained nothing


def _distances(kind: int, rows: jax.Array, o: Vec, d: Vec) -> jax.Array:
    """Distances (B, N) at which rays enter each of B parts from outside, else inf."""
    enter, leave = jax.vmap(_CROSS[kind], in_axes=(0, None, None))(rows, o, d)
    return jnp.where((enter < leave) & (enter > 1e-5), enter, jnp.inf)


def _visit_parts(toy: _Toy, near: jax.Array, o: Vec, d: Vec, visit: Callable, start: Any) -> Any:
    """Folds visit(result, distance (N,), part index) over the parts that are `near` (P,), and perhaps a few more."""
    result = start
    for kind in range(3):
        begin, end = toy.starts[kind : kind + 2]
        size = -(-(end - begin) // _BATCH) * _BATCH
        index = begin + jnp.nonzero(near[begin:end], size=size, fill_value=0)[0]
        rows = jnp.asarray(toy.shape)[index]

        def turn(i: jax.Array, result: Any, kind: int = kind, index: jax.Array = index, rows: jax.Array = rows) -> Any:
            some = lax.dynamic_slice_in_dim(rows, i * _BATCH, _BATCH)
            # A branch, so that XLA:CPU computes t once: it would fuse it into each of its uses otherwise.
            blank = jnp.zeros((_BATCH, *o[0].shape))
            t = lax.cond(i >= 0, lambda: _distances(kind, some, o, d), lambda: blank)
            for b in range(_BATCH):
                result = visit(result, t[b], index[i * _BATCH + b])
            return result

        result = lax.fori_loop(0, -(-jnp.sum(near[begin:end]) // _BATCH), turn, result)
    return result


def _closest(toy: _Toy, near: jax.Array, o: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distance (N,) to the first of the parts that are `near`, inf where there is none, and its index (N,)."""

    def nearer(best: tuple, t: jax.Array, part: jax.Array) -> tuple:
        return jnp.minimum(t, best[0]), jnp.where(t < best[0], part, best[1])

    nothing = jnp.full_like(o[0], jnp.inf), jnp.zeros(o.shape[1:], jnp.int32)
    return _visit_parts(toy, near, o, d, nearer, nothing)


def _blocked(toy: _Toy, near: jax.Array, o: jax.Array, d: jax.Array) -> jax.Array:
    """Which rays (N,) meet one of the parts that are `near`."""
    start = jnp.zeros(o.shape[1:], bool)
    return _visit_parts(toy, near, o, d, lambda blocked, t, _: blocked | (t < jnp.inf), start)


def _frame(direction: np.ndarray) -> np.ndarray:
    """(3, 3) rows: two unit vectors across a unit direction, and the direction."""
    side = np.cross([0.0, 0.0, 1.0], direction)
    side = side / np.linalg.norm(side) if np.linalg.norm(side) > 1e-6 else np.array([1.0, 0.0, 0.0])
    return np.stack([side, np.cross(direction, side), direction]).astype(np.float32)


def _in_light(toy: _Toy, frame: Array, point: jax.Array, valid: jax.Array) -> jax.Array:
    """Which of the valid points (3, N) see a light at infinity along frame[2].

    Only parts whose shadow meets the box around the points, seen along the light, can block it.
    """
    seen = jnp.einsum("ij,pkj->ipk", frame, toy.corners, precision=lax.Precision.HIGHEST)
    local = jnp.stack([_dot(row, point) for row in frame])
    low = jnp.min(jnp.where(valid, local, jnp.inf), axis=1)[:, None] - 1e-3
    high = jnp.max(jnp.where(valid, local, -jnp.inf), axis=1)[:, None] + 1e-3
    part_low, part_high = seen.min(axis=2), seen.max(axis=2)
    meets = (part_high >= low) & (part_low <= high)
    near = meets[0] & meets[1] & (part_high[2] >= low[2, 0])
    direction = jnp.broadcast_to(frame[2][:, None], point.shape)
    return ~_blocked(toy, near, point, direction)


# Sky light, baked once on a coarse lattice.

_SKY_CELL = STUD / 2  # world units


def _bake_sky(toy: _Toy) -> np.ndarray:
    """(X, Y, Z) fraction of the upper hemisphere that each lattice point over BRICKS_BOUNDS sees."""
    low, high = (np.array(corner) for corner in BRICKS_BOUNDS)
    block = 8
    count = (np.ceil(((high - low) / _SKY_CELL + 1) / block) * block).astype(int)
    lattice = np.stack(np.meshgrid(*(np.arange(n) for n in count), indexing="ij"), axis=-1) * _SKY_CELL + low
    shape = [n for size in count for n in (size // block, block)]
    blocks = lattice.reshape(*shape, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, block**3, 3)
    frames = np.stack([_frame(direction) for direction in _hemisphere(40)])
    seen, inside = _sky_blocks(toy, blocks.transpose(0, 2, 1).astype(np.float32), frames)

    def spread(x: jax.Array) -> np.ndarray:
        return np.asarray(x).reshape(*shape[::2], block, block, block).transpose(0, 3, 1, 4, 2, 5).reshape(count)

    return _fill(spread(seen), spread(inside))


def _hemisphere(count: int) -> np.ndarray:
    """(count, 3) directions spread evenly over the upper hemisphere (a golden-angle spiral)."""
    z = (np.arange(count) + 0.5) / count
    angle = np.arange(count) * np.pi * (3 - 5**0.5)
    return np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], axis=-1)


@jax.jit
def _sky_blocks(toy: _Toy, blocks: Array, frames: Array) -> tuple[jax.Array, jax.Array]:
    """Sky fraction and whether it is inside a part, of each point of (B, 3, N) -> two (B, N)."""

    def one_block(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        valid = jnp.ones(point.shape[1:], bool)

        def add(total: jax.Array, frame: Any) -> tuple[jax.Array, None]:
            return total + _in_light(toy, frame, point, valid), None

        total, _ = lax.scan(add, jnp.zeros(point.shape[1:]), frames)
        return total / len(frames), _inside(toy, point)

    return lax.map(one_block, blocks)


def _inside(toy: _Toy, point: jax.Array) -> jax.Array:
    """Which points (3, N) lie inside a part."""
    up = jnp.broadcast_to(jnp.asarray([[0.0], [0.0], [1.0]]), point.shape)
    inside = jnp.zeros(point.shape[1:], bool)
    for kind in range(3):
        begin, end = toy.starts[kind : kind + 2]
        rows = jnp.asarray(toy.shape)[begin:end]

        def visit(i: jax.Array, inside: jax.Array, kind: int = kind, rows: jax.Array = rows) -> jax.Array:
            enter, leave = _CROSS[kind](rows[i], point, up)
            return inside | ((enter < 0) & (leave > 0))

        inside = lax.fori_loop(0, end - begin, visit, inside)
    return inside


def _fill(value: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Lattice values with those inside parts replaced by their outer neighbours', so that none darkens a surface."""
    known = ~inside
    value = np.where(known, value, 0.0)
    for _ in range(4):
        total, weight = np.zeros_like(value), np.zeros_like(value)
        for axis in range(3):
            for step in (-1, 1):
                total += np.roll(np.where(known, value, 0.0), step, axis)
                weight += np.roll(known, step, axis)
        value = np.where(known, value, total / np.maximum(weight, 1))
        known = known | (weight > 0)
    return value.astype(np.float32)


def _sky_at(sky: Array, point: Vec) -> jax.Array:
    """The baked sky fraction (N,) at points, trilinear."""
    at = [(point[i] - BRICKS_BOUNDS[0][i]) / _SKY_CELL for i in range(3)]
    at = [jnp.clip(x, 0, size - 1.001) for x, size in zip(at, sky.shape, strict=True)]
    cell = [jnp.floor(x).astype(jnp.int32) for x in at]
    fraction = [x - c for x, c in zip(at, cell, strict=True)]
    flat, total = jnp.asarray(sky).reshape(-1), jnp.zeros_like(at[0])
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (cell[i] + corner[i] for i in range(3))
        weights = [fraction[i] if corner[i] else 1 - fraction[i] for i in range(3)]
        value = flat.at[(x * sky.shape[1] + y) * sky.shape[2] + z].get(mode="promise_in_bounds")
        total = total + weights[0] * weights[1] * weights[2] * value
    return total


# Shading.

_SUN_FRAME = _frame(np.array([-0.42, -0.62, 0.66]) / np.linalg.norm([-0.42, -0.62, 0.66]))
_SUN = _SUN_FRAME[2]
_SUN_COLOUR = (2.55, 2.35, 2.0)  # linear light
_SKY_COLOUR = (0.62, 0.74, 0.92)
_BOUNCE_COLOUR = (0.36, 0.33, 0.29)
_BEVEL = 0.07 * STUD  # width over which an edge's shading normal is rounded


def _normals(kind: jax.Array, row: jax.Array, point: Vec, d: Vec) -> tuple[Vec, Vec, jax.Array, Vec]:
    """Geometric normal, shading normal with rounded edges, edge weight (N,) and local point.

    row (19, N) holds each ray's part. The face is the one that the point is nearest to among those that face the ray.
    """
    axes = [row[3 + 3 * i : 6 + 3 * i] for i in range(3)]
    offset = [point[i] - row[i] for i in range(3)]
    local, local_d = ([_dot(a, v) for a in axes] for v in (offset, d))
    faces = _faces(kind, row, local)
    is_ball = kind == _SPHERE
    score = [jnp.where(usable & (_dot(n, local_d) < 0), gap, -jnp.inf) for n, gap, usable in faces]
    best = functools.reduce(jnp.maximum, score)
    normal, bent, edge, taken = _unit(local), [0.0, 0.0, 0.0], jnp.zeros_like(row[0]), is_ball
    for (n, gap, usable), s in zip(faces, score, strict=True):
        chosen = (s == best) & ~taken
        taken = taken | chosen
        weight = jnp.where(usable & ~chosen, jnp.clip(1 + gap / _BEVEL, 0, 1) ** 2, 0)
        normal = [jnp.where(chosen, a, b) for a, b in zip(n, normal, strict=True)]
        bent = [b + weight * a for a, b in zip(n, bent, strict=True)]
        edge = jnp.maximum(edge, weight)
    bent = _unit([a + 0.7 * b for a, b in zip(normal, bent, strict=True)])
    columns = [[axes[j][i] for j in range(3)] for i in range(3)]
    return [_dot(c, normal) for c in columns], [_dot(c, bent) for c in columns], edge, local


def _faces(kind: jax.Array, row: jax.Array, local: Vec) -> list[tuple[Vec, jax.Array, jax.Array]]:
    """Each face a part may have: local outward normal, signed distance (N,) of the point, whether it has it (N,)."""
    is_box, is_frustum = kind == _BOX, kind == _FRUSTUM
    sign = [jnp.where(x < 0, -1.0, 1.0) for x in local]
    gap = [jnp.abs(local[i]) - row[12 + i] for i in range(3)]
    slope = (row[13] - row[12]) / (2 * row[14])
    flat = 1 / jnp.sqrt(1 + slope * slope)
    reach = jnp.sqrt(local[0] ** 2 + local[1] ** 2 + 1e-20)
    side = [local[0] / reach * flat, local[1] / reach * flat, -slope * flat]
    side_gap = (reach - (row[12] + row[13]) / 2 - slope * local[2]) * flat
    cut = row[15:18]
    return [
        ([sign[0], 0.0, 0.0], gap[0], is_box),
        ([0.0, sign[1], 0.0], gap[1], is_box),
        ([0.0, 0.0, sign[2]], jnp.where(is_box, gap[2], jnp.abs(local[2]) - row[14]), is_box | is_frustum),
        (cut, _dot(cut, local) - row[18], is_box & (row[18] < 0.9)),
        (side, side_gap, is_frustum),
    ]


def _fraction(x: jax.Array) -> jax.Array:
    return x - jnp.floor(x)


def _odd(x: jax.Array) -> jax.Array:
    """1 where floor(x) is odd, else 0."""
    whole = jnp.floor(x)
    return whole - 2 * jnp.floor(whole / 2)


def _noise(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """A hash in [0, 1) of the integer cell of each point."""
    x, y, z = (jnp.floor(v).astype(jnp.int32).astype(jnp.uint32) for v in (x, y, z))
    h = x * np.uint32(73856093) ^ y * np.uint32(19349663) ^ z * np.uint32(83492791)
    h = (h ^ (h >> 13)) * np.uint32(0x5BD1E995)
    return ((h ^ (h >> 15)) & np.uint32(0xFFFF)).astype(jnp.float32) / 65536


def _pattern(pattern: jax.Array, scale: jax.Array, local: Vec, point: Vec) -> jax.Array:
    """How much (N,) of the second colour shows at local and world points."""
    x, y, z = (v * (scale / STUD) for v in local)
    u, v, w = (p / STUD for p in point)
    board = jnp.abs(_fraction(y) - 0.5)
    grain = 0.3 * (jnp.sin(7 * y + 3 * jnp.sin(1.7 * x + 2.5 * jnp.floor(y))) > 0.3)
    column = x + 0.5 * _odd(y)
    joint = (jnp.abs(_fraction(column) - 0.5) > 0.43) | (_fraction(y) < 0.16)
    course = z / 0.6 + 1
    block = jnp.arctan2(y, x) * (9 / np.pi) + 0.5 * _odd(course)
    muntin = jnp.maximum(jnp.abs(_fraction(y + 0.5) - 0.5), jnp.abs(_fraction(z + 0.5) - 0.5))
    crest = jnp.sin((3.1 * u + 2.2 * v) * scale + 1.6 * jnp.sin(1.3 * v))
    mixes = {
        "checker": 1.0 * (_odd(x) != _odd(z)),
        "planks": jnp.where(board > 0.44, 1.0, grain),
        "shingles": jnp.where(joint, 1.0, 0.35 * _noise(column, y, 0 * y)),
        "bands": _odd(z),
        "masonry": 0.55 * ((_fraction(block) < 0.07) | (_fraction(course) < 0.09)),
        "panes": 1.0 * (muntin > 0.44),
        "waves": 0.45 * jnp.clip(6 * crest - 4.6, 0, 1),
        "speckle": 0.8 * _noise(u * scale, v * scale, w * scale),
    }
    mix = jnp.zeros_like(x)
    for name, value in mixes.items():
        mix = jnp.where(pattern == _PATTERNS.index(name), value, mix)
    return mix


def _environment(x: jax.Array, y: jax.Array, z: jax.Array) -> Vec:
    """Light that a reflection towards (x, y, z) sees: a bright horizon, a deeper zenith, a soft window on one side."""
    glow = 0.5 + 0.9 * jnp.exp(-3 * jnp.abs(z))
    window = 1.6 * jnp.clip(8 * (0.55 * x - 0.35 * y + 0.76 * z - 0.86), 0, 1)
    return [jnp.where(z > 0, _SKY_COLOUR[i] * glow, _BOUNCE_COLOUR[i]) + window for i in range(3)]


def _shade(paint: jax.Array, mix: jax.Array, sky: jax.Array, sunlit: jax.Array, n: Vec, edge: jax.Array, d: Vec) -> Vec:
    """Linear light that leaves each point towards its ray's origin. paint (10, N), n the normal to shade by.

    Sun and sky on a matt base under a clear coat, which reflects by Schlick's term and shows the sun by Blinn-Phong's.
    """
    gloss, glow = paint[8], paint[9]
    facing = jnp.maximum(_dot(n, _SUN), 0) * sunlit
    cosine = jnp.maximum(-_dot(n, d), 0)
    shine = jnp.maximum(_dot(n, _unit([_SUN[i] - d[i] for i in range(3)])), 0)
    highlight = gloss * sunlit * (facing > 0) * (1.1 * shine**120 + 0.06 * shine**20)
    fresnel = gloss * (0.04 + 0.6 * (1 - cosine) ** 5)
    mirrored = _environment(*(d[i] + 2 * cosine * n[i] for i in range(3)))
    from_sky, from_below = (0.47 + 0.38 * n[2]) * sky, (0.42 - 0.34 * n[2]) * (0.4 + 0.6 * sky)
    light = []
    for i in range(3):
        albedo = (paint[i] + mix * (paint[3 + i] - paint[i])) * (1 - 0.3 * edge)
        received = 0.62 * _SUN_COLOUR[i] * facing + _SKY_COLOUR[i] * from_sky + _BOUNCE_COLOUR[i] * from_below
        coat = fresnel * sky * mirrored[i] + highlight * _SUN_COLOUR[i]
        light.append(albedo * (received * (1 - fresnel) + glow) + coat)
    return light


def _encode(linear: jax.Array) -> jax.Array:
    """sRGB of linear light, with a soft shoulder above 0.8 so that highlights keep their shape."""
    soft = 0.8 + 0.2 * jnp.tanh((linear - 0.8) / 0.4)
    x = jnp.clip(jnp.where(linear > 0.8, soft, linear), 0, 1)
    return jnp.where(x <= 0.0031308, 12.92 * x, 1.055 * jnp.maximum(x, 0.0031308) ** (1 / 2.4) - 0.055)


def _surface(toy: _Toy, near: jax.Array, o: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    """rgb (3, N) sRGB, alpha (N,), depth (N,), normal (3, N) of rays (3, N) against the parts that are `near`."""
    depth, part = _closest(toy, near, o, d)
    hit = depth < jnp.inf
    reach = jnp.where(hit, depth, 0)
    point = [o[i] + d[i] * reach for i in range(3)]

    # Branches, because XLA:CPU would fuse all stages into one and compute the early ones once per use.
    def stage(compute: Callable[[], Any]) -> Any:
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
        return lax.cond(hit.any(), compute, lambda: blank)

    kind = (part >= toy.starts[1]).astype(jnp.int32) + (part >= toy.starts[2])
    row, paint = stage(lambda: (jnp.asarray(toy.shape)[part].T, jnp.asarray(toy.paint)[part].T))
    normal, bent, edge, local = stage(lambda: _normals(kind, row, point, d))
    lit = hit & (_dot(normal, _SUN) > 0)
    start = jnp.stack([point[i] + 2e-4 * normal[i] for i in range(3)])
    sunlit = 1.0 * (_in_light(toy, _SUN_FRAME, start, lit) & lit)
    mix = stage(lambda: _pattern(paint[6], paint[7], local, point))
    sky = stage(lambda: _sky_at(toy.sky, [point[i] + 0.6 * _SKY_CELL * bent[i] for i in range(3)]))
    light = stage(lambda: _shade(paint, mix, sky, sunlit, bent, edge, d))
    rgb = stage(lambda: [_encode(channel) for channel in light])
    return jnp.stack([c * hit for c in rgb]), 1.0 * hit, depth, jnp.stack([n * hit for n in normal])


@jax.jit
def _cast(toy: _Toy, rays: Rays) -> Surface:
    shape = rays.direction.shape[:-1]
    o, d = (jnp.broadcast_to(x, (*shape, 3)).reshape(-1, 3).T for x in (rays.origin, rays.direction))
    rgb, alpha, depth, normal = _surface(toy, jnp.ones(toy.starts[-1], bool), o, d)
    return Surface(rgb.T.reshape(*shape, 3), alpha.reshape(shape), depth.reshape(shape), normal.T.reshape(*shape, 3))


def cast_rays(rays: Rays) -> Surface:
    """What rays (...) in world units meet first: the point sample, without antialiasing.

    Tests every part against every ray; `write_scene` tests only those that a tile of pixels can see. A ray that
    starts inside a part does not see that part.
    """
    return _cast(_toy(), rays)


# Cameras and pictures.


def bricks_cameras(split: str) -> np.ndarray:
    """c2w (V, 3, 4) f32 of a split, OpenGL axes, world units: on the upper hemisphere, looking at the origin.

    train and val are two stretches of one low-discrepancy sequence; test is an orbit that rises and falls.
    """
    count = NUM_VIEWS[split]
    if split == "test":
        turn: np.ndarray = np.arange(count) / count
        height = np.sin(np.radians(32 + 20 * np.sin(4 * np.pi * turn)))
    else:
        first = {"train": 1, "val": 1 + NUM_VIEWS["train"]}[split]
        index = first + np.arange(count)
        turn, height = index * 0.7548776662466927 % 1, 0.01 + 0.98 * (index * 0.5698402909980532 % 1)
    angle, flat = 2 * np.pi * turn, np.sqrt(1 - height**2)
    directions = np.stack([flat * np.cos(angle), flat * np.sin(angle), height], axis=-1)
    return np.stack([_look_at_origin(CAMERA_RADIUS * direction) for direction in directions])


def _look_at_origin(position: np.ndarray) -> np.ndarray:
    """c2w (3, 4) f32 of a camera at `position` whose up is the world's z, or y where z is the view direction."""
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0] if abs(back[2]) < 0.9999 else [0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, position], axis=-1).astype(np.float32)


def _camera(image_size: int) -> Camera:
    focal = 0.5 * image_size / np.tan(0.5 * CAMERA_ANGLE_X)
    both = jnp.ones(2)
    return Camera(focal * both, 0.5 * image_size * both, width=image_size, height=image_size)


@functools.partial(jax.jit, static_argnames=("image_size", "subsamples"))
def _render_view(toy: _Toy, c2w: jax.Array, *, image_size: int, subsamples: int = SUBSAMPLES) -> jax.Array:
    """One picture (H, W, 4) u8 with straight alpha from c2w (3, 4), tile by tile."""
    camera = _camera(image_size)
    corner_xy, _ = point_to_pixel(camera, c2w, jnp.asarray(toy.corners))
    part_low, part_high = corner_xy.min(axis=1), corner_xy.max(axis=1)
    tiles = -(-image_size // TILE)
    step = (np.arange(TILE * subsamples) + 0.5) / subsamples
    grid = np.stack(np.meshgrid(step, step), axis=-1).reshape(-1, 2).astype(np.float32)

    def render(low: jax.Array, near: jax.Array) -> jax.Array:
        rays = pixel_to_ray(camera, c2w, low + grid)
        rgb, alpha, _, _ = _surface(toy, near, rays.origin.T, rays.direction.T)
        samples = jnp.concatenate([rgb * alpha, alpha[None]]).reshape(4, TILE, subsamples, TILE, subsamples)
        return samples.mean(axis=(2, 4))

    def tile(index: jax.Array) -> jax.Array:
        low = TILE * jnp.stack([index % tiles, index // tiles]).astype(jnp.float32)
        near = jnp.all((part_high >= low) & (part_low <= low + TILE), axis=-1)
        return lax.cond(near.any(), render, lambda *_: jnp.zeros((4, TILE, TILE)), low, near)

    pictures = lax.map(tile, jnp.arange(tiles * tiles)).reshape(tiles, tiles, 4, TILE, TILE)
    image = pictures.transpose(0, 3, 1, 4, 2).reshape(tiles * TILE, tiles * TILE, 4)[:image_size, :image_size]
    rgb = image[..., :3] / jnp.maximum(image[..., 3:], 1e-6)
    return jnp.round(255 * jnp.clip(jnp.concatenate([rgb, image[..., 3:]], axis=-1), 0, 1)).astype(jnp.uint8)


def write_scene(folder: pathlib.Path, image_size: int, *, progress: bool = True) -> None:
    """Renders all splits into `folder` in Blender format; `folder` appears only when it is complete.

    Pictures are RGBA PNGs of image_size x image_size, sRGB with straight alpha. Raises FileExistsError where `folder`
    is there already; one that another process finishes meanwhile is kept, for it holds the same.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it to render the scene again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pictures = _write_poses(unfinished)
        _write_pictures(pictures, image_size, progress=progress)
        unfinished.chmod(0o755)  # mkdtemp's is private
        if not folder.exists():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_poses(folder: pathlib.Path) -> list[tuple[pathlib.Path, np.ndarray]]:
    """Writes transforms_{split}.json; returns the path and pose of each picture that they name."""
    pictures = []
    for split in NUM_VIEWS:
        (folder / split).mkdir()
        frames = []
        for i, c2w in enumerate(bricks_cameras(split)):
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": [*c2w.tolist(), [0.0, 0.0, 0.0, 1.0]]})
            pictures.append((folder / split / f"r_{i}.png", c2w))
        transforms = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(transforms, indent=2) + "\n")
    return pictures


def _write_pictures(pictures: list[tuple[pathlib.Path, np.ndarray]], image_size: int, *, progress: bool) -> None:
    """Renders each (path, c2w), one thread per core: a view is a chain of small loops that XLA runs on one core."""
    with jax.default_device(_host()):
        toy = jax.tree.map(jnp.asarray, _toy())
        render = _render_view.lower(toy, pictures[0][1], image_size=image_size).compile()

    def write(picture: tuple[pathlib.Path, np.ndarray]) -> None:
        with jax.default_device(_host()):  # holds for one thread only
            _write_picture(picture[0], np.asarray(render(toy, picture[1])))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for _ in tqdm(pool.map(write, pictures), total=len(pictures), desc="rendering bricks", disable=not progress):
            pass


def _write_picture(path: pathlib.Path, rgba: np.ndarray) -> None:
    Image.fromarray(rgba).save(path)
