"""Shapes of a closed form: their distance is one, their samples are uniform, and what is learned from is their mix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import cKDTree
from strategies import seeds

from jaxngp.data import solids
from jaxngp.data.shapes import SHAPES, Box, Capsule, Cylinder, Shape, Sphere, Torus

STEP = 1e-7  # of finite differences in f64
ROUNDING = 1e-14  # of distances up to 1 in f64: numpy's sine, root and norm differ by some 1e-16 from CPU to CPU
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
UNION = SHAPES["shapes"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def anywhere(count: int, seed: int = 1) -> np.ndarray:
    """Points in the unit cube and around it."""
    return rng(seed).uniform(-0.25, 1.25, (count, 3))


def gradient(shape: Shape, points: np.ndarray) -> np.ndarray:
    axes = STEP * np.eye(3)
    return np.stack([shape.distance(points + e) - shape.distance(points - e) for e in axes], axis=1) / (2 * STEP)


@every_shape
def test_the_gradient_is_unit_and_leads_to_the_surface(shape: Shape) -> None:
    points = anywhere(20000)
    slope = gradient(shape, points)
    smooth = np.abs(np.linalg.norm(slope, axis=1) - 1) < 1e-6
    assert smooth.mean() > 0.9995  # but where two nearest points are equally far
    foot = points - shape.distance(points)[:, None] * slope
    np.testing.assert_allclose(shape.distance(foot[smooth]), 0, atol=1e-6)


@every_shape
@given(seed=seeds, scale=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_distance_grows_no_faster_than_a_step(shape: Shape, seed: int, scale: float) -> None:
    start = anywhere(100, seed)
    step = scale * rng(seed + 1).normal(size=(100, 3))
    change = np.abs(shape.distance(start + step) - shape.distance(start))
    assert (change <= np.linalg.norm(step, axis=1) + ROUNDING).all()


@every_shape
def test_the_distance_is_that_to_the_nearest_point(shape: Shape) -> None:
    samples, _ = shape.surface(rng(), 100_000)
    points = anywhere(5000)
    nearest, _ = cKDTree(samples).query(points)
    distance = np.abs(shape.distance(points))
    assert (nearest >= distance - 1e-12).all()
    assert (nearest <= distance + 0.03).all()
    np.testing.assert_array_equal(shape.unsigned_distance(points), distance)


@every_shape
def test_samples_lie_on_the_surface_with_outer_normals(shape: Shape) -> None:
    points, normals = shape.surface(rng(), 5000)
    assert points.shape == normals.shape == (5000, 3)
    np.testing.assert_allclose(shape.distance(points), 0, atol=ROUNDING)
    np.testing.assert_allclose(normals, gradient(shape, points), atol=1e-5)
    assert shape.inside(points - 1e-9 * normals).all()
    assert not shape.inside(points + 1e-9 * normals).any()


@every_shape
def test_the_box_holds_the_surface_and_little_more(shape: Shape) -> None:
    points, _ = shape.surface(rng(), 200_000)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = solids.INFLATION * (high - low).max()
    np.testing.assert_allclose(shape.box, [low - margin, high + margin], atol=3e-3)
    assert shape.box[0].min() >= 0
    assert shape.box[1].max() <= 1
    assert (points >= shape.box[0]).all()
    assert (points <= shape.box[1]).all()
    np.testing.assert_array_equal(shape.to_world(points), points)


@pytest.mark.parametrize(
    ("name", "offset", "expected"),
    [
        ("sphere", (0, 0, 0), -0.4),
        ("sphere", (0.3, 0, 0.4), 0.1),
        ("box", (0, 0, 0), -0.2),
        ("box", (0.43, 0.34, 0), 0.05),  # 0.03 beyond one face and 0.04 beyond another
        ("box", (0.35, 0, 0), -0.05),
        ("torus", (0, 0, 0), 0.18),
        ("torus", (0, 0.3, 0), -0.12),
        ("capsule", (0, 0, 0), -0.17),
        ("capsule", (0, 0.03, 0.29), 0.05 - 0.17),
        ("cylinder", (0, 0, 0), -0.25),
        ("cylinder", (0.28, 0, 0.34), 0.05),
        ("cylinder", (0, 0.1, -0.29), -0.01),
    ],
)
def test_known_distances(name: str, offset: tuple[float, float, float], expected: float) -> None:
    point = np.array([offset]) + 0.5
    np.testing.assert_allclose(SHAPES[name].distance(point), expected, atol=ROUNDING)
    assert SHAPES[name].inside(point) == (expected < 0)


# Uniform by area.

COUNT = 40_000


def assert_fraction(hits: np.ndarray, expected: float) -> None:
    """Within five standard deviations of what `len(hits)` draws give."""
    assert abs(hits.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / len(hits))


def assert_uniform(values: np.ndarray) -> None:
    """On [0, 1], by Kolmogorov and Smirnov's test."""
    assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_a_sphere_is_sampled_as_archimedes_says() -> None:
    points, _ = Sphere(0.4).surface(rng(), COUNT)
    for axis in range(3):
        assert_uniform(points[:, axis] / 0.8 + 0.5)


def test_each_face_of_a_box_gets_its_share() -> None:
    box = Box((0.4, 0.3, 0.2))
    points, normals = box.surface(rng(), COUNT)
    for axis, (u, v) in enumerate([(1, 2), (0, 2), (0, 1)]):
        for sign in (-1, 1):
            on_face = normals[:, axis] == sign
            assert_fraction(on_face, 4 * box.half[u] * box.half[v] / box.area)
            assert_uniform(points[on_face, u] / box.half[u] / 2 + 0.5)


def test_the_outer_half_of_a_torus_gets_more() -> None:
    torus = Torus(0.3, 0.12)
    points, _ = torus.surface(rng(), COUNT)
    around = np.arctan2(points[:, 2], np.hypot(*points[:, :2].T) - 0.3)
    assert_uniform(((around + 0.4 * np.sin(around)) / (2 * math.pi)) + 0.5)  # the integral of 1 + k cos, k = 0.4
    assert_uniform(np.arctan2(points[:, 1], points[:, 0]) / (2 * math.pi) + 0.5)
    assert_fraction(np.hypot(*points[:, :2].T) > 0.3, 0.5 + 0.4 / math.pi)


def test_side_and_ends_of_a_capsule() -> None:
    capsule = Capsule(0.25, 0.17)
    points, _ = capsule.surface(rng(), COUNT)
    on_side = np.abs(points[:, 2]) < 0.25
    assert_fraction(on_side, 0.25 / 0.42)
    assert_uniform(points[:, 2] / 0.84 + 0.5)  # Archimedes again: a cap's height is as uniform as the side's


def test_side_and_ends_of_a_cylinder() -> None:
    cylinder = Cylinder(0.3, 0.25)
    points, normals = cylinder.surface(rng(), COUNT)
    for end in (-1, 1):
        on_end = normals[:, 2] == end
        assert_fraction(on_end, math.pi * 0.25**2 / cylinder.area)
        assert_uniform((points[on_end, :2] ** 2).sum(axis=1) / 0.25**2)
    assert_uniform(points[normals[:, 2] == 0, 2] / 0.6 + 0.5)


# The union.


def test_the_parts_of_the_union_do_not_touch() -> None:
    for part in UNION.parts:
        points, _ = part.surface(rng(), 20_000)
        others = [other.distance(points).min() for other in UNION.parts if other is not part]
        assert min(others) > 0.09


def test_the_union_is_sampled_by_area() -> None:
    points, _ = UNION.surface(rng(), COUNT)
    total = sum(part.primitive.area for part in UNION.parts)
    for part in UNION.parts:
        assert_fraction(np.abs(part.distance(points)) < 1e-9, part.primitive.area / total)


def test_inside_a_part_the_union_has_its_distance() -> None:
    points = anywhere(50_000)
    inside = 0
    for part in UNION.parts:
        distance = part.distance(points)
        np.testing.assert_array_equal(UNION.distance(points)[distance < 0], distance[distance < 0])
        inside += (distance < 0).sum()
    assert UNION.inside(points).sum() == inside > 500


# Samples.


def test_three_of_four_samples_are_near_the_surface() -> None:
    shape, count = SHAPES["sphere"], 40_000
    position, distance = solids.distance_samples(shape, 3, count, offset=1e-4)
    assert position.shape == (count, 3)
    assert position.dtype == distance.dtype == np.float32
    near = np.abs(distance) < 1e-2
    anywhere_near = 4 * math.pi * 0.4**2 * 2e-2 / 0.808**3  # the part of the box that lies so near
    for part in (near, near[:10_000], near[::7]):
        assert_fraction(part, 0.75 + 0.25 * anywhere_near)
    assert (position >= shape.box[0] - 1e-7).all()
    assert (position <= shape.box[1] + 1e-7).all()
    # Of those that are not near, what the box holds: its volume less the shell's is where they may be.
    inside = 4 / 3 * math.pi * 0.39**3 / (0.808**3 - 4 * math.pi * 0.4**2 * 2e-2)
    assert_fraction(distance[~near] < 0, inside)


def test_near_samples_have_logistic_distances() -> None:
    shape, offset = SHAPES["box"], 1e-5
    _, distance = solids.distance_samples(shape, 0, 40_000, offset=offset)
    deviation = offset * np.linalg.norm(shape.box[1] - shape.box[0]) / 2
    near = distance[np.abs(distance) < 8 * deviation].astype(np.float64)
    scale = deviation * math.sqrt(3) / math.pi
    assert stats.kstest(near, "logistic", (0, scale)).pvalue > 1e-4  # a plane is off by the noise along one axis
    np.testing.assert_allclose(near.std(), deviation, rtol=0.02)


@every_shape
def test_distances_are_those_of_the_rounded_positions(shape: Shape) -> None:
    position, distance = solids.distance_samples(shape, 1, 4096)
    np.testing.assert_array_equal(distance, shape.distance(position.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_samples_repeat_whatever_the_chunks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = solids.distance_samples(UNION, 5, count)
    other = solids.distance_samples(UNION, 6, count)
    monkeypatch.setattr(solids, "CHUNK", 7)
    again = solids.distance_samples(UNION, 5, count)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert count < 2 or (a != c).any()
    np.testing.assert_array_equal(*(solids.surface_samples(UNION, 5, count) for _ in range(2)))


def test_all_samples_lie_in_the_cube() -> None:
    position, distance = solids.distance_samples(UNION, 0, 10_000, offset=3.0)
    assert position.min() == 0
    assert position.max() == 1
    np.testing.assert_array_equal(distance, UNION.distance(position.astype(np.float64)).astype(np.float32))


def test_surface_samples_are_on_the_surface() -> None:
    points = solids.surface_samples(UNION, 0, 1000)
    assert points.shape == (1000, 3)
    assert points.dtype == np.float32
    # Coordinates up to 1 in float32 are off by 2^-25 each, and so a point by up to 5.2e-8.
    assert np.abs(UNION.distance(points.astype(np.float64))).max() < 1e-7
