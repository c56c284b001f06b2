"""Cameras: what a pixel sees lies where the camera says, and the frames are those that the module names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import look_at, make_camera, pixel_rays
from strategies import arrays32, floats32, rotations

from jaxngp import cameras
from jaxngp.cameras import Camera

WIDTH, HEIGHT = 7, 5

to_ray = jax.jit(cameras.pixel_to_ray)
to_pixel = jax.jit(cameras.point_to_pixel)


@st.composite
def any_camera(draw: st.DrawFn) -> Camera:
    """Different focal lengths in x and y, and a principal point off the middle."""
    focal, centre = draw(arrays32(2, 3, 50)), draw(arrays32(2, 1, 6))
    return Camera(focal_xy=jnp.asarray(focal), centre_xy=jnp.asarray(centre), width=WIDTH, height=HEIGHT)


@st.composite
def poses(draw: st.DrawFn) -> np.ndarray:
    return np.concatenate([draw(rotations()), draw(arrays32(3, -4, 4))[:, None]], axis=1)


@given(any_camera(), poses(), arrays32((16, 2), 0, 7), arrays32(16, 0.25, 8))
def test_project_inverts_unproject(camera: Camera, c2w: np.ndarray, pixel: np.ndarray, t: np.ndarray) -> None:
    rays = to_ray(camera, c2w, pixel)
    found, depth = to_pixel(camera, c2w, rays.origin + t[:, None] * rays.direction)
    np.testing.assert_allclose(found, pixel, atol=2e-3)
    forward = -c2w[:, 2].astype(np.float64)
    np.testing.assert_allclose(depth, t * (np.asarray(rays.direction) @ forward), atol=1e-5)
    assert (np.asarray(depth) > 0).all()


@given(any_camera(), poses(), arrays32((16, 2), 0, 7))
def test_rays_have_unit_directions_from_the_camera(camera: Camera, c2w: np.ndarray, pixel: np.ndarray) -> None:
    rays = to_ray(camera, c2w, pixel)
    np.testing.assert_allclose(np.linalg.norm(rays.direction, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rays.origin, np.broadcast_to(c2w[:, 3], (16, 3)))


@given(any_camera(), poses(), arrays32(2, 0, 7), floats32(0.25, 8))
def test_a_point_behind_the_camera_has_negative_depth(
    camera: Camera, c2w: np.ndarray, pixel: np.ndarray, t: float
) -> None:
    ray = to_ray(camera, c2w, pixel)
    assert to_pixel(camera, c2w, ray.origin - np.float32(t) * ray.direction)[1] < 0


def test_a_point_in_the_camera_has_a_finite_pixel() -> None:
    pixel, depth = to_pixel(make_camera(4, 4, 4.0), look_at((2, 0, 0)), jnp.array([2.0, 0.0, 0.0]))
    assert depth == 0
    assert np.isfinite(pixel).all()


def test_axes_are_opengl_with_image_y_down() -> None:
    c2w = np.eye(3, 4, dtype=np.float32)
    camera = make_camera(4, 4, 2.0)
    for pixel, toward in [((2, 2), (0, 0, -1)), ((4, 2), (1, 0, -1)), ((2, 0), (0, 1, -1)), ((0, 4), (-1, -1, -1))]:
        expected = np.array(toward) / np.linalg.norm(toward)
        ray = cameras.pixel_to_ray(camera, c2w, jnp.array(pixel, jnp.float32))
        np.testing.assert_allclose(ray.direction, expected, atol=1e-6)


@given(any_camera(), poses())
def test_view_rays_pass_through_pixel_centres(camera: Camera, c2w: np.ndarray) -> None:
    rays = jax.jit(cameras.view_rays)(camera, c2w)
    origin, direction = pixel_rays(camera, c2w)
    assert rays.direction.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(rays.origin, origin, atol=1e-6)
    np.testing.assert_allclose(rays.direction, direction, atol=2e-6)
    pixel, _ = to_pixel(camera, c2w, rays.origin[3, 6] + rays.direction[3, 6])
    np.testing.assert_allclose(pixel, [6.5, 3.5], atol=1e-3)


@given(poses(), arrays32(3, -2, 2), floats32(0.5, 8), any_camera(), arrays32(2, 0, 7))
def test_world_to_scene_keeps_what_pixels_see(
    c2w: np.ndarray, centre: np.ndarray, side: float, camera: Camera, pixel: np.ndarray
) -> None:
    """World to scene maps the box to the unit cube and keeps what pixels see."""
    scene = cameras.world_to_scene(jnp.asarray(c2w), tuple(centre.tolist()), side)
    np.testing.assert_array_equal(scene[:, :3], c2w[:, :3])

    def to_scene(position: np.ndarray) -> np.ndarray:  # the corner of least coordinates goes to 0
        return (position.astype(np.float64) - (centre - side / 2)) / side

    np.testing.assert_allclose(scene[:, 3], to_scene(c2w[:, 3]), atol=1e-5)
    ray = to_ray(camera, c2w, pixel)
    point = np.asarray(ray.origin + 2 * ray.direction)
    expected, depth = to_pixel(camera, c2w, jnp.asarray(point))
    found, scene_depth = to_pixel(camera, scene, jnp.asarray(to_scene(point), jnp.float32))
    np.testing.assert_allclose(found, expected, atol=0.02)
    np.testing.assert_allclose(scene_depth, depth / side, atol=1e-5)


def test_world_to_scene_takes_many_poses() -> None:
    c2w = np.stack([look_at((3, 0, 1)), look_at((0, -2, 0))])
    both = cameras.world_to_scene(c2w, (1.0, 0.0, 0.0), 4.0)
    for pose, found in zip(c2w, both, strict=True):
        np.testing.assert_array_equal(found, cameras.world_to_scene(pose, (1.0, 0.0, 0.0), 4.0))


@pytest.mark.parametrize("size", [(14, 10), (7, 5), (20, 5), (3, 40)])
@given(any_camera(), poses())
def test_a_resized_camera_keeps_its_field_of_view(size: tuple[int, int], camera: Camera, c2w: np.ndarray) -> None:
    """A resized camera keeps its vertical field of view and square pixels."""
    width, height = size
    resized = cameras.resize_camera(camera, width, height)
    assert (resized.width, resized.height) == size
    scale = height / HEIGHT
    np.testing.assert_allclose(resized.focal_xy, np.asarray(camera.focal_xy) * scale, rtol=1e-6)
    for edge in (0, 1):  # the rays through the upper and lower edge, above and below the principal point
        expected = cameras.pixel_to_ray(camera, c2w, jnp.array([camera.centre_xy[0], edge * HEIGHT], jnp.float32))
        found = cameras.pixel_to_ray(resized, c2w, jnp.array([resized.centre_xy[0], edge * height], jnp.float32))
        np.testing.assert_allclose(found.direction, expected.direction, atol=2e-6)
    np.testing.assert_allclose(
        np.asarray(resized.centre_xy) / size, np.asarray(camera.centre_xy) / (WIDTH, HEIGHT), rtol=1e-6
    )


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
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
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
    """A camera sees what it looks at in the middle and up upwards."""
    up = np.eye(3, dtype=np.float32)[axis]
    c2w = cameras.look_at(position, target, up)
    np.testing.assert_allclose(c2w[:, :3].T @ c2w[:, :3], np.eye(3), atol=1e-5)
    assert np.linalg.det(c2w[:, :3]) > 0
    np.testing.assert_array_equal(c2w[:, 3], position)
    camera = make_camera(WIDTH, HEIGHT, 10.0)
    points = np.stack([target, target + 0.1 * up]).astype(np.float32)
    xy, depth = to_pixel(camera, jnp.asarray(c2w), points)
    np.testing.assert_allclose(xy[0], [WIDTH / 2, HEIGHT / 2], atol=1e-3)
    np.testing.assert_allclose(depth[0], np.linalg.norm(position - target), rtol=1e-5)
    assert xy[1, 1] < xy[0, 1]  # y goes down
    np.testing.assert_allclose(xy[1, 0], xy[0, 0], atol=1e-3)
