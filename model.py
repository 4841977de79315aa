"""
The model: token ids in, logits or loss out. One block for three families (decoder, encoder, and
both together); attention and loss are written twice: once to be read, once to be fast.

    config = GPTConfig(architecture="modern", vocab_size=4096, **SIZES["mini"])
    logits, _ = GPT(config)(ids)                 # (B, T) -> (B, T, V)
    _, loss = GPT(config)(ids, targets)          # (B, T), (B, T) -> a scalar

Shapes, here and in every other file:

    B  sequences in a batch          H  query heads (n_head)
    T  tokens in a sequence          K  key/value heads (n_kv_head); each serves H/K query heads
    S  tokens attended to            D  channels in one head (C = H * D)
    C  channels (n_embd)             V  vocabulary (vocab_size)
"""

import difflib
import hashlib
import json
import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# One architecture is one row of options.
GPT2 = dict(position="learned", norm="layernorm", norm_first=True, activation="gelu", bias=True,
            qk_norm=False, zero_init=False, causal=True, cross=False, tied=True,
            queries_per_kv_head=1)
ARCHITECTURES = {
    "gpt2": GPT2,
    "modern": GPT2 | dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False,
                          qk_norm=True, zero_init=True, tied=False, queries_per_kv_head=2),
    "bert": GPT2 | dict(norm_first=False, causal=False),              # arXiv:1810.04805
    "transformer": GPT2 | dict(position="sinusoidal", norm_first=False, activation="relu",
                               cross=True),                           # arXiv:1706.03762
}

# Parameters with a vocabulary of 262 for nano, of 4,096 up to base, of 50,257 (gpt2) for the rest.
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


def check_known(name, known, what):
    """Raise ValueError unless name is one of the known; it names the nearest of them."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise ValueError(f"unknown {what} {name!r}: {hint}")


TINY = 1e-9  # low=TINY means above 0, below=1 + TINY at most 1


def option(default, help="", low=0, below=2**31, known=None, positional=False, many=False):
    """A dataclass field that is a command line's option, too: a number with low <= value < below,
    or one of the names in known(); many takes one or more values, a list if several."""
    metadata = dict(help=help, low=low, below=below, known=known, positional=positional, many=many)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(config):
    """ValueError for the first field of a dataclass of options that is out of its type or range."""
    for f in fields(config):
        value, kinds = getattr(config, f.name), getattr(f.type, "__args__", (f.type,))
        low, below, known = (f.metadata[name] for name in ("low", "below", "known"))
        words = f"of type {kinds[0].__name__}"
        right = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if kinds[0] in (int, float) and value is not None:
            right = right and not isinstance(value, bool) and low <= value < below  # nan is not
            words = (("above 0" if low == TINY else f"at least {low}")
                     + {2**31: " and below 2^31", 1 + TINY: " and at most 1"}.get(
                         below, f" and below {below}") + ", a whole number" * (kinds[0] is int))
        if not right:
            raise ValueError(f"{f.name}={value!r:.40} must be {words}")
        if known and value is not None:
            check_known(value, known(), f.name)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. What is None or 0 is filled in from the architecture's row."""
    architecture: str = option("modern", "a row of other defaults", known=lambda: ARCHITECTURES)
    vocab_size: int = option(50257, "tokens that the model knows", low=1)
    block_size: int = option(1024, "longest sequence, in tokens", low=2)
    n_layer: int = option(12, "blocks", low=1, below=1025)
    n_head: int = option(12, "query heads", low=1)
    n_kv_head: int = option(0, "key/value heads; 0: the architecture's share of n_head")
    n_embd: int = option(768, "channels", low=1)
    head_dim: int = option(0, "channels in a head; 0: n_embd / n_head")
    n_hidden: int = option(0, "channels inside an MLP; 0: what suits the activation")
    n_encoder_layer: int = option(0, "of the encoder, where cross; 0: as n_layer", below=1025)
    n_classes: int = option(0, "0: tokens; 1: one number per text; more: a class per text")
    window: int = option(0, "a token attends to this many, itself the last; 0: all")
    softcap: float = option(0.0, "logits stay between -softcap and softcap; 0: no limit")
    dropout: float = option(0.0, "share of activations dropped, while training", below=1)
    label_smoothing: float = option(0.0, "share of each target that all tokens get", below=1)
    z_loss: float = option(0.0, "weight of log(sum(exp(logits)))^2 in the loss")
    position: str | None = option(None, "how a token knows its place", known=lambda: POSITIONS)
    norm: str | None = option(None, "before or after each part", known=lambda: NORMS)
    norm_first: bool | None = option(None, "norms before attention and MLP, not after")
    activation: str | None = option(None, "of the MLP", known=lambda: ACTIVATIONS)
    bias: bool | None = option(None, "in linear layers and LayerNorm")
    qk_norm: bool | None = option(None, "normalise queries and keys")
    zero_init: bool | None = option(None, "what blocks add to the stream starts at zero")
    causal: bool | None = option(None, "a token attends to earlier ones only")
    cross: bool | None = option(None, "an encoder reads a source, and each block attends to it")
    tied: bool | None = option(None, "the head shares the embedding's matrix")
    rope_theta: float = option(10000.0, "base of the rotary frequencies", low=1)
    norm_eps: float = option(0.0, "added to what norms divide by; 0: the norm's own", below=1)

    def __post_init__(self):
        check_known(self.architecture, ARCHITECTURES, "architecture")
        row = dict(ARCHITECTURES[self.architecture])
        queries_per_kv_head = row.pop("queries_per_kv_head")
        derived = self.__dict__  # through which alone fields of a frozen class can be set
        derived |= {name: value for name, value in row.items() if getattr(self, name) is None}
        check_options(self)
        derived["n_kv_head"] = self.n_kv_head or self.n_head // math.gcd(self.n_head,
                                                                         queries_per_kv_head)
        derived["n_encoder_layer"] = self.cross and (self.n_encoder_layer or self.n_layer) or 0
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"n_embd / n_head = {self.head_size} must be even: rope rotates pairs")

    @property
    def head_size(self):
        return self.head_dim or self.n_embd // self.n_head


# -----------------------------------------------------------------------------
# Attention, three times: written out, in tiles, and torch's own. Same arguments, same result:
#
#   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D); the queries are the last T of S positions
#   causal     a query attends to the keys up to its own position
#   window     and of these only to the last `window`; 0: all
#   mask       bool, broadcastable to (B, H, T, S), True where a query may attend
#   segments   whole numbers (B, S): tokens attend only to their own, as for packed documents
#   dropout    share of the attention weights dropped
# A query that may attend to nothing gets zeros.


def attention_mask(T, S, rows, columns, device, causal, window, mask, segments):
    """Where the queries in the slice `rows` of T may attend to the keys in the slice `columns` of
    S: bool (B or 1, H or 1, rows, columns), or None where all may."""
    first, last = S - T + rows.start, S - T + rows.stop - 1  # positions: queries are the last T
    queries = torch.arange(first, last + 1, device=device)[:, None]
    keys = torch.arange(columns.start, columns.stop, device=device)
    masks = []
    if causal and columns.stop - 1 > first:
        masks.append(keys <= queries)
    if window and columns.start <= last - window:
        masks.append(keys > queries - window)
    if mask is not None:
        masks.append(mask.expand(*mask.shape[:-2], T, S)[..., rows, columns])
    if segments is not None:
        own = segments[:, first:last + 1]
        masks.append((own[:, :, None] == segments[:, None, columns])[:, None])
    return reduce(torch.logical_and, masks) if masks else None


def plain_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v. arXiv:1706.03762"""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))          # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)                      # (B, H, T, S)
    allowed = attention_mask(T, S, slice(0, T), slice(0, S), q.device, causal, window, mask,
                             segments)
    if allowed is None:
        weights = F.softmax(scores, dim=-1)
    else:  # the second fill is for rows of which nothing is left
        weights = F.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
        weights = weights.masked_fill(~allowed, 0)
    return F.dropout(weights, dropout).to(v.dtype) @ v                   # (B, H, T, D)


def sum_dtype(dtype):
    """The dtype that sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


QUERY_TILE, KEY_TILE = 256, 256  # the scores of one pair of tiles stay in the processor's cache


def tiles(T, S, causal=True, window=0):
    """Tiles of queries, each with its keys': tiles(2, 3) yields (slice(0, 2), [slice(0, 3)])."""
    for t in range(0, T, QUERY_TILE):
        rows = slice(t, min(t + QUERY_TILE, T))
        start = max(0, S - T + rows.start - window + 1) // KEY_TILE * KEY_TILE if window else 0
        stop = S - T + rows.stop if causal else S
        yield rows, [slice(s, min(s + KEY_TILE, stop)) for s in range(start, stop, KEY_TILE)]


class FusedAttention(torch.autograd.Function):
    """FlashAttention (arXiv:2205.14135): tiles, an online softmax, scores made again in backward.
    Heads that share keys are rows of one matrix; powers of 2, as exp(-inf) is slow on a CPU."""

    @staticmethod
    def fold(x, K, rows):
        """(B, H, T, D) at the rows of one tile -> (B*K, H/K * t, D)"""
        return x[:, :, rows].reshape(x.size(0) * K, -1, x.size(-1))

    @staticmethod
    def append(x, column):
        """x (..., D) with a column (..., 1) as two, rounded and what rounding took: a product with
        ones in these two places adds it before the sums are rounded."""
        high = column.to(x.dtype)
        return torch.cat((x, high, (column - high).to(x.dtype)), dim=-1)        # (..., D + 2)

    @staticmethod
    def scores(q, k, scale, shape, rows, columns, options):
        """One tile of q k^T * scale, (B*K, H/K * t, s), -inf where a query may not attend."""
        scores = q.new_zeros(1).baddbmm(q, k[:, columns].contiguous().mT, beta=0, alpha=scale)
        allowed = attention_mask(*shape[2:], rows, columns, q.device, *options)
        if allowed is not None:
            hidden = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
            scores.view(*shape[:2], -1, scores.size(-1)).add_(hidden)
        return scores

    @staticmethod
    def forward(ctx, q, k, v, causal, window, mask, segments):
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        k, v = (x.reshape(B * K, S, D).contiguous() for x in (k, v))
        shape, options, dtype = (B, H, T, S), (causal, window, mask, segments), sum_dtype(q.dtype)
        out, scale = torch.empty_like(q), math.log2(math.e) / math.sqrt(D)
        logsumexp = q.new_empty(B, H, T, 1, dtype=dtype)
        for rows, key_tiles in tiles(T, S, causal, window):
            tile = FusedAttention.fold(q, K, rows)
            # below every score, yet finite: where nothing is allowed, 2^(-inf - row_max) is 0
            row_max = tile.new_full((*tile.shape[:2], 1), -1e30, dtype=dtype)
            row_sum, accumulator = torch.zeros_like(row_max), torch.zeros_like(tile, dtype=dtype)
            for columns in key_tiles:
                scores = FusedAttention.scores(tile, k, scale, shape, rows, columns, options)
                weights = scores.to(dtype)
                new_max = torch.maximum(row_max, weights.amax(dim=-1, keepdim=True))
                weights.sub_(new_max).exp2_()
                rescale = (row_max - new_max).exp2_()  # the sums so far were relative to row_max
                row_sum.mul_(rescale).add_(weights.sum(dim=-1, keepdim=True))
                accumulator.mul_(rescale).add_(torch.bmm(scores.copy_(weights), v[:, columns]))
                row_max = new_max
            nothing = row_sum == 0  # then 0 / 1 comes out, and a logsumexp that is finite
            out[:, :, rows] = (accumulator / row_sum.masked_fill_(nothing, 1)).view(B, H, -1, D)
            row_lse = row_max.masked_fill_(nothing, 0).add_(row_sum.log2_())
            logsumexp[:, :, rows] = row_lse.view(B, H, -1, 1)
        ctx.save_for_backward(q, k, v, out, logsumexp, mask, segments)
        ctx.scale, ctx.shape, ctx.options = scale, shape, options[:2]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, logsumexp, mask, segments = ctx.saved_tensors
        (B, H, T, S), D, K = ctx.shape, q.size(-1), k.size(0) // q.size(0)
        fold, append = FusedAttention.fold, FusedAttention.append
        delta = (d_out * out).sum(dim=-1, keepdim=True, dtype=logsumexp.dtype)   # (B, H, T, 1)
        d_q, k1, v1 = torch.empty_like(q), *(F.pad(x, (0, 2), value=1.0) for x in (k, v))
        d_k, d_v = (torch.zeros_like(x, dtype=logsumexp.dtype) for x in (k, v))
        for rows, key_tiles in tiles(T, S, *ctx.options):
            tile, d_tile = fold(q, K, rows), fold(d_out, K, rows)
            tile_lse = append(tile, fold(logsumexp, K, rows) / -ctx.scale)
            d_tile_delta = append(d_tile, -fold(delta, K, rows))
            d_q_tile = torch.zeros_like(tile, dtype=logsumexp.dtype)
            for columns in key_tiles:
                weights = FusedAttention.scores(tile_lse, k1, ctx.scale, ctx.shape, rows, columns,
                                                (*ctx.options, mask, segments)).exp2_()
                d_v[:, columns].add_(torch.bmm(weights.mT, d_tile))
                d_scores = torch.bmm(d_tile_delta, v1[:, columns].contiguous().mT).mul_(weights)
                d_q_tile.add_(torch.bmm(d_scores, k[:, columns]))
                d_k[:, columns].add_(torch.bmm(d_scores.mT, tile))
            d_q[:, :, rows] = d_q_tile.div_(math.sqrt(D)).view(B, H, -1, D)
        d_k, d_v = (x.view(B, K, S, D).to(k.dtype) for x in (d_k.div_(math.sqrt(D)), d_v))
        return d_q, d_k, d_v, None, None, None, None


def fused_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """plain_attention without ever storing the (T, S) scores; with dropout, torch's own."""
    if dropout:
        return torch_attention(q, k, v, causal, window, mask, segments, dropout)
    if q.size(2) == 1:  # a single row of scores: nothing to tile
        return plain_attention(q, k, v, causal, window, mask, segments)
    return FusedAttention.apply(q, k, v, causal, window, mask, segments)


def torch_attention(q, k, v, causal=True, window=0, mask=None, segments=None, dropout=0.0):
    """plain_attention by torch's own kernel: on a GPU the fastest there is without a compiler."""
    T, S = q.size(2), k.size(2)
    simple = not (window and window < S) and mask is segments is None
    simple = simple and (not causal or T in (1, S))  # a single query is the last, and sees all
    allowed = None if simple else attention_mask(
        T, S, slice(0, T), slice(0, S), q.device, causal, window, mask, segments)
    if q.is_cuda:  # cuDNN's kernel, the fastest for training, takes 30 ms to plan a new length
        torch.backends.cuda.enable_cudnn_sdp(torch.is_grad_enabled())
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=simple and causal and T > 1,
        enable_gqa=q.size(1) != k.size(1))


# -----------------------------------------------------------------------------
# The loss, twice: all logits at once, and a slice of tokens at a time.


def cap_logits(logits, softcap):
    """Logits squeezed to stay between -softcap and softcap; 0 leaves them. arXiv:2408.00118"""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def plain_loss(x, weight, targets, softcap=0.0, smoothing=0.0, z_loss=0.0):
    """Mean cross-entropy in nats of the logits x (N, C) @ weight (V, C)^T against targets (N,), -1
    ignored, with label smoothing (arXiv:1512.00567) and z-loss (arXiv:2204.02311)."""
    logits = F.linear(x, weight.to(x.dtype)).to(sum_dtype(x.dtype))      # (N, V)
    logits, valid = cap_logits(logits, softcap), targets != -1
    target = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    logsumexp = logits.logsumexp(dim=1)
    losses = logsumexp - (1 - smoothing) * target + z_loss * logsumexp.square()
    if smoothing:
        losses = losses - smoothing * logits.mean(dim=1)
    return (losses * valid).sum() / valid.sum().clamp(min=1)


LOSS_TILE = 2**25  # logits that are held at once on a CPU; a GPU wants larger products


def loss_tile(x, weight, targets, softcap, smoothing, z_loss, with_gradient):
    """-> (the sum of the losses of x (N, C), its gradient by the logits (N, V), or None)"""
    logits = cap_logits(F.linear(x, weight).to(sum_dtype(x.dtype)), softcap)     # (N, V)
    valid, target = (targets != -1)[:, None].to(logits.dtype), targets[:, None].clamp(min=0)
    log_probs = F.log_softmax(logits, dim=1)
    hit = log_probs.gather(1, target)
    logsumexp = logits.gather(1, target) - hit
    losses = z_loss * logsumexp.square() - (1 - smoothing) * hit
    if smoothing:
        losses -= smoothing * log_probs.mean(dim=1, keepdim=True)
    loss = (losses * valid).sum()
    if not with_gradient:
        return loss, None
    # d loss / d logits = softmax(logits) - one-hot(target), which smoothing spreads
    d_logits = log_probs.exp_().mul_(valid * (1 + 2 * z_loss * logsumexp))
    if smoothing:
        d_logits -= valid * (smoothing / len(weight))
    d_logits.scatter_add_(1, target, valid * (smoothing - 1))
    if softcap:
        d_logits.mul_(1 - (logits / softcap).square())
    return loss, d_logits.to(x.dtype)


class FusedLoss(torch.autograd.Function):
    """The gradients are made in forward, where the logits are; backward scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, smoothing, z_loss, tile=loss_tile):
        needs, low = ctx.needs_input_grad[:2], weight.to(x.dtype)
        total = torch.zeros((), dtype=sum_dtype(x.dtype), device=x.device)
        d_x, d_weight = (torch.zeros_like(y) if need else None
                         for y, need in zip((x, weight), needs))
        held = LOSS_TILE if x.device.type == "cpu" else 8 * LOSS_TILE
        step = max(1, min(len(x), held // len(weight)))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            loss, d_logits = tile(x[rows], low, targets[rows], softcap, smoothing, z_loss,
                                  any(needs))
            total += loss
            if needs[0]:
                torch.mm(d_logits, low, out=d_x[rows])
            if needs[1]:
                d_weight += d_logits.T @ x[rows]
        ctx.save_for_backward(d_x, d_weight)
        ctx.count = (targets != -1).sum().clamp(min=1)
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        share = d_loss / ctx.count  # not earlier: a gradient of 1 / count is too small for float16
        d_x, d_weight = (None if d is None else d * share for d in ctx.saved_tensors)
        return d_x, d_weight, None, None, None, None


def fused_loss(x, weight, targets, softcap=0.0, smoothing=0.0, z_loss=0.0):
    """plain_loss without ever storing the (N, V) logits."""
    return FusedLoss.apply(x, weight, targets, softcap, smoothing, z_loss)


# -----------------------------------------------------------------------------
# The model, from what its parts compute with (chapters/kernels.py has faster twins) to the whole.

ACTIVATIONS = {
    "gelu": partial(F.gelu, approximate="tanh"),    # arXiv:1606.08415
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),          # arXiv:2109.08668
    "swiglu": F.silu,                               # arXiv:2002.05202
}


def plain_linear(x, weight, bias=None):
    """x (..., C) times weight (F, C), plus bias (F,), in x's dtype -> (..., F)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def plain_norm(x, weight, bias=None, center=False, eps=1e-6):
    """x (..., C) / root of its mean square, times weight (RMSNorm, arXiv:1910.07467); center takes
    the mean away first and may have a bias (LayerNorm, arXiv:1607.06450)."""
    unit = x.to(sum_dtype(x.dtype))
    if center:
        unit = unit - unit.mean(dim=-1, keepdim=True)
    unit = unit * (unit.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = unit.to(x.dtype) * weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def rotary_table(config, positions):
    """Cosines and sines of the angles by which positions (..., T) rotate, each (..., T, D/2);
    channel pair j rotates by theta^(-2j/D) a token. arXiv:2104.09864"""
    half = torch.arange(config.head_size // 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None] * config.rope_theta ** (-2 * half / config.head_size)
    return angles.cos(), angles.sin()


def plain_rotary(x, cos, sin):
    """Rotate channels (j, j + D/2) of x (B, T, H, D) by angles, cos and sin (T or B, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (y.unsqueeze(-2).to(x.dtype) for y in (cos, sin))         # (..., T, 1, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def sinusoids(positions, C):
    """Positions (..., T) as C sines and cosines -> (..., T, C). arXiv:1706.03762"""
    half = torch.arange(0, C, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None] * 10000.0 ** (-half / C)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :C]


def position_ids(segments):
    """Where tokens are in their segments: position_ids([[0, 0, 1, 1, 1]]) == [[0, 1, 0, 1, 2]]."""
    index = torch.arange(segments.size(1), device=segments.device)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - (index * first).cummax(dim=1).values


BITS = {"int8": 8, "int4": 4}
QUANTIZED = {torch.int8: "int8", torch.uint8: "int4"}  # by the dtype that a file has them in
GROUP = 32  # inputs of a row that share a scale in int4; in int8 a whole row shares one


def round_weights(w, bits):
    """Weights (F, C) -> the nearest integers (F, C), at most 127 or 7, and scales (F,), in int4
    (F, C / GROUP): w is nearly their product."""
    if bits == 4 and w.size(1) % GROUP:
        raise ValueError(f"int4 has a scale for each {GROUP} inputs, and a layer here has "
                         f"{w.size(1)}: take int8")
    top, groups = 2 ** (bits - 1) - 1, w.unflatten(1, (-1, GROUP if bits == 4 else w.size(1)))
    scale = groups.abs().amax(dim=-1).clamp(min=1e-12) / top             # (F, C / GROUP)
    q = (groups / scale[..., None]).round().flatten(1)
    return q.to(torch.int8), scale.squeeze(1) if bits == 8 else scale


def dequantize(weight, scale, dtype):
    """What integers (F, C) and their scales stand for, (F, C); of int4 two are in a byte."""
    if weight.dtype == torch.uint8:
        weight = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).to(dtype) - 8
    scale = scale.view(len(weight), -1, 1).to(dtype)
    return (weight.to(dtype).unflatten(1, (scale.size(1), -1)) * scale).flatten(1)


class QuantProduct(torch.autograd.Function):
    """x (..., C) times quantized weights. Backward makes their floats again: kept, they would take
    the memory that integers save."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return d_y @ dequantize(*ctx.saved_tensors, d_y.dtype), None, None


def plain_quant_linear(layer, x):
    """x (..., C) times the weights that a QuantLinear's integers stand for -> (..., F)."""
    return QuantProduct.apply(x, layer.weight, layer.scale)


# GPT.use sets the functions of one of these rows on the modules of a model.
PLAIN = dict(attention=plain_attention, loss=plain_loss, linear=plain_linear, norm=plain_norm,
             rotary=plain_rotary, quant_linear=plain_quant_linear)
KERNELS = {"plain": PLAIN, "fused": PLAIN | dict(attention=fused_attention, loss=fused_loss),
           "torch": PLAIN | dict(attention=torch_attention, loss=fused_loss)}


def has_bf16_units(device):
    """Whether a device has units for bfloat16 products, with which they are far faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.device(device).type == "cpu" and units


def accelerator():
    """The module chapters/kernels.py with faster twins, or None where it is not there."""
    try:
        from chapters import kernels
    except ImportError:
        return None
    return kernels


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of what comes in; its weights keep their own."""
    linear = staticmethod(plain_linear)

    def forward(self, x):
        return self.linear(x, self.weight, self.bias)


class Head(Linear):
    """The last layer: logits of x (..., C), or given targets their mean loss."""
    loss = staticmethod(plain_loss)

    def forward(self, x, targets=None, **options):
        if targets is None:
            return super().forward(x)
        return self.loss(x.flatten(0, -2), self.weight, targets.flatten(), **options)


class RMSNorm(nn.Module):
    """x / root of its mean square, times a weight, over the last dimension. arXiv:1910.07467"""
    norm, center, eps = staticmethod(plain_norm), False, 1e-6

    def __init__(self, size, bias=False, eps=0.0):
        super().__init__()
        self.eps = eps or self.eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias and self.center else None

    def forward(self, x):
        return self.norm(x, self.weight, self.bias, self.center, self.eps)


class LayerNorm(RMSNorm):
    """(x - mean) / deviation, times a weight, plus a bias. arXiv:1607.06450"""
    center, eps = True, 1e-5


# How positions (T,) or (B, T) enter: (transformer, embedded tokens x) -> (x, rotary table or None).
POSITIONS = {
    "learned": lambda self, x, positions: (x + self.wpe(positions), None),
    "sinusoidal": lambda self, x, positions: (
        x * math.sqrt(x.size(-1)) + sinusoids(positions, x.size(-1)).to(x.dtype), None),
    "rope": lambda self, x, positions: (x, rotary_table(self.config, positions)),
    "none": lambda self, x, positions: (x, None),
}
NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class KVCache:
    """The keys and values of one layer for the tokens so far, (B, K, S, D); `source`: cross's."""

    def __init__(self, config, batch_size, max_tokens, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.n_kv_head, max_tokens, config.head_size)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length, self.source = 0, None

    def append(self, k, v):
        """Add k and v (B, K, T, D); return all keys and values so far, (B, K, S, D)."""
        end = self.length + k.size(2)
        if end > self.k.size(2):
            raise ValueError(f"{end} tokens do not fit into a cache of max_tokens={self.k.size(2)}")
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def choose(self, rows):
        """Go on with these rows, given by their numbers, which may repeat."""
        self.k, self.v = self.k[rows], self.v[rows]
        if self.source is not None:
            self.source = [x[rows] for x in self.source]


class Attention(nn.Module):
    """Multi-head attention; fewer key/value than query heads make it grouped (arXiv:2305.13245).
    With a source it is cross-attention: queries from x, keys and values from the source."""
    attention, rotary = staticmethod(plain_attention), staticmethod(plain_rotary)

    def __init__(self, config):
        super().__init__()
        C, D, bias = config.n_embd, config.head_size, config.bias
        self.head_size, self.dropout = D, config.dropout
        self.q_proj = Linear(C, config.n_head * D, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.o_proj = Linear(config.n_head * D, C, bias=bias)
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None

    def split_heads(self, x, norm=None, table=None):
        """(B, T, H * D) -> (B, H, T, D), normalised, and rotated by the table of its positions."""
        # -1, not n_head: under tensor parallelism each process holds only some of the heads
        x = x.view(*x.shape[:2], -1, self.head_size)                     # (B, T, H, D)
        x = x if norm is None else norm(x)
        x = x if table is None else self.rotary(x, *table)
        return x.transpose(1, 2)

    def forward(self, x, source=None, table=None, cache=None, prefix=None, **mask_options):
        """x (B, T, C), source (B, S, C) or None -> (B, T, C); mask_options as for attention. prefix
        (keys, values, gate) is attended to as well, by all queries, with a softmax of its own."""
        q = self.split_heads(self.q_proj(x), self.q_norm, table)         # (B, H, T, D)
        if source is not None and cache is not None and cache.source is not None:
            k, v = cache.source                                          # (B, K, S, D)
        else:
            read = x if source is None else source
            k = self.split_heads(self.k_proj(read), self.k_norm, table)  # (B, K, T, D)
            v = self.split_heads(self.v_proj(read))
        if cache is not None and source is None:
            k, v = cache.append(k, v)                                    # (B, K, S, D)
        elif cache is not None:
            cache.source = k, v
        dropout = self.dropout if self.training else 0.0
        y = self.attention(q, k, v, dropout=dropout, **mask_options)     # (B, H, T, D)
        if prefix is not None:
            k, v = (x.expand(len(q), -1, -1, -1) for x in prefix[:2])    # (B, K, n, D)
            y = y + prefix[2] * self.attention(q, k, v, causal=False)
        return self.o_proj(y.transpose(1, 2).flatten(2))                 # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with an activation between; SwiGLU (arXiv:2002.05202) adds a gate."""

    def __init__(self, config):
        super().__init__()
        C, gated = config.n_embd, config.activation.endswith("glu")
        hidden = config.n_hidden or (64 * math.ceil(8 * C / 3 / 64) if gated else 4 * C)
        self.gate_proj = Linear(C, hidden, bias=config.bias) if gated else None
        self.up_proj = Linear(C, hidden, bias=config.bias)
        self.down_proj = Linear(hidden, C, bias=config.bias)
        self.activation = config.activation

    def forward(self, x):
        hidden, activation = self.up_proj(x), ACTIVATIONS[self.activation]       # (B, T, F)
        if self.gate_proj is None:
            return self.down_proj(activation(hidden))
        return self.down_proj(activation(self.gate_proj(x)) * hidden)


class Block(nn.Module):
    """Attention, then MLP, each added to the stream; a decoder with an encoder attends to the
    source in between. The norms come before (arXiv:2002.04745), or after as in the original."""

    def __init__(self, config, cross=False):
        super().__init__()
        norm = partial(NORMS[config.norm], config.n_embd, config.bias, config.norm_eps)
        self.norm_first = config.norm_first
        self.attn_norm, self.attn = norm(), Attention(config)
        self.cross_norm, self.cross = (norm(), Attention(config)) if cross else (None, None)
        self.mlp_norm, self.mlp = norm(), MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, table=None, cache=None, memory=None, **mask_options):
        """x (B, T, C) -> (B, T, C); memory is (source, its mask), where there is an encoder."""
        attend = partial(self.attn, table=table, cache=cache, **mask_options)
        if self.cross is not None:
            attend_to_source = partial(self.cross, source=memory[0], mask=memory[1], cache=cache,
                                       causal=False)
        if self.norm_first:
            x = x + self.dropout(attend(self.attn_norm(x)))
            if self.cross is not None:
                x = x + self.dropout(attend_to_source(self.cross_norm(x)))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attn_norm(x + self.dropout(attend(x)))
        if self.cross is not None:
            x = self.cross_norm(x + self.dropout(attend_to_source(x)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


def check_ids(ids, size, lowest=0, what="token id", limit="vocab_size"):
    """ValueError unless ids are from lowest to size - 1. On a GPU, which must not wait, none."""
    for id in ids.aminmax() if ids.device.type == "cpu" and ids.numel() else ():
        if not lowest <= id < size:
            raise ValueError(f"{what} {id.item()} is not from {lowest} to {size - 1}: "
                             f"{limit}={size}")


class Transformer(nn.Module):
    """Embeddings, a stack of blocks and a last norm: ids (B, T) -> (B, T, C)."""

    def __init__(self, config, encoder=False):
        super().__init__()
        self.config, self.recompute = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.causal, cross = config.causal and not encoder, config.cross and not encoder
        n_layer = config.n_encoder_layer if encoder else config.n_layer
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(n_layer))
        norm = NORMS[config.norm](config.n_embd, config.bias, config.norm_eps)
        self.final_norm = norm if config.norm_first else None  # else the last block ends with one
        self.prefix = None  # or a Prefix, by tune()

    def embed(self, ids, positions):
        """-> (the stream (B, T, C) as it begins, the rotary table if positions enter there)"""
        return POSITIONS[self.config.position](self, self.wte(ids), positions)

    def forward(self, ids, cache=None, dtype=None, memory=None, segments=None, x=None):
        """x (B, T, C): the stream, where an earlier stage of a pipeline has embedded the ids."""
        c, T, start = self.config, ids.size(1), cache[0].length if cache else 0
        if start + T > c.block_size:
            raise ValueError(f"{start + T} tokens exceed block_size={c.block_size}")
        check_ids(ids, c.vocab_size)
        if segments is None:
            positions = torch.arange(start, start + T, device=ids.device)
        elif segments.shape != (len(ids), start + T):
            raise ValueError(f"segments of shape {tuple(segments.shape)} must be "
                             f"{(len(ids), start + T)}: a number for each token, cached ones too")
        else:
            positions = position_ids(segments)[:, start:]
        if x is None:
            x, table = self.embed(ids, positions)
            x = self.dropout(x if dtype is None else x.to(dtype))        # (B, T, C)
        else:
            table = rotary_table(c, positions) if c.position == "rope" else None
        mask_options = dict(causal=self.causal, window=c.window, segments=segments)
        prefixes = self.prefix and self.prefix(self, x.dtype)
        for i, block in enumerate(self.blocks):
            options = mask_options | dict(prefix=prefixes and prefixes[i])
            if block is None:  # another stage of a pipeline has it
                continue
            if self.recompute and self.training:
                x = checkpoint(block, x, table, None, memory, use_reentrant=False, **options)
            else:
                x = block(x, table, cache[i] if cache else None, memory, **options)
        return x if self.final_norm is None else self.final_norm(x)


class GPT(nn.Module):
    """A transformer with a head: for the next token, or without `causal` a masked one, or with
    n_classes a class or a number for each text. With `cross` an encoder reads a source first."""

    def __init__(self, config):
        super().__init__()
        self.config, self.trial, self.tuning = config, {}, None
        self.transformer = Transformer(config)
        self.encoder = Transformer(config, encoder=True) if config.cross else None
        self.lm_head = Head(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        self.tie()
        self.initialize()
        self.use("torch")

    def tie(self):
        """Let the head and the encoder share the embedding's matrix. arXiv:1608.05859"""
        table = self.transformer.wte
        head = self.lm_head if self.config.tied and not self.config.n_classes else None
        for part in filter(None, (head, self.encoder and self.encoder.wte)):
            part.weight = table.weight
            if isinstance(table, QuantEmbedding):
                part.scale = table.scale

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

    def use(self, kernels="auto", dtype=None, recompute=False, batch_size=1):
        """Choose the functions to compute with (plain | fused | torch | cuda, or auto, the fastest
        in a trial on batch_size sequences), the dtype (None: the weights'), and recompute:
        activation checkpointing, less memory for more work, arXiv:1604.06174. -> the row's name."""
        check_known(kernels, ("auto", "cuda", *KERNELS), "kernels")
        faster, self.dtype = accelerator(), dtype
        rows = faster.rows(KERNELS, self.device, dtype) if faster else KERNELS
        if kernels == "auto":
            self.trial = faster.trial(self, rows, batch_size) if faster else {}
            kernels = min(self.trial, key=self.trial.get, default="torch")
        if kernels not in rows:
            raise ValueError("kernels=cuda needs an NVIDIA GPU on which NVRTC works, and "
                             "chapters/kernels.py: kernels=auto takes what can run")
        self.set_functions(rows[kernels])
        for part in filter(None, (self.transformer, self.encoder)):
            part.recompute = recompute
        return kernels

    def set_functions(self, functions):
        """Set {name: function} on each module of a class that has a function of that name."""
        for module in self.modules():
            for name, function in functions.items():
                if hasattr(type(module), name):
                    setattr(module, name, function)

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def compute_dtype(self):
        """The dtype of activations: what use() was given, else the weights', or their scales'."""
        return self.dtype or next(p.dtype for p in self.parameters() if p.is_floating_point())

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
        square error. memory is what encode() made of a source; segments (B, S) numbers the texts of
        a row, cached tokens too: a token sees and counts only its own, and 0 is padding."""
        c = self.config
        if c.cross and memory is None:
            raise ValueError("this model reads a source: give memory=model.encode(source)")
        x = self.transformer(ids, cache, self.dtype, memory, segments)   # (B, T, C)
        if c.n_classes:
            return self.classify(x, targets, segments)
        if targets is not None:
            return None, self.mean_loss(x, targets)
        return cap_logits(self.lm_head(x[:, -1:] if last_only else x), c.softcap), None

    def mean_loss(self, x, targets):
        """Mean cross-entropy in nats of what the transformer gives (B, T, C); as forward's."""
        c = self.config
        check_ids(targets, c.vocab_size, lowest=-1)
        extras = dict(smoothing=c.label_smoothing, z_loss=c.z_loss) if self.training else {}
        return self.lm_head(x, targets, softcap=c.softcap, **extras)

    def classify(self, x, targets, segments):
        """A class or a number from the mean over a text's tokens."""
        weights = torch.ones_like(x[..., :1]) if segments is None else segments.unsqueeze(-1) > 0
        logits = self.lm_head((x * weights).sum(1) / weights.sum(1).clamp(min=1)).float()
        if targets is None:
            return logits, None
        if self.config.n_classes == 1:
            return None, F.mse_loss(logits.squeeze(1), targets.float())
        check_ids(targets, self.config.n_classes, what="class", limit="n_classes")
        return None, F.cross_entropy(logits, targets)

    def is_finite(self):
        """Whether all weights are finite: others are worth neither a checkpoint nor a sample."""
        return all(p.isfinite().all() for p in self.parameters())

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Of forward and backward on T tokens, and a source as long: 6 a weight of a product, 12 a
        channel of each key that a query attends to: on average T/2 before it, or its window."""
        T, c = T or self.config.block_size, self.config
        weights = sum(m.in_features * m.out_features for m in self.modules()
                      if isinstance(m, (Linear, QuantLinear)) and not isinstance(m, QuantEmbedding))
        window = min(c.window or T, T)
        before, behind = window - window**2 / (2 * T), 0 if c.causal else T / 2
        keys = c.n_layer * (before + behind + T * c.cross) + c.n_encoder_layer * (before + T / 2)
        return 6 * weights + 12 * c.n_head * c.head_size * keys


# -----------------------------------------------------------------------------
# Quantization: the weights of a finished model in int8 or int4, frozen.

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def swap(model, names, build):
    """Replace each submodule whose own name is in names by build(submodule); -> how many."""
    found = [(parent, name, child) for parent in model.modules()
             for name, child in parent.named_children() if name in names]
    for parent, name, child in found:
        setattr(parent, name, build(child))
    return len(found)


class QuantLinear(nn.Module):
    """A linear layer, frozen, with the integers and scales that round(weights, bits) gives."""
    quant_linear, loss = staticmethod(plain_quant_linear), staticmethod(plain_loss)

    def __init__(self, base, bits=8, round=round_weights):
        super().__init__()
        self.out_features, self.in_features = base.weight.shape
        q, scale = round(base.weight.detach(), bits)
        if bits == 4:
            q = (q + 8).to(torch.uint8)  # 1 to 15
            q = q[:, ::2] | q[:, 1::2] << 4                              # (F, C / 2)
        self.weight, self.scale = (nn.Parameter(w, requires_grad=False) for w in (q, scale))
        self.bias = getattr(base, "bias", None)
        self.packed = None  # the integers in an order that chapters/kernels.py makes

    def forward(self, x, targets=None, **options):
        """As Linear, and with targets as Head."""
        if targets is not None:
            w = dequantize(self.weight, self.scale, x.dtype)
            return self.loss(x.flatten(0, -2), w, targets.flatten(), **options)
        y = self.quant_linear(self, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged(self):
        """The Linear whose weights are what the integers stand for."""
        linear = Linear(self.in_features, self.out_features, bias=False, device="meta")
        w = dequantize(self.weight, self.scale, self.scale.dtype)
        linear.weight, linear.bias = nn.Parameter(w), self.bias
        return linear


class QuantEmbedding(QuantLinear):
    """A table of token embeddings whose rows are made of integers when they are looked up."""

    def forward(self, ids):
        rows = ids.flatten()
        w = dequantize(self.weight[rows], self.scale[rows], self.scale.dtype)
        return w.unflatten(0, ids.shape)


def quantize(model, quant, round=round_weights):
    """Make the linear layers and the head of a plain model int8 or int4, as round does it, and its
    embedding, to the nearest; in place. -> the model"""
    check_known(quant, BITS, "quant")
    if isinstance(model.lm_head, QuantLinear):
        raise ValueError("this model is quantized already: quantize the one it was made from")
    swap(model, (*LINEARS, "lm_head"), partial(QuantLinear, bits=BITS[quant], round=round))
    swap(model, ("wte",), partial(QuantEmbedding, bits=BITS[quant]))
    model.tie()
    model.use("torch", model.dtype)
    return model


# -----------------------------------------------------------------------------
# Fine-tuning: surgery on a finished model, which stays as it is but for what is trained.


class LoRALinear(nn.Module):
    """A linear layer W and beside it a trained product of rank r: W x + alpha / r * B A x, with B
    (F, r) zero at first and A (r, C). arXiv:2106.09685"""

    def __init__(self, base, rank=8, alpha=16.0, dropout=0.0):
        super().__init__()
        n_out, n_in, device = base.out_features, base.in_features, base.weight.device
        if rank > min(n_out, n_in):
            raise ValueError(f"rank={rank} is above that of a layer of {n_out} x {n_in}: take at "
                             f"most {min(n_out, n_in)}")
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, n_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = plain_linear(self.dropout(x), self.lora_A)                 # (..., r)
        return self.base(x) + plain_linear(low, self.lora_B) * self.scale

    def merged(self):
        """The Linear that gives the same, without dropout: the base, changed."""
        linear = self.base.merged() if isinstance(self.base, QuantLinear) else self.base
        linear.weight.data += self.scale * self.lora_B.detach() @ self.lora_A.detach()
        return linear


class Adapter(nn.Module):
    """A linear layer and behind it a bottleneck that adds to its y: y + up(gelu(down(y))), where up
    is zero at first. arXiv:1902.00751"""

    def __init__(self, base, width):
        super().__init__()
        n, device = base.out_features, base.weight.device
        self.base, self.down = base, Linear(n, width, device=device)
        self.up = Linear(width, n, device=device)
        for w in self.up.parameters():
            nn.init.zeros_(w)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(ACTIVATIONS["gelu"](self.down(y)))


class Prefix(nn.Module):
    """n keys and values for each layer that all tokens attend to: arXiv:2101.00190. So that they
    change nothing at first, they have a softmax of their own, and for each head a gate, which is
    zero then: arXiv:2303.16199."""

    def __init__(self, transformer, n):
        super().__init__()
        c, device = transformer.config, transformer.wte.weight.device
        self.gate = nn.Parameter(torch.zeros(c.n_layer, c.n_head, 1, 1, device=device))
        self.k, self.v = (nn.Parameter(torch.randn(c.n_layer, 1, c.n_kv_head, n, c.head_size,
                                                   device=device)) for _ in range(2))

    def forward(self, transformer, dtype):
        """-> for each layer keys and values (1, K, n, D) and gates (H, 1, 1), in this dtype."""
        return [*zip(*(w.to(dtype) for w in (self.k, self.v, self.gate)))]


class Prompt(Prefix):
    """n vectors in the place of the embeddings of a text, arXiv:2104.08691: the blocks make the
    keys and values of them; where positions rotate, theirs lie before the first token's."""

    def __init__(self, transformer, n):
        super().__init__(transformer, 0)
        self.k = self.v = None
        ids = torch.randint(transformer.config.vocab_size, (n,), device=self.gate.device)
        self.embeddings = nn.Parameter(transformer.wte(ids).detach().clone())

    def forward(self, transformer, dtype):
        c, x = transformer.config, self.embeddings.to(dtype)[None]       # (1, n, C)
        cache = [KVCache(c, 1, x.size(1), x.device, dtype) for _ in transformer.blocks]
        positions = torch.arange(-x.size(1), 0, device=x.device)
        table = rotary_table(c, positions) if c.position == "rope" else None
        for block, layer in zip(transformer.blocks, cache):
            x = block(x, table, layer)
        return [(layer.k, layer.v, gate) for layer, gate in zip(cache, self.gate.to(dtype))]


TUNINGS = ("full", "head", "last", "bias", "lora", "adapter", "prefix", "prompt")


@dataclass(frozen=True)
class TuneConfig:
    """What of a model is trained."""
    tune: str = option("full", f"what is trained: {' | '.join(TUNINGS)}, the last blocks as last:N")
    rank: int = option(8, "of lora; channels of an adapter; vectors of a prefix or prompt", 1, 4097)
    alpha: float = option(0.0, "weight of lora: alpha / rank; 0: twice the rank")
    lora_dropout: float = option(0.0, "share of lora's inputs dropped", below=1)
    targets: str | list | tuple = option(LINEARS, "linear layers that get lora", many=True)
    quant: str | None = option(None, "the frozen layers in int8 or int4", known=lambda: BITS)

    def __post_init__(self):
        check_options(self)
        method, _, n = self.tune.partition(":")
        check_known(method, TUNINGS, "tune")
        if (method == "last") != bool(n) or n and not (n.isdecimal() and int(n)):
            raise ValueError(f"tune={self.tune}: last needs a number of blocks, 1 or more, such as "
                             "last:2, and nothing else takes one")
        names = [self.targets] if isinstance(self.targets, str) else [*self.targets]
        vars(self).update(targets=names)  # the class is frozen for everyone else
        for name in names:
            check_known(name, LINEARS, "name in targets")
            if names.count(name) > 1:
                raise ValueError(f"targets: {name} is there twice, leave one out")
        if self.quant and method in ("full", "last"):
            raise ValueError(f"quant={self.quant} freezes what --tune={self.tune} trains: leave it "
                             "out, or take lora")


def tune(model, config):
    """Leave only that of a plain model to be trained which a TuneConfig says, and add it where it
    is new: at first it changes nothing. -> how many parameters are trained"""
    body, (method, _, n) = model.transformer, config.tune.partition(":")
    if n and int(n) > len(body.blocks):
        raise ValueError(f"tune={config.tune}: the model has {len(body.blocks)} blocks")
    model.requires_grad_(method == "full")
    model.tuning = None if method == "full" else TuneConfig(
        **{f.name: getattr(config, f.name) for f in fields(TuneConfig)})  # of a TrainConfig as well
    if config.quant:
        swap(body.blocks, LINEARS, partial(QuantLinear, bits=BITS[config.quant]))
    if method == "lora":
        swap(body.blocks, config.targets, lambda layer: LoRALinear(
            layer, config.rank, config.alpha or 2.0 * config.rank, config.lora_dropout))
    elif method == "adapter":
        swap(body.blocks, ("o_proj", "down_proj"), lambda layer: Adapter(layer, config.rank))
    elif method in ("prefix", "prompt"):
        body.prefix = (Prefix if method == "prefix" else Prompt)(body, config.rank)
    elif method == "last":
        for part in filter(None, (*body.blocks[-int(n):], body.final_norm)):
            part.requires_grad_()
    elif method == "bias":  # arXiv:2106.10199; layers without one get one, zero at first
        for layer in body.blocks.modules():
            if isinstance(layer, (Linear, QuantLinear)) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=model.device))
        for name, p in body.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    elif method == "head" and model.config.tied:  # the embedding stays
        model.config = replace(model.config, tied=False)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    if method == "head" or model.config.n_classes:  # whose head is new
        model.lm_head.requires_grad_()
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not n_trained:
        raise ValueError(f"--tune={config.tune} finds nothing to train: take other --targets")
    return n_trained


def merge(model):
    """Make a tuned model a plain one that gives the same, in place, and give it back; ValueError
    where no plain one does."""
    if isinstance(model.lm_head, QuantLinear):
        raise ValueError("a quantized model is neither trained nor exported: take the run that it "
                         "was made from")
    method = model.tuning.tune if model.tuning else "full"
    if method in ("adapter", "prefix", "prompt") or method == "bias" and not model.config.bias:
        raise ValueError(f"what --tune={method} adds has no place in a plain model, so it cannot "
                         "be merged: take lora, or the run that this one began with")
    swap(model.transformer.blocks, LINEARS,
         lambda layer: layer if isinstance(layer, Linear) else layer.merged())
    model.tuning = None
    return model.requires_grad_()


# -----------------------------------------------------------------------------
# Checkpoints are files in the safetensors format: 8 bytes of length, that much JSON with the dtype,
# shape and place of each tensor and with strings of our own, then the tensors' bytes. No code.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
VERSION = "3"  # of what our checkpoints hold; another version is refused by name


def as_bytes(tensor):
    """The bytes of a dense tensor in main memory, shared with it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_safetensors(file, tensors, metadata):
    """Write {name: tensor} and {name: string} to an open binary file, with the SHA-256 of the
    tensors' bytes as one more string; tokenizer.replacing(path) opens one that appears complete."""
    tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
    checksum, header, end = hashlib.sha256(), {}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, w in tensors.items():
        checksum.update(as_bytes(w))
        header[name] = dict(dtype=names[w.dtype], shape=list(w.shape),
                            data_offsets=[end, end + w.nbytes])
        end += w.nbytes
    header["__metadata__"] = metadata | dict(sha256=checksum.hexdigest())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers start at even addresses
    file.write(len(text).to_bytes(8, "little") + text)
    for w in tensors.values():
        file.write(as_bytes(w))


def read_header(path):
    """-> ([(name, dtype, shape)], {name: string}) of a safetensors file; ValueError if damaged."""
    try:
        with open(path, "rb") as file:
            size, length = os.path.getsize(path) - 8, int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        metadata, end, rows = dict(header.pop("__metadata__", {})), 0, []
        for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[row["dtype"]], row["shape"]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            if row["data_offsets"] != [begin, end] or not (
                    len(shape) < 9 and all(type(n) is int and n >= 0 for n in shape)):
                raise ValueError(f"{name} has another place than its shape wants")
            rows.append((name, dtype, shape))
        if end != size - length:
            raise ValueError(f"{size - length:,} bytes of tensors, where {end:,} should be")
        return rows, metadata
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = error if type(error) is ValueError else "no such header"
        raise ValueError(f"{path} is damaged or not in the safetensors format ({why!s:.99})"
                         ) from None


def read_safetensors(path, only_check=False):
    """{name: tensor} of a safetensors file; ValueError if it is damaged, as its checksum tells."""
    rows, metadata = read_header(path)
    with open(path, "rb") as file:
        start, tensors = 8 + int.from_bytes(file.read(8), "little"), {}
        file.seek(start)
        if metadata.get("sha256") not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
            raise ValueError(f"{path} is damaged: its checksum is not that of its tensors")
        file.seek(start)
        for name, dtype, shape in () if only_check else rows:
            tensors[name] = torch.empty(shape, dtype=dtype)
            if tensors[name].numel():
                file.readinto(as_bytes(tensors[name]))
    return tensors


def save_model(model, file, tensors={}, **progress):
    """Write a model, further {name: tensor} and plain values to a path or an open binary file. Of
    a tuned model only what is trained: its base lies beside it, in base.safetensors."""
    metadata = dict(format="pt", version=VERSION, config=json.dumps(asdict(model.config)),
                    progress=json.dumps(progress))
    if model.tuning:
        metadata |= dict(tuning=json.dumps(asdict(model.tuning)), base=model.base)
    weights = {name: p for name, p in model.named_parameters()  # shared ones once
               if p.requires_grad or not model.tuning}
    with nullcontext(file) if hasattr(file, "write") else open(file, "wb") as opened:
        write_safetensors(opened, weights | tensors, metadata)


def read_progress(path):
    """{"config": a GPTConfig, "tuning": a TuneConfig or None, "base": the checksum of its base, and
    each value that save_model wrote} from a header alone."""
    if Path(path).suffix == ".pt":
        raise ValueError(f"{path} was written by an older version of this program: train again")
    _, metadata = read_header(path)
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} is no checkpoint of this program: it has version "
                         f"{metadata.get('version')!r:.20}, and {VERSION!r} is read")
    try:
        config, tuning = GPTConfig(**json.loads(metadata["config"])), metadata.get("tuning")
        return json.loads(metadata["progress"]) | dict(
            config=config, tuning=tuning and TuneConfig(**json.loads(tuning)),
            base=metadata.get("base"))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its metadata makes no model ({error!s:.200})"
                         ) from None


def check_weights(expected, found, path):
    """ValueError that lists what of the {name: tensor} found in a file is not as expected."""
    shapes, own = ({name: tuple(w.shape) for name, w in ws.items()} for ws in (expected, found))
    wrong = [f"{name} is {own.get(name, 'missing')}, not {shapes.get(name, 'expected')}"
             for name in shapes | own if shapes.get(name) != own.get(name)]
    wrong += [f"{name} is {w.dtype}" for name, w in found.items() if name in expected
              and w.is_floating_point() != expected[name].is_floating_point()]
    if wrong:
        words = " ".join("; ".join(wrong[:6]).split())[:600]  # names may be of any kind and length
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(f"{path} does not hold the weights of its config: {words}{more}")


def from_weights(config, weights, path):
    """The model with these {name: tensor} of a file; ValueError that lists what does not fit."""
    quant = getattr(weights.get("transformer.wte.weight"), "dtype", None)  # of integers, or a float
    try:
        with torch.device("meta"):  # no memory, no random numbers: the weights are replaced at once
            model = GPT(config)
            if quant in QUANTIZED:
                quantize(model, QUANTIZED[quant])
    except RuntimeError as error:  # more numbers than can be counted
        raise ValueError(f"{path} has a config that makes no model: {error!s:.80}") from None
    check_weights(dict(model.named_parameters()), weights, path)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model if quant in QUANTIZED else model.requires_grad_()


def load_tuned(tuning, base, weights, path, device):
    """The model of base.safetensors, tuned, with these {name: tensor} of the file beside it."""
    base_path = Path(path).with_name("base.safetensors")
    header = read_header(base_path)[1] if base_path.exists() else {}
    if not base or header.get("sha256") != base or "tuning" in header:
        raise ValueError(f"{path} holds only what --tune={tuning.tune} trained, and {base_path} is "
                         f"{'another' if header else 'missing'}: copy the one whose sha256 begins "
                         f"with {str(base)[:12]} from where this was trained")
    model, _ = load_model(base_path, device)
    tune(model, tuning)
    check_weights({n: p for n, p in model.named_parameters() if p.requires_grad}, weights, path)
    model.load_state_dict(weights, strict=False)
    model.base = base
    return model


def load_model(path, device="cpu"):
    """-> (the model, {"tensors": what is not a weight, and each value of the progress})."""
    progress = read_progress(path)
    config, tuning, base = (progress.pop(name) for name in ("config", "tuning", "base"))
    tensors = {name: w.to(device) for name, w in read_safetensors(path).items()}
    names = [name for name in tensors if not name.startswith("optimizer.")]
    weights = {name: tensors.pop(name) for name in names}
    model = (load_tuned(tuning, base, weights, path, device) if tuning else
             from_weights(config, weights, path))
    return model, progress | dict(tensors=tensors)
