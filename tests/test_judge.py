"""chapters/judge.py, dialogue.py: who wins, what the order does to a judge, what is recalled."""

import json
import re

import pytest
from test_talk import folder, serve  # noqa: F401  these are fixtures

from chapters import judge
from chapters.dialogue import FACTS, N_TURNS, measure, recalls, repetition, script, summarize
from chapters.judge import compare, grade, grade_gap, mean_grade, summarize_games
from chapters.questions import bracketed, read_questions
from chapters.talk import converse

QUESTION = dict(question_id=1, category="math", turns=["1 + 1?", "And twice that?"],
                reference=["2", "4"])


class Judge:
    """A judge that says what decide(the last answer of each as they are shown) gives."""
    short = True

    def __init__(self, decide):
        self.decide, self.read = decide, []

    def judge(self, text, choices):
        self.read.append(text)
        return self.decide(*dict(re.findall(r"^(Assistant.*?): (.*)", text, re.M)).values())


def longer(a, b):
    return "[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"


def games(decide, pairs):
    """One turn each of so many questions, judged."""
    return [compare(Judge(decide), QUESTION | dict(question_id=i), 0, dict(A=[a], B=[b]))
            for i, (a, b) in enumerate(pairs)]


# -----------------------------------------------------------------------------
# Pairs and grades.


def test_a_judge_that_always_prefers_the_first_decides_nothing():
    summary = summarize_games(games(lambda a, b: "[[A]]", [("x", "yy")] * 8))
    assert summary["win_rate"]["value"] == 0.5 and summary["wins"] == dict(A=0, B=0, tie=8)
    assert summary["first_preferred"]["value"] == 1 and summary["agreement"]["value"] == 0


def test_a_judge_that_looks_at_the_answers_agrees_with_itself():
    summary = summarize_games(games(longer, [("xx", "y")] * 3 + [("x", "yy")] + [("x", "y")] * 4))
    assert summary["wins"] == dict(A=3, B=1, tie=4) and summary["agreement"]["value"] == 1
    assert summary["win_rate"]["value"] == 5 / 8 and summary["first_preferred"]["value"] == 0.5


def test_each_pair_is_shown_in_both_orders():
    reader = Judge(longer)
    compare(reader, QUESTION, 1, dict(A=["one", "two"], B=["three", "four"]))
    first, second = (text.index("one") < text.index("three") for text in reader.read)
    assert first and not second and all("two" in text and "four" in text for text in reader.read)
    assert all("A right answer: 4" in text for text in reader.read)


def test_a_verdict_that_is_missing_once_is_a_tie_and_counted():
    summary = summarize_games(games(lambda a, b: "[[A]]" if a == "x" else "I cannot say", [
        ("x", "yy")] * 4) + games(longer, [("xx", "y")]))
    assert summary["wins"] == dict(A=1, B=0, tie=4) and summary["no_verdict"] == 4
    assert summary["agreement"]["n"] == 1
    with pytest.raises(ValueError, match="no verdict"):
        summarize_games(games(lambda a, b: "", [("x", "yy")]))


def test_two_turns_of_a_question_do_not_make_an_interval_narrower():
    one = games(longer, [("xx", "y")] * 4)
    width = [score["high"] - score["low"] for score in (
        summarize_games(rows)["win_rate"] for rows in (one, one + one))]
    assert width[0] == width[1]


@pytest.mark.parametrize("text, verdict", [
    ("Both fail. [[C]]", "C"), ("[[A]]? No: [[ B ]]", "B"), ("[[7.5]]", "7.5"), ("A wins", None)])
def test_the_last_bracketed_word_is_the_verdict(text, verdict):
    assert bracketed(text) == verdict


@pytest.mark.parametrize("said, number", [("So [[7]]", 7), ("[[11]]", None), ("[[good]]", None),
                                          ("seven", None), ("[[nan]]", None)])
def test_a_grade_is_from_1_to_10(said, number):
    grader = Judge(lambda *answers: said)
    assert grade(grader, QUESTION, 0, ["two"])["grade"] == number


def test_grades_are_averaged_and_compared_in_pairs():
    def rows(*grades):
        return [dict(question=i // 2, turn=1 + i % 2, grade=n) for i, n in enumerate(grades)]
    high, low = rows(9, 8, 7, None), rows(6, 5, 4, 3)
    score, gap = mean_grade(high), grade_gap(high, low)
    assert score["value"] == 8 and score["no_grade"] == 1 and score["by_turn"] == {1: 8, 2: 8}
    assert gap == dict(value=3, low=3, high=3)


def test_the_questions_have_two_turns_each_in_eight_categories():
    questions = read_questions()
    assert len(questions) == 16 and len({q["category"] for q in questions}) == 8
    assert all(len(q["turns"]) == 2 and len(q.get("reference", [])) in (0, 2) for q in questions)


@pytest.mark.parametrize("line", [
    '{"question_id": 1', '[]', '{"question_id": 1, "category": "x"}', '"text"', "\xff",
    '{"question_id": 1, "category": "x", "turns": []}',
    '{"question_id": [], "category": "x", "turns": ["a"]}',
    '{"question_id": 1, "category": "x", "turns": ["a"], "reference": "b"}'])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_bytes((json.dumps(QUESTION) + "\n" + line).encode("latin-1"))
    with pytest.raises(ValueError, match="line 2"):
        read_questions(path)


# -----------------------------------------------------------------------------
# Dialogues.


class Perfect:
    """Answers each question about itself with the sentence it was told."""

    def answer(self, messages):
        told = [m["content"] for m in messages if m["role"] == "user"]
        tell = {ask: text.split("{}")[0] for text, ask, _ in FACTS}.get(told[-1])
        return next((text for text in told if tell and text.startswith(tell)), "Yes.")


class Forgetful(Perfect):
    """Perfect, but of the last few turns alone."""

    def answer(self, messages):
        return super().answer(messages[-11:])


def recall(model, n=3):
    dialogues = [measure(turns, converse(model, [turn["text"] for turn in turns]))
                 for turns in map(script, range(n))]
    return summarize(dialogues)


def test_a_script_asks_each_fact_back_at_another_distance():
    turns = script(0)
    distances = [turn["distance"] for turn in turns if "value" in turn]
    assert len(turns) == N_TURNS and len(set(distances)) == len(FACTS) == 9
    assert script(0) == turns != script(1) and min(distances) == 1 and max(distances) == 24


def test_a_perfect_talker_recalls_all_and_a_forgetful_one_what_is_near():
    assert recall(Perfect())["recall"]["value"] == 1
    near = recall(Forgetful())["recall_by_distance"]
    assert all(point["value"] == (distance <= 5) for distance, point in near.items())


@pytest.mark.parametrize("reply, right", [
    ("It is GREEN!", True), ("green or purple", False), ("Greenish", False), ("", False)])
def test_naming_all_colours_is_no_recall(reply, right):
    assert recalls(dict(value="green", others=["purple", "blue"]), reply) == right


def test_repetition_counts_what_was_said_before():
    assert repetition(["a b a b", "a b"], 2) == [(pytest.approx(1 / 3), 0), (0, 1)]
    assert repetition(["a b c d e", "", "f g h i"]) == [(0, 0), (0, 0), (0, 0)]
    assert repetition(["Yes.", "Yes."]) == [(0, 0), (0, 1)]


# -----------------------------------------------------------------------------
# The command.


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = (json.dumps(QUESTION | dict(question_id=i)) + "\n" for i in range(2))
    path.write_text("".join(rows), "utf-8")
    return path


def test_two_are_compared_and_the_answers_kept(folder, serve, questions, tmp_path, call,
                                               monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    url, _ = serve(lambda body: "[[A]]" if "[[A]]" in str(body) else "Four.")
    shown, _ = call(judge, folder, url, f"--judge={url}", f"--questions={questions}",
                    "--max_tokens=8", f"--key={url.split('/')[2]}=MY_KEY", f"--out={tmp_path}")
    text = (tmp_path / "judge.json").read_text("utf-8")
    report = json.loads(text)["report"]
    assert "win rate of A: 50.0%" in shown and "prefers what stands first 100.0%" in shown
    assert len(report["games"]) == 4 and report["games"][0]["answers"]["B"] == "Four."
    assert "secret" not in text and "MY_KEY" not in text


def test_grades_and_a_run_as_judge(folder, serve, questions, tmp_path, call):
    url, _ = serve(lambda body: "Good. [[8]]")
    words = f"--questions={questions}", "--max_tokens=8", f"--out={tmp_path}"
    assert "grade 8.00 [8.00, 8.00]" in call(judge, url, "--grade", f"--judge={url}", *words)[0]
    shown, _ = call(judge, folder, url, "--grade", f"--judge={folder}", *words)
    report = json.loads((tmp_path / "grades.json").read_text("utf-8"))["report"]
    assert "A is better than B by" in shown
    assert all(1 <= row["grade"] <= 10 for row in report["A"]["grades"])


def test_dialogues_are_kept_and_drawn(serve, tmp_path, call):
    url, _ = serve()
    shown, _ = call(judge, url, url, "--dialogue", "--n_dialogues=1", f"--out={tmp_path}")
    report = json.loads((tmp_path / "dialogue.json").read_text("utf-8"))["report"]
    assert len(report["B"]["dialogues"][0]) == N_TURNS and "B " + url in shown
    assert (tmp_path / "dialogue.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, message", [
    (["runs/a", "runs/b"], "someone must judge"), (["runs/a", "--judge=x"], "two are compared"),
    (["runs/a", "--dialogue", "--grade"], "by itself"),
    (["runs/none", "--dialogue"], "no run folder"),
    (["runs/a", "--dialogue", "--n_dialogues=0"], "n_dialogues=0 must be at least 1"),
    (["runs/a", "--dialogue", f"--n_dialogues={10**19}"], "below 1001"),
    (["runs/a", "--dialogue", "--max_tokens=0"], "max_tokens=0"),
    (["runs/a", "--dialogue", f"--seed={10**19}"], f"seed={10**19} must be at least 0 and below"),
    (["runs/a", "--dialogue", "--temperature=nan"], "temperature=nan must be"),
    (["runs/a", "--dialogue", "--timeout=0"], "timeout=0.0 must be above 0"),
    (["runs/a", "--dialogue", "--questions=q.jsonl"], "--questions would not act beside --dial"),
    (["runs/a", "runs/b", "--judge=x", "--n_dialogues=2"], "would not act without --dialogue"),
    (["http://u:p@x/v1", "--dialogue"], "no password"),
    (["http://", "--dialogue"], "a URL is like"),
    (["runs/a", "--dialogue", "--key=a=PATH"], "none of the URLs"),
    (["runs/a", "--dialogue", "--dialog"], "did you mean --dialogue?")])
def test_a_users_mistake_ends_in_one_line(tmp_path, monkeypatch, call, words, message):
    monkeypatch.chdir(tmp_path)
    _, error = call(judge, *words)
    assert message in error and "Traceback" not in error


def test_a_judge_that_gives_no_verdict_is_found_out_before_any_answer(serve, call):
    (url, requests), (other, _) = serve(), serve(lambda body: "Hard to say.")
    _, error = call(judge, url, url, f"--judge={other}")
    assert "the judge gives no verdict" in error and not requests
