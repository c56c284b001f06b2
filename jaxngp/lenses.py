"""Lenses: from the direction of light, in camera axes, to the place on the image plane, and back.

Camera axes here are OpenCV's (x right, y down, z forward), and places (u, v) are in focal lengths from the principal
point, so that pixel = focal (u, v) + centre. A model is one of MODELS:

    perspective      r = tan of the angle to the axis; (u, v) = (x, y) / z, distorted: a rational radial factor, then
                     tangential and thin-prism terms (OpenCV's model, and its special cases RADIAL, OPENCV,
                     FULL_OPENCV; also the numerator's r^8 of nerfstudio)
    fisheye          r = the angle theta itself; (x, y) theta / |(x, y)|, then the same terms in powers of theta
    division         (x, y) / z = (u, v) / (1 + k (u^2 + v^2))
    fov              |(u, v)| = atan(2 r tan(omega / 2)) / omega
    eucm             (u, v) = (x, y) / (alpha sqrt(beta (x^2 + y^2) + z^2) + (1 - alpha) z)
    equirectangular  (u, v) = longitude, latitude

Sources: the OpenCV documentation of `calib3d`; the camera models of COLMAP; Devernay and Faugeras 2001 (fov);
Fitzgibbon 2001 (division); Khomutenko et al. 2016 (eucm).
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from numpy.typing import ArrayLike

Model = Literal["perspective", "fisheye", "division", "fov", "eucm", "equirectangular"]
MODELS: tuple[str, ...] = get_args(Model)

_POLYNOMIAL = ("k1", "k2", "k3", "k4", "d1", "d2", "d3", "p1", "p2", "s1", "s2", "s3", "s4")
COEFFICIENTS: dict[str, tuple[str, ...]] = {
    "perspective": _POLYNOMIAL,
    "fisheye": _POLYNOMIAL,
    "division": ("k",),
    "fov": ("omega",),
    "eucm": ("alpha", "beta"),
    "equirectangular": (),
}
"""The names of the coefficients of each model, in their order.

Radial: (1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8) / (1 + d1 r^2 + d2 r^4 + d3 r^6). Tangential: p1, p2 as in OpenCV. Thin
prism: s1 r^2 + s2 r^4 on u, s3 r^2 + s4 r^4 on v. OpenCV's k4, k5, k6 are d1, d2, d3.
"""

_NEWTON_STEPS = 12
"""From the distorted place. It converges quadratically; a strong lens of a phone takes 5."""

_GRID = 33
"""Places per side at which a new lens is examined, borders included."""

_SOUND = 0.05
"""Pixels by which a place may be missed when it is undistorted and distorted again."""

_MARGIN = 1.1
"""By which a lens may be used beyond the image that it was examined over."""


@struct.dataclass
class Lens:
    """One lens a view; (...) is the batch. All are of one model, which is static."""

    coefficients: jax.Array  # (..., C) f32, in the order of COEFFICIENTS[model]
    reach: jax.Array  # (...) f32: the largest angle to the axis, in radians, at which the lens shows anything
    stretch: jax.Array  # (...) f32: at most so many focal lengths in the image for each radian of angle
    model: Model = struct.field(pytree_node=False)


def distort(lens: Lens, x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a lens shows directions (...), of any length, in camera axes: u, v, and whether it shows them at all.

    Where it does not, behind the camera or beyond `reach`, u and v are finite but mean nothing.
    """
    shown = jnp.arctan2(jnp.hypot(x, y), z) <= lens.reach
    u, v = _distort(lens.model, lens.coefficients, *(jnp.where(shown, a, b) for a, b in ((x, 0), (y, 0), (z, 1))))
    return u, v, shown


def undistort(lens: Lens, u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The direction x, y, z (...) in camera axes, not of unit length, that a lens shows at u, v (...).

    The inverse of `distort`, where that is invertible. Differentiable in the coefficients too.
    """
    model, c = lens.model, lens.coefficients
    if model in ("perspective", "fisheye"):
        a, b = _unbend(c, u, v)
        return _from_angle(a, b) if model == "fisheye" else (a, b, jnp.ones_like(a))
    square = u**2 + v**2
    if model == "division":
        return u, v, 1 + c[..., 0] * square
    if model == "fov":
        # r = tan(|(u, v)| omega) / (2 tan(omega / 2)), written so that neither 0 has a derivative that is not finite.
        radius = jnp.sqrt(jnp.maximum(square, 1e-20))
        sine, cosine = jnp.sin(radius * c[..., 0]) / radius, jnp.cos(radius * c[..., 0])
        return u * sine, v * sine, 2 * jnp.tan(c[..., 0] / 2) * cosine
    if model == "eucm":
        alpha, beta = c[..., 0], c[..., 1]
        inside = jnp.maximum(1 - (2 * alpha - 1) * beta * square, 1e-12)
        return u, v, (1 - beta * alpha**2 * square) / (alpha * jnp.sqrt(inside) + 1 - alpha)
    return jnp.sin(u) * jnp.cos(v), jnp.sin(v), jnp.cos(u) * jnp.cos(v)


def _distort(model: Model, c: Any, x: Any, y: Any, z: Any) -> tuple[Any, Any]:
    if model == "perspective":
        return _bend(c, x / z, y / z)
    if model == "fisheye":
        return _bend(c, *_to_angle(x, y, z))
    if model == "division":  # r_d (1 - 4 k r^2)^(1/2) ..., the root that is r for k = 0
        square = (x**2 + y**2) / z**2
        factor = 2 / (z * (1 + jnp.sqrt(jnp.maximum(1 - 4 * c[..., 0] * square, 0))))
        return x * factor, y * factor
    if model == "fov":
        radius = jnp.sqrt(jnp.maximum(x**2 + y**2, 1e-20))
        factor = jnp.arctan2(2 * radius * jnp.tan(c[..., 0] / 2), z) / (c[..., 0] * radius)
        return x * factor, y * factor
    if model == "eucm":
        alpha, beta = c[..., 0], c[..., 1]
        depth = alpha * jnp.sqrt(beta * (x**2 + y**2) + z**2) + (1 - alpha) * z
        return x / depth, y / depth
    return jnp.arctan2(x, z), jnp.arctan2(y, jnp.sqrt(jnp.maximum(x**2 + z**2, 1e-20)))


def _bend(c: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """The radial, tangential and thin-prism terms of _POLYNOMIAL, on places (a, b) of the image plane."""
    k1, k2, k3, k4, d1, d2, d3, p1, p2, s1, s2, s3, s4 = (c[..., i] for i in range(len(_POLYNOMIAL)))
    square = a**2 + b**2
    radial = 1 + square * (k1 + square * (k2 + square * (k3 + square * k4)))
    radial = radial / (1 + square * (d1 + square * (d2 + square * d3)))
    u = a * radial + 2 * p1 * a * b + p2 * (square + 2 * a**2) + square * (s1 + square * s2)
    v = b * radial + p1 * (square + 2 * b**2) + 2 * p2 * a * b + square * (s3 + square * s4)
    return u, v


def _unbend(c: jax.Array, u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The (a, b) with `_bend(c, a, b) == (u, v)`, by Newton's method from (u, v) on.

    The iteration itself is not differentiated. A last step, with the Jacobian held constant, moves nothing and has the
    derivatives of the implicit function.
    """
    fixed = lax.stop_gradient((c, u, v))

    def correction(place: tuple, goal: tuple) -> tuple:
        c, u, v = goal
        a, b = place
        one, zero = jnp.ones_like(a), jnp.zeros_like(a)
        bend = lambda a, b: _bend(lax.stop_gradient(c), a, b)  # noqa: E731
        _, (u_a, v_a) = jax.jvp(bend, (a, b), (one, zero))
        _, (u_b, v_b) = jax.jvp(bend, (a, b), (zero, one))
        determinant = u_a * v_b - u_b * v_a
        # Where the lens folds over there is no inverse; what stands there is found out by `examine`.
        inverse = 1 / jnp.where(jnp.abs(determinant) > 1e-6, determinant, 1e-6)
        reached_u, reached_v = _bend(c, a, b)
        error_u, error_v = u - reached_u, v - reached_v
        return (v_b * error_u - u_b * error_v) * inverse, (u_a * error_v - v_a * error_u) * inverse

    def step(_: Any, place: tuple) -> tuple:
        return tuple(p + c for p, c in zip(place, correction(place, fixed), strict=True))

    shape = jnp.broadcast_shapes(c.shape[:-1], u.shape)
    start = tuple(jnp.broadcast_to(p, shape) for p in fixed[1:])
    a, b = lax.stop_gradient(lax.fori_loop(0, _NEWTON_STEPS, step, start))
    change_a, change_b = correction((a, b), (c, u, v))
    return a + change_a, b + change_b


def _to_angle(x: Any, y: Any, z: Any) -> tuple[Any, Any]:
    """(x, y) of a direction, scaled to have the angle to the axis as its length."""
    radius = jnp.sqrt(jnp.maximum(x**2 + y**2, 1e-20))
    factor = jnp.arctan2(radius, z) / radius
    return x * factor, y * factor


def _from_angle(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse of `_to_angle`; of unit length."""
    angle = jnp.sqrt(jnp.maximum(a**2 + b**2, 1e-20))
    factor = jnp.sin(angle) / angle
    return a * factor, b * factor, jnp.cos(angle)


# A lens as a file describes it.


def make_lens(
    model: Model, coefficients: ArrayLike, *, focal_xy: ArrayLike, centre_xy: ArrayLike, size: ArrayLike
) -> tuple[Lens, np.ndarray]:
    """Lenses (V,) as numpy arrays, and how far in pixels (V,) they are from invertible over their images.

    coefficients (V, C); focal_xy, centre_xy, size (V, 2). Each is looked at over a grid that covers its image: what
    comes back of places that are undistorted and distorted again, how large the angles become, and how fast places
    move with the angle. An error of more than a small part of a pixel means that the lens folds over, or, of a circular
    fisheye, that the image is larger than what it shows; reach and stretch are those of the other places.
    """
    arrays = [np.asarray(a, np.float32) for a in (coefficients, focal_xy, centre_xy, size)]
    rows, number = np.unique(np.concatenate(arrays, axis=-1), axis=0, return_inverse=True)
    ends = np.cumsum([a.shape[-1] for a in arrays])[:-1]
    found = [np.asarray(a)[number.reshape(-1)] for a in _examine(*np.split(rows, ends, axis=-1), model=model)]
    return Lens(arrays[0], found[0], found[1], model), found[2]  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames="model")
def _examine(
    coefficients: jax.Array, focal_xy: jax.Array, centre_xy: jax.Array, size: jax.Array, *, model: Model
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reach, stretch and error (V,) of lenses (V, ...); see `make_lens`."""
    share = jnp.linspace(0, 1, _GRID, dtype=jnp.float32)
    # The border, but of a panorama, where a pole is a whole row and two columns are one, the centres of its pixels.
    inset = 0.5 if model == "equirectangular" else 0.0
    axes = jnp.meshgrid(share, share)
    x, y = (inset + axis.reshape(-1, 1) * (size[:, i] - 2 * inset) for i, axis in enumerate(axes))  # (places, V)
    u, v = (x - centre_xy[:, 0]) / focal_xy[:, 0], (y - centre_xy[:, 1]) / focal_xy[:, 1]
    lens = Lens(coefficients, jnp.full(len(size), np.float32(4)), jnp.ones(len(size), np.float32), model)
    direction = jnp.stack(undistort(lens, u, v))
    direction = direction / jnp.linalg.norm(direction, axis=0)
    place = lambda direction: jnp.stack(_distort(model, coefficients, *direction))  # noqa: E731
    error = (place(direction) - jnp.stack([u, v])) * focal_xy.T[:, None]
    # Two directions at right angles to this one, and how fast the place moves along each.
    least = jnp.argmin(jnp.abs(direction), axis=0)
    first = jnp.cross(direction, jax.nn.one_hot(least, 3, axis=0, dtype=direction.dtype), axis=0)
    first = first / jnp.linalg.norm(first, axis=0)
    speeds = [jax.jvp(place, (direction,), (axis,))[1] for axis in (first, jnp.cross(direction, first, axis=0))]
    square = sum(jnp.sum(speed**2, axis=0) for speed in speeds)  # of the Frobenius norm, no less than the largest speed
    miss = jnp.linalg.norm(error, axis=0)
    sound = miss < _SOUND  # False where it is no number
    reach = jnp.max(jnp.where(sound, jnp.arctan2(jnp.hypot(direction[0], direction[1]), direction[2]), 0), axis=0)
    stretch = jnp.sqrt(jnp.max(jnp.where(sound, square, 0), axis=0))
    return _MARGIN * reach, _MARGIN * stretch, jnp.max(jnp.where(miss >= 0, miss, jnp.inf), axis=0)
