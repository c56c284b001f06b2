"""Evaluate a trained run again: another split, other views, another background.

Writes novel_views/ and summary.json of its workdir anew.
"""

from __future__ import annotations

from jaxngp import flags
from jaxngp.data import load_evaluation
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.summary import evaluate_into, training_summary, write_summary


def define_flags(values: flags.Flags) -> None:
    flags.define_workdir_flags(values)
    flags.define_evaluation_flags(values)


def main(values: flags.Flags) -> None:
    workdir, config = flags.trained_config(values)
    with Checkpoints(workdir) as checkpoints:
        progress, trained_on = checkpoints.restore_trained(config), checkpoints.environment()
    if not progress.finished:
        print(f"this run is unfinished: {progress.fraction:.0%} of its budget is spent")
    split = load_evaluation(config.scene, values.eval_split, values.eval_views)
    result = evaluate_into(workdir, progress.state, split, config=config, background=values.background)
    print(write_summary(workdir, config.scene.name, result, training_summary(progress), trained_on))


if __name__ == "__main__":
    flags.run("jaxngp.evaluate", define_flags, main, __doc__)
