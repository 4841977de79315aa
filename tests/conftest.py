"""What the tests share: the six files on the path, a tiny real model, a command typed by a user."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a few seconds (notebooks, whole runs)")


def tiny(architecture="modern", seed=0, **options):
    """A real model of two layers and 32 channels; it costs 10 ms."""
    import torch
    from model import GPT, GPTConfig
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, block_size=16, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(architecture=architecture, **(shape | options))).eval()


def run(*words, cwd=ROOT, timeout=300, **options):
    """`python WORDS ...` as a user types it; the finished process with its output as text."""
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", timeout=timeout, stdin=subprocess.DEVNULL, **options)
