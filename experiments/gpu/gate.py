"""What XLA compiles for a GPU that is not here: kernels, bytes, temporaries and atomics of the package's programs.

    python -m experiments.gpu.gate                                   # preset base, for an H100
    python -m experiments.gpu.gate --gpu=rtx3090 --override=sampler.num_samples=2**17 --kernels
    python -m experiments.gpu.gate --preset=image                    # or sdf

Needs jax's plugin for CUDA 13 and neither a driver nor a library of CUDA: `pip install .[gpu-aot]`. Nothing runs, so
nothing is timed but the compiler. Programs have the shapes of 100 views of 800x800, a frame of 1920x1080, an image of
4096x4096 and the samples of the preset for distances.

Prints the numbers and writes them as JSON. MB are 2^20 bytes. A round is one of each of a program's loops: a step of
training, a round of samples; a loop in a loop is counted once. Streamed are the arrays that kernels read and write
whole. Compare-and-swap loops are atomic additions for which the GPU has no instruction, many times slower. Corner
arrays hold something for each sample, level and corner of its cell, and should not exist.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.gpu import hlo
from jaxngp import flags, train_image, train_sdf
from jaxngp.cameras import PosedImages, Rays, make_cameras
from jaxngp.config import (
    HashGridConfig,
    ImageConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    RunConfig,
    SdfConfig,
    apply_overrides,
    program_config,
)
from jaxngp.device import GPU_BATCHING, Target, compiler_options, jaxlib_version, step_compiler_options
from jaxngp.fields import DistanceField, RadianceField
from jaxngp.presets import PRESETS
from jaxngp.records import environment, write_json
from jaxngp.rendering import render_chunk
from jaxngp.tracing import trace_rays
from jaxngp.training import image, nerf, sdf
from jaxngp.training.loop import init_state

Row = dict[str, Any]
PLUGIN = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
MB = 2**20
NUM_VIEWS, VIEW_SIZE, IMAGE_SIZE = 100, 800, 4096
FRAME = 1920 * 1080  # rays, which GPU_BATCHING renders in one call


# GPUs.


class Gpu(NamedTuple):
    """What XLA asks about a GPU and GPUs differ in."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    fpus: int  # for float32, of a multiprocessor, as are threads and shared_kb
    threads: int
    shared_kb: int
    l2_mb: int
    memory_gb: int
    gb_per_s: int
    clock_ghz: float

    def sharding(self) -> NamedSharding:
        """Where arrays live on one such GPU. The arrays of one program need the same object."""
        topology = topologies.get_topology_desc(
            self.name, platform="cuda", target_config=self.description(), topology="1x1x1"
        )
        return NamedSharding(Mesh(np.array(topology.devices[:1]), ("gpu",)), PartitionSpec())

    def description(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        return f"""
            gpu_device_info {{
              name: "{self.name}"
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
              core_count: {self.multiprocessors} fpus_per_core: {self.fpus} threads_per_core_limit: {self.threads}
              shared_memory_per_core: {self.shared_kb << 10} shared_memory_per_block: {48 << 10}
              shared_memory_per_block_optin: {(self.shared_kb - 1) << 10}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              threads_per_block_limit: 1024 threads_per_warp: 32
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
              l2_cache_size: {self.l2_mb << 20} device_memory_size: {self.memory_gb << 30}
              memory_bandwidth: {self.gb_per_s * 10**9} clock_rate_ghz: {self.clock_ghz}
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 80, 3352, 1.98),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 40, 80, 2039, 1.41),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 128, 1536, 100, 6, 24, 936, 1.695),
}


def check_plugin() -> None:
    """Raises InputError where the plugin is missing, or is not of jax's own version."""
    for package in PLUGIN:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"{package} is not installed: pip install .[gpu-aot]") from None
        if version != jax.__version__:
            raise InputError(f"{package} is {version} and jax is {jax.__version__}: pip install .[gpu-aot]")


# Programs.


Program = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A jitted function, the shapes that it is called with, and its static arguments."""


def configs() -> dict[str, RunConfig]:
    """The presets of radiance fields; and of images, with the largest table, and of distances, as on a GPU."""
    grid = HashGridConfig(num_dims=2, table_size=2**24, max_resolution=IMAGE_SIZE // 2)
    return {**PRESETS, "image": train_image.default_config(grid, on_cpu=False), "sdf": train_sdf.PRESETS["paper"]}


def programs_of(config: RunConfig) -> dict[str, Program]:
    """What a GPU runs in learning and showing what a config describes."""
    tasks: dict[type, Any] = {NerfConfig: nerf_programs, ImageConfig: image_programs, SdfConfig: sdf_programs}
    return tasks[type(config)](config)


def nerf_programs(config: NerfConfig) -> dict[str, Program]:
    state, steps, static = training_arguments(config)
    field = jax.eval_shape(lambda params: RadianceField.of(params, config=config.field), state.eval_params)
    arguments = (field, frame_rays(), state.occupancy, shape((3,)))
    render = (render_chunk, arguments, {"sampler": config.sampler, "batching": GPU_BATCHING})
    views = make_views()
    if not isinstance(config.sampler, MarchConfig):
        return {"train": (nerf.nerf_steps, (state, views, None, *steps), static), "render": render}
    _, pixels = jax.eval_shape(lambda views: nerf.hull_of_views(views, config=config), views)
    return {
        "train": (nerf.nerf_steps, (state, views, pixels, *steps), static),
        "hull": (nerf.hull_of_views, (views,), static),
        "refresh": (nerf.refresh_occupancy, (state,), static),
        "render": render,
    }


def image_programs(config: ImageConfig) -> dict[str, Program]:
    state, steps, static = training_arguments(config)
    pixels = image.ImagePixels(shape((IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8))
    return {"train": (image.image_steps, (state, pixels, *steps), static)}


def sdf_programs(config: SdfConfig) -> dict[str, Program]:
    state, steps, static = training_arguments(config)
    samples = sdf.DistanceSamples(*(shape((config.sdf.num_samples, *rest)) for rest in ((3,), (3,), ())))
    distance = jax.eval_shape(lambda params: DistanceField.of(params, config=config.field), state.eval_params)
    return {
        "train": (sdf.sdf_steps, (state, samples, *steps), static),
        "trace": (trace_rays, (distance, frame_rays(), shape((2, 3))), {"lanes": GPU_BATCHING.tracing_lanes}),
    }


def training_arguments(config: RunConfig) -> tuple[Any, tuple[Any, Any], dict[str, Any]]:
    """What the steps of every task take: state; learning rates and number of steps; static arguments."""
    state = jax.eval_shape(lambda: init_state(0, config=config))
    steps = (shape((config.train.steps_per_dispatch,)), shape((), jnp.int32))
    return state, steps, {"config": program_config(config)}


def shape(dims: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)


def frame_rays() -> Rays:
    return Rays(shape((FRAME, 3)), shape((FRAME, 3)))


def make_views() -> PosedImages:
    """The shapes of NUM_VIEWS square views."""
    cameras = make_cameras(
        np.zeros((NUM_VIEWS, 3, 4)), focal_xy=[1, 1], centre_xy=[1, 1], width=VIEW_SIZE, height=VIEW_SIZE
    )
    rgba, offset = shape((NUM_VIEWS * VIEW_SIZE**2, 4), jnp.uint8), shape((NUM_VIEWS,), jnp.int32)
    return PosedImages(cameras, rgba, offset, (VIEW_SIZE, VIEW_SIZE))


# What they take.


def measure(program: Program, sharding: NamedSharding, options: dict[str, Any], grid: HashGridConfig) -> Row:
    """Compile for the GPU of the sharding, and read what comes out; "kernel list" has a line for each kernel."""

    def on_gpu(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    (function, arguments, static), started = program, time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        lowered = function.lower(*jax.tree.map(on_gpu, arguments), **static)
        # Since 0.11 XLA writes PTX only where this regex asks for it.
        compiled = lowered.compile({**options, "xla_dump_to": dump, "xla_dump_emitter_re": "ptx"})
        ptx = [file.read_text() for file in Path(dump).glob("*.ptx")]
    if not ptx:
        raise RuntimeError(f"jax {jax.__version__} wrote no PTX to xla_dump_to")
    seconds = time.perf_counter() - started
    module = hlo.parse_module(compiled.as_text())
    kernels = hlo.kernels(module)
    looping = [kernel for kernel in kernels if kernel.in_loop]
    by_ptx_name = {hlo.ptx_name(kernel.instruction.name): kernel.instruction for kernel in kernels}
    atomics = [atomic for text in ptx for atomic in hlo.parse_atomics(text)]
    sizes = {"num_levels": grid.num_levels, "num_features": grid.num_features, "num_corners": 2**grid.num_dims}

    def described(kernel: str) -> str:
        instruction = by_ptx_name.get(kernel)
        return f"{instruction.results[0]} {short_name(instruction.op_name)}" if instruction else kernel

    return {
        "compile, s": round(seconds, 1),
        "kernels in a round": len(looping),
        "kernels outside": len(kernels) - len(looping),
        "rounds": [loop.trip_count for loop in hlo.loops(module)],
        "temporaries, MB": compiled.memory_analysis().temp_size_in_bytes // MB,
        "streamed in a round, MB": sum(kernel.streamed for kernel in looping) // MB,
        "compare-and-swap loops": dict(Counter(described(kernel) for kernel, name in atomics if ".cas." in name)),
        "vector atomics": dict(Counter(name for _, name in atomics if re.search(r"\.v[248]\.", name))),
        "corner arrays": [str(a) for k in kernels for a in k.instruction.results if hlo.is_corner_array(a, **sizes)],
        "float64": hlo.num_float64(module),
        "kernel list": [
            f"{'loop' if kernel.in_loop else '    '} {kernel.streamed / MB:9.2f} MB  {kernel.instruction.name}: "
            f"{' '.join(map(str, kernel.instruction.results))} {short_name(kernel.instruction.op_name)}"
            for kernel in kernels
        ],
    }


def short_name(op_name: str) -> str:
    """The last three parts of an operation's path."""
    return "/".join(op_name.split("/")[-3:])


# The command.


def define_flags(values: flags.Flags) -> None:
    absl_flags.DEFINE_string("preset", "base", "A preset of the config, or image or sdf.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "Set a field of the config.", flag_values=values)
    absl_flags.DEFINE_enum("gpu", "h100", list(GPUS), "The GPU to compile for.", flag_values=values)
    absl_flags.DEFINE_list("programs", [], "Only these of train, hull, refresh, render, trace.", flag_values=values)
    absl_flags.DEFINE_bool("kernels", False, "Also list every kernel.", flag_values=values)
    flags.define_path(values, "output", "runs/gpu_gate.json", "Where the numbers are written.")


def main(values: flags.Flags) -> None:
    presets = configs()
    if values.preset not in presets:
        raise InputError(f"--preset: unknown {values.preset!r}; there are {', '.join(presets)}")
    config = apply_overrides(presets[values.preset], values.override)
    programs = programs_of(config)
    if unknown := set(values.programs) - set(programs):
        raise InputError(f"--programs: unknown {min(unknown)!r}; this config has {', '.join(programs)}")
    check_plugin()
    # Before jax asks for devices: the plugin compiles without the libraries of CUDA, but looks for them first.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache leaves no PTX to read
    gpu = GPUS[values.gpu]
    sharding, target = gpu.sharding(), Target(True, jaxlib_version(), gpu.capability)
    options = {name: compiler_options(target) for name in programs}  # as the package compiles them
    options["train"] = step_compiler_options(config.field.precision, at=target)
    rows = {
        name: measure(programs[name], sharding, options[name], config.field.encoding)
        for name in values.programs or programs
    }
    print(f"preset {values.preset}, {gpu.name}, jax {jax.__version__}")
    write_json(values.output, {**environment(), "gpu": gpu.name, "preset": values.preset, "programs": rows})
    for name, row in rows.items():
        kernels = row.pop("kernel list")
        print(f"\n## {name}\n", *(f"- {key}: {value}" for key, value in row.items()), sep="\n")
        print(*(kernels if values.kernels else ()), sep="\n")


if __name__ == "__main__":
    flags.run("experiments.gpu.gate", define_flags, main, __doc__ or "")
