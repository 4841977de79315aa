"""Facts about the house: what lies where, who imports whom, how much it weighs."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny

import model as model_file
from train import read_log

ABOVE = {"tokenizer": "", "data": "tokenizer", "model": "", "sample": "tokenizer model",
         "train": "tokenizer data model sample", "evaluate": "tokenizer data model sample"}
CARD = {"torch", "numpy", "tiktoken", "regex", "tqdm", "matplotlib"}
SIX = [f"{name}.py" for name in ABOVE]
LEAVES = sorted(path.stem for path in (ROOT / "chapters").glob("[!_]*.py"))
COMMANDS = [name for name in LEAVES
            if b"run_command(main)" in (ROOT / f"chapters/{name}.py").read_bytes()]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def imports(tree):
    """The packages that a program imports, wherever in it the statement stands."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Import):
            yield from (alias.name.split(".")[0] for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            yield "." if part.level else part.module.split(".")[0]


def python(words, folder, **variables):
    """Run Python in a folder as a user does -> what it prints; it must not fail."""
    done = subprocess.run([sys.executable, "-B", *words], cwd=folder, capture_output=True,
                          text=True, env=dict(os.environ) | dict(PYTHONPATH="") | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def bare(tmp_path):
    """A folder that holds the six files alone."""
    return [shutil.copy(ROOT / name, tmp_path) for name in SIX] and tmp_path


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without its history")
def test_the_top_level_holds_what_the_card_says():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {path.split("/")[0] for path in tracked.splitlines()} == {
        ".ci", ".gitignore", "README.md", "requirements.txt", "chapters", "tests", *SIX}


@pytest.mark.parametrize("name", ABOVE)
def test_a_file_imports_the_cards_packages_and_files_above_it_and_may_try_the_accelerator(name):
    tree = ast.parse(text(f"{name}.py"))
    tries = [part for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
             for part in ast.walk(function) if isinstance(part, ast.Try)]
    guarded = sum([*imports(ast.Module(part.body, []))].count("chapters") for part in tries)
    assert guarded == [*imports(tree)].count("chapters") == (name == "model")
    found = {*imports(tree)} - CARD - sys.stdlib_module_names - {"chapters"}
    assert found <= {*ABOVE[name].split()}


def test_importing_a_file_does_nothing(tmp_path):
    state = "(torch.get_num_threads(), torch.initial_seed(), [*sys.argv])"
    names = ", ".join([*ABOVE, *(f"chapters.{name}" for name in LEAVES)])
    code = f"import sys, torch\nbefore = {state}\nimport {names}\nassert {state} == before"
    assert python(["-c", code, "--help"], tmp_path, PYTHONPATH=str(ROOT)) == ""
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", [*SIX, *(f"chapters/{name}.py" for name in LEAVES)])
def test_no_program_runs_what_it_has_read(name):
    tree = ast.parse(text(name))
    calls = [part for part in ast.walk(tree) if isinstance(part, ast.Call)]
    found = {ast.unparse(part) for call in calls for part in (call.func, *call.keywords)}
    assert not found & {"eval", "exec", "compile", "__import__", "torch.load", "os.system",
                        "os.popen", "shell=True", "allow_pickle=True"}
    assert not {*imports(tree)} & {"pickle", "marshal", "shelve", "dill", "joblib"}


def test_the_house_is_light():
    programs = {path: text(path).splitlines() for folder in ("", "chapters", "tests")
                for path in (ROOT / folder).glob("*.py")}
    assert sum(len(programs[ROOT / name]) for name in SIX) <= 6040
    longest = dict.fromkeys(LEAVES, 250) | dict(align=300, export=300, safety=300,
                                                serve=350)
    assert [name for name in LEAVES
            if len(programs[ROOT / f"chapters/{name}.py"]) > longest[name]] == []
    assert [line for lines in programs.values() for line in lines if len(line) > 100] == []


# Asks leaves for help, each as if in a new process, but for libraries, which stay imported.
ASK = """
import contextlib, io, json, pathlib, runpy, sys
root, *names = sys.argv[1:]
ours = {"chapters", *(path.stem for path in pathlib.Path(root).glob("*.py"))}

def shown(run, where, word):
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path[0], sys.argv[1:], out = where, ["--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run(word, run_name="__main__", **dict(alter_sys=True) if run == runpy.run_module else {})
    return out.getvalue()

print(json.dumps({name: [shown(runpy.run_module, root, f"chapters.{name}"),
                         shown(runpy.run_path, root + "/chapters", f"{root}/chapters/{name}.py")]
                  for name in names}))
"""


@pytest.mark.slow
def test_every_leaf_that_is_a_command_says_how_it_is_run_and_runs_by_its_path_too(tmp_path):
    for name, both in json.loads(python(["-c", ASK, ROOT, *COMMANDS], tmp_path)).items():
        by_name, by_path = (shown.split("\n\n", 1) for shown in both)
        assert f"chapters.{name}" in by_name[1] and by_path[1] == by_name[1]


@pytest.mark.skipif(os.name == "nt", reason="a signal of POSIX")
@pytest.mark.parametrize("words", [
    *([name] for name in SIX if name != "model.py"), ["-m", "chapters.plan"],
    *(pytest.param(["-m", f"chapters.{name}"], marks=pytest.mark.slow) for name in COMMANDS)])
def test_ctrl_c_while_libraries_are_imported_ends_a_command_in_silence(words, tmp_path):
    for library in "numpy", "torch", "regex":  # stands before the real one on the path
        (tmp_path / f"{library}.py").write_text("import os, signal\n"
                                                "os.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ) | dict(PYTHONPATH=str(tmp_path)),
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout + done.stderr) == (-signal.SIGINT, "")


def test_without_chapters_a_model_has_the_same_loss(bare):
    model, ids = tiny(), torch.arange(32).view(2, 16)
    model.use("auto")
    code = ("import torch, model; torch.manual_seed(0); assert model.accelerator() is None\n"
            f"m = model.GPT(model.GPTConfig(**{vars(model.config)})).eval(); m.use('auto')\n"
            "ids = torch.arange(32).view(2, 16); print(m(ids, ids)[1].item())")
    assert model_file.accelerator() is not None
    assert float(python(["-c", code], bare)) == pytest.approx(model(ids, ids)[1].item(), rel=1e-5)


@pytest.mark.slow
def test_without_chapters_all_six_commands_work_and_learn_the_same(bare):
    (bare / "words.txt").write_text("the cat sees a dog.\nthe dog runs under a red tree.\n" * 500)
    steps = ("--data=shards/words --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 "
             "--batch_size=4 --max_steps=4 --precision=fp32 --device=cpu")
    for command in ("tokenizer.py train words.txt --vocab_size=300 --out=t.json",
                    "data.py words.txt --tokenizer=t.json --out=shards/words",
                    f"train.py --out=runs/a {steps}", "sample.py runs/a --max_new_tokens=8",
                    "evaluate.py runs/a --max_tokens=200", f"{ROOT}/train.py --out=runs/b {steps}"):
        python(command.split(), bare)
    alone, beside = ([row["loss"] for row in read_log(bare / "runs" / name)] for name in "ab")
    assert len(alone) == 4 and alone == pytest.approx(beside, rel=1e-4)
