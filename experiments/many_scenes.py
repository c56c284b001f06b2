"""Several scenes trained in one program, beside one after the other.

    python -m experiments.many_scenes [--num_scenes=2] [--image_size=200] [--mesh=auto]

All scenes have the same shapes: the built-in one, each with a seed of its own. Prints milliseconds a step of all,
compilation excluded, the median over calls of train.steps_per_dispatch steps, after as many calls to warm up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from absl import flags as absl_flags

from jaxngp import flags
from jaxngp.config import SceneConfig, apply_overrides
from jaxngp.data import load_training
from jaxngp.presets import PRESETS
from jaxngp.records import device_name
from jaxngp.training.loop import train
from jaxngp.training.many import train_many


def median_ms(progresses: Iterator[Any]) -> tuple[float, Any]:
    """Milliseconds a step, the median over the second half of the calls; and where training ends."""
    steps, seconds = [], []
    for progress in progresses:
        steps.append(progress.step)
        seconds.append(progress.seconds)
    each = np.diff(seconds) / np.diff(steps)
    return float(np.median(each[len(each) // 2 :])) * 1e3, progress


def define_flags(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_integer("num_scenes", 2, "Scenes in one program.", 1, flag_values=values)
    absl_flags.DEFINE_integer("image_size", 200, "Pixels per side of the built-in scene.", 16, flag_values=values)
    absl_flags.DEFINE_integer("calls", 40, "Calls of the program, half of them timed.", 4, flag_values=values)
    absl_flags.DEFINE_multi_string("override", [], "A field of the config: path=value.", flag_values=values)
    flags.define_mesh_flag(values)


def main(values: absl_flags.FlagValues) -> None:
    config = apply_overrides(PRESETS["small"], values.override)
    loop = replace(config.train, max_steps=values.calls * config.train.steps_per_dispatch, max_seconds=0.0)
    config = replace(config, train=loop)
    images: Any = load_training(SceneConfig(image_size=values.image_size, box_side=3.0)).images
    seeds = range(values.num_scenes)
    configs = [replace(config, train=replace(loop, seed=seed)) for seed in seeds]
    one, _ = median_ms(train(config, images))
    every, ended = median_ms(train_many(configs, [images] * len(seeds)))
    print(
        f"{len(seeds)} scenes: {one * len(seeds):.2f} ms a step one after the other, {every:.2f} ms in one program, "
        f"{one * len(seeds) / every:.2f} times as fast; losses {np.asarray(ended.metrics.loss).round(4).tolist()}; "
        f"{device_name()}"
    )


if __name__ == "__main__":
    flags.run("experiments.many_scenes", define_flags, main, __doc__ or "")
