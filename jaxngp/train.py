"""Learn a scene from its images, then evaluate it and write novel views.

The same command goes on where an interrupted run stopped. A finished run is only evaluated again; --extend with a
larger budget trains it on, --restart trains it anew.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from pathlib import Path

from jaxngp import camera_report, flags, processes, runs
from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, NerfConfig, to_json
from jaxngp.console import warn
from jaxngp.data import RayTable, Split, load_evaluation, load_training
from jaxngp.data.checks import dataset_warnings
from jaxngp.evaluation import evaluate_into, prepare, write_summary
from jaxngp.presets import SCENES
from jaxngp.training.loop import Progress, train
from jaxngp.viewing.panel import check_host
from jaxngp.viewing.source import Source, history_of
from jaxngp.viewing.viewer import NoViewer, Viewer, open_viewer


def main(values: flags.Flags) -> None:
    check_viewer(values)
    asked = flags.train_config(values)
    training = load_training(asked.scene, processes.index(), processes.count(), images_on=asked.train.images_on)
    config = flags.train_config(values, training)
    if not training.has_alpha and config.train.background == "white":
        print("the images have no alpha: training with a white background")
    workdir = Path(values.workdir or f"runs/{Path(config.scene.name).resolve().stem}")
    # Evaluation views are read in the background, since reading images and compiling keep different cores busy.
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        alone = processes.count() == 1
        reading = reader.submit(evaluation_split, config, values, training)
        known = config.scene.name in SCENES  # whose cameras are right
        checking = reader.submit(
            lambda: dataset_warnings(training, reading.result(), cameras=not known) if alone else []
        )
        if values.restart:
            reading.result()  # only when all input has been read: a typing error must not cost a run
        with (
            runs.training_in(workdir, config, data=training, restart=values.restart, extend=values.extend) as run,
            viewer_of(run, training, values) as viewer,
        ):
            if processes.is_first():
                print(to_json(config), end="")
            progress = run.resume
            if not run.finished:
                for progress in train(config, training.images, resume=run.resume):
                    if progress.metrics is None:  # compiled, before the first step
                        warn(*checking.result())
                    run.record(progress)
                    viewer.show(progress)
                    if run.interrupted:
                        break
            run.exit_if_interrupted()
            assert progress is not None
            trained_on = run.trained_on()  # by all processes, for orbax lets them wait for each other
            if not processes.is_first():
                processes.wait_for_all("the views are evaluated")
                return
            print(f"trained for {progress.step} steps in {progress.seconds:.1f} s")
            report_cameras(workdir, training, progress)
            if (evaluation := reading.result()) is not None:
                given = training.images.cameras if isinstance(training.images, PosedImages) else None
                evaluation = prepare(evaluation, given, progress, fit=flags.fitted_parts(values))
                result = evaluate_into(
                    workdir,
                    progress.field,
                    progress.state.occupancy,
                    evaluation,
                    sampler=config.sampler,
                    background=values.background,
                )
                print(write_summary(workdir, config.scene.name, result, progress, trained_on))
                print(f"novel views: {workdir / 'novel_views'}   next: python -m jaxngp.render --workdir={workdir}")
            viewer.stay(progress)
            processes.wait_for_all("the views are evaluated")


def report_cameras(workdir: Path, training: Split, progress: Progress) -> None:
    """Say how cameras and exposures were refined, if they were."""
    if progress.state.refinement is None:
        return
    report = camera_report.write(workdir, training, progress)
    print(report)
    warn(*report.warnings)


def check_viewer(values: flags.Flags) -> None:
    """Raises InputError where --view cannot be served, before anything is read or removed."""
    if values.view and (values.mesh not in (None, "one") or processes.count() > 1):
        raise InputError("--view draws on the one device that trains: leave away --mesh, or watch with jaxngp.view")
    if values.view:
        check_host(values.view_host)
    elif values["view_port"].present or values["view_host"].present:
        raise InputError("--view_port and --view_host are for --view: give that too")


def viewer_of(
    run: runs.TrainingRun, training: Split, values: flags.Flags
) -> contextlib.AbstractContextManager[Viewer | NoViewer]:
    """The viewer that --view asks for."""
    if not values.view:
        return contextlib.nullcontext(NoViewer())
    assert isinstance(run.config, NerfConfig)
    source = Source(
        config=run.config,
        workdir=run.workdir,
        cameras=training.images.cameras if isinstance(training.images, PosedImages) else None,
        transform=training.transform,
        read=lambda: training,
        history=lambda: history_of(run.workdir),
        save=run.save,
        stop=run.asked_to_stop,
    )
    return open_viewer(source, host=values.view_host, port=values.view_port)


def evaluation_split(config: NerfConfig, values: flags.Flags, training: Split) -> Split | None:
    """The views to evaluate on; None for a ray table of unknown image size, of which nothing can be shown.

    Of several processes, the first evaluates.
    """
    if not processes.is_first():
        return None
    try:
        return load_evaluation(config.scene, values.eval_split, values.eval_views)
    except InputError as error:
        if not isinstance(training.images, RayTable) or values.eval_split != "auto":
            raise
        print(f"no evaluation: {error}")
        return None


if __name__ == "__main__":
    flags.run("jaxngp.train", flags.define_train_flags, main, __doc__)
