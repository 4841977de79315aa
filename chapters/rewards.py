"""
Tasks whose answers a program can check, a judge by rules, and the rows that alignment learns from.

    python -m chapters.rewards sums --n=600 --out=chats.jsonl         # chats to fine-tune on
    python -m chapters.rewards brackets --n=100 --held_out --out=test.jsonl

A rule takes a Question and an answer and gives the true reward, from 0 to 1: it needs no model.
"""

import json
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from zlib import crc32

if __name__ == "__main__":  # `python chapters/rewards.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.answers import Pair, Question, by_model, load, render
from data import chat_kind, read_rows, take_chat
from model import TINY, check_known, check_options, option
from sample import ROWS, warn
from tokenizer import parse_options, replacing, run_command

HELD_OUT = 5  # one question in five is for testing alone
LARGEST = 2000  # questions that a task makes for a run
TRIES = 100  # for a question that is new, before there seem to be no more

# -----------------------------------------------------------------------------
# Rules: the true reward of an answer, which is right or wrong.

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def asked(question):
    """What the user said last."""
    return question.messages[-1]["content"]


def is_exact(question, answer):
    """Whether the answer is the one that the row gives, spaces at both ends aside."""
    if question.right is None:
        raise ValueError("--reward=exact needs right answers, which these prompts lack: give rows "
                         "with messages, or with instruction and output")
    return answer.strip() == question.right.strip()


def is_sum(question, answer):
    """Whether the answer to "47+8" is "55", whatever comes after it: "55?" is right, too."""
    numbers = re.fullmatch(r"(\d{1,9})\+(\d{1,9})=?", asked(question))
    if not numbers:
        raise ValueError(f"--reward=sums needs prompts such as 47+8, not {asked(question)!r:.60}")
    return re.match(r"\d*", answer)[0] == str(int(numbers[1]) + int(numbers[2]))


def is_closed(question, answer):
    """Whether the answer closes all brackets of the question, and nothing else: "([" by "])"."""
    open_ones = []
    for char in asked(question) + answer.strip():
        if char in CLOSING:
            open_ones.append(CLOSING[char])
        elif not open_ones or open_ones.pop() != char:
            return False
    return not open_ones


RULES = {"exact": is_exact, "sums": is_sum, "brackets": is_closed}


def by_rule(name):
    """A rule as a reward: (questions, answers) -> a list with 1.0 for each right one, else 0.0."""
    check_known(name, RULES, "rule")
    return lambda questions, answers: [float(RULES[name](*pair))
                                       for pair in zip(questions, answers)]


def pick_reward(name, tokenizer, device):
    """The reward of a rule's name or a run folder; ValueError for one that does not fit."""
    if Path(name).is_dir():
        return by_model(load(name, device, tokenizer, judges=True)[0], tokenizer)
    check_known(name, RULES, "reward, which is no run folder either:")
    return by_rule(name)


def prefer(reward, question, answers):
    """The judge: 0 or 1, which of two answers is better, or None: what has the higher reward, of
    two right ones the shorter, of two wrong ones none."""
    a, b = zip(reward([question] * 2, answers), (-len(answer) for answer in answers))
    return None if a == b or a[0] == b[0] == 0 else int(b > a)


# -----------------------------------------------------------------------------
# Tasks: questions that are made, each with its right answer in two styles, short and long.


def sums(random):
    """A number below 100 plus one below 10: ("47+8", "55", "55?")."""
    a, b = random.randrange(100), random.randrange(10)
    return f"{a}+{b}", f"{a + b}", f"{a + b}?"


def brackets(random):
    """Brackets to close: ("([<", ">])", ">])"); there is but one right answer."""
    said, right = "", ""
    for _ in range(random.randint(2, 8)):
        if right and random.random() < 0.3:
            said, right = said + right[0], right[1:]
        else:
            said += (char := random.choice([*CLOSING]))
            right = CLOSING[char] + right
    return (said, right, right) if right else brackets(random)


TASKS = {"sums": sums, "brackets": brackets}


def is_held_out(text):
    """Whether a question is for testing alone: that depends on its text and on nothing else."""
    return crc32(text.encode()) % HELD_OUT == 0


def chats(task, seed=0, held_out=False, long_ratio=0.5):
    """Yield different chats of a task, {"messages": [...]}, as long as there are new ones; each
    answer is a long one with a chance of long_ratio."""
    random, seen, tries = Random(seed), set(), 0
    while tries < TRIES:
        text, *answers = TASKS[task](random)
        tries += 1
        if text not in seen and is_held_out(text) == held_out:
            seen.add(text)
            tries = 0
            answer = answers[random.random() < long_ratio]
            yield dict(messages=[dict(role="user", content=text),
                                 dict(role="assistant", content=answer)])


# -----------------------------------------------------------------------------
# Rows of files: questions, and pairs of a better and a worse answer.


def take_prompt(row):
    """What was said up to the answer: the prompt of a row, a text or messages, or its instruction
    and input."""
    prompt = row.get("prompt", row.get("instruction"))
    return prompt if isinstance(prompt, list) else take_chat(
        dict(instruction=prompt, input=row.get("input"), output=""))[:-1]


def take_question(row):
    """A row with prompt, and perhaps the right answer, or one of a chat -> a Question."""
    if chat_kind(row):
        *messages, last = take_chat(row)
        return Question(messages, last["content"])
    if not isinstance(row, dict) or not isinstance(row.get("answer"), str | None):
        raise ValueError(f"it is no chat, nor a prompt, and perhaps an answer, a text: {row!r:.60}")
    return Question(take_prompt(row), row.get("answer"))


def take_pair(row):
    """A row with prompt (or instruction and input), chosen and rejected -> a Pair; ValueError for
    answers that are equal, as nothing can be learned from them."""
    answers = [row.get(name) for name in ("chosen", "rejected")] if isinstance(row, dict) else [0]
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError("nobody won this vote" if isinstance(row, dict) and "winner" in row else
                         f"it has no chosen and rejected, two texts: {row!r:.60}")
    if answers[0] == answers[1]:
        raise ValueError(f"chosen and rejected are equal, {answers[0]!r:.40}: nothing is to learn")
    return Pair(take_prompt(row), *answers)


def read(config, take, tokenizer, block_size):
    """-> (rows to learn from, rows to measure with): Pairs or Questions, which take(row) makes, of
    --data, a file or the name of a task. Broken rows and those too long for the model are left out,
    which is said; ValueError if none remain."""
    wrong, is_task = [], take is take_question and config.data in TASKS

    def fitting(row):
        taken = take(row)
        texts, room = (taken[1:], 0) if take is take_pair else ([""], config.max_new_tokens)
        n = room + max(len(render(tokenizer, taken.messages, text)[0]) for text in texts)
        if n > block_size:
            answer = f", {room} of them for an answer (--max_new_tokens)" if room else ""
            raise ValueError(f"it takes {n} tokens{answer}: block_size={block_size} is less")
        return taken

    rows = [*(map(fitting, islice(chats(config.data, config.seed), LARGEST)) if is_task else
              read_rows(config.data, fitting, skip=wrong.append))]
    if not rows:
        raise ValueError((wrong or [f"{config.data} has no rows"])[0])
    if wrong:
        warn(f"{len(wrong)} of {len(rows) + len(wrong)} rows are left out: {wrong[0]}")
    Random(config.seed).shuffle(rows)
    n_held = min(len(rows) - 1, round(config.held_out * len(rows)))
    return rows[n_held:], rows[:n_held] or rows


def write_rows(path, rows):
    """Write a .jsonl file, a row a line."""
    with replacing(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def make_pairs(it, questions, path):
    """Write a row for each question to which the judge prefers one of two sampled answers."""
    rows = []
    for own in (questions[i:i + ROWS] for i in range(0, len(questions), ROWS)):
        for question, *answers in zip(own, it.write(own)[0], it.write(own)[0]):
            best = prefer(it.reward, question, answers)
            if best is not None:
                asks = question.messages if question.messages[1:] else asked(question)
                rows.append(dict(prompt=asks, chosen=answers[best], rejected=answers[1 - best]))
    if not rows:
        raise ValueError(f"to each of {len(questions)} questions both answers were as good: there "
                         "is nothing to prefer")
    write_rows(path, rows)
    print(f"{path}: {len(rows)} pairs; to {len(questions) - len(rows)} more questions both answers "
          "were as good")


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class ChatsConfig:
    """Which chats are made."""
    task: str = option("sums", "what is asked", known=lambda: TASKS, positional=True)
    n: int = option(600, "chats", low=1)
    seed: int = option(0, "of the questions")
    held_out: bool = option(False, "questions for testing, which no other file has")
    long_ratio: float = option(0.5, "share of long answers", below=1 + TINY)
    out: str = option("chats.jsonl", "the file to write")

    __post_init__ = check_options


def main():
    typed, = parse_options(__doc__, ChatsConfig)
    config = ChatsConfig(**typed)
    made = chats(config.task, config.seed, config.held_out, config.long_ratio)
    rows = [*islice(made, config.n)]
    write_rows(config.out, rows)
    print(f"{config.out}: {len(rows):,} chats" + ", all there are" * (len(rows) < config.n))


if __name__ == "__main__":
    run_command(main)
