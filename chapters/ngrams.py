"""
Text classification from scratch: hashed n-grams into multinomial logistic regression, in NumPy.

    classifier = Classifier.train(["good morning", "guten Morgen"], ["en", "de"])
    classifier.probabilities(["morning"])          # (texts, classes), columns as settings.labels
    classifier.save("languages.npz")               # Classifier.load reads it

chapters/classify.py builds language identification and the quality and toxicity filters on it. The
features are fastText's (arXiv:1607.01759), hashed (arXiv:0902.2206). But each bucket has a weight
for each class, not an embedding: the loss is convex, so training cannot end in a local minimum.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass

import numpy as np

from tokenizer import check_fields, reading, replacing

NOT_LETTERS = re.compile(r"[\s\d!-@\[-`{-¿×÷\u2000-\u2bff\u3000-\u303f\uff00-\uff20]+")
WORD = re.compile(r"\w+|[^\w\s]")
MULTIPLIER = np.uint32(0x9E3779B1)  # a prime near 2**32 / the golden ratio: it mixes bits well
CHARACTERS, BLOCKS, WORDS = np.arange(1, 4, dtype=np.uint32)  # seeds of the kinds of features

# -----------------------------------------------------------------------------
# Features: how often each n-gram occurs, counted in buckets that a hash chooses.


@dataclass
class Settings:
    """What the features of a text depend on; saved with the weights."""
    labels: list
    characters: int = 4    # n-grams of 1 to this many characters: letters, spaces between words
    words: int = 0         # n-grams of 1 to this many words; a punctuation mark is a word
    buckets: int = 2**14   # rows of weights; n-grams with the same hash share one
    limit: int = 2000      # only the first characters of a text are read, this many

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
    """A text in lower case, with a space for each run of other characters and at both ends, so that
    n-grams show where words begin: only_letters("It's 5!") == " it s "."""
    return " " + NOT_LETTERS.sub(" ", text.lower()).strip() + " "


def code_points(text):
    """The code points of a text as an array of uint32; lone surrogates are kept."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def ngram_buckets(codes, n, buckets, seed):
    """The bucket of each run of 1 to n codes (uint32): the top bits of a polynomial hash, modulo
    2**32. Unlike Python's hash(), it is the same in every process."""
    shift = np.uint32(33 - int(buckets).bit_length())
    hashes, found = np.full(len(codes) + 1, seed), []
    for size in range(min(n, len(codes))):
        hashes = hashes[:-1] * MULTIPLIER + codes[size:]
        found.append(hashes * MULTIPLIER >> shift)
    return np.concatenate(found or [hashes[:0]]).astype(np.int32)


def letter_features(codes, settings):
    """The buckets of the n-grams of code points, and of the block of 128 code points that each is
    in: so a character that is not in the training texts still shows its script."""
    return np.concatenate([
        ngram_buckets(codes, settings.characters, settings.buckets, CHARACTERS),
        ngram_buckets(codes >> 7, 1, settings.buckets, BLOCKS)])


def features(text, settings):
    """The buckets of a text's n-grams, one for each occurrence; there is at least one."""
    text = text[:settings.limit]
    found = letter_features(code_points(only_letters(text)), settings)
    words = WORD.findall(text.lower()) if settings.words else []
    hashes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
    return np.concatenate([found, ngram_buckets(np.array(hashes, np.uint32), settings.words,
                                                settings.buckets, WORDS)])


# -----------------------------------------------------------------------------
# Metrics.


def roc_auc(scores, truth):
    """Area under the ROC curve: in what share of the pairs of a positive and a negative example the
    positive one scores higher; a tie counts half. roc_auc([0.9, 0.2], [1, 0]) == 1."""
    scores, truth = np.asarray(scores), np.asarray(truth, bool)
    negatives = np.sort(scores[~truth])
    below, up_to = (np.searchsorted(negatives, scores[truth], side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(negatives)))


def precision_recall(scores, truth, threshold):
    """Precision and recall, in a dict, if a score of the threshold or more means positive."""
    found, truth = np.asarray(scores) >= threshold, np.asarray(truth, bool)
    hits = int((found & truth).sum())
    return dict(precision=hits / max(1, int(found.sum())), recall=hits / max(1, int(truth.sum())))


# -----------------------------------------------------------------------------
# Multinomial logistic regression on these features.


def softmax(scores):
    """Probabilities (N, classes)."""
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def logits(weights, rows):
    """Logits (N, classes): the sum of the weights of a text's n-grams over the square root of their
    number. So confidence grows with length, but more slowly than for independent n-grams."""
    # A vector times a matrix is several times as fast as .sum(axis=0).
    return np.stack([np.full(len(row), len(row) ** -0.5, np.float32) @ weights.take(row, axis=0)
                     for row in rows])


def loss_and_gradient(weights, rows, truth, l2):
    """Mean cross-entropy plus l2 / 2 times the sum of squared weights, and its gradient (buckets,
    classes). rows: the features of N texts; truth: one-hot, (N, classes)."""
    probabilities = softmax(logits(weights, rows))
    loss = -np.log((probabilities * truth).sum(axis=1)).mean() + l2 / 2 * (weights**2).sum()
    sizes = np.array([len(row) for row in rows])
    errors = (probabilities - truth) / (len(rows) * sizes[:, None] ** 0.5)      # (N, classes)
    columns, errors = np.concatenate(rows), np.repeat(errors, sizes, axis=0)
    gradient = [np.bincount(columns, error, len(weights)) for error in errors.T]
    return loss, np.stack(gradient, axis=1) + l2 * weights


class Classifier:
    """Settings and weights (buckets, classes). It needs no bias: every text has spaces, whose
    weights serve as one."""

    def __init__(self, settings, weights):
        self.settings, self.weights = settings, weights

    @classmethod
    def train(cls, texts, labels, l2=1e-6, steps=60, rate=0.3, batch_size=256, seed=0, **options):
        """Fit weights to texts and their labels, all int or all str, by Adagrad on mini-batches.
        The options are the fields of Settings; the same arguments give the same weights."""
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
        """(N, classes): for each text the probability of each of settings.labels."""
        rows = [features(text, self.settings) for text in texts]
        return softmax(logits(self.weights, rows)) if rows else self.weights[:0]

    def score(self, text):
        """The probability of the last label: of 1, where the labels are 0 and 1."""
        return float(self.probabilities([text])[0, -1])

    def save(self, path):
        """Write settings and weights as .npz, complete or not at all."""
        with replacing(path) as file:
            np.savez(file, settings=json.dumps(asdict(self.settings)), weights=self.weights)

    @classmethod
    def load(cls, path):
        """Read what save() wrote; ValueError for any other file. No code in it can run."""
        with reading(path), np.load(path, allow_pickle=False) as file:
            settings = check_fields(Settings, json.loads(str(file["settings"])), path)
            weights = file["weights"]
        shape = settings.buckets, len(settings.labels)
        if weights.shape != shape or weights.dtype != np.float32 or not np.isfinite(weights).all():
            raise ValueError(f"{path}: its weights are {weights.dtype} {weights.shape}; they must "
                             f"be finite, float32 {shape}")
        return cls(settings, weights)
