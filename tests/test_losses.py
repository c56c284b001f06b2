"""Losses: the squared error, and Huber's, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from strategies import arrays32

from jaxngp import losses
from jaxngp.losses import HUBER_DELTA, RELATIVE_FLOOR

N = 16

values = arrays32(N, -0.5, 1.5)

colour_loss = jax.jit(losses.colour_loss, static_argnames="loss")
relative_error = jax.jit(losses.relative_error)
huber_slope = jax.jit(jax.grad(lambda p, target: jnp.sum(losses.colour_loss(p, target, loss="huber"))))
relative_slope = jax.jit(jax.grad(lambda p, target: jnp.sum(losses.relative_error(p, target))))


@given(values, values)
def test_l2_is_the_squared_error(prediction: np.ndarray, target: np.ndarray) -> None:
    expected = (prediction.astype(np.float64) - target) ** 2
    np.testing.assert_allclose(colour_loss(prediction, target, loss="l2"), expected, rtol=1e-5, atol=1e-12)


@given(values, values)
def test_huber_is_half_the_square_then_its_tangent(prediction: np.ndarray, target: np.ndarray) -> None:
    size = np.abs(prediction.astype(np.float64) - target)
    # The integral of the slope, which is the error and at most delta.
    near = np.minimum(size, HUBER_DELTA)
    expected = near**2 / 2 + HUBER_DELTA * (size - near)
    np.testing.assert_allclose(colour_loss(prediction, target, loss="huber"), expected, rtol=1e-5, atol=1e-9)


@given(values, values)
def test_the_slope_of_huber_is_the_clipped_error(prediction: np.ndarray, target: np.ndarray) -> None:
    expected = np.clip(prediction.astype(np.float64) - target, -HUBER_DELTA, HUBER_DELTA)
    np.testing.assert_allclose(huber_slope(prediction, target), expected, atol=1e-6)


@given(values, values)
def test_a_relative_error_is_a_share_of_the_target(prediction: np.ndarray, target: np.ndarray) -> None:
    wide = target.astype(np.float64)
    expected = np.abs(prediction - wide) / (np.abs(wide) + 0.01)
    np.testing.assert_allclose(relative_error(prediction, target), expected, rtol=1e-5, atol=1e-9)


@given(values, values)
def test_the_slope_of_a_relative_error(prediction: np.ndarray, target: np.ndarray) -> None:
    expected = np.sign(prediction.astype(np.float64) - target) / (np.abs(target) + RELATIVE_FLOOR)
    differs = prediction != target
    np.testing.assert_allclose(relative_slope(prediction, target)[differs], expected[differs], rtol=1e-5)
