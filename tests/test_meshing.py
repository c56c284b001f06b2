"""Meshing: the lattice holds the function where its surface is, and what is extracted is a closed surface there."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scenes import Bodies

from jaxngp import meshing
from jaxngp.config import InputError

CENTRE, RADIUS = np.array([0.5, 0.45, 0.55]), 0.3
BALL = Bodies(balls=((*CENTRE, RADIUS),))
TWO = Bodies(balls=((0.3, 0.4, 0.5, 0.2), (0.75, 0.6, 0.55, 0.15)))
UNIT = np.array([[0.0, 0, 0], [1, 1, 1]])
FLAT = np.array([[0.1, 0.15, 0.3], [0.9, 0.65, 0.62]])
TWISTED = replace(TWO, scale=meshing.SAFETY)


@functools.cache
def sample(scene: Bodies, resolution: int, flat: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    """Values (X, Y, Z), the points (X, Y, Z, 3), and the spacing."""
    box = FLAT if flat else UNIT
    values, first, spacing = meshing.sample_volume(scene.field, box, resolution)
    assert values.dtype == np.float32
    return values, first + spacing * np.stack(np.indices(values.shape), axis=-1), spacing


@functools.cache
def extract(scene: Bodies, resolution: int, flat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("skimage", reason="the extra mesh is not installed")
    box = FLAT if flat else UNIT
    return meshing.extract_surface(scene.field, box, resolution)


def within(box: np.ndarray, scene: Bodies, points: np.ndarray) -> np.ndarray:
    """The distance (N,), outside the box at least that to the box."""
    beyond = np.linalg.norm(np.maximum(np.maximum(box[0] - points, points - box[1]), 0), axis=1)
    distance = scene.distance(points)
    return np.where(beyond > 0, np.maximum(distance, beyond), distance)


# The lattice.


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("resolution", [16, 45])
def test_the_lattice_covers_the_box(resolution: int, flat: bool) -> None:
    """With a point more on every side."""
    box = FLAT if flat else UNIT
    values, points, spacing = sample(TWO, resolution, flat)
    assert np.isclose(spacing, (box[1] - box[0]).max() / (resolution - 1))
    assert all(side % meshing.BLOCK == 0 for side in values.shape)
    beyond = np.stack([box[0] - points[0, 0, 0], points[-1, -1, -1] - box[1]]) / spacing
    assert beyond.min() > 1 - 1e-9
    assert beyond.max() < 1 + meshing.BLOCK / 2
    np.testing.assert_allclose(beyond[0], beyond[1], atol=1e-9)


@pytest.mark.parametrize("scene", [TWO, TWISTED, Bodies(plane=(0.6, 0.0, 0.8, 0.6))], ids=["two", "twisted", "plane"])
@pytest.mark.parametrize("resolution", [30, 70])
@pytest.mark.parametrize("flat", [False, True])
def test_values_are_those_of_the_function(scene: Bodies, resolution: int, flat: bool) -> None:
    """Near the surface; elsewhere they have its sign."""
    values, points, _ = sample(scene, resolution, flat)
    exact = within(FLAT if flat else UNIT, scene, points.reshape(-1, 3)).reshape(values.shape)
    own = np.abs(values - exact) < 1e-5
    blocks = [side // meshing.BLOCK for side in values.shape]
    by_block = own.reshape(*np.stack([blocks, [meshing.BLOCK] * 3], axis=1).reshape(-1)).transpose(0, 2, 4, 1, 3, 5)
    whole = by_block.reshape(*blocks, -1).all(axis=-1)
    assert 0 < whole.mean() < (1.1 if resolution == 30 else 0.9)
    # What marching cubes reads: the ends of the edges that the surface crosses.
    near = np.zeros(values.shape, bool)
    for axis in range(3):
        crossed = np.diff(np.sign(exact), axis=axis) != 0
        last = [(0, 0)] * 3
        last[axis] = (0, 1)
        near |= np.pad(crossed, last) | np.pad(crossed, [pair[::-1] for pair in last])
    assert near.any()
    assert own[near].all()
    clear = np.abs(exact) > 1e-6
    np.testing.assert_array_equal(values[clear] > 0, exact[clear] > 0)
    # A block's value, where it is one for all points, is that of its middle.
    constant = values.reshape(*np.stack([blocks, [meshing.BLOCK] * 3], axis=1).reshape(-1)).transpose(0, 2, 4, 1, 3, 5)
    constant = constant.reshape(*blocks, -1)[~whole]
    np.testing.assert_array_equal(constant, np.repeat(constant[:, :1], meshing.BLOCK**3, axis=1))


def test_only_blocks_at_the_surface_are_evaluated() -> None:
    """Of a lattice of 70^3, whose blocks are a ninth wide, with a surface through a third of them."""
    values, points, _ = sample(BALL, 70)
    exact = BALL.distance(points.reshape(-1, 3)).reshape(values.shape)
    far = np.abs(exact) > 0.3
    assert (np.abs(values - exact) > 1e-3)[far].mean() > 0.5


# The surface.


def corners(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(F, 3 corners, 3)."""
    return vertices[faces]


def area_and_volume(vertices: np.ndarray, faces: np.ndarray) -> tuple[float, float]:
    """The volume by the divergence theorem: it is positive if the faces look out."""
    a, b, c = np.moveaxis(corners(vertices, faces), 1, 0)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    return float(area), float(np.sum(a * np.cross(b, c)) / 6)


def assert_closed(faces: np.ndarray) -> None:
    """Every edge belongs to two faces, which run along it in opposite directions."""
    edges = Counter(map(tuple, np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()))
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)


def num_parts(num_vertices: int, faces: np.ndarray) -> int:
    """How many connected pieces there are."""
    label = np.arange(num_vertices)
    while True:
        least = label.copy()
        for column in faces.T:
            np.minimum.at(least, column, label[faces].min(axis=1))
        if (least == label).all():
            return len(np.unique(label[faces]))
        label = least


@pytest.mark.parametrize(("scene", "parts"), [(BALL, 1), (TWO, 2), (TWISTED, 2)], ids=["ball", "two", "twisted"])
@pytest.mark.parametrize("resolution", [20, 45])
def test_balls_become_closed_surfaces_that_look_out(scene: Bodies, parts: int, resolution: int) -> None:
    vertices, faces = extract(scene, resolution)
    assert vertices.dtype == np.float64
    assert faces.dtype == np.int64
    assert faces.min() == 0
    assert faces.max() == len(vertices) - 1
    assert_closed(faces)
    assert num_parts(len(vertices), faces) == parts
    assert len(vertices) - len(faces) / 2 == 2 * parts  # Euler's formula: each part is a sphere
    # On an edge of the lattice the function is not quite linear.
    spacing = 1 / (resolution - 1)
    true = replace(scene, scale=1.0)
    assert np.abs(true.distance(vertices)).max() < spacing**2 / (8 * (min(ball[3] for ball in scene.balls) - spacing))
    a, b, c = np.moveaxis(corners(vertices, faces), 1, 0)
    outward, middle = np.cross(b - a, c - a), (a + b + c) / 3
    nearest = np.array(scene.balls)[
        np.argmin([np.linalg.norm(middle - ball[:3], axis=1) for ball in scene.balls], axis=0)
    ]
    assert (np.sum(outward * (middle - nearest[:, :3]), axis=1) > 0).all()
    area, volume = area_and_volume(vertices, faces)
    radii = np.array([ball[3] for ball in scene.balls])
    np.testing.assert_allclose(area, 4 * np.pi * np.sum(radii**2), rtol=2 * (spacing / radii.min()) ** 2)
    np.testing.assert_allclose(volume, 4 / 3 * np.pi * np.sum(radii**3), rtol=2 * (spacing / radii.min()) ** 2)


def test_area_and_volume_converge() -> None:
    """With the square of the spacing."""
    true = np.array([4 * np.pi * RADIUS**2, 4 / 3 * np.pi * RADIUS**3])
    errors = [np.abs(area_and_volume(*extract(BALL, n)) / true - 1) for n in (20, 77)]
    assert (errors[1] * 10 < errors[0]).all()  # 4.05^2 = 16
    assert (errors[1] < 2e-3).all()


def test_a_thin_box_is_not_lost() -> None:
    """One spacing thick, and so at some point of the lattice always at least as deep as none."""
    spacing = 1 / 29
    for shift in (0.02, 0.3, 0.77):
        low = 0.4 + shift * spacing
        scene = Bodies(box=((0.2, 0.3, low), (0.8, 0.7, low + spacing)))
        vertices, faces = extract(scene, 30)
        assert_closed(faces)
        np.testing.assert_allclose(vertices.min(axis=0)[:2], [0.2, 0.3], atol=spacing)
        np.testing.assert_allclose(vertices.max(axis=0)[:2], [0.8, 0.7], atol=spacing)
        assert area_and_volume(vertices, faces)[1] > 0
        np.testing.assert_allclose(area_and_volume(vertices, faces)[0], 2 * 0.6 * 0.4, rtol=0.25)


def test_a_surface_through_lattice_points_is_closed() -> None:
    """Where the function is 0 at points, and triangles have no area."""
    _, points, _ = sample(BALL, 30)
    low, high = points[7, 9, 11], points[20, 17, 24]
    vertices, faces = extract(Bodies(box=(tuple(low), tuple(high))), 30)
    assert_closed(faces)
    np.testing.assert_allclose(vertices.min(axis=0), low, atol=1e-5)
    np.testing.assert_allclose(vertices.max(axis=0), high, atol=1e-5)
    area, volume = area_and_volume(vertices, faces)
    assert area > 0
    np.testing.assert_allclose(volume, np.prod(high - low), rtol=0.05)


def test_the_box_need_not_be_a_cube_nor_hold_the_solid() -> None:
    """What sticks out of the box is cut off at it, to within a spacing, and the surface is closed there."""
    vertices, faces = extract(TWO, 50, flat=True)
    spacing = 0.8 / 49
    assert_closed(faces)
    assert (vertices > FLAT[0] - spacing).all()
    assert (vertices < FLAT[1] + spacing).all()
    inside = ((vertices > FLAT[0] + spacing) & (vertices < FLAT[1] - spacing)).all(axis=1)
    assert inside.mean() > 0.3
    assert np.abs(TWO.distance(vertices[inside])).max() < spacing**2 / (8 * (0.15 - spacing))


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (Bodies(), "the distance lies between .* and .*: there is no surface"),
        (replace(BALL, scale=float("nan")), "the distance lies between nan and nan: there is no surface"),
    ],
    ids=["outside", "no number"],
)
def test_where_there_is_no_surface_that_is_said(scene: Bodies, message: str) -> None:
    pytest.importorskip("skimage", reason="the extra mesh is not installed")
    with pytest.raises(InputError, match=message):
        meshing.extract_surface(scene.field, UNIT, 20)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage.measure", None)
    with pytest.raises(InputError, match=r"scikit-image.* is not installed: pip install \.\[mesh\]"):
        meshing.extract_surface(BALL.field, UNIT, 20)
