"""chapters/latent.py: one short vector a token in the cache, and what attention makes of it."""

from functools import partial

import pytest
import torch
from conftest import tiny
from test_model import close, exactly, value_and_gradients

import chapters.latent as leaf
from chapters.latent import Latent, cache_bytes, use_latent
from model import KVCache, plain_attention
from sample import complete_batch, generate, new_cache


def latent_model(rank=6, n_rotary=4, **options):
    """A tiny model with latent attention, whose head has 8 channels."""
    model = tiny(**options)
    assert use_latent(model, rank, n_rotary) == 2
    for p in model.parameters():  # large enough that attention is not uniform
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else None
    return model


@pytest.mark.parametrize("kernels", ["plain", "fused", "torch"])
@pytest.mark.parametrize("rank, n_rotary", [(6, 4), (16, 2), (5, 0)])
def test_absorbed_equals_plain_latent_attention_in_value_and_gradient(rank, n_rotary, kernels):
    model = latent_model(rank, n_rotary).double()
    model.use(kernels)
    attn = model.transformer.blocks[0].attn
    inputs = [torch.randn(2, H, T, n).double()
              for H, T, n in ((4, 5, 8), (1, 7, rank), (1, 7, n_rotary))]
    plain, absorbed = (value_and_gradients(lambda q, c, k: form(q, c, k, {}), *inputs)
                       for form in (attn.plain, attn.absorbed))
    close(absorbed, plain, **exactly)


@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_cache_changes_nothing(chunk, architecture):
    model, ids = latent_model(architecture=architecture), torch.randint(64, (2, 12))
    cache = new_cache(model, 2, 12)
    parts = [model(piece, cache=cache)[0] for piece in ids.split(chunk, dim=1)]
    close(torch.cat(parts, dim=1), model(ids)[0], rtol=1e-4, atol=1e-5)


def test_with_and_without_a_cache_the_same_text_is_written(tokenizer):
    model = latent_model(vocab_size=tokenizer.n_vocab, block_size=64)
    prompts, options = ["the cat", "the dog sees a red tree"], dict(seed=3, max_new_tokens=12)
    texts = [complete_batch(model, tokenizer, prompts, cache=cache, **options)
             for cache in (True, False)]
    assert texts[0] == texts[1] != ["", ""]
    ids = torch.randint(64, (2, 3))
    assert torch.equal(*(torch.stack([*generate(model, ids, 9, cache=cache, seed=1)])
                         for cache in (True, False)))


def test_the_rows_of_a_cache_can_be_chosen():
    model, ids = latent_model(), torch.randint(64, (3, 6))
    cache, again = new_cache(model, 3, 8), torch.tensor([2, 0, 2])
    model(ids[:, :5], cache=cache)
    for layer in cache:
        layer.choose(again)
    close(model(ids[again, 5:], cache=cache)[0], model(ids[again])[0][:, 5:], rtol=1e-4, atol=1e-5)


def test_with_a_latent_as_wide_as_the_stream_it_can_be_any_multi_head_attention():
    model, ids = tiny("gpt2", bias=False), torch.randint(64, (2, 9))
    expected = model(ids)[0]
    found = [block.attn for block in model.transformer.blocks]
    use_latent(model, rank=32, n_rotary=0)
    for block, attn in zip(model.transformer.blocks, found):
        block.attn.kv_down.weight = torch.nn.Parameter(torch.eye(32))
        block.attn.k_up.weight, block.attn.v_up.weight = attn.k_proj.weight, attn.v_proj.weight
    close(model(ids)[0], expected)


def test_what_turns_depends_on_the_distance_of_tokens_alone():
    model = latent_model()
    attn, scores = model.transformer.blocks[0].attn, []
    attn.attention = lambda q, k, v, **options: scores.append(q @ k.mT) or plain_attention(q, k, v)
    x = torch.randn(1, 1, 32).expand(1, 9, 32)  # the same token everywhere
    _, table = model.transformer.embed(torch.zeros(1, 9, dtype=torch.long), torch.arange(9))
    attn(x, table=table)
    close(scores[0][..., 1:, 1:], scores[0][..., :-1, :-1])
    assert scores[0][0, :, 8].std(dim=-1).min() > 1e-3
    turned = attn.rotate(x[..., None, :4], table)[0, :, 0]  # (T, R), in pairs (j, j + 2)
    slow = torch.arange(9) * 10000.0 ** (-2 / 8)
    close(turned[:, 1], x[0, :, 1] * slow.cos() - x[0, :, 3] * slow.sin())


def test_no_token_sees_the_future_and_every_weight_learns():
    model, ids = latent_model(), torch.randint(64, (2, 16))
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 64
    close(model(ids)[0][:, :9], model(changed)[0][:, :9])
    model(ids, ids)[1].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.transformer.blocks.parameters())


def test_the_cache_holds_rank_and_rotary_channels_instead_of_all_keys_and_values():
    model, T = tiny(n_kv_head=4), 16
    assert cache_bytes(model, T) == 4 * T * 2 * 2 * 32  # bytes, tokens, layers, k and v, C
    use_latent(model, rank=6, n_rotary=4)
    assert cache_bytes(model, T) == 4 * T * 2 * (6 + 4)
    cache = KVCache(model.config, 3, 5)
    assert [x.shape for x in Latent.append(cache, torch.ones(3, 1, 2, 6), torch.ones(3, 1, 2, 4))
            ] == [(3, 1, 2, 6), (3, 1, 2, 4)]


@pytest.mark.parametrize("rank, n_rotary", [(0, 4), (6, 3), (6, 8), (6, -2)])
def test_sizes_that_make_no_latent_attention_are_refused(rank, n_rotary):
    with pytest.raises(ValueError, match=f"rank={rank} .*n_rotary={n_rotary}"):
        use_latent(tiny(), rank, n_rotary)


def test_a_source_or_a_prefix_is_refused():
    attn = latent_model().transformer.blocks[0].attn
    for option in "source", "prefix":
        with pytest.raises(ValueError, match="neither a source nor a prefix"):
            attn(torch.zeros(1, 2, 32), **{option: torch.zeros(1, 2, 32)})


@pytest.mark.slow
def test_one_layer_equals_that_of_transformers():
    names = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2",
                                reason="needs transformers with DeepSeek-V2")
    from transformers import DeepseekV2Config
    r, R, D, H, C = 6, 4, 8, 4, 32
    theirs = names.DeepseekV2Attention(DeepseekV2Config(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=None,
        kv_lora_rank=r, qk_rope_head_dim=R, qk_nope_head_dim=D - R, v_head_dim=D,
        attn_implementation="eager"), 0).eval()
    model = latent_model(r, R, qk_norm=False)
    attn, x = model.transformer.blocks[0].attn, torch.randn(2, 7, C)
    attn.kv_norm = torch.nn.RMSNorm(r, 1e-6)
    # theirs rotate channels (2j, 2j + 1), ours (j, j + R / 2)
    order = torch.arange(R).view(2, -1).T.flatten()
    q = attn.q_proj.weight.data.view(H, D, C)
    state = {"q_proj.weight": torch.cat((q[:, :D - R], q[:, D - R:][:, order]), 1).flatten(0, 1),
             "kv_a_proj_with_mqa.weight": attn.kv_down.weight[[*range(r), *(r + order).tolist()]],
             "kv_a_layernorm.weight": torch.ones(r), "o_proj.weight": attn.o_proj.weight,
             "kv_b_proj.weight": torch.cat((attn.k_up.weight.view(H, -1, r),
                                            attn.v_up.weight.view(H, -1, r)), 1).flatten(0, 1)}
    theirs.load_state_dict(state)
    _, table = model.transformer.embed(torch.zeros(2, 7, dtype=torch.long), torch.arange(7))
    angles = torch.polar(torch.ones(1, 7, R // 2), torch.arange(7)[:, None]
                         * 10000.0 ** (-torch.arange(0, R, 2) / D))  # theirs: / R
    future = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    close(attn(x, table=table), theirs(x, attention_mask=future, position_embeddings=angles)[0],
          rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_compares_caches(call):
    out, err = call(leaf, "--n_steps=1", "--seeds=1", "--rank=8", "--n_rotary=4")
    rows = [line.split() for line in out.splitlines()]
    assert [row[-3] for row in rows[1:]] == ["1,024", "512", "256", str(2 * 4 * (8 + 4))], err


def test_the_command_refuses_a_rotation_that_no_head_has_in_one_line(call):
    assert call(leaf, "--n_rotary=5")[1].splitlines()[-1].count("n_rotary=5") == 1
