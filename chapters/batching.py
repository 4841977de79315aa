"""
Continuous batching: many texts are written at a time, each as it is alone.

    engine = Engine(model, tokenizer)
    engine.submit(Request("def ", SampleConfig(seed=1), emit=print))
    while engine.step():
        pass

Texts come and go between two steps: none waits for another's end. A step takes the next token of
each text that is under way, and of those whose prompt is not read yet, up to a limit, more: to the
model a prompt and a text that it has written are the same, tokens whose keys and values are missing.

Keys and values lie in blocks of a few tokens, which a text takes as it grows, anywhere in one pool:
its table says which (arXiv:2309.06180). Texts that begin alike share full blocks, and what has been
read stays until its block is needed: the prefix cache. If no block is left, the youngest text gives
its own back, and is read again later.

Sums in another order differ in their last bits, and which order a matrix product takes depends on
how many rows it has. So each forward pass has exactly max_rows tokens, some of them padding, and
each of them attends on its own to what came before it in its own text. A token's keys, values and
logits are then the same bits whoever its neighbours are, whether its prompt was read or found in
the cache, and whether it was read or written.
"""

import hashlib
import threading
from array import array
from collections import Counter, deque, namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch

from model import check_ids, torch_attention
from sample import Continuation, SampleConfig, pick, with_ids

# -----------------------------------------------------------------------------
# A pool of blocks. Each is free, or has users, or is idle: kept for a prompt that begins with it.


def block_key(ids, n):
    """What the block that ends after n ids is found by: a hash of all that its keys depend on."""
    return hashlib.sha256(array("q", ids[:n]).tobytes()).digest()


class Blocks:
    """Keys and values for n_blocks times block_tokens tokens of all layers. Block 0 is one more,
    for the padding."""

    def __init__(self, model, n_blocks, block_tokens):
        c, dtype = model.config, model.dtype or model.lm_head.weight.dtype
        shape = (c.n_layer, n_blocks + 1, block_tokens, c.n_kv_head, c.head_size)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(2))
        self.free, self.users = [*range(n_blocks, 0, -1)], Counter()
        self.keys, self.known, self.idle = {}, {}, {}  # of blocks; blocks by key; in order of use
        self.n_tokens = block_tokens

    def n_left(self):
        """How many blocks can be taken."""
        return len(self.free) + len(self.idle)

    def take(self):
        """A block for one user; of those that are idle it is the one that was used longest ago."""
        if not self.free:
            block = next(iter(self.idle))
            del self.idle[block], self.known[self.keys.pop(block)]
            self.free.append(block)
        self.users[self.free[-1]] = 1
        return self.free.pop()

    def find(self, ids):
        """The blocks that are known of the beginning of ids, each with one user more. The last of
        ids is never in them: its logits are needed."""
        table = []
        for n in range(self.n_tokens, len(ids), self.n_tokens):
            block = self.known.get(block_key(ids, n))
            if block is None:
                break
            self.idle.pop(block, None)
            self.users[block] += 1
            table.append(block)
        return table

    def keep(self, block, key):
        """Make a full block known, unless another has its key."""
        if self.known.setdefault(key, block) == block:
            self.keys[block] = key

    def release(self, table):
        """Take one user from each block. The end of a text is of no use without its beginning, so
        it is the first to go."""
        for block in reversed(table):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                if block in self.keys:
                    self.idle[block] = None
                else:
                    self.free.append(block)


class PagedLayer:
    """What one layer of the model takes for its KVCache in one forward pass. `texts` are tables of
    blocks, each with the lengths up to which its tokens in this pass attend."""

    def __init__(self, k, v, slots, texts, length):
        self.k, self.v, self.slots, self.texts, self.length = k, v, slots, texts, length

    def append(self, k, v):
        """Write k and v (B, K, 1, D) into their slots -> for each token the keys of its own text
        so far, (1, K, S, D), and the values."""
        seen = []
        for pool, new in (self.k, k), (self.v, v):                       # (n_blocks, n, K, D)
            pool.flatten(0, 1)[self.slots] = new.squeeze(2)
            texts = [pool[table].flatten(0, 1).transpose(0, 1)[None] for table, _ in self.texts]
            seen.append([text[:, :, :end] for text, (_, ends) in zip(texts, self.texts)
                         for end in ends])
        return seen


def paged_attention(q, k, v, segments=None, **options):
    """torch_attention, where k and v may be lists: each row of q (B, H, 1, D) then has its own."""
    if not isinstance(k, list):
        return torch_attention(q, k, v, segments=segments, **options)
    return torch.cat([torch_attention(*own, **options) for own in zip(q.split(1), k, v)])


# -----------------------------------------------------------------------------
# A request, and what it gets.

# A token: the text that it completes, its log-probability before temperature and filters, and
# [(id, logprob)] of the likeliest. The last has a reason: stop, length, cancelled or error.
Token = namedtuple("Token", "id text logprob top reason")


@dataclass(eq=False)
class Request:
    """A prompt, a text or ids, to be continued. emit(Token) is called in the engine's thread; with
    echo prompt_scores become [(id, logprob, top)] of the prompt, where the first has none."""
    prompt: str | list
    config: SampleConfig
    emit: Callable
    n_logprobs: int = 0
    echo: bool = False
    cancelled: bool = False
    error: str | None = None
    hit_tokens: int = 0  # of the prompt, found in the prefix cache
    n_read: int = 0      # of ids, whose keys and values are in the blocks of the table
    table: list = field(default_factory=list)

    def begin(self, model, tokenizer):
        """Turn the prompt into ids; ValueError if it cannot be continued."""
        if self.config.overflow != "stop":
            raise ValueError("overflow=slide would begin a long text anew, with no blocks to share: "
                             "shorten the prompt, or call sample.complete")
        self.config = with_ids(self.config, tokenizer)
        self.text = Continuation(model, tokenizer, self.prompt, self.config, 0)
        self.ids, self.n_prompt = self.text.ids, self.text.n_prompt
        check_ids(torch.tensor(self.ids), model.config.vocab_size)
        self.prompt_scores = [(self.ids[0], None, [])] if self.echo else []

    def score(self, logits, id):
        """-> (the log-probability of an id by logits (1, V), the n_logprobs likeliest)"""
        logprobs = logits.log_softmax(dim=-1)[0]
        best = logprobs.topk(min(self.n_logprobs, len(logprobs)))
        return logprobs[id].item(), [*zip(best.indices.tolist(), best.values.tolist())]


# -----------------------------------------------------------------------------
# The scheduler.


class Engine:
    """Writes the texts of requests, max_rows at a time. It owns the model: its attention is set."""

    def __init__(self, model, tokenizer, max_rows=32, n_blocks=0, block_tokens=16):
        c, longest = model.config, -(-model.config.block_size // block_tokens)
        if c.n_classes or c.cross or not c.causal:
            raise ValueError("only a model that continues texts can be served, and this one "
                             + ("judges them" if c.n_classes else "reads a source first" if c.cross
                                else "fills gaps"))
        if 0 < n_blocks < longest:
            raise ValueError(f"n_blocks={n_blocks} of {block_tokens} tokens cannot hold one text of "
                             f"block_size={c.block_size} tokens: take at least {longest}")
        model.eval().set_functions(dict(attention=paged_attention))
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.n_blocks = n_blocks or max_rows * longest
        self.blocks = Blocks(model, self.n_blocks, block_tokens)
        self.rows, self.waiting, self.totals = [], deque(), Counter()  # the oldest first
        self.changed, self.closing = threading.Condition(), False
        self.no_space = torch.tensor([not token.startswith(b" ")
                                      for token in tokenizer.token_bytes()], device=model.device)

    def submit(self, request):
        """Queue a request, from any thread; ValueError if it cannot be served."""
        request.begin(self.model, self.tokenizer)
        with self.changed:
            if self.closing:
                raise RuntimeError("the engine takes no more requests")
            self.waiting.append(request)
            self.changed.notify()

    def cancel(self, request):
        """End a request before the next step, from any thread, whether it has ended or not."""
        request.cancelled = True

    def close(self, cancel=False):
        """Take no more requests; run() returns when those that are there have ended."""
        with self.changed:
            self.closing = True
            for request in (*self.rows, *self.waiting) if cancel else ():
                request.cancelled = True
            self.changed.notify()

    def run(self):
        """For a thread: take steps while there is work, until close()."""
        while not self.closing or self.rows or self.waiting:
            if not self.step():
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.closing)

    def counts(self):
        """Whole numbers to watch: of now, and totals since the start."""
        used = self.n_blocks - self.blocks.n_left()
        return dict(rows=len(self.rows), waiting=len(self.waiting), blocks=self.n_blocks,
                    blocks_used=used, blocks_cached=len(self.blocks.idle)) | {
            name: self.totals[name] for name in ("steps", "tokens", "prompt_tokens", "hit_tokens",
                                                 "preempted")}

    def step(self):
        """Give each text its next token, and read prompts; -> whether there is work left."""
        with self.changed:
            for request in [r for r in (*self.rows, *self.waiting) if r.cancelled]:
                self.end(request, Token(None, "", None, [], "cancelled"))
            self.admit()
        scheduled = self.schedule()
        for tokens in (scheduled[:self.max_rows], scheduled[self.max_rows:]):
            try:
                logits = self.forward(tokens)
            except Exception as error:
                logits = [error] * len(tokens)
            for (request, position), row in zip(tokens, logits):
                try:
                    self.take(request, position, row)
                except Exception as error:  # one request's, such as what its emit raised
                    request.error = str(error) or type(error).__name__
                    self.end(request, Token(None, "", None, [], "error"))
        self.totals["steps"] += 1
        return bool(self.rows or self.waiting)

    def end(self, request, token):
        """Take a request out, and tell it so by its last token, unless it has been told."""
        if request in self.rows:
            self.rows.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        self.blocks.release(request.table)
        with suppress(Exception):  # nobody is left to be told
            request.emit(token)

    def admit(self):
        """Start those that wait, in their order, while there are rows and blocks for them."""
        while self.waiting and len(self.rows) < self.max_rows:
            request = self.waiting[0]
            request.table = [] if request.echo else self.blocks.find(request.ids)
            if not self.lacks(request, len(request.ids) + 1) <= self.blocks.n_left():
                self.blocks.release(request.table)
                return
            request.n_read = len(request.table) * self.blocks.n_tokens
            if len(request.ids) == request.n_prompt:
                request.hit_tokens = request.n_read
            self.rows.append(self.waiting.popleft())

    def lacks(self, request, n):
        """How many blocks more n tokens of a request need."""
        return -(-n // self.blocks.n_tokens) - len(request.table)

    def schedule(self):
        """-> [(request, position)] of the tokens to read in this step: one of each text, and of
        the oldest that have more, as many as fill two forward passes."""
        tokens, spare = [], 2 * self.max_rows - len(self.rows)
        for request in [*self.rows]:
            n = min(len(request.ids) - request.n_read, 1 + spare)
            if self.grow(request, request.n_read + n):
                spare -= n - 1
                tokens += [(request, request.n_read + i) for i in range(n)]
        return tokens

    def grow(self, request, n):
        """Take blocks for n tokens, if need be from the youngest; -> False if it is this one."""
        while request in self.rows and self.lacks(request, n) > 0:
            if self.blocks.n_left():
                request.table.append(self.blocks.take())
            else:  # the oldest goes on in every step, so that each gets its turn
                youngest = self.rows.pop()
                self.blocks.release(youngest.table)
                self.waiting.appendleft(youngest)
                self.totals["preempted"] += 1
        return request in self.rows

    @torch.inference_mode()
    def forward(self, tokens):
        """Logits of tokens [(request, position)], for each (1, V)."""
        n, padding = self.blocks.n_tokens, self.max_rows - len(tokens)
        ids, positions, slots, texts = [], [], [], []
        for request, own in groupby(tokens, itemgetter(0)):
            own = [position for _, position in own]
            ids += [request.ids[position] for position in own]
            positions += own
            slots += [request.table[position // n] * n + position % n for position in own]
            texts.append((request.table, [position + 1 for position in own]))
        texts += [([0], [1])] * padding
        ids, positions, slots = (torch.tensor(x + [0] * padding, device=self.model.device)
                                 for x in (ids, positions, slots))       # (B,)
        longest = positions.max()
        # as in a batch whose texts are padded on their left: a token counts from its text's start
        segments = torch.arange(longest + 1, device=ids.device) >= longest - positions[:, None]
        layers = [PagedLayer(k, v, slots, texts, longest.item())
                  for k, v in zip(self.blocks.k, self.blocks.v)]
        logits, _ = self.model(ids[:, None], cache=layers, segments=segments.long())
        return logits[:len(tokens), -1].float().split(1)

    def take(self, request, position, logits):
        """Use what the model says after a token: it is the next, or one of the prompt's."""
        ids, n = request.ids, position + 1
        if request not in self.rows:  # it has ended in this step
            return
        request.n_read = n
        if n % self.blocks.n_tokens == 0:
            self.blocks.keep(request.table[position // self.blocks.n_tokens], block_key(ids, n))
        if len(request.prompt_scores) == n < request.n_prompt:
            request.prompt_scores.append((ids[n], *request.score(logits, ids[n])))
        if n < len(ids):
            return
        if not logits.sum().isfinite():
            raise ValueError("the logits are not finite: weights are damaged, or fp16 overflowed")
        text = request.text
        choices = logits.masked_fill(self.no_space, -torch.inf) if text.heals else logits
        seen = torch.tensor([ids], device=logits.device)
        id = pick(choices, request.config, text.generator, seen, request.n_prompt).item()
        logprob, top = request.score(logits, id)
        piece = text.take(id, logprob)
        self.totals["tokens"] += 1
        if text.n_left:
            request.emit(Token(id, piece.text, logprob, top, None))
        else:
            reason = "stop" if text.stopped else "length"
            self.end(request, Token(id, piece.text, logprob, top, reason))
