"""Photographs of a room with a box and a ball in it, all of them covered with noise, from cameras that are known."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
from dialects import Scene

ROOM = np.array([[-4.0, -4.0, -1.0], [4.0, 4.0, 3.0]])
BOX = np.array([[-0.7, -0.5, -1.0], [0.5, 0.6, 0.2]])
WIDTH, HEIGHT, FOCAL = 240, 180, 192.0  # px
BALL, RADIUS = np.array([0.1, 0.1, 0.45]), 0.5


@functools.cache
def room(lens: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0), num_views: int = 20) -> Scene:
    """The scene, seen from around: cameras in world units, z up, looking a little past the origin."""
    rng = np.random.default_rng(1)
    turn = np.linspace(0, 1.6 * np.pi, num_views) + rng.uniform(-0.1, 0.1, num_views)
    away, up = rng.uniform(2.3, 2.9, num_views), rng.uniform(0.2, 1.6, num_views)
    position = np.stack([away * np.cos(turn), away * np.sin(turn), up], axis=1)
    return photographed(position, rng.uniform(-0.3, 0.3, (num_views, 3)), lens)


def photographed(position: np.ndarray, target: np.ndarray, lens: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)) -> Scene:
    """The room from positions (V, 3), looking at targets (V, 3)."""
    backward = (position - target) / np.linalg.norm(position - target, axis=1, keepdims=True)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    c2w = np.stack([right, np.cross(backward, right), backward, position], axis=-1)
    sizes = np.tile([WIDTH, HEIGHT], (len(c2w), 1))
    scene = Scene(c2w, np.full((len(c2w), 2), FOCAL), sizes / 2.0, sizes, [], np.zeros((0, 3)), *lens)
    images, points = [], []
    for view in range(len(c2w)):
        image, depth, _ = photograph(scene, view)
        origin, direction = view_rays(scene, view)
        images.append(image)
        points.append((origin + direction * depth[..., None])[::24, ::24].reshape(-1, 3))
    return replace(scene, images=images, points=np.concatenate(points))


def view_rays(scene: Scene, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and directions (H, W, 3), of depth 1 along the axis, of a view's pixels."""
    width, height = scene.sizes[view].tolist()
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    u, v = ((p - c) / f for p, c, f in zip((x, y), scene.centre[view], scene.focal[view], strict=True))
    a, b = u, v
    for _ in range(20):
        square = a * a + b * b
        radial = 1 + scene.k1 * square + scene.k2 * square**2
        a = (u - 2 * scene.p1 * a * b - scene.p2 * (square + 2 * a * a)) / radial
        b = (v - scene.p1 * (square + 2 * b * b) - 2 * scene.p2 * a * b) / radial
    return scene.c2w[view, :, 3], np.stack([a, -b, -np.ones_like(a)], axis=-1) @ scene.c2w[view, :, :3].T


def photograph(scene: Scene, view: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours (H, W, 3) u8, depths (H, W) along the axis, and where the box or the ball is (H, W)."""
    origin, direction = view_rays(scene, view)
    with np.errstate(divide="ignore", invalid="ignore"):
        _, wall = _slab(ROOM, origin, direction)
        near, far = _slab(BOX, origin, direction)
    box = np.where((near < far) & (near > 0), near, np.inf)
    middle, square = direction @ (BALL - origin), np.sum(direction**2, axis=-1)
    root = middle**2 - square * (np.sum((BALL - origin) ** 2) - RADIUS**2)
    ball = np.where(root > 0, (middle - np.sqrt(np.maximum(root, 0))) / square, np.inf)
    depth = np.minimum(np.minimum(box, ball), wall)
    colour = _noise(origin + direction * depth[..., None], np.where(depth == wall, 1.0, 2.0))
    return np.round(255 * colour).astype(np.uint8), depth, depth < wall


def _slab(corners: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = (corners[0] - origin) / direction, (corners[1] - origin) / direction
    return np.minimum(first, second).max(axis=-1), np.maximum(first, second).min(axis=-1)


_TABLE = np.random.default_rng(2).uniform(size=(16, 16, 16, 3)).astype(np.float32)


def _noise(point: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Colours (..., 3) in [0, 1] of points: three octaves of trilinear noise."""
    total = np.zeros(point.shape, np.float32)
    for frequency, weight in ((1.7, 0.3), (3.9, 0.4), (8.3, 0.3)):
        at = (point * (frequency * scale)[..., None]).astype(np.float32) + 31.7
        low = np.floor(at)
        share = at - low
        index = low.astype(np.int64) % 16
        for corner in np.ndindex(2, 2, 2):
            weights = np.prod(np.where(corner, share, 1 - share), axis=-1)
            x, y, z = np.moveaxis((index + corner) % 16, -1, 0)
            total += weight * weights[..., None] * _TABLE[x, y, z]
    return np.clip(1.6 * (total - 0.5) + 0.5, 0.02, 0.98)
