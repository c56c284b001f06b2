"""The viewer in a headless browser: pictures appear, follow the mouse, and nothing fails in the page.

Skipped without viser, or without Playwright and a Chromium: CHROMIUM, chromium on the PATH, or Playwright's own.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from entrypoints import TINY, refusal, run, write_scene

from jaxngp import runs
from jaxngp.checkpoints import Checkpoints
from jaxngp.config import NerfConfig
from jaxngp.data import load_training
from jaxngp.training.loop import train
from jaxngp.view import newer_checkpoints
from jaxngp.viewing.panel import address, announcement, start_server
from jaxngp.viewing.source import Source, history_of
from jaxngp.viewing.viewer import Viewer, open_viewer

pytest.importorskip("viser", reason="viser is not installed")
pytestmark = [
    # Of viser's and Playwright's own threads and sockets, whenever they are collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    run("train", f"--scene={write_scene(folder / 's')}", f"--workdir={folder / 'run'}", *TINY, "--scale=0.5")
    return folder / "run"


def source_of(workdir: Path, **more: Any) -> Source:
    opened = runs.load(workdir)
    return Source(
        config=opened.config,
        workdir=workdir,
        cameras=opened.cameras,
        transform=opened.transform,
        read=lambda: load_training(opened.config.scene),
        history=lambda: history_of(workdir),
        **more,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a headless Chromium; its `errors` are those of the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with playwright.sync_playwright() as play:
        if not path and not Path(play.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 600})
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def wait(condition: Callable[[], Any], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def pictures(viewer: Viewer) -> list[Any]:
    """All pictures that the viewer sends from now on."""
    found: list[Any] = []
    send = viewer._worker._shown

    def shown(window: int, picture: Any) -> None:
        send(window, picture)
        found.append(picture)

    viewer._worker._shown = shown
    return found


@pytest.mark.slow
def test_a_browser_looks_around(workdir: Path, page: Any) -> None:
    with open_viewer(source_of(workdir), host="127.0.0.1", port=free_port()) as viewer:
        sent = pictures(viewer)
        viewer.show(runs.load(workdir).progress)
        page.goto(viewer.url)
        page.get_by_text("Screenshot").wait_for()
        wait(lambda: sent and sent[-1].full)
        assert "Step 40" in page.inner_text("body")

        before = len(sent)
        page.mouse.move(250, 300)
        page.mouse.down()
        page.mouse.move(330, 320, steps=8)
        page.mouse.up()
        wait(lambda: len(sent) > before and sent[-1].full)
        assert any(not picture.full for picture in sent[before:])

        page.get_by_role("tab", name="Cameras").click()
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("PSNR").wait_for()
        page.get_by_text("Next", exact=True).click()
        page.get_by_text("Camera 1: ").wait_for()
        page.get_by_text("Close", exact=True).click()

        page.get_by_role("tab", name="View").click()
        with page.expect_download() as download:
            page.get_by_text("Screenshot").click()
        assert download.value.suggested_filename == "s_40_colour.png"

        page.get_by_role("tab", name="Path").click()
        for _ in range(2):
            page.get_by_role("button", name="Add key frame").click()
        page.get_by_text("File", exact=True).click()
        with page.expect_download() as download:
            page.get_by_text("Export JSON").click()
        assert (workdir / "renders" / "viewer" / "path.json").is_file()
        assert page.errors == []


@pytest.mark.slow
def test_a_browser_pauses_and_saves(workdir: Path, page: Any) -> None:
    """The loop that trains stands still, saves, and goes on."""
    opened = runs.load(workdir)
    saved: list[Any] = []
    source = source_of(workdir, save=saved.append)
    with open_viewer(source, host="127.0.0.1", port=free_port()) as viewer:
        steps: list[int] = []

        def loop() -> None:
            for progress in train(opened.config, load_training(opened.config.scene).images):
                viewer.show(progress)
                steps.append(progress.step)
                time.sleep(0.05)

        viewer._controls.paused.set()
        thread = threading.Thread(target=loop)
        thread.start()
        page.goto(viewer.url)
        page.get_by_role("tab", name="Training").click()
        page.get_by_text("Save checkpoint").click()
        wait(lambda: saved)
        assert (saved[0].step, steps) == (0, [])
        page.get_by_text("training", exact=False).first.wait_for()
        viewer._controls.paused.clear()
        thread.join(60)
        assert steps[-1] == 40
        assert page.errors == []


def test_a_busy_port_gives_the_next_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start_server("127.0.0.1", port)
    try:
        assert server.get_port() != port
        assert f"port {port} is in use" in announcement("127.0.0.1", port, server.get_port())
        assert address("127.0.0.1", server.get_port()) == f"http://127.0.0.1:{server.get_port()}"
    finally:
        server.stop()


def test_who_may_look_is_said() -> None:
    assert "ssh -L 80:127.0.0.1:80" in announcement("127.0.0.1", 80, 80)
    assert "whoever" in announcement("0.0.0.0", 80, 80)
    assert "http://[::1]:80" in announcement("::1", 80, 80)


def test_what_the_viewer_refuses(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workdir is missing" in refusal(capsys, "view")
    assert "--view_host=1.2.3.4" in refusal(capsys, "view", f"--workdir={workdir}", "--view_host=1.2.3.4")
    assert "give that too" in refusal(
        capsys,
        "train",
        f"--workdir={workdir}",
        f"--scene={workdir.parent / 's'}",
        *TINY,
        "--scale=0.5",
        "--view_port=90",
    )


def test_newer_checkpoints_are_found(workdir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    opened = runs.load(folder, NerfConfig)
    found = newer_checkpoints(opened, lambda: False)
    newer = runs.load(folder).progress
    object.__setattr__(newer, "step", 41)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(newer)
    assert next(found).progress.step == 41
    assert list(newer_checkpoints(opened, lambda: True)) == []
