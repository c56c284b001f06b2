"""Volume rendering: density and colour along rays to the colour of a pixel (paper appendix E.1; Max 1995)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxngp.device import by_device


@struct.dataclass
class RenderOutput:
    """rgb (..., 3) over the background; opacity (...) in [0, 1]; depth (...) scene units, of what is opaque.

    Depth is the mean distance of what the ray met: the weighted sum of t over the opacity, and 0 where nothing was.
    depth_error (...): the weighted sum of |t - known depth|; None where no depths were given.
    samples (...) i32: how many a ray took before it ended; None where rays are not ended, as in training.
    """

    rgb: jax.Array
    opacity: jax.Array
    depth: jax.Array
    depth_error: jax.Array | None = None
    samples: jax.Array | None = None


def optical_weights(density: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One ray, the definition: w_i = T_i (1 - exp(-sigma_i dt_i)), T_i = exp(-sum_{j<i} sigma_j dt_j).

    density (S,), dt (S,) -> weights (S,), and the transmittance () behind the last sample.

    >>> weights, behind = optical_weights(jnp.array([0.0, 1e9, 1.0]), jnp.full(3, 0.1))
    >>> weights.tolist(), float(behind)
    ([0.0, 1.0, 0.0], 0.0)
    """
    thickness = density * dt
    # Shifted, not cumsum - thickness: the difference of large sums would blur what lies before an opaque sample.
    before = jnp.concatenate([jnp.zeros_like(thickness[:1]), jnp.cumsum(thickness[:-1])])
    return jnp.exp(-before) * -jnp.expm1(-thickness), jnp.exp(-jnp.sum(thickness))


def composite(
    density: jax.Array,
    rgb: jax.Array,
    t: jax.Array,
    dt: jax.Array,
    ray: jax.Array,
    background: jax.Array,
    known_depth: jax.Array | None = None,
) -> RenderOutput:
    """`optical_weights` for packed samples, then the weighted sums of each ray.

    density, t, dt (N,); rgb (N, 3); ray (N,) i32, sorted; background (R, 3). A sample with dt = 0 changes nothing.
    known_depth (R,), for `depth_error`.
    """
    thickness = density * dt
    weight = jnp.exp(-optical_depth_before(thickness, ray, background.shape[0])) * -jnp.expm1(-thickness)
    terms = [weight[:, None] * rgb, weight[:, None], (weight * t)[:, None]]
    if known_depth is not None:
        terms.append((weight * jnp.abs(t - known_depth[ray]))[:, None])
    sums = jax.ops.segment_sum(
        jnp.concatenate(terms, axis=1), ray, num_segments=background.shape[0], indices_are_sorted=True
    )
    out = blend(sums[:, :3], sums[:, 3], sums[:, 4], background)
    return out if known_depth is None else out.replace(depth_error=sums[:, 5])  # type: ignore[attr-defined]


FAINT = 1e-31
"""Opacity below which a ray counts as empty: a density over it, a slope of the depth, would leave float32."""


def blend(rgb: jax.Array, opacity: jax.Array, depth: jax.Array, background: jax.Array) -> RenderOutput:
    """Weighted sums over a ray (of colour, of 1, of t) to what is seen before a background. (..., 3), (...), (...)."""
    some = opacity > FAINT
    safe = jnp.where(some, opacity, 1)
    # The derivative of a quotient divides by the square, which float32 does not hold: scaled, both are near 1.
    scale = lax.stop_gradient(1 / safe)
    return RenderOutput(
        rgb=rgb + (1 - opacity)[..., None] * background,
        opacity=opacity,
        depth=jnp.where(some, depth * scale / (safe * scale), 0),
    )


# The optical depth before a sample is a sum that starts anew with each ray. One running sum in floating point over all
# samples, minus its value at the ray's start, would lose its digits: 1e-2 of a transmittance. A segmented scan loses
# none, and is best on a CPU; on a GPU it is a dozen kernels, and a running sum of integers, which is exact, four.

OPAQUE = 32.0
"""The optical thickness at which nothing gets through, e^-32 = 1e-14; more in one sample counts as this."""


def optical_depth_before(thickness: jax.Array, ray: jax.Array, num_rays: int) -> jax.Array:
    """The sum over the samples before each one that belong to the same ray. (N,), ray (N,) sorted in [0, R) -> (N,).

    An optical depth of OPAQUE or more is only that much or more.
    """
    return _exclusive_sum(thickness, ray, num_rays, False, OPAQUE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _exclusive_sum(value: jax.Array, ray: jax.Array, num_rays: int, behind: bool, bound: float | None) -> jax.Array:
    """The sum of values over the samples before each one of its ray, or behind it; above `bound` they count as that.

    Linear below the bound, so its derivative is itself with the samples in the other order, however often it is taken:
    what a sample hides is behind it. Where a value is above, no light gets through, and the derivative is of no
    matter. Computed in float32, or in float64 on a CPU where it is given that.
    """

    def fixed_point(value: jax.Array, ray: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(value), initial=1e-20) if bound is None else jnp.float32(bound)
        return exclusive_fixed_point(value.astype(jnp.float32), ray, num_rays, largest).astype(value.dtype)

    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    wide = wide if bound is None else jnp.minimum(wide, bound)
    order = slice(None, None, -1 if behind else 1)
    found = by_device(wide[order], ray[order], cpu=exclusive_scan, gpu=fixed_point)
    return found[order].astype(value.dtype)


def _exclusive_sum_fwd(
    value: jax.Array, ray: jax.Array, num_rays: int, behind: bool, bound: float | None
) -> tuple[jax.Array, jax.Array]:
    return _exclusive_sum(value, ray, num_rays, behind, bound), ray


def _exclusive_sum_bwd(
    num_rays: int, behind: bool, _: float | None, ray: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, None]:
    return _exclusive_sum(cotangent, ray, num_rays, not behind, None), None


_exclusive_sum.defvjp(_exclusive_sum_fwd, _exclusive_sum_bwd)


def exclusive_scan(value: jax.Array, ray: jax.Array) -> jax.Array:
    """The sum over the samples before each one of the same ray, by a segmented scan. value (N,), ray (N,) -> (N,)."""

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    # The sum before a sample is the running sum at its predecessor, so shift first: no difference of large numbers.
    first = _starts_ray(ray)
    shifted = jnp.where(first, 0, jnp.concatenate([jnp.zeros_like(value[:1]), value[:-1]]))
    return lax.associative_scan(join, (shifted, first))[0]


def exclusive_fixed_point(value: jax.Array, ray: jax.Array, num_rays: int, bound: jax.Array) -> jax.Array:
    """`exclusive_scan` of values in [-bound, bound] f32, in units of 2^-30 bound, for fewer than 2^16 samples a ray.

    By one running sum of integers over all samples, modulo 2^32, minus its value at the ray's start: the difference is
    exact whenever it fits, so the sum runs over the upper and the lower 15 bits apart. Where the bound is non-finite,
    so is every sum.
    """
    units = jnp.round(value * (2.0**30 / bound)).astype(jnp.int32)
    halves = jnp.stack([units >> 15, units & 0x7FFF], axis=1)
    before = jnp.cumsum(halves, axis=0, dtype=jnp.int32) - halves
    starts = jnp.where(_starts_ray(ray), ray, num_rays)
    at_start = jnp.zeros((num_rays, 2), jnp.int32).at[starts].set(before, mode="drop")
    upper, lower = jnp.moveaxis((before - at_start[ray]).astype(value.dtype), 1, 0)
    return (upper * 2**15 + lower) * (bound * 2.0**-30)


def _starts_ray(ray: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.ones(len(ray[:1]), bool), ray[1:] != ray[:-1]])
