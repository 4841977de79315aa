"""
The legal case study: contract clauses of eight types, made here, and how well a run tells them
apart, beside a bag of words and the most frequent type.

    python -m chapters.clauses make --out=clauses --n=2000         # writes train.jsonl, test.jsonl
    python train.py --init=runs/base --data=clauses/train.jsonl --n_classes=8 --out=runs/clauses
    python -m chapters.clauses score runs/clauses clauses/test.jsonl
    python -m chapters.clauses ask runs/clauses --file=clause.txt     # how likely each label is

A clause is a template of clauses.jsonl with words in its fields, often between a beginning and an
end that use the words of all types alike. No template is in both files: a model that has learned
sentences by heart fails the test. Rows are {"text", "label", "template"}; score takes any of text
and label.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/clauses.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from chapters.classify import read_examples
from chapters.ngrams import Classifier
from data import clean, new_shards, read_rows
from evaluate import interval, score_shared, table
from model import check_known
from sample import load_run, pick_device, read_text, warn
from tokenizer import Parser, read_json, reading, refuse_idle, run_command

NAME = "clauses.jsonl"  # rows with a use: train and test (templates), beginning, end, words
BATCH = 32  # texts that a classifier reads at a time

# -----------------------------------------------------------------------------
# Clauses, made from templates and words.


def fill(template, labels, random, parts):
    """The text of a clause: a template, every other time after a beginning and before an end, with
    random words in its fields."""
    before, after = (random.choice([random.choice(parts[use])["text"], ""])
                     for use in ("beginning", "end"))
    words = {row["field"]: random.choice(row["words"]) for row in parts["words"]}
    words["a"], words["b"] = random.sample(words["parties"], 2)
    text = " ".join(filter(None, [before, template, after]))
    text = text.format(clause=random.choice(labels), **words)
    return text[0].upper() + text[1:]


def clauses(n, use, seed=0):
    """n rows {"text", "label", "template": its name} for a use, "train" or "test". All texts
    differ, and each label is as frequent as the others, or one row behind."""
    parts = {name: read_examples(NAME, name) for name in (use, "beginning", "end", "words")}
    random, templates, rows = Random(f"{seed} {use}"), {}, {}
    for number, row in enumerate(parts[use]):
        templates.setdefault(row["label"], []).append((f"{use} {number}", row["text"]))
    labels = sorted(templates)
    while len(rows) < n:
        label = labels[len(rows) % len(labels)]
        name, template = random.choice(templates[label])
        text = fill(template, labels, random, parts)
        rows.setdefault(text, dict(text=text, label=label, template=name))
    return random.sample([*rows.values()], n)


def make(out="clauses", n=2000, seed=0):
    """Write n rows to OUT/train.jsonl and a quarter as many to OUT/test.jsonl, a new folder."""
    if not 32 <= n <= 100_000:
        raise ValueError(f"--n={n} must be 32 to 100,000 clauses")
    with new_shards(Path(out), "") as new:
        for use, count in ("train", n), ("test", n // 4):
            lines = [json.dumps(row) + "\n" for row in clauses(count, use, seed)]
            (new / f"{use}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"next: python train.py --init=RUN --data={Path(out, 'train.jsonl')} --n_classes=8")


def read_labelled(path):
    """The rows of a file, as data.py cleans them; ValueError for one without a text or a label, and
    if there are none."""
    def take(row):
        text, label = map((row if isinstance(row, dict) else {}).get, ("text", "label"))
        if not isinstance(text, str) or not isinstance(label, str | int):
            raise ValueError(f"{row!r:.60} lacks a text or a label")
        return row | dict(text=clean(text), label=clean(str(label)))
    if not (rows := [*read_rows(path, take)]):
        raise ValueError(f"{path} is empty: it must have rows of text and label")
    return rows


# -----------------------------------------------------------------------------
# A run's guess: by its head, or where it has none by which label is likeliest as the answer.


def run_labels(folder, n_classes, found):
    """The labels of a run, in the order of its classes; of a chat run that has none those found in
    the test. ValueError where a classifier lacks its own, or one that was found."""
    path = Path(folder, "config.json")
    with reading(path):
        labels = [*map(str, read_json(path)["data"].get("labels") or [])]
    if n_classes and not n_classes == len(labels) > 1:
        raise ValueError(f"{path} has {len(labels)} labels for n_classes={n_classes}: train the "
                         "run on rows of text and label")
    for label in found if labels else ():
        check_known(label, labels, f"label, for {folder},")
    return labels or found


def as_prompt(tokenizer, text):
    """The ids of a chat that begins with a text, as a run was trained on."""
    return tokenizer.render_prompt([dict(role="user", content=text)])


@torch.inference_mode()
def class_probabilities(model, prompts):
    """How likely each class is, (N, n_classes), for N prompts, ids of which block_size are read."""
    prompts, parts = [torch.tensor(ids[:model.config.block_size]) for ids in prompts], []
    for start in range(0, len(prompts), BATCH):
        ids = pad_sequence(prompts[start:start + BATCH], True, -1).to(model.device)      # (B, T)
        logits, _ = model(ids.clamp(min=0), segments=(ids >= 0).long())          # (B, n_classes)
        parts.append(logits.softmax(dim=1))
    return torch.cat(parts)


def guess_by_answer(model, prompts, answers):
    """The likeliest of the answers to each prompt, both of them ids: N numbers."""
    T, length = model.config.block_size, max(map(len, prompts)) + max(map(len, answers)) - 1
    if length > T:
        raise ValueError(f"a text has {length} tokens with its answer, and this run reads {T}: "
                         "train one with a larger --block_size")
    scored = score_shared(model, [
        (ids[:-1], {(i, j): ([ids[-1], *answer], len(answer)) for j, answer in enumerate(answers)})
        for i, ids in enumerate(prompts)], "labels")
    return [max(range(len(answers)), key=lambda j: scored[i, j][0].sum().item())
            for i in range(len(prompts))]


def guess(folder, rows):
    """-> (how a run guesses, the label that it gives each row, its labels)."""
    model, tokenizer = load_run(folder, device=pick_device())
    labels = run_labels(folder, model.config.n_classes, sorted({row["label"] for row in rows}))
    prompts = [as_prompt(tokenizer, row["text"]) for row in rows]
    if model.config.n_classes:
        return "head", [labels[i] for i in class_probabilities(model, prompts).argmax(1)], labels
    answers = [[*tokenizer.encode(label), tokenizer.special["<|end|>"]] for label in labels]
    return "answer", [labels[i] for i in guess_by_answer(model, prompts, answers)], labels


def ask(folder, prompt=None, file=None):
    """Print how likely a run with a head finds each of its labels for a text, the best first."""
    if (prompt is None) == (file is None):
        raise ValueError("ask takes one text: --prompt=TEXT or --file=FILE")
    text = clean(read_text(file) if prompt is None else prompt)
    model, tokenizer = load_run(folder, device=pick_device())
    ids, T, n_classes = as_prompt(tokenizer, text), model.config.block_size, model.config.n_classes
    if not n_classes:
        raise ValueError(f"{folder} has no head for classes: python sample.py {folder} asks it")
    if len(ids) > T:
        warn(f"the text is cut, as in training, to {T} of {len(ids)} tokens")
    chances = class_probabilities(model, [ids])[0].tolist()
    for chance, label in sorted(zip(chances, run_labels(folder, n_classes, ())), reverse=True):
        print(f"{chance:.4f}  {label}")


# -----------------------------------------------------------------------------
# What guesses are worth.


def macro_f1(counts):
    """The mean over classes of 2 * precision * recall / (precision + recall), of a confusion matrix
    (n, n); a class that is neither there nor guessed does not count."""
    counts = np.asarray(counts)
    sums = counts.sum(axis=0) + counts.sum(axis=1)
    return float((2 * np.diag(counts)[sums > 0] / sums[sums > 0]).mean())


def worth(rows, guesses, names):
    """{"accuracy": (value, low, high), "macro F1", "confusion": (n, n), rows the truth} of a label
    for each row. Rows of one template stand or fall together, so the interval draws templates,
    where rows name them."""
    counts, groups = np.zeros((len(names), len(names)), int), {}
    for i, (row, label) in enumerate(zip(rows, guesses)):
        counts[names.index(row["label"]), names.index(label)] += 1
        key = str(row.get("template", f"row {i}"))
        groups.setdefault(key, []).append(row["label"] == label)
    vectors = np.array([[sum(group), len(group)] for group in groups.values()], float)
    return {"accuracy": interval(vectors), "macro F1": macro_f1(counts), "confusion": counts}


def score(folder, test, train=None):
    """-> ({name: worth()} of a run, of a bag of words and of the most frequent label, both learned
    from the rows of `train`, by default train.jsonl beside the test; the names of the classes)."""
    rows, learned = read_labelled(test), read_labelled(train or Path(test).with_name("train.jsonl"))
    how, guesses, labels = guess(folder, rows)
    truth = [row["label"] for row in learned]
    words = Classifier.train([row["text"] for row in learned], truth, characters=1, words=1)
    likeliest = words.probabilities([row["text"] for row in rows]).argmax(axis=1)
    frequent, names = max(sorted({*truth}), key=truth.count), sorted({*labels, *truth})
    return {f"{folder}, by its {how}": worth(rows, guesses, names),
            "bag of words": worth(rows, [words.settings.labels[i] for i in likeliest], names),
            f"always {frequent}": worth(rows, [frequent] * len(rows), names)}, names


def show(folder, test, train=None):
    """Print what score() says as a table, and the confusion matrix of the run."""
    scores, names = score(folder, test, train)
    lines = [["", "accuracy", "95% interval", "macro F1"]]
    for name, found in scores.items():
        value, low, high = found["accuracy"]
        lines.append([name, f"{value:.1%}", f"{low:.1%} to {high:.1%}", f"{found['macro F1']:.3f}"])
    print(table(lines), "", "how often a type (rows) is taken for a type (columns)", sep="\n")
    numbers, counts = [str(i + 1) for i in range(len(names))], [*scores.values()][0]["confusion"]
    print(table([["", "", *numbers], *([number, name, *(str(n or ".") for n in row)]
                                       for number, name, row in zip(numbers, names, counts))]))


COMMANDS = {  # what is called, with how many paths, and with which options
    "make": (make, 0, {"out", "n", "seed"}), "score": (show, 2, {"train"}),
    "ask": (ask, 1, {"prompt", "file"})}


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a run folder; score: and a file")
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--out", help="make: the folder to write (default clauses)")
    add("--n", type=int, help="make: rows to train on (default 2000)")
    add("--seed", type=int, help="make: same seed, same rows (default 0)")
    add("--train", help="score: rows for the baselines (default train.jsonl beside the file)")
    add("--prompt", help="ask: the text")
    add("--file", help="ask: a file with the text; - reads what is typed or piped in")
    typed = vars(parser.parse_intermixed_args())
    command, paths = typed.pop("command"), typed.pop("paths")
    function, n_paths, acting = COMMANDS[command]
    refuse_idle(typed, sorted(typed.keys() - acting), f"beside {command}")
    if len(paths) != n_paths:
        raise ValueError(f"{command} with {len(paths)} paths, not {n_paths}: --help shows how")
    function(*paths, **typed)


if __name__ == "__main__":
    run_command(main)
