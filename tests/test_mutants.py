"""The mutation check: its faults still fit the package, and a planted one is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import mutants
from experiments.faults import FAULTS, Fault
from jaxngp.config import InputError

PSNR = ("metrics::test_psnr_of_a_known_error",)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_still_fits_the_package_and_is_python(fault: Fault) -> None:
    source = (mutants.ROOT / "jaxngp" / fault.file).read_text(encoding="utf-8")
    planted = fault.plant(source)
    assert planted != source
    compile(planted, fault.file, "exec")
    for test in fault.tests:
        assert (mutants.ROOT / "tests" / f"test_{test.partition('::')[0]}.py").is_file()


def test_names_are_unique() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("source", ["a = 2", "a = 1; b = 1"], ids=["gone", "twice"])
def test_a_text_that_is_gone_or_ambiguous_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match=r"fault f: its text occurs [02] times in jaxngp/m.py: expected once; '1'"):
        Fault("f", "m.py", "1", "3", ()).plant(source)


def test_a_fault_is_noticed_and_no_fault_is_not() -> None:
    """In copies: the package that is here stays as it is."""
    (fault,) = mutants.select(["psnr_by_natural_logarithm"])
    harmless = replace(fault, name="harmless", replacement=f"({fault.text})")
    path = mutants.ROOT / "jaxngp" / fault.file
    before = path.read_bytes()
    noticed, survivor = mutants.check([replace(fault, tests=PSNR), replace(harmless, tests=PSNR)], jobs=2)
    assert path.read_bytes() == before
    assert noticed.noticed
    assert len(noticed.failed) == mutants.MAX_FAILED
    assert noticed.row().startswith("| psnr_by_natural_logarithm | metrics.py | 3+ | test_psnr_of_a_known_error |")
    assert not survivor.noticed
    assert "| **none** |" in survivor.row()


def test_an_unknown_name_is_refused() -> None:
    assert mutants.select([]) == list(FAULTS)
    with pytest.raises(InputError, match="--only: unknown 'nothing'"):
        mutants.select(["nothing", "hash_prime"])
