"""Learning an image as a function of position (paper section 5.1): draw positions, compare colours."""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxngp.config import ImageConfig, program_config
from jaxngp.data.image import StoredImage
from jaxngp.device import (
    compiled,
    compiler_options,
    default_placement,
    fusion_barrier,
    num_shares,
    over_shares,
    own_share,
)
from jaxngp.fields import ImageField
from jaxngp.images import Taps, blend_taps, pixel_taps, stratified_positions
from jaxngp.losses import colour_loss
from jaxngp.metrics import psnr
from jaxngp.training.state import TrainState, fresh_state
from jaxngp.training.step import (
    NO_STEPS,
    Carry,
    Programs,
    apply_gradient,
    begin_steps,
    draw_bits,
    finish_steps,
    repeat_steps,
    step_options,
    zero_rates,
)

Field = ImageField
init_state = fresh_state


@struct.dataclass
class ImagePixels:
    """An image that the device holds: (H, W, 3) of u8, u16 or f32, sRGB."""

    pixels: jax.Array

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    def values(self, taps: Taps) -> jax.Array:
        """The stored values at taps (..., N), (..., N, C, 3)."""
        return self.pixels[taps.row, taps.column]


@struct.dataclass
class FetchedPixels:
    """Of an image that the device does not hold, the values at the taps of K steps, (K, N, C, 3), and its size."""

    fetched: jax.Array
    width: int = struct.field(pytree_node=False)
    height: int = struct.field(pytree_node=False)

    def values(self, _: Taps) -> jax.Array:
        """The stored values that were fetched for the taps."""
        return self.fetched


@struct.dataclass
class ColourBatch:
    """N positions (N, 2) f32 in [0, 1], and the colour (N, 3) f32 of the image there."""

    position: jax.Array
    colour: jax.Array


@struct.dataclass
class ImageMetrics:
    """Of one step, or averaged over several."""

    loss: jax.Array
    psnr: jax.Array  # of the batch, in dB
    samples: jax.Array
    skipped: jax.Array  # 1 where the update was skipped because loss or gradient was non-finite

    def headline(self) -> str:
        """Quality of the fit in one phrase, for the progress bar."""
        return f"PSNR {float(self.psnr):.2f} dB"


def draw_taps(step: jax.Array, key: jax.Array, *, width: int, height: int, num_steps: int, config: ImageConfig) -> Taps:
    """Positions of K steps from a given one on, and the pixels they need: Taps (K, N, ...)."""
    bits = draw_bits(step, key, (config.train.num_points, 2), num_steps=num_steps)

    def taps(bits: jax.Array) -> Taps:
        return pixel_taps(stratified_positions(bits), width=width, height=height, snap=config.train.snap)

    return jax.vmap(taps)(bits)


def draw_batches(
    step: jax.Array, key: jax.Array, data: ImagePixels | FetchedPixels, *, num_steps: int, config: ImageConfig
) -> ColourBatch:
    """The batches (K, N, ...) of K steps from a given one on."""
    taps = draw_taps(step, key, width=data.width, height=data.height, num_steps=num_steps, config=config)
    return ColourBatch(taps.position, blend_taps(data.values(taps), taps.weight))


def image_loss(field: ImageField, batch: ColourBatch) -> tuple[jax.Array, ImageMetrics]:
    """The mean squared error of a batch, () f32, and the metrics of the step.

    Devices that share a program each return their part of the loss, and the metrics of the whole.
    """
    samples, batch = jnp.float32(len(batch.position)), own_share(batch)
    part = jnp.mean(colour_loss(field(batch.position), batch.colour, loss="l2")) / num_shares()
    loss = over_shares(part)
    return part, ImageMetrics(loss=loss, psnr=psnr(loss), samples=samples, skipped=jnp.float32(0))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def image_steps(
    state: TrainState,
    data: ImagePixels | FetchedPixels,
    learning_rates: jax.Array,
    num_steps: jax.Array,
    *,
    config: ImageConfig,
) -> tuple[TrainState, ImageMetrics]:
    """Up to num_steps () i32 steps at the learning_rates (K,), and their mean metrics."""
    max_steps = len(learning_rates)
    draw = functools.partial(draw_batches, num_steps=max_steps, config=config)
    batches = fusion_barrier(draw, state.step, state.key, data)

    def one(i: jax.Array, carry: Carry) -> Carry:
        batch = jax.tree.map(lambda a: a[i], batches)

        def loss(params: Any) -> tuple[jax.Array, ImageMetrics]:
            return image_loss(ImageField(params, carry.half_table, config.field), batch)

        gradient, metrics = jax.grad(loss, has_aux=True)(carry.params)
        return apply_gradient(carry, gradient, metrics, learning_rates[i], config=config)

    carry = begin_steps(state, ImageMetrics, config=config)
    carry = repeat_steps(one, carry, num_steps, max_steps=max_steps)
    return finish_steps(carry, ImageMetrics, num_steps, max_steps=max_steps, config=config)


def compile_programs(state: TrainState, data: ImagePixels | StoredImage, config: ImageConfig) -> Programs:
    """The programs of a run on an image that the device holds, or that stays on the host."""
    static, options = program_config(config), step_options(config)
    rates = zero_rates(config)
    if isinstance(data, ImagePixels):
        held = default_placement().put(data)
        steps = compiled(image_steps, state, held, rates, NO_STEPS, options=options, donate=True, config=static)
        return Programs(lambda state, _, rates, number: steps(state, held, rates, np.int32(number)))
    fetcher = _Fetcher(data, state.key, config)
    arguments = (state, fetcher.shapes(), rates, NO_STEPS)
    fetching = compiled(image_steps, *arguments, options=options, donate=True, config=static)
    return Programs(
        lambda state, step, rates, number: fetching(state, fetcher.take(step, number), rates, np.int32(number))
    )


@functools.partial(jax.jit, static_argnames=("width", "height", "num_steps", "config"))
def _draw_taps(step: jax.Array, key: jax.Array, **static: Any) -> Taps:
    return draw_taps(step, key, **static)


class _Fetcher:
    """Pixels of an image that stays on the host, for a call at a time, and for the next while it runs.

    The device draws the positions, so that where an image is held changes nothing in what is learned from it.
    """

    def __init__(self, image: StoredImage, key: jax.Array, config: ImageConfig) -> None:
        self._image, self._key = image, jnp.copy(key)  # training donates its own
        self._place = default_placement()  # a thread would not know it
        num_steps, self._max_steps = config.train.steps_per_dispatch, config.train.max_steps
        static = {"width": image.width, "height": image.height, "num_steps": num_steps}
        self._static: dict[str, Any] = {**static, "config": program_config(config)}
        self._program = compiled(_draw_taps, np.int32(0), self._key, options=compiler_options(), **self._static)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next: tuple[int, concurrent.futures.Future[jax.Array]] | None = None

    def shapes(self) -> FetchedPixels:
        """What `take` gives, as shapes."""
        taps = jax.eval_shape(functools.partial(draw_taps, **self._static), np.int32(0), self._key)
        return self._fetched(jax.ShapeDtypeStruct((*taps.row.shape, 3), self._image.pixels.dtype))

    def take(self, step: int, number: int) -> FetchedPixels:
        """What the steps from one on need; behind them, `number` steps later, the next call is expected."""
        if self._next is None or self._next[0] != step:
            self._next = self._start(step)
        _, fetching = self._next
        values = fetching.result()
        # Given to the device now, before the steps: it would draw the next positions only after them otherwise.
        self._next = self._start(step + number) if step + number < self._max_steps else None
        return self._fetched(values)

    def _start(self, step: int) -> tuple[int, concurrent.futures.Future[jax.Array]]:
        taps = self._program(np.int32(step), self._key)
        return step, self._thread.submit(self._gather, taps)

    def _gather(self, taps: Taps) -> jax.Array:
        row, column = np.asarray(taps.row), np.asarray(taps.column)
        values = self._image.gather(row.ravel(), column.ravel())
        return self._place.put(values.reshape(*row.shape, 3))  # type: ignore[return-value]

    def _fetched(self, values: Any) -> FetchedPixels:
        return FetchedPixels(values, self._image.width, self._image.height)


def training_warnings(metrics: ImageMetrics, *, step: int, finished: bool, config: ImageConfig) -> dict[str, str]:  # noqa: ARG001
    """No warnings of its own."""
    return {}
