"""
Smaller weights: a run in half precision, int8 or int4, and what that costs in perplexity.

    python -m chapters.quantize runs/stdlib                    # a table of all, nothing is written
    python -m chapters.quantize runs/stdlib --quant=int4       # writes runs/stdlib-int4
    python -m chapters.quantize runs/stdlib --quant=int4 --method=gptq --data=shards/mine

What is written is a run as any other: sample.py, evaluate.py and chapters.serve read it. To the
nearest integer `sample.py --quant=int4` rounds as well, each time it starts; gptq needs text to
see what goes into each layer.
"""

import statistics
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/quantize.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from chapters.merge import write_changed
from chapters.weights import new_folder
from evaluate import EvaluateConfig, held_out, interval, ratio, score_text
from model import BITS, GROUP, LINEARS, check_options, merge, option, quantize, round_weights
from sample import (PRECISIONS, SampleConfig, generate, load_run, n_new_tokens, newest_run,
                    pick_checkpoint)
from tokenizer import parse_options, refuse_idle, run_command

KINDS = ("bf16", "fp16", *BITS)
METHODS = ("nearest", "gptq")
DAMPING = 0.01  # of the mean of the squared inputs, so that the matrix has an inverse

# -----------------------------------------------------------------------------
# GPTQ, arXiv:2210.17323: columns that are not rounded yet make up for the error of those that are.


def round_gptq(w, bits, gram):
    """Weights (F, C) -> integers and scales, as model.round_weights, but chosen so that the outputs
    change little for inputs x, of which gram (C, C) is the sum of x x^T.

    With columns rounded one by one, the best that the others can do about an error e in column i is
    to change by -e U[i, j] / U[i, i], where U^T U is the inverse of gram."""
    C, w, top = w.size(1), w.double().clone(), 2 ** (bits - 1) - 1
    gram = gram.double() + DAMPING * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(C)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    U = torch.linalg.cholesky(inverse, upper=True)                       # (C, C)
    q, scales = torch.zeros_like(w), []
    for columns in torch.arange(C).split(GROUP if bits == 4 else C):
        scales.append(round_weights(w[:, columns], bits)[1].flatten())   # (F,), of the group
        for i in columns:
            q[:, i] = (w[:, i] / scales[-1]).round().clamp(-top, top)
            error = (w[:, i] - q[:, i] * scales[-1]) / U[i, i]
            w[:, i + 1:] -= error[:, None] * U[i, i + 1:]
    scale = scales[0] if bits == 8 else torch.stack(scales, dim=1)       # (F,) or (F, C / GROUP)
    return q.to(torch.int8), scale.float()


@torch.inference_mode()
def input_grams(model, batches):
    """For each linear layer the sum of x x^T (C, C) over its inputs while the model reads batches
    of ids (B, T): {where its weights are in memory: the sum}; no head that is the embedding."""
    grams, hooks = {}, []

    def add(layer, inputs):
        x, place = inputs[0].flatten(0, -2).float(), layer.weight.data_ptr()      # (N, C)
        grams[place] = grams.get(place, 0) + x.T @ x

    for name, layer in model.named_modules():
        if name.split(".")[-1] in (*LINEARS, *["lm_head"] * (not model.config.tied)):
            hooks.append(layer.register_forward_pre_hook(add))
    for ids in batches:
        model(ids)
    for hook in hooks:
        hook.remove()
    return grams


def quantize_gptq(model, quant, batches):
    """model.quantize with round_gptq, for what goes into each layer with these batches of ids."""
    grams = input_grams(model, batches)

    def round(w, bits):
        gram = grams.get(w.data_ptr())
        return round_weights(w, bits) if gram is None else round_gptq(w, bits, gram)
    return quantize(model, quant, round)


def text_batches(tokenizer, rows, block_size, n=32):
    """The first n blocks of the texts or chats in rows, as ids (8, T) at a time."""
    ids = [i for row in rows
           for i in [tokenizer.eot, *tokenizer.encode(row["target"], special="chat" in row)]]
    n = min(n, len(ids) // block_size)
    if not n:
        raise ValueError(f"gptq needs a block of {block_size} tokens and the text has {len(ids)}: "
                         "name longer ones with --data")
    return torch.tensor(ids[:n * block_size]).view(n, block_size).split(8)


# -----------------------------------------------------------------------------
# What it costs: bytes, perplexity, time.


def smaller(model, kind, batches=None):
    """A copy of a plain model in one of KINDS, by gptq if batches of ids are given."""
    model = deepcopy(model)
    if kind in BITS:
        quantize(model, kind) if batches is None else quantize_gptq(model, kind, batches)
    return model.to(PRECISIONS.get(kind, torch.bfloat16))


def n_bytes(model):
    return sum(p.nbytes for p in model.parameters())


def sums_of(model, tokenizer, rows):
    """(N, 2): for pieces of held-out rows their surprisal in nats and their tokens, in float32, so
    that only the weights differ. Of chats what the assistant says."""
    pieces, _ = score_text(deepcopy(model).float(), tokenizer, rows, EvaluateConfig())
    return np.array([piece["perplexity"] for piece in pieces])


def perplexity_change(a, b):
    """-> (relative change of perplexity from sums_of one model to those of another, and between
    which two numbers it lies: a paired 95% interval)."""
    return interval(np.stack([a, b], axis=1), lambda sums: np.expm1(np.diff(ratio(sums))[..., 0]))


def tokens_per_second(models, n_tokens=32, repeats=5):
    """{name: model} -> {name: tokens of one text that it writes in a second}: medians over turns,
    so that what else the machine does meets all alike."""
    found, ids = {name: [] for name in models}, torch.zeros(1, 1, dtype=torch.long)
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            n = sum(1 for _ in generate(model, ids, n_tokens, temperature=0.0))
            found[name].append(n / (time.perf_counter() - start))
    return {name: statistics.median(speeds) for name, speeds in found.items()}


def compare(model, models, tokenizer, rows):
    """Yield the lines of a table: what each of {name: model} costs beside the model."""
    base, speeds = sums_of(model, tokenizer, rows), tokens_per_second({"fp32": model} | models)
    half = n_bytes(model) / 2
    yield (f"{'':11}{'MB':>8}{'of fp16':>9}{'perplexity':>12}{'change (95% interval)':>28}"
           f"{'tokens/s':>10}")
    for name, other in ({"fp32": model} | models).items():
        size, sums = n_bytes(other), sums_of(other, tokenizer, rows)
        change, low, high = perplexity_change(base, sums)
        words = "" if other is model else f"{change:+.2%} ({low:+.2%} to {high:+.2%})"
        yield (f"{name:11}{size / 1e6:8.1f}{size / half:9.2f}"
               f"{np.exp(ratio(sums.sum(axis=0))):12.2f}{words:>28}{speeds[name]:10.1f}")


@dataclass(frozen=True)
class QuantizeConfig:
    """Which run, and how small."""
    run: str | None = option(None, "run folder; else the newest under runs/", positional=True)
    quant: str | None = option(None, "the kind to write", known=lambda: KINDS)
    method: str = option("nearest", "how integers are chosen", known=lambda: METHODS)
    data: str | None = option(None, "shards to calibrate and measure on (default: the run's)")
    out: str = option("", "the folder to write; empty: RUN-QUANT")
    checkpoint: str = option("best", "best | last | a step")
    max_tokens: int = option(20_000, "held-out tokens to measure on", low=100)

    __post_init__ = check_options


def main():
    typed, = parse_options(__doc__, QuantizeConfig)
    config = QuantizeConfig(**typed)
    refuse_idle(typed, ["method", "out"] * (not config.quant), "without --quant=KIND")
    refuse_idle(typed, ["method"] * (config.quant not in BITS), f"with --quant={config.quant}")
    folder = config.run or newest_run()
    out = new_folder(config.out or f"{Path(folder)}-{config.quant}") if config.quant else None
    path = pick_checkpoint(folder, config.checkpoint)
    model, tokenizer = load_run(folder, path)
    model = merge(model)
    n_new_tokens(model, 1, SampleConfig())  # refuses one that writes no text
    block_size, train = model.config.block_size, None
    if config.method == "gptq" or not config.quant:
        rows = held_out(folder, config.data, "train", rows=True)
        train = text_batches(tokenizer, rows, block_size)
    if config.quant:
        gptq = config.method == "gptq"
        models = {config.quant: smaller(model, config.quant, train if gptq else None)}
    else:
        models = {kind: smaller(model, kind) for kind in ("bf16", *BITS)}
        models["int4, gptq"] = smaller(model, "int4", train)
    rows = held_out(folder, config.data, max_tokens=config.max_tokens, rows=True)
    for line in compare(model, models, tokenizer, rows):
        print(line)
    if config.quant:
        write_changed(folder, path, models[config.quant], tokenizer, out)
        print(f"next: python sample.py {out}")


if __name__ == "__main__":
    run_command(main)
