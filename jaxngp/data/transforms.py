"""The formats that keep cameras in a `transforms.json`: those of NeRF-synthetic ("Blender"), instant-ngp, nerfstudio.

All have a list of `frames`, each with a `file_path` and a camera-to-world `transform_matrix` with OpenGL axes. They
differ in whose values count: instant-ngp and Blender let a frame's intrinsics replace those at the top of the file, and
nerfstudio the reverse. Which of them wrote a file is decided by the keys that only one of them has; where that leaves
it open and the file says two different things, it is refused.

A folder has a `transforms_<split>.json` for each split, or one `transforms.json` for all, whose views are sorted by
name, and which may list the views of each split (`train_filenames` ...).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from jaxngp.config import InputError, shown
from jaxngp.data.capture import SPLITS, Box, Capture, DepthMap, Mask, SceneTransform
from jaxngp.data.photos import ImageHeaders, probe_images
from jaxngp.data.points import read_ply_points
from jaxngp.data.views import Finder, View, check_pose, make_capture, natural_key, view_names
from jaxngp.lenses import Model

SINGLE = "transforms.json"
NGP_ROTATION = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
"""From the axes of a file to instant-ngp's: (x, y, z) becomes (y, z, x)."""
BLENDER_BOX = Box((0.0, 0.0, 0.0), 3.0)
MAX_NAME = 2**10  # characters of a file_path

Dialect = Literal["Blender", "instant-ngp", "nerfstudio", "undecided"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MARKS: dict[Dialect, frozenset[str]] = {
    "instant-ngp": _words(
        "aabb_scale scale offset aabb render_aabb x_fov y_fov sharpness is_fisheye integer_depth_scale depth_path "
        "enable_depth_loading enable_ray_loading n_extra_learnable_dims importance_sampling sharpen white_transparent "
        "black_transparent fix_premult from_mitsuba n_frames envmap rolling_shutter"
    ),
    "nerfstudio": _words(
        "camera_model applied_transform applied_scale ply_file_path mask_path depth_file_path distortion_params "
        "train_filenames val_filenames test_filenames orientation_override auto_scale_poses_override "
        "colmap_im_id"
    ),
}
"""The keys that one of the two dialects has, at the top or in frames, and the other has not."""

_FOCAL = ("x_fov", "y_fov", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y")
_BEND = ("k1", "k2", "k3", "k4", "p1", "p2")
_RADIANS = (0.0, math.pi, "radians between 0 and pi; correct it")
_DEGREES = (0.0, 180.0, "degrees between 0 and 180; correct it")
_LENGTH = (0.0, math.inf, "a positive number of pixels; correct it")
_FINITE = (-math.inf, math.inf, "a finite number; correct it")
_BOUNDS = {
    **dict.fromkeys(("camera_angle_x", "camera_angle_y"), _RADIANS),
    **dict.fromkeys(("x_fov", "y_fov"), _DEGREES),
    **dict.fromkeys(("fl_x", "fl_y", "w", "h"), _LENGTH),
    **dict.fromkeys(("cx", "cy"), _FINITE),
    **dict.fromkeys(_BEND, _FINITE),
}
_CAMERA_MODELS: dict[str, Model] = {
    **dict.fromkeys(("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"), "perspective"),
    "OPENCV_FISHEYE": "fisheye",
    "EQUIRECTANGULAR": "equirectangular",
}
_REFUSED = {
    "rolling_shutter": "a rolling shutter",
    **{f"ftheta_p{i}": "an f-theta lens" for i in range(5)},
    "orthographic": "an orthographic camera",
    "equirectangular": "the equal-area panorama of instant-ngp (an equirectangular one is 'latlong' there)",
    "from_mitsuba": "the axes of Mitsuba",
    "normal_mts_args": "the axes of Mitsuba",
    "from_na": "the axes of NeuS",
    "white_transparent": "a colour that stands for transparent",
    "black_transparent": "a colour that stands for transparent",
    "fix_premult": "colour multiplied by alpha",
    "sharpen": "sharpening",
}
"""Keys that change what images or poses mean, and what they stand for, which is not supported."""

_PASSED_OVER = _words(
    "frames file_path transform_matrix transform_matrix_start transform_matrix_end camera_model is_fisheye latlong "
    "up rotation render_aabb n_extra_learnable_dims importance_sampling enable_ray_loading enable_depth_loading "
    "colmap_im_id auto_scale_poses_override orientation_override sharpness sharpness_discard_threshold"
)
_KNOWN = frozenset({*_PASSED_OVER, *_BOUNDS, *_REFUSED, *_MARKS["instant-ngp"], *_MARKS["nerfstudio"]}) - {"envmap"}


@dataclass(frozen=True, eq=False)
class _File:
    """A transforms file."""

    path: Path
    top: dict[str, Any]
    frames: list[dict[str, Any]]  # of one split, each with a file_path that is sound
    where: list[str]  # of each frame, for messages
    dialect: Dialect
    notes: list[str]
    finder: Finder

    @property
    def folder(self) -> Path:
        return self.path.parent


# Detecting and reading.


def detect(path: Path) -> tuple[str, ...]:
    """Which of train, val and test a folder, or a transforms file itself, has views of."""
    folder = _folder(path)
    if found := tuple(split for split in SPLITS if _split_file(folder, split).is_file()):
        return found
    single = _single_file(path)
    if not single:
        return ()
    try:
        top, _ = _read_json(single)
    except InputError:  # `read` says what is wrong
        return ("train",) if path.is_dir() else ()
    return tuple(split for split in SPLITS if top.get(f"{split}_filenames")) or ("train",)


def read(path: Path, splits: tuple[str, ...]) -> Capture:
    """The views of the given splits, with the headers of their images. Raises InputError."""
    folder = _folder(path)
    if any(_split_file(folder, split).is_file() for split in SPLITS):
        files = [_read_file(_split_file(folder, split), split, single=False) for split in splits]
        box = BLENDER_BOX
    else:
        files = [_read_file(_single_file(path) or folder / SINGLE, split, single=True) for split in splits]
        box = None
    views, headers = _read_views(files, splits)
    first = files[0]
    depths, points = any(view.depth for view in views), _points(first)
    metres = 1 / _applied_scale(first) if depths and first.dialect == "nerfstudio" else None
    alphas = tuple(alpha for file in files for alpha in _alphas(file))
    if any(alphas):
        headers = replace(
            headers, has_alpha=tuple(a or bool(f) for a, f in zip(headers.has_alpha, alphas, strict=True))
        )
    return make_capture(
        path,
        views,
        headers,
        alphas=alphas if any(alphas) else (),
        notes=list(dict.fromkeys(note for file in files for note in (*file.notes, *file.finder.notes()))),
        box=_box(first) or box,
        up=_up(first),
        metres=metres,
        points=points,
        format={"undecided": "transforms.json"}.get(first.dialect, first.dialect),
    )


def _folder(path: Path) -> Path:
    """The scene's folder: a transforms file of one split stands for the folder that it is in."""
    known = {_split_file(Path(), split).name for split in SPLITS}
    return path.parent if path.name in known and path.is_file() else path


def _split_file(path: Path, split: str) -> Path:
    return path / f"transforms_{split}.json"


def _single_file(path: Path) -> Path | None:
    """The one transforms file at a path, if there is one."""
    file = path if path.suffix.lower() == ".json" else path / SINGLE
    return file if file.is_file() else None


# The json.

_COMMENTS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def _read_json(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The object in a transforms file, and its frames. Comments are legal, as instant-ngp has them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            plain = json.loads(text)
        except ValueError:
            bare = _COMMENTS.sub(lambda match: match[0] if match[0].startswith('"') else " ", text)
            if bare == text:
                raise
            plain = json.loads(bare)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a transforms file of a scene") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number too long to convert
        raise InputError(f"{path}: is not JSON ({error}); export or download the file again") from None
    frames = plain.get("frames") if isinstance(plain, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise InputError(f"{path}: expected an object with 'frames', a list of at least one view; export it again")
    return plain, frames


def _read_file(path: Path, split: str, *, single: bool) -> _File:
    """The frames of one split in a transforms file. single: the file holds all splits, else this one."""
    top, frames = _read_json(path)
    finder, notes = Finder(path.parent), []
    where = [f"{path}: frame {index}" for index in range(len(frames))]
    dialect = _dialect(top, frames, single=single)
    order = [*range(len(frames))]
    names = [
        _file_name(frames[i], where[i], f"{path.stem.rpartition('_')[2]}_{i:03}", dialect) for i in range(len(frames))
    ]
    if single:
        order.sort(key=(lambda i: names[i]) if dialect == "nerfstudio" else (lambda i: natural_key(names[i])))
    if "n_frames" in top:
        order = order[: _number(top, "n_frames", (0.0, math.inf, "a positive number of frames"), path).__int__()]
    order = _of_split(path, top, names, order, split, single=single)
    if "sharpness" in frames[order[0]]:  # as instant-ngp: a file that rates its images may list some that are gone
        kept = [i for i in order if os.path.exists(finder.find(names[i]))]  # noqa: PTH110 - Path's raises for a long name
        if kept and len(kept) < len(order):
            gone = next(i for i in order if i not in set(kept))
            notes.append(
                f"{path}: {len(order) - len(kept)} of {len(order)} images are missing, such as {shown(names[gone])}"
            )
            order = kept
    unknown = sorted({*top, *(key for frame in frames for key in frame)} - _KNOWN - {f"{s}_filenames" for s in SPLITS})
    if unknown:
        notes.append(f"{path}: not read, as they are unknown: {', '.join(map(shown, unknown[:12]))}")
    chosen = [frames[i] | {"file_path": names[i]} for i in order]
    for holder, place in [(top, str(path)), *((frames[i], where[i]) for i in order)]:
        _refuse(holder, place)
    file = _File(path, top, chosen, [where[i] for i in order], dialect, notes, finder)
    return _keep_precedence(file)


def _dialect(top: dict[str, Any], frames: list[dict[str, Any]], *, single: bool) -> Dialect:
    keys = {*top, *(key for frame in frames for key in frame)}
    found: list[Dialect] = [dialect for dialect, marks in _MARKS.items() if marks & keys]
    if len(found) == 1:
        return found[0]
    if not single:
        return "undecided" if found else "Blender"
    angle = bool({"camera_angle_x", "camera_angle_y"} & keys)  # nerfstudio has none
    return "instant-ngp" if angle and not found else "undecided"


def _file_name(frame: dict[str, Any], where: str, default: str, dialect: Dialect) -> str:
    r"""The path of a frame's image, relative or not. A \ is that of a json written on Windows."""
    name = frame.get("file_path")
    if name == "" and dialect == "instant-ngp":
        name = f"{default}/rgba.png"
    sound = isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME
    text = str(name).replace("\\", "/") if sound else ""
    if PurePosixPath(text).name in ("", ".."):
        raise InputError(f"{where} has no 'file_path' that names a file; export the json again")
    return text


def _of_split(
    path: Path, top: dict[str, Any], names: list[str], order: list[int], split: str, *, single: bool
) -> list[int]:
    """The numbers of the frames that the file's lists put into a split; all where it has no lists."""
    lists = {key: top[key] for key in (f"{s}_filenames" for s in SPLITS) if top.get(key) is not None}
    own = f"{split}_filenames"
    if not single and (others := [key for key in lists if key != own and lists[key]]):
        raise InputError(
            f"{path}: {others[0]}: the file is that of the {split} split alone; rename it to {SINGLE}, or "
            "remove the key"
        )
    if not lists or (single and not any(lists.values())):
        return order
    if not isinstance(lists.get(own), list) or not all(isinstance(name, str) for name in lists[own]):
        raise InputError(f"{path}: {own}: expected a list of file names; export the json again")
    listed = {_normal(name) for name in lists[own]}
    chosen = [i for i in order if _normal(names[i]) in listed]
    if missing := listed - {_normal(names[i]) for i in chosen}:
        raise InputError(
            f"{path}: {own}: names {len(missing)} that no frame has, such as {shown(min(missing))}; export it again"
        )
    if not chosen:
        raise InputError(f"{path}: {own}: expected at least one name of a frame; remove the key, or add some")
    return chosen


def _normal(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))


def _refuse(holder: dict[str, Any], where: str) -> None:
    """Raises InputError for a key that changes what images mean and is not supported."""
    for key in _REFUSED:
        value = holder.get(key)
        meant = any(value) if isinstance(value, list) else bool(value) or (key.startswith("ftheta") and key in holder)
        if meant:
            raise InputError(
                f"{where}: {key} = {shown(value)}: {_REFUSED[key]} is not supported; convert the images or poses, "
                "then remove the key"
            )


# Whose values count.


def _keep_precedence(file: _File) -> _File:
    """The file with what counts of the top merged into each frame."""
    merged = [_merged(file, frame, where) for frame, where in zip(file.frames, file.where, strict=True)]
    if file.dialect == "nerfstudio":
        keys = [key for key in (*_BOUNDS, "distortion_params") if any(_differs(file.top, f, key) for f in file.frames)]
        if keys:
            file.notes.append(
                f"{file.path}: {', '.join(keys)}: frames have values of their own; those at the top count, as in "
                "nerfstudio"
            )
    return _File(file.path, file.top, merged, file.where, file.dialect, file.notes, file.finder)


def _merged(file: _File, frame: dict[str, Any], where: str) -> dict[str, Any]:
    top, bend = file.top, {*_BEND, "distortion_params"}
    if file.dialect == "nerfstudio":
        dropped = bend if (bend - {"k4"}) & {*top} else set()
        return {key: value for key, value in frame.items() if key not in dropped} | top | _own(frame)
    if file.dialect == "undecided" and (keys := [key for key in (*_BOUNDS, *bend) if _differs(top, frame, key)]):
        raise InputError(
            f"{where}: {keys[0]} = {shown(frame[keys[0]])} but {shown(top[keys[0]])} at the top of the file: "
            "instant-ngp takes the frame's and nerfstudio that at the top; remove one of them"
        )
    # What a frame says of its focal length replaces all that the top says of it, in other units too.
    dropped = {*_FOCAL} if {*_FOCAL} & {*frame} else set()
    return {key: value for key, value in top.items() if key not in dropped} | frame


def _differs(top: dict[str, Any], frame: dict[str, Any], key: str) -> bool:
    return key in top and key in frame and top[key] != frame[key]


def _own(frame: dict[str, Any]) -> dict[str, Any]:
    """What only a frame can have, whatever the top has by that name."""
    return {
        key: frame[key] for key in ("file_path", "transform_matrix", "mask_path", "depth_file_path") if key in frame
    }


# Views.


def _read_views(files: Sequence[_File], splits: Sequence[str]) -> tuple[list[View], ImageHeaders]:
    paths = [[file.finder.find(frame["file_path"]) for frame in file.frames] for file in files]
    poses = [[_pose(frame, where) for frame, where in zip(file.frames, file.where, strict=True)] for file in files]
    said = [[_said(frame, file, where) for frame, where in zip(file.frames, file.where, strict=True)] for file in files]
    headers = probe_images([path for some in paths for path in some])
    sizes = headers.sizes.tolist()
    views: list[View] = []
    for file, split, images, c2w, cameras in zip(files, splits, paths, poses, said, strict=True):
        here = sizes[len(views) : len(views) + len(images)]
        _check_shared_intrinsics(file, images, cameras, here)
        masks, depths = _masks(file, images), _depths(file)
        names = view_names(images, file.folder)
        for i, (width, height) in enumerate(here):
            model, lens = _model(file.frames[i], file.where[i])
            focal, centre, size = _intrinsics(cameras[i], model, lens, (width, height), file.dialect)
            bend = _bend(cameras[i], model, file, file.where[i])
            lens = "OPENCV" if lens == "PINHOLE" and bend else lens
            views.append(
                View(
                    file.where[i], names[i], split, images[i], c2w[i], focal, centre, size,
                    lens, model, bend, masks[i], depths[i],
                )
            )  # fmt: skip
    return views, headers


def _pose(frame: dict[str, Any], where: str) -> np.ndarray:
    """c2w (3, 4) f64 of a frame whose transform_matrix is a rotation and a position."""
    start, end = frame.get("transform_matrix_start"), frame.get("transform_matrix_end")
    if start != end and None not in (start, end):
        raise InputError(
            f"{where}: transform_matrix_start, transform_matrix_end: a camera that moves during the exposure is not "
            "supported; give the frame one transform_matrix"
        )
    rows = frame.get("transform_matrix", start)
    where = f"{where} ({shown(frame['file_path'])}): 'transform_matrix'"
    lists = isinstance(rows, list) and len(rows) in (3, 4) and all(isinstance(r, list) and len(r) == 4 for r in rows)
    numbers = [[_finite(value) for value in row] for row in rows] if lists and rows else []
    if not numbers or any(value is None for row in numbers for value in row):
        raise InputError(f"{where}: expected 4 rows of 4 finite numbers; export it again")
    return check_pose(np.asarray(numbers, np.float64), where)


def _finite(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def _number(holder: dict[str, Any], key: str, bounds: tuple[float, float, str], where: object) -> float:
    low, high, expected = bounds
    value = _finite(holder[key])
    if value is None or not low < value < high:
        raise InputError(f"{where}: {key} = {shown(holder[key])}: expected {expected}")
    return value


def _vector(value: Any, where: str, length: int = 3) -> tuple[float, ...]:
    numbers = [_finite(v) for v in value] if isinstance(value, list) and len(value) == length else [None]
    if any(number is None for number in numbers):
        raise InputError(f"{where} = {shown(value)}: expected {length} finite numbers; correct it")
    return tuple(number for number in numbers if number is not None)


# Intrinsics.


def _said(frame: dict[str, Any], file: _File, where: str) -> dict[str, float]:
    """What is said of a frame's camera, checked but for what needs the image's size."""
    said = {key: _number(frame, key, bounds, where) for key, bounds in _BOUNDS.items() if key in frame}
    if "distortion_params" in frame:
        given = _vector(frame["distortion_params"], f"{where}: distortion_params", 6)
        said |= dict(zip(("k1", "k2", "k3", "k4", "p1", "p2"), given, strict=True))
    model, _ = _model(frame, where)
    if not {*_FOCAL} & {*said} and model != "equirectangular":
        raise InputError(
            f"{file.path}: the key 'camera_angle_x' is missing; add the horizontal field of view in radians, or fl_x, "
            "the focal length in pixels"
        )
    return said


def _model(frame: dict[str, Any], where: str) -> tuple[Model, str]:
    """The lens model of a frame, and what the file calls it."""
    if frame.get("latlong"):
        return "equirectangular", "latlong"
    name = frame.get("camera_model")
    fisheye = bool(frame.get("is_fisheye"))
    if name is None:
        return ("fisheye", "is_fisheye") if fisheye else ("perspective", "PINHOLE")
    if not isinstance(name, str) or name not in _CAMERA_MODELS:
        known = ", ".join(_CAMERA_MODELS)
        raise InputError(f"{where}: camera_model = {shown(name)}: expected one of {known}; undistort the images")
    if fisheye and _CAMERA_MODELS[name] != "fisheye":
        raise InputError(f"{where}: camera_model = {name!r} but is_fisheye = True; remove one of them")
    return _CAMERA_MODELS[name], name


def _check_shared_intrinsics(
    file: _File, images: list[Path], said: list[dict[str, float]], sizes: list[list[int]]
) -> None:
    """Raises InputError where images of several sizes share intrinsics that could belong to any of them."""
    first: int | None = None  # of the frames without intrinsics of their own
    for i, (frame, camera) in enumerate(zip(file.frames, said, strict=True)):
        own = any(frame.get(key) is not file.top.get(key) for key in _BOUNDS if key in frame)
        if own or {"w", "h"} <= {*camera}:
            continue
        first = i if first is None else first
        (width, height), (width_0, height_0) = sizes[i], sizes[first]
        # A field of view alone fits any image of the same shape.
        in_pixels = {"fl_x", "fl_y", "cx", "cy"} & {*camera}
        skewed = abs(width * height_0 - width_0 * height) > max(width, height, width_0, height_0)
        if skewed or (in_pixels and (width, height) != (width_0, height_0)):
            raise InputError(
                f"{images[i]}: is {width}x{height} but {images[first].name} is {width_0}x{height_0}; "
                "give each frame fl_x or camera_angle_x of its own, or w and h, in the json"
            )


def _intrinsics(
    said: dict[str, float], model: Model, lens: str, size: tuple[int, int], dialect: Dialect
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Focal lengths and principal point, and the image size whose pixels they are in."""
    of = [said.get(key, float(pixels)) for key, pixels in zip("wh", size, strict=True)]
    if lens == "latlong":  # it takes no other values
        return (of[0] / math.tau, of[1] / math.pi), (of[0] / 2, of[1] / 2), (of[0], of[1])
    focal: list[float | None] = []
    for i, axis in enumerate("xy"):
        if f"{axis}_fov" in said:
            focal.append(_of_angle(math.radians(said[f"{axis}_fov"]), of[i]))
        elif f"fl_{axis}" in said:
            focal.append(said[f"fl_{axis}"] * _stale(said, axis, of[i], size[i], dialect))
        elif f"camera_angle_{axis}" in said:
            focal.append(_of_angle(said[f"camera_angle_{axis}"], of[i]))
        else:
            focal.append(None)
    either = next((f for f in focal if f is not None), of[0] / 2)
    x, y = (either if f is None else f for f in focal)
    if model == "equirectangular":  # nerfstudio's unit is pi
        x, y = x / math.pi, y / math.pi
    cx, cy = (said.get(key, 0.5 * of[i]) for i, key in enumerate(("cx", "cy")))
    return (x, y), (cx, cy), (of[0], of[1])


def _of_angle(angle: float, pixels: float) -> float:
    return 0.5 * pixels / max(math.tan(0.5 * angle), 1e-99)


def _stale(said: dict[str, float], axis: str, of: float, pixels: int, dialect: Dialect) -> float:
    """By what a focal length is to be multiplied to be in pixels of `of`, the file's w or h.

    instant-ngp takes it in pixels of the image file, whatever w is, and some files are written so. Where the field of
    view is given too, it tells.
    """
    angle = said.get(f"camera_angle_{axis}")
    if dialect != "instant-ngp" or of == pixels or angle is None:
        return 1.0
    of_file = abs(_of_angle(angle, pixels) / said[f"fl_{axis}"] - 1) < 1e-3
    return of / pixels if of_file else 1.0


def _bend(said: dict[str, float], model: Model, file: _File, where: str) -> dict[str, float]:
    """The lens coefficients, by the names of `lenses.COEFFICIENTS`."""
    bend = {key: said[key] for key in _BEND if said.get(key)}
    if model == "equirectangular":
        return {}
    if model == "fisheye" and {"p1", "p2"} & {*bend}:
        raise InputError(
            f"{where}: p1, p2 with a fisheye lens: instant-ngp takes them as k3 and k4, other programs do not; correct "
            "the json, or undistort the images"
        )
    if model == "perspective" and "k4" in bend and file.dialect != "nerfstudio":
        raise InputError(
            f"{where}: k4 = {bend['k4']:g} without a fisheye lens: programs differ in what it means; give is_fisheye "
            "or camera_model, or undistort the images"
        )
    return bend


# What goes with the images.


def _masks(file: _File, images: list[Path]) -> list[Mask | None]:
    """The mask of each frame: of the key mask_path black is out, of a file dynamic_mask_<stem>.png all but black."""
    listings = {folder: _listing(folder) for folder in {image.parent for image in images}}
    masks: list[Mask | None] = []
    for frame, where, image in zip(file.frames, file.where, images, strict=True):
        listing = listings[image.parent]
        if frame.get("enable_ray_loading", True) and f"rays_{image.stem}.dat" in listing:
            raise InputError(
                f"{image.parent / f'rays_{image.stem}.dat'}: a ray for each pixel beside an image is not supported; "
                "remove such files, if the transform_matrix says the same"
            )
        dynamic = image.parent / f"dynamic_mask_{image.stem}.png"
        named = frame.get("mask_path")
        if named is not None and dynamic.name in listing:
            raise InputError(
                f"{where}: mask_path, but {dynamic} is there too, and masks the reverse; remove one of them"
            )
        if named is not None:
            masks.append(Mask(file.finder.find(_path_in(frame, "mask_path", where)), keep="non-zero"))
        else:
            masks.append(Mask(dynamic, keep="zero") if dynamic.name in listing else None)
    return masks


def _alphas(file: _File) -> list[Path | None]:
    """The file <file_path>.alpha.<extension> of each frame, where there is one."""
    files = []
    for frame in file.frames:
        name = frame["file_path"]
        suffix = file.finder.find(name).suffix
        files.append(file.folder / f"{name}.alpha{suffix}")
    return [found if os.path.exists(found) else None for found in files]  # noqa: PTH110 - Path's raises for a long name


def _depths(file: _File) -> list[DepthMap | None]:
    """The depth map of each frame: nerfstudio's are in millimetres, instant-ngp's in a unit that the file says."""
    unit = _number(file.top, "integer_depth_scale", _FINITE, file.path) if "integer_depth_scale" in file.top else 0.0
    loaded = unit > 0 and bool(file.top.get("enable_depth_loading", True))
    depths: list[DepthMap | None] = []
    for frame, where in zip(file.frames, file.where, strict=True):
        if frame.get("depth_file_path") is not None:
            found = file.finder.find(_path_in(frame, "depth_file_path", where), (".png", ".npy"))
            depths.append(DepthMap(found, 1e-3 * _applied_scale(file), "axis"))
        elif loaded and frame.get("depth_path") is not None:
            depths.append(DepthMap(file.finder.find(_path_in(frame, "depth_path", where)), unit, "axis"))
        else:
            depths.append(None)
    if not loaded and any(frame.get("depth_path") is not None for frame in file.frames):
        file.notes.append(f"{file.path}: depth_path: not read without integer_depth_scale and enable_depth_loading")
    return depths


def _path_in(frame: dict[str, Any], key: str, where: str) -> str:
    name = frame[key]
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise InputError(f"{where}: {key} = {shown(name)}: expected the path of a file; correct it, or remove the key")
    return name


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in folder.iterdir())
    except OSError:  # its images are missing, which is said elsewhere
        return frozenset()


def _applied_scale(file: _File) -> float:
    """World units of a metre, where the source had metres."""
    return _number(file.top, "applied_scale", (0.0, math.inf, "a positive number"), file.path) if (
        file.top.get("applied_scale") is not None
    ) else 1.0  # fmt: skip


def _points(file: _File) -> np.ndarray | None:
    if file.top.get("ply_file_path") is None:
        return None
    found = file.finder.find(_path_in(file.top, "ply_file_path", str(file.path)), (".ply",))
    if not found.is_file():
        file.notes.append(f"{file.path}: ply_file_path: {found.name} is missing, so no points are read")
        return None
    return read_ply_points(found)


# Where the scene is.


def _up(file: _File) -> tuple[float, float, float] | None:
    """The direction that is up: as the file says, else +z where its dialect has it so."""
    if file.top.get("up") is not None:
        x, y, z = _vector(file.top["up"], f"{file.path}: up")
        length = math.sqrt(x * x + y * y + z * z)
        if not 0 < length < math.inf:
            raise InputError(f"{file.path}: up = {shown(file.top['up'])}: expected a direction; correct it")
        return (x / length, y / length, z / length)
    told = file.dialect in ("Blender", "instant-ngp") or file.top.get("orientation_override") == "none"
    return (0.0, 0.0, 1.0) if told else None


def _box(file: _File) -> Box | None:
    """The box of instant-ngp, in which position scale + offset is its unit cube; None where nothing is said of it."""
    top, path = file.top, file.path
    if not {"aabb_scale", "scale", "offset", "aabb"} & {*top}:
        return None
    size = _number(top, "aabb_scale", (0.5, 129.0, "a power of two up to 128"), path) if "aabb_scale" in top else 1.0
    if not math.log2(size).is_integer():
        raise InputError(f"{path}: aabb_scale = {size:g}: expected a power of two up to 128; correct it")
    scale, centre = _ngp_cube(top, path)
    if "aabb" in top:
        corners = top["aabb"] if isinstance(top["aabb"], list) and len(top["aabb"]) == 2 else [None, None]
        low, high = (_vector(corner, f"{path}: aabb") for corner in corners)
        length = max(abs(b - a) for a, b in zip(low, high, strict=True))
        if not 1e-9 < length < 1e9:
            raise InputError(f"{path}: aabb = {shown(top['aabb'])}: expected two corners apart; correct it")
        scale, centre = 1 / length, [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    x, y, z = centre
    return Box((x, y, z), size / scale, 1 + int(math.log2(size)))


def _ngp_cube(top: dict[str, Any], path: Path) -> tuple[float, list[float]]:
    """1 / side and the centre of instant-ngp's unit cube, in world units."""
    scale = _number(top, "scale", (1e-9, 1e9, "a positive number; correct it"), path) if "scale" in top else 0.33
    return scale, [0.5 / scale - o / scale for o in _offset(top, path)]


def reference_frames(path: Path) -> tuple[SceneTransform, np.ndarray]:
    """What other programs call positions by in the scene at a path: instant-ngp's cube, and `applied_transform` (3, 4).

    instant-ngp's axes are the file's turned: its x is the file's y, its y the file's z.
    """
    file = _single_file(path) or next(f for f in (_split_file(_folder(path), split) for split in SPLITS) if f.is_file())
    top, _ = _read_json(file)
    scale, (x, y, z) = _ngp_cube(top, file)
    applied = np.eye(3, 4)
    if top.get("applied_transform") is not None:
        rows = top["applied_transform"]
        rows = rows if isinstance(rows, list) and len(rows) in (3, 4) else [None] * 3
        applied = np.array([_vector(row, f"{file}: applied_transform", 4) for row in rows[:3]])
    return SceneTransform((x, y, z), 1 / scale, NGP_ROTATION), applied


def _offset(top: dict[str, Any], path: Path) -> tuple[float, ...]:
    value = top.get("offset", 0.5)
    return (
        _vector(value, f"{path}: offset")
        if isinstance(value, list)
        else (_number({"offset": value}, "offset", _FINITE, path),) * 3
    )
