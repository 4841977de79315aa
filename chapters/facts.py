"""
Facts of a made-up world, to measure retrieval with: each seed makes others, so no model knows them.

    rows = facts(PEOPLE, seed=0)              # a passage, a question and the answer for each fact
    tokenizer = world_tokenizer()
    encoder = train_encoder(tokenizer, draw_pairs)    # 3 seconds each
    reader = train_reader(tokenizer)
    find(tokenizer, encoder)                  # how often each kind of index finds the passage
    tell(tokenizer, encoder, reader)          # how often the reader then gives the right answer
"""

from collections import namedtuple
from functools import partial
from random import Random
from zlib import crc32

import numpy as np
import torch

from chapters.answers import pad
from chapters.grammar import FIELDS, PEOPLE
from chapters.retrieval import BM25, Embeddings, Index, answers
from chapters.trials import fit
from model import GPT, GPTConfig
from tokenizer import Tokenizer

COLORS = ["red", "blue", "green", "white", "yellow", "black", "purple", "orange"]
RELATIONS = [  # what is told; what is asked, of half of them in other words; what it may be
    ("{} keeps a {} at home.", "Which pet does {} keep?", FIELDS["animal"]),
    ("For lunch {} always has {}.", "What does {} always have for lunch?", FIELDS["food"]),
    ("{} lives next to {}.", "What is next to the house of {}?", FIELDS["place"]),
    ("{} carries a {} everywhere.", "Which thing would {} never lose?", FIELDS["thing"]),
    ("{} collects {}.", "What fills the drawers of {}?", FIELDS["items"]),
    ("{} paints all walls {}.", "Which colour pleases {} most?", COLORS)]
Fact = namedtuple("Fact", "person relation passage question answer")

# -----------------------------------------------------------------------------
# Worlds.


def facts(people, seed=0):
    """One Fact for each person and each of RELATIONS."""
    random, rows = Random(seed), []
    for person in people:
        for relation, (told, asked, values) in enumerate(RELATIONS):
            value = random.choice(values)
            rows.append(Fact(person, relation, told.format(person, value), asked.format(person),
                             value))
    return rows


def is_held_out(fact):
    """Whether a person and a relation never occur together where an encoder learns, as one pair in
    five does not."""
    return crc32(fact.question.encode()) % 5 == 0


def strangers(n, seed=0):
    """n names that no tokenizer and no encoder has seen."""
    random, letters = Random(seed), ("BDKLMPRST", "aeiou", "dklmnrst", "aeiou")
    names = {"".join(map(random.choice, letters)): None for _ in range(2 * n)}
    return [*names][:n]


def world_tokenizer():
    """A tokenizer with a token for nearly each word of a world, but not for a stranger's name."""
    return Tokenizer.train([f"{fact.passage} {fact.question}" for seed in range(4)
                            for fact in facts(PEOPLE, seed)], 1024)


def pick_world(generator):
    """(Random, the facts of a world), by a torch.Generator."""
    random = Random(int(torch.randint(2**31, (), generator=generator)))
    return random, facts(PEOPLE, random.random())


# -----------------------------------------------------------------------------
# What is found.


def draw_pairs(generator, B=64):
    """Questions and passages of a new world for train_encoder(), none of them held out."""
    random, rows = pick_world(generator)
    rows = random.sample([fact for fact in rows if not is_held_out(fact)], B)
    return [fact.question for fact in rows], [fact.passage for fact in rows]


def kinds_of_index(tokenizer, encoder):
    """{name: what an Index is to score by}"""
    by_meaning = partial(Embeddings, encoder=encoder, tokenizer=tokenizer)
    return {"words": [BM25], "embeddings": [by_meaning], "both": [BM25, by_meaning]}


def ranks(index, questions, numbers):
    """At which place an index finds the passage of each question, given by its number: (N,), 1 for
    the best. The share of places up to k is recall at k."""
    found = [[one.number for one in index.search(question, None)] for question in questions]
    return np.array([row.index(number) + 1 for row, number in zip(found, numbers)])


def find(tokenizer, encoder, seed=0, n_strangers=24):
    """{kind of index: {whose facts: at which places (N,) their passages are found}}, of a world
    with people whose names the encoder knows, though not with what is asked, and strangers."""
    rows = facts(PEOPLE, seed) + facts(strangers(n_strangers, seed), seed)
    groups = {"known names": [i for i, fact in enumerate(rows) if fact.person in PEOPLE
                              and is_held_out(fact)],
              "strangers": [i for i, fact in enumerate(rows) if fact.person not in PEOPLE]}
    found = {}
    for name, kinds in kinds_of_index(tokenizer, encoder).items():
        index = Index([fact.passage for fact in rows], *kinds)
        found[name] = {group: ranks(index, [rows[i].question for i in own], own)
                       for group, own in groups.items()}
    return found


# -----------------------------------------------------------------------------
# What is answered.


def chat(fact, passages):
    """A chat in which a Fact is asked for, below passages."""
    return [dict(role="user", content="\n".join([*passages, fact.question])),
            dict(role="assistant", content=fact.answer)]


def chats(rows, random, n):
    """Yield n chats: up to three passages of a world, of which one has the answer and the others
    are about the same person or say the same of another, or no passage at all."""
    for fact in random.choices(rows, k=n):
        near = [one.passage for one in rows if one is not fact
                and (one.person == fact.person or one.relation == fact.relation)]
        shown = random.randrange(4)
        passages = [fact.passage, *random.sample(near, shown - 1)] if shown else []
        yield chat(fact, random.sample(passages, shown))


def train_reader(tokenizer, n_steps=250, seed=0, B=16):
    """A small model that answers from passages in its prompt, each batch from a new world."""
    def draw(generator):
        random, rows = pick_world(generator)
        ids, mask = pad([*map(tokenizer.render_chat, chats(rows, random, B))])
        return ids[:, :-1].clamp(min=0), torch.where(mask, ids, -1)[:, 1:]

    torch.manual_seed(seed)
    return fit(GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=128, n_layer=2, n_head=4,
                             n_embd=64)), draw, n_steps, seed)


def tell(tokenizer, encoder, reader, seed=0, n_questions=100, k=1):
    """{source: which answers to questions about a new world are right, bool (N,)}: without a
    passage, from the k best of each kind of index, and from the right passage."""
    rows = facts(PEOPLE, seed)
    asked = Random(seed).sample(rows, n_questions)
    questions, right = [fact.question for fact in asked], [fact.answer for fact in asked]
    passages = {"no passage": [[]] * n_questions}
    for name, kinds in kinds_of_index(tokenizer, encoder).items():
        index = Index([fact.passage for fact in rows], *kinds)
        passages[name] = [[found.text for found in index.search(question, k)]
                          for question in questions]
    passages["the right passage"] = [[fact.passage] for fact in asked]
    return {name: np.array(answers(reader, tokenizer, questions, own, "chat", 8)) == right
            for name, own in passages.items()}
