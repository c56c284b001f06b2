"""The laboratory's statistics against closed forms and simulations, and its order of trainings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dialects import scene_path, small_scene, write
from scipy import stats

from experiments import lab
from jaxngp import flags
from jaxngp.config import InputError, NerfConfig, from_json
from jaxngp.data import load_training
from jaxngp.presets import PRESETS


def outcome(variant: str, seed: int, psnr: float, scene: str = "s") -> lab.Outcome:
    return lab.Outcome(variant, scene, seed, f"{variant}{scene}{seed}", psnr, 100, 2.0, 10**9)


def test_pairs_are_judged_as_by_students_t() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    mean, low, high, p = lab.paired(a - b)
    found = stats.ttest_rel(a, b)
    interval = found.confidence_interval(0.95)
    assert (mean, p) == pytest.approx((np.mean(a - b), found.pvalue))
    assert (low, high) == pytest.approx((interval.low, interval.high))


def test_intervals_hold_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    inside = [low < 0.3 < high for _, low, high, _ in (lab.paired(rng.normal(0.3, 1.0, 5)) for _ in range(2000))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.025)  # five standard deviations


def test_what_pairs_share_cancels() -> None:
    """Scenes and seeds differ by decibels, the variants by 0.1 dB and little noise: it is seen."""
    rng = np.random.default_rng(2)
    level, noise = rng.normal(30, 3, 8), rng.normal(0, 0.03, (2, 8))
    outcomes = [outcome("base", seed, level[seed] + noise[0, seed]) for seed in range(8)]
    outcomes += [outcome("better", seed, level[seed] + 0.1 + noise[1, seed]) for seed in range(8)]
    base, better = lab.compare(outcomes)
    assert (base.variant, base.gain) == ("base", 0.0)
    assert better.p < 0.01
    assert better.low < 0.1 < better.high
    assert better.step_ms == pytest.approx(20.0)
    assert "+0." in better.row()


def test_only_pairs_that_both_have_are_compared() -> None:
    outcomes = [outcome("base", 0, 30.0), outcome("base", 1, 31.0), outcome("x", 1, 32.0), outcome("x", 2, 50.0)]
    _, x = lab.compare(outcomes)
    assert (x.pairs, x.gain) == (1, 1.0)
    assert np.isnan(x.p)


def test_variants_take_turns_in_being_first() -> None:
    variants = [lab.Variant("base"), lab.Variant("a", ("field.hidden_width=16",)), lab.Variant("b")]
    tasks = list(lab.plan(variants, [("s", PRESETS["small"]), ("t", PRESETS["small"])], 3, 5))
    assert Counter(task.variant for task in tasks[::3]) == {"base": 2, "a": 2, "b": 2}
    for task in tasks:
        config = from_json(task.config, NerfConfig)
        assert config.train.seed == task.seed
        assert config.field.hidden_width == (16 if task.variant == "a" else PRESETS["small"].field.hidden_width)
    assert len({(task.variant, task.scene, task.seed) for task in tasks}) == 18


@pytest.mark.parametrize("text", ["smooth", "smooth:", ":a=1", "base:train.seed=1"])
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected name:path=value"):
        lab.Variant.parse(text)


def test_base_suits_each_scene(tmp_path: Path) -> None:
    """Photographs around which the scene lies are trained on as `jaxngp.train` does."""
    values = flags.Flags()
    lab.define_flags(values)
    scenes = []
    for dialect in ("blender", "instant-ngp"):
        write(dialect, tmp_path / dialect, small_scene())
        scenes.append(str(scene_path(dialect, tmp_path / dialect)))
    values(["lab", f"--scenes={','.join(scenes)}", "--steps=7", "--override=train.num_rays=64"])
    bases = lab.base_configs(values)
    for (_, found), scene in zip(bases, scenes, strict=True):
        command = flags.Flags()
        flags.define_train_flags(command)
        command(["train", f"--scene={scene}", "--preset=small", "--max_steps=7", "--override=train.num_rays=64"])
        assert found == flags.train_config(command, load_training(found.scene))
    assert [config.sampler.growth > 0 for _, config in bases] == [False, True]  # type: ignore[union-attr]


@pytest.mark.slow
def test_an_interrupted_series_goes_on(tmp_path: Path) -> None:
    tiny = ["scene.image_size=16", "field.encoding.num_levels=2", "field.encoding.table_size=2**10"]
    tiny += ["sampler.num_steps=32", "sampler.num_samples=2**9", "sampler.occupancy.resolution=32", "train.num_rays=64"]
    tiny += ["train.max_steps=16", "train.max_seconds=0"]
    config = lab.apply_overrides(PRESETS["small"], tiny)
    variants = [lab.Variant("base"), lab.Variant("wide", ("field.hidden_width=48",))]
    tasks = list(lab.plan(variants, [("bricks", config)], 2, 2))
    first = lab.run_all(tasks[:2], tmp_path / "log.jsonl")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"variant": "ba')  # a crash
    every = lab.run_all(tasks, tmp_path / "log.jsonl")
    assert every[:2] == first
    assert len(lab.read_outcomes(tmp_path / "log.jsonl")) == 4
    assert all(outcome.steps == 16 and np.isfinite(outcome.psnr) for outcome in every)
