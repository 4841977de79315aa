"""chapters/checks.py: right is right, wrong is shown with the input it fails on."""

import nbformat
import pytest
import torch

from chapters import checks
from chapters.checks import check, check_that


def double(x):
    return x * 2


@pytest.mark.parametrize("mine, reference, case, words", [
    (double, lambda x: x + x, 3, "right!"),
    (double, [6.0], 3.0, "right!"),
    (double, [dict(a=[1, 1])], dict(a=[1]), "double({'a': [1]}) raises TypeError"),
    (double, lambda x: x * 2.00001, torch.ones(3), "right!"),
    (double, lambda x: x * 3, torch.ones(2, 8), "double(a tensor of shape (2, 8)) has the right "
     "shape (2, 8), but is off by up to 1"),
    (double, lambda x: x, torch.ones(1), "double(tensor([1.])) has the right shape (1,), but"),
    (double, lambda x: x[0], torch.ones(1), "gives tensor([2.]), not tensor(1.)"),
    (double, [[1, 2]], (1, 2), "double((1, 2)) gives (1, 2, 1, 2), not [1, 2]"),
    (double, [7], 3, "double(3) gives 6, not 7"),
    (lambda x: (x, x + 1), [(torch.ones(9), torch.ones(9))], torch.ones(9),
     "(a tensor of shape (9,)) in part 2 of 2 has the right shape (9,), but is off by up to 1"),
    (type, [int], torch.nn.Linear(2, 2), "type(a Linear) gives <class 'torch.nn"),
    (double, [None], 3, "double(3) gives 6, not None")])
def test_a_check_says_right_or_the_first_input_that_fails(mine, reference, case, words, capsys):
    check(mine, reference, (case,))
    shown = capsys.readouterr().out
    assert words in shown and shown.count("\n") == 1
    assert shown == "right!\n" or shown.startswith("not yet: ")


def test_every_case_counts_and_no_function_changes_what_the_next_one_gets(capsys):
    def spoil(row):
        row.append(0)
        return row

    row = [1]
    check(spoil, lambda row: [1, 0], (row,), (row,))
    check(double, [2, 4, 5], (1,), (2,), (3,))
    assert row == [1] and capsys.readouterr().out == "right!\nnot yet: double(3) gives 6, not 5\n"


def test_both_sides_draw_the_same_random_numbers_and_ours_stay_as_they_were(capsys):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check(torch.rand, lambda n: torch.rand(n), (3,))
    assert capsys.readouterr().out == "right!\n" and torch.equal(torch.rand(3), expected)


def test_an_answer_with_many_right_results_is_judged_by_a_fact(capsys):
    check_that(double, lambda y, x: y > x, (3,), (4,))
    check_that(double, lambda y, x: y > x, (3,), (-1,), wanted="more than x")
    check_that(double, lambda y, x: y.size(0), (3,))
    assert capsys.readouterr().out.splitlines() == [
        "right!", "not yet: double(-1) gives -2: wanted is more than x",
        "not yet: double(3) raises AttributeError: 'int' object has no attribute 'size'"]


def test_a_check_that_cannot_fail_is_refused():
    for wrong in lambda: check(double, double), lambda: check(double, [2, 4], (1,)):
        with pytest.raises(ValueError, match="without a case|2 right results for 1 cases"):
            wrong()


@pytest.fixture
def homework(tmp_path):
    path = tmp_path / "homework.ipynb"
    cells = [nbformat.v4.new_code_cell(f"print({text!r})") for text in (
        "right!", "not yet: f(1) gives 2, not 3", "right! or wrong", "right!\nright!")]
    for cell, text in zip(cells, ("right!\n", "not yet: x\n")):
        cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_command_counts_what_is_stored(homework, call):
    assert call(checks, homework)[0] == f"{homework}: 1 of 2 right\n"


@pytest.mark.slow
def test_the_command_counts_anew_with_run(homework, call):
    assert call(checks, homework, "--run")[0] == f"{homework}: 3 of 4 right\n"


def test_what_is_no_notebook_is_refused_in_a_line(call, tmp_path):
    (tmp_path / "a.ipynb").write_text("no notebook")
    for words, message in (([], "name one or more notebooks"), ([tmp_path / "b.ipynb"], "No such"),
                           ([tmp_path / "a.ipynb"], "a.ipynb cannot be read")):
        shown, error = call(checks, *words)
        assert message in error and not shown
