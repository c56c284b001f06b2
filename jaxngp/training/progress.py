"""A running training as a person sees it: the progress bar, the log, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxngp.config import MarchConfig, NerfConfig, RunConfig
from jaxngp.training.loop import Progress
from jaxngp.training.steps import Metrics
from jaxngp.training.updates import StepMetrics


def bar_interval() -> float:
    """Seconds between two drawings of a progress bar: a terminal wants it smooth, a log file wants few lines."""
    return 0.2 if sys.stderr.isatty() else 10.0


def warn(*messages: str) -> None:
    """Say what a person should know and the run need not stop for, past a progress bar that may be drawn."""
    for message in messages:
        tqdm.write(f"jaxngp: warning: {message}", file=sys.stderr)


class TrainingWarnings:
    """What looks wrong about a run as it goes: each said once."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._said: set[str] = set()
        self._last_step = 0

    def about(self, progress: Progress) -> list[str]:
        """Warnings that are new, of the steps since the last call."""
        metrics, config = progress.metrics, self._config
        assert metrics is not None
        found = {}
        if isinstance(metrics, Metrics) and float(metrics.occupied_fraction) == 0:
            found["empty"] = (
                f"step {progress.step}: the occupancy grid is empty, so nothing is sampled and nothing learned any "
                "more. Train anew with a lower optimizer.learning_rate or sampler.occupancy.threshold, by --override"
            )
        if skipped := round(float(metrics.skipped) * (progress.step - self._last_step)):
            found["skipped"] = (
                f"step {progress.step}: {skipped} updates were left out, since the loss or its gradient was no finite "
                "number; metrics.jsonl says which share of later ones"
            )
        used = _share_of_rays(metrics, config)
        if progress.finished and used < _FEW_RAYS:
            found["dropped"] = (
                f"only {used:.0%} of the rays that were drawn fitted the buffer of samples in the last steps, and the "
                "others were marched for nothing: raise sampler.num_samples or lower train.num_rays, by --override"
            )
        self._last_step = progress.step
        new = [text for name, text in found.items() if name not in self._said]
        self._said |= set(found)
        return new


def _share_of_rays(metrics: StepMetrics, config: RunConfig) -> float:
    """Of the rays that were drawn, how many fitted the buffer; 1 where there is none."""
    if not isinstance(config, NerfConfig) or not isinstance(config.sampler, MarchConfig):
        return 1.0
    assert isinstance(metrics, Metrics)
    return float(metrics.rays) / config.train.num_rays


_FEW_RAYS = 0.15
"""Of those drawn; a run that is used well ends far above it."""


class ProgressBar:
    """How much of the budget is spent, with step, loss, PSNR, samples per second and time left.

    Reading the numbers waits for the device; it is done once per dispatch.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._last: tuple[int, float] = (0, 0.0)  # step, seconds
        self._rate = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Draw where a run stands."""
        if self._bar is None:
            print(f"compiled in {progress.compile_seconds:.1f} s", file=sys.stderr)
            layout = "{percentage:3.0f}%|{bar:24}| {desc} [{elapsed}, {remaining} left]"
            self._bar = tqdm(total=1.0, initial=progress.fraction, bar_format=layout, mininterval=bar_interval())
        if progress.metrics is not None:
            steps, seconds = progress.step - self._last[0], progress.seconds - self._last[1]
            self._rate = steps * float(progress.metrics.samples) / max(seconds, 1e-9)
            self._bar.set_description_str(self._text(progress), refresh=False)
        self._last = (progress.step, progress.seconds)
        self._bar.update(progress.fraction - self._bar.n)

    def _text(self, progress: Progress) -> str:
        metrics = progress.metrics
        assert metrics is not None
        skipped = "  some updates left out" if float(metrics.skipped) else ""
        return (
            f"step {progress.step}  loss {float(metrics.loss):.5f}  {metrics.headline()}  "
            f"{self._rate / 1e6:.2f}M samples/s{skipped}"
        )

    def log_entry(self, progress: Progress) -> dict[str, float]:
        """One line of metrics.jsonl. Call it after `show`."""
        assert progress.metrics is not None
        means = {name: float(value) for name, value in vars(progress.metrics).items()}
        return {"step": progress.step, "seconds": progress.seconds, "samples_per_second": self._rate, **means}


class Interruption:
    """Whether SIGINT or SIGTERM has asked the run to stop; it then ends after the step it is in, and saves."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        return bool(self.signal)

    def exit_if_set(self) -> None:
        """Leave with the exit code that shells expect: 130 after SIGINT, 143 after SIGTERM."""
        if self.signal:
            print("interrupted: the run is saved; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + self.signal)


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second SIGINT stops at once."""
    state = Interruption()

    def note(number: int, _: object) -> None:
        if state.signal:
            raise KeyboardInterrupt
        state.signal = number

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
