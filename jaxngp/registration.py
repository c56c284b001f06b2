"""Where a photograph of a trained scene was taken: render, compare, move the camera, until the difference is least.

    found = localise(runs.load("runs/lego"), image, run.cameras[0])
    found.camera.c2w, found.rotation_error, found.position_error

Gauss-Newton with Levenberg and Marquardt's damping, from coarse pixels to fine ones. The field is not differentiated:
six numbers are cheap to vary, and differences over a pixel see over the grain of the field that a derivative falls
into. The exposure may be found as well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxngp.cameras import Cameras, image_size, unproject
from jaxngp.config import InputError
from jaxngp.device import compiler_options, default_batching
from jaxngp.occupancy import OccupancyGrid
from jaxngp.refinement import exposed, moved, pose_basis
from jaxngp.rendering import Field, Sampler, render_chunk

SIDES = (16, 32, 64)  # px, of the shorter side of the coarse images
FINE_PIXELS = 2**12  # of the photograph itself, that are compared at the end
STARTS, KEPT = 96, 4  # guesses that are looked at, and followed
ROUNDS = 12  # at most, on each level
NOISE = 0.1  # sRGB; a larger difference counts less than its square
RAYS = 2**14  # in one call of the one program that all levels share
DAMPINGS = (1e-3, 1e-1, 1e1)


class Scene(Protocol):
    """What is read of a trained run, such as `runs.Run`."""

    @property
    def field(self) -> Field: ...
    @property
    def occupancy(self) -> OccupancyGrid | None: ...
    @property
    def config(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Registration:
    """A photograph's camera, and how well it is known.

    covariance (6, 6): of a twist that moves the pose in its own axes (`refinement.moved`): translation in scene units,
    rotation in radians. It is that of least squares with independent differences of one size; where the scene itself
    is wrong, errors are larger.
    """

    camera: Cameras  # a single one
    log_gain: np.ndarray  # (3,) natural logarithm of the gain on linear light; 0 where it is not fitted
    covariance: np.ndarray
    difference: float  # root mean square over the pixels compared at the end, sRGB

    @property
    def rotation_error(self) -> float:
        """Standard deviation of the rotation's angle, degrees."""
        return float(np.degrees(np.sqrt(np.trace(self.covariance[3:, 3:]))))

    @property
    def position_error(self) -> float:
        """Standard deviation of the position, scene units."""
        return float(np.sqrt(np.trace(self.covariance[:3, :3])))


def localise(
    scene: Scene,
    image: NDArray[Any],
    guess: Cameras,
    *,
    degrees: float = 10.0,
    distance: float = 0.1,
    exposure: bool = False,
    seed: int = 0,
) -> Registration:
    """The camera that took a photograph of a trained scene.

    image (H, W, 3 or 4) u8, or f32 in [0, 1], sRGB; guess: a single camera of that size, whose intrinsics are those of
    the photograph and whose pose may be off by about so many degrees and such a distance in scene units. exposure:
    find its exposure and white balance as well. Raises InputError where the sizes differ.
    """
    rgb = over_white(image)
    if rgb.shape[1::-1] != image_size(guess):
        raise InputError(f"the image has {rgb.shape[1]}x{rgb.shape[0]} pixels and its camera another size: resize one")
    rendering = _Rendering(scene.field, scene.occupancy, scene.config.sampler)
    levels = _levels(rgb, np.ones(rgb.shape[:2], bool), guess)
    rng = np.random.default_rng(seed)
    # Uniform within the ball that the guess is off by, and the guess itself.
    away = rng.normal(size=(STARTS, 2, 3))
    away *= (rng.uniform(size=(STARTS, 2, 1)) ** (1 / 3)) / np.linalg.norm(away, axis=-1, keepdims=True)
    twists = np.concatenate([away[:, 0] * distance, away[:, 1] * np.radians(degrees)], axis=1)
    twists[0] = 0
    starts = np.asarray(_moved(jnp.asarray(guess.c2w), jnp.asarray(twists, jnp.float32)))
    cost = rendering.costs(guess, starts, np.zeros(3), levels[0])
    found = [
        fit(rendering, guess.replace(c2w=starts[i]), levels[:1], pose=True, exposure=exposure)  # type: ignore[attr-defined]
        for i in np.argsort(cost)[:KEPT]
    ]
    best = min(found, key=lambda registration: registration.difference)
    return fit(rendering, best.camera, levels[1:], pose=True, exposure=exposure, log_gain=best.log_gain)


def register_view(
    field: Field,
    grid: OccupancyGrid | None,
    camera: Cameras,
    image: NDArray[Any],
    keep: NDArray[np.bool_],
    *,
    sampler: Sampler,
    pose: bool,
    exposure: bool,
) -> Registration:
    """The pose, the exposure or both of a view whose camera is nearly known, from the pixels of `keep` (H, W) alone."""
    levels = _levels(over_white(image), keep, camera)
    return fit(_Rendering(field, grid, sampler), camera, levels[1:], pose=pose, exposure=exposure)


def over_white(image: NDArray[Any]) -> NDArray[np.float32]:
    """(H, W, 3) f32 in [0, 1] of an image (H, W, 3 or 4), u8 or f32, colour not multiplied by alpha."""
    plain: NDArray[np.float32] = image.astype(np.float32) / np.float32(255 if image.dtype == np.uint8 else 1)
    if plain.shape[-1] == 3:
        return plain
    return plain[..., :3] * plain[..., 3:] + 1 - plain[..., 3:]


# Pixels that are compared.


@dataclass(frozen=True, eq=False)
class _Level:
    xy: np.ndarray  # (N, 2) f32 px of the photograph
    rgb: np.ndarray  # (N, 3) f32
    step: float  # of differences: so far an image moves, in focal lengths


def _levels(rgb: NDArray[np.float32], keep: NDArray[np.bool_], camera: Cameras) -> list[_Level]:
    """Means over ever smaller blocks of pixels, all of which are kept, and at last some pixels."""
    height, width = rgb.shape[:2]
    focal = float(np.asarray(camera.focal_xy).mean())
    levels = []
    for side in SIDES:
        factor = max(1, min(height, width) // side)
        rows, columns = height // factor, width // factor
        blocks = lambda a, f=factor, r=rows, c=columns: a[: r * f, : c * f].reshape(r, f, c, f, -1)  # noqa: E731
        whole = blocks(keep).all(axis=(1, 3))[..., 0]
        y, x = np.indices((rows, columns)).astype(np.float32)
        xy = (np.stack([x, y], axis=-1) + 0.5) * factor
        levels.append(_Level(xy[whole], blocks(rgb).mean(axis=(1, 3))[whole], factor / focal))
    y, x = np.nonzero(keep)
    some = np.sort(np.random.default_rng(0).permutation(len(x))[:FINE_PIXELS])
    xy = np.stack([x, y], axis=-1)[some].astype(np.float32) + np.float32(0.5)
    return [*levels, _Level(xy, rgb[y[some], x[some]], 0.5 / focal)]


@functools.lru_cache(maxsize=8)
def _program(sampler: Sampler) -> Any:
    """Colours (RAYS, 3) of rays from poses (RAYS, 3, 4) through pixels (RAYS, 2) at log gains (RAYS, 3)."""
    # So few lanes that most of them are busy to the end.
    batching = replace(default_batching(), lanes=RAYS // 8)

    def colours(field: Field, grid: OccupancyGrid | None, camera: Cameras, *rows: jax.Array) -> jax.Array:
        c2w, xy, gain = rows
        many = jax.tree.map(lambda a: jnp.broadcast_to(a, (RAYS, *np.shape(a))), camera)
        rays, white = unproject(many.replace(c2w=c2w), xy), jnp.ones(3, jnp.float32)
        out, _ = render_chunk(field, rays, grid, white, sampler=sampler, batching=batching)
        return jnp.clip(exposed(out.rgb, out.opacity, white, gain), 0, 1)

    return jax.jit(colours, compiler_options=compiler_options())


_moved = jax.jit(moved)


@dataclass(frozen=True, eq=False)
class _Rendering:
    field: Field
    grid: OccupancyGrid | None
    sampler: Sampler

    def differences(self, camera: Cameras, c2w: np.ndarray, log_gain: np.ndarray, level: _Level) -> np.ndarray:
        """(B, N, 3): rendered minus photographed colours, from poses (B, 3, 4) at gains (B, 3) or (3,)."""
        shape = (len(c2w), len(level.xy))
        gain = np.broadcast_to(np.reshape(log_gain, (-1, 1, 3)), (*shape, 3))
        columns = (np.broadcast_to(c2w[:, None], (*shape, 3, 4)), np.broadcast_to(level.xy, (*shape, 2)), gain)
        rows = [np.asarray(a, np.float32).reshape(-1, *a.shape[2:]) for a in columns]
        count, program = len(rows[0]), _program(self.sampler)
        rows = [np.concatenate([a, np.repeat(a[-1:], -count % RAYS, axis=0)]) for a in rows]
        parts = [
            np.asarray(program(self.field, self.grid, camera, *(a[first : first + RAYS] for a in rows)))
            for first in range(0, count, RAYS)
        ]
        return np.concatenate(parts)[:count].reshape(*shape, 3).astype(np.float64) - level.rgb

    def costs(self, camera: Cameras, c2w: np.ndarray, log_gain: np.ndarray, level: _Level) -> np.ndarray:
        """(B,): the mean robust loss from poses (B, 3, 4)."""
        return _cost(self.differences(camera, c2w, log_gain, level))


def _cost(difference: np.ndarray) -> np.ndarray:
    """(B,): of differences (B, N, 3), squared where they are below NOISE, and not much more than linear above."""
    return np.mean(np.sqrt(1 + np.sum(difference**2, axis=-1) / NOISE**2) - 1, axis=-1)


def fit(
    rendering: _Rendering,
    camera: Cameras,
    levels: list[_Level],
    *,
    pose: bool,
    exposure: bool,
    log_gain: np.ndarray | None = None,
) -> Registration:
    """The pose, the exposure or both with the least robust difference on one level after the other."""
    basis = np.asarray(pose_basis(camera), np.float64)
    gain = np.zeros(3) if log_gain is None else log_gain
    for level in levels:
        camera, gain, information, difference = _fit_level(rendering, camera, gain, basis, level, pose, exposure)
    variance = float(np.sum(difference**2)) / max(difference.size - len(information), 1)
    covariance = np.zeros((6, 6))
    if pose:
        covariance = basis @ np.linalg.pinv(information, hermitian=True)[:6, :6] @ basis.T * variance
    return Registration(camera, gain, covariance, float(np.sqrt(np.mean(difference**2))))


def _fit_level(
    rendering: _Rendering,
    camera: Cameras,
    gain: np.ndarray,
    basis: np.ndarray,
    level: _Level,
    pose: bool,
    exposure: bool,
) -> tuple[Cameras, np.ndarray, np.ndarray, np.ndarray]:
    """The best camera and gain, J^T J of the numbers that were varied, and the differences (N, 3) there."""
    size, damping = 6 * pose + 3 * exposure, 1.0

    def at(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Poses (B, 3, 4) and gains (B, 3) of changes (B, size), as multiples of the basis."""
        twists = changes[:, :6] @ basis.T if pose else np.zeros((len(changes), 6))
        gains = gain + changes[:, 6 * pose :] if exposure else np.tile(gain, (len(changes), 1))
        return np.asarray(_moved(jnp.asarray(camera.c2w), jnp.asarray(twists, jnp.float32))), gains

    step = np.concatenate([np.full(6 * pose, level.step), np.full(3 * exposure, 0.05)])
    varied = np.concatenate([np.zeros((1, size)), np.diag(step), -np.diag(step)])
    for _ in range(ROUNDS):
        found = rendering.differences(camera, *at(varied), level)
        now, jacobian = found[0], (found[1 : size + 1] - found[size + 1 :]) / (2 * step[:, None, None])
        weight = 1 / np.sqrt(1 + np.sum(now**2, axis=-1, keepdims=True) / NOISE**2)
        rows = (jacobian * np.sqrt(weight)).reshape(size, -1)
        information, slope = rows @ rows.T, rows @ (now * np.sqrt(weight)).ravel()
        tried = np.array([damping * factor for factor in DAMPINGS])
        scale = np.diag(np.maximum(np.diag(information), 1e-12))
        changes = np.stack([-np.linalg.solve(information + t * scale, slope) for t in tried])
        poses, gains = at(changes)
        costs = _cost(rendering.differences(camera, poses, gains, level))
        best = int(np.argmin(costs))
        if costs[best] >= _cost(now[None])[0]:
            if damping > 1e3:
                break
            damping *= 100
            continue
        camera, gain, damping = camera.replace(c2w=poses[best]), gains[best], max(tried[best], 1e-6)  # type: ignore[attr-defined]
        if np.all(np.abs(changes[best]) < 0.02 * step):
            break
    return camera, gain, information, now


def left_half(height: int, width: int) -> NDArray[np.bool_]:
    """(H, W): the left half of an image, on which a held-out view is fitted; the right half is scored."""
    return np.broadcast_to(np.arange(width) < width // 2, (height, width))
