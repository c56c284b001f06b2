"""Every choice a run can make, as small frozen dataclasses.

A config is a *static* choice: it is hashable, and each function takes only the small config that it needs. Defaults
are the paper's (Mueller et al. 2022). A field declares everything about itself in its annotation: its type, its bounds,
what it means, and its `Role`; checks, JSON, overrides, comparisons of runs and `--help` all read that.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, TypeVar


class InputError(ValueError):
    """Invalid user input. The message is one line: what is wrong, where, and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a path or what a library says may have several


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = SHOWN = 200


def shown(value: object) -> str:
    """`repr` for an error message, truncated: the value comes from outside, and may be arbitrarily long or deep."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _spelled(value: Any) -> str:
    """The value of a field as an override has it, large powers of two as 2**19."""
    if type(value) is int and value >= 2**12 and value & (value - 1) == 0:
        return f"2**{value.bit_length() - 1}"
    if type(value) is float and float(f"{value:g}") == value:
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


# What an annotation says of a field, beside its type: bounds, a role, and its meaning as a string.


@dataclass(frozen=True)
class Bounds:
    """The numbers x of a field: low <= x <= high, above < x < below."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    multiple_of: int = 0
    power_of_two: bool = False

    def hold(self, x: Any) -> bool:
        inside = self.low <= x <= self.high and self.above < x < self.below
        multiple = not self.multiple_of or x % self.multiple_of == 0
        return inside and multiple and (not self.power_of_two or x & (x - 1) == 0)

    def __str__(self) -> str:
        ends = {">=": self.low, ">": self.above, "<=": self.high, "<": self.below}
        parts = [f"{sign} {_spelled(end)}" for sign, end in ends.items() if math.isfinite(end)]
        parts += [f"a multiple of {self.multiple_of}"] if self.multiple_of else []
        parts += ["a power of two"] if self.power_of_two else []
        return ", ".join(parts)


class Role(enum.Enum):
    """What a field decides. A field without a role has that of the group it is in; the outermost is PROGRAM."""

    PROGRAM = "the compiled programs of a run, and by them its results"
    RESULT = "the results of a run but no program: it is data, or the host's alone"
    LOCATION = "the same, but only the last component of a path counts: where data is stored is not part of a run"
    BUDGET = "for how long a run trains: with a larger one it is the same run, extended"
    FREE = "nothing that a run computes: it may change whenever a run goes on"


IDENTITY = (Role.PROGRAM, Role.RESULT, Role.LOCATION)
"""Two configs that differ in a field of these roles are those of two runs."""


@dataclass(frozen=True)
class Declared:
    """A field as its annotation declares it."""

    name: str
    annotation: Any
    kind: Any  # the type in it
    groups: tuple[type[Config], ...]  # the configs, one of which it holds; empty where it holds a value
    default: Any
    doc: str
    role: Role | None


def _declared(kind: type) -> tuple[Declared, ...]:
    annotations = typing.get_type_hints(kind, include_extras=True)
    return tuple(_declared_field(annotations[field.name], field) for field in dataclasses.fields(kind))


def _declared_field(annotation: Any, field: dataclasses.Field) -> Declared:
    kind, extras = _parts(annotation)
    return Declared(
        name=field.name,
        annotation=annotation,
        kind=kind,
        groups=(typing.get_args(kind) or (kind,)) if isinstance(field.default, Config) else (),
        default=field.default,
        doc=next((extra for extra in extras if isinstance(extra, str)), ""),
        role=next((extra for extra in extras if isinstance(extra, Role)), None),
    )


declared: Callable[[type], tuple[Declared, ...]] = functools.cache(_declared)
"""The fields of a config, those of its base class first."""


def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type in an annotation, and what else it says."""
    if typing.get_origin(annotation) is Annotated:
        kind, *extras = typing.get_args(annotation)
        return kind, tuple(extras)
    return annotation, ()


# Checks.


class Config:
    """The base of all configs: making one checks its fields against their annotations.

    Raises InputError with the dotted path of the field, from the outermost config that is read or made.
    """

    added_later: ClassVar[bool] = False  # whether files of earlier versions may lack this group

    def __post_init__(self) -> None:
        for field in declared(type(self)):
            value = _checked(getattr(self, field.name), field.annotation, field.name)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Check rules about several fields. Raises InputError, with a path that starts at this config."""


def _require(condition: bool, path: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{path} = {shown(value)}: expected {expected}")


def _checked(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the annotation has it: an int as a float, a list as a tuple. Raises InputError if it does not fit."""
    kind, extras = _parts(annotation)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if not _has_type(value, kind) or not all(bounds.hold(value) for bounds in extras if isinstance(bounds, Bounds)):
        _require(False, path, value, _expected(annotation))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return tuple(_checked(value[i], kinds[i], f"{path}[{i}]") for i in range(len(kinds)))
    return value


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, elements apart; large numbers and NaN are of none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(args)
    if kind in (int, float):
        return type(value) is kind and abs(value) < (2**63 if kind is int else 1e300)
    return isinstance(value, kind)


def _expected(annotation: Any) -> str:
    """The type and the bounds of a field, in words."""
    kind, extras = _parts(annotation)
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        words = f"a list of {len(args)} values, each {_expected(args[0])}"
    elif args:  # a Literal, or a union
        words = f"one of {', '.join(getattr(arg, '__name__', repr(arg)) for arg in args)}"
    else:
        words = kind.__name__
    return " ".join([words, *(str(bounds) for bounds in extras if isinstance(bounds, Bounds))])


# The configs.

Count = Annotated[int, Bounds(1)]
Whole = Annotated[int, Bounds(0)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(above=0)]
Seconds = Annotated[float, Bounds(0, below=1e9)]
Fraction = Annotated[float, Bounds(0, below=1)]

DirectionEncoding = Literal["spherical_harmonics", "frequency"]
MlpInit = Literal["glorot", "torch"]
Precision = Literal["float32", "bfloat16"]
Loss = Literal["huber", "l2"]
Background = Literal["random", "white", "black"]
Up = Literal["auto", "x", "y", "z", "-x", "-y", "-z"]
ImagesOn = Literal["auto", "device", "host", "disk"]

MAX_LENGTH = 1e9
"""World units; larger coordinates or sizes are taken to be errors."""

Coordinate = Annotated[float, Bounds(-MAX_LENGTH, MAX_LENGTH)]


@dataclass(frozen=True)
class HashGridConfig(Config):
    """Multiresolution hash encoding (paper section 3, Table 1)."""

    num_dims: Annotated[int, Bounds(2, 3), "D, dimensions of a position"] = 3
    num_levels: Annotated[int, Bounds(1, 64), "L, levels"] = 16
    num_features: Annotated[int, Bounds(1, 8, power_of_two=True), "F, features per table entry"] = 2
    table_size: Annotated[int, Bounds(1, 2**28, power_of_two=True), "T, entries per level at most"] = 2**19
    min_resolution: Annotated[Count, "N_min, cells per axis of the coarsest level"] = 16
    max_resolution: Annotated[int, Bounds(1, 2**20), "N_max, cells per axis of the finest level"] = 2048
    dense_levels: Annotated[bool, "store a level that fits the table 1:1 instead of hashing it"] = True
    half_voxel_offset: Annotated[bool, "shift every level by half a cell, as tiny-cuda-nn does"] = False
    smoothstep: Annotated[bool, "smoothstep instead of linear interpolation (paper appendix A)"] = False
    init_scale: Annotated[NonNegative, "table entries start uniform in [-init_scale, init_scale]"] = 1e-4

    def check(self) -> None:
        sizes = (self.num_levels, self.table_size, self.num_features)
        _require(math.prod(sizes) <= 2**31, "num_levels, table_size, num_features", sizes, "a product of at most 2**31")
        low = self.min_resolution
        _require(low <= self.max_resolution, "max_resolution", self.max_resolution, f"at least min_resolution = {low}")

    @property
    def num_outputs(self) -> int:
        return self.num_levels * self.num_features


def _check_init_scale(precision: Precision, init_scale: float) -> None:
    fits = precision == "float32" or init_scale >= 1e-6  # in float16, which the table is then read in, 6e-8 is 0
    _require(fits, "encoding.init_scale", init_scale, f"at least 1e-06 where precision is {precision}")


@dataclass(frozen=True)
class FieldConfig(Config):
    """The radiance field: hash encoding, density MLP, colour MLP (paper section 5.4)."""

    encoding: HashGridConfig = HashGridConfig()
    hidden_width: Annotated[Count, "neurons per hidden layer"] = 64
    density_layers: Annotated[Count, "hidden layers of the density MLP"] = 1
    colour_layers: Annotated[Whole, "hidden layers of the colour MLP"] = 2
    num_geometry_features: Annotated[Count, "outputs of the density MLP; the first is log density"] = 16
    direction_encoding: Annotated[DirectionEncoding, "encoding of the viewing direction"] = "spherical_harmonics"
    direction_degree: Annotated[int, Bounds(1, 16), "degree of the harmonics, up to 8, or number of frequencies"] = 4
    use_bias: Annotated[bool, "biases in the MLPs"] = False
    mlp_init: Annotated[MlpInit, "torch draws weights and biases as torch.nn.Linear does"] = "glorot"
    mask_outside_box: Annotated[bool, "zero density and colour outside the unit cube"] = False
    precision: Annotated[Precision, "of features and hidden layers; parameters and densities are float32"] = "float32"

    def check(self) -> None:
        _require(self.encoding.num_dims == 3, "encoding.num_dims", self.encoding.num_dims, "3 for a NeRF")
        _check_init_scale(self.precision, self.encoding.init_scale)
        limit = 8 if self.direction_encoding == "spherical_harmonics" else 16
        _require(self.direction_degree <= limit, "direction_degree", self.direction_degree, f"at most {limit}")


@dataclass(frozen=True)
class PointFieldConfig(Config):
    """A function of position alone: hash encoding, one MLP, linear output (paper sections 5.1 and 5.2)."""

    encoding: HashGridConfig = HashGridConfig()
    hidden_width: Annotated[Count, "neurons per hidden layer"] = 64
    hidden_layers: Annotated[Count, "hidden layers of the MLP"] = 2
    num_outputs: Annotated[Count, "3 for an image, 1 for a signed distance"] = 1
    use_bias: Annotated[bool, "biases in the MLP"] = False
    precision: Annotated[Precision, "of features and hidden layers; parameters and results are float32"] = "float32"

    def check(self) -> None:
        _check_init_scale(self.precision, self.encoding.init_scale)


@dataclass(frozen=True)
class OccupancyConfig(Config):
    """Occupancy grid over the unit cube (paper appendix E.2)."""

    resolution: Annotated[int, Bounds(32, 512, multiple_of=32), "G, cells per axis and cascade"] = 128
    num_cascades: Annotated[int, Bounds(1, 8), "K; cascade k covers the cube's middle, of side 2^(k - K + 1)"] = 1
    decay: Annotated[float, Bounds(above=0, high=1), "factor on the stored density at every refresh"] = 0.95
    threshold: Annotated[Positive, "optical thickness of one march step above which a cell is occupied"] = 0.01
    refresh_every: Annotated[
        Count,
        Role.RESULT,
        "training steps between refreshes, of which a call of train.steps_per_dispatch has one at most",
    ] = 16
    warmup_steps: Annotated[Whole, "steps in which a refresh evaluates every cell; later a quarter of them"] = 256
    carve: Annotated[bool, "keep cells empty that lie outside the silhouette of any view with alpha"] = True


@dataclass(frozen=True)
class MarchConfig(Config):
    """Sampling by marching through the occupied cells of the unit cube (paper appendix E.1)."""

    num_steps: Annotated[int, Bounds(32, 4096, multiple_of=32), "march steps along the cube's diagonal"] = 1024
    growth: Annotated[float, Bounds(0, 0.1), "a step is at least this share of its distance; 0: all are equal"] = 0.0
    near: Annotated[Fraction, "distance at which rays start, scene units"] = 0.0
    num_samples: Annotated[Count, "size of a training step's packed sample buffer, at least num_steps"] = 2**18
    min_transmittance: Annotated[
        Fraction, "a ray ends where less light than this gets through, in rendering and with num_candidates"
    ] = 1e-4
    opaque_thickness: Annotated[Positive, "optical thickness of one step in a cell that is called opaque"] = 2.0
    opaque_cells: Annotated[float, Bounds(0, 1e3), "opaque cell widths after which a training ray ends; 0: never"] = 3.5
    num_candidates: Annotated[
        int,
        Bounds(0, 2**22),
        "steps of a training step whose density is looked at first, for samples of those that matter to a ray's"
        " colour; 0: samples of all",
    ] = 0
    roulette: Annotated[
        Fraction,
        "with num_candidates: a step of less weight is a sample with the probability weight / roulette, and then as"
        " many times as long; 0: every step that light reaches is one",
    ] = 0.0
    occupancy: OccupancyConfig = OccupancyConfig()

    def check(self) -> None:
        expected = f"at least num_steps = {self.num_steps}, so that any one ray fits the buffer"
        _require(self.num_samples >= self.num_steps, "num_samples", self.num_samples, expected)
        looked_at = self.num_candidates
        _require(not looked_at or looked_at >= self.num_steps, "num_candidates", looked_at, f"0, or {expected}")
        played = not self.roulette or bool(looked_at)
        _require(played, "roulette", self.roulette, "0 where num_candidates is 0: without a look no weight is known")
        fits = not self.growth or (self.growth * self.num_steps >= 2 and self.step_size > 1e-6)
        _require(fits, "growth", self.growth, f"0, or 2 to 15 over num_steps = {self.num_steps}")

    @property
    def step_size(self) -> float:
        """The smallest dt, in scene units: such that num_steps lead through the cube from one corner to the other."""
        if not self.growth:
            return 3**0.5 / self.num_steps
        return 3**0.5 * self.growth * math.exp((1 / self.growth - self.num_steps) * math.log1p(self.growth))

    def step_size_at(self, cascade: int) -> float:
        """dt in the middle of a cascade's half side, in scene units, for a camera in the middle of the cube."""
        return max(self.step_size, self.growth * 2.0 ** (cascade - self.occupancy.num_cascades))

    @property
    def opaque_steps(self) -> int:
        """Steps in opaque cells after which a training ray ends; 0 never ends it.

        Counted in the innermost cascade; in the others cells and steps grow alike.
        """
        cell = 2.0 ** (1 - self.occupancy.num_cascades) / self.occupancy.resolution
        return math.ceil(self.opaque_cells * cell / self.step_size - 0.5)

    @property
    def jitters_per_ray(self) -> int:
        return 1


@dataclass(frozen=True)
class StratifiedConfig(Config):
    """Sampling by one jittered sample per bin between near and far; lengths in scene units."""

    num_bins: Annotated[int, Bounds(2, below=2**16), "samples per ray"] = 192
    near: Annotated[NonNegative, "t at which the first bin starts"] = 2 / 3
    far: Annotated[Positive, "t at which the last bin ends"] = 2.0
    last_interval: Annotated[Positive, "length of the last sample, which stands for everything behind it"] = 1e10 / 3

    def check(self) -> None:
        _require(self.near < self.far, "near, far", (self.near, self.far), "near < far")

    @property
    def jitters_per_ray(self) -> int:
        return self.num_bins


@dataclass(frozen=True)
class StepDecay(Config):
    """The learning rate falls in steps: the paper's x 0.33 at 20k and every 10k of 50k steps (section 4)."""

    factor: Annotated[float, Bounds(above=0, high=1), "on the learning rate, at every step of the decay"] = 0.33
    start: Annotated[NonNegative, "fraction of the budget at which the first step is"] = 0.4
    interval: Annotated[Positive, "fraction of the budget from one step to the next"] = 0.2


@dataclass(frozen=True)
class CosineDecay(Config):
    """The learning rate falls along half a cosine."""

    start: Annotated[Fraction, "fraction of the budget at which the fall starts"] = 0.3
    final: Annotated[float, Bounds(0, 1), "final learning rate as a fraction of the initial one"] = 0.02


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """Adam with the paper's constants (section 4), a decay, and an average of the weights."""

    learning_rate: Annotated[Positive, Role.RESULT, "learning rate before decay"] = 1e-2
    beta1: Annotated[Fraction, "Adam's decay of the mean gradient"] = 0.9
    beta2: Annotated[Fraction, "Adam's decay of the mean squared gradient"] = 0.99
    epsilon: Annotated[Positive, "Adam's, added to the root of the mean squared gradient"] = 1e-15
    weight_decay: Annotated[NonNegative, "L2 on the MLP weights, inside the gradient; never on the tables"] = 1e-6
    decay: Annotated[StepDecay | CosineDecay, Role.RESULT] = StepDecay()
    warmup_steps: Annotated[Whole, Role.RESULT, "steps in which the learning rate rises linearly"] = 0
    ema_decay: Annotated[Fraction, "of the weight average that is evaluated; 0 evaluates the weights"] = 0.95


@dataclass(frozen=True)
class LoopConfig(Config):
    """The training loop, whatever is learned in it."""

    max_steps: Annotated[Count, Role.BUDGET, "training steps"] = 35_000
    max_seconds: Annotated[Seconds, Role.BUDGET, "seconds of training without compilation; 0 is no limit"] = 0.0
    steps_per_dispatch: Annotated[Count, "training steps in one call of the compiled program"] = 16
    calls_in_flight: Annotated[Count, Role.FREE, "calls queued on the device before the host waits"] = 1
    checkpoint_seconds: Annotated[Positive, Role.FREE, "seconds between checkpoints; one is written at the end"] = 60.0
    log_every: Annotated[Whole, Role.FREE, "minimum number of steps between lines of the log; 0 logs every report"] = 0
    deterministic: Annotated[bool, "on a GPU, equal bits in every run, ten times slower; on a CPU always so"] = False
    seed: Annotated[int, Bounds(0, below=2**32), Role.RESULT, "random seed"] = 0


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The training loop of a NeRF."""

    num_rays: Annotated[Count, "rays drawn per step; those whose samples fit the buffer are used"] = 2**16
    loss: Annotated[Loss, "loss on the colour of a ray"] = "huber"
    background: Annotated[Background, "behind transparent pixels; random is one colour per ray"] = "random"
    depth_weight: Annotated[NonNegative, "of the loss on the depth of a ray, where it is known"] = 0.02
    images_on: Annotated[ImagesOn, Role.FREE, "where images are kept; auto: the first that has room"] = "auto"


@dataclass(frozen=True)
class SceneConfig(Config):
    """Which images, and the box of the world that becomes the unit cube of scene units."""

    name: Annotated[str, Role.LOCATION, "a known scene, or the path of a folder of views or a ray table"] = "bricks"
    data_dir: Annotated[str, Role.FREE, "where the scene is now: its folder, or the folder that holds it"] = ""
    downscale: Annotated[Count, "shrink the images by this factor with a box filter"] = 1
    image_size: Annotated[int, Bounds(16, 4096), "pixels per side at which the built-in scene is rendered"] = 200
    hold_out_every: Annotated[Whole, "without test or val views, hold out each n-th; 0 holds out none"] = 8
    box_centre: Annotated[tuple[Coordinate, Coordinate, Coordinate], "of the box, where box_side is given"] = (
        0.0,
        0.0,
        0.0,
    )
    box_side: Annotated[
        float, Bounds(0, MAX_LENGTH), "of the box, world units; 0: that of the source, else by itself"
    ] = 0.0
    scale: Annotated[float, Bounds(1e-3, 1e3), "enlarge the scene in a box that is not given by this factor"] = 1.0
    up: Annotated[Up, "what becomes +z; auto: as the source says, else what is up for the cameras"] = "auto"

    def check(self) -> None:
        _require(bool(self.name), "name", self.name, "a name or a path")
        small = 0 < self.box_side < 1 / MAX_LENGTH
        _require(not small, "box_side", self.box_side, f"0, or at least {1 / MAX_LENGTH:g}")
        _require(self.hold_out_every != 1, "hold_out_every", 1, "0, or at least 2, so that views to train on are left")


@dataclass(frozen=True)
class RefineConfig(Config):
    """Corrections of cameras and exposures that are learned with the scene; none by default."""

    added_later = True

    poses: Annotated[bool, "refine the pose of every view"] = False
    focal: Annotated[bool, "refine focal length and principal point; equal intrinsics are of one camera"] = False
    lens: Annotated[bool, "refine the lens; views of equal intrinsics are of one camera"] = False
    exposure: Annotated[bool, "refine exposure and white balance of every view; their mean is kept"] = False
    learning_rate: Annotated[Positive, Role.RESULT, "of cameras; mean motion of the image, in focal lengths a step"] = (
        2e-3
    )
    exposure_rate: Annotated[Positive, Role.RESULT, "learning rate of the logarithm of exposures"] = 3e-2
    final: Annotated[float, Bounds(0, 1), Role.RESULT, "final rates as a fraction of the initial ones"] = 0.02
    end: Annotated[float, Bounds(above=0, high=1), Role.RESULT, "fraction of the budget at which rates are final"] = 1.0
    coarse_levels: Annotated[Whole, Role.RESULT, "levels of the encoding in use at the start, while cameras move"] = 3
    fine_at: Annotated[Fraction, Role.RESULT, "fraction of the budget at which all levels are in use"] = 0.4
    margin: Annotated[Fraction, "by so much of an image's width silhouettes are widened: cameras may be off"] = 0.08

    @property
    def cameras(self) -> bool:
        """Whether cameras move."""
        return self.poses or self.focal or self.lens

    @property
    def any(self) -> bool:
        return self.cameras or self.exposure


def _check_draw(train: LoopConfig, numbers_per_step: int, what: str) -> None:
    """A call of the training program draws its random numbers at once."""
    fits = train.steps_per_dispatch * numbers_per_step <= 2**28
    _require(fits, "train.steps_per_dispatch", train.steps_per_dispatch, f"fewer, with as many {what}")


@dataclass(frozen=True)
class NerfConfig(Config):
    """All of one NeRF run: what `config.json` in a workdir holds."""

    scene: Annotated[SceneConfig, Role.RESULT] = SceneConfig()
    field: FieldConfig = FieldConfig()
    sampler: MarchConfig | StratifiedConfig = MarchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    refine: RefineConfig = RefineConfig()

    def check(self) -> None:
        _check_draw(self.train, self.train.num_rays * (self.sampler.jitters_per_ray + 14), "rays")


# The other primitives: an image, and the signed distance to a solid.

NumPoints = Annotated[int, Bounds(8, 2**24)]
Pixels = Annotated[int, Bounds(2, 2**16)]


def _check_shape(field: PointFieldConfig, *, num_dims: int, num_outputs: int) -> None:
    found = field.encoding.num_dims
    _require(found == num_dims, "field.encoding.num_dims", found, str(num_dims))
    _require(field.num_outputs == num_outputs, "field.num_outputs", field.num_outputs, str(num_outputs))


@dataclass(frozen=True)
class ImageSourceConfig(Config):
    """Which image is learned."""

    path: Annotated[str, Role.LOCATION, "of an image; empty is the built-in one, of the size below"] = ""
    width: Annotated[Pixels, "of the built-in image, px"] = 2048
    height: Annotated[Pixels, "of the built-in image, px"] = 2048
    background: Annotated[Literal["white", "black"], "behind transparent pixels"] = "white"


@dataclass(frozen=True)
class ImageTrainConfig(LoopConfig):
    """The training loop of an image."""

    num_points: Annotated[NumPoints, "drawn per step, one in each rectangle of a grid over the image"] = 2**18
    snap: Annotated[bool, "points lie at the centres of pixels; else the image is interpolated between them"] = True


@dataclass(frozen=True)
class ImageConfig(Config):
    """All of one run that learns an image (paper section 5.1)."""

    image: Annotated[ImageSourceConfig, Role.RESULT] = ImageSourceConfig()
    field: PointFieldConfig = PointFieldConfig(encoding=HashGridConfig(num_dims=2), num_outputs=3)
    optimizer: OptimizerConfig = OptimizerConfig(ema_decay=0.0)
    train: ImageTrainConfig = ImageTrainConfig()

    def check(self) -> None:
        _check_shape(self.field, num_dims=2, num_outputs=3)
        _check_draw(self.train, self.train.num_points * 3, "points")


@dataclass(frozen=True)
class SdfSourceConfig(Config):
    """The solid to learn, and the points it is sampled at."""

    name: Annotated[str, Role.LOCATION, "a built-in solid, or the path of a mesh"] = "shapes"
    num_samples: Annotated[int, Bounds(2**10, 2**28), "points in space, and as many on the surface"] = 2**21
    offset: Annotated[float, Bounds(above=0, high=1), "deviation of points from the surface, in half diagonals"] = (
        2**-10
    )

    def check(self) -> None:
        _require(bool(self.name), "name", self.name, "a name or a path")


@dataclass(frozen=True)
class SdfTrainConfig(LoopConfig):
    """The training loop of a signed distance."""

    num_points: Annotated[NumPoints, "drawn per step: 1/2 on the surface, 3/8 near it, 1/8 anywhere"] = 2**18


@dataclass(frozen=True)
class SdfConfig(Config):
    """All of one run that learns a signed distance function (paper section 5.2)."""

    sdf: Annotated[SdfSourceConfig, Role.RESULT] = SdfSourceConfig()
    field: PointFieldConfig = PointFieldConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    train: SdfTrainConfig = SdfTrainConfig()

    def check(self) -> None:
        _check_shape(self.field, num_dims=3, num_outputs=1)
        _check_draw(self.train, self.train.num_points * 3, "points")


PointConfig = ImageConfig | SdfConfig
RunConfig = NerfConfig | ImageConfig | SdfConfig
"""What a workdir may hold a run of."""

AnyConfig = TypeVar("AnyConfig", bound=Config)


# Reading and writing.


def to_json(config: Config) -> str:
    """A config as JSON text; `from_json` gives the equal config back."""
    return json.dumps(to_plain(config), indent=2) + "\n"


def to_plain(config: Config) -> dict[str, Any]:
    """A config as nested dicts, as JSON has them; where a field may hold one of several configs, "type" says which."""
    plain: dict[str, Any] = {}
    for field in declared(type(config)):
        value = getattr(config, field.name)
        if field.groups:
            tag = {"type": type(value).__name__} if len(field.groups) > 1 else {}
            value = tag | to_plain(value)
        plain[field.name] = value
    return plain


def from_json(text: str, kind: type = NerfConfig) -> Any:
    """The config of type `kind` that `text` holds. Raises InputError where the text does not fit the type.

    A value that is missing is its default, so a field that is added has as default what was done before it existed.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number without end, nesting without end
        raise InputError(f"config is not JSON: {error}") from None
    return _from_plain(plain, (kind,), "")


def apply_overrides(config: AnyConfig, overrides: Iterable[str]) -> AnyConfig:
    """`config` with each `dotted.path=value` set, in order; only the result must be valid.

    A value keeps the type of its field; powers may be written 2**19. Where a field may hold one of several configs, the
    value is the name of one: `optimizer.decay=CosineDecay`.

    >>> apply_overrides(NerfConfig(), ["train.num_rays=2**10"]).train.num_rays
    1024
    """
    plain = to_plain(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"override {shown(override)}: expected dotted.path=value")
        _set(plain, type(config), path.strip(), text.strip())
    return _from_plain(plain, (type(config),), "")


def _from_plain(plain: Any, groups: tuple[type[Config], ...], path: str) -> Any:
    """The config of one of the types `groups` that nested dicts hold; `path` is where they lie in what is read."""
    place = path or "config"
    if not isinstance(plain, dict):
        raise InputError(f"{place}: expected an object with the fields of {groups[0].__name__}")
    kind = _member(plain.get("type"), groups, path)
    values = {}
    for name, value in plain.items():
        if name != "type" or len(groups) == 1:
            inner = _field(kind, name, place).groups
            values[name] = _from_plain(value, inner, _joined(path, name)) if inner else value
    for field in declared(kind):
        if field.groups and field.name not in values and not field.groups[0].added_later:
            raise InputError(f"{place}: {field.name!r} is missing")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(_joined(path, str(error))) from None


def _set(plain: dict[str, Any], kind: type[Config], path: str, text: str) -> None:
    """Set what lies at `path` of nested dicts, which hold a config of type `kind`, to what `text` spells."""
    place = f"override {shown(path)}"
    *parents, last = path.split(".")
    for name in parents:
        groups = _field(kind, name, place).groups
        if not groups:
            raise InputError(f"{place}: {name!r} is a value and has no fields")
        plain = plain[name]
        kind = _member(plain.get("type"), groups, name)
    field = _field(kind, last, place)
    if not field.groups:
        plain[last] = _parsed(text, field.kind)
    elif len(field.groups) > 1:
        plain[last] = {"type": text} | to_plain(_member(text, field.groups, path)())
    else:
        names = ", ".join(sorted(field.name for field in declared(field.groups[0])))
        raise InputError(f"{place}: names a group; its fields are {names}")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _member(tag: Any, groups: tuple[type[Config], ...], path: str) -> type[Config]:
    """The one of several configs that has the name `tag`; where there is but one, that."""
    names = [group.__name__ for group in groups]
    if len(groups) == 1:
        return groups[0]
    _require(tag in names, _joined(path, "type"), tag, f"one of {', '.join(names)}")
    return groups[names.index(tag)]


def _field(kind: type[Config], name: str, place: str) -> Declared:
    fields = {field.name: field for field in declared(kind)}
    if name not in fields:
        raise InputError(f"{place}: no field {shown(name)}; its fields are {', '.join(sorted(fields))}")
    return fields[name]


def _parsed(text: str, kind: Any) -> Any:
    """The value that `text` spells; the text itself where it spells none, for the check to refuse."""
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    base, power, exponent = text.partition("**")
    try:
        if power and kind is int and len(base) < 20 and 0 <= int(exponent) <= 64:
            return int(base) ** int(exponent)
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# Comparing, and describing.


def differences(old: Config, new: Config, roles: Iterable[Role] = tuple(Role)) -> list[str]:
    """The dotted paths at which two configs differ, each with both values; only of fields of the roles given."""
    a, b = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for path in sorted(a | b):
        role, _ = a.get(path) or b[path]
        before, after = (leaves[path][1] if path in leaves else None for leaves in (a, b))
        if role is Role.LOCATION and PurePath(str(before)).name == PurePath(str(after)).name:
            role = Role.FREE
        if before != after and role in roles:
            lines.append(f"{path}: {before!r} -> {after!r}")
    return lines


def _leaves(config: Config, path: str = "", inherited: Role = Role.PROGRAM) -> Iterator[tuple[str, tuple[Role, Any]]]:
    """Dotted path, role and value of every field that is no group, and the type of a group that may have several."""
    for field in declared(type(config)):
        value, name, role = getattr(config, field.name), _joined(path, field.name), field.role or inherited
        if len(field.groups) > 1:
            yield f"{name}.type", (role, type(value).__name__)
        if field.groups:
            yield from _leaves(value, name, role)
        else:
            yield name, (role, value)


def program_config(config: AnyConfig) -> AnyConfig:
    """`config` with the default of every field that shapes no program: runs with equal ones share their programs."""
    changes = {}
    for field in declared(type(config)):
        if field.role not in (None, Role.PROGRAM):
            changes[field.name] = field.default
        elif field.groups:
            changes[field.name] = program_config(getattr(config, field.name))
    return replace(config, **changes)  # type: ignore[type-var]


def field_help(config: Config, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field that an override can set, as the override that gives it the value it has, and its description.

    A group starts with its dotted path and what it is. Where it may be of several types, the fields of the others
    follow with their defaults.
    """
    for field in sorted(declared(type(config)), key=lambda field: bool(field.groups)):  # values before groups
        value, name = getattr(config, field.name), _joined(path, field.name)
        if not field.groups:
            yield f"{name}={_spelled(value)}", f"{field.doc} ({_expected(field.annotation)})"
            continue
        yield name, _first_line(type(value))
        if len(field.groups) > 1:
            yield f"{name}={type(value).__name__}", _expected(field.annotation)
        yield from field_help(value, name)
        for other in field.groups:
            if other is not type(value):
                yield f"{name}, where it is {other.__name__}", _first_line(other)
                yield from field_help(other(), name)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0]
