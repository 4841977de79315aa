"""
Runs side by side: run folders go in; out come a table with the options in which they differ, what
they reached, the mean and the spread of those that differ in their seeds alone, and a picture of
all losses.

    python -m chapters.compare runs/a runs/b
    python -m chapters.compare runs/* --out=runs/compare.png

Losses are nats per token, of the last validation. Those of different data or tokenizers do not
compare; bits per byte do, on the same text.
"""

import math
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace

if __name__ == "__main__":  # `python chapters/compare.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.nonfinite import read_run
from chapters.settings import as_typed
from chapters.sweep import picture
from model import option
from sample import warn
from tokenizer import parse_options, reading, run_command
from train import smooth

NO_CHOICE = {"out", "config", "resume", "rewarm", "force"}  # options that make no other run


@dataclass(frozen=True)
class CompareConfig:
    """What is compared."""
    folders: list = option([], "two run folders or more; files among them are passed over",
                           positional=True)
    out: str = option("runs/compare.png", "the picture")


# -----------------------------------------------------------------------------
# A run in numbers.


def load(folder):
    """A run folder -> its name, its rows, {name: value} of its options, its source, and what it
    reached; ValueError if it is no run or has no row yet."""
    rows, config = read_run(folder)
    data, train = config["data"], asdict(config["train"])
    options = {name: value for name, value in train.items() if name not in NO_CHOICE}
    options |= asdict(config["model"]) | dict(data=data["fingerprint"])
    losses = [row["val_loss"] for row in rows if math.isfinite(row["val_loss"])]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    with reading(Path(folder, "config.json")):
        bits = data["val"]["tokens"] / data["val"]["bytes"] / math.log(2)  # of a nat per token
    loss = losses[-1] if losses else math.nan
    return SimpleNamespace(
        name=str(folder), rows=rows, options=options, steps=rows[-1]["step"], loss=loss,
        source=f"{data['path']}#{data['fingerprint'][:8]}", bits=loss * bits,
        speed=median(speeds or [math.nan]))


def load_all(folders):
    """The runs of these folders, without files, and without those that are no run, which are
    named; ValueError if fewer than two are left."""
    runs = []
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        if not folder.is_file():  # runs/* has a leaderboard.json, too
            try:
                runs.append(load(folder))
            except ValueError as error:
                warn(f"left out: {error}")
    if len(runs) < 2:
        raise ValueError(f"two runs or more are compared, and these are {len(runs)}: name folders "
                         "such as runs/a runs/b")
    return runs


# -----------------------------------------------------------------------------
# What the table says.


def differing(runs):
    """For each run {name: value} of the options that are not the same in all of them; data are
    the same if their fingerprint is."""
    names = [name for name in runs[0].options
             if any(run.options[name] != runs[0].options[name] for run in runs)]
    return [{name: run.source if name == "data" else run.options[name] for name in names}
            for run in runs]


def mean_of_seeds(losses):
    """"3 seeds: validation loss 3.2151 on average, standard deviation 0.0150" of losses, those that
    are not finite aside."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    lost = f", {len(losses) - len(finite)} without a loss" * (len(finite) < len(losses))
    if len(finite) < 2:
        return f"{len(losses)} seeds{lost}: of fewer than two losses there is no spread"
    return (f"{len(losses)} seeds{lost}: validation loss {mean(finite):.4f} on average, standard "
            f"deviation {stdev(finite):.4f}")


def table(runs):
    """All runs as lines, then what runs that differ in nothing but the seed have in common."""
    changes, width = differing(runs), max(len(run.name) for run in runs)
    yield (f"{'run':{width}} {'steps':>7} {'val loss':>9} {'bits/byte':>9} {'tokens/s':>9}  "
           "in what they differ")
    alike = defaultdict(dict)
    for run, own in zip(runs, changes):
        yield (f"{run.name:{width}} {run.steps:7,} {run.loss:9.4f} {run.bits:9.4f} "
               f"{run.speed:9,.0f}  {as_typed(own)}").rstrip()
        others = as_typed({name: x for name, x in own.items() if name != "seed"})
        alike[others][own.get("seed")] = run.loss
    if not changes[0]:
        yield "in no option: it is one run, as far as a machine computes the same each time"
    elif changes[0].keys() == {"seed"}:
        yield f"the seeds alone differ; {mean_of_seeds([*alike[''].values()])}"
    else:
        yield from (f"{others}: {mean_of_seeds([*losses.values()])}"
                    for others, losses in alike.items() if len(losses) > 1)


def draw(runs, path):
    """One picture: of each run the training loss as a line, its validation losses as dots."""
    with picture(path, title="Training loss, mean of 20 steps; dots: validation", xlabel="step",
                 ylabel="loss (nats per token)") as ax:
        for run, own in zip(runs, differing(runs)):
            label = f"{run.name} {as_typed(own)}"
            rows = [row for row in run.rows if math.isfinite(row["loss"])]
            line, = ax.plot([row["step"] for row in rows], smooth([row["loss"] for row in rows]),
                            label=label if len(label) < 60 else run.name)
            dots = [row for row in rows if math.isfinite(row["val_loss"])]
            ax.plot([row["step"] for row in dots], [row["val_loss"] for row in dots], "o",
                    color=line.get_color())


def main():
    typed, = parse_options(__doc__, CompareConfig)
    config = CompareConfig(**typed)
    runs = load_all(config.folders)
    print("\n".join(table(runs)))
    draw(runs, config.out)
    print(f"{config.out} shows their losses")


if __name__ == "__main__":
    run_command(main)
