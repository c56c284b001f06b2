"""What the devices that share a training step send each other, as the compiled program says.

    python -m experiments.communication [--devices=4] [--preset=small]

Compiles the steps of a preset for so many devices of a CPU; nothing is trained. Prints each collective operation with
the bytes that a device sends for it in a ring: of S bytes, (D - 1) / D S for a reduce-scatter or an all-gather, and
twice that for an all-reduce. What is inside the loop over steps is there once a step, the rest once a call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from jaxngp import flags
from jaxngp.cameras import make_cameras, pose_images
from jaxngp.config import NerfConfig, apply_overrides, program_config
from jaxngp.device import compiled, placed_on
from jaxngp.presets import PRESETS
from jaxngp.records import table
from jaxngp.training import nerf
from jaxngp.training.loop import init_state
from jaxngp.training.pixels import SharedStore
from jaxngp.training.step import NO_STEPS, zero_rates
from jaxngp.visual_hull import pixel_set

_OP = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"(pred|[usf]\d+|bf16)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation)=\{?([^}]+?)[,}\n]"
)
BYTES = {"pred": 1, "bf16": 2}


def collectives(text: str, count: int) -> Iterator[dict[str, Any]]:
    """Of a program for `count` devices, each collective: what it is, how often, and the bytes that a device sends."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))
    looped = {name for body in bodies.values() for name in re.findall(r"body=%?([\w.-]+)", body)}
    while more := {n for name in looped for n in _references(bodies.get(name, ""))} - looped:
        looped |= more
    for name, body in bodies.items():
        for result, kind in _OP.findall(body):
            size = sum(_num_bytes(*array) for array in _ARRAY.findall(result))
            whole = size * count if kind == "reduce-scatter" else size
            sent = whole * (count - 1) // count * (2 if kind == "all-reduce" else 1)
            yield {
                "operation": kind,
                "result": result[:60],
                "once a": "step" if name in looped else "call",
                "bytes": sent,
            }


def _references(body: str) -> set[str]:
    return set(re.findall(r"%([\w.-]+)", " ".join(re.findall(r"(?:=\{?%[^})]*)", body))))


def _num_bytes(kind: str, shape: str) -> int:
    size = BYTES.get(kind) or int(kind[1:]) // 8
    return size * math.prod(int(side) for side in shape.split(",") if side)


def program(config: NerfConfig) -> Any:
    """The steps, compiled for the devices of the mesh and a few small views."""
    cameras = make_cameras(np.eye(4)[None, :3].repeat(64, 0), focal_xy=8.0, centre_xy=4.0, width=8, height=8)
    images = pose_images(cameras, np.zeros((64, 8, 8, 4), np.uint8))
    pixels = jax.eval_shape(pixel_set, jax.ShapeDtypeStruct((images.num_pixels,), bool))
    state = jax.eval_shape(lambda: init_state(0, config=config))
    arguments = (state, SharedStore(images).data, pixels, zero_rates(config), NO_STEPS)
    return compiled(nerf.nerf_steps, *arguments, donate=True, config=program_config(config))


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_integer("devices", 4, "Devices that share a step.", 2, flag_values=values)
    absl_flags.DEFINE_enum("preset", "small", [*PRESETS], "Preset.", flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "A field of the config: path=value.", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    jax.config.update("jax_num_cpu_devices", values.devices)
    config = apply_overrides(PRESETS[values.preset], values.override)
    with placed_on(f"rays:{values.devices}"):
        rows = list(collectives(program(config).as_text(), values.devices))
    rows.sort(key=lambda row: -row["bytes"])
    print(table(rows))
    per = {often: sum(row["bytes"] for row in rows if row["once a"] == often) for often in ("step", "call")}
    calls = config.train.steps_per_dispatch
    print(
        f"{per['step'] / 1e6:.2f} MB a step, and {per['call'] / 1e6:.2f} MB a call of {calls} steps, from each device"
    )


if __name__ == "__main__":
    flags.run("experiments.communication", define_flags, main, __doc__ or "")
