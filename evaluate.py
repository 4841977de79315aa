"""
Scores of trained models: run folders go in; tables, scores.json and scores.png come out.

    python evaluate.py                                    # the newest run, on small tasks
    python evaluate.py runs/a runs/b --tasks=hellaswag,arc_easy --n_shots=5 --card
    python evaluate.py --tasks=rows --rows=questions.jsonl

The small tasks are made from the text held out from training, and from rules. The field's own
(TASKS lists them) are asked and scored as lm-evaluation-harness does it; their rows are downloaded,
or read from --rows. Task rows is multiple choice from a file of your own, one
{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1} a line. Each score stands beside what
guessing gets, with its 95% interval, and with the share of the task that was in the training text.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import secrets
import string
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
from tqdm import tqdm

from data import check_shards, download, file_hash, read_split
from tokenizer import (Parser, Tokenizer, read_json, read_sealed, replacing, run_command,
                       share_cores, write_json)

if __name__ == "__main__":
    share_cores()
if not {"-h", "--help"} & set(sys.argv):  # torch takes two seconds to import; help need not wait
    import torch

    from model import cap, check_known
    from sample import (complete_batch, load_run, new_cache, newest_run, pick_checkpoint,
                        pick_device, pick_precision, read_manifest)

BATCH_TOKENS, HEAD_TOKENS = 4096, 1024  # in a forward pass; of them, those with logits at once
CACHED_TOKENS = 4 * BATCH_TOKENS        # that a forward pass may look back at, over all its rows
CONTEXT_WORDS, CHOICE_WORDS = 40, 8     # in a question made of held-out text
FACT_TOKENS = 400_000                   # of the training text, in which facts are looked for
OVERLAP = 13                            # tokens in a row that tell what was trained on
EXAMPLE_ROW = '{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'

# -----------------------------------------------------------------------------
# The primitive: how likely is one text as the continuation of another?


def token_scores(model, x, targets):
    """For what the last layer says (N, C) and the ids that follow (N,): the log-probability in nats
    of each, and whether it was the likeliest; (N,) both."""
    scores, likeliest = [], []
    for part, target in zip(x.split(HEAD_TOKENS), targets[:, None].split(HEAD_TOKENS)):
        logits = cap(model.lm_head(part), model.config.softcap).float()
        scores.append(logits.gather(1, target)[:, 0] - logits.logsumexp(dim=1))
        likeliest.append(logits.argmax(dim=1) == target[:, 0])
    return torch.cat(scores).cpu(), torch.cat(likeliest).cpu()


def read_ends(model, rows, memory=None):
    """For each (ids, n) of rows what token_scores says about its last n ids: [(n,), (n,)]. A
    shorter row is filled up behind its end, where a causal model does not look."""
    ids, wanted = torch.zeros(2, len(rows), max(len(row) for row, _ in rows), dtype=torch.long)
    for j, (row, n) in enumerate(rows):
        ids[j, :len(row)] = torch.as_tensor(row)
        wanted[j, len(row) - n:len(row)] = 1
    ids, wanted = ids.to(model.device), wanted.bool().to(model.device)[:, 1:]
    with torch.inference_mode():
        x = model.transformer(ids[:, :-1], memory, model.dtype)[wanted]      # (N, C)
        scored = token_scores(model, x, ids[:, 1:][wanted])
    return list(zip(*(values.split([n for _, n in rows]) for values in scored)))


def score_ends(model, rows, title="scoring"):
    """read_ends for any number of rows: those of like length share a forward pass."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    results, bar = [None] * len(rows), tqdm(total=len(rows), desc=title, disable=None, leave=False)
    while order:
        n_rows = max(1, BATCH_TOKENS // len(rows[order[0]][0]))
        batch, order = order[:n_rows], order[n_rows:]
        for i, result in zip(batch, read_ends(model, [rows[i] for i in batch])):
            results[i] = result
        bar.update(len(batch))
    bar.close()
    return results


def go_on(model, memory, parents, ids, room=0):
    """Let copies of the caches' rows `parents` (B,) read ids (B, T): new caches, with room for
    more. It is how texts that begin alike share the work of their beginning."""
    length = memory[0].length if memory else 0
    caches = new_cache(model, len(parents), length + ids.size(1) + room)
    for old, new in zip(memory or (), caches):
        new.append(old.k[parents, :, :length], old.v[parents, :, :length])
    if ids.size(1):
        with torch.inference_mode():
            model.transformer(ids.to(model.device), caches, model.dtype)
    return caches


def score_shared(model, groups, title="scoring"):
    """What score_ends says of the rows (before + after, len(after)) of each (before, [after, ...]),
    in lists. What all befores begin with is read once, the rest of each once, together with others
    of its length."""
    heads = [before[:-1] for before, _ in groups]  # the last id is read with each after
    head = os.path.commonprefix(heads)
    first = go_on(model, None, [0], torch.tensor([head], dtype=torch.long))
    order = sorted(range(len(groups)), key=lambda i: -len(heads[i]))
    results, bar = [None] * len(groups), tqdm(total=len(groups), desc=title, disable=None,
                                              leave=False)
    while order:
        T, tokens, batch = len(heads[order[0]]), 0, []
        while order and len(heads[order[0]]) == T:
            before, afters = groups[order[0]]
            tokens += len(afters) * (T + max(map(len, afters)))
            if batch and tokens > CACHED_TOKENS:
                break
            batch.append(order.pop(0))
        rest = torch.tensor([heads[i][len(head):] for i in batch], dtype=torch.long)
        rows = [(groups[i][0][-1:] + after, len(after)) for i in batch for after in groups[i][1]]
        parents = [j for j, i in enumerate(batch) for _ in groups[i][1]]
        memory = go_on(model, first, [0] * len(batch), rest)
        memory = go_on(model, memory, parents, torch.empty(len(rows), 0),
                       max(n for _, n in rows))
        scored = iter(read_ends(model, rows, memory))
        for i in batch:
            results[i] = list(itertools.islice(scored, len(groups[i][1])))
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


def loglikelihood(model, tokenizer, pairs, title="scoring", share=True):
    """For each (context, continuation): (the log-probability of the continuation in nats, whether
    greedy sampling gives it). A context that is too long loses its beginning. Continuations of one
    context share the reading of it; without share the numbers are the same, only later."""
    groups, alone, block_size = defaultdict(list), [], model.config.block_size
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    for i, (before, after) in enumerate(encoded):
        if not 0 < len(after) <= block_size:
            raise ValueError(f"a continuation has {len(after)} tokens, this model takes 1 to "
                             f"{block_size}: {pairs[i][1][:40]!r}")
        fits = len(before) + len(after) <= block_size + 1
        (groups[tuple(before)] if share and fits else alone).append(i)
    for before in [before for before, group in groups.items() if len(group) == 1]:
        alone += groups.pop(before)
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
    for start in range(0, len(tokens), stride):
        stop = min(start + block_size + 1, len(tokens))
        if stop > done:
            rows.append((tokens[max(0, stop - block_size - 1):stop], stop - done))
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
# Comparing texts. What belongs to a whole set of texts is counted for each, and summed.


def plain_words(text):
    """The words of an answer without case, punctuation and articles, as SQuAD compares them
    (arXiv:1606.05250): plain_words("The cat's  hat.") == ["cats", "hat"]."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(text, target, ignore=()):
    """1.0 if two texts are equal but for case and what the patterns of ignore match, else 0.0:
    exact_match("$1,000", "1000", [",", r"\\$"]) == 1."""
    for pattern in ignore:
        text, target = re.sub(pattern, "", text), re.sub(pattern, "", target)
    return float(text.lower() == target.lower())


def harmonic(n_common, n_text, n_target):
    """The F1 of n_common / n_text (precision) and n_common / n_target (recall)."""
    return 2 * n_common / (n_text + n_target) if n_common else 0.0


def f1(text, target):
    """How well the plain words of two texts agree, 0 to 1, in any order: arXiv:1606.05250."""
    text, target = plain_words(text), plain_words(target)
    return harmonic((Counter(text) & Counter(target)).total(), len(text), len(target))


def rouge_l(text, target):
    """The F1 of the longest series of words that two texts have in common, in order, 0 to 1: Lin,
    https://aclanthology.org/W04-1013."""
    text, target = (re.findall(r"[a-z0-9]+", text.lower()) for text in (text, target))
    row = [0] * (len(target) + 1)
    for word in text:  # row[j]: the longest of the words so far and the first j of target
        before, row = row, [0]
        for j, other in enumerate(target):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return harmonic(row[-1], len(text), len(target))


def bleu_counts(text, target, n=4):
    """What BLEU sums over texts: 1- to n-grams of text that are in target, those of text, and how
    many words text and target have; (2 n + 2,)."""
    text, target = text.split(), target.split()
    grams = [[Counter(zip(*(words[i:] for i in range(k)))) for words in (text, target)]
             for k in range(1, n + 1)]
    return np.array([*((a & b).total() for a, b in grams), *(a.total() for a, _ in grams),
                     len(text), len(target)], float)


def bleu_of(sums):
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
    return float(bleu_of(sum(map(bleu_counts, texts, targets))))


def pass_at_k(n, n_right, k):
    """The chance that of k samples, drawn from n of which n_right are right, one is right:
    pass_at_k(4, 1, 2) == 0.5. arXiv:2107.03374"""
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def calibration_counts(confidence, right, n_bins=10):
    """What the calibration error sums over questions: how far the confidence, a probability, lies
    above being right (0 or 1), in the bin of that confidence; and 1 for the question."""
    counts = np.zeros(n_bins + 1)
    counts[min(int(confidence * n_bins), n_bins - 1)], counts[-1] = confidence - right, 1
    return counts


def calibration_of(sums):
    return np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]


def calibration_error(confidences, right):
    """How far confidence and share of right answers lie apart, in the mean over ten bins of
    confidence: calibration_error([0.9, 0.9], [1, 0]) == 0.4. arXiv:1706.04599"""
    return float(calibration_of(sum(map(calibration_counts, confidences, right))))


# -----------------------------------------------------------------------------
# Intervals: 95 of 100 such intervals hold the score that endless text of this kind would give.
# A question gives each metric a vector; a score is what METRICS makes of the sum of the vectors.


def ratio(sums):
    return sums[..., 0] / sums[..., -1]


METRICS = {"perplexity": lambda sums: np.exp(ratio(sums)), "BLEU": bleu_of,
           "calibration error": calibration_of}  # all others are a ratio
NOT_SHARES = ("perplexity", "bits per byte")


def draws(metric, vectors, n_draws=1000, seed=0):
    """The scores (n_draws,) of as many questions drawn from vectors (N, d), again and again: the
    bootstrap. For the same N and seed the same questions are drawn."""
    rng, N = np.random.default_rng(seed), len(vectors)
    sums = np.array([vectors[rng.integers(N, size=N)].sum(axis=0) for _ in range(n_draws)])
    return METRICS.get(metric, ratio)(sums)


def middle(values):
    """Between what two numbers the middle 95% of values lie."""
    return tuple(np.percentile(values, [2.5, 97.5]).tolist())


def bootstrap(sums, units, n_draws=1000, seed=0):
    """The interval of sum(sums) / sum(units), where block i of the text has sums[i] and units[i]:
    the middle 95% of what as many blocks give that are drawn from them, again and again."""
    return middle(draws("ratio", np.stack([sums, units], axis=1), n_draws, seed))


def wilson(share, n, z=1.96):
    """The interval of a share of n, which stays within 0 and 1: Wilson (1927)."""
    middle, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def interval(metric, vectors):
    """-> (score, low, high) of vectors (N, d): Wilson's interval where each question is right or
    wrong, the middle 95% of the bootstrap elsewhere."""
    value = float(METRICS.get(metric, ratio)(vectors.sum(axis=0)))
    if metric not in METRICS and np.isin(vectors, (0, 1)).all() and vectors[:, -1].all():
        return value, *wilson(value, len(vectors))
    return value, *middle(draws(metric, vectors))


def difference(metric, a, b):
    """-> (score of b - score of a, low, high), where a and b (N, d) are about the same questions;
    None if they are not. Paired: a question drawn is drawn for both, so what makes it hard for both
    does not count."""
    if a.shape != b.shape or a[:, -1].sum() != b[:, -1].sum():
        return None
    of = METRICS.get(metric, ratio)
    gap = of(b.sum(axis=0)) - of(a.sum(axis=0))
    return float(gap), *middle(draws(metric, b) - draws(metric, a))


# -----------------------------------------------------------------------------
# From a row, as Hugging Face gives it, to a question: {"context", "choices", "answer"}, where
# context may be one for each choice, or {"context", "target"}. lm-evaluation-harness's words.


def ask_arc(row):
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return dict(context="Question: " + row["question"] + "\nAnswer:", choices=texts,
                answer=labels.index(row["answerKey"]))


def ask_hellaswag(row):
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))  # left by WikiHow
        return text.replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return dict(context=clean(context), choices=[clean(text) for text in row["endings"]],
                answer=int(row["label"]))


def ask_mmlu(row):
    topic, letters = row["subject"].replace("_", " "), "ABCD"
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
    answer = row["answer"] if isinstance(row["answer"], int) else letters.index(row["answer"])
    return dict(head="The following are multiple choice questions (with answers) about "
                f"{topic}.\n\n", topic=topic, choices=list(letters), answer=answer,
                context="\n".join([row["question"].strip(), *lines, "Answer:"]))


TRUTHFULQA = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def ask_truthfulqa(row, targets="mc1_targets"):
    choices, labels = row[targets]["choices"], row[targets]["labels"]
    return dict(context=TRUTHFULQA + "Q: " + row["question"] + "\nA:", choices=choices,
                labels=labels, answer=labels.index(1))


def ask_truthfulqa_mc2(row):
    return ask_truthfulqa(row, "mc2_targets")


def ask_piqa(row):
    return dict(context="Question: " + row["goal"] + "\nAnswer:",
                choices=[row["sol1"], row["sol2"]], answer=row["label"])


def ask_winogrande(row):
    before, after = row["sentence"].split("_", 1)
    return dict(context=[before + row["option1"], before + row["option2"]],
                choices=[after.strip()] * 2, answer=int(row["answer"]) - 1)


def ask_lambada(row):
    context, _, word = row["text"].rpartition(" ")
    return dict(context=context, choices=[word], answer=0)


def ask_boolq(row):
    answer = row["label"] if "label" in row else row["answer"]
    return dict(context=row["passage"] + "\nQuestion: " + row["question"] + "?\nAnswer:",
                choices=["no", "yes"], answer=int(answer))


def ask_gsm8k(row):
    return dict(context="Question: " + row["question"] + "\nAnswer:", target=row["answer"])


def ask_humaneval(row):
    return dict(context=row["prompt"], target=row["canonical_solution"],
                check=f"{row['test']}\ncheck({row['entry_point']})")


def ask_ready(row):
    """Rows that are questions already: ours, and those of MosaicML's benchmarks."""
    if "query" in row:
        query = row["query"].strip()
        query += "\nAnswer:" if query.startswith("Question:") and "Answer:" not in query else ""
        return dict(context=query, choices=row["choices"], answer=row["gold"])
    if "continuation" in row:
        return dict(context=row["context"], choices=[row["continuation"]], answer=0)
    if not all(choice.strip() for choice in row["choices"]):
        raise ValueError("a choice is empty")
    spaced = isinstance(row["context"], str) and row["context"][-1:].isspace()
    return dict(row, between="" if spaced else " ")


def is_question(question):
    """Whether all is there, and of its kind: rows come from files."""
    if not all(isinstance(question.get(name, ""), str) for name in ("target", "head", "check")):
        return False
    context, choices = question["context"], question.get("choices")
    if "target" in question:
        return isinstance(context, str)
    labels, answer = question.get("labels", choices), question["answer"]
    contexts = context if isinstance(context, list) else [context]
    return (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
            and all(isinstance(text, str) for text in contexts)
            and len(contexts) in (1, len(choices)) and len(labels) == len(choices)
            and ("labels" not in question or {*labels} == {0, 1})
            and type(answer) is int and 0 <= answer < len(choices))


# -----------------------------------------------------------------------------
# Small tasks for any model: made of the held-out text, of the training text, and of rules.


def choose(rng, context, right, wrong):
    """A question: right and three of wrong, in any order."""
    wrong = sorted(set(wrong) - {right})
    choices = rng.sample([right, *rng.sample(wrong, 3)], 4)
    return dict(context=context, choices=choices, answer=choices.index(right))


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
        wrong = {pieces[i]: None}
        while len(wrong) < 4:
            wrong[pieces[rng.choice(usable)]] = None
        words, start = places[i]
        context = "".join(words[start - CONTEXT_WORDS:start])
        rows.append(choose(rng, context, pieces[i], wrong))
    return rows


def cloze_rows(texts, n_rows=200, seed=0):
    """Questions made of the texts: 12 words, one of four words, and the 5 words behind it, which
    alone are scored: a word that fits makes them likely."""
    rng, texts = random.Random(seed), [text.split() for text in texts]
    places = [(words, i) for words in texts for i in range(12, len(words) - 5)
              if words[i].isalpha() and len(words[i]) > 3]
    others = sorted({words[i] for words, i in places})
    if len(others) < 4:
        raise ValueError("the held-out text is too short for cloze questions of 18 words: leave "
                         "cloze out of --tasks")
    rows = []
    for words, i in rng.sample(places, min(n_rows, len(places))):
        row = choose(rng, "", words[i], rng.sample(others, 4))
        contexts = [" ".join([*words[i - 12:i], choice]) for choice in row["choices"]]
        rows.append(row | dict(context=contexts, choices=[" ".join(words[i + 1:i + 6])] * 4))
    return rows


def writing_rows(texts, n_rows=200, seed=0):
    """Texts to go on with: 40 words, and the 20 that follow."""
    rng, texts = random.Random(seed), [text.split() for text in texts]
    places = [(words, i) for words in texts for i in range(40, len(words) - 20, 20)]
    if not places:
        raise ValueError("the held-out text is too short to write on after 40 words: leave writing "
                         "out of --tasks")
    return [dict(context=" ".join(words[i - 40:i]), target=" ".join(words[i:i + 20]))
            for words, i in rng.sample(places, min(n_rows, len(places)))]


def fact_rows(texts, n_rows=200, seed=0):
    """Questions about what the training text says: two words that it has at least four times, and
    the word that always follows. Each such word is the answer once."""
    rng, followers = random.Random(seed), defaultdict(Counter)
    for text in texts:
        words = text.split()
        for *pair, word in zip(words, words[1:], words[2:]):
            followers[" ".join(pair)][word] += 1
    facts = {}  # the last of the pairs that a word always follows
    for pair, found in sorted(followers.items()):
        word = next(iter(found))
        if len(found) == 1 and found.total() >= 4 and word.isalpha() and len(word) > 2:
            facts[word] = pair
    if len(facts) < 8:
        raise ValueError("the training text repeats too few phrases for questions about its facts: "
                         "leave facts out of --tasks")
    return [choose(rng, facts[word], word, facts)
            for word in rng.sample(sorted(facts), min(n_rows, len(facts)))]


def by_rule(draw, n_words):
    """The source of a task whose rows are drawn by a rule, draw(rng, words), from common words."""
    def rows(texts, n_rows=200, seed=0):
        found = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,}\b", text))
        words, rng = sorted(sorted(found), key=found.get)[-300:], random.Random(seed)
        if len(words) < n_words:
            name = draw.__name__.removeprefix("draw_")
            raise ValueError(f"the held-out text has only {len(words)} words of three letters and "
                             f"more, {name} needs {n_words}: leave {name} out of --tasks")
        return [draw(rng, words) for _ in range(n_rows)]
    return rows


def draw_arithmetic(rng, words):
    """Sums, three of them solved: 3 + 4 = 7. Four numbers in a row to choose from, the right one
    anywhere among them, so that a taste for some numbers gets no more and no less than chance."""
    *shown, (a, b) = [(rng.randrange(1, 50), rng.randrange(1, 50)) for _ in range(4)]
    lines = "".join(f"{x} + {y} = {x + y}\n" for x, y in shown)
    place = rng.randrange(min(4, a + b))  # how many wrong ones are smaller
    wrong = [str(a + b + i) for i in range(-place, 4 - place)]
    return choose(rng, f"{lines}{a} + {b} =", str(a + b), wrong)


def draw_copying(rng, words):
    """Eight words, and once more up to one of them: which comes next?"""
    words, n = rng.sample(words, 8), rng.randrange(2, 7)
    return choose(rng, " ".join([*words, *words[:n]]), words[n], words)


def draw_brackets(rng, words):
    """Three open brackets: what closes them?"""
    closing = ["".join(three) for three in itertools.product(")]}", repeat=3)]
    right = rng.choice(closing)
    opening = "".join("([{"[")]}".index(char)] for char in reversed(right))
    parts = [char + word for char, word in zip(opening, rng.sample(words, 3))]
    return choose(rng, "".join(parts), right, closing) | dict(between="")


def draw_planted(rng, words):
    """Four facts planted before the question about one of them: apple = 417."""
    names, numbers = rng.sample(words, 4), [str(n) for n in rng.sample(range(100, 1000), 4)]
    lines = "".join(f"{name} = {number}\n" for name, number in zip(names, numbers))
    i = rng.randrange(4)
    return choose(rng, f"{lines}{names[i]} =", numbers[i], numbers)


# -----------------------------------------------------------------------------
# Running generated code. A box of the kind below stops accidents: endless loops, memory and disks
# filled, files removed, calls over the network. It does not stop code that means harm: the limits
# are the system's for one user, the rest is Python asked from within Python, files can be read, and
# on Windows only time is limited. For code you do not trust, use a virtual machine without network.

BOX = """
import sys
try:
    import ctypes, resource
    for name, most in ("CPU", {seconds}), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("NPROC", 0):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(0x50000000)  # a new user with a network of its own: an empty one
except (ImportError, ValueError, OSError, AttributeError):
    pass

def refuse(event, args):
    area, _, what = event.partition(".")
    writes = event == "open" and (args[2] or 0) & 0x643  # for writing or appending, or a new file
    if writes or what not in ("listdir", "scandir") and area in (
            "os", "socket", "subprocess", "shutil", "ctypes", "pty", "signal", "winreg", "_winapi"):
        raise PermissionError(event + " is not allowed here")

sys.addaudithook(refuse)
"""


def run_program(program, seconds=5):
    """Whether a Python program comes to its end without an error, in a process of its own: in an
    empty folder, without the environment, packages, network and new processes, with limits on time,
    memory (1 GB) and what it writes (1 MB a file)."""
    mark = secrets.token_hex(16)  # so that a program that stops early has not passed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(f"{BOX.format(seconds=seconds)}\n{program}\nprint({mark!r})\n", "utf-8")
        keep = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        with open(Path(folder, "shown.txt"), "w+b") as shown:  # a pipe would fill our memory
            try:
                done = subprocess.run([sys.executable, "-I", "-S", str(path)], cwd=folder, env=keep,
                                      stdin=subprocess.DEVNULL, stdout=shown,
                                      stderr=subprocess.DEVNULL, timeout=2 * seconds)
            except subprocess.TimeoutExpired:
                return False
            shown.seek(max(0, shown.seek(0, 2) - 100))
            return done.returncode == 0 and shown.read().split()[-1:] == [mark.encode()]


# -----------------------------------------------------------------------------
# Judges: (model, tokenizer, questions, options) -> for each question, or block of text, {metric:
# vector} with what else is worth keeping under "shown"; and what guessing gets, {metric: score}.


def judge_text(model, tokenizer, questions, options):
    """Perplexity and bits per byte, in blocks of text of like length. The end of a document is a
    token without bytes."""
    tokens = options.material.tokens_for(tokenizer)
    stride = model.config.block_size if options.stride == "rolling" else options.stride
    nats = surprisal(model, np.concatenate([[tokenizer.eot], tokens]), stride)
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


def judge_choice(question, scored):
    """All that can be said of a question whose choices have these log-likelihoods. acc takes the
    likeliest choice, acc_norm per character, acc_bytes per byte; greedy: whether the answer is what
    greedy sampling writes; true mass: the share of probability of all choices that are true."""
    sums, answer = np.array([score for score, _ in scored]), question["answer"]
    chars, n_bytes = ([len(choice) for choice in choices] for choices in (
        question["choices"], [choice.encode() for choice in question["choices"]]))
    shares = np.exp(sums - np.logaddexp.reduce(sums))
    with np.errstate(divide="ignore"):  # a choice without characters is never taken
        right = {name: float((sums / lengths).argmax() == answer) for name, lengths in (
            ("acc", 1), ("acc_norm", chars), ("acc_bytes", n_bytes))}
    values = right | {"greedy": float(scored[answer][1]), "perplexity": -sums[answer],
                      "true mass": shares @ question.get("labels", sums * 0)}
    vectors = {name: [float(value), 1.0] for name, value in values.items()}
    vectors["calibration error"] = calibration_counts(shares.max(), right["acc"]).tolist()
    return vectors | {"shown": dict(scores=sums.tolist(), answer=answer)}


def judge_choices(model, tokenizer, questions, options=None):
    """Which choice the model thinks likeliest."""
    pairs = [pair for question in questions for pair in pairs_of(question)]
    scored = iter(loglikelihood(model, tokenizer, pairs, "choices"))
    outcomes = [judge_choice(question, [next(scored) for _ in question["choices"]])
                for question in questions]
    chance = np.mean([1 / len(question["choices"]) for question in questions])
    true = np.mean([np.mean(question.get("labels", 0)) for question in questions])
    return outcomes, {"acc": chance, "acc_norm": chance, "acc_bytes": chance, "true mass": true}


def multiple_choice(model, tokenizer, rows):
    """The share of rows {"context", "choices", "answer"} whose answer is the likeliest choice:
    {"acc": by log-probability, "acc_norm": by log-probability per character}."""
    outcomes, _ = judge_choices(model, tokenizer, [ask_ready(row) for row in rows])
    return {metric: float(np.mean([outcome[metric][0] for outcome in outcomes]))
            for metric in ("acc", "acc_norm")}


def answers(model, tokenizer, questions, stop=(), most=256, **options):
    """Yield what the model writes after each question's context, greedily unless options say more.
    Half of the model's context or more is kept for the question, whose beginning may be lost."""
    most = min(most, model.config.block_size // 2)
    bar = iter(tqdm(questions, "answers", disable=None, leave=False))
    while batch := list(itertools.islice(bar, 16)):
        prompts = [tokenizer.encode(question["context"])[most - model.config.block_size:]
                   for question in batch]
        yield from complete_batch(model, tokenizer, prompts, max_new_tokens=most, stop=stop,
                                  **{"temperature": 0} | options)


def judge_writing(model, tokenizer, questions, options):
    """How like the text that really follows the model's own is."""
    outcomes = []
    for question, text in zip(questions, answers(model, tokenizer, questions, most=60)):
        text, target = " ".join(text.split()[:20]), question["target"]
        outcomes.append({"BLEU": bleu_counts(text, target).tolist(), "F1": [f1(text, target), 1],
                         "ROUGE-L": [rouge_l(text, target), 1], "shown": text})
    return outcomes, {}


NUMBERS = {"exact, strict": (r"#### (\-?[0-9\.\,]+)", 0),  # where an answer's number is looked for
           "exact, flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
NUMBER_IGNORE = [",", r"\$", r"(?s).*#### ", r"\.$"]


def find_number(text, pattern, place):
    """The first (0) or last (-1) number that a pattern finds in an answer."""
    found = [match[match.lastindex].strip() for match in re.finditer(pattern, text)]
    return found[place] if found else "[invalid]"


def judge_numbers(model, tokenizer, questions, options):
    """Whether the number that the answer ends with is right."""
    texts = answers(model, tokenizer, questions, ["Question:", "</s>", "<|im_end|>"])
    return [{metric: [exact_match(find_number(text, *where), question["target"], NUMBER_IGNORE), 1]
             for metric, where in NUMBERS.items()} | {"shown": text}
            for question, text in zip(questions, texts)], {}


def judge_code(model, tokenizer, questions, options):
    """Whether the function that the model writes passes its tests."""
    stop, n, counts = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], options.n_samples, []
    sampled = [list(answers(model, tokenizer, questions, stop, 1024, seed=options.seed + i,
                            temperature=0.8 if n > 1 else 0)) for i in range(n)]
    for question, *texts in zip(tqdm(questions, "running code", disable=None, leave=False),
                                *sampled):
        right = sum(run_program(f"{question['context']}{text}\n{question['check']}")
                    for text in texts)
        counts.append({f"pass@{k}": [pass_at_k(n, right, k), 1] for k in (1, 10) if k <= n}
                      | {"shown": texts})
    return counts, {}


# -----------------------------------------------------------------------------
# The tasks: where the rows are, how a row becomes a question, who judges, and by which metrics.

Task = namedtuple("Task", "source ask judge metrics")
ACC, ACC_NORM = ("acc", "calibration error"), ("acc", "acc_norm", "calibration error")
TASKS = {
    # small tasks: (rows made of texts, of the texts held out or of those trained on)
    "perplexity": Task(("val", lambda texts, n_rows, seed: [dict(context="", target=text)
                                                            for text in texts]),
                       dict, judge_text, ("perplexity", "bits per byte")),
    "continuation": Task(("val", continuation_rows), ask_ready, judge_choices, ACC_NORM),
    "cloze": Task(("val", cloze_rows), dict, judge_choices, ("acc",)),
    "facts": Task(("train", fact_rows), dict, judge_choices, ("acc",)),
    "planted": Task(("val", by_rule(draw_planted, 4)), dict, judge_choices, ("acc",)),
    "copying": Task(("val", by_rule(draw_copying, 8)), dict, judge_choices, ("acc",)),
    "brackets": Task(("val", by_rule(draw_brackets, 3)), dict, judge_choices, ("acc",)),
    "arithmetic": Task(("val", by_rule(draw_arithmetic, 0)), dict, judge_choices, ("acc",)),
    "writing": Task(("val", writing_rows), dict, judge_writing, ("BLEU", "ROUGE-L", "F1")),
    # on Hugging Face: (data set, configuration, split, split of the examples)
    "arc_easy": Task(("allenai/ai2_arc", "ARC-Easy", "test", "train"), ask_arc, judge_choices,
                     ACC_NORM),
    "arc_challenge": Task(("allenai/ai2_arc", "ARC-Challenge", "test", "train"), ask_arc,
                          judge_choices, ACC_NORM),
    "hellaswag": Task(("Rowan/hellaswag", "default", "validation", "train"), ask_hellaswag,
                      judge_choices, ACC_NORM),
    "mmlu": Task(("cais/mmlu", "all", "test", "dev"), ask_mmlu, judge_choices, ACC),
    "truthfulqa_mc1": Task(("truthfulqa/truthful_qa", "multiple_choice", "validation", None),
                           ask_truthfulqa, judge_choices, ACC),
    "truthfulqa_mc2": Task(("truthfulqa/truthful_qa", "multiple_choice", "validation", None),
                           ask_truthfulqa_mc2, judge_choices, ("true mass",)),
    "piqa": Task(("baber/piqa", "default", "validation", "train"), ask_piqa, judge_choices,
                 ACC_NORM),
    "winogrande": Task(("allenai/winogrande", "winogrande_xl", "validation", "train"),
                       ask_winogrande, judge_choices, ACC),
    "lambada": Task(("EleutherAI/lambada_openai", "default", "test", None), ask_lambada,
                    judge_choices, ("greedy", "perplexity")),
    "boolq": Task(("aps/super_glue", "boolq", "validation", "train"), ask_boolq, judge_choices,
                  ACC),
    "gsm8k": Task(("openai/gsm8k", "main", "test", "train"), ask_gsm8k, judge_numbers,
                  tuple(NUMBERS)),
    "humaneval": Task(("openai/openai_humaneval", "openai_humaneval", "test", None), ask_humaneval,
                      judge_code, ("pass@1", "pass@10")),
    "rows": Task(None, ask_ready, judge_choices, (*ACC_NORM, "acc_bytes")),
}
SMALL = [name for name, task in TASKS.items() if task.source and len(task.source) == 2]
DEFAULT = [name for name in SMALL if name != "writing"]
ROWS_URL = "https://datasets-server.huggingface.co/rows?"  # 100 rows of a data set as JSON


def ask(name, row):
    """The question of a row of a task, or None where it is no such row."""
    try:
        ready = "query" in row or "continuation" in row
        question = (ask_ready if ready else TASKS[name].ask)(row)
        several = len(question.get("choices", "two")) > 1 or name == "lambada"
        return question if several and is_question(question) else None
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        return None


def read_rows(path, name="rows"):
    """The rows of a .jsonl file; ValueError names the first line that is no row of the task."""
    rows, kind = [], f"a row of {name}"
    if name == "rows":
        kind = f"a row like {EXAMPLE_ROW}, with two or more choices and the answer's place"
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON in UTF-8: {error}") from None
            if ask(name, rows[-1]) is None:
                raise ValueError(f"{path}, line {number} is not {kind}: "
                                 f"{line.decode('utf-8-sig')[:60]}")
    if not rows:
        raise ValueError(f"{path} holds no rows; one a line is read, such as {EXAMPLE_ROW}")
    return rows


def download_rows(name, split, most=math.inf, folder=Path("shards", "downloads", "tasks")):
    """The rows of a split of a known task, a page of 100 a file. ValueError without a network."""
    (dataset, config, *_), rows, total = TASKS[name].source, [], 1
    while len(rows) < min(total, most):
        where = dict(dataset=dataset, config=config, split=split, offset=len(rows), length=100)
        path = folder / name / f"{split}-{len(rows):06d}.json"
        try:
            page = read_json(download(ROWS_URL + urlencode(where), path))
            found = [entry["row"] for entry in page["rows"]]
            total = page["num_rows_total"] if found else 0
            if None in [ask(name, row) for row in found]:
                raise ValueError(f"{path} holds other rows than those of {name}")
            rows += found
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).replace("; start again to go on, or take stdlib", "")
            raise ValueError(f"no rows of {name} ({reason}): --tasks={name} --rows=FILE.jsonl "
                             "reads them from a file") from None
    return rows


def solved(question):
    """A question with its answer, as it stands in an example."""
    if "target" in question:
        return f"{question['context']} {question['target']}"
    return "".join(pairs_of(question)[question["answer"]])


def with_examples(questions, examples, n_shots):
    """Questions that begin with n_shots solved examples, of their own topic where they have one."""
    shots, asked = defaultdict(list), []
    for example in examples:
        shots[example.get("topic")].append(solved(example) + "\n\n")
    for question in questions:
        before = question.get("head", "") + "".join(shots[question.get("topic")][:n_shots])
        context, several = question["context"], isinstance(question["context"], list)
        context = [before + text for text in context] if several else before + context
        asked.append(question | dict(context=context, own=solved(question)))
    return asked


def split_examples(questions, n_shots):
    """-> (the first n_shots questions of each topic, the others)"""
    place, parts = Counter(), ([], [])
    for question in questions:
        place[question.get("topic")] += 1
        parts[place[question.get("topic")] > n_shots].append(question)
    return parts


def read_questions(name, options):
    """The questions of a task, made, downloaded or read from --rows, at most --n_questions; solved
    examples stand before each: the first rows of the file or of the training split."""
    task, n, examples = TASKS[name], options.n_questions, []
    if name in SMALL:
        split, make = task.source
        rows = make(options.material.texts(split), n or 200, options.seed)
        return with_examples([ask(name, row) for row in rows], [], 0)
    rows = read_rows(options.rows, name) if options.rows else download_rows(name, task.source[2])
    questions = [ask(name, row) for row in rows]
    if options.rows:
        examples, questions = split_examples(questions, options.n_shots)
    elif options.n_shots:
        examples = [ask(name, row) for row in download_rows(name, task.source[3], most=300)]
    if not questions:
        raise ValueError(f"{options.rows} has {len(rows)} rows, and all are taken as examples: "
                         f"give more, or take less than --n_shots={options.n_shots}")
    if n and n < len(questions):
        places = random.Random(options.seed).sample(range(len(questions)), n)
        questions = [questions[i] for i in sorted(places)]
    return with_examples(questions, examples, options.n_shots)


# -----------------------------------------------------------------------------
# Runs: what they were trained on, what of a task was in it, and how they score.


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


class Material:
    """The text that small tasks are made of: what the first run held out, and what it read."""

    def __init__(self, folder, data, max_tokens):
        self.tokenizer = Tokenizer.load(Path(folder, "tokenizer.json"))
        self.path, self.tokens = held_out(folder, self.tokenizer, data, max_tokens)

    def texts(self, split="val"):
        """The documents held out, or some of those trained on."""
        tokens, tokenizer = self.tokens, self.tokenizer
        if split == "train":
            check_shards(self.path, ("train",))
            tokens = np.asarray(read_split(self.path, "train")[0][:FACT_TOKENS])
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
        return [tokenizer.decode(ids[ids != tokenizer.eot].tolist()) for ids in parts]

    def tokens_for(self, tokenizer):
        """The held-out text in the tokens of any tokenizer."""
        if tokenizer.hash() == self.tokenizer.hash():
            return self.tokens
        ids = [[*text, tokenizer.eot] for text in tokenizer.encode_batch(self.texts())]
        return np.array(sum(ids, [])[:-1])


def grams(ids):
    """A number for each OVERLAP tokens in a row, nearly always another for others."""
    ids, n = np.asarray(ids).astype(np.uint64), max(0, len(ids) - OVERLAP + 1)
    numbers = np.zeros(n, np.uint64)
    for i in range(OVERLAP):
        numbers = (numbers + ids[i:i + n] + 1) * np.uint64(0x9E3779B97F4A7C15)
        numbers ^= numbers >> np.uint64(32)
    return numbers


def overlaps(texts, shards):
    """For each of texts, lists of ids, the share of its runs of 13 tokens that the shards have, too
    (arXiv:2005.14165, appendix C); NaN for a shorter one."""
    texts = [grams(text) for text in texts]
    wanted = np.unique(np.concatenate([*texts, grams([])]))
    found, table = np.zeros(len(wanted), bool), np.zeros(1 << 22, bool)
    table[wanted % len(table)] = True  # most of what is looked up is not there: this is seen fast
    for shard in shards if len(wanted) else ():
        for start in tqdm(range(0, len(shard), 1 << 22), "overlap", disable=None, leave=False):
            numbers = grams(shard[start:start + (1 << 22) + OVERLAP - 1])
            found |= np.isin(wanted, numbers[table[numbers % len(table)]])
    return [np.isin(text, wanted[found]).mean() if len(text) else math.nan for text in texts]


def contamination(folder, tokenizer, questions):
    """{task: a dict of how much of it was in the run's training shards}, empty without shards."""
    path = Path(training_data(folder).get("path", ""))
    card = check_shards(path, ("train",)) if Path(path, "card.json").exists() else {}
    if card.get("tokenizer") != tokenizer.hash():
        return {}
    rows = [(name, question["own"]) for name, asked in questions.items() for question in asked]
    ids = tokenizer.encode_batch([text for _, text in rows])
    shares = np.array(overlaps(ids, read_split(path, "train")))
    names, report = np.array([name for name, _ in rows]), {}
    for name in questions:
        long = shares[(names == name) & ~np.isnan(shares)]
        report[name] = dict(long_enough=len(long), with_overlap=int((long > 0).sum()),
                            share=float(long.mean()) if len(long) else None)
    return report


def judge_task(name, questions, model, tokenizer, options, where):
    """The result of a task: for each metric the vectors of the questions, and what guessing gets.
    It is kept in scores/NAME.json; --reuse takes it from there if nothing has changed since."""
    folder, checkpoint, precision = where
    task, path = TASKS[name], Path(folder, "scores", f"{name}.json")
    parts = [read_manifest(checkpoint)["digest"], tokenizer.hash(), precision, questions,
             options.stride, options.n_samples, options.seed, file_hash(__file__)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    if options.reuse and path.exists() and (result := read_json(path)).get("key") == key:
        return result
    outcomes, chance = task.judge(model, tokenizer, questions, options)
    asked = hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest()
    vectors = {metric: np.array([outcome[metric] for outcome in outcomes]).tolist()
               for metric in task.metrics if metric in outcomes[0]}
    result = dict(task=name, key=key, questions=asked, n=len(questions), chance=chance,
                  vectors=vectors, shown=[outcome.get("shown") for outcome in outcomes])
    write_json(path, result)
    return result


def score(name, result, metric, overlap):
    """A row of the table."""
    vectors = np.array(result["vectors"][metric])
    value, low, high = interval(metric, vectors)
    n, unit = result["n"], "questions"
    if name == "perplexity":
        n, unit = int(vectors[:, -1].sum()), "bytes" if metric == "bits per byte" else "tokens"
    return dict(task=name, metric=metric, value=value, low=low, high=high,
                chance=result["chance"].get(metric), n=n, unit=unit, overlap=overlap)


def score_run(checkpoint, questions, options):
    """Score a checkpoint on {task: questions} -> its report, with the results of its tasks."""
    folder = checkpoint.parent
    device = pick_device(options.device)
    precision, dtype = pick_precision(options.precision, device)
    model, tokenizer = load_run(folder, checkpoint, device, dtype)
    if not model.config.causal or model.config.cross or model.config.n_classes:
        raise ValueError(f"{checkpoint} does not go on with a text (architecture="
                         f"{model.config.architecture}): there is nothing to score it with here")
    print(f"{checkpoint} ({model.n_parameters() / 1e6:.1f}M parameters, {device}, {precision}): "
          f"{', '.join(questions)}{options.on}", flush=True)
    overlap, where = contamination(folder, tokenizer, questions), (folder, checkpoint, precision)
    results = {name: judge_task(name, asked, model, tokenizer, options, where)
               for name, asked in questions.items()}
    scores = [score(name, result, metric, overlap.get(name)) for name, result in results.items()
              for metric in result["vectors"]]
    print(table(scores))
    settings = {name: value for name, value in vars(options).items()
                if name not in ("runs", "material", "on")}
    report = settings | dict(run=str(folder), checkpoint=checkpoint.name, device=device,
                             precision=precision, tasks=list(questions))
    write_json(folder / "scores.json", report | {"scores": scores})
    draw_scores({str(checkpoint): scores}, f"Scores of {checkpoint}", folder / "scores.png")
    print(f"scores: {folder / 'scores.json'}, picture: {folder / 'scores.png'}")
    if options.card:
        text = model_card(folder, model, report | {"scores": scores})
        with replacing(folder / "model_card.md") as file:
            file.write(text.encode())
        print(f"card: {folder / 'model_card.md'}")
    return report | dict(scores=scores, results=results)


# -----------------------------------------------------------------------------
# The report: tables, a file, a picture, a card.


def written(value, metric, sign=""):
    """A score as people read it: 25.0% for shares, four digits for the others."""
    if value is None:
        return "-"
    if metric not in NOT_SHARES:
        return f"{100 * value:{sign}.1f}%"
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}#.4g}"


def columns(lines):
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cells(scores):
    """The table of a run, as lines of cells. Overlap: questions that have a run of 13 tokens in
    common with the training text, of those that are so long."""
    yield "task", "metric", "score", "95% interval", "guessing", "measured on", "overlap"
    for row in scores:
        value, low, high, chance = (written(row[name], row["metric"])
                                    for name in ("value", "low", "high", "chance"))
        seen = row["overlap"] or dict(long_enough=0)
        yield (row["task"], row["metric"], value, f"{low} to {high}", chance,
               f"{row['n']:,} {row['unit']}",
               f"{seen['with_overlap']} of {seen['long_enough']}" if seen["long_enough"] else "-")


def table(scores):
    return columns(list(cells(scores)))


def compare(reports):
    """Each score of each run beside the same of the first: a list of dicts with the difference and
    its paired 95% interval, both None where the runs were not asked the same."""
    first, rows = reports[0], []
    for place, row in enumerate(first["scores"]):
        name, metric = row["task"], row["metric"]
        a = first["results"][name]
        for report in reports:
            b, other = report["results"][name], report["scores"][place]
            gap = report is not first and a["questions"] == b["questions"] and difference(
                metric, *(np.array(result["vectors"][metric]) for result in (a, b)))
            value, low, high = gap or (None, None, None)
            rows.append(dict(task=name, metric=metric, run=report["run"], value=other["value"],
                             difference=value, low=low, high=high, n=other["n"],
                             differs=bool(gap) and not low <= 0 <= high))
    return rows


def leaderboard(rows):
    """The comparison as lines of text."""
    lines = [("task", "metric", "run", "score", "minus the first", "95% interval", "")]
    for row in rows:
        value, gap, low, high = (written(row[name], row["metric"], sign) for name, sign in (
            ("value", ""), ("difference", "+"), ("low", "+"), ("high", "+")))
        paired = row["difference"] is not None
        lines.append((row["task"], row["metric"], row["run"], value, gap if paired else "",
                      f"{low} to {high}" if paired else "",
                      "" if not paired else "differs" if row["differs"] else "may be chance"))
    return columns(lines)


PANELS = {  # metric: (label, scale, lowest value, how values are written) of its panel
    "perplexity": ("perplexity (lower is better)", "log", 1, "{x:,.0f}"),
    "bits per byte": ("bits per byte (lower is better)", "linear", 0, "{x:.1f}"),
    "share": ("share of the best possible (higher is better)", "linear", 0, "{x:.0%}"),
}


def draw_panel(ax, kind, runs):
    """One line a score: the models with their intervals, and what guessing gets."""
    names = [f"{row['task']}, {row['metric']}" for row in runs[0][1]]
    places = np.arange(len(names))
    chance = [math.nan if row["chance"] is None else row["chance"] for row in runs[0][1]]
    ax.plot(chance, places, "D", color="#bbbbbb", markersize=6, label="guessing")
    for i, (name, rows) in enumerate(runs):
        value, low, high = (np.array([row[part] for row in rows])
                            for part in ("value", "low", "high"))
        spread = np.maximum(0, [value - low, high - value])  # rounding may make them negative
        at = places + 0.5 * (i + 0.5) / len(runs) - 0.25
        ax.errorbar(value, at, xerr=spread, fmt="o", capsize=4, label=f"{name}, 95% interval")
        for y, row in zip(at, rows):
            ax.annotate(written(row["value"], row["metric"]), (row["value"], y), (0, 4),
                        ha="center", textcoords="offset points", fontsize=8)
    label, scale, lowest, form = PANELS[kind]
    ax.set(xlabel=label, xscale=scale, yticks=places, yticklabels=names,
           xlim=(lowest, 1 if kind == "share" else None), ylim=(len(names) - 0.4, -0.8))
    ax.xaxis.set_major_formatter(form)
    ax.grid(axis="x", alpha=0.3)


def draw_scores(scores, title, path):
    """A picture of {run: scores}, a panel for each kind."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's own plots
    panels = {kind: [(name, [row for row in rows if row["metric"] != "calibration error" and kind
                             == (row["metric"] if row["metric"] in PANELS else "share")])
                     for name, rows in scores.items()] for kind in PANELS}
    panels = {kind: runs for kind, runs in panels.items() if runs[0][1]}
    heights = [len(runs[0][1]) * (0.7 + 0.3 * len(runs)) + 0.8 for runs in panels.values()]
    fig = Figure(figsize=(8, 1.2 + 0.65 * sum(heights)), dpi=120, layout="constrained")
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=heights)
    for ax, (kind, runs) in zip(axes[:, 0], panels.items()):
        draw_panel(ax, kind, runs)
    fig.suptitle(title)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    with replacing(path) as file:
        fig.savefig(file, format="png")


CARD = """# {run}

A {architecture} language model of {parameters:,} parameters, {checkpoint}.

## What it was trained on

{data}

## How it was trained

{training}

## How it scores

{scores}

Guessing is what a model gets that knows nothing; the interval holds 95 of 100 scores on other
questions of this kind. Overlap: of the questions that are long enough, how many have 13 tokens in a
row in common with the training text. Seed {seed}, {n_shots} solved examples, {precision}.

## What it cannot do

It continues text like that above; it does not know what is true. It has no knowledge of what its
training text lacks, has learned what prejudice and errors are in it, and may repeat parts of it
word for word. It sees {block_size} tokens at a time. It was not tested for use by people who have
to rely on its answers: do not let it decide about anyone.
"""


def model_card(folder, model, report):
    """What a run's files say about it, as Markdown. arXiv:1810.03993"""
    config, c, log = {}, model.config, Path(folder, "log.jsonl")
    if Path(folder, "config.json").exists():
        config = read_sealed(Path(folder, "config.json"))
    data, train = config.get("data") or {}, config.get("train") or {}
    lines = [f"- {source['name']}: {source.get('bytes', 0):,} bytes in {source.get('files', 0):,} "
             "files" for source in data.get("sources", ())]
    lines += [f"- {name}: {n:,}" for name, n in (data.get("counts") or {}).items()]
    steps = [json.loads(line) for line in log.read_bytes().splitlines()] if log.exists() else [{}]
    done = {name: steps[-1][name] for name in ("step", "loss", "val_loss", "elapsed")
            if name in steps[-1]}
    chosen = {name: train[name] for name in ("optimizer", "learning_rate", "batch_size", "seed")
              if name in train}
    shape = {name: getattr(c, name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd",
                                                 "block_size", "vocab_size")}
    figures = [f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}"
               for name, value in (shape | chosen | done).items()]
    head, *rows = (f"| {' | '.join(line)} |" for line in cells(report["scores"]))
    scores = [head, "|" + "---|" * (head.count("|") - 1), *rows]
    return CARD.format(**report | dict(
        architecture=c.architecture, parameters=model.n_parameters(), block_size=c.block_size,
        data="\n".join(lines) or "Its run folder does not say.", training="\n".join(figures),
        scores="\n".join(scores)))


# -----------------------------------------------------------------------------
# The command.


def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", help="run folders, compared with the first; without one the newest")
    add("--tasks", help=f"some of {','.join(TASKS)} (default: the small ones but writing)")
    add("--rows", help="questions from this .jsonl file, for the one task that --tasks names, "
        "or multiple choice of your own")
    add("--n_shots", type=int, default=0, help="solved examples before each question (default 0)")
    add("--n_questions", type=int, help="of each task (default 200 of a small one, else all)")
    add("--data", help="shards whose validation split is held out (default: those of the training)")
    add("--max_tokens", type=int, default=65_536,
        help="score at most this many held-out tokens (default %(default)s)")
    add("--stride", help="tokens the window moves by, or rolling: all of it, as "
        "lm-evaluation-harness does (default half of block_size)")
    add("--n_samples", type=int, default=1, help="programs for each of humaneval's questions; "
        "above 1 at temperature 0.8 (default 1)")
    add("--run_code", action="store_true", help="let humaneval run what the model writes; what "
        "protects the machine, and what does not, stands in evaluate.py above BOX")
    add("--reuse", action="store_true", help="take scores of before that nothing has changed")
    add("--card", action="store_true", help="write model_card.md into the run folder")
    add("--seed", type=int, default=0, help="of the questions (default %(default)s)")
    add("--checkpoint", default="best", help="best | last | a step (default %(default)s)")
    add("--device", default="auto", help="auto | cuda | mps | cpu (default %(default)s)")
    add("--precision", default="fp32",
        help="auto | fp32 | bf16 | fp16 (default %(default)s: scores that compare across machines)")
    return parser.parse_args()


def pick_tasks(options):
    """The names of the tasks to run; what is wrong with their options is said now."""
    names = options.tasks.split(",") if options.tasks else [] if options.rows else DEFAULT
    names = list(dict.fromkeys(names)) or ["rows"]
    for name in names:
        check_known(name, TASKS, "task")
    for name, least in ("max_tokens", 1), ("n_questions", 1), ("n_samples", 1), ("n_shots", 0):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be at least {least}")
    if options.stride not in (None, "rolling"):
        if not re.fullmatch("[0-9]{1,9}", options.stride):
            raise ValueError(f"stride={options.stride} must be a number of tokens, or rolling")
        options.stride = int(options.stride)
    if "rows" in names and not options.rows:
        raise ValueError("the task rows needs a file of questions: --rows=FILE.jsonl")
    others = [name for name in names if name not in SMALL]
    if options.rows and len(others) != 1:
        raise ValueError(f"--rows={options.rows} has the rows of one task, not of "
                         f"{', '.join(others) or 'small tasks'}: name it in --tasks")
    if "humaneval" in names and not options.run_code:
        raise ValueError("humaneval runs what the model writes, on this machine: --run_code lets "
                         "it; what protects the machine stands in evaluate.py above BOX")
    for name in names if options.n_shots else ():
        if name in SMALL or not options.rows and TASKS[name].source[3] is None:
            raise ValueError(f"{name} has no solved examples: leave out --n_shots, or the task")
    return names


def main():
    options = parse_options()
    names = pick_tasks(options)
    folders = [Path(run) for run in options.runs] or [newest_run()]
    checkpoints = [pick_checkpoint(folder, options.checkpoint) for folder in folders]
    options.on, questions = "", {}
    if set(names) & set(SMALL):
        options.material = Material(folders[0], options.data, options.max_tokens)
        options.data = str(options.material.path)
        options.on = f", on {len(options.material.tokens):,} held-out tokens of {options.data}"
    for name in names:
        try:
            questions[name] = read_questions(name, options)
        except ValueError as error:
            if options.tasks or name not in SMALL or name == "perplexity":
                raise
            print(f"{name} is left out: {error}")
    reports = [score_run(checkpoint, questions, options) for checkpoint in checkpoints]
    if len(reports) > 1:
        rows, place = compare(reports), folders[0].parent
        print(leaderboard(rows))
        write_json(place / "leaderboard.json", rows)
        draw_scores({report["run"]: report["scores"] for report in reports},
                    "Scores of " + ", ".join(map(str, folders)), place / "leaderboard.png")
        print(f"scores: {place / 'leaderboard.json'}, picture: {place / 'leaderboard.png'}")


if __name__ == "__main__":
    run_command(main)
