"""
Sums that small models learn to solve in steps, in seconds, and samples of what they then write.

    model, tokenizer = solver()                              # 0.1M parameters
    groups = sample(model, tokenizer, questions(100, held_out=True), n=16)

A question is a sum of two numbers of three digits, such as 583+560. A solution is written in one of
two ways: "<" from the last column on with carries, ">" from the first. Training ends early: models
that are wrong at times show what more computing at test time can gain.
"""

from collections import namedtuple
from functools import lru_cache
from itertools import islice
from random import Random

import numpy as np
import torch

from chapters.answers import Question, batches, pad, render, write
from chapters.rewards import asked, is_held_out
from evaluate import interval
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from train import TrainConfig, build_optimizer, clip_gradients, learning_rate, set_rate

ROWS = 512  # texts that are written at a time
SHAPE = dict(block_size=128, n_layer=2, n_head=2, n_embd=64)
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


CHAIN = from_last, from_first
DIRECT = lambda a, b: str(a + b),  # noqa: E731


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
    """Train a module by Muon on loss_of(module, 32 of the rows) a step -> the module."""
    config = TrainConfig(optimizer="muon", learning_rate=rate, max_steps=max_steps,
                         weight_decay=0.0, precision="fp32")
    optimizer = build_optimizer(model.train(), config)
    for step, batch in enumerate(islice(batches(rows, 32, seed), max_steps)):
        set_rate(optimizer, learning_rate(step, config))
        loss_of(model, batch).backward()
        clip_gradients(model, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def new_model(tokenizer, seed=0):
    """An untrained model of 0.1M parameters."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **SHAPE))


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
    return learn(new_model(tokenizer, seed), rows, max_steps=max_steps, seed=seed), tokenizer


# -----------------------------------------------------------------------------
# Many samples of a question, and which of them is taken.

# row: (ids, mask); n_tokens: those written; logprob: the model's own, in nats; score: a verifier's.
Sample = namedtuple("Sample", "text row n_tokens logprob score", defaults=[0.0, 0.0])


def sample(model, tokenizer, questions, n=1, temperature=0.7, seed=0, max_new_tokens=48):
    """-> for each question a list of n Samples."""
    generator = torch.Generator().manual_seed(seed)
    asks, found = [question for question in questions for _ in range(n)], []
    for own in (asks[i:i + ROWS] for i in range(0, len(asks), ROWS)):
        found += [Sample(text, row, sum(row[1])) for text, row in zip(
            *write(model, tokenizer, own, max_new_tokens, generator, temperature))]
    return [found[i:i + n] for i in range(0, len(found), n)]


def share(right):
    """-> (share, low, high) of what is right of each question (N,), from 0 to 1: a 95% interval."""
    right = np.array(right, float)
    return interval(np.stack([right, np.ones_like(right)], axis=1))
