"""
What curate reads: documents in files of any kind, and questions that no document may have.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from chapters import formats
from chapters.pages import html_to_text
from data import (HEAVY, PAGES, READERS, download, ending, find_files, is_readable, open_packed,
                  read_documents, read_rows, text_hash)
from tokenizer import reading


def read_any(path, config, skip):
    """Yield the documents of one file; skip(reason) is told of those that are broken."""
    kind, path = ending(path), Path(path)
    if kind in READERS or not is_readable(path):
        yield from read_documents(path, config.field, config.encoding or None, skip)
    elif kind in PAGES:
        with reading(path), open_packed(path) as file:
            yield html_to_text(file.read(), config.encoding or None)
    elif kind in formats.READERS:
        packed = "".join(path.suffixes[-2:]).lower() not in formats.RAW
        with reading(path), open_packed(path) if packed else open(path, "rb") as file:
            for document in formats.READERS[kind](file):
                if isinstance(document, ValueError):
                    skip(f"{path}, {document}")
                else:
                    yield document
    else:
        raise ValueError(f"{path}: cannot read {kind or 'a name without an ending'}, only "
                         f"{' '.join([*PAGES, *formats.READERS])} and what data.py reads")


def find(source, downloads):
    """The files of a source; a URL is taken for a page where its name does not say what it is."""
    known = {*READERS, *HEAVY} - {".php"}  # which a server runs, and a page comes out
    if re.match("https?://", source) and ending(urlsplit(source).path) not in known:
        return [download(source, Path(downloads, f"{text_hash(source).hex()[:8]}-page.html"))]
    return find_files(source, Path(downloads))


def readable(path, texts, skip):
    """Yield (place, text) of the texts of a file, with U+FFFD for what is not of its encoding;
    skip(reason) is told of a text where that is more than one character of a hundred."""
    for number, text in enumerate(texts, 1):
        text = text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
        n, place = text.count("\ufffd"), f"{path}, {number}"
        if n <= len(text) / 100:
            yield place, text
        else:
            skip(f"{place}: {n / len(text):.0%} of it is of another encoding: give --encoding=NAME")


def texts_in(value):
    """All texts in a value of JSON: texts_in({"q": "a", "options": ["b", 1]}) == ["a", "b"]."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for value in values for text in texts_in(value)]


def read_questions(paths):
    """The texts in all fields of files, for --against; ValueError for a file without any."""
    found = {path: [text for texts in read_rows(path, texts_in) for text in texts if text.strip()]
             for path in np.atleast_1d(paths) if paths != "none"}
    if empty := [path for path in found if not found[path]]:
        raise ValueError(f"--against={empty[0]}: no question is in it")
    return [text for texts in found.values() for text in texts]
