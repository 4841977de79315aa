"""chapters/longrange.py: exact forms equal plain attention, the linear one its sum over keys."""

from functools import partial

import pytest
import torch
from conftest import tiny
from test_model import close, exactly, mask_options, qkv, value_and_gradients

import chapters.longrange as leaf
from chapters.longrange import (ATTENTIONS, block_sparse_attention, key_blocks, linear_attention,
                                recall, recall_batch, seconds, sliding_attention, sparse_mask)
from model import plain_attention
from sample import complete_batch, generate

SHAPES = [(1, 4, 2, 7, 7, 6), (2, 6, 2, 5, 9, 8), (1, 2, 1, 1, 30, 4), (1, 3, 1, 30, 75, 4)]
PATTERNS = [dict(block=4), dict(block=1, n_local=1, n_random=2), dict(block=100)]
masks = pytest.mark.parametrize("name", ["causal", "documents", "left padding"])


def same(fast, plain, inputs):
    close(value_and_gradients(fast, *inputs), value_and_gradients(plain, *inputs), **exactly)


@masks
@pytest.mark.parametrize("window", [0, 1, 3, 40])
def test_sliding_attention_equals_plain_attention_with_a_window(window, name):
    for shape in [*SHAPES, (1, 2, 2, 9, 4, 4)][:5 - (name != "causal")]:
        B, H, _, T, S, _ = shape
        options = mask_options(name, B, H, T, S) | dict(window=window)
        same(partial(sliding_attention, **options), partial(plain_attention, **options),
             qkv(*shape))


@masks
@pytest.mark.parametrize("pattern", PATTERNS)
def test_block_sparse_attention_equals_plain_attention_with_its_mask(pattern, name):
    for shape in SHAPES:
        B, H, _, T, S, _ = shape
        options = mask_options(name, B, H, T, S)
        same(partial(block_sparse_attention, **options, **pattern),
             partial(plain_attention, mask=sparse_mask(T, S, **pattern), **options), qkv(*shape))


def test_a_block_attends_to_the_first_some_earlier_and_its_own_neighbourhood():
    for i in range(40):
        blocks = key_blocks(i, n_local=3, n_random=2)
        assert {0, i, max(0, i - 2)} <= {*blocks} <= {*range(i + 1)}
        assert len({*blocks}) == len(blocks) == min(i + 1, 6)
    assert len({tuple(set(key_blocks(i)) - {0, i, i - 1}) for i in range(9, 40)}) > 5  # random


def test_linear_attention_is_the_weighted_mean_of_the_values_so_far():
    q, k, v = qkv(1, 2, 1, 6, 9, 4)
    y, f = linear_attention(q, k, v), leaf.feature_map
    for h in range(2):
        for t in range(6):
            weights = torch.stack([f(q[0, h, t]) @ f(k[0, 0, s]) for s in range(9 - 6 + t + 1)])
            close(y[0, h, t], weights / weights.sum() @ v[0, 0, :len(weights)], **exactly)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention_is_the_same_as_a_recurrence_in_chunks_and_all_at_once(shape):
    recurrent, inputs = partial(linear_attention, chunk=1), qkv(*shape)
    for chunk in (3, 100):
        same(partial(linear_attention, chunk=chunk), recurrent, inputs)
    both_ways = linear_attention(*inputs, causal=False)
    close(both_ways[:, :, -1], linear_attention(*inputs)[:, :, -1], **exactly)  # it sees all


@pytest.mark.parametrize("attention", [sliding_attention, block_sparse_attention, linear_attention])
def test_a_model_without_full_attention_sees_no_future_and_writes_the_same_with_a_cache(attention):
    model, ids = tiny(window=5 * (attention == sliding_attention)), torch.arange(32).view(2, 16)
    small = partial(attention, block=2) if attention == block_sparse_attention else attention
    model.set_functions(dict(attention=small))
    changed = ids.clone()
    changed[:, 9:] = 7
    close(model(ids)[0][:, :9], model(changed)[0][:, :9], rtol=0, atol=1e-6)
    assert not torch.equal(model(ids)[0][:, 9:], model(changed)[0][:, 9:])
    texts = [torch.stack([*generate(model, ids[:, :4], 12, temperature=0, cache=cache)])
             for cache in (True, False)]
    assert torch.equal(*texts)


def test_prompts_of_several_lengths_are_continued_in_a_window_as_each_alone(model, tokenizer):
    model.set_functions(dict(attention=sliding_attention))
    prompts, options = ["the cat", "the dog sees a red tree"], dict(temperature=0, max_new_tokens=9)
    together = complete_batch(model, tokenizer, prompts, **options)
    alone = [complete_batch(model, tokenizer, [text], **options)[0] for text in prompts]
    model.use("torch")
    assert together == alone == complete_batch(model, tokenizer, prompts, **options)


@pytest.mark.parametrize("attention, options", [
    (sliding_attention, dict(causal=False)), (sliding_attention, dict(mask=torch.ones(7, 7) > 0)),
    (block_sparse_attention, dict(window=2)), (linear_attention, dict(window=2)),
    (linear_attention, dict(dropout=0.1)),
    (linear_attention, dict(segments=torch.zeros(1, 7, dtype=torch.long)))])
def test_what_an_attention_cannot_honour_is_refused_by_name(attention, options):
    name = "bidirectional" if "causal" in options else [*options][0]
    with pytest.raises(ValueError, match=f"{attention.__name__} takes no {name}"):
        attention(*qkv(1, 4, 2, 7, 7, 6), **options)


def test_only_keys_are_asked_for_and_the_answer_is_the_value_that_stood_after_them():
    x, y = recall_batch(torch.Generator().manual_seed(0), B=3, n_pairs=5, n_keys=9)
    for ids, targets in zip(x.tolist(), y.tolist()):
        pairs = dict(zip(ids[:10:2], ids[1:10:2]))
        assert len(pairs) == 5 and max(pairs) < 9 <= min(pairs.values())
        assert targets[:10] == [-1] * 10 and targets[11::2] == [-1] * 5
        assert [pairs[key] for key in ids[10::2]] == targets[10::2] == ids[11::2]


def test_recall_is_the_share_of_right_values(monkeypatch):
    x, y = draw = recall_batch(torch.Generator().manual_seed(0), B=4)
    logits = torch.nn.functional.one_hot(y.clamp(min=0), 128).float()
    logits[0] = 0  # then the likeliest is key 0
    assert recall(lambda x: (logits, None), lambda generator: draw) == 0.75


def test_times_are_taken_of_each_attention_at_each_length():
    taken = seconds(lengths=(8, 16), window=4, times=1)
    assert {*taken} == {*ATTENTIONS} and all(len(own) == 2 and min(own) > 0
                                             for own in taken.values())


@pytest.mark.slow
def test_full_attention_recalls_what_a_window_and_a_state_forget():
    found = leaf.recall_experiment(n_steps=120)
    assert found["full"] > 0.9 > 0.6 > max(found["window"], found["linear"])


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_attention(call):
    out, err = call(leaf, "--longest=64", "--window=4", "--n_steps=1", "--seeds=1")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [*ATTENTIONS], err
