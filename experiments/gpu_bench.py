"""Where a GPU stands: ceilings, correctness, the training step and its stages, XLA's flags, rendering, and PSNR; images
and signed distances.

    python -m experiments.gpu_bench --scene=lego --data_dir=DIR
    python -m experiments.gpu_bench --toy --scene=bricks --downscale=8    # all of it, on a CPU too

One command of at most --budget seconds that may be stopped anywhere: every section prints its lines as they come and
rewrites the JSON, one that fails says why in a line and the next goes on, and one that no longer fits is skipped, the
rendering and the PSNR last of all. --sections picks some: versions, ceilings, correctness, step, profile, stages,
flags, render, image, sdf, psnr. Some of them need a trained state, so training comes early.

Beside a time stands what was predicted for an H100 before anything was measured: the floor that the hardware sets,
and what XLA's code should take (`gpu_stages`). The PSNR stands beside the paper's for lego on an RTX 3090. Programs
are compiled without Triton's matmuls, whose tuning takes minutes, unless XLA_FLAGS say something about them.

Leaves results.json and trace.xplane.pb in --output, and ends with a table of the headline figures. The exit code is 1
where a section failed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from experiments import gpu_primitives, gpu_sections
from experiments.gpu_run import Bench, Section, Sizes, run_sections
from experiments.throughput import define_marching_flags
from jaxngp import flags
from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, MarchConfig, apply_overrides
from jaxngp.data import load_training
from jaxngp.presets import PRESETS, scene_config

FULL = Sizes(
    1000, 4, 1.0, ((1920, 1080), (800, 800)), 5, len(gpu_sections.XLA_OPTIONS), 60.0, 2**24, 2**18, 2**13, 2**22, 20.0
)
TOY = Sizes(16, 1, 2.0**-10, ((64, 36),), 2, 2, 2.0, 2**14, 2**10, 64, 2**12, 0.5)
TOY_OVERRIDES = (
    "field.encoding.num_levels=2",
    "field.encoding.table_size=2**10",
    "field.encoding.max_resolution=64",
    "field.hidden_width=16",
    "field.colour_layers=1",
    "sampler.occupancy.resolution=32",
    "sampler.num_steps=64",
    "sampler.num_samples=2**10",
    "train.num_rays=2**7",
    "train.steps_per_dispatch=4",
)
TOY_XLA_FLAGS = (
    "--xla_backend_optimization_level=0",
)  # compiles in two thirds of the time, and what it times is a toy

# The headline.

MOST = {"step": 1.0, "memory": 3000.0, "frame": 20.0, "compilation": 20.0}
"""Targets for an H100: ms a step, MB on the device, ms a frame, s before training."""


@dataclass(frozen=True)
class Headline:
    """One figure beside its target; `more` says that larger is better."""

    name: str
    value: float | None
    target: float
    more: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return f"| {self.name} | - | {self.target:g} | not measured |"
        met = self.value >= self.target if self.more else self.value <= self.target
        return f"| {self.name} | {self.value:.4g} | {self.target:g} | {'met' if met else 'missed'} |"


def headlines(results: Mapping[str, Any], frame: str) -> list[Headline]:
    """The figures that matter, from the results as they stand. frame: the name of the one that counts."""
    trained, rendered = results.get("train", {}), results.get("render", {}).get(frame, {})
    peak = trained.get("peak_bytes")
    reached = {run["budget"]: run["psnr"] for run in results.get("psnr", {}).get("runs", ())}
    return [
        Headline("step, ms", results.get("step", {}).get("ms"), MOST["step"]),
        Headline("peak device memory of training, MB", peak and peak / 1e6, MOST["memory"]),
        Headline(f"frame of {frame} on the device, ms", rendered.get("device_ms"), MOST["frame"]),
        Headline("compilation before training, s", trained.get("compile_seconds"), MOST["compilation"]),
        *[
            Headline(f"PSNR after {mark:g} s, dB", reached.get(mark), target, more=True)
            for mark, target in gpu_sections.TARGET_PSNR.items()
        ],
    ]


# The command.

TRAIN = Section("train", gpu_sections.train_state, 45, trains=False, headline=True)
SECTIONS = (
    Section("versions", gpu_sections.versions, 2, trains=False),
    Section("ceilings", gpu_sections.ceilings, 40, trains=False),
    Section("correctness", gpu_sections.correctness, 20),
    Section("step", gpu_sections.step, 30),
    Section("profile", gpu_sections.profile, 20),
    Section("stages", gpu_sections.stages, 80),
    Section("flags", gpu_sections.xla_options, 80),
    Section("render", gpu_sections.render, 40, headline=True),
    Section("image", gpu_primitives.image, 50, trains=False),
    Section("sdf", gpu_primitives.sdf, 50, trains=False),
    Section("psnr", gpu_sections.psnr, 30, trains=False, headline=True),  # and its training
)


def choose_sections(names: Sequence[str], psnr_seconds: float) -> list[Section]:
    """Those named, in their own order; training, if any needs it, before all but the versions. Raises InputError."""
    known = {section.name: section for section in SECTIONS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--sections: unknown {unknown[0]!r}; there are {', '.join(known)}")
    trained = sum(gpu_sections.psnr_budgets(psnr_seconds))
    known["psnr"] = replace(known["psnr"], seconds=known["psnr"].seconds + trained)
    chosen = [section for name, section in known.items() if name in names]
    if any(section.trains for section in chosen):
        chosen.insert(1 if chosen[0].name == "versions" else 0, TRAIN)
    return chosen


def define_flags(values: flags.Flags) -> None:
    define_marching_flags(values, preset="base")
    absl_flags.DEFINE_integer("eval_views", 4, "Evenly spaced views to evaluate.", 1, flag_values=values)
    absl_flags.DEFINE_float(
        "seconds", None, "Of the longest training for the PSNR; 60, or 2 of a toy.", 0.1, flag_values=values
    )
    absl_flags.DEFINE_float("budget", 570.0, "Seconds for everything.", 1.0, flag_values=values)
    names = [section.name for section in SECTIONS]
    absl_flags.DEFINE_list("sections", names, f"Of {', '.join(names)}.", flag_values=values)
    absl_flags.DEFINE_bool("toy", False, "Everything small enough for a CPU.", flag_values=values)
    absl_flags.DEFINE_string("output", "runs/gpu_bench", "Folder of results and trace.", flag_values=values)


def add_xla_flags(*wanted: str) -> None:
    """Adds to XLA_FLAGS, which are read when a device is first used, those that they do not set yet."""
    given = os.environ.get("XLA_FLAGS", "").split()
    known = {flag.partition("=")[0] for flag in given}
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in wanted if flag.partition("=")[0] not in known)])


def main(values: flags.Flags) -> None:
    end = time.monotonic() + values.budget
    add_xla_flags(gpu_sections.NO_TRITON, *(TOY_XLA_FLAGS if values.toy else ()))
    if values.preset not in PRESETS:
        raise InputError(f"--preset: unknown {values.preset!r}; there are {', '.join(PRESETS)}")
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    overrides = [*(TOY_OVERRIDES if values.toy else ()), *values.override]
    config = apply_overrides(replace(PRESETS[values.preset], scene=scene), overrides)
    if not isinstance(config.sampler, MarchConfig):
        raise InputError(f"--preset={values.preset} does not march, and this times marching: try base")
    sizes = TOY if values.toy else FULL
    psnr_seconds = values.seconds or sizes.psnr_seconds
    sections = choose_sections(values.sections, psnr_seconds)
    training = load_training(scene)
    if not isinstance(training.images, PosedImages):
        raise InputError(f"{scene.name} is a ray table: this needs views")
    bench = Bench(config, sizes, training, values.eval_views, psnr_seconds, Path(values.output))
    failed = run_sections(bench, sections, end)
    bench.say("\n## headline\n")
    bench.header("figure", "measured", "target", "")
    for headline in headlines(bench.results, "x".join(map(str, sizes.frames[0]))):
        bench.say(str(headline))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    flags.run("experiments.gpu_bench", define_flags, main, __doc__ or "")
