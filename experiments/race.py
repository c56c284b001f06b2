"""PSNR over seconds of training, of several presets and the 100-line PyTorch reference on the same data and machine.

    python -m experiments.race --scene=lego --data_dir=DIR --downscale=4 --presets=small,hundred_lines --seconds=60,600
    python -m experiments.race --scene=lego --data_dir=DIR --downscale=4 --reference=FILE --seconds=60,600,3600

Each preset is trained once, as `python -m jaxngp.train` would, and evaluated on a few views at growing intervals.
Seconds count training only: neither compilation, which is stated beside them, nor evaluation.

--reference names a file that holds the reference's source. It is executed as it stands: its own `train` runs its own
steps, with batches of ours, and its own `render_rays` draws the views, which are scored as the presets' are. Batches
come from a shuffled table by one indexing each, which costs it less than a DataLoader would.

Prints Markdown tables, and writes the curves as JSON and as a PNG beside it (`pip install .[bench]`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from experiments import reference
from jaxngp import flags
from jaxngp.config import InputError, NerfConfig, SceneConfig
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.evaluation import evaluate_views, summarise
from jaxngp.metrics import mean_squared_error, psnr
from jaxngp.presets import PRESETS, scene_config
from jaxngp.records import environment, write_json
from jaxngp.training.loop import Progress, train

LEVELS = (20.0, 22.0, 23.5, 25.0, 28.0, 30.0)  # dB
MARKS = tuple(m * s for s in (1, 10, 100, 1000, 10_000, 100_000) for m in (1, 1.5, 2, 3, 5, 7))  # seconds
REFERENCE = "reference"  # the name of its curve
CHUNK = 2**12  # rays that the reference renders at once


# Curves.


@dataclass
class Curve:
    """What one contestant reached: PSNR at each of several times."""

    name: str
    compile_seconds: float
    seconds: list[float]  # of training
    steps: list[int]
    psnr: list[float]

    def time_to(self, level: float, *, with_compile: bool = False) -> float | None:
        """Seconds of training until the PSNR first reaches a level, interpolated between evaluations; None if never."""
        reached = [i for i, value in enumerate(self.psnr) if value >= level]
        if not reached:
            return None
        i = reached[0]
        before = slice(max(i - 1, 0), i + 1)
        seconds = float(np.interp(level, self.psnr[before], self.seconds[before]))
        return seconds + (self.compile_seconds if with_compile else 0.0)

    def last(self, *, with_compile: bool = False) -> float:
        """Seconds at the last evaluation."""
        return self.seconds[-1] + (self.compile_seconds if with_compile else 0.0)


class Judge:
    """Decides when a contestant is evaluated, adds what it reaches to its curve, and says when it may stop.

    Evaluations are due when the seconds of training pass a mark, by default 1, 1.5, 2, 3, 5, 7, 10, 15, ..., and at the
    end of the budget. A curve ends with the budget, or with the first evaluation that reaches `stop_psnr` where that
    is not 0.
    """

    def __init__(self, name: str, budget: float, stop_psnr: float, marks: Sequence[float] = MARKS) -> None:
        self.curve = Curve(name, 0.0, [], [], [])
        self.budget, self.stop_psnr, self.marks = budget, stop_psnr, marks
        self.bar = tqdm(total=budget, desc=name, unit="s", bar_format="{l_bar}{bar}{n:.0f} s{postfix}", disable=None)

    def ended(self, seconds: float, step: int, evaluate: Callable[[], float]) -> bool:
        """To be asked after every step, or every few; `evaluate` gives the PSNR as of now."""
        self.bar.update(min(seconds, self.budget) - self.bar.n)
        finished = seconds >= self.budget
        last = self.curve.seconds[-1] if self.curve.seconds else 0.0
        if finished or any(last < mark <= seconds for mark in self.marks):
            self.curve.seconds.append(seconds)
            self.curve.steps.append(step)
            self.curve.psnr.append(evaluate())
            self.bar.set_postfix_str(f"{self.curve.psnr[-1]:.2f} dB")
            finished = finished or 0 < self.stop_psnr <= self.curve.psnr[-1]
        if finished:
            self.bar.close()
        return finished


def run_preset(config: NerfConfig, training: Split, evaluation: Split, judge: Judge) -> Curve:
    """Train one preset until the judge ends it."""
    for progress in train(config, training.images):
        if progress.metrics is None:
            judge.curve.compile_seconds = progress.compile_seconds
            continue

        def score(progress: Progress = progress) -> float:
            views = evaluate_views(progress.field, progress.state.occupancy, evaluation, sampler=config.sampler)
            scores = [score for score, _ in views]
            return summarise(scores, evaluation, "white").psnr

        if judge.ended(progress.seconds, progress.step, score):
            break
    return judge.curve


def run_reference(
    module: ModuleType, training: Split, evaluation: Split, judge: Judge, *, scene: SceneConfig, batch_size: int
) -> Curve:
    """Let the reference train itself until the judge ends it."""
    torch = reference.bench_module("torch")
    torch.manual_seed(0)
    model = reference.make_model(module, scene.box_side)
    rows = torch.from_numpy(reference.ray_rows(training, scene))
    truth = reference.ray_rows(evaluation, scene).reshape(evaluation.num_views, -1, 9)

    def score() -> float:
        return float(np.mean([view_psnr(torch, module, model, view) for view in truth]))

    def batches() -> Iterator[Any]:
        """Whoever asks for the next batch has ended a step: so the clock runs from one asking to the next."""
        seconds, step = 0.0, 0
        while True:
            started = time.perf_counter()
            order = torch.randperm(len(rows))
            for start in range(0, len(rows), batch_size):
                yield rows[order[start : start + batch_size]]
                seconds, step = seconds + time.perf_counter() - started, step + 1
                if judge.ended(seconds, step, score):
                    return
                started = time.perf_counter()

    near, far, bins = reference.NEAR, reference.FAR, reference.NUM_BINS
    optimizer = reference.make_optimizer(torch, model)
    module.train(model, optimizer, batches(), nb_epochs=1, device="cpu", hn=near, hf=far, nb_bins=bins)
    return judge.curve


def view_psnr(torch: ModuleType, module: ModuleType, model: Any, view: np.ndarray) -> float:
    """Of one view, rows (H * W, 9), as the reference renders it: with a random place in every bin."""
    with torch.no_grad():
        rgb = [
            module.render_rays(
                model, part[:, :3], part[:, 3:6], hn=reference.NEAR, hf=reference.FAR, nb_bins=reference.NUM_BINS
            ).numpy()
            for part in torch.from_numpy(view).split(CHUNK)
        ]
    return float(psnr(mean_squared_error(np.clip(np.concatenate(rgb), 0, 1), view[:, 6:])))


# Reports.


def tables(curves: Sequence[Curve]) -> str:
    """PSNR over time, the time to each level, and how many times longer the reference takes, as Markdown."""
    lines = ["| contestant | PSNR in dB after seconds of training |", "|---|---|"]
    for curve in curves:
        points = zip(curve.seconds, curve.psnr, strict=True)
        lines.append(f"| {curve.name} | {', '.join(f'{s:.0f} s: {p:.1f}' for s, p in points)} |")
    header = " | ".join(f"{level:g} dB" for level in LEVELS)
    rule = "|---" * len(LEVELS) + "|"
    for with_compile in (False, True):
        title = "seconds to, with compilation" if with_compile else "seconds to, without compilation"
        lines += ["", f"| {title} | compile | {header} |", "|---|---" + rule]
        for curve in curves:
            cells = " | ".join(_time_cell(curve, level, with_compile) for level in LEVELS)
            lines.append(f"| {curve.name} | {curve.compile_seconds:.1f} | {cells} |")
    presets = [curve for curve in curves if curve.name != REFERENCE]
    for slow in curves:
        if slow.name == REFERENCE and presets:
            lines += ["", f"| time of the reference / time of | compilation | {header} |", "|---|---" + rule]
            for fast in presets:
                for with_compile in (False, True):
                    cells = " | ".join(_ratio_cell(slow, fast, level, with_compile) for level in LEVELS)
                    lines.append(f"| {fast.name} | {'with' if with_compile else 'without'} | {cells} |")
    return "\n".join(lines)


def _time_cell(curve: Curve, level: float, with_compile: bool) -> str:
    seconds = curve.time_to(level, with_compile=with_compile)
    return f"> {curve.last(with_compile=with_compile):.1f}" if seconds is None else f"{seconds:.1f}"


def _ratio_cell(slow: Curve, fast: Curve, level: float, with_compile: bool) -> str:
    """A bound where only one of the two reached the level, and nothing where neither did."""
    times = [curve.time_to(level, with_compile=with_compile) for curve in (slow, fast)]
    if times == [None, None]:
        return "-"
    bound = ">" if times[0] is None else "<" if times[1] is None else ""
    slow_time, fast_time = (
        curve.last(with_compile=with_compile) if known is None else known
        for curve, known in zip((slow, fast), times, strict=True)
    )
    return f"{bound} {slow_time / fast_time:.3g}".strip()


def write_plot(path: Path, curves: Sequence[Curve], title: str) -> None:
    """The curves as a PNG, PSNR over the logarithm of seconds: solid as they train, dashed with compilation added."""
    figure = reference.bench_module("matplotlib.figure").Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        colour = f"C{index}"
        axes.plot(curve.seconds, curve.psnr, "o-", color=colour, markersize=3.5, label=curve.name)
        if curve.compile_seconds:
            seconds = np.add(curve.seconds, curve.compile_seconds)
            axes.plot(seconds, curve.psnr, "--", color=colour, label=f"{curve.name}, compilation added")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(reference.bench_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("PSNR in dB")
    axes.set_title(title, fontsize=9)
    axes.grid(which="major", alpha=0.4)
    axes.grid(which="minor", alpha=0.12)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# The command.


def define_flags(values: flags.Flags) -> None:
    absl_flags.DEFINE_string("scene", "bricks", "As for training.", flag_values=values)
    absl_flags.DEFINE_string("data_dir", "", "Folder that holds the scene.", flag_values=values)
    absl_flags.DEFINE_integer("downscale", 1, "Shrink the images by this factor.", 1, flag_values=values)
    absl_flags.DEFINE_list("presets", ["small", "hundred_lines"], f"Of {', '.join(PRESETS)}.", flag_values=values)
    absl_flags.DEFINE_list(
        "seconds", ["60"], "Budget of each preset and, last, the reference; or one for all.", flag_values=values
    )
    absl_flags.DEFINE_integer("eval_views", 4, "Evenly spaced views to evaluate.", 1, flag_values=values)
    absl_flags.DEFINE_float(
        "stop_psnr", 0.0, "End a curve when an evaluation reaches it, in dB; 0 never does.", 0.0, flag_values=values
    )
    absl_flags.DEFINE_string(
        "reference", "", "File with the 100-line PyTorch source; none if empty.", flag_values=values
    )
    absl_flags.DEFINE_integer(
        "reference_batch", reference.BATCH_SIZE, "Rays in a batch of the reference.", 1, flag_values=values
    )
    absl_flags.DEFINE_string("output", "runs/race.json", "Where the curves are written.", flag_values=values)


def read_budgets(values: flags.Flags) -> dict[str, float]:
    """The seconds of each contestant, in the order in which they run. Raises InputError."""
    if unknown := [preset for preset in values.presets if preset not in PRESETS]:
        raise InputError(f"--presets: unknown {unknown[0]!r}; there are {', '.join(PRESETS)}")
    names = [*dict.fromkeys(values.presets), *([REFERENCE] if values.reference else [])]
    if not names:
        raise InputError("--presets and --reference are empty: give at least one contestant")
    given = values.seconds if len(values.seconds) != 1 else values.seconds * len(names)
    if len(given) != len(names):
        raise InputError(f"--seconds has {len(given)} values: expected 1 or {len(names)}, for {', '.join(names)}")
    try:
        budgets = [float(budget) for budget in given]
    except ValueError as error:
        raise InputError(f"--seconds: {error}") from None
    if not min(budgets) > 0:
        raise InputError("--seconds: expected positive numbers")
    return dict(zip(names, budgets, strict=True))


def main(values: flags.Flags) -> None:
    budgets = read_budgets(values)
    output = Path(values.output)
    reference.bench_module("matplotlib")  # before hours of training, not after
    module = reference.load_reference(values.reference) if values.reference else None
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    training, evaluation = load_training(scene), load_evaluation(scene, num_views=values.eval_views)
    view = f"{evaluation.name} split, {evaluation.num_views} views of {'x'.join(map(str, evaluation.resolution))}"
    curves: list[Curve] = []
    for name, budget in budgets.items():
        judge = Judge(name, budget, values.stop_psnr)
        if module and name == REFERENCE:
            curve = run_reference(module, training, evaluation, judge, scene=scene, batch_size=values.reference_batch)
        else:
            config = replace(PRESETS[name], scene=scene)
            config = replace(config, train=replace(config.train, max_seconds=budget, max_steps=10**7))
            curve = run_preset(config, training, evaluation, judge)
        curves.append(curve)
        about = {"scene": scene.name, "views": view, "background": "white", "colour_space": "sRGB", **environment()}
        if module:
            about |= {"reference_batch": values.reference_batch, **reference.environment()}
        write_json(output, {**about, "curves": [asdict(curve) for curve in curves]})
        batch = f"; reference: {values.reference_batch} rays a step" if module else ""
        title = f"{scene.name}, {view}, white background; {about['device']}{batch}"
        write_plot(output.with_suffix(".png"), curves, title)
    versions = f"jax {about['jax_version']}" + (f", torch {about['torch_version']}" if module else "")
    print(f"{scene.name}, {view}, white background, sRGB; {about['device']}, {versions}{batch}\n")
    print(tables(curves))


if __name__ == "__main__":
    flags.run("experiments.race", define_flags, main, __doc__ or "")
