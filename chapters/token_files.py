"""
Tokenizers in the files of other libraries: Hugging Face's tokenizer.json and tiktoken's ranks.

    to_huggingface(tokenizer, "folder")           # tokenizer.json, tokenizer_config.json
    from_huggingface("folder") == tokenizer
    to_rank_file(tokenizer, "ours.tiktoken")

python -m chapters.export has commands for them.
"""

import base64
from pathlib import Path

from tokenizer import (CHAR_TO_BYTE, FORMAT, GPT2_SPLIT, GPT4_SPLIT, SPECIAL_TOKENS, SPLITS,
                       Tokenizer, read_json, reading, recover_merges, replacing, to_bytes, to_chars,
                       write_json)

# A chat in Jinja, as Tokenizer.render_chat encodes it, with the same roles in the same places. In
# Hugging Face's libraries a special token in a message would become its id, so it is refused.
CHAT_TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{% set roles = ['system', 'user'] if loop.first else ['user', 'assistant', 'tool'] %}"
    "{% if message['role'] not in roles %}"
    "{{ raise_exception('the role of a message here must be ' + roles | join(' or ')) }}{% endif %}"
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
CHANGES_IDS = "byte_fallback continuing_subword_prefix end_of_word_suffix dropout".split()

# -----------------------------------------------------------------------------
# Tokenizers in Hugging Face's tokenizer.json.


def token_texts(tokenizer):
    """{what stands for a token in the files of other libraries: its id}; ValueError where the same
    stands for two."""
    vocab = {to_chars(tokenizer.tokens[id]): id for id in range(256 + len(tokenizer.merges))}
    for name, id in tokenizer.special.items():
        if vocab.setdefault(name, id) != id:
            raise ValueError(f"special token {name!r} reads like token {vocab[name]}: rename it")
    return vocab


def chat_template(tokenizer):
    """CHAT_TEMPLATE, or None where the tokenizer has no tokens for chats."""
    return CHAT_TEMPLATE if {*SPECIAL_TOKENS} <= {*tokenizer.special} else None


def to_huggingface(tokenizer, folder, **settings):
    """Write tokenizer.json and tokenizer_config.json, with further settings in that, for Hugging
    Face's libraries, which give the ids of encode(special=True); a pattern of none of SPLITS must
    mean the same in Ruby's syntax."""
    path = Path(folder, "tokenizer.json")
    if path.exists() and FORMAT in path.read_text(encoding="utf-8", errors="replace")[:99]:
        raise ValueError(f"{path} is a tokenizer of this program; give another folder")
    merges = tokenizer.definition()["merges"]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=id, content=name, **flags) for name, id in tokenizer.special.items()]
    steps = [dict(SPLIT, pattern={"Regex": tokenizer.pattern}), dict(BYTES, use_regex=False)]
    write_json(path, dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=steps), post_processor=None,
        decoder=dict(BYTES, use_regex=True),
        model=dict(type="BPE", vocab=token_texts(tokenizer), merges=merges)))
    eot = None if tokenizer.eot is None else "<|endoftext|>"
    write_json(path.with_name("tokenizer_config.json"), settings | dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=eot, eos_token=eot, pad_token=eot,
        clean_up_tokenization_spaces=False, chat_template=chat_template(tokenizer)))


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
