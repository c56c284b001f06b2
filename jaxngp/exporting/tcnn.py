"""The parameters in the layout of tiny-cuda-nn: one flat array, and the configs of the networks that it belongs to.

params is what tiny-cuda-nn's trainer, or instant-ngp's NerfNetwork, holds: the weights of the density network, those of
the colour network, then the hash grid. A layer's weights are (outputs, inputs), row by row; the last one's outputs are
padded with rows of 0 to a multiple of 16. Each level of the grid is padded to a multiple of 8 rows.

Level l of tiny-cuda-nn's grid has b^l base - 1 cells along an axis, seldom a whole number as here. So every level
becomes a grid of its own in a Composite encoding, with base_resolution = N_l + 1: there it reads x N_l + 0.5, as with
`half_voxel_offset`. Dense levels have N_l + 1 entries along an axis there and N_l + 2 here: the last, which only points
within half a cell of the far faces read, does not exist there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxngp.config import Config, FieldConfig, HashGridConfig, InputError
from jaxngp.fields import Params
from jaxngp.hashing import is_dense, level_offsets, level_resolutions, num_vertices
from jaxngp.records import replacing
from jaxngp.runs import Run

ALIGNMENT = 16  # of the inputs and outputs of a network
WIDTHS = (16, 32, 64, 128)  # of tiny-cuda-nn's FullyFusedMLP


@dataclass(frozen=True)
class TcnnOptions(Config):
    """Nothing to choose."""


def write(run: Run, path: Path, options: TcnnOptions) -> str:  # noqa: ARG001
    """Write params f32, the entries of dense levels that tiny-cuda-nn has not, and a JSON of the configs."""
    config: FieldConfig = run.config.field
    params, beyond = to_flat(run.field.params, config)
    described = {**network_config(config), "world": run.transform.to_plain()}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, params=params, beyond=beyond, config=np.array(json.dumps(described)))
    return f"{len(params):,} parameters"


def read(path: Path, config: FieldConfig) -> Params:
    """The parameters that `write` has written, bit for bit."""
    with np.load(path) as file:
        return from_flat(file["params"], file["beyond"], config)


def check(config: FieldConfig) -> None:
    """Raises InputError for a field that tiny-cuda-nn cannot represent, which names the first reason."""
    grid = config.encoding
    inputs = {
        "encoding.num_levels * num_features": grid.num_outputs,
        "direction_degree^2": config.direction_degree**2,
        "num_geometry_features": config.num_geometry_features,
    }
    reasons = [
        ("use_bias = true", config.use_bias, "its networks have no biases"),
        ("encoding.half_voxel_offset = false", not grid.half_voxel_offset, "it shifts every level by half a cell"),
        ("encoding.dense_levels = false", not grid.dense_levels, "it stores levels that fit the table 1:1"),
        (
            f"direction_encoding = {config.direction_encoding}",
            config.direction_encoding != "spherical_harmonics" or config.direction_degree > 8,
            "instant-ngp encodes directions by spherical harmonics of degree 8 at most",
        ),
        ("mask_outside_box = true", config.mask_outside_box, "its density does not end at the box"),
        (f"hidden_width = {config.hidden_width}", config.hidden_width not in WIDTHS, f"it has {WIDTHS}"),
        ("colour_layers = 0", config.colour_layers == 0, "its networks have a hidden layer"),
        *((f"{name} = {n}", n % ALIGNMENT > 0, f"it pads to multiples of {ALIGNMENT}") for name, n in inputs.items()),
    ]
    for resolution in level_resolutions(grid):
        differs = is_dense(grid, resolution) != ((resolution + 1) ** grid.num_dims <= grid.table_size)
        reasons.append((f"a level of {resolution} cells", differs, "is hashed here and fits its table there"))
    for name, applies, why in reasons:
        if applies:
            raise InputError(f"field.{name}: cannot be written for tiny-cuda-nn ({why}); train with another --override")


def network_config(config: FieldConfig) -> dict[str, Any]:
    """What instant-ngp's network configs say: encoding, dir_encoding, network and rgb_network."""
    grid = config.encoding
    level = {
        "otype": "HashGrid",
        "n_dims_to_encode": grid.num_dims,
        "dims_to_encode_begin": 0,
        "n_levels": 1,
        "n_features_per_level": grid.num_features,
        "log2_hashmap_size": grid.table_size.bit_length() - 1,
        "per_level_scale": 1.0,
        "interpolation": "Smoothstep" if grid.smoothstep else "Linear",
    }
    nested = [{**level, "base_resolution": resolution + 1} for resolution in level_resolutions(grid)]
    network = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None"}
    network["n_neurons"] = config.hidden_width  # type: ignore[assignment]
    return {
        "encoding": {"otype": "Composite", "nested": nested},
        "dir_encoding": {"otype": "SphericalHarmonics", "degree": config.direction_degree},
        "network": {**network, "n_hidden_layers": config.density_layers, "n_output_dims": config.num_geometry_features},
        "rgb_network": {**network, "n_hidden_layers": config.colour_layers, "n_output_dims": 3},
        "density_activation": "Exponential",
        "rgb_activation": "Logistic",
    }


# The layout. `_layers` and `_rows` say where everything is; `to_flat` and `from_flat` copy one way and the other.


def to_flat(params: Params, config: FieldConfig) -> tuple[np.ndarray, np.ndarray]:
    """params (P,) f32 in tiny-cuda-nn's order, and the rows (B, F) of dense levels that it does not have."""
    check(config)
    parts = []
    for network, layer in _layers(config):
        kernel = np.asarray(params[network][layer]["kernel"], np.float32).T
        parts.append(np.pad(kernel, ((0, -len(kernel) % ALIGNMENT), (0, 0))).ravel())
    table = np.asarray(params["encoding"]["table"], np.float32)
    own, theirs, count = _rows(config.encoding)
    grid = np.zeros((count, table.shape[1]), np.float32)
    grid[theirs[theirs >= 0]] = table[own[theirs >= 0]]
    return np.concatenate([*parts, grid.ravel()]), table[own[theirs < 0]]


def from_flat(flat: np.ndarray, beyond: np.ndarray, config: FieldConfig) -> Params:
    """The inverse of `to_flat`."""
    check(config)
    grid = config.encoding
    sizes = {
        "density_mlp": [grid.num_outputs, *[config.hidden_width] * config.density_layers, config.num_geometry_features],
        "colour_mlp": [
            config.num_geometry_features + config.direction_degree**2,
            *[config.hidden_width] * config.colour_layers,
            3,
        ],
    }
    params: Params = {network: {} for network in sizes}
    start = 0
    for network, layer in _layers(config):
        index = int(layer.split("_")[1])
        inputs, outputs = sizes[network][index : index + 2]
        padded = outputs + -outputs % ALIGNMENT
        kernel = flat[start : start + padded * inputs].reshape(padded, inputs)[:outputs]
        params[network][layer] = {"kernel": np.ascontiguousarray(kernel.T)}
        start += padded * inputs
    own, theirs, _ = _rows(grid)
    rows = flat[start:].reshape(-1, grid.num_features)
    table = np.empty((level_offsets(grid)[-1], grid.num_features), np.float32)
    table[own[theirs >= 0]], table[own[theirs < 0]] = rows[theirs[theirs >= 0]], beyond
    return {"encoding": {"table": table}, **params}


def _layers(config: FieldConfig) -> list[tuple[str, str]]:
    counts = {"density_mlp": config.density_layers + 1, "colour_mlp": config.colour_layers + 1}
    return [(network, f"Dense_{layer}") for network, count in counts.items() for layer in range(count)]


def _rows(grid: HashGridConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """Every row of our table (R,), the row of theirs that it is (R,) or -1 for none, and how many theirs has."""
    theirs, start = [], 0
    for resolution in level_resolutions(grid):
        if is_dense(grid, resolution):
            shape = (num_vertices(grid, resolution),) * grid.num_dims
            place = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape, order="F"))
            side = resolution + 1
            row = np.ravel_multi_index(list(np.minimum(place, side - 1)), (side,) * grid.num_dims, order="F")
            theirs.append(np.where((place < side).all(axis=0), start + row, -1))
            count = side**grid.num_dims
        else:
            theirs.append(start + np.arange(grid.table_size))
            count = grid.table_size
        start += min(count + -count % 8, grid.table_size)
    return np.arange(level_offsets(grid)[-1]), np.concatenate(theirs), start
