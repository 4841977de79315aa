"""
A tuned run as a plain one: what --tune=lora, bias, head or last trained goes into the weights.

    python -m chapters.merge runs/chat                     # writes runs/chat-merged
    python -m chapters.merge runs/chat --out=runs/plain --checkpoint=last

A plain run needs no base.safetensors, costs no more to run than its base, and can be exported.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/merge.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.weights import whole_folder
from model import TuneConfig, check_options, merge, option, read_progress, save_model
from sample import load_run, newest_run, pick_checkpoint
from tokenizer import parse_options, read_json, reading, replacing, run_command, write_json


@dataclass(frozen=True)
class MergeConfig:
    """What becomes a plain run."""
    run: str | None = option(None, "run folder; else the newest under runs/", positional=True)
    out: str = option("", "the folder to write; empty: RUN-merged")
    checkpoint: str = option("best", "best | last | a step")

    __post_init__ = check_options


def plain_config(path, model):
    """What config.json says of a run, changed to fit its plain model; a run that chapters/align.py
    wrote has no options of training, one of imported weights nothing."""
    saved = read_json(path) if path.exists() else {}
    with reading(path):
        plain = asdict(TuneConfig()) | dict(init="")
        return {name: value | plain if name == "train" else value
                for name, value in saved.items()} | dict(model=asdict(model.config))


def write_changed(folder, path, model, tokenizer, out, **progress):
    """Write a model that was made of a run's checkpoint as the only one of a new run folder."""
    with whole_folder(out) as part:
        tokenizer.save(part / "tokenizer.json")
        write_json(part / "config.json", plain_config(Path(folder, "config.json"), model))
        with replacing(part / path.name) as file:
            save_model(model, file, step=read_progress(path)["step"], **progress)


def merge_run(folder, out, which="best"):
    """Write the model of a run as the only checkpoint of a new run folder -> the plain model.
    ValueError where none gives the same, or the folder is not empty."""
    path = pick_checkpoint(folder, which)
    model, tokenizer = load_run(folder, path)
    val_loss = read_progress(path).get("val_loss")
    write_changed(folder, path, merge(model), tokenizer, out, val_loss=val_loss)
    return model


def main():
    typed, = parse_options(__doc__, MergeConfig)
    config = MergeConfig(**typed)
    folder = config.run or newest_run()
    out = config.out or f"{Path(folder)}-merged"
    model = merge_run(folder, out, config.checkpoint)
    ask = "-m chapters.clauses ask {} --prompt=TEXT" if model.config.n_classes > 1 else (
        "-m chapters.align ppo RUN --data=QUESTIONS --reward={}" if model.config.n_classes else
        "sample.py {}")
    print(f"{out}: {model.n_parameters():,} parameters, a plain model\n"
          f"next: python {ask.format(out)}")


if __name__ == "__main__":
    run_command(main)
