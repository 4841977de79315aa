"""
What a model has memorized: canaries, secrets that were planted in its training text; membership,
whether a text was trained on.

    python -m chapters.memorization runs/a                     # membership, on the run's own shards
    python -m chapters.memorization runs/a --reference=runs/b  # and relative to another run
    python -m chapters.memorization --plant=corpus.txt --out=planted
    python train.py --data=planted/text.jsonl --out=runs/a
    python -m chapters.memorization runs/a --canaries=planted/canaries.jsonl

An attack needs no more than the probabilities of tokens, which many an API returns. Deduplication
and DP-SGD, which bounds the influence of each document, protect against both; experiment() measures
how much, and what they cost.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/memorization.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import regex
import torch

from chapters.classify import read_examples
from chapters.dpsgd import epsilon, fit, text_rows
from chapters.grammar import stories
from chapters.membership import attack, load_writer, log_probs, run_membership
from chapters.near import repeated_lines
from chapters.weights import whole_folder
from data import exact_duplicates, read_documents, read_rows
from evaluate import loglikelihood
from model import GPT, GPTConfig, check_options, option
from sample import newest_run
from tokenizer import Tokenizer, check_fields, parse_options, refuse_idle, run_command

TIMES = 0, 1, 4, 16  # how often canaries are planted; those with 0 show what chance gives
SYLLABLES = ["".join(pair) for pair in zip("bdgklmnprstvz" * 5, "aeiou" * 13)]

# -----------------------------------------------------------------------------
# Canaries: a random secret is as likely as any other, unless the model has memorized it.


@dataclass(frozen=True)
class Canary:
    """A secret, what the model is asked for it with, and how many times it was planted."""
    prefix: str
    secret: str
    times: int = 1

    @property
    def line(self):
        return f"{self.prefix} {self.secret}."


def numbers_like(secret):
    """All numbers of as many digits: numbers_like("7") == ["0", "1", ..., "9"]."""
    if not regex.fullmatch("[0-9]{1,5}", secret):
        raise ValueError(f"secret={secret!r:.40} must be a number of 1 to 5 digits, as its rank "
                         "among all of them is what is measured")
    return [f"{number:0{len(secret)}}" for number in range(10**len(secret))]


def canaries(n=4, times=TIMES, digits=3, seed=0):
    """n canaries for each of the times, each with a name and a random number of its own."""
    random, numbers = Random(seed), {}
    while len(numbers) < n * len(times):
        name = "".join(random.choices(SYLLABLES, k=3)).capitalize()
        numbers[name] = f"{random.randrange(10**digits):0{digits}}"
    return [Canary(f"The secret number of the account of {name} is", number, times[i // n])
            for i, (name, number) in enumerate(numbers.items())]


def plant(texts, canaries, seed=0):
    """The texts with each canary as a line of its own in random ones, as many times as it says."""
    lines, random = [text.split("\n") for text in texts], Random(seed)
    for canary in canaries:
        for own in random.choices(lines, k=canary.times):
            own.insert(random.randint(1, len(own)), canary.line)
    return ["\n".join(own) for own in lines]


def exposure(model, tokenizer, canaries, candidates=None):
    """-> (bits (N,), extracted (N,)): the exposure of each canary, log2 |R| - log2 rank, its rank
    by likelihood among the candidates R, by default numbers_like it (arXiv:1802.08232); and whether
    greedy decoding writes the secret. Ties count against the rank, so a model that knows nothing
    exposes 0 bits; a secret that was never seen gets 1.44 on average."""
    bits, extracted = [], []
    for canary in canaries:
        known = candidates or numbers_like(canary.secret)
        own, pairs = known.index(canary.secret), [(canary.prefix, f" {one}") for one in known]
        scores, greedy = zip(*loglikelihood(model, tokenizer, pairs, "exposure"))
        bits.append(math.log2(len(known) / sum(score >= scores[own] for score in scores)))
        extracted.append(greedy[own])
    return np.array(bits), np.array(extracted)


def by_times(canaries, bits, extracted):
    """{times: (exposures in bits, share extracted)} of canaries and their exposure()."""
    groups = {times: [canary.times == times for canary in canaries]
              for times in sorted({canary.times for canary in canaries})}
    return {times: (bits[own].tolist(), float(extracted[own].mean()))
            for times, own in groups.items()}


# -----------------------------------------------------------------------------
# Two experiments with tiny models, and the attacks on a run.

DEDUP = {
    "none": lambda texts: texts,
    "documents": lambda texts: [*np.delete(np.array(texts, object), exact_duplicates(texts))],
    "lines": lambda texts: [*filter(None, repeated_lines(texts))],
}


def tiny_model(tokenizer, seed=0, **options):
    """An untrained model of two layers and 32 channels."""
    torch.manual_seed(seed)
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=256) | options
    return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape))


def sentences(n, seed=0):
    """n different sentences of the stories of chapters/grammar.py."""
    found = dict.fromkeys(one for text in stories(n, seed)
                          for one in regex.split(r"(?<=\.) ", text))
    return Random(seed).sample([*found], n)


def canary_experiment(dedup="none", clip=0.0, noise=0.0, epochs=7, n=6, n_texts=200, seed=0):
    """Plant n canaries for each of TIMES in sentences, deduplicate, train a tiny model -> {"found":
    by_times(), "loss": nats per token of held-out sentences, "epsilon": of a document, infinite
    without noise}. It takes a few seconds."""
    texts, secrets = sentences(2 * n_texts, seed), canaries(n, seed=seed)
    texts, held_out = texts[:n_texts], texts[n_texts:]
    tokenizer = Tokenizer.train(texts, 512)  # without the secrets, which would become tokens
    rows = text_rows(tokenizer, DEDUP[dedup](plant(texts, secrets, seed)))
    model = fit(tiny_model(tokenizer, seed), rows, epochs, clip=clip, noise=noise, seed=seed)
    loss = -np.concatenate(log_probs(model, text_rows(tokenizer, held_out))).mean()
    return dict(found=by_times(secrets, *exposure(model, tokenizer, secrets)), loss=float(loss),
                epsilon=epsilon(noise, 16 / len(rows), epochs * math.ceil(len(rows) / 16)))


def membership_experiment(epochs, n=150, seed=0):
    """Train a tiny model on n of the sentences in languages.jsonl, and a reference on as many
    others -> what attack() finds on the n and on n that neither has seen."""
    texts = [row["text"] for use in ("train", "test") for row in read_examples(
        "languages.jsonl", use) if row["language"] in "de en es fr it nl pt".split()]
    tokenizer, random = Tokenizer(()), Random(seed)
    rows = text_rows(tokenizer, random.sample(texts, 3 * n))
    model, reference = (fit(tiny_model(tokenizer, seed), own, n_epochs, seed=seed)
                        for own, n_epochs in ((rows[:n], epochs), (rows[2 * n:], 5)))
    return attack(model, rows[:n], rows[n:2 * n], reference)


def read_canaries(path):
    """The canaries in a file that write_planted() made, or in one like it."""
    return [*read_rows(path, lambda row: check_fields(Canary, row, path))]


def write_planted(paths, out, n=4, seed=0):
    """Plant n canaries for each of TIMES in the documents of files -> the folder `out`, a new one:
    text.jsonl to train on, and canaries.jsonl, what was planted."""
    texts = [text.strip() for path in paths for text in read_documents(path)]
    secrets = canaries(n, seed=seed)
    if not any(texts):
        raise ValueError(f"{' '.join(map(str, paths))}: no documents to plant canaries in")
    rows = {"text": [dict(text=text) for text in plant(filter(None, texts), secrets, seed)],
            "canaries": map(asdict, secrets)}
    with whole_folder(out) as part:
        for name, own in rows.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in own]
            (part / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return Path(out)


@dataclass(frozen=True)
class MemorizationConfig:
    """Which run is attacked, and with what."""
    run: str | None = option(None, "run folder; else the newest under runs/", positional=True)
    data: str | None = option(None, "its shards, if they are not where its config.json says")
    reference: str | None = option(None, "a run with the same tokenizer, trained on other texts")
    canaries: str | None = option(None, "a file of canaries, whose exposure is measured instead")
    plant: str | list = option([], "files in whose documents canaries are planted", many=True)
    out: str | None = option(None, "with --plant: the folder to write")
    n: int = option(500, "pieces of each split", low=1)
    seed: int = option(0, "of what is chosen at random")

    __post_init__ = check_options


def main():
    typed, = parse_options(__doc__, MemorizationConfig)
    it = MemorizationConfig(**typed)
    for name, idle in dict(plant="run data reference canaries n",
                           canaries="data reference n seed").items():
        refuse_idle(typed, idle.split() * (name in typed), f"beside --{name}")
    refuse_idle(typed, ["out"] * (not it.plant), "without --plant=FILE")
    if it.plant:
        if not it.out:
            raise ValueError("--plant needs --out=FOLDER, a folder to write")
        paths = [it.plant] if isinstance(it.plant, str) else it.plant
        out = write_planted(paths, it.out, seed=it.seed)
        print(f"next: python train.py --data={out}/text.jsonl, then\n"
              f"python -m chapters.memorization RUN --canaries={out}/canaries.jsonl")
        return
    run = it.run or newest_run()
    if it.canaries:
        found = read_canaries(it.canaries)
        scored = exposure(*load_writer(run), found)
        print("planted  number  exposure (bits)  extracted")
        for times, (bits, share) in by_times(found, *scored).items():
            print(f"{times:7}{len(bits):8}{np.mean(bits):17.2f}{share:11.0%}")
        return
    found = run_membership(run, it.data, it.reference, it.n, it.seed)
    print("attack      AUC  95% interval     true positives at 1% false ones")
    for name, own in found.items():
        print(f"{name:7}{own.auc:8.3f}  {own.low:.3f} to {own.high:.3f}{own.tpr:21.1%}")


if __name__ == "__main__":
    run_command(main)
