"""The 100-line PyTorch reference, executed from the file that holds it, and its recipe.

None of its code is part of this project: it is given as a path, to its source or to the text of the web page that
shows it. PyTorch is imported where it is used, and comes with `pip install .[bench]`.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import view_rays
from jaxngp.config import FieldConfig, InputError, SceneConfig
from jaxngp.data import Split
from jaxngp.data.rays import RayTable
from jaxngp.fields import Params
from jaxngp.hashing import level_sizes
from jaxngp.presets import PRESETS

NAMES = ("NGP", "train", "render_rays")  # what the source must define
NUM_LEVELS, NUM_FEATURES, TABLE_SIZE = 16, 2, 2**19
MIN_RESOLUTION, MAX_RESOLUTION = 16, 2048
NUM_FREQUENCIES = 4  # of the direction
NEAR, FAR, NUM_BINS = 2, 6, 192  # world units
BATCH_SIZE = 2**14  # rays


# The program.


def bench_module(name: str) -> ModuleType:
    """A module of the extra `bench`. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install .[bench]") from None


def python_part(text: str) -> str:
    """The program in a text: all of it, or else its longest run of lines that is Python and begins with an import.

    What comes before is blank lines, so that line numbers are those of the text.
    """
    if _is_python(text):
        return text
    lines = text.splitlines()
    longest: list[str] = []
    first = 0
    for start, line in enumerate(lines):
        if re.match(r"(import|from)\s", line):
            for end in range(len(lines), start + len(longest), -1):
                if _is_python("\n".join(lines[start:end])):
                    first, longest = start, lines[start:end]
                    break
    return "\n".join([*[""] * first, *longest, ""])


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):  # the latter for a null byte
        return False
    return True


def load_reference(path: str | Path, names: Sequence[str] = NAMES) -> ModuleType:
    """Executes the program in a file as a module that is not the main one, and whose `device` is the CPU.

    Raises InputError where the file holds no program that defines `names`, or one that needs what is not installed.
    """
    path = Path(path).expanduser()
    try:
        source = python_part(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text; give the reference's source, or a page's text that holds it") from None
    defined = {getattr(node, "name", None) for node in ast.parse(source).body}  # by def or class
    if missing := [name for name in names if name not in defined]:  # known before any of it is executed
        raise InputError(f"{path}: holds no Python that defines {missing[0]}; expected {', '.join(names)}")
    module = ModuleType("reference")
    module.__dict__["device"] = "cpu"  # a global that its main block would set
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs {error.name}, which is not installed: pip install .[bench]") from None
    return module


# The recipe.


def level_resolutions() -> list[int]:
    """Its levels' N, by its own formula in floating point, which need not end at MAX_RESOLUTION exactly."""
    growth = np.exp((np.log(MAX_RESOLUTION) - np.log(MIN_RESOLUTION)) / (NUM_LEVELS - 1))
    return [int(MIN_RESOLUTION * growth**level) for level in range(NUM_LEVELS)]


def make_model(reference: ModuleType, box_side: float) -> Any:
    """Its network, for a box of the world about the origin. box_side is what it calls aabb_scale."""
    return reference.NGP(TABLE_SIZE, level_resolutions(), NUM_FREQUENCIES, "cpu", box_side)


def make_optimizer(torch: ModuleType, model: Any) -> Any:
    """Adam, with L2 on the networks and not on the tables."""
    parts = ((model.lookup_tables, 0.0), (model.density_MLP, 1e-6), (model.color_MLP, 1e-6))
    groups = [{"params": part.parameters(), "weight_decay": decay} for part, decay in parts]
    return torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-15)


# The data.


def ray_rows(split: Split, scene: SceneConfig) -> np.ndarray:
    """A split as the reference reads it: rows (V * H * W, 9) f32 of origin, unit direction, and rgb over white.

    Origins are in world units, counted from the middle of the scene's box, which its network has about the origin.
    """
    images = split.images
    if isinstance(images, RayTable):
        origin, direction, rgb = (np.asarray(a) for a in (images.rays.origin, images.rays.direction, images.rgb))
    else:
        views = [view_rays(images.cameras[view]) for view in range(len(images.cameras))]
        origin, direction = (
            np.concatenate([np.asarray(part).reshape(-1, 3) for part in parts])
            for parts in ([rays.origin for rays in views], [rays.direction for rays in views])
        )
        rgba = np.asarray(images.rgba).reshape(-1, 4).astype(np.float32) / 255
        rgb = rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])
    return np.concatenate([(origin - 0.5) * np.float32(scene.box_side), direction, rgb], axis=1, dtype=np.float32)


def environment() -> dict[str, Any]:
    """What its numbers come from, beside what `jaxngp.records.environment` says."""
    torch = bench_module("torch")
    return {"torch_version": torch.__version__, "torch_threads": torch.get_num_threads()}


# Its weights as ours.


def params_from_reference(
    state_dict: Mapping[str, np.ndarray], *, config: FieldConfig = PRESETS["hundred_lines"].field, box_side: float = 3.0
) -> Params:
    """Parameters with which the `hundred_lines` field computes what the 100-line PyTorch reference does.

    state_dict: the reference's, name -> array: lookup_tables.0 ... (T, F) each, density_MLP.{0,2} and
    color_MLP.{0,2,4} .weight (outputs, inputs) and .bias. The reference's density is per world unit; ours is per
    scene unit, box_side times that. The factor goes into the bias of the log density, and the colour MLP, which
    reads the log density too, gets a bias that takes it back. Raises InputError if a name is missing or misshapen.
    """
    sizes = level_sizes(config.encoding)
    tables = [
        _take(state_dict, f"lookup_tables.{level}", (rows, config.encoding.num_features))
        for level, rows in enumerate(sizes)
    ]
    width, geometry = config.hidden_width, config.num_geometry_features
    directions = 3 + 6 * config.direction_degree
    density = _reference_mlp(state_dict, "density_MLP", (config.encoding.num_outputs, width, geometry))
    colour = _reference_mlp(state_dict, "color_MLP", (geometry + directions, *[width] * config.colour_layers, 3))
    shift = math.log(box_side)
    density["Dense_1"]["bias"] = density["Dense_1"]["bias"] + np.eye(1, geometry, dtype=np.float32)[0] * shift
    colour["Dense_0"]["bias"] = colour["Dense_0"]["bias"] - colour["Dense_0"]["kernel"][0] * shift
    params = {"encoding": {"table": np.concatenate(tables)}, "density_mlp": density, "colour_mlp": colour}
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)


def _reference_mlp(state_dict: Mapping[str, np.ndarray], name: str, widths: tuple[int, ...]) -> Params:
    # In torch.nn.Sequential the linear layers stand at even places, the ReLUs between them.
    return {
        f"Dense_{i}": {
            "kernel": _take(state_dict, f"{name}.{2 * i}.weight", (outputs, inputs)).T,
            "bias": _take(state_dict, f"{name}.{2 * i}.bias", (outputs,)),
        }
        for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }


def _take(state_dict: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in state_dict:
        raise InputError(f"state_dict has no {name!r}: its names are {', '.join(sorted(state_dict))}")
    array = np.asarray(state_dict[name], np.float32)
    if array.shape != shape:
        raise InputError(f"state_dict[{name!r}] has shape {array.shape}: this config needs {shape}")
    return array
