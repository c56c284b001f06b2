"""Cameras: what a pixel sees lies where the camera says, and the frames are those that the module names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import look_at, make_camera, pixel_rays
from strategies import arrays32, floats32, rotations

from jaxngp import cameras
from jaxngp.cameras import Cameras, Rays, make_cameras, pose_images

WIDTH, HEIGHT = 7, 5
V = 3

unproject = jax.jit(cameras.unproject)
project = jax.jit(cameras.project)


@st.composite
def poses(draw: st.DrawFn) -> np.ndarray:
    return np.concatenate([draw(rotations()), draw(arrays32(3, -4, 4))[:, None]], axis=1)


@st.composite
def any_camera(draw: st.DrawFn) -> Cameras:
    """One of any pose, different focal lengths in x and y, and a principal point off the middle."""
    focal, centre = draw(arrays32(2, 3, 50)), draw(arrays32(2, 1, 6))
    return make_cameras(draw(poses()), focal_xy=focal, centre_xy=centre, width=WIDTH, height=HEIGHT)


def stack(views: list[Cameras]) -> Cameras:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *views)


# To rays and back.


@given(any_camera(), arrays32((16, 2), 0, 7), arrays32(16, 0.25, 8))
def test_project_inverts_unproject(camera: Cameras, pixel: np.ndarray, t: np.ndarray) -> None:
    """Coordinates up to 12 round by 5e-7, at a distance of 0.25 and 50 pixels to the unit: by 1e-4 pixels and more,
    as a pixel 2 units off the axis is seen at sqrt(5) times the depth."""
    rays = unproject(camera, pixel)
    found, depth = project(camera, rays.origin + t[:, None] * rays.direction)
    np.testing.assert_allclose(found, pixel, atol=5e-3)
    forward = -camera.c2w[:, 2].astype(np.float64)
    np.testing.assert_allclose(depth, t * (np.asarray(rays.direction) @ forward), atol=1e-5)
    assert (np.asarray(depth) > 0).all()


@given(any_camera(), arrays32((16, 2), 0, 7))
def test_rays_have_unit_directions_from_the_camera(camera: Cameras, pixel: np.ndarray) -> None:
    rays = unproject(camera, pixel)
    np.testing.assert_allclose(np.linalg.norm(rays.direction, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rays.origin, np.broadcast_to(camera.c2w[:, 3], (16, 3)))


@given(any_camera(), arrays32(2, 0, 7), floats32(0.25, 8))
def test_a_point_behind_the_camera_has_negative_depth(camera: Cameras, pixel: np.ndarray, t: float) -> None:
    ray = unproject(camera, pixel)
    assert project(camera, ray.origin - np.float32(t) * ray.direction)[1] < 0


def test_a_point_in_the_camera_has_a_finite_pixel() -> None:
    pixel, depth = project(make_camera(4, 4, 4.0, look_at((2, 0, 0))), jnp.array([2.0, 0.0, 0.0]))
    assert depth == 0
    assert np.isfinite(pixel).all()


def test_axes_are_opengl_with_image_y_down() -> None:
    camera = make_camera(4, 4, 2.0)
    for pixel, toward in [((2, 2), (0, 0, -1)), ((4, 2), (1, 0, -1)), ((2, 0), (0, 1, -1)), ((0, 4), (-1, -1, -1))]:
        expected = np.array(toward) / np.linalg.norm(toward)
        np.testing.assert_allclose(unproject(camera, jnp.array(pixel, jnp.float32)).direction, expected, atol=1e-6)


@given(any_camera())
def test_view_rays_pass_through_pixel_centres(camera: Cameras) -> None:
    rays = cameras.view_rays(camera)
    origin, direction = pixel_rays(camera)
    assert rays.direction.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(rays.origin, origin)
    np.testing.assert_allclose(rays.direction, direction, atol=3e-6)
    pixel, _ = project(camera, rays.origin[3, 6] + rays.direction[3, 6])
    np.testing.assert_allclose(pixel, [6.5, 3.5], atol=1e-3)


@given(st.lists(any_camera(), min_size=V, max_size=V), arrays32((V, 2), 0, 7))
def test_many_cameras_are_each_of_them(views: list[Cameras], pixel: np.ndarray) -> None:
    """A batch of cameras casts and projects as each alone does."""
    batch = stack(views)
    assert len(batch) == V
    rays = unproject(batch, pixel)
    drawn = batch.cast(np.array([2, 0, 2], np.int32), pixel[[2, 0, 2]])
    found = project(batch, rays.origin + rays.direction)
    for i, camera in enumerate(views):
        alone = unproject(camera, pixel[i])
        np.testing.assert_allclose(rays.direction[i], alone.direction, atol=1e-6)
        for a, b in zip(found, project(camera, alone.origin + alone.direction), strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-3)
    np.testing.assert_allclose(drawn.direction, rays.direction[np.array([2, 0, 2])], atol=1e-6)


# Slopes.

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("function", "value"),
    [(cameras.unproject, RNG.uniform(0, 8, (2, 2))), (cameras.project, RNG.uniform(-0.3, 0.3, (2, 3)))],
    ids=["unproject", "project"],
)
def test_gradients_are_slopes(function: Callable[..., Any], value: np.ndarray) -> None:
    """In float64, along a random step in each of poses, focal lengths, principal points, and pixels or points. The
    difference of 2 h errs by h^2 times a third derivative and by 1e-15 / h: by 1e-9 both, for h = 1e-5."""
    h, rng = 1e-5, np.random.default_rng(1)
    c2w = np.stack([look_at((2.0, 0.3, 0.4), (0, 0, 0)), look_at((-1.0, 2.0, 0.5), (0, 0, 0))])
    start = {
        "c2w": c2w.astype(np.float64),
        "focal_xy": rng.uniform(20, 30, (2, 2)),
        "centre_xy": rng.uniform(3, 5, (2, 2)),
        "value": value,
    }

    @jax.jit
    @jax.value_and_grad
    def total(arrays: dict[str, jax.Array]) -> jax.Array:
        views = Cameras(arrays["c2w"], arrays["focal_xy"], arrays["centre_xy"], jnp.full((2, 2), 8, jnp.int32))
        leaves = jax.tree.leaves(function(views, arrays["value"]))
        return jnp.stack([jnp.sum(jnp.sin(1 + jnp.arange(a.size)).reshape(a.shape) * a) for a in leaves]).sum()

    with jax.enable_x64(True):
        gradient = total(start)[1]
        for name, array in start.items():
            step = rng.normal(size=array.shape)
            ahead, behind = (total({**start, name: array + sign * h * step})[0] for sign in (1, -1))
            found, expected = float(jnp.sum(gradient[name] * step)), float(ahead - behind) / (2 * h)
            assert gradient[name].dtype == np.float64
            assert abs(expected) > 1e-4
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8, err_msg=name)


# Images.


def test_pixels_of_images_of_any_sizes_have_numbers() -> None:
    """Row by row, one view after the other: each number finds its view, its centre and its colour."""
    sizes = [(4, 3), (1, 2), (5, 5)]  # width, height
    views = [np.random.default_rng(i).integers(0, 256, (h, w, 4), np.uint8) for i, (w, h) in enumerate(sizes)]
    width, height = np.array(sizes).T
    c2w = np.stack([look_at((2, 0, i)) for i in range(V)])
    posed = pose_images(make_cameras(c2w, focal_xy=9, centre_xy=2, width=width, height=height), views)
    same = pose_images(make_cameras(c2w, focal_xy=9, centre_xy=2, width=4, height=3), np.stack([views[0]] * V))
    for images, expected in ((posed, views), (same, [views[0]] * V)):
        number = np.arange(images.num_pixels, dtype=np.int32)
        view, xy, rgba = jax.jit(type(images).pixel)(images, number)
        np.testing.assert_array_equal(view, np.repeat(np.arange(V), [i.shape[0] * i.shape[1] for i in expected]))
        centres = [np.mgrid[: i.shape[0], : i.shape[1]][::-1].reshape(2, -1).T + 0.5 for i in expected]
        np.testing.assert_array_equal(xy, np.concatenate(centres))
        np.testing.assert_array_equal(np.round(rgba * 255), np.concatenate([i.reshape(-1, 4) for i in expected]))
        for i, image in enumerate(expected):
            np.testing.assert_array_equal(images.image(i), image)
            assert cameras.image_size(images.cameras[i]) == image.shape[1::-1]
    assert posed.max_size == (5, 5)


# Frames and sizes.


@pytest.mark.parametrize("size", [(14, 10), (7, 5), (20, 5), (3, 40)])
@given(any_camera())
def test_a_resized_camera_keeps_its_field_of_view(size: tuple[int, int], camera: Cameras) -> None:
    """The vertical one; pixels stay square, and the principal point in proportion."""
    width, height = size
    resized = cameras.resize_cameras(camera, width, height)
    assert cameras.image_size(resized) == size
    np.testing.assert_allclose(resized.focal_xy, camera.focal_xy * (height / HEIGHT), rtol=1e-6)
    np.testing.assert_allclose(resized.centre_xy / size, camera.centre_xy / (WIDTH, HEIGHT), rtol=1e-6)
    for edge in (0, 1):  # the rays through the upper and lower edge, above and below the principal point
        expected, found = (
            unproject(c, np.array([c.centre_xy[0], edge * c.size[1]], np.float32)) for c in (camera, resized)
        )
        np.testing.assert_allclose(found.direction, expected.direction, atol=3e-6)


@given(st.lists(any_camera(), min_size=V, max_size=V))
def test_cameras_are_resized_each_by_its_own_size(views: list[Cameras]) -> None:
    sizes = np.array([[7, 5], [14, 10], [21, 30]], np.int32)
    batch = stack(views).replace(size=sizes)
    resized = cameras.resize_cameras(batch, 14, 10)
    for i in range(V):
        alone = cameras.resize_cameras(batch[i], 14, 10)
        for a, b in zip(jax.tree.leaves(resized[i]), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a, b)


# Paths.


def assert_rotation(rotation: np.ndarray) -> None:
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=2e-6)
    assert np.linalg.det(rotation) > 0


@given(st.integers(1, 12), arrays32((5, 3), -3, 3))
def test_orbit_poses_look_at_the_middle(num_poses: int, origin: np.ndarray) -> None:
    given_poses = np.stack([look_at(o + np.float32([4, 0, 0]), (-9, 1, 2)) for o in origin])
    orbit = cameras.orbit_poses(given_poses, num_poses)
    assert orbit.shape == (num_poses, 3, 4)
    assert orbit.dtype == np.float32
    offset = given_poses[:, :, 3].astype(np.float64) - 0.5
    distance, height = np.median(np.linalg.norm(offset, axis=1)), np.median(offset[:, 2])
    for index, pose in enumerate(orbit.astype(np.float64)):
        rotation, position = pose[:, :3], pose[:, 3]
        assert_rotation(rotation)
        np.testing.assert_allclose(-rotation[:, 2], (0.5 - position) / np.linalg.norm(0.5 - position), atol=1e-5)
        assert abs(rotation[2, 0]) < 1e-6  # the horizon is level
        assert rotation[2, 1] > 0  # and up is up
        np.testing.assert_allclose(np.linalg.norm(position - 0.5), distance, rtol=1e-5)
        if abs(height) <= 0.9 * distance:
            np.testing.assert_allclose(position[2] - 0.5, height, atol=1e-5)
        angle = np.arctan2(position[1] - 0.5, position[0] - 0.5)
        np.testing.assert_allclose(np.exp(1j * angle), np.exp(2j * np.pi * index / num_poses), atol=1e-4)


def test_an_orbit_overhead_does_not_collapse() -> None:
    orbit = cameras.orbit_poses(np.stack([look_at((0.5, 0.5, 2.5))]), 4)
    assert np.isfinite(orbit).all()
    assert np.ptp(orbit[:, 0, 3]) > 1


@given(arrays32(3, 0.6, 2), arrays32(3, -0.5, 0.5), st.integers(0, 2))
def test_look_at_centres_its_target_with_up_upwards(position: np.ndarray, target: np.ndarray, axis: int) -> None:
    up = np.eye(3, dtype=np.float32)[axis]
    c2w = cameras.look_at(position, target, up)
    assert_rotation(c2w[:, :3].astype(np.float64))
    np.testing.assert_array_equal(c2w[:, 3], position)
    points = np.stack([target, target + 0.1 * up]).astype(np.float32)
    xy, depth = project(make_camera(WIDTH, HEIGHT, 10.0, c2w), points)
    np.testing.assert_allclose(xy[0], [WIDTH / 2, HEIGHT / 2], atol=1e-3)
    np.testing.assert_allclose(depth[0], np.linalg.norm(position - target), rtol=1e-5)
    assert xy[1, 1] < xy[0, 1]  # y goes down
    np.testing.assert_allclose(xy[1, 0], xy[0, 0], atol=1e-3)


def test_rays_and_cameras_are_indexed_as_arrays() -> None:
    batch = make_camera(4, 4, 2.0, np.stack([look_at((2, 0, i)) for i in range(V)]))
    rays = Rays(origin=np.zeros((V, 3)), direction=np.ones((V, 3)))
    for tree in (batch, rays):
        for whole, part in zip(jax.tree.leaves(tree), jax.tree.leaves(tree[1:]), strict=True):
            np.testing.assert_array_equal(part, whole[1:])


# Paths among cameras, and where they look.


@st.composite
def inward_poses(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Poses (9, 3, 4) that look at a point from places around it, and the point."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = rng.uniform(-1, 1, 3)
    offset = rng.normal(size=(9, 3)) * (1, 1, 0.3)
    offset += 0.5 * offset / np.linalg.norm(offset, axis=1, keepdims=True)
    return np.stack([cameras.look_at(target + o, target, (0, 0, 1)) for o in offset]), target


@given(inward_poses())
def test_the_focus_is_where_the_axes_meet(poses_and_target: tuple[np.ndarray, np.ndarray]) -> None:
    c2w, target = poses_and_target
    np.testing.assert_allclose(cameras.focus(c2w.astype(np.float64)), target, atol=1e-4)


def test_the_focus_of_parallel_cameras_lies_ahead() -> None:
    c2w = np.stack([cameras.look_at((x, 0, 0), (x, 5, 0), (0, 0, 1)) for x in (-1.0, 0.0, 1.0)])
    np.testing.assert_allclose(cameras.focus(c2w.astype(np.float64)), (0, 4 / 3, 0), atol=1e-6)


@given(inward_poses(), st.integers(2, 40))
def test_a_spiral_looks_at_the_focus(poses_and_target: tuple[np.ndarray, np.ndarray], num_poses: int) -> None:
    c2w, target = poses_and_target
    path = cameras.spiral_poses(c2w, num_poses).astype(np.float64)
    to_target = target - path[:, :, 3]
    to_target /= np.linalg.norm(to_target, axis=1, keepdims=True)
    np.testing.assert_allclose(-path[:, :, 2], to_target, atol=1e-3)
    np.testing.assert_allclose(
        np.swapaxes(path[:, :, :3], 1, 2) @ path[:, :, :3], np.tile(np.eye(3), (num_poses, 1, 1)), atol=1e-5
    )
    inside = np.max(np.linalg.norm(c2w[:, :, 3] - c2w[:, :, 3].mean(axis=0), axis=1))
    assert np.all(np.linalg.norm(path[:, :, 3] - c2w[:, :, 3].mean(axis=0), axis=1) <= 3**0.5 * inside + 1e-5)


@given(inward_poses())
def test_a_flight_passes_through_its_poses_evenly(poses_and_target: tuple[np.ndarray, np.ndarray]) -> None:
    c2w, _ = poses_and_target
    path = cameras.interpolate_poses(c2w, 400)
    for index in (0, -1):
        np.testing.assert_allclose(path[index], c2w[index], atol=1e-4)
    moved = np.linalg.norm(np.diff(path[:, :, 3], axis=0), axis=1)
    assert moved.max() < 1.3 * moved.mean() + 1e-6
    nearest = np.min(np.linalg.norm(path[:, None, :, 3] - c2w[None, :, :, 3], axis=-1), axis=0)
    assert nearest.max() <= moved.max()


def test_a_flight_over_one_pose_or_twice_it_stays() -> None:
    pose = look_at((0.5, -1.0, 0.5))
    for given_poses in (pose[None], np.stack([pose, pose])):
        np.testing.assert_allclose(cameras.interpolate_poses(given_poses, 3), np.stack([pose] * 3), atol=1e-6)


def test_surrounded_means_from_all_sides() -> None:
    angle = np.arange(12) * np.pi / 6
    around = np.stack([look_at((0.5 + np.cos(a), 0.5 + np.sin(a), 0.7)) for a in angle])
    assert cameras.surrounded(around)
    assert not cameras.surrounded(around[:7])
    assert not cameras.surrounded(around[:1])


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (8, 8, 4, 1)])
def test_images_have_four_channels(shape: tuple[int, ...]) -> None:
    camera = make_cameras(np.eye(3, 4)[None], focal_xy=8, centre_xy=4, width=8, height=8)
    with pytest.raises(ValueError, match=r"expected \(H, W, 4\)"):
        pose_images(camera, [np.zeros(shape, np.uint8)])
