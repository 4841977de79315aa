"""
Good options by successive halving (arXiv:1502.07943): many settings train shortly, the best of them
longer, one to the end. Options of train.py go in, with values to choose from; out come their
losses, a picture, and the command of the best.

    python -m chapters.search --learning_rate=1e-3..1e-1 --n_layer=2,4,6 --max_steps=270
    python -m chapters.search --data=mybook.txt --size=nano --learning_rate=1e-3..1e-1 --runs=27
    python -m chapters.search --seeds=3 --data=mybook.txt     # one setting: how far seeds differ
    python -m chapters.search --find_lr --data=mybook.txt     # one sweep of the learning rate alone

A..B is a range, sampled on a log scale (evenly if A is 0); A,B,C are choices; one value is fixed.
With --runs=9 and --keep=3, nine settings get a ninth of --max_steps, the best three of them a
third, the best one all, and with --seeds=3 that one again with two other seeds. The same command
again goes on where it was interrupted.

Each round trains from the beginning, as rates that decay can only be compared at their end; a
search without decay finds lower rates than a run with it wants.
"""

import contextlib
import itertools
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/search.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.compare import mean_of_seeds
from chapters.nonfinite import is_bad
from chapters.settings import (all_values, as_typed, check_settings, complete_config,
                               sample_settings, searchable)
from chapters.sweep import find_rate, picture
from data import read_card
from model import GPTConfig, check_options, option
from sample import checkpoints, pick_device, pick_precision
from tokenizer import parse_options, read_json, refuse_idle, run_command, write_json
from train import TrainConfig, find_shards, read_log, smooth, stop_signals, train

SHORTEST = 10              # steps below which a comparison says nothing


@dataclass(frozen=True)
class SearchConfig:
    """The search; each option of train.py is fixed or searched."""
    runs: int = option(9, "settings", low=2, below=1001)
    keep: int = option(3, "of so many settings one goes on, for so many times the steps", low=2)
    seeds: int = option(1, "runs of the best, or of the only setting, each with another seed",
                        low=1, below=1001)
    max_steps: int = option(270, "steps of the last round", low=1)
    seed: int = option(1337, "of the settings, of weights and of batches", below=2**31 - 1000)
    out: str = option("", "folder; empty: runs/search- and the name of the data")
    find_lr: bool = option(False, "instead: try ever higher rates, draw the losses, suggest one")

    __post_init__ = check_options


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
        path, before = folder / "search.json", {}
        if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
            write_json(path, dict(plan=plan, trials=[]))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # other files stay
            saved = read_json(path)
            before = dict(saved["plan"])
            if before == plan:
                return folder, saved["trials"]
    changed = [f"--{name}" for name in plan | before if plan.get(name) != before.get(name)]
    what = f"a search with other {' '.join(changed)}" if before else "other files"
    raise ValueError(f"{out} holds {what}: choose another --out")


def loss_of(trial):
    return math.inf if trial["val_loss"] is None else trial["val_loss"]


def run_trial(options, folder):
    """Train in a new folder -> (the trial's row, {} if it was stopped before its end, the signal
    that stopped it or 0); val_loss is None if the run diverged."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interruption has left
    began, summary = time.perf_counter(), dict(stopped=0)
    options = options | dict(out=str(folder), eval_every=options["max_steps"])
    try:
        summary = train(*complete_config(options), say=lambda text: None)
    except ValueError:
        if not any(map(is_bad, read_log(folder)[-1:])):
            raise  # no number went bad, something else did
    if summary["stopped"] and summary["step"] < options["max_steps"]:
        return {}, summary["stopped"]
    seconds = round(time.perf_counter() - began, 1)
    return dict(val_loss=summary.get("val_loss"), seconds=seconds,
                folder=folder.name), summary["stopped"]


class Search:
    """A search under way: its folder, the options that all runs share, and the trials so far."""

    def __init__(self, folder, trials, plan, fixed):
        self.folder, self.trials, self.plan, self.fixed = folder, trials, plan, fixed

    def trial(self, name, setting, steps, is_last):
        """The trial of a setting: one of before, or a new one in the folder NAME, which is saved
        whenever a signal comes; of the last ones the model is kept."""
        for trial in self.trials:
            place = self.folder / trial["folder"]
            if (trial["setting"], trial["steps"]) == (setting, steps) and place.exists():
                return trial
        place = self.folder / name
        row, stopped = run_trial(self.fixed | setting | dict(max_steps=steps), place)
        with stop_signals() as asked:
            trial = dict(setting=setting, steps=steps) | row
            if row:
                self.trials.append(trial)
                write_json(self.folder / "search.json", dict(plan=self.plan, trials=self.trials))
            for path in () if is_last else checkpoints(place).values():
                path.unlink()
        if stopped or asked:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            sys.exit(128 + (stopped or asked[0]))
        return trial

    def show(self, number, trial):
        seconds, words = trial["seconds"], as_typed(trial["setting"])
        print(f"  {number:3d}  {loss_of(trial):8.4f}  {seconds:6.1f} s  {words}", flush=True)

    def run(self, settings):
        """All rounds -> the last round's only trial."""
        schedule = rounds(len(settings), self.plan["keep"], self.plan["max_steps"])
        for number, (count, steps) in enumerate(schedule, 1):
            settings, done = settings[:count], []
            print(f"round {number} of {len(schedule)}: {count} x {steps} steps", flush=True)
            for i, setting in enumerate(settings, 1):
                name, is_last = f"round_{number}_{i:02d}", number == len(schedule)
                done.append(self.trial(name, setting, steps, is_last))
                self.show(i, done[-1])
            done.sort(key=loss_of)
            settings = [trial["setting"] for trial in done if loss_of(trial) < math.inf]
            if not settings:
                raise ValueError("each of these runs diverged: search lower learning rates")
        return done[0]

    def other_seeds(self, winner, n):
        """Train the winner's setting with n - 1 other seeds, and show what all n of them reach."""
        first, steps = self.plan["seed"], winner["steps"]
        print(f"seeds {first} to {first + n - 1}: {n} x {steps} steps", flush=True)
        self.show(1, winner)
        trials = [winner]
        for i in range(1, n):
            setting = winner["setting"] | dict(seed=first + i)
            trials.append(self.trial(f"seed_{first + i}", setting, steps, is_last=True))
            self.show(i + 1, trials[-1])
        print(mean_of_seeds([trial["val_loss"] for trial in trials]))


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
            best = winner["setting"].items() <= trial["setting"].items()  # with any seed
            is_short = trial["steps"] < lengths[-1] and trial["steps"] == lengths[0]
            style = dict(color="#cc6633" if best else "#4477aa", alpha=0.4 if is_short else 1)
            ax.plot([row["step"] for row in rows], smooth([row["loss"] for row in rows]),
                    label=None if is_short else as_typed(trial["setting"]),
                    linewidth=1 + lengths.index(trial["steps"]), **style)
            if loss_of(trial) < math.inf:
                ax.plot(trial["steps"], loss_of(trial), "o", **style)


def main():
    typed, *others = parse_options(__doc__, SearchConfig,
                                   *map(searchable, (TrainConfig, GPTConfig)))
    own, options = SearchConfig(**typed), others[0] | others[1]
    values = all_values(options)
    fixed = {name: some[0] for name, some in values.items() if len(some) == 1}
    spaces = {name: some for name, some in values.items() if len(some) > 1}
    if own.find_lr and spaces:
        raise ValueError(f"--find_lr searches learning rates: give --{min(spaces)} one value")
    if own.find_lr:
        refuse_idle(typed, ["runs", "keep", "seeds", "max_steps"], "beside --find_lr")
        return find_rate(*complete_config(fixed | dict(out=own.out, seed=own.seed)))
    if not spaces and own.seeds == 1:
        raise ValueError("nothing to search: give an option several values, such as "
                         "--learning_rate=1e-3..1e-1 or --n_layer=2,4,6, or --seeds=3")
    refuse_idle(typed, () if spaces else ("runs", "keep"), "with nothing to search")
    settings = sample_settings(spaces, own.runs, own.seed)
    rounds(len(settings), own.keep, own.max_steps)
    config = check_settings(settings, fixed)  # all of them, before the first is trained
    shards = find_shards(config, 0, print)
    check_settings(settings, fixed, shards)
    plan = asdict(own) | options | dict(fingerprint=read_card(shards).fingerprint)
    del plan["seeds"]  # more of them may be added
    if config.config:
        plan["config"] = read_json(config.config)
    folder, trials = open_folder(own.out, shards.name, plan)
    print(f"{folder}: runs there already: {len(trials)}")
    # auto measures which precision is fast, and all runs are to have the same
    device = pick_device(config.device)
    same = dict(data=str(shards), device=device, seed=own.seed,
                precision=pick_precision(config.precision, device)[0])
    shared = {name: value for name, value in fixed.items() if name != "vocab_size"} | same
    search = Search(folder, trials, plan, shared)
    winner = search.run(settings)
    if own.seeds > 1:
        search.other_seeds(winner, own.seeds)
    draw_search(folder, trials, winner)
    best = winner["setting"] | dict(max_steps=own.max_steps, seed=own.seed)
    print(f"\n{folder}/search.png shows them; the best, as a run of its own:")
    print(f"python train.py {as_typed(fixed | best)}")


if __name__ == "__main__":
    run_command(main)
