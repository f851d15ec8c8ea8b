"""The notebook of the documentation, from top to bottom."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_without_outputs_of_before(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert "('code', 'manual', 'names')" in cells[-1].outputs[-1].data["text/plain"]


def test_what_is_shown_is_of_one_run_and_small():
    text = TOUR.read_text()
    assert not re.search(r"(?<![\w.~])/(tmp|home|root|work|usr|opt)\b", text)
    assert len(text) < 400_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells if "import" in "".join(cell["source"]))
