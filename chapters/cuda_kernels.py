"""
Norm, rotary positions and loss in CUDA C (kernels.cu): between torch's matrix products each number
is read and written about once. NVRTC, which CUDA builds of torch bring along, compiles them when
they are first used: no compiler, no toolkit. chapters/kernels.py offers them as the row "cuda".
"""

import ctypes
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from model import FusedLoss, fused_loss, once_differentiable, plain_norm, plain_rotary

NUMBERS = {  # what a tensor holds; every sum is kept in float
    torch.float32: """
typedef float Number;
__device__ float widen(Number x) { return x; }
__device__ void narrow(float x, Number& y) { y = x; }""",
    torch.bfloat16: """
struct Number { unsigned short bits; };  // the upper half of a float
__device__ float widen(Number x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void narrow(float x, Number& y) {  // to the nearest, of two to the even one
    unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}""",
    torch.float16: """
struct Number { unsigned short bits; };
__device__ float widen(Number x) {
    float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y;
}
__device__ void narrow(float x, Number& y) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}"""}
SOURCE = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
KERNEL_NAMES = ("norm_forward", "norm_backward", "rotate", "loss")


@lru_cache(maxsize=None)
def compiled(device, dtype, width):
    """SOURCE compiled for a device, a dtype and a number of them that a thread reads at once
    -> run(name, grid, block, n_bytes, values, types), which launches one of its kernels."""
    from cuda.bindings import driver, nvrtc  # torch's CUDA builds bring it along

    def get(result):
        status, *values = result
        if status:
            raise RuntimeError(f"cuda.bindings says {status.name}")
        return values[0] if values else None

    source = f"#define WIDTH {width}{NUMBERS[dtype]}\n{SOURCE}".encode()
    program = get(nvrtc.nvrtcCreateProgram(source, b"model.cu", 0, [], []))
    options = ["-arch=sm_{}{}".format(*torch.cuda.get_device_capability(device)), "-std=c++17"]
    status, = nvrtc.nvrtcCompileProgram(program, 2, [option.encode() for option in options])
    if status:
        log = bytearray(get(nvrtc.nvrtcGetProgramLogSize(program)))
        get(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{status.name} {log.decode().rstrip(chr(0))}")
    code = bytearray(get(nvrtc.nvrtcGetCUBINSize(program)))
    get(nvrtc.nvrtcGetCUBIN(program, code))
    context = get(driver.cuDevicePrimaryCtxRetain(get(driver.cuDeviceGet(device.index or 0))))
    get(driver.cuCtxSetCurrent(context))
    module = get(driver.cuModuleLoadData(bytes(code)))
    kernels = {name: get(driver.cuModuleGetFunction(module, name.encode()))
               for name in KERNEL_NAMES}

    def run(name, grid, block, n_bytes, values, types):
        with torch.cuda.device(device):
            get(driver.cuCtxSetCurrent(context))  # the thread of backward may have none yet
            stream = torch.cuda.current_stream().cuda_stream
            get(driver.cuLaunchKernel(kernels[name], grid, 1, 1, block, 1, 1, n_bytes, stream,
                                      (values, types), 0))
    return run


def launch(name, width, grid, block, *args, shared=0):
    """Run a kernel on args, of which the first is a tensor: `grid` blocks of `block` threads, with
    `shared` floats for each block. None becomes a null pointer."""
    kinds = {bool: ctypes.c_int, int: ctypes.c_int, float: ctypes.c_float}
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x or 0 for x in args]
    types = [kinds.get(type(x), ctypes.c_void_p) for x in args]
    if grid:
        run = compiled(args[0].device, args[0].dtype, width)
        run(name, grid, block, 4 * (32 + shared), tuple(values), tuple(types))


def problem(device, dtype):
    """Why the kernels cannot run on a device, in a line; "" if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"they need an NVIDIA GPU, and the model is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) if dtype == torch.bfloat16 else capability < (7, 0):
        return "the GPU's compute capability {}.{} is too low".format(*capability)
    try:
        compiled(device, dtype if dtype in NUMBERS else torch.float32, 8)
    except Exception as error:  # NVRTC, driver or binding missing, too old: errors of many kinds
        return " ".join(f"{error}".split())[:200] or repr(error)
    return ""


@lru_cache(maxsize=None)
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def covered(x):
    """Whether the kernels take x: dense, in a dtype they know, rows that fit into shared memory."""
    return x.dtype in NUMBERS and x.is_contiguous() and x.size(-1) <= 4096


def share(n, *tensors):
    """How n numbers of a row are shared out: -> (how many a thread reads at once, 8 where all rows
    begin at multiples of 32 bytes; how many threads take part, a power of two up to 32)."""
    width = 1 if n % 8 or any(x.data_ptr() % 32 for x in tensors) else 8
    return width, min(32, 1 << (n // width - 1).bit_length())


class CudaNorm(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, center, eps):
        C, rows, scale = x.size(-1), x.numel() // x.size(-1), weight.float()
        y, stats = torch.empty_like(x), x.new_empty(rows, 2, dtype=torch.float32)
        shift = scale if bias is None else bias.float()
        width, lanes = share(C, x, scale, shift)
        launch("norm_forward", width, -(-rows * lanes // 128), 128, x, scale,
               None if bias is None else shift, y, stats, rows, C, lanes, center, eps)
        ctx.save_for_backward(x, weight, stats)
        ctx.center, ctx.biased = center, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        (x, weight, stats), d_y = ctx.saved_tensors, d_y.contiguous()
        C, rows, scale = x.size(-1), len(stats), weight.float()
        width, lanes = share(C, x, d_y, scale)
        blocks = min(-(-rows * lanes // 32), 4096, 2**21 // C)
        d_x, d_params = torch.empty_like(x), stats.new_empty(blocks, 1 + ctx.biased, C)
        launch("norm_backward", width, blocks, 32, d_y, x, scale, stats, d_x, d_params, rows, C,
               lanes, ctx.center, 1 + ctx.biased, shared=(1 + ctx.biased) * C * 32 // lanes)
        d_weight, d_bias = (*d_params.sum(dim=0).to(weight.dtype), None)[:2]
        return d_x, d_weight, d_bias, None, None


def cuda_norm(x, weight, bias=None, center=False, eps=1e-6):
    """plain_norm in one kernel each way."""
    take = CudaNorm.apply if covered(x) else plain_norm
    return take(x, weight, bias, center, eps)


class CudaRotary(torch.autograd.Function):

    @staticmethod
    def rotate(x, cos, sin, way):
        y, D, rows = torch.empty_like(x), x.size(-1), x.numel() // x.size(-1)
        width, _ = share(D // 2, x, cos, sin)
        launch("rotate", width, -(-x.numel() // (2 * width * 128)), 128, x, y, cos, sin, rows, D,
               x.size(-2), cos.numel() // cos.size(-1), way)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return CudaRotary.rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return CudaRotary.rotate(d_y.contiguous(), *ctx.saved_tensors, -1), None, None


def cuda_rotary(x, cos, sin):
    """plain_rotary in one kernel each way."""
    if not covered(x):
        return plain_rotary(x, cos, sin)
    return CudaRotary.apply(x, cos.float().contiguous(), sin.float().contiguous())


def cuda_loss_tile(V, x, weight, targets, softcap, smoothing, z_loss, with_gradient):
    """loss_tile in one kernel: the gradient takes the place of the logits. V rows of the weight
    count, those behind them are padding."""
    logits, losses = x @ weight.T, x.new_empty(len(x), dtype=torch.float32)
    launch("loss", 8, len(x), 512, logits, targets.contiguous(), losses, V, len(weight),
           with_gradient, float(softcap), float(smoothing), float(z_loss))
    return losses.sum(), logits


class CudaLoss(FusedLoss):

    @staticmethod
    def forward(ctx, x, weight, *options):
        ctx.V = V = len(weight)
        whole = F.pad(weight, (0, 0, 0, -V % 8)) if V % 8 else weight  # else products are slow
        return FusedLoss.forward(ctx, x, whole, *options, tile=partial(cuda_loss_tile, V))

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight, *others = FusedLoss.backward(ctx, d_loss)
        return d_x, None if d_weight is None else d_weight[:ctx.V], *others


def cuda_loss(x, weight, targets, softcap=0.0, smoothing=0.0, z_loss=0.0):
    """fused_loss with one kernel between the products."""
    if x.dtype not in NUMBERS:
        return fused_loss(x, weight, targets, softcap, smoothing, z_loss)
    return CudaLoss.apply(x, weight, targets, softcap, smoothing, z_loss)


FASTER = dict(norm=cuda_norm, rotary=cuda_rotary, loss=cuda_loss)
