"""
What the quality rules of chapters/rules.py measure in a text: words, lines, repetition, languages.

Each number is computed once, when the first rule asks for it. Words are counted on an array of the
text's characters, and what repeats is bounded by hashes first: most texts repeat too little for a
count of every n-gram to matter.
"""

import re
import unicodedata
from collections import Counter
from functools import cached_property, lru_cache

import numpy as np

from chapters.near import gram_hashes

# A script is called by the first word of the Unicode names of its letters.
UNSPACED = dict(CJK=2, THAI=4, LAO=4, KHMER=4, MYANMAR=4, TIBETAN=4)  # characters, about a word
UNMARKED = "THAI", "LAO"  # scripts whose sentences end without a mark
DENSE = "CJK", "HANGUL"   # scripts of which one character says as much as two letters
UNSPACED_LETTERS = "[\u0e00-\u1fff\u3005-\u3007\u3040-\ufaff\U00020000-\U0003ffff]"
END_MARKS = frozenset(".!?…。！？．｡।॥؟۔።։။៕།")  # of a sentence
CLOSING = "\"'”’»」』)）"  # what may follow them
BEHIND = CLOSING + " \xa0\u202f"
ELLIPSES = "...", "…"

# -----------------------------------------------------------------------------
# Words: by white space or, in scripts without it, by the length that words have on average.


def main_script(text):
    """The script of most letters: main_script("Привет, world, и пока") == "CYRILLIC"."""
    if len(text.encode("utf-8", "replace")) < 1.2 * len(text):
        return "LATIN"
    letters = Counter(filter(str.isalpha, text[::len(text) // 1000 + 1]))  # a sample is enough
    scripts = Counter(LATIN=0)
    for letter, n in letters.items():
        scripts[unicodedata.name(letter, "?").split()[0]] += n
    scripts["CJK"] += scripts.pop("HIRAGANA", 0) + scripts.pop("KATAKANA", 0)
    return scripts.most_common(1)[0][0]


def split_words(text, script="LATIN", most=-1):
    """The words of a text; one of a script without spaces is cut into pieces as long as its words
    are on average: split_words("今天天气很好。", "CJK") == ["今天", "天气", "很好。"]. What is behind
    `most` words stays one."""
    if script in UNSPACED:
        text = re.sub(f"{UNSPACED_LETTERS}{{1,{UNSPACED[script]}}}", r" \g<0>", text)
    return text.split(None, most)


def has_words(line, n, script):
    """Whether a line has at least n words."""
    return len(split_words(line, script, n)) >= n


def has_end_mark(line):
    """Whether a line ends as a sentence does: has_end_mark('He said: "Yes."')."""
    return line.rstrip(BEHIND)[-1:] in END_MARKS


@lru_cache(1)
def kinds_of_characters():
    """For each code point 0 for white space, 2 for a letter, 1 for the rest; uint8."""
    chars = map(chr, range(0x110000))
    return np.array([2 if c.isalpha() else not c.isspace() for c in chars], np.uint8)


@lru_cache(1)
def powers(n):
    """The first n powers of an odd number, modulo 2**64."""
    return np.cumprod(np.full(n, 0xD1342543DE82EF95, np.uint64))


# -----------------------------------------------------------------------------
# Repetition of n words in a row: two exact counts, and numbers that they do not exceed.


def ngrams(words, n):
    """All tuples of n words in a row."""
    return zip(*(words[i:] for i in range(n)))


def top_ngram(words, n, gap=1):
    """Characters in all occurrences of the most frequent n words, the longest of several, with gaps
    between the words: top_ngram("so it is and so it was".split(), 2) == 2 * len("so it")."""
    counts = Counter(ngrams(words, n))
    most = max(counts.values(), default=0)
    return most * max((sum(map(len, gram)) + gap * (n - 1)
                       for gram, count in counts.items() if count == most > 1), default=0)


def duplicate_ngrams(words, n):
    """Characters of the words within second and later occurrences of n words, each word once:
    duplicate_ngrams("so it is and so it was".split(), 2) == len("so" + "it")."""
    seen, covered = set(), set()
    for i, gram in enumerate(ngrams(words, n)):
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered)


def highest_count(keys):
    """How often the most frequent of some numbers occurs."""
    keys = np.sort(keys)
    new = np.ones(len(keys) + 1, bool)
    new[1:-1] = keys[1:] != keys[:-1]
    first = new.nonzero()[0]
    return int((first[1:] - first[:-1]).max(initial=0))


def repeated_places(keys):
    """Where a number stands that stood before."""
    low = np.uint64((1 << len(keys).bit_length()) - 1)  # these bits hold the place instead
    keys = np.sort(keys & ~low | np.arange(len(keys), dtype=np.uint64))
    return (keys[1:][keys[1:] ^ keys[:-1] <= low] & low).astype(int)


# -----------------------------------------------------------------------------
# The measures of a text.


class Measures:
    """Numbers about one text. A share is between 0 and 1; None says that a measure does not apply
    to the text's script."""

    def __init__(self, text):
        self.text = text

    script = cached_property(lambda self: main_script(self.text))
    words = cached_property(lambda self: split_words(self.text, self.script))
    lower = cached_property(lambda self: self.text.lower())
    lines = cached_property(lambda self: [*filter(None, map(str.strip, self.text.split("\n")))])
    paragraphs = cached_property(
        lambda self: [*filter(None, map(str.strip, self.text.split("\n\n")))])

    @cached_property
    def characters(self):
        """Code points and kinds of the characters, first and last of each word: four arrays."""
        text = " ".join(self.words) if self.script in UNSPACED else self.text
        points = np.frombuffer(f" {text} ".encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = kinds_of_characters().take(points)
        inside = kinds > 0
        edges = (inside[1:] != inside[:-1]).nonzero()[0] + 1
        return points, kinds, edges[::2], edges[1::2]

    @cached_property
    def sizes(self):
        """Characters of each word."""
        _, _, begins, ends = self.characters
        return ends - begins

    @cached_property
    def hashes(self):
        """A hash of each word: its characters as the digits of a number, modulo 2**64."""
        points, _, begins, ends = self.characters
        power = powers(max(1 << 16, 1 << len(points).bit_length()))  # one size for most texts
        total = np.cumsum(points * power[:len(points)])
        return (total.take(ends - 1) - total.take(begins - 1)) * power.take(len(points) - begins)

    def longest(self, n):
        """Characters of the longest n words in a row."""
        _, _, begins, ends = self.characters
        return int((ends[n - 1:] - begins[:len(ends[n - 1:])]).max(initial=0))

    @cached_property
    def top_bound(self):
        """A share that no top_ngram(n) exceeds, n from 2 to 4: no words in a row are more frequent
        than the most frequent two, nor longer than the longest four."""
        count = highest_count(gram_hashes(self.hashes, 2))
        return self.per_character(count * self.longest(min(4, self.word_count)))

    def close_top_bound(self, n):
        """A lower share that top_ngram(n) does not exceed."""
        return self.per_character(highest_count(gram_hashes(self.hashes, n)) * self.longest(n))

    @cached_property
    def duplicate_bound(self):
        """A share that no duplicate_ngrams(n) exceeds, n from 5 to 10: where more than 5 words in a
        row occurred before, each 5 of them did, too."""
        again = repeated_places(gram_hashes(self.hashes, 5))
        covered = np.zeros(len(self.hashes), bool)
        covered[np.add.outer(again, np.arange(5))] = True
        return self.per_character(int(self.sizes[covered].sum()))

    word_count = property(lambda self: len(self.sizes))

    def per_word(self, count):
        """A count for each word of the text; 0 for an empty one."""
        return count / max(1, self.word_count)

    def per_character(self, count):
        """A count for each character of the text; 0 for an empty one."""
        return count / max(1, len(self.text))

    def line_share(self, holds):
        """The share of lines for which a function is true."""
        return sum(map(holds, self.lines)) / max(1, len(self.lines))

    def mentions(self, *phrases):
        """The share of lines with one of the phrases, in small letters or capitals."""
        phrases = [phrase for phrase in phrases if phrase in self.lower]
        return self.line_share(lambda line: any(map(line.lower().count, phrases))) if phrases else 0

    def word_length(self):
        """Characters of a word, on average; None where words are cut or letters are syllables."""
        if self.script not in UNSPACED and self.script not in DENSE:
            return self.per_word(int(self.sizes.sum()))

    def alphabetic_words(self):
        """The share of words with a letter."""
        _, kinds, begins, _ = self.characters
        with_letter = np.logical_or.reduceat(kinds == 2, begins) if len(begins) else begins
        return self.per_word(int(np.count_nonzero(with_letter)))

    def duplicates(self, parts):
        """Of "lines" or "paragraphs", the share that occurred before."""
        parts = getattr(self, parts)
        return (len(parts) - len(set(parts))) / max(1, len(parts))

    def duplicate_characters(self, parts):
        """The share of characters that these duplicates hold."""
        parts = getattr(self, parts)
        return self.per_character(sum(map(len, parts)) - sum(map(len, set(parts))))

    def top_ngram(self, n):
        """The share of characters in the most frequent n words."""
        return self.per_character(top_ngram(self.words, n, int(self.script not in UNSPACED)))

    def duplicate_ngrams(self, n):
        """The share of characters in n words that occurred before."""
        return self.per_character(duplicate_ngrams(self.words, n))

    def marked_lines(self):
        """The share of lines that end with a mark or a quote; None for Thai and Lao."""
        return (None if self.script in UNMARKED
                else self.line_share(has_end_mark))

    def short_lines(self):
        """The share of lines below 30 letters."""
        n = 15 if self.script in DENSE else 30
        return self.line_share(lambda line: len(line) < n)
