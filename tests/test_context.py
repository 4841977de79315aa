"""chapters/context.py: slower rotations as in the papers, a model that reads past block_size."""

import math
from copy import deepcopy

import pytest
import torch
from conftest import tiny
from test_model import close

import chapters.context as leaf
from chapters.context import (METHODS, extend, loss_by_position, rotary_frequencies, yarn,
                              yarn_ramp)
from model import GPTConfig, rotary_table
from sample import generate

CONFIG = GPTConfig(n_head=2, n_embd=128, block_size=4096)  # 64 channels in a head


def test_the_frequencies_are_those_of_the_models_table():
    positions = torch.arange(50)
    angles = positions[:, None] * rotary_frequencies(64)
    close(rotary_table(CONFIG, positions), (angles.cos(), angles.sin()))
    assert torch.equal(METHODS["none"](CONFIG, 8)[0], rotary_frequencies(64))


def test_interpolation_at_the_last_new_position_is_where_training_ended():
    close(METHODS["interpolation"](CONFIG, 4)[0] * (4 * 4096), rotary_frequencies(64) * 4096)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest():
    plain, (scaled, _) = rotary_frequencies(64), METHODS["ntk"](CONFIG, 4)
    close((plain / scaled)[[0, -1]], torch.tensor([1.0, 4.0]))
    assert ((plain / scaled).diff() > 0).all()


def test_yarn_leaves_pairs_that_turn_often_and_interpolates_those_that_turn_less_than_once():
    plain, (scaled, sharper) = rotary_frequencies(64), yarn(CONFIG, 4)
    turns = 4096 * plain / (2 * math.pi)
    close(scaled[turns >= 32], plain[turns >= 32])
    close(scaled[turns <= 1], plain[turns <= 1] / 4)
    between = (plain / scaled)[(turns < 32) & (turns > 1)]
    assert len(between) > 5 and (between.diff() > 0).all() and 1 < between[0] < between[-1] < 4
    assert sharper == pytest.approx(0.1 * math.log(4) + 1)


def test_the_ramp_is_linear_in_the_number_of_the_pair():
    steps = yarn_ramp(rotary_frequencies(64), 4096).diff()
    inside = steps[steps > 1e-6][1:-1]  # at the ends it begins between two pairs
    close(inside, inside[:1].expand_as(inside), rtol=1e-3, atol=0)
    assert len(inside) > 5


def test_without_a_factor_nothing_changes():
    ids = torch.randint(64, (2, 16))
    for method in METHODS:
        close(extend(tiny(), 1, method)(ids)[0], tiny()(ids)[0])


@pytest.mark.parametrize("method", METHODS)
def test_an_extended_model_writes_past_its_old_context_with_a_cache_as_without(method):
    model, ids = extend(tiny(), 2.5, method), torch.randint(64, (1, 10))
    assert model.config.block_size == 40
    texts = [torch.cat([*generate(model, ids, 30, temperature=0, cache=cache)])
             for cache in (True, False)]
    assert torch.equal(*texts) and len(texts[0]) == 30


def test_a_copy_of_an_extended_model_has_weights_of_its_own():
    model, ids = extend(tiny(), 2, "yarn"), torch.randint(64, (1, 20))
    copy, before = deepcopy(model), model(ids)[0]
    torch.nn.init.zeros_(copy.transformer.wte.weight)
    assert not torch.equal(copy(ids)[0], before) and torch.equal(model(ids)[0], before)


def test_attention_is_sharper_by_the_square_of_yarns_factor():
    model, positions = tiny(), torch.arange(16)
    _, (cos, sin) = extend(model, 4, "yarn").transformer.embed(positions[None], positions)
    close(cos.square() + sin.square(), torch.full_like(cos, (0.1 * math.log(4) + 1) ** 2))


def test_the_loss_by_position_is_the_mean_over_sequences():
    model, ids = tiny(), torch.randint(64, (49,))
    losses = loss_by_position(model, ids)
    assert losses.shape == (16,)
    close(losses.mean(), model(ids[:48].view(3, 16), ids[1:].view(3, 16))[1])
    close(losses[5], -model(ids[:48].view(3, 16))[0].log_softmax(-1)[
        range(3), 5, ids[1:].view(3, 16)[:, 5]].mean())


@pytest.mark.parametrize("options, factor, method, words", [
    (dict(position="learned"), 2, "yarn", "position=learned"), ({}, 0.5, "yarn", "factor=0.5"),
    ({}, 2, "yarm", "did you mean yarn"), ({}, float("nan"), "ntk", "factor=nan")])
def test_what_cannot_be_extended_is_refused(options, factor, method, words):
    with pytest.raises(ValueError, match=words):
        extend(tiny(**options), factor, method)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2, 4, 16])
def test_yarn_equals_that_of_transformers(factor):
    rope = pytest.importorskip("transformers.modeling_rope_utils",
                               reason="needs transformers with YaRN")
    from transformers import LlamaConfig
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=4096)
    config.rope_parameters = dict(rope_type="yarn", rope_theta=10000.0, factor=factor,
                                  original_max_position_embeddings=4096, truncate=False)
    frequencies, sharper = rope.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    found = yarn(CONFIG, factor)
    close(found[0], frequencies, rtol=1e-4, atol=0)
    assert found[1] == pytest.approx(sharper)


@pytest.mark.slow
def test_a_model_loses_its_way_past_block_size_and_less_so_with_yarn(call):
    out, err = call(leaf, "--n_steps=100", "--block_size=32")
    rows = {line[:24].strip(): [*map(float, line[24:].split())] for line in out.splitlines()[1:]}
    assert {*METHODS} < {*rows}, err
    none, best = rows["none"], rows["yarn, alpha=1/4, beta=4"]
    assert none[-1] > 1.3 * none[1] and best[-1] < none[-1]
