"""
Text to token ids and back: byte-level BPE, trained here.

    python tokenizer.py train corpus.txt --vocab_size=4096 --out=tokenizer.json
    python tokenizer.py show "def hello(name):" --tokenizer=tokenizer.json
    python tokenizer.py encode "def hello(name):"
    python tokenizer.py decode 100 101 102
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import codecs
import contextlib
import difflib
import hashlib
import heapq
import json
import multiprocessing
import os
import re
import sys
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, fields, make_dataclass
from itertools import accumulate, chain, compress, groupby, islice, starmap, tee
from pathlib import Path

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
ASCII_SPLITS = {  # the same for ASCII text in Python's own `re`, which needs half the time
    pattern: re.compile("(?a)" + pattern.replace(r"\p{L}\p{N}]", "A-Za-z0-9]")
                        .replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"))
    for pattern in (GPT2_SPLIT, GPT4_SPLIT)}
PLAIN = {  # tiktoken writes two of them with possessive quantifiers, which many engines lack
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_SPLIT,
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
     r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"): CL100K_SPLIT}
SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]

BLOCK = 1 << 22  # characters of a file that are read at a time
JOB = 1 << 24  # characters that one process counts at a time; to start it takes a second
PATIENCE = 10  # seconds of work for a split, and one more for each 10,000 characters: 100 would do
BLANKS = 1 << 14  # so many in a row are more than tiktoken can take
LARGEST_ID = 1 << 22  # a tokenizer lists what it has up to its last id
CACHE = 1 << 16  # chunks whose ids a tokenizer remembers, none longer than 32 characters
# A progress bar, where a terminal can draw one (2>&- closes it), if the work takes a second.
QUIET = dict(disable=not sys.stderr or os.getenv("TERM") == "dumb" or None, delay=1, leave=False)
FORMAT = "byte-level BPE, version 2"

# GPT-2 writes bytes as characters that print: most stand for themselves, the others are moved up.
# Its vocabulary, like those of tiktoken, also numbers the bytes in this order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_BYTES = bytes(PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE])
BYTE_TO_CHAR = dict(zip(GPT2_BYTES, map(chr, [*PRINTABLE, *range(256, 324)])))
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# -----------------------------------------------------------------------------
# What every command shares: options, errors in one line, files never half written, all cores.


def nearest(name, known):
    """", did you mean ...?" with the name that comes nearest, or "" where none does."""
    near = difflib.get_close_matches(str(name), known, 1)
    return f", did you mean {near[0]}?" if near else ""


# {option of another program: what it is here}; without this file only a near option is named.
HINTS = Path(__file__).with_name("chapters") / "hints.json"


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option ends in one line with the nearest right one and exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        if unknown := re.search(r"unrecognized arguments: ([^\s=]+)", message):
            typed, own = unknown[1], self._option_string_actions
            name = "config" if typed.endswith(".py") else typed.lstrip("-").replace("-", "_")
            here = read_json(HINTS).get(name, "") if HINTS.exists() else ""
            if here.startswith("--") and re.match(r"--\w+", here)[0] not in own:
                here = ""  # the option is another command's
            if not here and typed[0] != "-" and "--data" in own:
                here = f"--data={typed}"
            message = f"unknown option {typed}{f'; here: {here}' if here else nearest(typed, own)}"
        message = re.sub("ignored explicit argument.*", "it takes no value", message)
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def refuse_idle(typed, names, reason):
    """ValueError if an option of these names was typed: the reason says beside what it is idle."""
    if idle := [f"--{name}" for name in names if name in typed]:
        missing = reason.partition("without --")[2]
        way = f", or add --{missing}" if missing else ""
        raise ValueError(f"{' '.join(idle)} would not act {reason}: leave it out{way}")


def field_kind(f):
    """The type of a dataclass field; int | None is an int."""
    return getattr(f.type, "__args__", [f.type])[0]


def parse_options(doc, *config_classes):
    """The options that were typed, in a dict for each dataclass: of two equal fields in the first.
    A field with "help" is an option, a bool as --name, --no-name or --name=false, a list as one to
    repeat."""
    parser, owners, several, words = Parser(doc), {}, set(), {}
    for config in config_classes:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for f in [f for f in fields(config) if "help" in f.metadata and f.name not in owners]:
            owners[f.name], kind = config, field_kind(f)
            default = f.default_factory() if f.default is MISSING else f.default
            shown = "" if default in (None, "", (), []) else f" (default {default})"
            name, form = f"--{f.name}", dict(type=kind, metavar=kind.__name__.upper())
            if f.metadata.get("positional"):
                name, form = f.name, dict(nargs="*" if kind is list else "?")
            elif kind is list:
                form = dict(action="append")
            elif kind is bool:
                form = dict(action=argparse.BooleanOptionalAction)
                words |= {f"{name}=true": name, f"{name}=false": f"--no-{f.name}"}
            elif f.metadata.get("many"):
                form |= dict(nargs="+", action="extend")
                several.add(f.name)
            known = f.metadata.get("known")
            names = " | ".join(known()) + ": " * bool(f.metadata["help"]) if known else ""
            group.add_argument(name, default=argparse.SUPPRESS, help=(
                names + f.metadata["help"] + shown).replace("%", "%%"), **form)
    typed = vars(parser.parse_intermixed_args([words.get(w.lower(), w) for w in sys.argv[1:]]))
    typed |= {name: typed[name][0] for name in several & {*typed} if len(typed[name]) == 1}
    return [{name: value for name, value in typed.items() if owners[name] is config}
            for config in config_classes]


def run_command(main):
    """Call main(); a user's mistake (ValueError, OSError) is one line and exit code 1."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as the command's first lines set it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # hidden folders are removed on the way
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
        sys.exit("error: " + "".join(char if char.isprintable() else " " for char in str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no traceback from what is done at the exit


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
        with contextlib.suppress(OSError):  # the new name outlives a power cut; Windows cannot ask
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
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
    with reading(path):
        return json.loads(Path(path).read_bytes())


@contextlib.contextmanager
def reading(path):
    """Make what goes wrong in reading a file, other than OSError, one ValueError with its path."""
    try:
        yield
    except Exception as error:  # a damaged file can make a parser raise anything
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        if isinstance(error, OSError) and error.errno or reason.startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read: {' '.join(reason.split()):.200}") from error


def check_fields(dataclass, values, path):
    """dataclass(**values) of what a JSON file holds; ValueError that names the file and the field.
    A number must be finite and below 2**31; of a dict or a list only the type is checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r:.40}: it must be a dict of fields")
    known = {f.name: f for f in fields(dataclass)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: unknown field {name!r:.40}{nearest(name, known)}")
        kind, right = field_kind(known[name]), isinstance(value, known[name].type)
        if kind in (int, float) and value is not None:
            below = max(2**31, known[name].metadata.get("below", 0))
            right = type(value) in (int, kind) and abs(value) < below
        if not right:
            limit = " below 2**31" * (kind in (int, float))
            null = " or null" * isinstance(None, known[name].type)
            raise ValueError(f"{path}: {name}={value!r:.40} must be {kind.__name__}{limit}{null}")
    with reading(path):  # which says what is missing, or what its own __post_init__ refuses
        return dataclass(**values)


def on_all_cores(function, jobs):
    """Yield function(*job) for each job, in order, from a process per core; a single job runs here.
    Each process starts fresh, as a fork would copy the locks of torch's threads, and imports the
    user's script again; where that lacks the `__main__` guard, its own jobs run one by one."""
    jobs, results = iter(jobs), deque()
    first = list(islice(jobs, min(os.cpu_count() or 1, 32)))
    started = multiprocessing.current_process().name != "MainProcess"
    script = getattr(sys.modules["__main__"], "__file__", ".")  # "<stdin>" cannot be imported
    if len(first) < 2 or started or not os.path.exists(script):
        yield from starmap(function, chain(first, jobs))
        return
    with ProcessPoolExecutor(len(first), multiprocessing.get_context("spawn"),
                             signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for job in chain(first, jobs):
            results.append(pool.submit(function, *job))
            if len(results) > 2 * len(first):  # jobs wait in memory: only a few
                yield results.popleft().result()
        yield from (result.result() for result in results)


# -----------------------------------------------------------------------------
# From texts to chunks, and how often each occurs.


def well_formed(text):
    """The text as UTF-8 can hold it: a pair of surrogates is a character, a lone one U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def compile_split(pattern):
    """The split pattern, compiled; ValueError for one that is wrong."""
    with reading(f"split pattern {pattern!r:.400}"):
        return regex.compile(pattern)


def compile_special(special_tokens):
    """A pattern that finds special tokens, the longer first. None may be empty or double."""
    names = sorted(special_tokens, key=len, reverse=True)
    if "" in names or len({*names}) < len(names):
        raise ValueError(f"special tokens {names!r:.200}: one is empty or given twice")
    return regex.compile("(" + ("|".join(map(regex.escape, names)) or "(?!)") + ")")


def split_chunks(text, compiled):
    """The chunks of a text: split_chunks("we've", compile_split(GPT2_SPLIT)) == ["we", "'ve"].
    ValueError for a pattern that leaves characters out, or takes very long, as some do."""
    if compiled.pattern in SPLITS.values():  # they are quick, and watching the time doubles it
        return (text.isascii() and ASCII_SPLITS.get(compiled.pattern) or compiled).findall(text)
    try:
        patience = PATIENCE + len(text) / 10_000
        chunks = [found[0] for found in compiled.finditer(text, timeout=patience)]
    except TimeoutError:
        raise ValueError(f"split pattern {compiled.pattern!r} is too slow: take another") from None
    if lost := len(text) - sum(map(len, chunks)):
        raise ValueError(f"split pattern {compiled.pattern!r} loses {lost} of {len(text)} "
                         r"characters: let it match all, if need be by ending it with |[\s\S]")
    return chunks


def count_group(texts, special_tokens, pattern):
    """How often each chunk (bytes) occurs in texts, when special tokens are cut out of them."""
    compiled, special = compile_split(pattern), compile_special(special_tokens)
    counts = Counter()
    for text in texts:
        for part in special.split(well_formed(text))[::2]:
            counts.update(split_chunks(part, compiled))
    return Counter({chunk.encode(): count for chunk, count in counts.items() if chunk})


def count_chunks(texts, special_tokens, pattern):
    """count_group of a text or of documents, on all cores; ValueError if there is no text."""
    texts, measured = tee([texts] if isinstance(texts, str) else texts)
    numbers = (end // JOB for end in accumulate(map(len, measured)))  # which job a text belongs to
    groups = groupby(zip(numbers, texts), lambda pair: pair[0])
    jobs = (([text for _, text in group], special_tokens, pattern) for _, group in groups)
    counts = Counter()
    for some in tqdm(on_all_cores(count_group, jobs), "split", unit="job", **QUIET):
        counts.update(some)
    if not counts:
        raise ValueError("there is no text to train on: the input is empty")
    return counts


def read_files(paths):
    """Yield the texts of UTF-8 files of any size in blocks, each up to the last letter at the end
    of a line, where a chunk of each of SPLITS ends; in a block without one, a chunk may be cut."""
    seam = regex.compile(r"(?r)\p{L}(?=[\r\n])")  # r: the last one
    for path in paths:
        with reading(path), open(path, encoding="utf-8-sig", newline="") as file:
            rest = ""
            while block := file.read(BLOCK):
                if "\0" in block:
                    raise ValueError(f"{path} is not text: it has a zero byte; give text files")
                end = found.end() if (found := seam.search(block)) else len(block)
                yield rest + block[:end]
                rest = block[end:]
            yield rest


# -----------------------------------------------------------------------------
# Training, twice: the algorithm as stated, and its fast twin. Same arguments, same merges.


def room_for_merges(vocab_size, special_tokens):
    """How many merges a vocabulary has room for; ValueError when it is too small or too large."""
    least = 256 + len(special_tokens)
    if not least <= vocab_size <= LARGEST_ID:
        raise ValueError(f"vocab_size={vocab_size} must be from {least}, the bytes and special "
                         f"tokens, to {LARGEST_ID:,}")
    return vocab_size - least


def merge(ids, pair, new_id):
    """Replace each pair, from the left: merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]."""
    merged, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


def train_plain(texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """The merges, as (left bytes, right bytes), of a text or documents: again and again the most
    frequent pair of neighbours, the greatest bytes among equals, while one occurs twice."""
    n_merges = room_for_merges(vocab_size, special_tokens)
    chunks = [(list(chunk), n) for chunk, n in count_chunks(texts, special_tokens, pattern).items()]
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


class PairIndex:
    """All distinct chunks in one row of tokens, and where each pair of neighbours stands in it.

    The row of the chunks "aab", which occurs 3 times, and "ab", 5 times, and what merge() makes of
    it when it joins a and b to X at the positions 2 and 5:

        position      0     1     2     3     4     5     6     7
        token         |     a     a     b     |     a     b     |      | ends a chunk, its id is -1
        counts        0     3     3     3     3     5     5     5      how often its chunk occurs
        pairs        |a    aa    ab    b|    |a    ab    b|    ||      one number: a * base + b
        previous     -1     0     1     2     3     4     5     6      position of the one before

        token         |     a     X           |     X           |
        pairs        |a    aX    X|    -1    |X    X|    -1    ||
        previous     -1     0     1           2     4           5

    A pair has all its positions when it appears, and later merges only take some away: a count that
    is out of date is too high, and is put right when its turn comes.
    """

    def __init__(self, counts, n_merges):
        lengths = np.array([1] + [len(chunk) + 1 for chunk in counts])
        ids = np.frombuffer(b"\0".join([b"", *counts, b""]), np.uint8).astype(np.int64)
        ids[np.cumsum(lengths) - 1] = -1
        self.counts = np.repeat(np.array([0, *counts.values()]), lengths)
        self.vocab = [bytes([i]) for i in range(256)]
        # They sort tokens downwards; the last character is above all bytes: the longer comes first.
        self.sort_keys = [chr(255 - i) + "\u0100" for i in range(256)]
        self.base = 257 + min(n_merges, len(ids))
        self.pairs = ids * self.base + np.append(ids[1:], -1)
        self.previous = np.arange(-1, len(ids) - 1)
        self.heap = []
        self.add((ids >= 0).nonzero()[0])

    def add(self, positions):
        """Add the pairs at these positions, which are all the positions that they have."""
        keys = self.pairs.take(positions)
        order = keys.argsort()
        keys, positions = keys.take(order), positions.take(order)
        starts = np.concatenate([[0], (keys[1:] != keys[:-1]).nonzero()[0] + 1])
        counts = np.add.reduceat(self.counts.take(positions), starts).tolist()
        keys, starts = keys.take(starts).tolist(), [*starts.tolist(), len(positions)]
        for i, count in enumerate(counts):
            if count < 2 or keys[i] < 0 or (keys[i] + 1) % self.base == 0:
                continue
            left, right = map(self.sort_keys.__getitem__, divmod(keys[i], self.base))
            where = positions[starts[i]:starts[i + 1]]
            heapq.heappush(self.heap, (-count, left, right, keys[i], where))

    def pop(self):
        """The most frequent pair as (left, right, positions); None when no pair occurs twice."""
        while self.heap:
            _, left, right, key, positions = heapq.heappop(self.heap)
            found = self.pairs.take(positions) == key
            if found.all():
                return *divmod(key, self.base), positions
            positions = positions.compress(found)
            count = int(self.counts.take(positions).sum())
            if count > 1:
                heapq.heappush(self.heap, (-count, left, right, key, positions))
        return None

    def merge(self, left, right, positions):
        """Join the pair at its positions, add the pairs that appear, return the merge as bytes."""
        pairs, new, size = self.pairs, len(self.vocab), len(self.vocab[left])
        if left == right:  # the pairs in "aaa" overlap: of such a run take every other one
            positions, index = np.sort(positions), np.arange(len(positions))
            starts = np.where(np.diff(positions, prepend=-1 - size) == size, 0, index)
            positions = positions[(index - np.maximum.accumulate(starts)) % 2 == 0]
        self.vocab.append(self.vocab[left] + self.vocab[right])
        self.sort_keys.append(self.sort_keys[left][:-1] + self.sort_keys[right])
        second = positions + size
        pairs[positions] = pairs.take(second) + (new - right) * self.base
        pairs[second] = -1  # no token starts here any more
        self.previous[positions + len(self.vocab[new])] = positions
        previous = self.previous.take(positions)
        pairs[previous] += new - left
        # a new token right behind a new one is already in `previous`
        positions = positions.compress(pairs.take(positions) != new * self.base + new)
        self.add(np.concatenate([previous, positions]))
        return self.vocab[left], self.vocab[right]


def train_fast(texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """train_plain, where a merge costs only what it changes, and all cores count the chunks."""
    n_merges = room_for_merges(vocab_size, special_tokens)
    index, merges = PairIndex(count_chunks(texts, special_tokens, pattern), n_merges), []
    for _ in tqdm(range(n_merges), "merge", unit="merge", **QUIET):
        if (pair := index.pop()) is None:
            break
        merges.append(index.merge(*pair))
    return merges


# -----------------------------------------------------------------------------
# Encoding and decoding: the parts, then the tokenizer with its split pattern and special tokens.


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
    """Merge pairs in `merged` (pair -> new id), the lowest new id first and of equal pairs the
    leftmost, until none is left. As tokens are linked, a million bytes take about n log n steps."""
    ids = [*ids, -1]  # no pair has -1 in it: it ends the chunk, and stands where a token was taken
    before, after = [*range(-1, len(ids) - 1)], [*range(1, len(ids) + 1)]
    heap = [(merged[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merged]
    heapq.heapify(heap)
    while heap:
        new, i = heapq.heappop(heap)
        j = after[i]
        if merged.get((ids[i], ids[j])) != new:
            continue  # another merge took one of the two
        ids[i], ids[j], after[i] = new, -1, after[j]
        before[after[i]] = i
        for left, right in (before[i], i), (i, after[i]):
            if (ids[left], ids[right]) in merged:
                heapq.heappush(heap, (merged[ids[left], ids[right]], left))
    return [token for token in ids if token >= 0]


def recover_merges(tokens):
    """The merges behind {id: bytes}: each joins the two parts that earlier ones leave."""
    byte_order = b"".join(tokens[id] for id in range(256) if len(tokens.get(id, b"")) == 1)
    byte_ids, merged, merges = invert(byte_order), {}, []
    for new, id in enumerate(sorted(tokens)[256:], 256):
        if id != new:
            raise ValueError(f"id {new} is no merge, but {id} is one: the merges must come first, "
                             "without a gap, then the special tokens")
        parts = apply_merges(tokens[id].translate(byte_ids), merged)
        if len(parts) != 2:
            raise ValueError(f"token {id} is not the merge of two before it")
        merged[tuple(parts)] = id
        merges.append((tokens[parts[0]], tokens[parts[1]]))
    return merges, byte_order


def awkward(text):
    """Whether tiktoken may split a text of our patterns otherwise than `regex`, or cannot. Each
    knows its own version of Unicode, and many thousand blanks in a row overflow its stack."""
    blank = any(text[i:i + BLANKS].isspace() for i in range(0, len(text) - BLANKS + 1, BLANKS))
    return blank or not text.isascii() and any(
        char == "\u0295" or unicodedata.category(char) == "Cn" for char in {*text})


# What a tokenizer.json holds: the name of one of SPLITS or a pattern, name -> id, the bytes of the
# ids 0 to 255, and "left right" for each merge, as to_chars() writes them.
TokenizerFile = make_dataclass("TokenizerFile", dict(
    format=str, pattern=str, special_tokens=dict, bytes=str, merges=list).items())


class Tokenizer:
    """Text to ids and back. Ids are the 256 bytes, byte_order[id] being the byte of an id, the
    merges in order, then the special tokens: a list, or a dict name -> id with gaps."""

    def __init__(self, merges, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT,
                 byte_order=bytes(range(256))):
        self.merges, self.pattern, self.byte_order = list(merges), pattern, bytes(byte_order)
        self.split_pattern = compile_split(pattern)
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
                                 f"be a free number after all merges, below {LARGEST_ID:,}")
            self.tokens[id] = name.encode()
        self.n_vocab, self.eot = max(self.tokens) + 1, self.special.get("<|endoftext|>")

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Train on a str or documents; n_vocab is below vocab_size when they have too few pairs."""
        return cls(train_fast(texts, vocab_size, special_tokens, pattern), special_tokens, pattern)

    @classmethod
    def train_files(cls, paths, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Train on UTF-8 text files of any size, in blocks: see read_files."""
        return cls.train(read_files(paths), vocab_size, special_tokens, pattern)

    def encode(self, text, special=False):
        """The ids of a text; special tokens in it become their ids only with special=True."""
        text, ids = well_formed(text), []
        for i, part in enumerate(self.find_special.split(text) if special else [text]):
            if i % 2:
                ids.append(self.special[part])
                continue
            for chunk in split_chunks(part, self.split_pattern):
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

    def encode_iterable(self, texts, special=False):
        """Yield the ids of texts, such as the lines of an open file: no more than one is held."""
        for text in texts:
            if len(self.cache) > CACHE >> 4:
                self.cache.clear()  # to stay below a megabyte
            yield from self.encode(text, special)

    def encode_batch(self, texts):
        """[encode(text) of each text], on all cores by the fast twin where that gives the same."""
        texts = list(texts)
        fast = [self.pattern in SPLITS.values() and not awkward(text) for text in texts]
        ids = iter(self.to_tiktoken().encode_ordinary_batch(
            [*compress(texts, fast)], num_threads=os.cpu_count() or 1))
        return [next(ids) if quick else self.encode(text) for text, quick in zip(texts, fast)]

    def token(self, id):
        """The bytes of an id; ValueError for an id outside the vocabulary."""
        if id not in self.tokens:
            raise ValueError(f"token id {id} is not in this vocabulary of {self.n_vocab}")
        return self.tokens[id]

    def decode(self, ids):
        """The text of any ids of the vocabulary; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token, ids)).decode("utf-8", "replace")

    def decoder(self):
        """A function: the next id -> the characters that it completes; without an id, the rest."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda id=None: utf8.decode(b"" if id is None else self.token(id), id is None)

    def render_chat(self, messages, last=("assistant",)):
        """The ids of a chat to train on, and its loss mask: True for what the assistant says and
        the <|end|> after it. A message, a dict with role and content, is <|role|>content<|end|>,
        <|endoftext|> before the first. The system speaks only first, roles in `last` also last."""
        if missing := [name for name in SPECIAL_TOKENS if name not in self.special]:
            raise ValueError(f"this tokenizer lacks {', '.join(missing)} for chats: train another")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"a chat is a list of messages, not {messages!r:.40}")
        ids, loss_mask = [self.eot], [False]
        for i, message in enumerate(messages):
            roles = ["user", "assistant", "tool"] if i else ["system", "user"]
            if not (isinstance(message, dict) and isinstance(message.get("content"), str)
                    and message.get("role") in roles):
                raise ValueError(f"message {i} is {message!r:.60}: it must be a dict of content, a "
                                 f"str, and role, here {' or '.join(roles)}")
            if i == len(messages) - 1 and message["role"] not in last:
                raise ValueError(f"the last message, {i}, is of role {message['role']}: it must be "
                                 f"of {' or '.join(last)}")
            text = [*self.encode(message["content"]), self.special["<|end|>"]]
            ids += [self.special[f"<|{message['role']}|>"], *text]
            loss_mask += [False] + [message["role"] == "assistant"] * len(text)
        return ids, loss_mask

    def render_prompt(self, messages):
        """The ids of a chat up to where the assistant begins; it ends its answer with <|end|>."""
        ids, _ = self.render_chat(messages, last=("user", "tool"))
        return [*ids, self.special["<|assistant|>"]]

    def token_bytes(self):
        """The bytes of each id, in a list; b"" for an id that no token has."""
        return [self.tokens.get(id, b"") for id in range(self.n_vocab)]

    def definition(self):
        """The fields of a TokenizerFile."""
        names = {pattern: name for name, pattern in SPLITS.items()}
        merges = [f"{to_chars(left)} {to_chars(right)}" for left, right in self.merges]
        return dict(format=FORMAT, pattern=names.get(self.pattern, self.pattern),
                    special_tokens=self.special, bytes=to_chars(self.byte_order), merges=merges)

    def hash(self):
        """The sha256 of the definition: equal for tokenizers that are equal."""
        return hashlib.sha256(json.dumps(self.definition()).encode()).hexdigest()

    def save(self, path):
        """Write the definition as a JSON file, complete or not at all."""
        write_json(path, self.definition())

    @classmethod
    def load(cls, path):
        """Read what save() wrote; ValueError for a file that is something else, or wrong."""
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{path} is no tokenizer of this version of the program: train one")
        file = check_fields(TokenizerFile, values, path)
        with reading(path):
            merges = [tuple(map(to_bytes, line.split(" "))) for line in file.merges]
            pattern = SPLITS.get(file.pattern, file.pattern)
            return cls(merges, file.special_tokens, pattern, to_bytes(file.bytes))

    def to_tiktoken(self):
        """The fast twin, made once: a tiktoken.Encoding with the same ids, see awkward()."""
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
        pattern = encoding._pat_str
        with reading(encoding.name):
            merges, byte_order = recover_merges(tokens)
            return cls(merges, encoding._special_tokens, PLAIN.get(pattern, pattern), byte_order)

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt, special_tokens=()):
        """The tokenizer of GPT-2's two files, with its ids; special_tokens they lack follow."""
        vocab = read_json(vocab_json)
        with reading(f"{vocab_json}, {merges_txt}"):
            lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
            merges = [tuple(map(to_bytes, line.split(" ")))
                      for line in lines[lines[0].startswith("#version"):] if line]
            byte_order = to_bytes(sorted(CHAR_TO_BYTE, key=vocab.__getitem__))
            for name in special_tokens:
                vocab.setdefault(name, max(vocab.values()) + 1)
            n = 256 + len(merges)  # what is neither a byte nor a merge is special
            special = {name: id for name, id in vocab.items() if id >= n}
            tokenizer = cls(merges, special, GPT2_SPLIT, byte_order)
            if any(vocab.get(to_chars(tokenizer.tokens[id])) != id for id in range(n)):
                raise ValueError("ids must go to the 256 bytes first, then to the merges in order")
            return tokenizer


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["train", "show", "encode", "decode"])
    parser.add_argument("input", nargs="+", help="train: files; encode, show: a text; decode: ids")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of train (default 4096)")
    parser.add_argument("--pattern", choices=SPLITS, default="gpt4", help="of train (default gpt4)")
    path = "tokenizer.json"
    parser.add_argument("--out", default=path, help=f"train writes it (default {path})")
    parser.add_argument("--tokenizer", default=path, help=f"the others read it (default {path})")
    args = parser.parse_intermixed_args()
    idle = ["tokenizer"] if args.command == "train" else ["vocab_size", "pattern", "out"]
    changed = [name for name in idle if getattr(args, name) != parser.get_default(name)]
    refuse_idle(changed, idle, f"beside {args.command}")
    if args.command == "train":
        start, texts = time.time(), read_files(args.input)
        sample = next(filter(None, texts), "")  # a pipe can be read only once
        tokenizer = Tokenizer.train(chain([sample], texts), args.vocab_size,
                                    pattern=SPLITS[args.pattern])
        tokenizer.save(args.out)
        ratio = len(sample.encode()) / len(tokenizer.encode_batch([sample])[0])
        few = " (no other pair occurs twice)" if tokenizer.n_vocab < args.vocab_size else ""
        print(f"{len(tokenizer.merges)} merges, {tokenizer.n_vocab} tokens{few}, {ratio:.2f} bytes "
              f"per token, {time.time() - start:.1f} s; next: "
              f'python tokenizer.py show "some text" --tokenizer={args.out}')
        return
    tokenizer, text = Tokenizer.load(args.tokenizer), " ".join(args.input)
    if args.command == "encode":
        print(*tokenizer.encode(text))
    elif args.command == "show":  # a part of a character cannot be printed: its bytes are shown
        tokens = map(tokenizer.token, tokenizer.encode(text))
        print(*(token.decode("utf-8", "backslashreplace") for token in tokens), sep="|")
    else:
        with reading("the list of ids"):
            print(tokenizer.decode(map(int, args.input)))


if __name__ == "__main__":
    run_command(main)
