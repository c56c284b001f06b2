"""What a GPU's compiler is told, by the version of jaxlib, the GPU and XLA_FLAGS."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxngp import device
from jaxngp.device import Target

OLD, NEW = (0, 10, 2), (0, 11, 1)
A100, H100 = (8, 0), (9, 0)
PLAIN = {"xla_gpu_enable_triton_gemm": False}
WORKAROUND = PLAIN | {"xla_gpu_ftz": True}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.10.2", (0, 10, 2)), ("0.11.1.dev20260701", (0, 11, 1)), ("0.12.0.1", (0, 12, 0, 1)), ("1", (1,))],
)
def test_a_version_is_the_numbers_it_begins_with(text: str, numbers: tuple[int, ...]) -> None:
    assert device.parse_version(text) == numbers


@pytest.mark.parametrize(("text", "found"), [("9.0", (9, 0)), ("8.6", (8, 6)), ("gfx90a", (0, 0)), (None, (0, 0))])
def test_a_compute_capability_is_nvidias(text: str | None, found: tuple[int, int]) -> None:
    assert device.parse_capability(text) == found


@pytest.mark.parametrize(
    ("jaxlib", "capability", "precision", "options"),
    [
        (OLD, A100, "float32", WORKAROUND),
        (OLD, A100, "bfloat16", WORKAROUND),
        (OLD, (8, 9), "bfloat16", WORKAROUND),
        (OLD, H100, "float32", WORKAROUND),
        (OLD, H100, "bfloat16", PLAIN),  # the assembler would refuse it
        ((0, 11, 0), A100, "bfloat16", WORKAROUND),
        (NEW, A100, "float32", PLAIN),  # needs none
    ],
)
def test_an_old_jaxlib_gets_the_scatter_workaround(
    jaxlib: tuple[int, ...], capability: tuple[int, int], precision: device.Precision, options: dict[str, bool]
) -> None:
    at = Target(True, jaxlib, capability)
    assert device.compiler_options(at) == PLAIN
    assert device.step_compiler_options(precision, at=at) == options
    message = device.slow_scatter_warning(precision, at)
    assert (message is None) == (jaxlib == NEW)
    if message:
        assert ("XLA_FLAGS=--xla_gpu_ftz=true" in message) == (options == WORKAROUND)
        assert ("field.precision=float32" in message) == (options == PLAIN)


def test_deterministic_steps_are_compiled_so() -> None:
    options = device.step_compiler_options("bfloat16", deterministic=True, at=Target(True, NEW, H100))
    assert options == PLAIN | {"xla_gpu_deterministic_ops": True}


def test_what_xla_flags_says_is_not_said_again() -> None:
    at = Target(True, OLD, A100, "--xla_gpu_ftz=true --xla_gpu_enable_triton_gemm=true")
    assert device.compiler_options(at) == device.step_compiler_options("float32", at=at) == {}
    assert device.slow_scatter_warning("float32", at) is None


def test_a_cpu_gets_its_own_options_and_no_warning() -> None:
    at = Target(False, OLD, (0, 0))
    options = device.compiler_options(at)
    assert options == device.step_compiler_options("float32", deterministic=True, at=at)
    assert all(name.startswith("xla_cpu_") for name in options)
    said = replace(at, xla_flags=" ".join(f"--{name}=false" for name in options))
    assert device.compiler_options(said) == {}
    assert device.slow_scatter_warning("float32", at) is None


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
def test_the_warning_depends_on_xla_flags(flags: str, said: str | None) -> None:
    message = device.slow_scatter_warning("float32", Target(True, OLD, A100, flags))
    assert message is None if said is None else said in (message or "")


def test_the_target_is_the_device_of_this_process() -> None:
    at = device.target()
    assert at.on_gpu == (device.jax.default_backend() == "gpu")
    assert at.jaxlib == device.jaxlib_version()
