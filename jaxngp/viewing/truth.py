"""The views of a scene beside what a field makes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxngp.cameras import Cameras, PosedImages, image_size
from jaxngp.config import InputError
from jaxngp.data import Split
from jaxngp.evaluation import COLOURS, EvalBackground
from jaxngp.pictures import Image8, contact_sheet, error_image, hatched, to_uint8

SIDE = 640  # px, at most, of a picture in a comparison
LEAST_SIDE = 200


@dataclass(frozen=True, eq=False)
class View:
    """A training view, perhaps reduced: its camera, and its colours (H, W, 4) f32, if they could be read."""

    name: str
    camera: Cameras
    rgba: np.ndarray | None = None
    keep: np.ndarray | None = None  # (H, W) bool; None where no pixel is masked
    missing: str = ""  # why there are no colours


class Views:
    """The training views of a run: cameras at once, images when they are first asked for. For several threads.

    read: reads the views; raises InputError.
    """

    def __init__(self, cameras: Cameras | None, read: Callable[[], Split]) -> None:
        self.cameras = cameras
        self._read, self._lock = read, threading.Lock()
        self._split: Split | None = None
        self._missing = ""

    def __len__(self) -> int:
        return 0 if self.cameras is None else len(self.cameras)

    def view(self, number: int) -> View:
        """A view whose longer side has at most SIDE pixels."""
        assert self.cameras is not None
        split = self._images()
        camera, name = self.cameras[number], split.views[number] if split else f"view {number}"
        factor = -(-max(image_size(camera)) // SIDE)
        small = reduce_camera(camera, factor)
        if split is None:
            return View(name, small, missing=self._missing)
        assert isinstance(split.images, PosedImages)
        keep = split.images.mask(number)
        rgba = reduce_image(split.images.image(number).astype(np.float32) / 255, factor)
        # Where any pixel of a block is masked, the block is.
        return View(name, small, rgba, None if keep is None else reduce_image(keep[..., None], factor)[..., 0] == 1)

    def _images(self) -> Split | None:
        with self._lock:
            if self._split is None and not self._missing:
                try:
                    self._split = self._checked(self._read())
                except (InputError, OSError) as error:
                    self._missing = str(error)
            return self._split

    def _checked(self, split: Split) -> Split:
        """Raises InputError where the scene is no longer the one that was trained on."""
        mine, found = self.cameras, split.images.cameras if isinstance(split.images, PosedImages) else None
        same = mine is not None and found is not None and np.shape(mine.c2w) == np.shape(found.c2w)
        if not same or not np.allclose(np.asarray(mine.c2w), np.asarray(found.c2w), atol=1e-4):  # type: ignore[union-attr]
            raise InputError("the scene's files have changed since the run was trained: their views are others")
        return split


def reduce_image(image: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks of factor x factor pixels, (H, W, C) -> (H // factor, W // factor, C)."""
    height, width = (side // factor for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
    return np.asarray(blocks.mean(axis=(1, 3)))


def reduce_camera(camera: Cameras, factor: int) -> Cameras:
    """The camera of `reduce_image`."""
    return camera.replace(  # type: ignore[attr-defined]
        focal_xy=np.asarray(camera.focal_xy) / np.float32(factor),
        centre_xy=np.asarray(camera.centre_xy) / np.float32(factor),
        size=np.asarray(camera.size) // np.int32(factor),
    )


def over(rgba: np.ndarray, background: EvalBackground) -> np.ndarray:
    """Colours (H, W, 3) of (H, W, 4) before a background."""
    return rgba[..., :3] * rgba[..., 3:] + COLOURS[background] * (1 - rgba[..., 3:])


def compare(view: View, prediction: Any, background: EvalBackground) -> tuple[Image8, str]:
    """A sheet of truth, prediction (H, W, 3) in [0, 1] and error, and a line about it. Masked pixels are hatched."""
    predicted = np.clip(np.asarray(prediction), 0, 1)
    if view.rgba is None:
        return contact_sheet([[to_uint8(predicted)]], ["prediction"]), f"no image to compare with: {view.missing}"
    truth = over(view.rgba, background)
    square = (predicted - truth) ** 2
    pictures = [to_uint8(truth), to_uint8(predicted), error_image(predicted, truth)]
    said = ""
    if view.keep is not None:
        square = square[view.keep]
        pictures = [hatched(pictures[0], view.keep), pictures[1], hatched(pictures[2], view.keep)]
        said = f"; {1 - view.keep.mean():.0%} of the pixels are masked"
    quality = f"PSNR {-10 * np.log10(max(float(square.mean()), 1e-10)):.2f} dB" if square.size else "all masked"
    times = max(1, LEAST_SIDE // truth.shape[1])  # whole pixels, so that they stay what they are
    pictures = [picture.repeat(times, axis=0).repeat(times, axis=1) for picture in pictures]
    return contact_sheet([pictures], ["truth", "prediction", "error x 4"]), quality + said
