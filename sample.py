"""
Text from a trained model: a run folder goes in, the continuation of a prompt comes out.

    python sample.py                      # the newest run, from the beginning of a document
    python sample.py runs/stdlib --prompt="def " --temperature=0.7 --top_p=0.95 --n_samples=3
    python sample.py --prompts=questions.txt             # a prompt a line, all in one batch
    python sample.py --prompt="import " --show=logprobs  # how likely each token was
    python sample.py --chat                              # with a model that learned to

A sample ends where the model ends the document, before a stop string, after max_new_tokens, or
when prompt and continuation fill the model's context (block_size), unless --overflow=slide.
"""

import argparse
import hashlib
import math
import random
import re
import sys
import time
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

from tokenizer import Parser, Tokenizer, read_sealed, run_command, share_cores

if __name__ == "__main__":
    share_cores()
if not {"-h", "--help"} & set(sys.argv):  # torch takes two seconds to import; help need not wait
    import torch

    from model import KVCache, check_known, load_model

DEVICES = ("cuda", "mps", "cpu")
MANIFEST = "gpt-manifest-1"
COLD = 1e-6  # temperatures below are 0: a division by them would overflow
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# -----------------------------------------------------------------------------
# The machine: where to compute, and in which precision.


def can_compute(device):
    """Whether torch works there: a device may be missing, or too old for this build of torch."""
    try:
        return (torch.ones(2, device=device) + 1).sum().item() == 4
    except (RuntimeError, AssertionError):
        return False


def pick_device(name="auto"):
    """auto | cuda | cuda:1 | mps | cpu -> the name of a device that works; auto: the first one."""
    check_known(name.partition(":")[0], ("auto", *DEVICES), "device")
    if name == "auto":
        return next(device for device in DEVICES if can_compute(device))
    if not can_compute(name):
        raise ValueError(f"device={name} does not work on this machine: take auto or cpu")
    return name


@lru_cache
def has_fast_bf16(size=512):
    """Whether this CPU multiplies matrices at least 1.5 times as fast in bfloat16 as in float32.
    Measured, in some milliseconds: a CPU without units for bfloat16 is slower in it."""
    fastest = []
    for dtype in (torch.float32, torch.bfloat16):
        x, times = torch.ones(size, size, dtype=dtype), []
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        fastest.append(min(times))
    return fastest[0] >= 1.5 * fastest[1]


def pick_precision(name="auto", device="cpu"):
    """auto | fp32 | bf16 | fp16 -> (name, torch dtype); auto: bf16 where that is fast."""
    check_known(name, ("auto", *PRECISIONS), "precision")
    if name == "auto":
        kind = device.partition(":")[0]
        fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if fast or kind == "cpu" and has_fast_bf16() else "fp32"
    return name, getattr(torch, PRECISIONS[name])


# -----------------------------------------------------------------------------
# Runs: runs/NAME/{tokenizer.json, step_NNNNNN.pt, step_NNNNNN.json} to a model and its tokenizer.


def checkpoints(folder):
    """The checkpoints of a run, {step: path} in the order of the steps."""
    paths = Path(folder).glob("step_*.pt")
    found = [(re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in paths]
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def newest_run(root="runs"):
    """The folder under root with the checkpoint that was written last."""
    written = [path for folder in Path(root).glob("*") for path in checkpoints(folder).values()]
    if not written:
        raise ValueError(f"no run in {root}/: python train.py makes one")
    return max(written, key=lambda path: path.stat().st_mtime).parent


def read_manifest(path):
    """What step_NNNNNN.json, written when all of a checkpoint was, says of it: a dict with step,
    val_loss and digest (sha256). ValueError if it is missing or damaged."""
    note = Path(path).with_suffix(".json")
    if not note.exists():
        raise ValueError(f"{path} was not written to its end, or by an older version: "
                         f"{note.name} is missing")
    manifest = read_sealed(note)
    if manifest.get("format") != MANIFEST:
        raise ValueError(f"{note} has format {manifest.get('format')!r:.40}, this program reads "
                         f"{MANIFEST!r}")
    step, val_loss, digest = (manifest.get(name) for name in ("step", "val_loss", "digest"))
    if not (type(step) is int and note.stem == f"step_{step:06d}" and isinstance(digest, str)
            and (val_loss is None or type(val_loss) in (int, float) and abs(val_loss) < 1e300)):
        raise ValueError(f"{note} is not the manifest of a checkpoint: {step=!r:.40} "
                         f"{val_loss=!r:.40} {digest=!r:.80}")
    return manifest


def check_checkpoint(path, manifest):
    """ValueError unless a checkpoint is, bit for bit, what was written."""
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest["digest"]:
            raise ValueError(f"{path} is damaged: its sha256 is not that in its manifest")


def first_whole(paths, by_loss=False):
    """-> (the first checkpoint of paths that is whole, or with by_loss the one of them with the
    lowest validation loss; what is wrong with those in its way, in words)."""
    manifests, wrong = {}, []
    for path in paths:
        try:
            manifests[path] = read_manifest(path)
        except ValueError as error:
            wrong.append(str(error))
    losses = {path: math.inf if manifest["val_loss"] is None else manifest["val_loss"]
              for path, manifest in manifests.items()}
    for path in sorted(manifests, key=losses.get) if by_loss else manifests:
        try:
            check_checkpoint(path, manifests[path])
            return path, wrong
        except ValueError as error:
            wrong.append(str(error))
    return None, wrong


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def pick_checkpoint(folder, which="best", warn=warn):
    """best (lowest validation loss among those kept) | last | a step -> the path of a checkpoint
    that is whole. Instead of a damaged one, which is named, the next best or newest is taken."""
    folder, which = Path(folder), str(which)
    if not folder.is_dir():
        near = Path("runs", folder)
        hint = f"did you mean {near}?" if near.is_dir() else "python train.py makes a run"
        raise ValueError(f"there is no run folder {folder}: {hint}")
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"{folder} holds no checkpoint (step_NNNNNN.pt): "
                         f"python train.py --out={folder} writes some")
    paths = [*reversed(found.values())]
    if which.isdecimal():
        if int(which) not in found:
            steps = ", ".join(map(str, found))
            raise ValueError(f"{folder} holds no checkpoint of step {which}, only of {steps}")
        paths = [found[int(which)]]
    else:
        check_known(which, ("best", "last", "the number of a step"), "checkpoint")
    path, wrong = first_whole(paths, by_loss=which == "best")
    if path is None:
        raise ValueError(f"{folder} has no checkpoint that is whole: {'; '.join(wrong)}")
    for what in wrong:
        warn(f"{what}; {path.name} is taken instead")
    return path


def load_run(folder, which="best", device="cpu", dtype=None):
    """-> (the model of a run's checkpoint, in eval mode, its weights in dtype; its tokenizer).
    which is what pick_checkpoint takes, or the path that it gave."""
    path = which if isinstance(which, Path) else pick_checkpoint(folder, which)
    words = Path(folder, "tokenizer.json")
    tokenizer = Tokenizer.load(words)
    model, _ = load_model(path, device)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{words} has {tokenizer.n_vocab} tokens, the model {path.name} has "
                         f"{model.config.vocab_size}: put the tokenizer.json of its training there")
    if not model.is_sound():
        raise ValueError(f"{path} holds weights that are not numbers, its training diverged: "
                         "take an earlier checkpoint")
    model = model.to(dtype or torch.float32).eval()
    if device == "cpu":
        model.use("torch")  # for one query at a time the fastest here, tests/benchmark.py found
    return model, tokenizer


# -----------------------------------------------------------------------------
# Logits to one token: a row of small functions, each from logits (B, V) to logits (B, V).


def counts(ids, V):
    """How often each of V tokens occurs in each row of ids (B, S), -1 for none -> (B, V)."""
    n = torch.zeros(len(ids), V + 1, device=ids.device)
    return n.scatter_add(1, ids.remainder(V + 1), torch.ones_like(ids, dtype=n.dtype))[:, :V]


def penalize_repeats(logits, seen, penalty):
    """Make the ids in seen (B, S) less likely: divide positive logits by penalty, multiply negative
    ones; 1 changes nothing. arXiv:1909.05858"""
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty={penalty} must be above 0; 1 changes nothing")
    less = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(counts(seen, logits.size(-1)) > 0, less, logits)


def penalize_counts(logits, written, frequency=0.0, presence=0.0):
    """Subtract `frequency` for each time that a token is in written (B, S), and `presence` once if
    it is there at all: OpenAI's two penalties, on what was written, not on the prompt."""
    for name, value in ("frequency", frequency), ("presence", presence):
        if not math.isfinite(value):
            raise ValueError(f"{name}_penalty={value} must be finite; 0 changes nothing")
    n = counts(written, logits.size(-1))
    return logits - frequency * n - presence * (n > 0)


def ban_repeated_ngrams(logits, seen, n):
    """Rule out each token that would repeat a run of n tokens in seen (B, S). arXiv:1705.04304"""
    if n < 1:
        raise ValueError(f"no_repeat_ngram={n} must be at least 1; leave it out to allow repeats")
    if seen.size(1) < n:
        return logits
    runs = seen.unfold(1, n, 1)                                          # (B, S - n + 1, n)
    again = (runs[..., :-1] == seen[:, None, seen.size(1) - n + 1:]).all(dim=-1)
    return logits.masked_fill(counts(torch.where(again, runs[..., -1], -1), logits.size(-1)) > 0,
                              -torch.inf)


def ban_sequences(logits, seen, sequences):
    """Rule out each token that would complete one of the sequences, lists of ids."""
    for *begin, last in sequences:
        tail = seen[:, seen.size(1) - len(begin):].tolist()
        rows = [i for i, ids in enumerate(tail) if ids == begin]
        logits = logits.index_put((torch.tensor(rows, dtype=torch.long, device=logits.device),
                                   torch.tensor(last, device=logits.device)),
                                  logits.new_tensor(-torch.inf)) if rows else logits
    return logits


def keep_top_k(logits, top_k):
    """Keep the top_k likeliest; the others become -inf. arXiv:1805.04833"""
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to keep all tokens")
    best, ids = logits.topk(min(top_k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best)


def keep_first(logits, ids, p):
    """Keep the first ids, an order of all (B, V), whose probabilities sum to p or more."""
    probabilities = logits.softmax(dim=-1).gather(-1, ids)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over all that come earlier
    return logits.scatter(-1, ids, logits.gather(-1, ids).masked_fill(before >= p, -torch.inf))


def keep_top_p(logits, top_p):
    """Keep the fewest likeliest whose probabilities sum to top_p or more. arXiv:1904.09751"""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; 1 keeps all tokens")
    if top_p == 1:  # rounded sums may get there too early
        return logits
    return keep_first(logits, logits.argsort(dim=-1, descending=True), top_p)


def keep_typical(logits, typical_p):
    """Keep those whose surprise is nearest to the mean, the entropy, until their probabilities sum
    to typical_p or more. arXiv:2202.00666"""
    if not 0 < typical_p <= 1:
        raise ValueError(f"typical_p={typical_p} must be above 0 and at most 1, which keeps all")
    if typical_p == 1:
        return logits
    surprise = -logits.log_softmax(dim=-1)
    entropy = torch.special.entr((-surprise).exp()).sum(dim=-1, keepdim=True)
    return keep_first(logits, (surprise - entropy).abs().argsort(dim=-1), typical_p)


def keep_min_p(logits, min_p):
    """Keep those at least min_p times as likely as the likeliest. arXiv:2407.01082"""
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be between 0, which keeps all tokens, and 1")
    probabilities = logits.softmax(dim=-1)
    limit = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < limit, -torch.inf)


def adjust(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None,
           repetition_penalty=None, frequency_penalty=None, presence_penalty=None,
           no_repeat_ngram=None, banned=(), bias=None, seen=None, n_prompt=0):
    """The logits (B, V) whose softmax the next token is drawn from; what is None is left out, and
    with temperature 0 only the highest counts. seen (B, S) are the ids so far, -1 for none; the
    first n_prompt of them, a number or (B, 1), were not written but given. bias (V,) is added to
    the logits; none of the sequences in banned, lists of ids, is ever completed."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be at least 0, which takes the likeliest")
    if repetition_penalty is not None:
        logits = penalize_repeats(logits, seen, repetition_penalty)
    if frequency_penalty or presence_penalty:
        places = torch.arange(seen.size(1), device=seen.device)
        logits = penalize_counts(logits, torch.where(places < n_prompt, -1, seen),
                                 frequency_penalty or 0.0, presence_penalty or 0.0)
    if no_repeat_ngram is not None:
        logits = ban_repeated_ngrams(logits, seen, no_repeat_ngram)
    logits = ban_sequences(logits if bias is None else logits + bias, seen, banned)
    if temperature < COLD:
        return logits
    logits = logits / temperature
    for keep, limit in ((keep_top_k, top_k), (keep_top_p, top_p), (keep_min_p, min_p),
                        (keep_typical, typical_p)):
        if limit is not None:
            logits = keep(logits, limit)
    return logits


def distribution(logits, **options):
    """The probabilities (B, V) that pick draws with; temperature 0 gives all to the likeliest."""
    logits = adjust(logits, **options)
    if options.get("temperature", 1.0) < COLD:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
    return logits.softmax(dim=-1)


def draw(chances, generator=None):
    """An id for each row of probabilities (B, V): the first at which their running sum reaches a
    random number -> (B,). generator: one for all rows, or a list with each row's own."""
    rows = zip(generator, [1] * len(chances)) if isinstance(generator, list) else [
        (generator, len(chances))]
    random = torch.cat([torch.rand(n, 1, generator=own) for own, n in rows]).to(chances.device)
    sums = chances.cumsum(dim=-1)
    reach = (1 - random) * sums[:, -1:]  # above 0, so that a chance of 0 is never reached first
    return torch.searchsorted(sums, reach).squeeze(-1)


def pick(logits, generator=None, **options):
    """An id for each row of logits (B, V), drawn from distribution(logits, **options) -> (B,)."""
    if options.get("temperature", 1.0) < COLD:
        return adjust(logits, **options).argmax(dim=-1)
    return draw(distribution(logits, **options), generator)


# -----------------------------------------------------------------------------
# Token after token.


def room(model, T, max_new_tokens, overflow="stop"):
    """How many tokens may follow T tokens: max_new_tokens, or what the context still has."""
    block_size = model.config.block_size
    check_known(overflow, ("stop", "slide"), "overflow")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if overflow == "slide" and T:
        return max_new_tokens
    if not 0 < T < block_size:
        raise ValueError(f"the prompt has {T} tokens, this model takes 1 to {block_size - 1} "
                         f"(block_size={block_size}, one must follow): shorten the prompt, or let "
                         "it slide out of sight with overflow=slide")
    return min(max_new_tokens, block_size - T)


def new_cache(model, batch_size, max_tokens):
    dtype = model.dtype or model.lm_head.weight.dtype
    return [KVCache(model.config, batch_size, max_tokens, model.device, dtype)
            for _ in model.transformer.blocks]


def steps(model, ids, n_tokens, cache=True, first=None, n_prompt=None, **options):
    """Yield for each of n_tokens after ids (B, T) what was chosen, (B,), and from which logits,
    (B, V). An id of -1 is padding, before a row that is shorter than others; first (B, V) marks the
    tokens that may come first; other options are those of pick. A context that is full forgets its
    older half."""
    block_size, n_prompt = model.config.block_size, ids.size(1) if n_prompt is None else n_prompt
    padded, start, memory = bool((ids < 0).any()), 0, None  # what comes before start is forgotten
    for _ in range(n_tokens):
        if ids.size(1) - start > block_size:
            start, memory = ids.size(1) - block_size // 2, None
        if cache and memory is None:
            memory = new_cache(model, len(ids), min(block_size, ids.size(1) - start + n_tokens))
        seen = ids[:, start:]
        segments = (seen >= 0).long() if padded else None
        unseen = seen[:, memory[0].length:] if cache else seen           # (B, T), then (B, 1)
        with torch.inference_mode():
            logits, _ = model(unseen.clamp(min=0), cache=memory, segments=segments, last_only=True)
        logits = logits[:, -1].float()                                   # (B, V)
        if not logits.sum().isfinite():
            raise ValueError("the logits are not finite: weights are damaged, or fp16 overflowed")
        allowed = logits if first is None else logits.masked_fill(~first, -torch.inf)
        chosen, first = pick(allowed, seen=ids, n_prompt=n_prompt, **options), None      # (B,)
        ids = torch.cat((ids, chosen[:, None]), dim=1)
        yield chosen, logits


def generate(model, ids, max_new_tokens=200, overflow="stop", **options):
    """Yield the tokens that follow ids (B, T), one tensor (B,) a step, at most until the context
    is full. Options are those of steps. Without the cache the choices are the same, only slower."""
    n_tokens = room(model, ids.size(1), max_new_tokens, overflow)
    for chosen, _ in steps(model, ids, n_tokens, **options):
        yield chosen


def release(text, stop, last=False):
    """-> (what can be shown, what may begin a stop string and waits, whether one is complete):
    release("a = 1 #", ["# end"]) == ("a = 1 ", "#", False). After the last text nothing waits."""
    ends = [text.index(word) for word in stop if word in text]
    if ends:
        return text[:min(ends)], "", True
    begun = [n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])]
    end = len(text) - (0 if last else max(begun, default=0))
    return text[:end], text[end:], False


# What a token adds to a text: whole characters, sometimes none; and how likely the model held it,
# before temperature and filters: its log-probability in nats.
Piece = namedtuple("Piece", "token text logprob")


def ends_of(tokenizer):
    """The ids that end a text or a reply."""
    return {tokenizer.special[name] for name in ("<|endoftext|>", "<|end|>")
            if name in tokenizer.special}


class Row:
    """A text under way: its ids, its random numbers, and what of it may not be shown yet."""

    def __init__(self, model, tokenizer, prompt, max_new_tokens, stop, seed, overflow):
        self.tokenizer, self.stop, self.waiting = tokenizer, stop, ""
        self.space = isinstance(prompt, str) and prompt.endswith(" ")
        if isinstance(prompt, str):  # " name" is one token: the model has seldom seen a space end,
            prompt = tokenizer.encode(prompt[:-1] if self.space else prompt) or [tokenizer.eot]
        self.ids, self.n_prompt = list(prompt), len(prompt)  # so it writes the space anew
        self.left = room(model, len(prompt), max_new_tokens, overflow)
        self.generator, self.decoder = torch.Generator(), tokenizer.decoder()
        self.generator.manual_seed(random.getrandbits(63) if seed is None else seed % 2**63)
        self.ends = ends_of(tokenizer)

    def heals(self):
        """Whether the next token has to begin with the space that the prompt ended in."""
        return self.space and len(self.ids) == self.n_prompt

    def take(self, token, logprob):
        """Add a token -> its Piece; left is 0 when it was the last."""
        text = self.decoder.push(token) if token not in self.ends else ""
        self.waiting += text[1:] if self.heals() else text
        self.ids.append(token)
        self.left = 0 if token in self.ends else self.left - 1
        self.waiting += self.decoder.flush() if not self.left else ""
        text, self.waiting, stopped = release(self.waiting, self.stop, last=not self.left)
        self.left = 0 if stopped else self.left
        return Piece(token, text, logprob)


@lru_cache
def begins_with_space(tokenizer):
    """For each token whether it begins with a space, (V,)."""
    return torch.tensor([token.startswith(b" ") for token in tokenizer.token_bytes()])


def write(model, tokenizer, prompts, max_new_tokens=200, stop=(), seed=None, overflow="stop",
          **options):
    """Yield (which prompt, Piece) for each token that follows prompts, texts or lists of ids, or
    that begins a document after an empty one. All are written together; each text is the one that
    its prompt gets alone, number i with seed + i. <|endoftext|>, <|end|> and stop strings end a
    text and are not in it. Other options are those of steps."""
    if not all(stop):
        raise ValueError("a stop string is empty: leave it out, or give it characters")
    rows = {}
    for i, prompt in enumerate(prompts):
        own_seed = None if seed is None else seed + i
        rows[i] = Row(model, tokenizer, prompt, max_new_tokens, stop, own_seed, overflow)
    while rows:  # once, unless short prompts have room for more tokens than the longest
        longest = max(len(row.ids) for row in rows.values())
        ids = torch.tensor([[-1] * (longest - len(row.ids)) + row.ids for row in rows.values()])
        n_prompt = [[longest - len(row.ids) + row.n_prompt] for row in rows.values()]
        heals = torch.tensor([[row.heals()] for row in rows.values()])
        first = (~heals | begins_with_space(tokenizer)).to(model.device) if heals.any() else None
        n_tokens = max(row.left for row in rows.values())
        if overflow == "stop":
            n_tokens = min(n_tokens, max(1, model.config.block_size - longest))
        for chosen, logits in steps(model, ids.to(model.device), n_tokens, first=first,
                                    n_prompt=torch.tensor(n_prompt, device=model.device),
                                    generator=[row.generator for row in rows.values()], **options):
            said = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1).tolist()
            for (i, row), token, logprob in zip(rows.items(), chosen.tolist(), said):
                if row.left:
                    yield i, row.take(token, logprob)
            if not any(row.left for row in rows.values()):
                break
        rows = {i: row for i, row in rows.items() if row.left}


def stream(model, tokenizer, prompt="", **options):
    """Yield the Pieces of the text that follows one prompt, as they come; options as for write."""
    for _, piece in write(model, tokenizer, [prompt], **options):
        yield piece


def complete(model, tokenizer, prompt="", **options):
    """The text that follows the prompt, as stream gives it: complete(model, tokenizer, "def ")."""
    return "".join(piece.text for piece in stream(model, tokenizer, prompt, **options))


def complete_batch(model, tokenizer, prompts, **options):
    """The text that follows each prompt, all written together: as complete with seed + i."""
    texts = [""] * len(prompts)
    for i, piece in write(model, tokenizer, prompts, **options):
        texts[i] += piece.text
    return texts


# -----------------------------------------------------------------------------
# The likeliest text, and a talk.


def beam_search(model, ids, n_beams=4, max_new_tokens=50, length_penalty=1.0, ends=(), cache=True):
    """-> [(ids that follow ids (1, T), their score)], the best first. Of all continuations of the
    n_beams best texts the best are kept; score: log-probability / length ** length_penalty, so that
    above 0 longer texts are not worse for being longer. A text is complete with an id of ends.
    arXiv:1609.08144"""
    if n_beams < 1:
        raise ValueError(f"n_beams={n_beams} must be at least 1, which takes the likeliest token")
    n_tokens, T = room(model, ids.size(1), max_new_tokens), ids.size(1)
    beams, sums, done = ids, torch.zeros(1, device=model.device), []     # (n, T), (n,)
    memory = new_cache(model, 1, T + n_tokens) if cache else None
    for length in range(1, n_tokens + 1):
        unseen = beams[:, memory[0].length:] if cache else beams
        with torch.inference_mode():
            logits, _ = model(unseen, cache=memory, last_only=True)
        totals = sums[:, None] + logits[:, -1].float().log_softmax(dim=-1)            # (n, V)
        best, places = totals.flatten().topk(min(2 * n_beams, totals.numel()))
        from_beam, token = places // totals.size(-1), places % totals.size(-1)
        ended = torch.isin(token, torch.tensor([*ends], device=token.device))
        for i in ended.nonzero().flatten().tolist():
            if i < n_beams:
                text = [*beams[from_beam[i], T:].tolist(), token[i].item()]
                done.append((text, best[i].item() / length**length_penalty))
        left = (~ended).nonzero().flatten()[:n_beams]
        beams = torch.cat((beams[from_beam[left]], token[left, None]), dim=1)
        sums = best[left]
        if cache:
            for layer in memory:
                layer.choose(from_beam[left])
        longest = n_tokens if length_penalty > 0 else length
        done = sorted(done, key=lambda pair: -pair[1])[:n_beams]
        if not len(left) or len(done) == n_beams and (
                done[-1][1] >= sums.max().item() / longest**length_penalty):
            break
    else:
        done += [(text, total / n_tokens**length_penalty)
                 for text, total in zip(beams[:, T:].tolist(), sums.tolist())]
    return sorted(done, key=lambda pair: -pair[1])[:n_beams]


class Chat:
    """A talk with a model: each reply is written after all that was said, or as much of it as fits:
    the oldest turns, question and answer together, are left out first; `system` stays."""

    def __init__(self, model, tokenizer, system="", max_new_tokens=200, **options):
        self.model, self.tokenizer = model, tokenizer
        self.options = dict(options, max_new_tokens=max_new_tokens)
        self.system = [dict(role="system", content=system)] if system else []
        self.turns = []  # of messages, the user's and the assistant's in turn

    def prompt(self):
        """The ids of what is remembered; room for the reply, up to a quarter of all, is left."""
        block_size = self.model.config.block_size
        limit = block_size - min(self.options["max_new_tokens"], block_size // 4)
        while True:
            ids = self.tokenizer.render_prompt(self.system + self.turns)
            if len(ids) <= limit:
                return ids
            if len(self.turns) == 1:
                raise ValueError(f"this message makes {len(ids)} tokens with what must stay; at "
                                 f"most {limit} leave room for a reply (block_size={block_size})")
            self.turns = self.turns[2:]

    def stream(self, message, **options):
        """Yield the Pieces of the reply to a message. A message that is refused is not remembered;
        of a reply that nobody listens to any more, what was said is."""
        before, text = self.turns, ""
        self.turns = [*before, dict(role="user", content=message)]
        try:
            for piece in stream(self.model, self.tokenizer, self.prompt(),
                                **self.options | options):
                text += piece.text
                yield piece
        except Exception:
            self.turns = before
            raise
        finally:
            if self.turns is not before:
                self.turns = [*self.turns, dict(role="assistant", content=text)]

    def reply(self, message, **options):
        """The whole reply to a message."""
        return "".join(piece.text for piece in self.stream(message, **options))


# -----------------------------------------------------------------------------
# The command.


def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="run folder; without one the newest under runs/")
    add("--prompt", default="", help="text to continue; without one a document begins")
    add("--file", help="a file whose text is the prompt; - reads it from the keyboard or a pipe")
    add("--prompts", help="a file with a prompt a line, all continued together; - as above")
    add("--chat", action="store_true", help="talk; needs a model that was taught to")
    add("--system", default="", help="with --chat: what the assistant is told first")
    add("--max_new_tokens", type=int, default=200, help="longest continuation (default 200)")
    add("--overflow", default="stop",
        help="stop | slide: where the context is full, end or forget its older half (default stop)")
    add("--stop", action="append", default=[],
        help=r"end before this text; \n means a new line; may be given several times")
    add("--n_samples", type=int, default=1, help="how many continuations (default 1)")
    add("--seed", type=int, help="the same seed gives the same text; sample i has seed + i")
    add("--show", default="text",
        help="text | logprobs: each token with its log-probability, coloured (default text)")
    group = parser.add_argument_group("what is drawn")
    add = group.add_argument
    add("--temperature", type=float, default=0.8,
        help="0 always takes the likeliest token, above 1 is wild (default 0.8)")
    add("--top_k", type=int, help="draw from this many of the likeliest tokens")
    add("--top_p", type=float, help="draw from the likeliest tokens of this probability together")
    add("--min_p", type=float, help="draw from tokens this many times as likely as the likeliest")
    add("--typical_p", type=float, help="draw from the least unusual tokens of this probability")
    add("--repetition_penalty", type=float, help="above 1 makes tokens that were there less likely")
    add("--frequency_penalty", type=float, help="taken off a token each time that it was written")
    add("--presence_penalty", type=float, help="taken off a token once it was written")
    add("--no_repeat_ngram", type=int, help="never write the same so many tokens twice")
    add("--ban", action="append", default=[], help="never write this; may be given several times")
    add("--logit_bias", action="append", default=[], metavar="TEXT=NUMBER",
        help="added to the logit of this token, a text as it is written; several times")
    add("--beams", type=int, help="no drawing: the likeliest text that so many beams find")
    add("--length_penalty", type=float, default=1.0,
        help="with --beams: 0 prefers short texts, 1 takes the mean a token (default 1)")
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--checkpoint", default="best", help="best | last | a step (default best)")
    add("--device", default="auto", help="auto | cuda | mps | cpu (default auto)")
    add("--precision", default="fp32", help="auto | fp32 | bf16 | fp16 (default fp32)")
    add("--cache", action=argparse.BooleanOptionalAction, default=True,
        help="--no-cache computes all tokens again at each step: the same text, slower")
    return parser.parse_args()


def read_text(path):
    """The text of a file, or of what is typed or piped in if the path is "-"."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None


def spelled(tokenizer, word):
    """The lists of ids in which a word can be written: at the start, and after a space."""
    if not word:
        raise ValueError("a banned text is empty: leave it out, or give it characters")
    return [tokenizer.encode(word), *([tokenizer.encode(" " + word)] if word[0] != " " else [])]


def biases(tokenizer, given, device):
    """["TEXT=NUMBER", ...] -> what is added to the logits, (V,)."""
    bias = torch.zeros(tokenizer.n_vocab, device=device)
    for part in given:
        text, _, number = part.rpartition("=")
        ids = tokenizer.encode(text)
        if len(ids) != 1 or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
            raise ValueError(f"logit_bias={part} must be a single token and a number, such as "
                             f"' the=-2'; {text!r:.40} makes {len(ids)} tokens")
        bias[ids[0]] += float(number)
    return bias


def coloured(text, logprob):
    """A text on a ground from red, which the model held for unlikely, to green."""
    if not sys.stdout.isatty():
        return text
    share = math.exp(logprob)
    return f"\x1b[48;2;{int(200 * (1 - share))};{int(130 * share)};60m{text}\x1b[0m"


def show_piece(tokenizer, piece, show):
    """Print a piece as it comes: its text, or with logprobs a line with its log-probability."""
    if show == "logprobs":
        token = tokenizer.token_bytes()[piece.token].decode("utf-8", "replace")
        print(f"{piece.logprob:8.3f}  {coloured(repr(token), piece.logprob)}", flush=True)
    else:
        print(piece.text, end="", flush=True)


def show_stream(model, tokenizer, prompt, show, options):
    """Print the prompt and what follows it, as it comes; -> how many tokens that were."""
    for n, piece in enumerate(stream(model, tokenizer, prompt, **options), 1):
        if n == 1:
            print(prompt, end="" if show == "text" else "\n")
        show_piece(tokenizer, piece, show)
    print(flush=True)
    full = max(1, len(tokenizer.encode(prompt))) + n >= model.config.block_size
    if full and n < options["max_new_tokens"] and options["overflow"] == "stop" and (
            piece.token != tokenizer.eot):
        print(f"stopped: the context of {model.config.block_size} tokens is full; "
              "--overflow=slide goes on", file=sys.stderr)
    return n


def show_batch(model, tokenizer, prompts, show, options):
    """Write on all prompts together, then print them one after another; -> how many tokens."""
    pieces = [[] for _ in prompts]
    for i, piece in write(model, tokenizer, prompts, **options):
        pieces[i].append(piece)
    for i, (prompt, own) in enumerate(zip(prompts, pieces), 1):
        print(f"--- {i} of {len(prompts)}")
        print(prompt, end="" if show == "text" else "\n")
        for piece in own:
            show_piece(tokenizer, piece, show)
        print()
    return sum(map(len, pieces))


def show_beams(model, tokenizer, prompt, options):
    """Print the text with the best score; -> how many tokens it has."""
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=model.device)
    ends = ends_of(tokenizer)
    (text, score), *_ = beam_search(model, ids, options.beams, options.max_new_tokens,
                                    options.length_penalty, ends, options.cache)
    print(prompt + tokenizer.decode([id for id in text if id not in ends]))
    print(f"score {score:.3f} by {options.beams} beams", file=sys.stderr)
    return len(text)


def talk(model, tokenizer, system, show, options):
    """Read messages line by line, answer each, until the end of the input; -> how many tokens."""
    chat, n_tokens = Chat(model, tokenizer, system, **options), 0
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        message = sys.stdin.readline()
        if not message:
            return n_tokens
        if message.strip():
            for piece in chat.stream(message.strip()):
                show_piece(tokenizer, piece, show)
                n_tokens += 1
            print(flush=True)


def main():
    options = parse_options()
    check_known(options.show, ("text", "logprobs"), "show")
    if options.n_samples < 1:
        raise ValueError(f"n_samples={options.n_samples} must be at least 1")
    folder, device = options.run or newest_run(), pick_device(options.device)
    precision, dtype = pick_precision(options.precision, device)
    prompt = read_text(options.file) if options.file else options.prompt
    prompts = read_text(options.prompts).splitlines() if options.prompts else [prompt]
    path = pick_checkpoint(folder, options.checkpoint)
    model, tokenizer = load_run(folder, path, device, dtype)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    how = {name: getattr(options, name) for name in (
        "max_new_tokens", "overflow", "cache", "temperature", "top_k", "top_p", "min_p",
        "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
        "no_repeat_ngram")}
    how |= dict(seed=seed, stop=[text.replace(r"\n", "\n") for text in options.stop],
                banned=[ids for word in options.ban for ids in spelled(tokenizer, word)])
    if options.logit_bias:
        how["bias"] = biases(tokenizer, options.logit_bias, device)
    prompts = [prompt for prompt in prompts for _ in range(options.n_samples)]
    start = time.perf_counter()
    if options.chat:
        n_tokens = talk(model, tokenizer, options.system, options.show, how)
    elif options.beams is not None:
        n_tokens = sum(show_beams(model, tokenizer, prompt, options) for prompt in prompts)
    elif len(prompts) == 1:
        n_tokens = show_stream(model, tokenizer, prompts[0], options.show, how)
    else:
        n_tokens = show_batch(model, tokenizer, prompts, options.show, how)
    rate = n_tokens / (time.perf_counter() - start)
    print(f"{path}: {n_tokens} tokens, {rate:,.0f} tokens/s on {device} in {precision}, "
          f"seed {seed}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
