"""Facts about data.py: documents, shards, batches."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import run

import data
from data import (TokenLoader, clean, known_hashes, prepare, read_documents, read_shard, read_split,
                  write_shards)
from tokenizer import Tokenizer

STORIES = [f"Story {i}.\n\nFox number {i * i} ran over {i + 7} hills,\nthen it slept.\n"
           for i in range(60)]
quiet = dict(say=lambda line: None)


def folder_of(tmp_path, texts, name="texts"):
    """A folder with one .txt file for each text."""
    folder = tmp_path / name
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def documents_of(texts):
    """Texts as data.Documents, in a file in memory."""
    sizes = np.array([len(text.encode()) for text in texts])
    ends = sizes.cumsum()
    return data.Documents(io.BytesIO("".join(texts).encode()), ends - sizes, ends)


def shards_of(tmp_path, n_tokens, shard_tokens=1000):
    """A shard folder whose training tokens are 0, 1, 2, ..."""
    parts = np.split(np.arange(n_tokens), range(shard_tokens, n_tokens, shard_tokens))
    write_shards(parts, tmp_path / "counted", "train", n_tokens, shard_tokens)
    return tmp_path / "counted"


def card_of(out):
    return json.loads((out / "card.json").read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A finished shard folder of 60 short stories."""
    tmp_path = tmp_path_factory.mktemp("data")
    return prepare(folder_of(tmp_path, STORIES), tmp_path / "shards" / "stories", 300, **quiet)


# -----------------------------------------------------------------------------
# Reading and cleaning.


def test_the_examples_in_the_docstrings_are_true():
    assert clean("a\r\n  b \n") == "a\n  b"
    assert data.ending("notes.TXT.gz") == ".txt"
    assert data.folder_name("texts/My book.txt.gz") == "My-book"


@pytest.mark.parametrize("text", [
    "a\r\nb\rc", "  x = 1  \n\n\n\n\n\ty\n", "\n\n  a\x00\x07\x85", "e\u0301\udcff",
    "a\u0300\x1b\u0301 \n", "\u00a0\n\u2028b", "Å \ufeff é", ""])
def test_cleaning_twice_is_cleaning_once(text):
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("text, left", [
    ("\x1b[31mred\x1b[0m \x1b[1;38;5;12mblue\x1b[K", "red blue"), ("\x9b31mred\x9b0m", "red"),
    ("\x1b[?25l\x1b[2Jx\x1b[10;20H\x1b[0 qy\x1b[!p", "xy"), ("a\x1b[31", "a"),
    ("\x1b]8;;https://example.org/?a=1\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1b]0;title é\x07text\x9d2;t\x9c.", "text."), ("\x1b]0;open\nnext\x07", "0;open\nnext"),
    ("\x1bPq#0;2;0~~\x1b\\a\x1b_G1;AAAA\x1b\\b\x1b^p\x1b\\c\x1bXs\x1b\\d", "abcd"),
    ("\x1bktitle\x1b\\a\x90q\x9cb\x98q\x9cc\x9ep\x9cd\x9fp\x9c", "abcd"),
    ("\x1b(Ba\x1b)0b\x1b%Gc\x1b#8d\x1b7e\x1b8f\x1b=g\x1b>h\x1bMi\x1bcj\x1b F", "abcdefghij"),
    ("\x1b\x1b[31mtwo\x1b", "two"), ("if x[0] > [31m: (B", "if x[0] > [31m: (B"),
    ("N\bNA\bAM\bME\bE", "NAME"), ("_\bf_\bi_\bl_\be \x1b[1m_\bN\bN", "file N"),
    ("漢\b\b漢\n\bx", "漢\nx"), ("\x1b[1mN\b\x1b[1mN", "N")])
def test_terminal_sequences_and_overstrikes_go_as_a_whole(text, left):
    counts = data.Counter()
    assert clean(text, counts) == left == clean(left)
    assert counts["control characters"] == len(text) - len(left)


@pytest.mark.parametrize("part", ["\x1b]", "\x1b[", "\x1b", "\x9d", "\x9b0", "\x1bP", "\b", "N\b",
                                  "\x1b]0;", "\x1b[0", "\x1b(", "\x90", "\x1b\\", "\x1b]\x9d"])
def test_a_text_of_nothing_but_openings_comes_to_an_end(part):
    for whole in part * 200_000, part + "0;" * 200_000, part + " " * 10**6, part * 9 + "x" * 10**6:
        assert len(clean(whole)) <= len(whole)


def test_cleaning_keeps_code_and_counts_what_is_lost():
    counts = data.Counter()
    text = clean("def f():\r\n\treturn 'e\u0301'  \n\n\n\n\n    x\x07\n\udcff", counts)
    assert text == "def f():\n\treturn 'é'\n\n\n    x\n\ufffd"
    assert counts == {"control characters": 1, "replaced bytes": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT"])
def test_a_gz_file_reads_like_the_plain_one(tmp_path, name):
    content = "x = 'ä'\r\n".encode() + b"\xff"
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    plain, packed = read_documents(tmp_path / name), read_documents(tmp_path / f"{name}.gz")
    assert list(plain) == list(packed) == ["x = 'ä'\r\n\udcff"]


def test_a_txt_file_may_hold_many_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo<|endoftext|>three\nlines\n<|endoftext|>\n")
    assert list(map(clean, read_documents(path))) == ["one", "two", "three\nlines"]


@pytest.mark.parametrize("text, parts", [
    ("one\ntwo\n" * 3, ["one\ntwo\n"] * 3), ("x" * 21, ["x" * 8] * 2 + ["x" * 5])])
def test_a_long_text_is_read_as_several_documents(tmp_path, monkeypatch, text, parts):
    (tmp_path / "a.txt").write_text(text, newline="")
    monkeypatch.setattr(data, "LONG_TEXT", 8)
    assert list(read_documents(tmp_path / "a.txt")) == parts


def test_a_file_with_the_byte_order_mark_of_windows_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("grün", encoding="utf-8-sig")
    assert list(read_documents(tmp_path / "a.txt")) == ["grün"]


def test_jsonl_gives_its_texts_and_names_the_line_without(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n<|endoftext|>"}\n\n{"text": "zwei \\ud800", "id": 3}\n')
    assert [clean(text) for text in read_documents(path)] == ["one\n<|endoftext|>", "zwei \ufffd"]
    for bad in ["{}", "[1]", '{"text": 3}', "text"]:
        path.write_text('{"text": "one"}\n' + bad)
        with pytest.raises(ValueError, match="a.jsonl, row 2"):
            list(read_documents(path))


def test_a_web_page_is_refused_with_the_command_that_reads_it(tmp_path):
    for name in "a.html", "a.htm.gz", "A.XHTML":
        (tmp_path / name).write_text("<p>a")
        with pytest.raises(ValueError, match=f"{name}: cannot.* python -m chapters.curate FILE"):
            list(read_documents(tmp_path / name))


def test_a_file_of_another_kind_is_refused_with_its_ending_and_the_known_ones(tmp_path):
    for name, kind in [("ls.1.gz", ".1"), ("a.png", ".png"),
                       ("README", "a name without an ending")]:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError) as error:
            list(read_documents(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path / name}: cannot read {kind}")
        assert "only .txt .md .rst .json .jsonl .csv .tsv and programs" in str(error.value)


def test_a_damaged_gz_file_is_refused_by_name(tmp_path):
    packed = gzip.compress(b"text " * 99)
    for content in b"no gzip", packed[:-9], packed[:-8] + bytes(8):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match="a.txt.gz"):
            list(read_documents(tmp_path / "a.txt.gz"))


def skipped(out):
    """{name: reason} of what was skipped of the first source, as its card says."""
    [source] = card_of(out)["sources"]
    lines = [line.removeprefix(source["name"] + os.sep) for line in source["skipped"]]
    assert sum(card_of(out)["counts"].get(f"skipped {what}", 0)
               for what in ("files", "documents")) >= len(lines)
    assert max(map(len, source["skipped"]), default=0) <= 200
    return dict(line.split(": ", 1) if ": " in line else line.split(" ", 1) for line in lines)


def texts_of(out):
    """The documents in a folder of shards, sorted."""
    ids = np.concatenate(read_split(out) + read_split(out, "val")).tolist()
    return sorted(Tokenizer.load(out / "tokenizer.json").decode(ids).split("<|endoftext|>")[1:])


def test_a_folder_is_read_in_order_and_skips_what_is_no_text(tmp_path):
    folder = folder_of(tmp_path, STORIES)
    bad = {"a.html": b"<p>", "z.txt": b"\x89PNG\0", "image.png": b"x", "d.txt.gz": b"no gzip",
           "ls.1.gz": gzip.compress(b"x"), "README": b"x",
           "cut.txt.gz": gzip.compress(os.urandom(99999))[:-9]}
    more = {"a.md": b"A note.", "empty.txt": b"", ".hidden.txt": b"x", "card.json": b"{}",
            "rows.jsonl": b'{"text": "whole"}\n{"id": 1}'}
    for name, content in {**more, **bad}.items():
        (folder / name).write_bytes(content)
    names = [path.name for path in data.find_files(str(folder), tmp_path)]
    assert names == sorted(names) and ".hidden.txt" not in names
    lines = []
    out = prepare(folder, tmp_path / "out", 300, say=lines.append)
    reasons, [source] = skipped(out), card_of(out)["sources"]
    assert {re.split(",| cannot| is", name)[0] for name in reasons} == {*bad, "rows.jsonl"}
    assert source["files"] == 63
    assert texts_of(out) == sorted([*map(clean, STORIES), "A note.", "whole"])
    assert "7 skipped files" in lines[0] and "1 skipped documents" in lines[0]
    assert sum("skipped:" in line for line in lines) == 3
    assert "no text in field 'text'" in reasons["rows.jsonl, row 2"]
    assert "chapters.curate" in reasons["a.html"]
    assert reasons["ls.1.gz"].startswith("cannot read .1")


def test_a_broken_row_is_left_out_and_named_and_a_file_without_a_text_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one, and some more to split"}\nnonsense\n{"id": 1}')
    out = prepare(path, tmp_path / "out", 300, **quiet)
    assert card_of(out)["counts"]["skipped documents"] == 2 and len(skipped(out)) == 2
    with pytest.raises(ValueError, match="no text in .*rows.jsonl, row 1: no text in field 'body'"):
        prepare(path, tmp_path / "out2", 300, field="body", **quiet)


def test_a_card_names_a_hundred_skipped_files_and_counts_all(tmp_path):
    folder = folder_of(tmp_path, STORIES)
    for i in range(150):
        (folder / f"{i:03d}\x1b[2J\n{'long' * 40}.png").write_bytes(b"x")
    out = prepare(folder, tmp_path / "out", 300, **quiet)
    [source] = card_of(out)["sources"]
    assert len(source["skipped"]) == 100 and card_of(out)["counts"]["skipped files"] == 150
    assert all(line.isprintable() and len(line) <= 200 for line in source["skipped"])


def test_linked_folders_are_read_once_and_without_loops(tmp_path):
    folder, other = folder_of(tmp_path, STORIES[:30]), folder_of(tmp_path, STORIES[30:], "other")
    (other / "deep").mkdir()
    (other / "deep" / "a.txt").write_text("Deep down.")
    for name, target in {"b": other, "a": other / "deep", "loop": folder, "up": tmp_path,
                         "other/back": folder, "none.txt": tmp_path / "none.txt", "self.txt":
                         folder / "self.txt", "z.txt": folder / "000.txt"}.items():
        (folder / name if "/" not in name else tmp_path / name).symlink_to(target)
    out = prepare(folder, tmp_path / "out", 300, **quiet)
    assert texts_of(out) == sorted([*map(clean, STORIES), "Deep down."])
    counts = card_of(out)["counts"]
    assert counts["exact duplicates"] == 1  # z.txt
    assert skipped(out).keys() == {"none.txt", "self.txt"}
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert texts_of(prepare(linked, tmp_path / "out2", 300, **quiet)) == texts_of(out)


def test_a_link_hides_no_file_that_can_be_read(tmp_path):
    folder = folder_of(tmp_path, STORIES)
    (folder / "0-latest").symlink_to(folder / "007.txt")
    out = prepare(folder, tmp_path / "out", 300, **quiet)
    assert texts_of(out) == sorted(map(clean, STORIES)) and skipped(out).keys() == {"0-latest"}


def test_pipes_and_sockets_are_not_waited_for(tmp_path):
    folder = folder_of(tmp_path, STORIES)
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "s.txt"))
        out = prepare(folder, tmp_path / "out", 300, **quiet)
    assert skipped(out).keys() == {"pipe.txt", "s.txt"}
    with pytest.raises(ValueError, match="pipe.txt: no such file, .* or a pipe"):
        prepare(folder / "pipe.txt", tmp_path / "out2", 300, **quiet)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="who may read everything")
def test_what_may_not_be_read_is_skipped(tmp_path):
    folder = folder_of(tmp_path, STORIES)
    (folder / "secret").mkdir(0)
    (folder / "mine.txt").touch(0)
    out = prepare(folder, tmp_path / "out", 300, **quiet)
    assert skipped(out).keys() == {"secret", "mine.txt"}


RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. " * 40


def test_a_text_in_no_known_encoding_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes(STORIES[0].encode("cp037"))
    with pytest.raises(ValueError, match=r"old.txt: \d\d% of .* are not UTF-8: --encoding=NAME"):
        prepare(path, tmp_path / "shards" / "old", 300, **quiet)
    assert not list(tmp_path.glob("shards/[!.]*")) and not list(tmp_path.glob("shards/.*"))
    with pytest.raises(ValueError, match=r"old.txt: \d\d% of .* are not cp932: --enc"):
        prepare(path, tmp_path / "shards" / "old", 300, encoding="cp932", **quiet)
    with pytest.raises(ValueError, match="--encoding=latin-99"):
        prepare(path, tmp_path / "shards" / "old", 300, encoding="latin-99", **quiet)
    folder, lines = folder_of(tmp_path, STORIES), []
    path.rename(folder / "030-old.txt")
    (folder / "031.jsonl").write_text('{"text": "last"}')
    out = prepare(folder, tmp_path / "out", 300, say=lines.append)
    assert texts_of(out) == sorted([*map(clean, STORIES), "last"])
    assert "UTF-8" in skipped(out)["030-old.txt"] and "030-old.txt" in lines[1]
    out = prepare(folder / "030-old.txt", tmp_path / "out2", 300, encoding="cp037", **quiet)
    assert "then it slept." in "".join(texts_of(out))


def test_up_to_a_hundredth_of_the_characters_may_be_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for n_bad, refused in (10, False), (11, True):
        path.write_bytes("é".encode() * 30 + b"\xff" * n_bad + b"x" * (970 - n_bad))
        with pytest.raises(ValueError, match="1% of its") if refused else contextlib.nullcontext():
            out = prepare(path, tmp_path / f"{n_bad}", 300, **quiet)
    assert card_of(out)["counts"]["replaced bytes"] == 10


def test_the_standard_library_is_a_corpus_without_tests(tmp_path):
    files = data.find_files("stdlib", tmp_path)
    names = {part for path in files for part in path.relative_to(files[0].parent).parts}
    assert "argparse.py" in names and "json" in names
    assert not names & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def test_the_topics_of_pydoc_are_documents_of_prose():
    path = Path(os.__file__).parent / "pydoc_data" / "topics.py"
    texts = list(read_documents(path))
    assert len(texts) > 50 and not any(text.startswith(("topics =", "# Auto")) for text in texts)


def test_a_text_that_occurs_again_is_dropped(tmp_path):
    folder = folder_of(tmp_path, [*STORIES, STORIES[3] + "  \r\n"])
    (folder / "blank.jsonl").write_text('{"text": " \\n"}')
    card = card_of(prepare(folder, tmp_path / "out", 300, **quiet))
    counts = card["counts"]
    assert counts["exact duplicates"] == 1 and counts["empty documents"] == 1
    assert counts["documents"] == card["train"]["documents"] + card["val"]["documents"] == 60


def test_a_document_stays_on_its_side_when_others_come_and_go():
    def validated(texts):
        return set(data.split(documents_of(texts))[1])
    assert validated(STORIES)
    assert validated(STORIES[::-1]) == validated(STORIES)
    assert validated([f"new {i}" for i in range(40)] + STORIES) & set(STORIES) <= validated(STORIES)


def test_few_documents_validate_on_their_ends():
    train, val, _ = data.split(documents_of(["x" * 900 + "y" * 100, "ä" * 90 + "ö" * 10]))
    assert list(train) == ["x" * 900, "ä" * 90] and list(val) == ["y" * 100, "ö" * 10]


# -----------------------------------------------------------------------------
# Shards.


@pytest.mark.parametrize("n_vocab, size, magic, version", [
    (65_536, 2, 20240520, 1), (65_537, 4, 20240801, 7)])
def test_shards_are_in_the_format_of_llm_c(tmp_path, n_vocab, size, magic, version):
    ids = np.arange(10) + n_vocab - 10
    write_shards([ids[:4], [], *ids[4:].reshape(3, 2)], tmp_path, "train", n_vocab, 4)
    lengths = {path.name: len(read_shard(path)) for path in tmp_path.iterdir()}
    assert lengths == {"train_000000.bin": 4, "train_000001.bin": 4, "train_000002.bin": 2}
    raw = (tmp_path / "train_000000.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [magic, version, 4]
    assert len(raw) == 1024 + 4 * size and not any(raw[12:1024])
    assert np.concatenate(read_split(tmp_path)).tolist() == ids.tolist()


def test_shards_decode_to_the_clean_documents_each_behind_endoftext(prepared):
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    both = [np.concatenate(read_split(prepared, split)) for split in ("train", "val")]
    assert [ids[0] for ids in both] == [tokenizer.eot] * 2
    starts = [np.flatnonzero(ids == tokenizer.eot) for ids in both]
    parts = [part for ids, at in zip(both, starts) for part in np.split(ids, at)]
    texts = [tokenizer.decode(ids[1:].tolist()) for ids in parts if len(ids)]
    assert sorted(texts) == sorted(map(clean, STORIES))


def test_texts_are_tokenized_in_groups(monkeypatch):
    tokenizer = Tokenizer.train("".join(STORIES), 400)
    monkeypatch.setattr(data, "GROUP_BYTES", 200)
    groups = list(data.tokenize(documents_of(STORIES), tokenizer))
    ids = [id for text in STORIES for id in (tokenizer.eot, *tokenizer.encode(text))]
    assert np.concatenate(groups).tolist() == ids and len(groups) > 10


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="token id 300 is not in the vocabulary of 300"):
        write_shards([np.array([1, 300])], tmp_path, "train", 300)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage, message", [
    (lambda raw: b"\0" + raw[1:], "not a token shard"), (lambda raw: b"", "not a token shard"),
    (lambda raw: b"\x89PNG" + raw[4:], "not a token shard"), (lambda raw: raw[:7], "version"),
    (lambda raw: raw[:4] + b"\5" + raw[5:], "version 5"), (lambda raw: raw[:-1], "damaged"),
    (lambda raw: raw + b"\0\0", "damaged"), (lambda raw: raw[:500], "damaged")])
def test_a_damaged_or_foreign_shard_is_refused(tmp_path, damage, message):
    path = shards_of(tmp_path, 100) / "train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_shard(path)


# -----------------------------------------------------------------------------
# Preparing.


def test_the_card_says_what_is_there(prepared):
    card, tokenizer = card_of(prepared), Tokenizer.load(prepared / "tokenizer.json")
    assert card["tokenizer"] == tokenizer.hash() and card["vocab_size"] == tokenizer.n_vocab
    for split in "train", "val":
        ids = np.concatenate(read_split(prepared, split)).tolist()
        assert card[split]["tokens"] == len(ids)
        assert card[split]["documents"] == ids.count(tokenizer.eot)
        text = tokenizer.decode(ids).replace("<|endoftext|>", "")
        assert card[split]["bytes"] == len(text.encode())


def test_a_card_can_be_edited_and_says_which_field_is_wrong(tmp_path, prepared):
    card = card_of(prepared)
    (tmp_path / "card.json").write_text(json.dumps(card | dict(sources=["my own notes"])))
    assert data.read_card(tmp_path).sources == ["my own notes"]
    for wrong, message in [(dict(vocab_size="x"), "vocab_size"), (dict(checksum={}), "checksums"),
                           (dict(val={}), "tokens"), (dict(train=dict(tokens=0)), "tokens")]:
        (tmp_path / "card.json").write_text(json.dumps(card | wrong))
        with pytest.raises(ValueError, match=f"card.json.*{message}"):
            data.read_card(tmp_path)


@pytest.mark.parametrize("remembers", [False, True])
def test_a_shard_that_changed_or_is_gone_is_named(tmp_path, prepared, remembers):
    def check(*splits):
        return data.check_shards(out, *splits, known=known_hashes(out) if remembers else None)
    out = Path(shutil.copytree(prepared, tmp_path / "copy"))
    path, extra = out / "val_000000.bin", out / "val_000001.bin"
    whole = path.read_bytes()
    for wrong in whole[:-1] + b"\7", whole[:-2], whole + b"\0\0":  # as long, shorter, longer
        check()
        path.write_bytes(wrong)
        assert check(("train",)) == data.read_card(prepared)
        with pytest.raises(ValueError, match="val_000000.bin is damaged"):
            check()
        path.write_bytes(whole)
    path.rename(extra)
    with pytest.raises(OSError, match="val_000000.bin"):
        check()
    shutil.copy(extra, path)
    with pytest.raises(ValueError, match="val_000001.bin is damaged"):
        check()


def written(folder):
    """{file name: (content, when it was written)} of all files below a folder."""
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder, with two files of one name: a/input.txt and b/input.txt."""
    monkeypatch.chdir(tmp_path)
    for name, texts in ("a", STORIES), ("b", STORIES[::-2]):
        folder_of(tmp_path, ["<|endoftext|>".join(texts)], name)
        Path(name, "000.txt").rename(Path(name, "input.txt"))
    return tmp_path


def test_the_same_content_is_used_again_wherever_it_lies_and_another_byte_is_not(tmp_path):
    folder, out, lines = folder_of(tmp_path, STORIES), tmp_path / "out", []
    prepare(folder, out, 300, **quiet)
    before = written(out)
    folder = folder.rename(tmp_path / "renamed")
    assert prepare([folder], out, 300, say=lines.append) == out
    assert written(out) == before and "used again" in lines[0]
    (folder / "000.txt").write_text(STORIES[0] + "!")
    with pytest.raises(ValueError, match="out holds other shards or files: choose another --out"):
        prepare(folder, out, 300, **quiet)
    assert written(out) == before


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are hashed, as a list that grows."""
    names, digest = [], hashlib.file_digest

    def named(file, kind):
        names.append(Path(file.name).name)
        return digest(file, kind)
    monkeypatch.setattr(hashlib, "file_digest", named)
    return names


def test_a_second_start_hashes_nothing_but_what_was_written_since(tmp_path, hashed):
    folder, out = folder_of(tmp_path, STORIES), tmp_path / "out"

    def start():
        hashed.clear()
        data.check_shards(prepare(folder, out, 300, **quiet), known=known_hashes(out))
        return sorted(hashed)
    made = ["tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert start() == sorted([*os.listdir(folder), *made]) and start() == []
    (folder / "007.txt").write_text(STORIES[7])  # the same content at another time
    (folder / "008.txt").rename(folder / "008.md").rename(folder / "008.txt")
    shutil.copy(out / "val_000000.bin", tmp_path)
    os.replace(tmp_path / "val_000000.bin", out / "val_000000.bin")
    assert start() == ["007.txt", "val_000000.bin"] and start() == []
    (folder / "007.txt").write_text(STORIES[7].replace("ran", "sat"))  # of the same size
    with pytest.raises(ValueError, match="out holds other shards or files"):
        start()
    assert hashed == ["007.txt"]


def test_sources_of_equal_names_sizes_and_times_are_told_apart(home, hashed):
    def start(name):
        hashed.clear()
        return prepare(f"{name}/input.txt", vocab_size=300, **quiet)
    for name, text in ("a", "one two\n"), ("b", "two one\n"):
        Path(name, "input.txt").write_text(text * 99)
        os.utime(Path(name, "input.txt"), (10**9, 10**9))
    out = start("a"), start("b")
    assert out[0] != out[1] and texts_of(out[0]) != texts_of(out[1])
    assert (start("a"), hashed) == (out[0], []) and (start("b"), hashed) == (out[1], [])


def test_a_copy_is_hashed_once_and_a_check_of_all_always(tmp_path, prepared, hashed):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    for known, n_hashed in (known_hashes, 2), (known_hashes, 0), (lambda path: None, 2):
        hashed.clear()
        data.check_shards(copy, known=known(copy))
        assert len(hashed) == n_hashed


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'"x"', b"[[[], 7]]", b'{"a": 7}', b"\xff"])
def test_a_memory_of_hashes_that_is_damaged_or_cannot_be_kept_is_none(tmp_path, prepared, hashed,
                                                                      content):
    out = Path(shutil.copytree(prepared, tmp_path / "copy"))
    part = out / ".hashes.json.part"
    (out / ".hashes.json").write_bytes(content)
    part.mkdir()  # so that nothing can be written there
    for n_hashed in 2, 4:
        assert data.check_shards(out, known=known_hashes(out)) == data.read_card(prepared)
        assert len(hashed) == n_hashed
    part.rmdir()
    for n_hashed in 6, 6:
        data.check_shards(out, known=known_hashes(out))
        assert len(hashed) == n_hashed


def test_sources_of_one_name_have_folders_of_their_own(home):
    first = prepare("a/input.txt", vocab_size=300, **quiet)
    before = written(first)
    second = prepare("b/input.txt", vocab_size=300, **quiet)
    third = prepare("a/input.txt", vocab_size=301, **quiet)
    assert first == Path("shards/input") and written(first) == before
    assert [str(out) for out in (second, third)] == [
        f"shards/input-{card_of(out)['fingerprint'][:8]}" for out in (second, third)]
    assert texts_of(second) == sorted(map(clean, STORIES[::-2]))
    before = written(home / "shards")
    for source, size, out in ("a", 300, first), ("b", 300, second), ("a", 301, third):
        lines = []
        assert prepare(f"{source}/input.txt", None, size, say=lines.append) == out
        assert lines == [f"{out}: used again, the content and the options are the same"]
    assert written(home / "shards") == before


def test_whoever_reads_shards_goes_on_reading_them_whatever_is_prepared(home):
    out = prepare("a/input.txt", vocab_size=300, **quiet)
    loader, undisturbed = TokenLoader(out, 2, 16), TokenLoader(shutil.copytree(out, "kept"), 2, 16)

    def go_on():
        for _ in range(2 * loader.n_blocks):
            assert np.array_equal(next(loader), next(undisturbed))
    prepare("b/input.txt", vocab_size=300, **quiet)
    go_on()
    prepare("a/input.txt", vocab_size=400, **quiet)
    go_on()
    (out / "val_000000.bin").write_bytes(b"damaged")
    prepare("a/input.txt", vocab_size=300, **quiet)
    go_on()
    assert np.array_equal(np.concatenate(read_split(out)), np.concatenate(undisturbed.shards))


@pytest.mark.parametrize("out", [None, "shards/new", "shards/input"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_while_writing_leaves_no_folder_and_changes_none(home, monkeypatch, error, out):
    prepare("a/input.txt", vocab_size=300, **quiet)
    if out == "shards/input":  # the same content, damaged, to be built again
        Path("shards/input/val_000000.bin").write_bytes(b"damaged")
    before, encode, calls = written(home / "shards"), Tokenizer.encode_batch, []

    def breaks(self, texts):
        calls.append(1)
        if len(calls) == 2:
            raise error("in the middle")
        return encode(self, texts)
    monkeypatch.setattr(Tokenizer, "encode_batch", breaks)
    with pytest.raises(error):
        prepare("a/input.txt" if out == "shards/input" else "b/input.txt", out, 300, **quiet)
    assert len(calls) == 2 and written(home / "shards") == before
    assert os.listdir("shards") == ["input"]


def test_two_that_write_one_folder_at_once_leave_it_whole(home):
    kept = prepare("a/input.txt", "kept", 300, **quiet)
    with data.new_shards(Path("shards/input"), card_of(kept)["fingerprint"]) as part:
        prepare("a/input.txt", vocab_size=300, **quiet)
        for path in kept.iterdir():
            shutil.copy(path, part)
    assert os.listdir("shards") == ["input"] and data.check_shards("shards/input")


@pytest.mark.parametrize("out", ["empty", ".", "link"])
def test_an_empty_folder_takes_shards(home, monkeypatch, out):
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    monkeypatch.chdir("empty" if out == "." else ".")
    prepare(home / "a" / "input.txt", out, 300, **quiet)
    assert data.check_shards(home / "empty").vocab_size == 300 and data.check_shards(out)
    assert Path(home, "link").is_symlink()
    assert prepare(home / "a" / "input.txt", out, 300, **quiet) == Path(out)


@pytest.mark.parametrize("harm", [
    lambda out: (out / "val_000000.bin").write_bytes(b"x"),
    lambda out: (out / "tokenizer.json").write_text("{}"),
    lambda out: (out / "train_000007.bin").write_bytes((out / "val_000000.bin").read_bytes())])
def test_a_damaged_folder_is_made_again_and_what_a_user_put_there_stays(tmp_path, harm):
    folder, out = folder_of(tmp_path, STORIES), tmp_path / "out"
    before = card_of(prepare(folder, out, 300, **quiet))
    (out / "my notes").write_text("precious")
    harm(out)
    assert card_of(prepare(folder, out, 300, **quiet)) == before
    names = ["card.json", "my notes", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert sorted(path.name for path in out.glob("[!.]*")) == names


@pytest.mark.parametrize("name, out", [
    ("tokenizer.json", "mine"), ("train_000000.bin", "mine"), ("card.json", "mine"), ("", "a.txt")])
def test_a_folder_of_somebody_else_is_not_touched(tmp_path, name, out):
    folder, out = folder_of(tmp_path, STORIES), tmp_path / out
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    with pytest.raises(ValueError, match=f"{out} holds other shards or files: choose another"):
        prepare(folder, out, 300, **quiet)
    assert (out / name).read_text() == "precious" and not list(tmp_path.glob(".*"))


def test_a_folder_without_its_card_is_left_and_the_next_name_is_taken(home):
    out = prepare("a/input.txt", vocab_size=300, **quiet)
    (out / "card.json").unlink()
    before, again = written(out), prepare("a/input.txt", vocab_size=300, **quiet)
    assert again.name.startswith("input-") and written(out) == before


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, prepared):
    path = prepared / "tokenizer.json"
    out = prepare(folder_of(tmp_path, STORIES[::-1]), tmp_path / "out", tokenizer=path, **quiet)
    assert card_of(out)["tokenizer"] == card_of(prepared)["tokenizer"]


# -----------------------------------------------------------------------------
# Downloads, from a server on this machine.


class Pages(BaseHTTPRequestHandler):
    """Serves server.files, with ranges; the first answer is cut off after server.cut bytes."""

    def do_GET(self):
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start >= len(body):
            return self.send_error(416)
        self.server.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        self.send_header("Content-Type", self.server.type)
        self.end_headers()
        self.wfile.write(body[start:][:self.server.cut])
        self.server.cut = None

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.files, server.starts, server.cut, server.type = {}, [], None, "text/plain"
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def test_a_text_is_downloaded_once(tmp_path, server):
    server.files["/?c=1"] = "\n".join(STORIES).encode()
    for _ in range(2):
        out = prepare(f"{server.url}/?c=1", tmp_path / "shards" / "page", 300, **quiet)
    [path] = (tmp_path / "shards" / "downloads").iterdir()
    assert path.suffix == ".txt" and len(server.starts) == 1
    assert card_of(out)["counts"]["documents"] == 1


def test_a_url_that_gives_a_page_is_refused_with_the_command_that_reads_it(tmp_path, server):
    server.files["/a.txt"], server.type = b"<p>a", "text/html; charset=utf-8"
    with pytest.raises(ValueError, match="is a web page.* python -m chapters.curate"):
        data.find_files(f"{server.url}/a.txt", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_was_cut_off_continues_where_it_stopped(tmp_path, server, monkeypatch):
    server.files["/a.txt"], server.cut = b"0123456789" * 1000, 3000
    monkeypatch.setattr(data, "WAITS", (0,))
    path = data.download(f"{server.url}/a.txt", tmp_path / "a.txt")
    assert server.starts == [0, 0] and path.read_bytes() == server.files["/a.txt"]
    path.rename(tmp_path / "a.txt.part")  # ended between the last byte and the new name
    data.download(f"{server.url}/a.txt", path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_download_with_another_checksum_is_removed(tmp_path, server, monkeypatch):
    row = f"{server.url}/a.txt", hashlib.sha256(b"right").hexdigest()
    monkeypatch.setitem(data.KNOWN, "shakespeare", row)
    server.files["/a.txt"] = b"right"
    [path] = data.find_files("shakespeare", tmp_path / "right")
    assert path.read_bytes() == b"right"
    server.files["/a.txt"] = b"wrong"
    with pytest.raises(ValueError, match="has not the expected sha256"):
        data.find_files("shakespeare", tmp_path / "wrong")
    assert not list((tmp_path / "wrong").iterdir())


def test_a_page_or_a_connection_that_is_not_there_is_one_line(tmp_path, server):
    with pytest.raises(ValueError, match="404"):
        data.download(f"{server.url}/none.txt", tmp_path / "a.txt")
    server.server_close()
    server.shutdown()
    with pytest.raises(ValueError, match="take stdlib"):
        data.download(f"{server.url}/none.txt", tmp_path / "a.txt")


def test_wikitext_is_cut_into_its_articles(tmp_path, server, monkeypatch):
    text = " \n = Cat = \n \n Purrs . \n = = Food = = \n Fish . \n = Dog = \n Barks . \n"
    with zipfile.ZipFile(tmp_path / "wiki.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", text)
    server.files["/w.zip"] = (tmp_path / "wiki.zip").read_bytes()
    monkeypatch.setitem(data.KNOWN, "wikitext", (f"{server.url}/w.zip", None))
    [path] = data.find_files("wikitext", tmp_path / "downloads")
    texts = list(map(clean, read_documents(path)))
    assert texts == ["", " = Cat =\n\n Purrs .\n = = Food = =\n Fish .", " = Dog =\n Barks ."]


def test_ready_shards_are_checked_and_used_as_they_are(tmp_path, server, monkeypatch, prepared):
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    for theirs, ours in ("train_000001", "train_000000"), ("val_000000", "val_000000"):
        server.files[f"/fineweb_{theirs}.bin"] = (prepared / f"{ours}.bin").read_bytes()
    monkeypatch.setattr(data, "FINEWEB", f"{server.url}/fineweb_")
    for _ in range(2):
        out = prepare("fineweb10B", tmp_path / "shards" / "ready", tokenizer=tokenizer, **quiet)
    card, given = card_of(out), card_of(prepared)
    assert len(server.starts) == 2 and TokenLoader(out, 1, 8).n_tokens == given["train"]["tokens"]
    assert all(card[split][what] == given[split][what] for split in ("train", "val")
               for what in ("documents", "bytes", "tokens"))


# -----------------------------------------------------------------------------
# Batches.


def test_y_is_x_one_token_later(tmp_path):
    loader = TokenLoader(shards_of(tmp_path, 1000, 77), 4, 16)
    for x, y in (next(loader) for _ in range(30)):
        assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == np.int64
        assert (y == x + 1).all() and (np.diff(x) == 1).all()


def test_the_blocks_of_an_epoch_follow_each_other_from_the_first_token_to_the_last(tmp_path):
    loader, offsets = TokenLoader(shards_of(tmp_path, 1000), 1, 16, seed=3), set()
    for _ in range(5):
        first, *starts, last = sorted(int(next(loader)[0][0, 0]) for _ in range(loader.n_blocks))
        assert first == 0 and last == 1000 - 16 - 1
        inner = [start for start in starts if start < last]
        assert (np.diff(inner) == 16).all() and 1 <= inner[0] <= 16 and last - inner[-1] <= 16
        offsets.add(inner[0])
    assert len(offsets) > 1


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
def test_every_epoch_reads_every_token_of_a_split_of_any_size(tmp_path, block_size):
    for n_tokens in range(block_size + 1, 4 * block_size + 4):
        folder = shards_of(tmp_path / str(n_tokens), n_tokens, shard_tokens=5)
        loader, offsets = TokenLoader(folder, 1, block_size), set()
        assert loader.n_blocks <= n_tokens // block_size + 2
        for _ in range(8):
            batches = [next(loader) for _ in range(loader.n_blocks)]
            assert all((y == x + 1).all() for x, y in batches)
            assert set(np.ravel(batches)) == set(range(n_tokens))
            offsets.add(loader.offset)
        assert offsets <= set(range(1 - block_size, 1)) and len(offsets) > 1 or block_size == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_reads_the_same_global_batches(tmp_path, world_size):
    folder = shards_of(tmp_path, 1000)
    alone = TokenLoader(folder, 8, 16)
    ranks = [TokenLoader(folder, 8 // world_size, 16, rank, world_size)
             for rank in range(world_size)]
    for _ in range(20):
        both = [np.concatenate(parts) for parts in zip(*map(next, ranks))]
        assert np.array_equal(both, next(alone))


class Watched:
    """Tokens, of which `read` lists (the first, the one behind the last) that were asked for."""

    def __init__(self, ids, first, read):
        self.ids, self.first, self.read = ids, first, read

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, span):
        self.read.append(tuple(self.first + np.array(span.indices(len(self))[:2])))
        return self.ids[span]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_rank_reads_its_own_blocks_and_nothing_before(tmp_path, monkeypatch, shuffle):
    folder, reads, split = shards_of(tmp_path, 10_000), [], read_split

    def watched(*words):
        shards, reads[len(reads):] = split(*words), [[]]
        starts = np.cumsum([0, *map(len, shards)])
        return [Watched(ids, first, reads[-1]) for ids, first in zip(shards, starts)]
    monkeypatch.setattr(data, "read_split", watched)
    ranks = [TokenLoader(folder, 4, 100, rank, 2, shuffle=shuffle) for rank in range(2)]
    assert len(ranks[0].shards) == 10 and reads == [[], []]
    for step in range(12):
        before = [len(read) for read in reads]
        blocks = [next(loader)[0][:, 0].tolist() for loader in ranks]
        now = [read[n:] for read, n in zip(reads, before)]
        assert [sum(stop - start for start, stop in read) for read in now] == [4 * 101] * 2
        assert all({*firsts} <= {start for start, _ in read} for firsts, read in zip(blocks, now))
        if not shuffle:  # of ten shards in files, no more than two are needed at a time
            assert len({start // 1000 for read in now for start, _ in read}) <= 2
    assert len({*reads[0]} | {*reads[1]}) == len(reads[0]) + len(reads[1])


def test_opening_shards_reads_their_headers_alone(tmp_path):
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("only Linux counts what a process reads")

    def n_read():
        return int(counters.read_text().split()[1])
    folder = tmp_path / "counted"
    write_shards(np.split(np.arange(5_000_000) % 300, 5), folder, "train", 300, 10**6)
    before = n_read()
    assert TokenLoader(folder, 8, 64).n_tokens == 5_000_000
    assert n_read() - before < 100_000


def test_resumed_anywhere_the_stream_is_the_one_that_never_stopped(tmp_path):
    folder = shards_of(tmp_path, 500)
    loader = TokenLoader(folder, 3, 16, seed=1)
    batches = [next(loader) for _ in range(40)]
    for position in 0, 1, 9, 10, 11, 39:
        again = TokenLoader(folder, 3, 16, seed=1, position=position)
        assert np.array_equal(next(again), batches[position]) and again.position == position + 1


def test_seeds_and_epochs_differ_and_splits_are_apart(tmp_path, prepared):
    folder = shards_of(tmp_path, 1000)
    orders = [[int(next(loader)[0][0, 0]) for _ in range(2 * loader.n_blocks)]
              for loader in (TokenLoader(folder, 1, 16), TokenLoader(folder, 1, 16, seed=1))]
    assert orders[0] != orders[1] and orders[0][:61] != orders[0][61:]
    card = card_of(prepared)
    assert TokenLoader(prepared, 1, 8, split="val").n_tokens == card["val"]["tokens"]


@pytest.mark.parametrize("n_tokens", [17, 18, 19, 31, 32, 33, 48])
def test_a_corpus_of_a_few_blocks_is_enough_and_a_shorter_one_is_refused(tmp_path, n_tokens):
    folder = shards_of(tmp_path, n_tokens)
    for (x, y), _ in zip(TokenLoader(folder, 2, 16), range(50)):
        assert x.shape == (2, 16)
        assert (y == x + 1).all() and y.max() < n_tokens
    with pytest.raises(ValueError, match=f"has {n_tokens} tokens, a block needs 49"):
        TokenLoader(folder, 2, 48)


# -----------------------------------------------------------------------------
# The command.


def test_the_command_prepares_and_names_the_next_one(tmp_path):
    folder_of(tmp_path, STORIES)
    done = run("data.py", "texts", "--vocab_size=300", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == f"next: python train.py --data={Path('shards', 'texts')}"
    assert "60 documents" in done.stdout and (tmp_path / "shards" / "texts" / "card.json").exists()


@pytest.mark.slow
def test_the_command_says_which_folder_it_made_or_used_again(home):
    said = [run("data.py", f"{name}/input.txt", "--vocab_size=300", cwd=home).stdout
            for name in ("a", "b", "b", "a")]
    folders = [text.splitlines()[-1].partition("next: python train.py --data=")[2] for text in said]
    assert folders == ["shards/input", folders[1], folders[1], "shards/input"]
    assert re.fullmatch(r"shards/input-[0-9a-f]{8}", folders[1])
    assert ["used again" in text for text in said] == [False, False, True, True]
    done = run("data.py", "b/input.txt", "--vocab_size=300", "--out=shards/input", cwd=home)
    assert done.returncode == 1 and done.stderr == (
        "error: shards/input holds other shards or files: choose another --out\n")


@pytest.mark.parametrize("words, code, message", [
    (["none.txt"], 1, "no such file"), (["shakespear"], 1, "not one of stdlib, shakespeare"),
    (["empty.txt"], 1, "no text in empty.txt"), (["binary.txt"], 1, "a binary file, not text"),
    (["a.pdf"], 1, "a.pdf: cannot read .pdf: python -m chapters.curate"),
    (["empty"], 1, "no text in empty"),
    (["a.jsonl"], 1, "no text in a.jsonl: a.jsonl, row 2: no text in field"),
    (["blank.txt"], 1, "no text in blank.txt"),
    (["huge.txt", "--vocab_size=99"], 1, "vocab_size=99 must be from 262"),
    (["huge.txt", "--vocab_size=" + "9" * 20], 1, "vocab_size=99999999999999999999 must be from"),
    (["huge.txt", "--vocab_size=x"], 2, "invalid int value: 'x'"),
    (["huge.txt", "--val_ratio=0"], 1, "val_ratio=0.0 must be above 0 and below 1"),
    (["huge.txt", "--val_ratio=nan"], 1, "val_ratio=nan must be above 0 and below 1"),
    (["huge.txt", "--val_ratio=-0.1"], 1, "val_ratio=-0.1 must"),
    (["huge.txt", "--val_ratio=1"], 1, "val_ratio=1.0 must be above 0 and below 1"),
    (["huge.txt", ""], 1, "each must have a name"), (["a.txt", "fineweb10B"], 1, "do not mix"),
    (["fineweb10B", "a.txt"], 1, "do not mix"), (["fineweb10B", "--shards=0"], 1, "not 0"),
    (["fineweb10B", "--shards=104"], 1, "1 to 103 training shards, not 104"),
    (["huge.txt", "--shards=2"], 1, "--shards would not act without fineweb10B: leave it out"),
    (["fineweb10B", "--vocab_size=300"], 1, "--vocab_size would not act beside ready shards"),
    (["fineweb10B", "--val_ratio=0.1"], 1, "--val_ratio would not act beside ready shards"),
    (["huge.txt", "--vocab_size=300", "--tokenizer=t.json"], 1, "would not act beside --tokenizer"),
    (["a.txt", "--out=b.txt"], 1, "b.txt holds other shards or files"),
    (["a.txt", "--out=folder"], 1, "folder holds other shards or files: choose another --out"),
    (["a.txt", "--tokenizer=none"], 1, "No such file"),
    (["a.txt", "--vocabsize=300"], 2, "did you mean --vocab_size?")])
def test_a_wrong_input_ends_in_one_line(tmp_path, words, code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "huge.txt")  # to read it would take for ever
    contents = {"a.txt": b"text", "empty.txt": b"", "binary.txt": b"\0\1\2\0", "a.pdf": b"x",
                "b.txt": b"mine", "blank.txt": b" \n", "a.jsonl": b'{"text": ""}\n{}'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    done = run("data.py", *words, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert (tmp_path / "b.txt").read_bytes() == b"mine" and not list(tmp_path.glob("shards/*"))
