"""Facts about chapters/solve.py and chapters/reasoning.py: more computing before an answer."""

import math
import re
from collections import Counter
from random import Random

import pytest
import torch
import torch.nn.functional as F
from conftest import mistake, tiny

from chapters import reasoning, solve
from chapters.answers import render, sequence_logprobs
from chapters.reasoning import (PICKS, accuracy, check_loss, judged, lesson, looks_again, majority,
                                up_to_error, weighted)
from chapters.rewards import asked, is_held_out
from chapters.solve import (CHAIN, DIRECT, Sample, answer_of, chat_loss, from_first, from_last,
                            learn, questions, sample, share,
                            solutions, solved)
from evaluate import wilson
from tokenizer import Tokenizer

TOKENIZER = Tokenizer([])


def sampler(seed=0):
    return tiny(vocab_size=TOKENIZER.n_vocab, block_size=128, seed=seed)


def written(question, text, logprob=0.0, score=0.0):
    row = render(TOKENIZER, question.messages, text)
    return Sample(text, row, sum(row[1]), logprob, score)


def steps_of(text):
    """The numbers of each step of a solution: "<3+0+0=3,8+6+0=14 143" has [3, 0, 0, 3] first."""
    return [[*map(int, re.findall(r"\d+", step))] for step in text.split(" ")[0].split(",")]


def test_the_examples_in_the_docstrings_are_true():
    assert from_last(583, 560) == "<3+0+0=3,8+6+0=14,5+5+1=11 1143"
    assert from_first(583, 560) == ">5+5=10,8+6=14,3+0=3 1143"
    assert answer_of("<3+4+0=7 7") == "7" and majority("abcb") == "b"


# -----------------------------------------------------------------------------
# Questions and solutions.


def test_each_step_of_a_solution_is_true_and_its_digits_are_those_of_the_question():
    for question in questions(300):
        a, b = asked(question).split("+")
        for text, back in zip(solutions(question), (-1, 1)):
            steps = steps_of(text)
            assert all(sum(terms) == total for *terms, total in steps)
            assert [str(x) + str(y) for x, y, *_ in steps] == [
                x + y for x, y in zip(a[::back], b[::back])]
            assert answer_of(text) == str(int(a) + int(b)) == question.right
        assert solutions(question, DIRECT) == [question.right]


def test_the_carries_of_a_solution_and_its_last_step_make_the_answer():
    for question in questions(300, 1):
        steps = steps_of(solutions(question)[0])
        totals = [total for *_, total in steps]
        assert [carry for *_, carry, _ in steps] == [0, *(total // 10 for total in totals[:-1])]
        assert f"{totals[2]}{totals[1] % 10}{totals[0] % 10}" == question.right


def test_questions_differ_and_none_is_both_trained_on_and_held_out():
    trained, held_out = ({asked(one) for one in questions(500, seed, held_out)}
                         for seed, held_out in ((0, False), (0, True)))
    assert len(trained) == len(held_out) == 500 and not trained & held_out
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held_out))
    assert questions(20, 3) == questions(20, 3) != questions(20, 4)


def test_rows_to_learn_from_are_right_solutions_in_both_ways_and_only_these_are_learned():
    first = Counter()
    for question, (ids, mask) in zip(questions(100, 5), solved(TOKENIZER, CHAIN, 5, 100)):
        text = TOKENIZER.decode([id for id, own in zip(ids, mask) if own])
        assert text.removesuffix("<|end|>") in solutions(question)
        first[text[0]] += 1
    assert min(first["<"], first[">"]) > 30


def test_the_loss_is_the_mean_over_the_tokens_of_solutions():
    model, rows = sampler(), solved(TOKENIZER, CHAIN, n=5)
    logprobs = [sequence_logprobs(model, torch.tensor([ids]), torch.tensor([mask])).item()
                for ids, mask in rows]
    assert chat_loss(model, rows).item() == pytest.approx(
        -sum(logprobs) / sum(sum(mask) for _, mask in rows), rel=1e-5)


def test_a_model_learns_its_rows_and_the_same_seed_makes_the_same_model():
    rows = solved(TOKENIZER, DIRECT, n=3)
    a, b = (learn(sampler(), rows, max_steps=10, rate=0.02) for _ in range(2))
    assert chat_loss(a, rows).item() < 0.6 * chat_loss(sampler(), rows).item()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not a.training


def test_samples_are_grouped_by_question_and_depend_on_the_seed_alone():
    asks, model = questions(3), sampler()
    groups = sample(model, TOKENIZER, asks, n=4, max_new_tokens=5)
    assert [*map(len, groups)] == [4, 4, 4]
    for question, group in zip(asks, groups):
        prompt = TOKENIZER.render_prompt(question.messages)
        for own in group:
            ids, mask = own.row
            assert ids[:len(prompt)] == prompt and mask.index(True) == len(prompt)
            assert own.n_tokens == len(ids) - len(prompt) <= 5
    assert groups == sample(model, TOKENIZER, asks, n=4, max_new_tokens=5)
    assert groups != sample(model, TOKENIZER, asks, n=4, max_new_tokens=5, seed=1)


def test_rows_written_in_parts_are_as_many_as_rows_written_at_once(monkeypatch):
    monkeypatch.setattr(solve, "ROWS", 3)
    asks = questions(4)
    groups = sample(sampler(), TOKENIZER, asks, n=2, temperature=0, max_new_tokens=3)
    assert [len(group) for group in groups] == [2] * 4
    assert all(a.text == b.text for a, b in groups)


# -----------------------------------------------------------------------------
# Judges, picks, shares.


def test_a_judge_gives_each_sample_the_log_probability_it_has_alone(monkeypatch):
    monkeypatch.setattr(reasoning, "ROWS", 3)
    a, b, asks = sampler(), sampler(1), questions(2)
    groups = [[written(question, text) for text in ("7", *solutions(question))]
              for question in asks]
    for own in sum(judged(groups, logprob=a, score=b), []):
        ids, mask = (torch.tensor([x]) for x in own.row)
        assert own.logprob == pytest.approx(sequence_logprobs(a, ids, mask).item(), rel=1e-4)
        assert own.score == pytest.approx(sequence_logprobs(b, ids, mask).item(), rel=1e-4)


def test_a_sample_is_cut_behind_its_first_wrong_token():
    question = questions(1)[0]
    for right in solutions(question):
        row, whole = up_to_error(question, own := written(question, right))
        assert whole and row == own.row
        for at in range(len(right)):
            wrong = written(question, right[:at] + "x" + right[at + 1:])
            (ids, mask), whole = up_to_error(question, wrong)
            assert not whole and TOKENIZER.decode(ids).endswith(right[:at] + "x")
            assert sum(mask) == at + 1 and len(ids) == len(mask)
        (ids, _), whole = up_to_error(question, written(question, right[:-1]))  # it ends too early
        assert not whole and TOKENIZER.decode(ids).endswith(right[:-1] + "<|end|>")


def test_the_verifiers_loss_is_the_cross_entropy_of_right_and_wrong_tokens():
    model, question = sampler(), questions(1)[0]
    texts = [solutions(question)[0], "<9+9", solutions(question)[1][:6] + "x", "?"]
    rows = [up_to_error(question, written(question, text)) for text in texts]
    losses = []
    for (ids, mask), right in rows:
        p = model(torch.tensor([ids]))[0].softmax(dim=-1)[0]
        p = torch.stack([p[i - 1, ids[i]] for i in range(len(ids)) if mask[i]])
        target = torch.ones(len(p))
        target[-1] = float(right)
        losses += F.binary_cross_entropy(p, target, reduction="none").tolist()
    assert check_loss(model, rows).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_majority_is_what_counting_finds_and_of_equals_the_first():
    random = Random(0)
    for _ in range(200):
        answers = random.choices("abcd", k=random.randint(1, 9))
        most = max(answers.count(x) for x in answers)
        assert majority(answers) == next(x for x in answers if answers.count(x) == most)
        assert weighted(answers, [-1.0] * len(answers)) == majority(answers)
    assert weighted("aab", [-3.0, -3.0, -1.0]) == "b" != majority("aab")


def test_each_pick_goes_by_its_own_measure():
    question = questions(1)[0]
    group = [written(question, text, *judges) for text, *judges in (
        ("x 1", -5, -5), ("x 1", -6, -5), ("x 2", -1, -9), ("x 3", -9, -1),
        (f"x {question.right}", -9, -9))]
    found = {name: pick(question, group) for name, pick in PICKS.items()}
    assert found == dict(majority="1", likeliest="2", verifier="3", weighted="3",
                         checker=question.right)
    assert PICKS["checker"](question, group[:4]) != question.right


def test_the_accuracy_of_n_samples_is_the_mean_over_groups_of_n():
    asks = questions(2)
    groups = [[written(q, f"x {q.right if good else 0}") for good in goods]
              for q, goods in zip(asks, ([1, 0, 0, 0], [1, 1, 0, 1]))]
    tokens = sum(own.n_tokens for group in groups for own in group) / 8
    for n, expected in (1, (1 / 4 + 3 / 4) / 2), (2, (1 / 2 + 1) / 2), (4, 1.0):
        spent, got, low, high = accuracy(PICKS["checker"], asks, groups, n)
        assert spent == n * tokens and got == expected and low <= got <= high
    assert accuracy(PICKS["majority"], asks, groups, 4)[1] == 0.5


def test_a_share_has_wilsons_interval_and_of_nothing_it_is_unknown():
    assert share([1, 0, 0, 1, 1]) == (0.6, *wilson(0.6, 5))
    got, low, high = share([0.5, 0.25, 1.0] * 20)
    assert low < got < high and got == pytest.approx(7 / 12)
    assert math.isnan(share([])[0]) and share([])[1:] == (0.0, 1.0)


def test_a_lesson_in_checking_learns_the_verdict_and_never_the_draft():
    question = questions(1)[0]
    right = solutions(question)[0]
    wrong = [f"wrong {text}" for text in solutions(question)]
    for draft, verdicts in (right, ["right"]), ("<1 1", wrong):
        ids, mask = lesson(TOKENIZER, question, draft, Random(0))
        said = TOKENIZER.decode([id for id, own in zip(ids, mask) if own])
        assert said.removesuffix("<|end|>") in verdicts
        assert TOKENIZER.render_prompt(looks_again(question, draft).messages) == ids[:-sum(mask)]


# -----------------------------------------------------------------------------
# What is found, by models that are trained.


@pytest.mark.slow
def test_steps_are_right_where_the_sum_at_once_is_not():
    found = reasoning.chain_of_thought(n_questions=80, longer=[1])
    assert found["steps"][2] > found["direct"][3]  # the intervals are apart
    assert found["steps"][0] > 3 * found["direct"][0]


@pytest.mark.slow
def test_votes_and_verifiers_gain_on_one_sample_and_the_true_checker_bounds_them():
    found = reasoning.best_of(counts=(1, 4, 16), n_questions=80)
    one, bound = found["majority"][0], found["checker"]
    for name in PICKS:
        assert found[name][0] == one
        assert found[name][2][2] > one[3]  # the intervals are apart
        assert all(own[1] <= most[1] for own, most in zip(found[name], bound))
        assert [row[0] for row in found[name]] == pytest.approx([n * one[0] for n in (1, 4, 16)])


@pytest.mark.slow
def test_a_second_look_is_measured_against_as_much_training_without_it():
    found, verdicts = reasoning.reflect(n_questions=80)
    assert found["draft"][0] < found["reflected"][0] < found["vote"][0]
    assert found["vote"][0] == pytest.approx(3 * found["trained"][0])
    assert found["trained"][1] > found["reflected"][1]  # it does not help here
    assert all(0 <= low <= got <= high <= 1 for got, low, high in verdicts.values())


def test_the_command_prints_what_an_experiment_finds(monkeypatch, call):
    row = (31.0, 0.5, 0.25, 0.75)
    monkeypatch.setattr(reasoning, "chain_of_thought", lambda n, seed: dict(steps=row))
    monkeypatch.setattr(reasoning, "best_of", lambda n_questions, seed: dict(majority=[row, row]))
    monkeypatch.setattr(reasoning, "reflect", lambda n, seed: (
        dict(draft=row), dict(found=(0.5, 0.25, 0.75))))
    line = "31.0 tokens 50.0% right (25.0% to 75.0%)"
    assert " ".join(call(reasoning, "chain")[0].split()) == f"steps {line}"
    assert " ".join(call(reasoning)[0].split()) == f"majority {line} majority {line}"
    assert " ".join(call(reasoning, "reflect")[0].split()) == (
        f"draft {line} found 50.0% (25.0% to 75.0%)")


@pytest.mark.parametrize("words, code, message", [
    (["guess"], 1, "unknown experiment 'guess'"), (["chain", "--n=1"], 1, "n=1 must be at least 2"),
    (["--steps=3"], 2, "--steps")])
def test_a_mistake_is_one_line(monkeypatch, capsys, words, code, message):
    got, lines = mistake(reasoning.main, monkeypatch, capsys, *words)
    assert got == code and len(lines) == 1 and message in lines[0]
