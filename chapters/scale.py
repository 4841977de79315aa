"""
What a training step takes on a cluster, on paper: arithmetic, what the links carry, what idles.

    python -m chapters.scale --parameters=70e9 --gpus=64     # the fastest layouts that fit
    from chapters.scale import LINKS, Layout, Shape, step_time
    step_time(Shape(7e9, 32, 4096, 4096), 512, Layout(dp=8, zero=3), "H100")["seconds"]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # `python chapters/scale.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.distributed.tensor import DTensor

from chapters.cost import GPUS, gigabytes
from model import check_options, option
from tokenizer import parse_options, run_command

# Bytes a second that one GPU can send: to a GPU of its machine (NVLink, one direction), and to
# another machine if each of the 8 GPUs of a machine has a link of its own (InfiniBand).
LINKS = {"A100": (300e9, 25e9), "H100": (450e9, 50e9)}
NODE = 8  # GPUs in a machine
STATE = 2, 2, 12  # bytes a parameter in mixed precision: weight, gradient; AdamW, master weight

# Published runs (arXiv:2104.04473, table 1; layouts from its scripts): billions of parameters, L,
# C, A100s, tp, pp, micro, chunks, batch, and the TFLOP/s that each A100 reached.
MEGATRON = (
    (1.7, 24, 2304, 32, 1, 1, 16, 1, 512, 137), (3.6, 30, 3072, 64, 2, 1, 16, 1, 512, 138),
    (7.5, 36, 4096, 128, 4, 1, 16, 1, 512, 142), (18.4, 40, 6144, 256, 8, 1, 8, 1, 1024, 135),
    (39.1, 48, 8192, 512, 8, 2, 4, 1, 1536, 138), (76.1, 60, 10240, 1024, 8, 4, 2, 3, 1792, 140),
    (145.6, 80, 12288, 1536, 8, 8, 2, 2, 2304, 148),
    (310.1, 96, 16384, 1920, 8, 16, 1, 2, 2160, 155),
    (529.6, 105, 20480, 2520, 8, 35, 1, 3, 2520, 163),
    (1008.0, 128, 25600, 3072, 8, 64, 1, 1, 3072, 163))


class Shape(NamedTuple):
    """A decoder: parameters N, blocks L, channels C, tokens in a sequence T."""
    N: float
    L: int
    C: int
    T: int

    def flops(self):
        """FLOPs of a token, forward and backward."""
        return 6 * self.N + 6 * self.L * self.C * self.T


class Layout(NamedTuple):
    """
    How dp * tp * pp GPUs share a step: copies, parts of each matrix, pipeline stages. micro: the
    sequences of a forward pass; zero: 0 to 3, what the copies shard; chunks: the pieces of the
    model that a stage holds (interleaved 1F1B); recompute: forward runs again before backward.
    """
    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro: int = 1
    zero: int = 0
    chunks: int = 1
    recompute: bool = False


def state_bytes(N, n, zero, parts=STATE):
    """Bytes that each of n copies holds of a model of N parameters: ZeRO shards the optimizer's
    part (1), the gradients, too (2), and the weights, too (3). arXiv:1910.02054"""
    return sum(N * part / (n if i < zero else 1) for i, part in enumerate(reversed(parts)))


def all_reduce_bytes(size, n):
    """What each of n processes sends in a ring all-reduce of `size` bytes."""
    return 2 * (n - 1) / n * size


def links_of(layout, links):
    """Bytes a second for (dp, tp, pp): tp's GPUs are neighbours, then those of dp. The GPUs of a
    machine that belong to the same copies' ring use their links together."""
    inside, between = links
    near = max(1, min(layout.dp, NODE // layout.tp))  # of a ring of dp, in one machine
    dp = inside if layout.dp * layout.tp <= NODE else min(inside, near * between)
    pp = inside if layout.dp * layout.tp * layout.pp <= NODE else between
    return dp, inside if layout.tp <= NODE else between, pp


def sent(shape, batch, layout):
    """Bytes that each GPU sends in a step of `batch` sequences, {"dp", "tp", "pp"}, two a number:
    gradients and sharded weights, the sums in each block, the stream between stages."""
    dp, tp, pp, micro, zero, chunks, again = layout
    m = batch / (dp * micro)                     # micro-batches that each pipeline runs
    stream = 2 * micro * shape.T * shape.C       # bytes of the residual stream
    gathers = 2 * m + 1 if zero == 3 else 2      # each 1 / 2 of an all-reduce
    return dict(
        dp=gathers / 2 * all_reduce_bytes(2 * shape.N / (tp * pp), dp),
        tp=(6 if again else 4) * shape.L / pp * m * all_reduce_bytes(stream, tp),
        pp=2 * chunks * m * stream / tp * (pp > 1))


def step_time(shape, batch, layout, gpu="H100", links=None, efficiency=0.5):
    """
    Seconds of a step and where they go: compute, tp, pp, bubble, dp (what no arithmetic hides) and
    their sum, with the MFU. efficiency: the share of its peak that one GPU alone reaches.
    ValueError if the batch cannot be divided so.
    """
    n, m = layout.dp * layout.tp * layout.pp, batch / (layout.dp * layout.micro)
    if m < 1 or m % 1:
        raise ValueError(f"a batch of {batch} sequences is no multiple of dp={layout.dp} times "
                         f"micro={layout.micro}")
    flops, peak = shape.flops() * shape.T * batch, n * GPUS[gpu][0]
    dp, tp, pp = (size / speed for size, speed in zip(
        sent(shape, batch, layout).values(), links_of(layout, links or LINKS[gpu])))
    compute = flops * (4 / 3 if layout.recompute else 1) / (peak * efficiency)
    bubble = (layout.pp - 1) / (layout.chunks * m) * (compute + tp + pp)
    # ZeRO-3 gathers all the time; else gradients travel while the last backward goes on
    dp = max(0.0, dp - compute * (1 if layout.zero == 3 else 2 / 3 / m))
    seconds = compute + tp + pp + bubble + dp
    return dict(compute=compute, tp=tp, pp=pp, bubble=bubble, dp=dp, seconds=seconds,
                mfu=flops / (peak * seconds))


def held(shape, layout):
    """Bytes of weights, gradients and optimizer on each GPU; activations come on top."""
    return state_bytes(shape.N / (layout.tp * layout.pp), layout.dp, layout.zero)


def held_bytes(model, optimizer):
    """What held() says of a model in training, found in the tensors of this process."""
    numbers = [x for p in model.parameters() for x in (p, p.grad)]
    states = getattr(optimizer, "state", {0: vars(optimizer)})
    numbers += [x for state in states.values() for x in state.values()
                if isinstance(x, torch.Tensor) and x.dim()]
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in numbers)


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def fast_layouts(shape, batch, n, gpu="H100", links=None, room=0.6):
    """The layouts of n GPUs whose state takes at most the share `room` of their memory, the fastest
    first: [(seconds, Layout)]. tp stays in a machine, pp divides the blocks, micro is 1."""
    found = []
    for tp in divisors(min(n, NODE)):
        for pp in (k for k in divisors(n // tp) if n % tp == shape.L % k == 0):
            layout = Layout(n // tp // pp, tp, pp)
            if batch % layout.dp == 0:
                found += [replaced for zero in ((0, 1) if pp > 1 else (0, 1, 2, 3))
                          if held(shape, replaced := layout._replace(zero=zero))
                          <= room * GPUS[gpu][2]]
    return sorted((step_time(shape, batch, layout, gpu, links)["seconds"], layout)
                  for layout in found)


@dataclass(frozen=True)
class ScaleConfig:
    """What the table is made for."""
    parameters: float = option(70e9, "of the model", low=1, below=1e15)
    n_layer: int = option(80, "its blocks", low=1)
    n_embd: int = option(8192, "its channels", low=1)
    block_size: int = option(4096, "tokens of a sequence", low=1)
    batch: int = option(1024, "sequences in a step, over all GPUs", low=1)
    gpus: int = option(64, "how many", low=1, below=100001)
    gpu: str = option("H100", "", known=lambda: LINKS)

    __post_init__ = check_options


def main():
    c = ScaleConfig(**parse_options(__doc__, ScaleConfig)[0])
    shape = Shape(c.parameters, c.n_layer, c.n_embd, c.block_size)
    found = fast_layouts(shape, c.batch, c.gpus, c.gpu)
    if not found:
        raise ValueError(f"no layout of {c.gpus} {c.gpu} fits a batch of {c.batch} sequences and a "
                         f"state of {gigabytes(held(shape, Layout()))}: take more --gpus")
    print("   dp  tp  pp zero  seconds   mfu  state of each GPU")
    for seconds, layout in found[:8]:
        mfu = step_time(shape, c.batch, layout, c.gpu)["mfu"]
        print(f"{layout.dp:5}{layout.tp:4}{layout.pp:4}{layout.zero:5}{seconds:9.2f}{mfu:6.2f}  "
              f"{gigabytes(held(shape, layout))}")


if __name__ == "__main__":
    run_command(main)
