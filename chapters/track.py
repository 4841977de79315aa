"""
The log of a run, shown elsewhere: log.jsonl goes into TensorBoard, Weights & Biases or Prometheus.

    python -m chapters.track runs/a --to=tensorboard      # then: tensorboard --logdir=runs
    python -m chapters.track runs/a --to=wandb --follow   # as training goes on, until Ctrl-C
    python -m chapters.track runs/a --to=prometheus --follow --out=/var/lib/node_exporter/a.prom

Training does not wait for it, and a run of last year can be shown, too. What is written for
Prometheus is a file for the textfile collector of its node exporter. Steps that a resumed run took
again are shown once.
"""

import contextlib
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/track.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model import check_known, check_options, option
from sample import newest_run
from tokenizer import parse_options, read_json, refuse_idle, replacing, run_command
from train import read_log

HELP = {  # of the values in a row of the log, for Prometheus
    "step": "Optimizer steps taken.",
    "loss": "Training loss of the last step, in nats per token.",
    "val_loss": "Last validation loss, in nats per token.",
    "lr": "Learning rate of the last step.",
    "grad_norm": "Length of the gradient of the last step, before clipping.",
    "tokens_per_second": "Tokens trained on in a second, at the last step.",
    "mfu": "Share of the machine's FLOP/s that the last step reached.",
    "memory": "Most bytes held so far.",
    "elapsed": "Seconds trained.",
}


@dataclass(frozen=True)
class TrackConfig:
    """Which log, and where to."""
    folder: str = option("", "a run folder; empty: the newest", positional=True)
    to: str = option("tensorboard", "tensorboard | wandb | prometheus")
    follow: bool = option(False, "go on with what training writes, until Ctrl-C")
    interval: float = option(5.0, "seconds between two readings of the log that is followed",
                             low=0.1)
    out: str = option("", "the file for Prometheus; empty: metrics.prom in the run folder")

    def __post_init__(self):
        check_options(self)
        check_known(self.to, TARGETS, "target")
        if self.to != "prometheus" and not importlib.util.find_spec(self.to):
            raise ValueError(f"--to={self.to} needs a package that is not installed: "
                             f"pip install {self.to}")
        if self.out and self.to != "prometheus":
            raise ValueError(f"out={self.out} is for --to=prometheus alone")
        if self.out and not self.out.endswith(".prom"):
            raise ValueError(f"out={self.out} must end in .prom: the collector reads no other file")


def read_rows(folder, after=-1):
    """The rows of a log after a step; None stands for what is no number, and for an mfu above 1,
    which no machine reaches: its speed was measured while it was busy."""
    return [{name: value if type(value) in (int, float) and not (name == "mfu" and value > 1)
             else None for name, value in row.items()}
            for row in read_log(folder) if row["step"] > after]


def numbers(row):
    """What can be drawn of a row of read_rows, {name: number}, the step aside."""
    return {name: value for name, value in row.items() if name != "step" and value is not None}


# -----------------------------------------------------------------------------
# Where rows go: each yields a function that takes the new rows.


@contextlib.contextmanager
def open_tensorboard(folder, config):
    """Event files in RUN/tensorboard, made anew: the log has all that was in the old ones."""
    from torch.utils.tensorboard import SummaryWriter
    for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(folder / "tensorboard") as board:
        def write(rows):
            for row in rows:
                for name, value in numbers(row).items():
                    board.add_scalar(name, value, row["step"])
            board.flush()
        yield write


@contextlib.contextmanager
def open_wandb(folder, config):
    """A new run of the project language-model, named as the folder is, with its config.json."""
    import wandb
    path = folder / "config.json"
    options = read_json(path) if path.exists() else {}
    with wandb.init(project="language-model", name=folder.name, dir=folder,
                    config=options) as online:
        def write(rows):
            for row in rows:
                online.log(numbers(row), step=row["step"])
        yield write


def exposition(latest, run):
    """{name: number or None} as Prometheus reads it: lines of help, of type, and of the value."""
    for old, new in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n")):
        run = run.replace(old, new)
    lines = []
    for name, text in HELP.items():
        if name in latest:
            value = "NaN" if latest[name] is None else repr(latest[name])
            lines += [f"# HELP train_{name} {text}", f"# TYPE train_{name} gauge",
                      f'train_{name}{{run="{run}"}} {value}']
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def open_prometheus(folder, config):
    """A file with the last value of each name, replaced as a whole: nobody reads half of it."""
    latest, path = {}, Path(config.out or folder / "metrics.prom")

    def write(rows):
        for row in rows:
            latest.update(row)
        with replacing(path) as file:
            file.write(exposition(latest, folder.name).encode())
    yield write


TARGETS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "prometheus": open_prometheus}

# -----------------------------------------------------------------------------
# The command.


def track(config):
    """Send the rows of a log to where config says -> the last step that was sent; with follow it
    ends by KeyboardInterrupt alone."""
    folder = Path(config.folder or newest_run())
    if not (folder / "log.jsonl").exists():
        raise ValueError(f"{folder} is no run, it has no log.jsonl: train.py writes one")
    if not (config.follow or read_rows(folder)):
        raise ValueError(f"{folder}/log.jsonl has no row yet: come back, or --follow it")
    folder, last = folder.resolve(), -1
    with TARGETS[config.to](folder, config) as write:
        while True:
            rows = read_rows(folder, last)
            if rows:
                write(rows)
                last = rows[-1]["step"]
            if not config.follow:
                return last
            time.sleep(config.interval)


def main():
    typed, = parse_options(__doc__, TrackConfig)
    config = TrackConfig(**typed)
    if not config.follow:
        refuse_idle(typed, ["interval"], "without --follow")
    print(f"{config.to} has the log up to step {track(config)}")


if __name__ == "__main__":
    run_command(main)
