"""Learn a scene from its images, then evaluate it and write novel views.

The same command goes on where an interrupted run stopped. A finished run is only evaluated again; --restart trains
it anew.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from jaxngp import flags
from jaxngp.config import NerfConfig, to_json, to_plain
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.loop import Progress, train
from jaxngp.training.progress import ProgressBar, interruption
from jaxngp.training.report import append_jsonl, write_json
from jaxngp.training.summary import evaluate_into, training_summary, write_summary


def main(values: flags.Flags) -> None:
    config = flags.train_config(values)
    workdir = Path(values.workdir or f"runs/{Path(config.scene.name).stem}")
    if values.restart:
        clear(workdir)
    flags.check_same_config(workdir, config)
    training = load_training(config.scene)
    evaluation = load_evaluation(config.scene, values.eval_split, values.eval_views)
    write_json(workdir / "config.json", to_plain(config))
    print(to_json(config), end="")
    progress = fit(config, training, workdir)
    print(f"trained for {progress.step} steps in {progress.seconds:.1f} s")
    result = evaluate_into(workdir, progress.state, evaluation, config=config, background=values.background)
    print(write_summary(workdir, config.scene.name, result, training_summary(progress)))
    print(f"novel views: {workdir / 'novel_views'}   next: python -m jaxngp.render --workdir={workdir}")


def clear(workdir: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "novel_views", "renders"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def fit(config: NerfConfig, training: Split, workdir: Path) -> Progress:
    """Train to the end of the budget, or until interrupted; save now and then, and at the end."""
    with Checkpoints(workdir) as checkpoints, interruption() as interrupted, ProgressBar() as bar:
        saved = None
        for progress in train(config, training.images, resume=checkpoints.restore(config)):
            bar.show(progress)
            if progress.metrics is not None:
                append_jsonl(workdir / "metrics.jsonl", bar.log_entry(progress))
            saved = saved or time.monotonic()  # compiling does not count
            if interrupted() or progress.finished or time.monotonic() - saved > config.train.checkpoint_seconds:
                checkpoints.save(progress)
                saved = time.monotonic()
            if interrupted():
                break
    interrupted.exit_if_set()
    return progress


if __name__ == "__main__":
    flags.run("jaxngp.train", flags.define_train_flags, main, __doc__)
