"""
Multi-head latent attention (arXiv:2405.04434): the cache holds one short vector a token, of which
the keys and values of all heads are made.

    use_latent(model, rank=32, n_rotary=8)       # of any model, before its training
    python -m chapters.latent                    # bytes of the cache and loss, beside other heads

A rotation by position cannot be moved from keys to queries, so it is kept apart: of each head's D
channels n_rotary rotate, and all heads share these channels of a key. The cache of a layer then
holds rank + n_rotary numbers a token instead of 2 * K * D. In each shape r = rank, R = n_rotary.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python chapters/latent.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from chapters.trials import fit, held_out_loss, new_model, sequences, text_ids
from model import Attention, Linear, RMSNorm, check_options, option, swap
from sample import new_cache
from tokenizer import parse_options, run_command


class Latent(Attention):
    """Takes the place of an Attention, of which it keeps what makes queries and outputs."""

    def __init__(self, attn, rank, n_rotary):
        nn.Module.__init__(self)
        HD, C, D = *attn.q_proj.weight.shape, attn.head_size
        if rank < 1 or not 0 <= n_rotary < D or n_rotary % 2:
            raise ValueError(f"rank={rank} must be 1 or more and n_rotary={n_rotary} even and "
                             f"below the {D} channels of a head")
        self.head_size, self.n_rotary, self.dropout = D, n_rotary, attn.dropout
        self.q_proj, self.o_proj, self.q_norm = attn.q_proj, attn.o_proj, attn.q_norm
        norms = attn.k_norm is not None
        self.kv_norm = RMSNorm(rank, eps=attn.k_norm.eps) if norms else None
        self.k_norm = RMSNorm(n_rotary, eps=attn.k_norm.eps) if norms and n_rotary else None
        self.kv_down = Linear(C, rank + n_rotary, bias=False)  # the latent, and the shared channels
        self.k_up = Linear(rank, HD // D * (D - n_rotary), bias=False)
        self.v_up = Linear(rank, HD, bias=False)
        for layer, std in ((self.kv_down, C ** -0.5), (self.k_up, rank ** -0.5), (self.v_up, 0.02)):
            nn.init.normal_(layer.weight, std=std)  # keys must not be smaller than queries
        self.to(attn.q_proj.weight.device)
        self.attention, self.rotary = attn.attention, attn.rotary

    def rotate(self, x, table):
        """x (B, T, H, R), rotated by the fastest R / 2 angles of a table (T, D / 2)."""
        if table is None or not self.n_rotary:
            return x
        return self.rotary(x, *(y[..., :self.n_rotary // 2] for y in table))

    def forward(self, x, source=None, table=None, cache=None, prefix=None, **options):
        """x (B, T, C) -> (B, T, C), as Attention's, without a source or a prefix."""
        if source is not None or prefix is not None:
            raise ValueError("latent attention takes neither a source nor a prefix")
        R, D = self.n_rotary, self.head_size
        q = self.q_proj(x).unflatten(-1, (-1, D))                        # (B, T, H, D)
        q = q if self.q_norm is None else self.q_norm(q)
        content, rotary = q.split((D - R, R), dim=-1)
        q = torch.cat((content, self.rotate(rotary, table)), dim=-1).transpose(1, 2)
        latent, k_rotary = self.kv_down(x)[:, :, None].split((self.v_up.in_features, R), dim=-1)
        latent = latent if self.kv_norm is None else self.kv_norm(latent)
        k_rotary = k_rotary if self.k_norm is None else self.k_norm(k_rotary)
        latent, k_rotary = (y.transpose(1, 2) for y in (latent, self.rotate(k_rotary, table)))
        if cache is not None:
            latent, k_rotary = self.append(cache, latent, k_rotary)      # (B, 1, S, r or R)
        options["dropout"] = self.dropout if self.training else 0.0
        attend = self.plain if x.size(1) > 1 else self.absorbed
        y = attend(q, latent, k_rotary, options)                         # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                 # (B, T, C)

    @staticmethod
    def append(cache, latent, k_rotary):
        """Add to a KVCache, whose tensors are made narrower while it is empty."""
        if not cache.length:
            cache.k, cache.v = (x.new_zeros(len(x), 1, cache.k.size(2), x.size(-1))
                                for x in (latent, k_rotary))
        return cache.append(latent, k_rotary)

    def plain(self, q, latent, k_rotary, options):
        """Attention to the keys and values of each head, made of the latent (B, 1, S, r)."""
        D, R = self.head_size, self.n_rotary
        k, v = (up(latent[:, 0]).unflatten(-1, (-1, n)).transpose(1, 2)
                for up, n in ((self.k_up, D - R), (self.v_up, D)))       # (B, H, S, D - R or D)
        k = torch.cat((k, k_rotary.expand(-1, k.size(1), -1, -1)), dim=-1)
        return self.attention(q, k, v, **options)

    def absorbed(self, q, latent, k_rotary, options):
        """plain without keys or values: q . (W c) = (W^T q) . c, so that queries go to where the
        latents are. What is cached is then both key and value of one head that all queries share:
        less work for one query, more for many."""
        (H, D), (r, R) = (q.size(1), q.size(-1)), (latent.size(-1), self.n_rotary)
        k_up, v_up = (layer.weight.view(H, -1, r).to(q.dtype) for layer in (self.k_up, self.v_up))
        q = torch.cat((q[..., :D - R] @ k_up, q[..., D - R:]), dim=-1)   # (B, H, T, r + R)
        q = q * math.sqrt((r + R) / D)  # attention divides by another root
        kv = torch.cat((latent, k_rotary), dim=-1)                       # (B, 1, S, r + R)
        return self.attention(q, kv, kv, **options)[..., :r] @ v_up.mT


def use_latent(model, rank, n_rotary):
    """Put a Latent into the place of each self-attention of a model that is to be trained then; ->
    how many."""
    return swap(model.transformer.blocks, ("attn",),
                partial(Latent, rank=rank, n_rotary=n_rotary))


@torch.no_grad()
def cache_bytes(model, n_tokens):
    """Bytes that the cache of a text of n_tokens has room for."""
    cache = new_cache(model, 1, n_tokens)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), cache=cache)
    return sum(x.nbytes for layer in cache for x in (layer.k, layer.v))


def experiment(seed=0, n_steps=150, rank=20, n_rotary=12):
    """Train models on the same batches that differ in how many numbers their caches hold -> {name:
    dict(loss: held out, in nats per byte; bytes: of the cache, for a token; parameters)}."""
    heads, ids, found = {"4 heads": 4, "2 heads": 2, "1 head": 1, "latent": 4}, text_ids(), {}
    models = {name: new_model(seed, n_kv_head=n, block_size=64) for name, n in heads.items()}
    use_latent(models["latent"], rank, n_rotary)
    for name, model in models.items():
        fit(model, sequences(ids[:-50_000], 64), n_steps, seed)
        found[name] = dict(loss=held_out_loss(model, ids[-50_000:]),
                           bytes=cache_bytes(model, 64) // 64, parameters=model.n_parameters())
    return found


@dataclass(frozen=True)
class LatentConfig:
    """What is compared."""
    rank: int = option(20, "numbers of a latent", low=1)
    n_rotary: int = option(12, "channels of a head that rotate")
    n_steps: int = option(150, "of training", low=1)
    seeds: int = option(3, "how often all is trained", low=1)

    __post_init__ = check_options


def main():
    c = LatentConfig(**parse_options(__doc__, LatentConfig)[0])
    runs = [experiment(seed, c.n_steps, c.rank, c.n_rotary) for seed in range(c.seeds)]
    print("keys and values  bytes a token  parameters  loss of each seed")
    for name, row in runs[0].items():
        losses = "  ".join(f"{run[name]['loss']:.3f}" for run in runs)
        print(f"{name:15} {row['bytes']:14,} {row['parameters']:11,}  {losses}")


if __name__ == "__main__":
    run_command(main)
