"""Where scenes are: paths as given, names in the folders that hold data, the built-in scene and a download."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxngp.config import InputError, SceneConfig
from jaxngp.data import download, llff, phones, rays, sparse, transforms
from jaxngp.data.cache import cache_dir, expand
from jaxngp.data.capture import Capture
from jaxngp.data.flights import Frames, dataparser_transform
from jaxngp.presets import SCENES

BRICKS_VERSION = "v1"  # changes with the pictures of the built-in scene, so that no stale copy is read


@dataclass(frozen=True)
class Format:
    """A way to store a scene.

    `detect` says which of train, val and test are at a path, none where it holds no scene of this format. `read`
    reads the views of some of them, but no pixels.
    """

    name: str
    detect: Callable[[Path], tuple[str, ...]]
    read: Callable[[Path, tuple[str, ...]], Capture]
    split: str = ""  # for messages: what has to be added for a split; "" where the format has no splits


FORMATS = (
    Format(
        "transforms", transforms.detect, transforms.read, "transforms_{0}.json, or {0}_filenames to transforms.json"
    ),
    Format("COLMAP", sparse.detect, sparse.read),
    Format("LLFF", llff.detect, llff.read),
    Format("Polycam", phones.detect_polycam, phones.read_polycam),
    Format("Record3D", phones.detect_record3d, phones.read_record3d),
    Format("rays", rays.detect, rays.read, "a table named {0}"),
)
"""The first that detects a scene reads it."""

EXPECTED = (
    "transforms_train.json, transforms.json, sparse/0 of COLMAP, poses_bounds.npy, keyframes of Polycam or train.npy"
)


@dataclass(frozen=True)
class Location:
    """A scene on disk: a folder or a file, its format, and which of train, val and test it has."""

    path: Path
    format: Format
    splits: tuple[str, ...]

    def read(self, *splits: str) -> Capture:
        """The views of some of the splits, without their pixels. Raises InputError."""
        return self.format.read(self.path, splits)


def locate(scene: SceneConfig) -> Location:
    """Finds a scene. Raises InputError.

    With a data_dir it is there and nowhere else: the folder itself, or one in it of the scene's name. Without one, a
    path is taken as it stands, and a name is looked up in $JAXNGP_DATA and the cache directory, else downloaded. The
    built-in scene is rendered into the cache directory where it is not there yet.
    """
    try:
        if scene.data_dir:
            return _locate_within(scene, expand(scene.data_dir))
        if scene.name not in SCENES:
            return _locate_path(expand(scene.name))
        return _locate_bricks(scene) if scene.name == "bricks" else _locate_named(scene.name)
    except (OSError, ValueError) as error:  # a folder that may not be listed, a name that is too long, a full disk
        if isinstance(error, InputError):
            raise
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise InputError(f"scene {scene.name!r}: {what}; correct that or move it") from None


def _detect(path: Path) -> Location | None:
    for known in FORMATS:
        if splits := known.detect(path):
            return Location(path, known, splits)
    return None


def _first(paths: list[Path]) -> Location | None:
    return next(filter(None, map(_detect, paths)), None)


def _locate_within(scene: SceneConfig, root: Path) -> Location:
    name = scene.name if scene.name in SCENES else expand(scene.name).resolve().name
    looked = [root / name, root / "nerf_synthetic" / name, root]
    if found := _first(looked):
        return found
    raise InputError(
        f"scene.data_dir = {scene.data_dir!r}: scene {scene.name!r} is in none of {', '.join(map(str, looked))}; "
        f"give the folder with its {EXPECTED}, or the folder that holds it"
    )


def _locate_path(path: Path) -> Location:
    if not path.exists():
        raise InputError(f"scene {str(path)!r}: neither a path that exists nor one of {', '.join(SCENES)}")
    if found := _detect(path):
        return found
    raise InputError(
        f"{path}: expected a folder with {EXPECTED}, or a transforms.json, an .r3d or a ray table "
        f"({', '.join(rays.SUFFIXES)}) itself; give the path of such a folder or file"
    )


def _locate_named(name: str) -> Location:
    root = os.environ.get("JAXNGP_DATA", "")
    roots = [*([expand(root)] if root else []), cache_dir()]
    looked = [path for root in roots for path in (root / name, root / "nerf_synthetic" / name)]
    looked += [root for root in roots if root.name == name]  # the scene's own folder was given
    if found := _first(looked):
        return found
    return _known(download.download_scene(name, cache_dir(), looked=tuple(looked)))


def _locate_bricks(scene: SceneConfig) -> Location:
    folder = cache_dir() / f"bricks-{BRICKS_VERSION}-{scene.image_size}"
    if not _detect(folder):
        from jaxngp.data import bricks  # costs its import only where the scene has to be drawn

        try:
            bricks.write_scene(folder, scene.image_size)
        except OSError as error:
            raise InputError(
                f"{folder}: cannot write the built-in scene ({error}); set JAXNGP_CACHE to a writable folder"
            ) from None
    return _known(folder)


def _known(folder: Path) -> Location:
    return Location(folder, FORMATS[0], FORMATS[0].detect(folder))


def reference_frames(scene: SceneConfig, flight: Path) -> tuple[Frames, tuple[str, ...]]:
    """What a camera path's coordinates refer to, and what a user should know of it.

    nerfstudio's are those of its own scene where its dataparser_transforms.json lies in the path's folder or the one
    above, else those of the scene's files. instant-ngp's cube is that of the scene's transforms file.
    """
    frames, applied, notes = Frames(), np.eye(3, 4), []
    try:
        location = locate(scene)
        if location.format.name == "transforms":
            ngp, applied = transforms.reference_frames(location.path)
            frames = replace(frames, ngp=ngp)
    except InputError as error:
        notes.append(f"{flight}: scale, offset and applied_transform are taken to be the usual ones, since {error}")
    for folder in flight.resolve().parents[:2]:
        if (found := folder / "dataparser_transforms.json").is_file():
            notes.append(f"{flight}: its coordinates are taken to be those that {found} describes")
            frames = replace(frames, nerfstudio=dataparser_transform(found, applied))
            break
    return frames, tuple(notes)
