"""The views to train on and to evaluate on: chosen from a capture, placed in the scene's box, and read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jaxngp.cameras import PosedImages, make_cameras
from jaxngp.config import ImagesOn, InputError, SceneConfig
from jaxngp.data import on_disk, rays
from jaxngp.data.cache import cache_dir
from jaxngp.data.capture import SPLITS, Capture, Placement, SceneTransform, normalise
from jaxngp.data.depths import read_depths
from jaxngp.data.photos import probe_images, read_images, read_masks
from jaxngp.data.places import Location, locate
from jaxngp.data.rays import RayTable


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
    placement: Placement = Placement(SceneTransform())
    notes: tuple[str, ...] = ()  # a sentence about each thing that the user may not expect
    capture: Capture | None = None  # that the views are of, with the files that they come from
    cameras_from: str = ""  # where cameras or exposures come from, if not from the files alone; for people
    log_gain: np.ndarray | None = None  # (V, 3) exposures of the views, by which predictions are scaled

    @property
    def num_views(self) -> int:
        return len(self.views)

    @property
    def transform(self) -> SceneTransform:
        """From the units of the files to scene units."""
        return self.placement.transform

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of the largest view in pixels, or (0, 0) where it is unknown."""
        images = self.images
        return images.max_size if isinstance(images, PosedImages) else (images.width, images.height)


def load_training(scene: SceneConfig, part: int = 0, num_parts: int = 1, *, images_on: ImagesOn = "auto") -> Split:
    """The training views, without those that are held out where there is neither a test nor a val split.

    Of several processes each reads one part of the views; rays all of them. images_on: as of `TrainConfig`; of those in
    a file, memory holds what there is room for. Raises InputError.
    """
    location = locate(scene)
    if "train" not in location.splits:
        raise _no_split("train", location, scene)
    capture = location.read("train")
    views = _view_numbers("train", len(capture.names), _hold_out_every(scene, location))
    if len(views) < num_parts and not capture.rays:
        raise InputError(f"{capture.path}: has {len(views)} training views, too few for {num_parts} processes")
    part_of = views if capture.rays else np.array_split(views, num_parts)[part]
    loaded = _load(scene, capture, "train", part_of, _place(scene, location, capture), images_on)
    return replace(loaded, has_alpha=_any_alpha(capture, views))


def load_evaluation(scene: SceneConfig, split: str = "auto", num_views: int = 0) -> Split:
    """The views to evaluate on: `num_views` evenly spaced ones of a split, or all of them for 0.

    split: "auto" takes test, else val, else "held-out", the training views that `load_training` leaves out, else
    train, which is noted. Raises InputError where the split or that many views do not exist.
    """
    location = locate(scene)
    known = _choices(scene, location)
    name = (
        next(choice for choice in ("test", "val", "held-out", "train") if choice in known) if split == "auto" else split
    )
    if name not in known:
        raise _no_split(name, location, scene)
    capture = location.read("train" if name == "held-out" else name)
    if not (count := len(capture.names)):
        raise InputError(f"{capture.path}: image size unknown, so no view to evaluate; {rays.SIZE_ADVICE}")
    if name == "held-out" and count == 1:  # none can be spared
        if split != "auto":
            raise InputError(f"{capture.path}: has one view, which is trained on; add one, or evaluate on train")
        name = "train"
    views = _view_numbers(name, count, _hold_out_every(scene, location))
    if num_views < 0 or num_views > len(views):
        raise InputError(
            f"eval_views = {num_views}: {capture.path} has {len(views)} {name} views; "
            "give at most as many, or 0 for all of them"
        )
    views = views[np.arange(num_views) * len(views) // num_views] if num_views else views
    loaded = _load(scene, capture, name, views, _place(scene, location, capture))
    if split == "auto" and name == "train":
        note = f"{capture.path}: no view is held out, so it is evaluated on the views that it is trained on"
        loaded = replace(loaded, notes=(*loaded.notes, note))
    return loaded


def read_views(scene: SceneConfig) -> tuple[Capture, tuple[str, ...], Placement]:
    """All views of a scene, no pixels; what each is for: train, val, test or held-out; and where they are placed.

    Raises InputError.
    """
    location = locate(scene)
    capture = location.read(*location.splits)
    roles = list(capture.splits)
    if every := _hold_out_every(scene, location):
        training = [i for i, split in enumerate(capture.splits) if split == "train"]
        for number in _view_numbers("held-out", len(training), every) if len(training) > 1 else ():
            roles[training[number]] = "held-out"
    return capture, tuple(roles), normalise(capture, scene)


# Which views.


def _hold_out_every(scene: SceneConfig, location: Location) -> int:
    """Views from one held-out view to the next; 0 where none is held out."""
    return 0 if {"val", "test"} & set(location.splits) else scene.hold_out_every


def _choices(scene: SceneConfig, location: Location) -> tuple[str, ...]:
    """What can be evaluated on."""
    return (*location.splits, "held-out") if _hold_out_every(scene, location) else location.splits


def _view_numbers(name: str, count: int, hold_out_every: int) -> np.ndarray:
    """The numbers of the views of a split among `count`; train and held-out share none."""
    number = np.arange(count)
    if name == "held-out":
        return number[::hold_out_every]
    return number[number % hold_out_every > 0] if name == "train" and hold_out_every and count > 1 else number


def _no_split(name: str, location: Location, scene: SceneConfig) -> InputError:
    wanted = location.format.split.format(name)
    hint = f"; add {wanted}" if name in SPLITS and wanted else ""
    known = ", ".join(_choices(scene, location))
    return InputError(f"{location.path}: has no {name!r} split, only {known}; take one of these{hint}")


# Their pixels.


def _place(scene: SceneConfig, location: Location, capture: Capture) -> Placement:
    """Where the scene lies in its box, which has to be the same for all of its splits."""
    known = scene.box_side or capture.box or capture.rays or len(location.splits) == 1
    return normalise(capture if known else location.read(*location.splits), scene)


def _load(
    scene: SceneConfig,
    capture: Capture,
    name: str,
    views: np.ndarray,
    placement: Placement,
    images_on: ImagesOn = "auto",
) -> Split:
    """The given views of a capture, as the split `name`."""
    notes = capture.unusual
    images: PosedImages | RayTable
    try:
        if capture.rays:
            images = _load_rays(scene, capture, views, placement.transform)
        else:
            views, keep, more = _load_masks(scene, capture, views)
            images = replace(_load_images(scene, capture, views, placement.transform, images_on), keep=keep)  # type: ignore[arg-type]
            notes += more
            if images_on == "auto" and on_disk.is_on_disk(images.rgba):
                notes += (_too_large(capture, images),)
    except MemoryError as error:
        raise InputError(
            f"{capture.path}: the {name} views do not fit into memory ({error}); shrink them with --downscale, "
            "or take some out"
        ) from None
    names = tuple(capture.names[view] for view in views)
    return Split(name, names, images, _any_alpha(capture, views), placement, notes, capture)


def _any_alpha(capture: Capture, views: np.ndarray) -> bool:
    return any(capture.has_alpha[view] for view in views) if capture.has_alpha else False


def _load_masks(
    scene: SceneConfig, capture: Capture, views: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """The views that are not wholly masked, which of their pixels take part, and a note on those that are."""
    if not any(capture.masks[view] for view in views if capture.masks):
        return views, None, ()
    assert capture.cameras is not None
    sizes = np.asarray(capture.cameras.size)[views]
    keep = read_masks([capture.masks[view] for view in views], sizes, scene.downscale, f"{capture.path}: masks")
    left = np.array([part.any() for part in keep])
    if not left.any():
        first = next(mask.file for view in views if (mask := capture.masks[view]))
        raise InputError(f"{first}: like the masks of all other views, leaves no pixel; remove or invert them")
    notes: tuple[str, ...] = ()
    if not left.all():
        names = [capture.names[view] for view in views[~left]]
        named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        notes = (f"{capture.path}: left out, as their masks leave no pixel: {named}",)
    return views[left], np.concatenate([part.ravel() for part in keep if part.any()]), notes


def _too_large(capture: Capture, images: PosedImages) -> str:
    size, left = images.rgba.nbytes / 1e9, on_disk.memory_left() / 1e9
    return (
        f"{capture.path}: the pixels, {size:.2f} GB, lie in a file below {cache_dir()}, for {left:.2f} GB of memory "
        "are left; with --override=train.images_on=host they would be held there"
    )


def _load_images(
    scene: SceneConfig, capture: Capture, views: np.ndarray, transform: SceneTransform, images_on: ImagesOn
) -> PosedImages:
    assert capture.cameras is not None
    seen = capture.cameras[views]
    full = np.asarray(seen.size)
    focal_xy: np.ndarray = np.asarray(seen.focal_xy, np.float32)
    centre_xy: np.ndarray = np.asarray(seen.centre_xy, np.float32)
    if scene.downscale in capture.reduced and not (capture.masks or capture.alphas):
        files = [capture.reduced[scene.downscale][view] for view in views]
        size = probe_images(files).sizes
        rgba = read_images(files, size, 1, str(capture.path), on=images_on)
        scale = (size / full).astype(np.float32)
        focal_xy, centre_xy = focal_xy * scale, centre_xy * scale
    else:
        files = [capture.files[view] for view in views]
        alphas = [capture.alphas[view] for view in views] if capture.alphas else ()
        rgba = read_images(files, full, scene.downscale, str(capture.path), alphas, on=images_on)
        size = full // scene.downscale
        focal_xy, centre_xy = focal_xy / scene.downscale, centre_xy / scene.downscale
    cameras = make_cameras(
        transform.pose_to_scene(np.asarray(seen.c2w)),
        focal_xy=focal_xy,
        centre_xy=centre_xy,
        width=size[:, 0],
        height=size[:, 1],
        lens=seen.lens,
    )
    ends = np.cumsum(size.prod(axis=1))
    width, height = size.max(axis=0).tolist()
    depths = [capture.depths[view] for view in views if capture.depths]
    depth = read_depths(depths, cameras, transform.side, f"{capture.path}: depths") if any(depths) else None
    offset = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    return PosedImages(cameras, rgba, offset, (width, height), depth=depth)  # type: ignore[arg-type]


def _load_rays(scene: SceneConfig, capture: Capture, views: np.ndarray, transform: SceneTransform) -> RayTable:
    if scene.downscale != 1:
        raise InputError(f"scene.downscale = {scene.downscale}: {capture.path} is a ray table, not an image; give 1")
    return rays.make_ray_table([capture.rays[view] for view in views] if len(views) else capture.rays, transform)
