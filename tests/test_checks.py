"""Warnings about views that are valid and yet look wrong, and about runs: said where they apply, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scenes import BALL, make_camera, photograph, poses_around
from strategies import TINY_MARCH

from jaxngp.cameras import PosedImages
from jaxngp.config import NerfConfig
from jaxngp.data import Split, load_evaluation, load_training
from jaxngp.data.checks import dataset_warnings
from jaxngp.training.loop import Progress
from jaxngp.training.progress import TrainingWarnings
from jaxngp.training.steps import Metrics

SIZE = 64


def split(images: PosedImages, name: str = "train", has_alpha: bool = True) -> Split:
    return Split(name, tuple(map(str, range(len(images.c2w)))), images, has_alpha)


@pytest.fixture(scope="module")
def views() -> PosedImages:
    """The ball from four sides, bright, with a soft edge of straight alpha."""
    images = photograph(BALL, make_camera(SIZE, SIZE, 80.0), poses_around(4, 1.8))
    rgba = np.array(images.rgba)
    rgba[..., :3] = (220, 180, 90)
    soft = np.roll(rgba[..., 3], 4, axis=2).astype(np.int64) + rgba[..., 3]
    rgba[..., 3] = np.minimum(soft // 2, 255)
    assert ((rgba[..., 3] > 0) & (rgba[..., 3] < 255)).sum() > 200
    return images.replace(rgba=rgba, c2w=np.asarray(images.c2w))


def test_nothing_is_suspected_of_sound_views(views: PosedImages) -> None:
    assert dataset_warnings(split(views), None) == []
    other = views.replace(c2w=np.asarray(poses_around(4, 1.9)))
    assert dataset_warnings(split(views), split(other, "val")) == []


def test_colour_multiplied_by_alpha_is_suspected_but_not_darkness(views: PosedImages) -> None:
    rgba = np.array(views.rgba)
    rgba[..., :3] = np.round(rgba[..., :3] * (rgba[..., 3:] / 255))
    (warning,) = dataset_warnings(split(views.replace(rgba=rgba)), None)
    assert "multiplied by alpha" in warning
    dark = np.array(views.rgba)
    dark[..., :3] = 5
    assert dataset_warnings(split(views.replace(rgba=dark)), None) == []


def test_what_lies_outside_the_box_is_suspected(views: PosedImages) -> None:
    """As if the box were a fifth as large, or beside the scene."""
    c2w = np.array(views.c2w)
    c2w[..., 3] = (c2w[..., 3] - 0.5) * 5 + 0.5
    small = views.replace(c2w=c2w, rgba=np.full_like(views.rgba, 255))
    (warning,) = dataset_warnings(split(small), None)
    assert "of the pixels that are not transparent lie on rays that miss the scene's box" in warning
    (warning,) = dataset_warnings(split(small, has_alpha=False), None)
    assert "of the pixels lie on rays that miss" in warning


def test_cameras_very_far_away_are_suspected(views: PosedImages) -> None:
    c2w = np.array(views.c2w)
    c2w[..., 3] = (c2w[..., 3] - 0.5) * 30 + 0.5
    camera = replace(views.camera, focal_xy=np.asarray(views.camera.focal_xy) * 30)
    (warning,) = dataset_warnings(split(views.replace(c2w=c2w, camera=camera)), None)
    assert "54 sides of the scene's box away" in warning


def test_training_views_among_those_to_evaluate_on_are_suspected_unless_it_is_said(views: PosedImages) -> None:
    mixed = views.replace(c2w=np.concatenate([views.c2w[:1], poses_around(3, 1.9)]))
    (warning,) = dataset_warnings(split(views), split(mixed, "test"))
    assert warning.startswith("1 of the 4 test views have the pose of a training view")
    assert dataset_warnings(split(views), split(views, "train")) == []


def test_the_built_in_scene_is_not_suspected() -> None:
    scene = replace(NerfConfig().scene, image_size=32)
    assert dataset_warnings(load_training(scene), load_evaluation(scene)) == []


# Of a run.


def progress(step: int = 16, finished: bool = False, **values: float) -> Progress:
    sound = {"loss": 0.1, "psnr": 20.0, "rays": 60.0, "samples": 500.0, "dropped_samples": 0.0, "skipped": 0.0}
    metrics = Metrics(**{**sound, "occupied_fraction": 0.1, **values})
    return Progress(None, metrics, step, 1.0, 1.0, 1.0, 1.0 if finished else 0.5)  # type: ignore[arg-type]


CONFIG = NerfConfig(sampler=TINY_MARCH)
CONFIG = replace(CONFIG, train=replace(CONFIG.train, num_rays=100))


def test_a_sound_run_raises_no_doubts() -> None:
    assert TrainingWarnings(CONFIG).about(progress()) == TrainingWarnings(CONFIG).about(progress(finished=True)) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"occupied_fraction": 0.0}, "the occupancy grid is empty"),
        ({"skipped": 0.25}, "4 updates were left out"),
        ({"rays": 10.0, "finished": True}, "only 10% of the rays that were drawn fitted"),
    ],
)
def test_a_doubt_is_said_once(values: dict, said: str) -> None:
    doubts = TrainingWarnings(CONFIG)
    (warning,) = doubts.about(progress(**values))
    assert said in warning
    assert doubts.about(progress(step=32, **values)) == []
