"""
Beam search: a run and a prompt go in, the likeliest continuation that it finds comes out.

    python -m chapters.beam runs/a --prompt="def " --beams=4 --max_new_tokens=50
    python -m chapters.beam runs/a --prompt="def " --length_penalty=0     # prefers short texts
    python -m chapters.beam runs/chat --chat --prompt="Hi!"               # the likeliest reply

Nothing is left to chance: sample.py draws each token, and here several beginnings of the text are
under way at a time, of which the likeliest stay. One beam is sample.py --temperature=0.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/beam.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from model import option
from sample import (RunConfig, SampleConfig, as_turns, end_ids, n_new_tokens, new_cache, open_run,
                    to_ids)
from tokenizer import parse_options, run_command


def beam_search(model, ids, n_beams=4, max_new_tokens=50, length_penalty=1.0, ends=(), cache=True):
    """-> [(ids that follow ids (1, T), score)], the best first; n_beams texts are under way at a
    time, ends end one. Score: log-probability / length ** length_penalty. arXiv:1609.08144"""
    T, V = ids.size(1), model.config.vocab_size
    n_tokens = n_new_tokens(model, T, SampleConfig(max_new_tokens=max_new_tokens))
    kv_cache = new_cache(model, 1, T + n_tokens) if cache else None
    beams, sums, done = ids, torch.zeros(1, device=ids.device), []       # (n, T), (n,)
    while len(beams):
        unseen = beams[:, kv_cache[0].length:] if cache else beams
        with torch.inference_mode():
            logits, _ = model(unseen, cache=kv_cache, last_only=True)
        totals = sums[:, None] + logits[:, -1].float().log_softmax(dim=-1)            # (n, V)
        best, index = totals.flatten().topk(min(2 * n_beams, totals.numel()))
        texts = torch.cat((beams[index // V], index[:, None] % V), dim=1)             # (2n, T + 1)
        length = texts.size(1) - T
        ended = torch.isin(texts[:, -1], torch.tensor([*ends], device=ids.device))
        ended |= length == n_tokens
        done += [(texts[i, T:].tolist(), best[i].item() / length**length_penalty)
                 for i in ended[:n_beams].nonzero().flatten()]
        done = sorted(done, key=lambda pair: -pair[1])[:n_beams]
        left = (~ended).nonzero().flatten()[:n_beams]
        beams, sums = texts[left], best[left]
        for layer in kv_cache or ():
            layer.choose(index[left] // V)
    return done


@dataclass(frozen=True)
class BeamConfig(RunConfig):
    """What is continued, and how widely it is searched."""
    prompt: str = option("", "text to continue; without one a document begins")
    chat: bool = option(False, "the prompt is what a user says, and is replied to")
    beams: int = option(4, "how many texts are under way at a time", 1, 65)
    length_penalty: float = option(1.0, "0 prefers short texts, 1 the best mean a token", below=11)
    max_new_tokens: int = option(200, "longest continuation, in tokens", low=1)


def main():
    typed, = parse_options(__doc__, BeamConfig)
    config = BeamConfig(**typed)
    model, tokenizer, where = open_run(config)
    text, prompt = config.prompt, config.prompt
    if config.chat:
        (text, prompt), = as_turns(model, tokenizer, [prompt])
    ids, ends = torch.tensor([to_ids(tokenizer, prompt)], device=model.device), end_ids(tokenizer)
    (best, score), *_ = beam_search(model, ids, config.beams, config.max_new_tokens,
                                    config.length_penalty, ends)
    print(text + tokenizer.decode([id for id in best if id not in ends]))
    print(f"{where}: {len(best)} tokens, score {score:.3f} by {config.beams} beams",
          file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
