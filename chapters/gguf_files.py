"""
A run as one GGUF file, which llama.cpp and the programs built on it read: weights, shape, tokenizer
and chat template. The format: github.com/ggml-org/ggml, docs/gguf.md

    export_gguf("runs/chat", "chat.gguf", "q8_0")
    tensors = to_gguf(model, "qwen3")             # {llama.cpp's name: tensor}

python -m chapters.export gguf RUN is the command.
"""

from pathlib import Path

try:
    import gguf
except ImportError:  # it is optional
    gguf = None

from chapters.token_files import (DIGITS_SPLIT, OUR_START, THEIR_START, chat_template,
                                  token_texts)
from chapters.weights import explicit, family_of, load_plain, to_names
from tokenizer import GPT2_SPLIT, GPT4_SPLIT, apply_merges, replacing

# How numbers are stored. In q8_0 each 32 of a row are int8 and share a scale in float16.
TYPES = ("f32", "f16", "bf16", "q8_0")
# The names by which llama.cpp knows split patterns: ours, and those of models that are imported.
PATTERNS = {
    GPT2_SPLIT: "gpt-2", GPT4_SPLIT: "llama-bpe", DIGITS_SPLIT: "smollm",
    GPT4_SPLIT.replace(OUR_START, THEIR_START).replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def pattern_name(tokenizer):
    """llama.cpp's name of how the tokenizer splits; ValueError for a pattern that it lacks."""
    if tokenizer.pattern not in PATTERNS:
        raise ValueError(f"llama.cpp lacks the split pattern {tokenizer.pattern!r:.60} and would "
                         "make other ids: `export hf` takes any pattern")
    name = PATTERNS[tokenizer.pattern]
    # llama-bpe takes a chunk that is a token whole, before any merge; dbrx has the same pattern
    whole = all(apply_merges(token.translate(tokenizer.byte_ids), tokenizer.merged) == [id]
                for id, token in tokenizer.tokens.items() if id < 256 + len(tokenizer.merges))
    return "dbrx" if name == "llama-bpe" and not whole else name


def interleave(w, D):
    """The rows of w (H * D, C) with channels j and j + D/2 of a head, which rotate together, next
    to each other: so llama.cpp rotates the models that it calls llama."""
    return w.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2)


def to_gguf(model, family):
    """{llama.cpp's name: tensor} of a model of one of the families gpt2, llama and qwen3."""
    names, tensors = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[family.upper()], model.config.n_layer), {}
    for name, w in to_names(dict(model.named_parameters()), family).items():
        if family == "gpt2" and ".h." in name and w.ndim == 2:
            w = w.mT  # which GPT-2's files alone keep transposed
        elif family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = interleave(w, model.config.head_size)
        tensors[names.get_name(name, (".weight", ".bias"))] = w.detach()
    return tensors


def stored_type(name, w, type):
    """The type of a tensor in a file of one of TYPES, as in llama.cpp's own: vectors and positions
    stay in float32, and rows that 32 does not divide in float16."""
    if w.ndim == 1 or name == "position_embd.weight":
        type = "f32"
    elif type == "q8_0" and w.size(1) % 32:
        type = "f16"
    return gguf.GGMLQuantizationType[type.upper()]


def add_shape(writer, config, family):
    """The keys of the model's shape."""
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    if family == "gpt2":
        return writer.add_layer_norm_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def add_tokenizer(writer, tokenizer):
    """The keys of the tokenizer, with which llama.cpp makes the same ids."""
    texts, kinds = {id: text for text, id in token_texts(tokenizer).items()}, gguf.TokenType
    ids = range(tokenizer.n_vocab)
    special = {*tokenizer.special.values()}
    writer.add_tokenizer_model("gpt2")  # byte-level BPE, whatever the model
    writer.add_tokenizer_pre(pattern_name(tokenizer))
    writer.add_token_list([texts.get(id, f"[no token {id}]") for id in ids])
    writer.add_token_types([kinds.CONTROL if id in special else kinds.NORMAL if id in texts else
                            kinds.UNUSED for id in ids])
    writer.add_token_merges(tokenizer.definition()["merges"])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)  # nor does sample.py begin a prompt with it
    if template := chat_template(tokenizer):
        writer.add_eot_token_id(tokenizer.special["<|end|>"])  # ends an answer
        writer.add_chat_template(template)


def export_gguf(run, out="", type="f32"):
    """Write the model and tokenizer of a run as a GGUF file with numbers of one of TYPES -> its
    Path; ValueError where llama.cpp would compute something else."""
    if gguf is None:
        raise ValueError("a gguf file is written by the package gguf: pip install gguf")
    if (out := Path(out or f"{Path(run)}.gguf")).exists():
        raise ValueError(f"{out} is there already: give another --out")
    model, tokenizer = load_plain(run)
    if (family := family_of(model.config)) == "mistral":
        raise ValueError(f"no llama model of llama.cpp has window={model.config.window}")
    with replacing(out) as file:
        writer = gguf.GGUFWriter(file.name, family)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(run).resolve().name)
        share = "ALL" if type == "f32" else "MOSTLY"
        writer.add_file_type(gguf.LlamaFileType[f"{share}_{type.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, explicit(model.config), family)
        add_tokenizer(writer, tokenizer)
        for name, w in to_gguf(model, family).items():
            kind = stored_type(name, w, type)
            writer.add_tensor(name, gguf.quants.quantize(w.contiguous().numpy(), kind),
                              raw_dtype=kind)
        writer.write_header_to_file()  # it opens the file by its name once more
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out
