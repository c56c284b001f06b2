"""Views of a trained scene beside the truth: how good they are, what they look like, and summary.json."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxngp.cameras import Cameras, PosedImages, Rays, view_rays
from jaxngp.config import InputError, NerfConfig
from jaxngp.console import bar_interval
from jaxngp.data import Split
from jaxngp.data.rays import RayTable
from jaxngp.device import default_batching
from jaxngp.metrics import mean_squared_error, psnr, ssim
from jaxngp.occupancy import OccupancyGrid
from jaxngp.pictures import contact_sheet, depth_image, error_image, hatched, to_uint8, write_png
from jaxngp.records import environment, table, write_json
from jaxngp.refinement import exposed, placed_cameras, refined_cameras
from jaxngp.registration import left_half, register_view
from jaxngp.rendering import Field, Sampler, render_ray_grid
from jaxngp.training.loop import Progress

EvalBackground = Literal["white", "black"]
COLOURS = {"white": 1.0, "black": 0.0}  # sRGB, of all three channels


@dataclasses.dataclass(frozen=True)
class ViewScore:
    """How good the prediction of one view is."""

    name: str
    psnr: float  # dB
    ssim: float  # not a number where no window of an image is whole: it is smaller, or masked
    seconds: float  # to render it


@dataclasses.dataclass(frozen=True)
class ViewPicture:
    """One view: prediction and truth (H, W, 3) sRGB in [0, 1], depth and opacity (H, W).

    keep (H, W) bool: the pixels that count; None where all do.
    """

    prediction: np.ndarray
    truth: np.ndarray
    depth: np.ndarray
    opacity: np.ndarray
    keep: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over views, with the context needed to interpret a PSNR."""

    psnr: float  # dB, mean of the views' PSNR
    ssim: float
    split: str
    background: str
    colour_space: str
    num_views: int
    views: tuple[str, ...]
    view_psnr: tuple[float, ...]
    resolution: tuple[int, int]  # width, height
    seconds_per_view: float  # median, compilation excluded
    cameras_from: str = ""  # where cameras and exposures come from, if not from the files alone

    def __str__(self) -> str:
        width, height = self.resolution
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f} ({self.split} split, {self.num_views} views of "
            f"{width}x{height}, {self.background} background, {self.colour_space})"
            + (f"; {self.cameras_from}" if self.cameras_from else "")
        )


def evaluate_views(
    field: Field,
    grid: OccupancyGrid | None,
    split: Split,
    *,
    sampler: Sampler,
    background: EvalBackground = "white",
) -> Iterator[tuple[ViewScore, ViewPicture]]:
    """Render every view of a split and compare; each is yielded, with its share of the time, as its batch is ready.

    Masked pixels count in neither PSNR nor SSIM.
    """
    if not split.views:
        raise InputError(f"the {split.name} rays have no image size, so there is no view to evaluate")
    if background == "black" and not split.has_alpha:
        raise InputError("a black background needs images with alpha: in these the background is part of the picture")
    colour = COLOURS[background]
    size = _views_at_once(split)
    for first in range(0, split.num_views, size):
        # Every batch has one size, so that one compiled program serves all; padding of the last batch is not yielded.
        index = np.minimum(np.arange(first, first + size), split.num_views - 1)
        rays, truths, masks = zip(*(_view(split, i, colour) for i in index), strict=True)
        together = jax.tree.map(lambda *a: jnp.stack(a), *rays)
        started = time.perf_counter()
        out = render_ray_grid(field, together, grid, jnp.full(3, colour, jnp.float32), sampler=sampler)
        seconds = (time.perf_counter() - started) / size
        rgb = out.rgb
        if split.log_gain is not None:
            rgb = exposed(rgb, out.opacity, np.full(3, colour, np.float32), split.log_gain[index][:, None, None])
        views = zip(split.views[first:], truths, masks, rgb, out.depth, out.opacity, strict=False)
        for name, truth, keep, rgb, depth, opacity in views:
            prediction = np.clip(np.asarray(rgb), 0, 1)
            similarity = float(ssim(prediction, truth, keep)) if min(truth.shape[:2]) >= 11 else float("nan")
            error = float(psnr(mean_squared_error(prediction, truth, keep)))
            yield (
                ViewScore(name, error, similarity, seconds),
                ViewPicture(prediction, truth, np.asarray(depth), np.asarray(opacity), keep),
            )


def prepare(split: Split, given: Cameras | None, progress: Progress, *, fit: Sequence[str] = ()) -> Split:
    """A split as it is fair to evaluate a run on whose training cameras were `given`, and perhaps refined.

    Where cameras were refined, see `refinement.placed_cameras`. fit: "pose", "exposure" or both are found for each view
    on the left half of its image; then only the right half is scored. `cameras_from` says what was done.
    """
    config, learned, images = progress.config, progress.state.refinement, split.images
    assert isinstance(config, NerfConfig)
    if not isinstance(images, PosedImages):
        if fit:
            raise InputError("--fit_views moves cameras, and a table of rays has none")
        return split
    if learned is not None and config.refine.cameras and given is not None:
        refined = refined_cameras(given, learned, refine=config.refine)
        images = images.replace(cameras=placed_cameras(images.cameras, given, refined))  # type: ignore[attr-defined]
        said = "refined cameras" if split.name == "train" else "given poses, aligned with the refined training cameras"
        split = dataclasses.replace(split, images=images, cameras_from=said)
    return _fitted(split, progress, fit) if fit else split


def _fitted(split: Split, progress: Progress, fit: Sequence[str]) -> Split:
    """The split with pose or exposure of each view found on its left half, which is then masked."""
    images, config = split.images, progress.config
    assert isinstance(images, PosedImages)
    found, keeps = [], []
    views = tqdm(range(split.num_views), desc="fitting", unit="view", mininterval=bar_interval())
    for view in views:
        image, mask = images.image(view), images.mask(view)
        mask = np.ones(image.shape[:2], bool) if mask is None else mask
        half = left_half(*image.shape[:2])
        if not (mask & half).any():
            raise InputError(f"--fit_views: the left half of {split.views[view]} is masked; leave out that view")
        found.append(
            register_view(
                progress.field,
                progress.state.occupancy,
                images.cameras[view],
                image,
                mask & half,
                sampler=config.sampler,  # type: ignore[union-attr]
                pose="pose" in fit,
                exposure="exposure" in fit,
            )
        )
        keeps.append((mask & ~half).ravel())
    cameras = images.cameras.replace(c2w=np.stack([np.asarray(f.camera.c2w) for f in found]))  # type: ignore[attr-defined]
    said = f"{' and '.join(fit)} of each view fitted on its left half, scored on its right half"
    return dataclasses.replace(
        split,
        images=images.replace(cameras=cameras, keep=np.concatenate(keeps)),  # type: ignore[attr-defined]
        log_gain=np.stack([f.log_gain for f in found]).astype(np.float32) if "exposure" in fit else None,
        cameras_from="; ".join(filter(None, [split.cameras_from, said])),
    )


def _views_at_once(split: Split) -> int:
    """Several small views of one size: rays that end late then hold up the lanes once, and not once a view."""
    if isinstance(split.images, PosedImages) and len(np.unique(np.asarray(split.images.cameras.size), axis=0)) > 1:
        return 1
    width, height = split.resolution
    num_batches = -(-split.num_views // max(1, default_batching().rays // (width * height)))
    return -(-split.num_views // num_batches)


def summarise(scores: Sequence[ViewScore], split: Split, background: EvalBackground) -> Evaluation:
    """The means over the scores of `evaluate_views`; that of SSIM over the views that have one."""
    # The first views share the time in which the program was compiled, if they are not all.
    later = [s.seconds for s in scores if s.seconds != scores[0].seconds]
    similarities = [s.ssim for s in scores if not np.isnan(s.ssim)]
    return Evaluation(
        psnr=float(np.mean([s.psnr for s in scores])),
        ssim=float(np.mean(similarities or [np.nan])),
        split=split.name,
        background=background,
        colour_space="sRGB",
        num_views=len(scores),
        views=tuple(s.name for s in scores),
        view_psnr=tuple(s.psnr for s in scores),
        resolution=split.resolution,
        seconds_per_view=float(np.median(later or [scores[0].seconds])),
        cameras_from=split.cameras_from,
    )


def _view(split: Split, index: int, background: float) -> tuple[Rays, np.ndarray, np.ndarray | None]:
    """Rays (H, W) of a view, its true colours (H, W, 3) f32 over the background, and which of its pixels count."""
    data = split.images
    if isinstance(data, RayTable):
        shape = (data.height, data.width, 3)
        rows = slice(index * data.height * data.width, (index + 1) * data.height * data.width)
        rays = jax.tree.map(lambda a: jnp.asarray(a).reshape(shape), data.rays[rows])
        return rays, np.asarray(data.rgb[rows]).reshape(shape), None
    rgba = data.image(index).astype(np.float32) / 255
    truth = rgba[..., :3] * rgba[..., 3:] + background * (1 - rgba[..., 3:])
    return view_rays(data.cameras[index]), truth, data.mask(index)


_SHEET_ROWS = 8


def write_pictures(pictures: Iterable[ViewPicture], folder: Path, *, num_views: int) -> None:
    """Write folder/img_{i}.png for each picture, and a contact sheet of some of them beside the truth.

    Masked pixels are hatched in truth and error, and shown as predicted.
    They replace what the folder held, all at once when the last is written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    on_sheet = set(np.linspace(0, num_views - 1, _SHEET_ROWS).round().astype(int).tolist())
    rows = []
    for index, picture in enumerate(pictures):
        prediction = to_uint8(picture.prediction)
        write_png(unfinished / f"img_{index}.png", prediction)
        if index in on_sheet:
            depth = depth_image(picture.depth, picture.opacity)
            truth, error = to_uint8(picture.truth), error_image(picture.prediction, picture.truth)
            if picture.keep is not None:
                truth, error = hatched(truth, picture.keep), hatched(error, picture.keep)
            rows.append([truth, prediction, error, depth])
    sheet = contact_sheet(rows, ["ground truth", "prediction", "error x 4", "depth"])
    write_png(unfinished / "contact_sheet.png", sheet)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


# summary.json: what a run is, what it cost and how good it is, in one file and one short table.


def training_summary(progress: Progress) -> dict[str, Any]:
    """What training took."""
    return {
        "steps": progress.step,
        "train_seconds": progress.seconds,
        "compile_seconds": progress.compile_seconds,
        "samples_per_second": progress.num_samples / progress.seconds if progress.seconds else 0.0,
    }


def evaluate_into(
    workdir: Path,
    field: Field,
    grid: OccupancyGrid | None,
    split: Split,
    *,
    sampler: Sampler,
    background: EvalBackground,
) -> Evaluation:
    """Evaluate a split and write its pictures into workdir/novel_views, with a progress bar."""
    scores: list[ViewScore] = []

    def pictures() -> Iterator[ViewPicture]:  # one at a time: a hundred of them may not fit the memory
        views = evaluate_views(field, grid, split, sampler=sampler, background=background)
        bar = tqdm(views, desc="evaluating", total=split.num_views, unit="view", mininterval=bar_interval())
        for score, picture in bar:
            scores.append(score)
            yield picture

    write_pictures(pictures(), workdir / "novel_views", num_views=split.num_views)
    return summarise(scores, split, background)


def write_summary(
    workdir: Path, scene: str, evaluation: Evaluation, progress: Progress, trained_on: dict[str, Any]
) -> str:
    """Write summary.json, and return it as a short table to print.

    `trained_on` is the environment in the checkpoint: its device and memory belong to training, wherever the run is
    evaluated.
    """
    training, here = training_summary(progress), {"evaluated_on": environment()}
    summary = {"scene": scene, **dataclasses.asdict(evaluation), **training, **trained_on, **here}
    write_json(workdir / "summary.json", summary)
    row = {
        "scene": scene,
        "PSNR": evaluation.psnr,
        "SSIM": evaluation.ssim,
        "steps": training["steps"],
        "train s": round(training["train_seconds"], 1),
        "compile s": round(training["compile_seconds"], 1),
        "Msamples/s": training["samples_per_second"] / 1e6,
        "s/view": evaluation.seconds_per_view,
        "device": summary["device"],
    }
    return f"{table([row])}\n{evaluation}"
