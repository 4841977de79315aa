"""
What FLOPs cost on a GPU, and what known models took.

    from chapters.cost import gpu_cost
    gpu_cost(3.6e21, "H100", price=2.5, mfu=0.4)     # {"hours": 2527.8, "money": ...}
    python -m chapters.cost                          # known models, as the plan sees them
"""

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # `python chapters/cost.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from model import GPT, GPTConfig, check_known, check_options, option
from tokenizer import parse_options, run_command

# FLOP/s of dense products in bf16 (T4, V100: fp16) summed in float32, watts of the board, bytes of
# memory: the makers' data sheets.
GPUS = {
    "T4": (65e12, 70, 16e9), "V100": (125e12, 300, 32e9), "A100": (312e12, 400, 80e9),
    "L4": (121e12, 72, 24e9), "L40S": (362e12, 350, 48e9), "H100": (989e12, 700, 80e9),
    "H200": (989e12, 700, 141e9), "B200": (2250e12, 1000, 180e9), "MI300X": (1307e12, 750, 192e9),
    "RTX3090": (71e12, 350, 24e9), "RTX4090": (165e12, 450, 24e9)}


def outline(config):
    """The model of a GPTConfig without its numbers: no size takes memory or time."""
    try:
        with torch.device("meta"):
            return GPT(config)
    except RuntimeError:
        raise ValueError(f"a model of n_embd={config.n_embd}, vocab_size={config.vocab_size} has "
                         "more numbers than can be counted: take smaller ones") from None


def gpu_cost(flops, gpu="H100", price=2.5, mfu=0.4, carbon=480):
    """-> hours of one GPU, money at a price an hour, kWh of its board, kg of CO2 at `carbon` g a
    kWh, if it does the share mfu of the FLOP/s it could. gpu_cost(3.6e21)["hours"] == 2527.8"""
    check_known(gpu, GPUS, "gpu")
    peak, watts, _ = GPUS[gpu]
    hours = flops / (peak * mfu) / 3600
    kwh = hours * watts / 1000
    return dict(hours=hours, money=hours * price, kwh=kwh, co2=kwh * carbon / 1000)


@lru_cache(maxsize=None)
def published_models():
    """{name: row} of known models, from published.jsonl: what was published of them, and what we
    make of it: our_parameters, our_flops, is_exact, and the mfu that their hours tell of. What our
    blocks cannot express (a wider MLP, relative positions) counts as weights."""
    rows = {}
    for line in Path(__file__).with_name("published.jsonl").read_text("utf-8").splitlines():
        row = SimpleNamespace(**json.loads(line))
        model = outline(GPTConfig(**row.shape))
        row.our_parameters = model.n_parameters()
        lacking = row.parameters - row.our_parameters
        row.is_exact = lacking <= 0.02 * row.parameters
        weights = 0 if row.is_exact else lacking
        row.our_flops = row.tokens * (model.flops_per_token() + 6 * weights)
        row.mfu = row.a100_hours and row.our_flops / (GPUS["A100"][0] * 3600 * row.a100_hours)
        rows[row.name] = row
    return rows


def short(n):
    """short(124_439_808) == "124.4M"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:,.1f}{letter}"
    return f"{n:.0f}"


def plain(x):
    """A number as people write it: plain(0.0123) == "0.0123", plain(12345.6) == "12,346"."""
    return f"{x:,.0f}" if x >= 100 or x == 0 else f"{x:.3g}" if x >= 0.001 else "less than 0.001"


def join_parts(parts):
    return ", ".join(f"{name} {short(n)}" for name, n in parts.items() if n)


def duration(seconds):
    """duration(7200) == "2.0 hours"."""
    for unit, name in ((31557600, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "less than a second"


def gigabytes(n):
    return f"{n / 1e9:,.2f} GB" if n < 1e11 else f"{n / 1e9:,.0f} GB"


def verdict(totals, has, where):
    """Whether a run fits into `has` bytes somewhere, in words, by its totals, {options: bytes}, the
    first of them without any."""
    for options, total in totals.items():
        if total < has:
            return f"fits{options and ' with ' + options} into the {gigabytes(has)} {where}"
    return (f"does NOT fit into the {gigabytes(has)} {where}: it takes "
            f"{gigabytes(min(totals.values()))} or more; less with a smaller --size, "
            "--micro_batch_size or --block_size")


def show_published(mfu):
    """The table of known models: parameters, FLOPs and hours at this mfu, ours and theirs."""
    columns = "{:12} {:>10}{:1} {:>9} {:>7} {:>9} {:>9} {:>11} {:>9} {:>9}"
    print(columns.format("model", "parameters", "", "published", "tokens", "FLOPs", "published",
                         "A100 hours", "published", "their mfu"))
    for row in published_models().values():
        hours = gpu_cost(row.our_flops, "A100", mfu=mfu)["hours"]
        theirs = (f"{row.a100_hours:,}", f"{row.mfu:.2f}") if row.a100_hours else ("-", "-")
        print(columns.format(row.name, short(row.our_parameters), "" if row.is_exact else "~",
                             short(row.parameters), short(row.tokens), f"{row.our_flops:.2e}",
                             f"{row.flops:.2e}" if row.flops else "-", f"{hours:,.0f}", *theirs))
    print(f"~ our blocks lack some of its weights, and FLOPs count those; hours at mfu {mfu:g}")


@dataclass(frozen=True)
class CostConfig:
    """What the table reckons with."""
    mfu: float = option(0.4, "share of a GPU's peak that a run reaches", low=0.001, below=1)

    __post_init__ = check_options


def main():
    show_published(CostConfig(**parse_options(__doc__, CostConfig)[0]).mfu)


if __name__ == "__main__":
    run_command(main)
