"""
Three filters trained from scratch: what language a text is in, how good it is, how toxic.

    python -m chapters.classify                            # tables of held-out accuracy
    python -m chapters.classify language FILE ...          # the language of each document
    python -m chapters.classify quality --like=good.txt --unlike=bad.txt FILE ...

Each is a Classifier of chapters/ngrams.py. No weights are shipped: those of language and toxicity
are trained on first use, in a second or two, on languages.jsonl (fields language, text, use) and
toxic.jsonl (text, toxic: 0 or 1, use), written for this course; use is train or test. Limits: a
language that languages.jsonl lacks is "und" if its script is its own, but is often taken for one
that is close to it, as Bulgarian for Russian. The toxic texts are few, mild and English: insults in
disguise, new ones and those of other languages are missed, and a quotation of an insult can be
taken for one.
"""

import json
import math
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":  # `python chapters/classify.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.ngrams import (Classifier, code_points, letter_features, logits, only_letters,
                             precision_recall, roc_auc, softmax)
from data import read_documents
from tokenizer import Parser, refuse_idle, run_command

HERE = Path(__file__).parent
LEAST_PROBABILITY = 0.4  # of a language; below it a text is "und"
MOST_DOCUMENTS = 2000  # of each kind, for a quality classifier: each takes 100 kB in training
TOXIC_THRESHOLDS = 0.3, 0.5, 0.7, 0.9

# -----------------------------------------------------------------------------
# Language, quality, toxicity.


def read_examples(name, use):
    """The rows of a .jsonl file in this folder with this use, "train" or "test"."""
    lines = (HERE / name).read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["use"] == use]


@lru_cache(maxsize=1)
def language_classifier():
    """(Classifier, bool array: which blocks of 128 code points occur in the training texts)."""
    rows = read_examples("languages.jsonl", "train")
    texts, labels = [row["text"] for row in rows], [row["language"] for row in rows]
    known = np.zeros(0x110000 >> 7, bool)
    known[code_points(only_letters("".join(texts))) >> 7] = True
    return Classifier.train(texts, labels), known


def language(text):
    """(ISO 639-1 code, probability) by the first 2,000 characters. The code is "und", undetermined,
    for a text without letters, for one whose letters are mostly of a script that no training text
    uses, and where no language reaches LEAST_PROBABILITY.
    language("Guten Morgen, wie geht es dir?")[0] == "de"."""
    classifier, known = language_classifier()
    codes = code_points(only_letters(text[:classifier.settings.limit]))
    letters = codes[codes != ord(" ")]
    if len(letters) == 0 or known[letters >> 7].mean() <= 0.5:
        return "und", 0.0
    # The same as classifier.probabilities([text]), but the letters are found already.
    row = letter_features(codes, classifier.settings)
    probabilities = softmax(logits(classifier.weights, [row]))[0]
    best = int(probabilities.argmax())
    name = classifier.settings.labels[best] if probabilities[best] >= LEAST_PROBABILITY else "und"
    return name, float(probabilities[best])


def quality_classifier(good, bad, seed=0):
    """Train on good and bad documents -> (Classifier, whose score(text) is the probability of good;
    its AUC, and precision and recall at 0.5, on a fifth of the documents, which are held out).
    GPT-3's training text was chosen by such a classifier (arXiv:2005.14165, appendix A)."""
    random, training, held_out = np.random.RandomState(seed), [], []
    for label, texts in enumerate((bad, good)):
        texts = [*dict.fromkeys(texts)]  # a copy must not be in both training and held-out texts
        if len(texts) < 10:
            raise ValueError(f"{len(texts)} different {'good' if label else 'bad'} documents are "
                             "too few: give at least 10, such as a .jsonl file with one a line")
        rows = [(texts[i], label) for i in random.permutation(len(texts))[:MOST_DOCUMENTS]]
        held_out += rows[::5]
        training += [row for i, row in enumerate(rows) if i % 5]
    classifier = Classifier.train(*zip(*training), characters=3, words=2, buckets=2**16, limit=3000,
                                  l2=1e-5, steps=100, seed=seed)
    texts, truth = zip(*held_out)
    scores = classifier.probabilities(texts)[:, 1]
    return classifier, dict(AUC=roc_auc(scores, truth), **precision_recall(scores, truth, 0.5))


@lru_cache(maxsize=1)
def toxic_classifier():
    """The Classifier of toxic.jsonl. The English sentences of languages.jsonl are further harmless
    examples, which make false alarms rarer; l2 was chosen by cross-validation."""
    rows = read_examples("toxic.jsonl", "train")
    rows += [row | dict(toxic=0) for row in read_examples("languages.jsonl", "train")
             if row["language"] == "en"]
    return Classifier.train([row["text"] for row in rows], [row["toxic"] for row in rows],
                            words=2, buckets=2**16, l2=1e-4, steps=100, rate=0.2)


def toxicity(text):
    """The probability that a line is toxic, averaged over the lines of a text; over at most 100,
    evenly spaced, of a long text. It ranks texts for a person to look at."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return 0.0
    step = math.ceil(len(lines) / 100)
    return float(toxic_classifier().probabilities(lines[::step])[:, 1].mean())


# -----------------------------------------------------------------------------
# Tables of results on held-out texts.


def pieces(size=None):
    """The held-out sentences as (language, text), whole, or joined and cut into pieces of this many
    characters."""
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
    yield f"toxic lines: {sum(truth)} of {len(truth)} held out, AUC {roc_auc(scores, truth):.3f}"
    yield "threshold  precision    recall"
    for threshold in TOXIC_THRESHOLDS:
        figures = precision_recall(scores, truth, threshold)
        yield f"{threshold:9}{figures['precision']:11.1%}{figures['recall']:10.1%}"


def judge(paths, verdict):
    """Print a line for each document in files: verdict(text), and the beginning of the text."""
    for text in (text for path in paths for text in read_documents(path)):
        print(verdict(text), " ".join(text[:200].split())[:60], sep="  ")


def judge_quality(like, unlike, paths):
    """Train on two files, print the metrics on held-out documents, and judge other files."""
    classifier, figures = quality_classifier([*read_documents(like)], [*read_documents(unlike)])
    print("held out:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    judge(paths, lambda text: f"{classifier.score(text):.3f}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", nargs="?", default="table", choices=["table", "language", "quality"])
    add("files", nargs="*", metavar="FILE", help="each of its documents is judged")
    add("--like", metavar="FILE", help="quality: of good documents")
    add("--unlike", metavar="FILE", help="quality: of bad documents")
    args = parser.parse_intermixed_args()
    named = [name for name in ("like", "unlike") if getattr(args, name)]
    if args.command != "quality":
        refuse_idle(named, ["like", "unlike"], f"beside {args.command}")
    if args.command == "table" and args.files:
        raise ValueError("table takes no files")
    if args.command == "language" and not args.files:
        raise ValueError("language needs a file to judge")
    if args.command == "table":
        print(*language_tables(), "", *toxic_table(), sep="\n")
    elif args.command == "language":
        judge(args.files, lambda text: "{} {:.3f}".format(*language(text)))
    elif len(named) < 2:
        raise ValueError("quality needs both --like=good.txt and --unlike=bad.txt")
    else:
        judge_quality(args.like, args.unlike, args.files)


if __name__ == "__main__":
    run_command(main)
