"""
The figures of this project, measured here and now: medians, and ratios against a peer in one run.

    python tests/benchmark.py                # training attention twins sampling saving bpe
    python tests/benchmark.py twins bpe      # some of these parts, or of decoding export muon
                                             # speculative batching bandwidth recompute bpe100
                                             # curation pages chapters serving endurance scale
                                             # retrieval distillation
    python tests/benchmark.py --nanogpt=DIR  # training steps beside nanoGPT's, from a checkout
    python tests/benchmark.py learning --nanogpt=DIR [--text=FILE]  # time to a loss, beside its own
"""

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import tracemalloc
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.distributed as dist
import torch.nn.functional as F

import page_extractors
from conftest import keep
from chapters import distill
from chapters.batching import Engine, Request
from chapters.checks import execute
from chapters.cuda_kernels import cuda_norm, cuda_rotary, launch
from chapters.curate import first_ones, near_duplicates, new_lines
from chapters.choices import CurateConfig
from chapters.facts import draw_pairs, find, tell, train_reader, world_tokenizer
from chapters.onnx_files import to_onnx
from chapters.pipeline import bubble, one_f_one_b
from chapters.processes import counted_bytes, spawn
from chapters.scale import Layout, Shape, all_reduce_bytes, held_bytes, sent
from chapters.speculative import NgramDraft, RunDraft
from chapters.speculative import write as speculate_text
from chapters.stages import new_record, text_stages
from chapters.retrieval import train_encoder
from chapters.trials import fit, new_model, sequences, text_ids
from data import find_files, prepare, read_documents
from evaluate import wilson
from model import (BITS, GPT, KERNELS, SIZES, GPTConfig, Linear, QuantEmbedding, QuantLinear,
                   accelerator, fused_attention, option, plain_attention, plain_rotary, quantize,
                   rotary_table, torch_attention)
from sample import (PRECISIONS, SampleConfig, complete, complete_batch, end_ids, generate, load_run,
                    new_cache, pick_device, pick_precision)
from tokenizer import (GPT2_SPLIT, SPECIAL_TOKENS, Tokenizer, nearest, parse_options, refuse_idle,
                       run_command, train_fast)
from train import (TrainConfig, build_schedule, gradients, matmul_rate, model_shape, new_run,
                   parallelize, part, peak_memory, read_log, save_run, snapshot, split_batch,
                   start_processes, take_step, train, update)

# -----------------------------------------------------------------------------
# The machine, the clock, and what is printed.

UNITS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16",
         "amx_bf16": "AMX bf16", "asimd": "NEON", "bf16": "bf16"}  # by a processor's flags


def machine():
    """What this machine has, in a line: processor, cores, units, memory, torch, GPU."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)|$", text)[1] or platform.processor()
    flags = (re.search(r"(?:flags|Features)\s*: (.*)|$", text)[1] or "").split()
    units = " ".join(unit for flag, unit in UNITS.items() if flag in flags) or "units unknown"
    memory = "memory unknown"
    with contextlib.suppress(AttributeError, ValueError):  # Windows has no sysconf
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        "Apple GPU" if torch.backends.mps.is_available() else "no GPU")
    return (f"{name or platform.machine()}, {os.cpu_count()} cores, {units}, {memory}; "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads; {gpu}")


def medians(*functions, times=7, clock=time.perf_counter):
    """The seconds of each function, by the medians of calls in turns, after one that warms up."""
    seconds = [[] for _ in functions]
    for _ in range(times + 1):
        for own, function in zip(seconds, functions):
            start = clock()
            function()
            own.append(clock() - start)
    return [statistics.median(own[1:]) for own in seconds]


def show(name, value):
    print(f"{name:58} {value}", flush=True)


# -----------------------------------------------------------------------------
# Training: whole steps, the optimizer's share, and each fast twin beside the plain one.

DEVICE, DEFAULT = pick_device(), TrainConfig()
BEST = pick_precision("auto", DEVICE)[0]
SHAPE = model_shape(DEFAULT.size, DEFAULT.vocab_size)  # of the default run


def prepare_step(shape, B, precision=BEST, kernels="auto", **options):
    """-> (a run of a new model with options of TrainConfig, ids (B, T) to train on, the kernels it
    uses)"""
    torch.manual_seed(0)
    model, config = GPT(shape).to(DEVICE), TrainConfig(**options)
    kernels = model.use(kernels, pick_precision(precision, DEVICE)[1], config.recompute, B)
    run = new_run("", model, config, DEVICE)
    return run, torch.randint(shape.vocab_size, (B, shape.block_size), device=DEVICE), kernels


def training():
    """The step of the default run, in each precision, against this machine's matrix products."""
    for precision, kernels in itertools.product(dict.fromkeys([BEST, "fp32"]), ("plain", "auto")):
        run, ids, kernels = prepare_step(SHAPE, DEFAULT.batch_size, precision, kernels)
        seconds, = medians(lambda: take_step(run, run.model, [ids], [ids], 1.0)[0].item())
        best = matmul_rate(run.model.device, run.model.dtype)
        used = run.model.flops_per_token() * ids.numel() / seconds / best
        show(f"training {DEFAULT.size}, {DEVICE} {precision}, {kernels} kernels",
             f"{ids.numel() / seconds:,.0f} tokens/s, {used:.0%} of the rate of matrix products")


def muon():
    """The optimizer's share of a step: GPT-2's of 32 sequences of 1,024 tokens, the default's."""
    parts = (32, 1) if DEVICE == "cuda" else (1, 32)  # sequences in a pass, passes in a step
    shapes = [("GPT-2", GPTConfig("gpt2", **SIZES["gpt2"]), *parts),
              ("the default run", SHAPE, DEFAULT.batch_size, 1)]
    for (name, shape, B, n_passes), optimizer in itertools.product(shapes, ("muon", "adamw")):
        run, ids, _ = prepare_step(shape, B, optimizer=optimizer)

        def step():
            update(run)
            next(run.model.parameters())[0, 0].item()  # a GPU has then finished

        one, own = medians(
            lambda: gradients(run, run.model, [(ids, ids)], 1, 1.0)[0].item(), step, times=3)
        show(f"{optimizer}, {name}, {DEVICE} {BEST}",
             f"{1000 * own:,.0f} ms, {own / (n_passes * one + own):.1%} of a step of {n_passes} x "
             f"{B} sequences, which take {n_passes} x {1000 * one:,.0f} ms")


def compare(name, functions, inputs, times=15):
    """Show how long functions take on the same inputs, forward and backward, beside the first."""
    leaves = [x for x in inputs if torch.is_grad_enabled() and getattr(x, "requires_grad", False)]

    def call(function):
        y = function(*inputs)
        y = torch.autograd.grad(y, leaves, torch.ones_like(y))[0] if leaves else y
        y.flatten()[0].item()  # a GPU has then finished

    found = medians(*(partial(call, function) for function in functions), times=times)
    show(name, ", ".join(f"{function.__name__} {1000 * seconds:.2f} ms ({seconds / found[0]:.2f}x)"
                         for function, seconds in zip(functions, found)))


def twins():
    """Each function of a model by every kernel that can run here, at the default run's shape."""
    B, c, dtype = DEFAULT.batch_size, SHAPE, pick_precision(BEST, DEVICE)[1]
    T, C, V, D, H, K = c.block_size, c.n_embd, c.vocab_size, c.head_size, c.n_head, c.n_kv_head
    hidden = GPT(c).transformer.blocks[0].mlp.up_proj.weight.size(0)

    def x(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)

    weight = x(hidden, C, dtype=torch.float32)
    inputs = dict(
        attention=(x(B, H, T, D), x(B, K, T, D), x(B, K, T, D)), linear=(x(B, T, C), weight),
        loss=(x(B * T, C), x(V, C, dtype=torch.float32), torch.randint(V, (B * T,), device=DEVICE)),
        norm=(x(B, T, C), x(C, dtype=torch.float32)),
        rotary=(x(B, T, H, D), *rotary_table(c, torch.arange(T, device=DEVICE))))
    rows = accelerator().rows(KERNELS, torch.device(DEVICE), dtype).values()
    for name, given in inputs.items():
        compare(f"{name}, {DEVICE} {BEST}", dict.fromkeys(row[name] for row in rows), given)
    with torch.inference_mode():
        compare(f"linear of eight tokens, {DEVICE} fp32", dict.fromkeys(
            row["linear"] for row in rows), (torch.randn(8, 1, C, device=DEVICE), weight), 99)


def attention():
    """Attention with 12 heads of 64 against torch's own kernel."""
    for precision, T in itertools.product(dict.fromkeys([BEST, "bf16"]), (256, 1024, 4096)):
        inputs = [torch.randn(1, 12, T, 64, device=DEVICE, requires_grad=True,
                              dtype=pick_precision(precision, DEVICE)[1]) for _ in range(3)]
        plain = [plain_attention] * (precision == BEST)  # in another it can take minutes
        compare(f"attention, {DEVICE} {precision}, T={T}",
                [torch_attention, fused_attention, *plain], inputs, 9 if T < 4096 else 3)


def replayed(function, times=10):
    """The seconds that a GPU takes for a function when it never waits for Python: of a CUDA graph
    in which it is recorded so many times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            function()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return medians(replay, times=15)[0] / times


def both_ways(function, x, *others):
    """A function forward and backward, with x as the gradient if its result is no scalar."""
    y, leaves = function(x, *others), [z for z in (x, *others) if z.requires_grad]
    torch.autograd.grad(y, leaves, x.detach() if y.dim() else None)


def bandwidth(B=32, T=1024, C=768, D=64, V=50304):
    """The kernels in CUDA C beside torch's, forward and backward: time on the GPU, and how fast the
    bytes pass that must be read and written at least. GPT-2's shape; of the loss one tile."""
    if DEVICE != "cuda":
        raise ValueError("bandwidth measures kernels in CUDA C: it needs an NVIDIA GPU")

    def x(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)

    def loss_kernel(logits, targets):
        with torch.no_grad():
            launch("loss", 8, len(logits), 512, logits, targets, losses, V, V, True, 0.0, 0.0, 0.0)

    stream, heads, logits = x(B, T, C), x(B, T, C // D, D), x(2**28 // V, V)
    losses, weight, bias = (x(n, dtype=torch.float32) for n in (len(logits), C, C))
    table = rotary_table(GPTConfig("modern", n_embd=C, n_head=C // D),
                         torch.arange(T, device=DEVICE))
    targets = torch.randint(V, (len(logits),), device=DEVICE)
    short, shift, one = (w.detach().bfloat16().requires_grad_() for w in (weight, bias, weight[:D]))
    copied = torch.empty_like(logits)
    rows = {  # name: numbers that are read and written, torch's function, ours
        "copying": (2 * logits.numel(), lambda: copied.copy_(logits.detach()), None),
        "LayerNorm": (
            5 * stream.numel(),
            partial(both_ways, lambda x, w, b: F.layer_norm(x, (C,), w, b), stream, short, shift),
            partial(both_ways, lambda x, w, b: cuda_norm(x, w, b, True), stream, weight, bias)),
        "RMSNorm": (5 * stream.numel(),
                    partial(both_ways, lambda x, w: F.rms_norm(x, (C,), w, 1e-6), stream, short),
                    partial(both_ways, cuda_norm, stream, weight)),
        "RMSNorm of heads": (
            5 * heads.numel(),
            partial(both_ways, lambda x, w: F.rms_norm(x, (D,), w, 1e-6), heads, one),
            partial(both_ways, cuda_norm, heads, weight[:D].detach().requires_grad_())),
        "rotary positions": (4 * heads.numel(), partial(both_ways, plain_rotary, heads, *table),
                             partial(both_ways, cuda_rotary, heads, *table)),
        "loss of logits": (2 * logits.numel(),
                           partial(both_ways, F.cross_entropy, logits, targets),
                           partial(loss_kernel, logits, targets))}
    for name, (n, *functions) in rows.items():
        found = [replayed(function) for function in functions if function]
        show(f"{name}, {DEVICE} bf16, both ways: torch's and ours", ", ".join(
            f"{1e6 * seconds:,.0f} us ({2 * n / seconds / 1e9:,.0f} GB/s)" for seconds in found)
            + f", {found[0] / found[-1]:.2f}x as fast")


# -----------------------------------------------------------------------------
# Beside nanoGPT, from a checkout: training steps, and the time to a loss.

# What training steps are compared on: layers, heads, channels, B, T, vocabulary.
SHAPES = {"GPT-2 124M": (12, 12, 768, 1, 1024, 50304), "10.7M": (6, 6, 384, 16, 256, 65),
          "0.8M": (4, 4, 128, 12, 64, 65)}
LARGE_SHAPES = {"GPT-2 124M": (12, 12, 768, 32, 1024, 50304), "10.7M": (6, 6, 384, 64, 256, 65)}


def nanogpt_step(folder, shape, precision, compiled=False):
    """nanoGPT's training step: its own model, optimizer, autocast and clip."""
    found = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    nanogpt = importlib.util.module_from_spec(found)
    found.loader.exec_module(nanogpt)
    n_layer, n_head, n_embd, B, T, V = shape
    with contextlib.redirect_stdout(sys.stderr):
        model = nanogpt.GPT(nanogpt.GPTConfig(T, V, n_layer, n_head, n_embd, 0.0, False)).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), DEVICE)
    model = torch.compile(model) if compiled else model
    ids = torch.randint(V, (B, T), device=DEVICE)
    low = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")

    def step():
        with low:
            _, loss = model(ids, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def our_shape(shape):
    """The GPTConfig of nanoGPT's architecture in one of these shapes."""
    n_layer, n_head, n_embd, _, T, V = shape
    return GPTConfig("gpt2", V, T, n_layer, n_head, n_embd=n_embd, bias=False)


def our_step(shape, precision, kernels="auto", optimizer="adamw", **options):
    """Our step on the same architecture, as train.py takes it; AdamW is nanoGPT's optimizer."""
    accelerator().keep_freed_memory(options.get("low_memory", False))
    run, ids, _ = prepare_step(our_shape(shape), shape[3], precision, kernels, optimizer=optimizer,
                               **options)
    take = partial(take_step, run, run.model, grad_clip=1.0)
    take = accelerator().GraphedStep(take) if run.config.cuda_graph else take
    return lambda: take([ids], [ids])[0].item()


def contest(entry):
    """In a process of its own: one contestant's seconds a step and peak memory, as JSON."""
    folder, shape, options, times = json.loads(entry)
    torch.manual_seed(0)
    step = nanogpt_step(folder, shape, **options) if folder else our_step(shape, **options)
    for _ in range(6 if DEVICE == "cuda" else 1):
        step()
    print(json.dumps([*medians(step, times=times), peak_memory(DEVICE)]))


def in_turns(rivals, shape, times, rounds=3):
    """The training steps of rivals, {name: (nanoGPT's folder or "", options)}, turn by turn, each
    in a process of its own -> {name: (median seconds, peak memory)}"""
    found = {name: [] for name in rivals}
    for name, (folder, options) in [*rivals.items()] * rounds:
        entry = json.dumps([str(folder), shape, options, times])
        done = subprocess.run([sys.executable, __file__, "--contest", entry], text=True,
                              stdout=subprocess.PIPE, check=True)
        found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: (statistics.median(seconds), max(memory))
            for name, (seconds, memory) in ((name, zip(*own)) for name, own in found.items())}


def rivals(folder):
    """Whose steps are compared on this machine, as for in_turns."""
    best = dict(precision=BEST)
    theirs = {"nanoGPT, fp32": dict(precision="fp32"), f"nanoGPT, {BEST}": best}
    own = {"": {}, ", --low_memory": dict(low_memory=True),
           ", Muon for AdamW": dict(optimizer="muon")}
    if DEVICE == "cuda":
        theirs = {f"nanoGPT, {BEST}": best, f"nanoGPT, {BEST}, compiled": best | {"compiled": True}}
        own = {f", {name} kernels": dict(kernels=name) for name in ("torch", "cuda")}
        own |= {", --cuda_graph": dict(cuda_graph=True),
                ", --cuda_graph, Muon for AdamW": dict(cuda_graph=True, optimizer="muon")}
    return ({name: (folder, options) for name, options in theirs.items()}
            | {f"ours, {BEST}{name}": ("", best | options) for name, options in own.items()})


def nanogpt(folder):
    """Training steps of nanoGPT and of ours, and how much of the rate of matrix products they
    reach."""
    best = matmul_rate(DEVICE, pick_precision(BEST, DEVICE)[1])
    show(f"matrix products, {DEVICE} {BEST}", f"{best / 1e12:,.1f} TFLOP/s")
    for name, shape in (LARGE_SHAPES if DEVICE == "cuda" else SHAPES).items():
        n_tokens, flops = shape[3] * shape[4], GPT(our_shape(shape)).flops_per_token()
        found = in_turns(rivals(folder), shape, 20 if DEVICE == "cuda" or shape[2] < 384 else 3)
        for rival, (seconds, memory) in found.items():
            ratios = (f", {found[other][0] / seconds:.2f}x of {other}" for other in found
                      if "nanoGPT" in other and "ours" in rival)
            show(f"training step, {name}, {DEVICE}, {rival}",
                 f"{n_tokens / seconds:,.0f} tokens/s, {n_tokens * flops / seconds / best:.1%} of "
                 f"that rate, {memory / 1e9:.2f} GB{''.join(ratios)}")


def recompute():
    """Activation checkpointing: memory and time of a training step with it and without."""
    name, shape = "GPT-2 124M", (12, 12, 768, 4, 1024, 50304)
    if DEVICE == "cuda":
        name, shape = "GPT-2 medium", (24, 16, 1024, 8, 1024, 50304)
    options = dict(precision=BEST) | (  # Python would hold a GPU up
        dict(kernels="cuda", cuda_graph=True) if DEVICE == "cuda" else {})
    found = in_turns({again: ("", options | dict(recompute=again)) for again in (False, True)},
                     shape, 20 if DEVICE == "cuda" else 1)
    for again, (seconds, memory) in found.items():
        show(f"training step, {name}, B={shape[3]}, {DEVICE} {BEST}, recompute={again}",
             f"{1000 * seconds:,.0f} ms ({seconds / found[False][0]:.2f}x), {memory / 1e9:.2f} GB "
             f"({memory / found[False][1]:.2f}x)")


# nanoGPT's published recipe for a CPU, and for a GPU; its README gives both losses.
RECIPES = {"cpu": "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
                  "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
                  "--lr_decay_iters=2000 --dropout=0.0",
           "cuda": "--log_interval=1"}
PRESETS = {"cpu": ("nano", 12, {}), "cuda": ("small", 64, dict(block_size=256, dropout=0.2))}


def nanogpt_recipe(folder, text):
    """Run nanoGPT's own recipe on a text -> (seconds in its steps, its last validation loss)."""
    with tempfile.TemporaryDirectory() as copy:
        copy = Path(shutil.copytree(folder, Path(copy, "nanogpt")))
        data = copy / "data" / "shakespeare_char"
        shutil.copy(text, data / "input.txt")
        (data / "requests.py").touch()  # imported for a download that the text makes needless
        words = ["config/train_shakespeare_char.py", *RECIPES[DEVICE].split()]
        for script in ["data/shakespeare_char/prepare.py"], ["train.py", *words]:
            done = subprocess.run([sys.executable, *script], cwd=copy, capture_output=True,
                                  text=True, check=True)
    times = [float(time) / 1000 for time in re.findall(r"time ([\d.]+)ms", done.stdout)]
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    return statistics.median(times) * len(times), float(losses[-1])


def our_recipe(shards, folder, n_steps, seed):
    """Our run of so many steps -> (seconds in its steps, validation loss on all of the split)."""
    size, B, options = PRESETS[DEVICE]
    config = TrainConfig(data=str(shards), out=str(folder), max_steps=n_steps, eval_every=10**6,
                         eval_sequences=800, seed=seed, size=size, batch_size=B,
                         micro_batch_size=B)
    shape = model_shape(size, config.vocab_size, options)
    loss = train(config, shape, say=lambda text: None)["val_loss"]
    times = [B * shape.block_size / row["tokens_per_second"] for row in read_log(folder)]
    return statistics.median(times) * len(times), loss


def learning(folder, text):
    """Tiny Shakespeare by characters: nanoGPT's recipe, and what we reach in parts of its time."""
    text = text or next(iter(find_files("shakespeare", Path("shards/downloads"))))
    with tempfile.TemporaryDirectory() as place:
        shards = prepare([text], Path(place, "shards"), vocab_size=256 + len(SPECIAL_TOKENS),
                         say=lambda text: None)
        seconds = our_recipe(shards, Path(place, "tried"), 40, 0)[0] / 40
        time, loss = nanogpt_recipe(folder, text)
        show(f"tiny Shakespeare, {DEVICE}, nanoGPT's recipe",
             f"validation loss {loss:.3f} in {time:.1f} s")
        for part in 8, 5, 4, 1:
            runs = [our_recipe(shards, Path(place, f"{part}-{seed}"), round(time / part / seconds),
                               seed) for seed in range(3)]
            own, losses = statistics.median(s for s, _ in runs), sorted(loss for _, loss in runs)
            show(f"tiny Shakespeare, {DEVICE}, ours, three seeds",
                 f"validation loss {losses[1]:.3f} ({losses[0]:.3f} to {losses[2]:.3f}) in "
                 f"{own:.1f} s, 1/{time / own:.1f} of that time")


# -----------------------------------------------------------------------------
# Sampling, decoding and saving.


def sampling():
    """Tokens per second of the default model, one sequence, with and without the cache."""
    model = GPT(SHAPE).eval().to(DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    for cache in True, False:
        seconds, = medians(lambda: [*generate(model, ids, 200, cache=cache)], times=3)
        show(f"sampling, {DEVICE}, cache={cache}", f"{200 / seconds:,.0f} tokens/s")


def gpt2_in(name):
    """GPT-2's shape in fp32, bf16, int8 or int4, where all else is bf16, and its layers, each with
    a vector to multiply."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(architecture="gpt2", **SIZES["gpt2"])).eval().to(DEVICE)
    model = quantize(model, name).bfloat16() if name in BITS else model.to(PRECISIONS[name])
    model.use("torch")  # as sample.py does
    return model, [(m, torch.ones(1, m.in_features, dtype=model.compute_dtype, device=DEVICE))
                   for m in model.modules() if isinstance(m, (Linear, QuantLinear))
                   and not isinstance(m, QuantEmbedding)]


@torch.inference_mode()
def products(layers, linear):
    """linear(layer, x) for each layer and its x."""
    for layer, x in layers:
        y = linear(layer, x)
    y[0, 0].item()  # a GPU has then finished


def decoding():
    """Tokens per second of GPT-2's shape in each format of its weights, beside the rate at which
    its products alone can be had: by its layers, and by F.linear, which streams the weights as most
    programs do. All in turns."""
    models, calls = {name: gpt2_in(name) for name in ("fp32", "bf16", *BITS)}, {}
    shapes = [(1, 1), (1, 512), (8, 1), *([(32, 512)] if DEVICE == "cuda" else [])]
    for (B, T), name in itertools.product(shapes, models):
        (model, layers), ids = models[name], torch.zeros(B, T, dtype=torch.long, device=DEVICE)
        steps = generate(model, ids, 42, temperature=0)
        calls[name, B, T] = [lambda steps=steps: next(steps)[0].item(),
                             partial(products, layers, lambda layer, x: layer(x))]
        if name not in BITS:
            calls[name, B, T].append(partial(products, layers, lambda m, x: F.linear(x, m.weight)))
    seconds = iter(medians(*itertools.chain(*calls.values()), times=40))
    rates = {key: [1 / next(seconds) for _ in own] for key, own in calls.items()}
    for (name, B, T), (rate, *limits) in rates.items():
        n_bytes = sum(p.nbytes for m, _ in models[name][1] for p in m.parameters())
        show(f"decoding, GPT-2, {DEVICE} {name}, {B} x {T} tokens of context",
             f"{B * rate:,.1f} tokens/s, {B * rate / rates[name, 1, 1][0]:.1f}x of 1 x 1, weights "
             f"at {n_bytes * rate / 1e9:,.0f} GB/s, "
             f"{rate / rates['bf16', B, T][0]:.2f}x of bf16; products alone " + ", ".join(
                 f"{limit:,.1f} a second {how} ({rate / limit:.0%})"
                 for limit, how in zip(limits, ("by its layers", "by F.linear"))))
    if importlib.util.find_spec("transformers"):
        transformers_decoding()


def transformers_decoding():
    """The same by Hugging Face's transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel
    for precision, T in itertools.product(("fp32", "bf16"), (1, 512)):
        model = GPT2LMHeadModel(GPT2Config()).eval().to(DEVICE, PRECISIONS[precision])
        ids = torch.zeros(1, T, dtype=torch.long, device=DEVICE)
        few, many = medians(*(partial(model.generate, ids, max_new_tokens=n, min_new_tokens=n,
                                      do_sample=False, pad_token_id=0) for n in (2, 26)), times=3)
        show(f"the same by transformers, {precision}, {T} tokens of context",
             f"{24 / (many - few):,.1f} tokens/s")


def export():
    """Ours beside onnxruntime, which runs the exported graph: GPT-2's shape in float32 on the CPU,
    all logits of 512 tokens, then a token after them, the cache in the runtime's own memory."""
    import onnx
    import onnxruntime
    torch.manual_seed(0)
    model = GPT(GPTConfig(architecture="gpt2", **SIZES["gpt2"])).eval()
    model.use("torch")
    options, value = onnxruntime.SessionOptions(), onnxruntime.OrtValue.ortvalue_from_numpy
    options.intra_op_num_threads = torch.get_num_threads()
    # else its threads wait busily after each call, and take the processor from ours
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        onnx.save_model(to_onnx(model), f"{folder}/model.onnx", save_as_external_data=True)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
    outputs, (_, *names) = ([part.name for part in parts] for parts in
                            (session.get_outputs(), session.get_inputs()))

    def step(ids, past):
        return session.run_with_ort_values(
            outputs, dict(zip(names, past), input_ids=value(ids.numpy())))

    ids, shape = torch.zeros(1, 512, dtype=torch.long), (1, 12, 0, 64)
    empty = [value(torch.zeros(shape).numpy())] * len(names)
    _, *past = step(ids, empty)
    prefill = torch.inference_mode()(lambda: model(ids, cache=new_cache(model, 1, 512)))
    steps = generate(model, ids, 42, temperature=0)
    for what, n, ours, theirs, times in (
            ("512 tokens at once", 512, prefill, lambda: step(ids, empty), 5),
            ("a token after 512", 1, lambda: next(steps), lambda: step(ids[:, :1], past), 40)):
        own, other = medians(ours, theirs, times=times)
        show(f"GPT-2, fp32, {what}: ours and onnxruntime",
             f"{n / own:,.1f} and {n / other:,.1f} tokens/s, {own / other:.2f}x ours")


def trained(shards, folder, shape, minutes):
    """-> (model, tokenizer) of a run of so many minutes, without a word."""
    config = TrainConfig(data=str(shards), out=str(folder), minutes=minutes, eval_every=10**6)
    with contextlib.redirect_stdout(sys.stderr):
        train(config, shape, say=lambda text: None)
    return load_run(folder, "last", DEVICE)


def speculative(n_tokens=100, minutes=1.0):
    """Speculative beside plain decoding, in turns: a target and a draft of about a tenth of its
    size, both trained here for a minute, and a lookup; on code and on a repetitive text."""
    with tempfile.TemporaryDirectory() as place:
        shards = prepare(["stdlib"], Path(place, "shards"), say=lambda text: None)
        shapes = SHAPE, replace(SHAPE, n_layer=1, n_embd=64, n_head=1, n_kv_head=1)
        (model, tokenizer), (small, _) = (
            trained(shards, Path(place, f"run{i}"), shape, minutes)
            for i, shape in enumerate(shapes))
    share = small.n_parameters() / model.n_parameters()
    drafts = {f"a draft of {share:.2f} of the size": (RunDraft(small), 3),
              "n-gram lookup": (NgramDraft(model.config.vocab_size), 6)}
    prompts = {"code": Path(contextlib.__file__).read_text()[:300], "repetitive text": "".join(
        f"    def get_{name}(self):\n        return self.{name}\n\n"
        for name in "name size path mode line".split())}
    ends = [[id] for id in end_ids(tokenizer)]
    for (text, prompt), temperature, (name, (draft, n_draft)) in itertools.product(
            prompts.items(), (0.0, 0.8), drafts.items()):
        config, counts = SampleConfig(temperature=temperature, seed=1, max_new_tokens=n_tokens,
                                      ban=ends), Counter()

        def fast():
            counts.clear()
            deque(speculate_text(model, tokenizer, prompt, draft, config, n_draft, counts), 0)

        plain, own = medians(lambda: complete(model, tokenizer, prompt, config), fast, times=5)
        show(f"speculative, {name}, {text}, temperature {temperature}",
             f"{counts['accepted'] / max(1, counts['drafted']):.0%} of {counts['drafted']} guesses "
             f"right, {n_tokens / counts['passes']:.2f} tokens a pass, {n_tokens / own:,.0f} "
             f"tokens/s, {plain / own:.2f}x of plain decoding")


def batching(n_tokens=32):
    """Tokens a second of the engine with 1, 8 and 32 texts under way, beside sample.py's one after
    another and all in one batch, in turns; and the first token of a prompt, read and found."""
    texts = prose(1_000_000)
    tokenizer, model = Tokenizer.train(texts, 4096), GPT(SHAPE).eval().to(DEVICE)
    config = SampleConfig(max_new_tokens=n_tokens, temperature=0)  # untrained, it never ends a text
    prompts = [text[:60] for text in texts]

    def together(prompts, engine=None, config=config):
        engine = engine or Engine(model, tokenizer)
        for prompt in prompts:
            engine.submit(Request(prompt, config, emit=lambda token: None))
        while engine.step():
            pass

    one, batch, *seconds = medians(
        lambda: complete(model, tokenizer, prompts[0], config),
        lambda: complete_batch(model, tokenizer, prompts[:32], config),
        *(partial(together, prompts[:n]) for n in (1, 8, 32)), times=3)
    show(f"one text after another, {DEVICE} fp32", f"{n_tokens / one:,.0f} tokens/s")
    for name, n, time in [("32 texts in one batch of sample.py", 32, batch), *(
            (f"the engine, {n} texts", n, time) for n, time in zip((1, 8, 32), seconds))]:
        show(f"{name}, {DEVICE} fp32",
             f"{n * n_tokens / time:,.0f} tokens/s, {n * one / time:.2f}x of one after another")
    engine, first = Engine(model, tokenizer), replace(config, max_new_tokens=1)
    long = iter([tokenizer.encode(text)[:201] for text in texts])
    known = next(long)
    read, found = medians(lambda: together([next(long)], engine, first),
                          lambda: together([known], engine, first))
    show(f"first token after a prompt of {len(known)} tokens, {DEVICE} fp32",
         f"{1000 * read:,.0f} ms, {read / found:.1f}x as long as where the prefix cache has it")


def saving():
    """How long a save holds up training, beside how long its writing takes."""
    for size, options in ("mini", {}), ("gpt2", dict(architecture="gpt2")):
        model = GPT(model_shape(size, 4096, options)).to(DEVICE)
        run = new_run("", model, TrainConfig(), DEVICE)
        ids = torch.zeros(1, 8, dtype=torch.long, device=DEVICE)
        take_step(run, model, [ids], [ids], 1.0)  # now the optimizer has a state
        state = snapshot(run)
        with tempfile.TemporaryDirectory() as folder:
            holds, writes = medians(lambda: snapshot(run), lambda: save_run(folder, state), times=3)
            n_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        show(f"a checkpoint of {n_bytes / 1e6:,.0f} MB", f"training waits {1000 * holds:,.0f} ms, "
             f"while writing and checking take {1000 * writes:,.0f} ms")


# -----------------------------------------------------------------------------
# Scale: the same step by one process and by two, on a CPU.

ALONE = Layout()
SHARED = {  # name: how processes share a step, the threads of each, the optimizer
    "one process": (ALONE, 1, "adamw"), "one process, two threads": (ALONE, 2, "adamw"),
    "ddp x 2": (Layout(dp=2), 1, "adamw"), "fsdp x 2": (Layout(dp=2, zero=3), 1, "adamw"),
    "zero-2 x 2": (Layout(dp=2, zero=2), 1, "adamw"), "tp x 2": (Layout(tp=2), 1, "adamw"),
    "pp x 2": (Layout(pp=2), 1, "adamw"), "ddp x 2, muon": (Layout(dp=2), 1, "muon"),
    "fsdp x 2, muon": (Layout(dp=2, zero=3), 1, "muon")}


def micro_size(B, layout):
    """Sequences in a forward pass: a pipeline takes four passes for a step, all others one."""
    return B // layout.dp // (4 if layout.pp > 1 else 1)


def prepare_part(shape, B, layout, n_threads, optimizer):
    """-> (this process's part of a step of a new model, bytes that it sends in one, bytes of
    parameters, gradients and optimizer that it holds)"""
    config = TrainConfig(batch_size=B, micro_batch_size=micro_size(B, layout), device="cpu",
                         precision="fp32", optimizer=optimizer, tp=layout.tp, pp=layout.pp,
                         parallel="fsdp" if layout.zero else "ddp", reshard=layout.zero == 3)
    mesh = None if layout == ALONE else start_processes(config)[1]
    torch.manual_seed(0)
    model, ids = GPT(shape), torch.randint(shape.vocab_size, (B, shape.block_size))
    model.use("torch")
    called = parallelize(model, config, mesh)
    run = replace(new_run("", model, config, "cpu"), mesh=mesh)
    micro, n_passes = split_batch(config, layout.dp)
    run.schedule = build_schedule(run, called, n_passes) if layout.pp > 1 else None
    ids = ids.chunk(layout.dp)[part(mesh, "dp")[0]].split(micro)

    def step():
        torch.set_num_threads(n_threads)
        take_step(run, called, ids, ids, 1.0)
        dist.barrier()

    take_step(run, called, ids, ids, 1.0)  # now the optimizer has a state
    with counted_bytes() as counts:
        gradients(run, called, zip(ids, ids), n_passes, 1.0)
        n_held = held_bytes(model, run.optimizer)
        update(run)
    return step, sum(counts.values()), n_held


def shared_steps(shape, B, times):
    """In each of two processes: {name: (seconds of a step, bytes sent, bytes held)}."""
    rank = dist.get_rank()
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    parts = {name: (dist.barrier, 0, 0) if rank and row[0] == ALONE else
             prepare_part(shape, B, *row) for name, row in SHARED.items()}
    seconds = medians(*(step for step, *_ in parts.values()), times=times)
    return {name: (time, *counts) for time, (name, (_, *counts)) in zip(seconds, parts.items())}


def sent_on_paper(shape, B, layout, optimizer):
    """The bytes, four a number, that each of two processes should send in a step."""
    model, C, T = GPT(shape), shape.n_embd, shape.block_size
    N, table = model.n_parameters(), shape.vocab_size * C
    matrices = sum(p.numel() for p in model.transformer.blocks.parameters() if p.dim() == 2)
    n_bytes = sent(Shape(N, shape.n_layer, C, T), B, layout._replace(micro=micro_size(B, layout)))
    total = 2 * (n_bytes["dp"] + n_bytes["tp"]) + n_bytes["pp"]  # the ends send one way only
    if layout.tp > 1:  # gradients of head and norms, and of what the embedding gives
        total += all_reduce_bytes(4 * (N - matrices - table) + 2 * B * T * C, 2)
    if layout.zero and optimizer == "muon":  # which needs whole momenta
        total += all_reduce_bytes(2 * matrices, 2)
    return total


def scale(shape=SHAPE, B=DEFAULT.batch_size, times=5):
    """A step of the default run that two processes share: time, bytes sent, as counted and on
    paper, and bytes that each holds."""
    both = spawn(2, shared_steps, shape, B, times)
    alone, copied = (both[0][name] for name in ("one process", "ddp x 2"))
    for name, (layout, _, optimizer) in SHARED.items():
        seconds, n_sent, n_held = map(max, zip(*(found[name] for found in both)))
        show(f"a step, cpu fp32, {name}",
             f"{seconds:.2f} s ({seconds / alone[0]:.2f}x), {B * shape.block_size / seconds:,.0f} "
             f"tokens/s; each sends {n_sent / 1e6:.2f} MB, on paper "
             f"{sent_on_paper(shape, B, layout, optimizer) / 1e6:.2f}, and holds "
             f"{n_held / 1e6:.1f} MB, {n_held / copied[2]:.2f}x of ddp's with adamw")
    show("idle share of two stages, four micro-batches, on paper",
         f"{bubble(one_f_one_b(2, 4)):.0%}")


# -----------------------------------------------------------------------------
# Byte-pair encoding beside Hugging Face's tokenizers and tiktoken.


def hugging_face(texts, vocab_size):
    """Train the byte-level BPE of Hugging Face's tokenizers on texts."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models, pre_tokenizers, trainers
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet,
                                  special_tokens=SPECIAL_TOKENS, show_progress=False)
    theirs.train_from_iterator(texts, trainer)


def bpe_training(texts, vocab_size, times):
    """Our seconds to train on texts, and where `tokenizers` is installed, how theirs compare."""
    n_bytes = sum(len(text.encode()) for text in texts)
    name = f"{n_bytes / 1e6:.1f} MB to {vocab_size:,} tokens"
    ours, = medians(lambda: train_fast(texts, vocab_size, pattern=GPT2_SPLIT), times=times)
    show(f"BPE training, {name}", f"{ours:.2f} s, {n_bytes / 1e6 / ours:.1f} MB/s")
    if importlib.util.find_spec("tokenizers"):
        theirs, = medians(lambda: hugging_face(texts, vocab_size), times=times)
        show("the same by Hugging Face's tokenizers",
             f"{theirs:.2f} s; ours takes {ours / theirs:.2f}x")


def python_code(n_bytes):
    """About n_bytes of the .py files in this Python's site-packages."""
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    sizes = itertools.accumulate(path.stat().st_size for path in paths)
    return [path.read_text(encoding="utf-8", errors="replace")
            for path, size in zip(paths, sizes) if size < n_bytes]


def bpe100():
    """Training at the size of a real tokenizer, once each."""
    bpe_training(python_code(100e6), 32_768, 1)


def bpe():
    """Training and encoding on Python's own library."""
    texts = [text for path in find_files("stdlib", None)
             for text in read_documents(path)]
    bpe_training(python_code(3.5e6), 4096, 7)
    bpe_training(texts, 4096, 3)
    tokenizer = Tokenizer(train_fast(texts, 4096), SPECIAL_TOKENS)
    joined, twin = "\n".join(texts)[:4_000_000], tokenizer.to_tiktoken()
    for name, encoders, given in (("one thread", (tokenizer.encode, twin.encode_ordinary), joined),
                                  ("a batch on all cores", (tokenizer.encode_batch,
                                                            twin.encode_ordinary_batch), texts)):
        ours, theirs = medians(*(partial(encode, given) for encode in encoders), times=3)
        n_bytes = len("".join(given).encode())
        show(f"encoding, {name}", f"{n_bytes / 1e6 / ours:.1f} MB/s, {theirs / ours:.2f}x of "
             "tiktoken's speed")


def chapters():
    """Run each notebook: how long it is, what is in it, and how long it takes."""
    import nbformat  # needed here alone

    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        notebook, start = nbformat.read(path, 4), time.perf_counter()
        execute(notebook, path.parent)
        seconds = time.perf_counter() - start
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        pictures = sum("image/png" in output.get("data", {})
                       for cell in code for output in cell.outputs)
        show(path.stem, f"{len(notebook.cells)} cells, median code cell "
             f"{statistics.median(len(cell.source.splitlines()) for cell in code):.0f} lines, "
             f"{sum('your turn' in cell.source for cell in code)} exercises, {pictures} pictures, "
             f"{seconds:.0f} s")


# -----------------------------------------------------------------------------
# Documents: what curate takes for each stage, and for all of them on every core.


def prose(n_bytes, n_chars=3000):
    """English documents of about n_chars characters: paragraphs of Python's manual, shuffled."""
    topics = read_documents(Path(os.__file__).parent / "pydoc_data" / "topics.py")
    parts = [part for text in topics for part in text.split("\n\n")
             if len(part) > 200 and part.rstrip().endswith(".") and "{" not in part]
    random, texts = Random(0), []
    for _ in range(n_bytes // n_chars):
        texts.append("")
        while len(texts[-1]) < n_chars:
            texts[-1] += random.choice(parts) + "\n\n"
    return texts


def bytes_kept(function, n=20_000):
    """The most memory that function([(place, text), ...]) takes at a time, for each of n documents
    of a line."""
    pairs = [("", f"Of many documents this one is the {i}th of a large corpus") for i in range(n)]
    tracemalloc.start()
    function(pairs)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / n


def command(name, megabytes, n_documents, *words):
    """Show how fast a command of this project is, and the CPU seconds of all its processes, from
    their start to their end: what else runs on this machine changes these little."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL,
                   check=True)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = sum(b - a for a, b in zip(before[2:4], after[2:4]))
    show(name, f"{megabytes / seconds:.1f} MB/s, {n_documents / seconds:,.0f} documents/s, "
         f"{cpu / megabytes:.3f} CPU seconds a MB")


def curation():
    """Megabytes a second of each stage, and of all of them; of near-duplicates; of data.py."""
    texts = prose(120_000_000)  # so many that starting the processes does not decide
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    small, n = texts[:1000], sum(len(text.encode()) for text in texts[:1000]) / 1e6
    config = CurateConfig(near=0.0)
    for name, stage in text_stages(config).items():
        seconds, = medians(lambda: [stage(text) for text in small], times=3,
                           clock=time.process_time)
        show(f"stage {name}, one core", f"{n / seconds:,.1f} MB/s")
    seconds, = medians(lambda: near_duplicates(small), times=3, clock=time.process_time)
    show("near-duplicates, one core", f"{n / seconds:.1f} MB/s")
    kept = {"of a document for copies": lambda pairs: deque(first_ones(pairs, new_record("")), 0),
            "of a line": lambda pairs: deque(new_lines(pairs, new_record("")), 0),
            "of a document for near-duplicates": lambda pairs: near_duplicates(
                [text for _, text in pairs])}
    show("memory, bytes", ", ".join(f"{bytes_kept(function):.0f} {name}"
                                    for name, function in kept.items()))
    tokenizer = Tokenizer.train(texts[:700], 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("\n".join(json.dumps(dict(text=text)) for text in texts))
        tokenizer.save(Path(folder, "tokenizer.json"))
        command("curate: read, clean, filter, mask, drop copies, write", megabytes, len(texts),
                "-m", "chapters.curate", path, "--near=0", f"--out={folder}/out")
        command("data.py: read, clean, drop copies, tokenize, write", megabytes, len(texts),
                "data.py", path, f"--tokenizer={folder}/tokenizer.json", f"--out={folder}/shards")
    del texts[5000:]
    encode, tiktoken = tokenizer.encode_batch, tokenizer.to_tiktoken().encode_ordinary_batch
    ours, theirs = medians(lambda: [*encode(texts)], lambda: tiktoken(texts), times=3)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    show("tokenizing on all cores, and tiktoken's own batch",
         f"{megabytes / ours:.1f} and {megabytes / theirs:.1f} MB/s")


def pages(docs):
    """The main text of web pages, found by us and by libraries."""
    for name, figures in page_extractors.compare(docs):
        show(name, figures)


# -----------------------------------------------------------------------------
# The command.

# -----------------------------------------------------------------------------
# Serving: clients that stream from one server, and how much memory it holds after many requests.


@contextlib.contextmanager
def server(*words):
    """`python -m chapters.serve` with a new model of the default run's shape -> its port."""
    tokenizer = Tokenizer([])
    with tempfile.TemporaryDirectory() as folder:
        keep(GPT(replace(SHAPE, vocab_size=tokenizer.n_vocab)), folder)
        tokenizer.save(Path(folder, "tokenizer.json"))
        command = [sys.executable, "-m", "chapters.serve", folder, "--port=0", *words]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            yield int(re.search(r":(\d+)/", process.stderr.readline())[1])
        finally:
            process.terminate()
            process.wait()


def request(port, path, body=None):
    """An open reply of the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def metric(port, name):
    """What a server says of itself under a name, at /metrics."""
    with request(port, "/metrics") as reply:
        return float(re.search(rf"(?m)^{name} (\S+)", reply.read().decode())[1])


def token_times(port, number, n_tokens=32):
    """The seconds from one event to the next of a stream, the first from the request on; each has
    a token, as the letter a is made to be picked always."""
    times = [time.perf_counter()]
    with request(port, "/v1/completions", dict(
            prompt=f"{number}" + " the cat sees a dog" * 4, max_tokens=n_tokens, stream=True,
            logit_bias={str(b"a"[0]): 100})) as reply:
        for line in reply:
            if b'"text":"a"' in line:
                times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def quantiles(seconds):
    """"p50 3 ms, p95 5 ms" of a list."""
    ordered = sorted(seconds)
    return ", ".join(f"p{p} {ordered[(len(ordered) - 1) * p // 100] * 1000:,.0f} ms"
                     for p in (50, 95))


def serving(n_rounds=4):
    """Latency and throughput for 1, 8 and 32 clients that stream at the same time."""
    with server() as port:
        token_times(port, 0)
        for n_clients in (1, 8, 32):
            with ThreadPoolExecutor(n_clients) as clients:
                start, used = time.perf_counter(), metric(port, "process_cpu_seconds_total")
                found = [*clients.map(partial(token_times, port), range(n_rounds * n_clients))]
                seconds = time.perf_counter() - start
                used = metric(port, "process_cpu_seconds_total") - used
            n_whole, n_tokens = sum(len(own) == 32 for own in found), sum(map(len, found))
            name = f"serving, {n_clients} clients"
            show(name, f"{n_tokens / seconds:,.0f} tokens/s, {n_whole} of {len(found)} requests "
                       f"whole, {1000 * used / n_tokens:.1f} ms of the processor a token")
            show(f"{name}, first token", quantiles(own[0] for own in found))
            show(f"{name}, each token", quantiles(x for own in found for x in own[1:]))


def endure(port, number):
    """A short request of one of five kinds: whole, streamed, cached, wrong, left by its client."""
    body = dict(prompt=f"the cat {number}", max_tokens=4)
    body |= [{}, dict(stream=True), dict(seed=number % 50), dict(temperature=-1),
             dict(stream=True, max_tokens=50)][number % 5]
    with request(port, "/v1/completions", body) as reply:
        reply.read(10 if number % 5 == 4 else None)
    return reply.status


def endurance(n_requests=10_000):
    """The memory of a server while it gets so many short requests."""
    with server("--cache_bytes=1000000") as port, ThreadPoolExecutor(8) as clients:
        for n in range(0, n_requests + 1, 1000):
            memory = metric(port, "process_resident_memory_bytes")
            show(f"endurance, after {n:,} requests", f"{memory / 2**20:,.1f} MiB")
            for _ in clients.map(partial(endure, port), range(n, n + 1000 * (n < n_requests))):
                pass


def shares(name, right):
    """Show {what: which of N are right}, each as a share with its interval."""
    for what, own in right.items():
        low, high = wilson(own.mean(), len(own))
        show(f"{name}, {what}", f"{own.mean():.0%} [{low:.0%}, {high:.0%}] of {len(own)}")


def retrieval(n_seeds=3):
    """How often each kind of index finds a passage first, and a small model tells what it found."""
    tokenizer, found, told = world_tokenizer(), {}, {}
    for seed in range(n_seeds):
        encoder, reader = (train_encoder(tokenizer, draw_pairs, seed=seed),
                           train_reader(tokenizer, seed=seed))
        for name, row in find(tokenizer, encoder, seed).items():
            for who, places in row.items():
                found.setdefault(f"{name}, {who}", []).extend(places == 1)
        for k in (1, 3):
            for name, right in tell(tokenizer, encoder, reader, seed, k=k).items():
                told.setdefault(f"{name}, k={k}", []).extend(right)
    for name, right in ("first place", found), ("right answer", told):
        shares(name, {what: torch.tensor(own).double().numpy() for what, own in right.items()})


def distillation(n_seeds=3):
    """What students learn of little text alone, from a teacher, and from its texts."""
    ids, losses = text_ids("stories"), []
    for seed in range(n_seeds):
        teacher = fit(new_model(seed, block_size=64), sequences(ids[:-20_000], 64), 200, seed)
        losses.append(distill.compare(teacher, ids[:5000], ids[-20_000:], seed))
    for name in losses[0]:
        show(f"distillation, {name}", " ".join(f"{row[name]:.3f}" for row in losses)
             + " nats a byte")


PARTS = {part.__name__: part for part in (training, attention, twins, sampling, saving, bpe,
                                          decoding, export, speculative, batching, muon, bandwidth,
                                          recompute, bpe100, curation, pages, chapters, serving,
                                          endurance, learning, nanogpt, scale,
                                          retrieval, distillation)}


@dataclass
class Options:
    """What is measured."""
    parts: list = option([], f"of: {' '.join(PARTS)}", positional=True)
    nanogpt: str = option("", "a checkout of nanoGPT, for the parts nanogpt and learning")
    text: str = option("", "the text that learning learns; by default tiny Shakespeare")
    docs: str = option("/usr/share/doc", "a folder of HTML documentation, for the part pages")


def main():
    if sys.argv[1:2] == ["--contest"]:
        return contest(sys.argv[2])
    typed, = parse_options(__doc__, Options)
    options = Options(**typed)
    parts = options.parts or (["nanogpt"] if options.nanogpt else [*PARTS][:6])
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}{nearest(part, PARTS)}; the parts are "
                             f"{' '.join(PARTS)}")
    beside, folder = {"nanogpt", "learning"} & {*parts}, Path(options.nanogpt).resolve()
    refuse_idle(typed, () if beside else ["nanogpt"], "without the part nanogpt or learning")
    refuse_idle(typed, () if "learning" in parts else ["text"], "without the part learning")
    refuse_idle(typed, () if "pages" in parts else ["docs"], "without the part pages")
    if beside and not (options.nanogpt and (folder / "model.py").exists()):
        raise ValueError(f"{' and '.join(sorted(beside))} need --nanogpt=DIR, a checkout of nanoGPT"
                         + f"; {folder} has no model.py" * bool(options.nanogpt))
    if options.text and not Path(options.text).is_file():
        raise ValueError(f"there is no file --text={options.text}")
    print(machine(), flush=True)
    accelerator().keep_freed_memory()
    arguments = dict(nanogpt=[folder], learning=[folder, options.text], pages=[options.docs])
    for part in parts:
        PARTS[part](*arguments.get(part, []))


if __name__ == "__main__":
    run_command(main)
