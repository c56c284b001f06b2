"""What a GPU's compiler is told: by the version of jaxlib and the environment, for no GPU is needed to ask."""

from __future__ import annotations

import jax
import pytest

from jaxngp import gpu


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.10.2", (0, 10, 2)), ("0.11.1.dev20260701", (0, 11, 1)), ("0.12.0.1", (0, 12, 0, 1)), ("1", (1,))],
)
def test_a_version_is_the_numbers_it_begins_with(text: str, numbers: tuple[int, ...]) -> None:
    assert gpu.parse_version(text) == numbers


@pytest.mark.parametrize(("jaxlib", "old"), [((0, 10, 2), True), ((0, 11, 0), True), ((0, 11, 1), False)])
def test_an_old_jaxlib_is_told_to_flush_small_numbers_and_none_tries_triton(jaxlib: tuple, old: bool) -> None:
    expected = {"xla_gpu_enable_triton_gemm": False} | ({"xla_gpu_ftz": True} if old else {})
    assert gpu.gpu_compiler_options(jaxlib) == expected


def test_what_xla_flags_says_is_not_said_again() -> None:
    flags = "--xla_gpu_ftz=false --xla_gpu_enable_triton_gemm=true"
    assert gpu.gpu_compiler_options((0, 10, 2), flags) == {}


def test_another_device_gets_no_options_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(gpu, "jaxlib_version", lambda: (0, 10, 2))
    assert gpu.compiler_options() == {}
    assert gpu.slow_scatter_warning() is None


@pytest.mark.parametrize(
    ("jaxlib", "flags", "warns"),
    [((0, 10, 2), "", True), ((0, 10, 2), "--xla_gpu_ftz=true", False), ((0, 11, 1), "", False)],
)
def test_a_gpu_with_an_old_jaxlib_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, jaxlib: tuple[int, ...], flags: str, warns: bool
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "jaxlib_version", lambda: jaxlib)
    monkeypatch.setenv("XLA_FLAGS", flags)
    message = gpu.slow_scatter_warning()
    assert (message is not None) == warns
    assert message is None or "XLA_FLAGS=--xla_gpu_ftz=true" in message
    assert gpu.compiler_options().get("xla_gpu_enable_triton_gemm") is False
