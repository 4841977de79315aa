"""
Answers from documents: the passages that suit a question are found, and a model reads them.

    python -m chapters.retrieval notes/*.txt --question="When was the bridge built?"
    python -m chapters.retrieval notes/*.txt --question="..." --by=both       # and by meaning
    python -m chapters.retrieval notes/*.txt --question="..." --run=runs/chat # and its answer

This is retrieval-augmented generation (arXiv:2005.11401): what a model was never trained on it can
still tell, if it stands in its prompt. Passages are found by the words that they share with the
question (BM25), by embeddings of an encoder that is trained on the passages alone, or by both.
"""

import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python chapters/retrieval.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import regex
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from chapters.near import words
from chapters.talk import TEMPLATE_HELP, TEMPLATES, pick_template, render
from chapters.trials import fit
from data import clean, read_documents
from model import GPT, GPTConfig, check_options, option
from sample import complete_batch, load_run, pick_device, to_ids
from tokenizer import Tokenizer, parse_options, refuse_idle, run_command

PIECE = regex.compile(r"\S.*?(?:[.!?](?=\s)|$)\s*", regex.M)  # a sentence, or the end of a line
Found = namedtuple("Found", "score number text")

# -----------------------------------------------------------------------------
# The index: passages, and what scores them.


def cut(text, n_words=60):
    """Passages of a text: sentences or lines in a row of up to n_words words, or a longer one."""
    passages, room = [], 0
    for piece in PIECE.findall(text):
        n = len(words(piece))
        if n > room:
            passages.append("")
            room = n_words
        passages[-1] += piece
        room -= n
    return [passage.strip() for passage in passages]


class BM25:
    """Scores passages by the words that they share with a query: a rare word counts more, the
    second occurrence less than the first, and each less in a long passage. Robertson and Zaragoza
    (2009), with the never negative weight of a word that Lucene has."""

    def __init__(self, passages, k1=1.5, b=0.75):
        counts = [Counter(words(passage)) for passage in passages]
        lengths = np.array([own.total() for own in counts])
        self.n, self.found = len(counts), defaultdict(list)
        for i, (own, length) in enumerate(zip(counts, lengths / lengths.mean())):
            for word, n in own.items():
                self.found[word].append((i, n / (n + k1 * (1 - b + b * length))))

    def scores(self, query):
        """-> (N,), a score for each passage; 0 where no word is shared."""
        scores = np.zeros(self.n)
        for word in words(query):
            if rows := self.found.get(word):
                numbers, weights = zip(*rows)
                rarity = np.log1p((self.n - len(rows) + 0.5) / (len(rows) + 0.5))
                scores[list(numbers)] += rarity * np.array(weights)
        return scores


def embed(encoder, tokenizer, texts):
    """What an encoder makes of N texts, its mean over their tokens, of length 1 -> (N, C). Of a
    text that is longer than its context it reads the beginning."""
    ids = [torch.tensor(to_ids(tokenizer, text)[:encoder.config.block_size]) for text in texts]
    real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)      # (N, T)
    x = encoder.transformer(pad_sequence(ids, batch_first=True), segments=real)       # (N, T, C)
    return F.normalize((x * real[..., None]).sum(dim=1), dim=-1)


class Embeddings:
    """Scores passages by the cosine of the angle between their embeddings and a query's."""

    def __init__(self, passages, encoder, tokenizer):
        self.embed = torch.no_grad()(partial(embed, encoder, tokenizer))
        self.table = torch.cat([self.embed(passages[i:i + 64])
                                for i in range(0, len(passages), 64)])                # (N, C)

    def scores(self, query):
        """-> (N,), a score for each passage, from -1 to 1."""
        return (self.table @ self.embed([query])[0]).numpy()


def reciprocal_ranks(scores):
    """1 / (60 + rank) of scores (N,), the highest of rank 1: what the scores of different methods
    can be added by. Cormack, Clarke and Buettcher (2009)"""
    order = np.argsort(-scores, kind="stable")
    return 1 / (61 + np.argsort(order))  # the place of each in the order, from 0


class Index:
    """Passages to search by what each of `kinds` builds of them, else by BM25; the scores of
    several are joined by their ranks."""

    def __init__(self, passages, *kinds):
        if not passages:
            raise ValueError("there is no passage to search: give files with text in them")
        self.passages = passages
        self.scorers = [build(passages) for build in kinds or (BM25,)]

    def search(self, query, k=3):
        """The k best passages, or all, best first: [Found(score, number, text)]."""
        scores = [scorer.scores(query) for scorer in self.scorers]
        total = scores[0] if len(scores) == 1 else sum(map(reciprocal_ranks, scores))
        return [Found(float(total[i]), int(i), self.passages[i])
                for i in np.argsort(-total, kind="stable")[:k]]


# -----------------------------------------------------------------------------
# An encoder that learns which passage answers a question.


def contrastive_loss(questions, passages, temperature=0.05):
    """InfoNCE (arXiv:1807.03748) of embeddings (B, C) of questions and of their passages: each
    question is to choose its own among the passages of all (arXiv:2004.04906)."""
    logits = questions @ passages.T / temperature                        # (B, B)
    return F.cross_entropy(logits, torch.arange(len(logits)))


def train_encoder(tokenizer, draw, n_steps=200, seed=0):
    """A BERT-like encoder for embed(), trained on the batches that draw(generator) gives: two lists
    of B texts, of which only those at the same place belong together."""
    def loss_of(encoder, *sides):
        return contrastive_loss(*(embed(encoder, tokenizer, side) for side in sides))

    torch.manual_seed(seed)
    shape = dict(architecture="bert", vocab_size=tokenizer.n_vocab, block_size=128)
    encoder = GPT(GPTConfig(**shape, n_layer=1, n_head=2, n_embd=64))
    return fit(encoder, draw, n_steps, seed, loss_of)


def crops(passages, B=64):
    """A draw for train_encoder() where there are no questions: two random halves of each of B
    passages, which may overlap, are to find each other. arXiv:2112.09118"""
    def draw(generator):
        sides = [], []
        for i in torch.randperm(len(passages), generator=generator)[:B].tolist():
            words = passages[i].split()
            n = (len(words) + 1) // 2
            starts = torch.randint(len(words) - n + 1, (2,), generator=generator).tolist()
            for side, start in zip(sides, starts):
                side.append(" ".join(words[start:start + n]))
        return sides
    return draw


# -----------------------------------------------------------------------------
# A model answers from what was found.


def prompt(model, tokenizer, question, passages, template, max_new_tokens):
    """What a model goes on with: passages, the best last, and the question. Of the passages, which
    are given best first, the last are left out that its context has no room for."""
    room = model.config.block_size - min(max_new_tokens, model.config.block_size // 4)
    for n in range(len(passages), -1, -1):
        content = "\n".join([*passages[:n][::-1], question])
        rendered = render(tokenizer, [dict(role="user", content=content)], template)
        if len(to_ids(tokenizer, rendered)) <= room:
            break
    return rendered


def answers(model, tokenizer, questions, passages, template=None, max_new_tokens=64):
    """A model's likeliest answer to each question below its own list of passages, best first.
    template: one of talk.py's; by default a chat's, if the model knows chats."""
    template = template or pick_template(model, tokenizer)
    prompts = [prompt(model, tokenizer, question, own, template, max_new_tokens)
               for question, own in zip(questions, passages)]
    stop = ["\nQuestion:"] * (template == "question")  # a base model would ask the next one itself
    texts = complete_batch(model, tokenizer, prompts, temperature=0, stop=stop,
                           max_new_tokens=max_new_tokens)
    return [text.strip() for text in texts]


def answer(model, tokenizer, index, question, k=3, **options):
    """A model's answer to a question from the k passages that an Index finds; options as for
    answers()."""
    passages = [found.text for found in index.search(question, k)]
    return answers(model, tokenizer, [question], [passages], **options)[0]


# -----------------------------------------------------------------------------
# The command.


def by_meaning(passages):
    """Embeddings of passages by an encoder that is trained on them alone."""
    tokenizer = Tokenizer.train(passages, 2048)
    return Embeddings(passages, train_encoder(tokenizer, crops(passages)), tokenizer)


KINDS = {"words": [BM25], "embeddings": [by_meaning], "both": [BM25, by_meaning]}


@dataclass(frozen=True)
class RetrievalConfig:
    """What is asked, and where the answer may stand."""
    files: list = option([], "files that data.py reads", positional=True)
    question: str = option("", "what you want to know")
    by: str = option("words", "what passages are scored by", known=lambda: KINDS)
    k: int = option(3, "passages that are shown, and that a run reads", low=1)
    n_words: int = option(60, "words of a passage, at most, unless a sentence is longer", low=1)
    run: str = option("", "a run folder, which answers from them")
    template: str = option("auto", TEMPLATE_HELP, known=lambda: ("auto", *TEMPLATES))
    max_new_tokens: int = option(64, "longest answer, in tokens", low=1)

    def __post_init__(self):
        check_options(self)
        if not self.files or not self.question.strip():
            raise ValueError("give files, and what you want to know as --question=TEXT")


def main():
    typed, = parse_options(__doc__, RetrievalConfig)
    config = RetrievalConfig(**typed)
    refuse_idle(typed, ["template", "max_new_tokens"] * (not config.run), "without --run=RUN")
    run = config.run and load_run(config.run, device=pick_device())
    passages = [passage for path in config.files for text in read_documents(path)
                for passage in cut(clean(text), config.n_words)]
    index = Index(passages, *KINDS[config.by])
    for score, number, text in index.search(config.question, config.k):
        print(f"{score:.4g}  passage {number + 1:,} of {len(passages):,}\n{text}\n")
    if run:
        template = None if config.template == "auto" else config.template
        print("answer:", answer(*run, index, config.question, config.k, template=template,
                                max_new_tokens=config.max_new_tokens))


if __name__ == "__main__":
    run_command(main)
