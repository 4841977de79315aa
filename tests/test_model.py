"""model.py: twins agree in value and gradient, no token sees the future, checkpoints come back."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch import nn

from model import (ARCHITECTURES, KERNELS, SIZES, GPT, GPTConfig, KVCache, LayerNorm, RMSNorm,
                   fused_attention, fused_loss, fused_rms_norm, load_model, plain_attention,
                   plain_loss, plain_rms_norm, rotary_table, rotate, save_model, torch_attention)

both = pytest.mark.parametrize("architecture", ARCHITECTURES)
close = torch.testing.assert_close


def value_and_gradients(function, *inputs):
    """What a function returns, and the gradients of a fixed weighted sum of it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


def qkv(B, H, K, T, S, D, dtype=torch.float64):
    torch.manual_seed(T)
    return [torch.randn(B, heads, n, D, dtype=dtype) for heads, n in ((H, T), (K, S), (K, S))]


# -----------------------------------------------------------------------------
# Twins.

SHAPES = [(2, 4, 4, 1, 1, 8), (1, 4, 2, 7, 7, 6), (2, 6, 2, 5, 9, 8), (1, 2, 1, 1, 300, 4),
          (1, 2, 2, 129, 129, 4), (1, 3, 1, 300, 555, 4), (2, 2, 1, 256, 256, 4)]


@pytest.mark.parametrize("fast", [fused_attention, torch_attention])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_fast_attention_equals_plain_attention_in_value_and_gradient(fast, shape, causal):
    inputs = qkv(*shape)
    plain = value_and_gradients(lambda q, k, v: plain_attention(q, k, v, causal), *inputs)
    close(value_and_gradients(lambda q, k, v: fast(q, k, v, causal), *inputs), plain,
          rtol=1e-10, atol=1e-10)


def test_plain_attention_equals_the_loop_of_the_definition():
    q, k, v = qkv(1, 2, 2, 5, 5, 4)
    for h in range(2):
        for t in range(5):
            weights = torch.softmax(k[0, h, :t + 1] @ q[0, h, t] / 2, dim=0)
            close(plain_attention(q, k, v)[0, h, t], weights @ v[0, h, :t + 1])


def test_fused_attention_in_bfloat16_is_within_rounding_of_float32():
    inputs = qkv(2, 4, 2, 200, 200, 16, torch.float32)
    exact = value_and_gradients(plain_attention, *inputs)
    rounded = value_and_gradients(fused_attention, *(x.bfloat16() for x in inputs))
    close([x.float() for x in rounded], exact, rtol=0.05, atol=0.05)


def test_fused_attention_never_holds_all_scores(monkeypatch):
    largest, bmm = [], torch.bmm

    def watched(a, b):
        largest.append(a.size(1) * b.size(2))
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 1, 2000, 2000, 4))
    fused_attention(q, k, v).sum().backward()
    assert max(largest) < 2000 * 2000 / 50


@pytest.mark.parametrize("n, tile", [(1, 1024), (50, 16), (64, 16), (33, 1024)])
def test_fused_loss_equals_plain_loss_and_cross_entropy(monkeypatch, n, tile):
    monkeypatch.setattr("model.LOSS_TILE", tile)
    torch.manual_seed(n)
    x, weight = torch.randn(n, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    targets = torch.randint(40, (n,))
    targets[1::3] = -1
    fused = value_and_gradients(lambda x, w: fused_loss(x, w, targets), x, weight)
    close(fused, value_and_gradients(lambda x, w: plain_loss(x, w, targets), x, weight))
    close(fused[0], F.cross_entropy(x @ weight.T, targets, ignore_index=-1))


def test_fused_rms_norm_equals_plain_and_torchs():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    plain = value_and_gradients(plain_rms_norm, x, weight)
    close(value_and_gradients(fused_rms_norm, x, weight), plain)
    close(plain[0], F.rms_norm(x, (8,), weight, 1e-6))


def test_gradcheck_passes_on_the_fused_functions():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 3, 4, 2))
    assert torch.autograd.gradcheck(fused_attention, (q, k, v))
    x, weight = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w: fused_loss(x, w, torch.tensor([0, -1, 2, 3])),
                                    (x, weight))
    assert torch.autograd.gradcheck(lambda x: fused_rms_norm(x, weight[0]), (x,))


@both
@pytest.mark.parametrize("kernels", KERNELS)
def test_all_kernels_give_the_same_loss_and_gradients(architecture, kernels):
    ids = torch.randint(64, (2, 17))
    results = []
    for name in ("plain", kernels):
        model = tiny(architecture).double()
        assert model.use(name) == name
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        results.append([p.grad for p in model.parameters()])
    close(results[1], results[0])


# -----------------------------------------------------------------------------
# The parts.


def test_norms_equal_torchs():
    x = torch.randn(4, 8)
    close(RMSNorm(8)(x), nn.RMSNorm(8, eps=1e-6)(x))
    close(LayerNorm(8)(x), nn.LayerNorm(8)(x))


def test_attention_equals_torchs_multihead_attention():
    model = tiny("gpt2")
    ours, theirs = model.transformer.blocks[0].attn, nn.MultiheadAttention(32, 4, batch_first=True)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    theirs.in_proj_weight.data = torch.cat([p.weight.data for p in projections])
    theirs.in_proj_bias.data = torch.cat([p.bias.data for p in projections])
    theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    x, mask = torch.randn(2, 9, 32), nn.Transformer.generate_square_subsequent_mask(9)
    close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_rotation_keeps_lengths_and_makes_scores_depend_on_distance_alone():
    config = tiny().config
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    turned = [[rotate(x, *rotary_table(config, t, 1, "cpu")) for x in (q, k)] for t in range(8)]
    close(turned[5][0].norm(), q.norm())
    close((turned[7][0] * turned[4][1]).sum(), (turned[3][0] * turned[0][1]).sum(),
          rtol=1e-5, atol=1e-6)


@both
def test_no_token_sees_the_future(architecture):
    model, ids = tiny(architecture), torch.randint(64, (1, 12))
    changed = ids.clone()
    changed[0, 7:] = (ids[0, 7:] + 1) % 64
    before, after = model(ids)[0], model(changed)[0]
    close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@both
@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_the_cache_changes_nothing_but_the_cost(architecture, chunk):
    model, ids = tiny(architecture), torch.randint(64, (2, 12))
    cache = [KVCache(model.config, 2, 12) for _ in model.transformer.blocks]
    parts = [model(piece, cache=cache)[0] for piece in ids.split(chunk, dim=1)]
    close(torch.cat(parts, dim=1), model(ids)[0], rtol=1e-4, atol=1e-5)


@both
def test_an_untrained_model_expects_every_token_alike(architecture):
    model, ids = tiny(architecture), torch.randint(64, (8, 17))
    assert abs(model(ids[:, :-1], ids[:, 1:])[1].item() - math.log(64)) < 0.1


def test_targets_give_the_loss_and_none_gives_the_logits():
    model, ids = tiny(), torch.randint(64, (2, 5))
    logits, nothing = model(ids)
    assert nothing is None and logits.shape == (2, 5, 64)
    close(model(ids, last_only=True)[0], logits[:, -1:])
    nothing, loss = model(ids, ids)
    assert nothing is None
    close(loss, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))


@both
def test_a_batch_can_be_overfitted(architecture):
    model, ids = tiny(architecture).train(), torch.randint(64, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_near_float32_and_keeps_float32_gradients(dtype):
    model, ids = tiny(), torch.randint(64, (4, 17))
    exact = model(ids[:, :-1], ids[:, 1:])[1].item()
    model.use(dtype=dtype)
    loss = model(ids[:, :-1], ids[:, 1:])[1]
    (1024 * loss).backward()
    assert abs(loss.item() - exact) < 0.02
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# -----------------------------------------------------------------------------
# Sizes, and what is refused.


@pytest.mark.parametrize("size, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                         ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_gpt2s_four_sizes_have_gpt2s_numbers_of_parameters(size, count):
    with torch.device("meta"):
        assert GPT(GPTConfig("gpt2", 50257, **SIZES[size])).n_parameters() == count


def test_flops_are_those_that_a_profiler_counts():
    model, T = tiny("gpt2"), 16
    model.use("plain")
    with torch.profiler.profile(with_flops=True) as profile:
        model(torch.zeros(1, T, dtype=torch.long))
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    counted = sum(event.flops for event in profile.events() if event.name in products)
    config = model.config
    half_of_the_scores = 2 * config.n_layer * config.n_embd * T  # plain attention makes them all
    assert counted / T == model.flops_per_token(T) / 3 + half_of_the_scores


@pytest.mark.parametrize("options, words", [
    (dict(n_embd=30), "n_embd=30 is no multiple of n_head=4"),
    (dict(n_kv_head=3), "n_head=4 is no multiple of n_kv_head=3"),
    (dict(n_embd=36), "n_embd / n_head = 9 must be even"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(dropout=1.0), "dropout=1.0"),
    (dict(position="rotary"), "unknown position 'rotary'"),
    (dict(activation="swiglo"), "did you mean swiglu"),
    (dict(architecture="modem"), "did you mean modern"),
])
def test_an_impossible_shape_is_refused_with_its_value(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


def test_too_long_a_sequence_and_a_full_cache_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens exceed block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = [KVCache(model.config, 1, 4) for _ in model.transformer.blocks]
    with pytest.raises(ValueError, match="max_tokens=4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)


def test_unknown_kernels_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean fused"):
        tiny().use("fussed")


# -----------------------------------------------------------------------------
# Checkpoints.


@both
def test_a_saved_model_comes_back_the_same(tmp_path, architecture):
    model, ids = tiny(architecture), torch.randint(64, (2, 9))
    save_model(model, tmp_path / "model.pt", step=3)
    again, state = load_model(tmp_path / "model.pt")
    assert state["step"] == 3 and again.config == model.config
    assert again.lm_head.weight is again.transformer.wte.weight
    close(again.eval()(ids)[0], model(ids)[0], rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"hi" * 99])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.pt"
    save_model(tiny(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="model.pt is damaged or not a checkpoint"):
        load_model(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"format": Evil()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_model(tmp_path / "model.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.pt"
    save_model(tiny(), path, step=1)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        save_model(tiny(seed=1), path, step=2)
    assert load_model(path)[1]["step"] == 1 and len(list(tmp_path.iterdir())) == 1
