"""The cameras of a run, refined where they were, as files that other programs read: transforms.json and COLMAP text.

All views of the scene, in the coordinates and the pixels of its own files; a refined scene and its cameras moved
together, so these cameras fit a mesh or splats exported from the same run. Views that were not trained on keep their
poses, moved along with the gauge (`refinement.placed_cameras`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxngp.cameras import Cameras
from jaxngp.config import Config, InputError
from jaxngp.data import Capture, read_views
from jaxngp.lenses import COEFFICIENTS
from jaxngp.records import replacing, write_json
from jaxngp.refinement import placed_cameras
from jaxngp.runs import Run

_OPENCV = ("k1", "k2", "p1", "p2")
_FISHEYE = ("k1", "k2", "k3", "k4")
_COLMAP: dict[str, dict[str, tuple[str, ...]]] = {
    "perspective": {
        "OPENCV": _OPENCV,
        "FULL_OPENCV": (*_OPENCV, "k3", "d1", "d2", "d3"),
    },
    "fisheye": {"OPENCV_FISHEYE": _FISHEYE, "THIN_PRISM_FISHEYE": (*_OPENCV, "k3", "k4", "s1", "s3")},
    "division": {"DIVISION": ("k",)},
    "fov": {"FOV": ("omega",)},
    "eucm": {"EUCM": ("alpha", "beta")},
}
"""COLMAP's camera models by ours, with their coefficients in order; the first that can express a lens is written."""


@dataclass(frozen=True)
class PoseOptions(Config):
    """There are none."""


@dataclass(frozen=True, eq=False)
class _Views:
    """All views of a scene: world units, pixels of its own files."""

    capture: Capture
    roles: tuple[str, ...]  # train, val, test or held-out
    cameras: Cameras  # (V,), c2w f64


def write_transforms(run: Run, path: Path, options: PoseOptions) -> str:
    """Write a transforms.json with OpenGL axes. Raises InputError where it cannot express a lens."""
    del options
    views = _views(run)
    cameras = views.cameras
    if cameras.lens is not None and cameras.lens.model not in ("perspective", "fisheye"):
        raise InputError(f"a transforms.json has no lens of the model {cameras.lens.model}: give --format=colmap")
    optics = [_optics(cameras[view]) for view in range(len(cameras))]
    shared = optics[0] if all(other == optics[0] for other in optics) else {}
    frames = []
    for view, own in enumerate(optics):
        matrix = [*np.asarray(cameras.c2w[view]).tolist(), [0.0, 0.0, 0.0, 1.0]]
        where = {"file_path": _file(views, view, path.parent)}
        frames.append({**where, **({} if shared else own), "transform_matrix": matrix})
    plain: dict[str, Any] = {**shared, "frames": frames}
    for split, key in (("train", "train"), ("val", "val"), ("test", "test"), ("held-out", "test")):
        if named := [frame["file_path"] for frame, role in zip(frames, views.roles, strict=True) if role == split]:
            plain[f"{key}_filenames"] = named
    write_json(path, plain)
    return _said(run, len(frames), "a transforms.json")


def write_colmap(run: Run, path: Path, options: PoseOptions) -> str:
    """Write cameras.txt, images.txt and an empty points3D.txt into a folder.

    Raises InputError for a lens that COLMAP cannot express.
    """
    del options
    views = _views(run)
    lines: list[str] = []
    images: list[str] = []
    numbers: dict[str, int] = {}
    for view in range(len(views.cameras)):
        camera = views.cameras[view]
        model, values = _colmap_camera(camera)
        spelled = " ".join([model, *map(str, np.asarray(camera.size).tolist()), *(repr(v) for v in values)])
        if spelled not in numbers:
            numbers[spelled] = len(numbers) + 1
            lines.append(f"{numbers[spelled]} {spelled}")
        c2w = np.asarray(camera.c2w, np.float64) * np.array([1, -1, -1, 1])  # OpenCV's axes
        w2c = c2w[:, :3].T
        pose = [*quaternion(w2c), *(-w2c @ c2w[:, 3])]
        name = Path(_file(views, view, path)).name if not views.capture.files else _image_name(views, view)
        images += [f"{view + 1} {' '.join(repr(float(v)) for v in pose)} {numbers[spelled]} {name}", ""]
    path.mkdir(parents=True, exist_ok=True)
    for file, content in (("cameras", lines), ("images", images), ("points3D", [])):
        with replacing(path / f"{file}.txt") as unfinished:
            unfinished.write_text("\n".join([*content, ""]), encoding="utf-8")
    return _said(run, len(views.cameras), "a text model of COLMAP without points")


def _said(run: Run, count: int, what: str) -> str:
    refined = run.progress.state.refinement is not None and run.config.refine.cameras
    return f"{count} {'refined' if refined else 'given'} cameras as {what}"


def _views(run: Run) -> _Views:
    """All views of the run's scene with its cameras. Raises InputError where the scene's files have changed."""
    if run.given_cameras is None or run.cameras is None:
        raise InputError(f"{run.workdir} was trained on a table of rays: it has no cameras to export")
    capture, roles, _ = read_views(run.config.scene)
    assert capture.cameras is not None
    full: Cameras = jax.tree.map(np.asarray, capture.cameras)
    in_scene = full.replace(c2w=run.transform.pose_to_scene(np.asarray(full.c2w)))  # type: ignore[attr-defined]
    rows = [view for view, role in enumerate(roles) if role == "train"]
    given: Cameras = jax.tree.map(np.asarray, run.given_cameras)
    close = len(rows) == len(given) and np.allclose(in_scene.c2w[rows], given.c2w, atol=1e-4)
    if not close:
        raise InputError(f"{capture.path}: its cameras are not those that {run.workdir} was trained on; restore them")
    if run.progress.state.refinement is None or not run.config.refine.cameras:
        return _Views(capture, roles, full)
    refined: Cameras = jax.tree.map(np.asarray, run.cameras)
    ratio = full.size[rows] / given.size
    trained = in_scene[rows]
    now = refined.replace(  # type: ignore[attr-defined]
        focal_xy=trained.focal_xy * (refined.focal_xy / given.focal_xy),
        centre_xy=trained.centre_xy + (refined.centre_xy - given.centre_xy) * ratio,
        size=trained.size,
    )
    placed = placed_cameras(in_scene, trained, now)
    return _Views(capture, roles, placed.replace(c2w=run.transform.pose_to_world(np.asarray(placed.c2w))))  # type: ignore[attr-defined]


def _coefficients(camera: Cameras) -> dict[str, float]:
    """The coefficients of a single camera's lens that are not 0, by name."""
    if camera.lens is None:
        return {}
    values = np.asarray(camera.lens.coefficients, np.float64).tolist()
    return {name: value for name, value in zip(COEFFICIENTS[camera.lens.model], values, strict=True) if value}


def _optics(camera: Cameras) -> dict[str, Any]:
    """The keys of a transforms.json for a single camera."""
    arrays = (camera.size, camera.focal_xy, camera.centre_xy)
    (width, height), focal, centre = (np.asarray(a, np.float64).tolist() for a in arrays)
    found = _coefficients(camera)
    fisheye = camera.lens is not None and camera.lens.model == "fisheye"
    names = _FISHEYE if fisheye else (*_OPENCV, "k3", "k4")
    if foreign := set(found) - set(names):
        raise InputError(f"a transforms.json has no coefficient {min(foreign)} of a lens: give --format=colmap")
    plain: dict[str, Any] = {"camera_model": "OPENCV_FISHEYE" if fisheye else "OPENCV" if found else "PINHOLE"}
    plain |= {"w": int(width), "h": int(height), "fl_x": focal[0], "fl_y": focal[1], "cx": centre[0], "cy": centre[1]}
    if not fisheye:
        plain["camera_angle_x"] = 2 * math.atan(0.5 * width / focal[0])
    return plain | ({name: found.get(name, 0.0) for name in names} if found or fisheye else {})


def _colmap_camera(camera: Cameras) -> tuple[str, list[float]]:
    """The name of COLMAP's model of a single camera, and its parameters."""
    places = [*np.asarray(camera.focal_xy, np.float64).tolist(), *np.asarray(camera.centre_xy, np.float64).tolist()]
    if camera.lens is not None and camera.lens.model == "equirectangular":
        return "EQUIRECTANGULAR", [float(v) for v in np.asarray(camera.size)]
    found = _coefficients(camera)
    if camera.lens is None or (camera.lens.model == "perspective" and not found):
        return "PINHOLE", places
    for name, order in _COLMAP[camera.lens.model].items():
        if set(found) <= set(order):
            return name, [*places, *(found.get(coefficient, 0.0) for coefficient in order)]
    raise InputError(f"COLMAP has no camera model with the coefficients {', '.join(found)}: give --format=transforms")


def quaternion(rotation: np.ndarray) -> list[float]:
    """w, x, y, z of a rotation (3, 3): the eigenvector of Bar-Itzhack's matrix (2000), exact near every angle."""
    m = rotation
    k = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [0, m[0, 0] - m[1, 1] - m[2, 2], m[1, 0] + m[0, 1], m[2, 0] + m[0, 2]],
            [0, 0, m[1, 1] - m[0, 0] - m[2, 2], m[2, 1] + m[1, 2]],
            [0, 0, 0, m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    found = np.linalg.eigh(k, UPLO="U")[1][:, -1]
    return (found * (1 if found[0] >= 0 else -1)).tolist()


def _file(views: _Views, view: int, folder: Path) -> str:
    """The path of a view's image, relative to a folder where that stays below its parent."""
    if not views.capture.files:
        return views.capture.names[view]
    file = views.capture.files[view].absolute()
    near = file.is_relative_to(folder.absolute().parent)
    return Path(os.path.relpath(file, folder) if near else file).as_posix()


def _image_name(views: _Views, view: int) -> str:
    """What COLMAP calls a view's image: its path below the folder that holds all of them."""
    files = [file.absolute() for file in views.capture.files]
    root = Path(os.path.commonpath([file.parent for file in files]))
    return files[view].relative_to(root).as_posix()
