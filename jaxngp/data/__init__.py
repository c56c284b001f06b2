"""Scenes on disk -> views for training and evaluation, as numpy arrays in scene units.

`locate` says where a scene is and which splits it has, `load_training` and `load_evaluation` read them. A scene is
a folder of views (`blender`) or a table of rays (`rays`); `builtin` renders the one that needs no data, `download`
fetches the example that has a public address.

`image` reads one picture of any size, and `atlas` draws one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, SceneConfig
from jaxngp.data import blender, download, rays
from jaxngp.data.rays import RayTable
from jaxngp.presets import SCENES

SPLITS = ("train", "val", "test")
HOLD_OUT_EVERY = 8  # views from one held-out view to the next, as LLFF has it
BUILTIN_VERSION = "v1"  # changes with the picture that `builtin` draws, so that no stale copy is read


@dataclass(frozen=True)
class Location:
    """Where a scene is, and which of train, val and test it has. `path` is a folder or the file of a ray table."""

    path: Path
    kind: Literal["blender", "rays"]
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The views of one split, in scene units; its arrays are numpy.

    `views` names them, in the order of the arrays; it is empty for a ray table whose image size is unknown.
    `has_alpha` says that at least one image came with an alpha channel.
    """

    name: str  # train, val, test or held-out
    views: tuple[str, ...]
    images: PosedImages | RayTable
    has_alpha: bool

    @property
    def num_views(self) -> int:
        return len(self.views)

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of a view in pixels, or (0, 0) where it is unknown."""
        if isinstance(self.images, PosedImages):
            return self.images.max_size
        return self.images.width, self.images.height


# Where.


def cache_dir() -> Path:
    """Where downloads and the built-in scene are kept: $JAXNGP_CACHE, else the user's cache directory."""
    if own := os.environ.get("JAXNGP_CACHE"):
        return expand(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(base) / "jaxngp"


def expand(path: str) -> Path:
    """`path` with its ~ replaced; as it stands where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def locate(scene: SceneConfig) -> Location:
    """Finds a scene: a path as it stands, a name in data_dir, $JAXNGP_DATA and the cache directory, else a download.

    The built-in scene is rendered into the cache directory where it is not there yet. Raises InputError.
    """
    try:
        return _locate(scene)
    except OSError as error:  # a folder that may not be listed, a name that is too long, a disk that is full
        raise InputError(f"scene {scene.name!r}: {error.filename}: {error.strerror}; correct that or move it") from None


def _locate(scene: SceneConfig) -> Location:
    if scene.name not in SCENES:
        return _locate_path(expand(scene.name))
    if scene.name == "bricks":
        return _locate_builtin(scene)
    looked = _candidates(scene)
    for folder in looked:
        if splits := _blender_splits(folder):
            return Location(folder, "blender", splits)
    folder = download.download_scene(scene.name, cache_dir(), looked=tuple(looked))
    return Location(folder, "blender", _blender_splits(folder))


def _candidates(scene: SceneConfig) -> list[Path]:
    """The folders in which a named scene may lie, in the order of precedence."""
    roots = [expand(root) for root in (scene.data_dir, os.environ.get("JAXNGP_DATA", "")) if root]
    folders: list[Path] = []
    for index, root in enumerate([*roots, cache_dir()]):
        folders += [root / scene.name, root / "nerf_synthetic" / scene.name]
        if (index == 0 and scene.data_dir) or root.name == scene.name:
            folders.append(root)  # the scene's own folder was given
    return folders


def _locate_builtin(scene: SceneConfig) -> Location:
    folder = cache_dir() / f"bricks-{BUILTIN_VERSION}-{scene.image_size}"
    if not _blender_splits(folder):
        from jaxngp.data import builtin  # costs its import only where the scene has to be drawn

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            builtin.write_scene(folder, scene.image_size)
        except OSError as error:
            raise InputError(
                f"{folder}: cannot write the built-in scene ({error}); set JAXNGP_CACHE to a writable folder"
            ) from None
    return Location(folder, "blender", _blender_splits(folder))


def _locate_path(path: Path) -> Location:
    if not path.exists():
        raise InputError(f"scene {str(path)!r}: neither a path that exists nor one of {', '.join(SCENES)}")
    if splits := _blender_splits(path):
        return Location(path, "blender", splits)
    if tables := rays.find_tables(path):
        return Location(path, "rays", tuple(split for split in SPLITS if split in tables))
    raise InputError(
        f"{path}: expected a folder with transforms_train.json or train.npy in it, "
        f"or a ray table ({', '.join(rays.SUFFIXES)}); give the path of such a folder or table"
    )


def _blender_splits(folder: Path) -> tuple[str, ...]:
    return tuple(split for split in SPLITS if _transforms_path(folder, split).is_file())


def _transforms_path(folder: Path, split: str) -> Path:
    return folder / f"transforms_{split}.json"


# What.


def load_training(scene: SceneConfig) -> Split:
    """The training views; without every 8th where the scene has neither a test nor a val split. Raises InputError."""
    location = locate(scene)
    if "train" not in location.splits:
        raise _no_split("train", location)
    return _load(scene, location, "train", "train", lambda count: _training_views(location, count))


def load_evaluation(scene: SceneConfig, split: str = "auto", num_views: int = 0) -> Split:
    """The views to evaluate on: `num_views` evenly spaced ones of a split, or all of them for 0.

    split: "auto" takes test, else val, else "held-out", every 8th training view, which `load_training` then leaves
    out. Raises InputError where the split or that many views do not exist.
    """
    location = locate(scene)
    held_out = not {"val", "test"} & set(location.splits)
    if split == "auto":
        split = "held-out" if held_out else "test" if "test" in location.splits else "val"
    if split not in (*location.splits, *(["held-out"] if held_out else [])):
        raise _no_split(split, location)

    def select(count: int) -> np.ndarray:
        if not count:
            raise InputError(f"{location.path}: image size unknown, so no view to evaluate; {rays.SIZE_ADVICE}")
        views = _evaluation_views(location, split, count)
        if num_views < 0 or num_views > len(views):
            raise InputError(
                f"eval_views = {num_views}: {location.path} has {len(views)} {split} views; "
                "give at most as many, or 0 for all of them"
            )
        return views[np.arange(num_views) * len(views) // num_views] if num_views else views

    return _load(scene, location, "train" if split == "held-out" else split, split, select)


def _training_views(location: Location, count: int) -> np.ndarray:
    held_out = not {"val", "test"} & set(location.splits) and count > 1  # of a single view none can be spared
    return np.asarray([view for view in range(count) if not held_out or view % HOLD_OUT_EVERY], np.int64)


def _evaluation_views(location: Location, split: str, count: int) -> np.ndarray:
    if split == "train":
        return _training_views(location, count)
    if split == "held-out" and count == 1:
        raise InputError(f"{location.path}: has one view and no val or test split; add one to evaluate on")
    return np.arange(0, count, HOLD_OUT_EVERY if split == "held-out" else 1)


def _no_split(split: str, location: Location) -> InputError:
    known = [*location.splits] if len(location.splits) > 1 or "train" not in location.splits else ["train", "held-out"]
    wanted = f"transforms_{split}.json" if location.kind == "blender" else f"a table named {split}"
    hint = f"; add {wanted}" if split in SPLITS else ""
    return InputError(f"{location.path}: has no {split!r} split, only {', '.join(known)}; take one of these{hint}")


def _load(scene: SceneConfig, location: Location, source: str, name: str, select: Callable[[int], np.ndarray]) -> Split:
    """The views of the split `source` that `select` picks, given how many there are; the result is called `name`."""
    try:
        return _read(scene, location, source, name, select)
    except MemoryError as error:
        raise InputError(
            f"{location.path}: the {name} views are more than the memory holds ({error}); "
            "shrink them with --downscale, or take some out"
        ) from None


def _read(scene: SceneConfig, location: Location, source: str, name: str, select: Callable[[int], np.ndarray]) -> Split:
    if location.kind == "rays":
        return _load_rays(scene, rays.find_tables(location.path)[source], name, select)
    transforms = blender.read_transforms(_transforms_path(location.path, source))
    frames = [_frame_to_scene(transforms.frames[view], scene) for view in select(len(transforms.frames))]
    images, has_alpha = blender.load_views(transforms, frames, scene.downscale)
    return Split(name, tuple(frame.name for frame in frames), images, has_alpha)


def _load_rays(scene: SceneConfig, path: Path, name: str, select: Callable[[int], np.ndarray]) -> Split:
    if scene.downscale != 1:
        raise InputError(f"scene.downscale = {scene.downscale}: {path} is a ray table, which stays as it is; give 1")
    rows, size = rays.read_ray_table(path)
    views = select(rays.count_views(path, rows, size))
    table = rays.make_ray_table(path, rows, size, views)
    table = table.replace(rays=table.rays.replace(origin=_to_scene(np.asarray(table.rays.origin), scene)))  # type: ignore[attr-defined]
    return Split(name, tuple(f"view_{view}" for view in views), table, has_alpha=False)


def _frame_to_scene(frame: blender.Frame, scene: SceneConfig) -> blender.Frame:
    position = _to_scene(frame.c2w[:, 3], scene)
    return replace(frame, c2w=np.concatenate([frame.c2w[:, :3], position[:, None]], axis=1))


def _to_scene(position: np.ndarray, scene: SceneConfig) -> np.ndarray:
    """World to scene units, for points (..., 3): `cameras.world_to_scene` without a device."""
    centre = np.asarray(scene.box_centre, position.dtype)
    return (position - centre) / position.dtype.type(scene.box_side) + position.dtype.type(0.5)
