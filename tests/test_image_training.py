"""Learning an image: what is drawn, that where it is held changes nothing, and that a small budget suffices."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from strategies import needs_float16
from test_training import Compilations, assert_equal_bits

from jaxngp.checkpoints import Checkpoints
from jaxngp.config import (
    CosineDecay,
    HashGridConfig,
    ImageConfig,
    ImageTrainConfig,
    InputError,
    OptimizerConfig,
    PointFieldConfig,
    RunConfig,
)
from jaxngp.data.atlas import builtin_image
from jaxngp.data.image import StoredImage
from jaxngp.training import image
from jaxngp.training.image import ColourBatch, ImagePixels
from jaxngp.training.loop import Progress, init_state, train

CONFIG = ImageConfig(
    field=PointFieldConfig(
        encoding=HashGridConfig(num_dims=2, num_levels=2, num_features=4, table_size=2**12, max_resolution=48),
        hidden_width=16,
        num_outputs=3,
    ),
    optimizer=OptimizerConfig(decay=CosineDecay(), ema_decay=0.0),
    train=ImageTrainConfig(num_points=2**10, max_steps=300, steps_per_dispatch=20, seed=5),
)


@functools.cache
def picture() -> StoredImage:
    """64 columns and 48 rows: whoever swaps them is found out."""
    return builtin_image(64, 48)


# Runs.


@dataclass(frozen=True)
class Trained:
    """What a run yielded, without the states, and the last one with it; what it compiled; saved at step 40."""

    yielded: list[Progress]
    last: Progress
    compiled: dict[str, int]
    workdir: Path


def run(config: RunConfig, data: Any, **options: Any) -> tuple[list[Progress], Progress]:
    """All that a run yields, without the states, and the last one with it."""
    yielded = []
    for progress in train(config, data, **options):
        yielded.append(replace(progress, state=None))
        last = progress
    return yielded, last


def run_saved(config: RunConfig, data: Any, workdir: Path) -> Trained:
    yielded = []
    with Compilations() as compilations, Checkpoints(workdir) as checkpoints:
        for progress in train(config, data):
            yielded.append(replace(progress, state=None))
            if progress.step == 40:
                checkpoints.save(progress)
            last = progress
    return Trained(yielded, last, compilations.counts, workdir)


def assert_whole(trained: Trained, config: Any, program: str) -> None:
    """A run ends exactly at its last step, counts what it used, and compiles its program once."""
    assert [p.step for p in trained.yielded] == [*range(0, config.train.max_steps, 20), config.train.max_steps]
    assert trained.yielded[-1].finished
    assert trained.yielded[-1].num_samples == config.train.max_steps * config.train.num_points
    assert all(p.metrics.skipped == 0 for p in trained.yielded[1:] if p.metrics)
    assert sum(count for name, count in trained.compiled.items() if program in name) == 1, trained.compiled


def assert_resumes(trained: Trained, config: Any, data: Any) -> None:
    """A resumed run is the uninterrupted one bit for bit."""
    with Checkpoints(trained.workdir) as checkpoints:
        resume = checkpoints.restore(config)
    assert resume is not None
    assert resume.step == 40
    assert resume.state.occupancy is None
    yielded, last = run(config, data, resume=resume)
    assert yielded[0].step == 40
    assert_equal_bits(last.state, trained.last.state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run_saved(CONFIG, ImagePixels(picture().pixels), tmp_path_factory.mktemp("run"))


def test_a_run_is_whole_and_compiles_once(trained: Trained) -> None:
    assert_whole(trained, CONFIG, "image_steps")


def test_a_resumed_run_is_the_uninterrupted_one(trained: Trained) -> None:
    assert_resumes(trained, CONFIG, ImagePixels(picture().pixels))


def psnr_of(progress: Progress) -> float:
    """Over all pixels of the picture."""
    y, x = np.mgrid[:48, :64] + 0.5
    position = np.stack([x / 64, y / 48], axis=-1).reshape(-1, 2).astype(np.float32)
    found = np.asarray(evaluate(progress.field, position))
    truth = picture().pixels.reshape(-1, 3) / 255
    return float(-10 * np.log10(np.mean((found - truth) ** 2)))


def test_an_image_is_learned(trained: Trained) -> None:
    """In 300 steps; here 35 dB, and mirrored it would be below 15."""
    assert psnr_of(trained.last) > 31
    truth = picture().pixels / 255
    for other in (truth[::-1], truth[:, ::-1]):
        assert -10 * np.log10(np.mean((other - truth) ** 2)) < 20


@pytest.mark.slow
@needs_float16
def test_bfloat16_learns_as_well(trained: Trained) -> None:
    """Within a decibel: 8 bits of a colour are a little more than what is kept of a feature."""
    config = replace(CONFIG, field=replace(CONFIG.field, precision="bfloat16"))
    _, last = run(config, ImagePixels(picture().pixels))
    assert psnr_of(last) > psnr_of(trained.last) - 1


# Where an image is held.


@pytest.mark.parametrize(("snap", "together"), [(True, 3), (False, 1)], ids=["snapped", "between"])
def test_where_an_image_is_held_changes_nothing(snap: bool, together: int) -> None:
    """Pixels fetched on the host for a dispatch at a time, the last of them shorter.

    To the bit, or as far as the compiler rounds a sum of four alike in two programs.
    """
    train_config = replace(CONFIG.train, snap=snap, calls_in_flight=together, max_steps=50)
    config = replace(CONFIG, train=train_config)
    _, held = run(config, ImagePixels(picture().pixels))
    _, fetched = run(config, picture())
    if snap:
        assert_equal_bits(held.state, fetched.state)
    else:
        for a, b in zip(*map(jax.tree.leaves, (held.state.params, fetched.state.params)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_run_on_fetched_pixels_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, max_steps=70))
    saved = run_saved(config, picture(), tmp_path)
    assert_resumes(saved, config, picture())


class Gone(StoredImage):
    """An image whose file is taken away."""

    def gather(self, *_: np.ndarray) -> np.ndarray:
        raise InputError("the file is gone")


def test_an_image_that_vanishes_ends_the_run() -> None:
    with pytest.raises(InputError, match="the file is gone"):
        run(CONFIG, Gone("gone", picture().pixels, 1))


# Batches.

draw = jax.jit(image.draw_batches, static_argnames=("num_steps", "config"))
evaluate = jax.jit(image.ImageField.__call__)
KEY = jax.random.key(3)


def drawn(kind: str = "u8", step: int = 0, config: ImageConfig = CONFIG) -> ColourBatch:
    return jax.device_get(draw(np.int32(step), KEY, pixels_of(kind), num_steps=2, config=config))


def pixels_of(kind: str) -> ImagePixels:
    pixels = picture().pixels
    if kind == "u16":
        return ImagePixels(pixels.astype(np.uint16) * 257)
    return ImagePixels(pixels.astype(np.float32) / 255 if kind == "f32" else pixels)


@pytest.mark.parametrize("kind", ["u8", "u16", "f32"])
def test_a_target_is_the_pixel_under_its_position(kind: str) -> None:
    batch, (height, width, _) = drawn(kind), picture().pixels.shape
    x, y = batch.position[..., 0] * width, batch.position[..., 1] * height
    np.testing.assert_allclose(np.stack([x, y]) % 1, 0.5, atol=1e-4)  # snapped to centres
    expected = picture().pixels[y.astype(int), x.astype(int)] / 255
    np.testing.assert_allclose(batch.colour, expected, atol=1e-6)


def test_between_centres_a_target_is_interpolated() -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, snap=False))
    ramp = ImagePixels(np.stack(np.broadcast_arrays(*np.indices((48, 64)), 0), axis=-1).astype(np.float32))
    batch = draw(np.int32(0), KEY, ramp, num_steps=2, config=config)
    scaled = np.asarray(batch.position) * np.array([64, 48]) - 0.5
    inside = np.clip(scaled, 0, np.array([63, 47]))
    np.testing.assert_allclose(batch.colour[..., 0], inside[..., 1], atol=1e-4)
    np.testing.assert_allclose(batch.colour[..., 1], inside[..., 0], atol=1e-4)


def test_every_step_draws_anew_as_it_would_alone() -> None:
    two, later = drawn(), drawn(step=1)
    np.testing.assert_array_equal(two.position[1], later.position[0])
    np.testing.assert_array_equal(two.colour[1], later.colour[0])
    assert not np.array_equal(two.position[0], two.position[1])


# Loss and updates.


def test_the_loss_is_the_mean_squared_error() -> None:
    batch = jax.tree.map(lambda a: a[0], drawn())
    field = image.ImageField.of(init_state(0, config=CONFIG).params, config=CONFIG.field)
    loss, metrics = jax.jit(image.image_loss)(field, batch)
    expected = np.mean((np.asarray(evaluate(field, batch.position), np.float64) - batch.colour) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.psnr, -10 * np.log10(expected), rtol=1e-5)
    assert metrics.samples == CONFIG.train.num_points


def test_steps_that_draw_a_nan_pixel_are_skipped() -> None:
    pixels = picture().pixels.astype(np.float32) / 255
    pixels[3, 5] = np.nan
    config = replace(CONFIG, train=replace(CONFIG.train, max_steps=40))
    yielded, last = run(config, ImagePixels(pixels))
    assert yielded[-1].metrics is not None
    assert 0 < yielded[-1].metrics.skipped < 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.state.params))
