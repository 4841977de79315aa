"""
Small tasks for any model, made by rules or from its own text, and measures of what it writes.

    python evaluate.py --tasks=small             # or some: cloze,facts,planted,copying,brackets,...
    python -m chapters.probes                    # an example of each that is made by a rule

cloze and facts are made of words of the text: the one held out from training, the one trained on.
planted, copying, brackets and arithmetic look at one skill each. writing continues a text, and
counts by BLEU, ROUGE-L and F1 how much it is like the text that really follows.
"""

import itertools
import random
import string
import sys
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":  # `python chapters/probes.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import regex
from tqdm import tqdm

from chapters.prompts import LETTERS, is_word, joined, words_of
from evaluate import Task, ratio, score_choices, shuffled
from sample import complete_batch
from tokenizer import QUIET, parse_options, run_command

FACT_TOKENS = 400_000  # of the training text, in which facts are looked for

# -----------------------------------------------------------------------------
# How alike two texts are. What belongs to a whole set of texts is counted for each, and summed.


def f1_of_counts(n_common, n_text, n_target):
    """The F1 of n_common / n_text (precision) and n_common / n_target (recall)."""
    return 2 * n_common / (n_text + n_target) if n_common else 0.0


def plain_words(text):
    """The words of an answer without case, punctuation and articles, as SQuAD compares them
    (arXiv:1606.05250): plain_words("The cat's  hat.") == ["cats", "hat"]."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return regex.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(text, target):
    """How well the plain words of two texts agree, 0 to 1, in any order: arXiv:1606.05250."""
    text, target = plain_words(text), plain_words(target)
    return f1_of_counts((Counter(text) & Counter(target)).total(), len(text), len(target))


def rouge_l(text, target):
    """The F1 of the longest series of words that two texts have in common, in order, 0 to 1: Lin,
    https://aclanthology.org/W04-1013."""
    text, target = (regex.findall(r"[^\W_]+", text.lower()) for text in (text, target))
    row = [0] * (len(target) + 1)
    for word in text:  # row[j]: the longest of the words so far and the first j of target
        before, row = row, [0]
        for j, other in enumerate(target):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return f1_of_counts(row[-1], len(text), len(target))


def bleu_counts(text, target, n=4):
    """What BLEU sums over texts: 1- to n-grams of text that are in target, those of text, and how
    many words text and target have; (2 n + 2,)."""
    text, target = text.split(), target.split()
    grams = [[Counter(zip(*(words[i:] for i in range(k)))) for words in (text, target)]
             for k in range(1, n + 1)]
    return np.array([*((a & b).total() for a, b in grams), *(a.total() for a, _ in grams),
                     len(text), len(target)], float)


def bleu_of_sums(sums):
    """BLEU (..., ) of sums of bleu_counts (..., 2 n + 2): the geometric mean of the precisions,
    times the brevity penalty."""
    n = sums.shape[-1] // 2 - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.log(sums[..., :n] / sums[..., n:2 * n]).mean(axis=-1)
        brevity = np.minimum(0, 1 - sums[..., -1] / sums[..., -2])
        return np.nan_to_num(np.exp(precisions + brevity))


def bleu(texts, targets):
    """BLEU of a whole set of texts, 0 to 1; words are what stands between white space.
    https://aclanthology.org/P02-1040"""
    return float(bleu_of_sums(sum(map(bleu_counts, texts, targets))))


def answers(model, tokenizer, questions, stop=(), **options):
    """Yield what the model writes after each question's context, greedily unless options, which are
    SampleConfig's, say more. Half of the model's context or more is kept for the question, whose
    beginning may be lost."""
    most = min(questions[0]["answer_tokens"], model.config.block_size // 2)
    bar = iter(tqdm(questions, "answers", **QUIET))
    while batch := list(itertools.islice(bar, 16)):
        prompts = [tokenizer.encode(question["context"])[most - model.config.block_size:]
                   or [tokenizer.eot] for question in batch]
        yield from complete_batch(model, tokenizer, prompts, max_new_tokens=most, stop=list(stop),
                                  **{"temperature": 0} | options)


def score_writing(model, tokenizer, questions, config):
    """How much the model's text is like the one that really follows."""
    outcomes = []
    for question, text in zip(questions, answers(model, tokenizer, questions)):
        text, target = (" ".join(words_of(text)[:20]) for text in (text, question["target"]))
        outcomes.append({"BLEU": bleu_counts(text, target).tolist(), "F1": [f1(text, target), 1],
                         "ROUGE-L": [rouge_l(text, target), 1], "shown": text})
    return outcomes, {}


# -----------------------------------------------------------------------------
# Questions made of text: (texts, n_rows, seed) -> questions.


def cloze_rows(texts, n_rows=200, seed=0):
    """12 words, one of four words, and the 5 words behind it, which alone are scored: a word that
    fits makes them likely."""
    rng, texts = random.Random(seed), [*map(words_of, texts)]
    starts = [(words, i) for words in texts for i in range(12, len(words) - 5)
              if is_word(words[i], 4)]
    others = sorted({words[i] for words, i in starts})
    if len(others) < 4:
        raise ValueError(f"the held-out text has {len(others)} different words of four letters "
                         "inside 18 words, cloze needs 4: leave cloze out of --tasks")
    rows = []
    for words, i in rng.sample(starts, min(n_rows, len(starts))):
        row = shuffled(rng, "", words[i], rng.sample(others, 4))
        contexts = [joined([*words[i - 12:i], choice]) for choice in row["choices"]]
        rows.append(row | dict(context=contexts, choices=[joined(words[i + 1:i + 6])] * 4,
                               between=None))
    return rows


def writing_rows(texts, n_rows=200, seed=0):
    """40 words to continue, of which a short context keeps the last, and the 20 that follow."""
    rng, texts = random.Random(seed), [*map(words_of, texts)]
    starts = [(words, i) for words in texts for i in range(40, len(words) - 20, 20)]
    if not starts:
        raise ValueError("no document of the held-out text has more than 60 words, 40 to go on "
                         "from and 20 to compare with: leave writing out of --tasks")
    return [dict(context=joined(words[i - 40:i]), target=joined(words[i:i + 20]),
                 answer_tokens=60) for words, i in rng.sample(starts, min(n_rows, len(starts)))]


def fact_rows(texts, n_rows=200, seed=0):
    """What the training text says: two words that it has at least four times, and the word that
    always follows. Each such word is the answer once."""
    rng, followers = random.Random(seed), defaultdict(Counter)
    for text in texts:
        words = words_of(text)
        for *pair, word in zip(words, words[1:], words[2:]):
            followers[joined(pair)][word] += 1
    facts = {}  # the last of the pairs that a word always follows
    for pair, found in sorted(followers.items()):
        word = next(iter(found))
        if len(found) == 1 and found.total() >= 4 and is_word(word, 3):
            facts[word] = pair
    if len(facts) < 8:
        raise ValueError(f"of the training text {len(facts)} words follow the same two words four "
                         "times and always; facts needs 8: leave facts out of --tasks")
    return [shuffled(rng, facts[word], word, facts) | dict(between=None)
            for word in rng.sample(sorted(facts), min(n_rows, len(facts)))]


# -----------------------------------------------------------------------------
# Questions made by a rule: (rng, words) -> a question.


def planted_row(rng, words):
    """Four facts planted before the question about one of them: apple = 417."""
    names, numbers = rng.sample(words, 4), [str(n) for n in rng.sample(range(100, 1000), 4)]
    lines = "".join(f"{name} = {number}\n" for name, number in zip(names, numbers))
    i = rng.randrange(4)
    return shuffled(rng, f"{lines}{names[i]} =", numbers[i], numbers)


def copying_row(rng, words):
    """Eight words, and once more up to one of them: which comes next?"""
    words, n = rng.sample(words, 8), rng.randrange(2, 7)
    return shuffled(rng, " ".join([*words, *words[:n]]), words[n], words)


def brackets_row(rng, words):
    """Three open brackets: what closes them?"""
    closing = ["".join(three) for three in itertools.product(")]}", repeat=3)]
    right = rng.choice(closing)
    opening = "".join("([{"[")]}".index(char)] for char in reversed(right))
    parts = [char + word for char, word in zip(opening, rng.sample(words, 3))]
    return shuffled(rng, "".join(parts), right, closing) | dict(between="")


def arithmetic_row(rng, words):
    """Sums, three of them solved: 3 + 4 = 7. Four numbers in a row to choose from, the right one
    anywhere among them, so that a taste for some numbers gets no more and no less than chance."""
    *shown, (a, b) = [(rng.randrange(1, 50), rng.randrange(1, 50)) for _ in range(4)]
    lines = "".join(f"{x} + {y} = {x + y}\n" for x, y in shown)
    n_smaller = rng.randrange(min(4, a + b))  # of the wrong ones
    wrong = [str(a + b + i) for i in range(-n_smaller, 4 - n_smaller)]
    return shuffled(rng, f"{lines}{a} + {b} =", str(a + b), wrong)


def by_rule(make_row, n_words):
    """(texts, n_rows, seed) -> questions by make_row(rng, words), of common words of the texts."""
    def make_rows(texts, n_rows=200, seed=0):
        found = Counter(word for text in texts for word in LETTERS.findall(text)
                        if word == word.lower())
        words, rng = sorted(sorted(found), key=found.get)[-300:], random.Random(seed)
        if len(words) < n_words:
            name = make_row.__name__.removesuffix("_row")
            raise ValueError(f"the held-out text has {len(words)} different words of three small "
                             f"letters, {name} needs {n_words}: leave {name} out of --tasks")
        return [make_row(rng, words) for _ in range(min(n_rows, 10_000))]  # there is no end of them
    return make_rows


ROWS = {"cloze": cloze_rows, "facts": fact_rows, "planted": by_rule(planted_row, 4),
        "copying": by_rule(copying_row, 8), "brackets": by_rule(brackets_row, 3),
        "arithmetic": by_rule(arithmetic_row, 0), "writing": writing_rows}


def questions_of(name):
    """What a Task takes as its questions."""
    def questions(config, texts):
        part = dict(facts=dict(split="train", max_tokens=FACT_TOKENS)).get(name, {})
        found = texts(**part) if name != "arithmetic" else []
        return ROWS[name](found, config.n_questions or 200, config.seed)
    return questions


OPTIONS = ("n_questions", "seed", "data", "max_tokens")  # for the two below only the first act
TASKS = {name: Task(questions_of(name), score_choices, {"acc": ratio},
                    OPTIONS[:dict(facts=3, arithmetic=2).get(name)]) for name in ROWS}
TASKS["writing"] = Task(questions_of("writing"), score_writing,
                        {"BLEU": bleu_of_sums, "ROUGE-L": ratio, "F1": ratio}, OPTIONS)


def main():
    parse_options(__doc__)
    for name in ("planted", "copying", "brackets", "arithmetic"):
        row, = ROWS[name](["lake tree bird house fish cloud stone door road hill"], 1)
        print(f"{name}:\n{row['context']} ...  {' | '.join(row['choices'])}\n")


if __name__ == "__main__":
    run_command(main)
