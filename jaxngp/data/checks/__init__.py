"""Dataset checks: warnings about views that are valid but probably not what was intended, each with a remedy."""

from __future__ import annotations

import jax
import numpy as np

from jaxngp.cameras import Cameras, PosedImages, unproject
from jaxngp.data.splits import Split
from jaxngp.marching import box_interval

_RAYS = 2**14  # cast at pixels evenly spaced among all
_PIXELS = 2**20  # looked at, likewise
_FAR = 10.0  # box sides; the cameras of NeRF-synthetic stand 1.3 away


def dataset_warnings(training: Split, evaluation: Split | None) -> list[str]:
    """Warnings about the views to train on, and to evaluate on if there are any, with the notes of their readers."""
    found: list[str | None] = [*training.notes]
    if evaluation is not None:
        found += [note for note in evaluation.notes if note not in training.notes]
    if isinstance(training.images, PosedImages):
        found += [_premultiplied(training, training.images), _outside(training, training.images)]
        found.append(_far_away(training.images))
        if evaluation is not None and isinstance(evaluation.images, PosedImages):
            found.append(_coinciding(training.images, evaluation.images, evaluation.name))
    return [warning for warning in found if warning]


def _some_pixels(images: PosedImages, count: int) -> np.ndarray:
    """The numbers of about `count` pixels, evenly spaced among those of all views; masked ones are left out."""
    # An odd stride, so that it does not always meet the same column.
    number = np.arange(0, len(images.rgba), max(1, len(images.rgba) // count) | 1)
    return number if images.keep is None else number[np.asarray(images.keep)[number]]


def _premultiplied(training: Split, images: PosedImages) -> str | None:
    """Colour that is never above alpha where alpha is partial, though the scene is not dark."""
    if not training.has_alpha:
        return None
    rgba = np.asarray(images.rgba)[_some_pixels(images, _PIXELS)].astype(np.int16)
    brightest, alpha = rgba[:, :3].max(axis=-1), rgba[:, 3]
    partial, opaque = (alpha > 0) & (alpha < 255), alpha == 255
    if partial.sum() < 200 or not opaque.any():
        return None
    above, bright = np.mean(brightest[partial] > alpha[partial] + 2), np.mean(brightest[opaque] > 128)
    if above > 1e-3 or bright < 0.1:
        return None
    return (
        "the images look as if their colour were multiplied by alpha: where alpha is partial no colour is above it. "
        "Straight alpha is expected, as PNG has it; export them that way, or edges will be dark"
    )


def _outside(training: Split, images: PosedImages) -> str | None:
    """Pixels that show something, but whose ray misses the box."""
    number = _some_pixels(images, _RAYS)
    view = np.searchsorted(np.asarray(images.offset), number, side="right") - 1
    cameras: Cameras = jax.tree.map(np.asarray, images.cameras)[view]
    y, x = np.divmod(number - np.asarray(images.offset)[view], np.asarray(cameras.size)[:, 0])
    misses = np.asarray(_miss_box(cameras, np.stack([x, y], axis=-1).astype(np.float32) + np.float32(0.5)))
    shows = np.asarray(images.rgba)[number, 3] > 0
    share = float(np.mean(misses[shows])) if shows.any() else 0.0
    if share < (0.01 if training.has_alpha else 0.5):
        return None
    what = "of the pixels that are not transparent" if training.has_alpha else "of the pixels"
    return (
        f"{share:.0%} {what} lie on rays that miss the scene's box, and nothing can be learned there: raise "
        "scene.box_side, or move scene.box_centre, by --override, in the units of the poses"
    )


@jax.jit
def _miss_box(cameras: Cameras, pixel_xy: jax.Array) -> jax.Array:
    t_near, t_far = box_interval(unproject(cameras, pixel_xy))
    return t_far <= t_near


def _far_away(images: PosedImages) -> str | None:
    distance = float(np.median(np.linalg.norm(np.asarray(images.cameras.c2w)[:, :, 3] - 0.5, axis=1)))
    if distance < _FAR:
        return None
    return (
        f"the cameras stand {distance:.0f} sides of the scene's box away from its middle: if the scene is as large as "
        "that, raise scene.box_side by --override; detail is as fine as the box is small"
    )


def _coinciding(training: PosedImages, evaluation: PosedImages, name: str) -> str | None:
    """Views to evaluate on that are among those to train on, without saying so."""
    if name == "train":
        return None
    ours, theirs = (np.asarray(images.cameras.c2w).reshape(-1, 12) for images in (training, evaluation))
    same = [bool(np.any(np.max(np.abs(ours - pose), axis=1) < 1e-6)) for pose in theirs]
    if not any(same):
        return None
    return (
        f"{sum(same)} of the {len(same)} {name} views have the pose of a training view: their PSNR "
        "measures memorisation, not generalisation"
    )
