"""How far a picture is from the truth: mean squared error, PSNR and SSIM, of images in [0, 1]."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array | np.ndarray

SSIM_WINDOW_SIZE = 11  # px
SSIM_WINDOW_SIGMA = 1.5  # px
SSIM_C1 = 0.01**2  # (K1 L)^2, where the range of values L is 1
SSIM_C2 = 0.03**2  # (K2 L)^2


def mean_squared_error(a: Array, b: Array, keep: Array | None = None) -> jax.Array:
    """The mean of (a - b)^2. Two arrays of one shape -> scalar. Raises ValueError if the shapes differ.

    keep: bool, of the shape of a and b without their last axis, the pixels to take the mean over; None is all. Of no
    pixel the mean is not a number.
    """
    _check_same_shape(a, b)
    return _mean_where(jnp.square(a - b), keep)


def psnr(mse: Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of a mean squared error of values whose peak is 1; infinite where it is 0.

    >>> float(psnr(jnp.array(0.01)))
    20.0
    """
    return -10.0 * jnp.log10(mse)


def ssim(a: Array, b: Array, keep: Array | None = None) -> jax.Array:
    """Structural similarity of two images. a, b (H, W, C) in [0, 1] -> scalar, 1 where they are equal.

    keep: (H, W) bool, the pixels that count; None is all. Only windows of such pixels alone do, and without any the
    result is not a number.

    Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5 px, K1 = 0.01, K2 = 0.03. Each channel is an image of
    its own; only windows that lie wholly inside it count; the result is the mean over all windows and channels.
    Call it outside jit: inside, XLA:CPU fuses its two passes and repeats the first for each tap of the second (1.9 s
    instead of 0.1 s for 800 x 800 on one core). Raises ValueError if the shapes differ or an image is smaller than
    the window.

    >>> image = jnp.linspace(0, 1, 16 * 16 * 3).reshape(16, 16, 3)
    >>> round(float(ssim(image, image)), 4)
    1.0
    """
    _check_same_shape(a, b)
    if a.ndim != 3 or min(a.shape[:2]) < SSIM_WINDOW_SIZE:
        size = SSIM_WINDOW_SIZE
        raise ValueError(f"shape of a and b = {a.shape}: expected (H, W, C) with H and W at least {size}, the window")
    mean = jnp.stack([a, b])
    covariance = jnp.zeros((3, *a.shape), mean.dtype)  # of a with a, b with b, a with b
    for axis in (1, 2):
        mean, covariance = _pool_window(mean, covariance, axis)
    mean_a, mean_b = mean
    variance_a, variance_b, covariance_ab = covariance
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (jnp.square(mean_a) + jnp.square(mean_b) + SSIM_C1)
    structure = (2 * covariance_ab + SSIM_C2) / (variance_a + variance_b + SSIM_C2)
    return _mean_where(luminance * structure, None if keep is None else _whole_windows(jnp.asarray(keep)))


def _mean_where(values: jax.Array, keep: Array | None) -> jax.Array:
    """The mean of values (..., C) where keep (...) is True, or of all for None."""
    if keep is None:
        return jnp.mean(values)
    kept = jnp.sum(jnp.where(jnp.asarray(keep)[..., None], values, 0))
    return kept / (jnp.sum(jnp.asarray(keep), dtype=jnp.int32) * values.shape[-1])


@jax.jit
def _whole_windows(keep: jax.Array) -> jax.Array:
    """Whether all of every window is kept. keep (H, W) -> bool of the shape that `_pool_window` leaves."""
    for axis in (0, 1):
        num_windows = keep.shape[axis] - SSIM_WINDOW_SIZE + 1
        parts = [lax.slice_in_dim(keep, k, k + num_windows, axis=axis) for k in range(SSIM_WINDOW_SIZE)]
        keep = jnp.all(jnp.stack(parts), axis=0)
    return keep


@functools.partial(jax.jit, static_argnames="axis")
def _pool_window(mean: jax.Array, covariance: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The moments of every window along one axis, from the moments of its parts. (2, H, W, C), (3, H, W, C).

    By the law of total covariance: the mean of the covariances within the parts, plus the covariance of their means.
    The usual E[ab] - E[a]E[b] subtracts two numbers near 1 to get one near C2 = 9e-4, which costs float32 four of
    its seven digits; here every variance is a sum of squares. It is shifted sums and not a convolution because an
    accelerator may round a convolution's inputs to bfloat16.
    """
    num_windows = mean.shape[axis] - SSIM_WINDOW_SIZE + 1
    offsets = np.arange(SSIM_WINDOW_SIZE) - SSIM_WINDOW_SIZE // 2
    weights = np.exp(-0.5 * np.square(offsets / SSIM_WINDOW_SIGMA))
    taps = [(float(w), k) for k, w in enumerate(weights / weights.sum())]

    def part(moment: jax.Array, k: int) -> jax.Array:
        return lax.slice_in_dim(moment, k, k + num_windows, axis=axis)

    pooled_mean = sum((w * part(mean, k) for w, k in taps), start=jnp.float32(0))
    pooled_covariance = jnp.float32(0)
    for w, k in taps:
        a, b = part(mean, k) - pooled_mean
        pooled_covariance += w * (part(covariance, k) + jnp.stack([a * a, b * b, a * b]))
    return pooled_mean, pooled_covariance


def _check_same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shape of b = {b.shape}: expected that of a, {a.shape}")
