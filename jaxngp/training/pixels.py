"""Where the pixels to learn from are kept: on the device, or on the host, which then hands over what each call draws.

    DeviceStore(data) or HostStore(data, ...)    .views()     what the visual hull reads
                                                 .drawn(...)  what `nerf_steps` reads, a TrainingData

A call draws the same pixels from either, by their numbers, and so trains the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxngp.cameras import Cameras, PosedImages, pixel_place
from jaxngp.config import ImagesOn
from jaxngp.data.rays import RayTable
from jaxngp.device import default_placement, device_memory
from jaxngp.visual_hull import PixelSet

DEVICE_SHARE = 0.5
"""Of the device's memory, that images may take; the rest is for the hull of as many pixels, the field and a step."""


@struct.dataclass
class DrawnPixels:
    """The pixels that one call draws, in the order of drawing; those of the views themselves are elsewhere."""

    cameras: Cameras  # (V,)
    offset: jax.Array  # (V,) i32
    rgba: jax.Array  # (K R, 4) u8
    depth: jax.Array | None  # (K R,) or None, as of `PosedImages`
    max_size: tuple[int, int] = struct.field(pytree_node=False)
    num_pixels: int = struct.field(pytree_node=False)  # P, of all views

    @property
    def source(self) -> Cameras:
        return self.cameras

    def pixel(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As of `PosedImages`, for the numbers (K R,) of exactly these pixels."""
        return *pixel_place(self, number), self.rgba.astype(jnp.float32) / 255

    def pixel_depth(self, number: jax.Array) -> jax.Array | None:
        """As of `PosedImages`, likewise."""
        del number
        return None if self.depth is None else self.depth.astype(jnp.float32)


@struct.dataclass
class Silhouettes:
    """What the visual hull reads of views: a byte a pixel, or none where all are opaque."""

    cameras: Cameras
    offset: jax.Array
    alpha: jax.Array | None
    keep: jax.Array | None
    max_size: tuple[int, int] = struct.field(pytree_node=False)
    num_pixels: int = struct.field(pytree_node=False)


def widened(images: PosedImages, share: float) -> Silhouettes:
    """What the visual hull reads of views whose cameras may be off: silhouettes wider by a share of an image's width.

    A pixel counts as empty only where all within so many pixels to either side, and up and down, are.
    """
    solid, sizes = np.asarray(images.alpha) > 0, np.asarray(images.cameras.size)
    parts = np.split(solid, np.asarray(images.offset)[1:])
    if not solid.all():
        parts = [_spread(a.reshape(h, w), round(share * w)).ravel() for a, (w, h) in zip(parts, sizes, strict=True)]
    alpha: Any = None if solid.all() else np.concatenate(parts).astype(np.uint8)
    cameras, offset, alpha, keep = default_placement().put((images.cameras, images.offset, alpha, images.keep))
    return Silhouettes(cameras, offset, alpha, keep, max_size=images.max_size, num_pixels=images.num_pixels)


def _spread(flags: np.ndarray, reach: int) -> np.ndarray:
    """(H, W) bool: whether a flag is set within so many places along either axis."""
    for _ in range(2):
        flags = flags.T
        counts = np.cumsum(np.pad(flags, ((reach + 1, reach), (0, 0))), axis=0, dtype=np.int32)
        flags = counts[2 * reach + 1 :] > counts[: -2 * reach - 1]
    return flags


TrainingData = PosedImages | RayTable | DrawnPixels
Drawing = Callable[[Any, jax.Array, PixelSet | None], jax.Array]
"""step () i32, key, the pixels to draw from -> the numbers (K R,) i32 of those that the call from this step draws."""


class DeviceStore:
    """All pixels on the device."""

    def __init__(self, data: PosedImages | RayTable) -> None:
        # Masks are in the set of pixels to draw from: no step reads them.
        self._keep = data.keep if isinstance(data, PosedImages) else None
        self.data: Any = default_placement().put(data if self._keep is None else data.replace(keep=None))  # type: ignore[union-attr]

    def views(self) -> Any:
        """The views, with their masks."""
        return self.data if self._keep is None else self.data.replace(keep=default_placement().put(self._keep))

    def drawn(self, step: int, key: jax.Array, pixels: PixelSet | None) -> TrainingData:
        """What the call from a step on is given."""
        del step, key, pixels
        return self.data


class HostStore:
    """All pixels on the host. The numbers of the next call are drawn ahead, so that it need not wait for them."""

    def __init__(self, images: PosedImages, draw: Drawing, *, steps_per_call: int, pixels_per_call: int) -> None:
        self._images, self._draw, self._steps_per_call = images, draw, steps_per_call
        self._rgba = np.ascontiguousarray(images.rgba).view(np.uint32).reshape(-1)  # one read for four channels
        self._ahead: dict[int, jax.Array] = {}
        self._cameras, self._offset = default_placement().put((images.cameras, images.offset))
        self._static: Any = {"max_size": images.max_size, "num_pixels": images.num_pixels}
        self.data = self._gather(np.zeros(pixels_per_call, np.int32))

    def views(self) -> Silhouettes:
        """What the visual hull reads of the views, on the device."""
        alpha: Any = np.asarray(self._images.alpha)
        alpha = None if (alpha == 255).all() else np.ascontiguousarray(alpha)
        alpha, keep = default_placement().put((alpha, self._images.keep))
        return Silhouettes(self._cameras, self._offset, alpha, keep, **self._static)

    def drawn(self, step: int, key: jax.Array, pixels: PixelSet | None) -> TrainingData:
        """What the call from a step on is given."""
        numbers = self._ahead.get(step)
        if numbers is None:
            numbers = self._draw(np.int32(step), key, pixels)
        # Before the steps of this call are queued on the device, behind which it would wait.
        following = step + self._steps_per_call
        self._ahead = {following: self._draw(np.int32(following), key, pixels)}
        return self._gather(np.asarray(numbers))

    def _gather(self, numbers: np.ndarray) -> DrawnPixels:
        rgba = self._rgba[numbers].view(np.uint8).reshape(-1, 4)
        depth = None if self._images.depth is None else np.asarray(self._images.depth)[numbers]
        rgba, depth = default_placement().put((rgba, depth))
        return DrawnPixels(self._cameras, self._offset, rgba, depth, **self._static)


def on_host(data: PosedImages | RayTable, where: ImagesOn) -> bool:
    """Whether images are kept on the host: as `where` says, and for "auto" if they take too much of the device."""
    if not isinstance(data, PosedImages) or where == "device":
        return False
    num_bytes = sum(array.nbytes for array in (data.rgba, data.keep, data.depth) if array is not None)
    return where == "host" or num_bytes > DEVICE_SHARE * (device_memory() or np.inf)
