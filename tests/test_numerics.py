"""Numerics: every gradient is the slope of its function in float64, and float32 keeps its digits where it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import TINY_FIELD, TINY_GRID, directions, jit_to_numpy, points, rotations

from jaxngp import cameras, compositing, encodings, fields, hashing, losses, marching, metrics, occupancy, rendering
from jaxngp.cameras import Cameras, Rays
from jaxngp.config import MarchConfig, OccupancyConfig
from jaxngp.device import formulation
from jaxngp.fields import RadianceField

RNG = np.random.default_rng(0)


both_backends = pytest.mark.parametrize("backend", ["cpu", "gpu"])


# Slopes.


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    return RNG.uniform(low, high, shape)


def unit(*shape: int) -> np.ndarray:
    vectors = RNG.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def inside_cells(num: int) -> np.ndarray:
    """Points (num, 3) away from the faces of the cells of TINY_GRID, where the slope jumps."""
    position = uniform(40 * num, 3)
    scaled = position[:, None] * np.array(hashing.level_resolutions(TINY_GRID))[:, None]
    return position[(np.abs(scaled - np.round(scaled)) > 0.01).all(axis=(1, 2))][:num]


TABLE = uniform(hashing.level_offsets(TINY_GRID)[-1], TINY_GRID.num_features, low=-1)
RAY = np.sort(RNG.integers(0, 4, 24)).astype(np.int32)
POSE = np.concatenate([np.linalg.qr(RNG.normal(size=(3, 3)))[0], [[0.1], [0.2], [0.3]]], axis=1)
# Each ray enters through one face and leaves through another, by a margin.
ORIGIN = np.array([[-1.0, 0.4, 0.45], [0.6, 2.0, 0.5], [0.3, 0.5, 0.6], [1.7, 1.9, 0.4]])
TOWARD = np.array([[0.9, 0.1, 0.2], [0.1, -0.9, 0.15], [0.2, 0.3, -0.8], [-0.7, -0.8, 0.05]])
TOWARD /= np.linalg.norm(TOWARD, axis=1, keepdims=True)
ONE_LEVEL = replace(TINY_FIELD, encoding=replace(TINY_GRID, num_levels=1))
MARCH = MarchConfig(num_steps=64, num_samples=256, occupancy=OccupancyConfig(resolution=32))
GRID = jax.jit(occupancy.init_occupancy)(np.ones(32**3, bool))


def seen(amount: jax.Array, background: jax.Array) -> Any:
    """What rays see of a cloud of a given density."""

    def cloud(position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        offset = position - 0.5
        return amount * jnp.exp(-10 * jnp.sum(offset**2, axis=-1)), 0.5 + 0.3 * jnp.sin(5 * offset + direction)

    rays = Rays(origin=jnp.asarray(ORIGIN), direction=jnp.asarray(TOWARD))
    jitter = jnp.full(4, 0.5, ORIGIN.dtype)
    out, _ = rendering.render_rays(cloud, rays, GRID, jitter, background, sampler=MARCH)
    return out.rgb, out.opacity, out.depth


def field(table: jax.Array, density: list, colour: list, position: jax.Array, direction: jax.Array) -> Any:
    kernels = [{f"Dense_{i}": {"kernel": kernel} for i, kernel in enumerate(mlp)} for mlp in (density, colour)]
    params = {"encoding": {"table": table}, "density_mlp": kernels[0], "colour_mlp": kernels[1]}
    found, rgb = RadianceField.of(params, config=ONE_LEVEL)(position, direction)
    return found, rgb, jnp.log(found)


def kernels(*widths: int) -> list[np.ndarray]:
    return [RNG.normal(size=shape) / shape[0] ** 0.5 for shape in zip(widths[:-1], widths[1:], strict=True)]


DIRECTED = TINY_FIELD.direction_degree**2 + TINY_FIELD.num_geometry_features
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "multilinear_weights": (encodings.multilinear_weights, (uniform(3),)),
    "hash_encode smooth": (
        functools.partial(encodings.hash_encode, grid=replace(TINY_GRID, smoothstep=True, num_levels=1)),
        (TABLE[: 5**3], inside_cells(8)),
    ),
    "hash_encode of a half_table": (
        lambda position: encodings.hash_encode(
            jnp.zeros_like(TABLE), position, grid=TINY_GRID, half_table=jnp.asarray(TABLE)
        ),
        (inside_cells(8),),
    ),
    "sh_encode": (functools.partial(encodings.sh_encode, degree=8), (unit(8, 3),)),
    "frequency_encode": (functools.partial(encodings.frequency_encode, num_frequencies=4), (unit(8, 3),)),
    "clamped_exp": (fields.clamped_exp, (uniform(8, low=-14, high=5),)),
    "relu": (fields.relu, (np.array([-3.0, -0.1, 0.1, 2.0]),)),
    "matmul": (lambda x, kernel: fields.matmul(x, kernel, x.dtype), (uniform(5, 7), uniform(7, 3))),
    "optical_weights": (compositing.optical_weights, (uniform(12, high=40), uniform(12, high=0.1))),
    "composite": (
        lambda density, rgb, t, dt, background: compositing.composite(density, rgb, t, dt, RAY, background),
        (uniform(24, high=30), uniform(24, 3), np.sort(uniform(24)), uniform(24, high=0.1), uniform(4, 3)),
    ),
    "blend": (compositing.blend, (uniform(4, 3), uniform(4, low=0.1), uniform(4), uniform(4, 3))),
    "optical_depth_before": (
        lambda thickness: compositing.optical_depth_before(thickness, RAY, 4),
        (uniform(24, high=3),),
    ),
    "render_rays": (seen, (np.array(20.0), uniform(4, 3))),
    "box_interval": (lambda o, d: marching.box_interval(Rays(origin=o, direction=d)), (ORIGIN, TOWARD)),
    "colour_loss l2": (functools.partial(losses.colour_loss, loss="l2"), (uniform(8), uniform(8))),
    "colour_loss huber": (
        functools.partial(losses.colour_loss, loss="huber"),
        (np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.45, 0.58, 0.1, 0.9])),
    ),
    "psnr": (lambda a, b: metrics.psnr(metrics.mean_squared_error(a, b)), (uniform(4, 3), uniform(4, 3))),
    "field": (field, (TABLE[: 5**3], kernels(2, 8, 4), kernels(DIRECTED, 8, 8, 3), inside_cells(8), unit(8, 3))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_the_slope_in_float64(name: str) -> None:
    """Along a random step in each argument alone. The differences err by h^2 times a third derivative and by 1e-16 / h,
    1e-10 both for h = 1e-5, times the steps' lengths and the derivative: 4^3 12 for smoothstep on 4 cells."""
    function, args = CASES[name]
    h, rng = 1e-5, np.random.default_rng(1)

    def total(args: list) -> jax.Array:
        leaves = jax.tree.leaves(function(*args))
        weights = [jnp.sin(1 + i + jnp.arange(a.size)).reshape(a.shape) for i, a in enumerate(leaves)]
        return jnp.stack([jnp.sum(w * a) for w, a in zip(weights, leaves, strict=True)]).sum()

    with jax.enable_x64(True):
        start = jax.tree.map(lambda a: np.asarray(a, np.float64), list(args))
        both = jit_to_numpy(jax.value_and_grad(total))
        gradient = both(start)[1]
        assert {a.dtype for a in jax.tree.leaves(gradient)} == {np.dtype(np.float64)}
        for index, arg in enumerate(start):
            step = jax.tree.map(lambda a: rng.normal(size=a.shape), arg)
            moved = [jax.tree.map(lambda a, s, sign=sign: a + sign * h * s, arg, step) for sign in (1, -1)]
            ahead, behind = (float(both([*start[:index], m, *start[index + 1 :]])[0]) for m in moved)
            expected = (ahead - behind) / (2 * h)
            pairs = zip(*map(jax.tree.leaves, (gradient[index], step)), strict=True)
            found = sum(np.sum(g * s) for g, s in pairs)
            assert abs(expected) > 1e-4
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=f"argument {index}")


# Compositing.


@functools.cache
def composer(backend: str, num_rays: int) -> Any:
    """`composite` and its gradients in density, colour, t, dt and background; traced once for each of the keys."""

    def total(args: tuple, ray: jax.Array) -> tuple[jax.Array, Any]:
        density, rgb, t, dt, background = args
        out = compositing.composite(density, rgb, t, dt, ray, background)
        return jnp.sum(out.rgb**2) + jnp.sum(out.opacity) + jnp.sum(out.depth), out

    return jit_to_numpy(jax.value_and_grad(total, has_aux=True))


def composed(backend: str, args: tuple[np.ndarray, ...], ray: np.ndarray) -> tuple[Any, Any]:
    """RenderOutput and gradients."""
    args = tuple(np.asarray(a, np.float32) for a in args)
    with formulation(backend):
        (_, out), gradients = composer(backend, len(args[4]))(args, np.asarray(ray, np.int32))
    return out, gradients


def in_float64(density: Any, rgb: Any, t: Any, dt: Any, background: Any, ray: np.ndarray) -> tuple[np.ndarray, ...]:
    """rgb, opacity and depth, ray by ray, of the same float32 numbers."""
    density, rgb, t, dt, background = (
        np.asarray(a, np.float32).astype(np.float64) for a in (density, rgb, t, dt, background)
    )
    seen, opacity, depth = background.copy(), np.zeros(len(background)), np.zeros(len(background))
    starts = np.flatnonzero(np.diff(ray, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(ray)], strict=True):
        of, one = slice(start, end), ray[start]
        thickness = density[of] * dt[of]
        before = np.concatenate([[0], np.cumsum(thickness)[:-1]])
        weight = np.exp(-before) * -np.expm1(-thickness)
        opacity[one] = weight.sum()
        seen[one] = weight @ rgb[of] + np.exp(-thickness.sum()) * background[one]
        depth[one] = weight @ t[of] / opacity[one] if opacity[one] else 0
    return seen, opacity, depth


def gradients_in_float64(args: tuple[np.ndarray, ...], ray: np.ndarray) -> Any:
    """Those of `composed`, of the same float32 numbers."""
    with jax.enable_x64(True):
        doubles = tuple(np.asarray(a, np.float32).astype(np.float64) for a in args)
        return jax.tree.map(np.asarray, composer("float64", len(args[4]))(doubles, ray)[1])


NUM = 4096
EVEN = {"one ray": np.zeros(NUM), "four rays": np.arange(NUM) // 1024, "many rays": np.arange(NUM) // 2}
DENSITIES = {
    "empty": np.zeros(NUM),
    "opaque": np.full(NUM, 1e4),
    "fog": np.full(NUM, 1e-8),
    "fog behind walls": np.where(np.arange(NUM) % 1024 == 1023, 1e-8, 1e4),
    "walls in fog": np.where(np.arange(NUM) % 512 == 511, 1e4, 1e-8),
    "thin": np.full(NUM, 1.0),
    "all at once": 10.0 ** RNG.uniform(-8, 4, NUM),
}


@functools.cache
def adversarial(rays: str) -> tuple[np.ndarray, dict[str, Any]]:
    """ray, and for each kind of density the arguments of `composed`, and values and gradients in float64."""
    ray, rng = EVEN[rays].astype(np.int32), np.random.default_rng(2)
    rgb, background = rng.uniform(size=(NUM, 3)), rng.uniform(size=(NUM // 2, 3))  # one shape: one compilation
    t, dt = np.tile(np.linspace(0, 1.7, 1024), 4), np.full(NUM, 3**0.5 / 1024)
    args = {name: (density, rgb, t, dt, background) for name, density in DENSITIES.items()}
    return ray, {name: (a, in_float64(*a, ray), gradients_in_float64(a, ray)) for name, a in args.items()}


@both_backends
@pytest.mark.parametrize("rays", EVEN)
def test_compositing_keeps_its_digits(backend: str, rays: str) -> None:
    """A ray's sums are of n products in float32, each addition off by up to 2^-25 of the sum, which is 1 at most; for
    equal summands all may err one way. Depth is a quotient of two. The fixed point of a GPU rounds each thickness to
    3e-8: fog of 1e-11 a sample is none in front of others, which is 1e-7 of what gets through."""
    ray, cases = adversarial(rays)
    error = np.bincount(ray)[0] * 2.0**-25 + 3e-6
    for name, (args, expected, slopes) in cases.items():
        out, gradients = composed(backend, args, ray)
        np.testing.assert_allclose(out.rgb, expected[0], atol=error, err_msg=name)
        np.testing.assert_allclose(out.opacity, expected[1], rtol=error, err_msg=name)
        np.testing.assert_allclose(out.depth, expected[2], rtol=2 * error, err_msg=name)
        # What a slope is made of cancels: behind a wall, or of a depth between equal ones. So each is measured by its
        # largest term, of which that in the depth is over the opacity.
        term = 8 + 4 / np.where(expected[1] > 0, expected[1], 1)[ray]
        scales = args[3] * term, 2.0, 1.0, args[0] * term, 2.0
        for found, slope, scale in zip(gradients, slopes, scales, strict=True):
            off = np.abs(np.asarray(found, np.float64) - slope)
            assert (off <= 4 * error * np.asarray(scale) + 1e-30).all(), name


extremes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-36, 1e-30, 1e-20, 1e-8, 1.0, 60.0, 1e4, 3.3e6])


@both_backends
@given(
    density=hnp.arrays(np.float32, 24, elements=extremes),
    dt=hnp.arrays(np.float32, 24, elements=st.sampled_from([0.0, 1e-30, 1e-4, 2e-3, 1.0])),
    rgb=hnp.arrays(np.float32, (24, 3), elements=st.sampled_from([0.0, 0.5, 1.0])),
    start=st.sampled_from([0.0, 1.0]),
)
def test_gradients_of_compositing_are_finite(
    backend: str, density: np.ndarray, dt: np.ndarray, rgb: np.ndarray, start: float
) -> None:
    # A field has densities up to e^15 = 3.3e6, and the cube distances up to 3.
    t = start + np.minimum(np.cumsum(dt), 2)
    out, gradients = composed(backend, (density, rgb, t, dt, np.ones((4, 3))), RAY)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((out, gradients)))


@pytest.mark.parametrize("opacity", [1e-30, 1e-20, 1e-10, 0.5])
def test_the_slope_of_the_depth_of_next_to_nothing(opacity: float) -> None:
    """In the opacity -depth / opacity, in the weighted sum 1 / opacity; below FAINT there is neither."""

    def depth(share: jax.Array, total: jax.Array) -> jax.Array:
        return compositing.blend(jnp.zeros(3), share, total, jnp.zeros(3)).depth

    value_and_slope = jit_to_numpy(jax.value_and_grad(depth, argnums=(0, 1)))
    value, slope = value_and_slope(np.float32(opacity), np.float32(2 * opacity))
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    np.testing.assert_allclose(slope, [-2 / opacity, 1 / opacity], rtol=1e-6)
    np.testing.assert_array_equal(value_and_slope(np.float32(1e-36), np.float32(1e-36))[1], 0)


# Everything else stays finite too.

PARAMS = jit_to_numpy(fields.init_params, static_argnames="config")(jax.random.key(0), config=ONE_LEVEL)
SIDES = np.float32([0.0, -0.0, 1e-45, 1e-40, 1e-13, -1e-13, 1e-11, 1e-6, 1.0, -1.0])
awkward_directions = hnp.arrays(np.float32, (8, 3), elements=st.sampled_from(SIDES.tolist())).map(
    lambda d: np.where((np.abs(d) > 0.5).any(axis=1, keepdims=True), d, np.float32([0, 0, 1]))
)


@jit_to_numpy
def all_slopes(params: Any, origin: jax.Array, direction: jax.Array, background: jax.Array) -> Any:
    def total(params: Any, origin: jax.Array, direction: jax.Array, background: jax.Array) -> jax.Array:
        rays = Rays(origin=origin, direction=direction)
        out, _ = rendering.render_rays(
            RadianceField.of(params, config=ONE_LEVEL), rays, GRID, jnp.full(8, 0.5), background, sampler=MARCH
        )
        error = losses.colour_loss(out.rgb, 1.0, loss="huber")
        near, far = marching.box_interval(rays)
        return jnp.sum(error) + jnp.sum(out.opacity) + jnp.sum(out.depth) + jnp.sum(near) + jnp.sum(far)

    return jax.grad(total, argnums=(0, 1, 2, 3))(params, origin, direction, background)


@settings(max_examples=60)
@given(points(8), awkward_directions, st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4]), st.sampled_from([-1.0, 1.0]))
def test_gradients_of_rendering_are_finite(
    origin: np.ndarray, direction: np.ndarray, scale: float, sign: float
) -> None:
    """From corners, faces and inside of cells, along axes and next to it; from fields of no density to opaque ones with
    saturated colours."""
    params = jax.tree.map(lambda a: np.float32(sign * scale) * np.sign(a) / np.float32(a.shape[0]), PARAMS)
    direction = direction / np.linalg.norm(direction.astype(np.float64), axis=1, keepdims=True).astype(np.float32)
    gradients = all_slopes(params, origin, direction, np.ones((8, 3), np.float32))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@jit_to_numpy
def camera_slopes(c2w: jax.Array, pixel: jax.Array, point: jax.Array) -> Any:
    def total(c2w: jax.Array, pixel: jax.Array, point: jax.Array) -> jax.Array:
        camera = Cameras(c2w, jnp.array([20.0, 25.0]), jnp.array([4.0, 4.0]), jnp.array([8, 8], jnp.int32))
        rays = cameras.unproject(camera, pixel)
        found, depth = cameras.project(camera, point)
        return jnp.sum(rays.direction) + jnp.sum(rays.origin) + jnp.sum(found) + jnp.sum(depth)

    return jax.grad(total, argnums=(0, 1, 2))(c2w, pixel, point)


@given(rotations(), points(4), hnp.arrays(np.float32, (4, 2), elements=st.sampled_from([0.0, 4.0, 8.0, -1e6, 1e6])))
def test_gradients_of_a_camera_are_finite(rotation: np.ndarray, point: np.ndarray, pixel: np.ndarray) -> None:
    """Points in the camera, and in its plane, among them."""
    c2w = np.concatenate([rotation, point[0][:, None]], axis=1)
    assert all(np.isfinite(g).all() for g in camera_slopes(c2w, pixel, point))


@jit_to_numpy
def encoding_slopes(fraction: jax.Array, direction: jax.Array, x: jax.Array) -> Any:
    def total(fraction: jax.Array, direction: jax.Array, x: jax.Array) -> jax.Array:
        return (
            jnp.sum(jax.vmap(encodings.multilinear_weights)(fraction) ** 2)
            + jnp.sum(encodings.sh_encode(direction, degree=8) ** 2)
            + jnp.sum(encodings.frequency_encode(direction, num_frequencies=16))
            + jnp.sum(fields.relu(x))
            + jnp.sum(jnp.log1p(fields.clamped_exp(x)))
            + jnp.sum(losses.colour_loss(x, 0.0, loss="huber"))
            + metrics.psnr(1e-30 + metrics.mean_squared_error(x, jnp.zeros_like(x)))
        )

    return jax.grad(total, argnums=(0, 1, 2))(fraction, direction, x)


@given(
    points(8),
    directions(8),
    hnp.arrays(np.float32, 8, elements=st.sampled_from([0.0, -0.0, 0.1, -1.0, 15.0, -1e4, 1e4, 1e15])),
)
def test_gradients_of_encodings_and_losses_are_finite(
    fraction: np.ndarray, direction: np.ndarray, x: np.ndarray
) -> None:
    assert all(np.isfinite(g).all() for g in encoding_slopes(fraction, direction, x))
