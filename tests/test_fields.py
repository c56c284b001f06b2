"""Fields: pytrees that are called like functions, their networks, and what is rounded where."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from strategies import TINY_FIELD, TINY_GRID, arrays32, jit_to_numpy, needs_float16

from jaxngp import fields, hashing
from jaxngp.config import FieldConfig, HashGridConfig, InputError, PointFieldConfig
from jaxngp.device import formulation
from jaxngp.encodings import hash_encode
from jaxngp.fields import DistanceField, ImageField, RadianceField

N = 64
CONFIGS = {
    "tiny": TINY_FIELD,
    "frequency": replace(TINY_FIELD, direction_encoding="frequency", use_bias=True, mlp_init="torch"),
    "masked": replace(TINY_FIELD, mask_outside_box=True, colour_layers=0, density_layers=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
HALF = replace(TINY_FIELD, precision="bfloat16")


def points_and_directions(seed: int = 0, num: int = N, margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(num, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return rng.uniform(-margin, 1 + margin, (num, 3)).astype(np.float32), direction.astype(np.float32)


init_params = jit_to_numpy(fields.init_params, static_argnames="config")
make_half_table = jit_to_numpy(fields.make_half_table, static_argnames="config")
evaluate = jit_to_numpy(lambda field, *inputs: field(*inputs))


def fresh(config: FieldConfig, seed: int = 0) -> RadianceField:
    return RadianceField.of(init_params(jax.random.key(seed), config=config), config=config)


# The networks.


@every_config
def test_every_point_has_a_density_and_a_colour(config: FieldConfig) -> None:
    """And the density alone, which the occupancy grid asks for, is that density."""
    field, (position, direction) = fresh(config), points_and_directions()
    density, rgb = evaluate(field, position, direction)
    assert density.shape == (N,)
    assert rgb.shape == (N, 3)
    assert np.isfinite(density).all()
    inside = ((position > 0) & (position < 1)).all(axis=1)
    counts = inside if config.mask_outside_box else np.ones(N, bool)
    assert 0 < inside.sum() < N
    assert (np.asarray(density)[counts] > 0).all()
    assert ((np.asarray(rgb) > 0) & (np.asarray(rgb) < 1))[counts].all()
    np.testing.assert_array_equal(np.asarray(density)[~counts], 0)
    np.testing.assert_array_equal(np.asarray(rgb)[~counts], 0)
    alone = jit_to_numpy(lambda field, position: field.density(position))(field, position)
    np.testing.assert_allclose(alone, density, rtol=1e-5)


@every_config
def test_parameters_have_the_shapes_of_the_config(config: FieldConfig) -> None:
    params = init_params(jax.random.key(0), config=config)
    assert params["encoding"]["table"].shape == (hashing.level_offsets(config.encoding)[-1], 2)
    directions = 3 + 6 * 2 if config.direction_encoding == "frequency" else 2**2
    widths = {
        "density_mlp": [4, *[8] * config.density_layers, 4],
        "colour_mlp": [4 + directions, *[8] * config.colour_layers, 3],
    }
    for name, expected in widths.items():
        assert len(params[name]) == len(expected) - 1
        for index, shape in enumerate(itertools.pairwise(expected)):
            layer = params[name][f"Dense_{index}"]
            assert layer["kernel"].shape == shape
            assert set(layer) == ({"kernel", "bias"} if config.use_bias else {"kernel"})


def test_torch_layers_are_uniform_within_their_bound() -> None:
    """One over the root of the number of inputs."""
    config = replace(CONFIGS["frequency"], hidden_width=256)
    params = init_params(jax.random.key(0), config=config)
    for name, inputs in (("Dense_0", 4), ("Dense_1", 256)):
        for array in params["density_mlp"][name].values():
            bound = inputs**-0.5
            assert np.abs(array).max() <= bound
            assert np.abs(array).max() > 0.3 * bound
        kernel = np.asarray(params["density_mlp"][name]["kernel"])
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.1)


def test_the_key_decides_about_the_parameters() -> None:
    first, again, other = (init_params(jax.random.key(seed), config=TINY_FIELD) for seed in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@given(arrays32(16, -3, 3))
def test_relu_passes_the_gradient_where_it_is_positive(x: np.ndarray) -> None:
    x = np.concatenate([x, np.float32([0, -0.0, 1e-37])])
    value, slope = relu_and_slope(x, np.full_like(x, 3.0))
    np.testing.assert_array_equal(value, np.maximum(x, 0))
    np.testing.assert_array_equal(slope, np.where(x > 0, 3, 0))


@jit_to_numpy
def relu_and_slope(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, pull = jax.vjp(fields.relu, x)
    return value, *pull(cotangent)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(arrays32((5, 7), -1, 1), arrays32((7, 3), -1, 1), arrays32((5, 3), -1, 1))
def test_a_matmul_sums_in_float32(dtype: Any, x: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray) -> None:
    def rounded(a: np.ndarray) -> np.ndarray:
        return a.astype(dtype).astype(np.float64)

    value, of_x, of_kernel = matmul_and_slopes(x.astype(dtype), kernel, cotangent)
    assert (value.dtype, of_x.dtype, of_kernel.dtype) == (jnp.float32, dtype, jnp.float32)
    np.testing.assert_allclose(value, rounded(x) @ rounded(kernel), atol=2e-6)
    np.testing.assert_allclose(of_kernel, rounded(x).T @ rounded(cotangent), atol=2e-6)
    np.testing.assert_allclose(
        of_x.astype(np.float32), rounded(cotangent) @ rounded(kernel).T, rtol=jnp.finfo(dtype).eps, atol=2e-6
    )


@jit_to_numpy
def matmul_and_slopes(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    value, pull = jax.vjp(lambda x, kernel: fields.matmul(x, kernel, jnp.dtype(jnp.float32)), x, kernel)
    return value, *pull(cotangent)


def test_float32_is_asked_to_be_float32() -> None:
    """A GPU would multiply 11 bits, and a CPU does not tell."""
    text = (
        jax.jit(lambda x, k: fields.matmul(x, k, x.dtype))
        .lower(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
        .as_text()
    )
    assert "precision = [HIGHEST, HIGHEST]" in text


@given(arrays32(16, -40, 40))
def test_the_clamped_exponential_has_a_finite_slope(x: np.ndarray) -> None:
    x = np.concatenate([x, np.float32([-1e30, -15, 0, 14.999, 15.001, 88, 1e30])])
    value, slope = exp_and_slope(x)
    np.testing.assert_allclose(value, np.exp(np.minimum(x.astype(np.float64), 15)), rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(slope, np.exp(np.clip(x.astype(np.float64), -15, 15)), rtol=1e-5)


exp_and_slope = jit_to_numpy(jax.vmap(jax.value_and_grad(fields.clamped_exp)))


# The half-precision table.


def test_a_table_too_small_for_float16_is_refused() -> None:
    with pytest.raises(InputError, match="init_scale"):
        replace(HALF, encoding=replace(TINY_FIELD.encoding, init_scale=2e-8))


@needs_float16
def test_the_half_table_is_clipped_where_asked() -> None:
    huge = {"encoding": {"table": np.float32([[1e9, -1e9]])}}
    np.testing.assert_array_equal(make_half_table(huge, config=HALF), [[65504, -65504]])
    assert fields.make_half_table(huge, config=TINY_FIELD) is None


@needs_float16
def test_a_field_in_bfloat16_is_nearly_the_same_field() -> None:
    params = init_params(jax.random.key(0), config=HALF)
    params["encoding"]["table"] = params["encoding"]["table"] * np.float32(3e3)
    inputs = points_and_directions()
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    expected = evaluate(RadianceField.of(params, config=TINY_FIELD), *inputs)
    for half_table in (None, make_half_table(params, config=HALF)):
        density, rgb = evaluate(RadianceField(params, half_table, HALF), *inputs)
        for a, b in zip((density, rgb), expected, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=5e-2, atol=1e-2)
            assert not np.array_equal(a, b)
    # What comes out is not rounded to the eight bits of the layers within.
    for out in (np.log(density), np.log(rgb / (1 - rgb))):
        rounded = out.astype(jnp.bfloat16).astype(np.float32)
        assert np.mean(np.abs(out - rounded) > 1e-4 * np.abs(out)) > 0.5


# Fields of position alone.

IMAGE_GRID = HashGridConfig(num_dims=2, num_levels=2, table_size=2**8, min_resolution=3, max_resolution=9, init_scale=1)
IMAGE = PointFieldConfig(encoding=IMAGE_GRID, hidden_width=8, num_outputs=3)
SDF = PointFieldConfig(encoding=replace(IMAGE_GRID, num_dims=3), hidden_width=8, use_bias=True)
KINDS = {"image": (ImageField, IMAGE), "distance": (DistanceField, SDF)}


def positions(dims: int) -> np.ndarray:
    return np.random.default_rng(0).random((N, dims)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_field_is_its_encoding_and_layers(kind: str) -> None:
    """Against the layers in float64."""
    make, config = KINDS[kind]
    params = jax.tree.map(lambda a: a + np.float32(0.01), init_params(jax.random.key(1), config=config))
    assert set(params) == {"encoding", "mlp"}
    assert set(params["mlp"]) == {"Dense_0", "Dense_1", "Dense_2"}
    position = positions(config.encoding.num_dims)
    features = jax.jit(hash_encode, static_argnames="grid")(params["encoding"]["table"], position, grid=config.encoding)
    x = np.asarray(features, np.float64)
    for index in range(3):
        layer = {name: np.asarray(array, np.float64) for name, array in params["mlp"][f"Dense_{index}"].items()}
        assert ("bias" in layer) == config.use_bias
        x = x @ layer["kernel"] + layer.get("bias", 0)
        x = np.maximum(x, 0) if index < 2 else x
    found = evaluate(make.of(params, config=config), position)
    assert found.shape == ((N,) if kind == "distance" else (N, 3))
    np.testing.assert_allclose(found, x[:, 0] if kind == "distance" else x, atol=1e-5)


@needs_float16
def test_a_point_field_in_bfloat16_is_nearly_the_same() -> None:
    params, position = init_params(jax.random.key(1), config=IMAGE), positions(2)
    expected = evaluate(ImageField.of(params, config=IMAGE), position)
    field = ImageField.of(params, config=replace(IMAGE, precision="bfloat16"))
    assert field.half_table.dtype == jnp.float16
    found = evaluate(field, position)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    assert not np.array_equal(found, expected)


@needs_float16
def test_a_bfloat16_field_reads_its_half_table() -> None:
    """Its gradient is one of the parameters, from which the next half-precision copy is made."""
    config = replace(IMAGE, precision="bfloat16")
    field, position = ImageField.of(init_params(jax.random.key(1), config=config), config=config), positions(2)
    half_table = np.asarray(field.half_table)
    other = replace(field, half_table=half_table + np.float16(1))
    assert not np.array_equal(evaluate(field, position), evaluate(other, position))
    empty = jax.tree.map(np.zeros_like, field.params["encoding"])
    blank = replace(field, params={**field.params, "encoding": empty})
    np.testing.assert_array_equal(evaluate(field, position), evaluate(blank, position))
    gradient = jit_to_numpy(jax.grad(lambda field: jnp.sum(field(position) ** 2)))(field)
    assert np.abs(gradient.params["encoding"]["table"]).max() > 0
    np.testing.assert_array_equal(gradient.half_table, 0)


# Fields as pytrees.


def pytree_case(kind: str) -> tuple[Any, tuple[np.ndarray, ...]]:
    """A field, and what it is a function of."""
    if kind not in KINDS:
        return fresh(HALF if "bfloat16" in kind else TINY_FIELD), points_and_directions()
    make, config = KINDS[kind]
    return make.of(init_params(jax.random.key(2), config=config), config=config), (positions(config.encoding.num_dims),)


@pytest.mark.parametrize("kind", ["radiance", pytest.param("radiance in bfloat16", marks=needs_float16), *KINDS])
def test_a_field_is_stored_as_its_arrays(kind: str) -> None:
    """Flattened, written by numpy, read and put together, it gives the same bits, by the same program."""
    field, inputs = pytree_case(kind)
    arrays, structure = jax.tree.flatten(field)
    file = io.BytesIO()
    np.savez(file, *arrays)
    file.seek(0)
    with np.load(file) as stored:
        again = jax.tree.unflatten(structure, [stored[f"arr_{i}"] for i in range(len(arrays))])
    assert again.config == field.config
    traced = []

    @jax.jit
    def once(field: Any, *inputs: Any) -> Any:
        traced.append(field)
        return field(*inputs)

    for a, b in zip(*map(jax.tree.leaves, (once(field, *inputs), once(again, *inputs))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(traced) == 1


def test_the_config_is_part_of_a_fields_structure() -> None:
    """Equal configs share programs, and others do not."""
    one, same, other = fresh(TINY_FIELD), fresh(replace(TINY_FIELD), 1), fresh(CONFIGS["masked"])
    assert jax.tree.structure(one) == jax.tree.structure(same)
    assert jax.tree.structure(one) != jax.tree.structure(other)


def test_stacked_fields_give_what_each_gives_alone() -> None:
    one, other, inputs = fresh(TINY_FIELD, 0), fresh(TINY_FIELD, 1), points_and_directions()
    both = jax.tree.map(lambda *a: np.stack(a), one, other)
    found = jit_to_numpy(jax.vmap(lambda field: field(*inputs)))(both)
    for index, field in enumerate((one, other)):
        for a, b in zip(found, evaluate(field, *inputs), strict=True):
            np.testing.assert_allclose(a[index], b, rtol=1e-4)


def test_both_formulations_compute_the_same_field() -> None:
    """Values to the rounding of sums of a few dozen terms; gradients add up N of them, in some order."""
    field, position = ImageField.of(init_params(jax.random.key(2), config=IMAGE), config=IMAGE), positions(2)
    results = []
    for choice in ("cpu", "gpu"):
        with formulation(choice):

            def total(field: ImageField) -> tuple[jax.Array, jax.Array]:
                rgb = field(position)
                return jnp.sum(jnp.sin(rgb)), rgb

            slopes, rgb = jit_to_numpy(jax.grad(total, has_aux=True))(field)
            results.append((rgb, slopes.params))
    (rgb, slopes), (other_rgb, other_slopes) = results
    np.testing.assert_allclose(rgb, other_rgb, rtol=2e-5, atol=2e-6)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(other_slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_second_derivatives_of_a_distance_are_slopes() -> None:
    """With smoothstep the gradient in the position is continuous but for the ReLUs: its slopes are its differences,
    except for the few points within which a ReLU switches."""
    grid = replace(TINY_GRID, num_levels=1, smoothstep=True, init_scale=1.0)
    config = PointFieldConfig(encoding=grid, hidden_width=8)
    field = DistanceField.of(init_params(jax.random.key(0), config=config), config=config)
    position = np.random.default_rng(0).uniform(0.01, 0.24, (N, 3)).astype(np.float32)  # within one cell
    gradient = jax.grad(lambda x, field: field(x[None])[0])
    second = jit_to_numpy(jax.vmap(jax.jacrev(gradient), in_axes=(0, None)))(position, field)
    slopes = jit_to_numpy(jax.vmap(gradient, in_axes=(0, None)))
    assert np.isfinite(second).all()
    scale = np.abs(second).max()
    assert scale > 1
    np.testing.assert_allclose(second, np.swapaxes(second, 1, 2), atol=1e-4 * scale)
    h = 1e-3
    for axis, step in enumerate(h * np.eye(3, dtype=np.float32)):
        differences = (slopes(position + step, field) - slopes(position - step, field)) / (2 * h)
        assert np.mean(np.abs(second[:, axis] - differences).max(axis=1) < 0.02 * scale) > 0.8
