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

Each round trains from the beginning, as rates that decay can only be compared at their end; a
search without decay finds lower rates than a run with it wants.
"""

import contextlib
import itertools
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from chapters.nonfinite import is_bad
from chapters.settings import all_values, as_typed, sample_settings, searchable
from chapters.sweep import find_rate, picture, running_mean
from model import GPTConfig, check_options, option
from sample import checkpoints, pick_device, pick_precision
from tokenizer import parse_options, read_json, run_command, write_json
from train import (TrainConfig, check_model, complete_options, find_shards, read_log, split_batch,
                   train)

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
# Settings: whether they can be trained with, and how long each is.


def complete_config(options):
    """{name: value} of train.py's options -> (TrainConfig, GPTConfig); ValueError if they cannot
    be trained with."""
    of_class = [{f.name: options[f.name] for f in fields(config_class) if f.name in options}
                for config_class in (TrainConfig, GPTConfig)]
    config, shape = complete_options(*of_class)
    check_model(shape, config)
    split_batch(config, 1)
    return config, shape


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
    values = all_values(options)
    fixed = {name: some[0] for name, some in values.items() if len(some) == 1}
    spaces = {name: some for name, some in values.items() if len(some) > 1}
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
    plan = asdict(own) | options
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
