"""What the tests share: the six files on the path, a tiny real model, a command typed by a user."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model is slower with more


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a few seconds (notebooks, whole runs)")


def tiny(architecture="modern", seed=0, **options):
    """A real model of two layers and 32 channels, whose blocks do something; it costs 10 ms."""
    import torch
    from model import GPT, GPTConfig
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, block_size=16, n_layer=2, n_head=4, n_embd=32, zero_init=False)
    return GPT(GPTConfig(architecture=architecture, **(shape | options))).eval()


def keep(model, folder, step=1, val_loss=None, **state):
    """Save a checkpoint of a run as train.py does."""
    from model import pack
    from train import save_run
    save_run(folder, pack(model, step=step, val_loss=val_loss, **state), keep=100)


def run(*words, cwd=ROOT, timeout=300, **options):
    """`python WORDS ...` as a user types it; the finished process with its output as text."""
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", timeout=timeout, stdin=subprocess.DEVNULL, **options)


def mistake(main, monkeypatch, capsys, *words):
    """Call a command's main() as a user typed it, who made a mistake -> (exit code, its lines)."""
    from tokenizer import run_command
    monkeypatch.setattr("sys.argv", ["command.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    return 1 if isinstance(end.value.code, str) else end.value.code, said.splitlines()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of shards made from 60 kB of simple sentences, with a tokenizer of 320 tokens."""
    from data import prepare
    folder = tmp_path_factory.mktemp("data")
    random = Random(0)
    words = "the a cat dog sees likes big red old bird tree on under runs sits".split()
    lines = (" ".join(random.choices(words, k=8)) + ".\n" for _ in range(1500))
    (folder / "words.txt").write_text("".join(lines), encoding="utf-8")
    return prepare([folder / "words.txt"], folder / "words", vocab_size=320, say=lambda text: None)


@pytest.fixture(scope="session")
def tokenizer(shards):
    from tokenizer import Tokenizer
    return Tokenizer.load(shards / "tokenizer.json")


@pytest.fixture(scope="session")
def model(tokenizer):
    """An untrained model that fits the tokenizer."""
    return tiny(vocab_size=tokenizer.n_vocab, block_size=64)


@pytest.fixture
def call(monkeypatch, capfd):
    """call(module, words...) calls its command -> (text on stdout, text on stderr)."""
    from tokenizer import run_command

    def call(module, *words):
        monkeypatch.setattr("sys.argv", [module.__name__ + ".py", *map(str, words)])
        try:
            run_command(module.main)
        except SystemExit as end:
            print(end, file=sys.stderr)
        return capfd.readouterr()
    return call
