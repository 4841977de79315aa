"""
Scores of a trained model: a run folder goes in; a table, scores.json and scores.png come out.

    python evaluate.py                                  # the newest run, on its held-out text
    python evaluate.py runs/stdlib --rows=questions.jsonl

Three tasks. perplexity: how well the model predicts each token of the held-out text. continuation:
which of four pieces of that text follows the one before it? rows: multiple choice from a file, one
{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1} a line. Each score stands beside what
guessing gets, with its 95% interval: Wilson's for shares, for the others a bootstrap over blocks of
text, because neighbouring tokens are alike.
"""

import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import check_shards, read_split
from tokenizer import (Parser, Tokenizer, read_sealed, replacing, run_command, share_cores,
                       write_json)

if __name__ == "__main__":
    share_cores()
if not {"-h", "--help"} & set(sys.argv):  # torch takes two seconds to import; help need not wait
    import torch

    from model import check_known
    from sample import load_run, newest_run, pick_checkpoint, pick_device, pick_precision

BATCH_TOKENS, HEAD_TOKENS = 4096, 1024  # in a forward pass; of them, those with logits at once
CONTEXT_WORDS, CHOICE_WORDS = 40, 8     # in a question made of held-out text
EXAMPLE_ROW = '{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'

# -----------------------------------------------------------------------------
# The primitive: how likely is one text as the continuation of another?


def token_scores(model, ids, wanted):
    """For the tokens that wanted (B, T) marks in ids (B, T): the log-probability in nats of each,
    given the ids before it, and whether it was the likeliest; (N,) both."""
    with torch.inference_mode():
        x = model.transformer(ids[:, :-1], dtype=model.dtype)[wanted[:, 1:]] # (N, C)
        targets = ids[:, 1:][wanted[:, 1:], None]                            # (N, 1)
        scores, likeliest = [], []
        for part, target in zip(x.split(HEAD_TOKENS), targets.split(HEAD_TOKENS)):
            logits = model.lm_head(part).float()
            scores.append(logits.gather(1, target)[:, 0] - logits.logsumexp(dim=1))
            likeliest.append(logits.argmax(dim=1) == target[:, 0])
        return torch.cat(scores).cpu(), torch.cat(likeliest).cpu()


def score_ends(model, rows, title="scoring"):
    """For each (ids, n) of rows what token_scores says about its last n ids: [(n,), (n,)].
    Rows of like length share a forward pass; a shorter one is filled up behind its end, where
    a causal model does not look."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    results, bar = [None] * len(rows), tqdm(total=len(rows), desc=title, disable=None, leave=False)
    while order:
        T = len(rows[order[0]][0])
        n_rows = max(1, BATCH_TOKENS // T)
        batch, order = order[:n_rows], order[n_rows:]
        ids, wanted = torch.zeros(2, len(batch), T, dtype=torch.long)
        for j, (row, n) in enumerate(rows[i] for i in batch):
            ids[j, :len(row)] = torch.as_tensor(row)
            wanted[j, len(row) - n:len(row)] = 1
        scored = token_scores(model, ids.to(model.device), wanted.bool().to(model.device))
        lengths = [rows[i][1] for i in batch]
        for i, *result in zip(batch, *(values.split(lengths) for values in scored)):
            results[i] = result
        bar.update(len(batch))
    bar.close()
    return results


def encode_pair(tokenizer, context, continuation):
    """-> (ids of the context, ids of the continuation). White space at the end of the context goes
    to the continuation, whose words are tokenized with it; no context is a new document."""
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    before, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    after = both[len(before):] or tokenizer.encode(continuation)  # a word may go on over the border
    return before or [tokenizer.eot], after


def loglikelihood(model, tokenizer, pairs, title="scoring"):
    """For each (context, continuation): (the log-probability of the continuation in nats, whether
    greedy sampling gives it). A context that is too long loses its beginning."""
    rows, block_size = [], model.config.block_size
    for context, continuation in pairs:
        before, after = encode_pair(tokenizer, context, continuation)
        if not 0 < len(after) <= block_size:
            raise ValueError(f"a continuation has {len(after)} tokens, this model takes 1 to "
                             f"{block_size}: {continuation[:40]!r}")
        rows.append(((before + after)[-block_size - 1:], len(after)))
    return [(scores.double().sum().item(), likeliest.all().item())
            for scores, likeliest in score_ends(model, rows, title)]


# -----------------------------------------------------------------------------
# Predicting text: surprise in nats, perplexity, bits per byte.


def windows(tokens, block_size, stride):
    """Cut tokens into (ids, n) for score_ends, so that each token but the first is scored once,
    given at least block_size - stride tokens where there are that many before it."""
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride={stride} must be 1 to block_size={block_size}")
    rows, done = [], 1
    for start in range(0, len(tokens), stride):
        stop = min(start + block_size + 1, len(tokens))
        if stop > done:
            rows.append((tokens[start:stop], stop - done))
            done = stop
    return rows


def surprisal(model, tokens, stride=None):
    """The surprise -log p in nats of each of N tokens but the first: an array (N - 1,). The window
    that the model sees moves by stride, half of it by default: less is exacter, and slower."""
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
# Multiple choice: rows {"context": str, "choices": [str, ...], "answer": int}.


def multiple_choice(model, tokenizer, rows, title="multiple choice"):
    """The share of rows whose answer is the likeliest choice: {"acc": by log-probability,
    "acc_norm": by log-probability per character}. A space goes between context and choice,
    unless there is white space."""
    pairs = [(row["context"], choice if row["context"][-1:].isspace() else " " + choice)
             for row in rows for choice in row["choices"]]
    scores, right = iter(loglikelihood(model, tokenizer, pairs, title)), {"acc": 0, "acc_norm": 0}
    for row in rows:
        sums = np.array([next(scores)[0] for _ in row["choices"]])
        lengths = np.array([len(choice) for choice in row["choices"]])
        right["acc"] += int(sums.argmax() == row["answer"])
        right["acc_norm"] += int((sums / lengths).argmax() == row["answer"])
    return {metric: n / len(rows) for metric, n in right.items()}


def continuation_rows(texts, n_rows=200, seed=0):
    """Questions made of the texts: 40 words, then in any order the 8 that follow and three times 8
    from other places. The same texts and seed give the same questions."""
    rng, rows = random.Random(seed), []
    texts = [re.findall(r"\S+\s*", text) for text in texts]
    places = [(words, i) for words in texts
              for i in range(CONTEXT_WORDS, len(words) - CHOICE_WORDS + 1, CHOICE_WORDS)]
    pieces = ["".join(words[i:i + CHOICE_WORDS]).rstrip() for words, i in places]
    usable = [i for i, piece in enumerate(pieces) if len(piece) <= 100]  # not some table of data
    if len({pieces[i] for i in usable}) < 4:
        raise ValueError(f"the held-out text is too short for continuation questions of "
                         f"{CONTEXT_WORDS + CHOICE_WORDS} words: leave continuation out of --tasks")
    for i in rng.sample(usable, min(n_rows, len(usable))):
        choices = {pieces[i]: None}
        while len(choices) < 4:
            choices[pieces[rng.choice(usable)]] = None
        choices = rng.sample(list(choices), 4)
        words, start = places[i]
        rows.append({"context": "".join(words[start - CONTEXT_WORDS:start]), "choices": choices,
                     "answer": choices.index(pieces[i])})
    return rows


def is_row(row):
    """Whether a value read from JSON is a row of multiple choice."""
    if not (isinstance(row, dict) and {"context", "choices", "answer"} <= set(row)):
        return False
    context, choices, answer = row["context"], row["choices"], row["answer"]
    return (isinstance(context, str) and isinstance(choices, list) and len(choices) > 1
            and all(isinstance(choice, str) and choice.strip() for choice in choices)
            and type(answer) is int and 0 <= answer < len(choices))


def read_rows(path):
    """The rows of a .jsonl file; ValueError names the first line that is none."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON in UTF-8: {error}") from None
            if not is_row(rows[-1]):
                raise ValueError(f"{path}, line {number} is not a row like {EXAMPLE_ROW}, with two "
                                 f"or more choices and the answer's place: {line.decode()[:60]}")
    if not rows:
        raise ValueError(f"{path} holds no rows; one a line is read, like {EXAMPLE_ROW}")
    return rows


# -----------------------------------------------------------------------------
# Intervals: 95 of 100 such intervals hold the score that endless text of this kind would give.


def wilson(share, n, z=1.96):
    """The interval of a share of n, which stays within 0 and 1: Wilson (1927)."""
    middle, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def bootstrap(sums, units, n_draws=1000, seed=0):
    """The interval of sum(sums) / sum(units), where block i of the text has sums[i] and units[i]:
    the middle 95% of what as many blocks give that are drawn from them, again and again."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(n_draws))
    low, high = np.percentile([sums[i].sum() / units[i].sum() for i in draws], [2.5, 97.5])
    return float(low), float(high)


# -----------------------------------------------------------------------------
# Tasks: (model, tokenizer, held-out tokens, options) to scores.


def score(task, metric, value, interval, chance, n, unit):
    return dict(task=task, metric=metric, value=float(value), low=interval[0], high=interval[1],
                chance=float(chance), n=int(n), unit=unit)


def score_text(model, tokenizer, tokens, options):
    """Perplexity and bits per byte. The end of a document is a token without bytes."""
    nats = surprisal(model, np.concatenate([[tokenizer.eot], tokens]), options.stride)
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    lengths[list(tokenizer.special.values())] = 0
    n_bytes, V = lengths[tokens], model.config.vocab_size
    blocks = np.arange(0, len(tokens), model.config.block_size)
    sums, block_tokens, block_bytes = (np.add.reduceat(values, blocks)
                                       for values in (nats, np.ones(len(tokens)), n_bytes))
    yield score("held-out text", "perplexity", perplexity(nats),
                tuple(map(math.exp, bootstrap(sums, block_tokens))), V, len(tokens), "tokens")
    yield score("held-out text", "bits per byte", bits_per_byte(nats, n_bytes.sum()),
                bootstrap(sums / math.log(2), block_bytes),
                len(tokens) * math.log2(V) / n_bytes.sum(), n_bytes.sum(), "bytes")


def score_rows(task, model, tokenizer, rows):
    """Accuracy, by log-probability and by log-probability per character."""
    chance = np.mean([1 / len(row["choices"]) for row in rows])
    for metric, share in multiple_choice(model, tokenizer, rows, task).items():
        yield score(task, metric, share, wilson(share, len(rows)), chance, len(rows), "questions")


def score_continuation(model, tokenizer, tokens, options):
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
    texts = [tokenizer.decode(ids[ids != tokenizer.eot].tolist()) for ids in documents]
    rows = continuation_rows(texts, options.n_questions, options.seed)
    return score_rows("continuation", model, tokenizer, rows)


def score_file(model, tokenizer, tokens, options):
    return score_rows(Path(options.rows).stem, model, tokenizer, read_rows(options.rows))


TASKS = {"perplexity": score_text, "continuation": score_continuation, "rows": score_file}


def training_data(folder):
    """What the run's config.json says about its data: a dict, empty when there is none."""
    path = Path(folder, "config.json")
    data = read_sealed(path).get("data") or {} if path.exists() else {}
    try:  # a TypeError for what is no str
        data.get("path", "") + "".join(source["name"] for source in data.get("sources", ()))
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not say what a run was trained on ({error!r:.80})") from None
    return data


def held_out(folder, tokenizer, data, max_tokens):
    """-> (the folder of shards, the first max_tokens of its validation split). Unless data names
    the shards, the run's config.json does."""
    words, known = Path(folder, "tokenizer.json"), training_data(folder)
    if not data and "path" not in known:
        raise ValueError(f"{folder}/config.json does not name the shards: --data=shards/NAME does")
    path = Path(data or known["path"])
    if not data and not path.is_dir():
        sources = " ".join(source["name"] for source in known.get("sources", ())) or "SOURCE"
        raise ValueError(f"the text held out from training is gone ({path}): python data.py "
                         f"{sources} --tokenizer={words} --out={path} makes it again")
    shards = read_split(path, "val")
    check_shards(path, ("val",))
    if Tokenizer.load(path / "tokenizer.json").hash() != tokenizer.hash():
        raise ValueError(f"{path} was written with another tokenizer than {words}: python data.py "
                         f"SOURCE --tokenizer={words} --out=shards/NAME writes shards that fit")
    tokens = np.concatenate([shard[:max_tokens] for shard in shards])[:max_tokens]
    if not len(tokens):
        raise ValueError(f"{path}: the validation split is empty, there is nothing to score")
    return path, tokens.astype(np.int64)


# -----------------------------------------------------------------------------
# The report: a table, a file, a picture.


def written(value, metric):
    """A score as people read it: 25.0% for shares, four digits for the others."""
    if metric.startswith("acc"):
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def table(scores):
    """The scores as lines of text, in columns."""
    lines = [("task", "metric", "score", "95% interval", "guessing", "measured on")]
    for row in scores:
        value, low, high, chance = (written(row[name], row["metric"])
                                    for name in ("value", "low", "high", "chance"))
        lines.append((row["task"], row["metric"], value, f"{low} to {high}", chance,
                      f"{row['n']:,} {row['unit']}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


PANELS = {  # metric: (label, scale, lowest value, how values are written) of its panel
    "perplexity": ("perplexity (lower is better)", "log", 1, "{x:,.0f}"),
    "bits per byte": ("bits per byte (lower is better)", "linear", 0, "{x:.1f}"),
    "acc": ("questions answered right (higher is better)", "linear", 0, "{x:.0%}"),
}


def draw_panel(ax, metric, rows):
    """One line a score: the model with its interval, and what guessing gets."""
    value, low, high, chance = (np.array([row[name] for row in rows])
                                for name in ("value", "low", "high", "chance"))
    places = range(len(rows))
    ax.plot(chance, places, "d", color="#cc6633", markersize=7, label="guessing")
    spread = np.maximum(0, [value - low, high - value])  # rounding may make them negative
    ax.errorbar(value, places, xerr=spread, fmt="o", capsize=4, color="#4477aa",
                label="the model, with its 95% interval")
    for y, row in enumerate(rows):
        ax.annotate(written(row["value"], row["metric"]), (row["value"], y), (0, 8), ha="center",
                    textcoords="offset points")
    label, scale, lowest, form = PANELS[metric]
    names = [row["task"] if row["metric"] in PANELS else f"{row['task']}, per character"
             for row in rows]
    ax.set(xlabel=label, xscale=scale, yticks=places, yticklabels=names,
           xlim=(lowest, 1 if metric == "acc" else None), ylim=(len(rows) - 0.4, -0.8))
    ax.xaxis.set_major_formatter(form)
    ax.grid(axis="x", alpha=0.3)


def draw_scores(scores, title, path):
    """A picture of the scores, a panel for each kind."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's own plots
    panels = {metric: [row for row in scores if row["metric"].startswith(metric)]
              for metric in PANELS}
    panels = {metric: rows for metric, rows in panels.items() if rows}
    heights = [len(rows) + 0.8 for rows in panels.values()]
    fig = Figure(figsize=(8, 1.2 + 0.65 * sum(heights)), dpi=120, layout="constrained")
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=heights)
    for ax, (metric, rows) in zip(axes[:, 0], panels.items()):
        draw_panel(ax, metric, rows)
    fig.suptitle(title)
    fig.legend(*ax.get_legend_handles_labels(), ncols=2, loc="outside lower center", frameon=False)
    with replacing(path) as file:
        fig.savefig(file, format="png")


# -----------------------------------------------------------------------------
# The command.


def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="run folder; without one the newest under runs/")
    add("--tasks", help=f"some of {','.join(TASKS)} (default: the first two, and rows with --rows)")
    add("--rows", help="multiple choice from this .jsonl file")
    add("--data", help="shards whose validation split is held out (default: those of the training)")
    add("--max_tokens", type=int, default=65_536,
        help="score at most this many held-out tokens (default %(default)s)")
    add("--stride", type=int, help="tokens the window moves by (default half of block_size)")
    add("--n_questions", type=int, default=200, help="continuation questions (default %(default)s)")
    add("--seed", type=int, default=0, help="of the continuation questions (default %(default)s)")
    add("--checkpoint", default="best", help="best | last | a step (default %(default)s)")
    add("--device", default="auto", help="auto | cuda | mps | cpu (default %(default)s)")
    add("--precision", default="fp32",
        help="auto | fp32 | bf16 | fp16 (default %(default)s: scores that compare across machines)")
    return parser.parse_args()


def pick_tasks(options):
    """The names of the tasks to run; what is wrong with their options is said now."""
    names = options.tasks.split(",") if options.tasks else ["perplexity", "continuation"]
    names += ["rows"] if options.rows and "rows" not in names else []
    for name in names:
        check_known(name, TASKS, "task")
    for name in ("max_tokens", "n_questions"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
    if "rows" in names and not options.rows:
        raise ValueError("the task rows needs a file of questions: --rows=FILE.jsonl")
    if "rows" in names:
        read_rows(options.rows)
    return names


def main():
    options = parse_options()
    names, folder = pick_tasks(options), Path(options.run or newest_run())
    device = pick_device(options.device)
    precision, dtype = pick_precision(options.precision, device)
    checkpoint = pick_checkpoint(folder, options.checkpoint)
    model, tokenizer = load_run(folder, checkpoint, device, dtype)
    path, tokens = None, np.empty(0, np.int64)
    if {"perplexity", "continuation"} & set(names):
        path, tokens = held_out(folder, tokenizer, options.data, options.max_tokens)
    on = f", on {len(tokens):,} held-out tokens of {path}" if path else ""
    print(f"{checkpoint} ({model.n_parameters() / 1e6:.1f}M parameters, {device}, {precision}): "
          f"{', '.join(names)}{on}", flush=True)
    scores = [row for name in names for row in TASKS[name](model, tokenizer, tokens, options)]
    print(table(scores))
    report = vars(options) | dict(run=str(folder), checkpoint=checkpoint.name, tasks=names,
                                  data=path and str(path), device=device, precision=precision)
    write_json(folder / "scores.json", report | {"scores": scores})
    draw_scores(scores, f"Scores of {checkpoint}", folder / "scores.png")
    print(f"scores: {folder / 'scores.json'}, picture: {folder / 'scores.png'}")


if __name__ == "__main__":
    run_command(main)
