"""Files from strangers: none runs code, fills memory or ends in a traceback. Damaged files: each is
noticed."""

import ast
import json
import math
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import ROOT, keep, tiny

import chapters.doctor as doctor
import evaluate
import sample
import tokenizer as tokens_module
import train
from data import check_shards, file_hash, read_card, read_documents, read_shard, read_split
from evaluate import read_rows
from model import GPTConfig, load_gpt2, load_model, load_plain, pack, read_safetensors, save_model
from sample import pick_checkpoint, read_manifest
from tokenizer import Tokenizer, read_json, read_sealed, seal, write_json
from train import TrainConfig, new_run, read_config, read_log, snapshot, take_step

slow = pytest.mark.slow


def refused(read, *args):
    """What is wrong with a file, in one line: whatever is read, nothing else may be raised."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(*args)
    text = str(caught.value)
    assert len(text) < 1000 and len(text.splitlines()) == 1
    return text


def peak_memory():
    """The most bytes that this process ever held."""
    resource = pytest.importorskip("resource", reason="Windows cannot say")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -----------------------------------------------------------------------------
# No file of the repository runs what it has read.

PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def dangers(source):
    """The places of a program, as text, where what is read could be run."""
    for node in ast.walk(ast.parse(source)):
        options = {word.arg: word.value for word in getattr(node, "keywords", ())}
        called = node.func if isinstance(node, ast.Call) else node
        name = ast.unparse(called) if isinstance(called, (ast.Name, ast.Attribute)) else ""
        names = {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
        module = getattr(node, "module", None) or ""
        if ({part.split(".")[0] for part in {*names, module}} & PICKLES
                or isinstance(node, ast.Name) and name in ("eval", "exec", "__import__")
                or isinstance(node, ast.Call) and name in ("compile", "builtins.compile")
                or name in ("os.system", "os.popen", "builtins.eval", "builtins.exec")
                or module == "os" and names & {"system", "popen"}
                or "shell" in options and not is_false(options["shell"])
                or isinstance(node, ast.Call) and name == "torch.load"
                and not is_true(options.get("weights_only"))
                or module == "torch" and "load" in names
                or "allow_pickle" in options and not is_false(options["allow_pickle"])
                or module == "jinja2" and names & {"Template", "Environment"}
                or name in ("jinja2.Template", "jinja2.Environment")):
            yield ast.unparse(node)


def programs():
    """{name: source} of all Python of the repository, cells of notebooks included."""
    paths = [path for part in ("", "chapters", "tests") for path in (ROOT / part).glob("*.py")]
    found = {str(path): path.read_text(encoding="utf-8") for path in paths}
    for path in (ROOT / "chapters").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found |= {f"{path} {i}": "".join(cell["source"]) for i, cell in enumerate(cells)
                  if cell["cell_type"] == "code"}
    return found


def test_no_program_here_runs_what_it_has_read():
    sources = programs()
    assert {str(ROOT / f"{name}.py") for name in ("data", "model", "train")} < {*sources}
    assert sum("ipynb" in name for name in sources) > 20
    assert {name: found for name, source in sources.items() if (found := [*dangers(source)])} == {}


@pytest.mark.parametrize("bad", [
    "import pickle", "import os, marshal as m", "from dill import loads", "import joblib.pool",
    "eval('1')", "list(map(eval, words))", "exec(code)", "compile(x, 'x', 'exec')",
    "__import__(name)", "os.system('ls')", "from os import system", "run = os.popen",
    "subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=yes)", "torch.load(path)",
    "torch.load(path, weights_only=False)", "from torch import load",
    "np.load(path, allow_pickle=True)", "jinja2.Template(text)", "from jinja2 import Template",
    "def f():\n    if x:\n        return [eval(y) for y in z]"])
def test_the_search_for_dangers_finds_each(bad):
    assert [*dangers(bad)]


def test_the_search_for_dangers_passes_what_is_safe():
    assert not [*dangers("import torch, json\nmodel.eval()\nx = re.compile('a')\nnp.load(path)\n"
                         "torch.load(path, weights_only=True)\nsubprocess.run(['ls'])\n"
                         "from jinja2.sandbox import SandboxedEnvironment\ntree = ast.parse(x)")]


# -----------------------------------------------------------------------------
# Checkpoints.


def store(path, compression=zipfile.ZIP_STORED, **records):
    """A checkpoint of a tiny model in which some records, by their last names, are others."""
    if not path.with_suffix(".sound").exists():
        save_model(tiny(), path.with_suffix(".sound"))
    with (zipfile.ZipFile(path.with_suffix(".sound")) as source,
          zipfile.ZipFile(path, "w", compression) as target):
        for entry in source.infolist():
            last = Path(entry.filename).name
            target.writestr(entry.filename, records.get(last, source.read(entry)))
    return path


def test_a_checkpoint_stored_again_is_the_same(tmp_path):
    load_model(store(tmp_path / "model.pt"))


@pytest.mark.parametrize("records", [{}, {"0": bytes(1 << 26)}, {"data.pkl": bytes(1 << 26)}],
                         ids=["as it was", "weights", "names"])
def test_compressed_parts_are_refused_before_they_fill_memory(tmp_path, records):
    path = store(tmp_path / "model.pt", zipfile.ZIP_DEFLATED, **records)
    before = peak_memory()
    assert "its parts are compressed" in refused(load_model, path)
    assert peak_memory() - before < 50e6


def call_of(module, name, argument=b"K\x01"):
    """A pickle that calls a function with a number."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


HUGE = b"\x8a\x06" + (2**44).to_bytes(6, "little")


@pytest.mark.parametrize("pickled", [
    call_of("builtins", "print"), call_of("os", "system"), call_of("builtins", "bytearray", HUGE),
    call_of("torch", "Tensor", HUGE), call_of("collections", "Counter"),
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", b"\x80\x02(ios\nsystem\n.",
    b"\x80\x02" + b"}U\x01a" * 10**5 + b"N" + b"s" * 10**5 + b".",
    b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b".",
    b"\x80\x02]q\x00h\x00a.", b"\x80\x02" + b"(" * 10**5 + b".", b"", b".", b"\x80\x02N"
], ids=lambda pickled: str(pickled[:16]))
def test_a_pickle_that_does_more_than_hold_values_is_refused(tmp_path, capfd, pickled):
    path = store(tmp_path / "model.pt", **{"data.pkl": pickled})
    before = peak_memory()
    assert "model.pt is damaged or not a checkpoint" in refused(load_plain, path)
    assert peak_memory() - before < 200e6 and capfd.readouterr() == ("", "")


def test_a_file_of_the_old_format_is_refused(tmp_path):
    torch.save(pack(tiny()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "old.pt is damaged or not a checkpoint" in refused(load_model, tmp_path / "old.pt")


WEIGHT = "transformer.wte.weight"
BAD_WEIGHTS = {
    "shared by all": torch.zeros(1).expand(64, 32), "enormous": torch.zeros(1).expand(2**40, 2**20),
    "whole numbers": torch.zeros(64, 32, dtype=torch.int64), "no tensor": [[0.0] * 32] * 64,
    "sparse": torch.zeros(64, 32).to_sparse(), "on no device": torch.zeros(64, 32, device="meta"),
    "a single number": torch.tensor(0.0), "none": None, "complex": torch.zeros(64, 32) + 0j,
    "turned": torch.zeros(32, 64).T}


@pytest.mark.parametrize("weight", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_weight_that_is_none_is_refused(tmp_path, weight):
    state = pack(tiny())
    state["model"][WEIGHT] = weight
    torch.save(state, tmp_path / "model.pt")
    before = peak_memory()
    assert "model.pt" in refused(load_model, tmp_path / "model.pt")
    assert peak_memory() - before < 50e6


def test_a_weight_with_a_gradient_or_of_half_the_bits_is_a_weight(tmp_path):
    for change in (lambda w: w.requires_grad_(), torch.Tensor.half, torch.Tensor.bfloat16):
        state = pack(tiny())
        state["model"] = {name: change(w.clone()) for name, w in state["model"].items()}
        torch.save(state, tmp_path / "model.pt")
        model, _ = load_model(tmp_path / "model.pt")
        assert all(p.is_leaf and p.isfinite().all() for p in model.parameters())


def test_weights_that_are_too_large_end_a_sample_in_one_line(tokenizer):
    model = tiny(vocab_size=tokenizer.n_vocab)
    torch.nn.init.constant_(model.lm_head.weight, 3e38)
    assert "not finite" in refused(sample.complete, model, tokenizer)


def test_many_weights_that_share_their_bytes_are_refused(tmp_path):
    shared = torch.zeros(64, 32)
    state = pack(tiny())
    state["more"] = [shared] * 50
    torch.save(state, tmp_path / "model.pt")
    assert "does not hold all numbers" in refused(load_model, tmp_path / "model.pt")


ANYTHING = ["two", None, [], {}, -1, 0, 2.5, True, math.nan, math.inf, 10**9, 10**15, 10**40,
            "x" * 10**6, "a\nb", b"2", (2, 2), torch.tensor(2), torch.zeros(9)]


@pytest.mark.parametrize("name", asdict(tiny().config))
def test_a_config_with_anything_else_in_it_is_a_config_or_refused(name):
    for wrong in ANYTHING:
        try:
            config = GPTConfig(**{name: wrong})
            assert type(getattr(config, name)) in (int, float, str, bool)
        except ValueError as error:
            assert name in str(error) or "n_" in str(error)


@pytest.mark.parametrize("shape", [
    dict(n_layer=10**9), dict(n_embd=2**30, n_head=2**30), dict(n_layer=10**9, n_embd=2**30),
    dict(vocab_size=2**31 - 1, n_embd=2**30), dict(n_encoder_layer=10**9, cross=True)], ids=str)
def test_a_config_of_a_huge_model_takes_neither_time_nor_memory(tmp_path, shape):
    state, before = pack(tiny()), peak_memory()
    torch.save(state | {"config": state["config"] | shape}, tmp_path / "model.pt")
    assert "model.pt" in refused(load_model, tmp_path / "model.pt")
    assert peak_memory() - before < 50e6


@pytest.mark.parametrize("name", ["format", "config", "model"])
def test_a_checkpoint_with_anything_else_in_it_is_refused(tmp_path, name):
    for wrong in ANYTHING:
        torch.save(pack(tiny()) | {name: wrong}, tmp_path / "model.pt")
        assert "model.pt" in refused(load_model, tmp_path / "model.pt")
    for state in ([], 7, "x", None, {}, {1: 2}, torch.zeros(3)):
        torch.save(state, tmp_path / "model.pt")
        assert "model.pt" in refused(load_model, tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 10**5, 7, None, (1, 2)])
def test_a_weight_with_a_strange_name_is_refused_in_one_line(tmp_path, name):
    state = pack(tiny())
    state["model"][name] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    assert "model.pt" in refused(load_model, tmp_path / "model.pt")


@pytest.fixture(scope="module")
def trained():
    """The options of a run and what its checkpoint holds after a step."""
    config = TrainConfig(max_steps=3)
    run = new_run(".", tiny(), config, "cpu")
    ids = torch.randint(64, (2, 16))
    take_step(run, run.model, [ids], [ids], 1.0)
    run.step = 1
    return config, snapshot(run)


def resumed(folder, config, state):
    """The run that a checkpoint with a sound manifest gives."""
    path = folder / "step_000001.pt"
    torch.save(state, path)
    note = dict(format=sample.MANIFEST, step=1, val_loss=None, digest=file_hash(path))
    path.with_suffix(".json").write_text(json.dumps(seal(note)))
    return train.load_run(folder, config, "cpu")


def test_a_run_is_resumed_as_it_was(tmp_path, trained):
    config, state = trained
    again = snapshot(resumed(tmp_path, config, state))
    assert again.keys() == state.keys()
    for name in ("model", "optimizer"):
        torch.testing.assert_close(again[name], state[name], rtol=0, atol=0)


def changes(optimizer):
    """Memories of an optimizer that do not fit its weights."""
    state, groups = optimizer["state"], optimizer["param_groups"]
    yield from (dict(), dict(state=state), dict(state=7, param_groups=groups), 7, None)
    yield dict(state=state, param_groups=groups[:1])
    yield dict(state=state, param_groups=[groups[0] | dict(params=[0, 0]), groups[1]])
    yield dict(state={i + 1: part for i, part in state.items()}, param_groups=groups)
    yield dict(state={i: part for i, part in state.items() if i}, param_groups=groups)
    for wrong in (None, 7, {}, dict(step=torch.zeros(())), torch.zeros(2)):
        yield dict(state=state | {0: wrong}, param_groups=groups)
    for name, value in state[0].items():
        for wrong in (None, 1.0, "x", torch.zeros(2, 3), torch.zeros(1).expand(2**40, 2**20)):
            yield dict(state=state | {0: state[0] | {name: wrong}}, param_groups=groups)


def test_a_memory_that_does_not_fit_the_weights_is_refused(tmp_path, trained):
    config, state = trained
    for optimizer in changes(state["optimizer"]):
        changed = state | dict(optimizer=optimizer)
        assert "step_000001.pt" in refused(resumed, tmp_path, config, changed)


def test_options_of_an_optimizer_come_from_the_run_not_from_the_checkpoint(tmp_path, trained):
    config, state = trained
    groups = [group | dict(lr=9.0, eps="x", maximize=True, muon=7, share=None, code=print.__name__)
              for group in state["optimizer"]["param_groups"]]
    optimizer = dict(state=state["optimizer"]["state"], param_groups=groups)
    run = resumed(tmp_path, config, state | dict(optimizer=optimizer))
    own = new_run(tmp_path, tiny(), config, "cpu").optimizer
    assert run.optimizer.state_dict()["param_groups"] == own.state_dict()["param_groups"]


@pytest.mark.parametrize("name", [*train.PROGRESS, "scaler"])
def test_progress_of_the_wrong_kind_is_refused(tmp_path, trained, name):
    config, state = trained
    for wrong in ("x", {1: "x"}, -1.5, [[1.0]], [["a", "b"]], dict(scale=math.nan), math.nan):
        assert "step_000001.pt" in refused(resumed, tmp_path, config, state | {name: wrong})


# -----------------------------------------------------------------------------
# Shards, and weights that others wrote.


def shard(magic=20240520, version=1, n_tokens=4, body=bytes(8)):
    return b"".join(n.to_bytes(4, "little", signed=True) for n in (magic, version, n_tokens)
                    ) + bytes(1012) + body


@pytest.mark.parametrize("data", [
    b"", b"\0", shard()[:8], shard()[:1024], shard(magic=7), shard(magic=20240801),
    shard(version=7), shard(version=-1), shard(n_tokens=-4), shard(n_tokens=0),
    shard(n_tokens=0, body=b""),
    shard(n_tokens=2**31 - 1), shard()[:-1], shard() + b"\0", shard(20240801, 7)])
def test_a_file_that_is_no_shard_is_refused(tmp_path, data):
    path = tmp_path / "val_000000.bin"
    path.write_bytes(data)
    assert "val_000000.bin" in refused(read_shard, path)
    assert "val_000000.bin" in refused(read_split, tmp_path, "val")


def entry(begin=0, end=16, shape=(2, 2), dtype="F32"):
    return json.dumps(dict(dtype=dtype, shape=shape, data_offsets=[begin, end]))


def safetensors(*rows, body=bytes(16), length=None):
    header = b"{" + ", ".join(rows).encode() + b"}"
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


@pytest.mark.parametrize("data", [
    safetensors(), safetensors('"a": ' + entry(), length=2**63), safetensors(length=2**64 - 1),
    safetensors('"a": ' + entry(), '"b": ' + entry()), safetensors('"a": ' + entry(0, 8, (2,))),
    safetensors('"a": ' + entry(), '"a": ' + entry(), body=bytes(32)),
    safetensors('"a": ' + entry(0, 0, (0, 2**70))), safetensors('"a": ' + entry(0, 0, (2**70, 0))),
    safetensors('"a": ' + entry(shape=[1] * 10**5)), safetensors('"a": ' + "[" * 10**5),
    safetensors('"a": ' + entry(shape=(10**400, 10**400))), safetensors('"a": ' + entry(8, 24)),
    safetensors('"a": ' + entry(shape=(True, 4))), safetensors('"a": ' + entry(math.nan, math.inf)),
    safetensors('"a": {"dtype": [], "shape": {}, "data_offsets": 7}')], ids=range(15))
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, data):
    path, before = tmp_path / "model.safetensors", peak_memory()
    path.write_bytes(data)
    assert "model.safetensors is damaged" in refused(read_safetensors, path)
    assert peak_memory() - before < 50e6


GPT2 = dict(vocab_size=64, n_positions=16, n_layer=1, n_head=4, n_embd=32)


@pytest.mark.parametrize("config", [b"[" * 10**5, b"[]", b"7", b"{}", b"\xff\xfe", *(
    json.dumps(GPT2 | wrong).encode() for wrong in (
        dict(n_layer=10**9), dict(n_layer="1"), dict(n_embd=None), dict(vocab_size=10**12)))])
def test_a_config_that_is_not_gpt2s_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(safetensors('"wte.weight": ' + entry()))
    refused(load_gpt2, tmp_path)


@pytest.mark.parametrize("found", [
    [], {1: 2}, {"h.0.attn.c_attn.weight": 7}, {"h.0.attn.c_attn.weight": torch.tensor(1.0)},
    {"wte.weight": torch.zeros(1).expand(2**40, 32)}, {"h.0.attn.c_attn.bias": torch.zeros(2)},
    {"h.0.mlp.c_proj.weight": torch.zeros(2, 2, 2)}], ids=range(7))
def test_weights_that_are_not_gpt2s_are_refused(tmp_path, found):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    torch.save(found, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(load_gpt2, tmp_path)


# -----------------------------------------------------------------------------
# JSON: tokenizers, cards, configs, manifests, logs and rows.


def sealed_tokenizer(tokenizer, path, **changes):
    """A tokenizer.json with other values in it and a sha256 that fits them."""
    tokenizer.save(path)
    state = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: state[name] for name in ("pattern", "special_tokens", "bytes", "merges")}
    state["sha256"] = seal(kept)["sha256"]
    path.write_text(json.dumps(state))
    return path


ENDLESS = [r"(?:(?:(?:a{9999}){9999}){9999}){9999}", r"(?:a|a)*b|[\s\S]", "(?R)", "(" * 400,
           r"[\s\S]{e}", "(?:" * 330 + ")" * 330, "a" * 10**6, r"(?<!a)(?>b+)+", "[", "\\", "(?#"]


@pytest.mark.parametrize("name, values", [
    ("pattern", [None, 7, [], *ENDLESS]), ("bytes", [None, 7, "", "a" * 256, "\ud800", {}]),
    ("merges", [None, 7, {}, "ab", ["a"], ["a b", "a b"], ["a a", "zz zz"], ["\ud800 a"],
                [["a", 1]], ["a " * 10**5], [[[]]]]),
    ("special_tokens", [None, 7, ["a", "a"], [""], {"a": 10**12}, {"a": -1}, {"a": 0}, {"a": "x"},
                        {"a": 300.5}, {"\ud800": 400}, {"a": 400, "b": 400}, [["a"]], {"a": True}]),
    ("format", [None, "x" * 10**6, []]), ("version", [None, 10**999, []]),
    ("chat_template", [7, "{{ ''.__class__ }}", []])])
def test_a_tokenizer_with_anything_else_in_it_is_refused(tmp_path, tokenizer, name, values):
    for value in values:
        path = sealed_tokenizer(tokenizer, tmp_path / "tokenizer.json", **{name: value})
        assert "tokenizer.json" in refused(Tokenizer.load, path)


@pytest.mark.parametrize("data", [b"", b"[" * 10**6, b"[]", b"7", b"{}", b'{"a": 1', b"\xff",
                                  b"NaN", b'{"a": ' * 10**5, b"9" * 10**5, b'"' + b"a" * 10**5])
def test_json_of_the_wrong_kind_is_refused_by_every_reader(tmp_path, data):
    for name, read in (("tokenizer.json", Tokenizer.load), ("tokenizer.json", read_sealed),
                       ("tokenizer.json", Tokenizer.from_huggingface), ("config.json", read_config),
                       ("card.json", lambda path: read_card(path.parent)),
                       ("step_000001.json", lambda path: read_manifest(path.with_suffix(".pt")))):
        (tmp_path / name).write_bytes(data)
        assert name in refused(read, tmp_path / name)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_without_end_is_refused_in_hugging_faces_file(tmp_path, tokenizer, pattern):
    tokenizer.to_huggingface(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert "tokenizer.json" in refused(Tokenizer.from_huggingface, tmp_path)


def test_a_split_that_does_not_end_is_given_up(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens_module, "PATIENCE", 0.1)
    slow_one = Tokenizer(tokenizer.merges, pattern=r"(?:a|a)*b|[\s\S]")
    assert "take another" in refused(slow_one.encode, "a" * 60)
    assert "take another" in refused(list, slow_one.encode_iterable(["a" * 60]))


def test_the_known_patterns_may_come_in_a_file():
    for pattern in (*tokens_module.SPLITS.values(), r"\S+|\s+", r"[\s\S]", r"\p{N}{1,3}(?!\p{N})"):
        tokens_module.check_split(pattern)


def paths_in(value, path=()):
    """The places of all values in nested dicts, as tuples of keys."""
    for key, part in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from paths_in(part, (*path, key))


def with_value(value, path, new):
    return value | {path[0]: with_value(value.get(path[0]), path[1:], new)} if path else new


WRONG_JSON = [None, 7, -1, 2.5, True, "x", "../../x", [], [[]], {}, {"a": {}}, math.nan, 10**400,
              "a\nb\x1b[2J", "\ud800"]


def test_a_sealed_card_with_anything_else_in_it_is_refused_or_still_a_card(tmp_path, shards):
    card = read_card(shards)
    for path in paths_in(card):
        for wrong in WRONG_JSON:
            (tmp_path / "card.json").write_text(json.dumps(seal(with_value(card, path, wrong))))
            try:
                found = read_card(tmp_path)
                assert found["train"]["tokens"] * found["val"]["bytes"] > 0
                assert all("/" not in name for name in found["digests"])
            except ValueError as error:
                assert "card.json" in str(error) and "\n" not in str(error)


def test_a_card_that_names_files_elsewhere_is_refused(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "words")
    (tmp_path / "train_000000.bin").write_bytes(shard())
    for name in ("../train_000000.bin", "train_/../../train_000000.bin", "/train_000000.bin"):
        card = read_card(shards)
        card["digests"][name] = file_hash(tmp_path / "train_000000.bin")
        write_json(tmp_path / "words" / "card.json", seal(card))
        assert "card.json" in refused(check_shards, tmp_path / "words")


def test_a_sealed_manifest_with_anything_else_in_it_is_refused(tmp_path):
    keep(tiny(), tmp_path, val_loss=1.5)
    manifest = read_manifest(tmp_path / "step_000001.pt")
    for name in ("step", "val_loss", "digest", "format"):
        for wrong in ("x", [], {}, math.nan, 10**400, True):
            changed = json.dumps(seal(manifest | {name: wrong}))
            (tmp_path / "step_000001.json").write_text(changed)
            assert "step_000001" in refused(pick_checkpoint, tmp_path)


def test_a_sealed_config_of_a_run_with_anything_else_in_it_is_refused(tmp_path):
    saved = dict(model={}, train=asdict(TrainConfig()), data=dict(path="shards/x"))
    write_json(tmp_path / "config.json", seal(saved))
    assert read_config(tmp_path / "config.json") == saved
    for path in [*paths_in(saved)]:
        for wrong in ({}, [], None, *(["x"] if path[0] == "train" else [7])):
            changed = with_value(saved, path, wrong)
            if type(wrong) is dict and len(path) == 1 and path[0] != "train" or (
                    len(path) > 1 and isinstance(wrong, type(saved[path[0]][path[1]]))):
                continue  # of the right kind
            write_json(tmp_path / "config.json", seal(changed))
            assert "config.json" in refused(read_config, tmp_path / "config.json")


def test_a_sealed_config_with_anything_else_in_it_leaves_the_doctor_calm(tmp_path, sound, call):
    (tmp_path / "log.jsonl").write_bytes((sound / "log.jsonl").read_bytes())
    config = dict(model=dict(vocab_size=64, block_size=8), train={},
                  data=dict(train=dict(tokens=9)))
    options = dict.fromkeys(("batch_size", "max_steps", "grad_clip", "precision"), 1)
    for path in paths_in(config | dict(train=options)):
        for wrong in WRONG_JSON:
            write_json(tmp_path / "config.json", seal(with_value(config, path, wrong)))
            assert "".join(call(doctor, tmp_path)).startswith((f"{tmp_path}: ", "error: "))


LINES = ["", "{", "7", "[]", "null", '"x"', "{}", '{"step": 1}', '{"loss": 1}', "[" * 10**5,
         '{"step": "1", "loss": 1}', '{"step": 1.5, "loss": 1}', '{"step": true, "loss": 1}',
         '{"step": 1, "loss": "x"}', '{"step": 1, "loss": []}', '{"step": 1, "loss": 1e999}',
         '{"step": 1, "loss": 1, "val_loss": "x"}', '{"step": 1, "loss": ' + "9" * 10**6 + "}",
         '{"step": 1, "loss": ' + "9" * 400 + "}", "x" * 10**6, "\x85\u2028", "\ufeff{}"]


def test_only_sound_rows_of_a_log_are_read(tmp_path):
    sound = ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": null}', '{"step": 3, "loss": NaN}']
    data = "\n".join([sound[0], *LINES, *sound[1:], sound[0][:9]]).encode() + b"\xff\xfe\0"
    (tmp_path / "log.jsonl").write_bytes(data)
    assert read_log(tmp_path) == [dict(step=1, loss=2.5), dict(step=2, loss=None),
                                  dict(step=3, loss=None)]
    train.draw_loss(tmp_path)


@pytest.mark.parametrize("line", [*LINES[1:], '{"context": 1, "choices": ["a", "b"], "answer": 0}',
                                  '{"context": "", "choices": "ab", "answer": 0}', "\ud800"])
def test_a_line_that_is_no_question_is_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(line.encode("utf-8", "surrogatepass"))
    assert "rows.jsonl, line 1" in refused(read_rows, tmp_path / "rows.jsonl")
    if line.strip("\x85\u2028"):
        assert "rows.jsonl, line 1" in refused(list, read_documents(tmp_path / "rows.jsonl"))


# -----------------------------------------------------------------------------
# Chance: bits flip, files end early, bytes come in between.


def damaged(data, random):
    """A file's content with one random damage."""
    i, n = random.randrange(len(data)), random.randrange(1, 9)
    flipped = bytearray(data)
    flipped[i] ^= 1 << random.randrange(8)
    return bytes(random.choice((flipped, flipped, flipped, data[:i], data[:i] + data[i + n:],
                                data[:i] + random.randbytes(n) + data[i:])))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer, shards):
    """A folder with a sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    keep(tiny(), folder, val_loss=2.5)
    small = Tokenizer(tokenizer.merges[:20])
    small.save(folder / "tokenizer.json")
    small.to_huggingface(folder / "huggingface")
    small.to_rank_file(folder / "small.tiktoken")
    vocab = read_json(folder / "huggingface" / "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(vocab["vocab"]))
    (folder / "merges.txt").write_text("\n".join(vocab["merges"]), "utf-8")
    data = dict(path="shards/x", sources=[dict(name="x")])
    write_json(folder / "config.json", seal(dict(model={}, train=asdict(TrainConfig()), data=data)))
    rows = [dict(step=step, loss=5.5 - step / 9, val_loss=5.5) for step in range(9)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = dict(context="2 + 2 =", choices=["3", "4"], answer=1, text="2 + 2")
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    header = json.dumps(dict(a=json.loads(entry()), b=json.loads(entry(16, 32, (4,)))))
    (folder / "x.safetensors").write_bytes(safetensors(header[1:-1], body=bytes(32)))
    return folder


SEALED = {  # file: what reads it and gives plain values; whatever happens to it is noticed
    "tokenizer.json": lambda path: Tokenizer.load(path).definition(), "config.json": read_config,
    "card.json": lambda path: read_card(path.parent),
    "step_000001.json": lambda path: str(pick_checkpoint(path.parent, "last").stat()),
    "step_000001.pt": lambda path: {name: w.tolist() for name, w in load_model(
        pick_checkpoint(path.parent, "last"))[0].named_parameters()},
    "train_000000.bin": lambda path: check_shards(path.parent),
    "val_000000.bin": lambda path: check_shards(path.parent)}
FOREIGN = {  # what reads files that know no sha256 of themselves
    "huggingface/tokenizer.json": Tokenizer.from_huggingface, "x.safetensors": read_safetensors,
    "small.tiktoken": Tokenizer.from_rank_file, "rows.jsonl": read_rows,
    "vocab.json": lambda path: Tokenizer.from_gpt2(path, path.with_name("merges.txt")),
    "merges.txt": lambda path: Tokenizer.from_gpt2(path.with_name("vocab.json"), path),
    "log.jsonl": lambda path: train.draw_loss(path.parent), "step_000001.pt": load_model,
    "train_000000.bin": read_shard}
ROUNDS = pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=slow)])


@ROUNDS
@pytest.mark.parametrize("name", SEALED)
def test_no_damage_of_a_file_of_ours_is_silent(tmp_path, sound, name, rounds):
    shutil.copytree(sound, tmp_path / "x")
    path, random = tmp_path / "x" / name, Random(0)
    before, data = SEALED[name](path), path.read_bytes()
    for _ in range(rounds):
        path.write_bytes(damaged(data, random))
        try:
            assert SEALED[name](path) == before
        except (ValueError, OSError) as error:
            assert name.split(".")[0] in str(error) and "\n" not in str(error)


@ROUNDS
@pytest.mark.parametrize("name", FOREIGN)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, sound, name, rounds):
    shutil.copytree(sound, tmp_path / "x")
    path, random = tmp_path / "x" / name, Random(0)
    FOREIGN[name](path)
    data = path.read_bytes()
    for _ in range(rounds if name != "log.jsonl" else rounds // 15):  # which draws a picture
        path.write_bytes(damaged(data, random))
        try:
            FOREIGN[name](path)
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1


# -----------------------------------------------------------------------------
# Whole commands on a folder in which one bit has changed.


@pytest.fixture(scope="module")
def place(tmp_path_factory, shards):
    """A folder with a run of four steps and the shards it was trained on."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(shards, place / "words")
    train.train(TrainConfig(
        data=str(place / "words"), out=str(place / "run"), n_layer=2, n_head=2, n_embd=32,
        block_size=32, max_steps=4, batch_size=4, micro_batch_size=4, eval_every=2,
        eval_sequences=4, sample_tokens=4, precision="fp32", device="cpu"), say=lambda text: None)
    return place


def sampled(call, run):
    """-> (what the command gave, its lines beside that)"""
    return call(sample, run, "--seed=1", "--max_new_tokens=9", "--device=cpu")


def evaluated(call, run):
    text, notes = call(evaluate, run, "--max_tokens=500", "--n_questions=9", "--device=cpu")
    return "\n".join(text.splitlines()[1:]), notes


def went_on(call, run):
    text, notes = call(train, "--resume", f"--out={run}", "--max_steps=6")
    log = [(row["step"], row["loss"], row.get("val_loss")) for row in read_log(run)]
    model, _ = load_model(pick_checkpoint(run, "last", warn=lambda text: None))
    return (log, [w.tolist() for w in model.parameters()]), text + notes


@pytest.mark.parametrize("command, rounds", [
    (sampled, 1), pytest.param(sampled, 20, marks=slow), pytest.param(evaluated, 8, marks=slow),
    pytest.param(went_on, 8, marks=slow)])
def test_a_flipped_bit_changes_nothing_or_is_said(tmp_path, place, call, command, rounds):
    shutil.copytree(place, tmp_path / "backup")
    expected, _ = command(call, place / "run")
    random, names = Random(rounds), [path.relative_to(tmp_path / "backup") for path in
                                     sorted(tmp_path.glob("backup/*/*")) if path.stat().st_size]
    assert len(names) >= 12
    for name in names * rounds:
        shutil.rmtree(place / "run")
        shutil.copytree(tmp_path / "backup", place, dirs_exist_ok=True)
        flipped = bytearray((place / name).read_bytes())
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        (place / name).write_bytes(flipped)
        found, notes = command(call, place / "run")
        said = [line for line in notes.splitlines() if line.startswith(("warning: ", "error: "))]
        assert said or found == expected, name
        assert not said or name.stem.split(".")[0] in said[0], (name, said)
    shutil.copytree(tmp_path / "backup", place, dirs_exist_ok=True)
