"""A training run in its folder: resumed where it stopped, logged, saved now and then, and ended in good order."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxngp.config import RunConfig
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.loop import Progress, train
from jaxngp.training.programs import Data
from jaxngp.training.progress import ProgressBar, TrainingWarnings, interruption, warn
from jaxngp.training.report import append_jsonl, keep_lines

PICTURES = ("comparison.png", "reconstruction.png", "sheet.png", "surface.png", "surface.ply", "surface.obj")
"""What `jaxngp.train_image` and `jaxngp.train_sdf` write into workdir/pictures."""


def remove_pictures(workdir: Path) -> None:
    """Remove PICTURES, and their folder where nothing else is in it: by such a name a user may have one of his own."""
    folder = workdir / "pictures"
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def clear(workdir: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    remove_pictures(workdir)
    for name in ("config.json", "metrics.jsonl", "curve.jsonl", "summary.json"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "novel_views", "renders"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def fit(
    config: RunConfig,
    load: Callable[[], Data],
    workdir: Path,
    *,
    before_step_0: Callable[[], object] = lambda: None,
    at_each: Callable[[Progress], object] = lambda _: None,
) -> tuple[Progress, dict[str, Any]]:
    """Train to the end of the budget, or until interrupted; save now and then, and at the end.

    load gives the data, and is not asked for it where the run is finished. before_step_0 is called when all is
    compiled, and may raise what ends the run. at_each is called with where the run stands, once before the first step
    and then whenever there is news; its time does not count. Returns where the run ended, and the environment it ran
    in.
    """
    log, saved, doubts = workdir / "metrics.jsonl", None, TrainingWarnings(config)
    with Checkpoints(workdir) as checkpoints, interruption() as interrupted, ProgressBar() as bar:
        resume = checkpoints.restore(config)
        keep_lines(log, lambda entry: resume is not None and entry["step"] <= resume.step)
        logged = resume.step if resume else 0
        finished = iter([resume]) if resume and resume.finished else None
        for progress in finished or train(config, load(), resume=resume):
            if progress.metrics is None:
                before_step_0()
            bar.show(progress)
            if progress.metrics is not None:
                if progress.finished or interrupted() or progress.step >= logged + config.train.log_every:
                    append_jsonl(log, bar.log_entry(progress))
                    logged = progress.step
                warn(*doubts.about(progress))
            at_each(progress)
            saved = saved or time.monotonic()  # compiling does not count
            if interrupted() or progress.finished:
                checkpoints.save(progress)
            elif time.monotonic() - saved > config.train.checkpoint_seconds:
                checkpoints.try_to_save(progress)
                saved = time.monotonic()
            if interrupted():
                break
        trained_on = checkpoints.environment()
    interrupted.exit_if_set()
    return progress, trained_on
