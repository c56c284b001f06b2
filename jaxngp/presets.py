"""The configs that people use by name: presets, and scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jaxngp.config import (
    CosineDecay,
    FieldConfig,
    HashGridConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    OccupancyConfig,
    OptimizerConfig,
    SceneConfig,
    StepDecay,
    StratifiedConfig,
    TrainConfig,
    shown,
)

_PAPER = NerfConfig(
    sampler=MarchConfig(opaque_cells=0.0, num_candidates=2**20, occupancy=OccupancyConfig(carve=False)),
    optimizer=OptimizerConfig(ema_decay=0.0),
    train=TrainConfig(loss="l2", max_steps=50_000),
)
_BASE = NerfConfig(
    field=FieldConfig(encoding=HashGridConfig(num_levels=8, num_features=4), precision="bfloat16"),
    sampler=MarchConfig(opaque_cells=8.0, num_candidates=2**19, num_samples=2**17),
    optimizer=OptimizerConfig(decay=CosineDecay()),
    train=TrainConfig(num_rays=2**14, loss="l2", calls_in_flight=4),
)
_SMALL = NerfConfig(
    field=FieldConfig(
        encoding=HashGridConfig(num_levels=8, num_features=4, table_size=2**16, max_resolution=512),
        hidden_width=32,
        colour_layers=1,
    ),
    sampler=MarchConfig(
        num_steps=384,
        num_candidates=3 * 2**13,
        num_samples=5 * 2**11,
        roulette=0.015,
        occupancy=OccupancyConfig(threshold=0.02),
    ),
    optimizer=OptimizerConfig(learning_rate=2.5e-2, decay=CosineDecay()),
    train=TrainConfig(num_rays=5 * 2**9, loss="l2", max_steps=20_000, max_seconds=60.0),
)
_HUNDRED_LINES = NerfConfig(
    field=FieldConfig(
        encoding=HashGridConfig(dense_levels=False),
        direction_encoding="frequency",
        use_bias=True,
        mlp_init="torch",
        mask_outside_box=True,
    ),
    sampler=StratifiedConfig(),
    optimizer=OptimizerConfig(decay=StepDecay(factor=1.0), ema_decay=0.0),
    train=TrainConfig(num_rays=2**14, loss="l2", background="white", max_steps=3906, steps_per_dispatch=1),
)

PRESETS: dict[str, NerfConfig] = {"paper": _PAPER, "base": _BASE, "small": _SMALL, "hundred_lines": _HUNDRED_LINES}
PRESET_HELP = {
    "paper": "as published",
    "base": "for a GPU: half the table reads, bfloat16",
    "small": "a minute of training on a CPU",
    "hundred_lines": "the 100-line PyTorch recipe: no occupancy grid, 192 bins a ray",
}

_BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
SCENES: dict[str, SceneConfig] = {
    "bricks": SceneConfig(box_side=3.0),
    **{name: SceneConfig(name=name, box_side=3.0) for name in _BLENDER_SCENES},
}
"""The built-in scene and the eight of NeRF-synthetic; any other scene is given as a path."""


def suited(config: NerfConfig, *, num_cascades: int, has_alpha: bool) -> NerfConfig:
    """`config` as it suits the training views.

    num_cascades: above 1 the scene surrounds its cameras, and reaches as far as so many nested cubes: steps then grow
    with distance. has_alpha: whether images have alpha, so that silhouettes can exclude cells. Where none has, what
    lies behind the scene is part of the pictures, and white takes the place of random backgrounds; but not around
    cameras, where all that they see is in the scene, and behind random colours it becomes opaque. Raises InputError for
    surroundings and a config that does not march.
    """
    if num_cascades > 1:
        return _for_surroundings(config, num_cascades, has_alpha)
    if has_alpha or config.train.background != "random":
        return config
    return replace(config, train=replace(config.train, background="white"))


def _for_surroundings(config: NerfConfig, num_cascades: int, has_alpha: bool) -> NerfConfig:
    if not isinstance(config.sampler, MarchConfig):
        raise InputError("this preset samples a box of known size and takes no surroundings: give another --preset")
    sampler = config.sampler
    num_steps = sampler.num_steps // 2
    # In warm-up a refresh looks at every cell: at no more of them than 4 steps have samples.
    cells = 4 * (sampler.num_candidates or sampler.num_samples) / num_cascades
    resolution = min(sampler.occupancy.resolution, max(32, round(cells ** (1 / 3)) // 32 * 32))
    # Surfaces fill their pixels, and a thin haze, of which there is much at first, costs samples and hides no errors.
    occupancy = replace(
        sampler.occupancy, num_cascades=num_cascades, resolution=resolution, threshold=0.05, carve=has_alpha
    )
    sampler = replace(sampler, num_steps=num_steps, growth=3 / num_steps, occupancy=occupancy)
    return replace(config, sampler=sampler)


def scene_config(name: str) -> SceneConfig:
    """The config of a named scene, or of the scene at a path."""
    if name in SCENES:
        return SCENES[name]
    if "/" in name or "\\" in name or "." in name:
        return SceneConfig(name=name)
    if Path(name).exists():
        raise InputError(f"unknown scene {shown(name)}: for what is here under that name, give ./{name}")
    raise InputError(f"unknown scene {shown(name)}: give one of {', '.join(SCENES)}, or a path that contains a '/'")
