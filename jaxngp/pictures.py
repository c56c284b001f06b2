"""Arrays as pictures: colours, depth, error, contact sheets; and writing them as PNG or animation."""

from __future__ import annotations

import importlib.util
import io
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from jaxngp.config import InputError
from jaxngp.records import replacing

Image8 = NDArray[np.uint8]  # (H, W, 3), sRGB

# From far to near: dark blue, violet, red, orange, pale yellow. Their luminance rises evenly, so that the picture
# reads the same in grey, and the farthest surface still stands out from the black behind everything.
DEPTH_COLOURS = np.array([[38, 30, 98], [116, 42, 138], [196, 64, 92], [240, 142, 54], [252, 250, 190]], np.float32)
_CAPTION_HEIGHT = 18  # px
_CAPTION_SIZE = 12  # px
_GAP = 4  # px between the images of a contact sheet
_STRIPE = 3  # px, of what is hatched
_PALETTE_FRAMES = 16  # frames that a GIF's palette is chosen from
_PALETTE_PIXELS = 2**14  # pixels of each of these

# Images.


def to_uint8(rgb: ArrayLike) -> NDArray[np.uint8]:
    """Values in [0, 1] as bytes, rounded; what lies outside is clipped, and NaN is 0. Any shape.

    >>> to_uint8([-0.5, 0.5, 1.0]).tolist()
    [0, 128, 255]
    """
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
    stops = np.linspace(0, 1, len(DEPTH_COLOURS))
    rgb = np.stack([np.interp(nearness, stops, channel) for channel in DEPTH_COLOURS.T], axis=-1)
    return to_uint8(rgb / 255 * opacity[..., None])


def hatched(image: Image8, keep: NDArray[np.bool_]) -> Image8:
    """The image (H, W, 3), with grey stripes wherever keep (H, W) is False."""
    y, x = np.indices(keep.shape)
    stripes = np.where((x + y) % (2 * _STRIPE) < _STRIPE, 96, 160).astype(np.uint8)
    return np.where(keep[..., None], image, stripes[..., None])


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


def write_png(path: str | os.PathLike[str], image: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Writes (H, W), (H, W, 3) or (H, W, 4) u8, or (H, W) u16, as a PNG."""
    with replacing(path) as unfinished:
        Image.fromarray(image).save(unfinished, format="PNG")


def read_picture(path: str | os.PathLike[str]) -> Image8:
    """A picture that was written here, (H, W, 3) u8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def encode_png(image: Image8) -> bytes:
    """A PNG of (H, W, 3) u8; equal images give equal bytes."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return content.getvalue()


def encode_webp(image: Image8) -> bytes:
    """(H, W, 3) u8 as a small WebP, close enough to look at and not to measure on."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="WEBP", quality=92, method=4)
    return data.getvalue()


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
    with replacing(path) as unfinished:
        images[0].save(unfinished, save_all=True, append_images=images[1:], loop=0, **options)


def can_write_video() -> bool:
    """Whether PyAV is there, which `write_video` needs."""
    return importlib.util.find_spec("av") is not None


def write_video(path: str | os.PathLike[str], frames: Iterable[Image8], fps: float = 24.0) -> int:
    """Write frames (H, W, 3) u8 of one size as an .mp4 (H.264), one by one as they come; returns how many.

    Half of the chroma's resolution is lost, and a side of an odd number of pixels is repeated once at its end, as the
    codec's 4:2:0 asks. Raises InputError where PyAV is missing, ValueError for no frames.
    """
    try:
        import av
    except ImportError:
        raise InputError("PyAV, which writes videos, is not installed: pip install .[video]") from None
    count = 0
    with replacing(path) as unfinished, av.open(str(unfinished), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "17"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if not count:
                stream.height, stream.width = even.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            count += 1
        if not count:
            raise ValueError("frames is empty: expected at least one image")
        file.mux(stream.encode())
    return count


def _common_palette(frames: Sequence[Image8]) -> Image.Image:
    """A 256-colour image whose palette suits pixels drawn evenly from frames drawn evenly."""
    chosen = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, _PALETTE_FRAMES).round().astype(int))]
    pixels = [frame.reshape(-1, 3)[:: max(1, frame.size // 3 // _PALETTE_PIXELS)] for frame in chosen]
    return Image.fromarray(np.concatenate(pixels)[None]).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2)
