"""
Tool use: a model writes <<12*34>>, a calculator answers, and the model reads on after the result.

    python -m chapters.tools                 # with the tool, without it, and with a broken one
    python -m chapters.tools "12*(3-45)"     # the calculator alone

A model of 0.1M parameters, trained here in seconds, turns a question in words into a call; it need
not know how to multiply. Calls are plain text: the calculator parses them by hand and runs no code.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/tools.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.answers import render
from chapters.rewards import is_held_out
from chapters.solve import learn, share
from chapters.trials import new_model
from model import check_options, option
from sample import complete_batch
from tokenizer import Tokenizer, parse_options, run_command

LONGEST = 100  # characters of an expression, so that no call takes long

# -----------------------------------------------------------------------------
# The calculator: a parser by recursive descent. Each function takes what it needs off the front of
# the tokens, a list.


def parse_sum(tokens):
    """sum = product {("+" | "-") product}"""
    value = parse_product(tokens)
    while tokens[0] in ("+", "-"):
        sign = tokens.pop(0)
        value += parse_product(tokens) * (1 if sign == "+" else -1)
    return value


def parse_product(tokens):
    """product = factor {"*" factor}"""
    value = parse_factor(tokens)
    while tokens[0] == "*":
        tokens.pop(0)
        value *= parse_factor(tokens)
    return value


def parse_factor(tokens):
    """factor = digits | "-" factor | "(" sum ")" """
    token = tokens.pop(0)
    if token == "-":
        return -parse_factor(tokens)
    if token == "(":
        value = parse_sum(tokens)
        if tokens.pop(0) == ")":
            return value
    elif re.fullmatch("[0-9]+", token):  # isdecimal takes digits of all scripts
        return int(token)
    raise ValueError


def calculate(text):
    """The whole number that an expression of + - * and brackets comes to: calculate("2+3*(4-6)") ==
    -4. ValueError for anything else, and above LONGEST characters."""
    tokens = [*re.findall("[0-9]+|[^ ]", text), "end"]
    try:
        if len(text) <= LONGEST and (value := parse_sum(tokens), tokens)[1] == ["end"]:
            return value
    except (ValueError, IndexError):
        pass
    raise ValueError(f"{text!r:.60} is no sum, difference or product of whole numbers in at most "
                     f"{LONGEST} characters, such as 2+3*(4-6)")


# -----------------------------------------------------------------------------
# The loop: write up to the end of a call, fill in what the tool says, write on.


def result_of(call, tool=calculate):
    """What the model reads after a call: what the tool returns, or that it found an error."""
    try:
        return str(tool(call))
    except ValueError:
        return "error"


def complete_with_tool(model, tokenizer, prompts, tool=calculate, max_calls=3, max_new_tokens=32):
    """The likeliest reply to each prompt, a list of ids, in which the tool has filled in results:
    "<<2+3>>5." max_new_tokens is the limit between two calls. ReAct, arXiv:2210.03629"""
    texts, waiting = [""] * len(prompts), [*range(len(prompts))]
    for _ in range(max_calls + 1):
        own = [prompts[i] + tokenizer.encode(texts[i]) for i in waiting]
        more = complete_batch(model, tokenizer, own, temperature=0, stop=[">>"],
                              max_new_tokens=max_new_tokens)
        calls = {i: re.search("<<([^<>]*)$", text) for i, text in zip(waiting, more)}
        for i, text in zip(waiting, more):
            texts[i] += text + (f">>{result_of(calls[i][1], tool)}" if calls[i] else "")
        if not (waiting := [i for i in waiting if calls[i]]):
            break
    return texts


# -----------------------------------------------------------------------------
# Questions in words, the call that each needs, and the experiment.

ASKS = [
    ("What is {a} plus {b}?", "{a}+{b}"), ("Add {a} to {b}.", "{b}+{a}"),
    ("What is {a} minus {b}?", "{a}-{b}"), ("Take {a} from {b}.", "{b}-{a}"),
    ("What is {a} times {b}?", "{a}*{b}"), ("Of {a} pens {b} are sold. And left?", "{a}-{b}"),
    ("{a} boxes of {b} pens?", "{a}*{b}")]


def problems(n, seed=0, held_out=False):
    """n different pairs: (question in words, the call that answers it)."""
    random, found = Random(seed), {}
    while len(found) < n:
        numbers = dict(a=random.randrange(10, 100), b=random.randrange(10, 100))
        question, call = (text.format(**numbers) for text in random.choice(ASKS))
        if is_held_out(question) == held_out:
            found[question] = call
    return [*found.items()]


def lesson(tokenizer, question, call, with_tool):
    """A row [(ids, mask)] to learn from. What the tool says is read and not learned."""
    result = str(calculate(call))
    begin = f"<<{call}>>" if with_tool else ""
    ids, mask = render(tokenizer, [dict(role="user", content=question)], f"{begin}{result}.")
    if with_tool:
        first = mask.index(True) + len(begin)
        mask = [own and not first <= i < first + len(result) for i, own in enumerate(mask)]
    return ids, mask


def answer_of(text):
    """The number at the end of a reply: answer_of("<<2+3>>5.") == "5"."""
    return text.rpartition(">>")[2].removesuffix(".")


def use_tool(n_questions=150, max_steps=160, seed=0):
    """{"with the tool" | "without" | "a broken tool" | "right calls": (share, low, high)} of
    questions that are held out; a broken tool is always one off."""
    tokenizer, tests = Tokenizer([]), problems(n_questions, seed + 1, held_out=True)
    prompts = [tokenizer.render_prompt([dict(role="user", content=text)]) for text, _ in tests]
    models = {with_tool: learn(new_model(seed, vocab_size=tokenizer.n_vocab), [
        lesson(tokenizer, *row, with_tool) for row in problems(6000, seed)],
        max_steps=max_steps, seed=seed) for with_tool in (True, False)}

    def right(model, tool=calculate):
        texts = complete_with_tool(model, tokenizer, prompts, tool)
        return share([answer_of(text) == str(calculate(call))
                      for text, (_, call) in zip(texts, tests)]), texts

    found, texts = right(models[True])
    return {"with the tool": found, "without": right(models[False])[0],
            "a broken tool": right(models[True], lambda call: calculate(call) + 1)[0],
            "right calls": share([text.startswith(f"<<{call}>>")
                                  for text, (_, call) in zip(texts, tests)])}


@dataclass(frozen=True)
class ToolsConfig:
    """An expression, or else the experiment."""
    expression: str = option("", "to calculate; without one a model is trained and asked",
                             positional=True)
    n: int = option(150, "questions that are held out", low=2, below=10_001)
    seed: int = option(0, "of the models and the questions")

    __post_init__ = check_options


def main():
    config = ToolsConfig(**parse_options(__doc__, ToolsConfig)[0])
    if config.expression:
        print(calculate(config.expression))
        return
    for name, row in use_tool(config.n, seed=config.seed).items():
        print("{:15}{:6.1%} ({:.1%} to {:.1%})".format(name, *row))


if __name__ == "__main__":
    run_command(main)
