"""Where pixels are kept changes nothing that is learned; masked ones are never drawn; depths draw rays to them."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from entrypoints import TINY, write_scene
from hypothesis import given, settings
from many import ROOT
from PIL import Image
from scenes import BALL, photograph, pixel_rays, poses_around
from strategies import TINY_FIELD, TINY_GRID, seeds

from jaxngp.cameras import PosedImages, make_cameras
from jaxngp.config import (
    InputError,
    MarchConfig,
    NerfConfig,
    OccupancyConfig,
    SceneConfig,
    StratifiedConfig,
    TrainConfig,
)
from jaxngp.data import load_training, on_disk, photos
from jaxngp.fields import RadianceField
from jaxngp.training import nerf, pixels
from jaxngp.training.loop import Progress, init_state, train
from jaxngp.training.state import TrainState

MARCH = NerfConfig(
    field=replace(TINY_FIELD, encoding=replace(TINY_GRID, num_levels=1)),
    sampler=MarchConfig(
        num_steps=64, num_samples=2**12, occupancy=OccupancyConfig(resolution=32, refresh_every=4, warmup_steps=4)
    ),
    train=TrainConfig(num_rays=128, max_steps=10, steps_per_dispatch=4, seed=3),
)
BINS = replace(MARCH, sampler=StratifiedConfig(num_bins=8, near=1.0, far=2.4))


@functools.cache
def views(sizes: str = "equal") -> PosedImages:
    """Views of a ball, with masks and depths: those of its surface."""
    size = np.array([[20, 18]] * 4 if sizes == "equal" else [[20, 18], [9, 16], [16, 9], [12, 12]])
    c2w = poses_around(4, 1.7)
    cameras = make_cameras(c2w, focal_xy=1.6 * size, centre_xy=0.5 * size, width=size[:, 0], height=size[:, 1])
    images = photograph(BALL, cameras)
    depth = []
    for view in range(4):
        t0, t1 = BALL.chord(*pixel_rays(cameras[view]))
        depth.append(np.where(t1 > t0, t0, 0).astype(np.float16).ravel())
    keep = np.random.default_rng(0).uniform(size=images.num_pixels) < 0.7
    return replace(images, keep=keep, depth=np.concatenate(depth))


def learn(config: NerfConfig, images: PosedImages, resume: Progress | None = None) -> list[Progress]:
    """All that a run yields; only the last state is still there."""
    return list(train(config, images, resume=resume))


def on(place: str, config: NerfConfig = MARCH) -> NerfConfig:
    return replace(config, train=replace(config.train, images_on=place))


def assert_equal_bits(a: TrainState, b: TrainState) -> None:
    for x, y in zip(*(jax.tree.leaves(s.replace(key=jax.random.key_data(s.key))) for s in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


# On the device or on the host.


@pytest.mark.slow
@pytest.mark.parametrize("config", [MARCH, BINS], ids=["march", "bins"])
def test_pixels_on_the_host_train_the_same(config: NerfConfig) -> None:
    """Two whole calls and a shorter one, bit for bit; and all is compiled once, before the first."""
    *_, device = learn(on("device", config), views())
    compiled, host = [], []
    with Compilations() as compilations:
        for progress in train(on("host", config), views()):
            compiled.append(sum(compilations[name] for name in ("nerf_steps", "draw_numbers", "hull_of_views")))
            host.append(replace(progress, state=None))
    assert [p.step for p in host] == [0, 4, 8, 10]
    assert len(set(compiled)) == 1
    assert_equal_bits(progress.state, device.state)
    assert jax.tree.leaves(host[-1].metrics) == jax.tree.leaves(device.metrics)


@pytest.mark.slow
def test_views_of_several_sizes_may_be_on_the_host() -> None:
    images = replace(views("several"), keep=None, depth=None)
    *_, device = learn(on("device"), images)
    *_, host = learn(on("host"), images)
    assert_equal_bits(host.state, device.state)


@pytest.mark.slow
def test_a_run_on_the_host_goes_on_on_the_device() -> None:
    """And the other way round: it is the same run."""
    *_, whole = learn(on("device"), views())
    for first, then in (("host", "device"), ("device", "host")):
        run = train(on(first), views())
        next(run), next(run)
        *_, last = learn(on(then), views(), resume=next(run))
        assert last.step == 10
        assert_equal_bits(last.state, whole.state)


def in_a_file(images: PosedImages, monkeypatch: pytest.MonkeyPatch, folder: Path) -> PosedImages:
    monkeypatch.setenv("JAXNGP_CACHE", str(folder))
    rgba = on_disk.empty(images.rgba.shape, np.uint8)
    rgba[...] = images.rgba
    return replace(images, rgba=rgba)


@pytest.mark.slow
def test_pixels_in_a_file_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, device = learn(on("device"), views())
    *_, host = learn(on("auto"), in_a_file(views(), monkeypatch, tmp_path))
    assert_equal_bits(host.state, device.state)


def large_views(folder: Path, count: int, size: int) -> str:
    """A scene whose training views are as wide and high as `size`, in small files."""
    write_scene(folder, num_views=count, mode="RGB")
    for file in (folder / "train").iterdir():
        with Image.open(file) as image:
            larger = image.resize((size, size), Image.Resampling.NEAREST)
        larger.save(file, compress_level=1)
    return str(folder)


def test_views_are_read_into_a_file_with_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 views fewer than four are in memory while they are read, one by one, and the first pixels drawn."""
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path))
    monkeypatch.setattr(photos, "num_workers", lambda _: 1)
    scene = SceneConfig(name=large_views(tmp_path / "scene", 16, 480))
    tracemalloc.start()
    images = load_training(scene, images_on="disk").images
    assert isinstance(images, PosedImages)
    store = pixels.HostStore(images, lambda *_: jnp.arange(8) * 10**5, steps_per_call=2, pixels_per_call=8)
    found = store.drawn(0, jax.random.key(0), None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.rgba.nbytes / 4
    in_memory = load_training(scene, images_on="host").images
    np.testing.assert_array_equal(images.rgba, in_memory.rgba)  # type: ignore[union-attr]
    np.testing.assert_array_equal(found.rgba, images.rgba[np.arange(8) * 10**5])  # type: ignore[union-attr]


@pytest.mark.parametrize(("left", "on"), [(15 * 10**5, True), (10**7, False)])
def test_views_are_in_a_file_where_memory_is_short(
    left: int, on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path))
    monkeypatch.setattr(on_disk, "memory_left", lambda: left)
    found = load_training(SceneConfig(name=large_views(tmp_path / "scene", 4, 240)))
    assert on_disk.is_on_disk(found.images.rgba) == on  # type: ignore[union-attr]
    assert [note for note in found.notes if "0.00 GB, lie in a file below" in note] == [*found.notes[-1:]] * on


WITH_LITTLE_MEMORY = """
import os, resource, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # each thread of many cores would take some
resource.setrlimit(resource.RLIMIT_DATA, 2 * (int(sys.argv[1]),))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit counts other things")
def test_a_run_on_more_pixels_than_memory_holds(tmp_path: Path) -> None:
    """1.6 GB of pixels, where the process may take 1.6 GB for all that it does: in a file they are learned from, in
    memory there is no room, and that is said in a line."""
    scene, limit = large_views(tmp_path / "scene", 100, 2000), 1_600_000_000
    for place, expected in (("disk", 0), ("host", 2)):
        arguments = [*TINY, f"--scene={scene}", f"--workdir={tmp_path / place}", "--eval_views=1"]
        result = subprocess.run(
            [sys.executable, "-c", WITH_LITTLE_MEMORY, str(limit), "-m", "jaxngp.train", *arguments]
            + [f"--override=train.images_on={place}"],
            env=os.environ | {"JAXNGP_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == expected, result.stdout[-2000:] + result.stderr[-4000:]
    assert "do not fit into memory" in result.stderr.splitlines()[-1]


def test_what_is_in_a_file_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also parts of it; the file has no name, so nothing is left of it."""
    images = in_a_file(views(), monkeypatch, tmp_path)
    assert not [*tmp_path.iterdir()]
    assert on_disk.is_on_disk(np.asarray(images.rgba)[3:].view(np.uint32))
    assert not on_disk.is_on_disk(np.array(images.rgba))
    np.testing.assert_array_equal(images.rgba, views().rgba)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path))
    monkeypatch.setattr(on_disk, "reserve", full)
    with pytest.raises(InputError, match=r"no room for 4.00 GB of pixels"):
        on_disk.empty((10**9, 4), np.uint8)


def test_images_are_on_the_device_where_they_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = replace(views(), keep=None, depth=None)
    filed = in_a_file(images, monkeypatch, tmp_path)
    for bytes_there, expected in ((0, False), (images.rgba.nbytes, True), (2 * images.rgba.nbytes, False)):
        monkeypatch.setattr(pixels, "device_memory", lambda bytes_there=bytes_there: bytes_there)
        assert pixels.on_host(images, "auto") == expected
        assert pixels.on_host(filed, "auto") == (expected or not bytes_there)  # a CPU's memory is the host's
        assert pixels.on_host(images, "host")
        assert pixels.on_host(filed, "disk")
        assert not pixels.on_host(images, "device")
    with pytest.raises(InputError, match="the images are in memory"):
        pixels.on_host(images, "disk")
    with_depth = replace(images, depth=np.zeros(images.num_pixels, np.float16))
    assert pixels.on_host(with_depth, "auto")


# Masks.


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        pytest.param(MARCH, "equal", id="march-equal"),
        pytest.param(BINS, "several", id="bins-several"),
        pytest.param(MARCH, "several", id="march-several", marks=pytest.mark.slow),
        pytest.param(BINS, "equal", id="bins-equal", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_learned_of_masked_pixels(config: NerfConfig, sizes: str) -> None:
    images = views(sizes)
    assert images.keep is not None
    images = replace(images, depth=images.depth.astype(np.float32))  # XLA converts no float16 in code for SSE4.2
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, images.rgba.shape).astype(np.uint8)
    spoilt = replace(
        images,
        rgba=np.where(np.asarray(images.keep)[:, None], images.rgba, noise),
        depth=np.where(images.keep, images.depth, np.float32(0.1)),
    )
    *_, expected = learn(config, images)
    *_, found = learn(config, spoilt)
    assert_equal_bits(found.state, expected.state)


pick_numbers = jax.jit(nerf.pick_numbers, static_argnames="num_pixels")


@settings(max_examples=5)
@given(seeds)
def test_a_mask_of_nothing_draws_the_same(seed: int) -> None:
    """From the set of all pixels, and without a set."""
    images = views()
    everything = nerf.hull_of_views(replace(images, keep=None), config=BINS)[1]
    bits = np.random.default_rng(seed).integers(0, 2**32, 500, np.uint32)
    found, expected = (pick_numbers(bits, num_pixels=images.num_pixels, pixels=p) for p in (everything, None))
    np.testing.assert_array_equal(found, expected)


# Depths.


def gradient_and_loss(images: PosedImages, weight: float = 0.5) -> tuple[Any, jax.Array]:
    config = replace(BINS, train=replace(BINS.train, depth_weight=weight))
    state = init_state(0, config=config)
    batch, noise = nerf.draw_batches(state.step, state.key, images, None, num_steps=1, config=config)
    batch, noise = jax.tree.map(lambda a: a[0], (batch, noise))
    source = jax.tree.map(jnp.asarray, images.cameras)

    def loss(params: Any) -> jax.Array:
        return nerf.nerf_loss(RadianceField.of(params, config=config.field), source, batch, noise, None, config=config)[
            0
        ]

    return jax.value_and_grad(loss)(state.params)[::-1]


@pytest.mark.slow
def test_unknown_depths_change_no_loss_and_no_gradient() -> None:
    images = replace(views(), keep=None)
    gradient, loss = gradient_and_loss(replace(images, depth=None))
    unknown = gradient_and_loss(replace(images, depth=np.zeros(images.num_pixels, np.float16)))
    unweighted = gradient_and_loss(images, weight=0.0)
    for other, other_loss in (unknown, unweighted):
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())
    assert gradient_and_loss(images)[1] > 1.1 * loss
