"""
Text to token ids and back: byte-level BPE, trained here.

    python tokenizer.py train corpus.txt --vocab_size=4096 --out=tokenizer.json
    python tokenizer.py show "def hello(name):" --tokenizer=tokenizer.json
    python tokenizer.py encode "def hello(name):"
    python tokenizer.py decode 100 101 102
"""

import argparse
import codecs
import contextlib
import difflib
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import types
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

# What a merge may not cross: text is first split into chunks, here as GPT-2 and as GPT-4 do it.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_SPLIT = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
              r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
SPLITS = {"gpt2": GPT2_SPLIT, "gpt4": GPT4_SPLIT}
SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]

# -----------------------------------------------------------------------------
# What every command shares: options, errors in one line, files never half written, all cores.


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option ends in one line that names the nearest right one, with exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1].replace("-", "_"),
                                             [o.replace("-", "_") for o in self._option_string_actions], 1)
            message = f"unknown option {unknown[1]}"
            message += f", did you mean {near[0].replace('__', '--', 1)}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run_command(main):
    """Call main(): a user's mistake (ValueError, OSError) ends in one line and exit code 1, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows "?" for it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror or error}{name}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that appears at `path` complete or not at all: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def on_all_cores(function, jobs):
    """Yield function(*job) for each job, in order, from one process per core; a single job runs here.

    Jobs and results are sent between processes. Those start fresh: a fork would copy the locks of torch's threads.
    """
    jobs = iter(jobs)
    first = list(islice(jobs, min(os.cpu_count() or 1, 32)))
    if len(first) < 2 or multiprocessing.current_process().daemon:
        for job in chain(first, jobs):
            yield function(*job)
        return
    pool = ProcessPoolExecutor(len(first), multiprocessing.get_context("spawn"),
                               signal.signal, (signal.SIGINT, signal.SIG_IGN))
    main = sys.modules["__main__"]
    # A new process runs the script that was started once more, unless it sees an empty one.
    shown = main if function.__module__ == "__main__" else types.ModuleType("__main__")
    results = deque()
    try:
        for job in chain(first, jobs):
            sys.modules["__main__"] = shown
            try:
                results.append(pool.submit(function, *job))
            finally:
                sys.modules["__main__"] = main
            if len(results) > 2 * len(first):
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# From texts to chunks, each with how often it occurs.

PIECE = 1 << 21  # characters that one process counts at a time


def well_formed(text):
    """The text that UTF-8 can hold: a pair of surrogates becomes its character, a lone one U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def compile_split(pattern):
    """The split pattern, compiled; ValueError when it is none."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"split pattern {pattern!r} does not compile: {error}") from None
    if compiled.groups:
        raise ValueError(f"split pattern {pattern!r} has a capturing group; write (?:...) instead of (...)")
    return compiled


def split(text, compiled):
    """The chunks of a text: split(" we've 2", compile_split(GPT2_SPLIT)) == [" we", "'ve", " 2"]."""
    chunks = compiled.findall(text)
    lost = len(text) - sum(map(len, chunks))
    if lost:
        raise ValueError(f"split pattern {compiled.pattern!r} loses {lost} of {len(text)} characters; "
                         r"let it match everything, for example by ending it with |[\s\S]")
    return chunks


def special_pattern(special_tokens):
    """A pattern that finds the special tokens, where two start at one place the longer; None without any."""
    names = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, names)) + ")") if names else None


def count_chunks(texts, special_tokens, pattern):
    """How often each chunk (bytes) occurs in a list of texts. Special tokens are cut out and end a chunk."""
    compiled, specials = compile_split(pattern), special_pattern(special_tokens)
    counts = Counter()
    for text in map(well_formed, texts):
        for part in specials.split(text)[::2] if specials else [text]:
            counts.update(split(part, compiled))
    return Counter({chunk.encode(): count for chunk, count in counts.items() if chunk})


def cut(stream, special_tokens, pattern):
    """Yield a long text in pieces, cut between a letter and a newline.

    There a chunk of our patterns always ends. Nobody knows about other patterns: they get the text whole.
    """
    known = pattern in SPLITS.values() and not any("\n" in token for token in special_tokens)
    seam = regex.compile(r"(?r)\p{L}(?=[\r\n])")  # r: the last one
    rest = []
    while block := stream.read(PIECE):
        found = seam.search(block) if known else None
        if found:
            yield "".join(rest) + block[:found.end()]
            rest = [block[found.end():]]
        else:
            rest.append(block)
    yield "".join(rest)


def gather(texts, special_tokens, pattern):
    """Yield jobs for count_chunks: documents together, a long one in pieces, about PIECE characters each."""
    batch, length = [], 0
    for text in [texts] if isinstance(texts, str) else texts:
        for part in cut(io.StringIO(text, newline=""), special_tokens, pattern) if len(text) > PIECE else [text]:
            batch.append(part)
            length += len(part)
            if length >= PIECE:
                yield batch, special_tokens, pattern
                batch, length = [], 0
    yield batch, special_tokens, pattern


def read_files(paths, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """Yield the text of each file, a long one in pieces; ValueError for a file that is not UTF-8 text."""
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for text in cut(file, special_tokens, pattern):
                    if "\0" in text:
                        raise ValueError(f"{path} is binary (it has a zero byte); a tokenizer is trained on text")
                    yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x}); convert it first") from None


# -----------------------------------------------------------------------------
# Training, twice: the algorithm as stated, and its fast twin. Same arguments, same merges.


def check_vocabulary(vocab_size, special_tokens):
    """How many merges a vocabulary has room for; ValueError for one that is too small."""
    for token in special_tokens:
        if not token:
            raise ValueError("a special token is empty; give it a name such as <|endoftext|>")
    twice = [token for token, count in Counter(list(special_tokens)).items() if count > 1]
    if twice:
        raise ValueError(f"special token {twice[0]!r} is given twice; name each once")
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} "
                         f"special tokens need at least {least}")
    return vocab_size - least


def merge(ids, pair, new_id):
    """Replace each occurrence of pair, from the left: merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]."""
    merged, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


def train_plain(texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """Byte-pair encoding as stated: merge the most frequent pair of neighbours, again and again.

    Texts are a str or documents. Returns merges as (left bytes, right bytes) in order; fewer than asked for when
    no pair occurs twice any more. Of equally frequent pairs the one whose bytes compare greatest is taken.
    """
    n_merges = check_vocabulary(vocab_size, special_tokens)
    texts = [texts] if isinstance(texts, str) else texts
    chunks = [(list(chunk), count) for chunk, count in count_chunks(texts, special_tokens, pattern).items()]
    if not chunks:
        raise ValueError("there is no text to train on: the input is empty")
    vocab, merges = [bytes([i]) for i in range(256)], []
    while len(merges) < n_merges:
        counts = Counter()
        for ids, count in chunks:
            for pair in zip(ids, ids[1:]):
                counts[pair] += count
        best = max(counts, key=lambda pair: (counts[pair], vocab[pair[0]], vocab[pair[1]]), default=None)
        if counts[best] < 2:
            break
        chunks = [(merge(ids, best, len(vocab)), count) for ids, count in chunks]
        merges.append((vocab[best[0]], vocab[best[1]]))
        vocab.append(b"".join(merges[-1]))
    return merges


def descending(token):
    """A key that sorts bytes the other way round: descending(b"b") < descending(b"ab") < descending(b"a")."""
    return token.translate(bytes(range(255, -1, -1))).decode("latin-1") + "\u0100"  # the end is above all bytes


class Row:
    """All distinct chunks as one row of ids, and a queue of its pairs, the most frequent first.

    A token is written at its first and its last place in the row, so both neighbours of a token are found without a
    list of links. A pair knows its places from the moment it appears: later merges only take some away. So counts in
    the queue never are too low, and it is enough to count a pair again when its turn comes.
    """

    def __init__(self, counts, n_merges):
        lengths = np.array([1] + [len(chunk) + 1 for chunk in counts])
        self.ids = np.frombuffer(b"\0".join([b"", *counts, b""]), np.uint8).astype(np.int32)
        self.ids[np.cumsum(lengths) - 1] = -1  # -1 between the chunks
        self.counts = np.repeat(np.array([0, *counts.values()]), lengths)
        self.vocab = [bytes([i]) for i in range(256)]
        self.sizes = np.ones(256 + n_merges, np.int64)
        self.orders = [descending(token) for token in self.vocab]
        self.queue = []
        places = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0))
        self.enqueue(self.ids[places] * 256 + self.ids[places + 1], places, lambda key: divmod(key, 256))

    def enqueue(self, keys, places, pair_of):
        """Queue the pairs that start at `places`; equal keys are equal pairs."""
        both = np.sort(keys.astype(np.int64) << 32 | places)  # one number sorts faster than two
        keys, places = both >> 32, both & 0xFFFFFFFF
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        if not len(starts):
            return
        counts = np.add.reduceat(self.counts[places], starts).tolist()
        ends = [*starts[1:].tolist(), len(places)]
        for key, count, start, end in zip(keys[starts].tolist(), counts, starts.tolist(), ends):
            if count > 1:
                left, right = pair_of(key)
                entry = (-count, self.orders[left], self.orders[right], left, right, places[start:end])
                heapq.heappush(self.queue, entry)

    def pop(self):
        """The most frequent pair (left, right) and its places; None when no pair occurs twice."""
        while self.queue:
            count, *order, left, right, places = heapq.heappop(self.queue)
            after = places + self.sizes[left]
            places = places[(self.ids[places] == left) & (self.ids[after] == right)]
            now = self.counts[places].sum()
            if now == -count:
                return left, right, places
            if now > 1:
                heapq.heappush(self.queue, (int(-now), *order, left, right, places))

    def merge(self, left, right, places):
        """Join the pair at its places and queue the pairs that this makes; return the merge."""
        ids, sizes, new, size = self.ids, self.sizes, len(self.vocab), self.sizes[left]
        if left == right:  # in "aaa" the second pair overlaps the first: of a run take every other one
            index = np.arange(len(places))
            starts = np.where(np.diff(places, prepend=-1 - size) != size, index, 0)
            places = places[(index - np.maximum.accumulate(starts)) % 2 == 0]
        self.vocab.append(self.vocab[left] + self.vocab[right])
        self.orders.append(descending(self.vocab[-1]))
        sizes[new] = len(self.vocab[-1])
        ends = places + sizes[new]
        ids[places + size - 1] = ids[places + size] = -2
        ids[places] = ids[ends - 1] = new
        before, after = ids[places - 1], ids[ends]
        inner, outer = before >= 0, (after >= 0) & (after != new)  # (new, new) is found from its right side
        keys = np.concatenate([before[inner], after[outer] + len(sizes)])
        starts = np.concatenate([places[inner] - sizes[before[inner]], places[outer]])
        self.enqueue(keys, starts, lambda key: (key, new) if key < len(sizes) else (new, key - len(sizes)))
        return self.vocab[left], self.vocab[right]


def train_fast(texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """train_plain, where a merge costs what it changes, and chunks are split and counted on all cores."""
    n_merges = check_vocabulary(vocab_size, special_tokens)
    counts = Counter()
    for some in on_all_cores(count_chunks, gather(texts, special_tokens, pattern)):
        counts.update(some)
    if not counts:
        raise ValueError("there is no text to train on: the input is empty")
    row, merges = Row(counts, n_merges), []
    for _ in tqdm(range(n_merges), "merges", disable=None, delay=1, leave=False):
        found = row.pop()
        if found is None:
            break
        merges.append(row.merge(*found))
    return merges


# -----------------------------------------------------------------------------
# The tokenizer: merges, special tokens and a split pattern make ids of text, and text of ids.

# GPT-2 writes bytes as characters that print: those which do stand for themselves, the others are moved up.
# Its vocabulary, and those of tiktoken, number the bytes in this order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_BYTES = bytes(PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE])
BYTE_TO_CHAR = {byte: chr(byte if i < len(PRINTABLE) else 256 + i - len(PRINTABLE)) for i, byte in enumerate(GPT2_BYTES)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
CACHE = 1 << 16  # chunks whose ids an encoder remembers, none longer than 64 characters
FORMAT, VERSION = "byte-level BPE", 1


def to_chars(token):
    """Bytes in GPT-2's printable characters: to_chars(b" a") == "Ġa"."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def to_bytes(chars):
    """The bytes that to_chars wrote."""
    return bytes(CHAR_TO_BYTE[char] for char in chars)


def invert(byte_order):
    """The id of each byte as a table for bytes.translate."""
    return bytes(sorted(range(256), key=bytes(byte_order).__getitem__))


def has_long_space(text):
    """Whether 200,000 white-space characters stand in a row (100,000 may): then one of the blocks is nothing else."""
    size = 100_000
    return any(text[i:i + size].isspace() for i in range(0, len(text) - size + 1, size))


def apply_merges(ids, merged):
    """Merge until no pair of neighbours is in `merged` (pair -> new id): the lowest new id first, from the left.

    A heap of the pairs that can merge and a list of neighbours take n log n steps for a chunk of any length.
    """
    ids, n = list(ids), len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    places, heap = {}, []

    def wait(i, j):
        new = merged.get((ids[i], ids[j])) if i >= 0 and j < n else None
        if new is not None:
            if new not in places:
                places[new] = []
                heapq.heappush(heap, new)
            places[new].append(i)

    for i in range(n - 1):
        wait(i, i + 1)
    while heap:
        new = heapq.heappop(heap)
        for i in sorted(places.pop(new)):
            j = after[i]
            if j < n and merged.get((ids[i], ids[j])) == new:  # neither has been merged since
                ids[i], ids[j], after[i] = new, -1, after[j]
                if after[i] < n:
                    before[after[i]] = i
                wait(before[i], i)
                wait(i, after[i])
    return [token for token in ids if token >= 0]


class StreamDecoder:
    """Ids one by one to text in whole characters: what push and flush return joins to decode(ids)."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        """The characters that this id completes, often one, sometimes none."""
        return self.utf8.decode(lookup(self.tokens, id))

    def flush(self):
        """The end of the text: U+FFFD for a character that was begun only."""
        return self.utf8.decode(b"", final=True)


def lookup(tokens, id):
    """The bytes of an id; ValueError for one outside the vocabulary."""
    if id not in tokens:
        raise ValueError(f"token id {id} is not in this vocabulary of {max(tokens) + 1}")
    return tokens[id]


class Tokenizer:
    """Text to ids and back. Ids count the 256 bytes, then the merges in order, then the special tokens.

    special_tokens is a list, or a dict of name -> id where there are gaps; byte_order is the byte of each id below 256.
    """

    def __init__(self, merges, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT, byte_order=bytes(range(256))):
        self.merges, self.pattern, self.byte_order = list(merges), pattern, bytes(byte_order)
        self.tokens = {id: bytes([byte]) for id, byte in enumerate(byte_order)}
        ids = {token: id for id, token in self.tokens.items()}
        if len(ids) != 256:
            raise ValueError("the byte order does not name each of the 256 bytes once")
        self.merged = {}
        for left, right in self.merges:
            if left not in ids or right not in ids or left + right in ids:
                raise ValueError(f"merge {len(self.merged)} ({left!r}, {right!r}) is wrong: its parts must be "
                                 "tokens before it, its result must be new")
            new = self.merged[ids[left], ids[right]] = ids[left + right] = len(ids)
            self.tokens[new] = left + right
        n_merged = len(self.tokens)
        check_vocabulary(sys.maxsize, special_tokens)
        if not isinstance(special_tokens, dict):
            special_tokens = {name: n_merged + i for i, name in enumerate(special_tokens)}
        self.special = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        for name, id in self.special.items():
            if id in self.tokens:
                raise ValueError(f"special token {name!r} has id {id}, which is taken")
            self.tokens[id] = name.encode()
        self.n_vocab = max(self.tokens) + 1
        self.eot = self.special.get("<|endoftext|>")
        self.split, self.find_special = compile_split(pattern), special_pattern(self.special)
        self.byte_ids, self.cache, self.twin = invert(self.byte_order), {}, None

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Train on a str or on documents one by one; n_vocab is below vocab_size where they hold too few pairs."""
        return cls(train_fast(texts, vocab_size, special_tokens, pattern), special_tokens, pattern)

    @classmethod
    def train_files(cls, paths, vocab_size, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
        """Train on UTF-8 files of any size; only a piece of them is in memory at a time."""
        return cls.train(read_files(paths, special_tokens, pattern), vocab_size, special_tokens, pattern)

    def encode(self, text, special=False):
        """Ids of a text. Only with special=True do special tokens in it become their ids.

        A lone surrogate, which no UTF-8 can hold, is encoded as U+FFFD.
        """
        text, ids = well_formed(text), []
        parts = self.find_special.split(text) if special and self.find_special else [text]
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special[part])
                continue
            for chunk in split(part, self.split):
                ids += self.cache.get(chunk) or self.encode_chunk(chunk)
        return ids

    def encode_chunk(self, chunk):
        """Ids of one chunk; those of short ones are remembered."""
        ids = apply_merges(chunk.encode().translate(self.byte_ids), self.merged)
        if len(chunk) <= 64 and len(self.cache) < CACHE:
            self.cache[chunk] = ids
        return ids

    def encode_iterable(self, texts):
        """Yield the ids of the texts, one text after the other, each encoded when its turn comes."""
        for text in texts:
            yield from self.encode(text)

    def encode_batch(self, texts):
        """The ids of each text, by the fast twin on all cores."""
        texts = list(texts)
        # tiktoken runs out of stack on about a million white-space characters in a row
        slow = {i: self.encode(text) for i, text in enumerate(texts) if has_long_space(text)}
        fast = [text for i, text in enumerate(texts) if i not in slow]
        fast = iter(self.to_tiktoken().encode_ordinary_batch(fast, num_threads=os.cpu_count() or 1))
        return [slow[i] if i in slow else next(fast) for i in range(len(texts))]

    def decode(self, ids):
        """Text of any ids of the vocabulary; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([lookup(self.tokens, id) for id in ids]).decode("utf-8", "replace")

    def decoder(self):
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self.tokens)

    def token_bytes(self):
        """The bytes of each id in a list, empty where the ids have a gap."""
        return [self.tokens.get(id, b"") for id in range(self.n_vocab)]

    def state(self):
        """What defines the tokenizer, readable: bytes are written in GPT-2's printable characters."""
        merges = [f"{to_chars(left)} {to_chars(right)}" for left, right in self.merges]
        return dict(pattern=self.pattern, special_tokens=self.special, bytes=to_chars(self.byte_order), merges=merges)

    def hash(self):
        """sha256 of what defines the tokenizer: equal for equal tokenizers only."""
        return hashlib.sha256(json.dumps(self.state()).encode()).hexdigest()

    def save(self, path):
        """Write a JSON file, complete or not at all."""
        state = dict(format=FORMAT, version=VERSION, sha256=self.hash(), **self.state())
        with replacing(path) as file:
            file.write(json.dumps(state, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path):
        """Read a tokenizer that save() wrote; ValueError for a file that is another or damaged."""
        try:
            state = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer: it is not JSON ({error})") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path} is not a tokenizer that this program saved: its format is not {FORMAT!r}")
        if state.get("version") != VERSION:
            raise ValueError(f"{path} has version {state.get('version')}; this program reads {VERSION}")
        try:
            merges = [tuple(map(to_bytes, line.split(" "))) for line in state["merges"]]
            tokenizer = cls(merges, state["special_tokens"], state["pattern"], to_bytes(state["bytes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
        if tokenizer.hash() != state.get("sha256"):
            raise ValueError(f"{path} is damaged: its content does not fit its sha256; train again or take a copy")
        return tokenizer

    def to_tiktoken(self):
        """The fast twin: a tiktoken.Encoding with the same ids, made once."""
        if self.twin is None:
            import tiktoken
            ranks = {token: id for id, token in self.tokens.items() if id not in self.special.values()}
            self.twin = tiktoken.Encoding(self.hash()[:8], pat_str=self.pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        return self.twin

    @classmethod
    def from_tiktoken(cls, encoding):
        """A tokenizer with the ids of a tiktoken.Encoding. It has no merges, only ranks, but those say what merged."""
        special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        tokens = []
        for id in range(encoding.n_vocab):
            with contextlib.suppress(KeyError):  # no token has this id
                tokens += [encoding.decode_single_token_bytes(id)] if id not in special.values() else []
        byte_order = b"".join(tokens[:256])
        byte_ids, merged, merges = invert(byte_order), {}, []
        for id, token in enumerate(tokens[256:], 256):
            parts = apply_merges(token.translate(byte_ids), merged)
            if len(parts) != 2:
                raise ValueError(f"token {id} {token!r} of {encoding.name} is not made of two tokens before it")
            merged[tuple(parts)] = id
            merges.append((tokens[parts[0]], tokens[parts[1]]))
        return cls(merges, special, encoding._pat_str, byte_order)

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt, special_tokens=()):
        """A tokenizer from GPT-2's two files, with its ids; special tokens are what else vocab.json holds.

        Those given in special_tokens follow after them, where vocab.json lacks them.
        """
        try:
            vocab = json.loads(Path(vocab_json).read_bytes())
            lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            merges = [tuple(map(to_bytes, line.split(" "))) for line in lines]
            byte_order = sorted(BYTE_TO_CHAR, key=lambda byte: vocab[BYTE_TO_CHAR[byte]])
            special = {name: id for name, id in vocab.items() if id >= 256 + len(merges)}
            for name in special_tokens:
                special.setdefault(name, max(len(vocab), *special.values()))
            tokenizer = cls(merges, special, GPT2_SPLIT, byte_order)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{vocab_json} and {merges_txt} are not GPT-2's: {error!r}") from None
        for id in range(256 + len(merges)):
            if vocab.get(to_chars(tokenizer.tokens[id])) != id:
                raise ValueError(f"{vocab_json} does not number the merges of {merges_txt} in their order")
        return tokenizer


# -----------------------------------------------------------------------------
# Commands.


def train_command(args):
    start = time.time()
    tokenizer = Tokenizer.train_files(args.input, args.vocab_size, pattern=SPLITS[args.pattern])
    tokenizer.save(args.out)
    few = "" if tokenizer.n_vocab == args.vocab_size else f" (the text has no more; {args.vocab_size} were asked for)"
    sample = next(filter(None, read_files(args.input)))
    [ids] = tokenizer.encode_batch([sample])
    print(f"{len(tokenizer.merges)} merges, {tokenizer.n_vocab} tokens{few}, {len(sample.encode()) / len(ids):.2f} bytes "
          f"per token, {time.time() - start:.1f} s, {args.out}; next: "
          f'python tokenizer.py show "some text" --tokenizer={args.out}')


def encode_command(args):
    print(*Tokenizer.load(args.tokenizer).encode(" ".join(args.input)))


def decode_command(args):
    wrong = [word for word in args.input if not word.isdecimal()]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not a token id; give ids as whole numbers: decode 72 105")
    print(Tokenizer.load(args.tokenizer).decode(map(int, args.input)))


def show_command(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    ids = tokenizer.encode(" ".join(args.input))
    # a piece of a character is no character: show its bytes
    pieces = [tokenizer.tokens[id].decode("utf-8", "backslashreplace") for id in ids]
    if sys.stdout.isatty():
        colours = [f"\x1b[30;48;5;{colour}m" for colour in (152, 222, 183, 157, 216)]
        print("".join(f"{colours[i % 5]}{piece}\x1b[0m" for i, piece in enumerate(pieces)))
    else:
        print("|".join(pieces))


COMMANDS = {"train": train_command, "encode": encode_command, "decode": decode_command, "show": show_command}


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("input", nargs="+", help="files to train on, a text to encode or show, ids to decode")
    parser.add_argument("--vocab_size", type=int, default=4096, help="bytes, merges and special tokens")
    parser.add_argument("--pattern", choices=SPLITS, default="gpt4", help="how text is split into chunks")
    parser.add_argument("--out", default="tokenizer.json", help="the file that train writes")
    parser.add_argument("--tokenizer", default="tokenizer.json", help="the file that the others read")
    args = parser.parse_intermixed_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_command(main)
