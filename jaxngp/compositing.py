"""Volume rendering: density and colour along rays to the colour of a pixel (paper appendix E.1; Max 1995)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax


@struct.dataclass
class RenderOutput:
    """rgb (..., 3) over the background; opacity (...) in [0, 1]; depth (...) scene units, of what is opaque.

    Depth is the mean distance of what the ray met: the weighted sum of t over the opacity, and 0 where nothing was.
    """

    rgb: jax.Array
    opacity: jax.Array
    depth: jax.Array


def optical_weights(density: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One ray, the definition: w_i = T_i (1 - exp(-sigma_i dt_i)), T_i = exp(-sum_{j<i} sigma_j dt_j).

    density (S,), dt (S,) -> weights (S,), and the transmittance () behind the last sample.
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
) -> RenderOutput:
    """`optical_weights` for packed samples, then the weighted sums of each ray.

    density, t, dt (N,); rgb (N, 3); ray (N,) i32, sorted; background (R, 3). A sample with dt = 0 changes nothing.
    The sum in front of a sample is a scan that starts anew with each ray: one running sum over all samples minus
    its value at the ray's start would lose its digits.
    """
    thickness = density * dt
    weight = jnp.exp(-exclusive_sum_per_ray(thickness, ray)) * -jnp.expm1(-thickness)
    terms = jnp.concatenate([weight[:, None] * rgb, weight[:, None], (weight * t)[:, None]], axis=1)
    sums = jax.ops.segment_sum(terms, ray, num_segments=background.shape[0], indices_are_sorted=True)
    return blend(sums[:, :3], sums[:, 3], sums[:, 4], background)


def blend(rgb: jax.Array, opacity: jax.Array, depth: jax.Array, background: jax.Array) -> RenderOutput:
    """Weighted sums over a ray (of colour, of 1, of t) to what is seen before a background. (..., 3), (...), (...)."""
    safe = jnp.where(opacity > 0, opacity, 1)
    return RenderOutput(
        rgb=rgb + (1 - opacity)[..., None] * background,
        opacity=opacity,
        depth=jnp.where(opacity > 0, depth / safe, 0),
    )


def exclusive_sum_per_ray(value: jax.Array, ray: jax.Array) -> jax.Array:
    """The sum over the samples before each one that belong to the same ray. value (N,), ray (N,) sorted -> (N,)."""
    first = jnp.concatenate([jnp.ones(1, bool), ray[1:] != ray[:-1]])

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    # The sum before a sample is the running sum at its predecessor, so shift first: no difference of large numbers.
    shifted = jnp.where(first, 0, jnp.concatenate([jnp.zeros(1, value.dtype), value[:-1]]))
    return lax.associative_scan(join, (shifted, first))[0]
