"""
A model on several processes, with the losses and gradients of one: what train.py does with torch's
own, each way in about 30 lines. chapters/pipeline.py has a fourth way, by blocks.

    def worker():
        model = GPT(config)
        parallel = BucketedDataParallel(model)
        model(*batches[dist.get_rank()])[1].backward()
        parallel.finish()

    spawn(2, worker)                                  # of chapters/processes.py

What each of two processes holds:

                      parameters and gradients     optimizer's state    activations
    data parallel     all                          all                  of its half of the batch
    ZeRO-1            all                          its half             of its half of the batch
    tensor parallel   half of a block's matrices   of these             of the whole batch
    pipeline          half of the blocks           of these             of micro-batches under way
"""

import torch
import torch.distributed as dist
from torch import nn

from model import plain_linear, swap

# -----------------------------------------------------------------------------
# The ring: each process sends to the next one. Three sum their [a b c] (arXiv:1802.05799):
#
#                      process 0    process 1    process 2
#     at first         a0 b0 c0     a1 b1 c1     a2 b2 c2
#     reduce_scatter   A  .  .      .  B  .      .  .  C      A = a0 + a1 + a2, and so on
#     all_gather       A  B  C      A  B  C      A  B  C


def around(chunks, first, take):
    """Send n - 1 of n chunks to the next process, from number `first` downwards. Each time a chunk
    with the number below comes from the process before: take(own chunk, that one)."""
    rank, n = dist.get_rank(), dist.get_world_size()
    for number in range(first, first - n + 1, -1):
        own = chunks[(number - 1) % n]
        arriving = torch.empty_like(own)
        sending = dist.isend(chunks[number % n], (rank + 1) % n)
        dist.recv(arriving, (rank - 1) % n)
        sending.wait()
        take(own, arriving)


def reduce_scatter(chunks):
    """Of n chunks on each of n processes, make number r on process r the sum of all numbers r; the
    others are left as parts of sums."""
    around(chunks, dist.get_rank() - 1, torch.Tensor.add_)


def all_gather(chunks):
    """Of n chunks on each of n processes, fill number r with that of process r."""
    around(chunks, dist.get_rank(), torch.Tensor.copy_)


def ring_all_reduce(x):
    """Sum a contiguous tensor over all processes, in place, and return it. Each of n processes
    sends 2 (n - 1) / n of it, always less than twice its size."""
    chunks = x.view(-1).tensor_split(dist.get_world_size())
    reduce_scatter(chunks)
    all_gather(chunks)
    return x


# -----------------------------------------------------------------------------
# Data parallel: all processes have the whole model, and each a part of the batch. A bucket of
# gradients is averaged as soon as it is complete, while backward goes on (arXiv:2006.15704):
#
#     backward      last blocks | middle blocks | first blocks |
#     all-reduce                | bucket 0      | bucket 1     | bucket 2 |


def flat_gradients(params):
    """The gradients of parameters as one vector, with zeros where there is none."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in params])


class BucketedDataParallel:
    """Call the model as before, and after backward finish(): then gradients are the means over all
    processes. While `sync` is False they add up in each, for a later backward to send."""

    def __init__(self, model, bucket_bytes=2**20):
        self.sync, self.buckets, self.bucket_of = True, [], {}
        for p in model.parameters():
            dist.broadcast(p.data, 0)
        for p in reversed([p for p in model.parameters() if p.requires_grad]):  # as in backward
            if not self.buckets or sum(q.nbytes for q in (*self.buckets[-1], p)) > bucket_bytes:
                self.buckets.append([])
            self.bucket_of[p] = len(self.buckets) - 1
            self.buckets[-1].append(p)
            p.register_post_accumulate_grad_hook(self.arrived)
        self.missing, self.under_way = [*map(len, self.buckets)], []

    def arrived(self, p):
        """Launch the buckets that p completes, in the order that is the same in all processes."""
        self.missing[self.bucket_of[p]] -= self.sync
        if self.missing[self.bucket_of[p]] < 0:
            raise ValueError("a second backward before finish(): set sync = False during the first")
        for missing in self.missing[len(self.under_way):]:
            if missing:
                break
            self.launch()

    def launch(self):
        """Begin to average the next bucket, and do not wait for it."""
        mean = flat_gradients(self.buckets[len(self.under_way)]) / dist.get_world_size()
        self.under_way.append((mean, dist.all_reduce(mean, async_op=True)))

    def finish(self):
        """Wait for all buckets, and put the means in the place of the gradients."""
        while len(self.under_way) < len(self.buckets):  # some parameters were not used this time
            self.launch()
        for bucket, (mean, work) in zip(self.buckets, self.under_way):
            work.wait()
            for p, grad in zip(bucket, mean.split([p.numel() for p in bucket])):
                p.grad = grad.view_as(p)
        self.missing, self.under_way = [*map(len, self.buckets)], []


# -----------------------------------------------------------------------------
# ZeRO-1 (arXiv:1910.02054): AdamW's m and v take twice the memory of the parameters. Here a process
# keeps 1/n of them, and takes the step for that part alone, between the two halves of the ring, so
# that no more is sent than in data parallel:
#
#     gradients of each process -> reduce_scatter -> AdamW on 1/n -> all_gather -> parameters


class ShardedAdamW:
    """AdamW for parameters that all processes have, and gradients of each one's part of the batch:
    step() averages them. m and v are vectors of 1/n of the parameters."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8):
        self.params, self.steps = [p for p in params if p.requires_grad], 0
        self.lr, self.betas, self.weight_decay, self.eps = lr, betas, weight_decay, eps
        own = flat_gradients(self.params).tensor_split(dist.get_world_size())[dist.get_rank()]
        self.m, self.v = torch.zeros_like(own), torch.zeros_like(own)

    @torch.no_grad()
    def step(self):
        """The same as AdamW's with the mean of the gradients, on this process's part alone."""
        rank, n, (beta1, beta2) = dist.get_rank(), dist.get_world_size(), self.betas
        grads = flat_gradients(self.params).tensor_split(n)
        flat = torch.cat([p.flatten() for p in self.params])
        weights = flat.tensor_split(n)
        reduce_scatter(grads)
        weight, grad, self.steps = weights[rank], grads[rank] / n, self.steps + 1
        self.m.lerp_(grad, 1 - beta1)
        self.v.lerp_(grad.square(), 1 - beta2)
        m, v = self.m / (1 - beta1**self.steps), self.v / (1 - beta2**self.steps)
        weight.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * m / (v.sqrt() + self.eps))
        all_gather(weights)
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params])):
            p.copy_(part.view_as(p))


# -----------------------------------------------------------------------------
# Tensor parallel (arXiv:1909.08053): each process has some heads, and some channels of the MLP.
#
#                process 0                     process 1
#     x          all channels                  the same                  ToRegion
#     Column     x times the first half of W   x times the second half
#     Row        that times half of W          that times the other
#     y          the sum of both               the same                  FromRegion


def summed(x):
    """The sum of a tensor over all processes, as a new one."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


class ToRegion(torch.autograd.Function):
    """x as it is: all processes use it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_y):
        return summed(d_y)


class FromRegion(torch.autograd.Function):
    """The sum of what the processes have, so that the gradient of each is the sum's."""

    @staticmethod
    def forward(ctx, x):
        return summed(x)

    @staticmethod
    def backward(ctx, d_y):
        return d_y


def part(weight, dim=0):
    """This process's part of a parameter, as one of its own."""
    n = dist.get_world_size()
    if weight.size(dim) % n:
        raise ValueError(f"{weight.size(dim)} channels are no multiple of {n} processes")
    return nn.Parameter(weight.detach().chunk(n, dim)[dist.get_rank()].clone())


class ColumnLinear(nn.Module):
    """1/n of the outputs of a linear layer: x (..., C) -> (..., F/n). They are columns of the
    matrix that x is multiplied with, rows of the weight (F, C), which is its transpose."""

    def __init__(self, linear):
        super().__init__()
        self.weight = part(linear.weight)
        self.bias = None if linear.bias is None else part(linear.bias)

    def forward(self, x):
        return plain_linear(ToRegion.apply(x), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer that gets 1/n of its inputs: x (..., F/n) -> (..., C)."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = part(linear.weight, 1), linear.bias

    def forward(self, x):
        y = FromRegion.apply(plain_linear(x, self.weight))
        return y if self.bias is None else y + self.bias  # once, and not once a process


def tensor_parallel(model):
    """Share the blocks of a plain GPT among the processes, in place, and return it."""
    blocks, n = model.transformer.blocks, dist.get_world_size()
    if model.config.n_kv_head % n:
        raise ValueError(f"n_kv_head={model.config.n_kv_head} is no multiple of {n} processes")
    swap(blocks, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ColumnLinear)
    swap(blocks, ("o_proj", "down_proj"), RowLinear)
    for name, p in blocks.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # whole on each process, but used on
            p.register_hook(summed)  # its own heads only: what reaches it is a part of its gradient
    return model
