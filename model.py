"""
The model: token ids in, logits or loss out. One block for three families (decoder, encoder, and
both together), its costly parts each written twice: once to be read, once to be fast.

    config = GPTConfig(architecture="modern", vocab_size=4096, **SIZES["mini"])
    logits, _ = GPT(config)(ids)                 # (B, T) -> (B, T, V)
    _, loss = GPT(config)(ids, targets)          # (B, T), (B, T) -> a scalar

Shapes, here and in every other file:

    B  sequences in a batch          H  query heads (n_head)
    T  tokens in a sequence          K  key/value heads (n_kv_head); each serves H/K query heads
    S  tokens attended to            D  channels in one head (C = H * D)
    C  channels (n_embd)             V  vocabulary (vocab_size)
"""

import ctypes
import difflib
import json
import math
import os
import pickletools
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial, reduce, wraps
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FORMAT = "gpt-checkpoint-2"  # written into each checkpoint; another format is refused by name

# One architecture is one row of options; `sharing` query heads share a key/value head.
GPT2 = dict(position="learned", norm="layernorm", norm_first=True, activation="gelu", bias=True,
            qk_norm=False, zero_init=False, causal=True, cross=False, tied=True, sharing=1)
ARCHITECTURES = {
    "gpt2": GPT2,
    "modern": GPT2 | dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False,
                          qk_norm=True, zero_init=True, tied=False, sharing=2),
    "bert": GPT2 | dict(norm_first=False, causal=False),              # arXiv:1810.04805
    "transformer": GPT2 | dict(position="sinusoidal", norm_first=False, activation="relu",
                               cross=True),                           # arXiv:1706.03762
}

# Parameters with a vocabulary of 262, bytes and special tokens (modern), for the first; of 4,096
# for the next four; of 50,257 (gpt2) for the rest.
SIZES = {
    "nano": dict(n_layer=3, n_head=2, n_embd=96, block_size=128),              # 0.4M
    "tiny": dict(n_layer=2, n_head=2, n_embd=128, block_size=256),             # 1.4M
    "mini": dict(n_layer=4, n_head=4, n_embd=256, block_size=256),             # 5M
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=512),            # 13M
    "base": dict(n_layer=8, n_head=8, n_embd=512, block_size=512),             # 28M
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),          # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),   # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),      # 1558M
}


KINDS = {int: (int, "a whole number below 2^31"), float: (int | float, "a number below 2^31"),
         str: (str, "a word"), str | None: (str | None, "a word or None"),
         bool | None: (bool | None, "True, False or None")}  # of a config's fields


def check_known(name, known, what):
    """Raise ValueError unless name is one of the known; it names the nearest of them."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise ValueError(f"unknown {what} {name!r}: {hint}")


@dataclass
class GPTConfig:
    """The shape of a model. What is left None or 0 is filled in from the architecture's row."""
    architecture: str = "modern"    # gpt2 | modern | bert | transformer
    vocab_size: int = 50257
    block_size: int = 1024          # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0              # key/value heads; 0: the architecture's share of n_head
    n_embd: int = 768
    n_encoder_layer: int = 0        # blocks that read a source, where cross; 0: as many as n_layer
    n_classes: int = 0              # 0: tokens; 1: one number per text; more: a class per text
    window: int = 0                 # a token sees this many, itself the last; 0: all
    softcap: float = 0.0            # logits stay between -softcap and softcap; 0: free
    dropout: float = 0.0            # share of activations dropped, while training
    label_smoothing: float = 0.0    # chance that the loss gives to all tokens alike, while training
    z_loss: float = 0.0             # weight of log(sum(exp(logits)))^2 in the loss, while training
    position: str | None = None     # learned | sinusoidal | rope | none
    norm: str | None = None         # layernorm | rmsnorm
    norm_first: bool | None = None  # normalise what goes into attention and MLP, or what comes out
    activation: str | None = None   # gelu | relu | relu2 | swiglu
    bias: bool | None = None        # in linear layers and LayerNorm
    qk_norm: bool | None = None     # normalise queries and keys
    zero_init: bool | None = None   # blocks begin as no change: what they write starts at zero
    causal: bool | None = None      # a token sees what came before it, not what follows
    cross: bool | None = None       # an encoder reads a source, each block looks at what it made
    tied: bool | None = None        # the head shares the embedding's matrix
    rope_theta: float = 10000.0

    def __post_init__(self):
        for f in fields(self):
            value, (kind, words) = getattr(self, f.name), KINDS[f.type]
            is_number = f.type in (int, float)
            if (not isinstance(value, kind) or is_number and isinstance(value, bool)
                    or is_number and not abs(value) < 2**31):  # as nan is not, either
                raise ValueError(f"{f.name}={value!r:.40} must be {words}")
        check_known(self.architecture, ARCHITECTURES, "architecture")
        row = dict(ARCHITECTURES[self.architecture])
        sharing = row.pop("sharing")
        for name, value in row.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.n_kv_head = self.n_kv_head or self.n_head // math.gcd(self.n_head, sharing)
        self.n_encoder_layer = self.cross and (self.n_encoder_layer or self.n_layer) or 0
        for name in ("n_kv_head", "n_encoder_layer", "n_classes", "window", "softcap", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"n_embd / n_head = {self.head_size} must be even: rope turns pairs")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        check_known(self.position, POSITIONS, "position")
        check_known(self.norm, NORMS, "norm")
        check_known(self.activation, ACTIVATIONS, "activation")

    @property
    def head_size(self):
        return self.n_embd // self.n_head


# -----------------------------------------------------------------------------
# Attention, three times: written out, in tiles, and torch's own. Same arguments, same result:
#
#   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D); the queries are the last T of S positions
#   causal     a query sees the keys up to its own position
#   window     and of these only the last `window`; 0: all
#   mask       bool, broadcastable to (B, H, T, S), True where a query may look
#   segments   whole numbers (B, S): tokens see only those with their own number, as for documents
#              in a packed block, or text apart from padding
#   dropout    share of the weights dropped
#
# A query that may look nowhere gets zeros.


def once(backward):
    """Refuse gradients of gradients, which a backward written by hand does not have."""
    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():  # as it is when create_graph=True asks for them
            raise RuntimeError("fused kernels cannot be differentiated twice: use kernels='plain'")
        return backward(ctx, *gradients)
    return checked


def allowed(T, S, rows, columns, device, causal, window, mask, segments):
    """Where the queries in `rows` may look in `columns`, as bool (B or 1, H or 1, rows, columns);
    None where all may look everywhere."""
    at = torch.arange(S - T + rows.start, S - T + rows.stop, device=device)[:, None]
    keys = torch.arange(columns.start, columns.stop, device=device)
    rules = []
    if causal and columns.stop > S - T + rows.start + 1:
        rules.append(keys <= at)
    if window and columns.start <= S - T + rows.stop - 1 - window:
        rules.append(keys > at - window)
    if mask is not None:
        rules.append(mask.expand(*mask.shape[:-2], T, S)[..., rows, columns])
    if segments is not None:
        own = segments[:, S - T + rows.start:S - T + rows.stop]
        rules.append((own[:, :, None] == segments[:, None, columns])[:, None])
    return reduce(torch.logical_and, rules) if rules else None


def kept(seed, shape, rows, columns, S, device, dropout):
    """Which weights dropout keeps, scaled so that their mean stays: (B, H, rows, columns). The
    choice depends on seed and place alone, so that tiles can be made one by one, and again."""
    B, H, T = shape
    places = torch.arange(B * H, device=device).view(B, H, 1, 1) * T
    places = (places + torch.arange(rows.start, rows.stop, device=device)[:, None]) * S
    x = places + torch.arange(columns.start, columns.stop, device=device) + seed
    for _ in range(2):  # mix the bits: splitmix's multiply and shift
        x = (x ^ x >> 31) * 0x2545F4914F6CDD1D
        x = (x ^ x >> 29) * 0x369DEA0F31A53F85
    return ((x >> 33) % 2**24 >= dropout * 2**24) / (1 - dropout)


def new_seed(dropout):
    return torch.randint(2**62, ()).item() if dropout else 0


def plain_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v. arXiv:1706.03762"""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))          # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)                      # (B, H, T, S)
    all_of = slice(0, T), slice(0, S)
    seen = allowed(T, S, *all_of, q.device, causal, window, mask, segments)
    if seen is None:
        weights = F.softmax(scores, dim=-1)
    else:  # the second fill is for rows of which nothing is left
        weights = F.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).masked_fill(~seen, 0)
    if dropout:
        weights = weights * kept(new_seed(dropout), (B, H, T), *all_of, S, q.device, dropout)
    return weights.to(v.dtype) @ v                                       # (B, H, T, D)


def wide(dtype):
    """The dtype that sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def add_product(total, a, b):
    """total += a @ b, batch by batch; without a product of its own where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


QUERY_TILE, KEY_TILE = 128, 256  # the scores of one pair of tiles stay in the processor's cache


def tiles(T, S, causal=True, window=0):
    """For each tile of queries the tiles of keys in which something may be seen:
    tiles(2, 3) yields (slice(0, 2), [slice(0, 3)])."""
    for t in range(0, T, QUERY_TILE):
        rows = slice(t, min(t + QUERY_TILE, T))
        start = max(0, S - T + rows.start - window + 1) // KEY_TILE * KEY_TILE if window else 0
        stop = S - T + rows.stop if causal else S
        yield rows, [slice(s, min(s + KEY_TILE, stop)) for s in range(start, stop, KEY_TILE)]


class FusedAttention(torch.autograd.Function):
    """Attention without the (T, S) scores: tiles, an online softmax, and scores made again in
    backward (arXiv:2205.14135). Query heads that share a key head are rows of one matrix."""

    @staticmethod
    def fold(x, K, rows):
        """(B, H, T, D) at the rows of one tile -> (B*K, H/K * t, D)"""
        return x[:, :, rows].reshape(x.size(0) * K, -1, x.size(-1))

    @staticmethod
    def scores(q, k, shape, rows, columns, rules):
        """One tile of q k^T, (B*K, H/K * t, s), -inf where a query may not look."""
        B, H, T, S = shape
        scores = torch.bmm(q, k[:, columns].transpose(1, 2)).to(wide(q.dtype))
        seen = allowed(T, S, rows, columns, q.device, *rules)
        if seen is not None:
            hidden = torch.zeros(seen.shape, dtype=scores.dtype, device=q.device)
            hidden.masked_fill_(~seen, -torch.inf)
            scores.view(B, H, -1, scores.size(-1)).add_(hidden)
        return scores

    @staticmethod
    def forward(ctx, q, k, v, seed, dropout, *rules):
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        q, shape = q / math.sqrt(D), (B, H, T, S)
        k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
        out = torch.empty_like(q)
        logsumexp = q.new_empty(B, H, T, 1, dtype=wide(q.dtype))
        for rows, keys in tiles(T, S, *rules[:2]):
            tile = FusedAttention.fold(q, K, rows)
            # below every score, yet finite: where nothing may be seen, exp(-inf - highest) is 0
            highest = tile.new_full((*tile.shape[:2], 1), -1e30, dtype=logsumexp.dtype)
            total, mixed = torch.zeros_like(highest), torch.zeros_like(tile, dtype=highest.dtype)
            for n, columns in enumerate(keys):
                scores = FusedAttention.scores(tile, k, shape, rows, columns, rules)
                higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
                weights = scores.sub_(higher).exp_()
                shrink = (highest - higher).exp_()  # the sums so far were relative to a lower one
                total = total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
                if dropout:
                    drop = kept(seed, (B, H, T), rows, columns, S, q.device, dropout)
                    weights.mul_(drop.view_as(weights))
                seen = torch.bmm(weights.to(v.dtype), v[:, columns])
                mixed = mixed.mul_(shrink).add_(seen) if n else seen.to(mixed.dtype)
                highest = higher
            total.clamp_(min=1e-30)
            out[:, :, rows] = mixed.div_(total).view(B, H, -1, D)
            logsumexp[:, :, rows] = (highest + total.log()).view(B, H, -1, 1)
        mask, segments = rules[2:]
        ctx.save_for_backward(q, k, v, out, logsumexp, mask, segments)
        ctx.options = seed, dropout, rules[:2]
        return out

    @staticmethod
    @once
    def backward(ctx, d_out):
        q, k, v, out, logsumexp, *masks = ctx.saved_tensors
        seed, dropout, (causal, window) = ctx.options
        (B, H, T, D), (BK, S) = q.shape, k.shape[:2]
        K, shape, rules, fold = BK // B, (B, H, T, S), (causal, window, *masks), FusedAttention.fold
        delta = (d_out * out).sum(dim=-1, keepdim=True)                          # (B, H, T, 1)
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=logsumexp.dtype) for x in (k, v))
        for rows, keys in tiles(T, S, causal, window):
            tile, d_tile = fold(q, K, rows), fold(d_out, K, rows)
            highest, d_q_tile = fold(logsumexp, K, rows), torch.zeros_like(tile)
            for columns in keys:
                scores = FusedAttention.scores(tile, k, shape, rows, columns, rules)
                weights = scores.sub_(highest).exp_().to(q.dtype)
                d_weights = torch.bmm(d_tile, v[:, columns].transpose(1, 2))
                used = weights
                if dropout:
                    drop = kept(seed, (B, H, T), rows, columns, S, q.device, dropout)
                    drop = drop.view_as(weights).to(q.dtype)
                    used, d_weights = weights * drop, d_weights.mul_(drop)
                add_product(d_v[:, columns], used.transpose(1, 2), d_tile)
                d_scores = d_weights.sub_(fold(delta, K, rows)).mul_(weights)
                add_product(d_q_tile, d_scores, k[:, columns])
                add_product(d_k[:, columns], d_scores.transpose(1, 2), tile)
            d_q[:, :, rows] = d_q_tile.mul_(1 / math.sqrt(D)).view(B, H, -1, D)
        d_k, d_v = (x.view(B, K, S, D).to(k.dtype) for x in (d_k, d_v))
        return d_q, d_k, d_v, None, None, None, None, None, None


@lru_cache(maxsize=None)
def cpu_multiplies(dtype):
    """Whether this CPU has units for products in dtype; without them float32 is far faster."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return dtype in (torch.float32, torch.float64)
    units = torch.ops.mkldnn
    return (units._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else
            units._is_mkldnn_fp16_supported())


def fused_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """plain_attention without ever storing the (T, S) scores."""
    rules = causal, window, mask, segments
    if q.size(2) == 1:  # a single row of scores: nothing to tile
        return plain_attention(q, k, v, *rules, dropout)
    if q.device.type == "cpu" and not cpu_multiplies(q.dtype):
        return fused_attention(q.float(), k.float(), v.float(), *rules, dropout).to(q.dtype)
    return FusedAttention.apply(q, k, v, new_seed(dropout), dropout, *rules)


def torch_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """plain_attention by torch's own kernel: on a GPU the fastest there is without a compiler. With
    dropout it draws other weights to drop."""
    T, S = q.size(2), k.size(2)
    simple = not (window and window < S) and mask is segments is None
    simple = simple and (not causal or T in (1, S))  # a single query is the last, and sees all
    seen = None if simple else allowed(T, S, slice(0, T), slice(0, S), q.device, causal, window,
                                       mask, segments)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=simple and causal and T > 1,
        enable_gqa=q.size(1) != k.size(1))


# -----------------------------------------------------------------------------
# The loss, twice: all logits at once, and a slice of tokens at a time.


def cap(logits, softcap):
    """Logits bent to stay between -softcap and softcap; 0 leaves them. arXiv:2408.00118"""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def plain_loss(x, weight, targets, softcap=0.0, smoothing=0.0, z_loss=0.0):
    """Mean cross-entropy in nats of the logits x (N, C) @ weight (V, C)^T against targets (N,),
    -1 ignored. smoothing gives all tokens a share of the target (arXiv:1512.00567), z_loss weighs
    log(sum(exp(logits)))^2 (arXiv:2204.02311)."""
    logits = F.linear(x, weight.to(x.dtype)).to(wide(x.dtype))           # (N, V)
    logits, wanted = cap(logits, softcap), targets != -1
    target = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    total = logits.logsumexp(dim=1)
    losses = total - (1 - smoothing) * target + z_loss * total.square()
    if smoothing:
        losses = losses - smoothing * logits.mean(dim=1)
    return (losses * wanted).sum() / wanted.sum().clamp(min=1)


LOSS_TILE = 2**23  # logits that are held at once


def loss_part(x, low, targets, softcap, smoothing, z_loss, learn):
    """x (N, C), low (V, C), targets (N,) -> (the sum of the losses, and if learn its gradient by
    the logits (N, V), else None)"""
    wanted, target = (targets != -1)[:, None], targets[:, None].clamp(min=0)
    logits = cap(F.linear(x, low).to(wide(x.dtype)), softcap)            # (N, V)
    losses = -(1 - smoothing) * logits.gather(1, target)
    if smoothing:
        losses -= smoothing * logits.mean(dim=1, keepdim=True)
    slope = wanted * (1 - (logits / softcap).square()) if softcap and learn else wanted
    highest = logits.amax(dim=1, keepdim=True)
    powers = logits.sub_(highest).exp_()  # from here on all happens in the logits' place
    sums = powers.sum(dim=1, keepdim=True)
    logsumexp = sums.log() + highest
    losses += logsumexp + z_loss * logsumexp.square()
    loss = (losses * wanted).sum()
    if not learn:
        return loss, None
    # d loss / d logits = softmax(logits) - one-hot(target), which smoothing spreads
    d_logits = powers.mul_((1 + 2 * z_loss * logsumexp) / sums)
    if smoothing:
        d_logits -= smoothing / len(low)
    d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, smoothing - 1))
    return loss, d_logits.mul_(slope).to(x.dtype)


class FusedLoss(torch.autograd.Function):
    """Logits, loss and gradients of some tokens, then of the next: (N, V) is never stored. The
    gradients are made in forward, where the logits are; backward scales them by what comes in."""

    @staticmethod
    def compute(x, weight, targets, part, *options, learn):
        """-> (sum of losses, its gradients by x and weight, or None unless learn)"""
        low, (N, V) = weight.to(x.dtype), (len(x), len(weight))
        total = torch.zeros((), dtype=wide(x.dtype), device=x.device)
        d_x, d_weight = (torch.empty_like(y) if learn else None for y in (x, weight))
        tile = LOSS_TILE if x.device.type == "cpu" else 32 * LOSS_TILE  # GPUs want large products
        step = max(1, min(N, tile // V))
        for start in range(0, N, step):
            rows = slice(start, start + step)
            loss, d_logits = part(x[rows], low, targets[rows], *options, learn)
            total += loss
            if not learn:
                continue
            torch.mm(d_logits, low, out=d_x[rows])
            if d_weight.dtype == x.dtype:  # beta=0: what is there before the first does not count
                d_weight.addmm_(d_logits.T, x[rows], beta=min(start, 1))
            elif start == 0:
                d_weight.copy_(d_logits.T @ x[rows])
            else:
                d_weight += d_logits.T @ x[rows]
        return total, d_x, d_weight

    @staticmethod
    def forward(ctx, x, weight, targets, *options):
        total, *ctx.gradients = FusedLoss.compute(x, weight, targets, *options,
                                                  learn=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, weight, targets)
        ctx.options, ctx.count = options, (targets != -1).sum().clamp(min=1)
        return total / ctx.count

    @staticmethod
    @once
    def backward(ctx, d_loss):
        if ctx.gradients is None:  # given away by an earlier backward
            _, *ctx.gradients = FusedLoss.compute(*ctx.saved_tensors, *ctx.options, learn=True)
        (d_x, d_weight), ctx.gradients = ctx.gradients, None
        share = d_loss / ctx.count  # not earlier: a gradient of 1 / count is too small for float16
        return d_x.mul_(share), d_weight.mul_(share), *[None] * 5


def fused_loss(x, weight, targets, softcap=0.0, smoothing=0.0, z_loss=0.0):
    """plain_loss without ever storing the (N, V) logits."""
    return FusedLoss.apply(x, weight, targets, loss_part, softcap, smoothing, z_loss)


# -----------------------------------------------------------------------------
# Norms, twice: as formulas, and with backward by hand. LayerNorm is RMSNorm that also centers.


def plain_norm(x, weight, bias=None, residual=None, center=False, eps=1e-6):
    """-> (x + residual, its norm over the last dimension (..., C)): the sum divided by the root of
    its mean square, times weight (RMSNorm, arXiv:1910.07467); center takes the mean away first and
    may have a bias (LayerNorm, arXiv:1607.06450)."""
    x = x if residual is None else x + residual
    unit = x.to(wide(x.dtype))
    if center:
        unit = unit - unit.mean(dim=-1, keepdim=True)
    unit = unit * (unit.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = unit.to(x.dtype) * weight.to(x.dtype)
    return x, y if bias is None else y + bias.to(x.dtype)


def scales(x, eps):
    """1 / root mean square over the last dimension of x (..., C), as (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return (length.square_() / x.size(-1)).add_(eps).rsqrt_().to(x.dtype)


def norm_backward(d_unit, unit, scale):
    """The gradient of x, where unit = x * scale: what points along x would only lengthen it, and
    the norm takes lengths away. d_unit (..., C) is overwritten."""
    along = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1) / unit.size(-1)      # (..., 1)
    return d_unit.addcmul_(unit, along, value=-1).mul_(scale)


def as_type(x, dtype):
    """x, or None, in a dtype: asking costs a fifth of a .to() that changes nothing, and to write a
    token takes a hundred of them."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


class FusedRMSNorm(torch.autograd.Function):
    """Saves the sum alone, which the residual stream holds anyway, and a number for each token."""

    @staticmethod
    def forward(ctx, x, weight, residual, eps):
        x = x if residual is None else x + residual
        scale = scales(x, eps)
        ctx.save_for_backward(x, weight, scale)
        y = (x * scale).mul_(weight.to(x.dtype))
        return y if residual is None else (x, y)

    @staticmethod
    @once
    def backward(ctx, *gradients):
        x, weight, scale = ctx.saved_tensors
        *d_sum, d_y = gradients
        unit = x * scale
        d_weight = (d_y * unit).flatten(0, -2).sum(dim=0, dtype=weight.dtype)
        d_x = norm_backward(d_y * weight.to(d_y.dtype), unit, scale)
        d_x = d_x.add_(d_sum[0]) if d_sum else d_x
        return d_x, d_weight, d_x if d_sum else None, None


class FusedLayerNorm(torch.autograd.Function):
    """The same; what LayerNorm does to the sum is left to torch's own kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        x = x if residual is None else x + residual
        low = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
        y, mean, scale = torch.native_layer_norm(x, weight.shape, *low, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y if residual is None else (x, y)

    @staticmethod
    @once
    def backward(ctx, *gradients):
        x, weight, bias, mean, scale = ctx.saved_tensors
        *d_sum, d_y = gradients
        low = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_y.contiguous(), x, weight.shape, mean, scale, *low, [True, True, bias is not None])
        d_weight, d_bias = (p if p is None else p.to(weight.dtype) for p in (d_weight, d_bias))
        d_x = d_x.add_(d_sum[0]) if d_sum else d_x
        return d_x, d_weight, d_bias, d_x if d_sum else None, None


def fused_norm(x, weight, bias=None, residual=None, center=False, eps=1e-6):
    """plain_norm in fewer passes over memory, keeping less of it."""
    if not torch.is_grad_enabled():  # nothing to keep at all
        x = x if residual is None else x + residual
        weight, bias = as_type(weight, x.dtype), as_type(bias, x.dtype)
        return x, (F.layer_norm(x, weight.shape, weight, bias, eps) if center else
                   F.rms_norm(x, weight.shape, weight, eps))
    norm = FusedLayerNorm.apply if center else FusedRMSNorm.apply
    inputs = (x, weight, bias, residual, eps) if center else (x, weight, residual, eps)
    return (x, norm(*inputs)) if residual is None else norm(*inputs)


# -----------------------------------------------------------------------------
# Rotary positions on normalised queries and keys, twice.


def rotary_table(config, positions):
    """Cosines and sines of the angles by which positions (..., T) are turned, each (..., T, D/2);
    channel pair j turns by theta^(-2j/D) a token. arXiv:2104.09864"""
    half = torch.arange(config.head_size // 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None] * config.rope_theta ** (-2 * half / config.head_size)
    return angles.cos(), angles.sin()


def plain_rotary(x, cos, sin, weight=None, eps=1e-6):
    """Turn each pair of channels (j, j + D/2) of x (B, T, H, D) by its position's angle, cos and
    sin (T, D/2) or (B, T, D/2); before that RMSNorm x, if a weight (D,) is given."""
    if weight is not None:
        _, x = plain_norm(x, weight, eps=eps)
    a, b = x.chunk(2, dim=-1)
    cos, sin = (y.unsqueeze(-2).to(x.dtype) for y in (cos, sin))         # (..., T, 1, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class FusedRotary(torch.autograd.Function):
    """Two passes forward, and x saved alone: the norm's weight is folded into the table of angles,
    and backward turns the gradient back by the same angles."""

    @staticmethod
    def turn(x, cos, sin, out):
        """out = x turned; cos and sin are pairs, for the first and the second half of x."""
        (a, b), (c, d) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(a, cos[0], out=c).addcmul_(b, sin[1], value=-1)
        torch.mul(b, cos[1], out=d).addcmul_(a, sin[0])
        return out

    @staticmethod
    def forward(ctx, x, cos, sin, weight, eps):
        cos, sin = (y.unsqueeze(-2).to(x.dtype) for y in (cos, sin))     # (..., T, 1, D/2)
        halves, unit, scale = (1, 1), x, None
        if weight is not None:
            scale, halves = scales(x, eps), weight.to(x.dtype).chunk(2)
            unit = x * scale
        ctx.save_for_backward(x, cos, sin, weight, scale)
        table = [[y * half for half in halves] for y in (cos, sin)]
        return FusedRotary.turn(unit, *table, torch.empty_like(x))

    @staticmethod
    @once
    def backward(ctx, d_y):
        x, cos, sin, weight, scale = ctx.saved_tensors
        d_x = FusedRotary.turn(d_y, (cos, cos), (-sin, -sin), torch.empty_like(x))
        if weight is None:
            return d_x, None, None, None, None
        unit = x * scale
        d_weight = (d_x * unit).flatten(0, -2).sum(dim=0, dtype=weight.dtype)
        d_x = norm_backward(d_x.mul_(weight.to(x.dtype)), unit, scale)
        return d_x, None, None, d_weight, None


def fused_rotary(x, cos, sin, weight=None, eps=1e-6):
    """plain_rotary in fewer passes over memory."""
    return FusedRotary.apply(x, cos, sin, weight, eps)


# -----------------------------------------------------------------------------
# The MLP's bend and the product after it, twice. ACTIVATIONS: value, gradient by what came in.

gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "gelu": (gelu, partial(torch.ops.aten.gelu_backward, approximate="tanh")),   # arXiv:1606.08415
    "relu": (F.relu, lambda d_y, x: d_y * (x > 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda d_y, x: 2 * d_y * F.relu(x)),  # arXiv:2109.08668
    "swiglu": (F.silu, torch.ops.aten.silu_backward),                            # arXiv:2002.05202
}


def linear(x, weight, bias=None):
    """x (..., C) times weight (F, C), plus bias (F,), in x's dtype -> (..., F). To write a few rows
    a CPU spends its time reading weights: on the left of the product they are read in order."""
    weight, bias = as_type(weight, x.dtype), as_type(bias, x.dtype)
    rows = x.numel() // x.size(-1)
    if (torch.is_grad_enabled() or not 1 < rows <= 16 or x.device.type != "cpu"
            or x.dtype != torch.float32):
        return F.linear(x, weight, bias)
    y = weight @ x.reshape(rows, -1).T                                   # (F, rows)
    y = y if bias is None else y + bias[:, None]
    return y.T.reshape(*x.shape[:-1], -1)


def plain_bend(x, gate, weight, bias, activation):
    """The activation of x (..., F), or x times the activation of its gate (..., F) if that is not
    None; then the linear layer weight (C, F), bias (C,) or None -> (..., C)."""
    bend, _ = ACTIVATIONS[activation]
    x = bend(x) if gate is None else x * bend(gate)
    return linear(x, weight, bias)


class FusedBend(torch.autograd.Function):
    """Saves what comes in alone: the bend is cheap to make again, and F is the widest there is."""

    @staticmethod
    def forward(ctx, x, gate, weight, bias, activation):
        ctx.save_for_backward(x, gate, weight, bias)
        ctx.activation = activation
        return plain_bend(x, gate, weight, bias, activation)

    @staticmethod
    @once
    def backward(ctx, d_y):
        x, gate, weight, bias = ctx.saved_tensors
        bend, slope = ACTIVATIONS[ctx.activation]
        d_hidden = d_y @ weight.to(d_y.dtype)
        bent = bend(x if gate is None else gate)
        hidden = bent if gate is None else x * bent
        d_weight = (d_y.flatten(0, -2).T @ hidden.flatten(0, -2)).to(weight.dtype)
        d_bias = None if bias is None else d_y.flatten(0, -2).sum(dim=0, dtype=bias.dtype)
        if gate is None:
            return slope(d_hidden, x), None, d_weight, d_bias, None
        d_gate = slope(torch.mul(d_hidden, x, out=hidden), gate)
        return d_hidden.mul_(bent), d_gate, d_weight, d_bias, None


def fused_bend(x, gate, weight, bias, activation):
    """plain_bend with nothing stored between the two."""
    bend = FusedBend.apply if torch.is_grad_enabled() else plain_bend
    return bend(x, gate, weight, bias, activation)


# -----------------------------------------------------------------------------
# Norm, rotary and loss once more, in CUDA C: between torch's matrix products each number is read
# and written about once. NVRTC, which torch brings along, compiles the kernels when first used.

CUDA_NUMBERS = {  # what a tensor holds; every sum is kept in float
    torch.float32: """
typedef float Number;
__device__ float widen(Number x) { return x; }
__device__ void narrow(float x, Number& y) { y = x; }""",
    torch.bfloat16: """
struct Number { unsigned short bits; };  // the upper half of a float
__device__ float widen(Number x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void narrow(float x, Number& y) {  // to the nearest, of two to the even one
    unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}""",
    torch.float16: """
struct Number { unsigned short bits; };
__device__ float widen(Number x) {
    float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y;
}
__device__ void narrow(float x, Number& y) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}"""}
CUDA_SOURCE = r"""
typedef long long Int;  // offsets can exceed 2^31
extern __shared__ float shared[];  // the first 32 belong to over()
#define MINE(n) for (Int i = threadIdx.x; i < (n); i += blockDim.x)  // this thread's part of a row

// The sum of x over the threads of the block, or the largest; all get it.
__device__ float over_block(float x, bool largest = false) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int again = 1; again >= 0; again--) {
        for (int step = 16; step; step /= 2) {
            const float other = __shfl_xor_sync(~0u, x, step);
            x = largest ? fmaxf(x, other) : x + other;
        }
        if (!again) break;
        __syncthreads();  // all have read what the last call left
        if (lane == 0) shared[threadIdx.x / 32] = x;
        __syncthreads();
        x = lane < warps ? shared[lane] : largest ? -3e38f : 0;
    }
    return x;
}

// x(i) turned by the angles of row n, if there are any: its partner is half a row away.
#define ANGLES const float *cos, const float *sin, Int heads, Int positions
template <class X> __device__ float turned(X x, Int i, Int n, Int C, int way, ANGLES) {
    if (!cos) return x(i);
    const Int half = C / 2, angles = (unsigned)n / (unsigned)heads % (unsigned)positions * half;
    const Int at = angles + (i < half ? i : i - half);  // no 64-bit division: it is slow
    return x(i) * cos[at] + way * (i < half ? -x(i + half) : x(i - half)) * sin[at];
}

// A block for each row n: sum = x + residual, y = its norm, turned. stats: its mean and scale.
extern "C" __global__ void norm_forward(const Number* x, const Number* residual,
        const float* weight, const float* bias, Number* sum, Number* y, float* stats, Int C,
        Int center, float eps, ANGLES) {
    const Int n = blockIdx.x;
    x += n * C, residual += n * C, sum += n * C, y += n * C;
    float total = 0, mean = 0, scale = 1;
    MINE(C) {
        if (sum != x) narrow(widen(x[i]) + widen(residual[i]), sum[i]);
        total += widen(sum[i]);
    }
    if (center) mean = over_block(total) / C;  // not E[x^2] - E[x]^2: few digits would be left
    if (weight) {
        total = 0;
        MINE(C) total += (widen(sum[i]) - mean) * (widen(sum[i]) - mean);
        scale = rsqrtf(over_block(total) / C + eps);
    }
    if (threadIdx.x == 0) stats[2 * n] = mean, stats[2 * n + 1] = scale;
    __syncthreads();  // a turn reads what other threads have summed
    auto normed = [&](Int i) {
        const float unit = (widen(sum[i]) - mean) * scale;
        return (weight ? unit * weight[i] : unit) + (bias ? bias[i] : 0);
    };
    MINE(C) narrow(turned(normed, i, n, C, 1, cos, sin, heads, positions), y[i]);
}

// Each block goes through some rows, and sums d_weight and d_bias of them: d_params (blocks, 2, C).
extern "C" __global__ void norm_backward(const Number* d_y, const Number* d_sum, const Number* x,
        const float* weight, const float* stats, Number* d_x, float* d_params, Int rows, Int C,
        Int center, ANGLES) {
    float *d_w = shared + 32, *d_b = d_w + C;
    MINE(C) d_w[i] = d_b[i] = 0;
    for (Int n = blockIdx.x; n < rows; n += gridDim.x) {
        const Int row = n * C;
        const float mean = stats[2 * n], scale = stats[2 * n + 1];
        auto given = [&](Int i) { return widen(d_y[row + i]); };
        float along = 0, total = 0;
        MINE(C) {
            const float unit = (widen(x[row + i]) - mean) * scale;
            const float d = turned(given, i, n, C, -1, cos, sin, heads, positions);
            d_w[i] += d * unit, d_b[i] += d;
            along += d * weight[i] * unit, total += d * weight[i];
        }
        along = over_block(along) / C;  // what would only lengthen or shift x changes nothing
        total = center ? over_block(total) / C : 0;
        MINE(C) {
            const float unit = (widen(x[row + i]) - mean) * scale;
            float d = turned(given, i, n, C, -1, cos, sin, heads, positions) * weight[i];
            d = (d - total - unit * along) * scale;
            narrow(d_sum ? d + widen(d_sum[row + i]) : d, d_x[row + i]);
        }
    }
    MINE(C) {
        d_params[blockIdx.x * 2 * C + i] = d_w[i];
        d_params[blockIdx.x * 2 * C + C + i] = d_b[i];
    }
}

// A block turns a row of V logits into the row's loss, and if learn into their gradient in place.
__device__ float cap(float x, float softcap) { return softcap ? softcap * tanhf(x / softcap) : x; }
extern "C" __global__ void loss(Number* logits, const Int* targets, float* losses, Int V,
        Int stride, Int learn, float softcap, float smoothing, float z_loss) {
    logits += blockIdx.x * stride;
    const Int target = targets[blockIdx.x];
    const float hit = target < 0 ? 0 : cap(widen(logits[target]), softcap);
    float highest = -3e38f, total = 0, mean = 0;
    MINE(V) {
        const float logit = cap(widen(logits[i]), softcap);
        if (logit > highest) total *= expf(highest - logit), highest = logit;
        total += expf(logit - highest), mean += logit;
    }
    const float top = over_block(highest, true);
    const float logsumexp = top + logf(over_block(total * expf(highest - top)));
    mean = over_block(mean) / V;
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logsumexp
        - (1 - smoothing) * hit - smoothing * mean + z_loss * logsumexp * logsumexp;
    if (learn) MINE(V) {
        const float logit = cap(widen(logits[i]), softcap);
        float d = expf(logit - logsumexp) * (1 + 2 * z_loss * logsumexp) - smoothing / V;
        if (i == target) d -= 1 - smoothing;
        if (softcap) d *= 1 - logit / softcap * (logit / softcap);
        narrow(target < 0 ? 0 : d, logits[i]);
    }
}
"""


@lru_cache(maxsize=None)
def cuda_module(device, dtype):
    """CUDA_SOURCE compiled for a device and a dtype
    -> run(name, grid, block, n_bytes, values, types), which launches one of its kernels."""
    from cuda.bindings import driver, nvrtc  # torch's CUDA builds bring it along

    def get(result):
        status, *values = result
        if status:
            raise RuntimeError(f"cuda.bindings says {status.name}")
        return values[0] if values else None

    source = f"{CUDA_NUMBERS[dtype]}\n{CUDA_SOURCE}".encode()
    program = get(nvrtc.nvrtcCreateProgram(source, b"model.cu", 0, [], []))
    options = ["-arch=sm_{}{}".format(*torch.cuda.get_device_capability(device)), "-std=c++17"]
    status, = nvrtc.nvrtcCompileProgram(program, 2, [option.encode() for option in options])
    if status:
        log = bytearray(get(nvrtc.nvrtcGetProgramLogSize(program)))
        get(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{status.name} {log.decode().rstrip(chr(0))}")
    code = bytearray(get(nvrtc.nvrtcGetCUBINSize(program)))
    get(nvrtc.nvrtcGetCUBIN(program, code))
    context = get(driver.cuDevicePrimaryCtxRetain(get(driver.cuDeviceGet(device.index or 0))))
    get(driver.cuCtxSetCurrent(context))
    module = get(driver.cuModuleLoadData(bytes(code)))
    kernels = {name: get(driver.cuModuleGetFunction(module, name.encode()))
               for name in ("norm_forward", "norm_backward", "loss")}

    def run(name, grid, block, n_bytes, values, types):
        with torch.cuda.device(device):
            get(driver.cuCtxSetCurrent(context))  # the thread of backward may have none yet
            stream = torch.cuda.current_stream().cuda_stream
            get(driver.cuLaunchKernel(kernels[name], grid, 1, 1, block, 1, 1, n_bytes, stream,
                                      (values, types), 0))
    return run


def launch(name, grid, block, *args, shared=0):
    """Run a kernel on args, of which the first is a tensor: `grid` blocks of `block` threads, with
    `shared` floats for each block. None becomes a null pointer."""
    kinds = {bool: ctypes.c_longlong, int: ctypes.c_longlong, float: ctypes.c_float}
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x or 0 for x in args]
    types = [kinds.get(type(x), ctypes.c_void_p) for x in args]
    if grid:
        run = cuda_module(args[0].device, args[0].dtype)
        run(name, grid, block, 4 * (32 + shared), tuple(values), tuple(types))


def cuda_problem(device, dtype):
    """Why the kernels cannot run on a device, in a line; "" if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"they need an NVIDIA GPU, and the model is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) if dtype == torch.bfloat16 else capability < (7, 0):
        return "the GPU's compute capability {}.{} is too low".format(*capability)
    try:
        cuda_module(device, dtype if dtype in CUDA_NUMBERS else torch.float32)
    except Exception as error:  # NVRTC, driver or binding missing, too old: errors of many kinds
        return " ".join(f"{error}".split())[:200] or repr(error)
    return ""


def covered(x, *others):
    """Whether the kernels take these: dense, alike, in a dtype they know, or None; rows of x that
    fit into shared memory."""
    return x.dtype in CUDA_NUMBERS and x.size(-1) <= 4096 and all(
        y is None or y.is_contiguous() and (y.dtype, y.shape) == (x.dtype, x.shape)
        for y in (x, *others))


def threads(C):
    """How many threads share a row of C numbers: a power of two from 32 to 512."""
    return min(512, max(32, 1 << (C // 4).bit_length()))


class CudaNorm(torch.autograd.Function):
    """Norm with residual, or rotary positions with or without a norm: one kernel each way."""

    @staticmethod
    def compute(x, weight, bias, residual, center, eps, *table):
        """-> x + residual, its norm, and mean and scale of each row"""
        C, rows = x.size(-1), x.numel() // x.size(-1)
        total, y = x if residual is None else torch.empty_like(x), torch.empty_like(x)
        stats = x.new_empty(rows, 2, dtype=torch.float32)
        weight, bias = (p if p is None else p.float() for p in (weight, bias))
        launch("norm_forward", rows, threads(C), x, residual, weight, bias, total, y, stats, C,
               center, eps, *table)
        return total, y, stats

    @staticmethod
    def forward(ctx, x, weight, bias, residual, center, eps, cos=None, sin=None):
        ctx.table = (cos, sin, x.size(-2) if cos is not None else 1,
                     cos.numel() // cos.size(-1) if cos is not None else 1)
        total, y, stats = CudaNorm.compute(x, weight, bias, residual, center, eps, *ctx.table)
        ctx.save_for_backward(total, weight, stats)
        ctx.center, ctx.biased = center, bias is not None
        return y if residual is None else (total, y)

    @staticmethod
    @once
    def backward(ctx, *gradients):
        (x, weight, stats), (cos, sin, *sizes) = ctx.saved_tensors, ctx.table
        *d_sum, d_y = (d.contiguous() for d in gradients)
        if weight is None:  # a turn alone: turn back
            _, d_x, _ = CudaNorm.compute(d_y, None, None, None, False, 0.0, cos, -sin, *sizes)
            return d_x, *[None] * 7
        C, rows = x.size(-1), len(stats)
        d_x, d_params = torch.empty_like(x), stats.new_empty(min(rows, 2**20 // C), 2, C)
        launch("norm_backward", len(d_params), threads(C), d_y, *(d_sum or [None]), x,
               weight.float(), stats, d_x, d_params, rows, C, ctx.center, *ctx.table, shared=2 * C)
        d_weight, d_bias = d_params.sum(dim=0).to(weight.dtype)
        return (d_x, d_weight, d_bias if ctx.biased else None, d_x if d_sum else None,
                *[None] * 4)


def cuda_norm(x, weight, bias=None, residual=None, center=False, eps=1e-6):
    """fused_norm in one kernel each way."""
    if not covered(x, residual):
        return fused_norm(x, weight, bias, residual, center, eps)
    y = CudaNorm.apply(x, weight, bias, residual, center, eps)
    return (x, y) if residual is None else y


def cuda_rotary(x, cos, sin, weight=None, eps=1e-6):
    """fused_rotary in one kernel each way."""
    if not covered(x):
        return fused_rotary(x, cos, sin, weight, eps)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return CudaNorm.apply(x, weight, None, None, False, eps, cos, sin)


def cuda_loss_part(x, low, targets, softcap, smoothing, z_loss, learn):
    """loss_part in one kernel: the gradient takes the place of the logits."""
    (N, V), stride = (len(x), len(low)), -(-len(low) // 8) * 8
    logits = x.new_empty(N, stride)[:, :V]  # products are slow where rows start at odd addresses
    torch.mm(x, low.T, out=logits)
    losses = x.new_empty(N, dtype=torch.float32)
    launch("loss", N, 512, logits, targets.contiguous(), losses, V, stride, learn,
           float(softcap), float(smoothing), float(z_loss))
    return losses.sum(), logits


def cuda_loss(x, weight, targets, softcap=0.0, smoothing=0.0, z_loss=0.0):
    """fused_loss with one kernel between the products."""
    part = cuda_loss_part if x.dtype in CUDA_NUMBERS else loss_part
    return FusedLoss.apply(x, weight, targets, part, softcap, smoothing, z_loss)


PLAIN = SimpleNamespace(attention=plain_attention, loss=plain_loss, norm=plain_norm,
                        rotary=plain_rotary, bend=plain_bend)
FUSED = SimpleNamespace(attention=fused_attention, loss=fused_loss, norm=fused_norm,
                        rotary=fused_rotary, bend=fused_bend)
TORCH = SimpleNamespace(**vars(FUSED) | dict(attention=torch_attention))
CUDA = SimpleNamespace(**vars(TORCH) | dict(loss=cuda_loss, norm=cuda_norm, rotary=cuda_rotary))
KERNELS = {"plain": PLAIN, "fused": FUSED, "torch": TORCH, "cuda": CUDA}  # --kernels


@lru_cache(maxsize=None)
def say_once(text):
    print(text, file=sys.stderr)


def pick_kernels(name, device, dtype, grouped):
    """plain | fused | torch | cuda | auto -> the row of KERNELS to use, for auto the fastest here:
    our kernels on a GPU that runs them; else torch's attention, but our tiles where tests/benchmark
    found them faster: on CPUs, in half precision or with heads that share keys."""
    check_known(name, ("auto", *KERNELS), "kernels")
    problem = cuda_problem(device, dtype) if name in ("auto", "cuda") else ""
    if name == "cuda" and problem:
        raise ValueError(f"kernels=cuda cannot run: {problem}; kernels=auto takes what can")
    if name != "auto":
        return name
    if problem and device.type == "cuda":
        say_once(f"no CUDA kernels of our own, torch's instead: {problem}")
    tiles_win = device.type == "cpu" and (grouped or dtype in (torch.bfloat16, torch.float16))
    return "cuda" if not problem else "fused" if tiles_win else "torch"


# -----------------------------------------------------------------------------
# The parts of a block.


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of what comes in; its weights keep their own."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / root of its mean square, times a weight, over the last dimension. arXiv:1910.07467"""
    kernels, center, eps = PLAIN, False, 1e-6

    def __init__(self, size, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias and self.center else None

    def forward(self, x, residual=None):
        """-> (x + residual, its norm): the stream, and what attention or MLP reads of it."""
        return self.kernels.norm(x, self.weight, self.bias, residual, self.center, self.eps)


class LayerNorm(RMSNorm):
    """(x - mean) / deviation, times a weight, plus a bias. arXiv:1607.06450"""
    center, eps = True, 1e-5


POSITIONS = ("learned", "sinusoidal", "rope", "none")
NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class KVCache:
    """The keys and values of one layer for the tokens seen so far, (B, K, S, D) each; in `source`
    those of the text that an encoder has read."""

    def __init__(self, config, batch_size, max_tokens, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.n_kv_head, max_tokens, config.head_size)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length, self.source = 0, None

    def append(self, k, v):
        """Remember k and v (B, K, T, D); return all keys and values so far, (B, K, S, D)."""
        end = self.length + k.size(2)
        if end > self.k.size(2):
            raise ValueError(f"{end} tokens do not fit into a cache of max_tokens={self.k.size(2)}")
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def choose(self, rows):
        """Go on with these rows, given by their numbers, which may repeat."""
        self.k, self.v = self.k[rows], self.v[rows]


class Attention(nn.Module):
    """Multi-head attention; fewer key/value than query heads make it grouped (arXiv:2305.13245)."""
    kernels = PLAIN

    def __init__(self, config):
        super().__init__()
        C, D, bias = config.n_embd, config.head_size, config.bias
        self.head_size, self.dropout = D, config.dropout
        self.q_proj = Linear(C, config.n_head * D, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.o_proj = Linear(config.n_head * D, C, bias=bias)
        self.q_norm = RMSNorm(D) if config.qk_norm else None
        self.k_norm = RMSNorm(D) if config.qk_norm else None

    def heads(self, proj, x, norm=None, rotary=None):
        """x (B, T, C) -> the queries, keys or values of all heads, (B, H or K, T, D)."""
        # -1, not n_head: under tensor parallelism each process holds only some of the heads
        x = proj(x).unflatten(-1, (-1, self.head_size))                  # (B, T, H or K, D)
        if rotary is not None:
            x = self.kernels.rotary(x, *rotary, None if norm is None else norm.weight)
        elif norm is not None:
            _, x = norm(x)
        return x.transpose(1, 2)

    def forward(self, x, rotary=None, cache=None, **rules):
        q = self.heads(self.q_proj, x, self.q_norm, rotary)              # (B, H, T, D)
        k = self.heads(self.k_proj, x, self.k_norm, rotary)              # (B, K, T, D)
        v = self.heads(self.v_proj, x)
        if cache is not None:
            k, v = cache.append(k, v)                                    # (B, K, S, D)
        return self.mix(q, k, v, **rules)

    def look(self, x, source, cache=None, mask=None):
        """Cross-attention: queries from x (B, T, C), keys and values from source (B, S, C)."""
        q = self.heads(self.q_proj, x, self.q_norm)                      # (B, H, T, D)
        kv = cache.source if cache is not None else None
        if kv is None:
            kv = self.heads(self.k_proj, source, self.k_norm), self.heads(self.v_proj, source)
        if cache is not None:
            cache.source = kv
        return self.mix(q, *kv, causal=False, mask=mask)

    def mix(self, q, k, v, **rules):
        dropout = self.dropout if self.training else 0.0
        y = self.kernels.attention(q, k, v, dropout=dropout, **rules)    # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                 # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with a bend between them; SwiGLU (arXiv:2002.05202) adds a gate and is
    narrower, so that it has as many weights."""
    kernels = PLAIN

    def __init__(self, config):
        super().__init__()
        C, gated = config.n_embd, config.activation == "swiglu"
        hidden = 64 * math.ceil(8 * C / 3 / 64) if gated else 4 * C
        self.gate_proj = Linear(C, hidden, bias=config.bias) if gated else None
        self.up_proj = Linear(C, hidden, bias=config.bias)
        self.down_proj = Linear(hidden, C, bias=config.bias)
        self.activation = config.activation

    def forward(self, x):
        gate = None if self.gate_proj is None else self.gate_proj(x)
        down = self.down_proj
        return self.kernels.bend(self.up_proj(x), gate, down.weight, down.bias, self.activation)


class Block(nn.Module):
    """Attention, then MLP, each added to the stream; a decoder with an encoder looks at the source
    in between. The norms come before (arXiv:2002.04745), or after as in the original."""

    def __init__(self, config, cross):
        super().__init__()
        norm = partial(NORMS[config.norm], config.n_embd, bias=config.bias)
        self.norm_first = config.norm_first
        self.attn_norm, self.attn = norm(), Attention(config)
        self.cross_norm, self.cross = (norm(), Attention(config)) if cross else (None, None)
        self.mlp_norm, self.mlp = norm(), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None, memory=None, **rules):
        steps = [(self.attn_norm, lambda x: self.attn(x, rotary, cache, **rules))]
        if self.cross is not None:
            source, mask = memory
            steps.append((self.cross_norm, lambda x: self.cross.look(x, source, cache, mask)))
        steps.append((self.mlp_norm, self.mlp))
        y = None  # what is still to be added to the stream x
        for norm, part in steps:
            if self.norm_first:
                x, seen = norm(x, y)
                y = self.dropout(part(seen))
            else:
                _, x = norm(x, self.dropout(part(x)))
        return x if y is None else x + y


# -----------------------------------------------------------------------------
# The whole: ids -> stream of channels -> logits or loss.


def check_ids(ids, size, lowest=0, what="token id", limit="vocab_size"):
    """Raise ValueError unless all ids are from lowest to size - 1: a GPU would stop the whole
    program. They are looked at on the CPU, where they come from; a GPU would be made to wait."""
    wrong = ids[(ids < lowest) | (ids >= size)] if ids.device.type == "cpu" else ()
    if len(wrong):
        raise ValueError(f"{what} {wrong[0].item()} is not from {lowest} to {size - 1}: "
                         f"{limit}={size}")


def places(segments):
    """The position of each token in its segment, a run of equal numbers in segments (B, S):
    places([[0, 0, 1, 1, 1]]) == [[0, 1, 0, 1, 2]]."""
    index = torch.arange(segments.size(1), device=segments.device)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - (index * first).cummax(dim=1).values


def sinusoids(positions, C):
    """Positions (..., T) as C sines and cosines of ever slower waves -> (..., T, C).
    arXiv:1706.03762"""
    half = torch.arange(0, C, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None] * 10000.0 ** (-half / C)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :C]


class Transformer(nn.Module):
    """Embeddings, a stack of blocks and a last norm: ids (B, T) -> (B, T, C)."""

    def __init__(self, config, encoder=False):
        super().__init__()
        self.config, self.recompute = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.causal = config.causal and not encoder
        n_layer, cross = (config.n_encoder_layer if encoder else config.n_layer,
                          config.cross and not encoder)
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(n_layer))
        norm = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.final_norm = norm if config.norm_first else None  # else the last block ends with one

    def embed(self, ids, positions):
        """-> (the stream (B, T, C) as it begins, the rotary table if positions enter there)"""
        x, c = self.wte(ids), self.config
        if c.position == "learned":
            return x + self.wpe(positions), None
        if c.position == "sinusoidal":
            return x * math.sqrt(c.n_embd) + sinusoids(positions, c.n_embd).to(x.dtype), None
        return x, rotary_table(c, positions) if c.position == "rope" else None

    def forward(self, ids, cache=None, dtype=None, memory=None, segments=None):
        c, T, start = self.config, ids.size(1), cache[0].length if cache else 0
        if start + T > c.block_size:
            raise ValueError(f"{start + T} tokens exceed block_size={c.block_size}")
        check_ids(ids, c.vocab_size)
        rules, positions = dict(causal=self.causal, window=c.window), None
        if segments is None:
            positions = torch.arange(start, start + T, device=ids.device)
        elif segments.shape != (len(ids), start + T):
            raise ValueError(f"segments of shape {tuple(segments.shape)} must be "
                             f"{(len(ids), start + T)}: a number for each token, cached ones too")
        else:
            rules["segments"], positions = segments, places(segments)[:, start:]
        x, rotary = self.embed(ids, positions)
        x = self.dropout(x if dtype is None else x.to(dtype))            # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x = checkpoint(block, x, rotary, None, memory, use_reentrant=False, **rules)
            else:
                x = block(x, rotary, cache[i] if cache else None, memory, **rules)
        return x if self.final_norm is None else self.final_norm(x)[1]


class GPT(nn.Module):
    """A transformer with a head: for the next token, or without `causal` a masked one, or with
    n_classes a class or a number for each text. With `cross` an encoder reads a source first."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.encoder = Transformer(config, encoder=True) if config.cross else None
        self.lm_head = Linear(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        self.tie()
        self.initialize()
        self.use()

    def tie(self):
        """Let the head and the encoder share the embedding's matrix. arXiv:1608.05859"""
        if self.config.tied and not self.config.n_classes:
            self.lm_head.weight = self.transformer.wte.weight
        if self.encoder is not None:
            self.encoder.wte.weight = self.transformer.wte.weight

    def initialize(self):
        """GPT-2's: normal, deviation 0.02; what writes to the stream is scaled down by its depth.
        With zero_init it starts at zero, as does a head of its own: all tokens are alike likely."""
        c, head = self.config, self.lm_head.weight is not self.transformer.wte.weight
        smaller = 0.0 if c.zero_init else (2 * c.n_layer) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(("o_proj", "down_proj"))
                writes = writes or c.zero_init and head and name == "lm_head"
                nn.init.normal_(module.weight, std=0.02 * (smaller if writes else 1.0))
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def use(self, kernels="auto", dtype=None, recompute=False):
        """Choose the kernels (a row of KERNELS, or auto) and the dtype to compute in (None: the
        weights' own); recompute makes what is in a block again in backward instead of keeping it:
        far less memory, a third more work (arXiv:1604.06174). None of it is part of the model.
        -> the name of the row."""
        kernels = pick_kernels(kernels, self.device, dtype or self.lm_head.weight.dtype,
                               grouped=self.config.n_kv_head < self.config.n_head)
        for module in self.modules():
            module.kernels = KERNELS[kernels]
            if isinstance(module, Transformer):
                module.recompute = recompute
        self.dtype = dtype
        return kernels

    @property
    def device(self):
        return self.lm_head.weight.device

    def encode(self, source, segments=None):
        """Read a source (B, S) -> the memory that forward takes. segments (B, S), 0 for padding."""
        if self.encoder is None:
            raise ValueError(f"architecture={self.config.architecture} has no encoder: "
                             "cross=True adds one")
        x = self.encoder(source, None, self.dtype, segments=segments)    # (B, S, C)
        return x, None if segments is None else segments[:, None, None] > 0

    def forward(self, ids, targets=None, cache=None, memory=None, segments=None, last_only=False):
        """ids (B, T) -> (logits (B, T, V), None), or if last_only the last position's (B, 1, V).
        With targets (B, T), -1 ignored -> (None, mean cross-entropy in nats). With n_classes the
        logits are (B, n_classes), the targets classes (B,), or numbers (B,) and the loss their mean
        square error. memory is what encode() made of a source; segments (B, S) numbers the texts in
        a row, cached tokens included: tokens see and count only their own, and 0 is padding."""
        c = self.config
        if c.cross and memory is None:
            raise ValueError("this model looks at a source: give memory=model.encode(source)")
        x = self.transformer(ids, cache, self.dtype, memory, segments)   # (B, T, C)
        if c.n_classes:
            return self.judge(x, targets, segments)
        if targets is not None:
            check_ids(targets, c.vocab_size, lowest=-1)
            extras = (c.label_smoothing, c.z_loss) if self.training else ()
            return None, self.kernels.loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                           c.softcap, *extras)
        return cap(self.lm_head(x[:, -1:] if last_only else x), c.softcap), None

    def judge(self, x, targets, segments):
        """A class or a number from the mean over a text's tokens."""
        if segments is not None:
            text = (segments > 0).unsqueeze(-1)
            mean = (x * text).sum(dim=1) / text.sum(dim=1).clamp(min=1)  # (B, C)
        else:
            mean = x.mean(dim=1)
        logits = self.lm_head(mean).float()                              # (B, n_classes)
        if targets is None:
            return logits, None
        if self.config.n_classes == 1:
            return None, F.mse_loss(logits.squeeze(1), targets.float())
        check_ids(targets, self.config.n_classes, what="class", limit="n_classes")
        return None, F.cross_entropy(logits, targets)

    def is_sound(self):
        """Whether all weights are finite: others are worth neither a checkpoint nor a look."""
        return all(p.isfinite().all() for p in self.parameters())

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def parameters_by_part(self):
        """How many parameters each part has, {"embedding": ..., "mlp": ...}; shared ones
        count once, as embedding."""
        parts = {}
        for name, weight in self.named_parameters():
            part = next(part for word, part in PARTS.items() if word in name)
            parts[part] = parts.get(part, 0) + weight.numel()
        return parts

    def flops_per_token(self, T=None):
        """Of forward and backward, in sequences of T tokens, and a source as long: 6 for each
        weight of a matrix product, 12 for each channel of each key that a query sees. On average
        over a sequence a causal one sees T/2, or its window, shorter at the beginning."""
        T, c = T or self.config.block_size, self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        window = min(c.window or T, T)
        past, later = window - window**2 / (2 * T), T / 2
        keys = c.n_layer * (past + (0 if c.causal else later))
        if c.cross:
            keys += c.n_encoder_layer * (past + later) + c.n_layer * T
        return 6 * weights + 12 * c.n_embd * keys


# -----------------------------------------------------------------------------
# What training holds in memory, in bytes.

PARTS = {  # of a model, by a word in a weight's name
    "norm": "norms", "wte": "embedding", "wpe": "positions", "attn": "attention",
    "cross": "cross-attention", "mlp": "mlp", "lm_head": "head"}


def saved_by_block(block, c, dtype, device):
    """Bytes that a block keeps of each token from forward to backward: the stream and its norm
    before each part, queries and keys before and after they are turned, values, what attention
    makes of them, and what the MLP bends. Plain kernels keep the steps in between, scores too."""
    C, K, F = c.n_embd, c.n_kv_head * c.head_size, block.mlp.up_proj.out_features
    kernels, drops, width = block.kernels, c.dropout > 0, dtype.itemsize
    n_looks, rope, scores = 1 + (block.cross is not None), c.position == "rope", c.n_head * 4
    stream, heads = 2 * C * width, (2 * C + 2 * K) * width
    turns, bent = n_looks if c.qk_norm else rope, 1 + (c.activation == "swiglu")
    if kernels is PLAIN:
        stream, heads, turns = stream + 4 * C, 4 * C * width, rope + 2 * n_looks * c.qk_norm
        scores = width * (2 if c.causal or drops else 1) + 4 * drops
        scores *= c.n_head * c.block_size
        bent = {"relu": 1, "swiglu": 4}.get(c.activation, 2)
    elif kernels is TORCH and drops and device == "cpu":  # where torch has no fused dropout
        scores = 12 * c.n_head * c.block_size
    elif kernels is FUSED and device == "cpu" and not cpu_multiplies(dtype):  # done in float32
        heads = (2 * C + 2 * K) * 4 + C * width
    return ((n_looks + 1) * (stream + drops * C * width) + n_looks * (heads + scores)
            + turns * (C + K) * width + bent * F * width)


def logits_memory(c, kernels, dtype, tokens, device):
    """Bytes of the logits and their gradients that the loss holds at once; of two tiles at most."""
    logits, tile = tokens * c.vocab_size, LOSS_TILE * (1 if device == "cpu" else 32)
    if kernels is PLAIN:
        return 16 * logits
    if kernels is CUDA or dtype == torch.float32:
        return dtype.itemsize * min(logits, 2 * tile)
    return (4 + dtype.itemsize) * min(logits, tile)


def optimizer_memory(model, optimizer):
    """-> (bytes that muon or adamw keeps from step to step, bytes that a step takes beside)."""
    kept = 8 * model.n_parameters()  # the means of gradients and of their squares
    if optimizer == "adamw":
        return kept, 0
    alike = {}  # Muon keeps one number a weight of a matrix, and works on all of a shape at once
    for name, w in model.named_parameters():
        if "blocks." in name and w.dim() == 2:
            alike[w.shape] = alike.get(w.shape, 0) + 4 * w.numel()
    step = max(2 * n + 5 * n * min(shape) // max(shape) for shape, n in alike.items())
    return kept - sum(alike.values()), step


def training_memory(model, batch_size, optimizer="muon", device=None):
    """{part: bytes} of all tensors at the fullest moment of a training step on batch_size whole
    sequences, with the model's kernels, dtype and recompute, and muon or adamw. The model may be
    on the meta device, where no size costs anything: device is then the one it is planned for."""
    c, dtype, recompute = model.config, model.dtype or torch.float32, model.transformer.recompute
    device, tokens, width = device or model.device.type, batch_size * c.block_size, dtype.itemsize
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    stream, hidden = tokens * c.n_embd * width, tokens * blocks[0].mlp.up_proj.out_features * width
    saved = tokens * saved_by_block(blocks[0], c, dtype, device)
    if width < 4:  # products keep the weights they computed with
        saved += width * sum(w.numel() for w in blocks[0].parameters() if w.dim() == 2)
    activations = len(blocks) * (stream if recompute else saved) + 2 * stream
    loss = stream + logits_memory(c, model.kernels, dtype, tokens, device)
    backward = 3 * hidden + 2 * stream + recompute * saved
    if model.kernels is PLAIN:
        backward += 3 * tokens * c.n_head * c.block_size * width - 3 * hidden

    weights, head = 4 * model.n_parameters(), 4 * model.lm_head.weight.numel()
    kept, step = optimizer_memory(model, optimizer)
    moments = [  # the end of forward, the first block's backward, the optimizer's step
        dict(gradients=head, activations=activations, loss=loss),
        dict(gradients=head, activations=activations, loss=stream, backward=backward),
        dict(gradients=weights, update=max(step, head * c.tied))]
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    return dict(weights=weights, optimizer=kept) | fullest


def free_memory(device="cpu"):
    """Bytes that new tensors can take: of a GPU, or of this machine and the container it may be;
    all of it where the system does not tell what is in use; None where it tells nothing."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "win32":
        status = (ctypes.c_ulonglong * 8)(64)  # its own size first, then: all memory, what is free
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    try:
        if sys.platform != "linux":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
        group = Path("/sys/fs/cgroup")
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            free = min(free, int(most) - int((group / "memory.current").read_text()))
        return free
    except (OSError, ValueError, StopIteration):
        return None


# -----------------------------------------------------------------------------
# Checkpoints: one dict of plain values and tensors, written whole or not at all.


def pack(model, **state):
    """What a checkpoint holds: the model, and any further plain values or tensors, as one dict."""
    weights = {name: w.detach() for name, w in model.named_parameters()}  # shared ones once
    return state | {"format": FORMAT, "config": asdict(model.config), "model": weights}


def save_model(model, file, **state):
    """Write the model and more to a path or an open binary file, which tokenizer.replacing(path)
    lets appear complete or not at all."""
    torch.save(pack(model, **state), file)


def differences(wanted, found):
    """How the shapes of two dicts of tensors differ, in words: "" if they do not."""
    lines = [f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
             for name in wanted if name in found and found[name].shape != wanted[name].shape]
    lines += [f"{name} is missing" for name in wanted if name not in found]
    lines += [f"{name} is unknown" for name in found if name not in wanted]
    more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
    return "; ".join(lines[:6]) + more


# What a file of weights may name; torch.load itself knows more, and some of that takes all memory.
LOADABLE = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2",
            "torch._utils _rebuild_parameter",
            *(f"torch {kind}Storage" for kind in "Double Float Half BFloat16 Long Int Short Char "
              "Byte Bool".split())}
MOST_VALUES, DEEPEST = 10**6, 20  # in a file's dicts and lists


def values_in(state):
    """Yield all values in dicts, lists and tuples; ValueError where they are too many or too deep,
    as they also are in a list that holds itself."""
    waiting, n = [(state, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        n += 1
        if n > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"more than {MOST_VALUES:,} values, or deeper than {DEEPEST}")
        if isinstance(value, (dict, list, tuple)):
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            waiting += [(part, depth + 1) for part in parts]
        yield value


def load_plain(path, device="cpu"):
    """What torch.save(..., path) wrote: plain values and tensors. No code runs, a small file takes
    little memory, and it raises OSError and ValueError alone."""
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                    or sum(entry.file_size for entry in entries) > size):
                raise ValueError("its parts are compressed")
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    check_pickle(archive.read(entry))
        state = torch.load(path, map_location=device, weights_only=True)
        tensors = [value for value in values_in(state) if torch.is_tensor(value)]
        if not all(w.is_contiguous() for w in tensors) or sum(w.nbytes for w in tensors) > 2 * size:
            raise ValueError("it does not hold all numbers of its tensors")  # a head may share its
        return state
    except OSError:
        raise
    except Exception as error:  # a damaged file can make torch and its unpickler raise anything
        raise ValueError(f"{path} is damaged or not a checkpoint ({first_line(error):.80})"
                         ) from error


def check_pickle(data):
    """ValueError if a pickle names what is not LOADABLE: nothing of it is run for that."""
    for code, value, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST", "STACK_GLOBAL") and value not in LOADABLE:
            raise ValueError(f"it names {value!r:.40}")


def first_line(error):
    return (str(error).splitlines() or [repr(error)])[0]


def with_weights(config, weights, path):
    """A model of that shape with these weights; ValueError with the list where they do not fit."""
    for name, w in weights.items():
        if not (torch.is_tensor(w) and w.is_floating_point()
                and re.fullmatch(r"[\w.]{1,199}", str(name))):
            raise ValueError(f"{path}: {name!r:.80} is no weight, a tensor of floats with a name")
    if config.n_layer + config.n_encoder_layer > len(weights):  # each would take time and memory
        raise ValueError(f"{path} does not hold the weights of its config: n_layer={config.n_layer}"
                         f" with {len(weights)} weights")
    try:
        with torch.device("meta"):  # no memory, no random numbers: the weights are replaced at once
            model = GPT(config)
    except RuntimeError as error:  # more numbers than can be counted
        raise ValueError(f"{path} does not hold the weights of its config: {first_line(error):.80}"
                         ) from None
    wrong = differences(dict(model.named_parameters()), weights)
    if wrong:
        raise ValueError(f"{path} does not hold the weights of its config: {wrong}")
    weights = {name: w.detach() for name, w in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    model.use()
    return model


def load_model(path, device="cpu"):
    """-> (model on device, the whole dict that was saved). ValueError if damaged or foreign."""
    state = load_plain(path, device)
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"{path} is damaged or not a checkpoint of this program")
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r:.40}, this program reads {FORMAT!r}")
    known = {f.name for f in fields(GPTConfig)}
    try:
        config = GPTConfig(**{name: v for name, v in state["config"].items() if name in known})
        weights = dict(state["model"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its config makes no model ({error!r:.200})"
                         ) from None
    return with_weights(config, weights, path), state


# -----------------------------------------------------------------------------
# GPT-2's weights from Hugging Face's files.

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
               "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
HF_NAMES = {"ln_1": "attn_norm", "attn.c_proj": "attn.o_proj", "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of length, that much JSON with each tensor's
    dtype, shape and place, then the tensors' bytes. ValueError for a file that is not that."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors, total = {}, 0
        for name, row in header.items():
            dtype, shape = SAFETENSORS[row["dtype"]], row["shape"]
            begin, end = row["data_offsets"]
            if not (len(shape) < 9 and all(isinstance(n, int) and n >= 0 for n in [begin, *shape])):
                raise ValueError(f"{name} has a shape or a place that is none")
            size = math.prod(shape) * dtype.itemsize
            total += size
            if not (begin <= end <= len(data) - start and end - begin == size):
                raise ValueError(f"{name} lies outside the file")
            tensor = torch.empty(0, dtype=dtype) if size == 0 else torch.frombuffer(
                data, dtype=dtype, count=math.prod(shape), offset=start + begin)
            tensors[name] = tensor.reshape(shape)
        if total != len(data) - start:  # tensors that share bytes, or are named twice
            raise ValueError("its bytes are not those of its tensors, one after the other")
        return tensors
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or not in the safetensors format ({error!r:.80})"
                         ) from None


def load_gpt2(folder):
    """The GPT in a folder with Hugging Face's config.json and model.safetensors or
    pytorch_model.bin, of any of GPT-2's sizes. Its vocabulary: Tokenizer.from_gpt2."""
    folder = Path(folder)
    try:
        c = json.loads((folder / "config.json").read_bytes())
        config = GPTConfig("gpt2", c["vocab_size"], c.get("n_positions", c.get("n_ctx")),
                           c["n_layer"], c["n_head"], n_embd=c["n_embd"])
        if c.get("activation_function", "gelu_new") != "gelu_new" or c.get("n_inner"):
            raise ValueError("only GPT-2's own activation gelu_new and n_inner null are known")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json is not GPT-2's ({error!r:.200})") from None
    safe = folder / "model.safetensors"
    if safe.exists():
        found = read_safetensors(safe)
    else:
        safe = folder / "pytorch_model.bin"
        found = load_plain(safe)
    try:
        return with_weights(config, gpt2_weights(found), safe)
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{safe} holds other things than GPT-2's weights ({error!r:.80})"
                         ) from None


def gpt2_weights(found):
    """Hugging Face's names and tensors of GPT-2 -> ours."""
    weights = {}
    for name, w in found.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # old files carry the causal mask; the head is the embedding
        name = name.replace("h.", "blocks.", 1) if name.startswith("h.") else name
        name = "transformer." + name.replace("ln_f.", "final_norm.")
        for theirs, ours in HF_NAMES.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        turned = name.endswith("_proj.weight") or ".c_attn.weight" in name
        w = (w.transpose(-2, -1) if turned else w).float()
        parts = {name: w}  # Conv1D keeps its matrix transposed, and q, k and v in one
        if ".c_attn." in name:
            parts = {name.replace("c_attn", f"{x}_proj"): part
                     for x, part in zip("qkv", w.chunk(3))}
        weights |= {name: part.contiguous() for name, part in parts.items()}
    return weights
