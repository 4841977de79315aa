"""
Which language, how good, how toxic: one small classifier on hashed n-grams, trained here.

    python -m chapters.classify                            # tables of held-out accuracy
    python -m chapters.classify language FILE ...          # the language of each document
    python -m chapters.classify quality --like=good.txt --unlike=bad.txt FILE ...

languages.jsonl holds sentences in 19 languages and 9 scripts (fields language, text, use: train or
test), toxic.jsonl short English texts (text, toxic: 0 or 1, use), all written for this course: no
weights are shipped, both classifiers are trained when first asked, in a second or two. Limits: the
language of a text is one of the 19 or "und"; toxic knows the few hundred texts it saw, mild ones:
it ranks lines for a person to look at, and misses what is new, disguised or in another language.
"""

import json
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":  # `python chapters/classify.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.ngrams import Classifier, area, code_points, only_letters, precision_recall
from data import read_documents
from tokenizer import Parser, run_command

HERE = Path(__file__).parent
CERTAIN = 0.4  # a language less probable than this is "und"
MOST = 2000  # documents of a kind that a quality classifier learns from: 100 kB of memory each
TOXIC_THRESHOLDS = 0.3, 0.5, 0.7, 0.9

# -----------------------------------------------------------------------------
# What is made of it: a language, a quality, a share of toxic lines.


def read_examples(name, use):
    """The rows of a .jsonl file of this folder that have this use, train or test."""
    lines = (HERE / name).read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["use"] == use]


@lru_cache(maxsize=1)
def language_classifier():
    """The Classifier, and for each block of 128 characters whether a training text uses it."""
    rows = read_examples("languages.jsonl", "train")
    texts, labels = [row["text"] for row in rows], [row["language"] for row in rows]
    known = np.zeros(0x110000 >> 7, bool)
    known[code_points(only_letters("".join(texts))) >> 7] = True
    return Classifier.train(texts, labels), known


def language(text):
    """(ISO 639-1 code, probability) of the language that the first 2,000 characters are in: "und"
    where there are no letters, where most are of a script none of the 19 languages has, and where
    none is CERTAIN. language("Guten Morgen, wie geht es dir?")[0] == "de"."""
    classifier, known = language_classifier()
    codes = code_points(only_letters(text[:classifier.settings.limit]))
    letters = codes[codes != ord(" ")]
    if len(letters) == 0 or known[letters >> 7].mean() <= 0.5:
        return "und", 0.0
    probabilities = classifier.probabilities([text])[0]
    best = int(probabilities.argmax())
    name = classifier.settings.labels[best] if probabilities[best] >= CERTAIN else "und"
    return name, float(probabilities[best])


def quality_classifier(good, bad, seed=0):
    """Learn to tell two lists of documents apart, by at most MOST of each -> (Classifier, whose
    score(text) is the probability of a good one; how right it is on each fifth document, which it
    has not seen: area, precision and recall at 0.5)."""
    random, seen, held_out = np.random.RandomState(seed), [], []
    for label, texts in enumerate((bad, good)):
        texts = [*dict.fromkeys(texts)]  # of copies, none may be on both sides
        if len(texts) < 10:
            raise ValueError(f"{len(texts)} different {'good' if label else 'bad'} documents are "
                             "too few, give at least 10: a .jsonl file holds one a line")
        rows = [(texts[i], label) for i in random.permutation(len(texts))[:MOST]]
        held_out += rows[::5]
        seen += [row for i, row in enumerate(rows) if i % 5]
    classifier = Classifier.train(*zip(*seen), characters=3, words=2, buckets=2**16, limit=3000,
                                  l2=1e-5, steps=100, seed=seed)
    texts, truth = zip(*held_out)
    scores = classifier.probabilities(texts)[:, 1]
    return classifier, dict(area=area(scores, truth), **precision_recall(scores, truth, 0.5))


@lru_cache(maxsize=1)
def toxic_classifier():
    """The Classifier of toxic.jsonl; the strength of its l2 was chosen by cross-validation."""
    rows = read_examples("toxic.jsonl", "train")
    return Classifier.train([row["text"] for row in rows], [row["toxic"] for row in rows],
                            words=2, buckets=2**16, l2=1e-3, steps=100, rate=0.2)


def toxicity(text):
    """0 to 1: how probable it is that a line is toxic, the mean over 100 lines of the text, evenly
    spaced, or all of a shorter one."""
    lines = [line for line in text.splitlines() if line.strip()]
    lines = lines[::len(lines) // 100 + 1]
    return float(toxic_classifier().probabilities(lines)[:, 1].mean()) if lines else 0.0


# -----------------------------------------------------------------------------
# How right it is.


def pieces(size=None):
    """The held-out sentences as (language, text), whole, or joined and cut to this size."""
    texts = {}
    for row in read_examples("languages.jsonl", "test"):
        texts.setdefault(row["language"], []).append(row["text"])
    for name, sentences in texts.items():
        whole = " ".join(sentences)
        cuts = range(0, len(whole) - size + 1, size) if size else ()
        yield from ((name, text) for text in [whole[i:i + size] for i in cuts] or sentences)


def language_tables():
    """Yield the lines of two tables: accuracy by length, and what 20 characters are taken for."""
    names = language_classifier()[0].settings.labels
    counts = {size: Counter((name, language(text)[0]) for name, text in pieces(size))
              for size in (None, 100, 50, 20)}
    yield "share of held-out text recognised, at so many characters"
    yield "language  sentence" + "".join(f"{size:10}" for size in [*counts][1:])
    for name in [*names, "all"]:
        rows = [name] if name != "all" else names
        shares = [sum(count[row, row] for row in rows) /
                  sum(n for (row, _), n in count.items() if row in rows)
                  for count in counts.values()]
        yield f"{name:8}" + "".join(f"{share:10.1%}" for share in shares)
    yield ""
    yield "20 characters of a language (rows) are taken for"
    yield "    " + "".join(f"{name:>4}" for name in [*names, "und"])
    for row in names:
        yield f"{row:4}" + "".join(f"{counts[20][row, name] or '.':>4}" for name in [*names, "und"])


def toxic_table():
    """Yield the lines of a table: precision and recall at each threshold."""
    rows = read_examples("toxic.jsonl", "test")
    scores, truth = [toxicity(row["text"]) for row in rows], [row["toxic"] for row in rows]
    yield f"toxic lines: {sum(truth)} of {len(truth)} held out, area {area(scores, truth):.3f}"
    yield "threshold  precision    recall"
    for threshold in TOXIC_THRESHOLDS:
        figures = precision_recall(scores, truth, threshold)
        yield f"{threshold:9}{figures['precision']:11.1%}{figures['recall']:10.1%}"


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", nargs="?", default="table", choices=["table", "language", "quality"])
    add("files", nargs="*", metavar="FILE", help="whose documents are judged, one a line")
    add("--like", metavar="FILE", help="quality: good documents")
    add("--unlike", metavar="FILE", help="quality: bad documents")
    args = parser.parse_intermixed_args()
    if args.command == "quality":
        if not (args.like and args.unlike):
            raise ValueError("quality needs --like=good.txt and --unlike=bad.txt")
        good, bad = [*read_documents(args.like)], [*read_documents(args.unlike)]
        classifier, figures = quality_classifier(good, bad)
        print("held out:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    elif args.command == "table":
        print(*language_tables(), "", *toxic_table(), sep="\n")
    for text in (text for path in args.files for text in read_documents(path)):
        start = " ".join(text[:200].split())[:60]
        if args.command == "language":
            print("{} {:.3f}  {}".format(*language(text), start))
        elif args.command == "quality":
            print(f"{classifier.score(text):.3f}  {start}")


if __name__ == "__main__":
    run_command(main)
