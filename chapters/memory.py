"""
What a training step holds in memory, in bytes, from the shape of the model alone.

    from chapters.memory import training_memory
    training_memory(model, batch_size=8)       # {"weights": ..., "optimizer": ..., ...}

The model may be on torch's meta device, where no size costs anything. tests/test_plan.py compares
the parts with what torch really keeps, and their sum with what a process really takes.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

from model import LOSS_TILE

PARTS = {  # of a model, by a word in a weight's name
    "norm": "norms", "wte": "embedding", "wpe": "positions", "attn": "attention",
    "cross": "cross-attention", "mlp": "mlp", "lm_head": "head"}
# Measured: memory that glibc keeps and cannot use, as a share of the rest, by --low_memory.
FRAGMENTATION = {False: 0.3, True: 0.1}


def parameters_by_part(model):
    """How many parameters each part has, {"embedding": ..., "mlp": ...}; shared ones count once,
    as embedding."""
    parts = {}
    for name, weight in model.named_parameters():
        part = next(part for word, part in PARTS.items() if word in name)
        parts[part] = parts.get(part, 0) + weight.numel()
    return parts


def hidden_channels(model):
    return model.transformer.blocks[0].mlp.up_proj.out_features


# -----------------------------------------------------------------------------
# What each part of a step keeps.


def saved_by_block(model, kernels="torch", dtype=torch.float32, device="cpu"):
    """Bytes that a block without cross-attention keeps of each token from forward to backward: each
    tensor that the gradient of some operation asks for. Plain kernels keep the steps in between,
    and all scores."""
    c, width, plain, drops = model.config, dtype.itemsize, kernels == "plain", model.config.dropout
    C, K, F = c.n_embd, c.n_kv_head * c.head_size, hidden_channels(model)
    # what each of two norms reads and writes, if plain also in float32; which numbers dropout keeps
    norms = 2 * C * (2 * width + 4 * plain + width * (drops > 0))
    # queries, keys, values, and what attention makes of them; if plain, no head shares its keys
    heads = (4 * C if plain else 2 * C + 2 * K) * width
    if c.qk_norm:
        heads += (C + K) * (width + 4 * plain)
    if c.position == "rope" and plain:
        heads += (C + K) * width
    scores = 0
    if plain:  # after softmax, after the mask, after dropout, and which of them dropout keeps
        scores = c.n_head * c.block_size * width * (3 if drops else 2 if c.causal else 1)
    elif drops and device == "cpu":  # where torch has no fused dropout
        scores = c.n_head * c.block_size * 12
    # what goes into the activation, what comes out, and with a gate the other factor, the product
    hidden = F * width * {"relu": 1, "swiglu": 4}.get(c.activation, 2)
    return norms + heads + scores + hidden


def logits_memory(model, tokens, kernels, dtype, device):
    """Bytes that the loss holds at once: logits and what becomes of them, for one tile of tokens,
    the gradient of the tile before, and the head in a short dtype."""
    c, width = model.config, dtype.itemsize
    logits, tile = tokens * c.vocab_size, LOSS_TILE * (1 if device == "cpu" else 8)
    short = width if width < 4 else 0
    low = short * model.lm_head.weight.numel()
    if kernels == "plain":
        return low + (20 if c.softcap else 16) * logits
    # logits and log-probabilities in float32, then the gradient in dtype, in place if it can be;
    # a softcap's gradient takes two more. The CUDA kernel puts all into the place of the logits.
    each = width if kernels == "cuda" else 16 if c.softcap else 8 + short
    return low + (each + width * (logits > tile)) * min(logits, tile)


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


# -----------------------------------------------------------------------------
# A whole step, and this machine.


def training_memory(model, batch_size, optimizer="muon", kernels="torch", dtype=None,
                    recompute=False, device="cpu"):
    """{part: bytes} of all tensors at the fullest moment of a training step on batch_size whole
    sequences, with a row of kernels, in dtype (None: float32), on a device; recompute is
    activation checkpointing."""
    c, dtype = model.config, dtype or torch.float32
    tokens, width = batch_size * c.block_size, dtype.itemsize
    stream, hidden = tokens * c.n_embd * width, tokens * hidden_channels(model) * width
    saved = tokens * saved_by_block(model, kernels, dtype, device)
    in_block = sum(w.numel() for w in model.transformer.blocks[0].parameters())
    if width < 4:  # products keep the weights they computed with
        saved += width * in_block
    block = stream if recompute else saved
    loss = stream + logits_memory(model, tokens, kernels, dtype, device)
    backward = stream + recompute * saved + (
        3 * tokens * c.n_head * c.block_size * width if kernels == "plain" else 2 * hidden)

    weights, head = 4 * model.n_parameters(), 4 * model.lm_head.weight.numel()
    kept, step = optimizer_memory(model, optimizer)
    later = head + 4 * in_block * (c.n_layer - 1)  # gradients made before the first block's
    moments = [  # the end of forward, the last and the first block's backward, the optimizer's step
        dict(gradients=head, activations=c.n_layer * block + 2 * stream, loss=loss),
        dict(gradients=head, activations=c.n_layer * block, backward=backward),
        dict(gradients=later, activations=block, backward=backward),
        dict(gradients=weights, update=max(step, head * c.tied))]
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    return dict(weights=weights, optimizer=kept) | fullest


def process_memory(parts, base, low_memory=False):
    """Bytes of a process on a CPU: base for the program itself, its tensors, and between these what
    Linux' allocator loses to fragmentation; less where low_memory hands back what is freed."""
    lost = FRAGMENTATION[low_memory] if sys.platform == "linux" else 0
    return base + sum(parts.values()) * (1 + lost)


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
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            free = min(free, int(most) - int(limit.with_name("memory.current").read_text()))
        return free
    except (OSError, ValueError, StopIteration):
        return None
