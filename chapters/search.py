"""
Good options by successive halving (arXiv:1502.07943): many settings train shortly, the best of them
longer, one to the end. Options of train.py go in, with values to choose from; out come their
losses, a picture, and the command of the best.

    python -m chapters.search --learning_rate=1e-3..1e-1 --n_layer=2,4,6 --max_steps=270
    python -m chapters.search --data=mybook.txt --size=nano --learning_rate=1e-3..1e-1 --runs=27
    python -m chapters.search --find_lr --data=mybook.txt     # one sweep of the learning rate alone

A..B is a range, sampled on a log scale (evenly if A is 0); A,B,C are choices; one value is fixed.
With --runs=9 and --keep=3, nine settings get a ninth of --max_steps, the best three of them a
third, the best one all. The same command again goes on where it was interrupted.

Each round trains from the beginning: going on from a checkpoint would save a fifth of the steps,
but only under a constant rate. A rate that has decayed must be compared at its end, and a search
without decay finds lower rates than a run with it wants.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import shlex
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

from chapters.sweep import find_rate, picture, running_mean
from chapters.trace import is_bad
from model import GPTConfig, check_options, option
from sample import checkpoints, pick_device, pick_precision
from tokenizer import field_kind, parse_options, read_json, run_command, write_json
from train import (TrainConfig, check_model, complete_options, find_shards, read_log, split_batch,
                   train)

OWN = {"out", "max_steps", "seed", "config", "resume", "epochs", "tokens", "minutes", "eval_every"}
ONE = {"data", "mix", "vocab_size", "device", "precision"}  # a path may have commas of its own
SHORTEST = 10              # steps below which a comparison says nothing


@dataclass(frozen=True)
class SearchConfig:
    """The search; each option of train.py is fixed or searched."""
    runs: int = option(9, "settings", low=2)
    keep: int = option(3, "of so many settings one goes on, for so many times the steps", low=2)
    max_steps: int = option(270, "steps of the last round")
    seed: int = option(1337, "of the settings, of weights and of batches")
    out: str = option("", "folder; empty: runs/search- and the name of the data")
    find_lr: bool = option(False, "instead: try ever higher rates, draw the losses, suggest one")

    __post_init__ = check_options


# -----------------------------------------------------------------------------
# Options: what is fixed, and what is searched.


def parse_values(kind, text):
    """"1e-3..1e-1" -> (0.001, 0.1), a range; "2,4,6" -> [2, 4, 6], choices; "2" -> [2]."""
    low, dots, high = text.partition("..")
    try:
        if not dots:
            return [kind(word) for word in text.split(",")]
        low, high = kind(low), kind(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}, no range A..B and no "
                                         "list A,B,C of such") from None
    if kind is str:
        raise argparse.ArgumentTypeError(f"{text!r}: words have no range, list them: A,B,C")
    if not 0 <= low < high < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a range goes from a number that is not "
                                         "negative up to a higher one")
    return low, high


def searchable(config_class):
    """A dataclass of the same options, but each takes several values."""
    columns = []
    for f in dataclasses.fields(config_class):
        kind = field_kind(f)
        if kind is not bool and f.name not in ONE:  # argparse calls a type, and shows its name
            parse = partial(parse_values, kind)
            kind = type(kind.__name__, (), {"__new__": lambda cls, text, parse=parse: parse(text)})
        if f.name not in OWN:
            copy = dataclasses.field(default=f.default, metadata=f.metadata)
            columns.append((f.name, kind, copy))
    return dataclasses.make_dataclass(config_class.__name__, columns,
                                      namespace=dict(__doc__=config_class.__doc__))


def complete_config(options):
    """{name: value} of train.py's options -> (TrainConfig, GPTConfig); ValueError if they cannot
    be trained with."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    config, shape = complete_options({name: options[name] for name in options if name in names},
                                     {name: options[name] for name in options if name not in names})
    check_model(shape, config)
    split_batch(config, 1)
    return config, shape


# -----------------------------------------------------------------------------
# Settings, and how long each is trained.


def spread(space, n, random):
    """n values: choices in turn, or one from each of n equal parts of a range on a log scale, so
    that few runs leave no gap."""
    if isinstance(space, list):
        return [space[i % len(space)] for i in range(n)]
    low, high = space
    shares = [(i + random.random()) / n for i in range(n)]
    values = [low * (high / low) ** share if low else high * share for share in shares]
    return [round(x) if isinstance(low, int) else float(f"{x:.3g}") for x in values]


def sample_settings(spaces, n, seed):
    """-> at most n different settings, dicts; of choices alone no more than there are."""
    random = Random(seed)
    if all(isinstance(space, list) for space in spaces.values()):
        grid = list(itertools.product(*map(dict.fromkeys, spaces.values())))
        rows = random.sample(grid, min(n, len(grid)))
    else:
        columns = [spread(space, n, random) for space in spaces.values()]
        rows = dict.fromkeys(zip(*(random.sample(column, n) for column in columns)))
    return [dict(zip(spaces, values)) for values in rows]


def rounds(n, keep, max_steps):
    """-> [(settings, steps of each)]: rounds(9, 3, 270) == [(9, 30), (3, 90), (1, 270)]."""
    counts = [n]
    while counts[-1] > 1:
        counts.append(max(1, counts[-1] // keep))
    times = keep ** (len(counts) - 1)
    if max_steps < SHORTEST * times:
        raise ValueError(f"max_steps={max_steps} in {len(counts)} rounds leaves fewer than "
                         f"{SHORTEST} steps for the first: give at least {SHORTEST * times}")
    return [(count, max_steps * keep ** i // times) for i, count in enumerate(counts)]


def as_typed(options):
    """Options as they are typed: {"n_layer": 2, "bias": False} -> "--n_layer=2 --no-bias"."""
    return " ".join(shlex.quote(f"--{name}={value}") if not isinstance(value, bool) else
                    f"--{'' if value else 'no-'}{name}" for name, value in options.items())


# -----------------------------------------------------------------------------
# The search. Its folder has search.json with a row for each run that has ended.


def open_folder(out, name, plan):
    """-> (folder, the trials in it): `out`, or runs/search-NAME with the first number that is free
    or holds this very search."""
    numbers = (f"-{n}" if n > 1 else "" for n in itertools.count(1))
    for folder in [Path(out)] if out else (Path("runs", f"search-{name}{n}") for n in numbers):
        path = folder / "search.json"
        if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
            write_json(path, dict(plan=plan, trials=[]))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # other files stay
            saved = read_json(path)
            if saved["plan"] == plan:
                return folder, saved["trials"]
    raise ValueError(f"{out} holds another search or other files: choose another --out")


def loss_of(trial):
    return math.inf if trial["val_loss"] is None else trial["val_loss"]


def run_trial(options, folder):
    """Train in a new folder -> the trial's row; val_loss is None if the run diverged."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interruption has left
    began, loss = time.perf_counter(), None
    options = options | dict(out=str(folder), eval_every=options["max_steps"])
    try:
        summary = train(*complete_config(options), say=lambda text: None)
        if summary["stopped"]:
            raise KeyboardInterrupt
        loss = summary["val_loss"] if math.isfinite(summary["val_loss"]) else None
    except ValueError:
        if not any(map(is_bad, read_log(folder)[-1:])):
            raise  # no number went bad, something else did
    return dict(val_loss=loss, seconds=round(time.perf_counter() - began, 1), folder=folder.name)


def search(settings, fixed, plan, folder, trials):
    """All rounds; trials grows, and search.json with it -> the last round's only trial."""
    schedule = rounds(len(settings), plan["keep"], plan["max_steps"])
    for number, (count, steps) in enumerate(schedule, 1):
        settings, done = settings[:count], []
        print(f"round {number} of {len(schedule)}: {count} x {steps} steps")
        for i, setting in enumerate(settings, 1):
            trial = next((trial for trial in trials if trial["setting"] == setting
                          and trial["steps"] == steps), None)
            if trial is None:
                place = folder / f"round_{number}_{i:02d}"
                row = run_trial(fixed | setting | dict(max_steps=steps), place)
                trial = dict(setting=setting, steps=steps) | row
                trials.append(trial)
                write_json(folder / "search.json", dict(plan=plan, trials=trials))
                if number < len(schedule):
                    for path in checkpoints(place).values():
                        path.unlink()
            done.append(trial)
            seconds, words = trial["seconds"], as_typed(setting)
            print(f"  {i:3d}  {loss_of(trial):8.4f}  {seconds:6.1f} s  {words}")
        done.sort(key=loss_of)
        settings = [trial["setting"] for trial in done if loss_of(trial) < math.inf]
        if not settings:
            raise ValueError("each of these runs diverged: search lower learning rates")
    return done[0]


# -----------------------------------------------------------------------------
# The picture, and the command.


def draw_search(folder, trials, winner):
    """search.png: the training losses of all runs, thicker the further they came, and as a dot
    where validation ended."""
    lengths = sorted({trial["steps"] for trial in trials})
    with picture(folder / "search.png", title=f"{folder.name}: {as_typed(winner['setting'])}",
                 xlabel="step", xscale="log", ylabel="loss (nats per token); dots: validation",
                 ylim=(None, 1.1 * read_log(folder / winner["folder"])[0]["loss"])) as ax:
        for trial in sorted(trials, key=lambda trial: -trial["steps"]):
            rows = [row for row in read_log(folder / trial["folder"]) if row["loss"] is not None]
            means = running_mean([row["loss"] for row in rows], 20)
            color = "#cc6633" if trial["setting"] == winner["setting"] else "#4477aa"
            style = dict(color=color, alpha=0.4 if trial["steps"] == lengths[0] else 1)
            label = as_typed(trial["setting"]) if trial["steps"] > lengths[0] else None
            ax.plot([row["step"] for row in rows], means, label=label,
                    linewidth=1 + lengths.index(trial["steps"]), **style)
            if loss_of(trial) < math.inf:
                ax.plot(trial["steps"], loss_of(trial), "o", **style)


def main():
    own, *typed = parse_options(__doc__, SearchConfig, *map(searchable, (TrainConfig, GPTConfig)))
    own, options = SearchConfig(**own), typed[0] | typed[1]
    spaces = {name: values for name, values in options.items()
              if isinstance(values, (tuple, list)) and len(values) > 1}
    fixed = {name: value[0] if isinstance(value, list) else value
             for name, value in options.items() if name not in spaces}
    if own.find_lr and spaces:
        raise ValueError(f"--find_lr searches learning rates: give --{min(spaces)} one value")
    if own.find_lr:
        return find_rate(*complete_config(fixed | dict(out=own.out, seed=own.seed)))
    if not spaces:
        raise ValueError("nothing to search: give an option several values, such as "
                         "--learning_rate=1e-3..1e-1 or --n_layer=2,4,6")
    settings = sample_settings(spaces, own.runs, own.seed)
    rounds(len(settings), own.keep, own.max_steps)
    for setting in settings:  # all are checked before the first is trained
        try:
            config, _ = complete_config(fixed | setting)
        except ValueError as error:
            raise ValueError(f"{as_typed(setting)}: {error}") from None
    shards = find_shards(config, 0, print)
    plan = json.loads(json.dumps(asdict(own) | options))  # as it comes back from search.json
    folder, trials = open_folder(own.out, shards.name, plan)
    if trials:
        print(f"{folder}: runs there already: {len(trials)}")
    # auto measures which precision is fast, and all runs are to have the same
    device = pick_device(config.device)
    same = dict(data=str(shards), device=device, seed=own.seed,
                precision=pick_precision(config.precision, device)[0])
    winner = search(settings, fixed | same, plan, folder, trials)
    draw_search(folder, trials, winner)
    best = winner["setting"] | dict(max_steps=own.max_steps, seed=own.seed)
    print(f"\n{folder}/search.png shows them; the best, as a run of its own:")
    print(f"python train.py {as_typed(fixed | best)}")


if __name__ == "__main__":
    run_command(main)
