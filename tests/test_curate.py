"""Facts about chapters/curate.py: pages become text."""

import gzip
import os
from pathlib import Path

import pytest
from conftest import mistake

from chapters import curate
from chapters.curate import html_to_text
from data import clean, read_documents


def test_the_example_in_the_docstring_is_true():
    assert html_to_text(b"<p>a &lt; <b>b</b>").strip() == "a < b"


def test_html_becomes_what_a_reader_sees():
    page = """<!DOCTYPE html><html><head><title>T</title><style>p { x }</style></head>
        <body></script><![if IE]><script>if (a < b) "</p>";</script><h1>Fish &amp; chips</h1>
        <p>One <b>bold</b>
        word<br>and&nbsp;&eacute;<ul><li>a<li>b</ul><pre>if x:\n    y</pre>end"""
    text = html_to_text(page.encode())
    assert clean(text) == "T\nFish & chips\nOne bold word\nand é\na\nb\nif x:\n    y\nend"


def test_the_command_writes_one_text_for_each_page(tmp_path, call):
    (tmp_path / "site" / "deep").mkdir(parents=True)
    for name in "a.html", "deep/a.htm":
        (tmp_path / "site" / name).write_text(f"<p>{name}")
    (tmp_path / "site" / "a.txt").write_text("no page")
    (tmp_path / "a.html.gz").write_bytes(gzip.compress(b"<p>packed \xff"))
    out, _ = call(curate, tmp_path / "site", tmp_path / "a.html.gz", f"--out={tmp_path / 'out'}")
    texts = {str(path.relative_to(tmp_path / "out")): clean(*read_documents(path))
             for path in (tmp_path / "out").rglob("*.txt")}
    assert texts == {"a.txt": "a.html", "deep/a.txt": "deep/a.htm", "a-2.txt": "packed \ufffd"}
    assert out.splitlines()[-1] == f"next: python data.py {tmp_path / 'out'}"


def test_a_folder_is_read_through_its_links_and_without_what_cannot_be_read(tmp_path, call):
    site, other = tmp_path / "site", tmp_path / "other"
    for folder in site, other:
        folder.mkdir()
    for path in site / "a.HTM", site / "b.xht", other / "c.shtml", site / ".hidden.html":
        path.write_text(f"<p>{path.stem}")
    for name, content in ("bad.html.gz", b"no gzip"), ("binary.html", b"\0"), ("x.pdf", b"x"):
        (site / name).write_bytes(content)
    os.mkfifo(site / "pipe.html")
    for name, target in ("more", other), ("loop", site), ("none.html", site / "none"):
        (site / name).symlink_to(target)
    out, _ = call(curate, site, f"--out={tmp_path / 'out'}")
    texts = {str(path.relative_to(tmp_path / "out")): path.read_text()
             for path in (tmp_path / "out").rglob("*.*")}
    assert texts == {"a.txt": "a", "b.txt": "b", "more/c.txt": "c"}
    assert [Path(line.split()[1].strip(":")).name for line in out.splitlines()[:4]] == [
        "bad.html.gz", "binary.html", "none.html", "pipe.html"]


def test_no_text_is_written_when_a_later_source_is_refused(tmp_path, call):
    (tmp_path / "a.html").write_text("<p>a")
    for bad in "none.html", "":
        assert "--out is empty" in call(curate, tmp_path / "a.html", "--out=")[1]
        out = tmp_path / "out"
        _, notes = call(curate, tmp_path / "a.html", bad and tmp_path / bad, f"--out={out}")
        assert "no such file" in notes and not out.exists()


@pytest.mark.parametrize("part", ["<!--", "<script>", "<pre>", "<pre", "\"<a", "<a '",
                                  "</script ", "<a \"'"])
def test_a_page_of_nothing_but_openings_comes_to_an_end(part):
    assert len(html_to_text(part.encode() * 50_000)) <= len(part) * 50_000


def test_what_is_opened_and_not_closed_goes_to_the_end():
    assert html_to_text(b"<p>a<!-- b <p>c") == html_to_text(b"<p>a<script>b</p>c") == "a"
    assert html_to_text(b"a<pre>  b\n  c") == "a\n  b\n  c\n"


def test_a_url_is_fetched_as_a_page(tmp_path, monkeypatch):
    def download(url, path):
        path.write_text(f"<p>{url}")
        return path
    monkeypatch.setattr(curate, "download", download)
    [path] = curate.curate(["https://example.org/my%20page.php?x=1"], tmp_path)
    assert path.read_text() == "https://example.org/my%20page.php?x=1"


@pytest.mark.parametrize("name, content, message", [
    ("none.html", None, "no such file"), ("a.pdf", b"x", "not a page"),
    ("a.html", b"\0", "binary file"), ("a.html.gz", b"no gzip", "a.html.gz"),
    ("empty", "folder", "no pages")])
def test_what_is_no_page_ends_in_one_line(tmp_path, monkeypatch, capsys, name, content, message):
    path = tmp_path / name
    path.mkdir() if content == "folder" else content is not None and path.write_bytes(content)
    words = path, f"--out={tmp_path / 'out'}"
    code, lines = mistake(curate.main, monkeypatch, capsys, *words)
    assert code == 1 and len(lines) == 1 and message in lines[0] and name in lines[0]
    assert not (tmp_path / "out").exists()
