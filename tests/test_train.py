"""train.py: a run learns, resumes as if it had never stopped, and is the same on two processes."""

import dataclasses
import math
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, mistake, run, tiny

from data import MixedLoader, TokenLoader
from model import load_model
from sample import checkpoints
from train import (RATES, SCHEDULES, GraphedStep, Muon, TrainConfig, announce, build_optimizer,
                   complete_options, cut_short, draw_loss, fast_orthogonal, first_bad, last_step,
                   learning_rate, main, memory_warning, new_run, plain_orthogonal, read_log, reason,
                   seconds_per_step, suspicion, take_step, to_device, train)

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)


def configure(shards, out, **options):
    """A run of a few seconds: two layers, 32 channels, float32."""
    small = dict(SHAPE, max_steps=8, batch_size=8, micro_batch_size=8, eval_every=4,
                 eval_sequences=8, warmup_steps=2, sample_tokens=4, precision="fp32", device="cpu")
    return TrainConfig(data=str(shards), out=str(out), **(small | options))


def command(shards, out, *options):
    """The same run as words of a command line."""
    config, default = (dataclasses.asdict(c) for c in (configure(shards, out), TrainConfig()))
    given = config.items() - default.items()
    return [f"--{name}={value}" for name, value in given if value] + list(options)


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
    assert rates[0] == pytest.approx(0.1, rel=0.01) and max(rates) > 0.9
    assert rates[10:] == sorted(rates[10:], reverse=True)
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
    decayed, kept = build_optimizer(model, config).param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.3
    assert {p.dim() for p in kept["params"]} == {1} and kept["weight_decay"] == 0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny("gpt2")
    ours, rest = build_optimizer(model, TrainConfig()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[1] for p in ours["params"]} == {"blocks"} and ours["muon"]
    assert {p.dim() for p in ours["params"]} == {2} and not rest["muon"]
    assert len(ours["params"]) + len(rest["params"]) == len(names)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5, 12), (2, 12, 5), (1, 7)])
def test_plain_and_fast_orthogonal_agree(shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(fast_orthogonal(x), plain_orthogonal(x), rtol=1e-10, atol=1e-10)
    x = x.float()
    torch.testing.assert_close(fast_orthogonal(x), plain_orthogonal(x), rtol=1e-4, atol=1e-5)


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_directions():
    x = torch.randn(20, 30)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.T @ plain_orthogonal(x) @ v.T
    assert 0.6 < turned.diagonal().min() and turned.diagonal().max() < 1.3
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


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


@pytest.mark.parametrize("optimizer", RATES)
def test_the_probe_before_a_run_changes_nothing(tmp_path, optimizer):
    model, config = tiny(), TrainConfig(optimizer=optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = new_run(tmp_path, model, config, "cpu")
    assert seconds_per_step(run, config, 2, 4) > 0
    assert same(before, model.state_dict()) and not run.optimizer.state


@pytest.mark.parametrize("n_tokens, words", [
    (10**3, "see its 0.0M tokens 16 times"), (8192, None), (10**6, "see 2% of its 1.0M tokens")])
def test_too_little_text_and_too_short_a_run_are_announced(n_tokens, words):
    config = TrainConfig(batch_size=16, max_steps=64)
    lines = list(announce(config, tiny(), n_tokens, 64, 0.5, "cpu"))
    assert "64 steps of 256: about 0:32 minutes on cpu" in lines[0]
    assert len(lines) == 1 if words is None else words in lines[1]


def test_a_step_that_does_not_fit_is_announced():
    assert memory_warning(4e9, 16e9) == memory_warning(20e9, None) == ""
    assert "needs about 20.0 GB and 16.0 are free" in memory_warning(20e9, 16e9)


@pytest.mark.parametrize("asked, precision, device, words", [
    ("fp16", "fp16", "cuda", "fp16 as asked"),
    ("auto", "bf16", "cuda", "bf16 with float32 weights"),
    ("auto", "fp32", "mps", "fp32, safe on every device"), ("fp32", "fp32", "cpu", "as asked")])
def test_a_precision_has_its_reason(asked, precision, device, words):
    assert words in reason(asked, precision, device)


@pytest.mark.parametrize("row, words", [
    (dict(loss=3.0, val_loss=3.0), ""), (dict(loss=6.0, val_loss=6.0), "above that of guessing"),
    (dict(loss=1.0, val_loss=3.5), "validation was better at step 7")])
def test_a_validation_that_looks_wrong_names_the_doctor(tmp_path, row, words):
    run = new_run(tmp_path / "run", tiny(), TrainConfig(), "cpu")
    run.best_loss, run.best_step = 3.0, 7
    line = suspicion(run, row)
    assert words in line and ("python -m chapters.doctor" in line) == bool(words)


def test_a_probe_leaves_the_memory_of_a_resumed_optimizer(tmp_path):
    run = new_run(tmp_path, tiny(), TrainConfig(), "cpu")
    ids = torch.arange(8).view(1, 8)
    take_step(run, run.model, [ids], [ids], 1.0)
    before = {p: dict(state) for p, state in run.optimizer.state.items()}
    run.step = 1
    assert seconds_per_step(run, TrainConfig(), 2, 4) > 0
    assert all(before[p].items() == run.optimizer.state[p].items() for p in before)


@pytest.mark.parametrize("progress, parts", [(0.0, 8), (0.2, 4), (0.4, 2), (0.6, 1), (1.0, 1)])
def test_a_curriculum_cuts_rows_and_loses_no_token(progress, parts):
    ids = torch.arange(32).view(2, 16)
    short = cut_short(ids, progress, 0.6)
    assert short.shape == (2 * parts, 16 // parts) and torch.equal(short.flatten(), ids.flatten())


@pytest.mark.parametrize("where, name", [
    ("transformer.wte.weight", "transformer.wte"),
    ("transformer.blocks.1.attn.q_proj.weight", "transformer.blocks.1.attn.q_proj")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_module_with_a_number_gone_bad_is_named(where, name, value):
    model, ids = tiny(), torch.arange(8).view(1, 8)
    assert first_bad(model, [ids], [ids]) == "the loss"  # where all is well, nothing else is left
    model.get_parameter(where).data[0] = value
    assert first_bad(model, [ids], [ids]) == name


def steps_on(shards, take, device="cpu", rows=8, n=1, **options):
    """The (loss, length of the gradient) of n steps on 8 sequences, `rows` at a time."""
    config = TrainConfig(precision="fp32", learning_rate=0.01, **options)
    model = tiny(vocab_size=320).to(device)
    model.use()
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
    torch.testing.assert_close(steps_on(shards, as_it_is, rows=rows, n=3),
                               steps_on(shards, as_it_is, n=3), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("rows", [4, 8])
def test_a_step_replayed_as_a_cuda_graph_is_the_step(shards, rows):
    def graphed(run, model):
        return GraphedStep(run, model, 1.0)

    options = dict(device="cuda", rows=rows, n=12, cuda_graph=True)
    torch.testing.assert_close(steps_on(shards, graphed, **options),
                               steps_on(shards, as_it_is, **options), rtol=1e-3, atol=1e-4)


def test_an_id_that_the_model_does_not_know_is_refused_on_its_way_to_the_device(shards):
    batch = next(TokenLoader(shards, 2, 16))
    with pytest.raises(ValueError, match="is not from 0 to 19: vocab_size=20"):
        to_device(batch, tiny(vocab_size=20))


# -----------------------------------------------------------------------------
# Whole runs.


def test_a_run_learns_and_leaves_a_self_contained_folder(shards, tmp_path):
    config = configure(shards, tmp_path / "run", max_steps=60, eval_every=30, learning_rate=0.01)
    summary = train(config)
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(math.log(320), abs=0.2)
    assert summary["val_loss"] < 0.6 * rows[0]["loss"]
    assert summary["bits_per_byte"] < 4 and not summary["stopped"]
    assert set(rows[-1]) == {
        "step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory",
        "elapsed"}
    assert {path.name for path in (tmp_path / "run").glob("[!.]*")} == {
        "config.json", "tokenizer.json", "log.jsonl", "loss.png", "step_000030.pt",
        "step_000030.json", "step_000060.pt", "step_000060.json"}


@pytest.mark.parametrize("options", [
    dict(precision="fp16", dropout=0.1), dict(optimizer="adamw", schedule="cosine"),
    *(pytest.param(options, marks=pytest.mark.slow) for options in [
        dict(dropout=0.2), dict(precision="bf16"), dict(micro_batch_size=2, curriculum=0.9),
        dict(architecture="gpt2", kernels="plain", dropout=0.1),
        dict(recompute=True, dropout=0.1, window=8, softcap=10.0, z_loss=1e-4,
             label_smoothing=0.1)])])
def test_a_resumed_run_equals_one_that_never_stopped(shards, tmp_path, options):
    whole = configure(shards, tmp_path / "whole", **options)
    train(whole)
    half = dataclasses.replace(whole, out=str(tmp_path / "half"))
    stop_after(5, half)
    train(dataclasses.replace(half, resume=True))
    rows = [[(row["step"], row["loss"], row.get("val_loss")) for row in read_log(tmp_path / name)]
            for name in ("whole", "half")]
    assert rows[0] == rows[1]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "half"))


def stop_after(steps, config):
    """Train until the log has so many lines, then press Ctrl-C once."""
    import train as module
    inner = module.clip_gradients

    def press(model, grad_clip):
        if len(read_log(config.out)) == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return inner(model, grad_clip)

    module.clip_gradients = press
    try:
        assert train(config)["stopped"]
    finally:
        module.clip_gradients = inner
    assert max(checkpoints(config.out)) == steps


@pytest.mark.slow
def test_low_memory_changes_no_weight(shards, tmp_path):
    for name, low_memory in (("kept", False), ("handed_back", True)):
        words = command(shards, tmp_path / name, *["--low_memory"] * low_memory)
        assert run("train.py", *words, cwd=tmp_path).returncode == 0
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "handed_back"))


def test_the_best_and_the_last_checkpoint_are_kept(shards, tmp_path):
    config = configure(shards, tmp_path / "run", max_steps=12, eval_every=2, learning_rate=0.3)
    train(dataclasses.replace(config, max_steps=6))
    train(dataclasses.replace(config, resume=True, keep_last=1))  # counted from disk
    losses = {row["step"]: row["val_loss"] for row in read_log(config.out) if "val_loss" in row}
    assert set(checkpoints(config.out)) == {12, min(losses, key=losses.get)}


def test_minutes_end_a_run_with_its_rate_decayed(shards, tmp_path):
    build_optimizer(tiny(), TrainConfig())  # the first one of a process imports for seconds
    config = configure(shards, tmp_path / "run", max_steps=0, minutes=0.05, eval_every=10_000)
    summary = train(config)
    rates = [row["lr"] for row in read_log(config.out)]
    assert summary["val_loss"] and rates[-1] == min(rates[2:]) < max(rates)


def test_patience_ends_a_run_that_gets_no_better(shards, tmp_path):
    config = configure(shards, tmp_path / "run", max_steps=1000, eval_every=2, patience=3,
                       learning_rate=1e-30)
    summary = train(config)
    assert summary["step"] < 20 and not summary["stopped"]


def test_a_number_gone_bad_ends_the_run_and_is_named_in_the_log(shards, tmp_path):
    config = configure(shards, tmp_path / "run", learning_rate=1e30, max_steps=50)
    with pytest.raises(ValueError, match="is not finite at step .* first in .*; python -m"):
        train(config)
    last = read_log(config.out)[-1]
    assert last["loss"] is None and last["bad"]
    draw_loss(config.out)


def test_find_lr_draws_and_suggests_and_leaves_no_run(shards, tmp_path):
    said = []
    assert train(configure(shards, tmp_path / "run", find_lr=True), say=said.append) is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["find_lr.png"]
    assert 1e-5 < float(said[-1].rpartition("=")[2]) < 3


def test_batches_are_mixed_from_several_shards(shards, tmp_path):
    from data import prepare
    (tmp_path / "b.txt").write_text("birds and trees\n" * 200, "utf-8")
    other = prepare([tmp_path / "b.txt"], tmp_path / "b", tokenizer=shards / "tokenizer.json",
                    say=lambda text: None)
    config = configure(shards, tmp_path / "run", mix=f"{other}=0.25", max_steps=4)
    assert train(config)["step"] == 4
    mixed, alone = MixedLoader({shards: 0.75, other: 0.25}, 100, 16), TokenLoader(other, 25, 16)
    assert [mixed.turns.count(i) for i in (0, 1)] == [75, 25]
    for _ in range(3):
        rows = next(mixed)[0][[turn == 1 for turn in mixed.turns]]
        assert (rows == next(alone)[0]).all()


def test_a_package_that_is_missing_is_asked_for_before_all_work(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb needs a package that is not installed"):
        train(configure(shards, tmp_path / "run", wandb=True))


def test_a_config_goes_out_and_in_again(shards, tmp_path):
    config = configure(shards, tmp_path / "run", max_steps=2, dropout=0.1)
    train(config)
    path = str(tmp_path / "run" / "config.json")
    again = complete_options(dict(config=path, out="other", epochs=3.0))
    changed = dict(config=path, out="other", epochs=3.0, max_steps=0)
    assert again == dataclasses.replace(config, **changed)


def test_a_finished_run_is_left_as_it_is_until_it_is_given_more(shards, tmp_path):
    config = configure(shards, tmp_path / "run", max_steps=2)
    train(config)
    before = weights(tmp_path / "run")
    train(dataclasses.replace(config, resume=True))
    assert same(before, weights(tmp_path / "run"))
    assert train(dataclasses.replace(config, resume=True, max_steps=3))["step"] == 3


def test_a_folder_with_a_run_is_not_overwritten(shards, tmp_path):
    config = configure(shards, tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(ValueError, match="holds a run: add --resume, or choose another --out"):
        train(config)


def test_resume_refuses_data_of_another_tokenizer(shards, tmp_path):
    from data import prepare
    config = configure(shards, tmp_path / "run", max_steps=1)
    train(config)
    text = shards.parent / "words.txt"
    other = prepare([text], tmp_path / "other", vocab_size=300, say=lambda text: None)
    with pytest.raises(ValueError, match="cannot go on with another tokenizer; another corpus"):
        train(dataclasses.replace(config, data=str(other), resume=True))


def test_a_log_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "utf-8")
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}]
    draw_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_print_the_same_losses_as_one(shards, tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
             ROOT / "train.py", *command(shards, tmp_path / "two")]
    two = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, timeout=300)
    assert two.returncode == 0, two.stderr
    train(configure(shards, tmp_path / "one"))
    one, two = ([[row[key] for key in ("loss", "grad_norm")] for row in read_log(tmp_path / name)]
                for name in ("one", "two"))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# The command.


def test_help_is_the_dataclass_in_groups():
    shown = run("train.py", "--help")
    assert shown.returncode == 0
    for f in dataclasses.fields(TrainConfig):
        assert f"--{f.name} " in shown.stdout or f"--{f.name}," in shown.stdout
    for group in ("data and output:", "model:", "length and batch:", "optimizer:", "machine:"):
        assert group in shown.stdout


@pytest.mark.parametrize("options, words", [
    (dict(size="giant"), "unknown size 'giant'"),
    (dict(architecture="modem"), "did you mean modern?"),
    (dict(architecture="bert"), "architecture=bert does not predict the next token"),
    (dict(activation="gelo"), "did you mean gelu?"),
    (dict(cuda_graph=True), "not on 1 x cpu in fp32 with fused kernels: leave it out"),
    (dict(n_head=5), "n_embd=32 is no multiple of n_head=5"),
    (dict(batch_size=7, micro_batch_size=2), "batch_size=7 is no multiple of 2"),
    (dict(block_size=100_000), "100,001"),
    (dict(device="cuda:77"), "does not work on this machine"),
    (dict(precision="bf17"), "did you mean bf16?"),
    (dict(kernels="fussed"), "did you mean fused?"),
    (dict(resume=True), "there is no run folder"),
    (dict(optimizer="muan"), "did you mean muon?"),
    (dict(schedule="cosin"), "did you mean cosine?"),
    (dict(decay_ratio=0.0), "decay_ratio=0.0 must be above 0"),
    (dict(curriculum=1.5), "curriculum=1.5 must be from 0 to 1"),
    (dict(curriculum=0.5, block_size=20), "block_size=20 is no multiple of it"),
    (dict(mix="elsewhere"), "mix=elsewhere is not a folder of shards and its share"),
    (dict(mix="elsewhere=0.3"), "mix=elsewhere=0.3 is not a folder of shards and its share"),
    (dict(learning_rate=-1.0), "learning_rate=-1.0 must be at least 0"),
    (dict(tokens=math.inf), "tokens=inf must be at least 0, and finite"),
    (dict(min_lr=0.5), "min_lr=0.5 is above learning_rate=0.02"),
])
def test_an_impossible_run_is_refused_and_leaves_nothing(shards, tmp_path, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        train(configure(shards, tmp_path / "run", **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, code, words", [
    ("--lerning_rate=1", 2, "did you mean --learning_rate?"),
    ("--max_steps=many", 2, "invalid int value"),
    ("--data=nowhere.txt", 1, "nowhere.txt"),
    ("--resume", 1, "no run in runs/: python train.py makes one"),
])
def test_a_users_mistake_ends_in_one_line(tmp_path, monkeypatch, capsys, option, code, words):
    monkeypatch.chdir(tmp_path)
    found, (line,) = mistake(main, monkeypatch, capsys, option)
    assert found == code and words in line and not list(tmp_path.iterdir())
