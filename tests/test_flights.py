"""Camera paths of other programs: what they mean in the coordinates of the scene's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scenes import poses_around
from scipy.spatial.transform import Rotation

from jaxngp.cameras import project, unproject
from jaxngp.config import InputError
from jaxngp.data.flights import Frames, dataparser_transform, read_flight
from jaxngp.data.transforms import reference_frames

SIZE = (64, 48)


def written(folder: Path, plain: dict[str, Any], name: str = "path.json") -> Path:
    (folder / name).write_text(json.dumps(plain))
    return folder / name


def nerfstudio_path(poses: np.ndarray, **changes: Any) -> dict[str, Any]:
    rows = [np.vstack([pose, [0, 0, 0, 1]]).reshape(-1).tolist() for pose in poses]
    cameras = [{"camera_to_world": row, "fov": 60.0, "aspect": 2.0} for row in rows]
    top = {"camera_type": "perspective", "render_width": 64, "render_height": 32, "fps": 12, "seconds": 1}
    return top | {"camera_path": cameras} | changes


def test_nerfstudio_frames_are_in_the_sources_axes(tmp_path: Path) -> None:
    poses = poses_around(5, 3.0).astype(np.float64)
    flight = read_flight(written(tmp_path, nerfstudio_path(poses)), 0, SIZE, Frames())
    np.testing.assert_allclose(flight.cameras.c2w, poses, atol=1e-6)
    assert flight.fps == 12
    # A vertical field of view: the ray at half of it goes through the middle of the upper border.
    top = np.array([0, np.tan(np.radians(30)), -1]) @ np.asarray(poses[0][:, :3]).T + poses[0][:, 3]
    xy, _ = project(flight.cameras[0], jnp.asarray(top, jnp.float32))
    np.testing.assert_allclose(xy, [32, 0], atol=1e-3)


def test_a_dataparser_transform_is_undone(tmp_path: Path) -> None:
    """nerfstudio's scene is scale * (transform @ original), and the files hold applied @ original."""
    applied = np.array([[1.0, 0, 0, 0.5], [0, 0, 1, 0], [0, -1, 0, 2]])
    turn = Rotation.from_euler("xyz", [0.3, -0.8, 1.9]).as_matrix()
    transform, scale = np.column_stack([turn, [0.1, -2.0, 0.7]]), 0.4
    original = poses_around(4, 2.0).astype(np.float64)
    in_files = np.stack([applied @ np.vstack([pose, [0, 0, 0, 1]]) for pose in original])
    in_nerfstudio = np.stack([transform @ np.vstack([pose, [0, 0, 0, 1]]) for pose in original])
    in_nerfstudio[:, :, 3] *= scale
    file = written(tmp_path, {"transform": transform.tolist(), "scale": scale}, "dataparser_transforms.json")
    frames = Frames(nerfstudio=dataparser_transform(file, applied))
    flight = read_flight(written(tmp_path, nerfstudio_path(in_nerfstudio)), 0, SIZE, frames)
    np.testing.assert_allclose(flight.cameras.c2w, in_files, atol=1e-6)


def test_a_panorama_covers_the_sphere(tmp_path: Path) -> None:
    plain = nerfstudio_path(np.eye(3, 4)[None], camera_type="equirectangular")
    camera = read_flight(written(tmp_path, plain), 0, SIZE, Frames()).cameras[0]
    xy = jnp.array([[32.0, 16.0], [48.0, 16.0], [16.0, 16.0], [32.0, 1e-3]])
    expected = [[0, 0, -1], [1, 0, 0], [-1, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(unproject(camera, xy).direction, expected, atol=1e-3)


def ngp_key(c2w: np.ndarray, scale: float, offset: np.ndarray, **changes: Any) -> dict[str, Any]:
    """A pose of the files as instant-ngp has it: axes of OpenCV, positions in its cube, rows y, z, x."""
    matrix = np.column_stack([c2w[:, 0], -c2w[:, 1], -c2w[:, 2], c2w[:, 3] * scale + offset])[[1, 2, 0]]
    quaternion = Rotation.from_matrix(matrix[:, :3]).as_quat().tolist()  # x, y, z, w
    key = {"R": quaternion, "T": matrix[:, 3].tolist(), "fov": 50.0, "slice": 0.0, "scale": 1.5, "aperture_size": 0.0}
    return key | changes


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_ngp_keys_are_poses_of_its_cube(tmp_path: Path, order: int) -> None:
    """Of equal key frames the path is that pose, whatever the spline."""
    scale, offset, pose = 0.25, np.array([0.4, 0.5, 0.7]), poses_around(3, 2.0)[1].astype(np.float64)
    scene = {"camera_angle_x": 1.0, "scale": scale, "offset": offset.tolist(), "frames": [{"file_path": "a"}]}
    written(tmp_path, scene, "transforms.json")
    ngp, _ = reference_frames(tmp_path)
    key = ngp_key(pose, scale, offset, aperture_size=0.1)
    top = {"path": [key, key | {"R": [-q for q in key["R"]]}, key], "spline_order": order, "loop": False}
    flight = read_flight(written(tmp_path, top), 7, SIZE, Frames(ngp=ngp))
    assert len(flight.cameras) == 7
    np.testing.assert_allclose(flight.cameras.c2w, np.broadcast_to(pose, (7, 3, 4)), atol=1e-6)
    np.testing.assert_allclose(flight.cameras.focal_xy, 24 / np.tan(np.radians(25)), rtol=1e-6)
    np.testing.assert_allclose(flight.aperture, 0.1 / scale)
    np.testing.assert_allclose(flight.focus, 1.5 / scale)


def test_an_ngp_spline_of_even_keys_is_even(tmp_path: Path) -> None:
    """A uniform cubic B-spline reproduces straight lines: away from its ends, where a key counts several times."""
    places = [np.column_stack([np.eye(3), [0.1 * i, 0, 0]]) for i in range(8)]
    top = {"path": [ngp_key(pose, 0.33, np.full(3, 0.5)) for pose in places]}
    x = np.asarray(read_flight(written(tmp_path, top), 61, SIZE, Frames()).cameras.c2w)[:, 0, 3]
    inner = x[(x > 0.15) & (x < 0.55)]
    assert len(inner) > 20
    np.testing.assert_allclose(np.diff(inner), 0.7 / 60, rtol=1e-6)  # seven pieces in 60 steps


def test_an_ngp_loop_closes(tmp_path: Path) -> None:
    top = {"path": [ngp_key(p.astype(np.float64), 0.33, np.full(3, 0.5)) for p in poses_around(6, 2.0)], "loop": True}
    position = np.asarray(read_flight(written(tmp_path, top), 240, SIZE, Frames()).cameras.c2w)[:, :, 3]
    steps = np.linalg.norm(np.diff(position, axis=0, append=position[:1]), axis=1)
    assert steps[-1] < 2 * np.max(steps[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"camera_type": "fisheye"}, "camera_type = 'fisheye'"),
        ({"render_width": 0}, "render_width = 0"),
        ({"camera_path": [{"camera_to_world": [1.0] * 15, "fov": 50}]}, "camera_path[0]: camera_to_world"),
        ({"camera_path": [{"camera_to_world": [1.0] * 16, "fov": 50}]}, "expected a rotation"),
        ({"camera_path": [{"camera_to_world": np.eye(4).reshape(-1).tolist()}]}, "fov = None"),
        ({"camera_path": []}, "1 to"),
        ({"camera_path": None}, "expected camera_path"),
        ({"camera_path": None, "path": [{"R": [0, 0, 0, 0], "T": [0, 0, 0]}]}, "expected a quaternion"),
        ({"camera_path": None, "path": [{"R": [0, 0, 0, 1], "T": [0, 0]}]}, "path[0]: T"),
    ],
)
def test_broken_paths_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, nerfstudio_path(np.eye(3, 4)[None], **change))
    with pytest.raises(InputError) as error:
        read_flight(path, 0, SIZE, Frames())
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_flight(tmp_path / "a.json", 0, SIZE, Frames())
