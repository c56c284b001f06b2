"""What the compiler of a GPU is to be told, beyond its defaults."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

import jax

FAST_SCATTER_JAXLIB = (0, 11, 1)
"""The first jaxlib that adds to scattered places with a GPU's atomic additions. Those before, back to 0.10.2 at least,
compare and swap until no other thread was faster (jax issue 38806)."""


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit` or `.compile` that suit the device jax runs on; {} where there is nothing to say."""
    if jax.default_backend() != "gpu":
        return {}
    return gpu_compiler_options(jaxlib_version(), os.environ.get("XLA_FLAGS", ""))


def gpu_compiler_options(jaxlib: tuple[int, ...], xla_flags: str = "") -> dict[str, Any]:
    """The options for a GPU, less those that XLA_FLAGS sets already.

    No matmuls by Triton: ours are narrow and wait for memory, cuBLAS applies the ReLU as it writes, and trying out
    Triton's tiles would take longer than much of the training. Before jaxlib 0.11.1 numbers below 1e-38 are flushed
    to zero, for then XLA adds with atomic additions there too.
    """
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
    if jaxlib < FAST_SCATTER_JAXLIB:
        options["xla_gpu_ftz"] = True
    return {name: value for name, value in options.items() if name not in xla_flags}


def slow_scatter_warning() -> str | None:
    """What to say about an old jaxlib on a GPU; None on another device, with a newer one, and where it is cured."""
    cured = "xla_gpu_ftz=true" in os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "gpu" or jaxlib_version() >= FAST_SCATTER_JAXLIB or cured:
        return None
    return (
        f"jaxlib {importlib.metadata.version('jaxlib')} adds to scattered places by compare-and-swap on a GPU, up to a "
        "thousand times slower. Training and rendering here are compiled with xla_gpu_ftz, which avoids it; for "
        "programs of your own set XLA_FLAGS=--xla_gpu_ftz=true, or install jaxlib 0.11.1 or newer (Python 3.12)"
    )


def jaxlib_version() -> tuple[int, ...]:
    """The release numbers of the jaxlib that is installed, as (0, 11, 1)."""
    return parse_version(importlib.metadata.version("jaxlib"))


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 11, 1) of 0.11.1.dev2."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split("."))  # type: ignore[index]
