"""Pinhole cameras: pixels to rays and back.

Frames: c2w follows OpenGL (x right, y up, the camera looks along -z). Pixel coordinates have x to the right and
y down, and the centre of pixel (i, j) lies at (i + 0.5, j + 0.5). Scene units: the scene's box is [0, 1]^3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike


@struct.dataclass
class Camera:
    """A pinhole camera: a static image size, and focal length and principal point in pixels."""

    focal_xy: jax.Array  # (2,) px
    centre_xy: jax.Array  # (2,) px
    width: int = struct.field(pytree_node=False)
    height: int = struct.field(pytree_node=False)


@struct.dataclass
class Rays:
    """origin (..., 3) in scene units; direction (..., 3) of unit length, so that t is a distance."""

    origin: jax.Array
    direction: jax.Array


@struct.dataclass
class PosedImages:
    """V views that one camera took from V poses."""

    camera: Camera
    c2w: jax.Array  # (V, 3, 4) f32, camera to scene units
    rgba: jax.Array  # (V, H, W, 4) u8, sRGB, colour not multiplied by alpha


def pixel_to_ray(camera: Camera, c2w: jax.Array, pixel_xy: jax.Array) -> Rays:
    """The ray through a pixel coordinate. c2w (..., 3, 4), pixel_xy (..., 2) -> Rays (...)."""
    xy = (pixel_xy - camera.centre_xy) / camera.focal_xy
    x, y = xy[..., 0], -xy[..., 1]
    # Products and sums written out, not a matmul: an accelerator may round a matmul's inputs to bfloat16, and a CPU
    # takes a hundred times as long for thousands of small ones.
    dx, dy, dz = (c2w[..., axis, 0] * x + c2w[..., axis, 1] * y - c2w[..., axis, 2] for axis in range(3))
    inverse_length = 1 / jnp.sqrt(dx**2 + dy**2 + dz**2)
    direction = jnp.stack([dx, dy, dz], axis=-1) * inverse_length[..., None]
    return Rays(origin=jnp.broadcast_to(c2w[..., 3], direction.shape), direction=direction)


def point_to_pixel(camera: Camera, c2w: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a camera sees a point. c2w (..., 3, 4), position (..., 3) -> pixel_xy (..., 2), depth (...) along -z.

    Only a positive depth means that the point is before the camera; behind it the pixel has no meaning.
    """
    x, y, depth = project(camera, c2w, *(position[..., axis] for axis in range(3)))
    return jnp.stack([x, y], axis=-1), depth


def project(
    camera: Camera, c2w: jax.Array, x: jax.Array, y: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`point_to_pixel` with one array (...) per axis, in and out; large inputs are spared the (..., 3) temporaries."""
    offset = (x - c2w[..., 0, 3], y - c2w[..., 1, 3], z - c2w[..., 2, 3])
    local_x, local_y, local_z = (
        c2w[..., 0, axis] * offset[0] + c2w[..., 1, axis] * offset[1] + c2w[..., 2, axis] * offset[2]
        for axis in range(3)
    )
    inverse = 1 / jnp.where(jnp.abs(local_z) > 1e-9, -local_z, 1e-9)
    pixel_x = local_x * inverse * camera.focal_xy[0] + camera.centre_xy[0]
    pixel_y = -local_y * inverse * camera.focal_xy[1] + camera.centre_xy[1]
    return pixel_x, pixel_y, -local_z


def view_rays(camera: Camera, c2w: jax.Array) -> Rays:
    """The rays through all pixel centres of one view. c2w (3, 4) -> Rays (H, W)."""
    x, y = jnp.meshgrid(jnp.arange(camera.width) + 0.5, jnp.arange(camera.height) + 0.5)
    return pixel_to_ray(camera, c2w, jnp.stack([x, y], axis=-1).astype(jnp.float32))


def world_to_scene(c2w: jax.Array, box_centre: tuple[float, float, float], box_side: float) -> jax.Array:
    """c2w (..., 3, 4) from world units to scene units, in which the given box is [0, 1]^3."""
    position = (c2w[..., 3] - jnp.asarray(box_centre, c2w.dtype)) / box_side + 0.5
    return jnp.concatenate([c2w[..., :3], position[..., None]], axis=-1)


def resize_camera(camera: Camera, width: int, height: int) -> Camera:
    """The camera with another image size and the same vertical field of view, its principal point in proportion."""
    scale = jnp.array([width / camera.width, height / camera.height])
    return Camera(
        focal_xy=jnp.asarray(camera.focal_xy) * (height / camera.height),
        centre_xy=jnp.asarray(camera.centre_xy) * scale,
        width=width,
        height=height,
    )


def look_at(position: ArrayLike, target: ArrayLike, up: ArrayLike) -> np.ndarray:
    """c2w (3, 4) f32 of a camera at `position` that looks at `target`, with `up` upwards in its picture; (3,) each."""
    position, up = np.asarray(position, np.float64), np.asarray(up, np.float64)
    backward = position - np.asarray(target, np.float64)
    backward /= np.linalg.norm(backward)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward, position], axis=-1).astype(np.float32)


def orbit_poses(c2w: np.ndarray, num_poses: int) -> np.ndarray:
    """Poses (num_poses, 3, 4) on a circle about the vertical axis through the middle of the unit cube.

    Distance and height over the middle are the medians of those of c2w (V, 3, 4), the poses of a scene; z is up.
    """
    middle = np.full(3, 0.5)
    offset = np.asarray(c2w, np.float64)[:, :, 3] - middle
    distance, height = np.median(np.linalg.norm(offset, axis=1)), np.median(offset[:, 2])
    height = np.clip(height, -0.9 * distance, 0.9 * distance)
    radius = np.sqrt(distance**2 - height**2)
    angle = np.arange(num_poses) * 2 * np.pi / num_poses
    origin = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(num_poses, height)], axis=-1)
    backward = origin / distance
    right = np.stack([-np.sin(angle), np.cos(angle), np.zeros(num_poses)], axis=-1)
    up = np.cross(backward, right)
    return np.stack([right, up, backward, origin + middle], axis=-1).astype(np.float32)
