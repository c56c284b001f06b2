"""The three commands as a user meets them: what they write, how they go on, and how they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from entrypoints import COMMANDS, SIZE, TINY, refusal, run, write_scene
from PIL import Image

from jaxngp import evaluation, flags, runs
from jaxngp.config import SceneConfig, from_json
from jaxngp.data import load_training
from jaxngp.presets import PRESETS


def image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scenes") / "square")


@pytest.fixture(scope="module")
def trained(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "square"
    run("train", f"--scene={scene}", f"--workdir={workdir}", *TINY)
    return workdir


def test_training_leaves_what_one_needs(trained: Path) -> None:
    config = from_json((trained / "config.json").read_text())
    assert config.train.max_steps == 40
    assert config.field.hidden_width == 16
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [16, 32, 40]
    assert {"loss", "psnr", "samples", "dropped_samples", "occupied_fraction", "seconds"} <= set(log[0])
    assert (trained / "checkpoints" / "40").is_dir()
    names = {path.name for path in (trained / "novel_views").iterdir()}
    assert names == {"img_0.png", "img_1.png", "img_2.png", "contact_sheet.png"}
    assert image_size(trained / "novel_views" / "img_0.png") == (SIZE, SIZE)


def test_the_summary_says_what_was_measured(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    expected = {
        "psnr", "ssim", "split", "background", "num_views", "resolution", "steps", "train_seconds", "compile_seconds",
        "samples_per_second", "device", "jax_version", "version", "peak_memory_bytes", "colour_space", "views",
    }  # fmt: skip
    assert expected <= set(summary)
    assert summary["split"] == "val"
    assert summary["background"] == "white"
    assert summary["num_views"] == 3
    assert summary["resolution"] == [SIZE, SIZE]
    assert summary["steps"] == 40
    assert summary["views"] == ["r_0", "r_1", "r_2"]
    assert summary["jax_version"] == jax.__version__


def test_the_same_command_again_only_evaluates(trained: Path, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = (trained / "metrics.jsonl").read_text()
    psnr = json.loads((trained / "summary.json").read_text())["psnr"]
    run("train", f"--scene={scene}", f"--workdir={trained}", *TINY)
    assert (trained / "metrics.jsonl").read_text() == log
    assert json.loads((trained / "summary.json").read_text())["psnr"] == psnr
    assert "trained for 40 steps" in capsys.readouterr().out


def test_another_config_in_the_same_workdir_is_refused(
    trained: Path, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capsys, "train", f"--scene={scene}", f"--workdir={trained}", *TINY, "--seed=7")
    assert "train.seed: 0 -> 7" in error
    assert "--restart" in error


@pytest.mark.slow
def test_restart_trains_anew_and_leaves_foreign_files(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    arguments = [f"--scene={scene}", f"--workdir={tmp_path}", *TINY, "--eval_views=1"]
    assert "missing" in refusal(capsys, "train", *arguments)
    run("train", *arguments, "--restart")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "summary.json").read_text())["num_views"] == 1


def test_a_typing_error_beside_restart_costs_no_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in trained.iterdir())
    assert "/no/such/scene" in refusal(capsys, "train", "--scene=/no/such/scene", f"--workdir={trained}", "--restart")
    assert sorted(path.name for path in trained.iterdir()) == before


def test_without_alpha_the_background_is_white(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies behind the scene is then part of the pictures, and cannot be replaced; but an override is obeyed."""
    scene = write_scene(tmp_path / "scene", mode="RGB")
    values, views = flags.Flags(), load_training(SceneConfig(name=str(scene)))
    flags.define_train_flags(values)
    for given, expected in (([], "white"), (["--override=train.background=random"], "random")):
        values(["x", f"--scene={scene}", *given])
        assert flags.train_config(values, views).train.background == expected
    assert "alpha" in refusal(capsys, "evaluate", f"--workdir={trained}", f"--data_dir={scene}", "--background=black")


def test_cameras_that_miss_the_box_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = write_scene(tmp_path / "scene", far=-400.0)
    assert "scene.box_side" in refusal(capsys, "train", f"--scene={scene}", f"--workdir={tmp_path / 'run'}", *TINY)


def test_a_table_of_unknown_size_is_not_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    origin = np.tile([0.0, 0.0, 4.0], (600, 1))
    rows = np.concatenate([origin, rng.uniform(-0.3, 0.3, (600, 2)), -np.ones((600, 1)), rng.random((600, 3))], axis=1)
    np.save(tmp_path / "train.npy", rows)
    run("train", f"--scene={tmp_path / 'train.npy'}", f"--workdir={tmp_path / 'run'}", *TINY)
    assert "no evaluation" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "40").is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_log_holds_each_step_once_after_a_crash(scene: Path, tmp_path: Path) -> None:
    """At least log_every steps apart, but for the last."""
    arguments = [f"--scene={scene}", f"--workdir={tmp_path}", *TINY, "--eval_views=1", "--log_every=30"]
    run("train", *arguments)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [32, 40]
    later = json.dumps({**json.loads(lines[-1]), "step": 56})
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + later + "\n" + later[:20])
    run("train", *arguments)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)


def test_the_preset_is_chosen_by_the_backend_and_said(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument for argument in TINY if "preset" not in argument]
    run("train", f"--scene={scene}", f"--workdir={tmp_path}", *arguments, "--eval_views=1")
    assert "preset small, since jax runs on cpu" in capsys.readouterr().out


def test_evaluate_takes_another_split_and_background(trained: Path) -> None:
    run("evaluate", f"--workdir={trained}", "--eval_split=train", "--eval_views=1", "--background=black")
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["split"], summary["num_views"], summary["background"]) == ("train", 1, "black")
    assert summary["steps"] == 40


def test_render_writes_frames_depth_and_an_animation(trained: Path) -> None:
    run("render", f"--workdir={trained}", "--frames=3", "--width=32", "--height=18", "--animation=webp")
    folder = trained / "renders" / "orbit"
    frames = [f"{kind}_{i:04d}.png" for kind in ("depth", "frame") for i in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == [*frames, "orbit.webp"]
    assert image_size(folder / "frame_0000.png") == (32, 18)


def test_render_writes_the_layers_that_are_asked_for(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = "--layers=rgba,depth16,normals"
    run("render", f"--workdir={trained}", "--frames=2", "--animation=none", "--samples=2", "--aperture=0.1", layers)
    folder = trained / "renders" / "orbit"
    kinds = ("depth16", "normal", "rgba")
    assert sorted(path.name for path in folder.iterdir()) == [
        "depth16.json",
        *sorted(f"{kind}_{i:04d}.png" for kind in kinds for i in range(2)),
    ]
    with Image.open(folder / "rgba_0000.png") as rgba, Image.open(folder / "depth16_0000.png") as depth:
        assert rgba.mode == "RGBA"
        steps, opaque = np.asarray(depth).astype(int), np.asarray(rgba)[..., 3] >= 128
    unit = json.loads((folder / "depth16.json").read_text())
    assert unit["unit"] == "units of the scene's files"
    assert np.all((steps > 0) == opaque)
    assert np.all(np.abs(steps[opaque] * unit["step"] - 4.0) < 2.0)  # the cameras are 4 from the middle, the box 3 wide
    assert "'albedo' is none of" in refusal(capsys, "render", f"--workdir={trained}", "--layers=albedo")


def test_render_follows_a_camera_path(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path through the training cameras shows what these show."""
    cameras, transform = runs.load(trained).cameras, runs.load(trained).transform
    fov = float(2 * np.degrees(np.arctan(0.5 * cameras.size[0, 1] / cameras.focal_xy[0, 1])))
    rows = [np.vstack([pose, [0, 0, 0, 1]]).reshape(-1).tolist() for pose in transform.pose_to_world(cameras.c2w)]
    plain = {"render_width": 24, "render_height": 24, "fps": 5, "camera_type": "perspective"}
    frames = [{"camera_to_world": row, "fov": fov} for row in rows]
    (tmp_path / "walk.json").write_text(json.dumps(plain | {"camera_path": frames}))
    run("render", f"--workdir={trained}", f"--path={tmp_path / 'walk.json'}", "--animation=gif")
    run("render", f"--workdir={trained}", "--path=train", "--animation=none")
    for index in range(len(rows)):
        pictures = [Image.open(trained / "renders" / path / f"frame_{index:04d}.png") for path in ("walk", "train")]
        np.testing.assert_allclose(*(np.asarray(picture).astype(int) for picture in pictures), atol=2)
    assert "no/such.json" in refusal(capsys, "render", f"--workdir={trained}", "--path=no/such.json")
    assert "expected auto, orbit" in refusal(capsys, "render", f"--workdir={trained}", "--path=spin")
    animation = ["--animation=gif", "--fps=60"]
    assert "at most 50 frames" in refusal(capsys, "render", f"--workdir={trained}", *animation)


def test_render_follows_the_poses_of_a_split(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("render", f"--workdir={trained}", "--path=val", "--width=10", "--frames=2")
    assert image_size(trained / "renders" / "val" / "frame_0001.png") == (10, 10)
    assert "--frames = 9" in refusal(capsys, "render", f"--workdir={trained}", "--path=val", "--frames=9")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scene=lega"], "unknown scene 'lega': give one of bricks"),
        (["--scene=/no/such/place"], "/no/such/place"),
        (["--preset=large"], "preset"),
        (["--override=train.lr=1"], "no field 'lr'; its fields are"),
        (["--override=train.seed=x"], "expected int"),
        (["--override=field.encoding.table_size=1000"], "a power of two"),
        (["--max_steps=many"], "max_steps"),
        (["--max_seconds=inf"], "max_seconds = inf"),
        (["--sceen=lego"], "scene"),
        (["lego"], "expected only flags"),
        (["--scene=lego", "--image_size=100"], "--downscale"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert expected in refusal(capsys, "train", *arguments, f"--workdir={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_scene_with_a_truncated_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = write_scene(tmp_path / "scene")
    image = scene / "train" / "r_1.png"
    image.write_bytes(image.read_bytes()[:60])
    assert str(image) in refusal(capsys, "train", f"--scene={scene}", f"--workdir={tmp_path / 'run'}", *TINY)
    assert not (tmp_path / "run").exists()


def test_a_missing_split_is_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "val" in refusal(capsys, "evaluate", f"--workdir={trained}", "--eval_split=test")


@pytest.mark.parametrize("command", ["evaluate", "render"])
def test_a_workdir_without_a_run_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workdir" in refusal(capsys, command)
    assert "config.json" in refusal(capsys, command, f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text("{ not json")
    assert "config.json" in refusal(capsys, command, f"--workdir={tmp_path}")
    (tmp_path / "config.json").unlink()


def test_a_damaged_checkpoint_is_refused(
    scene: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "40" / "junk").write_text("x")
    error = refusal(capsys, "evaluate", f"--workdir={tmp_path}")
    assert str(tmp_path / "checkpoints") in error


def test_a_workdir_that_cannot_be_written_is_refused(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/dev/null" in refusal(capsys, "train", f"--scene={scene}", "--workdir=/dev/null/run", *TINY)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_names_every_flag_and_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, "--help")
    text = capsys.readouterr().out
    assert f"python -m jaxngp.{command}" in text
    assert ("--scene" if command == "inspect" else "--out" if command == "capture" else "--workdir") in text
    assert "(default: " in text


def test_precedence_is_preset_then_flag_then_override() -> None:
    values = flags.Flags()
    flags.define_train_flags(values)
    values(["x", "--preset=small", "--seed=3", "--max_steps=7", "--override=train.seed=5", "--downscale=2"])
    config = flags.train_config(values)
    assert config.field == PRESETS["small"].field
    assert (config.train.seed, config.train.max_steps, config.train.max_seconds) == (5, 7, 0.0)
    assert config.scene.downscale == 2


def test_a_full_disk_is_one_line_and_no_summary(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refusal(capsys, "train", f"--scene={scene}", f"--workdir={tmp_path}", *TINY)
    assert "could not write a checkpoint" in error
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    run("train", f"--scene={scene}", f"--workdir={tmp_path}", *TINY)
    assert (tmp_path / "summary.json").exists()


def test_an_interrupted_run_is_saved(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "metrics.jsonl"

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    arguments = [argument for argument in TINY if "max_steps" not in argument]
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as exit_info:
        run("train", f"--scene={scene}", f"--workdir={tmp_path}", *arguments, "--max_steps=1000000")
    thread.join()
    assert exit_info.value.code == 130
    assert "goes on from here" in capsys.readouterr().err
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]


def test_the_summary_keeps_the_device_that_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "environment", lambda: {"device": "another machine"})
    run("evaluate", f"--workdir={trained}", "--eval_views=1")
    written = json.loads((trained / "summary.json").read_text())
    assert written["device"].startswith("cpu")
    assert written["evaluated_on"] == {"device": "another machine"}


def test_an_interrupted_evaluation_replaces_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("evaluate", f"--workdir={trained}")
    before = {path.name: path.read_bytes() for path in (trained / "novel_views").iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "contact_sheet", stop)
    with pytest.raises(SystemExit) as exit_info:
        run("evaluate", f"--workdir={trained}", "--background=black")
    assert exit_info.value.code == 130
    assert {path.name: path.read_bytes() for path in (trained / "novel_views").iterdir()} == before
