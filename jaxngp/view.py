"""Look at a trained run in a browser.

The run may still be in training, here or on another machine that writes into the same folder: newer checkpoints are
shown as they come. To look while training, and to pause it, give --view to `python -m jaxngp.train` instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxngp import flags, runs
from jaxngp.config import InputError, NerfConfig
from jaxngp.console import interruption
from jaxngp.data import load_training
from jaxngp.evaluation import prepare
from jaxngp.runs import Run
from jaxngp.viewing.source import Source, history_of
from jaxngp.viewing.viewer import open_viewer

POLL_SECONDS = 2.0


def define_flags(values: flags.Flags) -> None:
    flags.define_workdir_flags(values)
    flags.define_view_flags(values)


def main(values: flags.Flags) -> None:
    run, config = flags.trained_nerf(values)
    with interruption() as stop:
        source = Source(
            config=config,
            workdir=run.workdir,
            cameras=run.cameras,
            transform=run.transform,
            read=lambda: prepare(load_training(config.scene), run.given_cameras, run.progress),
            history=lambda: history_of(run.workdir),
            stop=stop,
        )
        with open_viewer(source, host=values.view_host, port=values.view_port) as viewer:
            print(f"step {run.progress.step} of {run.workdir}; Ctrl-C ends")
            viewer.show(run.progress)
            for newer in newer_checkpoints(run, stop):
                print(f"step {newer.progress.step}: a newer checkpoint")
                viewer.show(newer.progress)


def newer_checkpoints(run: Run, stop: Callable[[], bool]) -> Iterator[Run]:
    """The run again, each time that its folder holds a newer checkpoint, until `stop()`."""
    looked = time.monotonic()
    while not stop():
        time.sleep(0.1)
        if time.monotonic() < looked + POLL_SECONDS:
            continue
        looked = time.monotonic()
        if runs.latest_step(run.workdir) in (None, run.progress.step):
            continue
        try:
            newer = runs.load(run.workdir, NerfConfig)
        except InputError:  # it was deleted meanwhile, for one newer still
            continue
        if newer.config.field != run.config.field or newer.config.sampler != run.config.sampler:
            raise InputError(f"{run.workdir}: holds another run now; start the viewer again")
        run = replace(newer, given_cameras=run.given_cameras)
        yield run


if __name__ == "__main__":
    flags.run("jaxngp.view", define_flags, main, __doc__)
