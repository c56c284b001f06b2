"""The toy harbour: its parts, built in toy units (x, y in studs, z in plates of 0.4 stud)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxngp.data.bricks.parts import (
    FRUSTUM,
    PLATE,
    STUD,
    Paint,
    Part,
    Vector,
    ball,
    box,
    brick,
    contains,
    pillar,
    ring,
    rod,
    sliced,
    turned,
)

_RED, _WHITE, _CREAM = Paint("#c8281e"), Paint("#f1eee6"), Paint("#f0dcae")
_YELLOW, _ORANGE, _DARK = Paint("#f5b417"), Paint("#e8731a"), Paint("#30353c", gloss=0.7)
_GREY, _STEEL = Paint("#8d949b"), Paint("#b9c0c8", gloss=1.0)
_ROCKS = tuple(Paint(c, "#565a5f", "speckle", 5.0, 0.15) for c in ("#8a8c8d", "#7b7e81", "#9a9a96"))
_SANDS = tuple(Paint(c, "#c39d62", "speckle", 6.0, 0.2) for c in ("#e6c98d", "#dfbf80", "#ecd29b"))
_GRASSES = tuple(Paint(c) for c in ("#4f9a3c", "#5aa845", "#468e3a", "#6bb54c"))
_SEAS = tuple(Paint(c, "#4fb3d9", "waves", 1.0, 1.0) for c in ("#1668a8", "#1a74b4", "#125c9a", "#1f80bd"))
_FOAM = tuple(Paint(c, "#f4fbff", "waves", 1.6, 0.9) for c in ("#5fbfd6", "#74cbdc", "#4fb2cf"))
_WOOD = Paint("#a8703a", "#5d3717", "planks", 2.0, 0.25)
_GLASS = Paint("#27506e", "#f6f3ea", "panes", 1.0, 1.0)
_LEAVES = (Paint("#1f6b3a"), Paint("#2a7d42"), Paint("#37904a"))


def _disc(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    """The 16 x 16 cells, indexed [x + 8, y + 8], whose centres lie in an ellipse."""
    cell = np.arange(16) - 7.5
    return ((cell[:, None] - x) / radius_x) ** 2 + ((cell[None, :] - y) / radius_y) ** 2 < 1


def _mosaic(
    cells: np.ndarray, z: float, height: float, paints: Sequence[Paint], rng: np.random.Generator
) -> list[Part]:
    """The cells of a 16 x 16 mask covered by bricks of mixed sizes and paints, largest that fits first."""
    parts, free = [], cells.copy()
    for x, y in np.argwhere(cells):
        sizes = [(2, 4), (4, 2), (2, 3), (3, 2), (2, 2), (2, 1), (1, 2), (1, 1)]
        first = int(rng.integers(5))
        for nx, ny in sizes[first:5] + sizes[:first] + sizes[5:]:
            if x + nx <= 16 and y + ny <= 16 and free[x : x + nx, y : y + ny].all():
                free[x : x + nx, y : y + ny] = False
                paint = paints[int(rng.integers(len(paints)))]
                parts += brick((x - 8, y - 8, z), (nx, ny, height), paint)
                break
    return parts


def _island(rng: np.random.Generator) -> list[Part]:
    """Sea, foam, sand, grass and the rocks under the lighthouse."""
    sea = np.zeros((16, 16), bool)
    sea[0:16, 4:12] = sea[2:14, 2:14] = sea[4:12, 0:16] = True
    sand = (_disc(-0.4, 2.2, 6.6, 4.9) | _disc(3.2, -1.2, 3.2, 3.4)) & sea
    foam = sea & (_disc(-0.4, 2.0, 7.6, 6.0) | _disc(3.2, -1.4, 4.3, 4.4)) & ~sand
    grass = (_disc(-0.2, 2.6, 5.6, 3.9) | _disc(3.4, 0.6, 2.2, 3.2)) & sand
    parts = [
        box((-8, -4, 0), (8, 4, 1), _DARK),
        *(box((-6, y, 0), (6, y + 2, 1), _DARK) for y in (-6, 4)),
        *(box((-4, y, 0), (4, y + 2, 1), _DARK) for y in (-8, 6)),
    ]
    parts += _mosaic(sea & ~foam & ~sand, 1, 1, _SEAS, rng)
    parts += _mosaic(foam, 1, 1, _FOAM, rng)
    parts += _mosaic(sand, 1, 2, _SANDS, rng)
    parts += _mosaic(grass, 3, 1, _GRASSES, rng)
    parts += _mosaic(_disc(-2.0, 2.5, 3.3, 3.0), 4, 2, _ROCKS, rng)
    parts += _mosaic(_disc(-2.0, 2.5, 2.9, 2.6), 6, 1, _ROCKS, rng)
    for x, y, z in ((-7, -1, 2), (-6, -2, 2), (-6, -1, 2), (-7, 0, 2), (6, 2, 2), (6, 3, 2), (-1, 7, 2), (5, 4, 3)):
        parts += brick((x, y, z), (1, 1, float(rng.integers(1, 4))), _ROCKS[x % 3])
    return parts


def _window(centre: Vector, turn: float, half_width: float, half_height: float, paint: Paint) -> list[Part]:
    """A painted frame and its panes on a wall that faces `turn` degrees from +x; studs wide, plates high."""
    pane = replace(_GLASS, scale=1.35 / half_width)
    parts = []
    for depth, margin, coat in ((0.14, 0.0, paint), (0.18, 0.1, pane)):
        half = np.array([depth, half_width - margin, half_height - margin / 0.4])
        parts.append(turned(box(centre - half, centre + half, coat), 2, turn))
    return parts


def _lighthouse(x: float, y: float, base: float) -> list[Part]:
    """A round tower of red and white courses with gallery, lantern and cap; about 28 plates high."""
    parts = []
    radius = np.linspace(1.95, 1.2, 7)
    for course in range(6):
        low = base + 3 * course
        colour = ("#c8281e", "#f1eee6")[course % 2]
        paint = Paint(colour, ("#7c130d", "#b5aea0")[course % 2], "masonry", 1.0, 0.6)
        parts.append(pillar(x, y, low, low + 2.92, radius[course], paint, radius[course + 1]))
        parts.append(pillar(x, y, low + 2.92, low + 3, radius[course + 1] - 0.05, _DARK))
    deck = base + 18
    parts += [pillar(x, y, deck, deck + 0.6, 1.3, _DARK, 1.8), pillar(x, y, deck + 0.6, deck + 1.2, 1.8, _DARK)]
    angles = np.arange(12) * np.pi / 6
    for a in angles:
        c, s = np.cos(a), np.sin(a)
        parts.append(pillar(x + 1.68 * c, y + 1.68 * s, deck + 1.2, deck + 3.6, 0.05, _STEEL))
    for z in (2.0, 2.8, 3.6):
        parts += ring(x, y, deck + z, 1.68, 0.04, _STEEL, 12)
    lamp = deck + 1.2
    parts.append(pillar(x, y, lamp, lamp + 0.9, 1.0, _RED))
    parts.append(pillar(x, y, lamp + 0.9, lamp + 3.9, 0.72, Paint("#ffd25a", "#fff3b0", "bands", 4.0, 1.0, 0.75)))
    for a in angles[::2] + 0.2:
        c, s = 0.86 * np.cos(a), 0.86 * np.sin(a)
        parts.append(pillar(x + c, y + s, lamp + 0.9, lamp + 3.9, 0.06, _DARK))
    parts += [
        pillar(x, y, lamp + 3.9, lamp + 4.4, 1.15, _WHITE),
        pillar(x, y, lamp + 4.4, lamp + 6.6, 1.1, _RED, 0.2),
    ]
    parts += [ball((x, y, lamp + 6.9), 0.24, _YELLOW), pillar(x, y, lamp + 7.2, lamp + 9.2, 0.05, _STEEL, 0.03)]
    for turn, z in ((-90, 4.2), (-60, 9.0), (-120, 13.6), (100, 9.0), (30, 12.0), (170, 5.0)):
        a = np.radians(turn)
        r = np.interp(z + 0.9, [0, 18], [1.95, 1.2])
        at = (x + r * np.cos(a), y + r * np.sin(a), base + z + 0.9)
        parts += _window(at, turn, 0.36, 1.05, _WHITE)
    return parts


def _cottage(x: float, y: float, base: float) -> list[Part]:
    """A keeper's cottage of 5 x 4 studs with a shingled roof; (x, y) is its low corner."""
    parts = []
    for course in range(3):
        z, shift = base + 2 * course, course % 2
        for low, size in (((0, 0), 2 + shift), ((2 + shift, 0), 3 - shift)):
            parts += brick((x + low[0], y, z), (size, 4, 2), _WHITE if course else _GREY, studs=False)
    eaves = base + 6
    for side in (0, 1):  # the gable, in two mirrored wedges
        wedge = box((x, y + 2 * side, eaves), (x + 5, y + 2 + 2 * side, eaves + 4.5), _WHITE)
        parts.append(sliced(wedge, (0, 1 if side else -1, 1), (0, 0, 0)))
    slope = np.degrees(np.arctan2(4.5 * 0.4, 2))
    roof = Paint("#bf4f27", "#74250f", "shingles", 2.2, 0.35)
    for side in (-1, 1):
        centre = np.array([x + 2.5, y + 2 + 1.12 * side, eaves + 2.3])
        slab = box(centre - (2.85, 1.62, 0.28), centre + (2.85, 1.62, 0.28), roof)
        parts.append(turned(slab, 0, -side * slope))
    parts.append(rod((x - 0.36, y + 2, eaves + 4.95), (x + 5.36, y + 2, eaves + 4.95), 0.2, Paint("#8d3216")))
    parts += brick((x + 3.6, y + 2.6, eaves), (1, 1, 6), Paint("#a5442c", "#d9c6b0", "checker", 3.0, 0.2), studs=False)
    parts.append(pillar(x + 4.1, y + 3.1, eaves + 6, eaves + 7, 0.3, _DARK, 0.24))
    blue = Paint("#2f6f9f")
    for at in (0.95, 4.0):
        parts += _window((x + at, y, base + 3.4), -90, 0.62, 1.5, blue)
    parts.append(box((x + 2.0, y - 0.12, base), (x + 3.1, y, base + 4.6), Paint("#2f6f9f", "#1c4666", "planks", 3.0)))
    parts.append(ball((x + 2.9, y - 0.16, base + 2.2), 0.09, _YELLOW))
    for at, turn in ((0.0, 180), (5.0, 0)):
        parts += _window((x + at, y + 2, base + 3.4), turn, 0.62, 1.5, blue)
        parts.append(rod((x + at - 0.1, y + 2, eaves + 1.9), (x + at + 0.1, y + 2, eaves + 1.9), 0.42, blue))
    return parts


def _lattice(start: Vector, end: Vector, width: float, bays: int, paint: Paint) -> list[Part]:
    """A square truss of four chords with zigzag braces on each face; toy units, width in studs."""
    a, b = np.asarray(start, float), np.asarray(end, float)
    upright = abs(b[2] - a[2]) > 1e-6
    across = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * width / 2
    step = (lambda u, v: (u, v, 0.0)) if upright else (lambda u, v: (0.0, u, v / 0.4))
    parts = []
    for (u0, v0), (u1, v1) in zip(across, np.roll(across, -1, axis=0), strict=True):
        here, there = step(u0, v0), step(u1, v1)
        parts.append(rod(a + here, b + here, 0.065, paint))
        for bay in range(bays):
            p, q = (a + (b - a) * f / bays for f in (bay, bay + 1))
            ends = (p + here, q + there) if bay % 2 else (p + there, q + here)
            parts.append(rod(*ends, 0.04, paint))
    return parts


def _crane(x: float, y: float, base: float) -> list[Part]:
    """A harbour crane with lattice mast and jib, its load a striped crate."""
    parts = brick((x - 1.5, y - 1.5, base), (3, 3, 2), _GREY)
    parts += brick((x - 1, y - 1, base + 2), (2, 2, 1), _DARK, studs=False)
    top = base + 17
    parts += _lattice((x, y, base + 3), (x, y, top), 0.9, 6, _YELLOW)
    parts.append(pillar(x, y, top, top + 0.8, 0.75, _DARK))
    parts.append(box((x - 0.7, y - 0.6, top + 0.8), (x + 0.7, y + 0.6, top + 3.6), _YELLOW))
    parts.append(box((x - 0.76, y - 0.45, top + 1.6), (x - 0.5, y + 0.45, top + 3.2), replace(_GLASS, scale=1.6)))
    parts.append(pillar(x, y, top + 3.6, top + 6.4, 0.16, _YELLOW, 0.1))
    tip, tail = (x - 5.6, y, top + 2.0), (x + 1.6, y, top + 1.6)
    parts += _lattice((x - 0.7, y, top + 2.0), tip, 0.6, 7, _YELLOW)
    parts += [box(np.subtract(tail, (1.0, 0.4, 0.5)), np.add(tail, (0.4, 0.4, 1.4)), _DARK)]
    peak = (x, y, top + 6.3)
    parts += [rod(peak, np.add(tip, (0.6, 0, 0.8)), 0.03, _STEEL), rod(peak, np.add(tail, (0, 0, 1.2)), 0.03, _STEEL)]
    load = np.array([x - 5.0, y, base + 7.5])
    parts.append(rod(np.add(tip, (0.6, 0, -0.8)), load + (0, 0, 3.0), 0.03, _DARK))
    parts.append(ball(load + (0, 0, 3.0), 0.16, _RED))
    for dx, dy in ((-0.6, -0.6), (0.6, -0.6), (-0.6, 0.6), (0.6, 0.6)):
        parts.append(rod(load + (0, 0, 3.0), load + (dx, dy, 0.2), 0.025, _DARK))
    crate = Paint("#b9803f", "#6e451c", "planks", 3.0, 0.2)
    parts.append(box(load - (0.7, 0.7, 3.0), load + (0.7, 0.7, 0.3), crate))
    for z in (-2.7, 0.0):
        parts.append(box(load + (-0.75, -0.75, z - 0.18), load + (0.75, 0.75, z + 0.18), _ORANGE))
    return parts


def _boat(x: float, y: float, base: float) -> list[Part]:
    """A sailing boat that heads for -x, its sail printed with bands."""
    hull, trim = Paint("#16324f", gloss=0.9), _WHITE
    parts = [box((x - 1.2, y - 0.9, base), (x + 1.8, y + 0.9, base + 2), hull)]
    for side in (-1, 1):
        low, high = sorted((0.0, 0.9 * side))
        bow = box((x - 2.6, y + low, base), (x - 1.2, y + high, base + 2), hull)
        parts.append(sliced(bow, (-1, side, 0), (0, 0, 0)))
        rail = box((x - 2.7, y + low * 1.06, base + 2), (x - 1.2, y + high * 1.06, base + 2.4), trim)
        parts.append(sliced(rail, (-1, side, 0), (0, 0, 0)))
    parts += brick((x - 1.2, y - 1, base + 2), (3, 2, 0.4), _WOOD, studs=False)
    parts += brick((x + 0.2, y - 0.5, base + 2.4), (1, 1, 1.6), _RED)
    mast, top = x - 0.5, base + 14
    parts += [pillar(mast, y, base + 2, top, 0.08, _WOOD, 0.05), ball((mast, y, top), 0.1, _YELLOW)]
    parts.append(rod((mast, y, base + 4.9), (mast + 2.5, y, base + 4.9), 0.05, _WOOD))
    cloth = Paint("#fbf7ec", "#e8731a", "bands", 1.5, 0.1)
    sail = box((mast + 0.12, y - 0.035, base + 5.2), (mast + 2.4, y + 0.035, top - 0.4), cloth)
    parts.append(sliced(sail, (1, 0, 1), (0, 0, 0)))
    plain = replace(cloth, pattern="plain")
    jib = box((mast - 1.9, y - 0.03, base + 3.6), (mast - 0.12, y + 0.03, top - 2.5), plain)
    parts.append(sliced(jib, (-1, 0, 1), (0, 0, 0)))
    return parts + [rod((mast, y, top), (x + end, y, base + 2.4), 0.02, _DARK) for end in (-2.5, 1.7)]


def _jetty(x: float, start: float, end: float, base: float) -> list[Part]:
    """A plank walk along y on posts, with a lamp and a railing of rope."""
    parts = [box((x - 0.8, end, base + 2.2), (x + 0.8, start, base + 2.8), _WOOD)]
    for y in np.linspace(end + 0.3, start - 0.4, 4):
        for side in (-0.8, 0.8):
            parts.append(pillar(x + side, y, base, base + 4.6, 0.13, _WOOD))
            parts.append(ball((x + side, y, base + 4.6), 0.13, _WHITE))
    posts = np.linspace(end + 0.3, start - 0.4, 4)
    for a, b in zip(posts[:-1], posts[1:], strict=True):
        parts += [rod((x + s, a, base + 4.1), (x + s, b, base + 4.1), 0.03, _CREAM) for s in (-0.8, 0.8)]
    return parts


def _pine(x: float, y: float, base: float, height: float) -> list[Part]:
    """A trunk and three cones; height in plates."""
    parts = [pillar(x, y, base, base + 0.25 * height, 0.22, Paint("#6b4423"))]
    for tier, paint in enumerate(_LEAVES):
        low = base + height * (0.18 + 0.25 * tier)
        parts.append(pillar(x, y, low, low + 0.36 * height, 1.02 - 0.22 * tier, paint, 0.12))
    parts.append(pillar(x, y, base + height * 1.03, base + height * 1.09, 0.12, _LEAVES[2]))
    return parts


def _apple_tree(x: float, y: float, base: float) -> list[Part]:
    """A trunk, a round crown and five apples."""
    crown = np.array([x, y, base + 5.4])
    parts = [pillar(x, y, base, base + 4, 0.2, Paint("#6b4423")), ball(crown, 0.95, _LEAVES[2])]
    for turn, rise in ((0, 0.3), (75, -0.3), (140, 0.5), (215, -0.1), (290, 0.6)):
        c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        flat = 0.93 * np.sqrt(1 - rise * rise)
        parts.append(ball(crown + (flat * c, flat * s, 0.93 * rise / 0.4), 0.15, _RED))
    return parts


def _trimmings(rng: np.random.Generator) -> list[Part]:
    """Trees and flowers."""
    parts = _pine(-5.2, 3.6, 4, 9) + _pine(-4.6, 5.3, 3, 7) + _pine(1.5, 5.5, 4, 10) + _pine(5.5, 0.5, 3, 6)
    parts += _apple_tree(4.0, 5.6, 2)
    for x, y in ((-5.5, 1.5), (-4.5, 0.5), (-3.5, -0.5), (0.5, 0.5), (-1.5, -0.5), (1.5, -0.5), (0.5, 4.5), (5.5, 4.5)):
        colour = ("#e8408a", "#f7c51e", "#f4f1ea", "#e2401f", "#8e5bd0")[int(rng.integers(5))]
        parts.append(pillar(x, y, 4.5, 5.4, 0.08, _LEAVES[1]))
        parts += [pillar(x, y, 5.4, 5.8, 0.36, Paint(colour), 0.3), ball((x, y, 5.9), 0.14, _YELLOW)]
    return parts


def _flag(x: float, y: float, base: float) -> list[Part]:
    """A flag of checks on a pole."""
    top = base + 11
    cloth = Paint("#f4f1ea", "#1f5fa8", "checker", 2.5, 0.1)
    parts = [pillar(x, y, base, top, 0.07, _WHITE), ball((x, y, top + 0.2), 0.14, _YELLOW)]
    return [*parts, box((x + 0.07, y - 0.03, top - 3.6), (x + 2.07, y + 0.03, top - 0.6), cloth)]


def _buoy(x: float, y: float, base: float) -> list[Part]:
    body = Paint("#e3341f", "#f6f3ea", "bands", 2.4, 0.8)
    return [
        pillar(x, y, base, base + 0.8, 0.45, _DARK),
        pillar(x, y, base + 0.8, base + 3.6, 0.42, body, 0.12),
        ball((x, y, base + 4.0), 0.2, Paint("#ffd25a", gloss=1.0, glow=0.5)),
    ]


def _cart(x: float, y: float, base: float) -> list[Part]:
    """A hand cart on two big wheels with a barrel in it."""
    parts = [box((x - 0.9, y - 0.5, base + 1.3), (x + 0.9, y + 0.5, base + 1.8), _WOOD)]
    for side in (-0.62, 0.62):
        out = 0.12 if side > 0 else -0.12
        parts.append(rod((x, y + side, base + 1.25), (x, y + side + out, base + 1.25), 0.5, _DARK))
        parts.append(rod((x, y + side, base + 1.25), (x, y + side + 1.5 * out, base + 1.25), 0.3, _RED))
        parts.append(rod((x + 0.9, y + side * 0.7, base + 1.5), (x + 2.0, y + side * 0.7, base + 0.3), 0.05, _WOOD))
    barrel = Paint("#8a5a2b", "#3a3f45", "bands", 1.8, 0.3)
    return [*parts, pillar(x - 0.3, y, base + 1.8, base + 4.2, 0.42, barrel)]


def build_parts() -> list[Part]:
    """All parts of the toy, without studs that another part covers, sorted by kind."""
    rng = np.random.default_rng(7)
    parts = _island(rng) + _lighthouse(-2.0, 2.5, 7) + _cottage(1.2, 0.6, 4) + _trimmings(rng)
    parts += _crane(4.5, -3.2, 3) + _boat(-4.4, -4.2, 2) + _jetty(-0.5, -1.6, -7.4, 2) + _flag(-4.5, -0.4, 3)
    parts += _buoy(-6.6, -2.4, 2) + _buoy(2.6, -6.8, 2) + _cart(2.2, -2.2, 3)
    return sorted(_without_buried_studs(parts), key=lambda part: part.kind)


def _without_buried_studs(parts: list[Part]) -> list[Part]:
    """The parts less each stud whose middle or rim lies in another part: it would poke through or be wasted."""
    size = 0.3 * STUD, 0.3 * STUD, 0.25 * PLATE
    studs = [i for i, part in enumerate(parts) if part.kind == FRUSTUM and np.allclose(part.size, size)]
    probes = size[0] * np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    position = np.stack([parts[i].centre for i in studs])[:, None] + probes
    owners = np.array(studs)[:, None]
    buried = np.zeros(len(studs), bool)
    for i, part in enumerate(parts):
        buried |= (contains(part, position) & (owners != i)).any(axis=1)
    dropped = {i for i, hidden in zip(studs, buried, strict=True) if hidden}
    return [part for i, part in enumerate(parts) if i not in dropped]
