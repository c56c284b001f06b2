"""The built-in image `atlas`: the map of a coast that is nowhere, of any size, with detail down to single pixels.

    integers --hash--> height (octaves of noise) ----------------------> sea, beach, light on the slopes ---+
                   |                                                                                        v
                   +-> plots (a tree of rectangles) -> looks of each --> streets, fields, roofs, letters -> (h, w, 3) u8

The picture is a pure function of a pixel's place and the size of the whole, so that any part can be drawn by itself.
It is made of additions, products, divisions, square roots, comparisons and roundings of integers and f32 in a fixed
order: these are exact in IEEE arithmetic, so that tiles, threads and machines agree bit for bit.

Heights are in pixels, and as steep on every scale; the width of a street is as the square root of the block it
divides. So a larger image has more levels and no coarser pixels: a roof is a dozen pixels wide whatever the size.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields

import numpy as np
from tqdm import tqdm

from jaxngp.config import InputError
from jaxngp.data.image import StoredImage, image_cache, map_npy, tiles, write_npy

VERSION = "v1"  # changes with the picture, so that no stale copy is read
MIN_SIDE, MAX_SIDE = 16, 2**16  # px
PIXELS_IN_MEMORY = 2**24  # a larger image is written to the cache, and mapped
PIXELS_ALONE = 2**25  # that one process draws while another starts
BAND = 512  # rows of a large image that are drawn and written together
BLOCK = 1024  # px per side of what is drawn together: its plots are found once
STRIP = 64  # rows of a block that are coloured together: 64 x 1024 f32 stay in the cache of a core

SEED = 7
SMALLEST_PLOT = 14  # px: what is shorter is not divided
GRAINS = (16.0, 180.0)  # px: the range of sizes at which a district stops to divide
FINEST_NOISE = 4  # px between the vertices of the last octave
LETTER = (8, 5)  # rows and columns of pixels from one letter to the next
SIZE_OF_LETTER = (6, 4)


# Numbers from integers.


def _mix(key: np.ndarray) -> np.ndarray:
    """A bijection of u32 in which every bit of the result depends on every bit (of the family of `lowbias32`)."""
    key = (key ^ (key >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    key = (key ^ (key >> np.uint32(15))) * np.uint32(0x735A2D97)
    return key ^ (key >> np.uint32(15))


def _hash(*parts: np.ndarray | int) -> np.ndarray:
    """u32 of integers that broadcast against each other; of scalars alone (1,), for a scalar would warn of overflow."""
    key = np.full(1, SEED, np.uint32)
    for part in parts:
        key = _mix((key ^ np.asarray(part).astype(np.uint32)) + np.uint32(0x9E3779B9))
    return key


def _unit(key: np.ndarray) -> np.ndarray:
    """f32 in [0, 1) of u32: 24 bits, so that no rounding reaches 1."""
    return (key >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _choose(key: np.ndarray, count: int) -> np.ndarray:
    return (key % np.uint32(count)).astype(np.intp)


# Shapes.


def _clip(x: np.ndarray) -> np.ndarray:
    """To [0, 1]; of a distance in pixels plus a half it is how much of a pixel lies inside an edge."""
    return np.minimum(np.maximum(x, 0), 1)


def _wave(phase: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1 from 1 at the integers to 0 between them; a cosine would not be exact."""
    x = phase - np.floor(phase)
    x += x
    x -= 1
    return x * x * (3 - 2 * np.abs(x))


def _smoothstep(x: np.ndarray) -> np.ndarray:
    return x * x * (3 - 2 * x)


# Heights.


def _height(y: np.ndarray, x: np.ndarray, top: int) -> np.ndarray:
    """Pixels above the sea at rows y (h,) and columns x (w,), both consecutive: (h, w) f32.

    Value noise in octaves whose vertices are top / 4, top / 8, ... pixels apart and as high as they are far apart.
    Interpolated along x for each row of vertices, then along y: three passes over the pixels for an octave.
    """
    height = np.full((len(y), len(x)), 0.045 * top, np.float32)
    term = np.empty_like(height)
    spacing = top // 4
    while spacing >= FINEST_NOISE:
        level = spacing.bit_length()
        row, v = _cells(y + level % 3 * spacing // 3, spacing)  # shifted, for vertices of all octaves would line up
        column, u = _cells(x + (level + 1) % 3 * spacing // 3, spacing)
        vertices = _unit(_hash(level, np.arange(row[0], row[-1] + 2)[:, None], np.arange(column[0], column[-1] + 2)))
        vertices = (2 * vertices - 1) * (0.8 * spacing if spacing > 8 else 0.4 * spacing)
        lines = vertices[:, column - column[0]]
        lines += (vertices[:, column - column[0] + 1] - lines) * u
        ends = [0, *np.flatnonzero(np.diff(row)) + 1, len(row)]
        for line, next_line, start, end in zip(lines, lines[1:], ends, ends[1:], strict=False):
            part = height[start:end]
            part += line
            part += np.multiply(next_line - line, v[start:end, None], out=term[: end - start])
        spacing //= 2
    return height


def _cells(place: np.ndarray, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """The cell that each pixel lies in, and the smoothed fraction f32 of it that lies before the pixel's centre."""
    fraction = ((place % spacing).astype(np.float32) + np.float32(0.5)) / np.float32(spacing)
    return place // spacing, _smoothstep(fraction)


# Plots.


@dataclass
class _Plots:
    """N rectangles, each the part of another that a street divides."""

    box: np.ndarray  # (N, 4) i64: first row, end of rows, first column, end of columns
    street: np.ndarray  # (N, 4) f32 px: how much of each side is street
    key: np.ndarray  # (N,) u32
    tone: np.ndarray  # (N, 3) f32: lightness, warmth, greenness, handed down with changes
    grain: np.ndarray  # (N,) f32 px: the longer side that is divided no more


def _find_plots(rows: tuple[int, int], columns: tuple[int, int], size: tuple[int, int]) -> _Plots:
    """The undivided plots that meet a window, given as (first, end), of an image of `size` = (width, height)."""
    width, height = size
    plots = _Plots(
        box=np.array([[0, height, 0, width]]),
        street=np.full((1, 4), -8, np.float32),  # the border of the image is none
        key=np.zeros(1, np.uint32),
        tone=np.zeros((1, 3), np.float32),
        grain=np.full(1, 48, np.float32),
    )
    found = []
    while len(plots.key):
        longer = np.maximum(plots.box[:, 1] - plots.box[:, 0], plots.box[:, 3] - plots.box[:, 2])
        whole = (longer < plots.grain) | (longer < SMALLEST_PLOT)
        found.append(_pick(plots, whole))
        plots = _divide(_pick(plots, ~whole))
        top, bottom, left, right = plots.box.T
        inside = (top < rows[1]) & (bottom > rows[0]) & (left < columns[1]) & (right > columns[0])
        plots = _pick(plots, inside)
    return _join(found)


def _divide(plots: _Plots) -> _Plots:
    """Both halves of each plot: its longer side is cut near the middle by a street."""
    top, bottom, left, right = plots.box.T
    low_side = np.where(right - left >= bottom - top, 2, 0)
    each = np.arange(len(plots.key))
    longer = plots.box[each, low_side + 1] - plots.box[each, low_side]
    key = _hash(plots.key, 1)
    cut = plots.box[each, low_side] + (longer * (96 + (key & np.uint32(63)).astype(np.int64)) >> 8)
    half = np.maximum(np.float32(0.3) * np.sqrt(longer.astype(np.float32)) - np.float32(0.8), np.float32(0.3))
    halves = []
    for side in (0, 1):
        box, street = plots.box.copy(), plots.street.copy()
        box[each, low_side + 1 - side] = cut
        street[each, low_side + 1 - side] = half
        key = _hash(plots.key, 2 + side)
        change = _unit(_hash(key[:, None], np.arange(4))) - np.float32(0.5)
        tone = plots.tone * np.float32(0.9) + change[:, :3] * np.float32(0.55)
        grain = plots.grain * (1 + np.float32(0.7) * change[:, 3])
        halves.append(_Plots(box, street, key, tone, np.clip(grain, *GRAINS)))
    return _join(halves)


def _pick(plots: _Plots, index: np.ndarray) -> _Plots:
    return _Plots(**{f.name: getattr(plots, f.name)[index] for f in fields(_Plots)})


def _join(parts: list[_Plots]) -> _Plots:
    return _Plots(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(_Plots)})


# What is on them.


def _colours(*codes: str) -> np.ndarray:
    """(len(codes), 3) f32 of sRGB hex colours."""
    return np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in codes], np.float32) / np.float32(255)


PALETTES = {
    "green": _colours("6d9a52", "84ad5f", "5c8a4c", "97b86b", "7aa657", "8bb268", "649150", "90b077"),
    "field": _colours("9cb35a", "c9b75c", "7f9e4e", "dcc878", "b5c26a", "a98f4f", "86a860", "d6a95e"),
    "roof": _colours("c4553b", "d9764a", "b3452f", "e0945a", "8d5a4a", "5f7186", "7d8b99", "c9b49a"),
    "stone": _colours("efe6d2", "e3d3b5", "d7dfe0", "f2d9c0", "cfe0d2", "e8e0ec", "f4ecd8", "dfcfc4"),
}
STREET, SAND = _colours("e4decf", "ecd9a8")
SHALLOW, OPEN_SEA, DEEP, FOAM = _colours("7fc8c9", "3a8fb0", "1d4f80", "e8f6f2")
WARM, GREENER = np.array([[0.12, 0.012, -0.11], [-0.06, 0.08, -0.05]], np.float32)  # what a unit of tone does
DIRECTIONS = np.array(
    [[1, 0], [0, 1], [0.8, 0.6], [0.6, -0.8], [0.6, 0.8], [0.8, -0.6], [0.96, 0.28], [0.28, -0.96]], np.float32
)
INWARD = np.array([1, -1, 1, -1], np.float32)  # from the sides of a box


@dataclass(frozen=True)
class _Kind:
    """How a plot is filled. A pattern is darker by `depth` where its waves are at their crests."""

    share: int  # of the plots, in parts of their sum
    ground: str  # palettes of the plot and of what covers it up to `margin` from the street
    cover: str
    margin: float = -3.0  # px; below 0 for all of it, under the edge of the street too
    num_waves: int = 0  # crossing at right angles
    period: tuple[float, float] = (1.0, 1.0)  # px, from and to
    depth: float = 0.0
    contrast: float = 1.0


HOUSE = _Kind(0, "green", "roof", margin=2.5, num_waves=1, period=(4, 4), depth=0.2)  # of the small plots, most
MEADOW = _Kind(1, "green", "green")
FIELD = _Kind(2, "field", "field", num_waves=1, period=(4, 12), depth=0.35, contrast=1.5)
ORCHARD = _Kind(1, "green", "green", num_waves=2, period=(5, 10), depth=0.5, contrast=2.5)
CHEQUER = _Kind(1, "stone", "roof", margin=2, num_waves=2, period=(6, 14), depth=0.45, contrast=4)
RINGS = _Kind(1, "green", "stone", margin=2, depth=0.62, contrast=1.3)  # a zone plate: finer from the middle outwards
LETTERS = _Kind(1, "stone", "stone", margin=1, depth=0.75)
KINDS = (HOUSE, MEADOW, FIELD, ORCHARD, CHEQUER, RINGS, LETTERS)
FINEST_RINGS = 0.28  # cycles per pixel at the longer side's end


@dataclass
class _Looks:
    """What the pixels of N plots need to know: f32 (N,) where nothing else is said.

    A pixel measures u along x and v along y from the middle of its plot.
    """

    top: np.ndarray  # of what the streets leave of it, px
    bottom: np.ndarray
    left: np.ndarray
    right: np.ndarray
    margin: np.ndarray
    wave_u: np.ndarray  # cycles per pixel of the first wave; phase = wave_u u + wave_v v + ring (u^2 + v^2)
    wave_v: np.ndarray
    ring: np.ndarray
    cross_u: np.ndarray  # of the second wave
    cross_v: np.ndarray
    depth: np.ndarray
    contrast: np.ndarray
    slope_u: np.ndarray  # of the light: a ridge where it is steep, a gradient where it is not
    slope_v: np.ndarray
    key: np.ndarray  # u32
    letters: np.ndarray  # bool
    ground: np.ndarray  # (3, N): by channel, as the pixels take them
    cover: np.ndarray


def _looks(plots: _Plots) -> _Looks:
    top, bottom, left, right = plots.box.T.astype(np.float32) + INWARD[:, None] * plots.street.T
    shorter, longer = np.minimum(bottom - top, right - left), np.maximum(bottom - top, right - left)
    chance = _unit(_hash(plots.key[:, None], 20 + np.arange(8))).T
    kind = _choose_kind(plots, longer, chance[0])
    is_house = kind == KINDS.index(HOUSE)

    along = np.where((right - left >= bottom - top)[:, None], DIRECTIONS[0], DIRECTIONS[1])
    direction = np.where(is_house[:, None], along, DIRECTIONS[_choose(_hash(plots.key, 30), len(DIRECTIONS))]).T
    wave = direction / _between(_column("period", kind).T, chance[1] * chance[1]) * (_column("num_waves", kind) > 0)
    # A roof is a ridge or nearly flat, a meadow a gradient from one end to the other.
    roof = np.where(chance[2] < 0.6, np.float32(1), np.float32(0.12))
    steep = np.where(is_house, roof, (kind == KINDS.index(MEADOW)) / np.maximum(longer, 1))
    ground, cover = _paint(plots, kind)
    return _Looks(
        top=top,
        bottom=bottom,
        left=left,
        right=right,
        margin=np.minimum(_column("margin", kind) * (np.float32(0.6) + np.float32(0.8) * chance[3]), 0.22 * shorter),
        wave_u=wave[0],
        wave_v=wave[1],
        ring=(kind == KINDS.index(RINGS)) * np.float32(FINEST_RINGS) / np.maximum(longer, 1),
        cross_u=-wave[1] * (_column("num_waves", kind) == 2),
        cross_v=wave[0] * (_column("num_waves", kind) == 2),
        depth=_column("depth", kind) * (np.float32(0.6) + np.float32(0.4) * chance[4]),
        contrast=_column("contrast", kind),
        slope_u=np.where(is_house, direction[1], direction[0]) * steep.astype(np.float32),
        slope_v=np.where(is_house, direction[0], direction[1]) * steep.astype(np.float32),
        key=plots.key,
        letters=kind == KINDS.index(LETTERS),
        ground=ground,
        cover=cover,
    )


def _choose_kind(plots: _Plots, longer: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """An index (N,) into KINDS: small plots are houses, more of them where the tone is light, the others mixed."""
    is_house = (longer < 46) & (chance + np.float32(0.25) * plots.tone[:, 0] < 0.8)
    others = np.repeat(np.arange(len(KINDS)), [kind.share for kind in KINDS])
    return np.where(is_house, KINDS.index(HOUSE), others[_choose(_hash(plots.key, 31), len(others))])


def _column(name: str, kind: np.ndarray) -> np.ndarray:
    """f32 (N,), or (N, 2) for a range: one field of the kinds."""
    return np.array([getattr(k, name) for k in KINDS], np.float32)[kind]


def _between(ends: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * fraction


def _paint(plots: _Plots, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colours of ground and cover, (3, N) f32 each, tinted by the tone; equal where their palettes are."""
    names = list(PALETTES)
    colours = np.stack([PALETTES[name] for name in names])
    light = 1 + np.float32(0.18) * plots.tone[:, :1]
    tint = light * (1 + plots.tone[:, 1:2] * WARM + plots.tone[:, 2:] * GREENER)
    palettes = (np.array([names.index(getattr(k, part)) for k in KINDS])[kind] for part in ("ground", "cover"))
    ground, cover = (
        colours[palette, _choose(_hash(plots.key, 40 + palette), colours.shape[1])] * tint for palette in palettes
    )
    return np.ascontiguousarray(ground.T), np.ascontiguousarray(cover.T)


# From plots and heights to pixels.


def draw(y0: int, x0: int, height: int, width: int, *, size: tuple[int, int]) -> np.ndarray:
    """The part of the picture that begins at row y0 and column x0: (height, width, 3) u8 sRGB.

    size: (width, height) of the whole picture, which the part must lie in. Raises ValueError.
    """
    if not (y0 >= 0 and x0 >= 0 and y0 + height <= size[1] and x0 + width <= size[0]):
        raise ValueError(f"draw: {height} x {width} pixels from ({y0}, {x0}): expected a part of {size[1]} x {size[0]}")
    _check_size(*size)
    picture = np.empty((height, width, 3), np.uint8)
    for rows, columns in tiles(height, width, BLOCK):
        _draw_block(picture[rows, columns], y0 + rows.start, x0 + columns.start, size)
    return picture


def _check_size(width: int, height: int) -> None:
    if not (min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE):
        raise InputError(f"an atlas of {width}x{height} pixels: expected {MIN_SIDE} to {MAX_SIDE} a side")


def _draw_block(block: np.ndarray, y0: int, x0: int, size: tuple[int, int]) -> None:
    """Fills block (h, w, 3) u8, whose first pixel is at row y0 and column x0."""
    height, width, _ = block.shape
    plots = _find_plots((y0, y0 + height), (x0, x0 + width), size)
    looks = _looks(plots)
    owner = np.empty((height, width), np.intp)
    corners = np.maximum(plots.box - [y0, y0, x0, x0], 0).tolist()
    for index, (top, bottom, left, right) in enumerate(corners):
        owner[top:bottom, left:right] = index
    scale = 1 << (max(size) - 1).bit_length()
    for start in range(0, height, STRIP):
        part = slice(start, start + STRIP)
        y, x = np.arange(y0 + start, y0 + min(start + STRIP, height)), np.arange(x0, x0 + width)
        _colour_strip(block[part], looks, owner[part], y, x, scale)


def _colour_strip(
    strip: np.ndarray, looks: _Looks, owner: np.ndarray, y: np.ndarray, x: np.ndarray, scale: int
) -> None:
    """Fills strip (h, w, 3) u8 at rows y (h,) and columns x (w,), whose pixels lie on plots owner (h, w)."""
    height = _height(np.arange(y[0] - 1, y[-1] + 2), np.arange(x[0] - 1, x[-1] + 2), scale)
    slope_x = (height[1:-1, 2:] - height[1:-1, :-2]) * np.float32(0.5)
    slope_y = (height[2:, 1:-1] - height[:-2, 1:-1]) * np.float32(0.5)
    height = height[1:-1, 1:-1]
    steep = np.sqrt(slope_x * slope_x + slope_y * slope_y) + np.float32(0.05)
    shore = height / steep  # px to the coast, where it is near; positive on land
    land = _clip(shore + np.float32(0.5))
    # Where all is land or all is sea its weight is 1 or 0 exactly, so that leaving the other out changes no bit.
    colour = [np.zeros(1, np.float32)] * 3
    if land.any():
        beach = _clip((height - 9) / np.maximum(steep, np.float32(0.5)) + np.float32(0.5))
        light = np.clip(1 + np.float32(0.1) * (slope_x + slope_y), np.float32(0.7), np.float32(1.15)) * land
        plots = _plot_colours(looks, owner, y, x)
        colour = [(plot * beach + sand * (1 - beach)) * light for plot, sand in zip(plots, SAND, strict=True)]
    if land.min() < 1:
        water = _sea_colours(y, x, height, steep, shore, scale)
        colour = [c + w * (1 - land) for c, w in zip(colour, water, strict=True)]
    for channel in range(3):
        strip[..., channel] = _clip(colour[channel]) * np.float32(255) + np.float32(0.5)


def _plot_colours(looks: _Looks, owner: np.ndarray, y: np.ndarray, x: np.ndarray) -> Iterator[np.ndarray]:
    """The three channels (h, w) f32 of plots and streets."""

    def of(values: np.ndarray) -> np.ndarray:
        return np.take(values, owner, mode="clip")  # clip is faster than the check that it replaces

    down, across = y.astype(np.float32)[:, None] + np.float32(0.5), x.astype(np.float32) + np.float32(0.5)
    top, bottom, left, right = (of(side) for side in (looks.top, looks.bottom, looks.left, looks.right))
    u, v = across - np.float32(0.5) * (left + right), down - np.float32(0.5) * (top + bottom)
    depth = np.minimum(np.minimum(down - top, bottom - down), np.minimum(across - left, right - across))  # px inside

    bright = 1 - of(looks.depth) * _pattern(looks, owner, u, v, y, x)
    bright -= np.float32(0.16) * np.clip(u * of(looks.slope_u) + v * of(looks.slope_v), -1, 1)
    inner = depth - of(looks.margin)
    covered = _clip(inner + np.float32(0.5))
    shadow = (1 - np.float32(0.35) * _clip(1 + inner * np.float32(0.25))) * (1 - covered)
    bright *= covered
    within = _clip(depth + np.float32(0.5))
    lanes = _clip(4 * _wave(depth * np.float32(1 / 7)) - 3) * _clip(np.float32(-0.5) * depth - 1)
    street = (1 - np.float32(0.28) * lanes) * (1 - within)
    for channel in range(3):
        plot = of(looks.ground[channel]) * shadow + of(looks.cover[channel]) * bright
        yield plot * within + STREET[channel] * street


def _pattern(
    looks: _Looks, owner: np.ndarray, u: np.ndarray, v: np.ndarray, y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """How dark the pattern is, (h, w) f32 in [0, 1]: two waves multiplied, or letters."""

    def of(values: np.ndarray) -> np.ndarray:
        return np.take(values, owner, mode="clip")

    pattern = _wave(u * of(looks.wave_u) + v * of(looks.wave_v) + (u * u + v * v) * of(looks.ring))
    pattern *= _wave(u * of(looks.cross_u) + v * of(looks.cross_v))
    pattern = _clip((pattern - np.float32(0.5)) * of(looks.contrast) + np.float32(0.5))
    row, column = np.nonzero(of(looks.letters))
    if len(row):
        plot = owner[row, column]
        down, across = y[row] - looks.top[plot].astype(int) - 2, x[column] - looks.left[plot].astype(int) - 2
        pattern[row, column] = _ink(looks.key[plot], down, across)
    return pattern


def _ink(key: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Whether each of N pixels of plots of letters, rows and columns from their corner, is ink: (N,) bool.

    A letter is symmetric, and 12 hashed bits; some of the places have none.
    """
    letter = _hash(key, down // LETTER[0], across // LETTER[1], 50)
    row, column = down % LETTER[0], across % LETTER[1]
    inside = (row < SIZE_OF_LETTER[0]) & (column < SIZE_OF_LETTER[1]) & (down >= 0) & (across >= 0)
    bit = np.minimum(column, SIZE_OF_LETTER[1] - 1 - column).clip(0) * SIZE_OF_LETTER[0] + row % SIZE_OF_LETTER[0]
    return inside & (letter >> bit.astype(np.uint32) & np.uint32(1) > 0) & (letter >> np.uint32(28) > 2)


def _sea_colours(
    y: np.ndarray, x: np.ndarray, height: np.ndarray, steep: np.ndarray, shore: np.ndarray, scale: int
) -> Iterator[np.ndarray]:
    """The three channels (h, w) f32 of water: deeper blue with depth, surf, and waves that bend as it gets shallow."""
    depth = np.maximum(-height, 0)
    off_shore, deep = depth / (depth + 24), depth / (depth + np.float32(scale / 24))
    lines = _clip(3 * _wave(depth * np.float32(1 / 11)) - 2) * _clip(np.float32(2.5) - steep)
    lines *= np.float32(0.5) - np.float32(0.45) * off_shore
    crests = y.astype(np.float32)[:, None] * np.float32(0.06) + x.astype(np.float32) * np.float32(0.08)
    swell = _clip(2 * _wave(crests + height * np.float32(1 / 40)) - 1) * _wave(height * np.float32(1 / 160))
    white = lines + np.float32(0.22) * swell * off_shore
    surf = _clip(1 - np.abs(shore + np.float32(1.5)) * np.float32(0.7))
    white += surf * (1 - white)
    clear = 1 - white
    for channel in range(3):
        water = SHALLOW[channel] + off_shore * (OPEN_SEA[channel] - SHALLOW[channel])
        water += deep * (DEEP[channel] - OPEN_SEA[channel])
        yield water * clear + FOAM[channel] * white


# The whole of it.


def builtin_image(width: int, height: int) -> StoredImage:
    """The picture of a size: in memory where it is small, else drawn once into the cache directory and mapped.

    Raises InputError for a side below 16 or above 65536 pixels, and where the disk has no room.
    """
    _check_size(width, height)
    name, num_bytes = f"atlas-{width}x{height}", width * height * 3
    if width * height <= PIXELS_IN_MEMORY:
        return StoredImage(name, np.concatenate([*_bands(width, height)]), num_bytes)
    path = image_cache() / f"atlas-{VERSION}-{width}x{height}.npy"
    if not path.exists():
        write_npy(path, (height, width), np.dtype(np.uint8), _bands(width, height))
    return StoredImage(name, map_npy(path), num_bytes)


def _bands(width: int, height: int) -> Iterator[np.ndarray]:
    """(h, width, 3) u8 parts of the picture from the top, drawn by all cores where there is much to draw."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, min(cores, width * height // PIXELS_ALONE, -(-height // BAND)))
    drawn = _draw_alone if cores == 1 else _draw_together
    bar = tqdm(None, "drawing atlas", width * height, unit="px", unit_scale=True, delay=1.0, disable=None, leave=False)
    with bar, contextlib.closing(drawn(width, height, cores)) as bands:
        for band in bands:
            yield band
            bar.update(band.shape[0] * width)


def _draw_alone(width: int, height: int, cores: int, first: int = 0) -> Generator[np.ndarray, None, None]:
    """One band of every `cores`, from the `first` one on; of one core, all."""
    for y0 in range(first * BAND, height, cores * BAND):
        yield draw(y0, 0, min(BAND, height - y0), width, size=(width, height))


def _draw_together(width: int, height: int, cores: int) -> Generator[np.ndarray, None, None]:
    """All bands, from processes that draw in turn and send pixels through pipes, which hold them back.

    Threads would wait for each other: four are no faster than one, for numpy's calls are many and short. Processes
    that multiprocessing starts would import the caller's script again.
    """
    search = os.pathsep.join(folder or str(pathlib.Path.cwd()) for folder in sys.path)
    with contextlib.ExitStack() as stack:
        pipes = []
        for first in range(cores):
            program = f"from jaxngp.data import atlas; atlas._send_bands({width}, {height}, {cores}, {first})"
            command = [sys.executable, "-c", program]
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": search})
            stack.enter_context(worker)  # closes its pipe, and waits for it ...
            stack.callback(worker.kill)  # ... after this, also where drawing is given up
            pipes.append(worker.stdout)
        for index, y0 in enumerate(range(0, height, BAND)):
            shape = min(BAND, height - y0), width, 3
            content = pipes[index % cores].read(math.prod(shape))  # type: ignore[union-attr]
            if len(content) != math.prod(shape):
                raise InputError(
                    f"atlas of {width}x{height}: a process that draws it ended early; free memory, try again"
                )
            yield np.frombuffer(content, np.uint8).reshape(shape)


def _send_bands(width: int, height: int, cores: int, first: int) -> None:
    """Writes every band that is the turn of the process `first` of `cores` to the standard output."""
    for band in _draw_alone(width, height, cores, first):
        sys.stdout.buffer.write(band.data)
    sys.stdout.buffer.flush()
