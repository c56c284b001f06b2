"""Time of the hash encoding: ours, the naive JAX that one would write first, and the 100-line PyTorch reference's.

    python -m experiments.encoding_race --reference=FILE

All contestants compute one function, with the same table, points and incoming gradient: every level is hashed, as in
the reference. That they agree is checked first, and a mismatch is an error. Then they take turns. One call is timed
from outside until its result is there, in memory that is new; `in a loop` is a round of a compiled loop, its result
summed, and so what the encoding costs inside a larger program. Points are uniform, and on rays as in training.

--reference names a file that holds the reference's source, which is executed as it stands and not timed beyond its
encoding: the place of its density network is taken by a module that leaves with the features.

Prints a Markdown table, and writes it as JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments import reference
from experiments.timing import in_loop, median_ms, points_on_rays
from jaxngp import flags
from jaxngp.config import HashGridConfig, InputError
from jaxngp.device import fusion_barrier
from jaxngp.encodings import hash_encode
from jaxngp.hashing import corner_offsets, level_resolutions, spatial_hash
from jaxngp.records import environment, write_json

ROUNDS = 5  # of a loop
# Of features and gradients, times N_max, relative to their largest. Where in its cell a point lies is known to half a
# unit in the last place of its position times the resolution: XLA may fuse that product with the difference from the
# cell, which is more exact, and the reference moves the points to [-0.5, 0.5] and back.
TOLERANCE = 2**-21

Encode = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Problem:
    """What a contestant is given: rows of all levels (L * T, F), points (N, 3), a gradient in features (N, L * F)."""

    grid: HashGridConfig
    table: jax.Array
    position: jax.Array
    gradient: jax.Array


@dataclass(frozen=True)
class Contestant:
    """Calls without arguments: features (N, L * F), and these with the gradient in the table (L * T, F).

    `in_loop` has the same two inside a compiled loop of ROUNDS rounds; none for the reference.
    """

    forward: Callable[[], Any]
    both: Callable[[], tuple[Any, Any]]
    in_loop: tuple[Callable[[], Any], ...]


# Contestants.


def encode_naive(table: jax.Array, position: jax.Array, *, grid: HashGridConfig) -> jax.Array:
    """`hash_encode` of a grid without dense levels as the paper reads: table (L * T, F), position (N, 3) in [0, 1].

    One gather of (N, L, 8, F) from a table (L, T, F), times the weights, summed over corners.
    """
    resolution = jnp.array(level_resolutions(grid), jnp.float32)
    scaled = position[:, None, :] * resolution[:, None]  # (N, L, 3)
    cell = jnp.floor(scaled)
    fraction = (scaled - cell)[:, :, None, :]
    offsets = jnp.asarray(corner_offsets(3))  # (8, 3)
    vertex = cell.astype(jnp.uint32)[:, :, None, :] + offsets.astype(jnp.uint32)  # (N, L, 8, 3)
    row = spatial_hash(jnp.moveaxis(vertex, -1, 0), table_size=grid.table_size)  # (N, L, 8)
    weight = jnp.prod(jnp.where(offsets == 1, fraction, 1 - fraction), axis=-1)  # (N, L, 8)
    levels = jnp.arange(grid.num_levels)[:, None]
    corners = table.reshape(grid.num_levels, grid.table_size, grid.num_features)[levels, row]  # (N, L, 8, F)
    return jnp.sum(weight[..., None] * corners, axis=2).reshape(len(position), -1)


def jax_contestant(encode: Encode, problem: Problem) -> Contestant:
    def forward(position: jax.Array, table: jax.Array) -> jax.Array:
        return encode(table, position)

    def both(position: jax.Array, table: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, pull_back = jax.vjp(lambda table: encode(table, position), table)
        return features, pull_back(gradient)[0]

    position, table, gradient = problem.position, problem.table, problem.gradient
    return Contestant(
        forward=functools.partial(jax.jit(forward), position, table),
        both=functools.partial(jax.jit(both), position, table, gradient),
        in_loop=(
            # Behind a barrier, since XLA:CPU would fuse the encoding into the loop's sum and do parts of it twice.
            in_loop(functools.partial(fusion_barrier, forward), position, table, rounds=ROUNDS),
            in_loop(functools.partial(fusion_barrier, both), position, table, gradient, rounds=ROUNDS),
        ),
    )


def torch_contestant(path: str, problem: Problem) -> Contestant:
    """The encoding in the network that the file at `path` defines."""
    module = reference.load_reference(path, names=("NGP",))
    torch = reference.bench_module("torch")
    grid = problem.grid

    class Leave(Exception):  # noqa: N818 - no error
        pass

    class LeaveWithFeatures(torch.nn.Module):  # type: ignore[name-defined]
        def forward(self, features: Any) -> Any:
            raise Leave(features)

    # No frequencies: the directions are encoded before the network that is replaced.
    model = module.NGP(grid.table_size, level_resolutions(grid), 0, "cpu", 1)
    model.density_MLP = LeaveWithFeatures()
    tables = [model.lookup_tables[str(level)] for level in range(grid.num_levels)]
    with torch.no_grad():
        for part, values in zip(tables, np.split(np.asarray(problem.table), grid.num_levels), strict=True):
            part.copy_(torch.tensor(values))
    centred = torch.tensor(np.asarray(problem.position)) - 0.5
    gradient = torch.tensor(np.asarray(problem.gradient))
    direction = torch.zeros_like(centred)

    def encode() -> Any:
        try:
            model(centred.clone(), direction)  # it changes its input in place
        except Leave as leave:
            return leave.args[0]
        raise InputError(f"{path}: NGP.forward does not call density_MLP")

    def forward() -> Any:
        with torch.no_grad():
            return encode()

    def both() -> tuple[Any, Any]:
        features = encode()
        return features.detach(), torch.autograd.grad(features, tables, gradient)

    return Contestant(forward, both, in_loop=())


# Race.


def make_problem(grid: HashGridConfig, position: jax.Array) -> Problem:
    """A table and a gradient of order 1. The faces of the cube are left out, where the reference encodes nothing."""
    table_key, gradient_key = jax.random.split(jax.random.key(1))
    return Problem(
        grid=grid,
        table=jax.random.uniform(table_key, (grid.num_levels * grid.table_size, grid.num_features), minval=-1),
        position=jnp.clip(position, 1e-5, 1 - 1e-5),
        gradient=jax.random.normal(gradient_key, (len(position), grid.num_outputs)),
    )


def check_agreement(contestants: Mapping[str, Contestant], *, tolerance: float) -> dict[str, float]:
    """The largest difference of features and gradients from the first contestant's, relative to their largest.

    Raises InputError where it is more than `tolerance`.
    """
    results = {name: _arrays(*contestant.both()) for name, contestant in contestants.items()}
    (first, expected), *_ = results.items()
    apart = {
        name: float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(arrays, expected, strict=True)]))
        for name, arrays in results.items()
    }
    for name, difference in apart.items():
        if not difference <= tolerance:
            raise InputError(
                f"{name} differs from {first} by {difference:.2g} of the largest: expected {tolerance:.2g}"
            )
    return apart


def _arrays(features: Any, gradient: Any) -> tuple[np.ndarray, np.ndarray]:
    parts = gradient if isinstance(gradient, tuple) else (gradient,)
    return np.asarray(features), np.concatenate([np.asarray(part) for part in parts])


def race(points: str, problem: Problem, path: str, *, runs: int) -> list[dict[str, Any]]:
    """One row a contestant and direction; InputError where contestants disagree."""
    grid = problem.grid
    contestants = {
        "jaxngp": jax_contestant(functools.partial(hash_encode, grid=grid), problem),
        "naive JAX": jax_contestant(functools.partial(encode_naive, grid=grid), problem),
    }
    if path:
        contestants["reference"] = torch_contestant(path, problem)
    rows: list[dict[str, Any]] = []
    apart = check_agreement(contestants, tolerance=TOLERANCE * grid.max_resolution)
    for index, direction in enumerate(("forward", "forward + backward")):
        calls = {name: (c.forward, c.both)[index] for name, c in contestants.items()}
        loops = {name: c.in_loop[index] for name, c in contestants.items() if c.in_loop}
        call_ms = median_ms(calls, runs=runs)
        loop_ms = {name: time / ROUNDS for name, time in median_ms(loops, runs=runs).items()}
        for name in contestants:
            row = {"points": points, "direction": direction, "contestant": name, "call_ms": call_ms[name]}
            rows.append(row | {"loop_ms": loop_ms.get(name), "difference": apart[name]})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each row, with the time as a multiple of jaxngp's."""
    lines = [
        "| points | direction | contestant | ms a call | times jaxngp | ms in a loop | largest relative difference |"
    ]
    lines.append("|---" * 7 + "|")
    own = {(row["points"], row["direction"]): row["call_ms"] for row in rows if row["contestant"] == "jaxngp"}
    for row in rows:
        ratio = row["call_ms"] / own[row["points"], row["direction"]]
        loop = "-" if row["loop_ms"] is None else f"{row['loop_ms']:.2f}"
        labels = " | ".join(row[key] for key in ("points", "direction", "contestant"))
        lines.append(f"| {labels} | {row['call_ms']:.2f} | {ratio:.2f} | {loop} | {row['difference']:.1e} |")
    return "\n".join(lines)


# The command.


def define_flags(values: flags.Flags) -> None:
    absl_flags.DEFINE_integer("points", 2**16, "Points in a call.", 1, flag_values=values)
    absl_flags.DEFINE_integer("levels", 16, "L.", 1, flag_values=values)
    absl_flags.DEFINE_integer("features", 2, "F; the reference has 2.", 1, flag_values=values)
    absl_flags.DEFINE_integer("table_size", 2**19, "T, a power of two.", 1, flag_values=values)
    absl_flags.DEFINE_integer("min_resolution", 16, "N_min.", 1, flag_values=values)
    absl_flags.DEFINE_integer("max_resolution", 2048, "N_max.", 1, flag_values=values)
    absl_flags.DEFINE_integer("runs", 15, "Timed calls, of which the median counts.", 1, flag_values=values)
    absl_flags.DEFINE_string(
        "reference", "", "File with the 100-line PyTorch source; none if empty.", flag_values=values
    )
    absl_flags.DEFINE_string("output", "runs/encoding_race.json", "Where the table is written.", flag_values=values)


def main(values: flags.Flags) -> None:
    if values.reference and values.features != 2:
        raise InputError("--features: the reference has 2 features a level")
    grid = HashGridConfig(
        num_levels=values.levels,
        num_features=values.features,
        table_size=values.table_size,
        min_resolution=values.min_resolution,
        max_resolution=values.max_resolution,
        dense_levels=False,
    )
    key = jax.random.key(0)
    positions = {
        "uniform": jax.random.uniform(key, (values.points, 3)),
        "on rays": points_on_rays(key, values.points),
    }
    rows = [
        row
        for points, position in positions.items()
        for row in race(points, make_problem(grid, position), values.reference, runs=values.runs)
    ]
    about = {"points": values.points, "grid": asdict(grid), "runs": values.runs, **environment()}
    if values.reference:
        about |= reference.environment()
    write_json(values.output, {**about, "rows": rows})
    versions = f"jax {about['jax_version']}" + (f", torch {about['torch_version']}" if values.reference else "")
    print(
        f"{values.points} points, L={grid.num_levels}, F={grid.num_features}, T={grid.table_size}, "
        f"N_max={grid.max_resolution}; {about['device']}, {versions}\n"
    )
    print(markdown(rows))


if __name__ == "__main__":
    flags.run("experiments.encoding_race", define_flags, main, __doc__ or "")
