"""Several devices and several processes: those of `four_devices.py`, and commands that share a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from many import ROOT, TINY, end, environment, finish, start
from PIL import Image

from jaxngp.runs import latest_step


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_four_devices_do_what_one_does(marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, "tests/four_devices.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment(4), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_more_processes(tmp_path: Path) -> None:
    """One process, then two with two devices each, then four: the losses are those of one process to 1 %."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(start("jaxngp.train", [*TINY, f"--workdir={alone}", "--max_steps=48"], num_processes=1))
    for steps, num_processes, num_devices in ((16, 1, 1), (32, 2, 2), (48, 4, 1)):
        arguments = [*TINY, f"--workdir={shared}", f"--max_steps={steps}", "--extend"]
        finish(start("jaxngp.train", arguments, num_processes=num_processes, num_devices=num_devices))
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, shared)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    losses = [[entry["loss"] for entry in log] for log in logs]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    scenes = [json.loads((run / "scene.json").read_text()) for run in (alone, shared)]
    assert scenes[0] == scenes[1]


@pytest.mark.slow
def test_the_others_end_when_a_process_dies(tmp_path: Path) -> None:
    """Within a minute, with a line that says why; the same command then goes on from the checkpoint."""
    arguments = [*TINY, f"--workdir={tmp_path / 'run'}", "--override=train.checkpoint_seconds=0.1"]
    processes = start("jaxngp.train", [*arguments, "--max_steps=1000000"], num_processes=2)
    deadline = time.monotonic() + 900
    try:
        while latest_step(tmp_path / "run") is None:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.2)
        processes[1].kill()
        killed = time.monotonic()
        printed = processes[0].communicate(timeout=60)[0]
    finally:
        end(processes)
    assert processes[0].returncode == 2, printed
    assert "another process of the run has ended" in printed
    assert time.monotonic() - killed < 60
    saved = latest_step(tmp_path / "run")
    assert saved is not None
    finish(start("jaxngp.train", [*arguments, f"--max_steps={saved + 4}", "--extend"], num_processes=2))
    assert latest_step(tmp_path / "run") == saved + 4


@pytest.mark.slow
def test_processes_render_what_one_renders(tmp_path: Path) -> None:
    """Frame by frame, in turns, and one animation of all."""
    finish(start("jaxngp.train", [*TINY, f"--workdir={tmp_path}", "--max_steps=4"], num_processes=1))
    frames = []
    for num_processes in (1, 2):
        arguments = [f"--workdir={tmp_path}", "--path=orbit", "--frames=3", "--animation=gif", "--layers=colour"]
        finish(start("jaxngp.render", arguments, num_processes=num_processes))
        folder = tmp_path / "renders" / "orbit"
        frames.append({path.name: pixels(path) for path in sorted(folder.iterdir())})
    assert [*frames[0]] == ["frame_0000.png", "frame_0001.png", "frame_0002.png", "orbit.gif"]
    assert [*frames[1]] == [*frames[0]]
    assert all(np.abs(a - frames[1][name]).max() <= 1 for name, a in frames[0].items() if name.endswith("png"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.int16)
