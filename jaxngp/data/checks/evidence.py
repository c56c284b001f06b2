"""What the checks look at: cameras of all views, and some of their images at a reduced size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxngp.cameras import Cameras, make_cameras, unproject
from jaxngp.config import InputError
from jaxngp.data.capture import Capture, DepthMap, Mask, Placement
from jaxngp.data.checks.features import Features, find_features
from jaxngp.data.photos import DEEP_MODES, open_image, orientation, read_masks
from jaxngp.data.splits import Split

MAX_VIEWS = 60  # images that are looked at, of the training views
MAX_OTHERS = 12  # and of the others
SIDE = 400  # px, of the longer side of a reduced image, roughly
_PARTIAL = 2000  # pixels of partial alpha that are kept of an image
_LUMA = np.array([0.299, 0.587, 0.114], np.float32) / 255
_EXPOSURE_TIME, _APERTURE, _ISO, _EXIF_IFD = 0x829A, 0x829D, 0x8827, 0x8769


@dataclass(frozen=True, eq=False)
class Picture:
    """One image at a reduced size, and what its file says of it."""

    rgba: np.ndarray  # (H, W, 4) u8
    sharpness: float  # of the image before it was reduced; see `_sharpness`
    partial: np.ndarray  # (K, 4) u8, some of its pixels of partial alpha, before it was reduced
    keep: np.ndarray | None = None  # (H, W) bool, whether a pixel takes part; None without a mask
    orientation: int = 1  # of EXIF
    bits: int = 8  # per channel
    gamma: float = 0.0  # of the file, 0 where it says none; 1 is linear
    light: float = 0.0  # exposure time x sensitivity / aperture^2 by EXIF, 0 where unknown

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.rgba.shape[1], self.rgba.shape[0]

    @property
    def visible(self) -> np.ndarray:
        """(H, W) bool, where the image is opaque."""
        return self.rgba[..., 3] > 250

    def grey(self) -> np.ndarray:
        """(H, W) f32 in [0, 1], before medium grey where it is transparent."""
        alpha = self.rgba[..., 3] * np.float32(1 / 255)
        return self.rgba[..., :3] @ _LUMA * alpha + np.float32(0.5) * (1 - alpha)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All views of a capture that is trained on, in scene units. Per-view tuples are as long as `names`."""

    names: tuple[str, ...]
    splits: tuple[str, ...]  # of each view: train, val, test, held-out
    cameras: Cameras  # (V,) numpy, to scene units, of the images as they are trained on
    poses: np.ndarray  # (V, 3, 4) f64, camera-to-world as the source says
    placement: Placement
    has_alpha: bool
    files: tuple[Path, ...] = ()  # or empty
    depths: tuple[DepthMap | None, ...] = ()
    points: np.ndarray | None = None  # (N, 3) scene units
    pictures: dict[int, Picture] = field(default_factory=dict)  # by the number of the view
    features: dict[int, Features] = field(default_factory=dict)  # likewise, of the training views

    @property
    def training(self) -> np.ndarray:
        """The numbers of the training views."""
        return np.flatnonzero(np.array(self.splits) == "train")

    def named(self, views: Sequence[int], most: int = 3) -> str:
        """The names of some views, as text."""
        names = [self.names[view] for view in views]
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def of_capture(capture: Capture, roles: Sequence[str], placement: Placement) -> Evidence:
    """What there is to look at of a capture of image files, whose images are read here. Raises InputError.

    roles: what each view is for, as `splits.read_views` says.
    """
    assert capture.cameras is not None
    cameras = jax.tree.map(np.asarray, capture.cameras)
    width, height = np.asarray(cameras.size).T
    placed = make_cameras(
        placement.transform.pose_to_scene(cameras.c2w),
        focal_xy=cameras.focal_xy, centre_xy=cameras.centre_xy, width=width, height=height, lens=cameras.lens,
    )  # fmt: skip
    return _with_pictures(
        Evidence(
            names=capture.names,
            splits=tuple(roles),
            cameras=placed,
            poses=cameras.c2w,
            placement=placement,
            has_alpha=any(capture.has_alpha),
            files=capture.files,
            depths=capture.depths,
            points=None if capture.points is None else placement.transform.to_scene(capture.points),
        ),
        lambda view: _read_picture(
            capture.files[view], capture.masks[view] if capture.masks else None, np.asarray(cameras.size)[view]
        ),
    )


def of_splits(training: Split, evaluation: Split | None) -> Evidence:
    """What there is to look at of views that were read; both are of posed images."""
    splits = [training] + ([evaluation] if evaluation is not None and evaluation.name != "train" else [])
    parts: list[Any] = [split.images for split in splits]
    cameras = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(images.cameras for images in parts))
    sources = [_sources(split) for split in splits]
    whole = all(source is not None for source in sources)
    known = [source for source in sources if source is not None]
    files = [file for source in known for file in source[0]]
    depths = [depth for source in known for depth in source[1]]
    poses = [pose for source in known for pose in source[2]]
    where = [(images, view) for images in parts for view in range(len(images.offset))]
    points = None if training.capture is None else training.capture.points

    def picture(view: int) -> Picture:
        images, number = where[view]
        facts = _facts(files[view]) if whole else {}
        return _shrunk(Image.fromarray(images.image(number)), images.mask(number), facts)

    return _with_pictures(
        Evidence(
            names=tuple(name for split in splits for name in split.views),
            splits=tuple(split.name for split in splits for _ in split.views),
            cameras=cameras,
            poses=np.stack(poses) if whole else training.transform.pose_to_world(np.asarray(cameras.c2w)),
            placement=training.placement,
            has_alpha=training.has_alpha,
            files=tuple(files) if whole else (),
            depths=tuple(depths) if whole else (),
            points=None if points is None else training.transform.to_scene(points),
        ),
        picture,
    )


def _sources(split: Split) -> tuple[list[Path], list[DepthMap | None], list[np.ndarray]] | None:
    """Files, depth maps and poses of a split's views as its capture has them; None where it is not known."""
    capture = split.capture
    if capture is None or capture.cameras is None:
        return None
    own = "train" if split.name == "held-out" else split.name
    number = {name: i for i, (name, of) in enumerate(zip(capture.names, capture.splits, strict=True)) if of == own}
    rows = [number[name] for name in split.views]
    depths = [capture.depths[i] if capture.depths else None for i in rows]
    return [capture.files[i] for i in rows], depths, [np.asarray(capture.cameras.c2w)[i] for i in rows]


def _with_pictures(evidence: Evidence, read: Callable[[int], Picture]) -> Evidence:
    """`evidence` with the images that are looked at, and their features."""
    training = evidence.training
    others = np.setdiff1d(np.arange(len(evidence.names)), training)
    views = [*_chosen(training, MAX_VIEWS).tolist(), *_chosen(others, MAX_OTHERS).tolist()]

    def look(view: int) -> tuple[int, Picture, Features | None]:
        picture = read(view)
        if evidence.splits[view] != "train":
            return view, picture, None
        return view, picture, find_features(picture.grey(), picture.visible if evidence.has_alpha else None)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for view, picture, features in pool.map(look, views):
            evidence.pictures[view] = picture
            if features is not None:
                evidence.features[view] = features
    return evidence


def _chosen(views: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some views: half of them evenly spaced, the rest those that come next, which overlap."""
    if len(views) <= most:
        return views
    first = np.arange(most // 2) * len(views) // (most // 2)
    return views[np.unique(np.concatenate([first, first + 1]) % len(views))]


_AT_ONCE = 2**14  # pixels, so that one program is compiled for any number of them
_AT_ORIGIN = np.eye(3, 4, dtype=np.float32)


def view_directions(cameras: Cameras, view: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The directions (N, 3) f64 of unit length, in camera axes, in which views (N,) see shares (N, 2) of their size."""
    cameras = cameras.replace(c2w=np.broadcast_to(_AT_ORIGIN, np.shape(cameras.c2w)))  # type: ignore[attr-defined]
    found = []
    for start in range(0, len(view), _AT_ONCE):
        part = view[start : start + _AT_ONCE]
        padded = np.concatenate([part, np.zeros(_AT_ONCE - len(part), part.dtype)])
        xy = np.zeros((_AT_ONCE, 2), np.float32)
        xy[: len(part)] = share[start : start + _AT_ONCE] * np.asarray(cameras.size)[part]
        chosen = jax.tree.map(lambda array, rows=padded: np.asarray(array, np.float32)[rows], cameras)
        found.append(np.asarray(_directions(chosen, xy), np.float64)[: len(part)])
    direction = np.concatenate(found) if found else np.zeros((0, 3))
    return direction / np.linalg.norm(direction, axis=-1, keepdims=True)


@jax.jit
def _directions(cameras: Cameras, xy: jax.Array) -> jax.Array:
    return unproject(cameras, xy).direction


# Pictures.


def _read_picture(file: Path, mask: Mask | None, size: np.ndarray) -> Picture:
    """An image file of (width, height), decoded reduced where its format can do that. Raises InputError."""
    facts = _facts(file)
    keep = read_masks([mask], size[None], 1, "")[0] if mask else None
    with open_image(file) as image:
        if image.format == "JPEG":
            image.draft("RGB", (SIDE, SIDE))
        try:
            if image.mode in DEEP_MODES:
                grey = Image.fromarray((np.asarray(image).astype(np.int32) // 257).astype(np.uint8))
                return _shrunk(grey, keep, facts)
            return _shrunk(image.convert("RGBA"), keep, facts)
        except Exception as error:  # a decoder met with a broken file raises whatever it likes
            raise InputError(f"{file}: broken or truncated ({error}); render or download it again") from None


def _shrunk(image: Image.Image, keep: np.ndarray | None, facts: dict[str, Any]) -> Picture:
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3]
    partial = rgba[(alpha > 0) & (alpha < 255)]
    partial = partial[:: max(1, len(partial) // _PARTIAL)]
    factor = max(1, round(max(image.size) / SIDE))
    small = image.reduce(factor) if factor > 1 else image
    return Picture(
        np.asarray(small.convert("RGBA")), _sharpness(rgba), partial, keep=_at_size(keep, small.size), **facts
    )


def _at_size(keep: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """The nearest pixels of a mask (H, W) for an image of (width, height)."""
    if keep is None:
        return None
    y, x = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(reversed(size), keep.shape, strict=True))
    return keep[y][:, x]


def _facts(file: Path) -> dict[str, Any]:
    """What the header of an image says beside its size."""
    with open_image(file) as image:
        bits = 16 if image.mode in DEEP_MODES else 8
        if image.format == "PNG":
            with file.open("rb") as stream:
                bits = max(bits, stream.read(25)[24])
        gamma = image.info.get("gamma", 0.0)
        return {
            "orientation": orientation(image),
            "bits": bits,
            "gamma": float(gamma) if isinstance(gamma, int | float) else 0.0,
            "light": _light(image),
        }


def _light(image: Image.Image) -> float:
    """By EXIF, in proportion to how bright the same thing becomes in the image; 0 where it does not say."""
    if "exif" not in image.info:
        return 0.0
    try:
        tags = image.getexif().get_ifd(_EXIF_IFD)
        return float(tags[_EXPOSURE_TIME]) * float(np.ravel(tags[_ISO])[0]) / float(tags[_APERTURE]) ** 2
    except Exception:  # broken EXIF raises whatever it likes, and says nothing
        return 0.0


def _sharpness(rgba: np.ndarray) -> float:
    """Mean square of second differences, in those of first differences, of what an image shows: 0 if all is flat.

    Both are of green. A Gaussian blur of width s divides it by about s^2, and what is in the image matters little.
    """
    step = max(1, max(rgba.shape) // 1000)
    grey = rgba[: rgba.shape[0] // step * step, :, 1].astype(np.float32)
    visible = rgba[: len(grey), :, 3] > 250
    inner = visible[1:-1, 1:-1] & visible[1:-1, 2:] & visible[1:-1, :-2] & visible[2:, 1:-1] & visible[:-2, 1:-1]
    if inner.sum() < 100:
        return 0.0
    first = (grey[1:-1, 2:] - grey[1:-1, :-2]) ** 2 + (grey[2:, 1:-1] - grey[:-2, 1:-1]) ** 2
    second = grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1] - 4 * grey[1:-1, 1:-1]
    slope = float(np.mean(first[inner]))
    return float(np.mean(second[inner] ** 2)) / slope if slope > 4 else 0.0
