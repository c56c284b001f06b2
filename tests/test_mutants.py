"""The mutation check: every fault fits the package, a planted one is noticed, and one that changes nothing is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from experiments import mutants
from experiments.faults import FAULTS, Change, Fault, constant, rewrite, wrap
from jaxngp.config import InputError

MODULE = """
import functools

FACTOR = 3

@functools.cache
def scaled(x, *, power=1):
    return FACTOR * x ** power

class Pair:
    @property
    def total(self):
        def shifted(x):
            return scaled(x) + scaled(x, power=2)
        return shifted(1) + shifted(2)

TABLE = [scaled(n) for n in range(3)]
"""


def planted(change: Change) -> tuple[list[int], int]:
    """TABLE and Pair().total of `MODULE` with a change in it; [0, 3, 6] and 24 as it stands."""
    code, names = Fault("f", "m", change, ()).plant(MODULE)
    module: dict[str, Any] = dict(names)
    exec(code, module)
    return module["TABLE"], module["Pair"]().total


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (constant("FACTOR", 4), ([0, 4, 8], 32)),
        (wrap("scaled", lambda call: -call()), ([0, -3, -6], -24)),
        (wrap("scaled", lambda call, x, power: call(x=x + power)), ([3, 6, 9], 90)),
        (wrap("Pair.total", lambda call: 2 * call()), ([0, 3, 6], 48)),
        (rewrite("scaled", "x ** power", "x + power"), ([3, 6, 9], 36)),
        (rewrite("Pair.total", "scaled(...) + ...", "FACTOR"), ([0, 3, 6], 6)),
        (wrap("scaled", lambda call: call()), ([0, 3, 6], 24)),
        (rewrite("scaled", "FACTOR", "(FACTOR)"), ([0, 3, 6], 24)),
    ],
)
def test_a_change_reaches_all_that_use_a_module(change: Change, expected: tuple[list[int], int]) -> None:
    assert planted(change) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (constant("DIVISOR", 1), "DIVISOR is assigned 0 times"),
        (wrap("shifted", lambda call: call()), "0 functions are called shifted"),
        (wrap("scaled", lambda call, y: call(x=y)), "scaled has no parameter y"),
        (rewrite("scaled", "x * power", "x"), "scaled: .* occurs 0 times"),
        (rewrite("Pair.total", "scaled(...)", "x"), "Pair.total: .* occurs 2 times"),
        (rewrite("scaled", "FACTOR", "DIVISOR"), "scaled: no DIVISOR, which 'DIVISOR' needs"),
    ],
)
def test_a_change_without_its_one_place_is_an_error(change: Change, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^fault f does not fit jaxngp.m: {reason}"):
        planted(change)


def test_every_fault_fits_the_package() -> None:
    for fault in FAULTS:
        fault.plant(fault.path.read_text(encoding="utf-8"))
        assert fault.tests
        for test in fault.tests:
            assert (mutants.ROOT / "tests" / f"test_{test}.py").is_file(), fault.name
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


@pytest.mark.slow
def test_faults_are_noticed_only_by_tests_of_them() -> None:
    noticed, survivor = mutants.check(
        [
            replace(fault, tests=("metrics::test_psnr_of_a_known_error",))
            for fault in mutants.select(["psnr_by_natural_logarithm", "window_of_ssim_too_wide"])
        ],
    )
    assert noticed.row().startswith("| psnr_by_natural_logarithm | metrics | 3+ | test_psnr_of_a_known_error |")
    assert "| **none** |" in survivor.row()


def test_an_unknown_name_is_refused() -> None:
    assert mutants.select([]) == FAULTS
    with pytest.raises(InputError, match="--only: unknown 'nothing'"):
        mutants.select(["nothing", "hash_prime"])
