"""The notebooks run, and their two forms hold the same cells."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_text_and_notebook_hold_the_same_cells(name):
    jupytext = pytest.importorskip("jupytext", reason="jupytext comes with the dev extra")
    text, notebook = (jupytext.read(FOLDER / f"{name}.{end}") for end in ("py", "ipynb"))
    as_pairs = [[(c.cell_type, c.source) for c in form.cells] for form in (text, notebook)]
    assert as_pairs[0] == as_pairs[1], f"run: jupytext --sync notebooks/{name}.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, monkeypatch):
    jupytext = pytest.importorskip("jupytext", reason="jupytext comes with the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="nbclient comes with the dev extra")
    monkeypatch.setenv("NOTEBOOK_STEPS", "6")
    monkeypatch.setenv("XLA_FLAGS", "")  # as users compile it
    monkeypatch.setenv("PYTHONPATH", os.fspath(FOLDER.parent))
    notebook = jupytext.read(FOLDER / f"{name}.py")
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no picture was drawn"
