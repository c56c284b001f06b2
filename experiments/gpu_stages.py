"""What `experiments.gpu_bench` times piece by piece: a device's ceilings, and the stages of a step with their variants.

A program here is a function without arguments that runs `rounds` rounds of one thing, each depending on the one
before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import Stage
from experiments.timing import in_loop, iterated, points_on_rays
from jaxngp.config import HashGridConfig, MarchConfig, NerfConfig
from jaxngp.encodings import all_corners, hash_encode, init_table
from jaxngp.hashing import (
    corner_offsets,
    is_dense,
    level_offsets,
    level_resolutions,
    num_vertices,
    spatial_hash,
)

ROUNDS = 5

# Ceilings.

PATTERNS = ("random rows", "rows of the finest level", "rows of the coarsest level", "one row")


@dataclass(frozen=True)
class Ceiling:
    """A program of ROUNDS rounds, and how much of `unit` one round does."""

    build: Callable[[], Callable[[], Any]]
    amount: float
    unit: str


def ceilings(*, scale: float = 1.0) -> dict[str, Ceiling]:
    """What a device can do at best: memory, matmuls, and reads of and additions to rows of a table; sizes times scale.

    A read or an addition reads its row's number, 4 B, too. Rows are drawn uniformly; or they are those of one level of
    the paper's grid around consecutive points on rays, the eight corners of each point in turn; or all are one row,
    where additions queue.
    """
    count, floats, side = int(2**22 * scale), int(2**28 * scale), int(8192 * scale**0.5)
    copy = functools.partial(iterated, lambda a: a + 1, jnp.zeros(floats), rounds=ROUNDS)
    found = {f"copy of {4e-9 * floats:.2g} GB": Ceiling(copy, 8e-9 * floats, "GB/s")}
    for dtype in (jnp.bfloat16, jnp.float32):
        build = functools.partial(_matmul, side, dtype)
        found[f"matmul of {side}x{side}, {jnp.dtype(dtype).name}"] = Ceiling(build, 2e-12 * side**3, "TFLOP/s")
    for megabytes in (24, 49):
        for width in (1, 2, 4):
            build = functools.partial(_reads, int(megabytes * 2**20 * scale) // (4 * width), width, count)
            found[f"reads of random rows of {4 * width} B from {megabytes * scale:.3g} MB"] = Ceiling(
                build, 1e-9 * count, "G/s"
            )
    grid = HashGridConfig(table_size=int(2**19 * scale))
    for width in (1, 2, 4):
        for pattern in PATTERNS:
            amount = count // 16 if pattern == "one row" else count  # as slow as one row at a time
            build = functools.partial(_additions, grid, pattern, width, amount)
            found[f"additions to {pattern}, float32 x {width}"] = Ceiling(build, 1e-9 * amount, "G/s")
    return found


def _matmul(side: int, dtype: Any) -> Callable[[], Any]:
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    return iterated(lambda a, b: a @ b, a, b / jnp.asarray(side**0.5, dtype), rounds=ROUNDS)  # keeps its size


def _reads(num_rows: int, width: int, count: int) -> Callable[[], Any]:
    def read(x: jax.Array, table: jax.Array, row: jax.Array) -> jax.Array:
        return table.at[row + x[0].astype(jnp.uint32)].get(mode="promise_in_bounds")

    table = jax.random.normal(jax.random.key(0), (num_rows, width))
    row = jax.random.randint(jax.random.key(1), (count,), 0, num_rows).astype(jnp.uint32)
    return in_loop(read, jnp.zeros(1), table, row, rounds=ROUNDS)


def _additions(grid: HashGridConfig, pattern: str, width: int, count: int) -> Callable[[], Any]:
    num_rows = level_offsets(grid)[-1]
    if pattern == "one row":
        row = jnp.full(count, num_rows // 2, jnp.uint32)
    elif pattern == "random rows":
        row = jax.random.randint(jax.random.key(1), (count,), 0, num_rows).astype(jnp.uint32)
    else:
        level = -1 if "finest" in pattern else 0
        # Inside jit, so that of all levels' corners only this one's are computed.
        rows_of = jax.jit(lambda x: all_corners(x, grid)[0][:, level].reshape(-1))
        row = rows_of(points_on_rays(jax.random.key(1), count // 8))

    def add(table: jax.Array, row: jax.Array, value: jax.Array) -> jax.Array:
        return table.at[row].add(jnp.broadcast_to(value, (count, width)), mode="promise_in_bounds")

    return iterated(add, jnp.zeros((num_rows, width)), row, jnp.ones(width), rounds=ROUNDS)


# What an H100 is predicted to need.


@dataclass(frozen=True)
class Prediction:
    """Milliseconds, from the least to the most, for a given amount of work. Predicted, never measured.

    floor: by bytes, instructions and atomic additions. plain: of XLA's code as it comes, read off the compiled program.
    """

    floor: tuple[float, float]
    plain: tuple[float, float]
    per: float  # the amount of work that they are for

    def scaled(self, amount: float) -> Prediction:
        factor = amount / self.per
        (floor_low, floor_high), (plain_low, plain_high) = self.floor, self.plain
        return Prediction((floor_low * factor, floor_high * factor), (plain_low * factor, plain_high * factor), amount)


SAMPLES, LOOKUPS, RAYS, PARAMETERS = 2**18, 2**18 * 16, 2**14, 12.2e6  # of a step, in the paper's setting
ENCODE_FORWARD = Prediction((0.045, 0.045), (0.08, 0.15), LOOKUPS)
ENCODE_BACKWARD = Prediction((0.07, 0.10), (0.20, 0.35), LOOKUPS)
NETWORKS = Prediction((0.05, 0.07), (0.35, 0.50), SAMPLES)
MARCH_AND_PACK = Prediction((0.02, 0.05), (0.10, 0.15), RAYS)  # of rays that are drawn, whether or not they are used
COMPOSITE = Prediction((0.02, 0.02), (0.10, 0.15), SAMPLES)  # with the loss and Adam on the networks
OPTIMISER = Prediction((0.122, 0.122), (0.13, 0.13), PARAMETERS)
REFRESH = Prediction((0.02, 0.02), (0.04, 0.04), 1)  # a step's share, with a refresh every 16 steps
STEP = Prediction((0.40, 0.45), (0.8, 1.1), SAMPLES)  # of what this package makes of it; 1.1 to 1.5 as it comes


# Stages.


@dataclass(frozen=True)
class Timed:
    """A stage to be timed: function(first, *others) on each of several batches of arguments in turn."""

    function: Callable[..., Any]
    batches: Sequence[tuple[Any, ...]]
    prediction: Prediction | None = None

    def build(self) -> Callable[[], Any]:
        """A program of ROUNDS rounds, each of all batches: so that no batch's table rows stay in the cache."""

        def all_batches(x: jax.Array, batches: Sequence[tuple[Any, ...]]) -> list[Any]:
            return [self.function(first + x[0].astype(first.dtype), *others) for first, *others in batches]

        return in_loop(all_batches, jnp.zeros(1), list(self.batches), rounds=ROUNDS)

    @property
    def rounds(self) -> int:
        return ROUNDS * len(self.batches)


def all_stages(config: NerfConfig, batches: Sequence[dict[str, Stage]]) -> dict[str, Timed]:
    """The stages of `throughput.training_stages` for several batches, and the variants of some, by name."""
    grid, sampler = config.field.encoding, config.sampler
    assert isinstance(sampler, MarchConfig)
    samples, rays = sampler.num_samples, config.train.num_rays
    predictions = {
        "march": MARCH_AND_PACK.scaled(rays),
        "encode, forward": ENCODE_FORWARD.scaled(samples * grid.num_levels),
        "encode, backward": ENCODE_BACKWARD.scaled(samples * grid.num_levels),
        "MLPs, forward and backward": NETWORKS.scaled(samples),
        "composite, forward and backward": COMPOSITE.scaled(samples),
    }

    def stage(name: str) -> Timed:
        return Timed(batches[0][name].function, [batch[name].arguments for batch in batches], predictions.get(name))

    package = {name: stage(name) for name in batches[0]}
    found = dict(package)
    other = jnp.float32 if config.field.precision == "bfloat16" else jnp.bfloat16
    for name in ("MLPs, forward", "MLPs, forward and backward"):  # whose layers have the precision of the features
        cast = [(features.astype(other), *others) for features, *others in package[name].batches]
        found[f"{name}, {jnp.dtype(other).name}"] = replace(package[name], batches=cast)
    found |= _encoding_variants(grid, package["encode, forward"], package["encode, backward"])
    return found


def _encoding_variants(grid: HashGridConfig, forward: Timed, backward: Timed) -> dict[str, Timed]:
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        tables = [(position, table.astype(dtype)) for position, table in forward.batches]
        found[f"encode, forward, {jnp.dtype(dtype).name} table"] = replace(forward, batches=tables)
    given = [(gradient, position) for gradient, position, _ in backward.batches]
    for name, order in ORDERS.items():
        variant = Timed(_scatter(grid, order), given, backward.prediction)
        found[f"encode, backward, {name}"] = variant
    per_level = _scatter(grid, "nlc", per_level=True)
    found["encode, backward, a scatter a level"] = Timed(per_level, given, backward.prediction)
    for dtype in (jnp.bfloat16, jnp.float16):
        halves = [(gradient.astype(dtype), position) for gradient, position in given]
        variant = Timed(_scatter(grid, "lnc"), halves, backward.prediction)
        found[f"encode, backward, (level, point, corner), {jnp.dtype(dtype).name}"] = variant
    factor = 2 if grid.num_features >= 4 else 0.5  # L=8, F=4 against L=16, F=2, either way
    other = replace(grid, num_levels=int(grid.num_levels * factor), num_features=int(grid.num_features / factor))
    found |= _other_grid(other, [position for _, position in given], forward, backward, factor)
    return found


def _other_grid(
    other: HashGridConfig, positions: Sequence[jax.Array], forward: Timed, backward: Timed, lookups: float
) -> dict[str, Timed]:
    """The package's encoding of the same points in `lookups` times as many levels of a table that is not trained."""
    table = init_table(jax.random.key(0), grid=other)
    gradient = jax.random.normal(jax.random.key(1), (len(positions[0]), other.num_outputs))

    def encode(position: jax.Array, table: jax.Array) -> jax.Array:
        return hash_encode(table, position, grid=other)

    def encode_backward(gradient: jax.Array, position: jax.Array, table: jax.Array) -> jax.Array:
        return jax.vjp(lambda t: hash_encode(t, position, grid=other), table)[1](gradient)[0]

    name = f"L={other.num_levels}, F={other.num_features}"
    predictions = [
        stage.prediction and stage.prediction.scaled(stage.prediction.per * lookups) for stage in (forward, backward)
    ]
    return {
        f"encode, forward, {name}": Timed(encode, [(p, table) for p in positions], predictions[0]),
        f"encode, backward, {name}": Timed(encode_backward, [(gradient, p, table) for p in positions], predictions[1]),
    }


# The gradient of the table as scatters of several shapes. Threads of a GPU that run side by side take consecutive
# updates, so the order of the axes decides which additions meet in the same sector of memory.

ORDERS = {"(point, level, corner)": "nlc", "(corner, point, level)": "cnl", "(level, point, corner)": "lnc"}
"""Of the updates of one scatter, outermost axis first: n points, l levels, c corners."""


def _scatter(grid: HashGridConfig, order: str, *, per_level: bool = False) -> Callable[..., jax.Array]:
    def function(gradient: jax.Array, position: jax.Array) -> jax.Array:
        return table_gradient(gradient, position, grid=grid, order=order, per_level=per_level)

    return function


def table_gradient(
    gradient: jax.Array, position: jax.Array, *, grid: HashGridConfig, order: str, per_level: bool = False
) -> jax.Array:
    """The gradient (rows, F) of the table, in the type of `gradient` (N, L * F), by one scatter or by one a level."""
    gradient = gradient.reshape(len(position), grid.num_levels, grid.num_features)
    if order.index("l") < order.index("n"):
        gradient = jnp.swapaxes(gradient, 0, 1)
    gradient = jnp.expand_dims(gradient, order.index("c"))
    offsets = level_offsets(grid)
    parts = []
    for levels in [slice(i, i + 1) for i in range(grid.num_levels)] if per_level else [slice(0, grid.num_levels)]:
        row, weight = corner_rows(position, grid=grid, order=order, levels=levels)
        part = jax.lax.slice_in_dim(gradient, levels.start, levels.stop, axis=order.index("l"))
        update = weight[..., None].astype(gradient.dtype) * part
        rows = jnp.zeros((offsets[levels.stop] - offsets[levels.start], grid.num_features), gradient.dtype)
        parts.append(rows.at[row - np.uint32(offsets[levels.start])].add(update, mode="promise_in_bounds"))
    return jnp.concatenate(parts) if per_level else parts[0]


def corner_rows(position: jax.Array, *, grid: HashGridConfig, order: str, levels: slice) -> tuple[jax.Array, jax.Array]:
    """Rows u32 and weights of all corners at some levels, with the axes n, l and c in the given order.

    Everything is broadcast from one axis each, so that a kernel computes the rows of its updates where it adds them.
    """

    def along(axis: str, values: Any) -> Any:
        return values.reshape([-1 if name == axis else 1 for name in order])

    resolutions = level_resolutions(grid)[levels]
    vertices = [num_vertices(grid, n) for n in resolutions]
    resolution = along("l", np.array(resolutions, np.float32))
    last_cell = along("l", np.array(vertices, np.int32) - 2)
    vertex, weight = [], jnp.float32(1)
    for axis in range(grid.num_dims):
        place = along("n", jnp.clip(position[:, axis], 0, 1)) * resolution + (0.5 if grid.half_voxel_offset else 0)
        cell = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, last_cell)
        fraction = place - cell.astype(place.dtype)
        fraction = fraction**2 * (3 - 2 * fraction) if grid.smoothstep else fraction
        far = along("c", corner_offsets(grid.num_dims)[:, axis])
        weight = weight * jnp.where(far == 1, fraction, 1 - fraction)
        vertex.append(cell.astype(jnp.uint32) + far.astype(np.uint32))
    # Modulo 2^32, as the hash is; a dense level's rows are fewer.
    strides = [along("l", np.array([n**axis % 2**32 for n in vertices], np.uint32)) for axis in range(grid.num_dims)]
    dense = sum(v * stride for v, stride in zip(vertex, strides, strict=True))
    row = jnp.where(
        along("l", np.array([is_dense(grid, n) for n in resolutions])),
        dense,
        spatial_hash(vertex, table_size=grid.table_size),
    )
    return row + along("l", np.array(level_offsets(grid)[levels.start : levels.stop], np.uint32)), weight
