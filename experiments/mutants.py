"""Do the tests notice a fault? Plants typical ones, one at a time, and runs the tests.

    python -m experiments.mutants [--only=hash_prime ...] [--jobs=1] [--list] [--output=runs/mutants.json]

Prints a Markdown table of the faults, of how many tests fail with each and which, and writes it as JSON. The exit code
is 1 if no test notices one of them. Each fault is tried on the tests of its module and of what builds on it only. These
have to pass without any fault first, which also compiles, once, all programs that a fault does not change. Nothing in
the repository is changed: `experiments.faults` plants a fault in the process that runs the tests.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from absl import flags as absl_flags

from experiments.faults import FAULTS, Fault
from jaxngp import flags
from jaxngp.config import InputError
from jaxngp.records import environment, write_json

ROOT = Path(__file__).resolve().parents[1]

MAX_FAILED = 3
"""Failing tests after which no more are run: by then the fault is noticed."""

TIME_LIMIT = 600.0
"""Seconds for the tests of a fault. Those that take longer have noticed: some loop does not end."""


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a fault."""

    name: str
    module: str
    failed: tuple[str, ...]  # at most MAX_FAILED
    timed_out: bool
    seconds: float

    @property
    def noticed(self) -> bool:
        return self.timed_out or bool(self.failed)

    def row(self) -> str:
        """As a row of `HEADER`."""
        number = "no end" if self.timed_out else f"{len(self.failed)}{'+' if len(self.failed) == MAX_FAILED else ''}"
        tests = ", ".join(dict.fromkeys(test.partition("[")[0] for test in self.failed))
        return (
            f"| {self.name} | {self.module} | {number if self.noticed else '**none**'} | {tests} | {self.seconds:.0f} |"
        )


HEADER = "| fault | module | failing tests | first of them | s |\n|---|---|---|---|---|"


def check(faults: Sequence[Fault], *, jobs: int = 1) -> Iterator[Outcome]:
    """The outcome of each fault, in order.

    Raises ValueError where a fault does not fit the package, and RuntimeError where a test fails without any fault.
    """
    for fault in faults:
        fault.plant(fault.path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        folder = Path(name)
        tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
        try:
            sound = threads.map(lambda test: _failing_tests((test,), folder), tests)
            for test, failed in zip(tests, sound, strict=True):
                if failed != ():
                    raise RuntimeError(f"tests of {test} fail without any fault: {', '.join(failed or ('no end',))}")
            yield from threads.map(lambda fault: _try(fault, folder), faults)
        finally:
            threads.shutdown(cancel_futures=True)  # an error, or whoever iterates no further, ends all at once


def _try(fault: Fault, folder: Path) -> Outcome:
    started = time.perf_counter()
    failed = _failing_tests(fault.tests, folder, f"--fault={fault.name}")
    return Outcome(fault.name, fault.module, failed or (), failed is None, time.perf_counter() - started)


def _failing_tests(tests: Sequence[str], folder: Path, *options: str) -> tuple[str, ...] | None:
    """The first tests that fail, pytest being given some options; None if they do not end.

    folder: for their report and, unless the environment says where, compiled programs. Raises RuntimeError where no
    test could be run.
    """
    files = [f"tests/test_{file}.py{colons}{rest}" for file, colons, rest in (test.partition("::") for test in tests)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".xml") as report:
        plain = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--maxfail={MAX_FAILED}", f"--junitxml={report.name}"]
        try:
            result = subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "experiments.faults", *options, *plain, *files],
                cwd=ROOT,
                env=cache | os.environ,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return None
        if result.returncode not in (0, 1):  # of pytest: all passed, some failed
            raise RuntimeError(f"pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
        return tuple(
            case.get("name", "")
            for case in ElementTree.parse(report.name).iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        )


def select(names: Sequence[str]) -> list[Fault]:
    """The faults of these names, or all of them. Raises InputError where there is none of a name."""
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        raise InputError(f"--only: unknown {min(unknown)!r}; --list prints all names")
    return [fault for fault in FAULTS if not names or fault.name in names]


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_multi_string("only", [], "Only the fault of this name; may be repeated.", flag_values=values)
    absl_flags.DEFINE_integer("jobs", 1, "Faults tried at the same time.", 1, flag_values=values)
    absl_flags.DEFINE_bool("list", False, "Only list the faults.", flag_values=values)
    absl_flags.DEFINE_string("output", "runs/mutants.json", "Where the outcomes are written.", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    faults = select(values.only)
    if values.list:
        for fault in faults:
            print(f"{fault.name}: {fault.module}, tried on the tests of {', '.join(fault.tests)}")
        return
    started, outcomes = time.perf_counter(), []
    print(HEADER, flush=True)
    for outcome in check(faults, jobs=values.jobs):
        print(outcome.row(), flush=True)
        outcomes.append(outcome)
    survivors = [outcome.name for outcome in outcomes if not outcome.noticed]
    seconds = time.perf_counter() - started
    print(f"\n{len(faults) - len(survivors)} of {len(faults)} faults noticed in {seconds:.0f} s")
    write_json(
        values.output, {**environment(), "seconds": seconds, "faults": [asdict(outcome) for outcome in outcomes]}
    )
    if survivors:
        sys.exit(f"no test notices {', '.join(survivors)}")


if __name__ == "__main__":
    flags.run("experiments.mutants", define_flags, main, __doc__ or "")
