"""What a program that XLA compiled does on a GPU, read from its text: kernels, the bytes they move, and atomics.

Sizes are in bytes. After XLA's last pass every instruction of the HLO, other than those that only name something, is
one launch: of a kernel, of a library call or of a copy.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, ([a-z][\w\-]*=.*))?$")


@dataclass(frozen=True)
class Array:
    """The type of one array, as in f32[262144,8,4]."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the array; a pred takes one byte, and a token none."""
        bits = re.search(r"\d+", self.dtype)  # also of f8e4m3fn and c64
        width = int(bits.group()) if bits else 8 * (self.dtype == "pred")
        return prod(self.dims) * width // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: name = results opcode(operands), attributes. The elements of a tuple are several results."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Of all results."""
        return sum(result.num_bytes for result in self.results)

    @property
    def op_name(self) -> str:
        """The path in the traced program; empty for what the compiler added."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        """How often the body of a while loop runs, where the compiler knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def called(self, *keys: str) -> list[str]:
        """The computations that attributes such as `body` or `branch_computations` name."""
        return _names(" ".join(re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)))


Computation = dict[str, Instruction]  # by name, in order of execution


@dataclass(frozen=True)
class Module:
    """A compiled program: all its computations, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", text)


def parse_arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a type, however nested; layouts and comments are passed over."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return tuple(Array(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in found)


def parse_module(text: str) -> Module:
    """The module that `compiled.as_text()` prints. Raises ValueError where it is none."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            if (found := _LINE.match(line)) is None:
                raise ValueError(f"expected an HLO instruction, got {line[:80]!r}")
            root, name, kind, opcode, operands, attributes = found.groups()
            results, names = parse_arrays(kind), tuple(_names(operands))
            current[name] = Instruction(name, opcode, results, names, attributes or "", root is not None)
    if entry is None:
        raise ValueError("expected the HLO of a whole module, with an ENTRY computation")
    return Module(computations, entry)


# Kernels.

_NO_LAUNCH = re.compile("parameter|constant|get-tuple-element|tuple|bitcast|after-all|opt-barrier|partition-id|.*-done")
_BY_ELEMENT = re.compile("bitcast|reshape|convert|add|subtract|multiply|maximum|minimum|and|or|negate|not")


@dataclass(frozen=True)
class Kernel:
    """One launch, whether it is repeated, and the bytes that it streams.

    Those are of arrays, or slices of them, that are read or written whole, each once; what is gathered from an array or
    scattered to one is not among them.
    """

    instruction: Instruction
    in_loop: bool
    streamed: int


def loops(module: Module) -> list[Instruction]:
    """The outermost while loops."""
    return [i for _, i, in_loop in _walk(module, module.entry, False) if i.opcode == "while" and not in_loop]


def kernels(module: Module) -> list[Kernel]:
    """All launches in order: those in a loop once, those of a conditional in all its branches.

    The condition of a loop is launched too where the trip count is not known.
    """
    launched = ((c, i, in_loop) for c, i, in_loop in _walk(module, module.entry, False) if i.opcode != "while")
    return [Kernel(i, in_loop, _streamed(module, computation, i)) for computation, i, in_loop in launched]


def _walk(module: Module, name: str, in_loop: bool) -> Iterator[tuple[Computation, Instruction, bool]]:
    """The loops and launches that a computation leads to, each with its computation and whether it is in a loop."""
    computation = module.computations[name]
    for instruction in computation.values():
        called, looping = [], in_loop
        if instruction.opcode == "while":
            yield computation, instruction, in_loop
            called = instruction.called("body", *(["condition"] if instruction.trip_count is None else []))
            looping = True
        elif instruction.opcode == "conditional":
            called = instruction.called("branch_computations", "true_computation", "false_computation")
        elif instruction.opcode == "call":
            called = instruction.called("to_apply")
        elif not _NO_LAUNCH.fullmatch(instruction.opcode):
            yield computation, instruction, in_loop
        for other in called:
            yield from _walk(module, other, looping)


def _streamed(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of operands and results, but of what is gathered from, scattered to, sliced or updated only that part."""
    if instruction.opcode == "fusion":
        (fused,) = instruction.called("calls")
        return _streamed_by_fusion(module.computations[fused])
    results = instruction.results
    if "__cublas" in instruction.attributes and len(results) > 1 and results[-1].dtype == "s8":
        results = results[:-1]  # the workspace
    operands = [computation[name] for name in dict.fromkeys(instruction.operands)]
    return sum(array.num_bytes for array in results) + sum(operand.num_bytes for operand in operands)


def _streamed_by_fusion(fused: Computation) -> int:
    root = next(i for i in fused.values() if i.is_root)
    total = sum(_written(fused, fused[name]) for name in (root.operands if root.opcode == "tuple" else [root.name]))
    users: dict[str, list[Instruction]] = defaultdict(list)
    read: dict[str, int | None] = {}  # by name, users before what they use: bytes read of a value, None is all of them
    for value in reversed(fused.values()):
        parts = [_read(value, user, read) for user in users[value.name]]
        some = [part for part in parts if part is not None]
        read[value.name] = None if value is root or len(some) < len(parts) else sum(some)
        for name in set(value.operands):
            users[name].append(value)
        if value.opcode == "parameter":
            part = read[value.name]
            total += value.num_bytes if part is None else min(part, value.num_bytes)  # slices may overlap
    return total


def _read(value: Instruction, user: Instruction, read: dict[str, int | None]) -> int | None:
    """Bytes that one user reads of a value; None is all of them."""
    if _BY_ELEMENT.fullmatch(user.opcode):
        return read[user.name]
    if user.operands.index(value.name) > 0 or user.operands.count(value.name) > 1:
        return None
    sizes = {"gather": 0, "scatter": 0, "dynamic-update-slice": 0}
    return user.num_bytes if user.opcode in ("slice", "dynamic-slice") else sizes.get(user.opcode)


def _written(fused: Computation, value: Instruction) -> int:
    origin = value
    while origin.opcode in ("bitcast", "reshape"):
        origin = fused[origin.operands[0]]
    if origin.opcode == "dynamic-update-slice":
        return fused[origin.operands[1]].num_bytes
    return 0 if origin.opcode == "scatter" else value.num_bytes


def num_float64(module: Module) -> int:
    """Instructions that yield float64 or complex128, inside fusions too."""
    instructions = (i for computation in module.computations.values() for i in computation.values())
    return sum(any(array.dtype in ("f64", "c128") for array in i.results) for i in instructions)


def is_corner_array(array: Array, *, num_levels: int, num_features: int, num_corners: int = 8) -> bool:
    """Whether an array holds something for each of N points, L levels and 8 corners, or also each of F features.

    In any order of the axes, N being the largest. Axes of one element do not count; merged axes are not recognised.
    """
    small = [sorted((num_corners, num_levels)), sorted((num_corners, num_levels, num_features))]
    return sorted(d for d in array.dims if d > 1)[:-1] in small


def parse_atomics(ptx: str) -> list[tuple[str, str]]:
    """All atomic instructions in a text of PTX, in order: kernel, and instruction as in atom.global.v4.f32.add."""
    found = []
    kernel = ""
    for line in ptx.splitlines():
        if entry := re.search(r"\.entry (\w+)", line):
            kernel = entry[1]
        if atomic := re.match(r"\s*(?:@!?%\w+\s+)?((?:atom|red)\.[\w.:]+)", line):
            found.append((kernel, atomic[1]))
    return found


def ptx_name(instruction: str) -> str:
    """The name of an instruction's kernel in PTX, which has no dots and hyphens."""
    return re.sub(r"[.\-]", "_", instruction)
