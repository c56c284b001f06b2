"""What depends on the device: fusion barriers, which formulation of a stage, compiler options, placement, programs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxngp.config import Precision

T = TypeVar("T")

# Which formulation of a stage runs.

Formulation = Literal["auto", "cpu", "gpu"]
_formulation: contextvars.ContextVar[Formulation] = contextvars.ContextVar("formulation", default="auto")


@contextlib.contextmanager
def formulation(choice: Formulation) -> Iterator[None]:
    """Trace with one formulation of every stage, whatever the device: both compute the same, and a CPU runs either.

    It applies where a function is traced, so a function that is jitted already keeps the formulation it has.

    >>> with formulation("gpu"):
    ...     by_device(cpu=lambda: "unrolled", gpu=lambda: "broadcast")
    'broadcast'
    """
    token = _formulation.set(choice)
    try:
        yield
    finally:
        _formulation.reset(token)


def by_device(*args: Any, cpu: Callable[..., T], gpu: Callable[..., T]) -> T:
    """cpu(*args) in a program for a CPU and gpu(*args) in one for an accelerator, unless `formulation` says which."""
    choice = _formulation.get()
    if choice == "auto":
        return lax.platform_dependent(*args, cpu=cpu, default=gpu)
    return cpu(*args) if choice == "cpu" else gpu(*args)


# Fusion barriers.


def fusion_barrier(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), kept out of the fusions of whatever consumes it; its first array holds numbers.

    XLA:CPU fuses producers into gathers and scatters and then computes them again for every element that is read:
    sample positions, for one, once per level and corner. An optimization barrier does not stop it; a conditional on
    a run-time predicate does. On accelerators, where a conditional would wait for the host and fusing is right, this
    is a plain call. Under `jax.vmap` there is one barrier around the whole batch.
    """
    first = jax.tree.leaves(args)[0]
    if first.size == 0:
        return function(*args)
    function = jax.jit(function, inline=True)  # so that the two branches and eval_shape trace it once

    def conditional(*args: Any) -> Any:
        shapes = jax.eval_shape(function, *args)
        unreachable = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
        return lax.cond(_is_reachable(lax.stop_gradient(first)), function, unreachable, *args)

    return by_device(*args, cpu=conditional, gpu=function)


@jax.custom_batching.custom_vmap
def _is_reachable(array: jax.Array) -> jax.Array:
    """() bool, True but not known to be so before the program runs.

    It compares the first number of an array with one NaN among 2^24, of a payload that no arithmetic yields. Of a batch
    the first array is asked: a predicate of its own for each would turn the conditional into a select, which computes
    both branches and is no barrier.
    """
    bits = lax.bitcast_convert_type(array.ravel()[0].astype(jnp.float32), jnp.uint32)
    return bits != np.uint32(0xFFF5A5A5)


@_is_reachable.def_vmap
def _(axis_size: int, in_batched: list[bool], array: jax.Array) -> tuple[jax.Array, bool]:  # noqa: ARG001
    return _is_reachable(array), False


@jax.custom_batching.custom_vmap
def largest(count: jax.Array) -> jax.Array:
    """() -> (), the count itself; under `jax.vmap` the largest of the batch, the same for all of it.

    The number of rounds of a loop: rounds that differ within a batch would have every round select its whole carry.
    """
    return count


@largest.def_vmap
def _(axis_size: int, in_batched: list[bool], count: jax.Array) -> tuple[jax.Array, bool]:  # noqa: ARG001
    return largest(jnp.max(count)), False


# Where arrays live.


@dataclass(frozen=True)
class Placement:
    """Where the arrays of a run live; `put` moves them there. Equal placements are one for jax's caches."""

    sharding: jax.sharding.Sharding

    def put(self, tree: T) -> T:
        """The arrays of a tree, bound to their place: jax compiles anew for arrays that are not."""
        return jax.device_put(tree, self.sharding)

    def shapes(self, tree: T) -> T:
        """The shapes and dtypes of a tree of arrays or shapes, asked for at this place."""
        place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.sharding)  # noqa: E731
        return jax.tree.map(place, tree)


def default_placement() -> Placement:
    """The first device that jax has."""
    return Placement(jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def device_memory() -> int:
    """Bytes that the first device has for arrays, or 0 where it does not tell, as a CPU does not."""
    return int((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))


# Batch sizes.


@dataclass(frozen=True)
class Batching:
    """How much is rendered at once: rays in one call of the program, lanes, and samples of a lane in a round.

    tracing_lanes: rays that sphere tracing evaluates at once.
    """

    rays: int
    lanes: int
    tracing_lanes: int
    samples: int = 8


CPU_BATCHING = Batching(rays=2**18, lanes=2**13, tracing_lanes=2**14)
"""A round's activations stay in a CPU's cache."""

GPU_BATCHING = Batching(rays=2**21, lanes=2**16, tracing_lanes=2**18)
"""A frame of 1920x1080 in one call, so that lanes run empty once; rounds large enough to be worth their launches."""


def on_cpu() -> bool:
    """Whether jax computes on a CPU."""
    return jax.default_backend() == "cpu"


def default_batching() -> Batching:
    """What suits the device that jax runs on."""
    return CPU_BATCHING if on_cpu() else GPU_BATCHING


# Compiled programs.


def compiled(function: Any, *args: Any, options: dict[str, Any] | None = None, **static: Any) -> Callable[..., Any]:
    """The program of a jitted function for arguments of these shapes; an equal request gets the same program.

    args: arrays or shapes. static: its static arguments. What is asked for once is compiled once in a process, however
    many runs ask for it.
    """
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    key = (tuple((options or {}).items()), tuple(static.items()), _formulation.get())
    return _compiled(function, structure, shapes, *key)


@functools.lru_cache(maxsize=64)
def _compiled(
    function: Any, structure: Any, shapes: tuple, options: tuple, static: tuple, _: Formulation
) -> Callable[..., Any]:
    args = default_placement().shapes(jax.tree.unflatten(structure, shapes))
    return function.lower(*args, **dict(static)).compile(dict(options))


# Compiler options for GPUs.

FAST_SCATTER_JAXLIB = (0, 11, 1)
"""The first jaxlib that adds to scattered places with a GPU's atomic additions. Those before, back to 0.10.2 at least,
compare and swap until no other thread was faster (jax issue 38806)."""

OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""No matmuls by Triton: ours are narrow and wait for memory, cuBLAS applies the ReLU as it writes, and trying out
Triton's tiles would take longer than much of the training."""


@dataclass(frozen=True)
class Target:
    """What decides on the options of the compiler; `target()` is what jax compiles for here."""

    on_gpu: bool
    jaxlib: tuple[int, ...]  # the release numbers, as (0, 11, 1)
    capability: tuple[int, int]  # compute capability, as (9, 0); (0, 0) where it is unknown, or not NVIDIA's
    xla_flags: str = ""  # the environment's XLA_FLAGS, what they say is not said again


def target() -> Target:
    """The device that jax runs on, jaxlib's version, and XLA_FLAGS."""
    capability = parse_capability(getattr(jax.devices()[0], "compute_capability", None))
    return Target(jax.default_backend() == "gpu", jaxlib_version(), capability, os.environ.get("XLA_FLAGS", ""))


def compiler_options(at: Target | None = None) -> dict[str, Any]:
    """What to give `jax.jit` or `.compile` for a target, by default `target()`."""
    at = at or target()
    return _unless_said(OPTIONS, at) if at.on_gpu else {}


def step_compiler_options(
    precision: Precision, *, deterministic: bool = False, at: Target | None = None
) -> dict[str, Any]:
    """`compiler_options` for a program that takes training steps, and so adds to scattered places.

    deterministic: sort what is added to one place instead, so that its order, and so the result, is always the same.
    """
    at = at or target()
    extra = {"xla_gpu_deterministic_ops": True} if deterministic else {}
    return _unless_said(OPTIONS | scatter_workaround(precision, at) | extra, at) if at.on_gpu else {}


def scatter_workaround(precision: Precision, at: Target) -> dict[str, Any]:
    """The option with which an old jaxlib adds by atomic additions too; {} for a newer one, and where it is not safe.

    That is to flush numbers below 1e-38 to zero. From compute capability 9.0 on such a jaxlib then writes comparisons
    of bfloat16 that the assembler refuses; there it adds rows of 4 features fast without being told.
    """
    if at.jaxlib >= FAST_SCATTER_JAXLIB or (precision == "bfloat16" and at.capability >= (9, 0)):
        return {}
    return {"xla_gpu_ftz": True}


def slow_scatter_warning(precision: Precision, at: Target | None = None) -> str | None:
    """A warning about an old jaxlib on a GPU; None elsewhere, with a newer one, and where XLA_FLAGS has the option."""
    at = at or target()
    said = re.search(r"--xla_gpu_ftz(?:=(\w+))?(?!\S)", at.xla_flags)
    avoided = bool(said) and (said[1] or "true").lower() in ("true", "1")  # type: ignore[index]
    if not at.on_gpu or at.jaxlib >= FAST_SCATTER_JAXLIB or avoided:
        return None
    problem = (
        f"jaxlib {'.'.join(map(str, at.jaxlib))} may add to scattered places by compare-and-swap on a GPU, "
        "up to a thousand times slower; jaxlib 0.11.1 (Python 3.12) and newer do not. "
    )
    if said:
        return problem + "XLA_FLAGS=--xla_gpu_ftz=true would avoid it, and says otherwise"
    if scatter_workaround(precision, at):
        return problem + (
            "Training here is compiled with xla_gpu_ftz, which avoids it; for programs of your own set "
            "XLA_FLAGS=--xla_gpu_ftz=true"
        )
    return problem + "If training is slow, try --override=field.precision=float32, which has a workaround"


def parse_capability(text: Any) -> tuple[int, int]:
    """(9, 0) of "9.0"; (0, 0) of what is not NVIDIA's, or nothing."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(text))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def jaxlib_version() -> tuple[int, ...]:
    """The release numbers of the jaxlib that is installed, as (0, 11, 1)."""
    return parse_version(importlib.metadata.version("jaxlib"))


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 11, 1) of 0.11.1.dev2."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split("."))  # type: ignore[index]


def _unless_said(options: dict[str, Any], at: Target) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in at.xla_flags}
