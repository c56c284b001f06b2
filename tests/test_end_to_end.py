"""The built-in scene, learned for a few seconds: the pictures are right, and so is the geometry behind them."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxngp import device
from jaxngp.cameras import PosedImages, Rays, view_rays
from jaxngp.config import apply_overrides
from jaxngp.data import Split, bricks, load_evaluation, load_training
from jaxngp.evaluation import EvalBackground, ViewPicture, ViewScore, evaluate_views, summarise
from jaxngp.presets import PRESETS
from jaxngp.training.loop import Progress, train

pytestmark = pytest.mark.slow

SIZE = 64
CONFIG = apply_overrides(
    PRESETS["small"],
    [
        f"scene.image_size={SIZE}",
        "field.encoding.num_levels=6",
        "field.encoding.table_size=2**14",
        "field.encoding.max_resolution=192",
        "sampler.num_steps=160",
        "sampler.num_samples=2**13",
        "sampler.occupancy.resolution=64",
        "train.num_rays=2**11",
        "train.max_steps=400",
        "train.max_seconds=0.0",
    ],
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Progress, Split]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXNGP_CACHE", str(tmp_path_factory.mktemp("cache")))
        training, held_out = load_training(CONFIG.scene), load_evaluation(CONFIG.scene, "val", 4)
    *_, progress = train(CONFIG, training.images)
    return progress, held_out


def exact_depth(split: Split, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth in scene units, and alpha, of a view's pixel centres, by the scene's own ray caster."""
    assert isinstance(split.images, PosedImages)
    rays = view_rays(split.images.cameras[view])
    origin = jnp.asarray(split.transform.to_world(rays.origin), jnp.float32)
    surface = bricks.cast_rays(Rays(origin, rays.direction))
    return np.asarray(surface.depth) / split.transform.side, np.asarray(surface.alpha)


def views(
    progress: Progress, split: Split, background: EvalBackground = "white"
) -> list[tuple[ViewScore, ViewPicture]]:
    grid = progress.state.occupancy
    return list(evaluate_views(progress.field, grid, split, sampler=CONFIG.sampler, background=background))


def test_four_hundred_steps_learn_the_built_in_scene(learned: tuple[Progress, Split]) -> None:
    progress, split = learned
    result = summarise([score for score, _ in views(progress, split)], split, "white")
    assert result.psnr > 23.0, result
    assert result.ssim > 0.80, result


def test_the_learned_depth_is_that_of_the_scene(learned: tuple[Progress, Split]) -> None:
    errors = []
    for view, (_, picture) in enumerate(views(*learned)):
        depth, alpha = exact_depth(learned[1], view)
        solid = (alpha == 1) & (picture.opacity > 0.95)
        assert solid.mean() > 0.1
        errors.append(np.abs(picture.depth - depth)[solid])
    # One march step is 0.011 scene units: half of all pixels are right to that, and nine in ten to a few of them.
    assert np.median(np.concatenate(errors)) < 0.011
    assert np.percentile(np.concatenate(errors), 90) < 0.05


def test_what_is_seen_through_is_the_background(learned: tuple[Progress, Split]) -> None:
    progress, split = learned
    assert isinstance(split.images, PosedImages)
    for view, (_, picture) in enumerate(views(progress, split, "black")):
        alpha = split.images.image(view)[..., 3]
        outside = alpha == 0
        assert np.mean(picture.prediction[outside]) < 0.02
        assert np.mean(picture.opacity[alpha == 255]) > 0.95


@pytest.mark.parametrize("rays_together", [SIZE**2, 2 * SIZE**2])
def test_views_are_the_same_however_many_at_once(
    rays_together: int, learned: tuple[Progress, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time; two, of which the last batch has but one; and all three, which is what fits by default."""
    progress, split = learned
    split = replace(split, views=split.views[:3])
    expected = views(progress, split)
    monkeypatch.setattr(device, "CPU_BATCHING", replace(device.CPU_BATCHING, rays=rays_together))
    monkeypatch.setattr(device, "GPU_BATCHING", device.CPU_BATCHING)
    found = views(progress, split)
    assert [score.name for score, _ in found] == [score.name for score, _ in expected] == list(split.views)
    for (score, picture), (expected_score, expected_picture) in zip(found, expected, strict=True):
        np.testing.assert_allclose(picture.prediction, expected_picture.prediction, atol=1e-5)
        np.testing.assert_allclose(score.psnr, expected_score.psnr, atol=1e-3)


def test_most_of_the_box_is_empty_in_the_end(learned: tuple[Progress, Split]) -> None:
    """And a fifth of the rays fit."""
    metrics = learned[0].metrics
    assert metrics is not None
    assert float(metrics.rays) > 0.2 * CONFIG.train.num_rays
    assert float(metrics.occupied_fraction) < 0.2
