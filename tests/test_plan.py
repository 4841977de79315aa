"""What a model costs: FLOPs in model.py, bytes in chapters/memory.py, the sums of the plan."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import accumulate

import pytest
import torch
from conftest import ROOT, run, tiny
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from chapters import cost, plan
from chapters.memory import (free_memory, parameters_by_part, process_memory, saved_by_block,
                             training_memory)
from data import prepare
from model import ARCHITECTURES, GPT, SIZES, GPTConfig, Linear, attention_mask
from train import TrainConfig, model_shape, new_run, take_step


def meta(**options):
    """A model of any size that takes no memory."""
    with torch.device("meta"):
        return GPT(GPTConfig(**options))


def loss_of(model, ids):
    memory = model.encode(ids) if model.config.cross else None
    return model(ids, ids, memory=memory)[1]


# -----------------------------------------------------------------------------
# Parameters and FLOPs.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_of_a_model_add_up_to_it(architecture):
    model = tiny(architecture)
    parts = parameters_by_part(model)
    assert sum(parts.values()) == model.n_parameters()
    assert ("head" in parts) is not model.config.tied
    assert ("cross-attention" in parts) is model.config.cross


def in_products(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))


def hidden(c, T, causal):
    """How many of T keys a query does not see, on average."""
    seen = attention_mask(T, T, slice(0, T), slice(0, T), "cpu", causal, c.window, None, None)
    return 0 if seen is None else T - seen.sum().item() / T


@pytest.mark.parametrize("architecture, options", [
    ("gpt2", {}), ("modern", {}), ("modern", dict(n_kv_head=1)), ("modern", dict(window=5)),
    ("bert", {}), ("bert", dict(window=3)), ("transformer", {}),
    ("transformer", dict(n_encoder_layer=1))])
def test_flops_of_a_step_are_those_that_torch_counts(architecture, options):
    model, T = tiny(architecture, **options), 16
    model.use("plain")
    with FlopCounterMode(display=False) as counter:
        loss_of(model, torch.zeros(1, T, dtype=torch.long)).backward()
    c, keys = model.config, counter.get_total_flops() / T - 6 * in_products(model)
    unseen = c.n_layer * hidden(c, T, c.causal) + c.n_encoder_layer * hidden(c, T, causal=False)
    n_attentions = c.n_layer * (1 + c.cross) + c.n_encoder_layer
    keys = keys / (12 * c.n_embd) - unseen  # plain attention makes all scores
    planned = (model.flops_per_token(T) - 6 * in_products(model)) / (12 * c.n_embd)
    assert planned == pytest.approx(keys, abs=n_attentions / 2)


def test_a_wide_window_changes_no_flops():
    assert tiny(window=16).flops_per_token() == tiny().flops_per_token()


# -----------------------------------------------------------------------------
# Memory.


def saved_bytes(model, ids):
    """What the blocks and the last norm save for backward, each storage once, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def note(x):
        alive.append(x)  # else its address could be given to another
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        memory = model.encode(ids) if model.config.cross else None
        model.transformer(ids, None, model.dtype, memory)
    return sum(n for address, n in found.items() if address not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["plain", "fused", "torch"])
@pytest.mark.parametrize("options", [
    dict(architecture="modern"), dict(architecture="modern", dropout=0.1, activation="relu2"),
    dict(architecture="gpt2"), dict(architecture="gpt2", dropout=0.1),
    dict(architecture="bert", activation="relu")], ids=lambda options: options["architecture"])
def test_what_blocks_save_is_what_autograd_keeps(options, kernels, dtype):
    B, shape = 4, dict(vocab_size=64, block_size=128, n_layer=4, n_head=4, n_embd=128)
    model = GPT(GPTConfig(**shape | options)).train()
    model.use(kernels, None if dtype == torch.float32 else dtype)
    a_token = 4 * saved_by_block(model, kernels, dtype)
    total = B * 128 * (a_token + 2 * 128 * dtype.itemsize)
    if dtype != torch.float32:  # weights cast to it
        total += 2 * sum(w.numel() for w in model.transformer.blocks.parameters())
    assert saved_bytes(model, torch.randint(64, (B, 128))) == pytest.approx(total, rel=0.1)


def most_bytes(function):
    """The most that torch has allocated at once while a function runs."""
    with profile(profile_memory=True) as measured:
        function()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rows", [512, 100])
@pytest.mark.parametrize("options", [
    dict(vocab_size=64), dict(vocab_size=2048), dict(vocab_size=2048, softcap=15.0)],
    ids=["activations", "logits", "softcap"])
def test_forward_and_backward_take_what_is_foretold(options, rows, dtype, monkeypatch):
    for module in ("model", "chapters.memory"):
        monkeypatch.setattr(f"{module}.LOSS_TILE", rows * options["vocab_size"])
    model = GPT(GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128, **options)).train()
    for recompute in (False, True):
        model.use("torch", dtype, recompute, 4)
        ids, parts = torch.zeros(4, 128, dtype=torch.long), training_memory(
            model, 4, "adamw", dtype=dtype, recompute=recompute)
        taken = most_bytes(lambda: loss_of(model, ids).backward())
        foretold = sum(parts.values()) - parts["weights"] - parts["optimizer"]
        assert foretold == pytest.approx(taken, rel=0.05)
        model.zero_grad()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_an_optimizer_keeps_is_foretold(optimizer, tmp_path):
    model = tiny().train()
    run = new_run(tmp_path, model, TrainConfig(optimizer=optimizer), "cpu")
    ids = torch.zeros(2, 16, dtype=torch.long)
    take_step(run, model, [ids], [ids], 1.0)
    kept = sum(4 * x.numel() for state in run.optimizer.state.values() for x in state.values()
               if x.dim())
    assert training_memory(model, 2, optimizer)["optimizer"] == kept


def test_recompute_and_half_precision_keep_less():
    model = meta(vocab_size=4096, **SIZES["base"])
    full, again, half = (sum(training_memory(model, 8, device="cuda", **options).values())
                         for options in ({}, dict(recompute=True),
                                         dict(recompute=True, dtype=torch.bfloat16)))
    assert half < again < full


def test_this_machine_has_some_memory_left():
    assert free_memory() is None or free_memory() > 2**20


def base(low_memory):
    """Bytes of a new Python that has trained next to nothing."""
    code = (f"from chapters import plan; plan.keep_freed_memory({low_memory}); "
            "print(plan.base_memory())")
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the holes are those of Linux' allocator")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", ["mini", "small", "base"])
def test_memory_is_foretold_within_15_percent_of_what_a_run_takes(shards, tmp_path, size,
                                                                  recompute):
    more = ["--recompute", "--low_memory"] if recompute else []
    run("train.py", f"--data={shards}", "--out=run", f"--size={size}", "--max_steps=2",
        "--batch_size=8", "--micro_batch_size=8", "--precision=fp32", "--kernels=fused",
        "--device=cpu", "--eval_sequences=8", "--sample_tokens=1", *more, cwd=tmp_path)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    shape = GPTConfig(vocab_size=320, **SIZES[size])
    parts = training_memory(GPT(shape), 8, recompute=recompute)
    foretold = process_memory(parts, base(recompute), low_memory=recompute)
    assert foretold == pytest.approx(json.loads(log[-1])["memory"], rel=0.15)


# -----------------------------------------------------------------------------
# Known models, and what a GPU costs.


def test_known_models_have_the_size_and_the_flops_that_were_published():
    for row in cost.published_models().values():
        assert row.our_parameters == pytest.approx(row.parameters, rel=0.04) or not row.is_exact
        assert row.flops is None or row.our_flops == pytest.approx(row.flops, rel=0.06)


def test_one_mfu_explains_the_hours_of_llama_2_from_7_to_70_billion():
    rows = [cost.published_models()[f"Llama 2 {size}"] for size in ("7B", "13B", "70B")]
    assert all(0.38 < row.mfu < 0.45 for row in rows)
    for row in rows:
        hours = cost.gpu_cost(row.our_flops, "A100", mfu=0.42)["hours"]
        assert hours == pytest.approx(row.a100_hours, rel=0.08)


def test_the_cost_is_in_proportion_to_flops_price_and_carbon():
    one = cost.gpu_cost(1e21, "A100", price=2, mfu=0.5, carbon=500)
    assert one["hours"] * 3600 * 312e12 * 0.5 == pytest.approx(1e21)
    assert one["money"] == 2 * one["hours"] and one["kwh"] == pytest.approx(0.4 * one["hours"])
    assert one["co2"] == one["kwh"] / 2
    assert cost.gpu_cost(2e21, "A100", mfu=0.5)["hours"] == 2 * one["hours"]


# -----------------------------------------------------------------------------
# The plan of a run, as a command.


def planned(measure=False, has_length=True, **options):
    shape = GPTConfig(vocab_size=4096, n_layer=2, n_head=2, n_embd=32, block_size=32)
    config = TrainConfig(precision="fp32", device="cpu", **options)
    return plan.make_plan(config, shape, has_length, measure)


def test_a_plan_takes_20_tokens_a_parameter_unless_told_otherwise(shards):
    made = planned(data=str(shards), has_length=False)
    assert made.tokens == pytest.approx(20 * made.model.n_parameters(), rel=0.01)
    assert planned(data=str(shards), tokens=1e5).tokens == pytest.approx(1e5, rel=0.01)


def test_a_plan_knows_the_vocabulary_and_the_tokens_of_prepared_data(shards):
    card, made = json.loads((shards / "card.json").read_text()), planned(data=str(shards), epochs=3)
    assert (made.model.config.vocab_size, made.n_tokens) == (card["vocab_size"],
                                                              card["train"]["tokens"])
    assert made.tokens == pytest.approx(3 * made.n_tokens, rel=0.05)


def test_minutes_are_as_many_steps_as_fit_into_them(shards):
    made = planned(data=str(shards), minutes=1, measure=True, kernels="torch")
    assert made.steps * made.seconds == pytest.approx(60, rel=0.01)


def test_a_probe_of_some_layers_is_made_for_all_and_one_that_is_too_long_not_at_all(monkeypatch):
    tried, config = [], TrainConfig(device="cpu")
    monkeypatch.setattr(plan, "seconds_of_step",
                        lambda shape, *rest: tried.append(shape) or (1.0, "fused"))
    monkeypatch.setattr(plan, "matmul_rate", lambda *device: 1e9)
    shape = model_shape("mini", 64, dict(n_layer=8, n_embd=64, block_size=32))
    assert plan.measured_seconds(shape, config, "cpu", None, patience=10) == (1.0, "fused")
    assert plan.measured_seconds(shape, config, "cpu", None, patience=0.3)[0] > 1.5
    assert plan.measured_seconds(shape, config, "cpu", None, patience=1e-6) == (None, "torch")
    assert tried[0] == shape and tried[-1].n_layer < 8


def test_a_plan_of_175_billion_parameters_costs_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--architecture=gpt2", "--n_layer=96", "--n_head=96", "--n_embd=12288",
             "--tokens=3e11", "--block_size=2048", "--vocab_size=50257", "--gpus=64",
             "--batch_size=64")
    out, _ = call(plan, *words)
    assert "174,604,259,328" in out and "too large to try" in out
    assert out.count("does NOT fit into the ") == 2 and "80.00 GB of each H100: it takes" in out
    assert "e+0" not in out.partition("time here")[2]
    assert "H100" in out and "kWh" in out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_says_whether_its_data_is_prepared(call, shards):
    small = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2")
    out, _ = call(plan, f"--data={shards}", *small, "--tokens=1000")
    assert "less than half" in out and "not prepared" not in out and " fits into the " in out
    assert "fits into the 80.00 GB of each H100" in out and "NOT" not in out
    many, _ = call(plan, f"--data={shards}", *small, "--tokens=3e6")
    assert re.search(r" 2\d\d epochs: after about 4 times", many)
    out, _ = call(plan, "--data=book.txt", *small, "--tokens=1000")
    assert "python data.py book.txt" in out


def test_a_plan_takes_the_options_of_a_config_edited_by_hand(tmp_path, call):
    shape = GPTConfig(vocab_size=4096, n_layer=1, n_head=1, n_embd=16, block_size=16)
    parts = dict(train=asdict(TrainConfig(max_steps=7, batch_size=2, device="cpu")),
                 model=asdict(shape), data=dict(path="x", fingerprint="y"))
    parts = {name: dict(reversed(part.items())) for name, part in reversed(parts.items())}
    path, text = tmp_path / "config.json", json.dumps(parts, indent=5)
    path.write_text(text.replace('"max_steps": 7', '"max_steps"  :  9'), "utf-8")
    assert "in 9 steps" in call(plan, f"--config={path}")[0]
    for old, new, message in (("grad_clip", "clip", "config.json: unknown field 'clip'"),
                              ('"max_steps": 7', '"max_steps": "7"', "max_steps='7' must be int"),
                              (text, text[:99], "config.json cannot be read"),
                              (text, "", "config.json cannot be read")):
        path.write_text(text.replace(old, new), "utf-8")
        shown, error = call(plan, f"--config={path}")
        assert message in error and not shown and error.count("\n") == 1


def test_a_plan_takes_no_shards_of_another_text_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, text in ("a", "the cat sees a dog. " * 99), ("b", "a big bird. " * 999):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text(text, "utf-8")
        prepare(f"{folder}/input.txt", vocab_size=270, say=lambda text: None)
    small, other = (planned(data=f"{folder}/input.txt", vocab_size=270, tokens=1e4).n_tokens
                    for folder in "ab")
    assert 0 < small < other and planned(data="c/input.txt", vocab_size=270, tokens=1).n_tokens == 0
    assert planned(data=["a/input.txt", "b/input.txt"], vocab_size=270, tokens=1).n_tokens == 0


def test_the_table_of_known_models_has_all(call):
    out, _ = call(plan, "--published")
    assert all(name in out for name in cost.published_models())


@pytest.mark.parametrize("x, text", [(0, "0"), (0.01234, "0.0123"), (2.2, "2.2"), (99.96, "100"),
                                     (220, "220"), (12345.6, "12,346"), (1e-7, "less than 0.001")])
def test_numbers_are_as_people_write_them(x, text):
    assert cost.plain(x) == text


@pytest.mark.parametrize("mfu", ["0", "nan", "1", "-1"])
def test_a_share_of_a_gpu_that_is_none_is_refused(call, mfu):
    shown, error = call(cost, f"--mfu={mfu}")
    assert "must be at least 0.001 and below 1" in error and not shown


def test_a_plan_has_no_mfu_above_one(monkeypatch, shards):
    made = planned(data=str(shards), tokens=1e5)
    made.seconds = made.flops / made.steps / made.matmul_rate / 1.59
    line, = plan.time_lines(made)
    assert line.endswith("mfu unknown, as something else runs here, too")


def test_a_run_fits_as_it_is_or_with_options_or_not_at_all():
    totals = {"": 9e9, "--recompute": 7e9}
    assert [cost.verdict(totals, n, "here").partition(" GB")[0] for n in (10e9, 8e9, 6e9)] == [
        "fits into the 10.00", "fits with --recompute into the 8.00", "does NOT fit into the 6.00"]


@pytest.mark.parametrize("words, error", [
    (["--gpu=H10"], "unknown gpu 'H10': did you mean H100?"),
    (["--mfu=0"], "mfu=0.0 must be at least 0.001 and below 1"),
    (["--mfu=nan"], "mfu=nan must be at least 0.001"),
    (["--price=-1"], "price=-1.0 must be at least 0"),
    (["--carbon=inf"], "carbon=inf must be at least 0"),
    (["--gpus=0"], "gpus=0 must be at least 1"),
    (["--gpus=3"], "batch_size=16 is no multiple of 15"),
    ([f"--gpus={10**19}"], "must be at least 1 and below 2^31"),
    (["--published", "--gpus=3"], "--gpus would not act beside --published: leave it out"),
    (["--n_embd=1073741824", "--n_head=1"], "more numbers than can be counted"),
    (["--size=smal"], "unknown size 'smal': did you mean small?"),
    (["--architecture=bert"], "architecture=bert does not predict the next token"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 is no multiple of n_head=3"),
    (["--data=book.txt", "--epochs=2"], "python data.py book.txt does that, or give --tokens"),
    (["--tokens=-5"], "tokens=-5.0 must"),
    (["--gup=A100"], "unknown option --gup, did you mean --gpu?"),
    (["--gpus=many"], "invalid int value: 'many'")])
def test_a_wrong_option_is_one_line(call, words, error):
    out, err = call(plan, *words)
    assert error in err and "Traceback" not in err and not out
