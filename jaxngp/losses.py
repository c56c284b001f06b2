"""Losses between predictions and targets, per element."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxngp.config import Loss

HUBER_DELTA = 0.1
"""Where the Huber loss turns from quadratic to linear; instant-ngp's value."""


def colour_loss(prediction: jax.Array, target: jax.Array, *, loss: Loss) -> jax.Array:
    """Squared error, or Huber loss scaled to equal half of it near zero. (...) -> (...)."""
    error = prediction - target
    if loss == "l2":
        return error**2
    size = jnp.abs(error)
    return jnp.where(size < HUBER_DELTA, 0.5 * error**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))


RELATIVE_FLOOR = 0.01
"""What is added to the size of the target in a relative error; tiny-cuda-nn's value."""


def relative_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """|p - t| / (|t| + 0.01), the term of MAPE (paper appendix C.1): close to a surface, errors weigh most. (...)."""
    return jnp.abs(prediction - target) / (jnp.abs(target) + RELATIVE_FLOOR)
