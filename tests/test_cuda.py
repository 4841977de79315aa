"""chapters/cuda_kernels.py: the kernels compile, and they agree with the plain twins in value and
gradient. Without a GPU their C runs as C++ on the processor, a fiber for each CUDA thread."""

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny
from test_model import close, value_and_gradients

from chapters import cuda_kernels
from chapters.cuda_kernels import (KERNEL_NAMES, NUMBERS, SOURCE, cuda_loss, cuda_norm,
                                   cuda_rotary, problem, share)
from model import GPT, plain_loss, plain_norm, plain_rotary

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
GPU = torch.device("cuda", 0)

# A block is fibers of one thread. In each round all go on, in another order, to where they next
# wait for each other: code that lacks a barrier gives wrong numbers. Shared memory starts as NaN.
HOST = r"""
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <ucontext.h>
#include <utility>
#define __global__
#define __device__
#define __shared__
struct Dim { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;
alignas(32) float shared[1 << 16];
float slots[1024];
char stacks[1024][1 << 16];
bool done[1024];
ucontext_t scheduler, fibers[1024];
std::function<void()> body;
void __syncthreads() { swapcontext(&fibers[threadIdx.x], &scheduler); }
float __shfl_xor_sync(unsigned, float x, int step) {
    slots[threadIdx.x] = x;
    __syncthreads();
    x = slots[threadIdx.x ^ step];
    __syncthreads();
    return x;
}
float rsqrtf(float x) { return 1 / sqrtf(x); }
#define __expf expf
float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
void fiber() { body(); done[threadIdx.x] = true; }
void run(unsigned grid, unsigned block) {
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        for (float& x : shared) x = std::numeric_limits<float>::quiet_NaN();
        for (unsigned i = 0; i < block; i++) {
            getcontext(&fibers[i]);
            fibers[i].uc_stack.ss_sp = stacks[i], fibers[i].uc_stack.ss_size = sizeof(stacks[i]);
            fibers[i].uc_link = &scheduler, done[i] = false;
            makecontext(&fibers[i], fiber, 0);
        }
        unsigned left = block;
        for (unsigned round = 0; left; round++)
            for (unsigned k = 0; k < block; k++) {
                threadIdx.x = (5 * k + 3 * round) % block;
                if (done[threadIdx.x]) continue;
                swapcontext(&scheduler, &fibers[threadIdx.x]);
                left -= done[threadIdx.x];
            }
    }
}
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, unsigned grid, unsigned block,
          std::index_sequence<I...>) {
    body = [=] { kernel(*(A*)args[I]...); };
    run(grid, block);
}
template <class... A> void start(void (*kernel)(A...), void** args, unsigned grid, unsigned block) {
    call(kernel, args, grid, block, std::index_sequence_for<A...>());
}
"""


@pytest.fixture(scope="session")
def host_module(tmp_path_factory):
    """host_module(dtype, width) -> the library that g++ makes of the kernels."""
    if not shutil.which("g++") or not sys.platform.startswith("linux"):
        pytest.skip("running the kernels without a GPU needs Linux and g++")
    folder, libraries = tmp_path_factory.mktemp("host"), {}

    def build(dtype, width):
        path = folder / f"{dtype}{width}.so"
        if path not in libraries:
            code = f"#define WIDTH {width}{HOST}{NUMBERS[dtype]}{SOURCE}" + "".join(
                f'extern "C" void run_{name}(void** args, unsigned grid, unsigned block)'
                f"{{ start({name}, args, grid, block); }}\n" for name in KERNEL_NAMES)
            path.with_suffix(".cpp").write_text(code)
            subprocess.run(["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC",
                            "-o", path, path.with_suffix(".cpp")], check=True)
        return libraries.setdefault(path, ctypes.CDLL(str(path)))
    return build


MACHINES = [("host", FLOAT), ("host", BRAIN)]
if torch.cuda.is_available():
    MACHINES += [("gpu", dtype) for dtype in NUMBERS]


@pytest.fixture(params=MACHINES, ids=str)
def agree(request, monkeypatch):
    """agree(kernels' function, plain one, inputs...): in value and gradient; kernels did run."""
    where, dtype = request.param
    launched, launch = [], cuda_kernels.launch
    if where == "host":
        build = request.getfixturevalue("host_module")

        def module(device, dtype, width):
            def run(name, grid, block, size, values, types):
                cells = [kind(value) for kind, value in zip(types, values)]
                pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
                getattr(build(dtype, width), f"run_{name}")(pointers, grid, block)
            return run
        monkeypatch.setattr(cuda_kernels, "compiled", module)

    def record(name, *args, **options):
        launched.append(name)
        launch(name, *args, **options)

    def agree(ours, plain, *inputs):
        device = GPU if where == "gpu" else "cpu"
        inputs = [x.to(device, dtype if x.dim() > 1 else FLOAT) for x in inputs]
        mine = value_and_gradients(ours, *inputs)
        exact = value_and_gradients(plain, *(x.double() for x in inputs))
        assert launched
        tolerance = dict(rtol=2e-4, atol=2e-5) if dtype == FLOAT else dict(rtol=0.05, atol=0.05)
        close([x.double() for x in mine], exact, **tolerance)

    monkeypatch.setattr(cuda_kernels, "launch", record)
    torch.manual_seed(0)
    return agree


@pytest.mark.parametrize("rows, C", [(1, 5), (2, 33), (3, 96), (7, 257), (5, 1000), (6, 32)])
@pytest.mark.parametrize("center, bias", [(False, False), (True, True), (True, False)])
def test_norm_agrees(agree, rows, C, center, bias):
    inputs = [torch.randn(1, rows, C) + 3, torch.randn(C), *([torch.randn(C)] if bias else [])]

    def call(norm, x, weight, shift=None):
        return norm(x, weight, shift, center)

    agree(*(lambda *x, f=f: call(f, *x) for f in (cuda_norm, plain_norm)), *inputs)


@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 2), (2, 3, 3, 10), (1, 5, 2, 64), (2, 2, 1, 96),
                                        (3, 7, 2, 16), (1, 2, 2, 258), (1, 1, 3, 1000)])
@pytest.mark.parametrize("batched", [True, False])
def test_rotary_agrees(agree, B, T, H, D, batched):
    angles = torch.randn(*([B] if batched else []), T, D // 2)

    def call(rotary, x):
        table = (y.to(x.device, x.dtype if rotary is plain_rotary else FLOAT)
                 for y in (angles.cos(), angles.sin()))
        return rotary(x, *table)

    agree(*(lambda x, f=f: call(f, x) for f in (cuda_rotary, plain_rotary)),
          torch.randn(B, T, H, D))


@pytest.mark.parametrize("n, V", [(1, 50304), (2, 65), (7, 65), (5, 257), (3, 1000), (3, 8)])
@pytest.mark.parametrize("options", [{}, dict(smoothing=0.1), dict(softcap=2), dict(z_loss=0.01),
                                     dict(softcap=3.0, smoothing=0.2, z_loss=0.1)], ids=str)
def test_loss_agrees(agree, monkeypatch, n, V, options):
    monkeypatch.setattr("model.LOSS_TILE", 2 * V)  # two rows a slice
    targets = torch.randint(V, (n,))
    targets[1::3] = -1
    agree(*(lambda x, w, f=f: f(x, w, targets.to(x.device), **options)
            for f in (cuda_loss, plain_loss)), torch.randn(n, 8), torch.randn(V, 8))


def test_what_no_kernel_covers_falls_through_to_the_plain_twin(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "launch", None)  # calling it would raise
    x, weight = torch.randn(3, 8).double(), torch.randn(8)
    odd = torch.randn(8, 3).T
    for x in (x, odd, torch.randn(2, 5000)):
        weight = torch.randn(x.size(-1))
        close(cuda_norm(x, weight), plain_norm(x, weight))


@pytest.mark.parametrize("n, start, expected", [
    (768, 0, (8, 32)), (64, 0, (8, 8)), (72, 0, (8, 16)), (8, 0, (8, 1)), (10, 0, (1, 16)),
    (64, 1, (1, 32))])
def test_eight_numbers_are_read_at_once_where_rows_allow_it(n, start, expected):
    assert share(n, torch.zeros(16)[start:]) == expected


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_the_kernels_compile_for_ampere_and_hopper(tmp_path, dtype, width):
    source = tmp_path / "model.cu"
    source.write_text(f"#define WIDTH {width}{NUMBERS[dtype]}\n{SOURCE}")
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    words = ["nvcc", "-std=c++17", "-fatbin", *targets, "-o", tmp_path / "out", source]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@needs_gpu
def test_under_a_cuda_graph_norm_gives_the_same():
    x, weight = torch.randn(7, 96, device=GPU), torch.randn(96, device=GPU)
    call = lambda x: value_and_gradients(cuda_norm, x, weight)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(x)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(x)
    x.copy_(torch.randn(7, 96))
    graph.replay()
    close(found, call(x))


@needs_gpu
def test_on_a_gpu_auto_takes_our_own_kernels_and_they_train():
    net, ids = tiny().to(GPU), torch.randint(64, (2, 16), device=GPU)
    assert net.use("auto") == "cuda"
    _, loss = net(ids, ids)
    loss.backward()
    net.use("plain")
    close(net(ids, ids)[1], loss)


# -----------------------------------------------------------------------------
# Where the kernels cannot run, a line says why.


def test_without_a_gpu_cuda_is_refused():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*kernels=auto"):
        tiny().use("cuda")


def broken(device, dtype, width):
    raise RuntimeError("NVRTC_ERROR_COMPILATION model.cu(3): error: what is this?\n\n1 error\0")


@pytest.mark.parametrize("capability, module, words", [
    ((6, 1), None, "compute capability 6.1 is too low"),
    ((9, 0), broken, "COMPILATION model.cu(3): error: what is this? 1 error"),
    ((9, 0), None, "cuda.bindings")])
def test_where_the_kernels_do_not_compile_a_line_says_why(monkeypatch, capsys, capability, module,
                                                          words):
    monkeypatch.setattr(GPT, "device", GPU)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # so that importing it fails
    monkeypatch.setattr(cuda_kernels, "compiled", module or cuda_kernels.compiled.__wrapped__)
    net = tiny()
    cuda_kernels.warn_once.cache_clear()
    capsys.readouterr()
    assert [net.use("torch"), net.use("torch", BRAIN)] == ["torch", "torch"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    with pytest.raises(ValueError, match="kernels=cuda needs"):
        net.use("cuda")


def test_kernels_refuse_what_is_not_on_the_gpu():
    assert "on cpu" in problem(torch.device("cpu"), FLOAT)
