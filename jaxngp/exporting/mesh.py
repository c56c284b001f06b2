"""A mesh with colours: a glTF binary or an OBJ, with a texture, or a PLY, with colours of its vertices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxngp.config import Bounds, Config
from jaxngp.exporting.atlas import make_atlas
from jaxngp.exporting.colours import surface_colours
from jaxngp.exporting.files import Glb, Textured, axes_of, positions, to_byte, write_obj, write_ply
from jaxngp.exporting.surface import Surface, extract, opaque_density, some_views
from jaxngp.exporting.texture import bake
from jaxngp.exporting.volume import Share, middle_cube
from jaxngp.pictures import encode_png
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
    texture: Annotated[int, Bounds(0, 8192), "pixels a side of the texture of a glb or obj; 0: colours of vertices"] = (
        1024
    )
    hidden: Annotated[bool, "keep what no training view sees, and so a closed surface"] = False


def write(run: Run, path: Path, options: MeshOptions) -> str:
    """Write the surface with a texture or with vertex colours, by the suffix of the path and `options.texture`."""
    surface, suffix = find_surface(run, options), path.suffix.lower()
    vertices = run.transform.to_world(surface.vertices)
    normals, faces = surface.normals @ np.array(run.transform.rotation), surface.faces
    said = f"{len(vertices):,} vertices, {len(faces):,} triangles"
    if suffix != ".ply" and options.texture:
        atlas = make_atlas(surface, options.texture)
        texture = encode_png(to_byte(bake(run, surface, atlas)))
        vertices, normals, faces = vertices[atlas.vertex], normals[atlas.vertex], atlas.faces
        colours: np.ndarray | Textured = Textured(atlas.place / atlas.size, texture)
        said += f", a texture of {atlas.size} x {atlas.size}"
    else:
        colours = surface_colours(run, surface, surface.vertices, surface.normals)
    _WRITERS[suffix](run, path, vertices, normals, faces, colours)
    return said


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
    run: Run, path: Path, vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, colours: np.ndarray | Textured
) -> None:
    glb, material = Glb(run.transform), {"extensions": UNLIT, "doubleSided": True}
    attributes = {"POSITION": glb.positions(vertices), "NORMAL": glb.array(normals.astype(np.float32))}
    if isinstance(colours, Textured):
        attributes["TEXCOORD_0"] = glb.array(colours.uv.astype(np.float32))
        material["pbrMetallicRoughness"] = {"baseColorTexture": {"index": glb.texture(colours.png)}}
    else:
        attributes["COLOR_0"] = glb.colours(colours)
    primitive = {"attributes": attributes, "indices": glb.faces(faces), "material": 0}
    glb.json |= {"meshes": [{"primitives": [primitive]}], "materials": [material], "extensionsUsed": [*UNLIT]}
    glb.write(path)


def _write_ply(
    run: Run, path: Path, vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, colours: np.ndarray
) -> None:
    columns = axes_of("x y z", positions(vertices, run.transform.side))
    columns |= axes_of("nx ny nz", normals.astype(np.float32)) | axes_of("red green blue", to_byte(colours))
    write_ply(path, columns, faces)


def _write_obj(run: Run, path: Path, *mesh: Any) -> None:  # noqa: ARG001
    write_obj(path, *mesh)


_WRITERS: dict[str, Any] = dict(zip(SUFFIXES, (_write_glb, _write_ply, _write_obj), strict=True))
