"""Facts about how data.py reads: kinds of files, how they are packed, and in which encoding."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import data
from data import decode, detect, prepare, read_card, read_documents, read_split, write_shards
from tokenizer import Tokenizer

TEXT = "One line.\nAnother, 'quoted' and \"double\" line: größer, 漢字.\n"
quiet = dict(say=lambda line: None)
SENTENCES = {}
for _line in (ROOT / "chapters" / "languages.jsonl").read_text(encoding="utf-8").splitlines():
    _row = json.loads(_line)
    SENTENCES.setdefault(_row["language"], []).append(_row["text"])
ENCODED = [(language, encoding) for language, encodings in {
    "de": "cp1252", "fr": "cp1252 latin-1", "es": "cp1252 latin-1", "it": "cp1252", "pt": "cp1252",
    "pl": "cp1250 iso8859-2", "tr": "cp1254", "el": "cp1253", "he": "cp1255", "ar": "cp1256",
    "ru": "cp1251 koi8-r cp866 iso8859-5", "uk": "cp1251", "zh": "gb18030 big5",
    "ja": "cp932 euc_jp", "ko": "cp949"}.items() for encoding in encodings.split()]


# -----------------------------------------------------------------------------
# Kinds and packings.


def table(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("name, content", [
    ("a.txt", TEXT), ("a.md", TEXT), ("a.rst", TEXT), ("a.c", TEXT), ("a.rs", TEXT),
    ("a.jsonl", json.dumps(dict(text=TEXT)) + "\n"), ("a.json", json.dumps([dict(text=TEXT)])),
    ("a.json", json.dumps(dict(text=TEXT), indent=1)), ("a.json", json.dumps([TEXT])),
    ("a.json", json.dumps(dict(text=TEXT)) + "\n"),  # JSON Lines under another name
    ("a.csv", table([["id", "text"], [1, TEXT]]))])
@pytest.mark.parametrize("pack, end", [
    (bytes, ""), (gzip.compress, ".gz"), (bz2.compress, ".bz2"), (lzma.compress, ".xz")])
def test_every_kind_is_read_plain_and_packed(tmp_path, name, content, pack, end):
    path = tmp_path / (name + end)
    path.write_bytes(pack(content.encode()))
    assert list(read_documents(path)) == [TEXT]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python unpacks .zst")
def test_a_packing_that_this_python_does_not_know_is_named(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.raises(ValueError, match="a.txt.zst cannot be read.*compression"):
        list(read_documents(tmp_path / "a.txt.zst"))


def test_another_field_can_be_asked_for_and_a_wrong_one_is_named(tmp_path):
    rows = [dict(body="one", id=1), dict(body="two", id=2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("id,body\n1,one\n2,two\n")
    for kind in "jsonl", "json", "csv":
        assert list(read_documents(tmp_path / f"a.{kind}", "body")) == ["one", "two"]
        with pytest.raises(ValueError, match="row 1: no text in field 'text'.*--field=NAME"):
            list(read_documents(tmp_path / f"a.{kind}"))


@pytest.mark.parametrize("name, content, n_broken", [
    ("a.jsonl", '{"text": "a"}\n{"text": \n[1]\nnull\n{"text": null}\n\n{"text": "b"}', 4),
    ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000 + '\n{"text": "b"}\n', 1),
    ("a.json", '[{"text": "a"}, {"id": 1}, 7, {"text": "b"}]', 2),
    ("a.csv", 'text,n\na,1\n,\nb,2\n', 0)])
def test_a_broken_row_is_skipped_with_its_place_and_the_others_are_read(tmp_path, name, content,
                                                                         n_broken):
    (tmp_path / name).write_text(content)
    broken = []
    texts = list(read_documents(tmp_path / name, skip=broken.append))
    assert [text for text in texts if text] == ["a", "b"]
    assert len(broken) == n_broken and all(f"{name}, row " in reason for reason in broken)


def test_a_row_too_large_for_memory_is_skipped_and_what_follows_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE", 1000)
    rows = [dict(text="a"), dict(text="x" * 5000), dict(text="b")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    broken = []
    assert list(read_documents(tmp_path / "a.jsonl", skip=broken.append)) == ["a", "b"]
    assert broken
    (tmp_path / "a.csv").write_text(table([["text"], ["a"], ["x" * 1500], ["b"]]))
    broken.clear()
    assert list(read_documents(tmp_path / "a.csv", skip=broken.append)) == ["a", "b"]
    assert "a.csv, row 2: field larger than field limit (1000)" in broken[0]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="a.json has more than 1,000 characters.*jsonl"):
        list(read_documents(tmp_path / "a.json"))


@pytest.mark.parametrize("between", [",", ";", "\t", "|"])
def test_what_is_between_the_names_of_a_table_is_between_its_values(tmp_path, between):
    rows = ["id", "text"], ["1", '"one, two; three\tfour | five"'], ["2", "two"]
    path = tmp_path / ("a.tsv" if between == "\t" else "a.csv")
    path.write_text("\n".join(map(between.join, rows)))
    assert [*read_documents(path)] == ["one, two; three\tfour | five", "two"]


def test_a_row_with_more_values_than_names_is_skipped_and_not_cut(tmp_path):
    skipped = []
    (tmp_path / "a.csv").write_text("id,text\n1,one, and more\n2,two\n3,three,,\n")
    assert [*read_documents(tmp_path / "a.csv", skip=skipped.append)] == ["two", "three"]
    assert len(skipped) == 1 and "row 1: too many values: quote the texts" in skipped[0]


def test_the_cards_of_a_folder_are_no_documents_of_it(tmp_path):
    for name in "card.json", "card.html", "a.txt":
        (tmp_path / name).write_text("[1]")
    assert data.find_files(str(tmp_path), tmp_path) == [tmp_path / "a.txt"]


def test_a_closed_standard_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed; pipe the text in"):
        data.find_files("-", tmp_path)


def test_two_texts_from_standard_input_share_no_file(tmp_path, monkeypatch):
    texts = b"one", b"two", b'{"text": "one"}', b'\xef\xbb\xbf\n {"text": "one"}'
    paths = []
    for raw in texts:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw))))
        paths += data.find_files("-", tmp_path)
    assert [path.read_bytes() for path in paths] == [*texts]
    assert [path.suffix for path in paths] == [".txt", ".txt", ".jsonl", ".jsonl"]
    assert {*tmp_path.iterdir()} == {*paths}


def test_patterns_and_standard_input_are_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "a.txt", "b.txt", "c.md", "deep/d.txt":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"Text {name}, long enough to be split in two.\n" * 9)
    names = [str(path) for path in data.find_files("*.txt", tmp_path)]
    assert names == ["a.txt", "b.txt"]
    assert len(data.find_files("**/*.txt", tmp_path)) == 3
    with pytest.raises(ValueError, match=r"\*.nothing: no such file"):
        data.find_files("*.nothing", tmp_path)
    for text, kind in (TEXT * 9, ".txt"), (json.dumps(dict(text=TEXT * 9)), ".jsonl"):
        done = subprocess.run([sys.executable, ROOT / "data.py", "-", f"--out=from{kind}",
                               "--vocab_size=300"], input=text.encode(), capture_output=True)
        assert done.returncode == 0, done.stderr
        card = read_card(tmp_path / f"from{kind}")
        assert card.sources[0]["name"] == "-" and card.counts["documents"] == 1


# -----------------------------------------------------------------------------
# Encodings.


@pytest.mark.parametrize("language, encoding", ENCODED)
def test_five_sentences_are_read_in_the_encoding_they_were_written_in(language, encoding):
    sentences = SENTENCES[language]
    for i in range(0, len(sentences) - 4, 5):
        raw = "\n".join(sentences[i:i + 5]).encode(encoding, "ignore")
        assert decode(raw) == raw.decode(encoding), sentences[i]


def test_nineteen_of_twenty_single_sentences_are_read_right():
    right = []
    for language, encoding in ENCODED:
        for sentence in SENTENCES[language]:
            raw = sentence.encode(encoding, "ignore")
            right += [decode(raw) == raw.decode(encoding)] * (not raw.isascii())
    assert len(right) > 1000 and np.mean(right) > 0.95


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le",
                                      "utf-16-be"])
def test_unicode_is_read_with_and_without_its_mark(encoding):
    for text in "Grüße, 漢字 and plain words.\n" * 3, "plain words alone, nothing else\n":
        assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize("language", SENTENCES)
def test_utf_8_stays_utf_8_with_one_byte_in_a_hundred_broken(language):
    raw = "\n".join(SENTENCES[language][:20]).encode()
    assert detect(raw) == "utf-8-sig"
    broken = bytearray(raw)
    for i in range(50, len(raw), 100):
        broken[i] = 0xff
    if not raw.isascii() and sum(byte > 127 for byte in raw) > len(raw) / 20:
        assert detect(bytes(broken)) == "utf-8-sig"


@pytest.mark.parametrize("raw, declared, encoding", [
    ("日本語".encode("iso-2022-jp"), "iso-2022-jp", "iso-2022-jp"),
    ('<meta charset="koi8-r"><p>Да'.encode("koi8-r"), None, "koi8-r"),
    ('<?xml version="1.0" encoding="cp1251"?><p>Да'.encode("cp1251"), None, "cp1251"),
    ("# -*- coding: latin-1 -*-\n# é".encode("latin-1"), None, "latin-1"),
    ("<meta charset='utf-16'>Größe".encode(), None, "utf-8-sig"),
    ("Größe".encode(), "latin-1", "utf-8-sig"),  # what is right in UTF-8 is UTF-8
    (b"plain", "zlib", "utf-8-sig"), (b"plain", "nonsense", "utf-8-sig"), (b"", None, "utf-8-sig")])
def test_what_a_text_declares_is_believed_where_it_fits(raw, declared, encoding):
    assert detect(raw, declared) in (encoding, encoding.replace("-sig", ""))


def test_an_encoding_that_is_given_is_used_and_binary_files_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("żółw".encode("cp1250"))
    assert list(read_documents(tmp_path / "a.txt", encoding="cp1250")) == ["żółw"]
    for raw in b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0", bytes(range(256)) * 4, b"ab\0cd\1\2\3\0":
        with pytest.raises(ValueError, match="binary"):
            detect(raw)


# -----------------------------------------------------------------------------
# What a source means for the shards.


def test_no_long_document_becomes_most_of_the_validation_split(tmp_path):
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=60)) for _ in range(200)]
    book = next(text for i in range(999)  # one whose hash sends it to the validation split
                if data.text_hash(text := " ".join(rng.choices("abcdefgh", k=20_000)))[0] < 5)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(dict(text=t)) for t in [*texts, book]))
    card = read_card(prepare(tmp_path / "a.jsonl", tmp_path / "out", 300, **quiet))
    share = card.val["bytes"] / (card.val["bytes"] + card.train["bytes"])
    assert card.val["documents"] > 3 and share <= 0.1


def test_of_two_commands_with_one_folder_the_slower_one_replaces_nothing(tmp_path):
    with pytest.raises(ValueError, match="out holds other shards or files"):
        with data.new_shards(tmp_path / "out", "mine") as part:
            (part / "train_000000.bin").write_bytes(b"mine")
            with data.new_shards(tmp_path / "out", "other") as faster:
                (faster / "train_000000.bin").write_bytes(b"other")
    assert [path.read_bytes() for path in tmp_path.rglob("*.*")] == [b"other"]


def test_the_card_says_the_license_and_the_day_and_old_cards_load(tmp_path):
    (tmp_path / "a.txt").write_text("A text to split in two parts.\n" * 9)
    out = prepare(tmp_path / "a.txt", tmp_path / "out", 300, license="CC0-1.0", **quiet)
    card = read_card(out)
    assert card.sources[0]["license"] == "CC0-1.0" and card.date[:2] == "20"
    values = json.loads((out / "card.json").read_text())
    del values["date"]
    (out / "card.json").write_text(json.dumps(values))
    assert read_card(out).date == ""
    assert data.LICENSES.keys() == {*data.NAMES}


@pytest.fixture
def ready(tmp_path):
    """A folder of nanoGPT's shards, and one of llm.c's, with a tokenizer for both."""
    tokenizer = Tokenizer.train("a few words to learn from, again and again " * 9, 280)
    ids = np.array(([tokenizer.eot, *tokenizer.encode("again and again a few words ")]) * 20)
    for name in "nanogpt", "llmc":
        (tmp_path / name).mkdir()
    for split, part in ("train", ids), ("val", ids[:60]):
        part.astype(np.uint16).tofile(tmp_path / "nanogpt" / f"{split}.bin")
        write_shards([part], tmp_path / "llmc", f"my_{split}", tokenizer.n_vocab)
    return tmp_path, tokenizer, ids


@pytest.mark.parametrize("name", ["nanogpt", "llmc"])
def test_ready_shards_of_others_are_taken_as_they_are(ready, name):
    folder, tokenizer, ids = ready
    out = prepare(folder / name, folder / "out", tokenizer=tokenizer, **quiet)
    assert np.concatenate(read_split(out)).tolist() == ids.tolist()
    assert read_card(out).val["tokens"] == 60 and read_card(out).split == "as published"


def test_ready_shards_with_a_tokenizer_of_their_own_are_refused(ready):
    folder, tokenizer, _ = ready
    with pytest.raises(ValueError, match="do not mix"):
        prepare([folder / "nanogpt", folder / "llmc"], folder / "out", tokenizer=tokenizer, **quiet)
    (folder / "nanogpt" / "meta.pkl").write_bytes(b"cos\nsystem\n")
    (folder / "llmc" / "card.json").write_text("{}")
    for name in "nanogpt", "llmc":
        for own in tokenizer, None:  # said before GPT-2's is fetched
            with pytest.raises(ValueError, match=f"{name}: its shards have a tokenizer of their"):
                prepare(folder / name, folder / "out", tokenizer=own, **quiet)
