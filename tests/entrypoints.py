"""Commands run in this process, so that they share the programs that were compiled before; a scene for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxngp import evaluate, export, flags, inspect, render, report, train, train_image, train_sdf, view


class Entrypoint:
    """A command, called with its arguments."""

    def __init__(
        self, module: str, define: Callable[[flags.Flags], None], main: Callable[[flags.Flags], None], **options: str
    ) -> None:
        self._module, self._define, self._main, self._options = module, define, main, options

    def __call__(self, *arguments: str) -> None:
        before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        try:
            flags.run(self._module, self._define, self._main, "A summary.", ["jaxngp", *arguments], **self._options)
        finally:
            jax.config.update("jax_compilation_cache_dir", before)

    def refusal(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        """The one line with which it refuses."""
        with pytest.raises(SystemExit) as exit_info:
            self(*arguments)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("jaxngp: ")
        return error


COMMANDS = {
    "train": Entrypoint("jaxngp.train", flags.define_train_flags, train.main),
    "evaluate": Entrypoint("jaxngp.evaluate", evaluate.define_flags, evaluate.main),
    "render": Entrypoint("jaxngp.render", flags.define_render_flags, render.main),
    "export": Entrypoint("jaxngp.export", export.define_flags, export.main),
    "report": Entrypoint("jaxngp.report", report.define_flags, report.main),
    "view": Entrypoint("jaxngp.view", view.define_flags, view.main),
    "train_image": Entrypoint("jaxngp.train_image", train_image.define_flags, train_image.main),
    "inspect": Entrypoint("jaxngp.inspect", inspect.define_flags, inspect.main, positional="scene"),
    "train_sdf": Entrypoint("jaxngp.train_sdf", train_sdf.define_flags, train_sdf.main),
}


def run(command: str, *arguments: str) -> None:
    COMMANDS[command](*arguments)


def refusal(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    """The one line with which a command refuses."""
    return COMMANDS[command].refusal(capsys, *arguments)


TINY = [
    "--preset=small",
    "--max_steps=40",
    "--override=field.encoding.num_levels=2",
    "--override=field.encoding.table_size=2**10",
    "--override=field.encoding.max_resolution=32",
    "--override=field.hidden_width=16",
    "--override=sampler.num_steps=64",
    "--override=sampler.num_samples=2**10",
    "--override=sampler.occupancy.resolution=32",
    "--override=train.num_rays=128",
]
"""Flags of a NeRF that trains in a moment."""

SIZE = 24  # px, of the images of `write_scene`


def write_scene(
    folder: Path, splits: tuple[str, ...] = ("train", "val"), num_views: int = 3, mode: str = "RGBA", far: float = 4.0
) -> Path:
    """A brown square before nothing, from a few sides."""
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[8:16, 8:16] = (200, 100, 50, 255)
    for split in splits:
        frames = []
        (folder / split).mkdir(parents=True)
        for number in range(num_views):
            angle = 0.5 * number
            c, s = float(np.cos(angle)), float(np.sin(angle))
            pose = [[c, 0, s, far * s], [s, 0, -c, -far * c], [0, 1, 0, 0], [0, 0, 0, 1]]
            Image.fromarray(rgba).convert(mode).save(folder / split / f"r_{number}.png")
            frames.append({"file_path": f"./{split}/r_{number}", "transform_matrix": pose})
        text = json.dumps({"camera_angle_x": 0.7, "frames": frames})
        (folder / f"transforms_{split}.json").write_text(text)
    return folder
