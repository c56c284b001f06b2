"""Corners of small images, and which of them look alike: enough to say whether cameras fit their pictures.

Corners are where the structure tensor has two large eigenvalues (Shi and Tomasi 1994), described by histograms of
gradients over 4 x 4 places around them, turned upright by the strongest gradient (Lowe 2004, in the dense form of
DAISY, Tola et al. 2010). Numpy alone: there are a few hundred corners an image, and no model is fitted to matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_CORNERS = 300  # an image, at most
STRONGEST = 100  # of them, by which images are compared with all others
_PARTS = 8  # along each axis: of an image, whose corners are taken in turn
_DIRECTIONS = 8  # bins of a histogram of gradients
_BORDER = 6  # px
_RATIO = 0.8  # of the squared distance to the best match to that of the second best, at most
_ALIKE = 0.9  # product of two descriptors that may be the same corner, when images are compared


@dataclass(frozen=True, eq=False)
class Features:
    """The corners of one image, the strongest first."""

    xy: np.ndarray  # (K, 2) f32, pixel coordinates
    descriptor: np.ndarray  # (K, 128) f32 of unit length


def find_features(grey: np.ndarray, visible: np.ndarray | None = None) -> Features:
    """The corners of an image (H, W) f32 in [0, 1]; none where `visible` (H, W) bool is False nearby."""
    gy, gx = np.zeros_like(grey), np.zeros_like(grey)
    gx[:, 1:-1] = 0.5 * (grey[:, 2:] - grey[:, :-2])
    gy[1:-1] = 0.5 * (grey[2:] - grey[:-2])
    xx, yy, xy = (blurred(product, 1.5) for product in (gx * gx, gy * gy, gx * gy))
    strength = 0.5 * (xx + yy) - np.sqrt(0.25 * (xx - yy) ** 2 + xy**2)
    peak = (strength >= _largest_around(strength, 3)) & (strength > 1e-5)
    if visible is not None:
        peak &= ~_largest_around(~visible, 3)
    peak[:_BORDER] = peak[-_BORDER:] = False
    peak[:, :_BORDER] = peak[:, -_BORDER:] = False
    rows, columns = np.nonzero(peak)
    # The best of each part of the image come first, so that one busy corner does not take them all.
    part = (rows * _PARTS // grey.shape[0]) * _PARTS + columns * _PARTS // grey.shape[1]
    order = np.lexsort((-strength[rows, columns], part))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(part[order], part[order])
    chosen = np.lexsort((-strength[rows, columns], rank))[:NUM_CORNERS]
    rows, columns = rows[chosen], columns[chosen]
    place = np.stack([columns, rows], axis=1) + _peak_offset(strength, rows, columns)
    descriptor = _describe(blurred(grey, 2.5), blurred(gx, 1.0), blurred(gy, 1.0), place)
    return Features((place + 0.5).astype(np.float32), descriptor)


def likely_pairs(features: Sequence[Features], partners: int) -> list[tuple[int, int]]:
    """Pairs of images that seem to show the same: of each, those `partners` others with the most corners alike."""
    strongest = np.zeros((len(features), STRONGEST, 16 * _DIRECTIONS), np.float32)
    for row, found in zip(strongest, features, strict=True):
        row[: min(len(found.xy), STRONGEST)] = found.descriptor[:STRONGEST]
    pairs: set[tuple[int, int]] = set()
    for i, own in enumerate(strongest):
        # As one product: of a stack of small ones BLAS would make one each, and wait for its threads in every one.
        alike = (strongest.reshape(-1, own.shape[1]) @ own.T).reshape(len(features), STRONGEST, STRONGEST)
        alike[i] = 0
        best = alike.max(axis=1, keepdims=True)  # alike: (images, theirs, ours)
        mutual = (alike >= best) & (alike >= alike.max(axis=2, keepdims=True)) & (alike > _ALIKE)
        counts = mutual.sum(axis=(1, 2))
        pairs |= {(min(i, j), max(i, j)) for j in np.argsort(-counts, kind="stable")[:partners].tolist() if counts[j]}
    return sorted(pairs)


def match(first: Features, second: Features) -> np.ndarray:
    """Pairs (M, 2) of numbers of corners, each the other's best match and clearly better than the next one."""
    if min(len(first.xy), len(second.xy)) < 2:
        return np.zeros((0, 2), np.int64)
    alike = first.descriptor @ second.descriptor.T
    forth, back = np.argmax(alike, axis=1), np.argmax(alike, axis=0)
    rows = np.arange(len(forth))
    best = alike[rows, forth]
    alike[rows, forth] = -1
    clear = 2 - 2 * best < _RATIO * (2 - 2 * np.max(alike, axis=1))
    kept = np.flatnonzero((back[forth] == rows) & clear)
    return np.stack([kept, forth[kept]], axis=1)


def _peak_offset(strength: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """From a pixel (K,) to the peak of the parabola through it and its neighbours (K, 2), within half a pixel."""
    here, offset = strength[rows, columns], []
    for dy, dx in ((0, 1), (1, 0)):
        after, before = strength[rows + dy, columns + dx], strength[rows - dy, columns - dx]
        bend = np.minimum(after + before - 2 * here, -1e-12)
        offset.append(np.clip(0.5 * (before - after) / bend, -0.5, 0.5))
    return np.stack(offset, axis=1)


def _describe(smooth: np.ndarray, gx: np.ndarray, gy: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Descriptors (K, 128) f32 of unit length, at places (K, 2); smooth: the image, blurred, which says what is up."""
    x, y = np.rint(place).astype(np.int64).T
    along, down = smooth[y, x + 1] - smooth[y, x - 1], smooth[y + 1, x] - smooth[y - 1, x]
    size = np.maximum(np.hypot(along, down), 1e-9)
    cosine, sine = (along / size)[:, None], (down / size)[:, None]
    at_x = np.rint(place[:, :1] + cosine * _ACROSS - sine * _DOWN).astype(np.int32)
    at_y = np.rint(place[:, 1:] + sine * _ACROSS + cosine * _DOWN).astype(np.int32)
    inside = (at_x >= 0) & (at_x < gx.shape[1]) & (at_y >= 0) & (at_y < gx.shape[0])
    number = np.where(inside, at_y * gx.shape[1] + at_x, 0)
    dx, dy = gx.ravel()[number] * inside, gy.ravel()[number] * inside
    # Gradients in the axes of the corner, and how much of each points into each direction.
    across, down = cosine * dx + sine * dy, cosine * dy - sine * dx
    parts = np.maximum(across[..., None] * _BINS[0] + down[..., None] * _BINS[1], 0)
    parts *= parts  # sharper than the cosine
    strength = np.maximum(np.hypot(across, down), 1e-9)
    found = np.matmul(_CELLS, parts / strength[..., None]).reshape(len(place), 16 * _DIRECTIONS)
    for limit in (0.25, 1.0):
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
        found = np.minimum(found, limit)
    return found


_REACH = np.arange(-7, 8, 2, dtype=np.float32)  # px from a corner at which gradients are looked at, along each axis
_ACROSS, _DOWN = (a.ravel() for a in np.meshgrid(_REACH, _REACH))
_BINS = np.stack([f(np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS)) for f in (np.cos, np.sin)]).astype(np.float32)


_MIDDLES = np.array([-6, -2, 2, 6], np.float32)  # px, of the cells of a histogram, along each axis


def _cells() -> np.ndarray:
    """(16, 64) f32: by how much each place counts for each of 4 x 4 cells, which overlap."""
    near = np.maximum(1 - np.abs(_REACH - _MIDDLES[:, None]) / 5, 0)
    return np.einsum("ay,bx->abyx", near, near).reshape(16, -1).astype(np.float32)


_CELLS = _cells()


# Images.


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """An image (H, W, ...) f32 through a Gaussian, its border repeated."""
    radius = max(1, round(2 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(0, 0)] * image.ndim
        padding[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(image, padding, mode="edge"), axis, 0)
        n = image.shape[axis]
        total = weights[radius] * padded[radius : radius + n]
        for i in range(radius):  # symmetric: half the products
            total += weights[i] * (padded[i : i + n] + padded[2 * radius - i : 2 * radius - i + n])
        image = np.moveaxis(total, 0, axis)
    return image


def _largest_around(image: np.ndarray, radius: int) -> np.ndarray:
    """The maximum over a square about each pixel."""
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        first, *others = (
            padded[i : i + len(image)] if axis == 0 else padded[:, i : i + image.shape[1]]
            for i in range(2 * radius + 1)
        )
        image = first.copy()
        for other in others:
            np.maximum(image, other, out=image)
    return image
