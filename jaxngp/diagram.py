"""A drawing of cameras, points and the scene's box, seen from above and from the side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxngp.cameras import Cameras
from jaxngp.pictures import Image8

Colour = tuple[int, int, int]

PANEL = 760  # px, of one view
MARGIN, HEAD, FOOT = 24, 56, 60  # px, around and between panels; above and below them
FINER = 2  # times; drawn larger and reduced, which smooths lines
INK: Colour = (40, 44, 52)
GREY: Colour = (150, 156, 166)
FAINT: Colour = (222, 226, 232)
PAPER: Colour = (252, 252, 250)
BOX: Colour = (70, 130, 90)
RED: Colour = (205, 40, 40)


@dataclass(frozen=True, eq=False)
class Group:
    """Cameras that are drawn in one colour."""

    label: str
    colour: Colour
    corners: np.ndarray  # (V, 5, 3) scene units: each camera's position, and 4 directions of unit length to its corners
    up: np.ndarray  # (V, 3) of each camera


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is drawn, in scene units, z up."""

    groups: Sequence[Group]
    points: np.ndarray  # (N, 3)
    point_colours: np.ndarray  # (N, 3) u8
    focus: np.ndarray  # (3,)
    num_cascades: int
    side: float  # world units of a scene unit
    title: str
    alarm: str  # behind the title, in red
    labels: Mapping[str, np.ndarray]  # names of cameras, and where they are


def frusta(cameras: Cameras) -> np.ndarray:
    """(V, 5, 3): each camera's position, and the directions of its corners in order."""
    c2w = np.asarray(cameras.c2w, np.float64)
    shares = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    xy = shares * np.asarray(cameras.size)[:, None]
    u, v = np.moveaxis((xy - np.asarray(cameras.centre_xy)[:, None]) / np.asarray(cameras.focal_xy)[:, None], -1, 0)
    own = np.stack([u, -v, -np.ones_like(u)], axis=-1)
    direction = np.einsum("vij,vcj->vci", c2w[:, :, :3], own / np.linalg.norm(own, axis=-1, keepdims=True))
    return np.concatenate([c2w[:, None, :, 3], direction], axis=1)


def draw(drawing: Drawing) -> Image8:
    """The two views beside each other, (H, W, 3) u8."""
    width, height = 2 * PANEL + 3 * MARGIN, HEAD + PANEL + FOOT
    sheet = Image.new("RGB", (FINER * width, FINER * height), PAPER)
    pen = _Pen(ImageDraw.Draw(sheet))
    pen.text((MARGIN, 16), drawing.title, INK, 18)
    end = MARGIN + ImageFont.load_default(18).getlength(drawing.title)
    pen.text((end + 16, 16), drawing.alarm, RED, 18)
    middle, half = _extent(drawing)
    across = _horizontal(drawing)
    upright = np.array([0.0, 0.0, 1.0])
    sideways = np.cross(upright, across)
    for number, (name, right, up) in enumerate(
        (("from above", across, sideways), ("from the side", across, upright)),
    ):
        corner = (MARGIN + number * (PANEL + MARGIN), HEAD)
        _panel(pen, drawing, _View(np.stack([right, up]), middle, half, corner), name)
    _legend(pen, drawing, width)
    return np.asarray(sheet.resize((width, height), Image.Resampling.LANCZOS))


def _extent(drawing: Drawing) -> tuple[np.ndarray, float]:
    """Middle and half width of the cube that is shown: all cameras but a few, and the innermost cube."""
    position = np.concatenate([group.corners[:, 0] for group in drawing.groups])
    inner = 0.5 ** (drawing.num_cascades - 1)
    low, high = np.quantile(position, [0.01, 0.99], axis=0)
    low, high = np.minimum(low, 0.5 - inner / 2), np.maximum(high, 0.5 + inner / 2)
    if not np.isfinite([low, high]).all():
        low, high = np.zeros(3), np.ones(3)
    return (low + high) / 2, 0.58 * float(np.max(high - low))


def _horizontal(drawing: Drawing) -> np.ndarray:
    """The horizontal direction (3,) in which cameras are spread most."""
    position = np.concatenate([group.corners[:, 0] for group in drawing.groups])[:, :2]
    spread = np.cov(position.T) if len(position) > 2 else np.eye(2)
    x, y = np.linalg.eigh(spread)[1][:, 1]
    # Among scene axes where it is nearly one of them, so that the box is drawn square.
    axis = np.array([1.0, 0.0]) if abs(x) >= abs(y) else np.array([0.0, 1.0])
    return np.array([*axis, 0.0])


@dataclass(frozen=True, eq=False)
class _View:
    """A parallel projection onto a panel."""

    axes: np.ndarray  # (2, 3) right and up
    middle: np.ndarray  # (3,)
    half: float  # scene units
    corner: tuple[int, int]  # px

    def __call__(self, position: np.ndarray) -> np.ndarray:
        """Points (..., 3) -> px (..., 2)."""
        at = (np.asarray(position) - self.middle) @ self.axes.T / self.half
        at = np.clip(at, -50, 50)
        return (at * (1, -1) + 1) * (PANEL / 2) + self.corner


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, canvas: ImageDraw.ImageDraw) -> None:
        self._canvas = canvas

    def line(self, points: np.ndarray, colour: Colour, width: float = 1.0) -> None:
        places = [(float(x), float(y)) for x, y in np.asarray(points) * FINER]
        self._canvas.line(places, fill=colour, width=max(1, round(width * FINER)))

    def dot(self, point: np.ndarray, colour: Colour, radius: float) -> None:
        (x, y), r = point * FINER, radius * FINER
        self._canvas.ellipse([float(x - r), float(y - r), float(x + r), float(y + r)], fill=colour)

    def area(self, low: Sequence[float], high: Sequence[float], colour: Colour) -> None:
        self._canvas.rectangle([*(FINER * v for v in low), *(FINER * v for v in high)], fill=colour)

    def text(self, place: Sequence[float], text: str, colour: Colour, size: int = 13, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * FINER)
        self._canvas.text((FINER * place[0], FINER * place[1]), text, fill=colour, font=font, anchor=anchor)


def _panel(pen: _Pen, drawing: Drawing, view: _View, name: str) -> None:
    left, top = view.corner
    pen.area((left, top), (left + PANEL, top + PANEL), (255, 255, 255))
    for point, colour in zip(view(drawing.points), drawing.point_colours.tolist(), strict=True):
        if _within(view, point, 2):
            pen.dot(point, (colour[0], colour[1], colour[2]), 1.3)
    for cascade in range(drawing.num_cascades):
        half = 0.5 ** (drawing.num_cascades - cascade)
        innermost = cascade == 0
        _outline(pen, view, half, BOX if innermost else GREY, 2.0 if innermost else 1.0)
    size = 0.07 * view.half
    for group in drawing.groups:
        for corners, up in zip(group.corners, group.up, strict=True):
            _frustum(pen, view, corners, up, size, group.colour)
    focus = view(drawing.focus)
    if _within(view, focus, 8):
        for offset in ((7, 7), (7, -7)):
            pen.line(np.stack([focus - offset, focus + offset]), INK, 2.5)
    taken: list[np.ndarray] = []
    for label, position in drawing.labels.items():
        place = view(position) + (6, -16)
        while any(abs(place[0] - x) < 50 and abs(place[1] - y) < 13 for x, y in taken):
            place = place - (0, 13)
        if _within(view, place, 10):
            pen.text((place[0], place[1]), label, RED, 12)
            taken.append(place)
    frame = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * PANEL + view.corner
    pen.line(frame, FAINT, 1.0)
    axes = [_axis_name(axis) for axis in view.axes]
    pen.text((left + 10, top + 8), f"{name}   ({axes[0]} to the right, {axes[1]} up)", GREY, 13)
    _scale_bar(pen, drawing, view)


def _axis_name(axis: np.ndarray) -> str:
    return ("-" if axis.sum() < 0 else "") + "xyz"[int(np.argmax(np.abs(axis)))]


def _within(view: _View, place: np.ndarray, border: float) -> bool:
    return bool(np.all(place >= np.add(view.corner, border)) and np.all(place <= np.add(view.corner, PANEL - border)))


def _outline(pen: _Pen, view: _View, half: float, colour: Colour, width: float) -> None:
    """A cube about the middle of the box: a square in either view, as far as it is in the panel."""
    right, up = (half * axis for axis in view.axes)
    corners = view(0.5 + np.stack([right + up, up - right, -right - up, right - up, right + up]))
    low, high = np.array(view.corner), np.add(view.corner, PANEL)
    for start, end in zip(corners[:-1], corners[1:], strict=True):
        # Lines are along the panel's axes: one coordinate is the same at both ends.
        if np.any((np.maximum(start, end) < low) | (np.minimum(start, end) > high)):
            continue
        pen.line(np.clip(np.stack([start, end]), low, high), colour, width)


def _frustum(pen: _Pen, view: _View, corners: np.ndarray, up: np.ndarray, size: float, colour: Colour) -> None:
    apex, ends = corners[0], corners[0] + size * corners[1:]
    place, base = view(apex), view(ends)
    if not _within(view, place, 1):
        return
    for end in base:
        pen.line(np.stack([place, end]), colour, 1.0)
    pen.line(np.concatenate([base, base[:1]]), colour, 1.3)
    top = ends[np.argsort(ends @ up)[-2:]]  # a tick on the upper side says which way is up
    peak = view(top.mean(axis=0) + 0.3 * size * up)
    pen.line(np.stack([view(top[0]), peak, view(top[1])]), colour, 1.0)
    pen.dot(place, colour, 2.2)


def _scale_bar(pen: _Pen, drawing: Drawing, view: _View) -> None:
    wanted = 0.3 * 2 * view.half * drawing.side  # world units
    power = 10.0 ** np.floor(np.log10(max(wanted, 1e-12)))
    length = float(max(step for step in (1, 2, 5) if step * power <= wanted) * power)
    pixels = length / drawing.side / (2 * view.half) * PANEL
    left, bottom = view.corner[0] + 12, view.corner[1] + PANEL - 14
    pen.line(np.array([[left, bottom], [left + pixels, bottom]]), INK, 2.0)
    pen.text((left, bottom - 20), f"{length:g} units of the source", INK, 12)


def _legend(pen: _Pen, drawing: Drawing, width: int) -> None:
    y = HEAD + PANEL + 22
    x = float(MARGIN)
    entries = [(group.colour, f"{len(group.corners)} {group.label}") for group in drawing.groups if len(group.corners)]
    entries.append((BOX, "box" if drawing.num_cascades == 1 else "innermost cube of the box"))
    if drawing.num_cascades > 1:
        entries.append((GREY, f"the cubes around it, up to {2 ** (drawing.num_cascades - 1)} times as wide"))
    entries.append((INK, "what the cameras look at"))
    for colour, label in entries:
        pen.area((x, y), (x + 14, y + 14), colour)
        pen.text((x + 20, y), label, INK, 13)
        x += 20 + ImageFont.load_default(13).getlength(label) + 24
    pen.text((width - MARGIN, y), f"{len(drawing.points)} points", GREY, 13, anchor="ra")
