"""
The stages of curate that look at one text at a time, and what is counted of each. A stage is a pure
function from a text to (list of texts, {reason: n}): an empty list drops it, another text changes
it, several cut it. Nothing here imports torch: the processes that run stages start quickly.
"""

from collections import Counter
from functools import lru_cache

import numpy as np

from chapters import cleaning
from chapters.classify import language, quality_classifier, toxicity
from chapters.privacy import mask_pii
from chapters.rules import quality
from data import read_documents

PIECES = {"paragraphs": cleaning.split_paragraphs, "sentences": cleaning.split_sentences}
N_EXAMPLES, EXCERPT = 5, 160  # kept of a stage; characters of each


def chosen(words, known, option):
    """The known names that words give, whole or by their first part, in the order of `known`:
    chosen("c4", ["gopher_hashes", "c4_policies"], "rules") == ["c4_policies"]."""
    words = {words} if isinstance(words, str) else {*words}
    if "none" in words and len(words) > 1:
        raise ValueError(f"--{option}={' '.join(sorted(words))}: none stands alone")
    if wrong := words - {"none", *known, *(name.split("_")[0] for name in known)}:
        raise ValueError(f"--{option}={min(wrong)}: must be none or of {' '.join(known)}")
    return [name for name in known if {name, name.split("_")[0]} & words and "none" not in words]


@lru_cache(maxsize=1)
def quality_scores(like, unlike):
    """The score of a document by a classifier trained on two files, once in each process."""
    good, bad = ([*read_documents(path)] for path in (like, unlike))
    return quality_classifier(good, bad)[0].score


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
