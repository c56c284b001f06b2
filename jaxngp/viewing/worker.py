"""The one thread that draws: what browser windows ask for, most urgent first, and longer tasks in between."""

from __future__ import annotations

import contextvars
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from jaxngp.console import warn
from jaxngp.pictures import Image8
from jaxngp.viewing.drawing import Look, Scene, colours, compile_piece, draw, piece_size
from jaxngp.viewing.pacing import Canvas, Pace
from jaxngp.viewing.poses import Viewpoint

Task = Generator[None, None, Any]
"""Yields wherever something more urgent may be done first."""


@dataclass(frozen=True, eq=False)
class Picture:
    """What was drawn for a window."""

    image: Image8
    full: bool  # as fine as it gets
    seconds: float  # to draw it
    legend: str  # what its colours mean
    version: int  # of the scene


class Worker:
    """Draws for any number of windows, for a `with` block. All of its methods may be called from any thread.

    shown: called in the worker's thread with a window's number and its new picture. prepare: called there first.
    """

    def __init__(
        self, shown: Callable[[int, Picture], None], *, limit: int, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self.pace = Pace(smallest=piece_size())
        self.limit = limit  # px along the longer side of a picture
        self._shown, self._prepare = shown, prepare
        self._scene: Scene | None = None
        self._look, self._asked = Look(), 0  # what is shown; how often something else was asked for
        self._compiled: set[str] = {Look().shading}
        self._canvases: dict[int, Canvas] = {}
        self._tasks: list[Task] = []
        self._refining: tuple[Canvas, int, Task] | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self.prepared = threading.Event()
        context = contextvars.copy_context()  # in which `device.formulation` may have been chosen
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="viewer", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    # What the windows ask for.

    def move(self, window: int, viewpoint: Viewpoint) -> None:
        """A window looks from elsewhere, or is new."""
        with self._changed:
            self._canvases.setdefault(window, Canvas()).change(time.monotonic(), viewpoint)
            self._changed.notify()

    def leave(self, window: int) -> None:
        """A window was closed."""
        with self._changed:
            if canvas := self._canvases.pop(window, None):
                canvas.revision += 1  # ends the picture that is being refined

    def set_look(self, look: Look, limit: int) -> None:
        """All windows show something else, at up to `limit` pixels along the longer side.

        What it takes is compiled here, in the thread that asks, while the worker goes on with what it drew before.
        """
        with self._changed:
            self._asked += 1
            asked, scene = self._asked, self._scene
        if scene is not None:
            compile_piece(scene, look.shading)
        with self._changed:
            if asked != self._asked:  # something else was asked for meanwhile
                return
            self._compiled.add(look.shading)
            self._look, self.limit = look, limit
            for canvas in self._canvases.values():
                canvas.change(time.monotonic())
            self._changed.notify()

    def has_compiled(self, look: Look) -> bool:
        """Whether a look can be drawn at once."""
        return look.shading in self._compiled

    def submit(self, task: Task) -> None:
        """Run a task to its end, piece by piece, whenever no window waits."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    # What there is to see.

    @property
    def watched(self) -> bool:
        """Whether any window is open."""
        return bool(self._canvases)

    @property
    def scene(self) -> Scene | None:
        return self._scene

    @property
    def look(self) -> Look:
        return self._look

    def set_scene(self, scene: Scene) -> None:
        """A newer scene is there."""
        with self._changed:
            self._scene = scene
            self._changed.notify()

    def viewpoint(self, window: int) -> Viewpoint | None:
        """Where a window looks from."""
        canvas = self._canvases.get(window)
        return canvas.viewpoint if canvas else None

    # The thread.

    def _run(self) -> None:
        try:
            self._prepare()
        finally:
            self.prepared.set()
        while True:
            with self._changed:
                if not self._stopped and not self._ready():
                    self._changed.wait(0.05)
                if self._stopped:
                    return
            try:
                self._step()
            except Exception:  # a picture less, but the viewer goes on
                warn(f"the viewer could not draw: {traceback.format_exc(limit=-3)}")
                self._refining = None
                time.sleep(1.0)

    def _ready(self) -> bool:
        return self._scene is not None and bool(self._tasks or self._refining or self._urgent())

    def _urgent(self) -> list[tuple[int, Canvas]]:
        return [(number, canvas) for number, canvas in self._canvases.items() if canvas.urgent()]

    def _step(self) -> None:
        """One piece of what is most urgent."""
        if self._scene is None:
            return
        with self._changed:
            urgent = sorted(self._urgent(), key=lambda item: item[1].changed)
        if urgent:
            finish(self._picture(*urgent[0]))
        elif self._tasks:
            advance(self._tasks)
        elif not self._refine():
            self._start_refining()

    def _refine(self) -> bool:
        """Draw one piece of the picture that is being refined, unless its window moved; whether there is one."""
        if self._refining is None:
            return False
        canvas, revision, task = self._refining
        if canvas.revision != revision or next(task, _ENDED) is _ENDED:
            self._refining = None
        return True

    def _start_refining(self) -> None:
        with self._changed:
            windows = list(self._canvases.items())
        for window, canvas in windows:
            if self._pixels(canvas):
                self._refining = (canvas, canvas.revision, self._picture(window, canvas))
                return

    def _pixels(self, canvas: Canvas) -> int:
        assert self._scene is not None
        whole_pieces = max(1, int(self.pace.pixels) // piece_size()) * piece_size()
        return canvas.wanted(time.monotonic(), moving=whole_pieces, version=self._scene.version, limit=self.limit)

    def _picture(self, window: int, canvas: Canvas) -> Task:
        scene, look, revision, first = self._scene, self._look, canvas.revision, not canvas.drawn
        pixels, viewpoint = self._pixels(canvas), canvas.viewpoint
        assert scene is not None
        assert viewpoint is not None
        size, started = viewpoint.size(pixels), time.monotonic()
        out = yield from draw(scene, viewpoint.camera(*size), look)
        seconds = time.monotonic() - started
        image, legend = colours(out, look)
        if first:
            self.pace.took(seconds)
        with self._changed:
            if canvas.revision == revision:
                canvas.show(time.monotonic(), pixels=pixels, seconds=seconds, version=scene.version)
                full = not canvas.wanted(float("inf"), moving=1, version=scene.version, limit=self.limit)
            else:
                full = False
        self._shown(window, Picture(image, full, seconds, legend, scene.version))


_ENDED = object()


def advance(tasks: list[Task]) -> None:
    """One piece of the first of some tasks, which is removed where it ends or fails."""
    try:
        next(tasks[0])
    except StopIteration:
        tasks.pop(0)
    except Exception:
        tasks.pop(0)
        raise


def finish(task: Task) -> Any:
    """All of a task at once; what it returns."""
    while True:
        try:
            next(task)
        except StopIteration as end:
            return end.value
