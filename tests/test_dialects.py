"""Captures in the formats of other programs: they say the same, and what they say is honoured or refused by name."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from dialects import DIALECTS, Scene, expressed, scene_path, small_scene, write

from jaxngp import data
from jaxngp.cameras import unproject
from jaxngp.config import SceneConfig
from jaxngp.data.capture import Capture

SCENE = small_scene()
cast = jax.jit(unproject)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path / "cache"))


def capture_at(path: Path) -> Capture:
    location = data.locate(SceneConfig(name=str(path)))
    return location.read(*location.splits)


def ray_error(capture: Capture, scene: Scene) -> float:
    """By how many pixels rays miss their pixels, where the scene itself projects a point on each of them."""
    share = np.stack(np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 7)), axis=-1).reshape(-1, 2)
    pixel = (share * scene.sizes[:, None]).astype(np.float32)  # (V, P, 2)
    assert capture.cameras is not None
    rays = cast(capture.cameras[:, None], pixel)
    points = np.asarray(rays.origin, np.float64) + 3.0 * np.asarray(rays.direction, np.float64)
    return max(float(np.abs(scene.project(v, points[v]) - pixel[v]).max()) for v in range(len(pixel)))


@every_dialect
def test_rays_of_all_dialects_agree(tmp_path: Path, dialect: str) -> None:
    write(dialect, tmp_path / "scene", SCENE)
    capture = capture_at(scene_path(dialect, tmp_path / "scene"))
    scene = expressed(dialect, SCENE)
    assert len(capture.names) == len(SCENE.names)
    np.testing.assert_array_equal(capture.cameras.size, scene.sizes)
    assert (capture.cameras.lens is None) == (scene.k1 == 0)
    assert ray_error(capture, scene) < 1e-3
