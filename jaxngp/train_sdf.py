"""Learn the signed distance to a solid as a function of position: (x, y, z) -> distance (paper section 5.2).

    python -m jaxngp.train_sdf                                     # five shapes whose distance is known in closed form
    python -m jaxngp.train_sdf --mesh=armadillo.obj --max_seconds=60    # pip install .[mesh]
    python -m jaxngp.train_sdf --shape=torus --preset=paper

Reports the share of the solid's volume that is right (IoU), how far its surface lies from the true one (Chamfer) and
how far its normals are off; renders it by sphere tracing, and extracts a mesh. The same command goes on where an
interrupted run stopped; a finished run is only evaluated again.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from jaxngp import flags, runs
from jaxngp.cameras import Cameras, Rays, look_at, make_cameras, project, view_rays
from jaxngp.config import (
    CosineDecay,
    HashGridConfig,
    InputError,
    OptimizerConfig,
    PointFieldConfig,
    SdfConfig,
    SdfSourceConfig,
    SdfTrainConfig,
    StepDecay,
    apply_overrides,
    to_json,
)
from jaxngp.data import content_fingerprint
from jaxngp.data.meshes import Frame, Mesh, read_mesh
from jaxngp.data.shapes import SHAPES
from jaxngp.data.solids import Solid, distance_samples, surface_samples
from jaxngp.device import default_placement
from jaxngp.meshing import extract_surface
from jaxngp.pictures import contact_sheet, depth_image, to_uint8, write_png
from jaxngp.records import environment, table, write_json
from jaxngp.tracing import Distance, SurfaceView, draw_surface, surface_normals
from jaxngp.training.loop import Progress, train
from jaxngp.training.sdf import DistanceSamples

NUM_VOLUME_POINTS = 2**22  # uniform in the solid's box, for the IoU
NUM_SURFACE_POINTS = 2**17  # for Chamfer distance and normals
BATCH = 2**18  # points evaluated at once
NORMAL_WIDTH = 1e-3  # scene units, over which normals are taken
ERROR_GAIN = 2000.0  # on the sheet, white is 1 / 2000 of the cube's side from the true surface
VIEWS = ((25.0, 15.0), (205.0, 15.0))  # degrees around and above, one row of the sheet each
EYE = 1.9  # scene units from the middle of the cube

_SMALL = SdfConfig(
    field=PointFieldConfig(
        encoding=HashGridConfig(num_levels=8, num_features=4, table_size=2**16, max_resolution=1024),
        use_bias=True,  # without biases the output near the surface collapses to 0 and loses its sign
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, decay=CosineDecay()),
    train=SdfTrainConfig(max_steps=10**7, max_seconds=60.0, num_points=2**14),
)
_PAPER = SdfConfig(
    optimizer=OptimizerConfig(learning_rate=1e-4, decay=StepDecay(start=0.5, interval=0.25)),
    sdf=SdfSourceConfig(num_samples=2**23),
    train=SdfTrainConfig(max_steps=20_000),
)
PRESETS = {"paper": _PAPER, "small": _SMALL}
PRESET_HELP = {"paper": "as published", "small": "a minute of training on a CPU"}


# What is learned.


def sdf_config(values: flags.Flags) -> SdfConfig:
    """The config that the flags ask for. Raises InputError."""
    config = PRESETS[flags.chosen_preset(values)]
    name = os.path.realpath(values.mesh) if values.mesh else values.shape
    config = replace(config, sdf=replace(config.sdf, name=name), train=flags.loop_config(config.train, values))
    return apply_overrides(config, values.override)


def load(name: str) -> Solid:
    """The shape of a name, or the mesh at a path. Raises InputError."""
    return SHAPES[name] if name in SHAPES else read_mesh(Path(name))


def draw_samples(solid: Solid, config: SdfConfig) -> DistanceSamples:
    """The points of a run, equal for equal seeds."""
    seed, count = config.train.seed, config.sdf.num_samples
    started = time.perf_counter()
    position, distance = distance_samples(solid, 2 * seed + 1, count, offset=config.sdf.offset)
    surface = surface_samples(solid, 2 * seed, count)
    print(f"{count} distances in {time.perf_counter() - started:.1f} s")
    return DistanceSamples(*map(jnp.asarray, (surface, position, distance)))


# How good it is.


@dataclass(frozen=True)
class Quality:
    """How near a learned distance is to the true one; lengths in sides of the cube that holds the solid."""

    iou: float  # of the insides, by points uniform in the solid's box
    volume_points: int
    mean_error: float  # of the distance, absolute, at a sixteenth of these points
    normal_degrees: float  # between the true normals and those of the learned surface, mean over the true surface
    chamfer: float | None  # mean of both mean distances between the surfaces; needs the extracted mesh


def evaluate(distance: Distance, solid: Solid, learned: Mesh | None) -> Quality:
    """Compare on points that training has not seen."""
    rng = np.random.default_rng([1, 2, 3])  # from no seed of training, which is one number
    low, high = solid.box
    points = rng.uniform(low, high, (NUM_VOLUME_POINTS, 3)).astype(np.float32)
    found = in_batches(distances, distance, points)
    true = np.asarray(solid.inside(points.astype(np.float64)))
    some = slice(0, NUM_VOLUME_POINTS // 16)  # a distance takes much longer than a side
    mean_error = np.abs(found[some] - solid.distance(points[some].astype(np.float64))).mean()
    iou = float(np.sum(true & (found < 0)) / max(int(np.sum(true | (found < 0))), 1))
    surface, normals = solid.surface(rng, NUM_SURFACE_POINTS)
    turned = in_batches(normals_at, distance, surface.astype(np.float32))
    cosine = np.sum(turned * normals, axis=1).clip(-1, 1)
    chamfer = None
    if learned is not None:
        there, _ = learned.surface(rng, NUM_SURFACE_POINTS)
        chamfer = 0.5 * float(solid.unsigned_distance(there).mean() + learned.unsigned_distance(surface).mean())
    return Quality(
        iou=iou,
        volume_points=NUM_VOLUME_POINTS,
        mean_error=float(mean_error),
        normal_degrees=float(np.degrees(np.arccos(cosine)).mean()),
        chamfer=chamfer,
    )


@jax.jit
def distances(distance: Distance, points: jax.Array) -> jax.Array:
    return distance(points)


@jax.jit
def normals_at(distance: Distance, points: jax.Array) -> jax.Array:
    return surface_normals(distance, points, width=NORMAL_WIDTH)


def in_batches(
    function: Callable[[Distance, np.ndarray], jax.Array], distance: Distance, points: np.ndarray
) -> np.ndarray:
    """function(distance, part) over parts of BATCH points, the last one filled up, as one array."""
    parts = []
    for start in range(0, len(points), BATCH):
        part = points[start : start + BATCH]
        padded = np.pad(part, ((0, min(BATCH, len(points)) - len(part)), (0, 0)), mode="edge")
        parts.append(np.asarray(function(distance, padded))[: len(part)])
    return np.concatenate(parts)


# What it looks like.


def extract(
    distance: Distance, solid: Solid, resolution: int, folder: Path, suffix: str
) -> tuple[np.ndarray, np.ndarray]:
    """The learned surface as vertices and faces, written in the solid's own coordinates. Raises InputError."""
    try:
        import trimesh
    except ImportError:
        raise InputError("trimesh, which writes meshes, is not installed: pip install .[mesh]") from None
    vertices, faces = extract_surface(distance, solid.box, resolution)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"surface.{suffix}"
    trimesh.Trimesh(solid.to_world(vertices), faces, process=False).export(path)
    print(f"mesh: {path}, {len(vertices)} vertices, {len(faces)} faces")
    return vertices, faces


def view(solid: Solid, size: int, up: str, azimuth: float, elevation: float) -> tuple[Rays, np.ndarray, np.ndarray]:
    """Rays (size * size,) of a camera around the solid, with the lamp over its left shoulder, and what is up."""
    upwards = np.eye(3)["xyz".index(up)]
    forwards, sideways = np.roll(upwards, 1), np.roll(upwards, 2)  # of z: x and y; of y: z and x
    around, above = np.radians([azimuth, elevation])

    def direction(around: float, above: float) -> np.ndarray:
        level = np.cos(around) * forwards + np.sin(around) * sideways
        return np.cos(above) * level + np.sin(above) * upwards

    middle = solid.box.mean(axis=0)
    c2w = look_at(middle + EYE * direction(around, above), middle, upwards)
    camera = framing(solid, size, c2w)
    rays = jax.tree.map(lambda a: a.reshape(-1, 3), view_rays(camera))
    return rays, direction(around - np.radians(50), np.radians(40)), upwards


def framing(solid: Solid, size: int, c2w: np.ndarray) -> Cameras:
    """The camera at a pose whose picture the solid fills, but for a margin."""
    points, _ = solid.surface(np.random.default_rng(0), 2**13)
    unit = make_cameras(c2w, focal_xy=1.0, centre_xy=0.0, width=size, height=size)
    xy, _ = jax.jit(project)(unit, points.astype(np.float32))
    low, high = np.asarray(xy).min(axis=0), np.asarray(xy).max(axis=0)
    focal = 0.94 * size / float((high - low).max())
    centre = 0.5 * size - 0.5 * focal * (low + high)
    return make_cameras(c2w, focal_xy=focal, centre_xy=centre, width=size, height=size)


def draw(distance: Distance, solid: Solid, size: int, up: str, folder: Path) -> float:
    """Write the sheet and the first picture; returns the seconds that a picture takes, compilation excluded."""
    rows, seconds = [], []
    for azimuth, elevation in VIEWS:
        rays, lamp, sky = view(solid, size, up, azimuth, elevation)
        arguments: Any = default_placement().put((rays, *(a.astype(np.float32) for a in (solid.box, lamp, sky))))
        show = functools.partial(draw_surface, distance, *arguments, normal_width=NORMAL_WIDTH)
        jax.block_until_ready(show())  # compiles, the first time
        started = time.perf_counter()
        picture = jax.block_until_ready(show())
        seconds.append(time.perf_counter() - started)
        rows.append(panels(picture, rays, solid, size))
        if int(picture.unfinished):
            print(f"{int(picture.unfinished)} of {size * size} rays reached no surface, and are drawn as misses")
    labels = ["surface", "normals", "depth", f"distance from the true surface x {ERROR_GAIN:g}"]
    write_png(folder / "sheet.png", contact_sheet(rows, labels))
    write_png(folder / "surface.png", rows[0][0])
    return float(np.median(seconds))


def panels(picture: SurfaceView, rays: Rays, solid: Solid, size: int) -> list[np.ndarray]:
    """The pictures of one row of the sheet, (size, size, 3) u8 each."""
    seen = np.asarray(picture.opacity) > 0
    position = np.asarray(rays.origin + picture.depth[:, None] * rays.direction, np.float64)
    error = np.zeros(len(seen), np.float32)
    error[seen] = solid.unsigned_distance(position[seen])
    shape = (size, size)
    normal = np.where(seen[:, None], 0.5 * np.asarray(picture.normal) + 0.5, 1.0)
    grey = np.where(seen, ERROR_GAIN * error, 0.0)
    return [
        to_uint8(np.asarray(picture.rgb).reshape(*shape, 3)),
        to_uint8(normal.reshape(*shape, 3)),
        depth_image(np.asarray(picture.depth).reshape(shape), seen.reshape(shape)),
        to_uint8(np.repeat(grey.reshape(*shape, 1), 3, axis=2)),
    ]


# The command.


def define_flags(values: flags.Flags) -> None:
    flags.define_path(values, "mesh", None, "Path of an OBJ, OFF, PLY or STL file.")
    absl_flags.DEFINE_enum("shape", "shapes", [*SHAPES], "Built-in, where no mesh is given.", flag_values=values)
    flags.define_preset(values, PRESET_HELP, gpu="paper")
    absl_flags.DEFINE_integer("image_size", 512, "Pixels per side of a picture.", 16, 4096, flag_values=values)
    absl_flags.DEFINE_enum(
        "up", "auto", ["auto", "x", "y", "z"], "Axis that is up in pictures; auto is y for a mesh.", flag_values=values
    )
    absl_flags.DEFINE_integer(
        "mesh_resolution",
        256,
        "Points along the longest side; 0 extracts no mesh. 1024 may take 10 GB.",
        0,
        1024,
        flag_values=values,
    )
    absl_flags.DEFINE_enum("mesh_format", "ply", ["ply", "obj"], "Of the extracted mesh.", flag_values=values)
    flags.define_loop_flags(
        values,
        workdir="runs/<solid>",
        config=lambda values: PRESETS.get(values.preset, PRESETS["small"]),
        mesh="devices",  # here --mesh is a file
    )


def main(values: flags.Flags) -> None:
    if values.mesh and values["shape"].present:
        raise InputError("--shape is a built-in solid; leave it out with --mesh")
    if 0 < values.mesh_resolution < 16:
        raise InputError(f"--mesh_resolution={values.mesh_resolution}: expected 16 or more, or 0")
    config = sdf_config(values)
    solid = load(config.sdf.name)
    for note in solid.notes:
        print(note)
    workdir = Path(values.workdir or f"runs/{solid.name}")
    seen = content_fingerprint(vertices=solid.vertices, faces=solid.faces) if isinstance(solid, Mesh) else None
    with runs.training_in(workdir, config, data=seen, restart=values.restart, extend=values.extend) as run:
        print(to_json(config), end="")
        progress = run.resume
        if not run.finished:
            for progress in train(config, draw_samples(solid, config), resume=run.resume):
                run.record(progress)
                if run.interrupted:
                    break
        run.exit_if_interrupted()
        assert progress is not None
        report(workdir, solid, progress, run.trained_on(), values)


def report(workdir: Path, solid: Solid, progress: Progress, about: dict[str, Any], values: flags.Flags) -> None:
    """Extract, draw, evaluate, write summary.json, and print the table."""
    distance, pictures = progress.field, workdir / "pictures"
    runs.remove_pictures(workdir)
    learned = surface = None
    if values.mesh_resolution:
        try:
            surface = extract(distance, solid, values.mesh_resolution, pictures, values.mesh_format)
            learned = Mesh("learned", *surface, Frame(np.full(3, 0.5), 1.0), ())
        except InputError as error:
            print(f"no {'Chamfer distance' if surface else 'mesh extracted'}: {error}")
    up = values.up if values.up != "auto" else "y" if isinstance(solid, Mesh) else "z"
    picture_seconds = draw(distance, solid, values.image_size, up, pictures)
    quality = evaluate(distance, solid, learned)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(distance.params))
    summary = {
        "solid": solid.name,
        **asdict(quality),
        "parameters": num_params,
        "steps": progress.step,
        "train_seconds": progress.seconds,
        "compile_seconds": progress.compile_seconds,
        "samples_per_second": progress.num_samples / progress.seconds if progress.seconds else 0.0,
        "picture_size": values.image_size,
        "picture_seconds": picture_seconds,
        **about,
        "evaluated_on": environment(),
    }
    write_json(workdir / "summary.json", summary)
    row = {
        "solid": solid.name,
        "IoU": f"{quality.iou:.5f}",
        "Chamfer": "" if quality.chamfer is None else f"{quality.chamfer:.2e}",
        "normals, deg": quality.normal_degrees,
        "mean error": f"{quality.mean_error:.2e}",
        "parameters": num_params,
        "steps": progress.step,
        "train s": round(progress.seconds, 1),
        "compile s": round(progress.compile_seconds, 1),
        "s/picture": picture_seconds,
        "peak MB": round(summary["peak_memory_bytes"] / 1e6),
        "device": summary["device"],
    }
    print(f"\n{table([row])}")
    print(f"lengths in sides of the cube that holds the solid; pictures: {pictures}")


if __name__ == "__main__":
    flags.run("jaxngp.train_sdf", define_flags, main, __doc__ or "")
