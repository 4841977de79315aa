"""
The model: token ids in, logits or loss out. A GPT in two architectures, its costly parts each
written twice: once to be read, once to be fast.

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
import math
import os
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FORMAT = "gpt-checkpoint-1"  # written into each checkpoint; another format is refused by name

# One architecture is one row of options.
ARCHITECTURES = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu", bias=True, qk_norm=False,
                 zero_init=False, sharing=1),
    "modern": dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True,
                   zero_init=True, sharing=2),  # query heads that share a key/value head
}

# Parameters with a vocabulary of 4,096 (modern) for the first four, of 50,257 (gpt2) for the rest.
SIZES = {
    "tiny": dict(n_layer=2, n_head=2, n_embd=128, block_size=256),             # 0.8M
    "mini": dict(n_layer=4, n_head=4, n_embd=256, block_size=256),             # 4M
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=512),            # 11M
    "base": dict(n_layer=8, n_head=8, n_embd=512, block_size=512),             # 25M
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


@dataclass
class GPTConfig:
    """The shape of a model. What is left None or 0 is filled in from the architecture's row."""
    architecture: str = "modern"    # gpt2 | modern
    vocab_size: int = 50257
    block_size: int = 1024          # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0              # key/value heads; 0: the architecture's share of n_head
    n_embd: int = 768
    dropout: float = 0.0
    position: str | None = None     # learned | rope
    norm: str | None = None         # layernorm | rmsnorm
    activation: str | None = None   # gelu | swiglu
    bias: bool | None = None        # in linear layers and LayerNorm
    qk_norm: bool | None = None     # normalise queries and keys
    zero_init: bool | None = None   # blocks begin as no change: what they write starts at zero
    rope_theta: float = 10000.0

    def __post_init__(self):
        check_known(self.architecture, ARCHITECTURES, "architecture")
        row = dict(ARCHITECTURES[self.architecture])
        sharing = row.pop("sharing")
        for name, value in row.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.n_kv_head = self.n_kv_head or self.n_head // math.gcd(self.n_head, sharing)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"n_embd / n_head = {self.head_size} must be even: rope turns pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        check_known(self.position, POSITIONS, "position")
        check_known(self.norm, NORMS, "norm")
        check_known(self.activation, ACTIVATIONS, "activation")

    @property
    def head_size(self):
        return self.n_embd // self.n_head


# -----------------------------------------------------------------------------
# Attention, three times: written out, in tiles, and torch's own. Same arguments, same result.


def causal_mask(T, S, device, past=None):
    """(T, S), True where a query may look: query t sees the keys up to past + t. By default the
    queries are the last T of the S positions, so that the last one sees everything."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T if past is None else past)


def plain_attention(q, k, v, causal=True):
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, K, S, D) -> (B, H, T, D).
    arXiv:1706.03762"""
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))             # (B, H, T, S)
    if causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], q.device), -torch.inf)
    return F.softmax(scores, dim=-1) @ v                                 # (B, H, T, D)


def wide(dtype):
    """The dtype that sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


QUERY_TILE, KEY_TILE = 128, 256  # the scores of one pair of tiles stay in the processor's cache


def tiles(T, S, causal):
    """The pairs of tiles with anything to compute: (query slice, key slice, past), where the first
    query sees the slice's keys up to number past; past is None where all queries see all keys."""
    for t in range(0, T, QUERY_TILE):
        rows = slice(t, min(t + QUERY_TILE, T))
        visible = S - T + rows.stop if causal else S  # keys that the tile's last query may look at
        for s in range(0, visible, KEY_TILE):
            columns = slice(s, min(s + KEY_TILE, visible))
            past = S - T + rows.start - s
            yield rows, columns, past if causal and past + 1 < columns.stop - s else None


class FusedAttention(torch.autograd.Function):
    """Attention without the (T, S) scores: tiles, an online softmax, and scores made again in
    backward (arXiv:2205.14135). Query heads that share a key head are rows of one matrix."""

    @staticmethod
    def fold(x, K, rows):
        """(B, H, T, D) at the rows of one tile -> (B*K, H/K * t, D)"""
        return x[:, :, rows].reshape(x.size(0) * K, -1, x.size(-1))

    @staticmethod
    def scores(q, k, t, past):
        """One tile of q k^T, (B*K, H/K * t, s), -inf where a query would see its future."""
        scores = torch.bmm(q, k.transpose(1, 2))
        if past is None:
            return scores.to(wide(q.dtype))
        future = torch.full((t, k.size(1)), -torch.inf, dtype=wide(q.dtype), device=q.device)
        return (scores.unflatten(1, (-1, t)) + future.triu_(past + 1)).flatten(1, 2)

    @staticmethod
    def forward(ctx, q, k, v, causal):
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        q = q / math.sqrt(D)
        k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
        fold, out = FusedAttention.fold, torch.empty_like(q)
        logsumexp = q.new_empty(B, H, T, 1, dtype=wide(q.dtype))
        for rows, columns, past in tiles(T, S, causal):
            t = rows.stop - rows.start
            if columns.start == 0:  # a new row of tiles
                tile = fold(q, K, rows)
                highest = tile.new_full((*tile.shape[:2], 1), -torch.inf, dtype=logsumexp.dtype)
                total, mixed = torch.zeros_like(highest), 0
            scores = FusedAttention.scores(tile, k[:, columns], t, past)
            higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
            weights = scores.sub_(higher).exp_()
            shrink = (highest - higher).exp_()  # the sums so far are relative to a lower maximum
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            mixed = mixed * shrink + torch.bmm(weights.to(v.dtype), v[:, columns])
            highest = higher
            out[:, :, rows] = (mixed / total).view(B, H, t, D)
            logsumexp[:, :, rows] = (highest + total.log()).view(B, H, t, 1)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.causal = causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, logsumexp = ctx.saved_tensors
        (B, H, T, D), (BK, S) = q.shape, k.shape[:2]
        K, fold, scale = BK // B, FusedAttention.fold, 1 / math.sqrt(D)
        delta = (d_out * out).sum(dim=-1, keepdim=True)                          # (B, H, T, 1)
        d_q = torch.zeros_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=logsumexp.dtype) for x in (k, v))
        for rows, columns, past in tiles(T, S, ctx.causal):
            t = rows.stop - rows.start
            tile, d_tile = fold(q, K, rows), fold(d_out, K, rows)
            scores = FusedAttention.scores(tile, k[:, columns], t, past)
            weights = scores.sub_(fold(logsumexp, K, rows)).exp_().to(q.dtype)
            d_v[:, columns] += torch.bmm(weights.transpose(1, 2), d_tile)
            d_scores = torch.bmm(d_tile, v[:, columns].transpose(1, 2))
            d_scores = d_scores.sub_(fold(delta, K, rows)).mul_(weights)
            d_q[:, :, rows] += torch.bmm(d_scores, k[:, columns]).view(B, H, t, D) * scale
            d_k[:, columns] += torch.bmm(d_scores.transpose(1, 2), tile)
        return d_q, d_k.view(B, K, S, D).to(k.dtype), d_v.view(B, K, S, D).to(v.dtype), None


def fused_attention(q, k, v, causal=True):
    """plain_attention without ever storing the (T, S) scores."""
    if q.size(2) == 1:
        return plain_attention(q, k, v, causal)  # a single row of scores: nothing to tile
    return FusedAttention.apply(q, k, v, causal)


def torch_attention(q, k, v, causal=True):
    """plain_attention by torch's own kernel: on a GPU the fastest there is without a compiler."""
    T, S = q.size(2), k.size(2)
    mask = causal_mask(T, S, q.device) if causal and 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and T == S,
                                          enable_gqa=q.size(1) != k.size(1))


# -----------------------------------------------------------------------------
# The loss, twice: all logits at once, and a slice of tokens at a time.


def plain_loss(x, weight, targets):
    """Mean cross-entropy in nats of the logits x (N, C) @ weight (V, C)^T against targets (N,),
    -1 ignored."""
    logits = F.linear(x, weight.to(x.dtype)).to(wide(x.dtype))           # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-1)


LOSS_TILE = 1024  # tokens whose logits are held at once


class FusedLoss(torch.autograd.Function):
    """Logits, loss and gradients of LOSS_TILE tokens, then the next: (N, V) is never stored. The
    gradients are made in forward, where the logits are; backward scales them by what comes in."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        low = weight.to(x.dtype)
        total = torch.zeros((), dtype=wide(x.dtype), device=x.device)
        learn = any(ctx.needs_input_grad)
        d_x = torch.empty_like(x) if learn else None
        d_weight = torch.zeros_like(weight) if learn else None
        count = (targets != -1).sum().clamp(min=1)
        for start in range(0, len(x), LOSS_TILE):
            part = slice(start, start + LOSS_TILE)
            wanted = (targets[part] != -1)[:, None]
            target = targets[part, None].clamp(min=0)
            logits = F.linear(x[part], low)                              # (tile, V)
            log_probs = F.log_softmax(logits, dim=-1, dtype=total.dtype)
            total -= (log_probs.gather(1, target) * wanted).sum()
            if learn:  # d loss / d logits = softmax(logits) - one-hot(target)
                d_logits = log_probs.exp_()
                d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1.0))
                d_logits = d_logits.mul_(wanted).to(x.dtype)
                d_x[part] = d_logits @ low
                d_weight += d_logits.T @ x[part]
        ctx.save_for_backward(d_x, d_weight, count)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_x, d_weight, count = ctx.saved_tensors
        share = d_loss / count  # not earlier: a gradient of 1 / count is too small for float16
        return d_x * share.to(d_x.dtype), d_weight * share.to(d_weight.dtype), None


def fused_loss(x, weight, targets):
    """plain_loss without ever storing the (N, V) logits."""
    return FusedLoss.apply(x, weight, targets)


# -----------------------------------------------------------------------------
# The norm, twice: as a formula, and with its backward by hand.


def plain_rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2)) * weight over the last dimension of x (..., C). arXiv:1910.07467"""
    mean_square = x.to(wide(x.dtype)).square().mean(dim=-1, keepdim=True)
    return x * (mean_square + eps).rsqrt().to(x.dtype) * weight.to(x.dtype)


class FusedRMSNorm(torch.autograd.Function):
    """Saves the normalised x alone; backward is three passes where autograd would make a dozen."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
        scale = (length.square_() / x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        unit, weight, scale = ctx.saved_tensors
        low = weight.to(d_y.dtype)
        along = d_y * unit
        d_weight = along.flatten(0, -2).sum(dim=0, dtype=weight.dtype)
        # what points along x would only lengthen it, and the norm takes lengths away
        along = (along @ low[:, None]) / len(low)                        # (..., 1)
        return (d_y * low).sub_(unit * along).mul_(scale), d_weight, None


def fused_rms_norm(x, weight, eps=1e-6):
    """plain_rms_norm in fewer passes over memory."""
    return FusedRMSNorm.apply(x, weight, eps)


# What --kernels chooses from; "auto" takes the fused ones, on a GPU with torch's own attention.
KERNELS = {
    "plain": dict(attention=plain_attention, norm=plain_rms_norm, loss=plain_loss),
    "fused": dict(attention=fused_attention, norm=fused_rms_norm, loss=fused_loss),
    "torch": dict(attention=torch_attention, norm=fused_rms_norm, loss=fused_loss),
}


# -----------------------------------------------------------------------------
# The parts of a block.


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of what comes in; its weights keep their own."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """plain_rms_norm or its twin, with a weight of its own."""

    def __init__(self, size, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.kernel = plain_rms_norm

    def forward(self, x):
        return self.kernel(x, self.weight)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance) * weight + bias over the last dimension. arXiv:1607.06450"""

    def __init__(self, size, bias=True, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


POSITIONS = ("learned", "rope")
NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"), "swiglu": F.silu}  # silu(gate) * up


def rotary_table(config, start, T, device):
    """The angles' cosines and sines for positions start to start + T - 1, each (T, D/2).
    arXiv:2104.09864"""
    half = torch.arange(config.head_size // 2, device=device, dtype=torch.float32)
    speed = config.rope_theta ** (-2 * half / config.head_size)
    angles = torch.arange(start, start + T, device=device, dtype=torch.float32)[:, None] * speed
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair of channels (j, j + D/2) of x (B, H, T, D) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """The keys and values of one layer for the tokens seen so far, (B, K, S, D) each."""

    def __init__(self, config, batch_size, max_tokens, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.n_kv_head, max_tokens, config.head_size)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def append(self, k, v):
        """Remember k and v (B, K, T, D); return all keys and values so far, (B, K, S, D)."""
        end = self.length + k.size(2)
        if end > self.k.size(2):
            raise ValueError(f"{end} tokens do not fit into a cache of max_tokens={self.k.size(2)}")
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention; fewer key/value than query heads make it grouped (arXiv:2305.13245)."""

    def __init__(self, config):
        super().__init__()
        C, D, bias = config.n_embd, config.head_size, config.bias
        self.head_size = D
        self.q_proj = Linear(C, config.n_head * D, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.o_proj = Linear(config.n_head * D, C, bias=bias)
        self.q_norm = RMSNorm(D) if config.qk_norm else None
        self.k_norm = RMSNorm(D) if config.qk_norm else None
        self.kernel = plain_attention

    def split_heads(self, x):
        # -1, not n_head: under tensor parallelism each process holds only some of the heads
        return x.unflatten(-1, (-1, self.head_size))

    def forward(self, x, rotary=None, cache=None):
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                 # (B, H or K, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)                                    # (B, K, S, D)
        y = self.kernel(q, k, v)                                         # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                 # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with a bend between them; SwiGLU (arXiv:2002.05202) adds a gate and is
    narrower, so that it has as many weights."""

    def __init__(self, config):
        super().__init__()
        C, gated = config.n_embd, config.activation == "swiglu"
        hidden = 64 * math.ceil(8 * C / 3 / 64) if gated else 4 * C
        self.gate_proj = Linear(C, hidden, bias=config.bias) if gated else None
        self.up_proj = Linear(C, hidden, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.down_proj = Linear(hidden, C, bias=config.bias)

    def forward(self, x):
        if self.gate_proj is not None:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the stream and added back to it."""

    def __init__(self, config):
        super().__init__()
        norm = NORMS[config.norm]
        self.attn_norm = norm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.mlp_norm = norm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rotary, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# -----------------------------------------------------------------------------
# The whole: ids -> stream of channels -> logits or loss.


class Transformer(nn.Module):
    """Embeddings, a stack of blocks and a last norm: ids (B, T) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = NORMS[config.norm](config.n_embd, bias=config.bias)

    def forward(self, ids, cache=None, dtype=None):
        T, start = ids.size(1), cache[0].length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens exceed block_size={self.config.block_size}")
        x = self.wte(ids)                                                # (B, T, C)
        rotary = None
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, start + T, device=ids.device))
        else:
            rotary = rotary_table(self.config, start, T, ids.device)
        x = self.dropout(x if dtype is None else x.to(dtype))
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, cache[i] if cache else None)
        return self.final_norm(x)


class GPT(nn.Module):
    """A decoder-only language model; the head shares the embedding's matrix (arXiv:1608.05859)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.initialize()
        self.use()

    def initialize(self):
        """GPT-2's: normal, deviation 0.02; what writes to the stream is scaled down by its depth,
        or starts at zero."""
        smaller = 0.0 if self.config.zero_init else (2 * self.config.n_layer) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 * (smaller if writes else 1.0))
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def use(self, kernels="auto", dtype=None):
        """Choose the kernels (a row of KERNELS, or auto) and the dtype to compute in (None: the
        weights' own); neither is part of the model. -> the name of the row."""
        if kernels == "auto":
            kernels = "fused" if self.device.type == "cpu" else "torch"
        check_known(kernels, KERNELS, "kernels")
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = KERNELS[kernels]["attention"]
            elif isinstance(module, RMSNorm):
                module.kernel = KERNELS[kernels]["norm"]
        self.loss, self.dtype = KERNELS[kernels]["loss"], dtype
        return kernels

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, ids, targets=None, cache=None, last_only=False):
        """ids (B, T) -> (logits (B, T, V), None), or if last_only the last position's (B, 1, V).
        With targets (B, T), -1 ignored -> (None, mean cross-entropy in nats)."""
        x = self.transformer(ids, cache, self.dtype)                     # (B, T, C)
        if targets is not None:
            return None, self.loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return self.lm_head(x[:, -1:] if last_only else x), None

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Of forward and backward, in sequences of T tokens: 6 for each weight of a matrix product,
        and attention's two products over the T/2 keys that a causal query sees on average."""
        T, c = T or self.config.block_size, self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * weights + 6 * c.n_layer * c.n_head * c.head_size * T


# -----------------------------------------------------------------------------
# Checkpoints: one dict of plain values and tensors, written whole or not at all.


def save_model(model, path, **state):
    """Write the model, and any further plain values or tensors, to one file that appears whole or
    not at all: temporary name, fsync, rename."""
    weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            state |= {"format": FORMAT, "config": asdict(model.config), "model": weights}
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"{path} could not be written, is its disk full? ({error!r:.40})") from None
    finally:
        part.unlink(missing_ok=True)


def load_model(path, device="cpu"):
    """-> (model on device, the whole dict that was saved). ValueError if damaged or foreign."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["format"]
    except OSError:
        raise
    except Exception as error:  # a damaged file can make torch and its unpickler raise anything
        raise ValueError(f"{path} is damaged or not a checkpoint of this program") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this program reads {FORMAT!r}")
    known = {f.name for f in fields(GPTConfig)}
    with torch.device("meta"):  # no memory, no random numbers: the weights are replaced at once
        model = GPT(GPTConfig(**{name: v for name, v in state["config"].items() if name in known}))
    tied = {"lm_head.weight": state["model"]["transformer.wte.weight"]}
    model.load_state_dict(state["model"] | tied, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    model.use()
    return model, state
