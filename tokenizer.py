"""
Text to token ids and back: byte-level BPE, trained here.

    python tokenizer.py train corpus.txt --vocab_size=4096 --out=tokenizer.json
    python tokenizer.py show "def hello(name):" --tokenizer=tokenizer.json
    python tokenizer.py encode "def hello(name):"
    python tokenizer.py decode 100 101 102
    python tokenizer.py compare corpus.txt gpt2 o200k_base other.json
    python tokenizer.py export --format=huggingface --out=folder
"""

import argparse
import base64
import codecs
import contextlib
import difflib
import functools
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import types
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, fields
from itertools import chain, islice
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import regex
from tqdm import tqdm

# What no merge may cross: a text is split into chunks first, as OpenAI's models do it.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K_SPLIT = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
               r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
               r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
               r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# cl100k_base, as tiktoken reads it today, keeps white space at the end of the text together.
CL100K_SPLIT = GPT4_SPLIT.replace(r"|\s*[\r\n]", r"|\s+(?!\s|\S)|\s*[\r\n]")
SPLITS = {"gpt2": GPT2_SPLIT, "gpt4": GPT4_SPLIT, "cl100k": CL100K_SPLIT, "o200k": O200K_SPLIT}
PLAIN = {  # tiktoken writes two of them with possessive quantifiers, which many engines lack
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_SPLIT,
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
     r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"): CL100K_SPLIT}
# A pattern that comes in a file may have these parts alone. Others, such as a repeated group in a
# repeated group, could fill all memory while they are compiled.
SIMPLE_SPLIT = re.compile(r"""(?:\(\?(?:i?:|<?[=!])|\)\??|\||     # (?: (?i: (?! ... ) )? |
    (?:\\[pP]\{\w+\}|\\[bdDsSwWnrt]|\\[^\w\s]|                    # \p{L} \s \.
       \[(?:\\.|[^]\\])+\]|[^][(){}|\\*+?])                       # [^\s\p{L}], plain characters
    (?:[*+?]|\{\d{1,3}(?:,\d{0,3})?\})?[+?]?)*""", re.VERBOSE)  # once or repeated
SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]

# A chat is a document: <|endoftext|>, then for each message <|role|>text<|end|>, with nothing
# between. This is the same in Jinja, for Hugging Face. There a special token in a text would become
# its id, so the template refuses it; render_chat and render_prompt encode each text as plain text.
ROLES = ["system", "user", "assistant", "tool"]
CHAT_TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    f"{{% for name in {SPECIAL_TOKENS} if name in message['content'] %}}"
    "{{ raise_exception('a text must not contain ' + name) }}{% endfor %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

PIECE = 1 << 22  # characters that one process splits at a time
BLOCK = 1 << 14  # characters that are looked at together
PATIENCE = 10  # seconds of work for a split, and one more for each 10,000 characters: 100 would do
LARGEST_ID = 1 << 22  # a tokenizer lists what it has up to its last id
CACHE = 1 << 16  # chunks whose ids a tokenizer remembers, none longer than 32 characters
FORMAT, VERSION = "byte-level BPE", 1
LARGEST_JSON = 1 << 28  # bytes; a vocabulary of a million tokens is smaller
WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError,
         RecursionError)  # what a wrong file may raise
HF_SPLIT = dict(type="Split", behavior="Isolated", invert=False)  # Hugging Face's names
HF_BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)

# GPT-2 writes bytes as characters that print: most stand for themselves, the others are moved up.
# Its vocabulary, like those of tiktoken, also numbers the bytes in this order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_BYTES = bytes(PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE])
BYTE_TO_CHAR = {byte: chr(byte if i < len(PRINTABLE) else 256 + i - len(PRINTABLE))
                for i, byte in enumerate(GPT2_BYTES)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# -----------------------------------------------------------------------------
# What every command shares: options, errors in one line, files never half written, all cores.


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option ends in one line with the nearest right one and exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            options = [option.replace("-", "_") for option in self._option_string_actions]
            near = difflib.get_close_matches(unknown[1].replace("-", "_"), options, 1)
            message = f"unknown option {unknown[1]}"
            message += f", did you mean {near[0].replace('__', '--', 1)}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse_options(doc, *config_classes):
    """The options that were typed, as one dict a dataclass: parse_options(__doc__, TrainConfig).

    A field with "help" in its metadata is an option, or an argument if `positional` is there, too.
    A bool is --name or --no-name, a list may be given again and again. Of two equal names the first
    counts.
    """
    parser, known = Parser(doc), set()
    groups = [[f for f in fields(config) if "help" in f.metadata] for config in config_classes]
    for config, options in zip(config_classes, groups):
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for f in options:
            if f.name not in known:
                add_option(group, f)
                known.add(f.name)
    typed = vars(parser.parse_intermixed_args())
    known, parts = set(), []
    for options in groups:
        names = {f.name for f in options} - known
        parts.append({name: value for name, value in typed.items() if name in names})
        known |= names
    return parts


def add_option(group, f):
    """Add a dataclass field to a group of argparse; it is SUPPRESSed where nobody types it."""
    kind, item = field_kind(f)
    default = f.default_factory() if f.default is MISSING else f.default
    shown = "" if default in (None, "", (), []) else f" (default {default})"
    options = dict(default=argparse.SUPPRESS, help=f.metadata["help"].replace("%", "%%") + shown)
    if kind is bool:
        options.update(action=argparse.BooleanOptionalAction)
    else:
        options.update(type=item, metavar=f.name.upper() if kind is str else item.__name__.upper())
    if f.metadata.get("positional"):
        group.add_argument(f.name, nargs="*" if kind in (list, tuple) else "?", **options)
    else:
        if kind in (list, tuple):
            options.update(action="append")
        group.add_argument(f"--{f.name}", **options)


def field_kind(f):
    """(type, type of its items) of a dataclass field: int | None is (int, int), list[int] is
    (list, int), list (list, str)."""
    kind = f.type
    if isinstance(kind, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    base = get_origin(kind) or kind
    return base, (get_args(kind) or (str,))[0] if base in (list, tuple) else base


def run_command(main):
    """Call main(); a user's mistake (ValueError, OSError) is one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows "?" for it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror or error}{name}")
    except ValueError as error:  # what a file says may be quoted: it is not to steer a terminal
        text = "".join(char if char.isprintable() else " " for char in str(error))
        sys.exit(f"error: {text}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def share_cores():
    """To be called before torch is imported: its threads spin only shortly while they wait for one
    another. That costs nothing, and where other programs run it can save half the time."""
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def sync_folder(folder):
    """Let a new name in a folder outlive a power cut, where the system can be asked to."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some file systems sync none
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that appears at `path` complete or not at all: temporary name, rename."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:  # a full disk does not say which file it was
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path, values):
    """Write plain values as JSON that people can read, complete or not at all."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    with replacing(path) as file:  # a lone surrogate, as in odd file names, is written as \uXXXX
        file.write(text.encode(errors="backslashreplace"))


def read_json(path):
    """The values in a JSON file; ValueError for a file that holds something else."""
    if os.path.getsize(path) > LARGEST_JSON:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes, at most {LARGEST_JSON:,} of "
                         "JSON are read")
    with reading(path):
        return json.loads(Path(path).read_bytes())


@contextlib.contextmanager
def reading(path):
    """Around the reading of a foreign file: whatever goes wrong is one ValueError with its path.

    An OSError passes, and so does a ValueError that begins with the path.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a damaged file can make a parser raise anything
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        if isinstance(error, ValueError) and reason.startswith(str(path)):
            raise
        reason = " ".join(reason.split())
        raise ValueError(f"{path} cannot be read: {reason:.200}") from error


def check_fields(dataclass, values, path):
    """dataclass(**values) of what a JSON file holds; ValueError that names the file and the field.

    A number must be finite and below 2**31; of a dict or a list only the type is checked.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r:.40}: it must be a dict of fields")
    known = {f.name: f for f in fields(dataclass)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            near = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}: unknown field {name!r:.40}{near}")
    for f in known.values():
        if f.name in values:
            check_field(f, values[f.name], path)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{path}: the field {f.name} is missing")
    with reading(path):  # its own __post_init__ may refuse more
        return dataclass(**values)


def check_field(f, value, path):
    """ValueError unless a value has the type of its dataclass field."""
    kind, _ = field_kind(f)
    allowed = {float: (int, float), list: (list, tuple), tuple: (list, tuple)}.get(kind, kind)
    empty = value is None and type(None) in get_args(f.type)
    number = kind in (int, float)
    if not empty and (not isinstance(value, allowed) or number and (
            isinstance(value, bool) or not -2**31 < value < 2**31)):
        kind = f"{kind.__name__}" + " below 2**31" * number
        kind += " or null" * (type(None) in get_args(f.type))
        raise ValueError(f"{path}: {f.name}={value!r:.40} must be {kind}")


def seal(values):
    """A dict with its own sha256 in it: read_sealed() sees whether a bit of it has changed."""
    text = json.dumps(values, sort_keys=True)
    return values | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path):
    """The dict that write_json(path, seal(values)) wrote; ValueError if it is not as it was."""
    values = read_json(path)
    if not isinstance(values, dict) or "sha256" not in values:
        raise ValueError(f"{path} has no sha256: it is foreign, or an older version wrote it")
    found = values.pop("sha256")
    if seal(values)["sha256"] != found:
        raise ValueError(f"{path} is damaged or was edited: its content has another sha256 than "
                         "it says")
    return values


def on_all_cores(function, jobs):
    """Yield function(*job) for each job, in order, from a process per core; a single job runs here.

    Processes start fresh: a fork would copy the locks that torch's threads hold at that moment.
    """
    jobs, results, main = iter(jobs), deque(), sys.modules["__main__"]
    first = list(islice(jobs, min(os.cpu_count() or 1, 32)))
    if len(first) < 2 or multiprocessing.current_process().daemon:  # which may not have children
        for job in chain(first, jobs):
            yield function(*job)
        return
    # A fresh process would run the user's script once more; it is shown an empty one instead.
    shown = main if function.__module__ == "__main__" else types.ModuleType("__main__")
    pool = ProcessPoolExecutor(len(first), multiprocessing.get_context("spawn"),
                               signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        for job in chain(first, jobs):
            sys.modules["__main__"] = shown
            try:
                results.append(pool.submit(function, *job))
            finally:
                sys.modules["__main__"] = main
            if len(results) > 2 * len(first):  # jobs wait in memory: only a few
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# From texts to chunks, and how often each occurs.


def well_formed(text):
    """The text as UTF-8 can hold it: a pair of surrogates is a character, a lone one U+FFFD."""
    try:
        for i in range(0, len(text), BLOCK):  # in blocks: a copy of all would take memory
            text[i:i + BLOCK].encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def compile_split(pattern):
    """The split pattern, compiled; ValueError for one that is wrong."""
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"split pattern {pattern!r:.400} does not compile: {error}") from None
    if compiled.groups:
        raise ValueError(f"split pattern {pattern!r} has a capturing group: write (?:...)")
    return compiled


def check_split(pattern):
    """ValueError unless a pattern that comes in a file is of SIMPLE_SPLIT."""
    if len(pattern) > 1000 or not SIMPLE_SPLIT.fullmatch(pattern):
        raise ValueError(f"split pattern {pattern!r:.99} is not made of single characters, each "
                         "repeated or not, in groups that are not repeated")


def compile_special(special_tokens):
    """A pattern that finds special tokens, the longer first. None may be empty or double."""
    names = sorted(special_tokens, key=len, reverse=True)
    if "" in names:
        raise ValueError("a special token is empty; give it a name, such as <|endoftext|>")
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"special token {name!r} is given {count} times; give it once")
    return regex.compile("(" + ("|".join(map(regex.escape, names)) or "(?!)") + ")")


@functools.lru_cache
def ascii_split(pattern):
    r"""A pattern of SPLITS for ASCII text in Python's own `re`, which needs half the time.

    ascii_split(r"\p{L}+|[^\s\p{N}]").pattern == r"[A-Za-z]+|[^\t-\r 0-9]"
    """
    ranges = {r"\p{L}": "A-Za-z", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z", r"\p{N}": "0-9",
              r"\s": r"\t-\r ", r"\S": r"\x00-\x08\x0e-\x1f!-\x7f"}
    classes = re.sub(r"(\[[^]]*\])|(\\p\{\w+\}|\\[sS])", r"\1[\2]", pattern).replace("[]", "")
    return re.compile(re.sub(r"\\p\{\w+\}|\\[sS]", lambda x: ranges.get(x[0], ""), classes))


def split(text, compiled):
    """The chunks of a text: split("we've 2", compile_split(GPT2_SPLIT)) == ["we", "'ve", " 2"]."""
    if compiled.pattern in SPLITS.values() and text.isascii():
        return ascii_split(compiled.pattern).findall(text)
    with in_time(compiled, text) as timeout:
        chunks = compiled.findall(text, timeout=timeout)
    lost = len(text) - sum(map(len, chunks))
    if lost:
        raise ValueError(f"split pattern {compiled.pattern!r} loses {lost} of {len(text)} "
                         r"characters; let it match all, if need be by ending it with |[\s\S]")
    return chunks


@contextlib.contextmanager
def in_time(compiled, text):
    """Yield how long a split of the text may take; ValueError if it takes longer, which patterns do
    that try all ways to match."""
    timeout = PATIENCE + len(text) / 10_000
    try:
        yield timeout
    except TimeoutError:
        raise ValueError(f"split pattern {compiled.pattern!r} takes more than {timeout:.0f} s for "
                         f"{len(text):,} characters: take another") from None


def count_chunks(texts, special_tokens, pattern):
    """How often each chunk (bytes) occurs in texts, when special tokens are cut out of them."""
    compiled, special = compile_split(pattern), compile_special(special_tokens)
    counts = Counter()
    for text in texts:
        for part in special.split(well_formed(text))[::2]:
            counts.update(split(part, compiled))
    return Counter({chunk.encode(): count for chunk, count in counts.items() if chunk})


def cut(blocks, special_tokens, pattern):
    """Yield a text that comes in blocks in parts: cut after a letter at the end of a line.

    There a chunk of the patterns of SPLITS ends. With another pattern the text stays whole.
    """
    seam = regex.compile(r"(?r)\p{L}(?=[\r\n])")  # r: the last one
    known = pattern in SPLITS.values() and not any(map(seam.search, special_tokens))
    rest = []
    for block in blocks:
        found = seam.search(block) if known else None
        if found:
            yield "".join(rest) + block[:found.end()]
            rest, block = [], block[found.end():]
        rest.append(block)
    yield "".join(rest)


def gather(texts, special_tokens, pattern):
    """Yield jobs for count_chunks of some PIECE characters: short texts together, long ones cut."""
    batch, length = [], 0
    for text in texts:
        blocks = (text[i:i + PIECE] for i in range(0, len(text), PIECE))
        for part in cut(blocks, special_tokens, pattern):
            batch.append(part)
            length += len(part)
            if length >= PIECE:
                yield batch, special_tokens, pattern
                batch, length = [], 0
    yield batch, special_tokens, pattern


def read_files(paths, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """Yield the texts of files of any size in parts; ValueError for a file that is not UTF-8."""
    for path in paths:
        with open(path, encoding="utf-8", newline="") as file:
            try:
                for text in cut(iter(lambda: file.read(PIECE), ""), special_tokens, pattern):
                    if "\0" in text:
                        raise ValueError(f"{path} is not text: it has a zero byte; give text files")
                    yield text
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not text in UTF-8: {error.reason} "
                                 f"{error.object[error.start]:#x}; convert it") from None


# -----------------------------------------------------------------------------
# Training, twice: the algorithm as stated, and its fast twin. Same arguments, same merges.


def room_for_merges(vocab_size, special_tokens):
    """How many merges a vocabulary has room for; ValueError when it is too small."""
    room = vocab_size - 256 - len(special_tokens)
    if room < 0:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and "
                         f"{len(special_tokens)} special tokens need {vocab_size - room}")
    return room


def merge(ids, pair, new_id):
    """Replace each pair, from the left: merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]."""
    merged, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


def train_plain(texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """Byte-pair encoding as stated: merge the most frequent pair of neighbours, again and again.

    texts is a str or documents; the merges are returned in order as (left bytes, right bytes). Of
    equally frequent pairs the one whose bytes compare greatest is taken. Where no pair occurs twice
    there is nothing to gain, and the merges stay fewer than vocab_size has room for.
    """
    n_merges = room_for_merges(vocab_size, special_tokens)
    texts = [texts] if isinstance(texts, str) else texts
    chunks = [(list(chunk), n) for chunk, n in count_chunks(texts, special_tokens, pattern).items()]
    if not chunks:
        raise ValueError("there is no text to train on: the input is empty")
    vocab, merges = [bytes([i]) for i in range(256)], []
    while len(merges) < n_merges:
        counts = Counter()
        for ids, n in chunks:
            for pair in zip(ids, ids[1:]):
                counts[pair] += n
        best = max(counts, default=None,
                   key=lambda pair: (counts[pair], vocab[pair[0]], vocab[pair[1]]))
        if counts[best] < 2:
            break
        chunks = [(merge(ids, best, len(vocab)), n) for ids, n in chunks]
        merges.append((vocab[best[0]], vocab[best[1]]))
        vocab.append(b"".join(merges[-1]))
    return merges


class Row:
    """All distinct chunks in one row of tokens, and the pairs of neighbours in it.

    pairs[i] is left * base + right for the pair whose left token starts at place i, where -1 stands
    for the end of a chunk; before[i] is the place of the token before it. A pair has all its places
    when it appears: later merges only take some away, and its count only falls. So pairs wait in
    bands of similar counts. When nothing is ready, the highest band is counted again and sorted.
    """

    def __init__(self, counts, n_merges):
        lengths = np.array([1] + [len(chunk) + 1 for chunk in counts])
        ids = np.frombuffer(b"\0".join([b"", *counts, b""]), np.uint8).astype(np.int64)
        ids[np.cumsum(lengths) - 1] = -1
        self.counts = np.repeat(np.array([0, *counts.values()]), lengths)
        self.vocab = [bytes([i]) for i in range(256)]
        # They sort tokens downwards; the last character is above all bytes: the longer comes first.
        self.orders = [chr(255 - i) + "\u0100" for i in range(256)]
        self.base = 257 + min(n_merges, len(ids))
        self.pairs = ids * self.base + np.append(ids[1:], -1)
        self.before = np.arange(-1, len(ids) - 1)
        self.ready, self.waiting, self.band = [], defaultdict(list), math.inf
        self.add((ids >= 0).nonzero()[0])

    def add(self, places):
        """Add the pairs at these places, which are all the places that they have."""
        if not len(places):
            return
        keys = self.pairs.take(places)
        order = keys.argsort()
        keys, places = keys.take(order), places.take(order)
        starts = np.concatenate([[0], (keys[1:] != keys[:-1]).nonzero()[0] + 1])
        counts = np.add.reduceat(self.counts.take(places), starts).tolist()
        keys, starts = keys.take(starts).tolist(), [*starts.tolist(), len(places)]
        for i, count in enumerate(counts):
            if count < 2 or keys[i] < 0 or (keys[i] + 1) % self.base == 0:
                continue
            band, pair = int(8 * math.log2(count)), (keys[i], places[starts[i]:starts[i + 1]])
            if band < self.band:
                self.waiting[band].append(pair)
            else:
                left, right = divmod(keys[i], self.base)
                heapq.heappush(self.ready, (-count, self.orders[left], self.orders[right], *pair))

    def pop(self):
        """The most frequent pair as (left, right, places); None when no pair occurs twice."""
        while self.ready or self.waiting:
            while self.ready:
                *_, key, places = heapq.heappop(self.ready)
                here = self.pairs.take(places) == key
                if here.all():
                    return *divmod(key, self.base), places
                self.add(places.compress(here))
            if self.waiting:
                self.band = max(self.waiting)
                keys, places = zip(*self.waiting.pop(self.band))
                keys, places = np.repeat(keys, [*map(len, places)]), np.concatenate(places)
                self.add(places.compress(self.pairs.take(places) == keys))
        return None

    def merge(self, left, right, places):
        """Join the pair at its places, add the pairs that appear, return the merge as bytes."""
        pairs, new, size = self.pairs, len(self.vocab), len(self.vocab[left])
        if left == right:  # the pairs in "aaa" overlap: of such a run take every other one
            places, index = np.sort(places), np.arange(len(places))
            starts = np.where(np.diff(places, prepend=-1 - size) == size, 0, index)
            places = places[(index - np.maximum.accumulate(starts)) % 2 == 0]
        self.vocab.append(self.vocab[left] + self.vocab[right])
        self.orders.append(self.orders[left][:-1] + self.orders[right])
        second = places + size
        pairs[places] = pairs.take(second) + (new - right) * self.base
        pairs[second] = -1  # no token starts here any more
        self.before[places + len(self.vocab[new])] = places
        before = self.before.take(places)
        pairs[before] += new - left
        places = places.compress(pairs.take(places) != new * self.base + new)  # is in before, too
        self.add(np.concatenate([before, places]))
        return self.vocab[left], self.vocab[right]


def train_fast(texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """train_plain, where a merge costs only what it changes, and all cores count the chunks."""
    n_merges = room_for_merges(vocab_size, special_tokens)
    texts = [texts] if isinstance(texts, str) else texts
    counts, quiet = Counter(), dict(disable=None, delay=1, leave=False)
    jobs = gather(texts, special_tokens, pattern)
    for some in tqdm(on_all_cores(count_chunks, jobs), "split", unit="piece", **quiet):
        counts.update(some)
    if not counts:
        raise ValueError("there is no text to train on: the input is empty")
    row, merges = Row(counts, n_merges), []
    for _ in tqdm(range(n_merges), "merge", unit="merge", **quiet):
        found = row.pop()
        if found is None:
            break
        merges.append(row.merge(*found))
    return merges


# -----------------------------------------------------------------------------
# The parts of encoding and decoding.


def to_chars(token):
    """Bytes in GPT-2's printable characters: to_chars(b" a") == "Ġa"."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def to_bytes(chars):
    """The bytes that to_chars wrote."""
    return bytes(CHAR_TO_BYTE[char] for char in chars)


def invert(byte_order):
    """From the byte of each id to the id of each byte, as a table for bytes.translate."""
    if sorted(byte_order) != [*range(256)]:
        raise ValueError("the first 256 ids must be the 256 bytes, in any order")
    return bytes(sorted(range(256), key=byte_order.__getitem__))


def apply_merges(ids, merged):
    """Merge pairs in `merged` (pair -> new id) until none is left, the lowest new id first.

    A merge makes only pairs of higher new ids, so each id has its turn once. The tokens left are
    linked. Together that takes about n log n steps, also for one chunk of a million bytes.
    """
    ids, n = list(ids), len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    places, queue = {}, []  # where the pair of a new id stands, and which new ids wait

    def wait(left, right):
        new = merged.get((ids[left], ids[right])) if left >= 0 and right < n else None
        if new is not None:
            if new not in places:
                places[new] = []
                heapq.heappush(queue, new)
            places[new].append(left)

    for i in range(n - 1):
        wait(i, i + 1)
    while queue:
        new = heapq.heappop(queue)
        for i in sorted(places.pop(new)):
            j = after[i]
            if j == n or merged.get((ids[i], ids[j])) != new:
                continue  # another merge took one of the two
            ids[i], ids[j], after[i] = new, -1, after[j]
            if after[i] < n:
                before[after[i]] = i
            wait(before[i], i)
            wait(i, after[i])
    return [token for token in ids if token >= 0]


def recover_merges(tokens, name):
    """The merges that made tokens (a dict id -> bytes), and the bytes of the first 256 ids.

    Earlier merges leave two parts of a token: these make it.
    """
    byte_order = b"".join(tokens[id] for id in range(256) if len(tokens.get(id, b"")) == 1)
    try:
        byte_ids, merged, merges = invert(byte_order), {}, []
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for id in sorted(tokens)[256:]:
        parts = apply_merges(tokens[id].translate(byte_ids), merged)
        if len(parts) != 2 or id != 256 + len(merges):
            raise ValueError(f"{name}: token {id} is not the merge of two before it")
        merged[tuple(parts)] = id
        merges.append((tokens[parts[0]], tokens[parts[1]]))
    return merges, byte_order


def lookup(tokens, id):
    """The bytes of an id; ValueError for an id outside the vocabulary."""
    if id not in tokens:
        raise ValueError(f"token id {id} is not in this vocabulary: its ids end at {max(tokens)}")
    return tokens[id]


def awkward(text):
    """Whether tiktoken may split a text of our patterns otherwise than `regex`, or cannot.

    Each knows its own version of Unicode, and many thousand blanks in a row overflow its stack.
    """
    if any(text[i:i + BLOCK].isspace() for i in range(0, len(text) - BLOCK + 1, BLOCK)):
        return True
    return not text.isascii() and any(char == "\u0295" or unicodedata.category(char) == "Cn"
                                      for char in {*text})


def check_chat(messages, last):
    """ValueError unless messages are turns {"role": ..., "content": ...} and the last is of `last`.

    The first is the system's or the user's; the system speaks only first.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("a chat is a list of messages like {'role': 'user', 'content': 'Hi'}, and "
                         f"this is a {type(messages).__name__} without one")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} is {message!r:.60}: it must be a dict with a role and "
                             "a content, which is a str")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}: it must be one of {', '.join(ROLES)}")
        if role == "system" and i or role in ("assistant", "tool") and not i:
            raise ValueError(f"message {i} has role {role}: the first is the system's or the "
                             "user's, and the system speaks only first")
    if role not in last:
        raise ValueError(f"the last message has role {role}: it must be {' or '.join(last)}")


class StreamDecoder:
    """Ids one at a time to text in whole characters; all that it returns joins to decode(ids)."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        """The characters that this id completes, possibly none."""
        return self.utf8.decode(lookup(self.tokens, id))

    def flush(self):
        """The end: U+FFFD when a character was begun and not completed."""
        return self.utf8.decode(b"", final=True)


# -----------------------------------------------------------------------------
# The tokenizer: merges, special tokens and a split pattern.


class Tokenizer:
    """Text to ids and back. Ids are the 256 bytes, the merges in order, then the special tokens.

    special_tokens is a list, or a dict name -> id with gaps. byte_order[id] is the byte of an id.
    """

    def __init__(self, merges, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT,
                 byte_order=bytes(range(256))):
        self.merges, self.pattern, self.byte_order = list(merges), pattern, bytes(byte_order)
        self.find_chunks = compile_split(pattern)
        self.find_special = compile_special(special_tokens)
        self.byte_ids, self.cache, self.twin = invert(self.byte_order), {}, None
        self.tokens = {id: bytes([byte]) for id, byte in enumerate(self.byte_order)}
        self.merged, ids = {}, {token: id for id, token in self.tokens.items()}
        for new, (left, right) in enumerate(self.merges, 256):
            if left not in ids or right not in ids or left + right in ids:
                raise ValueError(f"merge {new - 256} of {left!r} and {right!r} is wrong: "
                                 "both must be tokens before it, and their join a new one")
            self.merged[ids[left], ids[right]] = ids[left + right] = new
            self.tokens[new] = left + right
        if not isinstance(special_tokens, dict):
            special_tokens = {name: id for id, name in enumerate(special_tokens, len(ids))}
        self.special = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        for name, id in self.special.items():
            if type(id) is not int or not len(ids) <= id < LARGEST_ID or id in self.tokens:
                raise ValueError(f"special token {name!r:.80} cannot have id {id!r:.40}: it must "
                                 "be a free number after those of the bytes and merges, below "
                                 f"{LARGEST_ID:,}")
            self.tokens[id] = name.encode()
        self.n_vocab, self.eot = max(self.tokens) + 1, self.special.get("<|endoftext|>")
        self.chat_template = CHAT_TEMPLATE if {*SPECIAL_TOKENS} <= {*self.special} else None

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Train on a str or documents; n_vocab is below vocab_size when they have too few pairs."""
        return cls(train_fast(texts, vocab_size, special_tokens, pattern), special_tokens, pattern)

    @classmethod
    def train_files(cls, paths, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Train on UTF-8 text files of any size, read a part at a time."""
        texts = read_files(paths, special_tokens, pattern)
        return cls.train(texts, vocab_size, special_tokens, pattern)

    def encode(self, text, special=False):
        """The ids of a text; special tokens in it become their ids only with special=True.

        A lone surrogate, which UTF-8 cannot hold, is encoded as U+FFFD.
        """
        text, ids = well_formed(text), []
        for i, part in enumerate(self.find_special.split(text) if special else [text]):
            if i % 2:
                ids.append(self.special[part])
                continue
            for chunk in split(part, self.find_chunks):
                ids += self.cache.get(chunk) or self.encode_chunk(chunk)
        return ids

    def encode_chunk(self, chunk):
        """The ids of one chunk; those of short chunks are remembered for a while."""
        ids = apply_merges(chunk.encode().translate(self.byte_ids), self.merged)
        if len(chunk) <= 32:
            if len(self.cache) == CACHE:
                self.cache.clear()  # what is frequent is soon back
            self.cache[chunk] = ids
        return ids

    def encode_iterable(self, texts):
        """Yield the ids of texts, one text after the other; a text is encoded chunk by chunk."""
        for text in texts:
            text, end = well_formed(text), 0
            with in_time(self.find_chunks, text) as timeout:
                for found in self.find_chunks.finditer(text, timeout=timeout):
                    chunk = found[0]
                    if found.start() != end:
                        break
                    end = found.end()
                    if len(self.cache) > CACHE >> 4:
                        self.cache.clear()  # to stay below a megabyte
                    yield from self.cache.get(chunk) or self.encode_chunk(chunk)
            if end != len(text):
                split(text, self.find_chunks)  # which says how much is lost

    def encode_batch(self, texts):
        """A list with encode(text) of each text, by the fast twin on all cores.

        Texts for which the twin may give other ids, or fail, are left to encode.
        """
        texts, ours = list(texts), {}
        for i, text in enumerate(texts):
            if self.pattern not in SPLITS.values() or awkward(text):
                texts[i], ours[i] = "", self.encode(text)
        twin = self.to_tiktoken()
        ids = dict(enumerate(twin.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)))
        return [*(ids | ours).values()]

    def decode(self, ids):
        """The text of any ids of the vocabulary; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([lookup(self.tokens, id) for id in ids]).decode("utf-8", "replace")

    def decoder(self):
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self.tokens)

    def render_chat(self, messages, last=("assistant",)):
        """The ids of a chat to train on, and for each id whether it is the assistant's to learn.

        Messages are dicts with role (system, user, assistant or tool) and content. The chat begins
        with <|endoftext|>, as each document does; a message is <|role|>text<|end|>. The assistant
        learns its texts and the <|end|> after each; who speaks next is not its to say. The roles
        in `last` may end the chat.
        """
        check_chat(messages, last)
        missing = [name for name in SPECIAL_TOKENS if name not in self.special]
        if missing:
            raise ValueError(f"this tokenizer cannot render chats: it lacks {', '.join(missing)}; "
                             "train it with the SPECIAL_TOKENS of tokenizer.py")
        ids, learn = [self.eot], [False]
        for message in messages:
            text = [*self.encode(message["content"]), self.special["<|end|>"]]
            ids += [self.special[f"<|{message['role']}|>"], *text]
            learn += [False] + [message["role"] == "assistant"] * len(text)
        return ids, learn

    def render_prompt(self, messages):
        """The ids of a chat up to where the assistant begins; it ends its answer with <|end|>."""
        ids, _ = self.render_chat(messages, last=("user", "tool"))
        return [*ids, self.special["<|assistant|>"]]

    def token_bytes(self):
        """The bytes of each id, in a list; b"" for an id that no token has."""
        return [self.tokens.get(id, b"") for id in range(self.n_vocab)]

    def definition(self):
        """What makes this tokenizer what it is, in plain values; bytes in printable characters."""
        merges = [f"{to_chars(left)} {to_chars(right)}" for left, right in self.merges]
        return dict(pattern=self.pattern, special_tokens=self.special,
                    bytes=to_chars(self.byte_order), merges=merges)

    def hash(self):
        """The sha256 of the definition: equal for tokenizers that are equal."""
        return hashlib.sha256(json.dumps(self.definition()).encode()).hexdigest()

    def save(self, path):
        """Write a JSON file, complete or not at all."""
        state = dict(format=FORMAT, version=VERSION, sha256=self.hash(), **self.definition(),
                     chat_template=self.chat_template)
        write_json(path, state)

    @classmethod
    def load(cls, path):
        """Read what save() wrote; ValueError for a file that is something else, or damaged."""
        state = read_json(path)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path} is not a tokenizer of this program: no format {FORMAT!r}")
        if state.get("version") != VERSION:
            raise ValueError(f"{path} has version {state.get('version')!r:.9}; this is {VERSION}")
        if state.get("chat_template") not in (None, CHAT_TEMPLATE):
            raise ValueError(f"{path} is damaged: its chat_template is another; train again")
        try:
            merges = [tuple(map(to_bytes, line.split(" "))) for line in state["merges"]]
            byte_order = to_bytes(state["bytes"])
            check_split(state["pattern"])
            tokenizer = cls(merges, state["special_tokens"], state["pattern"], byte_order)
        except WRONG as error:
            raise ValueError(f"{path} is damaged ({error!r:.200}); train again") from None
        if tokenizer.hash() != state.get("sha256"):
            raise ValueError(f"{path} is damaged: its sha256 is another; train again")
        return tokenizer

    def to_tiktoken(self):
        """The fast twin: a tiktoken.Encoding with the same ids, made once.

        Characters new in Unicode may split otherwise: two regex engines know two versions of it.
        """
        if self.twin is None:
            import tiktoken
            ranks = {token: id for id, token in self.tokens.items() if id < 256 + len(self.merges)}
            self.twin = tiktoken.Encoding(self.hash()[:8], pat_str=self.pattern,
                                          mergeable_ranks=ranks, special_tokens=self.special)
        return self.twin

    @classmethod
    def from_tiktoken(cls, encoding):
        """The tokenizer of a tiktoken.Encoding, with its ids."""
        tokens = {id: token for token, id in encoding._mergeable_ranks.items()}
        merges, byte_order = recover_merges(tokens, encoding.name)
        pattern = PLAIN.get(encoding._pat_str, encoding._pat_str)
        return cls(merges, encoding._special_tokens, pattern, byte_order)

    def to_rank_file(self, path):
        """Write the tokens as tiktoken's files hold them: base64 and rank, without special ones."""
        with replacing(path) as file:
            for id in range(256 + len(self.merges)):
                file.write(base64.b64encode(self.tokens[id]) + f" {id}\n".encode())

    @classmethod
    def from_rank_file(cls, path, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Read a .tiktoken file; which special tokens and pattern belong to it, it does not say."""
        tokens = {}
        for n, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
            except ValueError:
                raise ValueError(f"{path} is not a rank file: line {n} must be a token in base64 "
                                 f"and its rank, not {line!r:.40}") from None
        merges, byte_order = recover_merges(tokens, path)
        return cls(merges, special_tokens, pattern, byte_order)

    @classmethod
    def from_vocab(cls, vocab, merges, pattern):
        """From printable tokens with their ids; what is neither byte nor merge is special."""
        merges = [tuple(map(to_bytes, pair)) for pair in merges]
        byte_order = to_bytes(sorted(CHAR_TO_BYTE, key=vocab.__getitem__))
        special = {name: id for name, id in vocab.items() if id >= 256 + len(merges)}
        tokenizer = cls(merges, special, pattern, byte_order)
        if any(vocab.get(to_chars(tokenizer.tokens[id])) != id for id in range(256 + len(merges))):
            raise ValueError("ids must go to the 256 bytes first, then to the merges in order")
        return tokenizer

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt, special_tokens=()):
        """The tokenizer of GPT-2's two files, with its ids; special is what else vocab.json names.

        Of special_tokens, those that vocab.json lacks get the next ids.
        """
        vocab = read_json(vocab_json)
        try:
            lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
            lines = lines[lines[0].startswith("#version"):]
            for name in special_tokens:
                vocab.setdefault(name, max(vocab.values()) + 1)
            return cls.from_vocab(vocab, [line.split(" ") for line in lines if line], GPT2_SPLIT)
        except WRONG as error:
            raise ValueError(f"{vocab_json}, {merges_txt}: not GPT-2's ({error!r:.200})") from None

    def to_huggingface(self, folder):
        """Write tokenizer.json and tokenizer_config.json for Hugging Face's libraries.

        They give the same ids (a pattern other than those of SPLITS must mean the same in Ruby's
        syntax), but read special tokens in any text, so encode(special=True) is what they do.
        """
        path, plain = Path(folder, "tokenizer.json"), range(256 + len(self.merges))
        if path.exists() and f'"format": "{FORMAT}"' in path.read_text(encoding="utf-8")[:99]:
            raise ValueError(f"{path} is a tokenizer of this program; give another folder")
        vocab = {to_chars(self.tokens[id]): id for id in plain}
        for name, id in self.special.items():
            if vocab.setdefault(name, id) != id:
                raise ValueError(f"special token {name!r} is written as token {vocab[name]} is: "
                                 "Hugging Face cannot tell them apart; rename it")
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        added = [dict(id=id, content=name, **flags) for name, id in self.special.items()]
        steps = [dict(HF_SPLIT, pattern={"Regex": self.pattern}), dict(HF_BYTES, use_regex=False)]
        model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                     end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, vocab=vocab,
                     merges=self.definition()["merges"])
        state = dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                     normalizer=None, pre_tokenizer=dict(type="Sequence", pretokenizers=steps),
                     post_processor=None, decoder=dict(HF_BYTES, use_regex=True), model=model)
        eot = None if self.eot is None else "<|endoftext|>"
        config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=eot, eos_token=eot,
                      clean_up_tokenization_spaces=False, chat_template=self.chat_template)
        write_json(path, state)
        write_json(path.with_name("tokenizer_config.json"), config)

    @classmethod
    def from_huggingface(cls, path):
        """The tokenizer of a tokenizer.json (or its folder) that is a byte-level BPE like ours."""
        path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        state = read_json(path)
        try:
            first, model = state["pre_tokenizer"], state["model"]
            *before, last = first.get("pretokenizers", [first])
            pattern = before[0]["pattern"]["Regex"] if before else GPT2_SPLIT
            check_split(pattern)
            isolate = [dict(HF_SPLIT, pattern={"Regex": pattern})] if before else []
            last = {**last, "trim_offsets": True}  # which concerns no id
            for found, known in ((state["normalizer"], None), (model["type"], "BPE"),
                                 (before, isolate), (last, dict(HF_BYTES, use_regex=not before))):
                if found != known:
                    raise ValueError(f"it has {found!r:.99} where {known!r:.99} is known")
            added = {token["content"]: token["id"] for token in state["added_tokens"]}
            merges = [pair.split(" ") if isinstance(pair, str) else pair
                      for pair in model["merges"]]
            return cls.from_vocab(model["vocab"] | added, merges, pattern)
        except WRONG as error:
            raise ValueError(f"{path} cannot be read as Hugging Face's byte-level BPE: "
                             f"{error!r:.200}") from None


# -----------------------------------------------------------------------------
# Commands.


def train_command(args):
    """Train on files, save, and say in one line what came of it."""
    start, out = time.time(), args.out or "tokenizer.json"
    texts = read_files(args.input, pattern=SPLITS[args.pattern])
    sample = next(filter(None, texts), "")  # a pipe can be read only once
    texts = chain([sample], texts)
    tokenizer = Tokenizer.train(texts, args.vocab_size, pattern=SPLITS[args.pattern])
    tokenizer.save(out)
    ratio = len(sample.encode()) / len(tokenizer.encode_batch([sample])[0])
    few = f" (of {args.vocab_size}: no other pair occurs twice)"
    few = few if tokenizer.n_vocab < args.vocab_size else ""
    print(f"{len(tokenizer.merges)} merges, {tokenizer.n_vocab} tokens{few}, {ratio:.2f} bytes per "
          f"token, {time.time() - start:.1f} s, {out}; next: "
          f'python tokenizer.py show "some text" --tokenizer={out}')


def encode_command(args):
    """Print the ids of a text."""
    print(*Tokenizer.load(args.tokenizer).encode(" ".join(args.input)))


def decode_command(args):
    """Print the text of ids."""
    for word in args.input:
        if not word.isdecimal():
            raise ValueError(f"{word!r} is not a token id: give whole numbers, such as 72 105")
    print(Tokenizer.load(args.tokenizer).decode(map(int, args.input)))


def show_command(args):
    """Print a text with its tokens apart: coloured in a terminal, else with | between them."""
    tokenizer = Tokenizer.load(args.tokenizer)
    ids = tokenizer.encode(" ".join(args.input))
    # a part of a character cannot be printed: show its bytes
    pieces = [tokenizer.tokens[id].decode("utf-8", "backslashreplace") for id in ids]
    if sys.stdout.isatty():
        colours = [f"\x1b[30;48;5;{colour}m" for colour in (152, 222, 183, 157, 216)]
        print(*(f"{colours[i % 5]}{piece}\x1b[0m" for i, piece in enumerate(pieces)), sep="")
    else:
        print(*pieces, sep="|")


def open_twin(name):
    """A tokenizer's fast twin, by our file, Hugging Face's folder or the name OpenAI gave it."""
    import tiktoken
    if Path(name).exists():
        read = Tokenizer.from_huggingface if Path(name).is_dir() else Tokenizer.load
        return read(name).to_tiktoken()
    try:
        return tiktoken.get_encoding(name)
    except OSError:
        raise ValueError("no connection to fetch it, and no such file") from None
    except ValueError:
        names = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"no such file, and none of {names}") from None


def compare_command(args):
    """Print how a file's text fares with our tokenizer and with others, each in one thread."""
    path, *others = args.input
    text = "".join(read_files([path]))
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to compare")
    size, ours = len(text.encode()), Tokenizer.load(args.tokenizer).to_tiktoken()
    print(f"{'':24}{'vocabulary':>12}{'tokens':>12}{'bytes per token':>18}{'MB/s':>8}")
    for name in [args.tokenizer, *(others or ["gpt2", "cl100k_base", "o200k_base"])]:
        try:
            twin = ours if name == args.tokenizer else open_twin(name)
        except ValueError as error:
            print(f"{name:24}{'not loaded: ':>14}{error}")
            continue
        start = time.perf_counter()
        n = len(twin.encode_ordinary(text))
        speed = size / 1e6 / (time.perf_counter() - start)
        print(f"{name:24}{twin.n_vocab:12,}{n:12,}{size / n:18.2f}{speed:8.1f}")


def export_command(args):
    """Write the tokenizer for other libraries."""
    write, name = EXPORTS[args.format]
    write(Tokenizer.load(args.tokenizer), args.out or name)
    print(f"{args.tokenizer} for {args.format}: {args.out or name}")


COMMANDS = {"train": train_command, "encode": encode_command, "decode": decode_command,
            "show": show_command, "compare": compare_command, "export": export_command}
EXPORTS = {"huggingface": (Tokenizer.to_huggingface, "huggingface"),
           "tiktoken": (Tokenizer.to_rank_file, "tokenizer.tiktoken")}


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("input", nargs="*", help="train: files; encode, show: a text; decode: ids; "
                        "compare: a file, then others' tokenizers or names of OpenAI's encodings")
    parser.add_argument("--vocab_size", type=int, default=4096, help="default %(default)s")
    parser.add_argument("--pattern", choices=SPLITS, default="gpt4", help="default %(default)s")
    parser.add_argument("--format", choices=EXPORTS, default="huggingface", help="of export")
    parser.add_argument("--out", help="train writes it (tokenizer.json), and export")
    parser.add_argument("--tokenizer", default="tokenizer.json", help="the others read it")
    args = parser.parse_intermixed_args()
    if not args.input and args.command != "export":
        parser.error("the following arguments are required: input")
    if args.input and args.command == "export":
        parser.error("export takes no input, but --tokenizer")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_command(main)
