"""
Scores of trained models: run folders go in; tables, scores.json and scores.png come out.

    python evaluate.py                        # the newest run, on the text held out from training
    python evaluate.py runs/a runs/b          # side by side, with paired intervals
    python evaluate.py --tasks=rows --rows=questions.jsonl    # a file like EXAMPLE_ROW, one a line
    python evaluate.py --tasks=small          # eight small tasks; or hellaswag,arc_easy --n_shots=5

Each score stands beside what guessing gets, with its 95% interval. Tasks and options that are not
in this file, such as those of the last line, are left to chapters/exams.py.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import contextlib
import itertools
import json
import math
import os
import random
import re
import runpy
import sys
from collections import defaultdict, namedtuple
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path

import numpy as np
import regex
import torch
from tqdm import tqdm

from data import check_shards, read_split
from model import cap_logits, check_known, check_options, option, read_header
from sample import (checkpoints, load_run, new_cache, newest_run, pick_checkpoint, pick_device,
                    pick_precision, warn)
from tokenizer import (Tokenizer, parse_options, read_json, reading, refuse_idle, replacing,
                       run_command, write_json)

BATCH_TOKENS, HEAD_TOKENS = 4096, 1024  # in a forward pass; of them, those with logits at once
CACHED_TOKENS = 4 * BATCH_TOKENS        # that a forward pass may attend to, over all its rows
EXAMPLE_ROW = '{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
UNSPACED = (r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
            r"\p{Tibetan}\u3000-\u303f\uff00-\uff9f]")  # of scripts without spaces between words
WORD = regex.compile(rf"(?:(?={UNSPACED})\X){{1,2}}\s*|(?:(?!{UNSPACED})\S)+\s*")  # or 2 characters
EXAMS = Path(__file__).with_name("chapters") / "exams.py"

# -----------------------------------------------------------------------------
# How likely is a text as the continuation of another, and how well is a whole text predicted?


@torch.inference_mode()
def read_ends(model, rows, cache=None):
    """For each (ids, n) of rows the log-probabilities in nats of its last n ids, and whether each
    was the likeliest: [((n,), (n,))]. Padding stands behind, where a causal model does not look."""
    ids, scored = torch.zeros(2, len(rows), max(len(row) for row, _ in rows), dtype=torch.long)
    for j, (row, n) in enumerate(rows):
        ids[j, :len(row)] = torch.as_tensor(row)
        scored[j, len(row) - n:len(row)] = 1
    ids, scored = ids.to(model.device), scored.bool().to(model.device)[:, 1:]
    x = model.transformer(ids[:, :-1], cache, model.dtype)[scored]           # (N, C)
    targets, scores, likeliest = ids[:, 1:][scored][:, None], [], []         # (N, 1)
    for part, target in zip(x.split(HEAD_TOKENS), targets.split(HEAD_TOKENS)):
        logits = cap_logits(model.lm_head(part), model.config.softcap).float()
        scores.append(logits.gather(1, target)[:, 0] - logits.logsumexp(dim=1))
        likeliest.append(logits.argmax(dim=1) == target[:, 0])
    lengths = [n for _, n in rows]
    return list(zip(*(torch.cat(parts).cpu().split(lengths) for parts in (scores, likeliest))))


def score_ends(model, rows, title="scoring"):
    """read_ends for any number of rows: those of like length share a forward pass."""
    order, results = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), {}
    with tqdm(total=len(rows), desc=title, disable=None, leave=False) as bar:
        while order:
            n_rows = max(1, BATCH_TOKENS // len(rows[order[0]][0]))
            batch, order = order[:n_rows], order[n_rows:]
            results |= zip(batch, read_ends(model, [rows[i] for i in batch]))
            bar.update(len(batch))
    return [results[i] for i in range(len(rows))]


@torch.inference_mode()
def score_shared(model, groups, title="scoring"):
    """{key: what score_ends says of before + after}, for each (before, {key: after}) of groups.
    What all befores begin with is read once, the rest of each once, with others of its length."""
    heads = [before[:-1] for before, _ in groups]  # the last id is read with each after
    sizes = [len(ends) * (len(before) + max(map(len, ends.values()))) for before, ends in groups]
    order = sorted(range(len(groups)), key=lambda i: (len(heads[i]), sizes[i]), reverse=True)
    head, results = os.path.commonprefix(heads), {}
    common = new_cache(model, 1, len(head))
    if head:
        model.transformer(torch.tensor([head], device=model.device), common, model.dtype)
    with tqdm(total=len(groups), desc=title, disable=None, leave=False) as bar:
        while order:
            n_groups, T = max(1, CACHED_TOKENS // sizes[order[0]]), len(heads[order[0]])
            batch = [i for i in order[:n_groups] if len(heads[i]) == T]
            order = order[len(batch):]
            rows = {key: (groups[i][0][-1:] + after, len(after))
                    for i in batch for key, after in groups[i][1].items()}
            cache = new_cache(model, 1, T + max(n for _, n in rows.values()))
            for layer, read in zip(cache, common):
                layer.append(read.k, read.v)
                layer.choose([0] * len(batch))
            if T > len(head):
                rest = torch.tensor([heads[i][len(head):] for i in batch], device=model.device)
                model.transformer(rest, cache, model.dtype)
            for layer in cache:
                layer.choose([j for j, i in enumerate(batch) for _ in groups[i][1]])
            results |= zip(rows, read_ends(model, list(rows.values()), cache))
            bar.update(len(batch))
    return results


def encode_pair(tokenizer, context, continuation):
    """-> (ids of the context, ids of the continuation). White space at the end of the context goes
    to the continuation, whose words are tokenized with it; no context is a new document."""
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    before, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    after = both[len(before):] or tokenizer.encode(continuation)  # a word may span the border
    return before or [tokenizer.eot], after


def loglikelihood(model, tokenizer, pairs, title="scoring"):
    """For each (context, continuation): (its log-probability in nats, whether greedy sampling gives
    it). A context that is too long loses its beginning; one that comes again is read once."""
    encoded, block_size = [encode_pair(tokenizer, *pair) for pair in pairs], model.config.block_size
    groups = defaultdict(dict)  # {context: {number of the pair: continuation}}
    for i, (before, after) in enumerate(encoded):
        if not 0 < len(after) <= block_size:
            raise ValueError(f"{pairs[i][1]!r:.40} has {len(after)} tokens, not 1 to {block_size}")
        groups[tuple(before)][i] = after
    shared = [(list(before), afters) for before, afters in groups.items() if len(afters) > 1
              and len(before) + max(map(len, afters.values())) <= block_size + 1]
    results = score_shared(model, shared, title) if shared else {}
    alone = [i for i in range(len(pairs)) if i not in results]
    rows = [(sum(encoded[i], [])[-block_size - 1:], len(encoded[i][1])) for i in alone]
    results |= zip(alone, score_ends(model, rows, title))
    return [(results[i][0].double().sum().item(), results[i][1].all().item())
            for i in range(len(pairs))]


def windows(tokens, block_size, stride):
    """Cut tokens into (ids, n) for score_ends, so that each token but the first is scored once,
    given at least block_size - stride tokens where there are that many before it."""
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride={stride} must be 1 to block_size={block_size}")
    stops = [1, *range(block_size + 1, len(tokens), stride), len(tokens)]
    return [(tokens[max(0, stop - block_size - 1):stop], stop - done)
            for done, stop in itertools.pairwise(stops)]


def surprisal(model, tokens, stride=None):
    """The surprise -log p in nats of each of N tokens but the first: an array (N - 1,). The window
    that the model sees moves by stride, half of it by default: less is more exact, and slower."""
    T = model.config.block_size
    rows = windows(tokens, T, math.ceil(T / 2) if stride is None else stride)
    scores, _ = zip(*score_ends(model, rows, "held-out text"))
    return -torch.cat(scores).double().numpy()


def perplexity(nats):
    """How many equally likely tokens would surprise as much: perplexity([log(8)]) == 8."""
    return math.exp(np.mean(nats))


def bits_per_byte(nats, n_bytes):
    """Surprise per byte, for any tokenizer comparable: bits_per_byte([log(8), log(2)], 2) == 2."""
    return np.sum(nats) / math.log(2) / n_bytes


# -----------------------------------------------------------------------------
# Intervals: 95 of 100 such intervals hold the score that endless text of this kind would give.
# A question gives each metric a vector; a metric makes a score of the sum of the vectors.


def ratio(sums):
    """The first of sums (..., d) over the last: what most metrics are."""
    return sums[..., 0] / sums[..., -1]


def exp_ratio(sums):
    """Perplexity of sums (..., 2): nats and tokens."""
    return np.exp(ratio(sums))


def spread(vectors, metric=ratio, n_resamples=1000, seed=0):
    """The bootstrap: between which two numbers the central 95% of the scores lie, of as many
    questions drawn from vectors (N, d) with replacement, again and again."""
    rng, N = np.random.default_rng(seed), len(vectors)
    sums = [vectors[rng.integers(N, size=N)].sum(axis=0) for _ in range(n_resamples)]
    return tuple(np.percentile(metric(np.array(sums)), [2.5, 97.5]).tolist())


def bootstrap(sums, units, n_resamples=1000, seed=0):
    """The interval of sum(sums) / sum(units), where block i of a text has sums[i] and units[i]."""
    return spread(np.stack([sums, units], axis=1), ratio, n_resamples, seed)


def wilson(share, n, z=1.96):
    """The interval of a share of n, which stays within 0 and 1: Wilson (1927)."""
    center, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    low, high = ((center + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def interval(vectors, metric=ratio):
    """-> (score, low, high) of vectors (N, d): Wilson's for right or wrong, else bootstrapped."""
    score = float(metric(vectors.sum(axis=0)))
    if metric is ratio and np.isin(vectors, (0, 1)).all() and vectors[:, -1].all():
        return score, *wilson(score, len(vectors))
    return score, *spread(vectors, metric)


def difference(a, b, metric=ratio):
    """-> (score of b - score of a, low, high); None unless a and b (N, d) are about the same
    questions. Paired: one that is drawn is drawn for both, so how hard it is does not count."""
    def gap(sums):
        return metric(sums[..., a.shape[1]:]) - metric(sums[..., :a.shape[1]])

    if a.shape != b.shape or a[:, -1].sum() != b[:, -1].sum():
        return None
    both = np.hstack([a, b])
    return float(gap(both.sum(axis=0))), *spread(both, gap)


# -----------------------------------------------------------------------------
# Questions {"context", "choices", "answer"}, where context may be one for each choice, between them
# question["between"], without which a space, None for what space_between says; and scores: (model,
# tokenizer, questions, config) -> for each question, or block of text, {metric: vector} with what
# else is worth keeping under "shown"; and what guessing gets, {metric: score}.


def read_jsonl(path, convert=lambda value: value):
    """Yield (number, convert(value)) for each line of a .jsonl file; an error names its line."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        with reading(f"{path}, line {number}"):
            if line.strip():
                yield number, convert(json.loads(line.decode("utf-8-sig")))


def is_question(row):
    """Whether a dict that a file held is a question of multiple choice."""
    context, choices, answer = (row.get(name) for name in ("context", "choices", "answer"))
    if not isinstance(choices, list):
        return False
    contexts = context if isinstance(context, list) else [context] * len(choices)
    return (len(contexts) == len(choices) and type(answer) is int and 0 <= answer < len(choices)
            and all(isinstance(text, str) for text in contexts + choices))


def space_between(context, choice):
    """The space between two texts; "" if one is empty, or if white space or a character of a script
    that is written without spaces stands there: space_between("5 =", "6") == " "."""
    sides = context[-1:] + choice[:1]
    return "" if len(sides) < 2 or regex.search(rf"\s|{UNSPACED}", sides) else " "


def format_row(row):
    """The question of a row of your own; ValueError if it is none."""
    if not (isinstance(row, dict) and is_question(row) and len(row["choices"]) > 1
            and all(map(str.strip, row["choices"])) and isinstance(row.get("between"), str | None)):
        raise ValueError(f"this is not a row like {EXAMPLE_ROW}: {row!r:.60}")
    return dict(between=None) | row


def read_rows(path, format_row=format_row):
    """The questions that format_row makes of the lines of a .jsonl file."""
    questions = [question for _, question in read_jsonl(path, format_row)]
    if not questions:
        raise ValueError(f"{path} holds no rows; one a line is read, such as {EXAMPLE_ROW}")
    return questions


def shuffled(rng, context, right, wrong):
    """A question: right and three of wrong, in any order."""
    wrong = sorted(set(wrong) - {right})
    choices = rng.sample([right, *rng.sample(wrong, 3)], 4)
    return dict(context=context, choices=choices, answer=choices.index(right))


def continuation_rows(texts, n_rows=200, seed=0):
    """Questions: 40 words, then in any order the 8 that follow and three times 8 from elsewhere."""
    rng, texts = random.Random(seed), [WORD.findall(text) for text in texts]
    cuts = [("".join(words[i - 40:i]), "".join(words[i:i + 8]).rstrip())
            for words in texts for i in range(40, len(words) - 7, 8)]
    cuts = [(context, piece) for context, piece in cuts if len(piece) <= 100]  # no tables of data
    pieces = sorted({piece for _, piece in cuts})
    if len(pieces) < 4:
        raise ValueError("the held-out text is too short for continuation questions of 48 words, "
                         f"8 of them within 100 characters: it has {len(pieces)}, 4 are needed: "
                         "leave continuation out of --tasks")
    return [shuffled(rng, context, piece, rng.sample(pieces, 4)) | dict(between="")
            for context, piece in rng.sample(cuts, min(n_rows, len(cuts)))]


def score_text(model, tokenizer, questions, config):
    """Perplexity and bits per byte of documents {"target"}, in blocks of text of like length."""
    documents = tokenizer.encode_batch([question["target"] for question in questions])
    tokens = np.concatenate([[tokenizer.eot, *ids] for ids in documents])
    stride = model.config.block_size if config.stride == "rolling" else config.stride
    nats, tokens = surprisal(model, tokens, stride and int(stride)), tokens[1:]
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    lengths[list(tokenizer.special.values())] = 0  # the end of a document has no bytes
    ends, V = lengths[tokens].cumsum(), model.config.vocab_size
    block = max(1, min(1024, ends[-1] // 20))
    starts = np.unique(np.searchsorted(ends, np.arange(0, ends[-1], block), "right"))
    sums = np.add.reduceat([nats, np.ones(len(tokens)), lengths[tokens]], starts, axis=1)
    outcomes = [{"perplexity": [nats, tokens], "bits per byte": [nats / math.log(2), n_bytes]}
                for nats, tokens, n_bytes in sums.T]
    return outcomes, {"perplexity": V, "bits per byte": len(tokens) * math.log2(V) / ends[-1]}


def pairs_of(question):
    """The (context, continuation) of each choice."""
    context, between = question["context"], question.get("between", " ")
    contexts = context if isinstance(context, list) else itertools.repeat(context)
    return [(text, (space_between(text, choice) if between is None else between) + choice)
            for text, choice in zip(contexts, question["choices"])]


def fits(model, tokenizer, question):
    """Whether each choice fits into the model's context; or what is to be read whole, beside the
    tokens that the answer may have, or half of the context."""
    T = model.config.block_size
    if "choices" not in question:
        room = T - min(question.get("answer_tokens", 0), T // 2)
        return len(tokenizer.encode(question.get("whole", ""))) <= room
    return all(0 < len(encode_pair(tokenizer, *pair)[1]) <= T for pair in pairs_of(question))


def score_choice(question, scored):
    """Whether the answer is the likeliest of the choices that have these (log-likelihood, greedy):
    acc by the log-likelihood, acc_norm by that per character, acc_bytes by that per byte."""
    sums, choices, answer = [n for n, _ in scored], question["choices"], question["answer"]
    sizes = dict(acc=1, acc_norm=[len(choice) for choice in choices],
                 acc_bytes=[len(choice.encode(errors="replace")) for choice in choices])
    with np.errstate(divide="ignore"):  # a choice without characters is never taken
        right = {name: np.divide(sums, size).argmax() == answer for name, size in sizes.items()}
    shown = dict(scores=sums, answer=answer, greedy=scored[answer][1])
    return {name: [float(value), 1.0] for name, value in right.items()} | {"shown": shown}


def score_choices(model, tokenizer, questions, config=None):
    """Which choice the model thinks likeliest."""
    pairs = [pair for question in questions for pair in pairs_of(question)]
    scored = iter(loglikelihood(model, tokenizer, pairs, "choices"))
    outcomes = [score_choice(question, [next(scored) for _ in question["choices"]])
                for question in questions]
    chance = np.mean([1 / len(question["choices"]) for question in questions])
    return outcomes, dict.fromkeys(("acc", "acc_norm", "acc_bytes"), chance)


def multiple_choice(model, tokenizer, rows):
    """The share of rows {"context", "choices", "answer"} whose answer is the likeliest choice:
    {"acc": by log-probability, "acc_norm": by log-probability per character}."""
    outcomes, _ = score_choices(model, tokenizer, [format_row(row) for row in rows])
    return {metric: float(np.mean([outcome[metric][0] for outcome in outcomes]))
            for metric in ("acc", "acc_norm")}


def exact_match(text, target, ignore=()):
    """1.0 if texts are equal but for case and ignored patterns: exact_match("1,0", "10", [","])."""
    for pattern in ignore:
        text, target = re.sub(pattern, "", text), re.sub(pattern, "", target)
    return float(text.lower() == target.lower())


def written(value, metric, sign=""):
    """A score as people read it: 25.0% for shares, four digits for the others."""
    if value is None:
        return "-"
    if metric not in ("perplexity", "bits per byte"):
        return f"{100 * value:{sign}.1f}%"
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}#.4g}"


def table(lines):
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cells(scores):
    """Scores as the lines of a table; the last column is for runs that were compared."""
    lines = [("task", "metric", "run", "score", "95% interval", "guessing", "measured on",
              "minus the first run" * any(row.get("difference") for row in scores))]
    for row in scores:
        show, compared = partial(written, metric=row["metric"]), ""
        left_out = f", {row['left_out']:,} left out" if row.get("left_out") else ""
        if row.get("difference"):
            _, least, most = row["difference"]
            verdict = "may be chance" if least <= 0 <= most else "differs"
            gap, least, most = (show(value, sign="+") for value in row["difference"])
            compared = f"{gap}, {least} to {most}: {verdict}"
        lines.append((row["task"], row["metric"], row["run"], show(row["value"]),
                      f"{show(row['low'])} to {show(row['high'])}", show(row["chance"]),
                      f"{row['n']:,} {row['unit']}{left_out}", compared))
    return lines


def draw_scores(scores, path):
    """A picture of scores: a panel for each metric, a line in it for each task and run."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's own plots
    metrics = [*dict.fromkeys(row["metric"] for row in scores)]
    fig = Figure(figsize=(8, 1 + 1.2 * len(metrics) + 0.4 * len(scores)), layout="constrained")
    fig.suptitle("scores with 95% intervals; diamonds: what guessing gets")
    for ax, metric in zip(fig.subplots(len(metrics), squeeze=False)[:, 0], metrics):
        rows = [row for row in scores if row["metric"] == metric][::-1]  # drawn from below
        names = [f"{row['task']}\n{row['run']}" for row in rows]
        value, low, high, chance = np.array([[row[name] for name in (
            "value", "low", "high", "chance")] for row in rows], float).T  # None becomes nan
        ax.plot(chance, names, "D", color="#bbbbbb")
        ax.errorbar(value, names, xerr=np.maximum(0, [value - low, high - value]), fmt="o",
                    capsize=4)
        ax.set(title=metric, xscale="log" if metric == "perplexity" else "linear")
        ax.grid(axis="x", alpha=0.3)
    with replacing(path) as file:
        fig.savefig(file, format="png")


# -----------------------------------------------------------------------------
# Tasks: what they are made of is texts(split, max_tokens), the documents of the first run's shards.
# questions: (config, texts) -> questions; score: as above; metrics: {name: what makes it of sums};
# options: those that act on it, "data" where it is made of texts

Task = namedtuple("Task", "questions score metrics options", defaults=[()])
TASKS = {
    "perplexity": Task(lambda config, texts: [dict(target=text) for text in texts()], score_text,
                       {"perplexity": exp_ratio, "bits per byte": ratio},
                       ("data", "max_tokens", "stride")),
    "continuation": Task(
        lambda config, texts: continuation_rows(texts(), config.n_questions or 200, config.seed),
        score_choices, {"acc": ratio, "acc_norm": ratio},
        ("data", "max_tokens", "n_questions", "seed")),
    "rows": Task(lambda config, texts: read_rows(config.rows)[:config.n_questions], score_choices,
                 {"acc": ratio, "acc_norm": ratio, "acc_bytes": ratio}, ("n_questions",)),
}
DEFAULT = ["perplexity", "continuation"]
VARIES = {"runs", "run", "tasks", "rows", "device", "scores", "card", "run_code"}  # scores do not


def trained_on(folder):
    """What a run's config.json says of its shards, {"path", "fingerprint", "sources"}, or {}."""
    path = Path(folder, "config.json")
    config = read_json(path) if path.exists() else {}
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) else {}


def held_out(folder, tokenizer, data=None, max_tokens=65_536, split="val"):
    """-> (a folder of shards: data, or those of the run; the first max_tokens of a split of
    theirs). ValueError if they are another tokenizer's, or not those that the run was trained on.
    """
    own, trained = Path(folder, "tokenizer.json"), {} if data else trained_on(folder)
    path = trained.get("path") if data is None else data
    if not isinstance(path, str) or not path:
        raise ValueError(f"no shards are named by {folder}/config.json or --data=FOLDER")
    shards, card = read_split(path, split), check_shards(path, (split,))
    if trained.get("fingerprint", card.fingerprint) != card.fingerprint:
        with reading(f"{folder}/config.json"):
            names, before = (" ".join(source["name"] for source in sources)
                             for sources in (card.sources, trained.get("sources", ())))
        raise ValueError(f"{path} holds {names:.99} ({card.fingerprint:.8}), {folder} was trained "
                         f"on {before:.99} ({trained['fingerprint']!s:.8}): --data=FOLDER names "
                         "shards to take, or train again")
    if card.tokenizer != tokenizer.hash():
        raise ValueError(f"{path} was written with another tokenizer than {own}: python data.py "
                         f"SOURCE --tokenizer={own} --out=shards/NAME writes shards that fit")
    tokens = np.concatenate([shard[:max_tokens] for shard in shards])
    return Path(path), tokens[:max_tokens].astype(int)


def make_questions(config, tasks, default, folder):
    """{task: questions} of --tasks, or of those of default that the text is long enough for."""
    @cache
    def texts(split="val", max_tokens=config.max_tokens):
        tokenizer = Tokenizer.load(Path(folder, "tokenizer.json"))
        _, tokens = held_out(folder, tokenizer, config.data, max_tokens, split)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
        return [tokenizer.decode(ids[ids != tokenizer.eot].tolist()) for ids in parts if len(ids)]

    names = ["rows"] if config.rows is not None else default
    names = names if config.tasks is None else config.tasks.split(",")
    for name in names:
        check_known(name, tasks, "task")
    if config.rows is not None and len({*names} - {*default}) != 1 or (
            "rows" in names and config.rows is None):
        raise ValueError("--tasks=TASK and --rows=FILE.jsonl, the rows of that task, go together")
    acting = {option for name in names for option in tasks[name].options}
    idle = {option for task in tasks.values() for option in task.options} - acting
    typed = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    refuse_idle(typed, sorted(idle), f"beside --tasks={','.join(names)}")
    questions = {}
    for name in names:
        try:
            questions[name] = tasks[name].questions(config, texts)
        except ValueError as error:
            if names is not default or name == "perplexity":
                raise
            print(f"{name} is left out: {error}")
    return questions


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and how."""
    runs: list = option([], "run folders; without one the newest", positional=True)
    tasks: str | None = option(None, f"some of {','.join(TASKS)} (default {','.join(DEFAULT)})")
    rows: str | None = option(None, "questions from this .jsonl file, multiple choice of your own, "
                              'before a choice its "between"; else a space, unless white space or '
                              "a script without spaces, such as Chinese, stands on one side")
    n_questions: int | None = option(None, "of each task (default 200 if made, else all)", low=1)
    data: str | None = option(None, "shards whose validation split is held out (default the run's)")
    max_tokens: int = option(65_536, "score at most this many held-out tokens", low=1)
    stride: str | None = option(None, "tokens the window moves by (default half), or rolling: all")
    seed: int = option(0, "of the questions")
    checkpoint: str = option("best", "best | last | a step")
    device: str = option("auto", "auto | cuda | mps | cpu")
    precision: str = option("fp32", "auto | fp32 | bf16 | fp16; in fp32 machines agree")

    def __post_init__(self):
        check_options(self)
        if self.stride is not None and not re.fullmatch("rolling|[1-9][0-9]{0,8}", self.stride):
            raise ValueError(f"stride={self.stride} must be a number of tokens, or rolling")


def score_task(name, task, asked, model, tokenizer, config, folder):
    """Ask those of the questions that fit the model's context; outcomes go to scores/NAME.json ->
    [(a score {"value", ...}, (the questions, their vectors)) for each metric]."""
    fitting, rows = [question for question in asked if fits(model, tokenizer, question)], []
    if not fitting:
        return []
    outcomes, chance = task.score(model, tokenizer, fitting, config)
    write_json(folder / "scores" / f"{name}.json", outcomes)
    for metric in [metric for metric in task.metrics if metric in outcomes[0]]:
        array = np.array([outcome[metric] for outcome in outcomes])
        value, low, high = interval(array, task.metrics[metric])
        n, unit = len(array), "questions"
        if name == "perplexity":
            n, unit = int(array[:, -1].sum()), "bytes" if "byte" in metric else "tokens"
        rows.append((dict(task=name, metric=metric, run=str(folder), value=value, low=low,
                          high=high, chance=chance.get(metric), n=n, unit=unit,
                          left_out=len(asked) - len(fitting)), (fitting, array)))
    return rows


def score_run(checkpoint, questions, config, tasks):
    """Score a checkpoint on {task: questions} -> its report, with the "vectors" of the scores."""
    folder, device = checkpoint.parent, pick_device(config.device)
    precision, dtype = pick_precision(config.precision, device)
    model, tokenizer = load_run(folder, checkpoint, device, dtype)
    if not model.config.causal or model.config.cross or model.config.n_classes:
        raise ValueError(f"{checkpoint} does not continue a text, as a causal language model does")
    print(f"{checkpoint} ({model.n_parameters() / 1e6:.1f}M parameters, {device}, {precision}): "
          f"{', '.join(questions)}", flush=True)
    scored = [pair for name, asked in questions.items() for pair in score_task(
        name, tasks[name], asked, model, tokenizer, config, folder)]
    if empty := {*questions} - {row["task"] for row, _ in scored}:
        line = (f"{folder}: none of the questions of {', '.join(sorted(empty))} fits into the "
                f"context of {model.config.block_size} tokens")
        if not scored:
            raise ValueError(line)
        warn(line)
    scores, vectors = zip(*scored)
    report = asdict(config) | dict(
        run=str(folder), checkpoint=checkpoint.name, device=device, precision=precision,
        weights=read_header(checkpoint)[1].get("sha256"), scores=[*scores],
        tasks=[*dict.fromkeys(row["task"] for row in scores)])
    write_scores(report, folder / "scores.json")
    return report | dict(vectors=vectors)


def write_scores(report, path):
    """Write scores.json. Scores that it has of other tasks stay, if weights and settings agree."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        old = read_json(path)
        if all(old[name] == report[name] for name in {"weights", *old} & {*report} - VARIES):
            scores = [row for row in old["scores"] if row["task"] not in report["tasks"]]
            tasks = dict.fromkeys([*(row["task"] for row in scores), *report["tasks"]])
            report = old | report | dict(scores=scores + report["scores"], tasks=[*tasks])
    write_json(path, report)


def compare(first, report, tasks):
    """Add to the scores of a report how far they lie from the first's that were asked the same."""
    pairs = itertools.product(*(zip(part["scores"], part["vectors"]) for part in (first, report)))
    for (old, (before, a)), (row, (asked, b)) in pairs:
        if asked == before and all(old[name] == row[name] for name in ("task", "metric")):
            row["difference"] = difference(a, b, tasks[row["task"]].metrics[row["metric"]])


def score_runs(config, tasks=TASKS, default=DEFAULT):
    """Score the runs of config and compare them with the first -> ({task: questions}, reports)."""
    runs = [run for run in config.runs if checkpoints(run)] or config.runs or [newest_run()]
    for run in config.runs:  # runs/* names files, too
        if run not in runs and not Path(run).is_file():
            warn(f"{run} is no run folder with a checkpoint: left out")
    chosen = [pick_checkpoint(run, config.checkpoint) for run in runs]
    folders = [checkpoint.parent for checkpoint in chosen]
    questions = make_questions(config, tasks, default, folders[0])
    if any("data" in tasks[name].options for name in questions):
        read = {str(folder): trained_on(folder).get("fingerprint") for folder in folders}
        others = [run for run, text in read.items() if text not in (None, read[str(folders[0])])]
        if others:
            print(f"{', '.join(others)}: trained on another text than {folders[0]}, whose held-out "
                  "text this is, and may have read it")
    reports = [score_run(checkpoint, questions, config, tasks) for checkpoint in chosen]
    for report in reports[1:]:
        compare(reports[0], report, tasks)
    order = [(name, metric) for name in questions for metric in tasks[name].metrics]
    scores = sorted([row for report in reports for row in report["scores"]],
                    key=lambda row: order.index((row["task"], row["metric"])))
    print(table(cells(scores)))
    folder = Path(reports[0]["run"])
    place = folder / "scores" if len(reports) == 1 else folder.parent / "leaderboard"
    if len(reports) > 1:
        print("differs: on such texts and questions; what other seeds of training would give, "
              "python -m chapters.search --seeds=3 OPTIONS measures")
        write_json(f"{place}.json", scores)
    draw_scores(scores, f"{place}.png")
    print(f"scores: {place}.json, picture: {place}.png")
    return questions, reports


def main():
    typed = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    unknown = typed - {"--help", *(f"--{f.name}" for f in fields(EvaluateConfig))}
    config = None if unknown else EvaluateConfig(**parse_options(__doc__, EvaluateConfig)[0])
    unknown = unknown or {*(config.tasks or "rows").split(",")} - {*TASKS}
    if not unknown:
        score_runs(config)
    elif EXAMS.exists():
        runpy.run_module("chapters.exams", run_name="__main__")
    else:
        raise ValueError(f"{min(unknown)} is unknown here, and chapters/exams.py is not there")


if __name__ == "__main__":
    run_command(main)
