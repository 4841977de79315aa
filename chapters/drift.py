"""
Are the prompts of today like the text that the model was trained on? Where they are not, the model
has not learned what it is asked, and its server says so.

    python -m chapters.drift runs/chat        # writes runs/chat/prompts.json, the reference
    python -m chapters.serve runs/chat        # watches its prompts, and finds the reference there

Two measures of a prompt are compared, its length in tokens and its surprisal: the mean of -log p of
its tokens, the logarithm of the perplexity. The prompts themselves are neither kept nor logged.
"""

import math
import queue
import sys
import threading
from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # `python chapters/drift.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluate import held_out, score_ends
from model import option
from sample import RunConfig, SampleConfig, n_new_tokens, newest_run, open_run, warn
from tokenizer import parse_options, read_json, reading, run_command, write_json

MOST_WAITING = 8  # prompts whose surprisal is to be computed

# -----------------------------------------------------------------------------
# Drift: are the prompts of now like those of the reference?


def ks_distance(a, b):
    """The largest gap between the cumulative shares of two sorted lists of numbers, from 0 to 1:
    ks_distance([1, 2], [2, 3]) == 0.5. Known as Kolmogorov and Smirnov's."""
    return max(abs(bisect_right(a, x) / len(a) - bisect_right(b, x) / len(b)) for x in {*a, *b})


def ks_limit(n, m, chance=0.001):
    """The distance that samples of n and m numbers from one source exceed with this chance."""
    return math.sqrt(-math.log(chance / 2) / 2 * (n + m) / (n * m))


class Drift:
    """Compares one measure of each window of prompts with a reference, a list of numbers; without
    one the first window is the reference. add(value) returns the distance at a window's end, else
    None, and says one line if that is above limit, and above what chance explains."""

    def __init__(self, name, reference=None, window=200, limit=0.2, say=warn):
        self.name, self.window, self.limit, self.say = name, window, limit, say
        self.reference, self.values = sorted(reference or []), []

    def add(self, value):
        self.values.append(value)
        if len(self.values) < self.window:
            return None
        values, self.values = sorted(self.values), []
        if not self.reference:
            self.reference = values
            return None
        distance = ks_distance(self.reference, values)
        limit = max(self.limit, ks_limit(len(self.reference), len(values)))
        if distance > limit:
            before, now = (own[len(own) // 2] for own in (self.reference, values))
            self.say(f"drift: the {self.name} of the last {len(values)} prompts is {distance:.2f} "
                     f"away from the reference (limit {limit:.2f}), its median {now:.4g}, not "
                     f"{before:.4g}: look at what is asked, rate answers, and train on them")
        return distance


def prompt_nats(model, prompts):
    """The mean surprisal in nats a token of prompts, lists of two ids or more: what the model did
    not expect; its exponential is the perplexity."""
    rows = [(ids[:model.config.block_size], min(len(ids), model.config.block_size) - 1)
            for ids in prompts]
    scored = score_ends(model, rows, "surprisal")
    return [round(-scores.mean().item(), 4) for scores, _ in scored]  # rounding noise is no drift


class PromptWatch:
    """Watches the prompts of a server: see(ids) notes the length of each, and of every `every`-th
    the surprisal, in a thread that has no more than MOST_WAITING before it. reference: a dict of
    lists, "tokens" and "nats", as profile() makes one; after close() the thread ends."""

    def __init__(self, model, metrics, reference=None, every=10, say=warn, **options):
        self.model, self.gauge, self.every, self.n = model, metrics.drift, every, 0
        names, reference = {"tokens": "length in tokens", "nats": "surprisal"}, reference or {}
        self.drifts = {key: Drift(name, reference.get(key), say=say, **options)
                       for key, name in names.items()}
        self.waiting = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def see(self, ids):
        self.note("tokens", len(ids))
        self.n += 1
        if self.n % self.every == 0 and len(ids) > 1 and self.waiting.qsize() < MOST_WAITING:
            self.waiting.put([*ids])

    def note(self, key, value):
        distance = self.drifts[key].add(value)
        if distance is not None:
            self.gauge.labels(key).set(distance)

    def work(self):
        while (ids := self.waiting.get()) is not None:
            self.note("nats", prompt_nats(self.model, [ids])[0])

    def close(self):
        self.waiting.put(None)


# -----------------------------------------------------------------------------
# The reference: what a run's own held-out documents look like.


def profile(model, prompts):
    """{"tokens": the length of each prompt, "nats": the surprisal of each}, sorted."""
    prompts = [ids for ids in prompts if len(ids) > 1]
    return dict(tokens=sorted(map(len, prompts)),
                nats=sorted(prompt_nats(model, prompts)))


def training_prompts(folder, tokenizer, block_size):
    """The ids of documents that were held out from a run's training; of a chat what comes before
    the first answer. What is longer than block_size, as no prompt can be, is cut into pieces."""
    begin = tokenizer.special.get("<|assistant|>", -1)
    for row in held_out(folder, rows=True):
        ids = [tokenizer.eot, *tokenizer.encode(row["target"], special=True)]
        ids = ids[:ids.index(begin) + 1] if begin in ids else ids
        yield from (ids[i:i + block_size] for i in range(0, len(ids), block_size))


def read_reference(path):
    """A reference that the command wrote; ValueError for another file."""
    values = read_json(path)
    with reading(path):
        numbers = [float(x) for name in ("tokens", "nats") for x in values[name]]
        if len(numbers) < 4 or not all(map(math.isfinite, numbers)):
            raise ValueError("it lacks tokens and nats, lists of finite numbers")
    return values


@dataclass(frozen=True)
class DriftConfig(RunConfig):
    """Whose reference is written."""
    n_prompts: int = option(1000, "held-out documents, or pieces of long ones, at most", low=2)


def main():
    config = DriftConfig(**parse_options(__doc__, DriftConfig)[0])
    folder = config.run or newest_run()
    model, tokenizer, _ = open_run(config)
    n_new_tokens(model, 1, SampleConfig())  # refuses one that writes no text
    prompts = training_prompts(folder, tokenizer, model.config.block_size)
    found = profile(model, islice(prompts, config.n_prompts))
    path = Path(folder, "prompts.json")
    write_json(path, found)
    n = len(found["nats"])
    print(f"{path}: {n:,} prompts, median {found['tokens'][n // 2]} tokens, perplexity "
          f"{math.exp(found['nats'][n // 2]):,.1f}")


if __name__ == "__main__":
    run_command(main)
