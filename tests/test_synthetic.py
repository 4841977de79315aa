"""Facts about chapters/synthetic.py: text that no person wrote, and that says so."""

import json
import operator
import re
from random import Random
from string import Formatter

import pytest
from conftest import keep, mistake

from chapters import chats, grammar, synthetic
from chapters.grammar import (FIELDS, N_STORIES, PEOPLE, PLOTS, SIZES, arithmetic, columns,
                              fields_of, stories, story)
from chapters.synthetic import CHANGES, PAIRS, SYNONYMS, SyntheticConfig, synthesize
from data import prepare, read_card, read_chats, read_documents

QUIET = dict(say=lambda text: None)
PROBLEMS = dict(  # a word of each question, and its answer by the numbers in it
    gives=lambda a, b, c: a + b - c,
    **{"more than": lambda a, b: a + a + b, "boxes": lambda a, b, c: a * b - c,
       "Monday": lambda a, b, c: a + b + c, "heaps": lambda a, b, c: (a + b) / c,
       "shop": lambda a, b, c: a - b - c})


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# -----------------------------------------------------------------------------
# Stories.


def test_stories_differ_and_the_same_seed_tells_them_again():
    texts = [*stories(1500)]
    assert len({*texts}) == 1500
    assert texts == [*stories(1500)] != [*stories(1500, seed=1)]


def test_all_numbers_of_a_plot_make_different_stories(monkeypatch):
    """In a smaller world, where all of them can be told."""
    for name in [*PEOPLE][2:]:
        monkeypatch.delitem(PEOPLE, name)
    for name, words in FIELDS.items():
        monkeypatch.setitem(FIELDS, name, words[-2:])
    for plot in PLOTS:
        n = 2 * 2**len(fields_of(plot))
        for line in plot:
            n *= len(line)
        assert len({story(plot, number) for number in range(n)}) == n


def test_each_field_stands_in_every_sentence_of_a_line():
    for plot in PLOTS:
        for field in ["hero", "friend", *fields_of(plot)]:
            named = [[field in {(name or "").removeprefix("a_") for _, name, _, _ in
                                Formatter().parse(text)} for text in line] for line in plot]
            assert any(map(all, named)), (field, plot[0])


def test_there_are_as_many_stories_as_is_stated_and_no_more():
    assert N_STORIES == len(PLOTS) * min(SIZES) > 10**9
    with pytest.raises(ValueError, match="is more than the"):
        stories(N_STORIES + 1)


def test_stories_are_made_of_whole_sentences_with_the_right_articles_and_pronouns():
    for text in stories(800):
        assert "{" not in text and "  " not in text and text[-1] == "."
        assert all(part[0].isupper() or part[0] == '"' for part in re.split(r"(?<=\.) ", text))
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text)
        heroes = [name for name in PEOPLE if re.search(rf"\b{name}\b", text)]
        assert len(heroes) == 2
        said = {dict(he="he", his="he", him="he", she="she", her="she")[word]
                for word in re.findall(r"\b(?:he|his|him|she|her)\b", text.lower())}
        assert len(said) <= 1 and said <= {PEOPLE[name] for name in heroes}


# -----------------------------------------------------------------------------
# Arithmetic.


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def value(words):
    """What a sum is worth: value("3 + 4") == 7; signs from left to right."""
    first, *rest = words.split()
    result = int(first)
    for sign, number in zip(rest[::2], rest[1::2]):
        result = SIGNS[sign](result, int(number))
    return result


def answer_to(question):
    """The answer, worked out from the words of the question alone."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if found := re.fullmatch(r"What is (\d+ [+-] \d+)\?", question):
        return value(found[1])
    if question.startswith("Which is larger"):
        return max(numbers)
    [answer] = [function(*numbers) for word, function in PROBLEMS.items()
                if word in question]
    return answer


@pytest.mark.parametrize("largest", [9, 99, 12345])
def test_each_answer_and_each_step_is_right(largest):
    for question, solution in arithmetic(300, seed=largest, largest=largest):
        assert answer_to(question) == int(re.search(r"The answer is (\d+)\.$", solution)[1])
        steps = re.findall(r"([\d +*/-]+) = (\d+)", solution)
        assert steps or " is more than " in solution
        assert all(value(left) == int(right) for left, right in steps)
        for more, less in re.findall(r"(\d) is more than (\d)", solution):
            assert int(more) > int(less)


def test_the_digits_of_the_steps_are_those_of_the_result():
    random = Random(0)
    for _ in range(500):
        b, a = sorted(random.randrange(10**random.randint(1, 9)) for _ in "ab")
        for sign, result in ("+", a + b), ("-", a - b):
            steps = columns(a, b, sign)
            digits = "".join(re.search(r"= \d?(\d)", step)[1] for step in reversed(steps))
            assert int(("1" if "carry" in steps[-1] else "") + digits) == result


def test_problems_differ_and_the_same_seed_sets_them_again():
    pairs = [*arithmetic(400)]
    assert len({question for question, _ in pairs}) == 400
    assert pairs == [*arithmetic(400)] != [*arithmetic(400, seed=1)]


def test_no_more_problems_are_promised_than_there_are(monkeypatch):
    monkeypatch.setattr(grammar, "TASKS", [grammar.addition])
    with pytest.raises(ValueError, match="no more than 100 problems .* a greater --largest"):
        [*arithmetic(101, largest=9)]


def test_a_chat_of_arithmetic_is_one_that_chats_reads(tmp_path, call):
    out, _ = call(synthetic, "arithmetic", "--n=20", "--chats", f"--out={tmp_path / 'a'}")
    path = tmp_path / "a" / "chats.jsonl"
    assert out.splitlines()[-1] == f"next: python data.py {tmp_path / 'a'}"
    for messages in read_chats(path):
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert f" {answer_to(messages[0]['content']):.0f}." in messages[1]["content"]
    assert "20 chats of" in call(chats, path)[0]
    shards = prepare(tmp_path / "a", tmp_path / "shards", vocab_size=300, **QUIET)
    assert read_card(shards).options["chats"] and read_card(shards).counts["documents"] == 20


# -----------------------------------------------------------------------------
# Augmentation.

TEXT = "The small dog was happy.  It ran quickly to the old shop!\nThen it began to speak; why?\n"


def changed(name, share=0.3, seed=0, text=TEXT):
    return CHANGES[name](text, share, Random(seed))


@pytest.mark.parametrize("seed", range(20))
def test_each_change_does_what_its_name_says_and_no_more(seed):
    words = TEXT.split()
    assert sorted(changed("swap", seed=seed).split()) == sorted(words)
    assert sorted(changed("shuffle", seed=seed).split()) == sorted(words)
    assert changed("case", seed=seed).lower() == TEXT.lower()
    left = iter(words)
    assert all(word in left for word in changed("delete", seed=seed).split())  # in their order
    assert len(changed("delete", seed=seed).split()) == len(words) - round(0.3 * len(words))
    for old, new in zip(words, changed("synonyms", seed=seed).split(), strict=True):
        assert old == new or new.strip(".!;?") in SYNONYMS[old.strip(".!;?")]


def test_a_change_keeps_the_lines_and_one_word():
    assert synthetic.split_words("a b") == (["", "a", " ", "b", ""], range(1, 5, 2))
    assert changed("swap").count("\n") == changed("synonyms").count("\n") == 2
    assert changed("delete", 1.0, text="all of this") in ("all ", "of ", "this")
    assert [changed(name, text="") for name in CHANGES] == [""] * len(CHANGES)


def test_a_word_and_its_synonym_take_the_same_article():
    for pair in PAIRS:
        one, other = pair.split()
        assert (one[0] in "aeiou") == (other[0] in "aeiou") and one in SYNONYMS[other]


@pytest.mark.parametrize("part", ["!", "a", "a ", ". A", ".\n", "small ", "((a", '"\'', " \t"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_long_text_of_one_part_comes_to_an_end(name, part):
    text = part * (100_000 // len(part)) + "b"
    assert abs(len(changed(name, text=text)) - len(text)) <= len(text)


# -----------------------------------------------------------------------------
# The command.


def test_card_and_rows_say_that_the_text_is_synthetic_and_shards_repeat_it(tmp_path, call):
    out = tmp_path / "stories"
    said, _ = call(synthetic, "stories", "--n=50", f"--out={out}")
    assert said.splitlines()[-1] == f"next: python data.py {out}"
    card = json.loads((out / "card.json").read_text())
    assert card["synthetic"] is True and card["sources"][0]["name"] == "synthetic stories"
    assert card["stages"][0]["documents"] == 50 and len(card["stages"][0]["examples"]) == 5
    assert all(row["source"].startswith("synthetic ") for row in rows(out / "documents.jsonl"))
    assert [*read_documents(out / "documents.jsonl")] == [*stories(50)]
    shards = prepare(out, tmp_path / "shards", vocab_size=300, **QUIET)
    assert read_card(shards).sources[0]["curated"] == card


def test_curate_gives_the_same_fields_in_its_card(tmp_path):
    from chapters.curate import CurateConfig, curate
    _, card = synthesize(SyntheticConfig("stories", n=30, out=str(tmp_path / "a")))
    source = str(tmp_path / "a" / "documents.jsonl")
    other = curate(CurateConfig([source], str(tmp_path / "b")), **QUIET)
    assert card.keys() - other.keys() == {"synthetic"} and not other.keys() - card.keys()
    assert card["stages"][0].keys() == other["stages"][0].keys()
    assert card["sources"][0].keys() == other["sources"][0].keys()


def test_augmented_rows_name_the_change_and_the_source_and_what_stays_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "One small word."}\n{"body": "...!"}\n')
    config = SyntheticConfig("augment", [str(path)], str(tmp_path / "b"), versions=40, field="body")
    file, card = synthesize(config)
    sources = {row["source"] for row in rows(file)}
    assert sources == {f"synthetic {name} of {path}, 1" for name in CHANGES if name != "shuffle"}
    [record] = card["stages"]
    assert record["documents"] + record["dropped"] == 80 and record["dropped"] >= 40
    assert not {row["text"] for row in rows(file)} & {"One small word.", "...!"}
    (tmp_path / "card.json").write_text('{"license": "CC0-1.0"}')
    twin = SyntheticConfig("augment", [str(path)], str(tmp_path / "c"), versions=40, field="body")
    again, card = synthesize(twin)
    assert rows(again) == rows(file) and card["sources"][0]["curated"] == {"license": "CC0-1.0"}


def test_a_run_writes_after_each_prompt_in_turn(tmp_path, tokenizer, model):
    keep(model, tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "prompts.txt").write_text("the cat\na big dog\n")
    options = dict(n=3, from_run=str(tmp_path / "run"), max_new_tokens=4)
    prompted, card = synthesize(SyntheticConfig(
        "run", out=str(tmp_path / "a"), prompts=str(tmp_path / "prompts.txt"), **options))
    assert [row["text"].startswith(("the cat", "a big dog")[i % 2])
            for i, row in enumerate(rows(prompted))] == [True] * 3
    assert card["sources"][0]["name"] == f"synthetic run {tmp_path / 'run'}"
    free, again = (rows(synthesize(SyntheticConfig("run", out=str(tmp_path / name), **options))[0])
                   for name in "bc")
    assert free == again and len({row["text"] for row in free}) > 1


@pytest.mark.parametrize("words, problem", [
    ("", "unknown kind ''"), ("storys --out={out}", "did you mean stories?"),
    ("stories", "--out=FOLDER is missing"), ("run --out={out}", "run needs from_run"),
    ("augment --out={out}", "augment needs files"),
    ("augment none.jsonl --out={out}", "none.jsonl: no such file"),
    ("augment {here}/broken.jsonl --out={out}", "broken.jsonl, row 1"),
    ("augment {here}/a.jsonl --how=swop --out={out}", "--how=swop: must be none or of delete"),
    ("augment {here}/a.jsonl --how=none --out={out}", "--how=none changes nothing"),
    ("augment {here}/a.jsonl --how shuffle --out={out}", "no document is left"),
    ("stories --n=0 --out={out}", "n=0 must be at least 1"),
    ("stories --n=2000000000000 --out={out}", "n=2000000000000 must be"),
    ("stories --largest=50 --out={out}", "--largest would not act beside stories"),
    ("stories --chats --out={out}", "--chats would not act beside stories"),
    ("stories a.txt --out={out}", "--files would not act beside stories"),
    ("run --from_run=none --out={out}", "none"),
    ("arithmetic --largest=8 --out={out}", "largest=8 must be at least 9"),
    ("stories --out={here}", "holds other shards or files"),
    ("augment {here}/a.jsonl --share=1.5 --out={out}", "share=1.5 must be")])
def test_a_wrong_option_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, words,
                                                       problem):
    (tmp_path / "a.jsonl").write_text('{"text": "One sentence."}\n')
    (tmp_path / "broken.jsonl").write_text("[\n")
    out = tmp_path / "out"
    words = words.format(out=out, here=tmp_path).split()
    code, (line,) = mistake(synthetic.main, monkeypatch, capsys, *words)
    assert code == 1 and problem in line and not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "broken.jsonl"}
