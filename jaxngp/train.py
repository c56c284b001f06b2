"""Learn a scene from its images, then evaluate it and write novel views.

The same command goes on where an interrupted run stopped. A finished run is only evaluated again; --restart trains
it anew.
"""

from __future__ import annotations

import concurrent.futures
from dataclasses import replace
from pathlib import Path

from jaxngp import flags
from jaxngp.config import InputError, NerfConfig
from jaxngp.data import RayTable, Split, load_evaluation, load_training
from jaxngp.data.checks import dataset_warnings
from jaxngp.training.progress import warn
from jaxngp.training.summary import evaluate_into, training_summary, write_summary
from jaxngp.training.workdir import fit


def main(values: flags.Flags) -> None:
    config = flags.train_config(values)
    training = load_training(config.scene)
    config = with_known_background(config, training)
    workdir = Path(values.workdir or f"runs/{Path(config.scene.name).resolve().stem}")
    # Evaluation views are read in the background, since reading images and compiling keep different cores busy.
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        reading = reader.submit(evaluation_split, config, values, training)
        doubting = reader.submit(lambda: dataset_warnings(training, reading.result()))
        if values.restart:
            reading.result()  # only when all input has been read: a typing error must not cost a run
        with flags.training_in(workdir, config, restart=values.restart):
            progress, trained_on = fit(
                config, lambda: training.images, workdir, before_step_0=lambda: warn(*doubting.result())
            )
            evaluation = reading.result()
            print(f"trained for {progress.step} steps in {progress.seconds:.1f} s")
            if evaluation is None:
                return
            result = evaluate_into(workdir, progress.state, evaluation, config=config, background=values.background)
            print(write_summary(workdir, config.scene.name, result, training_summary(progress), trained_on))
            print(f"novel views: {workdir / 'novel_views'}   next: python -m jaxngp.render --workdir={workdir}")


def evaluation_split(config: NerfConfig, values: flags.Flags, training: Split) -> Split | None:
    """The views to evaluate on; None for a ray table of unknown image size, of which nothing can be shown."""
    try:
        return load_evaluation(config.scene, values.eval_split, values.eval_views)
    except InputError as error:
        if not isinstance(training.images, RayTable) or values.eval_split != "auto":
            raise
        print(f"no evaluation: {error}")
        return None


def with_known_background(config: NerfConfig, training: Split) -> NerfConfig:
    """White instead of random where no image has alpha: what lies behind the scene is then part of the pictures."""
    if training.has_alpha or config.train.background != "random":
        return config
    print("the images have no alpha: training before white instead of random backgrounds")
    return replace(config, train=replace(config.train, background="white"))


if __name__ == "__main__":
    flags.run("jaxngp.train", flags.define_train_flags, main, __doc__)
