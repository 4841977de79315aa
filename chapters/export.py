"""
Models and tokenizers for other programs, and theirs for this one.

    python -m chapters.export hf runs/chat --out=folder     # for transformers and vLLM
    python -m chapters.export gguf runs/chat --out=chat.gguf --type=q8_0     # for llama.cpp
    python -m chapters.export onnx runs/chat --out=folder   # for onnxruntime
    python -m chapters.export peft runs/chat --out=folder   # LoRA as the library peft has it
    python -m chapters.export in gpt2 --out=runs/gpt2       # a model as Hugging Face has it
    python -m chapters.export tokenizer.json --format=huggingface --out=folder
    python -m chapters.export tokenizer.json --format=tiktoken --out=ours.tiktoken
    python -m chapters.export folder --out=tokenizer.json   # from Hugging Face's tokenizer.json
    python -m chapters.export theirs.tiktoken --pattern=cl100k --out=tokenizer.json
    python -m chapters.export compare corpus.txt gpt2 o200k_base other.json

`in` needs config.json, safetensors files and tokenizer.json (or GPT-2's vocab.json and merges.txt)
of one of the families in chapters/weights.py, and writes a run like any other.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/export.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tiktoken

from chapters.gguf_files import TYPES, export_gguf
from chapters.onnx_files import export_onnx
from chapters.peft_files import export_peft
from chapters.token_files import (from_huggingface, from_rank_file, read_huggingface,
                                  to_huggingface, to_rank_file)
from chapters.weights import (load_plain, load_pretrained, new_folder, read_shape, shape_values,
                              to_names, whole_folder, write_run)
from model import check_options, option, write_safetensors
from sample import checkpoints, end_ids, warn
from tokenizer import (SPLITS, Tokenizer, parse_options, read_files, read_json, reading,
                       refuse_idle, replacing, run_command, write_json)

load_gpt2 = load_pretrained  # the name that it has in chapter 10

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
    if checkpoints(folder):
        raise ValueError(f"{folder} is a run already: python sample.py {folder}")
    out = new_folder(out or Path("runs", Path(folder).resolve().name))
    tokenizer, ids = read_vocabulary(Path(folder))
    return write_run(load_pretrained(folder, ids), tokenizer, out)


# -----------------------------------------------------------------------------
# A run becomes such a folder.


def export_hf(run, out=""):
    """Write config.json, model.safetensors and the tokenizer of a run as transformers reads them ->
    the Path of their folder; ValueError where no family of its models computes the same."""
    with whole_folder(out := Path(out or f"{Path(run)}-hf")) as part:
        model, tokenizer = load_plain(run)
        values = shape_values(model.config)
        ids = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
        write_json(part / "config.json", values | ids | dict(dtype="float32"))
        write_json(part / "generation_config.json", ids | dict(
            eos_token_id=sorted(end_ids(tokenizer)), pad_token_id=tokenizer.eot))
        to_huggingface(tokenizer, part, model_max_length=model.config.block_size)
        tensors = to_names(dict(model.named_parameters()), values["model_type"])
        with replacing(part / "model.safetensors") as file:
            write_safetensors(file, tensors, dict(format="pt"))
    return out


# -----------------------------------------------------------------------------
# The command.

FORMATS = {"huggingface": (to_huggingface, "huggingface"),  # what writes it, and where
           "tiktoken": (to_rank_file, "tokenizer.tiktoken")}
# The words before a folder: what reads it and writes something else, and what can be done then.
FOLDERS = {
    "hf": (export_hf, "vllm serve {0} (or transformers.AutoModelForCausalLM.from_pretrained)"),
    "gguf": (export_gguf, "llama-server -m {}"),
    "onnx": (export_onnx, "onnxruntime.InferenceSession('{}/model.onnx')"),
    "peft": (export_peft, "peft.PeftModel.from_pretrained(base, '{}')"),
    "in": (import_run, "python sample.py {}")}


@dataclass(frozen=True)
class ExportConfig:
    """What is written from what."""
    source: str = option("tokenizer.json", "our tokenizer.json, which is exported; or a Hugging "
                         "Face tokenizer or a .tiktoken file, of which ours is made; or a word: "
                         f"compare, {', '.join(FOLDERS)}", positional=True)
    others: list = option([], "compare: a file of text, then tokenizers of ours or names of "
                          "OpenAI's encodings; in: a model's folder; hf, gguf, onnx, peft: a run",
                          positional=True)
    tokenizer: str = option("tokenizer.json", "compare: the first one")
    format: str = option("huggingface", "of an export", known=lambda: FORMATS)
    pattern: str = option("gpt4", "how a .tiktoken file splits", known=lambda: SPLITS)
    type: str = option("f32", "of the numbers in a gguf file", known=lambda: TYPES)
    out: str = option("", "what to write: a folder, or a file")

    def __post_init__(self):
        check_options(self)
        if bool(self.others) != (self.source in ("compare", *FOLDERS)):
            raise ValueError("export takes one source; compare takes a file of text and "
                             "tokenizers, in the folder of a model, hf, gguf, onnx and peft a run")
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
        idle = ["format", "pattern", "tokenizer"] + ["type"] * (config.source != "gguf")
        refuse_idle(typed, idle, f"with {config.source}")
        make, words = FOLDERS[config.source]
        options = dict(type=config.type) if config.source == "gguf" else {}
        return print("next:", words.format(make(config.others[0], config.out, **options)))
    refuse_idle(typed, ["type"], "without the word gguf")
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
