"""
Scores of trained models: run folders go in; tables, scores.json and scores.png come out.

    python evaluate.py                        # the newest run, on the text held out from training
    python evaluate.py runs/a runs/b          # side by side, with paired intervals
    python evaluate.py --tasks=rows --rows=questions.jsonl    # a file like EXAMPLE_ROW, one a line
    python evaluate.py --tasks=hellaswag,arc_easy --n_shots=5 --card

Each score stands beside what guessing gets, with its 95% interval. Tasks and options that are not
in this file, such as those of the last line, are left to chapters/exams.py.
"""

import itertools
import json
import math
import os
import random
import re
import runpy
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import check_shards, read_split
from model import cap_logits, check_known, option
from sample import load_run, new_cache, newest_run, pick_checkpoint, pick_device, pick_precision
from tokenizer import (Tokenizer, parse_options, read_json, reading, replacing, run_command,
                       write_json)

BATCH_TOKENS, HEAD_TOKENS = 4096, 1024  # in a forward pass; of them, those with logits at once
CACHED_TOKENS = 4 * BATCH_TOKENS        # that a forward pass may attend to, over all its rows
CONTEXT_WORDS, CHOICE_WORDS = 40, 8     # in a question made of held-out text
EXAMPLE_ROW = '{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
EXAMS = Path(__file__).with_name("chapters") / "exams.py"

# -----------------------------------------------------------------------------
# The primitive: how likely is one text as the continuation of another?


def token_scores(model, x, targets):
    """For the last layer's output (N, C) and the ids that follow (N,): the log-probability in nats
    of each, and whether it was the likeliest; (N,) both."""
    scores, likeliest = [], []
    for part, target in zip(x.split(HEAD_TOKENS), targets[:, None].split(HEAD_TOKENS)):
        logits = cap_logits(model.lm_head(part), model.config.softcap).float()
        scores.append(logits.gather(1, target)[:, 0] - logits.logsumexp(dim=1))
        likeliest.append(logits.argmax(dim=1) == target[:, 0])
    return torch.cat(scores).cpu(), torch.cat(likeliest).cpu()


def read_ends(model, rows, cache=None):
    """For each (ids, n) of rows the token_scores of its last n ids: [(n,), (n,)]. A shorter row is
    padded behind its end, where a causal model does not look."""
    ids, scored = torch.zeros(2, len(rows), max(len(row) for row, _ in rows), dtype=torch.long)
    for j, (row, n) in enumerate(rows):
        ids[j, :len(row)] = torch.as_tensor(row)
        scored[j, len(row) - n:len(row)] = 1
    ids, scored = ids.to(model.device), scored.bool().to(model.device)[:, 1:]
    with torch.inference_mode():
        x = model.transformer(ids[:, :-1], cache, model.dtype)[scored]       # (N, C)
        results = token_scores(model, x, ids[:, 1:][scored])
    return list(zip(*(values.split([n for _, n in rows]) for values in results)))


def score_ends(model, rows, title="scoring"):
    """read_ends for any number of rows: those of like length share a forward pass."""
    order, results = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), [None] * len(rows)
    with tqdm(total=len(rows), desc=title, disable=None, leave=False) as bar:
        while order:
            n_rows = max(1, BATCH_TOKENS // len(rows[order[0]][0]))
            batch, order = order[:n_rows], order[n_rows:]
            for i, result in zip(batch, read_ends(model, [rows[i] for i in batch])):
                results[i] = result
            bar.update(len(batch))
    return results


def extend_cache(model, cache, parents, ids, n_more=0):
    """Copies of the cache's rows `parents` (B,) that have also read ids (B, T), with space for
    n_more tokens. It is how texts that begin alike share the work of their beginning."""
    length = cache[0].length if cache else 0
    longer = new_cache(model, len(parents), length + ids.size(1) + n_more)
    for old, new in zip(cache or (), longer):
        new.append(old.k[parents, :, :length], old.v[parents, :, :length])
    if ids.size(1):
        with torch.inference_mode():
            model.transformer(ids.to(model.device), longer, model.dtype)
    return longer


def score_shared(model, groups, title="scoring"):
    """What score_ends says of the rows (before + after, len(after)) of each (before, [after, ...]),
    in lists. What all befores begin with is read once, the rest of each once, together with others
    of its length."""
    heads = [before[:-1] for before, _ in groups]  # the last id is read with each after
    sizes = [len(afters) * (len(before) + max(map(len, afters))) for before, afters in groups]
    head, results = os.path.commonprefix(heads), [None] * len(groups)
    common = extend_cache(model, None, [0], torch.tensor([head], dtype=torch.long))
    order = sorted(range(len(groups)), key=lambda i: (len(heads[i]), sizes[i]), reverse=True)
    with tqdm(total=len(groups), desc=title, disable=None, leave=False) as bar:
        while order:
            n_groups, T = max(1, CACHED_TOKENS // sizes[order[0]]), len(heads[order[0]])
            batch = [i for i in order[:n_groups] if len(heads[i]) == T]
            order = order[len(batch):]
            rest = torch.tensor([heads[i][len(head):] for i in batch], dtype=torch.long)
            ends = [(groups[i][0][-1:] + after, len(after))
                    for i in batch for after in groups[i][1]]
            parents = [j for j, i in enumerate(batch) for _ in groups[i][1]]
            cache = extend_cache(model, common, [0] * len(batch), rest)
            cache = extend_cache(model, cache, parents, rest[:, :0], max(n for _, n in ends))
            scored = iter(read_ends(model, ends, cache))
            for i in batch:
                results[i] = list(itertools.islice(scored, len(groups[i][1])))
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
    """For each (context, continuation): (the log-probability of the continuation in nats, whether
    greedy sampling gives it). A context that is too long loses its beginning. Continuations of one
    context share the reading of it."""
    groups, alone, block_size = defaultdict(list), [], model.config.block_size
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    times = Counter(tuple(before) for before, _ in encoded)
    for i, (before, after) in enumerate(encoded):
        if not 0 < len(after) <= block_size:
            raise ValueError(f"a continuation has {len(after)} tokens, this model takes 1 to "
                             f"{block_size}: {pairs[i][1][:40]!r}")
        shares = times[tuple(before)] > 1 and len(before) + len(after) <= block_size + 1
        (groups[tuple(before)] if shares else alone).append(i)
    rows = [(sum(encoded[i], [])[-block_size - 1:], len(encoded[i][1])) for i in alone]
    shared = [(list(before), [encoded[i][1] for i in group]) for before, group in groups.items()]
    results = dict(zip(alone, score_ends(model, rows, title)))
    for group, scored in zip(groups.values(), score_shared(model, shared, title) if shared else ()):
        results |= zip(group, scored)
    return [(scores.double().sum().item(), likeliest.all().item())
            for scores, likeliest in map(results.get, range(len(pairs)))]


# -----------------------------------------------------------------------------
# Predicting text: surprise in nats, perplexity, bits per byte.


def windows(tokens, block_size, stride):
    """Cut tokens into (ids, n) for score_ends, so that each token but the first is scored once,
    given at least block_size - stride tokens where there are that many before it. A stride of
    block_size, after <|endoftext|>, is what lm-evaluation-harness calls rolling."""
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride={stride} must be 1 to block_size={block_size}")
    rows, done = [], 1
    for stop in [*range(block_size + 1, len(tokens), stride), len(tokens)]:
        rows.append((tokens[max(0, stop - block_size - 1):stop], stop - done))
        done = stop
    return rows


def surprisal(model, tokens, stride=None):
    """The surprise -log p in nats of each of N tokens but the first: an array (N - 1,). The window
    that the model sees moves by stride, half of it by default: less is more exact, and slower."""
    block_size = model.config.block_size
    rows = windows(tokens, block_size, math.ceil(block_size / 2) if stride is None else stride)
    scores = [scores for scores, _ in score_ends(model, rows, "held-out text")]
    return -torch.cat(scores).double().numpy()


def perplexity(nats):
    """How many equally likely tokens would surprise as much: perplexity([log(8)]) == 8."""
    return math.exp(np.mean(nats))


def bits_per_byte(nats, n_bytes):
    """Surprise in bits for each byte of text, which, unlike perplexity, does not depend on the
    tokenizer: bits_per_byte([log(8), log(2)], 2) == 2."""
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


def resamples(vectors, metric=ratio, n_resamples=1000, seed=0):
    """The bootstrap: the scores (n_resamples,) of as many questions drawn from vectors (N, d) with
    replacement, again and again. For the same N and seed the same questions are drawn."""
    rng, N = np.random.default_rng(seed), len(vectors)
    sums = [vectors[rng.integers(N, size=N)].sum(axis=0) for _ in range(n_resamples)]
    return metric(np.array(sums))


def central(values):
    """Between which two numbers the central 95% of values lie."""
    return tuple(np.percentile(values, [2.5, 97.5]).tolist())


def bootstrap(sums, units, n_resamples=1000, seed=0):
    """The interval of sum(sums) / sum(units), where block i of a text has sums[i] and units[i]."""
    return central(resamples(np.stack([sums, units], axis=1), ratio, n_resamples, seed))


def wilson(share, n, z=1.96):
    """The interval of a share of n, which stays within 0 and 1: Wilson (1927)."""
    center, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    low, high = ((center + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def interval(vectors, metric=ratio):
    """-> (score, low, high) of vectors (N, d): Wilson's interval where each question is right or
    wrong, the bootstrap's elsewhere."""
    score = float(metric(vectors.sum(axis=0)))
    if metric is ratio and np.isin(vectors, (0, 1)).all() and vectors[:, -1].all():
        return score, *wilson(score, len(vectors))
    return score, *central(resamples(vectors, metric))


def difference(a, b, metric=ratio):
    """-> (score of b - score of a, low, high), where a and b (N, d) are about the same questions;
    None if they are not. Paired: a question drawn is drawn for both, so what makes it hard for both
    does not count."""
    if a.shape != b.shape or a[:, -1].sum() != b[:, -1].sum():
        return None
    gap = metric(b.sum(axis=0)) - metric(a.sum(axis=0))
    return float(gap), *central(resamples(b, metric) - resamples(a, metric))


# -----------------------------------------------------------------------------
# Questions: {"context", "choices", "answer"}, where context may be one for each choice; what stands
# between the two is a space, or question["between"].


def read_jsonl(path):
    """Yield (line number, value) of each line of a .jsonl file that is not empty; ValueError names
    the first that is not JSON in UTF-8."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            with reading(f"{path}, line {number}"):
                value = json.loads(line.decode("utf-8-sig"))
            yield number, value


def is_question(row):
    """Whether a dict that a file held is a question of multiple choice."""
    context, choices, answer = (row.get(name) for name in ("context", "choices", "answer"))
    if not isinstance(choices, list):
        return False
    contexts = context if isinstance(context, list) else [context] * len(choices)
    return (len(contexts) == len(choices) and type(answer) is int and 0 <= answer < len(choices)
            and all(isinstance(text, str) for text in contexts + choices))


def format_row(row):
    """The question of a row of your own; ValueError if it is none."""
    if not (isinstance(row, dict) and is_question(row) and len(row["choices"]) > 1
            and all(map(str.strip, row["choices"]))):
        raise ValueError(f"this is not a row like {EXAMPLE_ROW}, with two or more choices and the "
                         f"answer's place: {row!r:.60}")
    spaced = str(row["context"])[-1:].isspace()
    return dict(row, between="" if spaced else " ")


def read_rows(path, format_row=format_row):
    """The questions that format_row makes of a .jsonl file; ValueError names the first line that
    is no such row."""
    questions = []
    for number, row in read_jsonl(path):
        with reading(f"{path}, line {number}"):
            questions.append(format_row(row))
    if not questions:
        raise ValueError(f"{path} holds no rows; one a line is read, such as {EXAMPLE_ROW}")
    return questions


def shuffled(rng, context, right, wrong):
    """A question: right and three of wrong, in any order."""
    wrong = sorted(set(wrong) - {right})
    choices = rng.sample([right, *rng.sample(wrong, 3)], 4)
    return dict(context=context, choices=choices, answer=choices.index(right))


def continuation_rows(texts, n_rows=200, seed=0):
    """Questions made of the texts: 40 words, then in any order the 8 that follow and three times 8
    from other places. The same texts and seed give the same questions."""
    rng, texts = random.Random(seed), [re.findall(r"\S+\s*", text) for text in texts]
    cuts = [("".join(words[i - CONTEXT_WORDS:i]), "".join(words[i:i + CHOICE_WORDS]).rstrip())
            for words in texts
            for i in range(CONTEXT_WORDS, len(words) - CHOICE_WORDS + 1, CHOICE_WORDS)]
    cuts = [(context, piece) for context, piece in cuts if len(piece) <= 100]  # no tables of data
    pieces = sorted({piece for _, piece in cuts})
    if len(pieces) < 4:
        raise ValueError(f"the held-out text is too short for continuation questions of "
                         f"{CONTEXT_WORDS + CHOICE_WORDS} words: leave continuation out of --tasks")
    return [shuffled(rng, context, piece, rng.sample(pieces, 4))
            for context, piece in rng.sample(cuts, min(n_rows, len(cuts)))]


# -----------------------------------------------------------------------------
# Scores: (model, tokenizer, questions, config) -> for each question, or block of text, {metric:
# vector} with what else is worth keeping under "shown"; and what guessing gets, {metric: score}.


def score_text(model, tokenizer, questions, config):
    """Perplexity and bits per byte of documents {"target"}, in blocks of text of like length. The
    end of a document is a token without bytes."""
    documents = tokenizer.encode_batch([question["target"] for question in questions])
    tokens = np.concatenate([[tokenizer.eot, *ids] for ids in documents])
    stride = model.config.block_size if config.stride == "rolling" else config.stride
    nats, tokens = surprisal(model, tokens, stride and int(stride)), tokens[1:]
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    lengths[list(tokenizer.special.values())] = 0
    ends, V = lengths[tokens].cumsum(), model.config.vocab_size
    block = max(1, min(1024, ends[-1] // 20))
    starts = np.unique(np.searchsorted(ends, np.arange(0, ends[-1], block), "right"))
    sums = np.add.reduceat([nats, np.ones(len(tokens)), lengths[tokens]], starts, axis=1)
    outcomes = [{"perplexity": [nats, tokens], "bits per byte": [nats / math.log(2), n_bytes]}
                for nats, tokens, n_bytes in sums.T]
    return outcomes, {"perplexity": V, "bits per byte": len(tokens) * math.log2(V) / ends[-1]}


def pairs_of(question):
    """The (context, continuation) of each choice."""
    context, choices = question["context"], question["choices"]
    contexts = context if isinstance(context, list) else [context] * len(choices)
    return [(text, question.get("between", " ") + choice)
            for text, choice in zip(contexts, choices)]


def score_choice(question, scored):
    """Whether the answer is the likeliest of the choices that have these (log-likelihood, greedy):
    acc by the log-likelihood, acc_norm by that per character, acc_bytes by that per byte."""
    sums, choices, answer = [n for n, _ in scored], question["choices"], question["answer"]
    sizes = dict(acc=1, acc_norm=[len(choice) for choice in choices],
                 acc_bytes=[len(choice.encode()) for choice in choices])
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
    """1.0 if two texts are equal but for case and what the patterns of ignore match, else 0.0:
    exact_match("$1,000", "1000", [",", r"\\$"]) == 1."""
    for pattern in ignore:
        text, target = re.sub(pattern, "", text), re.sub(pattern, "", target)
    return float(text.lower() == target.lower())


# -----------------------------------------------------------------------------
# The report: tables, a picture, runs side by side.


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
    compared = any(row.get("difference") for row in scores)
    lines = [("task", "metric", "run", "score", "95% interval", "guessing", "measured on",
              "minus the first run" if compared else "")]
    for row in scores:
        value, low, high, chance = (written(row[name], row["metric"])
                                    for name in ("value", "low", "high", "chance"))
        gap, least, most = row.get("difference") or (0, 0, 0)
        verdict = "may be chance" if least <= 0 <= most else "differs"
        gap, least, most = (written(value, row["metric"], "+") for value in (gap, least, most))
        lines.append((row["task"], row["metric"], row["run"], value, f"{low} to {high}", chance,
                      f"{row['n']:,} {row['unit']}", f"{gap}, {least} to {most}: {verdict}"
                      if row.get("difference") else ""))
    return lines


PANELS = {  # metric: (label, scale, limits, how values are written) of its panel
    "perplexity": ("perplexity (lower is better)", "log", (1, None), "{x:,.0f}"),
    "bits per byte": ("bits per byte (lower is better)", "linear", (0, None), "{x:.1f}"),
    "share": ("share of the best possible (higher is better)", "linear", (0, 1), "{x:.0%}"),
}


def draw_scores(scores, path):
    """A picture of scores: a panel for each kind of metric, a line in it for each score."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's own plots
    panels = defaultdict(list)
    for row in scores:
        if row["metric"] != "calibration error":
            panels[row["metric"] if row["metric"] in PANELS else "share"].append(row)
    fig = Figure(figsize=(8, 1 + 0.9 * len(panels) + 0.4 * len(scores)), layout="constrained")
    ratios = [len(rows) + 1 for rows in panels.values()]
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (kind, rows) in zip(axes, panels.items()):
        value, low, high, chance = np.array([[row[name] for name in (
            "value", "low", "high", "chance")] for row in rows], float).T  # None becomes nan
        ax.plot(chance, range(len(rows)), "D", color="#bbbbbb", label="guessing")
        ax.errorbar(value, range(len(rows)), xerr=np.maximum(0, [value - low, high - value]),
                    fmt="o", capsize=4, label="score, with its 95% interval")
        for i, row in enumerate(rows):
            ax.annotate(written(row["value"], row["metric"]), (row["value"], i), (0, 4),
                        ha="center", textcoords="offset points", fontsize=8)
        label, scale, limits, form = PANELS[kind]
        ax.set(xlabel=label, xscale=scale, xmargin=0.1, xlim=limits, ylim=(len(rows) - 0.4, -0.8),
               yticks=range(len(rows)),
               yticklabels=[f"{row['task']}, {row['metric']}\n{row['run']}" for row in rows])
        ax.xaxis.set_major_formatter(form)
        ax.grid(axis="x", alpha=0.3)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    with replacing(path) as file:
        fig.savefig(file, format="png")


# -----------------------------------------------------------------------------
# Tasks: what they are made of is texts(split, max_tokens), the documents of the first run's shards.


def text_questions(config, texts):
    return [dict(target=text) for text in texts("val", config.max_tokens)]


def continuation_questions(config, texts):
    texts, n_rows = texts("val", config.max_tokens), config.n_questions or 200
    return [format_row(row) for row in continuation_rows(texts, n_rows, config.seed)]


def row_questions(config, texts):
    if not config.rows:
        raise ValueError("the task rows needs a file of questions: --rows=FILE.jsonl")
    return read_rows(config.rows)[:config.n_questions]


# questions: (config, texts) -> questions; score: as above; metrics: {name: what makes it of sums}
Task = namedtuple("Task", "questions score metrics")
SHARES = {"acc": ratio, "acc_norm": ratio}
TASKS = {
    "perplexity": Task(text_questions, score_text,
                       {"perplexity": exp_ratio, "bits per byte": ratio}),
    "continuation": Task(continuation_questions, score_choices, SHARES),
    "rows": Task(row_questions, score_choices, SHARES | {"acc_bytes": ratio}),
}
DEFAULT = ["perplexity", "continuation"]


def held_out(folder, tokenizer, data=None, max_tokens=65_536, split="val"):
    """-> (a folder of shards: data, or those that the run's config.json names; the first max_tokens
    of a split of theirs). ValueError if they are another tokenizer's."""
    config, own = Path(folder, "config.json"), Path(folder, "tokenizer.json")
    with reading(config):
        path = Path(data or read_json(config)["data"]["path"])
    shards = read_split(path, split)
    check_shards(path, (split,))
    if Tokenizer.load(path / "tokenizer.json").hash() != tokenizer.hash():
        raise ValueError(f"{path} was written with another tokenizer than {own}: python data.py "
                         f"SOURCE --tokenizer={own} --out=shards/NAME writes shards that fit")
    return path, np.concatenate([shard[:max_tokens] for shard in shards])[:max_tokens].astype(int)


def make_questions(config, tasks, default, folder):
    """{task: questions} of the tasks that config names. Without a name it is those of default, but
    for the ones that the text of the run is too short for."""
    @cache
    def texts(split, max_tokens):
        tokenizer = Tokenizer.load(Path(folder, "tokenizer.json"))
        _, tokens = held_out(folder, tokenizer, config.data, max_tokens, split)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
        return [tokenizer.decode(ids[ids != tokenizer.eot].tolist()) for ids in parts if len(ids)]

    named, questions = config.tasks.split(",") if config.tasks else ["rows"][:bool(config.rows)], {}
    for name in named:
        check_known(name, tasks, "task")
    if config.rows and len({*named} - {*default}) != 1:
        raise ValueError(f"--rows={config.rows} has the rows of one task: name it in --tasks")
    for name in named or default:
        try:
            questions[name] = tasks[name].questions(config, texts)
        except ValueError as error:
            if named or name == "perplexity":
                raise
            print(f"{name} is left out: {error}")
    return questions


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and how."""
    runs: list = option([], "run folders; without one the newest", positional=True)
    tasks: str | None = option(None, f"some of {','.join(TASKS)} (default {','.join(DEFAULT)})")
    rows: str | None = option(None, "questions from this .jsonl file, multiple choice of your own")
    n_questions: int | None = option(None, "of each task (default 200 of those made, else all)")
    data: str | None = option(None, "shards whose validation split is held out (default the run's)")
    max_tokens: int = option(65_536, "score at most this many held-out tokens")
    stride: str | None = option(None, "tokens the window moves by (default half), or rolling: all")
    seed: int = option(0, "of the questions")
    checkpoint: str = option("best", "best | last | a step")
    device: str = option("auto", "auto | cuda | mps | cpu")
    precision: str = option("fp32", "auto | fp32 | bf16 | fp16; in fp32 machines agree")

    def __post_init__(self):
        for name in ("max_tokens", "n_questions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not re.fullmatch("rolling|[0-9]{1,9}", self.stride or "rolling"):
            raise ValueError(f"stride={self.stride} must be a number of tokens, or rolling")


def score_run(checkpoint, questions, config, tasks):
    """Score a checkpoint on {task: questions} -> its report, with the vectors of the scores."""
    folder, device = checkpoint.parent, pick_device(config.device)
    precision, dtype = pick_precision(config.precision, device)
    model, tokenizer = load_run(folder, checkpoint, device, dtype)
    if not model.config.causal or model.config.cross or model.config.n_classes:
        raise ValueError(f"{checkpoint} does not continue a text (architecture="
                         f"{model.config.architecture}): there is nothing to score it with here")
    print(f"{checkpoint} ({model.n_parameters() / 1e6:.1f}M parameters, {device}, {precision}): "
          f"{', '.join(questions)}", flush=True)
    scores, vectors = [], {}
    for name, asked in questions.items():
        outcomes, chance = tasks[name].score(model, tokenizer, asked, config)
        vectors[name] = {metric: np.array([outcome[metric] for outcome in outcomes])
                         for metric in tasks[name].metrics if metric in outcomes[0]}
        for metric, array in vectors[name].items():
            value, low, high = interval(array, tasks[name].metrics[metric])
            n, unit = len(array), "questions"
            if name == "perplexity":
                n, unit = int(array[:, -1].sum()), "bytes" if "byte" in metric else "tokens"
            scores.append(dict(task=name, metric=metric, run=str(folder), value=value, low=low,
                               high=high, chance=chance.get(metric), n=n, unit=unit))
        write_json(folder / "scores" / f"{name}.json", outcomes)
    report = asdict(config) | dict(run=str(folder), checkpoint=checkpoint.name, device=device,
                                   precision=precision, tasks=list(questions), scores=scores)
    write_json(folder / "scores.json", report)
    return report | dict(vectors=vectors)


def score_runs(config, tasks=TASKS, default=DEFAULT):
    """Score each run that config names, and compare them with the first -> ({task: questions}, the
    runs' reports). tasks: those there are; default: those taken where config names none."""
    folders = [Path(run) for run in config.runs] or [newest_run()]
    checkpoints = [pick_checkpoint(folder, config.checkpoint) for folder in folders]
    questions = make_questions(config, tasks, default, folders[0])
    reports = [score_run(checkpoint, questions, config, tasks) for checkpoint in checkpoints]
    for report in reports[1:]:
        for row in report["scores"]:
            a, b = (part["vectors"][row["task"]][row["metric"]] for part in (reports[0], report))
            row["difference"] = difference(a, b, tasks[row["task"]].metrics[row["metric"]])
    scores = [row for rows in zip(*(report["scores"] for report in reports)) for row in rows]
    print(table(cells(scores)))
    place = folders[0] / "scores" if len(folders) == 1 else folders[0].parent / "leaderboard"
    if len(folders) > 1:
        write_json(f"{place}.json", scores)
    draw_scores(scores, f"{place}.png")
    print(f"scores: {place}.json, picture: {place}.png")
    return questions, reports


def main():
    """Score runs; tasks and options that are not in this file are left to chapters/exams.py."""
    words = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    unknown = {*words} - {"--help", *(f"--{f.name}" for f in fields(EvaluateConfig))}
    if not unknown:
        config = EvaluateConfig(**parse_options(__doc__, EvaluateConfig)[0])
        unknown = {*(config.tasks or "rows").split(",")} - {*TASKS}
    if not unknown:
        score_runs(config)
        if EXAMS.exists() and not config.tasks and not config.rows:
            print("more small tasks: --tasks=small")
    elif EXAMS.exists():
        runpy.run_module("chapters.exams", run_name="__main__")
    else:
        raise ValueError(f"{min(unknown)} is unknown here, and chapters/exams.py, which has more "
                         "tasks and options, is not there")


if __name__ == "__main__":
    run_command(main)
