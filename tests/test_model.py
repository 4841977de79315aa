"""model.py: twins agree in value and gradient, no token sees the future, checkpoints come back."""

import json
import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import (ACTIVATIONS, ARCHITECTURES, GPT, KERNELS, KEY_TILE, QUERY_TILE, SIZES, Block,
                   GPTConfig, KVCache, LayerNorm, RMSNorm, fused_attention, fused_loss, load_model,
                   plain_attention, plain_loss, plain_rotary, position_ids,
                   read_progress, read_safetensors, rotary_table, save_model, torch_attention,
                   write_safetensors)
from train import TrainConfig, build_optimizer, clip_gradients

each = pytest.mark.parametrize("architecture", ARCHITECTURES)
decoders = pytest.mark.parametrize("architecture", ["gpt2", "modern"])
close = torch.testing.assert_close
exactly = dict(rtol=1e-10, atol=1e-10)


def value_and_gradients(function, *inputs):
    """What a function returns, and the gradients of a fixed weighted sum of it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    y = torch.cat([part.flatten() for part in y]) if isinstance(y, tuple) else y
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    weights = weights.reshape(y.shape).cos()
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def qkv(B, H, K, T, S, D, dtype=torch.float64):
    torch.manual_seed(T)
    return [randn(B, heads, n, D, dtype=dtype) for heads, n in ((H, T), (K, S), (K, S))]


def run(model, ids, **options):
    """The logits; of a model that looks at a source, with one that is always the same."""
    if model.config.cross:
        options["memory"] = model.encode(torch.arange(len(ids) * 6).view(len(ids), 6) % 64)
    return model(ids, **options)[0]


def loss_of(model, ids):
    memory = model.encode(ids[:, ::2]) if model.config.cross else None
    return model(ids[:, :-1], ids[:, 1:], memory=memory)[1]


# -----------------------------------------------------------------------------
# Twins.

SHAPES = [(2, 4, 4, 1, 1, 8), (1, 4, 2, 7, 7, 6), (2, 6, 2, 5, 9, 8), (1, 2, 1, 1, 300, 4),
          (1, 2, 2, 129, 129, 4), (1, 3, 1, 300, 555, 4), (2, 2, 1, 256, 256, 4),
          (1, 2, 2, 9, 4, 4)]  # in the last one the first queries have no key


def mask_options(name, B, H, T, S):
    """The arguments of attention for each kind of mask that a test goes through."""
    torch.manual_seed(S)
    documents = torch.randint(2, (B, S)).cumsum(1)
    padding = (torch.arange(S) >= torch.arange(B)[:, None] * 2).long()
    return {"causal": {}, "bidirectional": dict(causal=False), "window": dict(window=3),
            "both ways in a window": dict(causal=False, window=40),
            "any mask": dict(causal=False, mask=torch.rand(B, H, T, S) < 0.3),
            "a mask of keys": dict(mask=torch.rand(B, 1, 1, S) < 0.8),
            "documents": dict(segments=documents), "left padding": dict(segments=padding),
            "all": dict(window=200, mask=torch.rand(T, S) < 0.9, segments=documents)}[name]


MASKS = ["causal", "bidirectional", "window", "both ways in a window", "any mask", "a mask of keys",
         "documents", "left padding", "all"]


@pytest.mark.parametrize("fast", [fused_attention, torch_attention])
@pytest.mark.parametrize("name, shape", [(name, shape) for name in MASKS for shape in SHAPES
                                         if name in MASKS[:6] or shape != SHAPES[-1]])
def test_fast_attention_equals_plain_attention_in_value_and_gradient(fast, shape, name):
    inputs, (B, H, _, T, S, _) = qkv(*shape), shape
    options = mask_options(name, B, H, T, S)
    plain = value_and_gradients(partial(plain_attention, **options), *inputs)
    close(value_and_gradients(partial(fast, **options), *inputs), plain, **exactly)


@pytest.mark.parametrize("name", MASKS)
def test_in_float32_the_twins_of_attention_agree_to_five_digits(name):
    inputs = qkv(2, 4, 2, 200, 300, 16, torch.float32)
    options = mask_options(name, 2, 4, 200, 300)
    plain = value_and_gradients(partial(plain_attention, **options), *inputs)
    close(value_and_gradients(partial(fused_attention, **options), *inputs), plain,
          rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attention", [plain_attention, fused_attention, torch_attention])
def test_dropout_drops_its_share_of_the_weights_and_keeps_the_mean(attention):
    q, k = torch.zeros(2, 3, 300, 400), torch.zeros(2, 3, 400, 400)
    v = torch.eye(400).expand(2, 3, 400, 400)  # so that the output is the weights
    weights = attention(q, k, v, causal=False, dropout=0.25) * 400
    assert abs((weights == 0).float().mean() - 0.25) < 0.005
    assert abs(weights.mean() - 1) < 0.005
    assert (weights.std(dim=-1) > 0).all() and not torch.equal(weights[0], weights[1])


def test_plain_attention_equals_the_loop_of_the_definition():
    q, k, v = qkv(1, 2, 2, 5, 5, 4)
    for h in range(2):
        for t in range(5):
            weights = torch.softmax(k[0, h, :t + 1] @ q[0, h, t] / 2, dim=0)
            close(plain_attention(q, k, v)[0, h, t], weights @ v[0, h, :t + 1])


@pytest.mark.parametrize("attention", [plain_attention, fused_attention, torch_attention])
def test_a_query_that_may_look_nowhere_gets_zeros_and_gives_no_gradient(attention):
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    y, d_q, *_ = value_and_gradients(partial(attention, causal=False, mask=mask),
                                     *qkv(1, 1, 1, 4, 4, 4))
    assert (y[0, 0, 2] == 0).all() and (d_q[0, 0, 2] == 0).all() and y.isfinite().all()


def test_fused_attention_in_bfloat16_is_within_rounding_of_float32():
    inputs = qkv(2, 4, 2, 200, 200, 16, torch.float32)
    exact = value_and_gradients(plain_attention, *inputs)
    rounded = value_and_gradients(fused_attention, *(x.bfloat16() for x in inputs))
    close([x.float() for x in rounded], exact, rtol=0.05, atol=0.05)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor holds that is made while it watches."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return made


@pytest.mark.parametrize("T", [1024, 4096])
def test_fused_attention_makes_no_tensor_that_grows_with_the_square_of_t(T):
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 1, T, T, 16))
    with Largest() as largest:
        fused_attention(q, k, v).sum().backward()
    assert largest.size == max(18 * T, QUERY_TILE * KEY_TILE)


def test_the_fused_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr("model.LOSS_TILE", 10 * 500)
    x, weight = (x.requires_grad_() for x in (randn(1000, 4), randn(500, 4)))
    with Largest() as largest:
        fused_loss(x, weight, torch.zeros(1000, dtype=torch.long)).backward()
    assert largest.size == 10 * 500


@pytest.mark.parametrize("n, tile", [(1, 2**20), (50, 16), (64, 640), (33, 1024)])
@pytest.mark.parametrize("options", [{}, dict(smoothing=0.1), dict(softcap=2.0), dict(z_loss=0.01),
                                     dict(softcap=3.0, smoothing=0.2, z_loss=0.1)])
def test_fused_loss_equals_plain_loss(monkeypatch, n, tile, options):
    monkeypatch.setattr("model.LOSS_TILE", tile)
    torch.manual_seed(n)
    x, weight, targets = randn(n, 8), randn(40, 8), torch.randint(40, (n,))
    targets[1::3] = -1
    fused, plain = (value_and_gradients(lambda x, w: loss(x, w, targets, **options), x, weight)
                    for loss in (fused_loss, plain_loss))
    close(fused, plain, **exactly)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_equals_torchs_cross_entropy(smoothing):
    x, weight, targets = randn(20, 8), randn(40, 8), torch.randint(40, (20,))
    targets[::4] = -1
    theirs = F.cross_entropy(x @ weight.T, targets, ignore_index=-1, label_smoothing=smoothing)
    close(plain_loss(x, weight, targets, smoothing=smoothing), theirs)


def test_z_loss_and_soft_cap_are_what_their_papers_say():
    x, weight, targets = randn(6, 8), randn(40, 8), torch.randint(40, (6,))
    capped = 5 * torch.tanh(x @ weight.T / 5)
    close(plain_loss(x, weight, targets, softcap=5), F.cross_entropy(capped, targets))
    extra = 0.1 * (x @ weight.T).exp().sum(dim=1).log().square().mean()
    close(plain_loss(x, weight, targets, z_loss=0.1), plain_loss(x, weight, targets) + extra)


def test_a_loss_without_targets_is_zero_and_teaches_nothing():
    x, weight = randn(3, 4), randn(9, 4)
    fused = value_and_gradients(lambda *i: fused_loss(*i, torch.full((3,), -1)), x, weight)
    assert all((part == 0).all() for part in fused)


def test_gradcheck_passes_on_the_fused_functions():
    check = torch.autograd.gradcheck
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 3, 4, 2))
    assert check(fused_attention, (q, k, v))
    mask = torch.rand(3, 4) < 0.7
    assert check(lambda *x: fused_attention(*x, causal=False, window=2, mask=mask), (q, k, v))
    x, weight = (randn(4, 4).requires_grad_() for _ in range(2))
    targets = torch.tensor([0, -1, 2, 3])
    assert check(lambda x, w: fused_loss(x, w, targets, 3.0, 0.1, 0.1), (x, weight))


@pytest.mark.parametrize("name", ["attention", "loss"])
def test_double_backward_through_a_fused_function_is_refused(name):
    x, weight = randn(1, 4, 1, 4).requires_grad_(), randn(4, 4)
    calls = dict(attention=lambda: fused_attention(x.mT, x.mT, x.mT),
                 loss=lambda: fused_loss(x.flatten(0, 2), weight, torch.arange(4)))
    slope, = torch.autograd.grad(calls[name]().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@each
@pytest.mark.parametrize("kernels", KERNELS)
def test_all_kernels_give_the_same_loss_and_gradients(architecture, kernels):
    ids = torch.randint(64, (2, 17))
    results = []
    for name in ("plain", kernels):
        model = tiny(architecture).double()
        assert model.use(name) == name
        loss_of(model, ids).backward()
        results.append([p.grad for p in model.parameters()])
    close(results[1], results[0])


OPTIONS = [dict(position="none"), dict(position="sinusoidal"), dict(position="learned"),
           dict(position="rope", qk_norm=False), dict(n_kv_head=1), dict(n_kv_head=4),
           dict(window=3), dict(softcap=5.0), dict(tied=False), dict(norm_first=False),
           dict(norm="layernorm"), dict(activation="relu2"), dict(activation="relu", bias=True),
           dict(position="none", qk_norm=True, causal=False), dict(cross=True)]
some = pytest.mark.parametrize("options", OPTIONS, ids=str)


@some
def test_a_training_step_changes_the_weights_alike_with_plain_and_fused_kernels(options):
    ids, after = torch.randint(64, (2, 17)), []
    for name in ("plain", "fused"):
        model = tiny(**dict(label_smoothing=0.1, z_loss=0.01) | options).double()
        model.train().use(name)
        optimizer = build_optimizer(model, TrainConfig(learning_rate=0.01))
        for step in range(2):
            torch.manual_seed(step)
            loss_of(model, ids).backward()
            clip_gradients(model, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        after.append([p.detach() for p in model.parameters()])
    close(after[1], after[0], rtol=1e-7, atol=1e-7)


@some
def test_activation_checkpointing_gives_the_same_gradients(options):
    ids, results = torch.randint(64, (2, 17)), []
    for recompute in (False, True):
        model = tiny(**dict(dropout=0.1) | options).train()
        model.use("torch", recompute=recompute)
        torch.manual_seed(1)
        loss_of(model, ids).backward()
        results.append([p.grad for p in model.parameters()])
    close(results[1], results[0])


# -----------------------------------------------------------------------------
# The parts, against torch's.


def test_norms_equal_torchs():
    x = torch.randn(4, 8)
    close(RMSNorm(8)(x), nn.RMSNorm(8, eps=1e-6)(x))
    close(LayerNorm(8)(x), nn.LayerNorm(8)(x))


def copy_attention(ours, theirs):
    """Give torch's MultiheadAttention the weights of our Attention."""
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    theirs.in_proj_weight.data = torch.cat([p.weight.data for p in projections])
    theirs.in_proj_bias.data = torch.cat([p.bias.data for p in projections])
    theirs.out_proj.load_state_dict(ours.o_proj.state_dict())


def test_attention_equals_torchs_multihead_attention():
    ours, theirs = tiny("gpt2").transformer.blocks[0].attn, nn.MultiheadAttention(32, 4,
                                                                                batch_first=True)
    copy_attention(ours, theirs)
    x, mask = torch.randn(2, 9, 32), nn.Transformer.generate_square_subsequent_mask(9)
    close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("cross", [True, False])
def test_a_block_equals_torchs_encoder_and_decoder_layer(norm_first, activation, cross):
    config = tiny("transformer", norm_first=norm_first, activation=activation).config
    ours = Block(config, cross).eval()
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = kind(32, 4, 128, 0.0, ACTIVATIONS[activation], batch_first=True,
                  norm_first=norm_first).eval()
    copy_attention(ours.attn, theirs.self_attn)
    pairs = [(theirs.linear1, ours.mlp.up_proj), (theirs.linear2, ours.mlp.down_proj)]
    norms = [ours.attn_norm, *([ours.cross_norm] if cross else []), ours.mlp_norm]
    if cross:
        copy_attention(ours.cross, theirs.multihead_attn)
    for n, norm in enumerate(norms, 1):
        nn.init.normal_(norm.weight)
        pairs.append((getattr(theirs, f"norm{n}"), norm))
    for to, of in pairs:
        to.load_state_dict(of.state_dict())
    x, source = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    expected = theirs(x, source, tgt_mask=mask) if cross else theirs(x, src_mask=mask)
    close(ours(x, memory=(source, None), causal=True), expected, rtol=1e-4, atol=1e-5)


def test_rotation_keeps_lengths_and_makes_scores_depend_on_distance_alone():
    config = tiny().config
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    rotated = [[plain_rotary(x, *rotary_table(config, torch.tensor([t]))) for x in (q, k)]
              for t in range(8)]
    close(rotated[5][0].norm(), q.norm())
    close((rotated[7][0] * rotated[4][1]).sum(), (rotated[3][0] * rotated[0][1]).sum(),
          rtol=1e-5, atol=1e-6)


def test_position_ids_count_from_the_start_of_each_segment():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5], [1, 2, 1, 2, 2, 1]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]
    assert position_ids(segments).tolist() == expected


# -----------------------------------------------------------------------------
# The family.


@pytest.mark.parametrize("options", OPTIONS[:-2], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "modern", "transformer"])
def test_no_token_sees_the_future(architecture, options):
    model, ids = tiny(architecture, **options), torch.randint(64, (1, 12))
    changed = ids.clone()
    changed[0, 7:] = (ids[0, 7:] + 1) % 64
    before, after = run(model, ids), run(model, changed)
    close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("options", [dict(architecture="bert"), dict(causal=False)], ids=str)
def test_without_causal_the_first_token_sees_the_last(options):
    model, ids = tiny(**options), torch.randint(64, (1, 12))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 64
    assert not torch.allclose(model(ids)[0][:, 0], model(changed)[0][:, 0])


def test_in_a_window_a_token_sees_the_last_few_of_each_layer_alone():
    model, ids = tiny(window=3), torch.randint(64, (1, 12))  # 2 layers: 1 + 2 + 2 tokens
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 64
    before, after = model(ids)[0], model(changed)[0]
    close(before[:, 5:], after[:, 5:])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_without_positions_a_bag_of_tokens_is_all_that_is_seen():
    model, ids = tiny(position="none", causal=False), torch.randint(64, (1, 12))
    close(model(ids.flip(1))[0], model(ids)[0].flip(1), rtol=1e-4, atol=1e-5)


def test_a_decoder_sees_all_of_its_source_and_no_padding():
    model, ids = tiny("transformer"), torch.randint(64, (2, 5))
    source = torch.randint(64, (2, 7))
    first, _ = model(ids, memory=model.encode(source))
    source[:, -1] = (source[:, -1] + 1) % 64
    assert not torch.allclose(model(ids, memory=model.encode(source))[0][:, 0], first[:, 0])
    segments = torch.tensor([[1] * 6 + [0]] * 2)
    padded, _ = model(ids, memory=model.encode(source, segments))
    close(padded, model(ids, memory=model.encode(source[:, :6]))[0], rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("options", OPTIONS[:11], ids=str)
def test_documents_in_one_row_are_read_as_if_alone(architecture, options):
    model, ids = tiny(architecture, **options), torch.randint(64, (1, 12))
    segments = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3])
    apart = [run(model, part) for part in ids.split([5, 4, 3], dim=1)]
    close(run(model, ids, segments=segments), torch.cat(apart, dim=1), rtol=1e-4, atol=1e-5)


def cached(model, ids, chunk, **options):
    """The logits of ids fed chunk by chunk through a cache."""
    cache = [KVCache(model.config, *ids.shape) for _ in model.transformer.blocks]
    segments, parts = options.pop("segments", None), []
    for piece in ids.split(chunk, dim=1):
        end = cache[0].length + piece.size(1)
        if segments is not None:
            options["segments"] = segments[:, :end]
        parts.append(run(model, piece, cache=cache, **options))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "transformer"])
@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_the_cache_changes_nothing_but_the_cost(architecture, chunk):
    model, ids = tiny(architecture), torch.randint(64, (2, 12))
    close(cached(model, ids, chunk), run(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[:11], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_cache_serves_every_position_and_head_layout(options, kernels):
    model, ids = tiny(**options), torch.randint(64, (2, 12))
    model.use(kernels)
    close(cached(model, ids, 5), run(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "transformer"])
@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_padded_to_the_left_a_prompt_is_read_as_if_alone_also_with_the_cache(architecture, chunk):
    model, ids = tiny(architecture), torch.randint(64, (2, 12))
    segments = torch.ones(2, 12, dtype=torch.long)
    segments[1, :5] = 0
    alone = model(ids[1:, 5:], memory=model.encode(torch.arange(6, 12)[None])
                  if model.config.cross else None)[0]
    close(run(model, ids, segments=segments)[1:, 5:], alone, rtol=1e-4, atol=1e-5)
    close(cached(model, ids, chunk, segments=segments)[1:, 5:], alone, rtol=1e-4, atol=1e-5)


@each
def test_an_untrained_model_expects_every_token_alike(architecture):
    model, ids = tiny(architecture), torch.randint(64, (8, 17))
    assert abs(loss_of(model, ids).item() - math.log(64)) < 0.15


def test_targets_give_the_loss_and_none_gives_the_logits():
    model, ids = tiny(softcap=4.0, label_smoothing=0.5), torch.randint(64, (2, 5))
    logits, nothing = model(ids)
    assert nothing is None and logits.shape == (2, 5, 64) and logits.abs().max() < 4
    close(model(ids, last_only=True)[0], logits[:, -1:])
    nothing, loss = model(ids, ids)
    assert nothing is None
    close(loss, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))  # smoothed in training alone


@each
def test_a_batch_can_be_overfitted(architecture):
    model, ids = tiny(architecture).train(), torch.randint(64, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@each
@pytest.mark.parametrize("n_classes", [1, 3])
def test_a_head_for_classes_or_a_number_learns_and_ignores_padding(architecture, n_classes):
    model = tiny(architecture, n_classes=n_classes).train()
    ids, targets = torch.randint(64, (6, 9)), torch.arange(6) % 3
    memory = model.encode(ids) if model.config.cross else None
    logits, nothing = model(ids, memory=memory)
    assert logits.shape == (6, n_classes) and nothing is None
    _, loss = model(ids, targets, memory=memory)
    close(loss, F.mse_loss(logits[:, 0], targets.float()) if n_classes == 1
          else F.cross_entropy(logits, targets))
    segments = F.pad(torch.ones(6, 9, dtype=torch.long), (0, 2))
    close(model(F.pad(ids, (0, 2)), memory=memory, segments=segments)[0], logits,
          rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_near_float32_and_keeps_float32_gradients(architecture, dtype):
    model, ids = tiny(architecture), torch.randint(64, (4, 17))
    exact = loss_of(model, ids).item()
    model.use("torch", dtype)
    loss = loss_of(model, ids)
    (1024 * loss).backward()
    assert abs(loss.item() - exact) < 0.02
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@each
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_module_is_called_in_a_training_step_so_that_hooks_see_it(architecture, kernels):
    model, called = tiny(architecture, qk_norm=True).train(), set()
    model.use(kernels)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *call, name=name: called.add(name))
    loss_of(model, torch.randint(64, (2, 9))).backward()
    unused = {name for name, _ in model.named_modules() if name.endswith(("blocks", "encoder"))}
    assert {name for name, _ in model.named_modules()} - called <= unused


def test_auto_takes_the_fastest_of_its_trial_and_leaves_no_gradient():
    model = tiny()
    name = model.use("auto", batch_size=2)
    assert name == min(model.trial, key=model.trial.get) and {*model.trial} >= {"fused", "torch"}
    assert all(p.grad is None for p in model.parameters())


def test_rows_chosen_from_a_cache_keep_the_source_that_they_attend_to():
    model, ids = tiny("transformer"), torch.randint(64, (2, 6))
    memory = model.encode(torch.randint(64, (2, 5)))
    cache = [KVCache(model.config, 2, 6) for _ in model.transformer.blocks]
    model(ids[:, :5], memory=memory, cache=cache)
    for layer in cache:
        layer.choose(torch.tensor([1, 0]))
    swapped = model(ids.flip(0)[:, 5:], memory=memory, cache=cache)[0]
    close(swapped.flip(0), model(ids, memory=memory)[0][:, 5:], rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# Sizes, and what is refused.


@pytest.mark.parametrize("size, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                         ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_gpt2s_four_sizes_have_gpt2s_numbers_of_parameters(size, count):
    with torch.device("meta"):
        assert GPT(GPTConfig("gpt2", 50257, **SIZES[size])).n_parameters() == count


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "bert"])
def test_flops_are_those_that_a_profiler_counts(architecture):
    model, T = tiny(architecture), 16
    model.use("plain")
    with torch.profiler.profile(with_flops=True) as profile:
        model(torch.zeros(1, T, dtype=torch.long))
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    counted = sum(event.flops for event in profile.events() if event.name in products)
    c = model.config
    unseen = 2 * c.n_layer * c.n_embd * T if c.causal else 0  # plain attention makes all scores
    assert counted / T == model.flops_per_token(T) / 3 + unseen


@pytest.mark.parametrize("options, words", [
    (dict(n_embd=30), "n_embd=30 is no multiple of n_head=4"),
    (dict(n_kv_head=3), "n_head=4 is no multiple of n_kv_head=3"),
    (dict(n_kv_head=-1), "n_kv_head=-1 must be at least 0"),
    (dict(n_embd=36), "n_embd / n_head = 9 must be even"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
    (dict(dropout=math.nan), "dropout=nan must be"),
    (dict(n_layer="two"), "n_layer='two' must be .* a whole number"),
    (dict(bias=3), "bias=3 must be of type bool"),
    (dict(window=-2), "window=-2 must be at least 0"),
    (dict(position="rotary"), "unknown position 'rotary'"),
    (dict(position="sinusodal"), "did you mean sinusoidal"),
    (dict(norm="layernrm"), "did you mean layernorm"),
    (dict(activation="swiglo"), "did you mean swiglu"),
    (dict(architecture="modem"), "did you mean modern"),
])
def test_an_impossible_shape_is_refused_with_its_value(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


@pytest.mark.parametrize("id", [64, -1])
def test_an_id_outside_the_vocabulary_is_refused_before_it_is_looked_up(id):
    ids = torch.tensor([[1, id, 2]])
    with pytest.raises(ValueError, match=f"token id {id} is not from 0 to 63: vocab_size=64"):
        tiny()(ids)
    target = id - int(id < 0)  # as a target, -1 is allowed
    with pytest.raises(ValueError, match=f"token id {target} is not from -1 to 63: vocab_size=64"):
        tiny()(torch.ones_like(ids), torch.tensor([[1, -1, target]]))


def test_a_class_that_the_head_does_not_have_is_refused():
    with pytest.raises(ValueError, match="class 3 is not from 0 to 2: n_classes=3"):
        tiny(n_classes=3)(torch.ones(2, 4, dtype=torch.long), torch.tensor([0, 3]))


def test_too_long_a_sequence_and_a_full_cache_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens exceed block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = [KVCache(model.config, 1, 4) for _ in model.transformer.blocks]
    with pytest.raises(ValueError, match="max_tokens=4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)


def test_segments_that_leave_out_tokens_are_refused():
    model, ids = tiny(), torch.zeros(2, 5, dtype=torch.long)
    cache = [KVCache(model.config, 2, 12) for _ in model.transformer.blocks]
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"segments of shape \(2, 5\) must be \(2, 10\)"):
        model(ids, cache=cache, segments=torch.ones_like(ids))


def test_a_source_is_asked_for_where_one_is_read_and_refused_where_none_is():
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="memory=model.encode"):
        tiny("transformer")(ids)
    with pytest.raises(ValueError, match="architecture=gpt2 has no encoder"):
        tiny("gpt2").encode(ids)


def test_unknown_kernels_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean fused"):
        tiny().use("fussed")


def test_a_second_backward_adds_the_same_gradients_again():
    model, ids = tiny(), torch.randint(64, (2, 5))
    _, loss = model(ids, ids)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    close([p.grad for p in model.parameters()], [2 * g for g in once])


# -----------------------------------------------------------------------------
# Checkpoints, and weights that others trained.


@pytest.mark.parametrize("options", [*(dict(architecture=name) for name in ARCHITECTURES),
                                     dict(tied=False), dict(n_classes=3)], ids=str)
def test_a_saved_model_comes_back_the_same(tmp_path, options):
    model, ids, path = tiny(**options), torch.randint(64, (2, 9)), tmp_path / "model.safetensors"
    save_model(model, path, {"optimizer.x.step": torch.tensor(7.0)}, step=3)
    again, state = load_model(path)
    assert state == dict(step=3, tensors={"optimizer.x.step": torch.tensor(7.0)})
    assert read_progress(path)["step"] == 3 and again.config == model.config
    assert again.n_parameters() == model.n_parameters()
    assert all(p.requires_grad for p in again.parameters())
    close(run(again.eval(), ids), run(model, ids), rtol=0, atol=0)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"hi" * 99,
                                    lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_model(tiny(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_model(path)


def test_a_checkpoint_whose_weights_do_not_fit_is_refused_with_the_list(tmp_path):
    path = tmp_path / "model.safetensors"
    for name, value, words in (
            ("vocab_size", 65, r"wte.weight is \(64, 32\), not \(65, 32\)"),
            ("n_layer", 1, "blocks.1.attn_norm.weight is .*, not expected"),
            ("n_layer", 3, "blocks.2.attn_norm.weight is missing, not .* more"),
            ("n_layer", 10**9, "n_layer=1000000000 must be at least 1 and below 1025")):
        model = tiny()
        model.config.__dict__[name] = value
        save_model(model, path)
        with pytest.raises(ValueError, match=words):
            load_model(path)


@pytest.mark.parametrize("change", [dict(config="null"), dict(config='{"n_layer": "two"}'),
                                    dict(config='{"n_head": 0}'), dict(config='{"n_haed": 2}'),
                                    dict(config="{"), dict(progress="[1]")], ids=str)
def test_a_checkpoint_whose_metadata_makes_no_model_is_refused_in_one_line(tmp_path, change):
    path = tmp_path / "model.safetensors"
    metadata = dict(version="3", config=json.dumps(asdict(tiny().config)), progress="{}")
    with open(path, "wb") as file:
        write_safetensors(file, dict(tiny().named_parameters()), metadata | change)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its .*$"):
        load_model(path)


@pytest.mark.parametrize("version, words", [
    ("2", "it has version '2', and '3' is read"), ("4", "it has version '4'")])
def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path, version, words):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        write_safetensors(file, {}, dict(version=version))
    with pytest.raises(ValueError, match=words):
        load_model(path)


def test_a_checkpoint_of_the_time_before_safetensors_is_refused_by_its_age(tmp_path):
    torch.save({}, tmp_path / "step_000001.pt")
    with pytest.raises(ValueError, match="older version .* train again"):
        load_model(tmp_path / "step_000001.pt")


def test_safetensors_are_read_and_written_as_the_library_does(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="compares with safetensors")
    tensors = {f"{dtype}".removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype)
               for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    library.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    close(read_safetensors(tmp_path / "x.safetensors"), tensors, rtol=0, atol=0)
    with open(tmp_path / "y.safetensors", "wb") as file:
        write_safetensors(file, tensors, dict(format="pt"))
    close(library.load_file(tmp_path / "y.safetensors"), tensors, rtol=0, atol=0)


def safetensors(header, body=b"\0" * 16):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def entry(dtype="F32", shape=(2, 2), data_offsets=(0, 16)):
    return dict(x=dict(dtype=dtype, shape=shape, data_offsets=data_offsets))


@pytest.mark.parametrize("data", [
    b"", b"hi", safetensors(b"{"), safetensors([1]), safetensors(b"[" * 10**5), b"~" * 64,
    safetensors(dict(x=7)), *(safetensors(entry(**wrong)) for wrong in (
        dict(dtype="F99"), dict(shape=(2, 3)), dict(shape="a"), dict(shape=(2**40, 2**40)),
        dict(shape=(-2, -2)), dict(shape=(2.0, 2)), dict(data_offsets=(0, 99)),
        dict(data_offsets=(-16, 0))))])
def test_a_file_that_is_not_safetensors_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged or not in the safetensors"):
        read_safetensors(path)
