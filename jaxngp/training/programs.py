"""The compiled programs of a run: one set of them for each kind of thing that is learned."""

from __future__ import annotations

import concurrent.futures
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import PosedImages
from jaxngp.config import ImageConfig, InputError, MarchConfig, NerfConfig, PointConfig, RunConfig
from jaxngp.data.image import StoredImage
from jaxngp.device import compiler_options, step_compiler_options
from jaxngp.images import Taps
from jaxngp.occupancy import OccupancyGrid
from jaxngp.training.points import DistanceSamples, FetchedPixels, ImagePixels, PointData, draw_taps, point_steps
from jaxngp.training.state import TrainState
from jaxngp.training.steps import TrainingData, nerf_steps, refresh_occupancy, survey_views
from jaxngp.training.updates import StepMetrics
from jaxngp.visual_hull import PixelSet

Data = TrainingData | ImagePixels | StoredImage | DistanceSamples
"""What a run learns from: views or a ray table, an image on the device or one that stays on the host, distances."""


@dataclass(frozen=True)
class Programs:
    """What a run calls, each compiled once, before the clock starts."""

    steps: Callable[[TrainState, int, jax.Array, int], tuple[TrainState, StepMetrics]]
    """State, its step as the host knows it, learning rates (K,), number of steps to take."""

    seconds: float  # that compilation took
    begin: Callable[[TrainState], TrainState] = lambda state: state  # before step 0
    refresh: Callable[[TrainState], TrainState] = lambda state: state
    refresh_every: int = 0  # steps; 0 is never


def compile_programs(state: TrainState, data: Data, config: RunConfig) -> Programs:
    """The programs of a run. Raises InputError where the data cannot be learned from."""
    if isinstance(config, NerfConfig):
        assert not isinstance(data, ImagePixels | StoredImage | DistanceSamples), "a NeRF is learned from views"
        return _nerf_programs(state, data, config)
    assert isinstance(data, ImagePixels | StoredImage | DistanceSamples), "images and distances have data of their own"
    return _point_programs(state, data, config)


def _nerf_programs(state: TrainState, data: TrainingData, config: NerfConfig) -> Programs:
    """In three threads: XLA compiles several programs at once, and while it does Python traces the next.

    The survey runs once, while the others are compiled; what is left of it when they are is what training waits for.
    """
    if isinstance(data, PosedImages) and (num_pixels := math.prod(data.rgba.shape[:3])) >= 2**31:
        raise InputError(f"the views have {num_pixels} pixels, and 2^31 are too many: give a --downscale")
    started = time.perf_counter()
    data = _on_device(data)
    options, rates = compiler_options(), jnp.zeros(config.train.steps_per_dispatch)
    grid: OccupancyGrid | None = None
    pixels: PixelSet | None = None
    shapes, every = None, 0
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        surveying, refreshing = None, None
        if isinstance(config.sampler, MarchConfig):
            every = config.sampler.occupancy.refresh_every
            if isinstance(data, PosedImages):
                survey = survey_views.lower(data, config=config)
                shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), survey.out_info[1])
                surveying = threads.submit(lambda: survey.compile(options)(data))
            refreshing = threads.submit(lambda: refresh_occupancy.lower(state, config=config).compile(options))
        lowered = nerf_steps.lower(state, data, shapes, rates, jnp.int32(0), config=config)
        compiled = lowered.compile(_step_options(config))
        refresh: Callable[..., Any] = refreshing.result() if refreshing else lambda state: state
        if surveying:
            grid, pixels = surveying.result()

    def begin(state: TrainState) -> TrainState:
        jax.block_until_ready((grid, pixels))
        if grid is None:
            return state
        _check_candidates(grid)
        return replace(state, occupancy=grid)

    def steps(state: TrainState, _: int, rates: jax.Array, number: int) -> tuple[TrainState, StepMetrics]:
        return compiled(state, data, pixels, rates, jnp.int32(number))

    return Programs(steps, time.perf_counter() - started, begin, refresh, every)


def _check_candidates(grid: OccupancyGrid) -> None:
    if not np.any(np.asarray(grid.occupied)):
        raise InputError(
            "no camera sees anything in the scene's box: set scene.box_centre and scene.box_side by --override, in the "
            "units of the poses"
        )


def _point_programs(
    state: TrainState, data: ImagePixels | StoredImage | DistanceSamples, config: PointConfig
) -> Programs:
    started = time.perf_counter()
    rates = jnp.zeros(config.train.steps_per_dispatch)
    if isinstance(data, StoredImage):
        assert isinstance(config, ImageConfig)
        fetcher = _Fetcher(data, state.key, config)
        held: PointData = fetcher.shapes()
    else:
        fetcher, held = None, _on_device(data)
    compiled = point_steps.lower(state, held, rates, jnp.int32(0), config=config).compile(_step_options(config))

    def steps(state: TrainState, step: int, rates: jax.Array, number: int) -> tuple[TrainState, StepMetrics]:
        found = held if fetcher is None else fetcher.take(step, number)
        return compiled(state, found, rates, jnp.int32(number))

    return Programs(steps, time.perf_counter() - started)


class _Fetcher:
    """Pixels of an image that stays on the host, for a dispatch at a time, and for the next while it runs.

    The device draws the positions, so that where an image is held changes nothing in what is learned from it.
    """

    def __init__(self, image: StoredImage, key: jax.Array, config: ImageConfig) -> None:
        self._image, self._key = image, jax.tree.map(jnp.copy, key)  # training donates its own
        num_steps, self._max_steps = config.train.steps_per_dispatch, config.train.max_steps
        self._draw = functools.partial(
            draw_taps, width=image.width, height=image.height, num_steps=num_steps, config=config
        )
        self._program = jax.jit(self._draw).lower(jnp.int32(0), self._key).compile(compiler_options())
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next: tuple[int, concurrent.futures.Future[jax.Array]] | None = None

    def shapes(self) -> FetchedPixels:
        """What `take` gives, as shapes."""
        taps = jax.eval_shape(self._draw, jnp.int32(0), self._key)
        values = jax.ShapeDtypeStruct((*taps.row.shape, 3), self._image.pixels.dtype)
        return self._fetched(values)

    def take(self, step: int, number: int) -> FetchedPixels:
        """What the steps from one on need; behind them, `number` steps later, the next dispatch is expected."""
        if self._next is None or self._next[0] != step:
            self._next = self._start(step)
        _, fetching = self._next
        values = fetching.result()
        # Given to the device now, before the steps: it would draw the next positions only after them otherwise.
        self._next = self._start(step + number) if step + number < self._max_steps else None
        return self._fetched(values)

    def _start(self, step: int) -> tuple[int, concurrent.futures.Future[jax.Array]]:
        taps = self._program(jnp.int32(step), self._key)
        return step, self._thread.submit(self._gather, taps)

    def _gather(self, taps: Taps) -> jax.Array:
        row, column = np.asarray(taps.row), np.asarray(taps.column)
        values = self._image.gather(row.ravel(), column.ravel())
        return jax.device_put(values.reshape(*row.shape, 3), jax.devices()[0])

    def _fetched(self, values: Any) -> FetchedPixels:
        return FetchedPixels(values, self._image.width, self._image.height)


def _step_options(config: RunConfig) -> dict[str, Any]:
    return step_compiler_options(config.field.precision, deterministic=config.train.deterministic)


def _on_device(data: Any) -> Any:
    # By name: restored arrays are bound to their device and fresh ones are not, and jax compiles for each anew.
    return jax.device_put(data, jax.devices()[0])
