"""Splats: the layouts of one known Gaussian, discs on a soft ball, and what the judge makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from judges import read_glb, splat_picture
from scipy.spatial.transform import Rotation
from soft_ball import CENTRE, RADIUS, TRANSFORM, TURN, SoftBall, ball_run, cameras, cast_ball

from jaxngp.exporting import splats
from jaxngp.exporting.splats import C0, SplatOptions, Splats

TURNED = Rotation.from_rotvec([0.3, -0.5, 0.8])
ONE = Splats(
    position=np.array([[11.0, -21.0, 29.5]]),
    scale=np.array([[0.5, 0.2, 0.1]]),
    rotation=TURNED.as_quat()[None],
    opacity=np.array([0.75]),
    harmonics=np.arange(12.0).reshape(1, 4, 3) / 10,
)


def test_a_ply_of_one_gaussian(tmp_path):
    """As 3DGS reads it: the harmonics above band 0 by channel, the quaternion's w first."""
    plyfile = pytest.importorskip("plyfile", reason="the extra mesh is not installed")
    splats.write_splat_ply(ball_run(None), tmp_path / "one.ply", ONE)
    table = plyfile.PlyData.read(tmp_path / "one.ply")["vertex"].data
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"] + [f"f_rest_{i}" for i in range(9)]
    names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert list(table.dtype.names) == names
    row = np.array(table[0].tolist())
    np.testing.assert_allclose(row[:3], ONE.position[0])
    np.testing.assert_allclose(row[6:9], [0, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(row[9:18], [0.3, 0.6, 0.9, 0.4, 0.7, 1.0, 0.5, 0.8, 1.1], rtol=1e-6)
    assert 1 / (1 + np.exp(-row[18])) == pytest.approx(0.75)
    np.testing.assert_allclose(np.exp(row[19:22]), ONE.scale[0], rtol=1e-6)
    np.testing.assert_allclose(row[22:], TURNED.as_quat()[[3, 0, 1, 2]], rtol=1e-6)


def test_a_glb_of_one_gaussian(tmp_path):
    """Its node turns what is up to y: position and shape come out where they are in the source."""
    splats.write_splat_glb(ball_run(None), tmp_path / "one.glb", ONE)
    described, arrays = read_glb(tmp_path / "one.glb")
    primitive = described["meshes"][0]["primitives"][0]
    values = {name.split(":")[-1]: arrays[number][0] for name, number in primitive["attributes"].items()}
    assert primitive["mode"] == 0
    assert primitive["extensions"]["KHR_gaussian_splatting"]["colorSpace"] == "srgb_rec709_display"
    assert described["extensionsUsed"] == ["KHR_gaussian_splatting"]
    node = described["nodes"][0]
    turn, back = Rotation.from_quat(node["rotation"]).as_matrix(), np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    to_source = np.array(TURN).T @ back
    place = to_source @ (turn @ values["POSITION"] + node["translation"])
    np.testing.assert_allclose(place, ONE.position[0], rtol=1e-5)
    np.testing.assert_allclose(values["SCALE"], ONE.scale[0], rtol=1e-6)
    np.testing.assert_allclose(values["ROTATION"], TURNED.as_quat(), rtol=1e-6)
    np.testing.assert_allclose(to_source @ turn, np.eye(3), atol=1e-6)
    assert values["OPACITY"] == pytest.approx(0.75)
    assert values["COLOR_0"][3] == pytest.approx(0.75, abs=1e-4)
    for number, name in enumerate(["SH_DEGREE_0_COEF_0", *(f"SH_DEGREE_1_COEF_{i}" for i in range(3))]):
        np.testing.assert_allclose(values[name], ONE.harmonics[0, number], rtol=1e-6)


@pytest.fixture(scope="module")
def found():
    return splats.make_splats(ball_run(SoftBall(), cameras()), SplatOptions(splats=4000, degree=1, steps=0))


def test_discs_lie_flat_on_the_ball(found):
    offset = found.position - TRANSFORM.to_world(CENTRE)
    radius = np.linalg.norm(offset, axis=1)
    thin = Rotation.from_quat(found.rotation).as_matrix()[:, :, 2]
    assert np.median(radius) == pytest.approx(4 * RADIUS, rel=0.03)
    assert np.quantile(np.abs(np.sum(thin * offset, axis=1)) / radius, 0.1) > 0.97
    np.testing.assert_allclose(found.scale[:, 2] / found.scale[:, 0], 0.15, rtol=1e-6)
    colour = 0.5 + C0 * found.harmonics[:, 0]
    expected = 0.5 + 0.4 * offset / radius[:, None] @ np.array(TURN).T
    assert np.quantile(np.abs(colour - expected), 0.9) < 0.06


def test_splats_look_like_the_ball(found):
    """Beside rays that are cast at the sphere: the same colours inside, and nothing around it."""
    view = cameras()[5]
    place = TRANSFORM.to_scene(found.position)
    outward = (place - CENTRE) / np.linalg.norm(place - CENTRE, axis=1, keepdims=True)
    turn = np.array(TURN) @ Rotation.from_quat(found.rotation).as_matrix()
    seen = splat_picture(view, place, found.scale / 4, turn, np.full(4000, 0.9), 0.5 + 0.4 * outward)
    exact, near = cast_ball(view), cast_ball(view, 0.8 * RADIUS)
    inside, outside = (near < 1).any(axis=-1), (cast_ball(view, 1.25 * RADIUS) == 1).all(axis=-1)
    assert np.abs(seen - exact)[inside].mean() < 0.03
    assert np.abs(seen - 1)[outside].max() < 0.02


def test_the_judge_draws_a_round_gaussian():
    """A ball of deviation s, far away: the opacity falls off with the variance (f s / z)^2 + 0.3 px^2."""
    view = cameras()[0]
    place = np.asarray(view.c2w)[:, 3] - 1.4 * np.asarray(view.c2w)[:, 2]
    seen = splat_picture(view, place[None], np.full((1, 3), 0.04), np.eye(3)[None], np.array([0.8]), np.zeros((1, 3)))
    square = np.sum((np.stack(np.meshgrid(*[np.arange(64) + 0.5] * 2), axis=-1) - 32) ** 2, axis=-1)
    variance = (80 * 0.04 / 1.4) ** 2 + 0.3
    expected = 1 - 0.8 * np.exp(-0.5 * square / variance)
    np.testing.assert_allclose(seen[..., 0], np.where(square < 8 * variance, expected, seen[..., 0]), atol=2e-3)
    assert np.all(seen[square > 10 * variance] == 1)
