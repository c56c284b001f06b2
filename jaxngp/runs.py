"""Training runs in their folders: create, resume, extend, log and save one; open a trained one.

A workdir holds config.json (the resolved config), scene.json (a fingerprint of the data and, of a NeRF, names and
cameras of the views), metrics.jsonl, checkpoints/ and what the commands write beside them.

    with runs.training_in("runs/lego", config) as run:
        for progress in train(config, images, resume=run.resume):
            run.record(progress)

    run = runs.load("runs/lego")
    picture = run.render(run.cameras[0]).rgb  # (H, W, 3)
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import Cameras, PosedImages
from jaxngp.checkpoints import Checkpoints
from jaxngp.compositing import RenderOutput
from jaxngp.config import (
    IDENTITY,
    ImageConfig,
    InputError,
    NerfConfig,
    Role,
    RunConfig,
    SdfConfig,
    differences,
    from_json,
    to_plain,
)
from jaxngp.console import ProgressBar, TrainingWarnings, interruption, warn
from jaxngp.data import Fingerprint, SceneTransform, Split, changed, fingerprint
from jaxngp.evaluation import COLOURS, EvalBackground
from jaxngp.lenses import MODELS, Lens
from jaxngp.occupancy import OccupancyGrid
from jaxngp.processes import any_of, gather, is_first, wait_for_all
from jaxngp.records import append_jsonl, keep_lines, write_json
from jaxngp.refinement import refined_cameras
from jaxngp.rendering import render_view
from jaxngp.training.loop import Progress

KINDS: dict[str, tuple[type, str]] = {
    "scene": (NerfConfig, "jaxngp.train"),
    "image": (ImageConfig, "jaxngp.train_image"),
    "sdf": (SdfConfig, "jaxngp.train_sdf"),
}
"""The kinds of runs, by the group of the config that says what is learned: its type, and the command that learns it."""

PICTURES = ("comparison.png", "reconstruction.png", "sheet.png", "surface.png", "surface.ply", "surface.obj")
"""What `train_image` and `train_sdf` write into workdir/pictures."""

LENS_ARRAYS = ("coefficients", "reach", "stretch")

# Training.


class TrainingRun:
    """A run that is being trained: where it starts, and what to do with each `Progress` that `train` yields."""

    def __init__(self, workdir: Path, config: RunConfig, checkpoints: Checkpoints, bar: ProgressBar, stop: Any) -> None:
        self.workdir, self.config = workdir, config
        self.resume: Progress | None = checkpoints.restore(config)
        self._checkpoints, self._bar, self._interrupted = checkpoints, bar, stop
        self._log, self._warnings = workdir / "metrics.jsonl", TrainingWarnings(config)
        self._logged = self.resume.step if self.resume else 0
        self._saved: float | None = None
        self.interrupted = False  # whether a signal has asked the run to stop; it was saved before this became True
        if is_first():
            keep_lines(self._log, lambda entry: entry["step"] <= self._logged and self.resume is not None)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent already."""
        return self.resume is not None and self.resume.finished

    def record(self, progress: Progress) -> None:
        """Show, log and save where the run stands, and warn of what looks wrong."""
        self._saved = self._saved or time.monotonic()  # compiling does not count
        due = time.monotonic() - self._saved > self.config.train.checkpoint_seconds
        # Asked once: a signal that comes later is seen after the next steps.
        interrupted, due = any_of(self._interrupted(), due)
        ends = progress.finished or interrupted
        if is_first():
            self._show(progress, ends)
        if ends:
            self._bar.close()
            self._checkpoints.save(progress)
            self.interrupted = interrupted
            if interrupted:
                self._interrupted.set()
        elif due:
            self._checkpoints.try_to_save(progress)
            self._saved = time.monotonic()

    def _show(self, progress: Progress, ends: bool) -> None:
        self._bar.show(progress)
        if progress.metrics is not None:
            if ends or progress.step >= self._logged + self.config.train.log_every:
                append_jsonl(self._log, self._bar.log_entry(progress))
                self._logged = progress.step
            warn(*self._warnings.about(progress))

    def save(self, progress: Progress) -> None:
        """Save a checkpoint now. Raises InputError where it cannot be written."""
        self._checkpoints.save(progress)

    def asked_to_stop(self) -> bool:
        """Whether a signal has asked the run to stop, which `record` will find next."""
        return bool(self._interrupted())

    def trained_on(self) -> dict[str, Any]:
        """Device, versions and memory of the process that wrote the newest checkpoint."""
        return self._checkpoints.environment()

    def exit_if_interrupted(self) -> None:
        """Leave with the exit code that shells expect: 130 after SIGINT, 143 after SIGTERM."""
        self._interrupted.exit_if_set()


@contextlib.contextmanager
def training_in(
    workdir: Path | str,
    config: RunConfig,
    *,
    data: Split | Fingerprint | None = None,
    restart: bool = False,
    extend: bool = False,
    quiet: bool = False,
) -> Iterator[TrainingRun]:
    """Lock the workdir for training and write config.json; yields the run.

    data: the views that a NeRF learns from, or the fingerprint of what else is learned, for scene.json. By it a run is
    recognised whose scene has moved, and a change of what it is trained on is warned of. restart: remove what a run
    left there. extend: a run that is there may get a larger budget; its schedule is then that of the new budget,
    entered where the run stands, so a rate that had decayed rises again. quiet: no progress bar. Raises InputError
    where the workdir holds a run with another config, and where another process trains in it. Of several processes
    that train together the first holds the lock and writes; each gives its own views.
    """
    workdir = Path(workdir).expanduser()
    with _sole_training(workdir) if is_first() else contextlib.nullcontext():
        if restart and is_first():
            clear(workdir)
        wait_for_all("the workdir is as training finds it")
        scene, before = _describe(data) if data else {}, _fingerprint_before(workdir)
        changes = changed(before, scene["fingerprint"]) if data and before else None
        check_same_config(workdir, config, extend=extend, same_data=bool(data and before and not changes))
        if changes and (old := _another_source(workdir, config)):
            raise InputError(
                f"{workdir} holds a run of other data of the same name, {old} ({changes}): give another --workdir, "
                "or --restart to delete that run"
            )
        if changes:
            warn(
                f"{workdir} holds a run that was trained on other data: {changes}. It continues on the current data; "
                "--restart trains from scratch"
            )
        wait_for_all("all have looked at the workdir")
        if data and is_first():
            write_json(workdir / "scene.json", scene)
        if is_first():
            write_json(workdir / "config.json", to_plain(config))
        with Checkpoints(workdir) as checkpoints, interruption() as stop, ProgressBar(hidden=quiet) as bar:
            yield TrainingRun(workdir, config, checkpoints, bar, stop)


def _another_source(workdir: Path, config: RunConfig) -> str | None:
    """The path of what the run in a workdir was trained on, if that is still there and is not what `config` names."""
    old, new = (_source(c) for c in (read_config(workdir, type(config)), config))
    return old if old != new and old and Path(old).exists() else None


def _source(config: RunConfig) -> str:
    """The path or the name of what is learned."""
    group = next(getattr(config, name) for name in KINDS if hasattr(config, name))
    return group.path if hasattr(group, "path") else group.name


def check_same_config(workdir: Path, config: RunConfig, *, extend: bool = False, same_data: bool = False) -> None:
    """Raises InputError if a workdir holds a run with another config, or another budget that does not extend it.

    same_data: the run was trained on the data that the config names now, so another path is no other run.
    """
    if not (workdir / "config.json").exists():
        return
    old = read_config(workdir, type(config))
    identity = [role for role in IDENTITY if not (same_data and role is Role.LOCATION)]
    changes, budget = differences(old, config, identity), differences(old, config, (Role.BUDGET,))
    if changes:
        raise InputError(
            f"{workdir} holds a run with another config ({'; '.join(changes)}): give another --workdir, "
            "or --restart to delete that run"
        )
    if budget and not extend:
        raise InputError(
            f"{workdir} holds a run with another budget ({'; '.join(budget)}): give --extend to train it on with the "
            "learning rates of the new budget, another --workdir, or --restart to delete that run"
        )


def _fingerprint_before(workdir: Path) -> dict[str, Any] | None:
    """The fingerprint of the data that the run in a workdir was trained on, if it has one."""
    path = workdir / "scene.json"
    return _read_json(path).get("fingerprint") if path.exists() else None


def _describe(data: Split | Fingerprint) -> dict[str, Any]:
    """What scene.json holds."""
    if not isinstance(data, Split):
        return {"fingerprint": data}
    plain: dict[str, Any] = {"fingerprint": fingerprint(data), "transform": data.transform.to_plain()}
    if not isinstance(data.images, PosedImages):
        return plain
    plain |= {"views": list(data.views), "cameras": _plain_cameras(data.images.cameras)}
    parts = [json.loads(part.tobytes()) for part in gather(np.frombuffer(json.dumps(plain).encode(), np.uint8))]
    return functools.reduce(_joined, parts)


def _joined(a: Any, b: Any, name: str = "") -> Any:
    """What scene.json holds of the views of two processes: lists of one entry a view follow each other."""
    if name == "transform" or isinstance(a, str):
        return a
    return a + b if isinstance(a, list) else {key: _joined(a[key], b[key], key) for key in a}


def _plain_cameras(cameras: Cameras) -> dict[str, Any]:
    plain = {name: np.asarray(array).tolist() for name, array in vars(cameras).items() if name != "lens"}
    if (lens := cameras.lens) is not None:
        arrays = {name: np.asarray(getattr(lens, name)).tolist() for name in LENS_ARRAYS}
        plain["lens"] = {"model": lens.model, **arrays}
    return plain


def remove_pictures(workdir: Path) -> None:
    """Remove PICTURES, and their folder if it is then empty: it may contain files of the user."""
    folder = workdir / "pictures"
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def clear(workdir: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    remove_pictures(workdir)
    written = ("config.json", "scene.json", "metrics.jsonl", "cameras.json", "cameras.png", "curve.jsonl")
    for name in (*written, "summary.json", "report.html"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "exports", "novel_views", "renders", "tensorboard"):
        shutil.rmtree(workdir / name, ignore_errors=True)


@contextlib.contextmanager
def _sole_training(workdir: Path) -> Iterator[None]:
    """Hold the workdir's training lock. Raises InputError if another process holds it.

    A lock on the file `.lock`, released by the operating system however the process ends. Where the
    platform or the file system has no locks, nothing is refused.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            file.seek(0)
            raise InputError(
                f"{workdir}: another process is training in it (process {file.read().strip() or 'unknown'}); wait for "
                "it, end it, or give another --workdir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(descriptor: int) -> bool:
    """Whether the lock was free; it ends with the file."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


# Opening.


@dataclass(frozen=True)
class Run:
    """A trained run, as `load` opens it."""

    workdir: Path
    config: Any  # NerfConfig, ImageConfig or SdfConfig
    progress: Progress  # where training stands
    trained_on: dict[str, Any]  # device, versions and memory
    given_cameras: Cameras | None  # of the training views, scene units; None where the run has none
    transform: SceneTransform = SceneTransform()  # from the units of the scene's files to scene units

    @functools.cached_property
    def field(self) -> Any:
        """What was learned: a `RadianceField`, an `ImageField` or a `DistanceField`."""
        return self.progress.field

    @functools.cached_property
    def cameras(self) -> Cameras | None:
        """Of the training views, scene units, refined where they were; None where the run has none."""
        learned = self.progress.state.refinement
        if learned is None or self.given_cameras is None:
            return self.given_cameras
        return refined_cameras(self.given_cameras, learned, refine=self.config.refine)

    @property
    def occupancy(self) -> OccupancyGrid | None:
        """The occupancy grid of a NeRF."""
        return self.progress.state.occupancy

    def render(
        self, camera: Cameras, pose: jax.Array | np.ndarray | None = None, *, background: EvalBackground = "white"
    ) -> RenderOutput:
        """A view of the scene as numpy arrays: rgb (H, W, 3), opacity (H, W), depth (H, W).

        camera: a single one, such as `run.cameras[0]`. pose (3, 4): c2w in scene units, instead of the camera's own.
        """
        if not isinstance(self.config, NerfConfig):
            raise InputError(f"{self.workdir} is not a run of a radiance field: call run.field(position) instead")
        camera = camera if pose is None else camera.replace(c2w=jnp.asarray(pose, jnp.float32))  # type: ignore[attr-defined]
        colour = jnp.full(3, COLOURS[background], jnp.float32)
        return render_view(self.field, camera, self.occupancy, colour, sampler=self.config.sampler)


def load(workdir: Path | str, kind: type | None = None) -> Run:
    """Open a trained run, of the config type `kind` if one is given. Raises InputError where it cannot be used."""
    workdir = Path(workdir).expanduser()
    config = read_config(workdir, kind)
    with Checkpoints(workdir) as checkpoints:
        progress, trained_on = checkpoints.restore_trained(config), checkpoints.environment()
    scene = workdir / "scene.json"
    return Run(workdir, config, progress, trained_on, _read_cameras(scene), _read_transform(scene))


@dataclass(frozen=True)
class Runs:
    """B trained radiance fields of one shape, as `load_many` opens them; `jax.vmap` over `field` is over all."""

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    field: Any  # (B, ...)
    occupancy: OccupancyGrid | None  # (B, ...)


def load_many(folder: Path | str) -> Runs:
    """Open all runs in the folders of a folder, by name, as one stacked pytree on the host.

    Raises InputError where there is none, or where one has a field or a grid of another shape than the first.
    """
    folder = Path(folder).expanduser()
    workdirs = sorted(path.parent for path in folder.glob("*/config.json") if latest_step(path.parent) is not None)
    if not workdirs:
        raise InputError(f"{folder}: holds no folders of trained runs; give the --workdir of experiments.sweep")
    found = [load(workdir, NerfConfig) for workdir in workdirs]
    trees = [(run.field, run.occupancy) for run in found]
    kinds = [(jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]) for tree in trees]
    if other := next((run for run, kind in zip(found, kinds, strict=True) if kind != kinds[0]), None):
        changes = differences(found[0].config, other.config, (Role.PROGRAM,)) or ["another shape"]
        raise InputError(
            f"{other.workdir}: does not stack with {found[0].workdir} ({'; '.join(changes)}); open it with load"
        )
    field, occupancy = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)
    return Runs(tuple(workdir.name for workdir in workdirs), tuple(found), field, occupancy)


def latest_step(workdir: Path) -> int | None:
    """The step of the newest finished checkpoint in a workdir, or None."""
    folder = workdir / "checkpoints"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _read_cameras(path: Path) -> Cameras | None:
    plain = _read_json(path).get("cameras") if path.exists() else None
    if plain is None:
        return None
    names = ("c2w", "focal_xy", "centre_xy", "size")
    try:
        arrays: Any = {n: np.asarray(plain[n], np.int32 if n == "size" else np.float32) for n in names}
        return Cameras(**arrays, lens=_read_lens(plain.get("lens")))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; the file was edited: restore it, or train from scratch") from None


def _read_transform(path: Path) -> SceneTransform:
    plain = _read_json(path).get("transform") if path.exists() else None
    try:
        return SceneTransform.from_plain(plain) if plain else SceneTransform()
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: transform: {error}; the file was edited: restore it, or train anew") from None


def _read_lens(plain: dict[str, Any] | None) -> Lens | None:
    if plain is None:  # pinholes
        return None
    if plain["model"] not in MODELS:
        raise ValueError(f"lens.model = {plain['model']!r}")
    arrays: Any = {name: np.asarray(plain[name], np.float32) for name in LENS_ARRAYS}
    return Lens(**arrays, model=plain["model"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); restore it, or train from scratch with --restart"
        ) from None
    if not isinstance(plain, dict):
        raise InputError(f"{path}: expected a JSON object; restore it, or give --restart")
    return plain


def read_config(workdir: Path, kind: type | None = None) -> Any:
    """The config of the run in a workdir, which must be of the type `kind` where one is given."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; give the --workdir of a run of python -m jaxngp.train")
    plain = _read_json(path)
    found, command = next((KINDS[group] for group in KINDS if group in plain), (kind or NerfConfig, ""))
    if kind and found is not kind:
        raise InputError(f"{path}: holds a run of python -m {command}; give another --workdir")
    try:
        return from_json(path.read_text(encoding="utf-8"), found)
    except (InputError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {error}; it was written by another version or edited: give another --workdir, or --restart to "
            "delete that run"
        ) from None
