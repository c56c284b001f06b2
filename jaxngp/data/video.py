"""A video -> the sharpest of its frames, evenly spread over its time, as image files.

PyAV, which brings FFmpeg with it, comes with `pip install .[capture]` and is imported where it is used.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxngp.config import InputError

SHARPNESS_SIDE = 1280  # px, the longer side at which frames are compared: above it there is mostly noise


def sharp_frames(video: Path, folder: Path, count: int) -> list[Path]:
    """Write the sharpest frame of each of `count` equal stretches of a video into `folder`, and return their paths.

    The sharpness of a frame is the variance of its Laplacian. Frames are upright JPEGs, named by their number in the
    video; a video of fewer frames gives all it has. `folder` appears when it is complete and must not exist before.
    Raises InputError where the file is no video, or PyAV is not installed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        names = []
        for number, rgb in _chosen(video, count):
            names.append(f"frame_{number:06d}.jpg")
            Image.fromarray(rgb).save(unfinished / names[-1], quality=95, subsampling=0)
        if not names:
            raise InputError(f"{video}: no frame of it can be decoded; export it again, as MP4")
        unfinished.chmod(0o755)  # mkdtemp's is private
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [folder / name for name in names]


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of an image (H, W)."""
    g = grey.astype(np.float32)
    laplacian = g[1:-1, :-2] + g[1:-1, 2:] + g[:-2, 1:-1] + g[2:, 1:-1] - 4 * g[1:-1, 1:-1]
    return float(laplacian.var()) if laplacian.size else 0.0


def _chosen(video: Path, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """The number and pixels (H, W, 3) u8 of the sharpest frame of each stretch."""
    times = _times(video)
    first, length = times[0], times[-1] - times[0] + 1
    count = min(count, len(times))
    best: tuple[float, int, Any] = (-1.0, -1, None)  # sharpness, number, frame
    current = 0
    for number, frame in enumerate(tqdm(_frames(video), "frames", len(times), unit="frame", disable=None)):
        time = number if frame.pts is None else frame.pts
        stretch = min(max((time - first) * count // length, current), count - 1)
        if stretch > current and best[2] is not None:
            yield best[1], _upright(best[2])
            best = (-1.0, -1, None)
        current = stretch
        best = max(best, (_frame_sharpness(frame), number, frame), key=lambda entry: entry[0])
    if best[2] is not None:
        yield best[1], _upright(best[2])


def _frame_sharpness(frame: Any) -> float:
    scale = min(1.0, SHARPNESS_SIDE / max(frame.width, frame.height))
    width, height = (max(1, round(scale * side)) for side in (frame.width, frame.height))
    return sharpness(frame.reformat(width, height, "gray", interpolation="AREA").to_ndarray())


def _upright(frame: Any) -> np.ndarray:
    """The pixels, turned as the video's display matrix says: phones store the sensor's rows whatever way it is held."""
    rgb = frame.to_ndarray(format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90)  # old versions of PyAV do not tell
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns))  # both are counter-clockwise


# PyAV.


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise InputError("av, which videos need, is not installed: pip install .[capture]") from None


def _times(video: Path) -> list[int]:
    """The presentation times of all frames in order, from the packets alone; 0, 1, 2, ... where they have none."""
    times = [packet.pts for packet in _packets(video) if packet.size]
    if not times:
        raise InputError(f"{video}: holds no frame; export it again, as MP4")
    return list(range(len(times))) if None in times else sorted(times)


def _frames(video: Path) -> Iterator[Any]:
    """The frames that can be decoded, in the order they are shown."""
    invalid = _av().error.FFmpegError
    for packet in _packets(video):
        try:
            yield from packet.decode()
        except invalid:  # a damaged stretch: the frames around it are still good
            continue


def _packets(video: Path) -> Iterator[Any]:
    """The packets of the first video stream; the last is empty, and flushes the decoder. Raises InputError."""
    av = _av()
    if not video.is_file():  # FFmpeg would open addresses and devices too
        raise InputError(f"{video}: is no file; give the path of a video")
    try:
        with av.open(os.fspath(video)) as container:
            if not container.streams.video:
                raise InputError(f"{video}: holds no pictures; give a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.demux(stream)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = textwrap.shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
        raise InputError(f"{video}: cannot be read as a video ({reason}); export it again, as MP4") from None
