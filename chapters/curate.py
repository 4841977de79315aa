"""
Web pages to plain text that data.py reads.

    python -m chapters.curate page.html saved/ https://example.org/ --out=texts
    python data.py texts

A page is a file (.html .htm .xhtml .xht .shtml, each also as .gz), a folder of them, or a URL. One
.txt file is written for each, under the name that the page has in its folder.
"""

import gzip
import html
import re
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # `python chapters/curate.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import PAGE_ENDINGS, download, ending, folder_name, is_readable, walk
from tokenizer import Parser, reading, replacing, run_command

# -----------------------------------------------------------------------------
# From a page to its text.

HIDDEN = re.compile(r"(?is)<!--.*?(?:-->|\Z)|<(script|style|template)\b.*?(?:</\1\s*>|\Z)")
PRE = re.compile(r"(?is)<pre\b[^<>]*>(.*?)(?:</pre\s*>|\Z)")  # the one place for white space
TAG = re.compile(r"""</?([a-zA-Z!?][^\s/<>]*)(?:"[^"]*"|'[^']*'|[^<>"'])*>""")
INLINE = "a abbr b cite code em font i img kbd mark q s small span strong sub sup tt u var".split()


def html_to_text(page):
    """The visible text of a web page: html_to_text(b"<p>a &lt; <b>b</b>").strip() == "a < b".
    A byte that is not UTF-8 arrives as a lone surrogate, as data.py counts and replaces it."""
    parts = PRE.split(HIDDEN.sub("", page.decode("utf-8-sig", "surrogateescape")))
    for i, part in enumerate(parts):  # the odd ones come from a <pre>
        part = part if i % 2 else re.sub(r"\s+", " ", part)
        part = TAG.sub(lambda tag: "" if tag[1].lower() in INLINE else "\n", part)
        parts[i] = html.unescape(part)
        if i % 2 == 0:
            parts[i] = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", parts[i]).strip()
    return "\n".join(parts)


# -----------------------------------------------------------------------------
# The command: pages to a folder of .txt files.


def stem(path):
    """The name of a page without its ending, None for another file: stem("b/A.htm.gz") == "A"."""
    name = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
    return Path(name).stem if ending(path) in PAGE_ENDINGS else None


def read_page(path):
    """The bytes of a page; ValueError for a damaged or binary file."""
    if not is_readable(path):
        raise ValueError(f"{path}: no such file, or one that you may not read, or a pipe")
    with reading(path):
        page = path.read_bytes()
        try:
            page = gzip.decompress(page) if path.suffix.lower() == ".gz" else page
        except gzip.BadGzipFile as error:  # an OSError that does not name the file
            raise ValueError(str(error)) from None
    if b"\0" in page[:8192]:
        raise ValueError(f"{path} is a binary file, not a page (a page must be UTF-8)")
    return page


def find_pages(source, folder):
    """Yield (path, name of its text) for the pages of a source; a URL is downloaded to `folder`."""
    path = Path(source)
    if re.match("https?://", source):
        name = f"{folder_name(source)}-{zlib.crc32(source.encode()):08x}"
        yield download(source, Path(folder, f"{name}.html")), name
    elif source and path.is_dir():
        pages = [page for page in walk(path) if stem(page)]
        if not pages:
            raise ValueError(f"{source}: no pages ({' '.join(PAGE_ENDINGS)}) in it")
        for page in pages:
            yield page, str(page.relative_to(path).with_name(stem(page)))
    elif not source or not path.exists():
        raise ValueError(f"{source or 'an empty name'}: no such file or folder")
    elif stem(path) is None:
        raise ValueError(f"{source}: not a page, which ends in {' '.join(PAGE_ENDINGS)}")
    else:
        yield path, stem(path)


def readable_pages(source, folder, say):
    """The (path, name) of the pages of a source that can be read; ValueError if it has one page."""
    pages, readable = [*find_pages(source, folder)], []
    for page, name in pages:
        try:
            read_page(page)
            readable.append((page, name))
        except ValueError as error:
            if len(pages) == 1:
                raise
            say("".join(char if char.isprintable() else " " for char in f"skipped: {error}"))
    return readable


def curate(sources, out, say=print):
    """Write the text of each page to a .txt file below `out` -> their paths. It begins when all
    sources are found; of several pages in a folder those that cannot be read are left out."""
    paths, counts = set(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        for page, name in [page for source in sources
                           for page in readable_pages(source, folder, say)]:
            path = Path(out, f"{name}.txt")
            while path in paths:  # two pages of one name
                counts[name] += 1
                path = Path(out, f"{name}-{counts[name] + 1}.txt")
            with replacing(path) as file:
                file.write(html_to_text(read_page(page)).encode("utf-8", "surrogateescape"))
            paths.add(path)
    return sorted(paths)


def main():
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="PAGE", help="files, folders or URLs")
    parser.add_argument("--out", required=True, help="folder for the .txt files")
    args = parser.parse_intermixed_args()
    if not args.out:
        raise ValueError("--out is empty: give the name of a folder")
    paths = curate(args.sources, args.out)
    n_bytes = sum(path.stat().st_size for path in paths)
    print(f"{len(paths):,} pages, {n_bytes / 1e6:.1f} MB of text")
    print(f"next: python data.py {args.out}")


if __name__ == "__main__":
    run_command(main)
