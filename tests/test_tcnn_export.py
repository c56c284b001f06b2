"""The layout of tiny-cuda-nn: the way back bit for bit, and a reading of the flat array that knows nothing of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxngp.config import FieldConfig, HashGridConfig, InputError
from jaxngp.data import SceneTransform
from jaxngp.exporting import tcnn
from jaxngp.fields import RadianceField, init_params

GRID = HashGridConfig(
    num_levels=4, num_features=4, table_size=2**12, min_resolution=6, max_resolution=40, half_voxel_offset=True,
    init_scale=1.0,
)  # fmt: skip
CONFIG = FieldConfig(encoding=GRID, hidden_width=16, num_geometry_features=16)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    field = RadianceField.of(init_params(jax.random.key(3), config=CONFIG), config=CONFIG)
    run = SimpleNamespace(field=field, config=SimpleNamespace(field=CONFIG), transform=SceneTransform())
    path = tmp_path_factory.mktemp("tcnn") / "field.npz"
    tcnn.write(run, path, tcnn.TcnnOptions())
    return field, path


def test_the_way_back_is_exact(written):
    field, path = written
    found = tcnn.read(path, CONFIG)
    assert jax.tree.structure(found) == jax.tree.structure(field.params)
    jax.tree.map(np.testing.assert_array_equal, found, field.params)


def harmonics(x, y, z):
    """Bands 0 to 3, as tiny-cuda-nn has them."""
    return np.stack([
        0.28209479 * np.ones_like(x), -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
        1.09254843 * x * y, -1.09254843 * y * z, 0.94617470 * z * z - 0.31539157, -1.09254843 * x * z,
        0.54627421 * (x * x - y * y), 0.59004359 * y * (-3 * x * x + y * y), 2.89061144 * x * y * z,
        0.45704579 * y * (1 - 5 * z * z), 0.37317633 * z * (5 * z * z - 3), 0.45704579 * x * (1 - 5 * z * z),
        1.44530572 * z * (x * x - y * y), 0.59004359 * x * (-x * x + 3 * y * y),
    ], axis=-1)  # fmt: skip


def evaluate(path, position, direction):
    """Density and colour by the rules of tiny-cuda-nn and its config alone."""
    with np.load(path) as file:
        flat, config = file["params"].astype(np.float64), json.loads(str(file["config"]))
    start = 0

    def network(inputs, about):
        nonlocal start
        widths = [inputs, *[about["n_neurons"]] * about["n_hidden_layers"], -(-about["n_output_dims"] // 16) * 16]
        layers = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers.append(flat[start : start + a * b].reshape(b, a))
            start += a * b
        return layers

    def forward(layers, x):
        for layer in layers[:-1]:
            x = np.maximum(x @ layer.T, 0)
        return x @ layers[-1].T

    nested = config["encoding"]["nested"]
    width = sum(level["n_levels"] * level["n_features_per_level"] for level in nested)
    density = network(width, config["network"])
    colour = network(config["network"]["n_output_dims"] + config["dir_encoding"]["degree"] ** 2, config["rgb_network"])
    features = []
    for level in nested:
        scale, side, size = level["base_resolution"] - 1.0, level["base_resolution"], 2 ** level["log2_hashmap_size"]
        rows = min(-(-(side**3) // 8) * 8, size)
        table = flat[start : start + rows * level["n_features_per_level"]].reshape(rows, -1)
        start += table.size
        place = position * scale + 0.5
        cell = np.floor(place).astype(np.int64)
        total = 0.0
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, place - cell, 1 - place + cell), axis=1)
            x, y, z = (cell + corner).T
            hashed = (x ^ (y * 2654435761 & 0xFFFFFFFF) ^ (z * 805459861 & 0xFFFFFFFF)) % size
            row = hashed if rows < side**3 else (x + side * (y + side * z)) % rows
            total = total + weight[:, None] * table[row]
        features.append(total)
    assert start == len(flat)
    geometry = forward(density, np.concatenate(features, axis=1))
    rgb = forward(colour, np.concatenate([geometry, harmonics(*direction.T)], axis=1))[:, :3]
    return np.exp(geometry[:, 0]), 1 / (1 + np.exp(-rgb))


def test_another_reader_finds_the_same_field(written):
    """Where no dense level's last half cell is touched; both kinds of levels are there."""
    field, path = written
    with np.load(path) as file:
        bases = [level["base_resolution"] for level in json.loads(str(file["config"]))["encoding"]["nested"]]
    assert min(bases) ** 3 < GRID.table_size < max(bases) ** 3
    rng = np.random.default_rng(0)
    position = rng.uniform(0, 1 - 0.5 / GRID.min_resolution, (500, 3))
    direction = rng.normal(size=(500, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    density, rgb = jax.jit(lambda f, p, d: f(p, d))(field, position.astype(np.float32), direction.astype(np.float32))
    expected, colours = evaluate(path, position, direction)
    assert np.std(np.log(expected)) > 0.1
    np.testing.assert_allclose(density, expected, rtol=2e-3)
    np.testing.assert_allclose(rgb, colours, atol=2e-3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(CONFIG, use_bias=True), "use_bias = true"),
        (replace(CONFIG, encoding=replace(GRID, half_voxel_offset=False)), "half_voxel_offset = false"),
        (replace(CONFIG, encoding=replace(GRID, dense_levels=False)), "dense_levels = false"),
        (replace(CONFIG, direction_encoding="frequency"), "direction_encoding = frequency"),
        (replace(CONFIG, direction_degree=3), r"direction_degree\^2 = 9"),
        (replace(CONFIG, hidden_width=24), "hidden_width = 24"),
        (replace(CONFIG, colour_layers=0), "colour_layers = 0"),
        (replace(CONFIG, mask_outside_box=True), "mask_outside_box = true"),
        (replace(CONFIG, encoding=replace(GRID, num_levels=3)), "num_features = 12"),
        (replace(CONFIG, encoding=replace(GRID, min_resolution=15)), "a level of 15 cells"),
    ],
)
def test_what_does_not_fit_is_refused(config, reason):
    with pytest.raises(InputError, match=reason):
        tcnn.check(config)
