"""The sections of `experiments.gpu_bench`, in its order."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import float64, gpu_checks, gpu_profile, gpu_stages, race
from experiments.gpu_run import RUNS, Bench, Trained, build_all
from experiments.gpu_stages import ROUNDS, Prediction
from experiments.throughput import OPTIMISER_ROUNDS, num_bytes, optimiser_calls, step_inputs, training_stages
from experiments.timing import median_ms
from jaxngp.cameras import Camera, PosedImages, orbit_poses, resize_camera, view_rays
from jaxngp.config import MarchConfig
from jaxngp.data import load_evaluation
from jaxngp.fields import evaluate_density, field_maker
from jaxngp.marching import find_candidates, pack_steps
from jaxngp.rendering import chunk_program, default_batching, render_image
from jaxngp.training import steps
from jaxngp.training.loop import train
from jaxngp.training.report import environment

# 0. Versions.


def versions(bench: Bench) -> None:
    about = environment()
    about |= {"python": sys.version.split()[0], "xla_flags": os.environ.get("XLA_FLAGS", "")}
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    about |= {"commit": _output("git", "rev-parse", "HEAD"), "changed_files": len(changes.splitlines())}
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    about["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    for name, value in about.items():
        bench.say(f"{name}: {value}")
    bench.record("about", about)


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else ""


# A state to measure with.


def train_state(bench: Bench) -> None:
    """Trains first of all, while the peak of the device's memory is still that of training."""
    config, images = bench.config, bench.training.images
    assert isinstance(images, PosedImages)
    limits = replace(config.train, max_seconds=0.0, max_steps=bench.sizes.training_steps)
    *_, progress = train(replace(config, train=limits), images)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    ms = 1e3 * progress.seconds / progress.step
    bench.say(f"{progress.step} steps, {ms:.2f} ms each with everything; compiled in {progress.compile_seconds:.1f} s")
    bench.say(f"peak device memory of training: {'unknown' if peak is None else f'{peak / 1e6:.0f} MB'}")
    bench.add("train", steps=progress.step, ms=ms, compile_seconds=progress.compile_seconds, peak_bytes=peak)
    state, data = progress.state, jax.device_put(images, jax.devices()[0])  # by name, as `train` has it: one program
    _, pixels = steps.survey_views(data, config=config)
    inputs = step_inputs(jax.random.key(1), state, data, pixels, config=config)
    batches = [training_stages(config, state, data, pixels, seed=1 + i) for i in range(bench.sizes.batches)]
    bench.state = Trained(state, data, pixels, inputs, batches)


# 1. Ceilings.


def ceilings(bench: Bench) -> None:
    given = gpu_stages.ceilings(scale=bench.sizes.ceilings)
    programs = build_all(bench, {name: ceiling.build for name, ceiling in given.items()})
    bench.header("ceiling", "a second", "ms")
    for name, program in programs.items():
        if bench.late():
            bench.say("the rest is skipped, for lack of time")
            break
        ms = median_ms({name: program}, runs=RUNS)[name] / ROUNDS
        rate, unit = given[name].amount / (1e-3 * ms), given[name].unit
        bench.say(f"| {name} | {rate:.3g} {unit} | {ms:.3f} |")
        bench.add("ceilings", **{name: {"rate": rate, "unit": unit, "ms": ms}})


# 2. Correctness.


def correctness(bench: Bench) -> None:
    bench.header("array", "relative error", "of the largest", "tolerance", "")
    trained = bench.trained
    for check in gpu_checks.all_checks(bench.config.field, trained.state.params, trained.inputs):
        numbers = f"{check.error:.1e} | {check.largest:.1e} | {check.tolerance:.0e}"
        bench.say(f"| {check.name} | {numbers} | {'pass' if check.passed else 'FAIL'} |")
        bench.add("correctness", **{check.name: {**asdict(check), "passed": check.passed}})


# 3. The whole step.


def step(bench: Bench) -> None:
    config = bench.config
    assert isinstance(config.sampler, MarchConfig)
    count = config.train.steps_per_dispatch
    build_all(bench, {f"{n} a dispatch": functools.partial(bench.dispatch, n) for n in {count, 1}})
    many, one = bench.dispatch(count), bench.dispatch(1)
    ms = many.ms_per_step()
    prediction = gpu_stages.STEP.scaled(config.sampler.num_samples)
    bench.say(f"{ms:.3f} ms a step with {count} steps a dispatch; {in_words(ms, prediction)}")
    bench.add("step", ms=ms, steps_per_dispatch=count, predicted=asdict(prediction))
    single = one.ms_per_step()
    bench.say(f"{single:.3f} ms a step with one step a dispatch")
    used = {name: float(getattr(many.metrics, name)) for name in ("samples", "rays", "dropped_samples")}
    rate = 1e-3 * used["samples"] / ms
    bench.say(f"{used['samples']:.0f} samples and {used['rays']:.0f} rays used a step: {rate:.1f} Msamples/s")
    bench.say(f"temporary memory {many.temporary_bytes / 1e6:.0f} MB, compiled in {many.compile_seconds:.1f} s")
    bench.add("step", ms_one_a_dispatch=single, msamples_per_s=rate, **used)
    bench.add("step", temporary_bytes=many.temporary_bytes, compile_seconds=many.compile_seconds)


def in_words(ms: float, prediction: Prediction) -> str:
    (low, high), (plain_low, plain_high) = prediction.floor, prediction.plain
    return f"predicted {plain_low:.2f}-{plain_high:.2f}, floor {low:.2f}-{high:.2f}: {ms / low:.1f} times the floor"


# 4. Profile.

MAX_TRACE_BYTES = 14 * 10**6
TRACED = 3  # dispatches


def profile(bench: Bench) -> None:
    dispatch = bench.dispatch(bench.config.train.steps_per_dispatch)
    jax.block_until_ready(dispatch())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.enable_hlo_proto = False  # most of the file, and the kernels are told apart without it
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(TRACED):
                jax.block_until_ready(dispatch())
        trace, events = gpu_profile.read_trace(Path(folder))
        size = trace.stat().st_size
        if size <= MAX_TRACE_BYTES:
            shutil.copy(trace, bench.output / "trace.xplane.pb")
    num_steps = TRACED * dispatch.count
    sources = gpu_profile.hlo_sources(dispatch.compiled.as_text() or "")
    kernels = gpu_profile.kernel_table(events, num_steps=num_steps, sources=sources)
    times = gpu_profile.occupation(events, num_steps=num_steps)
    bench.header("kernel", "HLO", "us a step", "runs a step", "from")
    for kernel in kernels[:40]:
        source = gpu_profile.short_source(kernel.source)
        bench.say(f"| {kernel.name[:60]} | {kernel.op} | {kernel.us:.1f} | {kernel.count:.2f} | {source} |")
    runs = sum(kernel.count for kernel in kernels)
    bench.say(
        f"\n{len(kernels)} kernels, {runs:.0f} runs a step; {times.busy_us:.0f} us busy, {times.idle_us:.0f} idle"
    )
    bench.say(f"trace of {size / 1e6:.1f} MB {'kept' if size <= MAX_TRACE_BYTES else 'not kept'}")
    bench.record("profile", {**asdict(times), "runs": runs, "kernels": [asdict(kernel) for kernel in kernels]})


# 5. Stages.


def stages(bench: Bench) -> None:
    """The parts of a step one by one, and variants of some.

    What was predicted for the march counts packing too, and for compositing the loss and Adam on the networks.
    """
    config, trained = bench.config, bench.trained
    assert isinstance(config.sampler, MarchConfig)
    given = gpu_stages.all_stages(config, trained.batches)
    makers: dict[str, Callable[[], Any]] = {name: stage.build for name, stage in given.items()}
    makers["optimiser"] = lambda: optimiser_calls(config, trained.state)[0]
    makers["occupancy refresh, a step's share"] = lambda: _refresh(bench)
    predictions = {name: stage.prediction for name, stage in given.items()}
    predictions["optimiser"] = gpu_stages.OPTIMISER.scaled(num_bytes(trained.state.params) / 4)
    predictions["occupancy refresh, a step's share"] = gpu_stages.REFRESH
    rounds = {name: stage.rounds for name, stage in given.items()}
    rounds["optimiser"] = OPTIMISER_ROUNDS
    rounds["occupancy refresh, a step's share"] = config.sampler.occupancy.refresh_every
    programs = build_all(bench, makers)
    bench.header("stage", "ms", "floor, predicted", "times it", "plain XLA, predicted", "times it")
    for name, program in programs.items():
        if bench.late():
            bench.say("the rest is skipped, for lack of time")
            break
        ms, prediction = median_ms({name: program}, runs=RUNS)[name] / rounds[name], predictions[name]
        bench.say(stage_line(name, ms, prediction))
        bench.add("stages", **{name: {"ms": ms, "predicted": prediction and asdict(prediction)}})


def _refresh(bench: Bench) -> Callable[[], Any]:
    held = jax.tree.map(jnp.copy, bench.trained.state)
    compiled = steps.refresh_occupancy.lower(held, config=bench.config).compile()

    def call() -> Any:
        nonlocal held
        held = compiled(held)
        return held.occupancy

    return call


def stage_line(name: str, ms: float, prediction: Prediction | None) -> str:
    """A row of the table; ratios are to the middle of what was predicted."""
    if prediction is None:
        return f"| {name} | {ms:.3f} |  |  |  |  |"
    ranges = (prediction.floor, prediction.plain)
    cells = [f"{low:.3f}-{high:.3f} | {2 * ms / (low + high):.1f}" for low, high in ranges]
    return f"| {name} | {ms:.3f} | {' | '.join(cells)} |"


# 6. Flags.

NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
"""In XLA_FLAGS, for all programs: to tune Triton's matmuls takes minutes on one core."""

COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"  # what a command buffer may hold
XLA_OPTIONS: dict[str, dict[str, Any]] = {
    "as everything else": {},
    "Triton matmuls": {"xla_gpu_enable_triton_gemm": True},
    "no command buffers": {"xla_gpu_graph_min_graph_size": 10**6},
    "command buffers for few kernels": {"xla_gpu_graph_min_graph_size": 1},
    "command buffers for loops": {"xla_gpu_enable_command_buffer": f"{COMMANDS},WHILE"},
    "flush denormals": {"xla_gpu_ftz": True},
    "no autotuning": {"xla_gpu_autotune_level": 0},
    "latency hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "double-buffered loops": {"xla_gpu_enable_while_loop_double_buffering": True},
    "cuBLASLt": {"xla_gpu_enable_cublaslt": True},
}
SLOW = {"Triton matmuls": 60.0}  # seconds to compile, with the cores of a GPU's host


def xla_options(bench: Bench) -> None:
    """The whole step under other options of XLA; what takes longest to compile comes last, if there is time."""
    count = bench.config.train.steps_per_dispatch
    names = list(XLA_OPTIONS)[: bench.sizes.options]
    for group in ([n for n in names if n not in SLOW], [n for n in names if n in SLOW]):
        if not group:
            continue
        if bench.late(sum(SLOW.get(name, 0.0) for name in group)):
            bench.say(f"{', '.join(group)}: skipped, for lack of time")
            continue
        programs = build_all(bench, {n: functools.partial(bench.dispatch, count, XLA_OPTIONS[n]) for n in group})
        bench.header("options", "ms a step", "temporary MB", "compiled in s")
        for name, dispatch in programs.items():
            ms, megabytes = dispatch.ms_per_step(), dispatch.temporary_bytes / 1e6
            bench.say(f"| {name} | {ms:.3f} | {megabytes:.0f} | {dispatch.compile_seconds:.1f} |")
            bench.add("flags", **{name: {"ms": ms, "temporary_mb": megabytes, "options": XLA_OPTIONS[name]}})
        bench.say()


# 7. Rendering.


def render(bench: Bench) -> None:
    """Whole frames. Of the samples those are needed that lie in occupied cells and are reached by enough light."""
    frames = {f"{width}x{height}": Frame(bench, width, height) for width, height in bench.sizes.frames}
    programs = build_all(bench, {name: frame.measured_once for name, frame in frames.items()})
    bench.header("frame", "ms, on the device", "ms, to the host", "Msamples", "needed", "fill")
    for name in programs:
        found = frames[name].measure()
        times = f"{found['device_ms']:.1f} | {found['host_ms']:.1f}"
        samples = f"{1e-6 * found['evaluations']:.2f} | {1e-6 * found['needed']:.2f}"
        fill = found["needed"] / found["evaluations"]
        bench.say(f"| {name} | {times} | {samples} | {fill:.0%} |")
        bench.add("render", **{name: {**found, "fill": fill}})


class Frame:
    """Frames of one size, from poses on an orbit."""

    def __init__(self, bench: Bench, width: int, height: int) -> None:
        self.config, self.state = bench.config, bench.trained.state
        self.camera = resize_camera(bench.trained.data.camera, width, height)
        self.poses = list(jnp.asarray(orbit_poses(np.asarray(bench.trained.data.c2w), bench.sizes.poses)))
        self.settings: dict[str, Any] = {"make_field": field_maker(bench.config.field), "sampler": bench.config.sampler}

    def measured_once(self) -> None:
        """Compiles all that `measure` runs."""
        self.to_host(self.poses[0]), self.on_device(self.poses[0]), self.needed(self.poses[0])

    def measure(self) -> dict[str, float]:
        """Medians over the poses, each rendered at least once, and RUNS times in all."""
        turns = (self.poses * RUNS)[: max(RUNS, len(self.poses))]
        return {
            "device_ms": float(np.median([_ms(self.on_device, pose) for pose in turns])),
            "host_ms": float(np.median([_ms(self.to_host, pose) for pose in turns])),
            "evaluations": float(np.median([sum(int(n) for _, n in self.on_device(pose)) for pose in self.poses])),
            "needed": float(np.median([self.needed(pose) for pose in self.poses])),
        }

    def to_host(self, pose: jax.Array) -> Any:
        params, occupancy = self.state.eval_params, self.state.occupancy
        return render_image(params, self.camera, pose, occupancy, jnp.ones(3), **self.settings)

    def on_device(self, pose: jax.Array) -> list[tuple[Any, jax.Array]]:
        """What `render_image` does before it copies: for each chunk the colours, and the evaluations of the field."""
        rays = _flat_rays(self.camera, pose)
        total = len(rays.origin)
        batching = default_batching()
        chunk = -(-total // -(-total // batching.rays))
        index = np.minimum(np.arange(-(-total // chunk) * chunk), total - 1).reshape(-1, chunk)
        parts = [jax.tree.map(lambda a, rows=rows: a[rows], rays) for rows in index] if len(index) > 1 else [rays]
        params, occupancy = self.state.eval_params, self.state.occupancy
        program = chunk_program(**self.settings, batching=batching)
        return [program(params, part, occupancy, jnp.ones(3)) for part in parts]

    def needed(self, pose: jax.Array) -> float:
        """Samples in occupied cells that enough light reaches, estimated from a frame a quarter as wide and high."""
        sampler, occupancy = self.config.sampler, self.state.occupancy
        assert isinstance(sampler, MarchConfig)
        assert occupancy is not None
        small = resize_camera(self.camera, self.camera.width // 4, self.camera.height // 4)
        rays = _flat_rays(small, pose)
        jitter = jnp.full(len(rays.origin), 0.5)
        candidates = jax.jit(find_candidates, static_argnames="config")(rays, occupancy, jitter, config=sampler)
        total = int(jnp.sum(jax.lax.population_count(candidates.words), dtype=jnp.int32))
        sampler = replace(sampler, num_samples=max(sampler.num_steps, 1 << total.bit_length()))  # few programs
        samples = jax.jit(pack_steps, static_argnames="config")(candidates, jitter, config=sampler)
        position = rays.origin[samples.ray] + samples.t[:, None] * rays.direction[samples.ray]
        evaluate = jax.jit(evaluate_density, static_argnames="config")
        density = evaluate(self.state.eval_params, position, config=self.config.field)
        light = float64.light_before(*map(np.asarray, (density, samples.dt, samples.ray)))
        seen = np.sum((light >= sampler.min_transmittance) & np.asarray(samples.valid))
        return float(seen) * self.camera.width * self.camera.height / len(rays.origin)


def _flat_rays(camera: Camera, pose: jax.Array) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, 3), jax.jit(view_rays)(camera, pose))


def _ms(call: Callable[[jax.Array], Any], pose: jax.Array) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call(pose))
    return 1e3 * (time.perf_counter() - started)


# 8. PSNR.

PUBLISHED_PSNR = {5.0: 30.13, 15.0: 33.68, 60.0: 35.63, 300.0: 36.39}  # dB, lego, by the paper, on an RTX 3090
TARGET_PSNR = {2.0: 30.1, 5.0: 33.7, 15.0: 35.6, 60.0: 36.4}  # dB, after so many seconds of training


def psnr(bench: Bench) -> None:
    """Trains anew for 2, 5, 15 and 60 s, up to the seconds given: a run each, since learning slows toward its end.

    The clock stands still while programs are compiled, and while views are rendered and scored.
    """
    evaluation = load_evaluation(bench.config.scene, num_views=bench.eval_views)
    size = "x".join(map(str, evaluation.resolution))
    views = f"{evaluation.name} split, {evaluation.num_views} views of {size}, white background, sRGB"
    bench.say(f"{bench.config.scene.name}: {views}; published: lego's test split\n")
    bench.add("psnr", views=views, published=PUBLISHED_PSNR, targets=TARGET_PSNR)
    bench.header("seconds", "steps", "PSNR, dB", "published", "target")
    runs: list[dict[str, float]] = []
    for budget in psnr_budgets(bench.psnr_seconds):
        limits = replace(bench.config.train, max_seconds=budget, max_steps=10**7)
        judge = race.Judge("", budget, 0.0, marks=())
        curve = race.run_preset(replace(bench.config, train=limits), bench.training, evaluation, judge)
        published, target = (f"{of[budget]:.2f}" if budget in of else "" for of in (PUBLISHED_PSNR, TARGET_PSNR))
        bench.say(f"| {curve.seconds[-1]:.1f} | {curve.steps[-1]} | {curve.psnr[-1]:.2f} | {published} | {target} |")
        runs.append({"budget": budget, "steps": curve.steps[-1], "psnr": curve.psnr[-1]})
        bench.add("psnr", runs=runs)


def psnr_budgets(seconds: float) -> list[float]:
    """The seconds of training of each run: those that there is a target for, up to the one given, and that one."""
    return sorted({budget for budget in TARGET_PSNR if budget < seconds} | {seconds})
