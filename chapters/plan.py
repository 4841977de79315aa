"""
What a training run costs, before it runs: parameters, tokens, FLOPs, memory, time, money, energy.

    python -m chapters.plan --size=small --data=mybook.txt     # train.py's options
    python -m chapters.plan --architecture=gpt2 --size=gpt2-xl --vocab_size=50257 --gpu=A100
    python -m chapters.plan --published                        # known models, as the plan sees them

Without --tokens, --max_steps or --epochs it plans 20 tokens a parameter (arXiv:2203.15556), with
--minutes what this machine reads in that time. The time here is measured: a few seconds of training
on random tokens. That of a GPU is reckoned from its peak, of which a run reaches the share --mfu.
"""

import dataclasses
import math
import sys
import tempfile
import time
from argparse import SUPPRESS, BooleanOptionalAction
from functools import lru_cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from data import folder_name
from tokenizer import Parser, read_sealed, run_command, share_cores

if __name__ == "__main__":
    share_cores()

import torch

from model import GPT, GPTConfig, check_known, free_memory, pick_kernels, training_memory
from sample import pick_device, pick_precision
from train import (LENGTHS, TrainConfig, complete_options, keep_freed_memory, last_step,
                   matmul_rate, new_run, peak_memory, seconds_per_step, shape_of, split_batch)

# FLOP/s of dense products in bf16 (T4, V100: fp16) summed in float32, watts of the board, bytes of
# memory: the makers' data sheets.
GPUS = {
    "T4": (65e12, 70, 16e9), "V100": (125e12, 300, 32e9), "A100": (312e12, 400, 80e9),
    "L4": (121e12, 72, 24e9), "L40S": (362e12, 350, 48e9), "H100": (989e12, 700, 80e9),
    "H200": (989e12, 700, 141e9), "B200": (2250e12, 1000, 180e9), "MI300X": (1307e12, 750, 192e9),
    "RTX3090": (71e12, 350, 24e9), "RTX4090": (165e12, 450, 24e9)}
TOKENS_PER_PARAMETER = 20  # of the best model for its FLOPs: arXiv:2203.15556
HOLES = 0.3  # measured: memory that glibc keeps and cannot use again, as a share of what is in use

# Shape and tokens of known models, then what was published of them: parameters, FLOPs, and hours
# of an A100. What our blocks cannot express (a wider MLP, relative positions) counts as weights.
LLAMA2 = dict(architecture="modern", vocab_size=32000, block_size=4096, qk_norm=False)
FALCON = LLAMA2 | dict(vocab_size=65024, block_size=2048, n_kv_head=8, norm="layernorm",
                       activation="gelu", tied=True)
GPT3 = dict(architecture="gpt2", block_size=2048)
PUBLISHED = {
    "GPT-3": (GPT3 | dict(n_layer=96, n_head=96, n_embd=12288),
              3e11, 174.6e9, 3.14e23, None),                                 # arXiv:2005.14165
    "Chinchilla": (GPT3 | dict(vocab_size=32000, n_layer=80, n_head=64, n_embd=8192),
                   1.4e12, 70e9, 5.76e23, None),                             # arXiv:2203.15556
    "Llama 2 7B": (LLAMA2 | dict(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096),
                   2e12, 6.738e9, None, 184_320),                            # arXiv:2307.09288
    "Llama 2 13B": (LLAMA2 | dict(n_layer=40, n_head=40, n_kv_head=40, n_embd=5120),
                    2e12, 13.016e9, None, 368_640),
    "Llama 2 70B": (LLAMA2 | dict(n_layer=80, n_head=64, n_kv_head=8, n_embd=8192),
                    2e12, 68.977e9, None, 1_720_320),
    "Falcon 40B": (FALCON | dict(n_layer=60, n_head=128, n_embd=8192),
                   1e12, 40e9, 2_800 * 8.64e19, None),                     # arXiv:2311.16867
    "Falcon 180B": (FALCON | dict(n_layer=80, n_head=232, n_embd=14848),
                    3.5e12, 180e9, 43_500 * 8.64e19, None)}


# -----------------------------------------------------------------------------
# What can be reckoned: models of any size, and GPUs that are not here.


def outline(shape):
    """The model of a GPTConfig without its numbers: no size takes memory or time."""
    with torch.device("meta"):
        return GPT(shape)


def memory(model, batch_size, optimizer="muon", kernels="fused", dtype=None, recompute=False,
           device="cpu"):
    """{part: bytes} that the tensors of a training step hold on a device at its fullest, for a
    model or its outline."""
    model.use("torch" if kernels == "cuda" else kernels, dtype, recompute)
    return training_memory(model, batch_size, optimizer, device)


def process_memory(parts, base, low_memory=False):
    """Bytes of a process on a CPU: base for the program itself, its tensors, and between these the
    holes of Linux' allocator, unless low_memory hands back what is freed."""
    holes = HOLES if sys.platform == "linux" and not low_memory else 0
    return base + sum(parts.values()) * (1 + holes)


def gpu_cost(flops, gpu="H100", price=2.5, mfu=0.4, carbon=480):
    """-> hours of one GPU, money at a price an hour, kWh of its board, kg of CO2 at `carbon` g a
    kWh, if it does the share mfu of the FLOP/s it could. gpu_cost(3.6e21)["hours"] == 2527.8"""
    check_known(gpu, GPUS, "gpu")
    peak, watts, _ = GPUS[gpu]
    hours = flops / (peak * mfu) / 3600
    kwh = hours * watts / 1000
    return dict(hours=hours, money=hours * price, kwh=kwh, co2=kwh * carbon / 1000)


@lru_cache(maxsize=None)
def published_row(name):
    """A known model -> its row: parameters here and as published, tokens, FLOPs here and as
    published, hours of an A100 as published, and the mfu that they tell of."""
    shape, tokens, parameters, their_flops, their_hours = PUBLISHED[name]
    model = outline(GPTConfig(**shape))
    lacking = parameters - model.n_parameters()
    lacking = lacking if lacking > 0.02 * parameters else 0
    flops = tokens * (model.flops_per_token() + 6 * lacking)
    mfu = their_hours and flops / (GPUS["A100"][0] * 3600 * their_hours)
    return SimpleNamespace(name=name, ours=model.n_parameters(), parameters=parameters,
                           tokens=tokens, flops=flops, their_flops=their_flops,
                           their_hours=their_hours, mfu=mfu, is_exact=not lacking)


# -----------------------------------------------------------------------------
# What is measured on this machine.


def base_memory():
    """Bytes of this process once it has trained a model of next to no size; None: unknown."""
    tiny = GPTConfig(vocab_size=64, n_layer=1, n_head=1, n_embd=32, block_size=32)
    seconds_of_step(tiny, TrainConfig(batch_size=1, micro_batch_size=1), "cpu", None)
    return peak_memory("cpu")


def seconds_of_step(shape, config, device, dtype):
    """Of a training step of a fresh model of this shape, on random tokens."""
    micro, accumulate = split_batch(config, 1)
    model = GPT(shape).to(device)
    model.use(config.kernels, dtype, config.recompute)
    with tempfile.TemporaryDirectory() as folder:
        return seconds_per_step(new_run(folder, model, config, device), config, micro, accumulate)


def measured_seconds(shape, config, device, dtype, patience=5.0):
    """Seconds of a training step here, from a probe of about `patience` seconds: where steps last
    longer it takes fewer sequences at a time, then fewer layers, which are all alike. None where
    not even one layer can be tried."""
    budget = patience * matmul_rate(torch.device(device), dtype) / 4  # two steps at half its rate
    small, micro = shape, split_batch(config, 1)[0]

    def flops(shape):
        return shape.block_size * outline(shape).flops_per_token()

    whole = cost = flops(shape)
    while micro * cost > budget and micro > 1:
        micro = micro // 2 if config.batch_size % (micro // 2) == 0 else 1
    while micro * cost > budget and small.n_layer > 1:
        small = dataclasses.replace(small, n_layer=small.n_layer // 2)
        cost = flops(small)
    needed = sum(memory(outline(small), micro, config.optimizer, "torch", dtype).values())
    if micro * cost > 10 * budget or needed > (free_memory(device) or math.inf) / 2:
        return None
    config = dataclasses.replace(config, micro_batch_size=micro)
    tries, start = [], time.perf_counter()
    while len(tries) < 5 and (not tries or time.perf_counter() - start < patience / 2):
        tries.append(seconds_of_step(small, config, device, dtype))
    return median(tries) * whole / cost


# -----------------------------------------------------------------------------
# The plan of one run.


def find_card(config):
    """card.json of the shards that train.py would take, None if it has to make them first."""
    given, made = Path(config.data), Path("shards") / folder_name(config.data)
    for folder in (given, made):
        if (folder / "card.json").exists():
            card = read_sealed(folder / "card.json")
            if folder == given or card["vocab_size"] == config.vocab_size:
                return card
    return None


def planned_steps(config, has_length, model, n_tokens, seconds):
    """How many steps the run takes: as its options say, else 20 tokens a parameter."""
    tokens_per_step = config.batch_size * model.config.block_size
    if not has_length:
        return math.ceil(TOKENS_PER_PARAMETER * model.n_parameters() / tokens_per_step)
    steps = last_step(config, n_tokens, tokens_per_step)
    if not config.minutes:
        return steps
    if seconds is None:
        raise ValueError(f"--minutes={config.minutes:g} says nothing of a model that is too large "
                         "to try here: give --tokens")
    return min(steps, max(1, round(60 * config.minutes / seconds)))


def make_plan(config, has_length=True, measure=True):
    """All numbers of the run that a TrainConfig describes, as a namespace; has_length=False plans
    20 tokens a parameter. Without measure nothing is tried, and seconds (of a step) are None."""
    device, card = pick_device(config.device), find_card(config)
    model = outline(shape_of(config, card["vocab_size"] if card else config.vocab_size))
    if has_length and config.epochs and not card:
        raise ValueError(f"--epochs={config.epochs:g} are passes over data that is not prepared: "
                         f"python data.py {config.data} does that, or give --tokens")
    keep_freed_memory(config.low_memory)
    base = base_memory() if device == "cpu" else 0
    precision, dtype = pick_precision(config.precision, device)
    kernels = pick_kernels(config.kernels, torch.device(device), dtype or torch.float32,
                           grouped=model.config.n_kv_head < model.config.n_head)
    seconds = measured_seconds(model.config, config, device, dtype) if measure else None
    n_tokens = card["train"]["tokens"] if card else 0
    steps = planned_steps(config, has_length, model, n_tokens, seconds)
    tokens = steps * config.batch_size * model.config.block_size
    held = {recompute: memory(model, split_batch(config, 1)[0], config.optimizer, kernels, dtype,
                              recompute, device) for recompute in (False, True)}
    return SimpleNamespace(
        config=config, model=model, device=device, precision=precision, kernels=kernels, base=base,
        n_tokens=n_tokens, steps=steps, tokens=tokens, memory=held, seconds=seconds,
        flops=tokens * model.flops_per_token(), free=free_memory(device),
        matmul_rate=matmul_rate(torch.device(device), dtype))


# -----------------------------------------------------------------------------
# In words.


def short(n):
    """short(124_439_808) == "124.4M"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:,.1f}{letter}"
    return f"{n:.0f}"


def span(seconds):
    """span(7200) == "2.0 hours"."""
    for unit, name in ((31557600, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} seconds"


def gigabytes(n):
    return f"{n / 1e9:,.2f} GB" if n < 1e11 else f"{n / 1e9:,.0f} GB"


def listed(parts):
    return ", ".join(f"{name} {short(n)}" for name, n in parts.items() if n)


def token_lines(plan):
    share = plan.tokens / plan.model.n_parameters()
    yield f"{short(plan.tokens)}, {share:.3g} per parameter, in {plan.steps:,} steps"
    if not plan.n_tokens:
        yield (f"{plan.config.data} is not prepared yet: python data.py {plan.config.data} counts "
               "its tokens")
        return
    epochs = plan.tokens / plan.n_tokens
    odd = (": less than half of it" if epochs < 0.5 else
           ": after about 4 times it teaches less, after 8 little" if epochs > 8 else "")
    yield f"{plan.config.data} has {short(plan.n_tokens)}: {epochs:.2g} epochs{odd}"  # 2305.16264


def memory_lines(plan):
    """With and without recompute; on a CPU with the process around the tensors."""
    micro = split_batch(plan.config, 1)[0]
    yield f"{micro} sequences at a time, {plan.precision}, {plan.kernels} kernels"
    for recompute, parts in plan.memory.items():
        total, options = sum(parts.values()), "--recompute" if recompute else "as it is"
        if plan.device == "cpu" and plan.base:
            total = process_memory(parts, plan.base, recompute or plan.config.low_memory)
            options += " --low_memory" * recompute
        fits = "" if not plan.free else ", fits" if total < plan.free else ", does NOT fit"
        yield f"{options}: {gigabytes(total)}{fits}; bytes of {listed(parts)}"
    if plan.free:
        yield f"{gigabytes(plan.free)} are free here ({plan.device})"


def time_lines(plan):
    if plan.seconds is None:
        least = plan.flops / plan.matmul_rate
        yield f"too large to try; at the rate of large matrix products at least {span(least)}"
        return
    rate = plan.flops / plan.steps / plan.seconds
    yield (f"{span(plan.steps * plan.seconds)}, measured: {plan.seconds:.3g} s a step, "
           f"{short(plan.tokens / plan.steps / plan.seconds)} tokens/s, "
           f"mfu {rate / plan.matmul_rate:.0%}")


def gpu_lines(plan, gpu, price, n_gpus, mfu, carbon):
    cost, (_, _, there) = gpu_cost(plan.flops, gpu, price, mfu, carbon), GPUS[gpu]
    yield (f"{span(3600 * cost['hours'] / n_gpus)} on {n_gpus} at mfu {mfu:g}: "
           f"{cost['hours']:,.3g} GPU hours, {cost['money']:,.2f} at {price:g} an hour, "
           f"{cost['kwh']:,.3g} kWh, {cost['co2']:,.3g} kg CO2 at {carbon:g} g a kWh")
    for recompute in (False, True):
        parts = memory(plan.model, split_batch(plan.config, n_gpus)[0], plan.config.optimizer,
                       "cuda", torch.bfloat16, recompute, "cuda")
        total = sum(parts.values())
        if total < there:
            word = " with --recompute" if recompute else ""
            yield f"bf16 takes {gigabytes(total)} of its {gigabytes(there)}{word}"
            return
    yield (f"bf16 takes {gigabytes(total)}, with --recompute: more than its {gigabytes(there)}, "
           f"and train.py keeps all weights on each GPU")


def show_plan(plan, options):
    c = plan.model.config
    model = [f"{c.architecture}, {c.n_layer} layers, {c.n_embd} channels, {c.n_head} heads, "
             f"{c.n_kv_head} of keys, {c.block_size} tokens, vocabulary {c.vocab_size:,}"]
    flops = [f"{plan.flops:.3g} FLOPs, {short(plan.model.flops_per_token())} a token"]
    parameters = [f"{plan.model.n_parameters():,}: {listed(plan.model.parameters_by_part())}"]
    sections = {"model": model, "parameters": parameters, "tokens": token_lines(plan),
                "compute": flops, "memory": memory_lines(plan), "time here": time_lines(plan),
                options.gpu: gpu_lines(plan, options.gpu, options.price, options.gpus,
                                       options.mfu, options.carbon)}
    for name, lines in sections.items():
        for n, line in enumerate(lines):
            print(f"{name if n == 0 else '':11}{line}")


def show_published(mfu):
    print("model        parameters  published  tokens      FLOPs  published  A100 hours  published"
          "  their mfu")
    for row in map(published_row, PUBLISHED):
        hours = gpu_cost(row.flops, "A100", mfu=mfu)["hours"]
        print(f"{row.name:12} {short(row.ours):>9}{' ' if row.is_exact else '~'} "
              f"{short(row.parameters):>10} {short(row.tokens):>7} {row.flops:10.2e} "
              + (f"{row.their_flops:10.2e}" if row.their_flops else f"{'-':>10}")
              + f" {hours:11,.0f} " + (f"{row.their_hours:10,} {row.mfu:10.2f}"
                                       if row.their_hours else f"{'-':>10} {'-':>10}"))
    print(f"~ our blocks lack some of its weights, and FLOPs count those; hours at mfu {mfu:g}")


def parse_options():
    """-> (the plan's own options, those of train.py that were typed, as a dict)"""
    parser = Parser(__doc__)
    parser.usage = "python -m chapters.plan [--OPTION=VALUE ...]"
    parser.epilog = "and the options of train.py: python train.py --help lists them"
    for name, value, text in (
            ("gpu", "H100", f"a GPU to reckon with: {', '.join(GPUS)}"),
            ("price", 2.5, "money for an hour of it"), ("gpus", 1, "how many of them"),
            ("mfu", 0.4, "share of its peak that a run reaches"),
            ("carbon", 480.0, "g of CO2 for a kWh; in 2023 the world's mean was about 480")):
        parser.add_argument(f"--{name}", type=type(value), default=value,
                            help=f"{text} (default %(default)s)")
    parser.add_argument("--published", action="store_true", help="a table of known models instead")
    for f in dataclasses.fields(TrainConfig):
        kind = dict(action=BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", default=SUPPRESS, help=SUPPRESS, **kind)
    given = vars(parser.parse_args())
    own = {name: given.pop(name) for name in ("gpu", "price", "gpus", "mfu", "carbon", "published")}
    return SimpleNamespace(**own), given


def check_options(options):
    check_known(options.gpu, GPUS, "gpu")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"mfu={options.mfu:g} must be above 0 and at most 1")
    if options.gpus < 1:
        raise ValueError(f"gpus={options.gpus} must be at least 1")
    for name in ("price", "carbon"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"{name}={getattr(options, name):g} must be a number from 0")


def main():
    options, given = parse_options()
    check_options(options)
    if options.published:
        show_published(options.mfu)
        return
    config = complete_options(given)
    split_batch(config, options.gpus)  # says so if the batch cannot be shared out
    show_plan(make_plan(config, bool(config.config or given.keys() & set(LENGTHS))), options)


if __name__ == "__main__":
    run_command(main)
