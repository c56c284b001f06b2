"""The map of the package, asserted: what each module may import, and that importing it touches no device."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A module imports only modules of earlier lines, or of its own subpackage. Subpackages count as one.
LAYERS = (
    "config lenses",
    "processes",
    "presets bitsets cameras device images hashing losses metrics records",
    "compositing encodings occupancy pictures",
    "diagram refinement",
    "visual_hull",
    "fields marching",
    "tracing",
    "meshing",
    "rendering",
    "data registration",
    "training",
    "console",
    "camera_report checkpoints evaluation filming",
    "reporting",
    "runs",
    "exporting viewing",
    "flags",
    "capture train train_image train_sdf evaluate render inspect export report view",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
ENTRYPOINTS = frozenset(LAYERS[-1].split())


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package, the package itself included."""
    files = sorted((ROOT / "jaxngp").rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported_names(source: str, package: str) -> Iterator[str]:
    """The dotted name of all that `source` imports, at any depth; `package` is what relative imports start from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imported_names(path.read_text(encoding="utf-8"), ".".join(path.parent.relative_to(ROOT).parts)))


MODULES = modules()
INSIDE = [name for name in MODULES if name != "jaxngp"]
IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}
EDGES = [(name, imported) for name in INSIDE for imported in sorted(IMPORTS[name])]


def part(name: str) -> str:
    """The module or subpackage directly below jaxngp that a dotted name lies in; "" for jaxngp itself."""
    return (name.split(".") + [""])[1] if name.startswith("jaxngp.") else ""


def is_below(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")


def may_import(name: str, outside: str) -> bool:
    """Whether a module of the package may import this name from outside of it."""
    if any(is_below(outside, private) for private in ("jax._src", "experiments", "tests")):
        return False
    if is_below(outside, "flax.linen"):
        return name == "jaxngp.fields"
    if is_below(outside, "PIL"):
        return part(name) == "data" or name in ("jaxngp.pictures", "jaxngp.diagram")
    if is_below(outside, "absl.flags"):
        return RANK[part(name)] >= RANK["flags"]
    return True


def test_imported_names() -> None:
    source = "import a.b as c\nfrom d import e, f\ndef g():\n    from . import h\n    from ..i import j"
    assert list(imported_names(source, "p.q")) == ["a.b", "d.e", "d.f", "p.q.h", "p.i.j"]


def test_the_package_itself_imports_nothing() -> None:
    assert not IMPORTS["jaxngp"]


def test_every_module_has_a_rank() -> None:
    assert [name for name in INSIDE if part(name) not in RANK] == []


def test_a_module_imports_only_what_comes_before_it() -> None:
    ranks = {(a, b): (RANK[part(a)], RANK[part(b)]) for a, b in EDGES if part(b) in RANK and part(b) != part(a)}
    assert len(ranks) > 50  # otherwise the imports are not found, and the next line says nothing
    assert [edge for edge, (importer, imported) in ranks.items() if imported >= importer] == []


def test_outside_libraries_stay_where_they_belong() -> None:
    assert [edge for edge in EDGES if not may_import(*edge)] == []


def test_nobody_imports_an_entrypoint() -> None:
    assert [edge for edge in EDGES if part(edge[1]) in ENTRYPOINTS] == []


def test_no_module_is_named_for_what_it_is_not() -> None:
    empty = {"utils", "util", "common", "helpers", "misc", "types"}
    assert [name for name in INSIDE if empty & set(name.split("."))] == []


def test_importing_touches_no_device() -> None:
    """jax is given a platform that does not exist: whatever needs a device fails, as the last line makes sure."""
    imports = "\n".join(f"import {name}" for name in MODULES)
    program = f"{imports}\nimport jax\ntry:\n    jax.devices()\nexcept RuntimeError:\n    print('no device')"
    env = os.environ | {"JAX_PLATFORMS": "nowhere"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "no device"
