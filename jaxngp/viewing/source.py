"""What a viewer is given: the run to look at, and how to steer its training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jaxngp.cameras import Cameras
from jaxngp.config import NerfConfig
from jaxngp.data import SceneTransform, Split
from jaxngp.records import read_log
from jaxngp.training.loop import Progress


@dataclass(frozen=True, eq=False)
class Source:
    """The run that is looked at."""

    config: NerfConfig
    workdir: Path
    cameras: Cameras | None  # of the training views, scene units; None where there are none
    transform: SceneTransform
    read: Callable[[], Split]  # the training views, for comparisons; raises InputError
    history: Callable[[], list[tuple[float, float, float]]]  # step, loss and PSNR of what the log holds
    save: Callable[[Progress], None] | None = None  # saves a checkpoint; None where the run is not trained here
    stop: Callable[[], bool] = lambda: False  # whether the process is asked to end

    @property
    def name(self) -> str:
        """Of the scene, for the names of files."""
        return Path(self.config.scene.name).stem


@dataclass(frozen=True)
class Controls:
    """What the browser asks of the loop that trains."""

    paused: threading.Event = field(default_factory=threading.Event)
    save: threading.Event = field(default_factory=threading.Event)


def history_of(workdir: Path) -> list[tuple[float, float, float]]:
    """Step, loss and PSNR of every entry of a run's log."""
    log = read_log(workdir / "metrics.jsonl")
    return [(e["step"], e["loss"], e["psnr"]) for e in log if {"loss", "psnr"} <= e.keys()]
