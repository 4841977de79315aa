"""
Text that occurs twice: repeated lines, near-duplicate documents, and test questions in a corpus.

    python -m chapters.near FILES...             # prints clusters of near-duplicates

Near-duplicates as in arXiv:2107.06499: documents become sets of shingles (n words in a row), these
by MinHash signatures, and those that agree in a band are compared in full. The corpus may lie in a
file (data.Documents): in memory are about 160 bytes a document, 128 of them the keys of 16 bands.
"""

import sys
import tempfile
import unicodedata
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

if __name__ == "__main__":  # `python chapters/near.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import regex
from tqdm import tqdm

from data import Documents, clean, read_documents
from tokenizer import QUIET, Parser, run_command

# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces: each character is a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
WORD = regex.compile(rf"[^\W_{UNSPACED}]+|[^\W_]")
SIGNS = regex.compile("[\xa0\u2010-\u2016\u2018-\u2027]")  # dashes, quotes: all that English has
ASCII_WORDS = bytes(c if chr(c).isalnum() and c < 128 else 32 for c in bytes(range(256)).lower())
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, its bits without a pattern: 2**64 / the golden ratio
BLOCK = 1024  # shingles that are permuted at a time: what does not fit the cache is slow
NEIGHBORS = 8  # members of a bucket that another one is compared with, at most
LEAST = 5  # words of a question: shorter ones stand in many a text by chance

# -----------------------------------------------------------------------------
# From a text to the set of its shingles.


def words(text):
    """The words of a text, without case and punctuation: words("Don't!") == [b"don", b"t"]. Where
    there are none, the text is its only word."""
    if (plain := text if text.isascii() else SIGNS.sub(" ", text)).isascii():
        found = plain.encode().translate(ASCII_WORDS).split()
    else:
        found = " ".join(WORD.findall(unicodedata.normalize("NFKC", text).lower())).encode().split()
    return found or [text.strip().encode("utf-8", "surrogatepass")]


def word_hashes(text):
    """A number below 2**32 for each word of a text, as uint64."""
    return np.array([*map(crc32, words(text))], np.uint64)


def combine(columns, number=0):
    """One uint64 of several: a polynomial in MULTIPLIER, modulo 2**64."""
    for column in columns:
        number = number * MULTIPLIER + column
    return number


def gram_hashes(ids, n):
    """A number for each n ids in a row, nearly always another for others."""
    ids, count = np.asarray(ids).astype(np.uint64), max(0, len(ids) - n + 1)
    return combine(ids[i:i + count] for i in range(n))


def shingles(text, n):
    """The sorted numbers of a text's different runs of n words; a shorter text is one run."""
    ids = word_hashes(text)
    hashes = np.sort(gram_hashes(ids, min(n, len(ids))))
    return hashes[np.append(True, hashes[1:] != hashes[:-1])]  # np.unique takes twice the time


def jaccard(a, b):
    """The similarity of two sets, sorted arrays: the share of their elements that is in both."""
    n_shared = len(np.intersect1d(a, b, assume_unique=True))
    return n_shared / (len(a) + len(b) - n_shared)


# -----------------------------------------------------------------------------
# MinHash: sets become signatures, which share bands. Two sets agree in a hash with a probability of
# their Jaccard similarity: each element of the union is as likely to be the smallest as another.


def permutations(hashes, seed):
    """Factors and summands of random permutations x -> factor * x + summand modulo 2**32, uint32 of
    shape (2, hashes, 1); the factors are odd, so that no two x become one."""
    random = np.random.RandomState(seed)  # default_rng may change with numpy
    return random.randint(0, 2**32, (2, hashes, 1), np.uint32) | np.uint32([[[1]], [[0]]])


def signature(shingles, permutations):
    """The smallest of the shingles, modulo 2**32, behind each permutation, uint32: (hashes,)."""
    factors, summands = permutations
    blocks = np.split(shingles.astype(np.uint32), range(BLOCK, len(shingles), BLOCK))
    return np.min([(x * factors + summands).min(axis=1) for x in blocks], axis=0)


def band_keys(signature, bands):
    """A bucket for each band, an equal part of a signature, and for no other: uint64, (bands,)."""
    return combine(signature.reshape(bands, -1).T, np.arange(bands, dtype=np.uint64))


def probability(jaccard, hashes, bands):
    """That two sets of this similarity agree in a band, at least: the S-curve."""
    return 1 - (1 - jaccard ** (hashes // bands)) ** bands


def bucket_pairs(members):
    """Yield the pairs of a bucket to compare: each member with up to NEIGHBORS before it, so that
    a million pages with one frame do not make 10**12 pairs."""
    for at, j in enumerate(members):
        for i in members[max(0, at - NEIGHBORS):at]:
            yield i, j


def candidates(keys):
    """Yield the pairs of documents that share a bucket, of their keys (documents, bands)."""
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        new = np.append(True, band[order[1:]] != band[order[:-1]])
        starts = np.append(np.flatnonzero(new), len(order))
        for k in np.flatnonzero(np.diff(starts) > 1):
            yield from bucket_pairs(order[starts[k]:starts[k + 1]].tolist())


def clusters(pairs, n, similar=lambda i, j: True):
    """What pairs connect among 0 ... n - 1, several each: clusters([(1, 2), (3, 2)], 5) ==
    [[1, 2, 3]]. Pairs that are connected already need not be `similar`, the others must be."""
    parents = memoryview(np.arange(n))  # whose items are plain ints: twice as fast

    def root(i):
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]  # half the way for whoever comes after
        return i

    for i, j in pairs:
        first, second = sorted([root(i), root(j)])
        if first != second and similar(i, j):
            parents[second] = first
    found = {}
    for i in np.flatnonzero(np.arange(n) != parents).tolist():
        found.setdefault(root(i), [root(i)]).append(i)
    return sorted(found.values())


def near_clusters(texts, threshold, n, hashes, bands, seed):
    """Positions of near-duplicates: clusters in which each text has a Jaccard similarity of the
    threshold or more with another one. texts: any sequence. ValueError for a wrong option."""
    if not (0 < threshold <= 1 <= n and 1 <= bands <= hashes <= 10000 and hashes % bands == 0):
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1, n={n} at least 1, "
                         f"hashes={hashes}, at most 10,000, a multiple of bands={bands}")
    keys, random = np.empty((len(texts), bands), np.uint64), permutations(hashes, seed)
    for i in tqdm(range(len(texts)), "near-duplicates", unit=" documents", **QUIET):
        keys[i] = band_keys(signature(shingles(texts[i], n), random), bands)
    sets = lru_cache(2 * NEIGHBORS)(lambda i: shingles(texts[i], n))
    return clusters(candidates(keys), len(texts), lambda *ij: jaccard(*map(sets, ij)) >= threshold)


def near_duplicates(texts, threshold=0.8, n=5, hashes=128, bands=16, seed=0):
    """The positions of texts to drop, sorted: of each of the near_clusters() all but the first."""
    found = near_clusters(texts, threshold, n, hashes, bands, seed)
    return sorted(i for _, *others in found for i in others)


# -----------------------------------------------------------------------------
# Lines that occurred before, and questions of an evaluation that a corpus gives away.


def add_new(hashes, runs):
    """The positions of new hashes (uint64), of equal ones the first. They join the runs: sorted
    arrays, 8 bytes a hash, each at least twice as long as the next."""
    values, first = np.unique(hashes, return_index=True)
    for run in runs:
        at = np.minimum(np.searchsorted(run, values), len(run) - 1)
        values, first = values[run[at] != values], first[run[at] != values]
    runs += [values] * bool(len(values))
    while len(runs) > 1 and len(runs[-2]) < 2 * len(runs[-1]):
        runs[-2:] = [np.sort(np.concatenate(runs[-2:]), kind="stable")]
    return first


def repeated_lines(texts, least=40):
    """Yield texts without the lines that occurred before, in any of them. Lines below `least` bytes
    of UTF-8 stay, and indented ones: program code and lists do repeat themselves."""
    runs = []
    for text in texts:
        lines = text.split("\n")
        long = np.array([i for i, line in enumerate(lines) if len(line.encode()) >= least
                         and not line.startswith((" ", "\t"))], int)
        hashes = b"".join(blake2b(lines[i].encode(), digest_size=8).digest() for i in long)
        again = np.delete(long, add_new(np.frombuffer(hashes, np.uint64), runs))
        yield "\n".join(np.delete(np.array(lines, object), again))


def leaks(texts, questions, n=13):
    """Yield (position of the text, position of the question, what both say) for each text that has
    n words of a question in a row, or all of one with LEAST to n words (arXiv:2005.14165)."""
    if isinstance(questions, str) or n < 1:
        raise ValueError(f"the questions must be a list of texts, and n={n} at least 1")
    owners = {}
    for j, ids in enumerate(map(word_hashes, questions)):
        if len(ids) >= min(n, LEAST):
            size = min(n, len(ids))
            owners |= dict.fromkeys(gram_hashes(ids, size).tolist(), (j, size))
    sizes = {size for _, size in owners.values()}
    for i, text in enumerate(texts):
        ids = word_hashes(text)
        for grams in (gram_hashes(ids, size) for size in sizes):
            if shared := owners.keys() & grams.tolist():
                at = int(np.isin(grams, [*shared]).argmax())
                j, size = owners[int(grams[at])]
                yield i, j, b" ".join(words(text)[at:at + size]).decode()
                break


def contaminated(texts, questions, n=13):
    """The positions of texts that have n words of a question in a row, or all of a shorter one."""
    return [i for i, *_ in leaks(texts, questions, n)]


def main():
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help="that data.py reads, of one or more documents")
    for name, value in zip("threshold n hashes bands seed".split(), near_duplicates.__defaults__):
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    options = vars(parser.parse_intermixed_args())
    files, names, sizes = options.pop("files"), [], []
    with tempfile.TemporaryFile() as file:
        for path in files:
            for number, text in enumerate(map(clean, read_documents(path)), 1):
                names += [f"{path}, document {number}"] * bool(text)  # Documents has no empty ones
                sizes.append(file.write(text.encode()))
        ends = np.cumsum(sizes, dtype=np.int64)
        texts = Documents(file, ends - sizes, ends)
        found = near_clusters(texts, **options)
        for first, *others in found:
            print(names[first])
            for i in others:
                both = [shingles(texts[k], options["n"]) for k in (first, i)]
                print(f"  {jaccard(*both):.2f}  {names[i]}")
    print(f"{len(names):,} documents, {sum(map(len, found)) - len(found):,} of them to drop")


if __name__ == "__main__":
    run_command(main)
