"""Several processes that train one run together: how they find each other, agree, and notice that one has ended.

Each runs the same program in the same order. What a process decides by itself (a signal came, a minute has passed)
all have to know before they act on it, or they would wait for each other for ever. In a single process every function
here returns what it is given.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, NoReturn

import jax
import numpy as np

from jaxngp.config import InputError

HEARTBEAT_SECONDS = 20
"""After so long without a sign of life a process counts as dead, and the others end."""

_ENDED = re.compile(r"gloo|nccl|connection closed|connection reset|coordination service|heartbeat|barrier", re.I)


def start(address: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes of the run; before jax computes anything.

    What is None is as jax detects it: from Slurm, Open MPI or Kubernetes. address: host:port of process 0.
    """
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"the processes of the run do not come together ({error}): give each of them the same "
            "--coordinator_address=host:port and --num_processes, and a --process_id of its own, from 0 on"
        ) from None


def count() -> int:
    """How many processes train together."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process among them."""
    return jax.process_index() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is process 0, which alone writes logs and pictures."""
    return index() == 0


def wait_for_all(place: str) -> None:
    """Return when all processes have come to this place of the program."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(place)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is set in any process."""
    return tuple(bool(max(row)) for row in np.transpose(_gathered(np.array(flags)))) if count() > 1 else flags


def of_first(number: float) -> float:
    """The number of process 0, in all: by the clock of one, learning rates are the same for all."""
    return float(_gathered(np.float32(number))[0]) if count() > 1 else number


def gather(array: np.ndarray) -> list[np.ndarray]:
    """The arrays (n, ...) of all processes, which may differ in n, in the order of the processes."""
    if count() == 1:
        return [array]
    sizes = _gathered(np.int32(len(array)))
    filled = np.zeros((sizes.max(), *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    return [part[:size] for part, size in zip(_gathered(filled), sizes, strict=True)]


def _gathered(array: Any) -> np.ndarray:
    """Arrays of one shape, (processes, ...)."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array)).reshape(count(), *np.shape(array))


def ended_elsewhere(error: BaseException) -> str | None:
    """What to tell the user if an error is that another process has ended; None if it is something else."""
    if count() == 1 or isinstance(error, InputError) or not _ENDED.search(str(error)):
        return None
    reason = str(error).partition("\n")[0][:200]
    return (
        f"process {index()} stops, as another process of the run has ended or is out of reach ({reason}); "
        "see what that one says. The same commands go on from the last checkpoint"
    )


def leave(code: int) -> NoReturn:
    """Exit at once: jax would first wait for processes that wait for this one."""
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
