"""chapters/kernels.py: each faster twin equals its plain twin in value and gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from test_model import close, exactly, randn, value_and_gradients

from chapters.kernels import FEW_ROWS, fast_orthogonal, fused_linear, fused_norm, fused_rotary
from model import plain_linear, plain_norm, plain_rotary, rotary_table
from train import NEWTON_SCHULZ, plain_orthogonal


@pytest.mark.parametrize("center, bias", [(False, False), (True, True), (True, False)])
def test_fused_norm_equals_plain_norm_and_torchs(center, bias):
    inputs = [randn(3, 5, 8), randn(8), *([randn(8)] if bias else [])]

    def call(norm, x, weight, shift=None):
        return norm(x, weight, shift, center)

    def by_torch(x, weight, shift, center):
        return (F.layer_norm(x, (8,), weight, shift, 1e-6) if center
                else F.rms_norm(x, (8,), weight, 1e-6))

    plain = value_and_gradients(partial(call, plain_norm), *inputs)
    close(value_and_gradients(partial(call, fused_norm), *inputs), plain, **exactly)
    close(value_and_gradients(partial(call, by_torch), *inputs), plain, **exactly)
    with torch.no_grad():
        close(call(fused_norm, *inputs), plain[0], **exactly)


@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_fused_rotary_equals_plain_rotary(shape):
    cos, sin = rotary_table(tiny().config, torch.randint(99, shape).double())
    x = randn(2, 7, 3, 8)
    close(value_and_gradients(lambda x: fused_rotary(x, cos, sin), x),
          value_and_gradients(lambda x: plain_rotary(x, cos, sin), x), **exactly)


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FEW_ROWS)
def test_fused_linear_equals_plain_linear(rows, bias, dtype, monkeypatch):
    monkeypatch.setitem(FEW_ROWS, dtype, range(1, 33))  # whatever this machine is fast at
    x, weight = torch.randn(rows, 1, 24).to(dtype), torch.randn(40, 24)
    shift = torch.randn(40) if bias else None
    with torch.inference_mode():
        y = fused_linear(x, weight, shift)
        close(y, plain_linear(x, weight, shift))
        assert y.is_contiguous()  # what comes after would be slower
    inputs = [randn(rows, 24), randn(40, 24)]
    close(value_and_gradients(fused_linear, *inputs), value_and_gradients(plain_linear, *inputs))


def test_gradcheck_passes_on_the_fused_functions():
    check = torch.autograd.gradcheck
    x, gate = (randn(4, 4).requires_grad_() for _ in range(2))
    assert check(lambda x, w: fused_norm(x, w), (x, gate[0]))
    cos, sin = rotary_table(tiny(n_head=8).config, torch.arange(4.0))
    assert check(lambda x: fused_rotary(x[None, :, None], cos, sin), (x,))


@pytest.mark.parametrize("name", ["norm", "rotary"])
def test_double_backward_through_a_fused_function_is_refused(name):
    x = randn(1, 4, 1, 4).requires_grad_()
    calls = dict(norm=lambda: fused_norm(x, randn(4)),
                 rotary=lambda: fused_rotary(x, torch.ones(4, 2), torch.ones(4, 2)))
    slope, = torch.autograd.grad(calls[name]().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("shape", [(8, 8), (3, 5, 12), (2, 12, 5), (1, 7)])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_fast_orthogonal_equals_plain_orthogonal(shape, dtype, near):
    x = torch.randn(shape, dtype=torch.float64)
    fast = fast_orthogonal(x.to(dtype), NEWTON_SCHULZ)
    close(fast.double(), plain_orthogonal(x), rtol=near, atol=near)
    low = fast_orthogonal(x.bfloat16(), NEWTON_SCHULZ)
    close(low.double(), plain_orthogonal(x.bfloat16()).double(), rtol=0, atol=0.1)
