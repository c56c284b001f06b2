"""Evaluate a trained run again: another split, other views, another background.

Writes novel_views/ and summary.json of its workdir anew.
"""

from __future__ import annotations

from jaxngp import flags
from jaxngp.data import load_evaluation
from jaxngp.evaluation import evaluate_into, prepare, write_summary


def define_flags(values: flags.Flags) -> None:
    flags.define_workdir_flags(values)
    flags.define_evaluation_flags(values)
    flags.define_mesh_flag(values)


def main(values: flags.Flags) -> None:
    run, config = flags.trained_nerf(values)
    if not run.progress.finished:
        print(f"this run is unfinished: {run.progress.fraction:.0%} of its budget is spent")
    split = load_evaluation(config.scene, values.eval_split, values.eval_views)
    split = prepare(split, run.given_cameras, run.progress, fit=flags.fitted_parts(values))
    result = evaluate_into(
        run.workdir, run.field, run.occupancy, split, sampler=config.sampler, background=values.background
    )
    print(write_summary(run.workdir, config.scene.name, result, run.progress, run.trained_on))


if __name__ == "__main__":
    flags.run("jaxngp.evaluate", define_flags, main, __doc__)
