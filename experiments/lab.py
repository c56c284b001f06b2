"""Is a change better, or is that noise? Variants of a config, trained on scenes with paired seeds, and compared.

    python -m experiments.lab --variant=smooth:field.encoding.smoothstep=true --scenes=bricks,lego --seconds=20
    python -m experiments.lab --variant=wide:field.hidden_width=64 --variant=wider:field.hidden_width=128 --steps=1000

A variant is a name, and overrides separated by commas; `base` is the preset without any. All variants of a scene and a
seed are trained one after another, in an order that changes, so that what else the machine does hits all alike, and
with the same random numbers. Each variant has a process of its own, which compiles once and whose peak memory is the
variant's. Results are appended to a file as they come: the same command goes on where an interrupted one stopped, and
with more seeds adds those.

Prints a Markdown table: mean difference from `base` over pairs of scene and seed, its 95 % interval, and p, by
Student's t for pairs. Writes it as JSON, and as a picture where matplotlib is installed.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from scipy import stats
from tqdm import tqdm

from jaxngp import flags
from jaxngp.config import InputError, NerfConfig, apply_overrides, from_json, to_json
from jaxngp.console import bar_interval
from jaxngp.data import read_views
from jaxngp.presets import PRESETS, scene_config, suited
from jaxngp.records import append_jsonl, environment, peak_memory_bytes, write_json

BASE = "base"


@dataclass(frozen=True)
class Variant:
    """A change to be judged."""

    name: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """name:path=value,path=value. Raises InputError."""
        name, colon, overrides = text.partition(":")
        if not name or not colon or not overrides or name == BASE:
            raise InputError(f"--variant={text}: expected name:path=value,path=value, and a name other than {BASE}")
        return cls(name, tuple(overrides.split(",")))


@dataclass(frozen=True)
class Task:
    """One training."""

    variant: str
    scene: str
    seed: int
    config: str  # JSON, the whole of what is trained
    views: int  # that are evaluated


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    variant: str
    scene: str
    seed: int
    config: str
    psnr: float  # dB, mean over views
    steps: int
    seconds: float  # of training, without compilation
    peak_memory_bytes: int

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / max(self.steps, 1)


def plan(
    variants: Sequence[Variant], scenes: Sequence[tuple[str, NerfConfig]], seeds: int, views: int
) -> Iterator[Task]:
    """All trainings: seeds, of each all scenes, and there all variants, beginning with another one each time."""
    for turn, (seed, (name, config)) in enumerate(itertools.product(range(seeds), scenes)):
        first = turn % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            changed = apply_overrides(config, [*variant.overrides, f"train.seed={seed}"])
            yield Task(variant.name, name, seed, to_json(changed), views)


# A training, in the process of its variant.


def run_task(task: Task) -> Outcome:
    """Train and evaluate."""
    from jaxngp.data import load_evaluation, load_training
    from jaxngp.evaluation import evaluate_views
    from jaxngp.training.loop import train

    config = from_json(task.config, NerfConfig)
    views = load_training(config.scene)
    for progress in train(config, views.images):  # noqa: B007 - the last one counts
        pass
    split = load_evaluation(config.scene, "auto", task.views)
    scores = [
        score.psnr
        for score, _ in evaluate_views(progress.field, progress.state.occupancy, split, sampler=config.sampler)
    ]
    return Outcome(
        task.variant,
        task.scene,
        task.seed,
        task.config,
        float(np.mean(scores)),
        progress.step,
        progress.seconds,
        peak_memory_bytes(),
    )


def run_all(tasks: Sequence[Task], log: Path) -> list[Outcome]:
    """The outcomes of all tasks: those that the log has, and the others, which are appended to it as they come."""
    known = {(o.variant, o.config): o for o in read_outcomes(log)}
    missing = [task for task in tasks if (task.variant, task.config) not in known]
    context = multiprocessing.get_context("spawn")  # jax has threads, which a fork would not survive
    pools: dict[str, concurrent.futures.ProcessPoolExecutor] = {}
    try:
        for task in tqdm(missing, desc="training", unit="run", mininterval=bar_interval()):
            if task.variant not in pools:
                pools[task.variant] = concurrent.futures.ProcessPoolExecutor(1, context)
            outcome = pools[task.variant].submit(run_task, task).result()
            append_jsonl(log, asdict(outcome))
            known[task.variant, task.config] = outcome
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
    return [known[task.variant, task.config] for task in tasks]


def read_outcomes(log: Path) -> list[Outcome]:
    """What a log holds; lines that are not whole are left out."""
    outcomes = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return outcomes


# What they say.


@dataclass(frozen=True)
class Comparison:
    """A variant beside `base`, over n pairs of scene and seed."""

    variant: str
    psnr: float  # mean, dB
    gain: float  # mean difference, dB
    low: float  # of its 95 % interval
    high: float
    p: float  # of no difference, two-sided
    pairs: int
    step_ms: float  # median
    peak_memory_bytes: int

    def row(self) -> str:
        gain = "" if self.variant == BASE else f"{self.gain:+.3f} ({self.low:+.3f} to {self.high:+.3f})"
        p = "" if self.variant == BASE else f"{self.p:.2g}"
        memory = f"{self.peak_memory_bytes / 1e9:.2f}"
        return f"| {self.variant} | {self.psnr:.3f} | {gain} | {p} | {self.pairs} | {self.step_ms:.1f} | {memory} |"


HEADER = "| variant | PSNR, dB | gain (95 %) | p | pairs | ms a step | peak GB |\n|---|---|---|---|---|---|---|"


def paired(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, lower and upper end of its 95 % interval, and two-sided p of no difference, by Student's t; of n >= 2."""
    n = len(differences)
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(n))
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, n - 1))


def compare(outcomes: Sequence[Outcome]) -> list[Comparison]:
    """Each variant, in the order of the first outcomes, `base` first, over the pairs that both have."""
    by_variant: dict[str, dict[tuple[str, int], Outcome]] = {BASE: {}}
    for outcome in outcomes:
        by_variant.setdefault(outcome.variant, {})[outcome.scene, outcome.seed] = outcome
    found = []
    for name, own in by_variant.items():
        pairs = sorted(own.keys() & by_variant[BASE].keys())
        differences = np.array([own[pair].psnr - by_variant[BASE][pair].psnr for pair in pairs])
        gain, low, high, p = paired(differences) if len(pairs) > 1 else (float(differences.mean()), *[np.nan] * 3)
        step_ms = float(np.median([outcome.step_ms for outcome in own.values()]))
        memory = max(outcome.peak_memory_bytes for outcome in own.values())
        psnr = float(np.mean([own[pair].psnr for pair in pairs]))
        found.append(Comparison(name, psnr, gain, low, high, p, len(pairs), step_ms, memory))
    return found


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """The gains with their intervals, as a PNG, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = [c for c in comparisons if c.variant != BASE]
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    gain, low, high = (np.array([getattr(c, name) for c in shown]) for name in ("gain", "low", "high"))
    axes.errorbar(gain, np.arange(len(shown)), xerr=[gain - low, high - gain], fmt="o", capsize=3)
    axes.axvline(0, color="k", linewidth=0.6)
    axes.set(yticks=np.arange(len(shown)), yticklabels=[c.variant for c in shown], xlabel=f"dB more than {BASE}")
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


# The command.


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_multi_string("variant", [], "name:path=value,path=value; may be repeated.", flag_values=values)
    absl_flags.DEFINE_list("scenes", ["bricks"], "Names or paths of scenes.", flag_values=values)
    flags.define_path(values, "data_dir", None, "Folder that holds the scenes other than bricks.")
    absl_flags.DEFINE_integer("downscale", 1, "Of the scenes other than bricks.", 1, flag_values=values)
    absl_flags.DEFINE_enum("preset", "small", list(PRESETS), "What base is.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "An override of base, and so of all.", flag_values=values)
    absl_flags.DEFINE_integer("seeds", 3, "Seeds of each scene, from 0 on.", 2, flag_values=values)
    absl_flags.DEFINE_float("seconds", 0.0, "Of training: equal seconds.", 0.0, flag_values=values)
    absl_flags.DEFINE_integer("steps", 0, "Of training: equal steps.", 0, flag_values=values)
    absl_flags.DEFINE_integer("views", 10, "Held-out views that are evaluated.", 1, flag_values=values)
    flags.define_path(values, "output", "runs/lab", "Folder for results.jsonl, lab.json and lab.png.")


def base_configs(values: absl_flags.FlagValues) -> list[tuple[str, NerfConfig]]:
    """What `base` trains on each scene."""
    if bool(values.seconds) == bool(values.steps):
        raise InputError("give either --seconds or --steps: what all variants get alike")
    found = []
    budget = {"max_seconds": values.seconds, "max_steps": values.steps or 10**7}
    for name in values.scenes:
        scene = scene_config(name)
        if name != "bricks":
            scene = replace(scene, downscale=values.downscale, data_dir=values.data_dir or "")
        capture, roles, placement = read_views(scene)
        has_alpha = any(alpha and role == "train" for alpha, role in zip(capture.has_alpha, roles, strict=False))
        config = suited(PRESETS[values.preset], num_cascades=placement.num_cascades, has_alpha=has_alpha)
        config = replace(config, scene=scene, train=replace(config.train, **budget))
        found.append((name, apply_overrides(config, values.override)))
    return found


def main(values: absl_flags.FlagValues) -> None:
    variants = [Variant(BASE), *map(Variant.parse, values.variant)]
    if len({variant.name for variant in variants}) < len(variants) or len(variants) < 2:
        raise InputError("--variant: expected one or more, each with a name of its own")
    tasks = list(plan(variants, base_configs(values), values.seeds, values.views))
    folder, started = Path(values.output), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = compare(run_all(tasks, folder / "results.jsonl"))
    print(HEADER, *(comparison.row() for comparison in comparisons), sep="\n")
    about: dict[str, Any] = {
        **environment(),
        "budget": f"{values.seconds} s" if values.seconds else f"{values.steps} steps",
    }
    about |= {"scenes": values.scenes, "views": values.views, "variants": [asdict(variant) for variant in variants]}
    write_json(folder / "lab.json", {**about, "comparisons": [asdict(comparison) for comparison in comparisons]})
    draw(comparisons, folder / "lab.png")
    print(f"\n{len(tasks)} trainings, {time.perf_counter() - started:.0f} s now; {folder / 'lab.json'}")


if __name__ == "__main__":
    flags.run("experiments.lab", define_flags, main, __doc__ or "")
