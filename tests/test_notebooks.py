"""Every notebook runs as a script, and one is built with its outputs."""

import pathlib
import subprocess
import sys

import pytest
from helpers import python

pytestmark = pytest.mark.slow
NOTEBOOKS = pathlib.Path(__file__).parent.parent / "examples" / "notebooks"


@pytest.mark.parametrize("name", sorted(p.name for p in NOTEBOOKS.glob("*.py")))
def test_notebook_runs_as_a_script(name, tmp_path):
    assert python(NOTEBOOKS / name, cwd=tmp_path, MPLBACKEND="agg")


def test_notebook_is_built_with_its_outputs(tmp_path):
    for module in ("jupytext", "nbconvert", "ipykernel"):
        pytest.importorskip(module, reason=f"building notebooks needs {module}")
    built = tmp_path / "coming_from_pytorch.ipynb"
    source = NOTEBOOKS / "coming_from_pytorch.py"
    build = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--execute", "--output"]
    command = [*build, str(built), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    import nbformat

    cells = nbformat.read(built, 4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("text/html" in output.get("data", {}) for output in outputs)
