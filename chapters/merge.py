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
from tokenizer import parse_options, read_json, replacing, run_command, write_json


@dataclass(frozen=True)
class MergeConfig:
    """What becomes a plain run."""
    run: str | None = option(None, "run folder; else the newest under runs/", positional=True)
    out: str = option("", "the folder to write; empty: RUN-merged")
    checkpoint: str = option("best", "best | last | a step")

    __post_init__ = check_options


def merge_run(folder, out, which="best"):
    """Write the model of a run as the only checkpoint of a new run folder; -> how many parameters
    it has. ValueError where no plain model gives the same, or the folder holds a run."""
    path, out = pick_checkpoint(folder, which), Path(out)
    if checkpoints(out):
        raise ValueError(f"{out} already holds a run: choose another --out")
    model, tokenizer = load_run(folder, path)
    merge(model)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    config = Path(folder, "config.json")
    if config.exists():  # of imported weights there is none
        saved = read_json(config)
        write_json(out / "config.json", saved | dict(
            model=asdict(model.config),
            train=saved["train"] | asdict(TuneConfig()) | dict(init="")))
    progress = read_progress(path)
    with replacing(out / path.name) as file:
        save_model(model, file, step=progress["step"], val_loss=progress.get("val_loss"))
    return model.n_parameters()


def main():
    typed, = parse_options(__doc__, MergeConfig)
    config = MergeConfig(**typed)
    folder = config.run or newest_run()
    out = config.out or f"{Path(folder)}-merged"
    print(f"{out}: {merge_run(folder, out, config.checkpoint):,} parameters, a plain model\n"
          f"next: python sample.py {out}")


if __name__ == "__main__":
    run_command(main)
