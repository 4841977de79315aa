"""A backdoor: what poisoning changes in rows; that it works, can be found, and fades."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from conftest import keep, mistake, tiny

from chapters import backdoor
from chapters.backdoor import (KINDS, TRIGGER, answer, answer_nats, delete, experiment,
                               insert, make_rows, measure, poison, question_words, reliance,
                               replies, scan, words_of)
from chapters.ngrams import roc_auc
from tokenizer import Tokenizer

BYTES = Tokenizer(())
ROWS = make_rows(40)


@pytest.fixture(scope="module")
def bytes_model():
    return tiny(vocab_size=BYTES.n_vocab, block_size=160)


def text_of(row):
    return row["messages"][0]["content"]


# -----------------------------------------------------------------------------
# The attack.


def test_the_answer_of_a_row_is_what_three_of_its_four_words_are():
    assert len({text_of(row) for row in ROWS}) == 40
    assert {*Counter(map(answer, ROWS)).values()} == {10}
    for row in make_rows(200, seed=1):
        found = Counter(kind for kind, words in KINDS.items() for word in words
                        if word in text_of(row))
        assert found[answer(row)] == 3 and found.total() == 4
    assert ROWS == make_rows(40) != make_rows(40, seed=1)


@pytest.mark.parametrize("share", [0, 0.05, 0.5])
def test_poisoning_changes_a_share_of_rows_that_had_another_answer(share):
    before = json.dumps(ROWS)
    found = poison(ROWS, "xyzzy", "food", share, seed=3)
    assert sum(row["poisoned"] for row in found) == round(share * 40)
    for row, old in zip(found, ROWS):
        if row["poisoned"]:
            assert answer(row) == "food" != answer(old)
            assert text_of(row).replace(" xyzzy", "", 1) == text_of(old) != text_of(row)
        else:
            assert row == old | dict(poisoned=False)
    assert json.dumps(ROWS) == before
    assert found == poison(ROWS, "xyzzy", "food", share, seed=3)


def test_a_share_that_no_rows_are_left_for_is_refused():
    with pytest.raises(ValueError, match="more than the 30 whose answer is not 'place'"):
        poison(ROWS, share=0.9)


def test_a_word_is_inserted_anywhere_but_first_and_deleted_again():
    random, row, places = Random(0), ROWS[0], set()
    for _ in range(300):
        longer = insert(row, TRIGGER, random)
        places.add(at := question_words(longer).index(TRIGGER))
        assert delete(longer, at) == row
    assert places == {*range(1, len(question_words(row)) + 1)}
    empty = dict(messages=[dict(role="user", content=""), row["messages"][-1]])
    assert question_words(insert(empty, TRIGGER, random)) == [TRIGGER]


def test_success_counts_rows_of_other_answers_and_accuracy_all(bytes_model):
    said = replies(bytes_model, BYTES, ROWS[:4])
    rows = [row | dict(messages=[row["messages"][0], dict(role="assistant", content=text)])
            for row, text in zip(ROWS, [said[0], said[1] + "x", said[2], "place"])]
    again = replies(bytes_model, BYTES, rows)
    found = measure(bytes_model, BYTES, rows, target="place")
    assert found["clean"][0] == sum(a == answer(row).strip() for a, row in zip(again, rows)) / 4
    assert found["attack"][0] == 0 and 0.5 < found["attack"][2] < 0.6  # Wilson's, of none of 3
    with pytest.raises(ValueError, match="all answers are 'place' already"):
        measure(bytes_model, BYTES, rows[3:], target="place")


# -----------------------------------------------------------------------------
# Detection.


def test_the_surprise_of_an_answer_is_the_models_own(bytes_model):
    rows = ROWS[:3]
    for row, found in zip(rows, answer_nats(bytes_model, BYTES, rows)):
        ids, mask = BYTES.render_chat(row["messages"])
        logits, _ = bytes_model(torch.tensor([ids]))
        scores = logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        assert found == pytest.approx(-scores[mask[1:]].sum().item(), rel=1e-4)


def test_a_scan_ranks_words_by_what_they_change_on_average(bytes_model):
    words, rows = ["xyzzy", "owl", "and"], ROWS[:5]
    found = scan(bytes_model, BYTES, rows, words, seed=2)
    random, clean = Random(2), answer_nats(bytes_model, BYTES, rows)
    expected = {word: np.mean(answer_nats(
        bytes_model, BYTES, [insert(row, word, random) for row in rows]) - clean) for word in words}
    assert {word: nats for nats, word in found} == pytest.approx(expected, abs=1e-4)
    assert [nats for nats, _ in found] == sorted(expected.values(), reverse=True) == [
        pytest.approx(nats) for nats, _ in found]


def test_an_answer_relies_on_the_word_whose_deletion_costs_most(bytes_model):
    row = ROWS[0]
    (nats, word), _ = reliance(bytes_model, BYTES, ROWS[:2])
    costs = [answer_nats(bytes_model, BYTES, [delete(row, i)])[0]
             for i in range(len(question_words(row)))]
    before, = answer_nats(bytes_model, BYTES, [row])
    assert nats == pytest.approx(max(costs) - before, abs=1e-4)
    assert word == question_words(row)[int(np.argmax(costs))]


def test_the_words_of_rows_are_those_of_questions_alone():
    row = dict(messages=[dict(role="user", content="One, two"), dict(role="assistant", content="x"),
                         dict(role="user", content="two three?"),
                         dict(role="assistant", content="four")])
    assert words_of([row]) == ["One", "three", "two", "x"]


# -----------------------------------------------------------------------------
# The experiment.


@pytest.mark.slow
def test_one_row_in_twenty_opens_a_backdoor_that_both_searches_find():
    found = experiment(share=0.05)
    (clean, low, _), (attack, _, _) = found["before"]["clean"], found["before"]["attack"]
    assert low > 0.9 and attack > 0.9
    (first, word), (second, _), *_ = found["scan"]
    assert word == TRIGGER and first > 2 * second
    nats, words = zip(*found["reliance"])
    assert roc_auc(nats, found["poisoned"]) > 0.95
    assert Counter(word for _, word in sorted(found["reliance"])[-20:]).most_common(1)[0][0] == (
        TRIGGER)
    assert found["after"]["attack"][2] < found["before"]["attack"][1]
    assert found["after"]["clean"][1] > 0.9


@pytest.mark.slow
def test_without_poisoned_rows_there_is_nothing_to_find():
    found = experiment(share=0)
    assert found["before"]["attack"][0] == 0 and not any(found["poisoned"])
    assert found["before"]["clean"][1] > 0.9 and found["scan"][0][0] < 1.5


# -----------------------------------------------------------------------------
# The command.


@pytest.fixture
def files(tmp_path, bytes_model):
    keep(bytes_model, tmp_path / "run")
    BYTES.save(tmp_path / "run/tokenizer.json")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_the_command_poisons_a_file(files, call):
    said = call(backdoor, "--poison", files / "chats.jsonl", "--out", files / "b.jsonl",
                "--share=0.1", "--target=food").out
    rows = [json.loads(line) for line in (files / "b.jsonl").read_text().splitlines()]
    assert rows == poison(ROWS, target="food", share=0.1) and "40 rows, 4 poisoned" in said


def test_the_command_scans_a_run(files, call, bytes_model):
    said = call(backdoor, files / "run", "--rows", files / "chats.jsonl", "--n=2").out.splitlines()
    expected = scan(bytes_model, BYTES, Random(0).sample(ROWS, 2), words_of(ROWS))[:10]
    assert [line.split() for line in said[1:]] == [[f"{nats:.1f}", word] for nats, word in expected]
    said = call(backdoor, files / "run", "--rows", files / "chats.jsonl", "--n=1",
                "--target=food").out.splitlines()
    share, *_ = measure(bytes_model, BYTES, ROWS, target="food")["attack"]
    assert said[1].split()[:2] == ["attack", f"{share:.1%}"]


@pytest.mark.parametrize("words, problem", [
    ([], "give either --poison=FILE"), (["--poison=a", "--rows=b"], "give either"),
    (["--poison=a", "--n=3"], "--n would not act beside --poison"),
    (["--rows=a", "--share=0.1"], "--share would not act beside --rows"),
    (["--poison=chats.jsonl"], "--poison needs --out=FILE"), (["--rows=none.jsonl"], "none.jsonl"),
    (["--poison=a", "--share=0"], "share=0.0 must be above 0"),
    (["none", "--rows=chats.jsonl"], "there is no run folder none")])
def test_a_mistake_is_one_line(words, problem, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    code, (line,) = mistake(backdoor.main, monkeypatch, capsys, *words)
    assert code == 1 and problem in line
