"""
From the rows of the field's benchmarks, as Hugging Face gives them, to questions in the words of
lm-evaluation-harness: format_piqa({"goal": ..., "sol1": ..., "sol2": ..., "label": 0}).

A question is {"context", "choices", "answer"}, where context may be one for each choice, or
{"context", "target", "answer_tokens"}, the most that an answer may have. head is said once, before
the solved examples, which share its topic; labels say which choices are true; check is a program
that tests an answer. Here, too, is what counts as a word in a text of any script.
"""

import itertools
import json
import re
from pathlib import Path

import regex

from evaluate import UNSPACED, WORD, space_between
from tokenizer import reading

EXAMPLE_ROW = '{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
# Two letters of a script without spaces, or two syllables of Hangul, say as much as three or four.
PAIR = rf"(?:(?={UNSPACED})\p{{L}}\p{{M}}*){{2}}|\p{{Hangul}}{{2,}}"
LETTERS = regex.compile(rf"\b(?:(?!{UNSPACED})[\p{{L}}\p{{M}}]){{3,}}\b|{PAIR}")

# -----------------------------------------------------------------------------
# Words of any script.


def words_of(text):
    """What stands between white space; of scripts without spaces, two characters each."""
    return [word.rstrip() for word in WORD.findall(text)]


def joined(words):
    """Words as a text: joined(["a", "b"]) == "a b"."""
    return "".join(space_between(a, b) + b for a, b in itertools.pairwise(["", *words]))


def is_word(word, least):
    """Whether a word has letters alone, with the signs on them: least or more, or a PAIR."""
    return regex.fullmatch(rf"[\p{{L}}\p{{M}}]{{{least},}}|{PAIR}", word) is not None


# -----------------------------------------------------------------------------
# Rows of your own: a file like EXAMPLE_ROW, one a line.


def read_jsonl(path, convert=lambda value: value):
    """Yield (number, convert(value)) for each line of a .jsonl file; an error names its line."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        with reading(f"{path}, line {number}"):
            if line.strip():
                yield number, convert(json.loads(line.decode("utf-8-sig")))


def is_question(row):
    """Whether a dict that a file held is a question of multiple choice."""
    context, choices, answer = map(row.get, ("context", "choices", "answer"))
    if not isinstance(choices, list) or type(answer) is not int:
        return False
    contexts = context if isinstance(context, list) else [context] * len(choices)
    return (len(contexts) == len(choices) > answer >= 0
            and all(isinstance(text, str) for text in contexts + choices))


def format_row(row):
    """The question of a row of your own; ValueError if it is none."""
    if not (isinstance(row, dict) and is_question(row) and len(row["choices"]) > 1
            and all(map(str.strip, row["choices"])) and isinstance(row.get("between"), str | None)):
        raise ValueError(f"this is not a row like {EXAMPLE_ROW}: {row!r:.60}")
    return dict(between=None) | row


def read_rows(path, format_row=format_row):
    """The questions that format_row makes of the lines of a .jsonl file."""
    questions = [question for _, question in read_jsonl(path, format_row)]
    if not questions:
        raise ValueError(f"{path} holds no rows; one a line is read, such as {EXAMPLE_ROW}")
    return questions


# -----------------------------------------------------------------------------
# The benchmarks' rows.


def format_arc(row):
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return dict(context="Question: " + row["question"] + "\nAnswer:", choices=texts,
                answer=labels.index(row["answerKey"]))


def format_hellaswag(row):
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))  # left by WikiHow
        return text.replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return dict(context=clean(context), choices=[clean(text) for text in row["endings"]],
                answer=int(row["label"]))


def format_mmlu(row):
    topic, letters = row["subject"].replace("_", " "), "ABCD"
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
    answer = row["answer"] if isinstance(row["answer"], int) else letters.index(row["answer"])
    return dict(head="The following are multiple choice questions (with answers) about "
                f"{topic}.\n\n", topic=topic, choices=list(letters), answer=answer,
                context="\n".join([row["question"].strip(), *lines, "Answer:"]))


TRUTHFULQA = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def format_truthfulqa(row, targets="mc1_targets"):
    choices, labels = row[targets]["choices"], row[targets]["labels"]
    if len(labels) != len(choices) or {*labels} != {0, 1}:
        raise ValueError("each choice needs a label, 0 or 1")
    return dict(context=TRUTHFULQA + "Q: " + row["question"] + "\nA:", choices=choices,
                labels=labels, answer=labels.index(1))


def format_truthfulqa_mc2(row):
    return format_truthfulqa(row, "mc2_targets")


def format_piqa(row):
    return dict(context="Question: " + row["goal"] + "\nAnswer:",
                choices=[row["sol1"], row["sol2"]], answer=row["label"])


def format_winogrande(row):
    before, after = row["sentence"].split("_", 1)
    return dict(context=[before + row["option1"], before + row["option2"]],
                choices=[after.strip()] * 2, answer=int(row["answer"]) - 1)


def format_lambada(row):
    context, _, word = row["text"].rpartition(" ")
    return dict(context=context, choices=[word], answer=0)


def format_boolq(row):
    answer = row["label"] if "label" in row else row["answer"]
    return dict(context=row["passage"] + "\nQuestion: " + row["question"] + "?\nAnswer:",
                choices=["no", "yes"], answer=int(answer))


def format_gsm8k(row):
    return dict(context="Question: " + row["question"] + "\nAnswer:", target="" + row["answer"],
                answer_tokens=256)


def format_humaneval(row):
    return dict(context="" + row["prompt"], target="" + row["canonical_solution"],
                check=f"{row['test']}\ncheck({row['entry_point']})", answer_tokens=1024)


def format_mosaic(row):
    """Rows of MosaicML's benchmarks, which are questions already. They double no space."""
    if "continuation" in row:
        return dict(context=row["context"], choices=[row["continuation"]], answer=0, between=None)
    query = row["query"].strip()
    query += "\nAnswer:" if query.startswith("Question:") and "Answer:" not in query else ""
    return dict(context=query, choices=row["choices"], answer=row["gold"], between=None)
