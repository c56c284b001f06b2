"""What a training loop, or a command that waits for checkpoints, holds of the viewer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from jaxngp.config import InputError
from jaxngp.device import on_cpu
from jaxngp.training.loop import Progress
from jaxngp.viewing.drawing import compile_ahead, copy_scene
from jaxngp.viewing.panel import Panel, address, announcement, start_server
from jaxngp.viewing.source import Controls, Source
from jaxngp.viewing.truth import Views
from jaxngp.viewing.worker import Worker

COPY_SECONDS = 1.0
COPY_SHARE = 0.02
"""A scene in training is copied no more often than once in so long, and not for a larger share of the time."""


class Viewer:
    """A browser's view of a run, for a `with` block: hand it each `Progress`."""

    def __init__(self, source: Source, worker: Worker, controls: Controls, panel: Panel, url: str) -> None:
        self.url = url  # to open in a browser
        self._source, self._worker, self._controls, self._panel = source, worker, controls, panel
        self._copied, self._cost = 0.0, 0.0

    def show(self, progress: Progress) -> None:
        """Show where training stands. Returns at once, unless the browser has paused the training."""
        self._panel.report(progress)
        new = progress.metrics is None or progress.finished
        if new:
            self._worker.prepared.wait()  # nothing is compiled once training has begun
        wait = max(COPY_SECONDS, self._cost / COPY_SHARE)
        if new or (self._worker.watched and time.monotonic() >= self._copied + wait):
            self._copy(progress)
        while self._serve(progress):
            time.sleep(0.05)

    def stay(self, progress: Progress) -> None:
        """Show the end of a training until the process is asked to end."""
        self._copy(progress)
        self._panel.report(progress, ended=True)
        print(f"the viewer stays open, at {self.url}; Ctrl-C ends it", flush=True)
        while not self._source.stop():
            time.sleep(0.1)

    def _serve(self, progress: Progress) -> bool:
        """Save where the browser asks for it; whether it has paused the training."""
        if self._controls.save.is_set():
            self._controls.save.clear()
            self._save(progress)
        if not self._controls.paused.is_set() or self._source.stop():
            return False
        if self._worker.scene is None or self._worker.scene.version != progress.step:
            self._copy(progress)
            self._panel.report(progress)
        return True

    def _save(self, progress: Progress) -> None:
        assert self._source.save is not None
        try:
            self._source.save(progress)
            self._panel.notify("Saved", f"checkpoint of step {progress.step} in {self._source.workdir}")
        except InputError as error:
            self._panel.notify("Not saved", str(error))

    def _copy(self, progress: Progress) -> None:
        started = time.monotonic()
        self._worker.set_scene(copy_scene(progress))
        self._copied = time.monotonic()
        self._cost = self._copied - started


class NoViewer:
    """In place of a `Viewer`, where nobody looks."""

    def show(self, progress: Progress) -> None:
        """Do nothing."""

    def stay(self, progress: Progress) -> None:
        """Do nothing."""


@contextlib.contextmanager
def open_viewer(source: Source, *, host: str, port: int) -> Iterator[Viewer]:
    """Serve the viewer on a host and a port, or the next free one, which is said. Raises InputError without viser."""
    server = start_server(host, port)
    print(announcement(host, port, server.get_port()), flush=True)
    views = Views(source.cameras, source.read)
    worker = Worker(
        lambda window, picture: panel.shown(window, picture),
        limit=768 if on_cpu() else 1536,
        prepare=lambda: compile_ahead(source.config),
    )
    controls = Controls()
    panel = Panel(server, worker, views, source, controls)
    try:
        with worker:
            yield Viewer(source, worker, controls, panel, address(host, server.get_port()))
    finally:
        server.stop()
