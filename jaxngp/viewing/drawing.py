"""Pictures of a scene, drawn in pieces: what a `Look` asks for, from a camera, by a few compiled programs.

A picture of any size is drawn in pieces of one number of rays, so that a few programs serve all sizes, and whoever
draws can turn to something more urgent between two pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxngp.cameras import Cameras, Rays, image_size, unproject
from jaxngp.compositing import RenderOutput
from jaxngp.config import FieldConfig, NerfConfig, StratifiedConfig
from jaxngp.device import CPU_BATCHING, Batching, compiled, compiler_options, default_batching, on_cpu
from jaxngp.evaluation import COLOURS, EvalBackground
from jaxngp.fields import Params, RadianceField
from jaxngp.hashing import level_offsets
from jaxngp.occupancy import OccupancyGrid
from jaxngp.pictures import Image8, depth_image, to_uint8
from jaxngp.refinement import weighted
from jaxngp.rendering import Field, Sampler, render_chunk
from jaxngp.training.loop import Progress, init_state
from jaxngp.viewing.poses import Viewpoint

Mode = Literal["colour", "depth", "normals", "opacity", "occupancy", "cost"]
Shading = Literal["colour", "normals", "occupancy"]  # each a program of its own
Corners = tuple[tuple[float, float, float], tuple[float, float, float]]

Drawing = Generator[None, None, RenderOutput]
"""Yields after every piece, and returns the picture: rgb (H, W, 3), opacity, depth, samples (H, W), numpy."""


@dataclass(frozen=True)
class Look:
    """What a picture shows of a scene."""

    mode: Mode = "colour"
    level: int | None = None  # of the hash encoding, with the features of all others 0; None is all levels
    background: EvalBackground = "white"
    crop: Corners | None = None  # lower and upper corner of a box, scene units, outside of which nothing is

    @property
    def shading(self) -> Shading:
        return self.mode if self.mode in get_args(Shading) else "colour"  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Scene:
    """What is drawn: a copy of a run's state, which training does not take away."""

    field: RadianceField
    grid: OccupancyGrid | None
    sampler: Sampler
    version: int = 0  # the step of the training


def modes(sampler: Sampler) -> tuple[Mode, ...]:
    """What can be shown: without an occupancy grid all rays cost the same."""
    known = get_args(Mode)
    return known[:-2] if isinstance(sampler, StratifiedConfig) else known


def piece_size() -> int:
    """Rays of a piece: a few milliseconds' worth."""
    return 2**11 if on_cpu() else 2**16


def piece_batching() -> Batching:
    """How a piece is rendered: on a CPU with an eighth of its rays at a time.

    A lane that takes no next ray is evaluated until the last one ends. With as many lanes as rays a piece cost eight
    times the evaluations, most of them for rays that had ended or met nothing.
    """
    return replace(CPU_BATCHING, lanes=piece_size() // 8) if on_cpu() else default_batching()


# A copy of the state.


def compile_ahead(config: NerfConfig) -> None:
    """Compile what copies the state of a run, and what draws its colours from a camera without lens."""
    state = jax.eval_shape(lambda: init_state(0, config=config))
    static: dict[str, Any] = {"config": config.field}
    compiled(_copy, state.eval_params, state.occupancy, **static)
    field, grid = jax.eval_shape(functools.partial(_copy, **static), state.eval_params, state.occupancy)
    pinhole = Viewpoint(np.eye(3, 4), 1.0, 1, 1).camera(1, 1)
    compiled(_cast, pinhole, np.int32(0), num_rays=piece_size())
    compile_piece(Scene(field, grid, config.sampler), "colour")


def copy_scene(progress: Progress) -> Scene:
    """The scene as it is now. The copy is made by one program, compiled before."""
    config, state = progress.config, progress.state
    assert isinstance(config, NerfConfig)
    params = weighted(state.eval_params, state.refinement, grid=config.field.encoding)
    program = compiled(_copy, params, state.occupancy, config=config.field)
    field, grid = program(params, state.occupancy)
    return Scene(field, grid, config.sampler, progress.step)


@functools.partial(jax.jit, static_argnames="config")
def _copy(
    params: Params, grid: OccupancyGrid | None, *, config: FieldConfig
) -> tuple[RadianceField, OccupancyGrid | None]:
    params, grid = jax.tree.map(jnp.copy, (params, grid))
    return RadianceField.of(params, config=config), grid


@jax.jit
def _only_rows(field: RadianceField, first: jax.Array, end: jax.Array) -> RadianceField:
    table = field.params["encoding"]["table"]
    row = jnp.arange(len(table), dtype=jnp.int32)[:, None]
    kept = {**field.params, "encoding": {"table": jnp.where((row >= first) & (row < end), table, 0)}}
    return RadianceField.of(kept, config=field.config)


def single_level(field: RadianceField, level: int) -> RadianceField:
    """The field with the features of all levels of the encoding but one set to 0."""
    first, end = level_offsets(field.config.encoding)[level : level + 2]
    rows = np.int32(first), np.int32(end)
    return compiled(_only_rows, field, *rows)(field, *rows)


# Pieces.


def draw(scene: Scene, camera: Cameras, look: Look, *, piece: int = 0) -> Drawing:
    """The picture of a single camera whose arrays are concrete. piece: rays of a piece, by default `piece_size()`."""
    piece = piece or piece_size()
    width, height = image_size(camera)
    field = scene.field if look.level is None else single_level(scene.field, look.level)
    camera = jax.tree.map(lambda a: np.asarray(a, np.int32 if a.dtype.kind == "i" else np.float32), camera)
    colour = np.full(3, COLOURS[look.background], np.float32)
    crop = np.array(look.crop or [[-np.inf] * 3, [np.inf] * 3], np.float32)
    cast = compiled(_cast, camera, np.int32(0), num_rays=piece)
    program = compile_piece(replace(scene, field=field), look.shading, piece=piece)
    parts = []
    for first in range(0, width * height, piece):
        out = program(field, cast(camera, np.int32(first)), scene.grid, colour, crop)
        parts.append(jax.tree.map(np.asarray, out))
        yield
    shape = (height, width)
    return jax.tree.map(lambda *a: np.concatenate(a)[: width * height].reshape(*shape, *a[0].shape[1:]), *parts)


def compile_piece(scene: Scene, shading: Shading, *, piece: int = 0) -> Callable[..., RenderOutput]:
    """The program that draws a piece, compiled once for all scenes of the same shapes, which may be all they have."""
    ray: Any = jax.ShapeDtypeStruct((piece or piece_size(), 3), jnp.float32)
    arguments = (scene.field, Rays(ray, ray), scene.grid, np.zeros(3, np.float32), np.zeros((2, 3), np.float32))
    return compiled(_draw_piece, *arguments, options=compiler_options(), shading=shading, sampler=scene.sampler)


@functools.partial(jax.jit, static_argnames="num_rays")
def _cast(camera: Cameras, first: jax.Array, *, num_rays: int) -> Rays:
    """The rays through the pixels from a number on; those beyond the last pixel miss everything, and cost nothing."""
    width, height = camera.size
    number = first + jnp.arange(num_rays, dtype=jnp.int32)
    rays = unproject(camera, jnp.stack([number % width, number // width], axis=-1).astype(jnp.float32) + 0.5)
    inside = (number < width * height)[:, None]
    away = jnp.array([1.0, 0.0, 0.0], jnp.float32)
    return Rays(jnp.where(inside, rays.origin, 2.0), jnp.where(inside, rays.direction, away))


@functools.partial(jax.jit, static_argnames=("shading", "sampler"))
def _draw_piece(
    field: RadianceField,
    rays: Rays,
    grid: OccupancyGrid | None,
    background: jax.Array,
    crop: jax.Array,
    *,
    shading: Shading,
    sampler: Sampler,
) -> RenderOutput:
    shaded = shade(field, grid, sampler, shading)
    if grid is not None:  # rays march only there; the field below cuts exactly
        low, high = jnp.maximum(grid.bounds[0], crop[0]), jnp.minimum(grid.bounds[1], crop[1])
        grid = grid.replace(bounds=jnp.stack([low, jnp.maximum(low, high)]))  # type: ignore[attr-defined]
    cut = Partial(_inside_box, shaded, crop)
    return render_chunk(cut, rays, grid, background, sampler=sampler, batching=piece_batching())[0]


# What a picture shows, as a field.


def shade(field: Any, grid: OccupancyGrid | None, sampler: Sampler, shading: Shading) -> Field:
    """The field whose colours are what is to be shown. field: called like a `RadianceField`, with `density` too."""
    if shading == "normals":
        return Partial(_normals, field)
    if shading == "occupancy":
        assert grid is not None
        assert not isinstance(sampler, StratifiedConfig)
        return Partial(_cells, grid, jnp.float32(sampler.step_size))
    return field


def _inside_box(
    field: Field, corners: jax.Array, position: jax.Array, direction: jax.Array
) -> tuple[jax.Array, jax.Array]:
    density, rgb = field(position, direction)
    inside = jnp.all((position >= corners[0]) & (position <= corners[1]), axis=-1)
    return jnp.where(inside, density, 0), rgb


def _normals(field: Any, position: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The direction in which the density falls, as a colour: x, y, z in [-1, 1] become red, green, blue in [0, 1]."""
    density, pull_back = jax.vjp(field.density, position)
    (slope,) = pull_back(jnp.ones_like(density))
    largest = jnp.max(jnp.abs(slope), axis=-1, keepdims=True)  # so that squares neither overflow nor vanish
    slope = slope / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(slope**2, axis=-1, keepdims=True))
    return density, 0.5 - 0.5 * slope / jnp.maximum(length, 1)


SOLID = 1e6  # density per scene unit: opaque within any step

_THIN, _THICK = np.array([0.30, 0.48, 0.78], np.float32), np.array([0.98, 0.70, 0.36], np.float32)
_FACES = np.array([0.72, 0.86, 1.0], np.float32)  # brightness of those that x, y and z point to


def _cells(
    grid: OccupancyGrid, step_size: jax.Array, position: jax.Array, direction: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Occupied cells as solid cubes, from blue to orange with the logarithm of their stored density.

    Blue is an optical thickness of 0.01 a step or less, orange of 1 or more.
    """
    size = grid.resolution
    column, row, layer, cascade = grid.cells.at(*(position[:, axis] for axis in range(3)))
    number = column + size * (row + size * (layer + size * cascade))
    share = jnp.clip(0.5 * jnp.log10(jnp.maximum(grid.density.reshape(-1)[number] * step_size, 1e-6)) + 1, 0, 1)
    # Back along the ray, the face that is met first is the one through which it came in.
    within = (position - jnp.stack(grid.cells.centre(number), axis=-1)) / grid.cells.side(number)[:, None] + 0.5 / size
    behind = jnp.where(direction > 0, within, 1 / size - within) / jnp.maximum(jnp.abs(direction), 1e-9)
    rgb = (_THIN + share[:, None] * (_THICK - _THIN)) * jnp.asarray(_FACES)[jnp.argmin(behind, axis=1)][:, None]
    return jnp.full(len(position), SOLID, jnp.float32), jnp.asarray(rgb)


# From numbers to a picture.


def colours(out: RenderOutput, look: Look) -> tuple[Image8, str]:
    """The picture (H, W, 3) u8, and a line that says what its colours mean."""
    opacity = np.asarray(out.opacity)
    if look.mode == "depth":
        seen = np.asarray(out.depth)[opacity > 0.5]
        near, far = np.percentile(seen, (1, 99)).tolist() if seen.size else (0.0, 1.0)
        return depth_image(out.depth, opacity, (near, far)), f"bright {near:.2f}, dark {far:.2f} scene units away"
    if look.mode == "opacity":
        return to_uint8(np.repeat(opacity[..., None], 3, axis=-1)), "black: light gets through; white: none does"
    if look.mode == "cost":
        samples = np.asarray(out.samples, np.float32)
        most = max(float(np.percentile(samples, 99.5)), 1.0)
        said = f"{samples.mean():.1f} samples a ray; brightest: {most:.0f}"
        return depth_image(-samples, np.minimum(samples, 1), (-most, 0.0)), said
    return to_uint8(out.rgb), LEGENDS.get(look.mode, "")


LEGENDS: dict[str, str] = {
    "normals": "red, green, blue: the normal's x, y, z",
    "occupancy": "occupied cells: blue is thin, orange dense",
}
