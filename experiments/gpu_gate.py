"""What XLA makes of the programs for a GPU, compiled on a machine that has none.

    python -m experiments.gpu_gate --preset=base
    python -m experiments.gpu_gate --gpu=rtx3090 --override=sampler.num_samples=2**17 --kernels
    python -m experiments.gpu_gate --preset=image --image_size=16384    # or sdf

Compiles a dispatch of training steps, the survey before the first, a refresh of the occupancy grid and the rendering
of one chunk of a view, for images of the given number and size; of `image` and `sdf`, the training of those
experiments, and the tracing of a frame. Needs the plugin of jax for CUDA 13, and neither a
driver nor a library of CUDA: `pip install .[gpu-aot]`. Nothing runs, so nothing is timed but the compiler. On a GPU XLA
may try for each matmul whether cuBLAS or Triton is faster; here all are cuBLAS's, as the package asks, or Triton's with
--triton_gemm.

Prints a Markdown table and writes it as JSON. MB are 2^20 bytes. "a + b" is what one round of a program's loops takes
(a training step, a round of samples), a loop in a loop counted once, and what the rest of it takes. Streamed are the
arrays that kernels read and write whole; scattered are the elements that they gather and scatter, as often as they do
so, caches or not. Corner arrays are temporaries that hold something for each sample, level and corner of its cell.
Compare-and-swap loops are atomic additions that the GPU has no instruction for, many times slower.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import hlo, image, sdf
from jaxngp import flags, rendering
from jaxngp.cameras import Camera, PosedImages, Rays
from jaxngp.config import HashGridConfig, ImageConfig, InputError, MarchConfig, NerfConfig, PointConfig, apply_overrides
from jaxngp.device import OPTIONS, jaxlib_version, scatter_workaround
from jaxngp.fields import field_maker
from jaxngp.presets import PRESETS
from jaxngp.tracing import GPU_LANES, trace_rays
from jaxngp.train_sdf import distance_maker
from jaxngp.training import steps
from jaxngp.training.points import DistanceSamples, ImagePixels, point_steps
from jaxngp.training.report import environment, write_json
from jaxngp.training.state import init_state

PLUGIN = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
MB = 2**20


@dataclass(frozen=True)
class Gpu:
    """What XLA asks about a GPU and GPUs differ in. Sizes are in bytes."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    fpus: int  # for float32, of a multiprocessor, as what follows up to shared_memory
    threads: int
    shared_memory: int
    l2_cache: int
    memory: int
    memory_bandwidth: int  # bytes a second
    clock_ghz: float

    def description(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.compute_capability
        return f"""
            gpu_device_info {{
              name: "{self.name}"
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.multiprocessors}
              fpus_per_core: {self.fpus}
              threads_per_core_limit: {self.threads}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory - 2**10}
              shared_memory_per_block: {48 * 2**10}
              registers_per_core_limit: {2**16}
              registers_per_block_limit: {2**16}
              threads_per_block_limit: {2**10}
              threads_per_warp: 32
              thread_dim_limit_x: {2**10} thread_dim_limit_y: {2**10} thread_dim_limit_z: 64
              block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
              l2_cache_size: {self.l2_cache}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.memory_bandwidth}
              clock_rate_ghz: {self.clock_ghz}
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


GPUS = {
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        multiprocessors=132,
        fpus=128,
        threads=2048,
        shared_memory=228 * 2**10,
        l2_cache=50 * 2**20,
        memory=80 * 2**30,
        memory_bandwidth=3352 * 10**9,
        clock_ghz=1.98,
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        multiprocessors=108,
        fpus=64,
        threads=2048,
        shared_memory=164 * 2**10,
        l2_cache=40 * 2**20,
        memory=80 * 2**30,
        memory_bandwidth=2039 * 10**9,
        clock_ghz=1.41,
    ),
    "rtx3090": Gpu(
        name="NVIDIA GeForce RTX 3090",
        compute_capability=(8, 6),
        multiprocessors=82,
        fpus=128,
        threads=1536,
        shared_memory=100 * 2**10,
        l2_cache=6 * 2**20,
        memory=24 * 2**30,
        memory_bandwidth=936 * 10**9,
        clock_ghz=1.695,
    ),
}


@dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with: arrays, or their shapes, and static keyword arguments."""

    function: Any  # what jax.jit returns
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A program as it would run on a GPU."""

    module: hlo.Module
    temporaries: list[hlo.Temporary]
    atomics: list[hlo.Atomic]
    temporary_bytes: int  # of memory for all temporaries, which share it
    argument_bytes: int
    trace_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class Row:
    """One line of the table. Bytes; of what is counted by kernels, (in the loops, outside)."""

    program: str
    trace_seconds: float
    compile_seconds: float
    kernels: tuple[int, int]
    trip_counts: list[int | None]  # of the outermost loops; None is not known when compiling
    temporary_bytes: int
    argument_bytes: int
    largest_temporary: str  # its type, and the operation that makes it
    streamed_bytes: tuple[int, int]
    scattered_bytes: tuple[int, int]
    cas_loops: dict[str, int]  # by the first result and the operation of the kernel that they are in
    vector_atomics: dict[str, int]  # by instruction
    float64_ops: int
    corner_arrays: list[str]
    launches: list[dict[str, Any]]  # every kernel


def check_plugin() -> None:
    """Raises InputError where the plugin is missing, or is not of jax's own version."""
    for package in PLUGIN:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"{package} is not installed: pip install .[gpu-aot]") from None
        if version != jax.__version__:
            raise InputError(f"{package} is {version} and jax is {jax.__version__}: pip install .[gpu-aot]")


def gpu_sharding(gpu: Gpu) -> NamedSharding:
    """Where arrays lie on one GPU that is not here. Arrays of one program need the same object."""
    topology = topologies.get_topology_desc(
        gpu.name, platform="cuda", target_config=gpu.description(), topology="1x1x1"
    )
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("gpu",)), PartitionSpec())


def point_presets(image_size: int) -> dict[str, PointConfig]:
    """The configs of images, with the largest table, and of signed distances, on a GPU."""
    grid = HashGridConfig(num_dims=2, table_size=2**24, max_resolution=max(16, image_size // 2))
    return {"image": image.default_config(grid, on_cpu=False), "sdf": sdf.PRESETS["paper"]}


def make_programs(config: NerfConfig, *, num_views: int, image_size: int, frame: tuple[int, int]) -> dict[str, Program]:
    """The programs of training on square views and of rendering a frame of (width, height), as they are called."""
    state = jax.eval_shape(lambda: init_state(0, config=config))
    images = jax.eval_shape(functools.partial(make_images, num_views, image_size))
    rates = jax.ShapeDtypeStruct((config.train.steps_per_dispatch,), jnp.float32)
    num_steps = jax.ShapeDtypeStruct((), jnp.int32)
    pixels = None
    if isinstance(config.sampler, MarchConfig):
        _, pixels = jax.eval_shape(functools.partial(steps.survey_views, config=config), images)
    programs = {"train": Program(steps.nerf_steps, (state, images, pixels, rates, num_steps), {"config": config})}
    if isinstance(config.sampler, MarchConfig):
        programs["survey"] = Program(steps.survey_views, (images,), {"config": config})
        programs["refresh"] = Program(steps.refresh_occupancy, (state,), {"config": config})

    # What render_image calls the compiled program with: recorded, for it knows how a frame is cut into chunks.
    with mock.patch.object(rendering, "chunk_program") as make_program:
        make_program.return_value.side_effect = StopIteration
        with contextlib.suppress(StopIteration):
            rendering.render_image(
                state.eval_params,
                make_camera(*frame),
                jnp.zeros((3, 4)),
                state.occupancy,
                jnp.ones(3),
                make_field=field_maker(config.field),
                sampler=config.sampler,
                batching=rendering.GPU_BATCHING,
            )
    static = dict(zip(("make_field", "sampler", "batching"), make_program.call_args.args, strict=True))
    programs["render"] = Program(rendering.render_chunk, make_program.return_value.call_args.args, static)
    return programs


def make_point_programs(config: PointConfig, *, image_size: int, frame: tuple[int, int]) -> dict[str, Program]:
    """The programs of learning a square image, or a signed distance and of tracing a frame of (width, height)."""
    state = jax.eval_shape(lambda: init_state(0, config=config))
    rates = jax.ShapeDtypeStruct((config.train.steps_per_dispatch,), jnp.float32)
    num_steps = jax.ShapeDtypeStruct((), jnp.int32)
    if isinstance(config, ImageConfig):
        image = jax.eval_shape(lambda: ImagePixels(jnp.zeros((image_size, image_size, 3), jnp.uint8)))
        return {"train": Program(point_steps, (state, image, rates, num_steps), {"config": config})}
    shapes = [(config.sdf.num_samples, *rest) for rest in ((3,), (3,), ())]
    samples = jax.eval_shape(lambda: DistanceSamples(*map(jnp.zeros, shapes)))
    rays = jax.eval_shape(lambda: Rays(*[jnp.zeros((frame[0] * frame[1], 3))] * 2))
    box = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    static = {"make_distance": distance_maker(config.field), "lanes": GPU_LANES}
    return {
        "train": Program(point_steps, (state, samples, rates, num_steps), {"config": config}),
        "trace": Program(trace_rays, (state.eval_params, rays, box), static),
    }


def make_camera(width: int, height: int) -> Camera:
    return Camera(focal_xy=jnp.ones(2), centre_xy=jnp.ones(2), width=width, height=height)


def make_images(num_views: int, size: int) -> PosedImages:
    return PosedImages(
        camera=make_camera(size, size),
        c2w=jnp.zeros((num_views, 3, 4)),
        rgba=jnp.zeros((num_views, size, size, 4), jnp.uint8),
    )


def compile_program(program: Program, sharding: NamedSharding, options: Mapping[str, Any]) -> Compiled:
    """Compiles for the GPU of the sharding."""

    def on_gpu(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with tempfile.TemporaryDirectory(prefix="jaxngp-gpu-") as dump:
        started = time.perf_counter()
        lowered = program.function.lower(*jax.tree.map(on_gpu, program.arguments), **program.static)
        traced = time.perf_counter()
        # Newer versions of XLA write PTX only where this regex asks for it.
        dumps = {"xla_dump_to": dump, "xla_dump_emitter_re": "ptx"}
        compiled = lowered.compile(compiler_options={**options, **dumps})
        finished = time.perf_counter()
        files = sorted(Path(dump).iterdir())
        ptx = [file.read_text() for file in files if file.suffix == ".ptx"]
        buffers = "".join(file.read_text() for file in files if file.name.endswith("buffer-assignment.txt"))
    temporaries = hlo.parse_temporaries(buffers)
    if not ptx or not temporaries:
        raise RuntimeError(f"jax {jax.__version__} writes no PTX or no buffer assignment as those before did")
    memory = compiled.memory_analysis()
    return Compiled(
        module=hlo.parse_module(compiled.as_text()),
        temporaries=temporaries,
        atomics=[atomic for text in ptx for atomic in hlo.parse_atomics(text)],
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        trace_seconds=traced - started,
        compile_seconds=finished - traced,
    )


def make_row(name: str, compiled: Compiled, grid: HashGridConfig) -> Row:
    kernels = hlo.kernels(compiled.module)
    arrays = [temporary.array for temporary in compiled.temporaries]
    largest = max(compiled.temporaries, key=lambda temporary: temporary.array.num_bytes)
    instructions = {hlo.ptx_name(kernel.instruction.name): kernel.instruction for kernel in kernels}

    def made(array: hlo.Array | None, name: str) -> str:
        """An array, by default the first that a kernel makes, and the operation that makes it."""
        instruction = instructions.get(hlo.ptx_name(name))
        if instruction is None:
            return str(array or name)
        return f"{array or instruction.results[0]} {short_name(instruction.op_name)}".strip()

    def total(count: Callable[[hlo.Kernel], int]) -> tuple[int, int]:
        return sum(count(k) for k in kernels if k.in_loop), sum(count(k) for k in kernels if not k.in_loop)

    return Row(
        program=name,
        trace_seconds=compiled.trace_seconds,
        compile_seconds=compiled.compile_seconds,
        kernels=total(lambda _: 1),
        trip_counts=[loop.trip_count for loop in hlo.loops(compiled.module)],
        temporary_bytes=compiled.temporary_bytes,
        argument_bytes=compiled.argument_bytes,
        largest_temporary=made(largest.array, largest.instruction),
        streamed_bytes=total(lambda kernel: kernel.traffic.streamed),
        scattered_bytes=total(lambda kernel: kernel.traffic.scattered),
        cas_loops=dict(Counter(made(None, a.kernel) for a in compiled.atomics if a.is_cas)),
        vector_atomics=dict(Counter(a.instruction for a in compiled.atomics if a.is_vector)),
        float64_ops=hlo.count_float64(compiled.module),
        corner_arrays=[
            str(array)
            for array in hlo.corner_arrays(arrays, num_levels=grid.num_levels, num_features=grid.num_features)
        ],
        launches=[
            {
                "kernel": kernel.instruction.name,
                "in_loop": kernel.in_loop,
                "results": [str(array) for array in kernel.instruction.results],
                **asdict(kernel.traffic),
                "op_name": kernel.instruction.op_name,
            }
            for kernel in kernels
        ],
    )


def markdown(rows: list[Row]) -> str:
    def both(values: tuple[int, int], unit: int = 1) -> str:
        return " + ".join(f"{value / unit:,.0f}" for value in values)

    def counts(values: Mapping[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in values.items()) or "none"

    lines = [
        "| program | trace, s | compile, s | kernels | rounds | temporaries, MB | arguments, MB | largest temporary "
        "| streamed, MB | scattered, MB | compare-and-swap loops | vector atomics | float64 | corner arrays |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.program,
            f"{row.trace_seconds:.1f}",
            f"{row.compile_seconds:.1f}",
            both(row.kernels),
            ", ".join("unknown" if count is None else str(count) for count in row.trip_counts) or "no loop",
            f"{row.temporary_bytes / MB:,.0f}",
            f"{row.argument_bytes / MB:,.0f}",
            row.largest_temporary,
            both(row.streamed_bytes, MB),
            both(row.scattered_bytes, MB),
            counts(row.cas_loops),
            counts(row.vector_atomics),
            str(row.float64_ops),
            ", ".join(row.corner_arrays) or "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels_markdown(row: Row) -> str:
    lines = ["| kernel | in a loop | results | streamed, MB | scattered, MB | operation |", "|---|---|---|---|---|---|"]
    for launch in row.launches:
        streamed, scattered = (f"{launch[name] / MB:.2f}" for name in ("streamed", "scattered"))
        results = " ".join(launch["results"])
        loop = "yes" if launch["in_loop"] else ""
        lines.append(
            f"| {launch['kernel']} | {loop} | {results} | {streamed} | {scattered} | {short_name(launch['op_name'])} |"
        )
    return "\n".join(lines)


def short_name(op_name: str) -> str:
    """The end of an operation's path, without what tracing put into it."""
    noise = re.compile(r"jit\(|jvp\(\)|transpose\(jvp\(\)\)|while|body|cond|branch_\d+_fun|checkpoint")
    return "/".join([part for part in op_name.split("/") if not noise.match(part)][-3:])


def parse_frame(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise InputError(f"--frame={text}: expected width x height in pixels, as in 1920x1080")
    return int(found.group(1)), int(found.group(2))


def parse_options(texts: list[str]) -> dict[str, Any]:
    """name=value as jax wants it: true and false are of a type of their own."""
    pairs = [text.partition("=")[::2] for text in texts]
    return {name: {"true": True, "false": False}.get(value, value) for name, value in pairs}


def define_flags(values: flags.Flags) -> None:
    absl_flags.DEFINE_string("preset", "base", "A preset of the config.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "Set a field of the config.", flag_values=values)
    absl_flags.DEFINE_enum("gpu", "h100", list(GPUS), "The GPU to compile for.", flag_values=values)
    absl_flags.DEFINE_integer("views", 100, "Training views.", 1, flag_values=values)
    absl_flags.DEFINE_integer("image_size", 800, "Pixels per side of these.", 1, flag_values=values)
    absl_flags.DEFINE_string("frame", "1920x1080", "Pixels of the view that is rendered.", flag_values=values)
    absl_flags.DEFINE_multi_string("program", [], "Only these: train, refresh, render.", flag_values=values)
    absl_flags.DEFINE_bool(
        "triton_gemm", False, "Matmuls by Triton, which fuses what surrounds them, not by cuBLAS.", flag_values=values
    )
    absl_flags.DEFINE_multi_string(
        "compiler_option", [], "An option of XLA, as in xla_gpu_ftz=true.", flag_values=values
    )
    absl_flags.DEFINE_bool("kernels", False, "Also list every kernel.", flag_values=values)
    absl_flags.DEFINE_string("output", "runs/gpu_gate.json", "Where the numbers are written.", flag_values=values)


def main(values: flags.Flags) -> None:
    presets = PRESETS | point_presets(values.image_size)
    if values.preset not in presets:
        raise InputError(f"--preset: unknown {values.preset!r}; there are {', '.join(presets)}")
    check_plugin()
    config = apply_overrides(presets[values.preset], values.override)
    asked = {"xla_gpu_enable_triton_gemm": values.triton_gemm, **parse_options(values.compiler_option)}
    # All before jax asks for devices: the plugin compiles without the libraries of CUDA, but looks for them first.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there leaves no texts to read

    gpu = GPUS[values.gpu]
    size, frame = values.image_size, parse_frame(values.frame)
    if isinstance(config, NerfConfig):
        programs = make_programs(config, num_views=values.views, image_size=size, frame=frame)
    else:
        programs = make_point_programs(config, image_size=size, frame=frame)
    if unknown := set(values.program) - set(programs):
        raise InputError(f"--program: unknown {min(unknown)!r}; this config has {', '.join(programs)}")
    sharding = gpu_sharding(gpu)
    cure = scatter_workaround(jaxlib_version(), gpu.compute_capability, config.field.precision)
    rows = []
    for name, program in programs.items():
        if not values.program or name in values.program:
            options = OPTIONS | (cure if name == "train" else {}) | asked  # as the package compiles it
            rows.append(make_row(name, compile_program(program, sharding, options), config.field.encoding))
    views = f"{values.views} views of {values.image_size}x{values.image_size}"
    print(f"preset {values.preset}, {views}, a frame of {values.frame}; {gpu.name}, jax {jax.__version__}\n")
    print(markdown(rows))
    if values.kernels:
        for row in rows:
            print(f"\n{row.program}:\n\n{kernels_markdown(row)}")
    write_json(
        values.output,
        {
            **environment(),
            "gpu": asdict(gpu),
            "versions": {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", *PLUGIN)},
            "preset": values.preset,
            "overrides": values.override,
            "views": values.views,
            "image_size": values.image_size,
            "frame": values.frame,
            "compiler_options": {"steps": OPTIONS | cure | asked, "others": OPTIONS | asked},
            "programs": {row.program: asdict(row) for row in rows},
        },
    )


if __name__ == "__main__":
    flags.run("experiments.gpu_gate", define_flags, main, __doc__ or "")
