"""chapters/: every notebook runs as it is stored, explains in order, and can be solved."""

import ast
import os
import re
import statistics
import subprocess
import sys
from types import ModuleType

import nbformat
import pytest
from conftest import ROOT

from chapters.checks import execute

NOTEBOOKS = sorted((ROOT / "chapters").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FOLDED = re.compile(r"<details><summary>Solutions?</summary>(.*?)</details>", re.S)
CODE = re.compile(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|https?://\S+", re.S)


def read(path):
    return nbformat.read(path, 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "")
                   for output in cell.outputs)


def program(cell):
    """The code of a cell as a tree; lines that only a notebook understands are left out."""
    return ast.parse(re.sub("^[%!].*", "", cell.source, flags=re.M))


def open_parts(cell):
    """The functions and classes of a cell that wait for their reader."""
    rows = cell.source.splitlines()
    return [node for node in program(cell).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and "your turn" in "".join(rows[node.lineno - 1:node.end_lineno])]


def exercises(notebook):
    return [cell for cell in code_cells(notebook) if "your turn" in cell.source]


def titles(notebook, start):
    """The headings that begin with these words -> the texts of their cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"
            and re.search(rf"^#+ {start}", cell.source, re.M)]


def solutions(notebook):
    """{name: program} of the folded solutions."""
    text = "".join("".join(FOLDED.findall(cell.source)) for cell in notebook.cells)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    return {re.search(r"^(?:def|class) (\w+)", block, re.M)[1]: block for block in blocks}


def solved(cell, answers):
    """The source of an exercise with the folded solutions in the place of what is open."""
    rows = cell.source.splitlines()
    for node in reversed(open_parts(cell)):
        rows[node.lineno - 1:node.end_lineno] = answers[node.name].splitlines()
    return "\n".join(rows)


def with_solutions(notebook):
    """The notebook with each exercise twice: as it is, then with its folded solution."""
    answers, cells = solutions(notebook), []
    for cell in notebook.cells:
        cells.append(cell)
        if cell in exercises(notebook):
            cells.append(nbformat.v4.new_code_cell(solved(cell, answers)))
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def files():
    """What lies in the repository and in its folders, hidden files and __pycache__ aside."""
    return {*ROOT.glob("[!._]*"), *ROOT.glob("[!._]*/[!._]*")}


# -----------------------------------------------------------------------------
# As it is stored.


@each
def test_a_notebook_is_stored_as_it_was_run_top_to_bottom(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs
                if output.output_type == "error" or output.get("name") == "stderr"]


@each
def test_a_notebook_goes_in_small_steps_that_fit_a_narrow_column(path):
    notebook = read(path)
    rows = [cell.source.splitlines() for cell in code_cells(notebook)]
    assert len(notebook.cells) <= 60
    assert statistics.median(map(len, rows)) <= 8
    assert [lines for lines in rows if len(lines) > 20
            and not any(line.startswith("class ") for line in lines)] == []
    assert [line for lines in rows for line in lines if len(line) > 76] == []  # also in print
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert "ccc" not in kinds


@each
def test_what_a_notebook_prints_holds_on_any_machine(path):
    shown = "".join(map(printed, code_cells(read(path))))
    assert not re.search(r"/tmp|/work|/root|/home|/Users|[A-Z]:\\|site-packages|Warning", shown)


@each
def test_a_notebook_has_what_a_course_needs(path):
    notebook = read(path)
    drawn = [cell for cell in code_cells(notebook) if re.search(r"\b(diagram|grids)\(", cell.source)
             and any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(exercises(notebook)) >= 6 and len(drawn) >= 2
    assert re.search(r"\*\*You need:\*\*.*\n*\*\*Time:\*\*", notebook.cells[0].source)
    assert all(titles(notebook, start) for start in ("Assignment", "Experiment", "Exercise"))
    recap, = titles(notebook, "Recap")
    sources, = titles(notebook, "Sources")
    assert len(re.findall(r"^\d\. ", recap, re.M)) == 5
    assert 3 <= len(re.findall(r"^(?:-|\d\.) ", sources.split("# Sources")[1], re.M)) <= 6


@each
def test_exercises_are_stored_unsolved_and_each_has_a_folded_solution(path):
    notebook = read(path)
    answers = solutions(notebook)
    for cell in exercises(notebook):
        assert {node.name for node in open_parts(cell)} <= answers.keys()
        lines = printed(cell).splitlines()
        assert lines and all(line.startswith("not yet: ") for line in lines), cell.source


@each
def test_what_a_notebook_takes_from_the_files_is_there(path):
    found, cells = {}, code_cells(read(path))
    nodes = [node for cell in cells for node in ast.walk(program(cell))]
    for statement in (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))):
        exec(ast.unparse(statement), found)
    changed = {node.id for node in nodes if isinstance(node, ast.Name)
               and not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = found.get(node.value.id)
            if isinstance(module, ModuleType) and node.value.id not in changed:
                assert hasattr(module, node.attr), ast.unparse(node)


def test_the_hours_of_a_chapter_are_the_same_wherever_they_stand():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = "".join(cell.source for cell in code_cells(read(NOTEBOOKS[0])))
    for path in NOTEBOOKS:
        n, unit = re.search(r"\*\*Time:\*\* about ([\d.]+) (hour|minutes)",
                            read(path).cells[0].source).groups()
        hours = f"{float(n) / (60 if unit == 'minutes' else 1):g}"
        assert f"[{path.stem}](chapters/{path.name}) | {hours} |" in readme
        assert f'"{path.stem[:2]} {path.stem[3:]}\\n{hours} h"' in start


# -----------------------------------------------------------------------------
# In order: each term is introduced where it first stands.


def prose(path):
    """The sentences of a notebook: no code, no formulas, headings, sources or glossary."""
    text = "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    lists = re.compile(r"^## (Sources|Glossary).*?(?=^#|\Z)", re.M | re.S)
    text = CODE.sub(" ", lists.sub("", FOLDED.sub("", text)))
    return " ".join(re.sub(r"^#.*", "", text, flags=re.M).split())


def glossary():
    """The table at the end of chapter 1: {term: the chapters that explain it}."""
    table = read(ROOT / "chapters/01_foundations.ipynb").cells[-1].source
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([\d, ]+) \|", table, re.M)
    return {term.strip(): [int(n) for n in chapters.split(",")] for term, _, chapters in rows}


def walk(terms, texts):
    """Read the chapters in order -> what a reader meets before it is explained, a line each."""
    for term, chapters in terms.items():
        words = re.compile(rf"(?<![\w-]){re.escape(term)}(?:s|es)?(?![\w-])", re.I)
        bold = re.compile(rf"\*\*{re.escape(term)}(?:s|es)?\*\*", re.I)
        places = {n: found.start() for n, text in texts.items() if (found := words.search(text))}
        marked = [n for n, text in texts.items() for _ in bold.findall(text)]
        first = min(places, default=None)
        if marked != chapters[:1]:
            yield f"{term}: in bold in {marked}, the glossary says {chapters[0]}"
        elif first != chapters[0] or bold.search(texts[first]).start() != places[first] - 2:
            start = places[first]
            yield f"{term}: met in {first} before: {texts[first][max(0, start - 40):start + 40]}"


def test_a_reader_meets_no_term_of_the_glossary_before_it_is_explained():
    texts = {}
    for path in NOTEBOOKS:  # chapter 3 has two
        texts[int(path.stem[:2])] = f"{texts.get(int(path.stem[:2]), '')} {prose(path)}"
    terms = glossary()
    assert len(terms) > 100
    assert [*walk(terms, texts)] == []


def test_the_walk_finds_a_term_that_comes_too_early_and_one_that_is_never_explained():
    texts = {0: "A tensor is a table.", 1: "A **tensor** has a **shape**, and shapes add up."}
    found = [*walk({"tensor": [1], "shape": [1], "loss": [0], "table": [1]}, texts)]
    assert [line.split(":")[0] for line in found] == ["tensor", "loss", "table"]


# -----------------------------------------------------------------------------
# As it runs.


def run_with_solutions(path):
    """-> (the notebook as it ran, with and without its solutions, files that it left)"""
    before = files()
    return execute(with_solutions(read(path)), path.parent), files() - before


@pytest.mark.slow
@pytest.mark.beside(work=run_with_solutions)
@each
def test_a_notebook_runs_leaves_no_file_and_its_folded_solutions_alone_are_right(path, outcome):
    notebook, left = outcome
    cells = code_cells(notebook)
    for cell, answer in zip(cells, cells[1:]):
        if "your turn" in cell.source:
            assert all(line.startswith("not yet: ") for line in printed(cell).splitlines())
            assert {*printed(answer).splitlines()} == {"right!"}, answer.source
    assert left == set()


@each
def test_every_notebook_begins_with_the_same_cell(path):
    assert code_cells(read(path))[0].source == code_cells(read(NOTEBOOKS[0]))[0].source


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without its history")
def test_that_cell_fetches_the_project_into_an_empty_folder_once(tmp_path):
    first, *_ = code_cells(read(NOTEBOOKS[0]))
    imports = "\n".join(code_cells(read(path))[1].source for path in NOTEBOOKS)
    code = f"{first.source}\n{imports}\nimport model; print(model.__file__)"
    trust = dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="safe.directory", GIT_CONFIG_VALUE_0="*")
    variables = dict(os.environ, COURSE=str(ROOT), PIP_NO_INDEX="1", **trust)
    for _ in range(2):  # the second time it is there
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = tmp_path / "course/chapters" / done.stdout.split("\n")[-2]
        assert found.resolve() == tmp_path.resolve() / "course/model.py"
