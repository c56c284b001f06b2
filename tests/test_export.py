"""`python -m jaxngp.export`: what it writes agrees with the run, in the coordinates of the run's source."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from entrypoints import TINY, refusal, run, write_scene

from jaxngp import export, runs
from jaxngp.occupancy import is_occupied


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    run("train", f"--scene={write_scene(folder / 's')}", f"--workdir={folder / 'run'}", *TINY, "--scale=0.5")
    return folder / "run"


def test_a_volume_says_where_its_densities_lie(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("export", f"--workdir={workdir}", "--format=volume", "--resolution=12")
    path, opened = workdir / "exports" / "s-volume.npz", runs.load(workdir)
    assert f"{path}: density" in capsys.readouterr().out
    with np.load(path) as file:
        density, origin, axes = file["density"], file["origin"], file["axes"]
    index = np.stack(np.indices(density.shape), axis=-1).reshape(-1, 3)
    points = jnp.asarray(opened.transform.to_scene(origin + index @ axes.T), jnp.float32)
    occupied = np.asarray(is_occupied(opened.occupancy, points))
    expected = np.where(occupied, opened.field.density(points), 0) / opened.transform.side
    assert 0 < occupied.mean() < 1
    assert opened.transform.side > 1.5  # so that units matter
    np.testing.assert_allclose(density.reshape(-1), expected, rtol=1e-3)


def test_a_page_holds_the_options(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a page shows is the matter of test_webpage.py."""
    run("export", f"--workdir={workdir}", "--format=html", "--background=black", "--view=2")
    page = (workdir / "exports" / "s.html").read_text(encoding="utf-8")
    assert "<title>s</title>" in page
    assert '"background": "black"' in page
    assert "in 8 bits" in capsys.readouterr().out
    arguments = (f"--workdir={workdir}", "--format=html", "--view=7")
    assert "--view=7: this run has 3" in refusal(capsys, "export", *arguments)


def test_what_export_refuses(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workdir is missing" in refusal(capsys, "export", "--format=volume")
    assert "--format is missing" in refusal(capsys, "export", f"--workdir={workdir}")
    assert "resolution = 1: expected int >= 2" in refusal(
        capsys, "export", f"--workdir={workdir}", "--format=volume", "--resolution=1"
    )
    for name, wrong in (
        ("html", "a.glb"),
        ("mesh", "a.stl"),
        ("points", "a.obj"),
        ("splats", "a.spz"),
        ("volume", "a.vdb"),
    ):
        said = refusal(capsys, "export", f"--workdir={workdir}", f"--format={name}", f"--out={wrong}")
        assert f"--out={wrong}: --format={name} is written as ." in said


def test_formats_have_files_of_their_own() -> None:
    endings = [form.ending for form in export.FORMATS.values()]
    assert len(set(endings)) == len(endings)
