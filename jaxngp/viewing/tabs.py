"""The tabs of the viewer's panel: what is shown, the training cameras, a camera path, the training."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxngp.cameras import focus
from jaxngp.config import InputError
from jaxngp.evaluation import EvalBackground
from jaxngp.hashing import level_resolutions
from jaxngp.pictures import can_write_video, write_animation, write_png, write_video
from jaxngp.records import write_text
from jaxngp.training.loop import Progress
from jaxngp.viewing.drawing import Look, Mode, colours, draw, modes
from jaxngp.viewing.paths import CameraPath
from jaxngp.viewing.poses import Viewpoint, from_opencv, to_opencv, vertical_fov
from jaxngp.viewing.source import Controls, Source
from jaxngp.viewing.truth import View, Views, compare
from jaxngp.viewing.worker import Picture, Task, Worker

MAX_CAMERAS = 250  # drawn in the scene; more would be a thicket
MAX_POINTS = 400  # of a plot
COMPARISON = 520  # px, the least width of a comparison
ACCENT, GREY, ORANGE = (37, 99, 235), (150, 165, 190), (220, 90, 30)


def viewpoint_of(camera: Any) -> Viewpoint:
    """What a window looks at, of viser's handle of its camera."""
    c2w = from_opencv(camera.wxyz, camera.position)
    return Viewpoint(c2w, float(camera.fov), int(camera.image_width), int(camera.image_height))


def look_from(client: Any, c2w: np.ndarray) -> None:
    """Move a window's camera to a pose."""
    wxyz, position = to_opencv(c2w)
    with client.atomic():
        client.camera.position = position
        client.camera.wxyz = wxyz


def notify(client: Any, title: str, text: str) -> None:
    """Tell one window something for a few seconds."""
    client.add_notification(title, text, auto_close_seconds=6.0)


# What is shown.

NAMES: dict[Mode, str] = {
    "colour": "Colour",
    "depth": "Depth",
    "normals": "Normals",
    "opacity": "Opacity",
    "occupancy": "Occupancy grid",
    "cost": "Cost",
}

MODE_HINT = (
    "Colour; depth of the surface; normals, against the slope of the density; opacity; occupied cells of the grid; or "
    "cost, the samples that each ray took."
)
LIMIT_HINT = (
    "Pixels along the longer side, once the view is still. While it moves: as many as 10 frames a second allow."
)


class ViewTab:
    """What the picture shows, and how finely."""

    def __init__(self, server: Any, worker: Worker, source: Source) -> None:
        self._server, self._worker, self._source = server, worker, source
        self._told, self._compiling = 0.0, ""
        gui, config = server.gui, source.config
        self._modes = {NAMES[mode]: mode for mode in modes(config.sampler)}
        self._mode = gui.add_dropdown("Show", [*self._modes], hint=MODE_HINT)
        sides = level_resolutions(config.field.encoding)
        self._levels = ["All levels", *(f"{i + 1}: {side}³ cells" for i, side in enumerate(sides))]
        hint = "One level of the hash encoding alone: the features of all others are 0."
        self._level = gui.add_dropdown("Encoding", self._levels, hint=hint)
        self._background = gui.add_dropdown("Background", ["White", "Black"], hint="Colour behind the scene.")
        self._limit = gui.add_slider("Resolution", 128, 2048, 64, worker.limit, hint=LIMIT_HINT)
        fov = round(math.degrees(server.initial_camera.fov))
        self._fov = gui.add_slider("View angle", 5, 120, 1, fov, hint="Of the height of the picture, in degrees.")
        with gui.add_folder("Crop", expand_by_default=False):
            self._cropped = gui.add_checkbox("Crop to box", False, hint="Show only what is inside the box.")
            hint = "Lower and upper end of the box, in scene units."
            self._ranges = [
                gui.add_multi_slider(axis, 0.0, 1.0, 0.001, (0.0, 1.0), min_range=0.001, hint=hint) for axis in "xyz"
            ]
        screenshot = gui.add_button("Screenshot", icon="camera", hint="Download this view as a PNG.")
        self._info = gui.add_markdown("")
        for control in (self._mode, self._level, self._background, self._limit, self._cropped, *self._ranges):
            control.on_update(lambda _: self._changed())
        self._fov.on_update(lambda _: self._set_fov())
        screenshot.on_click(lambda event: worker.submit(self._take_screenshot(event.client)))

    def look(self) -> Look:
        """What the controls say."""
        low, high = np.array([control.value for control in self._ranges], float).T.tolist()
        number = self._levels.index(self._level.value)
        background: EvalBackground = "white" if self._background.value == "White" else "black"
        crop = ((low[0], low[1], low[2]), (high[0], high[1], high[2])) if self._cropped.value else None
        return Look(self._modes[self._mode.value], number - 1 if number else None, background, crop)

    @property
    def fov(self) -> float:
        """Of the height, radians."""
        return math.radians(self._fov.value)

    def _changed(self) -> None:
        look = self.look()
        if not self._worker.has_compiled(look):
            self._info.content = self._compiling = f"compiling {NAMES[look.mode].lower()} ..."
        self._worker.set_look(look, int(self._limit.value))
        self._compiling = ""
        edges = box_edges(np.array(look.crop or [[0.0] * 3, [1.0] * 3]))
        self._server.scene.add_line_segments(
            "/crop", edges, ACCENT, thickness=1.5, thickness_units="screen", visible=look.crop is not None
        )

    def _set_fov(self) -> None:
        for client in self._server.get_clients().values():
            client.camera.fov = self.fov

    def tell(self, picture: Picture) -> None:
        """Say how a picture was drawn, a few times a second at most."""
        now = time.monotonic()
        if picture.full or now > self._told + 0.3:
            self._told = now
            height, width = picture.image.shape[:2]
            said = f"{width} x {height} in {1e3 * picture.seconds:.0f} ms, step {picture.version}"
            said += "" if picture.full else ", being refined"
            self._info.content = f"{said}  \n{self._compiling or picture.legend}"

    def _take_screenshot(self, client: Any) -> Task:
        scene, view = self._worker.scene, self._worker.viewpoint(client.client_id)
        if scene is None or view is None:
            return
        look = self.look()
        out = yield from draw(scene, view.camera(view.width, view.height), look)
        image, _ = colours(out, look)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self._source.name}_{scene.version}_{look.mode}.png"
            write_png(path, image)
            client.send_file_download(path.name, path.read_bytes(), save_immediately=True)


def box_edges(corners: np.ndarray) -> np.ndarray:
    """The edges (12, 2, 3) of a box with lower and upper corner (2, 3)."""
    unit = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    pairs = [(i, j) for i in range(8) for j in range(i) if np.sum(unit[i] != unit[j]) == 1]
    return np.asarray(corners[0] + unit[np.array(pairs)] * (corners[1] - corners[0]))


# The training cameras.


class CamerasTab:
    """The training cameras in the scene, and each one's image beside what the field makes of it."""

    def __init__(self, server: Any, worker: Worker, views: Views) -> None:
        self._server, self._worker, self._views = server, worker, views
        self._open: dict[int, Any] = {}  # the comparison in each window
        gui = server.gui
        self._shown = gui.add_checkbox("Show cameras", False, hint="Click a camera to compare its image.")
        self._size = gui.add_slider("Size", 0.2, 5.0, 0.1, 1.0, hint="Of the cameras in the scene.")
        hint = "Number of a training view."
        self._number = gui.add_number("Camera", 0, min=0, max=len(views) - 1, step=1, hint=hint)
        chosen = gui.add_button("Compare", icon="columns-2", hint="Its image beside the rendered one.")
        visited = gui.add_button("Look from here", icon="eye", hint="Move the view to this camera.")
        self._handles = self._add_cameras()
        self._shown.on_update(lambda _: self._update())
        self._size.on_update(lambda _: self._update())
        chosen.on_click(lambda event: self._compare(event.client, int(self._number.value)))
        visited.on_click(lambda event: self._visit(event.client, int(self._number.value)))

    def _add_cameras(self) -> dict[int, Any]:
        cameras, count = self._views.cameras, len(self._views)
        assert cameras is not None
        c2w = np.asarray(cameras.c2w, np.float64)
        self._scale = 0.04 * float(np.median(np.linalg.norm(c2w[:, :, 3] - focus(c2w), axis=1)))
        found = {}
        for number in np.unique(np.linspace(0, count - 1, min(count, MAX_CAMERAS)).round().astype(int)).tolist():
            camera = cameras[number]
            width, height = np.asarray(camera.size).tolist()
            wxyz, position = to_opencv(c2w[number])
            found[number] = self._server.scene.add_camera_frustum(
                f"/cameras/{number}",
                fov=vertical_fov(camera),
                aspect=width / height,
                scale=self._scale,
                color=GREY,
                thickness=1.0,
                thickness_units="screen",
                wxyz=wxyz,
                position=position,
                visible=False,
            )
            found[number].on_click(lambda event, number=number: self._compare(event.client, number))
        return found

    def _update(self) -> None:
        with self._server.atomic():
            for handle in self._handles.values():
                handle.visible, handle.scale = self._shown.value, self._scale * self._size.value

    def _visit(self, client: Any, number: int) -> None:
        assert self._views.cameras is not None
        look_from(client, np.asarray(self._views.cameras.c2w[number]))

    def _compare(self, client: Any, number: int) -> None:
        self._number.value = number
        for other, handle in self._handles.items():
            handle.color = ACCENT if other == number else GREY
        view = self._views.view(number)  # reads the images, if they are not read yet
        self._worker.submit(self._draw_comparison(client, number, view))

    def _draw_comparison(self, client: Any, number: int, view: View) -> Task:
        scene, background = self._worker.scene, self._worker.look.background
        if scene is None:
            return
        out = yield from draw(scene, view.camera, Look(background=background))
        sheet, said = compare(view, out.rgb, background)
        self._close(client)
        self._open[client.client_id] = panel = client.gui.add_panel()
        panel.float(x=16, y=16, width=min(max(sheet.shape[1] + 48, COMPARISON), client.camera.image_width - 32))
        with panel.add_tab(f"Camera {number}: {view.name}", icon="columns-2"):
            client.gui.add_image(sheet, format="png")
            client.gui.add_markdown(f"{said}, step {scene.version}")
            turn = client.gui.add_button_group("", ["Previous", "Next", "Look from here", "Close"])

        @turn.on_click
        def _(_: Any) -> None:
            if turn.value == "Look from here":
                self._visit(client, number)
            elif turn.value == "Close":
                self._close(client)
            else:
                self._compare(client, (number + (1 if turn.value == "Next" else -1)) % len(self._views))

    def _close(self, client: Any) -> None:
        """Close a window's comparison, if it has one."""
        if panel := self._open.pop(client.client_id, None):
            panel.remove()


# Camera paths.


class PathTab:
    """Key frames of a camera path: made, previewed, exported, rendered."""

    def __init__(self, server: Any, worker: Worker, source: Source, view: ViewTab) -> None:
        self._server, self._worker, self._source, self._view = server, worker, source, view
        self._keys: tuple[np.ndarray, ...] = ()
        self._playing = threading.Event()
        gui = server.gui
        add = gui.add_button("Add key frame", icon="plus", hint="From where this window looks now, after the last.")
        self._chosen = gui.add_dropdown("Key frame", ["none"], hint="One of the path, for the two buttons below.")
        visit = gui.add_button("Go to key frame", icon="eye", hint="Move the view there.")
        remove = gui.add_button("Remove key frame", icon="trash", hint="Take it out of the path.")
        with gui.add_folder("Animation"):
            self._seconds = gui.add_number("Seconds", 4.0, min=0.1, max=600.0, step=0.1, hint="Of the whole flight.")
            self._fps = gui.add_number("Frame rate", 24.0, min=1.0, max=50.0, step=1.0, hint="Frames per second.")
            hint = "Width and height of a frame, in pixels."
            self._size = gui.add_vector2("Size", (960, 540), min=(16, 16), max=(4096, 4096), step=1, hint=hint)
            formats = ["mp4", "gif", "webp"] if can_write_video() else ["gif", "webp"]
            hint = "webp is smaller than gif and has all colours; mp4 is there where PyAV is installed."
            self._format = gui.add_dropdown("Format", formats, hint=hint)
            self._play = gui.add_button("Preview", icon="player-play", hint="Fly along the path in this window.")
            self._render = gui.add_button("Render", icon="movie", hint="Write the animation into the run's folder.")
            self._bar = gui.add_progress_bar(0.0, visible=False)
        with gui.add_folder("File", expand_by_default=False):
            hint = "In nerfstudio's format; python -m jaxngp.render --path=path.json renders it."
            save = gui.add_button("Export JSON", icon="download", hint=hint)
            load = gui.add_upload_button("Load JSON", icon="upload", mime_type="application/json")
        add.on_click(lambda event: self._add(event.client))
        visit.on_click(lambda event: self._visit(event.client))
        remove.on_click(lambda _: self._remove())
        self._play.on_click(lambda event: self._preview(event.client))
        self._render.on_click(lambda event: self._start(event.client))
        save.on_click(lambda event: self._export(event.client))
        load.on_upload(lambda event: self._load(event.client, load.value.content))

    @property
    def path(self) -> CameraPath:
        """What the controls say."""
        width, height = (int(side) for side in self._size.value)
        return CameraPath(self._keys, self._view.fov, self._seconds.value, self._fps.value, width, height)

    def _set(self, path: CameraPath, chosen: int) -> None:
        """Take the key frames of a path, and draw it: a line in the scene, with its key frames as cameras."""
        self._keys = path.keys
        self._chosen.options = [str(i + 1) for i in range(len(path.keys))] or ["none"]
        self._chosen.value = self._chosen.options[chosen]
        scene, style = self._server.scene, {"thickness": 1.5, "thickness_units": "screen"}
        with self._server.atomic():
            scene.remove_by_name("/path")
            for number, key in enumerate(path.keys):
                wxyz, position = to_opencv(key)
                pose = {"wxyz": wxyz, "position": position}
                aspect = path.width / path.height
                scene.add_camera_frustum(
                    f"/path/{number}", fov=path.fov, aspect=aspect, scale=0.05, color=ORANGE, **pose, **style
                )
            if len(path.keys) > 1:
                places = np.asarray(path.cameras().c2w)[:, :, 3]
                scene.add_line_segments("/path/line", np.stack([places[:-1], places[1:]], axis=1), ORANGE, **style)

    def _add(self, client: Any) -> None:
        self._set(self.path.added(viewpoint_of(client.camera).c2w), len(self._keys))

    def _remove(self) -> None:
        if self._keys:
            number = int(self._chosen.value) - 1
            self._set(self.path.removed(number), max(number - 1, 0))

    def _visit(self, client: Any) -> None:
        if self._keys:
            look_from(client, self._keys[int(self._chosen.value) - 1])

    def _enough_keys(self, client: Any, count: int) -> bool:
        """Whether there are so many key frames; if not, that is said."""
        if len(self._keys) < count:
            notify(client, "No path yet", f"Add at least {count} key frames first.")
        return len(self._keys) >= count

    def _preview(self, client: Any) -> None:
        """Fly a window along the path, and back to where it was; a second click stops it."""
        if self._playing.is_set():
            self._playing.clear()
            return
        if not self._enough_keys(client, 2):
            return
        self._playing.set()
        self._play.label, self._play.icon = "Stop", "player-stop"
        path, before = self.path, viewpoint_of(client.camera).c2w
        poses, started = np.asarray(path.cameras().c2w), time.monotonic()
        while self._playing.is_set() and (frame := int((time.monotonic() - started) * path.fps)) < len(poses):
            look_from(client, poses[frame])
            time.sleep(1 / path.fps)
        look_from(client, before)
        self._playing.clear()
        self._play.label, self._play.icon = "Preview", "player-play"

    def _export(self, client: Any) -> None:
        if self._enough_keys(client, 1):
            text, path = self.path.to_json(self._source.transform), self._folder() / "path.json"
            write_text(path, text)
            client.send_file_download(path.name, text.encode(), save_immediately=True)
            notify(client, "Exported", str(path))

    def _load(self, client: Any, content: bytes) -> None:
        try:
            path = CameraPath.from_json(content.decode("utf-8", errors="replace"), self._source.transform)
        except InputError as error:
            notify(client, "Not loaded", str(error))
            return
        self._seconds.value, self._fps.value, self._size.value = path.seconds, path.fps, (path.width, path.height)
        self._set(path, 0)

    def _folder(self) -> Path:
        folder = self._source.workdir / "renders" / "viewer"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _start(self, client: Any) -> None:
        if self._enough_keys(client, 2):
            self._render.disabled = True
            self._worker.submit(self._render_frames(client, self.path, self._view.look(), self._format.value))

    def _render_frames(self, client: Any, path: CameraPath, look: Look, suffix: str) -> Task:
        """All frames of a path, of the scene as it is now."""
        scene, cameras = self._worker.scene, path.cameras()
        assert scene is not None
        frames = []
        self._bar.visible = True
        try:
            for number in range(path.num_frames):
                self._bar.value = 100 * number / path.num_frames
                out = yield from draw(scene, cameras[number], look)
                frames.append(colours(out, look)[0])
            target = self._folder() / f"{self._source.name}.{suffix}"
            write = write_video if suffix == "mp4" else write_animation
            write(target, frames, path.fps)
            client.send_file_download(target.name, target.read_bytes())
            notify(client, "Rendered", f"{len(frames)} frames: {target}")
        finally:
            self._bar.visible, self._render.disabled = False, False


# The training.


class TrainingTab:
    """Pause, save, and how the fit goes."""

    def __init__(self, server: Any, controls: Controls, source: Source) -> None:
        self._controls, self._source = controls, source
        self._history = source.history()
        self._told = 0.0
        gui, trained_here = server.gui, source.save is not None
        self._pause = gui.add_button("Pause training", icon="player-pause", visible=trained_here)
        self._save = gui.add_button("Save checkpoint", icon="device-floppy", visible=trained_here)
        if not trained_here:
            gui.add_markdown("Newer checkpoints in the run's folder are shown as they come.")
        self._plots = [
            gui.add_uplot(
                (np.zeros(1), np.zeros(1)),
                ({"label": "step"}, {"label": name, "stroke": f"rgb{ACCENT}", "width": 1.5}),
                title=name,
                scales={"x": {"time": False}},
                legend={"show": False},
                height=170,
                visible=False,
            )
            for name in ("PSNR of the batches, dB", "loss, log10")
        ]
        self._pause.on_click(lambda _: self._toggle())
        self._save.on_click(lambda _: controls.save.set())

    def _toggle(self) -> None:
        paused = self._controls.paused
        paused.clear() if paused.is_set() else paused.set()
        self._pause.label = "Resume training" if paused.is_set() else "Pause training"
        self._pause.icon = "player-play" if paused.is_set() else "player-pause"

    def report(self, progress: Progress, *, ended: bool) -> bool:
        """Note where training stands; whether it is time to show it, about once a second."""
        metrics: Any = progress.metrics
        if self._source.save is None:
            self._history = self._source.history()
        elif metrics is not None:
            self._history.append((progress.step, float(metrics.loss), float(metrics.psnr)))
        if len(self._history) > 2 * MAX_POINTS:
            self._history = self._history[:: len(self._history) // MAX_POINTS]
        if ended:
            self._pause.disabled = self._save.disabled = True
            self._pause.label = "The training has ended"
        now = time.monotonic()
        if not ended and now < self._told + 1.0:
            return False
        self._told = now
        if len(self._history) > 1:
            step, loss, quality = np.array(self._history, np.float64).T
            for plot, values in zip(self._plots, (quality, np.log10(np.maximum(loss, 1e-12))), strict=True):
                plot.data, plot.visible = (step, values), True
        return True
