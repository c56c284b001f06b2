"""The texture of a surface: the field's colours at its texels, then fitted to what the field shows to the views."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxngp.cameras import Cameras, image_size
from jaxngp.console import bar_interval
from jaxngp.exporting.atlas import Atlas, rasterise
from jaxngp.exporting.colours import surface_colours
from jaxngp.exporting.refining import picture_on_black, pinhole
from jaxngp.exporting.surface import Surface, some_views
from jaxngp.runs import Run

FIT_PIXELS = 3e6  # of the views that a texture is fitted to
FIT_SIDE = 512  # px, of the longer side of such a view
OVERSAMPLE = 2  # places of a pixel along each axis
SOLID = 0.95  # opacity of the field from which on a pixel is taken for one of the surface
PRIOR = 0.3  # what a texel's own colour counts for, beside 1 for a pixel that shows it alone
STEPS = 12


def bake(run: Run, surface: Surface, atlas: Atlas) -> np.ndarray:
    """The texture (S, S, 3) f32 of a surface, sRGB in [0, 1]; between the charts the nearest texel's colours.

    A texel starts as the median of what some views see of it (`colours`). Where cameras are known, the texture is then
    changed as little as makes its views most alike to the field's own, by least squares: that evens out what is seen
    differently from elsewhere, since a texture has one colour for all directions.
    """
    number, values = atlas.texels(np.concatenate([surface.vertices, surface.normals], axis=1))
    normals = values[:, 3:] / np.maximum(np.linalg.norm(values[:, 3:], axis=1, keepdims=True), 1e-12)
    colours = surface_colours(run, surface, values[:, :3], normals)
    texture = _dilated(atlas.size, number, colours)
    if run.cameras is not None:
        texture = _fit(run, surface, atlas, texture)
    return texture.reshape(atlas.size, atlas.size, 3).clip(0, 1).astype(np.float32)


def _dilated(size: int, number: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A texture (size^2, 3) with colours (N, 3) at texels (N,), and each other texel that of the nearest one."""
    from scipy.ndimage import distance_transform_edt

    empty = np.ones(size * size, bool)
    empty[number] = False
    y, x = distance_transform_edt(empty.reshape(size, size), return_distances=False, return_indices=True)
    texture = np.zeros((size * size, 3))
    texture[number] = colours
    return texture[(x + size * y).ravel()]


def _fit(run: Run, surface: Surface, atlas: Atlas, texture: np.ndarray) -> np.ndarray:
    """The texture (S^2, 3) that, with a prior that it is as given, explains the field's views best: least squares."""
    from scipy.sparse import vstack

    assert run.cameras is not None
    pixels = math.prod(image_size(pinhole(run.cameras[0], FIT_SIDE)))
    views = some_views(run.cameras, max(int(FIT_PIXELS / pixels), 8))
    assert views is not None
    parts, wanted = [], []
    shown = functools.partial(tqdm, mininterval=bar_interval(), delay=1.0, leave=False)
    for number in shown(range(len(views)), desc="fitting", unit="view"):
        view = pinhole(views[number], FIT_SIDE)
        picture = picture_on_black(run, view).reshape(-1, 4)
        pixel, rows = _readings(view, surface, atlas)
        opacity = 1 - picture[pixel, 3:]
        solid = opacity[:, 0] > SOLID
        parts.append(rows[solid])
        wanted.append((picture[pixel, :3] / opacity)[solid])
    rows = vstack(parts, format="csr")
    return texture + _least_squares(rows, np.concatenate(wanted) - rows @ texture)


def _readings(view: Cameras, surface: Surface, atlas: Atlas) -> tuple[np.ndarray, Any]:
    """The pixels (P,) of a view that show only the surface, and what of each texel they show, (P, S^2) sparse."""
    from scipy.sparse import csr_array

    width, height = image_size(view)
    c2w, k = np.asarray(view.c2w, np.float64), OVERSAMPLE
    local = (surface.vertices - c2w[:, 3]) @ c2w[:, :3]
    depth = np.where(-local[:, 2] > surface.spacing, -local[:, 2], 0)
    xy = local[:, :2] * [1, -1] / np.maximum(depth, surface.spacing)[:, None] * view.focal_xy + view.centre_xy
    place, face, weight = rasterise(k * xy, depth, surface.faces, k * width, k * height)
    pixel = (place // (k * width)) // k * width + (place % (k * width)) // k
    hits = np.bincount(pixel, minlength=width * height)
    full = np.flatnonzero(hits == k * k)
    row = np.cumsum(hits == k * k) - 1
    kept = hits[pixel] == k * k
    texel, share = _bilinear(atlas, np.einsum("nj,njc->nc", weight[kept], atlas.place[atlas.faces[face[kept]]]))
    rows = np.broadcast_to(row[pixel[kept], None], texel.shape)
    shape = (len(full), atlas.size**2)
    return full, csr_array((share.ravel() / k**2, (rows.ravel(), texel.ravel())), shape)


def _bilinear(atlas: Atlas, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texels (N, 4) i32 around places (N, 2), and what each counts for (N, 4) f32."""
    low = np.clip(np.floor(place - 0.5), 0, atlas.size - 2)
    far = (place - 0.5 - low).astype(np.float32)
    x, y = low.astype(np.int32).T
    first = x + atlas.size * y
    texel = np.stack([first, first + 1, first + atlas.size, first + atlas.size + 1], axis=1)
    across, down = np.stack([1 - far[:, 0], far[:, 0]], 1), np.stack([1 - far[:, 1], far[:, 1]], 1)
    return texel, (down[:, :, None] * across[:, None, :]).reshape(-1, 4)


def _least_squares(rows: Any, wanted: np.ndarray) -> np.ndarray:
    """The x (T, C) that minimises |rows x - wanted|^2 + PRIOR |x|^2, wanted (P, C), by conjugate gradients (CGLS)."""
    x, left = np.zeros((rows.shape[1], wanted.shape[1])), wanted
    slope = rows.T @ left
    along, steep = slope, (slope**2).sum(axis=0)
    for _ in range(STEPS):
        change = rows @ along
        length = steep / np.maximum((change**2).sum(axis=0) + PRIOR * (along**2).sum(axis=0), 1e-300)
        x, left = x + length * along, left - length * change
        slope = rows.T @ left - PRIOR * x
        steep, before = (slope**2).sum(axis=0), steep
        along = slope + steep / np.maximum(before, 1e-300) * along
    return x
