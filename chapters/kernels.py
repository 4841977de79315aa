"""
The accelerator: faster twins of functions that model.py computes with. GPT.use takes them from here
where this file is there; without it all works and gives the same results, only slower.

    rows(KERNELS, device, dtype)     {"fused": ..., "torch": ..., "cuda": ...}: functions
    fast_orthogonal(x, ...)          Muon's step with fewer products
    GraphedStep(step)                a whole training step as one CUDA graph
    keep_freed_memory(low_memory)    no page is handed back only to be taken again

Each function gives the result of its plain twin in model.py or train.py; tests/benchmark.py prints
what each is worth. Those in CUDA C are in chapters/cuda_kernels.py.
"""

import ctypes
import os
import sys
import time

import torch
import torch.nn.functional as F

from chapters import cuda_kernels
from model import (GROUP, once_differentiable, plain_quant_linear, plain_rotary, rotary_table,
                   sum_dtype)

# -----------------------------------------------------------------------------
# Linear layers that write a few tokens: a CPU spends its time on reading their weights.

FEW_ROWS = {torch.float32: range(8, 33),  # for which fused_linear is faster
            torch.bfloat16: range(1, 33 if torch.cpu._is_amx_tile_supported() else 1)}


def as_type(x, dtype):
    """x, or None, in a dtype: asking first costs a fifth of a .to() that changes nothing."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def fused_linear(x, weight, bias=None):
    """plain_linear; a few rows are multiplied from the right: a CPU reads the weights in order."""
    weight, bias, rows = as_type(weight, x.dtype), as_type(bias, x.dtype), x.numel() // x.size(-1)
    if torch.is_grad_enabled() or x.device.type != "cpu" or rows not in FEW_ROWS.get(x.dtype, ()):
        return F.linear(x, weight, bias)
    few, bias = x.reshape(rows, -1), weight.new_zeros(1) if bias is None else bias
    y = (torch.addmv(bias, weight, few[0]) if rows == 1 else
         torch.addmm(bias[:, None], weight, few.T).T.contiguous())       # (rows, F)
    return y.view(*x.shape[:-1], -1)


PACKED_ROWS = 32  # with more rows these kernels are slower than products with floats


def pack_int4(layer):
    """The integers and scales of a QuantLinear in the order that torch's kernel wants them."""
    pad = (0, 0, 0, -layer.out_features % 16)  # for a multiple of 16 outputs
    q = torch.stack((layer.weight & 15, layer.weight >> 4), dim=-1).flatten(1)
    scale = F.pad(layer.scale.bfloat16(), pad).T[..., None]              # (C / GROUP, F, 1)
    packed = torch._convert_weight_to_int4pack_for_cpu(F.pad(q, pad).int(), 1)
    return packed, GROUP, F.pad(scale, (0, 1))  # beside each scale a zero


def packed_quant_linear(layer, x):
    """plain_quant_linear; a few rows in bfloat16 on a CPU by torch's kernels for integers."""
    rows = x.flatten(0, -2).contiguous()
    if (x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(rows) > PACKED_ROWS
            or torch.is_grad_enabled() and x.requires_grad):
        return plain_quant_linear(layer, x)
    if layer.weight.dtype == torch.int8:
        y = torch._weight_int8pack_mm(rows, layer.weight, as_type(layer.scale, x.dtype))
    else:
        layer.packed = layer.packed or pack_int4(layer)
        y = torch._weight_int4pack_mm_for_cpu(rows, *layer.packed)[:, :layer.out_features]
    return y.view(*x.shape[:-1], -1)


# -----------------------------------------------------------------------------
# Norms, with backward by hand: x alone is kept, which the stream holds anyway, and a number a row.


def inverse_rms(x, eps):
    """1 / root mean square over the last dimension of x (..., C), as (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sum_dtype(x.dtype))
    return (length.square_() / x.size(-1)).add_(eps).rsqrt_().to(x.dtype)


class FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        d_weight = (d_y * unit).flatten(0, -2).sum(dim=0, dtype=weight.dtype)
        d_unit = d_y * weight.to(d_y.dtype)
        # what points along x would only lengthen it, and the norm takes lengths away
        along = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1) / unit.size(-1)  # (..., 1)
        return d_unit.addcmul_(unit, along, value=-1).mul_(scale), d_weight, None


def fused_norm(x, weight, bias=None, center=False, eps=1e-6):
    """plain_norm in fewer passes over memory, keeping less of it; LayerNorm's is torch's own."""
    if center or not torch.is_grad_enabled():
        weight, bias = as_type(weight, x.dtype), as_type(bias, x.dtype)
        return (F.layer_norm(x, weight.shape, weight, bias, eps) if center else
                F.rms_norm(x, weight.shape, weight, eps))
    return FusedRMSNorm.apply(x, weight, eps)


# -----------------------------------------------------------------------------
# Rotary positions, with backward by hand.


class FusedRotary(torch.autograd.Function):
    """Two passes forward; backward rotates the gradient back by the same angles."""

    @staticmethod
    def rotate(x, cos, sin):
        (a, b), out = x.chunk(2, dim=-1), torch.empty_like(x)
        c, d = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=d).addcmul_(a, sin)
        return out

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = (y.unsqueeze(-2).to(x.dtype) for y in (cos, sin))     # (..., T, 1, D/2)
        ctx.save_for_backward(cos, sin)
        return FusedRotary.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        cos, sin = ctx.saved_tensors
        return FusedRotary.rotate(d_y, cos, -sin), None, None


def fused_rotary(x, cos, sin):
    """plain_rotary in fewer passes over memory."""
    return FusedRotary.apply(x, cos, sin) if torch.is_grad_enabled() else plain_rotary(x, cos, sin)


# -----------------------------------------------------------------------------
# Muon's step.


def fast_orthogonal(x, coefficients, steps=5):
    """train.plain_orthogonal of x (..., rows, columns) in fewer passes; where x is wide, with less
    work: what becomes of it is a polynomial of the small x x^T times x, worked out on squares. In
    bfloat16 these would lose small singular values to rounding."""
    a, b, c = coefficients
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.bfloat16 or x.size(-1) < 2 * x.size(-2):
        y = x.reshape(-1, *x.shape[-2:])
        for _ in range(steps):
            gram = torch.bmm(y, y.mT)
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        return y.reshape(x.shape)
    gram, one = x @ x.mT, torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
    total = factor = a * one + b * gram + c * gram @ gram            # (..., rows, rows)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = a * one + b * gram + c * gram @ gram
        total = factor @ total
    return total @ x


# -----------------------------------------------------------------------------
# What can run where, a whole step at once, and the memory of a CPU.

FASTER = dict(linear=fused_linear, norm=fused_norm, rotary=fused_rotary,
              quant_linear=packed_quant_linear)


def rows(kernels, device, dtype):
    """model.KERNELS {name: functions} with the twins above, all but the plain row; and a row "cuda"
    where an NVIDIA GPU runs the kernels of chapters/cuda_kernels.py."""
    found = {name: row if name == "plain" else row | FASTER for name, row in kernels.items()}
    problem = cuda_kernels.problem(device, dtype)
    if not problem:
        found["cuda"] = found["torch"] | cuda_kernels.FASTER
    elif device.type == "cuda":
        cuda_kernels.warn_once(f"chapters/cuda_kernels.py cannot run here: {problem}")
    return found


def trial(model, rows, batch_size, seconds=0.3):
    """{name: seconds} that a block of the model takes, forward and backward, on batch_size whole
    sequences with the functions of each row but the plain one; the fastest of a few tries."""
    block, c, found = model.transformer.blocks[-1], model.config, {}
    x = torch.randn(batch_size, c.block_size, c.n_embd, device=model.device,
                    dtype=model.compute_dtype,
                    generator=torch.Generator(model.device).manual_seed(0)).requires_grad_()
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    table = rotary_table(c, torch.arange(c.block_size, device=model.device))
    options = dict(table=table if c.position == "rope" else None, window=c.window,
                   causal=model.transformer.causal, memory=(x.detach(), None))
    for name in [name for name in rows if name != "plain"]:
        model.set_functions(rows[name])
        times, begin = [], time.perf_counter()
        while len(times) < 2 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            grads = torch.autograd.grad(block(x, **options).sum(), inputs)
            grads[0].flatten()[0].item()  # a GPU has then finished
            times.append(time.perf_counter() - start)
        found[name] = min(times)
    return found


def keep_freed_memory(low_memory=False):
    """Ask glibc to keep freed memory: handing pages back and taking them again can cost a third of
    a step on a CPU. With low_memory large tensors are handed back, and taken in huge pages."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(*((M_MMAP_THRESHOLD, 2**20) if low_memory else (M_MMAP_MAX, 0)))
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if low_memory:
            os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
            torch.empty(1)  # torch reads it at its first tensor; programs that we start must not
            del os.environ["THP_MEM_ALLOC_ENABLE"]


class GraphedStep:
    """step(xs, ys) -> (loss, norm), recorded once as a CUDA graph and then replayed on new batches:
    the GPU gets all kernels of a step at once and never waits for Python. The first calls run as
    they are, so that all is compiled, chosen and allocated when recording begins."""

    def __init__(self, step, warm_up=3):
        self.step, self.graph, self.warm_up = step, None, warm_up
        self.stream = torch.cuda.Stream()

    def __call__(self, xs, ys):
        if self.warm_up:
            self.warm_up -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(xs, ys)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), [*xs, *ys]
            with torch.cuda.graph(self.graph):
                self.result = self.step(xs, ys)
        for own, new in zip(self.inputs, [*xs, *ys]):
            own.copy_(new)
        self.graph.replay()
        return self.result
