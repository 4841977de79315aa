"""
Documents to batches: read, clean, drop duplicates, split, tokenize, write shards, read them back.

    python data.py                               # Python's own standard library, no network needed
    python data.py book.txt notes/ https://example.org/book.txt --out=shards/mine
    python data.py shakespeare                   # or tinystories, wikitext, fineweb10B

A source is a name, a file, a folder or a URL. A file is .txt .md .py or .jsonl (field "text"), each
also as .gz; a .txt file may hold many documents, <|endoftext|> between them. The result, never
changed, and used again for the same content and options: tokenizer.json, train_000000.bin ...,
val_000000.bin ... and card.json, which says what went in and what was lost.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import ast
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from tokenizer import (QUIET, SPECIAL_TOKENS, Parser, Tokenizer, check_fields, read_json, reading,
                       refuse_idle, replacing, room_for_merges, run_command, write_json)

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
LONG_TEXT = 1 << 21  # characters; a .txt file of a longer text is read as several documents
GROUP_BYTES = 1 << 23  # text tokenized at a time: the ids of a large corpus must not fill memory
LEARN_BYTES = 200_000_000  # a tokenizer learns from a sample of this size: more changes little
PAGE_ENDINGS = ".html", ".htm", ".xhtml", ".xht", ".shtml"
PAGES = "python -m chapters.curate PAGE --out=FOLDER makes .txt files of web pages"

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
                 "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
}
FINEWEB = HUB + "kjj0/fineweb10B-gpt2/resolve/main/fineweb_"  # ready shards, behind these words
NAMES = ["stdlib", *KNOWN, "fineweb10B"]

# -----------------------------------------------------------------------------
# Reading and cleaning: a file becomes documents, one str each, in one spelling.


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
        with reading(f"{file.name}, line {number}"):
            if line.strip():
                yield json.loads(line)["text"] + ""  # a TypeError for what is no str


def read_whole(file):
    """Yield the one document of a file; of pydoc_data/topics.py, a big dict, the texts in it."""
    if Path(file.name).parts[-2:] == ("pydoc_data", "topics.py"):
        yield from ast.literal_eval(ast.parse(file.read()).body[0].value).values()
    else:
        yield file.read()


READERS = {".txt": read_txt, ".md": read_whole, ".py": read_whole, ".jsonl": read_jsonl}


def ending(path):
    """What says how a file is read: ending("notes.TXT.gz") == ".txt"."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def is_readable(path):
    """Whether a path is a regular file, or a link to one, that the user may read."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


def read_documents(path):
    """Yield the documents of one file, plain or .gz, as they are; ValueError for any other file.
    A byte that is not UTF-8 arrives as a lone surrogate, for clean() to count and replace."""
    path, kind = Path(path), ending(path)
    if not is_readable(path):
        raise ValueError(f"{path}: no such file, or one that you may not read, or a pipe")
    if kind not in READERS:
        raise ValueError(f"{path}: can read only {' '.join(READERS)}, each also as .gz, not "
                         f"{kind or 'a name without'}{f'; {PAGES}' * (kind in PAGE_ENDINGS)}")
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    how = dict(encoding="utf-8-sig", errors="surrogateescape", newline="")
    with reading(path), opened(path, "rt", **how) as file:
        if b"\0" in file.buffer.peek(8192)[:8192]:
            raise ValueError(f"{path} is a binary file, not text, which must be UTF-8: for UTF-16, "
                             f"iconv -f UTF-16 -t UTF-8 {path} > NEW.txt")
        yield from READERS[kind](file)


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
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    counts["control characters"] += len(text)
    if CONTROLS.search(text):  # most texts have none
        text = CONTROLS.sub("", OVERSTRUCK.sub("", ESCAPES.sub("", text)))
    counts["control characters"] -= len(text)
    if not text.isascii():
        text, n_replaced = re.subn("[\ud800-\udfff]", "\ufffd", text)
        counts["replaced bytes"] += n_replaced
        text = unicodedata.normalize("NFC", text)
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


def file_hash(path):
    """The sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, path, sha256=None):
    """Fetch url to path, unless it is there; what was cut off continues where it stopped. Raises
    ValueError without a connection, for a page unless path is .html, for a wrong sha256."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    n_done = max(0, part.stat().st_size - 1) if part.exists() else 0  # to ask for none is an error
    request = Request(url, headers={"User-Agent": "data.py (urllib)", "Range": f"bytes={n_done}-"})
    try:
        with urlopen(request, timeout=30) as response:
            if response.headers.get_content_type() == "text/html" and path.suffix != ".html":
                raise ValueError(f"{url} is a web page, not text; {PAGES}")
            n_done = n_done if response.status == 206 else 0  # 200: this server sends all of it
            n_bytes = n_done + int(response.headers.get("Content-Length") or 0)
            bar = dict(desc=path.name, total=n_bytes, initial=n_done, **QUIET)
            with open(part, "ab") as file, tqdm.wrapattr(file, "write", **bar) as counted:
                file.truncate(n_done)
                shutil.copyfileobj(response, counted)
                if file.seek(0, os.SEEK_END) < n_bytes:
                    raise OSError(f"cut off at {file.tell():,} of {n_bytes:,} bytes")
    except (OSError, HTTPException) as error:
        raise ValueError(f"{url}: {error}; start again to go on, or take stdlib") from None
    if sha256 not in (None, file_hash(part)):
        part.unlink()
        raise ValueError(f"{url} has not the expected sha256 {sha256}: removed")
    return part.replace(path)


def walk(folder, skip=(), seen=None):
    """Yield the files below a folder, in a fixed order, without hidden and `skip` ones. Links to
    folders are followed, but none to one that was read or lies around this one."""
    seen = {*folder.resolve().parents} if seen is None else seen
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or path.name in skip:
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen and os.access(path, os.R_OK | os.X_OK):
            yield from walk(path, skip, seen)


def find_files(source, downloads, n_shards=1):
    """The files of one source, in a fixed order. Raises ValueError where there is none."""
    if source == "stdlib":  # without encodings, whose tables teach a small model to write tables
        skip = "test tests idle_test site-packages dist-packages encodings".split()
        return [path for path in walk(Path(os.__file__).parent, skip) if path.suffix == ".py"]
    if source == "fineweb10B":
        names = ["val_000000.bin"] + [f"train_{i:06d}.bin" for i in range(1, n_shards + 1)]
        return [download(FINEWEB + name, downloads / source / name) for name in names]
    if re.match("https?://", source):
        name = re.sub(r"[^\w.-]+", "-", Path(urlsplit(source).path).name)
        name += "" if ending(name) in READERS else ".txt"
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
    if not (path := Path(source)).exists():
        raise ValueError(f"{source}: no such file or folder, and not one of {', '.join(NAMES)}")
    return [*walk(path)] if path.is_dir() else [path]


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
    sources: list     # of {"name", "files", "skipped": [name and reason]}
    python: str       # the version, which decides what stdlib is
    options: dict     # of prepare()
    counts: dict      # documents and bytes, and what was lost
    split: str        # in words, what decides which documents validate
    train: dict       # {"documents", "bytes", "tokens"}
    val: dict
    tokenizer: str    # its hash()
    vocab_size: int
    checksums: dict   # {file name: sha256}

    def __post_init__(self):
        counts = [split.get(n) for split in (self.train, self.val) for n in ("tokens", "bytes")]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("train and val must have tokens and bytes, whole numbers above 0")


def read_card(folder):
    """The Card of a folder of shards; ValueError that names the field that is wrong."""
    path = Path(folder, "card.json")
    return check_fields(Card, read_json(path), path)


def check_shards(folder, splits=("train", "val")):
    """The Card of a folder of shards; ValueError unless these splits are as they were written."""
    card = read_card(folder)
    names = {path.name for path in Path(folder).glob("*.bin")} | card.checksums.keys()
    for path in [Path(folder, name) for name in sorted(names) if name.startswith(splits)]:
        if file_hash(path) != card.checksums.get(path.name):
            raise ValueError(f"{path} is damaged (wrong checksum): run data.py again")
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


def gather(found, file):
    """Read and clean all files into one -> (Documents, each text once; the sources, as a card has
    them; counts of what is lost). A file that cannot be read is left out, whole; where its source
    has no other, a ValueError."""
    sources, sizes, counts = [], [], Counter()
    for source, paths in found.items():
        skipped = []
        for path in tqdm(paths, "read", unit=" files", **QUIET):
            start, n_before, n_chars, lost = file.tell(), len(sizes), 0, Counter()
            try:
                for text in read_documents(path):
                    text = clean(text, lost)
                    n_chars += len(text)
                    sizes.append(file.write(text.encode()))
                if lost["replaced bytes"] > n_chars / 100:
                    raise ValueError(f"{path}: {lost['replaced bytes'] / n_chars:.0%} of its "
                                     "characters are not UTF-8: convert it, if it is KOI8-R by "
                                     f"iconv -f KOI8-R -t UTF-8 {path} > NEW.txt")
                counts.update(lost)
            except ValueError as error:
                if len(paths) == 1:
                    raise
                file.seek(start)
                del sizes[n_before:]
                skipped.append("".join(c if c.isprintable() else " " for c in str(error))[:200])
        n_files = len(paths) - len(skipped)
        sources.append(dict(name=source, files=n_files, skipped=skipped[:100]))
        counts["skipped files"] += len(skipped)
    ends = np.cumsum(sizes, dtype=np.int64)
    documents = Documents(file, ends - sizes, ends)
    repeated = exact_duplicates(documents)
    counts["empty documents"] += len(sizes) - len(documents)
    counts["exact duplicates"] += len(repeated)
    unique = np.delete([documents.starts, documents.ends], repeated, axis=1)
    return Documents(file, *unique), sources, counts


def split(documents, val_ratio=None):
    """Return Documents to train on, Documents to validate on, and in words what decides. Whole
    documents go by their own hash, so none changes sides when others come or go."""
    starts, ends, are_few = documents.starts, documents.ends, len(documents) < 20
    ratio = val_ratio or (0.1 if are_few else 0.05)
    if are_few:
        rule = f"fewer than 20 documents: the last {ratio:.0%} of each validates"
        cuts = starts + [len(text[:int(len(text) * (1 - ratio))].encode()) for text in documents]
    else:
        rule = f"documents with a sha256 (as a fraction of 1) below {ratio} validate, at least one"
        hashes = [int.from_bytes(text_hash(text)[:8], "big") / 2**64 for text in documents]
        cuts = np.where(np.array(hashes) > max(ratio, min(hashes)), ends, starts)
    train, val = Documents(documents.file, starts, cuts), Documents(documents.file, cuts, ends)
    if not train or not val:
        raise ValueError(f"{documents.n_bytes:,} bytes of text do not split at val_ratio={ratio}")
    return train, val, rule


def tokenize(documents, tokenizer):
    """Yield the ids of documents, each behind <|endoftext|>, in large arrays, with every core."""
    texts = tqdm(documents, "tokenize", unit=" documents", **QUIET)
    groups = (documents.ends - documents.starts).cumsum() // GROUP_BYTES
    for _, group in itertools.groupby(zip(groups, texts), lambda pair: pair[0]):
        encoded = tokenizer.encode_batch(text for _, text in group)
        yield np.array([id for ids in encoded for id in (tokenizer.eot, *ids)])


def count_tokens(shards, tokenizer):
    """How many documents, bytes of text and tokens are in shards."""
    parts = (part for ids in shards for part in np.array_split(ids, len(ids) // GROUP_BYTES + 1))
    uses = sum(np.bincount(part, minlength=tokenizer.n_vocab) for part in parts)      # (n_vocab,)
    lengths = np.array([len(token) for token in tokenizer.token_bytes()])             # (n_vocab,)
    lengths[tokenizer.eot] = 0
    return dict(documents=int(uses[tokenizer.eot]), bytes=int(uses @ lengths),
                tokens=int(uses.sum()))


@contextlib.contextmanager
def locked(folder):
    """Keep other processes out of a folder, as long as this one lives; ValueError if one is in."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, ".lock"), "ab") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder} is in use by another process: wait for its end") from None
        except OSError:  # some network file systems know no locks
            pass
        yield


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


def is_free(folder, fingerprint):
    """Whether shards may go to a folder: it is new, or empty, or holds the same ones."""
    with contextlib.suppress(OSError, ValueError):
        return read_card(folder).fingerprint == fingerprint
    return not folder.is_file() and not any(folder.glob("[!.]*"))


@contextlib.contextmanager
def new_shards(folder, fingerprint):
    """A hidden folder to write shards into: complete, it gets its name or, where that is an empty
    folder or one of these shards, damaged, its files go there. After an error it is gone."""
    real = folder.resolve()
    part = real.with_name(f".{real.name}.part")
    with locked(part):
        try:
            if not is_free(folder, fingerprint):
                raise ValueError(f"{folder} holds other shards or files: choose another --out")
            for path in part.glob("[!.]*"):  # of a process that was killed
                path.unlink()
            yield part
            with contextlib.suppress(PermissionError):  # Windows renames no folder in use
                if not real.exists():
                    part.replace(real)
            if part.exists():
                real.mkdir(exist_ok=True)
                for path in real.glob("*.bin"):  # whoever has opened it reads on
                    path.unlink()
                for path in sorted(part.glob("[!.]*"), reverse=True):  # card.json is the last
                    path.replace(real / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def build(folder, fingerprint, found, tokenizer, options, say):
    """All stages: read, clean, split, train a tokenizer, write the shards and, last, the card."""
    with (new_shards(folder, fingerprint) as out,
          tempfile.TemporaryFile(dir=out.parent) as file):
        if "fineweb10B" in found:
            val, *train = map(read_shard, found["fineweb10B"])
            sources = [dict(name="fineweb10B", files=1 + len(train), skipped=[])]
            splits, counts, rule = dict(train=train, val=[val]), {}, "as published"
        else:
            documents, sources, counts = gather(found, file)
            lost = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n) or "nothing"
            say(f"{len(documents):,} documents, {documents.n_bytes / 1e6:.1f} MB; lost: {lost}")
            for line in [line for source in sources for line in source["skipped"][:3]]:
                say(f"skipped: {line}")
            counts.update(documents=len(documents), bytes=documents.n_bytes)
            train, val, rule = split(documents, options["val_ratio"])
            if tokenizer is None:
                sample = itertools.islice(train, 0, None, train.n_bytes // LEARN_BYTES + 1)
                tokenizer = Tokenizer.train(sample, options["vocab_size"])
                say(f"tokenizer: {tokenizer.n_vocab:,} of {options['vocab_size']:,} tokens")
            splits = dict(train=tokenize(train, tokenizer), val=tokenize(val, tokenizer))
        card = dict(fingerprint=fingerprint, sources=sources, python=platform.python_version(),
                    options=options, counts=counts, split=rule)
        for name, arrays in splits.items():
            write_shards(arrays, out, name, tokenizer.n_vocab)
            counted = card[name] = count_tokens(read_split(out, name), tokenizer)
            say(f"{name}: {counted['tokens']:,} tokens for {counted['bytes']:,} bytes")
        tokenizer.save(out / "tokenizer.json")
        checksums = {path.name: file_hash(path) for path in sorted(out.glob("[!.]*"))}
        write_json(out / "card.json", card | dict(
            tokenizer=tokenizer.hash(), vocab_size=tokenizer.n_vocab, checksums=checksums))


def prepare(sources, out=None, vocab_size=4096, tokenizer=None, val_ratio=None, n_shards=1,
            say=print):
    """Turn sources (names, files, folders, URLs) into a folder of shards, if there is none yet ->
    its Path: `out`, or shards/NAME OF THE FIRST, where that holds other content with a part of the
    fingerprint. tokenizer: a file, "gpt2" or a Tokenizer; None trains one of vocab_size."""
    sources = [*map(str, [sources] if isinstance(sources, (str, Path)) else sources)]
    if "" in sources or "fineweb10B" in sources[1:] + sources[:-1]:
        raise ValueError(f"{sources}: each must have a name; ready shards do not mix with others")
    if val_ratio is not None and not 0 < val_ratio < 1:
        raise ValueError(f"val_ratio={val_ratio} must be above 0 and below 1")
    if not 1 <= n_shards <= 103:
        raise ValueError(f"fineweb10B has 1 to 103 training shards, not {n_shards}")
    if tokenizer is not None or "fineweb10B" in sources:
        tokenizer, vocab_size = load_tokenizer("gpt2" if tokenizer is None else tokenizer), None
    else:
        room_for_merges(vocab_size, SPECIAL_TOKENS)  # a ValueError before anything is read
    folder = Path("shards", folder_name(sources[0])) if out is None else Path(out)
    found = {name: find_files(name, folder.parent / "downloads", n_shards) for name in sources}
    options = dict(vocab_size=vocab_size, tokenizer=tokenizer and tokenizer.hash(),
                   val_ratio=val_ratio, version=2)  # raised when the same gives other shards
    contents = [[ending(path), file_hash(path)] for paths in found.values() for path in paths
                if "fineweb10B" in found or ending(path) in READERS and is_readable(path)]
    fingerprint = text_hash(json.dumps([options, contents])).hex()
    if out is None and not is_free(folder, fingerprint):
        folder = Path(f"{folder}-{fingerprint[:8]}")
    with contextlib.suppress(OSError, ValueError):  # of a folder that is not there or not whole
        if check_shards(folder, ("train", "val", "token")).fingerprint == fingerprint:
            say(f"{folder}: used again, the content and the options are the same")
            return folder
    build(folder, fingerprint, found, tokenizer, options, say)
    return folder


class TokenLoader(Iterator):
    """Endless batches (x, y) of a shard folder: int64 (batch_size, block_size), y one token on. A
    batch depends on (seed, position, rank, world_size) alone; position is the number of the next.
    The ranks share one global batch: 2 ranks of 4 sequences read what 1 rank of 8 reads. Each epoch
    reads all tokens, cut at another offset, in shuffled blocks."""

    def __init__(self, path, batch_size, block_size, rank=0, world_size=1, seed=0, position=0,
                 split="train"):
        self.shards = read_split(path, split)
        self.starts = np.cumsum([0, *map(len, self.shards)])
        self.n_tokens = int(self.starts[-1])
        if self.n_tokens <= block_size:
            raise ValueError(f"{path}: {split} has {self.n_tokens:,} tokens, a block needs "
                             f"{block_size + 1:,}: give more text or a smaller block_size")
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position
        # The first block begins at the first token, the last ends at the last one, at any offset.
        self.n_blocks = math.ceil((self.n_tokens - 2) / block_size) + 1
        self.epoch = None

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
            self.epoch, self.offset = epoch, random.randint(1 - self.block_size, 1)
            self.order = random.permutation(self.n_blocks)
        start = self.offset + int(self.order[i]) * self.block_size
        start = min(max(0, start), self.n_tokens - self.block_size - 1)
        stop = start + self.block_size + 1
        first, last = np.searchsorted(self.starts, [start, stop - 1], "right") - 1
        shards = zip(self.shards[first:last + 1], self.starts[first:])  # a block may lie in several
        return np.concatenate([ids[max(0, start - begin):stop - begin] for ids, begin in shards])


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sources", nargs="*", default=["stdlib"], help=f"paths, URLs, or {', '.join(NAMES)}")
    add("--out", help="folder to write (default shards/NAME OF THE FIRST SOURCE)")
    add("--vocab_size", type=int, help="default 4096")
    add("--tokenizer", help="use this tokenizer.json, or gpt2, and train none")
    add("--val_ratio", type=float, help="share to validate on (default 0.05; few documents: 0.1)")
    add("--shards", type=int, help="of fineweb10B, 200 MB each (default 1)")
    typed = {k: v for k, v in vars(parser.parse_intermixed_args()).items() if v is not None}
    if "fineweb10B" in typed["sources"]:
        refuse_idle(typed, ["vocab_size", "val_ratio"], "beside fineweb10B")
    else:
        refuse_idle(typed, ["shards"], "without fineweb10B")
    refuse_idle(typed, ["vocab_size"] * ("tokenizer" in typed), "beside --tokenizer")
    n_shards = typed.pop("shards", 1)
    print(f"next: python train.py --data={prepare(**typed, n_shards=n_shards)}")


if __name__ == "__main__":
    run_command(main)
