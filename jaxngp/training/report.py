"""What a run leaves behind: pictures, animations, logs and tables.

Files other than logs appear whole or not at all: they are written beside their place and then moved into it. Folders
are made where they are missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

import jaxngp

Image8 = NDArray[np.uint8]  # (H, W, 3), sRGB

# From far to near: dark blue, violet, red, orange, pale yellow. Their luminance rises evenly, so that the picture
# reads the same in grey, and the farthest surface still stands out from the black behind everything.
_DEPTH_COLOURS = np.array([[38, 30, 98], [116, 42, 138], [196, 64, 92], [240, 142, 54], [252, 250, 190]], np.float32)
_CAPTION_HEIGHT = 18  # px
_CAPTION_SIZE = 12  # px
_GAP = 4  # px between the images of a contact sheet
_PALETTE_FRAMES = 16  # frames that a GIF's palette is chosen from
_PALETTE_PIXELS = 2**14  # pixels of each of these

# Images.


def to_uint8(rgb: ArrayLike) -> NDArray[np.uint8]:
    """Values in [0, 1] as bytes, rounded; what lies outside is clipped, and NaN is 0. Any shape."""
    return np.rint(np.clip(np.nan_to_num(np.asarray(rgb, np.float32)), 0, 1) * 255).astype(np.uint8)


def error_image(prediction: ArrayLike, truth: ArrayLike, gain: float = 4.0) -> Image8:
    """`gain` times the absolute difference per channel, clipped. Two (H, W, 3) in [0, 1]; black is no error."""
    difference = np.asarray(prediction, np.float32) - np.asarray(truth, np.float32)
    return to_uint8(gain * np.abs(difference))


def depth_image(depth: ArrayLike, opacity: ArrayLike, near_far: tuple[float, float] | None = None) -> Image8:
    """Depth as colour: nearer is brighter, from pale yellow at near to dark blue at far, and nothing is black.

    depth (H, W) is the distance to the surface that the opaque part of a pixel shows; opacity (H, W) in [0, 1] fades
    the colour to black. Depths outside near_far are clipped to it; by default it is the 1st and the 99th percentile
    of the depths of the pixels that are more than half opaque. An animation wants one near_far for all frames.
    """
    depth, opacity = np.nan_to_num(np.asarray(depth, np.float32)), np.asarray(opacity, np.float32)
    near, far = _percentiles(depth[opacity > 0.5]) if near_far is None else near_far
    nearness = np.clip((far - depth) / max(far - near, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(_DEPTH_COLOURS))
    rgb = np.stack([np.interp(nearness, stops, channel) for channel in _DEPTH_COLOURS.T], axis=-1)
    return to_uint8(rgb / 255 * opacity[..., None])


def _percentiles(depth: NDArray[np.float32]) -> tuple[float, float]:
    if depth.size == 0:
        return 0.0, 1.0
    near, far = np.percentile(depth, (1, 99))
    return float(near), float(far)


def contact_sheet(rows: Sequence[Sequence[Image8]], labels: Sequence[str]) -> Image8:
    """A grid of images on white, with a caption above each column. rows of (H, W, 3) u8, one label per column.

    Rows and columns are as large as their largest image or caption; a smaller image stays at the top left. Raises
    ValueError where a row does not hold one image per label.
    """
    for index, row in enumerate(rows):
        if len(row) != len(labels):
            raise ValueError(f"rows[{index}] holds {len(row)} images: expected one for each of {len(labels)} labels")
    font = ImageFont.load_default(_CAPTION_SIZE)
    widths = [
        max([math.ceil(font.getlength(label)), *(row[column].shape[1] for row in rows)])
        for column, label in enumerate(labels)
    ]
    heights = [_CAPTION_HEIGHT, *(max((image.shape[0] for image in row), default=0) for row in rows)]
    lefts, tops = _starts(widths), _starts(heights)
    sheet = Image.new("RGB", (max(lefts[-1], 1), tops[-1]), "white")
    for left, label in zip(lefts, labels, strict=False):
        ImageDraw.Draw(sheet).text((left, _GAP), label, fill="black", font=font)
    for top, row in zip(tops[1:], rows, strict=False):
        for left, image in zip(lefts, row, strict=False):
            sheet.paste(Image.fromarray(image), (left, top))
    return np.asarray(sheet)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each box of a line starts, and where the next one would, with a gap after each."""
    return [0, *np.cumsum([size + _GAP for size in sizes]).tolist()]


# Files.


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends, and vanishes if it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_png(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> None:
    """Writes (H, W), (H, W, 3) or (H, W, 4) u8 as a PNG."""
    with _replacing(path) as unfinished:
        Image.fromarray(image).save(unfinished, format="PNG")


def write_animation(path: str | os.PathLike[str], frames: Sequence[Image8], fps: float = 24.0) -> None:
    """Writes frames (H, W, 3) u8 as an endless .gif or .webp, by the path's suffix.

    A GIF has 256 colours and counts time in centiseconds. Its one palette is chosen from all of the animation, and
    nothing is dithered: a palette or a dither pattern for each frame would flicker. Raises ValueError for another
    suffix, for no frames, and for an fps outside (0, 50], above which players no longer agree.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".webp"):
        raise ValueError(f"path = {str(path)!r}: expected a name that ends in .gif or .webp")
    if not frames:
        raise ValueError("frames is empty: expected at least one image")
    if not 0 < fps <= 50:
        raise ValueError(f"fps = {fps!r}: expected more than 0 and at most 50")
    images = [Image.fromarray(frame) for frame in frames]
    if suffix == ".gif":
        palette = _common_palette(frames)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        options: dict[str, Any] = {"format": "GIF", "duration": 10 * round(100 / fps), "optimize": False}
    else:
        options = {"format": "WEBP", "duration": round(1000 / fps), "quality": 90, "method": 4}
    with _replacing(path) as unfinished:
        images[0].save(unfinished, save_all=True, append_images=images[1:], loop=0, **options)


def _common_palette(frames: Sequence[Image8]) -> Image.Image:
    """A 256-colour image whose palette suits pixels drawn evenly from frames drawn evenly."""
    chosen = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, _PALETTE_FRAMES).round().astype(int))]
    pixels = [frame.reshape(-1, 3)[:: max(1, frame.size // 3 // _PALETTE_PIXELS)] for frame in chosen]
    return Image.fromarray(np.concatenate(pixels)[None]).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8."""
    with _replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON; arrays become lists, paths text, and numbers that JSON lacks become null."""
    write_text(path, json.dumps(_to_plain(value), indent=2, allow_nan=False) + "\n")


def append_jsonl(path: str | os.PathLike[str], value: Any) -> None:
    """Appends `value` as one line of JSON, in one write; a line that a crash cut short is ended first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_to_plain(value), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def keep_lines(path: str | os.PathLike[str], wanted: Callable[[Any], bool]) -> None:
    """Rewrites a file of JSON lines with those that are `wanted`; a line that a crash cut short is not."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if wanted(json.loads(line)):
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def _to_plain(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a number or an array, of numpy or jax
        return _to_plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Numbers.


def peak_memory_bytes() -> int:
    """The most memory this process has had resident; of the host, not of an accelerator."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere


def device_name() -> str:
    """The device that jax computes on, in words; of a CPU also the number of cores this process may use."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu, {cores} cores"
    return device.device_kind


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "device": device_name(),
        "jax_version": jax.__version__,
        "version": jaxngp.__version__,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": stats.get("peak_bytes_in_use", 0),
    }


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as aligned text under a header of all their keys; numbers to the right, floats to four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(name, 0), int | float | np.number) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
