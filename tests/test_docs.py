"""The documentation is true: its Python runs, its commands are accepted, its links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxngp import evaluate, export, flags, inspect, report, runs, train_image, train_sdf, view
from jaxngp.config import apply_overrides
from jaxngp.data import load_training
from jaxngp.presets import PRESETS
from jaxngp.training.loop import train

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import places  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = apply_overrides(
    PRESETS["small"],
    [
        "scene.image_size=16",
        "field.encoding.num_levels=2",
        "field.encoding.table_size=2**12",
        "field.encoding.max_resolution=32",
        "sampler.num_steps=32",
        "sampler.num_samples=2**9",
        "sampler.occupancy.resolution=32",
        "train.num_rays=2**7",
        "train.steps_per_dispatch=2",
        "train.max_steps=4",
        "train.max_seconds=0.0",
    ],
)
DEFINE: dict[str, Callable[[flags.Flags], None]] = {
    "jaxngp.train": flags.define_train_flags,
    "jaxngp.capture": flags.define_capture_flags,
    "jaxngp.inspect": inspect.define_flags,
    "jaxngp.evaluate": evaluate.define_flags,
    "jaxngp.view": view.define_flags,
    "jaxngp.render": flags.define_render_flags,
    "jaxngp.report": report.define_flags,
    "jaxngp.export": export.define_flags,
    "jaxngp.train_image": train_image.define_flags,
    "jaxngp.train_sdf": train_sdf.define_flags,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines if line.startswith("python -m jaxngp.")})


@pytest.mark.slow
def test_documented_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of README and docs/library.md in one namespace, as in a notebook; only the preset is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "small", TINY)
    views = load_training(TINY.scene)
    with runs.training_in("runs/bricks", TINY, data=views) as run:
        for progress in train(TINY, views.images):
            run.record(progress)
    names: dict[str, Any] = {}
    for page in (ROOT / "README.md", ROOT / "docs" / "library.md"):
        for block in blocks(page, "python"):
            exec(block, names)  # our own documentation
    shapes = {"features": (1000, 32), "slopes": (1000, 3), "picture": (16, 16, 3), "slope": (3, 4), "colour": (1, 3)}
    shapes |= {"pose_gradient": (len(views.views), 3, 4), "both": (2, 16 * 16, 3), "distance": (1000,)}
    for name, shape in shapes.items():
        assert names[name].shape == shape, name
        assert np.all(np.isfinite(names[name])), name


@pytest.mark.parametrize("command", commands())
def test_documented_commands_are_accepted(command: str) -> None:
    _, _, module, *rest = shlex.split(command)
    values = flags.Flags()
    DEFINE[module](values)
    left = values([module, *rest])[1:]
    assert left == [] or (module == "jaxngp.inspect" and len(left) == 1)  # it takes a path without --scene=
    if module == "jaxngp.train":
        flags.train_config(values)  # overrides name fields and fit their bounds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documentation_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_every_public_function_has_an_example_or_a_place() -> None:
    """What the site links each with: an example of its own, a page, a caller, or a test that shows how it is called."""
    without = [
        name
        for name, node in places.public_functions().items()
        if not (places.has_example(node) or places.shown_in(name) or places.called_by(name))
        and not (places.command_of(name) or places.tested_in(name))
    ]
    assert not without
    assert "notebooks/fit_an_image" in {page for name in places.public_functions() for page in places.shown_in(name)}
    assert "jaxngp.capture.main" not in places.called_by("jaxngp.cameras.project")


EXAMPLES = sorted(
    {name.rpartition(".")[0] for name, node in places.public_functions().items() if places.has_example(node)}
)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_give_what_they_say(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
