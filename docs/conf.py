"""How Sphinx builds the site from these pages, README, the notebooks and the docstrings: `make docs`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jaxngp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import places  # noqa: E402, beside this file

ROOT = HERE.parent

project = "jaxngp"
version = release = jaxngp.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "code"

html_theme = "furo"
html_title = "jaxngp"
html_show_sourcelink = False

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "ignore-module-all": True}
autodoc_mock_imports = [
    "OpenEXR",
    "av",
    "igl",
    "manifold3d",
    "plyfile",
    "pycolmap",
    "skimage",
    "trimesh",
    "viser",
]

myst_heading_anchors = 3
nb_execution_mode = os.environ.get("JAXNGP_NOTEBOOKS", "cache")  # "off" builds in two minutes
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 900
nb_execution_raise_on_error = True

# Sphinx reads only what is below this folder: README and the notes are copied here, with their links as they are seen
# from here, and so are the notebooks. Git ignores the copies.

NOTEBOOKS = (
    "train_in_a_notebook",
    "follow_a_ray",
    "hash_collisions",
    "fit_an_image",
    "inverse_problems",
    "your_own_loss",
)
CONTENTS = f"""
```{{toctree}}
:hidden:
:caption: Guide

usage
devices
photographs
cameras
viewer
export
library
performance
gpu
notes
```

```{{toctree}}
:hidden:
:caption: Notebooks

{chr(10).join(f"notebooks/{name}" for name in NOTEBOOKS)}
```

```{{toctree}}
:hidden:
:caption: Reference

api
```
"""


def relinked(text: str) -> str:
    """A page with its links to README, the notes and docs/ as they are seen from docs/."""
    text = re.sub(r"\]\((?:\.\./)?BUILD_NOTES\.md", "](notes.md", text)
    text = re.sub(r"\]\((?:\.\./)?README\.md", "](index.md", text)
    return text.replace("](docs/", "](")


def copy_pages() -> None:
    """README, the notes and the notebooks, below this folder."""
    (HERE / "index.md").write_text(
        relinked((ROOT / "README.md").read_text(encoding="utf-8")) + CONTENTS, encoding="utf-8"
    )
    (HERE / "notes.md").write_text(relinked((ROOT / "BUILD_NOTES.md").read_text(encoding="utf-8")), encoding="utf-8")
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    shutil.copytree(ROOT / "experiments" / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns(".*"))


def relink(_app: Any, _page: str, source: list[str]) -> None:
    """Of a page that Sphinx reads."""
    source[0] = relinked(source[0])


def shown(name: str) -> list[str]:
    """Lines that say where a public function is used, for those who look for an example."""
    pages = [f":doc:`/{page}`" for page in places.shown_in(name)]
    callers = [f":py:obj:`{caller}`" for caller in places.called_by(name)]
    if found := pages or callers or places.tested_in(name):
        return ["", f"{'Example' if pages else 'Used'} in: {', '.join(found)}", ""]
    return []


def as_text(_app: Any, what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Our docstrings are text, and not reStructuredText: what is indented stays as it is, and signs are signs."""
    result: list[str] = []
    inside = doctest = False
    for line in lines:
        doctest = line.startswith(">>>") or (doctest and bool(line))
        if doctest:
            result.append(line)
            continue
        indented = line.startswith("    ")
        if indented and not inside:
            result += ["", "::", ""]
        elif inside and line and not indented:
            result.append("")
        inside = indented or (inside and not line)
        result.append(line if inside else re.sub(r"(`[^`]*`)|([*|])", lambda m: m[1] or "\\" + m[2], line))
    lines[:] = result + (shown(name) if what == "function" else [])


def setup(app: Any) -> None:
    """A hook of Sphinx."""
    copy_pages()
    app.connect("source-read", relink)
    app.connect("autodoc-process-docstring", as_text)
