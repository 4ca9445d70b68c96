"""The notebooks as they are stored: listed, run from a clean kernel, with outputs and without a machine's traces.

`make tutorials` runs them.
"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "tutorials").glob("*.ipynb"))}


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return json.loads(NOTEBOOKS[request.param].read_text(encoding="utf8"))


def code_of(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_in_the_documentation_once():
    page = (ROOT / "docs" / "tutorials.md").read_text(encoding="utf8")
    assert sorted(re.findall(r"^notebooks/(\w+)$", page, re.M)) == list(NOTEBOOKS)
    assert sorted(re.findall(r"^- `tutorials/(\w+)\.ipynb`:", page, re.M)) == list(NOTEBOOKS)


def test_its_cells_were_run_in_order_from_a_clean_kernel(notebook):
    counts = [cell["execution_count"] for cell in code_of(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_what_its_cells_print_and_show_is_stored(notebook):
    for cell in code_of(notebook):
        source, kinds = "".join(cell["source"]), {output["output_type"] for output in cell["outputs"]}
        called = {ast.unparse(call.func) for statement in ast.parse(source).body for call in _run_now(statement)}
        assert "print" not in called or "stream" in kinds, source
        assert "plt.subplots" not in called or "display_data" in kinds, source
        assert "error" not in kinds, source


def _run_now(statement):
    """Return the calls of a statement that are made when it is run: not those inside a function or class."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return []
    return [node for node in ast.walk(statement) if isinstance(node, ast.Call)]


def test_nothing_went_wrong_and_no_machine_shows(notebook):
    for cell in code_of(notebook):
        for output in cell["outputs"]:
            assert output.get("name") != "stderr", output
            text = json.dumps({key: value for key, value in output.items() if key != "data"})
            text += json.dumps({kind: data for kind, data in output.get("data", {}).items() if kind.startswith("text")})
            assert not re.search(r"/(tmp|home|root|work|Users)/|site-packages", text), text


def test_it_begins_with_a_title_and_every_code_cell_is_short(notebook):
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    assert all("".join(cell["source"]).count("\n") < 45 for cell in code_of(notebook))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
