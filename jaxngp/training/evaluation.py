"""Views of a trained scene beside the truth: how good they are, and what they look like."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import Rays, view_rays
from jaxngp.compositing import RenderOutput
from jaxngp.config import InputError, NerfConfig
from jaxngp.data import Split
from jaxngp.data.rays import RayTable
from jaxngp.fields import field_maker
from jaxngp.metrics import mean_squared_error, psnr, ssim
from jaxngp.rendering import default_batching, render_ray_grid
from jaxngp.training.report import contact_sheet, depth_image, error_image, to_uint8, write_png
from jaxngp.training.state import TrainState

EvalBackground = Literal["white", "black"]
_COLOURS = {"white": 1.0, "black": 0.0}  # sRGB, of all three channels


@dataclasses.dataclass(frozen=True)
class ViewScore:
    """How good the prediction of one view is."""

    name: str
    psnr: float  # dB
    ssim: float  # not a number for an image smaller than its window
    seconds: float  # to render it


@dataclasses.dataclass(frozen=True)
class ViewPicture:
    """One view: prediction and truth (H, W, 3) sRGB in [0, 1], depth and opacity (H, W)."""

    prediction: np.ndarray
    truth: np.ndarray
    depth: np.ndarray
    opacity: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The means over views, and all that a PSNR means nothing without."""

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

    def __str__(self) -> str:
        width, height = self.resolution
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f} ({self.split} split, {self.num_views} views of "
            f"{width}x{height}, {self.background} background, {self.colour_space})"
        )


def evaluate_views(
    state: TrainState, split: Split, *, config: NerfConfig, background: EvalBackground = "white"
) -> Iterator[tuple[ViewScore, ViewPicture]]:
    """Render every view of a split and compare; each is yielded, with its share of the time, as its batch is ready."""
    width, height = split.resolution
    if not split.views:
        raise InputError(f"the {split.name} rays have no image size, so there is no view to evaluate")
    if background == "black" and not split.has_alpha:
        raise InputError("a black background needs images with alpha: in these the background is part of the picture")
    # Several small views at once: rays that end late then hold up the lanes once, and not once a view.
    num_batches = -(-split.num_views // max(1, default_batching().rays // (width * height)))
    size = -(-split.num_views // num_batches)
    for first in range(0, split.num_views, size):
        # Every batch has one size, for one compiled program serves all; what fills up the last one is not yielded.
        index = np.minimum(np.arange(first, first + size), split.num_views - 1)
        rays, truths = zip(*(_view(split, i, _COLOURS[background]) for i in index), strict=True)
        together = jax.tree.map(lambda *a: jnp.stack(a), *rays)
        started = time.perf_counter()
        out = render_view(state, together, config=config, background=background)
        seconds = (time.perf_counter() - started) / size
        for name, truth, *view in zip(split.views[first:], truths, out.rgb, out.depth, out.opacity, strict=False):
            prediction = np.clip(np.asarray(view[0]), 0, 1)
            similarity = float(ssim(prediction, truth)) if min(width, height) >= 11 else float("nan")
            error = float(psnr(mean_squared_error(prediction, truth)))
            yield (
                ViewScore(name, error, similarity, seconds),
                ViewPicture(prediction, truth, *map(np.asarray, view[1:])),
            )


def render_view(
    state: TrainState, rays: Rays, *, config: NerfConfig, background: EvalBackground = "white"
) -> RenderOutput:
    """What a trained state shows along rays of any shape: `rendering.render_ray_grid` with all it needs."""
    return render_ray_grid(
        state.eval_params,
        rays,
        state.occupancy,
        jnp.full(3, _COLOURS[background]),
        make_field=field_maker(config.field),
        sampler=config.sampler,
    )


def summarise(scores: Sequence[ViewScore], split: Split, background: EvalBackground) -> Evaluation:
    """The means over the scores of `evaluate_views`."""
    # The first views share the time in which the program was compiled, if they are not all.
    later = [s.seconds for s in scores if s.seconds != scores[0].seconds]
    return Evaluation(
        psnr=float(np.mean([s.psnr for s in scores])),
        ssim=float(np.mean([s.ssim for s in scores])),
        split=split.name,
        background=background,
        colour_space="sRGB",
        num_views=len(scores),
        views=tuple(s.name for s in scores),
        view_psnr=tuple(s.psnr for s in scores),
        resolution=split.resolution,
        seconds_per_view=float(np.median(later or [scores[0].seconds])),
    )


def _view(split: Split, index: int, background: float) -> tuple[Rays, np.ndarray]:
    """Rays (H, W) of a view, and its true colours (H, W, 3) f32 over the background."""
    data = split.images
    if isinstance(data, RayTable):
        shape = (data.height, data.width, 3)
        rows = slice(index * data.height * data.width, (index + 1) * data.height * data.width)
        return jax.tree.map(lambda a: jnp.asarray(a[rows]).reshape(shape), data.rays), np.asarray(
            data.rgb[rows]
        ).reshape(shape)
    rgba = np.asarray(data.rgba[index], np.float32) / 255
    truth = rgba[..., :3] * rgba[..., 3:] + background * (1 - rgba[..., 3:])
    return jax.jit(view_rays)(data.camera, data.c2w[index]), truth


_SHEET_ROWS = 8


def write_pictures(pictures: Iterable[ViewPicture], folder: Path, *, num_views: int) -> None:
    """Write folder/img_{i}.png for each picture, and a contact sheet of some of them beside the truth.

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
            error = error_image(picture.prediction, picture.truth)
            rows.append([to_uint8(picture.truth), prediction, error, depth])
    sheet = contact_sheet(rows, ["ground truth", "prediction", "error x 4", "depth"])
    write_png(unfinished / "contact_sheet.png", sheet)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
