"""How well cameras calibrate themselves: the built-in scene, whose cameras are exact, with errors put into them.

    python -m experiments.refinement [--cases=poses,focal,...] [--steps=2000] [--image_size=200] [--seed=0]

Each case trains with errors in what it is given and prints what is left of them after the gauge is taken out, beside
its target; PSNR is of test views, whose exact poses are moved into the gauge of the refined cameras. `true` trains on
exact cameras without refinement, and is what the others are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from jaxngp import flags, registration
from jaxngp.cameras import Cameras, PosedImages, image_size, project, unproject
from jaxngp.config import InputError, NerfConfig, apply_overrides
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.evaluation import evaluate_views
from jaxngp.lenses import COEFFICIENTS, make_lens
from jaxngp.presets import PRESETS, SCENES
from jaxngp.records import device_name, table
from jaxngp.refinement import (
    align,
    decode_srgb,
    encode_srgb,
    log_gain,
    moved,
    placed_cameras,
    pose_errors,
    refined_cameras,
)
from jaxngp.training.loop import Progress, train

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Errors that are put into the training views, and what is refined."""

    refine: tuple[str, ...]
    spoil: Callable[[PosedImages, np.random.Generator], PosedImages]
    target: str


# Errors.


def exact(images: PosedImages, _: np.random.Generator) -> PosedImages:
    return images


def poses_off(images: PosedImages, rng: np.random.Generator) -> PosedImages:
    """Every pose turned by 1.5 degrees and moved by 2 % of the box, in any direction."""
    count = len(images.cameras)
    away = rng.normal(size=(2, count, 3))
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    twists = jnp.asarray(np.concatenate([0.02 * away[0], np.radians(1.5) * away[1]], axis=1), jnp.float32)
    c2w = np.asarray(moved(jnp.asarray(images.cameras.c2w), twists))
    return images.replace(cameras=images.cameras.replace(c2w=c2w))  # type: ignore[attr-defined]


def focal_off(images: PosedImages, _: np.random.Generator) -> PosedImages:
    """A focal length that is 3 % too long."""
    focal = np.asarray(images.cameras.focal_xy) * np.float32(1.03)
    return images.replace(cameras=images.cameras.replace(focal_xy=focal))  # type: ignore[attr-defined]


K1 = -0.1


def lens_off(images: PosedImages, _: np.random.Generator) -> PosedImages:
    """Pictures of a lens with k1 = -0.1, said to be of a pinhole: each pixel shows what the lens shows there."""
    shown = [bent(images.image(view), images.cameras[view]) for view in range(len(images.cameras))]
    return images.replace(rgba=np.concatenate(shown).reshape(-1, 4))  # type: ignore[attr-defined]


def bent(image: np.ndarray, camera: Cameras) -> np.ndarray:
    """What a camera with that lens sees of a picture (H, W, 4) u8 of a pinhole, interpolated linearly."""
    width, height = image_size(camera)
    shape = {"focal_xy": camera.focal_xy, "centre_xy": camera.centre_xy, "size": camera.size}
    coefficients = np.zeros((1, len(COEFFICIENTS["perspective"])))
    coefficients[0, 0] = K1
    lens, _ = make_lens("perspective", coefficients, **{name: np.asarray(a)[None] for name, a in shape.items()})
    own = camera.replace(c2w=np.eye(3, 4, dtype=np.float32), lens=jax.tree.map(lambda a: a[0], lens))  # type: ignore[attr-defined]
    y, x = np.indices((height, width)) + 0.5
    spread = lambda a: np.broadcast_to(np.asarray(a), (height, width, *np.shape(a)))  # noqa: E731
    rays = unproject(jax.tree.map(spread, own), jnp.asarray(np.stack([x, y], axis=-1), jnp.float32))
    place, _ = project(jax.tree.map(spread, own.replace(lens=None)), rays.direction)
    premultiplied = image.astype(np.float64)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    found = interpolated(premultiplied, np.asarray(place, np.float64) - 0.5)
    found[..., :3] *= 255 / np.maximum(found[..., 3:], 1e-6)
    return np.round(np.clip(found, 0, 255)).astype(np.uint8)


def interpolated(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Values (H, W, C) of an image at places (H, W, 2) between the centres of its pixels; 0 outside."""
    padded = np.pad(image, ((1, 2), (1, 2), (0, 0)))
    x, y = (np.clip(place[..., axis] + 1, 0, image.shape[1 - axis] + 0.999) for axis in range(2))
    column, row = x.astype(int), y.astype(int)
    u, v = (x - column)[..., None], (y - row)[..., None]
    upper = padded[row, column] * (1 - u) + padded[row, column + 1] * u
    lower = padded[row + 1, column] * (1 - u) + padded[row + 1, column + 1] * u
    return np.asarray(upper * (1 - v) + lower * v)


def stops(count: int, rng: np.random.Generator) -> np.ndarray:
    """(V,) exposures within half a stop, of mean 0."""
    found = rng.uniform(-0.5, 0.5, count)
    return found - found.mean()


def exposures_off(images: PosedImages, rng: np.random.Generator) -> PosedImages:
    """Every picture up to half a stop lighter or darker, in linear light; what is brighter than white is white."""
    gain = 2 ** stops(len(images.cameras), rng)
    width, height = images.max_size
    gain = np.repeat(gain, width * height)[:, None]
    rgb = np.asarray(encode_srgb(decode_srgb(jnp.asarray(images.rgba[:, :3], jnp.float32) / 255) * gain))
    rgba = np.concatenate([np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8), images.rgba[:, 3:]], axis=1)
    return images.replace(rgba=rgba)  # type: ignore[attr-defined]


CASES = {
    "true": Case((), exact, ""),
    "poses": Case(("poses",), poses_off, "< 0.1 deg, < 0.2 %, PSNR -0.3 dB"),
    "unrefined": Case((), poses_off, "what poses costs without refinement"),
    "focal": Case(("focal",), focal_off, "< 0.1 %"),
    "lens": Case(("lens",), lens_off, "k1 to 5 %"),
    "exposure": Case(("exposure",), exposures_off, "< 0.05 stop, PSNR -0.3 dB"),
    "idle": Case(("poses", "focal", "lens", "exposure"), exact, "PSNR -0.05 dB"),
    "idle_poses": Case(("poses",), exact, "PSNR -0.05 dB"),
}


# Measuring.


def run_case(name: str, training: Split, test: Split, config: NerfConfig, seed: int) -> Row:
    """Train a case and measure what is left of its errors."""
    case, rng = CASES[name], np.random.default_rng(seed)
    config = apply_overrides(config, [f"refine.{part}=true" for part in case.refine])
    true = training.images
    assert isinstance(true, PosedImages)
    assert isinstance(test.images, PosedImages)
    images = case.spoil(true, rng)
    for progress in train(config, images):  # noqa: B007 - the last one counts
        pass
    row: Row = {"case": name, **errors(name, progress, images, true, seed)}
    refined, cameras = cameras_of(progress, images), test.images.cameras
    if case.refine:
        cameras = placed_cameras(cameras, true.cameras, refined)
    placed = replace(test, images=test.images.replace(cameras=cameras))  # type: ignore[attr-defined]
    if name == "lens":  # test pictures are of a pinhole
        placed = replace(test, images=test.images.replace(cameras=cameras.replace(lens=None)))  # type: ignore[attr-defined]
    scores = evaluate_views(progress.field, progress.state.occupancy, placed, sampler=config.sampler)
    row["PSNR"] = float(np.mean([score.psnr for score, _ in scores]))
    return row | {"steps": progress.step, "seconds": round(progress.seconds), "target": case.target}


def cameras_of(progress: Progress, images: PosedImages) -> Cameras:
    """The training cameras as a run leaves them."""
    learned, config = progress.state.refinement, progress.config
    assert isinstance(config, NerfConfig)
    return images.cameras if learned is None else refined_cameras(images.cameras, learned, refine=config.refine)


def errors(name: str, progress: Progress, images: PosedImages, true: PosedImages, seed: int) -> Row:
    """What is left of the errors that were put in."""
    learned, refined = progress.state.refinement, cameras_of(progress, images)
    gauge = align(refined.c2w, true.cameras.c2w)
    degrees, distance = pose_errors(gauge.poses(refined.c2w), true.cameras.c2w)
    row: Row = {"degrees": degrees.mean(), "worst": degrees.max(), "moved %": 100 * distance.mean()}
    row["focal %"] = 100 * (np.asarray(refined.focal_xy)[0, 0] / np.asarray(true.cameras.focal_xy)[0, 0] - 1)
    row["k1"] = 0.0 if refined.lens is None else float(np.asarray(refined.lens.coefficients)[0, 0])
    row["k2"] = 0.0 if refined.lens is None else float(np.asarray(refined.lens.coefficients)[0, 1])
    row["stops"] = 0.0
    if learned is not None and learned.free.log_gain is not None:
        found = np.asarray(log_gain(learned)) / np.log(2)
        put_in = stops(len(found), np.random.default_rng(seed)) if name == "exposure" else np.zeros(len(found))
        row["stops"] = float(np.sqrt(np.mean((found - put_in[:, None]) ** 2)))
    return row


def localise_views(progress: Progress, test: Split, count: int, seed: int) -> Row:
    """Test views looked for from 10 degrees and 10 % of the box away."""
    images, rng = test.images, np.random.default_rng(seed)
    assert isinstance(images, PosedImages)
    rows = []
    for view in range(min(count, test.num_views)):
        away = rng.normal(size=(2, 3))
        away /= np.linalg.norm(away, axis=-1, keepdims=True)
        twist = jnp.asarray(np.concatenate([0.1 * away[0], np.radians(10) * away[1]]), jnp.float32)
        camera = images.cameras[view]
        guess = camera.replace(c2w=np.asarray(moved(jnp.asarray(camera.c2w), twist)))  # type: ignore[attr-defined]
        started, worked = time.perf_counter(), time.process_time()
        found = registration.localise(Trained(progress), images.image(view), guess, seed=view)
        seconds = time.perf_counter() - started
        degrees, distance = pose_errors(np.asarray(found.camera.c2w)[None], np.asarray(camera.c2w)[None])
        rows.append((degrees[0], distance[0], found.rotation_error, seconds))
        worked = time.process_time() - worked  # of all cores, whatever else the machine does
        said = f"{degrees[0]:.3f} deg, said {found.rotation_error:.3f}, {seconds:.1f} s, {worked:.1f} s of CPU"
        print(f"view {view}: {said}", flush=True)
    degrees, distance, said, seconds = np.array(rows).T
    within = np.mean(degrees < 0.3)
    return {
        "case": "localise", "within 0.3 deg": f"{within:.0%}", "median deg": float(np.median(degrees)),
        "median %": float(np.median(distance) * 100), "error / said": float(np.median(degrees / said)),
        "median s": float(np.median(seconds)), "max s": float(np.max(seconds)), "target": ">= 90 % of 40, <= 20 s",
    }  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What `registration.localise` reads of a run."""

    progress: Progress

    @property
    def field(self) -> Any:
        return self.progress.field

    @property
    def occupancy(self) -> Any:
        return self.progress.state.occupancy

    @property
    def config(self) -> Any:
        return self.progress.config


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_list("cases", [*CASES, "localise"], "Which cases.", flag_values=values)
    absl_flags.DEFINE_integer("steps", 2000, "Training steps of the preset small.", 1, flag_values=values)
    absl_flags.DEFINE_integer("image_size", 200, "Pixels per side.", 16, flag_values=values)
    absl_flags.DEFINE_integer("views", 40, "Test views.", 1, 40, flag_values=values)
    absl_flags.DEFINE_integer("seed", 0, "Of the errors, and of training.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "Of the config.", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    if unknown := [name for name in values.cases if name not in (*CASES, "localise")]:
        raise InputError(f"--cases: {unknown[0]!r} is none of {', '.join(CASES)}, localise")
    scene = replace(SCENES["bricks"], image_size=values.image_size)
    config = replace(PRESETS["small"], scene=scene)
    budget = [f"train.max_steps={values.steps}", "train.max_seconds=0", f"train.seed={values.seed}"]
    config = apply_overrides(config, [*budget, *values.override])
    training, test = load_training(scene), load_evaluation(scene, "test", values.views)
    rows: list[Row] = []
    for name in values.cases:
        if name == "localise":
            assert isinstance(training.images, PosedImages)
            for progress in train(config, training.images):  # noqa: B007
                pass
            print(table([localise_views(progress, test, values.views, values.seed)]), flush=True)
            continue
        rows.append(run_case(name, training, test, config, values.seed))
        print(table([rows[-1]]), flush=True)
    if len(rows) > 1:
        print(f"\n{table(rows)}\n{device_name()}")


if __name__ == "__main__":
    flags.run("experiments.refinement", define_flags, main, __doc__ or "")
