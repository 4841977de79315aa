"""
Text from a trained model: a run folder goes in, the continuation of a prompt comes out.

    python sample.py                      # the newest run, from the beginning of a document
    python sample.py runs/stdlib --prompt="def " --temperature=0.7 --top_p=0.95 --n_samples=3
    python sample.py --prompts=questions.txt             # a prompt a line, 64 at a time
    python sample.py --prompt="import " --show=logprobs  # how likely each token was
    python sample.py runs/chat --chat --prompt="Hi!"     # one reply; python -m chapters.talk: more

A sample ends where the model ends the document, before a stop string, after max_new_tokens, or
when prompt and continuation fill the model's context (block_size), unless --overflow=slide.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import math
import random
import re
import sys
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, make_dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from model import (BITS, QUANTIZED, TINY, KVCache, check_known, check_options, has_bf16_units,
                   load_model, merge, option, quantize, read_progress, read_safetensors)
from tokenizer import (SPECIAL_TOKENS, Tokenizer, parse_options, reading, refuse_idle,
                       run_command)

DEVICES = ("cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = ("text", "logprobs")
COLD = 1e-6  # temperatures below are 0: a division by them would overflow
ROWS = 64  # texts that are written at a time: each takes memory
END_LIKELY = 0.01  # chance of <|end|> in an answer: after 20 steps on texts 0.003, on chats 0.05

# -----------------------------------------------------------------------------
# Machines and runs: where to compute; from a run folder to a model and its tokenizer.


def pick_device(name="auto"):
    """auto | cuda | cuda:1 | mps | cpu -> the name of a device that works; auto: the first one."""
    check_known(name.partition(":")[0], ("auto", *DEVICES), "device")
    for device in DEVICES if name == "auto" else (name,):
        with suppress(RuntimeError, AssertionError):  # missing, or too old for this build of torch
            torch.ones(2, device=device).sum().item()
            return device
    raise ValueError(f"device={name} does not work on this machine: take auto or cpu")


def pick_precision(name="auto", device="cpu"):
    """auto | fp32 | bf16 | fp16 -> (name, torch dtype); auto: bf16 where the device has units."""
    check_known(name, ("auto", *PRECISIONS), "precision")
    if name == "auto":
        name = "bf16" if has_bf16_units(device) else "fp32"
    return name, PRECISIONS[name]


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def checkpoints(folder):
    """The checkpoints of a run, {step: path} in the order of the steps."""
    paths = [*Path(folder).glob("step_*.safetensors")]
    return dict(sorted((int(p.stem[5:]), p) for p in paths if p.stem[5:].isdecimal()))


def newest_run(root="runs"):
    """The folder under root with the checkpoint that was written last."""
    written = [path for folder in Path(root).glob("*") for path in checkpoints(folder).values()]
    if not written:
        raise ValueError(f"no run in {root}/: python train.py makes one")
    return max(written, key=lambda path: path.stat().st_mtime).parent


def first_whole(paths, by_loss=False):
    """-> (the first of these checkpoints whose checksum is right, or with by_loss the one of the
    lowest validation loss; what is wrong with those in its way, in words)."""
    def val_loss(path):
        with suppress(ValueError):
            loss = read_progress(path).get("val_loss")
            return loss if isinstance(loss, int | float) and loss < math.inf else math.inf
        return -math.inf  # a damaged one comes first, and is named below

    wrong = []
    for path in sorted(paths, key=val_loss) if by_loss else paths:
        try:
            read_progress(path)
            read_safetensors(path, only_check=True)
            return path, wrong
        except ValueError as error:
            wrong.append(str(error))
    return None, wrong


def pick_checkpoint(folder, which="best"):
    """best (lowest validation loss) | last | a step -> the path of a checkpoint that is whole.
    Instead of a damaged one, which is named, the next best or newest is taken."""
    which, found = str(which), checkpoints(folder)
    if not found:
        for path in Path(folder).glob("step_*.pt"):
            read_progress(path)  # raises ValueError: an older version wrote it
        if [*Path(folder).glob("step_*.shards")]:
            raise ValueError(f"{folder} has checkpoints in shards alone: python -m chapters.gather "
                             f"{folder} makes the last of them one file")
        places = Path("runs", folder), Path(folder).parent, Path("runs", folder).parent
        near = next(filter(checkpoints, places), None)
        hint = f"did you mean {near}?" if near else "python train.py makes one"
        raise ValueError(f"there is no run folder {folder} with a checkpoint: {hint}")
    check_known(which, ("best", "last", *map(str, found)), "checkpoint")
    paths = [found[int(which)]] if which.isdecimal() else reversed(found.values())
    path, wrong = first_whole(paths, by_loss=which == "best")
    if path is None:
        raise ValueError(f"{folder} has no checkpoint that is whole: {'; '.join(wrong)}")
    for what in wrong:
        warn(f"{what}; {path.name} is taken instead")
    return path


def load_run(folder, which="best", device="cpu", dtype=None, quant=None):
    """-> (model, tokenizer) of a run, its weights in a dtype, or those of its products in a quant,
    int8 or int4. which: as for pick_checkpoint, or the path that it gave."""
    path = which if isinstance(which, Path) else pick_checkpoint(folder, which)
    if not Path(folder, "tokenizer.json").exists():
        raise ValueError(f"{folder} lacks its tokenizer.json: copy it from where it was trained")
    tokenizer, (model, _) = Tokenizer.load(Path(folder, "tokenizer.json")), load_model(path, device)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.n_vocab} tokens, the model "
                         f"{path.name} has {model.config.vocab_size}: one is another run's")
    if not model.is_finite():
        raise ValueError(f"{path} holds no numbers, its training diverged: take an earlier one")
    if quant:
        quantize(merge(model) if model.tuning else model, quant)
    if dtype is None:  # integers pay off beside bfloat16 alone
        quantized = model.lm_head.weight.dtype in QUANTIZED
        dtype = torch.bfloat16 if quantized else torch.float32
    model = model.to(dtype).eval()
    model.use("torch")  # for one query at a time the fastest, tests/benchmark.py found
    return model, tokenizer


@dataclass(frozen=True)
class RunConfig:
    """Which model, and where it is computed."""
    run: str | None = option(None, "run folder; else the newest under runs/", positional=True)
    checkpoint: str = option("best", "best | last | a step")
    device: str = option("auto", "auto | cuda | mps | cpu")
    precision: str | None = option(None, "of the weights; else fp32, of integers bf16",
                                   known=lambda: ("auto", *PRECISIONS))
    quant: str | None = option(None, "its weights in int8 or int4", known=lambda: BITS)

    __post_init__ = check_options


def open_run(config):
    """-> (model, tokenizer, in words which checkpoint on which machine) of a RunConfig."""
    folder = newest_run() if config.run is None else config.run
    device = pick_device(config.device)
    dtype = config.precision and pick_precision(config.precision, device)[1]
    path = pick_checkpoint(folder, config.checkpoint)
    model, tokenizer = load_run(folder, path, device, dtype, config.quant)
    quant = QUANTIZED.get(model.lm_head.weight.dtype)
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    how = f"{quant} and " * bool(quant) + names[model.compute_dtype]
    return model, tokenizer, f"{path} on {device} in {how}"


# -----------------------------------------------------------------------------
# Logits to one token: a row of small functions, each from logits (B, V) to logits (B, V).


def counts(ids, V):
    """How often each of V tokens occurs in each row of ids (B, S), -1 for none -> (B, V)."""
    n = torch.zeros(len(ids), V + 1, device=ids.device)
    return n.scatter_add(1, ids.remainder(V + 1), torch.ones_like(ids, dtype=n.dtype))[:, :V]


def penalize_repeats(logits, seen, penalty):
    """Divide positive logits of ids in seen (B, S), multiply negative ones. arXiv:1909.05858"""
    less = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(counts(seen, logits.size(-1)) > 0, less, logits)


def penalize_counts(logits, written, frequency=0.0, presence=0.0):
    """OpenAI's: subtract `frequency` each time a token is in written (B, S), `presence` once."""
    n = counts(written, logits.size(-1))
    return logits - frequency * n - presence * (n > 0)


def ban_repeated_ngrams(logits, seen, n):
    """Rule out each token that would repeat a run of n tokens in seen (B, S). arXiv:1705.04304"""
    if seen.size(1) < n:
        return logits
    runs = seen.unfold(1, n, 1)                                          # (B, S - n + 1, n)
    again = (runs[..., :-1] == seen[:, None, seen.size(1) - n + 1:]).all(dim=-1)
    repeats = counts(torch.where(again, runs[..., -1], -1), logits.size(-1)) > 0      # (B, V)
    return logits.masked_fill(repeats, -torch.inf)


def ban_sequences(logits, seen, sequences, bias=-torch.inf):
    """Add the bias to each token that would complete one of the sequences, lists of ids."""
    for *begin, last in sequences:
        end = seen[:, max(0, seen.size(1) - len(begin)):].tolist()
        logits = logits.clone()
        logits[[ids == begin for ids in end], last] += bias
    return logits


FILTERS, FIELDS = {}, []  # {name: function} in the order of use; their fields in SampleConfig


def sampling_filter(help, low=TINY, below=1 + TINY):
    """Makes a function of logits (B, V) and one more argument an option of the command and a step
    of process_logits; its name and type are those of that argument."""
    def register(function):
        (name, kind), = function.__annotations__.items()
        FIELDS.append((name, kind | None, option(None, help, low, below)))
        return FILTERS.setdefault(name, function)
    return register


@sampling_filter("keep only this many of the likeliest tokens", low=1, below=2**31)
def keep_top_k(logits, top_k: int):
    """Keep the top_k likeliest; the others become -inf. arXiv:1805.04833"""
    best, ids = logits.topk(min(top_k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best)


def keep_first(logits, ids, p):
    """Keep the first ids, an order of all (B, V), whose probabilities sum to p or more."""
    if p == 1:  # rounded sums may get there too early
        return logits
    probabilities = logits.softmax(dim=-1).gather(-1, ids)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over all that come earlier
    return logits.scatter(-1, ids, logits.gather(-1, ids).masked_fill(before >= p, -torch.inf))


@sampling_filter("keep the likeliest that sum to this")
def keep_top_p(logits, top_p: float):
    """Keep the fewest likeliest whose probabilities sum to top_p or more. arXiv:1904.09751"""
    return keep_first(logits, logits.argsort(dim=-1, descending=True), top_p)


@sampling_filter("keep tokens this likely beside the likeliest", low=0)
def keep_min_p(logits, min_p: float):
    """Keep those at least min_p times as likely as the likeliest. arXiv:2407.01082"""
    p = logits.softmax(dim=-1)
    return logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), -torch.inf)


@sampling_filter("keep the most typical up to this")
def keep_typical(logits, typical_p: float):
    """Keep those whose surprise is nearest to its mean, typical_p in sum. arXiv:2202.00666"""
    surprise = -logits.log_softmax(dim=-1)
    entropy = torch.special.entr((-surprise).exp()).sum(dim=-1, keepdim=True)
    return keep_first(logits, (surprise - entropy).abs().argsort(dim=-1), typical_p)


@dataclass(frozen=True)
class SampleConfig(make_dataclass("FilterOptions", FIELDS, frozen=True)):
    """How a text is written: how each token is chosen, and where the text ends."""
    temperature: float = option(0.8, "0 always takes the likeliest token, above 1 is wild")
    repetition_penalty: float = option(1.0, "above 1 makes earlier tokens less likely", TINY)
    frequency_penalty: float = option(0.0, "taken off per time that a token was written", -2**31)
    presence_penalty: float = option(0.0, "taken off once a token was written", -2**31)
    no_repeat_ngram: int | None = option(None, "never repeat a run of this many tokens", low=1)
    ban: list | tuple = option([], "never write this text (Python: or ids); may be repeated")
    logit_bias: list | tuple = option([], "TEXT=NUMBER, added to one token; may be repeated")
    seed: int | None = option(None, "same seed, same text; sample i: seed + i", -2**63, 2**63)
    max_new_tokens: int = option(200, "longest continuation, in tokens", low=1)
    stop: list | tuple = option([], r"end before this text (\n: a new line); may be repeated")
    overflow: str = option("stop", "where the context is full end, or forget its older half",
                           known=lambda: ("stop", "slide"))
    cache: bool = option(True, "remember keys and values; without, the same text, slower")

    def __post_init__(self):
        check_options(self)
        if not all((*self.stop, *self.ban)):
            raise ValueError("a text in stop or ban is empty: leave it out, or give it characters")


def process_logits(logits, config, seen=None, n_prompt=0):
    """The logits (B, V) whose softmax is sampled from; of temperature 0 the highest is taken. seen
    (B, S) are the ids so far, -1 for none, the first n_prompt, a number or (B, 1), the prompt's."""
    c = config
    seen = logits.new_empty(len(logits), 0, dtype=torch.long) if seen is None else seen
    if any(isinstance(entry, str) for entry in (*c.ban, *c.logit_bias)):
        raise ValueError("ban and logit_bias hold texts: give ids, or call write or complete")
    if c.repetition_penalty != 1:
        logits = penalize_repeats(logits, seen, c.repetition_penalty)
    if c.frequency_penalty or c.presence_penalty:
        written = torch.where(torch.arange(seen.size(1), device=seen.device) < n_prompt, -1, seen)
        logits = penalize_counts(logits, written, c.frequency_penalty, c.presence_penalty)
    if c.no_repeat_ngram is not None:
        logits = ban_repeated_ngrams(logits, seen, c.no_repeat_ngram)
    for id, bias in c.logit_bias:
        logits = ban_sequences(logits, seen, [[id]], bias)
    logits = ban_sequences(logits, seen, c.ban)
    if c.temperature < COLD:
        return logits
    logits = logits / c.temperature
    for name, keep in FILTERS.items():
        if (limit := getattr(c, name, None)) is not None:
            logits = keep(logits, limit)
    return logits


def sample_from(probabilities, generator=None):
    """An id for each row of probabilities (B, V): the first at which their running sum reaches a
    random number -> (B,). generator: one for all rows, or a list with each row's own."""
    own = generator if isinstance(generator, list) else [generator] * len(probabilities)
    numbers = torch.cat([torch.rand(1, 1, generator=g) for g in own]).to(probabilities.device)
    sums = probabilities.cumsum(dim=-1)
    reach = (1 - numbers) * sums[:, -1:]  # above 0, so that a probability of 0 is never reached
    return torch.searchsorted(sums, reach).squeeze(-1)


def distribution(logits, config=SampleConfig(temperature=1.0), seen=None, n_prompt=0, **options):
    """The probabilities (B, V) that pick samples from, with the same arguments."""
    config = replace(config, **options) if options else config
    logits = process_logits(logits, config, seen, n_prompt)
    return (keep_top_k(logits, 1) if config.temperature < COLD else logits).softmax(dim=-1)


def pick(logits, config=SampleConfig(temperature=1.0), generator=None, seen=None, n_prompt=0,
         **options):
    """An id for each row of logits (B, V) -> (B,), sampled from their distribution. Options are
    fields of config; generator as for sample_from, seen and n_prompt as for process_logits."""
    config = replace(config, **options) if options else config
    if config.temperature < COLD:
        return process_logits(logits, config, seen, n_prompt).argmax(dim=-1)
    return sample_from(distribution(logits, config, seen, n_prompt), generator)


# -----------------------------------------------------------------------------
# Token after token, and the text that they make.


def seeded(seed, row):
    """A random number generator for a row of a batch, without a seed a new one each time."""
    number = random.getrandbits(63) if seed is None else (seed + row) % 2**63
    return torch.Generator().manual_seed(number)


def n_new_tokens(model, T, config):
    """How many tokens may follow T tokens: max_new_tokens, or what the context still has."""
    block_size = model.config.block_size
    if model.config.n_classes:
        raise ValueError("this model judges texts and writes none: python -m chapters.clauses ask "
                         "RUN asks a classifier, chapters.align uses a reward model")
    if config.overflow == "slide" and T:
        return config.max_new_tokens
    if not 0 < T < block_size:
        raise ValueError(f"the prompt has {T} tokens, this model takes 1 to {block_size - 1}, as "
                         "one must follow: shorten it, or let it slide out with overflow=slide")
    return min(config.max_new_tokens, block_size - T)


def new_cache(model, batch_size, max_tokens):
    """An empty KVCache for each layer."""
    return [KVCache(model.config, batch_size, max_tokens, model.device, model.compute_dtype)
            for _ in model.transformer.blocks]


def check_finite(logits):
    """The logits; ValueError if one of them is nan or inf."""
    if not logits.sum().isfinite():
        raise ValueError("the logits are not finite: weights are damaged, or fp16 overflowed")
    return logits


def decode(model, ids, config, generator=None, n_prompt=0, first_ban=None):
    """Yield for each token after ids (B, T) what was picked, (B,), and from which logits, (B, V).
    Ids of -1 pad rows on the left; first_ban (B, V) marks what must not come first."""
    block_size, n_tokens = model.config.block_size, n_new_tokens(model, ids.size(1), config)
    padded, start, cache = bool((ids < 0).any()), 0, None
    for _ in range(n_tokens):
        if ids.size(1) - start > block_size:
            start, cache = ids.size(1) - block_size // 2, None  # the older half is forgotten
        if config.cache and cache is None:
            cache = new_cache(model, len(ids), min(block_size, ids.size(1) - start + n_tokens))
        context = ids[:, start:]
        segments = (context >= 0).long() if padded else None
        unseen = context[:, cache[0].length:] if cache else context      # prefill, then (B, 1)
        with torch.inference_mode():
            logits, _ = model(unseen.clamp(min=0), cache=cache, segments=segments, last_only=True)
        logits = check_finite(logits[:, -1].float())                     # (B, V)
        choices = logits if first_ban is None else logits.masked_fill(first_ban, -torch.inf)
        chosen, first_ban = pick(choices, config, generator, ids, n_prompt), None     # (B,)
        ids = torch.cat((ids, chosen[:, None]), dim=1)
        yield chosen, logits


def generate(model, ids, max_new_tokens=None, config=SampleConfig(), generator=None, **options):
    """Yield the tokens that follow ids (B, T), one tensor (B,) a step. Options: fields of config,
    but stop has no effect; generator as for sample_from, by default row i has seed + i."""
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    config = replace(config, **options)
    if generator is None and config.seed is not None:
        generator = [seeded(config.seed, row) for row in range(len(ids))]
    for chosen, _ in decode(model, ids, config, generator, n_prompt=ids.size(1)):
        yield chosen


# The text, perhaps "", that a token completes; its log-probability, before temperature and filters.
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


def to_ids(tokenizer, prompt):
    """The ids of a prompt, a text or ids; an empty text is the beginning of a document."""
    return tokenizer.encode(prompt) or [tokenizer.eot] if isinstance(prompt, str) else [*prompt]


def end_ids(tokenizer):
    """The ids that end a text or a reply."""
    return {tokenizer.special.get(name) for name in ("<|endoftext|>", "<|end|>")} - {None}


def with_ids(config, tokenizer):
    """The config with ids for texts: a banned one also after a space; (id, number) for a bias."""
    biases, ban = [], [tokenizer.encode(start + entry) if isinstance(entry, str) else entry
                       for entry in config.ban for start in ("", " ")]
    for entry in config.logit_bias:
        if isinstance(entry, str):
            text, _, number = entry.rpartition("=")
            ids = tokenizer.encode(text)
            if len(ids) != 1 or not re.fullmatch(r"[+-]?(\d{1,9}(\.\d*)?|\.\d+)", number):
                raise ValueError(f"logit_bias={entry} must be one token and a number, such as "
                                 f"' the=-2'; {text!r:.40} makes {len(ids)} tokens")
            entry = ids[0], float(number)
        biases.append(entry)
    return replace(config, ban=ban, logit_bias=biases)


def no_space(tokenizer):
    """Which tokens do not begin with a space: they cannot follow a prompt that ended in one."""
    return torch.tensor([not token.startswith(b" ") for token in tokenizer.token_bytes()])


class Continuation:
    """A text under way; it ends after <|endoftext|>, <|end|>, a stop string or n_left tokens."""

    def __init__(self, model, tokenizer, prompt, config, number):
        # Token healing: " name" is one token, so the model has seldom seen a text that ends in a
        # space. The space is taken off the prompt, and the first token has to begin with it.
        self.heals = isinstance(prompt, str) and prompt.endswith(" ")
        self.ids = to_ids(tokenizer, prompt[:-1] if self.heals else prompt)
        self.n_prompt, self.n_left = len(self.ids), n_new_tokens(model, len(self.ids), config)
        self.number, self.generator = number, seeded(config.seed, number)
        self.decode, self.waiting = tokenizer.decoder(), ""
        self.stop, self.ends = config.stop, end_ids(tokenizer)

    def take(self, token, logprob):
        """Add a token -> its Piece; n_left is 0 when it was the last."""
        self.ids.append(token)
        self.n_left = 0 if token in self.ends else self.n_left - 1
        text = self.decode(token) if token not in self.ends else ""
        self.waiting += text[self.heals:] + (self.decode() if not self.n_left else "")
        text, self.waiting, stopped = release(self.waiting, self.stop, last=not self.n_left)
        self.stopped = stopped or token in self.ends  # or it was cut off
        self.n_left, self.heals = 0 if stopped else self.n_left, False
        return Piece(token, text, logprob)


def write(model, tokenizer, prompts, config=SampleConfig(), **options):
    """Yield (i, Piece) for each token after prompts, texts or lists of ids, ROWS at a time, each as
    it is alone with seed + i; after an empty one, of a new document. Options: fields of config."""
    config, device = with_ids(replace(config, **options), tokenizer), model.device
    numbered, rows = enumerate(prompts), []
    spaceless = no_space(tokenizer)
    while rows := rows or [Continuation(model, tokenizer, prompt, config, i)
                           for i, prompt in islice(numbered, ROWS)]:
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], True, -1, "left")  # (B, T)
        n_prompt = ids.size(1) - torch.tensor([[len(row.ids) - row.n_prompt] for row in rows])
        first_ban = torch.tensor([[row.heals] for row in rows]) & spaceless            # (B, V)
        steps = decode(model, ids.to(device), config, [row.generator for row in rows],
                       n_prompt.to(device), first_ban.to(device))
        for chosen, logits in steps:
            logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
            for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist()):
                if row.n_left:
                    yield row.number, row.take(token, logprob)
            if not any(row.n_left for row in rows):
                break
        rows = [row for row in rows if row.n_left]  # short prompts leave space for more tokens


def complete_batch(model, tokenizer, prompts, config=SampleConfig(), **options):
    """The text that follows each prompt of a list; options as for write."""
    texts = [""] * len(prompts)
    for i, piece in write(model, tokenizer, prompts, config, **options):
        texts[i] += piece.text
    return texts


def complete(model, tokenizer, prompt="", config=SampleConfig(), **options):
    """The text that follows a prompt: complete(model, tokenizer, "def ", temperature=0)."""
    return complete_batch(model, tokenizer, [prompt], config, **options)[0]


# -----------------------------------------------------------------------------
# The command: each text goes on, each turn of a user gets a reply.


@dataclass(frozen=True)
class Command(RunConfig):
    """What is continued, and how it is shown."""
    prompt: str = option("", "text to continue; without one a document begins")
    file: str | None = option(None, "a file with the prompt; - reads what is typed or piped in")
    prompts: str | None = option(None, "a file with a prompt a line, or -")
    chat: bool = option(False, "a prompt is what a user says, and is replied to")
    n_samples: int = option(1, "how many continuations of each prompt", 1, 10_001)
    show: str = option("text", "a text, or its tokens' log-probabilities", known=lambda: SHOWN)


def read_text(path):
    """The text of a file, or of what is typed or piped in if the path is "-", without a BOM."""
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: give a file, or pipe the text in")
    with reading("standard input" if path == "-" else path):
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_prompts(command):
    """The texts that are given: one, or the lines of a file."""
    if command.prompts is not None:
        return read_text(command.prompts).splitlines()
    return [command.prompt if command.file is None else read_text(command.file)]


def knows_chats(model, tokenizer):
    """Whether the model may end its likeliest answer to "Hi", as one that learned chats does."""
    if not {*SPECIAL_TOKENS} <= {*tokenizer.special}:
        return False
    ids = torch.tensor([tokenizer.render_prompt([dict(role="user", content="Hi")])])
    steps = decode(model, ids.to(model.device), SampleConfig(temperature=0, max_new_tokens=64))
    end = tokenizer.special["<|end|>"]
    return any(logits[0].softmax(dim=-1)[end] > END_LIKELY for _, logits in steps)


def as_turns(model, tokenizer, texts):
    """-> [(text, prompt)]: what is shown of a text, and the ids of the chat that it begins."""
    said = [text.rstrip("\n") for text in texts]
    prompts = [tokenizer.render_prompt([dict(role="user", content=text)]) for text in said]
    if not knows_chats(model, tokenizer):
        raise ValueError("this model never learned to hold a conversation, or not yet, as its "
                         "answers have no end: python train.py --init=RUN --data=chats.jsonl")
    return [*zip([f"{text}\n" * (len(said) > 1) for text in said], prompts)]


def fitting(model, tokenizer, prompts, config):
    """The (text, prompt) that fit the context, whose others a warning names, or all if none do."""
    limit = math.inf if config.overflow == "slide" else model.config.block_size
    lengths = [len(to_ids(tokenizer, prompt[:-1] if prompt[-1:] == " " else prompt))
               for _, prompt in prompts]
    fit = [pair for pair, T in zip(prompts, lengths) if T < limit]
    for line, T in enumerate(lengths, 1):
        if fit and T >= limit:
            warn(f"line {line} is left out: its {T} tokens are more than {limit - 1}, which fit")
    return fit or prompts


def show_piece(tokenizer, piece, show):
    """Print a piece: its text, or its log-probability and its token."""
    if show == "text":
        return print(piece.text, end="", flush=True)
    print(f"{piece.logprob:8.3f}  {tokenizer.decode([piece.token])!r}", flush=True)


def show_texts(model, tokenizer, prompts, command, config):
    """Print each text and what follows its prompt, a single one as it comes; -> how many tokens."""
    number, n_texts, n_tokens = itemgetter(0), len(prompts), 0
    end = "" if command.chat or command.show == "text" else "\n"
    pieces = write(model, tokenizer, [prompt for _, prompt in prompts], config)
    for _, group in groupby(pieces, lambda pair: pair[0] // ROWS):
        for i, own in groupby(sorted(group, key=number) if n_texts > 1 else group, number):
            print(f"--- {i + 1} of {n_texts}\n" * (n_texts > 1) + prompts[i][0], end=end)
            for n_tokens, (_, piece) in enumerate(own, n_tokens + 1):
                show_piece(tokenizer, piece, command.show)
            print(flush=True)
    if n_texts == 1 and n_tokens < config.max_new_tokens and not (
            config.stop or piece.token in end_ids(tokenizer)):
        warn(f"the context of {model.config.block_size} tokens is full; --overflow=slide goes on")
    return n_tokens


def sampling_config(typed):
    """The SampleConfig of options that were typed, with a seed; ValueError for idle ones."""
    config = SampleConfig(**dict(seed=random.randrange(10**6)) | typed)
    if config.temperature < COLD:
        refuse_idle(typed, [*FILTERS, "seed"], "beside --temperature=0")
    return replace(config, stop=[text.replace(r"\n", "\n") for text in config.stop])


def main():
    typed, sampling = parse_options(__doc__, Command, SampleConfig)
    for name, idle in ("prompts", ["file", "prompt"]), ("file", ["prompt"]):
        refuse_idle(typed, idle if name in typed else (), f"beside --{name}")
    command, config = Command(**typed), sampling_config(sampling)
    refuse_idle(typed, ["n_samples"] * (config.temperature < COLD), "beside --temperature=0")
    texts, (model, tokenizer, where) = read_prompts(command), open_run(command)
    prompts = as_turns(model, tokenizer, texts) if command.chat else [*zip(texts, texts)]
    prompts = fitting(model, tokenizer, prompts, config)
    prompts = [pair for pair in prompts for _ in range(command.n_samples)]
    start = time.perf_counter()
    n_tokens = show_texts(model, tokenizer, prompts, command, config)
    rate = n_tokens / (time.perf_counter() - start)
    print(f"{where}: {n_tokens} tokens, {rate:,.0f} tokens/s, seed {config.seed}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
