"""What comes from Hugging Face's models computes the same here, what goes out the same there."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sample
from chapters import export, gguf_files, onnx_files
from chapters.export import load_gpt2
from chapters.peft_files import export_peft, fuse_lora, to_peft
from chapters.weights import (FAMILIES, KNOWN, explicit, family_of, from_names, load_pretrained,
                              read_shape, to_names, write_run)
from conftest import ROOT, keep, tiny
from model import (LINEARS, GPTConfig, LoRALinear, TuneConfig, quantize, read_header,
                   read_safetensors, save_model, tune, write_safetensors)
from sample import end_ids, generate, load_run
from test_export import llama3, smollm, trained  # noqa: F401  trained is a fixture
from test_tokenizer import CHAT, COMMON, NASTY, gpt2_files
from tokenizer import GPT2_BYTES, Tokenizer, read_json, write_json

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of transformers

# One model of each kind: grouped heads of a size of their own, tied or not, a window.
KINDS = {
    "gpt2": dict(architecture="gpt2", n_hidden=48),
    "llama": dict(qk_norm=False, n_kv_head=4, n_hidden=48, tied=True),
    "qwen3": dict(head_dim=16, n_kv_head=2, n_hidden=80, norm_eps=1e-5, rope_theta=5e5),
    "mistral": dict(qk_norm=False, n_kv_head=1, head_dim=12, window=5, n_hidden=48)}


def random_model(kind, **options):
    """A model of ours of that family, all of whose weights count."""
    model = tiny(**KINDS[kind] | options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def config_json(model, **other):
    """The values of config.json for a model of ours."""
    family = family_of(model.config)
    fields = FAMILIES[family].fields.items()
    values = {theirs: getattr(model.config, ours) for ours, theirs in fields}
    defaults = dict(head_dim=model.config.head_size, layer_norm_epsilon=1e-5, rms_norm_eps=1e-6,
                    sliding_window=None)
    return dict(model_type=family) | {
        name: values[name] or defaults.get(name, values[name]) for name in values} | other


def write_folder(folder, model, lost=(), n_files=1, **other):
    """Write config.json and safetensors files, with an index if several, but the lost -> folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = to_names(dict(model.named_parameters()), family_of(model.config))
    files = {name: f"model-{i % n_files}.safetensors" if n_files > 1 else "model.safetensors"
             for i, name in enumerate(weights)}
    for file in {*files.values()} - {*lost}:
        with open(folder / file, "wb") as opened:
            own = {name: w for name, w in weights.items() if files[name] == file}
            write_safetensors(opened, own, {})
    if n_files > 1:
        write_json(folder / "model.safetensors.index.json", dict(metadata={}, weight_map=files))
    write_json(folder / "config.json", config_json(model, **other))
    return folder


def logits(model, ids):
    """Of a model of ours or theirs, in a double precision that hides no mistake."""
    with torch.inference_mode():
        out = model.double()(ids)
        return (out[0] if isinstance(out, tuple) else out.logits)


# -----------------------------------------------------------------------------
# Models of transformers.


def their_model(kind, **options):
    """A small random model of transformers with the options that KINDS says."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    values = config_json(random_model(kind, **options))
    rope = dict(rope_type="default", rope_theta=values.pop("rope_theta", 1.0))
    config = transformers.AutoConfig.for_model(
        values.pop("model_type"), **values, **{} if kind == "gpt2" else dict(rope_parameters=rope),
        bos_token_id=0, eos_token_id=0)
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_has_the_same_logits_here(tmp_path, kind, tied):
    theirs, ids = their_model(kind, tied=tied), torch.randint(64, (3, 16))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    ours = load_pretrained(tmp_path).eval()
    assert family_of(ours.config) == kind and ours.config.tied == tied
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_our_weights_have_the_names_and_shapes_of_transformers(kind):
    theirs, ours = their_model(kind), random_model(kind)
    names = to_names(ours.state_dict(), kind)
    assert {n: w.shape for n, w in names.items()} == {
        n: w.shape for n, w in theirs.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_field_that_transformers_reads_is_mapped_known_or_harmless(kind):
    training = "resid_pdrop embd_pdrop attn_pdrop attention_dropout initializer_range"
    other = ("architectures dtype model_type transformers_version use_cache pretraining_tp "
             "max_window_layers rope_parameters sliding_window reorder_and_upcast_attn "
             "bos_token_id eos_token_id pad_token_id")
    fields = {name for name in their_model(kind).config.to_diff_dict()
              if not name.startswith("summary_")}
    assert fields <= {*FAMILIES[kind].fields.values(), *KNOWN, *training.split(), *other.split()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_have_the_logits_of_transformers_in_floats(tmp_path, dtype):
    whole, ids = their_model("qwen3"), torch.randint(64, (2, 16))
    whole.to(dtype).save_pretrained(tmp_path)
    assert {w.dtype for w in read_safetensors(tmp_path / "model.safetensors").values()} == {dtype}
    theirs, ours = whole.from_pretrained(tmp_path, dtype=torch.float32), load_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rope_is_read_where_older_files_have_it(tmp_path):
    theirs, ids = their_model("qwen3"), torch.randint(64, (2, 16))
    theirs.save_pretrained(tmp_path)
    values = read_json(tmp_path / "config.json")
    rope = values.pop("rope_parameters")
    assert rope["rope_theta"] == 5e5
    for old in (dict(rope_theta=5e5), dict(rope_theta=5e5, rope_scaling=None),
                dict(rope_theta=1.0, rope_scaling=dict(type="default", rope_theta=5e5))):
        write_json(tmp_path / "config.json", values | old)
        torch.testing.assert_close(load_pretrained(tmp_path)(ids)[0], theirs(ids).logits,
                                   rtol=1e-5, atol=1e-5)


# -----------------------------------------------------------------------------
# Folders, good and bad.


@pytest.mark.parametrize("kind", KINDS)
def test_from_names_is_the_way_back_from_to_names(kind):
    ours = random_model(kind).state_dict()
    again = from_names(to_names(ours, kind), kind)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_as_the_model_it_was_made_of(tmp_path, kind, n_files):
    ours, ids = random_model(kind), torch.randint(64, (2, 16))
    again = load_pretrained(write_folder(tmp_path, ours, n_files=n_files))
    torch.testing.assert_close(again(ids)[0], ours(ids)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_come_in_as_floats(tmp_path, dtype):
    ours = random_model("qwen3").to(dtype)
    again = load_pretrained(write_folder(tmp_path, ours)).state_dict()
    assert all(again[name].dtype == torch.float32 and torch.equal(again[name], w.float())
               for name, w in ours.state_dict().items())


@pytest.mark.parametrize("kind, values, problem", [
    ("qwen3", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type='yarn'"),
    ("llama", dict(rope_parameters=dict(rope_type="llama3")), "rope_type='llama3'"),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)), "type='linear'"),
    ("llama", dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    ("llama", dict(partial_rotary_factor=0.25), "partial_rotary_factor=0.25: only 1.0 is known"),
    ("qwen3", dict(rope_parameters=dict(full_attention={})), "full_attention={}"),
    ("qwen3", dict(attention_bias=True), "attention_bias=True: only False is known"),
    ("llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu': only silu or swish is known"),
    ("qwen3", dict(use_sliding_window=True, sliding_window=4), "use_sliding_window=True"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]),
     "layer_types='sliding_attention'"),
    ("llama", dict(quantization_config=dict(bits=4)), "quantization_config={'bits': 4}"),
    ("gpt2", dict(activation_function="relu"), "activation_function='relu'"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True"),
    ("llama", dict(model_type="qwen2"), "unknown model_type 'qwen2': did you mean qwen3"),
    ("llama", dict(model_type=["llama"]), "TypeError"),
    ("llama", dict(num_attention_heads=5), "n_head=5"),
    ("llama", dict(num_hidden_layers="2"), "n_layer='2' must be"),
    ("llama", dict(rope_parameters=[1]), "TypeError"),
])
def test_a_field_that_would_change_the_result_is_refused_by_name(tmp_path, kind, values, problem):
    write_json(tmp_path / "config.json", config_json(random_model(kind)) | values)
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path)
    assert f"{tmp_path}/config.json cannot be read: " in str(error.value)
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, field", [
    (kind, field) for kind in KINDS for field in FAMILIES[kind].fields.values()])
def test_a_field_that_is_missing_is_named_or_stands_for_what_transformers_takes(
        tmp_path, kind, field):
    values = config_json(tiny(**dict(architecture="gpt2") if kind == "gpt2" else dict(
        qk_norm=kind == "qwen3", n_kv_head=4, window=5 * (kind == "mistral"))))
    write_json(tmp_path / "config.json", values)
    whole = read_shape(tmp_path)
    del values[field]
    write_json(tmp_path / "config.json", values)
    if field in ("num_key_value_heads", "head_dim", "n_inner", "layer_norm_epsilon", "rms_norm_eps",
                 "rope_theta", "tie_word_embeddings"):
        shape = read_shape(tmp_path)[1]
        assert shape.head_size == whole[1].head_size and shape.n_kv_head == whole[1].n_kv_head
        assert (shape.tied, shape.rope_theta) == (whole[1].tied, whole[1].rope_theta)
    else:
        with pytest.raises(ValueError, match=f"config.json cannot be read: it lacks {field}"):
            read_shape(tmp_path)


@pytest.mark.parametrize("wrong", ["{}", "[]", "7", '{"model_type": "gpt2"}', "{"])
def test_a_config_that_is_none_is_refused(tmp_path, wrong):
    (tmp_path / "config.json").write_text(wrong)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_pretrained(tmp_path)


def test_a_folder_whose_config_and_weights_differ_is_refused_with_the_list(tmp_path):
    write_folder(tmp_path, random_model("qwen3"), num_hidden_layers=3)
    with pytest.raises(ValueError, match="blocks.2.attn_norm.weight is missing"):
        load_pretrained(tmp_path)


def test_weights_in_a_pickle_are_refused_as_it_can_run_code(tmp_path):
    write_json(tmp_path / "config.json", config_json(random_model("gpt2")))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can run code when it is read: convert it"):
        load_pretrained(tmp_path)


def test_weights_under_another_name_or_of_old_files_are_the_same(tmp_path):
    ours, ids = random_model("gpt2"), torch.arange(16).view(1, 16)
    write_folder(tmp_path, ours)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_gpt2.safetensors")
    torch.testing.assert_close(load_gpt2(tmp_path)(ids)[0], ours(ids)[0])
    old = {name.removeprefix("transformer."): w for name, w in
           read_safetensors(tmp_path / "pytorch_gpt2.safetensors").items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "lm_head.weight": old["wte.weight"]}
    with open(tmp_path / "pytorch_gpt2.safetensors", "wb") as file:
        write_safetensors(file, old, {})
    torch.testing.assert_close(load_gpt2(tmp_path)(ids)[0], ours(ids)[0])


def test_weights_that_are_missing_are_named(tmp_path):
    lost = "model-1.safetensors"
    write_folder(tmp_path, random_model("llama"), [lost], n_files=2)
    with pytest.raises(ValueError, match=f"index.json cannot be read: it names .*/{lost}: not in"):
        load_pretrained(tmp_path)
    outside = dict(weight_map=dict(a="../whole/model.safetensors"))
    for wrong, message in (outside, "it names .*whole/model.*: not in this"), ([], "TypeError"):
        write_json(tmp_path / "model.safetensors.index.json", wrong)
        with pytest.raises(ValueError, match=f"index.json cannot be read: {message}"):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match="has 0 .safetensors files and no index"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("options, problem", [
    (dict(architecture="bert"), "no gpt2 model of transformers has norm_first=False, causal=False"),
    (dict(activation="relu2"), "no qwen3 model of transformers has activation=relu2"),
    (dict(softcap=9.0, window=4, qk_norm=False), "no mistral model .* has softcap=9.0"),
    (dict(window=4), "no mistral model of transformers has qk_norm=True"),
    (dict(architecture="gpt2", n_kv_head=2), "no gpt2 model of transformers has n_kv_head=2"),
    (dict(architecture="gpt2", head_dim=4), "no gpt2 model of transformers has head_size=4"),
    (dict(n_classes=3), "has n_classes=3"), (dict(position="sinusoidal"), "position=sinusoidal"),
])
def test_what_no_family_has_is_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        family_of(GPTConfig(n_layer=2, n_head=4, n_embd=32, **options))


# -----------------------------------------------------------------------------
# Runs.


@pytest.fixture
def gpt2_with_text(trained, tmp_path):
    """A folder with GPT-2's files and its two of a vocabulary, the model and the tokenizer."""
    ours = tiny("gpt2", vocab_size=256 + len(trained.merges) + 1, block_size=64)
    folder = write_folder(tmp_path / "gpt2", ours)
    return folder, ours, Tokenizer.from_gpt2(*gpt2_files(folder, trained.merges))


def test_a_folder_of_gpt2_becomes_a_run(call, gpt2_with_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, ours, theirs = gpt2_with_text
    (tmp_path / "run").mkdir()  # an empty folder may be there
    assert call(export, "in", folder, "--out=run") == ("next: python sample.py run\n", "")
    model, tokenizer = load_run("run")
    ids = theirs.encode(COMMON)[:16]
    assert tokenizer.encode(COMMON)[:16] == ids
    torch.testing.assert_close(model(torch.tensor([ids]))[0], ours(torch.tensor([ids]))[0])
    assert call(export, "in", folder)[0] == "next: python sample.py runs/gpt2\n"
    said, _ = call(sample, "runs/gpt2", "--prompt=the cat", "--max_new_tokens=5", "--seed=0")
    assert said.startswith("the cat")


def test_an_import_replaces_nothing_and_needs_files_of_one_model(call, gpt2_with_text, tmp_path):
    folder, *_ = gpt2_with_text
    assert "gpt2 is there already" in call(export, "in", folder, f"--out={folder}")[1]
    write_json(folder / "vocab.json", read_json(folder / "vocab.json") | {"more": 10**4})
    out, error = call(export, "in", folder, f"--out={tmp_path}/run")
    assert "10001 tokens, but weights for" in error and not out and not (tmp_path / "run").exists()


def test_a_vocabulary_of_two_files_is_read_for_gpt2_alone(call, trained, tmp_path):
    write_folder(tmp_path, tiny(vocab_size=256 + len(trained.merges) + 1, n_hidden=64))
    gpt2_files(tmp_path, trained.merges)
    _, error = call(export, "in", tmp_path, f"--out={tmp_path}/run")
    assert error == f"error: No such file or directory: {tmp_path}/tokenizer.json\n"


@pytest.mark.parametrize("kind", [smollm, llama3])
def test_the_rows_of_the_embedding_follow_the_ids(call, trained, tmp_path, kind):
    n = 256 + len(trained.merges) + 2
    ours = random_model("llama" if kind == llama3 else "qwen3", vocab_size=n + 10)
    folder = write_folder(tmp_path / "in", ours, bos_token_id=n - 2, eos_token_id=[n - 1])
    kind(Tokenizer(trained.merges, [], byte_order=GPT2_BYTES), folder / "tokenizer.json")
    out, error = call(export, "in", folder, f"--out={tmp_path}/run")
    assert "10 rows of the embedding belong to no token" in error
    assert ("<|begin_of_text|> is called <|endoftext|> here" in error) == (kind == llama3)
    model, tokenizer = load_run(tmp_path / "run")
    assert tokenizer.n_vocab == model.config.vocab_size == n
    order = [*range(2, n), 0, 1] if kind == smollm else [*range(n)]  # of theirs, by ours
    ids = [tokenizer.eot, *tokenizer.encode(COMMON)[:15]]
    their_ids = [order[id] for id in ids]
    assert their_ids[0] == (0 if kind == smollm else n - 2)
    expected = ours(torch.tensor([their_ids]))[0][..., order]
    torch.testing.assert_close(model(torch.tensor([ids]))[0], expected)
    text = call(sample, tmp_path / "run", "--prompt=the", "--max_new_tokens=4", "--seed=0")[0]
    assert text.startswith("the")


@pytest.mark.parametrize("values, problem", [
    (dict(), "config.json cannot be read: KeyError('eos_token_id')"),
    (dict(bos_token_id=None, eos_token_id=7), "what begins a document?"),
    (dict(bos_token_id=[], eos_token_id=[[]]), "config.json cannot be read: TypeError"),
])
def test_without_a_token_that_begins_documents_there_is_no_run(
        call, trained, tmp_path, values, problem):
    ours = tiny(vocab_size=256 + len(trained.merges) + 1, n_hidden=64)
    folder = write_folder(tmp_path / "in", ours, **values)
    export.to_huggingface(Tokenizer(trained.merges, ["<|x|>"]), folder)
    _, error = call(export, "in", folder, f"--out={tmp_path}/run")
    assert problem in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_chapter_10_samples_from_gpt2s_files_where_they_are(gpt2_with_text, tmp_path):
    cells = nbformat.read(ROOT / "chapters/10_sampling.ipynb", 4).cells
    first, *_, last = (cell.source for cell in cells if "import load_gpt2" in cell.source
                       or 'Path("gpt2")' in cell.source)
    done = subprocess.run([sys.executable, "-c", f"{first}\n{last}"], cwd=tmp_path, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True)
    assert done.stdout.startswith("A language model is") and "openai" not in done.stdout


# -----------------------------------------------------------------------------
# Runs that go out.


def text_run(folder, kind, tokenizer, **options):
    """A run of a random model of a kind that fits the tokenizer -> (its Path, the model)."""
    ours = random_model(kind, vocab_size=tokenizer.n_vocab, block_size=64, **options)
    return write_run(ours, tokenizer, folder), ours


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_out_and_comes_back_the_same(call, trained, tmp_path, kind, tied):
    run, ours = text_run(tmp_path / "run", kind, trained, tied=tied)
    said, error = call(export, "hf", f"{run}/")
    assert said.startswith(f"next: vllm serve {run}-hf (or") and error == ""
    assert call(export, "in", f"{run}-hf", f"--out={tmp_path}/again")[1] == ""
    (again, tokenizer), ids = load_run(tmp_path / "again"), torch.randint(trained.n_vocab, (2, 16))
    assert torch.equal(again(ids)[0], ours(ids)[0])
    assert tokenizer.definition() == trained.definition()
    assert replace(explicit(again.config), zero_init=False) == explicit(ours.config)
    assert ("lm_head.weight" in load_file(f"{run}-hf/model.safetensors")) == (not tied)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_a_run_has_its_logits_its_ids_and_its_texts(trained, tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    run, ours = text_run(tmp_path / "run", kind, trained)
    folder, ids = export.export_hf(run), torch.randint(trained.n_vocab, (3, 16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == read_json(folder / "config.json")["architectures"][0]
    torch.testing.assert_close(theirs(ids).logits, ours(ids)[0], rtol=1e-5, atol=1e-5)
    said = theirs.generate(ids[:1], max_new_tokens=24, min_new_tokens=24, do_sample=False)
    ends = [*end_ids(trained)]
    greedy = generate(ours, ids[:1], 24, temperature=0.0, ban=[[id] for id in ends])
    assert said[0, 16:].tolist() == torch.cat([*greedy]).tolist()
    assert {*theirs.generation_config.eos_token_id} == {*ends}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*NASTY.values(), COMMON, "a<|end|>b <|user|>"]:
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == trained.encode(text)
        assert tokenizer(text)["input_ids"] == trained.encode(text, special=True)
        assert tokenizer.decode(trained.encode(text)) == text
    for n in 2, 4:
        prompt = tokenizer.apply_chat_template(CHAT[:n], add_generation_prompt=True)
        assert prompt["input_ids"] == trained.render_prompt(CHAT[:n])
    whole = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert whole == trained.render_chat(CHAT)[0] and tokenizer.model_max_length == 64


def test_what_was_tuned_goes_out_merged(trained, tmp_path):
    base, ours = tuned("qwen3", vocab_size=trained.n_vocab)
    run, ids = save_tuned(tmp_path / "run", base, ours), torch.randint(trained.n_vocab, (2, 16))
    trained.save(run / "tokenizer.json")
    again = load_pretrained(export.export_hf(run))
    assert (base(ids)[0] - ours(ids)[0]).abs().max() > 0.01
    torch.testing.assert_close(again(ids)[0], ours(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["hf", "gguf", "onnx"])
@pytest.mark.parametrize("options, problem", [
    (dict(softcap=9.0), "no qwen3 model of transformers has softcap=9.0"),
    (dict(norm_first=False), "no qwen3 model of transformers has norm_first=False"),
    (dict(n_classes=3), "n_classes=3: only a model that writes text will do"),
    (dict(causal=False), "only a model that writes text will do"),
])
def test_a_run_that_means_nothing_elsewhere_is_refused_and_nothing_written(
        call, trained, tmp_path, word, options, problem):
    run = write_run(tiny(vocab_size=trained.n_vocab, **options), trained, tmp_path / "run")
    out, error = call(export, word, run, f"--out={tmp_path}/out")
    if word == "onnx" and "qwen3" in problem:  # our own graph, which can be any text model's
        assert error == "" and (tmp_path / "out/model.onnx").exists()
    else:
        assert error.count("\n") == 1 and problem in error and not out
        assert [*tmp_path.iterdir()] == [run]


@pytest.mark.parametrize("word, module", [("gguf", gguf_files), ("onnx", onnx_files)])
def test_without_its_package_a_line_says_what_to_install(call, tmp_path, monkeypatch, word, module):
    monkeypatch.setattr(module, word, None)
    assert f"pip install {word}\n" in call(export, word, tmp_path)[1]


@pytest.mark.parametrize("word", ["hf", "gguf", "onnx"])
def test_a_quantized_run_is_refused_for_the_one_it_was_made_from(call, trained, tmp_path, word):
    ours = quantize(random_model("qwen3", vocab_size=trained.n_vocab), "int8")
    run = write_run(ours, trained, tmp_path / "run")
    _, error = call(export, word, run)
    assert error.count("\n") == 1 and "take the run that it was made from" in error
    assert [*tmp_path.iterdir()] == [run]


@pytest.mark.parametrize("word", ["hf", "gguf", "onnx"])
def test_tuning_that_no_plain_model_has_is_refused(call, trained, tmp_path, word):
    base = random_model("qwen3", vocab_size=trained.n_vocab)
    ours = copy.deepcopy(base)
    tune(ours, TuneConfig(tune="adapter"))
    trained.save(save_tuned(tmp_path / "run", base, ours) / "tokenizer.json")
    _, error = call(export, word, tmp_path / "run", f"--out={tmp_path}/out")
    assert "what --tune=adapter adds has no place in a plain model" in error
    assert [*tmp_path.iterdir()] == [tmp_path / "run"]


# -----------------------------------------------------------------------------
# LoRA.


def tuned(kind, targets=LINEARS, **options):
    """-> (a model of that family as it was, and with LoRA that changes it)."""
    base = random_model(kind, **options)
    ours = copy.deepcopy(base)
    tune(ours, TuneConfig(tune="lora", rank=3, alpha=5.0, lora_dropout=0.1, targets=[*targets]))
    for name, p in ours.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.3)
    return base, ours.eval()


def save_tuned(folder, base, ours):
    """A run of a tuned model, as train.py leaves it -> the folder."""
    folder.mkdir()
    save_model(base, folder / "base.safetensors")
    ours.base = read_header(folder / "base.safetensors")[1]["sha256"]
    keep(ours, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind, targets", [
    *((kind, LINEARS) for kind in KINDS), ("qwen3", ["q_proj", "down_proj"]),
    ("gpt2", ["q_proj", "v_proj"]), ("gpt2", ["k_proj"]), ("gpt2", ["o_proj", "up_proj"])])
def test_peft_computes_what_our_tuned_model_does(tmp_path, kind, targets):
    peft = pytest.importorskip("peft", reason="compares with peft")
    (base, ours), ids = tuned(kind, targets), torch.randint(64, (2, 16))
    theirs = their_model(kind)
    theirs.load_state_dict(to_names(base.state_dict(), kind))
    torch.testing.assert_close(theirs(ids).logits, base(ids)[0], rtol=1e-5, atol=1e-5)
    folder = export_peft(save_tuned(tmp_path / "run", base, ours), tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(theirs, folder)
    changed = model(ids).logits
    assert (changed - base(ids)[0]).abs().max() > 0.01
    torch.testing.assert_close(changed, ours(ids)[0], rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, ours(ids)[0], rtol=1e-4, atol=1e-4)
    assert peft.get_peft_model_state_dict(
        peft.PeftModel.from_pretrained(their_model(kind), folder)).keys() == {
            *read_safetensors(folder / "adapter_model.safetensors")}


@pytest.mark.slow
def test_one_lora_layer_is_pefts(tmp_path):
    peft = pytest.importorskip("peft", reason="compares with peft")
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 20), torch.randn(4, 12, requires_grad=True)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], lora_dropout=0.5)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    layer, ours = theirs.base_model.model[0], LoRALinear(linear, rank=3, alpha=7.0, dropout=0.5)
    assert layer.lora_A.default.weight.shape == ours.lora_A.shape
    assert layer.lora_B.default.weight.shape == ours.lora_B.shape
    for p, q in (ours.lora_A, layer.lora_A.default), (ours.lora_B, layer.lora_B.default):
        nn.init.normal_(p)
        q.weight.data.copy_(p)
    results = []
    for model, lora in (ours, [ours.lora_A, ours.lora_B]), (theirs, [
            layer.lora_A.default.weight, layer.lora_B.default.weight]):
        torch.manual_seed(1)  # for dropout
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *lora])])
        results[-1].append(model.eval()(x))
    torch.testing.assert_close(*results)
    layer.merge()
    torch.testing.assert_close(ours.merged().weight, layer.base_layer.weight)


@pytest.mark.parametrize("kind, names", [
    ("qwen3", {"self_attn.q_proj.lora_A": (3, 32), "self_attn.q_proj.lora_B": (64, 3),
               "mlp.down_proj.lora_A": (3, 80), "mlp.down_proj.lora_B": (32, 3)}),
    ("gpt2", {"attn.c_attn.lora_A": (9, 32), "attn.c_attn.lora_B": (96, 9),
              "mlp.c_proj.lora_A": (3, 48), "mlp.c_proj.lora_B": (32, 3)})])
def test_lora_has_pefts_names_and_shapes(tmp_path, call, kind, names):
    run = save_tuned(tmp_path / "run", *tuned(kind, [*LINEARS[:3], "down_proj"]))
    said, error = call(export, "peft", run, f"--out={tmp_path}/peft")
    assert (said, error) == (f"next: peft.PeftModel.from_pretrained(base, '{tmp_path}/peft')\n", "")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    start = "base_model.model." + ("transformer.h" if kind == "gpt2" else "model.layers")
    found = {name: tuple(w.shape) for name, w in tensors.items()}
    assert {f"{start}.1.{name}.weight": shape for name, shape in names.items()}.items() <= (
        found.items())
    assert all(name.startswith((f"{start}.0.", f"{start}.1.")) for name in found)
    config = read_json(tmp_path / "peft/adapter_config.json")
    assert (config["r"], config["lora_dropout"]) == (3, 0.1)
    assert config["lora_alpha"] == pytest.approx(5)
    fused = kind == "gpt2"
    assert config["target_modules"] == (["attn.c_attn", "mlp.c_proj"] if fused else
                                        ["down_proj", "k_proj", "q_proj", "v_proj"])
    assert config["rank_pattern"] == ({"c_attn": 9} if fused else {})
    assert config["alpha_pattern"] == pytest.approx({"c_attn": 15} if fused else {})
    assert config["fan_in_fan_out"] == fused


@pytest.mark.parametrize("present", ["q", "k", "v", "qv", "kv", "qkv"])
def test_the_fused_lora_of_gpt2_is_the_lora_of_its_parts(present):
    torch.manual_seed(0)
    parts = {x: (torch.randn(2, 5), torch.randn(5, 2)) for x in present}
    layers = {f"attn.{x}_proj": pair for x, pair in parts.items()} | {"attn.o_proj": (1, 2)}
    fused, x = fuse_lora(layers), torch.randn(3, 5)
    A, B = fused["attn.c_attn"]
    expected = [x @ parts[name][0].mT @ parts[name][1].mT if name in parts else torch.zeros(3, 5)
                for name in "qkv"]
    torch.testing.assert_close(x @ A.mT @ B.mT, torch.cat(expected, dim=-1))
    assert fused.keys() == {"attn.c_attn", "attn.o_proj"} and len(A) == 2 * len(present)


@pytest.mark.parametrize("options, problem", [
    (dict(tune="adapter"), "and this was trained with --tune=adapter"), (None, "--tune=full"),
])
def test_only_lora_is_exported_to_peft(options, problem):
    ours = random_model("qwen3")
    if options:
        tune(ours, TuneConfig(**options))
    with pytest.raises(ValueError, match=problem):
        to_peft(ours)


def test_a_shape_that_transformers_lacks_is_refused_and_nothing_written(tmp_path, call):
    base, ours = tuned("qwen3", softcap=15.0)
    run = save_tuned(tmp_path / "run", base, ours)
    out, error = call(export, "peft", run)
    assert error == "error: no qwen3 model of transformers has softcap=15.0\n" and not out
    assert [*tmp_path.iterdir()] == [run]
