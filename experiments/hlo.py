"""What a program compiled by XLA will do on a GPU, read from XLA's own texts: HLO, buffer assignment and PTX.

Sizes are in bytes. The HLO is that of after all optimisations: each of its instructions, other than those that only
name something, is one launch of a kernel, of a library call or of a copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

# HLO.


@dataclass(frozen=True)
class Array:
    """The type of one array, as in f32[262144,8,4]."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """pred takes a byte; what holds no numbers, as token[] does, takes none."""
        bits = re.search(r"\d+", self.dtype)  # also of f8e4m3fn and c64
        width = int(bits.group()) if bits else 8 * (self.dtype == "pred")
        return prod(self.dims) * width // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: name = results opcode(arguments), attributes. A tuple, nested or not, is several results."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        return sum(result.num_bytes for result in self.results)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @property
    def op_name(self) -> str:
        """The path in the traced program; empty for what the compiler added."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def trip_count(self) -> int | None:
        """Of a while loop: how often its body runs, where the compiler knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else None

    def called(self, *keys: str) -> list[str]:
        """The computations that attributes such as `body` or `branch_computations` name."""
        values = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(values))


Computation = Mapping[str, Instruction]
"""Name -> instruction, in order of execution."""


@dataclass(frozen=True)
class Module:
    """A compiled program: the computation that runs, and all that it calls."""

    computations: Mapping[str, Computation]
    entry: str


def parse_arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a type, however nested; layouts and comments are passed over."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return tuple(Array(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in found)


def parse_instruction(line: str) -> Instruction | None:
    """The instruction of a line, or None where it holds none."""
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if found is None:
        return None
    root, name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=name,
        opcode=rest[:opening],
        results=parse_arrays(kind),
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
        is_root=root is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed. Raises ValueError where it is not."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]!r}")


def parse_module(text: str) -> Module:
    """The module that compiled.as_text() prints. Raises ValueError where there is no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = None
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := parse_instruction(line)):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("text holds no ENTRY computation: expected the HLO of a whole module")
    return Module(computations, entry)


def count_float64(module: Module) -> int:
    """Instructions that yield float64 or complex128, inside fusions too."""
    instructions = (i for computation in module.computations.values() for i in computation.values())
    return sum(any(array.dtype in ("f64", "c128") for array in i.results) for i in instructions)


# Kernels.

# What yields no launch of its own.
_NAMES_ONLY = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id")
)
_RENAMES = frozenset(("bitcast", "reshape"))
_BY_ELEMENT = _RENAMES | {"convert", "add", "subtract", "multiply", "maximum", "minimum", "and", "or", "negate", "not"}


@dataclass(frozen=True)
class Traffic:
    """Bytes that a kernel reads and writes.

    streamed: of arrays, or slices of them, that are read or written whole, each once. scattered: of the elements that
    are gathered from an array or scattered to one, as often as they are: caches may serve most of them. An array that
    is padded or joined to another before it is gathered from counts as read whole.
    """

    streamed: int = 0
    scattered: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.streamed + other.streamed, self.scattered + other.scattered)


@dataclass(frozen=True)
class Kernel:
    """One launch, and whether it is repeated."""

    instruction: Instruction
    in_loop: bool
    traffic: Traffic


def loops(module: Module) -> list[Instruction]:
    """The outermost while loops."""
    return [i for _, i, in_loop in _walk(module, module.entry, False) if i.opcode == "while" and not in_loop]


def kernels(module: Module) -> list[Kernel]:
    """All that is launched, in order; what is in a loop once.

    Of a conditional, all branches. The condition of a loop is launched where the trip count is not known.
    """
    launched = ((c, i, loop) for c, i, loop in _walk(module, module.entry, False) if i.opcode != "while")
    return [Kernel(i, in_loop, traffic(module, computation, i)) for computation, i, in_loop in launched]


def _walk(module: Module, name: str, in_loop: bool) -> Iterator[tuple[Computation, Instruction, bool]]:
    """The loops and the launches that a computation leads to, each with where it stands and whether in a loop."""
    computation = module.computations[name]
    for instruction in computation.values():
        called: list[str] = []
        looping = in_loop
        if instruction.opcode == "while":
            yield computation, instruction, in_loop
            looping = True
            called = instruction.called("body", *(["condition"] if instruction.trip_count is None else []))
        elif instruction.opcode == "conditional":
            called = instruction.called("branch_computations", "true_computation", "false_computation")
        elif instruction.opcode == "call":
            called = instruction.called("to_apply")
        elif instruction.opcode not in _NAMES_ONLY and not instruction.opcode.endswith("-done"):
            yield computation, instruction, in_loop
        for other in called:
            yield from _walk(module, other, looping)


def traffic(module: Module, computation: Computation, instruction: Instruction) -> Traffic:
    """What one launch reads and writes: operands and results, but of what it only gathers from or scatters to, and of
    what it slices or updates in place, the elements that it touches. The workspace of a matmul is not counted.
    """
    if instruction.opcode == "fusion":
        (fused,) = instruction.called("calls")
        return _fused_traffic(module.computations[fused])
    operands = [computation[name] for name in dict.fromkeys(instruction.operands)]
    results = instruction.results
    if "__cublas" in instruction.attributes and len(results) > 1 and results[-1].dtype == "s8":
        results = results[:-1]
    written = sum(array.num_bytes for array in results)
    return Traffic(streamed=written + sum(operand.num_bytes for operand in operands))


def _fused_traffic(fused: Computation) -> Traffic:
    total = Traffic()
    known: dict[str, Traffic | None] = {}
    for parameter in fused.values():
        if parameter.opcode == "parameter":
            whole = Traffic(streamed=parameter.num_bytes)
            part = _reads(fused, parameter, known) or whole
            total += Traffic(min(part.streamed, whole.streamed), part.scattered)  # slices may overlap
    root = next(i for i in fused.values() if i.is_root)
    for written in [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        total += _writes(fused, written)
    return total


def _reads(fused: Computation, value: Instruction, known: dict[str, Traffic | None]) -> Traffic | None:
    """Of a value that is only gathered from, sliced, or updated in place, itself or what is made of it element by
    element: what of it is read. None where all of it is. `known` holds the answers so far, by name.
    """
    if value.name not in known:
        users = [user for user in fused.values() if value.name in user.operands]
        parts = [_reads_of_user(fused, value, user, known) for user in users]
        counted = [part for part in parts if part is not None]
        known[value.name] = None if value.is_root or len(counted) < len(parts) else sum(counted, Traffic())
    return known[value.name]


def _reads_of_user(
    fused: Computation, value: Instruction, user: Instruction, known: dict[str, Traffic | None]
) -> Traffic | None:
    if user.opcode in _BY_ELEMENT:
        return _reads(fused, user, known)
    if user.operands.index(value.name) > 0 or user.operands.count(value.name) > 1:
        return None
    if user.opcode == "gather":
        return Traffic(scattered=user.num_bytes)
    if user.opcode in ("slice", "dynamic-slice"):
        return Traffic(streamed=user.num_bytes)
    if user.opcode in ("scatter", "dynamic-update-slice"):
        return Traffic()  # counted as written
    return None


def _writes(fused: Computation, value: Instruction) -> Traffic:
    origin = value
    while origin.opcode in _RENAMES:
        origin = fused[origin.operands[0]]
    if origin.opcode == "scatter":  # operands, indices, and as many updates as operands
        updates = origin.operands[(len(origin.operands) + 1) // 2 :]
        return Traffic(scattered=sum(fused[name].num_bytes for name in updates))
    if origin.opcode == "dynamic-update-slice":
        return Traffic(streamed=fused[origin.operands[1]].num_bytes)
    return Traffic(streamed=value.num_bytes)


# Memory.


@dataclass(frozen=True)
class Temporary:
    """A value that lives between two kernels: the instruction that makes it, and its type."""

    instruction: str
    array: Array


def parse_temporaries(text: str) -> list[Temporary]:
    """The arrays in the temporary allocation, from the text of XLA's buffer assignment; tuples of pointers are not."""
    found = []
    in_temporaries = False
    for line in text.splitlines():
        if line.startswith("allocation "):
            in_temporaries = line.rstrip().endswith("preallocated-temp:")
        value = re.match(r"\s*value: <\d+ ([\w.\-]+)\S* @\d+> \(size=\d+,offset=\d+\): ([^(].*)$", line)
        if in_temporaries and value:
            found += [Temporary(value.group(1), array) for array in parse_arrays(value.group(2))]
    return found


def corner_arrays(arrays: Iterable[Array], *, num_levels: int, num_features: int) -> list[Array]:
    """Those that hold something for each of N points, L levels and 8 corners, or also each of F features.

    In any order of the axes, N being the largest: (8, N, L), (N, L, 8, F), .... Axes of one element do not count, and
    an array in which axes were merged is not found.
    """
    small = [sorted((8, num_levels)), sorted((8, num_levels, num_features))]
    return [array for array in arrays if sorted(d for d in array.dims if d > 1)[:-1] in small]


# PTX.


@dataclass(frozen=True)
class Atomic:
    """An atomic instruction of a kernel, as in atom.global.v4.f32.add."""

    kernel: str
    instruction: str

    @property
    def is_cas(self) -> bool:
        """A compare-and-swap, to which an addition falls back that the GPU has no instruction for: a loop."""
        return ".cas." in self.instruction

    @property
    def is_vector(self) -> bool:
        return re.search(r"\.v[248]\.", self.instruction) is not None


def parse_atomics(ptx: str) -> list[Atomic]:
    """All atomic instructions in a text of PTX, in order."""
    found = []
    kernel = ""
    for line in ptx.splitlines():
        if entry := re.search(r"\.entry (\w+)", line):
            kernel = entry.group(1)
        if atomic := re.match(r"\s*(?:@!?%\w+\s+)?((?:atom|red)\.[\w.:]+)", line):
            found.append(Atomic(kernel, atomic.group(1)))
    return found


def ptx_name(instruction: str) -> str:
    """The name of an instruction's kernel in PTX, which has no dots and hyphens."""
    return re.sub(r"[.\-]", "_", instruction)
