"""Runs in their folders: opened again, extended, moved, trained in a thread, and many in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from entrypoints import SIZE, TINY, refusal, run, write_scene
from PIL import Image

from jaxngp import runs, train_sdf
from jaxngp.cameras import orbit_poses
from jaxngp.config import (
    CosineDecay,
    HashGridConfig,
    ImageConfig,
    ImageTrainConfig,
    InputError,
    NerfConfig,
    OptimizerConfig,
    PointFieldConfig,
    RunConfig,
    SceneConfig,
    SdfConfig,
    SdfTrainConfig,
    TrainConfig,
    apply_overrides,
)
from jaxngp.console import interruption
from jaxngp.data import Split, load_training
from jaxngp.presets import PRESETS
from jaxngp.rendering import render_view
from jaxngp.training import loop
from jaxngp.training.image import ImagePixels
from jaxngp.training.loop import Progress, train
from jaxngp.training.optimizer import learning_rate
from jaxngp.training.sdf import DistanceSamples
from jaxngp.training.step import Programs

OVERRIDES = [flag.removeprefix("--override=") for flag in TINY if flag.startswith("--override=")]


def tiny_config(scene: Path, max_steps: int = 40) -> NerfConfig:
    """What the commands make of TINY."""
    return apply_overrides(
        replace(PRESETS["small"], scene=SceneConfig(name=str(scene))),
        [*OVERRIDES, f"train.max_steps={max_steps}", "train.max_seconds=0.0"],
    )


def learn(workdir: Path, config: RunConfig, data: Any, **options: Any) -> Progress:
    """Train in a workdir, as the commands do; options are those of `training_in`."""
    images = data.images if isinstance(data, Split) else data
    with runs.training_in(workdir, config, data=data if isinstance(data, Split) else None, **options) as training:
        for progress in train(config, images, resume=training.resume):
            training.record(progress)
    return progress


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread that is not the main one; what it raises is raised here."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def assert_equal_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scenes") / "square")


@pytest.fixture(scope="module")
def trained(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Progress, Split]:
    """A run of 40 steps that a thread trained, where it stands, and the views that it learned from."""
    workdir = tmp_path_factory.mktemp("runs") / "square"
    config, views = tiny_config(scene), load_training(SceneConfig(name=str(scene)))
    return workdir, in_thread(lambda: learn(workdir, config, views)), views


@pytest.fixture
def moved(trained: tuple[Path, Progress, Split], scene: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the workdir and of the scene, whose folder has another name; the run does not know where it is."""
    workdir, elsewhere = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained[0], workdir)
    shutil.copytree(scene, elsewhere)
    plain = json.loads((workdir / "config.json").read_text())
    plain["scene"]["name"] = str(tmp_path / "gone" / "square")
    (workdir / "config.json").write_text(json.dumps(plain))
    return workdir, elsewhere


# Training in a thread, and opening what it left.


def test_a_run_trains_outside_the_main_thread(trained: tuple[Path, Progress, Split]) -> None:
    workdir, progress, _ = trained
    assert progress.finished
    assert (workdir / "checkpoints" / "40").is_dir()
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 40


def test_an_opened_run_is_what_training_had(trained: tuple[Path, Progress, Split]) -> None:
    workdir, progress, views = trained
    opened = runs.load(workdir)
    assert opened.config == progress.config
    assert opened.progress.step == 40
    assert opened.trained_on["device"].startswith("cpu")
    assert_equal_trees(opened.field, progress.field)
    assert_equal_trees(opened.occupancy, progress.state.occupancy)
    assert_equal_trees(opened.cameras, views.images.cameras)
    assert opened.transform == views.transform


def test_an_opened_run_renders_what_training_would(trained: tuple[Path, Progress, Split]) -> None:
    workdir, progress, views = trained
    opened, camera = runs.load(workdir), views.images.cameras[1]
    pose = orbit_poses(np.asarray(views.images.cameras.c2w), 5)[3]

    def expected(camera: Any, background: float) -> Any:
        colour = jnp.full(3, background, jnp.float32)
        return render_view(progress.field, camera, progress.state.occupancy, colour, sampler=progress.config.sampler)

    assert opened.cameras is not None
    assert_equal_trees(opened.render(opened.cameras[1]), expected(camera, 1.0))
    assert_equal_trees(opened.render(camera, pose, background="black"), expected(camera.replace(c2w=pose), 0.0))


GRID = HashGridConfig(num_dims=2, num_levels=1, table_size=2**8, min_resolution=8)
IMAGE = ImageConfig(
    field=PointFieldConfig(encoding=GRID, hidden_width=8, num_outputs=3),
    train=ImageTrainConfig(max_steps=20, steps_per_dispatch=10, num_points=64),
)
SDF = SdfConfig(
    field=PointFieldConfig(encoding=replace(GRID, num_dims=3), hidden_width=8),
    train=SdfTrainConfig(max_steps=20, steps_per_dispatch=10, num_points=64),
)


def ball_samples(count: int = 128) -> DistanceSamples:
    """Points on a ball of radius 0.3, and points anywhere with their distance."""
    rng = np.random.default_rng(0)
    towards, position = rng.normal(size=(count, 3)), rng.random((count, 3))
    surface = 0.5 + 0.3 * towards / np.linalg.norm(towards, axis=1, keepdims=True)
    distance = np.linalg.norm(position - 0.5, axis=1) - 0.3
    return DistanceSamples(*(jnp.asarray(array, jnp.float32) for array in (surface, position, distance)))


@pytest.mark.parametrize("kind", ["image", "sdf"])
def test_a_run_without_views_has_no_pictures(kind: str, trained: tuple[Path, Progress, Split], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    config, data = (IMAGE, ImagePixels(jnp.asarray(pixels))) if kind == "image" else (SDF, ball_samples())
    progress = learn(tmp_path, config, data)
    opened = runs.load(tmp_path)
    position = np.random.default_rng(1).random((5, config.field.encoding.num_dims)).astype(np.float32)
    found = opened.field(position)
    assert found.shape == ((5, 3) if kind == "image" else (5,))
    np.testing.assert_array_equal(found, progress.field(position))
    assert (opened.config, opened.cameras, opened.occupancy) == (config, None, None)
    with pytest.raises(InputError, match="is not a run of a radiance field"):
        opened.render(trained[2].images.cameras[0])
    with pytest.raises(InputError, match=f"holds a run of python -m jaxngp.train_{kind}"):
        runs.load(tmp_path, NerfConfig)


# A larger budget.


def test_a_larger_budget_needs_extend(
    trained: tuple[Path, Progress, Split], scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it the run goes on as `train(new_config, data, resume=...)` would, to the bit."""
    shutil.copytree(trained[0], tmp_path / "run")
    arguments = [f"--scene={scene}", f"--workdir={tmp_path / 'run'}", *TINY, "--max_steps=72", "--eval_views=1"]
    said = refusal(capsys, "train", *arguments)
    assert "train.max_steps: 40 -> 72" in said
    assert "--extend" in said
    assert runs.load(tmp_path / "run").progress.step == 40
    longer = tiny_config(scene, max_steps=72)
    *_, expected = train(longer, trained[2].images, resume=runs.load(trained[0]).progress)
    run("train", *arguments, "--extend")
    found = runs.load(tmp_path / "run")
    assert found.config == longer
    assert found.progress.step == expected.step == 72
    assert_equal_trees(found.progress.state.replace(key=None), expected.state.replace(key=None))


def test_an_extended_run_has_the_rates_of_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the new one from where the run stands, so a rate that had decayed rises."""
    optimizer = OptimizerConfig(decay=CosineDecay(start=0.0))
    config = NerfConfig(optimizer=optimizer, train=TrainConfig(max_steps=64, steps_per_dispatch=16))
    rates: list[float] = []

    def steps(state: Any, step: int, learning_rates: Any, number: int) -> tuple[Any, Any]:
        rates.extend(np.asarray(learning_rates)[:number].tolist())
        return state, types.SimpleNamespace(skipped=0.0, samples=1.0)

    task = types.SimpleNamespace(compile_programs=lambda *_: Programs(steps))
    monkeypatch.setitem(loop.TASKS, NerfConfig, task)
    stood = replace(config, train=replace(config.train, max_steps=32))
    *_, last = train(config, None, resume=Progress(stood, jnp.zeros(()), None, 32, 1.0, 0.0, 0.0))  # type: ignore[arg-type]
    number = np.arange(32, 64)
    np.testing.assert_allclose(rates, learning_rate(number, number / 64, config=optimizer), rtol=1e-6)
    assert rates[0] > learning_rate(np.array([31]), np.array([31 / 32]), config=optimizer)[0]
    assert (last.step, last.config) == (64, config)


def test_a_finished_run_stays_where_it_is_and_says_so(trained: tuple[Path, Progress, Split]) -> None:
    _, progress, views = trained
    with pytest.warns(UserWarning, match=r"at step 40 .* the budget is 40 steps: nothing is left to train"):
        found = list(train(progress.config, views.images, resume=progress))
    assert [p.step for p in found] == [40]
    assert found[0].state is progress.state


# Data that moved, and data that changed.


def test_a_moved_scene_is_found_in_data_dir(
    moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By all three commands, and training takes the run for the one it was."""
    workdir, elsewhere = moved
    assert "gone" in refusal(capsys, "evaluate", f"--workdir={workdir}")
    run("evaluate", f"--workdir={workdir}", f"--data_dir={elsewhere}", "--eval_views=1")
    run("render", f"--workdir={workdir}", f"--data_dir={elsewhere}", "--path=val", "--frames=1")
    run("render", f"--workdir={workdir}", "--frames=1")  # an orbit needs no data
    scene = f"--scene={tmp_path / 'gone' / 'square'}"
    run("train", scene, f"--data_dir={elsewhere}", f"--workdir={workdir}", *TINY, "--eval_views=1")
    captured = capsys.readouterr()
    assert "trained for 40 steps" in captured.out
    assert "other data" not in captured.err


def test_a_moved_scene_is_recognised_by_its_data(
    moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its folder is called now; another scene is refused as another config is."""
    workdir, elsewhere = moved
    monkeypatch.chdir(tmp_path)
    run("train", "--scene=./moved", "--workdir=run", *TINY, "--eval_views=1")
    assert "trained for 40 steps" in capsys.readouterr().out
    assert runs.read_config(workdir).scene.name == str(elsewhere.resolve())
    write_scene(tmp_path / "other", num_views=2)
    assert "scene.name" in refusal(capsys, "train", "--scene=./other", "--workdir=run", *TINY)


def test_data_that_changed_in_place_are_named(moved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    workdir, elsewhere = moved
    Image.fromarray(np.full((SIZE, SIZE, 4), 255, np.uint8)).save(elsewhere / "train" / "r_1.png")
    square = elsewhere.rename(elsewhere.with_name("square"))
    arguments = [f"--scene={square}", f"--workdir={workdir}", *TINY, "--eval_views=1"]
    run("train", *arguments)
    assert "trained on other data: 1 of 3 views have other pixels" in capsys.readouterr().err
    run("train", *arguments)  # said once
    assert "other data" not in capsys.readouterr().err


def test_another_scene_of_the_same_name_is_refused(
    moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are still there, so neither is the other, moved."""
    workdir, elsewhere = moved
    run("train", f"--scene={elsewhere}", f"--workdir={workdir}", *TINY, "--eval_views=1")
    write_scene(tmp_path / "b" / elsewhere.name, num_views=2)
    other = f"--scene={tmp_path / 'b' / elsewhere.name}"
    assert f"other data of the same name, {elsewhere.resolve()}" in refusal(
        capsys, "train", other, f"--workdir={workdir}", *TINY
    )


def test_a_tilde_in_workdir_is_the_home_folder(
    trained: tuple[Path, Progress, Split], scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0], tmp_path / "home" / "runs" / "s")
    run("train", f"--scene={scene}", "--workdir=~/runs/s", *TINY, "--eval_views=1")
    run("evaluate", "--workdir=~/runs/s", "--eval_views=1")
    run("render", "--workdir=~/runs/s", "--frames=1")
    assert runs.load("~/runs/s").progress.step == 40
    assert (tmp_path / "home" / "runs" / "s" / "renders" / "orbit" / "frame_0000.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


# Few views.


@pytest.mark.slow
def test_one_view_is_trained_evaluated_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, workdir = write_scene(tmp_path / "scene", splits=("train",), num_views=1), tmp_path / "run"
    run("train", f"--scene={scene}", f"--workdir={workdir}", *TINY)
    assert "no view is held out" in capsys.readouterr().err
    run("evaluate", f"--workdir={workdir}")
    run("render", f"--workdir={workdir}", "--frames=1")
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["split"], summary["num_views"]) == ("train", 1)


def test_all_views_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, workdir = write_scene(tmp_path / "scene", splits=("train",)), tmp_path / "run"
    run("train", f"--scene={scene}", f"--workdir={workdir}", *TINY, "--hold_out_every=0", "--eval_views=1")
    assert "no view is held out" in capsys.readouterr().err
    assert len(runs.load(workdir).cameras) == 3
    assert json.loads((workdir / "summary.json").read_text())["split"] == "train"


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_noted_and_a_second_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruption() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    with pytest.raises(SystemExit) as exit_info:
        stop.exit_if_set()
    assert exit_info.value.code == 128 + number


# In processes of their own.


def in_process(call: str, **environment: str) -> str:
    """What another Python prints that calls a function of this module."""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", f"import test_runs; test_runs.{call}"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_all_commands(scene: str, folder: str) -> None:
    """Every command once, as small as they go."""
    run("train", f"--scene={scene}", f"--workdir={folder}/nerf", *TINY, "--eval_views=1")
    run("evaluate", f"--workdir={folder}/nerf", "--eval_views=1", "--background=black")
    run("render", f"--workdir={folder}/nerf", "--frames=1")
    small = ["--max_steps=20", "--override=field.hidden_width=8", "--override=field.encoding.num_levels=2"]
    small += ["--override=train.num_points=2**8", "--override=field.encoding.table_size=2**10"]
    run("train_image", "--size=24", f"--workdir={folder}/image", *small)
    train_sdf.NUM_VOLUME_POINTS, train_sdf.NUM_SURFACE_POINTS = 2**12, 2**8
    points = ["--override=sdf.num_samples=2**10", "--image_size=16", "--mesh_resolution=16"]
    run("train_sdf", "--preset=small", "--shape=sphere", f"--workdir={folder}/sdf", *small, *points)
    for name in ("nerf", "image", "sdf"):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(runs.load(f"{folder}/{name}").field)} == {"float32"}


@pytest.mark.slow
def test_commands_run_with_64_bit_types(trained: tuple[Path, Progress, Split], scene: Path, tmp_path: Path) -> None:
    """And compute the same in the same dtypes, but for rounding: optax corrects Adam's bias in 64 bits."""
    in_process(f"run_all_commands({str(scene)!r}, {str(tmp_path)!r})", JAX_ENABLE_X64="1")
    wide, usual = (jax.tree.leaves(runs.load(workdir).field) for workdir in (tmp_path / "nerf", trained[0]))
    for a, b in zip(wide, usual, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)  # 1e-6 here; Adam amplifies the rounding of small gradients
    for name, quality in (("nerf", "psnr"), ("image", "psnr"), ("sdf", "iou")):
        assert json.loads((tmp_path / name / "summary.json").read_text())[quality] is not None


STATM = Path("/proc/self/statm")
PROGRAMS = ("nerf_steps", "refresh_occupancy", "hull_of_views", "_init_state")


def train_ten_times(scene: str, folder: str) -> None:
    """Print, after each training, what was compiled so far, and how many bytes are resident."""
    views, counts = load_training(SceneConfig(name=scene)), []
    with Compilations() as compilations:
        for number in range(10):
            config = tiny_config(Path(scene), max_steps=17 + 8 * number)
            config = apply_overrides(config, [f"train.seed={number}", f"train.log_every={5 * number}"])
            learn(Path(folder) / str(number), config, views)
            resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            counts.append({"resident": resident, "all": compilations[""], **{p: compilations[p] for p in PROGRAMS}})
    print(json.dumps(counts))


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason=f"there is no {STATM}")
def test_ten_trainings_compile_once_and_keep_memory(scene: Path, tmp_path: Path) -> None:
    """They differ in seed, budget and log interval; the second compiles nothing that the first did not."""
    counts = json.loads(in_process(f"train_ten_times({str(scene)!r}, {str(tmp_path)!r})").splitlines()[-1])
    assert [counts[0][name] for name in PROGRAMS] == [1, 1, 1, 1]
    assert {count["all"] for count in counts[1:]} == {counts[1]["all"]}
    assert [counts[-1][name] for name in PROGRAMS] == [1, 1, 1, 1]
    assert counts[-1]["resident"] - counts[1]["resident"] < 50e6
