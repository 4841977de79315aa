"""
The options of curate: which documents, and what is done to them.
"""

from dataclasses import dataclass

from chapters import cleaning
from chapters.classify import language_classifier
from chapters.privacy import KINDS
from chapters.rules import DEFAULT, OPTIONAL, THRESHOLDS
from chapters.stages import PIECES, chosen
from model import TINY, check_options, option
from tokenizer import reading


@dataclass(frozen=True)
class CurateConfig:
    """Documents and stages."""
    sources: list = option([], "files, folders, patterns, URLs, - or known names", positional=True)
    out: str = option("", "folder to write")
    field: str = option("text", "of JSON and CSV files, the one with the text")
    encoding: str = option("", "of the files; else what they say or look like")
    license: str = option("unknown", "of the text, for its card")
    clean: str | list = option("", f"of {' '.join(cleaning.STAGES)} (default "
                               f"{' '.join(cleaning.DEFAULT)})", many=True)
    split: str = option("none", "cut long documents", known=lambda: ["none", *PIECES])
    max_chars: int = option(20_000, "characters of a document that is cut", low=100)
    languages: str | list = option("all", "keep these: en de ...", many=True)
    rules: str | list = option("", "names of chapters.rules, or their first word (default all but "
                               f"{' '.join(OPTIONAL)})", many=True)
    like: str = option("", "file of documents to be like, and")
    unlike: str = option("", "one of documents to be unlike: a classifier learns the difference")
    keep: float = option(0.5, "probability of --like from which a document is kept", below=1 + TINY)
    toxic: float = option(1.0, "drop what is more toxic (chapters.classify)", below=1 + TINY)
    mask: str | list = option("", f"personal data to hide: of {' '.join(KINDS)} (default all)",
                              many=True)
    exact: bool = option(True, "drop copies")
    lines: bool = option(False, "drop long lines that occurred before")
    near: float = option(0.8, "drop near-duplicates, of this Jaccard similarity; 0: none",
                         below=1 + TINY)
    ngram: int = option(5, "words in a row that near-duplicates are compared by", low=1, below=100)
    hashes: int = option(128, "of a document for --near", low=1, below=10_001)
    bands: int = option(16, "of hashes, of which one must be equal", low=1, below=10_001)
    against: str | list = option("none", "files of questions that no text may have", many=True)
    seed: int = option(0, "of --near")
    engine: str = option("none", "that runs the stages, on more than one machine: chapters.engine",
                         known=lambda: ["none", "dask"])
    workers: int = option(0, "processes of --engine on this machine; 0: one a core", below=1025)
    cluster: str = option("", "address of --engine on others, such as tcp://HOST:8786")

    def __post_init__(self):
        check_options(self)
        for name, known, usual in (("clean", cleaning.STAGES, cleaning.DEFAULT),
                                   ("mask", KINDS, KINDS), ("rules", THRESHOLDS, DEFAULT)):
            object.__setattr__(self, name, chosen(getattr(self, name) or usual, known, name))
        with reading(f"--encoding={self.encoding}: text"):
            "".encode(self.encoding or "utf-8")
        if self.hashes % self.bands:
            raise ValueError(f"hashes={self.hashes} must be a multiple of bands={self.bands}")
        if self.languages not in ("all", "none"):
            chosen(self.languages, language_classifier()[0].settings.labels, "languages")
        if bool(self.like) != bool(self.unlike):
            raise ValueError("--like and --unlike need each other: a file of documents each")
