"""
Mix several folders of shards into one, in which each has a given share of the tokens.

    python -m chapters.mix shards/a=0.8 shards/b=0.2 --out=shards/mixed
    python -m chapters.mix shards/a shards/b shards/c --temperature=3 --out=shards/mixed
    python -m chapters.mix shards/a=0.5 shards/b=0.5 --order=loss --run=runs/a --out=shards/mixed
    python train.py --data=shards/mixed                # after --order: --no-shuffle, too

All must have the same tokenizer (data.py TEXT --tokenizer=shards/a/tokenizer.json). The sequences
of each folder come in a random order; the folders take turns, so that each has its share in any
stretch of the mixture. The first folder is read once, the others as often as their shares need; the
validation text is that of the first. --temperature=T gives each a share in proportion to
tokens ** (1/T): T=1 by size, T=inf equal shares; mT5 has 3.3 (arXiv:2010.11934). --order sorts the
documents of each folder from short to long, or from low to high loss: a curriculum.
"""

import json
import math
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # `python chapters/mix.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.curriculum import ORDERS, difficulty_by, documents_of, from_easy_to_hard, pack
from data import (TokenLoader, check_shards, count_tokens, file_hash, new_shards, read_card,
                  read_split, text_hash, write_shards)
from tokenizer import Parser, Tokenizer, refuse_idle, run_command, write_json

MANY_EPOCHS = 4  # up to these, repeated text is nearly as good as new text: arXiv:2305.16264


# -----------------------------------------------------------------------------
# Shares, and the order of turns.


def read_shares(words):
    """{folder: share}: read_shares(["a=0.8", "b=0.2"]) == {Path("a"): 0.8, Path("b"): 0.2}."""
    shares = {}
    for word in words:
        folder, _, share = word.rpartition("=")
        if not (folder and re.fullmatch(r"0?\.\d+", share) and Path(folder, "card.json").exists()):
            raise ValueError(f"{word} is not a folder of shards and its share, shards/a=0.2; "
                             "shares by size come with --temperature=1")
        shares[Path(folder)] = float(share)
    if min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-3):
        raise ValueError(f"shares of {', '.join(map(str, shares.values()))}: each must be above 0, "
                         "their sum 1, and each folder given once")
    return shares


def tempered_shares(folders, temperature):
    """{folder: share}, in proportion to tokens ** (1 / temperature)."""
    if not temperature >= 1:
        raise ValueError(f"temperature={temperature} must be at least 1 (shares by size); inf "
                         "gives equal ones")
    for folder in folders:
        if "=" in str(folder) and not Path(folder).exists():
            raise ValueError(f"{folder}: shares are given, or come from --temperature, not both")
    sizes = {Path(folder): read_card(folder).train["tokens"] for folder in folders}
    if len(sizes) < len(folders):
        raise ValueError("a folder is given twice: give each once")
    weights = {folder: (n / max(sizes.values())) ** (1 / temperature)
               for folder, n in sizes.items()}
    return {folder: weight / sum(weights.values()) for folder, weight in weights.items()}


def take_turns(counts):
    """Which folder each sequence comes from, where each folder gives so many, evenly spread:
    take_turns([50, 25, 25])[:4] == [0, 1, 2, 0]."""
    # If all took one unit of time, sequence j of a folder's n would be due at (j + 1/2) / n.
    due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")].tolist()


# -----------------------------------------------------------------------------
# The mixture.


def shuffled_sequences(folder, block_size, seed):
    """Yield sequences, arrays of block_size ids, without end: all in each epoch, in a new order."""
    loader, n_read = TokenLoader(folder, 1, block_size, seed=seed), 0
    while True:
        block = loader.block(n_read)  # its last token is also the first of the next block
        is_last = loader.order[n_read % loader.n_blocks] == loader.n_blocks - 1
        yield block[:block_size + is_last]
        n_read += 1


def mixed_sequences(shares, block_size, seed=0, difficulty=None, eot=None, taken=None):
    """Yield the sequences of folders, {path: share}, until the first one has been read once.
    difficulty(documents), if given, is a number for each, by which they are sorted; taken, a
    Counter, gets the number of tokens from each folder."""
    folders, taken = [*shares], Counter() if taken is None else taken
    n_first = TokenLoader(folders[0], 1, block_size).n_blocks
    if difficulty:  # documents are cut without the random offset of the loader
        n_first = math.ceil(sum(map(len, read_split(folders[0]))) / block_size)
    counts = [round(n_first * share / shares[folders[0]]) for share in shares.values()]
    if not all(counts):
        few = folders[counts.index(0)]
        raise ValueError(f"{few}: its share is less than one sequence beside the {n_first:,} of "
                         f"{folders[0]}: give more, or leave it out")
    sequences = []
    for folder, n in zip(folders, counts):
        sequences.append(shuffled_sequences(folder, block_size, seed))
        if difficulty:
            documents = documents_of(folder, eot)
            chosen = from_easy_to_hard(documents, difficulty(documents), n * block_size, seed)
            sequences[-1] = islice(pack(chosen, block_size), n)
    for i in take_turns(counts):
        ids = next(sequences[i])
        taken[folders[i]] += len(ids)
        yield ids


def report(taken, cards, say):
    """{folder: {"tokens": taken ones, "of": all, "epochs"}}; say() gets a line for each folder."""
    rows = {}
    for folder, card in cards.items():
        n, n_all = taken[folder], card.train["tokens"]
        rows[str(folder)] = dict(tokens=n, of=n_all, epochs=n / n_all)
        say(f"{folder}: {n / taken.total():.1%} of the text, {n / n_all:.2f} epochs of {n_all:,} "
            "tokens" + (f": beyond {MANY_EPOCHS} epochs, repeated text is worth much less than new"
                        if n / n_all > MANY_EPOCHS + 0.1 else ""))
    return rows


def mix(shares, out, block_size=256, seed=0, order="random", run=None, say=print):
    """Write the mixture of folders, {path: share}, as a folder of shards -> its Path."""
    out, (first, *_), taken = Path(out), shares, Counter()
    for name, value, least in ("block_size", block_size, 1), ("seed", seed, 0):
        if not least <= value < 2**31:
            raise ValueError(f"{name}={value} must be at least {least} and below 2**31")
    cards = {folder: check_shards(folder) for folder in shares}
    for folder, card in cards.items():
        if card.tokenizer != cards[first].tokenizer:
            raise ValueError(f"{folder} has another tokenizer than {first}: python data.py TEXT "
                             f"--tokenizer={first}/tokenizer.json makes shards that fit")
        if card.options.get("chats"):
            raise ValueError(f"{folder} holds chats, which a mixture would cut: python data.py "
                             "FILES --out=FOLDER puts the chats of several files together")
    for folder in shares:
        TokenLoader(folder, 1, block_size)  # a ValueError for a short text, before any file
    tokenizer = Tokenizer.load(first / "tokenizer.json")
    options = dict(block_size=block_size, seed=seed, order=order, run=run,
                   shares={str(path): share for path, share in shares.items()})
    difficulty = difficulty_by(order, run, tokenizer)
    with new_shards(out, "") as new:
        write_shards(mixed_sequences(shares, block_size, seed, difficulty, tokenizer.eot, taken),
                     new, "train", tokenizer.n_vocab)
        write_shards(read_split(first, "val"), new, "val", tokenizer.n_vocab)
        tokenizer.save(new / "tokenizer.json")
        content = [options, [card.fingerprint for card in cards.values()]]
        write_json(new / "card.json", vars(cards[first]) | dict(
            fingerprint=text_hash(json.dumps(content)).hex(), counts={}, split=f"as in {first}",
            options=options | dict(epochs=report(taken, cards, say)),
            sources=[source for card in cards.values() for source in card.sources],
            train=count_tokens(read_split(new), tokenizer),
            checksums={path.name: file_hash(path)
                       for path in [*sorted(new.glob("*.bin")), new / "tokenizer.json"]}))
    return out


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER[=SHARE]", help="shards, and their share of the text")
    add("--out", required=True, help="folder to write")
    add("--temperature", type=float, help="shares by size ** (1/T), not given ones")
    add("--order", choices=ORDERS, default="random", help="of documents; default %(default)s")
    add("--run", help="with --order=loss: the run whose model's loss it is")
    add("--block_size", type=int, default=256, help="tokens in a sequence; default %(default)s")
    add("--seed", type=int, default=0, help="of the order; default %(default)s")
    args = parser.parse_intermixed_args()
    refuse_idle(vars(args) if args.run else (), ["run"] * (args.order != "loss"),
                "without --order=loss")
    shares = (read_shares(args.folders) if args.temperature is None else
              tempered_shares(args.folders, args.temperature))
    out = mix(shares, args.out, args.block_size, args.seed, args.order, args.run)
    print(f"next: python train.py --data={out}{' --no-shuffle' * (args.order != 'random')}")


if __name__ == "__main__":
    run_command(main)
