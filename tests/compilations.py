"""What jax compiles while something runs."""

from __future__ import annotations

import collections
from typing import Any

import jax


class Compilations:
    """Counts, by the name of the function, what jax compiles within a `with` block."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def __getitem__(self, function: str) -> int:
        """How often functions with this in their names were compiled."""
        return sum(count for name, count in self.counts.items() if function in name)

    def _on_event(self, event: str, _: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.counts[str(details.get("fun_name"))] += 1
