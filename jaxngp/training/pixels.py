"""Where the pixels to learn from are kept: on the device, or on the host, which then hands over what each call draws.

    DeviceStore(data) or HostStore(data, ...)    .views()     what the visual hull reads
                                                 .drawn(...)  what `nerf_steps` reads, a TrainingData

A call draws the same pixels from either, by their numbers, and so trains the same. Devices that share a program each
keep the pixels of some of the views, and tell the others what is drawn of them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp import processes
from jaxngp.cameras import Cameras, PosedImages, pixel_place
from jaxngp.config import ImagesOn, InputError
from jaxngp.data.on_disk import is_on_disk
from jaxngp.data.rays import RayTable
from jaxngp.device import Placement, default_placement, device_memory, over_shares
from jaxngp.visual_hull import PixelSet

DEVICE_SHARE = 0.5
"""Of the device's memory, that images may take; the rest is for the hull of as many pixels, the field and a step."""

READERS = 16
"""Threads that read what a call draws; a disk answers as many questions in the time of one."""


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


@struct.dataclass
class SharedPixels:
    """The pixels of views of which each device keeps some: all n of the views that are its own, or those of them
    that one call draws, in the order of drawing, where `first` is None.
    """

    cameras: Cameras  # (V,) of all views
    offset: jax.Array  # (V,) i32
    rgba: jax.Array  # (D, n) u32, or (D, K R), 0 where another device has the pixel
    depth: jax.Array | None  # (D, n) or (D, K R), likewise
    first: jax.Array | None  # (D,) i32, the number of the first pixel
    max_size: tuple[int, int] = struct.field(pytree_node=False)
    num_pixels: int = struct.field(pytree_node=False)  # P, of all views

    @property
    def source(self) -> Cameras:
        return self.cameras

    def pixel(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As of `PosedImages`."""
        rgba = lax.bitcast_convert_type(self._of_all(self.rgba, number), jnp.uint8)
        return *pixel_place(self, number), rgba.astype(jnp.float32) / 255

    def pixel_depth(self, number: jax.Array) -> jax.Array | None:
        """As of `PosedImages`."""
        return None if self.depth is None else self._of_all(self.depth, number).astype(jnp.float32)

    def _of_all(self, kept: jax.Array, number: jax.Array) -> jax.Array:
        """The values (R,) of pixels by their numbers (R,), each of which one device keeps."""
        if self.first is None:
            return over_shares(kept[0])
        place = number - self.first[0]
        own = (place >= 0) & (place < kept.shape[1])  # what fills the rows up is 0
        return over_shares(jnp.where(own, kept[0].at[jnp.maximum(place, 0)].get(mode="clip"), 0))


@struct.dataclass
class SharedSilhouettes:
    """`Silhouettes` of the views (D, v) that each device keeps; inside the program `own` are those of this one."""

    cameras: Cameras
    offset: jax.Array
    alpha: jax.Array | None
    keep: jax.Array | None
    first: jax.Array  # (D,) i32, the number of the first pixel among those of all views
    count: jax.Array  # (D,) i32, of the pixels
    max_size: tuple[int, int] = struct.field(pytree_node=False)
    num_pixels: int = struct.field(pytree_node=False)
    num_pixels_of_all: int = struct.field(pytree_node=False)

    @property
    def own(self) -> SharedSilhouettes:
        return jax.tree.map(lambda a: a[0], self)


TrainingData = PosedImages | RayTable | DrawnPixels | SharedPixels
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


class Shares:
    """How views are divided between devices that share a program.

    images: the views of this process. Those of all, in the order of the processes, are what is trained on, and each
    device has some that follow each other.
    """

    def __init__(self, images: PosedImages, place: Placement) -> None:
        assert place.mesh is not None
        self._images, self._place = images, place
        sizes = np.asarray(images.cameras.size).prod(axis=1)
        count = len(place.mesh.local_devices)
        if len(sizes) < count:
            raise InputError(f"{count} devices cannot share {len(sizes)} views: give a smaller --mesh")
        self._views = np.array_split(np.arange(len(sizes)), count)
        self.counts = np.array([sizes[views].sum() for views in self._views], np.int32)
        own = np.array([[sizes.sum(), self.counts.max(), len(self._views[0])]], np.int64)
        totals = np.concatenate(processes.gather(own))
        self._num_pixels, self._num_views = (int(most) for most in totals[:, 1:].max(axis=0))
        self._before = int(totals[: processes.index(), 0].sum())
        self.first = (self._before + np.cumsum(self.counts) - self.counts).astype(np.int32)
        cameras = jax.tree.map(lambda array: np.concatenate(processes.gather(np.asarray(array))), images.cameras)
        ends = np.cumsum(cameras.size.prod(axis=1), dtype=np.int64)
        self.static: Any = {"max_size": tuple(cameras.size.max(axis=0).tolist()), "num_pixels": int(ends[-1])}
        self.cameras, self.offset = place.put((cameras, (ends - cameras.size.prod(axis=1)).astype(np.int32)))

    def pixels(self, values: Any) -> Any:
        """What belongs to the pixels (P, ...) of this process, on the devices (D, n, ...); filled up with zeros."""
        if values is None:
            return None
        parts = np.split(np.asarray(values), np.cumsum(self.counts)[:-1])
        filled = [np.zeros((self._num_pixels, *values.shape[1:]), values.dtype) for _ in parts]
        for row, part in zip(filled, parts, strict=True):
            row[: len(part)] = part
        return self._place.put_shares(filled)

    def silhouettes(self) -> SharedSilhouettes:
        """What the visual hull reads; a device that has fewer views than another has its last one again."""
        alpha: Any = np.asarray(self._images.alpha)
        keep: Any = self._images.keep
        see_through, masked = processes.any_of(not opaque(self._images), keep is not None)
        keep = np.ones(len(alpha), bool) if masked and keep is None else keep
        views = [np.minimum(np.arange(v[0], v[0] + self._num_views), v[-1]) for v in self._views]
        offset = np.asarray(self._images.offset)
        put = self._place.put_shares
        return SharedSilhouettes(
            cameras=put([jax.tree.map(np.asarray, self._images.cameras[v]) for v in views]),
            offset=put([offset[v] - offset[v[0]] for v in views]),
            alpha=self.pixels(alpha if see_through else None),
            keep=self.pixels(keep if masked else None),
            first=put([*self.first]),
            count=put([*self.counts]),
            max_size=self.static["max_size"],
            num_pixels=self._num_pixels,
            num_pixels_of_all=self.static["num_pixels"],
        )

    def own(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the pixels (R,) are of this process, and their places in its arrays (R,), 0 for others."""
        place = numbers - self._before
        mine = (place >= 0) & (place < self.counts.sum())
        return mine, np.where(mine, place, 0)


class SharedStore:
    """The pixels of each view on one of the devices that share a program."""

    def __init__(self, images: PosedImages) -> None:
        shares = Shares(images, default_placement())
        self.views = shares.silhouettes
        self.data = SharedPixels(
            shares.cameras,
            shares.offset,
            rgba=shares.pixels(_words(images)),
            depth=shares.pixels(_depth(images)),
            first=default_placement().put_shares([*shares.first]),
            **shares.static,
        )

    def drawn(self, step: int, key: jax.Array, pixels: PixelSet | None) -> TrainingData:
        """What the call from a step on is given."""
        del step, key, pixels
        return self.data


class HostStore:
    """All pixels on the host, in memory or on its disk. Those of the next call are drawn and read ahead of it.

    Each process keeps those of its own views.
    """

    def __init__(self, images: PosedImages, draw: Drawing, *, steps_per_call: int, pixels_per_call: int) -> None:
        place = default_placement()
        self._images, self._draw, self._steps_per_call = images, draw, steps_per_call
        self._rgba, self._depth = _words(images), _depth(images)
        self._readers = ThreadPoolExecutor(READERS)
        self._ahead: tuple[int, list[Future]] = (-1, [])
        self._shares = Shares(images, place) if place.mesh is not None else None
        if self._shares:
            self._cameras, self._offset, self._static = self._shares.cameras, self._shares.offset, self._shares.static
        else:
            self._cameras, self._offset = place.put((images.cameras, images.offset))
            self._static = {"max_size": images.max_size, "num_pixels": images.num_pixels}
        self.data = self._put(self._begin_to_read(np.zeros(pixels_per_call, np.int32)))

    def views(self) -> Any:
        """What the visual hull reads of the views, on the device."""
        if self._shares:
            return self._shares.silhouettes()
        alpha: Any = None if opaque(self._images) else np.ascontiguousarray(self._images.alpha)
        alpha, keep = default_placement().put((alpha, self._images.keep))
        return Silhouettes(self._cameras, self._offset, alpha, keep, **self._static)

    def drawn(self, step: int, key: jax.Array, pixels: PixelSet | None) -> TrainingData:
        """What the call from a step on is given."""
        ahead, being_read = self._ahead
        if ahead != step:
            being_read = self._begin_to_read(self._draw(np.int32(step), key, pixels))
        # Before the steps of this call are queued on the device, behind which it would wait.
        following = step + self._steps_per_call
        self._ahead = following, self._begin_to_read(self._draw(np.int32(following), key, pixels))
        return self._put(being_read)

    def _begin_to_read(self, numbers: jax.Array | np.ndarray) -> list[Future]:
        """The pixels (K R,) by their numbers, in parts that are read side by side: a disk takes its time for each."""

        def read(part: int) -> dict[str, Any]:
            place = np.array_split(np.asarray(numbers), READERS)[part]
            own, place = self._shares.own(place) if self._shares else (None, place)
            kept = {"rgba": self._rgba, "depth": self._depth}
            # With a mode, numpy lets other threads run meanwhile.
            found = {name: None if a is None else np.take(a, place, mode="clip") for name, a in kept.items()}
            return found if own is None else jax.tree.map(lambda a: np.where(own, a, a.dtype.type(0)), found)

        return [self._readers.submit(read, part) for part in range(READERS)]

    def _put(self, being_read: list[Future]) -> TrainingData:
        """The pixels on the device."""
        found: Any = jax.tree.map(lambda *parts: np.concatenate(parts), *(part.result() for part in being_read))
        if self._shares:
            none = jax.tree.map(np.zeros_like, found)  # all comes from the first device of a process
            found = default_placement().put_shares([found, *[none] * (len(self._shares.counts) - 1)])
            return SharedPixels(self._cameras, self._offset, **found, first=None, **self._static)
        found["rgba"] = found["rgba"].view(np.uint8).reshape(-1, 4)
        return DrawnPixels(self._cameras, self._offset, **default_placement().put(found), **self._static)


def opaque(images: PosedImages) -> bool:
    """Whether all pixels are; looked at view by view, for all together may not fit into memory."""
    return all((images.image(view)[..., 3] == 255).all() for view in range(len(images.cameras)))


def _words(images: PosedImages) -> np.ndarray:
    """The pixels (P,) u32 of views: one read for four channels."""
    return np.ascontiguousarray(images.rgba).view(np.uint32).reshape(-1)


def _depth(images: PosedImages) -> np.ndarray | None:
    """The depths (P,) of views, 0 where only another process knows any."""
    (known,) = processes.any_of(images.depth is not None)
    if not known:
        return None
    depth = np.zeros(images.num_pixels) if images.depth is None else np.asarray(images.depth)
    return depth if processes.count() == 1 else depth.astype(np.float32)


def num_pixels_of_all(data: PosedImages | RayTable) -> int:
    """Of the views of all processes."""
    if isinstance(data, RayTable):
        return data.num_pixels
    return int(sum(part.sum() for part in processes.gather(np.array([data.num_pixels], np.int64))))


def on_host(data: PosedImages | RayTable, where: ImagesOn) -> bool:
    """Whether images are kept on the host: as `where` says, and for "auto" if they take too much of the device.

    Whether in its memory or on its disk was settled when they were read: raises InputError for "disk" and images in
    memory.
    """
    if not isinstance(data, PosedImages) or where == "device":
        return False
    if where == "disk" and not is_on_disk(data.rgba):
        raise InputError(
            "train.images_on = disk: the images are in memory; read them by load_training(images_on='disk')"
        )
    num_bytes = sum(array.nbytes for array in (data.rgba, data.keep, data.depth) if array is not None)
    num_bytes //= default_placement().local.num_shares
    room = device_memory() or (0 if is_on_disk(data.rgba) else np.inf)  # where nobody says, it is the host's
    (too_many,) = processes.any_of(num_bytes > DEVICE_SHARE * room)
    return where in ("host", "disk") or too_many
