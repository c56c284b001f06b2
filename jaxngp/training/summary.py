"""summary.json: what a run is, what it cost and how good it is, in one file and one short table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxngp.config import NerfConfig
from jaxngp.data import Split
from jaxngp.training.evaluation import (
    EvalBackground,
    Evaluation,
    ViewPicture,
    ViewScore,
    evaluate_views,
    summarise,
    write_pictures,
)
from jaxngp.training.loop import Progress
from jaxngp.training.progress import bar_interval
from jaxngp.training.report import environment, table, write_json
from jaxngp.training.state import TrainState


def training_summary(progress: Progress) -> dict[str, Any]:
    """What training took."""
    return {
        "steps": progress.step,
        "train_seconds": progress.seconds,
        "compile_seconds": progress.compile_seconds,
        "samples_per_second": progress.num_samples / progress.seconds if progress.seconds else 0.0,
    }


def evaluate_into(
    workdir: Path, state: TrainState, split: Split, *, config: NerfConfig, background: EvalBackground
) -> Evaluation:
    """Evaluate a split and write its pictures into workdir/novel_views, with a progress bar."""
    scores: list[ViewScore] = []

    def pictures() -> Iterator[ViewPicture]:  # one at a time: a hundred of them may not fit the memory
        views = evaluate_views(state, split, config=config, background=background)
        bar = tqdm(views, desc="evaluating", total=split.num_views, unit="view", mininterval=bar_interval())
        for score, picture in bar:
            scores.append(score)
            yield picture

    write_pictures(pictures(), workdir / "novel_views", num_views=split.num_views)
    return summarise(scores, split, background)


def write_summary(
    workdir: Path, scene: str, evaluation: Evaluation, training: dict[str, Any], trained_on: dict[str, Any]
) -> str:
    """Write summary.json, and return it as a short table to print.

    `training` is of `training_summary` and `trained_on` of the checkpoint: its device and memory belong to training,
    wherever it is evaluated.
    """
    here = {"evaluated_on": environment()}
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
