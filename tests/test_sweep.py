"""Several scenes in one program: what each learns, what one that fails leaves alone, and what is left to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from entrypoints import Entrypoint, write_scene

from experiments import sweep
from jaxngp import runs
from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, NerfConfig, SceneConfig, apply_overrides
from jaxngp.data import load_training
from jaxngp.presets import PRESETS
from jaxngp.training.loop import train
from jaxngp.training.many import group_key, train_many

OVERRIDES = [
    "field.encoding.num_levels=1",
    "field.encoding.table_size=2**10",
    "field.encoding.max_resolution=16",
    "field.hidden_width=8",
    "field.colour_layers=0",
    "sampler.num_bins=8",
    "train.num_rays=64",
    "train.steps_per_dispatch=4",
]
CONFIG = apply_overrides(PRESETS["hundred_lines"], [*OVERRIDES, "train.max_steps=8"])
SWEEP = Entrypoint("experiments.sweep", sweep.define_flags, sweep.main)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scenes") / "square")


def images_of(path: Path) -> PosedImages:
    return load_training(SceneConfig(name=str(path), box_side=3.0)).images  # type: ignore[return-value]


@pytest.mark.slow
def test_each_scene_learns_what_it_learns_alone(square: Path) -> None:
    """With its own seed and learning rate, and darker images; to 1 % of the loss, where rounding leads to 1e-6."""
    first = images_of(square)
    second = first.replace(rgba=first.rgba // np.uint8(2))
    configs = [
        CONFIG,
        replace(CONFIG, train=replace(CONFIG.train, seed=7), optimizer=replace(CONFIG.optimizer, learning_rate=3e-3)),
    ]
    *_, many = train_many(configs, [first, second])
    assert many.finished
    assert not many.failed.any()
    for number, views in enumerate((first, second)):
        *_, alone = train(configs[number], views)
        assert alone.metrics is not None
        np.testing.assert_allclose(many.of(number).metrics.loss, alone.metrics.loss, rtol=1e-2)
    first_loss, second_loss = (float(many.of(number).metrics.loss) for number in range(2))
    assert abs(first_loss / second_loss - 1) > 0.05


@pytest.mark.slow
def test_a_scene_that_fails_leaves_the_others_alone(square: Path) -> None:
    views = images_of(square)
    broken = views.replace(cameras=views.cameras.replace(c2w=np.full_like(views.cameras.c2w, np.nan)))
    config = replace(CONFIG, train=replace(CONFIG.train, max_steps=16))
    *_, both = train_many([config, config], [views, broken])
    *_, alone = train_many([config, config], [views, views])
    assert both.failed.tolist() == [False, True]
    np.testing.assert_allclose(both.of(0).metrics.loss, alone.of(0).metrics.loss, rtol=1e-2)


def test_what_differs_in_shape_is_not_trained_together(square: Path) -> None:
    views = images_of(square)
    wider = apply_overrides(CONFIG, ["field.hidden_width=16"])
    other_rate = apply_overrides(CONFIG, ["optimizer.learning_rate=1e-3", "train.seed=3"])
    key = group_key(CONFIG, views)
    assert group_key(other_rate, views) == key
    assert group_key(wider, views) != key
    assert group_key(apply_overrides(CONFIG, ["train.max_seconds=5"]), views) is None
    with pytest.raises(InputError, match="cannot be trained together"):
        next(train_many([CONFIG, wider], [views, views]))


def test_names_of_combinations() -> None:
    named = sweep.combinations(["lego", "./a b"], ["optimizer.learning_rate=1,2", "train.seed=3"])
    assert [name for name, *_ in named] == [
        "lego_learning_rate_1_seed_3",
        "lego_learning_rate_2_seed_3",
        "a-b_learning_rate_1_seed_3",
        "a-b_learning_rate_2_seed_3",
    ]
    with pytest.raises(InputError, match=r"--vary=train\.seed"):
        next(sweep.combinations(["lego"], ["train.seed"]))


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(square: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs that are done are not trained again, a scene that is missing ends no other, and all open as one pytree."""
    common = ["--preset=hundred_lines", "--max_steps=8", "--eval_views=1", "--at_once=8"]
    common += [f"--workdir={tmp_path / 'sweep'}"]
    common += [f"--override={override}" for override in OVERRIDES]
    missing = tmp_path / "missing"
    said = SWEEP.refusal(capsys, *common, f"--scenes={square},{missing}", "--vary=train.seed=1,2")
    assert "2 of 4 runs failed" in said
    many = runs.load_many(tmp_path / "sweep")
    assert many.names == ("square_seed_1", "square_seed_2")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(many.field)} == {2}
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [bool(row["error"]) for row in rows if row["run"].startswith("square")] == [False, False]
    assert [row["together"] for row in rows if row["run"].startswith("square")] == [2, 2]
    before = (tmp_path / "sweep" / "square_seed_1" / "metrics.jsonl").stat().st_mtime_ns
    SWEEP(*common, f"--scenes={square}", "--vary=train.seed=1,2,3")
    assert (tmp_path / "sweep" / "square_seed_1" / "metrics.jsonl").stat().st_mtime_ns == before
    assert len(runs.load_many(tmp_path / "sweep").names) == 3
    assert isinstance(runs.load_many(tmp_path / "sweep").runs[0].config, NerfConfig)
