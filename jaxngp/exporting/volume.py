"""The density on a regular lattice, as arrays in an .npz file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from jaxngp.config import Bounds, Config
from jaxngp.console import bar_interval
from jaxngp.data import SceneTransform
from jaxngp.exporting.surface import density_at, in_calls, occupied
from jaxngp.fields import RadianceField
from jaxngp.occupancy import OccupancyGrid
from jaxngp.records import replacing
from jaxngp.runs import Run

Share = Annotated[
    float, Bounds(0, 1), "side of the middle cube that is exported, in sides of the box; 0: the innermost cascade"
]


@dataclass(frozen=True)
class VolumeOptions(Config):
    """How the density is sampled."""

    resolution: Annotated[int, Bounds(2, 1024), "points per axis of the lattice on which the density is sampled"] = 256
    share: Share = 0.0


def write(run: Run, path: Path, options: VolumeOptions) -> str:
    """Write density (X, Y, Z) f32 per unit of the source, and where its points lie.

    position = origin + axes @ (i, j, k), in the coordinates of the source, for the point of density[i, j, k]; origin
    (3,) and axes (3, 3) are f64.
    """
    size = options.resolution
    box = middle_cube(run.occupancy, options.share)
    density = sample_density(run.field, run.occupancy, box, size)
    origin, axes = lattice_in_world(run.transform, box, size)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, density=density / np.float32(run.transform.side), origin=origin, axes=axes)
    return f"density per unit of the source at {size}^3 points, {np.mean(density > 0):.1%} of them in occupied cells"


def middle_cube(grid: OccupancyGrid | None, share: float = 0.0) -> np.ndarray:
    """The lower and the upper corner (2, 3) of a cube about the middle of the box, in scene units.

    share: its side. 0 is the side of the innermost cascade, which holds what the cameras look at.
    """
    side = share or 2.0 ** (1 - (grid.cells.num_cascades if grid else 1))
    return np.stack([np.full(3, 0.5 - side / 2), np.full(3, 0.5 + side / 2)])


def lattice_in_world(transform: SceneTransform, box: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first point (3,) and the steps (3, 3), as columns, of the lattice of `sample_density` in world units."""
    step = (box[1] - box[0]) / size
    corners = transform.to_world(box[0] + step / 2 + np.concatenate([np.zeros((1, 3)), np.diag(step)]))
    return corners[0], (corners[1:] - corners[0]).T


def sample_density(field: RadianceField, grid: OccupancyGrid | None, box: np.ndarray, size: int) -> np.ndarray:
    """The density (size, size, size) f32 per scene unit in the middles of size^3 equal cells of a box (2, 3).

    It is 0 where the occupancy grid is empty, as it is in rendering.
    """
    step = (box[1] - box[0]) / size
    density = np.zeros((size, size, size), np.float32)
    y, z = (axis.ravel() for axis in np.indices((size, size)))
    for x, layer in enumerate(tqdm(density, desc="sampling", unit="layer", mininterval=bar_interval(), leave=False)):
        points = box[0] + step * (np.stack([np.full_like(y, x), y, z], axis=-1) + 0.5)
        held = np.ones(len(points), bool) if grid is None else occupied(grid, points)
        if held.any():
            layer.reshape(-1)[held] = in_calls(density_at, field, points[held], said="")
    return density
