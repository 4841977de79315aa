"""Files from strangers and damaged files: none takes memory, hangs or ends in a traceback."""

import json
import math
import shutil
import time
from dataclasses import asdict
from random import Random

import pytest
import torch
from conftest import keep, tiny

import evaluate
import sample
import train
from chapters import export
from chapters.prompts import read_rows
from data import check_shards, file_hash, read_card, read_documents, read_shard, read_split
from model import GPTConfig, load_model, read_progress, read_safetensors
from sample import pick_checkpoint
from tokenizer import Tokenizer, read_json, write_json
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


@pytest.fixture
def in_little_memory(tmp_path):
    """What a test does must not fill memory."""
    load_model(keep(tiny(), tmp_path / "sound"))  # what torch loads at its first use is not counted
    before = peak_memory()
    yield
    assert peak_memory() - before < 50e6


def with_header(path, change):
    """Let change() work on the header of a safetensors file, a dict; the tensors stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


WRONG_JSON = [None, -1, 2.5, True, "../../x", [[]], {"a": {}}, math.nan, 10**400,
              "a\nb\x1b[2J\ud800"]

# -----------------------------------------------------------------------------
# Checkpoints, and weights that others wrote.


def entry(begin=0, end=16, shape=(2, 2), dtype="F32"):
    return json.dumps(dict(dtype=dtype, shape=shape, data_offsets=[begin, end]))


def safetensors(*rows, body=bytes(16), length=None):
    header = b"{" + ", ".join(rows).encode() + b"}"
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


@pytest.mark.parametrize("data", [
    b"", b"\0" * 7, safetensors(), safetensors('"a": ' + entry(), length=2**63),
    safetensors(length=2**64 - 1), safetensors('"a": ' + entry(), '"b": ' + entry()),
    safetensors('"a": ' + entry(0, 8, (2,))), safetensors('"a": ' + entry(8, 24)),
    safetensors('"a": ' + entry(), '"a": ' + entry(), body=bytes(32)),
    safetensors('"a": ' + entry(0, 0, (0, 2**70))), safetensors('"a": ' + entry(0, 0, (2**70, 0))),
    safetensors('"a": ' + entry(shape=[1] * 10**5)), safetensors('"a": ' + "[" * 10**5),
    safetensors('"a": ' + entry(shape=(10**400, 10**400))), safetensors('"a": 7'),
    safetensors('"a": ' + entry(shape=(True, 4))), safetensors('"a": ' + entry(math.nan, math.inf)),
    safetensors('"a": ' + entry(dtype="F7")), safetensors('"__metadata__": 7', '"a": ' + entry()),
    safetensors('"a": {"dtype": [], "shape": {}, "data_offsets": 7}')], ids=range(20))
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, in_little_memory, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for read in read_safetensors, read_progress, load_model:
        assert "model.safetensors" in refused(read, path)


@pytest.mark.parametrize("shape", [
    dict(n_layer=10**9), dict(n_embd=2**30, n_head=2**30), dict(n_layer=10**9, n_embd=2**30),
    dict(vocab_size=2**31 - 1, n_embd=2**30), dict(n_encoder_layer=10**9, cross=True)], ids=str)
def test_a_config_of_a_huge_model_takes_neither_time_nor_memory(tmp_path, in_little_memory, shape):
    path = keep(tiny(), tmp_path)
    config = json.dumps(asdict(tiny().config) | shape)
    with_header(path, lambda header: header["__metadata__"].update(config=config))
    assert "step_000001.safetensors" in refused(load_model, path)


NO_FIELDS = ["", "{", "7", "null", '"x"', "[1]", "[" * 10**5, '{"n_layer": 2', 7, None, [], {}]
WRONG_WORDS = [("config", "[]"), ("config", '{"n_head": 0}'), ("config", '{"unknown": 1}'),
               ("config", json.dumps({"x" * 10**5: 1})), ("version", "2"), ("version", None),
               ("sha256", "0" * 64), ("sha256", "x" * 10**5), ("sha256", [])]


@pytest.mark.parametrize("name, wrong", [
    *WRONG_WORDS, *(("config", text) for text in NO_FIELDS), *(("progress", text) for text in
                                                               NO_FIELDS)],
    ids=lambda value: repr(value)[:20])
def test_a_checkpoint_with_another_word_about_itself_is_refused(tmp_path, name, wrong):
    path = keep(tiny(), tmp_path)
    with_header(path, lambda header: header["__metadata__"].update({name: wrong}))
    assert "step_000001.safetensors" in refused(load_model, path)


@pytest.mark.parametrize("name", asdict(tiny().config))
def test_a_checkpoint_with_another_config_is_loaded_or_refused_in_one_line(tmp_path, name):
    path, config = keep(tiny(), tmp_path), asdict(tiny().config)
    for wrong in WRONG_JSON:
        text = json.dumps(config | {name: wrong})
        with_header(path, lambda header: header["__metadata__"].update(config=text))
        try:
            load_model(path)
        except ValueError as error:
            assert "step_000001" in str(error) and "\n" not in str(error)


NAME = "transformer.wte.weight"


@pytest.mark.parametrize("change", [
    lambda header: header.pop(NAME), lambda header: header[NAME].update(shape=[32, 64]),
    lambda header: header[NAME].update(dtype="I32"), lambda header: header[NAME].update(shape=[]),
    lambda header: header[NAME].update(shape=[64 * 32]), lambda header: header.pop("__metadata__"),
    *(lambda header, name=name: header.update({name: header.pop(NAME)})
      for name in ("a\nb", "\x1b[2J", "x" * 10**5, "", "\ud800"))], ids=range(11))
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change):
    path = keep(tiny(), tmp_path)
    with_header(path, change)
    assert "step_000001.safetensors" in refused(load_model, path)


def test_weights_of_half_the_bits_are_weights(tmp_path):
    for dtype in torch.float16, torch.bfloat16:
        model, _ = load_model(keep(tiny().to(dtype), tmp_path))
        assert all(p.is_leaf and p.isfinite().all() for p in model.parameters())


def test_weights_that_are_too_large_end_a_sample_in_one_line(tokenizer):
    model = tiny(vocab_size=tokenizer.n_vocab)
    torch.nn.init.constant_(model.lm_head.weight, 3e38)
    assert "not finite" in refused(sample.complete, model, tokenizer)


def test_checkpoints_of_an_older_version_are_refused_by_their_age(tmp_path):
    (tmp_path / "step_000001.pt").write_bytes(b"PK\3\4" + bytes(99))
    assert "older version" in refused(pick_checkpoint, tmp_path)
    assert "older version" in refused(load_model, tmp_path / "step_000001.pt")


@pytest.fixture(scope="module")
def trained():
    """A run that has taken a step."""
    run = new_run(".", tiny(), TrainConfig(max_steps=3), "cpu")
    ids = torch.randint(64, (2, 16))
    take_step(run, run.model, [ids], [ids], 1.0)
    run.step = 1
    return run


@pytest.fixture
def resumed(tmp_path, trained):
    """resumed(change) is the run that its checkpoint gives with change(header) made."""
    def resumed(change=lambda header: None):
        train.save_run(tmp_path, snapshot(trained))
        with_header(tmp_path / "step_000001.safetensors", change)
        return train.load_run(tmp_path, TrainConfig(max_steps=3), "cpu")
    return resumed


def test_a_run_is_resumed_as_it_was(resumed, trained):
    again, before = resumed(), trained
    for found, expected in zip(again.model.parameters(), before.model.parameters()):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(again.optimizer.state_dict(), before.optimizer.state_dict(),
                               rtol=0, atol=0)


def test_an_optimizer_state_that_does_not_fit_the_weights_is_refused(resumed):
    found = {}
    resumed(found.update)
    names = sorted(name for name in found if name.startswith("optimizer."))
    large = [name for name in names if math.prod(found[name]["shape"]) > 1]
    assert len(names) > 20
    for name in names[0], names[-1]:
        assert "step_000001" in refused(resumed, lambda header: header.update(
            {name + "x": header.pop(name)}))
        assert "step_000001" in refused(resumed, lambda header: header.update(
            {"optimizer.x.y": header.pop(name)}))
    for name in large[0], large[-1]:
        shape = [math.prod(found[name]["shape"]), 1]
        assert "step_000001" in refused(resumed, lambda header: header[name].update(shape=shape))


@pytest.mark.slow
def test_progress_of_the_wrong_kind_is_refused(resumed, tmp_path):
    resumed()
    known = read_progress(tmp_path / "step_000001.safetensors")
    del known["config"]
    assert "step" in known
    for name in known:
        for wrong in ("x", -1.5, [["a", "b"]]):
            text = json.dumps(known | {name: wrong})
            try:
                resumed(lambda header: header["__metadata__"].update(progress=text))
            except ValueError as error:
                assert "step_000001" in str(error) and "\n" not in str(error)


# -----------------------------------------------------------------------------
# Shards.


def shard(magic=20240520, version=1, n_tokens=4, body=bytes(8)):
    return b"".join(n.to_bytes(4, "little", signed=True) for n in (magic, version, n_tokens)
                    ) + bytes(1012) + body


@pytest.mark.parametrize("data", [
    b"", b"\0", shard()[:8], shard()[:1024], shard(magic=7), shard(magic=20240801),
    shard(version=7), shard(version=-1), shard(n_tokens=-4), shard(n_tokens=0),
    shard(n_tokens=0, body=b""), shard(n_tokens=2**31 - 1), shard()[:-1], shard() + b"\0",
    shard(20240801, 7)], ids=range(15))
def test_a_file_that_is_no_shard_is_refused(tmp_path, data):
    path = tmp_path / "val_000000.bin"
    path.write_bytes(data)
    assert "val_000000.bin" in refused(read_shard, path)
    assert "val_000000.bin" in refused(read_split, tmp_path, "val")


def test_a_card_that_names_files_elsewhere_is_refused(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "words")
    (tmp_path / "train_000000.bin").write_bytes(shard())
    card = asdict(read_card(shards))
    for name in ("../train_000000.bin", "train_/../../train_000000.bin", "/train_000000.bin"):
        checksums = card["checksums"] | {name: file_hash(tmp_path / "train_000000.bin")}
        write_json(tmp_path / "words" / "card.json", card | dict(checksums=checksums))
        refused(check_shards, tmp_path / "words", ("train", "val", "..", "/"))


# -----------------------------------------------------------------------------
# JSON: tokenizers, cards, configs, logs and rows. It may be edited by hand.

BAD_PATTERNS = ["(" * 400, "[", "\\", "(?#", r"\p{None}"]


@pytest.mark.parametrize("name, values", [
    ("pattern", [None, 7, [], *BAD_PATTERNS]), ("bytes", [None, 7, "", "a" * 256, "\ud800", {}]),
    ("merges", [None, 7, {}, "ab", ["a"], ["a b", "a b"], ["a a", "zz zz"], ["\ud800 a"],
                [["a", 1]], ["a " * 10**5], [[[]]]]),
    ("special_tokens", [None, 7, ["a", "a"], [""], {"a": 10**12}, {"a": -1}, {"a": 0}, {"a": "x"},
                        {"a": 300.5}, {"\ud800": 400}, {"a": 400, "b": 400}, [["a"]], {"a": True}]),
    ("format", [None, "x" * 10**6, [], "byte-level BPE, version 9"])])
def test_a_tokenizer_with_anything_else_in_it_is_refused(tmp_path, tokenizer, name, values):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    state = read_json(path)
    assert name in state
    for value in values:
        path.write_text(json.dumps(state | {name: value}))
        assert "tokenizer.json" in refused(Tokenizer.load, path)


def test_a_split_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr("tokenizer.PATIENCE", 0.1)
    endless = Tokenizer([], pattern=r"(?:a|a)*b|[\s\S]")
    assert "take another" in refused(endless.encode, "a" * 60)
    assert "take another" in refused(list, endless.encode_iterable(["a" * 60]))


def paths_in(value, path=()):
    """The places of all values in nested dicts, as tuples of keys."""
    for key, part in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from paths_in(part, (*path, key))


def with_value(value, path, new):
    return value | {path[0]: with_value(value.get(path[0]), path[1:], new)} if path else new


def test_a_card_with_anything_else_in_it_is_a_card_or_names_the_field(tmp_path, shards):
    card, n_refused = asdict(read_card(shards)), 0
    for path in paths_in(card):
        for wrong in WRONG_JSON:
            (tmp_path / "card.json").write_text(json.dumps(with_value(card, path, wrong)))
            try:
                found = read_card(tmp_path)
                assert found.train["tokens"] * found.val["bytes"] > 0
            except ValueError as error:
                n_refused += 1
                assert str(error).startswith(str(tmp_path / "card.json"))
                assert path[0] in str(error) and "\n" not in str(error)
    assert n_refused > 50


@pytest.fixture
def config(tmp_path):
    """What a run's config.json holds."""
    data = dict(path="shards/x", fingerprint="0")
    write_json(tmp_path / "config.json", dict(
        train=asdict(TrainConfig()), model=asdict(tiny().config), data=data))
    return read_json(tmp_path / "config.json")


def test_a_config_with_anything_else_in_it_is_a_config_or_names_the_field(tmp_path, config):
    n_refused = 0
    for path in paths_in(config):
        for wrong in WRONG_JSON:
            (tmp_path / "config.json").write_text(json.dumps(with_value(config, path, wrong)))
            try:
                read_config(tmp_path / "config.json")
            except ValueError as error:
                n_refused += 1
                assert str(error).startswith(str(tmp_path / "config.json"))
                assert path[0] == "data" or len(path) < 2 or path[1] in str(error)
                assert "\n" not in str(error) and len(str(error)) < 1000
    assert n_refused > 300


def test_files_in_json_can_be_edited_by_hand(tmp_path, config, shards, tokenizer):
    config["train"]["learning_rate"], config["model"]["rope_theta"] = 0.125, 500
    (tmp_path / "config.json").write_text(json.dumps(config, indent=7))
    train_config, model_config, _ = read_config(tmp_path / "config.json")
    assert train_config.learning_rate == 0.125 and model_config.rope_theta == 500
    card = asdict(read_card(shards)) | dict(split="as I say")
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert read_card(tmp_path).split == "as I say"
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<|tool|>", "<|aid|>"), "utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json").special["<|aid|>"] >= 256


@pytest.mark.parametrize("wrong, lost", [
    (dict(), "data, model, train"), (dict(train={}, model={}), "data"),
    (dict(train={}, model={}, data=None), "fingerprint, path"),
    (dict(train={}, model={}, data=dict(path="x")), "fingerprint")])
def test_a_config_says_what_it_lacks(tmp_path, wrong, lost):
    write_json(tmp_path / "config.json", wrong)
    said = refused(read_config, tmp_path / "config.json")
    assert said.endswith(f"it lacks {lost}, so this run cannot go on: begin another with "
                         "--init=RUN")


def test_a_misspelt_field_is_one_line_with_the_nearest(tmp_path, config):
    config["train"]["lerning_rate"] = config["train"].pop("learning_rate")
    write_json(tmp_path / "config.json", config)
    text = refused(read_config, tmp_path / "config.json")
    assert "lerning_rate" in text and "did you mean learning_rate?" in text


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
                                  '{"context": "", "choices": "ab", "answer": 0}', "\ud800"],
                         ids=lambda line: repr(line[:40]))
def test_a_line_that_is_no_question_is_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(line.encode("utf-8", "surrogatepass"))
    assert "rows.jsonl" in refused(read_rows, tmp_path / "rows.jsonl")
    if line.strip("\x85\u2028") and line != '"x"':  # a text alone is a document, too
        assert "rows.jsonl, row 1" in refused(list, read_documents(tmp_path / "rows.jsonl"))


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
    shutil.copytree(shards, folder, dirs_exist_ok=True)
    keep(tiny(), folder, val_loss=2.5)
    small = Tokenizer(tokenizer.merges[:20])
    small.save(folder / "tokenizer.json")
    export.to_huggingface(small, folder / "huggingface")
    export.to_rank_file(small, folder / "small.tiktoken")
    vocab = read_json(folder / "huggingface" / "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(vocab["vocab"]))
    (folder / "merges.txt").write_text("\n".join(vocab["merges"]), "utf-8")
    rows = [dict(step=step, loss=5.5 - step / 9, val_loss=5.5) for step in range(9)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = dict(context="2 + 2 =", choices=["3", "4"], answer=1, text="2 + 2")
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    header = json.dumps(dict(a=json.loads(entry()), b=json.loads(entry(16, 32, (4,)))))
    (folder / "x.safetensors").write_bytes(safetensors(header[1:-1], body=bytes(32)))
    return folder


def weights(path):
    return {name: w.tolist() for name, w in load_model(path)[0].named_parameters()}


READERS = {
    "tokenizer.json": Tokenizer.load, "card.json": lambda path: read_card(path.parent),
    "step_000001.safetensors": load_model, "x.safetensors": read_safetensors,
    "train_000000.bin": read_shard, "rows.jsonl": read_rows,
    "log.jsonl": lambda path: read_log(path.parent),
    "huggingface/tokenizer.json": export.from_huggingface, "small.tiktoken": export.from_rank_file,
    "vocab.json": lambda path: Tokenizer.from_gpt2(path, path.with_name("merges.txt")),
    "merges.txt": lambda path: Tokenizer.from_gpt2(path.with_name("vocab.json"), path)}
CHECKED = {  # what carries a checksum, or has its own in another file: no damage of it is silent
    "step_000001.safetensors": weights,
    "train_000000.bin": lambda path: asdict(check_shards(path.parent)),
    "val_000000.bin": lambda path: asdict(check_shards(path.parent))}
ROUNDS = pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=slow)])


@ROUNDS
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, sound, name, rounds):
    shutil.copytree(sound, tmp_path / "x")
    path, random = tmp_path / "x" / name, Random(0)
    READERS[name](path)
    data = path.read_bytes()
    for _ in range(rounds):
        path.write_bytes(damaged(data, random))
        start = time.perf_counter()
        try:
            READERS[name](path)
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1
        assert time.perf_counter() - start < 10


@ROUNDS
@pytest.mark.parametrize("name", CHECKED)
def test_no_damage_of_weights_and_tokens_is_silent(tmp_path, sound, name, rounds):
    shutil.copytree(sound, tmp_path / "x")
    path, random = tmp_path / "x" / name, Random(0)
    before, data = CHECKED[name](path), path.read_bytes()
    for _ in range(rounds):
        path.write_bytes(damaged(data, random))
        try:
            assert CHECKED[name](path) == before
        except (ValueError, OSError) as error:
            assert name.split(".")[0] in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("data", [b"", b"[" * 10**6, b"[]", b"7", b"{}", b'{"a": 1', b"\xff",
                                  b"NaN", b'{"a": ' * 10**5, b"9" * 10**5, b'"' + b"a" * 10**5],
                         ids=lambda data: str(data[:8]))
def test_json_of_the_wrong_kind_is_refused_by_every_reader(tmp_path, data):
    for name in "tokenizer.json", "huggingface/tokenizer.json", "card.json":
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        assert path.name in refused(READERS[name], path)


# -----------------------------------------------------------------------------
# Whole commands on a folder in which one bit has changed.


@pytest.fixture(scope="module")
def place(tmp_path_factory, shards):
    """A folder with a run of four steps and the shards it was trained on."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(shards, place / "words")
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32)
    train.train(TrainConfig(
        data=str(place / "words"), out=str(place / "run"), max_steps=4, batch_size=4,
        micro_batch_size=4, eval_every=2, eval_sequences=4, sample_tokens=4, precision="fp32",
        device="cpu"), shape, say=lambda text: None)
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
    return (log, weights(pick_checkpoint(run, "last"))), text + notes


@pytest.mark.parametrize("command, rounds", [
    (sampled, 1), pytest.param(sampled, 9, marks=slow), pytest.param(evaluated, 3, marks=slow),
    pytest.param(went_on, 5, marks=slow)])
def test_a_flipped_bit_of_weights_or_tokens_changes_nothing_or_is_said(tmp_path, place, call,
                                                                       command, rounds):
    shutil.copytree(place, tmp_path / "backup")
    expected, _ = command(call, place / "run")
    random, names = Random(rounds), [path.relative_to(tmp_path / "backup") for path in
                                     sorted(tmp_path.glob("backup/*/*")) if path.stat().st_size]
    assert len(names) >= 8
    for name in names * rounds:
        shutil.rmtree(place / "run")
        shutil.copytree(tmp_path / "backup", place, dirs_exist_ok=True)
        flipped = bytearray((place / name).read_bytes())
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        (place / name).write_bytes(flipped)
        found, notes = command(call, place / "run")
        said = [line for line in notes.splitlines() if line.startswith(("warning: ", "error: "))]
        assert "Traceback" not in notes
        if name.suffix in (".safetensors", ".bin"):  # words may change without anybody's notice
            assert said or found == expected, name
            assert not said or name.stem in said[0], (name, said)
    shutil.copytree(tmp_path / "backup", place, dirs_exist_ok=True)
