"""A capture: the views of a scene as a format reads them, and the similarity that places them in the scene's box."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxngp.cameras import Cameras, focus
from jaxngp.config import MAX_LENGTH, SceneConfig

SPLITS = ("train", "val", "test")
TABLE_SIDE = 3.0  # world units: the box of NeRF-synthetic, whose rays a table mostly holds
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class RayRows:
    """Consecutive rows of a ray table's file as they are stored: one view, or the whole table of unknown image size."""

    path: Path
    rows: np.ndarray  # (N, 9) origin, direction, rgb; any float dtype, perhaps mapped from the file
    first: int  # the number of the first row in the file
    size: tuple[int, int]  # (width, height) px, or (0, 0)


@dataclass(frozen=True)
class Mask:
    """An image of one channel, of the size of its view's: which pixels take part."""

    file: Path
    keep: Literal["zero", "non-zero"]  # the values whose pixels take part; the others are as if not photographed


@dataclass(frozen=True)
class DepthMap:
    """A depth image or array of a view, of any size; 0 and what is not finite stand for unknown."""

    file: Path
    unit: float  # world units of a stored 1
    along: Literal["axis", "ray"]  # whether depths are measured along the optical axis or along each pixel's ray


@dataclass(frozen=True)
class Box:
    """A cube in the world that a format or a file says the scene lies in."""

    centre: tuple[float, float, float]  # world units
    side: float
    num_cascades: int = 1  # the innermost has the side / 2^(num_cascades - 1)


@dataclass(frozen=True, eq=False)
class Capture:
    """Views in the order of their names, in world units, before any pixel is read.

    A view is an image file with a camera, or the rows of a ray table. A table of unknown image size has rows but no
    view. Per-view tuples are as long as `names`, or empty where no view has such a thing.
    """

    path: Path  # the scene's folder or table
    names: tuple[str, ...]  # of each view, unique within a split
    splits: tuple[str, ...]  # of each view: train, val or test
    files: tuple[Path, ...] = ()  # the image of each view; empty for a ray table
    cameras: Cameras | None = None  # (V,) numpy, c2w and intrinsics f64, size that of the image file; None likewise
    has_alpha: tuple[bool, ...] = ()  # of each image
    alphas: tuple[Path | None, ...] = ()  # images whose red channel, linear, replaces the alpha of each view's
    reduced: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)  # by 2, 4, 8: the images so much smaller
    rays: tuple[RayRows, ...] = ()
    masks: tuple[Mask | None, ...] = ()
    depths: tuple[DepthMap | None, ...] = ()
    points: np.ndarray | None = None  # (N, 3) f64, world units: what structure from motion found
    box: Box | None = None
    up: tuple[float, float, float] | None = None  # the world direction that the source says is up
    metres: float | None = None  # of one world unit, where the source has a scale
    lens_models: tuple[str, ...] = ()  # the source's name of each view's lens, for messages
    format: str = ""  # the name of the dialect, for people
    unusual: tuple[str, ...] = ()  # one sentence per oddity of the input


@dataclass(frozen=True)
class SceneTransform:
    """The similarity from world to scene units, in which a cube of the world becomes [0, 1]^3.

    scene = rotation (world - centre) / side + 1/2. The default changes nothing.
    """

    centre: tuple[float, float, float] = (0.5, 0.5, 0.5)  # world units
    side: float = 1.0  # world units
    rotation: tuple[tuple[float, float, float], ...] = field(default=IDENTITY)  # rows, world to scene axes
    metres: float | None = None  # of one world unit, where the source has a scale

    def to_scene(self, position: np.ndarray) -> np.ndarray:
        """Points (..., 3) from world to scene units, f64."""
        return self._turned(np.asarray(position, np.float64) - self.centre) / self.side + 0.5

    def to_world(self, position: np.ndarray) -> np.ndarray:
        """Points (..., 3) from scene to world units, f64: the inverse of `to_scene`."""
        return (np.asarray(position, np.float64) - 0.5) * self.side @ np.array(self.rotation) + self.centre

    def pose_to_scene(self, c2w: np.ndarray) -> np.ndarray:
        """Poses (..., 3, 4) from camera-to-world to camera-to-scene, f64; their axes keep unit length."""
        axes = np.swapaxes(self._turned(np.swapaxes(np.asarray(c2w[..., :3], np.float64), -1, -2)), -1, -2)
        return np.concatenate([axes, self.to_scene(c2w[..., 3])[..., None]], axis=-1)

    def pose_to_world(self, c2w: np.ndarray) -> np.ndarray:
        """The inverse of `pose_to_scene`."""
        axes = np.array(self.rotation).T @ np.asarray(c2w[..., :3], np.float64)
        return np.concatenate([axes, self.to_world(c2w[..., 3])[..., None]], axis=-1)

    def _turned(self, vector: np.ndarray) -> np.ndarray:
        # The identity is left out: a product with it would turn -0 into 0, and rays would change their bits.
        return vector if self.rotation == IDENTITY else vector @ np.array(self.rotation).T

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it; `from_plain` gives the equal transform back."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> SceneTransform:
        """The transform that `to_plain` described."""
        x, y, z = map(float, plain["centre"])
        rows = ((float(a), float(b), float(c)) for a, b, c in plain["rotation"])
        metres = plain.get("metres")  # runs of earlier versions have none
        return cls((x, y, z), float(plain["side"]), tuple(rows), None if metres is None else float(metres))


@dataclass(frozen=True)
class Placement:
    """Where a capture lies in the scene's box."""

    transform: SceneTransform
    num_cascades: int = 1  # nested cubes that its distances ask for; the innermost is where the cameras look
    reason: str = ""  # for people
    given: bool = False  # by the user or by the source


FAR = 5  # cascades at most: the outermost cube is 16 times as wide as the innermost
INNER = 0.75  # side of the innermost cube, in distances of the cameras from what they look at
SEEN = 0.98  # of the points of structure from motion the cube is to hold; the farthest are mostly wrong
_AXES = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}


def normalise(capture: Capture, scene: SceneConfig) -> Placement:
    """Place a capture in the scene's box: as `scene` says, else as its source does, else by its cameras and points.

    By itself it is turned so that the cameras' mean up becomes +z, and centred where their optical axes meet. If the
    images have alpha, the box just holds what the cameras can see there. Otherwise the innermost cube is as wide as
    `INNER` times the cameras' distance, and the cubes around it are as many as hold the cameras and the points.
    """
    placement = _placed(capture, scene)
    return replace(placement, transform=replace(placement.transform, metres=capture.metres))


def _placed(capture: Capture, scene: SceneConfig) -> Placement:
    cameras = capture.cameras
    rotation = _upright(capture, scene)
    if scene.box_side:
        return Placement(
            SceneTransform(scene.box_centre, scene.box_side, rotation), reason="the box that was given", given=True
        )
    if capture.box is not None:
        transform = SceneTransform(capture.box.centre, capture.box.side / scene.scale, rotation)
        return Placement(transform, capture.box.num_cascades, "the box of its file", given=True)
    if cameras is None:
        return Placement(SceneTransform(scene.box_centre, TABLE_SIDE / scene.scale, rotation), reason="the default box")
    c2w = np.asarray(cameras.c2w, np.float64)
    centre = focus(c2w)
    distance = float(np.median(np.linalg.norm(c2w[:, :, 3] - centre, axis=1))) or 1.0
    if all(capture.has_alpha) and capture.has_alpha:
        size, focal = np.asarray(cameras.size, np.float64), np.asarray(cameras.focal_xy, np.float64)
        side = 2 * distance * float(np.median(np.max(0.5 * size / focal, axis=1)))
        reason, num_cascades = "as wide as the images, which have alpha, at the distance of the cameras", 1
    else:
        side = INNER * distance
        reach = [np.max(_reach(c2w[:, :, 3] - centre, rotation))]
        if capture.points is not None and len(capture.points):
            reach.append(np.quantile(_reach(capture.points - centre, rotation), SEEN))
        num_cascades = 1 + int(np.clip(np.ceil(np.log2(2 * max(reach) / side)), 1, FAR - 1))
        if len(reach) == 1:  # nobody knows how far it goes behind what the cameras look at
            num_cascades = min(num_cascades + 1, FAR)
        reason = f"{num_cascades} nested cubes about the point that the cameras look at"
    side = np.clip(side * 2 ** (num_cascades - 1) / scene.scale, 1 / MAX_LENGTH, MAX_LENGTH)
    x, y, z = np.clip(centre, -MAX_LENGTH, MAX_LENGTH).tolist()
    return Placement(SceneTransform((x, y, z), float(side), rotation), num_cascades, reason)


def _reach(offset: np.ndarray, rotation: tuple[tuple[float, float, float], ...]) -> np.ndarray:
    """(N,): half the side of an upright cube that holds a point (N, 3), however it is turned about the vertical."""
    x, y, z = (offset @ np.array(rotation).T).T
    return np.maximum(np.hypot(x, y), np.abs(z))


def _upright(capture: Capture, scene: SceneConfig) -> tuple[tuple[float, float, float], ...]:
    """The rotation, as rows, that turns what is up in the world to +z."""
    if scene.up != "auto":
        up = np.array(_AXES[scene.up[-1]]) * (-1 if scene.up[0] == "-" else 1)
    elif capture.up is not None:
        up = np.asarray(capture.up, np.float64)
    elif capture.box is not None or capture.cameras is None or scene.box_side:
        return IDENTITY  # who gives a box gives it in axes that have an up
    else:
        up = np.asarray(capture.cameras.c2w, np.float64)[:, :, 1].mean(axis=0)
    length = np.linalg.norm(up)
    if length < 1e-3:  # the cameras agree on none
        return IDENTITY
    x, y, z = up / length
    if z > 1 - 1e-12:
        return IDENTITY
    if z < -1 + 1e-9:
        return ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
    # Rodrigues' rotation about the horizontal axis that is at right angles to up.
    a, b, c = 1 - x * x / (1 + z), -x * y / (1 + z), 1 - y * y / (1 + z)
    return ((a, b, -x), (b, c, -y), (x, y, z))
