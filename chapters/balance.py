"""
Of each value of a field as many documents, a random choice of them in their order.

    python -m chapters.balance texts/good/documents.jsonl --field=label --out=texts/even
    python data.py texts/even

The rarest value says how many: nothing is repeated, which data.py would drop as a copy. --out gets
documents.jsonl, whole rows, and card.json, which says how many of each value there were.
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
from chapters.synthetic import write_folder
from data import read_rows
from tokenizer import Parser, read_json, run_command


def balanced(labels, seed=0):
    """The positions of as many of each label: balanced(["a", "b", "b"]) == [0, 1] or [0, 2]."""
    labels, random = np.array(labels, object), np.random.RandomState(seed)
    n = min(Counter(labels).values(), default=0)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:n]
              for label in dict.fromkeys(labels)]
    return sorted(np.concatenate([[], *chosen]).astype(int).tolist())


def label_in(field):
    """A function from a row to the value in a field as a str; ValueError where there is none."""
    def take(row):
        if not isinstance(row, dict) or field not in row:
            raise ValueError(f"no field {field!r} in {row!r:.60}: --field=NAME names another")
        return row[field] if isinstance(row[field], str) else json.dumps(row[field])
    return take


def card_beside(path):
    """The card.json beside a file, a dict; an empty one where there is none."""
    path = Path(path).with_name("card.json")
    card = read_json(path) if path.exists() else {}
    return card if isinstance(card, dict) else {}


def balance(paths, field, out, seed=0):
    """Write a balanced choice of the rows of files to the folder `out` -> its card, a dict. Two
    passes: only labels are held in memory. ValueError where all rows have one label."""
    labels = [label for path in paths for label in read_rows(path, label_in(field))]
    if len({*labels}) < 2:
        raise ValueError(f"field {field!r} is {', '.join({*labels}) or 'in no row':.60}: a balance "
                         "needs two values or more")
    chosen, record = {*balanced(labels, seed)}, new_record("balance")
    cards = [card_beside(path) for path in paths]
    sources = [dict(name=str(path), files=1, n_skipped=0, skipped=[], curated=card)
               for path, card in zip(paths, cards)]

    def rows():
        every = ((path, row) for path in paths for row in read_rows(path, lambda row: row))
        for i, (path, row) in enumerate(every):
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
    print(f"next: python data.py {args.out}")


if __name__ == "__main__":
    run_command(main)
