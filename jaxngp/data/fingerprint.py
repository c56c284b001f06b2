"""A fingerprint of what a run learns from, by which it notices that this changed in place."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from jaxngp.cameras import PosedImages
from jaxngp.data.rays import RayTable
from jaxngp.data.splits import Split

MAX_ROWS = 2**10
Fingerprint = dict[str, list[int]]


def fingerprint(views: Split | PosedImages | RayTable) -> Fingerprint:
    """A checksum of the pixels, masks and depths among them, and of the camera of each view, in their order, for JSON.

    A ray table has checksums of colours and rays instead: of each view, or of the whole where its image size is
    unknown.
    """
    images = views.images if isinstance(views, Split) else views
    if isinstance(images, RayTable):
        count = len(images.rgb) // (images.width * images.height or len(images.rgb))
        rays = np.concatenate([images.rays.origin, images.rays.direction], axis=1)
        return {
            "pixels": _checksums(np.split(np.asarray(images.rgb), count)),
            "rays": _checksums(np.split(rays, count)),
        }
    cameras = images.cameras
    more = [pixels for pixels in (images.keep, images.depth) if pixels is not None]
    numbers = [np.asarray(part, np.float32) for part in (cameras.focal_xy, cameras.centre_xy, cameras.size)]
    if cameras.lens is not None:
        numbers.append(np.asarray(cameras.lens.coefficients, np.float32))
    return {
        "pixels": _checksums(_of_views(images, images.rgba), *(_of_views(images, a) for a in more)),
        "poses": _checksums([*np.asarray(cameras.c2w)]),
        "intrinsics": _checksums([*np.concatenate(numbers, axis=-1)]),
    }


def content_fingerprint(**arrays: np.ndarray) -> Fingerprint:
    """A checksum of each array (N, ...), such as the pixels of an image or the vertices of a mesh.

    Of more than MAX_ROWS rows, so many evenly spread ones are read.
    """
    rows = {name: np.linspace(0, len(a) - 1, min(len(a), MAX_ROWS)).round().astype(int) for name, a in arrays.items()}
    shapes = {name: repr((array.shape, array.dtype.str)).encode() for name, array in arrays.items()}
    return {
        name: [zlib.crc32(np.asarray(a[rows[name]]).tobytes(), zlib.crc32(shapes[name]))] for name, a in arrays.items()
    }


def changed(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """A sentence that says how the views of two fingerprints differ, or None where they do not."""
    if old.keys() != new.keys():
        return "the data are of another kind than before"
    before, now = (len(next(iter(of.values()))) for of in (old, new))
    if before != now:
        return f"there are {now} views where there were {before}"
    counts = {part: sum(a != b for a, b in zip(old[part], new[part], strict=True)) for part in new}
    found = [f"{count} of {now} views have other {part}" for part, count in counts.items() if count]
    if now == 1:
        found = [f"it has other {part}" for part, count in counts.items() if count]
    return ", ".join(found) or None


def _of_views(images: PosedImages, pixels: Any) -> list[np.ndarray]:
    return np.split(np.asarray(pixels), np.asarray(images.offset)[1:])


def _checksums(*parts: list[np.ndarray]) -> list[int]:
    """Of each view, over all that belongs to it."""
    joined = (b"".join(np.ascontiguousarray(part).tobytes() for part in of) for of in zip(*parts, strict=True))
    return [zlib.crc32(content) for content in joined]
