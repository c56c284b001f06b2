"""What holds for every test: hypothesis draws the same values in every run, and compiling is kept cheap."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# A first call compiles, so the time of one example says nothing. Derandomized: a red test stays red.
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=40, print_blob=False)
settings.load_profile("laws")

# Broken and hostile files: JAXNGP_FUZZ=5000 (make test-long) tries so many of each kind, and others in every run.
CASES = os.environ.get("JAXNGP_FUZZ")
settings.register_profile(
    "fuzz",
    settings.get_profile("laws"),
    max_examples=int(CASES or 100),
    derandomize=not CASES,
    print_blob=bool(CASES),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Most of the time of these tests goes into compiling programs that run for a millisecond: LLVM does less here.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

LONG = (
    "inspect", "viewing", "encodings", "marching", "training", "commands", "rendering", "lenses", "occupancy", "bricks",
    "dialects", "tracing", "train_image", "visual_hull", "compositing", "splat_export", "mesh_export",
)  # fmt: skip
"""The files that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A hook of pytest: long files first, so that no worker is left alone with one in the end."""
    order = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
