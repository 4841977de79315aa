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
import html
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
import urllib.parse
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import SPECIAL_TOKENS, Parser, Tokenizer, replacing, room_for_merges, run_command

RECIPE = 1  # part of each fingerprint: raised when the same content would give other shards
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
LONG_TEXT = 1 << 21  # characters; a .txt file of a longer text is read as several documents
GROUP_CHARS = 1 << 23  # text tokenized at a time: the ids of a large corpus must not fill memory
LEARN_BYTES = 200_000_000  # a tokenizer learns from a sample of this size: more changes little
FEW_DOCUMENTS = 20  # below this, each document gives its end to validation
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


def read_txt(file):
    """Yield the documents of a .txt file, one or many; parts of those longer than LONG_TEXT."""
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


HIDDEN = re.compile(r"(?is)<!--.*?-->|<(script|style|template)\b.*?</\1\s*>")
PRE = re.compile(r"(?is)<pre\b[^>]*>(.*?)</pre\s*>")  # the one place where white space counts
TAG = re.compile(r"""</?([a-zA-Z!?][^\s/>]*)(?:"[^"]*"|'[^']*'|[^>"'])*>""")
INLINE = set("a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark "
             "q s samp small span strike strong sub sup time tt u var wbr".split())


def html_to_text(page):
    """The visible text of a web page: html_to_text(b"<p>a &lt; <b>b</b>").strip() == "a < b"."""
    parts = PRE.split(HIDDEN.sub("", page.decode("utf-8-sig", "surrogateescape")))
    for i, part in enumerate(parts):
        part = part if i % 2 else re.sub(r"\s+", " ", part)
        part = TAG.sub(lambda tag: "" if tag[1].lower() in INLINE else "\n", part)
        if i % 2 == 0:
            part = re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", part)
        parts[i] = html.unescape(part)
    return "\n".join(parts)


READERS = {
    ".txt": read_txt,
    ".md": lambda file: [file.read()],
    ".py": lambda file: [file.read()],
    ".jsonl": read_jsonl,
    ".html": lambda file: [html_to_text(file.buffer.read())],
}


def ending(path):
    """What says how a file is read: ending("notes.TXT.gz") == ".txt"."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


@contextlib.contextmanager
def open_text(path):
    """Open a text file, plain or .gz, line ends as they are. Raises ValueError for any other file.

    A byte that is not UTF-8 arrives as a lone surrogate, for clean() to count and replace.
    """
    if ending(path) not in READERS:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without an ending'}, only "
                         f"{' '.join(READERS)}, each also as .gz")
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


def read_documents(path):
    """Yield the documents of one file, as they are, one by one."""
    path = Path(path)
    with open_text(path) as file:
        is_topics = path.parts[-2:] == ("pydoc_data", "topics.py")
        yield from read_topics(file) if is_topics else READERS[ending(path)](file)


# -----------------------------------------------------------------------------
# Sources: a name, a file, a folder or a URL becomes a list of files.


def file_hash(path):
    """The sha256 of a file's content, in hex."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def receive(url, part):
    """Append what is missing of url to the file `part`; return the size that it should then have."""
    n_done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "data.py (urllib)"} | ({"Range": f"bytes={n_done}-"} if n_done else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            n_done = n_done if response.status == 206 else 0  # 200: this server sends all of it
            total = n_done + int(response.headers.get("Content-Length") or 0)
            bar = dict(desc=part.stem, total=total, initial=n_done, disable=None)
            with open(part, "ab" if n_done else "wb") as file:
                shutil.copyfileobj(response, tqdm.wrapattr(file, "write", **bar))
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # it is no part of this file
            part.unlink(missing_ok=True)
        raise ValueError(f"{url}: {error}; check it and start again, or take stdlib, "
                         "which needs no network") from None
    return total


def download(url, path, n_bytes=None, sha256=None):
    """Fetch url to path, unless it is there; what was cut off continues where it stopped.

    Raises ValueError without a connection or page, or with another size or sha256 than given.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    whole = part.exists() and part.stat().st_size == n_bytes
    total, n_done = n_bytes if whole else receive(url, part), part.stat().st_size
    if n_done < (n_bytes or total):
        raise ValueError(f"{url}: cut off at {n_done:,} of {n_bytes or total:,} bytes; "
                         "start again to go on")
    if n_done != (n_bytes or n_done) or sha256 not in (None, file_hash(part)):
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


def download_ready(name, folder, n_shards):
    """Download a row of READY: the shard to validate on, and n_shards to train on."""
    url, last = READY[name]["url"], READY[name]["last"]
    if not 1 <= n_shards <= last:
        raise ValueError(f"{name} has 1 to {last} training shards, not {n_shards}")
    names = ["val_000000.bin"] + [f"train_{i:06d}.bin" for i in range(1, n_shards + 1)]
    return [download(url + file, folder / name / file) for file in names]


def is_readable(path):
    """Whether a file is text that we can read, judged by its name and its beginning."""
    try:
        with open_text(path) as file:
            return bool(file.read(1))
    except ValueError:
        return False


def text_files(folder, counts, skip=()):
    """The readable files below a folder, in a fixed order, without hidden and `skip` folders."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and name[0] != ".")
        paths = [Path(place, name) for name in sorted(names) if name[0] != "."]
        found += [path for path in paths if path.is_file()]
    files = [path for path in found if is_readable(path)]
    counts["skipped files"] += len(found) - len(files)
    if not files:
        raise ValueError(f"{folder}: a folder without text (only {' '.join(READERS)} are read)")
    return files


def find_files(source, downloads, counts, n_shards=1):
    """The files of one source, in a fixed order. Raises ValueError where there is none."""
    path = Path(source)
    if source == "stdlib":
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = text_files(sysconfig.get_paths()["stdlib"], Counter(), skip)
        return [file for file in files if file.suffix == ".py"]
    if source in KNOWN:
        return [download_known(source, downloads)]
    if source in READY:
        return download_ready(source, downloads, n_shards)
    if re.match("https?://", source):
        return [download_page(source, downloads)]
    if path.is_dir():
        return text_files(path, counts)
    if path.exists():
        return [path]
    beside = map(str, path.parent.glob("*"))
    near = difflib.get_close_matches(source, [*NAMES, *beside], 1)
    raise ValueError(f"{source}: no such file or folder, and not one of {', '.join(NAMES)}"
                     + (f"; did you mean {near[0]}?" if near else ""))


# -----------------------------------------------------------------------------
# Cleaning: the same text in one spelling, and once.

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


# -----------------------------------------------------------------------------
# Shards: a header of 256 int32 (magic, version, number of tokens), then the tokens. This is llm.c's
# format: its shards can be read here, and ours there.

HEADER_BYTES = 1024
FORMATS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # type of a token: magic, version


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
    kind = {row: kind for kind, row in FORMATS.items()}.get((magic, version))
    if kind is None:
        raise ValueError(f"{path}: not a token shard that can be read (magic {magic}, version "
                         f"{version}; known are {' and '.join(map(str, FORMATS.values()))})")
    size, expected = os.path.getsize(path), HEADER_BYTES + n_tokens * np.dtype(kind).itemsize
    if n_tokens < 1 or size != expected:
        raise ValueError(f"{path}: damaged, {size:,} bytes where {n_tokens:,} tokens need "
                         f"{expected:,}; delete it and run data.py again")
    return np.memmap(path, kind, "r", HEADER_BYTES, n_tokens)


def read_split(folder, split="train"):
    """All tokens of a split, as a list of memory maps in order."""
    paths = sorted(Path(folder).glob(f"{split}_??????.bin"))
    if not paths:
        raise ValueError(f"{folder}: no {split} shards; data.py SOURCE --out={folder} writes them")
    return [read_shard(path) for path in paths]


# -----------------------------------------------------------------------------
# From text to shards, one stage after the other.


class Documents:
    """A list of texts that lies in a file, because a corpus may be larger than memory."""

    def __init__(self, file, starts, ends):
        self.file, self.starts, self.ends = file, starts[starts < ends], ends[starts < ends]
        self.n_bytes = int((ends - starts).sum())

    @classmethod
    def store(cls, texts, file):
        """Write texts to an empty binary file; those without a character are left out."""
        sizes = np.array(array("q", (file.write(text.encode()) for text in texts)))
        return cls(file, sizes.cumsum() - sizes, sizes.cumsum())

    def without(self, positions):
        """The list without the texts at these positions."""
        return Documents(self.file, *np.delete([self.starts, self.ends], positions, axis=1))

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        self.file.seek(self.starts[i])
        return self.file.read(self.ends[i] - self.starts[i]).decode()


def clean_documents(files, counts):
    """Yield the documents of all files, cleaned; what is lost by that is added to `counts`."""
    texts = (text for path in files for text in read_documents(path))
    for text in tqdm(texts, "reading", unit=" documents", disable=None, leave=False):
        text = clean(text, counts)
        counts.update({"documents read": 1, "empty documents": not text})
        yield text


def split(documents, val_ratio=None):
    """Return (train, val, rule): two Documents, and in words what decides between them.

    Whole documents go by their own hash, so none changes sides when others come or go.
    """
    starts, ends = documents.starts, documents.ends
    if len(documents) < FEW_DOCUMENTS:
        ratio, cuts = val_ratio or 0.1, starts.copy()
        for i, text in enumerate(documents):
            position = round(len(text) * (1 - ratio))
            line_end = text.rfind("\n", position * 9 // 10, position) + 1
            cuts[i] += len(text[:line_end or position].encode())
        rule = f"fewer than {FEW_DOCUMENTS} documents: the last {ratio:.0%} of each validates"
    else:
        ratio = val_ratio or 0.05
        fractions = np.array([int.from_bytes(text_hash(text)[:8], "big") / 2**64
                              for text in documents])
        cuts = np.where(fractions > max(ratio, fractions.min()), ends, starts)
        rule = f"documents with a sha256 (as a fraction of 1) below {ratio} validate, at least one"
    train, val = Documents(documents.file, starts, cuts), Documents(documents.file, cuts, ends)
    if not train or not val:
        raise ValueError(f"{documents.n_bytes:,} bytes in {len(documents)} documents cannot be "
                         f"split into train and val: give more text or another val_ratio")
    return train, val, rule


def learn_tokenizer(documents, vocab_size, say):
    """Train a tokenizer; of a very large corpus, on every nth document."""
    start, every = time.perf_counter(), documents.n_bytes // LEARN_BYTES + 1
    tokenizer = Tokenizer.train(itertools.islice(documents, 0, None, every), vocab_size)
    fewer = f" (no text for {vocab_size:,})" if tokenizer.n_vocab < vocab_size else ""
    say(f"tokenizer: {tokenizer.n_vocab:,} tokens{fewer}, {time.perf_counter() - start:.1f} s")
    return tokenizer


def take(texts, n_chars):
    """The next texts of an iterator, until they have n_chars characters."""
    taken = []
    for text in texts:
        taken.append(text)
        n_chars -= len(text)
        if n_chars <= 0:
            break
    return taken


def tokenize(texts, tokenizer):
    """Yield the ids of texts, <|endoftext|> behind each, in large arrays; all cores do it."""
    texts = iter(texts)
    while group := take(texts, GROUP_CHARS):
        encoded = tokenizer.encode_batch(group)
        yield np.array([id for ids in encoded for id in (*ids, tokenizer.eot)])


def build(found, out, vocab_size, tokenizer, val_ratio, counts, say):
    """Files to shards in `out`; return the tokenizer and what the card says about the splits."""
    title = " ".join(found) if len(found) < 4 else f"{len(found)} sources"
    files = itertools.chain(*found.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent) as file:
        documents = Documents.store(clean_documents(files, counts), file)
        duplicates = exact_duplicates(documents)
        documents = documents.without(duplicates)
        counts.update({"exact duplicates": len(duplicates), "documents": len(documents),
                       "bytes": documents.n_bytes})
        if not documents:
            raise ValueError(f"{title}: no text in it, {counts['empty documents']} empty documents")
        lost = ", ".join(f"{counts[loss]:,} {loss}" for loss in LOSSES if counts[loss])
        plural = "s" if len(documents) > 1 else ""
        say(f"{title}: {len(documents):,} document{plural}, {documents.n_bytes / 1e6:.1f} MB; "
            f"lost: {lost or 'nothing'}")
        train, val, rule = split(documents, val_ratio)
        tokenizer = tokenizer or learn_tokenizer(train, vocab_size, say)
        clear_folder(out)
        card = dict(split=rule)
        for name, texts in dict(train=train, val=val).items():
            bar = tqdm(texts, name, unit=" documents", disable=None, leave=False)
            shards = write_shards(tokenize(bar, tokenizer), out, name, tokenizer.n_vocab)
            card[name] = dict(documents=len(texts), bytes=texts.n_bytes,
                              tokens=sum(shards.values()), shards=shards)
        return tokenizer, card


def link_ready(files, out, tokenizer):
    """Put shards that others have tokenized into `out`; return what the card says about them."""
    card, n_vocab = dict(split="as published"), tokenizer.n_vocab
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    lengths[tokenizer.eot] = 0
    for name in "train", "val":
        shards = {path.name: read_shard(path) for path in files if path.name.startswith(name)}
        uses = np.zeros(n_vocab, np.int64)  # of each token
        for ids in shards.values():
            for part in np.array_split(ids, len(ids) // GROUP_CHARS + 1):
                if part.max() >= n_vocab:
                    raise ValueError(f"{name} shards: id {part.max()} is not in a vocabulary of "
                                     f"{n_vocab}; give the tokenizer that they were made with")
                uses += np.bincount(part, minlength=n_vocab)
        card[name] = dict(documents=int(uses[tokenizer.eot]), bytes=int(uses @ lengths),
                          tokens=int(uses.sum()), shards={key: len(shards[key]) for key in shards})
    clear_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        try:
            os.link(path, out / path.name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, out / path.name)
    return card


# -----------------------------------------------------------------------------
# Preparing: a finished folder of shards, made anew only when it has to be.

SHARD_NAME = re.compile(r"(train|val)_\d{6}\.bin(\.part)?")


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
    parts = [RECIPE, options, [[ending(path), file_hash(path)] for path in files]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_finished(out, key):
    """Whether a folder was made for this fingerprint and holds all that its card lists."""
    try:
        card = json.loads((out / "card.json").read_text("utf-8"))
        shards = card["train"]["shards"] | card["val"]["shards"]
        return (card["fingerprint"] == key
                and all(len(read_shard(out / name)) == n for name, n in shards.items())
                and Tokenizer.load(out / "tokenizer.json").hash() == card["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_folder(out):
    """Refuse a folder that holds files, but no shard: it is somebody else's."""
    names = sorted(path.name for path in out.glob("[!.]*"))
    if names and not any(map(SHARD_NAME.fullmatch, names)):
        raise ValueError(f"{out} holds other files ({names[0]}): give a new or empty folder")


def clear_folder(out):
    """Remove what an earlier run wrote, the card first: without it a folder is unfinished."""
    ours = [path for path in out.glob("*") if SHARD_NAME.fullmatch(path.name)]
    for path in [out / "card.json", out / "tokenizer.json", *ours]:
        path.unlink(missing_ok=True)


def prepare(sources, out, vocab_size=4096, tokenizer=None, val_ratio=None, n_shards=1, say=print):
    """Turn sources (names, files, folders, URLs) into a folder of shards and return its Path.

    A folder made from the same content with the same options is used as it is. tokenizer: a file,
    "gpt2" or a Tokenizer; None trains one of vocab_size. n_shards is for ready shards only.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    sources, out, counts = list(map(str, sources)), Path(out), Counter(dict.fromkeys(LOSSES, 0))
    ready = sources[0] in READY
    if len(sources) > 1 and set(sources) & set(READY):
        raise ValueError(f"{' '.join(sources)}: ready shards do not mix with another source")
    if val_ratio is not None and not 0 < val_ratio < 1:
        raise ValueError(f"val_ratio={val_ratio} is not between 0 and 1")
    if tokenizer is not None or ready:
        tokenizer, vocab_size = load_tokenizer(tokenizer or "gpt2"), None
    else:
        room_for_merges(vocab_size, SPECIAL_TOKENS)  # refuses a small one before all the work
    downloads = out.parent / "downloads"
    found = {source: find_files(source, downloads, counts, n_shards) for source in sources}
    files = [path for paths in found.values() for path in paths]
    options = dict(vocab_size=vocab_size, tokenizer=tokenizer and tokenizer.hash(),
                   val_ratio=val_ratio)
    key = fingerprint(files, options)
    if is_finished(out, key):
        say(f"{out}: used again, the content and the options are the same")
        return out
    check_folder(out)
    if ready:
        made = link_ready(files, out, tokenizer)
    else:
        tokenizer, made = build(found, out, vocab_size, tokenizer, val_ratio, counts, say)
    tokenizer.save(out / "tokenizer.json")
    origin = [dict(name=source, files=len(paths), bytes=sum(path.stat().st_size for path in paths))
              for source, paths in found.items()]
    card = dict(sources=origin, python=platform.python_version() if "stdlib" in sources else None,
                options=options, counts=counts, **made, fingerprint=key,
                tokenizer=tokenizer.hash(), vocab_size=tokenizer.n_vocab)
    with replacing(out / "card.json") as file:
        file.write(json.dumps(card, indent=2).encode())
    train, val = made["train"], made["val"]
    ratio = (train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"])
    say(f"{out}: {train['tokens']:,} tokens to train on, {val['tokens']:,} to validate on, "
        f"{ratio:.2f} bytes per token")
    return out


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
