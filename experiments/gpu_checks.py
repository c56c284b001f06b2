"""The device's float32 against `float64`, for what a training step computes of its first samples."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import float64
from experiments.throughput import StepInputs, run_networks
from jaxngp.compositing import composite
from jaxngp.config import FieldConfig, HashGridConfig
from jaxngp.encodings import frequency_encode, hash_encode, sh_encode
from jaxngp.fields import Params

CHECKED = 4096  # samples
TOLERANCES = {"encode": 5e-4, "composite": 1e-4, "networks": 2e-2}
"""Of the encoding for places that float32 rounds to 1 / 8192 of the finest cell, of the networks for TF32's factors."""

ENCODING = ("features", "gradient of the table", "gradient of the position")
COMPOSITE = ("colour", "opacity", "depth", "gradient of the density", "gradient of the colour")
NETWORKS = ("log density", "colour", "gradient of the features", "gradient of the weights")


def all_checks(config: FieldConfig, params: Params, inputs: StepInputs) -> list[float64.Check]:
    """The first CHECKED samples of a step, through the encoding, compositing and the networks, and back."""
    return [
        *check_encoding(config.encoding, params["encoding"]["table"], inputs.position[:CHECKED]),
        *check_composite(inputs),
        *check_networks(config, params, inputs),
    ]


def _compare(group: str, ours: Mapping[str, Any], truth: Mapping[str, np.ndarray]) -> list[float64.Check]:
    tolerance = TOLERANCES[group]
    return [float64.check(f"{group}: {name}", ours[name], truth[name], tolerance=tolerance) for name in truth]


def check_encoding(grid: HashGridConfig, table: jax.Array, position: jax.Array) -> list[float64.Check]:
    gradient = jax.random.normal(jax.random.key(2), (len(position), grid.num_outputs))

    def ours(table: jax.Array, position: jax.Array, gradient: jax.Array) -> dict[str, jax.Array]:
        features, vjp = jax.vjp(functools.partial(hash_encode, grid=grid), table, position)
        return dict(zip(ENCODING, (features, *vjp(gradient)), strict=True))

    truth = float64.encode(*map(np.asarray, (table, position, gradient)), grid=grid)
    return _compare("encode", jax.jit(ours)(table, position, gradient), truth)


def check_composite(inputs: StepInputs) -> list[float64.Check]:
    count = min(CHECKED, len(inputs.density))
    num_rays = int(inputs.samples.ray[count - 1]) + 1
    density, rgb = inputs.density[:count], inputs.rgb[:count]
    others = (inputs.samples.t[:count], inputs.samples.dt[:count], inputs.samples.ray[:count])
    background = inputs.noise.background[:num_rays]
    gradient = jax.random.normal(jax.random.key(3), background.shape)

    def ours(density: jax.Array, rgb: jax.Array) -> dict[str, jax.Array]:
        out, vjp = jax.vjp(lambda density, rgb: composite(density, rgb, *others, background), density, rgb)
        zeros = jax.tree.map(jnp.zeros_like, out)
        return dict(zip(COMPOSITE, (out.rgb, out.opacity, out.depth, *vjp(replace(zeros, rgb=gradient))), strict=True))

    truth = float64.composite(*map(np.asarray, (density, rgb, *others, background, gradient)))
    return _compare("composite", jax.jit(ours)(density, rgb), truth)


def check_networks(config: FieldConfig, params: Params, inputs: StepInputs) -> list[float64.Check]:
    features, direction = inputs.features[:CHECKED], inputs.direction[:CHECKED]
    mlps = {name: value for name, value in params.items() if name != "encoding"}
    keys = jax.random.split(jax.random.key(4))
    # Densities differ by orders of magnitude, and the largest would decide alone.
    density_gradient = jax.random.normal(keys[0], (len(features),)) / (1 + inputs.density[:CHECKED])
    rgb_gradient = jax.random.normal(keys[1], (len(features), 3))

    def ours(features: jax.Array, mlps: Any) -> dict[str, jax.Array]:
        networks = functools.partial(run_networks, field=config)
        out, vjp = jax.vjp(lambda features, mlps: networks(features, direction, mlps), features, mlps)
        inner, weights = vjp((density_gradient, rgb_gradient))
        kernels = [layer["kernel"] for name in ("density_mlp", "colour_mlp") for layer in float64.layers(weights[name])]
        flat = jnp.concatenate([kernel.ravel() for kernel in kernels])
        return dict(zip(NETWORKS, (jnp.log(out[0]), out[1], inner, flat), strict=True))

    if config.direction_encoding == "frequency":
        encoded = frequency_encode(direction, num_frequencies=config.direction_degree)
    else:
        encoded = sh_encode(direction, degree=config.direction_degree)
    truth = float64.networks(mlps, *map(np.asarray, (features, encoded, density_gradient, rgb_gradient)))
    truth["log density"] = np.log(truth.pop("density"))
    return _compare("networks", jax.jit(ours)(features, mlps), truth)
