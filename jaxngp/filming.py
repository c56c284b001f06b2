"""Frames of a path: several rays a pixel, an aperture, and what a frame shows besides colour."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import Cameras, Rays, image_size, through_aperture, view_rays
from jaxngp.compositing import RenderOutput
from jaxngp.occupancy import OccupancyGrid
from jaxngp.rendering import Field, Sampler, render_ray_grid

GOLDEN = (5**0.5 - 1) / 2
DEPTH_STEPS = 2**16 - 1


def film(
    field: Field,
    camera: Cameras,
    grid: OccupancyGrid | None,
    background: jax.Array,
    *,
    sampler: Sampler,
    samples: int = 1,
    aperture: float = 0.0,
    focus: float = 1.0,
) -> RenderOutput:
    """A frame as numpy arrays, like `rendering.render_view`, but the mean over several rays a pixel.

    samples: rays a pixel, on a lattice that is even for every number; 1 is the pixel's centre. aperture: radius of the
    lens in scene units, 0 for a pinhole. focus: distance of what is sharp, along the optical axis. depth is the mean
    weighted by opacity.
    """
    total = None
    for index in range(samples):
        place = ((index + 0.5) / samples, (index * GOLDEN + 0.5) % 1)
        rays = view_rays(camera, place)
        if aperture:
            lens = aperture * _lens_places(index, samples, image_size(camera))
            rays = through_aperture(camera, rays, jnp.asarray(lens, jnp.float32), jnp.float32(focus))
        out = render_ray_grid(field, rays, grid, background, sampler=sampler)
        part = out.replace(depth=out.depth * out.opacity)  # type: ignore[attr-defined]
        total = part if total is None else jax.tree.map(np.add, total, part)
    if samples == 1:
        return out
    mean = jax.tree.map(lambda a: a / np.float32(samples), total)
    return mean.replace(depth=np.where(mean.opacity > 0, mean.depth / np.where(mean.opacity > 0, mean.opacity, 1), 0))


def _lens_places(index: int, samples: int, size: tuple[int, int]) -> np.ndarray:
    """Where in the unit disc ray `index` of each pixel (H, W, 2) leaves the lens: a sunflower's seed.

    Turned from pixel to pixel, as interleaved gradient noise (Jimenez 2014) says, so that too few samples are seen as
    noise, and not as ghosts of every edge.
    """
    x, y = np.meshgrid(*map(np.arange, size))
    turn = (52.9829189 * ((0.06711056 * x + 0.00583715 * y) % 1)) % 1
    angle = 2 * np.pi * (turn + index * GOLDEN)
    return np.sqrt((index + 0.5) / samples) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def depth_along_axis(camera: Cameras, out: RenderOutput) -> np.ndarray:
    """Depth (H, W) f32 along the optical axis in scene units, 0 where a pixel is more than half transparent."""
    cosine = -np.asarray(view_rays(camera).direction) @ np.asarray(camera.c2w)[:, 2]
    return np.where(np.asarray(out.opacity) > 0.5, np.asarray(out.depth) * cosine, 0).astype(np.float32)


def depth_step(far: float) -> float:
    """What one step of a 16-bit depth map that reaches `far` stands for: a power of ten."""
    return float(10.0 ** np.ceil(np.log10(max(far, 1e-30) / DEPTH_STEPS)))


def straight_alpha(out: RenderOutput, background: jax.Array) -> np.ndarray:
    """The picture (H, W, 4) without its background: colour not multiplied by alpha."""
    opacity = np.asarray(out.opacity)[..., None]
    colour = np.asarray(out.rgb) - (1 - opacity) * np.asarray(background)
    return np.concatenate([colour / np.maximum(opacity, 1e-6), opacity], axis=-1)


def surface_normals(rays: Rays, out: RenderOutput) -> np.ndarray:
    """The unit normals (H, W, 3) f32, in scene axes, of the surface that rays (H, W) of a frame show.

    From the places of neighbouring pixels, to the side where the depth changes less, so that the edge of what is in
    front has its own normal; the gradient of the density, which jumps from cell to cell of a hash encoding, is noise
    beside it. They look towards the camera. 0 where a pixel is more than half transparent.
    """
    depth, direction = np.asarray(out.depth, np.float64), np.asarray(rays.direction, np.float64)
    solid = np.asarray(out.opacity) > 0.5
    place = np.asarray(rays.origin, np.float64) + depth[..., None] * direction
    along_y, along_x = (_flatter_side(place, depth, solid, axis) for axis in (0, 1))
    normal = np.cross(along_x, along_y)
    normal *= np.where(np.sum(normal * direction, axis=-1, keepdims=True) > 0, -1.0, 1.0)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.where(length > 0, normal / np.where(length > 0, length, 1), -direction)
    return np.where(solid[..., None], normal, 0).astype(np.float32)


def _flatter_side(place: np.ndarray, depth: np.ndarray, solid: np.ndarray, axis: int) -> np.ndarray:
    """The step (H, W, 3) to the next or from the previous pixel along an axis, whichever changes the depth less."""
    jump = np.abs(np.diff(depth, axis=axis))
    pair = np.logical_and(*(np.delete(solid, end, axis=axis) for end in (0, -1)))
    jump = np.where(pair, jump, np.inf)
    border = [(0, 0), (0, 0)]
    ahead, behind = list(border), list(border)
    ahead[axis], behind[axis] = (0, 1), (1, 0)
    to_next, from_previous = (np.pad(jump, side, constant_values=np.inf) for side in (ahead, behind))
    step = np.diff(place, axis=axis)
    nearer = to_next <= from_previous
    return np.where(nearer[..., None], *(np.pad(step, [*side, (0, 0)]) for side in (ahead, behind)))
