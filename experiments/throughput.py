"""Where the time of a training step goes, stage by stage, beside what this machine could do at best.

    python -m experiments.throughput --scene=lego --data_dir=DIR --downscale=4

Trains the preset for a thousand steps first, so that rays, samples and the grid are those of a run. Every stage
is a compiled loop in which each round depends on the one before, so that XLA can hoist nothing; loops take turns, the
first turn is not counted, and the median is shown.

`limit` is the time that the stage's floating-point operations, its compulsory memory traffic (each input and output
once), or its reads and additions at scattered places would take at the ceilings measured in the same run, whichever
is the most; `bound by` says which. Of the reads and additions the ceiling is what XLA makes of a program that does
nothing else at the same places, known beforehand: consecutive samples share cells, so these are not random. Such a
program may be slower than the stage that does the same and more: a factor below 1 says that XLA fuses it badly. The
limit of the whole step is the sum of its stages' limits, or of their times where these are less. Prints a Markdown
table and writes it as JSON.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from flax import struct

from experiments.timing import iterated, loop_ms, median_ms
from jaxngp import flags
from jaxngp.cameras import PosedImages, Rays, resize_cameras
from jaxngp.compositing import composite
from jaxngp.config import FieldConfig, InputError, MarchConfig, NerfConfig, apply_overrides
from jaxngp.data import load_training
from jaxngp.encodings import all_corners, hash_encode
from jaxngp.fields import NerfNetwork, Params, RadianceField, compute_dtype, make_half_table
from jaxngp.marching import Candidates, Samples, box_interval, draw_samples, find_visible, pack_steps
from jaxngp.presets import PRESETS, scene_config
from jaxngp.records import environment, write_json
from jaxngp.rendering import render_view
from jaxngp.training import nerf
from jaxngp.training.loop import train
from jaxngp.training.nerf import PixelBatch, StepNoise
from jaxngp.training.optimizer import make_optimizer
from jaxngp.training.state import TrainState
from jaxngp.visual_hull import PixelSet

COPIED_BYTES = 2**28  # of the array that is read and written for the memory's ceiling
OPTIMISER_ROUNDS = 10
WORD_READS = 16  # of each sample's word of the grid, for the ceiling
MATRIX = 2048  # rows of the matrices that are multiplied for the arithmetic's


@dataclass(frozen=True)
class Work:
    """What a stage cannot do without: rows are those of the hash table, words those of the occupancy grid."""

    flops: float = 0
    num_bytes: float = 0
    reads: float = 0  # of rows
    additions: float = 0  # to rows
    word_reads: float = 0


@dataclass(frozen=True)
class Stage:
    """function(x, *others), of which x holds floats, and the work in it; `rounds` of it make one timed call."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    work: Work
    samples: float
    rounds: int = 10


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    ms: float
    msamples_per_s: float
    gflop_per_s: float
    gb_per_s: float
    limit_ms: float | None
    bound_by: str


def measure_ceilings(config: NerfConfig, state: TrainState, position: jax.Array, runs: int) -> dict[str, float]:
    """GFLOP/s of a large float32 matmul, GB/s of a large array, and millions a second of table rows read and added to.

    The rows are those of the encoding at the points given, in its order, and of the grid's words that hold them:
    programs that do nothing else, with the places known beforehand.
    """
    grid = config.field.encoding
    assert state.occupancy is not None
    key = jax.random.key(0)
    square = jax.random.normal(key, (MATRIX, MATRIX)) / MATRIX**0.5
    table, update = state.params["encoding"]["table"], jnp.ones((len(position), grid.num_features))
    rows = jnp.transpose(all_corners(position, grid)[0], (1, 2, 0))  # (L, 8, N)
    resolution = state.occupancy.resolution
    column, row, layer = jnp.clip((position * resolution).astype(jnp.int32), 0, resolution - 1).T
    words = jnp.tile((column + resolution * (row + resolution * layer)) >> 5, WORD_READS)

    def read(table: jax.Array, rows: jax.Array) -> jax.Array:
        levels = [[table.at[row].get(mode="promise_in_bounds") for row in level] for level in rows]
        return jnp.concatenate([functools.reduce(jnp.add, level) for level in levels], axis=1)

    def add(table: jax.Array, rows: jax.Array, update: jax.Array) -> jax.Array:
        for row in rows.reshape(-1, rows.shape[-1]):
            table = table.at[row].add(update, mode="promise_in_bounds")
        return table

    calls: dict[str, Callable[[], object]] = {
        "gflop_per_s": functools.partial(jax.jit(lambda a: jnp.matmul(a, a, precision="highest")), square),
        "gb_per_s": iterated(lambda a: a + 1, jnp.ones(COPIED_BYTES // 4), rounds=1),
        "mreads_per_s": functools.partial(jax.jit(read), table, rows),
        "madditions_per_s": iterated(add, table, rows, update, rounds=1),
        "mword_reads_per_s": functools.partial(
            jax.jit(lambda t, i: t.at[i].get(mode="promise_in_bounds")), state.occupancy.occupied.reshape(-1), words
        ),
    }
    per_call = {
        "gflop_per_s": 2e-9 * MATRIX**3,
        "gb_per_s": 2e-9 * COPIED_BYTES,
        "mreads_per_s": 1e-6 * rows.size,
        "madditions_per_s": 1e-6 * rows.size,
        "mword_reads_per_s": 1e-6 * words.size,
    }
    return {name: per_call[name] / (1e-3 * ms) for name, ms in median_ms(calls, runs=runs).items()}


def limit_ms(work: Work, ceilings: dict[str, float]) -> tuple[float, str]:
    """The least time for some work, and what takes it."""
    times = {
        "arithmetic": work.flops / (1e6 * ceilings["gflop_per_s"]),
        "memory": work.num_bytes / (1e6 * ceilings["gb_per_s"]),
        "reads of rows": work.reads / (1e3 * ceilings["mreads_per_s"]),
        "additions to rows": work.additions / (1e3 * ceilings["madditions_per_s"]),
        "reads of words": work.word_reads / (1e3 * ceilings["mword_reads_per_s"]),
    }
    name = max(times, key=lambda name: times[name])
    return times[name], name


def num_bytes(*trees: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def network_flops(params: Params, num_samples: int) -> int:
    """Of one forward pass: a multiplication and an addition per weight and sample."""
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
    return 2 * num_samples * sum(kernel.size for kernel in kernels)


@struct.dataclass
class StepInputs:
    """What each stage of one step reads: R rays and their noise, N packed samples, and what the field makes of them."""

    batch: PixelBatch
    noise: StepNoise
    rays: Rays
    candidates: Candidates
    looked_at: Samples  # M packed steps, the samples themselves where none is looked at first
    samples: Samples
    direction: jax.Array  # (N, 3)
    position: jax.Array  # (N, 3) scene units
    features: jax.Array  # (N, L * F)
    density: jax.Array  # (N,)
    rgb: jax.Array  # (N, 3)


def table_to_read(params: Params, field: FieldConfig) -> jax.Array:
    """The hash table, or its half_table where the field reads that."""
    half_table = make_half_table(params, config=field)
    return params["encoding"]["table"] if half_table is None else half_table


def draw_batch(
    step: jax.Array, key: jax.Array, data: PosedImages, pixels: PixelSet, *, config: NerfConfig
) -> tuple[PixelBatch, StepNoise]:
    """Pixels and noise of one step."""
    batches = nerf.draw_batches(step, key, data, pixels, num_steps=1, config=config)
    return jax.tree.map(lambda a: a[0], batches)


@functools.partial(jax.jit, static_argnames="config")
def step_inputs(
    key: jax.Array, state: TrainState, data: PosedImages, pixels: PixelSet, *, config: NerfConfig
) -> StepInputs:
    """The inputs of the stages of one step, whose pixels and noise `key` draws."""
    sampler = config.sampler
    assert isinstance(sampler, MarchConfig)
    assert state.occupancy is not None
    batch, noise = draw_batch(jnp.int32(0), key, data, pixels, config=config)
    rays = data.source.cast(batch.view, batch.xy)
    candidates = find_visible(rays, state.occupancy, noise.jitter, config=sampler)
    looked_at = samples = pack_steps(candidates, size=sampler.num_candidates or sampler.num_samples)
    field, read = config.field, table_to_read(state.params, config.field)
    if sampler.num_candidates:
        held = RadianceField.of(state.params, config=field)
        samples = draw_samples(looked_at, rays, held, jnp.int32(0), config=sampler)
    direction = rays.direction[samples.ray]
    position = rays.origin[samples.ray] + samples.t[:, None] * direction
    features = hash_encode(read, position, grid=field.encoding, dtype=compute_dtype(field))
    density, rgb = run_networks(features, direction, state.params, field=field)
    return StepInputs(batch, noise, rays, candidates, looked_at, samples, direction, position, features, density, rgb)


def training_stages(
    config: NerfConfig, state: TrainState, data: PosedImages, pixels: PixelSet, *, seed: int = 1
) -> dict[str, Stage]:
    """The stages of one step, each with the arguments that it has there; `seed` draws the step's pixels and noise."""
    sampler = config.sampler
    assert isinstance(sampler, MarchConfig)
    assert state.occupancy is not None
    field, grid, occupancy = config.field, config.field.encoding, state.occupancy
    inputs = step_inputs(jax.random.key(seed), state, data, pixels, config=config)
    batch, noise, rays = inputs.batch, inputs.noise, inputs.rays
    candidates, samples, direction, position = inputs.candidates, inputs.samples, inputs.direction, inputs.position
    features, density, rgb = inputs.features, inputs.density, inputs.rgb
    table = state.params["encoding"]["table"]
    count, corners = sampler.num_samples, 2**grid.num_dims * grid.num_levels
    num_steps = sampler.num_candidates or count  # that are packed
    networks = {name: value for name, value in state.params.items() if name != "encoding"}
    # The steps within the grid's bounds have to be tested, in one set of cells or two.
    t_enter, t_leave = box_interval(rays, occupancy.bounds[0], occupancy.bounds[1])
    tests = float(jnp.sum(jnp.maximum(t_leave - t_enter, 0))) / sampler.step_size * (2 if sampler.opaque_steps else 1)

    # Whatever a stage reads has to depend on its first argument, or XLA computes what follows from it but once.
    def moved(x: jax.Array, array: jax.Array) -> jax.Array:
        return array + x.reshape(-1)[0] * 1e-30

    def draw(x: jax.Array, key: jax.Array, data: PosedImages, pixels: PixelSet) -> Any:
        batch, noise = draw_batch(x[0].astype(jnp.int32), key, data, pixels, config=config)
        return data.source.cast(batch.view, batch.xy), batch.rgba, noise

    def march(jitter: jax.Array, rays: Any, occupancy: Any) -> Any:
        return find_visible(rays, occupancy, jitter, config=sampler)

    def pack(jitter: jax.Array, candidates: Candidates) -> Any:
        words = candidates.words | (jitter[0] > 2).astype(jnp.uint32)
        samples = pack_steps(replace(candidates, words=words), size=num_steps)
        return samples.t, samples.dt, samples.ray

    def look(t: jax.Array, looked_at: Samples, rays: Any, params: Params) -> Any:
        held = RadianceField.of(params, config=field)
        samples = draw_samples(replace(looked_at, t=t), rays, held, jnp.int32(0), config=sampler)
        return samples.t, samples.dt, samples.ray

    def encode(position: jax.Array, table: jax.Array) -> jax.Array:
        return hash_encode(table, position, grid=grid, dtype=compute_dtype(field))

    def encode_backward(gradient: jax.Array, position: jax.Array, table: jax.Array) -> jax.Array:
        position = moved(gradient, position)
        return jax.vjp(lambda t: hash_encode(t, position, grid=grid, dtype=gradient.dtype), table)[1](gradient)[0]

    def networks_forward(features: jax.Array, direction: jax.Array, params: Params) -> Any:
        return run_networks(features, moved(features, direction), params, field=field)

    def networks_both(features: jax.Array, direction: jax.Array, params: Params, weights: Any) -> Any:
        def loss(features: jax.Array, params: Params) -> jax.Array:
            out = run_networks(features, moved(features, direction), params, field=field)
            return sum(jnp.sum(a * w) for a, w in zip(out, weights, strict=True))  # type: ignore[return-value]

        return jax.grad(loss, argnums=(0, 1))(features, params)

    def composite_both(density: jax.Array, rgb: jax.Array, samples: Any, background: jax.Array) -> Any:
        def loss(density: jax.Array, rgb: jax.Array) -> jax.Array:
            out = composite(density, rgb, samples.t, samples.dt, samples.ray, background)
            return jnp.sum((out.rgb - 0.5) ** 2)

        return jax.grad(loss, argnums=(0, 1))(density, rgb)

    weights = (jnp.ones_like(density), jnp.ones_like(rgb))
    pixel_bytes = 4 * 4 * len(noise.jitter)
    forward = network_flops(networks, count)
    looking = Stage(
        look,
        (inputs.looked_at.t, inputs.looked_at, rays, state.params),
        Work(
            flops=network_flops({"density_mlp": networks["density_mlp"]}, num_steps),
            reads=corners * num_steps,
            num_bytes=num_bytes(inputs.looked_at, samples),
        ),
        num_steps,
    )
    return {
        "draw": Stage(
            draw,
            (jnp.zeros(1), jax.random.key(seed), data, pixels),
            Work(num_bytes=pixel_bytes + num_bytes(batch, noise, rays)),
            count,
        ),
        "march": Stage(march, (noise.jitter, rays, occupancy), Work(word_reads=tests), num_steps),
        "pack": Stage(
            pack, (noise.jitter, candidates), Work(num_bytes=num_bytes(candidates.words, inputs.looked_at)), num_steps
        ),
        **({"look": looking} if sampler.num_candidates else {}),
        "encode, forward": Stage(
            encode,
            (position, table_to_read(state.params, field)),
            Work(reads=corners * count, num_bytes=num_bytes(position, features)),
            count,
        ),
        "encode, backward": Stage(
            encode_backward,
            (features, position, table),
            Work(additions=corners * count, num_bytes=num_bytes(position, features, table)),
            count,
        ),
        "MLPs, forward": Stage(
            networks_forward,
            (features, direction, networks),
            Work(flops=forward, num_bytes=num_bytes(features, direction, density, rgb)),
            count,
        ),
        "MLPs, forward and backward": Stage(
            networks_both,
            (features, direction, networks, weights),
            Work(flops=3 * forward, num_bytes=num_bytes(features, features, direction, density, rgb)),
            count,
        ),
        "composite, forward and backward": Stage(
            composite_both,
            (density, rgb, samples, noise.background),
            Work(num_bytes=2 * num_bytes(density, rgb, samples.t, samples.dt, samples.ray)),
            count,
        ),
    }


def optimiser_calls(config: NerfConfig, state: TrainState) -> tuple[Callable[[], Any], Work]:
    """OPTIMISER_ROUNDS steps of Adam with the gradient given, in place."""
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), state.params)

    def step(carry: tuple[Params, Any], gradient: Params) -> tuple[Params, Any]:
        params, opt_state = carry
        updates, opt_state = make_optimizer(config.optimizer).update(gradient, opt_state, params)
        return jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates), opt_state

    carry = (state.params, state.opt_state)
    work = Work(num_bytes=num_bytes(gradient) + 2 * num_bytes(*carry))
    return iterated(step, carry, gradient, rounds=OPTIMISER_ROUNDS), work


def run_networks(
    features: jax.Array, direction: jax.Array, params: Params, *, field: Any
) -> tuple[jax.Array, jax.Array]:
    density, rgb = NerfNetwork(field).apply({"params": params}, features, direction, method="networks")
    return jnp.asarray(density), jnp.asarray(rgb)


def whole_calls(
    config: NerfConfig, state: TrainState, data: PosedImages, pixels: PixelSet, image_size: int
) -> dict[str, Callable[[], Any]]:
    """A dispatch of whole steps, a refresh of the grid, and a whole image: compiled programs of their own."""
    count = config.train.steps_per_dispatch
    rates = jnp.full(count, 1e-3)
    held = {"state": state}

    def dispatch() -> Any:  # donates the state, as training does
        held["state"], metrics = nerf.nerf_steps(held["state"], data, pixels, rates, jnp.int32(count), config=config)
        return held["state"].step, metrics

    def refresh() -> Any:
        held["state"] = nerf.refresh_occupancy(held["state"], config=config)
        return held["state"].occupancy

    camera = resize_cameras(data.cameras, image_size, image_size)[0]
    params, occupancy = jax.tree.map(jnp.copy, (state.eval_params, state.occupancy))
    field = RadianceField.of(params, config=config.field)

    def image() -> Any:
        return render_view(field, camera, occupancy, jnp.ones(3), sampler=config.sampler).rgb

    return {"step": dispatch, "refresh": refresh, "image": image}


def measure(config: NerfConfig, data: PosedImages, values: flags.Flags) -> tuple[list[Row], dict[str, float]]:
    """The rows of the table, and the ceilings."""
    *_, progress = train(config, data)
    state, data = progress.state, jax.device_put(data)
    _, pixels = nerf.hull_of_views(data, config=config)
    sampler = config.sampler
    assert isinstance(sampler, MarchConfig)
    stages = training_stages(config, state, data, pixels)
    position = stages["encode, forward"].arguments[0]
    ceilings = measure_ceilings(config, state, position, values.runs)
    times = loop_ms({name: (s.function, *s.arguments) for name, s in stages.items()}, runs=values.runs)
    rows = [stage_row(name, times[name], stage.samples, stage.work, ceilings) for name, stage in stages.items()]

    adam, work = optimiser_calls(config, state)
    ms = median_ms({"optimiser": adam}, runs=values.runs)["optimiser"] / OPTIMISER_ROUNDS
    rows.append(stage_row("optimiser", ms, sampler.num_samples, work, ceilings))
    whole = median_ms(whole_calls(config, state, data, pixels, values.image_size), runs=values.runs)
    per_step = whole["step"] / config.train.steps_per_dispatch
    parts = [row for row in rows if row.stage != "MLPs, forward"]
    limit = math.fsum(min(row.limit_ms or 0, row.ms) for row in parts)  # what a stage reaches is no less than its limit
    rows.append(replace(stage_row("whole step", per_step, sampler.num_samples, Work(), ceilings), limit_ms=limit))
    rows.append(stage_row("occupancy refresh", whole["refresh"], 0, Work(), ceilings))
    rows.append(stage_row(f"whole image, {values.image_size}x{values.image_size}", whole["image"], 0, Work(), ceilings))
    return rows, ceilings


def stage_row(name: str, ms: float, samples: float, work: Work, ceilings: dict[str, float]) -> Row:
    limit, bound_by = limit_ms(work, ceilings)
    known = limit > 0
    return Row(
        stage=name,
        ms=ms,
        msamples_per_s=1e-3 * samples / ms,
        gflop_per_s=1e-6 * work.flops / ms,
        gb_per_s=1e-6 * work.num_bytes / ms,
        limit_ms=limit if known else None,
        bound_by=bound_by if known else "",
    )


def markdown(rows: list[Row]) -> str:
    lines = [
        "| stage | ms | Msamples/s | GFLOP/s | GB/s | limit, ms | times the limit | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{v:.1f}" if v else "" for v in (row.msamples_per_s, row.gflop_per_s, row.gb_per_s)]
        limit = ["", ""] if row.limit_ms is None else [f"{row.limit_ms:.2f}", f"{row.ms / row.limit_ms:.1f}"]
        lines.append(f"| {row.stage} | {row.ms:.2f} | {' | '.join(numbers + limit)} | {row.bound_by} |")
    return "\n".join(lines)


def define_marching_flags(values: flags.Flags, *, preset: str) -> None:
    """The flags of what is measured on a scene with a preset that marches, by default the one named."""
    absl_flags.DEFINE_string("scene", "bricks", "As for training.", flag_values=values)
    absl_flags.DEFINE_string("data_dir", "", "Folder that holds the scene.", flag_values=values)
    absl_flags.DEFINE_integer("downscale", 1, "Shrink the images by this factor.", 1, flag_values=values)
    absl_flags.DEFINE_string("preset", preset, "A preset that marches.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "Set a field of the config.", flag_values=values)


def define_flags(values: flags.Flags) -> None:
    define_marching_flags(values, preset="small")
    absl_flags.DEFINE_integer("steps", 1000, "Steps of training before anything is timed.", 1, flag_values=values)
    absl_flags.DEFINE_integer("image_size", 800, "Pixels per side of the whole image.", 16, flag_values=values)
    absl_flags.DEFINE_integer("runs", 9, "Timed turns of each stage.", 1, flag_values=values)
    absl_flags.DEFINE_string("output", "runs/throughput.json", "Where the numbers are written.", flag_values=values)


def main(values: flags.Flags) -> None:
    if values.preset not in PRESETS:
        raise InputError(f"--preset: unknown {values.preset!r}; there are {', '.join(PRESETS)}")
    scene = replace(scene_config(values.scene), data_dir=values.data_dir, downscale=values.downscale)
    config = apply_overrides(replace(PRESETS[values.preset], scene=scene), values.override)
    config = replace(config, train=replace(config.train, max_seconds=0.0, max_steps=values.steps))
    if not isinstance(config.sampler, MarchConfig):
        raise InputError(f"--preset={values.preset} does not march, and this times marching: try small")
    images = load_training(scene).images
    if not isinstance(images, PosedImages):
        raise InputError(f"{scene.name} is a ray table: this needs views")
    rows, ceilings = measure(config, images, values)
    about = environment()
    names = {
        "gflop_per_s": f"float32 matmul of {MATRIX}x{MATRIX}: {{:.0f}} GFLOP/s",
        "gb_per_s": f"reading and writing {COPIED_BYTES >> 20} MB: {{:.1f}} GB/s",
        "mreads_per_s": "reads of table rows: {:.0f} million a second",
        "madditions_per_s": "additions to them: {:.0f} million a second",
        "mword_reads_per_s": "reads of the grid's words: {:.0f} million a second",
    }
    print(f"{scene.name}, preset {values.preset}, {config.sampler.num_samples} samples a step; ", end="")
    print(f"{about['device']}, jax {about['jax_version']}")
    print("; ".join(text.format(ceilings[name]) for name, text in names.items()) + "\n")
    print(markdown(rows))
    rounded = {name: float(np.float32(value)) for name, value in ceilings.items()}
    write_json(values.output, {**about, "ceilings": rounded, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    flags.run("experiments.throughput", define_flags, main, __doc__ or "")
