"""Structure from motion: photographs -> their cameras, as a transforms.json that this and other programs train from.

    images --extract--> features --match--> matches --map_images--> colmap/sparse/0
                                                                         |
                     transforms.json, sparse_points.ply <-- orientation <-+

COLMAP does the work (Schoenberger and Frahm 2016), on the CPU; `colmap` has its stages. The images stay where they
are, and are only read. What is found is placed as `colmap2nerf.py` of instant-ngp places it: z is up, the origin is
where the cameras look, and their mean distance from it is 4.

pycolmap comes with `pip install .[capture]`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxngp.config import InputError
from jaxngp.data.photos import IMAGE_SUFFIXES, probe_images

LENS_KEYS = {"OPENCV": ("k1", "k2", "p1", "p2"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4")}
"""Of a transforms.json, by COLMAP's camera model; k1 and k2, as far as there are any, for the others."""

Matching = Literal["auto", "exhaustive", "sequential"]

EXHAUSTIVE_UP_TO = 200  # images; their 19,900 pairs take some 20 minutes on two cores
NEIGHBOURS = 10  # images before and after, that a sequence matches each image with
ANCHORS = 40  # images of a sequence that are all matched with each other, so that it may come back to a place

CAMERA_DISTANCE = 4.0  # the mean, from the origin
INSTANT_NGP_SCALE = 0.33  # from a transforms.json to the cube in which instant-ngp has aabb_scale
INSIDE = 0.98  # of the sparse points, in the box that aabb_scale names
ENOUGH_REGISTERED = 0.7

_EXIF_IFD, _ORIENTATION, _MAKE, _MODEL, _FOCAL_LENGTH = 0x8769, 0x0112, 0x010F, 0x0110, 0x920A
_UPWARDS = {3: (0, -1), 4: (0, -1), 5: (-1, 0), 6: (-1, 0), 7: (1, 0), 8: (1, 0)}
"""By EXIF orientation, the direction in stored pixels (x right, y up) that is up in the photograph; else (0, 1)."""


@dataclass(frozen=True)
class Reconstruction:
    """What structure from motion found, and where it was written."""

    transforms: Path
    registered: tuple[str, ...]  # the images whose cameras are known, relative to their folder
    unregistered: tuple[str, ...]
    lenses: tuple[str, ...]  # a line for people about each camera, by how many images it took
    num_points: int
    reprojection_error: float  # px, the mean
    num_parts: int  # that do not connect; only the largest is kept

    @property
    def enough(self) -> bool:
        """Whether as many images are registered as a sound capture has."""
        return len(self.registered) >= ENOUGH_REGISTERED * (len(self.registered) + len(self.unregistered))


def reconstruct(
    images: Path,
    out: Path,
    *,
    camera_model: str = "OPENCV",
    matching: Matching = "auto",
    seed: int = 0,
    restart: bool = False,
) -> Reconstruction:
    """Find the cameras of the images in a folder and its subfolders, and write them to `out`/transforms.json.

    images: PNG, JPEG, WebP, BMP or TIFF. Those of one folder, size, camera and focal length (EXIF) share a lens.
    matching: exhaustive compares all pairs; sequential each image with its neighbours by name, as fits a video, and
    some images with each other; auto is exhaustive up to EXHAUSTIVE_UP_TO images. restart: discard what `out` holds
    of an earlier, perhaps interrupted, call; else that is continued.

    `out` then holds transforms.json (intrinsics, and camera-to-world poses with OpenGL axes), sparse_points.ply and
    COLMAP's own files in colmap/. The world coordinates of COLMAP become those of transforms.json by
    applied_scale (applied_transform [x, 1]).

    Raises InputError where there are no images, `out` holds the capture of others, no two images have enough in
    common, or pycolmap is not installed.
    """
    if importlib.util.find_spec("pycolmap") is None:
        raise InputError("pycolmap, which finds the cameras, is not installed: pip install .[capture]")
    images, out = images.resolve(), out.resolve()
    names = _find_images(images, out)
    work = out / "colmap"
    if restart:
        _discard(out)
    state = _State.open(work / "input.json", images, names, camera_model)
    pairs = _pairs(names, matching)
    _extract(work, images, names, camera_model)
    _match(work, names, pairs, seed)
    if state.must_map(names, pairs, seed):
        num_parts = _map(work, images, names, camera_model, seed)
        state.mapped(names, pairs, seed, num_parts)
    return _write(work, images, out, names, state.num_parts)


# Images.


def _find_images(images: Path, out: Path) -> list[str]:
    """The names of the images in a folder, relative to it, in natural order. Raises InputError."""
    if not images.is_dir():
        raise InputError(f"{images}: is no folder; give the folder of the photographs")
    files = [file for file in images.rglob("*") if file.is_file()]
    shown = [f for f in files if not any(part.startswith(".") for part in f.relative_to(images).parts)]
    own = out / "colmap"
    found = [f for f in shown if f.suffix.lower() in IMAGE_SUFFIXES and not f.is_relative_to(own)]
    if len(found) < 2:
        kinds = sorted({f.suffix.lower() for f in shown} - {*IMAGE_SUFFIXES, ""})
        others = f" (but files that end in {textwrap.shorten(', '.join(kinds), 100)})" if kinds else ""
        raise InputError(
            f"{images}: holds {len(found) or 'no'} image{'s' * (len(found) != 1)}{others}; give a folder with "
            f"photographs of one scene, at least 20 or so, as {', '.join(IMAGE_SUFFIXES)}"
        )
    return sorted((f.relative_to(images).as_posix() for f in found), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts img2 before img10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _groups(images: Path, names: Sequence[str]) -> list[list[str]]:
    """The images, by the lens they were taken with."""
    sizes = probe_images([images / name for name in names]).sizes
    groups: dict[tuple, list[str]] = {}
    for name, size in zip(names, sizes.tolist(), strict=True):
        exif = _exif(images / name)
        details = exif.get_ifd(_EXIF_IFD)
        taken_with = tuple(str(tag) for tag in (exif.get(_MAKE), exif.get(_MODEL), details.get(_FOCAL_LENGTH)))
        groups.setdefault((Path(name).parent, *size, *taken_with), []).append(name)
    return [*groups.values()]


def _exif(file: Path) -> Image.Exif:
    try:
        with Image.open(file) as image:
            return image.getexif()
    except Exception:  # broken tags, of which Pillow makes whatever it likes: then nothing is known
        return Image.Exif()


# What was done before.


@dataclass
class _State:
    """`out`/colmap/input.json: from which images the database and the model beside it come."""

    file: Path
    plain: dict[str, Any]

    @classmethod
    def open(cls, file: Path, images: Path, names: Sequence[str], camera_model: str) -> _State:
        """The state as it was left, or a new one. Raises InputError where it is that of other images."""
        stats = {name: (images / name).stat() for name in names}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        plain = {"images": str(images), "camera_model": camera_model, "files": files}
        state = cls(file, plain)
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key in ("images", "camera_model") if before[key] != plain[key]]
            changed += [name for name in names if before["files"].get(name, files[name]) != files[name]]
        except FileNotFoundError:
            state.save()
            return state
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{file}: cannot be read; --restart discards what is there") from None
        if changed:
            raise InputError(
                f"{file.parent.parent}: holds a capture of other images or another camera model ({changed[0]} "
                "differs); give another --out, or --restart to discard it"
            )
        state.plain = before | {"files": before["files"] | files}
        state.save()
        return state

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.plain), encoding="utf-8")
        unfinished.replace(self.file)

    def must_map(self, names: Sequence[str], pairs: Sequence[tuple[str, str]], seed: int) -> bool:
        """Whether there is no model of exactly these images."""
        wanted = [list(names), len(pairs), seed]
        return self.plain.get("mapped") != wanted or not (self.file.parent / "sparse" / "0").is_dir()

    def mapped(self, names: Sequence[str], pairs: Sequence[tuple[str, str]], seed: int, num_parts: int) -> None:
        self.plain |= {"mapped": [list(names), len(pairs), seed], "num_parts": num_parts}
        self.save()

    @property
    def num_parts(self) -> int:
        return int(self.plain.get("num_parts", 1))


def _discard(out: Path) -> None:
    """Removes what `reconstruct` wrote, and nothing else."""
    shutil.rmtree(out / "colmap", ignore_errors=True)
    for name in ("transforms.json", "sparse_points.ply"):
        (out / name).unlink(missing_ok=True)


# COLMAP's stages.


def _run(work: Path, stage: str, label: str = "", total: int = 0, unit: str = "image", **arguments: Any) -> Any:
    """What a stage of `colmap` returns, run in a process of its own, with a progress bar from what it logs.

    Its log is added to `work`/log.txt. Raises InputError where it fails.
    """
    script = Path(__file__).with_name("colmap.py")
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with (
        (work / "log.txt").open("a", encoding="utf-8") as log,
        tqdm(total=total, desc=label, unit=unit, mininterval=interval, disable=not label) as bar,
        tempfile.TemporaryFile("w+", encoding="utf-8") as given,
        tempfile.TemporaryFile("w+", encoding="utf-8") as returned,
    ):
        json.dump(arguments, given)
        given.seek(0)
        # -P: what lies beside the script has names such as image.py, and must not pass for other modules.
        command = [sys.executable, "-P", str(script), stage]
        process = subprocess.Popen(
            command, stdin=given, stdout=returned, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
        )
        last = ""
        with process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    log.write(line)
                    last = line.strip() or last
                    bar.update(max(0, min(_progress(line, total, bar.n), total) - bar.n))
                code = process.wait()
            finally:
                process.kill()
        if code:
            reason = textwrap.shorten(last, 200) or f"exit code {code}"
            raise InputError(f"{log.name}: COLMAP failed ({reason}); run again, with --restart if it fails again")
        bar.update(total - bar.n)
        returned.seek(0)
        return json.loads(returned.read().splitlines()[-1])


def _progress(line: str, total: int, before: int) -> int:
    """How much of `total` is done, from a line of COLMAP's log; `before` where it does not say."""
    if found := re.search(r"\[(\d+)/(\d+)(?:, (\d+)/(\d+))?\]", line):  # of images, or of blocks of pairs
        i, n, j, m = (int(number or 1) for number in found.groups())
        return total * ((i - 1) * m + j - 1) // (n * m)
    found = re.search(r"num_reg_\w+=(\d+)", line)
    return int(found[1]) if found else before


def _extract(work: Path, images: Path, names: Sequence[str], camera_model: str) -> None:
    """The features of all images. Raises InputError for an image that COLMAP cannot read."""
    done = {
        *_run(
            work,
            "extract",
            "features",
            len(names),
            database=str(work / "database.db"),
            images=str(images),
            groups=_groups(images, names),
            camera_model=camera_model,
        )
    }
    if missing := [name for name in names if name not in done]:
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{images / missing[0]}: COLMAP cannot read it{more}; convert to JPEG or PNG")


def _pairs(names: Sequence[str], matching: Matching) -> list[tuple[str, str]]:
    """The images to compare; empty for all pairs. Raises InputError."""
    count = len(names)
    if matching == "exhaustive" or (matching == "auto" and count <= EXHAUSTIVE_UP_TO):
        return []
    if spaced := [name for name in names if re.search(r"\s", name)]:
        raise InputError(
            f"{spaced[0]!r}: COLMAP cannot match a sequence of images with spaces in their names; "
            "rename the images, or use --matching=exhaustive"
        )
    steps = {*range(1, NEIGHBOURS + 1), *(2**k for k in range(count.bit_length()))}
    chosen = {(i, i + step) for step in steps for i in range(count - step)}
    chosen |= {*combinations(range(0, count, max(1, count // ANCHORS)), 2)}
    return [(names[i], names[j]) for i, j in sorted(chosen)]


def _match(work: Path, names: Sequence[str], pairs: Sequence[tuple[str, str]], seed: int) -> None:
    """The matches between the images of each pair."""
    listed = work / "pairs.txt"
    listed.write_text("".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
    total = len(pairs) or math.comb(len(names), 2)
    _run(
        work,
        "match",
        "matches",
        total,
        "pair",
        database=str(work / "database.db"),
        pairs=str(listed) if pairs else "",
        seed=seed,
    )


def _map(work: Path, images: Path, names: Sequence[str], camera_model: str, seed: int) -> int:
    """Cameras and points, of which the part with most images becomes sparse/0; how many parts there are.

    Raises InputError where no two images have enough in common.
    """
    for left in work.glob("mapping-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="mapping-", dir=work) as folder:
        num_parts = _run(
            work,
            "map_images",
            "cameras",
            len(names),
            database=str(work / "database.db"),
            images=str(images),
            names=[*names],
            camera_model=camera_model,
            seed=seed,
            folder=folder,
            sparse=str(work / "sparse" / "0"),
        )
    if not num_parts:
        raise InputError(
            f"{images}: no two of the {len(names)} images have enough in common to start from; take more, sharp "
            "photographs that overlap by two thirds, from places a step apart, of a textured scene that stands still"
        )
    return int(num_parts)


# What is written.


def _write(work: Path, images: Path, out: Path, names: Sequence[str], num_parts: int) -> Reconstruction:
    """Writes transforms.json and sparse_points.ply of COLMAP's model."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "model.npz"
        model = _run(work, "export", sparse=str(work / "sparse" / "0"), arrays=str(arrays))
        with np.load(arrays) as loaded:
            w2c, xyz, rgb = loaded["w2c"], loaded["xyz"], loaded["rgb"]
    order = sorted(range(len(w2c)), key=lambda i: _natural(model["names"][i]))
    registered = [model["names"][i] for i in order]
    camera_ids = [str(model["camera_ids"][i]) for i in order]
    c2w = _opengl_poses(w2c[order])
    ups = np.array([_UPWARDS.get(_exif(images / name).get(_ORIENTATION, 1), (0, 1)) for name in registered])
    rotation, centre, scale = orientation(c2w, xyz, ups)
    c2w = np.concatenate([rotation @ c2w[:, :, :3], scale * (c2w[:, :, 3:] - centre[:, None])], axis=-1)
    c2w[:, :, 3] = c2w[:, :, 3] @ rotation.T
    xyz = scale * (xyz - centre) @ rotation.T

    _write_ply(out / "sparse_points.ply", xyz, rgb)
    lenses = {number: _intrinsics(**model["cameras"][number]) for number in dict.fromkeys(camera_ids)}
    shared = next(iter(lenses.values())) if len(lenses) == 1 else {}
    frames = []
    for name, number, pose in zip(registered, camera_ids, c2w, strict=True):
        matrix = [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]
        own = {} if shared else lenses[number]
        frames.append({"file_path": _file_path(images / name, out), **own, "transform_matrix": matrix})
    plain = {
        **shared,
        "aabb_scale": _aabb_scale(xyz),
        "applied_transform": np.concatenate([rotation, -(rotation @ centre)[:, None]], axis=1).tolist(),
        "applied_scale": scale,
        "ply_file_path": "sparse_points.ply",
        "frames": frames,
    }
    unfinished = out / "transforms.json.unfinished"
    unfinished.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(out / "transforms.json")
    return Reconstruction(
        transforms=out / "transforms.json",
        registered=tuple(registered),
        unregistered=tuple(name for name in names if name not in {*registered}),
        lenses=tuple(_described(lens, camera_ids.count(number)) for number, lens in lenses.items()),
        num_points=len(xyz),
        reprojection_error=model["error"],
        num_parts=num_parts,
    )


def _opengl_poses(w2c: np.ndarray) -> np.ndarray:
    """c2w (V, 3, 4) with OpenGL axes of w2c (V, 3, 4) with OpenCV axes."""
    rotation = np.swapaxes(w2c[:, :, :3], -1, -2)
    return np.concatenate([rotation * (1, -1, -1), -(rotation @ w2c[:, :, 3:])], axis=-1)


def _file_path(file: Path, out: Path) -> str:
    """Relative to `out` where both may well be moved together: in it, or in the folder that holds it."""
    near = file.is_relative_to(out.parent) and out.parent != out
    return Path(os.path.relpath(file, out) if near else file).as_posix()


def _intrinsics(model: str, size: Sequence[int], params: Sequence[float]) -> dict[str, Any]:
    """The keys of a transforms.json that describe a camera of COLMAP: nerfstudio's, and those of instant-ngp."""
    num_focal = 1 if model.startswith("SIMPLE") or model == "RADIAL" else 2
    focal, centre, coefficients = params[:num_focal], params[num_focal : num_focal + 2], params[num_focal + 2 :]
    # The centre of the first pixel is (0.5, 0.5) in COLMAP as in a transforms.json.
    plain: dict[str, Any] = {"camera_model": model, "w": size[0], "h": size[1]}
    plain |= {"fl_x": focal[0], "fl_y": focal[-1], "cx": centre[0], "cy": centre[1]}
    plain |= dict(zip(LENS_KEYS.get(model, ("k1", "k2")), coefficients, strict=False))
    if model == "OPENCV_FISHEYE":
        return plain | {"is_fisheye": True}
    return plain | {f"camera_angle_{a}": 2 * math.atan(0.5 * plain[s] / plain[f"fl_{a}"]) for a, s in ("xw", "yh")}


def _described(lens: dict[str, Any], num_images: int) -> str:
    coefficients = [f"{k} {lens[k]:.4g}" for k in ("k1", "k2", "k3", "k4", "p1", "p2") if k in lens]
    degrees = math.degrees(2 * math.atan(0.5 * lens["w"] / lens["fl_x"])) if "is_fisheye" not in lens else None
    wide = f" ({degrees:.0f} degrees wide)" if degrees else ""
    return ", ".join(
        [
            f"{num_images} images of {lens['w']}x{lens['h']}: {lens['camera_model']}, "
            f"focal length {lens['fl_x']:.1f}, {lens['fl_y']:.1f} px{wide}",
            *coefficients,
        ]
    )


def _aabb_scale(xyz: np.ndarray) -> int:
    """The smallest box of instant-ngp, 2^k wide about the middle, that holds almost all points."""
    reach = 2 * INSTANT_NGP_SCALE * np.abs(xyz).max(axis=1) if len(xyz) else np.ones(1)
    return int(2 ** np.clip(math.ceil(math.log2(max(np.quantile(reach, INSIDE), 1e-9))), 0, 7))


def _write_ply(path: Path, xyz: np.ndarray, rgb: np.ndarray) -> None:
    header = ["ply", "format ascii 1.0", f"element vertex {len(xyz)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    rows = [f"{x:.7g} {y:.7g} {z:.7g} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(xyz, rgb, strict=True)]
    path.write_text("\n".join([*header, "end_header", *rows, ""]), encoding="ascii")


# Orientation.


def orientation(c2w: np.ndarray, points: np.ndarray, ups: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The similarity scale rotation (x - centre) that puts a capture upright about the origin.

    c2w (V, 3, 4) with OpenGL axes; points (N, 3); ups (V, 2), the direction in each image, x right and y up, that is
    up in the photograph.

    Up is the direction to which what is level in the photographs is most nearly at right angles, since people hold
    cameras level but tilt them; where that is not determined, as all look one way, it is the mean up of the
    photographs. The centre is the point nearest to all optical axes, or where they do not meet before the cameras,
    the median of the points. The mean distance of the cameras from it becomes CAMERA_DISTANCE.
    """
    right, upwards = c2w[:, :, 0], c2w[:, :, 1]
    up = right * ups[:, :1] + upwards * ups[:, 1:]
    level = right * ups[:, 1:] - upwards * ups[:, :1]
    mean = up.sum(axis=0) / max(float(np.linalg.norm(up.sum(axis=0))), 1e-9)
    spread, directions = np.linalg.eigh(level.T @ level / len(level))
    vertical = directions[:, 0] * np.sign(directions[:, 0] @ mean)
    if spread[1] > 0.05 and spread[0] < 0.2 * spread[1] and vertical @ mean > 0.5:
        mean = vertical
    rotation = _turn_to_z(mean)
    centre = _attention(c2w, points)
    distance = float(np.linalg.norm(c2w[:, :, 3] - centre, axis=1).mean())
    return rotation, centre, CAMERA_DISTANCE / max(distance, 1e-9)


def _turn_to_z(up: np.ndarray) -> np.ndarray:
    """The smallest rotation that takes a unit vector to +z."""
    x, y, z = up
    if z < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0.0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)


def _attention(c2w: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(3,) the point nearest to all optical axes; the median of the points where there is no such point in view."""
    forward, origin = -c2w[:, :, 2], c2w[:, :, 3]
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]  # projects onto the plane across each axis
    total = across.sum(axis=0)
    if np.linalg.eigvalsh(total)[0] > 1e-3 * len(c2w):
        found = np.linalg.solve(total, (across @ origin[:, :, None]).sum(axis=0)[:, 0])
        if np.mean(((found - origin) * forward).sum(axis=1) > 0) > 0.8:
            return found
    return np.median(points, axis=0) if len(points) else origin.mean(axis=0)
