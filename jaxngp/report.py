"""Report on a trained run in one HTML page: how it learned, how good it is, where it is worst, and what it is.

    python -m jaxngp.report --workdir=runs/bricks

The page needs no server and loads nothing. A radiance field is evaluated for it. Needs matplotlib: pip install
.[report].
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxngp import flags, runs
from jaxngp.config import ImageConfig, InputError, NerfConfig
from jaxngp.console import bar_interval
from jaxngp.data import load_evaluation
from jaxngp.evaluation import Evaluation, evaluate_views, prepare, summarise, training_summary
from jaxngp.pictures import Image8, read_picture
from jaxngp.records import read_log, write_text
from jaxngp.reporting import Shown, choose_views, page, write_tensorboard


def define_flags(values: flags.Flags) -> None:
    flags.define_workdir_flags(values)
    flags.define_evaluation_flags(values)
    flags.define_report_flags(values)


def main(values: flags.Flags) -> None:
    if not values.workdir:
        raise InputError("--workdir is missing: give the folder of a run")
    run = runs.load(values.workdir)
    if not (log := read_log(run.workdir / "metrics.jsonl")):
        raise InputError(f"{run.workdir / 'metrics.jsonl'}: no log of a training; give the --workdir of a run")
    training: dict[str, Any] = {**training_summary(run.progress), "finished": run.progress.finished}
    evaluation, shown, pictures = None, None, written_pictures(run.workdir)
    if isinstance(run.config, NerfConfig):
        evaluation, shown = evaluated(run, values)
        title, headline = f"{Path(run.config.scene.name).stem}: a radiance field", str(evaluation)
    else:
        what = "an image" if isinstance(run.config, ImageConfig) else "a signed distance"
        title, headline = f"{run.workdir.name}: {what}", f"{len(pictures)} pictures of the reconstruction"
        training |= written_numbers(run.workdir)
    text = page(
        title,
        config=run.config,
        log=log,
        environment=run.trained_on | {"reported with jax": jax.__version__},
        headline=headline,
        training=training,
        evaluation=evaluation,
        shown=shown,
        pictures=pictures,
    )
    path = Path(values.out or run.workdir / "report.html")
    write_text(path, text)
    print(f"{path}: {len(text) / 1e6:.1f} MB")
    if values.tensorboard:
        folder = run.workdir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        images = {view.score.name: np.concatenate(view.pictures, axis=1) for view in shown.sheet} if shown else pictures
        write_tensorboard(log, folder, images)
        print(f"{folder}: tensorboard --logdir={folder}")


def evaluated(run: runs.Run, values: flags.Flags) -> tuple[Evaluation, Shown]:
    """The scores of a split, and the views that are shown."""
    scene = run.config.scene
    if values.data_dir:
        scene = replace(scene, data_dir=os.path.realpath(values.data_dir))
    split = load_evaluation(scene, values.eval_split, values.eval_views)
    split = prepare(split, run.given_cameras, run.progress, fit=flags.fitted_parts(values))
    views = evaluate_views(run.field, run.occupancy, split, sampler=run.config.sampler, background=values.background)
    bar = tqdm(views, desc="evaluating", total=split.num_views, unit="view", mininterval=bar_interval())
    scores, shown = choose_views(bar, split.num_views)
    return summarise(scores, split, values.background), shown


def written_pictures(workdir: Path) -> dict[str, Image8]:
    """What `train_image` or `train_sdf` wrote, by file name."""
    found = (workdir / "pictures" / name for name in runs.PICTURES)
    return {path.name: read_picture(path) for path in found if path.suffix == ".png" and path.is_file()}


def written_numbers(workdir: Path) -> dict[str, Any]:
    """The single values of summary.json, if there is one."""
    path = workdir / "summary.json"
    plain = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: value for name, value in plain.items() if isinstance(value, int | float | str)}


if __name__ == "__main__":
    flags.run("jaxngp.report", define_flags, main, __doc__)
