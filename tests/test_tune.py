"""Fine-tuning, in model.py and train.py: no change at first, only what is named moves, all of it
saved and found again."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, keep, mistake, tiny

import train as train_file
from chapters.clauses import guess
from data import ChatLoader, TokenLoader, prepare
from model import (GPT, LINEARS, TUNINGS, Adapter, KVCache, LoRALinear, QuantLinear, TuneConfig,
                   load_model, merge, plain_rotary, quantize, read_header, read_safetensors,
                   rotary_table, save_model, swap, tune, write_safetensors)
from sample import checkpoints, complete, load_run
from tokenizer import Tokenizer, read_json
from train import (TrainConfig, build_optimizer, complete_options, gradients, main, new_run,
                   read_log, reshaped, save_run, snapshot, train, update)

QUIET = dict(say=lambda text: None)
slow = pytest.mark.slow
METHODS = ["last:1" if name == "last" else name for name in TUNINGS]
ADDED = ("lora", "adapter", "prefix", "prompt")  # methods with parameters of their own
NAMED = dict(  # which parameters a method trains, by their names
    full=lambda name: True,
    head=lambda name: name == "lm_head.weight",
    last=lambda name: name.startswith(("transformer.blocks.1.", "transformer.final_norm.")),
    bias=lambda name: name.endswith(".bias"),
    lora=lambda name: ".lora_" in name,
    adapter=lambda name: ".down." in name or ".up." in name,
    prefix=lambda name: name.startswith("transformer.prefix."),
    prompt=lambda name: name.startswith("transformer.prefix."))
every = pytest.mark.parametrize("method", METHODS)
both = pytest.mark.parametrize("architecture", ["gpt2", "modern"])
each = pytest.mark.parametrize("architecture", ["modern", pytest.param("gpt2", marks=slow)])


def stir(model, size=0.1):
    """Change all that is trained, so that a tuned model is no longer its base -> the model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    return model


def tuned(method, architecture="modern", rank=4, quant=None, **options):
    """A tiny model in which what a method trains has been changed."""
    model = tiny(architecture, **options)
    tune(model, TuneConfig(tune=method, rank=rank, quant=quant))
    return stir(model)


def ids_of(*shape, seed=0):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, size=1e-5):
    torch.testing.assert_close(a, b, rtol=size, atol=size)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


def copy_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -----------------------------------------------------------------------------
# Surgery.


def test_swap_replaces_what_is_named_and_says_how_much():
    model = tiny()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert swap(model, ("q_proj", "v_proj"), QuantLinear) == 4
    for block in model.transformer.blocks:
        kinds = {name for name, m in block.named_modules() if isinstance(m, QuantLinear)}
        assert kinds == {"attn.q_proj", "attn.v_proj"}
    assert swap(model, ["proj"], QuantLinear) == swap(model, (), QuantLinear) == 0
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == len(linears) - 4


@pytest.mark.parametrize("quant", [None, "int8"])
@every
@both
def test_each_method_starts_as_no_change(architecture, method, quant):
    if quant and method in ("full", "last:1"):
        return
    base, model = tiny(architecture), tiny(architecture)
    if quant:
        swap(base.transformer.blocks, LINEARS, QuantLinear)
    tune(model, TuneConfig(tune=method, quant=quant))
    ids = ids_of(2, 16)
    assert torch.equal(model(ids)[0], base(ids)[0])


@every
@each
def test_a_method_changes_the_model_once_it_is_trained(architecture, method):
    ids = ids_of(2, 16)
    assert (tuned(method, architecture)(ids)[0] - tiny(architecture)(ids)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("n_classes", [0, pytest.param(3, marks=slow)])
@every
@both
def test_what_a_method_names_moves_and_all_else_stays(architecture, method, n_classes):
    model = tiny(architecture, n_classes=n_classes)
    named, base = NAMED[method.partition(":")[0]], copy_of(model)
    count = tune(model, TuneConfig(tune=method, rank=4))
    before = copy_of(model)
    optimizer = build_optimizer(model, TrainConfig(optimizer="adamw", learning_rate=0.01))
    targets = ids_of(2, seed=1) % 3 if n_classes else ids_of(2, 16, seed=1)
    for _ in range(3):  # the gradient of what is multiplied by a zero is zero at the first
        model(ids_of(2, 16), targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: p for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {*moved} == {name for name in before
                        if named(name) or n_classes and name == "lm_head.weight"}
    assert count == sum(p.numel() for p in moved.values())
    for name, p in model.named_parameters():  # and of the base nothing is lost or new
        name = name.replace(".base.", ".")
        if name not in {*moved}:
            assert torch.equal(p, base[name])


@pytest.mark.parametrize("rank", [1, 3])
@both
def test_what_is_added_has_the_size_that_is_stated(architecture, rank):
    model = tiny(architecture)
    c, layers = model.config, [m for m in model.transformer.blocks.modules()
                               if isinstance(m, torch.nn.Linear)]
    sizes = dict(lora=sum(rank * sum(layer.weight.shape) for layer in layers),
                 adapter=2 * c.n_layer * (2 * rank * c.n_embd + rank + c.n_embd),
                 prefix=c.n_layer * (2 * c.n_kv_head * rank * c.head_size + c.n_head),
                 prompt=rank * c.n_embd + c.n_layer * c.n_head)
    for method, size in sizes.items():
        assert tune(tiny(architecture), TuneConfig(tune=method, rank=rank)) == size


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"], ["v_proj", "down_proj"]])
def test_lora_is_where_its_targets_are(targets):
    model = tiny()
    tune(model, TuneConfig(tune="lora", targets=targets))
    found = {name.rpartition(".")[2] for name, m in model.named_modules()
             if isinstance(m, LoRALinear)}
    assert found == {*([targets] if isinstance(targets, str) else targets)}


@both
def test_the_last_blocks_are_as_many_as_asked_for(architecture):
    model = tiny(architecture, n_layer=4)
    tune(model, TuneConfig(tune="last:3"))
    trained = {i for i, block in enumerate(model.transformer.blocks)
               if all(p.requires_grad for p in block.parameters())}
    assert trained == {1, 2, 3}


# -----------------------------------------------------------------------------
# What each method computes.


def test_lora_is_its_formula():
    layer, x = tiny().transformer.blocks[0].mlp.up_proj, torch.randn(5, 32)
    lora = LoRALinear(layer, rank=3, alpha=7.0)
    torch.nn.init.normal_(lora.lora_B)
    expected = x @ (layer.weight + 7 / 3 * lora.lora_B @ lora.lora_A).T
    close(lora(x), expected)


def test_alpha_is_twice_the_rank_unless_it_is_given():
    for options, scale in ((dict(rank=4), 2), (dict(rank=4, alpha=1.0), 0.25)):
        model = tiny()
        tune(model, TuneConfig(tune="lora", **options))
        assert {m.scale for m in model.modules() if isinstance(m, LoRALinear)} == {scale}


def test_loras_dropout_is_of_its_inputs_alone_and_in_training_alone():
    layer, x = tiny().transformer.blocks[0].mlp.up_proj, torch.ones(2000, 32)
    lora = LoRALinear(layer, rank=1, alpha=1.0, dropout=0.25)
    torch.nn.init.constant_(lora.lora_A, 1 / 32)
    torch.nn.init.ones_(lora.lora_B)
    means = (lora.train()(x) - layer(x))[:, 0]  # of 32 inputs, of which each is 0 or 4 / 3
    assert means.mean().item() == pytest.approx(1, abs=0.01)
    assert means.std().item() == pytest.approx((1 / 3 / 32) ** 0.5, rel=0.1)
    close((lora.eval()(x) - layer(x)), torch.ones(2000, len(layer.weight)))


@both
def test_an_adapter_is_its_formula_behind_what_writes_to_the_stream(architecture):
    model = tuned("adapter", architecture)
    found = {name.rpartition(".")[2]: m for name, m in model.named_modules()
             if isinstance(m, Adapter)}
    assert {*found} == {"o_proj", "down_proj"}
    for adapter in found.values():
        x = torch.randn(5, adapter.base.in_features)
        y = adapter.base(x)
        low = F.gelu(y @ adapter.down.weight.T + adapter.down.bias, approximate="tanh")
        close(adapter(x), y + low @ adapter.up.weight.T + adapter.up.bias)


@both
def test_a_prefix_is_attended_to_with_a_softmax_and_a_gate_of_its_own(architecture):
    model = tuned("prefix", architecture, n_layer=1)
    prefix, attn = model.transformer.prefix, model.transformer.blocks[0].attn
    x, H = torch.randn(2, 7, 32), model.config.n_head
    seen = []
    attn.o_proj.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    [(k, v, gate)] = prefix(model.transformer, torch.float32)
    attn(x)
    attn(x, prefix=(k, v, gate))
    q = attn.split_heads(attn.q_proj(x), attn.q_norm)                    # (B, H, T, D)
    k, v = (part.repeat_interleave(H // part.size(1), dim=1) for part in (k, v))
    added = gate * ((q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1) @ v)
    close(seen[1] - seen[0], added.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("architecture, position", [("gpt2", "none"), ("modern", "rope")])
def test_a_prompt_is_what_the_blocks_make_of_its_vectors_before_the_text(architecture, position):
    model, ids = tiny(architecture, position=position), ids_of(1, 4)
    read = [KVCache(model.config, 1, 4) for _ in model.transformer.blocks]
    model(ids, cache=read)
    tune(model, TuneConfig(tune="prompt", rank=4))
    prompt = model.transformer.prefix
    prompt.embeddings.data = model.transformer.wte.weight[ids[0]].detach()
    table = rotary_table(model.config, torch.full((4,), 4))  # from -4 ... -1 to 0 ... 3
    for (k, v, _), layer in zip(prompt(model.transformer, torch.float32), read, strict=True):
        close(v, layer.v)
        k = plain_rotary(k.transpose(1, 2), *table).transpose(1, 2) if position == "rope" else k
        close(k, layer.k)


# -----------------------------------------------------------------------------
# Whatever was tuned, what holds for every model holds.


@pytest.mark.parametrize("chunk", [5, pytest.param(1, marks=slow)])
@every
@each
def test_the_cache_changes_nothing(architecture, method, chunk):
    model, ids = tuned(method, architecture), ids_of(2, 12)
    cache = [KVCache(model.config, 2, 12) for _ in model.transformer.blocks]
    parts = [model(piece, cache=cache)[0] for piece in ids.split(chunk, dim=1)]
    close(torch.cat(parts, dim=1), model(ids)[0])


@every
@each
def test_a_text_beside_longer_ones_is_as_it_is_alone(architecture, method):
    """With padding on the left, as sample.py reads prompts, and with a cache."""
    model, texts = tuned(method, architecture), [ids_of(1, n, seed=n) for n in (3, 8, 12)]
    ids = torch.cat([F.pad(text, (12 - text.size(1), 0), value=-1) for text in texts])
    cache = [KVCache(model.config, 3, 12) for _ in model.transformer.blocks]
    for cached in None, cache:
        logits, _ = model(ids.clamp(min=0), segments=(ids >= 0).long(), cache=cached)
        for row, text in zip(logits, texts):
            close(row[-text.size(1):], model(text)[0][0])


@every
@each
def test_texts_that_share_a_block_do_not_see_each_other(architecture, method):
    model, texts = tuned(method, architecture), [ids_of(1, n, seed=n) for n in (3, 5, 6)]
    segments = torch.tensor([[1] * 3 + [2] * 5 + [3] * 6 + [0] * 2])
    packed, _ = model(F.pad(torch.cat(texts, dim=1), (0, 2)), segments=segments)
    for part, text in zip(packed[:, :14].split([3, 5, 6], dim=1), texts):
        close(part, model(text)[0])


@every
def test_no_token_sees_the_future(method):
    model, ids = tuned(method), ids_of(2, 12)
    other = torch.cat([ids[:, :7], ids_of(2, 5, seed=9)], dim=1)
    close(model(other)[0][:, :7], model(ids)[0][:, :7])


@pytest.mark.parametrize("kernels", ["plain", pytest.param("fused", marks=slow)])
@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("method", ADDED)
def test_all_kernels_and_recomputing_give_the_same_gradients(method, quant, kernels):
    model = tuned(method, quant=quant).train()
    segments, found = torch.tensor([[1] * 9 + [2] * 7]), []
    for name, recompute in (("torch", False), (kernels, True)):
        model.use(name, recompute=recompute)
        model(ids_of(1, 16), ids_of(1, 16, seed=1), segments=segments)[1].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()
                      if p.requires_grad})
        model.zero_grad()
    for name, grad in found[0].items():
        assert grad.abs().max() > 0
        close(found[1][name], grad, 1e-4)


@slow
@every
@both
def test_the_gradient_of_what_is_trained_is_that_of_finite_differences(architecture, method):
    model = tuned(method, architecture).double()
    ids, targets = ids_of(2, 8), ids_of(2, 8, seed=1)
    model.zero_grad()
    model(ids, targets)[1].backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            direction = torch.randn_like(p)
            losses = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.add_(step * direction)
                    losses.append(model(ids, targets)[1])
                    p.sub_(step * direction)
            slope = ((losses[0] - losses[1]) / 2e-5).item()
            found = (p.grad * direction).sum().item()
            assert found == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@every
def test_a_tuned_model_computes_in_bfloat16(method):
    model, ids = tuned(method), ids_of(2, 12)
    expected, _ = model(ids)
    model.use("torch", dtype=torch.bfloat16)
    logits, _ = model(ids)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


# -----------------------------------------------------------------------------
# Taken away, or made one with the base.


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("method", ["head", "last:1", "bias", "lora"])
@both
def test_merged_is_unmerged_and_a_plain_model(architecture, method, quant):
    if method == "bias" and architecture == "modern" or quant and method == "last:1":
        return
    model, ids = tuned(method, architecture, quant=quant), ids_of(2, 16)
    expected, _ = model(ids)
    plain = merge(model)
    close(plain(ids)[0], expected)
    fresh = GPT(plain.config)
    assert {*dict(plain.named_parameters())} == {*dict(fresh.named_parameters())}
    assert plain.tuning is None and all(p.requires_grad for p in plain.parameters())
    fresh.load_state_dict(plain.state_dict())
    close(fresh.eval()(ids)[0], expected)


@pytest.mark.parametrize("architecture, method", [
    ("modern", "adapter"), ("modern", "prefix"), ("gpt2", "prompt"), ("modern", "bias")])
def test_what_no_plain_model_equals_is_not_merged(architecture, method):
    with pytest.raises(ValueError, match=f"--tune={method} adds has no place in a plain model"):
        merge(tuned(method, architecture))


@pytest.mark.parametrize("method", ADDED)
@both
def test_without_what_was_added_the_model_is_its_base(architecture, method):
    base, model = tiny(architecture), tuned(method, architecture)
    if method in ("lora", "adapter"):
        assert swap(model, LINEARS, lambda layer: getattr(layer, "base", layer)) >= 4
    model.transformer.prefix = None
    assert same(model.state_dict(), base.state_dict())
    assert torch.equal(model(ids_of(2, 16))[0], base(ids_of(2, 16))[0])


# -----------------------------------------------------------------------------
# int8.


def test_int8_weights_are_within_half_a_step_of_what_they_stand_for():
    layer = tiny("gpt2", seed=3).transformer.blocks[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, len(layer.weight))[:, None])
        layer.weight[5] = 0
    quant, x = QuantLinear(layer), torch.randn(7, 32)
    steps = layer.weight.abs().amax(dim=1) / 127
    assert quant.weight.dtype == torch.int8 and quant.weight.abs().max() == 127
    assert (quant.scale > 0).all()  # 0 / 0 is not a number, and has no int8
    wrong = (quant.merged().weight - layer.weight).abs()
    assert (wrong <= 0.5001 * steps[:, None]).all() and (wrong.amax(dim=1)[6:] > 0).all()
    bound = x.abs().sum(dim=1, keepdim=True) * steps / 2
    assert ((quant(x) - layer(x)).abs() <= 1.01 * bound + 1e-5 * layer(x).abs() + 1e-6).all()
    close(quant(x), quant.merged()(x))


def test_an_int8_layer_passes_the_gradient_of_its_floats():
    quant = QuantLinear(tiny("gpt2").transformer.blocks[0].mlp.up_proj)
    x = torch.randn(7, 32, requires_grad=True)
    grads = []
    for layer in quant, quant.merged():
        layer(x).square().sum().backward()
        grads.append(x.grad.clone())
        x.grad = None
    close(*grads)
    assert all(p.grad is None for p in (quant.weight, quant.scale))


def test_int8_keeps_no_floats_of_its_weights_for_backward():
    """They would take in training what int8 saves."""
    quant, kept = QuantLinear(tiny("gpt2").transformer.blocks[0].mlp.up_proj), []
    x = torch.randn(7, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda w: kept.append(w) or w, lambda w: w):
        y = quant(x)
    assert not any(w.is_floating_point() and w.numel() >= quant.weight.numel() for w in kept)
    y.sum().backward()


def test_int8_takes_a_fourth_of_the_memory_of_the_layers():
    model = tiny(n_embd=256, n_head=4)
    before = sum(p.nbytes for p in model.transformer.blocks.parameters())
    tune(model, TuneConfig(tune="head", quant="int8"))
    assert sum(p.nbytes for p in model.transformer.blocks.parameters()) < 0.27 * before


# -----------------------------------------------------------------------------
# Files.


def saved(model, base, folder):
    """The path of the checkpoint of a tuned model, with its base beside it."""
    folder.mkdir(exist_ok=True)
    save_model(base, folder / "base.safetensors")
    model.base = read_header(folder / "base.safetensors")[1]["sha256"]
    return keep(model, folder)


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("method", METHODS[1:])
@each
def test_a_checkpoint_holds_what_is_trained_and_is_loaded_as_it_was(architecture, method, quant,
                                                                   tmp_path):
    if quant and method == "last:1":
        return
    model, ids = tuned(method, architecture, quant=quant), ids_of(2, 16)
    path = saved(model, tiny(architecture), tmp_path)
    rows, _ = read_header(path)
    assert {name for name, *_ in rows} == {name for name, p in model.named_parameters()
                                           if p.requires_grad}
    loaded, _ = load_model(path)
    assert same(loaded.state_dict(), model.state_dict()) and loaded.tuning == model.tuning
    assert torch.equal(loaded.eval()(ids)[0], model(ids)[0])
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()]


@slow
@pytest.mark.parametrize("method", ["bias", *ADDED])
def test_a_checkpoint_is_small(method, tmp_path):
    shape = dict(n_embd=256, vocab_size=1000)
    model, base = tuned(method, "gpt2", **shape), tiny("gpt2", **shape)
    path = saved(model, base, tmp_path)
    assert path.stat().st_size < 0.05 * (tmp_path / "base.safetensors").stat().st_size


def test_a_checkpoint_without_its_base_says_what_to_copy(tmp_path):
    path = saved(tuned("lora"), tiny(), tmp_path)
    begin = read_header(path)[1]["base"][:12]
    save_model(tiny(seed=1), tmp_path / "base.safetensors")
    for what in "another", "missing":
        with pytest.raises(ValueError, match=f"base.safetensors is {what}: copy .* {begin}"):
            load_model(path)
        (tmp_path / "base.safetensors").unlink(missing_ok=True)


def test_a_damaged_base_is_named(tmp_path):
    path = saved(tuned("lora"), tiny(), tmp_path)
    base = tmp_path / "base.safetensors"
    data = bytearray(base.read_bytes())
    data[-5] ^= 1
    base.write_bytes(data)
    with pytest.raises(ValueError, match="base.safetensors is damaged"):
        load_model(path)


@pytest.mark.parametrize("change, said", [
    (dict(tuning="{}"), "does not hold the weights"), (dict(tuning="5"), "makes no model"),
    (dict(tuning='{"tune": "lore"}'), "makes no model .*did you mean lora"),
    (dict(tuning='{"tune": "lora", "rank": 99}'), "rank=99 is above"),
    (dict(tuning='{"tune": "lora", "rank": 3}'), "does not hold the weights"),
    (dict(tuning='{"tune": "prefix"}'), "does not hold the weights"),
    (dict(base=None), "base.safetensors is another")])
def test_wrong_metadata_is_a_valueerror(change, said, tmp_path):
    path = saved(tuned("lora"), tiny(), tmp_path)
    tensors, metadata = read_safetensors(path), read_header(path)[1] | change
    metadata = {name: value for name, value in metadata.items() if value is not None}
    with open(path, "wb") as file:
        write_safetensors(file, tensors, metadata)
    with pytest.raises(ValueError, match=said):
        load_model(path)


def test_a_base_that_is_tuned_itself_is_refused(tmp_path):
    path = saved(tuned("lora"), tiny(), tmp_path)
    tensors, metadata = read_safetensors(path), read_header(path)[1]
    with open(tmp_path / "base.safetensors", "wb") as file:
        write_safetensors(file, tensors, metadata | dict(base=metadata["sha256"]))
    with open(path, "wb") as file:
        write_safetensors(file, tensors, metadata | dict(base=metadata["sha256"]))
    with pytest.raises(ValueError, match="base.safetensors is another"):
        load_model(path)


# -----------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize("options, said", [
    (dict(tune="laura"), "unknown tune 'laura': did you mean lora"),
    (dict(tune="last"), "tune=last: last needs a number of"),
    (dict(tune="last:0"), "needs a number of blocks"),
    (dict(tune="last:x"), "needs a number of blocks"),
    (dict(tune="lora:2"), "needs a number of blocks"),
    (dict(tune="lora", targets=["q_prj"]), "'q_prj': did you mean q_proj"),
    (dict(tune="lora", targets="down"), "'down': did you mean down_proj"),
    (dict(tune="lora", targets=["q_proj", "q_proj"]), "q_proj is there twice, leave one out"),
    (dict(tune="lora", rank=0), "rank=0 must be at least 1"),
    (dict(tune="lora", lora_dropout=1.0), "lora_dropout=1.0 must be"),
    (dict(tune="lora", alpha=-1.0), "alpha=-1.0 must be"),
    (dict(tune="lora", quant="int5"), "unknown quant 'int5': did you mean int"),
    (dict(quant="int8"), "freezes what --tune=full trains"),
    (dict(tune="last:1", quant="int8"), "freezes what --tune=last:1 trains")])
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        TuneConfig(**options)


@pytest.mark.parametrize("options, said", [
    (dict(tune="last:3"), "tune=last:3: the model has 2 blocks"),
    (dict(tune="lora", rank=17), "rank=17 is above that of a layer of 16 x 32: take at most 16"),
    (dict(tune="lora", targets=["gate_proj"]), "finds nothing to train: take other")])
def test_what_the_model_is_too_small_for_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        tune(tiny("gpt2", n_kv_head=2), TuneConfig(**options))


@every
def test_where_nothing_is_to_be_learned_loss_and_gradients_are_zero_not_nan(method):
    for kernels in "plain", "torch":
        model = tuned(method).train()
        model.use(kernels)
        _, loss = model(ids_of(2, 16), torch.full((2, 16), -1), segments=torch.ones(2, 16).long())
        loss.backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters()
                                 if p.grad is not None)

# -----------------------------------------------------------------------------
# train.py goes on from a run.

SMALL = dict(max_steps=4, batch_size=4, micro_batch_size=4, eval_every=4, eval_sequences=8,
             warmup_steps=1, sample_tokens=2, precision="fp32", device="cpu", kernels="torch",
             schedule="constant", optimizer="adamw")
SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=64)
WORDS = "the cat sees a big dog on the red tree".split()


def configure(data, out, **options):
    """What train() takes: (TrainConfig, GPTConfig). Options are fields of both."""
    typed = SMALL | dict(data=str(data), out=str(out)) | options
    names = {f.name for f in fields(TrainConfig)}
    return complete_options({name: value for name, value in typed.items() if name in names},
                            {name: value for name, value in typed.items() if name not in names})


def train_on(base, data, out, tune="lora", **options):
    """Train what a method trains of the run `base` -> the lines that were said."""
    said = []
    options = dict(rank=2) | options if tune in ADDED else options
    train(*configure(data, out, init=str(base), tune=tune, **options), say=said.append)
    return "\n".join(said)


def weights(folder):
    """What the last checkpoint of a run holds, the optimizer's state as well."""
    return read_safetensors([*checkpoints(folder).values()][-1])


def losses(folder):
    return [[row["loss"], row["grad_norm"]] for row in read_log(folder)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base_of(shards, tmp_path_factory):
    """base_of(architecture): the folder of a run of two steps on words, made once."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def make(architecture):
        config = configure(shards, folder / architecture, max_steps=2, architecture=architecture,
                           **SHAPE)
        return folder / Path(train(*config, **QUIET)["folder"]).name
    return make


@pytest.fixture(scope="module")
def chats(shards, tmp_path_factory):
    """Shards of chats whose answers have unequal numbers of tokens."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [dict(instruction=" ".join(WORDS[i % 3:i % 7]), input=str(i),
                 output=" ".join(WORDS[:1 + i % 9])) for i in range(60)]
    return prepare([write_rows(folder / "chats.jsonl", rows)], folder / "shards",
                   tokenizer=shards / "tokenizer.json", **QUIET)


@pytest.fixture(scope="module")
def classes(shards, tmp_path_factory):
    """Shards of texts with three labels."""
    folder = tmp_path_factory.mktemp("classes")
    rows = [dict(text=f"the {word} {i}", label=word) for i in range(20)
            for word in ("dog", "cat", "owl")]
    return prepare([write_rows(folder / "rows.jsonl", rows)], folder / "shards",
                   tokenizer=shards / "tokenizer.json", **QUIET)


@pytest.mark.parametrize("architecture, method", [
    ("modern", "lora"), *(pytest.param(name, method, marks=slow) for name in ("modern", "gpt2")
                          for method in METHODS if (name, method) != ("modern", "lora"))])
def test_a_tuned_run_says_what_it_trains_saves_that_and_is_loaded_as_any(
        architecture, method, base_of, chats, tmp_path):
    said = train_on(base_of(architecture), chats, tmp_path / "run", method)
    model, tokenizer = load_run(tmp_path / "run")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"--tune={method} trains {count:,} of {model.n_parameters():,} parameters" in said
    named = NAMED[method.partition(":")[0]]
    assert {name for name in weights(tmp_path / "run") if not name.startswith("optimizer.")} == {
        name for name, _ in model.named_parameters() if named(name)}
    assert (tmp_path / "run" / "base.safetensors").exists() == (method != "full")
    texts = {complete(model, tokenizer, "the cat", max_new_tokens=8, temperature=0, cache=cache)
             for cache in (True, False)}
    assert len(texts) == 1


@pytest.mark.parametrize("architecture, method, options", [
    ("modern", "lora", dict(lora_dropout=0.2, dropout=0.1)),
    *(pytest.param(*case, marks=slow) for case in [
        ("modern", "prompt", {}), ("modern", "lora", dict(quant="int8")), ("gpt2", "prefix", {}),
        ("modern", "adapter", {}), ("modern", "bias", {}), ("gpt2", "head", {}),
        ("modern", "last:1", dict(optimizer="muon")), ("modern", "full", {})])])
def test_a_resumed_run_equals_one_that_never_stopped(architecture, method, options, base_of, chats,
                                                     tmp_path):
    base = base_of(architecture)
    train_on(base, chats, tmp_path / "whole", method, **options)
    train_on(base, chats, tmp_path / "half", method, max_steps=2, **options)
    train(*complete_options(dict(resume=True, out=str(tmp_path / "half"), max_steps=4), {}),
          **QUIET)
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert same(whole, half) and any(name.startswith("optimizer.") for name in half)


def test_the_first_loss_is_that_of_the_base_on_what_is_learned_of_the_first_batch(base_of, chats,
                                                                                  tmp_path):
    train_on(base_of("modern"), chats, tmp_path / "run", "last:1", max_steps=1)
    model, _ = load_model(tmp_path / "run" / "base.safetensors")
    x, y, segments = map(torch.from_numpy, next(ChatLoader(chats, 4, 64, seed=TrainConfig().seed)))
    logs = model(x, segments=segments)[0].log_softmax(dim=-1)
    nats = -logs.gather(2, y.clamp(min=0)[..., None])[..., 0][y != -1]
    assert 0 < (y != -1).sum() < y.numel() / 2
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_micro_batches_of_unequal_numbers_of_learned_tokens_make_the_gradient_of_one_batch(
        method, tmp_path):
    model = tuned(method).double()
    run = new_run(tmp_path, model, TrainConfig(), "cpu")
    x, y = ids_of(4, 16), ids_of(4, 16, seed=1)
    segments = torch.tensor([1] * 6 + [2] * 10).expand(4, 16)
    for row, n in enumerate((16, 9, 1, 0)):
        y[row, n:] = -1
    found = []
    for size in 4, 2, 1:
        pairs = [*zip(x.split(size), y.split(size), segments.split(size))]
        found.append((*gradients(run, model, pairs, len(pairs), 0.0),
                      *[p.grad.clone() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    _, loss = model(x, y, segments=segments)
    loss.backward()
    assert found[0][0] == pytest.approx(loss.item())
    for grad, p in zip(found[0][2:], [p for p in model.parameters() if p.requires_grad]):
        close(grad, p.grad, 1e-9)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(b, a, 1e-9)


def test_where_all_is_learned_a_step_is_that_of_pretraining(tmp_path):
    model = tuned("full").double()
    run, x, y = new_run(tmp_path, model, TrainConfig(), "cpu"), ids_of(4, 16), ids_of(4, 16, seed=1)
    found = []
    for batch in (x, y), (x, y, torch.ones(4, 16).long()):
        pairs = [*zip(*(part.split(2) for part in batch))]
        found.append([*gradients(run, model, pairs, 2, 1.0), *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-9)


@slow
def test_a_run_in_micro_batches_is_that_in_one(base_of, chats, tmp_path):
    for size in 4, 1:
        train_on(base_of("modern"), chats, tmp_path / str(size), micro_batch_size=size)
    close(*(torch.tensor(losses(tmp_path / size)) for size in "41"), 1e-4)


@pytest.mark.parametrize("learned", [0, 1])
def test_a_step_without_learned_tokens_is_a_loss_of_zero_and_no_nan(learned, tmp_path):
    model = tuned("lora")
    run = new_run(tmp_path, model, TrainConfig(), "cpu")
    y = torch.full((2, 16), -1)
    y[0, 3] = 5 if learned else -1
    pairs = [(ids_of(1, 16), row[None], torch.ones(1, 16).long()) for row in y]
    loss, norm = gradients(run, model, pairs, 2, 1.0)
    update(run)
    assert loss.isfinite() and norm.isfinite() and (loss > 0) == (norm > 0) == learned
    assert model.is_finite()


@slow
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_two_processes_take_the_steps_of_one(method, base_of, chats, tmp_path):
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                          "--standalone", ROOT / "train.py", *words, f"--data={chats}", "--rank=2",
                          f"--init={base_of('modern')}", f"--tune={method}",
                          f"--out={tmp_path / 'two'}"], capture_output=True, timeout=300)
    assert two.returncode == 0, two.stderr
    train_on(base_of("modern"), chats, tmp_path / "one", method)
    close(*(torch.tensor(losses(tmp_path / name)) for name in ("two", "one")), 1e-4)
    for name, w in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], w, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method, rate", [
    ("lora", 0.02), *(pytest.param(*case, marks=slow) for case in [
        ("full", 0.003), ("head", 0.1), ("last:1", 0.01), ("prefix", 0.05)])])
def test_a_classifier_is_trained_saved_and_loaded(method, rate, base_of, classes, tmp_path):
    train_on(base_of("modern"), classes, tmp_path / "run", method, n_classes=3, max_steps=20,
             learning_rate=rate)
    model, tokenizer = load_run(tmp_path / "run")
    assert model.config.n_classes == 3
    assert read_json(tmp_path / "run" / "config.json")["data"]["labels"] == ["cat", "dog", "owl"]
    rows = [dict(text=f"the {word} {i}", label=word) for i in range(100, 110)
            for word in ("cat", "dog", "owl")]
    how, guesses, _ = guess(tmp_path / "run", rows)
    assert how == "head" and sum(row["label"] == label for row, label in zip(rows, guesses)) > 20


@slow
def test_tokens_that_no_text_had_can_be_told_apart_by_a_frozen_head(base_of, chats, tmp_path):
    """In pretraining the rows of all of them move together, as they are wrong together."""
    train_on(base_of("modern"), chats, tmp_path / "run", max_steps=1)
    (base, tokenizer), (tuned_model, _) = load_run(base_of("modern")), load_run(tmp_path / "run")
    rows = [*tokenizer.special.values()][1:]
    before, after = (F.normalize(m.lm_head.weight[rows].detach()) for m in (base, tuned_model))
    assert (before @ before.T).min() > 0.99
    assert (after @ after.T).fill_diagonal_(0).abs().max() < 0.9
    frequent = [tokenizer.encode(f" {word}")[0] for word in ("the", "cat", "dog", "tree")]
    assert torch.equal(*(m.lm_head.weight[frequent] for m in (base, tuned_model)))


def test_init_alone_goes_on_with_pretraining_on_other_text(base_of, shards, tmp_path):
    (tmp_path / "more.txt").write_text("a bird runs under the tree and sits.\n" * 2000)
    other = prepare([tmp_path / "more.txt"], tmp_path / "shards",
                    tokenizer=shards / "tokenizer.json", **QUIET)
    said = train_on(base_of("modern"), other, tmp_path / "run", "full")
    (model, _), (base, _) = load_run(tmp_path / "run"), load_run(base_of("modern"))
    x, y = map(torch.from_numpy, next(TokenLoader(other, 4, 64, seed=TrainConfig().seed)))
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(base(x, y)[1].item(), rel=1e-5)
    assert "--tune=full trains" in said and not model.tuning
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters())
                   if p.dim() == 2)


@pytest.mark.parametrize("before, after", [(3, 0), (3, 5), (0, 3)])
def test_a_head_for_other_classes_starts_anew_and_all_else_stays(before, after):
    old = tiny(n_classes=before)
    torch.nn.init.constant_(old.lm_head.weight, 7.0)
    new = reshaped(old, replace(old.config, n_classes=after))
    assert new.lm_head.weight.shape == (after or 64, 32) and new.lm_head.weight.abs().max() < 1
    assert same(*({name: p for name, p in model.named_parameters() if name != "lm_head.weight"}
                  for model in (old, new)))


def test_the_vocabulary_grows_for_a_base_without_the_tokens_of_chats(shards, tmp_path):
    known = Tokenizer.train("the cat sees a big dog " * 50, 270, special_tokens=["<|endoftext|>"])
    (tmp_path / "text.txt").write_text("".join(" ".join(WORDS[i % 5:]) + ".\n" for i in range(999)))
    text = prepare([tmp_path / "text.txt"], tmp_path / "text", tokenizer=known, **QUIET)
    train(*configure(text, tmp_path / "base", max_steps=2, **SHAPE), **QUIET)
    rows = [dict(instruction="see", input=str(i), output="cat") for i in range(40)]
    chats = write_rows(tmp_path / "chats.jsonl", rows)
    monkey = tmp_path / "run"
    train_on(tmp_path / "base", prepare([chats], tmp_path / "chats", tokenizer=known, **QUIET),
             monkey, "lora")
    (base, _), (model, tokenizer) = load_run(tmp_path / "base"), load_run(monkey)
    n = known.n_vocab
    assert tokenizer.n_vocab == n + 5 and tokenizer.special.keys() > known.special.keys()
    assert tokenizer.encode("the cat") == known.encode("the cat")
    table = model.transformer.wte.weight
    assert torch.equal(table[:n], base.transformer.wte.weight)
    norms = table.norm(dim=1)
    assert norms[n:].max() < 2 * norms[:n].mean() and norms[n:].min() > norms[:n].mean() / 2
    assert len({*map(tuple, table[n:].tolist())}) == 5
    ids = known.encode("the cat sees")
    assert model.lm_head.weight.shape == (n + 5, 32)
    assert model(torch.tensor([ids]))[0].isfinite().all()


@slow
def test_a_tuned_run_can_be_the_base_of_another(base_of, chats, tmp_path):
    train_on(base_of("modern"), chats, tmp_path / "first")
    train_on(tmp_path / "first", chats, tmp_path / "second", "bias", max_steps=1)
    (first, _), (second, _) = load_run(tmp_path / "first"), load_model(
        tmp_path / "second" / "base.safetensors")
    close(second(ids_of(2, 16))[0], first(ids_of(2, 16))[0])


# -----------------------------------------------------------------------------
# Mistakes at the command line: one line, and no folder is left.


@pytest.mark.parametrize("words, said", [
    ("--tune=laura --init=BASE", "unknown tune 'laura': did you mean lora"),
    ("--tune=lora --init=BASE --targets q_prj", "'q_prj': did you mean q_proj"),
    ("--tune=lora --init=BASE --rank=33", "rank=33 is above that of a layer of 32 x 32"),
    ("--tune=last:3 --init=BASE", "tune=last:3: the model has 2 blocks"),
    ("--tune=lora", "--tune would not act without --init=RUN: leave it out, or add --init=RUN"),
    ("--rank=4 --init=BASE", "--rank would not act beside --tune=full"),
    ("--rank=4 --init=BASE --tune=bias", "--rank would not act beside --tune=bias"),
    ("--alpha=4 --init=BASE --tune=prefix", "--alpha would not act beside --tune=prefix"),
    ("--targets q_proj --init=BASE --tune=adapter", "--targets would not act beside --tune=adapt"),
    ("--quant=int8 --init=BASE", "quant=int8 freezes what --tune=full trains"),
    ("--init=BASE --n_layer=3", "n_layer=3: .* has 2, which a model keeps"),
    ("--init=BASE --size=mini", "--size would not act beside --init"),
    ("--init=none", "there is no run folder none"),
    ("--init=BASE --tune=lora --n_classes=2", "has no labels: make shards of rows with a text"),
    ("--init=BASE --tune=lora --block_size=8", "none of .* chats .* fits into a block of 8 tokens"),
    ("--init=BASE --tune=lora --curriculum=0.5", "--curriculum .* not chats"),
    ("--init=BASE --tune=lora --data=OTHER", "was made with another tokenizer than"),
    ("--init=BASE --tune=lora --data=DUMB", "row 1: the last message, 0, is of role user")])
def test_a_mistake_is_one_line_and_leaves_no_folder(words, said, base_of, chats, tmp_path,
                                                    monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "OTHER" in words:
        (tmp_path / "text.txt").write_text("another text of other words\n" * 999)
        prepare([tmp_path / "text.txt"], tmp_path / "OTHER", vocab_size=300, **QUIET)
    if "DUMB" in words:
        rows = [dict(messages=[dict(role="user", content="hello")])] * 9
        words = words.replace("DUMB", str(write_rows(tmp_path / "dumb.jsonl", rows)))
    words = words.replace("BASE", str(base_of("modern"))).split()
    data = [f"--data={chats}"] * ("--data" not in " ".join(words))
    code, lines = mistake(main, monkeypatch, capsys, "--out=run", *data, *words)
    assert code in (1, 2) and re.search(said, lines[-1]) and "Traceback" not in lines[-1], lines
    assert len(lines) == 1 and not (tmp_path / "run").exists()


@slow
def test_learned_positions_reach_no_further_than_the_base(base_of, chats, tmp_path):
    with pytest.raises(ValueError, match="block_size=128 is above 64, for which --init has"):
        train_on(base_of("gpt2"), chats, tmp_path / "run", block_size=128)
    assert not (tmp_path / "run").exists()


@slow
@pytest.mark.parametrize("change, said", [
    (dict(rank=3), "rank=3 .it has 2."), (dict(tune="prefix"), "tune=prefix .it has lora."),
    (dict(targets=["q_proj"]), "targets="), (dict(alpha=3.0), "alpha=3.0"),
    (dict(init="runs/other"), "init=runs/other .it has ")])
def test_a_resumed_run_keeps_how_it_is_tuned(change, said, tuned_folder):
    with pytest.raises(ValueError, match=f"cannot go on with .*{said}"):
        train(*complete_options(dict(resume=True, out=str(tuned_folder)) | change, {}), **QUIET)


@slow
def test_the_size_is_that_of_the_base_in_a_resumed_run_too(tuned_folder):
    with pytest.raises(ValueError, match="--size would not act beside --init: leave it out"):
        complete_options(dict(resume=True, out=str(tuned_folder), size="mini"), {})


def test_a_run_that_alignment_wrote_is_no_run_to_resume(tmp_path, monkeypatch, capsys):
    keep(tiny(), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"model": {}, "align": {}, "data": null}')
    code, lines = mistake(main, monkeypatch, capsys, "--resume", f"--out={tmp_path / 'run'}")
    assert code == 1 and len(lines) == 1 and lines[0].endswith(
        "it lacks train, so this run cannot go on: begin another with --init=RUN")


def test_a_quantized_run_is_neither_resumed_nor_tuned(chats, tmp_path, base_of):
    model, tokenizer = load_run(base_of("modern"))
    keep(quantize(model, "int8"), tmp_path / "run")
    for name in "tokenizer.json", "config.json":
        (tmp_path / "run" / name).write_bytes((base_of("modern") / name).read_bytes())
    resumed = complete_options(dict(resume=True, out=str(tmp_path / "run")), {})
    for start in (lambda: train(*resumed, **QUIET),
                  lambda: train_on(tmp_path / "run", chats, tmp_path / "new")):
        with pytest.raises(ValueError, match="quantized model is neither trained nor exported"):
            start()


@pytest.fixture(scope="module")
def tuned_folder(base_of, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    train_on(base_of("modern"), chats, folder, max_steps=1)
    return folder


@slow
def test_an_adapter_is_no_base_for_others(base_of, chats, tmp_path):
    train_on(base_of("modern"), chats, tmp_path / "run", "adapter", max_steps=1)
    with pytest.raises(ValueError, match="so it cannot be merged: take lora, or the run that"):
        train_on(tmp_path / "run", chats, tmp_path / "other")


@slow
def test_a_run_is_resumed_with_the_words_it_was_begun_with(base_of, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    rows = [dict(instruction=f"the {word} {i}", output=word) for i in range(20)
            for word in ("dog", "cat")]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ("--data=rows.jsonl", "--tune=lora", "--rank=2", "--out=run", "--batch_size=4",
             "--eval_every=2", f"--init={base_of('modern')}")
    call(train_file, *words, "--max_steps=2")
    _, errors = call(train_file, *words[:-1], f"{words[-1]}/", "--max_steps=4", "--resume")
    assert max(checkpoints("run")) == 4 and "error" not in errors
    assert [path.name for path in Path("shards").glob("[!.]*")] == ["rows"]


@slow
def test_a_run_that_ended_between_two_validations_is_measured_when_it_is_resumed(
        base_of, chats, tmp_path):
    train_on(base_of("modern"), chats, tmp_path / "run", max_steps=2)
    config = configure(chats, tmp_path / "run", resume=True, max_steps=2)
    run = train_file.load_run(tmp_path / "run", config[0], "cpu")
    run.val_loss = None  # as where Ctrl-C stops a run
    save_run(tmp_path / "run", snapshot(run))
    assert train(*config, **QUIET)["val_loss"] > 0


@slow
def test_the_next_command_asks_what_a_chat_run_learned_or_trains_it_until_it_has(
        base_of, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "a.jsonl", [dict(instruction=f"{i}+1: the 'cat', $1 or {i}?",
                                                  output="cat") for i in range(40)])
    run = [f"--init={base_of('modern')}", f"--data={data}", "--batch_size=8", "--out=run"]
    said, _ = call(train_file, *run, "--max_steps=1", "--learning_rate=1e-9")
    words = said.splitlines()[-1].split()
    assert "no end yet" in said and words[:3] == ["next:", "python", "train.py"]
    call(train_file, *words[3:])
    assert max(checkpoints("run")) == 100
    said, _ = call(train_file, *run[:-1], "--max_steps=60", "--out=long")
    line = said.splitlines()[-1]
    assert re.fullmatch(r"next: python sample.py long --chat "
                        r"--prompt=\"(\d+)\+1: the 'cat', 1 or \1\?\"", line), line


@slow
def test_the_next_command_for_a_classifier_asks_it(base_of, classes, tmp_path, call):
    out, _ = call(train_file, f"--init={base_of('modern')}", f"--data={classes}", "--n_classes=3",
                  "--max_steps=2", "--batch_size=4", f"--out={tmp_path / 'run'}")
    assert f"next: python -m chapters.clauses ask {tmp_path / 'run'} --prompt=" in out


@slow
def test_a_classifier_needs_two_labels(base_of, shards, tmp_path, monkeypatch, capsys):
    rows = [dict(text=f"the dog {i}", label="dog") for i in range(30)]
    data = prepare([write_rows(tmp_path / "rows.jsonl", rows)], tmp_path / "one",
                   tokenizer=shards / "tokenizer.json", **QUIET)
    code, lines = mistake(main, monkeypatch, capsys, f"--init={base_of('modern')}",
                          f"--data={data}", "--n_classes=1", f"--out={tmp_path / 'run'}")
    assert code == 1 and "has 1 different labels, dog: a classifier needs two" in lines[-1]
