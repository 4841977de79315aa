"""
Attention that costs less than T^2 on T tokens: in a sliding window, on some blocks of keys, linear.

    model.set_functions(dict(attention=linear_attention))    # of any model, before its training
    python -m chapters.longrange                             # time against length, and recall

Each takes the arguments of model.plain_attention and refuses those that it cannot honour:

    sliding_attention         equals plain_attention with a window, in O(T * window)
    block_sparse_attention    equals plain_attention with sparse_mask, in O(T)
    linear_attention          another function: kernels in the place of softmax, in O(T)

chapters/latent.py makes the cache smaller, chapters/context.py the context longer.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/longrange.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn

from chapters.trials import fit, held_out_loss, new_model, sequences, text_ids
from model import check_options, option, torch_attention
from tokenizer import parse_options, run_command


def refuse(name, **options):
    """ValueError for the first of the options of attention that is set."""
    for option, value in options.items():
        if torch.is_tensor(value) or value:
            raise ValueError(f"{name} takes no {option}: leave it out, or take torch_attention")


# -----------------------------------------------------------------------------
# Exact forms. Queries are cut into chunks of t, each with the positions of its keys; the chunks go
# through torch_attention as rows of a batch.


def attend_chunks(q, k, v, start, columns, t, window, segments, dropout):
    """Causal attention of n chunks of queries, the first from position `start` on, each to the keys
    at its own positions, columns (n, s); those below 0 are none. -> (B, H, T, D)"""
    (B, H, T, D), S, n = q.shape, k.size(2), len(columns)
    rows = torch.arange(start, start + n * t, device=q.device).view(n, t, 1)
    allowed = ((columns >= 0)[:, None] & (columns[:, None] <= rows))[None]       # (1, n, t, s)
    if window:
        allowed = allowed & (columns[:, None] > rows - window)
    index, before = columns.clamp(0, S - 1), S - T - start  # queries that only fill up a chunk
    if segments is not None:
        own = segments[:, rows.clamp(0, S - 1)]                          # (B, n, t, 1)
        allowed = allowed & (own == segments[:, index][:, :, None])      # (B, n, t, s)
    q = F.pad(q, (0, 0, before, n * t - T - before)).unflatten(2, (n, t))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k[:, :, index], v[:, :, index]))
    mask = allowed.expand(B, -1, -1, -1).flatten(0, 1)[:, None]          # (B * n, 1, t, s)
    y = torch_attention(q, k, v, causal=False, mask=mask, dropout=dropout)
    return y.view(B, n, H, t, D).transpose(1, 2).flatten(2, 3)[:, :, before:before + T]


def sliding_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """plain_attention with a window, without the scores outside it. arXiv:2004.05150"""
    refuse("sliding_attention", mask=mask, bidirectional=not causal)
    T, S = q.size(2), k.size(2)
    window = min(window or S, S)
    t = min(window, T)                   # then a chunk has at most twice as many keys as queries
    n = -(-T // t)                       # rounded up
    first = torch.arange(S - n * t, S, t, device=q.device)[:, None]      # (n, 1)
    columns = first + torch.arange(1 - window, t, device=q.device)       # (n, window + t - 1)
    return attend_chunks(q, k, v, S - n * t, columns, t, window, segments, dropout)


def key_blocks(i, n_local=2, n_random=1):
    """The blocks of keys that block i of queries attends to: the first one, n_random others, always
    the same, and the last n_local up to i itself. arXiv:2007.14062"""
    local = range(max(0, i - n_local + 1), i + 1)
    middle = range(1, local.start)
    return sorted({*range(min(1, i + 1)), *local,
                   *Random(i).sample(middle, min(n_random, len(middle)))})


def sparse_mask(T, S, block=32, **pattern):
    """The mask (T, S) with which plain_attention equals block_sparse_attention."""
    n = -(-S // block)
    table = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        table[i, key_blocks(i, **pattern)] = True
    return table.repeat_interleave(block, 0).repeat_interleave(block, 1)[S - T:S, :S]


def block_sparse_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0,
                           block=32, **pattern):
    """Attention of blocks of queries to the blocks of keys that key_blocks gives them."""
    refuse("block_sparse_attention", mask=mask, bidirectional=not causal, window=window)
    first, n = (k.size(2) - q.size(2)) // block, -(-k.size(2) // block)
    blocks = [torch.tensor(key_blocks(i, **pattern)) for i in range(first, n)]
    blocks = nn.utils.rnn.pad_sequence(blocks, True, -1).to(q.device)    # (n - first, m)
    columns = blocks[..., None] * block + torch.arange(block, device=q.device)
    columns = columns.where(blocks[..., None] >= 0, -1).flatten(1)       # (n - first, m * block)
    return attend_chunks(q, k, v, first * block, columns, block, 0, segments, dropout)


# -----------------------------------------------------------------------------
# Linear attention: weights are products of positive features instead of exponentials of products.
# The sum over keys can then be made before there is a query: a state (D, D) in the cache's place.


def feature_map(x):
    return F.elu(x) + 1


def linear_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0,
                     chunk=64):
    """sum over s <= t of f(q_t) . f(k_s) v_s, divided by the sum of these weights; f: feature_map.
    arXiv:2006.16236. chunk=1 goes from state to state as a recurrent network, chunk=T makes all
    (T, T) weights at once; in between each state is that after a chunk."""
    refuse("linear_attention", mask=mask, segments=segments, window=window, dropout=dropout)
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    v = F.pad(v, (0, 1), value=1.0)  # its column of ones adds up the weights
    q, k = feature_map(q), feature_map(k).repeat_interleave(H // K, dim=1)
    v, past = v.repeat_interleave(H // K, dim=1), max(0, S - T if causal else S)
    state = k[:, :, :past].mT @ v[:, :, :past]                           # (B, H, D, D + 1)
    if not causal:
        y = q @ state
    else:
        pieces = []
        for q, k, v in zip(*(x.split(chunk, dim=2) for x in (q, k[:, :, past:], v[:, :, past:]))):
            pieces.append(q @ state + (q @ k.mT).tril() @ v)             # (B, H, chunk, D + 1)
            state = state + k.mT @ v
        y = torch.cat(pieces, dim=2)
    return y[..., :-1] / y[..., -1:]                                     # (B, H, T, D)


# -----------------------------------------------------------------------------
# What each costs, and what it forgets.

ATTENTIONS = {"full": torch_attention, "window": sliding_attention,
              "sparse": block_sparse_attention, "linear": linear_attention}


def seconds(lengths=(256, 512, 1024, 2048), window=64, H=2, D=32, times=5):
    """{name: [median seconds of forward and backward at each length]}, measured in turns."""
    found = {name: [] for name in ATTENTIONS}
    for T in lengths:
        q, k, v = (torch.randn(1, H, T, D, requires_grad=True) for _ in range(3))
        taken = {name: [] for name in ATTENTIONS}
        for _ in range(times + 1):
            for name, attention in ATTENTIONS.items():
                start = time.perf_counter()
                y = attention(q, k, v, window=window * (name == "window"))
                torch.autograd.grad(y.sum(), (q, k, v))
                taken[name].append(time.perf_counter() - start)
        for name, own in taken.items():
            found[name].append(statistics.median(own[1:]))  # the first one may allocate
    return found


def recall_batch(generator, B=32, n_pairs=16, n_keys=64):
    """x, y (B, 4 * n_pairs): pairs of a key and a value, then each key again, in another order, and
    its value, which is the target. Multi-query associative recall, arXiv:2312.04927."""
    keys = torch.rand(B, n_keys, generator=generator).argsort(dim=1)[:, :n_pairs]
    values = torch.randint(n_keys, 2 * n_keys, (B, n_pairs), generator=generator)
    order = torch.rand(B, n_pairs, generator=generator).argsort(dim=1)
    pairs = torch.stack((keys, values), dim=-1)                          # (B, n_pairs, 2)
    asked = pairs.gather(1, order[..., None].expand(-1, -1, 2))
    x = torch.cat((pairs, asked), dim=1).flatten(1)                      # (B, 4 * n_pairs)
    y = torch.full_like(x, -1)
    y[:, 2 * n_pairs::2] = asked[..., 1]
    return x, y


@torch.no_grad()
def recall(model, draw, seed=1):
    """The share of keys in a batch whose value is the model's likeliest."""
    x, y = draw(torch.Generator().manual_seed(seed))
    return (model(x)[0].argmax(dim=-1) == y)[y >= 0].float().mean().item()


def with_attention(name, seed, **options):
    """A small model with one of ATTENTIONS; window and blocks are parts of its block_size."""
    T = options["block_size"]
    model = new_model(seed, n_hidden=64, window=T // 2 * (name == "window"), **options)
    sparse = partial(block_sparse_attention, block=T // 8)
    model.set_functions(dict(attention=sparse if name == "sparse" else ATTENTIONS[name]))
    return model


def recall_experiment(seed=0, n_steps=150, n_pairs=6, names=("full", "window", "linear")):
    """Train the same model with each attention to recall the values of keys -> {name: the share
    that it gets right}. The window holds half of a sequence."""
    found, draw = {}, partial(recall_batch, n_pairs=n_pairs, n_keys=2 * n_pairs)
    for name in names:
        model = with_attention(name, seed, block_size=4 * n_pairs, vocab_size=4 * n_pairs,
                               n_head=2, position="learned")
        found[name] = recall(fit(model, draw, n_steps, seed), partial(draw, B=256))
    return found


def text_experiment(seed=0, n_steps=150, T=128, names=ATTENTIONS):
    """Train the same model with each attention on text -> {name: held-out nats per byte}."""
    ids, found = text_ids(), {}
    for name in names:
        model = fit(with_attention(name, seed, block_size=T), sequences(ids[:-50_000], T, B=8),
                    n_steps, seed)
        found[name] = held_out_loss(model, ids[-50_000:])
    return found


@dataclass(frozen=True)
class LongRangeConfig:
    """What is measured."""
    longest: int = option(4096, "tokens, for the times, beside a half, a quarter, an eighth", 64,
                          2**16)
    window: int = option(64, "tokens that are attended to, for the times", low=1)
    n_steps: int = option(150, "of training", low=1)
    seeds: int = option(2, "how often all is trained", low=1)

    __post_init__ = check_options


def main():
    c = LongRangeConfig(**parse_options(__doc__, LongRangeConfig)[0])
    lengths, seeds = [c.longest // n for n in (8, 4, 2, 1)], range(c.seeds)
    taken = seconds(lengths, c.window)
    recalled = [recall_experiment(seed, c.n_steps, names=ATTENTIONS) for seed in seeds]
    losses = [text_experiment(seed, c.n_steps) for seed in seeds]
    print("time beside full, tokens" + "".join(f"{T:7}" for T in lengths)
          + "   recall of each seed   loss of each seed")
    for name, own in taken.items():
        print(f"{name:24}" + "".join(f"{b / a:7.2f}" for a, b in zip(taken["full"], own))
              + "   " + " ".join(f"{run[name]:9.0%}" for run in recalled)
              + "   " + " ".join(f"{run[name]:8.3f}" for run in losses))


if __name__ == "__main__":
    run_command(main)
