"""What the tests share: the six files on the path, a tiny real model, a command typed by a user."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model is slower with more
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # it writes to the stderr of programs that tests start


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a second or so; runs only with --all")
    config.addinivalue_line("markers", "beside(work=f): f(parameter) runs beside the other tests")
    config.addinivalue_line("markers", "all_cores: keeps all cores busy; comes after the rest")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Without --all, what is marked slow is deselected. What wants all cores waits until the others
    are done, which leave one to what runs beside them, and that comes last."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--all"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None
                                 for name in ("beside", "all_cores")])


def pytest_collection_finish(session):
    """Begin what is marked beside: one after another, while the other tests run."""
    pool = ThreadPoolExecutor(1)
    session.config.add_cleanup(lambda: pool.shutdown(cancel_futures=True))
    for item in session.items if not session.config.option.collectonly else ():
        if mark := item.get_closest_marker("beside"):
            item.work = pool.submit(mark.kwargs["work"], *item.callspec.params.values())


@pytest.fixture
def outcome(request):
    """What the work of a test gives that is marked beside."""
    return request.node.work.result()


def tiny(architecture="modern", seed=0, **options):
    """A real model of two layers and 32 channels, whose blocks do something; it costs 10 ms."""
    import torch
    from model import GPT, GPTConfig
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, block_size=16, n_layer=2, n_head=4, n_embd=32, zero_init=False)
    return GPT(GPTConfig(architecture=architecture, **(shape | options))).eval()


def keep(model, folder, step=1, val_loss=None, **progress):
    """Save a model as the checkpoint of a step in a run's folder -> its path."""
    from model import save_model
    from tokenizer import replacing
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.safetensors"
    with replacing(path) as file:
        save_model(model, file, step=step, val_loss=val_loss, **progress)
    return path


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
