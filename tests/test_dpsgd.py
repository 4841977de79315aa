"""DP-SGD: the gradients of single documents, what clipping and noise make of them, and epsilon."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny

from chapters.dpsgd import batches, epsilon, example_gradients, fit, private_gradients, text_rows
from tokenizer import Tokenizer

BYTES = Tokenizer(())


def example(architecture="modern", B=3, T=12):
    """A model whose head is not zero, and x, y (B, T), y with ignored targets."""
    model = tiny(architecture, vocab_size=BYTES.n_vocab)
    torch.manual_seed(1)
    ids = torch.randint(BYTES.n_vocab, (B, T + 1))
    y = ids[:, 1:].masked_fill(torch.rand(B, T) < 0.2, -1)
    model.use("plain")
    return model, ids[:, :-1], y


def private(model, x, y, clip, noise=0.0, batch_size=None, seed=0):
    """{name: gradient} that a private step has."""
    generator = torch.Generator().manual_seed(seed)
    private_gradients(model, x, y, clip, noise, batch_size or len(x), generator)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def length(gradients):
    return math.sqrt(sum(own.square().sum().item() for own in gradients.values()))


@pytest.mark.parametrize("architecture", ["modern", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_gradient_of_each_row_is_that_of_a_backward_pass_of_its_own(architecture):
    model, x, y = example(architecture)
    found = example_gradients(model, x, y)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i:i + 1], y[i:i + 1])[1].backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad, atol=1e-6, rtol=1e-4)
    assert found.keys() == dict(model.named_parameters()).keys()


def test_without_clipping_and_noise_a_step_has_the_mean_gradient():
    model, x, y = example()
    found = private(model, x, y, clip=1e9)
    model.zero_grad()
    (sum(model(x[i:i + 1], y[i:i + 1])[1] for i in range(3)) / 3).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


def test_no_row_has_a_larger_influence_than_clip_and_a_smaller_one_is_kept():
    model, x, y = example()
    lengths = [length(private(model, x[i:i + 1], y[i:i + 1], 1e9)) for i in range(3)]
    clip = sorted(lengths)[1]
    found = [length(private(model, x[i:i + 1], y[i:i + 1], clip)) for i in range(3)]
    assert found == pytest.approx([min(own, clip) for own in lengths], rel=1e-4)
    assert len({*lengths}) == 3
    both, one = (private(model, x[:n], y[:n], clip, batch_size=1) for n in (2, 1))
    assert length({name: both[name] - one[name] for name in one}) <= clip * 1.0001


def test_the_noise_is_as_large_as_it_should_be():
    model, x, y = example()
    plain, noisy = (private(model, x, y, 0.5, noise, batch_size=4) for noise in (0.0, 2.0))
    added = torch.cat([(noisy[name] - plain[name]).flatten() for name in plain])
    assert added.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.03)
    assert abs(added.mean().item()) < 4 * 0.25 / math.sqrt(len(added))


def divergence(noise, share, order):
    """The Renyi divergence of one step by numerical integration, of an order."""
    x = np.linspace(-20 * noise, order + 20 * noise, 20_001)
    normal = -x * x / (2 * noise**2) - math.log(math.sqrt(2 * math.pi) * noise)
    with np.errstate(divide="ignore"):
        ratio = np.logaddexp(np.log1p(-share), math.log(share) + (2 * x - 1) / (2 * noise**2))
    return np.logaddexp.reduce(normal + order * ratio + math.log(x[1] - x[0])) / (order - 1)


@pytest.mark.parametrize("noise, share, n_steps, delta", [
    (1.0, 0.1, 1000, 1e-5), (2.0, 0.5, 10, 1e-3), (4.0, 1.0, 20, 1e-6)])
def test_epsilon_is_the_best_that_integrated_divergences_give(noise, share, n_steps, delta):
    found = min(n_steps * divergence(noise, share, order) + math.log((order - 1) / order)
                - (math.log(delta) + math.log(order)) / (order - 1) for order in range(2, 40))
    assert epsilon(noise, share, n_steps, delta) == pytest.approx(found, rel=1e-4)


def test_epsilon_falls_with_noise_and_grows_with_steps_and_share():
    base = epsilon(1.0, 0.1, 100)
    assert epsilon(2.0, 0.1, 100) < base < min(epsilon(1.0, 0.2, 100), epsilon(1.0, 0.1, 200))
    assert epsilon(0.0, 0.1, 100) == math.inf and epsilon(0.01, 0.5, 10**6) < math.inf


def test_an_epoch_has_every_row_once_and_a_private_one_each_by_chance():
    generator = torch.Generator().manual_seed(0)
    plain = [*batches(50, 8, 3, False, generator)]
    assert torch.cat(plain[:7]).sort()[0].tolist() == [*range(50)] and len(plain) == 3 * 7
    assert plain[0].tolist() != plain[7].tolist()
    drawn = [*batches(50, 8, 300, True, generator)]
    counts = torch.bincount(torch.cat(drawn), minlength=50).float() / len(drawn)
    assert counts.mean().item() == pytest.approx(8 / 50, rel=0.03)
    assert (counts - 8 / 50).abs().max() < 5 * math.sqrt(0.16 * 0.84 / len(drawn))
    assert len({len(own) for own in drawn}) > 5 and min(map(len, drawn)) > 0


@pytest.mark.parametrize("options", [
    dict(), pytest.param(dict(clip=1.0, noise=0.01), marks=pytest.mark.slow)])
def test_training_learns_what_the_mask_says_and_nothing_else(options):
    text = "abcdabcdabcd"
    (ids, _), = text_rows(BYTES, [text])
    mask = [at < 7 for at in range(len(ids))]  # all up to the second c
    models = [fit(tiny(vocab_size=BYTES.n_vocab), [(row, mask)] * 8, 15, batch_size=4, **options)
              for row in (ids, ids, ids[:7] + ids[:0:-1][:6])]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    losses = [model(torch.tensor([ids[:6]]), torch.tensor([ids[1:7]]))[1].item()
              for model in (tiny(vocab_size=BYTES.n_vocab), models[0])]
    assert losses[1] < losses[0] / 3 and not models[0].training
