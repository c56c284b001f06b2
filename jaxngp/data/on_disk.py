"""Arrays that lie in a file without a name, for images that are larger than memory.

What was read of them stays in memory while nobody else wants that, as of every file, and is then read again; the file
is gone when the process is, however it ends.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from jaxngp.config import InputError
from jaxngp.data.cache import cache_dir


def empty(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of any values, in a file in the cache directory. Raises InputError where it has no room."""
    folder, num_bytes = cache_dir(), math.prod(shape) * np.dtype(dtype).itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file.fileno(), num_bytes)
            array = np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise InputError(
            f"{folder}: has no room for {num_bytes / 1e9:.2f} GB of pixels ({error.strerror}); free some, or set "
            "JAXNGP_CACHE to another folder"
        ) from None
    mapping: object = array.base
    if hasattr(mmap, "MADV_RANDOM") and isinstance(mapping, mmap.mmap):
        mapping.madvise(mmap.MADV_RANDOM)  # pixels are drawn at random: what follows one is of no use
    return array


def reserve(descriptor: int, num_bytes: int) -> None:
    """Raises OSError where the disk has no room; found only when a page is written, that would kill the process."""
    if allocate := getattr(os, "posix_fallocate", None):
        allocate(descriptor, 0, num_bytes)
        return
    for start in range(0, num_bytes, 2**24):
        os.write(descriptor, bytes(min(2**24, num_bytes - start)))


def is_on_disk(array: object) -> bool:
    """Whether an array, or what it is a view of, is one of `empty`."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, mmap.mmap)


def memory_left() -> float:
    """Bytes of memory that are left, at most the limit of a container; infinite where nobody says."""
    left = math.inf
    for path, key in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key))
            left = min(left, int(line.removeprefix(key).split()[0]) * (1024 if key else 1))
        except (OSError, StopIteration, ValueError):  # no Linux, or no limit
            continue
    return left
