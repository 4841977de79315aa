"""
What users think of answers: their ratings go in, and out come rows that a model can learn from.

    python -m chapters.serve runs/chat --feedback=feedback.jsonl   # without it there is no log
    python -m chapters.feedback feedback.jsonl --out=feedback      # writes chats.jsonl, pairs.jsonl
    python train.py --init=runs/chat --data=feedback/chats.jsonl --out=runs/chat-2
    python -m chapters.align dpo runs/chat --data=feedback/pairs.jsonl

A row of the log has the messages, the answer, the model that wrote it and its arm of an A/B split,
a rating (1 or -1, or null) and a better text (or null). Personal data are masked before anything is
written, and a client is a pseudonym that changes whenever the server starts.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

if __name__ == "__main__":  # `python chapters/feedback.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.privacy import mask_pii
from chapters.rewards import write_rows
from chapters.watch import Recent
from data import BYTES, read_rows
from model import check_options, option
from sample import warn
from tokenizer import parse_options, run_command

REMEMBERED = 1 << 24     # bytes of answers that can still be rated
LOG_BYTES = 1 << 28      # size at which a log is full
PER_HOUR = 60            # ratings of a client
LONGEST_BETTER = 20_000  # characters

# -----------------------------------------------------------------------------
# The log: answers wait in memory, and those that somebody rates are written down.


class TooMany(ValueError):
    """A client rates more often than PER_HOUR: the server replies 429."""


def open_log(path):
    """A descriptor to append to a file, which is made if need be; only its owner may read it."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


def append_line(path, row, max_bytes=LOG_BYTES):
    """Append a row to a .jsonl file in a single write, so that the lines of two processes cannot
    mix. ValueError if the file would grow beyond max_bytes."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    file = open_log(path)
    try:
        size = os.fstat(file).st_size
        if size + len(line) > max_bytes:
            raise ValueError(f"the feedback log is full: it may have {max_bytes:,} bytes")
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # a power cut left half a row, which readers skip
        os.write(file, line)
    finally:
        os.close(file)


def is_rating(value):
    """Whether a value is 1, -1, or None for none."""
    return value is None or type(value) is int and abs(value) == 1


class FeedbackLog:
    """The ratings of a server's answers, in a file. remember() each answer, then rate() may follow;
    max_bytes bounds the file, per_hour the ratings of one client."""

    def __init__(self, path, max_bytes=LOG_BYTES, per_hour=PER_HOUR, clock=time.monotonic):
        self.path, self.max_bytes, self.per_hour, self.clock = path, max_bytes, per_hour, clock
        self.answers, self.lock = Recent(REMEMBERED), threading.Lock()
        self.salt, self.hour, self.counts = secrets.token_bytes(16), clock(), Counter()
        os.close(open_log(path))  # an OSError now, and not when somebody rates

    def pseudonym(self, client):
        """A name for a client that tells two of them apart, but not who they are."""
        name = str(client).encode(errors="replace")
        return blake2b(name, key=self.salt, digest_size=8).hexdigest()

    def remember(self, id, messages, answer, model, arm="a"):
        """Keep what was said under the id of the reply, in memory, until others push it out."""
        row = dict(messages=messages, answer=answer, model=model, arm=arm)
        self.answers.put(id, json.dumps(row).encode())

    def check_rate(self, name):
        """Count a rating of a client; TooMany beyond per_hour."""
        with self.lock:
            if self.clock() - self.hour > 3600:
                self.hour, self.counts = self.clock(), Counter()
            if self.counts[name] >= self.per_hour:
                raise TooMany(f"{self.per_hour} ratings an hour are the limit: come back later")
            self.counts[name] += 1

    def rate(self, id, client, rating=None, better=None):
        """Write down a rating, 1 or -1, or a better text, or both, and return the row. ValueError
        for anything else, and for an answer that is not, or no longer, known."""
        if not is_rating(rating):
            raise ValueError(f"rating={rating!r:.40} must be 1 or -1")
        if not isinstance(better, str | None) or len(better or "") > LONGEST_BETTER:
            raise ValueError(f"better must be a text of up to {LONGEST_BETTER:,} characters")
        if rating is None and not (better or "").strip():
            raise ValueError("give a rating, 1 or -1, or a better text")
        known = self.answers.get(id) if isinstance(id, str) else None
        if known is None:
            raise ValueError(f"id={id!r:.60} is no answer that can still be rated")
        self.check_rate(name := self.pseudonym(client))
        row = masked_row(dict(client=name, **json.loads(known), rating=rating, better=better))
        append_line(self.path, row, self.max_bytes)
        return row


def masked_row(row):
    """A row of the log without personal data in its texts."""
    def mask(text):
        return text and mask_pii(text)[0]
    messages = [dict(message, content=mask(message["content"])) for message in row["messages"]]
    return row | dict(messages=messages, answer=mask(row["answer"]), better=mask(row["better"]))


# -----------------------------------------------------------------------------
# From the log to votes: one of each client on each answer, and not too many of any client.

# What a client thinks of an answer; question: the messages as JSON, so that equal ones are equal.
Vote = namedtuple("Vote", "client question answer arm rating better")


def take_vote(row):
    """A row of the log -> a Vote; ValueError for a row that is none."""
    if not isinstance(row, dict):
        raise ValueError(f"this is no row of a feedback log: {row!r:.60}")
    texts = [row.get(name) for name in ("client", "answer", "arm")]
    if not (all(isinstance(text, str) for text in texts) and is_rating(row.get("rating"))
            and isinstance(row.get("better"), str | None)):
        raise ValueError("it lacks client, answer and arm, three texts, a rating, 1 or -1 or null, "
                         f"or better, a text or null: {row!r:.60}")
    BYTES.render_prompt(row.get("messages"))  # a ValueError where turns are wrong
    return Vote(texts[0], json.dumps(row["messages"]), *texts[1:], row.get("rating"),
                (row.get("better") or "").strip() or None)


def read_votes(path):
    """-> (the Votes of a log, the reasons why other rows are none)"""
    wrong = []
    return [*read_rows(path, take_vote, skip=wrong.append)], wrong


def last_votes(votes, per_client):
    """-> (the last Vote of each client on each answer, how many were left out as their client has
    per_client others already). A better text stays when the same client then changes its rating."""
    last, n_own, n_left_out = {}, Counter(), 0
    for vote in votes:
        key = vote[:3]
        if key in last:
            new = {name: value for name, value in vote._asdict().items() if value is not None}
            last[key] = last[key]._replace(**new)
        elif n_own[vote.client] < per_client:
            last[key] = vote
            n_own[vote.client] += 1
        else:
            n_left_out += 1
    return [*last.values()], n_left_out


def tally(votes):
    """{question: {answer: ratings for it minus ratings against it}}; without any there is none."""
    scores = defaultdict(Counter)
    for vote in votes:
        if vote.rating is not None:
            scores[vote.question][vote.answer] += vote.rating
    return scores


# -----------------------------------------------------------------------------
# From votes to rows: chats as data.py reads them, pairs as chapters.align does.


def chat(question, answer):
    """A chat that ends in an answer."""
    return dict(messages=[*json.loads(question), dict(role="assistant", content=answer)])


def chats_of(votes, scores):
    """The answers that more clients liked than disliked, and the better texts."""
    liked = [(question, answer) for question, answers in scores.items()
             for answer, score in answers.items() if score > 0]
    better = [(vote.question, vote.better) for vote in votes if vote.better]
    return [chat(*pair) for pair in dict.fromkeys(liked + better)]


def pairs_of(votes, scores):
    """The most liked answer to a question before the most disliked one, and each better text before
    the answer it replaces. Two users who want opposite things leave no pair."""
    found = {}
    for question, answers in scores.items():
        (best, most), *_, (worst, least) = answers.most_common() * 2
        if most > 0 > least:
            found[question, best, worst] = None
    found |= {(vote.question, vote.better, vote.answer): None for vote in votes
              if vote.better and vote.better != vote.answer}
    return [dict(prompt=json.loads(question), chosen=chosen, rejected=rejected)
            for question, chosen, rejected in found if (question, rejected, chosen) not in found]


@dataclass(frozen=True)
class FeedbackConfig:
    """Which log, and where its rows go."""
    log: str | None = option(None, "the server's --feedback file", positional=True)
    out: str = option("feedback", "the folder for chats.jsonl and pairs.jsonl")
    per_client: int = option(50, "answers of a client that count", low=1)

    __post_init__ = check_options


def main():
    config = FeedbackConfig(**parse_options(__doc__, FeedbackConfig)[0])
    if config.log is None:
        raise ValueError("name the log of a server: python -m chapters.feedback feedback.jsonl")
    rows, wrong = read_votes(config.log)
    votes, n_left_out = last_votes(rows, config.per_client)
    scores = tally(votes)
    if wrong:
        warn(f"{len(wrong)} of {len(rows) + len(wrong)} rows are left out: {wrong[0]}")
    made = {"chats": chats_of(votes, scores), "pairs": pairs_of(votes, scores)}
    if not any(made.values()):
        raise ValueError(f"{config.log}: nobody liked an answer or wrote a better one")
    n_undecided = sum(score == 0 for answers in scores.values() for score in answers.values())
    print(f"{len(rows):,} rows, {len(votes):,} of them count: the last of a client on an answer, "
          f"up to {config.per_client} answers a client ({n_left_out:,} left out)\n"
          f"{n_undecided:,} answers have as many ratings for as against them, and teach nothing")
    for name, rows in made.items():
        path = Path(config.out, f"{name}.jsonl")
        path.unlink(missing_ok=True)  # rows of an earlier log would look like this one's
        if rows:
            write_rows(path, rows)
        print(f"{path}: {len(rows):,} {name}" + ", so it is not written" * (not rows))


if __name__ == "__main__":
    run_command(main)
