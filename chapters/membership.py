"""
Membership inference: was a text trained on? What was is likelier than it would be otherwise.

    found = attack(model, members, others)       # rows, as chapters.dpsgd.text_rows() makes them
    found["loss"].auc                            # 0.5: the attack knows no more than a coin

An attack gives each text a score from the probabilities of its tokens, which many an API returns;
its ROC curve says how well the score tells members from others. chapters/memorization.py has the
command.
"""

import math
from bisect import bisect_right
from random import Random
from typing import NamedTuple

import numpy as np

from chapters.ngrams import roc_auc
from chapters.weights import load_plain
from data import check_shards, learned, read_split
from evaluate import score_ends, trained_on, wilson
from sample import pick_device

PIECE = 64  # tokens of a text whose membership is in question
LEAST = 10  # such texts, without which a curve says nothing

# -----------------------------------------------------------------------------
# Scores to a curve, its area and an interval.


class Roc(NamedTuple):
    """How well a score tells members from others, whatever its threshold."""
    points: np.ndarray  # (N, 2): false and true positive rate at each threshold, from the highest
    auc: float
    low: float          # its 95% interval
    high: float
    tpr: float          # true positive rate at a false positive rate of at most 1%


def roc(members, others):
    """The Roc of two lists of scores, members' being higher. The interval is that of as many pairs
    as the shorter list has: more is known than that, so it is rather too wide than too narrow."""
    scores = np.concatenate([members, others])
    truth = np.arange(len(scores)) < len(members)
    thresholds = np.append(np.inf, np.unique(scores)[::-1])
    rates = [(own >= thresholds[:, None]).mean(axis=1) for own in (scores[~truth], scores[truth])]
    points, auc = np.stack(rates, axis=1), roc_auc(scores, truth)
    low, high = wilson(auc, min(len(members), len(others)))
    return Roc(points, auc, low, high, float(points[points[:, 0] <= 0.01, 1].max()))


def log_probs(model, rows):
    """For each row, ids and loss mask, the log-probabilities of the tokens that are learned; of one
    that is too long for the model its beginning counts."""
    T = model.config.block_size + 1
    scored = score_ends(model, [(ids[:T], len(ids[:T]) - 1) for ids, _ in rows], "membership")
    return [own.double().numpy()[np.array(mask[1:T], bool)]
            for (own, _), (_, mask) in zip(scored, rows)]


# Scores of a text, higher for members, from its log-probabilities and those of a reference model:
# the loss (arXiv:1709.01604), the 20% least likely tokens (arXiv:2310.16789), and the ratio to what
# a model gives it that was not trained on it (arXiv:2112.03570 has this in its simplest form).
ATTACKS = {
    "loss": lambda own, reference: own.mean(),
    "min-k": lambda own, reference: np.sort(own)[:math.ceil(len(own) / 5)].mean(),
    "ratio": lambda own, reference: own.mean() - reference.mean(),
}


def attack(model, members, others, reference=None):
    """{attack: its Roc} of a model on rows that it was trained on and others; "ratio" needs the
    reference, a model with the same tokenizer."""
    own = log_probs(model, [*members, *others])
    other = log_probs(reference, [*members, *others]) if reference else own
    scores = {name: [*map(score, own, other)] for name, score in ATTACKS.items()
              if reference or name != "ratio"}
    return {name: roc(found[:len(members)], found[len(members):])
            for name, found in scores.items()}


def pieces(folder, split, tokenizer, n, seed=0):
    """Up to n rows of PIECE tokens each of a split of shards, at random, none overlapping; of chats
    the mask is what the assistant says."""
    shards = [shard[:len(shard) // PIECE * PIECE].reshape(-1, PIECE)
              for shard in read_split(folder, split)]
    ends, rows = np.cumsum([len(shard) for shard in shards]).tolist(), []
    for i in Random(seed).sample(range(ends[-1]), min(n, ends[-1])):
        k = bisect_right(ends, i)
        ids = shards[k][i - ends[k]].astype(int)  # counted from the end of its shard
        mask = learned(ids, tokenizer.special)
        rows += [(ids.tolist(), mask.tolist())] * bool(mask[1:].any())
    if len(rows) < LEAST:
        raise ValueError(f"{folder}: {split} has {len(rows)} pieces of {PIECE} tokens, membership "
                         f"needs {LEAST}: train on more text")
    return rows


def load_writer(run):
    """-> (model, tokenizer) of a run that writes text."""
    model, tokenizer = load_plain(run)
    return model.to(pick_device()), tokenizer


def run_membership(run, data=None, reference=None, n=500, seed=0):
    """attack() on the best checkpoint of a run, with n pieces of the shards that it trained on and
    n of those that validate; data is where they are, if not where its config.json says. ValueError
    if they are others."""
    (model, tokenizer), trained = load_writer(run), trained_on(run)
    if not (path := data or trained.get("path")):
        raise ValueError(f"{run}/config.json names no shards: --data=FOLDER does")
    card, other = check_shards(path), None
    if (card.fingerprint, card.tokenizer) != (
            trained.get("fingerprint", card.fingerprint), tokenizer.hash()):
        raise ValueError(f"{run} was not trained on {path}: --data=FOLDER names the shards it read")
    if reference:
        other, its_tokenizer = load_writer(reference)
        if its_tokenizer.hash() != tokenizer.hash():
            raise ValueError(f"{reference} has another tokenizer than {run}: make its shards by "
                             f"python data.py SOURCE --tokenizer={run}/tokenizer.json")
    rows = [pieces(path, split, tokenizer, n, seed) for split in ("train", "val")]
    return attack(model, *rows, other)
