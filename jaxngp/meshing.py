"""From a signed distance to triangles: sampled where its surface may be, then marching cubes (scikit-image's)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxngp.config import InputError
from jaxngp.tracing import MakeDistance

BLOCK = 8  # points per side of what is sampled together, or not at all
BATCH = 2**9  # blocks in one call
SAFETY = 1.5  # how many times as fast as a distance the function may change, for no surface to be missed


def sample_volume(
    params: Any, box: np.ndarray, resolution: int, *, make_distance: MakeDistance
) -> tuple[np.ndarray, np.ndarray, float]:
    """The distance on a lattice over a box (2, 3) f64: values (X, Y, Z) f32, the first point (3,), and the spacing.

    `resolution` points lie along the longest side, and the outermost ones outside the box. Where the middle of a block
    of points is farther from the surface than the block can reach, all of its points get the middle's value: of a
    512^3 lattice a twentieth is evaluated.
    """
    spacing = float((box[1] - box[0]).max()) / (resolution - 1)
    blocks = np.ceil(((box[1] - box[0]) / spacing + 3) / BLOCK).astype(int)
    first = 0.5 * (box[0] + box[1]) - 0.5 * spacing * (blocks * BLOCK - 1)
    distance = _program(make_distance)

    def evaluate(points: np.ndarray, description: str) -> np.ndarray:
        """(N,) f32 at points (N, 3), in calls of one size."""
        size, found = BATCH * BLOCK**3, []
        starts = range(0, len(points), size)
        for start in tqdm(starts, desc=description, delay=1.0, disable=None, leave=False):
            part = points[start : start + size].astype(np.float32)
            padded = np.pad(part, ((0, size - len(part)), (0, 0)), mode="edge")
            found.append(np.asarray(distance(params, padded))[: len(part)])
        return np.concatenate([np.zeros(0, np.float32), *found])

    number = np.stack(np.meshgrid(*map(np.arange, blocks), indexing="ij"), axis=-1).reshape(-1, 3)
    middles = first + spacing * (number * BLOCK + 0.5 * (BLOCK - 1))
    middle = evaluate(middles, "looking for the surface")
    reach = 0.5 * np.sqrt(3) * BLOCK * spacing * SAFETY
    near = np.flatnonzero(np.abs(middle) < reach)
    inside = np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    values = np.repeat(middle[:, None], BLOCK**3, axis=1)
    for start in range(0, len(near), BATCH):
        rows = near[start : start + BATCH]
        points = first + spacing * (number[rows, None] * BLOCK + inside)
        values[rows] = evaluate(points.reshape(-1, 3), "sampling").reshape(len(rows), -1)
    lattice = values.reshape(*blocks, BLOCK, BLOCK, BLOCK).transpose(0, 3, 1, 4, 2, 5)
    return lattice.reshape(*(blocks * BLOCK)), first, spacing


def _program(make_distance: MakeDistance) -> Callable[[Any, np.ndarray], jax.Array]:
    return jax.jit(lambda params, points: make_distance(params)(jnp.asarray(points)))


def extract_surface(
    params: Any, box: np.ndarray, resolution: int, *, make_distance: MakeDistance
) -> tuple[np.ndarray, np.ndarray]:
    """The surface where the distance is 0: vertices (V, 3) f64 in scene units, faces (F, 3) that look out.

    Marching cubes (Lorensen and Cline 1987, in the variant of Lewiner et al. 2003). The surface is closed: what lies
    outside the box is taken for outside the solid, whatever the distance says there. Raises InputError where
    scikit-image is missing, and where there is no surface.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise InputError("scikit-image, which extracts meshes, is not installed: pip install .[mesh]") from None
    volume, first, spacing = sample_volume(params, box, resolution, make_distance=make_distance)
    _close(volume, box, first, spacing)
    if not volume.min() < 0 < volume.max():
        raise InputError(f"the distance lies between {volume.min():.3g} and {volume.max():.3g}: there is no surface")
    vertices, faces, _, _ = marching_cubes(volume, level=0.0, gradient_direction="descent", allow_degenerate=False)
    return first + spacing * vertices.astype(np.float64), faces.astype(np.int64)


def _close(volume: np.ndarray, box: np.ndarray, first: np.ndarray, spacing: float) -> None:
    """Make the distance at points outside the box at least half a spacing, in place."""
    for axis, count in enumerate(volume.shape):
        along = first[axis] + spacing * np.arange(count)
        beyond = (along < box[0, axis]) | (along > box[1, axis])
        layers = np.moveaxis(volume, axis, 0)
        layers[beyond] = np.maximum(layers[beyond], 0.5 * spacing)
