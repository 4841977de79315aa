"""
Scores of trained models: run folders go in; tables, scores.json and scores.png come out.

    python evaluate.py                        # the newest run, on the text held out from training
    python evaluate.py runs/a runs/b          # side by side, with paired intervals
    python evaluate.py --tasks=small          # eight small tasks; or hellaswag,arc_easy --n_shots=5
    python evaluate.py --tasks=rows --rows=questions.jsonl    # multiple choice of your own

Each score stands beside what guessing gets, with its 95% interval. Tasks and options that are not
in this file, such as those of the last two lines, are left to chapters/exams.py.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import contextlib
import itertools
import math
import os
import random
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

from data import check_shards, file_hash, learned, read_split, text_hash
from model import cap_logits, check_known, check_options, option, read_header, read_progress
from sample import (checkpoints, load_run, new_cache, newest_run, pick_checkpoint, pick_device,
                    pick_precision, warn)
from tokenizer import (QUIET, Tokenizer, parse_options, read_json, reading, refuse_idle, replacing,
                       run_command, write_json)

BATCH_TOKENS, HEAD_TOKENS = 4096, 1024  # in a forward pass; of them, those with logits at once
CACHED_TOKENS = 4 * BATCH_TOKENS        # that a forward pass may attend to, over all its rows
UNSPACED = (r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
            r"\p{Tibetan}\u3000-\u303f\uff00-\uff9f]")  # of scripts without spaces between words
WORD = regex.compile(rf"(?:(?={UNSPACED})\X){{1,2}}\s*|(?:(?!{UNSPACED})\S)+\s*")  # or 2 characters
FORMATS = {"perplexity": ",.2f", "bits per byte": ".3f"}  # of scores that are no shares
EXAMS = Path(__file__).with_name("chapters") / "exams.py"

# -----------------------------------------------------------------------------
# How likely is a text as the continuation of another, and how well is a whole text predicted?


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


@torch.inference_mode()
def score_shared(model, groups, title="scoring"):
    """{key: what read_ends says of head + ids, n} for each (head, {key: (ids, n)}) of groups. What
    all heads begin with is read once, the rest of each once, with others of its length; where there
    is no head, rows of like length share a forward pass."""
    heads = [head for head, _ in groups]
    sizes = [len(rows) * (len(head) + max(len(ids) for ids, _ in rows.values()))
             for head, rows in groups]
    order = sorted(range(len(groups)), key=lambda i: (len(heads[i]), sizes[i]), reverse=True)
    start, results = os.path.commonprefix([head for head in heads if head]), {}
    common = new_cache(model, 1, len(start))
    if start:
        model.transformer(torch.tensor([start], device=model.device), common, model.dtype)
    with tqdm(total=len(groups), desc=title, **QUIET) as bar:
        while order:
            T, size = len(heads[order[0]]), sizes[order[0]]
            n_groups = max(1, (CACHED_TOKENS if T else BATCH_TOKENS) // size)
            batch = [i for i in order[:n_groups] if len(heads[i]) == T]
            order = order[len(batch):]
            rows = {key: row for i in batch for key, row in groups[i][1].items()}
            cache = new_cache(model, 1, T + max(len(ids) for ids, _ in rows.values())) if T else ()
            for layer, read in zip(cache, common):
                layer.append(read.k, read.v)
                layer.choose([0] * len(batch))
            if T > len(start):
                rest = torch.tensor([heads[i][len(start):] for i in batch], device=model.device)
                model.transformer(rest, cache, model.dtype)
            for layer in cache:
                layer.choose([j for j, i in enumerate(batch) for _ in groups[i][1]])
            results |= zip(rows, read_ends(model, list(rows.values()), cache or None))
            bar.update(len(batch))
    return results


def score_ends(model, rows, title="scoring"):
    """read_ends for any number of rows (ids, n), in their order."""
    results = score_shared(model, [([], {i: row}) for i, row in enumerate(rows)], title)
    return [results[i] for i in range(len(rows))]


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
    block_size, contexts, groups = model.config.block_size, defaultdict(dict), []
    for i, (context, continuation) in enumerate(pairs):
        before, after = encode_pair(tokenizer, context, continuation)
        if not 0 < len(after) <= block_size:
            raise ValueError(f"{continuation!r:.40} has {len(after)} tokens, not 1 to {block_size}")
        contexts[tuple(before[len(after) - block_size - 1:])][i] = after
    for before, afters in contexts.items():
        n = len(before) - 1 if len(afters) > 1 else 0  # ids that are read once, for all afters
        groups.append((before[:n], {i: ([*before[n:], *after], len(after))
                                    for i, after in afters.items()}))
    results = score_shared(model, groups, title)
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
    """The surprise -log p in nats of each of N tokens but the first, an array (N - 1,); of a list
    of arrays, each read alone, one after the other. The window that the model sees moves by stride,
    half of it by default: less is more exact, and slower."""
    T = model.config.block_size
    stride = math.ceil(T / 2) if stride is None else stride
    documents = tokens if isinstance(tokens[0], np.ndarray) else [tokens]
    rows = [row for ids in documents for row in windows(ids, T, stride)]
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
    if a.shape != b.shape or a[:, -1].sum() != b[:, -1].sum():
        return None
    return interval(np.stack([a, b], axis=1), lambda sums: np.diff(metric(sums))[..., 0])


# -----------------------------------------------------------------------------
# Questions {"context", "choices", "answer"}, where context may be one for each choice, between them
# question["between"], without which a space, None for what space_between says; and scores: (model,
# tokenizer, questions, config) -> for each question, or block of text, {metric: vector} with what
# else is worth keeping under "shown"; and {metric: {"chance": what guessing gets, ...}}.


def space_between(context, choice):
    """The space between two texts; "" if one is empty, or if white space or a character of a script
    that is written without spaces stands there: space_between("5 =", "6") == " "."""
    sides = context[-1:] + choice[:1]
    return "" if len(sides) < 2 or regex.search(rf"\s|{UNSPACED}", sides) else " "


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
    """Perplexity and bits per byte of documents {"target"}, in blocks of text of like length; of
    those with {"chat": True}, each of which is read alone, of what the assistant says."""
    texts, is_chat = [question["target"] for question in questions], "chat" in questions[0]
    documents = ([tokenizer.encode(text, special=True) for text in texts] if is_chat
                 else tokenizer.encode_batch(texts))
    documents = [np.array([tokenizer.eot, *ids]) for ids in documents]
    documents = documents if is_chat else [np.concatenate(documents)]
    stride = model.config.block_size if config.stride == "rolling" else config.stride
    nats = surprisal(model, documents, stride and int(stride))
    tokens = np.concatenate([ids[1:] for ids in documents])
    if is_chat:
        said = np.concatenate([learned(ids, tokenizer.special)[1:] for ids in documents])
        nats, tokens = nats[said], tokens[said]
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    lengths[list(tokenizer.special.values())] = 0  # the end of a document has no bytes
    ends, V = lengths[tokens].cumsum(), model.config.vocab_size
    n_bytes = int(ends[-1])
    blocks = np.arange(0, n_bytes, max(1, min(1024, n_bytes // 20)))
    starts = np.unique(np.searchsorted(ends, blocks, "right"))
    sums = np.add.reduceat([nats, np.ones(len(tokens)), lengths[tokens]], starts, axis=1)
    outcomes = [{"perplexity": [nats, n], "bits per byte": [nats / math.log(2), size]}
                for nats, n, size in sums.T]
    chance = bits_per_byte(len(tokens) * math.log(V), n_bytes)
    return outcomes, {"perplexity": dict(chance=V, n=len(tokens), unit="tokens"),
                      "bits per byte": dict(chance=chance, n=n_bytes, unit="bytes")}


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
    sizes = dict(acc=1, acc_norm=[len(choice) or 1e-9 for choice in choices],  # an empty one loses
                 acc_bytes=[len(choice.encode(errors="replace")) or 1e-9 for choice in choices])
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
    return outcomes, dict.fromkeys(("acc", "acc_norm", "acc_bytes"), dict(chance=chance))


def multiple_choice(model, tokenizer, rows):
    """The share of rows {"context", "choices", "answer"} whose answer is the likeliest choice:
    {"acc": by log-probability, "acc_norm": by log-probability per character}."""
    outcomes, _ = score_choices(model, tokenizer, [dict(between=None) | row for row in rows])
    return {metric: float(np.mean([outcome[metric][0] for outcome in outcomes]))
            for metric in ("acc", "acc_norm")}


def exact_match(text, target, ignore=()):
    """1.0 if texts are equal but for case and ignored patterns: exact_match("1,0", "10", [","])."""
    for pattern in ignore:
        text, target = regex.sub(pattern, "", text), regex.sub(pattern, "", target)
    return float(text.lower() == target.lower())


def table(lines):
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cells(scores):
    """Scores as the lines of a table, shares in percent; the last column is for runs compared."""
    lines = [("task", "metric", "run", "score", "95% interval", "guessing", "measured on",
              "minus the first run" * any(row.get("difference") for row in scores))]
    for row in scores:
        form, compared = FORMATS.get(row["metric"], ".1%"), ""
        chance = "-" if row["chance"] is None else f"{row['chance']:{form}}"
        left_out = f", {row['left_out']:,} left out" if row.get("left_out") else ""
        if row.get("difference"):
            gap, low, high = row["difference"]
            verdict = "may be chance" if low <= 0 <= high else "differs"
            compared = f"{gap:+{form}}, {low:+{form}} to {high:+{form}}: {verdict}"
        lines.append((row["task"], row["metric"], row["run"], f"{row['value']:{form}}",
                      f"{row['low']:{form}} to {row['high']:{form}}", chance,
                      f"{row['n']:,} {row['unit']}{left_out}", compared))
    return lines


def draw_scores(scores, path):
    """A picture of scores: a panel for each metric, a line in it for each task and run."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's own plots
    metrics = [*dict.fromkeys(row["metric"] for row in scores)]
    fig = Figure(figsize=(8, 1 + 1.2 * len(metrics) + 0.4 * len(scores)), layout="constrained")
    fig.suptitle("scores with 95% intervals; diamonds: what guessing gets")
    for ax, metric in zip(fig.subplots(len(metrics), squeeze=False).flat, metrics):
        for row in [row for row in scores[::-1] if row["metric"] == metric]:  # drawn from below
            name, parts = f"{row['task']}\n{row['run']}", (row["low"], row["value"], row["high"])
            ax.plot([row["chance"]], [name], "D", color="#bbbbbb")  # None draws nothing
            ax.plot(parts, [name] * 3, "o-", color="C0", markevery=[1])
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
    "perplexity": Task(lambda config, texts: texts(rows=True), score_text,
                       {"perplexity": exp_ratio, "bits per byte": ratio},
                       ("data", "max_tokens", "stride")),
    "continuation": Task(
        lambda config, texts: continuation_rows(texts(), config.n_questions or 200, config.seed),
        score_choices, {"acc": ratio, "acc_norm": ratio},
        ("data", "max_tokens", "n_questions", "seed")),
}
DEFAULT = ["perplexity", "continuation"]
VARIES = {"runs", "run", "tasks", "rows", "device", "scores", "card", "run_code"}  # scores do not


def trained_on(folder):
    """What a run's config.json says of its shards, {"path", "fingerprint", "names" of sources}."""
    path = Path(folder, "config.json")
    with reading(path):
        data = dict(read_json(path).get("data") or {}) if path.exists() else {}
        return data | dict(names=" ".join(source["name"] for source in data.get("sources", ())))


def held_out(folder, data=None, split="val", max_tokens=65_536, rows=False):
    """The documents in the first max_tokens of a split of shards: data, or those of the run; with
    `rows`, where chats are as good, rows for score_text. ValueError if they are another
    tokenizer's, or not those that the run was trained on."""
    own, trained = Path(folder, "tokenizer.json"), {} if data else trained_on(folder)
    path, tokenizer = trained.get("path") if data is None else data, Tokenizer.load(own)
    if not isinstance(path, str) or not path:
        raise ValueError(f"no shards are named by {folder}/config.json or --data=FOLDER")
    shards, card = read_split(path, split), check_shards(path, (split,))
    if trained.get("fingerprint", card.fingerprint) != card.fingerprint:
        before = f"{trained['names']:.99} ({trained['fingerprint']!s:.8})"
        raise ValueError(f"{path} holds another text ({card.fingerprint:.8}): {folder} was trained "
                         f"on {before}: --data=FOLDER names shards to take, or train again")
    if card.tokenizer != tokenizer.hash():
        raise ValueError(f"{path} was written with another tokenizer than {own}: python data.py "
                         f"SOURCE --tokenizer={own} --out=shards/NAME writes shards that fit")
    tokens = np.concatenate([shard[:max_tokens] for shard in shards])[:max_tokens].astype(int)
    begins = np.flatnonzero(tokens == tokenizer.eot)
    documents = [ids[ids != tokenizer.eot] for ids in np.split(tokens, begins) if len(ids)]
    texts = [tokenizer.decode(ids.tolist()) for ids in documents]
    if not card.options.get("chats"):
        return [dict(target=text) for text in texts] if rows else texts
    if not rows:
        raise ValueError(f"{path} holds chats: --tasks=perplexity scores what the assistant says, "
                         "--data=FOLDER names shards of texts")
    chats = [dict(target=text, chat=True) for text, ids in zip(texts, documents)
             if learned(ids, tokenizer.special).any()  # the last may be cut before it
             and tokenizer.encode(text, special=True) == ids.tolist()]  # no word looks special
    if not chats:
        raise ValueError(f"{path}: no assistant speaks in max_tokens={max_tokens}: score more")
    return chats


def make_questions(config, tasks, default, folder):
    """{task: questions} of --tasks, or of those of default that the text is long enough for."""
    texts = cache(partial(held_out, folder, config.data, max_tokens=config.max_tokens))
    names = default if config.tasks is None else config.tasks.split(",")
    for name in names:
        check_known(name, tasks, "task")
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
        if self.stride is not None and not regex.fullmatch("rolling|[1-9][0-9]{0,8}", self.stride):
            raise ValueError(f"stride={self.stride} must be a number of tokens, or rolling")


def write_scores(path, report):
    """Write scores.json. Its scores of other tasks stay, if weights, settings and code agree."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        old = read_json(path)
        needed = {"weights", "code", *old} & {*report} - VARIES
        if all(old[name] == report[name] for name in needed):
            scores = [row for row in old["scores"] if row["task"] not in report["tasks"]]
            tasks = dict.fromkeys([*(row["task"] for row in scores), *report["tasks"]])
            report = old | report | dict(scores=scores + report["scores"], tasks=[*tasks])
    write_json(path, report)


def score_run(checkpoint, questions, config, tasks):
    """Ask a checkpoint those of {task: questions} that fit its context, write scores/TASK.json and
    scores.json -> {(task, metric): (its score {"value", ...}, the questions, their vectors)}."""
    folder, device = checkpoint.parent, pick_device(config.device)
    precision, dtype = pick_precision(config.precision, device)
    model, tokenizer = load_run(folder, checkpoint, device, dtype)
    print(f"{checkpoint} ({model.n_parameters() / 1e6:.1f}M parameters, {device}, {precision}): "
          f"{', '.join(questions)}", flush=True)
    fitting = {name: those for name, asked in questions.items()
               if (those := [question for question in asked if fits(model, tokenizer, question)])}
    if empty := questions.keys() - fitting.keys():
        line = (f"{folder}: none of the questions of {', '.join(sorted(empty))} fits into the "
                f"context of {model.config.block_size} tokens")
        if not fitting:
            raise ValueError(line)
        warn(line)
    results = {}
    for name, asked in fitting.items():
        outcomes, more = tasks[name].score(model, tokenizer, asked, config)
        write_json(folder / "scores" / f"{name}.json", outcomes)
        for metric in [metric for metric in tasks[name].metrics if metric in outcomes[0]]:
            vectors = np.array([outcome[metric] for outcome in outcomes])
            value, low, high = interval(vectors, tasks[name].metrics[metric])
            score = dict(task=name, metric=metric, run=str(folder), value=value, low=low, high=high,
                         chance=None, n=len(asked), unit="questions",
                         left_out=len(questions[name]) - len(asked)) | more.get(metric, {})
            results[name, metric] = score, asked, vectors
    code = sorted([*Path(__file__).parent.glob("*.py"), *EXAMS.parent.glob("*.py")])
    write_scores(folder / "scores.json", asdict(config) | dict(
        run=str(folder), checkpoint=checkpoint.name, device=device, precision=precision,
        weights=read_header(checkpoint)[1].get("sha256"), tasks=[*fitting],
        code=text_hash(str([*map(file_hash, code)])).hex(),
        scores=[score for score, _, _ in results.values()]))
    return results


def score_runs(config, tasks=TASKS, default=DEFAULT):
    """Score the runs of config, compare them with the first -> ({task: questions}, run folders)."""
    runs = [run for run in config.runs if checkpoints(run)] or config.runs or [newest_run()]
    for run in config.runs:  # runs/* names files, too
        if run not in runs and not Path(run).is_file():
            warn(f"{run} is not a run folder with a checkpoint: left out")
    chosen = [pick_checkpoint(run, config.checkpoint) for run in runs]
    for checkpoint in chosen:
        c = read_progress(checkpoint)["config"]
        if c.cross or c.n_classes or not c.causal:
            raise ValueError(f"{checkpoint} does not continue a text as a causal language model: "
                             "chapters.clauses scores a classifier, chapters.align a reward model")
    first, *_ = folders = [checkpoint.parent for checkpoint in chosen]
    questions = make_questions(config, tasks, default, first)
    if any("data" in tasks[name].options for name in questions):
        texts = {folder: trained_on(folder).get("fingerprint") for folder in folders}
        for folder in [folder for folder in folders if texts[folder] not in (None, texts[first])]:
            print(f"{folder}: trained on another text than {first}, may have read what is asked")
    results = [score_run(checkpoint, questions, config, tasks) for checkpoint in chosen]
    for key, (score, asked, vectors) in [item for part in results[1:] for item in part.items()]:
        _, before, a = results[0].get(key, (None, None, None))
        if asked == before:
            score["difference"] = difference(a, vectors, tasks[key[0]].metrics[key[1]])
    scores = [result[name, metric][0] for name in questions for metric in tasks[name].metrics
              for result in results if (name, metric) in result]
    print(table(cells(scores)))
    place = first / "scores"
    if len(runs) > 1:
        place = first.parent / "leaderboard"
        print("differs: on such texts and questions; what other seeds of training would give, "
              "python -m chapters.search --seeds=3 OPTIONS measures")
        write_json(f"{place}.json", scores)
    draw_scores(scores, f"{place}.png")
    print(f"scores: {place}.json, picture: {place}.png")
    return questions, folders


def main():
    typed = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    unknown = typed - {"--help", *(f"--{f.name}" for f in fields(EvaluateConfig))}
    config = None if unknown else EvaluateConfig(**parse_options(__doc__, EvaluateConfig)[0])
    unknown = unknown or {*(config.tasks or "perplexity").split(",")} - {*TASKS}
    if not unknown:
        score_runs(config)
    elif EXAMS.exists():
        runpy.run_module("chapters.exams", run_name="__main__")
    else:
        raise ValueError(f"{min(unknown)} is unknown here, and chapters/exams.py is not there")


if __name__ == "__main__":
    run_command(main)
