"""Command lines onto configs; the one module that knows absl.

Every command has flags of its own, none of which it ignores. What the user got wrong ends in one line and exit
code 2, never in a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import flags, logging

from jaxngp.config import (
    ImageConfig,
    InputError,
    LoopConfig,
    NerfConfig,
    RunConfig,
    SceneConfig,
    SdfConfig,
    apply_overrides,
    differences,
    from_json,
    to_json,
    to_plain,
)
from jaxngp.data import cache_dir, expand
from jaxngp.presets import PRESETS, SCENES, scene_config
from jaxngp.training.lock import sole_training
from jaxngp.training.report import write_json
from jaxngp.training.workdir import clear

Flags = flags.FlagValues
Group = TypeVar("Group", bound=SceneConfig | LoopConfig)
Loop = TypeVar("Loop", bound=LoopConfig)
Config = TypeVar("Config", bound=RunConfig)


COMMANDS = {
    NerfConfig: ("scene", "jaxngp.train"),
    ImageConfig: ("image", "jaxngp.train_image"),
    SdfConfig: ("sdf", "jaxngp.train_sdf"),
}
"""The kinds of runs: the group of the config that says what is learned, and the command that learns it."""


def run(
    module: str,
    define: Callable[[Flags], None],
    body: Callable[[Flags], None],
    summary: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line with the flags that `define` adds, call `body`, and exit with what that means."""
    values = Flags()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    define(values)
    try:
        rest = values(list(argv or sys.argv))[1:]
        if values.help:
            print(f"usage: python -m {module} [flags]\n\n{summary}\n\n{_help(values)}")
            return
        if rest:
            raise InputError(f"{rest[0]!r}: expected only flags, as in --seed=1; see --help")
        _prepare_jax()
        body(values)
    except (InputError, flags.Error) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(
            "out of memory on the device: lower sampler.num_samples and train.num_rays, or train.num_points, by "
            "--override, or make the images smaller"
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _fail(message: str) -> None:
    print(f"jaxngp: {message}", file=sys.stderr)
    sys.exit(2)


def _help(values: Flags) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        if flag.short_name == name:
            continue
        default = "" if flag.default in (None, "", []) else f" (default: {str(flag.default_as_str).strip(chr(39))})"
        text = textwrap.fill(f"{flag.help}{default}", 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append(f"  --{name}\n{text}")
    return "\n".join(lines)


def _prepare_jax() -> None:
    """Keep compiled programs between runs, and keep quiet about what is of no concern."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    logging.set_verbosity(logging.FATAL)  # orbax logs every step of a save, and the traceback of what it raises


# What each command takes.


def define_train_flags(values: Flags) -> None:
    """The flags of `python -m jaxngp.train`."""
    scenes = ", ".join(SCENES)
    flags.DEFINE_string(
        "scene", "bricks", f"One of {scenes}; or the path of a folder of views or a ray table.", flag_values=values
    )
    flags.DEFINE_enum(
        "preset", "auto", ["auto", *PRESETS], "auto is small on a CPU and base on a GPU.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Folder that holds the scene, looked at first.", flag_values=values)
    flags.DEFINE_integer("downscale", None, "Shrink the images by this factor.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("image_size", None, "Pixels per side of the built-in scene.", flag_values=values)
    define_loop_flags(values, workdir="runs/<scene>", example="sampler.num_samples=2**16")
    define_evaluation_flags(values)


def define_loop_flags(values: Flags, *, workdir: str, example: str) -> None:
    """The flags of everything that trains; `loop_config` reads them.

    workdir: the default, in words. example: of an override.
    """
    flags.DEFINE_string("workdir", None, f"Where everything is written; {workdir} if not given.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Of all randomness.", flag_values=values)
    flags.DEFINE_integer("max_steps", None, "Training steps.", flag_values=values)
    flags.DEFINE_float(
        "max_seconds", None, "Seconds of training, compilation excluded; 0 is no limit.", flag_values=values
    )
    flags.DEFINE_integer(
        "log_every", None, "Steps from one line of metrics.jsonl to the next, at least.", flag_values=values
    )
    flags.DEFINE_bool(
        "deterministic",
        None,
        "On a GPU: equal bits in every run with one seed, about ten times slower. A CPU gives them anyway.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "override",
        [],
        f"Set any field of the config: --override={example}. May be repeated.",
        flag_values=values,
    )
    flags.DEFINE_bool("restart", False, "Throw away what the workdir holds and train anew.", flag_values=values)


def define_workdir_flags(values: Flags) -> None:
    """The flags of the commands that read a trained workdir."""
    flags.DEFINE_string("workdir", None, "Of the training run.", required=False, flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder that holds the scene, if it has moved.", flag_values=values)


def define_evaluation_flags(values: Flags) -> None:
    """The flags of everything that evaluates."""
    splits = ["auto", "test", "val", "train", "held-out"]
    flags.DEFINE_enum("eval_split", "auto", splits, "auto is test, else val, else every 8th view.", flag_values=values)
    flags.DEFINE_integer(
        "eval_views", 0, "Evaluate this many evenly spaced views; 0 is all.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_enum(
        "background", "white", ["white", "black"], "Behind transparent pixels, in evaluation.", flag_values=values
    )


def define_render_flags(values: Flags) -> None:
    """The flags of `python -m jaxngp.render`."""
    define_workdir_flags(values)
    paths = ["orbit", "train", "val", "test", "held-out"]
    flags.DEFINE_enum("path", "orbit", paths, "An orbit, or the poses of a split.", flag_values=values)
    flags.DEFINE_integer(
        "frames", 0, "Frames of the orbit, or evenly spaced poses of the split; 0 is 60, or all.", 0, flag_values=values
    )
    flags.DEFINE_integer("width", 0, "Of a frame in pixels; 0 keeps the shape of the images.", 0, flag_values=values)
    flags.DEFINE_integer("height", 0, "Likewise.", 0, flag_values=values)
    flags.DEFINE_float("fps", 20.0, "Frames per second of the animation.", 0.1, 50.0, flag_values=values)
    flags.DEFINE_enum("animation", "gif", ["gif", "webp"], "Format of the animation.", flag_values=values)
    flags.DEFINE_enum("background", "white", ["white", "black"], "Behind what is transparent.", flag_values=values)


def train_config(values: Flags) -> NerfConfig:
    """Dataclass defaults < preset < flags that were given < overrides."""
    preset = values.preset
    if preset == "auto":
        backend = jax.default_backend()
        preset = "small" if backend == "cpu" else "base"
        print(f"preset {preset}, since jax runs on {backend}; --preset chooses another")
    config = PRESETS[preset]
    scene = _given(scene_config(values.scene), values, ("data_dir", "downscale", "image_size"))
    if values.image_size is not None and scene.name != "bricks":
        raise InputError("--image_size is the size of the built-in scene; use --downscale for any other")
    if scene.data_dir:
        scene = replace(scene, data_dir=os.path.realpath(expand(scene.data_dir)))
    if scene.name not in SCENES:  # a path: evaluation and rendering may start from another folder
        scene = replace(scene, name=os.path.realpath(expand(scene.name)))
    config = replace(config, scene=scene, train=loop_config(config.train, values))
    return apply_overrides(config, values.override)


def loop_config(train: Loop, values: Flags) -> Loop:
    """`train` with the flags of `define_loop_flags` that were given, but for the overrides."""
    if values.max_steps is not None and values.max_seconds is None:
        train = replace(train, max_seconds=0.0)  # who asks for steps means to get them
    if values.max_seconds and values.max_steps is None:
        train = replace(train, max_steps=10**7)  # and who asks for seconds, those
    return _given(train, values, ("seed", "max_steps", "max_seconds", "log_every", "deterministic"))


def _given(config: Group, values: Flags, names: Sequence[str]) -> Group:
    """A group of the config with those of its fields for which a flag was given."""
    given: dict[str, Any] = {name: values[name].value for name in names if values[name].value is not None}
    return replace(config, **given)


def read_config(workdir: Path, kind: type[Config]) -> Config:
    """The config, of type `kind`, that a training run left in its workdir."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; give the --workdir of a run of python -m jaxngp.train")
    try:
        text = path.read_text(encoding="utf-8")
        _check_kind(text, kind)
        return from_json(text, kind)
    except _OtherKindError as error:
        raise InputError(f"{path}: {error}") from None
    except (InputError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {error}; it was written by another version or edited: give another --workdir, or train anew "
            "with --restart"
        ) from None


class _OtherKindError(InputError):
    """A workdir of another command's run."""


def _check_kind(text: str, kind: type) -> None:
    """Raises InputError where a config is clearly that of another command, by the group that says what is learned."""
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):  # whoever reads it will say so
        return
    for other, (group, command) in COMMANDS.items():
        if isinstance(held, dict) and group in held and other is not kind:
            raise _OtherKindError(f"holds a run of python -m {command}; give another --workdir")


def trained_config(values: Flags) -> tuple[Path, NerfConfig]:
    """The workdir of a command that reads one, and its config with the flags that were given."""
    if not values.workdir:
        raise InputError("--workdir is missing: give the folder of a run of python -m jaxngp.train")
    workdir = Path(values.workdir)
    config = read_config(workdir, NerfConfig)
    return workdir, replace(config, scene=_given(config.scene, values, ("data_dir",)))


@contextlib.contextmanager
def training_in(workdir: Path, config: RunConfig, *, restart: bool) -> Iterator[None]:
    """Within the block this process alone trains in the workdir, whose config.json is `config`; it is printed too.

    restart: throw away what a run left there. Raises InputError where the workdir holds a run with another config, and
    where another process trains in it.
    """
    with sole_training(workdir):
        if restart:
            clear(workdir)
        check_same_config(workdir, config)
        write_json(workdir / "config.json", to_plain(config))
        print(to_json(config), end="")
        yield


def check_same_config(workdir: Path, config: RunConfig) -> None:
    """Raises InputError if a workdir holds a run with another config; where the data lies is no part of a run."""
    if not (workdir / "config.json").exists():
        return
    free = ("scene.data_dir:", "train.checkpoint_seconds:", "train.log_every:", "train.calls_in_flight:")
    changes = [line for line in differences(read_config(workdir, type(config)), config) if not line.startswith(free)]
    if changes:
        raise InputError(
            f"{workdir} holds a run with another config ({'; '.join(changes)}): give another --workdir, "
            "or --restart to throw that run away"
        )
