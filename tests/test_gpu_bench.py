"""The benchmark of a GPU: all of it on a toy, and what becomes of a section that fails or does not fit."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from experiments.gpu import bench
from jaxngp.cameras import look_at, make_cameras, pose_images
from jaxngp.config import apply_overrides
from jaxngp.data import Split
from jaxngp.device import by_device
from jaxngp.presets import PRESETS

TOY = apply_overrides(PRESETS["base"], [*bench.TOY_OVERRIDES, "field.encoding.num_levels=1"])


@pytest.mark.slow
def test_a_toy_runs_through_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c2w = [look_at(eye, (0.5, 0.5, 0.5), (0, 0, 1)) for eye in ((2, 0.5, 0.5), (0.5, 2, 0.8))]
    cameras = make_cameras(c2w, focal_xy=[20, 20], centre_xy=[12, 12], width=24, height=24)
    images = np.zeros((2, 24, 24, 4), np.uint8)
    images[:, 8:16, 8:16] = (200, 100, 50, 255)
    views = pose_images(cameras, images)
    task = bench.Bench(TOY, bench.TOY, views, Split("val", ("0", "1"), views, has_alpha=True))
    notes = bench.run_sections(bench.SECTIONS, task, tmp_path / "out.json", budget=1e6)
    found, text = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert notes == {}, text
    assert all(found[name] for name in bench.SECTIONS), text
    assert found["steps"][1]["Msamples/s"] > 0
    assert found["psnr"][0]["PSNR, dB"] > 5
    assert found["kernels"][0]["us a step"] > 0
    assert any("scatter" in row["from"] for row in found["kernels"])


def test_sections_fail_and_are_skipped_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(bench: Any) -> Iterator[bench.Row]:
        yield {"value": bench, "text": "a"}

    def fails(bench: Any) -> Iterator[bench.Row]:
        yield {"value": 2.0}
        raise ValueError("two\nlines")

    sections = {"a": (rows, 1.0), "bad": (fails, 1.0), "long": (rows, 1e9), "b": (rows, 1.0)}
    notes = bench.run_sections(sections, 3.0, tmp_path / "out.json", budget=1e6)
    assert notes["bad"] == "failed: ValueError: two lines"
    assert notes["long"].startswith("skipped: 1000000000 s needed")
    results = json.loads((tmp_path / "out.json").read_text())
    row = {"value": 3.0, "text": "a"}
    assert [results[name] for name in sections] == [[row], [{"value": 2.0}], [], [row]]
    assert results["notes"] == notes
    assert "## a\n\n| value | text |\n|---|---|\n| 3 | a |" in capsys.readouterr().out


def test_the_correctness_section_finds_an_error() -> None:
    function, arguments, tolerance = bench.checks(TOY, num_samples=256)["compositing"]
    assert max(bench.relative_errors(function, arguments).values()) <= tolerance

    def wrong(*args: jax.Array) -> bench.Row:
        scaled = functools.partial(by_device, cpu=lambda value: value, gpu=lambda value: 1.1 * value)
        return {name: scaled(value) for name, value in function(*args).items()}

    assert min(bench.relative_errors(wrong, arguments).values()) == pytest.approx(0.1, rel=1e-2)


def test_a_gpu_runs_what_its_streams_show() -> None:
    def line(name: str, *names: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=n, duration_ns=5e3, stats=[]) for n in names])

    host = SimpleNamespace(name="/host:CPU", lines=[line("python", "call")])
    device = SimpleNamespace(name="/device:GPU:0", lines=[line("Stream #1", "fusion_1", "copy"), line("Ops", "x")])
    assert bench.device_events([host, device]) == [("fusion_1", 5.0), ("copy", 5.0)]
    assert bench.device_events([host]) == []
