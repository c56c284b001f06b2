"""Checkpoints: the state of a run on disk, by orbax, which makes a finished one visible in a single rename."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxngp.config import InputError, RunConfig
from jaxngp.console import warn
from jaxngp.device import default_placement
from jaxngp.records import environment
from jaxngp.refinement import blank, size_of
from jaxngp.training.loop import Progress, init_state
from jaxngp.training.state import TrainState

SCHEMA = 2
"""Changes whenever a checkpoint of before can no longer be read."""

_KEEP = 2
_NOTED = ("step", "seconds", "compile_seconds", "num_samples")  # of a Progress, beside its state


class Checkpoints:
    """The checkpoints of one workdir, for a `with` block. Saving is done when `save` returns."""

    def __init__(self, workdir: Path) -> None:
        import orbax.checkpoint as ocp  # here, since importing it takes longer than reading a scene

        self._ocp = ocp
        self._path = (workdir / "checkpoints").resolve()
        self._manager: Any = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> Any:
        if self._manager is None:
            options = self._ocp.CheckpointManagerOptions(
                max_to_keep=_KEEP, create=True, enable_async_checkpointing=False
            )
            self._manager = self._ocp.CheckpointManager(self._path, options=options)
        return self._manager

    def save(self, progress: Progress) -> None:
        """Save a run, unless this step is saved already. Raises InputError where it cannot be written.

        Non-finite parameters are not saved either: the checkpoint before them stays the newest.
        """
        if self.latest_step() == progress.step:
            return
        if not all(np.isfinite(np.asarray(array)).all() for array in jax.tree.leaves(progress.state.params)):
            raise InputError(f"step {progress.step} is not saved: its parameters are non-finite")
        noted = {name: getattr(progress, name) for name in _NOTED}
        note = {"schema": SCHEMA, "environment": environment(), **noted}
        items: dict[str, Any] = {"state": _without_refinement(progress.state)}
        if (learned := progress.state.refinement) is not None:
            note["refined"], items["refinement"] = list(size_of(learned)), learned
        args = self._ocp.args.Composite(
            **{name: self._ocp.args.StandardSave(item) for name, item in items.items()},
            progress=self._ocp.args.JsonSave(note),
        )
        manager = self._open()
        self._check_space(progress.state)
        try:
            manager.save(progress.step, args=args)
        except (ValueError, OSError) as error:
            raise self._unwritten(str(error).splitlines()[0]) from error

    def try_to_save(self, progress: Progress) -> None:
        """`save`, but a failure is only reported: the run goes on, and there is time to make room."""
        try:
            self.save(progress)
        except InputError as error:
            warn(str(error))

    def _check_space(self, state: TrainState) -> None:
        """Before anything is written: orbax's own report of a full disk is a screenful from several threads."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(replace(state, key=jax.random.key_data(state.key))))
        free = shutil.disk_usage(self._path).free
        if free < needed:
            raise self._unwritten(f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")

    def _unwritten(self, reason: str) -> InputError:
        last = self.latest_step()
        rest = "starts again" if last is None else f"goes on from step {last}"
        return InputError(
            f"{self._path}: could not write a checkpoint ({reason}); free some space; the same command then {rest}"
        )

    def latest_step(self) -> int | None:
        """The step of the newest finished checkpoint, or None."""
        return self._open().latest_step() if self._path.is_dir() else None

    def restore(self, config: RunConfig) -> Progress | None:
        """The newest checkpoint, or None where there is none. Raises InputError where it cannot be used."""
        step = self.latest_step()
        if step is None:
            return None
        ocp, manager = self._ocp, self._open()
        template = jax.eval_shape(lambda: init_state(config.train.seed, config=config))
        try:
            note = self._note(step)
            if note.get("schema") != SCHEMA:
                raise InputError(
                    f"{self._path / str(step)}: checkpoint schema {note.get('schema')}, this version reads {SCHEMA}; "
                    "use the version that wrote it, or another --workdir"
                )
            items = {"state": _without_refinement(template)}
            if sizes := note.get("refined"):
                items["refinement"] = jax.eval_shape(lambda: blank(*sizes, config=config))  # type: ignore[arg-type]
            places = default_placement().shapes(items)
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(place) for name, place in places.items()})
            restored = manager.restore(step, args=args)
            state = TrainState(**restored.state, refinement=restored.refinement if sizes else None)
        except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self._path / str(step)}: not a usable checkpoint ({reason}); remove this folder to go on from the "
                "one before it, or give --restart"
            ) from error
        return Progress(config=config, state=state, metrics=None, **{name: note[name] for name in _NOTED})

    def _note(self, step: int) -> dict[str, Any]:
        args = self._ocp.args.Composite(progress=self._ocp.args.JsonRestore())
        return self._open().restore(step, args=args).progress

    def environment(self) -> dict[str, Any]:
        """Device, versions and memory of the process that wrote the newest checkpoint."""
        step = self.latest_step()
        return environment() if step is None else self._note(step)["environment"]

    def restore_trained(self, config: RunConfig) -> Progress:
        """The newest checkpoint. Raises InputError where there is none."""
        progress = self.restore(config)
        if progress is None:
            raise InputError(f"{self._path}: no checkpoint; train first, with python -m jaxngp.train --workdir=...")
        return progress


def _without_refinement(state: TrainState) -> dict[str, Any]:
    """The rest of a state, in which a checkpoint of before there was one is equal to those without it."""
    return {name: value for name, value in vars(state).items() if name != "refinement"}
