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

from model import TuneConfig, check_options, merge, option, read_progress, save_model
from sample import checkpoints, load_run, newest_run, pick_checkpoint
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


def merge_run(folder, out, which="best"):
    """Write the model of a run as the only checkpoint of a new run folder -> the plain model.
    ValueError where none gives the same, or the folder holds a run."""
    path, out = pick_checkpoint(folder, which), Path(out)
    if checkpoints(out):
        raise ValueError(f"{out} already holds a run: choose another --out")
    model, tokenizer = load_run(folder, path)
    merge(model)
    config, progress = plain_config(Path(folder, "config.json"), model), read_progress(path)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    write_json(out / "config.json", config)
    with replacing(out / path.name) as file:
        save_model(model, file, step=progress["step"], val_loss=progress.get("val_loss"))
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
