"""
Weights as Hugging Face has them: models of GPT-2, Llama, Qwen3 and Mistral in, LoRA out.

    model = load_pretrained("gpt2")      # a folder with config.json and safetensors files -> a GPT
    values, tensors = to_peft(model)     # of a model tuned with lora, what the library peft reads

python -m chapters.export has commands for both.
"""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import torch

from model import (GPTConfig, LoRALinear, check_known, from_weights, load_model, read_safetensors,
                   save_model, write_safetensors)
from sample import pick_checkpoint
from tokenizer import read_json, reading, replacing, write_json

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


def new_folder(out):
    """The Path of a folder to write; ValueError unless it is new or empty."""
    if (out := Path(out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give another --out")
    return out


def write_run(model, tokenizer, out):
    """Write a run of one checkpoint at `out`, which is new or empty -> its Path."""
    part = out.with_name(f".{out.name}.part")  # it gets its name when it is whole
    part.mkdir(parents=True, exist_ok=True)
    tokenizer.save(part / "tokenizer.json")
    with replacing(part / "step_000000.safetensors") as file:
        save_model(model, file, step=0)
    if out.exists():
        out.rmdir()
    return part.rename(out)


# -----------------------------------------------------------------------------
# LoRA as the library peft reads it.


def fuse_lora(layers):
    """{name: (A, B)} with q, k and v as GPT-2 has them, in one layer: A (3r, C) are theirs below
    each other, B (3C, 3r) has theirs as blocks on its diagonal; of fewer trained ones less than 3r.
    """
    fused = {name: pair for name, pair in layers.items() if name[-6:-4] not in ("q_", "k_", "v_")}
    for name in {name[:-6] for name in layers.keys() - fused.keys()}:
        pairs = {x: layers[f"{name}{x}_proj"] for x in "qkv" if f"{name}{x}_proj" in layers}
        rows, = {len(B) for _, B in pairs.values()}
        blocks = [pairs[x][1] if x in pairs else torch.zeros(rows, 0) for x in "qkv"]
        A = torch.cat([A for A, _ in pairs.values()])
        fused[f"{name}c_attn"] = A, torch.block_diag(*blocks)
    return fused


def to_peft(model):
    """-> (the values of adapter_config.json, {name: tensor} of adapter_model.safetensors) of a
    model tuned with lora, for its base in the layout of its family."""
    tuning, family = model.tuning, family_of(model.config)
    found = {n: layer for n, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if not found:
        raise ValueError("a model trained with --tune=lora can be exported to peft, and this was "
                         f"trained with --tune={tuning.tune if tuning else 'full'}")
    layers = {name: (layer.lora_A, layer.lora_B) for name, layer in found.items()}
    layers = fuse_lora(layers) if family == "gpt2" else layers
    layers = {rename(name, FAMILIES[family].names): pair for name, pair in layers.items()}
    scale, = {layer.scale for layer in found.values()}
    own_rank = {name.split(".")[-1]: len(A) for name, (A, _) in layers.items()
                if len(A) != tuning.rank}  # alpha grows with it, so that alpha / rank is the same
    words = 2 if family == "gpt2" else 1  # its c_proj is one of attn or of mlp
    values = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=None, inference_mode=True,
        bias="none", r=tuning.rank, lora_alpha=scale * tuning.rank,
        lora_dropout=tuning.lora_dropout, fan_in_fan_out=family == "gpt2", rank_pattern=own_rank,
        alpha_pattern={name: scale * rank for name, rank in own_rank.items()},
        target_modules=sorted({".".join(name.split(".")[-words:]) for name in layers}))
    tensors = {f"base_model.model.{name}.lora_{x}.weight": w
               for name, pair in layers.items() for x, w in zip("AB", pair)}
    return values, tensors


def export_peft(run, out=""):
    """Write adapter_config.json and adapter_model.safetensors of a run with LoRA -> their Path."""
    out, (model, _) = new_folder(out or f"{run}-peft"), load_model(pick_checkpoint(run))
    values, tensors = to_peft(model)
    with replacing(out / "adapter_model.safetensors") as file:
        write_safetensors(file, tensors, dict(format="pt"))
    write_json(out / "adapter_config.json", values)
    return out
