"""PSNR over seconds of training, of several presets on the same data and machine.

    python -m experiments.race --scene=lego --data_dir=DIR --downscale=4 --presets=small,hundred_lines --seconds=60,600

Each preset is trained once, as `python -m jaxngp.train` would, and evaluated on a few views at growing intervals.
Seconds count training only: neither compilation, which is stated beside them, nor evaluation. Prints two Markdown
tables and writes the curves as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from jaxngp import flags
from jaxngp.config import PRESETS, InputError, NerfConfig, scene_config
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.training.evaluation import evaluate_views, summarise
from jaxngp.training.loop import Progress, train
from jaxngp.training.report import environment, write_json

LEVELS = (20.0, 22.0, 23.5, 25.0, 28.0, 30.0)  # dB


@dataclass(frozen=True)
class Curve:
    """What one preset reached: PSNR at each of several times."""

    preset: str
    compile_seconds: float
    seconds: list[float]
    steps: list[int]
    psnr: list[float]

    def time_to(self, level: float) -> float | None:
        """Seconds of training until the PSNR first reaches a level, interpolated between evaluations; None if never."""
        reached = [i for i, value in enumerate(self.psnr) if value >= level]
        if not reached:
            return None
        i = reached[0]
        if i == 0:
            return self.seconds[0]
        return float(np.interp(level, self.psnr[i - 1 : i + 1], self.seconds[i - 1 : i + 1]))


def run_curve(preset: str, config: NerfConfig, training: Split, evaluation: Split) -> Curve:
    """Train with a budget of seconds and evaluate at 1, 1.5, 2, 3, 5, 7, 10, 15, ... seconds and at the end."""
    curve = Curve(preset, 0.0, [], [], [])
    marks = [m * s for s in (1, 10, 100, 1000, 10_000, 100_000) for m in (1, 1.5, 2, 3, 5, 7)]
    with tqdm(total=config.train.max_seconds, desc=preset, unit="s", bar_format="{l_bar}{bar}{n:.0f} s") as bar:
        for progress in train(config, training.images):
            bar.update(progress.seconds - bar.n)
            if progress.metrics is None:
                curve = replace(curve, compile_seconds=progress.compile_seconds)
            elif progress.finished or progress.seconds >= marks[0]:
                marks = [mark for mark in marks if mark > progress.seconds]
                add_point(curve, progress, config, evaluation)
    return curve


def add_point(curve: Curve, progress: Progress, config: NerfConfig, evaluation: Split) -> None:
    scores = [score for score, _ in evaluate_views(progress.state, evaluation, config=config)]
    curve.seconds.append(progress.seconds)
    curve.steps.append(progress.step)
    curve.psnr.append(summarise(scores, evaluation, "white").psnr)


def tables(curves: list[Curve]) -> str:
    """PSNR over time, and the time to each level, as Markdown."""
    lines = ["| preset | PSNR in dB after seconds of training |", "|---|---|"]
    for curve in curves:
        points = zip(curve.seconds, curve.psnr, strict=True)
        lines.append(f"| {curve.preset} | {', '.join(f'{s:.0f} s: {p:.1f}' for s, p in points)} |")
    header = " | ".join(f"{level:g} dB" for level in LEVELS)
    lines += ["", f"| seconds to | compile | {header} |", "|---|---" + "|---" * len(LEVELS) + "|"]
    for curve in curves:
        times = [curve.time_to(level) for level in LEVELS]
        cells = " | ".join("-" if t is None else f"{t:.1f}" for t in times)
        lines.append(f"| {curve.preset} | {curve.compile_seconds:.1f} | {cells} |")
    return "\n".join(lines)


def define_flags(values: flags.Flags) -> None:
    absl_flags.DEFINE_string("scene", "bricks", "As for training.", flag_values=values)
    absl_flags.DEFINE_string("data_dir", "", "Folder that holds the scene.", flag_values=values)
    absl_flags.DEFINE_integer("downscale", 1, "Shrink the images by this factor.", 1, flag_values=values)
    absl_flags.DEFINE_list("presets", ["small", "hundred_lines"], f"Of {', '.join(PRESETS)}.", flag_values=values)
    absl_flags.DEFINE_list("seconds", ["60"], "Budget of each preset, or one for all.", flag_values=values)
    absl_flags.DEFINE_integer("eval_views", 4, "Evenly spaced views to evaluate.", 1, flag_values=values)
    absl_flags.DEFINE_string("output", "runs/race.json", "Where the curves are written.", flag_values=values)


def main(values: flags.Flags) -> None:
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    training, evaluation = load_training(scene), load_evaluation(scene, num_views=values.eval_views)
    budgets = values.seconds if len(values.seconds) > 1 else values.seconds * len(values.presets)
    if len(budgets) != len(values.presets):
        raise InputError(f"--seconds has {len(budgets)} values: expected 1 or {len(values.presets)}, one a preset")
    if unknown := [preset for preset in values.presets if preset not in PRESETS]:
        raise InputError(f"--presets: unknown {unknown[0]!r}; there are {', '.join(PRESETS)}")
    try:
        budgets = [float(budget) for budget in budgets]
    except ValueError as error:
        raise InputError(f"--seconds: {error}") from None
    if min(budgets) <= 0:
        raise InputError("--seconds: expected positive numbers")
    curves = []
    for preset, budget in zip(values.presets, budgets, strict=True):
        config = replace(PRESETS[preset], scene=scene)
        config = replace(config, train=replace(config.train, max_seconds=budget, max_steps=10**7))
        curves.append(run_curve(preset, config, training, evaluation))
        view = f"{evaluation.name} split, {evaluation.num_views} views of {'x'.join(map(str, evaluation.resolution))}"
        about = {"scene": scene.name, "views": view, "background": "white", "colour_space": "sRGB", **environment()}
        write_json(values.output, {**about, "curves": [asdict(curve) for curve in curves]})
    print(f"{scene.name}, {view}, white background, sRGB; {about['device']}, jax {about['jax_version']}\n")
    print(tables(curves))


if __name__ == "__main__":
    flags.run("experiments.race", define_flags, main, __doc__ or "")
