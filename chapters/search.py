"""
Good options by successive halving (arXiv:1502.07943): many settings train shortly, the best of them
longer, one to the end. Options of train.py go in, with values to choose from; out come a table, a
picture, and the command of the best.

    python -m chapters.search --learning_rate=1e-3..1e-1 --n_layer=2,4,6 --max_steps=270
    python -m chapters.search --data=mybook.txt --size=nano --learning_rate=1e-3..1e-1 --runs=27

A..B is a range, drawn on a log scale (evenly if A is 0); A,B,C are choices; one value is fixed.
With --runs=9 and --keep=3, nine settings get a ninth of --max_steps, the best three of them a
third, the best one all. The same command again goes on where it was interrupted.

Each round trains from the beginning: going on from a checkpoint would save a fifth of the steps,
but only under a constant rate. A rate that has decayed must be judged at its end, and a search
without decay finds lower rates than a run with it wants.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from random import Random

from sample import checkpoints, pick_device, pick_precision
from tokenizer import Parser, replacing, run_command, share_cores, write_json
from train import TrainConfig, find_shards, read_log, shape_of, split_batch, train

OWN = {"out", "max_steps", "seed", "config", "resume", "find_lr", "epochs", "tokens", "minutes",
       "eval_every"}  # decided here
ONE = {"data", "mix", "vocab_size", "device", "precision"}  # a path may have commas of its own
SHORTEST = 10              # steps below which a comparison says nothing

# -----------------------------------------------------------------------------
# Options: what is fixed, and what is drawn from where.


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


def parse_options():
    """-> (the search's own options, {option: value} that is fixed, {option: values} to search)"""
    parser = Parser(__doc__)
    parser.usage = "python -m chapters.search [--OPTION=VALUE or A..B or A,B,C ...]"
    parser.add_argument("--runs", type=int, default=9, help="settings (default %(default)s)")
    parser.add_argument("--keep", type=int, default=3, help="of so many settings one goes on, "
                        "for so many times the steps (default %(default)s)")
    parser.add_argument("--max_steps", type=int, default=270,
                        help="steps of the last round (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1337,
                        help="of the draw, weights and batches (default %(default)s)")
    parser.add_argument("--out", default="", help="folder (default runs/search- and the data)")
    parser.epilog = "and the options of train.py, each fixed or searched"
    for f in dataclasses.fields(TrainConfig):
        kind = dict(type=f.type if f.name in ONE else partial(parse_values, f.type))
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        if f.name not in OWN:
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                                **kind)
    own = parser.parse_args()
    given = {name: value for name, value in vars(own).items()
             if name not in ("runs", "keep", "max_steps", "seed", "out")}
    spaces = {name: values for name, values in given.items()
              if isinstance(values, (tuple, list)) and len(values) > 1}
    fixed = {name: value[0] if isinstance(value, list) else value
             for name, value in given.items() if name not in spaces}
    if not spaces:
        raise ValueError("nothing to search: give an option several values, such as "
                         "--learning_rate=1e-3..1e-1 or --n_layer=2,4,6")
    return own, fixed, spaces


def spread(space, n, random):
    """n values: choices in turn, or one from each of n equal parts of a range on a log scale, so
    that few runs leave no gap."""
    if isinstance(space, list):
        return [space[i % len(space)] for i in range(n)]
    low, high = space
    shares = [(i + random.random()) / n for i in range(n)]
    drawn = [low * (high / low) ** share if low else high * share for share in shares]
    return [round(x) if isinstance(low, int) else float(f"{x:.3g}") for x in drawn]


def draw(spaces, n, seed):
    """-> at most n different settings, dicts; of choices alone no more than there are."""
    random = Random(seed)
    if all(isinstance(space, list) for space in spaces.values()):
        grid = list(itertools.product(*map(dict.fromkeys, spaces.values())))
        drawn = random.sample(grid, min(n, len(grid)))
    else:
        columns = [spread(space, n, random) for space in spaces.values()]
        drawn = dict.fromkeys(zip(*(random.sample(column, n) for column in columns)))
    return [dict(zip(spaces, values)) for values in drawn]


def rounds(n, keep, max_steps):
    """-> [(settings, steps of each)]: rounds(9, 3, 270) == [(9, 30), (3, 90), (1, 270)]."""
    if n < 2 or keep < 2:
        raise ValueError(f"{n} settings of which one in {keep} is kept: both must be at least 2")
    counts = [n]
    while counts[-1] > 1:
        counts.append(max(1, counts[-1] // keep))
    times = keep ** (len(counts) - 1)
    if max_steps < SHORTEST * times:
        raise ValueError(f"max_steps={max_steps} in {len(counts)} rounds leaves fewer than "
                         f"{SHORTEST} steps for the first: give at least {SHORTEST * times}")
    return [(count, max_steps * keep ** i // times) for i, count in enumerate(counts)]


def words(options):
    """The options of a setting as they are typed."""
    return " ".join(shlex.quote(f"--{name}={value}") if not isinstance(value, bool) else
                    f"--{'' if value else 'no-'}{name}" for name, value in options.items())


# -----------------------------------------------------------------------------
# The folder: search.json has a row for each run that has ended.


def open_folder(out, name, plan):
    """-> (folder, the trials in it): `out`, or runs/search-NAME with the first number that is free
    or holds this very search."""
    numbers = (f"-{n}" if n > 1 else "" for n in itertools.count(1))
    for folder in [Path(out)] if out else (Path("runs", f"search-{name}{n}") for n in numbers):
        path = folder / "search.json"
        if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
            write_json(path, dict(plan=plan, trials=[]))
        try:
            saved = json.loads(path.read_text("utf-8"))
            if saved["plan"] == plan:
                return folder, saved["trials"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # something else, which is left as it is
    raise ValueError(f"{out} holds another search or other files: choose another --out")


def loss_of(trial):
    return math.inf if trial["val_loss"] is None else trial["val_loss"]


def run_trial(options, folder):
    """Train in a new folder -> the trial's row; val_loss is None if the run diverged."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interruption has left
    began, loss = time.perf_counter(), None
    try:
        summary = train(TrainConfig(**options, out=str(folder), eval_every=options["max_steps"]),
                        say=lambda text: None)
        if summary["stopped"]:
            raise KeyboardInterrupt
        loss = summary["val_loss"] if math.isfinite(summary["val_loss"]) else None
    except ValueError:
        if [row["loss"] for row in read_log(folder)][-1:] != [None]:
            raise  # no number went wrong, something else did
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
            print(f"  {i:3d}  {loss_of(trial):8.4f}  {trial['seconds']:6.1f} s  {words(setting)}")
        done.sort(key=loss_of)
        settings = [trial["setting"] for trial in done if loss_of(trial) < math.inf]
        if not settings:
            raise ValueError("each of these runs diverged: search lower learning rates")
    return done[0]


# -----------------------------------------------------------------------------
# What is shown, and the command.


def table(trials):
    """A line for each setting, the one that came furthest first: steps, loss, options."""
    last = {words(trial["setting"]): trial for trial in sorted(trials, key=lambda t: t["steps"])}
    order = sorted(last.values(), key=lambda trial: (-trial["steps"], loss_of(trial)))
    return "\n".join(["  steps  validation  setting"] + [
        f"{trial['steps']:7d}  {loss_of(trial):10.4f}  {words(trial['setting'])}"
        for trial in order])


def smooth(losses):
    """Their running mean, over the last third of the steps so far, and at most 20."""
    return [sum(part) / len(part) for part in
            (losses[max(0, i - min(20, i // 3)):i + 1] for i in range(len(losses)))]


def draw_search(folder, trials, winner):
    """search.png: the training losses of all runs, bolder the further they came, and as a dot where
    validation ended."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 5), dpi=120)
    ax, lengths, lowest = fig.subplots(), sorted({trial["steps"] for trial in trials}), []
    for trial in sorted(trials, key=lambda trial: -trial["steps"]):
        rows = [row for row in read_log(folder / trial["folder"]) if row["loss"] is not None]
        means, level = smooth([row["loss"] for row in rows]), lengths.index(trial["steps"])
        wins = trial["setting"] == winner["setting"]
        look = dict(color="#cc6633" if wins else "#4477aa" if level else "#aabbcc",
                    linewidth=1 + level, zorder=2 + level + wins)
        label = words(trial["setting"]) if trial is winner or level == 1 and not wins else None
        ax.plot([row["step"] for row in rows], means, label=label, **look)
        ends = [loss_of(trial)] if loss_of(trial) < math.inf else []
        ax.plot([trial["steps"]] * len(ends), ends, "o", markersize=5 + level, **look)
        lowest += means[-1:] + ends
    top, low = read_log(folder / winner["folder"])[0]["loss"], min(lowest)
    ax.set(title=f"{folder.name}: {words(winner['setting'])}", xscale="log", xlabel="step",
           ylim=(low - 0.05 * (top - low), top + 0.1 * (top - low)),
           ylabel="loss (nats per token); dots: validation")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with replacing(folder / "search.png") as file:
        fig.savefig(file, format="png", bbox_inches="tight")


def main():
    own, fixed, spaces = parse_options()
    settings = draw(spaces, own.runs, own.seed)
    rounds(len(settings), own.keep, own.max_steps)
    device = pick_device(fixed.get("device", "auto"))
    for setting in settings:  # all are looked at before the first is trained
        try:
            config = TrainConfig(**fixed | setting)
            shape_of(config, config.vocab_size), split_batch(config, 1)
        except ValueError as error:
            raise ValueError(f"{words(setting)}: {error}") from None
    shards = find_shards(TrainConfig(**fixed), 0, print)
    plan = json.loads(json.dumps(vars(own)))  # as it comes back from search.json
    folder, trials = open_folder(own.out, shards.name, plan)
    if trials:
        print(f"{folder}: runs there already: {len(trials)}")
    # auto measures which precision is fast, and all runs are to have the same
    precision = pick_precision(fixed.get("precision", "auto"), device)[0]
    same = dict(data=str(shards), device=device, precision=precision, seed=own.seed)
    winner = search(settings, fixed | same, plan, folder, trials)
    draw_search(folder, trials, winner)
    best = winner["setting"] | dict(max_steps=own.max_steps, seed=own.seed)
    print(f"\n{table(trials)}\n\n{folder}/search.png shows them; the best, as a run of its own:")
    print(f"python train.py {words(fixed | best)}")


if __name__ == "__main__":
    share_cores()
    run_command(main)
