"""Commands run in this process, so that they share the programs that were compiled before."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest

from jaxngp import flags


class Entrypoint:
    """A command, called with its arguments."""

    def __init__(self, module: str, define: Callable[[flags.Flags], None], main: Callable[[flags.Flags], None]) -> None:
        self._module, self._define, self._main = module, define, main

    def __call__(self, *arguments: str) -> None:
        before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        try:
            flags.run(self._module, self._define, self._main, "A summary.", ["jaxngp", *arguments])
        finally:
            jax.config.update("jax_compilation_cache_dir", before)

    def refusal(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        """The one line with which it refuses."""
        with pytest.raises(SystemExit) as exit_info:
            self(*arguments)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("jaxngp: ")
        return error
