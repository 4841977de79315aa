"""Facts about data.py: documents, shards, batches."""

import gzip
import hashlib
import io
import json
import os
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import run

import data
from data import TokenLoader, clean, prepare, read_documents, read_shard, read_split, write_shards
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
    assert data.exact_duplicates(["a", "b", "a"]) == [2]
    assert data.folder_name("texts/My book.txt.gz") == "My-book"


@pytest.mark.parametrize("text", [
    "a\r\nb\rc", "  x = 1  \n\n\n\n\n\ty\n", "\n\n  a\x00\x07\x85", "e\u0301\udcff",
    "a\u0300\x1b\u0301 \n", "\u00a0\n\u2028b", "Å \ufeff é", ""])
def test_cleaning_twice_is_cleaning_once(text):
    assert clean(clean(text)) == clean(text)


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
        with pytest.raises(ValueError, match="a.jsonl, line 2"):
            list(read_documents(path))


def test_a_web_page_is_refused_with_the_command_that_reads_it(tmp_path):
    (tmp_path / "a.html").write_text("<p>a")
    with pytest.raises(ValueError, match="a.html: can read only .txt .* python -m chapters.curate"):
        list(read_documents(tmp_path / "a.html"))


def test_a_damaged_gz_file_is_refused_by_name(tmp_path):
    packed = gzip.compress(b"text " * 99)
    for content in b"no gzip", packed[:-9], packed[:-8] + bytes(8):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match="a.txt.gz"):
            list(read_documents(tmp_path / "a.txt.gz"))


def test_a_folder_is_read_in_order_and_skips_what_is_no_text(tmp_path):
    folder = folder_of(tmp_path, ["b", "c"])
    for name, content in {"a.md": b"a", "a.html": b"<p>", "z.txt": b"\x89PNG\0", "image.png": b"x",
                          "empty.txt": b"", ".hidden.txt": b"x", "d.txt.gz": b"no gzip"}.items():
        (folder / name).write_bytes(content)
    counts = data.Counter()
    names = [path.name for path in data.find_files(str(folder), tmp_path, counts)]
    assert names == ["000.txt", "001.txt", "a.md", "empty.txt"] and counts["skipped files"] == 4


def test_the_standard_library_is_a_corpus_without_tests(tmp_path):
    files = data.find_files("stdlib", tmp_path, data.Counter())
    names = {part for path in files for part in path.relative_to(files[0].parent).parts}
    assert "argparse.py" in names and "json" in names
    assert not names & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def test_the_topics_of_pydoc_are_documents_of_prose():
    path = Path(os.__file__).parent / "pydoc_data" / "topics.py"
    texts = list(read_documents(path))
    assert len(texts) > 50 and not any(text.startswith(("topics =", "# Auto")) for text in texts)


def test_a_text_that_occurs_again_is_dropped(tmp_path):
    folder = folder_of(tmp_path, [*STORIES, STORIES[3] + "  \r\n"])
    (folder / "blank.md").write_text(" \n")
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
    shards = write_shards([ids[:4], [], *ids[4:].reshape(3, 2)], tmp_path, "train", n_vocab, 4)
    assert shards == {"train_000000.bin": 4, "train_000001.bin": 4, "train_000002.bin": 2}
    raw = (tmp_path / "train_000000.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [magic, version, 4]
    assert len(raw) == 1024 + 4 * size and not any(raw[12:1024])
    assert np.concatenate(read_split(tmp_path)).tolist() == ids.tolist()


def test_shards_decode_to_the_clean_documents(prepared):
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    both = np.concatenate(read_split(prepared) + read_split(prepared, "val"))
    ends = np.flatnonzero(both == tokenizer.eot)
    texts = [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(both, ends + 1)]
    assert sorted(texts) == sorted(["", *map(clean, STORIES)])


def test_texts_are_tokenized_in_groups(monkeypatch):
    tokenizer = Tokenizer.train("".join(STORIES), 400)
    monkeypatch.setattr(data, "GROUP_BYTES", 200)
    groups = list(data.tokenize(documents_of(STORIES), tokenizer))
    ids = [id for text in STORIES for id in (*tokenizer.encode(text), tokenizer.eot)]
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


def test_a_shard_that_changed_or_is_gone_is_named(tmp_path, prepared):
    out = Path(shutil.copytree(prepared, tmp_path / "copy"))
    path = out / "val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert data.check_shards(out, ("train",)) == data.read_card(prepared)
    with pytest.raises(ValueError, match="val_000000.bin is damaged"):
        data.check_shards(out)
    path.unlink()
    with pytest.raises(OSError, match="val_000000.bin"):
        data.check_shards(out)


def test_the_same_content_is_used_again_and_another_byte_is_not(tmp_path):
    folder, out, lines = folder_of(tmp_path, STORIES), tmp_path / "out", []
    prepare(folder, out, 300, **quiet)
    before = (out / "train_000000.bin").stat().st_mtime_ns
    folder = folder.rename(tmp_path / "renamed")
    prepare([folder], out, 300, say=lines.append)
    assert (out / "train_000000.bin").stat().st_mtime_ns == before and "used again" in lines[0]
    (folder / "000.txt").write_text(STORIES[0] + "!")
    prepare(folder, out, 300, **quiet)
    assert (out / "train_000000.bin").stat().st_mtime_ns != before


@pytest.mark.parametrize("harm", [
    lambda out: (out / "card.json").unlink(),
    lambda out: (out / "val_000000.bin").write_bytes(b"x"),
    lambda out: (out / "tokenizer.json").write_text("{}"),
    lambda out: (out / "train_000007.bin").write_bytes((out / "val_000000.bin").read_bytes())])
def test_an_unfinished_or_damaged_folder_is_made_again(tmp_path, harm):
    folder, out = folder_of(tmp_path, STORIES), tmp_path / "out"
    before = card_of(prepare(folder, out, 300, **quiet))
    harm(out)
    assert card_of(prepare(folder, out, 300, **quiet)) == before
    names = ["card.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert sorted(path.name for path in out.glob("[!.]*")) == names


def test_a_failed_run_leaves_the_finished_folder_as_it_is(tmp_path):
    folder, out = folder_of(tmp_path, STORIES), tmp_path / "out"
    prepare(folder, out, 300, **quiet)
    (folder / "bad.jsonl").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="bad.jsonl, line 1"):
        prepare(folder, out, 300, **quiet)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    folder, out = folder_of(tmp_path, STORIES), tmp_path / "mine"
    out.mkdir()
    (out / "tokenizer.json").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        prepare(folder, out, 300, **quiet)
    assert [path.read_text() for path in out.iterdir()] == ["precious"]


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
        data.find_files(f"{server.url}/a.txt", tmp_path, data.Counter())
    assert not list(tmp_path.iterdir())


def test_a_download_that_was_cut_off_continues_where_it_stopped(tmp_path, server):
    server.files["/a.txt"], server.cut = b"0123456789" * 1000, 3000
    with pytest.raises(ValueError, match="cut off at 3,000 of 10,000 bytes"):
        data.download(f"{server.url}/a.txt", tmp_path / "a.txt")
    path = data.download(f"{server.url}/a.txt", tmp_path / "a.txt")
    assert server.starts == [0, 2999] and path.read_bytes() == server.files["/a.txt"]
    path.rename(tmp_path / "a.txt.part")  # ended between the last byte and the new name
    data.download(f"{server.url}/a.txt", path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_download_with_another_checksum_is_removed(tmp_path, server, monkeypatch):
    row = f"{server.url}/a.txt", hashlib.sha256(b"right").hexdigest()
    monkeypatch.setitem(data.KNOWN, "shakespeare", row)
    server.files["/a.txt"] = b"right"
    [path] = data.find_files("shakespeare", tmp_path / "right", data.Counter())
    assert path.read_bytes() == b"right"
    server.files["/a.txt"] = b"wrong"
    with pytest.raises(ValueError, match="has not the expected sha256"):
        data.find_files("shakespeare", tmp_path / "wrong", data.Counter())
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
    [path] = data.find_files("wikitext", tmp_path / "downloads", data.Counter())
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


def test_each_block_of_an_epoch_is_read_once(tmp_path):
    loader = TokenLoader(shards_of(tmp_path, 1000), 1, 16, seed=3)
    for _ in range(3):
        starts = sorted(int(next(loader)[0][0, 0]) for _ in range(loader.n_blocks))
        assert (np.diff(starts) == 16).all() and len(starts) >= 1000 // 16 - 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_reads_the_same_global_batches(tmp_path, world_size):
    folder = shards_of(tmp_path, 1000)
    alone = TokenLoader(folder, 8, 16)
    ranks = [TokenLoader(folder, 8 // world_size, 16, rank, world_size)
             for rank in range(world_size)]
    for _ in range(20):
        both = [np.concatenate(parts) for parts in zip(*map(next, ranks))]
        assert np.array_equal(both, next(alone))


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


@pytest.mark.parametrize("n_tokens", [17, 18, 31, 32, 33, 48])
def test_a_corpus_of_a_few_blocks_is_enough_and_a_shorter_one_is_refused(tmp_path, n_tokens):
    folder = shards_of(tmp_path, n_tokens)
    for (x, y), _ in zip(TokenLoader(folder, 2, 16), range(50)):
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


@pytest.mark.parametrize("words, code, message", [
    (["none.txt"], 1, "no such file"), (["shakespear"], 1, "not one of stdlib, shakespeare"),
    (["empty.txt"], 1, "0 bytes of text"), (["binary.txt"], 1, "is a binary file"),
    (["a.pdf"], 1, "a.pdf: can read only .txt"), (["empty"], 1, "0 bytes of text"),
    (["a.jsonl"], 1, "a.jsonl, line 2"), (["blank.txt"], 1, "0 bytes of text"),
    (["a.txt", "--vocab_size=99"], 1, "vocab_size=99 is"), (["fineweb10B", "a.txt"], 1, "mix"),
    (["a.txt", "--val_ratio=2"], 1, "4 bytes of text do not split at val_ratio=2.0"),
    (["a.txt", "--tokenizer=none"], 1, "No such file"),
    (["a.txt", "--vocabsize=300"], 2, "did you mean --vocab_size?")])
def test_a_wrong_input_ends_in_one_line(tmp_path, words, code, message):
    (tmp_path / "empty").mkdir()
    contents = {"a.txt": b"text", "empty.txt": b"", "binary.txt": b"\0\1", "a.pdf": b"x",
                "blank.txt": b" \n", "a.jsonl": b'{"text": ""}\n{}'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    done = run("data.py", *words, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert not list(tmp_path.glob("shards/*/[!.]*"))
