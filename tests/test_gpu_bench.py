"""The benchmark of a GPU: its sections, one by one; `python -m experiments.gpu.bench --toy` runs them all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from strategies import needs_float16

from experiments.gpu import bench
from jaxngp.config import apply_overrides
from jaxngp.device import by_device
from jaxngp.presets import PRESETS

TOY = apply_overrides(PRESETS["base"], bench.TOY_OVERRIDES)


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
    function, inputs = bench.compositing(num_samples=256)
    assert max(bench.relative_errors(function, inputs).values()) <= 1e-4

    def wrong(inputs: Any) -> jax.Array:
        return by_device(function(inputs), cpu=lambda value: value, gpu=lambda value: 1.1 * value)

    assert list(bench.relative_errors(wrong, inputs).values()) == pytest.approx([0.1, 0.1], rel=1e-3)


@needs_float16
def test_ceilings_are_measured() -> None:
    rows = list(bench.ceilings(SimpleNamespace(config=TOY, sizes=bench.TOY)))
    assert len(rows) == 4
    assert all(row["rate"] > 0 for row in rows)


def test_a_gpu_runs_what_its_streams_show() -> None:
    def line(name: str, *names: str) -> SimpleNamespace:
        events = [SimpleNamespace(name=n, duration_ns=5e3, end_ns=1e4 * (i + 1), stats=[]) for i, n in enumerate(names)]
        return SimpleNamespace(name=name, events=events)

    host = SimpleNamespace(name="/host:CPU", lines=[line("python", "call")])
    device = SimpleNamespace(name="/device:GPU:0", lines=[line("Stream #1", "fusion_1", "copy"), line("Ops", "x")])
    assert bench.device_events([host, device]) == [bench.Run("fusion_1", 5.0, 10.0), bench.Run("copy", 5.0, 20.0)]
    assert bench.device_events([host]) == []
