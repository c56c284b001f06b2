"""Learn a scene from its images, then evaluate it and write novel views.

The same command goes on where an interrupted run stopped. A finished run is only evaluated again; --restart trains
it anew.
"""

from __future__ import annotations

import concurrent.futures
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxngp import flags
from jaxngp.config import InputError, NerfConfig, to_json, to_plain
from jaxngp.data import RayTable, Split, load_evaluation, load_training
from jaxngp.data.suspicions import suspicions
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.lock import sole_training
from jaxngp.training.loop import Progress, train
from jaxngp.training.progress import Doubts, ProgressBar, interruption, warn
from jaxngp.training.report import append_jsonl, keep_lines, write_json
from jaxngp.training.summary import evaluate_into, training_summary, write_summary


def main(values: flags.Flags) -> None:
    config = flags.train_config(values)
    training = load_training(config.scene)
    config = with_known_background(config, training)
    workdir = Path(values.workdir or f"runs/{Path(config.scene.name).resolve().stem}")
    # Evaluation views are read in the background, since reading images and compiling keep different cores busy.
    with concurrent.futures.ThreadPoolExecutor(1) as reader, sole_training(workdir):
        reading = reader.submit(evaluation_split, config, values, training)
        doubting = reader.submit(lambda: suspicions(training, reading.result()))
        if values.restart:
            reading.result()  # only when all input has been read: a typing error must not cost a run
            clear(workdir)
        flags.check_same_config(workdir, config)
        write_json(workdir / "config.json", to_plain(config))
        print(to_json(config), end="")
        progress, trained_on = fit(config, training, workdir, before_step_0=lambda: warn(*doubting.result()))
        evaluation = reading.result()
        print(f"trained for {progress.step} steps in {progress.seconds:.1f} s")
        if evaluation is None:
            return
        result = evaluate_into(workdir, progress.state, evaluation, config=config, background=values.background)
        print(write_summary(workdir, config.scene.name, result, training_summary(progress), trained_on))
        print(f"novel views: {workdir / 'novel_views'}   next: python -m jaxngp.render --workdir={workdir}")


def evaluation_split(config: NerfConfig, values: flags.Flags, training: Split) -> Split | None:
    """The views to evaluate on; None for a ray table of unknown image size, of which nothing can be shown."""
    try:
        return load_evaluation(config.scene, values.eval_split, values.eval_views)
    except InputError as error:
        if not isinstance(training.images, RayTable) or values.eval_split != "auto":
            raise
        print(f"no evaluation: {error}")
        return None


def with_known_background(config: NerfConfig, training: Split) -> NerfConfig:
    """White instead of random where no image has alpha: what lies behind the scene is then part of the pictures."""
    if training.has_alpha or config.train.background != "random":
        return config
    print("the images have no alpha: training before white instead of random backgrounds")
    return replace(config, train=replace(config.train, background="white"))


def clear(workdir: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "novel_views", "renders"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def fit(
    config: NerfConfig, training: Split, workdir: Path, *, before_step_0: Callable[[], object]
) -> tuple[Progress, dict[str, Any]]:
    """Train to the end of the budget, or until interrupted; save now and then, and at the end.

    before_step_0 is called when all is compiled, and may raise what ends the run. Returns where the run ended, and
    the environment it ran in.
    """
    log, saved, doubts = workdir / "metrics.jsonl", None, Doubts(config)
    with Checkpoints(workdir) as checkpoints, interruption() as interrupted, ProgressBar() as bar:
        resume = checkpoints.restore(config)
        keep_lines(log, lambda entry: resume is not None and entry["step"] <= resume.step)
        logged = resume.step if resume else 0
        for progress in train(config, training.images, resume=resume):
            if progress.metrics is None:
                before_step_0()
            bar.show(progress)
            if progress.metrics is not None:
                if progress.finished or interrupted() or progress.step >= logged + config.train.log_every:
                    append_jsonl(log, bar.log_entry(progress))
                    logged = progress.step
                warn(*doubts.about(progress))
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


if __name__ == "__main__":
    flags.run("jaxngp.train", flags.define_train_flags, main, __doc__)
