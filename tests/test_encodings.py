"""Encodings against their definitions, written in float64 from the paper's equations 2 to 4."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import TINY_GRID, arrays32, directions, floats32, jit_to_numpy, needs_float16, points, seeds

from jaxngp import encodings, hashing
from jaxngp.config import HashGridConfig

NUM = 32
_3D = TINY_GRID
_2D = replace(TINY_GRID, num_dims=2, table_size=2**7)
GRIDS = {
    "3d": _3D,
    "2d": replace(_2D, num_levels=3),
    "one_level": replace(_3D, num_levels=1, num_features=1),
    "four_features": replace(_2D, num_features=4),
    "eight_features": replace(_2D, num_features=8, max_resolution=60),
    "all_hashed": replace(_3D, dense_levels=False, table_size=2**6),
    "half_voxel": replace(_3D, half_voxel_offset=True),
    "smoothstep": replace(_2D, smoothstep=True),
    "half_voxel_smoothstep": replace(_2D, half_voxel_offset=True, smoothstep=True, num_features=1),
    "one_smooth_level": replace(_2D, num_levels=1, smoothstep=True, num_features=1, max_resolution=4),
    "one_cell": replace(_2D, num_levels=2, min_resolution=1, max_resolution=2),
}


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("grid", [GRIDS[name] for name in names], ids=names)


every_grid = some(*GRIDS)
# A gradient takes seconds to compile.
gradient_grids = some("3d", "four_features", "half_voxel_smoothstep")


# A position times N rounds by up to 2^-24 N, 1.2e-6 for N = 20, before or after a fused addition, and along each of D
# axes a feature changes by up to 2 a cell, or 3 with smoothstep: 1.1e-5 in all.
VALUE = 4e-5
# The slope along one axis rounds as a value does, and then is times N and summed over levels and up to eight features.
SLOPE = 1e-3


init_table = jit_to_numpy(encodings.init_table, static_argnames="grid")
multilinear_weights = jit_to_numpy(encodings.multilinear_weights)
sh_encode = jit_to_numpy(encodings.sh_encode, static_argnames="degree")
sh_encode_broadcast = jit_to_numpy(encodings.sh_encode_broadcast, static_argnames="degree")
sh_encode_unrolled = jit_to_numpy(encodings.sh_encode_unrolled, static_argnames="degree")
frequency_encode = jit_to_numpy(encodings.frequency_encode, static_argnames="num_frequencies")


def random_table(grid: HashGridConfig, seed: int = 0) -> np.ndarray:
    shape = (hashing.level_offsets(grid)[-1], grid.num_features)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def random_cotangent(grid: HashGridConfig, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1, (NUM, grid.num_outputs)).astype(np.float32)


def rows_and_weights(position: np.ndarray, grid: HashGridConfig) -> tuple[np.ndarray, np.ndarray]:
    """(N, L, 2^D) row and weight of every corner, by the definition: a corner of weight 0 has the row -1."""
    rows, weights, start = [], [], 0
    for resolution in hashing.level_resolutions(grid):
        side = resolution + (2 if grid.half_voxel_offset else 1)
        dense = grid.dense_levels and side**grid.num_dims <= grid.table_size
        scaled = position.astype(np.float64) * resolution + (0.5 if grid.half_voxel_offset else 0)
        cell = np.floor(scaled)
        fraction = scaled - cell
        if grid.smoothstep:
            fraction = 3 * fraction**2 - 2 * fraction**3
        for corner in itertools.product((0, 1), repeat=grid.num_dims):
            weight = np.prod(np.where(corner, fraction, 1 - fraction), axis=-1)
            vertex = (cell + np.array(corner)).astype(np.int64)
            if dense:
                row = sum(vertex[:, d] * side**d for d in range(grid.num_dims))
            else:
                primes = (1, 2654435761, 805459861)
                row = functools.reduce(np.bitwise_xor, [vertex[:, d] * primes[d] for d in range(grid.num_dims)])
                row = row % 2**32 % grid.table_size
            rows.append(np.where(weight > 0, start + row, -1))
            weights.append(weight)
        start += side**grid.num_dims if dense else grid.table_size
    shape = (len(position), grid.num_levels, 2**grid.num_dims)
    return np.stack(rows, axis=1).reshape(shape), np.stack(weights, axis=1).reshape(shape)


def encode_by_definition(table: np.ndarray, position: np.ndarray, grid: HashGridConfig) -> np.ndarray:
    row, weight = rows_and_weights(position, grid)
    return np.sum(weight[..., None] * table.astype(np.float64)[row], axis=2).reshape(len(position), -1)


@functools.cache
def compiled(grid: HashGridConfig) -> dict[str, Any]:
    """The functions under test, each compiled once for a grid."""

    def gradients(function: Any, table: jax.Array, position: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(functools.partial(function, grid=grid), table, position)[1](cotangent)

    encode = {"hash": encodings.hash_encode, "wide": encodings.encode_broadcast}
    return {
        **{name: jit_to_numpy(functools.partial(function, grid=grid)) for name, function in encode.items()},
        **{f"{name}_vjp": jit_to_numpy(functools.partial(gradients, function)) for name, function in encode.items()},
        "wide_transpose": jit_to_numpy(functools.partial(encodings.table_gradient_broadcast, grid=grid)),
    }


def unit_points(grid: HashGridConfig) -> st.SearchStrategy[np.ndarray]:
    return points(NUM, grid.num_dims)


def inside_cells(position: np.ndarray, grid: HashGridConfig) -> np.ndarray:
    """Which points (N,) are away from the faces of the cells of all levels, so that differences see one cell."""
    levels = np.array(hashing.level_resolutions(grid))
    scaled = position.astype(np.float64)[:, None] * levels[:, None] + (0.5 if grid.half_voxel_offset else 0)
    distance = np.abs(scaled - np.round(scaled)) / levels[:, None]
    return (distance > 2e-4).all(axis=(1, 2))


# Values.


@pytest.mark.parametrize("num_dims", [2, 3])
@given(data=st.data())
def test_weights_are_products_that_sum_to_one(num_dims: int, data: st.DataObject) -> None:
    """The weight of a corner is the product over the axes, and all are a partition of unity."""
    fraction = data.draw(arrays32(num_dims, 0, 1))
    weights = multilinear_weights(fraction)
    offsets = hashing.corner_offsets(num_dims)
    expected = np.prod(np.where(offsets, fraction.astype(np.float64), 1 - fraction.astype(np.float64)), axis=1)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)


@every_grid
@settings(max_examples=10)
@given(data=st.data())
def test_every_way_of_encoding_is_the_definition(grid: HashGridConfig, data: st.DataObject) -> None:
    position, table = data.draw(unit_points(grid)), random_table(grid, data.draw(seeds))
    expected = encode_by_definition(table, position, grid)
    for name in ("hash", "wide"):
        found = compiled(grid)[name](table, position)
        assert found.shape == (NUM, grid.num_outputs)
        np.testing.assert_allclose(found, expected, atol=VALUE, err_msg=name)


@some("3d", "half_voxel_smoothstep")
def test_both_backends_encode_alike(grid: HashGridConfig) -> None:
    """hash_encode takes one of them, as the device is."""
    position = np.random.default_rng(0).uniform(size=(NUM, grid.num_dims)).astype(np.float32)
    unrolled = jax.jit(functools.partial(encodings.encode_unrolled, grid=grid))(random_table(grid), position)
    np.testing.assert_allclose(unrolled, compiled(grid)["wide"](random_table(grid), position), atol=VALUE)


@some("3d", "all_hashed")
def test_many_points_encode_by_the_definition(grid: HashGridConfig) -> None:
    position = np.random.default_rng(0).uniform(size=(4000, grid.num_dims)).astype(np.float32)
    table = random_table(grid)
    found = jax.jit(functools.partial(encodings.hash_encode, grid=grid))(table, position)
    np.testing.assert_allclose(found, encode_by_definition(table, position, grid), atol=VALUE)


@some("3d", "eight_features", "half_voxel", "one_cell")
@settings(max_examples=10)
@given(data=st.data())
def test_a_constant_table_gives_a_constant_code(grid: HashGridConfig, data: st.DataObject) -> None:
    constant = data.draw(arrays32(grid.num_features, -2, 2))
    table = np.broadcast_to(constant, random_table(grid).shape)
    expected = np.broadcast_to(np.tile(constant, grid.num_levels), (NUM, grid.num_outputs))
    np.testing.assert_allclose(compiled(grid)["hash"](table, data.draw(unit_points(grid))), expected, atol=1e-6)


@pytest.mark.parametrize("half_voxel_offset", [False, True])
@pytest.mark.parametrize("num_dims", [2, 3])
@settings(max_examples=10)
@given(data=st.data())
def test_a_linear_function_is_reproduced(half_voxel_offset: bool, num_dims: int, data: st.DataObject) -> None:
    grid = replace(
        _3D,
        num_dims=num_dims,
        num_levels=2,
        num_features=1,
        table_size=2**12,
        max_resolution=9,
        half_voxel_offset=half_voxel_offset,
    )
    slope, position = data.draw(arrays32(num_dims, -1, 1)), data.draw(points(NUM, num_dims))
    tables = []
    for resolution in hashing.level_resolutions(grid):
        side = hashing.num_vertices(grid, resolution)
        assert hashing.is_dense(grid, resolution)
        vertex = np.indices((side,) * num_dims).reshape(num_dims, -1)[::-1].T  # x fastest
        tables.append(((vertex - 0.5 * half_voxel_offset) / resolution) @ slope.astype(np.float64) + 0.25)
    table = np.concatenate(tables)[:, None].astype(np.float32)
    expected = np.tile((position.astype(np.float64) @ slope + 0.25)[:, None], (1, 2))
    np.testing.assert_allclose(compiled(grid)["hash"](table, position), expected, atol=2e-6)


@some("3d", "2d", "all_hashed", "half_voxel", "smoothstep")
@settings(max_examples=20)
@given(data=st.data())
def test_the_code_is_continuous_across_cell_faces(grid: HashGridConfig, data: st.DataObject) -> None:
    position = data.draw(unit_points(grid))
    resolution = data.draw(st.sampled_from(hashing.level_resolutions(grid)))
    axis, face = data.draw(st.integers(0, grid.num_dims - 1)), data.draw(st.integers(1, resolution))
    at = np.float32((face - 0.5 * grid.half_voxel_offset) / resolution)
    encode, table = compiled(grid)["hash"], random_table(grid)
    sides = []
    for offset in (-1e-6, 1e-6):
        position[:, axis] = at + np.float32(offset)
        sides.append(encode(table, position))
    # No feature changes by more than 2 (the range of the table) a cell, or 3 with smoothstep.
    np.testing.assert_allclose(*sides, atol=3 * grid.max_resolution * 3e-6)


# Gradients.


@gradient_grids
@settings(max_examples=8)
@given(data=st.data())
def test_custom_gradients_are_those_of_the_definition(grid: HashGridConfig, data: st.DataObject) -> None:
    position, seed = data.draw(unit_points(grid)), data.draw(seeds)
    args = random_table(grid, seed), position, random_cotangent(grid, seed)
    table_gradient, position_gradient = compiled(grid)["hash_vjp"](*args)
    expected_table, expected_position = compiled(grid)["wide_vjp"](*args)
    np.testing.assert_allclose(table_gradient, expected_table, atol=1e-4)
    np.testing.assert_allclose(position_gradient, expected_position, rtol=1e-5, atol=SLOPE)
    np.testing.assert_allclose(compiled(grid)["wide_transpose"](position, args[2]), expected_table, atol=1e-4)


@gradient_grids
@settings(max_examples=8)
@given(data=st.data())
def test_the_table_gradient_is_the_transpose(grid: HashGridConfig, data: st.DataObject) -> None:
    """It is so exactly at the entries that a point visits, and 0 at others."""
    position, cotangent = data.draw(unit_points(grid)), random_cotangent(grid)
    row, weight = rows_and_weights(position, grid)
    expected = np.zeros((hashing.level_offsets(grid)[-1] + 1, grid.num_features))
    per_level = cotangent.astype(np.float64).reshape(NUM, grid.num_levels, 1, -1)
    np.add.at(expected, row, weight[..., None] * per_level)  # row -1, of weight 0, is the one too many
    found, _ = compiled(grid)["hash_vjp"](random_table(grid), position, cotangent)
    np.testing.assert_allclose(found, expected[:-1], atol=1e-4)
    # The float32 position times N may round onto or off a face: then a corner of next to no weight comes or goes.
    visited = np.zeros(len(expected), bool)
    visited[row[weight > 1e-5]] = True
    touched = np.abs(np.asarray(found)).max(axis=1)
    assert (touched[visited[:-1]] > 0).all()
    assert (touched[~visited[:-1]] < 1e-3).all()


@gradient_grids
def test_gradients_agree_with_finite_differences(grid: HashGridConfig) -> None:
    rng = np.random.default_rng(0)
    position = rng.uniform(size=(40 * NUM, grid.num_dims)).astype(np.float32)
    position = position[inside_cells(position, grid)][:NUM]
    table, cotangent = random_table(grid), random_cotangent(grid)
    assert len(position) == NUM
    table_gradient, position_gradient = compiled(grid)["hash_vjp"](table, position, cotangent)

    def loss(table: np.ndarray, position: np.ndarray) -> np.ndarray:
        return np.sum(cotangent * encode_by_definition(table, position, grid), axis=1)

    along = rng.normal(size=table.shape)  # the code is linear in the table: a large step is exact
    difference = loss(table + along, position) - loss(table, position)
    np.testing.assert_allclose(np.sum(along * table_gradient), difference.sum(), rtol=1e-4, atol=1e-4)
    for axis in range(grid.num_dims):
        step = 1e-4 * np.eye(grid.num_dims)[axis]
        difference = (loss(table, position + step) - loss(table, position - step)) / 2e-4
        np.testing.assert_allclose(position_gradient[:, axis], difference, rtol=1e-3, atol=2e-3)


@some("one_smooth_level")
def test_the_position_gradient_is_differentiable(grid: HashGridConfig) -> None:
    """As the losses of a signed distance field need: the slope's own gradient in position and in the table."""
    table = random_table(grid)
    position = np.random.default_rng(0).uniform(size=(NUM, grid.num_dims)).astype(np.float32)

    def slope_norm(encode: Any, table: jax.Array, position: jax.Array) -> jax.Array:
        slope = jax.grad(lambda p: jnp.sum(jnp.sin(encode(table, p, grid=grid))))(position)
        return jnp.mean(slope**2)

    found, expected = (
        jax.jit(jax.grad(functools.partial(slope_norm, encode), argnums=(0, 1)))(table, position)
        for encode in (encodings.hash_encode, encodings.encode_broadcast)
    )
    for a, b in zip(*map(functools.partial(jax.tree.map, np.asarray), (found, expected)), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


@some("one_smooth_level")
def test_encoding_may_be_mapped(grid: HashGridConfig) -> None:
    position = np.random.default_rng(0).uniform(size=(3, NUM, grid.num_dims)).astype(np.float32)
    table, cotangent = random_table(grid), random_cotangent(grid)
    mapped = jax.jit(jax.vmap(functools.partial(encodings.hash_encode, grid=grid), in_axes=(None, 0)))
    np.testing.assert_allclose(
        mapped(table, position), [compiled(grid)["hash"](table, p) for p in position], atol=VALUE
    )

    def table_gradient(position: jax.Array) -> jax.Array:
        return jax.grad(lambda table: jnp.sum(cotangent * encodings.hash_encode(table, position, grid=grid)))(table)

    expected = [compiled(grid)["hash_vjp"](table, p, cotangent)[0] for p in position]
    np.testing.assert_allclose(jax.jit(jax.vmap(table_gradient))(position), expected, atol=1e-4)


# The edges.


@some("3d", "all_hashed", "half_voxel_smoothstep", "one_cell")
@settings(max_examples=10)
@given(data=st.data())
def test_positions_outside_the_cube_are_clamped(grid: HashGridConfig, data: st.DataObject) -> None:
    """A position outside the cube has the code of the nearest point in it."""
    beyond = floats32(-3, 4) | st.sampled_from([0.0, 1.0, -np.inf, np.inf, -1e30, 1e30])
    flat = data.draw(st.lists(beyond, min_size=NUM * grid.num_dims, max_size=NUM * grid.num_dims))
    position = np.array(flat, np.float32).reshape(NUM, grid.num_dims)
    encode, table = compiled(grid)["hash"], random_table(grid)
    np.testing.assert_array_equal(encode(table, position), encode(table, position.clip(0, 1)))


@every_grid
def test_the_corners_of_the_cube_are_encoded(grid: HashGridConfig) -> None:
    position = np.resize(
        np.array(list(itertools.product((0, 1), repeat=grid.num_dims)), np.float32), (NUM, grid.num_dims)
    )
    table = random_table(grid)
    np.testing.assert_allclose(
        compiled(grid)["hash"](table, position), encode_by_definition(table, position, grid), atol=2e-6
    )


@some("3d", "smoothstep", "half_voxel")
def test_a_nan_position_shows_and_stays_in_bounds(grid: HashGridConfig) -> None:
    position = np.random.default_rng(0).uniform(size=(NUM, grid.num_dims)).astype(np.float32)
    encode, table = compiled(grid)["hash"], random_table(grid)
    clean = encode(table, position)
    position[5, -1] = np.nan
    broken = np.asarray(encode(table, position))
    assert np.isnan(broken[5]).all()
    np.testing.assert_array_equal(np.delete(broken, 5, axis=0), np.delete(clean, 5, axis=0))


@some("3d", "all_hashed", "half_voxel_smoothstep", "one_cell")
def test_no_row_lies_out_of_its_level(grid: HashGridConfig) -> None:
    """Fetches promise it to XLA, which then checks nothing."""
    special = np.array([0, 1, -1, 2, np.nan, np.inf, -np.inf, 1e-30, np.nextafter(1, 0), 3e38, -3e38], np.float32)
    position = np.array(list(itertools.product(special, repeat=grid.num_dims)))

    @jit_to_numpy
    def rows(position: jax.Array) -> list[list[jax.Array]]:
        """Of every corner on every level."""
        levels = range(grid.num_levels)
        return [[row for row, _ in encodings._corners(position, grid, level)] for level in levels]

    for found, size in zip(rows(position), hashing.level_sizes(grid), strict=True):
        assert np.max(found) < size


def test_shapes_are_checked() -> None:
    table = random_table(TINY_GRID)
    with pytest.raises(ValueError, match=r"table has shape \(10, 2\): this grid needs"):
        encodings.hash_encode(table[:10], np.zeros((4, 3), np.float32), grid=TINY_GRID)
    for shape in ((4, 2), (3,), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"position has shape .*: expected \(N, 3\)"):
            encodings.hash_encode(table, np.zeros(shape, np.float32), grid=TINY_GRID)


def test_a_fresh_table_is_uniform_and_differs_by_key() -> None:
    grid = replace(TINY_GRID, init_scale=1e-2)
    table = init_table(jax.random.key(0), grid=grid)
    assert table.shape == (hashing.level_offsets(grid)[-1], grid.num_features)
    assert np.abs(table).max() <= 1e-2
    np.testing.assert_allclose([table.min(), table.max(), table.std()], [-1e-2, 1e-2, 1e-2 / 3**0.5], rtol=0.05)
    assert not np.array_equal(table, init_table(jax.random.key(1), grid=grid))


# Directions.


def test_harmonics_are_orthonormal_on_the_sphere() -> None:
    """Quadrature that is exact for the products of bands up to 4: Gauss-Legendre in z, even in the angle."""
    z, z_weight = np.polynomial.legendre.leggauss(8)
    angle = np.arange(16) * 2 * np.pi / 16
    ring = np.sqrt(1 - z**2)[:, None]
    direction = np.stack(np.broadcast_arrays(ring * np.cos(angle), ring * np.sin(angle), z[:, None]), axis=-1)
    code = sh_encode(direction.astype(np.float32), degree=5).astype(np.float64)
    gram = np.einsum("z,zai,zaj->ij", z_weight, code, code) * 2 * np.pi / 16
    np.testing.assert_allclose(gram, np.eye(25), atol=5e-6)


@given(directions(8))
def test_the_first_nine_harmonics_in_closed_form(direction: np.ndarray) -> None:
    x, y, z = direction.T.astype(np.float64)
    expected = [
        0.28209479177387814 + 0 * x,
        -0.48860251190291987 * y,
        0.48860251190291987 * z,
        -0.48860251190291987 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (3 * z**2 - 1),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (x**2 - y**2),
    ]
    np.testing.assert_allclose(sh_encode(direction, degree=3), np.stack(expected, axis=-1), atol=1e-6)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_a_higher_degree_appends_harmonics(degree: int) -> None:
    """Of a degree there are its square, and they begin with those of a lower one."""
    direction = np.array([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0]], np.float32)
    code = encodings.sh_encode(direction, degree=degree)
    assert code.shape == (2, degree**2)
    np.testing.assert_array_equal(code, encodings.sh_encode(direction, degree=degree + 1)[:, : degree**2])


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@given(directions(8))
def test_both_formulations_are_the_same_harmonics(degree: int, direction: np.ndarray) -> None:
    """A harmonic of a band l is at most sqrt((2 l + 1) / 4 pi); Legendre's coefficients of degree 7 reach 400."""
    found, expected = sh_encode_broadcast(direction, degree=degree), sh_encode_unrolled(direction, degree=degree)
    np.testing.assert_allclose(found, expected, atol=2e-4 if degree == 8 else 2e-6)


def test_harmonics_have_at_least_one_band() -> None:
    with pytest.raises(ValueError, match="degree = 0: expected at least 1"):
        encodings.sh_encode(jnp.zeros(3), degree=0)


@pytest.mark.parametrize("num_frequencies", [0, 1, 4])
@given(direction=directions(4))
def test_frequencies_are_sines_of_doublings(num_frequencies: int, direction: np.ndarray) -> None:
    """The input, then sine and cosine of each of its doublings."""
    parts = [direction.astype(np.float64)]
    for j in range(num_frequencies):
        parts += [np.sin(2.0**j * parts[0]), np.cos(2.0**j * parts[0])]
    found = frequency_encode(direction, num_frequencies=num_frequencies)
    np.testing.assert_allclose(found, np.concatenate(parts, axis=-1), atol=1e-6)


def test_a_gradient_of_no_points_is_zero() -> None:
    grid, none = TINY_GRID, np.zeros((0, 3), np.float32)
    total = lambda table: encodings.hash_encode(table, none, grid=grid).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(random_table(grid))
    np.testing.assert_array_equal(gradient, 0)


@needs_float16
def test_half_precision_positions_have_a_gradient() -> None:
    grid, position = TINY_GRID, np.random.default_rng(1).uniform(size=(8, 3)).astype(np.float16)
    total = lambda table, position: encodings.hash_encode(table, position, grid=grid).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(random_table(grid), position)
    assert np.all(np.isfinite(gradient))


# Less precision.


@needs_float16
def test_the_half_table_is_read_the_table_is_trained() -> None:
    grid = GRIDS["four_features"]
    table = random_table(grid)
    half_table, cotangent = table.astype(np.float16), random_cotangent(grid)
    position = np.random.default_rng(2).uniform(size=(NUM, grid.num_dims)).astype(np.float32)

    @jit_to_numpy
    def both(table: jax.Array, position: jax.Array) -> Any:
        encode = functools.partial(encodings.hash_encode, grid=grid, half_table=jnp.asarray(half_table))
        features, pull = jax.vjp(encode, table, position)
        return features, *pull(cotangent)

    features, of_table, of_position = both(table, position)
    np.testing.assert_allclose(features, encode_by_definition(np.asarray(half_table), position, grid), atol=VALUE)
    plain_table, _ = compiled(grid)["hash_vjp"](table, position, cotangent)
    np.testing.assert_allclose(of_table, plain_table, atol=1e-4)  # two programs may round a position differently
    _, expected = compiled(grid)["hash_vjp"](half_table.astype(np.float32), position, cotangent)
    np.testing.assert_allclose(of_position, expected, atol=SLOPE)
    # What the table holds, nobody looks at.
    np.testing.assert_array_equal(both(np.full_like(table, np.nan), position)[0], features)


@pytest.mark.parametrize("encode", [encodings.encode_unrolled, encodings.encode_broadcast])
def test_features_in_fewer_bits_are_rounded_once(encode: Any) -> None:
    grid = GRIDS["3d"]
    table, position = random_table(grid), np.random.default_rng(3).uniform(size=(NUM, 3)).astype(np.float32)
    found = jax.jit(functools.partial(encode, grid=grid, dtype=jnp.bfloat16))(table, position)
    assert found.dtype == jnp.bfloat16
    exact = encode_by_definition(table, position, grid)
    np.testing.assert_array_less(np.abs(np.asarray(found, np.float64) - exact), 2.0**-8 * np.abs(exact) + VALUE)


@pytest.mark.parametrize("transpose", [encodings.table_gradient_unrolled, encodings.table_gradient_broadcast])
def test_gradients_in_fewer_bits_are_summed_in_float32(transpose: Any) -> None:
    """A thousand points in one cell: in bfloat16 the sum would stop growing at 256 times a summand.

    A quarter into the cell all weights are multiples of 1/64, of which float32 holds the sums exactly.
    """
    grid = GRIDS["one_level"]
    position = np.full((1000, 3), 1 / 16, np.float32)
    gradient = np.ones((1000, grid.num_outputs), jnp.bfloat16)
    found = jit_to_numpy(functools.partial(transpose, grid=grid))(position, gradient)
    assert found.dtype == np.float32
    assert np.sum(found, dtype=np.float64) == 1000


def test_a_half_table_of_another_shape_is_refused() -> None:
    grid = GRIDS["2d"]
    table = random_table(grid)
    with pytest.raises(ValueError, match="half_table has shape"):
        encodings.hash_encode(table, np.zeros((1, 2), np.float32), grid=grid, half_table=table[1:])
