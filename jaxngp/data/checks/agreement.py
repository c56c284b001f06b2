"""Whether cameras fit their pictures, and which misreading of a file would explain that they do not.

Corners that look alike in two images are seen along two rays, which meet before both cameras if the cameras are right.
Poses, focal lengths and lenses that are wrong in one of the usual ways are corrected in that way, one at a time, and
what makes far more rays meet is named. Rays meet or do not: how far the scene is matters to none of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.data.checks.evidence import Evidence, view_directions
from jaxngp.data.checks.features import likely_pairs, match
from jaxngp.data.checks.readings import Reading, focal_reading, focal_readings, readings

PARTNERS = 5  # images that each is matched with
NEAR = 0.005  # of the longer side of an image: by so much a match may miss the line that it should lie on
FINE = 0.001  # likewise, at which a match counts half
ROUNDING = 1e-9  # of a camera's distance from the origin, by which float64 may place it elsewhere, and far more
_STEEP = 0.02  # of the cosine of the angle to the optical axis, at least
MIN_MATCHES = 12  # of two images, or they say nothing
MIN_PAIRS = 6  # of images, or nothing is said


@dataclass(frozen=True, eq=False)
class Matches:
    """Corners that look alike, M in all, ordered by the pairs of images that they are of."""

    views: np.ndarray  # (2, M) numbers of the views
    xy: np.ndarray  # (2, M, 2) in shares of the width and height of the image
    pair: np.ndarray  # (M,) the number of the pair of images
    pixels: np.ndarray  # (2, M, 2) int, the pixel of the reduced picture

    def some(self, most: int) -> Matches:
        """About so many of them, from all pairs."""
        step = max(1, len(self.pair) // most)
        return Matches(self.views[:, ::step], self.xy[:, ::step], self.pair[::step], self.pixels[:, ::step])

    @property
    def num_pairs(self) -> int:
        """How many pairs of images have matches."""
        return int(self.pair[-1]) + 1 if len(self.pair) else 0


@dataclass(frozen=True, eq=False)
class Meeting:
    """How the rays of matches meet."""

    fits: np.ndarray  # (M,) bool, within NEAR and before both cameras
    score: np.ndarray  # (M,) in [0, 1], how well: 1 where it fits exactly, 0 where not at all
    miss: np.ndarray  # (M,) by how much of the longer side of an image they miss each other
    distance: np.ndarray  # (2, M) from each camera to where they meet; negative behind it
    angle: np.ndarray  # (M,) between the rays, radians


@dataclass(frozen=True, eq=False)
class Agreement:
    """What the matches of a capture say of its cameras."""

    matches: Matches
    meeting: Meeting  # by the cameras as they are read
    better: Reading | None  # that fits far better
    better_meeting: Meeting  # by its cameras; the same as `meeting` where there is none

    @property
    def fitting(self) -> float:
        """The share of the matches that fit the cameras as they are read."""
        return float(self.meeting.fits.mean())

    def points(self, evidence: Evidence, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Where rays of matches meet at an angle, (N, 3) in scene units, and their colours (N, 3) u8."""
        meeting, matches = self.meeting, self.matches
        chosen = np.flatnonzero(meeting.fits & (meeting.angle > np.radians(1.5)))
        chosen = chosen[:: max(1, len(chosen) // most)]
        view = matches.views[0][chosen]
        rays = camera_rays(evidence.cameras, matches)[0][chosen]
        poses = evidence.poses[view]
        world = poses[:, :, 3] + np.einsum("mij,mj->mi", poses[:, :, :3], rays) * meeting.distance[0][chosen, None]
        pixels = [
            evidence.pictures[v].rgba[y, x, :3]
            for v, (x, y) in zip(view.tolist(), matches.pixels[0][chosen], strict=True)
        ]
        return evidence.placement.transform.to_scene(world), np.array(pixels, np.uint8).reshape(-1, 3)


def find_matches(evidence: Evidence) -> Matches:
    """Corners that look alike in training images that seem to show the same."""
    views = sorted(evidence.features)
    features = [evidence.features[view] for view in views]
    parts = []
    for i, j in likely_pairs(features, PARTNERS) if len(views) > 1 else []:
        found = match(features[i], features[j])
        if len(found) >= MIN_MATCHES:
            parts.append((views[i], views[j], features[i].xy[found[:, 0]], features[j].xy[found[:, 1]]))
    if not parts:
        return Matches(np.zeros((2, 0), int), np.zeros((2, 0, 2)), np.zeros(0, int), np.zeros((2, 0, 2), int))
    counts = [len(part[2]) for part in parts]
    seen = np.array([np.repeat([part[side] for part in parts], counts) for side in (0, 1)])
    xy = np.array([np.concatenate([part[2 + side] for part in parts]) for side in (0, 1)])
    sizes = np.array(
        [evidence.pictures[view].size if view in evidence.pictures else (1, 1) for view in range(len(evidence.names))]
    )
    return Matches(seen, xy / sizes[seen], np.repeat(np.arange(len(parts)), counts), xy.astype(np.int64))


# Rays.


def camera_rays(cameras: Cameras, matches: Matches) -> np.ndarray:
    """The directions (2, M, 3) in camera axes in which views see matches."""
    return view_directions(cameras, matches.views.ravel(), matches.xy.reshape(-1, 2)).reshape(2, -1, 3)


def meet(cameras: Cameras, rays: np.ndarray, matches: Matches) -> Meeting:
    """How the rays (2, M, 3), in camera axes, of matches meet."""
    c2w, focal = np.asarray(cameras.c2w, np.float64), focal_shares(cameras)
    flat = cameras.lens is None or cameras.lens.model not in ("fisheye", "equirectangular")
    first, second = matches.views
    d1, d2 = (np.einsum("mij,mj->mi", c2w[v][:, :, :3], ray) for v, ray in zip(matches.views, rays, strict=True))
    apart = c2w[second][:, :, 3] - c2w[first][:, :, 3]
    # From one place, things are seen along one ray. Of cameras that a reading puts there, rounding leaves a distance.
    at_once = np.linalg.norm(apart, axis=1) <= ROUNDING * np.linalg.norm(c2w[first][:, :, 3], axis=1)
    apart = np.where(at_once[:, None], 0.0, apart)
    n1, n2 = np.cross(apart, d1), np.cross(apart, d2)

    def distance_to_line(view: np.ndarray, ray: np.ndarray, direction: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """From where a ray is in its image to the line that the other one is seen as, in longer sides."""
        normal = normal / np.maximum(np.linalg.norm(normal, axis=1), 1e-12)[:, None]
        sine = np.abs(np.einsum("mi,mi->m", direction, normal)) * focal[view]
        if not flat:  # there an angle is as long everywhere
            return sine
        # A plane is farther away where it is looked at from the side: else small focal lengths would seem to fit.
        along = np.einsum("mi,mi->m", normal, c2w[view][:, :, 2])
        return sine / np.maximum(-ray[:, 2] * np.sqrt(np.maximum(1 - along**2, 0)), _STEEP)

    miss = np.maximum(distance_to_line(second, rays[1], d2, n1), distance_to_line(first, rays[0], d1, n2))
    across = np.cross(d1, d2)
    miss = np.where(at_once, np.linalg.norm(across, axis=1) * np.minimum(focal[first], focal[second]), miss)
    sine = np.maximum(np.linalg.norm(across, axis=1), 1e-12)
    distance = np.stack([np.einsum("mi,mi->m", n2, across), np.einsum("mi,mi->m", n1, across)]) / sine**2
    angle = np.arctan2(sine, np.einsum("mi,mi->m", d1, d2))
    # Rays that are all but parallel meet so far away that the sign of the distance says nothing.
    before = (distance > 0).all(axis=0) | (sine * np.minimum(focal[first], focal[second]) < 2 * NEAR)
    fits = (miss < NEAR) & before
    return Meeting(fits, fits / (1 + (miss / FINE) ** 2), miss, distance, angle)


def focal_shares(cameras: Cameras) -> np.ndarray:
    """(V,) focal lengths in longer sides of the image."""
    return np.asarray(cameras.focal_xy, np.float64).mean(axis=1) / np.asarray(cameras.size).max(axis=1)


# Which reading fits.

SOME_MATCHES = 4000  # by which readings are compared
GAIN = 0.05  # of the score, that another reading must win at least
FACTOR = 1.3  # by which it must win more
MAJORITY = 0.8  # of the pairs of images in which it fits better or worse
GOOD = 0.3  # of the matches, that it must fit
RIGHT = 0.9  # of the matches: cameras that fit so many are read rightly, though another reading may fit them closer


def examine(evidence: Evidence) -> Agreement | None:
    """How the cameras fit the pictures, and what fits far better; None where too little looks alike to say."""
    matches = find_matches(evidence)
    if matches.num_pairs < MIN_PAIRS:
        return None
    # In the axes that the file has: some readings depend on them.
    cameras = evidence.cameras.replace(c2w=evidence.poses)  # type: ignore[attr-defined]
    some = matches.some(SOME_MATCHES)
    rays = camera_rays(cameras, some)

    def meeting(other: Cameras) -> Meeting:
        """How some of the matches meet."""
        same = all(getattr(other, name) is getattr(cameras, name) for name in ("focal_xy", "centre_xy", "lens"))
        own = rays if same else camera_rays(other, some)
        return meet(other, own, some)

    own = meeting(cameras)
    best, best_meeting = None, own
    if own.score.mean() < 1 / FACTOR and own.fits.mean() < RIGHT:
        for reading in (*readings(evidence), *focal_readings()):
            found = meeting(reading.cameras(cameras))
            if found.score.mean() > 1.05 * best_meeting.score.mean() and _clearly(found, own, some.pair):
                best, best_meeting = reading, found
    if best and best.code == "focal_length":  # among coarse factors; now a finer one
        finer = [focal_reading(best.factor * change, centred=best.centred) for change in np.geomspace(0.8, 1.25, 19)]
        best = max(finer, key=lambda reading: meeting(reading.cameras(cameras)).score.mean())
    whole = [_meet_all(other, matches) for other in (cameras, best.cameras(cameras) if best else cameras)]
    return Agreement(matches, whole[0], best, whole[1])


def _meet_all(cameras: Cameras, matches: Matches) -> Meeting:
    return meet(cameras, camera_rays(cameras, matches), matches)


def _clearly(found: Meeting, before: Meeting, pair: np.ndarray) -> bool:
    """Whether a reading fits far better, and does so in most pairs of images."""
    score, own = float(found.score.mean()), float(before.score.mean())
    if score < max(own + GAIN, own * FACTOR) or found.fits.mean() < GOOD:
        return False
    change = np.bincount(pair, found.score) - np.bincount(pair, before.score)
    moved = np.abs(change) >= 1
    return int(moved.sum()) >= MIN_PAIRS and float(np.mean(change[moved] > 0)) >= MAJORITY
