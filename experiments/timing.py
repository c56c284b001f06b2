"""What the experiments share: points as training has them, and times of contestants that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PAUSE = 0.005  # seconds before a timed call, in which the idle threads of the contestant before stop spinning


def points_on_rays(key: jax.Array, num_points: int, *, per_ray: int = 12, step: float = 0.0068) -> jax.Array:
    """(num_points, 3) in [0, 1]: `per_ray` consecutive ones a ray and one march step apart, as in training."""
    origin_key, direction_key = jax.random.split(key)
    num_rays = -(-num_points // per_ray)
    origin = jax.random.uniform(origin_key, (num_rays, 1, 3))
    direction = jax.random.normal(direction_key, (num_rays, 1, 3))
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    steps = jnp.arange(per_ray)[None, :, None] * step
    return jnp.clip((origin + direction * steps).reshape(-1, 3)[:num_points], 0, 1)


def median_ms(contestants: Mapping[str, Callable[[], object]], *, runs: int = 9) -> dict[str, float]:
    """Milliseconds of one call of each: the median of `runs` calls, each until its arrays are ready.

    Contestants take turns, A, B, C, A, B, C, so that what else the machine does hits all alike. A first call of each,
    which may compile, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in range(-1, runs):
        for name, call in contestants.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            jax.block_until_ready(call())  # what is no array of jax is ready when it is returned
            if run >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}


def in_loop(stage: Callable[..., Any], x: jax.Array, *others: Any, rounds: int = 10) -> Callable[[], jax.Array]:
    """A compiled program that runs stage(x, *others) `rounds` times, as a function without arguments. x holds floats.

    The input x of each round depends on all of the output of the one before, by a sum too small to change it: so XLA
    can neither hoist the stage out of the loop nor leave out a part of it. The sum is part of the round.
    """

    def run(x: jax.Array, *others: Any) -> jax.Array:
        def one_round(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, total = carry
            # In float32, since a sum of halves may overflow, and what is no number would enter the next round.
            total = total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(stage(x, *others)))
            return (x + total * 1e-30).astype(x.dtype), total

        return jax.lax.fori_loop(0, rounds, one_round, (x, jnp.float32(0)))[1]

    # Traced here, since a stage may trace to something else later, under another patch.
    program = jax.jit(run).lower(x, *others).compile()
    return lambda: program(x, *others)


def iterated(step: Callable[..., Any], carry: Any, *others: Any, rounds: int = 10) -> Callable[[], Any]:
    """A compiled program that sets carry = step(carry, *others) `rounds` times, as a function without arguments.

    Every call goes on where the one before ended, in the same memory, as training does.
    """

    def run(carry: Any, *others: Any) -> Any:
        return jax.lax.fori_loop(0, rounds, lambda _, carry: step(carry, *others), carry)

    held = jax.tree.map(jnp.copy, carry)
    program = jax.jit(run, donate_argnums=0).lower(held, *others).compile()

    def call() -> Any:
        nonlocal held
        held = program(held, *others)
        return held

    return call


def loop_ms(stages: Mapping[str, tuple[Any, ...]], *, rounds: int = 10, runs: int = 9) -> dict[str, float]:
    """Milliseconds of one round of each (stage, x, *others) `in_loop`: what a stage costs inside a larger program."""
    programs = {name: in_loop(*stage, rounds=rounds) for name, stage in stages.items()}
    return {name: time / rounds for name, time in median_ms(programs, runs=runs).items()}
