"""
Instruction chats that are made, not collected: each answer is known, so it can be checked exactly.

    python -m chapters.tasks --out=chats.jsonl --n=2000 --seed=0
    python -m chapters.tasks --out=test.jsonl --n=200 --held_out
    python -m chapters.tasks --out=talk.jsonl --tasks follow tool       # several turns, and a tool
    python -m chapters.tasks --run=runs/chats --n=200                   # how many it gets right

A row is {"messages": [...], "task": name}. Whether a question is held out depends on the words it
lists alone: no file made with --held_out shares a list with one made without, whatever their seeds.
The words are those of the stories in chapters/grammar.py, from which a base model can know them.
"""

import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from zlib import crc32

if __name__ == "__main__":  # `python chapters/tasks.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.grammar import FIELDS, PEOPLE, PLOTS, SIZES, addition, story
from chapters.stages import chosen
from model import check_options, option
from sample import complete_batch, load_run, pick_device
from tokenizer import parse_options, refuse_idle, replacing, run_command

KINDS = dict(animal=FIELDS["animal"], food=FIELDS["food"], person=[*PEOPLE])
WORDS = [word for words in KINDS.values() for word in words]

# -----------------------------------------------------------------------------
# Tasks: each makes what is said in turn, from the question to the last answer.

reply = "The answer is {}.".format  # after a space a word is the token that the question has
LISTS = {  # what is asked of three words, and the answer
    "first": ("Which word is first", lambda words: words[0]),
    "last": ("Which word is last", lambda words: words[-1]),
    "backwards": ("What is this backwards", lambda words: ", ".join(words[::-1])),
}


def ask_of_list(question, answer, random, largest):
    words = random.sample(WORDS, 3)
    return f"{question}: {', '.join(words)}", reply(answer(words))


def kind(random, largest):
    """Of one word of each kind: which is the animal, the food, the person?"""
    words, name = {kind: random.choice(own) for kind, own in KINDS.items()}, random.choice([*KINDS])
    listed = ", ".join(random.sample([*words.values()], len(words)))
    return f"Which word is the {name}: {listed}", reply(words[name])


def count(random, largest):
    words, name = random.sample(WORDS, random.randint(3, 5)), random.choice([*KINDS])
    return (f"How many are a kind of {name}: {', '.join(words)}",
            reply(len({*words}.intersection(KINDS[name]))))


def read(random, largest):
    """Of a sentence of a story: which animal, food or person is in it?"""
    i, found = random.randrange(len(PLOTS)), []
    for sentence in re.split(r"(?<=\.) ", story(PLOTS[i], random.randrange(SIZES[i]))):
        found += [(sentence, name, *{*re.findall(r"\w+", sentence)}.intersection(own))
                  for name, own in KINDS.items()]
    sentence, name, word = random.choice([one for one in found if len(one) == 3])
    return f"{sentence} Which {name} is it?", reply(word)


def capital(random, largest):
    """The capitals of two made-up countries are told; what is one of them?"""
    letters = "BDKLMPRST", "aeiou", "dklmnrst", "aeiou"
    a, b, c, d = ("".join(map(random.choice, letters)) for _ in range(4))
    told = f"The capital of {a}land is {b}. The capital of {c}land is {d}."
    country, city = random.choice([(a, b), (c, d)])
    return f"{told} What is the capital of {country}land?", reply(city)


def add(random, largest):
    question, _, answer = addition(random, largest)
    return question, reply(answer)


def follow(random, largest):
    """Two turns: the second question has no answer without the first."""
    words, (i, j) = random.sample(WORDS, 3), random.sample(range(3), 2)
    names = "first", "second", "third"
    return (f"Which word is {names[i]}: {', '.join(words)}", reply(words[i]),
            f"And which is {names[j]}?", reply(words[j]))


def tool(random, largest):
    """A sum is handed to a tool, whose result is the answer."""
    question, _, answer = addition(random, largest)
    return question, f"calculate {question[8:-1]}", str(answer), reply(answer)


SINGLE = dict(kind=kind) | {name: partial(ask_of_list, *row) for name, row in LISTS.items()} | dict(
    count=count, read=read, capital=capital, add=add)
TASKS = SINGLE | dict(follow=follow, tool=tool)
ROLES = dict.fromkeys(SINGLE, ["user", "assistant"]) | dict(
    follow=["user", "assistant"] * 2, tool=["user", "assistant", "tool", "assistant"])


# -----------------------------------------------------------------------------
# Rows, and how many of them a model answers as they do.


def is_held_out(question):
    """Whether a question is for testing alone, as one in five is, by what comes after its colon, or
    where it has none by the whole: in every run the same."""
    return crc32(question.split(": ")[-1].encode()) % 5 == 0


def lessons(n, seed=0):
    """Yield n plain texts that tell which word of a list, none held out, is of which kind: without
    questions and replies, so that a base model learns what it is asked later, but not to answer."""
    random, said = Random(seed), 0
    while said < n:
        words = {name: random.choice(own) for name, own in KINDS.items()}
        listed = ", ".join(random.sample([*words.values()], len(words)))
        if not is_held_out(listed):
            said += 1
            facts = [f"The {name} is {word}." for name, word in words.items()]
            yield " ".join([f"There are {listed}.", *random.sample(facts, len(facts))])


def make(n, seed=0, tasks=SINGLE, held_out=False, largest=99):
    """Yield n rows {"messages", "task"}, each task as often as another, no question twice; all of
    them held out, or none. ValueError if the tasks have not so many."""
    random, seen = Random(seed), set()
    for i in range(n):
        name = [*tasks][i % len(tasks)]
        for _ in range(1000):
            question, *_ = texts = TASKS[name](random, largest)
            if question not in seen and is_held_out(question) == held_out:
                break
        else:
            raise ValueError(f"{name} has no more than {i // len(tasks):,} questions: take a "
                             f"smaller --n, a --largest above {largest} or other --tasks")
        seen.add(question)
        yield dict(messages=[dict(role=role, content=text)
                             for role, text in zip(ROLES[name], texts)], task=name)


def exact(model, tokenizer, rows):
    """How often a model's likeliest reply is the last message of a row, word by word -> (the share
    of all rows, {task: its share}). It reads what came before as it is in the row."""
    prompts = [tokenizer.render_prompt(row["messages"][:-1]) for row in rows]
    answers = [row["messages"][-1]["content"] for row in rows]
    longest = max(len(tokenizer.encode(answer)) for answer in answers) + 1  # and <|end|>
    texts = complete_batch(model, tokenizer, prompts, temperature=0, max_new_tokens=longest)
    right = {}
    for row, text, answer in zip(rows, texts, answers):
        right.setdefault(row["task"], []).append(text.strip() == answer)
    return (sum(map(sum, right.values())) / len(rows),
            {task: sum(own) / len(own) for task, own in right.items()})


@dataclass(frozen=True)
class TasksConfig:
    """What is made, or which run is asked."""
    out: str = option("", "file to write, .jsonl")
    run: str = option("", "run folder whose model is asked what is held out")
    n: int = option(1000, "rows", low=1)
    seed: int = option(0, "same seed, same rows")
    tasks: str | list = option([*SINGLE], f"of {' '.join(TASKS)}", many=True)
    largest: int = option(99, "number in sums", low=9, below=10**9)
    held_out: bool = option(False, "rows to test with, not to train on")

    def __post_init__(self):
        check_options(self)
        if not chosen(self.tasks, TASKS, "tasks"):
            raise ValueError(f"--tasks=none makes nothing: choose of {' '.join(TASKS)}")
        if bool(self.out) == bool(self.run):
            raise ValueError("give either --out, a file to write, or --run, a run folder to ask")


def main():
    config = TasksConfig(**(options := parse_options(__doc__, TasksConfig)[0]))
    refuse_idle(options, ["held_out"] * bool(config.run), "beside --run, which is held out anyway")
    names, held_out = chosen(config.tasks, TASKS, "tasks"), config.held_out or bool(config.run)
    rows = make(config.n, config.seed, names, held_out, config.largest)
    if config.run:
        share, by_task = exact(*load_run(config.run, device=pick_device()), [*rows])
        for name, own in (by_task | dict(all=share)).items():
            print(f"{name:10} {own:6.1%} right")
        return
    with replacing(Path(config.out)) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    print(f"{config.out}: {config.n:,} rows\nnext: python -m chapters.chats {config.out}")


if __name__ == "__main__":
    run_command(main)
