"""Compositing: packed samples against one ray after the other, in float64, values and gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import arrays32, floats32, jit_to_numpy, needs_float16

from jaxngp import compositing
from jaxngp.device import formulation

N, R = 24, 5

composite = jit_to_numpy(compositing.composite)
optical_weights = jit_to_numpy(compositing.optical_weights)
blend = jit_to_numpy(compositing.blend)

# From clear to opaque in one sample, and side by side.
densities = hnp.arrays(np.float32, N, elements=floats32(1e-6, 60) | st.sampled_from([0.0, 1e-8, 1.0, 1e4]))
steps = hnp.arrays(np.float32, N, elements=floats32(1e-4, 0.5) | st.sampled_from([0.0, 2e-3, 2.0]))


@dataclasses.dataclass
class Packed:
    """The arguments of `composite`."""

    density: np.ndarray
    rgb: np.ndarray
    t: np.ndarray
    dt: np.ndarray
    ray: np.ndarray
    background: np.ndarray

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (getattr(self, f.name) for f in dataclasses.fields(self))


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    """Samples of five rays, of which some may have none."""
    dt = draw(steps)
    ray = np.sort(draw(hnp.arrays(np.int32, N, elements=st.integers(0, R - 1))))
    return Packed(
        density=draw(densities),
        rgb=draw(arrays32((N, 3), 0, 1)),
        t=np.cumsum(dt, dtype=np.float32),
        dt=dt,
        ray=ray,
        background=draw(arrays32((R, 3), 0, 1)),
    )


def by_definition(p: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rgb, opacity and depth (R, ...), ray by ray, in the precision of the arguments; complex ones too."""
    kind = np.result_type(p.density, p.rgb, np.float64)
    rgb, opacity, depth = np.zeros((R, 3), kind), np.zeros(R, kind), np.zeros(R, kind)
    for ray in range(R):
        light = np.ones((), kind)
        for i in np.flatnonzero(p.ray == ray):
            thickness = p.density[i].astype(kind) * float(p.dt[i])
            weight = light * -np.expm1(-thickness)
            rgb[ray] += weight * p.rgb[i]
            opacity[ray] += weight
            depth[ray] += weight * float(p.t[i])
            light = light * np.exp(-thickness)
        rgb[ray] += light * p.background[ray]
        depth[ray] = depth[ray] / opacity[ray] if opacity[ray] else 0
    return rgb, opacity, depth


@given(packed())
def test_packed_compositing_is_the_definition_per_ray(p: Packed) -> None:
    out = composite(*p)
    rgb, opacity, depth = by_definition(p)
    np.testing.assert_allclose(out.rgb, rgb, atol=5e-6)
    np.testing.assert_allclose(out.opacity, opacity, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(out.depth, depth, rtol=3e-5, atol=1e-6)


@jit_to_numpy
def gradients(p: list[jax.Array], towards: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss(density: jax.Array, rgb: jax.Array) -> jax.Array:
        out = compositing.composite(density, rgb, *p[2:])
        return jnp.sum(towards[:, :3] * out.rgb) + jnp.sum(towards[:, 3] * out.opacity)

    return jax.grad(loss, argnums=(0, 1))(*p[:2])


@given(packed(), arrays32((R, 4), -1, 1))
def test_the_gradients_are_those_of_the_definition(p: Packed, towards: np.ndarray) -> None:
    def slope(**changed: np.ndarray) -> float:
        """The derivative along a step of 1e-30 i: exact, for nothing is subtracted."""
        rgb, opacity, _ = by_definition(dataclasses.replace(p, **changed))
        return float((np.sum(towards[:, :3] * rgb) + np.sum(towards[:, 3] * opacity)).imag * 1e30)

    found_density, found_rgb = gradients(list(p), towards)
    for i in range(0, N, 3):
        step = 1e-30j * (np.arange(N) == i)
        scale = max(float(p.dt[i]), 1e-12)
        np.testing.assert_allclose(found_density[i] / scale, slope(density=p.density + step) / scale, atol=5e-5)
        np.testing.assert_allclose(found_rgb[i, 1], slope(rgb=p.rgb + step[:, None] * np.array([0, 1, 0])), atol=1e-5)


@given(densities, steps)
def test_weights_and_what_gets_through_sum_to_one(density: np.ndarray, dt: np.ndarray) -> None:
    weights, through = optical_weights(density, dt)
    np.testing.assert_allclose(np.asarray(weights, np.float64).sum() + through, 1, atol=3e-6)
    assert (np.asarray(weights) >= 0).all()
    assert 0 <= through <= 1


def test_opaque_samples_do_not_blur_those_before() -> None:
    """The sum in front of a sample must not be a difference with its own thickness in it."""
    density, dt = np.float32([1.3, 0.7, 3e6]), np.float32([0.03, 0.03, 0.03])
    weights, _ = optical_weights(density, dt)
    thickness = density.astype(np.float64) * dt
    expected = np.exp(-np.append(0, np.cumsum(thickness)[:-1])) * -np.expm1(-thickness)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@given(densities, steps)
def test_the_definition_of_one_ray_is_the_packed_one(density: np.ndarray, dt: np.ndarray) -> None:
    weights, through = optical_weights(density, dt)
    rgb = np.tile(np.linspace(0, 1, N, dtype=np.float32)[:, None], (1, 3))
    out = composite(density, rgb, np.cumsum(dt), dt, np.full(N, 2, np.int32), np.zeros((R, 3), np.float32))
    np.testing.assert_allclose(out.opacity[2], 1 - through, atol=3e-6)
    np.testing.assert_allclose(out.rgb[2, 0], np.sum(np.asarray(weights) * rgb[:, 0]), atol=3e-6)


@given(packed())
def test_splitting_a_constant_interval_changes_nothing(p: Packed) -> None:
    def halves(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 2, axis=0)

    whole = composite(*p)
    split = composite(halves(p.density), halves(p.rgb), halves(p.t), halves(p.dt / 2), halves(p.ray), p.background)
    np.testing.assert_allclose(split.rgb, whole.rgb, atol=5e-6)
    np.testing.assert_allclose(split.opacity, whole.opacity, rtol=1e-5)
    np.testing.assert_allclose(split.depth, whole.depth, rtol=3e-5)


@given(packed())
def test_without_density_the_background_is_seen(p: Packed) -> None:
    out = composite(*dataclasses.replace(p, density=np.zeros(N, np.float32)))
    np.testing.assert_array_equal(out.rgb, p.background)
    np.testing.assert_array_equal(out.opacity, 0)
    np.testing.assert_array_equal(out.depth, 0)


@given(packed())
def test_an_opaque_first_sample_hides_all_others(p: Packed) -> None:
    density, dt = p.density.copy(), p.dt.copy()
    _, first = np.unique(p.ray, return_index=True)
    density[first], dt[first] = 1e4, 1.0
    out = composite(*dataclasses.replace(p, density=density, dt=dt))
    for i in first:
        np.testing.assert_allclose(out.rgb[p.ray[i]], p.rgb[i], atol=1e-6)
        np.testing.assert_allclose(out.opacity[p.ray[i]], 1, atol=1e-6)
        np.testing.assert_allclose(out.depth[p.ray[i]], p.t[i], rtol=1e-6, atol=1e-12)  # e^-32 gets through


@given(packed(), hnp.arrays(bool, N))
def test_samples_of_no_length_have_no_effect(p: Packed, void: np.ndarray) -> None:
    dt = np.where(void, np.float32(0), p.dt)
    with_void = dataclasses.replace(p, dt=dt)
    changed = dataclasses.replace(
        with_void, density=np.where(void, np.float32(3e3), p.density), rgb=np.where(void[:, None], 7, p.rgb)
    )
    for a, b in zip(jax.tree.leaves(composite(*with_void)), jax.tree.leaves(composite(*changed)), strict=True):
        np.testing.assert_array_equal(a, b)
    for gradient in gradients(list(with_void), np.ones((R, 4), np.float32)):
        np.testing.assert_array_equal(np.asarray(gradient)[void], 0)


@given(packed(), arrays32((N, 3), 0, 1), st.integers(0, R - 1))
def test_no_ray_sees_the_samples_of_another(p: Packed, other_rgb: np.ndarray, ray: int) -> None:
    """However opaque they are: the running sum starts anew with each ray."""
    others = p.ray != ray
    changed = dataclasses.replace(
        p, density=np.where(others, np.float32(1e4), p.density), rgb=np.where(others[:, None], other_rgb, p.rgb)
    )
    np.testing.assert_array_equal(composite(*p).rgb[ray], composite(*changed).rgb[ray])


def sums_of_others(value: np.ndarray, ray: np.ndarray, *, behind: bool) -> np.ndarray:
    """In float64, the sum over the samples before each one of its ray, or behind it."""
    index = np.arange(len(value))
    other = (ray[:, None] == ray) & ((index[:, None] < index) if behind else (index[:, None] > index))
    return other @ value.astype(np.float64)


ways_to_sum = pytest.mark.parametrize(
    "exclusive_sum",
    [
        jit_to_numpy(compositing.exclusive_scan),
        jit_to_numpy(lambda value, ray: compositing.exclusive_fixed_point(value, ray, R, jnp.float32(64))),
    ],
    ids=["scan", "fixed_point"],
)


@ways_to_sum
@given(p=packed(), signs=arrays32(N, -1, 1))
def test_the_sum_before_a_sample_is_over_its_own_ray(exclusive_sum: Any, p: Packed, signs: np.ndarray) -> None:
    value = np.minimum(p.density, 60) * signs
    expected = sums_of_others(value, p.ray, behind=False)
    np.testing.assert_allclose(exclusive_sum(value, p.ray), expected, rtol=1e-6, atol=2e-5)


@ways_to_sum
def test_optical_depth_ignores_other_rays(exclusive_sum: Any) -> None:
    """2^17 samples of 60 are 2^22 of the bound: a running sum of 32 bits wraps around many times."""
    samples = 2**17 // R
    ray = np.repeat(np.arange(R, dtype=np.int32), samples)
    value = np.where(ray == R - 1, 2.0**-10, 60).astype(np.float32)
    expected = np.tile(np.arange(samples), R) * value
    # Exact both ways: the sums of one ray are whole multiples of its value, and those of two are not.
    np.testing.assert_array_equal(exclusive_sum(value, ray), expected)


def test_optical_depth_counts_an_opaque_sample() -> None:
    thickness, ray = np.float32([1e9, 0.25, 3e38, 1.5, 0.5]), np.int32([0, 0, 0, 1, 1])
    found = jax.jit(compositing.optical_depth_before, static_argnums=2)(thickness, ray, 2)
    np.testing.assert_allclose(found, [0, 32, 32.25, 0, 1.5])


@ways_to_sum
@given(p=packed(), cotangent=arrays32(N, -1, 1))
def test_optical_depth_gradient_goes_to_what_is_before(exclusive_sum: Any, p: Packed, cotangent: np.ndarray) -> None:
    expected = sums_of_others(cotangent, p.ray, behind=True)
    backwards = exclusive_sum(cotangent[::-1].copy(), p.ray[::-1].copy())[::-1]
    np.testing.assert_allclose(backwards, expected, rtol=1e-6, atol=3e-6)
    depth, pulled = depth_and_slope_here(p.density, p.ray, cotangent)
    assert depth.shape == (N,)
    np.testing.assert_allclose(pulled, expected, rtol=1e-6, atol=3e-6)


def depth_and_slope(thickness: jax.Array, ray: jax.Array, cotangent: jax.Array) -> Any:
    """The optical depth before each sample, and the gradient in the thickness of its product with a cotangent."""
    depth, pull = jax.vjp(lambda thickness: compositing.optical_depth_before(thickness, ray, R), thickness)
    return depth, *pull(cotangent)


depth_and_slope_here = jit_to_numpy(depth_and_slope)


@functools.cache
def depth_and_slope_of_a_gpu() -> Any:
    args = [np.zeros(N, kind) for kind in (np.float32, np.int32, np.float32)]
    with formulation("gpu"):
        return jax.jit(lambda *args: depth_and_slope(*args)).lower(*args).compile()  # traced anew


@ways_to_sum
def test_the_longest_opaque_ray_is_summed_exactly(exclusive_sum: Any) -> None:
    """As many samples as a ray may have, each at the bound."""
    count = 2**16 - 1
    found = exclusive_sum(np.full(count, 64, np.float32), np.zeros(count, np.int32))
    np.testing.assert_array_equal(found, 64.0 * np.arange(count))


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1e3])
def test_optical_depth_is_its_definition_on_a_gpu_too(scale: float) -> None:
    """The optical depth and its gradient, in the formulation of a GPU."""
    rng = np.random.default_rng(0)
    ray = np.sort(rng.integers(0, R, N)).astype(np.int32)
    thickness = rng.choice([0.0, 1e-6, 0.3, 5.0, 40.0], N).astype(np.float32)
    cotangent = (scale * rng.uniform(-1, 1, N)).astype(np.float32)
    depth, pulled = depth_and_slope_of_a_gpu()(thickness, ray, cotangent)
    expected = sums_of_others(np.minimum(thickness, 32), ray, behind=False)
    np.testing.assert_allclose(depth, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(pulled, sums_of_others(cotangent, ray, behind=True), atol=1e-6 * scale)


def test_both_formulations_agree_on_second_derivatives() -> None:
    ray = np.int32([0, 0, 1, 1, 1])
    dt, rgb, background = np.full(5, 0.1, np.float32), np.eye(5, 3, dtype=np.float32), np.zeros((2, 3), np.float32)

    def loss(density: jax.Array) -> jax.Array:
        return jnp.sum(compositing.composite(density, rgb, dt, dt, ray, background).rgb ** 2)

    density = np.arange(1, 6, dtype=np.float32)
    expected = jit_to_numpy(jax.jacrev(jax.grad(loss)))(density)
    with formulation("gpu"):
        found = jit_to_numpy(jax.jacrev(jax.grad(lambda density: loss(density))))(density)  # traced anew
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found)[:2, 2:], 0)  # of two rays, neither knows of the other


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=needs_float16), jnp.bfloat16])
def test_compositing_takes_few_bits_and_no_samples(dtype: Any) -> None:
    few = [np.array(a, dtype) for a in ([1.0, 2.0], [[1.0, 0, 0], [0, 1.0, 0]], [0.1, 0.2], [0.1, 0.1])]
    out = composite(*few, np.zeros(2, np.int32), np.zeros((1, 3), dtype))
    np.testing.assert_allclose(out.opacity.astype(np.float32), [1 - np.exp(-0.3)], rtol=2e-2)
    none = (np.zeros((0, *a.shape[1:]), np.float32) for a in few)
    none = composite(*none, np.zeros(0, np.int32), np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(none.rgb, 1)
    np.testing.assert_array_equal(none.opacity, 0)


def test_thin_fog_on_many_rays_keeps_its_digits() -> None:
    """A running sum over all samples minus its start would have none left here."""
    rays, samples = 2000, 50
    density = np.full(rays * samples, 1e-3, np.float32)
    density[: samples * 1000] = 1e4
    dt, ray = np.full_like(density, 2e-3), np.repeat(np.arange(rays, dtype=np.int32), samples)
    out = composite(
        density, np.ones((len(ray), 3), np.float32), np.ones_like(dt), dt, ray, np.zeros((rays, 3), np.float32)
    )
    np.testing.assert_allclose(out.opacity[1000:], -np.expm1(-1e-3 * 2e-3 * samples), rtol=1e-5)


@pytest.mark.parametrize("opacity", [0.0, 1e-30, 0.25, 1.0])
def test_blend_divides_depth_by_any_opacity(opacity: float) -> None:
    share = np.array([opacity], np.float32)
    out = blend(np.full((1, 3), 0.5 * share), share, 2 * share, np.ones((1, 3), np.float32))
    np.testing.assert_allclose(out.depth, [2.0 if opacity else 0.0], rtol=1e-6)
    np.testing.assert_allclose(out.rgb, np.full((1, 3), 1 - 0.5 * opacity), atol=1e-6)
