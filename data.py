"""
Documents to batches: read, clean, drop duplicates, split, tokenize, write shards, read them back.

    python data.py                               # Python's own standard library, no network needed
    python data.py book.txt notes/ "more/*.csv" https://example.org/book.txt --out=shards/mine
    python data.py shakespeare                   # or tinystories, wikitext, fineweb10B
    zcat rows.jsonl.gz | python data.py - --field=body

A source is a name, a file, a folder, a pattern, a URL, - for standard input, or a folder of ready
shards. A file is .txt .md .rst, a program, .json .jsonl .csv .tsv (field "text", or --field), also
as .gz .bz2 .xz .zst; in text <|endoftext|> may stand between documents. JSON rows with messages,
with instruction and output, or with text and label are chats, which are never cut. The result,
never changed, and used again for the same content and options: tokenizer.json, train_000000.bin
..., val_000000.bin ... and card.json, which says what went in and what was lost.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import ast
import codecs
import contextlib
import csv
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import zipfile
from bisect import bisect_left, insort
from collections import ChainMap, Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from tokenizer import (QUIET, SPECIAL_TOKENS, Parser, Tokenizer, check_fields, read_json, reading,
                       refuse_idle, replacing, room_for_merges, run_command, write_json)

SEPARATOR = "<|endoftext|>"  # between the documents of a text file
LONG_TEXT = 1 << 21  # characters; a longer text is read as several documents
CHATS = {"messages": "messages", "output": "instruction", "label": "text"}  # a row with both is one
LARGE = 1 << 25  # characters or bytes: of a JSON value or a row, and to find out an encoding
GROUP_BYTES = 1 << 23  # text tokenized at a time: the ids of a large corpus must not fill memory
LEARN_BYTES = 200_000_000  # a tokenizer learns from a sample of this size: more changes little
TIMEOUT, WAITS = 30, (1, 4, 16)  # seconds: without a byte; before a download is tried again
HASHES = ".hashes.json"  # in a folder of shards; without it the next start hashes all files again
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "compression.zstd"}  # and modules
PROGRAMS = ".py .c .h .cpp .cs .go .java .js .jl .kt .lua .php .pl .r .rb .rs .sh .sql .swift .ts"
PAGES = ".html .htm .xhtml .xht .shtml".split()
HEAVY = [*PAGES, *".epub .xml .mbox .srt .vtt .pdf .warc .wet".split()]
CURATE = "python -m chapters.curate FILE --out=FOLDER makes text of it"
KINDS = "only .txt .md .rst .json .jsonl .csv .tsv and programs as .py, each also packed as .gz"

# Texts to download, each pinned to one revision: URL and sha256.
HUB = "https://huggingface.co/datasets/"
KNOWN = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/"
                    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tinystories": (HUB + "roneneldan/TinyStories/resolve/"
                    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-train.txt",
                    "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "wikitext": (HUB + "ggml-org/ci/resolve/"
                 "927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
                 "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11")}
FINEWEB = HUB + "kjj0/fineweb10B-gpt2/resolve/main/fineweb_"  # ready shards, behind these words
NAMES = ["stdlib", *KNOWN, "fineweb10B"]
LICENSES = dict(zip(NAMES, "PSF-2.0 none CDLA-Sharing-1.0 CC-BY-SA-3.0 ODC-By-1.0".split()))

# -----------------------------------------------------------------------------
# Encodings: UTF-8, or what a file says of itself, or what it looks like.

# The most frequent characters beyond ASCII. Those of Latin scripts stand alone among ASCII letters.
HAN = ("的一是不了在人有我他大中上来來个個这這们們为為和国國到地说說要就出也你对對生能而子那得于於着著下自之年过過"
       "发發后後作里裡用道行所然家种種事成方多经經么麼去法学學如都同现現当當没动動面起看定天分还還进進好小部，。")
FREQUENT = {
    "cp1252": "éèêëàâäáãåæçíìîïñóòôöõøúùûüß¡¿", "cp1254": "ışğçöüİâî",
    "cp1257": "āčēģīķļņšūžąęėįųõäöüŠ", "cp1250 iso8859-2": "ąćęłńóśźżáčďěéíňřšťúůýžőűöüăâîşţ",
    "cp1258": "ăâđêôơưàáãèéìíòóùú\u0300\u0301\u0303\u0309\u0323",
    "cp1251 koi8-r cp866 iso8859-5": "оеаинтсрвлкмдпуяыі", "cp1253": "αοιετσνηυρπκμςάίό",
    "cp1255": "יוהלאמשרבתנ", "cp1256": "اليمونرتبةعدسف",
    "cp874": "านรอกเงลยมดวทสะใ\u0e31\u0e35\u0e48\u0e49", "gb18030": HAN, "big5": HAN,
    "cp932 euc_jp": "ぁ-ん、。", "cp949": "이다는을의에가고지도로하은사를기한시인나어아서자리대있그들과만보"}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",  # of byte order
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# What an HTML, XML or Python file says of itself.
DECLARED = re.compile(rb"(?i)(?:charset|coding) *[=:] *[\"']?(?!utf-?[13])([-\w.]+)")


def count_others(text):
    """How many characters of a text are beyond ASCII."""
    return len(text) - len(text.encode("ascii", "ignore"))


def decoded(raw, encoding):
    """The text of bytes, of a text or of its start; None if they are not of this encoding."""
    with contextlib.suppress(LookupError, UnicodeError):
        "".encode(encoding)  # a LookupError for what is no encoding of text
        return codecs.getincrementaldecoder(encoding)().decode(raw, len(raw) < LARGE)


def detect(raw, declared=None):
    """The encoding of a text by its first bytes: by a byte order mark, UTF-8 if it is that, as
    `declared` or as it says itself, or the one with the most frequent letters; else UTF-8."""
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            return encoding
    if b"\0" in raw[:8192]:  # in UTF-16 an ASCII character has one byte that is 0
        even, odd = [raw[i:8192:2].count(0) / len(raw[:8192]) for i in (0, 1)]
        if max(even, odd) < 0.25 or min(even, odd) > 0.01:
            raise ValueError("a binary file, not text")
        return "utf-16-be" if even > odd else "utf-16-le"
    found, text = DECLARED.search(raw[:1024]), raw.decode("utf-8", "replace")
    declared = declared or (found[1].decode() if found else "utf-8-sig")
    if not raw.isascii() and text.count("\ufffd") < count_others(text) / 2:
        return "utf-8-sig"
    if decoded(raw, declared):
        return declared
    best, share = "utf-8-sig", 0.5
    for encodings, letters in FREQUENT.items():
        pattern = f"[{letters}\u2013-\u2026«»]"  # and dashes, quotation marks, the ellipsis
        if letters < "\u0250":
            pattern = f"(?<![^\0-\x7f]{{2}}){pattern}(?![^\0-\x7f]{{2}})"
        for encoding in encodings.split():
            text = decoded(raw, encoding) or ""
            new = len(re.findall(pattern, text)) / max(1, count_others(text))
            new *= 1 + (letters > "\u2e80")  # of thousands of characters half a share says as much
            if new > share:
                best, share = encoding, new
    return best


def as_text(file, encoding=None, declared=None):
    """A binary file as one of text; what is not of its encoding as lone surrogates or U+FFFD."""
    encoding = encoding or detect(file.read(LARGE), declared)
    file.seek(0)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return io.TextIOWrapper(file, encoding, errors, newline="")


def decode(raw, declared=None):
    """The text of bytes in whatever encoding they are; ValueError for what is binary."""
    return as_text(io.BytesIO(raw), None, declared).read()


# -----------------------------------------------------------------------------
# Reading and cleaning: a file becomes documents, one str each, in one spelling.


def read_text(file, path):
    """Yield the documents of a text, one or many; parts of those longer than LONG_TEXT."""
    if path.parts[-2:] == ("pydoc_data", "topics.py"):  # a big dict, whose values are prose
        yield from ast.literal_eval(ast.parse(file.read()).body[0].value).values()
    rest = ""
    while block := file.read(LONG_TEXT):
        *texts, rest = (rest + block).split(SEPARATOR)
        yield from texts
        if len(rest) >= LONG_TEXT:  # so that a file of any size fits into memory
            end = rest.rfind("\n") + 1 or len(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest.strip():  # most files end with a separator or a line end, not with a document
        yield rest


def read_lines(file, path):
    """The value in each line that is not empty; next() fails for a broken one, and then goes on."""
    return map(json.loads, filter(str.strip, iter(lambda: file.readline(LARGE), "")))


def read_list(file, path):
    """The values of a list, or a single one; of a JSON Lines file by this name, its lines."""
    text = file.read(LARGE + 1)
    if len(text) > LARGE:
        raise ValueError(f"{path} has more than {LARGE:,} characters: write a value a line, .jsonl")
    try:
        value = json.loads(text)
    except ValueError:
        return read_lines(io.StringIO(text), path)
    return value if isinstance(value, list) else [value]


def read_table(file, path):
    """Each row as a dict, by the names in the first line; next() as in read_lines."""
    def whole(row):
        if any(row.pop(None, ())):
            raise ValueError("too many values: quote the texts")
        return row
    csv.field_size_limit(LARGE)
    names = file.readline(LARGE)  # between them is what is between the values
    rows = itertools.chain([names], file)
    return map(whole, csv.DictReader(rows, delimiter=max(",;\t|", key=names.count)))


BYTES = Tokenizer([])  # its render_chat says what is wrong with a chat
READERS = {".json": read_list, ".jsonl": read_lines, ".csv": read_table, ".tsv": read_table,
           **dict.fromkeys([".txt", ".md", ".rst", *PROGRAMS.split()], read_text)}


def ending(path):
    """What says how a file is read: ending("notes.TXT.gz") == ".txt"."""
    path = Path(Path(path).name.lower())
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def is_readable(path):
    """Whether a path is a regular file, or a link to one, that the user may read."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


def open_packed(path):
    """Open a file to read its bytes, unpacked by what its name ends in."""
    return importlib.import_module(PACKED.get(path.suffix.lower(), "builtins")).open(path, "rb")


def read_rows(path, take, encoding=None, skip=None):
    """Yield take(row) for the rows of one file, plain or packed: texts, or values of JSON or CSV.
    skip(reason) is told of each broken one; without it, and for other files, a ValueError."""
    path, kind = Path(path), ending(path)
    if not is_readable(path):
        raise ValueError(f"{path}: no such file, or one that you may not read, or a pipe")
    if kind not in READERS:
        raise ValueError(f"{path}: cannot read {kind or 'a name without an ending'}: "
                         f"{CURATE if kind in HEAVY else KINDS}")
    with reading(path), open_packed(path) as file:
        rows = iter(READERS[kind](as_text(file, encoding), path))
        for number in itertools.count(1):
            try:
                yield take(next(rows))
            except StopIteration:
                return
            except (ValueError, RecursionError, csv.Error) as error:
                if not skip:
                    raise ValueError(f"{path}, row {number}: {error}") from None
                skip(f"{path}, row {number}: {error}")


def take_text(row, field="text"):
    """The text in a field of a row, or that is the row; ValueError where there is none."""
    text = row.get(field) if isinstance(row, dict) else row
    if isinstance(text, str):
        return text
    raise ValueError(f"no text in field {field!r} of {row!r:.60}: --field=NAME names another")


def read_documents(path, field="text", encoding=None, skip=None):
    """Yield the documents of one file, as read_rows does; of JSON and CSV the texts in a field."""
    return read_rows(path, partial(take_text, field=field), encoding, skip)


def chat_kind(row):
    """Which of CHATS a row is, or "" if none: chat_kind({"text": "Hi", "label": 1}) == "label"."""
    names = {*row} if isinstance(row, dict) else set()
    return next((kind for kind, asks in CHATS.items() if {kind, asks} <= names), "")


def take_chat(row):
    """The messages of a row, which render_chat takes; ValueError for a row that has none."""
    if not (kind := chat_kind(row)):
        raise ValueError("neither messages, nor instruction and output, nor text and label")
    if kind == "messages":
        messages = row[kind]
    else:
        asks, says = row[CHATS[kind]], row[kind]
        if kind == "label" and (says == "" or not isinstance(says, str | int)):
            raise ValueError(f"label {says!r:.40} must be a text or a whole number")
        if kind == "output" and row.get("input") and isinstance(asks, str):
            asks += f"\n\n{row['input']}"
        messages = [dict(role="user", content=asks), dict(
            role="assistant", content=str(says) if isinstance(says, int) else says)]
    BYTES.render_chat(messages)  # a ValueError where turns are wrong
    return messages


def read_chats(path, skip=None):
    """Yield the messages of each row of a .jsonl or .json file; skip(reason) as in read_rows."""
    return read_rows(path, take_chat, skip=skip)


LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# What steers a terminal (ECMA-48): colors and such, strings, short ones; none within another.
ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*+[ -/]*+[@-~]?"
                     r"|(?:\x1b[]PX^_k]|[\x90\x98\x9d-\x9f])[^\n\x07\x1b\x90\x98\x9c-\x9f]*+"
                     r"(?:\x07|\x1b\\|\x9c)|\x1b[ -/]{0,2}+[0-~]?")
OVERSTRUCK = re.compile(r"[^\n\x08]\x08+")  # man pages print N\bN for a bold N, _\bN underlined
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but \t and \n


def clean(text, counts=None):
    """One spelling for the same text, in NFC: clean("a\\r\\n  b \\n") == "a\\n  b". No control
    characters, spaces at line ends, third blank lines in a row; counts gets what is lost."""
    counts = Counter() if counts is None else counts
    text = LINE_ENDS.sub("\n", text)
    counts["control characters"] += len(text)
    if CONTROLS.search(text):  # most texts have none
        text = CONTROLS.sub("", OVERSTRUCK.sub("", ESCAPES.sub("", text)))
    counts["control characters"] -= len(text)
    if not text.isascii():
        text = re.sub("[\ud800-\udfff]", "\ufffd", text).replace("\ufeff", "")  # of joined files
        text = unicodedata.normalize("NFC", text)
        counts["replaced bytes"] += text.count("\ufffd")
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def text_hash(text):
    """The sha256 of a text, as bytes."""
    return hashlib.sha256(text.encode()).digest()


def exact_duplicates(texts):
    """The positions of texts that occurred before: exact_duplicates(["a", "b", "a"]) == [2]."""
    first = {}
    return [i for i, text in enumerate(texts) if first.setdefault(text_hash(text), i) != i]


# -----------------------------------------------------------------------------
# Sources: a name, a file, a folder or a URL becomes a list of files.


def folder_name(source):
    """What to call the shards of a source: folder_name("texts/My book.txt.gz") == "My-book"."""
    path = urlsplit(source).path if "://" in source else Path(source).absolute()
    return re.sub(r"[^\w-]+", "-", Path(path).name.split(".")[0]).strip("-")[:80] or "text"


def known_hashes(*folders):
    """What folders of shards remember of hashed files, {stamp: sha256}; maps[0] takes new ones."""
    known = ChainMap()
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, TypeError):  # then they are hashed again
            known.maps.append(dict(read_json(Path(folder, HASHES))))
    return known


def file_hash(path, known=None):
    """The sha256 of a file's content, in hex. A file whose inode, size and time of change are
    `known`, {stamp: sha256}, is not read: as rsync does, we take it to be unchanged."""
    known, stat = {} if known is None else known, os.stat(path)
    stamp = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
    if stamp not in known:
        with open(path, "rb") as file:
            known[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[stamp]


def fetch(url, part, is_page):
    """Add to a file what it lacks of a URL's content; OSError or HTTPException if it still does."""
    with open(part, "a+b") as file:
        n_done = file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        end = file.read()  # asked for once more: the content may have changed since
        request = Request(url, headers={"User-Agent": "data.py", "Range": f"bytes={n_done}-"})
        with urlopen(request, timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == "text/html" and not is_page:
                raise ValueError(f"{url} is a web page, not text; {CURATE}")
            if response.status != 206:  # this server sends all of it
                n_done, end = file.truncate(0), b""
            elif response.read(len(end)) != end:
                file.truncate(0)
                raise OSError("its content has changed")
            n_bytes = n_done + int(response.headers.get("Content-Length") or 0)
            bar = dict(desc=part.stem, total=n_bytes, initial=n_done + len(end), **QUIET)
            with tqdm.wrapattr(file, "write", **bar) as counted:
                shutil.copyfileobj(response, counted)
            if n_bytes > n_done and file.tell() != n_bytes:
                raise OSError(f"cut off at {file.tell():,} of {n_bytes:,} bytes")


def download(url, path, sha256=None):
    """Fetch url to path, unless it is there; what was cut off continues where it stopped. Raises
    ValueError without a connection, for a page unless path is one, for a wrong sha256."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    tries = size = 0
    try:
        while True:
            try:
                fetch(quote(url, "!#$%&'()*+,/:;=?@[]~"), part, ending(path) in HEAVY)
                break
            except (OSError, HTTPException) as error:  # a URLError without a code: no such server
                code, lasts = getattr(error, "code", 0), isinstance(error, URLError)
                grown = part.stat().st_size > size
                tries, size = 0 if grown else tries + 1, max(size, part.stat().st_size)
                if tries > len(WAITS) or lasts and code not in (416, 429, 500, 502, 503, 504):
                    reason = " ".join(str(error).split())
                    raise ValueError(f"{url}: {reason}; start again to go on, or take stdlib")
                if code == 416:  # the file was longer once
                    os.truncate(part, 0)
                time.sleep(WAITS[max(0, tries - 1)])
        if sha256 not in (None, file_hash(part)):
            os.truncate(part, 0)
            raise ValueError(f"{url} has not the expected sha256 {sha256}: removed")
        return part.replace(path)
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def walk(folder, skip=("card.json", "card.html"), seen=None):
    """Yield the files below a folder, in a fixed order, without hidden and `skip` ones. Links to
    folders are followed, but none to one that was read or lies around this one."""
    seen = {*folder.resolve().parents} if seen is None else seen
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or path.name in skip:
            continue
        if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
            yield path  # what cannot be read is named by whoever tries
        elif path.resolve() not in seen:
            yield from walk(path, skip, seen)


def is_ready(source):
    """Whether a source is, or names, shards of others; ValueError for ones with a tokenizer."""
    found = any(Path(source).glob("*train*.bin"))
    if found and any(Path(source, name).exists() for name in ("meta.pkl", "card.json")):
        raise ValueError(f"{source}: its shards have a tokenizer of their own; give the text")
    return found or source == "fineweb10B"


def find_files(source, downloads, n_shards=1):
    """The files of one source, in a fixed order. Raises ValueError where there is none."""
    path = Path(source)
    if source == "stdlib":  # without encodings, whose tables teach a small model to write tables
        skip = "test tests idle_test site-packages dist-packages encodings".split()
        return [path for path in walk(Path(os.__file__).parent, skip) if path.suffix == ".py"]
    if source == "fineweb10B":
        names = ["val_000000.bin"] + [f"train_{i:06d}.bin" for i in range(1, n_shards + 1)]
        return [download(FINEWEB + name, downloads / source / name) for name in names]
    if source == "-":
        if not sys.stdin:
            raise ValueError("-: standard input is closed; pipe the text in, or give a file")
        kind = "jsonl" if re.match(rb"(?:\xef\xbb\xbf)?\s*{", sys.stdin.buffer.peek(1)) else "txt"
        part = downloads / f"stdin-{os.getpid()}"  # two commands at once must not share a file
        with replacing(part) as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return [part.replace(downloads / f"{file_hash(part)[:8]}-stdin.{kind}")]
    if re.match("https?://", source):
        name = re.sub(r"[^\w.-]+", "-", Path(urlsplit(source).path).name)[-80:]
        name += "" if ending(name) in (*READERS, *HEAVY) else ".txt"
        return [download(source, downloads / f"{text_hash(source).hex()[:8]}-{name}")]
    if source in KNOWN:
        url, sha256 = KNOWN[source]
        path = download(url, downloads / (source + Path(url).suffix), sha256)
        text = path.with_suffix(".txt")
        if not text.exists():  # WikiText is one text: only a heading shows where an article starts
            with zipfile.ZipFile(path) as archive, replacing(text) as file:
                articles = archive.read("wikitext-2-raw/wiki.train.raw")
                file.write(re.sub(rb"(?m)^(?= = [^=\n][^\n]* = $)", SEPARATOR.encode(), articles))
        return [text]
    if is_ready(source):
        return sorted(path.glob("*.bin"))
    paths = [path] if path.exists() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not paths:
        raise ValueError(f"{source}: no such file or folder, and not one of {', '.join(NAMES)}")
    return [file for path in paths for file in (walk(path) if path.is_dir() else [path])]


# -----------------------------------------------------------------------------
# Shards, in llm.c's format: 256 int32 (magic, version, number of tokens, zeros), then the tokens.

HEADER_BYTES = 1024
FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): type of a token


def write_shards(arrays, folder, split, n_vocab, shard_tokens=10**8):
    """Write arrays of ids, whole ones to about shard_tokens a file."""
    version, dtype = list(FORMATS.items())[n_vocab > 2**16]
    arrays = (ids for ids in map(np.asarray, arrays) if len(ids))
    for i, first in enumerate(arrays):
        with replacing(Path(folder, f"{split}_{i:06d}.bin")) as file:
            file.write(bytes(HEADER_BYTES))
            n_tokens = 0
            for ids in itertools.chain([first], arrays):
                if ids.max() >= n_vocab:
                    raise ValueError(f"token id {ids.max()} is not in the vocabulary of {n_vocab}")
                file.write(ids.astype(dtype).tobytes())
                n_tokens += len(ids)
                if n_tokens >= shard_tokens:
                    break
            file.seek(0)
            file.write(np.array([*version, n_tokens], "<i4").tobytes())


def read_shard(path):
    """The tokens of a shard as a memory map. Raises ValueError for a foreign or damaged file."""
    if Path(path).name in ("train.bin", "val.bin"):  # nanoGPT's have no header
        return np.memmap(path, "<u2", "r")
    magic, version, n_tokens, *_ = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0]
    if (magic, version) not in FORMATS:
        raise ValueError(f"{path}: not a token shard (magic {magic}, version {version})")
    dtype = np.dtype(FORMATS[magic, version])
    if n_tokens < 1 or os.path.getsize(path) != HEADER_BYTES + n_tokens * dtype.itemsize:
        raise ValueError(f"{path} is damaged, of another size than it says: delete it, run data.py")
    return np.memmap(path, dtype, "r", HEADER_BYTES, n_tokens)


def read_split(folder, split="train"):
    """All tokens of a split, as a list of memory maps in order."""
    paths = sorted(Path(folder).glob(f"{split}_??????.bin"))
    if not paths:
        raise ValueError(f"{folder}: no {split} shards; data.py SOURCE --out={folder} writes them")
    return [read_shard(path) for path in paths]


@dataclass(frozen=True)
class Card:
    """What card.json says of a folder of shards."""
    fingerprint: str  # the sha256 of content and options
    sources: list     # of {"name", "license", "files", "skipped": [place and reason], "curated"}
    python: str       # the version, which decides what stdlib is
    options: dict     # of prepare()
    counts: dict      # documents and bytes, and what was lost
    split: str        # in words, what decides which documents validate
    train: dict       # {"documents", "bytes", "tokens"}
    val: dict
    tokenizer: str    # its hash()
    vocab_size: int
    checksums: dict   # {file name: sha256}
    date: str = ""    # of the day it was made
    labels: list = field(default_factory=list)  # sorted, where rows are text and label

    def __post_init__(self):
        counts = [split.get(n) for split in (self.train, self.val) for n in ("tokens", "bytes")]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("train and val must have tokens and bytes, whole numbers above 0")


def read_card(folder):
    """The Card of a folder of shards; ValueError that names the field that is wrong."""
    path = Path(folder, "card.json")
    return check_fields(Card, read_json(path), path)


def check_shards(folder, splits=("train", "val"), known=None):
    """The Card of a folder of shards; ValueError unless these splits are as they were written. All
    tokens are read, unless they are `known`, of known_hashes(), which the folder then remembers."""
    card = read_card(folder)
    names = {path.name for path in Path(folder).glob("*.bin")} | card.checksums.keys()
    for path in [Path(folder, name) for name in sorted(names) if name.startswith(splits)]:
        if file_hash(path, known) != card.checksums.get(path.name):
            raise ValueError(f"{path} is damaged (wrong checksum): run data.py again")
    if known and known.maps[0]:
        with contextlib.suppress(OSError):  # of a folder that may not be written to
            write_json(Path(folder, HASHES), {**known_hashes(folder), **known.maps[0]})
    return card


# -----------------------------------------------------------------------------
# From sources to a finished folder of shards, made once, and from there to batches.


class Documents:
    """A list of texts that lies in a file, because a corpus may be larger than memory."""

    def __init__(self, file, starts, ends):
        filled = starts < ends
        self.file, self.starts, self.ends = file, starts[filled], ends[filled]
        self.n_bytes = int((ends - starts).sum())

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        self.file.seek(self.starts[i])
        return self.file.read(self.ends[i] - self.starts[i]).decode()


def clean_chat(row, counts):
    """The messages of a row, cleaned, as a line of JSON; "" where they say nothing."""
    messages = [dict(role=message["role"], content=clean(message["content"], counts))
                for message in take_chat(row)]
    says = any(message["content"] for message in messages)
    return json.dumps(messages, ensure_ascii=False) if says else ""


def chat_kinds(paths, encoding=None):
    """The chat_kind() of all files, by their first rows; ValueError for both chats and texts."""
    found = {}
    for path in paths:
        is_list = ending(path) in (".json", ".jsonl")
        with contextlib.suppress(OSError, ValueError, StopIteration):
            rows = read_rows(path, chat_kind, encoding, lambda reason: None)
            found.setdefault(next(rows) if is_list else "", path)
    if "" in found and len(found) > 1:
        raise ValueError(f"{found[max(found)]} holds chats and {found['']} does not: prepare them "
                         "one by one, or all as texts, with --field=NAME")
    return found.keys() - {""}


def gather(found, file, take, license=None, encoding=None):
    """Read all files into one by take(row, counts=...) -> (Documents, each text once; the sources,
    as a card has them; counts of what is lost). Broken documents and files that cannot be read are
    left out and named; where a source is a single such file, a ValueError."""
    sources, sizes, counts = {}, [], Counter()
    for name in found:
        card = Path(name, "card.json")  # what chapters/curate.py did
        curated = read_json(card) if card.exists() else {}
        sources[name] = dict(
            name=name, license=license or curated.get("license") or LICENSES.get(name),
            files=0, skipped=[], curated=curated)
    pairs = [(sources[name], path) for name, paths in found.items() for path in paths]
    for source, path in tqdm(pairs, "read", unit=" files", **QUIET):
        def skip(reason, what="skipped documents", lines=source["skipped"]):
            counts[what] += 1
            if len(lines) < 100:
                lines.append("".join(c if c.isprintable() else " " for c in reason)[:200])
        start, n_before, n_chars, lost = file.tell(), len(sizes), 0, Counter()
        try:
            for text in read_rows(path, partial(take, counts=lost), encoding, skip):
                n_chars += len(text)
                sizes.append(file.write(text.encode()))
            if lost["replaced bytes"] > n_chars / 100:
                raise ValueError(
                    f"{path}: {lost['replaced bytes'] / n_chars:.0%} of its characters are not "
                    f"{encoding or 'UTF-8'}: --encoding=NAME says what they are")
            counts.update(lost)
            source["files"] += 1
        except ValueError as error:
            if len(found[source["name"]]) == 1:
                raise
            file.seek(start)
            del sizes[n_before:]
            skip(str(error), "skipped files")
    ends = np.cumsum(sizes, dtype=np.int64)
    documents = Documents(file, ends - sizes, ends)
    repeated = exact_duplicates(documents)
    counts["empty documents"] += len(sizes) - len(documents)
    counts["exact duplicates"] += len(repeated)
    unique = np.delete([documents.starts, documents.ends], repeated, axis=1)
    return Documents(file, *unique), [*sources.values()], counts


def split(documents, val_ratio=None, whole=False):
    """Return Documents to train on, Documents to validate on, and in words what decides. Whole
    documents go by their own hash, so none changes sides when others come or go; but no long one
    becomes most of what validates. A few are cut instead, if they need not stay whole."""
    starts, ends, is_cut = documents.starts, documents.ends, len(documents) < 20 and not whole
    ratio = val_ratio or (0.1 if len(documents) < 20 else 0.05)
    hashes = [int.from_bytes(text_hash(text)[:8], "big") / 2**64 for text in documents]
    order, chosen, room = np.argsort(hashes), [], 2 * ratio * documents.n_bytes * (not is_cut)
    for i in order[:-1]:
        if hashes[i] > ratio and chosen:
            break
        if ends[i] - starts[i] <= room:
            chosen.append(i)
            room -= ends[i] - starts[i]
    if chosen or whole:
        rule = (f"documents with a sha256 (as a fraction of 1) below {ratio} validate, at least "
                f"one, and at most {2 * ratio:.0%} of all bytes")
        cuts = ends.copy()
        cuts[chosen or order[:1]] = starts[chosen or order[:1]]
    else:
        rule = f"documents are few: the last {ratio:.0%} of each validates"
        lengths = [len(text) - int(len(text) * ratio) for text in documents]
        cuts = starts + [len(text[:max(n, text.find(" ", n))].encode())  # before a word
                         for text, n in zip(documents, lengths)]
    train, val = Documents(documents.file, starts, cuts), Documents(documents.file, cuts, ends)
    if not train or not val:
        raise ValueError("a single chat cannot both train and validate: give more" if whole else
                         f"{documents.n_bytes:,} bytes of text do not split at val_ratio={ratio}")
    return train, val, rule


def tokenize(documents, tokenizer, chats=False):
    """Yield the ids of documents, each behind <|endoftext|>, in large arrays, with every core."""
    texts = tqdm(documents, "tokenize", unit=" documents", **QUIET)
    groups = (documents.ends - documents.starts).cumsum() // GROUP_BYTES
    for _, group in itertools.groupby(zip(groups, texts), lambda pair: pair[0]):
        group = [text for _, text in group]
        encoded = ([tokenizer.render_chat(json.loads(line))[0] for line in group] if chats else
                   [(tokenizer.eot, *ids) for ids in tokenizer.encode_batch(group)])
        yield np.array([id for ids in encoded for id in ids])


def parts(shards):
    """Yield the tokens of shards, a part after the other that is small beside memory."""
    for ids in shards:
        yield from np.array_split(ids, len(ids) // GROUP_BYTES + 1)


def count_tokens(shards, tokenizer):
    """How many documents, bytes of text and tokens are in shards."""
    uses = sum(np.bincount(ids, minlength=tokenizer.n_vocab) for ids in parts(shards))  # (n_vocab,)
    sizes = np.array([len(token) for token in tokenizer.token_bytes()])               # (n_vocab,)
    sizes[[*tokenizer.special.values()]] = 0
    return dict(documents=int(uses[tokenizer.eot]), bytes=int(uses @ sizes), tokens=int(uses.sum()))


def load_tokenizer(tokenizer):
    """The tokenizer of a file, or of the name "gpt2"; one that is loaded already comes back."""
    if tokenizer == "gpt2":
        import tiktoken
        with reading("gpt2, unless you give a tokenizer.json,"):  # it is fetched once
            tokenizer = Tokenizer.from_tiktoken(tiktoken.get_encoding("gpt2"))
    elif isinstance(tokenizer, (str, Path)):
        tokenizer = Tokenizer.load(tokenizer)
    if tokenizer.eot is None:
        raise ValueError(f"the tokenizer has no {SEPARATOR}, which begins every document")
    return tokenizer


def for_chats(tokenizer):
    """A tokenizer with the special tokens of chats: those that it lacks get the next ids."""
    missing = [name for name in SPECIAL_TOKENS if name not in tokenizer.special]
    special = {name: tokenizer.n_vocab + i for i, name in enumerate(missing)}
    return Tokenizer(tokenizer.merges, tokenizer.special | special, tokenizer.pattern,
                     tokenizer.byte_order) if missing else tokenizer


def is_free(folder, fingerprint):
    """Whether shards may go to a folder: it is new, or empty, or holds the same ones."""
    with contextlib.suppress(OSError, ValueError):
        return read_card(folder).fingerprint == fingerprint
    return not folder.is_file() and not any(folder.glob("[!.]*"))


@contextlib.contextmanager
def new_shards(folder, fingerprint):
    """A hidden folder to write shards into, which move to `folder`, new or empty or with the same
    ones, when all is done; after an error there is nothing."""
    real = folder.resolve()
    real.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{real.name}.", dir=real.parent) as part:
        for is_written in False, True:  # by then another command may have been faster
            if not is_free(folder, fingerprint):
                raise ValueError(f"{folder} holds other shards or files: choose another --out")
            if not is_written:
                yield Path(part)
        real.mkdir(exist_ok=True)
        for path in real.glob("*.bin"):  # whoever has opened it reads on
            path.unlink()
        for path in sorted(Path(part).iterdir(), reverse=True):  # card.json is the last
            path.replace(real / path.name)


def build(folder, fingerprint, found, tokenizer, options, chats, license, known, say):
    """All stages: read, clean, split, train a tokenizer, write the shards and, last, the card."""
    with new_shards(folder, fingerprint) as out, tempfile.TemporaryFile(dir=out.parent) as file:
        [(first, paths), *_], labels = found.items(), []
        if is_ready(first):
            splits = {name: [read_shard(path) for path in paths if name in path.name]
                      for name in ("train", "val")}
            sources = [dict(name=first, license=license or LICENSES.get(first), files=len(paths),
                            skipped=[], curated={})]
            counts, rule = {}, "as published"
        else:
            take = clean_chat if chats else (
                lambda row, counts: clean(take_text(row, options["field"]), counts))
            documents, sources, counts = gather(found, file, take, license, options["encoding"])
            skipped = [line for source in sources for line in source["skipped"]]
            if not documents:
                raise ValueError(f"no text in {', '.join(found)}{': '.join(['', *skipped[:1]])}")
            lost = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n) or "nothing"
            kind = "chats, of which what the assistant says is learned" if chats else "documents"
            say(f"{len(documents):,} {kind}, {documents.n_bytes / 1e6:.1f} MB; lost: {lost}")
            for line in skipped[:3]:
                say(f"skipped: {line}")
            counts.update(documents=len(documents), bytes=documents.n_bytes)
            if chats == {"label"}:
                labels = sorted({json.loads(line)[-1]["content"] for line in documents})
            train, val, rule = split(documents, options["val_ratio"], bool(chats))
            if tokenizer is None:
                sample = itertools.islice(train, 0, None, train.n_bytes // LEARN_BYTES + 1)
                if chats:
                    sample = (turn["content"] for line in sample for turn in json.loads(line))
                tokenizer = Tokenizer.train(sample, options["vocab_size"])
                say(f"tokenizer: {tokenizer.n_vocab:,} of {options['vocab_size']:,} tokens")
            splits = {name: tokenize(part, tokenizer, chats)
                      for name, part in (("train", train), ("val", val))}
        card = dict(fingerprint=fingerprint, date=time.strftime("%Y-%m-%d"), sources=sources,
                    python=sys.version.split()[0], options=options, counts=counts, split=rule,
                    labels=labels)
        for name, arrays in splits.items():
            write_shards(arrays, out, name, tokenizer.n_vocab)
            counted = card[name] = count_tokens(read_split(out, name), tokenizer)
            say(f"{name}: {counted['tokens']:,} tokens for {counted['bytes']:,} bytes")
        tokenizer.save(out / "tokenizer.json")
        checksums = {path.name: file_hash(path, known) for path in sorted(out.glob("[!.]*"))}
        write_json(out / HASHES, known.maps[0])
        write_json(out / "card.json", card | dict(
            tokenizer=tokenizer.hash(), vocab_size=tokenizer.n_vocab, checksums=checksums))


def prepare(sources, out=None, vocab_size=4096, tokenizer=None, val_ratio=None, n_shards=1,
            field=None, encoding=None, license=None, say=print):
    """Turn sources (names, files, folders, URLs) into a folder of shards, if there is none yet ->
    its Path: `out`, or shards/NAME OF THE FIRST, where that holds other content with a part of the
    fingerprint. tokenizer: a file, "gpt2" or a Tokenizer; None trains one of vocab_size."""
    sources = [*map(str, [sources] if isinstance(sources, (str, Path)) else sources)]
    are_ready = any(map(is_ready, filter(None, sources)))
    if "" in sources or are_ready and len(sources) > 1:
        raise ValueError(f"{sources}: each must have a name; ready shards do not mix with others")
    if val_ratio is not None and not 0 < val_ratio < 1:
        raise ValueError(f"val_ratio={val_ratio} must be above 0 and below 1")
    if not 1 <= n_shards <= 103:
        raise ValueError(f"fineweb10B has 1 to 103 training shards, not {n_shards}")
    with reading(f"--encoding={encoding}: text"):
        "".encode(encoding or "utf-8")
    if tokenizer is not None or are_ready:
        tokenizer, vocab_size = load_tokenizer("gpt2" if tokenizer is None else tokenizer), None
    else:
        room_for_merges(vocab_size, SPECIAL_TOKENS)  # a ValueError before anything is read
    folder = Path("shards", folder_name(sources[0])) if out is None else Path(out)
    found = {name: find_files(name, folder.parent / "downloads", n_shards) for name in sources}
    readable = [path for paths in found.values() for path in paths
                if are_ready or ending(path) in READERS and is_readable(path)]
    chats = set() if are_ready or field else chat_kinds(readable, encoding)
    tokenizer = for_chats(tokenizer) if chats and tokenizer else tokenizer
    options = dict(vocab_size=vocab_size, tokenizer=tokenizer and tokenizer.hash(),
                   val_ratio=val_ratio, field=field or "text", encoding=encoding,
                   version=3)  # raised when the same gives other shards
    options |= dict(chats=True) if chats else {}
    known = known_hashes(folder, *folder.parent.glob(f"{folder.name}-????????"))
    contents = [[ending(path), file_hash(path, known)] for path in readable]
    fingerprint = text_hash(json.dumps([options, contents])).hex()
    if out is None and not is_free(folder, fingerprint):
        folder = Path(f"{folder}-{fingerprint[:8]}")
    with contextlib.suppress(OSError, ValueError):  # of a folder that is not there or not whole
        if read_card(folder).fingerprint == fingerprint:
            check_shards(folder, ("train", "val", "token"), known)
            say(f"{folder}: used again, the content and the options are the same")
            return folder
    build(folder, fingerprint, found, tokenizer, options, chats, license, known, say)
    return folder


class Loader(Iterator):
    """Endless batches of a shard folder. A batch depends on (seed, position, rank, world_size)
    alone; position is the number of the next. The ranks share one global batch: 2 ranks of 4
    sequences read what 1 rank of 8 reads. Each epoch reads all blocks, in a new order."""

    def __init__(self, path, batch_size, block_size, rank=0, world_size=1, seed=0, position=0,
                 split="train", shuffle=True):
        self.shards = read_split(path, split)
        self.starts = np.cumsum([0, *map(len, self.shards)])
        self.n_tokens = int(self.starts[-1])
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position
        self.shuffle = shuffle  # without it blocks come as they were written: a curriculum
        self.n_blocks, self.epoch = self.lay_out(path, split), None

    def __next__(self):
        first = (self.position * self.world_size + self.rank) * self.batch_size
        batch = self.batch([self.block(first + i) for i in range(self.batch_size)])
        self.position += 1
        return batch

    def pick(self, number):
        """Which of the n_blocks comes at a place of the endless stream."""
        epoch, i = divmod(number, self.n_blocks)
        if epoch != self.epoch:
            random = np.random.RandomState([self.seed, epoch])  # default_rng may change with numpy
            self.epoch, self.offset = epoch, random.randint(1 - self.block_size, 1)
            self.order = random.permutation(self.n_blocks) if self.shuffle else range(self.n_blocks)
        return int(self.order[i])

    def read(self, start, stop):
        """The tokens from start to stop, which may lie in several shards."""
        first, last = np.searchsorted(self.starts, [start, stop - 1], "right") - 1
        shards = zip(self.shards[first:last + 1], self.starts[first:])
        return np.concatenate([ids[max(0, start - begin):stop - begin] for ids, begin in shards])


class TokenLoader(Loader):
    """Batches (x, y), int64 (batch_size, block_size), y one token on. Each epoch reads all tokens,
    cut at another offset."""

    def lay_out(self, path, split):
        if self.n_tokens <= self.block_size:
            raise ValueError(f"{path}: {split} has {self.n_tokens:,} tokens, a block needs "
                             f"{self.block_size + 1:,}: give more text or a smaller block_size")
        # The first block begins at the first token, the last ends at the last one, at any offset.
        return math.ceil((self.n_tokens - 2) / self.block_size) + 1

    def block(self, number):
        """A sequence of the endless stream, and one token more for y."""
        i = self.pick(number)
        start = min(max(0, self.offset + i * self.block_size), self.n_tokens - self.block_size - 1)
        return self.read(start, start + self.block_size + 1)

    def batch(self, blocks):
        blocks = np.stack(blocks).astype(np.int64)                               # (B, T + 1)
        return blocks[:, :-1], blocks[:, 1:]


def find_turns(shards, special):
    """Where the documents of shards begin and end, (N,) each, and where the assistant's turns do,
    after <|assistant|> and after <|end|>. special: {name: id} of the tokenizer."""
    places, found, n_tokens = [], [], 0
    for part in parts(shards):
        at = np.flatnonzero(np.isin(part, [*special.values()]))
        places.append(n_tokens + at)
        found.append(part[at])
        n_tokens += len(part)
    places, found = np.append(np.concatenate(places), n_tokens - 1), np.concatenate(found)
    begins, turns = (np.flatnonzero(found == special.get(name, -1))
                     for name in (SEPARATOR, "<|assistant|>"))
    ends = np.append(places[begins[1:]], n_tokens)
    return places[begins], ends, places[turns] + 1, places[turns + 1] + 1


def learned(ids, special):
    """The loss mask of ids (N,): of chats what the assistant says and the <|end|> after it, as of
    render_chat; of a document without roles all. special: {name: id} of a tokenizer."""
    reads, writes = (np.isin(ids, [special.get(name, -1) for name in names]) for names in (
        ("<|system|>", "<|user|>", "<|tool|>"), (SEPARATOR, "<|assistant|>")))
    last = np.maximum.accumulate(np.where(reads | writes, np.arange(len(ids)), 0))
    return ~(reads | writes | reads[last])


def pack(lengths, block_size):
    """Which items go to which block, the longest first, each to the fullest block with room:
    pack([2, 3, 1], 4) == [[1, 2], [0]]."""
    blocks, rooms = [], []  # rooms: sorted pairs of the room in a block and its number
    for i in np.argsort(-np.asarray(lengths, int), kind="stable").tolist():
        at = bisect_left(rooms, (lengths[i], 0))
        if at == len(rooms):
            rooms.append((block_size, len(blocks)))
            blocks.append([])
        room, block = rooms.pop(at)
        blocks[block].append(i)
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], block))
    return blocks


class ChatLoader(Loader):
    """Batches (x, y, segments), int64 (batch_size, block_size), of documents that share a block
    without seeing each other. y is x one token on where that is learned(), and -1 elsewhere;
    segments numbers the documents of a block from 1, and is 0 where a block is padded. A document
    longer than a block loses its last turns; left_out counts those whose first is too long."""

    def lay_out(self, path, split):
        self.special = load_tokenizer(Path(path, "tokenizer.json")).special
        begins, ends, _, answers = find_turns(self.shards, self.special)
        longest = self.block_size + 1
        last = np.append(0, answers)[np.searchsorted(answers, begins + longest, "right")]
        ends = np.where(ends - begins <= longest, ends, last)
        fits = ends > begins
        self.left_out = int((~fits).sum())
        if not fits.any():
            raise ValueError(f"{path}: none of {len(fits):,} chats in {split} fits into a block of "
                             f"{self.block_size} tokens: give shorter ones, or a larger block_size")
        self.begins, self.ends = begins[fits], ends[fits]
        self.blocks = pack((self.ends - self.begins - 1).tolist(), self.block_size)
        return len(self.blocks)

    def block(self, number):
        """x, y and segments of a block of the endless stream, (3, T)."""
        eot, documents = self.special[SEPARATOR], self.blocks[self.pick(number)]
        ids = np.concatenate([self.read(self.begins[i], self.ends[i]) for i in documents])
        ids = ids.astype(np.int64)
        y, segments = np.where(learned(ids, self.special), ids, -1), (ids == eot).cumsum()
        at = np.flatnonzero(segments[1:] == segments[:-1])  # the last token of each predicts none
        padding = np.repeat([[eot], [-1], [0]], self.block_size - len(at), axis=1)
        return np.concatenate([[ids[at], y[at + 1], segments[at]], padding], axis=1)

    def batch(self, blocks):
        return tuple(np.stack(blocks, axis=1))                                   # 3 times (B, T)


class ClassLoader(Loader):
    """Batches (x (B, T), y (B,), segments (B, T)), int64, of texts with labels: x is a chat up to
    where the assistant speaks, at most block_size tokens of it, y the number in `labels` of what
    it says, segments 1, and 0 for padding. A block is a text; T is the longest of the batch."""

    def lay_out(self, path, split):
        tokenizer = load_tokenizer(Path(path, "tokenizer.json"))
        self.labels = read_card(path).labels
        if not self.labels:
            raise ValueError(f"{path} has no labels: make shards of rows with a text and a label, "
                             "or give --n_classes=0")
        self.begins, ends, turns, _ = find_turns(self.shards, tokenizer.special)
        self.ends, self.eot = turns[np.searchsorted(turns, ends) - 1], tokenizer.eot
        names = [tokenizer.decode(self.read(*span).tolist()).removesuffix("<|end|>")
                 for span in zip(self.ends, ends)]
        if unknown := {*names} - {*self.labels}:
            raise ValueError(f"{path}: label {min(unknown)!r:.60} is not in its card, which has "
                             f"{', '.join(self.labels):.200}")
        self.classes = np.array([self.labels.index(name) for name in names])
        return len(names)

    def block(self, number):
        """The tokens of a text of the endless stream, and its class."""
        i = self.pick(number)
        stop = min(self.ends[i], self.begins[i] + self.block_size)
        return self.read(self.begins[i], stop), self.classes[i]

    def batch(self, blocks):
        texts, classes = zip(*blocks)
        segments = np.array([len(ids) for ids in texts])[:, None] > np.arange(max(map(len, texts)))
        x = np.full(segments.shape, self.eot)
        x[segments] = np.concatenate(texts)
        return x, np.array(classes), segments.astype(np.int64)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sources", nargs="*", default=["stdlib"], help=f"paths, URLs, -, or {', '.join(NAMES)}")
    add("--out", help="folder to write (default shards/NAME OF THE FIRST SOURCE)")
    add("--vocab_size", type=int, help="default 4096")
    add("--tokenizer", help="use this tokenizer.json, or gpt2, and train none")
    add("--val_ratio", type=float, help="share to validate on (default 0.05; few documents: 0.1)")
    add("--field", help="of JSON and CSV files, the one with the text (default text); no chats")
    add("--encoding", help="of the files; else UTF-8, or what they say or look like")
    add("--license", help="of the text, for its card")
    add("--shards", dest="n_shards", type=int, help="of fineweb10B, 200 MB each (default 1)")
    typed = {k: v for k, v in vars(parser.parse_intermixed_args()).items() if v is not None}
    if any(map(is_ready, typed["sources"])):
        refuse_idle(typed, "vocab_size val_ratio field encoding".split(), "beside ready shards")
    if "fineweb10B" not in typed["sources"] and "n_shards" in typed:
        raise ValueError("--shards would not act without fineweb10B: leave it out")
    refuse_idle(typed, ["vocab_size"] * ("tokenizer" in typed), "beside --tokenizer")
    print(f"next: python train.py --data={prepare(**typed)}")


if __name__ == "__main__":
    run_command(main)
