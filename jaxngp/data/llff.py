"""The format of LLFF: `poses_bounds.npy` beside a folder of images.

A row of it is a 3x5 matrix and the nearest and farthest depth. The columns of the matrix are the camera's axes in the
world (down, right, backwards), its position, and (height, width, focal length) of the images at full size. Rows belong
to the images in the order of their names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxngp.config import InputError
from jaxngp.data.capture import Capture
from jaxngp.data.photos import IMAGE_SUFFIXES, probe_images
from jaxngp.data.views import IMAGE_FOLDERS, View, check_pose, make_capture, view_names

POSES = "poses_bounds.npy"


def detect(path: Path) -> tuple[str, ...]:
    """("train",) where a folder has a poses_bounds.npy."""
    return ("train",) if (path / POSES).is_file() else ()


def read(path: Path, splits: tuple[str, ...]) -> Capture:
    """All views, sorted by name, with the headers of their images. Raises InputError."""
    rows = _read_rows(path / POSES)
    files: list[Path] = []
    for folder in (path / name for name in IMAGE_FOLDERS):
        if folder.is_dir() and not files:
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) != len(rows):
        raise InputError(
            f"{path / POSES}: has {len(rows)} poses but {path / IMAGE_FOLDERS[0]} {len(files)} images; put there the "
            "images that the poses belong to, and no others"
        )
    views = []
    for i, (file, name) in enumerate(zip(files, view_names(files, path), strict=True)):
        where = f"{path / POSES}: row {i}"
        down, right, backward, position, (height, width, focal) = rows[i, :15].reshape(3, 5).T
        c2w = check_pose(np.stack([right, -down, backward, position], axis=1), where)
        if not (focal > 0 and min(width, height) >= 1):
            raise InputError(f"{where}: expected height, width and focal length in pixels; export it again")
        views.append(View(where, name, splits[0], file, c2w, (focal, focal), (width / 2, height / 2), (width, height)))
    return make_capture(path, views, probe_images(files), notes=(), format="LLFF")


def _read_rows(path: Path) -> np.ndarray:
    """(V, 17) f64."""
    try:
        rows = np.load(path, allow_pickle=False)
    except Exception as error:  # a broken header leads to whatever it likes
        raise InputError(f"{path}: cannot be read as an array ({error}); export or download it again") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 17 or rows.dtype.kind != "f":
        raise InputError(f"{path}: holds an array of shape {np.shape(rows)}: expected (V, 17) floats; export it again")
    if not len(rows) or not np.isfinite(rows[:, :15]).all():
        raise InputError(f"{path}: expected at least one view, and finite numbers; export it again")
    return rows.astype(np.float64)
