"""
What belongs beside a score: how much of a task the training text had, whether confidence can be
trusted, and a run's model card.

    python -m chapters.card runs/a               # writes runs/a/model_card.md from the run's files

The card takes its scores from the last evaluation (scores.json); python -m chapters.exams --card
evaluates and writes it.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/card.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from chapters.near import gram_hashes
from data import check_shards, read_split
from evaluate import cells, score_choices
from model import load_model, option
from sample import newest_run
from tokenizer import QUIET, parse_options, read_json, reading, replacing, run_command
from train import read_log

OVERLAP = 13  # tokens in a row that tell what was trained on

# -----------------------------------------------------------------------------
# Overlap with the training text.


def overlaps(texts, shards):
    """For each of texts, lists of ids, the share of its runs of 13 tokens that the shards have, too
    (arXiv:2005.14165, appendix C); NaN for a shorter one."""
    texts = [gram_hashes(text, OVERLAP) for text in texts]
    known = np.unique(np.concatenate([*texts, gram_hashes([], OVERLAP)]))
    found, table = np.zeros(len(known), bool), np.zeros(1 << 22, bool)
    table[known % len(table)] = True  # most of what is looked up is not there: this is seen fast
    for shard in shards if len(known) else ():
        for start in tqdm(range(0, len(shard), 1 << 22), "overlap", **QUIET):
            numbers = gram_hashes(shard[start:start + (1 << 22) + OVERLAP - 1], OVERLAP)
            found |= np.isin(known, numbers[table[numbers % len(table)]])
    return [np.isin(text, known[found]).mean() if len(text) else math.nan for text in texts]


def contamination(folder, tokenizer, texts):
    """{task: how many of its texts are long enough, how many of them have a run of 13 tokens in
    common with the run's training shards, and the share of such runs}, of {task: texts}; empty
    where the shards are gone, or others by now."""
    data, report = config_of(folder).get("data", {}), {}
    path = Path(data.get("path", ""))
    if not Path(path, "card.json").exists():
        return {}
    card = check_shards(path, ("train",))
    if (card.tokenizer, card.fingerprint) != (
            tokenizer.hash(), data.get("fingerprint", card.fingerprint)):
        return {}
    names = np.array([name for name, own in texts.items() for _ in own])
    ids = tokenizer.encode_batch([text for own in texts.values() for text in own])
    shares = np.array(overlaps(ids, read_split(path, "train")))
    for name in texts:
        long = shares[(names == name) & ~np.isnan(shares)]
        report[name] = dict(long_enough=len(long), with_overlap=int((long > 0).sum()),
                            share=float(long.mean()) if len(long) else None)
    return report


# -----------------------------------------------------------------------------
# Calibration: of what a model holds for 70% sure, are 70% right?


def calibration_counts(confidence, right, n_bins=10):
    """What the calibration error sums over questions: how far the confidence, a probability, lies
    above being right (0 or 1), in the bin of that confidence; and 1 for the question."""
    counts = np.zeros(n_bins + 1)
    counts[min(int(confidence * n_bins), n_bins - 1)], counts[-1] = confidence - right, 1
    return counts


def calibration_of_sums(sums):
    return np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]


def calibration_error(confidences, right):
    """How far confidence and share of right answers lie apart, in the mean over ten bins of
    confidence: calibration_error([0.9, 0.9], [1, 0]) == 0.4. arXiv:1706.04599"""
    return float(calibration_of_sums(sum(map(calibration_counts, confidences, right))))


def score_calibrated(model, tokenizer, questions, config=None):
    """score_choices, and what else can be said of a choice: calibration error, where confidence is
    the likeliest choice's share of the probability of all; true mass, the share of all choices that
    labels call true; greedy, whether greedy sampling writes the answer; the answer's perplexity."""
    outcomes, chance = score_choices(model, tokenizer, questions)
    for question, outcome in zip(questions, outcomes):
        shown = outcome["shown"]
        sums = np.array(shown["scores"])
        shares = np.exp(sums - np.logaddexp.reduce(sums))
        counts = calibration_counts(shares.max(), outcome["acc"][0])
        outcome |= {"calibration error": counts.tolist(), "greedy": [float(shown["greedy"]), 1],
                    "true mass": [float(shares @ question.get("labels", sums * 0)), 1],
                    "perplexity": [-shown["scores"][shown["answer"]], 1]}
    true = np.mean([np.mean(question.get("labels", 0)) for question in questions])
    return outcomes, chance | {"true mass": dict(chance=true)}


# -----------------------------------------------------------------------------
# The model card: arXiv:1810.03993.

CARD = """# {run}

A {architecture} language model of {parameters:,} parameters, {checkpoint}.

## What it was trained on

{data}

## How it was trained

{training}

## How it scores

{scores}

Guessing is what a model gets that knows nothing; the interval holds 95 of 100 scores on other
questions of this kind. Seed {seed}, {precision}.

Of the questions that are long enough, {overlap}.

## What it cannot do

It continues text like that above; it does not know what is true. It has no knowledge of what its
training text lacks, has learned what prejudice and errors are in it, and may repeat parts of it
word for word. It sees {block_size} tokens at a time. It was not tested for use by people who have
to rely on its answers: do not let it decide about anyone.
"""


SAFETY = "\n## Safety\n"  # begins the last section, which chapters/safety.py writes


def config_of(folder):
    """What a run's config.json says: {"model", "train", "data"}, each a dict; {} without a file."""
    path = Path(folder, "config.json")
    with reading(path):
        config = read_json(path) if path.exists() else {}
        return {name: dict(part or {}) for name, part in config.items()}


def overlap_line(overlap):
    """What contamination found, in words."""
    if not overlap:
        return "what the training text has of them is not known"
    found = [f"{name} {part['with_overlap']} of {part['long_enough']}"
             for name, part in overlap.items() if part["long_enough"]]
    return f"{OVERLAP} tokens in a row are in the training text, too: {', '.join(found) or '-'}"


def training_figures(folder, model):
    """The shape of a model and how its training went, as {name: value}."""
    train, steps = config_of(folder).get("train", {}), read_log(folder) or [{}]
    shape = {name: getattr(model.config, name) for name in (
        "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size")}
    return shape | {name: known[name] for known, names in (
        (train, ("optimizer", "learning_rate", "batch_size", "seed")),
        (steps[-1], ("step", "loss", "val_loss", "elapsed"))) for name in names
        if known.get(name) is not None}


def model_card(folder):
    """What a run's files say about it, as Markdown."""
    report, data = read_json(Path(folder, "scores.json")), config_of(folder).get("data", {})
    model, _ = load_model(Path(folder, report["checkpoint"]))
    lines = [f"- {source['name']}: {source.get('files', 0):,} files"
             for source in data.get("sources", ())]
    lines += [f"- {name}: {n:,}" for name, n in (data.get("counts") or {}).items()]
    figures = [f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}"
               for name, value in training_figures(folder, model).items()]
    head, *rows = (f"| {' | '.join(line[:-1])} |" for line in cells(report["scores"]))
    scores = [head, "|" + "---|" * (head.count("|") - 1), *rows]
    return CARD.format(**report | dict(
        architecture=model.config.architecture, parameters=model.n_parameters(),
        block_size=model.config.block_size, training="\n".join(figures),
        data="\n".join(lines) or "Its run folder does not say.", scores="\n".join(scores),
        overlap=overlap_line(report.get("overlap", {}))))


def read_parts(folder):
    """-> (the model card in a run's folder, its section on safety), "" for what there is not."""
    path = Path(folder, "model_card.md")
    with reading(path):
        text, title, safety = (path.read_text("utf-8") if path.exists() else "").partition(SAFETY)
        return text, title + safety


def write_parts(folder, text, safety):
    """Write model_card.md into a run's folder -> its path."""
    path = Path(folder, "model_card.md")
    with replacing(path) as file:
        file.write((text + safety).encode())
    return path


def write_safety(folder, safety):
    """Write the section on safety, in place of an earlier one, to the end of the model card."""
    text = read_parts(folder)[0] or f"# {Path(folder).resolve().name}\n"
    return write_parts(folder, text, SAFETY + safety)


def write_card(folder):
    """Write model_card.md, but for its section on safety, into a run's folder -> its path.
    ValueError before an evaluation."""
    if not Path(folder, "scores.json").exists():
        raise ValueError(f"{folder} has no scores.json: python evaluate.py {folder} writes it")
    with reading(Path(folder, "scores.json")):
        text = model_card(folder)
    return write_parts(folder, text, read_parts(folder)[1])


@dataclass(frozen=True)
class Command:
    """What the card is about."""
    run: str | None = option(None, "a run folder with scores.json; without one the newest",
                             positional=True)


def main():
    command = Command(**parse_options(__doc__, Command)[0])
    print(f"card: {write_card(Path(command.run or newest_run()))}")


if __name__ == "__main__":
    run_command(main)
