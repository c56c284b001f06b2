"""Cameras: pixels to rays and back, and the poses of a path.

Frames: c2w follows OpenGL (x right, y up, the camera looks along -z). Pixel coordinates have x to the right and
y down, and the centre of pixel (i, j) lies at (i + 0.5, j + 0.5). Scene units: the scene's box is [0, 1]^3.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from jaxngp.lenses import Lens, distort, undistort


@struct.dataclass
class Cameras:
    """Cameras, one a view: pose, intrinsics, lens and image size. (...) is the batch, () for a single camera.

    All are arrays, so that rays can be differentiated in poses, intrinsics and lens. `cameras[index]` is some of them.
    """

    c2w: jax.Array  # (..., 3, 4) f32, camera to scene units
    focal_xy: jax.Array  # (..., 2) f32 px
    centre_xy: jax.Array  # (..., 2) f32 px, the principal point
    size: jax.Array  # (..., 2) i32 px, width and height
    lens: Lens | None = None  # None for pinholes

    def __getitem__(self, index: Any) -> Cameras:
        return jax.tree.map(lambda array: array[index], self)

    def __len__(self) -> int:
        if self.c2w.ndim < 3:
            raise TypeError("a single camera has no length")
        return len(self.c2w)

    def cast(self, view: jax.Array, xy: jax.Array) -> Rays:
        """The rays (R,) through pixel coordinates xy (R, 2) of views (R,) i32."""
        return unproject(self[view], xy)


@struct.dataclass
class Rays:
    """origin (..., 3) in scene units; direction (..., 3) of unit length, so that t is a distance."""

    origin: jax.Array
    direction: jax.Array

    def __getitem__(self, index: Any) -> Rays:
        return jax.tree.map(lambda array: array[index], self)


@struct.dataclass
class PosedImages:
    """V views, of any sizes: their cameras, and all their pixels one after the other, row by row.

    A pixel has the number offset[view] + x + width y.
    """

    cameras: Cameras  # (V,)
    rgba: jax.Array  # (P, 4) u8, sRGB, colour not multiplied by alpha
    offset: jax.Array  # (V,) i32, the number of each view's first pixel
    max_size: tuple[int, int] = struct.field(pytree_node=False)  # the largest width, the largest height
    keep: jax.Array | None = None  # (P,) bool: whether a pixel takes part, or is masked; None where all do
    depth: jax.Array | None = None  # (P,) f16 or f32, distance along the pixel's ray, 0 where unknown; None: no depths

    @property
    def num_pixels(self) -> int:
        return self.rgba.shape[0]

    @property
    def source(self) -> Cameras:
        """Where the rays of its pixels come from."""
        return self.cameras

    @property
    def alpha(self) -> jax.Array:
        """(P,) u8."""
        return self.rgba[:, 3]

    def pixel(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of pixels by their numbers (R,) i32: view (R,) i32, centre xy (R, 2) f32, and rgba (R, 4) f32 in [0, 1]."""
        return *pixel_place(self, number), self.rgba[number].astype(jnp.float32) / 255

    def pixel_depth(self, number: jax.Array) -> jax.Array | None:
        """The known depths (R,) f32 of pixels, 0 where unknown; None without any."""
        return None if self.depth is None else self.depth[number].astype(jnp.float32)

    def image(self, view: int) -> np.ndarray:
        """(H, W, 4) u8 of one view, as a numpy array."""
        return self._of_view(self.rgba, view)

    def mask(self, view: int) -> np.ndarray | None:
        """(H, W) bool, whether each pixel of one view takes part, as a numpy array; None where all do."""
        return None if self.keep is None else self._of_view(self.keep, view)

    def masked_share(self) -> np.ndarray:
        """(V,) f64: the share of each view's pixels that is masked."""
        if self.keep is None:
            return np.zeros(len(self.offset))
        return np.array([1 - np.mean(part) for part in np.split(np.asarray(self.keep), np.asarray(self.offset)[1:])])

    def _of_view(self, pixels: jax.Array, view: int) -> np.ndarray:
        width, height = image_size(self.cameras[view])
        start = int(self.offset[view])
        return np.asarray(pixels[start : start + width * height]).reshape(height, width, *pixels.shape[1:])


class Pixels(Protocol):
    """Views of any sizes whose pixels are numbered as those of `PosedImages`, wherever their colours are."""

    @property
    def cameras(self) -> Cameras: ...
    @property
    def offset(self) -> jax.Array: ...
    @property
    def max_size(self) -> tuple[int, int]: ...
    @property
    def num_pixels(self) -> int: ...


def pixel_place(pixels: Pixels, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where pixels are, by their numbers (R,) i32: view (R,) i32, and centre xy (R, 2) f32."""
    width, height = pixels.max_size
    row: int | jax.Array = width
    if pixels.num_pixels == len(pixels.offset) * width * height:  # one size: divisors that are known
        view, within = number // (width * height), number % (width * height)
    else:
        view = jnp.searchsorted(pixels.offset, number, side="right", method="scan_unrolled").astype(jnp.int32) - 1
        within, row = number - pixels.offset[view], pixels.cameras.size[view, 0]
    return view, jnp.stack([within % row, within // row], axis=-1).astype(jnp.float32) + 0.5


def make_cameras(
    c2w: ArrayLike,
    *,
    focal_xy: ArrayLike,
    centre_xy: ArrayLike,
    width: ArrayLike,
    height: ArrayLike,
    lens: Lens | None = None,
) -> Cameras:
    """Cameras (...) as numpy arrays, from poses (..., 3, 4) and intrinsics of each or one for all.

    >>> cameras = make_cameras(np.eye(3, 4)[None], focal_xy=100, centre_xy=(32, 24), width=64, height=48)
    >>> len(cameras), image_size(cameras[0])
    (1, (64, 48))
    """
    c2w = np.asarray(c2w, np.float32)
    batch = c2w.shape[:-2]
    size = np.stack(np.broadcast_arrays(width, height), axis=-1)
    focal, centre = (np.broadcast_to(np.asarray(a, np.float32), (*batch, 2)) for a in (focal_xy, centre_xy))
    return Cameras(c2w, focal, centre, np.broadcast_to(size.astype(np.int32), (*batch, 2)), lens)  # type: ignore[arg-type]


def pose_images(cameras: Cameras, images: list[np.ndarray] | np.ndarray) -> PosedImages:
    """Views from their cameras (V,) and images (H, W, 4) u8, as numpy arrays. Raises ValueError for other shapes.

    >>> cameras = make_cameras(np.eye(3, 4)[None], focal_xy=1, centre_xy=1, width=2, height=2)
    >>> pose_images(cameras, [np.zeros((2, 2, 4), np.uint8)]).image(0).shape
    (2, 2, 4)
    """
    for shape in {image.shape for image in images}:
        if len(shape) != 3 or shape[2] != 4:
            raise ValueError(f"an image has shape {shape}: expected (H, W, 4), red, green, blue and alpha")
    sizes = np.array([(image.shape[1], image.shape[0]) for image in images], np.int64)
    ends = np.cumsum(sizes[:, 0] * sizes[:, 1])
    uniform = isinstance(images, np.ndarray)
    rgba = np.reshape(images, (-1, 4)) if uniform else np.concatenate([image.reshape(-1, 4) for image in images])
    offset = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    width, height = (int(n) for n in sizes.max(axis=0))
    return PosedImages(cameras, rgba, offset, (width, height))  # type: ignore[arg-type]


def image_size(camera: Cameras) -> tuple[int, int]:
    """(width, height) in pixels of a single camera whose arrays are concrete."""
    width, height = np.asarray(camera.size).tolist()
    return width, height


def unproject(cameras: Cameras, pixel_xy: jax.Array) -> Rays:
    """The rays through pixel coordinates. cameras (...), pixel_xy (..., 2) -> Rays (...).

    >>> camera = make_cameras(np.eye(3, 4), focal_xy=100, centre_xy=(32, 24), width=64, height=48)
    >>> unproject(camera, jnp.array([32.0, 24.0])).direction.tolist()
    [0.0, 0.0, -1.0]
    """
    xy = (pixel_xy - cameras.centre_xy) * (1 / cameras.focal_xy)
    x, y, c2w = xy[..., 0], -xy[..., 1], cameras.c2w
    # Products and sums written out, not a matmul: an accelerator may round a matmul's inputs to bfloat16, and a CPU
    # takes a hundred times as long for thousands of small ones.
    if cameras.lens is None:
        dx, dy, dz = (c2w[..., axis, 0] * x + c2w[..., axis, 1] * y - c2w[..., axis, 2] for axis in range(3))
    else:
        x, y, z = undistort(cameras.lens, x, -y)
        dx, dy, dz = (c2w[..., axis, 0] * x - c2w[..., axis, 1] * y - c2w[..., axis, 2] * z for axis in range(3))
    inverse_length = 1 / jnp.sqrt(dx**2 + dy**2 + dz**2)
    direction = jnp.stack([dx, dy, dz], axis=-1) * inverse_length[..., None]
    return Rays(origin=jnp.broadcast_to(c2w[..., 3], direction.shape), direction=direction)


def project(cameras: Cameras, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where cameras see points. cameras (...), position (..., 3) -> pixel_xy (..., 2), depth (...).

    Only where the depth is positive does the camera show the point; elsewhere the pixel has no meaning. Of a pinhole it
    is the depth along -z; with a lens, which may look sideways, the distance, negated for a point it does not show.

    >>> camera = make_cameras(np.eye(3, 4), focal_xy=100, centre_xy=(32, 24), width=64, height=48)
    >>> xy, depth = project(camera, jnp.array([0.0, 0.0, -2.0]))
    >>> xy.tolist(), float(depth)
    ([32.0, 24.0], 2.0)
    """
    x, y, depth = project_axes(cameras, *(position[..., axis] for axis in range(3)))
    return jnp.stack([x, y], axis=-1), depth


def project_axes(cameras: Cameras, x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`project` with one array (...) per axis, in and out; large inputs are spared the (..., 3) temporaries."""
    c2w = cameras.c2w
    offset = (x - c2w[..., 0, 3], y - c2w[..., 1, 3], z - c2w[..., 2, 3])
    local_x, local_y, local_z = (
        c2w[..., 0, axis] * offset[0] + c2w[..., 1, axis] * offset[1] + c2w[..., 2, axis] * offset[2]
        for axis in range(3)
    )
    if cameras.lens is not None:
        u, v, shown = distort(cameras.lens, local_x, -local_y, -local_z)
        distance = jnp.sqrt(local_x**2 + local_y**2 + local_z**2)
        x, y = (p * cameras.focal_xy[..., i] + cameras.centre_xy[..., i] for i, p in enumerate((u, v)))
        return x, y, jnp.where(shown, distance, -distance)
    inverse = 1 / jnp.where(jnp.abs(local_z) > 1e-9, -local_z, 1e-9)
    pixel_x = local_x * inverse * cameras.focal_xy[..., 0] + cameras.centre_xy[..., 0]
    pixel_y = -local_y * inverse * cameras.focal_xy[..., 1] + cameras.centre_xy[..., 1]
    return pixel_x, pixel_y, -local_z


def view_rays(camera: Cameras, place: ArrayLike = (0.5, 0.5)) -> Rays:
    """The rays through all pixels of a single camera whose size is concrete: Rays (H, W).

    place (2,): where in each pixel, in [0, 1]; the centre by default.

    >>> camera = make_cameras(np.eye(3, 4), focal_xy=100, centre_xy=(32, 24), width=64, height=48)
    >>> view_rays(camera).direction.shape
    (48, 64, 3)
    """
    width, height = image_size(camera)
    return _view_rays(camera, jnp.asarray(place, jnp.float32), width=width, height=height)


@functools.partial(jax.jit, static_argnames=("width", "height"))
def _view_rays(camera: Cameras, place: jax.Array, *, width: int, height: int) -> Rays:
    x, y = jnp.meshgrid(jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32))
    return unproject(camera, jnp.stack([x, y], axis=-1) + place)


@jax.jit
def through_aperture(camera: Cameras, rays: Rays, place: jax.Array, focus: jax.Array) -> Rays:
    """Rays of a thin lens: each leaves the aperture elsewhere, and meets its pinhole ray on the plane in focus.

    camera: a single one. place (..., 2): on the lens, in scene units, to the right and upwards from its middle. focus
    (): distance of the plane along the optical axis. Only for rays less than 90 degrees off the axis.
    """
    cosine = -jnp.sum(rays.direction * camera.c2w[:, 2], axis=-1)
    sharp = rays.origin + rays.direction * (focus / cosine)[..., None]
    origin = rays.origin + place[..., :1] * camera.c2w[:, 0] + place[..., 1:] * camera.c2w[:, 1]
    offset = sharp - origin
    return Rays(origin=origin, direction=offset / jnp.sqrt(jnp.sum(offset**2, axis=-1, keepdims=True)))


def resize_cameras(cameras: Cameras, width: int, height: int) -> Cameras:
    """The cameras with another image size and the same vertical field of view, the principal point in proportion.

    >>> camera = make_cameras(np.eye(3, 4), focal_xy=100, centre_xy=(32, 24), width=64, height=48)
    >>> resize_cameras(camera, 32, 24).focal_xy.tolist()
    [50.0, 50.0]
    """
    new, old = np.array([width, height], np.int32), np.asarray(cameras.size)
    return cameras.replace(  # type: ignore[attr-defined]
        focal_xy=np.asarray(cameras.focal_xy) * (new[1] / old[..., 1:]).astype(np.float32),
        centre_xy=np.asarray(cameras.centre_xy) * (new / old).astype(np.float32),
        size=np.broadcast_to(new, old.shape),
    )


def look_at(position: ArrayLike, target: ArrayLike, up: ArrayLike) -> np.ndarray:
    """c2w (3, 4) f32 of a camera at `position` that looks at `target`, with `up` upwards in its picture; (3,) each.

    >>> look_at([0.5, -1, 0.5], [0.5, 0.5, 0.5], up=[0, 0, 1])[:, 2]  # backward
    array([ 0., -1.,  0.], dtype=float32)
    """
    position, up = np.asarray(position, np.float64), np.asarray(up, np.float64)
    backward = position - np.asarray(target, np.float64)
    backward /= np.linalg.norm(backward)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward, position], axis=-1).astype(np.float32)


def orbit_poses(c2w: np.ndarray, num_poses: int) -> np.ndarray:
    """Poses (num_poses, 3, 4) on a circle about the vertical axis through the middle of the unit cube.

    Distance and height over the middle are the medians of those of c2w (V, 3, 4), the poses of a scene; z is up.

    >>> seen_from = orbit_poses(look_at([0.5, -1, 0.5], [0.5, 0.5, 0.5], [0, 0, 1])[None], 4)
    >>> seen_from.shape, seen_from[0, :, 3].round(3).tolist()
    ((4, 3, 4), [2.0, 0.5, 0.5])
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


def spiral_poses(c2w: np.ndarray, num_poses: int) -> np.ndarray:
    """Poses (num_poses, 3, 4) on a closed curve among the poses c2w (V, 3, 4), which all look at their `focus`.

    An ellipse about the mean position that covers two thirds of where the cameras are to the sides and upwards, and
    half as far forwards and back; z is up.
    """
    c2w = np.asarray(c2w, np.float64)
    target, middle = focus(c2w), c2w[:, :, 3].mean(axis=0)
    axes = look_at(middle, target, _mean_up(c2w)).astype(np.float64)[:, :3]
    reach = np.quantile(np.abs((c2w[:, :, 3] - middle) @ axes), 2 / 3, axis=0)
    angle = np.arange(num_poses) * 2 * np.pi / num_poses
    local = np.stack([np.cos(angle), -np.sin(angle), 0.5 * np.sin(2 * angle)], axis=-1) * reach
    return np.stack([look_at(position, target, _mean_up(c2w)) for position in middle + local @ axes.T])


def interpolate_poses(c2w: np.ndarray, num_poses: int, *, num_keys: int = 12) -> np.ndarray:
    """Poses (num_poses, 3, 4) on a smooth curve through at most num_keys of the poses c2w (V, 3, 4), in their order.

    From the first to the last. Positions and directions are Catmull-Rom splines with the knots as far apart as the root
    of the distance between their poses (centripetal: no loops, no cusps), traversed at a nearly even speed.
    """
    c2w = np.asarray(c2w, np.float64)
    keys = c2w[np.unique(np.linspace(0, len(c2w) - 1, num_keys).round().astype(int))]
    apart = np.linalg.norm(np.diff(keys[:, :, 3], axis=0), axis=1)
    turned = np.linalg.norm(np.diff(keys[:, :, 2], axis=0), axis=1) * (apart.sum() / max(len(apart), 1) or 1.0)
    keys = keys[np.concatenate([[True], apart + turned > 1e-6])]
    if len(keys) == 1:
        return np.repeat(keys, num_poses, axis=0).astype(np.float32)
    apart = (apart + turned)[apart + turned > 1e-6]
    knots = np.concatenate([[0], np.cumsum(np.sqrt(apart))])
    fine = np.linspace(0, knots[-1], 64 * len(keys))
    track = _catmull_rom(knots, keys[:, :, 3], fine)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(track, axis=0), axis=1))])
    place = (
        np.interp(np.linspace(0, length[-1], num_poses), length, fine)
        if length[-1] > 1e-6
        else np.linspace(0, knots[-1], num_poses)
    )
    position, backward, up = (_catmull_rom(knots, keys[:, :, i], place) for i in (3, 2, 1))
    return np.stack([look_at(p, p - b, u) for p, b, u in zip(position, backward, up, strict=True)])


def _catmull_rom(knots: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The piecewise cubic through values (K, 3) at increasing knots (K,), evaluated at (N,) -> (N, 3).

    Its slope at a knot is that of the parabola through the knot and its neighbours.
    """
    slope = np.diff(values, axis=0) / np.diff(knots)[:, None]
    before, after = np.diff(knots)[:-1, None], np.diff(knots)[1:, None]
    inner = (slope[:-1] * after + slope[1:] * before) / (before + after)
    tangent = np.concatenate([slope[:1], inner, slope[-1:]])
    piece = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, len(knots) - 2)
    width = np.diff(knots)[piece, None]
    s = (at - knots[piece])[:, None] / width
    return (
        values[piece] * (1 + 2 * s) * (1 - s) ** 2
        + tangent[piece] * width * s * (1 - s) ** 2
        + values[piece + 1] * s**2 * (3 - 2 * s)
        + tangent[piece + 1] * width * s**2 * (s - 1)
    )


def surrounded(c2w: np.ndarray) -> bool:
    """Whether poses (V, 3, 4) stand around the middle of the unit cube: no side of 100 degrees is without a camera."""
    offset = np.asarray(c2w, np.float64)[:, :2, 3] - 0.5
    angle = np.sort(np.arctan2(offset[:, 1], offset[:, 0]))
    return bool(np.max(np.diff(angle, append=angle[0] + 2 * np.pi)) < np.radians(100))


def _mean_up(c2w: np.ndarray) -> np.ndarray:
    return c2w[:, :, 1].mean(axis=0)


def focus(c2w: np.ndarray) -> np.ndarray:
    """The point (3,) nearest to the optical axes of cameras (V, 3, 4), in the least-squares sense.

    Where they hardly turn, the axes meet nowhere near: then it is the point before their mean position, at twice the
    mean distance from that to the cameras.
    """
    position, forward = c2w[:, :, 3], -c2w[:, :, 2]
    middle, spread = position.mean(axis=0), float(np.linalg.norm(position - position.mean(axis=0), axis=1).mean())
    ahead = middle + 2 * (spread or 1.0) * forward.mean(axis=0)
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]  # onto the plane at right angles to each axis
    total = across.mean(axis=0)
    if np.linalg.eigvalsh(total)[0] < 1e-2:
        return ahead
    point = np.linalg.solve(total, (across @ position[:, :, None]).mean(axis=0))[:, 0]
    before = np.einsum("vi,vi->v", point - position, forward) > 0
    return point if before.mean() > 0.5 else ahead
