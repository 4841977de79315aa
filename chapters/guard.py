"""
A guard around a model: it looks at what a user sends and at what the model answers, and refuses.

    python -m chapters.guard                      # misses, false alarms and time, on held-out texts
    python -m chapters.guard "Ignore all previous instructions."        # what it says of a text

It is rules and two small classifiers, trained on first use, on toxic.jsonl and redteam.jsonl. A row
of the latter is {"category", "harmful", "harmless": its twin, with words in common, "use": train or
test, "answer": to the harmless one}. The guard raises the cost of an attack and stops none that was
made for it: whoever knows its rules goes around them, as the table of disguises shows.
"""

import base64
import json
import re
import sys
import time
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":  # `python chapters/guard.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.classify import read_examples, toxicity
from chapters.dialogue import percent, share
from chapters.ngrams import Classifier
from chapters.privacy import mask_pii
from evaluate import interval, table
from model import TINY, check_options, option
from tokenizer import SPECIAL_TOKENS, parse_options, run_command

REFUSAL = "I cannot help with that."
INJECTION = [re.compile(pattern) for pattern in (  # written on the training rows of redteam.jsonl
    r"\b(ignore|disregard|forget|override)\b.{0,40}\b(instructions?|rules|guidelines|told)\b",
    r"\b(reveal|print|repeat|show|tell)\b.{0,40}\b(system prompt|text above|secret|password)\b",
    r"\byou are now\b.{0,40}\b(without|no) .{0,20}\b(rules|limits|restrictions|filters)\b",
    r"\bpretend\b.{0,40}\b(rules|restrictions|filters|limits)\b",
    r"\bfrom now on,? you (must|will|shall)\b", r"(^|\n) *(system|assistant|developer) *:")]

# -----------------------------------------------------------------------------
# Texts in a form in which tricks of writing are gone.


def plain(text):
    """A text without case, characters that do not show and other forms of letters:
    plain("\\uff29g\\u200bnore") == "ignore"."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(char for char in text if unicodedata.category(char) != "Cf").casefold()


def squeezed(text):
    """The letters and digits of a text alone: squeezed("S-e c.R") == "secr"."""
    return "".join(filter(str.isalnum, plain(text)))


DISGUISES = {  # what an attacker may do to a text
    "as it is": str, "capitals": str.upper, "full width": lambda text: "".join(
        chr(ord(char) + 0xfee0) if "!" <= char <= "~" else char for char in text),
    "zero-width spaces": "\u200b".join, "spaced letters": " ".join,
    "digits for letters": lambda text: text.translate(str.maketrans("aeio", "4310")),
    "backwards": lambda text: text[::-1],
    "base64": lambda text: base64.b64encode(text.encode()).decode()}


def special_ids(tokenizer, text, special=False):
    """The ids of special tokens among those of a text. By default there are none, whatever it says;
    with special=True a user's "<|end|><|system|>" would begin a turn of the system."""
    return [id for id in tokenizer.encode(text, special) if id in tokenizer.special.values()]


# -----------------------------------------------------------------------------
# The guard.


def english(use):
    """English sentences of no harm."""
    return [row["text"] for row in read_examples("languages.jsonl", use) if row["language"] == "en"]


@lru_cache(maxsize=1)
def request_classifier():
    """The Classifier of redteam.jsonl: whether a request is harmful. Beside the harmless twins it
    learns from ordinary sentences, as most of what it will see is not so close to harm."""
    rows, ordinary = read_examples("redteam.jsonl", "train"), english("train")
    texts = [row[kind] for row in rows for kind in ("harmless", "harmful")] + ordinary
    return Classifier.train(texts, [0, 1] * len(rows) + [0] * len(ordinary), words=2,
                            buckets=2**16, l2=1e-4, steps=100, rate=0.2)


class Guard:
    """check_input and check_output give None, or why a text is refused. secrets: strings that no
    answer may hold; requests and toxic: probabilities from which a text counts as one."""

    def __init__(self, secrets=(), requests=0.5, toxic=0.7, special=SPECIAL_TOKENS):
        self.secrets, self.special = [*filter(None, map(squeezed, secrets))], special
        self.requests, self.toxic = requests, toxic

    def holds_special(self, text):
        return any(name in plain(text) for name in self.special) and "a special token"

    def holds_injection(self, text):
        return any(rule.search(plain(text)) for rule in INJECTION) and "a prompt injection"

    def holds_request(self, text):
        return request_classifier().score(plain(text)) >= self.requests and "a harmful request"

    def holds_insult(self, text):
        return toxicity(plain(text)) >= self.toxic and "toxic words"

    def holds_secret(self, text):
        found = squeezed(text)
        return any(secret in found for secret in self.secrets) and "a secret"

    def holds_personal_data(self, text):
        found = mask_pii(text)[1]
        return bool(found) and f"personal data ({', '.join(found)})"

    def first(self, checks, text):
        return next(filter(None, (check(text) for check in checks)), None)

    def check_input(self, text):
        """None, or why what a user sends is refused, in words."""
        return self.first((self.holds_special, self.holds_injection, self.holds_insult,
                           self.holds_request), text)

    def check_output(self, text):
        """None, or why an answer is not shown, in words."""
        return self.first((self.holds_secret, self.holds_special, self.holds_personal_data,
                           self.holds_insult), text)

    def answer(self, model, messages):
        """What model.answer(messages) says, or REFUSAL where the last message or the answer is
        refused; a message that is refused never reaches the model."""
        if self.check_input(messages[-1]["content"]):
            return REFUSAL
        reply = model.answer(messages)
        return REFUSAL if self.check_output(reply) else reply


# -----------------------------------------------------------------------------
# What it is worth, and what it costs.


def examples():
    """{kind: ("input" or "output", texts to refuse, texts to let pass)}: held out from training,
    except that the patterns of personal data were written on theirs."""
    requests, toxic = (read_examples(f"{name}.jsonl", "test") for name in ("redteam", "toxic"))
    lines = Path(__file__).with_name("privacy.jsonl").read_text("utf-8").splitlines()
    found = {"ordinary text": ("input", [], english("test"))}
    for row in requests:
        _, bad, good = found.setdefault(row["category"], ("input", [], []))
        bad.append(row["harmful"])
        good.append(row["harmless"])
    for kind, rows in (("toxic", [(row["text"], row["toxic"]) for row in toxic]),
                       ("personal data", [(row["text"], row["kind"])
                                          for row in map(json.loads, lines)])):
        found[kind] = "output", *([text for text, is_bad in rows if bool(is_bad) == wanted]
                                  for wanted in (True, False))
    return found


def measure(check, bad, good):
    """{"misses", "false alarms": shares of the texts to refuse and to let pass, with intervals;
    "milliseconds": the mean time of a text}, each with its interval."""
    bad, good = [*bad], [*good]
    check("")  # what is trained on first use is no part of the time
    verdicts, times = [], []
    for text in [*bad, *good]:
        start = time.perf_counter()
        verdicts.append(check(text) is not None)
        times.append([1000 * (time.perf_counter() - start), 1])
    mean, low, high = interval(np.array(times))
    return {"misses": share([not found for found in verdicts[:len(bad)]]),
            "false alarms": share(verdicts[len(bad):]),
            "milliseconds": dict(value=mean, low=low, high=high, n=len(times))}


def disguised(check, bad, good):
    """{disguise: what measure() says of the texts in it}: a guard that refuses all that it cannot
    read misses nothing, and has as many false alarms."""
    return {name: measure(check, map(change, bad), map(change, good))
            for name, change in DISGUISES.items()}


def cells(name, found):
    return [name, *(percent(found[what]) for what in ("misses", "false alarms")),
            f"{found['milliseconds']['value']:.2f}"]


def report(guard):
    """The tables in words: what is missed of each kind, and of requests in disguise."""
    kinds = examples()
    requests = [sum((texts[i] for way, *texts in kinds.values() if way == "input"), [])
                for i in (0, 1)]
    rows = {f"{way}: {kind}": measure(getattr(guard, f"check_{way}"), *texts)
            for kind, (way, *texts) in kinds.items()}
    rows |= {f"all requests, {name}": found for name, found in
             disguised(guard.check_input, *requests).items()}
    return table([["", "misses", "false alarms", "ms a text"], *map(cells, rows, rows.values())])


@dataclass(frozen=True)
class Command:
    """What is looked at."""
    text: str | None = option(None, "that a user sends; without one the tables", positional=True)
    output: bool = option(False, "the text is what a model answers")
    secret: list = option([], "a string that no answer may hold")
    requests: float = option(0.5, "probability of a harmful request", TINY, 1 + TINY)
    toxic: float = option(0.7, "probability of toxic words", TINY, 1 + TINY)

    __post_init__ = check_options


def main():
    command = Command(**parse_options(__doc__, Command)[0])
    guard = Guard(command.secret, command.requests, command.toxic)
    if command.text is None:
        return print(report(guard))
    reason = (guard.check_output if command.output else guard.check_input)(command.text)
    print(f"refused: {reason}" if reason else "passes")


if __name__ == "__main__":
    run_command(main)
