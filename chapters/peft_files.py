"""
LoRA as the library peft reads it, beside a base model in Hugging Face's layout.

    values, tensors = to_peft(model)  # of adapter_config.json and of adapter_model.safetensors
    export_peft("runs/chat", "folder")

python -m chapters.export peft RUN is the command.
"""

from pathlib import Path

import torch

from chapters.weights import FAMILIES, family_of, rename, whole_folder
from model import LoRALinear, load_model, write_safetensors
from sample import pick_checkpoint
from tokenizer import replacing, write_json


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
    with whole_folder(out := Path(out or f"{Path(run)}-peft")) as part:
        values, tensors = to_peft(load_model(pick_checkpoint(run))[0])
        with replacing(part / "adapter_model.safetensors") as file:
            write_safetensors(file, tensors, dict(format="pt"))
        write_json(part / "adapter_config.json", values)
    return out
