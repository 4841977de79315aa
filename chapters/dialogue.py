"""
Does a model keep up over a long dialogue? A script of 25 turns goes in, and what the replies show
comes out: facts told in the first nine turns and asked back later, repetition, and drift.

    python -m chapters.judge runs/a runs/b --dialogue       # makes dialogue.json and dialogue.png
"""

import random
import re
from itertools import chain
from statistics import mean

from tqdm import tqdm

from chapters.talk import converse
from evaluate import wilson
from tokenizer import QUIET, replacing

FACTS = [  # how it is told, how it is asked back, values that may stand in it
    ("My name is {}.", "What is my name?", ("Mara", "Oskar", "Ines", "Tomas", "Lena", "Viktor")),
    ("I live in {}.", "Which town do I live in?",
     ("Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Athens")),
    ("I work as a {}.", "What is my job?",
     ("baker", "nurse", "pilot", "plumber", "teacher", "tailor")),
    ("My favourite colour is {}.", "What is my favourite colour?",
     ("green", "purple", "orange", "yellow", "blue", "pink")),
    ("I have a pet, a {}.", "What kind of pet do I have?",
     ("parrot", "hamster", "turtle", "rabbit", "goat", "snake")),
    ("My sister's name is {}.", "What is my sister's name?",
     ("Clara", "Ruth", "Nadia", "Olga", "Paula", "Greta")),
    ("I play the {}.", "Which instrument do I play?",
     ("violin", "trumpet", "flute", "piano", "cello", "harp")),
    ("I was born in {}.", "In which month was I born?",
     ("March", "June", "August", "October", "December", "April")),
    ("My locker has the number {}.", "What is the number of my locker?",
     ("4817", "2093", "7561", "3348", "9120", "6475")),
]
SMALL_TALK = ["Tell me something about the sea.", "What makes a good breakfast?",
              "Describe an autumn day.", "Why do people climb mountains?",
              "Tell me a very short story.", "What is a bridge for?", "How do you make tea?"]
ASKED_AT = (10, 11, 12, 14, 16, 18, 20, 23, 25)  # turns; the fact told last is asked first
N_TURNS = 25

# -----------------------------------------------------------------------------
# The script.


def script(seed):
    """25 turns: dicts with text, and where a fact is asked back its value, the other values it
    could have had, and the distance in turns to where it was told. The seed decides which fact
    stands where, and all values."""
    rng, turns = random.Random(seed), {}
    small_talk = iter(rng.sample(SMALL_TALK, len(SMALL_TALK)))
    facts = rng.sample(FACTS, len(FACTS))
    for told, (asked, (tell, ask, values)) in enumerate(zip(reversed(ASKED_AT), facts), 1):
        value = rng.choice(values)
        turns[told] = dict(text=tell.format(value))
        turns[asked] = dict(text=ask, value=value, others=[v for v in values if v != value],
                            distance=asked - told)
    return [turns[n] if n in turns else dict(text=next(small_talk)) for n in range(1, N_TURNS + 1)]


# -----------------------------------------------------------------------------
# Measures: replies to numbers.


def words_of(text):
    """Words and signs, in lower case: words_of("It's 4.") == ["it", "'", "s", "4", "."]."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def recalls(turn, reply):
    """Whether a reply names the value asked for as a word, and none of the others."""
    words = words_of(reply)
    return (turn["value"].casefold() in words
            and not any(other.casefold() in words for other in turn["others"]))


def n_grams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def repetition(replies, n=4):
    """For each reply the share of its n-grams that it has said before itself, and the share that
    earlier replies had: repetition(["a b a b", "a b"], 2) == [(1 / 3, 0), (0, 1)]. A shorter reply
    counts as one."""
    shares, before = [], set()
    for reply in replies:
        words = words_of(reply)
        grams = n_grams(words, min(n, len(words)))
        count = max(1, len(grams))
        shares.append((1 - len(set(grams)) / count if grams else 0,
                       sum(gram in before for gram in grams) / count))
        before |= set(grams)
    return shares


def variety(reply, n=2):
    """The share of a reply's n-grams that are distinct, arXiv:1510.03055; 1 for a short one."""
    grams = n_grams(words_of(reply), n)
    return len(set(grams)) / len(grams) if grams else 1


def measure(turns, replies):
    """The turns of a dialogue with the replies and all measures of each."""
    rows = []
    for turn, reply, (within, between) in zip(turns, replies, repetition(replies)):
        row = turn | dict(reply=reply, words=len(words_of(reply)), within=within, between=between,
                          variety=variety(reply))
        if "value" in turn:
            row["recalled"] = recalls(turn, reply)
        rows.append(row)
    return rows


def share(hits):
    """A list of truths as a share with its interval; None if it is empty."""
    low, high = wilson(mean(hits), len(hits)) if hits else (None, None)
    return dict(value=mean(hits) if hits else None, low=low, high=high, n=len(hits))


def percent(score):
    """A share with its interval in words."""
    if score["value"] is None:
        return "-"
    return f"{score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"


def summarize(dialogues):
    """Recall at each distance and in all, and the mean of each measure at each turn."""
    asked = [row for row in chain(*dialogues) if "value" in row]
    distances = sorted({row["distance"] for row in asked})
    recall = {d: share([row["recalled"] for row in asked if row["distance"] == d])
              for d in distances}
    curves = {name: [mean(row[name] for row in rows) for rows in zip(*dialogues)]
              for name in ("within", "between", "variety", "words")}
    third = N_TURNS // 3
    drift = {name: dict(first=mean(curve[:third]), last=mean(curve[-third:]))
             for name, curve in curves.items()}
    return dict(recall=share([row["recalled"] for row in asked]), recall_by_distance=recall,
                drift=drift, curves=curves)


def draw_dialogues(summaries, path):
    """A picture of {name: summary}: recall by distance, repetition and drift by turn."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's own plots
    fig = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    axes, turns = fig.subplots(3, 1), range(1, N_TURNS + 1)
    for i, (name, summary) in enumerate(summaries.items()):
        color, points = f"C{i}", summary["recall_by_distance"]
        values = [point["value"] for point in points.values()]
        reach = [[max(0, p["value"] - p["low"]) for p in points.values()],
                 [max(0, p["high"] - p["value"]) for p in points.values()]]
        bars = [int(distance) + 0.15 * i for distance in points]  # side by side
        axes[0].errorbar(bars, values, reach, fmt="o-", color=color, capsize=3, label=name)
        axes[1].plot(turns, summary["curves"]["between"], "-", color=color, label=name)
        axes[1].plot(turns, summary["curves"]["within"], ":", color=color)
        axes[2].plot(turns, summary["curves"]["words"], "-", color=color, label=name)
    recall = ", ".join(f"{s['recall']['value']:.0%}" for s in summaries.values())
    axes[0].set(title=f"Recalled of what was told: {recall}", ylim=(-0.05, 1.05),
                xlabel="turns since it was told", ylabel="recalled, 95% interval")
    axes[1].set(title="Said before: in earlier replies (line), in the same reply (dots)",
                ylim=(-0.05, 1.05), xlabel="turn", ylabel="share of 4-grams")
    axes[2].set(title="Length of the replies", ylim=(0, None), xlabel="turn", ylabel="words")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    with replacing(path) as file:
        fig.savefig(file, format="png")


# -----------------------------------------------------------------------------
# All of it: contestants {"A": model, ...} in, a report for JSON out.


def run_dialogues(contestants, n_dialogues, seed):
    """-> {name: its summary, and its dialogues turn by turn}"""
    report = {}
    for name, model in contestants.items():
        scripts = [script(f"{seed} {i}") for i in range(n_dialogues)]
        bar = tqdm(scripts, f"dialogues of {name}", **QUIET)
        dialogues = [measure(turns, converse(model, [turn["text"] for turn in turns]))
                     for turns in bar]
        report[name] = dict(summary=summarize(dialogues), dialogues=dialogues)
    return report


def dialogue_lines(names, report):
    """The report of run_dialogues in words."""
    for name, part in report.items():
        summary = part["summary"]
        yield f"{name} {names[name]}: recalls {percent(summary['recall'])} of what was told"
        yield "  at a distance of " + ", ".join(f"{d}: {score['value']:.0%}" for d, score in
                                                summary["recall_by_distance"].items()) + " turns"
        for label, key in (("said before in the same reply", "within"),
                           ("said in earlier replies", "between"),
                           ("distinct bigrams", "variety"), ("words", "words")):
            first, last = (f"{value:.1f}" if key == "words" else f"{value:.1%}"
                           for value in summary["drift"][key].values())
            yield f"  {label}: {first} in the first eight turns, {last} in the last eight"
