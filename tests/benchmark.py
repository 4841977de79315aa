"""
The figures of this project, measured here and now: medians, and ratios against the machine itself.

    python tests/benchmark.py                # all
    python tests/benchmark.py training bpe   # some of: training sampling bpe
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from data import prepare, read_documents, standard_library
from model import GPT, Linear
from sample import generate, pick_device, pick_precision
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_fast
from train import TrainConfig, build_optimizer, clip_gradients, keep_freed_memory, shape_of


def median_seconds(function, times=7):
    """The median of a few calls, after one that warms up."""
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def show(name, value):
    print(f"{name:58} {value}", flush=True)


def matmul_rate(model, n_rows, dtype):
    """FLOP/s of the matrix products of a training step alone: each linear layer's three, timed in
    torch on n_rows rows."""
    flops = seconds = 0
    for n_out, n_in in (m.weight.shape for m in model.modules() if isinstance(m, Linear)):
        shapes = (n_rows, n_in), (n_out, n_in), (n_rows, n_out)
        x, weight, d_y = (torch.randn(*shape, dtype=dtype, device=model.device) for shape in shapes)
        for product in (lambda: x @ weight.T, lambda: d_y @ weight, lambda: d_y.T @ x):
            seconds += median_seconds(product, 3)
            flops += 2 * n_rows * n_out * n_in
    return flops / seconds


def default_model(device):
    return GPT(shape_of(TrainConfig(), TrainConfig().vocab_size)).to(device)


def training():
    """The step of the default run, in each precision, against the matrix products in it."""
    config, device = TrainConfig(), pick_device()
    best = pick_precision("auto", device)[0]
    for precision in dict.fromkeys([best, "fp32"]):
        dtype = pick_precision(precision, device)[1]
        for kernels in ("plain", "auto"):
            torch.manual_seed(0)
            model = default_model(device)
            kernels = model.use(kernels, dtype)
            optimizer = build_optimizer(model, config)
            shape = (config.batch_size, model.config.block_size)
            ids = torch.randint(config.vocab_size, shape, device=device)

            def step():
                model(ids, ids)[1].backward()
                clip_gradients(model, 1.0).item()
                optimizer.step()
                optimizer.zero_grad()

            seconds = median_seconds(step)
            rate = model.flops_per_token() * ids.numel() / seconds
            limit = matmul_rate(model, ids.numel(), dtype)
            show(f"training {config.size}, {device} {precision}, {kernels} kernels",
                 f"{ids.numel() / seconds:,.0f} tokens/s, {rate / 1e9:.0f} GFLOP/s, "
                 f"{rate / limit:.0%} of the {limit / 1e9:.0f} of its matrix products alone")


def sampling():
    """Tokens per second of the default model, one sequence, with and without the cache."""
    device = pick_device()
    model = default_model(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    for cache in (True, False):
        seconds = median_seconds(lambda: list(generate(model, ids, 200, cache=cache)), 3)
        show(f"sampling, {device}, cache={cache}", f"{200 / seconds:,.0f} tokens/s")


def bpe():
    """Training and encoding on Python's own library."""
    texts = [text for path in standard_library() for text in read_documents(path)]
    n_bytes = sum(len(text.encode()) for text in texts)
    seconds = median_seconds(lambda: train_fast(texts, 4096), 3)
    show(f"BPE training, {n_bytes / 1e6:.1f} MB to 4,096 tokens",
         f"{seconds:.2f} s, {n_bytes / 1e6 / seconds:.1f} MB/s")
    tokenizer = Tokenizer(train_fast(texts, 4096), SPECIAL_TOKENS)
    joined = "\n".join(texts)[:4_000_000]
    n_bytes = len(joined.encode())
    twin = tokenizer.to_tiktoken()
    for name, encode in ("ours", tokenizer.encode), ("tiktoken", twin.encode_ordinary):
        seconds = median_seconds(lambda: encode(joined), 3)
        show(f"encoding, {name}, one thread", f"{n_bytes / 1e6 / seconds:.1f} MB/s")
    parts = texts[:len(texts) // 2]
    n_bytes = sum(len(text.encode()) for text in parts)
    ours = median_seconds(lambda: tokenizer.encode_batch(parts), 5)
    theirs = median_seconds(lambda: twin.encode_ordinary_batch(parts), 5)
    show("encoding a batch on all cores",
         f"{n_bytes / 1e6 / ours:.1f} MB/s, {theirs / ours:.2f}x of tiktoken's own call")


if __name__ == "__main__":
    keep_freed_memory()
    wanted = sys.argv[1:] or ["training", "sampling", "bpe"]
    for part in (training, sampling, bpe):
        if part.__name__ in wanted:
            part()
