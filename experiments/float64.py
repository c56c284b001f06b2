"""What the encoding, the networks and compositing compute, and their gradients, once more: in float64, in numpy.

Written from the paper's formulas and not from the package's code, of which only the layout of the table is taken, to
tell how far a device's float32 is from the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxngp.config import HashGridConfig
from jaxngp.fields import MAX_LOG_DENSITY
from jaxngp.hashing import PRIMES, corner_offsets, is_dense, level_offsets, level_resolutions, num_vertices

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Check:
    """How far an array is from the truth: the norm of the difference, and its largest element, relative to the truth's.

    It passes by the norm; a single element may be what cancellation left of much larger numbers.
    """

    name: str
    error: float
    largest: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # and not where it is no number


def check(name: str, ours: Any, truth: np.ndarray, *, tolerance: float) -> Check:
    ours = np.asarray(ours).astype(np.float64)
    if ours.shape != truth.shape:
        raise ValueError(f"{name} has shape {ours.shape}: expected {truth.shape}")
    difference = ours - truth
    error = np.linalg.norm(difference) / max(float(np.linalg.norm(truth)), 1e-300)
    largest = np.max(np.abs(difference)) / max(float(np.max(np.abs(truth))), 1e-300)
    return Check(name, float(error), float(largest), tolerance)


def encode(table: np.ndarray, position: np.ndarray, gradient: np.ndarray, *, grid: HashGridConfig) -> Arrays:
    """Features (N, L * F), and the gradients of sum(features * gradient) in the table and in the position (N, D).

    The cell of a point is the one that float32 finds, since beside a cell's face the gradient in the position jumps.
    """
    table, gradient = table.astype(np.float64), gradient.astype(np.float64)
    features = []
    table_gradient, position_gradient = np.zeros_like(table), np.zeros(position.shape)
    for level, resolution in enumerate(level_resolutions(grid)):
        shift = 0.5 if grid.half_voxel_offset else 0.0
        clipped = np.clip(position, 0, 1).astype(np.float32)
        cell = np.floor(clipped * np.float32(resolution) + np.float32(shift)).astype(np.int64)
        cell = np.clip(cell, 0, num_vertices(grid, resolution) - 2)
        place = clipped.astype(np.float64) * resolution + shift - cell
        inside = (position >= 0) & (position <= 1)
        slope = np.where(inside, resolution * (6 * place * (1 - place) if grid.smoothstep else 1.0), 0.0)
        fraction = place**2 * (3 - 2 * place) if grid.smoothstep else place
        cotangent = gradient.reshape(len(position), grid.num_levels, -1)[:, level]
        feature = np.zeros_like(cotangent)
        for offset in corner_offsets(grid.num_dims):
            row = level_offsets(grid)[level] + _row(cell + offset, grid, resolution)
            factors = np.where(offset, fraction, 1 - fraction)
            weight = factors.prod(axis=1, keepdims=True)
            feature += weight * table[row]
            np.add.at(table_gradient, row, weight * cotangent)
            through = (table[row] * cotangent).sum(axis=1)
            for axis, far in enumerate(offset):
                others = np.delete(factors, axis, axis=1).prod(axis=1)
                position_gradient[:, axis] += through * others * slope[:, axis] * (1 if far else -1)
        features.append(feature)
    return {
        "features": np.concatenate(features, axis=1),
        "gradient of the table": table_gradient,
        "gradient of the position": position_gradient,
    }


def _row(vertex: np.ndarray, grid: HashGridConfig, resolution: int) -> np.ndarray:
    """The rows (N,) within their level of vertices (N, D): Eq. 4, or their rank where all fit."""
    if is_dense(grid, resolution):
        return vertex @ num_vertices(grid, resolution) ** np.arange(grid.num_dims)
    hashed = np.zeros(len(vertex), np.int64)
    for axis, prime in zip(range(grid.num_dims), PRIMES, strict=False):
        hashed ^= vertex[:, axis] * prime % 2**32
    return hashed % grid.table_size


def composite(
    density: np.ndarray,
    rgb: np.ndarray,
    t: np.ndarray,
    dt: np.ndarray,
    ray: np.ndarray,
    background: np.ndarray,
    gradient: np.ndarray,
) -> Arrays:
    """Colour (R, 3), opacity and depth (R,), and the gradients of sum(colour * gradient) in density and rgb."""
    density, rgb, t, dt, background = (a.astype(np.float64) for a in (density, rgb, t, dt, background))
    num_rays = len(background)
    thickness = density * dt
    transmittance = np.exp(-_sum_before(thickness, ray))
    behind = transmittance * np.exp(-thickness)
    weight = transmittance - behind
    opacity = np.bincount(ray, weight, num_rays)
    colour = np.stack([np.bincount(ray, weight * channel, num_rays) for channel in rgb.T], axis=1)
    depth = np.bincount(ray, weight * t, num_rays) / np.where(opacity > 0, opacity, 1)
    # Opaque matter at a sample shows its colour in place of the background, and hides all that lies behind it.
    gain = ((rgb - background[ray]) * gradient[ray]).sum(axis=1)
    after = np.bincount(ray, weight * gain, num_rays)[ray] - _sum_before(weight * gain, ray) - weight * gain
    return {
        "colour": colour + (1 - opacity)[:, None] * background,
        "opacity": opacity,
        "depth": depth,
        "gradient of the density": dt * (behind * gain - after),
        "gradient of the colour": weight[:, None] * gradient[ray],
    }


def _sum_before(value: np.ndarray, ray: np.ndarray) -> np.ndarray:
    """The sum over the samples before each one on its ray. value (N,), ray (N,) sorted."""
    before = np.cumsum(value) - value
    return before - before[np.searchsorted(ray, ray)]


def light_before(density: np.ndarray, dt: np.ndarray, ray: np.ndarray) -> np.ndarray:
    """How much of the light from behind each sample's front reaches the ray's origin: (N,). ray (N,) sorted."""
    return np.exp(-_sum_before(density.astype(np.float64) * dt, ray))


def networks(
    params: Mapping[str, Any],
    features: np.ndarray,
    direction: np.ndarray,
    density_gradient: np.ndarray,
    rgb_gradient: np.ndarray,
) -> Arrays:
    """Density (N,) and rgb (N, 3) of features (N, L * F) and encoded directions (N, E), and gradients.

    The gradients are those of sum(density * density_gradient) + sum(rgb * rgb_gradient), in the features and in all
    weights, which come as one flat array in the order of their layers.
    """
    geometry, density_inputs = _forward(params["density_mlp"], features.astype(np.float64))
    logits, colour_inputs = _forward(params["colour_mlp"], np.concatenate([geometry, direction], axis=1))
    rgb = 1 / (1 + np.exp(-logits))
    density = np.exp(np.minimum(geometry[:, 0], MAX_LOG_DENSITY))
    inner, colour_weights = _backward(params["colour_mlp"], colour_inputs, rgb_gradient * rgb * (1 - rgb))
    inner = inner[:, : geometry.shape[1]]
    inner[:, 0] += density_gradient * np.exp(np.clip(geometry[:, 0], -MAX_LOG_DENSITY, MAX_LOG_DENSITY))
    outer, density_weights = _backward(params["density_mlp"], density_inputs, inner)
    return {
        "density": density,
        "colour": rgb,
        "gradient of the features": outer,
        "gradient of the weights": np.concatenate([w.ravel() for w in (*density_weights, *colour_weights)]),
    }


def layers(mlp: Mapping[str, Any]) -> list[Mapping[str, np.ndarray]]:
    """The layers of a flax MLP, first to last."""
    return [mlp[f"Dense_{i}"] for i in range(len(mlp))]


def _forward(mlp: Mapping[str, Any], x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The outputs, and the inputs of each layer."""
    inputs = []
    for i, layer in enumerate(layers(mlp)):
        x = np.maximum(x, 0) if i else x
        inputs.append(x)
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer.get("bias", 0), np.float64)
    return x, inputs


def _backward(
    mlp: Mapping[str, Any], inputs: list[np.ndarray], gradient: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The gradients in the first layer's input, and in the kernels, first to last."""
    kernels = []
    for i, layer in reversed(list(enumerate(layers(mlp)))):
        kernels.append(inputs[i].T @ gradient)
        gradient = gradient @ np.asarray(layer["kernel"], np.float64).T
        gradient = gradient * (inputs[i] > 0) if i else gradient
    return gradient, kernels[::-1]
