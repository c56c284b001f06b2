"""The cameras of the built-in scene, and the files of its pictures."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image
from tqdm import tqdm

from jaxngp.cameras import Cameras, look_at, make_cameras, project, unproject
from jaxngp.data.bricks.casting import Toy, baked_toy, plain_jax
from jaxngp.data.bricks.shading import surface

CAMERA_ANGLE_X = 0.6911112070083618  # radians, horizontal field of view of NeRF-synthetic
CAMERA_RADIUS = 4.031128874149275  # world units, as in NeRF-synthetic
NUM_VIEWS = {"train": 100, "val": 20, "test": 40}
TILE = 10  # pixels per side of the packets of rays that share their candidates; an odd number of rays is 4x slower
SUBSAMPLES = 3  # per pixel and axis


def bricks_cameras(split: str) -> np.ndarray:
    """c2w (V, 3, 4) f32 of a split, OpenGL axes, world units: on the upper hemisphere, looking at the origin.

    train and val are two stretches of one low-discrepancy sequence; test is an orbit that rises and falls.
    """
    count = NUM_VIEWS[split]
    if split == "test":
        turn: np.ndarray = np.arange(count) / count
        height = np.sin(np.radians(32 + 20 * np.sin(4 * np.pi * turn)))
    else:
        first = {"train": 1, "val": 1 + NUM_VIEWS["train"]}[split]
        index = first + np.arange(count)
        turn, height = index * 0.7548776662466927 % 1, 0.01 + 0.98 * (index * 0.5698402909980532 % 1)
    angle, flat = 2 * np.pi * turn, np.sqrt(1 - height**2)
    directions = np.stack([flat * np.cos(angle), flat * np.sin(angle), height], axis=-1)
    return np.stack([_pose(CAMERA_RADIUS * direction) for direction in directions])


def _pose(position: np.ndarray) -> np.ndarray:
    """c2w (3, 4) f32 of a camera that looks at the origin; up is the world's z, or y where it looks along z."""
    steep = abs(position[2]) > 0.9999 * np.linalg.norm(position)
    return look_at(position, np.zeros(3), (0.0, 1.0, 0.0) if steep else (0.0, 0.0, 1.0))


def make_camera(c2w: np.ndarray, image_size: int) -> Cameras:
    """The cameras (...) of poses (..., 3, 4)."""
    focal = 0.5 * image_size / np.tan(0.5 * CAMERA_ANGLE_X)
    return make_cameras(c2w, focal_xy=focal, centre_xy=0.5 * image_size, width=image_size, height=image_size)


@functools.partial(jax.jit, static_argnames="image_size")
def _render_view(toy: Toy, camera: Cameras, *, image_size: int) -> jax.Array:
    """One picture (H, W, 4) u8 with straight alpha, tile by tile."""
    corner_xy, _ = project(camera, jnp.asarray(toy.corners))
    part_low, part_high = corner_xy.min(axis=1), corner_xy.max(axis=1)
    tiles = -(-image_size // TILE)
    step = (np.arange(TILE * SUBSAMPLES) + 0.5) / SUBSAMPLES
    grid = np.stack(np.meshgrid(step, step), axis=-1).reshape(-1, 2).astype(np.float32)

    def render(low: jax.Array, near: jax.Array) -> jax.Array:
        rays = unproject(camera, low + grid)
        rgb, alpha, _, _ = surface(toy, near, rays.origin.T, rays.direction.T)
        samples = jnp.concatenate([rgb * alpha, alpha[None]]).reshape(4, TILE, SUBSAMPLES, TILE, SUBSAMPLES)
        return samples.mean(axis=(2, 4))

    def tile(index: jax.Array) -> jax.Array:
        low = TILE * jnp.stack([index % tiles, index // tiles]).astype(jnp.float32)
        near = jnp.all((part_high >= low) & (part_low <= low + TILE), axis=-1)
        return lax.cond(near.any(), render, lambda *_: jnp.zeros((4, TILE, TILE)), low, near)

    pictures = lax.map(tile, jnp.arange(tiles * tiles)).reshape(tiles, tiles, 4, TILE, TILE)
    image = pictures.transpose(0, 3, 1, 4, 2).reshape(tiles * TILE, tiles * TILE, 4)[:image_size, :image_size]
    rgb = image[..., :3] / jnp.maximum(image[..., 3:], 1e-6)
    return jnp.round(255 * jnp.clip(jnp.concatenate([rgb, image[..., 3:]], axis=-1), 0, 1)).astype(jnp.uint8)


def write_scene(folder: pathlib.Path, image_size: int, *, progress: bool = True) -> None:
    """Renders all splits into `folder` in Blender format; `folder` appears only when it is complete.

    Pictures are RGBA PNGs of image_size x image_size, sRGB with straight alpha. Raises FileExistsError where `folder`
    is there already; one that another process finishes meanwhile is kept, for it holds the same.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it to render the scene again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pictures = _write_poses(unfinished)
        _write_pictures(pictures, image_size, progress=progress)
        unfinished.chmod(0o755)  # mkdtemp's is private
        if not folder.exists():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_poses(folder: pathlib.Path) -> list[tuple[pathlib.Path, np.ndarray]]:
    """Writes transforms_{split}.json; returns the path and pose of each picture that they name."""
    pictures = []
    for split in NUM_VIEWS:
        (folder / split).mkdir()
        frames = []
        for i, c2w in enumerate(bricks_cameras(split)):
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": [*c2w.tolist(), [0.0, 0.0, 0.0, 1.0]]})
            pictures.append((folder / split / f"r_{i}.png", c2w))
        transforms = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(transforms, indent=2) + "\n")
    return pictures


def _write_pictures(pictures: list[tuple[pathlib.Path, np.ndarray]], image_size: int, *, progress: bool) -> None:
    """Renders each (path, c2w), one thread per core: a view is a chain of small loops that XLA runs on one core."""
    with plain_jax():
        toy = jax.tree.map(jnp.asarray, baked_toy())
        render = _render_view.lower(toy, make_camera(pictures[0][1], image_size), image_size=image_size).compile()

    def write(picture: tuple[pathlib.Path, np.ndarray]) -> None:
        with plain_jax():  # holds for one thread only
            _write_picture(picture[0], np.asarray(render(toy, make_camera(picture[1], image_size))))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for _ in tqdm(pool.map(write, pictures), total=len(pictures), desc="rendering bricks", disable=not progress):
            pass


def _write_picture(path: pathlib.Path, rgba: np.ndarray) -> None:
    Image.fromarray(rgba).save(path)
