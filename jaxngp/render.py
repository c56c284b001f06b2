"""Render novel views of a trained run along a path: an orbit around the scene, a spiral among the cameras, a flight
through them, the poses of a split, or a camera path of nerfstudio, instant-ngp or the viewer.

Writes the frames, what --layers asks for, and an animation or a video into a folder of the workdir.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxngp import flags, processes
from jaxngp.cameras import (
    Cameras,
    PosedImages,
    image_size,
    interpolate_poses,
    orbit_poses,
    resize_cameras,
    spiral_poses,
    surrounded,
    view_rays,
)
from jaxngp.config import InputError, NerfConfig, SceneConfig, shown
from jaxngp.console import bar_interval, warn
from jaxngp.data import load_evaluation
from jaxngp.data.flights import read_flight
from jaxngp.data.places import reference_frames
from jaxngp.evaluation import COLOURS
from jaxngp.filming import DEPTH_STEPS, depth_along_axis, depth_step, film, straight_alpha, surface_normals
from jaxngp.pictures import Image8, can_write_video, depth_image, to_uint8, write_animation, write_png, write_video
from jaxngp.records import write_json
from jaxngp.runs import Run

PATHS = {"orbit": orbit_poses, "spiral": spiral_poses, "interpolate": interpolate_poses}
SPLITS = ("train", "val", "test", "held-out")
LAYERS = flags.RENDER_LAYERS


@dataclass(frozen=True)
class Shots:
    """The frames to render, in scene units."""

    name: str  # of the folder
    cameras: Cameras  # (N,)
    aperture: np.ndarray  # (N,) radius of the lens
    focus: np.ndarray  # (N,) distance of what is sharp; 0: what is in the middle of the frame
    fps: float


def main(values: flags.Flags) -> None:
    run, config = flags.trained_nerf(values)
    layers = chosen_layers(values)
    shots = resized(chosen_shots(run, config, values), values.width, values.height)
    suffix = chosen_suffix(values.animation, shots.fps)
    folder = run.workdir / "renders" / shots.name
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait_for_all("the folder of frames is empty")
    frames = write_frames(run, shots, folder, layers, values)
    width, height = image_size(shots.cameras[0])
    said = f"{len(shots.cameras)} frames of {width}x{height}"
    if not processes.is_first():
        for _ in frames:
            pass
        return
    if suffix == ".mp4":
        write_video(folder / f"{shots.name}.mp4", frames, shots.fps)
    elif suffix:
        write_animation(folder / f"{shots.name}{suffix}", list(frames), shots.fps)
    else:
        for _ in frames:
            pass
    print(f"{said}: {folder / f'{shots.name}{suffix}' if suffix else folder}")


# What to render.


def chosen_layers(values: flags.Flags) -> frozenset[str]:
    """What --layers names."""
    layers = frozenset(values.layers)
    if unknown := layers - {*LAYERS}:
        raise InputError(f"--layers: {shown(min(unknown))} is none of {', '.join(LAYERS)}")
    return layers


def chosen_suffix(animation: str, fps: float) -> str:
    """The suffix of the animation, "" for none."""
    if animation == "auto":
        animation = "mp4" if can_write_video() else "gif"
    if animation in ("gif", "webp") and fps > 50:
        raise InputError(f"--fps = {fps:g}: a {animation} has at most 50 frames per second; give --animation=mp4")
    return "" if animation == "none" else f".{animation}"


def chosen_shots(run: Run, config: NerfConfig, values: flags.Flags) -> Shots:
    """The frames of --path."""
    path = automatic_path(run) if values.path == "auto" else values.path
    if path.lower().endswith(".json"):
        return flight_shots(run, config, Path(path), values)
    if path not in (*PATHS, *SPLITS):
        raise InputError(f"--path={path}: expected auto, {', '.join((*PATHS, *SPLITS))}, or a .json file")
    cameras = camera_path(run, config.scene, path, values.frames)
    return Shots(
        path,
        cameras,
        np.full(len(cameras), values.aperture / 2),
        np.full(len(cameras), values.focus),
        values.fps or 20.0,
    )


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


def flight_shots(run: Run, config: NerfConfig, path: Path, values: flags.Flags) -> Shots:
    """The frames of a camera path that another program, or the viewer, wrote."""
    frames, notes = reference_frames(config.scene, path)
    size = image_size(run.cameras[0]) if run.cameras is not None else (values.width or 800, values.height or 800)
    flight = read_flight(path, values.frames, size, frames)
    warn(*notes, *flight.notes)
    c2w = run.transform.pose_to_scene(np.asarray(flight.cameras.c2w)).astype(np.float32)
    cameras = flight.cameras.replace(c2w=c2w)  # type: ignore[attr-defined]
    of_flag = values.aperture > 0
    return Shots(
        path.stem,
        cameras,
        np.full(len(c2w), values.aperture / 2) if of_flag else flight.aperture / run.transform.side,
        np.full(len(c2w), values.focus) if of_flag else flight.focus / run.transform.side,
        values.fps or flight.fps or 20.0,
    )


def resized(shots: Shots, width: int, height: int) -> Shots:
    """The frames in another size; 0 follows from the other side."""
    old_width, old_height = image_size(shots.cameras[0])
    if not width and not height:
        return shots
    new = (width or round(height * old_width / old_height), height or round(width * old_height / old_width))
    cameras = resize_cameras(shots.cameras, *new)
    return Shots(shots.name, cameras, shots.aperture, shots.focus, shots.fps)


# Rendering.


def write_frames(run: Run, shots: Shots, folder: Path, layers: frozenset[str], values: flags.Flags) -> Iterator[Image8]:
    """Render each camera, write its files, and yield its colours (H, W, 3) u8.

    Several processes take turns with the frames, and all of them yield all.
    """
    positions = np.asarray(shots.cameras.c2w, np.float64)[:, :, 3]
    distance = float(np.median(np.linalg.norm(positions - 0.5, axis=1)))
    near_far = (max(distance - 0.5, 0.0), distance + 0.5)  # one for all frames, or the depth would flicker
    to_user = run.transform.side * (run.transform.metres or 1.0)
    step = depth_step(to_user * float(np.max(np.abs(positions - 0.5)) + 0.5) * 3**0.5)
    if "depth16" in layers and processes.is_first():
        unit = "metres" if run.transform.metres else "units of the scene's files"
        write_json(folder / "depth16.json", {"step": step, "unit": unit, "along": "optical axis", "unknown": 0})
    background = jnp.full(3, COLOURS[values.background], jnp.float32)

    def write(index: int) -> Image8:
        camera, aperture = shots.cameras[index], float(shots.aperture[index])
        out = film(
            run.field,
            camera,
            run.occupancy,
            background,
            sampler=run.config.sampler,
            samples=values.samples,
            aperture=aperture,
            focus=(float(shots.focus[index]) or middle_distance(run, camera)) if aperture else 1.0,
        )
        rgb = to_uint8(out.rgb)
        name = f"{index:04d}.png"
        if "colour" in layers:
            write_png(folder / f"frame_{name}", rgb)
        if "rgba" in layers:
            write_png(folder / f"rgba_{name}", to_uint8(straight_alpha(out, background)))
        if "depth" in layers:
            write_png(folder / f"depth_{name}", depth_image(out.depth, out.opacity, near_far))
        if "depth16" in layers:
            depth = np.rint(depth_along_axis(camera, out) * to_user / step)
            write_png(folder / f"depth16_{name}", np.clip(depth, 0, DEPTH_STEPS).astype(np.uint16))
        if "normals" in layers:
            normals = surface_normals(view_rays(camera), out)
            normals = normals @ np.array(run.transform.rotation, np.float32)  # scene axes to the source's
            write_png(folder / f"normal_{name}", to_uint8((normals + 1) / 2 * np.asarray(out.opacity)[..., None]))
        return rgb

    count, number = processes.count(), len(shots.cameras)
    hidden = True if not processes.is_first() else None
    bar = tqdm(total=number, desc="rendering", unit="frame", mininterval=bar_interval(), disable=hidden)
    for first in range(0, number, count):
        own = write(min(first + processes.index(), number - 1))  # the last frame again where there are too few
        for index, pixels in enumerate(processes.gather(own.reshape(-1)), first):
            if index < number:
                width, height = image_size(shots.cameras[index])
                bar.update()
                yield pixels.reshape(height, width, 3)
    bar.close()


def middle_distance(run: Run, camera: Cameras) -> float:
    """Along the optical axis, of what the middle of a frame shows; of the middle of the box where that is nothing."""
    width, height = image_size(camera)
    centre = resize_cameras(camera, max(1, width // 16), max(1, height // 16))
    depth = depth_along_axis(centre, run.render(centre))
    seen = depth[
        depth.shape[0] // 3 : -(depth.shape[0] // 3) or None, depth.shape[1] // 3 : -(depth.shape[1] // 3) or None
    ]
    return float(np.median(seen[seen > 0])) if np.any(seen > 0) else float(np.linalg.norm(camera.c2w[:, 3] - 0.5))


if __name__ == "__main__":
    flags.run("jaxngp.render", flags.define_render_flags, main, __doc__)
