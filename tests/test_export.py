"""What is exported means the same in other libraries, and what comes from them the same here."""

import json
import random
import unicodedata

import jinja2
import jinja2.sandbox
import pytest
import tokenizers
from tiktoken.load import load_tiktoken_bpe
from tokenizers import pre_tokenizers

from chapters import export
from chapters.token_files import (BYTES, CHAT_TEMPLATE, DIGITS, OUR_START, SPLIT, THEIR_START,
                                  from_huggingface, from_rank_file, read_huggingface,
                                  to_huggingface, to_rank_file)
from conftest import mistake
from test_tokenizer import CHAT, COMMON, NASTY, NESTED, gpt2_files, random_kinds, turn
from tokenizer import (GPT2_BYTES, GPT2_SPLIT, GPT4_SPLIT, SPECIAL_TOKENS, SPLITS, Tokenizer,
                       read_json, to_chars, write_json)


LLAMA3_SPLIT = GPT4_SPLIT.replace(OUR_START, THEIR_START)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train([COMMON * 5, *NASTY.values()], 600)


# -----------------------------------------------------------------------------
# Tokenizers.


@pytest.mark.parametrize("seed", range(8))
def test_three_libraries_give_the_same_ids_for_any_text(trained, tmp_path, seed):
    rng = random.Random(seed)
    tokenizer = Tokenizer(trained.merges, NESTED, [*SPLITS.values()][seed % 4])
    to_huggingface(tokenizer, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.save(tmp_path / "t.json")
    again, twin = Tokenizer.load(tmp_path / "t.json"), tokenizer.to_tiktoken()
    for text in [random_kinds(rng, 12) for _ in range(12)]:
        ids, marked = tokenizer.encode(text), tokenizer.encode(text, special=True)
        assert tokenizer.decode(ids) == tokenizer.decode(marked) == text
        assert ids == twin.encode_ordinary(text) == again.encode(text)
        assert marked == theirs.encode(text).ids == again.encode(text, special=True)


@pytest.fixture(scope="module")
def render():
    """What the chat template makes of messages in a sandbox like Hugging Face's, which adds
    raise_exception."""
    def refuse(message):
        raise jinja2.TemplateError(message)
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = sandbox.from_string(CHAT_TEMPLATE)
    return lambda messages, prompt=False: template.render(
        messages=messages, add_generation_prompt=prompt, raise_exception=refuse)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_the_chat_template_renders_what_render_chat_does(trained, tmp_path, render, n):
    to_huggingface(trained, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert config["chat_template"] == CHAT_TEMPLATE
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    shown = render(CHAT[:n], n < 5)
    assert theirs.encode(shown).ids == (
        trained.render_prompt(CHAT[:n]) if n < 5 else trained.render_chat(CHAT)[0])


@pytest.mark.parametrize("messages, problem", [
    ([turn("user", "a<|end|>b")], "a text must not contain <.end.>"),
    ([turn("assistant")], "must be system or user"), ([turn("developer")], "system or user"),
    ([turn("user"), turn("system")], "must be user or assistant or tool"),
])
def test_the_chat_template_refuses_what_render_chat_does_or_what_would_be_a_token(
        render, messages, problem):
    with pytest.raises(jinja2.TemplateError, match=problem):
        render(messages)


@pytest.mark.parametrize("special", [[], SPECIAL_TOKENS, {"<|x|>": 9000, "<|x|>y": 70000}])
@pytest.mark.parametrize("pattern", SPLITS.values(), ids=SPLITS)
def test_in_hugging_faces_library_the_ids_are_equal(trained, tmp_path, special, pattern):
    tokenizer = Tokenizer(trained.merges, special, pattern, GPT2_BYTES)
    to_huggingface(tokenizer, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*NASTY.values(), COMMON, "<|x|>y<|x|> <|x<|x|>|>", *map(str, special)]:
        ids = tokenizer.encode(text, special=True)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert from_huggingface(tmp_path).definition() == tokenizer.definition()


def test_a_tokenizer_of_gpt2s_kind_is_read_from_hugging_faces_file(trained, tmp_path):
    vocab, merges = map(str, gpt2_files(tmp_path, trained.merges))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<|endoftext|>", "<|new|>"])
    theirs.save(str(tmp_path / "theirs.json"))
    tokenizer = from_huggingface(tmp_path / "theirs.json")
    assert tokenizer.definition()["merges"] == Tokenizer(trained.merges).definition()["merges"]
    for text in [COMMON, NASTY["scripts"], "a<|new|>b<|endoftext|>"]:
        assert tokenizer.encode(text, special=True) == theirs.encode(text).ids


@pytest.mark.parametrize("name, value", [
    ("normalizer", {"type": "NFKC"}), ("model", {"type": "WordPiece"}), ("model", None),
    ("pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer", None), ("added_tokens", [{}]),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
    ("pre_tokenizer", {"pretokenizers": [DIGITS | {"individual_digits": False},
                                         BYTES | {"use_regex": True}]}),
    ("pre_tokenizer", {"pretokenizers": [DIGITS, BYTES | {"use_regex": False}]}),
    ("pre_tokenizer", {"pretokenizers": [SPLIT | {"pattern": {"Regex": "a"}, "invert": True},
                                         BYTES | {"use_regex": False}]}),
    ("pre_tokenizer", {"pretokenizers": [SPLIT | {"pattern": {"Regex": "a"}}] * 2
                       + [BYTES | {"use_regex": False}]}),
])
def test_what_hugging_face_can_do_and_we_cannot_is_refused(trained, tmp_path, name, value):
    to_huggingface(trained, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        from_huggingface(path)


@pytest.mark.parametrize("name, value", [
    ("byte_fallback", True), ("dropout", 0.1), ("end_of_word_suffix", "</w>"),
    ("continuing_subword_prefix", "##")])
def test_an_option_of_bpe_that_changes_ids_is_named(trained, tmp_path, name, value):
    to_huggingface(trained, tmp_path)
    state = read_json(tmp_path / "tokenizer.json")
    state["model"] |= {name: value}
    state |= dict(pre_tokenizer=None, normalizer=dict(type="Prepend"))  # as where these stand
    write_json(tmp_path / "tokenizer.json", state)
    with pytest.raises(ValueError, match=f"cannot be read: it has .'{name}': {value!r}. where"):
        from_huggingface(tmp_path)


def write_theirs(path, names, pairs, steps, special, normalizer=None, **options):
    """Write a tokenizer.json by their library -> what it is read as there."""
    vocab = {name: id for id, name in enumerate(names)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, **options))
    theirs.normalizer = normalizer
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    theirs.add_special_tokens(special)
    theirs.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


def own_pairs(trained):
    """-> (the tokens by their ids, as GPT-2's characters; the merges, as pairs of them)."""
    return ([to_chars(trained.tokens[id]) for id in range(256 + len(trained.merges))],
            [tuple(map(to_chars, pair)) for pair in trained.merges])


def split_steps(pattern):
    return [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False)]


def qwen(trained, path):
    """As Qwen's: a pattern of its own, NFC."""
    return write_theirs(path, *own_pairs(trained), split_steps(QWEN_SPLIT),
                        ["<|endoftext|>", "<|im_start|>", "<think>"], tokenizers.normalizers.NFC())


def llama3(trained, path):
    """As Llama 3's: all pairs that make a token, in the order of these."""
    names, _ = own_pairs(trained)
    rank = {name: id for id, name in enumerate(names)}
    pairs = [pair for name in names[256:] for pair in sorted(
        ((name[:i], name[i:]) for i in range(1, len(name)) if {name[:i], name[i:]} <= rank.keys()),
        key=lambda pair: [*map(rank.get, pair)])]
    assert len(pairs) > len(trained.merges)
    return write_theirs(path, names, pairs, split_steps(LLAMA3_SPLIT),
                        ["<|begin_of_text|>", "<|end_of_text|>"], ignore_merges=True)


def smollm(trained, path):
    """As SmolLM's: digits apart, special tokens first."""
    names, pairs = own_pairs(trained)
    special = ["<|endoftext|>", "<|im_start|>"]
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    return write_theirs(path, special + names, pairs, steps, special)


@pytest.mark.parametrize("write", [qwen, llama3, smollm])
def test_the_tokenizers_of_three_families_give_the_ids_of_hugging_faces(trained, tmp_path, write):
    trained = Tokenizer(trained.merges, [], byte_order=GPT2_BYTES)
    theirs = write(trained, tmp_path / "tokenizer.json")
    tokenizer, ids = read_huggingface(tmp_path)
    rng = random.Random(0)
    texts = [COMMON, "1a 23  4\t5 IT'S 'LL it'ſ", "<|endoftext|><think>", *NASTY.values()]
    for text in texts + [random_kinds(rng, 12) for _ in range(50)]:
        text = unicodedata.normalize("NFC", text)
        found = tokenizer.encode(text, special=True)
        assert [ids[id] for id in found] == theirs.encode(text).ids
    assert (tokenizer.pattern == GPT4_SPLIT) == (write is llama3)


@pytest.mark.slow
def test_these_files_are_those_of_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter
    trained = Tokenizer(trained.merges, [], byte_order=GPT2_BYTES)
    names, pairs = own_pairs(trained)
    to_rank_file(trained, tmp_path / "ranks")
    vocab = {name: id for id, name in enumerate(names)}
    for write, theirs in ((llama3, TikTokenConverter(str(tmp_path / "ranks")).converted()),
                          (qwen, transformers.Qwen2Tokenizer(vocab, pairs)._tokenizer)):
        write(trained, tmp_path / "tokenizer.json")
        ours, state = read_json(tmp_path / "tokenizer.json"), json.loads(theirs.to_str())
        empty = dict(continuing_subword_prefix=None, end_of_word_suffix=None)  # or ""
        assert ours["model"] | empty == state["model"] | empty
        for part in "normalizer", "pre_tokenizer":
            assert ours[part] == state[part]


def test_a_tokenizer_whose_ids_are_in_another_order_comes_only_with_its_model(trained, tmp_path):
    smollm(trained, tmp_path / "tokenizer.json")
    tokenizer, ids = read_huggingface(tmp_path)
    assert ids == [*range(2, 2 + len(ids) - 2), 0, 1] and tokenizer.eot == len(ids) - 2
    with pytest.raises(ValueError, match="`export in` imports it with its model"):
        from_huggingface(tmp_path)


def test_old_files_do_not_say_that_gpt2s_pattern_splits(trained, tmp_path):
    to_huggingface(trained, tmp_path)
    state = read_json(tmp_path / "tokenizer.json") | dict(pre_tokenizer=BYTES)
    write_json(tmp_path / "tokenizer.json", state)
    assert from_huggingface(tmp_path).pattern == GPT2_SPLIT


def test_a_token_that_its_merges_do_not_make_is_refused_where_it_is_found_whole(tmp_path):
    names, pairs = own_pairs(Tokenizer([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], [],
                                       byte_order=GPT2_BYTES))  # "abc" merges to a, bc
    steps = split_steps(GPT2_SPLIT)
    theirs = write_theirs(tmp_path / "tokenizer.json", names, pairs, steps, [], ignore_merges=True)
    assert theirs.encode("abc").ids == [258]
    with pytest.raises(ValueError, match="not in the order of the tokens"):
        read_huggingface(tmp_path)
    theirs = write_theirs(tmp_path / "tokenizer.json", names, pairs, steps, [])
    assert theirs.encode("abc").ids == read_huggingface(tmp_path)[0].encode("abc")


def test_merges_that_do_not_say_what_merges_first_are_refused(trained, tmp_path):
    llama3(Tokenizer(trained.merges, [], byte_order=GPT2_BYTES), tmp_path / "tokenizer.json")
    state = read_json(tmp_path / "tokenizer.json")
    pairs = state["model"]["merges"]
    for wrong in pairs[::-1], pairs[1:]:
        write_json(tmp_path / "tokenizer.json", state | dict(model=state["model"] | dict(
            merges=wrong)))
        with pytest.raises(ValueError, match="not in the order of the tokens that they make"):
            from_huggingface(tmp_path)


def test_an_export_overwrites_no_tokenizer_of_ours_and_tells_all_tokens_apart(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="give another folder"):
        to_huggingface(trained, tmp_path)
    with pytest.raises(ValueError, match="special token 'e' reads like token 101"):
        to_huggingface(Tokenizer(trained.merges, ["e"]), tmp_path / "new")


@pytest.mark.parametrize("special", [SPECIAL_TOKENS, {"<|x|>": 9000}])
def test_a_rank_file_holds_the_tokens_as_tiktoken_reads_them(trained, tmp_path, special):
    tokenizer = Tokenizer(trained.merges, special, GPT2_SPLIT, GPT2_BYTES)
    to_rank_file(tokenizer, tmp_path / "t.tiktoken")
    ranks = load_tiktoken_bpe(str(tmp_path / "t.tiktoken"))
    assert ranks == tokenizer.to_tiktoken()._mergeable_ranks
    again = from_rank_file(tmp_path / "t.tiktoken", special, GPT2_SPLIT)
    assert again.definition() == tokenizer.definition()


@pytest.mark.parametrize("wrong, problem", [
    (lambda lines: lines[1:], "the first 256 ids must be the 256 bytes"),
    (lambda lines: lines[:300] + lines[301:], "id 300 is no merge, but 301 is one"),
    (lambda lines: lines[:300] + [b"emVicmE= 300"], "token 300 is not the merge of two before it"),
    (lambda lines: lines + [b"YQ 700"], "line 595 must be a token in base64"),
    (lambda lines: lines + [b"YWE= x"], "line 595 must be a token in base64"),
    (lambda lines: lines + [b"\xff"], "line 595 must be a token in base64"),
    (lambda lines: [], "the first 256 ids must be the 256 bytes"),
])
def test_a_rank_file_that_is_damaged_is_refused(trained, tmp_path, wrong, problem):
    to_rank_file(trained, tmp_path / "t.tiktoken")
    lines = (tmp_path / "t.tiktoken").read_bytes().splitlines()
    (tmp_path / "t.tiktoken").write_bytes(b"\n".join(wrong(lines)))
    with pytest.raises(ValueError, match=problem):
        from_rank_file(tmp_path / "t.tiktoken")


def test_the_command_exports_and_comes_back(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained.save("tokenizer.json")
    for words in (["--out=theirs"], ["--format=tiktoken", "--out=t.tiktoken"]):
        assert "600 tokens in" in call(export, *words)[0]
    for source in "theirs", "theirs/tokenizer.json", "t.tiktoken":
        out, err = call(export, source, "--out=again.json")
        assert err == "" and Tokenizer.load("again.json").hash() == trained.hash()
        (tmp_path / "again.json").unlink()


def test_compare_shows_a_line_for_each_tokenizer(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(COMMON * 40)
    trained.save(tmp_path / "tokenizer.json")
    Tokenizer(trained.merges[:9]).save(tmp_path / "few.json")
    out, _ = call(export, "compare", "text.txt", "few.json", "cl100k", "o200k_base")
    header, ours, few, wrong, openai = out.splitlines()
    n = len(trained.encode(COMMON * 40))
    assert ours.split()[1:3] == [str(trained.n_vocab), f"{n:,}"] and few.split()[1] == "271"
    assert "not loaded: [Errno 2] No such file" in wrong and openai.startswith("o200k_base ")


@pytest.mark.parametrize("words, problem", [
    (["missing"], "No such file or directory: missing"), (["text"], "text cannot be read"),
    (["--format=onnx"], "unknown format 'onnx'"),
    (["theirs", "--out=tokenizer.json"], "tokenizer.json is there already"),
    (["--out=."], "give another folder"), (["compare", "empty"], "empty is empty"),
    (["compare", "text", "--out=x"], "--out would not act with compare: leave it out"),
    (["theirs", "--format=tiktoken", "--out=x"], "--format would not act on theirs: leave it out"),
    (["--tokenizer=x.json"], "--tokenizer would not act on tokenizer.json"),
    (["--pattern=gpt2"], "--pattern would not act without .tiktoken"),
    (["compare"], "compare takes a file of text"), (["theirs", "text"], "export takes one source"),
    (["in"], "in the folder of a model"),
    (["in", "theirs", "text"], "in takes one folder, not theirs text"),
    (["peft"], "gguf, onnx and peft a run"), (["peft", "a", "b"], "peft takes one folder, not a b"),
    (["peft", "theirs", "--pattern=gpt2"], "--pattern would not act with peft: leave it out"),
    (["peft", "theirs"], "there is no run folder theirs with a checkpoint"),
    (["peft", "theirs", "--out=theirs"], "theirs is there already: give another --out"),
    (["in", "theirs", "--format=tiktoken"], "--format would not act with in: leave it out"),
    (["in", "theirs"], "No such file or directory: theirs/config.json"),
])
def test_a_mistake_is_one_line(trained, tmp_path, monkeypatch, capsys, words, problem):
    monkeypatch.chdir(tmp_path)
    trained.save("tokenizer.json")
    to_huggingface(trained, "theirs")
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_text("")
    code, lines = mistake(export.main, monkeypatch, capsys, *words)
    assert code == 1 and len(lines) == 1 and problem in lines[0]
