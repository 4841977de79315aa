"""chapters/rules.py and measures.py: what tells prose from the rest, counted slowly and fast."""

import json
from random import Random

import pytest
from conftest import ROOT, mistake

from chapters import rules
from chapters.measures import (UNMARKED, UNSPACED, Measures, duplicate_ngrams, main_script,
                               split_words, top_ngram)
from chapters.rules import (DEFAULT, RULES, STOP_WORDS, THRESHOLDS, c4_lines, fails, measure,
                            quality)

ROWS = [*map(json.loads, (ROOT / "chapters/rules.jsonl").read_text("utf-8").splitlines())]
GOOD = [row["text"] for row in ROWS if row["fails"] is None]
ENGLISH = [row["text"] for row in ROWS if main_script(row["text"]) == "LATIN"]


def disturbed(texts, n, seed=0):
    """n texts that are shuffled, repeated in part, full of symbols, or cut into short lines."""
    random = Random(seed)

    def repeat(parts, between):
        start = random.randrange(len(parts))
        piece = parts[start:start + random.randint(1, 12)]
        for _ in range(random.randint(1, 6)):
            place = random.randrange(len(parts) + 1)
            parts[place:place] = piece
        return between.join(parts)

    def spoil(text):
        chars = [*text]
        for _ in range(len(chars) // random.randint(3, 40)):
            chars[random.randrange(len(chars))] = random.choice("#…. \n-•19é")
        return "".join(chars)
    ways = [lambda text: repeat(text.split(), " "), lambda text: repeat(text.split("\n"), "\n"),
            lambda text: repeat(text.split("\n\n"), "\n\n"), spoil,
            lambda text: " ".join(random.sample(text.split(), len(text.split()))),
            lambda text: "\n".join(text.split(". ")),
            lambda text: "\n".join(random.choice(["- ", ""]) + line + random.choice(["...", ""])
                                   for line in text.split("\n"))]
    return [random.choice(ways)(random.choice(texts)) for _ in range(n)]


def lines_of(text):
    return [line.strip() for line in text.split("\n") if line.strip()]


def share_before(parts, size):
    """Slowly: how much of the parts stands somewhere before."""
    return sum(size(part) for i, part in enumerate(parts) if part in parts[:i])


def slow_top(words, n):
    """Characters of the most frequent n words, from all pairs of places."""
    grams = [" ".join(words[i:i + n]) for i in range(len(words) - n + 1)]
    counts = {gram: sum(gram == other for other in grams) for gram in grams}
    most = max(counts.values(), default=0)
    return max((most * len(gram) for gram in grams if counts[gram] == most > 1), default=0)


def slow_duplicates(words, n):
    """Characters of each word that lies in n words which stand somewhere before."""
    grams = [words[i:i + n] for i in range(len(words) - n + 1)]
    covered = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
    return sum(len(words[i]) for i in covered)


def slowly(text):
    """The measures of an English text, each as its definition says."""
    words, lines = text.split(), lines_of(text)
    n_words, n_lines, n_chars = max(1, len(words)), max(1, len(lines)), max(1, len(text))
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    values = {
        "gopher_word_count": len(words),
        "gopher_mean_word_length": sum(len(word) for word in words) / n_words,
        "gopher_hashes": text.count("#") / n_words,
        "gopher_ellipses": (text.count("...") + text.count("…")) / n_words,
        "gopher_bullet_lines": sum(line[0] in "•‣◦●▪-*" for line in lines) / n_lines,
        "gopher_ellipsis_lines": sum(line[-3:] == "..." or line[-1] == "…"
                                     for line in lines) / n_lines,
        "gopher_alphabetic_words": sum(any(c.isalpha() for c in word) for word in words) / n_words,
        "fineweb_short_lines": sum(len(line) < 30 for line in lines) / n_lines,
        "fineweb_duplicate_lines": share_before(lines, len) / n_chars,
        "c4_curly_brackets": text.count("{")}
    for name, parts in ("lines", lines), ("paragraphs", paragraphs):
        values[f"gopher_duplicate_{name}"] = (share_before(parts, lambda part: 1)
                                              / max(1, len(parts)))
        values[f"gopher_duplicate_{name}_characters"] = share_before(parts, len) / n_chars
    values |= {f"gopher_top_{n}_gram": slow_top(words, n) / n_chars for n in range(2, 5)}
    return values | {f"gopher_duplicate_{n}_gram": slow_duplicates(words, n) / n_chars
                     for n in range(5, 11)}


def test_each_measure_is_what_its_definition_says():
    texts = ["", "a", "a b", " \n\n ", "b b b b b b b", *ENGLISH[::4], *disturbed(ENGLISH, 30)]
    for text in texts:
        for name, value in slowly(text).items():
            assert THRESHOLDS[name].measure(Measures(text)) == pytest.approx(value), name


def test_what_passes_quickly_passes_in_full():
    random = Random(1)
    small = ["".join(random.choices("ab \n.", (9, 4, 6, 1, 1), k=random.randint(0, 90)))
             for _ in range(200)]
    texts = small + disturbed([row["text"] for row in ROWS], 150)
    quick = [(name, rule) for name, rule in THRESHOLDS.items() if rule.passes]
    for m in map(Measures, texts):
        for name, rule in quick:
            for share in 0.02, 0.1, 0.3:
                rule = rule._replace(most=share) if rule.least == 0 else rule
                if rule.passes(m, rule):
                    value = rule.measure(m)
                    assert value is None or rule.least <= value <= rule.most, (name, m.text)


def test_good_english_is_never_counted_in_full(monkeypatch):
    for name in "top_ngram", "duplicate_ngrams":
        monkeypatch.setattr(Measures, name, lambda *args: pytest.fail("counted"))
    texts = [text for text in GOOD if text.isascii()]
    assert len([text for text in texts if quality(text) is None]) > 20


@pytest.mark.parametrize("script", "CJK CYRILLIC ARABIC DEVANAGARI THAI HANGUL GREEK MYANMAR"
                         .split())
def test_good_text_in_another_script_passes(script):
    texts = [text for text in GOOD if main_script(text) == script]
    assert texts and [quality(text) for text in texts] == [None] * len(texts)


def test_good_text_in_other_languages_of_latin_script_passes():
    texts = [text for text in GOOD if main_script(text) == "LATIN" and max(text) > "\x7f"]
    dropped = [text for text in texts if quality(text)]
    assert len(texts) > 4 and not dropped


def test_rules_find_repetition_in_scripts_without_spaces():
    texts = [text for text in GOOD if main_script(text) in UNSPACED]
    assert len(texts) >= 4
    for text in texts:
        line = text[:60].replace("\n", "")
        m = Measures("\n".join([line] * 9))
        assert RULES["gopher_duplicate_lines"](m) and RULES["gopher_duplicate_10_gram"](m)
        assert RULES["gopher_duplicate_5_gram"](Measures(line * 9))
        assert RULES["gopher_top_3_gram"](Measures(text[:120] + text[:9] * 40))


def test_most_bad_examples_are_dropped_and_few_good_ones():
    precision, recall = measure(ROWS, RULES)["all"]
    assert precision > 0.75 and recall > 0.95
    assert len(GOOD) > 40 and {row["fails"] for row in ROWS} <= {None, *THRESHOLDS}


def test_precision_and_recall_count_what_they_say():
    short, text = "A dog.", "Read {this} and that, and be glad to have it. " * 6
    rows = [dict(text=short, fails="gopher_word_count"), dict(text=short, fails=None),
            dict(text=text, fails="c4_curly_brackets"), dict(text=short, fails="blocked_words")]
    scores = measure(rows, ("gopher_word_count", "c4_curly_brackets", "blocked_words"))
    assert scores["gopher_word_count"] == (2 / 3, 1) and scores["c4_curly_brackets"] == (1, 1)
    assert scores["blocked_words"][1] == 0 and scores["blocked_words"][0] != 0
    assert scores["all"] == (3 / 4, 1)


def test_the_examples_in_the_docstrings_are_true():
    assert main_script("Привет, world, и пока") == "CYRILLIC"
    assert split_words("今天天气很好。", "CJK") == ["今天", "天气", "很好。"]
    words = "so it is and so it was".split()
    assert top_ngram(words, 2) == 2 * len("so it") and duplicate_ngrams(words, 2) == len("soit")
    assert c4_lines("Menu\nWe saw a dog today.") == "We saw a dog today."
    assert Measures("So it is.\nSo it was.").word_count == 6


@pytest.mark.parametrize("line, stays", [
    ("This line is a sentence.", True), ("This line is not a sentence", False),
    ("He said that it was \"over.\"", True), ("« Et il était parti hier . »", True),
    ("He called it \"the end\"", True), ("And then it was over...", False),
    ("Only four words here.", False), ("Please turn on JavaScript to go on.", False),
    ("We have a Privacy Policy for you.", False), ("See " + "a" * 1001 + " of it all.", False),
    ("我们昨天去了公园看花。", True), ("我们去。", False), ("Мы были вчера в парке.", True),
    ("ตลาดริมคลองจะคึกคักมากในตอนเช้า", True), ("क्या आप कल घर पर थे।", True)])
def test_c4_keeps_sentences_of_five_words_that_are_no_notice(line, stays):
    assert c4_lines(f"\n {line} \n\n") == line * stays


def test_a_page_needs_three_sentences_in_the_lines_that_stay():
    one = "We saw a dog in the park today."
    for text, n in ((one, 1), (f"{one} {one}\nMenu", 2), (f"{one} {one}\n{one}", 3),
                    (f'{one} "{one}" ({one})', 3), (f"{one} {one} {one}...", 0)):
        assert THRESHOLDS["c4_sentences"].measure(Measures(text)) == n
        assert RULES["c4_sentences"](Measures(text)) == (n < 3)


def test_stop_words_count_in_their_own_language_and_script():
    for script, lists in STOP_WORDS.items():
        for words in lists:
            m = Measures(" ".join(sorted(words) * 4))
            assert m.script == script and not RULES["gopher_stop_words"](m)
    assert RULES["gopher_stop_words"](Measures("sofa chair table and lamp " * 9))
    assert RULES["gopher_stop_words"](Measures("диван стол шкаф the лампа of ковёр " * 9))
    assert not RULES["gopher_stop_words"](Measures("ინგლისური ენა " * 9))  # no list for Georgian


def test_a_threshold_can_be_changed_and_at_it_a_text_passes():
    text = "one two three four five"
    for least, failed in (5, False), (6, True):
        changed = {"gopher_word_count": THRESHOLDS["gopher_word_count"]._replace(least=least)}
        assert fails("gopher_word_count", Measures(text), THRESHOLDS | changed) == failed
        assert (quality(text, ["gopher_word_count"], changed) is not None) == failed


def test_each_rule_has_a_family_and_takes_any_text():
    assert {*DEFAULT} < {*RULES} == {*THRESHOLDS}
    assert {name.split("_")[0] for name in RULES} == {"gopher", "c4", "fineweb", "blocked"}
    for text in "", " ", "\n\n", "a", "。", "\ud800 \udfff", "\0" * 99, "ก" * 99, "a\u2028b\x85c":
        assert all(type(rule(Measures(text))) is bool for rule in RULES.values())


def test_thai_and_lao_have_no_end_marks_to_ask_for():
    for script in UNMARKED:
        letter = dict(THAI="ก", LAO="ກ")[script]
        m = Measures("\n".join([letter * 40 + " " + letter * 7] * 3))
        assert m.script == script and not RULES["fineweb_unmarked_lines"](m)
    assert RULES["fineweb_unmarked_lines"](Measures("\n".join(["a line with no mark"] * 9)))


def test_one_word_of_a_hundred_is_quoted_and_more_are_meant():
    words = ["word"] * 98
    assert not RULES["blocked_words"](Measures(" ".join(words + ["Bitch!"])))
    assert RULES["blocked_words"](Measures(" ".join(words + ["Bitch!", "fuck,", "(porn)"])))
    assert not RULES["blocked_words"](Measures("Scunthorpe cocktail " * 50))


@pytest.mark.parametrize("piece", ["a ", "ab", "a\n", "\n\n", ". ", "\"", "#", "ก", "今天", "- \n",
                                   "lorem ipsum ", "use cookies\n", "a\n\n", "fuck ", "1 2 ", "… "])
def test_the_worst_text_takes_linear_time(piece):
    m = Measures(piece * (100_000 // len(piece.encode())))
    assert any([rule(m) for rule in RULES.values()])


def test_the_command_says_what_fails_and_by_how_much(tmp_path, call):
    (tmp_path / "a.txt").write_text("Too short.<|endoftext|>" + GOOD[0], "utf-8")
    said, problem = call(rules, tmp_path / "a.txt")
    assert "document 1: fails 5 rules" in said and "document 2: passes" in said and not problem
    assert "gopher_word_count                              2  words; from 50 to 100000" in said


def test_the_command_alone_prints_a_line_for_each_rule(call):
    said, problem = call(rules)
    lines = said.splitlines()
    assert [line.split()[0] for line in lines] == ["rule", *THRESHOLDS, "all"]
    assert len({*map(len, lines)}) == 1 and "nan" not in said  # in columns, "-" where there is none
    assert not problem


def test_words_have_one_hash_only_if_they_are_the_same():
    for text in [row["text"] for row in ROWS] + disturbed(ENGLISH, 20):
        m = Measures(text)
        assert len(m.hashes) == len(m.words)
        assert len({*zip(m.words, m.hashes.tolist())}) == len({*m.hashes.tolist()})
        assert len({*m.hashes.tolist()}) == len({*m.words})


def test_pieces_of_a_script_without_spaces_have_no_gaps():
    m = Measures("今天天气很好，" + "我们去公园" * 4)
    assert m.words[:3] == ["今天", "天气", "很好，"]
    assert m.top_ngram(2) * len(m.text) == 2 * len("我们去公")


def test_a_chinese_line_is_short_below_fifteen_characters():
    for letter, n in ("好", 15), ("한", 15), ("д", 30), ("d", 30):
        assert [Measures(letter * k).short_lines() for k in (n - 1, n)] == [1, 0]


def test_a_file_that_is_not_there_is_one_line(monkeypatch, capsys):
    code, lines = mistake(rules.main, monkeypatch, capsys, "none.txt")
    assert code == 1 and len(lines) == 1 and "none.txt" in lines[0]
