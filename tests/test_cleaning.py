"""chapters/cleaning.py: each stage keeps its promise, alone and beside the others."""

import re
import unicodedata
from random import Random

import pytest

from chapters.cleaning import (ALIKE, DEFAULT, MISSPELLED, SENTENCES, STAGES, cut, in_case,
                               split_paragraphs, split_sentences)
from data import clean

# What the stages act on, what they must not touch, and what may turn from one into the other.
PARTS = ["a", "B", "don", "t", "n", "can", "couldn", "ve", "teh", "recieve", " ", "  ", "\n",
         "\r", "\t", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029", "\xa0", "\u3000", "\u200b",
         "\u200c",
         "\u200d", "\u180e", "\u061c", "\xad", "\ufeff", "\u202e", "\u2066", "\0", "\x08", "\x1b",
         "\x1b[31m", "\x9b", "\x1b]0;x", "\x07", "e", "\u0301", "\u0316", "\u0327", "\u0344",
         "\u1e9b\u0323", "\ufb01", "\u212b", "\uff21", "\uac00", "\u1100", "\u1161", "\u0e33",
         "\u0f73", "\uff9e", "'", "\u2019", "“", "\u2014", "\u2026", ".", "!", "1", "#",
         "\ufe0f", "\ufe0e", "\u20e3", "\U0001f600", "\U0001f44d", "\U0001f3fd", "\U0001f468",
         "\u2764", "©", "\U0001f1e9", "\U0001f1ea", "\U0001f3f4", "\U000e0067", "\U000e0062",
         "\U000e007f", "\u0430", "\u043d", "\u03bf", "\u0394", "\u0130", "\u03a3", "\u0644",
         "\u0645", "\u0915", "\u094d", "\ud800", "。", "！"]


def texts(n, seed=0):
    random = Random(seed)
    return ["".join(random.choices(PARTS, k=random.randrange(1, 12))) for _ in range(n)]


def apply(names, text):
    for name in names:
        text = STAGES[name](text)
    return text


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_applied_twice_is_the_stage_applied_once(name):
    for text in texts(4000):
        once = STAGES[name](text)
        assert STAGES[name](once) == once, ascii(text)


@pytest.mark.parametrize("names", [DEFAULT, [*STAGES]])
def test_so_are_the_default_stages_and_all_stages_in_their_order(names):
    for text in texts(4000, seed=1):
        once = apply(names, text)
        assert apply(names, once) == once, ascii(text)


def test_any_choice_of_stages_beside_the_default_ones_gives_a_text_that_these_leave_alone():
    random = Random(2)
    for text in texts(3000, seed=2):
        chosen = [name for name in STAGES if name in DEFAULT or random.random() < 0.5]
        once = apply(chosen, text)
        assert apply(DEFAULT, once) == once, (chosen, ascii(text))


def test_data_py_changes_nothing_in_a_clean_text_but_lone_surrogates():
    for text in texts(4000, seed=3):
        text = apply(DEFAULT, text)
        assert clean(text) == re.sub("[\ud800-\udfff]", "\ufffd", text), ascii(text)


def test_the_default_stages_change_in_a_text_of_data_py_only_what_it_does_not_know():
    unknown = "[\xad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb" + (
        "\U000e0001-\U000e007f\xa0\u1680\u2000-\u200a\u205f\u3000]")
    cleaned = [clean(text) for text in texts(4000, seed=4)]
    known = [text for text in cleaned if not re.search(unknown, text)]
    assert len(known) > 500 and all(apply(DEFAULT, text) == text for text in known)


@pytest.mark.parametrize("name", DEFAULT)
def test_a_clean_ascii_text_comes_back_as_the_same_object(name):
    text = "def f(x):\n    return x  # as it is\n\n\n| a   | b |" * 10
    assert STAGES[name](text) is text


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_normalisation_is_that_of_unicodedata_for_long_runs_of_marks_too(form):
    marks = "\u0301\u0316\u0327\u0344\u0f73\uff9e\u0345゙"
    random = Random(5)
    runs = ["e" + "".join(random.choices(marks, k=n)) + "x" for n in range(200)]
    for text in [*texts(4000, seed=6), *runs, *map(chr, range(0x30000))]:
        assert STAGES[form.lower()](text) == unicodedata.normalize(form, text), ascii(text)


def test_every_line_end_is_one_line_end():
    text = "a\nb\rc\r\nd\ve\ff\x85g\u2028h\u2029i"
    assert STAGES["line_ends"](text).split("\n") == [*"abcdefghi"]


def test_escape_sequences_go_whole_and_line_ends_stay():
    text = "\x1b[1;31mred\x1b[0m \x1b]0;title\x07N\x08N \0a\u200bb\ufeffc\xadd\u202ee\r\n\tf"
    assert STAGES["controls"](text) == "red N abcde\r\n\tf"


@pytest.mark.parametrize("text", [
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0915\u094d\u200d\u0937",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f\u200d\U0001f525",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"],
    ids=["Persian", "Hindi", "family", "heart on fire", "flag of England"])
def test_joiners_and_tags_stay_where_a_script_or_an_emoji_needs_them(text):
    assert apply(DEFAULT, text) == text
    hidden = text.replace(text[0], "x", 1) if text[0] > "\u2000" else "x\u200dy\u200cz"
    assert "\u200d" not in STAGES["controls"](hidden)[:2] and "\U000e0067" not in (
        STAGES["controls"](hidden))


def test_white_space_keeps_indentation_and_tables():
    text = "    if x:\t# tab\n\n\n\n\n| a   | b |  \n\u3000\u3000c\xa0d\u2009e \t\n"
    assert STAGES["white_space"](text) == "    if x:\t# tab\n\n\n| a   | b |\n  c d e"


@pytest.mark.parametrize("text, left", [
    ("Hi \U0001f600 there", "Hi there"), ("Yes\U0001f44d\U0001f3fd!", "Yes!"), ("\U0001f600 item",
    "item"),
    ("a \U0001f468\u200d\U0001f469\u200d\U0001f467 b", "a b"), ("1\ufe0f\u20e3 one", "one"),
    ("in \U0001f1e9\U0001f1ea.", "in."), ("\u2764\ufe0f", ""), ("\u2764 © ™ #1 *",
    "\u2764 © ™ #1 *"),
    ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "")])
def test_emoji_go_whole_and_signs_of_text_stay(text, left):
    assert STAGES["emoji"](text) == left


def test_look_alike_letters_are_alike_by_their_names():
    for row in ALIKE:
        scripts = [unicodedata.name(letter).split()[0] for letter in row]
        assert len(row) == 3 and all(script in (wanted, "FULL") for script, wanted in
                                     zip(scripts, ("LATIN", "CYRILLIC", "GREEK")))
        assert {unicodedata.category(letter) for letter in row} - {"Po"} in ({"Lu"}, {"Ll"})


@pytest.mark.parametrize("text, left", [
    ("p\u0430yp\u0430l", "paypal"), ("\u043de", "\u043d\u0435"), ("\u0421\u0421\u0421P",
    "\u0421\u0421\u0421\u0420"),
    ("\u03bbo\u03b3\u03bf\u03c2", "\u03bb\u03bf\u03b3\u03bf\u03c2"),
    *((word, word) for word in ["\u0441\u043e\u0432\u0430", "\u0394E", "k\u03a9",
                                "\u03bb\u03cc\u03b3\u03bf\u03c2", "Wi-\u0424\u0438",
                                "x_\u0430", "b\u0449", "\u0410"])])
def test_a_word_of_two_scripts_gets_the_one_of_most_letters_and_others_stay(text, left):
    assert STAGES["homographs"](text) == left


def test_typographic_signs_become_ascii():
    assert STAGES["quotes"]("“a” \u2018b\u2019 c\u2013d\u2014e\u2026 \xabf\xbb") == (
        "\"a\" 'b' c-d--e... \"f\"")


@pytest.mark.parametrize("text, left", [
    ("I don't, you CAN'T, Won't we?", "I do not, you CANNOT, Will not we?"),
    ("I'm, we\u2019ve, They'll, let's", "I am, we have, They will, let us"),
    ("couldn't've", "could not have"),
    *((word, word) for word in ["she's", "he'd", "the dog's", "ain't", "o'clock", "'tis",
                                "rock'n'roll"])])
def test_contractions_with_one_meaning_are_written_out_in_their_case(text, left):
    assert STAGES["contractions"](text) == left


def test_misspellings_are_put_right_as_whole_words_in_their_case():
    stage = STAGES["misspellings"]
    assert stage("Teh wierd RECIEVE, untill.") == "The weird RECEIVE, until."
    for text in ("recieve_x", "a@recieve.com", "teheran", "www.teh.org", "recieve.com"):
        assert stage(text) == text
    assert in_case("Teh", "the") == "The"
    assert len(MISSPELLED) > 100 and not {*MISSPELLED} & {*MISSPELLED.values()}


@pytest.mark.parametrize("split", [split_paragraphs, split_sentences])
@pytest.mark.parametrize("limit", [1, 7, 40, 200])
def test_pieces_keep_to_the_limit_and_lose_only_white_space(split, limit):
    prose = ("He paid 3.50 to Dr. A. Low, i.e. all. Then he left!  \n\nNext one? Yes...\n" * 3
             + "今日は。明日！「はい。」 " + "x" * 90)
    for text in [prose, *texts(300, seed=7)]:
        pieces = split(text, limit)
        assert all(0 < len(piece) <= limit and piece.strip() for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join(text.split())


def test_pieces_end_at_blank_lines_or_sentences_and_are_as_long_as_fits():
    text = "One. Two.\n\n    code\n    more\n\nThree is long. Four."
    assert split_paragraphs(text, 24) == ["One. Two.", "    code\n    more", "Three is long. Four."]
    assert split_paragraphs(text, 31) == ["One. Two.\n\n    code\n    more", "Three is long. Four."]
    assert split_paragraphs("One. Two three.", 10) == ["One.", "Two three."]
    assert split_paragraphs(text, 100) == [text] and split_paragraphs(" \n", 1) == []


@pytest.mark.parametrize("sentences", [
    ["Dr. A. Low paid 3.50 in St. Ives.", "He left."],
    ["See e.g. No. 5 at 10 a.m. today.", "“Why?”", "She ran."],
    ["A title", "A text... and more."], ["यह है।", "वह"], ["今日は。", "「明日！」", "はい？"]])
def test_a_sentence_ends_where_a_reader_sees_its_end(sentences):
    text = ("" if sentences[-1] == "はい？" else " ").join(sentences).replace("title ", "title\n\n")
    assert [*filter(None, SENTENCES.split(text))] == sentences


def test_a_limit_below_one_is_refused_in_one_line():
    with pytest.raises(ValueError, match="limit=0 must be at least 1 character$"):
        split_sentences("a", 0)


HOSTILE = ["\x1b", "\x1b]", "\x9b", "\x08", "a\x08", "\u200d", "\u0301\u0316", "\uff9e\u0301",
           "\u0f73\u0316",
           " ", " \n", "\n\t", "\t ", "\xa0", ".", ")", ".)", "。", "」", "!?", "a.", "1.",
           "\U0001f600",
           "\U0001f468\u200d", "\u2764", "1\ufe0f", "\U0001f3f4\U000e0067", "a", "a\u0430",
           "\u0430", "'", "a'",
           "can't", "teh", "n't've", "\ud800", "\r", "\r\n", "Mr. ", "'s'"]


@pytest.mark.parametrize("part", HOSTILE, ids=ascii)
def test_hostile_texts_take_linear_time(part):
    text = "x" + part * (100_000 // len(part)) + "x"
    for stage in STAGES.values():
        stage(text)
    split_paragraphs(text, 5000)


def test_pieces_of_no_level_are_cut_by_length():
    assert cut("abcde", 2) == ["ab", "cd", "e"]
