"""
Training that protects each document: DP-SGD (arXiv:1607.00133). The gradient of each is clipped, so
that none has a large influence, and noise as large as that influence hides whether it was there.

    rows = text_rows(tokenizer, texts)
    fit(model, rows, epochs=10, clip=1.0, noise=0.5)       # clip=0: ordinary training
    epsilon(noise=0.5, share=16 / len(rows), n_steps=10 * math.ceil(len(rows) / 16))

The unit of protection is a document: a secret that stands in several is hidden less well.
"""

import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from train import TrainConfig, build_optimizer, clip_gradients, set_rate

# -----------------------------------------------------------------------------
# Gradients, a document at a time, and what the noise grants.


class ExampleLoss(torch.nn.Module):
    """The loss of one document, without the check of its ids, through which vmap cannot go."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        """x, y (1, T) -> a scalar"""
        T = x.size(1)
        stream, _ = self.model.transformer.embed(x, torch.arange(T))     # (1, T, C)
        checked = torch.zeros(1, T, dtype=torch.long)
        return self.model.lm_head(self.model.transformer(checked, x=stream), y)


def example_gradients(model, x, y):
    """{name of a parameter: (B, ...)}: its gradient for each row of x, y (B, T), in one pass. The
    model must use("plain") functions, as vmap cannot go through fused ones."""
    function = ExampleLoss(model)
    params = {name: p.detach() for name, p in function.named_parameters()}

    def loss(params, x, y):
        return torch.func.functional_call(function, params, (x[None], y[None]))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    return {name.removeprefix("model."): gradients for name, gradients in found.items()}


def private_gradients(model, x, y, clip, noise, batch_size, generator):
    """Set the gradients to those of the rows of x, y (B, T), each scaled down to a length of at
    most clip, summed, with normal noise of deviation noise * clip, over the expected batch_size."""
    found = example_gradients(model, x, y)
    lengths = sum(own.flatten(1).square().sum(dim=1) for own in found.values()).sqrt()   # (B,)
    scales = (clip / lengths.clamp(min=1e-12)).clamp(max=1)
    for name, p in model.named_parameters():
        total = torch.tensordot(scales, found[name], dims=1)
        p.grad = (total + noise * clip * torch.randn(p.shape, generator=generator)) / batch_size


def epsilon(noise, share, n_steps, delta=1e-5):
    """The privacy loss of a document in n_steps of DP-SGD that each draw it with a chance of share:
    with it no outcome is more than e^epsilon times as likely, but for a chance of delta. By Renyi
    divergences of whole orders (arXiv:1908.10530), converted as in arXiv:2004.00010."""
    best, share = math.inf, min(share, 1 - 1e-12)
    for order in range(2, 256) if noise else ():
        k = np.arange(order + 1)
        logs = np.array([math.log(math.comb(order, i)) for i in range(order + 1)])
        logs += (order - k) * math.log1p(-share) + k * math.log(share)
        divergence = np.logaddexp.reduce(logs + (k * k - k) / (2 * noise**2)) / (order - 1)
        best = min(best, n_steps * divergence + math.log1p(-1 / order)
                   - math.log(delta * order) / (order - 1))
    return best


# -----------------------------------------------------------------------------
# Training. A row is a document: its ids, and the loss mask, which says what of them is learned.


def text_rows(tokenizer, texts):
    """The rows of texts, of which all is learned."""
    return [([tokenizer.eot, *ids], [True] * (len(ids) + 1))
            for ids in tokenizer.encode_batch(texts)]


def batches(n, batch_size, epochs, private, generator):
    """Yield the numbers of the rows in each batch: in every epoch all of n in another order, or,
    private, each with the same chance in each batch, which epsilon() counts on; empty batches,
    which nearly never occur, are skipped."""
    for _ in range(epochs):
        if private:
            drawn = torch.rand(math.ceil(n / batch_size), n, generator=generator) < batch_size / n
            yield from filter(len, (own.nonzero()[:, 0] for own in drawn))
        else:
            yield from torch.randperm(n, generator=generator).split(batch_size)


def fit(model, rows, epochs=10, learning_rate=1e-2, batch_size=16, clip=0.0, noise=0.0, seed=0):
    """Train a model on rows, on a CPU, in place -> the model. With clip above 0 by DP-SGD."""
    model.train().use("plain" if clip else "torch")
    pairs = [(torch.tensor(ids), torch.tensor(mask)) for ids, mask in rows]
    x = pad_sequence([ids[:-1] for ids, _ in pairs], True)                       # (N, T)
    y = pad_sequence([ids.where(mask, -1)[1:] for ids, mask in pairs], True, -1)
    lengths = torch.tensor([len(ids) - 1 for ids, _ in rows])
    optimizer = build_optimizer(model, TrainConfig(optimizer="adamw", learning_rate=learning_rate))
    generator = torch.Generator().manual_seed(seed)
    plan = [*batches(len(rows), batch_size, epochs, clip > 0, generator)]
    for step, batch in enumerate(plan):
        set_rate(optimizer, learning_rate * (1 - step / len(plan)))
        T = lengths[batch].max()
        if clip:
            private_gradients(model, x[batch, :T], y[batch, :T], clip, noise, batch_size, generator)
        else:
            model(x[batch, :T], y[batch, :T])[1].backward()
            clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.use("torch")
    return model.eval()
