"""Gaussian splats: flat discs on what the training views see, as 3DGS's PLY or as glTF (KHR_gaussian_splatting)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from jaxngp.config import Bounds, Config
from jaxngp.encodings import sh_encode
from jaxngp.exporting.colours import look_from
from jaxngp.exporting.files import Glb, axes_of, write_ply
from jaxngp.exporting.points import find_points
from jaxngp.exporting.surface import some_views, step_size, visibility
from jaxngp.runs import Run

C0 = 0.28209479  # the harmonic of band 0
NUM_VIEWS = 16  # that a splat's colours are fitted to
SINK = 0.75  # steps by which a disc lies behind its point
CALM = 0.5  # ridge on the harmonics above band 0
EXTENSION = "KHR_gaussian_splatting"


@dataclass(frozen=True)
class SplatOptions(Config):
    """How many splats, and how they look."""

    splats: Annotated[int, Bounds(16, 2**24), "number of splats"] = 100_000
    degree: Annotated[int, Bounds(0, 3), "of the spherical harmonics of their colours"] = 2
    width: Annotated[float, Bounds(above=0, high=10), "of a disc: its deviation in distances to its neighbours"] = 0.5
    flatness: Annotated[float, Bounds(above=0, high=1), "thickness of a disc over its width"] = 0.15
    cover: Annotated[float, Bounds(above=0, below=1), "opacity in the middle of a disc"] = 0.5
    seed: Annotated[int, Bounds(0, below=2**32), "of the rays that are drawn"] = 0


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
    """A disc for each of the points of `find_points`, at right angles to its normal."""
    from scipy.spatial import cKDTree
    from scipy.spatial.transform import Rotation

    points = find_points(run, options.splats, options.seed)
    place, normal = np.asarray(points.position, np.float64), np.asarray(points.normal, np.float64)
    distance, _ = cKDTree(place).query(place, k=7)
    distance = np.sqrt(np.mean(distance[:, 1:] ** 2, axis=1))
    spread = np.minimum(distance, 1.5 * np.median(distance)) * options.width
    axes = np.stack(_frame(normal), axis=-1)
    turn = np.array(run.transform.rotation).T
    # Where half of the light is lost lies before the surface; a disc there would swell its outline.
    middle = place - SINK * step_size(run.config.sampler) * normal
    return Splats(
        run.transform.to_world(middle),
        spread[:, None] * run.transform.side * np.array([1, 1, options.flatness]),
        Rotation.from_matrix(turn @ axes).as_quat(),
        np.full(len(place), options.cover),
        _fit_colours(run, place, normal, float(np.median(distance)), options.degree),
    )


def _frame(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two unit vectors across unit vectors (N, 3), and those: right-handed."""
    helper = np.where(np.abs(normal[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    first = np.cross(helper, normal)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(normal, first), normal


def _fit_colours(run: Run, place: np.ndarray, normal: np.ndarray, spacing: float, degree: int) -> np.ndarray:
    """The harmonics (N, (degree + 1)^2, 3) that fit what the field shows the views that see the points (N, 3).

    Least squares with a ridge: a splat is seen from few sides, and must not take wild colours from others.
    """
    views = some_views(run.cameras)
    assert views is not None  # find_points has cameras
    visible = visibility(views, place, place, 2 * spacing)
    seen, directions = look_from(run.field, views, visible, place, normal, spacing, NUM_VIEWS)
    basis = np.asarray(sh_encode(jnp.asarray(directions @ np.array(run.transform.rotation)), degree=degree + 1))
    gram = np.einsum("vnj,vnk->njk", basis, basis)
    gram += CALM * np.diag([0.0, *[1.0] * ((degree + 1) ** 2 - 1)]) + 1e-6 * np.eye((degree + 1) ** 2)
    return np.linalg.solve(gram, np.einsum("vnj,vnc->njc", basis, seen - 0.5))


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
    """Points with the attributes of KHR_gaussian_splatting, whose scales and opacities are plain numbers.

    Programs that do not know the extension draw coloured points.
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
