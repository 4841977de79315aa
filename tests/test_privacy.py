"""chapters/privacy.py: what is personal goes, what only looks like it stays."""

import json
import os
import random
import string
import sys
from io import StringIO

import pytest
from conftest import ROOT, mistake

from chapters import privacy
from chapters.privacy import GROUPS, IBAN_LENGTHS, KINDS, group_words, is_luhn, mask_pii, measure

ROWS = [json.loads(line) for line in
        (ROOT / "chapters/privacy.jsonl").read_text("utf-8").splitlines()]
PLANTED = {  # one of each kind; the key in two parts, lest a scanner takes it for a leak
    "key": "ghp_" + "x7Q2mZk9LrT4vB8nW1cY6sD3fG5hJ0aKpE2u", "email": "ann@example.org",
    "iban": "DE89 3704 0044 0532 0130 00", "card": "4111 1111 1111 1111", "ssn": "219-45-6789",
    "passport": "C01X00T47", "ipv6": "2001:4860:4860::8888", "ipv4": "93.184.216.34",
    "phone": "+44 20 7946 0958"}


def planted(kind):
    return f"Passport no. {PLANTED[kind]}" if kind == "passport" else f"It is {PLANTED[kind]}"


def test_the_planted_data_are_one_of_each_kind():
    assert tuple(PLANTED) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_replaced_by_its_tag_and_counted_and_no_other_is(kind):
    text = f"Before: é.\n{planted(kind)}, after it \u200b."
    masked = text.replace(PLANTED[kind], f"<{kind.upper()}>")
    assert mask_pii(text) == mask_pii(text, [kind]) == (masked, {kind: 1})
    assert mask_pii(masked) == (masked, {})


def test_all_kinds_in_one_text_are_masked_whatever_their_order():
    random.seed(0)
    for _ in range(20):
        order = random.sample(KINDS, len(KINDS))
        text, counts = mask_pii(".\n".join(map(planted, order)))
        assert counts == dict.fromkeys(KINDS, 1) and not any(map(text.count, PLANTED.values()))


def test_of_two_that_overlap_the_more_specific_one_is_masked():
    assert mask_pii("postgres://ann:s3cr3tPw9@db.example.org/x")[0] == (
        "postgres://<KEY>@db.example.org/x")
    assert mask_pii("call 4111 1111 1111 1111")[1] == {"card": 1}
    assert mask_pii("tel 219-45-6789")[1] == {"ssn": 1}
    assert mask_pii("from ann@93.184.216.34.example.org")[1] == {"email": 1}


def test_masking_twice_is_masking_once():
    random.seed(1)
    strings = [string for row in ROWS for string in row["found"]]
    parts = [*strings, *(part[random.randrange(len(part)):] for part in strings),
             *" -./:+@=(),\n" * 9]
    for _ in range(3000):
        text = "".join(random.choices(parts, k=random.randrange(2, 8)))
        once = mask_pii(text)[0]
        assert mask_pii(once) == (once, {}), text


def test_the_precision_and_recall_of_each_kind_on_the_labelled_rows():
    for kind, (precision, recall, n) in measure(ROWS).items():
        assert precision >= 0.9 and recall >= 0.8 and n >= 8, (kind, precision, recall, n)


def test_measure_counts_what_is_found_wrongly_and_what_is_missed():
    rows = [dict(text="a@b.org c@d.org", kind="email", found=["a@b.org", "x@y.org"]),
            dict(text="8.8.8.8", kind=None, found=[])]
    assert measure(rows)["email"] == (0.5, 0.5, 2) and measure(rows)["ipv4"] == (0, 0, 0)


def test_the_labelled_rows_are_sound():
    assert len({row["text"] for row in ROWS}) == len(ROWS) >= 250
    for row in ROWS:
        assert row.keys() == {"text", "kind", "found"} and row["kind"] in (None, *KINDS)
        assert bool(row["found"]) == bool(row["kind"])
        assert all(string in row["text"] for string in row["found"])
    assert sum(row["kind"] is None for row in ROWS) > len(ROWS) / 2


def test_a_wrong_digit_breaks_a_cards_sum_and_so_do_most_swaps():
    random.seed(2)
    for _ in range(300):
        number = "".join(random.choices(string.digits, k=random.randrange(12, 19)))
        number += next(digit for digit in string.digits if is_luhn(number + digit))
        at = random.randrange(len(number))
        for digit in set(string.digits) - {number[at]}:
            assert not is_luhn(number[:at] + digit + number[at + 1:])
        swapped = number[:at - 1] + number[at] + number[at - 1] + number[at + 1:] if at else number
        assert is_luhn(swapped) == (swapped == number or {number[at], number[at - 1]} == {*"09"})


def account(country, length):
    """A random account number with its check sum, a bank of four letters."""
    body = "".join(random.choices(string.ascii_uppercase, k=4)
                   + random.choices(string.digits, k=length - 8))
    value = int("".join(str(int(char, 36)) for char in body + country + "00"))
    return f"{country}{98 - value % 97:02}{body}"


@pytest.mark.parametrize("length", IBAN_LENGTHS)
def test_an_account_number_is_masked_with_the_right_sum_and_length_only(length):
    random.seed(3)
    for country in IBAN_LENGTHS[length].split():
        number = account(country, length)
        groups = " ".join(number[i:i + 4] for i in range(0, length, 4))
        for form in (number, number.lower(), groups):
            assert mask_pii(f"to {form}, please", ["iban"]) == ("to <IBAN>, please", {"iban": 1})
        digit = str((int(number[3]) + 1) % 10)
        for wrong in (number[:3] + digit + number[4:], number[:-1], number + "0",
                      account(country, 34)):
            assert mask_pii(wrong, ["iban"])[1] == {}


@pytest.mark.parametrize("text", [
    "000-12-3456", "666-12-3456", "900-12-3456", "123-00-6789", "123-45-0000"])
def test_a_social_security_number_that_is_never_given_out_stays(text):
    assert mask_pii(text) == (text, {})


@pytest.mark.parametrize("text", [
    "127.0.0.1", "10.1.2.3", "192.168.1.1", "::1", "fe80::1", "2001:db8::1", "256.1.1.1"])
def test_an_address_that_leads_to_nobody_stays(text):
    assert mask_pii(f"at {text}.") == (f"at {text}.", {})


HOSTILE = """
a a. @ a@ a@a. 1 1- 1. (1 eyJ eyJaaaaaaaa. ----- -----BEGIN~PRIVATE~KEY----- = =a1 a=1a sk-
sk-a1 AKIA earer~ earer~1a tel~ tel~1 passport~ passport~no~ A1 DE89~ DE89 4111~ 4111- 2001:
2001:: a: : 1.1.1.1. :// ://a: a:a@ <KEY> 1a1~ 电话 555-123- 0171~ 1) (0 +1~ 00~ ssn~ token: ~ a-
""".split()


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_texts_take_linear_time(part):
    part = part.replace("~", " ")
    text = "PRIVATE KEY 1234567 7a1 " + part * (100_000 // len(part)) + "x"
    mask_pii(text)
    group_words(text)


def test_an_unknown_kind_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^name: the kinds are key, email, "):
        mask_pii("a", ["name", "email"])


def test_group_words_are_counted_by_dimension_whole_and_in_any_case():
    assert group_words("She met a Muslim woman; the WOMAN, manly, is German-born, womanhood.") == {
        "gender: she": 1, "gender: woman": 2, "religion: muslim": 1}
    words = [word for words in GROUPS.values() for word in words.split()]
    assert len(words) == len({*words})
    assert [*group_words(" ".join(words)).values()] == [1] * len(words)


def test_the_command_masks_a_file_or_stdin_or_prints_the_table(tmp_path, monkeypatch, call):
    (tmp_path / "a.txt").write_text("Mail ann@example.org.", "utf-8")
    assert call(privacy, tmp_path / "a.txt") == ("Mail <EMAIL>.\n", "email 1\n")
    monkeypatch.setattr(sys, "stdin", StringIO("Nobody."))
    assert call(privacy, "-") == ("Nobody.\n", "nothing\n")
    monkeypatch.setattr(sys, "stdin", None)
    with (tmp_path / "closed").open("w") as file:  # no descriptor to read from, as <&- leaves none
        keep = os.dup(0)
        os.dup2(file.fileno(), 0)
        said, problem = call(privacy, "-")
        os.dup2(keep, 0)
    assert said == "" and problem.startswith("error: ") and problem.count("\n") == 1
    table = call(privacy)[0].splitlines()
    assert [line.split()[0] for line in table] == [*KINDS]


def test_a_file_that_is_not_there_is_refused_in_one_line(monkeypatch, capsys):
    code, (line,) = mistake(privacy.main, monkeypatch, capsys, "none.txt")
    assert code == 1 and "none.txt" in line
