"""A trace of jax.profiler as a table: which kernels ran, for how long, and what of the program they belong to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData


@dataclass(frozen=True)
class Event:
    """One kernel, or on a CPU one operation, as it ran; `lane` is the stream or thread on which it did."""

    name: str
    op: str  # the HLO instruction, where the trace tells
    lane: str
    start_ns: float
    duration_ns: float


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel. `us` is without the kernels that ran inside it, as the body of a loop does on a CPU."""

    name: str
    op: str
    source: str  # what in the program it was compiled from
    us: float  # a step
    count: float  # a step


@dataclass(frozen=True)
class Occupation:
    """How a step's time on the device is spent, in us: some lane is busy, or none is."""

    busy_us: float
    idle_us: float


def read_trace(folder: Path) -> tuple[Path, list[Event]]:
    """The newest trace below a folder and its events."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}: the profiler left no .xplane.pb")
    return files[-1], events_of(ProfileData.from_file(str(files[-1])).planes)


def events_of(planes: Iterable[Any]) -> list[Event]:
    """What ran on the device: on a GPU all of its streams, else whatever the host's threads ran of an HLO program."""
    planes = list(planes)
    device = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    events = []
    for plane in device or planes:
        for line in plane.lines:
            if device and not line.name.startswith("Stream"):
                continue  # summaries of the streams' events, if anything
            for event in line.events:
                op = _hlo_op(event)
                if device or op:
                    lane = f"{plane.name} {line.name}"
                    events.append(Event(event.name, op, lane, event.start_ns, event.duration_ns))
    return events


def _hlo_op(event: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the type of `stats`, as Python 3.12 sees it
        return str(next((value for name, value in event.stats if name == "hlo_op"), ""))


def kernel_table(events: Iterable[Event], *, num_steps: int, sources: dict[str, str]) -> list[Kernel]:
    """Runs and their time a step of each kernel, the longest first. sources: as `hlo_sources` gives them."""
    total: dict[tuple[str, str], list[float]] = {}
    for event, own_ns in _own_times(events):
        sums = total.setdefault((event.name, event.op), [0.0, 0.0])
        sums[0] += own_ns / 1e3 / num_steps
        sums[1] += 1 / num_steps
    kernels = [
        Kernel(name, op, sources.get(_plain(op)) or sources.get(_plain(name), ""), us, count)
        for (name, op), (us, count) in total.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def _own_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event and its duration less that of the events of its lane that lie inside it."""
    own: list[tuple[Event, float]] = []
    open_events: list[int] = []  # their places in `own`, the innermost last
    for event in sorted(events, key=lambda e: (e.lane, e.start_ns, -e.duration_ns)):
        while open_events and not _inside(event, own[open_events[-1]][0]):
            open_events.pop()
        if open_events:
            outer, ns = own[open_events[-1]]
            own[open_events[-1]] = outer, ns - event.duration_ns
        open_events.append(len(own))
        own.append((event, event.duration_ns))
    return own


def _inside(event: Event, outer: Event) -> bool:
    end, outer_end = event.start_ns + event.duration_ns, outer.start_ns + outer.duration_ns
    return event.lane == outer.lane and end <= outer_end and event.start_ns < outer_end


def occupation(events: Sequence[Event], *, num_steps: int) -> Occupation:
    """Busy and idle time a step, from the start of the first event to the end of the last."""
    if not events:
        return Occupation(0.0, 0.0)
    ordered = sorted(events, key=lambda event: event.start_ns)
    first = reached = ordered[0].start_ns
    busy = 0.0
    for event in ordered:
        end = event.start_ns + event.duration_ns
        busy += max(end - max(event.start_ns, reached), 0)
        reached = max(reached, end)
    return Occupation(busy / 1e3 / num_steps, (reached - first - busy) / 1e3 / num_steps)


def hlo_sources(hlo_text: str) -> dict[str, str]:
    """From the name of an instruction of a compiled program to what it comes from, as jax named it: a path of calls."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
    return {_plain(name): source for name, source in pattern.findall(hlo_text)}


def _plain(name: str) -> str:
    """A kernel is named for its instruction, but with underscores."""
    return re.sub(r"[.-]", "_", name)


def short_source(source: str, parts: int = 3) -> str:
    """The last parts of a path of calls, without those that say nothing."""
    dull = re.compile(r"^(jit\(.*\)|while|body|cond|closed_call|branch_\d+_fun)$")
    return "/".join([part for part in source.split("/") if not dull.match(part)][-parts:])
