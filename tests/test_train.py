"""train.py: a run learns, resumes as if it had never stopped, and is the same on two processes."""

import contextlib
import copy
import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, mistake, run, tiny
from matplotlib.axes import Axes

from data import TokenLoader, prepare
from model import GPTConfig, accelerator, load_model
from sample import checkpoints
from tokenizer import parse_options
from train import (OPTIMIZERS, SCHEDULES, Muon, Optimizer, TrainConfig, announce, build_optimizer,
                   complete_options, draw_loss, gradients, last_step, learning_rate, main,
                   micro_batches, new_run, plain_orthogonal, prepare_run, progress_line, read_log,
                   smooth, take_step, to_device, train, validation_loss)

slow = pytest.mark.slow
SMALL = dict(max_steps=8, batch_size=8, micro_batch_size=8, eval_every=4, eval_sequences=8,
             warmup_steps=2, sample_tokens=4, precision="fp32", device="cpu", kernels="torch",
             n_layer=2, n_head=2, n_embd=32, block_size=32)
QUIET = dict(say=lambda text: None)


def configure(shards, out, **options):
    """What train() takes for a run of a few seconds: (TrainConfig, GPTConfig) with two layers, 32
    channels, float32. Options are fields of both."""
    typed = SMALL | dict(data=str(shards), out=str(out)) | options
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    return complete_options({name: value for name, value in typed.items() if name in names},
                            {name: value for name, value in typed.items() if name not in names})


def command(shards, out, *options):
    """The same run as words of a command line."""
    typed = SMALL | dict(data=shards, out=out)
    return [f"--{name}={value}" for name, value in typed.items()] + list(options)


def weights(folder):
    found = checkpoints(folder)
    return load_model(found[max(found)])[0].state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


# -----------------------------------------------------------------------------
# The pieces of a step.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_warms_up_and_then_only_falls(schedule):
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1,
                         schedule=schedule)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_wsd_stays_at_the_top_until_its_decay():
    config = TrainConfig(max_steps=100, warmup_steps=0, learning_rate=1.0, schedule="wsd",
                         decay_ratio=0.2)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:80] == [1.0] * 80 and rates[90] == pytest.approx(0.5)


def test_the_clock_can_be_ahead_of_the_steps():
    config = TrainConfig(max_steps=100, warmup_steps=0)
    assert learning_rate(10, config, progress=1.0) == learning_rate(100, config)


@pytest.mark.parametrize("lengths, steps", [
    (dict(max_steps=7), 7), (dict(tokens=450), 5), (dict(epochs=2), 20),
    (dict(epochs=2, max_steps=5), 5),
    (dict(minutes=1), math.inf)])
def test_a_run_ends_at_the_first_limit_reached(lengths, steps):
    assert last_step(TrainConfig(**lengths), n_tokens=1000, tokens_per_step=100) == steps


def test_decay_is_for_matrices_only():
    model, config = tiny("gpt2"), TrainConfig(weight_decay=0.3, optimizer="adamw")
    decayed, rest = build_optimizer(model, config).param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.3
    assert {p.dim() for p in rest["params"]} == {1} and rest["weight_decay"] == 0
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny("gpt2")
    ours, rest = build_optimizer(model, TrainConfig()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[1] for p in ours["params"]} == {"blocks"} and ours["muon"]
    assert {p.dim() for p in ours["params"]} == {2} and not rest["muon"]
    assert len(ours["params"]) + len(rest["params"]) == len(names)


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_directions():
    x = torch.randn(20, 30)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    rotated = u.T @ plain_orthogonal(x) @ v.T
    assert 0.6 < rotated.diagonal().min() and rotated.diagonal().max() < 1.3
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-3


def test_muon_takes_torchs_steps_within_bfloat16():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 12), (8, 12), (12, 8)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.02, weight_decay=0.1)
    optimizers = (Muon([dict(params=ours, muon=True)], **options),
                  torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="original", **options))
    for _ in range(5):
        for p, twin in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, twin in zip(ours, theirs):
        torch.testing.assert_close(p, twin, rtol=0, atol=5e-3)


def test_muon_goes_on_from_a_state_dict_of_muon():
    models = tiny("gpt2"), tiny("gpt2", seed=1)
    ours, theirs = (build_optimizer(model, TrainConfig()) for model in models)

    def step(model, optimizer):
        model(*torch.arange(32).view(2, 1, 16))[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    step(models[0], ours)
    models[1].load_state_dict(models[0].state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    step(models[0], ours)
    step(models[1], theirs)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_in_groups_that_are_not_its_own_muon_is_adamw():
    ours, theirs = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    options = dict(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9))
    optimizers = (Muon([dict(params=[ours], muon=False)], **options),
                  torch.optim.AdamW([theirs], **options))
    for _ in range(3):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n_tokens, words", [
    (10**3, "see its 1,000 tokens 16.4 times; more than 8"), (8192, "tokens 2.0 times"),
    (10**6, "its 1,000,000 tokens 0.0 times; a smaller --size or more --minutes")])
def test_too_little_text_and_too_short_a_run_are_announced(tmp_path, n_tokens, words):
    run = new_run(tmp_path, tiny(), TrainConfig(batch_size=16, max_steps=64), "cpu")
    run.batches = SimpleNamespace(n_tokens=n_tokens, block_size=16)
    first, second, third = announce(run, 64, dict(tokens_per_second=512, memory=2e9)).splitlines()
    assert first.endswith("in about 64 steps of 0.50 s (00:32) and 2.0 GB")
    assert second.startswith("on cpu, auto") and words in third


def test_a_run_says_which_kernels_were_tried_and_what_memory_it_takes(shards, tmp_path):
    said = []
    config, shape = configure(shards, tmp_path / "run", max_steps=2, kernels="auto")
    train(config, shape, say=said.append)
    tried = r" GB\non cpu, fp32, (fused|torch) kernels(, (fused|torch) \d+ ms a block)*\n"
    assert re.search(tried, said[0])
    chosen = json.loads((tmp_path / "run" / "config.json").read_bytes())["train"]["kernels"]
    assert chosen in ("fused", "torch")


@pytest.mark.parametrize("progress, parts", [(0.0, 8), (0.2, 4), (0.4, 2), (0.6, 1), (1.0, 1)])
def test_a_curriculum_cuts_rows_and_loses_no_token(progress, parts):
    batch = [torch.arange(32).view(2, 16).numpy(), torch.arange(1, 33).view(2, 16).numpy()]
    [short] = micro_batches(iter([batch]), 1, tiny(), progress, 0.6)
    for ids, own in zip(short, batch, strict=True):
        assert ids.shape == (2 * parts, 16 // parts) and [*ids.flatten()] == [*own.flatten()]


def steps_on(shards, take, device="cpu", rows=8, n=1, **options):
    """The (loss, length of the gradient) of n steps on 8 sequences, `rows` at a time."""
    config = TrainConfig(precision="fp32", learning_rate=0.01, **options)
    model = tiny(vocab_size=320).to(device)
    model.use("torch")
    run, batches = new_run("", model, config, device), TokenLoader(shards, rows, 16)
    take, results = take(run, model), []
    for _ in range(n):
        xs, ys = zip(*(to_device(next(batches), model) for _ in range(8 // rows)))
        results.append([value.item() for value in take(xs, ys)])
    return results


def as_it_is(run, model):
    return lambda xs, ys: take_step(run, model, xs, ys, 1.0)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_step_in_parts_is_the_step_on_the_whole_batch(shards, rows):
    parts, whole = (steps_on(shards, as_it_is, rows=rows, n=3, optimizer="adamw")
                    for rows in (rows, 8))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("rows", [4, 8])
def test_a_step_replayed_as_a_cuda_graph_is_the_step(shards, rows):
    def graphed(run, model):
        return accelerator().GraphedStep(as_it_is(run, model))

    options = dict(device="cuda", rows=rows, n=12, cuda_graph=True)
    torch.testing.assert_close(steps_on(shards, graphed, **options),
                               steps_on(shards, as_it_is, **options), rtol=1e-3, atol=1e-4)


def test_an_id_that_the_model_does_not_know_is_refused_on_its_way_to_the_device(shards):
    batch = next(TokenLoader(shards, 2, 16))
    with pytest.raises(ValueError, match="is not from 0 to 19: vocab_size=20"):
        to_device(batch, tiny(vocab_size=20))


@pytest.mark.parametrize("options", [dict(micro_batch_size=2), dict(micro_batch_size=5),
                                     dict(eval_sequences=11)])
def test_validation_is_the_mean_over_as_many_sequences_as_asked(shards, options):
    config, model = TrainConfig(**dict(eval_sequences=8) | options), tiny(vocab_size=320)
    batch = next(TokenLoader(shards, config.eval_sequences, 16, split="val"))
    with torch.no_grad():
        _, mean = model(*to_device(batch, model))
    assert validation_loss(model, shards, config) == pytest.approx(mean.item(), rel=1e-5)


# -----------------------------------------------------------------------------
# Whole runs.


def test_a_run_learns_and_leaves_a_self_contained_folder(shards, tmp_path):
    summary = train(*configure(shards, tmp_path / "run", max_steps=60, eval_every=30,
                               learning_rate=0.01))
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(math.log(320), abs=0.2)
    assert summary["val_loss"] < 0.6 * rows[0]["loss"]
    assert summary["bits_per_byte"] < 4 and not summary["stopped"]
    assert set(rows[-1]) == {
        "step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory",
        "elapsed"}
    assert {path.name for path in (tmp_path / "run").glob("[!.]*")} == {
        "config.json", "tokenizer.json", "log.jsonl", "loss.png", "step_000030.safetensors",
        "step_000060.safetensors"}


@pytest.mark.parametrize("options", [
    dict(optimizer="adamw", schedule="cosine", dropout=0.1),
    *(pytest.param(options, marks=slow) for options in [
        dict(precision="fp16"), dict(precision="bf16"), dict(micro_batch_size=2, curriculum=0.9),
        dict(architecture="gpt2", kernels="plain", dropout=0.1),
        dict(recompute=True, dropout=0.1, window=8, softcap=10.0, z_loss=1e-4,
             label_smoothing=0.1)])])
def test_a_resumed_run_equals_one_that_never_stopped(shards, tmp_path, options):
    train(*configure(shards, tmp_path / "whole", **options))
    config, shape = configure(shards, tmp_path / "half", **options)
    stop_after(5, config, shape)
    train(dataclasses.replace(config, resume=True))
    rows = [[(row["step"], row["loss"], row.get("val_loss")) for row in read_log(tmp_path / name)]
            for name in ("whole", "half")]
    assert rows[0] == rows[1]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "half"))


def stop_after(steps, config, shape):
    """Train until the log has so many lines, then press Ctrl-C once."""
    import train as module
    inner = module.clip_gradients

    def press(*arguments):
        if len(read_log(config.out)) == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return inner(*arguments)

    module.clip_gradients = press
    try:
        assert train(config, shape)["stopped"]
    finally:
        module.clip_gradients = inner
    assert max(checkpoints(config.out)) == steps


@slow
def test_low_memory_changes_no_weight(shards, tmp_path):
    for name, low_memory in (("kept", False), ("handed_back", True)):
        words = command(shards, tmp_path / name, *["--low_memory"] * low_memory)
        assert run("train.py", *words, cwd=tmp_path).returncode == 0
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "handed_back"))


def test_the_best_and_the_last_checkpoint_are_kept(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=12, eval_every=2,
                              learning_rate=0.3)
    train(dataclasses.replace(config, max_steps=6), shape)
    train(dataclasses.replace(config, resume=True, keep_last=1))  # counted from disk
    losses = {row["step"]: row["val_loss"] for row in read_log(config.out) if "val_loss" in row}
    assert set(checkpoints(config.out)) == {12, min(losses, key=losses.get)}


@pytest.mark.slow
def test_minutes_end_a_run_with_its_rate_decayed(shards, tmp_path):
    build_optimizer(tiny(), TrainConfig())  # the first one of a process imports for seconds
    summary = train(*configure(shards, tmp_path / "run", max_steps=0, minutes=0.05,
                               eval_every=10_000))
    rates = [row["lr"] for row in read_log(tmp_path / "run")]
    assert summary["val_loss"] and rates[-1] == min(rates[2:]) < max(rates)


def test_patience_ends_a_run_that_gets_no_better(shards, tmp_path):
    summary = train(*configure(shards, tmp_path / "run", max_steps=1000, eval_every=2, patience=3,
                               learning_rate=1e-30))
    assert summary["step"] < 20 and not summary["stopped"]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_in_the_log(shards, tmp_path):
    with pytest.raises(ValueError, match="is not finite at step .* in a row; .*; python -m"):
        train(*configure(shards, tmp_path / "run", learning_rate=1e9, max_steps=50, bad_steps=3))
    last = read_log(tmp_path / "run")[-1]
    assert last["grad_norm"] is None and last["skipped"] == "not finite"
    draw_loss(tmp_path / "run")


def test_a_config_goes_out_and_in_again(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=2, dropout=0.1)
    train(config, shape)
    path = str(tmp_path / "run" / "config.json")
    again, same_shape = complete_options(dict(config=path, out="other", epochs=3.0), {})
    changed = dict(config=path, out="other", epochs=3.0, max_steps=0)
    assert again == dataclasses.replace(config, **changed)
    assert dataclasses.asdict(same_shape) | dict(vocab_size=320) == dataclasses.asdict(
        dataclasses.replace(shape, vocab_size=320))


def test_a_config_edited_by_hand_is_checked_field_by_field(shards, tmp_path):
    train(*configure(shards, tmp_path / "run", max_steps=1))
    path = tmp_path / "run" / "config.json"
    for edit, words in [(dict(lerning_rate=1), "'lerning_rate', did you mean learning_rate?"),
                        (dict(batch_size="many"), "batch_size='many' must be int"),
                        (dict(beta1=2), "beta1=2 must be")]:
        saved = json.loads(path.read_bytes())
        (tmp_path / "edited.json").write_text(json.dumps(saved | dict(train=saved["train"] | edit)))
        with pytest.raises(ValueError, match=re.escape(words)):
            complete_options(dict(config=str(tmp_path / "edited.json")), {})


def test_a_new_size_is_a_new_model_and_any_other_option_changes_the_old(shards, tmp_path):
    train(*configure(shards, tmp_path / "run", max_steps=1, n_head=4, n_kv_head=1, softcap=9.0))
    path = str(tmp_path / "run" / "config.json")
    _, changed = complete_options(dict(config=path), dict(n_layer=3))
    assert (changed.n_layer, changed.n_kv_head, changed.softcap) == (3, 1, 9.0)
    _, new = complete_options(dict(config=path, size="nano"), dict(n_layer=3))
    assert (new.n_layer, new.n_head, new.n_embd, new.softcap) == (3, 2, 96, 0.0)


def test_options_of_the_model_are_those_of_its_config(tmp_path, monkeypatch):
    _, shape = complete_options({}, dict(bias=True, tied=True, norm_first=False, rope_theta=500.0))
    assert isinstance(shape, GPTConfig) and shape.n_layer == 4
    assert (shape.bias, shape.tied, shape.norm_first, shape.rope_theta) == (True, True, False, 500)


def test_a_finished_run_is_left_as_it_is_until_it_is_given_more(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=2)
    train(config, shape)
    before = weights(tmp_path / "run")
    train(dataclasses.replace(config, resume=True))
    assert same(before, weights(tmp_path / "run"))
    assert train(dataclasses.replace(config, resume=True, max_steps=3))["step"] == 3


def test_a_folder_with_a_run_is_not_overwritten(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=1)
    train(config, shape)
    with pytest.raises(ValueError, match="holds a run: add --resume, or choose another --out"):
        train(config, shape)


def test_resume_refuses_data_of_another_tokenizer(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=1)
    train(config, shape)
    other = prepare([shards.parent / "words.txt"], tmp_path / "other", vocab_size=300, **QUIET)
    with pytest.raises(ValueError, match="another tokenizer; another corpus"):
        train(dataclasses.replace(config, data=str(other), resume=True))


def test_a_log_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "utf-8")
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}]
    draw_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_says_that_its_rate_jumps_and_rewarm_climbs(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=8, learning_rate=0.01)
    train(config, shape, **QUIET)
    shutil.copytree(tmp_path / "run", tmp_path / "warm")
    said = []
    train(dataclasses.replace(config, resume=True, max_steps=16), say=said.append)
    rates = [row["lr"] for row in read_log(tmp_path / "run")]
    assert rates[8] > 2 * rates[7] and any(
        "jumps from 1.7e-03 to 5.7e-03" in line and "--rewarm" in line for line in said)
    more = dict(resume=True, max_steps=16, out=str(tmp_path / "warm"))
    said.clear()
    warm = dataclasses.replace(config, **more | dict(rewarm=True, eval_every=3))
    train(warm, say=said.append)
    assert not any("jumps" in line for line in said)
    warm = [row["lr"] for row in read_log(tmp_path / "warm")]
    assert warm[8:11] == pytest.approx([0.005, 0.01, 0.01])  # in two steps, as in the beginning
    assert warm[10:] == sorted(warm[10:], reverse=True) and warm[15] < 0.004


@pytest.mark.slow
def test_a_schedule_that_began_anew_goes_on_after_a_stop(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "a", max_steps=4)
    train(config, shape, **QUIET)
    warm = dataclasses.replace(config, resume=True, rewarm=True, max_steps=12, eval_every=3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(warm, **QUIET)
    train(dataclasses.replace(warm, out=str(tmp_path / "b"), max_steps=9), **QUIET)
    for path in [path for step, path in checkpoints(tmp_path / "b").items() if step == 9]:
        path.unlink()  # as if it had been stopped at step 6
    typed = dict(resume=True, out=str(tmp_path / "b"), max_steps=12)
    train(*complete_options(typed, {}), **QUIET)
    rates = [[row["lr"] for row in read_log(tmp_path / name)][6:] for name in "ab"]
    assert rates[0] == rates[1] and same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_resume_needs_no_log(shards, tmp_path):
    for precision in ("fp32", "fp16"):
        config, shape = configure(shards, tmp_path / precision, max_steps=2, precision=precision)
        train(config, shape, **QUIET)
        (tmp_path / precision / "log.jsonl").unlink()
        finished = train(dataclasses.replace(config, resume=True), **QUIET)
        assert finished["loss"] is None and finished["val_loss"] > 0
        assert train(dataclasses.replace(config, resume=True, max_steps=3), **QUIET)["step"] == 3


def test_a_log_row_that_lacks_its_numbers_stops_no_resume(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=1)
    train(config, shape, **QUIET)
    (tmp_path / "run" / "log.jsonl").write_text(
        '{"step": 1, "loss": 5.0, "tokens_per_second": null, "elapsed": 1.0}\n')
    assert train(dataclasses.replace(config, resume=True), **QUIET)["tokens_per_second"] == 0
    assert train(dataclasses.replace(config, resume=True, max_steps=2), **QUIET)["step"] == 2


@pytest.mark.slow
def test_a_new_optimizer_is_one_row_and_resumes(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", Optimizer(0.1, lambda groups, lr, **options:
                        torch.optim.SGD(groups, lr, momentum=0.9)))
    options = dict(optimizer="sgd", max_steps=6, eval_every=3)
    train(*configure(shards, tmp_path / "whole", **options), **QUIET)
    config, shape = configure(shards, tmp_path / "parts", **options)
    train(config, shape, **QUIET)
    checkpoints(tmp_path / "parts")[6].unlink()
    train(dataclasses.replace(config, resume=True), **QUIET)
    assert config.learning_rate == 0.1 and same(weights(tmp_path / "whole"),
                                                weights(tmp_path / "parts"))


def test_the_next_passes_of_a_step_are_not_read_before_they_are_needed(tmp_path):
    run, seen = new_run(tmp_path, tiny(), TrainConfig(precision="fp32"), "cpu"), []

    def pairs():
        for _ in range(3):
            seen.append(run.model.lm_head.weight.grad is not None)
            yield [torch.arange(8).view(1, 8)] * 2

    gradients(run, run.model, pairs(), 3, 1.0)
    assert seen == [False, True, True]


def test_validation_reads_no_sequence_twice_however_many_are_asked_for(shards):
    model = tiny(vocab_size=320)
    n = TokenLoader(shards, 1, 16, split="val").n_blocks
    many, all_ = (validation_loss(model, shards, TrainConfig(eval_sequences=wish))
                  for wish in (100_000_000, n))
    assert many == all_


@pytest.mark.parametrize("n", [1, 2, 5, 19, 60])
def test_a_smoothed_line_stays_a_line(n):
    line = [3.0 - 0.1 * i for i in range(n)]
    assert smooth(line) == pytest.approx(line)  # a trailing mean would lag behind
    assert smooth([1.0, -1.0] * 50, 20)[50] == pytest.approx(0, abs=0.06)


def test_a_line_of_the_log_fits_into_80_columns_and_no_time_is_absurd():
    row = dict(step=12_345, loss=3.2101, val_loss=3.1987, lr=2e-2, tokens_per_second=14_400,
               elapsed=1000.0)
    assert len(progress_line(row, 0.5)) <= 80 and "16:40 left" in progress_line(row, 0.5)
    assert "116 days left" in progress_line(row, 1e-4)
    assert "thousands of years left" in progress_line(row, 1e-15)


def test_the_picture_shows_a_rise_at_the_end(tmp_path, monkeypatch):
    rows = [dict(step=n, loss=8 / n ** 0.5) for n in range(1, 201)]
    rows[99]["val_loss"], rows[199]["val_loss"] = 0.9, 1.0
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    limits = []
    monkeypatch.setattr(Axes, "legend", lambda axes, **_: limits.append(axes.get_ylim()))
    draw_loss(tmp_path)
    low, high = limits[0]
    assert low < 0.57 and 1.0 < high < 2.5  # and not up to the 8 of the first step


def test_a_signal_in_the_last_validation_still_ends_with_its_number(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.validation_loss",
                        lambda *_: signal.raise_signal(signal.SIGTERM) or 3.0)
    summary = train(*configure(shards, tmp_path / "run", max_steps=2), **QUIET)
    assert (summary["stopped"], summary["step"]) == (signal.SIGTERM, 2)


def test_a_run_that_ends_without_a_number_says_so(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.validation_loss", lambda *_: math.nan)
    code, (*_, line) = mistake(main, monkeypatch, capsys, *command(shards, tmp_path / "run",
                                                                   "--max_steps=2"))
    assert code == 1 and "not finite at step 2: python -m chapters.doctor" in line


def test_a_run_that_took_no_step_at_all_says_so(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.why_skip", lambda *_: "not finite")
    code, lines = mistake(main, monkeypatch, capsys, *command(shards, tmp_path / "run"))
    assert code == 1 and lines == ["error: all 8 steps were skipped, so the model learned nothing: "
                                   f"python -m chapters.doctor {tmp_path / 'run'} says more"]


@pytest.mark.parametrize("text, words", [
    ("ort inside, the story goes on", "inside the"), ("राम मनुष्य की किताब है", "मनुष्य की"),
    ("ий мир и 'весь' дом", "мир и"), ("word", "")])
def test_the_words_to_go_on_with_are_whole_in_every_script(shards, tmp_path, monkeypatch, text,
                                                           words):
    monkeypatch.setattr("train.Tokenizer.decode", lambda *_: text)
    assert train(*configure(shards, tmp_path / "run", max_steps=1), **QUIET)["words"] == words


def test_a_run_that_does_not_fit_starts_only_by_force(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.machine_memory", lambda device: 1e5)
    config, shape = configure(shards, tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="GB of memory or more, and cpu has 0.0: .* --force"):
        train(config, shape, **QUIET)
    assert not (tmp_path / "run").exists()
    assert train(dataclasses.replace(config, force=True), shape, **QUIET)["step"] == 1


def test_two_runs_that_begin_at_once_take_two_names(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, shape = configure(shards, "", max_steps=1)
    with contextlib.ExitStack() as stack:
        runs = [prepare_run(config, shape, print, stack).folder for _ in range(2)]
        assert [folder.name for folder in runs] == ["words", "words-2"]
    assert not any(Path("runs").iterdir())  # neither took a step


def test_what_fails_at_the_first_step_leaves_no_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.to_device", lambda *_: torch.empty(2**60))
    config, shape = configure(shards, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out of memory with 8 sequences of 32 tokens on cpu"):
        train(config, shape, **QUIET)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_who_finds_a_folder_in_use_leaves_it_as_it_is(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run")
    with contextlib.ExitStack() as stack:
        prepare_run(config, shape, print, stack)
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        with pytest.raises(ValueError, match="run is in use by another process"):
            train(config, shape, **QUIET)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_run_folder_without_its_config_says_what_to_do(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=1)
    train(config, shape, **QUIET)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing: it says how a run goes on; copy"):
        complete_options(dict(resume=True, out=config.out), {})


def test_a_resumed_option_is_compared_with_the_runs_others(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=1, learning_rate=0.1)
    train(config, shape, **QUIET)
    again, _ = complete_options(dict(resume=True, out=config.out, min_lr=0.05), {})
    assert (again.learning_rate, again.min_lr) == (0.1, 0.05)


@slow
def test_a_module_that_forward_leaves_out_is_named(shards, tmp_path):
    script = tmp_path / "extra.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import train, torch\n"
                      "class GPT(train.GPT):\n"
                      "    def __init__(self, config):\n"
                      "        super().__init__(config)\n"
                      "        self.extra = torch.nn.Linear(4, 4)\n"
                      "train.GPT = GPT\ntrain.run_command(train.main)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", script, *command(shards, tmp_path / "run")],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "error: extra.weight got no gradient: forward must use it" in done.stderr


@slow
def test_two_processes_print_the_same_losses_as_one(shards, tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
             ROOT / "train.py", *command(shards, tmp_path / "two")]
    two = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, timeout=300)
    assert two.returncode == 0, two.stderr
    train(*configure(shards, tmp_path / "one"))
    one, two = ([[row[key] for key in ("loss", "grad_norm")] for row in read_log(tmp_path / name)]
                for name in ("one", "two"))
    # Muon rounds what differs in the last bit to bfloat16
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-3, atol=1e-5)


# -----------------------------------------------------------------------------
# The command.


def test_help_names_the_options_of_training_and_of_the_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(GPTConfig)):
        assert f"--{f.name} " in shown or f"--{f.name}," in shown


@pytest.mark.parametrize("options, words", [
    (dict(size="giant"), "unknown size 'giant'"),
    (dict(architecture="modem"), "did you mean modern?"),
    (dict(architecture="bert"), "architecture=bert does not predict the next token"),
    (dict(activation="gelo"), "did you mean gelu?"),
    (dict(cuda_graph=True), "--cuda_graph needs chapters/kernels.py, one GPU"),
    (dict(n_head=5), "n_embd=32 is no multiple of n_head=5"),
    (dict(batch_size=7, micro_batch_size=2), "batch_size=7 is no multiple of 2"),
    (dict(block_size=100_000), "100,001"),
    (dict(device="cuda:77"), "does not work on this machine"),
    (dict(precision="bf17"), "did you mean bf16?"),
    (dict(kernels="fussed"), "did you mean fused?"),
    (dict(resume=True), "there is no run folder"),
    (dict(optimizer="muan"), "did you mean muon?"),
    (dict(schedule="cosin"), "did you mean cosine?"),
    (dict(decay_ratio=0.0), "decay_ratio=0.0 must be at least 0.01 and below 1"),
    (dict(curriculum=1.5), "curriculum=1.5 must be at least 0 and below 1"),
    (dict(curriculum=0.5, block_size=20), "block_size=20 is no multiple of 8"),
    (dict(learning_rate=-1.0), "learning_rate=-1.0 must be at least 0"),
    (dict(tokens=math.inf), "tokens=inf must be at least 0 and below"),
    (dict(min_lr=0.5), "min_lr=0.5 is above learning_rate=0.02"),
    (dict(weight_decay=-1.0), "weight_decay=-1.0 must be at least 0"),
    (dict(block_size=1), "block_size=1 must be at least 2"),
    (dict(n_layer=100_000), "n_layer=100000 must be at least 1 and below 1025"),
    (dict(beta1=2.0), "beta1=2.0 must be at least 0 and below 1"),
    (dict(learning_rate=math.nan), "learning_rate=nan must be at least 0"),
    (dict(seed=-1), "seed=-1 must be at least 0"),
    (dict(batch_size=1_000_000_000, micro_batch_size=8), "batch_size=1000000000 is more than the"),
    (dict(n_embd=2_000_000_000), "GB of memory or more, and cpu has"),
    (dict(block_size=4000), "val has"),
    (dict(decay_ratio=0.2), "--decay_ratio would not act without --schedule=wsd: leave it out"),
    (dict(min_lr=0.001, schedule="constant"), "--min_lr would not act beside --schedule=constant"),
    (dict(rewarm=True), "--rewarm would not act without --resume"),
    (dict(vocab_size=500), "--vocab_size would not act on shards"),
    (dict(rope_theta=500.0, position="none"), "--rope_theta would not act without --position=rope"),
])
def test_an_impossible_run_is_refused_and_leaves_nothing(shards, tmp_path, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        train(*configure(shards, tmp_path / "run", **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, value", [
    ([], None), (["--bias"], True), (["--no-bias"], False), (["--bias=false"], False),
    (["--bias=True"], True)])
def test_an_option_that_is_yes_or_no_can_be_written_in_two_ways(monkeypatch, words, value):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert parse_options("", GPTConfig)[0].get("bias") is value


@pytest.mark.parametrize("option, code, words", [
    ("--lerning_rate=1", 2, "did you mean --learning_rate?"),
    ("--max_steps=many", 2, "invalid int value"),
    ("--data=nowhere.txt", 1, "nowhere.txt"),
    ("--resume", 1, "no run in runs/: python train.py makes one"),
    ("--data=", 1, "name"),
    ("--kernels=fussed", 1, "did you mean fused?"),
    ("--precision=half", 1, "unknown precision 'half'"),
    ("--lr=1", 2, "unknown option --lr; here: --learning_rate"),
    ("--compile=False", 2, "nothing to compile"),
    ("--bias=maybe", 2, "argument --bias/--no-bias: it takes no value"),
    ("--max-iters=5", 2, "here: --max_steps"),
    ("config/train_gpt2.py", 2, "--config=config.json"),
    ("my-book.txt", 2, "unknown option my-book.txt; here: --data=my-book.txt"),
    ("--init_from=gpt2", 2, "chapters.export"),
])
def test_a_users_mistake_ends_in_one_line(tmp_path, monkeypatch, capsys, option, code, words):
    monkeypatch.chdir(tmp_path)
    found, (line,) = mistake(main, monkeypatch, capsys, option)
    assert found == code and words in line and not list(tmp_path.iterdir())
