"""The notebooks of examples/ run from top to bottom, with little data."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
SMALL = """
NUM_TRAIN, NUM_VALIDATION = 12, 4
SETTINGS = {"max_steps": 2, "use_cpu": True}
"""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"coco_data", "video", "yolo_data"}


@every_notebook
def test_a_notebook_has_parameters_and_no_outputs(path):
    """Outputs would change with each run, and fill the repository with pictures."""
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.metadata.get("tags") for cell in cells if cell.cell_type == "code"].count(["parameters"]) == 1
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    for cell in cells:
        compile(cell.source, path.name, "exec") if cell.cell_type == "code" else None


@every_notebook
def test_links_of_a_notebook_lead_to_files(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    parameters.source += SMALL
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises the error of a cell that fails
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
