"""
Several folders of shards become one, in which each has its share of the text.

    python -m chapters.mix shards/a=0.8 shards/b=0.2 --out=shards/mixed
    python train.py --data=shards/mixed

All must have one tokenizer (data.py TEXT --tokenizer=shards/a/tokenizer.json). The sequences of the
folders, in a random order, take turns, evenly: of any 100 in a row each folder has its share. The
first folder is read once, the others as often as that takes; what validates is the first's.
"""

import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # `python chapters/mix.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import (TokenLoader, check_shards, count_tokens, file_hash, new_shards, read_split,
                  text_hash, write_shards)
from tokenizer import Parser, Tokenizer, run_command, write_json


def read_shares(words):
    """{folder: hundredths}: read_shares(["a=0.8", "b=0.2"]) == {Path("a"): 80, Path("b"): 20}."""
    parts = {}
    for word in words:
        folder, _, share = word.rpartition("=")
        if not (folder and re.fullmatch(r"0?\.\d+", share) and Path(folder, "card.json").exists()):
            raise ValueError(f"{word} is not a folder of shards and its share, shards/a=0.2")
        parts[Path(folder)] = round(100 * float(share))
    if min(parts.values()) < 1 or sum(parts.values()) != 100:
        raise ValueError(f"shares of {', '.join(map(str, parts.values()))} hundredths: each must "
                         "be at least 1, all together 100")
    return parts


def take_turns(parts):
    """Whose each of 100 sequences is: take_turns([50, 25, 25])[:4] == [0, 1, 2, 0]."""
    # The j-th of a folder's n is due at (j + 1/2) / n.
    due = [((j + 0.5) / n, i) for i, n in enumerate(parts) for j in range(n)]
    return [i for _, i in sorted(due)]


def mixed_sequences(parts, block_size, seed=0):
    """Yield the sequences, arrays of block_size ids, until the first folder has been read once."""
    loaders = [TokenLoader(folder, 1, block_size, seed=seed) for folder in parts]
    turns, n_read = take_turns(parts.values()), [0] * len(parts)
    while True:
        for i in turns:
            if n_read[0] == loaders[0].n_blocks and i == 0:
                return
            block = loaders[i].block(n_read[i])  # one token longer, which the next one begins with
            is_last = loaders[i].order[n_read[i] % loaders[i].n_blocks] == loaders[i].n_blocks - 1
            yield block[:block_size + is_last]
            n_read[i] += 1


def mix(parts, out, block_size=256, seed=0):
    """Write the mixture of folders, {path: hundredths}, as a folder of shards -> its Path."""
    out, (first, *_) = Path(out), parts
    for name, value, least in ("block_size", block_size, 1), ("seed", seed, 0):
        if not least <= value < 2**31:
            raise ValueError(f"{name}={value} must be at least {least} and below 2**31")
    cards = {folder: check_shards(folder) for folder in parts}
    for folder, card in cards.items():
        if card.tokenizer != cards[first].tokenizer:
            raise ValueError(f"{folder} has not the tokenizer of {first}: python data.py TEXT "
                             f"--tokenizer={first}/tokenizer.json makes shards that fit")
    for folder in parts:
        TokenLoader(folder, 1, block_size)  # a ValueError for a short text, before any file
    tokenizer, options = Tokenizer.load(first / "tokenizer.json"), dict(
        block_size=block_size, seed=seed, shares={str(path): n for path, n in parts.items()})
    with new_shards(out, "") as new:
        write_shards(mixed_sequences(parts, block_size, seed), new, "train", tokenizer.n_vocab)
        write_shards(read_split(first, "val"), new, "val", tokenizer.n_vocab)
        tokenizer.save(new / "tokenizer.json")
        content = [options, [card.fingerprint for card in cards.values()]]
        write_json(new / "card.json", vars(cards[first]) | dict(
            fingerprint=text_hash(json.dumps(content)).hex(), options=options, counts={},
            sources=[source for card in cards.values() for source in card.sources],
            split=f"as in {first}", train=count_tokens(read_split(new), tokenizer),
            checksums={path.name: file_hash(path)
                       for path in [*sorted(new.glob("*.bin")), new / "tokenizer.json"]}))
    return out


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("shares", nargs="+", metavar="FOLDER=SHARE", help="shards and their share of the text")
    add("--out", required=True, help="folder to write")
    add("--block_size", type=int, default=256, help="tokens in a sequence; default %(default)s")
    add("--seed", type=int, default=0, help="of the order; default %(default)s")
    args = parser.parse_intermixed_args()
    out = mix(read_shares(args.shares), args.out, args.block_size, args.seed)
    print(f"next: python train.py --data={out}")


if __name__ == "__main__":
    run_command(main)
