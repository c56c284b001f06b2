"""What known depths add where views are few: the built-in scene with and without the loss on depth.

    python -m experiments.depth [--num_views=6] [--steps=800] [--downscale=2] [--weights=0,0.02]

Prints, for each `train.depth_weight`, PSNR and SSIM of test views, and the mean error of their depth in scene units
where the scene and the prediction are opaque. Depths are exact, from the scene's own ray caster.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from absl import flags as absl_flags

from jaxngp import flags
from jaxngp.cameras import Cameras, PosedImages, Rays, pose_images, view_rays
from jaxngp.config import apply_overrides
from jaxngp.data import SceneTransform, Split, bricks, load_evaluation, load_training
from jaxngp.evaluation import evaluate_views
from jaxngp.presets import PRESETS, SCENES
from jaxngp.records import device_name
from jaxngp.training.loop import train

TEST_VIEWS = 8


def exact_depth(camera: Cameras, transform: SceneTransform) -> np.ndarray:
    """(H, W) f16: the distance of what the pixel centres of a view show, scene units; 0 where that is nothing."""
    rays = view_rays(camera)
    origin = transform.to_world(np.asarray(rays.origin)).astype(np.float32)
    surface = bricks.cast_rays(Rays(origin, np.asarray(rays.direction)))  # type: ignore[arg-type]
    return np.where(np.asarray(surface.alpha) > 0, np.asarray(surface.depth) / transform.side, 0).astype(np.float16)


def few_views(split: Split, count: int) -> PosedImages:
    """Some of the views, evenly spaced in their sequence, with depths."""
    images = split.images
    assert isinstance(images, PosedImages)
    views = np.arange(count) * len(images.cameras) // count
    cameras = jax.tree.map(np.asarray, images.cameras)[views]
    depth = np.concatenate([exact_depth(cameras[i], split.transform).ravel() for i in range(count)])
    return pose_images(cameras, [images.image(int(view)) for view in views]).replace(depth=depth)  # type: ignore[attr-defined]


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_integer("num_views", 6, "Views to train on.", 1, 100, flag_values=values)
    absl_flags.DEFINE_integer("steps", 800, "Training steps of the preset small.", 1, flag_values=values)
    absl_flags.DEFINE_integer("downscale", 2, "Of the images, of 200 x 200 pixels.", 1, flag_values=values)
    absl_flags.DEFINE_list("weights", ["0", "0.02"], "Values of train.depth_weight.", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    scene = replace(SCENES["bricks"], downscale=values.downscale)
    training, test = load_training(scene), load_evaluation(scene, "test", TEST_VIEWS)
    images = few_views(training, values.num_views)
    assert isinstance(test.images, PosedImages)
    truths = [exact_depth(test.images.cameras[view], test.transform) for view in range(TEST_VIEWS)]
    for weight in values.weights:
        budget = [f"train.max_steps={values.steps}", "train.max_seconds=0", f"train.depth_weight={weight}"]
        config = apply_overrides(replace(PRESETS["small"], scene=scene), budget)
        *_, progress = train(config, images)
        views = evaluate_views(progress.field, progress.state.occupancy, test, sampler=config.sampler)
        rows = []
        for (score, picture), truth in zip(views, truths, strict=True):
            opaque = (truth > 0) & (picture.opacity > 0.5)
            rows.append((score.psnr, score.ssim, np.mean(np.abs(picture.depth - truth)[opaque])))
        psnr, ssim, error = np.mean(rows, axis=0)
        print(
            f"depth_weight {weight}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, depth error {error:.4f} "
            f"({values.num_views} views, {progress.step} steps in {progress.seconds:.0f} s, {device_name()})",
            flush=True,
        )


if __name__ == "__main__":
    flags.run("experiments.depth", define_flags, main, __doc__ or "")
