"""
The field's benchmarks, asked and scored as lm-evaluation-harness does it, and all that evaluate.py
does beside them.

    python evaluate.py --tasks=arc_easy,gsm8k --n_shots=5    # evaluate.py hands over to this file
    python -m chapters.exams runs/a runs/b --tasks=hellaswag --card
    python -m chapters.exams --tasks=piqa --rows=piqa.jsonl

Rows are downloaded from Hugging Face, or read from --rows; solved examples (--n_shots) are the
first of the file, or of the training split. --tasks=small, the default, is what the run's own text
and rules give (chapters/probes.py). Said for each task: how much of it the training text has.
"""

import math
import random
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

if __name__ == "__main__":  # `python chapters/exams.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import evaluate
from chapters import probes
from chapters.box import score_programs
from chapters.card import (calibration_of_sums, contamination, overlap_line, score_calibrated,
                           write_card)
from chapters.prompts import (EXAMPLE_ROW, format_arc, format_boolq, format_gsm8k, format_hellaswag,
                              format_humaneval, format_lambada, format_mmlu, format_mosaic,
                              format_piqa, format_row, format_truthfulqa, format_truthfulqa_mc2,
                              format_winogrande, is_question, read_rows)
from data import download
from evaluate import EvaluateConfig, Task, exact_match, exp_ratio, pairs_of, ratio, score_runs
from model import option
from tokenizer import Tokenizer, parse_options, read_json, reading, run_command, write_json

ROWS_URL = "https://datasets-server.huggingface.co/rows?"  # 100 rows of a data set as JSON

# -----------------------------------------------------------------------------
# The benchmarks.

NUMBERS = {"exact, strict": (r"#### (\-?[0-9\.\,]+)", 0),  # where an answer's number is looked for
           "exact, flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
NUMBER_IGNORE = [",", r"\$", r"(?s).*#### ", r"\.$"]


def find_number(text, pattern, place):
    """The first (0) or last (-1) number that a pattern finds in an answer."""
    found = [match[match.lastindex].strip() for match in re.finditer(pattern, text)]
    return found[place] if found else "[invalid]"


def score_numbers(model, tokenizer, questions, config):
    """Whether the number that the answer ends with is right."""
    texts = probes.answers(model, tokenizer, questions, ["Question:", "</s>", "<|im_end|>"])
    return [{metric: [exact_match(find_number(text, *rule), question["target"], NUMBER_IGNORE), 1]
             for metric, rule in NUMBERS.items()} | {"shown": text}
            for question, text in zip(questions, texts)], {}


ACC = {"acc": ratio, "calibration error": calibration_of_sums}
ACC_NORM = {"acc": ratio, "acc_norm": ratio, "calibration error": calibration_of_sums}
# dataset, config, split, shots (the split of the examples): where the rows are on Hugging Face
Exam = namedtuple("Exam", "dataset config split shots format score metrics",
                  defaults=[score_calibrated, ACC_NORM])
EXAMS = {
    "arc_easy": Exam("allenai/ai2_arc", "ARC-Easy", "test", "train", format_arc),
    "arc_challenge": Exam("allenai/ai2_arc", "ARC-Challenge", "test", "train", format_arc),
    "hellaswag": Exam("Rowan/hellaswag", "default", "validation", "train", format_hellaswag),
    "mmlu": Exam("cais/mmlu", "all", "test", "dev", format_mmlu, metrics=ACC),
    "truthfulqa_mc1": Exam("truthfulqa/truthful_qa", "multiple_choice", "validation", None,
                           format_truthfulqa, metrics=ACC),
    "truthfulqa_mc2": Exam("truthfulqa/truthful_qa", "multiple_choice", "validation", None,
                           format_truthfulqa_mc2, metrics={"true mass": ratio}),
    "piqa": Exam("baber/piqa", "default", "validation", "train", format_piqa),
    "winogrande": Exam("allenai/winogrande", "winogrande_xl", "validation", "train",
                       format_winogrande, metrics=ACC),
    "lambada": Exam("EleutherAI/lambada_openai", "default", "test", None, format_lambada,
                    metrics={"greedy": ratio, "perplexity": exp_ratio}),
    "boolq": Exam("aps/super_glue", "boolq", "validation", "train", format_boolq, metrics=ACC),
    "gsm8k": Exam("openai/gsm8k", "main", "test", "train", format_gsm8k, score_numbers,
                  dict.fromkeys(NUMBERS, ratio)),
    "humaneval": Exam("openai/openai_humaneval", "openai_humaneval", "test", None,
                      format_humaneval, score_programs, {"pass@1": ratio, "pass@10": ratio}),
    "rows": Exam(None, None, None, None, format_row, metrics=ACC_NORM | {"acc_bytes": ratio}),
}


def format_question(name, row):
    """The question of a row of a benchmark; ValueError where it is no such row."""
    ready = isinstance(row, dict) and bool({"query", "continuation"} & {*row})
    if name == "rows" and not ready:
        return format_row(row)
    try:
        question = (format_mosaic if ready else EXAMS[name].format)(row)
        if "target" in question or is_question(question) and (
                len(question["choices"]) > 1 or name == "lambada"):
            own = row.get("between")
            return question | (dict(between=own) if isinstance(own, str) else {})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        pass
    raise ValueError(f"this is no row of {name}: {row!r:.60}")


def download_questions(name, split, most=math.inf, folder=Path("shards", "downloads", "tasks")):
    """The questions of a split of a benchmark, 100 rows a file. ValueError without a network."""
    questions, total = [], 1
    while len(questions) < min(total, most):
        page = dict(dataset=EXAMS[name].dataset, config=EXAMS[name].config, split=split,
                    offset=len(questions), length=100)
        path = folder / name / f"{split}-{len(questions):06d}.json"
        try:
            with reading(path):
                found = read_json(download(ROWS_URL + urlencode(page), path))
                total = found["num_rows_total"] if found["rows"] else 0
                questions += [format_question(name, entry["row"]) for entry in found["rows"]]
        except ValueError as error:
            raise ValueError(f"no rows of {name} ({error}): --tasks={name} --rows=FILE.jsonl reads "
                             "them from a file") from None
    return questions


def solved(question):
    """A question with its answer, as it stands in an example."""
    if "target" in question:
        return f"{question.get('context', '')} {question['target']}"
    return "".join(pairs_of(question)[question["answer"]])


def split_examples(questions, n_shots):
    """-> (the first n_shots questions of each topic, the others)"""
    numbers, parts = Counter(), ([], [])
    for question in questions:
        numbers[question.get("topic")] += 1
        parts[numbers[question.get("topic")] > n_shots].append(question)
    return parts


def with_examples(questions, examples, n_shots):
    """Questions that begin with n_shots solved examples, of their own topic where they have one."""
    shots, asked = defaultdict(list), []
    for example in examples:
        shots[example.get("topic")].append(solved(example) + "\n\n")
    for question in questions:
        before = question.get("head", "") + "".join(shots[question.get("topic")][:n_shots])
        context, several = question["context"], isinstance(question["context"], list)
        context = [before + text for text in context] if several else before + context
        asked.append(question | dict(context=context, whole=question["context"],
                                     own=solved(question)))
    return asked


def exam_questions(name, config, texts):
    """The questions of a benchmark, downloaded or read from --rows, with their examples."""
    exam, n_shots, examples = EXAMS[name], config.n_shots, []
    if config.rows:
        found = read_rows(config.rows, partial(format_question, name))
        examples, questions = split_examples(found, n_shots)
    else:
        questions = download_questions(name, exam.split)
        examples = download_questions(name, exam.shots, most=300) if n_shots else []
    if not questions:
        raise ValueError(f"{config.rows} has {len(examples)} rows, and all are taken as examples: "
                         f"give more, or take less than --n_shots={n_shots}")
    n_examples = Counter(example.get("topic") for example in examples)
    fewest = min(n_examples[question.get("topic")] for question in questions)
    if fewest < n_shots:
        print(f"{name} has {fewest} solved examples for a question, not {n_shots}")
    n = min(config.n_questions or len(questions), len(questions))
    picked = sorted(random.Random(config.seed).sample(range(len(questions)), n))
    return with_examples([questions[i] for i in picked], examples, n_shots)


TASKS = evaluate.TASKS | probes.TASKS | {
    name: Task(partial(exam_questions, name), exam.score, exam.metrics,
               ("n_questions", "seed", "n_shots"))
    for name, exam in EXAMS.items()}
TASKS["humaneval"] = TASKS["humaneval"]._replace(
    options=("n_questions", "seed", "n_samples", "run_code"))
TASKS["continuation"] = TASKS["continuation"]._replace(score=score_calibrated, metrics=ACC_NORM)
SMALL = [name for name in evaluate.TASKS | probes.TASKS if name not in ("rows", "writing")]

# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class ExamConfig(EvaluateConfig):
    """What is scored, and how."""
    tasks: str | None = option(None, f"small, or some of {','.join(TASKS)} (default small)")
    rows: str | None = option(None, "questions from this .jsonl file, for the one task that "
                              f"--tasks names, or your own, such as {EXAMPLE_ROW}; before a choice "
                              'stands its "between", else a space if its script has them')
    n_shots: int = option(0, "solved examples before each question")
    n_samples: int = option(1, "programs for each of humaneval's questions; above 1 at "
                            "temperature 0.8", low=1, below=1001)
    run_code: bool = option(False, "let humaneval run what the model writes; what protects the "
                            "machine, and what does not, stands in chapters/box.py")
    card: bool = option(False, "write model_card.md into the run folder")

    def __post_init__(self):
        super().__post_init__()
        names = SMALL if self.tasks is None else self.tasks.split(",")
        if self.tasks == "small" and self.rows is not None:
            raise ValueError("--tasks=small reads no rows: leave out one of --tasks and --rows")
        if self.rows is not None and len({*names} - {*SMALL}) != 1 or (
                "rows" in names and self.rows is None):
            raise ValueError("--tasks=TASK and --rows=FILE.jsonl, the rows of that task, go "
                             "together")
        if "humaneval" in names and not self.run_code:
            raise ValueError("humaneval runs what the model writes, on this machine: --run_code "
                             "lets it; what protects the machine stands in chapters/box.py")
        for name in names if self.n_shots else ():
            if name not in EXAMS or not (self.rows or EXAMS[name].shots):
                raise ValueError(f"{name} has no solved examples: leave out --n_shots, or the task")


def main():
    typed, = parse_options(__doc__, ExamConfig)
    config = ExamConfig(**(dict(tasks="rows") if "rows" in typed else {}) | typed)
    if config.tasks == "small":
        config = replace(config, tasks=None)
    questions, folders = score_runs(config, TASKS, SMALL)
    texts = {name: [question.get("own") or solved(question) for question in asked]
             for name, asked in questions.items()}
    for folder in folders:
        overlap = contamination(folder, Tokenizer.load(folder / "tokenizer.json"), texts)
        why = "" if overlap else ": its shards are gone, or hold another text"
        print(f"{folder}: {overlap_line(overlap)}{why}")
        saved = read_json(folder / "scores.json")
        overlap = saved.get("overlap", {}) | overlap
        write_json(folder / "scores.json", saved | dict(overlap=overlap))
        if config.card:
            print(f"card: {write_card(folder)}")


if __name__ == "__main__":
    run_command(main)
