"""Where a browser window looks from: viser's poses to ours and back, and its camera at any size of picture.

Both are poses in scene units. Ours have x to the right and y up, and look along -z (OpenGL); viser's have y down and
look along z (OpenCV). A quaternion is w, x, y, z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jaxngp.cameras import Cameras, make_cameras

_FLIP = np.array([1.0, -1.0, -1.0])


def from_opencv(wxyz: ArrayLike, position: ArrayLike) -> np.ndarray:
    """c2w (3, 4) f64 of a pose as viser has it: a quaternion (4,) of any length but 0, and a position (3,)."""
    w, x, y, z = np.asarray(wxyz, np.float64) / np.linalg.norm(wxyz)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + 2 * w * cross + 2 * cross @ cross
    return np.column_stack([rotation * _FLIP, np.asarray(position, np.float64)])


def to_opencv(c2w: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `from_opencv`: a unit quaternion (4,) and a position (3,), f64."""
    matrix = np.asarray(c2w, np.float64)
    r = matrix[:, :3] * _FLIP
    # Four times the product of the quaternion with each of its numbers; the largest row loses no digits.
    rows = np.array(
        [
            [1 + r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], 1 + r[0, 0] - r[1, 1] - r[2, 2], r[1, 0] + r[0, 1], r[0, 2] + r[2, 0]],
            [r[0, 2] - r[2, 0], r[1, 0] + r[0, 1], 1 - r[0, 0] + r[1, 1] - r[2, 2], r[2, 1] + r[1, 2]],
            [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[2, 1] + r[1, 2], 1 - r[0, 0] - r[1, 1] + r[2, 2]],
        ]
    )
    row = rows[np.argmax(np.diag(rows))]
    return row / np.linalg.norm(row), matrix[:, 3]


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """A camera without lens, and the size of the window that it fills."""

    c2w: np.ndarray  # (3, 4)
    fov: float  # of the height, radians
    width: int  # px, of the window
    height: int

    def size(self, num_pixels: float) -> tuple[int, int]:
        """(width, height) of a picture of at most so many pixels, in the window's proportions, no larger than it."""
        scale = min(1.0, math.sqrt(num_pixels / (self.width * self.height)))
        return max(1, int(self.width * scale)), max(1, int(self.height * scale))

    def camera(self, width: int, height: int) -> Cameras:
        """The camera whose picture of this size fills the window exactly, once it is stretched over it."""
        half = math.tan(self.fov / 2)
        focal = width / (2 * half * self.width / self.height), height / (2 * half)
        return make_cameras(self.c2w, focal_xy=focal, centre_xy=(width / 2, height / 2), width=width, height=height)


def vertical_fov(camera: Cameras) -> float:
    """The angle of view of a single camera's height in radians, as if it had no lens."""
    return 2 * math.atan(float(camera.size[1]) / (2 * float(camera.focal_xy[1])))
