"""Triangle meshes as solids: read from a file, put in order, scaled into the unit cube, asked for distances.

The distance is that to the nearest triangle (a bounding volume hierarchy), its sign that of the generalised winding
number (Jacobson et al. 2013, computed as in Barill et al. 2018), which has an answer for every mesh: holes, soups of
triangles and surfaces that cross each other included. Both are libigl's, which works on all cores, the distance in
float64, the winding number in float32 inside. The sign of the angle-weighted normal at the nearest point (Baerentzen
and Aanaes 2005) is the peer: of 10^6 points near the armadillo (100k faces) 10 differ, all within 3e-8 of it. It would
save a fifth of the time of `solids.distance_samples`, and is right only for closed meshes that do not cross themselves.
While it is asked, libigl holds Python's interpreter lock: another thread waits.

Polygons are cut into triangles, and parts that overlap united, by Manifold, whose results are closed whatever rounding
does. It, libigl, plyfile and trimesh come with `pip install .[mesh]` and are imported where they are used.
"""

from __future__ import annotations

import importlib
import io
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jaxngp.config import InputError
from jaxngp.data.solids import INFLATION, inflated

SUFFIXES = (".obj", ".off", ".ply", ".stl")
MIN_STEPS = 2**8  # of the numbers' precision across a mesh; with fewer, the file has lost its shape
MIN_THICKNESS = 1e-12  # height over longest side of a triangle; below it the normal is one of rounding errors
MIN_FACING = 0.02  # see `_facing`; 1/2 for a closed surface, 0 for a flat sheet
BURIED = 1.0  # see `_facing`; 3/2 for a face inside another part
PROBES = (1e-2, 3e-4)  # distances from a triangle at which `_facing` looks, over the root of its area: the second is
# for plates thinner than the first, and comes closer to what the winding number's float32 can tell apart
CHUNK = 2**19  # points that libigl is given at a time: some 60 MB
# Of the expansion of far triangles, larger is better. On the armadillo the first errs by up to 0.15 (1e6 points), the
# second, libigl's default, by 0.004, at a third of the speed: so only points that the first leaves unsure are repeated.
COARSE, FINE, DOUBT = 1.0, 2.0, 0.3


class Mesh:
    """A `Solid` of triangles in scene units: `vertices` (V, 3) f64 and `faces` (F, 3) int64, counter-clockwise.

    A point is inside where the winding number is above 1/2. The distance is that to the nearest triangle, even if it
    lies inside another part, as it may where overlapping parts could not be united.
    """

    def __init__(self, name: str, vertices: np.ndarray, faces: np.ndarray, frame: Frame, notes: tuple[str, ...]):
        """Raises InputError where libigl is not installed."""
        self.name, self.vertices, self.faces, self.notes = name, vertices, faces, notes
        self.box = inflated(vertices.min(axis=0), vertices.max(axis=0))
        self._frame = frame
        self._normals, areas = _normals_and_areas(vertices, faces)
        self._cumulative_area = np.cumsum(areas)
        self._tree = _library("igl").AABB()
        self._tree.init(vertices, faces)
        self._winding = _winding_tree(vertices, faces)

    def distance(self, points: np.ndarray) -> np.ndarray:
        def signed(part: np.ndarray) -> np.ndarray:
            distance = self._nearest(part)
            return np.where(_is_inside(self._winding, part), -distance, distance)

        return _in_order(signed, points, np.float64)

    def unsigned_distance(self, points: np.ndarray) -> np.ndarray:
        return _in_order(self._nearest, points, np.float64)

    def inside(self, points: np.ndarray) -> np.ndarray:
        return _in_order(lambda part: _is_inside(self._winding, part), points, np.bool_)

    def surface(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The barycentric coordinates are those of a uniform point of a square, folded along its diagonal."""
        face = np.searchsorted(self._cumulative_area, rng.random(count) * self._cumulative_area[-1])
        u, v = rng.random((2, count, 1))
        u, v = np.where(u + v > 1, (1 - u, 1 - v), (u, v))
        a, b, c = self.vertices[self.faces[face].T]
        return a + u * (b - a) + v * (c - a), self._normals[face]

    def to_world(self, points: np.ndarray) -> np.ndarray:
        return self._frame.to_world(points)

    def _nearest(self, points: np.ndarray) -> np.ndarray:
        squared, _, _ = self._tree.squared_distance(self.vertices, self.faces, points)
        return np.sqrt(squared)


@dataclass(frozen=True)
class Frame:
    """Where a file's coordinates lie in the unit cube: its bounding box is centred, its largest side is `side`."""

    centre: np.ndarray  # (3,), in the file's coordinates
    side: float  # the same; with the margins of `inflated` it becomes 1

    def to_scene(self, points: np.ndarray) -> np.ndarray:
        return (points - self.centre) / self.side / (1 + 2 * INFLATION) + 0.5

    def to_world(self, points: np.ndarray) -> np.ndarray:
        return (points - 0.5) * (1 + 2 * INFLATION) * self.side + self.centre


def read_mesh(path: Path) -> Mesh:
    """The solid in an OBJ, OFF, PLY or STL file; several objects in one file are one solid.

    Corners at exactly one place become one vertex. Left out are vertices that no face uses, faces without area, and
    all but the first of faces on the same three vertices. Faces are turned so that neighbours agree and their
    outsides look out; then parts that overlap are united. What was done is said in `notes`. Only this file is read,
    whatever it refers to.

    Raises InputError where the file is no such mesh, has faces of vertices that it has not or whose coordinates are
    not finite, is too far from its origin for the precision of its numbers, or encloses nothing.
    """
    _library("igl")  # before the work of reading
    vertices, faces = _merged(*_checked(path, *_read(path)))
    faces, notes = _distinct(faces)
    if not len(faces):
        raise InputError(f"{path}: no face has an area; expected the surface of a solid")
    frame = _frame(path, vertices[faces].reshape(-1, 3))
    vertices = frame.to_scene(vertices)
    faces, facing, turned = _oriented(path, vertices, faces)
    vertices, faces, united = _united(vertices, faces, facing > BURIED)
    notes += turned + united + _open_edges(faces)
    if not (thick := _is_thick(vertices, faces)).all():  # left in until here, as they may close their neighbours' gaps
        notes += (f"{_count(~thick, 'face')} thinner than rounding left out",)
    return Mesh(path.stem, *_merged(vertices, faces[thick]), frame, notes)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name}, which meshes need, is not installed: pip install .[mesh]") from None


# Reading.


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) f64 and faces (F, 3) int64 as they are in the file. Raises InputError."""
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise InputError(f"{path}: expected a mesh, a file that ends in one of {', '.join(SUFFIXES)}; convert it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a mesh") from None
    try:
        with warnings.catch_warnings():
            # numpy's, of text that is no number: the numbers before it must not pass for the whole mesh.
            warnings.filterwarnings("error", "string or file could not be read")
            return _PARSERS[suffix](content)
    except InputError:
        raise
    except Exception as error:  # a reader met with a broken or hostile file raises whatever it likes
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise InputError(f"{path}: no {suffix[1:].upper()} mesh ({reason}); export it again, as triangles") from None


def _parse_obj(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The `v` and `f` lines of an OBJ; lines and points are left out.

    Not trimesh's: that one (5.2) counts a negative index from the end of the file instead of from the line it is
    on, and takes the index 0, which OBJ has not, for the last vertex.
    """
    vertices: list[list[str]] = []
    polygons: list[list[int]] = []
    text = content.decode(errors="replace").replace("\r\n", "\n").replace("\\\n", " ")
    for line in text.splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            vertices.append(words[:3])
        elif kind == "f":
            polygons.append([_obj_index(word, len(vertices)) for word in words])
    return _triangulated(np.asarray(vertices, np.float64).reshape(len(vertices), 3), polygons)


def _obj_index(word: str, num_vertices: int) -> int:
    """From 0, of the vertex that a corner such as 7, 7/2 or -1//3 names; negative where there can be none."""
    index = int(word.partition("/")[0])
    return num_vertices + index if index < 0 else index - 1


def _parse_off(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """An OFF: the counts, a line a vertex, a line a polygon; colours and normals that follow are left out."""
    text = content.decode(errors="replace")
    lines = [words for line in text.splitlines() if (words := line.partition("#")[0].split())]
    kind = lines[0][0]
    if kind.upper().endswith("OFF"):
        if "4" in kind or "n" in kind:
            raise ValueError(f"of kind {kind}, which has not three coordinates a vertex")
        lines = [lines[0][1:], *lines[1:]] if len(lines[0]) > 1 else lines[1:]
    num_vertices, num_faces = int(lines[0][0]), int(lines[0][1])
    vertices, faces = lines[1 : 1 + num_vertices], lines[1 + num_vertices : 1 + num_vertices + num_faces]
    if num_vertices < 0 or len(faces) != num_faces:
        raise ValueError(f"{num_vertices} vertices and {num_faces} faces announced, {len(lines) - 1} lines found")
    polygons = [[int(word) for word in words[1 : 1 + int(words[0])]] for words in faces]
    if any(len(polygon) != int(words[0]) for polygon, words in zip(polygons, faces, strict=True)):
        raise ValueError("a face has fewer corners than it announces")
    return _triangulated(np.asarray([words[:3] for words in vertices], np.float64).reshape(-1, 3), polygons)


def _parse_ply(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The vertices, polygons and triangle strips of a PLY.

    Not trimesh's: that one (5.2) reads a binary file wrongly whose faces have different numbers of corners.
    """
    ply = _library("plyfile").PlyData.read(io.BytesIO(content))
    if "vertex" not in ply:
        raise ValueError("without vertices")
    vertices = np.stack([np.asarray(ply["vertex"][axis], np.float64) for axis in "xyz"], axis=-1)
    polygons = [_integers(row) for name in ("face",) if name in ply for row in _ply_lists(ply[name])]
    for name in ("tristrips", "strips"):
        if name in ply:
            polygons += [face for row in _ply_lists(ply[name]) for face in _strip_faces(_integers(row))]
    return _triangulated(vertices, polygons)


def _ply_lists(element: Any) -> Any:
    """The list of vertices of each row of an element of a PLY."""
    names = [column.name for column in element.properties]
    known = [name for name in names if name in ("vertex_indices", "vertex_index")]
    if not known:
        raise ValueError(f"{element.name} has {', '.join(names)[:100]}, and not vertex_indices")
    return element[known[0]]


def _integers(row: Any) -> list[int]:
    values = np.asarray(row)
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError(f"vertex indices of type {values.dtype}")
    return [int(value) for value in values]


def _strip_faces(strip: list[int]) -> list[list[int]]:
    """The triangles of strips that follow each other, with -1 between them; each second one is turned."""
    faces, start = [], 0
    for end in [*(i for i, index in enumerate(strip) if index == -1), len(strip)]:
        part = strip[start:end]
        faces += [part[i : i + 3] if i % 2 == 0 else [part[i + 1], part[i], part[i + 2]] for i in range(len(part) - 2)]
        start = end + 1
    return faces


def _parse_stl(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """By trimesh, which gets no name of a file and so opens no other."""
    trimesh = _library("trimesh")
    kind, stream = "stl", io.BytesIO(content)
    if len(content) != 84 + 50 * int.from_bytes(content[80:84], "little"):
        kind, stream = "stl_ascii", io.StringIO(content.decode(errors="replace"))  # type: ignore[assignment]
    scene = trimesh.load_scene(stream, file_type=kind, process=False, validate=False, skip_materials=True)
    mesh = scene.to_mesh()
    return np.array(mesh.vertices, np.float64), np.array(mesh.faces, np.int64)


_PARSERS = {".obj": _parse_obj, ".off": _parse_off, ".ply": _parse_ply, ".stl": _parse_stl}


def _triangulated(vertices: np.ndarray, polygons: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The vertices, and triangles (F, 3) int64 of the polygons, in order: fans of the convex, cut ears of the others.

    A fan of a polygon that is not convex leaves it, and closes what it leaves open. What has less than three corners
    is left out.
    """
    by_size: dict[int, list[int]] = {}
    for number, polygon in enumerate(polygons):
        if len(polygon) >= 3:
            by_size.setdefault(len(polygon), []).append(number)
    faces, owners = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)]
    for size, members in by_size.items():
        numbers = np.array(members)
        corners = np.array([polygons[number] for number in members], np.int64)
        fans = np.stack(
            [np.broadcast_to(corners[:, :1], (len(corners), size - 2)), corners[:, 1:-1], corners[:, 2:]], -1
        )
        for index in np.flatnonzero(_is_concave(vertices, corners)) if size > 3 else ():
            fans[index] = corners[index][_ears(vertices[corners[index]])]
        faces.append(fans.reshape(-1, 3))
        owners.append(np.repeat(numbers, size - 2))
    return vertices, np.concatenate(faces)[np.argsort(np.concatenate(owners), kind="stable")]


def _is_concave(vertices: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(N,) bool, whether polygons (N, K) turn both ways; False where a vertex is not there or not finite."""
    known = np.all((corners >= 0) & (corners < len(vertices)), axis=1)
    places = vertices[np.where(known[:, None], corners, 0)]
    with np.errstate(over="ignore", invalid="ignore"):
        before, after = places - np.roll(places, 1, axis=1), np.roll(places, -1, axis=1) - places
        turns = np.einsum("nki,ni->nk", np.cross(before, after), _polygon_normal(places))
        concave = turns.min(axis=1) < -1e-12 * np.abs(turns).max(axis=1)
    return known & np.isfinite(places).all(axis=(1, 2)) & concave


def _polygon_normal(places: np.ndarray) -> np.ndarray:
    """(..., 3) normals of polygons (..., K, 3), as long as twice their area (Newell)."""
    local = places - places[..., :1, :]
    return np.cross(local, np.roll(local, -1, axis=-2)).sum(axis=-2)


def _ears(places: np.ndarray) -> np.ndarray:
    """(K - 2, 3) the corners of the triangles of one polygon (K, 3), seen along its normal, where it is simple."""
    normal = _polygon_normal(places)
    normal = normal / np.linalg.norm(normal)
    right = np.cross(normal, np.eye(3)[np.argmin(np.abs(normal))])
    right /= np.linalg.norm(right)
    flat = (places - places[0]) @ np.stack([right, np.cross(normal, right)], axis=1)
    return np.asarray(_library("manifold3d").triangulate([flat / np.abs(flat).max()]), np.int64)


def _checked(path: Path, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(faces):
        raise InputError(f"{path}: holds {len(vertices)} vertices and no face; expected the surface of a solid")
    if (wrong := np.any((faces < 0) | (faces >= len(vertices)), axis=1)).any():
        raise InputError(f"{path}: {_count(wrong, 'face')} of vertices that are not in the file; export it again")
    if (wrong := ~np.all(np.isfinite(vertices[np.unique(faces)]), axis=1)).any():
        raise InputError(f"{path}: {_count(wrong, 'vertex', 'vertices')} with coordinates that are not finite")
    return vertices, faces


def _count(rows: np.ndarray, one: str, many: str = "") -> str:
    """How many of `rows` (N,) bool, in words."""
    count = int(rows.sum())
    return f"{count} {one if count == 1 else many or f'{one}s'}"


# Putting in order.


def _merged(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same faces on the vertices they use, of which no two are at the same place."""
    used, corners = np.unique(faces, return_inverse=True)
    place = _numbered(vertices[used])
    _, first = np.unique(place, return_index=True)
    return vertices[used[first]], place[corners].reshape(-1, 3)


def _numbered(rows: np.ndarray) -> np.ndarray:
    """(N,) int64, equal for equal rows of `rows` (N, K), from 0. Three times as fast as numpy's `unique` of rows."""
    order = np.lexsort(rows.T)
    ordered = rows[order]
    number = np.zeros(len(rows), np.int64)
    number[order[1:]] = np.cumsum((ordered[1:] != ordered[:-1]).any(axis=1))
    return number


def _distinct(faces: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The faces of three vertices, each triple once, in order; and notes."""
    triples = np.sort(faces, axis=1)
    sound = (triples[:, 1:] != triples[:, :-1]).all(axis=1)
    _, first = np.unique(_numbered(triples[sound]), return_index=True)
    kept = np.flatnonzero(sound)[np.sort(first)]
    notes: tuple[str, ...] = (f"{_count(~sound, 'face')} without area left out",) if not sound.all() else ()
    if again := int(sound.sum()) - len(kept):
        notes += (f"{again} of {len(faces)} faces left out, as they are there twice",)
    return faces[kept], notes


def _frame(path: Path, corners: np.ndarray) -> Frame:
    """The frame of all corners (N, 3) of the faces. Raises InputError where they have no room to differ."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    with np.errstate(over="ignore"):
        side = float((high - low).max())
    if not np.isfinite(side):
        raise InputError(f"{path}: coordinates up to {np.abs(corners).max():g} are too large; scale the mesh down")
    largest = np.abs(corners).max()
    with np.errstate(over="ignore"):
        single = bool((corners == corners.astype(np.float32)).all())  # as whatever comes from a binary file
    step = float(np.spacing(largest.astype(np.float32) if single else largest))
    if side < MIN_STEPS * step:
        raise InputError(
            f"{path}: {side:g} wide at coordinates up to {largest:g}, where numbers of its precision are {step:g} "
            "apart: its shape is lost; move the mesh to the origin before it is exported"
        )
    return Frame(low + 0.5 * (high - low), side)


def _normals_and_areas(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (F, 3), 0 where there is none, and areas (F,)."""
    a, b, c = vertices[faces.T]
    normals = np.cross(b - a, c - a)
    lengths = np.linalg.norm(normals, axis=1)
    return normals / np.maximum(lengths, np.finfo(np.float64).tiny)[:, None], 0.5 * lengths


def _is_thick(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(F,) bool, whether rounding leaves a face a normal and libigl a nearest point on it."""
    corners = vertices[faces]
    longest = np.square(corners - np.roll(corners, 1, axis=1)).sum(axis=2).max(axis=1)
    return 2 * _normals_and_areas(vertices, faces)[1] > MIN_THICKNESS * longest


def _open_edges(faces: np.ndarray) -> tuple[str, ...]:
    """A note, where some edge is not passed equally often in both directions: only else the winding number is whole."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    passed = np.bincount(_numbered(np.sort(edges, axis=1)), np.where(edges[:, 0] < edges[:, 1], 1, -1))
    if not passed.any():
        return ()
    return (f"not watertight ({_count(passed != 0, 'open edge')}); inside is where the winding number is above 1/2",)


# Which side is out.


def _oriented(path: Path, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The faces, turned to agree with their neighbours and to look out, their `_facing`, and notes. Raises InputError.

    A patch, a part that hangs together by edges of two faces, first takes the direction that more of its area has
    in the file; so a cavity stays one. Then it is turned as a whole where it looks into what it bounds.
    """
    consistent, patch = _library("igl").bfs_orient(faces)
    _, areas = _normals_and_areas(vertices, faces)
    if not _is_thick(vertices, faces).any():
        raise InputError(f"{path}: no face has an area; expected the surface of a solid")
    turn = (consistent != faces).any(axis=1)
    turn ^= (np.bincount(patch, np.where(turn, -areas, areas)) < 0)[patch]
    for probe in PROBES:
        facing = _facing(vertices, _turned(faces, turn), probe)
        if (inwards := np.bincount(patch, areas * facing) < 0).any():
            turn ^= inwards[patch]
            facing = _facing(vertices, _turned(faces, turn), probe)
        if np.average(facing, weights=areas) >= MIN_FACING:
            break
    else:
        raise InputError(f"{path}: encloses nothing, being flat, open or on itself; expected the surface of a solid")
    notes = (f"{int(turn.sum())} of {len(faces)} faces turned to look out",) if turn.any() else ()
    return _turned(faces, turn), facing, notes


def _turned(faces: np.ndarray, turn: np.ndarray) -> np.ndarray:
    return np.where(turn[:, None], faces[:, ::-1], faces)


def _facing(vertices: np.ndarray, faces: np.ndarray, probe: float) -> np.ndarray:
    """(F,) mean winding number of two points, just before and just behind the middle of each face.

    What the face itself adds to the two cancels. On a closed surface that looks out it is 1/2, on one that looks in
    -1/2, on a flat sheet 0.
    """
    normals, areas = _normals_and_areas(vertices, faces)
    step = probe * np.sqrt(areas)[:, None] * normals
    middle = vertices[faces].mean(axis=1)
    tree = _winding_tree(vertices, faces)
    before, behind = (
        _in_order(lambda part: tree.winding_number(part, COARSE), points, np.float64)
        for points in (middle + step, middle - step)
    )
    return 0.5 * (before + behind)


# Parts that overlap.


def _united(
    vertices: np.ndarray, faces: np.ndarray, buried: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Vertices and faces of the surface that bounds the union of all parts, and notes; the faces look out.

    buried (F,) bool: which faces lie inside another part; where none does, nothing changes. Each part takes the
    cavities within it along.
    """
    if not buried.any():
        return vertices, faces, ()
    notes: tuple[str, ...] = ()
    if len(parts := _closed_parts(vertices, faces)) > 1:
        manifold = _library("manifold3d")
        solids = [_manifold(manifold, *_merged(vertices, part)) for part in parts]
        if all(solid.status() == manifold.Error.NoError and solid.num_tri() for solid in solids):
            mesh = manifold.Manifold.batch_boolean(solids, manifold.OpType.Add).to_mesh64()
            vertices, faces = np.array(mesh.vert_properties[:, :3], np.float64), np.array(mesh.tri_verts, np.int64)
            vertices, faces = _merged(vertices, faces)
            notes = (f"{len(parts)} parts united, some of which overlap",)
            buried = _facing(vertices, faces, PROBES[0]) > BURIED
    if buried.any():
        notes += (f"{_count(buried, 'face')} inside the solid, as parts overlap: distances nearby are to them",)
    return vertices, faces, notes


def _manifold(manifold: Any, vertices: np.ndarray, faces: np.ndarray) -> Any:
    mesh = manifold.Mesh64(np.ascontiguousarray(vertices), np.ascontiguousarray(faces, np.uint64))
    return manifold.Manifold(mesh)


def _closed_parts(vertices: np.ndarray, faces: np.ndarray) -> list[np.ndarray]:
    """The faces of each part that bounds a volume, with those of the cavities within; none where a part is open."""
    count, number = _library("igl").facet_components(faces)
    parts = [faces[number == part] for part in range(count)]
    volumes = [float(_volume(vertices, part)) for part in parts]
    solids = [i for i, volume in enumerate(volumes) if volume > 0]
    if any(_open_edges(part) for part in parts) or not solids:
        return []
    trees = {i: _winding_tree(vertices, parts[i]) for i in solids}
    joined = {i: [parts[i]] for i in solids}
    for cavity in (part for part, volume in zip(parts, volumes, strict=True) if volume <= 0):
        place = vertices[cavity[:1, 0]]
        around = [i for i in solids if trees[i].winding_number(place, FINE)[0] > 0.5]
        if not around:
            return []
        joined[min(around, key=lambda i: volumes[i])].append(cavity)
    return [np.concatenate(together) for together in joined.values()]


def _volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = vertices[faces.T] - 0.5
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


# Asking.


def _winding_tree(vertices: np.ndarray, faces: np.ndarray) -> Any:
    tree = _library("igl").FastWindingNumberBVH()
    tree.init(vertices, faces)
    return tree


def _is_inside(tree: Any, points: np.ndarray) -> np.ndarray:
    """(N,) bool, whether the winding number is above 1/2."""
    winding = tree.winding_number(points, COARSE)
    doubtful = np.abs(winding - 0.5) < DOUBT
    if doubtful.any():
        winding[doubtful] = tree.winding_number(points[doubtful], FINE)
    return winding > 0.5


def _in_order(query: Callable[[np.ndarray], np.ndarray], points: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """(N,) answers of `query` for points (N, 3), asked in an order in which neighbours follow each other.

    What libigl then walks through is still in the cache: on the armadillo two to three times as many a second.
    """
    answers: np.ndarray = np.empty(len(points), dtype)
    for start in range(0, len(points), CHUNK):
        part = np.ascontiguousarray(points[start : start + CHUNK], np.float64)
        order = np.argsort(_morton(part))
        answers[start + order] = query(part[order])
    return answers


def _morton(points: np.ndarray) -> np.ndarray:
    """(N,) places along a curve through the unit cube that fills it: the bits of x, y and z in turn, ten of each."""
    cells = (points.clip(0.0, 1.0) * 1023).astype(np.uint32)
    for shift, mask in ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249)):
        cells = (cells | cells << np.uint32(shift)) & np.uint32(mask)
    return cells[:, 0] | cells[:, 1] << np.uint32(1) | cells[:, 2] << np.uint32(2)
