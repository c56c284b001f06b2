"""Lenses: by their published formulas in float64, inverted over the whole image, and differentiated."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strategies import jit_to_numpy

from jaxngp import lenses
from jaxngp.lenses import COEFFICIENTS, MODELS, Lens, make_lens

distort, undistort = jit_to_numpy(lenses.distort), jit_to_numpy(lenses.undistort)
ROWS = 2  # that differ, of every call of make_lens, so that each model compiles once

# Model, coefficients, width, height, focal length: as calibrations of phones, cameras and panoramas have them.
PRACTICE: dict[str, tuple[str, dict[str, float], int, int, float]] = {
    "phone": ("perspective", {"k1": 0.0578, "k2": -0.0805, "p1": -0.00098, "p2": 0.000156}, 1080, 1920, 1375.0),
    "wide angle": ("perspective", {"k1": -0.28, "k2": 0.07, "p1": 2e-4, "p2": -3e-5}, 752, 480, 458.0),
    "barrel": ("perspective", {"k1": -0.12, "k2": 0.01}, 4000, 3000, 2900.0),
    "pincushion": ("perspective", {"k1": 0.25, "k2": 0.1}, 1920, 1080, 1600.0),
    "rational": (
        "perspective",
        {"k1": 6.1, "k2": 4.2, "k3": 0.25, "d1": 6.4, "d2": 6.3, "d3": 1.2, "p1": 1e-4, "p2": -1e-4},
        1920,
        1080,
        980.0,
    ),
    "r to the eighth": ("perspective", {"k1": -0.1, "k2": 0.05, "k3": -0.02, "k4": 0.004}, 1920, 1080, 1300.0),
    "thin prism": (
        "perspective",
        {"k1": 0.03, "s1": 0.01, "s2": -0.004, "s3": -0.008, "s4": 0.003},
        1280,
        960,
        1100.0,
    ),
    "equidistant": ("fisheye", {}, 1600, 1200, 520.0),
    "action camera": ("fisheye", {"k1": 0.035, "k2": 0.018, "k3": -0.014, "k4": 0.003}, 1920, 1080, 870.0),
    "robot": ("fisheye", {"k1": -0.0135, "k2": 0.0208, "k3": -0.0127, "k4": 0.0025}, 512, 512, 190.9),
    "thin prism fisheye": (
        "fisheye",
        {"k1": -0.02, "k2": 0.006, "p1": 4e-4, "p2": -2e-4, "s1": 1e-3, "s3": -8e-4},
        6048,
        4032,
        3400.0,
    ),
    "one parameter division": ("division", {"k": -0.22}, 1280, 720, 700.0),
    "field of view": ("fov", {"omega": 0.93}, 640, 480, 260.0),
    "enhanced unified": ("eucm", {"alpha": 0.57, "beta": 1.13}, 1280, 800, 460.0),
    "panorama": ("equirectangular", {}, 4096, 2048, 4096 / (2 * np.pi)),
}
every_lens = pytest.mark.parametrize("name", PRACTICE)


@functools.cache
def lens_of(name: str) -> tuple[Lens, np.ndarray, np.ndarray]:
    """A single lens, its error in pixels, and places (2, N) over its whole image, in focal lengths."""
    model, said, width, height, focal = PRACTICE[name]
    coefficients = [said.get(key, 0.0) for key in COEFFICIENTS[model]]
    centre = [width / 2, height / 2] if model == "equirectangular" else [0.51 * width, 0.49 * height]
    shape = {"focal_xy": [[focal, focal], [9e3, 9e3]], "centre_xy": [centre] * ROWS, "size": [[width, height]] * ROWS}
    several, error = make_lens(model, [coefficients] * ROWS, **shape)
    x, y = np.meshgrid(np.linspace(0.5, width - 0.5, 41), np.linspace(0.5, height - 0.5, 37))
    place = (np.stack([x.ravel(), y.ravel()]) - np.array(centre)[:, None]) / focal
    return jax.tree.map(lambda array: np.asarray(array)[0], several), error, place


def published(model: str, said: dict[str, float], direction: np.ndarray) -> np.ndarray:
    """Where directions (3, N) are shown (2, N), in float64."""
    x, y, z = direction
    c = dict.fromkeys(COEFFICIENTS[model], 0.0) | said
    if model in ("perspective", "fisheye"):
        with np.errstate(invalid="ignore", divide="ignore"):
            a, b = x / z, y / z
            if model == "fisheye":
                r = np.hypot(x, y)
                theta = np.arctan2(r, z)
                a, b = (np.where(r > 0, axis * theta / r, 0) for axis in (x, y))
        r2 = a**2 + b**2
        up = 1 + c["k1"] * r2 + c["k2"] * r2**2 + c["k3"] * r2**3 + c["k4"] * r2**4
        down = 1 + c["d1"] * r2 + c["d2"] * r2**2 + c["d3"] * r2**3
        u = a * up / down + 2 * c["p1"] * a * b + c["p2"] * (r2 + 2 * a**2) + c["s1"] * r2 + c["s2"] * r2**2
        v = b * up / down + c["p1"] * (r2 + 2 * b**2) + 2 * c["p2"] * a * b + c["s3"] * r2 + c["s4"] * r2**2
        return np.stack([u, v])
    if model == "division":  # the root of ru (1 + k rd^2) = rd that is ru for k = 0
        ru = np.hypot(x, y) / z
        rd = (1 - np.sqrt(1 - 4 * c["k"] * ru**2)) / (2 * c["k"] * np.where(ru > 0, ru, 1))
        return np.stack([x, y]) / z * np.where(ru > 0, rd / np.where(ru > 0, ru, 1), 1)
    if model == "fov":
        ru = np.hypot(x, y) / z
        rd = np.arctan(2 * ru * np.tan(c["omega"] / 2)) / c["omega"]
        return np.stack([x, y]) / z * np.where(ru > 0, rd / np.where(ru > 0, ru, 1), 1)
    if model == "eucm":
        return np.stack([x, y]) / (c["alpha"] * np.sqrt(c["beta"] * (x**2 + y**2) + z**2) + (1 - c["alpha"]) * z)
    return np.stack([np.arctan2(x, z), np.arcsin(y / np.sqrt(x**2 + y**2 + z**2))])


def test_every_model_is_tried() -> None:
    assert {model for model, *_ in PRACTICE.values()} == set(MODELS)


@every_lens
def test_a_lens_is_inverted_over_the_image(name: str) -> None:
    """To 1e-3 px, by the published formula; and a lens of practice is not taken for one that folds over."""
    model, said, _, _, focal = PRACTICE[name]
    lens, error, place = lens_of(name)
    u, v = place.astype(np.float32)
    direction = np.stack(undistort(lens, u, v))
    assert np.abs(published(model, said, direction.astype(np.float64)) - place).max() * focal < 1e-3
    back_u, back_v, shown = distort(lens, *direction)
    assert shown.all()
    assert np.abs(np.stack([back_u, back_v]) - place).max() * focal < 1e-3
    assert error[0] < 0.01


@every_lens
def test_directions_may_have_any_length(name: str) -> None:
    lens, _, place = lens_of(name)
    direction = np.stack(undistort(lens, *place.astype(np.float32)))
    for length in (1e-3, 1e3):
        u, v, shown = distort(lens, *(direction * np.float32(length)))
        assert shown.all()
        np.testing.assert_allclose(np.stack([u, v]), place, atol=1e-5)


@every_lens
def test_stretch_bounds_how_far_a_place_moves(name: str) -> None:
    """Over the whole image: two directions an angle apart are at most stretch times that apart in it."""
    lens, _, place = lens_of(name)
    model, said, *_ = PRACTICE[name]
    direction = np.stack(undistort(lens, *place.astype(np.float32))).astype(np.float64)
    direction /= np.linalg.norm(direction, axis=0)
    rng = np.random.default_rng(0)
    step = rng.normal(size=direction.shape)
    step -= direction * np.sum(step * direction, axis=0)
    step *= 1e-6 / np.linalg.norm(step, axis=0)
    moved = published(model, said, direction + step) - published(model, said, direction)
    assert (np.linalg.norm(moved, axis=0) <= float(lens.stretch) * 1e-6 * (1 + 1e-4)).all()


def test_what_is_beyond_reach_is_not_shown() -> None:
    lens, _, place = lens_of("wide angle")
    reach = float(lens.reach)
    corner = np.arctan(np.hypot(*np.stack(undistort(lens, *place.astype(np.float32)))[:2]).max())
    assert 1.02 * corner < reach < 1.2 * corner
    for angle, expected in ((0.99 * reach, True), (1.01 * reach, False), (np.pi - 1e-3, False)):
        u, v, shown = distort(lens, *np.array([[np.sin(angle)], [0.0], [np.cos(angle)]], np.float32))
        assert bool(shown[0]) == expected
        assert np.isfinite([u, v]).all()


def test_a_fisheye_looks_behind() -> None:
    lens, _, _ = lens_of("equidistant")
    assert float(lens.reach) > np.pi / 2
    u, v, shown = distort(lens, *np.array([[np.sin(1.8)], [0.0], [np.cos(1.8)]], np.float32))
    assert bool(shown[0])
    np.testing.assert_allclose([u[0], v[0]], [1.8, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "coefficients", "focal"),
    [
        ("perspective", {"k1": -0.5}, 500.0),  # has its largest radius at r = 0.82, and the corner lies at 1.41
        ("perspective", {"k1": 1.0, "k2": -1.0}, 500.0),
        ("fisheye", {"k1": -0.1}, 300.0),
        ("division", {"k": -0.9}, 500.0),
        ("eucm", {"alpha": 0.9, "beta": 1.0}, 300.0),
    ],
)
def test_a_lens_that_folds_over_is_reported(model: Any, coefficients: dict[str, float], focal: float) -> None:
    """Of several, the one that does; its reach and stretch are finite all the same."""
    folded = [coefficients.get(key, 0.0) for key in COEFFICIENTS[model]]
    rows, focal_xy = [folded, [0.01 * value for value in folded]], [[focal, focal], [9e3, 9e3]]
    lens, error = make_lens(model, rows, focal_xy=focal_xy, centre_xy=[[500, 500]] * ROWS, size=[[1000, 1000]] * ROWS)
    assert error[0] > 1
    assert error[1] < 0.01
    assert np.isfinite([lens.reach, lens.stretch]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phone", "rational", "action camera", "field of view", "enhanced unified"])
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    """Of directions in coefficients and places, in float64, in the middle and off it."""
    with jax.enable_x64(True):
        lens, _, _ = lens_of(name)
        coefficients = jnp.asarray(lens.coefficients, jnp.float64)
        place = jnp.asarray([[0.0, 0.3, -0.2], [0.0, -0.2, 0.35]], jnp.float64)
        weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))

        def seen(c: jax.Array, place: jax.Array) -> jax.Array:
            direction = jnp.stack(lenses.undistort(lens.replace(coefficients=c), *place))
            return jnp.sum(weight * direction / jnp.linalg.norm(direction, axis=0))

        for argument, value in enumerate((coefficients, place)):
            gradient = np.asarray(jax.grad(seen, argument)(coefficients, place)).ravel()
            for i in range(value.size):
                step = np.zeros(value.size)
                step[i] = 1e-5
                both = [[coefficients, place], [coefficients, place]]
                for arguments, sign in zip(both, (1, -1), strict=True):
                    arguments[argument] = value + sign * step.reshape(value.shape)
                expected = (seen(*both[0]) - seen(*both[1])) / 2e-5
                np.testing.assert_allclose(gradient[i], expected, rtol=1e-5, atol=1e-7)


def test_lenses_of_several_views_keep_apart() -> None:
    rows = [[0.1, *[0.0] * 12], [0.2, *[0.0] * 12], [0.1, *[0.0] * 12]]
    lens, error = make_lens(
        "perspective", rows, focal_xy=[[50.0, 50]] * 3, centre_xy=[[16, 12.0]] * 3, size=[[32, 24]] * 3
    )
    assert lens.reach[0] == lens.reach[2] != lens.reach[1]
    np.testing.assert_array_equal(lens.coefficients, np.float32(rows))
    assert (error < 1e-3).all()
