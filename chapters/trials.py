"""
Short trainings side by side, so that two designs of a model can be compared in seconds.

    ids = text_ids()                                    # bytes of stories, sums and Python
    model = fit(new_model(n_layer=2), sequences(ids[:-30_000], 128), n_steps=200, seed=0)
    held_out_loss(model, ids[-30_000:])                 # nats per byte

The leaves of chapter 17 use it.
"""

from random import Random

import torch

from chapters.grammar import arithmetic, stories
from data import find_files
from model import GPT, GPTConfig
from train import TrainConfig, build_optimizer, clip_gradients, learning_rate, set_rate

KINDS = {  # each makes documents, about 300 kB of them
    "stories": lambda: stories(700),
    "sums": lambda: (f"Question: {a}\nAnswer: {b}" for a, b in arithmetic(2500)),
    "python": lambda: (path.read_text("utf-8")[:20_000]
                       for path in find_files("stdlib", None)[:30]),
}


def text_ids(*kinds):
    """The bytes of documents of these kinds, or of all, in a random order, as ids (N,)."""
    texts = [text for kind in kinds or KINDS for text in KINDS[kind]()]
    Random(0).shuffle(texts)
    return torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()


def new_model(seed=0, **options):
    """A GPT for bytes with two layers and 64 channels, unless the options of its config differ."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=256, block_size=128, n_layer=2, n_head=4, n_embd=64)
    return GPT(GPTConfig(**shape | options))


def sequences(ids, T, B=16):
    """A function: generator -> a batch x, y (B, T) of random places in ids (N,), y one id on."""
    def draw(generator):
        starts = torch.randint(len(ids) - T, (B, 1), generator=generator)
        batch = ids[starts + torch.arange(T + 1)]                        # (B, T + 1)
        return batch[:, :-1], batch[:, 1:]
    return draw


def fit(model, draw, n_steps, seed=0, loss_of=lambda model, x, y: model(x, y)[1], **options):
    """Train a model on the batches that draw(generator) gives; -> the model. loss_of: what is
    minimised, a function of the model and a batch; options: of TrainConfig."""
    config = TrainConfig(max_steps=n_steps, precision="fp32", **options)
    optimizer, generator = build_optimizer(model, config), torch.Generator().manual_seed(seed)
    model.train()
    for step in range(n_steps):
        set_rate(optimizer, learning_rate(step, config))
        loss_of(model, *draw(generator)).backward()
        clip_gradients(model, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def held_out_loss(model, ids):
    """Mean loss in nats on ids (N,), cut into sequences of block_size."""
    T = model.config.block_size
    rows = ids[:(len(ids) - 1) // T * T + 1]
    return model(rows[:-1].view(-1, T), rows[1:].view(-1, T))[1].item()
