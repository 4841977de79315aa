"""chapters/experts.py: a mixture is the sum it says, balanced by its loss; copies give the MLP."""

from functools import partial

import pytest
import torch
from conftest import mistake, tiny
from test_model import close, exactly, randn, value_and_gradients

import chapters.experts as leaf
from chapters.experts import (MoE, add_experts, balance_loss, drop_late, grouped_mixture, load,
                              n_active, plain_mixture, route, router_logits, router_z_loss,
                              training_loss)
from sample import generate

MIXTURES = [plain_mixture, grouped_mixture]


def mixture_model(n_experts=4, top_k=2, **options):
    """A tiny model whose MLPs are mixtures of different experts, with routers that decide."""
    model = tiny()
    assert add_experts(model, n_experts, top_k, **dict(fresh=True) | options) == 2
    for layer in model.modules():
        if isinstance(layer, MoE):
            torch.nn.init.normal_(layer.router.weight)
    return model


def test_a_route_is_the_best_experts_with_the_softmax_over_them_alone():
    chosen, gates = route(torch.tensor([[1.0, 3.0, 2.0, -1.0]]), 2)
    assert chosen.tolist() == [[1, 2]]
    close(gates, torch.tensor([[3.0, 2.0]]).softmax(-1))
    logits = torch.randn(5, 4)
    close(route(logits, 1)[1][:, 0], logits.softmax(-1).amax(-1))  # of one: so that it can learn


@pytest.mark.parametrize("n_experts, top_k, capacity", [(1, 1, 0), (4, 1, 0), (5, 2, 0), (4, 4, 0),
                                                        (4, 2, 2), (4, 2, 1)])
def test_the_grouped_mixture_equals_the_plain_one_in_value_and_gradient(n_experts, top_k, capacity):
    experts = [block.mlp.double() for seed in range(n_experts)
               for block in tiny(seed=seed).transformer.blocks[:1]]

    def mix(mixture, x, logits):
        chosen, gates = route(logits, top_k)
        chosen = drop_late(chosen, n_experts, capacity) if capacity else chosen
        return mixture(experts, x, chosen, gates)

    inputs, found = (randn(11, 32), randn(11, n_experts)), []
    for mixture in MIXTURES:
        weights = [*experts[0].parameters()]
        found.append([*value_and_gradients(partial(mix, mixture), *inputs),
                      *torch.autograd.grad(mix(mixture, *inputs).square().sum(), weights)])
    close(*found, **exactly)


def test_with_all_experts_chosen_it_is_the_mixture_by_the_softmax():
    layer, x = mixture_model(4, 4).transformer.blocks[0].mlp, torch.randn(2, 5, 32)
    weights = layer.router(x).softmax(dim=-1)                            # (2, 5, 4)
    close(layer(x), sum(weights[..., i:i + 1] * expert(x) for i, expert in
                        enumerate(layer.experts)))


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("n_experts, top_k", [(1, 1), (4, 2), (4, 3)])
def test_a_mixture_of_copies_is_the_mlp_that_they_copy(n_experts, top_k, mixture):
    model, ids = tiny(), torch.randint(64, (2, 16))
    before = model(ids)[0]
    assert add_experts(model, n_experts, top_k) == 2
    model.set_functions(dict(mixture=mixture))
    close(model(ids)[0], before)


def test_fresh_experts_differ_with_the_deviation_of_their_mlp():
    mlp = tiny().transformer.blocks[0].mlp
    experts = MoE(mlp, 3, 1, fresh=True).experts
    ups = torch.stack([expert.up_proj.weight for expert in experts])
    assert (ups.std(dim=0) > 0).all()
    close(ups.std(), mlp.up_proj.weight.std(), rtol=0.05, atol=0)
    nothing = tiny(zero_init=True).transformer.blocks[0].mlp
    still = MoE(nothing, 3, 1, fresh=True).experts
    assert not any(expert.down_proj.weight.any() for expert in still)


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_weights_learn_and_no_token_sees_the_future(top_k):
    model, ids = mixture_model(top_k=top_k), torch.randint(64, (4, 16))
    model(ids, ids)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    changed = ids[:1].clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 64
    close(model(ids)[0][:1, :9], model(changed)[0][:, :9])


def test_with_a_cache_a_mixture_writes_the_same():
    model, ids = mixture_model(), torch.randint(64, (3, 4))
    texts = [torch.stack([*generate(model, ids, 12, temperature=0, cache=cache)])
             for cache in (True, False)]
    assert torch.equal(*texts)


def test_the_balance_loss_is_1_for_equal_use_and_grows_to_the_number_of_experts():
    even = 50 * torch.eye(4).repeat(3, 1)                                # a fourth for each
    assert balance_loss(even, 1).item() == pytest.approx(1)
    one = torch.tensor([[50.0, 0, 0, 0]]).expand(12, -1)
    assert balance_loss(one, 1).item() == pytest.approx(4)
    assert balance_loss(one, 4).item() == pytest.approx(1)  # all are chosen, whatever the gates


def test_its_gradient_lowers_the_logits_of_the_expert_that_is_used_most():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(8, 1).requires_grad_()
    slope, = torch.autograd.grad(balance_loss(logits, 1), logits)
    assert (slope[:, 0] > 0).all() and (slope[:, 1:] < 0).all()


def test_load_is_the_share_of_choices_and_the_z_loss_the_square_of_logsumexp():
    logits = torch.tensor([[3.0, 2, 1], [3, 1, 2], [3, 2, 1], [1, 3, 2]])
    assert load(logits, 1).tolist() == [0.75, 0.25, 0]
    assert load(logits, 2).tolist() == [0.375, 0.375, 0.25]
    close(router_z_loss(logits), logits.exp().sum(-1).log().square().mean())


def test_an_expert_that_is_full_takes_no_more_and_first_choices_come_first():
    chosen = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2]])
    assert drop_late(chosen, 3, 2).tolist() == [[0, 1], [1, 3], [0, 3], [3, 2]]
    assert torch.equal(drop_late(chosen, 3, 4), chosen)


def test_the_capacity_holds_in_training_alone():
    layer, x = MoE(tiny().transformer.blocks[0].mlp, 4, 1, capacity=1.0), torch.randn(2, 8, 32)
    torch.nn.init.zeros_(layer.router.weight)  # then all choose the same expert
    full = layer.eval()(x)
    limited = layer.train()(x)
    skipped = (limited == 0).all(dim=-1)
    assert skipped.sum() == 12 and not (full == 0).all(dim=-1).any()  # a fourth of 16 is taken
    close(limited[~skipped], full[~skipped])


def test_active_parameters_are_those_that_a_token_meets():
    model, expert = tiny(), sum(p.numel() for p in tiny().transformer.blocks[0].mlp.parameters())
    dense = model.n_parameters()
    assert n_active(model) == dense
    add_experts(model, 8, 2)
    assert model.n_parameters() == dense + 2 * (7 * expert + 8 * 32)
    assert n_active(model) == dense + 2 * (1 * expert + 8 * 32)


def test_router_logits_are_seen_within_and_not_after():
    model, ids = mixture_model(), torch.randint(64, (2, 16))
    with router_logits(model) as found:
        model(ids)
    model(ids)
    assert [logits.shape for logits in found] == [(32, 4)] * 2
    y = torch.randint(64, (2, 16))
    extra = sum(0.5 * balance_loss(logits, 2) + 0.25 * router_z_loss(logits) for logits in found)
    close(training_loss(model, ids, y, 0.5, 0.25), model(ids, y)[1] + extra)
    close(training_loss(tiny(), ids, y), tiny()(ids, y)[1])


@pytest.mark.parametrize("n_experts, top_k", [(4, 0), (4, 5), (0, 1)])
def test_more_choices_than_experts_or_none_are_refused(n_experts, top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must be 1 to n_experts={n_experts}"):
        add_experts(tiny(), n_experts, top_k)


@pytest.mark.slow
def test_a_layer_and_its_balance_loss_equal_those_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral",
                                  reason="needs transformers with Mixtral")
    from transformers import MixtralConfig
    layer, x = mixture_model(4, 2).transformer.blocks[0].mlp, torch.randn(2, 9, 32)
    hidden = layer.experts[0].up_proj.out_features
    theirs = mixtral.MixtralSparseMoeBlock(MixtralConfig(
        hidden_size=32, intermediate_size=hidden, num_local_experts=4,
        num_experts_per_tok=2)).eval()
    weights = {"gate.weight": layer.router.weight}
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        weights[f"experts.{name}"] = torch.stack([torch.cat([
            expert.get_submodule(part).weight for part in parts]) for expert in layer.experts])
    theirs.load_state_dict(weights)
    close(layer(x), theirs(x))
    logits = layer.router(x.flatten(0, 1))
    close(2 * balance_loss(logits, 2), mixtral.load_balancing_loss_func((logits,), 4, 2))


@pytest.mark.slow
def test_without_the_loss_a_few_experts_do_most_and_the_command_shows_it(call):
    out, err = call(leaf, "--n_steps=60", "--seeds=1")
    rows = {line[:25].strip(): line[25:].split() for line in out.splitlines()[1:]}
    assert [*rows] == ["dense", "mixture", "mixture, no balance loss", "dense, wide"], err
    most = [int(rows[name][2][:-1]) for name in ("mixture", "mixture, no balance loss")]
    assert 13 <= most[0] < most[1]


def test_the_command_refuses_more_choices_than_experts(monkeypatch, capsys):
    code, lines = mistake(leaf.main, monkeypatch, capsys, "--n_experts=2", "--top_k=3")
    assert code == 1 and "top_k=3" in lines[-1]
