"""Metrics against their definitions, written in float64 without a thought for speed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxngp import metrics

SHAPE = (14, 17, 3)

unit_images = hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))


def flat_images() -> st.SearchStrategy[np.ndarray]:
    """Images that hardly vary about a bright value: where E[x^2] - E[x]^2 in float32 fails."""
    return st.builds(
        lambda base, detail: base + np.float32(0.01) * detail, st.sampled_from([0.0, 0.5, 0.99]), unit_images
    )


images = unit_images | flat_images()

# Of values up to 1, a variance in float32 is off by some 2^-24, and is divided by at least 9e-4: 7e-5 for one window if
# all errs one way, a tenth of it in the mean over windows.
SSIM = 1e-5


def ssim_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equations 13 to 16: one window and one channel at a time."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    scores = []
    for y, x, c in np.ndindex(a.shape[0] - 10, a.shape[1] - 10, a.shape[2]):
        p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        variance_p, variance_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
        covariance = (window * (p - mean_p) * (q - mean_q)).sum()
        luminance = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
        scores.append(luminance * (2 * covariance + 9e-4) / (variance_p + variance_q + 9e-4))
    return float(np.mean(scores))


@settings(deadline=None, max_examples=30)
@given(images, images)
def test_ssim_is_its_definition(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(metrics.ssim(a, b), ssim_by_definition(a, b), atol=SSIM)


@settings(deadline=None)
@given(images, images)
def test_ssim_is_symmetric_and_at_most_one(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(metrics.ssim(a, b), metrics.ssim(b, a), atol=SSIM)
    assert metrics.ssim(a, b) <= 1 + SSIM


@settings(deadline=None)
@given(images)
def test_ssim_of_an_image_with_itself_is_one(a: np.ndarray) -> None:
    np.testing.assert_allclose(metrics.ssim(a, a), 1.0, atol=SSIM)


def test_ssim_of_two_constants_is_their_luminance_term() -> None:
    a, b = np.full(SHAPE, 0.2, np.float32), np.full(SHAPE, 0.8, np.float32)
    np.testing.assert_allclose(metrics.ssim(a, b), (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4), atol=SSIM)


def test_noise_lowers_psnr_and_ssim() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.2, 0.8, SHAPE).astype(np.float32)
    noise = rng.normal(size=truth.shape).astype(np.float32)
    noisy = [truth + amount * noise for amount in (0.01, 0.03, 0.1, 0.3)]
    psnrs = [float(metrics.psnr(metrics.mean_squared_error(truth, x))) for x in noisy]
    ssims = [float(metrics.ssim(truth, x)) for x in noisy]
    assert psnrs == sorted(psnrs, reverse=True)
    assert ssims == sorted(ssims, reverse=True)


@pytest.mark.parametrize(("mse", "expected"), [(1.0, 0.0), (0.1, 10.0), (1e-3, 30.0), (0.25, 6.0206), (0.0, np.inf)])
def test_psnr_of_a_known_error(mse: float, expected: float) -> None:
    np.testing.assert_allclose(metrics.psnr(jnp.float32(mse)), expected, atol=1e-4)


@given(unit_images, unit_images)
@settings(deadline=None)
def test_mean_squared_error_is_its_definition(a: np.ndarray, b: np.ndarray) -> None:
    """To the rounding of a sum of as many numbers that are not negative, in whatever order they are added."""
    expected = np.mean((a.astype(np.float64) - b) ** 2)
    np.testing.assert_allclose(metrics.mean_squared_error(a, b), expected, rtol=(a.size + 8) * 2.0**-24, atol=1e-12)


@pytest.mark.parametrize("shape", [(10, 11, 3), (11, 10, 3), (11, 11), (0, 11, 3)])
def test_ssim_refuses_what_holds_no_window(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape of a and b = \(.*\): expected \(H, W, C\) .* at least 11"):
        metrics.ssim(jnp.zeros(shape), jnp.zeros(shape))


def test_ssim_may_be_compiled() -> None:
    a, b = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(metrics.ssim)(a, b), metrics.ssim(a, b), atol=SSIM)


def test_ssim_takes_an_image_as_small_as_the_window() -> None:
    assert metrics.ssim(jnp.zeros((11, 11, 3)), jnp.zeros((11, 11, 3))) == 1


@pytest.mark.parametrize("metric", [metrics.ssim, metrics.mean_squared_error])
def test_shapes_must_agree(metric: object) -> None:
    with pytest.raises(ValueError, match="shape of b"):
        metric(jnp.zeros((12, 12, 3)), jnp.zeros((12, 12, 1)))  # type: ignore[operator]
