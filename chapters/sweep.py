"""
A sweep of the learning rate (arXiv:1506.01186): training with ever higher rates until the loss
takes off, on weights that are then thrown away; out come a picture and a rate to try.

    python -m chapters.sweep --data=mybook.txt --size=small     # options of train.py
    python -m chapters.search --find_lr --data=mybook.txt       # the same
"""

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # `python chapters/sweep.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from model import GPTConfig
from tokenizer import QUIET, parse_options, replacing, run_command
from train import (TrainConfig, complete_options, find_shards, micro_batches, prepare_run,
                   run_folder, set_rate, smooth, split_batch, take_step)

N_STEPS, LOWEST, HIGHEST = 60, 1e-4, 3.0  # of the sweep, and its rates
TAKES_OFF = 1.3  # times the lowest mean loss


@contextlib.contextmanager
def picture(path, **labels):
    """Yield the axes of a picture with a title and labels; it is written at the end."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 5), dpi=120)
    ax = fig.subplots()
    yield ax
    ax.set(**labels)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with replacing(path) as file:
        fig.savefig(file, format="png", bbox_inches="tight")


def sweep(config, shape):
    """-> (the rates that were tried, the mean loss at each): a TrainConfig's run of a GPTConfig,
    step by step, until the loss is well above its lowest."""
    rates, losses, means = [], [], []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = replace(config, out=folder, resume=False)
        run = prepare_run(config, shape, lambda text: None, stack)
        _, n_passes = split_batch(config, 1)
        for step in tqdm(range(N_STEPS), **QUIET):
            rates.append(LOWEST * (HIGHEST / LOWEST) ** (step / (N_STEPS - 1)))
            set_rate(run.optimizer, rates[-1])
            xs, ys = zip(*micro_batches(run.batches, n_passes, run.model))
            losses.append(take_step(run, run.model, xs, ys, config.grad_clip)[0].item())
            means = smooth(losses, 5)[:-2]  # of the last two there is no mean of five yet
            if means and not means[-1] < TAKES_OFF * min(means):
                break
    return rates[:len(means)], means


def find_rate(config, shape):
    """Sweep, draw find_lr.png in the folder that a run would take, and print the rate to try: a
    third of the one with the lowest loss."""
    shards = find_shards(config, 0, print)
    rates, means = sweep(replace(config, data=str(shards)), shape)
    rate, path = rates[means.index(min(means))] / 3, run_folder(config, shards) / "find_lr.png"
    with picture(path, title="Loss while the learning rate grows", xlabel="learning rate",
                 xscale="log", ylabel="loss, mean of five steps (nats per token)") as ax:
        ax.plot(rates, means, color="#4477aa", linewidth=2)
        ax.axvline(rate, color="#cc6633", label=f"suggested: {rate:.1g}")
    print(f"loss {means[0]:.3f}, then {min(means):.3f}, then {means[-1]:.3f} at rates from "
          f"{rates[0]:.0e} to {rates[-1]:.0e}: see {path}; try --learning_rate={rate:.1g}")


def main():
    find_rate(*complete_options(*parse_options(__doc__, TrainConfig, GPTConfig)))


if __name__ == "__main__":
    run_command(main)
