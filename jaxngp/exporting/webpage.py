"""The scene as one HTML file: a browser's shader reads the hash table and runs the networks.

The file holds the table in 8 bits, the networks in float32 and how far to the next occupied cell, compressed and in
base64, and two programs: that of the field, in GLSL, which is written here for its config, and `webpage.html`, which is
the same for all: marching, camera, tiles and controls.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxngp.cameras import focus, look_at
from jaxngp.config import Bounds, Config, FieldConfig, HashGridConfig, InputError, MarchConfig, NerfConfig
from jaxngp.console import warn
from jaxngp.evaluation import EvalBackground
from jaxngp.fields import Params
from jaxngp.hashing import is_dense, level_offsets, level_resolutions, num_vertices
from jaxngp.occupancy import OccupancyGrid
from jaxngp.pictures import DEPTH_COLOURS
from jaxngp.records import write_text
from jaxngp.runs import Run

TEMPLATE = Path(__file__).with_name("webpage.html")
LEVELS_IN_8_BITS = 127
MAX_TEXELS = 2**24  # of a level: 4096 by 4096, which nearly all devices have
MAX_TABLE_BYTES = 2**27
MAX_MATRICES = 256  # in a uniform block: 16 KiB, as much as WebGL 2 promises
MAX_BLOCKS = 12  # of a fragment shader, likewise
MAX_LAYERS = 2048  # of a 3D texture, on nearly all devices
MAX_SKIP = 15  # cells


@dataclass(frozen=True)
class WebpageOptions(Config):
    """What the page shows first."""

    view: Annotated[int, Bounds(0), "number of the training camera whose view the page opens with"] = 0
    background: Annotated[EvalBackground, "colour behind the scene when the page opens"] = "white"


def write(run: Run, path: Path, options: WebpageOptions) -> str:
    """Write the page. Raises InputError where it cannot show what the run's config asks for."""
    check_supported(run.config)
    grid: HashGridConfig = run.config.field.encoding
    table = np.asarray(run.field.params["encoding"]["table"])
    codes, scale = quantise_table(table, grid)
    noise = rounding_noise(table, codes, scale, grid)
    if noise > -20:
        warn(f"the hash table has outliers, so that 8 bits round it to {noise:.0f} dB: the page will look coarse")
    field = write_field(run.field.params, scale, run.config.field)
    arrays = field.weights, pack_table(codes, grid), skip_distances(run.occupancy)
    packed = zlib.compress(b"".join(array.tobytes() for array in arrays), 9)
    title = Path(run.config.scene.name).stem
    parts = {
        "title": html.escape(title),
        "scene": json.dumps(_describe(run, options, arrays) | {"title": title}).replace("<", "\\u003c"),
        "field": _march_constants(run.config.sampler, run.occupancy) + field.source,
        "data": base64.b64encode(packed).decode(),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))
    return f"a page that any browser with WebGL 2 shows; table in 8 bits, rounded to {noise:.0f} dB"


def check_supported(config: NerfConfig) -> None:
    """Raises InputError, by the name of the field, for a config that the page's shader cannot do."""
    if not isinstance(config.sampler, MarchConfig):
        raise InputError(
            "sampler = StratifiedConfig: --format=html marches through an occupancy grid, and this run has none; "
            "train with another --preset"
        )
    grid, cells = config.field.encoding, config.sampler.occupancy
    texels = grid.table_size * max(1, grid.num_features // 4)
    if texels > MAX_TEXELS or grid.num_levels * grid.table_size * grid.num_features > MAX_TABLE_BYTES:
        raise InputError(
            f"field.encoding.table_size = {grid.table_size}: --format=html holds {MAX_TEXELS} texels of 4 features a "
            f"level and {MAX_TABLE_BYTES} features in all; train with a smaller table"
        )
    if cells.resolution * cells.num_cascades > MAX_LAYERS:
        raise InputError(
            f"sampler.occupancy: resolution x num_cascades = {cells.resolution * cells.num_cascades}: --format=html "
            f"holds at most {MAX_LAYERS} layers of cells; train with a coarser grid"
        )


# The hash table.


def quantise_table(table: np.ndarray, grid: HashGridConfig) -> tuple[np.ndarray, np.ndarray]:
    """A table (rows, F) in 8 bits: codes (rows, F) i8, and the scale (L, F) f32 of each feature of each level.

    table = codes / 127 * scale, to within scale / 254, half a step; the scale is the largest magnitude.
    """
    levels = np.split(table, level_offsets(grid)[1:-1])
    scale = np.stack([np.abs(level).max(axis=0) for level in levels])
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = [np.round(level / s * LEVELS_IN_8_BITS) for level, s in zip(levels, scale, strict=True)]
    return np.concatenate(codes).astype(np.int8), scale


def dequantise_table(codes: np.ndarray, scale: np.ndarray, grid: HashGridConfig) -> np.ndarray:
    """The table (rows, F) f32 that the page's shader sees."""
    levels = np.split(codes, level_offsets(grid)[1:-1])
    parts = [level / np.float32(LEVELS_IN_8_BITS) * s for level, s in zip(levels, scale, strict=True)]
    return np.concatenate(parts).astype(np.float32)


def rounding_noise(table: np.ndarray, codes: np.ndarray, scale: np.ndarray, grid: HashGridConfig) -> float:
    """The mean squared error of a table in 8 bits over its mean square, in dB."""
    error = np.mean((dequantise_table(codes, scale, grid) - table).astype(np.float64) ** 2)
    return float(10 * np.log10(max(error, 1e-30) / max(np.mean(table.astype(np.float64) ** 2), 1e-20)))


def pack_table(codes: np.ndarray, grid: HashGridConfig) -> np.ndarray:
    """Codes (rows, F) as a texture (L, height, width, channels) i8: a level a layer, its rows in order.

    A row is one texel of F channels, or two of four. What a level does not fill is 0.
    """
    offsets, channels = level_offsets(grid), min(grid.num_features, 4)
    width, height = _table_size(grid)
    texture = np.zeros((grid.num_levels, height * width * channels), np.int8)
    for layer, first, end in zip(texture, offsets[:-1], offsets[1:], strict=True):
        layer[: (end - first) * grid.num_features] = codes[first:end].reshape(-1)
    return texture.reshape(grid.num_levels, height, width, channels)


def _table_size(grid: HashGridConfig) -> tuple[int, int]:
    """Width, a power of two, and height of a layer of the table in texels."""
    texels = max(np.diff(level_offsets(grid)).tolist()) * max(1, grid.num_features // 4)
    width = 2 ** math.ceil(math.log2(texels) / 2)
    return width, -(-texels // width)


# The occupancy grid.


def skip_distances(grid: OccupancyGrid) -> np.ndarray:
    """(K, G, G, G) u8, z y x: 0 in an occupied cell, else d: all cells less than d away along every axis are empty.

    At most MAX_SKIP, and never beyond the cells that points of this cascade belong to: what lies in another cascade is
    to be looked up there.
    """
    size, num_cascades = grid.resolution, grid.cells.num_cascades
    bits = np.unpackbits(np.asarray(grid.occupied).astype("<u4").view(np.uint8), bitorder="little")
    occupied = bits.reshape(num_cascades, size, size, size) != 0
    found = np.zeros(occupied.shape, np.uint8)
    for k, cells in enumerate(occupied):
        near = np.pad(cells, 1, constant_values=k < num_cascades - 1)
        if k > 0:
            middle = slice(size // 4 + 1, 3 * size // 4 + 1)
            near[middle, middle, middle] = True
        for _ in range(MAX_SKIP):
            found[k] += ~near[1:-1, 1:-1, 1:-1]
            for axis in range(3):
                there = np.swapaxes(near, 0, axis)
                there[1:-1] = there[:-2] | there[1:-1] | there[2:]
    return np.where(occupied, 0, found)


def _march_constants(config: MarchConfig, grid: OccupancyGrid) -> str:
    low, high = np.asarray(grid.bounds).tolist()
    palette = ", ".join(_vector(colour / 255) for colour in DEPTH_COLOURS)
    return "\n".join(
        [
            f"const float STEP = {_number(config.step_size)}, GROWTH = {_number(config.growth)};",
            f"const float NEAR = {_number(config.near)}, MIN_TRANSMITTANCE = {_number(config.min_transmittance)};",
            f"const int RESOLUTION = {grid.resolution}, CASCADES = {grid.cells.num_cascades};",
            f"const vec3 LOW = {_vector(low)}, HIGH = {_vector(high)};",
            f"const vec3 PALETTE[{len(DEPTH_COLOURS)}] = vec3[]({palette});",
            "",
        ]
    )


# The field, as a program in GLSL.


@dataclass(frozen=True)
class FieldProgram:
    """The field in GLSL: `log_density(position)`, which sets what `colour()` reads, and `aim(direction)` before both.

    weights (matrices, 4, 4) f32 are what its uniform blocks hold.
    """

    source: str
    weights: np.ndarray


class _Weights:
    """The 4 x 4 matrices that a program reads."""

    def __init__(self) -> None:
        self.matrices: list[np.ndarray] = []

    def hold(self, matrix: np.ndarray) -> str:
        """How the program calls a matrix whose columns are the rows of this one."""
        self.matrices.append(matrix)
        block, place = divmod(len(self.matrices) - 1, MAX_MATRICES)
        return f"w{block}[{place}]"

    def linear(self, inputs: list[str], kernel: np.ndarray, start: list[str]) -> list[str]:
        """The outputs of a linear layer as expressions, four to each; inputs likewise. start: what they start from."""
        kernel = np.pad(kernel, [(0, -size % 4) for size in kernel.shape])
        blocks = kernel.reshape(len(inputs), 4, -1, 4).transpose(2, 0, 1, 3)
        return [
            " + ".join([*start[o : o + 1], *(f"{self.hold(m)} * {x}" for m, x in zip(row, inputs, strict=True))])
            for o, row in enumerate(blocks)
        ]

    def bias(self, layer: Params) -> list[str]:
        """The biases of a layer as expressions, four to each; none where it has none."""
        if "bias" not in layer:
            return []
        bias = np.asarray(layer["bias"])
        matrices = np.pad(bias, (0, -len(bias) % 16)).reshape(-1, 4, 4)
        return [f"{name}[{i}]" for name in map(self.hold, matrices) for i in range(4)][: -(-len(bias) // 4)]

    def declarations(self) -> list[str]:
        """The uniform blocks."""
        sizes = [min(MAX_MATRICES, len(self.matrices) - i) for i in range(0, len(self.matrices), MAX_MATRICES)]
        if len(sizes) > MAX_BLOCKS:
            raise InputError(
                f"field: its networks have {16 * len(self.matrices)} weights: --format=html holds "
                f"{16 * MAX_MATRICES * MAX_BLOCKS}; train with a smaller field.hidden_width"
            )
        return [f"layout(std140) uniform Weights{i} {{ mat4 w{i}[{size}]; }};" for i, size in enumerate(sizes)]


def write_field(params: Params, scale: np.ndarray, config: FieldConfig) -> FieldProgram:
    """The program of a field whose table is in 8 bits; its scale (L, F) goes into the first kernel."""
    weights, (density, colour) = _Weights(), (_layers(params[name]) for name in ("density_mlp", "colour_mlp"))
    kernels = [np.asarray(layer["kernel"]) for layer in density]
    kernels[0] = kernels[0] * scale.reshape(-1, 1)
    features = _features(config.encoding)
    body = [f"vec4 f{i} = {feature};" for i, feature in enumerate(features)]
    inputs = [f"f{i}" for i in range(len(features))]
    for number, (layer, kernel) in enumerate(zip(density, kernels, strict=True)):
        outputs = weights.linear(inputs, kernel, weights.bias(layer))
        inputs = _assign(body, f"d{number}_", outputs) if number < len(density) - 1 else []
    geometry = [f"geometry{i}" for i in range(len(outputs))]
    body += [f"{name} = {value};" for name, value in zip(geometry, outputs, strict=True)]

    # The first layer of the colours is a sum of two products, and that with the direction is one for the whole ray.
    first, num_geometry = np.asarray(colour[0]["kernel"]), config.num_geometry_features
    aim, encoded = _encode_direction(config)
    toward = weights.linear(encoded, first[num_geometry:], weights.bias(colour[0]))
    rays = [f"toward{i}" for i in range(len(toward))]
    aim += [f"{name} = {value};" for name, value in zip(rays, toward, strict=True)]
    paint: list[str] = []
    outputs = weights.linear(geometry, first[:num_geometry], rays)
    for number, layer in enumerate(colour[1:]):
        inputs = _assign(paint, f"c{number}_", outputs)
        outputs = weights.linear(inputs, np.asarray(layer["kernel"]), weights.bias(layer))
    paint.append(f"return 1.0 / (1.0 + exp(-({outputs[0]}).xyz));")

    source = [
        *weights.declarations(),
        _ENCODING.format(**_encoding_constants(config)),
        f"vec4 {', '.join(geometry + rays)};",
        *("float log_density(vec3 x) {", "  x = clamp(x, 0.0, 1.0);", *_indented(body), "  return geometry0.x;", "}"),
        *("void aim(vec3 d) {", *_indented(aim), "}"),
        *("vec3 colour() {", *_indented(paint), "}"),
    ]
    return FieldProgram("\n".join(source), np.stack(weights.matrices).astype(np.float32))


def _layers(mlp: Params) -> list[Params]:
    return [mlp[f"Dense_{i}"] for i in range(len(mlp))]


def _assign(body: list[str], name: str, values: list[str]) -> list[str]:
    """Add the ReLU of values to a function's body; the names that hold them."""
    names = [f"{name}{i}" for i in range(len(values))]
    body += [f"vec4 {n} = max({value}, 0.0);" for n, value in zip(names, values, strict=True)]
    return names


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _number(value: float) -> str:
    """A GLSL literal that is the float32 next to a value."""
    text = np.format_float_scientific(np.float32(value), trim="0")
    return text


def _vector(values: Any) -> str:
    return f"vec3({', '.join(map(_number, values))})"


# `corner` is the row of a vertex, given what each of its coordinates contributes: a product with a prime to a XOR, or
# with a stride to a sum.
_ENCODING = """\
const uint PARTS = {parts}u, WIDTH = {width}u, TABLE_MASK = {mask}u;
const uvec3 PRIMES = uvec3(1u, 2654435761u, 805459861u);
const bool MASK_OUTSIDE_BOX = {masked};
vec4 table_row(uint row, int level, uint part) {{
  uint texel = row * PARTS + part;
  return texelFetch(table, ivec3(texel % WIDTH, texel / WIDTH, level), 0);
}}
vec4 corner(bool dense, uint x, uint y, uint z, int level, uint part) {{
  return table_row(dense ? x + y + z : (x ^ y ^ z) & TABLE_MASK, level, part);
}}
vec4 encode(vec3 x, float resolution, uint vertices, bool dense, int level, uint part) {{
  vec3 scaled = x * resolution + {offset};
  vec3 cell = clamp(floor(scaled), 0.0, float(vertices) - 2.0), f = scaled - cell;
  {smooth}
  uvec3 factor = dense ? uvec3(1u, vertices, vertices * vertices) : PRIMES;
  uvec3 a = uvec3(cell) * factor, b = a + factor;
  return mix(
    mix(mix(corner(dense, a.x, a.y, a.z, level, part), corner(dense, b.x, a.y, a.z, level, part), f.x),
        mix(corner(dense, a.x, b.y, a.z, level, part), corner(dense, b.x, b.y, a.z, level, part), f.x), f.y),
    mix(mix(corner(dense, a.x, a.y, b.z, level, part), corner(dense, b.x, a.y, b.z, level, part), f.x),
        mix(corner(dense, a.x, b.y, b.z, level, part), corner(dense, b.x, b.y, b.z, level, part), f.x), f.y), f.z);
}}"""


def _encoding_constants(config: FieldConfig) -> dict[str, Any]:
    grid = config.encoding
    return {
        "parts": max(1, grid.num_features // 4),
        "width": _table_size(grid)[0],
        "mask": grid.table_size - 1,
        "masked": str(config.mask_outside_box).lower(),
        "offset": 0.5 if grid.half_voxel_offset else 0.0,
        "smooth": "f = f * f * (3.0 - 2.0 * f);" if grid.smoothstep else "",
    }


def _features(grid: HashGridConfig) -> list[str]:
    """The features of all levels as expressions, four to each."""
    per_level, parts = min(grid.num_features, 4), max(1, grid.num_features // 4)
    calls = [
        f"encode(x, {_number(n)}, {num_vertices(grid, n)}u, {str(is_dense(grid, n)).lower()}, {level}, {part}u)"
        for level, n in enumerate(level_resolutions(grid))
        for part in range(parts)
    ]
    if per_level == 4:
        return calls
    values = [f"{call}.{'xy'[:per_level]}" for call in calls]
    return _in_fours(values, 4 // per_level, "0.0" if per_level == 1 else "vec2(0.0)")


def _in_fours(values: list[str], count: int, filling: str) -> list[str]:
    """Vectors of `count` values each."""
    values = values + [filling] * (-len(values) % count)
    return [f"vec4({', '.join(values[i : i + count])})" for i in range(0, len(values), count)]


def _encode_direction(config: FieldConfig) -> tuple[list[str], list[str]]:
    """Lines, and the encoded direction as expressions, four to each, of a vec3 d."""
    degree = config.direction_degree
    if config.direction_encoding == "spherical_harmonics":
        lines, values = _spherical_harmonics(degree)
    else:
        waves = [f"{wave}({2**j}.0 * d.{axis})" for j in range(degree) for wave in ("sin", "cos") for axis in "xyz"]
        lines, values = [], ["d.x", "d.y", "d.z", *waves]
    return lines, _in_fours(values, 4, "0.0")


def _spherical_harmonics(degree: int) -> tuple[list[str], list[str]]:
    """`encodings.sh_encode` in GLSL, by the same recurrence."""
    lines, values = ["float c0 = 1.0, s0 = 0.0;"], [""] * degree**2
    for m in range(degree):
        lines.append(f"float p{m}_{m} = {_number(math.prod(range(1, 2 * m, 2)))};")
        for band in range(m, degree):
            ratio = math.factorial(band - m) / math.factorial(band + m)
            scale = (-1) ** m * math.sqrt((2 * band + 1) / (4 * math.pi) * ratio * (2 if m else 1))
            values[band * (band + 1) + m] = f"{_number(scale)} * p{m}_{band} * c{m}"
            if m:
                values[band * (band + 1) - m] = f"{_number(scale)} * p{m}_{band} * s{m}"
            before = f" - {band + m}.0 * p{m}_{band - 1}" if band > m else ""
            lines.append(f"float p{m}_{band + 1} = ({2 * band + 1}.0 * d.z * p{m}_{band}{before}) / {band + 1 - m}.0;")
        lines.append(f"float c{m + 1} = d.x * c{m} - d.y * s{m}, s{m + 1} = d.x * s{m} + d.y * c{m};")
    return lines, values


# What the page knows.


def _describe(run: Run, options: WebpageOptions, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Any]:
    """What `webpage.html` reads: the shapes of the arrays in the order of the data, and the camera."""
    weights, table, cells = arrays
    low, high = np.asarray(run.occupancy.bounds, np.float64)
    return {
        "matrices": len(weights),
        "block": MAX_MATRICES,
        "table": table.shape,
        "cells": cells.shape,
        "sphere": [*_rounded((low + high) / 2), *_rounded([np.linalg.norm(high - low) / 2])],
        "background": options.background,
        **_opening_view(run, options.view),
    }


def _opening_view(run: Run, view: int) -> dict[str, Any]:
    """The pose of a training camera, its focal lengths over the size of its image, and the point to turn about."""
    if run.cameras is None:
        if view:
            raise InputError(f"--view={view}: this run was trained on rays and has no cameras; leave it out")
        pose = look_at((1.9, -0.4, 1.2), target=(0.5, 0.5, 0.5), up=(0.0, 0.0, 1.0))
        return {"c2w": _rounded(pose), "focal": [1.2, 1.2], "pivot": [0.5, 0.5, 0.5]}
    if view >= len(run.cameras):
        raise InputError(f"--view={view}: this run has {len(run.cameras)} training cameras, numbered from 0")
    camera = run.cameras[view]
    pose = np.asarray(camera.c2w, np.float64)
    depth = -(focus(np.asarray(run.cameras.c2w)) - pose[:, 3]) @ pose[:, 2]
    pivot = pose[:, 3] - max(depth, 0.05) * pose[:, 2]
    focal = np.asarray(camera.focal_xy, np.float64) / np.asarray(camera.size)
    return {"c2w": _rounded(pose), "focal": _rounded(focal), "pivot": _rounded(pivot)}


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.9g}") for value in np.asarray(values, np.float64).reshape(-1)]
