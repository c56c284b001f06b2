"""Train every configuration on every scene: those of equal shapes together in one program, the others one by one.

    python -m experiments.sweep --scenes=lego,./desk --vary=optimizer.learning_rate=1e-2,2.5e-2 --max_steps=2000

--vary may be repeated; all combinations are trained. Each has a folder below --workdir that every other command opens,
and `jaxngp.runs.load_many` all of them at once. The same command goes on where it stopped, and what failed is tried
again. Prints one table, and writes it as sweep.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from tqdm import tqdm

from jaxngp import flags, runs
from jaxngp.config import InputError, NerfConfig, apply_overrides
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.device import default_placement, on_cpu
from jaxngp.evaluation import evaluate_views, summarise, write_summary
from jaxngp.presets import PRESET_HELP, PRESETS, SCENES, scene_config, suited
from jaxngp.records import table, write_json
from jaxngp.training.loop import Progress, train
from jaxngp.training.many import group_key, train_many

SECONDS_BETWEEN_RECORDS = 5.0
COLUMNS = ("run", "PSNR", "SSIM", "steps", "seconds", "together", "error")


@dataclass
class Job:
    """One configuration on one scene."""

    name: str
    workdir: Path
    config: NerfConfig
    data: Split
    error: str = ""
    together: int = 1  # scenes in its program


def define_flags(values: absl_flags.FlagValues) -> None:
    flags.define_preset(values, PRESET_HELP, gpu="base")
    flags.define_mesh_flag(values)
    absl_flags.DEFINE_list("scenes", ["bricks"], f"Of {', '.join(SCENES)}, and paths.", flag_values=values)
    flags.define_path(values, "workdir", "runs/sweep", "Folder of the runs.")
    text = "A field of the config and its values: path=value,value. May be repeated."
    absl_flags.DEFINE_multi_string("vary", [], text, flag_values=values)
    absl_flags.DEFINE_multi_string(
        "override", [], "A field of the config, of all runs: path=value.", flag_values=values
    )
    absl_flags.DEFINE_integer("max_steps", 2000, "Training steps of each.", 1, flag_values=values)
    absl_flags.DEFINE_integer("eval_views", 8, "Views to evaluate; 0 is all.", 0, flag_values=values)
    text = "Most scenes in one program; by default 8, or 1 on a single CPU device, where one after the other is faster."
    absl_flags.DEFINE_integer("at_once", None, text, 1, flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    workdir, rows = Path(values.workdir), {}
    jobs: list[Job] = []
    for name, scene, overrides in combinations(values.scenes, values.vary):
        if (before := finished(workdir / name, values.max_steps)) is not None:
            rows[name] = before
            continue
        try:
            jobs.append(make_job(name, scene, overrides, values))
        except (InputError, OSError) as error:
            rows[name] = {"run": name, "error": str(error)}
    alone = on_cpu() and default_placement().mesh is None
    for group in groups(jobs, values.at_once or (1 if alone else 8)):
        train_group(group)
        for job in group:
            rows[job.name] = report(job, values.eval_views)
        write_json(workdir / "sweep.json", list(rows.values()))
    ordered = [rows[name] for name in sorted(rows)]
    write_json(workdir / "sweep.json", ordered)
    print(table([{column: row.get(column, "") for column in COLUMNS} for row in ordered]))
    if failed := sum("error" in row and bool(row["error"]) for row in ordered):
        raise InputError(f"{failed} of {len(ordered)} runs failed; the same command tries them again")


def combinations(scenes: Sequence[str], vary: Sequence[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, scene and overrides of every run."""
    choices = []
    for text in vary:
        path, equals, listed = text.partition("=")
        if not equals or not listed:
            raise InputError(f"--vary={text}: expected path=value,value")
        choices.append([f"{path}={value}" for value in listed.split(",")])
    for scene, *overrides in itertools.product(scenes, *choices):
        short = [override.rpartition(".")[2].replace("=", "_") for override in overrides]
        yield re.sub(r"[^\w.+-]", "-", "_".join([Path(scene).name, *short])), scene, tuple(overrides)


def finished(workdir: Path, max_steps: int) -> dict[str, Any] | None:
    """The row of a run that is there, trained and evaluated."""
    path = workdir / "row.json"
    row = json.loads(path.read_text()) if path.exists() else {}
    return row if row.get("steps") == max_steps and not row.get("error") else None


def make_job(name: str, scene: str, overrides: Sequence[str], values: absl_flags.FlagValues) -> Job:
    """Read the scene, and settle the config as `jaxngp.train` does."""
    config = PRESETS[flags.chosen_preset(values, say=False)]
    data = load_training(scene_config(scene))
    config = suited(config, num_cascades=data.placement.num_cascades, has_alpha=data.has_alpha)
    loop = replace(config.train, max_steps=values.max_steps, max_seconds=0.0)
    config = replace(config, scene=scene_config(scene), train=loop)
    return Job(name, Path(values.workdir) / name, apply_overrides(config, [*values.override, *overrides]), data)


def groups(jobs: Sequence[Job], at_once: int) -> Iterator[list[Job]]:
    """The runs that can be trained together, at most so many at a time; the others alone."""
    alike: dict[Any, list[Job]] = {}
    for job in jobs:
        key = group_key(job.config, job.data.images)
        step = runs.latest_step(job.workdir)  # those that go on from one step
        alike.setdefault(id(job) if key is None else (key, step), []).append(job)
    for group in alike.values():
        for first in range(0, len(group), at_once):
            yield group[first : first + at_once]


def train_group(group: list[Job]) -> None:
    """Train and save all; one by one where together fails."""
    try:
        if len(group) == 1:
            train_alone(group[0])
        else:
            train_together(group)
    except Exception as error:
        if len(group) == 1:
            group[0].error = short(error)
            return
        print(f"{len(group)} scenes fail together ({short(error)}): now one after the other")
        for job in group:
            train_group([job])


def train_alone(job: Job) -> None:
    with runs.training_in(job.workdir, job.config, data=job.data) as run:
        if not run.finished:
            for progress in train(job.config, job.data.images, resume=run.resume):
                run.record(progress)
                if run.interrupted:
                    run.exit_if_interrupted()


def train_together(group: list[Job]) -> None:
    with contextlib.ExitStack() as stack:
        opened = [runs.training_in(job.workdir, job.config, data=job.data, quiet=True) for job in group]
        open_runs = [stack.enter_context(run) for run in opened]
        resume = [run.resume for run in open_runs if run.resume is not None]
        if resume and resume[0].finished:
            return
        for job in group:
            job.together = len(group)
        views: Any = [job.data.images for job in group]
        bar = stack.enter_context(tqdm(total=group[0].config.train.max_steps, desc=f"{len(group)} scenes", unit="step"))
        recorded = 0.0
        for progress in train_many([job.config for job in group], views, resume=resume):
            bar.update(progress.step - bar.n)
            stopped = any(run.asked_to_stop() for run in open_runs)
            if stopped or progress.finished or time.monotonic() - recorded > SECONDS_BETWEEN_RECORDS:
                for number, run in enumerate(open_runs):
                    if not progress.failed[number]:
                        run.record(progress.of(number))
                        run.save(progress.of(number)) if stopped else None
                recorded = time.monotonic()
            for run in open_runs:
                run.exit_if_interrupted()
        for number, job in enumerate(group):
            if progress.failed[number]:
                job.error = "no camera sees the scene's box, or loss or gradient are non-finite"


def report(job: Job, eval_views: int) -> dict[str, Any]:
    """Evaluate a run, and write its row."""
    row: dict[str, Any] = {"run": job.name, "together": job.together, "error": job.error}
    if not job.error:
        try:
            run = runs.load(job.workdir, NerfConfig)
            split = load_evaluation(job.config.scene, "auto", eval_views)
            views = evaluate_views(run.field, run.occupancy, split, sampler=job.config.sampler)
            result = summarise([score for score, _ in views], split, "white")
            write_summary(job.workdir, job.config.scene.name, result, run.progress, run.trained_on)
            progress: Progress = run.progress
            row |= {"PSNR": result.psnr, "SSIM": result.ssim, "steps": progress.step, "seconds": progress.seconds}
        except (InputError, OSError) as error:
            row["error"] = str(error)
    write_json(job.workdir / "row.json", row)
    return row


def short(error: BaseException) -> str:
    if not isinstance(error, InputError):
        traceback.print_exception(error)
    return str(error).partition("\n")[0][:200] or type(error).__name__


if __name__ == "__main__":
    flags.run("experiments.sweep", define_flags, main, __doc__ or "")
