"""What a GPU does with this package, in three minutes: steps, PSNR over time, frames, correctness, stages, kernels.

    python -m experiments.gpu.bench --scene=lego --data_dir=DIR
    python -m experiments.gpu.bench --toy --downscale=8    # all of it in small, on a CPU too

What matters most comes first. Every section prints its rows as they come, as Markdown, and rewrites --output; one that
fails says so in a line, and the next goes on; one for which no time is left is skipped. The exit code is 1 where one
failed. The published PSNR is the paper's for lego's test split on an RTX 3090.
"""

from __future__ import annotations

import concurrent.futures
import functools
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments.gpu import hlo
from experiments.timing import in_loop, iterated, median_ms, points_on_rays
from jaxngp import flags, train_image, train_sdf
from jaxngp.cameras import PosedImages, orbit_poses, resize_cameras, view_rays
from jaxngp.compositing import composite
from jaxngp.config import (
    FieldConfig,
    HashGridConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    apply_overrides,
    program_config,
)
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.device import compiled, default_batching, default_placement, formulation
from jaxngp.encodings import all_corners
from jaxngp.evaluation import evaluate_views
from jaxngp.fields import RadianceField, init_params
from jaxngp.hashing import level_offsets
from jaxngp.marching import sample_rays
from jaxngp.presets import PRESETS, scene_config
from jaxngp.records import environment, write_json
from jaxngp.rendering import chunk_program
from jaxngp.training import nerf, step
from jaxngp.training.image import ImagePixels
from jaxngp.training.loop import Progress, train
from jaxngp.training.sdf import DistanceSamples

Row = dict[str, Any]
RUNS = 5  # timed calls, of which the median is shown
ROUNDS = 5  # of one thing in a timed call
PUBLISHED_PSNR = {5.0: 30.13, 15.0: 33.68, 60.0: 35.63}  # dB after seconds of training


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int = 1024  # of a training that is timed
    frame: tuple[int, int] = (1920, 1080)
    poses: int = 5
    psnr_seconds: tuple[float, ...] = (2.0, 5.0, 15.0, 60.0)
    image_size: int = 2**13
    num_levels: int = 16  # of the fields of an image and of a distance, and at most:
    table_size: int = 2**24
    num_points: int = 2**18  # that these learn from in a step
    rows: int = 2**22  # of a table, in one round of a ceiling


TOY = Sizes(32, (64, 36), 1, (0.2,), 2**6, 2, 2**14, 2**10, 2**12)
TOY_OVERRIDES = (
    *("field.encoding.num_levels=2", "field.encoding.table_size=2**10", "field.encoding.max_resolution=64"),
    *("field.hidden_width=16", "field.colour_layers=1", "train.num_rays=2**7", "train.steps_per_dispatch=4"),
    *("sampler.occupancy.resolution=32", "sampler.num_steps=64", "sampler.num_samples=2**10"),
)


@dataclass
class Bench:
    """What the sections share. What is on the device is made when a section first asks for it."""

    config: NerfConfig
    sizes: Sizes
    images: PosedImages
    evaluation: Split

    @functools.cached_property
    def trained(self) -> tuple[Progress, float]:
        """A run of a few steps, and the milliseconds of one."""
        return run_training(self.config, self.images, self.sizes.steps)

    @functools.cached_property
    def data(self) -> tuple[PosedImages, Any]:
        """The views, and the set of pixels that training draws from."""
        views = default_placement().put(self.images)
        return views, compiled(nerf.hull_of_views, views, config=program_config(self.config))(views)[1]

    @functools.cached_property
    def dispatch(self) -> Dispatch:
        return Dispatch(self.config, self.trained[0].state, *self.data)

    def frames(self) -> tuple[Any, list[tuple[Any, ...]]]:
        """The program that renders a view at once, and its arguments for each pose on an orbit."""
        progress, cameras = self.trained[0], self.images.cameras
        grid, white = progress.state.occupancy, jnp.ones(3, jnp.float32)
        camera, arguments = resize_cameras(cameras[0], *self.sizes.frame), []
        for pose in orbit_poses(np.asarray(cameras.c2w), self.sizes.poses):
            rays = jax.tree.map(lambda a: a.reshape(-1, 3), view_rays(replace(camera, c2w=pose)))
            arguments.append((progress.field, rays, grid, white))
        return chunk_program(self.config.sampler, default_batching()), arguments


def run_training(config: Any, data: Any, num_steps: int) -> tuple[Progress, float]:
    """Where num_steps steps of training end, and the median milliseconds of one, with all that the loop does."""
    marks = []
    for progress in train(replace(config, train=replace(config.train, max_steps=num_steps, max_seconds=0.0)), data):
        marks.append((progress.step, progress.seconds))
    steps, seconds = np.diff(np.array(marks), axis=0).T
    return progress, 1e3 * float(np.median(seconds / steps))


class Dispatch:
    """The program that training calls, which goes on with a copy of a state, in place."""

    def __init__(self, config: NerfConfig, state: Any, views: PosedImages, pixels: Any) -> None:
        self.num_steps = config.train.steps_per_dispatch
        self.arguments = (views, pixels, np.full(self.num_steps, 1e-3, np.float32), np.int32(self.num_steps))
        self.state = jax.tree.map(jnp.copy, state)
        static: dict[str, Any] = {"options": step.step_options(config), "config": program_config(config)}
        self.program: Any = compiled(nerf.nerf_steps, self.state, *self.arguments, **static)

    def __call__(self) -> Any:
        self.state, metrics = self.program(self.state, *self.arguments)
        return self.state.step, metrics


# Sections.


def steps(bench: Bench) -> Iterator[Row]:
    """Whole steps of training, in the loop and without it."""
    progress, ms = bench.trained
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    rate = 1e-3 * progress.num_samples / progress.step / ms
    memory = {"peak device MB": peak / 1e6, "compiled in s": progress.compile_seconds}
    yield {"what": "training loop", "ms a step": ms, "Msamples/s": rate, **memory}
    ms = median_ms({"": bench.dispatch}, runs=RUNS)[""] / bench.dispatch.num_steps
    yield {"what": "steps alone", "ms a step": ms, "Msamples/s": 1e-3 * float(bench.dispatch()[1].samples) / ms}


def psnr_over_time(bench: Bench) -> Iterator[Row]:
    """A training for each number of seconds, compilation excluded: the learning rate falls towards its end."""
    split = bench.evaluation
    for seconds in bench.sizes.psnr_seconds:
        limits = replace(bench.config.train, max_seconds=seconds, max_steps=10**7)
        *_, progress = train(replace(bench.config, train=limits), bench.images)
        views = evaluate_views(progress.field, progress.state.occupancy, split, sampler=bench.config.sampler)
        row = {"seconds": seconds, "steps": progress.step, "PSNR, dB": float(np.mean([s.psnr for s, _ in views]))}
        yield {**row, "of": f"{split.num_views} views of {split.name}", "published": PUBLISHED_PSNR.get(seconds, "")}


def render(bench: Bench) -> Iterator[Row]:
    """Frames on an orbit, as they stay on the device."""
    program, arguments = bench.frames()
    calls = {str(i): functools.partial(program, *arguments[i]) for i in range(len(arguments))}
    ms = float(np.median([*median_ms(calls, runs=RUNS).values()]))
    samples = float(np.median([float(call()[1]) for call in calls.values()]))
    size = "x".join(map(str, bench.sizes.frame))
    yield {"frame": size, "ms": ms, "Msamples": 1e-6 * samples, "Msamples/s": 1e-3 * samples / ms}


def correctness(bench: Bench) -> Iterator[Row]:
    """Gradients by a GPU's formulas on this device, beside those by a CPU's on a CPU, which tests hold to float64."""
    failed, field = [], bench.config.field
    for name, (function, inputs), tolerance in (
        ("compositing", compositing(), 1e-4),
        # float32 rounds places to 1 / 8192 of the finest cell, and bfloat16 has 8 bits.
        ("field, float32", evaluation_of_field(replace(field, precision="float32")), 2e-3),
        ("field, bfloat16", evaluation_of_field(replace(field, precision="bfloat16")), 5e-2),
    ):
        for part, error in relative_errors(function, inputs).items():
            yield {"gradient of": name, "in": part, "relative error": error, "tolerance": tolerance}
            if not error <= tolerance:  # a NaN too
                failed.append(f"{name} in {part}")
    if failed:
        raise ValueError(f"beyond the tolerance: {', '.join(failed)}")


Scalar = Callable[[Any], jax.Array]  # function of a tree of arrays


def compositing(num_samples: int = 4096) -> tuple[Scalar, dict[str, np.ndarray]]:
    """A function of the colours of rays of 16 samples, and densities and colours of these."""
    number = jnp.arange(num_samples, dtype=jnp.int32)
    random = np.random.default_rng(0).random((4, num_samples), np.float32)
    t, dt = (number % 16).astype(jnp.float32) / 16, jnp.full(num_samples, 1 / 16, jnp.float32)
    background = jnp.ones((num_samples // 16, 3), jnp.float32)

    def value(matter: dict[str, jax.Array]) -> jax.Array:
        out = composite(matter["density"], matter["rgb"], t, dt, number // 16, background)
        return jnp.sum(jnp.sin(out.rgb))

    return value, {"density": 100 * random[0], "rgb": random[1:].T}


def evaluation_of_field(config: FieldConfig, num_samples: int = 4096) -> tuple[Scalar, Any]:
    """A function of the densities and colours of a field, and its parameters."""
    position = points_on_rays(jax.random.key(0), num_samples)
    direction = position / jnp.linalg.norm(position, axis=1, keepdims=True)
    params = jax.jit(functools.partial(init_params, config=config))(jax.random.key(1))
    params["encoding"]["table"] = 1e4 * params["encoding"]["table"]  # initially within 1e-4 of 0

    def value(params: Any) -> jax.Array:
        density, rgb = RadianceField.of(params, config=config)(position, direction)
        return jnp.sum(jnp.sin(jnp.log(density))) + jnp.sum(jnp.sin(rgb))

    return value, params


def relative_errors(function: Scalar, inputs: Any) -> dict[str, float]:
    """By the name of an input: the norm of the difference between the gradients, relative to that of the CPU's."""
    cpu = jax.devices("cpu")[0]
    with formulation("gpu"):
        ours = jax.jit(jax.grad(lambda x: function(x)))(inputs)
    with formulation("cpu"), jax.default_device(cpu):
        truth = jax.jit(jax.grad(lambda x: function(x)))(jax.device_put(inputs, cpu))
    error = lambda a, b: float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))  # noqa: E731
    errors = jax.tree.leaves_with_path(jax.tree.map(error, ours, truth))
    return {jax.tree_util.keystr(path): value for path, value in errors}


def stages(bench: Bench) -> Iterator[Row]:
    """A step cut off after each of its stages; `steps` has the whole of it, with Adam."""
    config, inputs = bench.config, (bench.trained[0].state, *bench.data)
    names = ("pixels", "samples", "loss", "gradient")

    def until(stage: str, x: jax.Array, state: Any, views: PosedImages, pixels: Any) -> Any:
        number = state.step + x[0].astype(jnp.int32)  # so that each round depends on the one before
        batches = nerf.draw_batches(number, state.key, views, pixels, num_steps=1, config=config)
        batch, noise = jax.tree.map(lambda a: a[0], batches)
        if stage == "pixels":
            return batch, noise
        if stage == "samples":
            rays = views.source.cast(batch.view, batch.xy)
            field = RadianceField.of(state.params, config=config.field)
            return sample_rays(rays, state.occupancy, noise.jitter, field, sampler=config.sampler)

        def loss(params: Any) -> jax.Array:
            field = RadianceField.of(params, config=config.field)
            return nerf.nerf_loss(field, views.source, batch, noise, state.occupancy, config=config)[0]

        return loss(state.params) if stage == "loss" else jax.grad(loss)(state.params)

    def build(stage: str) -> Callable[[], jax.Array]:
        return in_loop(functools.partial(until, stage), jnp.zeros(1, jnp.float32), *inputs, rounds=ROUNDS)

    with concurrent.futures.ThreadPoolExecutor() as threads:  # XLA compiles several programs at once
        programs = dict(zip(names, threads.map(build, names), strict=True))
    yield from ({"until": stage, "ms": ms / ROUNDS} for stage, ms in median_ms(programs, runs=RUNS).items())


def kernels_of_step(bench: Bench) -> Iterator[Row]:
    """The kernels that take longest in a step, from a trace of the profiler."""
    dispatch = bench.dispatch
    yield from kernels(dispatch, dispatch.program.as_text(), dispatch.num_steps)


def kernels_of_frame(bench: Bench) -> Iterator[Row]:
    """Those of a frame."""
    program, arguments = bench.frames()
    compiled = program.lower(*arguments[0]).compile()
    yield from kernels(lambda: compiled(*arguments[0]), compiled.as_text(), 1)


def kernels(call: Callable[[], Any], hlo_text: str, rounds: int) -> Iterator[Row]:
    """What ran on the device in a call of a program, per round of the call."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        runs = device_events(jax.profiler.ProfileData.from_file(str(trace)).planes)
    module = hlo.parse_module(hlo_text)
    sources = {hlo.ptx_name(i.name): i.op_name for c in module.computations.values() for i in c.values()}
    times, counts = Counter[str](), Counter[str]()
    for run in runs:
        times[run.name] += run.microseconds / rounds  # type: ignore[assignment]
        counts[run.name] += 1
    span = max(run.end for run in runs) - min(run.end - run.microseconds for run in runs)
    yield {"kernel": "first to last", "us": span / rounds, "runs": 1 / rounds, "from": ""}
    yield {"kernel": "all", "us": sum(times.values()), "runs": len(runs) / rounds, "from": ""}
    for name, us in times.most_common(60):
        source = "/".join(sources.get(hlo.ptx_name(name), "").split("/")[-3:])
        yield {"kernel": name[:60], "us": us, "runs": counts[name] / rounds, "from": source}


@dataclass(frozen=True)
class Run:
    """Of a kernel, in microseconds."""

    name: str
    microseconds: float
    end: float


def device_events(planes: Any) -> list[Run]:
    """What ran on a GPU's streams; without a GPU all operations, each with its body's."""
    planes = list(planes)
    gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in gpu or planes for line in plane.lines if not gpu or line.name.startswith("Stream")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the type of `stats`, under Python 3.12
        events = [e for line in lines for e in line.events if gpu or any(name == "hlo_op" for name, _ in e.stats)]
    return [Run(e.name, 1e-3 * e.duration_ns, 1e-3 * e.end_ns) for e in events]


def other_tasks(bench: Bench) -> Iterator[Row]:
    """Steps of learning an image and a signed distance, from random data."""
    rng, sizes = np.random.default_rng(0), bench.sizes
    pixels = ImagePixels(jnp.asarray(rng.integers(0, 256, (sizes.image_size, sizes.image_size, 3), np.uint8)))
    points = jnp.asarray(rng.random((2, 16 * sizes.num_points, 3), np.float32))
    samples = DistanceSamples(points[0], points[1], points[1, :, 0] - 0.5)
    grid = HashGridConfig(num_dims=2, table_size=2**24, max_resolution=max(16, sizes.image_size // 2))
    image, sdf = train_image.default_config(grid, on_cpu=False), train_sdf.PRESETS["paper"]
    tasks: dict[str, tuple[Any, Any]] = {"image": (image, pixels), "sdf": (sdf, samples)}
    for name, (config, data) in tasks.items():
        grid = config.field.encoding
        grid = replace(grid, num_levels=sizes.num_levels, table_size=min(grid.table_size, sizes.table_size))
        limits = replace(config.train, num_points=sizes.num_points)
        config = replace(config, field=replace(config.field, encoding=grid), train=limits)
        progress, ms = run_training(config, data, sizes.steps)
        row = {"task": name, "points a step": sizes.num_points, "table": grid.table_size, "ms a step": ms}
        yield {**row, "compiled in s": progress.compile_seconds}


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device does at best, of what a step does most; rows of the table lie around points on rays."""
    count, grid = bench.sizes.rows, bench.config.field.encoding
    floats, side, width = 64 * count, int((16 * count) ** 0.5), grid.num_features
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    scaled = square / jnp.bfloat16(side**0.5)  # the product keeps its size
    corners = jax.jit(lambda x: all_corners(x, grid)[0].reshape(-1))
    row = corners(points_on_rays(jax.random.key(1), count // (8 * grid.num_levels)))
    table = jnp.zeros((level_offsets(grid)[-1], width), jnp.float32)

    def add(table: jax.Array, row: jax.Array) -> jax.Array:
        return table.at[row].add(jnp.ones((len(row), width), jnp.float32), mode="promise_in_bounds")

    def read(x: jax.Array, half: jax.Array, row: jax.Array) -> jax.Array:
        return half.at[row + x[0].astype(jnp.uint32)].get(mode="promise_in_bounds")

    reading = in_loop(read, jnp.zeros(1, jnp.float32), table.astype(jnp.float16), row, rounds=ROUNDS)
    repeat = functools.partial(iterated, rounds=ROUNDS)
    for name, program, amount, unit in (
        ("copy", repeat(lambda a: a + 1, jnp.zeros(floats, jnp.float32)), 8 * floats, "GB/s"),
        (f"matmul of {side}x{side}, bfloat16", repeat(lambda a, b: a @ b, square, scaled), 2 * side**3, "GFLOP/s"),
        ("reads of rows, float16", reading, len(row), "G/s"),
        ("additions to rows, float32", repeat(add, table, row), len(row), "G/s"),
    ):
        seconds = 1e-3 * median_ms({name: program}, runs=RUNS)[name] / ROUNDS
        yield {"ceiling": name, "rate": 1e-9 * amount / seconds, "unit": unit}


# Running them.

Section = tuple[Callable[[Any], Iterator[Row]], float]
"""Rows of a bench, and the seconds that they take on an H100, compilation included."""

SECTIONS: dict[str, Section] = {
    "steps": (steps, 60),
    "psnr": (psnr_over_time, 120),
    "render": (render, 30),
    "correctness": (correctness, 20),
    "stages": (stages, 60),
    "kernels of a step": (kernels_of_step, 20),
    "kernels of a frame": (kernels_of_frame, 20),
    "ceilings": (ceilings, 30),
    "image and sdf": (other_tasks, 60),
}


def run_sections(sections: dict[str, Section], bench: Any, output: Path, *, budget: float) -> dict[str, str]:
    """Run what fits into `budget` seconds, in order; print and write the rows. Returns what became of the others."""
    end, notes = time.monotonic() + budget, dict[str, str]()
    results: Row = {"about": environment()}
    print(results["about"])
    for name, (section, seconds) in sections.items():
        print(f"\n## {name}\n", flush=True)
        rows: list[Row] = []
        results[name] = rows
        left = end - time.monotonic()
        if seconds > left:
            notes[name] = f"skipped: {seconds:.0f} s needed, {left:.0f} s left"
        try:
            for row in section(bench) if seconds <= left else ():
                if not rows:
                    print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
                rows.append(row)
                cells = [row.get(key, "") for key in rows[0]]
                print("|", " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells), "|", flush=True)
                write_json(output, results | {"notes": notes})
        except Exception as error:  # the next section may still measure something
            notes[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            traceback.print_exc()
        print(f"\n{notes.get(name, '')}")
        write_json(output, results | {"notes": notes})
    return notes


def define_flags(values: flags.Flags) -> None:
    flags.define_path(values, "scene", "bricks", "As for training.")
    flags.define_path(values, "data_dir", "", "Folder that holds the scene.")
    absl_flags.DEFINE_integer("downscale", 1, "Shrink the images by this factor.", 1, flag_values=values)
    absl_flags.DEFINE_enum("preset", "base", [*PRESETS], "A preset that marches.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "Set a field of the config.", flag_values=values)
    absl_flags.DEFINE_integer("eval_views", 4, "Evenly spaced views to evaluate.", 1, flag_values=values)
    absl_flags.DEFINE_float("budget", 570.0, "Seconds for everything.", 1.0, flag_values=values)
    absl_flags.DEFINE_list("sections", [*SECTIONS], f"Of {', '.join(SECTIONS)}.", flag_values=values)
    absl_flags.DEFINE_bool("toy", False, "Everything small enough for a CPU.", flag_values=values)
    flags.define_path(values, "output", "runs/gpu_bench.json", "Where the numbers are written.")


def main(values: flags.Flags) -> None:
    if unknown := [name for name in values.sections if name not in SECTIONS]:
        raise InputError(f"--sections: unknown {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    overrides = [*(TOY_OVERRIDES if values.toy else ()), *values.override]
    config = apply_overrides(replace(PRESETS[values.preset], scene=scene), overrides)
    if not isinstance(config.sampler, MarchConfig):
        raise InputError(f"--preset={values.preset} does not march, and this times marching: try base")
    images = load_training(scene).images
    if not isinstance(images, PosedImages):
        raise InputError(f"{scene.name} is a ray table: this needs views")
    evaluation = load_evaluation(scene, num_views=values.eval_views)
    bench = Bench(config, TOY if values.toy else Sizes(), images, evaluation)
    chosen = {name: section for name, section in SECTIONS.items() if name in values.sections}
    notes = run_sections(chosen, bench, Path(values.output), budget=values.budget)
    if any(note.startswith("failed") for note in notes.values()):
        sys.exit(1)


if __name__ == "__main__":
    flags.run("experiments.gpu.bench", define_flags, main, __doc__ or "")
