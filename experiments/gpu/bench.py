"""What a GPU does with this package, in ten minutes: steps, PSNR over time, frames, stages, kernels, ceilings.

    python -m experiments.gpu.bench --scene=lego --data_dir=DIR
    python -m experiments.gpu.bench --toy --downscale=8    # all of it in small, on a CPU too

What matters most comes first. Every section prints its rows as they come and rewrites --output; one that fails says so
in a line, and the next goes on; one for which no time is left is skipped. The exit code is 1 where a section failed.

PSNR stands beside the paper's for lego (test split) on an RTX 3090. In `correctness` the device's results and gradients
are compared with those of the CPU, which the tests compare with float64.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments.gpu import hlo, profile
from experiments.throughput import OPTIMISER_ROUNDS, define_marching_flags, optimiser_calls, training_stages
from experiments.timing import in_loop, iterated, median_ms, points_on_rays
from jaxngp import flags, train_image, train_sdf
from jaxngp.cameras import PosedImages, orbit_poses, resize_cameras, view_rays
from jaxngp.compositing import composite
from jaxngp.config import (
    HashGridConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    RunConfig,
    apply_overrides,
    program_config,
)
from jaxngp.data import load_evaluation, load_training
from jaxngp.device import compiled, default_batching, default_placement, formulation
from jaxngp.encodings import all_corners, hash_encode
from jaxngp.fields import RadianceField, init_params
from jaxngp.hashing import level_offsets
from jaxngp.metrics import psnr
from jaxngp.presets import PRESETS, scene_config
from jaxngp.rendering import chunk_program, render_view
from jaxngp.training import nerf, step
from jaxngp.training.image import ImagePixels
from jaxngp.training.loop import Progress, train
from jaxngp.training.report import environment, write_json
from jaxngp.training.sdf import DistanceSamples

Row = dict[str, Any]
RUNS = 5  # timed calls, of which the median is shown
ROUNDS = 5  # of one thing in a timed call
PUBLISHED_PSNR = {5.0: 30.13, 15.0: 33.68, 60.0: 35.63}  # dB after seconds of training


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int  # of training before anything is timed, and of an image and of distances
    frame: tuple[int, int]
    poses: int
    psnr_seconds: tuple[float, ...]
    views: int  # to evaluate
    image_size: int
    table_size: int  # at most, of the fields of an image and of a distance
    num_points: int  # that these learn from in a step
    work: int  # rows read or added to in one round of a ceiling; other ceilings in proportion


FULL = Sizes(1024, (1920, 1080), 5, (2.0, 5.0, 15.0, 60.0), 4, 2**13, 2**24, 2**18, 2**22)
TOY = Sizes(32, (64, 36), 1, (0.2,), 1, 2**6, 2**14, 2**10, 2**12)
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
    "train.calls_in_flight=1",
)


@dataclass
class Bench:
    """What the sections share; all that is on the device is made when a section first asks for it."""

    config: NerfConfig
    sizes: Sizes
    images: PosedImages

    @functools.cached_property
    def data(self) -> PosedImages:
        return default_placement().put(self.images)

    @functools.cached_property
    def trained(self) -> tuple[Progress, float]:
        """A run of a few steps, and the milliseconds of one."""
        return run_training(self.config, self.images, self.sizes.steps)

    @functools.cached_property
    def pixels(self) -> Any:
        return compiled(nerf.hull_of_views, self.data, config=program_config(self.config))(self.data)[1]

    @functools.cached_property
    def dispatch(self) -> Dispatch:
        return Dispatch(self.config, self.trained[0].state, self.data, self.pixels)


def run_training(config: RunConfig, data: Any, num_steps: int) -> tuple[Progress, float]:
    """Where num_steps steps of training end, and the median milliseconds of one, with all that the loop does."""
    config = replace(config, train=replace(config.train, max_steps=num_steps, max_seconds=0.0))
    marks = []
    for progress in train(config, data):
        marks.append((progress.step, progress.seconds))
    steps, seconds = np.diff(np.array(marks), axis=0).T
    return progress, 1e3 * float(np.median(seconds / steps))


class Dispatch:
    """The program that training calls, which goes on with a copy of a state, in place."""

    def __init__(self, config: NerfConfig, state: Any, data: PosedImages, pixels: Any) -> None:
        self.num_steps = config.train.steps_per_dispatch
        self.arguments = (data, pixels, np.full(self.num_steps, 1e-3, np.float32), np.int32(self.num_steps))
        self.state = jax.tree.map(jnp.copy, state)
        options = step.step_options(config)
        self.program: Any = compiled(
            nerf.nerf_steps, self.state, *self.arguments, options=options, config=program_config(config)
        )

    def __call__(self) -> Any:
        self.state, metrics = self.program(self.state, *self.arguments)
        return self.state.step, metrics


# Sections.


def about(_: Bench) -> Iterator[Row]:
    """Where the numbers come from."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,driver_version"
    facts = {
        **environment(),
        "python": sys.version.split()[0],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _output("git", "rev-parse", "HEAD"),
        query: _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
    }
    for name, value in facts.items():
        yield {"fact": name, "value": value}


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""


def steps(bench: Bench) -> Iterator[Row]:
    """Whole steps of training, in the loop and without it."""
    progress, ms = bench.trained
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    samples = progress.num_samples / progress.step
    memory = {"peak device MB": peak / 1e6, "compiled in s": progress.compile_seconds}
    yield {"what": "training loop", "ms a step": ms, "Msamples/s": 1e-3 * samples / ms, **memory}
    dispatch = bench.dispatch
    ms = median_ms({"": dispatch}, runs=RUNS)[""] / dispatch.num_steps
    samples = float(dispatch()[1].samples)
    yield {"what": "steps alone", "ms a step": ms, "Msamples/s": 1e-3 * samples / ms}


def psnr_over_time(bench: Bench) -> Iterator[Row]:
    """A training for each number of seconds, compilation excluded: the learning rate falls towards its end."""
    evaluation = load_evaluation(bench.config.scene, num_views=bench.sizes.views)
    views = evaluation.images
    for seconds in bench.sizes.psnr_seconds:
        limits = replace(bench.config.train, max_seconds=seconds, max_steps=10**7)
        *_, progress = train(replace(bench.config, train=limits), bench.images)
        errors = [view_psnr(progress, views, i, bench.config) for i in range(len(views.cameras))]
        yield {
            "seconds": seconds,
            "steps": progress.step,
            f"PSNR, dB, {len(errors)} views of {evaluation.name}, white": float(np.mean(errors)),
            "published": PUBLISHED_PSNR.get(seconds, ""),
        }


def view_psnr(progress: Progress, views: PosedImages, view: int, config: NerfConfig) -> float:
    """PSNR of one view in dB, over white."""
    rgba = views.image(view).astype(np.float32) / 255
    truth = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    white, grid = jnp.ones(3, jnp.float32), progress.state.occupancy
    out = render_view(progress.field, views.cameras[view], grid, white, sampler=config.sampler)
    return float(psnr(np.mean((np.clip(out.rgb, 0, 1) - truth) ** 2)))


def render(bench: Bench) -> Iterator[Row]:
    """Frames on an orbit, as they stay on the device and as they come to the host."""
    progress, sampler, white = bench.trained[0], bench.config.sampler, jnp.ones(3, jnp.float32)
    grid, size = progress.state.occupancy, bench.sizes.frame
    orbit = orbit_poses(np.asarray(bench.images.cameras.c2w), bench.sizes.poses)
    camera = resize_cameras(bench.images.cameras[0], *size)
    program = chunk_program(sampler, default_batching())
    device, host, evaluations = [], [], []
    for pose in orbit:
        view = replace(camera, c2w=pose)
        rays = jax.tree.map(lambda a: a.reshape(-1, 3), view_rays(view))
        field_ = progress.field
        calls = {
            "device": functools.partial(program, field_, rays, grid, white),
            "host": functools.partial(render_view, field_, view, grid, white, sampler=sampler),
        }
        times = median_ms(calls, runs=RUNS)
        device.append(times["device"])
        host.append(times["host"])
        evaluations.append(float(calls["device"]()[1]))
    yield {
        "frame": "x".join(map(str, size)),
        "ms on the device": float(np.median(device)),
        "ms to the host": float(np.median(host)),
        "Msamples": 1e-6 * float(np.median(evaluations)),
    }


def correctness(bench: Bench) -> Iterator[Row]:
    """Relative errors, by the norm, of results and gradients of what a GPU computes by other formulas than a CPU."""
    failed = []
    for name, (function, arguments, tolerance) in checks(bench.config).items():
        for part, error in relative_errors(function, arguments).items():
            yield {"array": f"{name}: {part}", "relative error": error, "tolerance": tolerance}
            if not error <= tolerance:  # a NaN too
                failed.append(f"{name}: {part}")
    if failed:
        raise ValueError(f"beyond their tolerances: {', '.join(failed)}")


def checks(config: NerfConfig, *, num_samples: int = 4096) -> dict[str, tuple[Callable[..., Any], tuple, float]]:
    """Functions of arrays, those arrays, and how far results may be apart.

    Of the encoding, for float32 rounds places to 1 / 8192 of the finest cell; of bfloat16 for its 8 bits.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    position = points_on_rays(keys[0], num_samples)
    rgb = jax.random.uniform(keys[1], (num_samples, 3), jnp.float32)
    density = 100 * jax.random.uniform(keys[2], (num_samples,), jnp.float32)
    params = init_params(keys[3], config=config.field)
    params["encoding"]["table"] = 1e3 * params["encoding"]["table"]
    direction = position / jnp.linalg.norm(position, axis=1, keepdims=True)
    ray = jnp.arange(num_samples, dtype=jnp.int32) // 16

    def encoding(table: jax.Array, position: jax.Array) -> Row:
        features, pull = jax.vjp(lambda t: hash_encode(t, position, grid=config.field.encoding), table)
        return {"features": features, "gradient of the table": pull(jnp.cos(features))[0]}

    def compositing(density: jax.Array, rgb: jax.Array) -> Row:
        t = jnp.arange(num_samples, dtype=jnp.float32) % 16 / 16
        step_sizes, background = jnp.full_like(t, 1 / 16), jnp.ones((num_samples // 16, 3), jnp.float32)
        color = lambda density, rgb: composite(density, rgb, t, step_sizes, ray, background).rgb  # noqa: E731
        out, pull = jax.vjp(color, density, rgb)
        return dict(zip(("colour", "gradient of density", "gradient of rgb"), (out, *pull(jnp.cos(out))), strict=True))

    def field_of(precision: Any) -> Callable[..., Row]:
        cfg = replace(config.field, precision=precision)

        def evaluate(params: Any, position: jax.Array, direction: jax.Array) -> Row:
            def outputs(params: Any) -> Any:
                density, rgb = RadianceField.of(params, config=cfg)(position, direction)
                return jnp.log(density), rgb

            out, pull = jax.vjp(outputs, params)
            (gradient,) = pull(jax.tree.map(jnp.cos, out))
            flat = jnp.concatenate(
                [a.ravel() for name, part in gradient.items() if name != "encoding" for a in jax.tree.leaves(part)]
            )
            return {"log density": out[0], "rgb": out[1], "gradient of the networks": flat}

        return evaluate

    inputs = (params, position, direction)
    return {
        "encoding": (encoding, (params["encoding"]["table"], position), 5e-4),
        "compositing": (compositing, (density, rgb), 1e-4),
        "field, float32": (field_of("float32"), inputs, 1e-3),
        "field, bfloat16": (field_of("bfloat16"), inputs, 5e-2),
    }


def relative_errors(function: Callable[..., Row], arguments: tuple) -> dict[str, float]:
    """By the name of the result: how far the GPU's formulation on this device is from the CPU's on a CPU."""
    with formulation("gpu"):
        ours = jax.jit(lambda *a: function(*a))(*arguments)
    cpu = jax.devices("cpu")[0]
    with formulation("cpu"), jax.default_device(cpu):
        truth = jax.jit(lambda *a: function(*a))(*jax.device_put(arguments, cpu))
    found = {}
    for name in truth:
        a, b = (np.asarray(of[name], np.float64) for of in (ours, truth))
        found[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return found


def stages(bench: Bench) -> Iterator[Row]:
    """The parts of a step one by one, each in a loop of its own."""
    state = bench.trained[0].state
    given = training_stages(bench.config, state, bench.data, bench.pixels)
    makers = {name: functools.partial(in_loop, s.function, *s.arguments, rounds=ROUNDS) for name, s in given.items()}
    with concurrent.futures.ThreadPoolExecutor() as threads:  # XLA compiles several programs at once
        programs = {name: threads.submit(make) for name, make in makers.items()}
        for name, program in programs.items():
            yield {"stage": name, "ms": median_ms({name: program.result()}, runs=RUNS)[name] / ROUNDS}
    adam = optimiser_calls(bench.config, state)[0]
    yield {"stage": "optimiser", "ms": median_ms({"": adam}, runs=RUNS)[""] / OPTIMISER_ROUNDS}


def kernels(bench: Bench) -> Iterator[Row]:
    """The kernels that take longest in a step, from a trace of the profiler."""
    dispatch = bench.dispatch
    jax.block_until_ready(dispatch())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(dispatch())
        runs = profile.read_trace(Path(folder))
    module = hlo.parse_module(dispatch.program.as_text())
    sources = {hlo.ptx_name(i.name): i.op_name for c in module.computations.values() for i in c.values()}
    times = profile.by_kernel(runs)
    busy = sum(us for us, _ in times.values())
    yield {
        "us a step": busy / dispatch.num_steps,
        "runs a step": len(runs) / dispatch.num_steps,
        "kernel": "all",
        "from": "",
    }
    for name, (us, count) in list(times.items())[:30]:
        source = "/".join(sources.get(hlo.ptx_name(name), "").split("/")[-3:])
        row = {"us a step": us / dispatch.num_steps, "runs a step": count / dispatch.num_steps}
        yield {**row, "kernel": name[:60], "from": source}


def other_tasks(bench: Bench) -> Iterator[Row]:
    """Steps of learning an image and a signed distance, from random data."""
    rng, sizes = np.random.default_rng(0), bench.sizes
    grid = HashGridConfig(num_dims=2, table_size=sizes.table_size, max_resolution=max(16, sizes.image_size // 2))
    pixels = rng.integers(0, 256, (sizes.image_size, sizes.image_size, 3), np.uint8)
    sdf = train_sdf.PRESETS["paper"]
    encoding = sdf.field.encoding
    encoding = replace(encoding, table_size=min(encoding.table_size, sizes.table_size))
    points = rng.random((2, sizes.work, 3), np.float32)
    tasks: dict[str, tuple[Any, Any]] = {
        "image": (train_image.default_config(grid, on_cpu=False), ImagePixels(jnp.asarray(pixels))),
        "sdf": (
            replace(sdf, field=replace(sdf.field, encoding=encoding)),
            DistanceSamples(*map(jnp.asarray, (points[0], points[1], points[0, :, 0] - 0.5))),
        ),
    }
    for name, (config, data) in tasks.items():
        config = replace(config, train=replace(config.train, num_points=sizes.num_points))
        progress, ms = run_training(config, data, sizes.steps)
        row = {"task": name, "points a step": sizes.num_points, "table": config.field.encoding.table_size}
        yield {**row, "ms a step": ms, "compiled in s": progress.compile_seconds}


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device does at best, of what a step does most."""
    count, grid = bench.sizes.work, bench.config.field.encoding
    floats, side, num_rows, width = 64 * count, 2 * int((4 * count) ** 0.5), level_offsets(grid)[-1], grid.num_features
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    rows = jax.random.randint(jax.random.key(1), (count,), 0, num_rows, jnp.int32).astype(jnp.uint32)
    corners = jax.jit(lambda x: all_corners(x, grid)[0].reshape(-1))  # of consecutive points on rays, all levels
    near = corners(points_on_rays(jax.random.key(2), count // (8 * grid.num_levels)))
    table, half = jnp.zeros((num_rows, width), jnp.float32), jnp.ones((num_rows, width), jnp.float16)

    def add(table: jax.Array, row: jax.Array) -> jax.Array:
        return table.at[row].add(jnp.ones((len(row), width), jnp.float32), mode="promise_in_bounds")

    def read(x: jax.Array, half: jax.Array, row: jax.Array) -> jax.Array:
        return half.at[row + x[0].astype(jnp.uint32)].get(mode="promise_in_bounds")

    zero = jnp.zeros(1, jnp.float32)
    made: dict[str, tuple[Callable[[], Any], float, str]] = {
        "copy": (iterated(lambda a: a + 1, jnp.zeros(floats, jnp.float32), rounds=ROUNDS), 8e-9 * floats, "GB/s"),
        f"matmul of {side}x{side}, bfloat16": (
            iterated(lambda a, b: a @ b, square, square / jnp.bfloat16(side**0.5), rounds=ROUNDS),
            2e-12 * side**3,
            "TFLOP/s",
        ),
        "reads of random rows, float16": (in_loop(read, zero, half, rows, rounds=ROUNDS), 1e-9 * count, "G/s"),
        "reads of rows on rays, float16": (in_loop(read, zero, half, near, rounds=ROUNDS), 1e-9 * len(near), "G/s"),
        "additions to random rows, float32": (iterated(add, table, rows, rounds=ROUNDS), 1e-9 * count, "G/s"),
        "additions to rows on rays, float32": (iterated(add, table, near, rounds=ROUNDS), 1e-9 * len(near), "G/s"),
    }
    for name, (program, amount, unit) in made.items():
        seconds = 1e-3 * median_ms({name: program}, runs=RUNS)[name] / ROUNDS
        yield {"ceiling": name, "rate": amount / seconds, "unit": unit}


# Running them.


@dataclass(frozen=True)
class Section:
    """One part of the benchmark; `seconds` is what it takes on an H100, compilation included."""

    name: str
    rows: Callable[[Any], Iterator[Row]]
    seconds: float


SECTIONS = (
    Section("about", about, 1),
    Section("steps", steps, 60),
    Section("psnr", psnr_over_time, 120),
    Section("render", render, 30),
    Section("correctness", correctness, 20),
    Section("stages", stages, 60),
    Section("kernels", kernels, 20),
    Section("ceilings", ceilings, 30),
    Section("other tasks", other_tasks, 60),
)


@dataclass
class Log:
    """Rows as Markdown on the screen and, all that came so far, as JSON in a file."""

    path: Path
    results: dict[str, Any] = field(default_factory=dict)

    def note(self, section: str, text: str) -> None:
        """Say what became of a section."""
        print(text, flush=True)
        self.results.setdefault("notes", {})[section] = text
        write_json(self.path, self.results)

    def add(self, section: str, row: Row) -> None:
        """One more row of a section, which has the keys of its first."""
        rows = self.results.setdefault(section, [])
        if not rows:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        rows.append(row)
        shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(k, "") for k in rows[0]))
        print(f"| {' | '.join(shown)} |", flush=True)
        write_json(self.path, self.results)


def run_sections(sections: Sequence[Section], bench: Any, log: Log, *, budget: float) -> list[str]:
    """Run what fits into `budget` seconds, in order. Returns the names of those that failed."""
    end, failed = time.monotonic() + budget, []
    for section in sections:
        print(f"\n## {section.name}\n", flush=True)
        started = time.monotonic()
        if started + section.seconds > end:
            log.note(section.name, f"skipped: {section.seconds:.0f} s needed, {max(end - started, 0):.0f} s left")
            continue
        try:
            for row in section.rows(bench):
                log.add(section.name, row)
                if time.monotonic() > end:
                    log.note(section.name, "the rest is skipped: no time left")
                    break
        except Exception as error:  # the next section may still measure something
            failed.append(section.name)
            log.note(section.name, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            traceback.print_exc()
        print(f"\n{time.monotonic() - started:.0f} s", flush=True)
    return failed


def define_flags(values: flags.Flags) -> None:
    names = [section.name for section in SECTIONS]
    define_marching_flags(values, preset="base")
    absl_flags.DEFINE_float("budget", 570.0, "Seconds for everything.", 1.0, flag_values=values)
    absl_flags.DEFINE_list("sections", names, f"Of {', '.join(names)}.", flag_values=values)
    absl_flags.DEFINE_bool("toy", False, "Everything small enough for a CPU.", flag_values=values)
    absl_flags.DEFINE_string("output", "runs/gpu_bench.json", "Where the numbers are written.", flag_values=values)


def main(values: flags.Flags) -> None:
    known = {section.name: section for section in SECTIONS}
    if unknown := [name for name in values.sections if name not in known]:
        raise InputError(f"--sections: unknown {unknown[0]!r}; there are {', '.join(known)}")
    if values.preset not in PRESETS:
        raise InputError(f"--preset: unknown {values.preset!r}; there are {', '.join(PRESETS)}")
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    overrides = [*(TOY_OVERRIDES if values.toy else ()), *values.override]
    config = apply_overrides(replace(PRESETS[values.preset], scene=scene), overrides)
    if not isinstance(config.sampler, MarchConfig):
        raise InputError(f"--preset={values.preset} does not march, and this times marching: try base")
    images = load_training(scene).images
    if not isinstance(images, PosedImages):
        raise InputError(f"{scene.name} is a ray table: this needs views")
    bench = Bench(config, TOY if values.toy else FULL, images)
    chosen = [section for name, section in known.items() if name in values.sections]
    if values.toy:
        chosen = [replace(section, seconds=0.0) for section in chosen]
    if run_sections(chosen, bench, Log(Path(values.output)), budget=values.budget):
        sys.exit(1)


if __name__ == "__main__":
    flags.run("experiments.gpu.bench", define_flags, main, __doc__ or "")
