"""The sections of `experiments.gpu_bench` on images and signed distances."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_run import RUNS, Bench
from jaxngp import train_image as image_experiment
from jaxngp import train_sdf as sdf_experiment
from jaxngp.config import HashGridConfig, PointConfig
from jaxngp.data.atlas import builtin_image
from jaxngp.data.shapes import SHAPES
from jaxngp.metrics import psnr
from jaxngp.tracing import draw_surface
from jaxngp.training.loop import Progress, train

SHAPE = "shapes"


def image(bench: Bench) -> None:
    """The built-in image, held on the device and then on the host; PSNR over all pixels after the former."""
    size = bench.sizes.image_size
    picture = builtin_image(size, size)
    grid = HashGridConfig(num_dims=2, max_resolution=max(16, size // 2))
    grid = image_experiment.fitting_grid(grid, size**2 * 3 // 4, bench.sizes.table_size.bit_length() - 1)
    config = image_experiment.default_config(grid, on_cpu=False)
    config = replace(config, train=replace(config.train, num_points=bench.sizes.num_points))
    bench.say(f"{picture.name}, T = {config.field.encoding.table_size}, {config.train.num_points} points a step\n")
    bench.header("held on", "steps", "ms a step", "compile, s", "PSNR, dB")
    for where, seconds in (("device", bench.sizes.point_seconds), ("host", 0.2 * bench.sizes.point_seconds)):
        limited = replace(config, train=replace(config.train, max_seconds=seconds))
        progress = _train(limited, image_experiment.hold(picture, where))
        found: dict[str, Any] = _speed(progress)
        if where == "device":
            error = image_experiment.compare(progress.state.eval_params, picture, limited).squared_error
            found["psnr"] = float(psnr(np.asarray(error)))
        row = f"| {where} | {progress.step} | {found['ms']:.3f} | {progress.compile_seconds:.1f} |"
        bench.say(f"{row} {found.get('psnr', float('nan')):.2f} |")
        bench.add("image", **{where: found})


def sdf(bench: Bench) -> None:
    """The built-in shapes: IoU, and how long a frame takes to trace and shade."""
    solid, preset = SHAPES[SHAPE], sdf_experiment.PRESETS["paper"]
    solid_config = replace(preset.sdf, num_samples=bench.sizes.sdf_samples)
    limits = replace(
        preset.train, max_steps=10**7, max_seconds=bench.sizes.point_seconds, num_points=bench.sizes.num_points
    )
    grid = preset.field.encoding
    grid = replace(grid, table_size=min(grid.table_size, bench.sizes.table_size))
    config = replace(preset, sdf=solid_config, field=replace(preset.field, encoding=grid), train=limits)
    progress = _train(config, sdf_experiment.draw_samples(solid, config))
    params, make_distance = progress.state.eval_params, sdf_experiment.distance_maker(config.field)
    quality = sdf_experiment.evaluate(params, solid, None, make_distance=make_distance)
    width = bench.sizes.frames[0][0]
    rays, *rest = sdf_experiment.view(solid, width, "z", *sdf_experiment.VIEWS[0])
    box, light, up = (jnp.asarray(a, jnp.float32) for a in (solid.box, *rest))
    draw = functools.partial(draw_surface, params, rays, box, light, up, make_distance=make_distance)
    jax.block_until_ready(draw())
    frame_ms = statistics.median(_ms(draw) for _ in range(RUNS))
    bench.header("solid", "steps", "ms a step", "IoU", "normals, deg", f"frame of {width}x{width}, ms")
    found = {**_speed(progress), "iou": quality.iou, "normal_degrees": quality.normal_degrees, "frame_ms": frame_ms}
    numbers = f"{found['ms']:.3f} | {quality.iou:.5f} | {quality.normal_degrees:.2f} | {frame_ms:.1f}"
    bench.say(f"| {SHAPE} | {progress.step} | {numbers} |")
    bench.add("sdf", **found)


def _train(config: PointConfig, data: Any) -> Progress:
    *_, progress = train(config, data)
    return progress


def _speed(progress: Progress) -> dict[str, Any]:
    ms = 1e3 * progress.seconds / max(progress.step, 1)
    return {"steps": progress.step, "ms": ms, "compile_seconds": progress.compile_seconds}


def _ms(call: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - started)
