"""
The options of curate, its stages that look at one text at a time, and what is counted of each. A
stage is a pure function from a text to (list of texts, {reason: n}): an empty list drops it,
another text changes it, several cut it.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from chapters import cleaning
from chapters.classify import language, language_classifier, quality_classifier, toxicity
from chapters.privacy import KINDS, mask_pii
from chapters.rules import DEFAULT, OPTIONAL, THRESHOLDS, quality
from data import read_documents, read_rows
from tokenizer import reading

PIECES = {"paragraphs": cleaning.split_paragraphs, "sentences": cleaning.split_sentences}
N_EXAMPLES, EXCERPT = 5, 160  # kept of a stage; characters of each
TINY = 1e-9  # as in model.py: below=1 + TINY means at most 1


def chosen(words, known, option):
    """The known names that words give, whole or by their first part, in the order of `known`:
    chosen("c4", ["gopher_hashes", "c4_policies"], "rules") == ["c4_policies"]."""
    words = {words} if isinstance(words, str) else {*words}
    if "none" in words and len(words) > 1:
        raise ValueError(f"--{option}={' '.join(sorted(words))}: none stands alone")
    if wrong := words - {"none", *known, *(name.split("_")[0] for name in known)}:
        raise ValueError(f"--{option}={min(wrong)}: must be none or of {' '.join(known)}")
    return [name for name in known if {name, name.split("_")[0]} & words and "none" not in words]


def option(default, help="", **more):
    """What model.option gives, without model.py: no process that runs stages waits for torch."""
    kind = "default"
    if isinstance(default, list):
        kind, default = "default_factory", default.copy
    usual = dict(low=0, below=2**31, known=None, positional=False, many=False)
    return field(**{kind: default}, metadata=usual | more | dict(help=help))


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
        from model import check_options  # a process that is sent a config does not come here
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


@lru_cache(maxsize=1)
def quality_scores(like, unlike):
    """The score of a document by a classifier trained on two files, once in each process."""
    good, bad = ([*read_documents(path)] for path in (like, unlike))
    return quality_classifier(good, bad)[0].score


def readable(path, texts, skip):
    """Yield (place, text) of the texts of a file, with U+FFFD for what is not of its encoding;
    skip(reason) is told of a text where that is more than one character of a hundred."""
    for number, text in enumerate(texts, 1):
        text = text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
        n, place = text.count("\ufffd"), f"{path}, {number}"
        if n <= len(text) / 100:
            yield place, text
        else:
            skip(f"{place}: {n / len(text):.0%} of it is of another encoding: give --encoding=NAME")


def texts_in(value):
    """All texts in a value of JSON: texts_in({"q": "a", "options": ["b", 1]}) == ["a", "b"]."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for value in values for text in texts_in(value)]


def read_questions(paths):
    """The texts in all fields of files, for --against; ValueError for a file without any."""
    found = {path: [text for texts in read_rows(path, texts_in) for text in texts if text.strip()]
             for path in np.atleast_1d(paths) if paths != "none"}
    if empty := [path for path in found if not found[path]]:
        raise ValueError(f"--against={empty[0]}: no question is in it")
    return [text for texts in found.values() for text in texts]


def change(function):
    """A stage that puts function(text) in the place of a text."""
    return lambda text: ([function(text)], {})


def drop(reason):
    """A stage that drops the texts for which reason(text) is one, a str."""
    def stage(text):
        why = reason(text)
        return ([], {why: 1}) if why else ([text], {})
    return stage


def mask(kinds):
    """A stage that masks personal data."""
    def stage(text):
        masked, counts = mask_pii(text, kinds)
        return [masked], counts
    return stage


def text_stages(config):
    """{name: stage} of a CurateConfig, in the order in which they are applied."""
    stages = {name: change(cleaning.STAGES[name]) for name in config.clean}
    if config.split != "none":
        stages[config.split] = lambda text: (PIECES[config.split](text, config.max_chars), {})
    stages["empty"] = drop(lambda text: None if text.strip() else "empty")
    if config.languages not in ("all", "none"):
        wanted = {*np.atleast_1d(config.languages)}
        stages["languages"] = drop(lambda text: (name := language(text)[0]) not in wanted and name)
    if config.rules:
        stages["rules"] = drop(lambda text: quality(text, config.rules))
    if config.like:
        score = quality_scores(config.like, config.unlike)
        stages["quality"] = drop(lambda text: score(text) < config.keep and "unlike")
    if config.toxic < 1:
        stages["toxic"] = drop(lambda text: toxicity(text) > config.toxic and "toxic")
    if config.mask:
        stages["mask"] = mask(config.mask)
    return stages


# -----------------------------------------------------------------------------
# What a stage did, counted, with a few examples.


def new_record(name, examples=()):
    """A record of a stage: the documents and bytes that it leaves, how many it changed or dropped,
    why, and examples."""
    return dict(name=name, documents=0, bytes=0, changed=0, dropped=0, reasons=Counter(),
                examples=[*examples])


def example(place, before, after, reasons):
    """What a stage did to a text, as an excerpt around the first difference."""
    after = "\n--------\n".join(after)
    both = min(len(before), len(after))
    at = next((i for i in range(both) if before[i] != after[i]), both)
    before, after = ["".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}"
                             for c in text[max(0, at - 40):at + EXCERPT - 40])
                     for text in (before, after)]
    return dict(place=place, before=before, after=after, why=" ".join(reasons))


def n_bytes(text):
    """The bytes of a text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def count(record, place, before, after, reasons):
    """Count in a record that a stage made the texts `after` of a text."""
    record["documents"] += len(after)
    record["bytes"] += sum(map(n_bytes, after))
    if after != [before]:
        record["changed" if after else "dropped"] += 1
        record["reasons"].update(reasons)
        if len(record["examples"]) < N_EXAMPLES:
            record["examples"].append(example(place, before, after, reasons))


def run_batch(config, batch):
    """Apply the stages to a batch of (place, text) -> (what is left of it, a record per stage).
    A pure function of what it is given, so that processes and machines can share the batches."""
    records = []
    for name, stage in text_stages(config).items():
        record, left = new_record(name), []
        for place, text in batch:
            texts, reasons = stage(text)
            count(record, place, text, texts, reasons)
            left += [(place, new) for new in texts]
        records.append(record)
        batch = left
    return batch, records


def merge(total, records):
    """Add the records of a batch to the list of those of all batches before."""
    total += [new_record(record["name"]) for record in records[len(total):]]
    for mine, new in zip(total, records):
        for name in "documents", "bytes", "changed", "dropped":
            mine[name] += new[name]
        mine["reasons"].update(new["reasons"])
        mine["examples"] += new["examples"][:N_EXAMPLES - len(mine["examples"])]


def report(records, sources):
    """Yield the lines that a command prints of stages, and of what it skipped."""
    for record in records:
        reasons = record["reasons"].most_common()
        why = [f"{n:,} {reason}" for reason, n in reasons[:4]]
        why += [f"{sum(n for _, n in reasons[4:]):,} other"] * (len(reasons) > 4)
        yield (f"{record['name']:<16}{record['documents']:>9,} documents "
               f"{record['bytes'] / 1e6:9.1f} MB  changed {record['changed']:,}, "
               f"dropped {record['dropped']:,}{': ' * bool(why)}{', '.join(why)}")
    skipped = [line for source in sources for line in source["skipped"]]
    yield from (f"skipped: {line}" for line in skipped[:3])
    if n_more := sum(source["n_skipped"] for source in sources) - len(skipped[:3]):
        yield f"skipped: {n_more:,} more; card.json names the first 100 of a source"
