"""A mesh with colours: a glTF binary, a PLY or an OBJ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxngp.config import Bounds, Config
from jaxngp.exporting.colours import colour_points
from jaxngp.exporting.files import Glb, axes_of, positions, to_byte, write_obj, write_ply
from jaxngp.exporting.surface import Surface, extract, opaque_density, some_views, visibility
from jaxngp.exporting.volume import Share, middle_cube
from jaxngp.runs import Run

SUFFIXES = (".glb", ".ply", ".obj")
UNLIT: dict[str, Any] = {"KHR_materials_unlit": {}}  # the light of the scene is in the colours


@dataclass(frozen=True)
class MeshOptions(Config):
    """Where the surface is, and which of it is written."""

    mesh_resolution: Annotated[int, Bounds(16, 768), "points along the longest side of what is occupied"] = 192
    share: Share = 0.0
    opacity: Annotated[
        float, Bounds(above=0, below=1), "share of the light that a march step absorbs where the surface is put"
    ] = 0.2
    smallest: Annotated[float, Bounds(0, 0.5), "share of the surface below which a separate part is left out"] = 1e-3
    hidden: Annotated[bool, "keep what no training view sees, and so a closed surface"] = False


def write(run: Run, path: Path, options: MeshOptions) -> str:
    """Write the surface with vertex colours, by the suffix of the path."""
    surface = find_surface(run, options)
    views = some_views(run.cameras)
    seen = np.zeros((0, len(surface.vertices)), bool)
    if views is not None:
        seen = visibility(views, surface.vertices, surface.vertices, surface.spacing)
    colours = colour_points(run.field, views, seen, surface.vertices, surface.normals, surface.spacing)
    world, normals = run.transform.to_world(surface.vertices), surface.normals @ np.array(run.transform.rotation)
    _WRITERS[path.suffix.lower()](run, path, world, normals, surface.faces, colours)
    return f"{len(world):,} vertices, {len(surface.faces):,} triangles"


def find_surface(run: Run, options: MeshOptions) -> Surface:
    """The surface of a run, in scene units."""
    return extract(
        run.field,
        run.occupancy,
        some_views(run.cameras),
        box=middle_cube(run.occupancy, options.share),
        resolution=options.mesh_resolution,
        level=opaque_density(run.config.sampler, options.opacity),
        smallest=options.smallest,
        hidden=options.hidden,
    )


def _write_glb(
    run: Run, path: Path, vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, colours: np.ndarray
) -> None:
    glb = Glb(run.transform)
    attributes = {
        "POSITION": glb.positions(vertices),
        "NORMAL": glb.array(normals.astype(np.float32)),
        "COLOR_0": glb.colours(colours),
    }
    primitive = {"attributes": attributes, "indices": glb.faces(faces), "material": 0}
    glb.json |= {
        "meshes": [{"primitives": [primitive]}],
        "materials": [{"extensions": UNLIT, "doubleSided": True}],
        "extensionsUsed": [*UNLIT],
    }
    glb.write(path)


def _write_ply(
    run: Run, path: Path, vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, colours: np.ndarray
) -> None:
    columns = axes_of("x y z", positions(vertices, run.transform.side))
    columns |= axes_of("nx ny nz", normals.astype(np.float32)) | axes_of("red green blue", to_byte(colours))
    write_ply(path, columns, faces)


def _write_obj(
    run: Run,  # noqa: ARG001
    path: Path,
    vertices: np.ndarray,
    normals: np.ndarray,
    faces: np.ndarray,
    colours: np.ndarray,
) -> None:
    write_obj(path, vertices, normals, faces, colours)


_WRITERS = dict(zip(SUFFIXES, (_write_glb, _write_ply, _write_obj), strict=True))
