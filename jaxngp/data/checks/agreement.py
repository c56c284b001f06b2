"""Whether cameras fit their pictures, and which misreading of a file would explain that they do not.

Corners that look alike in two images are seen along two rays, which meet before both cameras if the cameras are right.
Poses, focal lengths and lenses that are wrong in one of the usual ways are corrected in that way, one at a time, and
what makes far more rays meet is named. Rays meet or do not: how far the scene is matters to none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.data.checks.evidence import Evidence, view_directions
from jaxngp.data.checks.features import likely_pairs, match

PARTNERS = 5  # images that each is matched with
NEAR = 0.005  # of the longer side of an image: by so much a match may miss the line that it should lie on
FINE = 0.001  # likewise, at which a match counts half
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


@dataclass(frozen=True)
class Reading:
    """Another way to read the cameras of a capture."""

    code: str
    what: str  # the mistake, as a clause
    remedy: str
    cameras: Callable[[Cameras], Cameras]


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


def meet(c2w: np.ndarray, rays: np.ndarray, matches: Matches, focal: np.ndarray) -> Meeting:
    """How the rays (2, M, 3), in camera axes, of matches meet for poses (V, 3, 4).

    focal: (V,) of each view, in longer sides of its image, which turns angles into shares of it.
    """
    first, second = matches.views
    d1, d2 = (np.einsum("mij,mj->mi", c2w[v][:, :, :3], ray) for v, ray in zip(matches.views, rays, strict=True))
    apart = c2w[second][:, :, 3] - c2w[first][:, :, 3]
    n1, n2 = np.cross(apart, d1), np.cross(apart, d2)
    length1, length2 = (np.maximum(np.linalg.norm(n, axis=1), 1e-12) for n in (n1, n2))
    miss = np.maximum(
        np.abs(np.einsum("mi,mi->m", d2, n1)) / length1 * focal[second],
        np.abs(np.einsum("mi,mi->m", d1, n2)) / length2 * focal[first],
    )
    across = np.cross(d1, d2)
    sine = np.maximum(np.linalg.norm(across, axis=1), 1e-12)
    distance = np.stack([np.einsum("mi,mi->m", n2, across), np.einsum("mi,mi->m", n1, across)]) / sine**2
    angle = np.arctan2(sine, np.einsum("mi,mi->m", d1, d2))
    # Rays that are all but parallel meet so far away that the sign of the distance says nothing.
    before = (distance > 0).all(axis=0) | (sine * np.minimum(focal[first], focal[second]) < 2 * NEAR)
    fits = (miss < NEAR) & before & (np.linalg.norm(apart, axis=1) > 0)
    return Meeting(fits, fits / (1 + (miss / FINE) ** 2), miss, distance, angle)


def focal_shares(cameras: Cameras) -> np.ndarray:
    """(V,) focal lengths in longer sides of the image."""
    return np.asarray(cameras.focal_xy, np.float64).mean(axis=1) / np.asarray(cameras.size).max(axis=1)


# Readings.


def _posed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Cameras], Cameras]:
    """A reading that changes poses (V, 3, 4) f64 alone."""
    return lambda cameras: cameras.replace(c2w=change(np.asarray(cameras.c2w, np.float64)))  # type: ignore[attr-defined]


def _turned(axes: np.ndarray) -> Callable[[Cameras], Cameras]:
    """Of cameras whose own axes are others."""
    return _posed(lambda c2w: np.concatenate([c2w[..., :3] @ axes, c2w[..., 3:]], axis=-1))


def _inverse(c2w: np.ndarray) -> np.ndarray:
    back = np.swapaxes(c2w[..., :3], -1, -2)
    return np.concatenate([back, -back @ c2w[..., 3:]], axis=-1)


def _moved(axes: np.ndarray) -> Callable[[Cameras], Cameras]:
    """Of positions in other world axes than rotations are."""
    return _posed(lambda c2w: np.concatenate([c2w[..., :3], axes @ c2w[..., 3:]], axis=-1))


_FLIP = np.diag([1.0, -1.0, -1.0])  # between the camera axes of OpenGL and OpenCV


def _signed(order: Sequence[int], signs: Sequence[int]) -> np.ndarray:
    return np.eye(3)[list(order)] * np.array(signs)[:, None]


_ORDERS = [_signed(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
_EXPORT = "convert transform_matrix, or export it again"


def readings(evidence: Evidence) -> Iterator[Reading]:
    """The usual ways to get cameras wrong, undone: what is likelier comes first."""
    yield Reading(
        "opencv_axes",
        "the poses have the camera axes of OpenCV (y down, looking along +z), where those of OpenGL (y up, looking "
        "along -z) are expected",
        "negate the second and the third column of each rotation",
        _turned(_FLIP),
    )
    for axes, which in ((np.eye(3), "OpenGL"), (_FLIP, "OpenCV")):
        yield Reading(
            "world_to_camera",
            f"the matrices are world-to-camera (with the camera axes of {which}), where camera-to-world is expected",
            "invert each transform_matrix" + ("" if which == "OpenGL" else ", then negate its columns 2 and 3"),
            lambda cameras, axes=axes: _turned(axes)(_posed(_inverse)(cameras)),  # type: ignore[misc]
        )
    yield Reading(
        "inside_out",
        "the cameras look away from what they photographed: they are turned round by 180 degrees",
        "negate the first and the third column of each rotation",
        _turned(np.diag([-1.0, 1.0, -1.0])),
    )
    yield from _image_turns(evidence)
    yield from _quaternions()
    yield Reading(
        "transposed",
        "the rotations are transposed: they are those of world-to-camera matrices beside the positions of the cameras",
        "transpose the 3 x 3 part of each transform_matrix",
        _posed(lambda c2w: np.concatenate([np.swapaxes(c2w[..., :3], -1, -2), c2w[..., 3:]], axis=-1)),
    )
    yield Reading(
        "transposed",
        "the rotations are transposed, and have the camera axes of OpenCV",
        "transpose the 3 x 3 part of each transform_matrix, then negate its columns 2 and 3",
        _posed(lambda c2w: np.concatenate([np.swapaxes(c2w[..., :3], -1, -2) @ _FLIP, c2w[..., 3:]], axis=-1)),
    )
    yield from _mirrors()
    yield from _other_orders(evidence)
    yield from _lens_slots(evidence)


def _image_turns(evidence: Evidence) -> Iterator[Reading]:
    """Images that are turned against their poses: those that EXIF says are to be shown turned, or all."""
    tags = np.array([p.orientation if (p := evidence.pictures.get(v)) else 1 for v in range(len(evidence.names))])
    quarter = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # camera axes: x becomes y
    half = np.diag([-1.0, -1.0, 1.0])
    by_tag = {3: half, 6: quarter.T, 8: quarter}
    if set(np.unique(tags)) & set(by_tag):

        def as_shown(cameras: Cameras) -> Cameras:
            c2w, focal, centre = (np.array(a, np.float64) for a in (cameras.c2w, cameras.focal_xy, cameras.centre_xy))
            for tag, axes in by_tag.items():
                c2w[tags == tag, :, :3] = c2w[tags == tag, :, :3] @ axes
            swapped = (tags == 6) | (tags == 8)
            focal[swapped] = focal[swapped, ::-1]
            centre[tags == 3] = np.asarray(cameras.size)[tags == 3] - centre[tags == 3]
            return cameras.replace(c2w=c2w, focal_xy=focal.astype(np.float32), centre_xy=centre.astype(np.float32))  # type: ignore[attr-defined]

        for scaled in (False, True):
            yield Reading(
                "exif_rotation",
                f"the poses are those of the images as EXIF says they are to be shown, turned; {np.sum(tags > 1)} "
                "images are stored otherwise, and that is how they are read",
                "store the pixels turned and remove the tag, as 'mogrify -auto-orient' or 'exiftran -ai' does",
                as_shown if not scaled else lambda cameras: _rescaled(as_shown(cameras), _sides(cameras)),
            )
    for axes, what in ((half, "upside down"), (quarter, "by 90 degrees"), (quarter.T, "by 90 degrees, to the right")):
        yield Reading(
            "turned_images",
            f"the images are turned against their poses: {what}",
            "turn the images, or multiply the first two columns of each rotation accordingly",
            _turned(axes),
        )


def _sides(cameras: Cameras) -> np.ndarray:
    """(V, 1) height by width: by what a focal length from a field of view along the other side is wrong."""
    size = np.asarray(cameras.size, np.float64)
    return size[:, 1:] / size[:, :1]


def _quaternions() -> Iterator[Reading]:
    for back in (False, True):
        for colmap in (False, True):
            order = ("x, y, z, w were read as w, x, y, z", "w, x, y, z were read as x, y, z, w")[back]
            yield Reading(
                "quaternion_order",
                f"the rotations come from quaternions whose numbers {order}",
                "make the rotations anew, from quaternions with their real part where it belongs",
                _posed(lambda c2w, back=back, colmap=colmap: _reordered(c2w, back=back, colmap=colmap)),  # type: ignore[misc]
            )


def _reordered(c2w: np.ndarray, *, back: bool, colmap: bool) -> np.ndarray:
    """Poses whose quaternions are made from the same numbers, moved on by one place; colmap: of world-to-camera."""
    rotation = np.swapaxes(c2w[..., :3] @ _FLIP, -1, -2) if colmap else c2w[..., :3]
    quaternion = np.roll(to_quaternion(rotation), 1 if back else -1, axis=-1)
    turned = from_quaternion(quaternion)
    if not colmap:
        return np.concatenate([turned, c2w[..., 3:]], axis=-1)
    translation = -rotation @ c2w[..., 3:]
    back_turned = np.swapaxes(turned, -1, -2)
    return np.concatenate([back_turned @ _FLIP, -back_turned @ translation], axis=-1)


def _mirrors() -> Iterator[Reading]:
    names = ("x", "y", "z")
    for axis in range(3):
        signs = np.ones(3)
        signs[axis] = -1
        yield Reading(
            "mirrored",
            f"the {names[axis]} coordinates of the cameras' positions are negated, and their rotations are not",
            f"negate the {names[axis]} coordinate of each position",
            _moved(np.diag(signs)),
        )
    sides = (((-1, 1, 1), "left and right"), ((1, -1, 1), "above and below"), ((1, 1, -1), "near and far"))
    for mirror, what in sides:
        yield Reading(
            "mirrored",
            f"the images, or an axis of the world, are mirrored: {what} of the cameras are exchanged",
            "flip the images back, or remove the factor -1 of one axis from the conversion of the poses",
            _turned(np.diag(np.array(mirror, float))),
        )
    yield Reading(
        "mirrored",
        "the world is mirrored at a point",
        "remove the factor -1 from the conversion of the poses",
        _turned(-np.eye(3)),
    )
    for axes in _ORDERS:
        if not np.array_equal(axes, np.eye(3)):
            yield Reading(
                "axes",
                "the axes of the cameras are exchanged: "
                f"their x, y, z are {_described(axes)} of those of OpenGL (right, up, backward)",
                _EXPORT,
                _turned(axes),
            )
            yield Reading(
                "axes",
                f"positions and rotations are in different world axes: x, y, z of one are {_described(axes)} of the "
                "other",
                _EXPORT,
                _moved(axes),
            )


def _described(axes: np.ndarray) -> str:
    return ", ".join(("-" if row.sum() < 0 else "") + "xyz"[int(np.argmax(np.abs(row)))] for row in axes)


def _other_orders(evidence: Evidence) -> Iterator[Reading]:
    """Poses that belong to other images."""
    own = evidence.training
    for step in (1, -1):
        yield Reading(
            "pose_order",
            f"each image has the pose of the {'next' if step == 1 else 'previous'} one",
            "pair images and poses anew: a list is shifted by one, perhaps by an image that was left out",
            _permuted(own, np.roll(own, step)),
        )
    by_text = own[np.argsort([evidence.names[view] for view in own], kind="stable")]
    for there, here in ((own, by_text), (by_text, own)):
        if not np.array_equal(own, by_text):
            yield Reading(
                "pose_order",
                "the poses are in another order than the images: once 10 comes before 2, and once after it",
                "number the images with leading zeros, or pair images and poses by name",
                _permuted(there, here),
            )


def _permuted(there: np.ndarray, here: np.ndarray) -> Callable[[Cameras], Cameras]:
    def change(c2w: np.ndarray) -> np.ndarray:
        moved = np.array(c2w)
        moved[there] = c2w[here]
        return moved

    return _posed(change)


def _lens_slots(evidence: Evidence) -> Iterator[Reading]:
    """Coefficients of a lens in the places of others."""
    lens = evidence.cameras.lens
    if lens is None or lens.model not in ("perspective", "fisheye"):
        return
    k3, k4, p1, p2 = 2, 3, 7, 8
    for order, what in (
        ({p1: k3, p2: k4, k3: p1, k4: p2}, "p1, p2 and k3, k4 are exchanged"),
        ({p1: k3, p2: k4, k3: p2, k4: k4}, "k1, k2, p1, p2, k3 of OpenCV stand in the places of k1, k2, k3, k4, p1"),
        ({p1: k3, p2: k4, k3: p1}, "k1, k2, p1, p2, k3 of OpenCV stand in the places of k1, k2, k3, k4, p1"),
        ({k3: p1, p1: k3}, "p1 and k3 are exchanged"),
        ({p1: p2, p2: p1}, "p1 and p2 are exchanged"),
    ):
        source = np.arange(np.asarray(lens.coefficients).shape[-1])
        source[list(order)] = list(order.values())
        yield Reading(
            "lens_slots",
            f"the coefficients of the lens are in the wrong places: {what}",
            "compare k1, k2, k3, p1, p2 with the calibration, and correct the json",
            lambda cameras, source=source: cameras.replace(  # type: ignore[misc]
                lens=cameras.lens.replace(coefficients=np.asarray(cameras.lens.coefficients)[:, source])
            ),
        )
    yield Reading(
        "lens_undistorted",
        "the images are undistorted already, or the lens is not theirs: they fit without its coefficients",
        "set k1, k2, k3, p1, p2 to 0, or use the images as the camera took them",
        lambda cameras: cameras.replace(lens=None),  # type: ignore[attr-defined]
    )


_FOCAL_FACTORS = (0.25, 0.5, 2.0, 4.0, 0.35, 0.6, 0.7, 1.4, 1.6, 2.8)


def _rescaled(cameras: Cameras, factor: np.ndarray | float) -> Cameras:
    focal = np.asarray(cameras.focal_xy) * factor
    return cameras.replace(focal_xy=focal.astype(np.float32))  # type: ignore[attr-defined]


def focal_readings() -> Iterator[Reading]:
    """Focal lengths in pixels of other image sizes."""
    for factor in _FOCAL_FACTORS:
        for centred in (False, True):

            def scaled(cameras: Cameras, factor: float = factor, centred: bool = centred) -> Cameras:
                found = _rescaled(cameras, factor)
                return found.replace(centre_xy=np.asarray(found.centre_xy) * np.float32(factor)) if centred else found  # type: ignore[attr-defined]

            yield Reading(
                "focal_length",
                f"the focal length fits when it is multiplied by about {factor:g}"
                + (", and the principal point too" if centred else "")
                + ": it is probably that of another image size",
                "divide fl_x, fl_y, cx, cy by the factor by which the images were shrunk, or give w and h of the size "
                "that they are of",
                scaled,
            )


# Which reading fits.

SOME_MATCHES = 4000  # by which readings are compared
GAIN = 0.05  # of the score, that another reading must win at least
FACTOR = 1.3  # by which it must win more
MAJORITY = 0.8  # of the pairs of images in which it fits better or worse
GOOD = 0.3  # of the matches, that it must fit


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
        return meet(np.asarray(other.c2w, np.float64), own, some, focal_shares(other))

    best, best_meeting, own = None, meeting(cameras), meeting(cameras)
    if own.score.mean() < 1 / FACTOR:
        for reading in (*readings(evidence), *focal_readings()):
            found = meeting(reading.cameras(cameras))
            if found.score.mean() > 1.05 * best_meeting.score.mean() and _clearly(found, own, some.pair):
                best, best_meeting = reading, found
    whole = [_meet_all(other, matches) for other in (cameras, best.cameras(cameras) if best else cameras)]
    return Agreement(matches, whole[0], best, whole[1])


def _meet_all(cameras: Cameras, matches: Matches) -> Meeting:
    rays = camera_rays(cameras, matches)
    return meet(np.asarray(cameras.c2w, np.float64), rays, matches, focal_shares(cameras))


def _clearly(found: Meeting, before: Meeting, pair: np.ndarray) -> bool:
    """Whether a reading fits far better, and does so in most pairs of images."""
    score, own = float(found.score.mean()), float(before.score.mean())
    if score < max(own + GAIN, own * FACTOR) or found.fits.mean() < GOOD:
        return False
    change = np.bincount(pair, found.score) - np.bincount(pair, before.score)
    moved = np.abs(change) >= 1
    return int(moved.sum()) >= MIN_PAIRS and float(np.mean(change[moved] > 0)) >= MAJORITY


# Quaternions.


def to_quaternion(rotation: np.ndarray) -> np.ndarray:
    """(..., 4) w, x, y, z of rotations (..., 3, 3), by the eigenvector of Bar-Itzhack's matrix."""
    m = np.moveaxis(rotation, (-2, -1), (0, 1))
    xx, yy, zz = m[0, 0], m[1, 1], m[2, 2]
    a, b, c = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    d, e, f = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    rows = [[xx + yy + zz, a, b, c], [a, xx - yy - zz, d, e], [b, d, yy - xx - zz, f], [c, e, f, zz - xx - yy]]
    matrix = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    return np.linalg.eigh(matrix)[1][..., -1]


def from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) of quaternions (..., 4) w, x, y, z of unit length."""
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
