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

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
from tqdm import tqdm

from tokenizer import Parser, run_command, share_cores, write_json

if __name__ == "__main__":
    share_cores()

from chapters.dialogue import draw_dialogues, percent, run_dialogues, say_dialogues, share
from chapters.talk import add_contestants, converse, open_all
from evaluate import bootstrap, wilson

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
# Questions, and what a judge reads.


def is_question(row):
    """Whether a value read from JSON is a question in MT-Bench's format."""
    if not isinstance(row, dict) or not {"question_id", "category", "turns"} <= set(row):
        return False
    turns, reference = row["turns"], row.get("reference", [])
    return (isinstance(turns, list) and isinstance(reference, list) and len(turns) > 0
            and all(isinstance(text, str) and text.strip() for text in turns + reference)
            and all(isinstance(row[name], (str, int)) for name in ("question_id", "category")))


def read_jsonl(path):
    """Yield (number, value) of the lines of a .jsonl file; ValueError for the first that is not
    JSON."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON in UTF-8: {error}") from None


def read_questions(path=QUESTIONS):
    """Questions in MT-Bench's format, one a line: question_id, category, turns, and reference where
    there are right answers; ValueError names the first line that is none."""
    questions = []
    for number, row in read_jsonl(path):
        if not is_question(row):
            raise ValueError(f'{path}, line {number} is not a question like {{"question_id": 1, '
                             '"category": "math", "turns": ["What is 1 + 1?", "Twice that?"]}')
        questions.append(row)
    if not questions:
        raise ValueError(f"{path} holds no questions, one a line")
    return questions


def transcript(question, answers, name="Assistant"):
    """What was said up to the last of the answers, for a judge to read."""
    lines = [f"User: {text}\n{name}: {answer}" for text, answer in zip(question["turns"], answers)]
    return "\n".join(lines)


def bracketed(text):
    """The last [[...]] of a judge's words, or None: bracketed("... so [[B]]") == "B"."""
    found = re.findall(r"\[\[\s*([\w.]+)\s*\]\]", text)
    return found[-1] if found else None


def ask(judge, frame, question, turn, shown):
    """-> (the judge's words about a turn, from 0, of a question, its verdict or None)"""
    reference = question.get("reference", [])[turn:turn + 1]
    frame, choices = SHORT[frame] if judge.short else frame, CHOICES[frame]
    text = frame.format(last=("first", "second", "third")[turn] if turn < 3 else "last",
                        reference=f" A right answer: {reference[0]}" if reference else "",
                        shown=shown)
    said = judge.judge(text, choices)
    return said, bracketed(said)


def check_judge(judge, frame, question):
    """ValueError if a judge gives no verdict even on answers without words, before any is made."""
    said, verdict = ask(judge, frame, question, 0, "User: Hi\nAssistant A: Hi\nAssistant B: Hi")
    if verdict is None:
        why = f"it says {said[-60:]!r}" if said else "its context is too short for the question"
        raise ValueError(f"the judge gives no verdict like [[{CHOICES[frame][0]}]]: {why}")


def compare(judge, question, turn, answers):
    """Judge the answers {"A": [...], "B": [...]} to one turn in both orders -> a row: who won in
    each order (A, B, tie, or None without a verdict), and who has won: both times, or a tie."""
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
    try:
        number = float(verdict)
    except (TypeError, ValueError):
        number = 0
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
        categories[game["category"]].append(game)
    judged = [game["won"] for game in games if None not in game["won"]]
    if not judged:
        raise ValueError("the judge gave no verdict like [[A]]: a run's context may be too short "
                         "for two answers, a smaller --max_tokens makes them shorter")
    first = [winner == order for game in games for winner, order in zip(game["won"], "AB")
             if winner in ("A", "B")]
    return dict(
        win_rate=win_rate(winners, len({game["question"] for game in games})),
        wins={name: winners.count(name) for name in ("A", "B", "tie")},
        by_category={name: win_rate([game["winner"] for game in rows])["value"]
                     for name, rows in categories.items()},
        agreement=share([a == b for a, b in judged]), first_preferred=share(first),
        no_verdict=sum(game["won"].count(None) for game in games))


def mean_grade(rows):
    """The mean grade with a bootstrap over the questions; ValueError without any grade."""
    grades = defaultdict(list)
    for row in rows:
        if row["grade"] is not None:
            grades[row["question"]].append(row["grade"])
    if not grades:
        raise ValueError("the judge gave no grade like [[5]]: a run's context may be too short for "
                         "an answer, a smaller --max_tokens makes it shorter")
    sums, counts = (np.array([f(values) for values in grades.values()]) for f in (sum, len))
    low, high = bootstrap(sums, counts)
    turns = {turn: mean(row["grade"] for row in rows if row["turn"] == turn and row["grade"])
             for turn in sorted({row["turn"] for row in rows if row["grade"]})}
    return dict(value=sums.sum() / counts.sum(), low=low, high=high, by_turn=turns,
                no_grade=sum(row["grade"] is None for row in rows))


def difference(rows, others):
    """By how much the grades of rows are higher than those of others, with a bootstrap over the
    questions, in pairs; None without a pair."""
    gaps = defaultdict(list)
    for row, other in zip(rows, others):
        if row["grade"] is not None and other["grade"] is not None:
            gaps[row["question"]].append(row["grade"] - other["grade"])
    if not gaps:
        return None
    sums, counts = (np.array([f(values) for values in gaps.values()]) for f in (sum, len))
    low, high = bootstrap(sums, counts)
    return dict(value=sums.sum() / counts.sum(), low=low, high=high)


# -----------------------------------------------------------------------------
# What the command does: contestants {"A": model, ...} in, a report for JSON out.


def answer_all(contestants, questions):
    """-> {name: the replies to all turns of each question}"""
    return {name: [converse(model, question["turns"])
                   for question in tqdm(questions, f"answers of {name}", disable=None, leave=False)]
            for name, model in contestants.items()}


def turns_of(questions):
    return [(i, turn) for i, question in enumerate(questions)
            for turn in range(len(question["turns"]))]


def run_pairs(contestants, judge, questions):
    answers = answer_all(contestants, questions)
    games = []
    for i, turn in tqdm(turns_of(questions), "verdicts", disable=None, leave=False):
        shown = {name: replies[i] for name, replies in answers.items()}
        games.append(compare(judge, questions[i], turn, shown))
        games[-1]["answers"] = {name: replies[turn] for name, replies in shown.items()}
    return dict(summary=summarize_games(games), games=games)


def run_grades(contestants, judge, questions):
    report, answers = {}, answer_all(contestants, questions)
    for name, replies in answers.items():
        rows = [grade(judge, questions[i], turn, replies[i]) | dict(answer=replies[i][turn])
                for i, turn in tqdm(turns_of(questions), "grades", disable=None, leave=False)]
        better = difference(report["A"]["grades"], rows) if report else None
        report[name] = dict(summary=mean_grade(rows), A_is_better_by=better, grades=rows)
    return report


def say_pairs(names, summary):
    wins = summary["wins"]
    yield (f"A {names['A']}: {wins['A']} wins; B {names['B']}: {wins['B']} wins; "
           f"{wins['tie']} ties")
    yield f"win rate of A: {percent(summary['win_rate'])}, ties as half, 95% interval"
    for category, value in summary["by_category"].items():
        yield f"  {category:14s} {value:6.1%}"
    yield (f"the judge: agrees with itself in the other order {percent(summary['agreement'])}, "
           f"prefers what stands first {percent(summary['first_preferred'])}, "
           f"{summary['no_verdict']} times without a verdict")


def say_grades(names, report):
    for name, part in report.items():
        score = part["summary"]
        turns = ", ".join(f"turn {turn}: {value:.2f}" for turn, value in score["by_turn"].items())
        yield (f"{name} {names[name]}: grade {score['value']:.2f} [{score['low']:.2f}, "
               f"{score['high']:.2f}] of 10 ({turns}), {score['no_grade']} answers without a grade")
        if part["A_is_better_by"]:
            value, low, high = part["A_is_better_by"].values()
            yield f"  A is better than {name} by {value:+.2f} [{low:+.2f}, {high:+.2f}]"


# -----------------------------------------------------------------------------
# The command.


def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("contestants", nargs="+", help="run folders or URLs: two to compare, else any number")
    add("--judge", help="a run folder or URL")
    add("--grade", action="store_true", help="grade each answer alone, from 1 to 10")
    add("--dialogue", action="store_true", help="long dialogues; they need no judge")
    add("--questions", default=str(QUESTIONS), help="a .jsonl like MT-Bench's question.jsonl")
    add("--n_dialogues", type=int, default=4, help="dialogues of 25 turns (default %(default)s)")
    add("--out", help="folder to write to (default: the first contestant that is a run)")
    add_contestants(parser)
    return parser.parse_args()


def check_options(options):
    if options.dialogue and (options.grade or options.judge):
        raise ValueError("--dialogue counts by itself: it goes with neither --grade nor --judge")
    if not options.dialogue and not options.judge:
        raise ValueError("someone must judge: --judge=URL or --judge=runs/NAME (or --dialogue)")
    if not (options.dialogue or options.grade) and len(options.contestants) != 2:
        raise ValueError(f"two are compared, and these are {len(options.contestants)}: name two, "
                         "or take --grade or --dialogue")
    if options.n_dialogues < 1 or len(options.contestants) > 26:
        raise ValueError(f"n_dialogues={options.n_dialogues} must be at least 1, the contestants "
                         "at most 26")


def main():
    options = parse_options()
    check_options(options)
    questions = read_questions(options.questions)
    wanted = options.contestants + ([options.judge] if options.judge else [])
    models = open_all(wanted, options)
    judge = models.pop() if options.judge else None
    if judge is not None:
        check_judge(judge, GRADE if options.grade else PAIR, questions[0])
    names = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options.contestants))
    contestants = dict(zip(names, models))
    folders = [name for name in options.contestants if Path(name).is_dir()]
    out, pictures = Path(options.out or (folders or ["."])[0]), []
    if options.dialogue:
        kind, report = "dialogue", run_dialogues(contestants, options.n_dialogues, options.seed)
        pictures = [out / "dialogue.png"]
        draw_dialogues({f"{name} {names[name]}": part["summary"]
                        for name, part in report.items()}, *pictures)
        lines = say_dialogues(names, report)
    elif options.grade:
        kind, report = "grades", run_grades(contestants, judge, questions)
        lines = say_grades(names, report)
    else:
        kind, report = "judge", run_pairs(contestants, judge, questions)
        lines = say_pairs(names, report["summary"])
    print("\n".join(lines))
    known = {name: value for name, value in vars(options).items() if name != "key"}
    write_json(out / f"{kind}.json", dict(options=known, contestants=names, report=report))
    print("written:", *[out / f"{kind}.json", *pictures])


if __name__ == "__main__":
    run_command(main)
