"""
Where numbers went bad: a run whose log has steps with no finite loss or gradient goes in; out comes
the name of the module in which they began. chapters.doctor asks it, too.

    python -m chapters.nonfinite runs/a

It takes the first of the last bad steps again, sequence by sequence, with the weights that the step
had, or the newest from before it.
"""

import math
import sys
from pathlib import Path
from statistics import median

if __name__ == "__main__":  # `python chapters/nonfinite.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from data import TokenLoader, read_card
from model import load_model
from sample import checkpoints, pick_device, pick_precision
from tokenizer import Parser, reading, run_command
from train import is_shards, read_config, read_log


# -----------------------------------------------------------------------------
# The log of a run.


def read_run(folder):
    """-> (the rows of a run's log in the order of their steps, its config as {"model": GPTConfig,
    "train": TrainConfig, "data": dict}). What a row lacks is nan. ValueError if there is no row."""
    path = Path(folder) / "config.json"
    for name in "config.json", "log.jsonl":
        if not path.with_name(name).exists():
            raise ValueError(f"{folder} is no run: it lacks the {name} that train.py writes")
    train, model, data = read_config(path)
    with reading(path):
        if not data["train"]["tokens"] > 0:
            raise ValueError("data.train.tokens must be above 0")
    empty = dict.fromkeys(("loss", "lr", "grad_norm", "elapsed", "val_loss"), math.nan)
    rows = {row["step"]: empty | {name: value for name, value in row.items() if value is not None}
            for row in read_log(folder)}
    if not rows:
        raise ValueError(f"{folder}/log.jsonl has no row yet: come back after the first step")
    return [rows[step] for step in sorted(rows)], dict(model=model, train=train, data=data)


def typical(rows, name="loss"):
    """The median of a column, without rows that lack it."""
    return median([row[name] for row in rows if math.isfinite(row[name])] or [math.nan])


def describe(rows):
    """Rows in words, such as "step 1 loss 5.704" or "steps 91-100 loss 3.021"."""
    first, last = rows[0]["step"], rows[-1]["step"]
    steps = f"step {first}" if first == last else f"steps {first}-{last}"
    return f"{steps} loss {typical(rows):.3f}"


# -----------------------------------------------------------------------------
# Steps whose numbers are bad.


def is_bad(row):
    """Whether the step of a row of the log had a loss or a gradient that is not finite."""
    loss = row["loss"]
    return row.get("skipped") == "not finite" or loss is None or not math.isfinite(loss)


def last_streak(rows):
    """The last bad rows that follow one another; some row must be bad."""
    last = max(i for i, row in enumerate(rows) if is_bad(row))
    first = max((i for i in range(last) if not is_bad(rows[i])), default=-1)
    return rows[first + 1:last + 1]


def bad_numbers(rows, config):
    """What the doctor says of steps without a finite loss or gradient: yields at most one
    (illness, what was seen, what to change)."""
    n_bad = sum(map(is_bad, rows))
    if n_bad and not is_bad(rows[-1]):
        yield ("steps left out", f"{n_bad} of {len(rows)} steps had no finite loss or gradient, "
               f"the last was {last_streak(rows)[-1]['step']}", "a few do no harm, as they changed "
               "no weight; more of them want a tenth of the --learning_rate")
    elif n_bad:
        first = last_streak(rows)[0]
        before = [f"; before it {describe([row])}, gradient {row['grad_norm']:.2g}"
                  for row in rows if row["step"] < first["step"]]
        change = f"--learning_rate={config.learning_rate / 10:.2g} (a tenth)"
        change += ", or --precision=bf16, which reaches further" * (config.precision == "fp16")
        yield ("not a number", f"step {first['step']} loss or gradient is not finite"
               + "".join(before[-1:]), change + "; a checkpoint from before is still good")


# -----------------------------------------------------------------------------
# Where it began.


def first_bad(model, blocks):
    """Where numbers stop being finite on blocks (B, T + 1): the name of the first module whose
    output is not, or of the parameter nearest to the loss whose gradient is not; "" if none."""
    found = []

    def check(module, inputs, output):
        tensors = [y for y in (output if isinstance(output, tuple) else [output])
                   if torch.is_tensor(y)]
        if not all(y.isfinite().all() for y in tensors):
            found.append(module)

    hooks = [module.register_forward_hook(check) for module in model.modules()]
    model(blocks[:, :-1], blocks[:, 1:])[1].backward()
    for hook in hooks:
        hook.remove()
    if found:
        return next(name for name, module in model.named_modules() if module is found[0]) or "loss"
    return next((f"the gradient of {name}" for name, p in reversed([*model.named_parameters()])
                 if p.grad is not None and not p.grad.isfinite().all()), "")


def trace(folder):
    """Where the numbers of the last bad steps of a run went bad, in words."""
    rows, config = read_run(folder)
    if not any(map(is_bad, rows)):
        return "nowhere: all steps in the log have finite numbers"
    # Skipped steps change no weight: a checkpoint from within the streak has those from before it.
    streak = last_streak(rows)
    paths = [path for step, path in checkpoints(folder).items() if step <= streak[-1]["step"]]
    shards, options = config["data"]["path"], config["train"]
    same = is_shards(shards) and read_card(shards).fingerprint == config["data"]["fingerprint"]
    if not (paths and same and "sequences" in streak[0]):
        return ("unknown: it takes a checkpoint from before, sequences in the log, and the shards "
                "that the run has read")
    model, _ = load_model(paths[-1], pick_device())
    model.train().use("torch", pick_precision(options.precision, model.device.type)[1])
    loader = TokenLoader(shards, 1, model.config.block_size, seed=options.seed)
    first, last = streak[0]["sequences"]
    for n in range(first, last + 1):
        block = torch.from_numpy(loader.block(n).astype("int64")).to(model.device)   # (T + 1,)
        if name := first_bad(model, block[None]):
            return f"first in {name}, in sequence {n}, with the weights of {paths[-1].name}"
    return (f"unknown: sequences {first} to {last} are fine with the weights of {paths[-1].name}, "
            "so they changed until then")


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", help="a run folder")
    print(trace(parser.parse_args().folder))


if __name__ == "__main__":
    run_command(main)
