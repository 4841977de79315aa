"""chapters/doctor.py: ill runs are told what they have, healthy ones that they have nothing."""

import argparse
import json
import json.decoder
import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import keep, run, tiny

from chapters import doctor
from chapters.doctor import diagnose, read_run
from chapters.nonfinite import first_bad
from data import prepare
from model import GPTConfig, load_model
from sample import checkpoints
from tokenizer import write_json
from train import TrainConfig, train

slow = pytest.mark.slow
QUIET = dict(say=lambda text: None)


def configure(shards, out, architecture="modern", dropout=0.0, **options):
    """A run of seconds: two layers of 64 channels, the other options as they are by default."""
    small = dict(max_steps=100, batch_size=8, micro_batch_size=8, eval_every=20, eval_sequences=8,
                 sample_tokens=1, precision="fp32", device="cpu", kernels="torch")
    shape = GPTConfig(architecture, n_layer=2, n_head=2, n_embd=64, block_size=32, dropout=dropout)
    return TrainConfig(data=str(shards), out=str(out), **(small | options)), shape


def fall_ill(config, shape=None):
    """Train -> the illnesses found in the run."""
    try:
        train(config, shape, **QUIET)
    except ValueError as error:
        assert "not finite" in str(error)
    return [finding.illness for finding in diagnose(*read_run(config.out))]


def begin_with(configured, change, step=0):
    """Train one step, change the weights, and let the run go on from there as if after `step`."""
    config, shape = configured
    train(replace(config, max_steps=1), shape, **QUIET)
    path = checkpoints(config.out)[1]
    model, state = load_model(path)
    with torch.no_grad():
        change(model)
    path.unlink()
    keep(model, config.out, **state | dict(step=step, sequences=0))
    return replace(config, resume=True)


def shards_of(folder, text):
    """Shards of a text."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return prepare([folder / "text.txt"], folder / "shards", vocab_size=280, **QUIET)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """Shards of a little Python: the source of two modules that are on every machine."""
    files = [argparse.__file__, json.decoder.__file__]
    return prepare(files, tmp_path_factory.mktemp("prose") / "shards", vocab_size=400, **QUIET)


# -----------------------------------------------------------------------------
# Runs that have it.


@slow
@pytest.mark.parametrize("options", [
    dict(learning_rate=10.0), dict(learning_rate=10.0, optimizer="adamw"),
    dict(learning_rate=3.0, schedule="constant")])
def test_a_rate_that_throws_the_loss_above_its_start_is_too_high(prose, tmp_path, options):
    assert "learning rate too high" in fall_ill(*configure(prose, tmp_path / "run", **options))


@slow
@pytest.mark.parametrize("options", [
    dict(learning_rate=1e-7), dict(learning_rate=1e-4, optimizer="adamw"),
    dict(learning_rate=1e-5, schedule="constant"), dict(warmup_steps=10_000)])
def test_a_rate_that_hardly_moves_the_loss_is_too_low(prose, tmp_path, options):
    assert fall_ill(*configure(prose, tmp_path / "run", **options)) == ["learning rate too low"]


def test_a_number_gone_bad_is_traced_to_its_module(prose, tmp_path, call):
    config = begin_with(configure(prose, tmp_path / "run"), lambda model: model.transformer
                        .blocks[1].mlp.up_proj.weight[0, 0].fill_(math.inf), step=1)
    assert fall_ill(config) == ["not a number"]
    assert "first in transformer.blocks.1.mlp.up_proj, in sequence 0" in call(doctor, config.out)[0]
    path = tmp_path / "run" / "config.json"
    text = path.read_text("utf-8").replace('"fingerprint": "', '"fingerprint": "another ')
    path.write_text(text, "utf-8")  # no sequence of another text is looked at
    assert "where   unknown: it takes" in call(doctor, config.out)[0]


def test_an_absurd_rate_ends_in_no_number(prose, tmp_path):
    config, shape = configure(prose, tmp_path / "run", learning_rate=2e9, optimizer="adamw")
    assert fall_ill(config, shape) == ["not a number"]
    finding, = diagnose(*read_run(config.out))
    assert "--learning_rate=2e+08" in finding.change and "before it step 4" in finding.seen


@pytest.mark.parametrize("where, name", [
    ("transformer.wte.weight", "transformer.wte"),
    ("transformer.blocks.1.attn.q_proj.weight", "transformer.blocks.1.attn.q_proj")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_module_with_a_number_gone_bad_is_named(where, name, value):
    model, blocks = tiny(), torch.arange(9).view(1, 9)
    assert first_bad(model, blocks) == ""
    model.get_parameter(where).data[0] = value
    assert first_bad(model, blocks) == name


def test_a_gradient_gone_bad_is_named_where_all_outputs_are_finite():
    model = tiny()
    model.transformer.blocks[1].mlp.register_full_backward_hook(
        lambda module, d_inputs, d_outputs: tuple(d * math.inf for d in d_inputs))
    name = first_bad(model, torch.arange(9).view(1, 9))
    assert name == "the gradient of transformer.blocks.1.mlp_norm.weight"


@slow
def test_large_first_weights_are_a_bad_start(prose, tmp_path):
    config = begin_with(configure(prose, tmp_path / "run", max_steps=25, architecture="gpt2"),
                        lambda model: model.transformer.wte.weight.mul_(50))
    assert fall_ill(config) == ["bad start"]


@slow
def test_a_start_below_chance_means_the_weights_are_not_new(prose, tmp_path):
    train(*configure(prose, tmp_path / "old", max_steps=60), **QUIET)
    old = load_model(checkpoints(tmp_path / "old")[60])[0].state_dict()
    config = begin_with(configure(prose, tmp_path / "new", max_steps=10),
                        lambda model: model.load_state_dict(old))
    assert fall_ill(config) == ["low start"]


@slow
def test_weights_of_zero_are_a_dead_run(prose, tmp_path):
    config = begin_with(configure(prose, tmp_path / "run", max_steps=60), lambda model:
                        [weight.zero_() for weight in model.parameters()])
    assert fall_ill(config) == ["dead run"]


@slow
def test_a_few_sentences_read_a_hundred_times_are_overfitted(shards, tmp_path):
    text = "".join((shards.parent / "words.txt").read_text("utf-8").splitlines(True)[:40])
    found = fall_ill(*configure(shards_of(tmp_path, text), tmp_path / "run", max_steps=150))
    assert found[0] == "overfitting" and "data repeats" in found


@slow
def test_a_solved_text_is_too_good_to_be_true(tmp_path):
    shards = shards_of(tmp_path, "round and round it goes. " * 4000)
    found = fall_ill(*configure(shards, tmp_path / "run", schedule="constant"))
    assert "too good to be true" in found


@slow
def test_a_loss_at_the_floor_of_its_text_is_a_plateau(shards, tmp_path):
    assert fall_ill(*configure(shards, tmp_path / "run", max_steps=250)) == ["plateau"]


@slow
def test_a_run_cut_off_in_its_steepest_fall_is_underfitting(prose, tmp_path):
    configured = configure(prose, tmp_path / "run", max_steps=60, architecture="gpt2")
    assert fall_ill(*configured) == ["underfitting"]


@slow
@pytest.mark.parametrize("recovers", [True, False])
def test_a_burst_of_a_huge_rate_is_a_spike(prose, tmp_path, recovers):
    config, shape = configure(prose, tmp_path / "run", schedule="constant", max_steps=60)
    train(config, shape, **QUIET)
    train(replace(config, resume=True, max_steps=61, learning_rate=0.6), **QUIET)
    found = fall_ill(replace(config, resume=True, max_steps=120 if recovers else 66))
    assert found[0] == "spike"
    assert ("not back" in diagnose(*read_run(config.out))[0].seen) != recovers


# -----------------------------------------------------------------------------
# Runs that have nothing.


@slow
@pytest.mark.parametrize("options", [
    dict(), dict(schedule="cosine", dropout=0.1), dict(schedule="wsd", batch_size=16),
    dict(architecture="gpt2", max_steps=200), dict(optimizer="adamw", learning_rate=0.01)])
def test_a_healthy_run_is_healthy_whatever_its_options(prose, tmp_path, options):
    assert fall_ill(*configure(prose, tmp_path / "run", **options)) == []


@pytest.mark.slow
def test_a_healthy_run_is_not_suspected_while_it_runs(prose, tmp_path):
    train(*configure(prose, tmp_path / "run", max_steps=60), **QUIET)
    rows, config = read_run(tmp_path / "run")
    config["train"] = replace(config["train"], max_steps=1000)
    assert not any(diagnose(rows[:n], config) for n in range(1, len(rows) + 1))


# -----------------------------------------------------------------------------
# Logs as they are found, and the command.


def write_run(folder, lines):
    folder.mkdir()
    config = dict(model=asdict(GPTConfig(vocab_size=300, block_size=8)),
                  train=asdict(TrainConfig(max_steps=100)),
                  data=dict(path="", fingerprint="", train=dict(tokens=10_000)))
    write_json(folder / "config.json", config)
    (folder / "log.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


ROW = '{"step": %d, "loss": %f, "lr": 0.02, "grad_norm": 1.0, "mfu": null, "memory": null}'
BAD = '{"step": %d, "loss": null, "lr": 0.02, "skipped": "not finite", "sequences": [0, 7]}'
FALLING = [ROW % (step, 5.7 - step / 20) for step in range(1, 40)]


@pytest.mark.parametrize("lines, words", [
    ([], "no row yet"), (['{"step": 1, "lo'], "no row yet"), (["7", "[]"], "no row yet"),
    ([ROW % (1, 5.7)], "too few rows"),
    (['{"step": 1, "loss": 5.7}'], "too few rows"),
    ([ROW % (step, 5.0) for step in range(50, 60)], "too few rows"),
    (['{"step": 1, "loss": NaN, "grad_norm": NaN}'], "step 1 loss or gradient is not finite"),
    ([ROW % (1, 5.7), BAD % 2, BAD % 3], "step 2 loss or gradient is not finite; before it step 1"),
    ([ROW % (1, 5.7), BAD % 2], "where   unknown: it takes a checkpoint from before"),
    (FALLING + ['{"step": 40, "lo'], "healthy"),
    (FALLING + [BAD % 40, ROW % (41, 3.6)], "1 of 41 steps had no finite loss or gradient")])
def test_any_log_gets_an_answer(tmp_path, call, lines, words):
    shown = "".join(call(doctor, write_run(tmp_path / "run", lines)))
    assert words in shown and "Traceback" not in shown


@pytest.mark.parametrize("files, words", [
    ([], "is no run: it lacks the config.json"), (["config.json"], "it lacks the log.jsonl"),
    (["log.jsonl"], "it lacks the config.json"),
    (["config.json", "log.jsonl"], "config.json cannot be read")])
def test_a_folder_that_is_no_run_is_refused_in_a_line(tmp_path, call, files, words):
    for name in files:
        (tmp_path / name).write_text("{}", "utf-8")
    shown, error = call(doctor, tmp_path)
    assert words in error and not shown and len(error.splitlines()) == 1


def test_a_config_edited_by_hand_is_read_and_one_of_another_version_is_refused(tmp_path, call):
    path = write_run(tmp_path / "run", FALLING) / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config = {name: dict(reversed(part.items())) for name, part in reversed(config.items())}
    text = json.dumps(config, indent=7).replace('"learning_rate": 0.02', '"learning_rate"  :1E-2')
    path.write_text(text, "utf-8")
    assert "1E-2" in text and "healthy" in call(doctor, path.parent)[0]
    for old, new, message in (("grad_clip", "grad_clips", "unknown field 'grad_clips', did you "),
                              ("1E-2", '"fast"', "learning_rate='fast' must be float")):
        path.write_text(text.replace(old, new), "utf-8")
        shown, error = call(doctor, path.parent)
        assert message in error and "config.json" in error and not shown and error.count("\n") == 1


def test_the_newest_run_is_examined_by_default(shards, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run in runs" in call(doctor)[1]
    train(*configure(shards, tmp_path / "runs" / "new", max_steps=2), **QUIET)
    assert "new: 2 steps, 100% of the run" in call(doctor)[0]


@pytest.mark.slow
def test_the_doctor_can_be_called_as_a_file_from_another_folder(tmp_path):
    write_run(tmp_path / "run", FALLING)
    assert "healthy" in run("chapters/doctor.py", "run", cwd=tmp_path).stdout
