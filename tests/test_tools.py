"""Facts about chapters/tools.py: a calculator, and a model that calls it in plain text."""

import ast
import operator
import re
from random import Random

import pytest
from conftest import mistake, tiny

from chapters import tools
from chapters.rewards import is_held_out
from chapters.tools import (LONGEST, answer_of, calculate, complete_with_tool, lesson, problems,
                            result_of)
from tokenizer import Tokenizer

TOKENIZER = Tokenizer([])
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def by_python(text):
    """What Python's own parser makes of an expression."""
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        return -value(node.operand) if isinstance(node, ast.UnaryOp) else node.value
    return value(ast.parse(text, mode="eval").body)


def expression(random, depth):
    """A random expression, up to so many levels deep."""
    kind = random.randrange(5) if depth else 4
    if kind == 4:
        return str(random.randrange(1000))
    a, b = (expression(random, depth - 1) for _ in range(2))
    return (f"{a}{random.choice('+-*')}{b}", f"({a})", f"-{a}", f"{a} {random.choice('+-*')} {b}")[
        kind]


def test_the_examples_in_the_docstrings_are_true():
    assert calculate("2+3*(4-6)") == -4
    assert answer_of("<<2+3>>5.") == "5"


def test_the_calculator_finds_what_python_finds():
    random, n = Random(0), 0
    while n < 400:
        text = expression(random, 4)
        if len(text) <= LONGEST:
            assert calculate(text) == by_python(text), text
            n += 1


@pytest.mark.parametrize("text", [
    "", "+", "2+", "(2", "2)", "2(3)", "2 3", "2**3", "2/3", "2//3", "1.5", "abs(2)", "x", "+2",
    "__import__('os')", "9" * (LONGEST + 1), "(" * 90, "٣+٣", "²", "end", "2end", "2+end"])
def test_what_is_no_expression_is_one_line_that_shows_one(text):
    with pytest.raises(ValueError, match=r"such as 2\+3\*\(4-6\)$") as error:
        calculate(text)
    assert "\n" not in str(error.value)
    assert result_of(text) == "error"


def test_each_call_answers_its_question():
    signs = {"plus": "+", "Add": "+", "minus": "-", "Take": "-", "sold": "-", "times": "*",
             "boxes": "*"}
    for question, call in problems(300):
        sign = next(sign for word, sign in signs.items() if word in question)
        numbers = re.findall(r"\d+", question)
        if question.startswith(("Take", "Add")):
            numbers.reverse()
        assert call == sign.join(numbers)


def test_problems_differ_and_none_is_both_trained_on_and_held_out():
    trained, held_out = ({question for question, _ in problems(400, held_out=held_out)}
                         for held_out in (False, True))
    assert len(trained) == len(held_out) == 400 and not trained & held_out
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held_out))
    assert problems(9, 1) == problems(9, 1) != problems(9, 2)


@pytest.mark.parametrize("with_tool", [True, False])
def test_what_the_tool_says_is_read_and_not_learned(with_tool):
    for question, call in problems(50):
        ids, mask = lesson(TOKENIZER, question, call, with_tool)
        learned = TOKENIZER.decode([id for id, own in zip(ids, mask) if own])
        assert learned == (f"<<{call}>>." if with_tool else f"{calculate(call)}.") + "<|end|>"
        begin = f"<<{call}>>" * with_tool
        assert TOKENIZER.decode(ids).endswith(f"{begin}{calculate(call)}.<|end|>")


def scripted(monkeypatch, *rounds):
    """complete_batch writes these texts, a round a call -> the texts that it was asked to go on."""
    asked, rounds = [], iter(rounds)

    def complete_batch(model, tokenizer, prompts, **options):
        assert options["stop"] == [">>"] and options["temperature"] == 0
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        return next(rounds)
    monkeypatch.setattr(tools, "complete_batch", complete_batch)
    return asked


def test_the_loop_fills_in_results_and_only_texts_with_a_call_go_on(monkeypatch):
    asked = scripted(monkeypatch, ["It is <<2*3", "7.", "<<2/0"], [" and <<6+1", "."], ["."])
    prompts = [TOKENIZER.encode(text) for text in "abc"]
    assert complete_with_tool(None, TOKENIZER, prompts) == [
        "It is <<2*3>>6 and <<6+1>>7.", "7.", "<<2/0>>error."]
    assert asked == [["a", "b", "c"], ["aIt is <<2*3>>6", "c<<2/0>>error"],
                     ["aIt is <<2*3>>6 and <<6+1>>7"]]


def test_a_model_that_calls_on_and_on_is_stopped(monkeypatch):
    asked = scripted(monkeypatch, *[["<<1+1"]] * 9)
    [text] = complete_with_tool(None, TOKENIZER, [TOKENIZER.encode("a")], max_calls=2)
    assert len(asked) == 3 and text == "<<1+1>>2" * 3


def test_any_tool_that_takes_a_text_can_be_called(monkeypatch):
    scripted(monkeypatch, ["<<word"], ["."])
    assert complete_with_tool(None, TOKENIZER, [[65]], str.upper) == ["<<word>>WORD."]


def test_without_a_call_the_reply_is_that_of_the_model():
    model = tiny(vocab_size=TOKENIZER.n_vocab, block_size=64)
    prompts = [TOKENIZER.encode(text) for text in ("one", "two")]
    assert complete_with_tool(model, TOKENIZER, prompts, max_new_tokens=8) == (
        tools.complete_batch(model, TOKENIZER, prompts, temperature=0, max_new_tokens=8))


@pytest.mark.slow
def test_a_model_is_right_with_a_tool_and_as_wrong_as_its_tool():
    found = tools.use_tool(n_questions=60)
    assert found["with the tool"][1] > found["without"][2] + 0.3
    assert found["a broken tool"][0] < 0.05
    assert found["right calls"][0] >= found["with the tool"][0] > 0.5


def test_the_command_calculates_or_shows_the_experiment(monkeypatch, call):
    assert call(tools, "12*(3-45)")[0] == "-504\n"
    monkeypatch.setattr(tools, "use_tool", lambda n, seed: {"without": (0.5, 0.25, n / 100)})
    assert call(tools, "--n=75")[0].split() == "without 50.0% (25.0% to 75.0%)".split()


@pytest.mark.parametrize("words, code, message", [
    (["2+"], 1, "'2+' is no sum"), (["--n=1"], 1, "n=1 must be at least 2"),
    (["--tool=x"], 2, "--tool")])
def test_a_mistake_is_one_line(monkeypatch, capsys, words, code, message):
    got, lines = mistake(tools.main, monkeypatch, capsys, *words)
    assert got == code and len(lines) == 1 and message in lines[0]
