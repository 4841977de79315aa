"""
Text that no person wrote: little stories, worked arithmetic, a model's text, changed documents.

    python -m chapters.synthetic stories --n=10000 --out=texts/stories
    python -m chapters.synthetic arithmetic --largest=999 --out=texts/sums     # or --chats
    python -m chapters.synthetic run --from_run=runs/a --prompts=starts.txt --out=texts/written
    python -m chapters.synthetic augment texts/good/documents.jsonl --how swap --out=texts/more
    python data.py texts/stories

--out gets documents.jsonl ({"text", "source"} a line; with --chats chats.jsonl, {"messages", ...})
and card.json, in which "synthetic" is true; data.py puts it into the card of the shards. A model
trained on what models wrote loses what is rare (arXiv:2305.17493): mix such text with that of
people (chapters.mix), and drop its copies (chapters.curate; its rules drop what is as short as
problems are, unless --rules=none).
"""

import datetime
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/synthetic.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.grammar import N_STORIES, arithmetic, stories
from chapters.stages import chosen, count, new_record
from data import new_shards, read_documents
from model import check_options, option
from sample import complete_batch, load_run, pick_device, read_text
from tokenizer import parse_options, refuse_idle, replacing, run_command, write_json

# Words for each other; both begin with a vowel or neither, so that "a" and "an" stay right.
PAIRS = ("angry annoyed, beautiful pretty, begin commence, big huge, big large, build construct, "
         "buy purchase, center middle, choose pick, damage harm, happy glad, hard difficult, "
         "important essential, kid child, kids children, many numerous, maybe perhaps, "
         "need require, old ancient, path trail, quick fast, quickly rapidly, rich wealthy, "
         "road street, rock stone, scared frightened, shop store, shout yell, show demonstrate, "
         "silent quiet, small little, smart clever, speak talk, start begin, tale story, "
         "tired weary, whole complete, wonderful marvelous").split(", ")
SYNONYMS = {word: [other for pair in PAIRS for other in pair.split()
                   if word in pair.split() and other != word]
            for pair in PAIRS for word in pair.split()}
PUNCTUATION = ".,;:!?\"')]\u2019\u201d"  # behind a word


# -----------------------------------------------------------------------------
# Augmentation: a document with a share of its words changed (EDA, arXiv:1901.11196).


def places(text):
    """A text as parts, of which each second is a word, and the positions of the words."""
    parts = re.split(r"(\S+)", text)
    return parts, range(1, len(parts), 2)


def some(random, positions, share):
    """A share of positions, at least one if there is any."""
    return random.sample(positions, min(len(positions), max(1, round(share * len(positions)))))


def delete(text, share, random):
    """The text without some words, but not without all."""
    parts, words = places(text)
    gone = {*some(random, words, share)[:len(words) - 1]}
    return "".join(part for i, part in enumerate(parts) if i not in gone and i - 1 not in gone)


def swap(text, share, random):
    """The text in which some words have changed places with any others."""
    parts, words = places(text)
    for i in some(random, words, share):
        j = random.choice(words)
        parts[i], parts[j] = parts[j], parts[i]
    return "".join(parts)


def synonyms(text, share, random):
    """The text with other words for some of those that have one in the table."""
    parts, words = places(text)
    known = [i for i in words if parts[i].rstrip(PUNCTUATION).lower() in SYNONYMS]
    n = max(1, round(share * len(words)))
    for i in random.sample(known, min(n, len(known))):
        word = parts[i].rstrip(PUNCTUATION)
        new = random.choice(SYNONYMS[word.lower()])
        parts[i] = (new.capitalize() if word[0].isupper() else new) + parts[i][len(word):]
    return "".join(parts)


def shuffle(text, share, random):
    """The sentences of a text in another order."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(random.sample(sentences, len(sentences)))


def case(text, share, random):
    """The text in capitals or in small letters."""
    return random.choice([str.upper, str.lower])(text)


CHANGES = dict(delete=delete, swap=swap, synonyms=synonyms, shuffle=shuffle, case=case)


# -----------------------------------------------------------------------------
# Kinds: each yields (place, the text before, the text) of a SyntheticConfig.


def told(config):
    """Stories."""
    for i, text in enumerate(stories(config.n, config.seed), 1):
        yield f"stories, {i}", "", text


def calculated(config):
    """Problems with their solutions."""
    pairs = arithmetic(config.n, config.seed, config.largest)
    for i, (question, solution) in enumerate(pairs, 1):
        yield f"arithmetic, {i}", "", f"Question: {question}\nAnswer: {solution}"


def written(config):
    """What a run's model writes after each of the prompts in turn."""
    model, tokenizer = load_run(config.from_run, device=pick_device())
    starts = read_text(config.prompts).splitlines() if config.prompts else [""]
    if not starts:
        raise ValueError(f"--prompts={config.prompts} is empty: write a prompt a line")
    prompts = [starts[i % len(starts)] for i in range(config.n)]
    texts = complete_batch(model, tokenizer, prompts, temperature=config.temperature,
                           seed=config.seed, max_new_tokens=config.max_new_tokens)
    for i, (prompt, text) in enumerate(zip(prompts, texts), 1):
        yield f"run {config.from_run}, {i}", "", prompt + text


def augmented(config):
    """Versions of documents, each by one change."""
    random, names = Random(config.seed), chosen(config.how, CHANGES, "how")
    for path in config.files:
        for i, text in enumerate(read_documents(path, config.field), 1):
            for name in random.choices(names, k=config.versions):
                yield f"{name} of {path}, {i}", text, CHANGES[name](text, config.share, random)


KINDS = dict(stories=told, arithmetic=calculated, run=written, augment=augmented)
ACT = dict(stories="n", arithmetic="n largest chats", augment="files how share versions field",
           run="n from_run prompts temperature max_new_tokens")  # beside a kind
NEEDED = dict(augment="files", run="from_run")


@dataclass(frozen=True)
class SyntheticConfig:
    """What is made, and how much."""
    kind: str = option("", "what to make", known=lambda: KINDS, positional=True)
    files: list = option([], "of documents to augment", positional=True)
    out: str = option("", "folder to write")
    n: int = option(1000, f"documents; there are {N_STORIES:,} stories", low=1)
    seed: int = option(0, "same seed, same text")
    largest: int = option(99, "of the numbers in arithmetic", low=9, below=10**9)
    chats: bool = option(False, "arithmetic as messages, for chapters.chats")
    from_run: str = option("", "run folder whose model writes")
    prompts: str = option("", "file with a prompt a line; else documents begin")
    temperature: float = option(0.8, "of a run; above 1 is wild", below=100)
    max_new_tokens: int = option(200, "of each text of a run", low=1)
    how: str | list = option([*CHANGES], f"augment: of {' '.join(CHANGES)}", many=True)
    share: float = option(0.1, "of the words that are changed", below=1.01)
    versions: int = option(1, "of each document that is changed", low=1, below=1001)
    field: str = option("text", "of JSON and CSV files, the one with the text")
    license: str = option("unknown", "of the text, for its card")

    def __post_init__(self):
        check_options(self)
        if self.kind in NEEDED and not getattr(self, NEEDED[self.kind]):
            raise ValueError(f"{self.kind} needs {NEEDED[self.kind]}: --help lists the options")
        if not chosen(self.how, CHANGES, "how"):
            raise ValueError(f"--how=none changes nothing: choose of {' '.join(CHANGES)}")


# -----------------------------------------------------------------------------
# The command.


def as_chat(text):
    """The messages of a problem: its question, and its solution as the reply."""
    question, answer = text.removeprefix("Question: ").split("\nAnswer: ")
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def write_folder(out, name, rows, card):
    """Write rows, a JSON object a line, and then their card to a new folder; ValueError, and no
    folder, if there are none or `out` holds anything."""
    with new_shards(Path(out), "") as new:
        with replacing(new / name) as file:
            for row in rows:
                file.write(json.dumps(row).encode() + b"\n")
            if not file.tell():
                raise ValueError("no document is left to write: each is empty, or as it was before")
        write_json(new / "card.json", card)


def synthesize(config):
    """Write the documents of a config to its new folder -> (path of the file, card, a dict)."""
    record, name = new_record(config.kind), "chats.jsonl" if config.chats else "documents.jsonl"

    def rows():
        for place, before, text in KINDS[config.kind](config):
            place, is_new = f"synthetic {place}", bool(text.strip()) and text != before
            count(record, place, before, [text] * is_new,
                  {config.kind if is_new else "empty or unchanged": 1})
            if is_new:
                yield (dict(messages=as_chat(text)) if config.chats else
                       dict(text=text)) | dict(source=place)

    sources = [dict(name=f"synthetic {config.kind} {source}".strip(), files=int(source != ""),
                    n_skipped=0, skipped=[]) for source in config.files or [config.from_run]]
    card = dict(license=config.license, date=str(datetime.date.today()), synthetic=True,
                sources=sources, options=asdict(config), stages=[record])
    write_folder(config.out, name, rows(), card)
    return Path(config.out, name), card


def main():
    [options] = parse_options(__doc__, SyntheticConfig)
    config = SyntheticConfig(**options)
    if not config.out:
        raise ValueError("--out=FOLDER is missing, a new folder for the documents")
    idle = {*" ".join(ACT.values()).split()} - {*ACT[config.kind].split()}
    refuse_idle(options, sorted(idle), f"beside {config.kind}")
    path, card = synthesize(config)
    record = card["stages"][0]
    print(f"{record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB; "
          f"left out: {record['dropped']:,}, empty or as before")
    print(f"next: python -m chapters.chats {path}" if config.chats else
          f"next: python data.py {config.out}")


if __name__ == "__main__":
    run_command(main)
