"""
How much of the main text of web pages is found, by us and by the libraries that are installed: the
part `pages` of tests/benchmark.py.
"""

import importlib.util
import itertools
import random
import statistics
import time
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

from chapters.pages import html_to_text, visible_text
from pages_corpus import made_pages, score

MAIN = "[role=main]", "main", "article", "div.body", "#content"  # how pages mark their main text
BLOCKS = "p div li td th tr dt dd pre h1 h2 h3 h4 h5 h6 br section table".split()


def main_text(page):
    """-> (the text of the element that a page marks as its main one, the page without that mark),
    or None where no element or several are."""
    from bs4 import BeautifulSoup  # comes with jupyterlab
    soup = BeautifulSoup(page, "html.parser")
    elements = next(filter(None, map(soup.select, MAIN)), [])
    if len(elements) != 1:
        return None
    for block in elements[0](BLOCKS):
        block.insert_before("\n")
    text = elements[0].get_text()
    for element in elements + [*elements[0].parents][:-1]:
        element.name = "div" if element.name in ("main", "article") else element.name
        element.attrs = {}
    return text, str(soup).encode()


def documentation_pages(folders=("/usr/share/doc",), n=100, seed=0):
    """Up to n pages as (bytes, main text, bytes without the mark), in turns from the packages in
    the folders; without those of less than 200 characters or more than 300 KB."""
    packages = defaultdict(list)
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.html")):
            packages[folder, path.relative_to(folder).parts[0]].append(path)
    for paths in packages.values():
        random.Random(seed).shuffle(paths)
    found = []
    for path in filter(None, chain(*zip_longest(*packages.values()))):
        if len(found) < n and path.is_file() and path.stat().st_size < 300_000:
            page = path.read_bytes()
            text, hidden = main_text(page) or ("", b"")
            found += [(page, text, hidden)] * (len(text) > 200)
    return found


def extractors():
    """Ours, and those of the libraries that are installed, by name."""
    found = {"html_to_text": html_to_text, "visible_text": visible_text}
    if importlib.util.find_spec("trafilatura"):
        import trafilatura
        found["trafilatura"] = lambda page: trafilatura.extract(page, include_comments=False) or ""
    if importlib.util.find_spec("resiliparse"):
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
        found["resiliparse"] = lambda page: extract_plain_text(HTMLTree.parse_from_bytes(
            page, detect_encoding(page)), main_content=True, alt_texts=False, links=False)
    return found


def compare(docs):
    """Yield (name, figures): of made pages, of documentation below a folder, and of that without
    what marks its main text."""
    real = documentation_pages([docs])
    kinds = {"made pages": made_pages(), "of documentation": [page[:2] for page in real],
             "of it without marks": [(hidden, text) for _, text, hidden in real]}
    for (kind, known), (name, function) in itertools.product(kinds.items(), extractors().items()):
        if known:
            start = time.process_time()
            texts = [function(page) for page, _ in known]
            rate = sum(len(page) for page, _ in known) / (time.process_time() - start) / 1e6
            precision, recall, f1 = map(statistics.mean, zip(*[
                score(text, truth) for text, (_, truth) in zip(texts, known)]))
            yield (f"{len(known)} {kind}, {name}", f"precision {precision:.3f}, recall "
                   f"{recall:.3f}, F1 {f1:.3f}, {rate:.1f} MB/s")
