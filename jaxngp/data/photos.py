"""The image files of a capture: sizes from their headers, and pixels, decoded in parallel and reduced as they come.

Pictures, and the masks that say which of their pixels take part; depth maps are in `depths`.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxngp.config import ImagesOn, InputError
from jaxngp.data import on_disk
from jaxngp.data.capture import Mask

# Recognised by the first bytes, whatever a file is called. Pillow knows many more; for one of them it runs Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ALPHA_MODES = ("RGBA", "LA", "PA")
DEEP_MODES = ("I;16", "I;16L", "I;16B")
IMAGE_MODES = (*ALPHA_MODES, *DEEP_MODES, "RGB", "L", "P")
PIXELS_AT_ONCE = 2**27  # that threads decode side by side; a pixel takes up to 16 bytes meanwhile
MEMORY_SHARE = 0.5  # of the memory that is left, which the pixels of a split may take
PLAIN_PIXELS = 2**24  # with more, an image needs a byte for ...
PIXELS_PER_BYTE = 1000  # ... so many; a header of a few bytes may promise any number, and a decoder make them up

_SRGB = np.arange(256) / 255
_LINEAR = (255 * np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)).astype(np.uint8)

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class ImageHeaders:
    """What the headers of V image files say."""

    sizes: np.ndarray  # (V, 2) i64, width and height of the stored pixels
    has_alpha: tuple[bool, ...]
    notes: tuple[str, ...]  # a sentence on what is unusual about some of them


def probe_images(files: Sequence[Path]) -> ImageHeaders:
    """What the headers of images say; their pixels are not decoded.

    Raises InputError where images are missing, are not files, or are of no supported kind.
    """
    check_present(files)

    def probe(view: int) -> tuple[tuple[int, int], bool, bool, bool]:
        with open_image(files[view]) as image:
            has_alpha = image.mode in ALPHA_MODES or "transparency" in image.info
            return image.size, has_alpha, orientation(image) > 1, image.mode in DEEP_MODES

    sizes, has_alpha, turned, deep = zip(*in_parallel(probe, len(files), workers=8), strict=True)
    notes = [
        f"{files[flags.index(True)]}: {what}; so {'do' if sum(flags) > 2 else 'does'} {sum(flags) - 1} more"
        if sum(flags) > 1
        else f"{files[flags.index(True)]}: {what}"
        for flags, what in (
            (turned, "says in EXIF that it is to be shown turned; its pixels are taken as they are stored"),
            (deep, "has 16 bits per channel, of which 8 are used"),
        )
        if any(flags)
    ]
    return ImageHeaders(np.array(sizes, np.int64), has_alpha, tuple(notes))


def orientation(image: Image.Image) -> int:
    """The orientation that EXIF says, 1 where it says none."""
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF raises whatever it likes, and says nothing
        return 1


def read_images(
    files: Sequence[Path],
    sizes: np.ndarray,
    downscale: int,
    label: str,
    alphas: Sequence[Path | None] = (),
    *,
    on: ImagesOn = "auto",
) -> np.ndarray:
    """The pixels (P, 4) u8 of all images one after the other, reduced; an image without alpha gets alpha 255.

    sizes: (V, 2), as `probe_images` found them. label: for the progress bar. alphas: of each view or of none, an image
    of the same size whose red channel, from sRGB to linear, is the view's alpha. on: "disk" keeps the pixels in a file,
    and so does "auto" where they would take more than half of the memory that is left. Raises InputError where
    `downscale` does not divide a size, or an image is broken.
    """
    for width, height in np.unique(sizes, axis=0).tolist():
        _check_divides(width, height, downscale, label)
    ends = np.cumsum([width * height // downscale**2 for width, height in sizes.tolist()])
    on_file = on == "disk" or (on == "auto" and 4 * ends[-1] > MEMORY_SHARE * on_disk.memory_left())
    rgba = (on_disk.empty if on_file else np.empty)((int(ends[-1]), 4), np.uint8)

    def read(view: int) -> None:
        size = tuple(sizes[view].tolist())
        pixels = _decode(files[view], size)
        if alphas and (alpha := alphas[view]):
            red = _decode(alpha, size)[..., 0]
            pixels = np.concatenate([pixels[..., :3], _LINEAR[red][..., None]], axis=-1)
        pixels = box_downscale(pixels, downscale).reshape(-1, 4)
        rgba[ends[view] - len(pixels) : ends[view]] = pixels

    # An image is reduced as soon as it is read, so few are held at full size.
    in_parallel(read, len(files), workers=num_workers(sizes), label=label)
    return rgba


def read_masks(masks: Sequence[Mask | None], sizes: np.ndarray, downscale: int, label: str) -> list[np.ndarray]:
    """Which pixels of each view take part, (H, W) bool, reduced: all that are made of such pixels alone.

    masks: of each view; None masks nothing. sizes: (V, 2), of the views' images. label: for the progress bar. Raises
    InputError where a mask is missing, broken, or of another size than its image.
    """
    check_present([mask.file for mask in masks if mask], "mask")
    for width, height in np.unique(sizes, axis=0).tolist():
        _check_divides(width, height, downscale, label)

    def read(view: int) -> np.ndarray:
        mask, (width, height) = masks[view], sizes[view].tolist()
        if mask is None:
            return np.ones((height // downscale, width // downscale), bool)
        keep = _decode_mask(mask.file, (width, height)) == (mask.keep == "non-zero")
        return keep.reshape(height // downscale, downscale, width // downscale, downscale).all(axis=(1, 3))

    return in_parallel(read, len(masks), workers=num_workers(sizes), label=label)


def num_workers(sizes: np.ndarray) -> int:
    """Threads that decode images of these sizes (V, 2) side by side. Pillow and zlib release the GIL."""
    return min(8, os.cpu_count() or 1, max(1, PIXELS_AT_ONCE // int(sizes.prod(axis=1).max())))


def box_downscale(rgba: np.ndarray, downscale: int) -> np.ndarray:
    """Means over downscale x downscale pixels, colours weighted by alpha. rgba (H, W, 4) u8 -> (H/d, W/d, 4) u8.

    This is the box filter on colours that are multiplied by alpha, divided by the mean alpha; where all of a block
    is transparent its colour is 0.
    """
    if downscale == 1:
        return rgba
    # Integers, whose sums are exact; a channel at a time, which is three times as fast as all four together.
    alpha = rgba[..., 3].astype(np.uint16)
    weight = _block_sums(alpha, downscale)
    reduced = np.empty((*weight.shape, 4), np.uint8)
    for channel in range(3):
        colour = _block_sums(rgba[..., channel] * alpha, downscale)
        reduced[..., channel] = np.rint(colour / np.maximum(weight, 1))
    reduced[..., 3] = np.rint(weight / downscale**2)
    return reduced


def _block_sums(plane: np.ndarray, size: int) -> np.ndarray:
    """Sums over size x size blocks. plane (H, W) u16 -> (H/s, W/s) u32, or u64 where those could overflow."""
    height, width = plane.shape
    rows = np.zeros((height // size, width), np.uint32 if size <= 256 else np.uint64)
    for offset in range(size):
        rows += plane[offset::size]
    return sum(rows[:, offset::size] for offset in range(1, size)) + rows[:, ::size]


def in_parallel(call: Callable[[int], Result], count: int, *, workers: int, label: str = "") -> list[Result]:
    """call(0) ... call(count - 1), with a progress bar where it takes long and has a label."""
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(call, range(count))
        return [*tqdm(done, label, count, delay=1.0, disable=None if label else True, leave=False, unit="image")]


def check_present(files: Sequence[Path], what: str = "image") -> None:
    """Raises InputError for the first file that is missing, or is none."""
    if missing := [file for file in files if not os.path.exists(file)]:  # noqa: PTH110 - Path's raises for a long name
        more = f", and {len(missing) - 1} more of {len(files)} are" if len(missing) > 1 else ""
        raise InputError(
            f"{missing[0]}: the {what} is missing{more}{_sibling(missing[0])}; "
            f"put the {what}s there, or take their frames out of the json"
        )
    for file in files:
        if not file.is_file():  # reading a pipe would wait for ever
            raise InputError(f"{file}: is not a file; put the {what} there, or take its frame out of the json")


def _sibling(file: Path) -> str:
    """A hint at a file of the same name and another extension, if there is one."""
    names = [file.stem + suffix for suffix in IMAGE_SUFFIXES] + [
        file.stem + suffix.upper() for suffix in IMAGE_SUFFIXES
    ]
    found = next((name for name in names if os.path.isfile(file.parent / name)), None)  # noqa: PTH113 - as above
    return f" (but {found} is there: give that extension in file_path)" if found else ""


def _check_divides(width: int, height: int, downscale: int, label: str) -> None:
    if width % downscale or height % downscale:
        common = math.gcd(width, height)
        divisors = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise InputError(
            f"scene.downscale = {downscale}: does not divide the {width}x{height} images of {label}; "
            f"use one of {divisors}"
        )


def _decode(file: Path, size: tuple[int, ...]) -> np.ndarray:
    """The pixels (H, W, 4) u8 of an image."""
    with open_image(file) as image:
        if image.size != size:
            expected = f"is {image.width}x{image.height}: expected {size[0]}x{size[1]}"
            raise InputError(f"{file}: {expected}; scale it, or run again if it was changed just now")
        if image.mode in DEEP_MODES:
            image = Image.fromarray(_in_8_bits(load_pixels(file, image)))
        return load_pixels(file, image, "RGBA")


def _in_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey of 16 bits, rounded to 8."""
    return ((pixels.astype(np.int32) + 128) // 257).astype(np.uint8)


def _decode_mask(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Where a mask (H, W) is not black, bool."""
    with open_image(file, (*IMAGE_MODES, "1"), "one channel of 8 bits") as image:
        if image.size != size:
            raise InputError(
                f"{file}: the mask is {image.width}x{image.height} and its image {size[0]}x{size[1]}: expected one "
                "size; scale the mask, without interpolation"
            )
        if image.mode not in ALPHA_MODES and "transparency" not in image.info:
            pixels = load_pixels(file, image, "RGB" if image.mode == "P" else None)
            return np.any(pixels.reshape(size[1], size[0], -1), axis=2)
        pixels = load_pixels(file, image, "RGBA")
    if (pixels[..., 3] < 255).any():  # is it alpha that masks, or the colour below it?
        raise InputError(f"{file}: the mask has transparent pixels: expected one channel; export it without alpha")
    return np.any(pixels[..., :3], axis=2)


def load_pixels(file: Path, image: Image.Image, mode: str | None = None) -> np.ndarray:
    """The pixels of an opened image, converted to a mode if one is given. Raises InputError where it is broken."""
    try:
        return np.asarray(image.convert(mode) if mode else image)
    except MemoryError:
        raise
    except Exception as error:  # a decoder met with a broken file raises whatever it likes
        raise InputError(f"{file}: broken or truncated ({error}); render or download it again") from None


def open_image(file: Path, modes: Sequence[str] = IMAGE_MODES, wanted: str = "8-bit RGBA") -> Image.Image:
    """An image whose header is read and whose pixels are not. Raises InputError where it is not of one of the modes."""
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except Exception as error:  # as above; a decompression bomb is found here too
        raise InputError(f"{file}: cannot be read as an image ({error}); render or download it again") from None
    fault = too_many_pixels(image.width, image.height, file.stat().st_size)
    if not fault and image.mode not in modes:
        fault = f"pixel format {image.mode!r} is not supported; convert it to {wanted}"
    if fault:
        image.close()
        raise InputError(f"{file}: {fault}")
    return image


def too_many_pixels(width: int, height: int, num_bytes: int) -> str:
    """What is wrong with an image of this size in a file of so many bytes, or nothing."""
    if width * height <= min(max(PLAIN_PIXELS, PIXELS_PER_BYTE * num_bytes), Image.MAX_IMAGE_PIXELS or math.inf):
        return ""
    return f"{width}x{height} pixels are too many, at all or for {num_bytes} bytes; scale it down"


def read_exr(path: Path, check_size: Callable[[int, int], None]) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """The channels of the first part of an EXR by their names, as they are stored, and the image's (H, W).

    A channel is an array (H, W), or a smaller one where it is subsampled.

    check_size: raises for a width and a height, before any pixel is read. Raises InputError where the file is broken,
    or OpenEXR is not installed.
    """
    try:
        import OpenEXR
    except ImportError:
        raise InputError(f"{path}: an EXR needs the OpenEXR package; pip install '.[image]'") from None
    try:
        with OpenEXR.File(str(path), separate_channels=True, header_only=True) as file:
            low, high = file.header()["dataWindow"]
        width, height = (int(b) - int(a) + 1 for a, b in zip(low, high, strict=True))
        check_size(width, height)
        with OpenEXR.File(str(path), separate_channels=True) as file:
            return {name: np.asarray(channel.pixels) for name, channel in file.channels().items()}, (height, width)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a decoder met with a broken file raises whatever it likes
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise InputError(f"{path}: is no readable image ({reason}); render or download it again") from None
