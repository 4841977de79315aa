"""
A longer context for a model with rotary positions, without training: its rotations are slowed down.

    extend(model, factor=4, method="yarn")       # reads 4 * block_size tokens from now on
    python -m chapters.context                   # perplexity by position, for each method

Channel pair j rotates by theta^(-2j/D) a token. Past block_size slow pairs reach angles that they
never had in training. Position interpolation (arXiv:2306.15595) slows all pairs down by the factor,
which blurs neighbours; NTK-aware scaling raises theta, so that the fastest pair stays and the
slowest one is interpolated; YaRN (arXiv:2309.00071) decides by how often a pair turns within
block_size: pairs that turn often stay, pairs that do not turn once are interpolated.
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType

if __name__ == "__main__":  # `python chapters/context.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

from chapters.trials import fit, new_model, sequences, text_ids
from model import check_known, check_options, option
from tokenizer import parse_options, run_command

# -----------------------------------------------------------------------------
# Frequencies: radians that each pair of channels rotates by a token, (D/2,).


def rotary_frequencies(D, theta=10000.0):
    return theta ** (-torch.arange(0, D, 2) / D)


def yarn_ramp(frequencies, block_size, alpha=1.0, beta=32.0):
    """The share of interpolation for each frequency: 1 for pairs that turn at most alpha times
    within block_size, 0 for those that turn beta times or more, between them linear in j, as in
    its authors' program."""
    turns = block_size * frequencies / (2 * math.pi)
    return 1 - ((turns / alpha).log() / math.log(beta / alpha)).clamp(0, 1)


def interpolated(config, factor):
    return rotary_frequencies(config.head_size, config.rope_theta) / factor, 1.0


def ntk_aware(config, factor):
    D = config.head_size
    return rotary_frequencies(D, config.rope_theta * factor ** (D / (D - 2))), 1.0


def yarn(config, factor, alpha=1.0, beta=32.0):
    """... and the factor of queries and keys that makes attention as sharp as it was."""
    frequencies = rotary_frequencies(config.head_size, config.rope_theta)
    ramp = yarn_ramp(frequencies, config.block_size, alpha, beta)
    return (1 - ramp + ramp / factor) * frequencies, 0.1 * math.log(factor) + 1


# -> (frequencies (D/2,), a factor for the table), of a config and a factor of 1 or more.
METHODS = {"none": lambda config, factor: interpolated(config, 1.0), "interpolation": interpolated,
           "ntk": ntk_aware, "yarn": yarn}


def extend(model, factor, method="yarn", **options):
    """Let a model with rotary positions, never extended before, read factor * block_size tokens, by
    one of METHODS; options: alpha and beta of yarn. -> the model"""
    check_known(method, METHODS, "method")
    body, config = model.transformer, model.config
    if config.position != "rope" or not factor >= 1:
        raise ValueError(f"position={config.position} and factor={factor}: only rotary positions "
                         "can be extended, by a factor of 1 or more")
    frequencies, sharper = METHODS[method](config, factor, **options)

    def embed(self, ids, positions):
        angles = positions[..., None] * frequencies.to(positions.device)         # (..., T, D/2)
        return self.wte(ids), (angles.cos() * sharper, angles.sin() * sharper)

    body.embed = MethodType(embed, body)  # a copy of the model gets one of its own
    model.config = body.config = replace(config, block_size=int(factor * config.block_size))
    return model


# -----------------------------------------------------------------------------
# What it is worth: a small model, trained on short sequences, reads long ones.


@torch.no_grad()
def loss_by_position(model, ids):
    """Mean loss in nats at each position (T,) of the sequences of block_size that ids (N,) make."""
    T = model.config.block_size
    rows = ids[:(len(ids) - 1) // T * T + 1]
    logits, _ = model(rows[:-1].view(-1, T))                             # (B, T, V)
    return F.cross_entropy(logits.mT, rows[1:].view(-1, T), reduction="none").mean(dim=0)


def experiment(seed=0, n_steps=200, factor=4, block_size=64, n_tune=0, n_parts=8):
    """Train a model, extend copies of it by each method, perhaps train them n_tune more steps on
    long sequences -> {name: perplexities in each of n_parts equal parts of the long context}. With
    so short a block_size hardly a pair turns as often as YaRN's alpha and beta expect: its second
    row has smaller ones."""
    ids, found = text_ids("python"), {}
    train, held_out, T = ids[:-40_000], ids[-40_000:], factor * block_size
    model = fit(new_model(seed, block_size=block_size), sequences(train, block_size), n_steps, seed)
    for name, options in [*((name, {}) for name in METHODS),
                          ("yarn, alpha=1/4, beta=4", dict(alpha=0.25, beta=4.0))]:
        longer = extend(deepcopy(model), factor, name.partition(",")[0], **options)
        fit(longer, sequences(train, T, B=4), n_tune, seed, learning_rate=0.005)
        parts = loss_by_position(longer, held_out).chunk(n_parts)
        found[name] = [part.mean().exp().item() for part in parts]
    return found


@dataclass(frozen=True)
class ContextConfig:
    """What is measured."""
    factor: int = option(4, "times block_size that is read", low=1, below=65)
    block_size: int = option(64, "tokens of a sequence in training", low=8)
    n_steps: int = option(200, "of training", low=1)
    n_tune: int = option(0, "of training on long sequences, after the extension")
    seed: int = option(0, "of weights and batches")

    __post_init__ = check_options


def main():
    c = ContextConfig(**parse_options(__doc__, ContextConfig)[0])
    if c.factor * c.block_size > 16384:
        raise ValueError(f"factor={c.factor} times block_size={c.block_size} is above 16,384: this "
                         "is made for short contexts")
    T, n = c.factor * c.block_size, 8
    found = experiment(c.seed, c.n_steps, c.factor, c.block_size, c.n_tune, n)
    print("perplexity up to token  " + "".join(f"{T * (i + 1) // n:7}" for i in range(n)))
    for name, parts in found.items():
        print(f"{name:24}" + "".join(f"{value:7.2f}" for value in parts))


if __name__ == "__main__":
    run_command(main)
