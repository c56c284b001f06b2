"""Hypothesis strategies and small configs that several tests share.

Hypothesis draws values, never shapes: a law is compiled once, and a failure shrinks to few and simple numbers.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxngp.config import FieldConfig, HashGridConfig, MarchConfig, OccupancyConfig

TINY_GRID = HashGridConfig(num_levels=2, table_size=2**8, min_resolution=4, max_resolution=20)
"""A dense level of 5^3 rows and a hashed one: every level costs a second of compilation."""

TINY_FIELD = FieldConfig(encoding=TINY_GRID, hidden_width=8, num_geometry_features=4, direction_degree=2)

TINY_MARCH = MarchConfig(num_steps=64, num_samples=64, occupancy=OccupancyConfig(resolution=32))

seeds = st.integers(0, 2**32 - 1)


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
