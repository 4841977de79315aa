"""The leaves of evaluate.py: rows as they are published, questions and scores as
lm-evaluation-harness has them, programs run in a box, small tasks, texts compared, overlap."""

import itertools
import json
import math
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from conftest import keep

import evaluate
from chapters import card, exams
from chapters.box import pass_at_k, run_program
from chapters.card import calibration_error, overlaps, score_calibrated
from chapters.exams import (EXAMS, TASKS, download_questions, exact_match, find_number,
                            format_question, solved, split_examples, with_examples)
from chapters.probes import ROWS as PROBES
from chapters.probes import bleu, f1, rouge_l
from chapters.prompts import format_row, read_rows
from data import read_card, read_split
from evaluate import interval, pairs_of
from tokenizer import write_json

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy, in one process

ROWS = {  # one row of each task, in the words of its data set
    "arc_easy": dict(id="1", question="What melts ice?", answerKey="2",
                     choices=dict(text=["cold", "heat"], label=["1", "2"])),
    "hellaswag": dict(ind=1, activity_label="Baking", ctx_a="[header] How to bake [title] Mix it.",
                      ctx_b="the oven", ctx="", label="1",
                      endings=[" [step] is  cold.", "is hot.", "sings. [substeps] Well.", "is."]),
    "mmlu": dict(question=" What is 2 + 2? ", subject="high_school_mathematics", answer=3,
                 choices=["1", "2", "3", "4"]),
    "truthfulqa_mc1": dict(
        question="Is the moon made of cheese?",
        mc1_targets=dict(choices=["No, of rock", "Yes"], labels=[1, 0]),
        mc2_targets=dict(choices=["No, of rock", "It is not", "Yes"], labels=[1, 1, 0])),
    "piqa": dict(goal="Boil water", sol1="Use a stove.", sol2="Use a fridge.", label=0),
    "winogrande": dict(sentence="The cup does not fit because _ is too big.", option1="it",
                       option2="the box", answer="1"),
    "lambada": dict(text="He gave the cap to Hansum, and so the cap was with Hansum"),
    "boolq": dict(passage="Bees make honey.", question="do bees make honey", idx=0, label=1),
    "gsm8k": dict(question="Two cats have how many tails?", answer="One each.\n#### 2"),
    "humaneval": dict(task_id="HumanEval/0", prompt="def one():\n", entry_point="one",
                      canonical_solution="    return 1\n",
                      test="def check(candidate):\n    assert candidate() == 1\n"),
}
ROWS |= {"arc_challenge": ROWS["arc_easy"], "truthfulqa_mc2": ROWS["truthfulqa_mc1"]}

# -----------------------------------------------------------------------------
# From rows to questions.


@pytest.mark.parametrize("name, text", {
    "arc_easy": "Question: What melts ice?\nAnswer: heat",
    "hellaswag": "Baking: How to bake. Mix it. The oven is hot.",
    "mmlu": "What is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D",
    "piqa": "Question: Boil water\nAnswer: Use a stove.",
    "winogrande": "The cup does not fit because it is too big.",
    "lambada": ROWS["lambada"]["text"],
    "boolq": "Bees make honey.\nQuestion: do bees make honey?\nAnswer: yes",
    "gsm8k": "Question: Two cats have how many tails?\nAnswer: One each.\n#### 2"}.items())
def test_a_solved_question_reads_as_the_field_writes_it(name, text):
    assert solved(format_question(name, ROWS[name])) == text


def test_every_benchmark_has_a_row_here_and_makes_a_question_of_it():
    assert {*ROWS} == {*EXAMS} - {"rows"}
    assert all(format_question(name, row) for name, row in ROWS.items())


def test_the_blank_of_winogrande_is_filled_in_the_context_and_the_rest_is_scored():
    before = "The cup does not fit because "
    assert pairs_of(format_question("winogrande", ROWS["winogrande"])) == [
        (before + "it", " is too big."), (before + "the box", " is too big.")]


def test_ready_questions_of_other_benchmarks_are_asked_in_the_tasks_words():
    ready = {"query": "Question: What melts ice?", "choices": ["cold", "heat"], "gold": 1}
    asked = [format_question("arc_easy", row) for row in (ready, ROWS["arc_easy"])]
    assert pairs_of(asked[0]) == pairs_of(asked[1])


@pytest.mark.parametrize("row", [ROWS["arc_easy"],
                                 dict(query="海上明月", choices=["共", "a"], gold=1)])
def test_a_row_of_any_form_may_say_what_stands_before_its_choices(row):
    question = format_question("arc_easy", row | dict(between="--"))
    assert all(end.startswith("--") for _, end in pairs_of(question))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_lacks_a_part_or_has_one_of_another_kind_is_refused(name):
    row, wrong = ROWS[name], [[], None, "query"]
    for part in ("choices", "endings", "question", "goal", "sentence", "text", "passage", "prompt"):
        if part in row:
            wrong += [row | {part: value} for value in (None, 3, [], {})]
            wrong.append({key: row[key] for key in row if key != part})
    for bad in wrong:
        with pytest.raises(ValueError, match=f"this is no row of {name}"):
            format_question(name, bad)


def test_a_wrong_row_of_a_task_is_named_by_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROWS["piqa"]) + '\n{"goal": 1}', "utf-8")
    with pytest.raises(ValueError, match="x.jsonl, line 2 cannot be read: this is no row of piqa"):
        read_rows(tmp_path / "x.jsonl", partial(format_question, "piqa"))


def test_solved_examples_stand_before_a_question_and_have_its_topic():
    rows = [dict(ROWS["mmlu"], subject=topic, question=f"{topic} {i}?")
            for i in range(3) for topic in ("art", "law")]
    ready = [format_question("mmlu", row) for row in rows]
    examples, questions = split_examples(ready, 2)
    asked = with_examples(questions, examples, 2)
    assert len(examples) == 4 and len(asked) == 2
    assert asked[1]["context"] == "".join([
        "The following are multiple choice questions (with answers) about law.\n\n",
        *(solved(ready[i]) + "\n\n" for i in (1, 3)), ready[5]["context"]])


def test_exact_match_leaves_out_what_it_is_told_to():
    assert exact_match("The CAT", "the cat") == 1 and exact_match("cats", "cat") == 0
    assert exact_match("$1,000", "1000", [",", r"\$"]) == 1


@pytest.mark.parametrize("text, strict, flexible", [
    ("so 3 + 4 = 7.\n#### 7", "7", "7"), ("#### -1,200 or #### 3", "-1,200", "3"),
    ("that is $18.", "[invalid]", "$18."), ("none", "[invalid]", "[invalid]")])
def test_the_number_of_an_answer_is_behind_four_hashes_or_the_last(text, strict, flexible):
    found = [find_number(text, *rule) for rule in exams.NUMBERS.values()]
    assert found == [strict, flexible]


# -----------------------------------------------------------------------------
# Rows from the network.


@pytest.fixture
def server(monkeypatch):
    """A server that gives 250 rows of piqa as Hugging Face does."""
    class Rows(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
            start = int(asked["offset"])
            rows = [{"row_idx": i, "row": ROWS["piqa"] | {"goal": f"{asked['split']} {i}"}}
                    for i in range(start, min(250, start + int(asked["length"])))]
            body = json.dumps({"rows": rows, "num_rows_total": 250}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Rows)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(exams, "ROWS_URL", f"http://127.0.0.1:{server.server_port}/rows?")
    yield server
    server.shutdown()
    server.server_close()


def test_rows_are_downloaded_page_by_page_and_kept(server, tmp_path):
    questions = download_questions("piqa", "validation", folder=tmp_path)
    assert [question["context"] for question in questions] == [
        f"Question: validation {i}\nAnswer:" for i in range(250)]
    server.shutdown()
    server.server_close()
    assert download_questions("piqa", "validation", folder=tmp_path) == questions


def test_without_a_network_a_task_says_how_it_is_had_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exams, "ROWS_URL", "http://127.0.0.1:9/rows?")
    with pytest.raises(ValueError, match="no rows of piqa .*: --tasks=piqa --rows=FILE.jsonl"):
        download_questions("piqa", "validation", folder=tmp_path)


# -----------------------------------------------------------------------------
# Programs in a box.


def test_a_right_solution_passes_its_tests_and_a_wrong_one_does_not():
    question = format_question("humaneval", ROWS["humaneval"])
    assert run_program(f"{question['context']}{question['target']}\n{question['check']}")
    assert not run_program(f"{question['context']}    return 2\n{question['check']}")


@pytest.mark.parametrize("program", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "1 +", "raise KeyError",
    "import socket; socket.create_connection(('127.0.0.1', 80))", "import os; os.system('ls')",
    "import subprocess; subprocess.run(['ls'])", "import os; os.kill(os.getppid(), 15)",
    "open('x', 'w')", "import pathlib; pathlib.Path('program.py').unlink()", "import numpy"])
def test_a_program_that_stops_early_or_reaches_out_of_its_box_fails(program):
    assert not run_program(program)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits only the time")
@pytest.mark.parametrize("program", [
    "while True: pass", "x = bytearray(1 << 31)", "while True: print('x' * 10**6)"])
def test_a_program_that_takes_too_much_is_ended(program):
    assert not run_program(program, seconds=1)


# -----------------------------------------------------------------------------
# Small tasks.

SENTENCES = ["the cat sees a dog. ", "an old bird sings. ", "red trees grow up. ",
             "we like big green hills. ", "many small fish swim in deep water. "]
TEXTS = ["".join(Random(i).choices(SENTENCES, k=60)) for i in range(9)]


@pytest.mark.parametrize("name", sorted({*PROBES} - {"writing"}))
def test_small_tasks_are_sound_differ_by_seed_and_spread_their_answers(name):
    make = partial(PROBES[name], TEXTS, 40)
    assert make(seed=1) == make(seed=1) != make(seed=2)
    rows = make(seed=1)
    assert all(format_row(row) and len(row["choices"]) == 4 for row in rows)
    assert len(rows) < 20 or {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_rules_make_questions_whose_answers_are_right():
    for row in PROBES["arithmetic"](TEXTS, 20, 0):
        left, right = row["context"].splitlines()[-1].rstrip(" =").split(" + ")
        assert int(left) + int(right) == int(row["choices"][row["answer"]])
    for row in PROBES["brackets"](TEXTS, 20, 0):
        opened = [char for char in row["context"] if char in "([{"]
        assert [*row["choices"][row["answer"]]] == [")]}"["([{".index(c)] for c in opened[::-1]]


def test_facts_are_followed_by_one_word_wherever_they_stand():
    for row in PROBES["facts"](TEXTS, 20, 0):
        fact, words = row["context"].split(), " ".join(TEXTS).split()
        after = {c for a, b, c in zip(words, words[1:], words[2:]) if [a, b] == fact}
        assert row["choices"][row["answer"]] in after


@pytest.mark.parametrize("letters", ["春江潮水连海平上明月共生", "กขคงจฉชซฌญฎฏ"])
@pytest.mark.parametrize("name", sorted({*PROBES} - {"writing"}))
def test_small_tasks_are_made_of_a_text_without_spaces(name, letters):
    lines = ["".join(Random(i % 9).choices(letters, k=40)) for i in range(90)]
    rows = PROBES[name](["\n".join(lines)], 20, 0)
    assert all(format_row(row) and len({*row["choices"]} | {*row["context"]}) > 3 for row in rows)
    assert name in ("planted", "copying", "arithmetic") or not any(
        " " in end for row in rows for _, end in pairs_of(row))


@pytest.mark.parametrize("text", [
    "кот видит пса, старая птица поёт, красные деревья растут, холмы зелёные",
    "αυτό είναι ένα μικρό κείμενο που έχει δέκα λέξεις και λίγες ακόμα",
    "नमस्ते संसार यहाँ बहुत सारे शब्द लिखे हुए मिलते हैं"])
def test_letters_of_every_script_make_words(text):
    assert len(PROBES["copying"]([text], 5, 0)) == 5


@pytest.mark.parametrize("words", ["사람 시간 세계 나라 학교 친구 바다 하늘 나무",
                                   "मनुष्य किताब रास्ता पानी रोशनी माता पिता जंगल",
                                   "خَيْرٌ كِتَابٌ وَقْتٌ نُورٌ بَيْتٌ مَاءٌ طَرِيقٌ نَهْرٌ"])
@pytest.mark.parametrize("name", ["cloze", "planted", "copying", "brackets"])
def test_syllables_and_signs_on_letters_make_words(name, words):
    text = " ".join(Random(0).choices(words.split(), k=400))
    assert len(PROBES[name]([text], 5, 0)) == 5


def test_questions_by_a_rule_come_to_an_end():
    assert len(PROBES["arithmetic"]([], 10**9, 0)) == 10_000


@pytest.mark.parametrize("name", sorted({*PROBES} - {"arithmetic"}))
def test_a_text_that_is_too_short_for_a_small_task_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"leave {name} out of --tasks"):
        PROBES[name](["a b c"], 5, 0)


# -----------------------------------------------------------------------------
# Texts compared, and confidence.


def test_f1_by_hand():
    assert f1("The cat sat.", "a cat sat down") == pytest.approx(2 * (2 / 2 * 2 / 3) / (1 + 2 / 3))
    assert (f1("x", "y"), f1("", ""), f1("An apple!", "apple")) == (0, 0, 1)


def test_rouge_l_by_hand_and_as_its_library_has_it():
    assert rouge_l("a b c d", "a x c d e") == pytest.approx(2 * 3 / (4 + 5))
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for text, target in ("The cat, sat on it", "on it the cat sat"), ("x1 y", "X1-y z"), ("", "a"):
        assert rouge_l(text, target) == pytest.approx(scorer.score(target, text)["rougeL"].fmeasure)


def test_rouge_l_counts_words_of_every_script():
    assert rouge_l("кот видит пса", "кот видит дом") == pytest.approx(2 / 3)
    assert rouge_l("मनुष्य की किताब", "मनुष्य की रोशनी") == pytest.approx(2 / 3)


def test_bleu_by_hand():
    text, target = "the the cat sat on it", "the cat sat on the mat"
    precisions = 5 / 6, 3 / 5, 2 / 4, 1 / 3  # the: as often as target has it; it: not there
    assert bleu([text], [target]) == pytest.approx(math.prod(precisions) ** 0.25)
    assert bleu(["the cat sat on"], [target]) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu(["a b"], ["a b"]) == bleu([""], ["a"]) == 0  # too short for 4-grams


def test_bleu_is_that_of_sacrebleu():
    sacrebleu, rng = pytest.importorskip("sacrebleu"), Random(0)
    for _ in range(20):
        texts, targets = ([" ".join(rng.choices("a b c", k=rng.randrange(4, 30)))
                           for _ in range(5)] for _ in range(2))
        theirs = sacrebleu.corpus_bleu(texts, [targets], tokenize="none", smooth_method="none")
        assert 100 * bleu(texts, targets) == pytest.approx(theirs.score)


@pytest.mark.parametrize("n, right, k", [(5, 2, 1), (6, 1, 3), (6, 4, 3), (4, 0, 2), (4, 4, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, right, k):
    drawn = [*itertools.combinations(range(n), k)]
    assert pass_at_k(n, right, k) == pytest.approx(np.mean([min(d) < right for d in drawn]))


def test_calibration_error_by_hand():
    assert calibration_error([0.9, 0.9], [1, 0]) == pytest.approx(0.4)
    assert calibration_error([0.95, 0.15, 1.0], [1, 0, 1]) == pytest.approx((0.05 + 0.15) / 3)
    rng = np.random.default_rng(0).random(20_000)
    assert calibration_error(rng, np.random.default_rng(1).random(20_000) < rng) < 0.02


# -----------------------------------------------------------------------------
# Overlap with the training text, the card, and the command.


@pytest.mark.parametrize("lengths", [[400], [90, 13, 5, 200]])
def test_overlap_is_the_share_of_13_tokens_in_a_row_that_occur(lengths):
    rng = np.random.default_rng(0)
    shards = [rng.integers(2, size=n).astype(np.uint16) for n in lengths]
    texts = [rng.integers(2, size=n).tolist() for n in (40, 13, 12, 60)] + [shards[0][5:30]]
    cut = [{tuple(ids[i:i + 13]) for i in range(len(ids) - 12)} for ids in map(list, shards)]
    expected = [[tuple(ids[i:i + 13]) in set.union(*cut) for i in range(len(ids) - 12)]
                for ids in map(list, texts)]
    found = overlaps(texts, shards)
    assert math.isnan(found.pop(2)) and not expected.pop(2)
    assert found == pytest.approx([np.mean(row) for row in expected]) and found[-1] == 1


def test_runs_of_tokens_are_found_over_the_border_of_what_is_read_at_once(monkeypatch):
    shard = np.random.default_rng(0).integers(4000, size=(1 << 22) + 50).astype(np.uint16)
    texts = [shard[(1 << 22) - n:][:13].tolist() for n in range(14)]
    assert overlaps([*texts, [1] * 13], [shard]) == [1.0] * 14 + [0.0]


@pytest.fixture
def command(tmp_path, model, shards, tokenizer, call, monkeypatch):
    """Call evaluate.py, in a folder that holds runs/words -> the text on stdout and on stderr."""
    folder = tmp_path / "runs" / "words"
    keep(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    data = {"path": str(shards), "fingerprint": read_card(shards).fingerprint,
            "sources": [{"name": "words.txt"}]}
    write_json(folder / "config.json", {"data": data, "train": {"batch_size": 3}})
    (folder / "log.jsonl").write_text('{"step": 7, "loss": 2.5}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(evaluate, *words)


def test_evaluate_hands_over_tasks_and_options_that_it_does_not_have(command):
    shown, notes = command("--tasks=copying,writing,cloze", "--n_questions=5", "--max_tokens=900")
    assert notes == "" and ["copying", "writing", "writing", "writing", "cloze"] == [
        line.split()[0] for line in shown.splitlines()[2:7]]


def test_what_was_in_the_training_text_is_said(command, shards, tokenizer, tmp_path):
    text = tokenizer.decode(read_split(shards, "train")[0][100:160].tolist())
    rows = [dict(context=text[:-8], choices=[text[-8:], "x"], answer=0),
            dict(context="never seen " * 20, choices=["a", "b"], answer=0),
            dict(context="short", choices=["a", "b"], answer=0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    shown, _ = command("--rows=rows.jsonl", "--n_shots=0")
    assert "13 tokens in a row are in the training text, too: rows 1 of 2\n" in shown


def test_of_a_text_that_is_gone_or_changed_no_overlap_is_claimed(command, tmp_path):
    path = tmp_path / "runs" / "words" / "config.json"
    for part in ({"fingerprint": "0"}, {"path": "nowhere"}):
        config = json.loads(path.read_text("utf-8"))
        write_json(path, config | {"data": config["data"] | part})
        shown, notes = command("--tasks=arithmetic", "--n_questions=5")
        assert "what the training text has of them is not known: its shards are gone" in shown


@pytest.mark.parametrize("log, said", [
    ('{"step": 7, "loss": 2.5}\n{"step": 8, "lo', "step: 7"), ("", "seed"), ("\n[]\n", "seed"),
    ('{"step": 9, "loss": null}', "step: 9")])
def test_a_card_is_written_whatever_is_left_of_the_log(command, tmp_path, log, said):
    folder = tmp_path / "runs" / "words"
    (folder / "log.jsonl").write_text(log, "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    write_json(folder / "config.json", config | {"train": {"seed": 3}})
    _, notes = command("--tasks=arithmetic", "--n_questions=5", "--card")
    card = (folder / "model_card.md").read_text("utf-8")
    assert notes == "" and said in card and "None" not in card.split("## How it scores")[0]


@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_a_question_to_answer_that_does_not_fit_is_left_out(command, tmp_path, name):
    part, text = dict(gsm8k=("question", "2?"), humaneval=("prompt", "def one():\n"))[name]
    rows = [ROWS[name] | {part: text}, ROWS[name] | {part: text + "# and" * 99}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    code = ["--run_code"] * (name == "humaneval")
    shown, notes = command(f"--tasks={name}", "--rows=rows.jsonl", *code)
    assert "1 questions, 1 left out" in shown and notes == ""
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]), "utf-8")
    shown, notes = command(f"--tasks={name}", "--rows=rows.jsonl", *code)
    assert notes.startswith(f"error: runs/words: none of the questions of {name} fits")


def test_scores_and_overlaps_of_earlier_tasks_stay_on_the_card(command, tmp_path):
    command("--tasks=planted", "--n_questions=9", "--max_tokens=900")
    command("--tasks=copying", "--n_questions=9", "--max_tokens=900", "--card")
    card = (tmp_path / "runs" / "words" / "model_card.md").read_text("utf-8")
    assert "| planted | acc |" in card and "| copying | acc |" in card
    assert "planted 0 of 9, copying " in card


def test_a_card_needs_scores_and_says_what_makes_them(tmp_path, call):
    _, notes = call(card, tmp_path)
    assert notes == (f"error: {tmp_path} has no scores.json: python evaluate.py {tmp_path} writes "
                     "it\n")


def test_a_model_card_says_what_went_in_and_what_came_out(command, tmp_path):
    command("--tasks=copying", "--n_questions=9", "--card")
    folder = tmp_path / "runs" / "words"
    card = (folder / "model_card.md").read_text("utf-8")
    scores = json.loads((folder / "scores.json").read_text("utf-8"))["scores"]
    for part in ("words.txt", "step: 7", "loss: 2.5", "batch_size: 3", "copying",
                 f"{100 * scores[0]['value']:.1f}%", "copying 0 of "):
        assert part in card


@pytest.mark.parametrize("words, line", [
    (["--n_shots=-1"], "n_shots=-1 must be at least 0"),
    (["--n_shots=1"], "perplexity has no solved examples: leave out --n_shots, or the task"),
    (["--tasks=small", "--rows=x"], "--tasks=small reads no rows: leave out one of --tasks and"),
    (["--n_samples=2000", "--tasks=humaneval"], "n_samples=2000 must be at least 1 and below 1001"),
    (["--tasks=arithmetic", "--max_tokens=9"], "--max_tokens would not act beside --tasks=arith"),
    (["--tasks=copying", "--n_samples=2"], "--n_samples would not act beside --tasks=copying"),
    (["--tasks=copying", "--run_code"], "--run_code would not act beside --tasks=copying"),
    (["--tasks=humaneval"], "humaneval runs what the model writes, on this machine: --run_code"),
    (["--tasks=piqa,boolq", "--rows=x"], "--tasks=TASK and --rows=FILE.jsonl, the rows of that ")])
def test_a_wrong_input_ends_in_one_line(command, words, line):
    _, notes = command(*words)
    assert notes.startswith("error: " + line) and notes.count("\n") == 1


# -----------------------------------------------------------------------------
# The same numbers as lm-evaluation-harness, where it is installed.

GROUPS = {"lambada": "lambada_openai", "mmlu": "mmlu_high_school_mathematics"}
SCORES = {"true mass": "acc,none", "greedy": "acc,none", "acc": "acc,none",
          "acc_norm": "acc_norm,none", "perplexity": "perplexity,none"}


@pytest.fixture(scope="module")
def harness(tokenizer, tmp_path_factory):
    """-> (a function that evaluates by lm_eval, the same model of ours): GPT-2, random weights."""
    with pytest.MonkeyPatch.context() as patch:  # it imports another package named evaluate
        patch.setattr(sys, "path", [place for place in sys.path if Path(place) != Path(
            evaluate.__file__).parent])
        patch.delitem(sys.modules, "evaluate")
        pytest.importorskip("lm_eval.models.huggingface")
        import lm_eval
        import transformers
        from lm_eval.models.huggingface import HFLM
        sys.modules.pop("evaluate", None)
    from chapters.export import load_gpt2, to_huggingface
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.n_vocab, n_positions=512, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.3, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(folder)
    to_huggingface(tokenizer, folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    evaluate_by_theirs = partial(  # who looks for the files of all its tasks once
        lm_eval.simple_evaluate, HFLM(pretrained=theirs, tokenizer=words, device="cpu"),
        task_manager=lm_eval.tasks.TaskManager(), bootstrap_iters=0)
    return evaluate_by_theirs, load_gpt2(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize("n_shots", [0, 2])
@pytest.mark.parametrize("name", [name for name in ROWS if TASKS[name].score is score_calibrated])
def test_scores_equal_those_of_lm_evaluation_harness(
        harness, tokenizer, monkeypatch, name, n_shots):
    evaluate_by_theirs, ours = harness
    if n_shots and EXAMS[name].shots is None:
        pytest.skip("asked without examples")
    rows = [row | {key: f"{value} {i}" for key, value in row.items() if key in (
        "question", "goal", "passage", "activity_label", "text")} for i, row in
        enumerate([ROWS[name]] * 8)]
    import datasets
    from lm_eval.api.samplers import ContextSampler
    splits = {split: datasets.Dataset.from_list(rows[n_shots:]) for split in ("test", "validation")}
    splits |= {split: datasets.Dataset.from_list(rows[:2]) for split in ("train", "dev")}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict(splits))
    monkeypatch.setattr(ContextSampler, "sample", lambda self, n, **_: list(self.df)[:n])
    task = GROUPS.get(name, name)
    report = evaluate_by_theirs(tasks=[task], num_fewshot=n_shots)
    questions = [format_question(name, row) for row in rows]
    asked = with_examples(questions[n_shots:], questions[:n_shots], n_shots)
    outcomes, _ = score_calibrated(ours, tokenizer, asked)
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    expected = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    found = [outcome["shown"]["scores"] for outcome in outcomes]
    np.testing.assert_allclose(found, np.array(expected, float).reshape(len(found), -1), rtol=1e-4)
    for metric in {*SCORES} & {*TASKS[name].metrics}:
        score, *_ = interval(
            np.array([row[metric] for row in outcomes]), TASKS[name].metrics[metric])
        assert score == pytest.approx(report["results"][task][SCORES[metric]], rel=1e-3), metric
