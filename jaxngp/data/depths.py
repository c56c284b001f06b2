"""The depth maps of a capture, as distances along the rays of its pixels in scene units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxngp.cameras import Cameras, image_size, view_rays
from jaxngp.config import InputError
from jaxngp.data.capture import DepthMap
from jaxngp.data.photos import (
    check_present,
    in_parallel,
    load_pixels,
    num_workers,
    open_image,
    read_exr,
    too_many_pixels,
)

DEPTH_MODES = ("I;16", "I;16B", "I;16L", "I", "F", "L")
ADVICE = "expected one channel: a 16-bit PNG, a TIFF of floats, an EXR or a .npy; export it so"


def read_depths(depths: Sequence[DepthMap | None], cameras: Cameras, side: float, label: str) -> np.ndarray:
    """The depth (P,) f16 of all pixels of all views: the distance along the pixel's ray, scene units; 0 where unknown.

    cameras: of the views, in scene units and of the size that the images are reduced to; of a depth map of another size
    each pixel takes the value nearest to its centre. side: world units of a scene unit. Unknown is what is not positive
    and finite in the file, without a depth map, and a depth along the axis of a ray that looks backward. In f16 a
    distance is off by 1/4096 of itself at most. Raises InputError where a map is missing or broken.
    """
    check_present([depth.file for depth in depths if depth], "depth map")

    def read(view: int) -> np.ndarray:
        depth, (width, height) = depths[view], image_size(cameras[view])
        if depth is None:
            return np.zeros(width * height, np.float16)
        stored = read_depth(depth.file)
        y, x = ((np.arange(n) + 0.5) * m / n for n, m in zip((height, width), stored.shape, strict=True))
        t = stored[y.astype(int)[:, None], x.astype(int)].astype(np.float64) * (depth.unit / side)
        with np.errstate(all="ignore"):
            if depth.along == "axis":
                cosine = np.asarray(view_rays(cameras[view]).direction) @ -np.asarray(cameras.c2w[view, :, 2])
                t = t / np.where(cosine > 0, cosine, np.nan)
            found = t.astype(np.float16)
        return np.where(np.isfinite(found) & (found > 0), found, 0).ravel()

    parts = in_parallel(read, len(depths), workers=num_workers(np.asarray(cameras.size)), label=label)
    return np.concatenate(parts)


def read_depth(path: Path) -> np.ndarray:
    """The values (H, W) of a depth map as it stores them. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct that") from None
    if magic == b"\x93NUMPY":
        values = _read_npy(path)
    elif magic.startswith(b"\x76\x2f\x31\x01"):
        values = _read_exr(path)
    else:
        with open_image(path, DEPTH_MODES, "16 bits of one channel") as image:
            values = load_pixels(path, image)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "uif":
        raise InputError(f"{path}: holds {values.dtype} of shape {values.shape}: {ADVICE}")
    return values


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a broken header leads to
        raise InputError(f"{path}: cannot be read as an array ({error}); {ADVICE}") from None


def _read_exr(path: Path) -> np.ndarray:
    def check_size(width: int, height: int) -> None:
        if fault := too_many_pixels(width, height, path.stat().st_size):
            raise InputError(f"{path}: {fault}")

    channels, _ = read_exr(path, check_size)
    names = [name for name in ("Z", "Y", "R") if name in channels] or [*channels][:1]
    if not names:
        raise InputError(f"{path}: has no channel; {ADVICE}")
    return channels[names[0]]
