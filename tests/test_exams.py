"""The field's tasks: rows as they are published, questions and scores as lm-evaluation-harness has
them, programs run in a box, and small tasks that any text gives."""

import json
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

import evaluate
from evaluate import (SMALL, TASKS, ask, find_number, judge_choices, pairs_of, read_rows,
                      run_program, solved, split_examples, with_examples)

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
    assert solved(ask(name, ROWS[name])) == text


def test_every_task_of_the_field_has_rows_here_and_makes_questions_of_them():
    assert {*ROWS} == {*TASKS} - {*SMALL, "rows"}
    assert all(ask(name, row) is not None for name, row in ROWS.items())


def test_the_blank_of_winogrande_is_filled_in_the_context_and_the_rest_is_scored():
    before = "The cup does not fit because "
    assert pairs_of(ask("winogrande", ROWS["winogrande"])) == [
        (before + "it", " is too big."), (before + "the box", " is too big.")]


def test_ready_questions_of_other_benchmarks_are_asked_in_the_tasks_words():
    ready = {"query": "Question: What melts ice?", "choices": ["cold", "heat"], "gold": 1}
    assert pairs_of(ask("arc_easy", ready)) == pairs_of(ask("arc_easy", ROWS["arc_easy"]))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_lacks_a_part_or_has_one_of_another_kind_is_none(name):
    row = ROWS[name]
    for part in ("choices", "endings", "question", "goal", "sentence", "text", "passage", "prompt"):
        if part in row:
            for wrong in (None, 3, [], {}):
                assert ask(name, row | {part: wrong}) is None
            assert ask(name, {key: row[key] for key in row if key != part}) is None
    assert ask(name, []) is ask(name, None) is ask(name, "query") is None


def test_a_wrong_row_of_a_task_is_named_by_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROWS["piqa"]) + '\n{"goal": 1}', "utf-8")
    with pytest.raises(ValueError, match="x.jsonl, line 2 is not .* of piqa"):
        read_rows(tmp_path / "x.jsonl", "piqa")


def test_solved_examples_stand_before_a_question_and_have_its_topic():
    rows = [dict(ROWS["mmlu"], subject=topic, question=f"{topic} {i}?")
            for i in range(3) for topic in ("art", "law")]
    examples, questions = split_examples([ask("mmlu", row) for row in rows], 2)
    asked = with_examples(questions, examples, 2)
    assert len(examples) == 4 and len(asked) == 2
    assert asked[1]["context"] == "".join([
        "The following are multiple choice questions (with answers) about law.\n\n",
        *(solved(ask("mmlu", rows[i])) + "\n\n" for i in (1, 3)), ask("mmlu", rows[5])["context"]])


@pytest.mark.parametrize("text, strict, flexible", [
    ("so 3 + 4 = 7.\n#### 7", "7", "7"), ("#### -1,200 or #### 3", "-1,200", "3"),
    ("that is $18.", "[invalid]", "$18."), ("none", "[invalid]", "[invalid]")])
def test_the_number_of_an_answer_is_behind_four_hashes_or_the_last(text, strict, flexible):
    found = [find_number(text, *where) for where in evaluate.NUMBERS.values()]
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
    monkeypatch.setattr(evaluate, "ROWS_URL", f"http://127.0.0.1:{server.server_port}/rows?")
    yield server
    server.shutdown()
    server.server_close()


def test_rows_are_downloaded_page_by_page_and_kept(server, tmp_path):
    rows = evaluate.download_rows("piqa", "validation", folder=tmp_path)
    assert [row["goal"] for row in rows] == [f"validation {i}" for i in range(250)]
    server.shutdown()
    server.server_close()
    assert evaluate.download_rows("piqa", "validation", folder=tmp_path) == rows


def test_without_a_network_a_task_says_how_it_is_had_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS_URL", "http://127.0.0.1:9/rows?")
    with pytest.raises(ValueError, match="no rows of piqa .*: --tasks=piqa --rows=FILE.jsonl"):
        evaluate.download_rows("piqa", "validation", folder=tmp_path)


# -----------------------------------------------------------------------------
# Programs in a box.


def test_a_right_solution_passes_its_tests_and_a_wrong_one_does_not():
    question = ask("humaneval", ROWS["humaneval"])
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


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("perplexity", "writing")])
def test_small_tasks_are_sound_differ_by_seed_and_spread_their_answers(name):
    make = partial(TASKS[name].source[1], TEXTS, 40)
    assert make(seed=1) == make(seed=1) != make(seed=2)
    questions = [ask(name, row) for row in make(seed=1)]
    assert None not in questions and all(len(question["choices"]) == 4 for question in questions)
    assert len(questions) < 20 or {question["answer"] for question in questions} == {0, 1, 2, 3}


def test_rules_make_questions_whose_answers_are_right():
    for row in TASKS["arithmetic"].source[1](TEXTS, 20, 0):
        left, right = row["context"].splitlines()[-1].rstrip(" =").split(" + ")
        assert int(left) + int(right) == int(row["choices"][row["answer"]])
    for row in TASKS["brackets"].source[1](TEXTS, 20, 0):
        opened = [char for char in row["context"] if char in "([{"]
        assert [*row["choices"][row["answer"]]] == [")]}"["([{".index(c)] for c in opened[::-1]]


def test_facts_are_followed_by_one_word_wherever_they_stand():
    for row in TASKS["facts"].source[1](TEXTS, 20, 0):
        fact, words = row["context"].split(), " ".join(TEXTS).split()
        after = {c for a, b, c in zip(words, words[1:], words[2:]) if [a, b] == fact}
        assert row["choices"][row["answer"]] in after


@pytest.mark.parametrize("name", sorted({*SMALL} - {"perplexity", "arithmetic"}))
def test_a_text_that_is_too_short_for_a_small_task_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"leave {name} out of --tasks"):
        TASKS[name].source[1](["a b c"], 5, 0)


# -----------------------------------------------------------------------------
# The same numbers as lm-evaluation-harness, where it is installed.

GROUPS = {"lambada": "lambada_openai", "mmlu": "mmlu_high_school_mathematics"}
SCORES = {"true mass": "acc,none", "greedy": "acc,none", "acc": "acc,none",
          "acc_norm": "acc_norm,none", "perplexity": "perplexity,none"}


@pytest.fixture(scope="module")
def harness(tokenizer, tmp_path_factory):
    """-> (lm_eval, its model, the same model of ours): GPT-2 with random weights."""
    with pytest.MonkeyPatch.context() as patch:  # it imports another package named evaluate
        patch.setattr(sys, "path", [place for place in sys.path if Path(place) != Path(
            evaluate.__file__).parent])
        patch.delitem(sys.modules, "evaluate")
        pytest.importorskip("lm_eval.models.huggingface")
        import lm_eval
        import transformers
        from lm_eval.models.huggingface import HFLM
        sys.modules.pop("evaluate", None)
    from model import load_gpt2
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.n_vocab, n_positions=512, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.3, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(folder)
    tokenizer.to_huggingface(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return lm_eval, HFLM(pretrained=theirs, tokenizer=words, device="cpu"), load_gpt2(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize("n_shots", [0, 2])
@pytest.mark.parametrize("name", [name for name in ROWS if TASKS[name].judge is judge_choices])
def test_scores_equal_those_of_lm_evaluation_harness(
        harness, tokenizer, monkeypatch, name, n_shots):
    lm_eval, theirs, ours = harness
    if n_shots and TASKS[name].source[3] is None:
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
    report = lm_eval.simple_evaluate(theirs, tasks=[task], num_fewshot=n_shots, bootstrap_iters=0)
    questions = [ask(name, row) for row in rows]
    asked = with_examples(questions[n_shots:], questions[:n_shots], n_shots)
    outcomes, _ = judge_choices(ours, tokenizer, asked)
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    expected = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    found = [outcome["shown"]["scores"] for outcome in outcomes]
    np.testing.assert_allclose(found, np.array(expected, float).reshape(len(found), -1), rtol=1e-4)
    for metric in {*SCORES} & {*TASKS[name].metrics}:
        score, *_ = evaluate.interval(metric, np.array([row[metric] for row in outcomes]))
        assert score == pytest.approx(report["results"][task][SCORES[metric]], rel=1e-3), metric
