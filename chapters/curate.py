"""
From files of any kind to documents that one can trust: read, clean, mask, filter, drop copies.

    python -m chapters.curate pages/ dump.warc.gz book.epub --out=texts/web
    python -m chapters.curate texts/raw --out=texts/good --languages en de --near=0.7 --lines
    python -m chapters.curate rows.jsonl --out=texts/good --like=good.txt --unlike=bad.txt
    python -m chapters.curate texts/raw --out=texts/good --engine=dask     # see chapters.engine
    python data.py texts/web
    python -m chapters.curate card shards/web       # what was done to them, with pictures

The stages run in the order of --help; each is a pure function of a text, or of all of them. `none`
leaves a stage out. --out gets documents.jsonl ({"text", "source"} a line) and card.json: how many
documents each stage took and left, why, and five examples of each. data.py puts it into its own.
"""

import datetime
import json
import sys
import tempfile
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # `python chapters/curate.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from chapters.choices import CurateConfig
from chapters.near import contaminated, near_duplicates, probability, repeated_lines
from chapters.pages import html_to_text
from chapters.privacy import mask_pii
from chapters.rules import quality
from chapters.sources import find, read_any, read_questions, readable
from chapters.stages import count, merge, new_record, report, run_batch
from data import Documents, new_shards, text_hash
from tokenizer import (QUIET, on_all_cores, parse_options, read_json, refuse_idle, replacing,
                       run_command, write_json)

__all__ = ["html_to_text", "mask_pii", "near_duplicates", "quality"]  # by their public names
BATCH_CHARS = 1 << 21  # of the texts that a process works on at a time


def read_all(config, found, sources):
    """Yield batches of (place, text) of all files; sources gets what a card says of each."""
    batch, n_chars = [], 0
    for source, paths in found.items():
        n_files, skipped = 0, []
        for path in tqdm(paths, "curate", unit=" files", **QUIET):
            try:
                for pair in readable(path, read_any(path, config, skipped.append), skipped.append):
                    batch.append(pair)
                    n_chars += len(pair[1])
                    if n_chars > BATCH_CHARS:
                        yield batch
                        batch, n_chars = [], 0
                n_files += 1
            except ValueError as error:
                skipped.append(str(error))
        card = Path(source, "card.json")  # of a source that was curated, or is synthetic
        sources.append(dict(
            name=source, files=n_files, n_skipped=len(skipped),
            curated=read_json(card) if card.exists() else {}, skipped=[
                "".join(c if c.isprintable() else " " for c in line)[:200]
                for line in skipped[:100]]))
    yield batch


# -----------------------------------------------------------------------------
# Stages that look at all texts: from (place, text) pairs to those that are left.


class Rows(Documents):
    """Texts that lie in a file as {"text", "source"}, a JSON object each."""

    def row(self, i):
        return json.loads(Documents.__getitem__(self, i))

    def __getitem__(self, i):
        return self.row(i)["text"]


def write_rows(pairs, file):
    """Write (place, text) pairs to a file -> Rows."""
    sizes = [file.write(json.dumps(dict(text=text, source=place)).encode() + b"\n")
             for place, text in pairs]
    ends = np.cumsum(sizes, dtype=np.int64)
    return Rows(file, ends - sizes, ends)


def first_ones(pairs, record):
    """Yield the pairs whose text did not occur before; of each 16 bytes are remembered."""
    seen = set()
    for place, text in pairs:
        key = text_hash(text)[:16]
        count(record, place, text, [] if key in seen else [text], {"copy": 1})
        if key not in seen:
            seen.add(key)
            yield place, text


def new_lines(pairs, record):
    """Yield the pairs without the long lines that occurred before in any of them."""
    ahead = deque()
    for left in repeated_lines(ahead.append(pair) or pair[1] for pair in pairs):
        place, text = ahead.popleft()
        n = text.count("\n") - left.count("\n") + (not left)
        count(record, place, text, [left] if left.strip() else [], {"repeated lines": n})
        if left.strip():
            yield place, left


def without(rows, positions, record, last):
    """Rows without some; the record, after the `last` one, says what goes."""
    for i in positions:
        row = rows.row(i)
        count(record, row["source"], row["text"], [], {record["name"]: 1})
        record["bytes"] -= len(row["text"].encode())
    record["documents"] += last["documents"] - len(positions)
    record["bytes"] += last["bytes"]
    return Rows(rows.file, *np.delete([rows.starts, rows.ends], positions, axis=1))


# -----------------------------------------------------------------------------
# The command.


def engine(config, folder):
    """What runs the batches and finds near-duplicates: the cores of this machine, or a cluster."""
    if config.engine == "none":
        return nullcontext((on_all_cores, near_duplicates))
    from chapters.engine import cluster  # its packages are optional
    return cluster(folder, config.cluster, config.workers)


def run_stages(config, found, file, sources, records, run_all, find_near):
    """All stages from files to Rows; sources and records get what the card says of them."""
    read, per_text, questions = new_record("read"), [], read_questions(config.against)
    plain = SimpleNamespace(**vars(config))  # a process that is sent it need not import its class

    def jobs():
        for batch in read_all(config, found, sources):
            for place, text in batch:
                count(read, place, text, [text], {})
            yield plain, batch

    def texts():
        for batch, new in run_all(run_batch, jobs()):
            merge(per_text, new)
            yield from batch

    pairs, over_all = texts(), []
    for stage, name, wanted in ((first_ones, "copies", config.exact),
                                (new_lines, "lines", config.lines)):
        if wanted:
            over_all.append(new_record(name))
            pairs = stage(pairs, over_all[-1])
    rows = write_rows(pairs, file)
    records += [read, *per_text, *over_all]
    if config.near:
        records.append(new_record("near-duplicates"))
        rows = without(rows, find_near(rows, config.near, config.ngram, config.hashes,
                                       config.bands, config.seed), *records[:-3:-1])
    if questions:
        records.append(new_record("contaminated"))
        rows = without(rows, contaminated(rows, questions), *records[:-3:-1])
    return rows


def curate(config, say=print):
    """Apply the stages to all sources and write what is left to a new folder -> its card, a dict.
    ValueError, and no folder, if nothing is left or `out` holds anything."""
    out, sources, records = Path(config.out), [], []
    found = {source: find(source, out.parent / "downloads") for source in config.sources}
    with new_shards(out, "") as new, tempfile.TemporaryFile(dir=new.parent) as file:
        with engine(config, new.parent) as tools:
            rows = run_stages(config, found, file, sources, records, *tools)
        for line in report(records, sources):
            say(line)
        if config.near and (chance := probability(config.near, config.hashes, config.bands)) < 0.9:
            say(f"near-duplicates: of pairs that are just {config.near} similar, {chance:.0%} are "
                f"found; more with more --bands, of {config.hashes} hashes")
        if not len(rows):
            raise ValueError(f"no text is left of {', '.join(found)}")
        with replacing(new / "documents.jsonl") as lines:
            for i in range(len(rows)):
                lines.write(Documents.__getitem__(rows, i).encode())
        card = dict(license=config.license, date=str(datetime.date.today()), sources=sources,
                    options=asdict(config), stages=records)
        write_json(new / "card.json", card)
    return card


def main():
    if sys.argv[1:2] == ["card"]:
        from chapters import datacard
        return datacard.main(sys.argv[2:])
    [options] = parse_options(__doc__, CurateConfig)
    config = CurateConfig(**options)
    if not config.out or not config.sources:
        raise ValueError("give one or more sources, and --out=FOLDER for their documents")
    refuse_idle(options, "ngram hashes bands seed".split() * (not config.near), "beside --near=0")
    refuse_idle(options, ["workers", "cluster"] * (config.engine == "none"), "without --engine")
    refuse_idle(options, ["workers"] * bool(config.cluster), "beside --cluster")
    refuse_idle(options, ["keep"] * (not config.like), "without --like")
    refuse_idle(options, ["max_chars"] * (config.split == "none"), "without --split")
    curate(config)
    print(f"next: python data.py {config.out}")


if __name__ == "__main__":
    run_command(main)
