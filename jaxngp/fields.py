"""Fields: functions of position that are learned, as pytrees, and the Flax modules inside them (paper section 5.4).

A `RadianceField`, an `ImageField` or a `DistanceField` holds its parameters as arrays and its config as static data,
and is called like the function it is: `field(position, direction)`. Being a pytree it can be passed through jit, grad
and vmap, stacked, and stored.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxngp.config import FieldConfig, HashGridConfig, MlpInit, PointFieldConfig
from jaxngp.device import fusion_barrier
from jaxngp.encodings import frequency_encode, hash_encode, init_table, sh_encode

Params = dict[str, Any]
"""A nested dict of arrays, as flax gives it."""

MAX_LOG_DENSITY = 15.0


@jax.custom_jvp
def clamped_exp(x: jax.Array) -> jax.Array:
    """exp(min(x, 15)), the density of a network's output: finite, and with a gradient that never dies or explodes.

    The derivative is exp(clip(x, -15, 15)) everywhere, so that an output above the clamp can still come down.
    """
    return jnp.exp(jnp.minimum(x, MAX_LOG_DENSITY))


@clamped_exp.defjvp
def _clamped_exp_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return clamped_exp(x), tangent * jnp.exp(jnp.clip(x, -MAX_LOG_DENSITY, MAX_LOG_DENSITY))


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a gradient that needs only the result: what went in is neither stored nor read again."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y = relu(x)
    return y, jnp.where(y != 0, tangent, 0)  # XLA would turn y > 0 into x > 0, and keep x for it


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x (N, I) times kernel (I, O) f32, multiplied in the precision of x, summed in f32, rounded to dtype -> (N, O).

    In the gradient the cotangent is rounded to the precision of x too; the kernel's gradient comes out in f32.
    """
    return _dot(x, kernel.astype(x.dtype), dtype)


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Unless told, a GPU takes only 11 bits of a float32's digits into a product.
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def _matmul_fwd(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple]:
    return matmul(x, kernel, dtype), (x, kernel)


def _matmul_bwd(_: jnp.dtype, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    return matmul(cotangent, kernel.T, x.dtype), _dot(x.T, cotangent, kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


class Dense(nn.Module):
    """A linear layer in the precision of its input: (N, inputs) -> (N, outputs) of `dtype`; parameters are f32."""

    outputs: int
    use_bias: bool
    initial: MlpInit
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = 1 / math.sqrt(x.shape[-1])  # torch.nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases too
        torch_uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
        glorot = self.initial == "glorot"
        initial = nn.initializers.glorot_uniform() if glorot else torch_uniform
        y = matmul(x, self.param("kernel", initial, (x.shape[-1], self.outputs), jnp.float32), self.dtype)
        if not self.use_bias:
            return y
        initial = nn.initializers.zeros_init() if glorot else torch_uniform
        # In float32, so that the bias's gradient, a sum over all samples, is one of float32 too.
        bias = self.param("bias", initial, (self.outputs,), jnp.float32)
        return (y.astype(jnp.promote_types(y.dtype, jnp.float32)) + bias).astype(self.dtype)


class Mlp(nn.Module):
    """num_layers hidden layers of `width` with ReLU, then a linear one: (N, inputs) -> (N, outputs) f32.

    Hidden layers have the precision of the input. The last one comes out in f32: it holds a log density, or goes
    into a sigmoid.
    """

    width: int
    num_layers: int
    outputs: int
    use_bias: bool = False
    initial: MlpInit = "glorot"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = functools.partial(Dense, use_bias=self.use_bias, initial=self.initial)
        for _ in range(self.num_layers):
            x = relu(layer(self.width, dtype=x.dtype)(x))
        return layer(self.outputs, dtype=jnp.promote_types(x.dtype, jnp.float32))(x)


class HashEncoding(nn.Module):
    """`encodings.hash_encode` with its table as the parameter `table`: (N, D) in [0, 1] -> (N, L * F) of `dtype`."""

    grid: HashGridConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, position: jax.Array, half_table: jax.Array | None = None) -> jax.Array:
        table = self.param("table", lambda key: init_table(key, grid=self.grid))
        return hash_encode(table, position, grid=self.grid, half_table=half_table, dtype=self.dtype)


class NerfNetwork(nn.Module):
    """Position and direction to density and colour: hash encoding -> density MLP -> colour MLP.

    The first output of the density MLP is the log of the density per scene unit; all of them, with the encoded
    direction, enter the colour MLP, and a sigmoid gives sRGB.
    """

    config: FieldConfig

    def setup(self) -> None:
        c = self.config
        self.encoding = HashEncoding(c.encoding, compute_dtype(c))
        self.density_mlp = Mlp(c.hidden_width, c.density_layers, c.num_geometry_features, c.use_bias, c.mlp_init)
        self.colour_mlp = Mlp(c.hidden_width, c.colour_layers, 3, c.use_bias, c.mlp_init)

    def __call__(
        self, position: jax.Array, direction: jax.Array, half_table: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """position (N, 3) scene units, direction (N, 3) unit -> density (N,), rgb (N, 3), f32."""
        density, rgb = self.networks(self.encoding(position, half_table), direction)
        if self.config.mask_outside_box:
            inside = _inside(position)
            density, rgb = jnp.where(inside, density, 0), jnp.where(inside[:, None], rgb, 0)
        return density, rgb

    def networks(self, features: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All but the hash encoding: its features (N, L * F), direction (N, 3) -> density (N,), rgb (N, 3)."""
        geometry = self.density_mlp(features)
        encoded = _encode_direction(direction, self.config)
        inputs = jnp.concatenate([geometry.astype(features.dtype), encoded.astype(features.dtype)], axis=-1)
        return clamped_exp(geometry[:, 0]), nn.sigmoid(self.colour_mlp(inputs))

    def density(self, position: jax.Array) -> jax.Array:
        """position (N, 3) scene units -> density (N,) per scene unit."""
        density = clamped_exp(self.density_mlp(self.encoding(position))[:, 0])
        return jnp.where(_inside(position), density, 0) if self.config.mask_outside_box else density


class PointNetwork(nn.Module):
    """Position to a few numbers, an image's colour or a signed distance: hash encoding -> MLP, linear output."""

    config: PointFieldConfig

    def setup(self) -> None:
        c = self.config
        self.encoding = HashEncoding(c.encoding, compute_dtype(c))
        self.mlp = Mlp(c.hidden_width, c.hidden_layers, c.num_outputs, c.use_bias)

    def __call__(self, position: jax.Array, half_table: jax.Array | None = None) -> jax.Array:
        """position (N, D) in [0, 1] -> (N, num_outputs) f32."""
        return self.networks(self.encoding(position, half_table))

    def networks(self, features: jax.Array) -> jax.Array:
        """All but the hash encoding: its features (N, L * F) -> (N, num_outputs)."""
        return jnp.asarray(self.mlp(features))


def compute_dtype(config: FieldConfig | PointFieldConfig) -> jnp.dtype | None:
    """The dtype of the features and hidden layers; None is that of the parameters."""
    return jnp.dtype(jnp.bfloat16) if config.precision == "bfloat16" else None


def _inside(position: jax.Array) -> jax.Array:
    return jnp.all((position > 0) & (position < 1), axis=-1)


def _encode_direction(direction: jax.Array, config: FieldConfig) -> jax.Array:
    if config.direction_encoding == "frequency":
        encode = functools.partial(frequency_encode, num_frequencies=config.direction_degree)
    else:
        encode = functools.partial(sh_encode, degree=config.direction_degree)
    return fusion_barrier(encode, direction)  # fused into the concatenation that follows, it takes three times as long


# Parameters.


def init_params(key: jax.Array, *, config: FieldConfig | PointFieldConfig) -> Params:
    """Fresh parameters: {"encoding": {"table"}} and the MLPs, {"density_mlp", "colour_mlp"} or {"mlp"}, as dicts."""
    network_key, table_key = jax.random.split(key)
    # Not by one init of the whole field, which would trace the encoding for nothing but the shape of its output.
    inputs = [jnp.zeros((1, config.encoding.num_outputs), jnp.float32)]
    if isinstance(config, FieldConfig):
        direction = jnp.zeros((1, 3), jnp.float32)
        networks = NerfNetwork(config).init(network_key, *inputs, direction, method="networks")
    else:
        networks = PointNetwork(config).init(network_key, *inputs, method="networks")
    return {"encoding": {"table": init_table(table_key, grid=config.encoding)}, **networks["params"]}


def make_half_table(params: Params, *, config: FieldConfig | PointFieldConfig) -> jax.Array | None:
    """A copy of the hash table to read from, half its size; None where the field computes in float32.

    In float16, which is as small as bfloat16 and rounds eight times finer: its narrow range would trouble gradients,
    and none are kept in it. Entries beyond it, 65504, are clipped.
    """
    if config.precision != "bfloat16":
        return None
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(params["encoding"]["table"], -largest, largest).astype(jnp.float16)


# The fields.


@struct.dataclass
class RadianceField:
    """Density and colour as a function of position and direction. `half_table` is that of `make_half_table`."""

    params: Params
    half_table: jax.Array | None
    config: FieldConfig = struct.field(pytree_node=False)

    @classmethod
    def of(cls, params: Params, *, config: FieldConfig) -> RadianceField:
        """The field of these parameters."""
        return cls(params, make_half_table(params, config=config), config)

    def __call__(self, position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        """position (N, 3) scene units, direction (N, 3) unit -> density (N,) per scene unit, rgb (N, 3) sRGB, f32."""
        network = NerfNetwork(self.config)
        density, rgb = network.apply({"params": self.params}, position, direction, self.half_table)
        return jnp.asarray(density), jnp.asarray(rgb)

    def density(self, position: jax.Array) -> jax.Array:
        """position (N, 3) scene units -> density (N,) per scene unit, from the full-precision table."""
        return jnp.asarray(NerfNetwork(self.config).apply({"params": self.params}, position, method="density"))


@struct.dataclass
class ImageField:
    """Colour as a function of position. `half_table` is that of `make_half_table`."""

    params: Params
    half_table: jax.Array | None
    config: PointFieldConfig = struct.field(pytree_node=False)

    @classmethod
    def of(cls, params: Params, *, config: PointFieldConfig) -> ImageField:
        """The field of these parameters."""
        return cls(params, make_half_table(params, config=config), config)

    def __call__(self, position: jax.Array) -> jax.Array:
        """position (N, 2) in [0, 1] -> rgb (N, 3) sRGB f32, which may leave [0, 1]."""
        return _evaluate_points(self, position)


@struct.dataclass
class DistanceField:
    """Signed distance as a function of position. `half_table` is that of `make_half_table`."""

    params: Params
    half_table: jax.Array | None
    config: PointFieldConfig = struct.field(pytree_node=False)

    @classmethod
    def of(cls, params: Params, *, config: PointFieldConfig) -> DistanceField:
        """The field of these parameters."""
        return cls(params, make_half_table(params, config=config), config)

    def __call__(self, position: jax.Array) -> jax.Array:
        """position (N, 3) scene units -> signed distance (N,) scene units, negative inside, f32."""
        return _evaluate_points(self, position)[:, 0]


def _evaluate_points(field: ImageField | DistanceField, position: jax.Array) -> jax.Array:
    found = PointNetwork(field.config).apply({"params": field.params}, position, field.half_table)
    return jnp.asarray(found)
