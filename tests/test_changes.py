"""To change one thing, one place is edited: each of these changes is made on a copy of the six
files, as one piece of text put in at one place, and then used from the command line."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_layout import SIX

pytestmark = pytest.mark.slow
STEPS = ("train.py --data=shards/words --size=nano --max_steps=2 --batch_size=4 --block_size=16 "
         "--eval_sequences=4 --sample_tokens=4 --device=cpu --out=runs/a")
BEHIND_MIN_P = "return logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), -torch.inf)\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the six files, and shards and a run made with them."""
    folder = tmp_path_factory.mktemp("base")
    for name in SIX:
        shutil.copy(ROOT / name, folder)
    (folder / "words.txt").write_text("the cat sees a dog.\nthe dog runs under a red tree.\n" * 200)
    python(folder, "data.py words.txt --vocab_size=280")
    python(folder, STEPS)
    return folder


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def python(folder, words, ends=0):
    """What a command prints, that has to end with this code."""
    done = subprocess.run([sys.executable, "-B", *words.split()], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == ends, done.stderr
    return done.stdout + done.stderr


def insert(folder, name, behind, text):
    """Put a text into a file behind words that stand there once."""
    program = (folder / name).read_text(encoding="utf-8")
    assert program.count(behind) == 1
    (folder / name).write_text(program.replace(behind, behind + text), encoding="utf-8")


@pytest.mark.parametrize("table, row, option", [
    ("\nACTIVATIONS = {\n", '    "tanh": torch.tanh,\n', "--activation=tanh"),
    ("\nACTIVATIONS = {\n", '    "geglu": F.gelu,\n', "--activation=geglu"),
    ("\nARCHITECTURES = {\n", '    "mine": GPT2 | dict(position="rope", activation="relu2"),\n',
     "--architecture=mine"),
    ("\nSIZES = {\n", '    "pico": dict(n_layer=1, n_head=1, n_embd=8, block_size=16),\n',
     "--size=pico"),
    ("\nPOSITIONS = {\n",
     '    "late": lambda self, x, positions: (x + positions[:, None] / 99, None),\n',
     "--position=late")])
def test_a_new_part_of_the_model_is_one_row(copy, table, row, option):
    insert(copy, "model.py", table, row)
    python(copy, f"{STEPS}b {option}")
    assert option.partition("=")[2] in python(copy, "train.py --help")
    assert "tokens/s" in python(copy, "sample.py runs/ab --max_new_tokens=4")


def test_a_new_optimizer_is_one_row_and_its_runs_resume(copy):
    insert(copy, "train.py", "\nOPTIMIZERS = {\n", '    "sgd": Optimizer(0.1, lambda groups, lr, '
           '**options:\n        torch.optim.SGD(groups, lr, momentum=0.9)),\n')
    python(copy, f"{STEPS}b --optimizer=sgd")
    python(copy, "train.py --resume --out=runs/ab --max_steps=3")
    assert "did you mean sgd?" in python(copy, "train.py --optimizer=sdg", ends=1)


def test_a_new_option_is_one_field_and_is_checked_kept_and_shown(copy):
    insert(copy, "train.py", "class TrainConfig(TuneConfig):\n",
           '    """How to train."""\n'
           '    wish: int = option(3, "a number of mine", low=1, below=9)\n')
    python(copy, f"{STEPS}b --wish=4")
    assert '"wish": 4' in (copy / "runs/ab/config.json").read_text()
    assert "a number of mine (default 3)" in python(copy, "train.py --help")
    assert "wish=9 must be at least 1 and below 9" in python(copy, "train.py --wish=9", ends=1)


def test_a_new_schedule_is_one_row(copy):
    insert(copy, "train.py", "\nSCHEDULES = {", '\n    "half": lambda progress, ratio: 0.5,')
    python(copy, f"{STEPS}b --schedule=half")


def test_a_new_sampling_filter_is_one_function(copy):
    insert(copy, "sample.py", BEHIND_MIN_P, '''
@sampling_filter("keep the likeliest only")
def keep_first_only(logits, first_only: float):
    return keep_top_k(logits, 1) if first_only else logits

''')
    greedy = python(copy, "sample.py runs/a --first_only=1 --max_new_tokens=9 --seed=3")
    assert greedy.startswith(python(copy, "sample.py runs/a --first_only=1 --max_new_tokens=9 "
                                          "--seed=4").partition("runs/a")[0])
    assert "--first_only" in python(copy, "sample.py --help")


def test_a_new_text_is_one_row(copy):
    import hashlib
    text = copy / "words.txt"
    checksum = hashlib.sha256(text.read_bytes()).hexdigest()
    insert(copy, "data.py", "\nKNOWN = {\n", f'    "mine": ({text.as_uri()!r},\n'
           f'             "{checksum}"),\n')
    python(copy, "data.py mine --vocab_size=280")
    assert (copy / "shards/mine/card.json").exists()
    assert "mine" in python(copy, "data.py --help")


def test_a_new_task_is_one_row(copy):
    insert(copy, "evaluate.py", "\nTASKS = {\n", '    "dogs": Task(lambda config, texts: [dict('
           'context="the", answer=0,\n        choices=["dog", "cat"])], score_choices, '
           '{"acc": ratio}),\n')
    assert "dogs" in python(copy, "evaluate.py runs/a --tasks=dogs")
