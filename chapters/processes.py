"""
Processes on this machine that work together as those of a cluster do, and the bytes that they send.

    def worker(size):
        x = torch.ones(size)
        with counted_bytes() as sent:
            torch.distributed.all_reduce(x)
        return x.sum().item(), sent["allreduce"]

    spawn(2, worker, 8) == [(16.0, 32), (16.0, 32)]
"""

import ast
import inspect
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import signal
import socket
import stat
import struct
import sys
import tempfile
import textwrap
import threading
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What one of n processes sends in an operation that it gives so many bytes; in others, nothing.
SENT = {
    "allreduce": lambda size, n: 2 * (n - 1) / n * size,
    "reducescatter": lambda size, n: (n - 1) / n * size,
    "allgather": lambda size, n: (n - 1) * size,
    "broadcast": lambda size, n: (n - 1) / n * size,  # the mean over the processes
    "send": lambda size, n: size,
}

# -----------------------------------------------------------------------------
# Processes: started, given a function, ended.


def module_text(function, known=()):
    """A function of a notebook, and what it names of the notebook, as the text of a module."""
    source, lines = textwrap.dedent(inspect.getsource(function)), []
    known = [*known, function.__name__]
    for name in sorted({*re.findall(r"\w+", source)} & {*function.__globals__} - {*known}):
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            lines.append(f"import {value.__name__} as {name}")
        elif inspect.isfunction(value) and value.__module__ == "__main__":
            lines.append(module_text(value, known))
        elif inspect.isroutine(value) or inspect.isclass(value):
            lines.append(f"from {value.__module__} import {value.__name__} as {name}")
        elif isinstance(value, (int, float, str, tuple, list, dict)):
            with suppress(ValueError, SyntaxError):  # it holds more than such constants
                lines.append(f"{name} = {ast.literal_eval(repr(value))!r}")
    return "\n".join([*lines, source])


def end_with_parent():
    """Wait for the parent to end, however that happens, and end this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


def serve(rank, n, folder, pipe, function, arguments):
    """One process of spawn(): join the group, call the function, send what it returns, and stay
    until the parent ends all, since the others' connections end with this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(1)
        if os.name != "nt":  # else gloo looks up the machine's name, which may be unknown
            loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            os.environ["GLOO_SOCKET_IFNAME"] = loopback
        store = dist.FileStore(os.path.join(folder, "store"), n)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        if isinstance(function, str):
            function = runpy.run_path(os.path.join(folder, "cell.py"))[function]
        pipe.send((function(*arguments), "", ""))
    except BaseException as error:
        pipe.send((None, f"{type(error).__name__}: {error}", traceback.format_exc()))
    threading.Event().wait()


def collect(process, pipe, name):
    """What a process of spawn() sends; RuntimeError if it failed or died."""
    try:
        result, error, trace = pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{name} died with exit code {process.exitcode}") from None
    if error:
        raise RuntimeError(f"{name}: {error}") from RuntimeError(trace)
    return result


def spawn(n, function, *arguments, timeout=300):
    """Call function(*arguments), of a module or a notebook's cell, in n new processes that form a
    gloo group, with one thread each -> what each returned. RuntimeError for the first that fails,
    or if none ends within timeout seconds. No process stays."""
    context, started, results = multiprocessing.get_context("spawn"), [], {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if getattr(function, "__module__", "") == "__main__" and not hasattr(
                sys.modules["__main__"], "__file__"):  # a notebook, which new processes cannot read
            Path(folder, "cell.py").write_text(module_text(function), encoding="utf-8")
            function = function.__name__
        try:
            for rank in range(n):
                pipe, end = context.Pipe()
                process = context.Process(target=serve, daemon=True, args=(
                    rank, n, folder, end, function, arguments))
                process.start()
                end.close()  # then the process alone holds it, and takes it along when it dies
                started.append((process, pipe))
            while len(results) < n:
                waiting = {pipe: rank for rank, (_, pipe) in enumerate(started)
                           if rank not in results}
                ready = multiprocessing.connection.wait(waiting, timeout)
                if not ready:
                    raise RuntimeError(f"process {', '.join(map(str, waiting.values()))} of {n} "
                                       f"did not end within {timeout} seconds")
                # first those that died: the errors of others only say that a connection is gone
                ended = sorted(map(waiting.get, ready), key=lambda r: started[r][0].is_alive())
                for rank in ended:
                    results[rank] = collect(*started[rank], f"process {rank} of {n}")
        finally:
            for process, _ in started:
                process.kill()
                process.join()
    return [results[rank] for rank in range(n)]


# -----------------------------------------------------------------------------
# Bytes: counted from the operations, and read from the kernel.


class counted_bytes(TorchDispatchMode):
    """`with counted_bytes() as sent:` counts what this process sends, as a Counter {a name in SENT:
    bytes}: in our functions, and in torch's DDP, FSDP, tensor parallel and pipelines alike."""

    def __enter__(self):
        super().__enter__()
        self.sent = Counter()
        return self.sent

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        library, name, _ = str(operation).split(".")
        kind = next(filter(name.replace("_", "").startswith, SENT), None)
        if kind and library in ("c10d", "_c10d_functional"):
            boxed = [x for x in args if isinstance(x, torch.ScriptObject)]
            group = dist.ProcessGroup.unbox(boxed[0]) if boxed else _resolve_process_group(args[-1])
            sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, torch.Tensor))
                     for arg in args[:2]]  # an input, or an output and an input
            self.sent[kind] += round(SENT[kind](sizes[1] or sizes[0], group.size()))
        return operation(*args, **(kwargs or {}))


def wire_bytes():
    """What this process has sent over TCP so far, as Linux counts it, gloo's headers included;
    elsewhere None. A reduce-scatter of gloo is an all-reduce, and sends twice what it needs."""
    if sys.platform != "linux":
        return None
    total = 0
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed by now, or not a connection over TCP
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                    total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total
