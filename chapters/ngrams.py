"""
Text classification from scratch: hashed n-grams into multinomial logistic regression, in NumPy.

    classifier = Classifier.train(["good morning", "guten Morgen"], ["en", "de"])
    classifier.probabilities(["morning"])          # (texts, classes), columns as settings.labels
    classifier.save("languages.npz")               # Classifier.load reads it

chapters/classify.py makes of it language identification and filters of quality and toxicity. The
features are those of fastText's classifier (arXiv:1607.01759), each with a weight of its own.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass

import numpy as np

from tokenizer import check_fields, reading, replacing

NOT_LETTERS = re.compile(r"[\s\d!-@\[-`{-¿×÷\u2000-\u2bff\u3000-\u303f\uff00-\uff20]+")
WORD = re.compile(r"\w+|[^\w\s]")
MULTIPLIER = np.uint32(0x9E3779B1)  # odd, its bits well mixed: 2**32 over the golden ratio
CHARACTERS, BLOCKS, WORDS = np.arange(1, 4, dtype=np.uint32)  # so that "a" is not the word "a"

# -----------------------------------------------------------------------------
# Features: how often each n-gram occurs, counted in buckets that a hash chooses.


@dataclass
class Settings:
    """What decides the features, saved beside the weights."""
    labels: list
    characters: int = 4    # n-grams of 1 to so many characters: letters, and spaces between words
    words: int = 0         # n-grams of 1 to so many words; a punctuation mark is a word
    buckets: int = 2**14
    limit: int = 2000      # a text is judged by so many characters, its first

    def __post_init__(self):
        kinds = {type(label) for label in self.labels}
        if len(kinds) != 1 or not kinds <= {int, str} or len({*self.labels}) < 2:
            raise ValueError(f"labels {self.labels!r:.60} must be two or more, all int or all str")
        limits = dict(characters=(1, 8), words=(0, 4), buckets=(2, 2**24), limit=(1, 2**24))
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} to {most}")
        if self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets={self.buckets} must be a power of two")


def only_letters(text):
    """Lower case, one space for all that is no letter: only_letters("It's 5!") == " it s "."""
    return " " + NOT_LETTERS.sub(" ", text.lower()).strip() + " "


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def ngram_buckets(codes, n, buckets, seed):
    """The bucket of each run of 1 to n codes: a polynomial in the codes, modulo 2**32, whose top
    bits, after one more product, are the bucket. The same on every machine, unlike hash()."""
    shift = np.uint32(33 - int(buckets).bit_length())
    hashes, found = np.full(len(codes) + 1, seed), []
    for size in range(min(n, len(codes))):
        hashes = hashes[:-1] * MULTIPLIER + codes[size:]
        found.append(hashes * MULTIPLIER >> shift)
    return np.concatenate(found or [hashes[:0]]).astype(np.int32)


def features(text, settings):
    """The buckets of a text's n-grams, each as often as it occurs; never none. Each character also
    counts as its block of 128 in Unicode: a rare Chinese one, never seen, is still Chinese."""
    text, size = text[:settings.limit], settings.buckets
    codes = code_points(only_letters(text))
    found = [ngram_buckets(codes, settings.characters, size, CHARACTERS),
             ngram_buckets(codes >> 7, 1, size, BLOCKS)]
    if settings.words:
        words = [zlib.crc32(word.encode("utf-8", "surrogatepass"))
                 for word in WORD.findall(text.lower())]
        found.append(ngram_buckets(np.array(words, np.uint32), settings.words, size, WORDS))
    return np.concatenate(found)


# -----------------------------------------------------------------------------
# How right scores are.


def area(scores, truth):
    """Area under the ROC curve: how often a true one scores above a false one, a tie counts half.
    area([0.9, 0.2], [1, 0]) == 1."""
    scores, truth = np.asarray(scores), np.asarray(truth, bool)
    false = np.sort(scores[~truth])
    below, up_to = (np.searchsorted(false, scores[truth], side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(false)))


def precision_recall(scores, truth, threshold):
    """Of what scores at least threshold, how much is true; of what is true, how much does."""
    found, truth = np.asarray(scores) >= threshold, np.asarray(truth, bool)
    hits = int((found & truth).sum())
    return dict(precision=hits / max(1, int(found.sum())), recall=hits / max(1, int(truth.sum())))


# -----------------------------------------------------------------------------
# Multinomial logistic regression on such features.


def softmax(logits):
    """Probabilities (N, classes)."""
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def sum_weights(weights, rows):
    """Logits (N, classes): a text's weights are added up and divided by the root of their number.
    So the evidence of a longer text counts for more, but not as if its n-grams were independent."""
    # The product of a row and a matrix is several times as fast as .sum(axis=0).
    return np.stack([np.full(len(row), len(row) ** -0.5, np.float32) @ weights.take(row, axis=0)
                     for row in rows])


def loss_and_gradient(weights, rows, truth, l2):
    """Mean cross-entropy + l2 / 2 * |weights|^2, and its gradient. rows: N arrays of buckets,
    truth: (N, classes), a 1 in each row."""
    probabilities = softmax(sum_weights(weights, rows))
    loss = -np.log((probabilities * truth).sum(axis=1)).mean() + l2 / 2 * (weights**2).sum()
    sizes = np.array([len(row) for row in rows])
    errors = (probabilities - truth) / (len(rows) * sizes[:, None] ** 0.5)      # (N, classes)
    columns, errors = np.concatenate(rows), np.repeat(errors, sizes, axis=0)
    gradient = [np.bincount(columns, error, len(weights)) for error in errors.T]
    return loss, np.stack(gradient, axis=1) + l2 * weights


class Classifier:
    """Weights (buckets, classes) and Settings. There is no bias: the space is in every text."""

    def __init__(self, settings, weights):
        self.settings, self.weights = settings, weights

    @classmethod
    def train(cls, texts, labels, l2=1e-6, steps=60, rate=0.3, batch_size=256, seed=0, **options):
        """Fit texts to their labels (all int or all str) by Adagrad on batches; options are those
        of Settings. The same arguments give the same weights."""
        texts, labels = [*texts], [*labels]
        if len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts have {len(labels)} labels")
        settings = Settings(sorted({*labels}), **options)
        rows = [features(text, settings) for text in texts]
        truth = np.array(labels)[:, None] == np.array(settings.labels)          # (N, classes)
        order = np.random.RandomState(seed).permutation(len(rows))
        batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        weights = np.zeros((settings.buckets, len(settings.labels)), np.float32)
        squares = np.full_like(weights, 1e-12)
        for step in range(steps):
            batch = batches[step % len(batches)]
            _, gradient = loss_and_gradient(weights, [rows[i] for i in batch], truth[batch], l2)
            squares += gradient**2
            weights -= rate * gradient / np.sqrt(squares)
        return cls(settings, weights)

    def probabilities(self, texts):
        """Of each text for each of settings.labels: (N, classes)."""
        rows = [features(text, self.settings) for text in texts]
        return softmax(sum_weights(self.weights, rows)) if rows else self.weights[:0]

    def score(self, text):
        """The probability of the last label: where labels are 0 and 1, of 1."""
        return float(self.probabilities([text])[0, -1])

    def save(self, path):
        """Write settings and weights as .npz, complete or not at all."""
        with replacing(path) as file:
            np.savez(file, settings=json.dumps(asdict(self.settings)), weights=self.weights)

    @classmethod
    def load(cls, path):
        """Read what save() wrote; ValueError for a file that is something else. Runs no code."""
        with reading(path), np.load(path, allow_pickle=False) as file:
            settings = check_fields(Settings, json.loads(str(file["settings"])), path)
            weights = file["weights"]
        shape = settings.buckets, len(settings.labels)
        if weights.shape != shape or weights.dtype != np.float32 or not np.isfinite(weights).all():
            raise ValueError(f"{path}: its weights are {weights.dtype} {weights.shape}; they must "
                             f"be finite, float32 {shape}")
        return cls(settings, weights)
