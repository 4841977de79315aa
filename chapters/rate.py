"""
Blind rating by people: two models go in, you say which answer is better without knowing whose it
is; out come rows that preference training can learn from, the win rate, and Elo ratings.

    python -m chapters.rate runs/a runs/b                # in the terminal
    python -m chapters.rate runs/a runs/b --page         # in the browser, on this machine only
    python -m chapters.rate --votes=votes.jsonl          # the report alone, over all votes

A row of votes.jsonl has a prompt, who was shown ("shown", the first on the left), the winner (one
of the two, tie or skip), and if there is one, the answers: {"prompt", "chosen", "rejected"}. The
same command again goes on where it stopped; no question comes twice.
"""

import json
import math
import random
import re
import sys
import threading
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

if __name__ == "__main__":  # `python chapters/rate.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.dialogue import percent, share
from chapters.judge import win_rate
from chapters.prompts import read_jsonl
from chapters.questions import read_prompts, read_questions
from chapters.talk import AnswerConfig, LocalModel, open_all
from chapters.voting import rate_in_browser, rate_in_terminal
from evaluate import held_out
from model import check_options, option
from tokenizer import parse_options, refuse_idle, replacing, run_command

VOTES = {"a": 0, "b": 1, "t": "tie", "s": "skip"}
BEGINNING = 12           # words of a paragraph that a base model continues

# -----------------------------------------------------------------------------
# Votes: a .jsonl file, a row for each.


def read_votes(path):
    """The rows of a file of votes; none if there is no file. ValueError for a row that is none."""
    rows = []
    for number, row in read_jsonl(path) if Path(path).exists() else ():
        shown = row.get("shown") if isinstance(row, dict) else None
        complete = (isinstance(shown, list) and len(shown) == 2 and shown[0] != shown[1]
                    and all(isinstance(name, str) for name in [*shown, row.get("prompt")])
                    and row.get("winner") in [*shown, "tie", "skip"])
        if not complete:
            raise ValueError(f"{path}, line {number} is no vote of this command, with prompt, two "
                             f"names in shown, and winner: {row!r:.80}")
        rows.append(row)
    return rows


def make_vote(prompt, shown, answers, vote, seed):
    """A row: shown are the names in the order of the answers, vote is 0, 1, tie or skip."""
    row = dict(prompt=prompt)
    if vote in (0, 1):
        row |= dict(chosen=answers[vote], rejected=answers[1 - vote])
    return row | dict(shown=list(shown), winner=shown[vote] if vote in (0, 1) else vote, seed=seed)


def append_vote(path, row):
    """Add a row to the file. It is written anew: a power cut or a full disk leaves no half row."""
    before = Path(path).read_bytes() if Path(path).exists() else b""
    line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")
    with replacing(path) as file:
        file.write(before + (b"" if before[-1:] in (b"", b"\n") else b"\n") + line + b"\n")


# -----------------------------------------------------------------------------
# Ratings: who wins against whom to one number each.


def count_wins(rows, names):
    """(n, n): how often each of n names, the row, beat each other, the column; ties are half."""
    wins = np.zeros((len(names), len(names)))
    for row in rows:
        a, b = map(names.index, row["shown"])
        points = 0.5 if row["winner"] == "tie" else float(row["winner"] == names[a])
        wins[a, b] += points
        wins[b, a] += 1 - points
    return wins


def bradley_terry(wins, n_steps=1000):
    """-> Elo ratings (n,) of a table of wins (n, n), mean 1000, and how far their 95% intervals
    reach to each side (n,).

    A beats B with chance 1 / (1 + 10^((B - A) / 400)), the Bradley-Terry model, fitted by Hunter's
    steps (doi:10.1214/aos/1079120141); the intervals come from the curvature of its likelihood. One
    tie between each two is added, or who has won all would be rated infinite.
    """
    n = len(wins)
    wins, strength = wins + 0.5 * (1 - np.eye(n)), np.ones(n)
    games = wins + wins.T                                                # (n, n)
    for _ in range(n_steps):
        strength = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    chance = strength[:, None] / (strength[:, None] + strength)
    curvature = -games * chance * chance.T
    curvature -= np.diag(curvature.sum(1))
    errors = np.sqrt(np.diag(np.linalg.pinv(curvature)))
    return 1000 + 400 * np.log10(strength), 1.96 * 400 / math.log(10) * errors


def elo(rows):
    """{name: value, low, high} for votes that are no skips, the best first, as the leaderboard of
    Chatbot Arena rates (arXiv:2403.04132)."""
    names = sorted({name for row in rows for name in row["shown"]})
    values, reach = bradley_terry(count_wins(rows, names))
    return {names[i]: dict(value=values[i], low=values[i] - reach[i], high=values[i] + reach[i])
            for i in np.argsort(-values)}


def report(rows):
    """All that the votes say, as lines."""
    voted = [row for row in rows if row["winner"] != "skip"]
    if not voted:
        return [f"no votes yet, {len(rows)} skipped"]
    lines = [f"{len(voted)} votes, {len(rows) - len(voted)} skipped"]
    for a, b in combinations(sorted({name for row in voted for name in row["shown"]}), 2):
        winners = [{a: "A", b: "B"}.get(row["winner"], "tie") for row in voted
                   if {a, b} == {*row["shown"]}]
        if winners:
            counts = [winners.count(name) for name in ("A", "B", "tie")]
            lines.append("{} against {}: {} wins, {} losses, {} ties, win rate {}".format(
                a, b, *counts, percent(win_rate(winners))))
    lines += [f"  Elo {score['value']:6.0f} [{score['low']:.0f}, {score['high']:.0f}]  {name}"
              for name, score in elo(voted).items()]
    left = [row["winner"] == row["shown"][0] for row in voted if row["winner"] != "tie"]
    return [*lines, f"the first shown was chosen {percent(share(left))}; intervals are of 95%, "
            "ties count half"]


# -----------------------------------------------------------------------------
# A session: which question is next, and what the vote on it is.


class Session:
    """Prompts, two models {name: model}, a file of votes. `now` is (number, prompt, names as shown,
    their answers), or None at the end; vote(number, key) saves and goes on."""

    def __init__(self, models, prompts, path, seed):
        self.models, self.path, self.seed, self.lock = models, Path(path), seed, threading.Lock()
        done = {row["prompt"] for row in read_votes(path) if {*row["shown"]} == {*models}}
        self.prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
        self.n, self.start = len(done) + len(self.prompts), len(done)
        self.next(0)

    def next(self, number):
        """Ask both the question of this number. Who stands first depends on seed and prompt alone;
        two answers that are equal are a tie that nobody need be asked about."""
        self.now = None
        for number in range(number, len(self.prompts)):
            prompt, shown = self.prompts[number], sorted(self.models)
            random.Random(f"{self.seed} {prompt}").shuffle(shown)
            ask = [dict(role="user", content=prompt)]
            answers = [self.models[name].answer(ask) for name in shown]
            if answers[0] != answers[1]:
                self.now = number, prompt, shown, answers
                return
            append_vote(self.path, make_vote(prompt, shown, answers, "tie", self.seed))

    def vote(self, number, key):
        """Save a vote, a key of VOTES, unless it is for another question than that of now, as a
        second click is."""
        with self.lock:
            if self.now is not None and self.now[0] == number:
                append_vote(self.path, make_vote(*self.now[1:], VOTES[key], self.seed))
                self.next(number + 1)

    def report(self):
        return report(read_votes(self.path))


# -----------------------------------------------------------------------------
# The command.


def beginnings(folder, n):
    """The first words of n paragraphs, from all over the text that was held out from training."""
    texts = held_out(folder, max_tokens=1 << 20)
    blocks = (block.split(" ") for text in texts for block in re.split(r"\n\s*\n", text.strip()))
    starts = [*dict.fromkeys(" ".join(words[:BEGINNING]) for words in blocks if len(words) > 2)]
    if not starts:
        raise ValueError(f"{folder}: its held-out text has no beginnings: give --prompts=FILE")
    return starts[::math.ceil(len(starts) / n)]


def pick_prompts(config, models):
    """Those of --prompts; for two base models that continue a text the beginnings of held-out
    paragraphs, else the questions of the judge."""
    if config.prompts:
        return read_prompts(config.prompts)
    if all(isinstance(model, LocalModel) and model.template == "text" for model in models.values()):
        return beginnings(next(iter(models)), config.n_prompts)
    return [question["turns"][0] for question in read_questions()]


@dataclass(frozen=True)
class RateConfig:
    """Who is rated, and where."""
    contestants: list = option([], "two run folders or URLs; none for the report alone",
                               positional=True)
    prompts: str | None = option(None, "a file with one prompt a line, or a .jsonl with \"prompt\" "
                                 "(default: questions, or beginnings of held-out text)")
    n_prompts: int = option(50, "beginnings to take", low=1)
    votes: str = option("votes.jsonl", "the file of votes")
    page: bool = option(False, "rate in the browser, not in the terminal")
    port: int = option(0, "of the page; 0 is a free one", below=1 << 16)

    __post_init__ = check_options


def main():
    typed, answers = parse_options(__doc__, RateConfig, AnswerConfig)
    config, answers = RateConfig(**typed), AnswerConfig(**answers)
    names, rows = [name.rstrip("/") for name in config.contestants], read_votes(config.votes)
    if not names:
        refuse_idle(typed, ["prompts", "n_prompts", "page"], "without two models to rate")
    if not config.page:
        refuse_idle(typed, ["port"], "without --page")
    if len(names) not in (0, 2) or len({*names}) == 1:  # runs/a/ is runs/a
        raise ValueError(f"two different models are rated, and these are {names}")
    if not names and not rows:
        raise ValueError(f"{config.votes} holds no votes: name two runs to rate")
    if names:
        models = dict(zip(names, open_all(names, answers, base="text")))
        session = Session(models, pick_prompts(config, models), config.votes, answers.seed)
        if config.page and session.now is not None:
            rate_in_browser(session, config.port)
        else:
            rate_in_terminal(session)
    print("\n".join(report(read_votes(config.votes))))
    if names:
        print("votes:", config.votes)


if __name__ == "__main__":
    run_command(main)
