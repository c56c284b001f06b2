"""Where a GPU stands: ceilings, correctness, the training step and its stages, XLA's flags, rendering, and PSNR.

    python -m experiments.gpu_bench --scene=lego --data_dir=DIR
    python -m experiments.gpu_bench --toy --scene=bricks --downscale=8    # all of it in a minute, on a CPU too

One command of at most --budget seconds that may be stopped anywhere: every section prints its lines as they come and
rewrites the JSON, one that fails says why in a line and the next goes on, and one that no longer fits is skipped, the
rendering and the PSNR last of all. --sections picks some: versions, ceilings, correctness, step, profile, stages,
flags, render, psnr.

Beside a time stands what was predicted for an H100 before anything was measured: the floor that the hardware sets,
and what XLA's code should take (`gpu_stages`). The PSNR stands beside the paper's for lego on an RTX 3090. Programs
are compiled without Triton's matmuls, whose tuning takes minutes, unless XLA_FLAGS say something about them.

Leaves results.json and trace.xplane.pb in --output, and ends with a table of the headline figures.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments import float64, gpu_profile, gpu_stages, race
from experiments.gpu_stages import ROUNDS, Prediction
from experiments.throughput import (
    OPTIMISER_ROUNDS,
    Stage,
    StepInputs,
    num_bytes,
    optimiser_calls,
    run_networks,
    step_inputs,
    training_stages,
)
from experiments.timing import median_ms
from jaxngp import flags
from jaxngp.cameras import Camera, PosedImages, orbit_poses, resize_camera, view_rays
from jaxngp.carving import PixelSet
from jaxngp.compositing import composite
from jaxngp.config import PRESETS, InputError, MarchConfig, NerfConfig, apply_overrides, scene_config
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.encodings import frequency_encode, hash_encode, sh_encode
from jaxngp.fields import evaluate_density, field_maker
from jaxngp.marching import find_candidates, pack_steps
from jaxngp.rendering import render_chunk, render_image
from jaxngp.training import steps
from jaxngp.training.loop import train
from jaxngp.training.report import environment, write_json
from jaxngp.training.state import TrainState

RUNS = 5  # timed calls, of which the median is shown
CHECKED = 4096  # samples that are compared with float64
TOLERANCES = {"encode": 5e-4, "composite": 1e-4, "networks": 2e-2}  # the last is for factors rounded to TF32
MAX_TRACE_BYTES = 14 * 10**6
TRACED = 3  # dispatches
CHUNK = 2**18  # rays that `render_image` renders at once, at most

MARKS = (2.0, 5.0, 15.0, 30.0, 60.0)  # seconds of training at which the PSNR is measured
PUBLISHED_PSNR = {5.0: 30.13, 15.0: 33.68, 60.0: 35.63, 300.0: 36.39}  # dB, lego, of the paper's Table 2, RTX 3090
TARGET_PSNR = {2.0: 30.1, 5.0: 33.7, 15.0: 35.6, 60.0: 36.4}  # dB
TARGETS = {"step, ms": 1.5, "memory, MB": 1000.0, "frame, ms": 30.0, "compilation, s": 30.0}  # at most; predictions

NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"  # what a command buffer may hold
XLA_OPTIONS: dict[str, dict[str, Any]] = {
    "as everything else": {},
    "no command buffers": {"xla_gpu_graph_min_graph_size": 10**6},
    "command buffers for few": {"xla_gpu_graph_min_graph_size": 1},
    "command buffers, loops too": {"xla_gpu_enable_command_buffer": f"{COMMANDS},WHILE"},
    "flush denormals": {"xla_gpu_ftz": True},
    "no autotuning": {"xla_gpu_autotune_level": 0},
    "latency hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "double-buffered loops": {"xla_gpu_enable_while_loop_double_buffering": True},
    "cuBLASLt": {"xla_gpu_enable_cublaslt": True},
    "Triton matmuls": {"xla_gpu_enable_triton_gemm": True},  # last, for their tuning takes longest
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    training_steps: int  # before anything is timed
    batches: int  # of samples that take turns in a stage
    ceilings: float  # times their full size
    frames: tuple[tuple[int, int], ...]  # width, height
    poses: int


FULL = Sizes(1000, 4, 1.0, ((1920, 1080), (800, 800)), 5)
TOY = Sizes(8, 2, 2.0**-10, ((64, 36), (32, 32)), 2)
TOY_OVERRIDES = (
    "field.encoding.table_size=2**10",
    "field.encoding.max_resolution=64",
    "sampler.occupancy.resolution=32",
    "sampler.num_steps=64",
    "sampler.num_samples=2**10",
    "train.num_rays=2**7",
    "train.steps_per_dispatch=4",
)


# Lines, JSON, and time.


@dataclass
class Bench:
    """What the sections share: the task, what is known so far, and the clock."""

    config: NerfConfig
    sizes: Sizes
    output: Path
    eval_views: int
    psnr_seconds: float
    deadline: float  # of time.monotonic, for the section that runs, so that those after it fit
    training: Split
    results: dict[str, Any] = field(default_factory=dict)
    trained: Trained | None = None

    def say(self, line: str = "") -> None:
        print(line, flush=True)

    def record(self, **values: Any) -> None:
        """Add to the results, and write them all."""
        self.results.update(values)
        write_json(self.output / "results.json", self.results)

    def late(self) -> bool:
        """Whether what is left of this section has to be left out."""
        return time.monotonic() > self.deadline

    @property
    def state(self) -> Trained:
        if self.trained is None:
            raise InputError("there is no trained state, since its section failed")
        return self.trained


@dataclass(frozen=True)
class Trained:
    """A state of TRAINING steps, and what its steps read, on the device."""

    state: TrainState
    data: PosedImages
    pixels: PixelSet
    inputs: StepInputs
    batches: list[dict[str, Stage]]


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
        pending, left = sections[index:], end - time.monotonic()
        chosen = plan(pending, left)
        bench.say(f"\n## {section.name}\n")
        if section.name not in chosen:
            bench.say(f"skipped: needs about {section.seconds:.0f} s, and {left:.0f} s are left for all that follows")
            bench.record(**{section.name: {"skipped": True}})
            continue
        bench.deadline = end - sum(later.seconds for later in pending[1:] if later.name in chosen and later.headline)
        started = time.monotonic()
        try:
            section.run(bench)
        except Exception as error:  # the next section may tell something yet
            failed.append(section.name)
            bench.say(f"FAILED: {one_line(error)}")
            bench.record(**{f"{section.name}_error": traceback.format_exc()})
        bench.record(seconds={**bench.results.get("seconds", {}), section.name: time.monotonic() - started})
    return failed


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def build_all(bench: Bench, makers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each maker makes, all side by side, since XLA compiles without Python's lock; without those that fail."""

    def timed(make: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        return make(), time.perf_counter() - started

    made, slowest, started = {}, (0.0, ""), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(timed, make) for name, make in makers.items()}
        for name, future in futures.items():
            try:
                made[name], seconds = future.result()
                slowest = max(slowest, (seconds, name))
            except Exception as error:
                bench.say(f"{name}: refused: {one_line(error)}")
    seconds = time.perf_counter() - started
    bench.say(f"compiled {len(made)} of {len(makers)} in {seconds:.1f} s; {slowest[1]} took {slowest[0]:.1f} s\n")
    return made


def header(bench: Bench, *names: str) -> None:
    bench.say(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")


# 0. Versions.


def versions(bench: Bench) -> None:
    about = environment()
    about |= {"commit": _output("git", "rev-parse", "HEAD"), "changed": bool(_output("git", "status", "--porcelain"))}
    about |= {"xla_flags": os.environ.get("XLA_FLAGS", ""), "python": sys.version.split()[0]}
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    about["gpu"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    for name, value in about.items():
        bench.say(f"{name}: {value}")
    bench.record(about=about)


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else ""


# A state to measure with.


def train_state(bench: Bench) -> None:
    """Trains first of all, while the peak of the device's memory is still that of training."""
    config = bench.config
    limits = replace(config.train, max_seconds=0.0, max_steps=bench.sizes.training_steps)
    images = bench.training.images
    assert isinstance(images, PosedImages)
    *_, progress = train(replace(config, train=limits), images)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    ms = 1e3 * progress.seconds / progress.step
    bench.say(f"{progress.step} steps, {ms:.2f} ms each with everything; compiled in {progress.compile_seconds:.1f} s")
    bench.say(f"peak device memory of training: {'unknown' if peak is None else f'{peak / 1e6:.0f} MB'}")
    found = {"steps": progress.step, "ms_a_step": ms, "compile_seconds": progress.compile_seconds, "peak_bytes": peak}
    bench.record(train=found)
    data = jax.device_put(images)
    _, pixels = steps.survey_views(data, config=config)
    bench.trained = Trained(
        progress.state,
        data,
        pixels,
        step_inputs(jax.random.key(1), progress.state, data, pixels, config=config),
        [training_stages(config, progress.state, data, pixels, seed=1 + i) for i in range(bench.sizes.batches)],
    )


# 1. Ceilings.


def ceilings(bench: Bench) -> None:
    given = gpu_stages.ceilings(scale=bench.sizes.ceilings)
    programs = build_all(bench, {name: ceiling.build for name, ceiling in given.items()})
    header(bench, "ceiling", "a second", "ms")
    for name, program in programs.items():
        ms = median_ms({name: program}, runs=RUNS)[name] / ROUNDS
        rate = given[name].amount / (1e-3 * ms)
        bench.say(f"| {name} | {rate:.2f} {given[name].unit} | {ms:.3f} |")
        bench.record(ceilings={**bench.results.get("ceilings", {}), name: {"rate": rate, "unit": given[name].unit}})


# 2. Correctness.


def correctness(bench: Bench) -> None:
    """The device's float32 against numpy's float64, on samples of the trained state."""
    header(bench, "array", "relative error", "of the largest", "tolerance", "")
    checks = [*_check_encoding(bench), *_check_composite(bench), *_check_networks(bench)]
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        numbers = f"{check.error:.1e} | {check.largest:.1e} | {check.tolerance:.0e}"
        bench.say(f"| {check.name} | {numbers} | {verdict} |")
    bench.record(correctness=[{**asdict(check), "passed": check.passed} for check in checks])


def _compare(group: str, ours: Mapping[str, Any], truth: Mapping[str, np.ndarray]) -> list[float64.Check]:
    tolerance = TOLERANCES[group]
    return [float64.check(f"{group}: {name}", ours[name], truth[name], tolerance=tolerance) for name in truth]


def _check_encoding(bench: Bench) -> list[float64.Check]:
    grid, table = bench.config.field.encoding, bench.state.state.params["encoding"]["table"]
    position = bench.state.inputs.position[:CHECKED]
    gradient = jax.random.normal(jax.random.key(2), (len(position), grid.num_outputs))

    def ours(table: jax.Array, position: jax.Array, gradient: jax.Array) -> dict[str, jax.Array]:
        features, vjp = jax.vjp(functools.partial(hash_encode, grid=grid), table, position)
        return dict(zip(ENCODING, (features, *vjp(gradient)), strict=True))

    truth = float64.encode(*map(np.asarray, (table, position, gradient)), grid=grid)
    return _compare("encode", jax.jit(ours)(table, position, gradient), truth)


ENCODING = ("features", "gradient of the table", "gradient of the position")
COMPOSITE = ("colour", "opacity", "depth", "gradient of the density", "gradient of the colour")
NETWORKS = ("density", "colour", "gradient of the features", "gradient of the weights")


def _check_composite(bench: Bench) -> list[float64.Check]:
    inputs = bench.state.inputs
    count = min(CHECKED, len(inputs.density))
    num_rays = int(inputs.samples.ray[count - 1]) + 1
    density, rgb = inputs.density[:count], inputs.rgb[:count]
    others = (inputs.samples.t[:count], inputs.samples.dt[:count], inputs.samples.ray[:count])
    background = inputs.noise.background[:num_rays]
    gradient = jax.random.normal(jax.random.key(3), background.shape)

    def ours(density: jax.Array, rgb: jax.Array) -> dict[str, jax.Array]:
        out, vjp = jax.vjp(lambda density, rgb: composite(density, rgb, *others, background), density, rgb)
        zeros = jax.tree.map(jnp.zeros_like, out)
        return dict(zip(COMPOSITE, (out.rgb, out.opacity, out.depth, *vjp(replace(zeros, rgb=gradient))), strict=True))

    truth = float64.composite(*map(np.asarray, (density, rgb, *others, background, gradient)))
    return _compare("composite", jax.jit(ours)(density, rgb), truth)


def _check_networks(bench: Bench) -> list[float64.Check]:
    inputs, config = bench.state.inputs, bench.config.field
    features, direction = inputs.features[:CHECKED], inputs.direction[:CHECKED]
    mlps = {name: value for name, value in bench.state.state.params.items() if name != "encoding"}
    keys = jax.random.split(jax.random.key(4))
    # Densities differ by orders of magnitude, and the largest would decide alone.
    density_gradient = jax.random.normal(keys[0], (len(features),)) / (1 + inputs.density[:CHECKED])
    rgb_gradient = jax.random.normal(keys[1], (len(features), 3))

    def ours(features: jax.Array, mlps: Any) -> dict[str, jax.Array]:
        networks = functools.partial(run_networks, field=config)
        out, vjp = jax.vjp(lambda features, mlps: networks(features, direction, mlps), features, mlps)
        inner, weights = vjp((density_gradient, rgb_gradient))
        kernels = [layer["kernel"] for name in ("density_mlp", "colour_mlp") for layer in float64.layers(weights[name])]
        flat = jnp.concatenate([kernel.ravel() for kernel in kernels])
        return dict(zip(NETWORKS, (jnp.log(out[0]), out[1], inner, flat), strict=True))

    if config.direction_encoding == "frequency":
        encoded = frequency_encode(direction, num_frequencies=config.direction_degree)
    else:
        encoded = sh_encode(direction, degree=config.direction_degree)
    truth = float64.networks(mlps, *map(np.asarray, (features, encoded, density_gradient, rgb_gradient)))
    truth["density"] = np.log(truth["density"])
    return _compare("networks", jax.jit(ours)(features, mlps), truth)


# 3. The whole step.


class Dispatch:
    """A compiled dispatch of `count` training steps, which goes on with a state of its own, in place."""

    def __init__(self, bench: Bench, count: int, options: Mapping[str, Any] | None = None) -> None:
        started = time.perf_counter()
        trained, self.count = bench.state, count
        self.arguments = (trained.data, trained.pixels, jnp.full(count, 1e-3), jnp.int32(count))
        lowered = steps.nerf_steps.lower(trained.state, *self.arguments, config=bench.config)
        self.compiled = lowered.compile(compiler_options=dict(options or {}))
        self.compile_seconds = time.perf_counter() - started
        self.start: TrainState | None = trained.state

    def __call__(self) -> Any:
        if self.start is not None:
            self.state, self.start = jax.tree.map(jnp.copy, self.start), None
        self.state, self.metrics = self.compiled(self.state, *self.arguments)
        return self.state.step, self.metrics

    @property
    def temporary_bytes(self) -> int:
        analysis = self.compiled.memory_analysis()
        return analysis.temp_size_in_bytes if analysis else 0

    def ms_per_step(self) -> float:
        """The median of RUNS times; single steps are timed by the dozen, each until it is ready, as training does."""
        calls = max(1, 16 // self.count)

        def several() -> None:
            for _ in range(calls):
                jax.block_until_ready(self())

        return median_ms({"": several}, runs=RUNS)[""] / (calls * self.count)


def step(bench: Bench) -> None:
    config = bench.config
    count = config.train.steps_per_dispatch
    programs = build_all(bench, {"many": lambda: Dispatch(bench, count), "one": lambda: Dispatch(bench, 1)})
    many, one = programs["many"], programs["one"]
    ms, single = many.ms_per_step(), one.ms_per_step()
    metrics = {name: float(getattr(many.metrics, name)) for name in ("rays", "samples", "dropped_samples")}
    found = {
        "ms": ms,
        "ms_one_a_dispatch": single,
        "steps_per_dispatch": count,
        "temporary_bytes": many.temporary_bytes,
        "compile_seconds": many.compile_seconds,
        "msamples_per_s": 1e-3 * metrics["samples"] / ms,
        **metrics,
    }
    bench.say(f"{ms:.3f} ms a step with {count} steps a dispatch; {predicted(ms, _step_prediction(bench))}")
    bench.say(f"{single:.3f} ms with one step a dispatch")
    bench.say(
        f"{metrics['samples']:.0f} samples and {metrics['rays']:.0f} rays used a step, ",
    )
    bench.say(f"{found['msamples_per_s']:.1f} Msamples/s; temporary memory {many.temporary_bytes / 1e6:.0f} MB")
    bench.record(step=found)


def _step_prediction(bench: Bench) -> Prediction:
    sampler = bench.config.sampler
    assert isinstance(sampler, MarchConfig)
    return gpu_stages.STEP.scaled(sampler.num_samples)


def predicted(ms: float, prediction: Prediction) -> str:
    (low, high), (plain_low, plain_high) = prediction.floor, prediction.plain
    return f"predicted {plain_low:.2f}-{plain_high:.2f}, floor {low:.2f}-{high:.2f}: {ms / low:.1f} times the floor"


# 4. Profile.


def profile(bench: Bench) -> None:
    dispatch = Dispatch(bench, bench.config.train.steps_per_dispatch)
    jax.block_until_ready(dispatch())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(TRACED):
                jax.block_until_ready(dispatch())
        trace, events = gpu_profile.read_trace(Path(folder))
        kept = trace.stat().st_size <= MAX_TRACE_BYTES
        if kept:
            shutil.copy(trace, bench.output / "trace.xplane.pb")
    num_steps = TRACED * dispatch.count
    sources = gpu_profile.hlo_sources(dispatch.compiled.as_text() or "")
    kernels = gpu_profile.kernel_table(events, num_steps=num_steps, sources=sources)
    times = gpu_profile.occupation(events, num_steps=num_steps)
    header(bench, "kernel", "HLO", "us a step", "runs a step", "from")
    for kernel in kernels[:40]:
        source = gpu_profile.short_source(kernel.source)
        bench.say(f"| {kernel.name[:60]} | {kernel.op} | {kernel.us:.1f} | {kernel.count:.2f} | {source} |")
    runs = sum(kernel.count for kernel in kernels)
    bench.say(
        f"\n{len(kernels)} kernels in {runs:.0f} runs a step: {times.busy_us:.0f} us busy, {times.idle_us:.0f} idle"
    )
    bench.say(f"trace {'kept' if kept else 'too large to keep'}")
    bench.record(profile={**asdict(times), "runs": runs, "kernels": [asdict(kernel) for kernel in kernels]})


# 5. Stages.


def stages(bench: Bench) -> None:
    config, trained = bench.config, bench.state
    given = gpu_stages.all_stages(config, trained.batches)
    makers: dict[str, Callable[[], Any]] = {name: stage.build for name, stage in given.items()}
    makers["optimiser"] = lambda: optimiser_calls(config, trained.state)[0]
    makers["occupancy refresh, a step's share"] = lambda: _refresh(bench)
    programs = build_all(bench, makers)
    header(bench, "stage", "ms", "floor, predicted", "times it", "plain XLA, predicted", "times it")
    for name, program in programs.items():
        if bench.late():
            bench.say("the rest is skipped, for lack of time")
            break
        ms = median_ms({name: program}, runs=RUNS)[name]
        prediction: Prediction | None
        if name == "optimiser":
            ms /= OPTIMISER_ROUNDS
            prediction = gpu_stages.OPTIMISER.scaled(num_bytes(trained.state.params) / 4)
        elif name in given:
            ms /= given[name].rounds
            prediction = given[name].prediction
        else:
            assert isinstance(config.sampler, MarchConfig)
            ms /= config.sampler.occupancy.refresh_every
            prediction = gpu_stages.REFRESH
        bench.say(stage_line(name, ms, prediction))
        found = {"ms": ms, "predicted": prediction and asdict(prediction)}
        bench.record(stages={**bench.results.get("stages", {}), name: found})


def _refresh(bench: Bench) -> Callable[[], Any]:
    compiled = steps.refresh_occupancy.lower(bench.state.state, config=bench.config).compile()
    held = jax.tree.map(jnp.copy, bench.state.state)

    def call() -> Any:
        nonlocal held
        held = compiled(held)
        return held.occupancy

    return call


def stage_line(name: str, ms: float, prediction: Prediction | None) -> str:
    """A row of the table; ratios are to the middle of what was predicted."""
    if prediction is None:
        return f"| {name} | {ms:.3f} |  |  |  |  |"
    cells = [
        f"{low:.3f}-{high:.3f} | {2 * ms / (low + high):.1f}" for low, high in (prediction.floor, prediction.plain)
    ]
    return f"| {name} | {ms:.3f} | {' | '.join(cells)} |"


# 6. Flags.


def xla_options(bench: Bench) -> None:
    """The whole step under other options of XLA, each in a program of its own."""
    quick, last = dict(list(XLA_OPTIONS.items())[:-1]), dict(list(XLA_OPTIONS.items())[-1:])
    for group in (quick, last):
        if bench.late():
            bench.say(f"{', '.join(group)}: skipped, for lack of time")
            continue
        count = bench.config.train.steps_per_dispatch
        makers = {name: functools.partial(Dispatch, bench, count, options) for name, options in group.items()}
        programs = build_all(bench, makers)
        header(bench, "options", "ms a step", "temporary MB", "compiled in s")
        for name, dispatch in programs.items():
            ms, megabytes = dispatch.ms_per_step(), dispatch.temporary_bytes / 1e6
            bench.say(f"| {name} | {ms:.3f} | {megabytes:.0f} | {dispatch.compile_seconds:.1f} |")
            found = {"ms": ms, "temporary_mb": megabytes, "options": group[name]}
            bench.record(flags={**bench.results.get("flags", {}), name: found})
        bench.say()


# 7. Rendering.


def render(bench: Bench) -> None:
    header(bench, "frame", "ms, to the host", "ms, on the device", "Msamples", "samples needed", "fill")
    for width, height in bench.sizes.frames:
        found = _frame(bench, width, height)
        million, fill = 1e-6 * found["evaluations"], found["needed"] / found["evaluations"]
        times = f"{found['ms']:.1f} | {found['device_ms']:.1f}"
        bench.say(f"| {width}x{height} | {times} | {million:.2f} | {1e-6 * found['needed']:.2f} M | {fill:.0%} |")
        bench.record(render={**bench.results.get("render", {}), f"{width}x{height}": {**found, "fill": fill}})
    bench.say(f"\nmedian of {max(bench.sizes.poses, RUNS)} frames of {bench.sizes.poses} poses on an orbit")


def _frame(bench: Bench, width: int, height: int) -> dict[str, float]:
    """Times of a frame, evaluations of the field, and how many of these an eye would need: medians over the poses."""
    config, trained = bench.config, bench.state
    camera = resize_camera(trained.data.camera, width, height)
    poses = [jnp.asarray(pose) for pose in orbit_poses(np.asarray(trained.data.c2w), bench.sizes.poses)]
    params, occupancy = trained.state.eval_params, trained.state.occupancy
    settings: dict[str, Any] = {"make_field": field_maker(config.field), "sampler": config.sampler}

    def on_device(pose: jax.Array) -> list[tuple[Any, jax.Array]]:
        rays = jax.tree.map(lambda a: a.reshape(-1, 3), jax.jit(view_rays)(camera, pose))
        total = width * height
        chunk = -(-total // -(-total // CHUNK))
        index = np.minimum(np.arange(-(-total // chunk) * chunk), total - 1).reshape(-1, chunk)
        parts = [jax.tree.map(lambda a, rows=rows: a[rows], rays) for rows in index]
        return [render_chunk(params, part, occupancy, jnp.ones(3), **settings) for part in parts]

    def seconds(call: Callable[[jax.Array], Any], pose: jax.Array) -> float:
        started = time.perf_counter()
        jax.block_until_ready(call(pose))
        return time.perf_counter() - started

    def to_host(pose: jax.Array) -> Any:
        return render_image(params, camera, pose, occupancy, jnp.ones(3), **settings)

    for call in (to_host, on_device):
        seconds(call, poses[0])  # compiles
    turns = (poses * RUNS)[: max(RUNS, len(poses))]
    return {
        "ms": 1e3 * float(np.median([seconds(to_host, pose) for pose in turns])),
        "device_ms": 1e3 * float(np.median([seconds(on_device, pose) for pose in turns])),
        "evaluations": float(np.median([sum(int(n) for _, n in on_device(pose)) for pose in poses])),
        "needed": float(np.median([_needed(bench, camera, pose) for pose in poses])),
    }


def _needed(bench: Bench, camera: Camera, pose: jax.Array) -> float:
    """Samples in occupied cells that enough light reaches, of a frame: estimated from a quarter of its size."""
    config, state = bench.config, bench.state.state
    sampler, occupancy = config.sampler, state.occupancy
    assert isinstance(sampler, MarchConfig)
    assert occupancy is not None
    small = resize_camera(camera, camera.width // 4, camera.height // 4)
    rays = jax.tree.map(lambda a: a.reshape(-1, 3), jax.jit(view_rays)(small, pose))
    jitter = jnp.full(len(rays.origin), 0.5)
    candidates = jax.jit(find_candidates, static_argnames="config")(rays, occupancy, jitter, config=sampler)
    total = int(jnp.sum(jax.lax.population_count(candidates.words), dtype=jnp.int32))
    size = max(sampler.num_steps, 1 << (total - 1).bit_length())  # few sizes, for each is a program
    packed = jax.jit(pack_steps, static_argnames="config")(
        candidates, jitter, config=replace(sampler, num_samples=size)
    )
    position = rays.origin[packed.ray] + packed.t[:, None] * rays.direction[packed.ray]
    density = jax.jit(evaluate_density, static_argnames="config")(state.eval_params, position, config=config.field)
    light = float64.light_before(*map(np.asarray, (density, packed.dt, packed.ray)))
    seen = np.sum((light >= sampler.min_transmittance) & np.asarray(packed.valid))
    return float(seen) * camera.width * camera.height / (small.width * small.height)


# 8. PSNR.


class Judge(race.Judge):
    """Evaluates at MARKS and says and records at once what it finds."""

    def __init__(self, bench: Bench) -> None:
        super().__init__("", bench.psnr_seconds, 0.0, marks=MARKS)
        self.bench = bench
        self.bar.disable = True

    def ended(self, seconds: float, step: int, evaluate: Callable[[], float]) -> bool:
        known = len(self.curve.psnr)
        finished = super().ended(seconds, step, evaluate)
        if len(self.curve.psnr) > known:
            mark = reached_mark(seconds)
            cells = [f"{values[mark]:.2f}" if mark in values else "" for values in (PUBLISHED_PSNR, TARGET_PSNR)]
            self.bench.say(f"| {seconds:.1f} | {step} | {self.curve.psnr[-1]:.2f} | {' | '.join(cells)} |")
            self.bench.record(psnr={**self.bench.results.get("psnr", {}), "curve": asdict(self.curve)})
        return finished


def reached_mark(seconds: float) -> float:
    """The last of MARKS that is past, or 0."""
    return max([mark for mark in MARKS if mark <= seconds], default=0.0)


def psnr(bench: Bench) -> None:
    """Trains anew for the seconds given; the clock stands still while views are rendered and scored."""
    evaluation = load_evaluation(bench.config.scene, num_views=bench.eval_views)
    size = "x".join(map(str, evaluation.resolution))
    views = f"{evaluation.name} split, {evaluation.num_views} views of {size}, white background, sRGB"
    bench.say(f"{bench.config.scene.name}: {views}; published: lego's test split, RTX 3090\n")
    bench.record(psnr={"views": views, "published": PUBLISHED_PSNR, "targets": TARGET_PSNR})
    header(bench, "seconds", "steps", "PSNR, dB", "published", "target")
    limits = replace(bench.config.train, max_seconds=bench.psnr_seconds, max_steps=10**7)
    race.run_preset(replace(bench.config, train=limits), bench.training, evaluation, Judge(bench))


# The headline.


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
    """The figures that were measured, from the results as they stand. frame: the name of the one that counts."""
    trained, curve = results.get("train", {}), results.get("psnr", {}).get("curve", {})
    peak = trained.get("peak_bytes")
    reached = dict(zip(map(reached_mark, curve.get("seconds", ())), curve.get("psnr", ()), strict=True))
    return [
        Headline("step, ms", results.get("step", {}).get("ms"), TARGETS["step, ms"]),
        Headline("peak device memory of training, MB", peak and peak / 1e6, TARGETS["memory, MB"]),
        Headline(f"frame of {frame}, ms", results.get("render", {}).get(frame, {}).get("ms"), TARGETS["frame, ms"]),
        Headline("compilation before training, s", trained.get("compile_seconds"), TARGETS["compilation, s"]),
        *[
            Headline(f"PSNR after {mark:g} s, dB", reached.get(mark), TARGET_PSNR[mark], more=True)
            for mark in TARGET_PSNR
        ],
    ]


# The command.

ALL = (
    Section("versions", versions, 2, trains=False),
    Section("ceilings", ceilings, 40, trains=False),
    Section("correctness", correctness, 20),
    Section("step", step, 30),
    Section("profile", profile, 20),
    Section("stages", stages, 90),
    Section("flags", xla_options, 90),
    Section("render", render, 40, headline=True),
    Section("psnr", psnr, 90, trains=False, headline=True),
)


def choose_sections(names: Sequence[str], psnr_seconds: float) -> list[Section]:
    """Those named, in their own order, with the training that they need before the first but the versions."""
    if unknown := set(names) - {section.name for section in ALL}:
        raise InputError(f"--sections: unknown {min(unknown)!r}; there are {','.join(s.name for s in ALL)}")
    chosen = [section for section in ALL if section.name in names]
    chosen = [replace(s, seconds=psnr_seconds + 30) if s.name == "psnr" else s for s in chosen]
    if any(section.trains for section in chosen):
        first = 1 if chosen[0].name == "versions" else 0
        chosen.insert(first, Section("train", train_state, 45, headline=True))
    return chosen


def define_flags(values: flags.Flags) -> None:
    absl_flags.DEFINE_string("scene", "bricks", "As for training.", flag_values=values)
    absl_flags.DEFINE_string("data_dir", "", "Folder that holds the scene.", flag_values=values)
    absl_flags.DEFINE_integer("downscale", 1, "Shrink the images by this factor.", 1, flag_values=values)
    absl_flags.DEFINE_string("preset", "base", "A preset that marches.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "Set a field of the config.", flag_values=values)
    absl_flags.DEFINE_integer("eval_views", 4, "Evenly spaced views to evaluate.", 1, flag_values=values)
    absl_flags.DEFINE_float("seconds", 60.0, "Of training, for the PSNR.", 0.1, flag_values=values)
    absl_flags.DEFINE_float("budget", 480.0, "Seconds for everything.", 1.0, flag_values=values)
    names = [section.name for section in ALL]
    absl_flags.DEFINE_list("sections", names, f"Of {', '.join(names)}.", flag_values=values)
    absl_flags.DEFINE_bool("toy", False, "Everything small enough for a CPU.", flag_values=values)
    absl_flags.DEFINE_string("output", "runs/gpu_bench", "Folder for results and trace.", flag_values=values)


def main(values: flags.Flags) -> None:
    end = time.monotonic() + values.budget
    if "xla_gpu_enable_triton_gemm" not in os.environ.get("XLA_FLAGS", ""):  # read when the device is first used
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_TRITON}".strip()
    if values.preset not in PRESETS:
        raise InputError(f"--preset: unknown {values.preset!r}; there are {', '.join(PRESETS)}")
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    overrides = [*(TOY_OVERRIDES if values.toy else ()), *values.override]
    config = apply_overrides(replace(PRESETS[values.preset], scene=scene), overrides)
    if not isinstance(config.sampler, MarchConfig):
        raise InputError(f"--preset={values.preset} does not march, and this times marching: try base")
    sections = choose_sections(values.sections, values.seconds)
    training = load_training(scene)
    if not isinstance(training.images, PosedImages):
        raise InputError(f"{scene.name} is a ray table: this needs views")
    sizes = TOY if values.toy else FULL
    bench = Bench(config, sizes, Path(values.output), values.eval_views, values.seconds, end, training)
    failed = run_sections(bench, sections, end)
    bench.say("\n## headline\n")
    header(bench, "figure", "measured", "target", "")
    for headline in headlines(bench.results, "x".join(map(str, sizes.frames[0]))):
        bench.say(str(headline))
    bench.record(failed=failed)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    flags.run("experiments.gpu_bench", define_flags, main, __doc__ or "")
