"""Render novel views of a trained run: an orbit around the scene, or the poses of a split.

Writes PNGs, depth PNGs and an animation into a folder of the workdir.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxngp import flags
from jaxngp.cameras import Camera, PosedImages, orbit_poses, resize_camera, view_rays
from jaxngp.config import InputError, NerfConfig
from jaxngp.data import load_evaluation
from jaxngp.training.checkpoints import Checkpoints
from jaxngp.training.evaluation import EvalBackground, render_view
from jaxngp.training.progress import bar_interval
from jaxngp.training.report import depth_image, to_uint8, write_animation, write_png
from jaxngp.training.state import TrainState


def main(values: flags.Flags) -> None:
    workdir, config = flags.trained_config(values)
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore_trained(config).state
    camera, poses = camera_path(config, values.path, values.frames)
    if values.width or values.height:
        width = values.width or round(values.height * camera.width / camera.height)
        height = values.height or round(values.width * camera.height / camera.width)
        camera = resize_camera(camera, width, height)
    folder = workdir / "renders" / values.path
    shutil.rmtree(folder, ignore_errors=True)
    frames = write_frames(state, camera, poses, folder, config=config, background=values.background)
    animation = folder / f"{values.path}.{values.animation}"
    write_animation(animation, frames, values.fps)
    print(f"{len(frames)} frames of {camera.width}x{camera.height}: {animation}")


def camera_path(config: NerfConfig, path: str, num_frames: int) -> tuple[Camera, np.ndarray]:
    """The camera and poses (V, 3, 4) in scene units of an orbit, or of a split."""
    split = "auto" if path == "orbit" else path
    views = load_evaluation(config.scene, split)
    if not isinstance(views.images, PosedImages):
        raise InputError("a ray table has no camera: render it with python -m jaxngp.evaluate instead")
    poses = np.asarray(views.images.c2w)
    if path == "orbit":
        return views.images.camera, orbit_poses(poses, num_frames or 60)
    if num_frames > len(poses):
        raise InputError(f"--frames = {num_frames}: the {path} split has {len(poses)} poses")
    chosen = np.linspace(0, len(poses) - 1, num_frames or len(poses)).round().astype(int)
    return views.images.camera, poses[chosen]


def write_frames(
    state: TrainState,
    camera: Camera,
    poses: np.ndarray,
    folder: Path,
    *,
    config: NerfConfig,
    background: EvalBackground,
) -> list[np.ndarray]:
    """Render each pose, write its PNG and its depth PNG, and return the frames (H, W, 3) u8."""
    frames = []
    distance = float(np.median(np.linalg.norm(poses[:, :, 3] - 0.5, axis=1)))
    near_far = (max(distance - 0.5, 0.0), distance + 0.5)  # one for all frames, or the depth would flicker
    for index, c2w in enumerate(tqdm(poses, desc="rendering", unit="frame", mininterval=bar_interval())):
        rays = jax.jit(view_rays)(camera, jnp.asarray(c2w))
        out = render_view(state, rays, config=config, background=background)
        frames.append(to_uint8(out.rgb))
        write_png(folder / f"frame_{index:04d}.png", frames[-1])
        write_png(folder / f"depth_{index:04d}.png", depth_image(out.depth, out.opacity, near_far))
    return frames


if __name__ == "__main__":
    flags.run("jaxngp.render", flags.define_render_flags, main, __doc__)
