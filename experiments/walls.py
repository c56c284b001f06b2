"""What walls between fusions bring on a CPU: the stages of the encoding with and without them.

    python -m experiments.walls

Prints a Markdown table of milliseconds, the median of several runs of a loop in which every round depends on the one
before. Points lie on rays, as in training: twelve consecutive ones a ray.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp import encodings
from jaxngp.config import PRESETS
from jaxngp.fusion import walled
from jaxngp.training.report import device_name

NUM_POINTS = 2**15
GRID = PRESETS["small"].field.encoding
ROUNDS, RUNS = 10, 9


def points_on_rays(key: jax.Array) -> jax.Array:
    """(NUM_POINTS, 3) in [0, 1], twelve a ray and one march step apart."""
    origin_key, direction_key = jax.random.split(key)
    num_rays = -(-NUM_POINTS // 12)
    origin = jax.random.uniform(origin_key, (num_rays, 1, 3))
    direction = jax.random.normal(direction_key, (num_rays, 1, 3))
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    steps = jnp.arange(12)[None, :, None] * 0.0068
    return jnp.clip((origin + direction * steps).reshape(-1, 3)[:NUM_POINTS], 0, 1)


def milliseconds(stage: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Of one call of `stage` inside a compiled loop."""

    def round_(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, total = carry
        total = total + jnp.sum(stage(x))
        return x + total * 1e-30, total

    run = jax.jit(lambda x: jax.lax.fori_loop(0, ROUNDS, round_, (x, jnp.float32(0)))[1])
    run(x).block_until_ready()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times)) / ROUNDS


def main() -> None:
    key = jax.random.key(0)
    x = points_on_rays(key)
    table = encodings.init_table(key, grid=GRID)
    gradient = jax.random.normal(key, (NUM_POINTS, GRID.num_outputs))
    direction = jax.random.normal(key, (NUM_POINTS, 3))
    geometry = jax.random.normal(key, (NUM_POINTS, 16))
    weight = jax.random.normal(key, (32, 64))
    harmonics = functools.partial(encodings.sh_encode, degree=4)
    no_walls = mock.patch.object(encodings, "walled", lambda function, *args: function(*args))

    def encode(x: jax.Array) -> jax.Array:
        return encodings.encode_unrolled(table, x, grid=GRID)

    def scatter(x: jax.Array) -> jax.Array:
        return encodings.table_gradient_unrolled(x, gradient, grid=GRID)

    def unwalled_scatter(x: jax.Array) -> jax.Array:
        with no_walls:
            return scatter(x)

    stages: dict[str, tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array], jax.Array]] = {
        "encode, forward": (encode, functools.partial(walled, encode), x),
        "gradient of the table": (unwalled_scatter, scatter, x),
        "harmonics, concatenated, first colour layer": (
            lambda d: jnp.concatenate([geometry, harmonics(d)], axis=1) @ weight,
            lambda d: jnp.concatenate([geometry, walled(harmonics, d)], axis=1) @ weight,
            direction,
        ),
    }
    print(f"{NUM_POINTS} points, L={GRID.num_levels}, F={GRID.num_features}, T={GRID.table_size}; {device_name()}\n")
    print("| stage | without walls, ms | with walls, ms |\n|---|---|---|")
    for name, (without, with_walls, argument) in stages.items():
        print(f"| {name} | {milliseconds(without, argument):.2f} | {milliseconds(with_walls, argument):.2f} |")


if __name__ == "__main__":
    main()
