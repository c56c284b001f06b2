"""The formats in which phones export a capture: Polycam's keyframes, and the `.r3d` of Record3D.

Both have poses of ARKit: camera-to-world with OpenGL axes, y up, in metres, and intrinsics of each image.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxngp.config import InputError
from jaxngp.data.cache import cache_dir
from jaxngp.data.capture import Capture, DepthMap
from jaxngp.data.photos import IMAGE_SUFFIXES, probe_images
from jaxngp.data.views import View, check_pose, make_capture, natural_key

MAX_ARCHIVE = 2**36  # bytes that are unpacked of an archive
UP = (0.0, 1.0, 0.0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); export the capture again") from None
    if not isinstance(plain, dict):
        raise InputError(f"{path}: expected a JSON object; export the capture again")
    return plain


def _numbers(values: Any, count: int, where: str, what: str) -> list[float]:
    """Raises InputError where they are not so many finite numbers."""
    try:
        numbers = [float(value) for value in values] if isinstance(values, list) else []
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise InputError(f"{where}: {what}: expected {count} finite numbers; export the capture again")
    return numbers


# Polycam.


def detect_polycam(path: Path) -> tuple[str, ...]:
    """("train",) where a folder has Polycam's raw data."""
    return ("train",) if _keyframes(path) else ()


def read_polycam(path: Path, splits: tuple[str, ...]) -> Capture:
    """All views, sorted by name, with the headers of their images and their depth maps. Raises InputError."""
    folder, kind = _keyframes(path) or (path, "")
    cameras = sorted((folder / f"{kind}cameras").glob("*.json"), key=lambda file: natural_key(file.stem))
    if not cameras:
        raise InputError(f"{folder}: expected a json of each view in {kind}cameras; export the raw data again")
    images = folder / f"{kind}images"
    views = []
    for camera in cameras:
        plain, where = _read_json(camera), str(camera)
        keys = [f"t_{row}{column}" for row in range(3) for column in range(4)]
        matrix = _numbers([plain.get(key) for key in keys], 12, where, "t_00 ... t_23")
        names = ("fx", "fy", "cx", "cy", "width", "height")
        fx, fy, cx, cy, width, height = _numbers([plain.get(key) for key in names], 6, where, ", ".join(names))
        if min(fx, fy, width, height) <= 0:
            raise InputError(f"{where}: expected a positive focal length and size; export the raw data again")
        candidates = [images / f"{camera.stem}{suffix}" for suffix in (".jpg", ".png", *IMAGE_SUFFIXES)]
        file = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
        depth = folder / "depth" / f"{camera.stem}.png"
        views.append(
            View(
                where, camera.stem, splits[0], file, check_pose(np.reshape(matrix, (3, 4)), where), (fx, fy), (cx, cy),
                (width, height), depth=DepthMap(depth, 1e-3, "axis") if depth.is_file() else None,
            )
        )  # fmt: skip
    headers = probe_images([view.file for view in views])
    return make_capture(path, views, headers, notes=(), up=UP, metres=1.0, format="Polycam")


def _keyframes(path: Path) -> tuple[Path, str] | None:
    """The folder of keyframes, and the beginning of the names of those in it that are to be read."""
    for folder in (path / "keyframes", path):
        for kind in ("corrected_", ""):
            if (folder / f"{kind}cameras").is_dir() and (folder / f"{kind}images").is_dir():
                return folder, kind
    return None


# Record3D.


def detect_record3d(path: Path) -> tuple[str, ...]:
    """("train",) where a path is an `.r3d`, or a folder into which one was unpacked."""
    return ("train",) if _is_r3d(path) or _unpacked(path) else ()


def read_record3d(path: Path, splits: tuple[str, ...]) -> Capture:
    """All views in the order of time, with the headers of their images. Raises InputError."""
    folder = _unpack(path) if path.is_file() else path
    metadata, images = _unpacked(folder) or (folder / "metadata", folder / "rgbd")
    plain, where = _read_json(metadata), f"{path}: metadata"
    poses, own = plain.get("poses"), plain.get("perFrameIntrinsicCoeffs")
    files = sorted((f for f in images.iterdir() if f.suffix.lower() == ".jpg"), key=lambda file: natural_key(file.stem))
    if not isinstance(poses, list) or not files or len(poses) != len(files):
        count = len(poses) if isinstance(poses, list) else 0
        raise InputError(f"{where}: has {count} poses for {len(files)} images; export the capture again")
    width, height = _numbers([plain.get("w"), plain.get("h")], 2, where, "w, h")
    k = _numbers(plain.get("K"), 9, where, "K") if not own else []  # column by column
    views = []
    for i, file in enumerate(files):
        x, y, z, w, *position = _numbers(poses[i], 7, where, f"poses[{i}]")
        if isinstance(own, list) and len(own) == len(files):
            fx, fy, cx, cy = _numbers(own[i], 4, where, f"perFrameIntrinsicCoeffs[{i}]")
        elif own:
            raise InputError(f"{where}: perFrameIntrinsicCoeffs: expected one for each pose; export the capture again")
        else:
            fx, fy, cx, cy = k[0], k[4], k[6], k[7]
        if min(fx, fy, width, height) <= 0:
            raise InputError(f"{where}: expected a positive focal length and size; export the capture again")
        c2w = check_pose(np.concatenate([_rotation(w, x, y, z), np.reshape(position, (3, 1))], axis=1), where)
        views.append(View(where, file.stem, splits[0], file, c2w, (fx, fy), (cx, cy), (width, height)))
    notes = [f"{path}: its depths are compressed with LZFSE, and not read"] if any(images.glob("*.depth")) else []
    headers = probe_images(files)
    return make_capture(path, views, headers, notes=notes, up=UP, metres=1.0, format="Record3D")


def _rotation(w: float, x: float, y: float, z: float) -> np.ndarray:
    """(3, 3) of a quaternion of any length but 0, for which it is not finite."""
    with np.errstate(all="ignore"):
        w, x, y, z = np.array([w, x, y, z]) / np.sqrt(w * w + x * x + y * y + z * z)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _is_r3d(path: Path) -> bool:
    return path.suffix.lower() == ".r3d" and path.is_file()


def _unpacked(path: Path) -> tuple[Path, Path] | None:
    """The metadata in a folder, and its folder of images."""
    for metadata, images in (("metadata", "rgbd"), ("metadata.json", "rgb"), ("metadata.json", "rgbd")):
        if (path / metadata).is_file() and (path / images).is_dir():
            return path / metadata, path / images
    return None


def _unpack(path: Path) -> Path:
    """Where the images and the metadata of an `.r3d` are: unpacked into the cache directory, if they are not there."""
    try:
        stamp = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        folder = cache_dir() / "record3d" / f"{path.stem}-{zlib.crc32(stamp.encode(errors='replace')):08x}"
        if (folder / "done").is_file():
            return folder
        with zipfile.ZipFile(path) as archive:
            wanted = [i for i in archive.infolist() if _is_wanted(i.filename)]
            if sum(info.file_size for info in wanted) > min(MAX_ARCHIVE, 200 * path.stat().st_size):
                raise InputError(f"{path}: unpacks to more than a capture could be; export it again")
            for info in wanted:
                target = folder / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(info))
        (folder / "done").touch()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: cannot be unpacked ({error}); export it again, or give the unpacked folder"
        ) from None
    return folder


def _is_wanted(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts == ("metadata",) or (len(parts) == 2 and parts[0] == "rgbd" and name.lower().endswith(".jpg"))
