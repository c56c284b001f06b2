"""What a run writes besides pictures: text, JSON and logs; what machine it ran on; tables.

Files other than logs appear whole or not at all: they are written beside their place and then moved into it. Folders
are made where they are missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxngp


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends, and vanishes if it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON; arrays become lists, paths text, and numbers that JSON lacks become null."""
    write_text(path, json.dumps(_to_plain(value), indent=2, allow_nan=False) + "\n")


def append_jsonl(path: str | os.PathLike[str], value: Any) -> None:
    """Appends `value` as one line of JSON, in one write; a line that a crash cut short is ended first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_to_plain(value), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def keep_lines(path: str | os.PathLike[str], wanted: Callable[[Any], bool]) -> None:
    """Rewrites a file of JSON lines with those that are `wanted`; a line that a crash cut short is not."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if wanted(json.loads(line)):
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The entries of a metrics.jsonl, null as NaN; no line that is not whole, and none where there is no file."""
    if not Path(path).is_file():
        return []
    entries = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            entry = json.loads(line)
            entries.append({key: math.nan if value is None else float(value) for key, value in entry.items()})
    return [entry for entry in entries if {"step", "seconds"} <= entry.keys()]


def _to_plain(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a number or an array, of numpy or jax
        return _to_plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes() -> int:
    """The most memory this process has had resident; of the host, not of an accelerator."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere


def device_name() -> str:
    """The device that jax computes on, in words; of a CPU also the number of cores this process may use."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu, {cores} cores"
    return device.device_kind


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "device": device_name(),
        "jax_version": jax.__version__,
        "version": jaxngp.__version__,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": stats.get("peak_bytes_in_use", 0),
    }


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as aligned text under a header of all their keys; numbers to the right, floats to four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(name, 0), int | float | np.number) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
