"""Several scenes trained in one program by `jax.vmap`, beside one scene alone.

    python -m experiments.many_scenes [--num_scenes=2] [--image_size=200]

All scenes have the same shapes: the built-in one, each with a seed of its own. Prints milliseconds a step, the median
of calls that take turns, and how many times as long as one scene the program for all takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments.timing import median_ms
from jaxngp import flags
from jaxngp.config import NerfConfig, SceneConfig, program_config
from jaxngp.data import load_training
from jaxngp.presets import PRESETS
from jaxngp.records import device_name
from jaxngp.training import nerf
from jaxngp.training.loop import init_state

WARMUP_CALLS = 20  # so that the grid is that of a run: a call takes train.steps_per_dispatch steps


def trainer(config: NerfConfig, images: Any, seeds: list[int], *, stacked: bool) -> Callable[[], jax.Array]:
    """A call of so many steps for each seed, and a refresh of the grids where one is due; returns the losses."""
    batched: Callable[..., Any] = jax.vmap if stacked else lambda function: function
    static = program_config(config)
    steps = jax.jit(batched(functools.partial(nerf.nerf_steps, config=static)), donate_argnums=0)
    refresh = jax.jit(batched(functools.partial(nerf.refresh_occupancy, config=static)), donate_argnums=0)
    states = []
    for seed in seeds:
        grid, pixels = nerf.hull_of_views(images, config=static)
        states.append(replace(init_state(seed, config=config), occupancy=grid))
    num_steps = config.train.steps_per_dispatch
    rates, number = np.full(num_steps, 1e-2, np.float32), np.int32(num_steps)
    if not stacked:
        arguments = [images, pixels, jnp.asarray(rates), jnp.asarray(number)]
        state = states[0]
    else:
        stack: Callable[..., Any] = lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)  # noqa: E731
        repeated = [(images, pixels, rates, number)] * len(seeds)
        arguments, state = list(stack(*repeated)), stack(*states)

    def call() -> jax.Array:
        nonlocal state
        new, metrics = steps(state, *arguments)
        state = refresh(new)
        return metrics.loss

    return call


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_integer("num_scenes", 2, "Scenes in one program.", 2, flag_values=values)
    absl_flags.DEFINE_integer("image_size", 200, "Pixels per side of the built-in scene.", 16, flag_values=values)
    absl_flags.DEFINE_integer("runs", 15, "Timed calls of each.", 1, flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    config = PRESETS["small"]
    images = jax.tree.map(jnp.asarray, load_training(SceneConfig(image_size=values.image_size)).images)
    seeds = list(range(values.num_scenes))
    calls = {
        "one": trainer(config, images, seeds[:1], stacked=False),
        "all": trainer(config, images, seeds, stacked=True),
    }
    for call in calls.values():
        for _ in range(WARMUP_CALLS):
            losses = call()
    milliseconds = median_ms(calls, runs=values.runs)
    one, every = (milliseconds[name] / config.train.steps_per_dispatch for name in ("one", "all"))
    print(f"one scene {one:.2f} ms a step, {len(seeds)} scenes in one program {every:.2f} ms: {every / one:.2f} times")
    print(f"losses {np.asarray(losses).round(4).tolist()}; {device_name()}")


if __name__ == "__main__":
    flags.run("experiments.many_scenes", define_flags, main, __doc__ or "")
