"""
Mixture of experts: in the place of each MLP stand several, and a router sends each token to a few.

    add_experts(model, n_experts=8, top_k=2)     # of any model; its experts start as copies
    python -m chapters.experts                   # trains dense models and mixtures, prints losses

A token costs what its top_k experts cost, however many there are. Nothing makes a router use all of
them, so training adds two losses: balance_loss (arXiv:2101.03961) and router_z_loss
(arXiv:2202.08906). Shapes beside those of model.py: N tokens of a batch, E experts, k = top_k.
"""

import sys
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python chapters/experts.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn

from chapters.trials import fit, held_out_loss, new_model, sequences, text_ids
from model import Linear, check_options, option, swap
from tokenizer import parse_options, run_command

# -----------------------------------------------------------------------------
# Routing: which experts a token goes to, and with which weights.


def route(logits, top_k):
    """Logits (N, E) -> the experts (N, k) with the highest, and their gates (N, k): the softmax
    over these k alone, so that they sum to 1 (arXiv:2401.04088). Of a single one that would be 1
    whatever the router says, which would then learn nothing: its gate is its probability among all
    (arXiv:2101.03961)."""
    best, chosen = logits.topk(top_k, dim=-1)
    if top_k == 1:
        return chosen, (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return chosen, best.softmax(dim=-1)


def balance_loss(logits, top_k):
    """E * sum over experts of (share of the tokens' choices) * (mean probability): 1 if all are
    used alike, up to E if one is. Only the second factor has a gradient. arXiv:2101.03961"""
    return logits.size(-1) * (load(logits, top_k) * logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(logits):
    """Mean of log(sum(exp(logits)))^2: it keeps logits small. arXiv:2202.08906"""
    return logits.logsumexp(dim=-1).square().mean()


def load(logits, top_k):
    """The share of all choices that each expert gets, (E,); without a gradient."""
    chosen, _ = route(logits.detach(), top_k)
    return chosen.flatten().bincount(minlength=logits.size(-1)) / chosen.numel()


def drop_late(chosen, n_experts, capacity):
    """Choices (N, k) in which those beyond the first `capacity` of an expert are E: no expert.
    First come all first choices, then all second ones. arXiv:2006.16668"""
    in_turn = F.one_hot(chosen.T.flatten(), n_experts)                   # (k * N, E)
    places = (in_turn.cumsum(dim=0) * in_turn).sum(dim=1).view(chosen.T.shape).T
    return chosen.masked_fill(places > capacity, n_experts)


# -----------------------------------------------------------------------------
# The mixture, twice: each expert computes all tokens, or only those that it was chosen for.
# x (N, C), chosen and gates (N, k) -> (N, C); a choice of E adds nothing.


def plain_mixture(experts, x, chosen, gates):
    """The sum over experts of gate * expert(x)."""
    weights = gates.new_zeros(len(x), len(experts) + 1).scatter_add(1, chosen, gates)
    return sum(weights[:, i, None] * expert(x) for i, expert in enumerate(experts))


def grouped_mixture(experts, x, chosen, gates):
    """plain_mixture with the work of k experts a token: choices are sorted by expert, so that each
    expert gets its tokens as one matrix."""
    order = chosen.flatten().argsort(stable=True)                        # (N * k,)
    sizes = chosen.flatten().bincount(minlength=len(experts) + 1).tolist()
    order = order[:len(order) - sizes.pop()]  # the choices of no expert come last
    tokens, gates = order // chosen.size(1), gates.flatten()[order, None]
    y = torch.cat([expert(group) for expert, group in zip(experts, x[tokens].split(sizes))])
    return torch.zeros_like(x).index_add(0, tokens, gates.to(x.dtype) * y)


class MoE(nn.Module):
    """n_experts copies of an MLP, of which each token goes through top_k. In training an expert
    takes at most capacity * N * top_k / n_experts tokens, and the rest skips it; 0: no limit."""
    mixture = staticmethod(grouped_mixture)

    def __init__(self, mlp, n_experts, top_k, capacity=0.0, fresh=False):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k} must be 1 to n_experts={n_experts}")
        self.top_k, self.capacity = top_k, capacity
        self.experts = nn.ModuleList(deepcopy(mlp) for _ in range(n_experts))
        self.router = Linear(mlp.up_proj.in_features, n_experts, bias=False).to(
            mlp.up_proj.weight.device)
        nn.init.normal_(self.router.weight, std=0.02)
        for p in self.experts.parameters() if fresh else ():
            if p.dim() == 2:  # with the deviation of the copied matrix, which may be 0
                nn.init.normal_(p, std=p.std().item())

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)"""
        tokens, E = x.flatten(0, -2), len(self.experts)                  # (N, C)
        chosen, gates = route(self.router(tokens.float()), self.top_k)   # bf16 would tie logits
        if self.capacity and self.training:
            most = int(self.capacity * chosen.numel() / E)
            chosen = drop_late(chosen, E, max(1, most))
        return self.mixture(self.experts, tokens, chosen, gates).view_as(x)


def add_experts(model, n_experts, top_k, capacity=0.0, fresh=False):
    """Put a MoE into the place of each MLP of a model; -> how many. Its experts start as copies of
    the MLP (arXiv:2212.05055), which with a top_k of 2 or more changes no output, or fresh: each
    with random weights."""
    build = partial(MoE, n_experts=n_experts, top_k=top_k, capacity=capacity, fresh=fresh)
    return swap(model.transformer.blocks, ("mlp",), build)


def n_active(model):
    """How many parameters a token is computed with: of each MoE only top_k experts count."""
    idle = sum(sum(p.numel() for p in layer.experts.parameters())
               * (len(layer.experts) - layer.top_k) // len(layer.experts)
               for layer in model.modules() if isinstance(layer, MoE))
    return model.n_parameters() - idle


# -----------------------------------------------------------------------------
# Training, and what the mixture is worth.


@contextmanager
def router_logits(model):
    """Within it, what the routers of a model compute is added to the list that it yields."""
    found = []
    hooks = [layer.router.register_forward_hook(lambda router, x, logits: found.append(logits))
             for layer in model.modules() if isinstance(layer, MoE)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def training_loss(model, x, y, balance=0.01, z_loss=0.001):
    """The loss of a batch with both losses of each router, weighted."""
    with router_logits(model) as found:
        _, loss = model(x, y)
    top_k = next((layer.top_k for layer in model.modules() if isinstance(layer, MoE)), 0)
    return loss + sum(balance * balance_loss(logits, top_k) + z_loss * router_z_loss(logits)
                      for logits in found)


def experiment(seed=0, n_steps=150, n_hidden=64, n_experts=16, top_k=2):
    """Train a dense model, a mixture with as many active parameters, the same without its balance
    loss, and a dense model with as many parameters in all, on the same batches -> {name: dict(loss:
    held out, in nats per byte; parameters; active; load: of each layer's experts, sorted)}."""
    ids, T = text_ids(), 64
    train, held_out = ids[:-50_000], ids[-50_000:]
    wide = n_hidden * n_experts // top_k
    plans = {"dense": (n_hidden, None), "mixture": (n_hidden // top_k, 0.01),
             "mixture, no balance loss": (n_hidden // top_k, 0.0), "dense, wide": (wide, None)}
    found = {}
    for name, (hidden, balance) in plans.items():
        model = new_model(seed, n_hidden=hidden, block_size=T)
        if balance is not None:
            add_experts(model, n_experts, top_k, fresh=True)
        fit(model, sequences(train, T), n_steps, seed, partial(training_loss, balance=balance))
        with router_logits(model) as logits:
            loss = held_out_loss(model, held_out)
        shares = [load(layer, top_k).sort(descending=True).values.tolist() for layer in logits]
        found[name] = dict(loss=loss, parameters=model.n_parameters(), active=n_active(model),
                           load=shares)
    return found


@dataclass(frozen=True)
class ExpertsConfig:
    """What is compared."""
    n_experts: int = option(16, "in each layer", low=1, below=257)
    top_k: int = option(2, "that a token goes through", low=1)
    n_hidden: int = option(64, "channels inside the dense MLP; an expert has n_hidden / top_k", 1)
    n_steps: int = option(150, "of training", low=1)
    seeds: int = option(3, "how often all is trained", low=1)

    def __post_init__(self):
        check_options(self)
        if not self.top_k <= min(self.n_experts, self.n_hidden):
            raise ValueError(f"top_k={self.top_k} must be at most n_experts={self.n_experts} and "
                             f"n_hidden={self.n_hidden}")


def main():
    c = ExpertsConfig(**parse_options(__doc__, ExpertsConfig)[0])
    runs = [experiment(seed, c.n_steps, c.n_hidden, c.n_experts, c.top_k)
            for seed in range(c.seeds)]
    print("                          parameters  active  most used  loss of each seed")
    for name, row in runs[0].items():
        most = f"{max(max(layer) for layer in row['load']):9.0%}" if row["load"] else " " * 9
        losses = "  ".join(f"{run[name]['loss']:.3f}" for run in runs)
        print(f"{name:25} {row['parameters']:11,} {row['active']:7,}  {most}  {losses}")


if __name__ == "__main__":
    run_command(main)
