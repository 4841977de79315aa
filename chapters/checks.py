"""
Checks for the exercises of the chapters, and a count of what is solved in a notebook.

    python -m chapters.checks chapters/04_attention.ipynb          # as it was stored
    python -m chapters.checks --run homework/*.ipynb               # run anew: runs their code
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL

if __name__ == "__main__":  # `python chapters/checks.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from model import check_options, option
from tokenizer import parse_options, reading, run_command

# -----------------------------------------------------------------------------
# In a notebook: the function of the reader, what it must be, and on which inputs.

ARRAYS = torch.Tensor, np.ndarray


def short(value, limit=70):
    """A value in a few words: a large tensor is its shape, a module its class."""
    if isinstance(value, ARRAYS) and np.prod(value.shape) > 8:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    text = (str if isinstance(value, Exception) else repr)(value)
    if isinstance(value, (list, tuple)) and any(isinstance(part, ARRAYS) for part in value):
        text = f"({', '.join(map(short, value))})"
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit - 3]}..."


def same(a, b, tolerance):
    """Equal, where numbers, tensors and arrays, also in lists and dicts, may differ a little."""
    if isinstance(a, ARRAYS) or isinstance(b, ARRAYS):
        a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
        return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance, equal_nan=True)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, float) or isinstance(b, float):
        return same(torch.tensor(a), torch.tensor(b), tolerance)
    return bool(a == b)


def difference(result, expected, tolerance):
    """What is wrong with a result, in words, of a list of tensors the first; "" if nothing is."""
    if same(result, expected, tolerance):
        return ""
    if (isinstance(result, (list, tuple)) and isinstance(expected, (list, tuple))
            and len(result) == len(expected) and any(isinstance(x, ARRAYS) for x in expected)):
        wrong = [same(x, y, tolerance) for x, y in zip(result, expected)].index(False)
        return f"in part {wrong + 1} of {len(expected)} " + difference(
            result[wrong], expected[wrong], tolerance)
    shapes = [tuple(x.shape) for x in (result, expected) if isinstance(x, ARRAYS)]
    if len(shapes) == 2 and shapes[0] == shapes[1] != ():
        gap = (torch.as_tensor(result).double() - torch.as_tensor(expected).double()).abs().max()
        return f"has the right shape {shapes[0]}, but is off by up to {gap:.2g}"
    return f"gives {short(result)}, not {short(expected)}"


def call(function, case):
    """function(*case) on a copy of case, with the same random numbers for whoever is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(*copy.deepcopy(case))


def judge(mine, cases, problem):
    """Print "right!", or the first case for which problem(mine(*case), its number) has words."""
    if not cases:
        raise ValueError("without a case a check cannot fail")
    for i, case in enumerate(cases):
        try:
            wrong = problem(call(mine, case), i)
        except Exception as error:  # whatever a first try does, the answer is one line
            wrong = f"raises {type(error).__name__}: {short(error)}"
        if wrong:
            return print(f"not yet: {mine.__name__}({', '.join(map(short, case))}) {wrong}")
    print("right!")


def check(mine, reference, *cases, tolerance=1e-4):
    """
    Compare mine(*case) with reference(*case) for each case, a tuple of arguments; reference may
    also be the list of the right results. Prints "right!", or the first case that differs.
    """
    if callable(reference):
        reference = [call(reference, case) for case in cases]
    if len(reference) != len(cases):
        raise ValueError(f"{len(reference)} right results for {len(cases)} cases")
    judge(mine, cases, lambda result, i: difference(result, reference[i], tolerance))


def check_that(mine, fact, *cases, wanted=""):
    """
    Call fact(mine(*case), *case) for each case; it says True if the result is right. For answers
    that are not unique. wanted says in words what was asked. Prints like check.
    """
    judge(mine, cases, lambda result, i: "" if fact(result, *cases[i]) else
          f"gives {short(result)}" + f": wanted is {wanted}" * bool(wanted))


def tokens_read(model, function, *case):
    """How many tokens go through the model while function(*case) runs."""
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    try:
        function(*case)
    finally:
        hook.remove()
    return sum(sizes)


# -----------------------------------------------------------------------------
# For who grades: how many checks of a notebook are right.


@dataclass(frozen=True)
class CheckConfig:
    """What `python -m chapters.checks` can be told."""

    notebooks: list = option([], "notebooks to count in", positional=True)
    run: bool = option(False, "run each notebook first, and with it the code of who wrote it")

    def __post_init__(self):
        check_options(self)


def execute(notebook, folder, **options):
    """Run all cells of a notebook in a new kernel, in a folder -> the notebook."""
    from nbclient import NotebookClient  # not needed by who only solves exercises

    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": folder}}, **options)
    return client.execute(stderr=DEVNULL)  # where kernels warn; what cells print is in the cells


def count(path, run=False):
    """The exercises of a notebook -> (right, all of them), from its stored or its new outputs."""
    import nbformat

    with reading(path):
        notebook = nbformat.read(path, 4)
    if run:
        execute(notebook, Path(path).resolve().parent, allow_errors=True)
    printed = [line for cell in notebook.cells if cell.cell_type == "code"
               for output in cell.outputs for line in output.get("text", "").splitlines()]
    right = printed.count("right!")
    return right, right + sum(line.startswith("not yet: ") for line in printed)


def main():
    typed, = parse_options(__doc__, CheckConfig)
    config = CheckConfig(**typed)
    if not config.notebooks:
        raise ValueError("name one or more notebooks, such as chapters/04_attention.ipynb")
    for path in config.notebooks:
        right, total = count(path, config.run)
        print(f"{path}: {right} of {total} right")


if __name__ == "__main__":
    run_command(main)
