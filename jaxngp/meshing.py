"""From a signed distance to triangles: sampled where its surface may be, then marching cubes (scikit-image's)."""

from __future__ import annotations

import jax
import numpy as np
from tqdm import tqdm

from jaxngp.config import InputError
from jaxngp.tracing import Distance

BLOCK = 8  # points per side of what is sampled together, or not at all
BATCH = 2**9  # blocks in one call
CALL = BATCH * BLOCK**3  # points
SAFETY = 1.5  # how many times as fast as a distance the function may change, for no surface to be missed


def sample_volume(distance: Distance, box: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The distance on a lattice over a box (2, 3) f64: values (X, Y, Z) f32, the first point (3,), and the spacing.

    `resolution` points lie along the longest side, and the outermost ones outside the box, where the distance is at
    least that to the box: nothing was learned there, and the solid lies in its box. Where the middle of a block
    of points is farther from the surface than the block can reach, all of its points get the middle's value: of a
    512^3 lattice a twentieth is evaluated.
    """
    spacing = float((box[1] - box[0]).max()) / (resolution - 1)
    blocks = np.ceil(((box[1] - box[0]) / spacing + 3) / BLOCK).astype(int)
    first = 0.5 * (box[0] + box[1]) - 0.5 * spacing * (blocks * BLOCK - 1)
    inner = box + 0.5 * spacing * BLOCK * np.array([[1.0], [-1.0]])  # a block with its middle in it lies in the box

    def evaluate(points: np.ndarray) -> np.ndarray:
        """(N,) f32 at up to CALL points (N, 3)."""
        padded = np.pad(points.astype(np.float32), ((0, CALL - len(points)), (0, 0)), mode="edge")
        return np.maximum(np.asarray(_evaluate(distance, padded))[: len(points)], _beyond(points, box))

    number = np.stack(np.meshgrid(*map(np.arange, blocks), indexing="ij"), axis=-1).reshape(-1, 3)
    middles = first + spacing * (number * BLOCK + 0.5 * (BLOCK - 1))
    middle = np.concatenate([evaluate(middles[start : start + CALL]) for start in range(0, len(middles), CALL)])
    reach = 0.5 * np.sqrt(3) * BLOCK * spacing * SAFETY
    near = np.flatnonzero((np.abs(middle) < reach) | ((middle < 0) & (_beyond(middles, inner) > 0)))
    inside = np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    volume = np.empty(blocks * BLOCK, np.float32)
    parts = volume.reshape(blocks[0], BLOCK, blocks[1], BLOCK, blocks[2], BLOCK)
    parts[:] = middle.reshape(blocks[0], 1, blocks[1], 1, blocks[2], 1)
    for start in tqdm(range(0, len(near), BATCH), desc="sampling", delay=1.0, disable=None, leave=False):
        block = number[near[start : start + BATCH]]
        points = first + spacing * (block[:, None] * BLOCK + inside)
        x, y, z = block.T
        parts[x, :, y, :, z] = evaluate(points.reshape(-1, 3)).reshape(-1, BLOCK, BLOCK, BLOCK)
    return volume, first, spacing


def _beyond(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(N,) f32 distance from points (N, 3) outside the box to it; minus infinity inside."""
    excess = np.maximum(np.maximum(box[0] - points, points - box[1]), 0)
    distance = np.sqrt(np.sum(excess**2, axis=1))
    return np.where(distance > 0, distance, -np.inf).astype(np.float32)


@jax.jit
def _evaluate(distance: Distance, points: jax.Array) -> jax.Array:
    return distance(points)


def extract_surface(distance: Distance, box: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """The surface where the distance is 0: vertices (V, 3) f64 in scene units, faces (F, 3) that look out.

    Marching cubes (Lorensen and Cline 1987, in the variant of Lewiner et al. 2003). The surface is closed, since what
    lies outside the box is outside the solid. Raises InputError where scikit-image is missing, and where there is no
    surface.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise InputError("scikit-image, which extracts meshes, is not installed: pip install .[mesh]") from None
    volume, first, spacing = sample_volume(distance, box, resolution)
    if not volume.min() < 0 < volume.max():
        raise InputError(f"the distance lies between {volume.min():.3g} and {volume.max():.3g}: there is no surface")
    vertices, faces, _, _ = marching_cubes(volume, level=0.0, gradient_direction="descent", allow_degenerate=False)
    return first + spacing * vertices.astype(np.float64), faces.astype(np.int64)
