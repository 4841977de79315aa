"""
What a judge is asked: questions in MT-Bench's format and the answers to them go in, a prompt and
the judge's verdict come out. For chapters.judge and chapters.rate.

    {"question_id": 1, "category": "math", "turns": ["1 + 1?", "And twice that?"],
     "reference": ["2", "4"]}
"""

import re
from pathlib import Path

from chapters.prompts import read_jsonl

QUESTIONS = Path(__file__).with_name("questions.jsonl")
PAIR = (
    "Two assistants, A and B, answer a user. Compare their answers to the user's {last} question: "
    "which is more helpful, correct, complete and clear? Neither the order in which they stand nor "
    "their length may sway you.{reference}\n\n{shown}\n\nExplain in a few sentences, then end with "
    "your verdict: [[A]] if A is better, [[B]] if B is better, [[C]] if they are alike.")
GRADE = (
    "An assistant answers a user. Grade its answer to the user's {last} question: is it helpful, "
    "correct, complete and clear?{reference}\n\n{shown}\n\nExplain in a few sentences, then end "
    "with a grade from 1, useless, to 10, perfect, like this: [[5]].")
SHORT = {  # for a run, which picks a verdict and explains nothing; its context may be small
    PAIR: "{shown}\n\nWhose {last} answer is better, A, B, or are they alike, C?{reference}",
    GRADE: "{shown}\n\nHow good is the {last} answer, from 1 to 10?{reference}"}
CHOICES = {PAIR: ["A", "B", "C"], GRADE: [str(number) for number in range(1, 11)]}

# -----------------------------------------------------------------------------
# Questions.


def is_mt_bench_row(row):
    """Whether a value read from JSON is a question in MT-Bench's format."""
    if not isinstance(row, dict) or not {"question_id", "category", "turns"} <= set(row):
        return False
    turns, reference = row["turns"], row.get("reference", [])
    return (isinstance(turns, list) and isinstance(reference, list) and len(turns) > 0
            and all(isinstance(text, str) and text.strip() for text in turns + reference)
            and all(isinstance(row[name], (str, int)) for name in ("question_id", "category")))


def read_questions(path=QUESTIONS):
    """Questions in MT-Bench's format, one a line: question_id, category, turns, and reference where
    there are right answers; ValueError names the first line that is none."""
    questions = []
    for number, row in read_jsonl(path):
        if not is_mt_bench_row(row):
            raise ValueError(f'{path}, line {number} is not a question like {{"question_id": 1, '
                             '"category": "math", "turns": ["What is 1 + 1?", "Twice that?"]}')
        questions.append(row)
    if not questions:
        raise ValueError(f"{path} holds no questions, one a line")
    return questions


def read_prompts(path):
    """One prompt a line, or a .jsonl with "prompt", or MT-Bench's questions, their first turns."""
    if Path(path).suffix != ".jsonl":
        prompts = Path(path).read_text("utf-8-sig", "replace").splitlines()
    else:
        prompts = [row["turns"][0] if is_mt_bench_row(row) else
                   isinstance(row, dict) and row.get("prompt") for _, row in read_jsonl(path)]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path}: each row must be like {{\"prompt\": \"What is 1 + 1?\"}}")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts, one a line")
    return prompts


# -----------------------------------------------------------------------------
# What a judge reads and says.


def transcript(question, answers, name="Assistant"):
    """What was said up to the last of the answers, for a judge to read."""
    pairs = zip(question["turns"], answers)
    return "\n".join(f"User: {text}\n{name}: {answer}" for text, answer in pairs)


def bracketed(text):
    """The last [[...]] of a judge's words, or None: bracketed("... so [[B]]") == "B"."""
    found = re.findall(r"\[\[\s*([\w.]+)\s*\]\]", text)
    return found[-1] if found else None


def ask(judge, instruction, question, turn, shown):
    """-> (the judge's words about a turn, from 0, of a question, its verdict or None)"""
    reference = question.get("reference", [])[turn:turn + 1]
    template = SHORT[instruction] if judge.short else instruction
    text = template.format(last=("first", "second", "third")[turn] if turn < 3 else "last",
                           reference=f" A right answer: {reference[0]}" if reference else "",
                           shown=shown)
    said = judge.judge(text, CHOICES[instruction])
    return said, bracketed(said)


def check_judge(judge, instruction, question):
    """ValueError if a judge gives no verdict on the shortest answers, before any is made."""
    shown = "User: Hi\nAssistant A: Hi\nAssistant B: Hi"
    said, verdict = ask(judge, instruction, question, 0, shown)
    if verdict is None:
        why = f"it says {said[-60:]!r}" if said else "its context is too short for the question"
        example = CHOICES[instruction][0]
        raise ValueError(f"the judge gives no verdict like [[{example}]]: {why}")
