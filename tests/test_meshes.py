"""Meshes as solids: one solid from every format, put in order where it is not, and refused in one line where it cannot.

What needs the extra `mesh` is skipped without it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import changed_bytes, fuzz, or_input_error
from test_hostile import only_inside

from jaxngp.config import InputError
from jaxngp.data import meshes, solids
from jaxngp.data.meshes import Mesh, read_mesh
from jaxngp.data.shapes import Box, Placed, Shape, Sphere, Torus

Arrays = tuple[np.ndarray, np.ndarray]
SIDE = 1 / (1 + 2 * solids.INFLATION)  # of the largest side of a mesh in the cube
DATA = os.environ.get("JAXNGP_DATA", "")
ARMADILLO = Path(DATA) / "sdf" / "armadillo.obj"

trimesh = pytest.importorskip("trimesh", reason="the extra mesh is not installed")
pytest.importorskip("igl", reason="the extra mesh is not installed")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Meshes to read.


def box(sides: tuple[float, float, float] = (1.0, 0.5, 0.25)) -> Arrays:
    """Eight vertices and twelve faces that look out."""
    vertices = np.array([*itertools.product((0.0, 1.0), repeat=3)]) * sides
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [corners for a, b, c, d in quads for corners in ((a, b, c), (a, c, d))]
    return vertices, np.array(faces)


def ball(subdivisions: int = 3) -> Arrays:
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.array(mesh.vertices), np.array(mesh.faces)


def joined(*parts: Arrays) -> Arrays:
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in parts)])
    faces = [faces + start for (_, faces), start in zip(parts, starts, strict=False)]
    return np.concatenate([vertices for vertices, _ in parts]), np.concatenate(faces)


def moved(mesh: Arrays, offset: tuple[float, float, float], scale: float = 1.0) -> Arrays:
    return mesh[0] * scale + offset, mesh[1]


def inside_out(mesh: Arrays) -> Arrays:
    return mesh[0], mesh[1][:, ::-1]


def obj(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    return "\n".join([*lines, *("f " + " ".join(map(str, face)) for face in (faces + 1).tolist()), ""]).encode()


def exported(mesh: Arrays, kind: str, **options: Any) -> bytes:
    content = trimesh.Trimesh(*mesh, process=False).export(file_type=kind, **options)
    return content.encode() if isinstance(content, str) else content


FORMATS: dict[str, tuple[str, Callable[[Arrays], bytes]]] = {
    "obj": (".obj", lambda mesh: obj(*mesh)),
    "off": (".off", lambda mesh: exported(mesh, "off")),
    "ply-ascii": (".ply", lambda mesh: exported(mesh, "ply", encoding="ascii")),
    "ply-binary": (".ply", lambda mesh: exported(mesh, "ply")),
    "stl-ascii": (".stl", lambda mesh: exported(mesh, "stl_ascii")),
    "stl-binary": (".stl", lambda mesh: exported(mesh, "stl")),
}
every_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Mesh]:
    """The solid that a mesh, or the content of a file, is read as."""

    def read(mesh: Arrays | bytes | str, suffix: str = ".obj") -> Mesh:
        path = tmp_path / f"solid{suffix}"
        content = obj(*mesh) if isinstance(mesh, tuple) else mesh
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with only_inside(tmp_path):
            return read_mesh(path)

    return read


Read = Callable[..., Mesh]


def refusal(read: Read, mesh: Arrays | bytes | str, suffix: str = ".obj") -> str:
    with pytest.raises(InputError) as caught:
        read(mesh, suffix)
    message = str(caught.value)
    assert f"solid{suffix}: " in message
    assert len(message) < 500
    return message.split(f"solid{suffix}: ", 1)[1]


def probes(count: int = 4000, seed: int = 1) -> np.ndarray:
    return rng(seed).uniform(-0.1, 1.1, (count, 3))


def exact_box(sides: tuple[float, float, float] = (1.0, 0.5, 0.25)) -> Shape:
    x, y, z = (0.5 * SIDE * side / max(sides) for side in sides)
    return Shape("exact", (Placed(Box((x, y, z))),))


def assert_equal(mesh: Mesh, exact: Shape, atol: float) -> None:
    """One distance, one sign away from the surface, and one box."""
    points = probes()
    expected = exact.distance(points)
    np.testing.assert_allclose(mesh.distance(points), expected, atol=atol)
    np.testing.assert_allclose(mesh.unsigned_distance(points), np.abs(expected), atol=atol)
    clear = np.abs(expected) > atol + 1e-6
    np.testing.assert_array_equal(mesh.inside(points)[clear], (expected < 0)[clear])
    np.testing.assert_allclose(mesh.box, exact.box, atol=atol)


# The distance.


def test_a_box_is_exact(read: Read) -> None:
    mesh = read(box())
    assert_equal(mesh, exact_box(), 1e-12)
    assert mesh.notes == ()
    assert mesh.name == "solid"
    np.testing.assert_allclose(mesh.box[:, 0], [0, 1], atol=1e-15)


def test_a_ball_is_one_within_its_facets(read: Read) -> None:
    assert_equal(read(ball(4)), Shape("exact", (Placed(Sphere(0.5 * SIDE)),)), 1.5e-3)


def test_a_torus_is_one_within_its_facets(read: Read) -> None:
    mesh = trimesh.creation.torus(1.0, 0.4, 96, 64)
    scale = 0.5 * SIDE / 1.4
    exact = Shape("exact", (Placed(Torus(scale, 0.4 * scale)),))
    assert_equal(read((np.array(mesh.vertices), np.array(mesh.faces))), exact, 1.5e-3)


def test_one_point_has_one_distance_in_any_company(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, points = read(ball(2)), probes(1000)
    together = mesh.distance(points)
    np.testing.assert_array_equal(mesh.distance(points[::-1])[::-1], together)
    np.testing.assert_array_equal(mesh.distance(points[100:103]), together[100:103])
    assert mesh.distance(points[:0]).shape == mesh.inside(points[:0]).shape == (0,)
    monkeypatch.setattr(meshes, "CHUNK", 7)
    np.testing.assert_array_equal(mesh.distance(points), together)
    np.testing.assert_array_equal(mesh.inside(points), together < 0)


def test_surface_samples_are_uniform_and_normals_outer(read: Read) -> None:
    mesh, exact = read(box()), exact_box()
    points, normals = mesh.surface(rng(), 40_000)
    np.testing.assert_allclose(exact.distance(points), 0, atol=1e-12)
    assert not mesh.inside(points + 1e-5 * normals).any()
    assert mesh.inside(points - 1e-5 * normals).all()
    _, expected = exact.surface(rng(1), 40_000)
    for axis in range(3):
        assert abs((normals[:, axis] == 1).mean() - (expected[:, axis] == 1).mean()) < 0.02
        on_face = points[normals[:, axis] == 1]
        deviation = np.delete(exact.parts[0].half_sides, axis) / np.sqrt(3)
        np.testing.assert_allclose(np.delete(on_face.std(axis=0), axis), deviation, rtol=0.03)
        np.testing.assert_allclose(np.delete(on_face.mean(axis=0), axis), 0.5, atol=0.02)


def test_samples_with_distances(read: Read) -> None:
    mesh = read(ball(3))
    position, distance = solids.distance_samples(mesh, 0, 4000)
    np.testing.assert_array_equal(distance, mesh.distance(position.astype(np.float64)).astype(np.float32))
    assert 0.72 < (np.abs(distance) < 0.01).mean() < 0.8
    # Coordinates up to 1 in float32 are off by 2^-25 each, and so a point by up to 5.2e-8.
    assert np.abs(mesh.distance(solids.surface_samples(mesh, 0, 1000).astype(np.float64))).max() < 1e-7


def test_the_way_back_to_the_file(read: Read) -> None:
    vertices, faces = moved(ball(1), (1e3, -50.0, 7.0), 12.0)
    mesh = read((vertices, faces))
    back = mesh.to_world(mesh.vertices)
    np.testing.assert_allclose(back[np.lexsort(back.T)], vertices[np.lexsort(vertices.T)], atol=1e-9)
    np.testing.assert_allclose(mesh.to_world(np.full((1, 3), 0.5)), [[1e3, -50.0, 7.0]], atol=1e-9)


# Files.


@every_format
def test_every_format_gives_one_solid(kind: str, read: Read) -> None:
    suffix, write = FORMATS[kind]
    mesh = read(write(box()), suffix)
    assert (mesh.vertices.shape, mesh.faces.shape, mesh.notes) == ((8, 3), (12, 3), ())
    assert_equal(mesh, exact_box(), 1e-12)
    mesh = read(write(box()), suffix.upper())
    assert mesh.faces.shape == (12, 3)


def test_an_obj_of_polygons_and_relative_indices(read: Read) -> None:
    vertices, _ = box()
    lines = ["# Größe: 1", "mtllib /etc/passwd", "vt 0 0", "vn 0 0 1", "o body", "usemtl secret"]
    for quad in ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)):
        lines += ["v {} {} {} 0.5 0.5 0.5".format(*vertices[corner]) for corner in quad]
        lines += ["f -4/1/1 -3//1 \\", "  -2/1 -1"]
    mesh = read("\r\n".join(["l 1 2", *lines, ""]).encode("latin-1"))
    assert (len(mesh.vertices), len(mesh.faces), mesh.notes) == (8, 12, ())
    assert_equal(mesh, exact_box(), 1e-12)


def test_a_texture_named_by_a_ply_is_not_opened(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    content = exported(box(), "ply").replace(b"element vertex", b"comment TextureFile /etc/passwd\nelement vertex", 1)
    assert_equal(read(content, ".ply"), exact_box(), 1e-12)
    assert not caplog.messages


def test_signed_zeros_are_one_place(read: Read) -> None:
    """Half of the faces are on vertices of their own, with -0 for 0."""
    vertices, faces = box()
    mesh = read((np.concatenate([vertices, np.where(vertices == 0, -0.0, vertices)]), faces + 8 * (faces[:, :1] % 2)))
    assert (len(mesh.vertices), mesh.notes) == (8, ())


def test_an_stl_of_another_alphabet(read: Read) -> None:
    content = exported(box(), "stl_ascii").replace(b"solid", "solid Würfel".encode("latin-1"), 1)
    assert_equal(read(content, ".stl"), exact_box(), 1e-12)


def test_another_suffix_is_refused(read: Read) -> None:
    for suffix in (".glb", ".txt", ".npy", ""):
        assert "ends in one of .obj, .off, .ply, .stl" in refusal(read, box(), suffix)


@pytest.mark.parametrize("suffix", meshes.SUFFIXES)
def test_what_is_no_file_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("folder", "missing"):
        with pytest.raises(InputError, match=r"cannot be read \("):
            read_mesh(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("suffix", meshes.SUFFIXES)
def test_what_holds_no_mesh_is_refused(suffix: str, read: Read) -> None:
    for content in (b"", b"\n", b"solid\nendsolid\n", b"OFF\n0 0 0\n", rng().bytes(5000), b"\0" * 84):
        message = refusal(read, content, suffix)
        assert message.startswith(("no ", "holds 0 vertices and no face")), content
        assert "module" not in message


def test_points_are_no_solid(read: Read) -> None:
    assert refusal(read, (box()[0], np.empty((0, 3), int))).startswith("holds 8 vertices and no face")


@pytest.mark.parametrize(("module", "suffix"), [("igl", ".stl"), ("trimesh", ".stl"), ("plyfile", ".ply")])
def test_the_extra_is_named_where_it_is_missing(
    module: str, suffix: str, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = exported(box(), suffix[1:])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{module}.*pip install \.\[mesh\]"):
        read(content, suffix)


# Polygons.

C_SHAPE = [(0, 0), (1.5, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (0, 3)]  # the second on a straight edge


def prism(outline: list[tuple[float, float]], first: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """Vertices, and polygons that look out: two caps and a quad a side. The caps start at corner `first`."""
    count = len(outline)
    vertices = np.array([(x, y, z) for z in (0.0, 1.0) for x, y in outline])
    cap = [(first + i) % count for i in range(count)]
    sides = [[i, (i + 1) % count, count + (i + 1) % count, count + i] for i in range(count)]
    return vertices, [cap[::-1], [count + i for i in cap], *sides]


def written(vertices: np.ndarray, polygons: list[list[int]], kind: str) -> bytes:
    places = [" ".join(map(str, place)) for place in vertices.tolist()]
    if kind == "obj":
        return "\n".join(
            [*(f"v {p}" for p in places), *("f " + " ".join(str(i + 1) for i in f) for f in polygons)]
        ).encode()
    faces = [f"{len(f)} " + " ".join(map(str, f)) for f in polygons]
    if kind == "off":
        return "\n".join(
            ["OFF # a comment", f"{len(places)} {len(faces)} 0", "", *places, *(f"{f} 255 0 0" for f in faces)]
        ).encode()
    form = "ascii" if kind == "ply-ascii" else "binary_little_endian"
    header = [
        "ply",
        f"format {form} 1.0",
        f"element vertex {len(places)}",
        *(f"property double {axis}" for axis in "xyz"),
    ]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    if form == "ascii":
        return "\n".join([*header[:-1], *places, *faces, ""]).encode()
    rows = [struct.pack(f"<B{len(f)}i", len(f), *f) for f in polygons]
    return "\n".join(header).encode() + vertices.astype("<f8").tobytes() + b"".join(rows)


@pytest.mark.parametrize("kind", ["obj", "off", "ply-ascii", "ply-binary"])
@pytest.mark.parametrize("first", range(0, 9, 2))
def test_polygons_that_are_not_convex(kind: str, first: int, read: Read) -> None:
    """Whatever corner they start at, what they leave open stays open, and corners on a straight edge are kept."""
    mesh = read(written(*prism(C_SHAPE, first), kind), f".{kind[:3]}")
    assert (len(mesh.vertices), len(mesh.faces), mesh.notes) == (18, 2 * 7 + 2 * 9, ())
    scale = SIDE / 3
    notch, wall = np.array([[2.0, 1.5, 0.01]]), np.array([[0.5, 1.5, 0.5]])
    np.testing.assert_allclose(mesh.distance(mesh._frame.to_scene(notch)), 0.5 * scale, rtol=1e-9)
    np.testing.assert_allclose(mesh.distance(mesh._frame.to_scene(wall)), -0.5 * scale, rtol=1e-9)
    points = rng().uniform((-0.5, -0.5, -0.5), (3.5, 3.5, 1.5), (2000, 3))
    x, y, z = points.T
    inside = (
        (np.abs(x - 1.5) < 1.5)
        & (np.abs(y - 1.5) < 1.5)
        & (np.abs(z - 0.5) < 0.5)
        & ((x < 1) | (np.abs(y - 1.5) > 0.5))
    )
    np.testing.assert_array_equal(mesh.inside(mesh._frame.to_scene(points)), inside)


def test_a_polygon_may_lie_any_way(read: Read) -> None:
    vertices, polygons = prism(C_SHAPE, 3)
    turn, _ = np.linalg.qr(rng().normal(size=(3, 3)))
    mesh = read(written(vertices @ turn.T, polygons, "obj"))
    middle = np.array([[2.0, 1.5, 0.01], [0.5, 1.5, 0.5]]) @ turn.T
    assert mesh.inside(mesh._frame.to_scene(middle)).tolist() == [False, True]
    assert mesh.notes == ()


def test_a_quad_that_is_not_convex(read: Read) -> None:
    """A dart: one of its diagonals lies outside of it."""
    dart = [(0.0, 0.0), (2.0, 1.0), (0.0, 2.0), (0.7, 1.0)]
    for first in range(4):
        mesh = read(written(*prism(dart, first), "obj"))
        points = np.array([[0.3, 1.0, 0.5], [1.2, 1.0, 0.5]])
        assert mesh.inside(mesh._frame.to_scene(points)).tolist() == [False, True]


def test_triangle_strips_of_a_ply(read: Read) -> None:
    """A box as one strip around it, and two for its ends, with -1 between them."""
    vertices, _ = box()
    around = [2, 0, 3, 1, 7, 5, 6, 4, 2, 0]
    strip = [*around, -1, 1, 0, 5, 4, -1, 6, 2, 7, 3]
    header = ["ply", "format ascii 1.0", "element vertex 8", *(f"property float {axis}" for axis in "xyz")]
    header += ["element tristrips 1", "property list int int vertex_indices", "end_header"]
    rows = [" ".join(map(str, place)) for place in vertices.tolist()]
    mesh = read("\n".join([*header, *rows, f"{len(strip)} " + " ".join(map(str, strip)), ""]), ".ply")
    assert (len(mesh.faces), mesh.notes) == (12, ())
    assert_equal(mesh, exact_box(), 1e-12)


# Parts that overlap.


def test_parts_that_overlap_are_united(read: Read) -> None:
    """The distance is that to the surface of the union, and not to what lies inside of it."""
    first, second = moved(box((2.0, 2.0, 2.0)), (0, 0, 0)), moved(box((2.0, 2.0, 2.0)), (1.0, 0.5, 0.5))
    mesh = read(joined(first, second))
    assert mesh.notes == ("2 parts united, some of which overlap",)
    place = lambda *xyz: mesh._frame.to_scene(np.array([xyz]))  # noqa: E731
    scale = SIDE / 3
    for middle, distance in (
        ((1.5, 1.25, 1.25), -np.hypot(0.5, 0.75)),
        ((0.75, 1.0, 1.0), -0.75),
        ((2.5, 1.5, 1.5), -0.5),
    ):
        np.testing.assert_allclose(mesh.distance(place(*middle)), distance * scale, rtol=1e-6)
    apart = read(joined(first, moved(second, (2.0, 0.0, 0.0))))
    assert apart.notes == ()


def test_a_cavity_stays_where_parts_are_united(read: Read) -> None:
    """But for what another part fills of it."""
    hollow = joined(box((2.0, 2.0, 2.0)), inside_out(moved(box((1.0, 1.0, 1.0)), (0.5, 0.5, 0.5))))
    bar = moved(box((2.0, 0.4, 0.4)), (1.0, 0.8, 0.8))
    mesh = read(joined(hollow, bar))
    points = np.array([[0.75, 1.0, 1.0], [1.25, 1.0, 1.0], [1.25, 0.6, 1.0], [2.5, 1.0, 1.0], [2.5, 0.5, 1.0]])
    assert mesh.inside(mesh._frame.to_scene(points)).tolist() == [False, True, False, True, False]
    assert mesh.notes == ("2 parts united, some of which overlap",)


def test_open_parts_that_overlap_are_said(read: Read) -> None:
    """There is no union of what has no inside, but the faces within are counted."""
    vertices, faces = joined(ball(2), moved(ball(2), (0.8, 0.0, 0.0)))
    mesh = read((vertices, faces[1:]))
    assert any("inside the solid, as parts overlap" in note for note in mesh.notes)
    assert any("not watertight (3 open edges)" in note for note in mesh.notes)


# Numbers.


@pytest.mark.parametrize(("value", "told"), [(np.nan, "nan"), (np.inf, "inf")])
def test_vertices_that_are_not_finite_are_counted(value: float, told: str, read: Read) -> None:
    vertices, faces = box()
    vertices[[2, 5], 1] = value
    assert told.encode() in obj(vertices, faces)
    assert refusal(read, (vertices, faces)).startswith("2 vertices with coordinates that are not finite")


def test_vertices_that_no_face_uses_do_not_count(read: Read) -> None:
    vertices, faces = box()
    stray = np.array([[np.nan, 0, 0], [1e300, 0, 0], [-7, 0, 0]])
    mesh = read((np.concatenate([stray, vertices]), faces + 3))
    assert_equal(mesh, exact_box(), 1e-12)
    assert (mesh.notes, len(mesh.vertices)) == ((), 8)


def test_faces_of_missing_vertices_are_counted(read: Read) -> None:
    message = "1 face of vertices that are not in the file"
    for index in (0, 9, -9, 10**6, 2**62, -(2**62)):
        assert refusal(read, obj(*box()) + f"f 1 2 {index}\n".encode()).startswith(message)
    for index in (8, -1, 2**31 - 1):
        assert message in refusal(read, exported(box(), "ply")[:-4] + struct.pack("<i", index), ".ply")


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_tiny_and_enormous_meshes_are_one_solid(scale: float, read: Read) -> None:
    mesh = read(moved(box(), (0.0, 0.0, 0.0), scale))
    assert_equal(mesh, exact_box(), 1e-12)
    np.testing.assert_allclose(np.ptp(mesh.to_world(mesh.vertices), axis=0), np.array([1, 0.5, 0.25]) * scale)


def test_what_overflows_is_refused(read: Read) -> None:
    vertices, faces = box()
    assert "up to 1.7e+308 are too large" in refusal(read, (np.where(vertices > 0, 1.7e308, -1.7e308), faces))


def test_far_from_the_origin_floats_are_refused(read: Read) -> None:
    far = moved(ball(2), (1e9, 1e9, 0.0), 0.5)
    assert_equal(read(far), Shape("exact", (Placed(Sphere(0.5 * SIDE)),)), 0.02)
    message = refusal(read, exported(far, "stl"), ".stl")
    assert "numbers of its precision are 64 apart" in message
    assert "move the mesh to the origin" in message
    assert "its shape is lost" in refusal(read, moved(ball(2), (1e18, 0.0, 0.0)))


# Putting in order.


def test_faces_without_area_are_left_out(read: Read) -> None:
    vertices, faces = box()
    vertices = np.concatenate([vertices, vertices[:1], [[50.0, 0, 0]]])  # vertex 0 again, and one far away
    mesh = read((vertices, np.concatenate([[[0, 0, 9], [0, 8, 9], [3, 3, 3]], faces])))
    assert_equal(mesh, exact_box(), 1e-12)
    assert mesh.notes == ("3 faces without area left out",)
    assert "no face has an area" in refusal(read, (vertices, np.array([[0, 8, 9]])))


def test_slivers_may_close_a_gap_but_are_left_out(read: Read) -> None:
    """An edge of the box ends halfway in one of its faces' edges: the face between is as thin as rounding."""
    vertices, faces = box((1.0, 1.0, 1.0))
    a, b, c = faces[0]
    vertices = np.concatenate([vertices, [0.3 * vertices[a] + 0.7 * vertices[b]]])
    mesh = read((vertices, np.concatenate([faces[1:], [[a, 8, c], [8, b, c], [a, b, 8]]])))
    assert mesh.notes[-1:] == ("1 face thinner than rounding left out",)
    assert_equal(mesh, exact_box((1.0, 1.0, 1.0)), 1e-12)
    assert "no face has an area" in refusal(read, (vertices, np.array([[a, b, 8]])))


def test_faces_that_are_there_twice_count_once(read: Read) -> None:
    vertices, faces = box()
    mesh = read((vertices, np.concatenate([faces, faces[3:5], np.roll(faces[:1], 1, axis=1)])))
    assert_equal(mesh, exact_box(), 1e-12)
    assert mesh.notes == ("3 of 15 faces left out, as they are there twice",)


def test_both_sides_of_every_face_are_one(read: Read) -> None:
    vertices, faces = box()
    mesh = read((vertices, np.concatenate([faces[:, ::-1], faces])))
    assert_equal(mesh, exact_box(), 1e-12)
    assert mesh.notes[0].startswith("12 of 24 faces left out")


def test_inside_out_is_turned(read: Read) -> None:
    mesh = read(inside_out(box()))
    assert_equal(mesh, exact_box(), 1e-12)
    assert mesh.notes == ("12 of 12 faces turned to look out",)


@given(seed=st.integers(0, 2**32 - 1))
def test_faces_at_odds_are_turned(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    vertices, faces = ball(2)
    odd = rng(seed).random(len(faces)) < 1 / 3
    path = tmp_path_factory.mktemp("odd") / "ball.obj"
    path.write_bytes(obj(vertices, np.where(odd[:, None], faces[:, ::-1], faces)))
    mesh = read_mesh(path)
    assert_equal(mesh, Shape("exact", (Placed(Sphere(0.5 * SIDE)),)), 0.02)
    assert mesh.notes == (f"{odd.sum()} of 320 faces turned to look out",)


def test_two_bodies_are_one_solid(read: Read) -> None:
    """Each is turned by itself, and one within another is a cavity where it looks in."""
    first, second = moved(box((1.0, 1.0, 1.0)), (0, 0, 0)), moved(ball(3), (2.5, 0.5, 0.5), 0.5)
    points = probes()
    plain = read(joined(first, second))
    turned = read(joined(inside_out(first), second))
    np.testing.assert_array_equal(plain.distance(points), turned.distance(points))
    assert turned.notes == ("12 of 1292 faces turned to look out",)
    np.testing.assert_allclose(np.ptp(plain.vertices, axis=0) / SIDE, [1, 1 / 3, 1 / 3], atol=1e-12)
    assert plain.inside(np.array([[0.2, 0.5, 0.5], [0.83, 0.5, 0.5], [0.5, 0.5, 0.5]])).tolist() == [True, True, False]


@pytest.mark.parametrize("turn", [lambda mesh: mesh, inside_out])
def test_a_cavity_stays_one(turn: Callable[[Arrays], Arrays], read: Read) -> None:
    hollow = read(turn(joined(box((1.0, 1.0, 1.0)), inside_out(moved(ball(2), (0.5, 0.5, 0.5), 0.3)))))
    assert not hollow.inside(np.full((1, 3), 0.5)).any()
    assert hollow.inside(np.array([[0.1, 0.1, 0.1]])).all()
    np.testing.assert_allclose(hollow.distance(np.full((1, 3), 0.5)), 0.3 * SIDE, rtol=0.1)


def test_a_cavity_goes_by_most_of_its_faces(read: Read) -> None:
    vertices, faces = inside_out(moved(ball(2), (0.5, 0.5, 0.5), 0.3))
    for seed in range(4):
        odd = rng(seed).random(len(faces)) < 1 / 3
        odd[0] = True
        cavity = vertices, np.where(odd[:, None], faces[:, ::-1], faces)
        mesh = read(joined(box((1.0, 1.0, 1.0)), cavity))
        assert mesh.notes == (f"{odd.sum()} of 332 faces turned to look out",)
        assert not mesh.inside(np.full((1, 3), 0.5)).any()


def test_two_objects_of_one_file(read: Read) -> None:
    vertices, faces = joined(box(), moved(box(), (2.0, 0.0, 0.0)))
    text = obj(vertices, faces).decode().splitlines()
    text[len(vertices) :] = ["o one", "usemtl a", *text[16:28], "o two", "usemtl b", *text[28:]]
    np.testing.assert_array_equal(read("\n".join(text)).distance(probes()), read((vertices, faces)).distance(probes()))


def test_holes_are_closed_by_the_winding_number(read: Read) -> None:
    vertices, faces = ball(3)
    mesh = read((vertices, np.delete(faces, [5, 500, 900], axis=0)))
    assert mesh.notes == ("not watertight (9 open edges); inside is where the winding number is above 1/2",)
    points = probes()
    away = np.abs(np.linalg.norm(points - 0.5, axis=1) - 0.5 * SIDE) > 0.05
    np.testing.assert_array_equal(mesh.inside(points)[away], (np.linalg.norm(points - 0.5, axis=1) < 0.5)[away])


def test_inside_is_a_winding_number_above_a_half(read: Read) -> None:
    """Also where it is no whole number: a bowl is open at the top, and points of all numbers from 0 to 1 are near."""
    vertices, faces = ball(3)
    mesh = read((vertices, faces[vertices[faces, 2].max(axis=1) < 0.3]))
    points = probes(20_000)
    winding = importlib.import_module("igl").winding_number(mesh.vertices, mesh.faces, points)
    assert (np.abs(winding - 0.5) < meshes.DOUBT).mean() > 0.05
    clear = np.abs(winding - 0.5) > 5e-3
    np.testing.assert_array_equal(mesh.inside(points)[clear], (winding > 0.5)[clear])


def test_a_soup_of_triangles_has_an_inside(read: Read) -> None:
    """No vertex is shared: each corner is off by a little."""
    vertices, faces = ball(3)
    corners = vertices[faces].reshape(-1, 3)
    corners = corners + 1e-5 * rng().normal(size=corners.shape)
    for turn in (lambda mesh: mesh, inside_out):
        mesh = read(turn((corners, np.arange(len(corners)).reshape(-1, 3))))
        assert f"{len(corners)} open edges" in mesh.notes[-1]
        assert_equal(mesh, Shape("exact", (Placed(Sphere(0.5 * SIDE)),)), 0.01)


@pytest.mark.parametrize("fold", [0.0, 1e-3])
def test_a_sheet_encloses_nothing(fold: float, read: Read) -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 2, [0.0], indexing="ij"), axis=-1).reshape(-1, 3)
    grid[:, 2] = fold * np.sin(9 * grid[:, 0])
    corner = (np.arange(8)[:, None] * 9 + np.arange(8)).ravel()
    faces = np.concatenate([corner[:, None] + (0, 9, 1), corner[:, None] + (1, 9, 10)])
    assert "encloses nothing" in refusal(read, (grid, faces))
    assert "encloses nothing" in refusal(read, joined((grid, faces), inside_out((grid, faces))))


@pytest.mark.parametrize("height", [0.01, 0.001, 0.0005])
@pytest.mark.parametrize("turn", [lambda mesh: mesh, inside_out], ids=["out", "in"])
def test_a_thin_plate_is_a_solid(height: float, turn: Callable[[Arrays], Arrays], read: Read) -> None:
    solid = read(turn(box((1.0, 1.0, height))))
    half = 0.5 * height * SIDE
    found = solid.distance(np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.9]]))
    np.testing.assert_allclose(found, [-half, 0.4 - half], atol=1e-9)


def test_a_box_without_height_encloses_nothing(read: Read) -> None:
    message = refusal(read, box((1.0, 1.0, 0.0)))
    assert "encloses nothing" in message or "no face has an area" in message


# Broken and hostile files.


def check(mesh: Mesh | None) -> None:
    if mesh is not None:
        assert len(mesh.faces)
        assert 0 <= mesh.faces.min() <= mesh.faces.max() < len(mesh.vertices)
        assert np.isfinite(mesh.vertices).all()
        assert mesh.box.min() >= 0
        assert mesh.box.max() <= 1
        position, distance = solids.distance_samples(mesh, 0, 16)
        assert np.isfinite(position).all()
        assert np.isfinite(distance).all()
        assert (np.abs(distance) < 2).all()


@every_format
@fuzz
@given(data=st.data())
def test_a_broken_file_is_a_solid_or_refused(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    suffix, write = FORMATS[kind]
    path = tmp_path / f"solid{suffix}"
    path.write_bytes(data.draw(changed_bytes(write(box()))))
    with only_inside(tmp_path):
        check(or_input_error(lambda: read_mesh(path)))


@fuzz
@given(seed=st.integers(0, 2**32 - 1), odd=st.floats(-4, 4).map(lambda x: 10.0**x))
def test_any_triangles_are_a_solid_or_refused(seed: int, odd: float, tmp_path: Path) -> None:
    """On a few places, so that faces meet, cross, repeat and have no area."""
    random = rng(seed)
    vertices = random.integers(0, 4, (12, 3)) * [1.0, odd, 1.0] + random.choice([0.0, 1e-14, 0.1]) * random.random(
        (12, 3)
    )
    path = tmp_path / "solid.obj"
    path.write_bytes(obj(vertices, random.integers(0, 12, (random.integers(1, 40), 3))))
    check(or_input_error(lambda: read_mesh(path)))


# The scan.


@pytest.mark.skipif(not (DATA and ARMADILLO.is_file()), reason="needs $JAXNGP_DATA/sdf/armadillo.obj")
def test_the_armadillo() -> None:
    igl = importlib.import_module("igl")
    mesh = read_mesh(ARMADILLO)
    assert (mesh.notes, mesh.vertices.shape, mesh.faces.shape) == ((), (49990, 3), (99976, 3))
    a, b, c = mesh.vertices[mesh.faces.T]
    volume = np.einsum("ij,ij->", a, np.cross(b, c)) / 6
    inside = mesh.inside(rng().uniform(*mesh.box, (10**6, 3)))
    assert inside.mean() * np.prod(np.ptp(mesh.box, axis=0)) == pytest.approx(volume, rel=0.01)
    position, distance = solids.distance_samples(mesh, 0, 40_000)
    kind = igl.SIGNED_DISTANCE_TYPE_PSEUDONORMAL
    expected, *_ = igl.signed_distance(position.astype(np.float64), mesh.vertices, mesh.faces, sign_type=kind)
    far = np.abs(expected) > 1e-6  # the winding number is one of float32 inside
    np.testing.assert_allclose(distance[far], expected[far], atol=1e-7)
    np.testing.assert_allclose(np.abs(distance), np.abs(expected), atol=1e-7)
    np.testing.assert_array_equal(mesh.inside(position.astype(np.float64)), distance < 0)
