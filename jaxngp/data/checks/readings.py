"""The usual ways to get the cameras of a capture wrong, each undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.data.checks.evidence import Evidence


@dataclass(frozen=True)
class Reading:
    """Another way to read the cameras of a capture."""

    code: str
    what: str  # the mistake, as a clause
    remedy: str
    cameras: Callable[[Cameras], Cameras]
    factor: float = 1.0  # of focal lengths
    centred: bool = False  # and of principal points


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
        yield focal_reading(factor, centred=False)
        yield focal_reading(factor, centred=True)


def focal_reading(factor: float, *, centred: bool) -> Reading:
    """Focal lengths, and if `centred` principal points, that are to be multiplied by a factor."""

    def scaled(cameras: Cameras) -> Cameras:
        found = _rescaled(cameras, factor)
        return found.replace(centre_xy=np.asarray(found.centre_xy) * np.float32(factor)) if centred else found  # type: ignore[attr-defined]

    return Reading(
        "focal_length",
        f"the focal length{' and the principal point fit when they are' if centred else ' fits when it is'} multiplied "
        f"by about {factor:.2g}, and may be that of another image size",
        "give fl_x, fl_y, cx, cy in pixels of these images, or give w and h of the size that they are of",
        scaled,
        factor=factor,
        centred=centred,
    )


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
