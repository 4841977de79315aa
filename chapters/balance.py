"""
Balance documents over the values of a field: keep as many of each value, chosen at random.

    python -m chapters.balance texts/good/documents.jsonl --field=label --out=texts/even
    python data.py texts/even

All documents of the rarest value stay, and as many of each other value, in their order. None is
repeated: data.py would drop it as a copy. --out gets documents.jsonl, with the whole rows, and
card.json, which says how many of each value there were.
"""

import datetime
import json
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # `python chapters/balance.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.stages import count, new_record
from chapters.synthetic import source_of, write_folder
from data import read_rows
from tokenizer import Parser, run_command


def balanced(labels, seed=0):
    """Positions to keep, as many of each label: balanced(["a", "b", "b"]) == [0, 1] or [0, 2]."""
    positions, random = {}, np.random.RandomState(seed)
    for i, label in enumerate(labels):
        positions.setdefault(label, []).append(i)
    n = min(map(len, positions.values()), default=0)
    return sorted(i for each in positions.values() for i in random.permutation(each)[:n].tolist())


def label_in(field):
    """A function from a row to its value in a field, as a str; ValueError for a row without it."""
    def take(row):
        if not isinstance(row, dict) or field not in row:
            raise ValueError(f"no field {field!r} in {row!r:.60}: --field=NAME names another")
        return row[field] if isinstance(row[field], str) else json.dumps(row[field])
    return take


def balance(paths, field, out, seed=0):
    """Write a balanced choice of the rows of files to the folder `out` -> its card, a dict. Only
    labels are in memory: the files are read twice. ValueError if all rows have the same label."""
    labels = [label for path in paths for label in read_rows(path, label_in(field))]
    if len({*labels}) < 2:
        raise ValueError(f"field {field!r} is {', '.join({*labels}) or 'in no row':.60}: give rows "
                         "with two values or more")
    chosen, record = {*balanced(labels, seed)}, new_record("balance")
    sources = [source_of(str(path), path) for path in paths]
    cards = [source["curated"] for source in sources]

    def rows():
        pairs = ((path, row) for path in paths for row in read_rows(path, lambda row: row))
        for i, (path, row) in enumerate(pairs):
            text = str(row.get("text", ""))
            count(record, f"{path}, {i + 1}", text, [text] * (i in chosen), {labels[i]: 1})
            if i in chosen:
                yield row

    licenses = {card.get("license", "unknown") for card in cards}
    card = dict(license=" and ".join(sorted(licenses)), date=str(datetime.date.today()),
                synthetic=any(card.get("synthetic") for card in cards), sources=sources,
                options=dict(field=field, seed=seed, values=Counter(labels)), stages=[record])
    write_folder(out, "documents.jsonl", rows(), card)
    return card


def main():
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help=".jsonl with a label in each row")
    parser.add_argument("--field", required=True, help="with the label")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the choice; default %(default)s")
    args = parser.parse_intermixed_args()
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"seed={args.seed} must be at least 0 and below 2**32")
    card = balance(args.files, args.field, args.out, args.seed)
    [record], values = card["stages"], card["options"]["values"]
    print(f"{record['documents']:,} documents, {record['documents'] // len(values):,} of each of "
          f"{len(values):,} values; left out: {record['dropped']:,}")
    print(f"next: python data.py {args.out} --field=text")


if __name__ == "__main__":
    run_command(main)
