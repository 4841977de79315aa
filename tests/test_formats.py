"""chapters/formats.py, warc.py and wikitext.py: files of many kinds become documents."""

import gzip
import io
import mailbox
import sys
import tracemalloc
import zipfile
import zlib
from email import message_from_bytes, policy
from email.message import EmailMessage
from random import Random

import pytest

from chapters import formats, warc, wikitext
from chapters.formats import READERS
from chapters.warc import join_chunks, parse_fields
from chapters.wikitext import wikitext_to_text


def read(kind, content):
    """The documents of a file, each broken one as the text of its error."""
    return [str(text) for text in READERS[kind](io.BytesIO(content))]


def documents(kind, content):
    """The documents of a file, without the broken ones."""
    return [text for text in READERS[kind](io.BytesIO(content)) if isinstance(text, str)]


class Endless(io.RawIOBase):
    """A file that repeats a block of bytes n times, after a beginning."""

    def __init__(self, start, block, n):
        self.parts = iter([start, *[block] * n])

    def read(self, n_bytes=-1):
        return next(self.parts, b"")


# -----------------------------------------------------------------------------
# WARC and WET.


def record(content, kind="conversion", length=None, end=b"\r\n\r\n"):
    content = content.encode() if isinstance(content, str) else content
    length = len(content) if length is None else length
    return (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://example.org/\r\n"
            f"Content-Length: {length}\r\n\r\n".encode() + content + end)


def response(body, *fields, status="200 OK", kind="text/html; charset=utf-8"):
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *fields, "", ""])
    body = body if isinstance(body, bytes) else body.encode()
    return record(head.encode() + body, "response")


def members(records):
    return b"".join(map(gzip.compress, records))


TEXTS = [f"document {i} " * Random(i).randint(1, 9000) for i in range(30)]
RECORDS = [record(text) for text in TEXTS]
PAGE = "<p>Grüße aus Köln, wo der Dom steht, und noch viel mehr, was man lesen kann.</p>"
PAGE_TEXT = "Grüße aus Köln, wo der Dom steht, und noch viel mehr, was man lesen kann."


@pytest.mark.parametrize("pack", [b"".join, members, lambda parts: gzip.compress(b"".join(parts)),
                                  lambda parts: gzip.compress(b"") + members(parts)])
def test_the_records_of_a_wet_file_are_its_documents_however_it_is_packed(pack):
    other = [record("software: x", "warcinfo"), record("GET /", "request")]
    assert read(".wet", pack(other + RECORDS)) == TEXTS


@pytest.mark.parametrize("size", [3, 7, 100, 1 << 16])
def test_what_is_read_does_not_depend_on_how_much_is_read_at_a_time(monkeypatch, size):
    monkeypatch.setattr(warc, "PACKED_BYTES", size)
    monkeypatch.setattr(warc, "UNPACKED_BYTES", size * 3)
    parts = RECORDS[:4]
    damaged = parts[0][:-9] + b"\r\n" + parts[1]
    assert read(".wet", members(parts)) == read(".wet", b"".join(parts)) == TEXTS[:4]
    assert documents(".wet", members([damaged, *parts[2:]])) == [TEXTS[1], *TEXTS[2:4]]
    lie = record("x", length=10**9)
    assert len(read(".wet", lie + b"".join(parts))) == 5  # one error alone
    packed = gzip.compress(parts[0])
    for i in range(10, len(packed) - 8, 40):
        bad = packed[:i] + b"\xff" * 8 + packed[i + 8:]
        assert [*map(len, read(".wet", bad + members(parts)))][1:] == [*map(len, TEXTS[:4])]


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_gzip_member_is_counted_with_its_place_and_no_other_is_lost(seed):
    random, packed = Random(seed), [*map(gzip.compress, RECORDS)]
    number = random.randrange(len(packed))
    place, start = random.randrange(len(packed[number])), sum(map(len, packed[:number]))
    bad = bytearray(packed[number])
    bad[place:place + 3] = bytes(byte ^ 0x55 for byte in bad[place:place + 3])
    found = [*READERS[".wet"](io.BytesIO(b"".join([*packed[:number], bad, *packed[number + 1:]])))]
    texts = [text for text in found if isinstance(text, str)]
    harmless = 3 < place < 9  # the time, the system: no checksum covers them
    if not harmless:
        assert texts == TEXTS[:number] + TEXTS[number + 1:]
        assert str(found[number]).startswith(f"byte {start:,}: a damaged gzip member")
    assert len(found) == len(texts) + (not harmless) or harmless


def test_a_wrong_checksum_is_a_damaged_member():
    packed = [*map(gzip.compress, RECORDS[:3])]
    packed[1] = packed[1][:-5] + bytes([packed[1][-5] ^ 1]) + packed[1][-4:]
    first, error, last = read(".wet", b"".join(packed))
    assert (first, last) == (TEXTS[0], TEXTS[2]) and "incorrect data check" in error


def test_a_damaged_member_that_seems_to_hold_the_next_ones_does_not_lose_them():
    packed = members(RECORDS)
    stored = b"\x1f\x8b\x08\0\0\0\0\0\0\3\0" + b"\xff\xff\0\0"  # a block of 65,535 stored bytes
    first, *texts = read(".wet", stored + packed)
    assert first.startswith("byte 0: a damaged gzip member") and texts == TEXTS


def test_members_that_overlap_are_not_unpacked_again_and_again(monkeypatch):
    class Counted(io.BytesIO):
        def read(self, n_bytes):
            self.n_read = getattr(self, "n_read", 0) + n_bytes
            return super().read(n_bytes)

    monkeypatch.setattr(warc, "PACKED_BYTES", 1000)
    # A member's stored block of ten bytes is the head of the next: each goes on to the file's end.
    file = Counted((warc.MEMBER + bytes(7) + b"\0\n\0\xf5\xff") * 5000)
    assert {*map(type, READERS[".wet"](file))} == {ValueError}
    assert file.n_read < 15 * len(file.getvalue())


@pytest.mark.parametrize("length", [0, 5, len(TEXTS[1]) - 1, len(TEXTS[1]) + 9, 10**6, 10**8,
                                    "-3", "x", "", "9" * 5000, "٣"])
@pytest.mark.parametrize("pack", [b"".join, members])
def test_a_record_whose_length_lies_is_counted_and_no_other_is_lost(length, pack):
    found = read(".wet", pack([RECORDS[0], record(TEXTS[1], length=length), *RECORDS[2:]]))
    assert found[:1] + found[2:] == [TEXTS[0], *TEXTS[2:]]
    assert found[1].startswith("record 2: ") and len(found[1]) < 150


@pytest.mark.parametrize("cut", [1, 20, 60, 61, 62, 500, len(RECORDS[2]) - 5])
def test_of_a_file_that_was_cut_off_the_whole_records_are_read(cut):
    *texts, error = read(".wet", b"".join(RECORDS[:2]) + RECORDS[2][:cut])
    assert texts == TEXTS[:2] and error.startswith("record 3: ")
    packed = gzip.compress(RECORDS[2])
    *texts, error = read(".wet", members(RECORDS[:2]) + packed[:min(cut, len(packed) - 1)])
    assert texts == TEXTS[:2] and "damaged gzip member" in error


def test_a_missing_end_of_the_last_record_loses_nothing():
    for end in b"", b"\r\n", b"\n\n":
        assert read(".wet", RECORDS[0] + record(TEXTS[1], end=end)) == TEXTS[:2]


def test_a_record_above_the_limit_is_passed_over_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(warc, "MAX_BYTES", 1000)
    long = [record("x" * 1001), record("y", length=10**17), record("z" * 1000)]
    assert read(".wet", b"".join(long)) == [
        "record 1: 1,001 bytes, more than 1,000",
        "record 2: 100,000,000,000,000,000 bytes, more than 1,000", "z" * 1000]
    tracemalloc.start()
    start = record("", length=10**12, end=b"")
    (error,) = warc.Records(Endless(start, b"x" * 10**5, 300))  # 30 MB
    assert str(error).startswith("record 1: ") and tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_page_comes_in_the_charset_that_its_server_declared():
    for charset in "utf-8", "iso-8859-1", '"windows-1252"', "cp850":
        body = PAGE.encode(charset.strip('"'))
        kind = f"text/html; Charset={charset}"
        assert read(".warc", response(body, kind=kind)) == [PAGE_TEXT]
    plain = response("Grüße", kind="TEXT/PLAIN;charset=utf-8")
    assert read(".warc", plain) == ["Grüße"]


def chunked(body, size):
    parts = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%X;x=y\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def raw_deflate(body):
    return zlib.compress(body)[2:-4]


@pytest.mark.parametrize("coding, pack", [("gzip", gzip.compress), ("deflate", zlib.compress),
                                          ("deflate", raw_deflate), ("", bytes),
                                          ("X-GZIP", gzip.compress), ("gzip", bytes)])
@pytest.mark.parametrize("size", [0, 1, 50, 10**6])
def test_a_body_is_unpacked_and_put_together(coding, pack, size):
    body, fields = pack(PAGE.encode()), [f"Content-Encoding: {coding}"]
    if size:
        body, fields = chunked(body, size), [*fields, "Transfer-Encoding: chunked"]
    assert read(".warc", response(body, *fields)) == [PAGE_TEXT]


def test_what_is_no_page_is_no_document():
    for kind in "image/png", "application/json", "":
        assert read(".warc", response("x", kind=kind)) == []
    assert read(".warc", response(PAGE, status="404 Not Found")) == []
    assert read(".warc", record("no HTTP", "response") + record(PAGE, "resource")) == []


@pytest.mark.parametrize("body, fields, problem", [
    (b"x", ["Content-Encoding: br"], "Content-Encoding br: can undo only gzip and deflate"),
    (b"x", ["Content-Encoding: gzip, gzip"], "Content-Encoding gzip, gzip: can undo"),
    (b"\xff\xff", ["Content-Encoding: deflate"], "Error -3"),
    (gzip.compress(PAGE.encode())[:-8] + bytes(8), ["Content-Encoding: gzip"], "Error -3"),
    (b"3\r\nabc\r\nxyz\r\n", ["Transfer-Encoding: chunked"], "no chunk begins at byte 6"),
    (gzip.compress(bytes(10**6)), ["Content-Encoding: gzip"], "unpacks to more than 90,000 bytes")])
def test_a_body_that_cannot_be_unpacked_is_a_broken_document(body, fields, problem, monkeypatch):
    monkeypatch.setattr(warc, "MAX_BYTES", 90_000)
    error, text = read(".warc", response(body, *fields) + response(PAGE))
    assert error.startswith("record 1: ") and problem in error and text == PAGE_TEXT


def test_a_page_that_the_crawler_cut_off_is_a_page():
    body = gzip.compress(PAGE.encode() + Random(0).randbytes(9000).hex().encode())[:1000]
    (text,) = read(".warc", response(body, "Content-Encoding: gzip"))
    assert text.startswith(PAGE_TEXT[:40])
    cut = chunked(PAGE.encode(), 50)[:-9]
    assert read(".warc", response(cut, "Transfer-Encoding: chunked"))[0].startswith(PAGE_TEXT[:40])


def test_warcio_reads_and_writes_the_same_records():
    pytest.importorskip("warcio")
    from warcio import ArchiveIterator, StatusAndHeaders, WARCWriter
    file = io.BytesIO()
    writer = WARCWriter(file, gzip=True)
    for text in TEXTS:
        head = StatusAndHeaders("200 OK", [("Content-Type", "text/plain")], protocol="HTTP/1.1")
        page = writer.create_warc_record("http://example.org/", "response", io.BytesIO(
            text.encode()), http_headers=head)
        writer.write_record(page)
        writer.write_record(writer.create_warc_record(
            "http://example.org/", "conversion", io.BytesIO(text.upper().encode())))
    content = file.getvalue()
    assert read(".warc", content) == TEXTS
    assert read(".wet", content) == [text.upper() for text in TEXTS]
    body = chunked(gzip.compress(PAGE.encode()), 20)
    for packed in members(RECORDS), members([response(
            body, "Content-Encoding: gzip", "Transfer-Encoding: chunked", kind="text/plain")]):
        theirs = [page.content_stream().read().decode()
                  for page in ArchiveIterator(io.BytesIO(packed))]
        assert theirs == read(".wet", packed) + read(".warc", packed)


@pytest.mark.parametrize("part", [
    record("x", length=60_000_000, end=b"\n"), record("x", length=10**9), b"WARC/1.0\r\n", b"\n",
    b"WARC/1.0\r\nContent-Length: 1\r\n\r\n", warc.MEMBER, gzip.compress(b""),
    gzip.compress(b"")[:10], gzip.compress(b"")[:10] + b"\0\xff\xff\0\0",
    gzip.compress(bytes(9999))])
def test_an_archive_of_nothing_but_openings_comes_to_an_end(part):
    content = part * (100_000 // len(part))
    for kind in ".wet", ".warc":
        for start in b"", RECORDS[0], gzip.compress(RECORDS[0]):
            assert len(read(kind, start + content)) <= 1 + len(content)


@pytest.mark.parametrize("body", [b"1\r\nx\r\n", b"1\r\n", b";", b"1;", b"1 ", b"\r\n", b"1;x\r\n"])
def test_a_body_of_nothing_but_openings_comes_to_an_end(body):
    fields = "Transfer-Encoding: chunked", "Content-Encoding: deflate"
    assert len(read(".warc", response(body * 30_000, *fields))) <= 1


# -----------------------------------------------------------------------------
# EPUB.

CONTAINER = '<container><rootfiles><rootfile full-path="{}"/></rootfiles></container>'


def book(pages, folder="OEBPS/", listed=None, doctype="", method=zipfile.ZIP_DEFLATED, more=()):
    """An EPUB of pages, {name: XHTML}, which are read in the order of `listed`."""
    items = "".join(f'<opf:item id="p{i}" href="{name}" media-type="application/xhtml+xml"/>'
                    for i, name in enumerate(pages))
    ids = [f"p{[*pages].index(name)}" for name in listed or pages]
    spine = "".join(f'<opf:itemref idref="{i}"/>' for i in ids)
    package = (f'{doctype}<opf:package xmlns:opf="http://www.idpf.org/2007/opf">'
               f"<opf:manifest>{items}</opf:manifest><opf:spine>{spine}</opf:spine></opf:package>")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("META-INF/container.xml", CONTAINER.format(f"{folder}book.opf"))
        archive.writestr(f"{folder}book.opf", package)
        for name, page in [*pages.items(), *more]:
            if page is not None:
                archive.writestr(folder * (not name.startswith("META")) + name, page)
    return file.getvalue()


def test_a_book_is_read_page_by_page_in_the_order_of_its_list():
    pages = {name: f"<html><head><title>Book</title></head><body><h1>{name}</h1><p>The end."
             for name in ("a.xhtml", "b.xhtml", "text/c d.xhtml")}
    found = read(".epub", book(pages, listed=["b.xhtml", "text/c d.xhtml", "a.xhtml"]))
    assert found == [f"{name}\nThe end." for name in ("b.xhtml", "text/c d.xhtml", "a.xhtml")]
    assert read(".epub", book({"a%20b.xhtml": None}, more=[("a b.xhtml", "x")], folder="")) == ["x"]


def test_a_page_that_is_missing_encrypted_or_outside_is_a_broken_document():
    locks = ('<encryption><x:CipherReference xmlns:x="x" URI="OEBPS/b.xhtml"/></encryption>')
    pages = {"a.xhtml": "first", "b.xhtml": "?", "c.xhtml": None, "../../etc/passwd": None,
             "e.xhtml": "last"}
    found = read(".epub", book(pages, more=[("META-INF/encryption.xml", locks)]))
    assert found[0] == "first" and found[-1] == "last" and found[1] == "OEBPS/b.xhtml: encrypted"
    assert found[2].startswith("OEBPS/c.xhtml: KeyError") and "../etc/passwd: Key" in found[3]


def test_a_page_above_the_limit_is_refused_also_when_the_zip_file_lies_about_it(monkeypatch):
    monkeypatch.setattr(formats.read_member, "__defaults__", (10_000,))
    content = book({"a.xhtml": "x" * 10_001, "b.xhtml": "fine"})
    assert read(".epub", content) == ["OEBPS/a.xhtml: more than 10,000 bytes", "fine"]
    lie = content.replace((10_001).to_bytes(4, "little"), (99).to_bytes(4, "little"))
    assert lie != content
    error, text = read(".epub", lie)
    assert error.startswith("OEBPS/a.xhtml: BadZipFile") and text == "fine"


def test_a_page_that_is_listed_many_times_is_read_once():
    assert read(".epub", book({"a.xhtml": "x"}, listed=["a.xhtml"] * 1000)) == ["x"]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize("content, problem", [
    (b"", "BadZipFile"), (b"x" * 1000, "BadZipFile"), (book({"a": "x"})[:-30], "BadZipFile"),
    (book({"a": "x"}, doctype=BOMB), "it has a DTD"), (book({"a": "x"}, doctype="<"), "ExpatError"),
    (book({"a": "x"}, method=zipfile.ZIP_LZMA), "packed by method 14"),
    (book({"a": "x"}).replace(b"container.xml", b"contained.xml"), "KeyError"),
    (book({"a": "x"}, doctype="<!--" + " " * (1 << 22) + "-->"), "more than 4,194,304 bytes")])
def test_what_is_no_book_is_one_clear_error(content, problem):
    (error,) = read(".epub", content)
    assert error.startswith("EPUB: ") and problem in error and len(error) < 250


def test_members_that_overlap_are_refused():
    content = book({"a.xhtml": "x" * 3000}, method=zipfile.ZIP_STORED)
    at = content.rindex(2 * (3000).to_bytes(4, "little"))  # packed and unpacked, in the directory
    lie = (len(content) + 1).to_bytes(4, "little")
    (error,) = read(".epub", content[:at] + lie + content[at + 4:])
    assert error == "EPUB: its members overlap: a zip bomb"


# -----------------------------------------------------------------------------
# Mail.


def mail(text, subject="Hello", html=None, cte=None, charset="utf-8", attachment=None):
    message = EmailMessage()
    message["From"], message["Subject"] = "a@example.org", subject
    if text is not None:
        message.set_content(text, cte=cte, charset=charset)
    if html is not None:
        (message.set_content if text is None else message.add_alternative)(html, subtype="html")
    if attachment:
        message.add_attachment(attachment, filename="notes.txt")
    return message


def mbox(messages, tmp_path):
    box = mailbox.mbox(tmp_path / "box")
    for message in messages:
        box.add(message)
    box.close()
    return (tmp_path / "box").read_bytes()


LETTER = "Dear all,\n\n> quoted = line\n\nFrom here on: Grüße\n\n-- \nA. B.\n"


@pytest.mark.parametrize("cte", ["8bit", "quoted-printable", "base64"])
@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1"])
def test_a_mail_is_its_subject_and_text_in_whatever_coding(cte, charset, tmp_path):
    first = mail(LETTER, "Grüße =", cte=cte, charset=charset)
    content = mbox([first, mail("second\n", cte="7bit", charset="us-ascii")], tmp_path)
    assert read(".mbox", content) == [f"Grüße =\n\n{LETTER.strip()}", "Hello\n\nsecond"]


def test_latin_1_in_a_mail_means_the_windows_charset():
    fields = "Subject: =?iso-8859-1?q?=93a=94?=\nContent-Type: text/plain; charset=iso-8859-1\n\n"
    content = f"From a Thu Jan  1 00:00:00 1970\n{fields}“mill” – é\n".encode("cp1252")
    assert read(".mbox", content) == ["“a”\n\n“mill” – é"]


def test_the_text_comes_before_the_page_and_attachments_are_left_out(tmp_path):
    both = mail("plain\n", html="<p>page</p>", attachment="not this")
    page = mail(None, html="<p>only a <b>page</b></p>", attachment="not this")
    empty = EmailMessage()
    empty.add_attachment(b"\x89PNG", maintype="image", subtype="png", filename="a.png")
    content = mbox([both, empty, page], tmp_path)
    assert read(".mbox", content) == ["Hello\n\nplain", "Hello\n\nonly a page"]


def test_mailbox_and_email_of_the_standard_library_find_the_same_texts(tmp_path):
    random = Random(0)
    words = ["From", ">", "=", "Grüße", "日本", "a", "--", "\n", "\n\n", "line\n"]
    messages = [mail(" ".join(random.choices(words, k=30)) + "\n", f"{i} ü") for i in range(40)]
    content = mbox(messages, tmp_path)
    theirs = [message_from_bytes(message.as_bytes(), policy=policy.default)
              for message in mailbox.mbox(tmp_path / "box")]
    assert len(theirs) == 40 and read(".mbox", content) == [
        f"{message['subject']}\n\n{message.get_body(['plain']).get_content()}".strip().replace(
            "\n>From ", "\nFrom ") for message in theirs]  # mailbox leaves the > that it wrote


def test_a_broken_mail_is_counted_and_the_next_one_is_read(monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 9000)
    monkeypatch.setattr(formats, "MAX_LINES", 2000)
    start = b"From x Thu Jan  1 00:00:00 1970\n"
    parts = b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n"
    nested = b"".join(parts % (i, i) for i in range(110))
    field = b"Content-Type: text/plain;" + b"\n ;" * 1500 + b"\n\nx"
    mails = [b"\n" + b"long" * 3000, b"\n" * 3000, nested, field, b"\nlast"]
    assert read(".mbox", b"".join(start + mail + b"\n\n" for mail in mails)) == [
        "mail 1: more than 9,000 bytes", "mail 2: more than 2,000 lines",
        "mail 3: more than 100 parts",
        "mail 4: a field Content-... of more than 2,000 characters", "last"]
    assert read(".mbox", start + b"\na\nFrom noon, 12:00, on\n") == ["a\nFrom noon, 12:00, on"]
    assert read(".mbox", b"no mail\n") == [
        "mail 1: this file is no mailbox, which begins with From SENDER TIME"]
    assert read(".mbox", b"") == []


@pytest.mark.parametrize("part", [
    "Content-Type: multipart/mixed; boundary=a\n\n--a\n", "Content-Type: message/rfc822\n\n",
    "=?a?q?", "Content-Type: text/plain;", ";", '"', "\n;", "=", "\n--a", "\n",
    "Subject: =?utf-8?q?", "From a 00:00\n\n", "\n\nFrom a 00:00", "boundary=",
    "Content-Type: text/html\n\n<"])
def test_a_mailbox_of_nothing_but_openings_comes_to_an_end(part):
    for start in "Subject: ", "Content-Type: multipart/mixed; boundary=a\n\n":
        n_parts = (10_000 if "From" in part else 100_000) // len(part)
        content = f"From a Thu Jan  1 00:00:00 1970\n{start}{part * n_parts}"
        assert len(read(".mbox", content.encode())) <= len(content)


# -----------------------------------------------------------------------------
# Captions.


def test_captions_become_lines_of_text():
    film = ("\ufeff1\n00:00:01,000 --> 00:00:02,500\n<i>It was</i>\nlate.\n\n"
            "2\n00:00:03,000 --> 00:00:04,000 X1:1\n{\\an8}42\n\n\n"
            "3\n01:00:03,000 --> 01:00:04,000\n\n4\n00:00:05,000 --> 00:00:06,000\n- 1 < 2 & so\n")
    for ends in "\n", "\r\n", "\r":
        for charset in "utf-8", "utf-16":
            content = film.replace("\n", ends).encode(charset)
            assert read(".srt", content) == ["It was late.\n42\n- 1 < 2 & so"]
    assert read(".srt", b"0:00.0 --> 0:01.0\nThe answer:\n42") == ["The answer: 42"]
    crowded = film.replace("\n\n", "\n").encode()
    assert read(".srt", crowded) == ["It was late.\n42\n- 1 < 2 & so"]


def test_what_webvtt_has_besides_is_left_out():
    film = ("WEBVTT - a film\n\nSTYLE\n::cue { color: red }\n\nNOTE by me\n\nintro\n"
            "00:01.000 --> 00:02.000 align:start\n<v Ann>One <00:01.500><c.x>two</c>\n\n"
            "NOTE\nmore\n\n2\n00:03.000 --> 00:04.000\nthree &amp; four\n")
    assert read(".vtt", film.encode()) == ["One two\nthree & four"]


def test_a_file_without_captions_is_a_broken_document(monkeypatch):
    assert "no line with the times" in read(".srt", b"a book\n")[0]
    monkeypatch.setattr(formats, "MAX_BYTES", 100)
    assert read(".srt", b"x" * 101) == ["captions: more than 100 bytes"]


@pytest.mark.parametrize("part", ["<", "{\\", "1", "\n", "\n1", " ", "0:00.0", "0:00.0 -->", "<1",
                                  "0:00.0-->\n", "\n ", "1\n", "&#1", "<a", "-->"])
def test_captions_of_nothing_but_openings_come_to_an_end(part):
    content = part * (100_000 // len(part))
    for start in "", "0:00.0 --> 0:01.0\n", "0:00.0 --> 0:01.0\nx\n":
        assert len(read(".srt", f"{start}{content}\n0:00.0 --> 0:01.0\nx".encode())) == 1


# -----------------------------------------------------------------------------
# PDF.


def pdf(*pages, trailer=""):
    """A PDF of pages with a line of text each; None stands for a page that cannot be read."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    parts = ["<</Type/Catalog/Pages 2 0 R>>",
             f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]/MediaBox[0 0 612 792]>>",
             "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"]
    for i, text in enumerate(pages):
        show = f"BT /F 12 Tf 72 720 Td ({text}) Tj ET"
        packed = "" if text is not None else "/Filter/NoSuchFilter"
        parts += [f"<</Type/Page/Parent 2 0 R/Resources<</Font<</F 3 0 R>>>>"
                  f"/Contents {5 + 2 * i} 0 R>>",
                  f"<</Length {len(show)}{packed}>>stream\n{show}\nendstream"]
    content, table = "%PDF-1.4\n", ""
    for number, part in enumerate(parts, 1):
        table += f"{len(content):010} 00000 n \n"
        content += f"{number} 0 obj\n{part}\nendobj\n"
    return (f"{content}xref\n0 {len(parts) + 1}\n0000000000 65535 f \n{table}trailer\n"
            f"<</Size {len(parts) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{len(content)}\n%%EOF"
            ).encode()


def test_the_pages_of_a_pdf_are_one_document_and_one_that_fails_is_named():
    assert read(".pdf", pdf("one", "two")) == ["one\ntwo\n"]
    error, text = read(".pdf", pdf("one", None, "three"))
    assert error.startswith("page 2: ") and text.split() == ["one", "three"]


def test_a_long_pdf_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(formats, "LONG_TEXT", 9)
    assert [text.split() for text in read(".pdf", pdf("a" * 9, "b", "c" * 10, "d"))] == [
        ["a" * 9], ["b", "c" * 10], ["d"]]


def test_a_pdf_that_cannot_be_read_is_one_clear_error(monkeypatch):
    locked = pdf("x", trailer="/Encrypt<</Filter/Standard/V 1/R 2/O(" + "o" * 32 + ")/U("
                 + "u" * 32 + ")/P -4>>/ID[(a)(a)]")
    assert read(".pdf", locked) == ["PDF: it is encrypted: save it without a password"]
    for content in b"", b"no PDF", pdf("x")[:100], b"%PDF-1.4\n" * 10_000:
        (error,) = read(".pdf", content)
        assert error.startswith("PDF: ")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert read(".pdf", pdf("x")) == ["PDF: to read it, pip install pypdf"]


# -----------------------------------------------------------------------------
# MediaWiki.

SITE = ('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de"><siteinfo>'
        '<namespaces><namespace key="6" case="first-letter">Datei</namespace><namespace key="14">'
        "Kategorie</namespace></namespaces></siteinfo>")


def wiki_page(text, title="T", ns=0, more="", model="wikitext"):
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return (f"<page><title>{title}</title><ns>{ns}</ns>{more}<revision><model>{model}</model>"
            f"<text>{text}</text></revision></page>\n")


def test_a_dump_gives_its_articles_and_nothing_else():
    dump = (SITE + wiki_page("Ein '''Hund'''.[[Datei:a.jpg|mini|x]] [[Kategorie:Hunde]]", "Hund")
            + wiki_page("talk", ns=1) + wiki_page("x", more='<redirect title="Hund"/>')
            + wiki_page("#REDIRECT [[Hund]]") + wiki_page("x = 1", model="javascript")
            + wiki_page("A < B & C", "Œ &amp; Ö") + wiki_page("") + "</mediawiki>")
    assert read(".xml", dump.encode()) == ["Hund\n\nEin Hund.", "Œ & Ö\n\nA < B & C"]


def test_of_a_page_with_a_history_the_last_revision_counts():
    page = wiki_page("old").replace("</page>", "<revision><text>new</text></revision></page>")
    assert read(".xml", (SITE + page).encode()) == ["T\n\nnew"]


def test_a_broken_page_of_a_dump_is_counted_and_the_next_one_is_read(monkeypatch):
    monkeypatch.setattr(wikitext, "PAGE_BYTES", 5000)
    monkeypatch.setattr(wikitext, "BLOCK_BYTES", 1000)
    pages = [wiki_page("one"), wiki_page("x").replace("</ns>", ""), wiki_page("long " * 2000),
             wiki_page("&").replace("&amp;", "&bomb;"), wiki_page("five"), wiki_page("cut")[:-20]]
    first, *errors, fifth, cut = read(".xml", (SITE + "".join(pages)).encode())
    assert (first, fifth) == ("T\n\none", "T\n\nfive")
    assert [error[:21] for error in [*errors, cut]] == [
        "page 2: broken XML (m", "page 3: more than 5,0", "page 4: broken XML (u",
        "page 6: cut off: the "]


def test_another_xml_file_is_one_clear_error_and_no_entity_is_expanded():
    for xml in b"", b"<html><page>x</page></html>", BOMB.encode() + b"<x>&b;</x>":
        assert read(".xml", xml) == ["not a dump of MediaWiki, which is the only XML that is read"]
    (error,) = read(".xml", (BOMB + SITE + wiki_page("&").replace("&amp;", "&b;")).encode())
    assert error.startswith("page 1: broken XML (undefined entity")
    (error,) = read(".xml", (SITE + wiki_page("&#" + "9" * 5000)).encode())
    assert error.startswith("page 1: Exceeds the limit (4300 digits)")


def test_a_dump_of_any_length_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(wikitext, "PAGE_BYTES", 10**6)
    tracemalloc.start()
    for block, kinds in ((wiki_page("x" * 1000).encode() * 100, {bytes}), (b"x" * 10**5, set()),
                         (b"<page>" + b"x" * 10**5, {ValueError})):
        blocks = iter(Endless(SITE.encode(), block, 300).read, b"")  # 30 MB
        assert {type(page) for page in wikitext.split_pages(blocks)} == kinds
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("markup, text", [
    ("'''''a''''' 'b'", "a 'b'"), ("== A ==\nb", "A\n\nb"), ("a\n----\nb", "a\nb"),
    ("== A ==\n=== B ===\n== C ==\nd", "C\n\nd"), ("== A ==\n=== B ===\nc", "A\n\nB\n\nc"),
    ("* a\n** b\n# c\n: d\n; e", "- a\n- b\n- c\nd\ne"), ("a[[category:b|c]]", "a"),
    ("[[a b]]s [[c|d]] [[:File:x]] [[e_f]]", "a bs d File:x e f"),
    ("[[fr:chien]]a [[Re:Zero]] [[fr:b|c]]", "a Re:Zero c"),
    ("[[File:a.jpg|thumb|see [[b]] {{c}} [http://x y]]]d", "d"),
    ("[http://a.b/c d e] [http://f] [//g h] [1]", "d e  h [1]"),
    ("a<ref>b</ref>c<ref name=d />e", "ace"), ("a<ref name=x/>b<ref>{{c}}</ref>d", "abd"),
    ("a<references><ref>b</ref></references>c<REF>d</Ref >e", "ace"), ("a<ref>b", "ab"),
    ("<!-- a -->b <!-- c", "b  c"), ("a {{b|{{c}}|[[d]]}} e", "a e"),
    ("a ({{b}}; born {{c}}) ({{d}}) f()", "a (born) f()"), ("{{nowrap|a b}} {{b=c}}", "a b"),
    ("{{lang|fr|mot}} {{lang-de|Wort}} {{convert|5|km|mi|abbr=on}}", "mot Wort 5 km"),
    ("a\n{|\n! b\n| c\n{|\n| d\n|}\n|}\ne", "a\n\ne"), ("{|\n| {{a\n|}}\n|}\nb", "b"),
    ("{{unclosed\n\na", "{{unclosed\n\na"), ("a}} ]] b", "a}} ]] b"), ("{| \n|a\nb", "b"),
    ("[[a {{b]] c}}", "[[a"), ("{{a [[b}}c", "c"), ("[[a|b", "[[a|b"),
    ("<math>\\frac{{a}}{b}</math>", "$\\frac{{a}}{b}$"),
    ("<nowiki>[[a]] '''</nowiki>", "[[a]] '''"), ("__TOC__ a__b", "a__b"),
    ("<syntaxhighlight lang=c>\nif (a)\n    b[[1]] = '';\n</syntaxhighlight>",
     "if (a)\n    b[[1]] = '';"),
    ("a<br/>b &ndash; &lt;c&gt; <span class=x>d</span>", "a\nb – <c> d"),
    ("x<sub>2</sub> 1 < 2 > 1", "x2 1 < 2 > 1"), ("(, a) f( )", "(, a) f( )"),
    ("{{nowrap|c=d|a}} [[" + "b" * 1001 + "]]", "a")])
def test_markup_becomes_the_text_that_a_reader_sees(markup, text):
    assert wikitext_to_text(markup) == text


MARKS = ["{{", "}}", "[[", "]]", "{|\n", "\n|}", "<ref>", "<ref", "<!--", "<math>", "=", "== a\n",
         "\n=a=", "'''", "[http://", "[http://x ", "[//", "(", ") (", "<a", "<a ", "__A", "&",
         "&#1", "{{a|", "[[a|", "{{lang|a|", "{{{{}}", "{{[[", "{|{{\n{|", "<ref></ref>", "\n*",
         "}}{{", "{{lang|fr|[[x]]}}", wikitext.GONE, f"({wikitext.GONE}", " ", "\n ", "|", "\n:",
         "<ref></ref "]


@pytest.mark.parametrize("mark", MARKS)
def test_markup_of_nothing_but_openings_comes_to_an_end(mark):
    text = mark * (100_000 // len(mark))
    for markup in f"({text}", f"\n{text}\n|}}}}}}]]":
        assert len(wikitext_to_text(markup)) <= len(markup) + 2


@pytest.mark.parametrize("opening, closing", [("{{", "}}"), ("[[", "]]"), ("{|\n", "\n|}"),
                                              ("{{lang|fr|", "}}"), ("[[{{", "}}]]")])
def test_markup_nested_without_end_takes_linear_time(opening, closing):
    text = opening * 30_000 + "x" * 30_000 + closing * 30_000
    assert len(wikitext_to_text(text)) <= len(text)


def test_random_markup_gives_no_error_and_no_character_for_private_use():
    random = Random(0)
    for _ in range(300):
        pieces = random.choices([*MARKS, "a", "b c", "\n", "</ref>", "</math>", "|}"], k=60)
        text = wikitext_to_text("".join(pieces).replace(wikitext.GONE, ""))
        assert not wikitext.HIDDEN.search(text) and wikitext.GONE not in text


# -----------------------------------------------------------------------------
# All kinds.


def test_the_examples_in_the_docstrings_are_true():
    assert formats.decode_subject("=?utf-8?q?caf=C3=A9?=") == "café"
    assert parse_fields(b"HTTP/1.1 200\r\nA: b") == {"a": "b"}
    assert join_chunks(b"2\r\nab\r\n0\r\n\r\n") == b"ab"
    assert wikitext.resolve_elements("a<ref>b</ref><math>c</math>") == "a$c$"
    assert wikitext.shown_template("convert|5|km|mi") == "5 km"
    assert wikitext.shown_link("dog|dogs", ()) == "dogs"
    assert wikitext.resolve_lines("== A ==\n=== B ===\n*c") == "A\n\nB\n\n- c"
    example = "'''Dogs''' [[bark|barked]].{{citation needed}}"
    assert wikitext_to_text(example) == "Dogs barked."


GOOD = {".epub": book({"a.xhtml": "<p>text</p>"}), ".pdf": pdf("text"), ".xml": (
            SITE + wiki_page("text")).encode(), ".wet": members(RECORDS[:3]), ".srt":
        b"1\n00:00:01,000 --> 00:00:02,500\ntext\n", ".warc": response(gzip.compress(
            PAGE.encode()), "Content-Encoding: gzip"),
        ".mbox": b"From a Thu Jan  1 00:00:00 1970\nSubject: =?utf-8?b?w7w=?=\n\ntext\n"}


@pytest.mark.parametrize("kind", GOOD)
def test_whatever_is_damaged_nothing_is_raised(kind):
    random, good = Random(0), GOOD[kind]
    assert documents(kind, good)
    for _ in range(100):
        bad = bytearray(good)
        for _ in range(random.randint(1, 5)):
            at = random.randrange(len(bad))
            bad[at:at + random.randint(0, 3)] = random.randbytes(random.randint(0, 3))
        found = [*READERS[kind](io.BytesIO(bytes(bad[:random.choice([None, len(bad) // 2])])))]
        assert all(isinstance(text, (str, ValueError)) for text in found)
