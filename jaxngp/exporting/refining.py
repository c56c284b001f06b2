"""Refinement of splats: gradient descent against what the field shows of itself to the training views."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxngp.cameras import Cameras, image_size, resize_cameras
from jaxngp.console import bar_interval
from jaxngp.exporting.splatting import Bins, Gaussians, draw, pixel_places, project, sort_into_tiles
from jaxngp.exporting.surface import some_views
from jaxngp.rendering import render_view
from jaxngp.runs import Run

NUM_PICTURES = 64  # of the field, which splats are refined on
# Changes in a step; of a position, in distances to its neighbours.
RATES = Gaussians(position=0.03, log_scale=0.02, rotation=0.02, logit=0.05, harmonics=0.01)  # type: ignore[arg-type]
HIGHER = 0.25  # the rate of the harmonics above band 0 over that of band 0
WARM_UP = 10  # steps until the full rate, which then falls to FINAL along a cosine
FINAL = 0.02
HOLES = 0.1  # weight of the error of transmittance beside that of colour on white
MARGIN = 1.25  # rows of the table over those needed: another number compiles anew


def refine(run: Run, gaussians: Gaussians, spacing: np.ndarray, *, steps: int, side: int, seed: int) -> Gaussians:
    """Gaussians that look more like the field, from N that lie on it, `spacing` (N,) apart in scene units.

    Adam, with the mean absolute error of a whole view a step. The views are the training views without their lenses,
    for a splat viewer has none, and shrunk until their longer side has at most `side` pixels.
    """
    cameras = some_views(run.cameras, NUM_PICTURES)
    assert cameras is not None  # by them the Gaussians were found
    views = [pinhole(cameras[number], side) for number in range(len(cameras))]
    shown = functools.partial(tqdm, mininterval=bar_interval(), delay=1.0, leave=False)
    pictures = [picture_on_black(run, view) for view in shown(views, desc="pictures", unit="view")]
    width, height = np.max([image_size(view) for view in views], axis=0).tolist()
    rates = RATES.replace(position=RATES.position * spacing.astype(np.float32))  # type: ignore[attr-defined]
    state, rows, draws = OPTIMIZER.init(gaussians), 0, np.random.default_rng(seed)
    for step in shown(range(steps), desc="refining", unit="step"):
        if step % len(views) == 0:
            order = draws.permutation(len(views))
        number = order[step % len(views)]
        ellipses = _project(gaussians, views[number])
        bins = sort_into_tiles(ellipses, width, height, rows)
        if len(bins.splat) > rows:
            rows = math.ceil(MARGIN * len(bins.splat))
            bins = sort_into_tiles(ellipses, width, height, rows)
        now = jax.tree.map(lambda rate, step=step: rate * _schedule(step, steps), rates)
        gaussians, state = _descend(gaussians, state, views[number], bins, *_tiles(pictures[number], bins), now)
    return gaussians


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rates that a step has."""
    return min(1, (step + 1) / WARM_UP) * (FINAL + (1 - FINAL) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def pinhole(camera: Cameras, side: int) -> Cameras:
    """A single camera without its lens, shrunk until its longer side has at most `side` pixels."""
    width, height = image_size(camera)
    shrink = min(1.0, side / max(width, height))
    plain = camera.replace(lens=None)  # type: ignore[attr-defined]
    return resize_cameras(plain, max(1, round(width * shrink)), max(1, round(height * shrink)))


def picture_on_black(run: Run, view: Cameras) -> np.ndarray:
    """Colours on black and transmittances (H, W, 4) f32 of the field."""
    seen = render_view(run.field, view, run.occupancy, jnp.zeros(3), sampler=run.config.sampler)
    return np.concatenate([seen.rgb, 1 - np.asarray(seen.opacity)[..., None]], axis=-1)


def _tiles(picture: np.ndarray, bins: Bins) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 4) tile by tile (G, 4, 64, T), and the weights (G, 64, T) of its pixels, of mean 1 in it."""
    height, width, _ = picture.shape
    x, y = pixel_places(bins)
    weight = ((x < width) & (y < height)).astype(np.float32) / (width * height)
    return np.moveaxis(picture[np.minimum(y, height - 1), np.minimum(x, width - 1)], -1, 1), weight


OPTIMIZER = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-12)
_project = jax.jit(project)


@functools.partial(jax.jit, donate_argnums=1)
def _descend(
    gaussians: Gaussians,
    state: Any,
    view: Cameras,
    bins: Bins,
    truth: jax.Array,
    weight: jax.Array,
    rates: Gaussians,
) -> tuple[Gaussians, Any]:
    """One step of Adam."""

    def error(gaussians: Gaussians) -> jax.Array:
        wrong = draw(gaussians, view, bins) - truth
        on_white = jnp.mean(jnp.abs(wrong[:, :3] + wrong[:, 3:]), axis=1)
        return jnp.sum(weight * (on_white + HOLES * jnp.abs(wrong[:, 3])))

    change, state = OPTIMIZER.update(jax.grad(error)(gaussians), state)
    share = np.where(np.arange(len(gaussians.harmonics)) > 0, HIGHER, 1.0).astype(np.float32)
    change = change.replace(harmonics=change.harmonics * share[:, None, None])
    return jax.tree.map(lambda a, d, rate: a - rate * d, gaussians, change, rates), state
