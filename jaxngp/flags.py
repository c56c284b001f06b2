"""Command lines onto configs; the one module that knows absl.

Every command has flags of its own, none of which it ignores. Errors in user input end in one line and exit
code 2, never in a traceback.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

import jax
from absl import flags, logging

from jaxngp import processes, runs
from jaxngp.config import (
    Config,
    Declared,
    InputError,
    LoopConfig,
    NerfConfig,
    RunConfig,
    SceneConfig,
    apply_overrides,
    declared,
    field_help,
)
from jaxngp.data import Split, cache_dir, expand
from jaxngp.data.colmap import CAMERA_MODELS
from jaxngp.data.motion import EXHAUSTIVE_UP_TO
from jaxngp.device import placed_on
from jaxngp.presets import PRESET_HELP, PRESETS, SCENES, scene_config, suited

Flags = flags.FlagValues
Group = TypeVar("Group", bound=SceneConfig | LoopConfig)
Loop = TypeVar("Loop", bound=LoopConfig)
Run = TypeVar("Run", bound=RunConfig)
Options = TypeVar("Options", bound=Config)


WIDTH, COLUMN = 120, 42
"""Of a line of --help, and of where its second column starts."""


def run(
    module: str,
    define: Callable[[Flags], None],
    body: Callable[[Flags], None],
    summary: str,
    argv: Sequence[str] | None = None,
    *,
    positional: str = "",
) -> None:
    """Parse the command line with the flags that `define` adds, call `body`, and exit with what that means.

    positional: the flag that a first argument without a name sets.
    """
    values = Flags()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    define(values)
    try:
        rest = values(list(argv or sys.argv))[1:]
        if values.help:
            argument = f" [{positional.upper()}]" if positional else ""
            print(f"usage: python -m {module}{argument} [flags]\n\n{summary}\n\n{_help(values)}")
            return
        if rest and positional:
            values[positional].parse(rest.pop(0))
        if rest:
            raise InputError(f"{rest[0]!r}: expected only flags, as in --seed=1; see --help")
        _prepare_jax()
        _run_on_devices(body, values)
    except (InputError, flags.Error) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        processes.leave(128 + signal.SIGINT)
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
    processes.leave(2)


def _run_on_devices(body: Callable[[Flags], None], values: Flags) -> None:
    """body(values) on the devices that --mesh names, together with the processes that the flags name."""
    if "num_processes" in values:
        _join_processes(values)
    given = next((values[name].value for name in values if isinstance(values[name], _MeshFlag)), None)
    mesh = given or ("one" if processes.count() == 1 else "auto")
    with contextlib.nullcontext() if mesh == "one" else placed_on(mesh):
        try:
            body(values)
        except Exception as error:
            if message := processes.ended_elsewhere(error):
                raise InputError(message) from None
            if processes.count() == 1 or isinstance(error, InputError | OSError):
                raise
            traceback.print_exception(error)
            processes.leave(1)


def _join_processes(values: Flags) -> None:
    given = {name: values[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if values.cluster and len(missing) < 3:
        raise InputError("--cluster finds the address and the numbers by itself: leave the others away")
    if not values.cluster and missing and len(missing) < 3:
        raise InputError(f"--{missing[0]} is missing: each process needs --{', --'.join(given)}")
    if values.cluster or not missing:
        processes.start(given["coordinator_address"], given["num_processes"], given["process_id"])


def _help(values: Flags) -> str:
    """Every flag, by groups where there are any, and every field that --override can set."""
    lines, fields, group = ["flags:"], [], ""
    names = [name for name in values if values[name].short_name != name]
    for of, name in sorted((getattr(values[name], "group", ""), name) for name in names):
        if of != group:
            lines, group = [*lines, "", f"{of}:"], of
        flag = values[name]
        default = "" if flag.default in (None, "", []) else f" (default: {str(flag.default_as_str).strip(chr(39))})"
        lines += _row(f"--{name}", f"{flag.help}{default}")
        if isinstance(flag, _PresetFlag):
            lines += [line for preset, text in flag.presets.items() for line in _row(f"  {preset}", text)]
        if isinstance(flag, _OverrideFlag):
            fields = ["", "fields of the config, with their values on a CPU without any flag but --preset:"]
            for left, text in field_help(flag.config(values)):
                fields += _row(left, text) if "=" in left else ["", *textwrap.wrap(f"{left}: {text}", WIDTH)]
    return "\n".join(lines + fields)


def _row(left: str, text: str) -> list[str]:
    """Lines with `left` in the first column and the text in the second."""
    lines = [f"{'':<{COLUMN}}{line}" for line in textwrap.wrap(text, WIDTH - COLUMN)]
    if len(left) > COLUMN - 4:
        return [f"  {left}", *lines]
    return [f"  {left:<{COLUMN - 2}}{lines[0].lstrip()}", *lines[1:]]


def _prepare_jax() -> None:
    """Cache compiled programs between runs, and silence orbax's logging."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    logging.set_verbosity(logging.FATAL)  # orbax logs every step of a save, and the traceback of what it raises


# Kinds of flags.


class _PathParser(flags.ArgumentParser):
    """A path, as text, with its ~ replaced: a shell leaves that of --flag=~/path as it is."""

    def parse(self, argument: str) -> str:
        return str(expand(argument)) if argument.startswith("~") else argument


class _OverrideFlag(flags.MultiFlag):
    """--override. `config(values)` has the values with which --help lists the fields of the config."""

    def __init__(self, config: Callable[[Flags], Config]) -> None:
        super().__init__(flags.ArgumentParser(), flags.ArgumentSerializer(), "override", [], "")
        self.help = "Set a field of the config, one of those below: --override=path=value. May be repeated."
        self.config = config


class _MeshFlag(flags.Flag):
    """--mesh."""


class _PresetFlag(flags.EnumFlag):
    """--preset. `presets` says in a line what each is; `gpu` is the one for a GPU."""

    def __init__(self, presets: dict[str, str], gpu: str) -> None:
        text = f"auto is small on a CPU and {gpu} on a GPU."
        super().__init__("preset", "auto", text, ["auto", *presets])
        self.presets, self.gpu = presets, gpu


def define_path(values: Flags, name: str, default: str | None, text: str) -> None:
    """A flag whose value is a path, as text."""
    flags.DEFINE(_PathParser(), name, default, text, values, flags.ArgumentSerializer())


def define_preset(values: Flags, presets: dict[str, str], *, gpu: str) -> None:
    """--preset, which `chosen_preset` reads. presets: what each is, by name. gpu: that for a GPU; small is a CPU's."""
    flags.DEFINE_flag(_PresetFlag(presets, gpu), values)


def chosen_preset(values: Flags, *, say: bool = True) -> str:
    """The preset that --preset names, or the one for the device, which is then said."""
    if values.preset != "auto":
        return values.preset
    flag: Any = values["preset"]
    backend = jax.default_backend()
    preset = "small" if backend == "cpu" else flag.gpu
    if say:
        print(f"preset {preset}, since jax runs on {backend}; --preset chooses another")
    return preset


def _define_fields(
    values: Flags,
    group: type[Config],
    names: Sequence[str],
    note: Callable[[Declared], str] = lambda _: "",
    title: Callable[[Declared], str] = lambda _: "",
) -> None:
    """Flags that set fields of a config; None where they are not given. note: what else to say of each.

    title: the heading in --help that each is listed under.
    """
    define: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    for field in declared(group):
        if field.name in names:
            text = f"{field.doc[0].upper()}{field.doc[1:]}. {note(field)}".strip()
            if choices := [choice for choice in get_args(field.kind) if isinstance(choice, str)]:
                flags.DEFINE_enum(field.name, None, choices, text, flag_values=values)
            else:
                define[field.kind](field.name, None, text, flag_values=values)
            setattr(values[field.name], "group", title(field))  # noqa: B010, which absl does not declare


# What each command takes.

REFINED = ("poses", "focal", "lens", "exposure")
RENDER_LAYERS = ("colour", "rgba", "depth", "depth16", "normals")
_SCENE_FLAGS = ("downscale", "image_size", "hold_out_every", "scale", "up")
_LOOP_FLAGS = ("seed", "max_steps", "max_seconds", "log_every", "deterministic")


def define_mesh_flag(values: Flags, name: str = "mesh") -> None:
    """--mesh, of everything that several devices can share; `run` reads it, whatever its name."""
    text = (
        "Devices that share the work: one, the default; auto, all that jax has, the default of several processes; or "
        "rays:4, four of them."
    )
    flags.DEFINE_flag(_MeshFlag(flags.ArgumentParser(), flags.ArgumentSerializer(), name, None, text), values)


def define_process_flags(values: Flags) -> None:
    """The flags of everything that several processes can share; `run` reads them."""
    text = "host:port of process 0, the same for all processes, which then share the work with all of their devices."
    flags.DEFINE_string("coordinator_address", None, text, flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes share the work.", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "The number of this process, from 0 on.", 0, flag_values=values)
    text = "Several processes that Slurm, Open MPI or Kubernetes started, which jax then finds by itself."
    flags.DEFINE_bool("cluster", False, text, flag_values=values)


def define_train_flags(values: Flags) -> None:
    """The flags of `python -m jaxngp.train`."""
    define_preset(values, PRESET_HELP, gpu="base")
    define_scene_flags(values)
    define_loop_flags(
        values, workdir="runs/<scene>", config=lambda values: PRESETS.get(values.preset, PRESETS["small"])
    )
    define_evaluation_flags(values)
    define_process_flags(values)
    text = (
        "What of the cameras is learned with the scene: poses, focal (and the principal point), lens, exposure (and "
        "white balance), separated by commas. Cameras are taken as they are by default."
    )
    flags.DEFINE_list("refine", [], text, flag_values=values)
    flags.DEFINE_bool(
        "view", False, "Serve a viewer for the browser while training, and afterwards.", flag_values=values
    )
    define_view_flags(values)


def define_scene_flags(values: Flags) -> None:
    """The flags that say which scene, and where it lies; `chosen_scene` reads them."""
    scenes = ", ".join(SCENES)
    define_path(values, "scene", "bricks", f"One of {scenes}; or the path of a folder of views or a ray table.")
    define_path(values, "data_dir", None, "The folder of the scene, or one that contains it.")
    _define_fields(values, SceneConfig, _SCENE_FLAGS)
    text = "A box that holds the scene, x,y,z of its lower and its upper corner, in the coordinates of the source."
    flags.DEFINE_list("aabb", None, text, flag_values=values)


def define_loop_flags(values: Flags, *, workdir: str, config: Callable[[Flags], Config], mesh: str = "mesh") -> None:
    """The flags of everything that trains; `loop_config` reads them.

    workdir: the default, in words. config: gives the config before any flag but --preset, whose fields --help lists.
    mesh: the name of the flag of `define_mesh_flag`.
    """
    define_path(values, "workdir", None, f"Folder of the run; {workdir} by default.")
    define_mesh_flag(values, mesh)
    _define_fields(values, LoopConfig, _LOOP_FLAGS)
    flags.DEFINE_flag(_OverrideFlag(config), values)
    flags.DEFINE_bool("restart", False, "Delete the run in the workdir and train from scratch.", flag_values=values)
    text = (
        "Continue a run with a larger budget. Its learning-rate schedule is then that of the new budget, entered where "
        "the run stands, so a rate that had decayed rises again."
    )
    flags.DEFINE_bool("extend", False, text, flag_values=values)


def define_workdir_flags(values: Flags) -> None:
    """The flags of the commands that read a trained workdir."""
    define_path(values, "workdir", None, "Folder of the training run.")
    define_path(values, "data_dir", None, "Folder to read the scene from, if it has moved.")


def define_view_flags(values: Flags) -> None:
    """The flags of everything that serves the viewer."""
    text = "Port of the viewer; the next free one where it is in use."
    flags.DEFINE_integer("view_port", 8080, text, 1, 65535, flag_values=values)
    text = "Address that the viewer listens on. 127.0.0.1 is this machine alone, 0.0.0.0 is everyone."
    flags.DEFINE_string("view_host", "127.0.0.1", text, flag_values=values)


def define_evaluation_flags(values: Flags) -> None:
    """The flags of everything that evaluates."""
    splits = ["auto", "test", "val", "train", "held-out"]
    text = "Split to evaluate; auto is test, else val, else the held-out views."
    flags.DEFINE_enum("eval_split", "auto", splits, text, flag_values=values)
    flags.DEFINE_integer(
        "eval_views", 0, "Evaluate this many evenly spaced views; 0 is all.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_enum("background", "white", ["white", "black"], "Background colour in evaluation.", flag_values=values)
    text = (
        "Find pose, exposure or both of every view on the left half of its image, and score the right half: "
        "pose,exposure. By default views are taken as they are, and scored whole."
    )
    flags.DEFINE_list("fit_views", [], text, flag_values=values)


def fitted_parts(values: Flags) -> tuple[str, ...]:
    """What --fit_views names."""
    return _named(values, "fit_views", ("pose", "exposure"))


def _named(values: Flags, flag: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names that a flag lists, in the order of `known`. Raises InputError for another one."""
    given: list[str] = values[flag].value or []
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"--{flag}={','.join(given)}: {unknown[0]!r} is none of {', '.join(known)}")
    return tuple(name for name in known if name in given)


def define_report_flags(values: Flags) -> None:
    """What `python -m jaxngp.report` takes beside a workdir and an evaluation."""
    define_path(values, "out", None, "File to write; report.html in the workdir by default.")
    text = "Also write the log and pictures for TensorBoard, into tensorboard/ of the workdir."
    flags.DEFINE_bool("tensorboard", False, text, flag_values=values)


def define_render_flags(values: Flags) -> None:
    """The flags of `python -m jaxngp.render`."""
    define_workdir_flags(values)
    define_mesh_flag(values)
    define_process_flags(values)
    text = (
        "orbit around the scene, spiral among the cameras, interpolate for a flight through them; train, val, test or "
        "held-out for the poses of a split; or a camera path, .json, of nerfstudio, instant-ngp or the viewer. auto is "
        "a spiral for a scene around its cameras that they did not see from all sides, else an orbit."
    )
    define_path(values, "path", "auto", text)
    flags.DEFINE_integer(
        "frames", 0, "Frames of the path, or evenly spaced poses of the split; 0 is 60, or all.", 0, flag_values=values
    )
    flags.DEFINE_integer(
        "width", 0, "Pixels across a frame; 0 follows from --height or the images.", 0, flag_values=values
    )
    flags.DEFINE_integer(
        "height", 0, "Pixels down a frame; 0 follows from --width or the images.", 0, flag_values=values
    )
    flags.DEFINE_float(
        "fps", 0.0, "Frames per second of the animation; 0 is what the path says, or 20.", 0, 240, flag_values=values
    )
    text = "Format of the animation. auto is mp4 where PyAV is installed (pip install .[video]), else gif."
    flags.DEFINE_enum("animation", "auto", ["auto", "mp4", "gif", "webp", "none"], text, flag_values=values)
    text = (
        "What to write of each frame: colour; rgba, without the background; depth, in colours; depth16, along the "
        "optical axis in the steps that depth16.json names, metres where the source has them; normals, in the axes of "
        "the source."
    )
    flags.DEFINE_list("layers", ["colour", "depth"], text, flag_values=values)
    flags.DEFINE_integer("samples", 1, "Rays per pixel.", 1, 4096, flag_values=values)
    text = "Diameter of the lens in sides of the scene's box, for a shallow depth of field; 0 is a pinhole."
    flags.DEFINE_float("aperture", 0.0, text, 0, 1, flag_values=values)
    text = "Distance of what is sharp, in sides of the scene's box; 0 is what the middle of each frame shows."
    flags.DEFINE_float("focus", 0.0, text, 0, 1e6, flag_values=values)
    flags.DEFINE_enum("background", "white", ["white", "black"], "Background colour.", flag_values=values)


def define_export_flags(values: Flags, formats: Mapping[str, str], options: Mapping[str, type[Config]]) -> None:
    """The flags of `python -m jaxngp.export`: formats with what each is, and the options of each."""
    define_path(values, "workdir", None, "Folder of the training run.")
    define_path(values, "out", None, "File to write; exports/<scene> in the workdir by default.")
    text = "; ".join(f"{name}: {summary}" for name, summary in formats.items())
    flags.DEFINE_enum("format", None, list(formats), f"What to write. {text}.", flag_values=values)
    fields: dict[str, list[str]] = {}
    for name, kind in options.items():
        for field in declared(kind):
            fields.setdefault(field.name, []).append(name)
    for name, kind in options.items():
        own = [field.name for field in declared(kind) if fields[field.name][0] == name]
        _define_fields(
            values,
            kind,
            own,
            note=lambda field: f"(default: {field.default})",
            title=lambda field: f"for --format={' and '.join(fields[field.name])}",
        )


def export_options(values: Flags, kind: type[Options], options: Mapping[str, type[Config]]) -> Options:
    """The options of the chosen format, as the flags give them. Raises InputError for one that it does not have."""
    own = {field.name for field in declared(kind)}
    given = {field.name for other in options.values() for field in declared(other) if values[field.name].present}
    if foreign := given - own:
        raise InputError(f"--{min(foreign)} is no option of --format={values.format}; see --help")
    return kind(**{name: values[name].value for name in own & given})


def define_capture_flags(values: Flags) -> None:
    """The flags of `python -m jaxngp.capture`."""
    define_path(values, "images", None, "Folder of the photographs, with its subfolders. They are only read.")
    define_path(values, "video", None, "A video, of which the sharpest frames are taken.")
    define_path(values, "out", None, "Folder to write transforms.json into; captures/<name> by default.")
    flags.DEFINE_integer("frames", 120, "Frames to take from the video, evenly spread.", 2, flag_values=values)
    text = "COLMAP's model of the lens. OPENCV_FISHEYE is for fisheye lenses, PINHOLE for images that are undistorted."
    flags.DEFINE_enum("camera_model", "OPENCV", [*CAMERA_MODELS], text, flag_values=values)
    text = (
        "Which images to compare: exhaustive is all with each other, sequential each with its neighbours by name. auto "
        f"is sequential for a video and for more than {EXHAUSTIVE_UP_TO} images."
    )
    flags.DEFINE_enum("matching", "auto", ["auto", "exhaustive", "sequential"], text, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the random numbers that COLMAP draws.", flag_values=values)
    flags.DEFINE_bool("restart", False, "Discard what --out holds of an earlier attempt.", flag_values=values)


def train_config(values: Flags, training: Split | None = None) -> NerfConfig:
    """Dataclass defaults < preset < what the training views ask for < flags that were given < overrides.

    Without the views, which have to be found and read first, only the group `scene` is what it will be.
    """
    preset = PRESETS[chosen_preset(values, say=training is None)]
    scene = chosen_scene(values)
    config = preset
    if training:
        config = suited(config, num_cascades=training.placement.num_cascades, has_alpha=training.has_alpha)
    refine = replace(config.refine, **dict.fromkeys(_named(values, "refine", REFINED), True))
    config = replace(config, scene=scene, train=loop_config(config.train, values), refine=refine)
    return apply_overrides(config, values.override)


def chosen_scene(values: Flags) -> SceneConfig:
    """The scene of `define_scene_flags`."""
    scene = _given(scene_config(values.scene), values, _SCENE_FLAGS)
    if values.aabb:
        scene = replace(scene, **_box(values.aabb))
    if values.image_size is not None and scene.name != "bricks":
        raise InputError("--image_size is the size of the built-in scene; use --downscale for any other")
    if scene.name not in SCENES:  # a path: evaluation and rendering may start from another folder
        scene = replace(scene, name=os.path.realpath(scene.name))
    if values.data_dir:
        scene = replace(scene, data_dir=os.path.realpath(values.data_dir))
    return scene


def _box(text: Sequence[str]) -> dict[str, Any]:
    """The cube about a box that --aabb gives."""
    try:
        low, high = [*map(float, text[:3])], [*map(float, text[3:])]
        sides = [b - a for a, b in zip(low, high, strict=True)]
    except ValueError:
        sides = []
    if len(sides) != 3 or not all(0 < side < math.inf for side in sides):
        raise InputError(f"--aabb={','.join(text)}: expected the lower and the upper corner, x,y,z,x,y,z")
    return {"box_centre": tuple((a + b) / 2 for a, b in zip(low, high, strict=True)), "box_side": max(sides)}


def loop_config(train: Loop, values: Flags) -> Loop:
    """`train` with the flags of `define_loop_flags` that were given, but for the overrides."""
    if values.max_steps is not None and values.max_seconds is None:
        train = replace(train, max_seconds=0.0)  # who asks for steps means to get them
    if values.max_seconds and values.max_steps is None:
        train = replace(train, max_steps=10**7)  # and who asks for seconds, those
    return _given(train, values, _LOOP_FLAGS)


def _given(config: Group, values: Flags, names: Sequence[str]) -> Group:
    """A group of the config with those of its fields for which a flag was given."""
    given: dict[str, Any] = {name: values[name].value for name in names if values[name].value is not None}
    return replace(config, **given)


def trained_nerf(values: Flags) -> tuple[runs.Run, NerfConfig]:
    """The run of a command that reads a trained NeRF, and its config with the flags that were given."""
    if not values.workdir:
        raise InputError("--workdir is missing: give the folder of a run of python -m jaxngp.train")
    run = runs.load(values.workdir, NerfConfig)
    scene = run.config.scene
    if values.data_dir:
        scene = replace(scene, data_dir=os.path.realpath(values.data_dir))
    return run, replace(run.config, scene=scene)
