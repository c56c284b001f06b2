"""`jaxngp.train_image` as a user meets it: what it writes, how it goes on, what it measures, and how it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entrypoints import COMMANDS
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxngp import train_image
from jaxngp.config import HashGridConfig, ImageConfig, from_json
from jaxngp.data.atlas import builtin_image
from jaxngp.hashing import level_offsets
from jaxngp.runs import clear

TINY = [
    "--max_steps=60",
    "--override=field.encoding.num_levels=5",
    "--override=field.encoding.table_size=2**12",
    "--override=field.hidden_width=16",
    "--override=train.num_points=2**10",
]

run = COMMANDS["train_image"]


def summary(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the built-in image, wider than high, in tiles that do not divide it."""
    workdir = tmp_path_factory.mktemp("image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_image, "TILE", 32)
        train_image.predict_tile.clear_cache()
        run("--size=90x50", f"--workdir={workdir}", *TINY)
    train_image.predict_tile.clear_cache()
    return workdir


def test_a_run_leaves_what_one_needs(finished: Path) -> None:
    assert {p.name for p in finished.iterdir() if not p.name.startswith(".")} == {
        "checkpoints",
        "config.json",
        "curve.jsonl",
        "metrics.jsonl",
        "pictures",
        "scene.json",
        "summary.json",
    }
    config = from_json((finished / "config.json").read_text(encoding="utf-8"), ImageConfig)
    assert (config.image.width, config.image.height) == (90, 50)
    assert config.field.encoding.max_resolution == 45  # half the longer side
    found = summary(finished)
    rows = level_offsets(config.field.encoding)[-1]
    assert found["parameters"] == rows * 2 + 10 * 16 + 16 * 16 + 16 * 3
    assert found["bits_per_pixel"] == 32 * found["parameters"] / (90 * 50)
    assert found["bits_per_pixel_of_file"] == 24
    assert found["curve_pixels"] == 90 * 50


def test_the_psnr_is_that_of_the_reconstruction(finished: Path) -> None:
    """Up to the rounding to bytes of the PNG. Whoever mirrors one of them gets half of it."""
    with Image.open(finished / "pictures" / "reconstruction.png") as png:
        reconstruction = np.asarray(png) / 255
    truth = builtin_image(90, 50).pixels / 255
    assert reconstruction.shape == truth.shape
    measured = -10 * np.log10(np.mean((reconstruction - truth) ** 2))
    assert summary(finished)["psnr"] == pytest.approx(measured, abs=0.05)
    assert measured > 20
    assert -10 * np.log10(np.mean((reconstruction[::-1] - truth) ** 2)) < 16


def test_the_curve_ends_at_the_result(finished: Path) -> None:
    curve = summary(finished)["curve"]
    assert curve[-1]["step"] == 60
    assert curve[-1]["psnr"] == pytest.approx(summary(finished)["psnr"], abs=1e-3)


def test_a_finished_run_is_only_evaluated_again(finished: Path) -> None:
    before, log = summary(finished), (finished / "metrics.jsonl").read_bytes()
    curve = (finished / "curve.jsonl").read_bytes()
    run("--size=90x50", f"--workdir={finished}", *TINY)  # in one tile now
    assert summary(finished)["psnr"] == pytest.approx(before["psnr"], abs=1e-4)
    assert (finished / "metrics.jsonl").read_bytes() == log
    assert (finished / "curve.jsonl").read_bytes() == curve


def test_another_config_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds a run with another config" in run.refusal(capsys, "--size=64", f"--workdir={finished}", *TINY)


def test_an_image_on_the_host_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    run("--size=90x50", f"--workdir={tmp_path}", "--hold=host", *TINY)
    assert summary(tmp_path)["psnr"] == pytest.approx(summary(finished)["psnr"], abs=1e-4)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished, tmp_path)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_restart_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").touch()
    arguments = ["--size=20", "--override=image.width=40", f"--workdir={tmp_path}", "--restart", *TINY]
    run(*arguments)
    run(*arguments, "--seed=1")
    assert (summary(tmp_path)["width"], summary(tmp_path)["height"]) == (40, 20)  # an override precedes a flag
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"holiday.jpg", "comparison.png", "reconstruction.png"}
    clear(tmp_path)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["holiday.jpg"]


def test_a_photograph_is_learned_from_its_file(tmp_path: Path) -> None:
    """With alpha, over black: what is transparent is learned as black."""
    rgba = np.zeros((40, 24, 4), np.uint8)
    rgba[10:30, 6:18] = (250, 120, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "photo.png")
    run(f"--image={tmp_path / 'photo.png'}", "--background=black", f"--workdir={tmp_path / 'run'}", *TINY)
    with Image.open(tmp_path / "run" / "pictures" / "reconstruction.png") as png:
        found = np.asarray(png).astype(int)
    assert found.shape == (40, 24, 3)
    assert np.abs(found[20, 12] - (250, 120, 30)).max() < 40
    assert found[3, 3].max() < 40
    assert summary(tmp_path / "run")["bits_per_pixel_of_file"] == pytest.approx(
        8 * (tmp_path / "photo.png").stat().st_size / (40 * 24)
    )


@pytest.mark.slow
def test_a_photograph_may_move_and_is_not_mistaken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, workdir = tmp_path / "a.png", f"--workdir={tmp_path / 'run'}"
    Image.fromarray(np.full((24, 20, 3), 90, np.uint8)).save(photo)
    run(f"--image={photo}", workdir, *TINY)
    photo.rename(tmp_path / "b.png")
    run(f"--image={tmp_path / 'b.png'}", workdir, *TINY)  # the same pixels: the same run
    assert "other data" not in capsys.readouterr().err
    Image.fromarray(np.full((24, 20, 3), 91, np.uint8)).save(tmp_path / "b.png")
    run(f"--image={tmp_path / 'b.png'}", workdir, *TINY)
    assert "trained on other data: it has other pixels" in capsys.readouterr().err
    (tmp_path / "c").mkdir()
    Image.fromarray(np.full((24, 20, 3), 92, np.uint8)).save(tmp_path / "c" / "b.png")
    assert "other data of the same name" in run.refusal(capsys, f"--image={tmp_path / 'c' / 'b.png'}", workdir, *TINY)


def test_albert_in_a_few_steps(tmp_path: Path) -> None:
    path = Path(os.environ.get("JAXNGP_DATA", "nowhere")) / "image" / "albert.exr"
    if not path.exists():
        pytest.skip("JAXNGP_DATA does not hold image/albert.exr")
    pytest.importorskip("OpenEXR", reason="an EXR needs pip install .[image]")
    run(
        f"--image={path}",
        f"--workdir={tmp_path}",
        "--max_steps=150",
        "--log2_table_size=14",
        "--override=field.hidden_width=16",
        "--override=train.num_points=2**13",
    )
    assert summary(tmp_path)["psnr"] > 26  # 27.3 here
    assert summary(tmp_path)["parameters_per_number"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size=big"], "expected width x height in pixels"),
        (["--size=8"], "8x8"),
        (["--size=70000"], "<= 2**16"),
        (["--log2_table_size=13"], "expected 14 to 24, or 0"),
        (["--image=nothing.png"], "nothing.png"),
        (["--image=~nouser_of_this_name/a.png"], "~nouser_of_this_name/a.png"),
        (["--image=nothing.png", "--size=64"], "--size is that of the built-in image"),
        (["--size=64", "--override=field.num_outputs=4"], "field.num_outputs"),
        (["--size=64", "--override=train.num_points=2**24"], "train.steps_per_dispatch"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in run.refusal(capsys, *arguments, f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


# Parts.


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_block_means_are_means_also_at_the_edges(height: int, width: int, factor: int) -> None:
    pixels = np.random.default_rng(0).random((height, width, 3)).astype(np.float32)
    found = train_image.block_means(pixels, factor)
    assert found.shape == (-(-height // factor), -(-width // factor), 3)
    for y, x in ((0, 0), (found.shape[0] - 1, found.shape[1] - 1)):
        part = pixels[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        np.testing.assert_allclose(found[y, x], part.mean(axis=(0, 1)), rtol=1e-5)


@given(st.integers(0, 3 * 2**30))
def test_the_table_is_the_largest_that_fits(budget: int) -> None:
    grid = HashGridConfig(num_dims=2, max_resolution=2**14)

    def size(log2_table_size: int) -> int:
        return level_offsets(HashGridConfig(num_dims=2, max_resolution=2**14, table_size=2**log2_table_size))[-1] * 2

    chosen = train_image.fitting_grid(grid, budget, 24).table_size.bit_length() - 1
    assert 14 <= chosen <= 24
    assert size(chosen) <= budget or chosen == 14
    assert chosen == 24 or size(chosen + 1) > budget
    assert train_image.fitting_grid(grid, budget, 17).table_size <= 2**17
