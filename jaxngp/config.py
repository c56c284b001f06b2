"""Every choice a run can make, as small frozen dataclasses.

A config is a *static* choice: it is hashable, so it is the jit cache key, and each function takes only the
small config that it needs. Defaults are the paper's (Mueller et al. 2022); `PRESETS` and `SCENES` name the
combinations people use. The order of precedence is: dataclass defaults < preset < flags < overrides.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from dataclasses import dataclass, replace
from typing import Any, Literal


class InputError(ValueError):
    """Something the user gave is wrong: one line that says what, where, and what to do next."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a path or what a library says may have several


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = SHOWN = 200


def shown(value: object) -> str:
    """`repr` for an error message: of what somebody else wrote, however long or deep, only the beginning."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{name} = {shown(value)}: expected {expected}")


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True)
class HashGridConfig:
    """Multiresolution hash encoding (paper section 3, Table 1)."""

    num_dims: int = 3  # D
    num_levels: int = 16  # L
    num_features: int = 2  # F, features per table entry
    table_size: int = 2**19  # T, entries per level at most
    min_resolution: int = 16  # N_min, cells per axis of the coarsest level
    max_resolution: int = 2048  # N_max, cells per axis of the finest level
    dense_levels: bool = True  # store a level that fits the table 1:1 instead of hashing it
    half_voxel_offset: bool = False  # shift every level by half a cell, as tiny-cuda-nn does
    smoothstep: bool = False  # smoothstep instead of linear interpolation (paper appendix A)
    init_scale: float = 1e-4  # table entries start uniform in [-init_scale, init_scale]

    def __post_init__(self) -> None:
        _check(self.num_dims in (2, 3), "encoding.num_dims", self.num_dims, "2 or 3")
        _check(1 <= self.num_levels <= 64, "encoding.num_levels", self.num_levels, "from 1 to 64")
        _check(self.num_features in (1, 2, 4, 8), "encoding.num_features", self.num_features, "1, 2, 4 or 8")
        _check(
            _is_power_of_two(self.table_size) and self.table_size <= 2**28,
            "encoding.table_size",
            self.table_size,
            "a power of two up to 2**28",
        )
        _check(
            self.num_levels * self.table_size * self.num_features <= 2**31,
            "encoding.num_levels, table_size, num_features",
            (self.num_levels, self.table_size, self.num_features),
            "a product of at most 2**31",
        )
        _check(self.min_resolution >= 1, "encoding.min_resolution", self.min_resolution, "at least 1")
        _check(
            self.min_resolution <= self.max_resolution <= 2**20,
            "encoding.max_resolution",
            self.max_resolution,
            f"at least min_resolution = {self.min_resolution} and at most 2**20",
        )

    @property
    def num_outputs(self) -> int:
        return self.num_levels * self.num_features


def _check_precision(precision: Precision, encoding: HashGridConfig) -> None:
    known = typing.get_args(Precision)
    _check(precision in known, "field.precision", precision, f"one of {known}")
    low = 1e-6 if precision == "bfloat16" else 0.0  # in float16, which the table is then read in, 6e-8 is 0
    _check(encoding.init_scale >= low, "field.encoding.init_scale", encoding.init_scale, f"at least {low:g}")


DirectionEncoding = Literal["spherical_harmonics", "frequency"]
MlpInit = Literal["glorot", "torch"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class FieldConfig:
    """The radiance field: hash encoding, density MLP, colour MLP (paper section 5.4)."""

    encoding: HashGridConfig = HashGridConfig()
    hidden_width: int = 64
    density_layers: int = 1  # hidden layers of the density MLP
    colour_layers: int = 2  # hidden layers of the colour MLP
    num_geometry_features: int = 16  # outputs of the density MLP; the first is log density
    direction_encoding: DirectionEncoding = "spherical_harmonics"
    direction_degree: int = 4  # harmonic degree, or number of frequencies
    use_bias: bool = False
    mlp_init: MlpInit = "glorot"  # "torch" draws weights and biases as torch.nn.Linear does
    mask_outside_box: bool = False  # zero density and colour outside the unit cube
    precision: Precision = "float32"  # of features and hidden layers; parameters and densities are always float32

    def __post_init__(self) -> None:
        _check(self.encoding.num_dims == 3, "field.encoding.num_dims", self.encoding.num_dims, "3 for a NeRF")
        for name in ("hidden_width", "density_layers", "num_geometry_features", "direction_degree"):
            _check(getattr(self, name) >= 1, f"field.{name}", getattr(self, name), "at least 1")
        _check(self.colour_layers >= 0, "field.colour_layers", self.colour_layers, "at least 0")
        known = typing.get_args(DirectionEncoding)
        _check(self.direction_encoding in known, "field.direction_encoding", self.direction_encoding, f"one of {known}")
        known = typing.get_args(MlpInit)
        _check(self.mlp_init in known, "field.mlp_init", self.mlp_init, f"one of {known}")
        _check_precision(self.precision, self.encoding)
        limit = 8 if self.direction_encoding == "spherical_harmonics" else 16
        _check(self.direction_degree <= limit, "field.direction_degree", self.direction_degree, f"at most {limit}")


@dataclass(frozen=True)
class PointFieldConfig:
    """A function of position alone: hash encoding, one MLP, linear output (paper sections 5.1 and 5.2)."""

    encoding: HashGridConfig = HashGridConfig()
    hidden_width: int = 64
    hidden_layers: int = 2
    num_outputs: int = 1
    use_bias: bool = False
    precision: Precision = "float32"  # of features and hidden layers; parameters and results are always float32

    def __post_init__(self) -> None:
        for name in ("hidden_width", "hidden_layers", "num_outputs"):
            _check(getattr(self, name) >= 1, f"field.{name}", getattr(self, name), "at least 1")
        _check_precision(self.precision, self.encoding)


@dataclass(frozen=True)
class OccupancyConfig:
    """Occupancy grid over the unit cube (paper appendix E.2)."""

    resolution: int = 128  # G, cells per axis and cascade
    num_cascades: int = 1  # K; cascade k covers the middle of the unit cube, of side 2^(k - K + 1)
    decay: float = 0.95  # of the stored density at every refresh
    threshold: float = 0.01  # optical thickness of one march step above which a cell is occupied
    refresh_every: int = 16  # training steps between refreshes
    warmup_steps: int = 256  # until then a refresh evaluates every cell, later a quarter of them
    carve: bool = True  # cells outside the silhouette of any view with alpha stay empty

    def __post_init__(self) -> None:
        _check(
            self.resolution % 32 == 0 and 32 <= self.resolution <= 512,
            "occupancy.resolution",
            self.resolution,
            "a multiple of 32 from 32 to 512",
        )
        _check(1 <= self.num_cascades <= 8, "occupancy.num_cascades", self.num_cascades, "from 1 to 8")
        _check(0 < self.decay <= 1, "occupancy.decay", self.decay, "in (0, 1]")
        _check(self.threshold > 0, "occupancy.threshold", self.threshold, "positive")
        _check(self.refresh_every >= 1, "occupancy.refresh_every", self.refresh_every, "at least 1")
        _check(self.warmup_steps >= 0, "occupancy.warmup_steps", self.warmup_steps, "at least 0")


@dataclass(frozen=True)
class MarchConfig:
    """Sampling by marching through the occupied cells of the unit cube (paper appendix E.1)."""

    num_steps: int = 1024  # candidate steps along the cube's diagonal; dt = sqrt(3) / num_steps
    num_samples: int = 2**18  # size of the packed sample buffer of one training step
    min_transmittance: float = 1e-4  # in rendering, a ray ends where less light than this gets through
    opaque_thickness: float = 2.0  # in training, a cell is opaque if one step in it has this optical thickness, ...
    opaque_cells: float = 3.5  # ... and a ray ends after this many widths of opaque cells; 0 never ends it
    occupancy: OccupancyConfig = OccupancyConfig()

    def __post_init__(self) -> None:
        _check(
            self.num_steps % 32 == 0 and 32 <= self.num_steps <= 4096,
            "sampler.num_steps",
            self.num_steps,
            "a multiple of 32 from 32 to 4096",
        )
        _check(
            self.num_samples >= self.num_steps,
            "sampler.num_samples",
            self.num_samples,
            f"at least num_steps = {self.num_steps}, so that any one ray fits the buffer",
        )
        _check(0 <= self.min_transmittance < 1, "sampler.min_transmittance", self.min_transmittance, "in [0, 1)")
        _check(self.opaque_thickness > 0, "sampler.opaque_thickness", self.opaque_thickness, "positive")
        _check(0 <= self.opaque_cells <= 1e3, "sampler.opaque_cells", self.opaque_cells, "from 0 to 1000")

    @property
    def step_size(self) -> float:
        """dt, in scene units."""
        return 3**0.5 / self.num_steps

    @property
    def opaque_steps(self) -> int:
        """Steps in opaque cells after which a training ray ends; 0 never ends it."""
        return math.ceil(self.opaque_cells / self.occupancy.resolution / self.step_size - 0.5)


@dataclass(frozen=True)
class StratifiedConfig:
    """Sampling by one jittered sample per bin between near and far; lengths in scene units."""

    num_bins: int = 192
    near: float = 2 / 3
    far: float = 2.0
    last_interval: float = 1e10 / 3  # the last sample stands for everything behind it

    def __post_init__(self) -> None:
        _check(2 <= self.num_bins < 2**16, "sampler.num_bins", self.num_bins, "from 2 to 65535")
        _check(0 <= self.near < self.far, "sampler.near, far", (self.near, self.far), "0 <= near < far")
        _check(self.last_interval > 0, "sampler.last_interval", self.last_interval, "positive")


@dataclass(frozen=True)
class StepDecay:
    """The learning rate is multiplied by `factor` at `start` and every `interval` after; fractions of the budget.

    The paper's x 0.33 at 20k and every 10k of 50k steps (section 4).
    """

    factor: float = 0.33
    start: float = 0.4
    interval: float = 0.2

    def __post_init__(self) -> None:
        _check(0 < self.factor <= 1, "decay.factor", self.factor, "in (0, 1]")
        _check(self.start >= 0, "decay.start", self.start, "at least 0")
        _check(self.interval > 0, "decay.interval", self.interval, "positive")


@dataclass(frozen=True)
class CosineDecay:
    """From `start`, a fraction of the budget, the learning rate falls to `final` of itself along half a cosine."""

    start: float = 0.3
    final: float = 0.02

    def __post_init__(self) -> None:
        _check(0 <= self.start < 1, "decay.start", self.start, "in [0, 1)")
        _check(0 <= self.final <= 1, "decay.final", self.final, "in [0, 1]")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with the paper's constants (section 4), a decay, and an average of the weights."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-15
    weight_decay: float = 1e-6  # L2 on the MLP weights, inside the gradient; never on the tables
    decay: StepDecay | CosineDecay = StepDecay()
    warmup_steps: int = 0  # linear rise of the learning rate over the first steps
    ema_decay: float = 0.95  # of the weight average that is evaluated; 0 evaluates the weights themselves

    def __post_init__(self) -> None:
        _check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "positive")
        for name in ("beta1", "beta2", "ema_decay"):
            _check(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        _check(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "positive")
        _check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        _check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "at least 0")


Loss = Literal["huber", "l2"]
Background = Literal["random", "white", "black"]


@dataclass(frozen=True)
class LoopConfig:
    """The training loop, whatever is learned in it."""

    max_steps: int = 35_000
    max_seconds: float = 0.0  # of training, compilation excluded; 0 means no limit
    steps_per_dispatch: int = 16  # steps in one call of the compiled program
    # Calls given to the device before the host looks at the clock, an interruption and what the calls did.
    calls_in_flight: int = 1
    checkpoint_seconds: float = 60.0  # between checkpoints; one is always written at the end
    log_every: int = 0  # steps from one line of the log to the next, at least; 0 is whenever there is news
    deterministic: bool = False  # on a GPU, equal bits in every run at about ten times the cost; a CPU has them anyway
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "steps_per_dispatch", "calls_in_flight"):
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _check(0 <= self.max_seconds < 1e9, "train.max_seconds", self.max_seconds, "at least 0 and below 1e9")
        _check(self.log_every >= 0, "train.log_every", self.log_every, "at least 0")
        _check(self.checkpoint_seconds > 0, "train.checkpoint_seconds", self.checkpoint_seconds, "positive")
        _check(0 <= self.seed < 2**32, "train.seed", self.seed, "in [0, 2**32)")


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The training loop of a NeRF."""

    num_rays: int = 2**16  # rays drawn per step; those whose samples fill the buffer are used
    loss: Loss = "huber"
    background: Background = "random"  # behind transparent pixels; random per ray

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.num_rays >= 1, "train.num_rays", self.num_rays, "at least 1")
        _check(self.loss in typing.get_args(Loss), "train.loss", self.loss, f"one of {typing.get_args(Loss)}")
        known = typing.get_args(Background)
        _check(self.background in known, "train.background", self.background, f"one of {known}")


MAX_LENGTH = 1e9
"""World units; what is farther away, or larger, is a mistake."""


@dataclass(frozen=True)
class SceneConfig:
    """Which images, and the box of the world that becomes the unit cube of scene units."""

    name: str = "bricks"  # a scene of SCENES, or a path to a folder of views or a ray table
    data_dir: str = ""  # where to look first; see jaxngp.data.locate
    downscale: int = 1  # box filter over downscale x downscale pixels
    image_size: int = 200  # pixels per side at which the built-in scene is rendered
    box_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # world units
    box_side: float = 3.0  # world units

    def __post_init__(self) -> None:
        _check(bool(self.name), "scene.name", self.name, "a name or a path")
        _check(self.downscale >= 1, "scene.downscale", self.downscale, "at least 1")
        _check(16 <= self.image_size <= 4096, "scene.image_size", self.image_size, "from 16 to 4096")
        _check(len(self.box_centre) == 3, "scene.box_centre", self.box_centre, "three numbers")
        within = all(abs(c) <= MAX_LENGTH for c in self.box_centre)
        _check(within, "scene.box_centre", self.box_centre, f"numbers up to {MAX_LENGTH:g}")
        sound = 1 / MAX_LENGTH <= self.box_side <= MAX_LENGTH  # so that float32 holds what is divided by it
        _check(sound, "scene.box_side", self.box_side, f"from {1 / MAX_LENGTH:g} to {MAX_LENGTH:g}")


@dataclass(frozen=True)
class NerfConfig:
    """All of one NeRF run: what `config.json` in a workdir holds."""

    scene: SceneConfig = SceneConfig()
    field: FieldConfig = FieldConfig()
    sampler: MarchConfig | StratifiedConfig = MarchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        noise = self.sampler.num_bins if isinstance(self.sampler, StratifiedConfig) else 1
        drawn = self.train.steps_per_dispatch * self.train.num_rays * (noise + 14)  # numbers, for a dispatch at once
        _check(drawn <= 2**28, "train.steps_per_dispatch", self.train.steps_per_dispatch, "fewer, with as many rays")


# The other primitives: an image, and the signed distance to a solid.


def _check_points(train: ImageTrainConfig | SdfTrainConfig) -> None:
    _check(8 <= train.num_points <= 2**24, "train.num_points", train.num_points, "from 8 to 2**24")
    drawn = train.steps_per_dispatch * train.num_points * 3  # numbers, for a dispatch at once
    _check(drawn <= 2**28, "train.steps_per_dispatch", train.steps_per_dispatch, "fewer, with as many points")


def _check_shape(field: PointFieldConfig, *, num_dims: int, num_outputs: int) -> None:
    _check(field.encoding.num_dims == num_dims, "field.encoding.num_dims", field.encoding.num_dims, str(num_dims))
    _check(field.num_outputs == num_outputs, "field.num_outputs", field.num_outputs, str(num_outputs))


@dataclass(frozen=True)
class ImageSourceConfig:
    """Which image is learned."""

    path: str = ""  # empty is the built-in one, of the size below
    width: int = 2048  # px
    height: int = 2048  # px
    background: Literal["white", "black"] = "white"  # behind transparent pixels

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            _check(2 <= getattr(self, name) <= 2**16, f"image.{name}", getattr(self, name), "from 2 to 65536")
        known = ("white", "black")
        _check(self.background in known, "image.background", self.background, f"one of {known}")


@dataclass(frozen=True)
class ImageTrainConfig(LoopConfig):
    """The training loop of an image."""

    num_points: int = 2**18  # drawn per step, one in each rectangle of a grid over the image
    snap: bool = True  # to the centre of a pixel; else the image is interpolated between them

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_points(self)


@dataclass(frozen=True)
class ImageConfig:
    """All of one run that learns an image (paper section 5.1)."""

    image: ImageSourceConfig = ImageSourceConfig()
    field: PointFieldConfig = PointFieldConfig(encoding=HashGridConfig(num_dims=2), num_outputs=3)
    optimizer: OptimizerConfig = OptimizerConfig(ema_decay=0.0)
    train: ImageTrainConfig = ImageTrainConfig()

    def __post_init__(self) -> None:
        _check_shape(self.field, num_dims=2, num_outputs=3)


@dataclass(frozen=True)
class SdfSourceConfig:
    """Whose signed distance is learned, and the points that it is learned from."""

    name: str = "shapes"  # of the analytic solids, or the path of a mesh
    num_samples: int = 2**21  # points whose distance is computed before training, and so many on the surface
    offset: float = 1 / 1024  # standard deviation of points near the surface, in halves of the box's diagonal

    def __post_init__(self) -> None:
        _check(bool(self.name), "sdf.name", self.name, "a name or a path")
        _check(2**10 <= self.num_samples <= 2**28, "sdf.num_samples", self.num_samples, "from 2**10 to 2**28")
        _check(0 < self.offset <= 1, "sdf.offset", self.offset, "in (0, 1]")


@dataclass(frozen=True)
class SdfTrainConfig(LoopConfig):
    """The training loop of a signed distance."""

    num_points: int = 2**18  # drawn per step: a half on the surface, three eighths near it, an eighth anywhere

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_points(self)


@dataclass(frozen=True)
class SdfConfig:
    """All of one run that learns a signed distance function (paper section 5.2)."""

    sdf: SdfSourceConfig = SdfSourceConfig()
    field: PointFieldConfig = PointFieldConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    train: SdfTrainConfig = SdfTrainConfig()

    def __post_init__(self) -> None:
        _check_shape(self.field, num_dims=3, num_outputs=1)


PointConfig = ImageConfig | SdfConfig
RunConfig = NerfConfig | ImageConfig | SdfConfig
"""What a workdir may hold a run of."""


# Reading and writing.


_CHOICES = (MarchConfig, StratifiedConfig, StepDecay, CosineDecay)
"""The members of tagged unions: in JSON they name their type."""


def to_json(config: Any) -> str:
    """A config as JSON text; `from_json` gives the equal config back."""
    return json.dumps(to_plain(config), indent=2) + "\n"


def from_json(text: str, kind: type = NerfConfig) -> Any:
    """The config of type `kind` that `text` holds. Raises InputError where the text does not fit the type."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number without end, nesting without end
        raise InputError(f"config is not JSON: {error}") from None
    return _from_plain(plain, kind, "config")


def apply_overrides(config: Any, overrides: typing.Iterable[str]) -> Any:
    """`config` with each `dotted.path=value` set; a value keeps the type of the field it replaces.

    Where a field may hold one of several groups, the value is a group's name: `optimizer.decay=CosineDecay`.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"override {shown(override)}: expected dotted.path=value")
        config = _set(config, path.strip().split("."), text.strip(), path.strip())
    return config


def differences(old: Any, new: Any) -> list[str]:
    """The dotted paths at which two configs differ, each with both values."""
    a, b = (dict(_leaves(to_plain(config))) for config in (old, new))
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def to_plain(value: Any) -> Any:
    """A config as nested dicts, as JSON has them."""
    if not dataclasses.is_dataclass(value):
        return value
    plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"type": type(value).__name__, **plain} if isinstance(value, _CHOICES) else plain


def _leaves(plain: Any, path: str = "") -> typing.Iterator[tuple[str, Any]]:
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, list(plain) if isinstance(plain, tuple) else plain


def _from_plain(plain: Any, kind: Any, path: str) -> Any:
    if isinstance(kind, types.UnionType):  # a tagged union of dataclasses
        names = {k.__name__: k for k in typing.get_args(kind)}
        tag = plain.get("type") if isinstance(plain, dict) else None
        if not isinstance(tag, str) or tag not in names:
            raise InputError(f"{path}.type = {shown(tag)}: expected one of {', '.join(names)}")
        return _from_plain({k: v for k, v in plain.items() if k != "type"}, names[tag], path)
    if dataclasses.is_dataclass(kind):
        if not isinstance(plain, dict):
            raise InputError(f"{path}: expected an object with the fields of {kind.__name__}")  # type: ignore[union-attr]
        hints = typing.get_type_hints(kind)
        _check_names(set(plain), set(hints), path)
        if missing := sorted(set(hints) - set(plain)):
            raise InputError(f"{path}: {missing[0]!r} is missing")
        return kind(**{name: _from_plain(value, hints[name], f"{path}.{name}") for name, value in plain.items()})  # type: ignore[operator]
    return _coerce(plain, kind, path)


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as the field type `kind`, or InputError; the only conversions are int -> float and list -> tuple."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise InputError(f"{path} = {shown(value)}: expected one of {', '.join(map(repr, choices))}")
    if origin is tuple:
        kinds = typing.get_args(kind)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_coerce(v, k, path) for v, k in zip(value, kinds, strict=True))
        raise InputError(f"{path} = {shown(value)}: expected a list of {len(kinds)} values")
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else value
    bound = {float: 1e300, int: 2**63}.get(kind)
    if type(value) is not kind or (bound and not -bound < value < bound):
        raise InputError(f"{path} = {shown(value)}: expected {kind.__name__}")
    return value


def _check_names(given: set[str], known: set[str], path: str) -> None:
    if unknown := sorted(given - known):
        raise InputError(f"{path}: no field {shown(unknown[0])}; its fields are {', '.join(sorted(known))}")


def _set(config: Any, names: list[str], text: str, path: str) -> Any:
    if not dataclasses.is_dataclass(config):
        raise InputError(f"override {shown(path)}: {shown(names[0])} goes below a value; its parent holds no fields")
    hints = typing.get_type_hints(type(config))
    _check_names({names[0]}, set(hints), f"override {shown(path)}")
    old = getattr(config, names[0])
    if len(names) > 1:
        new = _set(old, names[1:], text, path)
    elif isinstance(hints[names[0]], types.UnionType):
        kinds = {kind.__name__: kind for kind in typing.get_args(hints[names[0]])}
        if text not in kinds:
            raise InputError(f"override {shown(path)}: {shown(text)} is none of {', '.join(kinds)}")
        new = kinds[text]()
    elif dataclasses.is_dataclass(old):
        fields = ", ".join(f.name for f in dataclasses.fields(old))
        raise InputError(f"override {path!r}: names a group; its fields are {fields}")
    else:
        new = _coerce(_parse(text, hints[names[0]]), hints[names[0]], path)
    return replace(config, **{names[0]: new})  # type: ignore[type-var]


def _parse(text: str, kind: Any) -> Any:
    """The value that `text` spells; powers may be written 2**19."""
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
