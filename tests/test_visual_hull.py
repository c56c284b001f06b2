"""The visual hull: a cell stays empty only if a silhouette says so; a pixel is left out only if it shows no cell."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scenes import BALL, Ball, look_at, make_camera, photograph, pixel_rays, poses_around, slab_interval
from strategies import arrays32, floats32, jit_to_numpy, rotations

from jaxngp import marching, occupancy, visual_hull
from jaxngp.cameras import Cameras, PosedImages, Rays, make_cameras, pose_images
from jaxngp.config import MarchConfig, OccupancyConfig
from jaxngp.occupancy import Cells

G = 32
CONFIG = OccupancyConfig(resolution=G)


def cell_coordinates() -> np.ndarray:
    """(G^3, 3): the x, y, z of each cell number, x fastest."""
    return np.indices((G,) * 3).reshape(3, -1)[::-1].T


# Candidates.

WIDTH, HEIGHT = 48, 40
hull = jit_to_numpy(visual_hull.visual_hull, static_argnames="config")
pixel_set, nth = jit_to_numpy(visual_hull.pixel_set), jit_to_numpy(visual_hull.PixelSet.nth)
init_occupancy = jit_to_numpy(occupancy.init_occupancy)


@functools.partial(jit_to_numpy, static_argnames="config")
def candidates(images: PosedImages, *, config: OccupancyConfig) -> jax.Array:
    """(K G^3,)"""
    return visual_hull.candidate_cells(images, config=config).reshape(-1)


def with_alpha(images: PosedImages, alpha: np.ndarray) -> PosedImages:
    """The images with another alpha, of as many numbers as there are pixels."""
    colour = np.asarray(images.rgba)[:, :3]
    return replace(images, rgba=np.concatenate([colour, np.reshape(alpha, (-1, 1)).astype(np.uint8)], axis=1))


def blank_views(cameras: Cameras, value: int = 0) -> PosedImages:
    """All numbers of all pixels are `value`."""
    width, height = np.asarray(cameras.size)[0]
    return pose_images(cameras, np.full((len(cameras), height, width, 4), value, np.uint8))


def some_views(images: PosedImages, views: np.ndarray | list[int]) -> PosedImages:
    """Some of the views; the pixels of all stay where they are."""
    return replace(images, cameras=images.cameras[views], offset=images.offset[views])


def project(camera_focal: float, c2w: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel (N, 2) and depth (N,) in float64."""
    local = (position - c2w[:, 3].astype(np.float64)) @ c2w[:, :3].astype(np.float64)
    pixel = camera_focal * local[:, :2] * [1, -1] / -local[:, 2:] + np.array([WIDTH, HEIGHT]) / 2
    return pixel, -local[:, 2]


@st.composite
def balls(draw: st.DrawFn) -> Ball:
    radius = draw(floats32(0.1, 0.3))
    centre = draw(arrays32(3, 0.35, 0.65)).tolist()
    return Ball(centre=tuple(centre), radius=radius, density=1e6, inner=(1, 0, 0), outer=(0, 1, 0))


def cells_touched_by(ball: Ball) -> np.ndarray:
    """(G^3,): the cells that contain part of the ball, by the distance from its centre to the cell's box."""
    low = cell_coordinates() / G
    nearest = np.clip(ball.centre, low, low + 1 / G)
    return np.linalg.norm(nearest - ball.centre, axis=1) < ball.radius


def seen_by_any(focal: float, c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether a cell's centre is in any image, and whether float32 can tell."""
    seen, certain = np.zeros(G**3, bool), np.ones(G**3, bool)
    for pose in c2w:
        pixel, depth = project(focal, pose, (cell_coordinates() + 0.5) / G)
        inside = np.min(np.minimum(pixel, np.array([WIDTH, HEIGHT]) - pixel), axis=1)
        seen |= (inside >= 0) & (depth > 0)
        certain &= np.abs(inside) > 1e-2
    return seen, certain


@pytest.mark.parametrize(("focal", "distance"), [(60.0, 1.5), (30.0, 1.0), (300.0, 4.0)])
@settings(max_examples=10)
@given(balls(), st.integers(2, 4))
def test_no_silhouette_excludes_part_of_a_ball(focal: float, distance: float, ball: Ball, num_views: int) -> None:
    c2w = np.resize(poses_around(num_views, distance), (4, 3, 4))
    images = photograph(ball, make_camera(WIDTH, HEIGHT, focal, c2w))
    seen, certain = seen_by_any(focal, c2w)
    found = candidates(images, config=CONFIG)
    must = cells_touched_by(ball) & seen & certain
    assert must.sum() > 20
    assert found[must].all()


@pytest.mark.parametrize("size", [4, 64])
def test_no_silhouette_excludes_what_a_wide_view_shows(size: int) -> None:
    """Large images of a large ball at the side: there a cell looks larger than focal length over depth says."""
    focal, width, height = 4.0 * size, 16 * size, 8 * size
    ball = Ball(centre=(0.5, 0.3, 0.5), radius=0.2, density=1e6, inner=(1, 0, 0), outer=(0, 1, 0))
    c2w = np.stack([look_at((1.4, y, 0.5), (0, y, 0.5)) for y in (0.9, 1.2, 1.5, 1.8)])
    images = photograph(ball, make_camera(width, height, focal, c2w))
    seen = candidates(images, config=replace(CONFIG, carve=False))
    found = candidates(images, config=CONFIG)
    must = cells_touched_by(ball) & seen
    assert must.sum() > 1000
    assert found[must].all()


@settings(max_examples=10)
@given(balls())
def test_cells_clearly_outside_a_view_are_excluded(ball: Ball) -> None:
    focal = 60.0
    images = photograph(ball, make_camera(WIDTH, HEIGHT, focal, poses_around(4, 1.5)))
    found = candidates(images, config=CONFIG)
    clear = np.zeros(G**3, bool)
    centre = (cell_coordinates() + 0.5) / G
    for pose in images.cameras.c2w:
        pixel, depth = project(focal, pose, centre)
        margin = 0.5 * 3**0.5 / G * focal / depth + 2.5  # the cell's own half side in pixels, and rounding outward
        inside = np.all((pixel > margin[:, None]) & (pixel < np.array([WIDTH, HEIGHT]) - margin[:, None]), axis=1)
        offset, axis = centre - pose[:, 3], ball.centre - pose[:, 3]
        cosine = offset @ axis / np.linalg.norm(offset, axis=1) / np.linalg.norm(axis)
        angle = np.arccos(cosine) - np.arcsin(ball.radius / np.linalg.norm(axis))
        clear |= inside & (angle > 2**0.5 * margin / focal)
    assert clear.sum() > 1000
    assert not found[clear].any()


@settings(max_examples=10)
@given(balls(), hnp.arrays(np.uint8, (4, HEIGHT, WIDTH), elements=st.integers(1, 255)))
def test_how_faint_a_pixel_is_makes_no_difference(ball: Ball, alpha: np.ndarray) -> None:
    """Light met something wherever alpha is above 0, be it by 1/255."""
    images = photograph(ball, make_camera(WIDTH, HEIGHT, 60.0, poses_around(4, 1.5)))
    shown = images.rgba[:, 3] > 0
    expected = candidates(with_alpha(images, 255 * shown), config=CONFIG)
    np.testing.assert_array_equal(candidates(with_alpha(images, alpha.ravel() * shown), config=CONFIG), expected)


def test_opaque_images_exclude_only_unseen_cells() -> None:
    c2w = np.resize([look_at((0.9, 0.2, 0.3), (0.5, 0.5, 0.5)), look_at((2, 0.5, 0.6))], (4, 3, 4))
    images = blank_views(make_camera(WIDTH, HEIGHT, 80.0, c2w), 255)
    seen, certain = seen_by_any(80.0, c2w)
    assert 0.1 < seen.mean() < 0.9
    for carve in (True, False):
        found = candidates(images, config=replace(CONFIG, carve=carve))
        np.testing.assert_array_equal(found[certain], seen[certain])


def test_without_carve_silhouettes_exclude_nothing() -> None:
    c2w = poses_around(4, 1.5)
    images = blank_views(make_camera(WIDTH, HEIGHT, 60.0, c2w))
    seen, certain = seen_by_any(60.0, c2w)
    found = candidates(images, config=replace(CONFIG, carve=False))
    np.testing.assert_array_equal(found[certain], seen[certain])
    assert candidates(images, config=CONFIG).sum() < 0.2 * seen.sum()


def test_a_cell_at_the_edge_of_a_view_is_not_excluded() -> None:
    """Part of its footprint is unknown, even if all of the image is clear."""
    focal = 60.0
    c2w = poses_around(1, 1.5)
    images = blank_views(make_camera(WIDTH, HEIGHT, focal, c2w))
    pixel, depth = project(focal, c2w[0], (cell_coordinates() + 0.5) / G)
    inside = np.min(np.minimum(pixel, np.array([WIDTH, HEIGHT]) - pixel), axis=1)
    edge = (inside > 0.01) & (inside < 0.5 * 3**0.5 / G * focal / depth)
    assert edge.sum() > 100
    assert candidates(images, config=CONFIG)[edge].all()


# Many views.


def some_silhouettes(num_views: int, seed: int = 0) -> PosedImages:
    """Views from near and far, of which each shows the ball's silhouette with some more holes in it and around it.

    They contradict each other, and some see little of the cube: which cells are left depends on every one of them.
    """
    rng = np.random.default_rng(seed)
    origin = poses_around(num_views, 1.6)[:, :, 3]
    c2w = np.stack(
        [look_at(o, target) for o, target in zip(origin, rng.uniform(0.1, 0.9, (num_views, 3)), strict=True)]
    )
    images = photograph(BALL, make_camera(WIDTH, HEIGHT, 90.0, c2w))
    flipped = np.repeat(np.repeat(rng.uniform(size=(num_views, 5, 6)) < 0.1, 8, axis=1), 8, axis=2).ravel()
    alpha = images.rgba[:, 3]
    return with_alpha(images, np.where(flipped, 255 - alpha, alpha))


def view_by_view(images: PosedImages) -> tuple[np.ndarray, np.ndarray]:
    """(V, G^3): what each view alone sees, and what it excludes of that."""
    alone = [pose_images(images.cameras[[view]], [images.image(view)]) for view in range(len(images.cameras))]
    seen = np.array([candidates(view, config=replace(CONFIG, carve=False)) for view in alone])
    return seen, seen & ~np.array([candidates(view, config=CONFIG) for view in alone])


@pytest.mark.parametrize("num_views", [1, 8, 9, 24])
def test_each_view_lets_cells_in_and_keeps_others_out(num_views: int) -> None:
    """However many views look at all cells, and how many only at those that are left."""
    images = some_silhouettes(num_views)
    seen, excluded = view_by_view(images)
    expected = seen.any(axis=0) & ~excluded.any(axis=0)
    np.testing.assert_array_equal(candidates(images, config=replace(CONFIG, carve=False)), seen.any(axis=0))
    np.testing.assert_array_equal(candidates(images, config=CONFIG), expected)
    if num_views > 8:  # every part of the definition has its share
        assert 0.01 < expected.mean() < 0.5
        for one in range(num_views):
            others = np.delete(np.arange(num_views), one)
            assert (seen.any(axis=0) & ~excluded[others].any(axis=0) & ~expected).any()


@pytest.mark.parametrize("carve", [True, False])
def test_the_order_of_the_views_does_not_matter(carve: bool) -> None:
    images, order = some_silhouettes(9), np.random.default_rng(0).permutation(9)
    config = replace(CONFIG, carve=carve)
    other = candidates(some_views(images, order), config=config)
    np.testing.assert_array_equal(candidates(images, config=config), other)


def test_nothing_is_left_where_first_views_leave_none() -> None:
    """Nor where no view sees anything: the list of cells for the other views is then empty, or holds all."""
    images = some_silhouettes(9)
    clear = blank_views(make_camera(WIDTH, HEIGHT, 90.0, poses_around(9, 4.0)))
    assert not candidates(clear, config=CONFIG).any()
    backward = np.stack([look_at(o, 2 * o - 0.5) for o in poses_around(9, 4.0)[:, :, 3]])
    away = replace(images, cameras=make_camera(WIDTH, HEIGHT, 90.0, backward))
    for carve in (True, False):
        assert not candidates(away, config=replace(CONFIG, carve=carve)).any()


def test_the_size_of_a_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last of the chunks is not full, and pushed back over the one before it."""
    images = some_silhouettes(9)
    expected_cells, expected_pixels = hull(images, config=CONFIG)
    monkeypatch.setattr(visual_hull, "_CHUNK", 5000)
    cells, pixels = jit_to_numpy(functools.partial(visual_hull.visual_hull, config=CONFIG))(images)
    np.testing.assert_array_equal(cells, expected_cells)
    np.testing.assert_array_equal(pixels.words, expected_pixels.words)


# Views of different sizes.


@pytest.mark.slow
def test_views_of_different_sizes_count_as_each_alone() -> None:
    """What a view sees, excludes and draws is the same beside larger views and by itself."""
    cameras = views_of_sizes([48, 20, 33, 24], [40, 36, 12, 40])
    images = photograph(BALL, cameras)
    assert len(images.rgba) == 48 * 40 + 20 * 36 + 33 * 12 + 24 * 40
    assert images.max_size == (48, 40)
    alone = [pose_images(cameras[[view]], [images.image(view)]) for view in range(4)]
    seen = np.array([candidates(view, config=replace(CONFIG, carve=False)) for view in alone])
    left = np.array([candidates(view, config=CONFIG) for view in alone])
    cells, pixels = hull(images, config=CONFIG)
    np.testing.assert_array_equal(cells[0], seen.any(axis=0) & ~(seen & ~left).any(axis=0))
    assert 0 < np.mean(cells) < 0.25  # so that pixels are left out
    facing = [facing_pixels(cells, view) for view in alone]
    np.testing.assert_array_equal(members(pixels, images), np.concatenate(facing))
    assert 0.05 < pixels.size / len(images.rgba) < 0.95


def views_of_sizes(widths: list[int], heights: list[int]) -> Cameras:
    size = np.stack([widths, heights], axis=1)
    c2w = poses_around(len(size), 1.6)
    return make_cameras(c2w, focal_xy=1.1 * size, centre_xy=0.5 * size, width=widths, height=heights)


# Cascades.


def test_cascades_are_grids_of_a_scene_that_is_larger() -> None:
    """Cascade k holds what a single grid holds when all is scaled by 2^(K - 1 - k) about the cube's middle."""
    images = photograph(BALL, make_camera(WIDTH, HEIGHT, 60.0, poses_around(4, 1.6)))
    readable = np.asarray(jax.jit(Cells(G, 3).readable)())
    for carve in (True, False):
        config = replace(CONFIG, carve=carve)
        found = candidates(images, config=replace(config, num_cascades=3)).reshape(3, -1)
        for cascade in range(3):
            c2w = np.array(images.cameras.c2w)
            c2w[:, :, 3] = (c2w[:, :, 3] - 0.5) * 2 ** (2 - cascade) + 0.5
            scaled = replace(images, cameras=images.cameras.replace(c2w=c2w))
            expected = candidates(scaled, config=config) & readable[cascade]
            assert np.mean(found[cascade] != expected) < 1e-3  # where rounding decides
            assert expected.any()


# Sets of pixels.


@pytest.mark.parametrize("num_pixels", [1, 31, 32, 64, 77])
@settings(max_examples=15)
@given(data=st.data())
def test_a_set_lists_its_pixels_in_order(num_pixels: int, data: st.DataObject) -> None:
    flags = data.draw(hnp.arrays(bool, num_pixels) | st.just(np.ones(num_pixels, bool)))
    pixels = pixel_set(flags)
    expected = np.flatnonzero(flags)
    assert pixels.size == len(expected)
    found = nth(pixels, np.arange(num_pixels))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found[: len(expected)], expected)


@pytest.mark.parametrize("num_pixels", [32, 77])
def test_an_empty_set_has_no_pixel(num_pixels: int) -> None:
    assert pixel_set(np.zeros(num_pixels, bool)).size == 0


def test_ranks_may_have_any_shape_and_order() -> None:
    flags = np.random.default_rng(0).uniform(size=5000) < 0.2
    rank = np.random.default_rng(1).integers(0, flags.sum(), (4, 3, 50))
    np.testing.assert_array_equal(nth(pixel_set(flags), rank), np.flatnonzero(flags)[rank])


def members(pixels: visual_hull.PixelSet, images: PosedImages) -> np.ndarray:
    """(P,) bool, by the numbers that the set lists."""
    flags = np.zeros(len(images.rgba), bool)
    # The ranks of all pixels, of whatever set, so that one program does.
    flags[nth(pixels, np.arange(len(flags)))[: int(pixels.size)]] = True
    assert flags.sum() == pixels.size
    return flags


# Pixels that face a candidate.


def cells_on_rays(origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ray, cell) of every cell through whose inside a ray (N, 3) passes, in float64.

    Between two neighbouring crossings of the planes between cells a ray is in one cell: that of the middle.
    """
    origin, direction = origin.reshape(-1, 3), direction.reshape(-1, 3)
    t0, t1 = slab_interval(origin, direction, np.zeros(3), np.ones(3))
    planes = np.arange(1, G) / G
    moving = np.abs(direction) > 1e-12
    crossings = (planes[:, None, None] - origin) / np.where(moving, direction, 1)
    crossings = np.where(moving, crossings, 0).transpose(1, 0, 2).reshape(len(origin), -1)
    t = np.sort(np.concatenate([crossings.clip(t0[:, None], t1[:, None]), t0[:, None], t1[:, None]], axis=1), axis=1)
    ray, piece = np.nonzero(np.diff(t, axis=1) > 1e-9)
    middle = origin[ray] + (t[ray, piece] + t[ray, piece + 1])[:, None] / 2 * direction[ray]
    cell = np.clip(np.floor(middle * G), 0, G - 1).astype(int)
    return ray, cell @ [1, G, G**2]


def must_be_drawn(flags: np.ndarray, images: PosedImages) -> np.ndarray:
    """(P,): the pixels whose centre's ray passes through the inside of a cell of flags (G^3,)."""
    facing = np.zeros(len(images.rgba), bool)
    for view in range(len(images.cameras)):
        ray, cell = cells_on_rays(*pixel_rays(images.cameras[view]))
        facing[images.offset[view] + ray[flags[cell]]] = True
    return facing


VIEW_WIDTH, VIEW_HEIGHT = 24, 18
facing_pixels = jit_to_numpy(functools.partial(visual_hull._facing_pixels, cells=Cells(G)))


@st.composite
def any_cameras(draw: st.DrawFn, c2w: np.ndarray) -> Cameras:
    """From wide ones, of 140 degrees, to long ones; their principal points may lie outside the image."""
    shape = (len(c2w), 2)
    focal = draw(arrays32(shape, 4, 10) | arrays32(shape, 10, 100))
    centre = draw(st.just(np.float32([12, 9])) | arrays32(shape, 0, 18) | arrays32(shape, -10, 30))
    return make_cameras(c2w, focal_xy=focal, centre_xy=centre, width=VIEW_WIDTH, height=VIEW_HEIGHT)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[PosedImages, np.ndarray]:
    """Two views from inside the cube, from its faces or from outside; and cells (G^3,) that they look at, or past, or
    that are around the camera: a few or blocks of them."""
    origin = [draw(arrays32(3, -1.5, 2.5) | arrays32(3, 0, 1) | st.just(np.float32([0.5, 0.5, 1]))) for _ in range(2)]
    centre = draw(arrays32((3, 3), 0.02, 0.98))
    if draw(st.integers(0, 3)) == 0:
        centre = origin[0] + draw(arrays32((3, 3), -0.08, 0.08))
    c2w = []
    for start in origin:
        turned = np.linalg.norm(centre[0] - start) < 1e-2 or draw(st.integers(0, 3)) == 0
        rotation = draw(rotations()) if turned else look_at(start, centre[0])[:, :3]
        c2w.append(np.concatenate([rotation, start[:, None]], axis=1))
    size = draw(st.sampled_from([1, 1, 6]))
    low = np.clip(np.floor(centre[: draw(st.integers(1, 3))].astype(np.float64) * G), 0, G - 1)
    cells = cell_coordinates()[:, None]
    flags = np.any(np.all((cells >= low) & (cells < low + size), axis=2), axis=1)
    return blank_views(draw(any_cameras(np.stack(c2w)))), flags


@pytest.mark.slow
@settings(max_examples=300)
@given(scenes())
def test_every_pixel_that_meets_a_candidate_is_drawn(scene: tuple[PosedImages, np.ndarray]) -> None:
    """For cameras of any kind, outside the cube and inside, and cells anywhere about them."""
    images, flags = scene
    found = facing_pixels(flags, images)
    assert found[must_be_drawn(flags, images)].all()


def test_no_cell_is_larger_than_its_square_of_pixels() -> None:
    """One cell at a time, of several pixels, up to 50 degrees off the axis: no larger one makes up for an error."""
    cameras = make_cameras(
        poses_around(8, 0.9), focal_xy=(60, 45), centre_xy=(-40, 5), width=VIEW_WIDTH, height=VIEW_HEIGHT
    )
    images = blank_views(cameras)
    pairs = [cells_on_rays(*pixel_rays(cameras[view])) for view in range(8)]
    met = np.unique(np.concatenate([cell for _, cell in pairs]))
    for one in np.random.default_rng(0).choice(met, 60, replace=False):
        found = facing_pixels(np.arange(G**3) == one, images).reshape(8, -1)
        for view, (ray, cell) in enumerate(pairs):
            assert found[view, ray[cell == one]].all()


def test_no_pixels_far_from_all_candidates_are_drawn() -> None:
    """Far: farther than the largest footprint of a candidate in that view, and 2 px for its rounding."""
    images = ball_views()
    cells, pixels = hull(images, config=CONFIG)
    found = members(pixels, images)
    assert found[must_be_drawn(np.ravel(cells), images)].all()
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    for view in (0, 4, 8):
        c2w = np.asarray(images.cameras.c2w[view])
        pixel, depth = project(60.0, c2w, (cell_coordinates()[np.ravel(cells)] + 0.5) / G)
        assert depth.min() > 0.5
        largest = 3**0.5 / G * 60.0 / depth.min()
        offset = np.abs(np.stack([x.reshape(-1), y.reshape(-1)], axis=1)[:, None] - pixel).max(axis=2).min(axis=1)
        far = (offset > largest + 2).reshape(HEIGHT, WIDTH)
        assert far.mean() > 0.2
        assert not found.reshape(9, HEIGHT, WIDTH)[view][far].any()


@pytest.mark.parametrize("num_cascades", [1, 2])
def test_pixels_left_out_have_no_step_in_a_candidate(num_cascades: int) -> None:
    """Which is why they may be left out: no sample, whatever the jitter and the field."""
    images = ball_views()
    config = replace(CONFIG, num_cascades=num_cascades)
    cells, pixels = hull(images, config=config)
    left_out = ~members(pixels, images)
    assert 0.1 < left_out.mean() < 0.9
    rays = [np.concatenate(a)[left_out] for a in zip(*all_rays(images), strict=True)]
    origin, direction = (a.astype(np.float32) for a in rays)
    grid, sampler = init_occupancy(cells), MarchConfig(num_steps=256, occupancy=config)
    march = jit_to_numpy(functools.partial(marching.find_candidates, config=sampler))
    for jitter in (0.0, 0.3, 0.7, 0.999):
        found = march(Rays(origin, direction), grid, np.full(len(origin), jitter, np.float32))  # type: ignore[arg-type]
        assert not found.words.any()


def all_rays(images: PosedImages) -> list[tuple[np.ndarray, np.ndarray]]:
    views = (images.cameras[view] for view in range(len(images.cameras)))
    return [tuple(a.reshape(-1, 3) for a in pixel_rays(view)) for view in views]  # type: ignore[misc]


@functools.cache
def ball_views() -> PosedImages:
    return photograph(BALL, make_camera(WIDTH, HEIGHT, 60.0, poses_around(9, 1.8)))


def test_all_pixels_are_drawn_without_carve() -> None:
    """And without clear pixels, where the views see a quarter of the cube or more; else rays past it are left out."""
    images = ball_views()
    opaque = replace(images, rgba=np.full_like(images.rgba, 255))
    total = len(images.rgba)
    for views, carve in ((images, False), (opaque, False), (opaque, True)):
        cells, pixels = hull(views, config=replace(CONFIG, carve=carve))
        np.testing.assert_array_equal(np.ravel(cells), candidates(views, config=replace(CONFIG, carve=carve)))
        assert members(pixels, views).all()
        assert pixels.size == total


def test_the_set_of_all_pixels_is_computed_at_run_time() -> None:
    """XLA would compute a constant one while it compiles, which took a minute for 100 million pixels."""
    camera = np.tile(np.eye(3, 4), (2, 1, 1))
    cameras = make_cameras(camera, focal_xy=[100, 100], centre_xy=[128, 128], width=256, height=256)
    images = pose_images(cameras, [np.zeros((256, 256, 4), np.uint8)] * 2)
    config = OccupancyConfig(resolution=32, carve=False)
    program = jax.jit(lambda images: visual_hull.visual_hull(images, config=config)[1]).lower(images).compile()
    np.testing.assert_array_equal(program(images).end, 32 * np.arange(1, 2 * 256**2 // 32 + 1))
    assert not re.search(r"32\[\d{3,}\]\S* constant\(", program.as_text())
