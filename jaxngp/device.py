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
from jax.sharding import NamedSharding, PartitionSpec

from jaxngp import processes
from jaxngp.config import InputError, Precision

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
        return lax.cond(unfolded_true(lax.stop_gradient(first)), function, unreachable, *args)

    return by_device(*args, cpu=conditional, gpu=function)


@jax.custom_batching.custom_vmap
def unfolded_true(array: jax.Array) -> jax.Array:
    """() bool, True but not known to be so before the program runs.

    It compares the first number of an array with one NaN among 2^24, of a payload that no arithmetic yields. Of a batch
    the first array is asked: a predicate of its own for each would turn the conditional into a select, which computes
    both branches and is no barrier.
    """
    bits = lax.bitcast_convert_type(array.ravel()[0].astype(jnp.float32), jnp.uint32)
    return bits != np.uint32(0xFFF5A5A5)


@unfolded_true.def_vmap
def _(axis_size: int, in_batched: list[bool], array: jax.Array) -> tuple[jax.Array, bool]:  # noqa: ARG001
    return unfolded_true(array), False


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
    """Where the arrays of a run live; `put` moves them there. Equal placements are one for jax's caches.

    On a mesh of several devices, which may be those of several processes, every one holds all of an array, but for
    those that `put_shares` gives them.
    """

    sharding: jax.sharding.Sharding

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that share the work of a program; None for a single one."""
        return self.sharding.mesh if isinstance(self.sharding, NamedSharding) else None  # type: ignore[return-value]

    @property
    def num_shares(self) -> int:
        return self.sharding.num_devices

    def put(self, tree: T) -> T:
        """The arrays of a tree, bound to their place: jax compiles anew for arrays that are not."""
        return jax.tree.map(lambda array: _put(array, self.sharding), tree)

    def put_shares(self, shares: list[T]) -> T:
        """Arrays (D, ...), of which each device of a mesh holds the part that is its own of D trees of numpy arrays.

        shares: those of the devices of this process.
        """
        assert self.mesh is not None
        split = NamedSharding(self.mesh, PartitionSpec(SHARES))
        return jax.tree.map(lambda *parts: _put(np.stack(parts), split), *shares)

    @property
    def local(self) -> Placement:
        """The devices of this process alone, for what it does without the others."""
        if self.mesh is None:
            return self
        devices = self.mesh.local_devices
        if len(devices) == 1:
            return Placement(jax.sharding.SingleDeviceSharding(devices[0]))
        return Placement(NamedSharding(jax.sharding.Mesh(np.array(devices), (PARTS,)), PartitionSpec()))

    def shape(self, array: Any) -> jax.ShapeDtypeStruct:
        """The shape and dtype of an array or shape, asked for at this place; a share stays one."""
        given = getattr(array, "sharding", None)
        shared = isinstance(given, NamedSharding) and SHARES in given.spec
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=given if shared else self.sharding)

    def shapes(self, tree: T) -> T:
        """`shape` of all arrays of a tree."""
        return jax.tree.map(self.shape, tree)


def _put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    if isinstance(array, jax.Array) and not array.is_fully_addressable:  # all of it is on every device
        array = array.addressable_data(0)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


def default_placement() -> Placement:
    """That of `placed_on`, or else the first device that jax has."""
    return _placement.get() or Placement(jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


@contextlib.contextmanager
def placed_on(mesh: str) -> Iterator[Placement]:
    """Let several devices share the work of training and rendering: "auto" for all, "rays:4" for four of them.

    "one", the default elsewhere, is the first device. Raises InputError where there are not so many devices.
    """
    token = _placement.set(parse_mesh(mesh))
    try:
        yield default_placement()
    finally:
        _placement.reset(token)


def parse_mesh(mesh: str) -> Placement | None:
    """The placement that "one", "auto" or "rays:4" stands for; None for one device."""
    found = re.fullmatch(r"one|auto|rays:([1-9]\d{0,5})", mesh)
    if not found:
        raise InputError(f"mesh = {mesh}: expected one, auto, or a number of devices, as in rays:4")
    if mesh == "one" and processes.count() == 1:
        return None
    devices = jax.devices()
    count = {"one": 1, "auto": len(devices)}.get(mesh) or int(found[1])
    if count < len(devices) and processes.count() > 1:
        raise InputError(f"mesh = {mesh}: {processes.count()} processes share a run with all of their devices: auto")
    if count > len(devices):
        raise InputError(
            f"mesh = {mesh}: jax has {len(devices)} {devices[0].platform} devices; give at most rays:{len(devices)}, "
            f"or for a trial on a CPU XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    if count == 1:
        return None
    return Placement(NamedSharding(jax.sharding.Mesh(np.array(devices[:count]), (SHARES,)), PartitionSpec()))


# A program that several devices share: each runs it with the same arguments, computes its share of the rays, and the
# results are added up. Outside of such a program there is one share, all of it, and nothing below adds an operation.

SHARES, PARTS = "rays", "parts"
"""The axes of meshes, by their names: of devices that share a training step, and of those that share a picture."""


def num_shares() -> int:
    """How many devices share the program that is being traced, 1 in any other."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[SHARES] if SHARES in mesh.manual_axes else 1


def share_index() -> int | jax.Array:
    """The number () i32 of this device among them, 0 where there is no other."""
    return lax.axis_index(SHARES) if num_shares() > 1 else 0


def own_share(tree: T) -> T:
    """Of arrays (N, ...) that every device holds the rows (N / D, ...) that are this one's."""
    count = num_shares()
    if count == 1:
        return tree

    def rows(array: jax.Array) -> jax.Array:
        size = _divided(array.shape[0], count)
        return lax.dynamic_slice_in_dim(array, share_index() * size, size)

    return jax.tree.map(rows, tree)


def all_shares(tree: T) -> T:
    """The rows (N, ...) of all devices in place of this one's (N / D, ...)."""
    return tree if num_shares() == 1 else lax.all_gather(tree, SHARES, tiled=True)


def over_shares(tree: T) -> T:
    """The sum over all devices. No gradient flows through it: that of the whole is the sum of the gradients."""
    return tree if num_shares() == 1 else lax.psum(lax.stop_gradient(tree), SHARES)


def largest_of_shares(array: jax.Array) -> jax.Array:
    """The maximum over all devices."""
    return array if num_shares() == 1 else lax.pmax(array, SHARES)


def any_share(flags: jax.Array) -> jax.Array:
    """Whether a flag () or (...) bool is set on any device."""
    return flags if num_shares() == 1 else largest_of_shares(flags.astype(jnp.uint8)) > 0


def scattered_sum(array: jax.Array) -> jax.Array:
    """Of the sum over all devices of arrays (N, ...) the rows (ceil(N / D), ...) that are this one's, 0 behind N.

    Every device receives what it needs alone: half of what moves for `over_shares`.
    """
    return lax.psum_scatter(_filled_up(array), SHARES, tiled=True)


def own_tile(array: jax.Array) -> jax.Array:
    """Of an array (N, ...) that every device holds the rows that `scattered_sum` would give this one."""
    return own_share(_filled_up(array))


def _filled_up(array: jax.Array) -> jax.Array:
    return jnp.pad(array, ((0, -len(array) % num_shares()), *[(0, 0)] * (array.ndim - 1)))


def _divided(size: int, count: int) -> int:
    if size % count:
        raise InputError(
            f"{count} devices cannot share {size} rays or points evenly: give another --mesh, or a multiple of it"
        )
    return size // count


def device_memory() -> int:
    """Bytes that the first device has for arrays, or 0 where it does not tell, as a CPU does not."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


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


def compiled(
    function: Any, *args: Any, options: dict[str, Any] | None = None, donate: bool = False, **static: Any
) -> Callable[..., Any]:
    """The program of a jitted function for arguments of these shapes; an equal request gets the same program.

    args: arrays or shapes. static: its static arguments. donate: whether the function donates its first argument. What
    is asked for once is compiled once in a process, however many runs ask for it. On a mesh, all devices share it.
    """
    leaves, structure = jax.tree.flatten(args)
    place = default_placement()
    shapes = tuple(place.shape(leaf) for leaf in leaves)
    key = (tuple((options or {}).items()), tuple(static.items()), donate, place.mesh, _formulation.get())
    return _compiled(function, structure, shapes, *key)


@functools.lru_cache(maxsize=64)
def _compiled(
    function: Any,
    structure: Any,
    shapes: tuple,
    options: tuple,
    static: tuple,
    donate: bool,
    mesh: jax.sharding.Mesh | None,
    _: Formulation,
) -> Callable[..., Any]:
    args = jax.tree.unflatten(structure, shapes)
    if mesh is None:
        return function.lower(*args, **dict(static)).compile(dict(options))
    specs = jax.tree.map(lambda shape: shape.sharding.spec, args)
    body = functools.partial(function, **dict(static))
    shared = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(shared, donate_argnums=(0,) if donate else ()).lower(*args).compile(dict(options))


# Compiler options for GPUs.

FAST_SCATTER_JAXLIB = (0, 11, 1)
"""The first jaxlib that adds to scattered places with a GPU's atomic additions. Those before, back to 0.10.2 at least,
compare and swap until no other thread was faster (jax issue 38806)."""

OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""No matmuls by Triton: ours are narrow and wait for memory, cuBLAS applies the ReLU as it writes, and trying out
Triton's tiles would take longer than much of the training."""

CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
"""Fewer copies of what a loop carries: 8 % of a step's time, and the same bits."""


@dataclass(frozen=True)
class Target:
    """What decides on the options of the compiler; `target()` is what jax compiles for here."""

    on_gpu: bool
    jaxlib: tuple[int, ...]  # the release numbers, as (0, 11, 1)
    capability: tuple[int, int]  # compute capability, as (9, 0); (0, 0) where it is unknown, or not NVIDIA's
    xla_flags: str = ""  # the environment's XLA_FLAGS, what they say is not said again


def target() -> Target:
    """The device that jax runs on, jaxlib's version, and XLA_FLAGS."""
    capability = parse_capability(getattr(jax.local_devices()[0], "compute_capability", None))
    return Target(jax.default_backend() == "gpu", jaxlib_version(), capability, os.environ.get("XLA_FLAGS", ""))


def compiler_options(at: Target | None = None) -> dict[str, Any]:
    """What to give `jax.jit` or `.compile` for a target, by default `target()`."""
    at = at or target()
    return _unless_said(OPTIONS if at.on_gpu else CPU_OPTIONS, at)


def step_compiler_options(
    precision: Precision, *, deterministic: bool = False, at: Target | None = None
) -> dict[str, Any]:
    """`compiler_options` for a program that takes training steps, and so adds to scattered places.

    deterministic: sort what is added to one place instead, so that its order, and so the result, is always the same.
    """
    at = at or target()
    if not at.on_gpu:
        return compiler_options(at)
    extra = {"xla_gpu_deterministic_ops": True} if deterministic else {}
    return _unless_said(OPTIONS | scatter_workaround(precision, at) | extra, at)


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
