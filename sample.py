"""
Text from a trained model: a run folder goes in, the continuation of a prompt comes out.

    python sample.py                      # the newest run, from the beginning of a document
    python sample.py runs/stdlib --prompt="def " --temperature=0.7 --top_p=0.95 --n_samples=3
    python sample.py --prompts=questions.txt             # a prompt a line, all in one batch
    python sample.py --prompt="import " --show=logprobs  # how likely each token was
    python -m chapters.talk runs/chat                    # a conversation, with a model taught to

A sample ends where the model ends the document, before a stop string, after max_new_tokens, or
when prompt and continuation fill the model's context (block_size), unless --overflow=slide.
"""

import dataclasses
import math
import random
import re
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from model import KVCache, check_known, load_model, option, read_progress, read_safetensors
from tokenizer import Tokenizer, parse_options, run_command

DEVICES = ("cuda", "mps", "cpu")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COLD = 1e-6  # temperatures below are 0: a division by them would overflow
LIMITS = {  # of SampleConfig's numbers: the lowest, the highest, and both in words
    "max_new_tokens": (1, math.inf, "at least 1"),
    "temperature": (0, math.inf, "at least 0, which takes the likeliest"),
    "top_k": (1, math.inf, "at least 1; leave it out to keep all tokens"),
    "top_p": (math.ulp(0), 1, "above 0 and at most 1; 1 keeps all tokens"),
    "min_p": (0, 1, "between 0, which keeps all tokens, and 1"),
    "typical_p": (math.ulp(0), 1, "above 0 and at most 1, which keeps all"),
    "repetition_penalty": (math.ulp(0), sys.float_info.max, "above 0; 1 changes nothing"),
    "frequency_penalty": (-sys.float_info.max, sys.float_info.max, "finite; 0 changes nothing"),
    "presence_penalty": (-sys.float_info.max, sys.float_info.max, "finite; 0 changes nothing"),
    "no_repeat_ngram": (1, math.inf, "at least 1; leave it out to allow repeats")}


@dataclass(frozen=True)
class SampleConfig:
    """How a text is written: how each token is chosen, and where the text ends."""
    max_new_tokens: int = option(200, "longest continuation, in tokens")
    temperature: float = option(0.8, "0 always takes the likeliest token, above 1 is wild")
    top_k: int | None = option(None, "choose among this many of the likeliest tokens")
    top_p: float | None = option(None, "choose among the likeliest tokens that have this "
                                       "probability together")
    min_p: float | None = option(None, "choose among tokens at least this many times as likely as "
                                       "the likeliest")
    typical_p: float | None = option(None, "choose among the least unusual tokens that have this "
                                           "probability together")
    repetition_penalty: float | None = option(None, "above 1 makes earlier tokens less likely")
    frequency_penalty: float = option(0.0, "taken off a token's logit each time it was written")
    presence_penalty: float = option(0.0, "taken off a token's logit once it was written")
    no_repeat_ngram: int | None = option(None, "never write a run of this many tokens twice")
    stop: list = option([], r"end before this text; \n means a new line; may be given several times")
    ban: list = option([], "never write this text (in Python also a list of ids); several times")
    logit_bias: list = option([], "TEXT=NUMBER (in Python also a pair of id and number): added to "
                                  "the logit of this one token; several times")
    seed: int | None = option(None, "the same seed gives the same text; sample i has seed + i")
    overflow: str = option("stop", "stop | slide: where the context is full, end, or forget its "
                                   "older half")
    cache: bool = option(True, "--no-cache computes all tokens again at each step: the same text, "
                               "slower")

    def __post_init__(self):
        check_known(self.overflow, ("stop", "slide"), "overflow")
        for name, (lowest, highest, words) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise ValueError(f"{name}={value} must be {words}")
        for what, texts in ("stop string", self.stop), ("banned text", self.ban):
            if not all(texts):
                raise ValueError(f"a {what} is empty: leave it out, or give it characters")


def with_options(config, options):
    """The config with some fields, {name: value}, replaced."""
    return dataclasses.replace(config, **options) if options else config


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
# Runs: runs/NAME/{tokenizer.json, step_NNNNNN.safetensors} to a model and its tokenizer.


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def checkpoints(folder):
    """The checkpoints of a run, {step: path} in the order of the steps."""
    paths = Path(folder).glob("step_*.safetensors")
    found = [(re.fullmatch(r"step_(\d+)\.safetensors", path.name), path) for path in paths]
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def newest_run(root="runs"):
    """The folder under root with the checkpoint that was written last."""
    written = [path for folder in Path(root).glob("*") for path in checkpoints(folder).values()]
    if not written:
        raise ValueError(f"no run in {root}/: python train.py makes one")
    return max(written, key=lambda path: path.stat().st_mtime).parent


def first_whole(paths, by_loss=False):
    """-> (the first checkpoint of paths whose checksum is right, or with by_loss the one of them
    with the lowest validation loss; what is wrong with those in its way, in words)."""
    losses, wrong = {}, []
    for path in paths:
        try:
            loss = read_progress(path).get("val_loss")
            known = isinstance(loss, int | float) and math.isfinite(loss)
            losses[path] = loss if known else math.inf
        except ValueError as error:
            wrong.append(str(error))
    for path in sorted(losses, key=losses.get) if by_loss else losses:
        try:
            read_safetensors(path)
            return path, wrong
        except ValueError as error:
            wrong.append(str(error))
    return None, wrong


def pick_checkpoint(folder, which="best"):
    """best (lowest validation loss among those kept) | last | a step -> the path of a checkpoint
    that is whole. Instead of a damaged one, which is named, the next best or newest is taken."""
    folder, which = Path(folder), str(which)
    if not folder.is_dir():
        near = Path("runs", folder)
        hint = f"did you mean {near}?" if near.is_dir() else "python train.py makes a run"
        raise ValueError(f"there is no run folder {folder}: {hint}")
    found = checkpoints(folder)
    if not found:
        old = max(folder.glob("step_*.pt"), default=None)
        why = "no checkpoint (step_NNNNNN.safetensors)" if old is None else (
            f"{old.name}, which an older version of this program wrote")
        way_out = "writes some" if old is None else "trains again"
        raise ValueError(f"{folder} holds {why}: python train.py --out={folder} {way_out}")
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
    tokenizer_path = Path(folder, "tokenizer.json")
    tokenizer = Tokenizer.load(tokenizer_path)
    model, _ = load_model(path, device)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{tokenizer_path} has {tokenizer.n_vocab} tokens, the model {path.name} "
                         f"has {model.config.vocab_size}: put the tokenizer.json of its training "
                         "there")
    if not model.is_finite():
        raise ValueError(f"{path} holds weights that are not numbers, its training diverged: "
                         "take an earlier checkpoint")
    model = model.to(dtype or torch.float32).eval()
    model.use("torch")  # for one query at a time the fastest, tests/benchmark.py found
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
    less = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(counts(seen, logits.size(-1)) > 0, less, logits)


def penalize_counts(logits, written, frequency=0.0, presence=0.0):
    """Subtract `frequency` for each time that a token is in written (B, S), and `presence` once if
    it is there at all: OpenAI's two penalties, on what was written, not on the prompt."""
    n = counts(written, logits.size(-1))
    return logits - frequency * n - presence * (n > 0)


def ban_repeated_ngrams(logits, seen, n):
    """Rule out each token that would repeat a run of n tokens in seen (B, S). arXiv:1705.04304"""
    if seen.size(1) < n:
        return logits
    runs = seen.unfold(1, n, 1)                                          # (B, S - n + 1, n)
    again = (runs[..., :-1] == seen[:, None, seen.size(1) - n + 1:]).all(dim=-1)
    next_ids = torch.where(again, runs[..., -1], -1)                     # (B, S - n + 1)
    return logits.masked_fill(counts(next_ids, logits.size(-1)) > 0, -torch.inf)


def ban_sequences(logits, seen, sequences):
    """Rule out each token that would complete one of the sequences, lists of ids."""
    for *begin, last in sequences:
        begin = torch.tensor(begin, dtype=torch.long, device=seen.device)
        tail = seen[:, max(0, seen.size(1) - len(begin)):]
        if tail.size(1) == len(begin):
            token = torch.arange(logits.size(-1), device=logits.device) == last
            completes = (tail == begin).all(dim=-1, keepdim=True) & token             # (B, V)
            logits = logits.masked_fill(completes, -torch.inf)
    return logits


def add_bias(logits, pairs):
    """Add a number to the logits of a token, for each pair (id, number)."""
    ids, numbers = (torch.tensor(column, device=logits.device) for column in zip(*pairs))
    return logits.index_add(1, ids, numbers.to(logits.dtype).expand(len(logits), -1))


def keep_top_k(logits, top_k):
    """Keep the top_k likeliest; the others become -inf. arXiv:1805.04833"""
    best, ids = logits.topk(min(top_k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best)


def keep_first(logits, ids, p):
    """Keep the first ids, an order of all (B, V), whose probabilities sum to p or more."""
    probabilities = logits.softmax(dim=-1).gather(-1, ids)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over all that come earlier
    return logits.scatter(-1, ids, logits.gather(-1, ids).masked_fill(before >= p, -torch.inf))


def keep_top_p(logits, top_p):
    """Keep the fewest likeliest whose probabilities sum to top_p or more. arXiv:1904.09751"""
    if top_p == 1:  # rounded sums may get there too early
        return logits
    return keep_first(logits, logits.argsort(dim=-1, descending=True), top_p)


def keep_min_p(logits, min_p):
    """Keep those at least min_p times as likely as the likeliest. arXiv:2407.01082"""
    probabilities = logits.softmax(dim=-1)
    limit = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < limit, -torch.inf)


def keep_typical(logits, typical_p):
    """Keep those whose surprise is nearest to the mean, the entropy, until their probabilities sum
    to typical_p or more. arXiv:2202.00666"""
    if typical_p == 1:
        return logits
    surprise = -logits.log_softmax(dim=-1)
    entropy = torch.special.entr((-surprise).exp()).sum(dim=-1, keepdim=True)
    return keep_first(logits, (surprise - entropy).abs().argsort(dim=-1), typical_p)


def process_logits(logits, config, seen=None, n_prompt=0):
    """The logits (B, V) whose softmax the next token is sampled from, by a SampleConfig; with
    temperature 0 only the highest counts. seen (B, S) are the ids so far, -1 for none, of which the
    first n_prompt, a number or (B, 1), are the prompt's. ban and logit_bias hold ids, not texts."""
    if any(isinstance(entry, str) for entry in (*config.ban, *config.logit_bias)):
        raise ValueError("ban and logit_bias hold texts, and only write, stream and complete know "
                         "the tokenizer: give ids here")
    if seen is None:
        seen = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
    if config.repetition_penalty is not None:
        logits = penalize_repeats(logits, seen, config.repetition_penalty)
    if config.frequency_penalty or config.presence_penalty:
        in_prompt = torch.arange(seen.size(1), device=seen.device) < n_prompt
        logits = penalize_counts(logits, torch.where(in_prompt, -1, seen),
                                 config.frequency_penalty, config.presence_penalty)
    if config.no_repeat_ngram is not None:
        logits = ban_repeated_ngrams(logits, seen, config.no_repeat_ngram)
    if config.logit_bias:
        logits = add_bias(logits, config.logit_bias)
    logits = ban_sequences(logits, seen, config.ban)
    if config.temperature < COLD:
        return logits
    logits = logits / config.temperature
    for keep, limit in ((keep_top_k, config.top_k), (keep_top_p, config.top_p),
                        (keep_min_p, config.min_p), (keep_typical, config.typical_p)):
        if limit is not None:
            logits = keep(logits, limit)
    return logits


def sample_from(probabilities, generator=None):
    """An id for each row of probabilities (B, V): the first at which their running sum reaches a
    random number -> (B,). generator: one for all rows, or a list with each row's own."""
    B, device = len(probabilities), probabilities.device
    if isinstance(generator, list):
        numbers = torch.cat([torch.rand(1, 1, generator=own) for own in generator])
    else:
        numbers = torch.rand(B, 1, generator=generator)
    sums = probabilities.cumsum(dim=-1)
    reach = (1 - numbers.to(device)) * sums[:, -1:]  # above 0: a probability of 0 is never reached
    return torch.searchsorted(sums, reach).squeeze(-1)


def distribution(logits, config=None, seen=None, n_prompt=0, **options):
    """The probabilities (B, V) that pick samples from; temperature 0 gives all to the likeliest."""
    config = with_options(config or SampleConfig(temperature=1.0), options)
    logits = process_logits(logits, config, seen, n_prompt)
    if config.temperature < COLD:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
    return logits.softmax(dim=-1)


def pick(logits, config=None, generator=None, seen=None, n_prompt=0, **options):
    """An id for each row of logits (B, V) -> (B,). Options are fields of SampleConfig; without them
    and a config, the id is sampled from softmax(logits). seen, n_prompt: as process_logits."""
    config = with_options(config or SampleConfig(temperature=1.0), options)
    logits = process_logits(logits, config, seen, n_prompt)
    if config.temperature < COLD:
        return logits.argmax(dim=-1)
    return sample_from(logits.softmax(dim=-1), generator)


# -----------------------------------------------------------------------------
# Token after token.


def seeded(seed=None):
    """A random number generator, without a seed a new one each time."""
    return torch.Generator().manual_seed(random.getrandbits(63) if seed is None else seed % 2**63)


def n_new_tokens(model, T, config):
    """How many tokens may follow T tokens: max_new_tokens, or what the context still has."""
    block_size = model.config.block_size
    if config.overflow == "slide" and T:
        return config.max_new_tokens
    if not 0 < T < block_size:
        raise ValueError(f"the prompt has {T} tokens, this model takes 1 to {block_size - 1} "
                         f"(block_size={block_size}, one must follow): shorten the prompt, or let "
                         "it slide out of sight with overflow=slide")
    return min(config.max_new_tokens, block_size - T)


def new_cache(model, batch_size, max_tokens):
    """An empty KVCache for each layer."""
    dtype = model.dtype or model.lm_head.weight.dtype
    return [KVCache(model.config, batch_size, max_tokens, model.device, dtype)
            for _ in model.transformer.blocks]


def decode(model, ids, n_tokens, choose, use_cache=True):
    """Yield for each of n_tokens after ids (B, T) what choose(logits (B, V), all ids so far) took,
    (B,), and the logits. The first pass reads the whole prompt (prefill), the others one token
    each. An id of -1 is padding, before a row that is shorter than others. A context that is full
    forgets its older half."""
    block_size, padded = model.config.block_size, bool((ids < 0).any())
    start, cache = 0, None  # what comes before start is forgotten
    for _ in range(n_tokens):
        if ids.size(1) - start > block_size:
            start, cache = ids.size(1) - block_size // 2, None
        if use_cache and cache is None:
            cache = new_cache(model, len(ids), min(block_size, ids.size(1) - start + n_tokens))
        context = ids[:, start:]                                         # (B, S)
        segments = (context >= 0).long() if padded else None
        unseen = context[:, cache[0].length:] if use_cache else context  # (B, S), then (B, 1)
        with torch.inference_mode():
            logits, _ = model(unseen.clamp(min=0), cache=cache, segments=segments, last_only=True)
        logits = logits[:, -1].float()                                   # (B, V)
        if not logits.sum().isfinite():
            raise ValueError("the logits are not finite: weights are damaged, or fp16 overflowed")
        chosen = choose(logits, ids)                                     # (B,)
        ids = torch.cat((ids, chosen[:, None]), dim=1)
        yield chosen, logits


def generate(model, ids, max_new_tokens=None, config=None, generator=None, **options):
    """Yield the tokens that follow ids (B, T), one tensor (B,) a step, at most until the context
    is full. Options are fields of SampleConfig, of which stop has no effect here; generator: one
    for all rows, or a list with each row's own."""
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    config, T = with_options(config or SampleConfig(), options), ids.size(1)
    if generator is None and config.seed is not None:
        generator = [seeded(config.seed + i) for i in range(len(ids))]

    def choose(logits, seen):
        return pick(logits, config, generator, seen, n_prompt=T)

    for chosen, _ in decode(model, ids, n_new_tokens(model, T, config), choose, config.cache):
        yield chosen


def beam_search(model, ids, n_beams=4, max_new_tokens=50, length_penalty=1.0, ends=(), cache=True):
    """-> [(ids that follow ids (1, T), their score)], the best first. Of all continuations of the
    n_beams best texts the best are kept; score: log-probability / length ** length_penalty, so that
    above 0 longer texts are not worse for being longer. A text is complete with an id of ends.
    arXiv:1609.08144"""
    if n_beams < 1:
        raise ValueError(f"n_beams={n_beams} must be at least 1, which takes the likeliest token")
    T, V = ids.size(1), model.config.vocab_size
    n_tokens = n_new_tokens(model, T, SampleConfig(max_new_tokens=max_new_tokens))
    beams, sums, done = ids, torch.zeros(1, device=model.device), []     # (n, T), (n,)
    kv_cache = new_cache(model, 1, T + n_tokens) if cache else None
    for length in range(1, n_tokens + 1):
        unseen = beams[:, kv_cache[0].length:] if cache else beams
        with torch.inference_mode():
            logits, _ = model(unseen, cache=kv_cache, last_only=True)
        totals = sums[:, None] + logits[:, -1].float().log_softmax(dim=-1)            # (n, V)
        best, index = totals.flatten().topk(min(2 * n_beams, totals.numel()))
        from_beam, token = index // V, index % V
        ended = torch.isin(token, torch.tensor([*ends], device=token.device))
        for i in ended[:n_beams].nonzero().flatten().tolist():
            text = [*beams[from_beam[i], T:].tolist(), token[i].item()]
            done.append((text, best[i].item() / length**length_penalty))
        left = (~ended).nonzero().flatten()[:n_beams]
        beams = torch.cat((beams[from_beam[left]], token[left, None]), dim=1)
        sums = best[left]
        for layer in kv_cache or ():
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


# -----------------------------------------------------------------------------
# Text.

# What a token adds to a text: whole characters, sometimes none; and how likely the model held it,
# before temperature and filters: its log-probability in nats.
Piece = namedtuple("Piece", "token text logprob")


def release(text, stop, last=False):
    """-> (what can be shown, what may begin a stop string and waits, whether one is complete):
    release("a = 1 #", ["# end"]) == ("a = 1 ", "#", False). After the last text nothing waits."""
    ends = [text.index(word) for word in stop if word in text]
    if ends:
        return text[:min(ends)], "", True
    begun = [n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])]
    end = len(text) - (0 if last else max(begun, default=0))
    return text[:end], text[end:], False


def end_ids(tokenizer):
    """The ids that end a text or a reply."""
    return {tokenizer.special[name] for name in ("<|endoftext|>", "<|end|>")
            if name in tokenizer.special}


def with_ids(config, tokenizer):
    """The config with ids in place of texts: a banned text as it is written at the start and after
    a space, a bias TEXT=NUMBER as (id, number)."""
    banned, biases = [], []
    for word in config.ban:
        spellings = [word] if not isinstance(word, str) or word[0] == " " else [word, " " + word]
        banned += [tokenizer.encode(s) if isinstance(s, str) else s for s in spellings]
    for entry in config.logit_bias:
        if isinstance(entry, str):
            text, _, number = entry.rpartition("=")
            ids = tokenizer.encode(text)
            if len(ids) != 1 or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
                raise ValueError(f"logit_bias={entry} must be a single token and a number, such as "
                                 f"' the=-2'; {text!r:.40} makes {len(ids)} tokens")
            entry = ids[0], float(number)
        biases.append(entry)
    return dataclasses.replace(config, ban=banned, logit_bias=biases)


@lru_cache
def begins_with_space(tokenizer):
    """For each token whether it begins with a space, (V,)."""
    return torch.tensor([token.startswith(b" ") for token in tokenizer.token_bytes()])


class Continuation:
    """A text under way: its ids, its random numbers, and what of it may not be shown yet."""

    def __init__(self, model, tokenizer, prompt, config, seed):
        # Token healing: " name" is one token, so the model has seldom seen a text that ends in a
        # space. The space is taken off the prompt, and the first token has to begin with it.
        self.heals = isinstance(prompt, str) and prompt.endswith(" ")
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt.removesuffix(" ")) or [tokenizer.eot]
        self.ids, self.n_prompt = list(prompt), len(prompt)
        self.n_left = n_new_tokens(model, len(prompt), config)
        self.generator, self.decoder, self.waiting = seeded(seed), tokenizer.decoder(), ""
        self.stop, self.ends = config.stop, end_ids(tokenizer)

    def take(self, token, logprob):
        """Add a token -> its Piece; n_left is 0 when it was the last."""
        text = self.decoder.push(token) if token not in self.ends else ""
        self.waiting += text[1:] if self.heals else text
        self.heals = False
        self.ids.append(token)
        self.n_left = 0 if token in self.ends else self.n_left - 1
        self.waiting += self.decoder.flush() if not self.n_left else ""
        text, self.waiting, stopped = release(self.waiting, self.stop, last=not self.n_left)
        self.n_left = 0 if stopped else self.n_left
        return Piece(token, text, logprob)


def write(model, tokenizer, prompts, config=SampleConfig(), **options):
    """Yield (which prompt, Piece) for each token that follows prompts, texts or lists of ids, or
    that begins a document after an empty one. All are written together; each text is the one that
    its prompt gets alone, number i with seed + i. <|endoftext|>, <|end|> and stop strings end a
    text and are not in it. Options are fields of SampleConfig."""
    config = with_ids(with_options(config, options), tokenizer)
    texts = {}
    for i, prompt in enumerate(prompts):
        seed = None if config.seed is None else config.seed + i
        texts[i] = Continuation(model, tokenizer, prompt, config, seed)
    while texts:  # once, unless short prompts leave space for more tokens than the longest
        rows = [*texts.values()]
        longest = max(len(row.ids) for row in rows)
        n_padding = [longest - len(row.ids) for row in rows]
        ids = torch.tensor([[-1] * n + row.ids for n, row in zip(n_padding, rows)])   # (B, T)
        n_prompt = torch.tensor([[n + row.n_prompt] for n, row in zip(n_padding, rows)])
        n_prompt, generators = n_prompt.to(model.device), [row.generator for row in rows]
        n_tokens = max(row.n_left for row in rows)
        if config.overflow == "stop":
            n_tokens = min(n_tokens, max(1, model.config.block_size - longest))

        def choose(logits, seen):
            if any(row.heals for row in rows):
                wrong = torch.tensor([[row.heals] for row in rows]) & ~begins_with_space(tokenizer)
                logits = logits.masked_fill(wrong.to(logits.device), -torch.inf)
            return pick(logits, config, generators, seen, n_prompt)

        for chosen, logits in decode(model, ids.to(model.device), n_tokens, choose, config.cache):
            logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
            for i, token, logprob in zip(texts, chosen.tolist(), logprobs.tolist()):
                if texts[i].n_left:
                    yield i, texts[i].take(token, logprob)
            if not any(row.n_left for row in rows):
                break
        texts = {i: row for i, row in texts.items() if row.n_left}


def stream(model, tokenizer, prompt="", config=SampleConfig(), **options):
    """Yield the Pieces of the text that follows one prompt, as they come; options as for write."""
    for _, piece in write(model, tokenizer, [prompt], config, **options):
        yield piece


def complete(model, tokenizer, prompt="", config=SampleConfig(), **options):
    """The text that follows the prompt; options are fields of SampleConfig:
    complete(model, tokenizer, "def ", temperature=0, max_new_tokens=20)."""
    [text] = complete_batch(model, tokenizer, [prompt], config, **options)
    return text


def complete_batch(model, tokenizer, prompts, config=SampleConfig(), **options):
    """The text that follows each prompt, all written together: as complete with seed + i."""
    texts = [""] * len(prompts)
    for i, piece in write(model, tokenizer, prompts, config, **options):
        texts[i] += piece.text
    return texts


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class Command:
    """What is continued, how it is shown, and where it is computed."""
    run: str | None = option(None, "run folder; without one the newest under runs/",
                             positional=True)
    prompt: str = option("", "text to continue; without one a document begins")
    file: str | None = option(None, "a file whose text is the prompt; - reads it from the keyboard "
                                    "or a pipe")
    prompts: str | None = option(None, "a file with a prompt a line, all continued together; - as "
                                       "for --file")
    n_samples: int = option(1, "how many continuations of each prompt")
    show: str = option("text", "text | logprobs: each token with its log-probability, coloured")
    beams: int | None = option(None, "no sampling: the likeliest text that so many beams find")
    length_penalty: float = option(1.0, "with --beams: 0 prefers short texts, 1 takes the mean a "
                                        "token")
    checkpoint: str = option("best", "best | last | a step")
    device: str = option("auto", "auto | cuda | mps | cpu")
    precision: str = option("fp32", "auto | fp32 | bf16 | fp16")

    def __post_init__(self):
        check_known(self.show, ("text", "logprobs"), "show")
        if self.n_samples < 1:
            raise ValueError(f"n_samples={self.n_samples} must be at least 1")


def read_text(path):
    """The text of a file, or of what is typed or piped in if the path is "-"."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None


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


def show_texts(model, tokenizer, prompts, show, config):
    """Print each prompt and what follows it, a single one as it comes; -> how many tokens."""
    pieces, end = [[] for _ in prompts], "" if show == "text" else "\n"
    for i, piece in write(model, tokenizer, prompts, config):
        pieces[i].append(piece)
        if len(prompts) == 1:
            print(prompts[0] + end if len(pieces[0]) == 1 else "", end="")
            show_piece(tokenizer, piece, show)
    if len(prompts) == 1:
        print(flush=True)
        full = max(1, len(tokenizer.encode(prompts[0]))) + len(pieces[0]) >= model.config.block_size
        if (full and len(pieces[0]) < config.max_new_tokens and config.overflow == "stop"
                and piece.token != tokenizer.eot):
            print(f"stopped: the context of {model.config.block_size} tokens is full; "
                  "--overflow=slide goes on", file=sys.stderr)
        return len(pieces[0])
    for i, (prompt, own) in enumerate(zip(prompts, pieces), 1):
        print(f"--- {i} of {len(prompts)}\n{prompt}", end=end)
        for piece in own:
            show_piece(tokenizer, piece, show)
        print()
    return sum(map(len, pieces))


def show_beams(model, tokenizer, prompt, command, config):
    """Print the text with the best score; -> how many tokens it has."""
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=model.device)
    ends = end_ids(tokenizer)
    (text, score), *_ = beam_search(model, ids, command.beams, config.max_new_tokens,
                                    command.length_penalty, ends, config.cache)
    print(prompt + tokenizer.decode([id for id in text if id not in ends]))
    print(f"score {score:.3f} by {command.beams} beams", file=sys.stderr)
    return len(text)


def main():
    sampling, typed = parse_options(__doc__, SampleConfig, Command)
    sampling.setdefault("seed", random.randrange(10**6))
    sampling["stop"] = [text.replace(r"\n", "\n") for text in sampling.get("stop", [])]
    config, command = SampleConfig(**sampling), Command(**typed)
    folder, device = command.run or newest_run(), pick_device(command.device)
    precision, dtype = pick_precision(command.precision, device)
    prompt = read_text(command.file) if command.file else command.prompt
    prompts = read_text(command.prompts).splitlines() if command.prompts else [prompt]
    prompts = [prompt for prompt in prompts for _ in range(command.n_samples)]
    path = pick_checkpoint(folder, command.checkpoint)
    model, tokenizer = load_run(folder, path, device, dtype)
    start = time.perf_counter()
    if command.beams is not None:
        n_tokens = sum(show_beams(model, tokenizer, prompt, command, config) for prompt in prompts)
    else:
        n_tokens = show_texts(model, tokenizer, prompts, command.show, config)
    rate = n_tokens / (time.perf_counter() - start)
    print(f"{path}: {n_tokens} tokens, {rate:,.0f} tokens/s on {device} in {precision}, "
          f"seed {config.seed}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
