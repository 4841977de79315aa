"""A GGUF file holds the run it was made of: its own reader, transformers and llama.cpp say so."""

import ctypes
from itertools import islice
from random import Random

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="reads what is written with the package gguf")

from chapters import export
from chapters.gguf_files import PATTERNS, export_gguf, pattern_name
from chapters.token_files import CHAT_TEMPLATE
from chapters.weights import explicit, write_run
from conftest import tiny
from sample import generate
from test_export import trained  # noqa: F401  a fixture
from test_tokenizer import COMMON, NASTY, random_kinds
from test_weights import random_model
from tokenizer import GPT2_SPLIT, O200K_SPLIT, SPECIAL_TOKENS, Tokenizer, to_chars

# Of the shapes that transformers takes for granted in these files, where it does not read them.
KINDS = {"gpt2": dict(block_size=1024, n_hidden=0), "llama": {}, "qwen3": dict(head_dim=128)}


@pytest.fixture
def written(trained, tmp_path):
    """written(kind, type) -> (the path of a GGUF file, the model of ours in it)."""
    def write(kind, type="f32", **options):
        ours = random_model(kind, vocab_size=trained.n_vocab, **KINDS[kind] | options)
        run = write_run(ours, trained, tmp_path / f"run-{type}")
        return export_gguf(run, tmp_path / "out" / f"{kind}.gguf", type), ours
    return write


def values(reader):
    """{key: value} of a GGUFReader."""
    return {name: field.contents() for name, field in reader.fields.items()
            if not name.startswith("GGUF.")}


# -----------------------------------------------------------------------------
# Read back by the package itself.

OWN = {"attn_norm": "attn_norm", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj",
       "attn_v": "attn.v_proj", "attn_output": "attn.o_proj", "attn_q_norm": "attn.q_norm",
       "attn_k_norm": "attn.k_norm", "ffn_norm": "mlp_norm", "ffn_gate": "mlp.gate_proj",
       "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "transformer.wte",
       "position_embd": "transformer.wpe", "output_norm": "transformer.final_norm",
       "output": "lm_head"}


def read_back(path, kind, config):
    """{our name: (tensor in float32, its type)} of a file, by hand."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        w = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        *block, name, what = tensor.name.split(".")
        start = f"transformer.blocks.{block[1]}." if block else ""
        names, parts = [name], [w]
        if name == "attn_qkv":
            names, parts = ["attn_q", "attn_k", "attn_v"], w.chunk(3)
        for name, w in zip(names, parts):
            if kind == "llama" and name in ("attn_q", "attn_k"):  # pairs back to halves
                w = torch.cat([w.view(-1, config.head_size, w.size(1))[:, i::2] for i in (0, 1)], 1)
                w = w.flatten(0, 1)
            found[f"{start}{OWN[name]}.{what}"] = w, tensor.tensor_type.name
    return found


@pytest.mark.parametrize("kind, type", [
    *((kind, type) for kind in KINDS for type in ("f32", "q8_0")), ("gpt2", "f16"),
    ("qwen3", "bf16")])
def test_each_tensor_comes_back(written, kind, type):
    path, ours = written(kind, type)
    found, expected = read_back(path, kind, ours.config), dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    rounding = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}
    for name, w in expected.items():
        again, stored = found[name]
        assert stored == ("F32" if w.ndim == 1 or "wpe" in name else "F16" if type == "q8_0"
                          and w.size(1) % 32 else type.upper())
        if stored == "Q8_0":  # half a step of the scale, and the rounding of the scale itself
            steps = (again - w).unflatten(-1, (-1, 32)).abs()
            scale = w.unflatten(-1, (-1, 32)).abs().amax(dim=-1, keepdim=True) / 127
            assert (steps <= 0.57 * scale).all()
        else:
            torch.testing.assert_close(again, w, rtol=rounding[stored], atol=1e-7)


@pytest.mark.parametrize("kind, special", [
    ("gpt2", dict(layer_norm_epsilon=1e-5)), ("llama", dict(head_count_kv=4, key_length=8)),
    ("qwen3", dict(head_count_kv=2, key_length=128, layer_norm_rms_epsilon=1e-5))])
def test_the_keys_say_the_shape(written, kind, special):
    path, ours = written(kind, "q8_0")
    found, c = values(gguf.GGUFReader(path)), explicit(ours.config)
    shape = dict(context_length=c.block_size, embedding_length=32, block_count=2,
                 feed_forward_length=c.n_hidden)
    shape |= {f"attention.{name}": value for name, value in dict(special, head_count=4).items()}
    if kind != "gpt2":
        shape |= {"vocab_size": c.vocab_size, "rope.dimension_count": c.head_size,
                  "rope.freq_base": c.rope_theta, "attention.value_length": c.head_size}
    for name, value in shape.items():
        assert found[f"{kind}.{name}"] == pytest.approx(value), name
    assert found["general.architecture"] == kind and found["general.name"] == "run-q8_0"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


def test_the_keys_say_the_tokenizer(trained, written):
    found = values(gguf.GGUFReader(written("llama")[0]))
    found = {name.removeprefix("tokenizer."): value for name, value in found.items()}
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "llama-bpe")
    n = 256 + len(trained.merges)
    tokens = [to_chars(token) for token in trained.token_bytes()[:n]] + SPECIAL_TOKENS
    assert found["ggml.tokens"] == tokens
    assert found["ggml.token_type"] == [1] * n + [3] * len(SPECIAL_TOKENS)
    assert found["ggml.merges"] == trained.definition()["merges"]
    assert found["ggml.bos_token_id"] == found["ggml.eos_token_id"] == trained.eot
    assert found["ggml.eot_token_id"] == trained.special["<|end|>"]
    assert found["ggml.add_bos_token"] is False and found["chat_template"] == CHAT_TEMPLATE


def test_ids_that_no_token_has_are_unused_and_a_tokenizer_without_chats_has_no_template(
        trained, tmp_path):
    gaps = Tokenizer(trained.merges, {"<|endoftext|>": 900, "<|x|>": 903})
    run = write_run(tiny(vocab_size=gaps.n_vocab), gaps, tmp_path / "run")
    found = values(gguf.GGUFReader(export_gguf(run)))
    types, tokens = found["tokenizer.ggml.token_type"], found["tokenizer.ggml.tokens"]
    assert len({*tokens}) == len(tokens) == 904 and tokens[903] == "<|x|>"
    assert types[900:] == [3, 5, 5, 3] and types[594:900] == [5] * 306
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & found.keys()


def test_the_command_writes_a_whole_file_once(call, trained, tmp_path):
    run = write_run(random_model("qwen3", vocab_size=trained.n_vocab), trained, tmp_path / "run")
    words = "gguf", run, f"--out={tmp_path}/a.gguf", "--type=f16"
    assert call(export, *words) == (f"next: llama-server -m {tmp_path}/a.gguf\n", "")
    assert "a.gguf is there already: give another --out" in call(export, *words)[1]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.gguf"}
    assert "unknown type 'q4_0'" in call(export, *words[:3], "--type=q4_0")[1]
    assert "--type would not act with hf" in call(export, "hf", run, "--type=f16")[1]


@pytest.mark.parametrize("kind, options, problem", [
    ("mistral", {}, "no llama model of llama.cpp has window=5"),
    ("qwen3", dict(pattern=O200K_SPLIT), "llama.cpp lacks the split pattern"),
    ("llama", dict(pattern=r"\s+|\S+"), "would make other ids: `export hf` takes any pattern"),
])
def test_what_llama_cpp_computes_otherwise_is_refused(
        call, trained, tmp_path, kind, options, problem):
    tokenizer = Tokenizer(trained.merges, **options)
    run = write_run(random_model(kind, vocab_size=tokenizer.n_vocab), tokenizer, tmp_path / "run")
    _, error = call(export, "gguf", run)
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1
    assert [*tmp_path.iterdir()] == [run]


def test_a_token_that_its_merges_do_not_make_is_not_taken_whole(trained):
    odd = Tokenizer([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")])  # abc merges to a, bc
    assert pattern_name(odd) == "dbrx" and pattern_name(trained) == "llama-bpe"
    assert pattern_name(Tokenizer(odd.merges, pattern=GPT2_SPLIT)) == "gpt-2"


# -----------------------------------------------------------------------------
# Read by other programs.


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_it_with_the_same_logits_and_ids(trained, written, kind):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    (path, ours), ids = written(kind), torch.randint(trained.n_vocab, (2, 16))
    where = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
    torch.testing.assert_close(theirs(ids).logits, ours(ids)[0], rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    for text in [*NASTY.values(), COMMON]:
        if kind == "llama":  # of the others it takes the split pattern for granted
            assert tokenizer(text)["input_ids"] == trained.encode(text, special=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_has_the_same_logits_and_texts(trained, written, kind):
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama-cpp-python")
    path, ours = written(kind, block_size=64)
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    ids = torch.randint(trained.n_vocab, (1, 16))
    llama.eval(ids[0].tolist())
    logits, expected = torch.tensor(llama.scores[:16]), ours(ids)[0][0]
    assert (logits - expected).abs().max() < 0.005 * expected.std()  # its cache is of halves
    said = islice(llama.generate(ids[0].tolist(), temp=0.0), 16)
    assert [*said] == torch.cat([*generate(ours, ids, 16, temperature=0.0)]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_integers(written, tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama-cpp-python")
    ours, whole = (written(kind, type)[0].replace(tmp_path / f"{type}.gguf")
                   for type in ("q8_0", "f32"))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = gguf.LlamaFileType.MOSTLY_Q8_0, True
    names = [str(path).encode() for path in (whole, tmp_path / "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
    ours, theirs = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
                    for path in (ours, tmp_path / "theirs.gguf"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        assert np.array_equal(tensor.data, theirs[name].data)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERNS.values())
def test_llama_cpp_makes_the_same_ids(trained, tmp_path, pattern):
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama-cpp-python")
    tokenizer = Tokenizer(trained.merges, pattern=pattern)
    run = write_run(tiny(vocab_size=tokenizer.n_vocab), tokenizer, tmp_path / "run")
    llama = llama_cpp.Llama(str(export_gguf(run)), vocab_only=True, verbose=False)
    rng = Random(0)
    for text in [*NASTY.values(), COMMON, "a<|end|>b", "1a 23  456 'LL we'Re it'ſ",
                 *(random_kinds(rng, 12) for _ in range(300))]:
        assert llama.tokenize(text.encode(), False, False) == tokenizer.encode(text)
        assert llama.tokenize(text.encode(), False, True) == tokenizer.encode(text, special=True)
    assert llama.token_eos() == tokenizer.eot
