"""chapters/feedback.py: what is logged and what is not, whose votes count, which rows they make."""

import json
import os
import stat
import threading
from random import Random

import pytest
from conftest import keep, mistake, run, tiny

from chapters import feedback
from chapters.feedback import (FeedbackLog, TooMany, append_line, chats_of, last_votes, pairs_of,
                               read_votes, tally)
from chapters.rewards import take_pair
from data import read_rows, take_chat
from tokenizer import Tokenizer, write_json


def ask(text):
    return [dict(role="user", content=text)]


def row(client, text, answer, rating=None, better=None, arm="a"):
    return dict(client=client, messages=ask(text), answer=answer, model="m", arm=arm, rating=rating,
                better=better)


def written(tmp_path, *rows):
    """A log of these rows -> its path."""
    path = tmp_path / "feedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def made(tmp_path, *rows, per_client=50):
    """-> ([(question, answer)] of the chats, [(question, chosen, rejected)] of the pairs)."""
    votes, _ = last_votes(read_votes(written(tmp_path, *rows))[0], per_client)
    scores = tally(votes)
    return ([tuple(turn["content"] for turn in chat["messages"])
             for chat in chats_of(votes, scores)],
            [(pair["prompt"][-1]["content"], pair["chosen"], pair["rejected"])
             for pair in pairs_of(votes, scores)])


# -----------------------------------------------------------------------------
# The log.


def test_nothing_is_written_before_an_answer_is_rated_and_then_all_that_is_needed(tmp_path):
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.remember("x1", ask("Where?"), "There.", "run", "b")
    assert log.path.stat().st_size == 0
    log.rate("x1", "1.2.3.4", rating=-1, better="Here.")
    (vote,), wrong = read_votes(log.path)
    assert wrong == [] and vote[1:] == (json.dumps(ask("Where?")), "There.", "b", -1, "Here.")
    assert json.loads(log.path.read_text())["model"] == "run"


def test_personal_data_and_addresses_of_clients_are_not_in_the_log(tmp_path):
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.remember("x1", ask("I am ann@example.org"), "Call +44 20 7946 0958, ann@example.org", "m")
    log.rate("x1", "198.51.100.7", 1, better="Write to bob@example.org")
    log.rate("x1", "198.51.100.7", -1)
    log.rate("x1", "198.51.100.8", -1)
    text = log.path.read_text()
    assert text.count("<EMAIL>") == 7 and text.count("<PHONE>") == 3
    assert not any(word in text for word in ("ann@", "bob@", "20 7946", "198.51.100"))
    first, second, third = (json.loads(line)["client"] for line in text.splitlines())
    assert first == second != third
    assert FeedbackLog(log.path).pseudonym("198.51.100.7") != first  # another start, another name


@pytest.mark.parametrize("words, problem", [
    (dict(rating=5), "rating=5 must be 1 or -1"), (dict(rating=True), "rating=True must be"),
    (dict(rating="1"), "must be 1 or -1"), (dict(), "give a rating"), (dict(better=" "), "give a"),
    (dict(better=["x"]), "better must be a text"), (dict(better="x" * 20_001), "up to 20,000"),
    (dict(id="x2", rating=1), "id='x2' is no answer"), (dict(id=["x"], rating=1), "is no answer")])
def test_what_is_no_rating_is_refused_and_leaves_no_trace(words, problem, tmp_path):
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.remember("x1", ask("Where?"), "There.", "run")
    with pytest.raises(ValueError, match=problem.replace("[", r"\[")):
        log.rate(**dict(id="x1", client="c") | words)
    assert log.path.stat().st_size == 0


def test_one_client_rates_so_many_answers_an_hour_and_others_go_on(tmp_path):
    now = [0.0]
    log = FeedbackLog(tmp_path / "log.jsonl", per_hour=3, clock=lambda: now[0])
    log.remember("x1", ask("Where?"), "There.", "run")
    for client in "aaabbb":
        log.rate("x1", client, 1)
    with pytest.raises(TooMany, match="3 ratings an hour"):
        log.rate("x1", "a", 1)
    log.rate("x1", "c", 1)
    now[0] = 3601.0
    log.rate("x1", "a", 1)
    assert len(log.path.read_text().splitlines()) == 8


def test_a_full_log_refuses_and_stays_as_it_is(tmp_path):
    log = FeedbackLog(tmp_path / "log.jsonl", max_bytes=400)
    log.remember("x1", ask("Where?"), "There.", "run")
    with pytest.raises(ValueError, match="the feedback log is full: it may have 400 bytes"):
        for _ in range(10):
            log.rate("x1", "c", 1)
    assert 200 < log.path.stat().st_size <= 400 and read_votes(log.path)[1] == []


def test_a_log_that_cannot_be_written_is_an_error_before_anybody_rates(tmp_path):
    with pytest.raises(OSError):
        FeedbackLog(tmp_path / "none/log.jsonl")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_only_the_owner_reads_the_log(tmp_path):
    append_line(tmp_path / "log.jsonl", row("c", "q", "a", 1))
    assert stat.S_IMODE((tmp_path / "log.jsonl").stat().st_mode) == 0o600


def test_lines_of_many_threads_do_not_mix_and_half_a_line_costs_itself_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"client": "torn', "utf-8")
    threads = [threading.Thread(target=lambda i=i: [
        append_line(path, row(f"c{i}", "q" * 2000, f"{i} {k}", 1)) for k in range(20)])
        for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes, wrong = read_votes(path)
    assert {vote.answer for vote in votes} == {f"{i} {k}" for i in range(8) for k in range(20)}
    assert len(votes) == 160 and len(wrong) == 1 and "row 1" in wrong[0]


def test_only_the_last_answers_can_be_rated(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "REMEMBERED", 10_000)
    log = FeedbackLog(tmp_path / "log.jsonl")
    for i in range(100):
        log.remember(f"x{i}", ask("Where?"), "There.", "run")
    log.rate("x99", "c", 1)
    with pytest.raises(ValueError, match="no answer that can still be rated"):
        log.rate("x0", "c", 1)


# -----------------------------------------------------------------------------
# Votes and rows.


def test_liked_answers_become_chats_and_better_texts_pairs_as_well(tmp_path):
    chats, pairs = made(tmp_path, row("a", "q1", "good", 1), row("b", "q2", "bad", -1, "better"),
                        row("c", "q3", "meh", None, "fine"), row("d", "q4", "poor", -1))
    assert chats == [("q1", "good"), ("q2", "better"), ("q3", "fine")]
    assert pairs == [("q2", "better", "bad"), ("q3", "fine", "meh")]


def test_of_two_answers_to_a_question_the_liked_one_is_preferred_to_the_disliked_one(tmp_path):
    rows = [row(c, "q", a, r) for c, a, r in [
        ("a", "good", 1), ("b", "good", 1), ("c", "ok", 1), ("d", "bad", -1), ("e", "bad", -1),
        ("f", "poor", -1), ("g", "good", -1), ("h", "good", 1)]]
    for seed in range(5):
        Random(seed).shuffle(rows)
        chats, pairs = made(tmp_path, *rows)
        assert {*chats} == {("q", "good"), ("q", "ok")} and pairs == [("q", "good", "bad")]


def test_equal_and_opposite_ratings_teach_nothing(tmp_path):
    assert made(tmp_path, row("a", "q", "x", 1), row("b", "q", "x", -1),
                row("c", "q", "y", 1), row("d", "q", "z", 1)) == (
        [("q", "y"), ("q", "z")], [])
    assert made(tmp_path, row("a", "q", "x", -1, "y"), row("b", "q", "y", -1, "x"))[1] == []
    assert made(tmp_path, row("a", "q", "x", -1, "x"))[1] == []  # its own text is no better one


def test_a_client_that_changes_its_mind_counts_once_and_its_better_text_stays(tmp_path):
    rows = [row("a", "q", "x", 1), row("a", "q", "x", None, "better"), row("a", "q", "x", -1)]
    votes, n_left_out = last_votes(read_votes(written(tmp_path, *rows))[0], 1)
    assert [vote[3:] for vote in votes] == [("a", -1, "better")] and n_left_out == 0


def test_a_client_that_rates_a_thousand_times_weighs_no_more_than_its_limit(tmp_path):
    spam = [row("s", "q", "bad", 1)] * 1000 + [row("s", f"q{i}", "bad", 1) for i in range(1000)]
    honest = [row(client, "q", "bad", -1) for client in "ab"] + [row("c", "q", "good", 1)]
    chats, pairs = made(tmp_path, *spam, *honest, per_client=10)
    assert len(chats) == 10 and ("q", "bad") not in chats  # nine of its own questions, and "good"
    assert pairs == [("q", "good", "bad")]


BROKEN = [[], "x", {}, row("a", "q", "x", 2), row("a", "q", "x", True), row(1, "q", "x", 1),
          row("a", "q", "x", 1) | dict(messages=[]), row("a", "q", None, 1),
          row("a", "q", "x", 1) | dict(messages=[dict(role="assistant", content="q")]),
          row("a", "q", "x", 1) | dict(arm=None), row("a", "q", "x", 1, better=3)]


@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_row_is_left_out_with_its_place(value, tmp_path):
    votes, wrong = read_votes(written(tmp_path, row("a", "q", "x", 1), value))
    assert len(votes) == 1 and len(wrong) == 1 and "feedback.jsonl, row 2: " in wrong[0]


# -----------------------------------------------------------------------------
# The command.


def test_the_command_writes_rows_that_train_and_align_read_and_counts_them(call, tmp_path):
    path = written(tmp_path, row("a", "q1", "good", 1), row("b", "q2", "bad", -1, "better"),
                   row("c", "q3", "x", 1), row("d", "q3", "x", -1), {})
    out = tmp_path / "out"
    said = call(feedback, path, f"--out={out}")
    assert "4 rows, 4 of them count" in said.out and "1 answers have as many" in said.out
    assert f"{out}/chats.jsonl: 2 chats\n{out}/pairs.jsonl: 1 pairs\n" in said.out
    assert "1 of 5 rows are left out" in said.err
    assert len([*read_rows(out / "chats.jsonl", take_chat)]) == 2
    assert [*read_rows(out / "pairs.jsonl", take_pair)] == [(ask("q2"), "better", "bad")]


def test_rows_of_an_earlier_log_do_not_stay(call, tmp_path):
    call(feedback, written(tmp_path, row("b", "q2", "bad", -1, "good")), f"--out={tmp_path}/out")
    said = call(feedback, written(tmp_path, row("b", "q", "fine", 1)), f"--out={tmp_path}/out").out
    assert "pairs.jsonl: 0 pairs, so it is not written" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chats.jsonl"]


@pytest.mark.parametrize("words, problem", [
    ([], "name the log"), (["none.jsonl"], "none.jsonl: no such file"),
    (["{log}"], "nobody liked an answer"), (["{log}", "--per_client=0"], "at least 1")])
def test_a_mistake_is_one_line(words, problem, tmp_path, monkeypatch, capsys):
    log = written(tmp_path, row("a", "q", "x", -1))
    code, (*_, line) = mistake(feedback.main, monkeypatch, capsys,
                               *(word.format(log=log) for word in words))
    assert code == 1 and problem in line
    assert not (tmp_path / "feedback").exists()


@pytest.mark.slow
def test_a_day_of_feedback_goes_through_the_commands_into_two_better_runs(call, tmp_path):
    """Each user says whether the answer was right, and what would have been."""
    tokenizer = Tokenizer([])
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=64), tmp_path / "run")
    tokenizer.save(tmp_path / "run/tokenizer.json")
    write_json(tmp_path / "run/config.json", {})
    log = FeedbackLog(tmp_path / "log.jsonl")
    for i in range(120):
        right, answer = f"In aisle {i % 5}.", ["In aisle 0.", "Nobody knows!"][i % 2]
        log.remember(f"x{i}", ask(f"Where is good {i}?"), answer, "run")
        if answer == right:
            log.rate(f"x{i}", f"client {i % 20}", 1)
        else:
            log.rate(f"x{i}", f"client {i % 20}", -1, better=right)
    out = tmp_path / "rows"
    said = call(feedback, log.path, f"--out={out}").out
    assert "120 rows, 120 of them count" in said and "chats.jsonl: 120 chats" in said

    def python(*words):
        done = run(*words, f"--init={tmp_path}/run" if words[0] == "train.py" else "--seed=0",
                   "--batch_size=8", "--max_steps=15", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python("train.py", f"--data={out}/chats.jsonl", "--out=runs/b", "--micro_batch_size=8")
    said = python("chapters/align.py", "dpo", "run", f"--data={out}/pairs.jsonl", "--out=runs/c",
                  "--learning_rate=0.01")
    before, after = (float(line.split("accuracy ")[1].split(" ")[0]) for line in said.splitlines()
                     if line.startswith(("before", "after")))
    assert before == 0.5 and after > 0.7  # before the first step nobody has gained
    for name in "bc":
        assert [*(tmp_path / "runs" / name).glob("step_000015.safetensors")]
