"""From what a format says of its views to a `Capture`: files found, intrinsics in their pixels, one lens model."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.config import MAX_LENGTH, InputError, shown
from jaxngp.data.capture import Capture, DepthMap, Mask
from jaxngp.data.photos import IMAGE_SUFFIXES, ImageHeaders, check_present
from jaxngp.lenses import COEFFICIENTS, Lens, Model, make_lens

FOCAL_RANGE = (1e-2, 1e7)  # px; beyond it float32 has no digits left for where pixels look
MAX_COEFFICIENT = 1e6  # of a lens
MAX_FOLD = 0.05  # px by which a place may be missed when it is undistorted and distorted again
POSE_TOLERANCE = 1e-3  # of the entries of R^T R - I, of det R - 1 and of the matrix's last row
IMAGE_FOLDERS = ("images", "images_2", "images_4", "images_8")
"""The first that is there is read; the others have the images of `images` at a half, a quarter and an eighth."""


@dataclass(frozen=True, eq=False)
class View:
    """One view as a format describes it. Intrinsics are in pixels of an image of `size`, whatever the file's size."""

    where: str  # for messages: the file and the place in it
    name: str
    split: str
    file: Path
    c2w: np.ndarray  # (3, 4) f64, OpenGL axes, world units
    focal: tuple[float, float]
    centre: tuple[float, float]
    size: tuple[float, float]
    lens: str = "PINHOLE"  # the source's name of the model
    model: Model = "perspective"
    coefficients: Mapping[str, float] = field(default_factory=dict)  # of `lenses.COEFFICIENTS`; others are 0
    mask: Mask | None = None
    depth: DepthMap | None = None


def make_capture(
    path: Path, views: Sequence[View], headers: ImageHeaders, *, notes: Sequence[str], **rest: Any
) -> Capture:
    """The capture of some views, of whose images `headers` tells; rest: more fields of it. Raises InputError."""
    unusual = [*notes, *headers.notes]
    sizes = headers.sizes
    if (num_sizes := len(np.unique(sizes, axis=0))) > 1:
        unusual.append(f"{path}: the images are of {num_sizes} sizes")
    intrinsics = [_intrinsics(view, size) for view, size in zip(views, sizes.tolist(), strict=True)]
    focal_xy, centre_xy = np.moveaxis(np.array(intrinsics), 1, 0)
    scaled = [(v, s) for v, s in zip(views, sizes.tolist(), strict=True) if v.size != tuple(s)]
    if scaled:
        (view, (width, height)), of = scaled[0], f"{scaled[0][0].size[0]:g}x{scaled[0][0].size[1]:g}"
        unusual.append(
            f"{path}: the intrinsics of {_count(len(scaled), 'image')} are scaled to its size; "
            f"{view.file.name} is {width}x{height} and they are of {of}"
        )
    lens, more = _lens(path, views, focal_xy, centre_xy, sizes)
    for what in ("mask", "depth"):
        descriptors = [getattr(view, what) for view in views]
        check_present([d.file for d in descriptors if d], {"mask": "mask", "depth": "depth map"}[what])
        if any(descriptors):
            rest[f"{what}s"] = tuple(descriptors)
    return Capture(
        path=path,
        names=tuple(view.name for view in views),
        splits=tuple(view.split for view in views),
        files=tuple(view.file for view in views),
        cameras=Cameras(np.stack([view.c2w for view in views]), focal_xy, centre_xy, sizes, lens),  # type: ignore[arg-type]
        has_alpha=headers.has_alpha,
        lens_models=tuple(view.lens for view in views),
        reduced=reduced_files([view.file for view in views]),
        unusual=(*unusual, *more),
        **rest,
    )


def check_pose(matrix: np.ndarray, where: str) -> np.ndarray:
    """c2w (3, 4) f64 of a matrix (3 or 4, 4) that is a rotation and a position. Raises InputError."""
    rotation = matrix[:3, :3]
    sound = np.isfinite(matrix).all() and np.abs(matrix).max() <= MAX_LENGTH
    error = np.abs(rotation.T @ rotation - np.eye(3)).max() if sound else np.inf
    if error > POSE_TOLERANCE or abs(np.linalg.det(rotation) - 1) > POSE_TOLERANCE:
        raise InputError(f"{where} is not a pose: expected a rotation without scale or mirror in it")
    if len(matrix) == 4 and np.abs(matrix[3] - (0, 0, 0, 1)).max() > POSE_TOLERANCE:
        raise InputError(f"{where} is not a pose: expected 0 0 0 1 as its last row")
    return matrix[:3]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number > 1)


# Files.


class Finder:
    """Finds the files that a scene's own text names, in or relative to its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._moved: list[str] = []

    def find(self, text: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Path:
        r"""The file of that name, be it there or not.

        A \ is taken as /. A name without one of the extensions gets the first of a file that is there. A path that is
        absolute, but of another machine, is looked for under the scene's folder by its last parts.
        """
        name = text.replace("\\", "/")
        path = Path(name)
        whole = self._with_suffix(self._folder / path, suffixes)
        absolute = path.is_absolute() or re.match("[A-Za-z]:/", name)
        if not absolute or os.path.exists(whole):  # noqa: PTH110 - Path's raises for a long name
            return whole
        parts = PurePosixPath(name).parts[1:]
        for first in range(max(0, len(parts) - 8), len(parts)):
            near = self._with_suffix(self._folder.joinpath(*parts[first:]), suffixes)
            if os.path.exists(near):  # noqa: PTH110
                self._moved.append(text)
                return near
        return whole

    def notes(self) -> list[str]:
        """On files that were found elsewhere."""
        if not self._moved:
            return []
        return [
            f"{self._folder}: {_count(len(self._moved), 'file')} with an absolute path that does not exist, such as "
            f"{shown(self._moved[0])}, found under the scene's folder instead"
        ]

    def _with_suffix(self, path: Path, suffixes: Sequence[str]) -> Path:
        if path.suffix.lower() in suffixes:
            return path
        candidates = [Path(f"{path}{suffix}") for lower in suffixes for suffix in (lower, lower.upper())]
        candidates += [path] if path.suffix else []  # of a kind that is not supported, as will be said
        return next((c for c in candidates if os.path.exists(c)), candidates[0])  # noqa: PTH110


def view_names(files: Sequence[Path], folder: Path) -> list[str]:
    """The stem of each file; its whole path where two folders hold a file of one name."""
    stems = Counter(file.stem for file in files)
    whole = [str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in files]
    return [file.stem if stems[file.stem] == 1 else name for file, name in zip(files, whole, strict=True)]


def find_image_folder(path: Path, names: Sequence[str], *, above: bool) -> Path:
    """The folder that the names of a model's images are relative to, in the scene's, or above it if `above`."""
    for base in (path, *(path.absolute().parents[:3] if above else ())):
        for folder in (*(base / name for name in IMAGE_FOLDERS), base):
            if any(os.path.exists(folder / name) for name in (names[0], names[-1])):  # noqa: PTH110 - as above
                return folder
    return path / IMAGE_FOLDERS[0]


def reduced_files(files: Sequence[Path]) -> dict[int, tuple[Path, ...]]:
    """The files of the same images at a half, a quarter or an eighth, by 2, 4 or 8, as far as they are there.

    They are in images_2, images_4 and images_8 beside images, under their names, maybe with another extension, or else
    under other names in the same order.
    """
    first = next((p for p in files[0].parents if p.name == IMAGE_FOLDERS[0]), None)
    if first is None or not all(file.is_relative_to(first) for file in files):
        return {}
    found = {}
    for name in IMAGE_FOLDERS[1:]:
        folder = first.parent / name
        there = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
        by_stem = {f.relative_to(folder).with_suffix(""): f for f in there}
        wanted = [file.relative_to(first).with_suffix("") for file in files]
        if all(w in by_stem for w in wanted):
            found[int(name[-1])] = tuple(by_stem[w] for w in wanted)
        elif len(there) == len(files) and [*files] == sorted(files):
            found[int(name[-1])] = tuple(there)
    return found


def natural_key(text: str) -> list[Any]:
    """For sorting by name with numbers by their value."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", text))]


# Intrinsics.


def _intrinsics(view: View, size: list[int]) -> list[list[float]]:
    """Focal lengths and principal point in pixels of an image of `size` = (width, height)."""
    of = view.size
    if abs(of[0] * size[1] - of[1] * size[0]) > max(of):
        turned = abs(of[1] * size[1] - of[0] * size[0]) <= max(of)
        raise InputError(
            f"{view.where}: w, h = {of[0]:g}, {of[1]:g} but the image is {size[0]}x{size[1]}: expected one aspect "
            "ratio; correct w and h, or use the images that belong to them"
            + (" (turned by EXIF, perhaps: store the pixels turned)" if turned else "")
        )
    scale = [n / m if n != m else 1.0 for n, m in zip(size, of, strict=True)]
    focal = [f * s for f, s in zip(view.focal, scale, strict=True)]
    centre = [c * s for c, s in zip(view.centre, scale, strict=True)]
    low, high = FOCAL_RANGE
    if not (all(low <= f <= high for f in focal) and all(abs(c) <= high for c in centre)):
        raise InputError(
            f"{view.where}: focal length {focal[0]:g}, {focal[1]:g} and centre {centre[0]:g}, {centre[1]:g} "
            f"in pixels: expected {low:g} to {high:g}; correct camera_angle_x, fl_x, cx or w"
        )
    return [focal, centre]


def _lens(
    path: Path, views: Sequence[View], focal_xy: np.ndarray, centre_xy: np.ndarray, sizes: np.ndarray
) -> tuple[Lens | None, list[str]]:
    """The lenses of all views, None where all are pinholes, and notes on them."""
    if all(view.model == "perspective" and not any(view.coefficients.values()) for view in views):
        return None, []
    model = views[0].model
    if any(view.model != model for view in views):
        found = ", ".join(f"{name} ({count})" for name, count in Counter(view.lens for view in views).most_common())
        raise InputError(
            f"{path}: mixes lenses of several models, {found}; train on one of them, or undistort the images"
        )
    coefficients = np.array([[view.coefficients.get(name, 0.0) for name in COEFFICIENTS[model]] for view in views])
    if (wild := np.abs(coefficients).max(axis=1, initial=0) > MAX_COEFFICIENT).any():
        view = views[int(wild.argmax())]
        raise InputError(f"{view.where}: the lens {view.lens} has coefficients above {MAX_COEFFICIENT:g}; correct them")
    intrinsics = {"focal_xy": focal_xy, "centre_xy": centre_xy, "size": sizes}
    lens, error = make_lens(model, coefficients, **intrinsics)
    if not (folded := np.flatnonzero(error > MAX_FOLD)).size:
        return lens, []
    view = views[folded[0]]
    values = [f"{name} = {value:g}" for name, value in view.coefficients.items() if value]
    values.append(f"focal length {focal_xy[folded[0], 0]:.4g}")
    whole = f"{view.where}: the lens {view.lens} ({', '.join(values)})"
    if model in ("fisheye", "eucm"):
        # A circular fisheye lights a disc: at least the rectangle within it must be sound.
        part = {"size": sizes * np.sqrt(0.5), "centre_xy": centre_xy - sizes * (1 - np.sqrt(0.5)) / 2}
        if (make_lens(model, coefficients, **intrinsics | part)[1] <= MAX_FOLD).all():
            more = f", and those of {len(folded) - 1} more views do" if len(folded) > 1 else ""
            return lens, [f"{whole} ends before the corners of the image{more}: mask them, as rays there mean nothing"]
    raise InputError(
        f"{whole} folds over inside the image: correct its values, or the focal length, "
        "which may be that of another image size; or undistort the images"
    )
