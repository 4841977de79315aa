"""Facts about chapters/tasks.py: chats whose answers are known, and how many a model gets right."""

import json
import re

import pytest
from conftest import keep, mistake, tiny

from chapters import tasks
from chapters.grammar import FIELDS, PEOPLE
from chapters.tasks import KINDS, SINGLE, TASKS, exact, is_held_out, lessons, make
from data import take_chat
from tokenizer import Tokenizer

ORDER = dict(first=0, second=1, third=2)


def say(row):
    return [message["content"] for message in row["messages"]]


def listed(question):
    return question.split(": ")[1].split(", ")


def of_kind(name):
    return {*PEOPLE} if name == "person" else {*FIELDS[name]}


def answer(task, question):
    """The answer, worked out from the words of the question alone, by other means than make's."""
    numbers, words = [int(n) for n in re.findall(r"\d+", question)], question.split()
    if task == "read":
        return re.search(rf"\b({'|'.join(of_kind(words[-3]))})\b", question)[0]
    if task == "capital":
        return re.search(rf"of {words[-1][:-1]} is (\w+)\.", question)[1]
    if task == "add":
        return str(sum(numbers))
    own = listed(question)
    return dict(
        backwards=lambda: f"{own[2]}, {own[1]}, {own[0]}", first=lambda: own[0],
        last=lambda: own[-1],
        kind=lambda: next(word for word in own if word in of_kind(words[4][:-1])),
        count=lambda: str(sum(word in of_kind(words[6][:-1]) for word in own)))[task]()


@pytest.mark.parametrize("task", SINGLE)
def test_each_answer_is_the_one_that_the_question_has(task):
    for row in make(150, tasks=[task]):
        question, reply = say(row)
        assert reply == f"The answer is {answer(task, question)}.", question


def test_a_second_turn_is_answered_from_the_first_and_a_tools_result_is_taken():
    for row in make(50, tasks=["follow"]):
        question, one, further, two = say(row)
        places = [ORDER[re.search("first|second|third", text)[0]] for text in (question, further)]
        assert [one, two] == [f"The answer is {listed(question)[i]}." for i in places]
        assert places[0] != places[1]
    for row in make(50, tasks=["tool"]):
        question, order, result, reply = say(row)
        assert re.fullmatch(r"calculate (\d+) \+ (\d+)", order)
        assert [*map(int, re.findall(r"\d+", order))] == [*map(int, re.findall(r"\d+", question))]
        assert result == answer("add", question) and reply == f"The answer is {result}."


def test_no_question_comes_twice_and_no_list_is_both_trained_and_held_out():
    trained = [say(row)[0] for seed in range(2) for row in make(600, seed)]
    held_out = [say(row)[0] for row in make(600, 0, held_out=True)]
    assert len({*trained[:600]}) == len({*held_out}) == 600
    subjects = [{text.split(": ")[-1] for text in texts} for texts in (trained, held_out)]
    assert not set.intersection(*subjects)
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held_out))


def test_the_same_seed_makes_the_same_rows_and_each_task_as_many():
    rows = [*make(80, 3)]
    assert rows == [*make(80, 3, [*SINGLE])] != [*make(80, 4)]
    assert [row["task"] for row in rows] == [*SINGLE] * 10


def test_every_row_is_a_chat_that_training_takes():
    tokenizer = Tokenizer([])
    for row in make(60, tasks=[*TASKS]):
        ids, learned = tokenizer.render_chat(take_chat(row))
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        said = tokenizer.decode([id for id, own in zip(ids, learned) if own])
        assert said == "".join(f"{reply}<|end|>" for reply in replies)


def test_lessons_tell_the_kinds_of_words_in_lists_of_which_none_is_held_out():
    for text in lessons(300, 1):
        order, told = re.fullmatch(r"There are ([^.]+)\.((?: The [^.]+ is \w+\.)+)", text).groups()
        facts = dict(re.findall(r"The ([a-z ]+) is (\w+)\.", told))
        own = order.split(", ")
        assert not is_held_out(f"Which word is first: {order}")
        assert {*facts} == {*KINDS} and sorted(facts.values()) == sorted(own)
        assert all(word in of_kind(name) for name, word in facts.items())
    texts = [*lessons(300, 1)]
    assert texts[:9] == [*lessons(9, 1)] != [*lessons(9, 2)]


def test_only_whole_answers_are_right_and_each_task_has_its_share(monkeypatch):
    rows = [*make(8, tasks=["first", "backwards"])]
    answers = {i: say(row)[-1] for i, row in enumerate(rows)}
    told = [f" {answers[0]}\n", answers[1] + "..", answers[2], answers[3], "", answers[5],
            answers[6], answers[7][:-1]]
    asked = []
    monkeypatch.setattr(tasks, "complete_batch", lambda model, tokenizer, prompts, **options: (
        asked.append((prompts, options)), told)[1])
    assert exact(None, Tokenizer([]), rows) == (5 / 8, dict(first=3 / 4, backwards=2 / 4))
    [(prompts, options)] = asked
    assert prompts[0] == Tokenizer([]).render_prompt(rows[0]["messages"][:1])
    longest = max(len(text.encode()) for text in answers.values())
    assert options == dict(temperature=0, max_new_tokens=longest + 1)


def test_a_file_of_rows_is_written_and_a_run_is_asked_what_is_held_out(tmp_path, call):
    out, _ = call(tasks, f"--out={tmp_path}/a.jsonl", "--n=20", "--tasks", "tool", "first")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [*make(20, tasks=["first", "tool"])] and "20 rows" in out
    call(tasks, f"--out={tmp_path}/b.jsonl", "--n=20", "--held_out")
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert rows == [*make(20, held_out=True)]
    tokenizer = Tokenizer([])
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=128), tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    out, _ = call(tasks, f"--run={tmp_path}/run", "--n=4", "--tasks=first")
    assert out.split() == "first 0.0% right all 0.0% right".split()


@pytest.mark.parametrize("words, message", [
    ([], "give either --out"), (["--out=a", "--run=b"], "give either --out"),
    (["--out=a", "--tasks=frist"], "--tasks=frist: must be none or of kind"),
    (["--out=a", "--tasks=none"], "--tasks=none makes nothing"),
    (["--out=a", "--n=0"], "n=0 must be at least 1"),
    (["--out=a", "--n=200", "--tasks=add", "--largest=9"], "add has no more than 82 questions"),
    (["--run=a", "--held_out"], "--held_out would not act beside --run")])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, words,
                                                      message):
    monkeypatch.chdir(tmp_path)
    code, lines = mistake(tasks.main, monkeypatch, capsys, *words)
    assert code == 1 and len(lines) == 1 and message in lines[0]
    assert not [*tmp_path.iterdir()]
