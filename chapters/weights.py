"""
Weights as Hugging Face has them: models of GPT-2, Llama, Qwen3 and Mistral, in and out.

    model = load_pretrained("gpt2")  # a folder with config.json and safetensors files -> a GPT
    values = shape_values(model.config)                       # what config.json says of it
    tensors = to_names(dict(model.named_parameters()), "gpt2")     # what model.safetensors has

python -m chapters.export has commands for both.
"""

import shutil
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from model import (Block, GPTConfig, check_known, from_weights, merge, read_safetensors,
                   save_model)
from sample import load_run
from tokenizer import read_json, reading, replacing

# What a family of models is here: options of GPTConfig, its other options by the names that they
# have in config.json, and the parts of our parameters' names that are called otherwise there.
Family = namedtuple("Family", "options fields names")
GPT2 = Family(
    dict(architecture="gpt2"),
    dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
         n_embd="n_embd", n_hidden="n_inner", norm_eps="layer_norm_epsilon",
         tied="tie_word_embeddings"),
    {"blocks": "h", "attn_norm": "ln_1", "attn.o_proj": "attn.c_proj", "mlp_norm": "ln_2",
     "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj", "final_norm": "ln_f"})
LLAMA = Family(
    dict(architecture="modern", qk_norm=False),
    dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
         n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
         head_dim="head_dim", n_hidden="intermediate_size", norm_eps="rms_norm_eps",
         rope_theta="rope_theta", tied="tie_word_embeddings"),
    {"transformer": "model", "wte": "embed_tokens", "blocks": "layers", "attn": "self_attn",
     "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "final_norm": "norm"})
FAMILIES = {"gpt2": GPT2, "llama": LLAMA,
            "qwen3": LLAMA._replace(options=dict(architecture="modern", qk_norm=True)),
            "mistral": LLAMA._replace(fields=LLAMA.fields | dict(window="sliding_window"))}
# Where config.json leaves these out, transformers takes what GPTConfig does, or weights of other
# shapes, which are refused.
OPTIONAL = ("n_inner", "layer_norm_epsilon", "num_key_value_heads", "head_dim", "rms_norm_eps",
            "rope_theta", "tie_word_embeddings")
# Fields that change what a model computes, and their only values that are known here.
KNOWN = dict(
    activation_function=["gelu_new", "gelu_pytorch_tanh"], scale_attn_weights=[True],
    scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False],
    hidden_act=["silu", "swish"], attention_bias=[False], mlp_bias=[False],
    use_sliding_window=[False], layer_types=["full_attention"], quantization_config=["none"],
    rope_type=["default"], type=["default"], partial_rotary_factor=[1.0],
    full_attention=["one rope for all layers"])
# Old files hold these beside the weights; they follow from config.json.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# Options of a GPTConfig that a family has or has not.
STRUCTURE = ("position", "norm", "norm_first", "activation", "bias", "qk_norm", "causal", "cross",
             "window", "softcap", "n_classes", "n_kv_head", "head_size")

# -----------------------------------------------------------------------------
# The shape of a model: config.json.


def read_shape(folder):
    """-> (the name of its family, the GPTConfig) of a folder's config.json; ValueError for a field
    that asks for what no option of ours does. Those that transformers does not read are ignored."""
    path = Path(folder, "config.json")
    values = read_json(path)
    with reading(path):
        name = values.get("model_type", "gpt2")  # the oldest files lack it
        check_known(name, FAMILIES, "model_type")
        values |= (values.get("rope_parameters") or {}) | (values.get("rope_scaling") or {})
        for field, known in KNOWN.items():
            found = values.get(field)
            for value in found if isinstance(found, list) else [found]:
                if value not in (None, *known):
                    raise ValueError(f"{field}={value!r:.60}: only {' or '.join(map(str, known))} "
                                     "is known here")
        fields = FAMILIES[name].fields
        if lost := [n for n in fields.values() if n not in values and n not in OPTIONAL]:
            raise ValueError(f"it lacks {', '.join(lost)}")
        own = {ours: values[theirs] for ours, theirs in fields.items()
               if values.get(theirs) is not None}
        own.setdefault("n_kv_head", own.get("n_head"))
        return name, GPTConfig(**FAMILIES[name].options | own)


def family_of(config):
    """The name of the family in whose layout a model of ours can be written; ValueError that names
    the options which have no place in it."""
    name = ("gpt2" if config.position == "learned" else "mistral" if config.window else
            "qwen3" if config.qk_norm else "llama")
    own = {ours: getattr(config, ours) for ours in FAMILIES[name].fields}
    like = GPTConfig(**FAMILIES[name].options | own)
    if wrong := [f"{n}={getattr(config, n)}" for n in STRUCTURE
                 if getattr(config, n) != getattr(like, n)]:
        raise ValueError(f"no {name} model of transformers has {', '.join(wrong)}")
    return name


def explicit(config):
    """The GPTConfig with a number for each option that 0 stands for."""
    with torch.device("meta"):
        block = Block(config)
    return replace(config, head_dim=config.head_size, norm_eps=block.mlp_norm.eps,
                   n_hidden=len(block.mlp.up_proj.weight))


def shape_values(config):
    """The values of config.json for a model of this shape; ValueError as for family_of."""
    name, config = family_of(config), explicit(config)
    values = {theirs: getattr(config, ours) for ours, theirs in FAMILIES[name].fields.items()}
    if name == "gpt2":  # llama.cpp reads n_ctx
        return values | dict(model_type=name, architectures=["GPT2LMHeadModel"],
                             activation_function="gelu_new", n_ctx=config.block_size)
    rope = dict(rope_type="default", rope_theta=config.rope_theta)
    return values | dict(model_type=name, architectures=[f"{name.title()}ForCausalLM"],
                         hidden_act="silu", rope_parameters=rope)  # older versions: rope_theta


# -----------------------------------------------------------------------------
# Weights: files, names, layouts.


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


def rename(name, parts):
    """A name with {old: new} parts: rename("wte.weight", {"wte": "embed"}) == "embed.weight"."""
    name = f".{name}."
    for old, new in parts.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name[1:-1]


def is_matrix(name):
    """Whether GPT-2's files keep a weight transposed, by our name: a Conv1D does, (C, F)."""
    return name.endswith(("_proj.weight", ".c_attn.weight"))


def to_names(weights, family):
    """{our name: tensor} of a model -> {the name in a family's layout: tensor}."""
    found = {}
    for name, w in weights.items():
        w = w.mT if family == "gpt2" and is_matrix(name) else w
        found[rename(name, FAMILIES[family].names)] = w
    for name in [name for name in found if family == "gpt2" and ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        found[name.replace("q_proj", "c_attn")] = torch.cat(parts, dim=-1)
    return found


def from_names(found, family):
    """The way back: {a family's name: tensor of any dtype} -> {our name: float32 tensor}."""
    weights, parts = {}, {theirs: ours for ours, theirs in FAMILIES[family].names.items()}
    for name, w in found.items():
        if name.endswith(BUFFERS):
            continue
        if family == "gpt2" and name != "lm_head.weight":
            name = "transformer." + name.removeprefix("transformer.")  # old files have no prefix
        name = rename(name, parts)
        w = w.mT if family == "gpt2" and is_matrix(name) else w
        letters = "qkv" if ".c_attn." in name else "q"
        weights |= {name.replace("c_attn", f"{x}_proj"): part.float().contiguous()
                    for x, part in zip(letters, w.chunk(len(letters)))}
    return weights


def load_pretrained(folder, ids=None):
    """The GPT in a folder with Hugging Face's config.json and safetensors files of one of FAMILIES.
    ids: the rows of the embedding that are taken, in the order of our token ids; else all."""
    family, config = read_shape(folder)
    found = {n: w for path in weight_files(Path(folder)) for n, w in read_safetensors(path).items()}
    with reading(folder):
        weights = from_names(found, family)
        if config.tied:
            weights.pop("lm_head.weight", None)  # a copy
        if ids is not None:
            config = replace(config, vocab_size=len(ids))
            for name in {"transformer.wte.weight", "lm_head.weight"} & weights.keys():
                weights[name] = weights[name][ids]
        return from_weights(config, weights, folder)


# -----------------------------------------------------------------------------
# Folders that are written whole or not at all.


def new_folder(out):
    """The Path of a folder to write; ValueError unless it is new or empty."""
    if (out := Path(out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give another --out")
    return out


@contextmanager
def whole_folder(out):
    """Yield a hidden folder to write, which becomes `out`, a new or empty one, when it is whole."""
    out = new_folder(out)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_run(model, tokenizer, out):
    """Write a run of one checkpoint at `out`, which is new or empty -> its Path."""
    with whole_folder(out) as part:
        tokenizer.save(part / "tokenizer.json")
        with replacing(part / "step_000000.safetensors") as file:
            save_model(model, file, step=0)
    return Path(out)


def load_plain(run):
    """-> (model, tokenizer) of a run, what was tuned merged into the weights; ValueError where that
    cannot be, or where it does not write text."""
    model, tokenizer = load_run(run, dtype=torch.float32)
    c = merge(model).config
    if c.cross or not c.causal or c.n_classes:
        raise ValueError(f"{run} has architecture={c.architecture} and n_classes={c.n_classes}: "
                         "only a model that writes text will do")
    return model, tokenizer
