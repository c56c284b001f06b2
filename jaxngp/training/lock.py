"""One training in a workdir at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxngp.config import InputError


@contextlib.contextmanager
def sole_training(workdir: Path) -> Iterator[None]:
    """Within the block no other process gets into one of its own. Raises InputError where another is in it already.

    By a lock on the file `.lock`, which the system gives back however the process ends. Where the system or the file
    system has no such locks, nothing is refused.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            file.seek(0)
            raise InputError(
                f"{workdir}: another training is running in it (process {file.read().strip() or 'unknown'}); wait for "
                "it, end it, or give another --workdir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(descriptor: int) -> bool:
    """Whether the lock was to be had; it ends with the file."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
