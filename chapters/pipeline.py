"""
A pipeline: each process has some blocks of a model, a stage, and micro-batches go through them all,
forward and then backward. A schedule says in which order; it is data.

    stage = Stage(model, dist.get_rank(), 2)                               # of train.py
    loss = Pipeline(stage, model.mean_loss, (B, T, C)).run(micro_batches, one_f_one_b(2, 3))

A schedule lists for each stage its ("F" or "B", micro-batch), forward or backward. Its timeline, of
2 stages and 3 micro-batches, has gaps, the bubble, as each stage waits for the other one:

    gpipe   F0 F1 F2 .  .  B0 B1 B2           one_f_one_b   F0 F1 .  B0 F2 B1 .  B2
            .  F0 F1 F2 B0 B1 B2 .                          .  F0 B0 F1 B1 F2 B2 .
"""

from itertools import accumulate, count

import torch
import torch.distributed as dist


def in_turn(ahead, n_micro):
    """Some forwards ahead, then one forward and one backward in turn, then the other backwards."""
    numbers = dict(F=count(), B=count())
    kinds = "F" * ahead + "FB" * (n_micro - ahead) + "B" * ahead
    return [(kind, next(numbers[kind])) for kind in kinds]


def gpipe(n_stages, n_micro):
    """All forward, then all backward: each stage keeps all activations. arXiv:1811.06965"""
    return [in_turn(n_micro, n_micro) for _ in range(n_stages)]


def one_f_one_b(n_stages, n_micro):
    """Backward as soon as possible: however many micro-batches there are, a stage keeps activations
    of n_stages of them at most. arXiv:2104.04473"""
    return [in_turn(min(n_stages - 1 - stage, n_micro), n_micro) for stage in range(n_stages)]


def timeline(schedule):
    """When each stage does what, if all take one unit of time: for each a list of its ("F" or "B",
    micro-batch), with None where it waits for another. ValueError if that has no end."""
    todo, grid = [[*row] for row in schedule], [[] for _ in schedule]
    while any(todo):
        now = len(grid[-1])
        for stage, row in enumerate(todo):
            source = stage + (-1 if row and row[0][0] == "F" else 1)
            given = source in (-1, len(grid)) or row and row[0] in grid[source][:now]
            grid[stage].append(row.pop(0) if row and given else None)
        if not any(row[-1] for row in grid):
            raise ValueError(f"the stages wait for each other after {now} units of time")
    return grid


def bubble(schedule):
    """The share of time in which stages wait: (p - 1) / (m + p - 1) for p stages and m
    micro-batches, with either schedule."""
    cells = sum(timeline(schedule), [])
    return cells.count(None) / len(cells)


def in_flight(schedule):
    """For each stage, the most micro-batches whose activations it keeps at once."""
    return [max(accumulate({"F": 1, "B": -1}[kind] for kind, _ in row)) for row in schedule]


class Pipeline:
    """A stage on each process: stage(x, ids) -> x (B, T, C), its shape, in the first without an x;
    loss(x, targets) is asked in the last."""

    def __init__(self, stage, loss, shape):
        self.stage, self.loss, self.shape = stage, loss, shape

    def receive(self, source, micro):
        """What another stage sends for a micro-batch: activations, or their gradient."""
        x = torch.empty(self.shape)
        dist.recv(x, source, tag=micro)
        return x

    def run(self, micro_batches, schedule):
        """Forward and backward for pairs (ids, targets) of one shape: parameters get the gradients
        of their mean loss, which the last process returns, and the others None."""
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        kept, losses, sending = {}, [], []
        for kind, micro in schedule[rank]:
            ids, targets = micro_batches[micro]
            if kind == "F":
                x = self.receive(rank - 1, micro).requires_grad_() if rank else None
                y = self.stage(x, ids)
                if rank == last:
                    y = self.loss(y, targets) / len(micro_batches)
                    losses.append(y.detach())
                kept[micro], out, to = (x, y), y.detach(), rank + 1
            else:
                x, y = kept.pop(micro)
                y.backward(None if rank == last else self.receive(rank + 1, micro))
                out, to = x.grad if rank else None, rank - 1
            if 0 <= to <= last:
                sending.append((dist.isend(out, to, tag=micro), out))  # out must live until then
        for work, _ in sending:
            work.wait()
        return sum(losses) if losses else None
