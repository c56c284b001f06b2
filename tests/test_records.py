"""The records that a run leaves, read back."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxngp import records
from jaxngp.pictures import write_png


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    records.write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"step": object()})
    with pytest.raises((TypeError, ValueError)):
        write_png(path, np.zeros((2, 2, 7), np.uint8))
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_takes_what_a_run_measures(tmp_path: Path) -> None:
    value = {
        "psnr": jnp.float32(30),
        "steps": np.int64(7),
        "nan": float("nan"),
        "path": tmp_path,
        "list": (np.ones(2),),
    }
    records.write_json(tmp_path / "a.json", value)
    expected = {"psnr": 30.0, "steps": 7, "nan": None, "path": str(tmp_path), "list": [[1.0, 1.0]]}
    assert json.loads((tmp_path / "a.json").read_text()) == expected


def test_log_lines_add_up(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for step in range(3):
        records.append_jsonl(path, {"step": step, "loss": np.float32(np.inf)})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "loss": None} for step in range(3)]


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    records.append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'


def test_peak_memory_counts_bytes() -> None:
    size = 300 * 2**20
    np.ones(size, np.uint8)
    assert size < records.peak_memory_bytes() < 2**40


def test_table_aligns_numbers_right_and_words_left() -> None:
    rows = [{"scene": "lego", "PSNR": 31.456, "steps": 7}, {"scene": "bricks", "PSNR": 5.0, "steps": 12345}]
    assert records.table(rows).splitlines() == [
        "scene    PSNR  steps",
        "lego    31.46      7",
        "bricks      5  12345",
    ]


def test_table_leaves_a_missing_cell_blank() -> None:
    assert records.table([{"a": 1}, {"b": "x"}]).splitlines() == ["a  b", "1", "   x"]
    assert records.table([]) == ""


def test_a_log_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "seconds": 0.5, "psnr": null}\n[]\n{"step": 2, "seconds": 1.0, "psnr": 20}\n{"step": 3, "se'
    )
    log = records.read_log(path)
    assert [entry["step"] for entry in log] == [1, 2]
    assert np.isnan(log[0]["psnr"])
    assert records.read_log(tmp_path / "none.jsonl") == []
