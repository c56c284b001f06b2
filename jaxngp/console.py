"""The terminal side of training: progress bar, warnings, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxngp.config import RunConfig
from jaxngp.refinement import divergence
from jaxngp.training.loop import Progress, task_of


def bar_interval() -> float:
    """Seconds between two drawings of a progress bar: a terminal wants it smooth, a log file wants few lines."""
    return 0.2 if sys.stderr.isatty() else 10.0


def warn(*messages: str) -> None:
    """Print warnings to stderr without breaking a progress bar."""
    for message in messages:
        tqdm.write(f"jaxngp: warning: {message}", file=sys.stderr)


class TrainingWarnings:
    """Training warnings, each reported once per run."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._said: set[str] = set()
        self._last_step = 0

    def about(self, progress: Progress) -> list[str]:
        """Warnings that are new, of the steps since the last call."""
        metrics, step = progress.metrics, progress.step
        assert metrics is not None
        task, config = task_of(self._config), self._config
        found = task.training_warnings(metrics, step=step, finished=progress.finished, config=config)
        if (learned := progress.state.refinement) is not None:
            found |= divergence(learned, step=step, config=config)  # type: ignore[arg-type]
        if skipped := round(float(metrics.skipped) * (step - self._last_step)):
            found["skipped"] = (
                f"step {step}: {skipped} updates were skipped, since the loss or its gradient was non-finite; "
                "metrics.jsonl has the share of skipped updates"
            )
        self._last_step = step
        new = [text for name, text in found.items() if name not in self._said]
        self._said |= set(found)
        return new


class ProgressBar:
    """How much of the budget is spent, with step, loss, PSNR, samples per second and time left.

    Reading the numbers waits for the device; it is done once per dispatch.
    """

    def __init__(self, *, hidden: bool = False) -> None:
        self._bar: Any = None
        self._hidden = hidden
        self._last: tuple[int, float] = (0, 0.0)  # step, seconds
        self._rate = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands: what is printed next starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Draw where a run stands."""
        if self._bar is None:
            if not self._hidden:
                print(f"compiled in {progress.compile_seconds:.1f} s", file=sys.stderr)
            layout = "{percentage:3.0f}%|{bar:24}| {desc} [{elapsed}, {remaining} left]"
            options: Any = {"bar_format": layout, "mininterval": bar_interval(), "disable": self._hidden}
            self._bar = tqdm(total=1.0, initial=progress.fraction, **options)
        if progress.metrics is not None:
            steps, seconds = progress.step - self._last[0], progress.seconds - self._last[1]
            self._rate = steps * float(progress.metrics.samples) / max(seconds, 1e-9)
            self._bar.set_description_str(self._text(progress), refresh=False)
        self._last = (progress.step, progress.seconds)
        self._bar.update(progress.fraction - self._bar.n)

    def _text(self, progress: Progress) -> str:
        metrics = progress.metrics
        assert metrics is not None
        skipped = "  some updates skipped" if float(metrics.skipped) else ""
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

    def set(self) -> None:
        """Stop as after SIGTERM, since another process of the run was asked to."""
        self.signal = self.signal or signal.SIGTERM

    def exit_if_set(self) -> None:
        """Leave with the exit code that shells expect: 130 after SIGINT, 143 after SIGTERM."""
        if self.signal:
            print("interrupted: the run is saved; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + self.signal)


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second SIGINT stops at once.

    Outside the main thread, where Python delivers no signals, no handler is installed; the caller stops the loop.
    """
    state = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

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
