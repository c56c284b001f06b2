"""Gaussian splats, as 3DGS's PLY or as glTF (KHR_gaussian_splatting).

Flat discs on what the training views see, refined until they look like the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.config import Bounds, Config
from jaxngp.encodings import sh_encode
from jaxngp.exporting.files import Glb, axes_of, write_ply
from jaxngp.exporting.points import find_points
from jaxngp.exporting.refining import refine
from jaxngp.exporting.splatting import FAINTEST, Gaussians
from jaxngp.exporting.surface import step_size
from jaxngp.runs import Run

C0 = 0.28209479  # the harmonic of band 0
SINK = 0.75  # steps by which a disc lies behind its point
WIDTH = 0.5  # of a disc: its deviation in distances to its neighbours
FLATNESS = 0.15  # thickness of a disc over its width
COVER = 0.7  # opacity in the middle of a disc
EXTENSION = "KHR_gaussian_splatting"


@dataclass(frozen=True)
class SplatOptions(Config):
    """How many splats, and how they are refined."""

    splats: Annotated[int, Bounds(16, 2**24), "number of splats"] = 25_000
    degree: Annotated[
        int,
        Bounds(0, 3),
        "how finely colours change with the direction of view, in spherical harmonics",
    ] = 2
    steps: Annotated[int, Bounds(0, 10**6), "steps that refine them, one view each; 0: discs as they are found"] = 800
    side: Annotated[int, Bounds(16, 4096), "pixels along the longer side of the views they are refined on"] = 256
    seed: Annotated[int, Bounds(0, below=2**32), "seed of the random rays and of the order of the views"] = 0


@dataclass(frozen=True)
class Splats:
    """N Gaussians in the coordinates of the source."""

    position: np.ndarray  # (N, 3) f64
    scale: np.ndarray  # (N, 3), standard deviations
    rotation: np.ndarray  # (N, 4), unit quaternions xyzw
    opacity: np.ndarray  # (N,) in (0, 1)
    harmonics: np.ndarray  # (N, (degree + 1)^2, 3), of sRGB - 1/2 towards directions from the eye


def write(run: Run, path: Path, options: SplatOptions) -> str:
    """Write the splats, by the suffix of the path."""
    writers = {".ply": write_splat_ply, ".glb": write_splat_glb}
    splats = make_splats(run, options)
    writers[path.suffix.lower()](run, path, splats)
    return f"{len(splats.position):,} splats"


def make_splats(run: Run, options: SplatOptions) -> Splats:
    """Discs at the points of `find_points`, refined, without those that have become too faint to be drawn."""
    gaussians, spacing = _discs(run, options)
    if options.steps:
        gaussians = refine(run, gaussians, spacing, steps=options.steps, side=options.side, seed=options.seed)
    position, scale, rotation, logit, harmonics = (np.asarray(a, np.float64).T for a in jax.tree.leaves(gaussians))
    opacity = 1 / (1 + np.exp(-logit))
    kept = opacity >= FAINTEST
    return _in_world(run, position[kept], np.exp(scale[kept]), rotation[kept], opacity[kept], harmonics.mT[kept])


def _discs(run: Run, options: SplatOptions) -> tuple[Gaussians, np.ndarray]:
    """A disc at right angles to the normal of each point, and the distance (N,) to its neighbours, in scene units."""
    from scipy.spatial import cKDTree
    from scipy.spatial.transform import Rotation

    points = find_points(run, options.splats, options.seed)
    place, normal, far = (np.asarray(a, np.float64) for a in (points.position, points.normal, points.distance))
    distance, _ = cKDTree(place).query(place, k=7)
    spacing = np.sqrt(np.mean(distance[:, 1:] ** 2, axis=1)) / far
    spacing = np.minimum(spacing, 1.5 * np.median(spacing)) * far
    # Where half of the light is lost lies before the surface; a disc there would swell its outline.
    middle = place - SINK * step_size(run.config.sampler) * normal
    harmonics = np.zeros(((options.degree + 1) ** 2, 3, len(place)))
    harmonics[0] = (np.asarray(points.rgb).T - 0.5) / C0
    values = (
        middle.T,
        np.log(WIDTH * spacing + 1e-9) + np.log([1, 1, FLATNESS])[:, None],
        Rotation.from_matrix(np.stack(_frame(normal), axis=-1)).as_quat().T,
        np.full(len(place), np.log(COVER / (1 - COVER))),
        harmonics,
    )
    return Gaussians(*(jnp.asarray(a, jnp.float32) for a in values)), spacing


def _in_world(
    run: Run,
    position: np.ndarray,
    scale: np.ndarray,
    rotation: np.ndarray,
    opacity: np.ndarray,
    harmonics: np.ndarray,
) -> Splats:
    """Splats from those (N, ...) in scene units."""
    from scipy.spatial.transform import Rotation

    turn = np.array(run.transform.rotation)  # of the world's axes to the scene's
    # Each band turns within itself: what directions that span them see gives the turned harmonics exactly.
    direction = np.random.default_rng(0).normal(size=(64, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    before, after = (_basis(a, harmonics.shape[1]) for a in (direction, direction @ turn))
    return Splats(
        run.transform.to_world(position),
        scale * run.transform.side,
        (Rotation.from_matrix(turn.T) * Rotation.from_quat(rotation)).as_quat(),
        opacity,
        np.linalg.lstsq(after, before)[0] @ harmonics,
    )


def _basis(direction: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(sh_encode(jnp.asarray(direction), degree=round(count**0.5)), np.float64)


def _frame(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two unit vectors across unit vectors (N, 3), and those: right-handed."""
    helper = np.where(np.abs(normal[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    first = np.cross(helper, normal)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(normal, first), normal


def write_splat_ply(run: Run, path: Path, splats: Splats) -> None:  # noqa: ARG001
    """The layout of 3DGS: logarithms of scales, log odds of opacities, quaternions wxyz, harmonics by channel."""
    rest = np.swapaxes(splats.harmonics[:, 1:], 1, 2).reshape(len(splats.position), -1)
    columns = axes_of("x y z", splats.position) | axes_of("nx ny nz", np.zeros_like(splats.position))
    columns |= axes_of("f_dc_0 f_dc_1 f_dc_2", splats.harmonics[:, 0])
    columns |= axes_of(" ".join(f"f_rest_{i}" for i in range(rest.shape[1])), rest)
    columns |= {"opacity": np.log(splats.opacity) - np.log1p(-splats.opacity)}
    columns |= axes_of("scale_0 scale_1 scale_2", np.log(splats.scale))
    columns |= axes_of("rot_0 rot_1 rot_2 rot_3", splats.rotation[:, [3, 0, 1, 2]])
    write_ply(path, {name: values.astype(np.float32) for name, values in columns.items()})


def write_splat_glb(run: Run, path: Path, splats: Splats) -> None:
    """Points with the attributes of KHR_gaussian_splatting, whose scales and opacities are linear, not logarithms.

    So says its release candidate (KhronosGroup/glTF 63770cc, April 2026); a draft of 2025 had logarithms of scales.
    Harmonics turn with the node. Programs that do not know the extension draw coloured points.
    """
    glb = Glb(run.transform)
    flat = (0.5 + C0 * splats.harmonics[:, 0]).clip(0, 1)
    attributes = {"POSITION": glb.positions(splats.position), "COLOR_0": glb.colours(flat, splats.opacity)}
    named = {"ROTATION": splats.rotation, "SCALE": splats.scale, "OPACITY": splats.opacity}
    for degree in range(round(splats.harmonics.shape[1] ** 0.5)):
        for number in range(2 * degree + 1):
            named[f"SH_DEGREE_{degree}_COEF_{number}"] = splats.harmonics[:, degree**2 + number]
    attributes |= {f"{EXTENSION}:{name}": glb.array(values.astype(np.float32)) for name, values in named.items()}
    kind = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    primitive = {"attributes": attributes, "mode": 0, "extensions": {EXTENSION: kind}}
    glb.json |= {"meshes": [{"primitives": [primitive]}], "extensionsUsed": [EXTENSION]}
    glb.write(path)
