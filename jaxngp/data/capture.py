"""A capture: the views of a scene as a format reads them, and the similarity that places them in the scene's box."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.config import SceneConfig

SPLITS = ("train", "val", "test")
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
        return cls((x, y, z), float(plain["side"]), tuple(rows))


def normalise(capture: Capture, scene: SceneConfig) -> SceneTransform:
    """How a capture is placed in the scene's box: today the box that `scene` names, whatever the capture is."""
    del capture
    return SceneTransform(scene.box_centre, scene.box_side)
