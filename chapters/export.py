"""
Tokenizers and weights of other libraries: out and in.

    python -m chapters.export tokenizer.json --format=huggingface --out=folder
    python -m chapters.export tokenizer.json --format=tiktoken --out=ours.tiktoken
    python -m chapters.export folder --out=tokenizer.json   # from Hugging Face's tokenizer.json
    python -m chapters.export theirs.tiktoken --pattern=cl100k --out=tokenizer.json
    python -m chapters.export compare corpus.txt gpt2 o200k_base other.json
    python -m chapters.export in gpt2 --out=runs/gpt2       # GPT-2 as Hugging Face has it

The last needs the files config.json, model.safetensors, and vocab.json with merges.txt or
tokenizer.json, of any of GPT-2's sizes; sample.py and evaluate.py read what it writes.
"""

import base64
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/export.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tiktoken

from model import (GPTConfig, check_options, from_weights, option, read_safetensors,
                   save_model)
from tokenizer import (FORMAT, GPT2_SPLIT, GPT4_SPLIT, SPECIAL_TOKENS, SPLITS, Tokenizer,
                       parse_options, read_files, read_json, reading, recover_merges, refuse_idle,
                       replacing, run_command, to_chars, write_json)

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
GPT2_NAMES = {"h": "blocks", "ln_1": "attn_norm", "attn.c_proj": "attn.o_proj", "ln_2": "mlp_norm",
              "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj", "ln_f": "final_norm"}

# -----------------------------------------------------------------------------
# Tokenizers in Hugging Face's tokenizer.json.


def to_huggingface(tokenizer, folder):
    """Write tokenizer.json and tokenizer_config.json for Hugging Face's libraries.

    They give the same ids (a pattern other than those of SPLITS must mean the same in Ruby's
    syntax), but read special tokens in any text, so encode(special=True) is what they do.
    """
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


def from_huggingface(path):
    """The tokenizer of a tokenizer.json, or of its folder, that is a byte-level BPE like ours."""
    path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    state = read_json(path)
    with reading(path):
        first, model = state["pre_tokenizer"], state["model"]
        *before, last = first.get("pretokenizers", [first])
        pattern = before[0]["pattern"]["Regex"] if before else GPT2_SPLIT
        isolate = [dict(SPLIT, pattern={"Regex": pattern})] if before else []
        last = {**last, "trim_offsets": True}  # which concerns no id
        for found, known in ((state["normalizer"], None), (model["type"], "BPE"),
                             (before, isolate), (last, dict(BYTES, use_regex=not before))):
            if found != known:
                raise ValueError(f"it has {found!r:.60} where only {known!r:.60} is known")
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return Tokenizer.from_vocab(model["vocab"] | added, merges, pattern)


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
# GPT-2's weights.


def weight_files(folder):
    """The safetensors files of a model: those that its index names, else model.safetensors, else
    the only one there is; ValueError for what is missing."""
    index, there = folder / "model.safetensors.index.json", {*folder.glob("*.safetensors")}
    if index.exists():
        with reading(index):
            named = {folder / name for name in read_json(index)["weight_map"].values()}
            if lost := sorted(map(str, named - there)):
                raise ValueError(f"it names {', '.join(lost)}: not in this folder")
            return sorted(named)
    paths = {folder / "model.safetensors"} & there or there
    if len(paths) != 1:
        raise ValueError(f"{folder} has {len(paths)} .safetensors files and no index of them; a "
                         "pickle can run code when it is read: convert it to model.safetensors")
    return [*paths]


def load_gpt2(folder):
    """The GPT in a folder with Hugging Face's config.json and safetensors files, of any of GPT-2's
    sizes. Its vocabulary: Tokenizer.from_gpt2."""
    path = Path(folder, "config.json")
    shape = read_json(path)
    with reading(path):
        if shape.get("activation_function", "gelu_new") != "gelu_new" or shape.get("n_inner"):
            raise ValueError("only GPT-2's own activation gelu_new and n_inner null are known")
        own = {name: shape[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config = GPTConfig("gpt2", block_size=shape.get("n_positions", shape.get("n_ctx")), **own)
    found = {n: w for path in weight_files(Path(folder)) for n, w in read_safetensors(path).items()}
    with reading(folder):
        return from_weights(config, gpt2_weights(found), folder)


def gpt2_weights(found):
    """Hugging Face's names and tensors of GPT-2 -> ours."""
    weights = {}
    for name, w in found.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # old files carry the causal mask; the head is the embedding
        name = "transformer." + name.removeprefix("transformer.")
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        if name.endswith("_proj.weight") or ".c_attn.weight" in name:
            w = w.transpose(-2, -1)  # their Conv1D keeps its matrix transposed, and q, k, v in one
        parts = "qkv" if ".c_attn." in name else "q"
        weights |= {name.replace("c_attn", f"{x}_proj"): part.float().contiguous()
                    for x, part in zip(parts, w.chunk(len(parts)))}
    return weights


def import_gpt2(folder, out):
    """Write a run folder, tokenizer.json and one checkpoint, of a folder of GPT-2 -> its Path."""
    folder, out = Path(folder), Path(out or Path("runs", Path(folder).resolve().name))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give another --out")
    model, vocab = load_gpt2(folder), folder / "vocab.json"
    tokenizer = (Tokenizer.from_gpt2(vocab, folder / "merges.txt") if vocab.exists()
                 else from_huggingface(folder))
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{folder}: {tokenizer.n_vocab} tokens, but weights for "
                         f"{model.config.vocab_size}: the files are of two models")
    part = out.with_name(f".{out.name}.part")  # it gets its name when it is whole
    part.mkdir(parents=True, exist_ok=True)
    tokenizer.save(part / "tokenizer.json")
    with replacing(part / "step_000000.safetensors") as file:
        save_model(model, file, step=0)
    if out.exists():
        out.rmdir()
    return part.rename(out)


# -----------------------------------------------------------------------------
# The command.


FORMATS = {"huggingface": (to_huggingface, "huggingface"),  # what writes it, and where
           "tiktoken": (to_rank_file, "tokenizer.tiktoken")}


@dataclass(frozen=True)
class ExportConfig:
    """What is written from what."""
    source: str = option("tokenizer.json", "our tokenizer.json, which is exported; or a Hugging "
                         "Face tokenizer or a .tiktoken file, of which ours is made; or the word "
                         "compare or in", positional=True)
    others: list = option([], "compare: a file of text, then tokenizers of ours or names of "
                          "OpenAI's encodings; in: a folder of GPT-2", positional=True)
    tokenizer: str = option("tokenizer.json", "compare: the first one")
    format: str = option("huggingface", "of an export", known=lambda: FORMATS)
    pattern: str = option("gpt4", "how a .tiktoken file splits", known=lambda: SPLITS)
    out: str = option("", "what to write: a folder, or a file")

    def __post_init__(self):
        check_options(self)
        if bool(self.others) != (self.source in ("compare", "in")):
            raise ValueError("export takes one source; compare takes a file of text and "
                             "tokenizers, in a folder of GPT-2")
        if self.source == "in" and len(self.others) > 1:
            raise ValueError(f"in takes one folder, not {' '.join(self.others)}")


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
    if config.source == "in":
        refuse_idle(typed, ["format", "pattern", "tokenizer"], "with in")
        return print(f"next: python sample.py {import_gpt2(config.others[0], config.out)}")
    if config.others:
        refuse_idle(typed, ["format", "pattern", "out"], "with compare")
        path, *others = config.others
        return compare(path, config.tokenizer, *others or ["gpt2", "cl100k_base", "o200k_base"])
    tokenizer = read_foreign(config)
    refuse_idle(typed, ["tokenizer"] + ["format"] * bool(tokenizer), f"on {config.source}")
    refuse_idle(typed, ["pattern"] * (not config.source.endswith(".tiktoken")), "without .tiktoken")
    write, out = (Tokenizer.save, "tokenizer.json") if tokenizer else FORMATS[config.format]
    out = config.out or out
    if tokenizer and Path(out).exists():
        raise ValueError(f"{out} is there already: give another --out")
    tokenizer = tokenizer or Tokenizer.load(config.source)
    write(tokenizer, out)
    print(f"{config.source}: {tokenizer.n_vocab:,} tokens in {out}")


if __name__ == "__main__":
    run_command(main)
