"""`jaxngp.train_sdf` as a user meets it: what it writes, what it measures, what it draws, and how it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from entrypoints import COMMANDS
from flax import struct
from PIL import Image

from jaxngp import train_sdf
from jaxngp.config import ImageConfig, SdfConfig, from_json, to_json
from jaxngp.data.shapes import SHAPES

TINY = [
    "--preset=small",
    "--max_steps=300",
    "--image_size=48",
    "--override=field.encoding.num_levels=4",
    "--override=field.encoding.table_size=2**15",
    "--override=field.encoding.max_resolution=31",
    "--override=field.hidden_width=32",
    "--override=optimizer.learning_rate=3e-3",
    "--override=train.num_points=2**11",
    "--override=sdf.num_samples=2**16",
]


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_sdf, "NUM_VOLUME_POINTS", 2**16)
    monkeypatch.setattr(train_sdf, "NUM_SURFACE_POINTS", 2**11)
    monkeypatch.setattr(train_sdf, "BATCH", 2**14)


run = COMMANDS["train_sdf"]


def summary(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_run_on_a_built_in_shape_needs_no_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns, writes what one needs, and says that no mesh is extracted; again, it only evaluates."""
    for name in ("skimage", "skimage.measure", "igl", "trimesh"):
        monkeypatch.setitem(sys.modules, name, None)
    run("--shape=torus", f"--workdir={tmp_path}", *TINY)
    assert "no mesh extracted: trimesh" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "pictures",
        "summary.json",
    }
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"sheet.png", "surface.png"}
    config = from_json((tmp_path / "config.json").read_text(encoding="utf-8"), SdfConfig)
    assert config.sdf.name == "torus"
    found = summary(tmp_path)
    assert found["iou"] > 0.9  # 0.95 here
    assert found["normal_degrees"] < 20
    assert found["chamfer"] is None
    assert found["steps"] == 300
    log = (tmp_path / "metrics.jsonl").read_bytes()
    run("--shape=torus", f"--workdir={tmp_path}", *TINY)
    assert summary(tmp_path)["iou"] == found["iou"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("suffix", ["ply", "obj"])
def test_a_mesh_is_extracted_in_its_own_coordinates(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("igl", reason="meshes need pip install .[mesh]")
    trimesh = pytest.importorskip("trimesh", reason="meshes need pip install .[mesh]")
    trimesh.creation.icosphere(subdivisions=3, radius=20.0).apply_translation([100, -50, 7]).export(tmp_path / "a.stl")
    run(
        f"--mesh={tmp_path / 'a.stl'}",
        f"--workdir={tmp_path / 'run'}",
        "--mesh_resolution=64",
        f"--mesh_format={suffix}",
        *TINY,
    )
    surface = trimesh.load(tmp_path / "run" / "pictures" / f"surface.{suffix}", process=False)
    assert surface.is_watertight
    np.testing.assert_allclose(surface.bounds, [[80, -70, -13], [120, -30, 27]], atol=0.5)
    assert surface.volume == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.03)  # positive: it looks out
    found = summary(tmp_path / "run")
    assert found["iou"] > 0.95
    assert 0 < found["chamfer"] < 3e-3


def test_the_workdir_of_another_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(to_json(ImageConfig()), encoding="utf-8")
    said = run.refusal(capsys, "--shape=torus", f"--workdir={tmp_path}", *TINY)
    assert "holds a run of python -m jaxngp.train_image; give another --workdir" in said


@pytest.mark.slow
def test_each_program_is_compiled_once(tmp_path: Path) -> None:
    jax.clear_caches()
    fresh = "--override=train.num_points=1032"  # of a shape that no other test has, since programs are kept
    with Compilations() as compilations:
        run("--shape=sphere", "--mesh_resolution=0", f"--workdir={tmp_path}", *TINY, fresh)
    for name in ("sdf_steps", "trace_rays", "_normals_of_hits", "_shade", "distances", "normals_at"):
        assert compilations[name] == 1, (name, compilations.counts)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mesh=nothing.obj"], "nothing.obj"),
        (["--mesh=~nouser_of_this_name/a.obj"], "~nouser_of_this_name/a.obj"),
        (["--mesh=nothing.obj", "--shape=torus"], "--shape is a built-in solid"),
        (["--shape=teapot"], "teapot"),
        (["--mesh_resolution=7"], "expected 16 or more, or 0"),
        (["--override=sdf.num_samples=5"], "sdf.num_samples"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(argument.startswith("--mesh=") for argument in arguments) and "--shape=torus" not in arguments:
        pytest.importorskip("igl", reason="meshes need pip install .[mesh]")
    assert says in run.refusal(capsys, *arguments, f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


# Of a distance that is exact.


@struct.dataclass
class ExactBall:
    """The signed distance to a ball in the middle of the cube."""

    radius: jax.Array

    def __call__(self, position: jax.Array) -> jax.Array:
        return jnp.linalg.norm(position - 0.5, axis=1) - self.radius


def test_the_exact_distance_is_perfect() -> None:
    found = train_sdf.evaluate(ExactBall(jnp.float32(0.4)), SHAPES["sphere"], None)
    assert found.iou > 0.9999
    assert found.mean_error < 1e-6
    assert found.normal_degrees < 0.1


@pytest.mark.parametrize("radius", [0.38, 0.41])
def test_another_radius_costs_its_share_of_the_volume(radius: float) -> None:
    found = train_sdf.evaluate(ExactBall(jnp.float32(radius)), SHAPES["sphere"], None)
    expected = min(radius / 0.4, 0.4 / radius) ** 3
    # Of what lies in the box, which ends 0.4 % outside the sphere.
    assert found.iou == pytest.approx(expected, abs=0.02)
    assert found.mean_error == pytest.approx(abs(radius - 0.4), rel=1e-3)
    assert found.normal_degrees < 0.1


@pytest.mark.parametrize("up", ["x", "y", "z"])
@pytest.mark.parametrize("name", ["shapes", "capsule"])
def test_the_camera_sees_all_of_the_solid(name: str, up: str) -> None:
    solid = SHAPES[name]
    rays, lamp, sky = train_sdf.view(solid, 64, up, 25.0, 15.0)
    assert sky["xyz".index(up)] == 1
    assert lamp @ sky > 0.5
    rays = jax.tree.map(np.asarray, rays)
    direction = rays.direction.reshape(64, 64, 3)
    assert (direction[0] @ sky).mean() > (direction[-1] @ sky).mean()
    # Some ray passes close to every point of the surface, and none of the outermost pixels sees one.
    points, _ = solid.surface(np.random.default_rng(0), 200)
    towards = points - rays.origin[0]
    cosine = (towards / np.linalg.norm(towards, axis=1, keepdims=True)) @ rays.direction.T
    pixel = cosine.argmax(axis=1)
    assert (1 - cosine.max(axis=1) < 1e-4).all()
    edge = (pixel // 64 % 63 == 0) | (pixel % 64 % 63 == 0)
    assert not edge.any()


def test_the_pictures_show_the_ball(tmp_path: Path) -> None:
    train_sdf.draw(ExactBall(jnp.float32(0.4)), SHAPES["sphere"], 64, "z", tmp_path)
    with Image.open(tmp_path / "surface.png") as png:
        picture = np.asarray(png).astype(int)
    assert picture.shape == (64, 64, 3)
    white = (picture == 255).all(axis=2)
    assert white[0].all()
    assert white[-1].all()
    assert (~white).mean() == pytest.approx(np.pi / 4 * 0.94**2, abs=0.03)
    assert picture[16:24, 24:40].mean() > picture[-16:-8, 24:40].mean() + 20  # the lamp is above
