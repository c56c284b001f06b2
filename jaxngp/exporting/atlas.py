"""A texture atlas: the triangles of a surface laid out in a square, without overlaps, and rasterised there.

A chart is a connected patch of triangles that face one of six axes, seen along it; charts are packed on shelves. A
surface from marching cubes falls into thousands of small patches whatever cuts it, and this takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxngp.config import InputError
from jaxngp.exporting.surface import Surface

PAD = 1.0  # texels around a chart, which bilinear interpolation reads beyond its edge
STEEP = 0.35  # cosine to a chart's axis of the steepest triangle that a small chart is left for
SMALL = 16  # triangles of a chart that may be left so
ROUNDS = 4
BLOCK = 16  # lattice spacings of the cubes that charts are cut at: large ones fill their rectangles badly
FOLD = 2.0  # lattice spacings by which what a texel holds may be off, before triangles are taken for folded over others
LAYERS = 4  # that folded charts are taken apart into


@dataclass(frozen=True)
class Atlas:
    """Where in a square of `size` texels the triangles of a surface lie; the first row is the upper one."""

    size: int
    vertex: np.ndarray  # (W,) i64, the surface's vertex of each corner: one at a seam is there more than once
    place: np.ndarray  # (W, 2) f64 texels, x to the right and y down
    faces: np.ndarray  # (F, 3) i64 into W, in the order of the surface's

    def texels(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers (N,) of the texels in triangles, increasing, and what values (V, C) of the vertices are there.

        A sliver may hold no middle of a texel: those that its corners are in count too.
        """
        number, face, weight = rasterise(self.place, np.ones(len(self.place)), self.faces, self.size, self.size)
        found = np.einsum("nj,njc->nc", weight, values[self.vertex[self.faces[face]]])
        x, y = np.floor(self.place).astype(np.int64).T
        more, first = np.unique(x + self.size * y, return_index=True)
        new = ~np.isin(more, number)
        number = np.concatenate([number, more[new]])
        order = np.argsort(number)
        return number[order], np.concatenate([found, values[self.vertex[first[new]]]])[order]


def make_atlas(surface: Surface, size: int) -> Atlas:
    """Lay out a surface in a texture of size x size, as large as fits. Raises InputError where it does not."""
    axis = _axes(surface)
    block = np.floor(surface.vertices[surface.faces].mean(axis=1) / (BLOCK * surface.spacing)).astype(np.int64)
    part = np.concatenate([block, np.zeros((len(block), 1), np.int64)], axis=1)
    for _ in range(LAYERS):
        _, number = np.unique(part, axis=0, return_inverse=True)
        atlas = _lay_out(surface, axis, _charts(surface, axis + 6 * number), size)
        folded = _folded(atlas, surface)
        if not folded.any():
            break
        part[folded, 3] += 1
    return atlas


def _lay_out(surface: Surface, axis: np.ndarray, chart: np.ndarray, size: int) -> Atlas:
    """The atlas of faces that are seen along axes (F,) and belong to charts (F,)."""
    number, corner = np.unique(chart.repeat(3) * len(surface.vertices) + surface.faces.ravel(), return_inverse=True)
    owner, vertex = np.divmod(number, len(surface.vertices))
    along = np.empty(chart.max() + 1, np.int64)
    along[chart] = axis // 2
    flat = np.take_along_axis(surface.vertices[vertex], np.array([[1, 2], [2, 0], [0, 1]])[along[owner]], axis=1)
    low, high = np.full((len(along), 2), np.inf), np.full((len(along), 2), -np.inf)
    np.minimum.at(low, owner, flat)
    np.maximum.at(high, owner, flat)
    flat, extent = flat - low[owner], high - low
    upright = extent[:, 1] > extent[:, 0]  # lies down, for low shelves
    flat[upright[owner]], extent[upright] = flat[upright[owner], ::-1], extent[upright, ::-1]
    scale, first = _largest_packing(extent, size)
    return Atlas(size, vertex, first[owner] + PAD + scale * flat, corner.reshape(-1, 3))


def _folded(atlas: Atlas, surface: Surface) -> np.ndarray:
    """Which faces (F,) have their middle in a texel that shows another part of the surface."""
    number, position = atlas.texels(surface.vertices)
    x, y = np.floor(atlas.place[atlas.faces].mean(axis=1)).astype(np.int64).T
    row = np.searchsorted(number, x + atlas.size * y).clip(0, len(number) - 1)
    apart = np.linalg.norm(position[row] - surface.vertices[surface.faces].mean(axis=1), axis=1)
    return (number[row] == x + atlas.size * y) & (apart > FOLD * surface.spacing)


def _axes(surface: Surface) -> np.ndarray:
    """The axis (F,) that each face is seen along: 2 a for -a, 2 a + 1 for +a. Small charts go into their neighbours."""
    normal = surface.normals[surface.faces].sum(axis=1)  # smoother than the faces' own, so charts are larger
    component = np.stack([-normal, normal], axis=2).reshape(-1, 6)
    component /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    axis = component.argmax(axis=1)
    a, b = _neighbours(surface)
    for _ in range(ROUNDS):
        chart = _charts(surface, axis)
        size = np.bincount(chart)
        for one, other in ((a, b), (b, a)):
            better = (size[chart[one]] < SMALL) & (size[chart[other]] > size[chart[one]])
            better &= component[one, axis[other]] > STEEP
            axis[one[better]] = axis[other[better]]
    return axis


def _neighbours(surface: Surface) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of faces, (E,) each, that share an edge."""
    faces = surface.faces
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    key = edges[:, 0] * len(surface.vertices) + edges[:, 1]
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(np.diff(key[order]) == 0)
    return order[same] % len(faces), order[same + 1] % len(faces)


def _charts(surface: Surface, label: np.ndarray) -> np.ndarray:
    """The chart (F,) i64 of each face: what is connected and has one label (F,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = _neighbours(surface)
    joined, count = label[a] == label[b], len(surface.faces)
    graph = coo_array((np.ones(joined.sum(), bool), (a[joined], b[joined])), (count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _largest_packing(extent: np.ndarray, size: int) -> tuple[float, np.ndarray]:
    """Texels per unit at which charts of extents (C, 2) fill the texture, and the corners (C, 2) of their places."""
    low, high = 0.0, size / extent.max()
    for _ in range(16):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _pack(middle * extent, size) is None else (middle, high)
    first = _pack(low * extent, size)
    if first is None:
        raise InputError(f"--texture={size}: is too small for {len(extent):,} patches of the surface; give more, or 0")
    return low, first


def _pack(extent: np.ndarray, size: int) -> np.ndarray | None:
    """Corners (C, 2) of places, on shelves, for charts of extents (C, 2) with PAD around; None: they do not fit."""
    room = np.ceil(extent + 2 * PAD).astype(int)
    first, x, y, height = np.empty((len(room), 2)), 0, 0, 0
    for number in np.lexsort([-room[:, 0], -room[:, 1]]).tolist():
        width, tall = room[number].tolist()
        if x + width > size or height == 0:
            x, y, height = 0, y + height, tall
            if width > size or y + tall > size:
                return None
        first[number] = x, y
        x += width
    return first


def rasterise(
    xy: np.ndarray, depth: np.ndarray, faces: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the pixels show of triangles (F, 3) whose corners (V,) lie at xy (V, 2) px and depths (V,).

    Of the pixels whose centres lie in any triangle, in increasing order: number (N,), nearest face (N,), and
    barycentric coordinates (N, 3) on it, correct in perspective. Triangles with a corner of no positive depth are left
    out.
    """
    faces_at = np.flatnonzero((depth[faces] > 0).all(axis=1))
    corner, z = xy[faces[faces_at]], depth[faces[faces_at]]
    low = np.ceil(corner.min(axis=1) - 0.5).clip(0, [width, height]).astype(np.int64)
    high = np.floor(corner.max(axis=1) - 0.5).clip(-1, [width - 1, height - 1]).astype(np.int64)
    span = (high - low + 1).clip(0)
    count = span.prod(axis=1)
    face = np.repeat(np.arange(len(count)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    x, y = low[face, 0] + within % span[face, 0], low[face, 1] + within // span[face, 0]
    offset = corner[face] - np.stack([x + 0.5, y + 0.5], axis=-1)[:, None]
    part = np.stack([_cross(offset[:, i - 2], offset[:, i - 1]) for i in range(3)], axis=1)
    total = part.sum(axis=1)
    inside = np.flatnonzero(((part * np.sign(total)[:, None]) >= 0).all(axis=1) & (total != 0))
    face, number = face[inside], (x + width * y)[inside]
    share = part[inside] / (total[inside, None] * z[face])
    inverse = share.sum(axis=1)
    order = np.lexsort([-inverse, number])
    number, nearest = np.unique(number[order], return_index=True)
    best = order[nearest]
    return number, faces_at[face[best]], share[best] / inverse[best, None]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
