"""Facts about chapters/curate.py and chapters/stages.py: files become documents one can trust."""

import bz2
import gzip
import json
import lzma
import os
import random
import re

import numpy as np
import pytest
from conftest import mistake

import data
from chapters import curate, datacard, sources, stages
from chapters.curate import CurateConfig
from chapters.near import jaccard, shingles
from data import prepare, read_split
from tokenizer import Tokenizer

RANDOM = random.Random(0)
WORDS = ("the of and to in that river house small people work year light road song old bread "
         "window teacher morning letter garden winter street paper water story friend").split()


def story(n=120, seed=None):
    """Sentences of random words, of more than n words, that pass the rules."""
    rng, text = random.Random(seed) if seed is not None else RANDOM, ""
    while len(text.split()) < n:
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(9, 15))).capitalize()
        text += f"{sentence}, with {rng.randint(100, 99999)} of them.\n"
    return text


def write(folder, **contents):
    """Files in a folder: name_ending="text" or bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / ".".join(name.split("__"))).write_bytes(content)
    return folder


def rows_of(out):
    return [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]


def run(source, out, **options):
    """curate one source -> (its card, the texts that are left)."""
    sources = [str(source)] if not isinstance(source, list) else [*map(str, source)]
    config = CurateConfig(sources=sources, out=str(out), **options)
    card = curate.curate(config, say=lambda line: None)
    return card, [row["text"] for row in rows_of(out)]


def stage_of(card, name):
    return next(stage for stage in card["stages"] if stage["name"] == name)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder of documents of several kinds, some of which do not pass."""
    texts = [story(seed=i) for i in range(30)]
    near = texts[3].replace("river", "rivers", 1)
    rows = [*texts, texts[0], near, "Too short.", "lorem ipsum " + story(), texts[5] + "\u200b\r\n",
            story() + " Write to joe.bloggs@example.org today."]
    lines = "\n".join(json.dumps(dict(text=text)) for text in rows) + "\nbroken {\n"
    return write(tmp_path_factory.mktemp("curate") / "raw", rows__jsonl=lines,
                 page__html=f"<nav><a href=/>Home</a></nav><main><p>{story()}</p></main>",
                 more__md__gz=gzip.compress(story().encode()), note__png=b"x",
                 deep__txt__bz2=bz2.compress(story().encode()),
                 table__csv__xz=lzma.compress(f'id,text\n1,"{story()}"\n'.encode()))


def test_the_examples_in_the_docstrings_are_true():
    assert stages.chosen("c4", ["gopher_hashes", "c4_policies"], "rules") == ["c4_policies"]


def test_each_stage_is_counted_and_what_it_drops_is_missing_from_the_next(raw, tmp_path):
    card, texts = run(raw, tmp_path / "out")
    counts = [stage["documents"] for stage in card["stages"]]
    assert counts[0] == 40 and counts[-1] == len(texts) == 35
    for before, stage in zip(counts, card["stages"][1:]):
        assert stage["documents"] == before - stage["dropped"]
    assert stage_of(card, "rules")["reasons"] == {"gopher_word_count": 1, "c4_lorem_ipsum": 1}
    assert stage_of(card, "copies")["dropped"] == 2  # one of them is equal once it is clean
    assert stage_of(card, "near-duplicates")["dropped"] == 1
    assert stage_of(card, "mask")["reasons"] == {"email": 1}
    assert card["stages"][-1]["bytes"] == sum(len(text.encode()) for text in texts)


def test_examples_say_where_what_and_why(raw, tmp_path):
    card, _ = run(raw, tmp_path / "out")
    [example] = stage_of(card, "mask")["examples"]
    assert "joe.bloggs@example.org" in example["before"] and example["why"] == "email"
    assert "joe.bloggs" not in example["after"] and "rows.jsonl, " in example["place"]
    assert all(len(stage["examples"]) <= 5 for stage in card["stages"])
    [example] = stage_of(card, "controls")["examples"]
    assert "\\u200b" in example["before"] and "\\u200b" not in example["after"]


def test_what_is_left_passes_every_stage_again_unchanged(raw, tmp_path):
    _, texts = run(raw, tmp_path / "out")
    card, again = run(tmp_path / "out", tmp_path / "again")
    assert again == texts
    assert not any(stage["changed"] or stage["dropped"] for stage in card["stages"])


def test_broken_documents_and_foreign_files_are_named_and_end_nothing(raw, tmp_path):
    [source] = run(raw, tmp_path / "out")[0]["sources"]
    assert source["files"] == 5 and source["n_skipped"] == 2
    assert "note.png" in source["skipped"][0] and "rows.jsonl, row 37" in source["skipped"][1]


def test_batches_on_many_processes_give_what_one_gives(raw, tmp_path, monkeypatch):
    _, alone = run(raw, tmp_path / "alone")
    monkeypatch.setattr(curate, "BATCH_CHARS", 2000)
    card, texts = run(raw, tmp_path / "many")
    assert texts == alone and card["stages"][0]["documents"] == 40
    assert all(len(stage["examples"]) <= 5 for stage in card["stages"])


def test_no_near_duplicate_is_on_the_other_side_of_the_split(tmp_path):
    texts = []
    for i in range(60):  # families of four versions, each a little changed
        words = story(seed=1000 + i).split(" ")
        for _ in range(4):
            words[RANDOM.randrange(len(words))] = "changed"
            texts.append(" ".join(words))
    RANDOM.shuffle(texts)
    lines = "\n".join(json.dumps(dict(text=text)) for text in texts)
    _, left = run(write(tmp_path / "raw", rows__jsonl=lines), tmp_path / "out", near=0.7)
    out = prepare(tmp_path / "out", tmp_path / "shards", 300, val_ratio=0.3, say=lambda line: None)
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    train, val = [[shingles(text, 5) for text in tokenizer.decode(
        np.concatenate(read_split(out, split)).tolist()).split("<|endoftext|>")[1:]]
        for split in ("train", "val")]
    assert len(left) == 60 == len(train) + len(val) and len(val) > 5
    assert max(jaccard(a, b) for a in train for b in val) < 0.7


def test_the_card_of_shards_says_what_was_done_to_their_text(raw, tmp_path):
    card, _ = run(raw, tmp_path / "out", license="CC0-1.0")
    out = prepare(tmp_path / "out", tmp_path / "shards", 300, say=lambda line: None)
    [source] = json.loads((out / "card.json").read_text())["sources"]
    assert source["license"] == "CC0-1.0" and source["files"] == 1 and not source["skipped"]
    assert source["curated"] == json.loads((tmp_path / "out" / "card.json").read_text())


def test_long_documents_are_cut_and_lose_nothing_but_white_space(tmp_path):
    text = "\n\n".join(story(60) for _ in range(9))
    for split in "paragraphs", "sentences":
        _, texts = run(write(tmp_path / "raw", a__txt=text), tmp_path / split, split=split,
                       max_chars=1000, rules="none")
        assert len(texts) > 3 and max(map(len, texts)) <= 1000
        assert "".join("".join(texts).split()) == "".join(text.split())


def test_lines_that_occurred_before_go_and_questions_are_taken_out(tmp_path):
    line = "All rights are reserved by the owners of this page and of all the others."
    question = "which of the old songs did the teacher sing in the garden that winter morning"
    texts = [f"{line}\n{story()}", f"{story()}\n{line}", f"{story()} {question.upper()}? Yes."]
    folder = write(tmp_path / "raw", rows__jsonl="\n".join(
        json.dumps(dict(text=text)) for text in texts))
    write(tmp_path, exam__jsonl=json.dumps(dict(text=question)))
    card, left = run(folder, tmp_path / "out", lines=True, against=str(tmp_path / "exam.jsonl"))
    assert [line in text for text in left] == [True, False]
    assert stage_of(card, "contaminated")["dropped"] == 1


def test_a_language_and_what_is_like_a_file_can_be_asked_for(tmp_path):
    german = "Der alte Lehrer geht am Morgen durch den Garten und liest seine Briefe. " * 9
    folder = write(tmp_path / "raw", a__txt=german, b__txt=story())
    _, texts = run(folder, tmp_path / "out", languages="de", rules="none")
    assert [text.strip() for text in texts] == [german.strip()]
    good = [story() for _ in range(30)]
    bad = ["buy cheap pills now " * 30 + str(i) for i in range(30)]
    for name, rows in ("good", good), ("bad", bad):
        write(tmp_path, **{f"{name}__jsonl": "\n".join(json.dumps(dict(text=t)) for t in rows)})
    write(tmp_path / "mixed", a__txt=story(), b__txt="buy cheap pills right now " * 25)
    card, texts = run(tmp_path / "mixed", tmp_path / "liked", rules="none",
                      like=str(tmp_path / "good.jsonl"), unlike=str(tmp_path / "bad.jsonl"))
    assert len(texts) == 1 and "pills" not in texts[0]


def test_a_failure_leaves_no_folder_and_no_folder_is_written_over(raw, tmp_path, monkeypatch):
    write(tmp_path / "mine", notes__txt="precious")
    with pytest.raises(ValueError, match="mine holds other shards or files"):
        run(raw, tmp_path / "mine")

    def breaks(*words):
        raise KeyboardInterrupt
    monkeypatch.setattr(curate, "near_duplicates", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(raw, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_the_page_of_a_card_shows_its_numbers_and_no_markup_of_a_document(raw, tmp_path, call):
    evil = f"{story()} <script>alert(1)</script> me@example.org"
    run([raw, write(tmp_path / "evil", a__txt=evil)], tmp_path / "out", rules="none")
    monkey = call(curate, "card", tmp_path / "out")
    assert monkey[0] == f"card: {tmp_path / 'out' / 'card.html'}\n"
    page = (tmp_path / "out" / "card.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "near-duplicates" in page and page.count("data:image/png;base64,") == 1
    assert datacard.cell(1234) == '<td class="n">1,234</td>'


def test_the_page_marks_the_words_that_a_stage_took_and_counts_all_that_was_skipped():
    before, after = "a b me@c.org d\n\n\ne", "a b <EMAIL> d\n\ne"
    assert datacard.marked(before, after, "del") == (
        "<td><pre>a b <del>me@c.org</del> d\n\n<del>\u21b5\n</del>e</pre></td>")
    assert "<ins>&lt;EMAIL&gt;</ins>" in datacard.marked(after, before, "ins")
    lines = datacard.skipped_lines(dict(name="a", skipped=["<b>"] * 12, n_skipped=300))
    assert lines.count("<li>&lt;b&gt;</li>") == 10 and "and 290 more" in lines
    assert datacard.skipped_lines(dict(name="a", skipped=[])) == ""


def test_the_lines_of_a_report_count_all_reasons_and_all_that_was_skipped():
    record = stages.new_record("rules")
    record["reasons"].update(a=9, b=8, c=7, d=6, e=5, f=4)
    sources = [dict(skipped=["x", "y"], n_skipped=2), dict(skipped=["z"] * 100, n_skipped=150)]
    lines = [*stages.report([record], sources)]
    assert lines[0].endswith(": 9 a, 8 b, 7 c, 6 d, 9 other")
    assert lines[1:4] == ["skipped: x", "skipped: y", "skipped: z"] and "149 more" in lines[4]
    assert [*stages.report([], [])] == []


def test_questions_are_found_in_fields_of_any_name(tmp_path):
    text = story()
    question = " ".join(text.split()[5:25])
    rows = [dict(q=dict(stem="Is it so?"), choices=[question, "no"], n=3), question.upper()]
    for name, row in enumerate(rows):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        folder = write(tmp_path / f"raw{name}", a__txt=text, b__txt=story())
        card, texts = run(folder, tmp_path / f"out{name}", against=str(tmp_path / f"{name}.jsonl"))
        assert len(texts) == 1 and card["stages"][-1]["dropped"] == 1


def test_repeated_lines_are_counted_one_by_one(tmp_path):
    lines = [f"This line is long enough, and it is number {i} of all." for i in range(6)]
    texts = "\n".join(lines), "\n".join(lines[:4]) + "\nAnd what is new.", "\n".join(lines[:2])
    rows = "\n".join(json.dumps(dict(text=text)) for text in texts)
    card, left = run(write(tmp_path / "raw", a__jsonl=rows), tmp_path / "out", rules="none",
                     lines=True, near=0.0)
    assert len(left) == 2 and stage_of(card, "lines")["reasons"] == {"repeated lines": 6}


def test_an_address_keeps_the_kind_that_its_path_names(tmp_path, monkeypatch):
    for module in sources, data:
        monkeypatch.setattr(module, "download", lambda url, path, sha256=None: path)
    for name, kind in (("a.pdf", ".pdf"), ("a.warc.gz", ".warc"), ("a.jsonl?x=1", ".jsonl"),
                       ("a.PDF?b=c.txt#d", ".pdf"), ("a.html.gz", ".html"), ("a", ".html"),
                       ("", ".html"), ("a.php?id=3", ".html"), ("a.b", ".html")):
        [path] = sources.find(f"http://a.org/{name}", tmp_path)
        assert data.ending(path) == kind, name


def test_few_bands_for_a_low_similarity_are_said(tmp_path):
    for near, is_said in (0.8, False), (0.5, True), (0.0, False):
        said = []
        config = CurateConfig(sources=[str(write(tmp_path / "raw", a__txt=story()))],
                              out=str(tmp_path / f"{near}"), near=near)
        curate.curate(config, said.append)
        assert any("just 0.5 similar, 6% are found" in line for line in said) == is_said


def test_a_byte_of_another_encoding_ends_nothing_and_many_are_a_skipped_document(tmp_path):
    texts = [story(), story() + "\ud800", "\udfff" * 3 + story(9), story() + "\u00e9"]
    rows = "\n".join(json.dumps(dict(text=text)) for text in texts)
    folder = write(tmp_path / "raw", a__jsonl=rows, b__txt=story().encode() + b"caf\xe9.\n")
    card, left = run(folder, tmp_path / "out", rules="none", encoding="utf-8-sig")
    assert len(left) == 4 and sum("\ufffd" in text for text in left) == 2
    [skipped] = card["sources"][0]["skipped"]
    assert "a.jsonl, 3: " in skipped
    assert "of it is of another encoding: give --encoding=NAME" in skipped
    assert stage_of(card, "read")["bytes"] >= sum(len(text.encode()) for text in left)


def test_stages_run_in_the_order_of_their_options(raw, tmp_path, monkeypatch):
    options = dict(rules="gopher", languages="en", toxic=0.99, lines=True, split="sentences",
                   like=str(raw / "rows.jsonl"), unlike=str(raw / "rows.jsonl"),
                   against=str(write(tmp_path / "q", a__txt=story()) / "a.txt"))
    monkeypatch.setattr(stages, "quality_scores", lambda like, unlike: lambda text: 1)
    card, _ = run(raw, tmp_path / "out", **options)
    names = [stage["name"] for stage in card["stages"]]
    fields = [*CurateConfig.__dataclass_fields__]
    renamed = dict(sentences="split", quality="like", copies="exact", contaminated="against")
    renamed |= {"near-duplicates": "near"} | dict.fromkeys(stages.cleaning.STAGES, "clean")
    places = [fields.index(renamed.get(name, name)) for name in names
              if name not in ("read", "empty")]
    assert places == sorted(places) and len(names) == 16


def test_what_is_left_out_by_none_and_what_is_usual_are_said_in_full_in_the_card():
    config = CurateConfig(rules="none", languages="none")
    assert config.rules == [] and config.mask[0] == "key"
    assert config.clean == stages.cleaning.DEFAULT and "languages" not in stages.text_stages(config)


@pytest.mark.parametrize("words, message", [
    (["--out=o"], "one or more sources"), (["raw"], "one or more sources"),
    (["none.txt", "--out=o"], "no such file"),
    (["raw", "--out=o", "--rules=gopherr"], "--rules=gop"),
    (["raw", "--out=o", "--clean", "nfc", "x"], "--clean=x: must be none or of line_ends"),
    (["raw", "--out=o", "--near=2"], "near=2.0"), (["raw", "--out=o", "--near=nan"], "near=nan"),
    (["raw", "--out=o", "--split=words"], "split"),
    (["raw", "--out=o", "--like=a.txt"], "--unlike"),
    (["raw", "--out=o", "--near=0", "--bands=4"], "--bands would not act beside --near=0"),
    (["raw", "--out=o", "--keep=0.4"], "--keep would not act without --like"),
    (["raw", "--out=o", "--hashes=10"], "a multiple of bands"),
    (["raw", "--out=o", "--near=0", "--against=none.txt"], "none.txt"),
    (["raw", "--out=o", "--languages=xx"], "xx"),
    (["raw", "--out=o", "--encoding=x"], "encoding=x"),
    (["raw", "--out=o", "--mask", "email", "none"], "--mask=email none: none stands alone"),
    (["raw", "--out=o", "--against=empty.txt"], "--against=empty.txt: no question is in it"),
    (["raw", "--out=o", "--near=1.005"], "near=1.005 must be at least 0 and at most 1"),
    (["empty", "--out=o"], "no text is left of empty"), (["card"], "FOLDER"),
    (["card", "raw"], "card.json"), (["raw", "--out=raw"], "raw holds other shards or files")])
def test_a_wrong_input_ends_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "raw", a__txt=story())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    code, lines = mistake(curate.main, monkeypatch, capsys, *words)
    assert code in (1, 2) and len(lines) == 1 and message in lines[0]
    assert sorted(os.listdir(tmp_path)) == ["empty", "empty.txt", "raw"]
    assert os.listdir("raw") == ["a.txt"]


def test_a_page_says_what_is_synthetic_however_often_it_was_curated(tmp_path):
    made = write(tmp_path / "made", documents__jsonl=json.dumps(dict(text=story())))
    write(made, card__json=json.dumps(dict(sources=[], synthetic=True)))
    run(made, tmp_path / "once")
    run([tmp_path / "once", write(tmp_path / "raw", a__txt=story())], tmp_path / "twice")
    names = re.findall(r"<tr><td>([^<]*)</td>", datacard.write_page(tmp_path / "twice").read_text())
    assert f"{tmp_path / 'once'} (synthetic)" in names and str(tmp_path / "raw") in names
