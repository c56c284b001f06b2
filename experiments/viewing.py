"""How soon the viewer shows a picture after a move, how many a second it shows, and what that costs the training.

    python -m experiments.viewing                       # trains bricks with the preset small, a minute in all
    python -m experiments.viewing --seconds=20

A window of 960 x 540 is moved without a browser: what encoding a picture and showing it take is not in here. CPU times
and counts hold on a machine that others use too; latencies and rates need idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from jaxngp.cameras import PosedImages, orbit_poses
from jaxngp.data import load_training
from jaxngp.presets import PRESETS
from jaxngp.training.loop import Progress, train
from jaxngp.viewing.drawing import compile_ahead, copy_scene
from jaxngp.viewing.poses import Viewpoint
from jaxngp.viewing.worker import Picture, Worker

MOVES = 1 / 30  # seconds between those of a window that is dragged
PAUSE = 0.5  # after a single move, in which its picture is refined


class Window:
    """Counts the pictures that it is shown, and can wait for the next."""

    def __init__(self, viewpoints: list[Viewpoint]) -> None:
        self.pictures, self.shown = 0, threading.Event()
        self._next = itertools.cycle(viewpoints)

    def move(self, worker: Worker) -> None:
        self.shown.clear()
        worker.move(0, next(self._next))

    def show(self, _: int, __: Picture) -> None:
        self.pictures += 1
        self.shown.set()


def drag(worker: Worker, window: Window, seconds: float) -> str:
    before, end = window.pictures, time.monotonic() + seconds
    while time.monotonic() < end:
        window.move(worker)
        time.sleep(MOVES)
    rate = (window.pictures - before) / seconds
    return f"{rate:.1f} pictures a second of {worker.pace.pixels:.0f} pixels"


def single_moves(worker: Worker, window: Window, seconds: float) -> str:
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        window.move(worker)
        window.shown.wait(10)
        found.append(1e3 * (time.monotonic() - started))
        time.sleep(PAUSE)
    return f"first picture after {np.median(found):.0f} ms (median), {np.quantile(found, 0.9):.0f} ms (90 %)"


def training_beside(steps: Iterator[Progress], worker: Worker, task: Callable[[], str]) -> str:
    """Train while a task runs in another thread; what it says, and what a step took meanwhile."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(task()))
    first, started, cpu, copied = None, time.monotonic(), time.process_time(), 0.0
    thread.start()
    for progress in steps:
        first = progress.step if first is None else first
        if time.monotonic() > copied + 1:
            worker.set_scene(copy_scene(progress))
            copied = time.monotonic()
        if not thread.is_alive():
            break
    count = max(progress.step - (first or 0), 1)
    wall, cpu = time.monotonic() - started, time.process_time() - cpu
    thread.join()
    return f"{said[0]}; {1e3 * wall / count:.0f} ms a step, {1e3 * cpu / count:.0f} ms of CPU"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    seconds = options.parse_args().seconds
    config = PRESETS["small"]
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=10**6, max_seconds=0.0))
    images = load_training(config.scene).images
    assert isinstance(images, PosedImages)
    poses = orbit_poses(np.asarray(images.cameras.c2w), 240)
    window = Window([Viewpoint(pose, 0.7, 960, 540) for pose in poses])
    compile_ahead(config)
    steps = train(config, images)
    with Worker(window.show, limit=768) as worker:
        worker.set_scene(copy_scene(next(steps)))

        def nothing() -> str:
            time.sleep(seconds)
            return "nobody moves"

        print("training:", training_beside(steps, worker, nothing))
        print("dragged: ", training_beside(steps, worker, lambda: drag(worker, window, seconds)))
        print("moved:   ", training_beside(steps, worker, lambda: single_moves(worker, window, seconds)))
        print("still:   ", training_beside(steps, worker, nothing))
        print("alone, dragged:", drag(worker, window, seconds))
        print("alone, moved:  ", single_moves(worker, window, seconds))


if __name__ == "__main__":
    main()
