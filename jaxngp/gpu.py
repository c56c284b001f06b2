"""What the compiler of a GPU is to be told, beyond its defaults."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

import jax

from jaxngp.config import Precision

FAST_SCATTER_JAXLIB = (0, 11, 1)
"""The first jaxlib that adds to scattered places with a GPU's atomic additions. Those before, back to 0.10.2 at least,
compare and swap until no other thread was faster (jax issue 38806)."""

OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""No matmuls by Triton: ours are narrow and wait for memory, cuBLAS applies the ReLU as it writes, and trying out
Triton's tiles would take longer than much of the training."""


def compiler_options() -> dict[str, Any]:
    """What to give `jax.jit` or `.compile` for the device jax runs on, less what XLA_FLAGS says already."""
    return _unless_said(OPTIONS) if _on_gpu() else {}


def step_compiler_options(precision: Precision, *, deterministic: bool = False) -> dict[str, Any]:
    """`compiler_options` for a program that takes training steps, and so adds to scattered places.

    deterministic: sort what is added to one place instead, so that its order, and so the result, is always the same.
    """
    if not _on_gpu():
        return {}
    cure = scatter_cure(jaxlib_version(), compute_capability(), precision)
    return _unless_said(OPTIONS | cure | ({"xla_gpu_deterministic_ops": True} if deterministic else {}))


def scatter_cure(jaxlib: tuple[int, ...], capability: tuple[int, int], precision: Precision) -> dict[str, Any]:
    """The option with which an old jaxlib adds by atomic additions too; {} for a newer one, and where it is not safe.

    That is to flush numbers below 1e-38 to zero. From compute capability 9.0 on such a jaxlib then writes comparisons
    of bfloat16 that the assembler refuses; there it adds rows of 4 features fast without being told.
    """
    if jaxlib >= FAST_SCATTER_JAXLIB or (precision == "bfloat16" and capability >= (9, 0)):
        return {}
    return {"xla_gpu_ftz": True}


def slow_scatter_warning(precision: Precision) -> str | None:
    """What to say about an old jaxlib on a GPU; None on another device, with a newer one, and where it is cured."""
    said = re.search(r"--xla_gpu_ftz(?:=(\w+))?(?!\S)", os.environ.get("XLA_FLAGS", ""))
    cured = bool(said) and (said[1] or "true").lower() in ("true", "1")  # type: ignore[index]
    if not _on_gpu() or jaxlib_version() >= FAST_SCATTER_JAXLIB or cured:
        return None
    problem = (
        f"jaxlib {importlib.metadata.version('jaxlib')} may add to scattered places by compare-and-swap on a GPU, "
        "up to a thousand times slower; jaxlib 0.11.1 (Python 3.12) and newer do not. "
    )
    if said:
        return problem + "XLA_FLAGS=--xla_gpu_ftz=true would avoid it, and says otherwise"
    if scatter_cure(jaxlib_version(), compute_capability(), precision):
        return problem + (
            "Training here is compiled with xla_gpu_ftz, which avoids it; for programs of your own set "
            "XLA_FLAGS=--xla_gpu_ftz=true"
        )
    return problem + "If training is slow, try --override=field.precision=float32, for which there is a cure"


def compute_capability() -> tuple[int, int]:
    """Of the first GPU, as (9, 0); (0, 0) where it does not tell, or is not NVIDIA's."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def jaxlib_version() -> tuple[int, ...]:
    """The release numbers of the jaxlib that is installed, as (0, 11, 1)."""
    return parse_version(importlib.metadata.version("jaxlib"))


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 11, 1) of 0.11.1.dev2."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split("."))  # type: ignore[index]


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _unless_said(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}
