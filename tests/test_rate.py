"""chapters/rate.py: votes are kept and come once, answers have no names, ratings are right."""

import json
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from random import Random

import numpy as np
import pytest
from conftest import keep, tiny

from chapters import rate
from chapters.questions import read_prompts
from chapters.rate import (Session, append_vote, bradley_terry, count_wins, elo, make_vote,
                           read_votes, report)
from chapters.voting import (make_server, printable, rate_in_browser, rate_in_terminal,
                             side_by_side)
from tokenizer import write_json


class Echo:
    """Answers with its word and what it was asked."""

    def __init__(self, word):
        self.word = word

    def answer(self, messages):
        return f"{self.word} {messages[-1]['content']}"


MODELS = {"runs/good": Echo("yes"), "runs/bad": Echo("<b>no</b> & \x1b[2J")}


@pytest.fixture
def session(tmp_path):
    return Session(MODELS, ["one", "two", "three"], tmp_path / "votes.jsonl", seed=0)


@pytest.fixture
def keys(monkeypatch):
    """keys("ab") are pressed one after the other; then the input ends."""
    def keys(letters):
        letters = iter(letters)

        def press(prompt):
            for letter in letters:
                return letter
            raise EOFError
        monkeypatch.setattr("builtins.input", press)
    return keys


def votes(*winners, shown=("a", "b")):
    return [dict(prompt=str(i), shown=[*shown], winner=winner) for i, winner in enumerate(winners)]


# -----------------------------------------------------------------------------
# Votes.


def test_a_vote_is_a_row_that_preference_training_takes(session):
    _, prompt, shown, answers = session.now
    session.vote(0, "b")
    row, = read_votes(session.path)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, answers[1], answers[0])
    assert row["winner"] == shown[1] and row["shown"] == shown and row["seed"] == 0


@pytest.mark.parametrize("vote", ["tie", "skip"])
def test_ties_and_skips_are_kept_without_a_pair(session, vote):
    session.vote(0, vote[0])
    row, = read_votes(session.path)
    assert row["winner"] == vote and not {"chosen", "rejected"} & set(row)


def test_no_question_comes_twice(session, tmp_path):
    session.vote(0, "s")
    session.vote(1, "a")
    again = Session(MODELS, ["one", "two", "three", "two"], session.path, seed=0)
    assert again.prompts == ["three"] and (again.start, again.n) == (2, 3)
    again.vote(0, "t")
    assert Session(MODELS, ["one", "two", "three"], session.path, seed=0).now is None
    assert len(read_votes(session.path)) == 3


def test_other_models_are_asked_anew(session):
    session.vote(0, "a")
    others = {"runs/good": Echo("yes"), "runs/new": Echo("no")}
    assert len(Session(others, ["one", "two"], session.path, seed=0).prompts) == 2


def test_a_second_click_is_no_vote(session):
    session.vote(0, "a")
    session.vote(0, "b")
    assert len(read_votes(session.path)) == 1 and session.now[0] == 1


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(tmp_path):
    same = dict(a=Echo("yes"), b=Echo("yes"))
    session = Session(same, ["one", "two"], tmp_path / "votes.jsonl", seed=0)
    assert session.now is None
    assert [row["winner"] for row in read_votes(session.path)] == ["tie", "tie"]


@pytest.mark.slow
def test_the_order_is_random_and_the_same_again(tmp_path):
    def orders(seed):
        session = Session(MODELS, map(str, range(40)), tmp_path / f"{seed}.jsonl", seed)
        for i in range(40):
            yield session.now[2][0]
            session.vote(i, "s")
    first = [*orders(1)]
    (tmp_path / "1.jsonl").unlink()
    assert first == [*orders(1)] != [*orders(2)] and 8 < first.count("runs/good") < 32


def test_a_row_cut_off_by_hand_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(votes("a")[0]), "utf-8")  # without a new line at its end
    append_vote(path, make_vote("2", ["a", "b"], ["x", "\ud800"], 0, seed=0))
    assert [row["winner"] for row in read_votes(path)] == ["a", "a"]


@pytest.mark.parametrize("line", ['{"prompt": "x"', "[]", "{}", "\xff", json.dumps(dict(
    prompt="x", shown=["a", "a"], winner="a")), json.dumps(dict(
        prompt="x", shown=["a", "b"], winner="c"))])
def test_a_line_that_is_no_vote_is_named(tmp_path, line):
    path = tmp_path / "votes.jsonl"
    path.write_bytes((json.dumps(votes("a")[0]) + "\n" + line).encode("latin-1"))
    with pytest.raises(ValueError, match="line 2"):
        read_votes(path)


# -----------------------------------------------------------------------------
# Ratings.


def test_ratings_predict_the_share_of_wins():
    wins = np.array([[0, 75_000], [25_000, 0]])
    (a, b), _ = bradley_terry(wins)
    assert 1 / (1 + 10 ** ((b - a) / 400)) == pytest.approx(0.75, abs=1e-3)
    assert a + b == pytest.approx(2000)


def test_ratings_find_the_strengths_that_games_were_drawn_from():
    random, true = Random(0), dict(a=1200, b=1000, c=800)
    rows = []
    for _ in range(6000):
        x, y = random.sample(sorted(true), 2)
        x_wins = random.random() < 1 / (1 + 10 ** ((true[y] - true[x]) / 400))
        rows += votes(x if x_wins else y, shown=(x, y))
    scores = elo(rows)
    assert [*scores] == ["a", "b", "c"]
    assert all(score["low"] < true[name] < score["high"] for name, score in scores.items())


def test_who_has_won_all_is_not_rated_infinite():
    one, ten = (elo(votes(*["a"] * n))["a"] for n in (1, 10))
    assert 1000 < one["value"] < ten["value"] < 2000 and one["low"] < 1000 < ten["low"]


def test_ties_are_half_a_win_for_each():
    assert count_wins(votes("tie", "a"), ["a", "b"]).tolist() == [[0, 1.5], [0.5, 0]]
    assert elo(votes("tie", "tie"))["b"]["value"] == pytest.approx(1000)


def test_the_report_counts_each_pair():
    rows = votes("a", "a", "tie", "skip", "b") + votes("c", shown=("c", "a"))
    lines = report(rows)
    assert lines[0] == "5 votes, 1 skipped"
    assert lines[1].startswith("a against b: 2 wins, 1 losses, 1 ties, win rate 62.5%")
    assert lines[2].startswith("a against c: 0 wins, 1 losses, 0 ties, win rate 0.0%")
    assert "first shown was chosen 75.0%" in lines[-1]


# -----------------------------------------------------------------------------
# The terminal.


def test_keys_vote_and_whose_the_answers_are_stays_hidden(session, keys, capsys):
    keys(["x", "a", "t", "q"])
    rate_in_terminal(session)
    shown = capsys.readouterr().out
    assert [row["winner"] in MODELS for row in read_votes(session.path)] == [True, False]
    assert "runs/" not in shown and "\x1b" not in shown and "3 of 3" in shown


def test_the_end_of_the_input_ends_a_session(session, keys):
    keys(["b"])
    rate_in_terminal(session)
    assert len(read_votes(session.path)) == 1


def test_two_texts_stand_side_by_side():
    lines = side_by_side("one two three " * 9, "x\n\ny", 41).splitlines()
    assert lines[0] == "A" + " " * 19 + "| B" and all(len(line) <= 41 for line in lines)
    assert lines[2].endswith("| x") and lines[4].endswith("| y")
    assert printable("a\x1b[31m\nb\u202e") == "a [31m\nb "


# -----------------------------------------------------------------------------
# The page.


@pytest.fixture
def server(session):
    server = make_server(session)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url, form=None, **headers):
    """-> (status, text) of a GET, or with a form of a POST."""
    data = None if form is None else urllib.parse.urlencode(form).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_page_shows_escaped_answers_and_no_names(server):
    status, text = ask(server.url)
    assert status == 200 and "&lt;b&gt;no&lt;/b&gt; &amp;" in text and "<b>" not in text
    assert "runs/" not in text and "http" not in text


def test_a_vote_on_the_page_is_saved_and_the_next_question_shown(server, session):
    own = server.url.split("/?")[0]
    status, text = ask(server.url, dict(number=0, vote="a"), Origin=own)
    assert status == 200 and "2 of 3" in text and len(read_votes(session.path)) == 1


@pytest.mark.parametrize("headers", [
    dict(Origin="http://evil.example"), dict(Origin="null"), dict(Host="evil.example")])
def test_a_vote_from_another_site_is_refused(server, session, headers):
    status, _ = ask(server.url, dict(number=0, vote="a"), **headers)
    assert status == 403 and not read_votes(session.path)


@pytest.mark.parametrize("token", ["", "?token=", "?token=guess", "?token=%FF"])
def test_nobody_without_the_token_sees_or_votes(server, session, token):
    url = server.url.split("?")[0] + token
    assert ask(url)[0] == 403 and "yes" not in ask(url)[1]
    assert ask(url, dict(number=0, vote="a"))[0] == 403 and not read_votes(session.path)


@pytest.mark.parametrize("form", [dict(), dict(vote="a"), dict(number=0, vote="z"),
                                  dict(number="x", vote="a"), dict(number=7, vote="a")])
def test_what_is_no_vote_changes_nothing(server, session, form):
    assert "1 of 3" in ask(server.url, form or dict(other=1))[1] and not read_votes(session.path)


def test_a_vote_of_a_megabyte_is_not_read(server):
    assert ask(server.url, dict(number=0, vote="a" * 5000))[0] == 400


def test_the_page_ends_with_the_report(server):
    for number in range(3):
        _, text = ask(server.url, dict(number=number, vote="t"))
    assert "3 votes, 0 skipped" in text and "runs/good against" not in text.split("Thank you")[0]


def test_a_port_that_is_taken_is_refused_in_a_line(server, session):
    port = server.server_port
    with pytest.raises(ValueError, match=f"port={port} cannot be used .*give another --port"):
        rate_in_browser(session, port)


def test_stop_ends_the_page_early(server, session):
    _, text = ask(server.url, dict(number=0, vote="q"))
    assert "no votes yet" in text and session.now[0] == 0


# -----------------------------------------------------------------------------
# The command.


@pytest.mark.parametrize("name, text, prompts", [
    ("x.txt", "one\n\n two\n", ["one", " two"]), ("x.jsonl", '{"prompt": "one"}\n', ["one"]),
    ("x.jsonl", '{"question_id": 1, "category": "x", "turns": ["one", "two"]}', ["one"])])
def test_prompts_are_lines_or_rows(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text, "utf-8")
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize("text", ["", "[]", '{"prompt": 1}', '{"prompt": ""}', '{"turns": 1}'])
def test_a_file_without_prompts_is_refused(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text, "utf-8")
    with pytest.raises(ValueError, match="x.jsonl"):
        read_prompts(tmp_path / "x.jsonl")


def test_two_base_models_go_on_with_held_out_text(shards, model, tmp_path, call, keys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        keep(tiny(vocab_size=model.config.vocab_size, block_size=64, seed=seed), tmp_path / name)
        shutil.copy(shards / "tokenizer.json", tmp_path / name)
        write_json(tmp_path / name / "config.json", dict(data=dict(path=str(shards))))
    keys(["a", "b", "t"])
    shown, _ = call(rate, "a/", "b", "--max_tokens=4", "--n_prompts=3")
    assert "a against b" in shown and shown.rstrip().endswith("votes: votes.jsonl")
    again, _ = call(rate, "--votes=votes.jsonl")
    assert again.splitlines()[0] in shown and "Elo" in again


@pytest.mark.parametrize("words, message", [
    ([], "holds no votes"), (["a"], "two different models"), (["a", "a/"], "two different models"),
    (["a", "b"], "no run folder a"), (["a", "b", "c"], "two different models"),
    (["--votes=x.jsonl"], "line 1"), (["--vote=x"], "did you mean --votes?"),
    (["a", "b", "--page", "--port=99999"], "port=99999 must be at least 0 and below 65536"),
    (["--page", "--port=-1"], "port=-1 must be at least 0"),
    (["--page", f"--port={10**19}"], "must be at least 0 and below 65536"),
    (["a", "b", "--port=8000"], "--port would not act without --page: leave it out"),
    (["--page"], "--page would not act without two models"),
    (["a", "b", "--n_prompts=0"], "n_prompts=0 must be at least 1")])
def test_a_users_mistake_ends_in_one_line(tmp_path, monkeypatch, call, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}", "utf-8")
    _, error = call(rate, *words)
    assert message in error and "Traceback" not in error
