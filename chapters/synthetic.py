"""
Text that no person wrote: short stories, worked arithmetic, a model's text, augmented documents.

    python -m chapters.synthetic stories --n=10000 --out=texts/stories
    python -m chapters.synthetic arithmetic --largest=999 --out=texts/sums     # or --chats
    python -m chapters.synthetic run --from_run=runs/a --prompts=starts.txt --out=texts/written
    python -m chapters.synthetic augment texts/good/documents.jsonl --how swap --out=texts/more
    python data.py texts/stories

--out gets documents.jsonl ({"text", "source"} a line; with --chats chats.jsonl, {"messages", ...})
and card.json, in which "synthetic" is true; data.py copies it into the card of the shards. A model
trained on the text of models forgets what is rare (arXiv:2305.17493): mix it with text of people
(chapters.mix), and drop copies (chapters.curate; with --rules=none, as problems are too short for
its rules).
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
from tokenizer import (parse_options, read_json, refuse_idle, replacing, run_command,
                       write_json)

# Pairs of synonyms; both begin with a vowel or neither does, so that "a" and "an" stay right.
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
PUNCTUATION = ".,;:!?\"')]\u2019\u201d"  # after a word


# -----------------------------------------------------------------------------
# Augmentation: a document with a share of its words changed (EDA, arXiv:1901.11196).


def split_words(text):
    """A text as parts, which join to it, and the positions of the words in them: split_words("a b")
    == (["", "a", " ", "b", ""], range(1, 5, 2))."""
    parts = re.split(r"(\S+)", text)
    return parts, range(1, len(parts), 2)


def sample_positions(positions, n_words, share, random):
    """A random sample of positions, for a share of all words, at least one if there is any."""
    return random.sample(positions, min(len(positions), max(1, round(share * n_words))))


def delete(text, share, random):
    """Delete a share of the words, but not all of them."""
    parts, words = split_words(text)
    deleted = {*sample_positions(words, len(words), share, random)[:len(words) - 1]}
    return "".join(part for i, part in enumerate(parts)
                   if i not in deleted and i - 1 not in deleted)  # nor the space after one


def swap(text, share, random):
    """Swap a share of the words, each with a random other one."""
    parts, words = split_words(text)
    for i in sample_positions(words, len(words), share, random):
        j = random.choice(words)
        parts[i], parts[j] = parts[j], parts[i]
    return "".join(parts)


def synonyms(text, share, random):
    """Replace words that have a synonym in the table, up to a share of all words."""
    parts, words = split_words(text)
    known = [i for i in words if parts[i].rstrip(PUNCTUATION).lower() in SYNONYMS]
    for i in sample_positions(known, len(words), share, random):
        word = parts[i].rstrip(PUNCTUATION)
        new = random.choice(SYNONYMS[word.lower()])
        parts[i] = (new.capitalize() if word[0].isupper() else new) + parts[i][len(word):]
    return "".join(parts)


def shuffle(text, share, random):
    """Put all sentences in a random order; the share does not matter."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(random.sample(sentences, len(sentences)))


def case(text, share, random):
    """Write the whole text in capitals or in lower case; the share does not matter."""
    return random.choice([str.upper, str.lower])(text)


CHANGES = dict(delete=delete, swap=swap, synonyms=synonyms, shuffle=shuffle, case=case)


# -----------------------------------------------------------------------------
# Kinds: each is a function of a SyntheticConfig that yields (place, text before, text).


def make_stories(config):
    """Stories, by chapters/grammar.py."""
    for i, text in enumerate(stories(config.n, config.seed), 1):
        yield f"stories, {i}", "", text


def make_arithmetic(config):
    """Problems with their solutions, by chapters/grammar.py."""
    pairs = arithmetic(config.n, config.seed, config.largest)
    for i, (question, solution) in enumerate(pairs, 1):
        yield f"arithmetic, {i}", "", f"Question: {question}\nAnswer: {solution}"


def sample_run(config):
    """What a run's model writes after each of the prompts in turn."""
    model, tokenizer = load_run(config.from_run, device=pick_device())
    lines = read_text(config.prompts).splitlines() if config.prompts else [""]
    if not lines:
        raise ValueError(f"--prompts={config.prompts} is empty: write a prompt a line")
    prompts = [lines[i % len(lines)] for i in range(config.n)]
    texts = complete_batch(model, tokenizer, prompts, temperature=config.temperature,
                           seed=config.seed, max_new_tokens=config.max_new_tokens)
    for i, (prompt, text) in enumerate(zip(prompts, texts), 1):
        yield f"run {config.from_run}, {i}", "", prompt + text


def augment(config):
    """Versions of documents, each with one random kind of change."""
    random, names = Random(config.seed), chosen(config.how, CHANGES, "how")
    for path in config.files:
        for i, text in enumerate(read_documents(path, config.field), 1):
            for name in random.choices(names, k=config.versions):
                yield f"{name} of {path}, {i}", text, CHANGES[name](text, config.share, random)


KINDS = dict(stories=make_stories, arithmetic=make_arithmetic, run=sample_run, augment=augment)
# The options that a kind has beside those that all have, and the one that it needs.
OPTIONS = dict(stories="n", arithmetic="n largest chats", augment="files how share versions field",
               run="n from_run prompts temperature max_new_tokens")
NEEDED = dict(augment="files", run="from_run")


@dataclass(frozen=True)
class SyntheticConfig:
    """What is made, and how much."""
    kind: str = option("", "what to make", known=lambda: KINDS, positional=True)
    files: list = option([], "with documents to augment", positional=True)
    out: str = option("", "folder to write")
    n: int = option(1000, f"documents; there are {N_STORIES:,} stories", low=1)
    seed: int = option(0, "same seed, same text")
    largest: int = option(99, "number in arithmetic problems", low=9, below=10**9)
    chats: bool = option(False, "arithmetic as messages, to learn from the solutions alone")
    from_run: str = option("", "run folder whose model writes")
    prompts: str = option("", "file with a prompt a line; without it, new documents")
    temperature: float = option(0.8, "of a run's sampling", below=100)
    max_new_tokens: int = option(200, "of each text of a run", low=1)
    how: str | list = option([*CHANGES], f"changes: of {' '.join(CHANGES)}", many=True)
    share: float = option(0.1, "of the words, to change", below=1.01)
    versions: int = option(1, "to make of each document", low=1, below=1001)
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


def source_of(name, path=None):
    """What a card says of a source: its name and, of a file, the card.json beside it."""
    beside = path and Path(path).with_name("card.json")
    card = read_json(beside) if beside and beside.exists() else {}
    return dict(name=name, files=int(bool(path)), n_skipped=0, skipped=[],
                curated=card if isinstance(card, dict) else {})


def write_folder(out, name, rows, card):
    """Write rows, a JSON object a line, and then their card to a new folder; ValueError, and no
    folder, if there are no rows or `out` is not empty."""
    with new_shards(Path(out), "") as new:
        with replacing(new / name) as file:
            for row in rows:
                file.write(json.dumps(row).encode() + b"\n")
            if not file.tell():
                raise ValueError("no document is left to write: each is empty, or as it was before")
        write_json(new / "card.json", card)


def synthesize(config):
    """Write the documents of a config to a new folder -> (path of the file, its card, a dict)."""
    record, name = new_record(config.kind), "chats.jsonl" if config.chats else "documents.jsonl"

    def rows():
        for place, before, text in KINDS[config.kind](config):
            place, is_new = f"synthetic {place}", bool(text.strip()) and text != before
            count(record, place, before, [text] * is_new,
                  {config.kind if is_new else "empty or unchanged": 1})
            if is_new:
                yield (dict(messages=as_chat(text)) if config.chats else
                       dict(text=text)) | dict(source=place)

    sources = [source_of(f"synthetic augment {path}", path) for path in config.files]
    sources = sources or [source_of(f"synthetic {config.kind} {config.from_run}".strip())]
    card = dict(license=config.license, date=str(datetime.date.today()), synthetic=True,
                sources=sources, options=asdict(config), stages=[record])
    write_folder(config.out, name, rows(), card)
    return Path(config.out, name), card


def main():
    [options] = parse_options(__doc__, SyntheticConfig)
    config = SyntheticConfig(**options)
    if not config.out:
        raise ValueError("--out=FOLDER is missing, a new folder for the documents")
    idle = {*" ".join(OPTIONS.values()).split()} - {*OPTIONS[config.kind].split()}
    refuse_idle(options, sorted(idle), f"beside {config.kind}")
    _, card = synthesize(config)
    record = card["stages"][0]
    print(f"{record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB; "
          f"left out: {record['dropped']:,}, empty or as before")
    print(f"next: python data.py {config.out}")


if __name__ == "__main__":
    run_command(main)
