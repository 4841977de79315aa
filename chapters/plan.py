"""
What a training run costs, before it runs: parameters, tokens, FLOPs, memory, time, money, energy.

    python -m chapters.plan --size=small --data=mybook.txt     # train.py's options
    python -m chapters.plan --architecture=gpt2 --size=gpt2-xl --vocab_size=50257 --gpu=A100
    python -m chapters.plan --published                        # known models, as the plan sees them

Without --tokens, --max_steps or --epochs it plans 20 tokens a parameter (arXiv:2203.15556), with
--minutes what this machine reads in that time. The time here is measured: a few seconds of training
on random tokens. That of a GPU follows from its peak, of which a run reaches the share --mfu.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

if __name__ == "__main__":  # `python chapters/plan.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from chapters.cost import (GPUS, duration, gigabytes, gpu_cost, join_parts, outline, plain, short,
                           show_published, verdict)
from chapters.kernels import keep_freed_memory
from chapters.memory import free_memory, parameters_by_part, process_memory, training_memory
from data import read_card
from model import GPT, GPTConfig, check_options, option
from sample import pick_device, pick_precision
from tokenizer import parse_options, refuse_idle, run_command
from train import (LENGTHS, TrainConfig, check_model, complete_options, gradients, is_shards,
                   last_step, matmul_rate, model_shape, new_run, peak_memory, split_batch, update)

TOKENS_PER_PARAMETER = 20  # of the best model for its FLOPs: arXiv:2203.15556


@dataclass(frozen=True)
class PlanConfig:
    """The plan; all other options are those of the run that is planned."""
    gpu: str = option("H100", "to reckon with", known=lambda: GPUS)
    price: float = option(2.5, "money for an hour of it")
    gpus: int = option(1, "how many of them", low=1)
    mfu: float = option(0.4, "share of its peak that a run reaches", low=0.001, below=1)
    carbon: float = option(480.0, "g of CO2 for a kWh; in 2023 the world's mean was about 480")
    published: bool = option(False, "a table of known models instead")

    __post_init__ = check_options


# -----------------------------------------------------------------------------
# What is measured on this machine.


def seconds_of_step(shape, config, device, dtype):
    """-> (seconds of a training step of a new model on random tokens, the kernels that it used).
    The second of two steps counts, and its one forward pass stands for all of them."""
    micro, n_passes = split_batch(config, 1)
    model = GPT(shape).to(device)
    kernels = model.use(config.kernels, dtype, config.recompute, micro)
    run = new_run(os.devnull, model, config, device)
    ids = torch.randint(shape.vocab_size, (micro, shape.block_size), device=device)
    for _ in range(2):
        start = time.perf_counter()
        gradients(run, model, [(ids, ids)], 1, config.grad_clip)[0].item()
        middle = time.perf_counter()
        update(run)
        model.lm_head.weight[0, 0].item()  # a GPU has then finished
    return n_passes * (middle - start) + time.perf_counter() - middle, kernels


def base_memory():
    """Bytes of this process once it has trained a model of next to no size; None: unknown."""
    small = GPTConfig(vocab_size=64, n_layer=1, n_head=1, n_embd=32, block_size=32)
    config = TrainConfig(batch_size=1, micro_batch_size=1, kernels="torch")
    seconds_of_step(small, config, "cpu", None)
    return peak_memory("cpu")


def measured_seconds(shape, config, device, dtype, patience=5.0):
    """-> (seconds of a training step here, the kernels), from a probe of about `patience` seconds:
    where steps last longer it takes fewer sequences at a time, then fewer layers, which are all
    alike. (None, the kernels asked for) where not even one layer can be tried."""
    budget = patience * matmul_rate(torch.device(device), dtype) / 4  # two steps at half its rate
    small, micro = shape, split_batch(config, 1)[0]
    whole = cost = shape.block_size * outline(shape).flops_per_token()
    while micro * cost > budget and micro > 1:
        micro = micro // 2 if config.batch_size % (micro // 2) == 0 else 1
    while micro * cost > budget and small.n_layer > 1:
        small = replace(small, n_layer=small.n_layer // 2)
        cost = small.block_size * outline(small).flops_per_token()
    needed = sum(training_memory(outline(small), micro, config.optimizer, dtype=dtype).values())
    if micro * cost > 10 * budget or needed > (free_memory(device) or math.inf) / 2:
        return None, "torch" if config.kernels == "auto" else config.kernels
    config, tries, start = replace(config, micro_batch_size=micro), [], time.perf_counter()
    while len(tries) < 5 and (not tries or time.perf_counter() - start < patience / 2):
        seconds, kernels = seconds_of_step(small, config, device, dtype)
        config = replace(config, kernels=kernels)  # auto looks for them once
        tries.append(seconds)
    return median(tries) * whole / cost, kernels


# -----------------------------------------------------------------------------
# The plan of one run.


def find_card(config):
    """-> (the Card of the shards that train.py would take, None if it has to make them first, what
    they are made of). The newest of sources so named count; only train.py compares the content."""
    names = [config.data] if isinstance(config.data, str) else config.data
    if is_shards(config.data):
        return read_card(config.data), config.data
    made = sorted(Path("shards").glob("*/card.json"), key=os.path.getmtime)
    for card in (read_card(path.parent) for path in reversed(made)):
        same = [Path(source["name"]) for source in card.sources] == [*map(Path, names)]
        if same and card.options.get("vocab_size") in (None, config.vocab_size):
            return card, " ".join(names)
    return None, " ".join(names)


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


def make_plan(config, shape=None, has_length=True, measure=True):
    """All numbers of the run that a TrainConfig and a GPTConfig (None: that of --size) describe;
    has_length=False plans 20 tokens a parameter. Without measure, seconds (of a step) are None."""
    device, (card, data) = pick_device(config.device), find_card(config)
    shape = shape or model_shape(config.size, config.vocab_size)
    check_model(shape, config)
    model = outline(replace(shape, vocab_size=card.vocab_size if card else shape.vocab_size))
    if has_length and config.epochs and not card:
        raise ValueError(f"--epochs={config.epochs:g} are passes over data that is not prepared: "
                         f"python data.py {data} does that, or give --tokens")
    keep_freed_memory(config.low_memory)
    base = base_memory() if device == "cpu" else 0
    precision, dtype = pick_precision(config.precision, device)
    seconds, kernels = (measured_seconds(model.config, config, device, dtype) if measure else
                        (None, config.kernels))
    n_tokens = card.train["tokens"] if card else 0
    steps = planned_steps(config, has_length, model, n_tokens, seconds)
    tokens, micro = steps * config.batch_size * model.config.block_size, split_batch(config, 1)[0]
    memory = {recompute: training_memory(model, micro, config.optimizer, kernels, dtype, recompute,
                                         device) for recompute in (False, True)}
    return SimpleNamespace(
        config=config, model=model, device=device, precision=precision, kernels=kernels, base=base,
        data=data, n_tokens=n_tokens, steps=steps, tokens=tokens, memory=memory, seconds=seconds,
        flops=tokens * model.flops_per_token(), free=free_memory(device),
        matmul_rate=matmul_rate(torch.device(device), dtype))


# -----------------------------------------------------------------------------
# In words.


def token_lines(plan):
    share = plan.tokens / plan.model.n_parameters()
    yield f"{short(plan.tokens)}, {plain(share)} per parameter, in {plan.steps:,} steps"
    if not plan.n_tokens:
        yield f"{plan.data} is not prepared yet: python data.py {plan.data} counts its tokens"
        return
    epochs = plan.tokens / plan.n_tokens
    odd = (": less than half of it" if epochs < 0.5 else
           ": after about 4 times it teaches less, after 8 little" if epochs > 8 else "")
    yield f"{plan.data} has {short(plan.n_tokens)}: {plain(epochs)} epochs{odd}"  # arXiv:2305.16264


def memory_lines(plan):
    """With and without recompute; on a CPU with the process around the tensors."""
    micro, totals = split_batch(plan.config, 1)[0], {}
    yield f"{micro} sequences at a time, {plan.precision}, {plan.kernels} kernels"
    for recompute, parts in plan.memory.items():
        total, options = sum(parts.values()), "--recompute" * recompute
        if plan.device == "cpu" and plan.base:
            total = process_memory(parts, plan.base, recompute or plan.config.low_memory)
            options += " --low_memory" * recompute
        totals[options] = total
        yield f"{options or 'as it is'}: {gigabytes(total)}; bytes of {join_parts(parts)}"
    if plan.free:
        yield verdict(totals, plan.free, f"that are free here ({plan.device})")


def time_lines(plan):
    if plan.seconds is None:
        least = duration(plan.flops / plan.matmul_rate)
        yield f"too large to try; at the rate of large matrix products at least {least}"
        return
    mfu = plan.flops / plan.steps / plan.seconds / plan.matmul_rate
    yield (f"{duration(plan.steps * plan.seconds)}, measured: {plain(plan.seconds)} s a step, "
           f"{short(plan.tokens / plan.steps / plan.seconds)} tokens/s, "
           + (f"mfu {mfu:.0%}" if mfu <= 1 else "mfu unknown, as something else runs here, too"))


def gpu_lines(plan, options):
    """Time, cost and memory on the GPUs of a PlanConfig."""
    cost = gpu_cost(plan.flops, options.gpu, options.price, options.mfu, options.carbon)
    yield (f"{duration(3600 * cost['hours'] / options.gpus)} on {options.gpus} at mfu "
           f"{options.mfu:g}: {plain(cost['hours'])} GPU hours, {cost['money']:,.2f} at "
           f"{options.price:g} an hour, {plain(cost['kwh'])} kWh, {plain(cost['co2'])} kg CO2 at "
           f"{options.carbon:g} g a kWh")
    micro = split_batch(plan.config, options.gpus)[0]
    totals = {"--recompute" * recompute: sum(training_memory(
        plan.model, micro, plan.config.optimizer, "cuda", torch.bfloat16, recompute,
        "cuda").values()) for recompute in (False, True)}
    yield verdict(totals, GPUS[options.gpu][2], f"of each {options.gpu}")


def show_plan(plan, options):
    c = plan.model.config
    model = [f"{c.architecture}, {c.n_layer} layers, {c.n_embd} channels, {c.n_head} heads, "
             f"{c.n_kv_head} of keys, {c.block_size} tokens, vocabulary {c.vocab_size:,}"]
    flops = [f"{plan.flops:.3g} FLOPs, {short(plan.model.flops_per_token())} a token"]
    parameters = [f"{plan.model.n_parameters():,}: {join_parts(parameters_by_part(plan.model))}"]
    sections = {"model": model, "parameters": parameters, "tokens": token_lines(plan),
                "compute": flops, "memory": memory_lines(plan), "time here": time_lines(plan),
                options.gpu: gpu_lines(plan, options)}
    for name, lines in sections.items():
        for n, line in enumerate(lines):
            print(f"{name if n == 0 else '':11}{line}")


def main():
    own, typed, typed_model = parse_options(__doc__, PlanConfig, TrainConfig, GPTConfig)
    options = PlanConfig(**own)
    if options.published:
        idle = [name for name in own | typed | typed_model if name not in ("published", "mfu")]
        refuse_idle(dict.fromkeys(idle), idle, "beside --published")
        return show_published(options.mfu)
    config, shape = complete_options(typed, typed_model)
    split_batch(config, options.gpus)  # says so if the batch cannot be shared out
    has_length = bool(config.config or typed.keys() & set(LENGTHS))
    show_plan(make_plan(config, shape, has_length), options)


if __name__ == "__main__":
    run_command(main)
