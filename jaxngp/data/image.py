"""One image on disk -> its pixels, which need not all be in memory.

PNG, JPEG, TIFF, WebP and BMP are decoded by pillow, EXR by OpenEXR; a `.npy` is mapped as it lies. What is large once
it is decoded is written as a `.npy` into the cache directory, and mapped from then on. Of a large map, `gather` and
`read` copy the bytes they want out of the file and touch none of its pages: those would stay in the process's memory,
up to the size of the image.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import stat
import tempfile
import textwrap
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from jaxngp.config import InputError, shown
from jaxngp.data.photos import IMAGE_FORMATS, PIXELS_PER_BYTE, PLAIN_PIXELS, read_exr
from jaxngp.data.places import cache_dir

PEAKS = {"uint8": 255, "uint16": 65535, "float32": 1}  # what stands for 1, by dtype
MIN_SIDE, MAX_SIDE = 2, 2**17  # px
MAX_PIXELS = 2**32
DECODED_BYTES = 2**28  # of pixels that are kept in memory; more are written to the cache
RESIDENT_BYTES = 2**29  # of a map that is indexed as an array, and so may become resident; a larger one is copied from
STRIP_BYTES = 2**25  # converted or checked at a time
SPARE_BYTES = 2**28  # of the disk that a cached image leaves free

EXR_MAGIC = b"\x76\x2f\x31\x01"
SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")

Background = Literal["white", "black"]


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in sRGB values, in memory or mapped read-only from a `.npy`."""

    name: str
    pixels: np.ndarray  # (H, W, 3) u8, u16 or f32; f32 is finite, and may exceed 1
    num_bytes: int  # of the file as it was given
    notes: tuple[str, ...] = ()  # one sentence each, for the user: what of the file is not in the pixels

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def peak(self) -> int:
        """What stands for 1 in `pixels`: 255, 65535 or 1."""
        return PEAKS[self.pixels.dtype.name]

    def gather(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The pixels at rows y (N,) and columns x (N,), integers: (N, 3) in the image's own dtype.

        Raises IndexError for a place outside the image, negative ones included, and InputError where the file of a
        map is gone or cut short.
        """
        y, x = np.asarray(y), np.asarray(x)
        for index, side in ((y, self.height), (x, self.width)):
            if index.size and not (index.min() >= 0 and index.max() < side):
                raise IndexError(f"pixels from {index.min()} to {index.max()} of {side}")
        return self.pixels[y, x] if self._descriptor is None else self._copy_points(self._descriptor, y, x)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """A rectangle of the image: (h, w, 3) f32, divided by the peak. The slices have no step. Raises InputError."""
        if self._descriptor is None:
            part = self.pixels[rows, columns]
        else:
            part = self._copy_rectangle(self._descriptor, rows, columns)
        return part.astype(np.float32) / np.float32(self.peak)

    # A read of 3 bytes costs 1 us, and leaves nothing behind. A touch of a mapped page costs 3 us, because the kernel
    # maps the 15 pages around it too, which madvise must then take away again; no number of threads makes up for it.

    @cached_property
    def _descriptor(self) -> int | None:
        """The open file of a map that is too large to touch, closed with this object; None for any other image."""
        mapped = isinstance(self.pixels, np.memmap) and self.pixels.nbytes > RESIDENT_BYTES
        if not mapped or not hasattr(os, "preadv"):  # Windows: resident pages have no bound there
            return None
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read again ({error.strerror}); start anew") from None
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    @property
    def _path(self) -> str:
        assert isinstance(self.pixels, np.memmap)
        return str(self.pixels.filename)

    def _start(self, y: Any, x: Any) -> Any:
        """Where in the file a pixel begins."""
        assert isinstance(self.pixels, np.memmap)
        return (y * self.width + x) * 3 * self.pixels.itemsize + self.pixels.offset

    def _copy_points(self, descriptor: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        start = self._start(y.astype(np.int64), x)
        order = np.argsort(start)  # a fifth faster: neighbours are in one page
        size = 3 * self.pixels.itemsize
        content = b"".join(map(os.pread, repeat(descriptor), repeat(size), start[order].tolist()))
        if len(content) != size * len(order):
            raise self._cut_short()
        found = np.empty((len(order), 3), self.pixels.dtype)
        found[order] = np.frombuffer(content, self.pixels.dtype).reshape(-1, 3)
        return found

    def _copy_rectangle(self, descriptor: int, rows: slice, columns: slice) -> np.ndarray:
        top, bottom, _ = rows.indices(self.height)
        left, right, _ = columns.indices(self.width)
        part = np.empty((max(bottom - top, 0), max(right - left, 0), 3), self.pixels.dtype)
        for y, row in enumerate(part, top):
            if row.nbytes and os.preadv(descriptor, [row], self._start(y, left)) != row.nbytes:
                raise self._cut_short()
        return part

    def _cut_short(self) -> InputError:
        return InputError(f"{self._path}: became shorter while it was read; restore it and start anew")


def tiles(height: int, width: int, size: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of the squares of `size` pixels that make up an image, row by row; the last ones are smaller."""
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield slice(y, min(y + size, height)), slice(x, min(x + size, width))


# Files.


def read_image(path: Path, *, background: Background) -> StoredImage:
    """The image at a path, its kind told by the first bytes; what is transparent shows `background`.

    Grey becomes three equal channels, and EXIF orientation is applied. 8 bits a channel are u8, 16-bit grey is u16,
    a float TIFF is taken as sRGB values; of 16-bit colour pillow keeps the upper 8 bits, as `notes` then says. An EXR
    is linear light: it is encoded as sRGB, brighter than 1 too, and negative values become 0. A `.npy` holds
    (H, W, 3) sRGB values u8, u16 or f32, and is mapped. White is 1 in floats; that some are brighter is noted.

    Raises InputError for a file that is missing, broken, of another kind, that has a NaN or an infinity, floats on a
    scale of 0 to 255 or 65535, or more pixels than its bytes can hold.
    """
    path = Path(path)
    status, magic = _probe(path)
    try:
        if magic == np.lib.format.MAGIC_PREFIX:
            return _read_npy(path, status)
        if magic.startswith(EXR_MAGIC):
            pixels, notes = _read_exr(path, status.st_size, background)
            return StoredImage(path.name, pixels, status.st_size, notes)
        return _read_with_pillow(path, status, background)
    except MemoryError:
        raise InputError(f"{path}: its pixels are more than the memory holds; save it as a .npy") from None


def _probe(path: Path) -> tuple[os.stat_result, bytes]:
    """What a regular file is, and its first 6 bytes. A pipe is not opened: it may never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is no file; give the path of an image")
        with path.open("rb") as file:
            return status, file.read(6)
    except InputError:  # a ValueError too
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of an image") from None
    except ValueError as error:  # a name with a null byte
        raise InputError(f"{shown(str(path))}: is no path ({error}); give the path of an image") from None


def _check_size(path: Path, width: int, height: int, num_bytes: float) -> None:
    """Raises InputError where an image has too few or too many pixels, at all or for the bytes of its file."""
    sides = f"{path}: is {width}x{height} pixels"
    if not (min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE):
        raise InputError(f"{sides}: expected {MIN_SIDE} to {MAX_SIDE} a side; crop or scale it")
    if width * height > min(max(PLAIN_PIXELS, PIXELS_PER_BYTE * num_bytes), MAX_PIXELS):
        raise InputError(f"{sides}: too many, at all or for {num_bytes} bytes; scale it down, or save it as a .npy")


def _read_npy(path: Path, status: os.stat_result) -> StoredImage:
    return _checked(path, StoredImage(path.name, map_npy(path), status.st_size))


def _checked(path: Path, stored: StoredImage) -> StoredImage:
    """The image, with a note where floats are brighter than white. Raises InputError as `_check_floats` does."""
    if stored.peak != 1:
        return stored
    # All of it is read once: a NaN that is met in training is found too late.
    rows = max(1, STRIP_BYTES // (12 * stored.width))
    strips = [strip for strip, _ in tiles(stored.height, 1, rows)]
    bar = tqdm(strips, f"checking {path.name}", delay=1.0, disable=None, leave=False, unit="strip")
    levels = _check_floats(path, (stored.read(strip, slice(None)) for strip in bar))
    return replace(stored, notes=(*stored.notes, *levels.notes(path.name)))


def map_npy(path: Path) -> np.memmap:
    """The (H, W, 3) array of a `.npy`, mapped read-only. Raises InputError where it holds something else."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)  # fails where the file is too short
    except Exception as error:  # met with a broken or hostile header it raises whatever it likes
        raise _unreadable(path, error, "save it again") from None
    sound = pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.flags.c_contiguous and pixels.dtype.isnative
    if not sound or pixels.dtype.name not in PEAKS:
        raise InputError(
            f"{path}: holds {shown(str(pixels.dtype))} of shape {shown(pixels.shape)}: expected (H, W, 3) sRGB values "
            f"of {', '.join(PEAKS)}, in C order and this machine's byte order; save it so"
        )
    _check_size(path, pixels.shape[1], pixels.shape[0], math.inf)
    return pixels


def _unreadable(path: Path, error: Exception, advice: str) -> InputError:
    reason = textwrap.shorten(str(error), 200) or type(error).__name__
    return InputError(f"{path}: is no readable image ({reason}); {advice}")


@dataclass(frozen=True)
class _Levels:
    """What is known of the values of a float image, of which 1 is white."""

    largest: float
    bright: float  # the share of values above 2
    whole: bool  # all values are integers

    @property
    def scale(self) -> int:
        """The peak of the scale that the values must be on instead, 255 or 65535; 1 where they need not be.

        A picture may have lights that are brighter than white. But it is not mostly made of them, nor of integers.
        """
        if self.largest <= 1 or self.largest > 65535 or not (self.whole or self.bright > 0.5):
            return 1
        return 255 if self.largest <= 255 else 65535

    def notes(self, name: str) -> tuple[str, ...]:
        if self.largest <= 1:
            return ()
        return (
            f"{name} has values up to {self.largest:g}, where 1 is white: they are learned as brighter than white; "
            "if they are on another scale, divide them by its largest value",
        )


def _check_finite(path: Path, parts: Iterable[np.ndarray]) -> _Levels:
    """The levels of all parts of an image. Raises InputError where a value is not finite."""
    size = bad = bright = 0
    largest, whole = -math.inf, True
    for part in parts:
        size += part.size
        bad += int(part.size - np.isfinite(part).sum())
        bright += int((part > 2).sum())
        largest = max(largest, float(part.max()))
        whole = whole and bool((part == np.floor(part)).all())
    if bad:
        raise InputError(f"{path}: {bad} values of its pixels are NaN or infinite; render or export it again")
    return _Levels(largest, bright / max(size, 1), whole)


def _check_floats(path: Path, parts: Iterable[np.ndarray]) -> _Levels:
    """As `_check_finite`, for sRGB values. Raises InputError where they are on a scale to 255 or 65535, too."""
    levels = _check_finite(path, parts)
    if levels.scale > 1:
        raise InputError(
            f"{path}: holds floats up to {levels.largest:g} as on a scale of 0 to {levels.scale}, but white is 1; "
            f"divide them by {levels.scale}, or save them as {'uint8' if levels.scale == 255 else 'uint16'}"
        )
    return levels


# Pillow.

_PILLOW_LOCK = threading.Lock()


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lifts pillow's limit on pixels, a global of its module, for as long as we check by our own."""
    with _PILLOW_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _read_with_pillow(path: Path, status: os.stat_result, background: Background) -> StoredImage:
    """Decodes once: an image that is large is found in the cache from then on."""
    with _without_pillow_limit(), _open(path, status.st_size) as image:
        notes = _notes(path, image)
        size = 2 if image.mode in SIXTEEN_BIT_GREY else 4 if image.mode == "F" else 1
        cached = _cache_path(path, status, background)
        if image.width * image.height * 3 * size <= DECODED_BYTES:
            decoded = _decode(path, image, background)
            return _checked(path, StoredImage(path.name, np.concatenate([*decoded.strips()]), status.st_size, notes))
        if not cached.exists():
            decoded = _decode(path, image, background)
            write_npy(cached, (decoded.image.height, decoded.image.width), decoded.dtype, decoded.strips())
    return _checked(path, StoredImage(path.name, map_npy(cached), status.st_size, notes))


def _open(path: Path, num_bytes: int) -> Image.Image:
    """A file whose header is read and whose pixels are not."""
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except Exception as error:  # a decoder met with a broken file raises whatever it likes
        advice = f"expected {', '.join(IMAGE_FORMATS)}, EXR or .npy; convert it, or download it again"
        raise _unreadable(path, error, advice) from None
    try:
        _check_size(path, image.width, image.height, num_bytes)
        if image.mode not in (*PLAIN_MODES, *ALPHA_MODES, *SIXTEEN_BIT_GREY, "F"):
            raise InputError(f"{path}: pixel format {image.mode!r} is not supported; convert it to RGB of 8 bits")
    except InputError:
        image.close()
        raise
    return image


def _notes(path: Path, image: Image.Image) -> tuple[str, ...]:
    """Says where pillow drops the lower byte of 16-bit colour, which it does without a word."""
    if image.mode in (*SIXTEEN_BIT_GREY, "F") or _bits(path, image) <= 8:
        return ()
    return (
        f"{path.name} has {_bits(path, image)} bits a channel, of which the upper 8 are read; "
        "for all of them save it as a .npy of uint16 (H, W, 3)",
    )


def _bits(path: Path, image: Image.Image) -> int:
    """Bits per channel, as the header of a PNG or TIFF has it; 8 for the other formats."""
    try:
        if image.format == "PNG":
            with path.open("rb") as file:
                return file.read(25)[24]
        bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)  # type: ignore[attr-defined]
        return int(max(bits))
    except (OSError, TypeError, ValueError, IndexError):  # a tag that is no number; decoding will say what is wrong
        return 8


@dataclass(frozen=True)
class _Decoded:
    """A decoded image, upright, that is turned into arrays strip by strip."""

    image: Image.Image
    background: Background

    @property
    def dtype(self) -> np.dtype:
        mode = self.image.mode
        return np.dtype(np.uint16 if mode in SIXTEEN_BIT_GREY else np.float32 if mode == "F" else np.uint8)

    def crops(self) -> Iterator[Image.Image]:
        """Strips of all rows from the top."""
        rows = max(1, STRIP_BYTES // (12 * self.image.width))
        for y in range(0, self.image.height, rows):
            yield self.image.crop((0, y, self.image.width, min(y + rows, self.image.height)))

    def strips(self) -> Iterator[np.ndarray]:
        """The same as (h, W, 3) of `dtype`."""
        return (_to_pixels(crop, self.background) for crop in self.crops())


def _decode(path: Path, image: Image.Image, background: Background) -> _Decoded:
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # as in _open
        raise _unreadable(path, error, "broken or truncated: export or download it again") from None
    _check_size(path, upright.width, upright.height, math.inf)
    decoded = _Decoded(upright, background)
    if upright.mode == "F":
        _check_floats(path, map(np.asarray, decoded.crops()))
    return decoded


def _to_pixels(image: Image.Image, background: Background) -> np.ndarray:
    """(H, W, 3) of an image in any of the modes that `_open` lets through."""
    white = background == "white"
    if image.mode in (*SIXTEEN_BIT_GREY, "F"):
        grey = np.asarray(image).astype(np.float32 if image.mode == "F" else np.uint16)
        if isinstance(key := image.info.get("transparency"), int):  # the grey that a PNG declares transparent
            grey = np.where(grey == key, np.array(65535 * white, grey.dtype), grey)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        return _over(np.asarray(image.convert("RGBA")), 255 * white)
    return np.asarray(image.convert("RGB"))


def _over(rgba: np.ndarray, level: int) -> np.ndarray:
    """Straight alpha over a grey `level`, in sRGB values and rounded: (H, W, 4) u8 -> (H, W, 3) u8."""
    alpha = rgba[..., 3:].astype(np.uint32)
    return ((rgba[..., :3] * alpha + level * (255 - alpha) + 127) // 255).astype(np.uint8)


# EXR.


def _read_exr(path: Path, num_bytes: int, background: Background) -> tuple[np.ndarray, tuple[str, ...]]:
    """The first part of an EXR as (H, W, 3) f32 sRGB, and notes; its colours are linear light, multiplied by alpha."""
    channels, shape = read_exr(path, lambda width, height: _check_size(path, width, height, num_bytes))
    linear, levels = _linear_rgb(path, channels, shape)
    notes = levels.notes(path.name) if levels.scale > 1 else ()  # that lights are brighter is what an EXR is for
    if (alpha := channels.get("A")) is not None and background == "white":
        linear += 1 - np.clip(alpha.astype(np.float32), 0, 1)[..., None]
    return encode_srgb(linear), notes


def _linear_rgb(path: Path, channels: dict[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, _Levels]:
    """(H, W, 3) f32 of the channels R, G and B, or of Y alone, and their levels."""
    names = ("R", "G", "B") if {"R", "G", "B"} <= set(channels) else ("Y", "Y", "Y")
    used = [channels[name] for name in {*names, "A"} & set(channels)]
    if names[0] not in channels or any(c.dtype.kind != "f" or c.shape != shape for c in used):
        held = ", ".join(f"{name} {c.dtype} {c.shape}" for name, c in channels.items())
        raise InputError(
            f"{path}: expected channels R, G and B or Y of half or float, at full resolution, "
            f"found {textwrap.shorten(held, 200) or 'none'}; export it so"
        )
    levels = _check_finite(path, used)
    return np.stack([channels[name] for name in names], axis=-1).astype(np.float32), levels


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB (IEC 61966-2-1), f32 to f32: the curve goes on above 1, and below 0 all is 0.

    A negative value is a colour that sRGB has not; a screen shows the nearest it has.
    """
    linear = np.maximum(linear, np.float32(0))
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


# The cache.


def _cache_path(path: Path, status: os.stat_result, background: Background) -> Path:
    """Where the decoded pixels of a file are kept. A file that changed has another name, as one that moved."""
    place = hashlib.sha256(os.fsencode(path.resolve()) + background.encode()).hexdigest()[:16]
    stem = "".join(c if c.isalnum() and c.isascii() else "_" for c in path.stem[:40])
    return image_cache() / f"{stem}-{status.st_size}-{status.st_mtime_ns}-{place}.npy"


def image_cache() -> Path:
    """The folder of decoded and drawn images."""
    return cache_dir() / "images"


def write_npy(path: Path, size: tuple[int, int], dtype: np.dtype, strips: Iterable[np.ndarray]) -> None:
    """Writes strips of rows, of `size` = (H, W) together, as one (H, W, 3) array; `path` appears when it is complete.

    Raises InputError where the disk has no room, or the folder cannot be written.
    """
    shape = (*size, 3)
    needed = math.prod(shape) * dtype.itemsize
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path.parent, needed)
        with _unfinished(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for strip in strips:
                file.write(np.ascontiguousarray(strip).data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write {needed / 1e9:.3g} GB ({error.strerror}); set JAXNGP_CACHE to a folder with room"
        ) from None


def _check_room(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed + SPARE_BYTES:
        raise InputError(
            f"{folder}: {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free; "
            "make room, or set JAXNGP_CACHE to a folder on a larger disk"
        )


@contextmanager
def _unfinished(path: Path) -> Iterator[Any]:
    """A binary file beside `path` that takes its name at the end, and is removed where writing it fails."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem[:20]}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(name).chmod(0o644)  # mkstemp's is private
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
