"""Warnings about views that are valid and yet look wrong, and fingerprints by which changed views are noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scenes import BALL, poses_around

from jaxngp.cameras import Cameras, PosedImages, Rays, make_cameras, pose_images, view_rays
from jaxngp.data import RayTable, Split, changed, fingerprint
from jaxngp.data.checks import dataset_warnings

SIZE = 64


def split(images: PosedImages, name: str = "train", has_alpha: bool = True) -> Split:
    return Split(name, tuple(map(str, range(len(images.offset)))), images, has_alpha)


def moved(images: PosedImages, factor: float) -> PosedImages:
    """The cameras at `factor` times the distance from the middle of the box."""
    c2w = np.array(images.cameras.c2w)
    c2w[..., 3] = (c2w[..., 3] - 0.5) * factor + 0.5
    return images.replace(cameras=images.cameras.replace(c2w=c2w))


def posed_at(images: PosedImages, c2w: np.ndarray) -> PosedImages:
    return images.replace(cameras=images.cameras.replace(c2w=c2w))


@pytest.fixture(scope="module")
def views() -> PosedImages:
    """The ball from four sides, bright, with a soft edge of straight alpha; the last two pictures are smaller."""
    c2w = poses_around(4, 1.8)
    images = []
    for pose, size in zip(c2w, (SIZE, SIZE, SIZE // 2, SIZE // 2), strict=True):
        camera = make_cameras(pose, focal_xy=1.25 * size, centre_xy=size / 2, width=size, height=size)
        opacity = np.asarray(BALL.seen(*map(np.asarray, rays_of(camera)), background=0.0).opacity)
        alpha = np.round(255 * (np.roll(opacity, size // 16, axis=1) + opacity) / 2).astype(np.uint8)
        images.append(np.dstack([np.full((size, size, 3), (220, 180, 90), np.uint8), alpha]))
    sizes = np.array([SIZE, SIZE, SIZE // 2, SIZE // 2])
    focal, centre = 1.25 * sizes[:, None], sizes[:, None] / 2
    return pose_images(make_cameras(c2w, focal_xy=focal, centre_xy=centre, width=sizes, height=sizes), images)


def rays_of(camera: Cameras) -> tuple[np.ndarray, np.ndarray]:
    rays = view_rays(camera)
    return np.asarray(rays.origin), np.asarray(rays.direction)


def test_nothing_is_said_of_sound_views(views: PosedImages) -> None:
    assert dataset_warnings(split(views), None) == []
    assert dataset_warnings(split(views), split(posed_at(views, poses_around(4, 1.9)), "val")) == []


def test_notes_of_the_reader_are_among_the_warnings(views: PosedImages) -> None:
    training, evaluation = replace(split(views), notes=("a",)), replace(split(views, "train"), notes=("a", "b"))
    assert dataset_warnings(training, evaluation) == ["a", "b"]


def test_premultiplied_alpha_is_said_but_not_darkness(views: PosedImages) -> None:
    rgba = np.array(views.rgba)
    rgba[:, :3] = np.round(rgba[:, :3] * (rgba[:, 3:] / 255))
    (warning,) = dataset_warnings(split(views.replace(rgba=rgba)), None)
    assert "multiplied by alpha" in warning
    dark = np.array(views.rgba)
    dark[:, :3] = 5
    assert dataset_warnings(split(views.replace(rgba=dark)), None) == []


def test_pixels_outside_the_box_are_said(views: PosedImages) -> None:
    """As if the box were a fifth as large."""
    small = moved(views, 5).replace(rgba=np.full_like(views.rgba, 255))
    (warning,) = dataset_warnings(split(small), None)
    assert "of the pixels that are not transparent lie on rays that miss the scene's box" in warning
    (warning,) = dataset_warnings(split(small, has_alpha=False), None)
    assert "of the pixels lie on rays that miss" in warning


def test_the_share_of_pixels_outside_is_counted(views: PosedImages) -> None:
    """Of views of two sizes: the small ones show something in a corner alone, the large ones in the middle alone."""
    far, rgba = moved(views, 5), np.zeros_like(views.rgba)
    for view, part in enumerate((slice(28, 36), slice(28, 36), slice(8), slice(8))):
        start, side = int(views.offset[view]), (SIZE, SIZE, SIZE // 2, SIZE // 2)[view]
        rgba[start : start + side * side].reshape(side, side, 4)[part, part] = 255
    (warning,) = dataset_warnings(split(far.replace(rgba=rgba)), None)
    assert warning.startswith("50%")  # 128 pixels of 256


def test_cameras_very_far_away_are_said(views: PosedImages) -> None:
    far = moved(views, 30)
    cameras = far.cameras.replace(focal_xy=np.asarray(far.cameras.focal_xy) * 30)
    (warning,) = dataset_warnings(split(far.replace(cameras=cameras)), None)
    assert "54 sides of the scene's box away" in warning


def test_shared_training_and_evaluation_views_are_said(views: PosedImages) -> None:
    mixed = posed_at(views, np.concatenate([views.cameras.c2w[:1], poses_around(3, 1.9)]))
    (warning,) = dataset_warnings(split(views), split(mixed, "test"))
    assert warning.startswith("1 of the 4 test views have the pose of a training view")
    assert dataset_warnings(split(views), split(views, "train")) == []


# Fingerprints.


def test_an_unchanged_split_has_the_same_fingerprint(views: PosedImages) -> None:
    first = json.loads(json.dumps(fingerprint(views)))
    assert changed(first, fingerprint(split(views))) is None


def test_a_changed_split_is_told_by_its_fingerprint(views: PosedImages) -> None:
    first = fingerprint(views)
    rgba, c2w = np.array(views.rgba), np.array(views.cameras.c2w)
    rgba[[0, -1], 0] ^= 1
    c2w[1, 0, 3] += 1e-6
    focal = np.array(views.cameras.focal_xy)
    focal[:3] *= 1.01
    assert changed(first, fingerprint(views.replace(rgba=rgba))) == "2 of 4 views have other pixels"
    assert changed(first, fingerprint(posed_at(views, c2w))) == "1 of 4 views have other poses"
    cameras = views.cameras.replace(c2w=c2w, focal_xy=focal)
    both = changed(first, fingerprint(views.replace(cameras=cameras)))
    assert both == "1 of 4 views have other poses, 3 of 4 views have other intrinsics"
    fewer = pose_images(views.cameras[:2], [views.image(0), views.image(1)])
    assert changed(first, fingerprint(fewer)) == "there are 2 views where there were 4"


def test_a_ray_table_has_a_fingerprint_of_its_views() -> None:
    numbers = np.random.default_rng(0).uniform(size=(3, 24, 3)).astype(np.float32)
    table = RayTable(Rays(numbers[0], numbers[1]), numbers[2], width=4, height=2)
    other = table.replace(rgb=np.concatenate([numbers[2, :20], numbers[2, :4]]))
    assert changed(fingerprint(table), fingerprint(table)) is None
    assert changed(fingerprint(table), fingerprint(other)) == "1 of 3 views have other pixels"
    whole = [fingerprint(t.replace(width=0, height=0)) for t in (table, other)]
    assert changed(*whole) == "it has other pixels"
