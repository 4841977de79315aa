"""
Make one file of a checkpoint that several processes wrote, each its part: train.py
--checkpoint=sharded.

    python -m chapters.gather runs/large           # its newest; --step=1000 another

Each process wrote the pieces of tensors that it held, and where they begin, into a file in the
safetensors format. A piece is put in its place as it is read: this takes the memory of one whole
model with its optimizer's state, and no other process.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/gather.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model import check_known, from_weights, option, read_header, read_safetensors
from sample import newest_run
from tokenizer import parse_options, reading, run_command
from train import read_shards, save_run, sharded


@dataclass(frozen=True)
class GatherConfig:
    """Which checkpoint is made one file."""
    run: str = option("", "a run folder; empty: the newest", positional=True)
    step: int = option(0, "0: the last one")


def read_pieces(folder):
    """{name: tensor}, whole, of the safetensors files in a folder, each of which has some pieces of
    them; ValueError if one is missing or too many."""
    tensors, filled = {}, {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        pieces = read_safetensors(path)
        with reading(path):
            places = json.loads(read_header(path)[1]["DCP_SHARDING_INFO"])
            begins = {name: places[name]["saved_offsets"] for name in pieces}
        for name, piece in pieces.items():
            ends = [begin + n for begin, n in zip(begins[name], piece.shape)]
            old = tensors.get(name, piece.new_empty([0] * piece.dim()))
            shape = [max(sizes) for sizes in zip(old.shape, ends)]
            if list(old.shape) != shape or name not in tensors:  # it grows with its pieces
                tensors[name] = piece.new_empty(shape)
                tensors[name][tuple(slice(n) for n in old.shape)] = old
            tensors[name][tuple(map(slice, begins[name], ends))] = piece
            filled[name] = filled.get(name, 0) + piece.numel()
    wrong = [name for name, w in tensors.items() if filled[name] != w.numel()]
    if wrong or not tensors:
        raise ValueError(f"{folder} lacks pieces of {', '.join(wrong[:3]) or 'all tensors'}: copy "
                         "all of its files, from all nodes")
    return tensors


def gather(run, step=0):
    """Write the plain file of a sharded checkpoint beside it -> its step."""
    found = sharded(run)
    if not found:
        raise ValueError(f"{run} has no checkpoint in shards: train.py --checkpoint=sharded, on "
                         "several processes, writes them")
    step = step or max(found)
    check_known(str(step), [*map(str, found)], "step")
    (config, progress), tensors = read_shards(found[step]), read_pieces(found[step])
    weights = {name: tensors.pop(name) for name in [*tensors] if not name.startswith("optimizer.")}
    save_run(run, (from_weights(config, weights, found[step]), tensors, progress), keep=1_000_000)
    return step


def main():
    config = GatherConfig(**parse_options(__doc__, GatherConfig)[0])
    run = Path(config.run or newest_run())
    step = gather(run, config.step)
    print(f"{run}/step_{step:06d}.safetensors is the model of step {step} with the state of its "
          f"optimizer\nnext: python sample.py {run}")


if __name__ == "__main__":
    run_command(main)
