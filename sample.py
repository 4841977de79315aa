"""
Text from a trained model: a run folder goes in, the continuation of a prompt comes out.

    python sample.py                      # the newest run, from the beginning of a document
    python sample.py runs/stdlib --prompt="def " --temperature=0.7 --top_p=0.95 --n_samples=3

A sample ends where the model ends the document, before a stop string, after max_new_tokens, or
when prompt and continuation fill the model's context (block_size); the command says the last.
"""

import argparse
import hashlib
import math
import random
import re
import sys
import time
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
        raise ValueError(f"{path} was not written to its end: {note.name} is missing")
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
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{path} holds weights that are not numbers, its training diverged: "
                         "take an earlier checkpoint")
    return model.to(dtype or torch.float32).eval(), tokenizer


# -----------------------------------------------------------------------------
# Logits to one token: a row of small functions, each from logits (B, V) to logits (B, V).


def penalize_repeats(logits, seen, penalty):
    """Make the ids in seen (B, T) less likely: divide positive logits by penalty, multiply negative
    ones; 1 changes nothing. arXiv:1909.05858"""
    if not 0 < penalty < float("inf"):
        raise ValueError(f"repetition_penalty={penalty} must be above 0; 1 changes nothing")
    scores = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_top_k(logits, top_k):
    """Keep the top_k likeliest; the others become -inf. arXiv:1805.04833"""
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to keep all tokens")
    best, ids = logits.topk(min(top_k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best)


def keep_top_p(logits, top_p):
    """Keep the fewest likeliest whose probabilities sum to top_p or more. arXiv:1904.09751"""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; 1 keeps all tokens")
    if top_p == 1:  # rounded sums may get there too early
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # the sum over all that come before
    return logits.scatter(-1, ids, ordered.masked_fill(likelier >= top_p, -torch.inf))


def keep_min_p(logits, min_p):
    """Keep those at least min_p times as likely as the likeliest. arXiv:2407.01082"""
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be between 0, which keeps all tokens, and 1")
    probabilities = logits.softmax(dim=-1)
    limit = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < limit, -torch.inf)


def distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None,
                 repetition_penalty=None, seen=None):
    """The probabilities (B, V) that the next token is drawn with; what is None is left out.
    temperature 0 gives all to the likeliest; repetition_penalty is about the ids in seen (B, T)."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be at least 0, which takes the likeliest")
    if repetition_penalty is not None:
        logits = penalize_repeats(logits, seen, repetition_penalty)
    if temperature < 1e-6:  # the limit; a division would overflow
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
    logits = logits / temperature
    for keep, limit in (keep_top_k, top_k), (keep_top_p, top_p), (keep_min_p, min_p):
        if limit is not None:
            logits = keep(logits, limit)
    return logits.softmax(dim=-1)


def pick(logits, temperature=1.0, top_k=None, top_p=None, min_p=None,
         repetition_penalty=None, seen=None, generator=None):
    """Draw one id for each row of logits (B, V) from its distribution -> (B,)."""
    chances = distribution(logits, temperature, top_k, top_p, min_p, repetition_penalty, seen)
    return torch.multinomial(chances, 1, generator=generator).squeeze(-1)


# -----------------------------------------------------------------------------
# Token after token, and the text they are.


def room(model, T, max_new_tokens):
    """How many tokens may follow T tokens: max_new_tokens, or what the context still has."""
    block_size = model.config.block_size
    if not 0 < T < block_size:
        raise ValueError(f"the prompt has {T} tokens, this model takes 1 to {block_size - 1} "
                         f"(block_size={block_size}, one must follow): shorten the prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    return min(max_new_tokens, block_size - T)


def generate(model, ids, max_new_tokens=200, cache=True, first=None, **options):
    """Yield the tokens that follow ids (B, T), one tensor (B,) a step, at most until the context
    is full. Options are those of pick; first (V,) marks the tokens that may come first. Without
    the cache the choices are the same, only slower."""
    n_tokens, memory = room(model, ids.size(1), max_new_tokens), None
    if cache:
        size = ids.size(0), ids.size(1) + n_tokens
        dtype = model.dtype or model.lm_head.weight.dtype
        memory = [KVCache(model.config, *size, model.device, dtype)
                  for _ in model.transformer.blocks]
    for _ in range(n_tokens):
        unseen = ids[:, memory[0].length:] if cache else ids             # (B, T), then (B, 1)
        with torch.inference_mode():
            logits, _ = model(unseen, cache=memory, last_only=True)      # (B, 1, V)
        logits = logits[:, -1].float()                                   # (B, V)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: take another checkpoint, or with "
                             "--precision=fp16 another precision")
        if first is not None:
            logits, first = logits.masked_fill(~first, -torch.inf), None
        chosen = pick(logits, seen=ids, **options)                       # (B,)
        ids = torch.cat((ids, chosen[:, None]), dim=1)
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


def stream(model, tokenizer, prompt="", max_new_tokens=200, stop=(), seed=None, **options):
    """Yield (token, text) for each token that follows the prompt, or that begins a document without
    one. The text is whole characters, sometimes none; <|endoftext|> and stop strings end it and are
    not in it. The same seed gives the same text; the other options are those of generate."""
    if not all(stop):
        raise ValueError("a stop string is empty: leave it out, or give it characters")
    generator = torch.Generator(model.device)
    generator.manual_seed(random.getrandbits(63) if seed is None else seed % 2**63)
    first, space = None, prompt.endswith(" ")
    if space:  # " name" is one token: the model has seldom seen a space end, so it writes it anew
        begins = [token.startswith(b" ") for token in tokenizer.token_bytes()]
        prompt, first = prompt[:-1], torch.tensor(begins, device=model.device)
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    n_tokens, decoder, waiting = room(model, len(ids), max_new_tokens), tokenizer.decoder(), ""
    ids = torch.tensor([ids], device=model.device)                       # (1, T)
    steps = generate(model, ids, n_tokens, first=first, generator=generator, **options)
    for n, chosen in enumerate(steps, 1):
        token = chosen.item()
        text = decoder.push(token) if token != tokenizer.eot else ""
        waiting += text[1:] if space and n == 1 else text
        last = token == tokenizer.eot or n == n_tokens
        waiting += decoder.flush() if last else ""
        text, waiting, stopped = release(waiting, stop, last)
        yield token, text
        if last or stopped:
            return


def complete(model, tokenizer, prompt="", **options):
    """The text that follows the prompt, as stream gives it: complete(model, tokenizer, "def ")."""
    return "".join(text for _, text in stream(model, tokenizer, prompt, **options))


# -----------------------------------------------------------------------------
# The command.


def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="run folder; without one the newest under runs/")
    add("--prompt", default="", help="text to continue; without one a document begins")
    add("--max_new_tokens", type=int, default=200, help="longest continuation (default 200)")
    add("--temperature", type=float, default=0.8,
        help="0 always takes the likeliest token, above 1 is wild (default 0.8)")
    add("--top_k", type=int, help="draw from this many of the likeliest tokens")
    add("--top_p", type=float, help="draw from the likeliest tokens of this probability together")
    add("--min_p", type=float, help="draw from tokens this many times as likely as the likeliest")
    add("--repetition_penalty", type=float, help="above 1 makes tokens that were there less likely")
    add("--stop", action="append", default=[],
        help=r"end before this text; \n means a new line; may be given several times")
    add("--n_samples", type=int, default=1, help="how many continuations (default 1)")
    add("--seed", type=int, help="the same seed gives the same text; sample i has seed + i")
    add("--checkpoint", default="best", help="best | last | a step (default best)")
    add("--device", default="auto", help="auto | cuda | mps | cpu (default auto)")
    add("--precision", default="fp32", help="auto | fp32 | bf16 | fp16 (default fp32)")
    add("--cache", action=argparse.BooleanOptionalAction, default=True,
        help="--no-cache computes all tokens again at each step: the same text, slower")
    return vars(parser.parse_args())


def show(model, tokenizer, prompt, options):
    """Print the prompt and what follows it, as it comes; -> how many tokens that were."""
    for n, (token, text) in enumerate(stream(model, tokenizer, prompt, **options), 1):
        print(prompt + text if n == 1 else text, end="", flush=True)
    print(flush=True)
    block_size = model.config.block_size
    full = max(1, len(tokenizer.encode(prompt))) + n == block_size
    if full and n < options["max_new_tokens"] and token != tokenizer.eot:
        print(f"stopped: the context of {block_size} tokens is full", file=sys.stderr)
    return n


def main():
    options = parse_options()
    folder, which, device, precision, prompt, n_samples = (options.pop(name) for name in (
        "run", "checkpoint", "device", "precision", "prompt", "n_samples"))
    folder, device = folder or newest_run(), pick_device(device)
    precision, dtype = pick_precision(precision, device)
    path = pick_checkpoint(folder, which)
    model, tokenizer = load_run(folder, path, device, dtype)
    options["stop"] = [text.replace(r"\n", "\n") for text in options["stop"]]
    seed = options.pop("seed")
    seed = random.randrange(10**6) if seed is None else seed
    start, n_tokens = time.perf_counter(), 0
    for i in range(n_samples):
        if n_samples > 1:
            print(f"--- {i + 1} of {n_samples}")
        n_tokens += show(model, tokenizer, prompt, dict(options, seed=seed + i))
    rate = n_tokens / (time.perf_counter() - start)
    print(f"{path}: {n_tokens} tokens, {rate:,.0f} tokens/s on {device} in {precision}, "
          f"seed {seed}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
