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
    occupancy: Any = run.occupancy  # a run that marches has one
    table = np.asarray(run.field.params["encoding"]["table"])
    codes, scale = quantise_table(table, grid)
    noise = rounding_noise(table, codes, scale, grid)
    if noise > -20:
        warn(f"the hash table has outliers, so that 8 bits round it to {noise:.0f} dB: the page will look coarse")
    field = write_field(run.field.params, scale, run.config.field)
    texture, cells = pack_table(codes, grid), skip_distances(occupancy)
    packed = zlib.compress(b"".join(array.tobytes() for array in (*field.weights, texture, cells)), 9)
    title, (low, high) = Path(run.config.scene.name).stem, np.asarray(occupancy.bounds, np.float64)
    scene = {  # what the page reads: the shapes of the arrays, in the order of the data, and where to look from
        "blocks": [len(block) for block in field.weights],
        "table": texture.shape,
        "cells": cells.shape,
        "sphere": _rounded([*(low + high) / 2, np.linalg.norm(high - low) / 2]),
        "background": options.background,
        **_opening_view(run, options.view),
    }
    parts = {
        "title": html.escape(title),
        "scene": json.dumps(scene),
        "field": _march_constants(run.config.sampler, occupancy) + field.source,
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
    """The root mean square error of a table in 8 bits over its mean magnitude, in dB; a few outliers count little."""
    error = dequantise_table(codes, scale, grid).astype(np.float64) - table
    magnitude = np.mean(np.abs(table), dtype=np.float64)
    return float(20 * np.log10(max(np.sqrt(np.mean(error**2)), 1e-20) / max(magnitude, 1e-20)))


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

    weights: the matrices (count, 4, 4) f32 of each of its uniform blocks.
    """

    source: str
    weights: list[np.ndarray]


class _Layers:
    """Linear layers as loops over 4 x 4 matrices, in uniform blocks no larger than WebGL 2 promises."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def linear(self, x: str, y: str, layer: Params, *, start: str = "", relu: bool = False) -> list[str]:
        """Statements that make y[o] = start[o] + the sum over i of kernel x[i], in vectors of four, and its bias."""
        kernel = np.pad(np.asarray(layer["kernel"]), [(0, -size % 4) for size in layer["kernel"].shape])
        num_inputs, num_outputs = kernel.shape[0] // 4, kernel.shape[1] // 4
        lines = [f"vec4 {y}[{num_outputs}];"]
        if "bias" in layer:
            start = f"{y}_bias"
            values = _in_fours(list(map(_number, layer["bias"])))
            lines.append(f"const vec4 {start}[{num_outputs}] = vec4[]({', '.join(values)});")
        matrices = kernel.reshape(num_inputs, 4, num_outputs, 4).transpose(2, 0, 1, 3).astype(np.float32)
        share = max(1, MAX_MATRICES // num_inputs)
        for first in range(0, num_outputs, share):
            part = matrices[first : first + share]
            lines += [
                f"for (int o = 0; o < {len(part)}; ++o) {{",
                f"  vec4 sum = {f'{start}[{first} + o]' if start else 'vec4(0.0)'};",
                f"  for (int i = 0; i < {num_inputs}; ++i) sum += w{len(self.blocks)}[{num_inputs} * o + i] * {x}[i];",
                f"  {y}[{first} + o] = {'max(sum, 0.0)' if relu else 'sum'};",
                "}",
            ]
            self.blocks.append(part.reshape(-1, 4, 4))
        return lines

    def mlp(self, x: str, layers: list[Params]) -> list[str]:
        """Statements that put x0 through layers; the outputs are in x1, x2 and so on, without ReLU in the last."""
        last = len(layers) - 1
        return [
            line
            for i, layer in enumerate(layers)
            for line in self.linear(f"{x}{i}", f"{x}{i + 1}", layer, relu=i < last)
        ]

    def declarations(self) -> list[str]:
        """The uniform blocks. Raises InputError for more than WebGL 2 promises."""
        if len(self.blocks) > MAX_BLOCKS or max(map(len, self.blocks)) > MAX_MATRICES:
            raise InputError(
                f"field: its networks need {len(self.blocks)} blocks of up to {16 * MAX_MATRICES} weights: "
                f"--format=html holds {MAX_BLOCKS}; train with a smaller field.hidden_width or fewer layers"
            )
        return [f"layout(std140) uniform Weights{i} {{ mat4 w{i}[{len(m)}]; }};" for i, m in enumerate(self.blocks)]


def write_field(params: Params, scale: np.ndarray, config: FieldConfig) -> FieldProgram:
    """The program of a field whose table is in 8 bits; its scale (L, F) goes into the first kernel."""
    layers = _Layers()
    density, colour = (
        [params[mlp][f"Dense_{i}"] for i in range(len(params[mlp]))] for mlp in ("density_mlp", "colour_mlp")
    )
    density[0] = density[0] | {"kernel": np.asarray(density[0]["kernel"]) * scale.reshape(-1, 1)}
    num_features, last = -(-scale.size // 4), len(colour) - 1
    body = [
        f"vec4 x0[{num_features}];",
        f"for (int i = 0; i < {num_features}; ++i) x0[i] = vec4(0.0);",
        f"for (int i = 0; i < LEVELS * int(PARTS); ++i) {_FEATURES[scale.shape[1]]}",
        *layers.mlp("x", density),
        f"geometry = x{len(density)};",
        "return geometry[0].x;",
    ]
    # The first layer of the colours is a sum of two products, and that with the direction is one for the whole ray.
    kernel, num_geometry = np.asarray(colour[0]["kernel"]), config.num_geometry_features
    code, values = _encode_direction(config)
    encoded = _in_fours(values)
    aim = [
        *code,
        f"vec4 encoded[{len(encoded)}] = vec4[]({', '.join(encoded)});",
        *layers.linear("encoded", "y", colour[0] | {"kernel": kernel[num_geometry:]}),
        "toward = y;",
    ]
    paint = [
        *layers.linear("geometry", "y0", {"kernel": kernel[:num_geometry]}, start="toward", relu=last > 0),
        *layers.mlp("y", colour[1:]),
        f"return 1.0 / (1.0 + exp(-y{last}[0].xyz));",
    ]
    source = [
        *layers.declarations(),
        _encoding(config),
        f"vec4 geometry[{-(-num_geometry // 4)}], toward[{-(-kernel.shape[1] // 4)}];",
        *("float log_density(vec3 x) {", *_indented(body), "}"),
        *("void aim(vec3 d) {", *_indented(aim), "}"),
        *("vec3 colour() {", *_indented(paint), "}"),
    ]
    return FieldProgram("\n".join(source), layers.blocks)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _number(value: float) -> str:
    """The GLSL literal of the float32 nearest to a value."""
    return np.format_float_scientific(np.float32(value), trim="0")


def _vector(values: Any) -> str:
    return f"vec3({', '.join(map(_number, values))})"


def _in_fours(values: list[str]) -> list[str]:
    """Vectors of four values each; the last is filled up with 0."""
    values = values + ["0.0"] * (-len(values) % 4)
    return [f"vec4({', '.join(values[i : i + 4])})" for i in range(0, len(values), 4)]


_FEATURES = {
    1: "x0[i / 4] += encode(x, i, 0u).x * vec4(equal(ivec4(i % 4), ivec4(0, 1, 2, 3)));",
    2: "x0[i / 2] += encode(x, i, 0u).xyxy * vec4(equal(ivec4(i % 2), ivec4(0, 0, 1, 1)));",
    4: "x0[i] = encode(x, i, 0u);",
    8: "x0[i] = encode(x, i / 2, uint(i % 2));",
}
"""What is done with a level's features, by their number. One call: compilers that inline several take minutes."""

# A vertex has the row that is the XOR of three products with primes, or in a dense level the sum of three with strides.
_ENCODING = """\
const int LEVELS = {levels};
const float RESOLUTIONS[LEVELS] = float[]({resolutions});
const uint VERTICES[LEVELS] = uint[]({vertices});
const bool DENSE[LEVELS] = bool[]({dense});
const uint PARTS = {parts}u, WIDTH = {width}u, TABLE_MASK = {mask}u;
const bool MASK_OUTSIDE_BOX = {masked};
vec4 corner(uint x, uint y, uint z, int level, uint part) {{
  uint row = DENSE[level] ? x + y + z : (x ^ y ^ z) & TABLE_MASK, texel = row * PARTS + part;
  return texelFetch(table, ivec3(texel % WIDTH, texel / WIDTH, level), 0);
}}
vec4 encode(vec3 x, int level, uint part) {{
  vec3 scaled = clamp(x, 0.0, 1.0) * RESOLUTIONS[level] + {offset};
  vec3 cell = clamp(floor(scaled), 0.0, float(VERTICES[level]) - 2.0), f = scaled - cell;
  {smooth}
  uint n = VERTICES[level];
  uvec3 factor = DENSE[level] ? uvec3(1u, n, n * n) : uvec3(1u, 2654435761u, 805459861u);
  uvec3 a = uvec3(cell) * factor, b = a + factor;
  return mix(
    mix(mix(corner(a.x, a.y, a.z, level, part), corner(b.x, a.y, a.z, level, part), f.x),
        mix(corner(a.x, b.y, a.z, level, part), corner(b.x, b.y, a.z, level, part), f.x), f.y),
    mix(mix(corner(a.x, a.y, b.z, level, part), corner(b.x, a.y, b.z, level, part), f.x),
        mix(corner(a.x, b.y, b.z, level, part), corner(b.x, b.y, b.z, level, part), f.x), f.y), f.z);
}}"""


def _encoding(config: FieldConfig) -> str:
    """The hash encoding: `encode(x, level, part)` is up to four features of a level; part: the second four of eight."""
    grid = config.encoding
    resolutions = level_resolutions(grid)
    return _ENCODING.format(
        levels=grid.num_levels,
        resolutions=", ".join(map(_number, resolutions)),
        vertices=", ".join(f"{num_vertices(grid, n)}u" for n in resolutions),
        dense=", ".join(str(is_dense(grid, n)).lower() for n in resolutions),
        parts=max(1, grid.num_features // 4),
        width=_table_size(grid)[0],
        mask=grid.table_size - 1,
        masked=str(config.mask_outside_box).lower(),
        offset=0.5 if grid.half_voxel_offset else 0.0,
        smooth="f = f * f * (3.0 - 2.0 * f);" if grid.smoothstep else "",
    )


def _encode_direction(config: FieldConfig) -> tuple[list[str], list[str]]:
    """Statements, and expressions that are the encoded direction, of a vec3 d."""
    degree = config.direction_degree
    if config.direction_encoding == "spherical_harmonics":
        return _spherical_harmonics(degree)
    waves = [f"{wave}({2**j}.0 * d.{axis})" for j in range(degree) for wave in ("sin", "cos") for axis in "xyz"]
    return [], ["d.x", "d.y", "d.z", *waves]


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


# The camera.


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
