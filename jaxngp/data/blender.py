"""The format of NeRF-synthetic: a `transforms_<split>.json` for each split, and the images that it names.

The json gives the horizontal field of view (`camera_angle_x`, radians) or the focal length in pixels (`fl_x`), and
for every frame a `file_path` (relative to the json, with or without the extension) and a camera-to-world matrix
with OpenGL axes. A frame may have intrinsics of its own, which precede those at the top. The pixels are sRGB with
straight alpha.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.config import MAX_LENGTH, InputError, shown
from jaxngp.data.capture import SPLITS, Capture
from jaxngp.data.photos import IMAGE_SUFFIXES, probe_images

POSE_TOLERANCE = 1e-3  # of the entries of R^T R - I, of det R - 1 and of the matrix's last row
FOCAL_RANGE = (1e-2, 1e7)  # px; beyond it float32 has no digits left for where pixels look
MAX_NAME = 2**10  # characters of a file_path
_ANGLE = (0.0, math.pi, "radians between 0 and pi; correct it")
_LENGTH = (0.0, math.inf, "a positive number of pixels; correct it")
_PLACE = (-math.inf, math.inf, "a finite number; correct it")
_DISTORTION = (-1e-9, 1e-9, "0, as lens distortion is not supported; undistort the images")  # moves no pixel
_BOUNDS = {
    **dict.fromkeys(("camera_angle_x", "camera_angle_y"), _ANGLE),
    **dict.fromkeys(("fl_x", "fl_y", "w", "h"), _LENGTH),
    **dict.fromkeys(("cx", "cy"), _PLACE),
    **dict.fromkeys(("k1", "k2", "k3", "k4", "p1", "p2"), _DISTORTION),
}
CAMERA_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")
UNREAD_KEYS = ("mask_path", "depth_file_path", "train_filenames", "val_filenames", "test_filenames")


@dataclass(frozen=True)
class _Frame:
    where: str  # for messages: the json and the number of the frame in it
    name: str
    split: str
    file: Path
    c2w: np.ndarray  # (3, 4) f64
    said: dict[str, float]  # of its camera, the keys of `_BOUNDS`; pixels are those of an image of w x h
    own: bool  # the frame has intrinsics of its own


def detect(path: Path) -> tuple[str, ...]:
    """Which of train, val and test a folder has a transforms file of."""
    return tuple(split for split in SPLITS if _transforms(path, split).is_file())


def read(path: Path, splits: tuple[str, ...]) -> Capture:
    """The views of the given splits of a folder, with the headers of their images. Raises InputError."""
    frames: list[_Frame] = []
    unusual: list[str] = []
    for split in splits:
        some, unread = _read_split(path, split)
        frames += some
        if unread:
            unusual.append(f"{_transforms(path, split)}: {', '.join(unread)}: not supported, and not read")
    files = tuple(frame.file for frame in frames)
    sizes, has_alpha = probe_images(files)
    _check_shared_intrinsics(frames, sizes)
    if (num_sizes := len(np.unique(sizes, axis=0))) > 1:
        unusual.append(f"{path}: the images are of {num_sizes} sizes")
    intrinsics = [_intrinsics(frame, size) for frame, size in zip(frames, sizes.tolist(), strict=True)]
    focal_xy, centre_xy = np.moveaxis(np.array(intrinsics), 1, 0)
    return Capture(
        path=path,
        names=tuple(frame.name for frame in frames),
        splits=tuple(frame.split for frame in frames),
        files=files,
        cameras=Cameras(np.stack([frame.c2w for frame in frames]), focal_xy, centre_xy, sizes),  # type: ignore[arg-type]
        has_alpha=has_alpha,
        unusual=tuple(unusual),
    )


def _transforms(path: Path, split: str) -> Path:
    return path / f"transforms_{split}.json"


# The json.


def _read_split(folder: Path, split: str) -> tuple[list[_Frame], list[str]]:
    """The frames of a split, and the keys of its json that change what images mean but are not supported."""
    path = _transforms(folder, split)
    plain, frames = _read_json(path)
    where = [f"{path}: frame {index}" for index in range(len(frames))]
    files = [folder / _file_path(frame, w) for frame, w in zip(frames, where, strict=True)]
    unread = [key for key in UNREAD_KEYS if any(key in holder for holder in (plain, *frames))]
    names = _names(files, folder)
    return [
        _Frame(w, name, split, file, _pose(frame, w), _said(plain, frame, path, w), bool({*_BOUNDS} & {*frame}))
        for frame, w, name, file in zip(frames, where, names, files, strict=True)
    ], unread


def _read_json(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The object in a transforms file, and its frames."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a transforms file of a scene") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number too long to convert
        raise InputError(f"{path}: is not JSON ({error}); export or download the file again") from None
    frames = plain.get("frames") if isinstance(plain, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise InputError(f"{path}: expected an object with 'frames', a list of at least one view; export it again")
    return plain, frames


def _file_path(frame: dict[str, Any], where: str) -> Path:
    """The path of a frame's image, relative or not. Backslashes are those of a json written on Windows."""
    name = frame.get("file_path")
    sound = isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME
    file = Path(str(name).replace("\\", "/")) if sound else Path()
    if file.name in ("", ".."):
        raise InputError(f"{where} has no 'file_path' that names a file; export the json again")
    return file if file.suffix.lower() in IMAGE_SUFFIXES else Path(f"{file}.png")


def _names(files: list[Path], folder: Path) -> list[str]:
    """The stem of each file; its whole path where two folders hold a file of one name."""
    stems = Counter(file.stem for file in files)
    whole = [str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in files]
    return [file.stem if stems[file.stem] == 1 else name for file, name in zip(files, whole, strict=True)]


def _pose(frame: dict[str, Any], where: str) -> np.ndarray:
    """c2w (3, 4) f64 of a frame whose transform_matrix is a rotation and a position."""
    rows = frame.get("transform_matrix")
    where = f"{where} ({shown(frame['file_path'])}): 'transform_matrix'"
    lists = isinstance(rows, list) and len(rows) in (3, 4) and all(isinstance(r, list) and len(r) == 4 for r in rows)
    numbers = [[_finite(value) for value in row] for row in rows] if lists and rows else []
    if not numbers or any(value is None for row in numbers for value in row):
        raise InputError(f"{where}: expected 4 rows of 4 finite numbers; export it again")
    matrix = np.asarray(numbers, np.float64)
    rotation, far = matrix[:3, :3], np.abs(matrix).max() > MAX_LENGTH
    error = math.inf if far else np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > POSE_TOLERANCE or abs(np.linalg.det(rotation) - 1) > POSE_TOLERANCE:
        raise InputError(f"{where} is not a pose: expected a rotation without scale or mirror in it")
    if len(matrix) == 4 and np.abs(matrix[3] - (0, 0, 0, 1)).max() > POSE_TOLERANCE:
        raise InputError(f"{where} is not a pose: expected 0 0 0 1 as its last row")
    return matrix[:3]


def _finite(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond the range of floats
        return None
    return number if math.isfinite(number) else None


# Intrinsics.


def _said(plain: dict[str, Any], frame: dict[str, Any], path: Path, where: str) -> dict[str, float]:
    """What is said of a frame's camera, by itself or else for all, checked but for what needs the image's size."""
    # A frame's field of view precedes a focal length at the top.
    shadowed = {f"fl_{axis}" for axis in "xy" if f"camera_angle_{axis}" in frame}
    merged = {key: value for key, value in plain.items() if key not in shadowed} | frame
    model = "a fisheye" if merged.get("is_fisheye") else merged.get("camera_model", "PINHOLE")
    if model not in CAMERA_MODELS:
        known = ", ".join(CAMERA_MODELS)
        raise InputError(f"{where}: camera_model = {shown(model)}: expected one of {known}; undistort the images")
    said = {}
    for key, (low, high, expected) in _BOUNDS.items():
        if key in merged:
            value = _finite(merged[key])
            if value is None or not low < value < high:
                place = where if key in frame else path
                raise InputError(f"{place}: {key} = {shown(merged[key])}: expected {expected}")
            said[key] = value
    if not {"camera_angle_x", "fl_x"} & {*said}:
        raise InputError(f"{path}: the key 'camera_angle_x' is missing; add the horizontal field of view in radians")
    return said


def _check_shared_intrinsics(frames: list[_Frame], sizes: np.ndarray) -> None:
    """Raises InputError where images of several sizes share intrinsics that could belong to any of them."""
    first: dict[str, int] = {}  # frame of each split that has no intrinsics of its own
    for i, frame in enumerate(frames):
        if frame.own or {"w", "h"} <= {*frame.said}:
            continue
        j = first.setdefault(frame.split, i)
        (width, height), (width_0, height_0) = sizes[i].tolist(), sizes[j].tolist()
        # A field of view alone fits any image of the same shape.
        in_pixels = {"fl_x", "fl_y", "cx", "cy"} & {*frame.said}
        skewed = abs(width * height_0 - width_0 * height) > max(width, height, width_0, height_0)
        if skewed or (in_pixels and (width, height) != (width_0, height_0)):
            raise InputError(
                f"{frame.file}: is {width}x{height} but {frames[j].file.name} is {width_0}x{height_0}; "
                "give each frame fl_x or camera_angle_x of its own, or w and h, in the json"
            )


def _intrinsics(frame: _Frame, size: list[int]) -> list[list[float]]:
    """Focal lengths and principal point in pixels of an image of `size` = (width, height)."""
    said = frame.said
    of = [said.get(key, float(pixels)) for key, pixels in zip("wh", size, strict=True)]  # the size that pixels are of
    if abs(of[0] * size[1] - of[1] * size[0]) > max(of):
        raise InputError(
            f"{frame.where}: w, h = {of[0]:g}, {of[1]:g} but the image is {size[0]}x{size[1]}: "
            "expected one aspect ratio; correct w and h, or use the images that belong to them"
        )
    focal = []
    for i, axis in enumerate("xy"):
        if f"fl_{axis}" in said:
            focal.append(said[f"fl_{axis}"] / of[i] * size[i])
        elif f"camera_angle_{axis}" in said:
            focal.append(0.5 * size[i] / max(math.tan(0.5 * said[f"camera_angle_{axis}"]), 1e-99))
        else:
            focal.append(focal[0])
    centre = [said[key] / of[i] * size[i] if key in said else 0.5 * size[i] for i, key in enumerate(("cx", "cy"))]
    low, high = FOCAL_RANGE
    if not (all(low <= f <= high for f in focal) and all(abs(c) <= high for c in centre)):
        raise InputError(
            f"{frame.where}: focal length {focal[0]:g}, {focal[1]:g} and centre {centre[0]:g}, {centre[1]:g} "
            f"in pixels: expected {low:g} to {high:g}; correct camera_angle_x, fl_x, cx or w"
        )
    return [focal, centre]
