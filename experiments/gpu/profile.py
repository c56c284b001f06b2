"""A trace of jax.profiler as times by kernel."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

Run = tuple[str, float]
"""One run of a kernel: name, microseconds."""


def read_trace(folder: Path) -> list[Run]:
    """What the newest trace below a folder shows. Raises FileNotFoundError where there is none."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}: the profiler left no .xplane.pb")
    return runs_of(ProfileData.from_file(str(files[-1])).planes)


def runs_of(planes: Iterable[Any]) -> list[Run]:
    """What ran on the device: the kernels of a GPU's streams, else the operations of HLO programs on the host.

    On the host the time of a loop includes that of its body.
    """
    planes = list(planes)
    device = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    lines = (line for plane in device or planes for line in plane.lines)
    events = (event for line in lines if not device or line.name.startswith("Stream") for event in line.events)
    return [(event.name, 1e-3 * event.duration_ns) for event in events if device or _is_hlo(event)]


def _is_hlo(event: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the type of `stats`, under Python 3.12
        return any(name == "hlo_op" for name, _ in event.stats)


def by_kernel(runs: Iterable[Run]) -> dict[str, tuple[float, int]]:
    """Microseconds and number of runs by name, the longest first."""
    total: dict[str, tuple[float, int]] = {}
    for name, us in runs:
        before = total.get(name, (0.0, 0))
        total[name] = (before[0] + us, before[1] + 1)
    return dict(sorted(total.items(), key=lambda item: -item[1][0]))
