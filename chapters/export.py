"""
Tokenizers and weights of other libraries: out and in.

    python -m chapters.export tokenizer.json --format=huggingface --out=folder
    python -m chapters.export tokenizer.json --format=tiktoken --out=ours.tiktoken
    python -m chapters.export folder --out=tokenizer.json   # from Hugging Face's tokenizer.json
    python -m chapters.export theirs.tiktoken --pattern=cl100k --out=tokenizer.json
    python -m chapters.export compare corpus.txt gpt2 o200k_base other.json
    python -m chapters.export in gpt2 --out=runs/gpt2       # a model as Hugging Face has it
    python -m chapters.export peft runs/chat --out=folder   # LoRA as the library peft has it

`in` needs config.json, safetensors files and tokenizer.json (or GPT-2's vocab.json and merges.txt)
of one of the families in chapters/weights.py, and writes a run like any other.
"""

import base64
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/export.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tiktoken

from chapters.weights import export_peft, load_pretrained, new_folder, read_shape, write_run
from model import check_options, option
from sample import warn
from tokenizer import (CHAR_TO_BYTE, FORMAT, GPT2_SPLIT, GPT4_SPLIT, SPECIAL_TOKENS, SPLITS,
                       Tokenizer, parse_options, read_files, read_json, reading, recover_merges,
                       refuse_idle, replacing, run_command, to_bytes, to_chars, write_json)

# A chat in Jinja, as Tokenizer.render_chat encodes it. In Hugging Face's libraries a special token
# in a message would become its id, so the template refuses it.
CHAT_TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    f"{{% for name in {SPECIAL_TOKENS} if name in message['content'] %}}"
    "{{ raise_exception('a text must not contain ' + name) }}{% endfor %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

SPLIT = dict(type="Split", behavior="Isolated", invert=False)  # Hugging Face's names
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
DIGITS = dict(type="Digits", individual_digits=True)  # before GPT-2's pattern:
DIGITS_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}|\s+(?=\p{N})")
# How GPT-4's pattern begins, in Llama's and Qwen's words and in ours.
THEIR_START, OUR_START = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "'(?i:[sdmt]|ll|ve|re)|"
load_gpt2 = load_pretrained  # the name that it has in chapter 10
CHANGES_IDS = "byte_fallback continuing_subword_prefix end_of_word_suffix dropout".split()

# -----------------------------------------------------------------------------
# Tokenizers in Hugging Face's tokenizer.json.


def to_huggingface(tokenizer, folder):
    """Write tokenizer.json and tokenizer_config.json for Hugging Face's libraries, which give the
    ids of encode(special=True); a pattern of none of SPLITS must mean the same in Ruby's syntax."""
    path = Path(folder, "tokenizer.json")
    if path.exists() and FORMAT in path.read_text(encoding="utf-8", errors="replace")[:99]:
        raise ValueError(f"{path} is a tokenizer of this program; give another folder")
    vocab = {to_chars(tokenizer.tokens[id]): id for id in range(256 + len(tokenizer.merges))}
    for name, id in tokenizer.special.items():
        if vocab.setdefault(name, id) != id:
            raise ValueError(f"special token {name!r} reads like token {vocab[name]}: rename it")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=id, content=name, **flags) for name, id in tokenizer.special.items()]
    steps = [dict(SPLIT, pattern={"Regex": tokenizer.pattern}), dict(BYTES, use_regex=False)]
    write_json(path, dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=steps), post_processor=None,
        decoder=dict(BYTES, use_regex=True),
        model=dict(type="BPE", vocab=vocab, merges=tokenizer.definition()["merges"])))
    eot = None if tokenizer.eot is None else "<|endoftext|>"
    template = CHAT_TEMPLATE if {*SPECIAL_TOKENS} <= {*tokenizer.special} else None
    write_json(path.with_name("tokenizer_config.json"), dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=eot, eos_token=eot,
        clean_up_tokenization_spaces=False, chat_template=template))


def expect(found, *known):
    """ValueError for a part of a tokenizer.json that is none of the known."""
    if found not in known:
        raise ValueError(f"it has {found!r:.60} where only {known[0]!r:.60} is known")


def split_pattern(pre_tokenizer):
    """The pattern by which a pre_tokenizer splits; ValueError if it does something else."""
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    own = before in ([], [DIGITS])  # then the last step splits, by GPT-2's pattern
    pattern = (DIGITS_SPLIT if before else GPT2_SPLIT) if own else before[0]["pattern"]["Regex"]
    expect(before, before if own else [dict(SPLIT, pattern={"Regex": pattern})])
    last = dict(use_regex=True) | last | dict(trim_offsets=True)  # which concerns no id
    expect(last, dict(BYTES, use_regex=own))
    plain = pattern.replace(THEIR_START, OUR_START)
    return plain if plain in SPLITS.values() else pattern  # those are split fast


def single_merges(tokens, pairs, ids):
    """The merges, one for each of the tokens in order, where the file lists all pairs that make a
    token, as those made of tiktoken's ranks do: the first to merge are those of the lowest id."""
    merges, _ = recover_merges({rank: to_bytes(token) for rank, token in enumerate(tokens)})
    made = [ids[left + right] for left, right in pairs]
    if made != sorted(made) or not {*merges} <= {tuple(map(to_bytes, pair)) for pair in pairs}:
        raise ValueError("its merges are not in the order of the tokens that they make")
    return merges


def read_huggingface(path):
    """-> (the tokenizer of a tokenizer.json, or of its folder, that is a byte-level BPE; the id in
    that file of each of its ids). To normalize to NFC is left to data.clean, which does."""
    path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    state = read_json(path)
    with reading(path):
        expect((model := state["model"])["type"], "BPE")
        expect({name: model[name] for name in CHANGES_IDS if model.get(name)}, {})
        expect(state["normalizer"], None, dict(type="NFC"))
        pattern = split_pattern(state["pre_tokenizer"])
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        ids = model["vocab"] | added
        chars = sorted(CHAR_TO_BYTE, key=ids.__getitem__)
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [tuple(map(to_bytes, pair)) for pair in pairs]
        if model.get("ignore_merges") or len({*map("".join, pairs)}) < len(pairs):
            tokens = sorted({*model["vocab"]} - {*added}, key=ids.get)
            merges = single_merges(tokens, pairs, ids)
        names = [*chars, *(to_chars(left + right) for left, right in merges)]
        order = [ids.pop(name) for name in names]
        if order != [*range(len(order))]:
            rest = sorted(ids, key=ids.get)
            return Tokenizer(merges, rest, pattern, to_bytes(chars)), order + sorted(ids.values())
        tokenizer = Tokenizer(merges, ids, pattern, to_bytes(chars))
        return tokenizer, [*range(tokenizer.n_vocab)]


def from_huggingface(path):
    """The tokenizer of read_huggingface, if its ids are the same there; else ValueError."""
    tokenizer, ids = read_huggingface(path)
    if ids != [*range(len(ids))]:
        raise ValueError(f"{path} cannot be read: other ids than those of bytes and merges come "
                         "first; `export in` imports it with its model")
    return tokenizer


# -----------------------------------------------------------------------------
# Tokenizers in tiktoken's rank files.


def to_rank_file(tokenizer, path):
    """Write the tokens as tiktoken's files hold them: base64 and rank, without special ones."""
    with replacing(path) as file:
        for id in range(256 + len(tokenizer.merges)):
            file.write(base64.b64encode(tokenizer.tokens[id]) + f" {id}\n".encode())


def from_rank_file(path, special_tokens=SPECIAL_TOKENS, pattern=GPT4_SPLIT):
    """Read a .tiktoken file; which special tokens and pattern belong to it, it does not say."""
    with reading(path):
        tokens = {}
        for n, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
            except ValueError:
                raise ValueError(f"line {n} must be a token in base64 and its rank, not "
                                 f"{line!r:.40}") from None
        merges, byte_order = recover_merges(tokens)
        return Tokenizer(merges, special_tokens, pattern, byte_order)


# -----------------------------------------------------------------------------
# A folder with a model of Hugging Face's becomes a run.


def name_eot(tokenizer, ids, config):
    """The tokenizer with <|endoftext|>. Where it has none, the token is called so that config.json
    says begins a document, or else that ends one, by its id there: ids has those of all of ours."""
    if tokenizer.eot is not None:
        return tokenizer
    names, eos = {ids[id]: name for name, id in tokenizer.special.items()}, config["eos_token_id"]
    wanted = [config.get("bos_token_id"), *(eos if isinstance(eos, list) else [eos])]
    if not (found := [names[id] for id in wanted if id in names]):
        raise ValueError("its bos_token_id and eos_token_id are of no special token, and there is "
                         "no <|endoftext|>: what begins a document?")
    warn(f"{found[0]} is called <|endoftext|> here, which begins every document")
    special = dict(tokenizer.special)
    special["<|endoftext|>"] = special.pop(found[0])
    return Tokenizer(tokenizer.merges, special, tokenizer.pattern, tokenizer.byte_order)


def read_vocabulary(folder):
    """-> (the tokenizer of a model's folder, the row of the embedding that each of its ids has)."""
    family, shape = read_shape(folder)
    if family == "gpt2" and not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")
        ids = [*range(tokenizer.n_vocab)]
    else:
        tokenizer, ids = read_huggingface(folder)
    if sorted({*ids} & {*range(shape.vocab_size)}) != sorted(ids):
        raise ValueError(f"{folder}: {tokenizer.n_vocab} tokens, but weights for "
                         f"{shape.vocab_size}: the files are of two models")
    if unused := shape.vocab_size - len(ids):
        warn(f"{unused} rows of the embedding belong to no token: they are left out")
    with reading(folder / "config.json"):
        return name_eot(tokenizer, ids, read_json(folder / "config.json")), ids


def import_run(folder, out=""):
    """Write a run, a tokenizer and one checkpoint, of a model's folder -> its Path."""
    out = new_folder(out or Path("runs", Path(folder).resolve().name))
    tokenizer, ids = read_vocabulary(Path(folder))
    return write_run(load_pretrained(folder, ids), tokenizer, out)


# -----------------------------------------------------------------------------
# The command.

FORMATS = {"huggingface": (to_huggingface, "huggingface"),  # what writes it, and where
           "tiktoken": (to_rank_file, "tokenizer.tiktoken")}
FOLDERS = {"in": (import_run, "next: python sample.py {}"),  # what reads one, and what is said
           "peft": (export_peft, "next: peft.PeftModel.from_pretrained(base, '{}')")}


@dataclass(frozen=True)
class ExportConfig:
    """What is written from what."""
    source: str = option("tokenizer.json", "our tokenizer.json, which is exported; or a Hugging "
                         "Face tokenizer or a .tiktoken file, of which ours is made; or the word "
                         "compare, in or peft", positional=True)
    others: list = option([], "compare: a file of text, then tokenizers of ours or names of "
                          "OpenAI's encodings; in: a model's folder; peft: a run", positional=True)
    tokenizer: str = option("tokenizer.json", "compare: the first one")
    format: str = option("huggingface", "of an export", known=lambda: FORMATS)
    pattern: str = option("gpt4", "how a .tiktoken file splits", known=lambda: SPLITS)
    out: str = option("", "what to write: a folder, or a file")

    def __post_init__(self):
        check_options(self)
        if bool(self.others) != (self.source in ("compare", *FOLDERS)):
            raise ValueError("export takes one source; compare takes a file of text and "
                             "tokenizers, in the folder of a model, peft a run")
        if self.source in FOLDERS and len(self.others) > 1:
            raise ValueError(f"{self.source} takes one folder, not {' '.join(self.others)}")


def read_foreign(config):
    """Another library's tokenizer as ours; None where the source is one of ours."""
    path = Path(config.source)
    if path.suffix == ".tiktoken":
        return from_rank_file(path, pattern=SPLITS[config.pattern])
    values = None if path.is_dir() else read_json(path)
    is_theirs = path.is_dir() or isinstance(values, dict) and "model" in values
    return from_huggingface(path) if is_theirs else None


def compare(path, *names):
    """Print how a file's text fares with tokenizers, each in one thread."""
    text, openai = "".join(read_files([path])), tiktoken.list_encoding_names()
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to compare")
    size = len(text.encode())
    print(f"{'':24}{'vocabulary':>12}{'tokens':>12}{'bytes per token':>18}{'MB/s':>8}")
    for name in names:
        try:
            encoding = (tiktoken.get_encoding(name) if name in openai
                        else Tokenizer.load(name).to_tiktoken())
        except (OSError, ValueError) as error:  # no such file, no connection to fetch it
            print(f"{name:24}{'not loaded: ':>14}{error!s:.99}")
            continue
        start = time.perf_counter()
        n = len(encoding.encode_ordinary(text))
        speed = size / 1e6 / (time.perf_counter() - start)
        print(f"{name:24}{encoding.n_vocab:12,}{n:12,}{size / n:18.2f}{speed:8.1f}")


def main():
    typed, = parse_options(__doc__, ExportConfig)
    config = ExportConfig(**typed)
    if config.source in FOLDERS:
        refuse_idle(typed, ["format", "pattern", "tokenizer"], f"with {config.source}")
        make, words = FOLDERS[config.source]
        return print(words.format(make(config.others[0], config.out)))
    if config.others:
        refuse_idle(typed, ["format", "pattern", "out"], "with compare")
        path, *others = config.others
        return compare(path, config.tokenizer, *others or ["gpt2", "cl100k_base", "o200k_base"])
    tokenizer = read_foreign(config)
    refuse_idle(typed, ["tokenizer"] + ["format"] * bool(tokenizer), f"on {config.source}")
    refuse_idle(typed, ["pattern"] * (not config.source.endswith(".tiktoken")), "without .tiktoken")
    write, own = (Tokenizer.save, "tokenizer.json") if tokenizer else FORMATS[config.format]
    out = config.out or own
    if tokenizer and Path(out).exists():
        raise ValueError(f"{out} is there already: give another --out")
    tokenizer = tokenizer or Tokenizer.load(config.source)
    write(tokenizer, out)
    print(f"{config.source}: {tokenizer.n_vocab:,} tokens in {out}")


if __name__ == "__main__":
    run_command(main)
