"""
Sums that small models learn to solve in steps, in seconds, and samples of what they then write.

    model, tokenizer = solver()                              # 0.1M parameters
    groups = sample(model, tokenizer, questions(100, held_out=True), n=16)

A question is a sum of two numbers of three digits, such as 583+560. A solution is written in one of
two ways: "<" from the last column on with carries, ">" from the first. Training ends early: models
that are wrong at times show what more computing at test time can gain.
"""

import math
from collections import namedtuple
from functools import lru_cache
from random import Random

import numpy as np
import torch

from chapters.answers import Question, batches, pad, render, write
from chapters.rewards import asked, is_held_out
from chapters.trials import fit, new_model
from evaluate import interval
from tokenizer import Tokenizer

ROWS = 512  # texts that are written at a time
STEPS = 190  # of a solver

# -----------------------------------------------------------------------------
# Questions, solutions, and a model that learns them.


def from_last(a, b):
    """from_last(583, 560) == "<3+0+0=3,8+6+0=14,5+5+1=11 1143": the third number is the carry."""
    steps, carry = [], 0
    for x, y in zip(map(int, reversed(str(a))), map(int, reversed(str(b)))):
        steps.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return f"<{','.join(steps)} {a + b}"


def from_first(a, b):
    """from_first(583, 560) == ">5+5=10,8+6=14,3+0=3 1143"."""
    steps = [f"{x}+{y}={x + y}" for x, y in zip(map(int, str(a)), map(int, str(b)))]
    return f">{','.join(steps)} {a + b}"


def at_once(a, b):
    return str(a + b)


CHAIN, DIRECT = (from_last, from_first), (at_once,)  # the ways in which a model learns to solve


def questions(n, seed=0, held_out=False):
    """n different Questions such as "583+560"; those held out are in no training set."""
    random, found = Random(seed), {}
    while len(found) < n:
        a, b = random.randrange(100, 1000), random.randrange(100, 1000)
        if is_held_out(text := f"{a}+{b}") == held_out:
            found[text] = Question([dict(role="user", content=text)], str(a + b))
    return [*found.values()]


def solutions(question, ways=CHAIN):
    """The right solutions of a question, one in each of the ways."""
    return [way(*map(int, asked(question).split("+"))) for way in ways]


def answer_of(text):
    """What a solution comes to, its last word: answer_of("<3+4+0=7 7") == "7"."""
    return text.rpartition(" ")[2]


def is_right(question, text):
    """The true checker: it knows the sum."""
    return answer_of(text) == question.right


def chat_loss(model, rows):
    """The mean loss in nats of rows [(ids, mask)] on the tokens where their mask is True."""
    ids, mask = pad(rows)
    return model(ids[:, :-1].clamp(min=0), ids[:, 1:].masked_fill(~mask[:, 1:], -1))[1]


def learn(model, rows, loss_of=chat_loss, max_steps=STEPS, rate=0.02, seed=0):
    """Train a module on loss_of(module, 32 of the rows) a step -> the module."""
    drawn = batches(rows, 32, seed)
    return fit(model, lambda _: [next(drawn)], max_steps, loss_of=loss_of, learning_rate=rate,
               weight_decay=0.0)


def solved(tokenizer, ways, seed=0, n=10_000):
    """Rows [(ids, mask)] to learn from: questions, each solved in one of the ways."""
    random = Random(seed)
    return [render(tokenizer, question.messages, random.choice(solutions(question, ways)))
            for question in questions(n, seed)]


@lru_cache
def solver(ways=CHAIN, max_steps=STEPS, seed=0):
    """-> (a model that learned to solve sums in these ways, its tokenizer, of bytes)."""
    tokenizer = Tokenizer([])
    rows = solved(tokenizer, ways, seed)
    model = new_model(seed, vocab_size=tokenizer.n_vocab, n_head=2)
    return learn(model, rows, max_steps=max_steps, seed=seed), tokenizer


# -----------------------------------------------------------------------------
# Many samples of a question, and how many are right.

# row: (ids, mask); n_tokens: those written; logprob: the model's own, in nats; score: a verifier's.
Sample = namedtuple("Sample", "text row n_tokens logprob score", defaults=[0.0, 0.0])


def sample(model, tokenizer, asks, n=1, temperature=0.7, seed=0, max_new_tokens=48):
    """-> for each Question of asks a list of n Samples."""
    generator = torch.Generator().manual_seed(seed)
    each, found = [question for question in asks for _ in range(n)], []
    for own in (each[i:i + ROWS] for i in range(0, len(each), ROWS)):
        found += [Sample(text, row, sum(row[1])) for text, row in zip(
            *write(model, tokenizer, own, max_new_tokens, generator, temperature))]
    return [found[i:i + n] for i in range(0, len(found), n)]


def share(right):
    """-> (share, low, high): the mean of what is right of each question (N,), from 0 to 1, with its
    95% interval; of no questions (nan, 0, 1)."""
    right = np.array(right, float)
    if not len(right):
        return math.nan, 0.0, 1.0
    return interval(np.stack([right, np.ones_like(right)], axis=1))
