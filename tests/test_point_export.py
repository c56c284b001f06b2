"""Point clouds of a soft ball: where rays lose half their light, in the coordinates of the source."""

from __future__ import annotations

import numpy as np
import pytest
from soft_ball import CENTRE, LEVEL, RADIUS, TRANSFORM, TURN, SoftBall, ball_run, cameras

from jaxngp.config import InputError
from jaxngp.exporting import points
from jaxngp.exporting.points import PointOptions

# The density is LEVEL exp(-d / w) at a depth d below the surface, with w = 0.01, and 20 times LEVEL below 3 w. Along
# the normal the optical depth is LEVEL w exp(d / w) from outside: half the light is lost at d = w log(log 2 / LEVEL w).
HALFWAY = RADIUS - 0.01 * np.log(np.log(2) / (LEVEL * 0.01))


def test_points_lie_where_half_the_light_is_lost():
    """Of the rays nearest to the normal; slanting ones lose it farther out, by w log(1 / cosine) or less."""
    found = points.find_points(ball_run(SoftBall(), cameras()), 2000)
    radius = np.linalg.norm(found.position - CENTRE, axis=1)
    straight = np.sum(found.normal * (found.position - CENTRE), axis=1) / radius
    assert len(radius) == 2000
    assert np.quantile(np.abs(radius - HALFWAY), 0.2) < 3e-3
    assert np.quantile(radius, 0.8) < HALFWAY + 3 * 0.01
    assert radius.min() > HALFWAY - 0.01
    assert np.quantile(straight, 0.05) > 0.97


def test_a_cloud_is_in_the_coordinates_of_the_source(tmp_path):
    plyfile = pytest.importorskip("plyfile", reason="the extra mesh is not installed")
    run = ball_run(SoftBall(), cameras())
    assert points.write(run, tmp_path / "ball.ply", PointOptions(count=700)) == "700 points"
    table = plyfile.PlyData.read(tmp_path / "ball.ply")["vertex"].data
    position, normal = (np.stack([table[name] for name in names.split()], axis=1) for names in ("x y z", "nx ny nz"))
    offset = position - TRANSFORM.to_world(CENTRE)
    radius = np.linalg.norm(offset, axis=1)
    assert len(table) == 700
    assert np.median(radius) == pytest.approx(4 * HALFWAY, rel=0.03)
    assert np.median(np.sum(offset * normal, axis=1) / radius) > 0.99
    rgb = np.stack([table[name] for name in ("red", "green", "blue")], axis=1) / 255
    expected = 0.5 + 0.4 * offset / radius[:, None] @ np.array(TURN).T
    assert np.quantile(np.abs(rgb - expected), 0.9) < 0.06


def test_what_points_are_refused(tmp_path):
    with pytest.raises(InputError, match="rays without cameras"):
        points.write(ball_run(SoftBall()), tmp_path / "ball.ply", PointOptions())
