"""chapters/: every notebook runs as it is stored, and its exercises can be solved."""

import ast
import re
from types import ModuleType

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "chapters").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FOLDED = re.compile(r"<details><summary>Solutions?</summary>(.*?)</details>", re.S)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def checks(notebook):
    """What the check cells of the exercises print."""
    return [printed(cell) for cell in code_cells(notebook) if '"right!"' in cell.source]


def program(notebook):
    """All code of a notebook as one tree; lines that only a notebook understands are left out."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return ast.parse("\n".join(line for line in lines if line[:1] not in ("%", "!")))


def files():
    """What lies in the repository and in its folders, hidden files and __pycache__ aside."""
    return {*ROOT.glob("[!._]*"), *ROOT.glob("[!._]*/[!._]*")}


def execute(notebook):
    """Run all cells in a new kernel, in the folder of the notebook."""
    folder = {"metadata": {"path": ROOT / "chapters"}}
    return NotebookClient(notebook, timeout=300, resources=folder).execute()


def with_solutions(notebook):
    """The notebook with each exercise twice: as it is, then with its folded solution."""
    text = "".join("".join(FOLDED.findall(cell.source)) for cell in notebook.cells)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    solutions = {re.search(r"def (\w+)", block)[1]: block for block in blocks}
    cells, open_ones = [], []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code" and "your turn" in cell.source:
            open_ones.append(solutions[re.search(r"def (\w+)", cell.source)[1]])
        if cell.cell_type == "code" and '"right!"' in cell.source:
            cells += map(nbformat.v4.new_code_cell, [*open_ones, cell.source])
            open_ones = []
    assert not open_ones
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


@each
def test_a_notebook_is_stored_as_it_was_run_top_to_bottom(path):
    cells = code_cells(nbformat.read(path, 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds and sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@each
def test_a_notebook_can_be_read_in_a_narrow_column_on_any_machine(path):
    notebook = nbformat.read(path, 4)
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 25
        assert max(map(len, cell.source.splitlines())) <= 80
    shown = "".join(map(printed, code_cells(notebook)))
    assert not re.search(r"/tmp|/work|/root|/home|/Users|[A-Z]:\\|site-packages|Warning", shown)


@each
def test_exercises_are_stored_unsolved(path):
    texts = checks(nbformat.read(path, 4))
    assert texts and all(text.startswith("not yet") for text in texts)


@each
def test_what_a_notebook_takes_from_the_files_is_there(path):
    nodes, found = [*ast.walk(program(nbformat.read(path, 4)))], {}
    for statement in (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))):
        exec(ast.unparse(statement), found)
    changed = {node.id for node in nodes if isinstance(node, ast.Name)
               and not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = found.get(node.value.id)
            if isinstance(module, ModuleType) and node.value.id not in changed:
                assert hasattr(module, node.attr), ast.unparse(node)


@pytest.mark.slow
@each
def test_a_notebook_runs_leaves_no_file_and_its_folded_solutions_alone_are_right(path):
    before = files()
    texts = checks(execute(with_solutions(nbformat.read(path, 4))))
    assert texts and all(text.startswith("not yet") for text in texts[::2])
    assert all(text.startswith("right!") for text in texts[1::2])
    assert files() == before
