"""
Continuous batching: many texts are written at a time, and each is what it is alone.

    engine = Engine(model, tokenizer)
    engine.submit(Request("def ", SampleConfig(seed=1), emit=print))
    while engine.step(): pass

Texts come and go between two steps, so that none waits for the end of another (Orca, 2022). To the
scheduler a prompt and what was written after it are the same: ids, of which the first n_read have
their keys and values in blocks (chapters/paging.py). A step reads one more id of each text, and
of long prompts as many as fill two forward passes; where the last one was read, the next is drawn.
If no block is left, the youngest text gives its blocks back, and is read again later.

Sums in another order differ in their last bits, and the order depends on the shape of a product.
So each forward pass has exactly max_rows tokens, some of them padding, and each attends alone to
what is before it in its text. Its keys, values and logits are then the same bits whoever else is in
the pass, whether its text was read, written or found in the cache.
"""

import threading
from collections import Counter, deque, namedtuple
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch

from chapters.paging import Blocks, PagedLayer, block_key, paged_attention, pool_size
from model import check_ids
from sample import Continuation, SampleConfig, check_finite, no_space, pick, with_ids

TOTALS = ("steps", "tokens", "prompt_tokens", "hit_tokens", "preempted")

# A token with the text that it completes, its log-probability before temperature and filters, and
# [(id, logprob)] of the likeliest. The last one has a reason: stop | length | cancelled | error.
Token = namedtuple("Token", "id text logprob top reason")


@dataclass(eq=False)
class Request:
    """A prompt, a text or ids, to be continued. emit(Token) is called in the engine's thread. With
    echo prompt_scores become [(id, logprob, top)] of the prompt, whose first id has no logprob."""
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
        """Turn the prompt into ids; ValueError if they cannot be continued."""
        if self.config.overflow != "stop":
            raise ValueError("overflow=slide is not served: leave it out, or call sample.complete")
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


class Engine:
    """The scheduler of at most max_rows texts at a time. It sets the model's attention."""

    def __init__(self, model, tokenizer, max_rows=32, n_blocks=0, block_tokens=16):
        c, longest = model.config, -(-model.config.block_size // block_tokens)
        if c.n_classes or c.cross or not c.causal:
            raise ValueError("only a model that continues a text can be served: this one judges "
                             "texts, fills gaps or reads a source first")
        n_blocks = n_blocks or pool_size(model, max_rows, block_tokens)
        if n_blocks < longest:
            raise ValueError(f"n_blocks={n_blocks} of {block_tokens} tokens cannot hold a text of "
                             f"block_size={c.block_size} tokens: take at least {longest}")
        model.eval().set_functions(dict(attention=paged_attention))
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.blocks = Blocks(model, n_blocks, block_tokens)
        self.rows, self.waiting, self.totals = [], deque(), Counter()  # the oldest first
        self.changed, self.closing = threading.Condition(), False
        self.no_space = no_space(tokenizer).to(model.device)

    # What other threads may call.

    def submit(self, request):
        """Queue a request; ValueError if it cannot be served."""
        request.begin(self.model, self.tokenizer)
        with self.changed:
            if self.closing:
                raise RuntimeError("the engine takes no more requests")
            self.waiting.append(request)
            self.changed.notify()

    def cancel(self, request):
        """End a request before the next step, unless it has ended."""
        request.cancelled = True

    def close(self, cancel=False):
        """Take no more requests; run() returns when those that are there have ended."""
        with self.changed:
            self.closing = True
            for request in (*self.rows, *self.waiting) if cancel else ():
                request.cancelled = True
            self.changed.notify()

    def counts(self):
        """Whole numbers to watch: of now, and totals since the start."""
        blocks = self.blocks
        return dict(dict.fromkeys(TOTALS, 0) | self.totals, rows=len(self.rows),
                    waiting=len(self.waiting), blocks=blocks.n_blocks,
                    blocks_used=blocks.n_blocks - blocks.n_left(), blocks_cached=len(blocks.idle))

    # What the engine's own thread does.

    def run(self):
        """Take steps while there is work, until close()."""
        while not self.closing or self.rows or self.waiting:
            self.step()
            with self.changed:
                self.changed.wait_for(lambda: self.rows or self.waiting or self.closing)

    def step(self):
        """Give each text its next token, and read prompts; -> whether there is work left."""
        with self.changed:
            for request in [r for r in (*self.rows, *self.waiting) if r.cancelled]:
                self.end(request, Token(None, "", None, [], "cancelled"))
            self.admit()
        tokens = self.schedule()
        for start in range(0, len(tokens), self.max_rows):  # of texts that have not failed by now
            some = [t for t in tokens[start:start + self.max_rows] if t[0] in self.rows]
            with self.ending(request for request, _ in some):
                for (request, position), logits in zip(some, self.forward(some)):
                    with self.ending([request]):
                        self.take(request, position, logits)
        self.totals["steps"] += 1
        return bool(self.rows or self.waiting)

    @contextmanager
    def ending(self, requests):
        """What fails in here, such as an emit or for lack of memory, ends these requests alone."""
        try:
            yield
        except Exception as error:
            for request in requests:
                request.error = str(error) or type(error).__name__
                self.end(request, Token(None, "", None, [], "error"))

    def end(self, request, token):
        """Take a request out and give it its last token, unless that was done."""
        with self.changed:
            for own in self.rows, self.waiting:
                if request in own:
                    own.remove(request)
                    self.blocks.release(request.table)
                    with suppress(Exception):  # then nobody is left to be told
                        request.emit(token)

    def lacks(self, request, n):
        """How many blocks a request needs for its first n tokens, beyond those of its table."""
        return -(-n // self.blocks.block_tokens) - len(request.table)

    def admit(self):
        """Start those that wait, in their order, while there are rows and blocks for them."""
        while self.waiting and len(self.rows) < self.max_rows:
            request, blocks = self.waiting[0], self.blocks
            request.table = [] if request.echo else blocks.find(request.ids)
            if self.lacks(request, len(request.ids) + 1) > blocks.n_left():
                return blocks.release(request.table)
            request.n_read = len(request.table) * blocks.block_tokens
            if len(request.ids) == request.n_prompt:
                request.hit_tokens = request.n_read
            self.rows.append(self.waiting.popleft())

    def schedule(self):
        """-> [(request, position)] to read in this step: one of each text, and of long prompts, the
        oldest first, as many as fill two forward passes."""
        tokens, spare = [], 2 * self.max_rows - len(self.rows)
        for request in [*self.rows]:
            n = min(len(request.ids), request.n_read + 1 + spare)
            if self.grow(request, n):
                spare -= n - request.n_read - 1
                tokens += [(request, position) for position in range(request.n_read, n)]
        return tokens

    def grow(self, request, n):
        """Take blocks for n tokens, if need be from the youngest; -> False if that is this one."""
        while request in self.rows and self.lacks(request, n) > 0:
            if self.blocks.n_left():
                request.table.append(self.blocks.take())
            else:  # the oldest never gives any back, so each has its turn
                youngest = self.rows.pop()
                self.blocks.release(youngest.table)
                self.waiting.appendleft(youngest)
                self.totals["preempted"] += 1
        return request in self.rows

    @torch.inference_mode()
    def forward(self, tokens):
        """The logits after each of at most max_rows tokens [(request, position)], each (1, V)."""
        n, ids, positions, slots, texts = self.blocks.block_tokens, [], [], [], []
        for request, own in groupby(tokens, itemgetter(0)):
            own = [position for _, position in own]
            ids += [request.ids[position] for position in own]
            positions += own
            slots += [request.table[position // n] * n + position % n for position in own]
            texts.append((torch.tensor(request.table, device=self.blocks.kv.device),
                          [position + 1 for position in own]))
        padding = [0] * (self.max_rows - len(tokens))
        ids, positions, slots = (torch.tensor(x + padding, device=self.blocks.kv.device)
                                 for x in (ids, positions, slots))       # (B,)
        # as for texts that are padded on the left to the same length: each token in its place
        last = positions.max().item()
        segments = torch.arange(last + 1, device=ids.device) >= last - positions[:, None]
        cache = [PagedLayer(kv, slots, texts, last) for kv in self.blocks.kv]
        logits, _ = self.model(ids[:, None], cache=cache, segments=segments.long())
        return logits[:len(tokens), -1].float().split(1)

    def take(self, request, position, logits):
        """Use the logits after a token: they score the prompt's next one, or give a new one."""
        ids, n, text, size = request.ids, position + 1, request.text, self.blocks.block_tokens
        if request not in self.rows:  # it has ended in this step
            return
        request.n_read = n
        if n % size == 0:
            self.blocks.keep(request.table[n // size - 1], block_key(ids, n))
        check_finite(logits)
        if len(request.prompt_scores) == n < request.n_prompt:
            request.prompt_scores.append((ids[n], *request.score(logits, ids[n])))
        if n < len(ids):
            return
        choices = logits.masked_fill(self.no_space, -torch.inf) if text.heals else logits
        seen = torch.tensor([ids], device=logits.device)
        id = pick(choices, request.config, text.generator, seen, request.n_prompt).item()
        (logprob, top), piece = request.score(logits, id), text.take(id, None)
        self.totals.update(tokens=1)
        if len(ids) == request.n_prompt + 1:
            self.totals.update(prompt_tokens=request.n_prompt, hit_tokens=request.hit_tokens)
        reason = None if text.n_left else "stop" if text.stopped else "length"
        token = Token(id, piece.text, logprob, top, reason)
        request.emit(token) if reason is None else self.end(request, token)
