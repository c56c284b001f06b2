"""`python -m jaxngp.report`: one page that stands alone and says what the run's own files say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from entrypoints import TINY, refusal, run, write_scene

from jaxngp.evaluation import ViewPicture, ViewScore
from jaxngp.reporting import choose_views


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    folder = tmp_path_factory.mktemp("report")
    run("train", f"--scene={write_scene(folder / 's')}", f"--workdir={folder / 'run'}", *TINY)
    return folder / "run"


def test_the_page_stands_alone_and_is_the_summary(workdir: Path) -> None:
    run("report", f"--workdir={workdir}")
    page, summary = (workdir / "report.html").read_text(), json.loads((workdir / "summary.json").read_text())
    assert f"PSNR {summary['psnr']:.2f} dB" in page
    assert f"{min(summary['view_psnr']):.2f} dB" in page
    assert "sampler.num_steps" in page
    links = re.findall(r"(?:src|href)=[\"'](.*?)[\"']", page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"<script|@import|<link", page)
    assert page.count("<svg") >= 4


def test_the_same_run_gives_the_same_page(workdir: Path) -> None:
    pages = []
    for name in ("a", "b"):
        run("report", f"--workdir={workdir}", f"--out={workdir / name}.html")
        pages.append((workdir / f"{name}.html").read_text())
    assert pages[0] == pages[1]


def test_tensorboard_gets_the_log(workdir: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra report is not installed")
    for _ in range(2):  # the second replaces the first
        run("report", f"--workdir={workdir}", "--tensorboard", "--eval_views=1")
    (events,) = (workdir / "tensorboard").iterdir()
    assert b"train/psnr" in events.read_bytes()


def test_images_and_distances_have_reports_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    tiny = ["--size=32", "--max_steps=20", f"--workdir={tmp_path}", "--log2_table_size=14"]
    run("train_image", *tiny)
    run("report", f"--workdir={tmp_path}")
    page = (tmp_path / "report.html").read_text()
    assert "an image" in page
    assert "reconstruction.png" in page


def test_the_worst_and_the_best_are_found() -> None:
    scores = [ViewScore(f"v{i}", value, 0.9, 1.0) for i, value in enumerate((20.0, 18.0, 25.0, 24.0, 19.0))]
    picture = ViewPicture(np.zeros((4, 4, 3)), np.zeros((4, 4, 3)), np.ones((4, 4)), np.ones((4, 4)))
    found, shown = choose_views(((score, picture) for score in scores), len(scores))
    assert found == scores
    assert {name: view.score.name for name, view in shown.named.items()} == {"worst view": "v1", "best view": "v2"}
    assert len(shown.sheet) == 5


def test_a_report_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workdir is missing" in refusal(capsys, "report")
    assert "config.json" in refusal(capsys, "report", f"--workdir={tmp_path}")


def test_a_run_without_a_log_is_refused(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "no log of a training" in refusal(capsys, "report", f"--workdir={tmp_path / 'run'}")
