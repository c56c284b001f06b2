"""How `experiments.gpu_bench` runs its sections: what they share, what fits the time, and what becomes of a failure."""

from __future__ import annotations

import concurrent.futures
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.throughput import Stage, StepInputs
from experiments.timing import median_ms
from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, NerfConfig
from jaxngp.data import Split
from jaxngp.device import step_compiler_options
from jaxngp.training import steps
from jaxngp.training.report import write_json
from jaxngp.training.state import TrainState
from jaxngp.visual_hull import PixelSet

RUNS = 5  # timed calls, of which the median is shown


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    training_steps: int  # before anything is timed
    batches: int  # of samples that take turns in a stage
    ceilings: float  # times their full size
    frames: tuple[tuple[int, int], ...]  # width, height; the first is the headline's
    poses: int  # of each frame
    options: int  # of gpu_sections.XLA_OPTIONS, how many
    psnr_seconds: float  # of training, if the command does not say
    table_size: int  # at most, of an image's and a solid's field
    num_points: int  # that these are learned from in a step
    image_size: int  # px per side of the built-in image
    sdf_samples: int  # distances to learn from
    point_seconds: float  # of training, of each of the two


@dataclass(frozen=True)
class Trained:
    """A state that has been trained, and what its steps read, all on the device."""

    state: TrainState
    data: PosedImages
    pixels: PixelSet
    inputs: StepInputs
    batches: list[dict[str, Stage]]


@dataclass
class Bench:
    """What the sections share: the task, what is known so far, and the clock."""

    config: NerfConfig
    sizes: Sizes
    training: Split
    eval_views: int
    psnr_seconds: float
    output: Path
    results: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")  # of time.monotonic: when the section that runs has to end for the later ones to fit
    state: Trained | None = None
    programs: dict[str, Dispatch] = field(default_factory=dict)

    def say(self, line: str = "") -> None:
        print(line, flush=True)

    def header(self, *names: str) -> None:
        self.say(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")

    def record(self, name: str, value: Any) -> None:
        """Set one of the results, and write them all."""
        self.results[name] = value
        write_json(self.output / "results.json", self.results)

    def add(self, name: str, /, **values: Any) -> None:
        """Add to one of the results, which is a mapping, and write them all."""
        self.record(name, {**self.results.get(name, {}), **values})

    def late(self, needed: float = 0.0) -> bool:
        """Whether the seconds needed are no longer there."""
        return time.monotonic() + needed > self.deadline

    @property
    def trained(self) -> Trained:
        if self.state is None:
            raise InputError("there is no trained state: section train failed or was skipped")
        return self.state

    def dispatch(self, count: int, options: Mapping[str, Any] | None = None) -> Dispatch:
        """The program of one dispatch, compiled unless it has been before."""
        key = f"{count} {options or {}}"
        if key not in self.programs:
            self.programs[key] = Dispatch(self.config, self.trained, count, options or {})
        return self.programs[key]


class Dispatch:
    """A compiled dispatch of `count` training steps, which goes on with a state of its own, in place."""

    def __init__(self, config: NerfConfig, trained: Trained, count: int, options: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        self.count = count
        rates = jnp.full(count, 1e-3, jnp.float32)  # not of weak type, so that this is the program of `train`
        self.arguments = (trained.data, trained.pixels, rates, jnp.int32(count))
        lowered = steps.nerf_steps.lower(trained.state, *self.arguments, config=config)
        self.compiled = lowered.compile(step_compiler_options(config.field.precision) | dict(options))
        self.compile_seconds = time.perf_counter() - started
        self.state = jax.tree.map(jnp.copy, trained.state)
        self.metrics: steps.Metrics

    def __call__(self) -> Any:
        self.state, self.metrics = self.compiled(self.state, *self.arguments)
        return self.state.step, self.metrics

    @property
    def temporary_bytes(self) -> int:
        analysis = self.compiled.memory_analysis()
        return analysis.temp_size_in_bytes if analysis else 0

    def ms_per_step(self) -> float:
        """The median of RUNS times, each of at least 16 steps, and each dispatch until it is ready, as in training."""
        calls = -(-16 // self.count)

        def several() -> None:
            for _ in range(calls):
                jax.block_until_ready(self())

        return median_ms({"": several}, runs=RUNS)[""] / (calls * self.count)


def build_all(bench: Bench, makers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each maker makes, all side by side, since XLA compiles without Python's lock; without those that fail."""

    def timed(make: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        return make(), time.perf_counter() - started

    made, slowest, started = {}, (0.0, "none"), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(timed, make) for name, make in makers.items()}
        for name, future in futures.items():
            try:
                made[name], seconds = future.result()
                slowest = max(slowest, (seconds, name))
            except Exception as error:
                bench.say(f"{name}: refused: {one_line(error)}")
                bench.add("refused", **{name: traceback.format_exception(error)})
    seconds = time.perf_counter() - started
    bench.say(f"compiled {len(made)} of {len(makers)} in {seconds:.1f} s; {slowest[1]} took {slowest[0]:.1f} s\n")
    return made


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


# Which sections run.


@dataclass(frozen=True)
class Section:
    """One part of the benchmark; `seconds` is what it should take on an H100, compilation included."""

    name: str
    run: Callable[[Bench], None]
    seconds: float
    trains: bool = True  # needs a trained state
    headline: bool = False  # rather leave out any other


def plan(sections: Sequence[Section], seconds: float) -> set[str]:
    """The names of the sections that fit: those for the headline first, then the others in their order."""
    chosen = set()
    for section in sorted(sections, key=lambda section: not section.headline):
        if section.seconds <= seconds:
            chosen.add(section.name)
            seconds -= section.seconds
    return chosen


def run_sections(bench: Bench, sections: Sequence[Section], end: float) -> list[str]:
    """Runs what fits until `end`, of time.monotonic. Returns the names of those that failed."""
    failed = []
    for index, section in enumerate(sections):
        pending, started = sections[index:], time.monotonic()
        chosen = plan(pending, end - started)
        bench.say(f"\n## {section.name}\n")
        if section.name not in chosen:
            left = f"of the {max(end - started, 0):.0f} s left, {section.seconds:.0f} s cannot be spared"
            bench.say(f"skipped: {left}")
            bench.add("skipped", **{section.name: left})
            continue
        bench.deadline = end - sum(later.seconds for later in pending[1:] if later.name in chosen and later.headline)
        try:
            section.run(bench)
        except Exception as error:  # the next section may tell something yet
            failed.append(section.name)
            bench.say(f"FAILED: {one_line(error)}")
            bench.add("failed", **{section.name: traceback.format_exc()})
        bench.add("seconds", **{section.name: time.monotonic() - started})
    return failed
