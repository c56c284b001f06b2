"""Where each public function is shown: in a notebook, a page, or the functions of the package that call it."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("library", "usage", "photographs", "viewer", "export")
MOST = 3  # places that are named


@functools.cache
def public_functions() -> dict[str, ast.FunctionDef]:
    """Those of the package's modules, by their dotted names."""
    return {
        f"{module}.{node.name}": node
        for module, tree in _modules().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def has_example(node: ast.FunctionDef) -> bool:
    """Whether its docstring holds one."""
    return ">>>" in (ast.get_docstring(node) or "")


def shown_in(name: str) -> list[str]:
    """Pages and notebooks, as Sphinx names them, whose Python uses a function."""
    return [page for page, found in _pages().items() if name in found][:MOST]


def called_by(name: str) -> list[str]:
    """Functions and classes of the package that use a function.

    One that several modules of a package have, so that one of the modules is chosen, by any attribute of its name.
    """
    module, _, function = name.rpartition(".")
    package, found = module.rpartition(".")[0], _callers().get(name, set())
    siblings = [other for other in public_functions() if re.fullmatch(rf"{package}\.\w+\.{function}", other)]
    return sorted(found or (_callers().get(f"*.{function}", set()) if len(siblings) > 1 else set()))[:MOST]


def tested_in(name: str) -> list[str]:
    """A test or an experiment that names a function."""
    word = re.compile(rf"\b{name.rpartition('.')[2]}\b")
    return [file for file, text in _tests().items() if word.search(text)][:1]


def command_of(name: str) -> str:
    """The command whose entry point a function is; empty where it is none."""
    module, _, function = name.rpartition(".")
    return module if f"{module}.main" in public_functions() and function in ("main", "define_flags") else ""


@functools.cache
def _modules() -> dict[str, ast.Module]:
    files = sorted((ROOT / "jaxngp").rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in zip(names, files, strict=True)}


def _used(tree: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """The dotted names that code uses. known: what names stand for, to which its imports are added."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in known:
            yield known[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            yield f"{known[node.value.id]}.{node.attr}"
        elif isinstance(node, ast.Attribute):
            yield f"*.{node.attr}"


@functools.cache
def _tests() -> dict[str, str]:
    files = [*sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "experiments").rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@functools.cache
def _pages() -> dict[str, set[str]]:
    sources = {}
    for path in sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources[f"notebooks/{path.stem}"] = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    for name, path in {"index": ROOT / "README.md", **{page: ROOT / "docs" / f"{page}.md" for page in PAGES}}.items():
        sources[name] = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    found = {}
    for name, blocks in sources.items():
        known: dict[str, str] = {}  # of the blocks before, too
        used = {dotted for block in blocks for dotted in _used(ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", block)), known)}
        found[name] = {_defined(dotted) for dotted in used}
    return found


@functools.cache
def _callers() -> dict[str, set[str]]:
    modules, callers = _modules(), {}  # type: ignore[var-annotated]
    for module, tree in modules.items():
        known = {n.name: f"{module}.{n.name}" for n in tree.body if isinstance(n, ast.FunctionDef)}
        list(_used(tree, known))  # its imports
        for node in tree.body:
            caller = f"{module}.{node.name}" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else module
            for used in _used(node, dict(known)):
                if used != caller:
                    callers.setdefault(_defined(used), set()).add(caller)
    return callers


def _defined(name: str) -> str:
    """Where what a package offers under a name is defined: `jaxngp.data.load_training` is in `jaxngp.data.splits`."""
    module, _, function = name.rpartition(".")
    for node in _modules().get(module, ast.Module([], [])).body:
        if isinstance(node, ast.ImportFrom) and node.module and function in [alias.name for alias in node.names]:
            return f"{node.module}.{function}"
    return name
