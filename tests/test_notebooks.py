"""The notebooks run from top to bottom, and what they assert holds."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "experiments" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    for library in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(library, reason="the extra notebooks is not installed")
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_notebooks_are_stored_without_results() -> None:
    assert len(NOTEBOOKS) >= 6
    for path in NOTEBOOKS:
        assert '"outputs": []' in path.read_text(encoding="utf-8")
        assert '"output_type"' not in path.read_text(encoding="utf-8")
