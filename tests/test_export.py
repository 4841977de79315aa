"""What is exported means the same in other libraries, and what comes from them the same here."""

import json
import os
import random
import subprocess
import sys

import jinja2
import jinja2.sandbox
import nbformat
import pytest
import tokenizers
import torch
from tiktoken.load import load_tiktoken_bpe
from torch import nn

from chapters import export
from chapters.export import (CHAT_TEMPLATE, GPT2_NAMES, from_huggingface, from_rank_file,
                             load_gpt2, to_huggingface, to_rank_file)
from conftest import ROOT, mistake, tiny
from model import read_safetensors, write_safetensors
from sample import load_run
from test_tokenizer import CHAT, COMMON, NASTY, NESTED, gpt2_files, random_kinds, turn
from tokenizer import (GPT2_BYTES, GPT2_SPLIT, SPECIAL_TOKENS, SPLITS, Tokenizer, read_json,
                       write_json)


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


@pytest.mark.parametrize("n", [2, 5])
def test_the_template_of_hugging_face_renders_the_same(trained, tmp_path, n):
    to_huggingface(trained, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert config["chat_template"] == CHAT_TEMPLATE
    render = jinja2.sandbox.SandboxedEnvironment().from_string(CHAT_TEMPLATE).render
    shown = render(messages=CHAT[:n], add_generation_prompt=n == 2)
    ids = trained.render_prompt(CHAT[:n]) if n == 2 else trained.render_chat(CHAT)[0]
    assert shown == trained.decode(ids)
    with pytest.raises(jinja2.UndefinedError, match="raise_exception"):
        render(messages=[turn("user", "a<|end|>b")])


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
    ("normalizer", {"type": "NFC"}), ("model", {"type": "WordPiece"}), ("model", None),
    ("pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer", None), ("added_tokens", [{}]),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
])
def test_what_hugging_face_can_do_and_we_cannot_is_refused(trained, tmp_path, name, value):
    to_huggingface(trained, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        from_huggingface(path)


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
    for words in (["--out=hf"], ["--format=tiktoken", "--out=t.tiktoken"]):
        assert "600 tokens in" in call(export, *words)[0]
    for source in "hf", "hf/tokenizer.json", "t.tiktoken":
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
    (["hf", "--out=tokenizer.json"], "tokenizer.json is there already"),
    (["--out=."], "give another folder"), (["compare", "empty"], "empty is empty"),
    (["compare", "text", "--out=x"], "--out would not act with compare: leave it out"),
    (["hf", "--format=tiktoken", "--out=x"], "--format would not act on hf: leave it out"),
    (["--tokenizer=x.json"], "--tokenizer would not act on tokenizer.json"),
    (["--pattern=gpt2"], "--pattern would not act without .tiktoken"),
    (["compare"], "compare takes a file of text"), (["hf", "text"], "export takes one source"),
    (["in"], "in a folder of GPT-2"), (["in", "hf", "text"], "in takes one folder, not hf text"),
    (["in", "hf", "--format=tiktoken"], "--format would not act with in: leave it out"),
    (["in", "hf"], "No such file or directory: hf/config.json"),
])
def test_a_mistake_is_one_line(trained, tmp_path, monkeypatch, capsys, words, problem):
    monkeypatch.chdir(tmp_path)
    trained.save("tokenizer.json")
    to_huggingface(trained, "hf")
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_text("")
    code, lines = mistake(export.main, monkeypatch, capsys, *words)
    assert code == 1 and len(lines) == 1 and problem in lines[0]


# -----------------------------------------------------------------------------
# GPT-2's weights.


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A folder with GPT-2's files of a small random model, and that model."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    shape = dict(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.mark.parametrize("old", [False, True])
def test_gpt2s_weights_give_the_logits_of_transformers(hugging_face, tmp_path, old):
    folder, theirs = hugging_face
    if old:  # a file of weights as the hub still has it: no prefix, the causal mask inside
        weights = {name.removeprefix("transformer."): w for name, w in theirs.state_dict().items()
                   if name != "lm_head.weight"} | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
        with open(tmp_path / "model.safetensors", "wb") as file:
            write_safetensors(file, weights, {})
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        folder = tmp_path
    ids = torch.randint(64, (2, 16))
    with torch.inference_mode():
        logits, _ = load_gpt2(folder).eval()(ids)
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_folder_whose_config_and_weights_differ_is_refused_with_the_list(hugging_face, tmp_path):
    folder, _ = hugging_face
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(n_layer=3)))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="blocks.2.attn_norm.weight is missing"):
        load_gpt2(tmp_path)
    for wrong in "{}", "[]", json.dumps(config | dict(activation_function="relu")):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match="config.json cannot be read"):
            load_gpt2(tmp_path)


def test_weights_in_a_pickle_are_refused_as_it_can_run_code(tmp_path):
    shape = dict(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can run code when it is read: convert it"):
        load_gpt2(tmp_path)


def split_weights(folder, out, lost=()):
    """Copy GPT-2's files with the weights in two files and an index, but not the lost ones."""
    weights = read_safetensors(folder / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    write_json(out / "model.safetensors.index.json", dict(metadata={}, weight_map=names))
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    for file in {*names.values()} - {*lost}:
        with open(out / file, "wb") as opened:
            write_safetensors(opened, {n: w for n, w in weights.items() if names[n] == file}, {})


def write_gpt2(folder, ours):
    """Write GPT-2's config.json and model.safetensors of a model of ours -> the folder."""
    theirs, c = {}, ours.config
    for name, w in ours.state_dict().items():
        name = name.replace("blocks.", "h.").replace("final_norm.", "ln_f.")
        for old, new in GPT2_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        theirs[name] = w.mT if name.endswith("_proj.weight") or ".c_fc.weight" in name else w
    for i in range(c.n_layer):
        for kind in "weight", "bias":
            parts = [theirs.pop(f"transformer.h.{i}.attn.{x}_proj.{kind}") for x in "qkv"]
            theirs[f"transformer.h.{i}.attn.c_attn.{kind}"] = torch.cat(parts, -1)
    write_json(folder / "config.json", dict(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head))
    with open(folder / "model.safetensors", "wb") as file:
        write_safetensors(file, {n: w.contiguous() for n, w in theirs.items()}, {})
    return folder


@pytest.fixture
def gpt2(tmp_path):
    """A folder with GPT-2's files, written by us from a model of ours with random weights."""
    ours = tiny("gpt2", block_size=16)
    return write_gpt2(tmp_path / "whole", ours), ours


@pytest.fixture
def gpt2_with_text(trained, tmp_path):
    """The same with a vocabulary in GPT-2's two files, and that as a tokenizer of ours."""
    ours = tiny("gpt2", vocab_size=256 + len(trained.merges) + 1, block_size=64)
    folder = write_gpt2(tmp_path / "gpt2", ours)
    return folder, ours, Tokenizer.from_gpt2(*gpt2_files(folder, trained.merges))


def test_a_folder_of_gpt2_becomes_a_run(call, gpt2_with_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, ours, theirs = gpt2_with_text
    assert call(export, "in", folder, "--out=run")[0] == "next: python sample.py run\n"
    model, tokenizer = load_run("run")
    ids = theirs.encode(COMMON)[:16]
    assert tokenizer.encode(COMMON)[:16] == ids
    torch.testing.assert_close(model(torch.tensor([ids]))[0], ours(torch.tensor([ids]))[0])
    assert call(export, "in", folder)[0] == "next: python sample.py runs/gpt2\n"


def test_an_import_replaces_nothing_and_needs_files_of_one_model(call, gpt2_with_text, tmp_path):
    folder, *_ = gpt2_with_text
    assert "whole is there already" in call(export, "in", folder, f"--out={folder}")[1].replace(
        str(folder), "whole")
    write_json(folder / "vocab.json", read_json(folder / "vocab.json") | {"more": 10**4})
    out, error = call(export, "in", folder, f"--out={tmp_path}/run")
    assert error and not out and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_chapter_10_samples_from_gpt2s_files_where_they_are(gpt2_with_text, tmp_path):
    cells = nbformat.read(ROOT / "chapters/10_sampling.ipynb", 4).cells
    first, *_, last = (cell.source for cell in cells if "import load_gpt2" in cell.source
                       or 'Path("gpt2")' in cell.source)
    done = subprocess.run([sys.executable, "-c", f"{first}\n{last}"], cwd=tmp_path, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True)
    assert done.stdout.startswith("A language model is") and "openai" not in done.stdout


def test_weights_in_several_files_or_under_another_name_are_the_same(gpt2, tmp_path):
    (folder, ours), ids = gpt2, torch.arange(16).view(1, 16)
    (tmp_path / "parts").mkdir()
    split_weights(folder, tmp_path / "parts")
    expected = ours(ids)[0]
    torch.testing.assert_close(load_gpt2(folder)(ids)[0], expected)
    torch.testing.assert_close(load_gpt2(tmp_path / "parts")(ids)[0], expected)
    (folder / "model.safetensors").rename(folder / "pytorch_gpt2.safetensors")
    torch.testing.assert_close(load_gpt2(folder)(ids)[0], expected)


def test_weights_that_are_missing_are_named(gpt2, tmp_path):
    lost, (folder, _) = "model-00002-of-00002.safetensors", gpt2
    split_weights(folder, tmp_path, [lost])
    with pytest.raises(ValueError, match=f"index.json cannot be read: it names .*/{lost}: not in"):
        load_gpt2(tmp_path)
    outside = dict(weight_map=dict(a="../whole/model.safetensors"))
    for wrong, message in (outside, "it names .*whole/model.*: not in this"), ([], "TypeError"):
        write_json(tmp_path / "model.safetensors.index.json", wrong)
        with pytest.raises(ValueError, match=f"index.json cannot be read: {message}"):
            load_gpt2(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has 0 .safetensors files and no index"):
        load_gpt2(folder)
