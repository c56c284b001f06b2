"""Camera paths that other programs wrote: nerfstudio's, with a camera for every frame, and instant-ngp's key frames.

Facts from their sources: nerfstudio `render_panel.py`, `camera_paths.py`; instant-ngp `camera_path.cu`,
`nerf_loader.h`, `common_device.cuh`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxngp.cameras import Cameras, make_cameras
from jaxngp.config import InputError, shown
from jaxngp.data.capture import SceneTransform
from jaxngp.data.transforms import NGP_ROTATION
from jaxngp.lenses import make_lens

MAX_SIDE = 2**14  # px, of a frame
MAX_FRAMES = 10**6


@dataclass(frozen=True, eq=False)
class Flight:
    """The frames of a path, in the coordinates of the scene's source."""

    cameras: Cameras  # (N,) numpy; c2w f64
    fps: float | None  # None where the file does not say
    aperture: np.ndarray  # (N,) f64, radius of the lens in the source's units; 0 for a pinhole
    focus: np.ndarray  # (N,) f64, distance along the optical axis of what is sharp; of no meaning for a pinhole
    notes: tuple[str, ...] = ()  # what a user should know of how the file was read


@dataclass(frozen=True)
class Frames:
    """What a path's coordinates may refer to, other than the coordinates of the source."""

    nerfstudio: SceneTransform = SceneTransform((0.0, 0.0, 0.0), 1.0)  # source - 0 to nerfstudio's + 1/2
    ngp: SceneTransform = SceneTransform((0.0, 0.0, 0.0), 1 / 0.33, NGP_ROTATION)


def read_flight(path: Path, num_frames: int, size: tuple[int, int], frames: Frames) -> Flight:
    """Read a camera path in nerfstudio's or instant-ngp's JSON. Raises InputError for anything else.

    num_frames: how many to take, evenly; 0 is all of nerfstudio's, and 60 of instant-ngp's. size: (width, height) of
    the frames of instant-ngp, whose file has none.
    """
    top = _read(path)
    if isinstance(top.get("camera_path"), list):
        return _read_nerfstudio(path, top, num_frames, frames.nerfstudio)
    if isinstance(top.get("path"), list):
        return _read_ngp(path, top, num_frames or 60, size, frames.ngp)
    raise InputError(
        f"{path}: expected camera_path, as nerfstudio and jaxngp.view write it, or path, as instant-ngp does"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        top = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give the file of a camera path") from None
    if not isinstance(top, dict):
        raise InputError(f"{path}: expected a JSON object; give the file of a camera path")
    return top


# nerfstudio.


def dataparser_transform(path: Path, applied: np.ndarray) -> SceneTransform:
    """From a source to nerfstudio's scene, as the dataparser_transforms.json of its training run has it.

    applied (3, 4): the `applied_transform` of the source, which the file's transform starts with, and the source's
    coordinates have been through already. Raises InputError.
    """
    top = _read(path)
    matrix = np.reshape(_numbers(np.ravel(top.get("transform", [])).tolist(), 12, f"{path}: transform"), (3, 4))
    scale = _number(top, "scale", f"{path}", 1e-9, 1e9)
    whole = matrix @ np.linalg.inv(np.vstack([applied, [0, 0, 0, 1]]))
    rotation = _rotation(whole[:, :3], f"{path}: transform")
    x, y, z = (-rotation.T @ whole[:, 3]).tolist()
    a, b, c = map(tuple, rotation.tolist())
    return SceneTransform((x, y, z), 1 / scale, (a, b, c))


def _read_nerfstudio(path: Path, top: dict[str, Any], num_frames: int, frame: SceneTransform) -> Flight:
    width, height = (round(_number(top, f"render_{side}", str(path), 1, MAX_SIDE)) for side in ("width", "height"))
    kind = str(top.get("camera_type", "perspective")).lower()
    if kind not in ("perspective", "equirectangular"):
        raise InputError(f"{path}: camera_type = {shown(kind)}: expected perspective or equirectangular")
    chosen = _chosen(path, top["camera_path"], num_frames)
    c2w, focal = [], []
    for index, entry in chosen:
        where = f"{path}: camera_path[{index}]"
        matrix = np.reshape(_numbers(entry.get("camera_to_world"), 16, f"{where}: camera_to_world"), (4, 4))
        c2w.append(np.column_stack([_rotation(matrix[:3, :3], where), matrix[:3, 3]]))
        fov = _number(entry, "fov", where, 0.1, 179.0) if kind == "perspective" else 90.0
        focal.append(0.5 * height / math.tan(math.radians(fov) / 2))
    if top.get("coordinates") == "source":  # our viewer's
        frame = Frames().nerfstudio
    poses = frame.pose_to_world(np.stack(c2w) + np.array([0, 0, 0, 0.5]))
    focal_xy = np.repeat(np.array(focal)[:, None], 2, axis=1)
    lens = None
    if kind == "equirectangular":  # the whole sphere
        focal_xy = np.tile([width / (2 * np.pi), height / np.pi], (len(poses), 1))
        size = np.tile([width, height], (len(poses), 1))
        lens, _ = make_lens(
            "equirectangular", np.zeros((len(poses), 0)), focal_xy=focal_xy, centre_xy=size / 2, size=size
        )
    cameras = _cameras(poses, focal_xy, width, height, lens)
    fps = _number(top, "fps", str(path), 0.01, 1000) if top.get("fps") is not None else None
    notes = (f"{path}: its crop is not applied",) if top.get("crop") is not None else ()
    still = np.zeros(len(poses))
    return Flight(cameras, fps, still, still, notes)


def _chosen(path: Path, entries: Sequence[Any], num_frames: int) -> list[tuple[int, dict[str, Any]]]:
    """Evenly chosen entries, all of them for 0, and their numbers."""
    if not 0 < len(entries) <= MAX_FRAMES or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected 1 to {MAX_FRAMES} cameras, found {len(entries)} entries")
    if num_frames > len(entries):
        raise InputError(f"--frames = {num_frames}: {path} has {len(entries)} frames")
    index = np.linspace(0, len(entries) - 1, num_frames or len(entries)).round().astype(int).tolist()
    return [(i, entries[i]) for i in index]


# instant-ngp.


def _read_ngp(path: Path, top: dict[str, Any], num_frames: int, size: tuple[int, int], frame: SceneTransform) -> Flight:
    """Key frames, between which the path is a uniform B-spline of the order that the file says."""
    entries = [entry for _, entry in _chosen(path, top["path"], 0)]
    keys = np.stack([_key(entry, f"{path}: path[{i}]") for i, entry in enumerate(entries)])
    stamps = np.array([_number({"timestamp": 0.0} | entry, "timestamp", str(path)) for entry in entries])
    if np.any(np.diff(stamps, prepend=0.0) <= 0):
        stamps = (np.arange(len(keys)) + 1.0) / len(keys)
    order = top.get("spline_order", 3)
    if order not in _BASIS:
        raise InputError(f"{path}: spline_order = {shown(order)}: expected 0, 1, 2 or 3")
    loop = bool(top.get("loop", False))
    places = np.arange(num_frames) / num_frames if loop or num_frames == 1 else np.linspace(0, 1, num_frames)
    found = np.stack([_spline(keys, stamps, place, order=order, loop=loop) for place in places])
    axes = np.stack([_from_quaternion(row[:4]) for row in found]) * np.array([1.0, -1.0, -1.0])  # OpenCV's to OpenGL's
    poses = frame.pose_to_world(np.concatenate([axes, found[:, 4:7, None]], axis=-1))
    width, height = size
    focal = 0.5 * height / np.tan(np.radians(found[:, 7]) / 2)
    cameras = _cameras(poses, np.repeat(focal[:, None], 2, axis=1), width, height, None)
    return Flight(cameras, None, found[:, 8] * frame.side, found[:, 9] * frame.side)


def _key(entry: Mapping[str, Any], where: str) -> np.ndarray:
    """(10,): quaternion x, y, z, w; position; vertical field of view in degrees; aperture; distance of the focus."""
    rotation, position = _numbers(entry.get("R"), 4, f"{where}: R"), _numbers(entry.get("T"), 3, f"{where}: T")
    length = math.hypot(*rotation)
    if length < 1e-6:
        raise InputError(f"{where}: R = {shown(rotation)}: expected a quaternion; correct it")
    aperture = _number(entry, "dof" if "dof" in entry else "aperture_size", where, 0.0, 1e6)
    distance = _number(entry, "slice", where) + _number(entry, "scale", where)
    if aperture and distance <= 0:
        raise InputError(f"{where}: slice + scale = {distance:g}: expected the distance of the focus; correct it")
    fov = _number(entry, "fov", where, 0.1, 179.0)
    return np.array([*(q / length for q in rotation), *position, fov, aperture, distance])


_BASIS = {
    0: np.array([[0, 1, 0, 0]]),  # of t^0, t^1, ...: the weights of the key frames before, at, after, and after that
    1: np.array([[0, 1, 0, 0], [0, -1, 1, 0]]),
    2: np.array([[0.5, 0.5, 0, 0], [-1, 1, 0, 0], [0.5, -1, 0.5, 0]]),
    3: np.array([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]) / 6,
}


def _spline(keys: np.ndarray, stamps: np.ndarray, place: float, *, order: int, loop: bool) -> np.ndarray:
    """The key (10,) at a place in [0, 1] of the path, its quaternion of unit length."""
    count = len(keys)
    first, t = 0, 0.0
    if count > 1:
        now = place * (stamps[-1] if loop else stamps[-2])
        first = int(np.clip(np.searchsorted(stamps, now, side="right"), 0, count - (1 if loop else 2)))
        start = stamps[first - 1] if first else 0.0
        t = float((now - start) / (stamps[first] - start))
    if order == 0:
        first, t = first + round(t), 0.0
    index = first + np.arange(-1, 3)
    near = keys[index % count if loop else np.clip(index, 0, count - 1)].copy()
    near[:, :4] *= np.where(near[:, :4] @ near[1, :4] < 0, -1.0, 1.0)[:, None]  # the short way around
    found = (t ** np.arange(order + 1)) @ _BASIS[order] @ near
    found[:4] /= np.linalg.norm(found[:4])
    return found


def _from_quaternion(xyzw: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) of a unit quaternion."""
    v, w = xyzw[:3], xyzw[3]
    x, y, z = v
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


# Both.


def _cameras(poses: np.ndarray, focal_xy: np.ndarray, width: int, height: int, lens: Any) -> Cameras:
    centre = (width / 2, height / 2)
    cameras = make_cameras(poses, focal_xy=focal_xy, centre_xy=centre, width=width, height=height, lens=lens)
    return cameras.replace(c2w=poses)  # type: ignore[attr-defined]


def _rotation(matrix: np.ndarray, where: str) -> np.ndarray:
    """The rotation in a matrix (3, 3) that may be scaled. Raises InputError where it is none."""
    scale = np.cbrt(np.linalg.det(matrix))
    if not scale > 1e-9 or np.max(np.abs(matrix @ matrix.T / scale**2 - np.eye(3))) > 1e-3:
        raise InputError(f"{where}: expected a rotation, perhaps scaled, and not {shown(matrix.tolist())}; correct it")
    u, _, v = np.linalg.svd(matrix)
    return np.asarray(u @ v)


def _numbers(value: Any, count: int, where: str) -> list[float]:
    sound = isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value)
    if not sound or not np.all(np.abs(np.asarray(value, np.float64)) < 1e9):
        raise InputError(f"{where} = {shown(value)}: expected {count} numbers; correct it")
    return [float(v) for v in value]


def _number(holder: Mapping[str, Any], key: str, where: str, low: float = -1e9, high: float = 1e9) -> float:
    value: Any = holder.get(key)
    if type(value) not in (int, float) or not low <= value <= high:
        raise InputError(f"{where}: {key} = {shown(value)}: expected a number from {low:g} to {high:g}; correct it")
    return float(value)
