"""Weights in int8 and int4: what is rounded, kept, computed, and what it costs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import keep, mistake, tiny

import evaluate
import sample
import train
from chapters import drift
from chapters import quantize as leaf
from chapters.kernels import PACKED_ROWS, packed_quant_linear
from model import (ARCHITECTURES, BITS, GPT, GROUP, SIZES, GPTConfig, Linear, QuantLinear,
                   dequantize, load_model, plain_quant_linear, quantize, round_weights)

each = pytest.mark.parametrize("quant", BITS)
shape = dict(n_embd=64, n_layer=1)


def linear(n_out=24, n_in=64, seed=0):
    torch.manual_seed(seed)
    layer = Linear(n_in, n_out)
    torch.nn.init.normal_(layer.weight)
    return layer


def floats(model):
    """A model of the floats that the integers of a quantized one stand for."""
    weights = {name.removesuffix(".weight"): module for name, module in model.named_modules()
               if isinstance(module, QuantLinear)}
    plain = GPT(model.config).eval()
    plain.load_state_dict({
        name: dequantize(weights[part].weight, weights[part].scale, torch.float32)
        if (part := name.removesuffix(".weight")) in weights else model.get_parameter(name)
        for name, _ in plain.named_parameters(remove_duplicate=False)})
    return plain


@each
def test_a_weight_is_rounded_to_the_nearest_of_evenly_spaced_numbers(quant):
    w = torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    w[3] = 0  # has no largest number to divide by
    q, scale = round_weights(w, BITS[quant])
    steps = scale.view(40, -1).repeat_interleave(64 * 40 // scale.numel(), dim=1)
    assert ((w - q * steps).abs() <= steps * 0.5001).all()
    assert q.abs().max() == 2 ** (BITS[quant] - 1) - 1


@each
def test_integers_and_scales_give_the_floats_back(quant):
    layer = linear()
    q, scale = round_weights(layer.weight, BITS[quant])
    quantized = QuantLinear(layer, BITS[quant])
    again = dequantize(quantized.weight, quantized.scale, torch.float32)
    expected = q.view(24, scale.numel() // 24, -1) * scale.view(24, -1, 1)
    assert torch.equal(again, expected.flatten(1))
    assert quantized.weight.nbytes == 24 * 64 * BITS[quant] // 8


def test_an_outlier_spoils_its_group_alone():
    w = torch.randn(4, 4 * GROUP)
    w[:, 0] = 100.0
    q, scale = round_weights(w, 4)
    error = (w - q * scale.repeat_interleave(GROUP, dim=1)).abs()
    assert error[:, 1:GROUP].mean() > 4 * error[:, GROUP:].mean()


@each
@pytest.mark.parametrize("n_rows", [1, 5, PACKED_ROWS, PACKED_ROWS + 1])
@pytest.mark.parametrize("n_out", [16, 37])
def test_the_packed_product_equals_the_plain_one(quant, n_rows, n_out):
    layer = QuantLinear(linear(n_out), BITS[quant]).bfloat16()
    x = torch.randn(1, 2 * n_rows, 64).bfloat16()[:, ::2]  # as a head reads the last positions
    plain, packed = plain_quant_linear(layer, x), packed_quant_linear(layer, x)
    assert packed.shape == plain.shape == (1, n_rows, n_out)
    torch.testing.assert_close(packed, plain, atol=0.1, rtol=0.02)  # sums of 64 in bfloat16


@each
def test_gradients_are_those_of_the_floats_and_no_weight_has_one(quant):
    layer = QuantLinear(linear(), BITS[quant])
    w = dequantize(layer.weight, layer.scale, torch.float32)
    x, other = (torch.randn(3, 64, requires_grad=True) for _ in range(2))
    other.data.copy_(x.data)
    layer.quant_linear = packed_quant_linear  # which must not take a kernel without a gradient
    (layer(x) ** 2).sum().backward()
    (F.linear(other, w, layer.bias) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert layer.weight.grad is None and layer.scale.grad is None


@each
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantized_model_computes_what_its_floats_would(architecture, quant):
    model = quantize(tiny(architecture, **shape), quant)
    plain, ids = floats(model), torch.randint(64, (2, 9))
    memory = model.encoder and model.encode(ids)
    torch.testing.assert_close(model(ids, memory=memory)[0], plain(ids, memory=memory)[0])
    torch.testing.assert_close(model(ids, ids, memory=memory)[1], plain(ids, ids, memory=memory)[1])
    assert model.flops_per_token() == plain.flops_per_token()


@each
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_quantized_model_is_saved_and_loaded_as_it_is(architecture, quant, tmp_path):
    model, ids = quantize(tiny(architecture, **shape), quant).bfloat16(), torch.randint(64, (1, 9))
    loaded, _ = load_model(keep(model, tmp_path))
    assert torch.equal(model(ids)[0], loaded(ids)[0])
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in loaded.named_parameters()}


def test_gpt2_is_half_of_fp16_in_int8_and_less_than_30_percent_in_int4():
    with torch.device("meta"):
        sizes = {quant: leaf.n_bytes(quantize(GPT(GPTConfig(
            architecture="gpt2", **SIZES["gpt2"])), quant).bfloat16()) for quant in BITS}
        half = leaf.n_bytes(GPT(GPTConfig(architecture="gpt2", **SIZES["gpt2"])).bfloat16())
    assert 0.5 < sizes["int8"] / half < 0.51
    assert 0.28 < sizes["int4"] / half < 0.30


@each
def test_a_quantized_model_writes_the_same_with_a_cache_and_without(quant):
    model, ids = quantize(tiny(**shape), quant), torch.randint(64, (2, 3))
    texts = [torch.stack([*sample.generate(model, ids, 10, cache=cache, temperature=0.0)])
             for cache in (True, False)]
    assert torch.equal(*texts)


def test_gptq_with_unrelated_inputs_rounds_to_the_nearest():
    w = torch.randn(8, 64)
    for bits in BITS.values():
        for ours, expected in zip(leaf.round_gptq(w, bits, torch.eye(64)), round_weights(w, bits)):
            torch.testing.assert_close(ours, expected)


@each
def test_gptq_changes_outputs_less_than_rounding_to_the_nearest(quant):
    torch.manual_seed(0)
    w, x = torch.randn(32, 64), torch.randn(1000, 16) @ torch.randn(16, 64)  # inputs go together
    errors = []
    for q, scale in (leaf.round_gptq(w, BITS[quant], x.T @ x), round_weights(w, BITS[quant])):
        found = (q.view(32, scale.numel() // 32, -1) * scale.view(32, -1, 1)).flatten(1)
        errors.append(F.mse_loss(x @ found.T, x @ w.T))
    assert errors[0] < 0.7 * errors[1]


def test_the_inputs_of_each_layer_are_summed():
    model, ids = tiny("gpt2", **shape), torch.randint(64, (4, 16))
    grams = leaf.input_grams(model, ids.split(2))
    block, seen = model.transformer.blocks[0], []
    block.mlp.down_proj.register_forward_pre_hook(lambda layer, x: seen.append(x[0].flatten(0, 1)))
    model(ids)
    expected = seen[0].T @ seen[0]
    torch.testing.assert_close(grams[block.mlp.down_proj.weight.data_ptr()], expected)
    assert len(grams) == 6  # the head is the embedding, of which nothing is multiplied by hand


def test_the_change_of_perplexity_is_paired():
    rng = np.random.default_rng(0)
    a = np.stack([rng.uniform(50, 500, 300), np.full(300, 64.0)], axis=1)  # texts differ much
    b = a * [1.0, 1.0] + [[0.64, 0.0]]  # 0.01 nats a token more in each
    assert leaf.perplexity_change(a, a) == (0.0, 0.0, 0.0)
    np.testing.assert_allclose(leaf.perplexity_change(a, b), np.expm1(0.01), rtol=1e-6)


@pytest.mark.parametrize("words", [("--quant=int4",), ("--quant=int8", "--precision=fp32")])
def test_sample_takes_a_run_in_integers(words, model, tokenizer, tmp_path, call):
    keep(model, tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    out, said = call(sample, tmp_path, *words, "--prompt=the cat", "--max_new_tokens=4", "--seed=1")
    assert words[0][8:] + (" and fp32" if len(words) > 1 else " and bf16") in said
    assert out.startswith("the cat")


@pytest.mark.parametrize("model, quant, said", [
    (lambda: tiny(n_embd=48), "int4", "int4 has a scale for each 32 inputs, and a layer .* 48"),
    (lambda: quantize(tiny(), "int8"), "int8", "quantized already"),
    (lambda: tiny(), "int3", "unknown quant 'int3': did you mean int")])
def test_what_cannot_be_quantized_is_named(model, quant, said):
    with pytest.raises(ValueError, match=said):
        quantize(model(), quant)


@pytest.mark.slow
def test_a_run_is_written_smaller_and_read_by_every_command(shards, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(train, f"--data={shards}", "--out=runs/base", "--max_steps=20", "--n_layer=1",
         "--n_embd=64", "--block_size=32", "--batch_size=8")
    table, _ = call(leaf, "runs/base", "--max_tokens=2000")
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == [
        "fp32", "bf16", "int8", "int4", "int4, gptq"]
    for words in (["--quant=int4", "--method=gptq"], ["--quant=fp16"]):
        out = f"runs/{words[0][8:]}"
        made, _ = call(leaf, "runs/base", *words, f"--out={out}", "--max_tokens=2000")
        assert made.splitlines()[-1] == f"next: python sample.py {out}"
        assert call(sample, out, "--prompt=the", "--max_new_tokens=5")[0].startswith("the")
        assert "perplexity" in call(evaluate, "runs/base", out, "--tasks=perplexity")[0]
        said = call(leaf, "runs/base", *words, f"--out={out}", "--max_tokens=2000")[1]
        assert f"{out} is there already" in said
    for module, words in ((train, ["--init=runs/int4", f"--data={shards}", "--tune=lora"]),
                          (leaf, ["runs/int4"])):
        assert "a quantized model is neither trained nor exported" in call(module, *words)[1]


@pytest.mark.parametrize("words, said", [
    (["--quant=int5"], "did you mean int"), (["--method=best"], "choose from nearest, gptq"),
    (["--method=gptq"], "without --quant=KIND: leave it out, or add --quant=KIND"),
    (["--out=small"], "--out would not act without --quant=KIND"),
    (["--quant=fp16", "--method=gptq"], "--method would not act with --quant=fp16"),
    (["runs/a", "--quant=int8", "--out=/"], "/ is there already")])
def test_wrong_words_are_one_line(words, said, monkeypatch, capsys):
    code, lines = mistake(leaf.main, monkeypatch, capsys, *words)
    assert code == 1 and len(lines) == 1 and said in lines[0]


def test_a_classifier_is_refused_before_anything_is_measured(tokenizer, tmp_path, monkeypatch,
                                                             capsys):
    keep(tiny(n_classes=2, vocab_size=tokenizer.n_vocab), tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    for module in leaf, drift:
        code, (line,) = mistake(module.main, monkeypatch, capsys, str(tmp_path))
        assert code == 1 and "judges texts and writes none" in line
