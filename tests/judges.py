"""Renderers of exported files, in numpy and far from the package's own: triangles by z-buffer, splats by EWA."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxngp.cameras import Cameras, image_size


def to_camera(camera: Cameras, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (N, 2) and depths (N,) of points (N, 3) that a pinhole sees."""
    c2w = np.asarray(camera.c2w, np.float64)
    local = (points - c2w[:, 3]) @ c2w[:, :3]
    depth = -local[:, 2]
    xy = local[:, :2] * [1, -1] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[:, None]
    return xy * np.asarray(camera.focal_xy, np.float64) + np.asarray(camera.centre_xy, np.float64), depth


def rasterise(
    camera: Cameras, vertices: np.ndarray, faces: np.ndarray, oversample: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """What each pixel sees: the face (H, W), -1 for none, and perspective-correct barycentric coordinates (H, W, 3)."""
    width, height = (oversample * n for n in image_size(camera))
    xy, depth = to_camera(camera, vertices)
    corner, z = oversample * xy[faces], depth[faces]  # (F, 3, 2), (F, 3)
    (ax, ay), (bx, by), (cx, cy) = (corner[:, j].T for j in range(3))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    low = np.ceil(corner.min(axis=1) - 0.5).astype(int).clip(0, [width, height])
    high = np.floor(corner.max(axis=1) - 0.5).astype(int).clip(-1, [width - 1, height - 1])
    span = np.where((z > 1e-6).all(axis=1)[:, None] & (np.abs(area) > 1e-12)[:, None], high - low + 1, 0).clip(0)
    count = span.prod(axis=1)
    face = np.repeat(np.arange(len(faces)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    x, y = low[face, 0] + within % span[face, 0], low[face, 1] + within // span[face, 0]
    px, py = x + 0.5, y + 0.5
    flat = np.stack([
        ((bx[face] - px) * (cy[face] - py) - (by[face] - py) * (cx[face] - px)) / area[face],
        ((cx[face] - px) * (ay[face] - py) - (cy[face] - py) * (ax[face] - px)) / area[face],
        ((ax[face] - px) * (by[face] - py) - (ay[face] - py) * (bx[face] - px)) / area[face],
    ], axis=1)  # fmt: skip
    inside = (flat >= 0).all(axis=1)
    flat, face, number = flat[inside], face[inside], (x + width * y)[inside]
    share = flat / z[face]
    inverse = share.sum(axis=1)
    first = np.lexsort([-inverse, number])
    number, where = np.unique(number[first], return_index=True)
    best = first[where]
    seen, weights = np.full(width * height, -1), np.zeros((width * height, 3))
    seen[number], weights[number] = face[best], share[best] / inverse[best, None]
    return seen.reshape(height, width), weights.reshape(height, width, 3)


def averaged(image: np.ndarray, oversample: int) -> np.ndarray:
    """An image (H k, W k, C) shrunk by k with a box filter."""
    height, width = (n // oversample for n in image.shape[:2])
    return image.reshape(height, oversample, width, oversample, -1).mean(axis=(1, 3))


def picture(
    camera: Cameras, vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, oversample: int = 3
) -> np.ndarray:
    """The view (H, W, 3) of triangles with vertex colours (V, 3), on white."""
    face, weights = rasterise(camera, vertices, faces, oversample)
    seen = np.einsum("hwj,hwjc->hwc", weights, colours[faces[face]])
    return averaged(np.where((face >= 0)[..., None], seen, 1.0), oversample)


def textured_picture(
    camera: Cameras,
    vertices: np.ndarray,
    faces: np.ndarray,
    uv: np.ndarray,
    texture: np.ndarray,
    oversample: int = 3,
) -> np.ndarray:
    """The view of triangles with uv (V, 2), whose origin is the upper left of a texture (S, S, 3); bilinear."""
    face, weights = rasterise(camera, vertices, faces, oversample)
    place = np.einsum("hwj,hwjc->hwc", weights, uv[faces[face]]) * [texture.shape[1], texture.shape[0]] - 0.5
    cell = np.floor(place).astype(int)
    far, seen = place - cell, np.zeros((*face.shape, 3))
    for dx, dy in np.ndindex(2, 2):
        x, y = (np.clip(cell[..., 0] + dx, 0, texture.shape[1] - 1), np.clip(cell[..., 1] + dy, 0, len(texture) - 1))
        weight = np.where(dx, far[..., 0], 1 - far[..., 0]) * np.where(dy, far[..., 1], 1 - far[..., 1])
        seen += weight[..., None] * texture[y, x]
    return averaged(np.where((face >= 0)[..., None], seen, 1.0), oversample)


def decibels(prediction: np.ndarray, truth: np.ndarray) -> float:
    """PSNR of images in [0, 1]."""
    return float(-10 * np.log10(np.mean((np.clip(prediction, 0, 1) - truth) ** 2)))


def read_glb(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The JSON of a glTF binary, and its accessors as arrays (N, K); normalised integers in [0, 1]."""
    content = path.read_bytes()
    magic, version, length, size = struct.unpack_from("<4sIII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))
    described, binary = json.loads(content[20 : 20 + size]), content[28 + size :]
    arrays = []
    for accessor in described["accessors"]:
        view = described["bufferViews"][accessor["bufferView"]]
        dtype = np.dtype({5121: "u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}[accessor["componentType"]])
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        flat = np.frombuffer(binary, dtype, accessor["count"] * width, view["byteOffset"]).reshape(-1, width)
        arrays.append(flat / np.iinfo(dtype).max if accessor.get("normalized") else flat)
    return described, arrays


def splat_picture(
    camera: Cameras,
    position: np.ndarray,
    scale: np.ndarray,
    rotation: np.ndarray,
    opacity: np.ndarray,
    colours: np.ndarray,
) -> np.ndarray:
    """The view (H, W, 3), on white, of Gaussians as 3DGS draws them: EWA projection, sorted by depth, composited.

    position and scale (N, 3), rotation (N, 3, 3), opacity (N,), colours (N, 3) towards this camera.
    """
    width, height = image_size(camera)
    c2w, focal = np.asarray(camera.c2w, np.float64), np.asarray(camera.focal_xy, np.float64)
    xy, depth = to_camera(camera, position)
    order = np.argsort(depth)
    order = order[depth[order] > 0.05]
    xy, z, local = xy[order], depth[order], (position[order] - c2w[:, 3]) @ c2w[:, :3]
    zero = np.zeros_like(z)
    jacobian = np.stack(
        [
            np.stack([focal[0] / z, zero, focal[0] * local[:, 0] / z**2], axis=1),
            np.stack([zero, -focal[1] / z, -focal[1] * local[:, 1] / z**2], axis=1),
        ],
        axis=1,
    )
    spread = jacobian @ c2w[:, :3].T @ rotation[order] * scale[order][:, None]
    cov = spread @ np.swapaxes(spread, 1, 2) + 0.3 * np.eye(2)  # 3DGS's low-pass filter, px^2
    inverse = np.linalg.inv(cov)
    reach = 3 * np.sqrt(np.stack([cov[:, 0, 0], cov[:, 1, 1]], axis=1))
    low = np.ceil(xy - reach - 0.5).astype(int).clip(0, [width, height])
    high = np.floor(xy + reach - 0.5).astype(int).clip(-1, [width - 1, height - 1])
    span = (high - low + 1).clip(0)
    count = span.prod(axis=1)
    splat = np.repeat(np.arange(len(order)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    x, y = low[splat, 0] + within % span[splat, 0], low[splat, 1] + within // span[splat, 0]
    offset = np.stack([x, y], axis=1) + 0.5 - xy[splat]
    square = np.einsum("ni,nij,nj->n", offset, inverse[splat], offset)
    alpha = np.minimum(opacity[order][splat] * np.exp(-0.5 * square), 0.99)
    kept = (alpha >= 1 / 255) & (square <= 9)
    pixel, splat, alpha = (x + width * y)[kept], splat[kept], alpha[kept]
    near = np.argsort(pixel, kind="stable")  # those of a pixel together, the nearest first
    pixel, splat, alpha = pixel[near], splat[near], alpha[near]
    logs = np.log1p(-alpha)
    before = np.cumsum(logs) - logs
    first = np.flatnonzero(np.diff(pixel, prepend=-1))
    before -= np.repeat(before[first], np.diff(np.append(first, len(pixel))))
    weight = alpha * np.exp(before)
    seen = [np.bincount(pixel, weight * c, width * height) for c in colours[order][splat].T]
    total = np.bincount(pixel, weight, width * height)
    return (np.stack(seen, axis=1) + (1 - total)[:, None]).reshape(height, width, 3)
