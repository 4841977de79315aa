"""
Speculative decoding: a cheap draft guesses the next tokens, and the model checks them all at once.

    python -m chapters.speculative runs/target --draft=runs/draft --prompt="def "
    python -m chapters.speculative runs/target --draft=ngram --file=code.py --n_draft=8

One pass over five tokens takes little more than one over a single one: mostly the weights are read.
So the draft, a small run with the same tokenizer or a look at what followed the last few tokens
earlier in the text, proposes n_draft tokens, and the model's probabilities p of all of them come
out of one pass. A token that was drawn from the draft's q is kept with probability p/q, at most 1;
instead of the first that is not kept, one is drawn from what p has more than q, and so each token
has exactly the probability p (arXiv:2211.17192, arXiv:2302.01318). Any SampleConfig shapes p and q.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python chapters/speculative.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

import sample
from model import option
from sample import (Continuation, RunConfig, SampleConfig, check_finite, distribution, n_new_tokens,
                    new_cache, no_space, open_run, read_text, sample_from, sampling_config,
                    to_ids, with_ids)
from tokenizer import parse_options, refuse_idle, run_command

# -----------------------------------------------------------------------------
# Two drafts. propose(ids, n, chances, generator) -> (at most n tokens to follow ids, for each the
# probabilities (V,) that it was drawn from); chances(logits, ids) are those after ids.


class Reader:
    """A model and a cache, for ids that are read again and again with another end."""

    def __init__(self, model):
        self.model, self.cache = model, new_cache(model, 1, model.config.block_size)

    @torch.inference_mode()
    def read(self, ids, n):
        """Logits (n, V) after each of the last n ids; those before them are as they were read."""
        start = min(self.cache[0].length, len(ids) - n)
        for layer in self.cache:
            layer.length = start  # what was read beyond is forgotten
        ids = torch.tensor([ids[start:]], device=self.model.device)
        if ids.size(1) > n:
            self.model(ids[:, :-n], cache=self.cache, last_only=True)
        return check_finite(self.model(ids[:, -n:], cache=self.cache)[0][0].float())


class RunDraft:
    """A smaller model proposes what it would write."""

    def __init__(self, model):
        self.reader, self.block_size = Reader(model), model.config.block_size

    def propose(self, ids, n, chances, generator):
        ids, probabilities = [*ids], []
        for _ in range(min(n, self.block_size - len(ids))):
            probabilities.append(chances(self.reader.read(ids, 1), ids))
            ids.append(sample_from(probabilities[-1][None], generator).item())
        return ids[len(ids) - len(probabilities):], probabilities


class NgramDraft:
    """What followed the last few tokens where they occurred last: free, and for text that repeats
    itself or its prompt often right. Each token is proposed for certain."""

    def __init__(self, vocab_size, longest=3):
        self.vocab_size, self.longest = vocab_size, longest

    def propose(self, ids, n, chances, generator):
        for size in range(self.longest, 0, -1):
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start:start + size] == ids[-size:]:
                    tokens = torch.tensor(ids[start + size:start + size + n], dtype=torch.long)
                    return tokens.tolist(), [*F.one_hot(tokens, self.vocab_size).float()]
        return [], []


# -----------------------------------------------------------------------------
# Token after token, several from each pass of the model.


def accept(token, p, q, generator=None):
    """A token that was drawn from q (V,) -> one with the probabilities p (V,): this one with
    probability p/q, or one drawn from what p has more than q."""
    if torch.rand((), generator=generator) * q[token] < p[token]:
        return token
    more = (p - q).clamp(min=0)
    # of p and q that are equal but for rounding nothing is left
    return sample_from((more if more.sum() > 0 else p)[None], generator).item()


def speculate(model, draft, ids, config, generator=None, n_draft=4, first_ban=None, counts=None):
    """Yield for each token after a list of ids what was picked, and from which logits (1, V), as
    sample.decode does; first_ban (V,) likewise. counts, a Counter, gets passes of the model, and
    drafted and accepted tokens."""
    n_prompt, target, ids = len(ids), Reader(model), [*ids]
    counts = Counter() if counts is None else counts
    end = n_prompt + n_new_tokens(model, n_prompt, config)

    def chances(logits, ids):
        if first_ban is not None and len(ids) == n_prompt:
            logits = logits.masked_fill(first_ban, -torch.inf)
        seen = torch.tensor([ids], device=logits.device)
        return distribution(logits, config, seen, n_prompt)[0].cpu()

    while len(ids) < end:
        tokens, q = draft.propose(ids, min(n_draft, end - len(ids) - 1), chances, generator)
        counts.update(passes=1, drafted=len(tokens))
        read = target.read(ids + tokens, len(tokens) + 1)                # (n + 1, V)
        for i, logits in enumerate(read.split(1)):
            p, drafted = chances(logits, ids), i < len(tokens)
            chosen = (accept(tokens[i], p, q[i], generator) if drafted
                      else sample_from(p[None], generator).item())
            ids.append(chosen)
            right = drafted and chosen == tokens[i]
            counts.update(accepted=right)
            yield chosen, logits
            if not right:  # what was guessed after it follows another text
                break


def write(model, tokenizer, prompt, draft, config=SampleConfig(), n_draft=4, counts=None):
    """Yield the Pieces that follow a prompt, as sample.write does for one."""
    if config.overflow != "stop":
        raise ValueError("overflow=slide forgets what a draft would be checked by: leave it out")
    config = with_ids(config, tokenizer)
    text = Continuation(model, tokenizer, prompt, config, 0)
    ban = no_space(tokenizer).to(model.device) if text.heals else None
    for token, logits in speculate(model, draft, text.ids, config, text.generator, n_draft, ban,
                                   counts):
        yield text.take(token, logits.log_softmax(dim=-1)[0, token].item())
        if not text.n_left:
            return


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class SpeculativeConfig(RunConfig):
    """What is continued, and by what it is guessed."""
    draft: str = option("ngram", "the folder of a small run with the same tokenizer, or ngram")
    n_draft: int = option(4, "how many tokens are guessed at a time", 1, 65)
    prompt: str = option("", "text to continue; without one a document begins")
    file: str | None = option(None, "a file with the prompt; - reads what is typed or piped in")


def open_draft(config, tokenizer, vocab_size):
    """The draft that a SpeculativeConfig names; ValueError if it has another tokenizer."""
    if config.draft == "ngram":
        return NgramDraft(vocab_size)
    model, own, _ = open_run(replace(config, run=config.draft, checkpoint="best"))
    if own.hash() != tokenizer.hash():
        raise ValueError(f"--draft={config.draft} has another tokenizer than the run: its tokens "
                         "mean something else")
    n_new_tokens(model, 1, SampleConfig())  # refuses one that writes no text
    return RunDraft(model)


def timed(pieces, show):
    """Take pieces and show their text -> (how many, in how many seconds)."""
    start, n = time.perf_counter(), 0
    for n, piece in enumerate(pieces, 1):
        show(piece.text)
    return n, time.perf_counter() - start


def main():
    typed, sampling = parse_options(__doc__, SpeculativeConfig, SampleConfig)
    refuse_idle(typed, ["prompt"] * ("file" in typed), "beside --file")
    command, config = SpeculativeConfig(**typed), sampling_config(sampling)
    prompt = command.prompt if command.file is None else read_text(command.file)
    model, tokenizer, where = open_run(command)
    draft, counts = open_draft(command, tokenizer, model.config.vocab_size), Counter()
    n_new_tokens(model, len(to_ids(tokenizer, prompt)), config)  # else it is too long
    print(prompt, end="")
    n, seconds = timed(write(model, tokenizer, prompt, draft, config, command.n_draft, counts),
                       partial(print, end="", flush=True))
    print()
    n_plain, plain = timed((piece for _, piece in sample.write(model, tokenizer, [prompt], config)),
                           lambda text: None)
    share = counts["accepted"] / max(1, counts["drafted"])
    print(f"{where}: {n} tokens, {share:.0%} of {counts['drafted']} guesses right, "
          f"{n / counts['passes']:.2f} tokens a pass, {n / seconds:,.0f} tokens/s, "
          f"{n / seconds / (n_plain / plain):.2f}x of plain decoding, seed {config.seed}",
          file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
