"""Training processes that are killed, stopped and started twice: what is left goes on, and to the same end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from entrypoints import TINY, write_scene

from jaxngp.checkpoints import Checkpoints
from jaxngp.config import NerfConfig
from jaxngp.runs import read_config
from jaxngp.training.loop import Progress

KILLS = int(os.environ.get("JAXNGP_KILLS", "2"))
"""Times that a run is killed; `make test-long` has it killed more often."""

INTERVAL = 0.1  # seconds between checkpoints
STEPS = 500 * max(KILLS, 3)  # so many that a run is not done before it is killed
ARGUMENTS = [
    *(argument for argument in TINY if not argument.startswith("--max_steps")),
    f"--max_steps={STEPS}",
    f"--override=train.checkpoint_seconds={INTERVAL}",
    "--eval_views=1",
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scenes") / "square")


def start(scene: Path, workdir: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxngp.train", f"--scene={scene}", f"--workdir={workdir}", *ARGUMENTS, *arguments]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == code, error
    return error


def restored(workdir: Path) -> Progress | None:
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(read_config(workdir, NerfConfig))


def wait_for(process: subprocess.Popen[str], *patterns: Path) -> None:
    """Until a file is there that one of the patterns matches, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(list(p.parent.glob(p.name)) for p in patterns):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def logged(workdir: Path) -> list[dict[str, float]]:
    """The lines of the log, but for one that was cut short."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def uninterrupted(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Progress, Path]:
    """How the run ends, in a process with nothing in its compilation cache; and that cache."""
    workdir, cache = (tmp_path_factory.mktemp(name) for name in ("run", "cache"))
    finish(start(scene, workdir, cache))
    end = restored(workdir)
    assert end is not None
    assert end.step == STEPS
    return end, cache


def assert_same_end(workdir: Path, end: Progress) -> None:
    found = restored(workdir)
    assert found is not None
    assert found.step == end.step
    for a, b in zip(*(jax.tree.leaves(p.state.replace(key=p.step)) for p in (found, end)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_killed_run_ends_at_the_same_bits(scene: Path, uninterrupted: tuple[Progress, Path], tmp_path: Path) -> None:
    """Killed every second time in the middle of a save, else a random time after the first sign of training.

    Each time another process goes on, with all programs from its cache, and more calls in flight.
    """
    end, cache = uninterrupted
    more = "--override=train.calls_in_flight=3"
    moments, saved, codes = random.Random(0), 0, []
    for kill in range(KILLS):
        before = len(logged(tmp_path))
        process = start(scene, tmp_path, cache, more)
        if kill % 2:
            wait_for(process, tmp_path / "checkpoints" / "*tmp*")
        else:
            while process.poll() is None and len(logged(tmp_path)) <= before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 3 * INTERVAL))
        process.kill()
        process.communicate(timeout=60)
        codes.append(process.returncode)
        progress = restored(tmp_path)
        step, seconds = (progress.step, progress.seconds) if progress else (0, 0.0)
        assert step >= saved, "a checkpoint that was there is gone"
        saved = step
        lost = max((line["seconds"] for line in logged(tmp_path)), default=0.0) - seconds
        assert lost < INTERVAL + 1, f"{lost:.1f} s of training are lost"  # a save takes some time itself
    assert set(codes) <= {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 0.8 * KILLS - 1, "most runs had ended before they were killed"
    finish(start(scene, tmp_path, cache, more))
    assert_same_end(tmp_path, end)
    steps = [line["step"] for line in logged(tmp_path)]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_a_second_training_in_a_workdir_is_refused(
    scene: Path, uninterrupted: tuple[Progress, Path], tmp_path: Path
) -> None:
    """And the first ends as it is asked to."""
    _, cache = uninterrupted
    first = start(scene, tmp_path, cache, "--override=train.max_steps=10000000")
    wait_for(first, tmp_path / "metrics.jsonl")
    error = finish(start(scene, tmp_path, cache, "--override=train.max_steps=10000000"), code=2)
    assert error.strip().splitlines()[-1].startswith(f"jaxngp: {tmp_path}: another process is training in it")
    assert f"(process {first.pid})" in error
    first.send_signal(signal.SIGTERM)
    assert "goes on from here" in finish(first, code=128 + signal.SIGTERM)
    progress = restored(tmp_path)
    assert progress is not None
    assert progress.step == logged(tmp_path)[-1]["step"]
