"""
A curriculum: the documents of a folder of shards, sorted from easy to hard (Bengio et al., 2009).
Easy means short, or of low loss under a model that was trained before. chapters/mix.py writes
shards in such an order, and train.py --no-shuffle reads them in it.
"""

from functools import partial

import numpy as np

from data import read_split
from evaluate import score_ends
from sample import load_run, pick_device

ORDERS = "random", "length", "loss"


def documents_of(folder, eot):
    """The documents in the training shards of a folder: arrays of ids, cut before each eot."""
    shards = map(np.asarray, read_split(folder))
    return [ids for shard in shards for ids in np.split(shard, np.flatnonzero(shard == eot))
            if len(ids)]


def mean_losses(model, documents):
    """The model's mean loss in nats on each document, of a long one on what fits its context."""
    T = model.config.block_size
    rows = [(ids[:T + 1].astype(int), min(T, len(ids) - 1)) for ids in documents if len(ids) > 1]
    scored = iter(score_ends(model, rows, "loss of documents"))
    return [-next(scored)[0].mean().item() if len(ids) > 1 else 0.0 for ids in documents]


def from_easy_to_hard(documents, difficulty, n_tokens, seed):
    """Yield documents of n_tokens in all, or a little more: in each epoch every document, sorted by
    difficulty, and in the last, if fewer tokens are left, a random choice of them, sorted, too."""
    sizes, random = np.array([*map(len, documents)]), np.random.RandomState(seed)
    rank = np.argsort(difficulty, kind="stable")
    while n_tokens > 0:
        order = random.permutation(len(documents))
        n_needed = np.searchsorted(sizes[order].cumsum(), n_tokens) + 1
        is_chosen = np.isin(np.arange(len(documents)), order[:n_needed])
        yield from (documents[i] for i in rank[is_chosen[rank]])
        n_tokens -= sizes[is_chosen].sum()


def pack(documents, block_size):
    """Yield the documents, one after the other, cut into sequences of block_size ids."""
    rest = np.empty(0, int)
    for ids in documents:
        rest = np.concatenate([rest, ids])
        end = len(rest) // block_size * block_size
        yield from rest[:end].reshape(-1, block_size)
        rest = rest[end:]


def difficulty_by(order, run, tokenizer):
    """A function from documents to the difficulty of each: its length, or a run's mean loss on it;
    None for a random order."""
    if order != "loss":
        return dict(random=None, length=lambda documents: [*map(len, documents)])[order]
    if not run:
        raise ValueError("--order=loss needs --run=RUN, whose model's loss it is")
    model, own = load_run(run, device=pick_device())
    if own.hash() != tokenizer.hash():
        raise ValueError(f"{run} has another tokenizer than the shards: its model cannot read them")
    return partial(mean_losses, model)
