"""Render novel views of a trained run along a path: an orbit around the scene, a spiral among the cameras, a flight
through them, or the poses of a split.

Writes PNGs, depth PNGs and an animation into a folder of the workdir.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxngp import flags
from jaxngp.cameras import (
    Cameras,
    PosedImages,
    image_size,
    interpolate_poses,
    orbit_poses,
    resize_cameras,
    spiral_poses,
    surrounded,
)
from jaxngp.config import InputError, SceneConfig
from jaxngp.console import bar_interval
from jaxngp.data import load_evaluation
from jaxngp.evaluation import EvalBackground
from jaxngp.pictures import depth_image, to_uint8, write_animation, write_png
from jaxngp.runs import Run


def main(values: flags.Flags) -> None:
    run, config = flags.trained_nerf(values)
    path = automatic_path(run) if values.path == "auto" else values.path
    cameras = camera_path(run, config.scene, path, values.frames)
    width, height = image_size(cameras[0])
    if values.width or values.height:
        new_width = values.width or round(values.height * width / height)
        height, width = values.height or round(values.width * height / width), new_width
        cameras = resize_cameras(cameras, width, height)
    folder = run.workdir / "renders" / path
    shutil.rmtree(folder, ignore_errors=True)
    frames = write_frames(run, cameras, folder, background=values.background)
    animation = folder / f"{path}.{values.animation}"
    write_animation(animation, frames, values.fps)
    print(f"{len(frames)} frames of {width}x{height}: {animation}")


PATHS = {"orbit": orbit_poses, "spiral": spiral_poses, "interpolate": interpolate_poses}


def automatic_path(run: Run) -> str:
    """A spiral, which stays where the cameras were, for surroundings not seen from all sides, else an orbit."""
    alone = run.occupancy is None or run.occupancy.cells.num_cascades == 1
    return "orbit" if alone or run.cameras is None or surrounded(np.asarray(run.cameras.c2w)) else "spiral"


def camera_path(run: Run, scene: SceneConfig, path: str, num_frames: int) -> Cameras:
    """The cameras of one of PATHS, which follows from the training views, or of a split."""
    if path in PATHS:
        if run.cameras is None:
            raise InputError("a ray table has no camera: render it with python -m jaxngp.evaluate instead")
        poses = PATHS[path](np.asarray(run.cameras.c2w), num_frames or 60)
        first = run.cameras[np.zeros(len(poses), np.int64)]
        return first.replace(c2w=poses)  # type: ignore[attr-defined]
    views = load_evaluation(scene, path)
    if not isinstance(views.images, PosedImages):
        raise InputError("a ray table has no camera: render it with python -m jaxngp.evaluate instead")
    if num_frames > views.num_views:
        raise InputError(f"--frames = {num_frames}: the {path} split has {views.num_views} poses")
    count = num_frames or views.num_views
    return views.images.cameras[np.linspace(0, views.num_views - 1, count).round().astype(int)]


def write_frames(run: Run, cameras: Cameras, folder: Path, *, background: EvalBackground) -> list[np.ndarray]:
    """Render each camera, write its PNG and its depth PNG, and return the frames (H, W, 3) u8."""
    frames = []
    distance = float(np.median(np.linalg.norm(np.asarray(cameras.c2w)[:, :, 3] - 0.5, axis=1)))
    near_far = (max(distance - 0.5, 0.0), distance + 0.5)  # one for all frames, or the depth would flicker
    for index in tqdm(range(len(cameras)), desc="rendering", unit="frame", mininterval=bar_interval()):
        out = run.render(cameras[index], background=background)
        frames.append(to_uint8(out.rgb))
        write_png(folder / f"frame_{index:04d}.png", frames[-1])
        write_png(folder / f"depth_{index:04d}.png", depth_image(out.depth, out.opacity, near_far))
    return frames


if __name__ == "__main__":
    flags.run("jaxngp.render", flags.define_render_flags, main, __doc__)
