"""What fusion barriers bring on a CPU: the stages of the encoding with and without them.

    python -m experiments.fusion_barriers

Prints a Markdown table of milliseconds, the median of several runs of a loop in which every round depends on the one
before. Points lie on rays, as in training: twelve consecutive ones a ray.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.timing import loop_ms, points_on_rays
from jaxngp import encodings
from jaxngp.device import fusion_barrier
from jaxngp.presets import PRESETS
from jaxngp.records import device_name

NUM_POINTS = 2**15
GRID = PRESETS["small"].field.encoding


def main() -> None:
    key = jax.random.key(0)
    x = points_on_rays(key, NUM_POINTS)
    table = encodings.init_table(key, grid=GRID)
    gradient = jax.random.normal(key, (NUM_POINTS, GRID.num_outputs))
    direction = jax.random.normal(key, (NUM_POINTS, 3))
    geometry = jax.random.normal(key, (NUM_POINTS, 16))
    weight = jax.random.normal(key, (32, 64))
    harmonics = functools.partial(encodings.sh_encode, degree=4)
    no_barriers = mock.patch.object(encodings, "fusion_barrier", lambda function, *args: function(*args))

    def encode(x: jax.Array) -> jax.Array:
        return encodings.encode_unrolled(table, x, grid=GRID)

    def scatter(x: jax.Array) -> jax.Array:
        return encodings.table_gradient_unrolled(x, gradient, grid=GRID)

    def fused_scatter(x: jax.Array) -> jax.Array:
        with no_barriers:
            return scatter(x)

    stages: dict[str, tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array], jax.Array]] = {
        "encode, forward": (encode, functools.partial(fusion_barrier, encode), x),
        "gradient of the table": (fused_scatter, scatter, x),
        "harmonics, concatenated, first colour layer": (
            lambda d: jnp.concatenate([geometry, harmonics(d)], axis=1) @ weight,
            lambda d: jnp.concatenate([geometry, fusion_barrier(harmonics, d)], axis=1) @ weight,
            direction,
        ),
    }
    print(f"{NUM_POINTS} points, L={GRID.num_levels}, F={GRID.num_features}, T={GRID.table_size}; {device_name()}\n")
    print("| stage | without barriers, ms | with barriers, ms |\n|---|---|---|")
    for name, (without, barred, argument) in stages.items():
        times = loop_ms({"without": (without, argument), "with": (barred, argument)})
        print(f"| {name} | {times['without']:.2f} | {times['with']:.2f} |")


if __name__ == "__main__":
    main()
