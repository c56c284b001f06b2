"""What looks wrong about a scene's views though nothing is invalid: each in a sentence, with what to do about it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import Camera, PosedImages, pixel_to_ray
from jaxngp.data import Split
from jaxngp.marching import box_interval

_PIXELS = 2**14  # looked at, evenly spaced among all
_FAR = 10.0  # box sides; the cameras of NeRF-synthetic stand 1.3 away


def dataset_warnings(training: Split, evaluation: Split | None) -> list[str]:
    """Warnings about the views to train on, and to evaluate on if there are any. None about ray tables."""
    if not isinstance(training.images, PosedImages):
        return []
    found = [_premultiplied(training), _outside(training), _far_away(training)]
    if evaluation is not None and isinstance(evaluation.images, PosedImages):
        found.append(_coinciding(training, evaluation))
    return [warning for warning in found if warning]


def _some_pixels(images: PosedImages) -> tuple[np.ndarray, np.ndarray]:
    """View (N,), and y and x (N, 2), of pixels evenly spaced among all views."""
    num_views, height, width, _ = images.rgba.shape
    count = num_views * height * width
    # An odd stride, so that it does not always meet the same column.
    number = np.arange(0, count, max(1, count // _PIXELS) | 1)
    return number // (height * width), np.stack([number // width % height, number % width], axis=-1)


def _premultiplied(training: Split) -> str | None:
    """Colour that is never above alpha where alpha is partial, though the scene is not dark."""
    if not training.has_alpha:
        return None
    rgba = np.asarray(training.images.rgba)  # type: ignore[union-attr]
    rgba = rgba[:: max(1, len(rgba) // 16)].astype(np.int16)
    brightest, alpha = rgba[..., :3].max(axis=-1), rgba[..., 3]
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


def _outside(training: Split) -> str | None:
    """Pixels that show something, but whose ray misses the box."""
    images = training.images
    assert isinstance(images, PosedImages)
    view, yx = _some_pixels(images)
    misses = np.asarray(_miss_box(images.camera, np.asarray(images.c2w)[view], yx[:, ::-1] + 0.5))
    shows = np.asarray(images.rgba)[view, yx[:, 0], yx[:, 1], 3] > 0
    share = float(np.mean(misses[shows])) if shows.any() else 0.0
    if share < (0.01 if training.has_alpha else 0.5):
        return None
    what = "of the pixels that are not transparent" if training.has_alpha else "of the pixels"
    return (
        f"{share:.0%} {what} lie on rays that miss the scene's box, and nothing can be learned there: raise "
        "scene.box_side, or move scene.box_centre, by --override, in the units of the poses"
    )


@jax.jit
def _miss_box(camera: Camera, c2w: jax.Array, pixel_xy: jax.Array) -> jax.Array:
    t_near, t_far = box_interval(pixel_to_ray(camera, c2w, jnp.asarray(pixel_xy, jnp.float32)))
    return t_far <= t_near


def _far_away(training: Split) -> str | None:
    position = np.asarray(training.images.c2w)[:, :, 3]  # type: ignore[union-attr]
    distance = float(np.median(np.linalg.norm(position - 0.5, axis=1)))
    if distance < _FAR:
        return None
    return (
        f"the cameras stand {distance:.0f} sides of the scene's box away from its middle: if the scene is as large as "
        "that, raise scene.box_side by --override; detail is as fine as the box is small"
    )


def _coinciding(training: Split, evaluation: Split) -> str | None:
    """Views to evaluate on that are among those to train on, without saying so."""
    if evaluation.name == "train":
        return None
    ours, theirs = (np.asarray(split.images.c2w).reshape(-1, 12) for split in (training, evaluation))  # type: ignore[union-attr]
    same = [bool(np.any(np.max(np.abs(ours - pose), axis=1) < 1e-6)) for pose in theirs]
    if not any(same):
        return None
    return (
        f"{sum(same)} of the {len(same)} {evaluation.name} views have the pose of a training view: their PSNR says how "
        "well views are remembered, not how well new ones are predicted"
    )
