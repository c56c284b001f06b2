"""What a GPU's compiler is told: by the version of jaxlib, the GPU and the environment, which are made up here."""

from __future__ import annotations

import jax
import pytest

from jaxngp import device

OLD, NEW = (0, 10, 2), (0, 11, 1)
A100, H100 = (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.10.2", (0, 10, 2)), ("0.11.1.dev20260701", (0, 11, 1)), ("0.12.0.1", (0, 12, 0, 1)), ("1", (1,))],
)
def test_a_version_is_the_numbers_it_begins_with(text: str, numbers: tuple[int, ...]) -> None:
    assert device.parse_version(text) == numbers


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A machine with a backend, a version of jaxlib and a compute capability."""

    def set_up(backend: str, jaxlib: tuple[int, ...], capability: tuple[int, int], flags: str = "") -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(device, "jaxlib_version", lambda: jaxlib)
        monkeypatch.setattr(device, "compute_capability", lambda: capability)
        monkeypatch.setenv("XLA_FLAGS", flags)

    return set_up


@pytest.mark.parametrize(
    ("jaxlib", "capability", "precision", "cured"),
    [
        (OLD, A100, "float32", True),
        (OLD, A100, "bfloat16", True),
        (OLD, (8, 9), "bfloat16", True),
        (OLD, H100, "float32", True),
        (OLD, H100, "bfloat16", False),  # the assembler would refuse it
        ((0, 11, 0), A100, "bfloat16", True),
        (NEW, A100, "float32", False),  # nothing to cure
    ],
)
def test_steps_are_cured_where_an_old_jaxlib_needs_it_and_can(
    pretend, jaxlib: tuple, capability: tuple, precision: device.Precision, cured: bool
) -> None:
    pretend("gpu", jaxlib, capability)
    assert device.compiler_options() == {"xla_gpu_enable_triton_gemm": False}
    expected = device.compiler_options() | ({"xla_gpu_ftz": True} if cured else {})
    assert device.step_compiler_options(precision) == expected
    message = device.slow_scatter_warning(precision)
    assert (message is None) == (jaxlib == NEW)
    if message:
        assert ("XLA_FLAGS=--xla_gpu_ftz=true" in message) == cured
        assert ("field.precision=float32" in message) == (not cured)


def test_what_is_to_be_deterministic_is_compiled_so(pretend) -> None:
    pretend("gpu", NEW, H100)
    expected = device.compiler_options() | {"xla_gpu_deterministic_ops": True}
    assert device.step_compiler_options("bfloat16", deterministic=True) == expected
    pretend("cpu", NEW, (0, 0))
    assert device.step_compiler_options("bfloat16", deterministic=True) == {}


def test_what_xla_flags_says_is_not_said_again(pretend) -> None:
    pretend("gpu", OLD, A100, "--xla_gpu_ftz=true --xla_gpu_enable_triton_gemm=true")
    assert device.compiler_options() == {}
    assert device.step_compiler_options("float32") == {}
    assert device.slow_scatter_warning("float32") is None


def test_another_device_gets_no_options_and_no_warning(pretend) -> None:
    pretend("cpu", OLD, (0, 0))
    assert device.compiler_options() == {}
    assert device.step_compiler_options("float32") == {}
    assert device.slow_scatter_warning("float32") is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--xla_gpu_ftz=false", "says otherwise"),
        ("--xla_gpu_ftz", None),
        ("--xla_gpu_ftz=1", None),
        ("--xla_gpu_ftz=True --xla_x=1", None),
        ("--xla_gpu_ftz_not=true", "Training here is compiled"),
    ],
)
def test_the_warning_knows_what_xla_flags_says(pretend, flags: str, said: str | None) -> None:
    pretend("gpu", OLD, A100, flags)
    message = device.slow_scatter_warning("float32")
    assert message is None if said is None else said in (message or "")


@pytest.mark.parametrize(("text", "found"), [("9.0", (9, 0)), ("8.6", (8, 6)), ("gfx90a", (0, 0)), (None, (0, 0))])
def test_a_compute_capability_is_nvidias(monkeypatch: pytest.MonkeyPatch, text: str | None, found: tuple) -> None:
    device = type("Device", (), {"compute_capability": text})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert device.compute_capability() == found


def test_a_device_that_does_not_tell_has_no_compute_capability() -> None:
    assert device.compute_capability() == (0, 0)
