"""Learning from points: what is drawn, that where an image is held changes nothing, and that small budgets suffice."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import Compilations, assert_equal_bits

from jaxngp.config import (
    CosineDecay,
    HashGridConfig,
    ImageConfig,
    ImageTrainConfig,
    InputError,
    OptimizerConfig,
    PointFieldConfig,
    SdfConfig,
    SdfTrainConfig,
)
from jaxngp.data.atlas import builtin_image
from jaxngp.data.image import StoredImage
from jaxngp.data.shapes import SHAPES
from jaxngp.data.solids import distance_samples, surface_samples
from jaxngp.fields import evaluate_points
from jaxngp.images import tile_centres
from jaxngp.training import points
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.loop import Progress, train
from jaxngp.training.points import DistanceSamples, ImagePixels
from jaxngp.training.state import init_state

IMAGE = ImageConfig(
    field=PointFieldConfig(
        encoding=HashGridConfig(num_dims=2, num_levels=6, num_features=2, table_size=2**12, max_resolution=32),
        hidden_width=16,
        num_outputs=3,
    ),
    optimizer=OptimizerConfig(decay=CosineDecay(), ema_decay=0.0),
    train=ImageTrainConfig(num_points=2**10, max_steps=300, steps_per_dispatch=20, seed=5),
)
SDF = SdfConfig(
    field=PointFieldConfig(
        encoding=HashGridConfig(num_levels=4, num_features=4, table_size=2**15, max_resolution=31), hidden_width=32
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, decay=CosineDecay()),
    train=SdfTrainConfig(num_points=2**11, max_steps=600, steps_per_dispatch=20, seed=5),
)


@functools.cache
def picture() -> StoredImage:
    """64 columns and 48 rows: whoever swaps them is found out."""
    return builtin_image(64, 48)


@functools.cache
def samples() -> DistanceSamples:
    solid = SHAPES["torus"]
    return DistanceSamples(surface_samples(solid, 0, 2**17), *distance_samples(solid, 1, 2**17))


DATA: dict[Any, Any] = {IMAGE: lambda: ImagePixels(picture().pixels), SDF: samples}
TASKS = pytest.mark.parametrize("config", [IMAGE, SDF], ids=["image", "sdf"])


def run(config: Any, data: Any, **options: Any) -> tuple[list[Progress], Progress]:
    """All that a run yields, without the states, and the last one with it."""
    yielded = []
    for progress in train(config, data, **options):
        yielded.append(replace(progress, state=None))
        last = progress
    return yielded, last


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """A run of each task: what it yielded, compiled, and saved at step 40."""
    runs = {}
    for config, data in DATA.items():
        workdir, yielded = tmp_path_factory.mktemp("run"), []
        with Compilations() as compilations, Checkpoints(workdir) as checkpoints:
            for progress in train(config, data()):
                yielded.append(replace(progress, state=None))
                if progress.step == 40:
                    checkpoints.save(progress)
                last = progress
        runs[config] = {"workdir": workdir, "yielded": yielded, "last": last, "compiled": compilations.counts}
    return runs


# Runs.


def psnr_of(progress: Progress) -> float:
    """Over all pixels of the picture."""
    image = picture()
    position = jnp.concatenate(
        [
            tile_centres(jnp.int32(0), jnp.int32(top), size=64, width=image.width, height=image.height)[:64]
            for top in range(image.height)
        ]
    )
    found = jax.jit(functools.partial(evaluate_points, config=IMAGE.field))(progress.state.eval_params, position)
    truth = image.read(slice(None), slice(None)).reshape(-1, 3)
    return float(-10 * np.log10(np.mean((np.clip(found, 0, 1) - truth) ** 2)))


def test_an_image_is_learned(whole_runs: dict) -> None:
    """In 300 steps; here 33 dB, and mirrored it would be below 15."""
    assert psnr_of(whole_runs[IMAGE]["last"]) > 31
    truth = picture().read(slice(None), slice(None))
    for other in (truth[::-1], truth[:, ::-1]):
        assert -10 * np.log10(np.mean((other - truth) ** 2)) < 20


def iou_of(progress: Progress) -> float:
    solid = SHAPES["torus"]
    points = np.random.default_rng(9).uniform(*solid.box, (2**15, 3))
    found = jax.jit(functools.partial(evaluate_points, config=SDF.field))(progress.state.eval_params, points)[:, 0] < 0
    true = solid.inside(points)
    return float(np.sum(true & found) / np.sum(true | found))


def test_a_signed_distance_is_learned(whole_runs: dict) -> None:
    """In 600 steps; here 0.983."""
    assert iou_of(whole_runs[SDF]["last"]) > 0.97


@TASKS
def test_a_run_ends_exactly_at_its_last_step_and_counts_what_it_used(config: Any, whole_runs: dict) -> None:
    yielded = whole_runs[config]["yielded"]
    assert [p.step for p in yielded] == [*range(0, config.train.max_steps, 20), config.train.max_steps]
    assert yielded[-1].finished
    assert yielded[-1].num_samples == config.train.max_steps * config.train.num_points
    assert all(p.metrics.skipped == 0 for p in yielded[1:])


@TASKS
def test_the_program_is_compiled_once(config: Any, whole_runs: dict) -> None:
    compiled = whole_runs[config]["compiled"]
    assert sum(count for name, count in compiled.items() if "point_steps" in name) == 1, compiled


@TASKS
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config: Any, whole_runs: dict) -> None:
    with Checkpoints(whole_runs[config]["workdir"]) as checkpoints:
        resume = checkpoints.restore(config)
    assert resume is not None
    assert resume.step == 40
    assert resume.state.occupancy is None
    yielded, last = run(config, DATA[config](), resume=resume)
    assert yielded[0].step == 40
    assert_equal_bits(last.state, whole_runs[config]["last"].state)


def test_a_checkpoint_of_another_task_is_refused_in_one_line(whole_runs: dict) -> None:
    with Checkpoints(whole_runs[IMAGE]["workdir"]) as checkpoints, pytest.raises(InputError, match="not a usable"):
        checkpoints.restore(SDF)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("snap", [True, False], ids=["snapped", "between"])
def test_where_an_image_is_held_changes_nothing(snap: bool, together: int) -> None:
    """Pixels fetched on the host for a dispatch at a time, the last of them shorter.

    To the bit, or as far as the compiler rounds a sum of four alike in two programs.
    """
    train_config = replace(IMAGE.train, snap=snap, calls_in_flight=together, max_steps=50)
    config = replace(IMAGE, train=train_config)
    _, held = run(config, ImagePixels(picture().pixels))
    _, fetched = run(config, picture())
    if snap:
        assert_equal_bits(held.state, fetched.state)
    else:
        for a, b in zip(*map(jax.tree.leaves, (held.state.params, fetched.state.params)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_run_on_fetched_pixels_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = replace(IMAGE, train=replace(IMAGE.train, max_steps=70))
    with Checkpoints(tmp_path) as checkpoints:
        for progress in train(config, picture()):
            if progress.step == 40:
                checkpoints.save(progress)
            last = progress
        resume = checkpoints.restore(config)
    _, resumed = run(config, picture(), resume=resume)
    assert_equal_bits(resumed.state, last.state)


class Gone(StoredImage):
    """An image whose file is taken away."""

    def gather(self, *_: np.ndarray) -> np.ndarray:
        raise InputError("the file is gone")


def test_an_image_that_cannot_be_read_any_more_ends_the_run_in_one_line() -> None:
    with pytest.raises(InputError, match="the file is gone"):
        run(IMAGE, Gone("gone", picture().pixels, 1))


# Batches.


@functools.cache
def batch(config: Any, data: str = "", step: int = 0, count: int = 2) -> points.PointBatch:
    found = picture_of(data) if isinstance(config, ImageConfig) else samples()
    draw = jax.jit(points.draw_batches, static_argnames=("num_steps", "config"))
    return jax.tree.map(np.asarray, draw(jnp.int32(step), jax.random.key(3), found, num_steps=count, config=config))


def picture_of(kind: str) -> ImagePixels:
    pixels = picture().pixels
    if kind == "u16":
        return ImagePixels(pixels.astype(np.uint16) * 257)
    return ImagePixels(pixels.astype(np.float32) / 255 if kind == "f32" else pixels)


@pytest.mark.parametrize("kind", ["u8", "u16", "f32"])
def test_the_target_is_the_colour_of_the_pixel_under_the_position(kind: str) -> None:
    drawn, image = batch(IMAGE, kind), picture()
    x, y = drawn.position[..., 0] * image.width, drawn.position[..., 1] * image.height
    np.testing.assert_allclose(np.stack([x, y]) % 1, 0.5, atol=1e-4)  # snapped to centres
    expected = image.pixels[y.astype(int), x.astype(int)] / 255
    np.testing.assert_allclose(drawn.target, expected, atol=1e-6)


def test_between_centres_the_target_is_interpolated() -> None:
    config = replace(IMAGE, train=replace(IMAGE.train, snap=False))
    drawn, image = batch(config, "u8"), picture()
    ramp = ImagePixels(np.stack(np.broadcast_arrays(*np.indices((48, 64)), 0), axis=-1).astype(np.float32))
    draw = jax.jit(points.draw_batches, static_argnames=("num_steps", "config"))
    linear = draw(jnp.int32(0), jax.random.key(3), ramp, num_steps=2, config=config)
    scaled = drawn.position * np.array([image.width, image.height]) - 0.5
    inside = np.clip(scaled, 0, np.array([63, 47]))
    np.testing.assert_allclose(linear.target[..., 0], inside[..., 1], atol=1e-4)
    np.testing.assert_allclose(linear.target[..., 1], inside[..., 0], atol=1e-4)


def test_half_of_the_points_lie_on_the_surface_and_the_rest_have_their_distance() -> None:
    drawn, solid = batch(SDF), SHAPES["torus"]
    half = SDF.train.num_points // 2
    true = solid.distance(drawn.position.reshape(-1, 3).astype(np.float64)).reshape(drawn.target.shape[:2])
    np.testing.assert_array_equal(drawn.target[:, :half], 0)
    np.testing.assert_allclose(drawn.target[..., 0], true, atol=1e-6)
    near = np.abs(true[:, half:]) < 5e-3
    assert 0.7 < near.mean() < 0.82  # three of four, and few of those anywhere


@TASKS
def test_every_step_draws_anew_and_as_it_would_alone(config: Any) -> None:
    two, later = batch(config, "u8"), batch(config, "u8", step=1)
    np.testing.assert_array_equal(two.position[1], later.position[0])
    np.testing.assert_array_equal(two.target[1], later.target[0])
    assert not np.array_equal(two.position[0], two.position[1])


def test_all_samples_are_drawn() -> None:
    """Of a few, in 40 steps; drawn uniformly, one in e^-10 is missed."""
    few = jax.tree.map(lambda a: a[: 2**12], samples())
    draw = jax.jit(points.draw_batches, static_argnames=("num_steps", "config"))
    drawn = np.asarray(draw(jnp.int32(0), jax.random.key(3), few, num_steps=40, config=SDF).position)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 2 * 2**12 - 5


# Loss and updates.


@TASKS
def test_the_loss_is_the_mean_of_its_definition(config: Any) -> None:
    drawn = jax.tree.map(lambda a: a[0], batch(config, "u8"))
    params = init_state(0, config=config).params
    loss, metrics = jax.jit(points.point_loss, static_argnames="config")(params, drawn, config=config)
    error = np.asarray(evaluate_points(params, drawn.position, config=config.field), np.float64) - drawn.target
    if isinstance(config, ImageConfig):
        expected = np.mean(error**2)
        np.testing.assert_allclose(metrics.psnr, -10 * np.log10(expected), rtol=1e-5)
    else:
        expected = np.mean(np.abs(error) / (np.abs(drawn.target) + 0.01))
        np.testing.assert_allclose(metrics.error, np.mean(np.abs(error)), rtol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.samples == config.train.num_points


def test_a_pixel_that_is_no_number_leaves_out_the_steps_that_draw_it() -> None:
    pixels = picture().pixels.astype(np.float32) / 255
    pixels[3, 5] = np.nan
    config = replace(IMAGE, train=replace(IMAGE.train, max_steps=40))
    yielded, last = run(config, ImagePixels(pixels))
    assert 0 < yielded[-1].metrics.skipped < 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.state.params))


def test_bfloat16_learns_as_well(whole_runs: dict) -> None:
    """Within a decibel: 8 bits of a colour are a little more than what is kept of a feature."""
    config = replace(IMAGE, field=replace(IMAGE.field, precision="bfloat16"))
    _, last = run(config, ImagePixels(picture().pixels))
    assert psnr_of(last) > psnr_of(whole_runs[IMAGE]["last"]) - 1
