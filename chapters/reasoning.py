"""
Test-time compute: a small model is right more often if it writes more before it answers.

    python -m chapters.reasoning samples     # one answer, a vote of n, the best of n
    python -m chapters.reasoning chain       # steps written out against the sum at once
    python -m chapters.reasoning reflect     # the model checks its answer, and may try again

The questions are sums, and the models those of chapters/solve.py, trained on the spot in seconds.
"""

import copy
import math
import sys
from collections import Counter
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from random import Random
from statistics import fmean

if __name__ == "__main__":  # `python chapters/reasoning.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from chapters.answers import masked_mean, pad, render, token_logprobs
from chapters.solve import (CHAIN, DIRECT, ROWS, STEPS, answer_of, is_right, learn, questions,
                            sample, share, solutions, solved, solver)
from model import check_options, option
from tokenizer import parse_options, run_command

CHECK_STEPS = 60  # of training on a model's own samples

# -----------------------------------------------------------------------------
# How good a sample is, by the model itself and by one that learned from its errors.


@torch.no_grad()
def judged(groups, **models):
    """The groups of Samples, in each field that is named the log-probability by that model."""
    rows = [own.row for group in groups for own in group]
    parts = [pad(rows[i:i + ROWS]) for i in range(0, len(rows), ROWS)]
    found = {name: iter([x for ids, mask in parts for x in token_logprobs(model, ids).masked_fill(
        ~mask[:, 1:], 0).sum(dim=1).tolist()]) for name, model in models.items()}
    return [[own._replace(**{name: next(values) for name, values in found.items()})
             for own in group] for group in groups]


def up_to_error(question, own):
    """A Sample up to its first wrong token -> ((ids, mask), whether all of it is right)."""
    (ids, mask), rights = own.row, solutions(question)
    n_right = max(len(commonprefix([own.text, right])) for right in rights)  # a token is a byte
    end = len(ids) if own.text in rights else mask.index(True) + n_right + 1
    return (ids[:end], mask[:end]), own.text in rights


def check_loss(model, rows):
    """Of rows of up_to_error(): the probability p of a token is to be that of being right, so each
    gives -log p, and a wrong one, which is the last, -log(1 - p). arXiv:1908.04319"""
    ids, mask = pad([row for row, _ in rows])
    right = torch.tensor([right for _, right in rows])
    logprobs = token_logprobs(model, ids)                                # (B, T - 1)
    last = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)
    wrong = (mask & last & ~right[:, None])[:, 1:]
    losses = torch.where(wrong, -torch.log1p(-logprobs.exp().clamp(max=1 - 1e-6)), -logprobs)
    return masked_mean(losses, mask[:, 1:])


def verifier(model, tokenizer, asks, max_steps=CHECK_STEPS, seed=0):
    """A copy of the model that learns from its own samples where they go wrong: process supervision
    (arXiv:2305.20050). The log-probability that it gives a solution is its score."""
    groups = sample(model, tokenizer, asks, 2, 1.0, seed)
    rows = [up_to_error(question, own) for question, group in zip(asks, groups)
            for own in group]
    return learn(copy.deepcopy(model), rows, check_loss, max_steps, 0.01, seed)


# -----------------------------------------------------------------------------
# Of many samples one answer.


def majority(answers):
    """The most frequent answer, of equally frequent ones the first: majority("abcb") == "b". Self-
    consistency, arXiv:2203.11171: solutions may differ in their steps and agree in the end."""
    return Counter(answers).most_common(1)[0][0]


def weighted(answers, logprobs):
    """The answer whose samples have the largest sum of probabilities: a vote by a verifier."""
    sums = Counter()
    for answer, logprob in zip(answers, logprobs):
        sums[answer] += math.exp(logprob)
    return majority(sums)


# What is taken of the samples of a question: an answer. The checker alone has to know the sum.
PICKS = {
    "majority": lambda question, group: majority([answer_of(own.text) for own in group]),
    "likeliest": lambda question, group: answer_of(max(group, key=lambda own: own.logprob).text),
    "verifier": lambda question, group: answer_of(max(group, key=lambda own: own.score).text),
    "weighted": lambda question, group: weighted([answer_of(own.text) for own in group],
                                                 [own.score for own in group]),
    "checker": lambda question, group: next(
        (question.right for own in group if is_right(question, own.text)), ""),
}


def accuracy(pick, asks, groups, n):
    """Of a pick from n samples at a time -> (tokens written a question, share right, low, high)."""
    right = [fmean(pick(question, group[i:i + n]) == question.right
                   for i in range(0, len(group) - n + 1, n))
             for question, group in zip(asks, groups)]
    return n * fmean(own.n_tokens for group in groups for own in group), *share(right)


# -----------------------------------------------------------------------------
# Three experiments on questions that are held out.


def best_of(counts=(1, 2, 4, 8, 16), n_questions=150, max_steps=STEPS, seed=0):
    """{pick: [(tokens, share, low, high) for each count of samples]}; of "greedy" just one."""
    model, tokenizer = solver(CHAIN, max_steps, seed)
    tests = questions(n_questions, seed + 1, held_out=True)
    judge = verifier(model, tokenizer, questions(1000, seed + 2), seed=seed)
    groups = judged(sample(model, tokenizer, tests, max(counts), seed=seed),
                    logprob=model, score=judge)
    found = {name: [accuracy(pick, tests, groups, n) for n in counts]
             for name, pick in PICKS.items()}
    greedy = sample(model, tokenizer, tests, temperature=0)
    return dict(greedy=[accuracy(PICKS["majority"], tests, greedy, 1)]) | found


def chain_of_thought(n_questions=150, max_steps=STEPS, seed=0, longer=(1, 3)):
    """{"steps" | "direct" | "direct, 3x": (tokens, share, low, high)} of greedy answers. Trained as
    many steps, a model that answers at once reads as many questions, but fewer tokens of solutions;
    in three times the steps about as many. arXiv:2201.11903"""
    tests = questions(n_questions, seed + 1, held_out=True)
    runs = dict(steps=(CHAIN, max_steps)) | {
        "direct" + f", {factor}x" * (factor > 1): (DIRECT, factor * max_steps) for factor in longer}
    return {name: accuracy(PICKS["majority"], tests, sample(*solver(*run, seed), tests,
                                                            temperature=0), 1)
            for name, run in runs.items()}


def looks_again(question, draft):
    """The Question whether a draft is right: a chat of three turns."""
    return question._replace(messages=[*question.messages, dict(role="assistant", content=draft),
                                       dict(role="user", content="Check.")])


def lesson(tokenizer, question, draft, random):
    """A row [(ids, mask)] of a draft that is found "right", or "wrong" and solved anew."""
    again = f"wrong {random.choice(solutions(question))}"
    verdict = "right" if is_right(question, draft) else again
    return render(tokenizer, looks_again(question, draft).messages, verdict)


def reflecting(model, tokenizer, plain, max_steps, seed=0):
    """A copy of the model that has learned to check its own drafts; half of its rows are plain."""
    random, asks = Random(seed), questions(len(plain) // 2, seed + 2)
    drafts = [own.text for own, in sample(model, tokenizer, asks, 1, 1.0, seed)]
    rows = [lesson(tokenizer, *pair, random) for pair in zip(asks, drafts)]
    return learn(copy.deepcopy(model), rows + plain[:len(rows)], max_steps=max_steps, rate=0.01,
                 seed=seed)


def reflect(n_questions=150, max_steps=STEPS, check_steps=CHECK_STEPS, seed=0):
    """Does a second look help? -> ({what: (tokens, share, low, high)}, {"found": the share of wrong
    drafts that are called wrong, "alarms": of right drafts that are, "repaired": of the found ones
    that end right}). To beat: as much training on plain rows, "trained", and a vote of three."""
    model, tokenizer = solver(CHAIN, max_steps, seed)
    plain = solved(tokenizer, CHAIN, seed + 3, n=3000)
    looker = reflecting(model, tokenizer, plain, check_steps, seed)
    trained = learn(copy.deepcopy(model), plain, max_steps=check_steps, rate=0.01, seed=seed)
    tests = questions(n_questions, seed + 1, held_out=True)
    drafts = sample(looker, tokenizer, tests, seed=seed)
    checks = sample(looker, tokenizer, [looks_again(question, own.text) for question, (own,) in
                                        zip(tests, drafts)], seed=seed)
    final = [[check._replace(n_tokens=check.n_tokens + own.n_tokens, text=check.text
                             if check.text.startswith("wrong ") else own.text)]
             for (own,), (check,) in zip(drafts, checks)]
    rows = dict(draft=(drafts, 1), reflected=(final, 1),
                trained=(votes := sample(trained, tokenizer, tests, 3, seed=seed), 1),
                vote=(votes, 3))
    found = {name: accuracy(PICKS["majority"], tests, *row) for name, row in rows.items()}
    was, now, called = (np.array(x) for x in (
        [is_right(question, own.text) for question, (own,) in zip(tests, drafts)],
        [is_right(question, own.text) for question, (own,) in zip(tests, final)],
        [check.text.startswith("wrong") for check, in checks]))
    return found, dict(found=share(called[~was]), alarms=share(called[was]),
                       repaired=share(now[called & ~was]))


# -----------------------------------------------------------------------------
# The command.


def show(name, tokens, *share):
    print("{:12}{:8.1f} tokens  {:6.1%} right  ({:.1%} to {:.1%})".format(name, tokens, *share))


def show_best(config):
    for name, rows in best_of(n_questions=config.n, seed=config.seed).items():
        for row in rows:
            show(name, *row)


def show_chain(config):
    for name, row in chain_of_thought(config.n, seed=config.seed).items():
        show(name, *row)


def show_reflection(config):
    found, verdicts = reflect(config.n, seed=config.seed)
    for name, row in found.items():
        show(name, *row)
    for name, row in verdicts.items():
        print("{:12}{:.1%} ({:.1%} to {:.1%})".format(name, *row))


EXPERIMENTS = dict(samples=show_best, chain=show_chain, reflect=show_reflection)


@dataclass(frozen=True)
class ReasoningConfig:
    """Which experiment, and on how many questions."""
    experiment: str = option("samples", known=lambda: EXPERIMENTS, positional=True)
    n: int = option(150, "questions that are held out", low=2, below=10_001)
    seed: int = option(0, "of the model, the questions and the samples")

    __post_init__ = check_options


def main():
    config = ReasoningConfig(**parse_options(__doc__, ReasoningConfig)[0])
    EXPERIMENTS[config.experiment](config)


if __name__ == "__main__":
    run_command(main)
