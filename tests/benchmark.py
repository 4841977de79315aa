"""
The figures of this project, measured here and now: medians, and ratios against the machine itself.

    python tests/benchmark.py                # all
    python tests/benchmark.py training bpe   # some of: training attention sampling saving bpe
    python tests/benchmark.py decoding       # GPT-2's shape against the weights' way through memory
    python tests/benchmark.py bpe100         # BPE training on 100 MB of installed packages
    python tests/benchmark.py --nanogpt=DIR  # training steps beside nanoGPT's, from a checkout
    python tests/benchmark.py learning --nanogpt=DIR [--text=FILE]  # time to a loss, beside its own
"""

import contextlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from data import find_files, prepare, read_documents
from model import (GPT, SIZES, GPTConfig, Linear, fused_attention, plain_attention, tiles,
                   torch_attention)
from sample import generate, has_fast_bf16, pick_device, pick_precision
from tokenizer import GPT2_SPLIT, SPECIAL_TOKENS, Tokenizer, train_fast
from train import (GraphedStep, TrainConfig, keep_freed_memory, new_run, peak_memory, read_log,
                   save_run, shape_of, snapshot, take_step, train)


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


def matmul_seconds(model, B, T, dtype):
    """How long the matrix products of a training step take alone, and their FLOPs: three for each
    linear layer, seven for each pair of attention's tiles, on tensors of their shapes."""
    c = model.config
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    kinds = Counter(((), B * T, *m.weight.shape, 1) for m in linears)
    for rows, columns in ((rows, columns) for rows, keys in tiles(T, T) for columns in keys):
        t, s = rows.stop - rows.start, columns.stop - columns.start
        kinds[(B * c.n_kv_head,), t * c.n_head // c.n_kv_head, s, c.head_size, 7 / 3] += c.n_layer
    seconds = flops = 0
    for (batch, rows, columns, inner, times), count in kinds.items():
        x, weight, d_y = (torch.randn(*batch, *shape, dtype=dtype, device=model.device) for shape in
                          ((rows, inner), (columns, inner), (rows, columns)))
        three = [(x, weight.mT), (d_y, weight), (d_y.mT, x)]
        seconds += sum(median_seconds(lambda: a @ b, 5) for a, b in three) * times * count
        flops += 2 * 3 * math.prod(batch) * rows * columns * inner * times * count
    return seconds, flops


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
            run = new_run("", model, config, device)
            shape = (config.batch_size, model.config.block_size)
            ids = torch.randint(config.vocab_size, shape, device=device)
            seconds = median_seconds(lambda: take_step(run, model, [ids], [ids], 1.0)[0].item())
            alone, flops = matmul_seconds(model, *shape, dtype)
            show(f"training {config.size}, {device} {precision}, {kernels} kernels",
                 f"{ids.numel() / seconds:,.0f} tokens/s; its matrix products alone take "
                 f"{alone / seconds:.0%} of the step, at {flops / alone / 1e9:.0f} GFLOP/s")


def attention():
    """Forward and backward of attention, 12 heads of 64, against torch's own kernel."""
    device = pick_device()
    best = pick_precision("auto", device)[1]
    for dtype, T in itertools.product(dict.fromkeys([best, torch.bfloat16]), (256, 1024, 4096)):
        q, k, v, d_y = (torch.randn(1, 12, T, 64, device=device, dtype=dtype) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]

        def milliseconds(function):
            def both():
                torch.autograd.grad(function(*inputs), inputs, d_y)
                torch.zeros(1, device=device).item()  # a GPU has then finished
            return 1000 * median_seconds(both, 9 if T < 4096 else 3)

        ours, theirs = milliseconds(fused_attention), milliseconds(torch_attention)
        plain = ""
        if dtype == best:  # in another it can take minutes
            plain = f", {ours / milliseconds(plain_attention):.2f}x of the plain twin"
        show(f"attention forward and backward, {device} {dtype}, T={T}".replace("torch.", ""),
             f"{ours:.1f} ms, {ours / theirs:.2f}x of torch's own" + plain)


# What training steps are compared on: layers, heads, channels, B, T, vocabulary.
SHAPES = {"GPT-2 124M": (12, 12, 768, 1, 1024, 50304), "10.7M": (6, 6, 384, 16, 256, 65),
          "0.8M": (4, 4, 128, 12, 64, 65)}


def nanogpt_step(folder, shape, precision, device):
    """nanoGPT's training step: its own model, optimizer, autocast and clip; compiled on GPUs."""
    found = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    nanogpt = importlib.util.module_from_spec(found)
    found.loader.exec_module(nanogpt)
    n_layer, n_head, n_embd, B, T, V = shape
    with contextlib.redirect_stdout(sys.stderr):
        model = nanogpt.GPT(nanogpt.GPTConfig(T, V, n_layer, n_head, n_embd, 0.0, False)).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    model = torch.compile(model) if device == "cuda" else model
    ids = torch.randint(V, (B, T), device=device)
    low = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def step():
        with low:
            _, loss = model(ids, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def our_step(shape, precision, device, kernels="auto", cuda_graph=False, low_memory=False):
    """Our step on the same architecture, as train.py takes it."""
    keep_freed_memory(low_memory)
    n_layer, n_head, n_embd, B, T, V = shape
    model = GPT(GPTConfig("gpt2", V, T, n_layer, n_head, n_embd=n_embd, bias=False)).to(device)
    model.use(kernels, pick_precision(precision, device)[1])
    config = TrainConfig(device=device, precision=precision, cuda_graph=cuda_graph)
    run = new_run("", model, config, device)
    ids = torch.randint(V, (B, T), device=device)
    take = GraphedStep(run, model, 1.0) if cuda_graph else (
        lambda xs, ys: take_step(run, model, xs, ys, 1.0))
    return lambda: take([ids], [ids])[0].item()


def contest(entry):
    """In a process of its own: one contestant's tokens per second and peak memory, as JSON."""
    folder, shape, options, times = json.loads(entry)
    torch.manual_seed(0)
    step = nanogpt_step(folder, shape, **options) if folder else our_step(shape, **options)
    for _ in range(6 if options["device"] == "cuda" else 1):
        step()
    seconds = median_seconds(step, times)
    print(json.dumps([shape[3] * shape[4] / seconds, peak_memory(options["device"])]))


def nanogpt(folder):
    """Training steps of nanoGPT and of ours, turn by turn, each in a process of its own."""
    device = pick_device()
    on_gpu = device == "cuda"
    fast = on_gpu or has_fast_bf16()
    if not fast:
        show("this CPU has no units for bfloat16", "all is compared in float32")
    for name, shape in SHAPES.items():
        shape = (*shape[:3], 32 * shape[3], *shape[4:]) if on_gpu else shape
        times = 20 if on_gpu or shape[2] < 384 else 3
        best = dict(precision="bf16" if fast else "fp32", device=device)
        rivals = {"nanoGPT, fp32": (folder, dict(best, precision="fp32"))}
        if fast:
            rivals["nanoGPT, bf16" + ", compiled" * on_gpu] = folder, best
        rivals[f"ours, {best['precision']}"] = "", best
        if on_gpu:
            rivals["ours, bf16, CUDA graph"] = "", dict(best, cuda_graph=True)
        else:
            rivals[f"ours, {best['precision']}, --low_memory"] = "", dict(best, low_memory=True)
        results = {rival: [] for rival in rivals}
        for rival in [*rivals, *rivals]:
            where, options = rivals[rival]
            entry = json.dumps([str(where), shape, options, times])
            done = subprocess.run([sys.executable, __file__, f"--contest={entry}"], text=True,
                                  stdout=subprocess.PIPE, check=True)
            results[rival].append(json.loads(done.stdout.splitlines()[-1]))
        for n, (rival, found) in enumerate(results.items()):
            rate, memory = max(rate for rate, _ in found), max(memory for _, memory in found)
            ratios = ", ".join(f"{rate / max(r for r, _ in others):.2f}x of {other}"
                               for other, others in [*results.items()][:n])
            show(f"training step, {name}, {device}, {rival}",
                 f"{rate:,.0f} tokens/s, {memory / 1e9:.2f} GB" + (f"; {ratios}" if ratios else ""))


# nanoGPT's published recipe for a CPU, and for a GPU; its README gives both losses.
RECIPES = {"cpu": "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
                  "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
                  "--lr_decay_iters=2000 --dropout=0.0",
           "cuda": "--log_interval=1"}
PRESETS = {"cpu": dict(size="nano", batch_size=12, micro_batch_size=12),
           "cuda": dict(size="small", block_size=256, batch_size=64, micro_batch_size=64,
                        dropout=0.2)}


def nanogpt_recipe(folder, text, device):
    """Run nanoGPT's own recipe on a text -> (seconds in its steps, its last validation loss)."""
    with tempfile.TemporaryDirectory() as copy:
        copy = Path(shutil.copytree(folder, Path(copy, "nanogpt")))
        data = copy / "data" / "shakespeare_char"
        shutil.copy(text, data / "input.txt")
        (data / "requests.py").touch()  # imported for a download that the text makes needless
        words = ["config/train_shakespeare_char.py", *RECIPES[device].split()]
        for script in ["data/shakespeare_char/prepare.py"], ["train.py", *words]:
            done = subprocess.run([sys.executable, *script], cwd=copy, capture_output=True,
                                  text=True, check=True)
    times = [float(time) / 1000 for time in re.findall(r"time ([\d.]+)ms", done.stdout)]
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    return statistics.median(times) * len(times), float(losses[-1])


def our_recipe(shards, folder, n_steps, device, seed):
    """Our run of so many steps -> (seconds in its steps, validation loss on all of the split)."""
    config = TrainConfig(data=str(shards), out=str(folder), max_steps=n_steps, eval_every=10**6,
                         eval_sequences=800, device=device, seed=seed, **PRESETS[device])
    loss = train(config, say=lambda text: None)["val_loss"]
    tokens = config.batch_size * shape_of(config, 1).block_size
    times = [tokens / row["tokens_per_second"] for row in read_log(folder)]
    return statistics.median(times) * len(times), loss


def learning(folder, text):
    """Tiny Shakespeare by characters: nanoGPT's recipe, and what we reach in parts of its time."""
    device = pick_device()
    text = text or next(iter(find_files("tinyshakespeare", Path("shards/downloads"), Counter())))
    with tempfile.TemporaryDirectory() as place:
        shards = prepare([text], Path(place, "shards"), vocab_size=256 + len(SPECIAL_TOKENS),
                         say=lambda text: None)
        theirs = [nanogpt_recipe(folder, text, device)]
        tried = Path(place, "tried")
        seconds = our_recipe(shards, tried, 40, device, 0)[0] / 40
        found = {}
        for part, seed in itertools.product((8, 5, 4, 1), range(3)):
            n_steps = round(theirs[0][0] / part / seconds)
            found.setdefault(part, []).append(
                our_recipe(shards, Path(place, f"{part}-{seed}"), n_steps, device, seed))
        theirs.append(nanogpt_recipe(folder, text, device))
        time, loss = (statistics.mean(values) for values in zip(*theirs))
        show(f"tiny Shakespeare, {device}, nanoGPT's recipe",
             f"validation loss {loss:.3f} in {time:.1f} s (two runs)")
        for part, runs in found.items():
            ours, losses = statistics.median(s for s, _ in runs), sorted(loss for _, loss in runs)
            show(f"tiny Shakespeare, {device}, ours, three seeds",
                 f"validation loss {losses[1]:.3f} ({losses[0]:.3f} to {losses[2]:.3f}) in "
                 f"{ours:.1f} s, 1/{time / ours:.1f} of that time")


def sampling():
    """Tokens per second of the default model, one sequence, with and without the cache."""
    device = pick_device()
    model = default_model(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    for cache in (True, False):
        seconds = median_seconds(lambda: list(generate(model, ids, 200, cache=cache)), 3)
        show(f"sampling, {device}, cache={cache}", f"{200 / seconds:,.0f} tokens/s")


def decoding():
    """Tokens per second of GPT-2's shape, beside the rate at which this machine streams its weights
    through products with a vector, both in turns; where transformers is installed, beside it."""
    device = pick_device()
    for precision in dict.fromkeys(["fp32", "bf16"]):
        dtype, base = pick_precision(precision, device)[1], None
        torch.manual_seed(0)
        model = GPT(GPTConfig(architecture="gpt2", **SIZES["gpt2"])).eval().to(device, dtype)
        model.use("torch" if device == "cpu" else "auto")
        for B, T in (1, 1), (1, 512), (8, 1):
            ids = torch.zeros(B, T, dtype=torch.long, device=device)
            rate, limit = in_turns(generate(model, ids, 42, temperature=0), streaming(model))
            base = base or rate
            more = f", {B * rate / base:.1f}x of one sequence" if B > 1 else ""
            show(f"decoding, GPT-2, {device} {precision}, {B} x {T} tokens of context",
                 f"{B * rate:,.1f} tokens/s; its weights stream at {limit:,.1f} a second, "
                 f"{rate / limit:.0%}{more}")
        if importlib.util.find_spec("transformers"):
            from transformers import GPT2Config, GPT2LMHeadModel
            theirs = GPT2LMHeadModel(GPT2Config()).eval().to(device, dtype)
            for T in 1, 512:
                ids = torch.zeros(1, T, dtype=torch.long, device=device)
                seconds = [median_seconds(lambda: theirs.generate(
                    ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0), 3)
                    for n in (2, 26)]
                show(f"the same by transformers, {T} tokens of context",
                     f"{24 / (seconds[1] - seconds[0]):,.1f} tokens/s")


def streaming(model):
    """A function that reads all weights of a model's products once, as a single token does."""
    weights = [layer.weight.detach() for layer in model.modules() if isinstance(layer, Linear)]
    ones = [torch.ones(1, w.size(1), device=w.device, dtype=w.dtype) for w in weights]

    def once():
        with torch.inference_mode():
            for x, w in zip(ones, weights):
                y = F.linear(x, w)
        y[0, 0].item()
    return once


def in_turns(steps, other, times=40):
    """How often a second a step is taken, and the other called, each by its median."""
    next(steps)
    other()
    seconds = [[], []]
    for _ in range(times):
        for own, function in zip(seconds, (lambda: next(steps)[0].item(), other)):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [1 / statistics.median(own) for own in seconds]


def saving():
    """How long a save holds up training, beside how long its writing takes."""
    device = pick_device()
    for config in TrainConfig(), TrainConfig(architecture="gpt2", size="gpt2"):
        model = GPT(shape_of(config, 4096)).to(device)
        run = new_run("", model, config, device)
        ids = torch.zeros(1, 8, dtype=torch.long, device=device)
        take_step(run, model, [ids], [ids], 1.0)  # now the optimizer remembers something
        state = snapshot(run)
        with tempfile.TemporaryDirectory() as folder:
            holds = median_seconds(lambda: snapshot(run), 3)
            writes = median_seconds(lambda: save_run(folder, state), 3)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        show(f"a checkpoint of {size / 1e6:,.0f} MB", f"training waits {1000 * holds:,.0f} ms, "
             f"while writing and checking take {1000 * writes:,.0f} ms")


def hugging_face(texts, vocab_size):
    """Train the byte-level BPE of Hugging Face's tokenizers on texts."""
    from tokenizers import models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Theirs
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet,
                                  special_tokens=SPECIAL_TOKENS, show_progress=False)
    theirs.train_from_iterator(texts, trainer)


def most_held(function):
    """Call function; the most bytes that this process and those it starts held meanwhile.

    It is nan where there is no /proc, which only Linux has.
    """
    def held():
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        files = [Path(f"/proc/{pid}/statm") for pid in pids]
        pages = [int(file.read_text().split()[1]) for file in files if file.exists()]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") if pages else math.nan

    def watch():
        while not done.wait(0.05):
            with contextlib.suppress(OSError):  # a process may end while we look at it
                seen.append(held())

    seen, done = [held()], threading.Event()
    threading.Thread(target=watch, daemon=True).start()
    function()
    done.set()
    return max(seen)


def bpe_training(texts, vocab_size, times):
    """Our seconds to train on texts, and where `tokenizers` is installed, how theirs compare."""
    n_bytes = sum(len(text.encode()) for text in texts)
    name = f"{n_bytes / 1e6:.1f} MB to {vocab_size:,} tokens"
    ours = median_seconds(lambda: train_fast(texts, vocab_size, pattern=GPT2_SPLIT), times)
    show(f"BPE training, {name}", f"{ours:.2f} s, {n_bytes / 1e6 / ours:.1f} MB/s")
    memory = most_held(lambda: train_fast(texts, vocab_size, pattern=GPT2_SPLIT))
    show("memory of all its processes, with PyTorch and the texts", f"{memory / 1e9:.2f} GB")
    if importlib.util.find_spec("tokenizers"):
        theirs = median_seconds(lambda: hugging_face(texts, vocab_size), times)
        show(f"the same by Hugging Face's tokenizers, {name}",
             f"{theirs:.2f} s; ours takes {ours / theirs:.2f}x")


def python_code(n_bytes):
    """About n_bytes of the .py files in this Python's site-packages."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += path.stat().st_size
        if size > n_bytes:
            break
    return texts


def bpe100():
    """Training at the size of a real tokenizer, once each."""
    bpe_training(python_code(100e6), 32_768, 1)


def bpe():
    """Training and encoding on Python's own library."""
    texts = [text for path in find_files("stdlib", None, Counter())
             for text in read_documents(path)]
    bpe_training(python_code(3.5e6), 4096, 7)
    bpe_training(texts, 4096, 3)
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
    flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
    wanted = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "contest" in flags:
        contest(flags["contest"])
    elif "learning" in wanted:
        learning(Path(flags["nanogpt"]).resolve(), flags.get("text"))
    elif "nanogpt" in flags:
        nanogpt(Path(flags["nanogpt"]).resolve())
    else:
        keep_freed_memory()
        for part in (training, attention, sampling, decoding, saving, bpe, bpe100):
            if part.__name__ in (wanted or ["training", "attention", "sampling", "saving", "bpe"]):
                part()
