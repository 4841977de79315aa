"""
Documents to batches: read, clean, drop duplicates, split, tokenize, write shards, read them back.

    python data.py                               # Python's own standard library, no network needed
    python data.py book.txt notes/ https://example.org/page.html --out=shards/mine
    python data.py shakespeare                   # or tinystories, wikitext, fineweb10B

A source is a name, a file, a folder or a URL. A file is .txt .md .py .html or .jsonl (field
"text"), each also as .gz; a .txt file may hold many documents, <|endoftext|> between them. What is
written: tokenizer.json, train_000000.bin ..., val_000000.bin ..., and card.json, which says what
went in and what was lost. Such a folder is used again for the same content and options.
"""

import ast
import codecs
import contextlib
import difflib
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import Parser, Tokenizer, replacing, run_command

RECIPE = 1  # part of each fingerprint: raised when the same content would give other shards
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
FEW_DOCUMENTS = 20  # below this, each document gives its end to validation
PIECE_CHARS = 1 << 19  # a text much longer than this is tokenized in pieces
GROUP_CHARS = 1 << 22  # text tokenized at a time: the ids of a large corpus must not fill memory
LEARN_BYTES = 200_000_000  # a tokenizer learns from a sample of this size: more changes little
SHARD_TOKENS = 100_000_000
LOSSES = ["replaced bytes", "control characters", "empty documents", "exact duplicates",
          "skipped files"]

# Texts to download, each pinned to one revision so that its size and sha256 can be checked.
KNOWN = {
    "shakespeare": dict(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/"
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        file="shakespeare.txt", n_bytes=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tinystories": dict(
        url="https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
            "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-train.txt",
        file="tinystories.txt", n_bytes=2_227_753_162,
        sha256="6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "wikitext": dict(
        url="https://huggingface.co/datasets/ggml-org/ci/resolve/"
            "927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
        file="wikitext.zip", n_bytes=4_721_645,
        sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
}
# Ready token shards: val_000000.bin and train_000001.bin to the last, behind the same words.
READY = {
    "fineweb10B": dict(
        url="https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_", last=103),
}
NAMES = ["stdlib", *KNOWN, *READY]

# -----------------------------------------------------------------------------
# Reading: a file becomes documents, one str each.


@contextlib.contextmanager
def open_text(path):
    """Open a text file, plain or .gz, line ends as they are. Raises ValueError for a binary file.

    A byte that is not UTF-8 arrives as a lone surrogate, for clean() to count and replace.
    """
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            head = file.peek(8192)[:8192]
            is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell's >
            if b"\0" in head and not is_utf16:
                raise ValueError(f"{path} is a binary file, not text")
            encoding = "utf-16" if is_utf16 else "utf-8-sig"
            yield io.TextIOWrapper(file, encoding, "surrogateescape", newline="")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_whole(file):
    """Yield the one document of a file."""
    yield file.read()


def read_txt(file):
    """Yield the documents of a .txt file, one or many."""
    lines = []
    for line in file:
        *ended, line = line.split(SEPARATOR)
        for end in ended:
            yield "".join([*lines, end])
            lines = []
        lines.append(line)
    if any(map(str.strip, lines)):  # most files end with a separator or a line end, not a document
        yield "".join(lines)


def read_jsonl(file):
    """Yield the field "text" of the JSON object in each line."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{file.name}, line {number}: no JSON object with a "text" in it')
            yield text


def read_topics(file):
    """Yield the help texts of pydoc_data/topics.py, a file with one dict. Nothing is executed."""
    for node in ast.parse(file.read()).body:
        if isinstance(node, ast.Assign):
            yield from ast.literal_eval(node.value).values()


class PageText(HTMLParser):
    """Collects the text of a web page, each block on its own lines, without scripts and styles."""

    INLINE = set("a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label "
                 "mark q s samp small span strike strong sub sup time tt u var wbr".split())
    HIDDEN = {"script", "style", "template"}

    def __init__(self):
        super().__init__()
        self.parts, self.n_open = ["\n"], Counter()

    def handle_starttag(self, tag, attrs):
        self.n_open[tag] += 1
        self.end_line(tag)

    def handle_endtag(self, tag):
        self.n_open[tag] = max(0, self.n_open[tag] - 1)  # pages close tags that they never opened
        self.end_line(tag)

    def end_line(self, tag):
        if tag not in self.INLINE and not self.parts[-1].endswith("\n"):
            self.parts.append("\n")

    def handle_data(self, data):
        if any(self.n_open[tag] for tag in self.HIDDEN):
            return
        if not self.n_open["pre"]:  # outside <pre>, any run of white space is one space
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.parts[-1][-1].isspace() else data
        self.parts += [data] if data else []


def html_to_text(page):
    """The visible text of a web page: html_to_text(b"<p>a &lt; <b>b</b>").strip() == "a < b"."""
    page = page.decode("utf-8-sig", "surrogateescape")
    parser = PageText()
    parser.feed(re.sub(r"<!\[[^>]*>", "", page))  # <![if ...]> stops the parser of some Pythons
    parser.close()
    return "".join(parser.parts)


def read_html(file):
    """Yield the one document of a web page."""
    yield html_to_text(file.buffer.read())


READERS = {".txt": read_txt, ".md": read_whole, ".py": read_whole, ".jsonl": read_jsonl,
           ".html": read_html}


def ending(name):
    """What says how a file is read: ending("notes.TXT.gz") == ".txt"."""
    name = str(name).lower()
    return Path(name[:-3] if name.endswith(".gz") else name).suffix


def reader_of(path):
    """The function that reads this file. Raises ValueError when there is none for its ending."""
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        return read_topics
    if ending(path) not in READERS:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without an ending'}, only "
                         f"{' '.join(READERS)}, each also as .gz")
    return READERS[ending(path)]


def read_documents(path):
    """Yield the documents of one file, as they are, one by one."""
    reader = reader_of(Path(path))
    with open_text(Path(path)) as file:
        yield from reader(file)


# -----------------------------------------------------------------------------
# Sources: a name, a file, a folder or a URL becomes a list of files.


def file_hash(path):
    """The sha256 of a file's content, in hex."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def receive(url, part, total):
    """Append what is missing of url to the file `part`; return how large it should be, if known."""
    n_done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "data.py (urllib)"})
    if n_done:
        request.add_header("Range", f"bytes={n_done}-")
    with urllib.request.urlopen(request, timeout=30) as response:
        n_done = n_done if response.status == 206 else 0  # 200: this server starts from the front
        n_more = response.headers.get("Content-Length")
        total = total or (n_done + int(n_more) if n_more else None)
        bar = tqdm(None, part.stem, total, initial=n_done, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if n_done else "wb") as file, bar:
            while block := response.read(1 << 18):
                file.write(block)
                bar.update(len(block))
    return total


def download(url, path, n_bytes=None, sha256=None):
    """Fetch url to path, unless it is there; what was cut off continues where it stopped.

    Raises ValueError without a connection or page, or with another size or sha256 than given.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        total = receive(url, part, n_bytes)
    except urllib.error.HTTPError as error:
        if error.code == 416 and part.exists():  # nothing is left to send: start again
            part.unlink()
            return download(url, path, n_bytes, sha256)
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise ValueError(f"{url}: no connection ({error.reason}); stdlib needs none") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ValueError(f"{url}: cut off ({error}); start again to go on") from None
    n_done = part.stat().st_size
    if total and n_done < total:
        raise ValueError(f"{url}: cut off at {n_done:,} of {total:,} bytes; start again to go on")
    if (n_bytes and n_done != n_bytes) or (sha256 and file_hash(part) != sha256):
        part.unlink()
        raise ValueError(f"{url}: not the expected {n_bytes} bytes with sha256 {sha256}; removed")
    os.replace(part, path)
    return path


def download_known(name, folder):
    """Download a row of KNOWN; return its text file."""
    row = KNOWN[name]
    path = download(row["url"], folder / row["file"], row["n_bytes"], row["sha256"])
    text = path.with_suffix(".txt")
    if not text.exists():  # WikiText is one text: only a heading shows where an article starts
        with zipfile.ZipFile(path) as archive, replacing(text) as file:
            articles = archive.read("wikitext-2-raw/wiki.train.raw")
            file.write(re.sub(rb"(?m)^(?= = [^=\n][^\n]* = $)", SEPARATOR.encode(), articles))
    return text


def download_page(url, folder):
    """Download any URL. Without a known ending it is a web page, unless its name speaks of .txt."""
    name = re.sub(r"[^\w.-]+", "-", Path(urllib.parse.urlsplit(url).path).name)
    if ending(name) not in READERS:
        name += ".txt" if ".txt" in name else ".html"
    return download(url, folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")


def walk(folder, skip=()):
    """All files below a folder by path, but hidden ones and what is in folders named in `skip`."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted((path for path in files if path.is_file()), key=lambda path: path.parts)


def is_readable(path):
    """Whether a file is text that we can read, judged by its name and its beginning."""
    try:
        with open_text(path) as file:
            return bool(reader_of(path) and file.read(1))
    except ValueError:
        return False


def standard_library():
    """The .py files that come with the running Python, without tests and installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in walk(folder, skip) if path.suffix == ".py" and is_readable(path)]
    if not files:
        raise ValueError(f"this Python lacks the sources of its library ({folder}): name a folder")
    return files


def find_files(source, downloads, counts):
    """The files of one source, in a fixed order. Raises ValueError where nothing can be read."""
    path = Path(source)
    if source == "stdlib":
        return standard_library()
    if source in KNOWN:
        return [download_known(source, downloads)]
    if re.match("https?://", source):
        return [download_page(source, downloads)]
    if path.is_dir():
        found = walk(path)
        files = [file for file in found if is_readable(file)]
        counts["skipped files"] += len(found) - len(files)
        if not files:
            raise ValueError(f"{source}: a folder without text (only {' '.join(READERS)} are read)")
        return files
    if not path.exists():
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(
            source, NAMES + [str(path.with_name(name)) for name in beside], 1)
        raise ValueError(f"{source}: no such file or folder, and not one of {', '.join(NAMES)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    if reader_of(path) and not path.stat().st_size:
        raise ValueError(f"{source} is empty")
    return [path]


# -----------------------------------------------------------------------------
# Cleaning: the same text in one spelling, once, and on one side of the split.

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # Unicode's Cc but \t \n \r
SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text, counts=None):
    """One spelling for the same text: clean("a\\r\\n  b \\n") == "a\\n  b".

    NFC, \\n at line ends, no control characters, no spaces before a line end, at most two blank
    lines in a row; indentation stays. What is lost is added to `counts`.
    """
    counts = Counter() if counts is None else counts
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, n_removed = CONTROL.subn("", text)
    counts["control characters"] += n_removed
    if not text.isascii():
        text, n_replaced = SURROGATE.subn("\ufffd", text)
        counts["replaced bytes"] += n_replaced
        text = unicodedata.normalize("NFC", text)
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def text_hash(text):
    """The sha256 of a text, as bytes."""
    return hashlib.sha256(text.encode()).digest()


def exact_duplicates(texts):
    """The positions of texts that occurred before: exact_duplicates(["a", "b", "a"]) == [2]."""
    seen, found = set(), []
    for i, key in enumerate(map(text_hash, texts)):
        if key in seen:
            found.append(i)
        seen.add(key)
    return found


def last_line_end(text, position):
    """Where the last line before this position ends; the position itself in a long line."""
    nearest = max(0, position - (len(text) - position) // 2)
    return text.rfind("\n", nearest, position) + 1 or position


def choose_cuts(texts, val_ratio=None):
    """Return (cuts, rule): train on texts[i][:cuts[i]], validate on the rest; the rule in words.

    Whole documents go by their own hash, so none changes sides when others come or go.
    """
    if len(texts) < FEW_DOCUMENTS:
        ratio = val_ratio or 0.1
        rule = f"fewer than {FEW_DOCUMENTS} documents: the last {ratio:.0%} of each validates"
        return [last_line_end(text, round(len(text) * (1 - ratio))) for text in texts], rule
    ratio = val_ratio or 0.05
    rule = f"documents with a sha256 (as a fraction of 1) below {ratio} validate, at least one"
    sizes, fractions = [], []
    for text in texts:
        sizes.append(len(text))
        fractions.append(int.from_bytes(text_hash(text)[:8], "big") / 2**64)
    limit = max(ratio, min(fractions))
    return [0 if fraction <= limit else size for size, fraction in zip(sizes, fractions)], rule


# -----------------------------------------------------------------------------
# Shards: a header of 256 int32 (magic, version, number of tokens), then the tokens. This is llm.c's
# format: its shards can be read here, and ours there.

HEADER_BYTES = 1024
FORMATS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # type of a token: magic, version
SHARD_NAME = re.compile(r"(train|val)_\d{6}\.bin(\.part)?")


def write_shards(arrays, folder, split, n_vocab, shard_tokens=SHARD_TOKENS):
    """Write arrays of ids as split_000000.bin, split_000001.bin ...; return {file name: tokens}."""
    kind = "<u2" if n_vocab <= 2**16 else "<u4"
    arrays = (ids for ids in map(np.asarray, arrays) if len(ids))
    ids, shards = next(arrays, None), {}
    while ids is not None:
        name, n_tokens = f"{split}_{len(shards):06d}.bin", 0
        with replacing(Path(folder, name)) as file:
            file.write(bytes(HEADER_BYTES))
            while ids is not None and n_tokens < shard_tokens:
                if ids.max() >= n_vocab:
                    raise ValueError(f"token id {ids.max()} is not in the vocabulary of {n_vocab}")
                head, rest = np.split(ids, [shard_tokens - n_tokens])
                file.write(head.astype(kind).tobytes())
                n_tokens += len(head)
                ids = rest if len(rest) else next(arrays, None)
            file.seek(0)
            file.write(np.array([*FORMATS[kind], n_tokens], "<i4").tobytes())
        shards[name] = n_tokens
    return shards


def read_shard(path):
    """The tokens of a shard as a memory map. Raises ValueError for a foreign or damaged file."""
    magic, version, n_tokens, *_ = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0]
    for kind, (known_magic, known_version) in FORMATS.items():
        if magic == known_magic:
            break
    else:
        known = " or ".join(str(magic) for magic, _ in FORMATS.values())
        raise ValueError(f"{path}: not a token shard (its magic is {magic}, not {known})")
    if version != known_version:
        raise ValueError(f"{path}: a shard of version {version}, only {known_version} can be read")
    size, expected = os.path.getsize(path), HEADER_BYTES + n_tokens * np.dtype(kind).itemsize
    if size != expected:
        raise ValueError(f"{path}: damaged, {size:,} bytes where {n_tokens:,} tokens need "
                         f"{expected:,}; delete it and run data.py again")
    return np.memmap(path, kind, "r", HEADER_BYTES, n_tokens) if n_tokens else np.empty(0, kind)


def read_split(folder, split="train"):
    """All tokens of a split, as a list of memory maps in order."""
    paths = sorted(Path(folder).glob(f"{split}_??????.bin"))
    if not paths:
        raise ValueError(f"{folder}: no {split} shards; data.py SOURCE --out={folder} writes them")
    return [read_shard(path) for path in paths]


# -----------------------------------------------------------------------------
# Preparing: from sources to a finished folder.

LINE_END = re.compile(r"[^\W_](?=\n)")


class Documents:
    """Texts in a temporary file: first appended, then read like a list, however many they are."""

    def __init__(self, file):
        self.file, self.starts, self.sizes = file, array("q"), array("q")

    def append(self, text):
        data = text.encode()
        self.starts.append(self.file.tell())
        self.sizes.append(len(data))
        self.file.write(data)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        self.file.seek(self.starts[i])
        return self.file.read(self.sizes[i]).decode()

    def drop(self, positions):
        dropped = set(positions)
        kept = [i not in dropped for i in range(len(self))]
        self.starts = array("q", itertools.compress(self.starts, kept))
        self.sizes = array("q", itertools.compress(self.sizes, kept))


def gather(files, documents, counts):
    """Read and clean all files into `documents`, without those that are empty or repeated."""
    texts = (text for path in files for text in read_documents(path))
    for text in tqdm(texts, "reading", unit=" documents", disable=None, leave=False):
        counts["documents read"] += 1
        text = clean(text, counts)
        if text:
            documents.append(text)
        else:
            counts["empty documents"] += 1
    duplicates = exact_duplicates(documents)
    documents.drop(duplicates)
    counts["exact duplicates"] = len(duplicates)
    counts["documents"], counts["bytes"] = len(documents), sum(documents.sizes)
    if not documents:
        raise ValueError(f"no text in these sources: {counts['empty documents']} empty documents")


def one_side(documents, cuts, split, counts):
    """Yield what choose_cuts gave to a split, document by document, and count it."""
    texts = tqdm(documents, split, unit=" documents", disable=None, leave=False)
    for text, position in zip(texts, cuts):
        text = text[:position] if split == "train" else text[position:]
        if text:
            counts.update(documents=1, bytes=len(text.encode()))
            yield text


def pieces(text):
    """Yield a long text in pieces, cut after a letter or digit that ends a line.

    No token of the usual split patterns reaches across: pieces and whole text have the same ids.
    """
    start = 0
    while found := LINE_END.search(text, start + PIECE_CHARS):
        yield text[start:found.end()]
        start = found.end()
    yield text[start:]


def tokenize(texts, tokenizer):
    """Yield the ids of texts, <|endoftext|> behind each, in large arrays."""
    def marked():
        for text in texts:
            *parts, last = pieces(text)
            yield from ((part, []) for part in parts)
            yield last, [tokenizer.eot]

    group, n_chars = [], 0
    for piece in itertools.chain(marked(), [None]):
        if piece is None or n_chars >= GROUP_CHARS:
            ids = []
            encoded = tokenizer.encode_batch([part for part, _ in group])
            for part_ids, (_, end) in zip(encoded, group):
                ids += part_ids
                ids += end
            yield np.array(ids, np.int64)
            group, n_chars = [], 0
        if piece is not None:
            group.append(piece)
            n_chars += len(piece[0])


def write_split(documents, cuts, split, out, tokenizer):
    """Tokenize and write one split; return what the card says about it."""
    counts = Counter()
    texts = one_side(documents, cuts, split, counts)
    shards = write_shards(tokenize(texts, tokenizer), out, split, tokenizer.n_vocab)
    if not shards:
        raise ValueError(f"no text is left for {split}: give more text or another --val_ratio")
    return dict(counts, tokens=sum(shards.values()), shards=shards)


def learn_tokenizer(documents, cuts, vocab_size, say):
    """Train a tokenizer on the training side; of a very large corpus, on every nth document."""
    start, every = time.perf_counter(), sum(documents.sizes) // LEARN_BYTES + 1
    texts = itertools.islice(one_side(documents, cuts, "train", Counter()), 0, None, every)
    tokenizer = Tokenizer.train(texts, vocab_size)
    fewer = f" (no text for {vocab_size:,})" if tokenizer.n_vocab < vocab_size else ""
    say(f"tokenizer: {tokenizer.n_vocab:,} tokens{fewer}, {time.perf_counter() - start:.1f} s")
    return tokenizer


def load_tokenizer(tokenizer):
    """The tokenizer of a file, or of the name "gpt2"; one that is loaded already comes back."""
    if tokenizer == "gpt2":
        import tiktoken
        try:
            tokenizer = Tokenizer.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except OSError as error:
            raise ValueError("gpt2: no connection to download GPT-2's vocabulary; --tokenizer=FILE "
                             f"takes one from a file ({type(error).__name__})") from None
    elif isinstance(tokenizer, (str, Path)):
        tokenizer = Tokenizer.load(tokenizer)
    if tokenizer.eot is None:
        raise ValueError(f"the tokenizer has no {SEPARATOR}, which must end every document")
    return tokenizer


def fingerprint(files, options):
    """The sha256 of what decides the shards: contents and options, but no names and no dates."""
    parts = [RECIPE, options, [[reader_of(path).__name__, file_hash(path)] for path in files]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_card(out):
    """The card of a shard folder, a dict; None where there is none of ours."""
    try:
        card = json.loads((out / "card.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and "fingerprint" in card else None


def our_files(out):
    """The names of the shards in a folder, begun ones too."""
    return {path.name for path in out.glob("*") if SHARD_NAME.fullmatch(path.name)}


def is_finished(out, key):
    """Whether a folder holds everything that its card lists, and was made for this fingerprint."""
    card = read_card(out)
    if card is None or card["fingerprint"] != key:
        return False
    shards = card["train"]["shards"] | card["val"]["shards"]
    try:
        return (our_files(out) == set(shards)
                and all(len(read_shard(out / name)) == n for name, n in shards.items())
                and Tokenizer.load(out / "tokenizer.json").hash() == card["tokenizer"])
    except (OSError, ValueError):
        return False


def check_folder(out):
    """Refuse a folder that holds anything, but neither our card nor shards of an unfinished run."""
    others = sorted(path.name for path in out.glob("[!.]*"))
    if others and read_card(out) is None and not our_files(out):
        raise ValueError(f"{out} holds other files ({others[0]}): give a new or empty folder")


def clear_folder(out):
    """Remove our card, then our shards: from here to the next card the folder is unfinished."""
    (out / "card.json").unlink(missing_ok=True)
    for name in our_files(out):
        (out / name).unlink()


def finish_folder(out, card, tokenizer, say):
    """Write tokenizer.json and, as the last of all files, card.json."""
    tokenizer.save(out / "tokenizer.json")
    card = dict(card, tokenizer=tokenizer.hash(), vocab_size=tokenizer.n_vocab)
    with replacing(out / "card.json") as file:
        file.write(json.dumps(card, indent=2).encode())
    train, val = card["train"], card["val"]
    ratio = (train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"])
    say(f"{out}: {train['tokens']:,} tokens to train on, {val['tokens']:,} to validate on, "
        f"{ratio:.2f} bytes per token")
    return out


def describe_shard(path, tokenizer):
    """Count the documents, bytes and tokens of a ready shard; refuse ids that are no tokens."""
    ids = read_shard(path)
    counts = dict(documents=0, bytes=0, tokens=len(ids))
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    lengths[tokenizer.eot] = 0
    for part in np.array_split(ids, len(ids) // GROUP_CHARS + 1):
        if len(part) and part.max() >= len(lengths):
            raise ValueError(f"{path}: id {part.max()} is not in a vocabulary of {len(lengths)}")
        counts["documents"] += int((part == tokenizer.eot).sum())
        counts["bytes"] += int(lengths[part].sum())
    return counts


def prepare_ready(name, out, tokenizer, n_shards, say):
    """Download shards that others have tokenized with GPT-2's vocabulary: check, link, describe."""
    url, last = READY[name]["url"], READY[name]["last"]
    if not 1 <= n_shards <= last:
        raise ValueError(f"{name} has 1 to {last} training shards, not {n_shards}")
    tokenizer = load_tokenizer(tokenizer or "gpt2")
    key = fingerprint([], dict(ready=name, n_shards=n_shards, tokenizer=tokenizer.hash()))
    if is_finished(out, key):
        say(f"{out}: used again, {name} with {n_shards} training shards")
        return out
    check_folder(out)
    folder, splits = out.parent / "downloads" / name, {}
    for split, numbers in dict(train=range(1, n_shards + 1), val=[0]).items():
        counts, shards = Counter(), {}
        for number in numbers:
            file = f"{split}_{number:06d}.bin"
            path = download(url + file, folder / file)
            counts.update(describe_shard(path, tokenizer))
            shards[file] = len(read_shard(path))
        splits[split] = dict(counts, shards=shards)
    clear_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    for file in [*splits["train"]["shards"], *splits["val"]["shards"]]:
        try:
            os.link(folder / file, out / file)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / file, out / file)
    card = dict(sources=[dict(name=name)], split="as published", **splits, fingerprint=key)
    return finish_folder(out, card, tokenizer, say)


def build(files, out, title, vocab_size, tokenizer, val_ratio, counts, say):
    """Files to shards; return the tokenizer and what the card says about split, train and val."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent) as file:
        documents = Documents(file)
        gather(files, documents, counts)
        lost = ", ".join(f"{counts[loss]:,} {loss}" for loss in LOSSES if counts[loss])
        plural = "s" if len(documents) > 1 else ""
        say(f"{title}: {len(documents):,} document{plural}, {counts['bytes'] / 1e6:.1f} MB; "
            f"lost: {lost or 'nothing'}")
        cuts, rule = choose_cuts(documents, val_ratio)
        tokenizer = tokenizer or learn_tokenizer(documents, cuts, vocab_size, say)
        clear_folder(out)
        train = write_split(documents, cuts, "train", out, tokenizer)
        return tokenizer, dict(split=rule, train=train,
                               val=write_split(documents, cuts, "val", out, tokenizer))


def prepare(sources, out, vocab_size=4096, tokenizer=None, val_ratio=None, n_shards=1, say=print):
    """Turn sources (names, files, folders, URLs) into a folder of shards and return its Path.

    A folder made from the same content with the same options is used as it is. tokenizer: a file,
    "gpt2" or a Tokenizer; None trains one of vocab_size. n_shards is for ready shards only.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    sources, out, counts = list(map(str, sources)), Path(out), Counter(dict.fromkeys(LOSSES, 0))
    title = " ".join(sources) if len(sources) < 4 else f"{len(sources)} sources"
    if set(sources) & set(READY):
        if len(sources) > 1:
            raise ValueError(f"{title}: ready shards do not mix with another source")
        return prepare_ready(sources[0], out, tokenizer, n_shards, say)
    if val_ratio is not None and not 0 < val_ratio < 1:
        raise ValueError(f"val_ratio={val_ratio} is not between 0 and 1")
    if tokenizer is not None:
        tokenizer, vocab_size = load_tokenizer(tokenizer), None
    found = {source: find_files(source, out.parent / "downloads", counts) for source in sources}
    files = [path for paths in found.values() for path in paths]
    given = tokenizer and tokenizer.hash()
    options = dict(vocab_size=vocab_size, tokenizer=given, val_ratio=val_ratio)
    key = fingerprint(files, options)
    if is_finished(out, key):
        say(f"{out}: used again, the content and the options are the same")
        return out
    check_folder(out)
    tokenizer, made = build(files, out, title, vocab_size, tokenizer, val_ratio, counts, say)
    origin = [dict(name=source, files=len(paths), bytes=sum(path.stat().st_size for path in paths))
              for source, paths in found.items()]
    python = platform.python_version() if "stdlib" in sources else None
    card = dict(sources=origin, python=python, options=options, counts=counts, **made)
    return finish_folder(out, dict(card, fingerprint=key), tokenizer, say)


# -----------------------------------------------------------------------------
# Batches: the shards of a split as one endless stream of shuffled blocks.


class TokenLoader:
    """Endless batches (x, y) of a shard folder: int64 (batch_size, block_size), y one token on.

    A batch depends on (seed, position, rank, world_size) alone: to resume, give the position, which
    is the number of the next batch. The ranks share one global batch: 2 ranks of 4 sequences read
    what 1 rank of 8 reads. Each epoch cuts the tokens at another offset and shuffles the blocks.
    """

    def __init__(self, path, batch_size, block_size, rank=0, world_size=1, seed=0, position=0,
                 split="train"):
        if min(batch_size, block_size) < 1 or not 0 <= rank < world_size or position < 0:
            raise ValueError(f"no batches of batch_size={batch_size}, block_size={block_size}, "
                             f"rank={rank} of world_size={world_size}, position={position}")
        self.shards = read_split(path, split)
        self.starts = np.cumsum([0, *map(len, self.shards)])
        self.n_tokens = int(self.starts[-1])
        if self.n_tokens <= block_size:
            raise ValueError(f"{path}: the {split} split has {self.n_tokens:,} tokens, a block "
                             f"needs {block_size + 1:,}: give more text or a smaller block_size")
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position
        self.n_blocks = max(1, self.n_tokens // block_size - 1)  # they fit at any offset
        self.epoch = None

    def __iter__(self):
        return self

    def __next__(self):
        first = (self.position * self.world_size + self.rank) * self.batch_size
        blocks = np.stack([self.block(first + i) for i in range(self.batch_size)])   # (B, T + 1)
        self.position += 1
        return blocks[:, :-1].astype(np.int64), blocks[:, 1:].astype(np.int64)      # (B, T) twice

    def block(self, number):
        """A sequence of the endless stream, and one token more for y."""
        epoch, i = divmod(number, self.n_blocks)
        if epoch != self.epoch:
            random = np.random.RandomState([self.seed, epoch])  # default_rng may change with numpy
            room = self.n_tokens - self.n_blocks * self.block_size
            self.epoch, self.offset = epoch, random.randint(min(room, self.block_size))
            self.order = random.permutation(self.n_blocks)
        start = self.offset + int(self.order[i]) * self.block_size
        return self.tokens(start, start + self.block_size + 1)

    def tokens(self, start, stop):
        """Tokens start to stop of the split, over the ends of shards."""
        parts, i = [], int(np.searchsorted(self.starts, start, "right")) - 1
        while start < stop:
            begin = start - self.starts[i]
            parts.append(self.shards[i][begin:begin + stop - start])
            start, i = start + len(parts[-1]), i + 1
        return np.concatenate(parts)


# -----------------------------------------------------------------------------
# The command.


def folder_name(source):
    """What to call the shards of a source: folder_name("texts/My book.txt.gz") == "My-book"."""
    path = urllib.parse.urlsplit(source).path if "://" in source else Path(source).absolute()
    return re.sub(r"[^\w-]+", "-", Path(path).name.split(".")[0]).strip("-") or "text"


def main():
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="*", default=["stdlib"], metavar="SOURCE",
                        help=f"files, folders, URLs, or names: {', '.join(NAMES)} (default stdlib)")
    parser.add_argument("--out", help="folder to write (default shards/NAME OF THE FIRST SOURCE)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="default %(default)s")
    parser.add_argument("--tokenizer", help="use this tokenizer.json, or gpt2, and train none")
    parser.add_argument("--val_ratio", type=float,
                        help="share to validate on (default 0.05 of all documents, or 0.1 of each "
                             f"when there are fewer than {FEW_DOCUMENTS})")
    parser.add_argument("--shards", type=int, default=1, dest="n_shards", metavar="N",
                        help="training shards of fineweb10B, 200 MB each (default %(default)s)")
    args = parser.parse_intermixed_args()
    out = args.out or Path("shards", folder_name(args.sources[0]))
    out = prepare(args.sources, out, args.vocab_size, args.tokenizer, args.val_ratio, args.n_shards)
    print(f"next: python train.py --data={out}")


if __name__ == "__main__":
    run_command(main)
