"""The viewer in the browser, on viser: its server, its windows, and a panel of controls."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import socket
from typing import Any

import numpy as np

from jaxngp.cameras import focus
from jaxngp.config import InputError
from jaxngp.training.loop import Progress
from jaxngp.viewing.poses import vertical_fov
from jaxngp.viewing.source import Controls, Source
from jaxngp.viewing.tabs import ACCENT, CamerasTab, PathTab, TrainingTab, ViewTab, notify, viewpoint_of
from jaxngp.viewing.truth import Views
from jaxngp.viewing.worker import Picture, Worker

SMALL = 2**17
"""Bytes of a picture below which it is sent as a PNG, for a JPEG would lose the colours of single pixels."""


def check_host(host: str) -> None:
    """Raises InputError where no server can be started: viser is missing, or the host is another machine."""
    if importlib.util.find_spec("viser") is None:
        raise InputError("the viewer needs viser, which is not installed: pip install .[viewer]")
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise InputError(f"--view_host={host}: {error.strerror or error}; 127.0.0.1 is this machine alone") from None


def start_server(host: str, port: int) -> Any:
    """A viser server on a port, or on the next free one. Raises InputError as `check_host` does."""
    check_host(host)
    import viser  # here, since it is optional

    with contextlib.redirect_stdout(io.StringIO()):  # its banner
        return viser.ViserServer(host=host, port=port, label="jaxngp", verbose=False)


def address(host: str, port: int) -> str:
    """The URL of a server that listens on a host and a port."""
    shown = f"[{host}]" if ":" in host else host.replace("0.0.0.0", "localhost")
    return f"http://{shown}:{port}"


def announcement(host: str, port: int, found: int) -> str:
    """What to tell the user of a server that was to listen on a port, and listens on the one that was found."""
    said = f"viewer: {address(host, found)}" + ("" if found == port else f" (port {port} is in use)")
    if host in ("127.0.0.1", "localhost", "::1"):
        forward = address(host, found).removeprefix("http://")
        return f"{said}\n  from another machine: ssh -L {found}:{forward} <this machine>, then open it there"
    return f"{said}\n  whoever reaches this address can look, pause the training and save checkpoints"


class Panel:
    """All that a browser shows of a run."""

    def __init__(self, server: Any, worker: Worker, views: Views, source: Source, controls: Controls) -> None:
        self._server, self._worker, self._controls = server, worker, controls
        gui = server.gui
        gui.configure_theme(
            control_layout="collapsible", show_logo=False, show_share_button=False, brand_color=ACCENT, dark_mode=False
        )
        self._frame_scene(views)
        self._status = gui.add_markdown("compiling ...")
        tabs = gui.add_tab_group()
        with tabs.add_tab("View"):
            self._view = ViewTab(server, worker, source)
        if views.cameras is not None:
            with tabs.add_tab("Cameras"):
                self._cameras = CamerasTab(server, worker, views)
        with tabs.add_tab("Path"):
            self._path = PathTab(server, worker, source, self._view)
        with tabs.add_tab("Training"):
            self._training = TrainingTab(server, controls, source)
        server.on_client_connect(self._on_connect)
        server.on_client_disconnect(lambda client: worker.leave(client.client_id))

    def _frame_scene(self, views: Views) -> None:
        """Where a new window looks from: the first training camera."""
        start, target = np.array([1.6, 1.6, 1.2]), np.full(3, 0.5)
        camera = self._server.initial_camera
        camera.fov = 0.9
        if views.cameras is not None:
            poses = np.asarray(views.cameras.c2w, np.float64)
            start, target = poses[0, :, 3], focus(poses)
            camera.fov = float(np.clip(vertical_fov(views.cameras[0]), 0.35, 1.3))
        camera.position, camera.look_at, camera.up, camera.near = start, target, (0.0, 0.0, 1.0), 1e-3

    def _on_connect(self, client: Any) -> None:
        def moved(camera: Any) -> None:
            if camera.image_width and camera.image_height:
                self._worker.move(client.client_id, viewpoint_of(camera))

        client.camera.on_update(moved)
        moved(client.camera)

    def shown(self, window: int, picture: Picture) -> None:
        """Send a picture to its window. Called by the worker."""
        client = self._server.get_clients().get(window)
        if client is None:
            return
        small = picture.image.size < SMALL
        client.scene.set_background_image(picture.image, format="png" if small else "jpeg", jpeg_quality=90)
        self._view.tell(picture)

    def report(self, progress: Progress, *, ended: bool = False) -> None:
        """Say where training stands, about once a second."""
        ended = ended or progress.finished
        state = "paused" if self._controls.paused.is_set() else "finished" if ended else ""
        if self._training.report(progress, ended=ended) or state:
            quality = progress.metrics.headline() if progress.metrics else ""
            said = [f"**Step {progress.step}**", f"{progress.seconds:.0f} s", quality, state]
            self._status.content = " · ".join(part for part in said if part)

    def notify(self, title: str, text: str) -> None:
        """Tell all windows something."""
        for client in self._server.get_clients().values():
            notify(client, title, text)
