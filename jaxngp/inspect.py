"""Look at a capture before training on it: what it is, what will be done with it, and what seems to be wrong.

Prints text, and writes a drawing of the cameras. Nothing is trained.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxngp import flags
from jaxngp.cameras import Cameras, focus, surrounded
from jaxngp.config import SceneConfig
from jaxngp.data import Capture, Placement, read_views
from jaxngp.data.checks import Agreement, Evidence, Finding, check, examine, exposure_gains, of_capture
from jaxngp.data.checks.agreement import FINE, GOOD
from jaxngp.data.checks.evidence import view_directions
from jaxngp.data.checks.geometry import seen_cells
from jaxngp.diagram import RED, Colour, Drawing, Group, draw, frusta
from jaxngp.lenses import COEFFICIENTS
from jaxngp.pictures import write_png
from jaxngp.presets import SCENES

COLUMN, WIDTH = 14, 112
_SPLITS: dict[str, tuple[str, Colour]] = {
    "train": ("training views", (36, 98, 180)),
    "held-out": ("held out", (226, 140, 40)),
    "val": ("val views", (226, 140, 40)),
    "test": ("test views", (150, 80, 170)),
}
_SUSPECT: tuple[str, Colour] = ("suspicious", RED)
MAX_POINTS = 4000
MAX_LABELS = 12


def define_flags(values: flags.Flags) -> None:
    """The flags of `python -m jaxngp.inspect`."""
    flags.define_scene_flags(values)
    flags.define_path(values, "out", "inspect.png", "Where the drawing of the cameras is written.")


def main(values: flags.Flags) -> None:
    began = time.perf_counter()
    if values.scene not in SCENES and os.path.exists(values.scene):  # noqa: PTH110 - Path's raises for a long name
        values.scene = os.path.abspath(values.scene)  # noqa: PTH100 - a bare name is that of a folder here
    scene = flags.chosen_scene(values)
    capture, roles, placement = read_views(scene)
    print(f"{capture.path}: {capture.format or 'a ray table'}")
    if capture.cameras is None:
        _write_rows(_table_rows(capture))
        return
    evidence = of_capture(capture, roles, placement)
    agreement = examine(evidence)
    found = check(evidence, agreement)
    _write_rows(_rows(capture, evidence, agreement, scene))
    _write_list("unusual", capture.unusual)
    _write_findings(found)
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_png(out, draw(_drawing(evidence, agreement, capture, found)))
    print(f"\ndrawing: {out}   ({time.perf_counter() - began:.1f} s)")


# Text.


def _write_rows(rows: Iterator[tuple[str, str]]) -> None:
    for left, text in rows:
        lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
        print(f"  {left:<{COLUMN - 2}}{lines[0]}")
        for line in lines[1:]:
            print(" " * COLUMN + line)


def _write_list(title: str, sentences: Sequence[str]) -> None:
    if sentences:
        print(f"\n{title}")
        for sentence in sentences:
            print(textwrap.fill(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    "))


def _write_findings(found: Sequence[Finding]) -> None:
    if not found:
        print("\nnothing suspicious was found")
        return
    print(f"\nsuspicious: {len(found)}")
    for finding in found:
        print(textwrap.fill(f"{finding.code}: {finding.text}", WIDTH, initial_indent="  ! ", subsequent_indent="    "))
        print(textwrap.fill(f"-> {finding.remedy}", WIDTH, initial_indent="    ", subsequent_indent="       "))


def _table_rows(capture: Capture) -> Iterator[tuple[str, str]]:
    yield "views", f"{len(capture.names)}, of rays without cameras: little can be checked"
    yield "rays", f"{sum(len(rows.rows) for rows in capture.rays):,}"


def _rows(
    capture: Capture, evidence: Evidence, agreement: Agreement | None, scene: SceneConfig
) -> Iterator[tuple[str, str]]:
    yield "views", _views(evidence)
    yield "images", _images(capture)
    yield "lens", _lens(capture)
    yield "cameras", _cameras(evidence)
    yield "agreement", _agreement(evidence, agreement)
    if agreement is not None:
        yield "overlap", _overlap(evidence, agreement)
        yield "exposure", _exposure(evidence, agreement)
    yield "box", _box(capture, evidence)
    yield "training", _training(evidence, scene)


def _views(evidence: Evidence) -> str:
    counts = Counter(evidence.splits)
    words = {"train": "to train on", "held-out": "held out to evaluate on"}
    parts = [f"{counts[split]} {words.get(split, split)}" for split in ("train", "held-out", "val", "test")]
    text = ", ".join(part for part in parts if not part.startswith("0 "))
    return text + (f"; {len(evidence.pictures)} were looked at" if len(evidence.pictures) < len(evidence.names) else "")


def _images(capture: Capture) -> str:
    assert capture.cameras is not None
    sizes = Counter(map(tuple, np.asarray(capture.cameras.size).tolist()))
    shown = ", ".join(f"{w}x{h}" + (f" ({n})" if len(sizes) > 1 else "") for (w, h), n in sizes.most_common(3))
    if len(sizes) > 3:
        shown += f" and {len(sizes) - 3} more sizes"
    alpha = {0: "no alpha", len(capture.has_alpha): "with alpha"}.get(sum(capture.has_alpha), "some with alpha")
    parts = [shown, alpha]
    parts += [f"{sum(m is not None for m in capture.masks)} masks"] if any(capture.masks) else []
    parts += [f"{sum(d is not None for d in capture.depths)} depth maps"] if any(capture.depths) else []
    parts += [f"{len(capture.points):,} sparse points"] if capture.points is not None else []
    return ", ".join(parts)


def _lens(capture: Capture) -> str:
    cameras = capture.cameras
    assert cameras is not None
    names = ", ".join(dict.fromkeys(capture.lens_models)) or "PINHOLE"
    focal, size = np.asarray(cameras.focal_xy), np.asarray(cameras.size)
    lengths = f"{focal[:, 0].min():.4g}" + (f" to {focal[:, 0].max():.4g}" if np.ptp(focal[:, 0]) > 0.01 else "")
    across, down = _field_of_view(cameras, 0)
    text = f"{names}: focal length {lengths} px, {across:.0f} x {down:.0f} degrees"
    offset = (np.asarray(cameras.centre_xy) / size - 0.5)[0]
    if np.abs(offset).max() > 0.002:
        text += f", centre {offset[0]:+.1%} x {offset[1]:+.1%} from the middle"
    lens = cameras.lens
    if lens is None:
        return text + ", no distortion"
    coefficients = np.asarray(lens.coefficients)
    values = [
        f"{name} {low:.3g}" + (f" to {high:.3g}" if high - low > 1e-9 else "")
        for name, low, high in zip(COEFFICIENTS[lens.model], coefficients.min(0), coefficients.max(0), strict=True)
        if low or high
    ]
    text += f"; {lens.model}, {', '.join(values) or 'no coefficients'}"
    if lens.model == "perspective":
        bend = _bend(cameras)
        kind = "pincushion: edges bow inward" if bend > 0 else "barrel: edges bow outward"
        text += f" ({kind}, by {abs(bend):.1%} of the way to a corner)" if abs(bend) > 5e-4 else ""
    return text


def _edge_rays(cameras: Cameras, view: int, shares: Sequence[tuple[float, float]]) -> np.ndarray:
    """Directions (N, 3) in camera axes at shares of the width and height."""
    return view_directions(cameras, np.full(len(shares), view), np.array(shares))


def _field_of_view(cameras: Cameras, view: int) -> tuple[float, float]:
    rays = _edge_rays(cameras, view, [(0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1)])
    ahead = np.array([0.0, 0.0, -1.0])
    angle = np.degrees(np.arccos(np.clip(rays @ ahead, -1, 1)))
    return float(angle[0] + angle[1]), float(angle[2] + angle[3])


def _bend(cameras: Cameras) -> float:
    """By how much of its distance from the centre a corner is farther out than without a lens."""
    ray = _edge_rays(cameras, 0, [(0, 0)])[0]
    focal, centre = np.asarray(cameras.focal_xy)[0], np.asarray(cameras.centre_xy)[0]
    straight = np.hypot(*(ray[:2] / max(-ray[2], 1e-6) * focal))
    return float(np.hypot(*centre) / max(straight, 1e-6)) - 1


def _cameras(evidence: Evidence) -> str:
    c2w = np.asarray(evidence.cameras.c2w, np.float64)
    middle, side = focus(c2w), evidence.placement.transform.side
    offset = c2w[:, :, 3] - middle
    distance = np.linalg.norm(offset, axis=1) * side
    forward = -c2w[:, :, 2]
    inward = float(np.mean(np.einsum("vi,vi->v", forward, -offset) > 0.7 * np.linalg.norm(offset, axis=1)))
    together = float(np.linalg.norm(forward.mean(axis=0)))
    centred = np.concatenate([c2w[..., :3], (c2w[..., 3] - middle + 0.5)[..., None]], axis=-1)
    if together > 0.85:
        how = "all facing forward"
    elif inward > 0.8:
        how = "all around, looking inward" if surrounded(centred) else "in an arc, looking inward"
    else:
        how = f"looking in many directions, {inward:.0%} of them at one place"
    height = np.degrees(np.arcsin(np.clip(offset[:, 2] / np.maximum(np.linalg.norm(offset, axis=1), 1e-9), -1, 1)))
    up = np.array(evidence.placement.transform.rotation)[2]
    return (
        f"{how}; {np.median(distance):.3g} units of the source from what they look at ({distance.min():.3g} to "
        f"{distance.max():.3g}), {height.min():.0f} to {height.max():.0f} degrees above it; up is {_direction(up)}"
    )


def _direction(vector: np.ndarray) -> str:
    axis = int(np.argmax(np.abs(vector)))
    if abs(vector[axis]) > 0.9999:
        return f"{'-' if vector[axis] < 0 else '+'}{'xyz'[axis]} of the source"
    return "({:.2f}, {:.2f}, {:.2f}) of the source".format(*vector)


def _agreement(evidence: Evidence, agreement: Agreement | None) -> str:
    if agreement is None:
        return "unknown: too little looks alike in two pictures to say whether the cameras fit them"
    meeting, matches = agreement.meeting, agreement.matches
    text = f"{meeting.fits.mean():.0%} of {len(matches.pair):,} matches between pictures fit the cameras"
    if not meeting.fits.any():
        return text
    pixels = np.median(meeting.miss[meeting.fits]) * np.asarray(evidence.cameras.size).max()
    if agreement.better is not None:
        return f"{text}; see below"
    fine = agreement.fitting > GOOD and pixels < max(0.5, FINE * np.asarray(evidence.cameras.size).max())
    verdict = "good" if fine else "coarse" if agreement.fitting > GOOD else "few"
    return f"{text}, typically within {pixels:.1f} pixels: {verdict}"


def _overlap(evidence: Evidence, agreement: Agreement) -> str:
    matches, fits = agreement.matches, agreement.better_meeting.fits
    starts = np.flatnonzero(np.diff(matches.pair, prepend=-1))
    linked = matches.views[:, starts][:, np.bincount(matches.pair, fits) >= 12]
    partners = np.array([np.sum(linked == view) for view in sorted(evidence.features)])
    forward = -evidence.poses[:, :, 2]
    cosine = np.einsum("pi,pi->p", forward[linked[0]], forward[linked[1]])
    text = f"a picture shows what {np.median(partners):.0f} others show"
    if linked.size:
        text += f", which look {np.median(np.degrees(np.arccos(np.clip(cosine, -1, 1)))):.0f} degrees elsewhere"
    alone = [view for view, count in zip(sorted(evidence.features), partners, strict=True) if count == 0]
    return text + (f"; alone: {evidence.named(alone)}" if alone else "")


def _exposure(evidence: Evidence, agreement: Agreement) -> str:
    gains = exposure_gains(evidence, agreement)
    views = sorted(gains, key=gains.__getitem__)
    spread = gains[views[-1]] / gains[views[0]]
    text = f"the same things are up to {spread:.2f} times as bright in one picture as in another"
    light = [picture.light for picture in evidence.pictures.values() if picture.light > 0]
    return text + (f"; EXIF: exposures up to {max(light) / min(light):.1f} times as long" if len(light) > 1 else "")


def _box(capture: Capture, evidence: Evidence) -> str:
    placement: Placement = evidence.placement
    transform = placement.transform
    centre = ", ".join(f"{value:.3g}" for value in transform.centre)
    inner = transform.side / 2 ** (placement.num_cascades - 1)
    text = f"{placement.reason}: side {inner:.3g} units of the source about ({centre})"
    if placement.num_cascades > 1:
        text += f"; the outermost of {placement.num_cascades} cubes has the side {transform.side:.3g}"
    if capture.metres:
        text += f" (1 unit is {capture.metres:.3g} m)"
    return f"{text}; a camera sees {np.mean(seen_cells(evidence)):.0%} of the inner one on average"


def _training(evidence: Evidence, scene: SceneConfig) -> str:
    cascades = evidence.placement.num_cascades
    if cascades > 1:
        text = f"surroundings are learned too: {cascades} cascades, steps that grow with distance"
    elif evidence.has_alpha:
        text = "random backgrounds behind what alpha leaves transparent; nothing outside the box"
    else:
        text = "a white background, as no image has alpha; nothing outside the box"
    if "held-out" in evidence.splits:
        return f"{text}; each {scene.hold_out_every}-th view is held out (--hold_out_every)"
    others = [split for split in ("test", "val") if split in evidence.splits]
    return text + (f"; evaluated on {others[0]}" if others else "; evaluated on the views that it is trained on")


# The drawing.


def _drawing(evidence: Evidence, agreement: Agreement | None, capture: Capture, found: Sequence[Finding]) -> Drawing:
    c2w = np.asarray(evidence.cameras.c2w, np.float64)
    corners = frusta(evidence.cameras)
    suspect = sorted({view for finding in found for view in finding.views})
    groups = []
    for split, (label, colour) in {**_SPLITS, "": _SUSPECT}.items():
        rows = [view for view, own in enumerate(evidence.splits) if own == split and view not in suspect]
        rows = rows if split else suspect
        groups += [Group(label, colour, corners[rows], c2w[rows, :, 1])] if rows else []
    points, colours = _points(evidence, agreement)
    return Drawing(
        groups, points, colours, focus(c2w), evidence.placement.num_cascades, evidence.placement.transform.side,
        f"{Path(capture.path).name}: {len(c2w)} views, {capture.format}", ", ".join(finding.code for finding in found),
        {evidence.names[view]: corners[view, 0] for view in suspect[:MAX_LABELS]},
    )  # fmt: skip


def _points(evidence: Evidence, agreement: Agreement | None) -> tuple[np.ndarray, np.ndarray]:
    """Points of the source, else those where the rays of matches meet, and their colours."""
    if evidence.points is not None and len(evidence.points):
        points = evidence.points[:: max(1, len(evidence.points) // MAX_POINTS)]
        return points, np.full((len(points), 3), 150, np.uint8)
    if agreement is None:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    return agreement.points(evidence, MAX_POINTS)


if __name__ == "__main__":
    flags.run("jaxngp.inspect", define_flags, main, __doc__, positional="scene")
