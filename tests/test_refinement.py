"""Refinement: rigid motions, the basis of each camera, exposures, the curriculum, and the gauge."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from scenes import make_camera, poses_around
from strategies import TINY_FIELD, TINY_GRID, floats32, jit_to_numpy, seeds

from jaxngp import refinement
from jaxngp.cameras import Cameras, PosedImages, pose_images, project, unproject
from jaxngp.checkpoints import Checkpoints
from jaxngp.config import (
    InputError,
    MarchConfig,
    NerfConfig,
    OccupancyConfig,
    RefineConfig,
    StratifiedConfig,
    TrainConfig,
    apply_overrides,
    differences,
    from_json,
    program_config,
    to_json,
)
from jaxngp.data.rays import RayTable
from jaxngp.encodings import hash_encode
from jaxngp.fields import RadianceField
from jaxngp.hashing import level_offsets
from jaxngp.lenses import COEFFICIENTS, Model, make_lens
from jaxngp.presets import PRESETS
from jaxngp.refinement import Refinement, Similarity, align, init_refinement, pose_errors
from jaxngp.training.loop import init_state, train
from jaxngp.training.nerf import PixelBatch, StepNoise, nerf_loss
from jaxngp.training.pixels import widened

EVERYTHING = RefineConfig(poses=True, focal=True, lens=True, exposure=True)
CONFIG = NerfConfig(
    field=TINY_FIELD,
    sampler=MarchConfig(num_steps=32, num_samples=2**9, occupancy=OccupancyConfig(resolution=32)),
    train=TrainConfig(num_rays=32, max_steps=24, steps_per_dispatch=8),
    refine=EVERYTHING,
)
VIEWS = 5
exposed, moved, se3_exp = (jit_to_numpy(f) for f in (refinement.exposed, refinement.moved, refinement.se3_exp))
update, log_gain = jit_to_numpy(refinement.update), jit_to_numpy(refinement.log_gain)
weighted = jit_to_numpy(refinement.weighted, static_argnames="grid")
projected, unprojected = jit_to_numpy(project), jit_to_numpy(unproject)
encode = jit_to_numpy(hash_encode, static_argnames="grid")


def cameras(count: int = VIEWS) -> Cameras:
    return make_camera(20, 16, 24.0, poses_around(count, 1.6))


def pictures(seed: int = 0) -> PosedImages:
    return pose_images(cameras(), np.random.default_rng(seed).integers(0, 256, (VIEWS, 16, 20, 4), np.uint8))


@functools.cache
def fresh() -> Refinement:
    """Of the cameras by CONFIG, as numpy arrays."""
    return jax.tree.map(np.asarray, init_refinement(cameras(), config=CONFIG))


@functools.cache
def fresh_params() -> Any:
    return jax.tree.map(np.asarray, init_state(0, config=CONFIG).params)


def random_free(learned: Refinement, seed: int, scale: float = 0.01) -> Refinement:
    rng = np.random.default_rng(seed)
    draw = lambda a: np.asarray(rng.normal(size=a.shape) * scale, a.dtype)  # noqa: E731
    return replace(learned, free=jax.tree.map(draw, learned.free))


twists = hnp.arrays(np.float64, 6, elements=floats32(-1.5, 1.5)) | hnp.arrays(
    np.float64, 6, elements=floats32(-1e-5, 1e-5)
)


# Rigid motions.


@given(twists)
def test_se3_exp_is_the_matrix_exponential(twist: np.ndarray) -> None:
    with jax.enable_x64(True):
        (a, b, c), (x, y, z) = twist[:3], twist[3:]
        generator = np.array([[0, -z, y, a], [z, 0, -x, b], [-y, x, 0, c], [0, 0, 0, 0.0]])
        # By its series: the norm is below 5, so 60 terms leave nothing.
        expected, term = np.eye(4), np.eye(4)
        for order in range(1, 60):
            term = term @ generator / order
            expected = expected + term
        np.testing.assert_allclose(se3_exp(twist), expected[:3], rtol=0, atol=1e-12)


def test_se3_exp_has_its_generators_as_slope() -> None:
    slope = jit_to_numpy(jax.jacfwd(refinement.se3_exp))(np.zeros(6, np.float32))
    np.testing.assert_array_equal(slope[:, 3, :3], np.eye(3))
    x, y, z = np.moveaxis(slope[:, :3, 3:], -1, 0)
    np.testing.assert_array_equal([x[2, 1], y[0, 2], z[1, 0]], [1, 1, 1])
    assert np.isfinite(jax.jit(jax.jacrev(refinement.se3_exp))(np.zeros(6, np.float32))).all()


def test_a_twist_and_its_negative_cancel() -> None:
    c2w = np.asarray(cameras().c2w)
    twist = (np.random.default_rng(0).normal(size=(VIEWS, 6)) * 0.3).astype(np.float32)
    np.testing.assert_allclose(moved(moved(c2w, twist), -twist), c2w, atol=1e-5)


# Corrections.


def test_no_corrections_change_nothing() -> None:
    given_cameras = cameras()
    corrected = jit_to_numpy(functools.partial(refinement.corrected, refine=CONFIG.refine))
    found = corrected(given_cameras, fresh())
    for name in ("c2w", "focal_xy", "centre_xy"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given_cameras, name))
    assert not np.any(found.lens.coefficients)


def test_equal_intrinsics_are_of_one_camera() -> None:
    given_cameras = cameras()
    focal = np.array(given_cameras.focal_xy)
    focal[3:] *= 1.5
    learned = init_refinement(given_cameras.replace(focal_xy=focal), config=CONFIG)
    assert np.asarray(learned.camera_of_view).tolist() == [0, 0, 0, 1, 1]
    assert refinement.size_of(learned) == (5, 2, 4)


@pytest.mark.parametrize(("model", "value"), [("perspective", 0.0), ("perspective", -0.01), ("fisheye", -0.01)])
def test_k2_is_refined_where_it_is_given(model: Model, value: float) -> None:
    """Where nobody measured one, k1 alone is looked for; a correction of it leaves all other coefficients."""
    own, names = cameras(), COEFFICIENTS[model]
    coefficients = np.zeros((VIEWS, len(names)), np.float32)
    coefficients[:, names.index("k2")] = value
    shape = {name: np.asarray(getattr(own, name)) for name in ("focal_xy", "centre_xy", "size")}
    lens, _ = make_lens(model, coefficients, **shape)
    own = own.replace(lens=lens)
    free = ["k1", "k2"] if value else ["k1"]
    learned = init_refinement(own, config=replace(CONFIG, refine=RefineConfig(lens=True)))
    assert refinement.size_of(learned) == (VIEWS, 1, len(free))
    learned = replace(learned, free=replace(learned.free, camera=jnp.full((1, len(free)), 0.1)))
    found = refinement.corrected(own, learned, refine=RefineConfig(lens=True)).lens
    assert found is not None
    changed = np.any(np.asarray(found.coefficients) != coefficients, axis=0)
    assert [name for name, other in zip(names, changed, strict=True) if other] == free


@given(seeds)
def test_a_step_in_the_basis_moves_the_image_by_one(seed: int) -> None:
    """At most one focal length, and no less than the damping leaves of it: independent points, in float64."""
    learned = init_refinement(cameras(1), config=replace(CONFIG, refine=RefineConfig(poses=True)))
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=6)
    direction /= np.linalg.norm(direction)
    step = 1e-4
    with jax.enable_x64(True):
        twist = np.asarray(learned.pose_basis, np.float64)[0] @ direction * step
        camera = jax.tree.map(lambda a: np.asarray(a[0], np.float64), cameras(1))
        after = camera.replace(c2w=moved(camera.c2w, twist))
        many = lambda c: jax.tree.map(lambda a: np.broadcast_to(a, (512, *a.shape)), c)  # noqa: E731
        xy = rng.uniform(size=(512, 2)) * [20, 16]
        rays = unprojected(many(camera), xy)
        distance = np.linalg.norm(camera.c2w[:, 3] - 0.5) * rng.choice([0.7, 1.0, 1.4], (512, 1))
        place, _ = projected(many(after), rays.origin + distance * rays.direction)
        motion = np.sqrt(np.mean(np.sum((place - xy) ** 2, axis=1))) / 24.0 / step
    assert 0.05 < motion < 1.3


def test_the_basis_is_the_inverse_root() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 6, 9))
    a = a @ np.swapaxes(a, 1, 2)
    basis = refinement.inverse_root(a).astype(np.float64)
    damped = a + refinement.DAMPING * np.eye(6) * np.diagonal(a, axis1=1, axis2=2)[:, None]
    np.testing.assert_allclose(basis @ damped @ basis, np.broadcast_to(np.eye(6), a.shape), atol=1e-4)


def in_doubles(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, jax.tree.map(jnp.asarray, tree))


@pytest.mark.slow  # compiles a loss in float64
def test_gradient_in_corrections_is_the_difference() -> None:
    num_rays, rng = 24, np.random.default_rng(0)
    with jax.enable_x64(True):
        field_config = replace(TINY_FIELD, encoding=replace(TINY_GRID, smoothstep=True, init_scale=0.5))
        sampler = StratifiedConfig(num_bins=16, near=1.2, far=2.4)
        config = replace(CONFIG, field=field_config, sampler=sampler, train=TrainConfig(num_rays=num_rays, loss="l2"))
        field = RadianceField.of(in_doubles(init_state(3, config=config).params), config=field_config)
        batch = PixelBatch(
            view=jnp.asarray(rng.integers(0, VIEWS, num_rays), jnp.int32),
            xy=jnp.asarray(rng.uniform(4, 12, (num_rays, 2))),
            rgba=jnp.asarray(rng.uniform(size=(num_rays, 4))),
        )
        noise = StepNoise(jnp.asarray(rng.uniform(size=(num_rays, 16))), jnp.asarray(rng.uniform(size=(num_rays, 3))))
        start = in_doubles(random_free(init_refinement(cameras(), config=config), 1))
        own = in_doubles(cameras())

        @jax.jit
        def loss(free: refinement.Free) -> jax.Array:
            learned = replace(start, free=free)
            source = refinement.corrected(own, learned, refine=config.refine)
            gain: Any = refinement.log_gain(learned)
            return nerf_loss(field, source, batch, noise, None, gain[batch.view], config=config)[0]

        gradient, step = jax.grad(loss)(start.free), 1e-7
        for name in ("pose", "camera", "log_gain"):
            direction = jnp.asarray(rng.normal(size=getattr(start.free, name).shape))
            ahead, behind = (
                loss(replace(start.free, **{name: getattr(start.free, name) + s * step * direction})) for s in (1, -1)
            )
            expected = float(ahead - behind) / (2 * step)
            assert abs(expected) > 1e-6
            np.testing.assert_allclose(float(jnp.sum(getattr(gradient, name) * direction)), expected, rtol=1e-4)


# Exposure.


@given(seeds)
def test_exposures_have_zero_mean(seed: int) -> None:
    learned = fresh()
    for number in range(3):  # whatever the gradient
        gradient = random_free(learned, seed + number, 1.0).free
        learned = update(learned, gradient, np.float32(0), np.float32(0.3))
    assert np.abs(learned.free.log_gain).max() > 0.1
    np.testing.assert_allclose(np.mean(log_gain(learned), axis=0), 0, atol=1e-6)


@given(hnp.arrays(np.float32, (4, 3), elements=floats32(0, 1)), floats32(-1, 1))
def test_a_gain_is_on_linear_light(rgb: np.ndarray, gain: float) -> None:
    """The scene's light is multiplied; the background is as it was, through what is half transparent too."""
    opacity, background = np.array([0, 0.25, 0.5, 1], np.float32), np.array([0.2, 0.5, 0.9], np.float32)
    seen = opacity[:, None] * rgb + (1 - opacity[:, None]) * background
    found = exposed(seen, opacity, background, np.full(3, gain, np.float32))
    light = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb.astype(np.float64) + 0.055) / 1.055) ** 2.4) * np.exp(gain)
    srgb = np.minimum(np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055), 1)
    np.testing.assert_allclose(found, opacity[:, None] * srgb + (1 - opacity[:, None]) * background, atol=1e-5)


def test_exposed_has_finite_derivatives() -> None:
    args = (np.zeros((2, 3), np.float32), np.float32([0, 1]), np.zeros(3, np.float32), np.zeros((2, 3), np.float32))
    slopes = jax.jit(jax.jacrev(refinement.exposed, (0, 1, 3)))(*args)
    assert all(np.isfinite(slope).all() for slope in slopes)


# The curriculum.


def test_the_curriculum_changes_nothing_at_its_end() -> None:
    grid, config = CONFIG.field.encoding, CONFIG
    for fraction in (config.refine.fine_at, 1.0):
        np.testing.assert_array_equal(refinement.level_weights(fraction, config=config), 1)
    learned = replace(fresh(), level_weights=np.ones(grid.num_levels + 1, np.float32))
    found = weighted(fresh_params(), learned, grid=grid)
    jax.tree.map(np.testing.assert_array_equal, found, fresh_params())


def test_weights_of_levels_weigh_their_features() -> None:
    grid = CONFIG.field.encoding
    weights = np.array([0.25, 0.5, 1], np.float32)
    learned, params = replace(fresh(), level_weights=weights), fresh_params()
    position = np.random.default_rng(0).uniform(size=(20, 3)).astype(np.float32)
    scaled = weighted(params, learned, grid=grid)["encoding"]["table"]
    expected = encode(params["encoding"]["table"], position, grid=grid) * np.repeat(weights[:-1], grid.num_features)
    assert len(scaled) == level_offsets(grid)[-1]
    np.testing.assert_allclose(encode(scaled, position, grid=grid), expected, rtol=1e-5, atol=1e-12)


def test_levels_open_from_coarse_to_fine() -> None:
    config = apply_overrides(PRESETS["small"], ["refine.poses=true"])
    rows = np.array([refinement.level_weights(f, config=config)[:-1] for f in np.linspace(0, 1, 50)])
    assert rows[0].tolist() == [1] * config.refine.coarse_levels + [0] * (8 - config.refine.coarse_levels)
    assert (np.diff(rows, axis=0) >= 0).all()
    assert (np.diff(rows, axis=1) <= 0).all()


def test_exposures_alone_delay_only_the_direction() -> None:
    config = replace(CONFIG, refine=RefineConfig(exposure=True))
    np.testing.assert_array_equal(refinement.level_weights(0.1, config=config), [1, 1, 0])
    learned = replace(fresh(), level_weights=np.float32([1, 1, 0]))
    params = weighted(fresh_params(), learned, grid=config.field.encoding)
    field = RadianceField.of(params, config=config.field)
    rng = np.random.default_rng(0)
    position, towards = rng.uniform(size=(2, 20, 3)).astype(np.float32)
    evaluate = jax.jit(lambda field, direction: field(position, direction))
    (density, rgb), (same, seen) = evaluate(field, towards), evaluate(field, -towards)
    np.testing.assert_array_equal(density, same)
    np.testing.assert_array_equal(rgb, seen)


def test_rates_fall_to_their_last() -> None:
    fractions = np.linspace(0, 1, 11)
    rates = refinement.rates(np.ones(11, np.float32), fractions, config=CONFIG)
    refine = CONFIG.refine
    np.testing.assert_allclose(rates.cameras[[0, -1]], [refine.learning_rate, refine.learning_rate * refine.final])
    assert (np.diff(rates.cameras) <= 0).all()
    assert (np.diff(rates.exposure) <= 0).all()


# The gauge.


def similarity(seed: int) -> Similarity:
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return Similarity(float(np.exp(rng.normal())), rotation * np.sign(np.linalg.det(rotation)), rng.normal(size=3))


@given(seeds)
def test_the_gauge_does_not_matter(seed: int) -> None:
    """Whatever similarity has moved all cameras together, the aligned ones are the same."""
    rng = np.random.default_rng(seed)
    true = np.asarray(poses_around(12, 1.6), np.float64)
    noisy = np.asarray(moved(np.float32(true), np.float32(rng.normal(size=(12, 6)) * 0.02)), np.float64)
    expected = align(noisy, true).poses(noisy)
    other = similarity(seed).poses(noisy)
    np.testing.assert_allclose(align(other, true).poses(other), expected, atol=1e-6)


def test_alignment_is_exact_despite_wrong_views() -> None:
    true = np.asarray(poses_around(20, 1.6), np.float64)
    given_poses = similarity(1).poses(true)
    given_poses[:3] = given_poses[3:6]
    degrees, distance = pose_errors(align(given_poses, true).poses(given_poses), true)
    assert degrees[3:].max() < 0.5  # of wrong views that are off by 50 degrees
    assert distance[3:].max() < 0.02
    assert degrees[:3].min() > 10


def test_alignment_from_one_place_is_a_rotation() -> None:
    true = np.asarray(poses_around(6, 1.6), np.float64)
    true[:, :, 3] = 0.5
    turned = similarity(2).rotation @ true
    found = align(turned, true)
    assert found.scale == 1
    np.testing.assert_allclose(found.poses(turned), true, atol=1e-6)  # axes of float32


def test_a_similarity_and_its_inverse_cancel() -> None:
    poses = np.asarray(poses_around(3, 1.6), np.float64)
    both = similarity(3)
    np.testing.assert_allclose(both.inverse.poses(both.poses(poses)), poses, atol=1e-12)


def test_pose_errors_measure_angles_and_distances() -> None:
    c2w = np.asarray(cameras().c2w)
    after = moved(c2w, np.float32([0.3, 0, 0.4, 0, 0.02, 0]))
    degrees, distance = pose_errors(after, c2w)
    np.testing.assert_allclose(degrees, np.degrees(0.02), rtol=1e-3)
    np.testing.assert_allclose(distance, 0.5, rtol=0.02)


def test_held_out_views_move_with_the_gauge() -> None:
    every = cameras(8)
    trained, held = every[:6], every[6:]
    motion = similarity(4)
    refined = trained.replace(
        c2w=motion.poses(trained.c2w).astype(np.float32), focal_xy=np.asarray(trained.focal_xy) * np.float32(1.02)
    )
    placed = refinement.placed_cameras(held, trained, refined)
    np.testing.assert_allclose(placed.c2w, motion.poses(held.c2w), atol=1e-4)
    np.testing.assert_allclose(placed.focal_xy, np.asarray(held.focal_xy) * 1.02, rtol=1e-6)
    own = refinement.placed_cameras(trained, trained, refined)
    np.testing.assert_array_equal(own.c2w, refined.c2w)


def test_another_camera_keeps_its_intrinsics() -> None:
    trained = cameras()
    refined = trained.replace(focal_xy=np.asarray(trained.focal_xy) * np.float32(1.1))
    other = trained.replace(focal_xy=np.asarray(trained.focal_xy) * np.float32(2))
    placed = refinement.placed_cameras(other, trained, refined)
    np.testing.assert_array_equal(placed.focal_xy, other.focal_xy)


# Training.


def final(config: NerfConfig, data: Any = None, resume: Any = None) -> Any:
    *_, progress = train(config, pictures() if data is None else data, resume=resume)
    return progress


def leaves(state: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(replace(state, key=jax.random.key_data(state.key)))]


@pytest.mark.slow
def test_without_refinement_its_options_do_nothing() -> None:
    """Equal programs, and equal bits."""
    off = replace(CONFIG, refine=RefineConfig())
    other = replace(CONFIG, refine=RefineConfig(learning_rate=0.5, coarse_levels=0, final=0.5))
    assert program_config(off) == program_config(other)
    a, b = final(off), final(other)
    assert a.state.refinement is None
    jax.tree.map(np.testing.assert_array_equal, leaves(a.state), leaves(b.state))


@pytest.mark.slow
def test_refinement_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = final(CONFIG)
    learned = whole.state.refinement
    assert all(np.abs(np.asarray(part)).max() > 0 for part in jax.tree.leaves(learned.free))
    np.testing.assert_array_equal(learned.level_weights, refinement.level_weights(16 / 24, config=CONFIG))
    for progress in train(CONFIG, pictures()):
        if progress.step == 8:
            break
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(progress)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(CONFIG)
    resumed = final(CONFIG, resume=restored)
    jax.tree.map(np.testing.assert_array_equal, leaves(whole.state), leaves(resumed.state))


def test_a_non_finite_gradient_moves_no_camera() -> None:
    learned = random_free(fresh(), 0)
    pose = learned.free.pose.copy()
    pose[0, 0] = np.nan
    after = update(learned, replace(learned.free, pose=pose), np.float32(1), np.float32(1))
    jax.tree.map(np.testing.assert_array_equal, after.free, learned.free)


def test_a_ray_table_is_refused() -> None:
    rays = jax.tree.map(np.asarray, jax.jit(unproject)(cameras()[0], np.full((4, 2), 0.5, np.float32)))
    table = RayTable(rays, np.zeros((4, 3), np.float32), 2, 2)
    with pytest.raises(InputError, match="--refine corrects cameras"):
        final(CONFIG, table)


def test_a_lens_without_coefficients_is_refused() -> None:
    own = cameras()
    shape = {"focal_xy": own.focal_xy, "centre_xy": own.centre_xy, "size": own.size}
    lens, _ = make_lens("equirectangular", np.zeros((VIEWS, 0)), **shape)
    with pytest.raises(InputError, match="no coefficients to refine"):
        init_refinement(own.replace(lens=lens), config=CONFIG)


def test_diverging_cameras_are_warned_of() -> None:
    learned = fresh()
    assert not refinement.divergence(learned, step=1, config=CONFIG)
    far = replace(learned, free=replace(learned.free, pose=learned.free.pose + 0.5))
    assert "diverges" in refinement.divergence(far, step=1, config=CONFIG)["diverged"]


def test_silhouettes_widen_by_a_share() -> None:
    images = pictures()
    rgba = np.array(images.rgba)
    rgba[:, 3] = np.where(np.random.default_rng(1).uniform(size=len(rgba)) < 0.97, 0, 255)
    images = images.replace(rgba=rgba)
    found = np.asarray(widened(images, 0.1).alpha).reshape(VIEWS, 16, 20)
    solid = np.pad(rgba[:, 3].reshape(VIEWS, 16, 20) > 0, ((0, 0), (2, 2), (2, 2)))
    expected = np.zeros(found.shape, bool)
    for dy in range(5):
        for dx in range(5):
            expected |= solid[:, dy : dy + 16, dx : dx + 20]
    np.testing.assert_array_equal(found > 0, expected)


def test_configs_of_before_have_no_refinement() -> None:
    import json

    plain = json.loads(to_json(PRESETS["small"]))
    del plain["refine"]
    assert from_json(json.dumps(plain)) == PRESETS["small"]
    assert differences(PRESETS["small"], apply_overrides(PRESETS["small"], ["refine.poses=true"]))
