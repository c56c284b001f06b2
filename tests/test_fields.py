"""Fields: their parts, and that the parameters of the 100-line reference give what the reference computes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from strategies import TINY_FIELD, arrays32

from jaxngp import fields, hashing, rendering
from jaxngp.cameras import Rays
from jaxngp.config import FieldConfig, HashGridConfig, InputError, PointFieldConfig, StratifiedConfig
from jaxngp.encodings import hash_encode
from jaxngp.presets import PRESETS

N = 64
CONFIGS = {
    "tiny": TINY_FIELD,
    "frequency": replace(TINY_FIELD, direction_encoding="frequency", use_bias=True, mlp_init="torch"),
    "masked": replace(TINY_FIELD, mask_outside_box=True, colour_layers=0, density_layers=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def points_and_directions(seed: int = 0, num: int = N, margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(num, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return rng.uniform(-margin, 1 + margin, (num, 3)).astype(np.float32), direction.astype(np.float32)


evaluate_field = jax.jit(fields.evaluate_field, static_argnames="config")
evaluate_density = jax.jit(fields.evaluate_density, static_argnames="config")
init_params = jax.jit(fields.init_params, static_argnames="config")


# The modules.


@every_config
def test_a_field_gives_a_density_and_a_colour_for_every_point(config: FieldConfig) -> None:
    params = init_params(jax.random.key(0), config=config)
    position, direction = points_and_directions()
    density, rgb = evaluate_field(params, position, direction, config=config)
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


@every_config
def test_the_density_alone_is_the_density_of_the_field(config: FieldConfig) -> None:
    params = init_params(jax.random.key(1), config=config)
    position, direction = points_and_directions(1)
    expected, _ = evaluate_field(params, position, direction, config=config)
    np.testing.assert_allclose(evaluate_density(params, position, config=config), expected, rtol=1e-5)


@every_config
def test_parameters_have_the_shapes_that_the_config_says(config: FieldConfig) -> None:
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


def test_layers_of_the_torch_kind_are_uniform_within_one_over_the_root_of_their_inputs() -> None:
    config = replace(CONFIGS["frequency"], hidden_width=256)
    params = init_params(jax.random.key(0), config=config)
    for name, inputs in (("Dense_0", 4), ("Dense_1", 256)):
        for array in params["density_mlp"][name].values():
            bound = inputs**-0.5
            assert np.abs(array).max() <= bound
            assert np.abs(array).max() > 0.3 * bound
        kernel = np.asarray(params["density_mlp"][name]["kernel"])
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.1)


def test_equal_keys_give_equal_parameters_and_other_keys_others() -> None:
    first, again, other = (init_params(jax.random.key(seed), config=TINY_FIELD) for seed in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_a_field_maker_is_the_same_object_for_equal_configs() -> None:
    assert fields.field_maker(TINY_FIELD) is fields.field_maker(dataclasses.replace(TINY_FIELD))
    params = init_params(jax.random.key(0), config=TINY_FIELD)
    position, direction = points_and_directions()
    found = fields.field_maker(TINY_FIELD)(params)(position, direction)
    expected = evaluate_field(params, position, direction, config=TINY_FIELD)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@given(arrays32(16, -3, 3))
def test_the_gradient_of_relu_is_that_of_what_it_lets_through(x: np.ndarray) -> None:
    x = np.concatenate([x, np.float32([0, -0.0, 1e-37])])
    value, pull = jax.vjp(fields.relu, jnp.asarray(x))
    np.testing.assert_array_equal(value, np.maximum(x, 0))
    np.testing.assert_array_equal(pull(jnp.full_like(x, 3.0))[0], np.where(x > 0, 3, 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(arrays32((5, 7), -1, 1), arrays32((7, 3), -1, 1), arrays32((5, 3), -1, 1))
def test_a_matmul_multiplies_in_one_precision_and_sums_in_float32(
    dtype: Any, x: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray
) -> None:
    def rounded(a: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(a, dtype), np.float64)

    value, pull = jax.vjp(lambda x, kernel: fields.matmul(x, kernel, jnp.dtype(jnp.float32)), x.astype(dtype), kernel)
    of_x, of_kernel = pull(jnp.asarray(cotangent))
    assert (value.dtype, of_x.dtype, of_kernel.dtype) == (jnp.float32, dtype, jnp.float32)
    np.testing.assert_allclose(value, rounded(x) @ rounded(kernel), atol=2e-6)
    np.testing.assert_allclose(of_kernel, rounded(x).T @ rounded(cotangent), atol=2e-6)
    np.testing.assert_allclose(
        of_x.astype(np.float32), rounded(cotangent) @ rounded(kernel).T, rtol=jnp.finfo(dtype).eps, atol=2e-6
    )


def test_float32_is_asked_to_be_float32() -> None:
    """A GPU would multiply 11 bits, and a CPU does not tell."""
    text = jax.jit(lambda x, k: fields.matmul(x, k, x.dtype)).lower(jnp.ones((2, 3)), jnp.ones((3, 4))).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text


def test_a_field_maker_reads_the_shadow() -> None:
    config = replace(TINY_FIELD, precision="bfloat16")
    text = jax.jit(lambda p, x: fields.field_maker(config)(p)(x, x)).lower(
        init_params(jax.random.key(0), config=config), jnp.zeros((4, 3))
    )
    assert f"tensor<{hashing.level_offsets(config.encoding)[-1]}x2xf16>" in text.as_text()


def test_a_table_too_small_for_float16_is_refused() -> None:
    with pytest.raises(InputError, match="init_scale"):
        replace(TINY_FIELD, precision="bfloat16", encoding=replace(TINY_FIELD.encoding, init_scale=2e-8))


def test_a_field_in_bfloat16_is_nearly_the_same_field() -> None:
    config = replace(TINY_FIELD, precision="bfloat16")
    params = init_params(jax.random.key(0), config=config)
    params["encoding"]["table"] = params["encoding"]["table"] * 3e3
    position, direction = points_and_directions()
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    expected = evaluate_field(params, position, direction, config=TINY_FIELD)
    for field in (functools.partial(evaluate_field, params, config=config), fields.field_maker(config)(params)):
        found = field(position, direction)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=5e-2, atol=1e-2)
            assert not np.array_equal(a, b)
    # What comes out is not rounded to the eight digits of the layers within.
    density, rgb = evaluate_field(params, position, direction, config=config)
    for out in (jnp.log(density), jnp.log(rgb / (1 - rgb))):
        rounded = np.asarray(out.astype(jnp.bfloat16), np.float32)
        assert np.mean(np.abs(out - rounded) > 1e-4 * np.abs(out)) > 0.5
    assert fields.make_half_table(params, config=TINY_FIELD) is None
    huge = {"encoding": {"table": jnp.array([[1e9, -1e9]])}}
    np.testing.assert_array_equal(fields.make_half_table(huge, config=config), [[65504, -65504]])
    assert fields.make_half_table(params, config=config).dtype == jnp.float16


@given(arrays32(16, -40, 40))
def test_the_clamped_exponential_is_finite_and_so_is_its_slope(x: np.ndarray) -> None:
    x = np.concatenate([x, np.float32([-1e30, -15, 0, 14.999, 15.001, 88, 1e30])])
    value, slope = jax.vmap(jax.value_and_grad(fields.clamped_exp))(x)
    np.testing.assert_allclose(value, np.exp(np.minimum(x.astype(np.float64), 15)), rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(slope, np.exp(np.clip(x.astype(np.float64), -15, 15)), rtol=1e-5)


# The reference, restated: positions in float32, as their products with N decide about cells; the rest in float64.


def reference_config(**encoding: int) -> FieldConfig:
    config = PRESETS["hundred_lines"].field
    return replace(config, encoding=replace(config.encoding, **encoding))


SMALL = reference_config(table_size=2**8, num_levels=4, max_resolution=90)
FULL = reference_config()


def random_state_dict(config: FieldConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    encoding = config.encoding
    state = {
        f"lookup_tables.{level}": rng.uniform(-0.1, 0.1, (encoding.table_size, 2)).astype(np.float32)
        for level in range(encoding.num_levels)
    }
    layers = {
        "density_MLP.0": (64, 2 * encoding.num_levels),
        "density_MLP.2": (16, 64),
        "color_MLP.0": (64, 43),
        "color_MLP.2": (64, 64),
        "color_MLP.4": (3, 64),
    }
    for name, (outputs, inputs) in layers.items():
        bound = inputs**-0.5
        state[f"{name}.weight"] = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
        state[f"{name}.bias"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
    return state


def mlp(state: dict[str, np.ndarray], name: str, x: np.ndarray, last: int) -> np.ndarray:
    for index in range(0, last + 1, 2):
        x = x @ state[f"{name}.{index}.weight"].astype(np.float64).T + state[f"{name}.{index}.bias"]
        x = np.maximum(x, 0) if index < last else x
    return x


def reference_forward(
    state: dict[str, np.ndarray], levels: tuple[int, ...], x: np.ndarray, d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """NGP.forward: x (N, 3) in world units, d (N, 3) -> colour (N, 3), density (N,) per world unit."""
    x = x / 3
    mask = (np.abs(x) < 0.5).all(axis=1)
    x = (x[mask] + 0.5).astype(np.float32)
    features = []
    for level, resolution in enumerate(levels):
        scaled = x * np.float32(resolution)
        low, high = np.floor(scaled), np.ceil(scaled)
        fraction = (scaled - low).astype(np.float64)
        table, total = state[f"lookup_tables.{level}"].astype(np.float64), np.zeros((len(x), 2))
        for corner in np.ndindex(2, 2, 2):
            vertex = np.where(corner, high, low).astype(np.int64)
            row = (vertex[:, 0] ^ (vertex[:, 1] * 2_654_435_761) ^ (vertex[:, 2] * 805_459_861)) % len(table)
            total += np.where(corner, fraction, 1 - fraction).prod(axis=1)[:, None] * table[row]
        features.append(total)
    d = d[mask].astype(np.float64)
    waves = [d, *(wave(2.0**j * d) for j in range(4) for wave in (np.sin, np.cos))]
    h = mlp(state, "density_MLP", np.concatenate(features, axis=1), 2)
    colour, density = np.zeros((len(mask), 3)), np.zeros(len(mask))
    density[mask] = np.exp(h[:, 0])
    colour[mask] = 1 / (1 + np.exp(-mlp(state, "color_MLP", np.concatenate([h, *waves], axis=1), 4)))
    return colour, density


def reference_render(state: dict[str, np.ndarray], levels: tuple[int, ...], o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """render_rays from 2 to 6 world units with 192 bins and noise 0.5: before white."""
    t = np.linspace(2, 6, 192)
    middle = (t[1:] + t[:-1]) / 2
    t = (np.append(t[0], middle) + np.append(middle, t[-1])) / 2
    delta = np.append(np.diff(t), 1e10)
    x = o[:, None] + t[:, None] * d[:, None]
    colour, density = reference_forward(state, levels, x.reshape(-1, 3), np.repeat(d, 192, axis=0))
    alpha = 1 - np.exp(-density.reshape(-1, 192) * delta)
    light = np.cumprod(1 - alpha, axis=1)
    weights = np.concatenate([np.ones((len(o), 1)), light[:, :-1]], axis=1) * alpha
    return np.sum(weights[..., None] * colour.reshape(len(o), 192, 3), axis=1) + 1 - weights.sum(axis=1)[:, None]


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["small", "full"])
def test_parameters_of_the_reference_give_its_densities_colours_and_pixels(config: FieldConfig) -> None:
    state, levels = random_state_dict(config), hashing.level_resolutions(config.encoding)
    params = fields.params_from_reference(state, config=config)
    position, direction = points_and_directions()
    position[0] = (0.25, 0.5, 0.75)  # on faces, where floor and ceil agree
    world = (position.astype(np.float64) - 0.5) * 3
    colour, density = reference_forward(state, levels, world, direction)
    assert 0 < (density > 0).sum() < N
    found_density, found_colour = evaluate_field(params, position, direction, config=config)
    np.testing.assert_allclose(found_density, 3 * density, rtol=1e-5)
    np.testing.assert_allclose(found_colour, colour, rtol=1e-5)

    rng = np.random.default_rng(1)
    d = rng.normal(size=(6, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    o = rng.uniform(-0.8, 0.8, (6, 3)) - 4 * d  # world units, as the cameras of the scenes stand
    rays = Rays(origin=jnp.asarray(o / 3 + 0.5, jnp.float32), direction=jnp.asarray(d, jnp.float32))
    sampler = StratifiedConfig()
    out, _ = rendering.render_chunk(
        params, rays, None, jnp.ones(3), make_field=fields.field_maker(config), sampler=sampler
    )
    expected = reference_render(state, levels, o, d)
    assert np.abs(expected - 1).max() > 0.1
    np.testing.assert_allclose(out.rgb, expected, atol=1e-5)


@pytest.mark.parametrize("box_side", [1.0, 2.5])
def test_the_side_of_the_box_scales_the_density_and_leaves_the_colour(box_side: float) -> None:
    state, (position, direction) = random_state_dict(SMALL), points_and_directions(margin=-0.01)
    unit, scaled = (
        evaluate_field(
            fields.params_from_reference(state, config=SMALL, box_side=side), position, direction, config=SMALL
        )
        for side in (1.0, box_side)
    )
    np.testing.assert_allclose(scaled[0], box_side * unit[0], rtol=1e-5)
    np.testing.assert_allclose(scaled[1], unit[1], rtol=1e-5)


def test_converted_parameters_have_the_structure_of_fresh_ones() -> None:
    fresh = init_params(jax.random.key(0), config=SMALL)
    converted = fields.params_from_reference(random_state_dict(SMALL), config=SMALL)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, converted)
    assert {a.dtype for a in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


def test_the_state_dict_is_left_as_it_was() -> None:
    state = random_state_dict(SMALL)
    before = {name: array.copy() for name, array in state.items()}
    fields.params_from_reference(state, config=SMALL)
    for name, array in before.items():
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("name", ["lookup_tables.3", "density_MLP.0.bias", "color_MLP.4.weight"])
def test_a_missing_name_is_named(name: str) -> None:
    state = random_state_dict(SMALL)
    del state[name]
    with pytest.raises(InputError, match=f"state_dict has no '{name}': its names are .*lookup_tables.0"):
        fields.params_from_reference(state, config=SMALL)


@pytest.mark.parametrize("name", ["lookup_tables.0", "density_MLP.2.weight", "color_MLP.0.bias"])
def test_an_array_of_another_shape_is_named(name: str) -> None:
    state = random_state_dict(SMALL)
    state[name] = state[name][1:]
    with pytest.raises(InputError, match=rf"state_dict\['{name}'\] has shape \(.*\): this config needs \("):
        fields.params_from_reference(state, config=SMALL)


# Fields of position alone.


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("dims", "outputs"), [(2, 3), (3, 1)])
def test_a_point_field_is_its_encoding_and_layers(dims: int, outputs: int, use_bias: bool) -> None:
    """Against the layers in float64."""
    grid = HashGridConfig(
        num_dims=dims, num_levels=2, table_size=2**8, min_resolution=3, max_resolution=9, init_scale=1
    )
    config = PointFieldConfig(encoding=grid, hidden_width=8, num_outputs=outputs, use_bias=use_bias)
    params = jax.tree.map(lambda a: a + 0.01, init_params(jax.random.key(1), config=config))
    assert set(params) == {"encoding", "mlp"}
    assert set(params["mlp"]) == {"Dense_0", "Dense_1", "Dense_2"}
    position = np.random.default_rng(0).random((N, dims)).astype(np.float32)
    features = hash_encode(params["encoding"]["table"], position, grid=grid)
    x = np.asarray(features, np.float64)
    for index in range(3):
        layer = {name: np.asarray(array, np.float64) for name, array in params["mlp"][f"Dense_{index}"].items()}
        assert ("bias" in layer) == use_bias
        x = x @ layer["kernel"] + layer.get("bias", 0)
        x = np.maximum(x, 0) if index < 2 else x
    found = jax.jit(fields.evaluate_points, static_argnames="config")(params, position, config=config)
    assert found.shape == (N, outputs)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_a_point_field_in_bfloat16_is_the_same_within_its_rounding() -> None:
    grid = HashGridConfig(num_dims=2, num_levels=2, table_size=2**8, min_resolution=3, max_resolution=9, init_scale=1)
    config = PointFieldConfig(encoding=grid, hidden_width=8, num_outputs=3)
    rounded = replace(config, precision="bfloat16")
    params = init_params(jax.random.key(1), config=config)
    position = np.random.default_rng(0).random((N, 2)).astype(np.float32)
    evaluate = jax.jit(fields.evaluate_points, static_argnames="config")
    expected = evaluate(params, position, config=config)
    half_table = fields.make_half_table(params, config=rounded)
    assert half_table.dtype == jnp.float16
    found = evaluate(params, position, config=rounded, half_table=half_table)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    assert not np.array_equal(found, expected)
