"""Hypothesis strategies and small configs that several tests share.

Hypothesis draws values, never shapes: a law is compiled once, and a failure shrinks to few and simple numbers.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxngp.config import FieldConfig, HashGridConfig, InputError, MarchConfig, OccupancyConfig

TINY_GRID = HashGridConfig(num_levels=2, table_size=2**8, min_resolution=4, max_resolution=20)
"""A dense level of 5^3 rows and a hashed one: every level costs a second of compilation."""

TINY_FIELD = FieldConfig(encoding=TINY_GRID, hidden_width=8, num_geometry_features=4, direction_degree=2)

TINY_MARCH = MarchConfig(num_steps=64, num_samples=64, occupancy=OccupancyConfig(resolution=32))

seeds = st.integers(0, 2**32 - 1)

needs_float16 = pytest.mark.skipif(
    "SSE4" in os.environ.get("XLA_FLAGS", ""), reason="XLA converts no float16 in code for SSE4.2; CI's other runs do"
)


def jit_to_numpy(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """jax.jit whose results are numpy arrays: what a test does with jax arrays, each operation of it, is compiled."""
    compiled = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.tree.map(np.asarray, compiled(*args, **kwargs))


def floats32(low: float, high: float) -> st.SearchStrategy[float]:
    """f32 numbers in [low, high] without subnormals, which XLA:CPU takes as 0."""
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32, allow_subnormal=False)


def arrays32(shape: tuple[int, ...] | int, low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    """f32 arrays of one shape with elements in [low, high]."""
    return hnp.arrays(np.float32, shape, elements=floats32(low, high))


def points(num: int, num_dims: int = 3) -> st.SearchStrategy[np.ndarray]:
    """(num, num_dims) f32 in the unit cube, its faces and the faces of coarse cells among them."""
    on_faces = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    return hnp.arrays(np.float32, (num, num_dims), elements=floats32(0, 1) | on_faces)


@st.composite
def directions(draw: st.DrawFn, num: int) -> np.ndarray:
    """(num, 3) f32 unit vectors, those along an axis or in a plane of two among them."""
    part = st.integers(-4, 4) | floats32(-1, 1)
    rows = draw(hnp.arrays(np.float32, (num, 3), elements=part))
    rows = np.where(np.linalg.norm(rows, axis=1, keepdims=True) < 1e-3, np.float32([0, 0, 1]), rows).astype(np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@st.composite
def rotations(draw: st.DrawFn) -> np.ndarray:
    """(3, 3) f32 rotations, from unit quaternions."""
    w, x, y, z = draw(arrays32(4, -1, 1).filter(lambda q: np.linalg.norm(q) > 0.1)).astype(np.float64)
    n = w * w + x * x + y * y + z * z
    rows = [
        [n - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), n - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), n - 2 * (x * x + y * y)],
    ]
    return (np.array(rows) / n).astype(np.float32)


# Broken and hostile input.

Test = TypeVar("Test", bound=Callable[..., None])


def fuzz(test: Test) -> Test:
    """With as many cases as the profile of that name says, and chosen by `pytest -m fuzz`."""
    return pytest.mark.fuzz(settings.get_profile("fuzz")(test))


def or_input_error(call: Callable[[], Any], seconds: float = 10) -> Any:
    """What `call` gives, or None where it raises an InputError of one short line. Anything else it raises escapes."""
    start = time.perf_counter()
    result, message = None, "no message"
    try:
        result = call()
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 3000
    assert time.perf_counter() - start < seconds
    return result


NONSENSE: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


# What a reader may stumble over: the ends of the ranges of numbers, and long, deep and unprintable things.
AWKWARD: list[Any] = [
    *(0, -0.0, 5e-324, 1e-300, 1e-9, 1e9, 1e300, 1.7e308, float("inf"), float("nan"), 2**31, 2**63, -(2**63), 10**400),
    *("", ".", "..", "a/..", "../train/r_0", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\ud800", "~", "%s", "x" * 5000),
    *(None, True, [], {}, [[]], nested(300), ["x" * 50] * 50, {"x" * 50: 1}, [float("inf")] * 4),
]
values = st.sampled_from(AWKWARD) | NONSENSE


def _place(draw: st.DrawFn, plain: Any) -> tuple[Any, Any]:
    """(container, key or index) of a node below `plain`; by descent, so that many leaves do not outweigh a few."""
    while True:
        key = draw(st.sampled_from(sorted(plain) if isinstance(plain, dict) else range(len(plain))))
        child = plain[key]
        if not (isinstance(child, dict | list) and child and draw(st.integers(0, 3))):
            return plain, key
        plain = child


@st.composite
def changed_json(draw: st.DrawFn, plain: Any) -> Any:
    """A JSON object in which a few nodes are replaced, removed, doubled, retyped or exchanged."""
    plain = copy.deepcopy(plain)
    for _ in range(draw(st.integers(1, 3))):
        if not plain:
            break
        holder, key = _place(draw, plain)
        change = draw(st.sampled_from(["replace", "replace", "remove", "double", "retype", "exchange"]))
        if change == "replace":
            holder[key] = copy.deepcopy(draw(values))
        elif change == "remove":
            del holder[key]
        elif change == "double":
            holder[key] = [copy.deepcopy(holder[key])] * 2
        elif change == "retype":
            kinds = [str, lambda v: [v], lambda v: {"value": v}, bool, repr, lambda v: next(iter(v.values()))]
            try:
                holder[key] = draw(st.sampled_from(kinds))(holder[key])
            except (AttributeError, StopIteration):
                holder[key] = None
        else:
            other, other_key = _place(draw, plain)
            holder[key] = copy.deepcopy(other[other_key])
    return plain


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that is cut off, or in which bytes are replaced, removed, put in or moved."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        end = min(start + draw(st.sampled_from([0, 1, 1, 2, 4, 8])), len(changed))
        extreme = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * (end - start)
        change = draw(st.sampled_from(["any", "any", "extreme", "bit", "cut", "again"]))
        if change == "bit" and start < len(changed):
            changed[start] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del changed[start:]
        elif change == "again":
            changed[start:end] = changed[: draw(st.integers(0, 64))]
        else:
            changed[start:end] = extreme if change == "extreme" else draw(st.binary(max_size=4))
    return bytes(changed)
