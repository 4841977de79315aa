"""
Paged keys and values: texts of any length share one pool of memory, with little of it lost.

    blocks = Blocks(model, n_blocks=64, block_tokens=16)
    table = blocks.find(ids)              # the blocks that are known of the beginning of ids
    table.append(blocks.take())           # and one more
    blocks.keep(table[0], block_key(ids, 16))
    blocks.release(table)

A block holds the keys and values of a few tokens, in all layers. A text takes blocks as it grows,
wherever they lie, and its table names them in order (arXiv:2309.06180). A full block is found again
by the tokens that it was made from, so texts that begin alike share it, also when the first of them
has ended: the prefix cache. What no text uses any more is kept until its memory is needed.
"""

import hashlib
from array import array
from collections import Counter

import torch

from model import torch_attention

POOL_BYTES = 2**30  # of keys and values, unless more are asked for


def block_key(ids, n):
    """What the block that ends after n ids is known by: a hash of all that it depends on."""
    return hashlib.sha256(array("q", ids[:n]).tobytes()).digest()


def pool_size(model, n_texts, block_tokens):
    """How many blocks so many texts of full length need; what POOL_BYTES hold is enough, if it is
    one text at least."""
    c, longest = model.config, -(-model.config.block_size // block_tokens)
    block_bytes = (c.n_layer * block_tokens * 2 * c.n_kv_head * c.head_size
                   * model.compute_dtype.itemsize)
    return min(n_texts * longest, max(longest, POOL_BYTES // block_bytes))


class Blocks:
    """n_blocks for block_tokens tokens each. A block is free, or it has users, or it is idle: no
    user, but known. Block 0 is one more, for what is padding."""

    def __init__(self, model, n_blocks, block_tokens):
        c = model.config
        self.n_blocks, self.block_tokens = n_blocks, block_tokens
        self.kv = torch.zeros(c.n_layer, n_blocks + 1, block_tokens, 2, c.n_kv_head, c.head_size,
                              dtype=model.compute_dtype, device=model.device)
        self.free, self.users = [*range(n_blocks, 0, -1)], Counter()
        self.known, self.keys = {}, {}  # {key: block} and {block: key}
        self.idle = {}  # as a set in order: the first was used longest ago

    def n_left(self):
        """How many blocks can be taken."""
        return len(self.free) + len(self.idle)

    def take(self):
        """A block for one user, if need be the one that has been idle for longest."""
        if not self.free:
            block = next(iter(self.idle))
            del self.idle[block], self.known[self.keys.pop(block)]
            self.free.append(block)
        block = self.free.pop()
        self.users[block] = 1
        return block

    def find(self, ids):
        """The known blocks of the beginning of ids, each with one user more. They never hold the
        last of ids, as what the model says after it is needed."""
        table = []
        for n in range(self.block_tokens, len(ids), self.block_tokens):
            block = self.known.get(block_key(ids, n))
            if block is None:
                break
            self.idle.pop(block, None)
            self.users[block] += 1
            table.append(block)
        return table

    def keep(self, block, key):
        """Make a full block known by its key, unless another one is."""
        if self.known.setdefault(key, block) == block:
            self.keys[block] = key

    def release(self, table):
        """Take one user from each block of a table, which is empty then. Its last block becomes
        idle first, since without the blocks before it it is of no use."""
        while table:
            block = table.pop()
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                if block in self.keys:
                    self.idle[block] = None
                else:
                    self.free.append(block)


class PagedLayer:
    """A layer's KVCache in one forward pass, over its part of the pool. Each token is a row of its
    own: `slots` (B,) are where they are written, `texts` are pairs of a table and the lengths up to
    which those of its tokens that are in this pass attend."""

    def __init__(self, kv, slots, texts, length):
        self.kv, self.slots, self.texts, self.length = kv, slots, texts, length

    def append(self, k, v):
        """Write k and v (B, K, 1, D); -> for each token both for its own text, (2, 1, K, S, D), in
        the place of the keys, and nothing in the place of the values."""
        self.kv.flatten(0, 1)[self.slots] = torch.stack((k, v), dim=1).squeeze(3)
        seen = []
        for table, lengths in self.texts:
            kv = self.kv.index_select(0, table).flatten(0, 1)            # (S, 2, K, D)
            kv = kv.permute(1, 2, 0, 3)[:, None]                         # (2, 1, K, S, D)
            seen += [kv[:, :, :, :length] for length in lengths]
        return seen, None


def paged_attention(q, k, v, segments=None, **options):
    """torch_attention; but for what a PagedLayer returns, each row of q (B, H, 1, D) attends to its
    own text, and those that are padding to nothing."""
    if v is not None:
        return torch_attention(q, k, v, segments=segments, **options)
    y = torch.zeros_like(q)
    for i, kv in enumerate(k):
        y[i:i + 1] = torch_attention(q[i:i + 1], *kv, **options)
    return y
