"""The format of COLMAP: a sparse model (cameras, images and points3D, as text or binary) beside a folder of images.

It is read here and not by pycolmap, which on one wrong byte may end the process or ask for all memory, which cuts off
names at a space, and whose zlib breaks Pillow's in the same process.
Source: https://colmap.github.io/format.html, and `sensor/models.h` of COLMAP.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxngp.config import MAX_LENGTH, InputError, shown
from jaxngp.data.capture import Capture
from jaxngp.data.photos import probe_images
from jaxngp.data.views import View, check_pose, find_image_folder, make_capture, view_names
from jaxngp.lenses import Model

FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", ".")
"""Where the model is, relative to the scene; the last is a scene that is the model itself."""

_MODELS: tuple[tuple[str, Model | None, str], ...] = (
    ("SIMPLE_PINHOLE", "perspective", "f cx cy"),
    ("PINHOLE", "perspective", "fx fy cx cy"),
    ("SIMPLE_RADIAL", "perspective", "f cx cy k1"),
    ("RADIAL", "perspective", "f cx cy k1 k2"),
    ("OPENCV", "perspective", "fx fy cx cy k1 k2 p1 p2"),
    ("OPENCV_FISHEYE", "fisheye", "fx fy cx cy k1 k2 k3 k4"),
    ("FULL_OPENCV", "perspective", "fx fy cx cy k1 k2 p1 p2 k3 d1 d2 d3"),
    ("FOV", "fov", "fx fy cx cy omega"),
    ("SIMPLE_RADIAL_FISHEYE", "fisheye", "f cx cy k1"),
    ("RADIAL_FISHEYE", "fisheye", "f cx cy k1 k2"),
    ("THIN_PRISM_FISHEYE", "fisheye", "fx fy cx cy k1 k2 p1 p2 k3 k4 s1 s3"),
    ("RAD_TAN_THIN_PRISM_FISHEYE", None, "fx fy cx cy k0 k1 k2 k3 k4 k5 p0 p1 s0 s1 s2 s3"),
    ("SIMPLE_DIVISION", "division", "f cx cy k"),
    ("DIVISION", "division", "fx fy cx cy k"),
    ("SIMPLE_FISHEYE", "fisheye", "f cx cy"),
    ("FISHEYE", "fisheye", "fx fy cx cy"),
    ("EUCM", "eucm", "fx fy cx cy alpha beta"),
    ("EQUIRECTANGULAR", "equirectangular", "w h"),
)
"""COLMAP's camera models by number: name, the lens model that expresses it, and its parameters in order."""

MODEL_NUMBERS = {name: number for number, (name, _, _) in enumerate(_MODELS)}


@dataclass(frozen=True)
class _Camera:
    lens: str
    model: Model
    size: tuple[float, float]
    focal: tuple[float, float]
    centre: tuple[float, float]
    coefficients: dict[str, float]


@dataclass(frozen=True)
class _Image:
    name: str
    quaternion: tuple[float, ...]  # w, x, y, z of world to camera
    translation: tuple[float, ...]
    camera: int


def detect(path: Path) -> tuple[str, ...]:
    """("train",) where a folder has a sparse model, whose views are not in splits."""
    return ("train",) if _model_folder(path) else ()


def read(path: Path, splits: tuple[str, ...]) -> Capture:
    """All views, sorted by name, with the headers of their images. Raises InputError."""
    folder = _model_folder(path)
    if folder is None:
        raise InputError(f"{path}: expected a model of COLMAP: cameras and images, as .bin or .txt, in sparse/0")
    cameras, images = _read_cameras(folder), _read_images(folder)
    images.sort(key=lambda image: image.name)
    root, notes = find_image_folder(path, [image.name for image in images], above=folder.samefile(path)), []
    others = [other.name for other in sorted(folder.parent.glob("[0-9]*")) if other != folder and _suffix(other)]
    if folder.name.isdigit() and others:
        notes.append(f"{folder}: the model that is read; {', '.join(others[:5])} beside it are not")
    files = [root / image.name for image in images]
    views = []
    for image, file, name in zip(images, files, view_names(files, root), strict=True):
        where = f"{folder}: image {shown(image.name)}"
        if image.camera not in cameras:
            raise InputError(f"{where}: camera {image.camera} is not in the model; export it again")
        camera = cameras[image.camera]
        views.append(
            View(
                where, name, splits[0], file, _pose(image, where), camera.focal, camera.centre, camera.size,
                camera.lens, camera.model, camera.coefficients,
            )
        )  # fmt: skip
    return make_capture(
        path, views, probe_images(files), notes=notes, points=_read_points(folder), format="COLMAP"
    )  # fmt: skip


def _model_folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    return next((path / folder for folder in FOLDERS if _suffix(path / folder)), None)


def _suffix(folder: Path) -> str | None:
    """In which form a folder has a model; binary precedes text, as for COLMAP."""
    return next(
        (s for s in (".bin", ".txt") if all((folder / f"{n}{s}").is_file() for n in ("cameras", "images"))), None
    )


def _pose(image: _Image, where: str) -> np.ndarray:
    """c2w (3, 4) f64 with OpenGL axes."""
    w, x, y, z = image.quaternion
    length = math.sqrt(w * w + x * x + y * y + z * z)
    if not 1e-6 < length < 1e6 or not all(abs(t) <= MAX_LENGTH for t in image.translation):
        raise InputError(f"{where}: expected a quaternion and a translation, both finite; export the model again")
    w, x, y, z = w / length, x / length, y / length, z / length
    to_camera = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    centre = -to_camera.T @ np.array(image.translation)
    return check_pose(np.concatenate([to_camera.T * (1, -1, -1), centre[:, None]], axis=1), where)


def _camera(where: str, number: int, size: tuple[float, float], values: tuple[float, ...]) -> _Camera:
    """A camera from the number of its model and its parameters."""
    if not 0 <= number < len(_MODELS):
        raise InputError(f"{where}: camera model {number} is unknown; undistort the images")
    name, model, spelled = _MODELS[number]
    if model is None:
        raise InputError(f"{where}: camera model {name} is not supported; undistort the images with COLMAP")
    names = spelled.split()
    if len(values) != len(names) or not all(map(math.isfinite, values)) or min(size) < 1:
        raise InputError(f"{where}: {name}: expected {len(names)} finite parameters and a size; export the model again")
    said = dict(zip(names, values, strict=True))
    if model == "equirectangular":
        focal, centre = (size[0] / math.tau, size[1] / math.pi), (size[0] / 2, size[1] / 2)
        return _Camera(name, model, size, focal, centre, {})
    x = said.pop("f", None) or said.pop("fx", 0.0)
    focal = (x, said.pop("fy", x))
    centre = (said.pop("cx"), said.pop("cy"))
    if model == "fov" and said["omega"] == 0:
        return _Camera(name, "perspective", size, focal, centre, {})
    return _Camera(name, model, size, focal, centre, said)


# Files.


class _Reader:
    """Numbers from a binary file, little endian."""

    def __init__(self, path: Path) -> None:
        self._content, self._at = path.read_bytes(), 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._content, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def text(self) -> str:
        end = self._content.index(b"\0", self._at)
        text, self._at = os.fsdecode(self._content[self._at : end]), end + 1
        return text

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError("it ends early")


def _lines(path: Path) -> Iterator[str]:
    return iter(os.fsdecode(path.read_bytes()).split("\n"))


def _record(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a file of COLMAP's models, or cut off ({error}); export the model again")


def _read_cameras(folder: Path) -> dict[int, _Camera]:
    suffix = _suffix(folder)
    path = folder / f"cameras{suffix}"
    cameras: dict[int, _Camera] = {}
    try:
        if suffix == ".bin":
            reader = _Reader(path)
            for _ in range(reader.take("Q")[0]):
                key, number, width, height = reader.take("IiQQ")
                count = len(_MODELS[number][2].split()) if 0 <= number < len(_MODELS) else 0
                where = f"{path}: camera {key}"
                cameras[key] = _camera(where, number, (float(width), float(height)), reader.take(f"{count}d"))
        else:
            for line in filter(_record, _lines(path)):
                words = line.split()
                where = f"{path}: camera {shown(words[0])}"
                if words[1] not in MODEL_NUMBERS:
                    raise InputError(f"{where}: camera model {shown(words[1])} is unknown; undistort the images")
                size = float(words[2]), float(words[3])
                cameras[int(words[0])] = _camera(where, MODEL_NUMBERS[words[1]], size, tuple(map(float, words[4:])))
    except InputError:
        raise
    except (OSError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise _broken(path, error) from None
    return cameras


def _read_images(folder: Path) -> list[_Image]:
    suffix = _suffix(folder)
    path = folder / f"images{suffix}"
    try:
        images = [*(_binary_images if suffix == ".bin" else _text_images)(path)]
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise _broken(path, error) from None
    if not images:
        raise InputError(f"{path}: has no image; reconstruct the scene again")
    for image in images:
        if PurePosixPath(image.name).name in ("", ".."):
            raise InputError(f"{path}: {shown(image.name)} is no name of an image; export the model again")
    return images


def _binary_images(path: Path) -> Iterator[_Image]:
    reader = _Reader(path)
    for _ in range(reader.take("Q")[0]):
        _, *pose, camera = reader.take("I7dI")
        name = reader.text()
        reader.skip(24 * reader.take("Q")[0])
        yield _Image(name.replace("\\", "/"), tuple(pose[:4]), tuple(pose[4:]), camera)


def _text_images(path: Path) -> Iterator[_Image]:
    lines = _lines(path)
    for line in lines:
        if not _record(line):
            continue
        words = line.strip().split(maxsplit=9)  # a name may have spaces
        pose = [float(word) for word in words[1:8]]
        yield _Image(words[9].replace("\\", "/"), tuple(pose[:4]), tuple(pose[4:]), int(words[8]))
        if len(next(lines, "").split()) % 3:  # what it sees of points, perhaps nothing
            raise ValueError(f"{shown(words[9])}: expected x, y and a number of each point in the line below it")


def _read_points(folder: Path) -> np.ndarray | None:
    """(N, 3) f64, or None where there is no such file."""
    path = folder / f"points3D{_suffix(folder)}"
    if not path.is_file():
        return None
    try:
        if path.suffix == ".bin":
            found, reader = [], _Reader(path)
            for _ in range(reader.take("Q")[0]):
                found.append(reader.take("Q3d3Bd")[1:4])
                reader.skip(8 * reader.take("Q")[0])
        else:
            found = [tuple(map(float, line.split(maxsplit=4)[1:4])) for line in filter(_record, _lines(path))]
        points = np.array(found, np.float64).reshape(-1, 3)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise _broken(path, error) from None
    return points[np.isfinite(points).all(axis=1)]
