"""
Books, mail, captions and web archives to documents: a reader for each kind of file.

READERS[".epub"](file) takes an open binary file and yields its documents, str, in order; in place
of a broken one it yields a ValueError that says where and why, and goes on. Nothing is extracted to
disk, one document is in memory at a time, and none may have more than MAX_BYTES.

    .epub  a document for each page of a book         .srt .vtt  a line for each caption
    .mbox  a document for each mail                   .pdf       the text of all pages, by pypdf
    .xml   the articles of a dump of MediaWiki        .warc .wet a document for each web page
           (chapters/wikitext.py)                                (chapters/warc.py)
"""

import email
import html
import logging
import posixpath
import re
import zipfile
from email.header import decode_header
from urllib.parse import unquote
from xml.parsers import expat

from chapters.pages import decode_web, visible_text
from chapters.warc import MAX_BYTES, read_warc, read_wet
from chapters.wikitext import read_xml
from data import LONG_TEXT, decode


def attempt(place, read, *arguments):
    """read(*arguments), or a ValueError that says the place, whatever goes wrong."""
    try:
        return read(*arguments)
    except Exception as error:  # a damaged file can make a library raise anything
        reason = " ".join((str(error) if isinstance(error, ValueError) else repr(error)).split())
        return ValueError(f"{place}: {reason:.200}")


# -----------------------------------------------------------------------------
# EPUB: a zip file of web pages, with a list of the order in which to read them (EPUB 3.3).

MAX_LIST_BYTES = 1 << 22  # of the list of a book's pages
ENCRYPTION = "META-INF/encryption.xml"  # lists the members that are encrypted


def read_member(archive, name, limit=MAX_BYTES):
    """The bytes of a member of a zip file; ValueError for one of more bytes than `limit`."""
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"packed by method {member.compress_type}, which EPUB does not allow")
    with archive.open(member) as file:
        content = file.read(limit + 1)  # the length that the zip file states may be wrong
    if len(content) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return content


def find_elements(xml, *names):
    """(name, attributes) of each element of an XML file with one of the names; ValueError for a
    file with a DTD, which could declare entities that expand without end."""
    def refuse(*_):
        raise ValueError("it has a DTD, which no EPUB needs")

    def start(name, attributes):
        if (name := name.rpartition(":")[2]) in names:
            found.append((name, attributes))

    found, parser = [], expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.StartElementHandler = refuse, start
    parser.Parse(xml, True)
    return found


def open_book(file):
    """(zip file, names of the pages in the order of reading, names of those that are encrypted)."""
    archive = zipfile.ZipFile(file)
    if sum(member.compress_size for member in archive.infolist()) > file.seek(0, 2):
        raise ValueError("its members overlap: a zip bomb")
    container = read_member(archive, "META-INF/container.xml", MAX_LIST_BYTES)
    package = find_elements(container, "rootfile")[0][1]["full-path"]
    found = find_elements(read_member(archive, package, MAX_LIST_BYTES), "item", "itemref")
    items = {item["id"]: item for name, item in found if name == "item"}
    pages = [items[itemref["idref"]] for name, itemref in found if name == "itemref"]
    names = [posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(page["href"])))
             for page in pages if "html" in page.get("media-type", "html")
             and "nav" not in page.get("properties", "").split()]  # the table of contents
    listed = []
    if ENCRYPTION in archive.namelist():
        listed = find_elements(read_member(archive, ENCRYPTION, MAX_LIST_BYTES), "CipherReference")
    encrypted = {unquote(item.get("URI", "")) for _, item in listed}
    return archive, dict.fromkeys(names), encrypted  # a page that is listed twice is read once


def book_page(archive, name, encrypted):
    """The text of a page of a book, without its <title>: it repeats the heading of the chapter."""
    if name in encrypted:
        raise ValueError("encrypted")
    page, _, title = read_member(archive, name).partition(b"<title>")
    return visible_text(page + title[max(0, title.find(b"</title>")):]).strip()


def read_epub(file):
    """Yield the text of each page of a book, which most often is a chapter."""
    book = attempt("EPUB", open_book, file)
    if isinstance(book, ValueError):
        yield book
        return
    archive, names, encrypted = book
    for name in names:
        if text := attempt(name, book_page, archive, name, encrypted):
            yield text


# -----------------------------------------------------------------------------
# Mail: a line "From SENDER TIME" before each (RFC 4155), text in MIME parts (RFC 2045).

MAIL_START = re.compile(rb"From \S.*\d\d:\d\d")
QUOTED_START = re.compile(rb">+From ")  # how a mailbox writes a line "From ..." of a mail
MAIL_TEXTS = {"text/plain": decode_web, "text/html": visible_text}  # the better one first
LINE_BYTES = 1 << 16  # read at a time
MAX_LINES = 1_000_000  # of a mail: Python's parser needs memory for each line,
MAX_PARTS = 100  # time that grows with the square of the number of parts,
MAX_FIELD = 2000  # and with the square of the length of a Content-Type, in characters
LONG_FIELD = re.compile(rb"(?im)^content-[a-z]+:(?:[^\n]|\n[ \t]){%d}" % MAX_FIELD)


def split_mbox(file):
    """Yield the bytes of each mail of a mailbox, of a long one a little more than MAX_BYTES. A file
    that is no mailbox yields None alone."""
    mail, before = None, b"\n"
    for line in iter(lambda: file.readline(LINE_BYTES), b""):
        if before in (b"\n", b"\r\n") and MAIL_START.match(line):
            if mail is not None:
                yield mail
            mail = bytearray()
        elif mail is None:
            yield None
            return
        elif len(mail) <= MAX_BYTES:
            mail += line[1:] if line[:1] == b">" and QUOTED_START.match(line) else line
        before = line
    if mail is not None:
        yield mail


def decode_subject(field):
    """The subject of a mail: decode_subject("=?utf-8?q?caf=C3=A9?=") == "café"."""
    return "".join(word if isinstance(word, str) else decode_web(word, charset)
                   for word, charset in decode_header(str(field)[:MAX_FIELD]))


def mail_text(mail):
    """The subject of a mail and its text/plain parts, or else those in HTML; "" without either."""
    if mail is None:
        raise ValueError("this file is no mailbox, which begins with From SENDER TIME")
    n_parts = len(re.findall(rb"(?i)boundary\s{0,9}=|message/", mail))
    for n, limit, unit in ((len(mail), MAX_BYTES, "bytes"), (mail.count(b"\n"), MAX_LINES, "lines"),
                           (n_parts, MAX_PARTS, "parts")):
        if n > limit:
            raise ValueError(f"more than {limit:,} {unit}")
    if LONG_FIELD.search(mail):
        raise ValueError(f"a field Content-... of more than {MAX_FIELD:,} characters")
    message = email.message_from_bytes(mail)
    parts = [part for part in message.walk() if part.get_content_disposition() != "attachment"
             and not part.get_filename()]
    for kind, to_text in MAIL_TEXTS.items():
        texts = [to_text(part.get_payload(decode=True), part.get_content_charset())
                 for part in parts if part.get_content_type() == kind]
        if texts:
            return "\n\n".join([decode_subject(message.get("subject", "")), *texts]).strip()
    return ""


def read_mbox(file):
    """Yield the text of each mail of a mailbox, quoted lines and signature included."""
    for number, mail in enumerate(split_mbox(file), 1):
        if text := attempt(f"mail {number:,}", mail_text, mail):
            yield text


# -----------------------------------------------------------------------------
# Captions: SubRip's .srt and WebVTT's .vtt. Each caption is a line of times, then lines to show.

TIMES = re.compile(r"(?m)^[ \t]*+(?:\d{1,4}:)?\d{1,4}:\d\d[.,]\d{1,3}[ \t]*+-->.*\n?")
CAPTION_TAG = re.compile(r"</?[a-zA-Z][^<>\n]*+>|<[\d:.]++>|\{\\[^{}\n]*+\}")


def captions_text(raw):
    """The captions of a film, a line each, without numbers, times, tags and comments."""
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    text = decode(raw).replace("\r\n", "\n").replace("\r", "\n")
    _, *parts = TIMES.split(text)
    if not parts:
        raise ValueError("no line with the times of a caption, 00:00:01,000 --> 00:00:02,000")
    captions = []
    for part in parts:  # a caption ends at an empty line, or at the number of the next one
        caption = re.split(r"\n[ \t]*\n", f"\n{part}", maxsplit=1)[0]
        caption = caption if part is parts[-1] else re.sub(r"\n\d+\n?\Z", "", caption)
        captions.append(" ".join(CAPTION_TAG.sub("", caption).split()))
    return html.unescape("\n".join(filter(None, captions)))


def read_captions(file):
    """Yield the one document of a file of captions."""
    if text := attempt("captions", captions_text, file.read(MAX_BYTES + 1)):
        yield text


# -----------------------------------------------------------------------------
# PDF.


def pdf_pages(file):
    """The pages of a PDF; ValueError without pypdf, and for a PDF that is encrypted."""
    try:
        import pypdf
    except ImportError:
        raise ValueError("to read it, pip install pypdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # no warnings of what it repairs
    reader = pypdf.PdfReader(file)
    if reader.is_encrypted:
        raise ValueError("it is encrypted: save it without a password")
    return [*reader.pages]


def read_pdf(file):
    """Yield the text of a PDF, in parts if it is longer than LONG_TEXT, and a ValueError for each
    page that cannot be read."""
    pages = attempt("PDF", pdf_pages, file)
    if isinstance(pages, ValueError):
        yield pages
        return
    text = ""
    for number, page in enumerate(pages, 1):
        part = attempt(f"page {number:,}", page.extract_text)
        if isinstance(part, ValueError):
            yield part
            continue
        text += part + "\n"
        if len(text) > LONG_TEXT:
            yield text
            text = ""
    if text.strip():
        yield text


READERS = {".epub": read_epub, ".mbox": read_mbox, ".srt": read_captions, ".vtt": read_captions,
           ".pdf": read_pdf, ".xml": read_xml, ".warc": read_warc, ".wet": read_wet}
RAW = {".warc.gz", ".wet.gz"}  # endings of packed files that their reader unpacks itself
