"""
Which of two models answers better? Run folders or URLs of OpenAI's protocol go in; a table, JSON
and for dialogues a picture come out.

    python -m chapters.judge runs/a runs/b --judge=http://127.0.0.1:8000/v1
    python -m chapters.judge runs/a URL#MODEL --judge=runs/c --key=api.openai.com=OPENAI_API_KEY
    python -m chapters.judge runs/a --judge=URL --grade     # each answer alone, from 1 to 10
    python -m chapters.judge runs/a runs/b --dialogue       # 25 turns, facts asked back; no judge

Questions have two turns, as in MT-Bench (arXiv:2306.05685). A judge sees each pair of answers
twice, in both orders, and only who wins both times has won: judges like what stands first. A judge
at a URL writes its verdict; a run as judge gives the verdict that it holds for the likeliest.
"""

import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

if __name__ == "__main__":  # `python chapters/judge.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from chapters.dialogue import dialogue_lines, draw_dialogues, percent, run_dialogues, share
from chapters.questions import GRADE, PAIR, ask, check_judge, read_questions, transcript
from chapters.talk import AnswerConfig, converse, open_all
from evaluate import difference, ratio, spread, wilson
from model import check_options, option
from tokenizer import QUIET, parse_options, refuse_idle, run_command, write_json

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# -----------------------------------------------------------------------------
# Verdicts on the answers to one turn.


def compare(judge, question, turn, answers):
    """Let the judge compare the answers {"A": [...], "B": [...]} to one turn in both orders -> a
    row: who won in each order (A, B, tie, or None without a verdict), and who has won: both times,
    or a tie."""
    won, said = [], []
    for order in ("A", "B"), ("B", "A"):
        shown = "\n\n".join(transcript(question, answers[one][:turn + 1], f"Assistant {label}")
                            for label, one in zip("AB", order))
        words, verdict = ask(judge, PAIR, question, turn, shown)
        said.append(words)
        won.append(dict(zip("ABC", (*order, "tie"))).get(verdict))
    winner = won[0] if won[0] == won[1] and won[0] else "tie"
    return dict(question=question["question_id"], category=question["category"], turn=turn + 1,
                won=won, winner=winner, said=said)


def grade(judge, question, turn, answers):
    """Grade one contestant's answer to one turn -> a row; None is no grade from 1 to 10."""
    said, verdict = ask(judge, GRADE, question, turn, transcript(question, answers[:turn + 1]))
    is_number = re.fullmatch(r"\d+(\.\d+)?", verdict or "")
    number = float(verdict) if is_number else 0
    return dict(question=question["question_id"], category=question["category"], turn=turn + 1,
                grade=number if 1 <= number <= 10 else None, said=said)


# -----------------------------------------------------------------------------
# Verdicts to numbers, each with its 95% interval.


def win_rate(winners, n=None):
    """How often A wins of ["A", "B", "tie", ...], ties as half. The interval is Wilson's for n
    independent games, all unless given; it is somewhat wide, as ties vary less than wins."""
    value = mean(dict(A=1, B=0, tie=0.5)[winner] for winner in winners)
    low, high = wilson(value, n or len(winners))
    return dict(value=value, low=low, high=high)


def summarize_games(games):
    """The win rate of A in all and by category, how often both orders agree, and how often a
    verdict for one of the two was for the one that stood first. The turns of a question are one
    observation: they have much in common."""
    winners, categories = [game["winner"] for game in games], defaultdict(list)
    for game in games:
        categories[game["category"]].append(game["winner"])
    decided = [game["won"] for game in games if None not in game["won"]]
    if not decided:
        raise ValueError("the judge gave no verdict like [[A]]: a run's context may be too short "
                         "for two answers, a smaller --max_tokens makes them shorter")
    first = [winner == order for game in games for winner, order in zip(game["won"], "AB")
             if winner in ("A", "B")]
    return dict(
        win_rate=win_rate(winners, len({game["question"] for game in games})),
        wins={name: winners.count(name) for name in ("A", "B", "tie")},
        by_category={name: win_rate(own)["value"] for name, own in categories.items()},
        agreement=share([a == b for a, b in decided]), first_preferred=share(first),
        no_verdict=sum(game["won"].count(None) for game in games))


def grade_sums(rows):
    """(N, 2): of each question the sum and the number of the grades in rows."""
    sums = defaultdict(lambda: np.zeros(2))
    for row in rows:
        sums[row["question"]] += row["grade"], 1
    return np.array([*sums.values()])


def mean_grade(rows):
    """The mean grade with a bootstrap over the questions; ValueError without any grade."""
    graded = [row for row in rows if row["grade"] is not None]
    if not graded:
        raise ValueError("the judge gave no grade like [[5]]: a run's context may be too short for "
                         "an answer, a smaller --max_tokens makes it shorter")
    sums = grade_sums(graded)
    low, high = spread(sums)
    turns = defaultdict(list)
    for row in graded:
        turns[row["turn"]].append(row["grade"])
    return dict(value=ratio(sums.sum(axis=0)), low=low, high=high,
                no_grade=len(rows) - len(graded),
                by_turn={turn: mean(grades) for turn, grades in sorted(turns.items())})


def grade_gap(rows, others):
    """By how much the grades of rows are higher than those of others, with a bootstrap over the
    questions, in pairs; None without a pair."""
    pairs = [pair for pair in zip(others, rows) if None not in (row["grade"] for row in pair)]
    if not pairs:
        return None
    gap = difference(*map(grade_sums, zip(*pairs)))
    return dict(zip(("value", "low", "high"), gap))


# -----------------------------------------------------------------------------
# What the command does: contestants {"A": model, ...} in; lines to print, a report for JSON out.


def answer_all(contestants, questions):
    """-> {name: the replies to all turns of each question}"""
    return {name: [converse(model, question["turns"])
                   for question in tqdm(questions, f"answers of {name}", **QUIET)]
            for name, model in contestants.items()}


def each_turn(questions, title):
    """(place of the question, turn) for each turn, with a progress bar."""
    turns = [(i, turn) for i, row in enumerate(questions) for turn in range(len(row["turns"]))]
    return tqdm(turns, title, **QUIET)


def run_pairs(contestants, judge, questions):
    answers, games = answer_all(contestants, questions), []
    for i, turn in each_turn(questions, "verdicts"):
        shown = {name: replies[i] for name, replies in answers.items()}
        games.append(compare(judge, questions[i], turn, shown))
        games[-1]["answers"] = {name: replies[turn] for name, replies in shown.items()}
    return dict(summary=summarize_games(games), games=games)


def run_grades(contestants, judge, questions):
    report, answers = {}, answer_all(contestants, questions)
    for name, replies in answers.items():
        rows = [grade(judge, questions[i], turn, replies[i]) | dict(answer=replies[i][turn])
                for i, turn in each_turn(questions, "grades")]
        better = grade_gap(report["A"]["grades"], rows) if report else None
        report[name] = dict(summary=mean_grade(rows), A_is_better_by=better, grades=rows)
    return report


def pair_lines(names, summary):
    """The summary of run_pairs in words."""
    wins, judge = summary["wins"], {key: percent(summary[key]) for key in (
        "win_rate", "agreement", "first_preferred")}
    yield f"A {names['A']}: {wins['A']} wins; B {names['B']}: {wins['B']} wins; {wins['tie']} ties"
    yield f"win rate of A: {judge['win_rate']}, ties as half, 95% interval"
    for category, value in summary["by_category"].items():
        yield f"  {category:14s} {value:6.1%}"
    yield (f"the judge: agrees with itself in the other order {judge['agreement']}, prefers what "
           f"stands first {judge['first_preferred']}, {summary['no_verdict']} times without a "
           "verdict")


def grade_lines(names, report):
    """The report of run_grades in words."""
    for name, part in report.items():
        score = part["summary"]
        turns = ", ".join(f"turn {turn}: {value:.2f}" for turn, value in score["by_turn"].items())
        yield (f"{name} {names[name]}: grade {score['value']:.2f} [{score['low']:.2f}, "
               f"{score['high']:.2f}] of 10 ({turns}), {score['no_grade']} answers without a grade")
        if part["A_is_better_by"]:
            value, low, high = part["A_is_better_by"].values()
            yield f"  A is better than {name} by {value:+.2f} [{low:+.2f}, {high:+.2f}]"


@dataclass(frozen=True)
class JudgeConfig:
    """Who is compared, and by whom."""
    contestants: list = option([], "run folders or URLs: two to compare, else any number",
                               positional=True)
    judge: str | None = option(None, "a run folder or URL")
    grade: bool = option(False, "grade each answer alone, from 1 to 10")
    dialogue: bool = option(False, "long dialogues; they need no judge")
    questions: str = option("", "a .jsonl like MT-Bench's question.jsonl (default: our own)")
    n_dialogues: int = option(4, "dialogues of 25 turns", low=1, below=1001)
    out: str | None = option(None, "folder to write to (default: the first contestant with one)")

    def __post_init__(self):
        check_options(self)
        n, many = len(self.contestants), self.grade or self.dialogue
        if self.dialogue and (self.grade or self.judge):
            raise ValueError("--dialogue counts by itself: it goes with neither --grade nor "
                             "--judge")
        if not self.dialogue and not self.judge:
            raise ValueError("someone must judge: --judge=URL or --judge=runs/NAME (or --dialogue)")
        if not 0 < n <= len(NAMES) or n != 2 and not many:
            raise ValueError(f"two are compared, or with --grade or --dialogue 1 to {len(NAMES)}; "
                             f"these are {n}")


def main():
    typed, answers = parse_options(__doc__, JudgeConfig, AnswerConfig)
    config, answers = JudgeConfig(**typed), AnswerConfig(**answers)
    idle, word = ("questions", "beside") if config.dialogue else ("n_dialogues", "without")
    refuse_idle(typed, [idle], f"{word} --dialogue")
    questions = read_questions(config.questions) if config.questions else read_questions()
    names = dict(zip(NAMES, config.contestants))
    models = open_all([*names.values(), *([config.judge] if config.judge else [])], answers)
    contestants, judge = dict(zip(names, models)), models[-1]  # it is the last, if there is one
    out = Path(config.out or next((name for name in names.values() if Path(name).is_dir()), "."))
    if config.dialogue:
        kind, report = "dialogue", run_dialogues(contestants, config.n_dialogues, answers.seed)
        draw_dialogues({f"{name} {names[name]}": part["summary"]
                        for name, part in report.items()}, out / "dialogue.png")
        lines = dialogue_lines(names, report)
    elif config.grade:
        check_judge(judge, GRADE, questions[0])
        kind, report = "grades", run_grades(contestants, judge, questions)
        lines = grade_lines(names, report)
    else:
        check_judge(judge, PAIR, questions[0])
        kind, report = "judge", run_pairs(contestants, judge, questions)
        lines = pair_lines(names, report["summary"])
    print("\n".join(lines))
    options = asdict(config) | asdict(answers)
    del options["key"]
    write_json(out / f"{kind}.json", dict(options=options, contestants=names, report=report))
    print("written:", out / f"{kind}.json", *([out / "dialogue.png"] if config.dialogue else []))


if __name__ == "__main__":
    run_command(main)
