"""
Train a model: text or token shards in, a run folder with checkpoints out.

    python train.py                                       # Python's own library, a few minutes
    python train.py --data=mybook.txt --size=small --minutes=60 --dropout=0.1
    python train.py --resume                              # continue the newest run
    torchrun --nproc_per_node=2 train.py --max_steps=500  # the same losses, on two processes

With none of --max_steps, --tokens, --epochs and --minutes a run ends after 2 epochs or 4 minutes,
whichever comes first. A resumed run can change every option but those of its model and its data.

Ctrl-C or SIGTERM: it saves and ends, with exit code 130 or 143; the second Ctrl-C ends it at once.
"""

import contextlib
import copy
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import MixedLoader, TokenLoader, check_shards, folder_name, locked, prepare, read_card
from model import (GPT, SIZES, GPTConfig, accelerator, check_ids, check_known, check_options,
                   load_model, option, read_safetensors, save_model)
from sample import checkpoints, complete, first_whole, has_fast_bf16
from sample import load_run as load_finished
from sample import newest_run, pick_checkpoint, pick_device, pick_precision
from tokenizer import (Tokenizer, check_fields, parse_options, read_json, reading, replacing,
                       run_command, write_json)

LENGTHS = ("max_steps", "epochs", "tokens", "minutes")
RATES = {"muon": 0.02, "adamw": 3e-3}  # learning rates that suit small models
SCHEDULES = {  # share of the learning rate at a progress from 0 to 1; wsd: arXiv:2404.06395
    "linear": lambda progress, decay_ratio: 1 - progress,
    "cosine": lambda progress, decay_ratio: (1 + math.cos(math.pi * progress)) / 2,
    "wsd": lambda progress, decay_ratio: min(1.0, (1 - progress) / decay_ratio),
    "constant": lambda progress, decay_ratio: 1.0,
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train: data, length, optimizer, what is shown, machine."""
    data: str = option("stdlib", "shards, or what data.py takes: stdlib, a file, folder, URL ...")
    out: str = option("", "run folder; empty: runs/ and the name of the data")
    config: str = option("", "a config.json whose options are taken; those typed come first")
    resume: bool = option(False, "continue the run in --out, or the newest one")
    vocab_size: int = option(4096, "of the tokenizer, when one is trained", low=1)
    size: str = option("mini", "nano | tiny | mini | small | base | gpt2 ...; a model's defaults")
    # length and batch
    max_steps: int = option(0, "optimizer steps; 0: no limit")
    epochs: float = option(0.0, "passes over the data; 0: no limit")
    tokens: float = option(0.0, "tokens read, such as 1e8; 0: no limit", below=1e15)
    minutes: float = option(0.0, "end after this long, data included; 0: no limit")
    batch_size: int = option(16, "sequences per step, over all devices", low=1)
    micro_batch_size: int = option(16, "sequences per forward pass; the rest accumulates", low=1)
    patience: int = option(0, "end after so many validations without a lower loss; 0: never")
    mix: str = option("", "further shards and their share of batches: shards/a=0.2,shards/b=0.1")
    curriculum: float = option(0.0, "share of the run in which sequences are cut short", below=1)
    # optimizer
    optimizer: str = option("muon", "muon | adamw")
    learning_rate: float = option(0.0, "the highest; 0: 0.02 for muon, 0.003 for adamw")
    min_lr: float = option(0.0, "the last")
    schedule: str = option("linear", "linear | cosine | wsd | constant")
    decay_ratio: float = option(0.4, "share of the run in which wsd falls", low=0.01, below=1)
    warmup_steps: int = option(5, "steps from 0 to the highest learning rate")
    weight_decay: float = option(0.1, "on matrices only; with muon on those of the blocks")
    beta1: float = option(0.9, "decay of AdamW's mean of gradients", below=1)
    beta2: float = option(0.95, "decay of AdamW's mean of squared gradients", below=1)
    grad_clip: float = option(1.0, "longest gradient; 0: no limit")
    skip_spikes: float = option(0.0, "skip steps so many deviations above the median; 0: none")
    bad_steps: int = option(10, "end after so many steps in a row with a loss not finite", low=1)
    # what is seen
    eval_every: int = option(100, "steps between validations, each with a checkpoint", low=1)
    eval_sequences: int = option(64, "sequences in the fixed validation set", low=1)
    sample_tokens: int = option(48, "tokens shown at a validation", low=1)
    keep_last: int = option(2, "how many of the last checkpoints stay, beside the best", low=1)
    # machine
    device: str = option("auto", "auto | cpu | cuda | mps")
    precision: str = option("auto", "auto | fp32 | bf16 | fp16 (weights stay float32)")
    kernels: str = option("auto", "auto, the fastest in a trial | plain | fused | torch | cuda")
    low_memory: bool = option(False, "on Linux CPUs: hand freed memory back; a little slower")
    recompute: bool = option(False, "compute activations again in backward: less memory, slower")
    cuda_graph: bool = option(False, "on one GPU: launch all work of a step at once")
    seed: int = option(1337, "of weights, batches and dropout")

    def __post_init__(self):
        check_options(self)
        check_known(self.optimizer, RATES, "optimizer")
        check_known(self.schedule, SCHEDULES, "schedule")
        if not any(getattr(self, name) for name in LENGTHS):
            self.__dict__.update(epochs=2.0, minutes=4.0)  # as a frozen class allows
        self.__dict__["learning_rate"] = self.learning_rate or RATES[self.optimizer]
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")


# -----------------------------------------------------------------------------
# Options: those typed, over those of a config.json.


def model_shape(size, vocab_size, options={}):
    """The GPTConfig of a size, with options, {name: value}, in the place of its own."""
    check_known(size, SIZES, "size")
    return GPTConfig(**SIZES[size] | options | dict(vocab_size=vocab_size))


def read_config(path):
    """-> (TrainConfig, GPTConfig, dict of the data) in a run's config.json; ValueError if wrong."""
    saved = read_json(path)
    with reading(path):
        data = dict(saved["data"], path=Path(saved["data"]["path"]))
        return (check_fields(TrainConfig, saved["train"], path),
                check_fields(GPTConfig, saved["model"], path), data)


def complete_options(typed, typed_model):
    """The options that were typed, two dicts, over those of the config.json that --config or
    --resume point to -> (TrainConfig, GPTConfig). A new --size or --architecture is a new model."""
    config = TrainConfig(**typed)
    if config.resume:
        folder = run_folder(config)
        typed = typed | dict(out=str(folder), config=str(folder / "config.json"))
    elif not config.config:
        return config, model_shape(config.size, config.vocab_size, typed_model)
    saved, shape, data = read_config(typed["config"])
    options = asdict(saved) | dict(out="", resume=False)
    if config.resume and (data["path"] / "card.json").exists():
        options["data"] = str(data["path"])  # not made again from what may have changed
    if typed.keys() & set(LENGTHS):  # a new length takes the place of all former ones
        options |= dict.fromkeys(LENGTHS, 0)
    if typed.get("optimizer", saved.optimizer) != saved.optimizer:
        options["learning_rate"] = 0.0
    config = TrainConfig(**options | typed)
    is_new = not config.resume and ("size" in typed or "architecture" in typed_model)
    before = {} if is_new else asdict(shape)
    return config, model_shape(config.size, config.vocab_size, before | typed_model)


# -----------------------------------------------------------------------------
# The machine: processes, memory, speed, the wish to stop.


def start_processes(config):
    """-> (rank, world_size, device). Under torchrun each process takes a GPU of its own, or a share
    of the CPU."""
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(config.device)
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world_size, device


def average(values, device):
    """The mean of each value over all processes, the same numbers on each."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def keep_freed_memory(low_memory=False):
    """Ask glibc to keep freed memory in the process: handing pages back and taking them again can
    cost a third of a step on a CPU. But what is kept has holes: low_memory hands tensors above a
    megabyte back, and takes them in huge pages, as torch does if told so before its first tensor.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(*((M_MMAP_THRESHOLD, 2**20) if low_memory else (M_MMAP_MAX, 0)))
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if low_memory:
            os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
            torch.empty(1)  # now torch has read it, and programs that we start do not
            del os.environ["THP_MEM_ALLOC_ENABLE"]


def peak_memory(device="cpu"):
    """The most bytes held so far, of the GPU or of this process; None where nobody counts them."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux
    found = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else None


@contextlib.contextmanager
def memory_explained(n_sequences, block_size, device):
    """Where memory runs out: a ValueError that says what was asked, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(?i)out of memory|allocate memory",
                                                             str(error)):
            raise
        raise ValueError(
            f"out of memory with {n_sequences} sequences of {block_size} tokens on {device}: take "
            "a smaller --micro_batch_size, or --recompute, or a smaller --size; python -m "
            "chapters.plan says what needs how much") from None


def matmul_rate(device, dtype, size=256):
    """FLOP/s of a large matrix product, one of 5 ms or more: what this device can do at most."""
    x = torch.ones(size, size, device=device, dtype=dtype)
    seconds = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=4))
    if seconds < 0.005 and size < 8192:
        return matmul_rate(device, dtype, 2 * size)
    return 2 * size**3 / seconds


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, SIGTERM and a terminal that closes become a request in the list that is yielded; the
    second acts at once."""
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows lacks the last
        with contextlib.suppress(ValueError, TypeError):  # only a main thread handles signals
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# The pieces of a step: rate, batches, gradients, optimizer.


def learning_rate(step, config, progress=None):
    """Linear warm-up to learning_rate, then the schedule from there to min_lr at the end.
    progress in [0, 1] is the share of the run done: step / max_steps, unless the clock is ahead."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, step / max(1, config.max_steps) if progress is None else progress)
    warm = progress * config.warmup_steps / max(1, step)  # what warm-up took, each step as long
    progress = (progress - warm) / (1 - warm) if warm < 1 else 0.0
    share = SCHEDULES[config.schedule](progress, config.decay_ratio)
    return config.min_lr + (config.learning_rate - config.min_lr) * share


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def plain_orthogonal(x, steps=5):
    """Matrices x (..., rows, columns) with all singular values brought near 1: each step sends
    every one of them through the same odd polynomial. kellerjordan.github.io/posts/muon"""
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def fast_orthogonal(x, steps=5):
    """plain_orthogonal with less work where x is wide: what becomes of x is a polynomial of the
    small square x x^T times x, so it is worked out on squares and meets x once, at the end."""
    rows, columns = x.shape[-2:]
    if rows > columns:
        return fast_orthogonal(x.mT, steps).mT
    # in bfloat16 rounded squares lose small singular values: some would end at 20 instead of 1
    if columns < 1.5 * rows or x.dtype == torch.bfloat16:
        return plain_orthogonal(x, steps)
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT                                                  # (..., rows, rows)
    total = one = torch.eye(rows, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        factor = a * one + b * gram + c * gram @ gram
        total = factor @ total
        gram = factor @ gram @ factor
    return total @ x


class Muon:
    """Muon for the groups with muon=True: the step is the momentum of a matrix's gradients, made
    orthogonal, so that all its directions move alike (arXiv:2502.16982). AdamW for the others.
    torch's own Muon takes matrices one by one; here those of one shape go together."""

    def __init__(self, groups, momentum=0.95, **options):
        self.adamw, self.momentum = torch.optim.AdamW(groups, **options), momentum
        self._step_supports_amp_scaling = False  # a GradScaler is to leave out the whole step

    def __getattr__(self, name):
        return getattr(self.adamw, name)  # param_groups, state, zero_grad ...

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update_matrices(params, group["lr"], group["weight_decay"])
        self.adamw.step()  # which passes over the matrices, as they have no gradient any more

    def update_matrices(self, params, lr, weight_decay):
        """Muon's step for matrices of one shape."""
        gradients = [p.grad for p in params]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum))  # Nesterov's
        _, dtype = pick_precision("auto", ahead.device.type)  # bfloat16 where there are units
        rows, columns = params[0].shape
        updates = fast_orthogonal(ahead.to(dtype)) * (lr * max(1, rows / columns) ** 0.5)
        for p, update in zip(params, updates):
            p.mul_(1 - lr * weight_decay).sub_(update)
            p.grad = None


def build_optimizer(model, config):
    """AdamW (arXiv:1711.05101), whose weight decay pulls matrices to zero, never gains and biases.
    Or Muon for the matrices of the blocks, and AdamW at half its rate for all else."""
    muon = config.optimizer == "muon"
    matrices = {name: p for name, p in model.named_parameters()
                if p.dim() >= 2 and ("blocks." in name or not muon)}
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    groups = [dict(params=list(matrices.values()), weight_decay=config.weight_decay, muon=muon,
                   share=1.0),
              dict(params=rest, weight_decay=0.0, muon=False, share=0.5 if muon else 1.0)]
    rate = config.learning_rate
    if config.cuda_graph:  # a graph repeats what it saw: only what is in a tensor can change
        rate = torch.tensor(rate, device=model.device)
    return (Muon if muon else torch.optim.AdamW)(
        groups, lr=rate, betas=(config.beta1, config.beta2), fused=True,
        capturable=config.cuda_graph)


def set_rate(optimizer, rate):
    """Give each group its share of the learning rate."""
    for group in optimizer.param_groups:
        own = rate * group["share"]
        group["lr"] = group["lr"].fill_(own) if torch.is_tensor(group["lr"]) else own


def parallelize(model, world_size, device):
    """The model as it is, or a copy on each process whose gradients are averaged in backward."""
    if world_size == 1:
        return model
    return DistributedDataParallel(model, [device] if device.startswith("cuda") else None)


def clip_gradients(model, grad_clip):
    """Shorten the gradient of all weights to at most grad_clip; -> its length before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)


def to_device(batch, model):
    """A batch of the loader, each (B, T), as tensors on the model's device."""
    batch = [torch.from_numpy(ids) for ids in batch]
    for ids in batch:
        check_ids(ids, model.config.vocab_size)
    return [ids.to(model.device, non_blocking=True) for ids in batch]


def cut_short(ids, progress, curriculum):
    """Rows (B, T) cut into (8 B, T / 8), later 4, then 2, during the first `curriculum` of the run:
    short sequences first, as many tokens (arXiv:2108.06084)."""
    if progress >= curriculum:
        return ids
    return ids.reshape(ids.size(0) * (8 >> int(3 * progress / curriculum)), -1)


def gradients(run, model, xs, ys, grad_clip):
    """Gradients on xs and ys, lists of batches (B, T), clipped -> (mean loss in nats, length of the
    gradient), tensors. Processes exchange gradients once, at the last batch."""
    total = 0.0
    for n, (x, y) in enumerate(zip(xs, ys), 1):
        waits = hasattr(model, "no_sync") and n < len(xs)
        with model.no_sync() if waits else contextlib.nullcontext():
            _, loss = model(x, y)
            # gradients add up over the passes of a step; we want their mean
            run.scaler.scale(loss / len(xs)).backward()
        total += loss.detach() / len(xs)
    run.scaler.unscale_(run.optimizer)
    return total, clip_gradients(run.model, grad_clip)


def update(run):
    """Let the optimizer take its step, unless fp16's gradients overflowed."""
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()


def take_step(run, model, xs, ys, grad_clip):
    """A whole step: gradients, clip, update -> (mean loss, length of the gradient)."""
    results = gradients(run, model, xs, ys, grad_clip)
    update(run)
    return results


def validation_loss(model, shards, config, rank=0, world_size=1):
    """Mean loss in nats over the first eval_sequences sequences of the validation split, which the
    processes share."""
    loader = TokenLoader(shards, 1, model.config.block_size, rank, world_size, split="val")
    n_own, total = len(range(rank, config.eval_sequences, world_size)), 0.0
    model.eval()
    with torch.inference_mode():
        for first in range(0, n_own, config.micro_batch_size):
            rows = islice(loader, min(config.micro_batch_size, n_own - first))
            x, y = to_device(map(np.concatenate, zip(*rows)), model)                 # (B, T) twice
            total += len(x) * model(x, y)[1].item()
    model.train()
    return average([total], model.device)[0] * world_size / config.eval_sequences


# -----------------------------------------------------------------------------
# The run folder: config.json, tokenizer.json, step_NNNNNN.safetensors, log.jsonl, loss.png.


@dataclass
class Progress:
    """How far a run has come. Random numbers need no place here: batches, dropout and samples
    depend on the seed and the step alone."""
    step: int = 0               # optimizer steps, skipped ones included
    sequences: int = 0          # sequences read, over all processes: where the loader stands
    elapsed: float = 0.0        # seconds trained, over all sessions
    best_step: int = 0          # the step with the lowest validation loss so far
    best_loss: float = 1e9      # that loss; before the first one above all
    val_loss: float | None = None  # measured at this very step
    skipped: int = 0            # steps skipped
    bad: int = 0                # those of them with a loss that is not finite, in a row until now
    recent: list = field(default_factory=list)      # the last [loss, length of the gradient] pairs
    loss_scale: dict = field(default_factory=dict)  # the state of fp16's GradScaler


@dataclass(kw_only=True)
class Run(Progress):
    """A run under way: all that a checkpoint holds, and the folder it is in."""
    folder: Path
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    tokenizer: Tokenizer = None     # this and below: what prepare_run adds for the loop
    shards: Path = None
    batches: TokenLoader = None


def new_run(folder, model, config, device):
    """A Run that has taken no step."""
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.precision == "fp16")
    return Run(folder=Path(folder), model=model, optimizer=build_optimizer(model, config),
               scaler=scaler, config=config)


def snapshot(run):
    """What a checkpoint of this moment holds, copied to main memory: (model, {name: tensor of the
    optimizer}, progress). Training may go on meanwhile."""
    copies = {id(p): torch.nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False)
              for p in run.model.parameters()}
    names = {p: name for name, p in run.model.named_parameters()}
    tensors = {f"optimizer.{names[p]}.{what}": tensor.to("cpu", copy=True)
               for p, state in run.optimizer.state.items() for what, tensor in state.items()}
    progress = {f.name: getattr(run, f.name) for f in fields(Progress)}
    progress["loss_scale"] = run.scaler.state_dict()
    return copy.deepcopy(run.model, copies), tensors, progress


def save_run(folder, state, keep=2):
    """Write a snapshot as step_NNNNNN.safetensors, read it back, and only if it is as it was meant
    remove older ones: all but the last `keep` and the one with the best validation."""
    model, tensors, progress = state
    path = Path(folder, f"step_{progress['step']:06d}.safetensors")
    with replacing(path) as file:
        save_model(model, file, tensors, **progress)
    try:
        read_safetensors(path)
    except ValueError as error:
        raise OSError(f"{path} is not on the disk as it was written: {error}") from None
    found = list(checkpoints(folder).values())
    best, _ = first_whole(reversed(found), by_loss=True)
    for old in set(found[:-keep]) - {best}:
        old.unlink()


def load_run(folder, config, device):
    """The Run in a folder as its newest whole checkpoint left it. ValueError if its tensors are not
    what the optimizer remembers of each weight, or nothing, as before the first update."""
    path = pick_checkpoint(folder, "last")
    model, state = load_model(path, device)
    tensors = state.pop("tensors")
    progress, run = check_fields(Progress, state, path), new_run(folder, model, config, device)
    run.__dict__.update(progress.__dict__)
    run.scaler.load_state_dict(run.scaler.state_dict() | progress.loss_scale)
    names = {p: name for name, p in model.named_parameters()}
    for group in run.optimizer.param_groups if tensors else ():
        for p in group["params"]:
            shapes = (dict(momentum=p.shape) if group["muon"] else
                      dict(exp_avg=p.shape, exp_avg_sq=p.shape, step=()))
            for what, shape in shapes.items():
                name = f"optimizer.{names[p]}.{what}"
                if name not in tensors or tensors[name].shape != shape:
                    raise ValueError(f"{path} has no {name} of shape {(*shape,)}: if another "
                                     "--optimizer trained it, leave that option out")
                run.optimizer.state[p][what] = tensors[name].to(p.device, torch.float32)
    return run


class Saver:
    """Saves beside training, which only waits until all is copied to memory. What could not be
    saved is said once, and the next save tries again: no full disk ends a run."""

    def __init__(self, folder, keep, say, worker):
        self.folder, self.keep, self.say, self.worker = folder, keep, say, worker
        self.job = self.trouble = None

    def save(self, run, last=False):
        """Save the run as it is now; not while the disk is busy with one before, but the last."""
        if last or self.job is None or self.job.done():
            self.wait()
            self.job = self.worker.submit(self.write, snapshot(run))

    def write(self, state):
        save_run(self.folder, state, self.keep)
        with contextlib.suppress(OSError):  # all that is in it is in the log
            draw_loss(self.folder)

    def wait(self):
        """Wait for what is being saved, and say if that is a change."""
        before, self.trouble = self.trouble, self.job and self.job.exception()
        if self.trouble and not before:
            self.say(f"warning: {self.folder} could not be saved ({self.trouble!r}); training goes "
                     "on, the next save tries again")
        if before and not self.trouble:
            self.say(f"{self.folder} could be saved again")

    def end(self):
        """Wait for the last save; OSError if there is none."""
        self.wait()
        if self.trouble:
            raise OSError(f"the end of the run could not be saved in {self.folder}, only what its "
                          f"last checkpoint holds is there ({self.trouble!r})")


MEASURED = ("loss", "lr", "grad_norm", "val_loss", "elapsed", "tokens_per_second")  # in a row


def read_log(folder):
    """log.jsonl as a list of dicts, one a step, each with a step and a loss, which is None where it
    was not finite. Lines that are no such row, as one that was cut off, are left out."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line, parse_constant=lambda word: None)  # NaN, for one
            numbers = [row[name] for name in MEASURED if row.get(name) is not None]
            if type(row["step"]) is int and "loss" in row and all(abs(x) < 1e99 for x in numbers):
                rows.append(row)
    return rows


def append(path, data):
    """Add bytes to the end of a file, all of them or none."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(f"{path} takes no more bytes")


class Log:
    """log.jsonl, a JSON object a line. Rows that a full disk refuses wait for the next one."""

    def __init__(self, path, say):
        self.path, self.say, self.waiting = path, say, b""

    def __call__(self, row):
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in row.items()}  # JSON has no word for the others
        before, self.waiting = self.waiting, self.waiting + json.dumps(finite).encode() + b"\n"
        try:
            append(self.path, self.waiting)
            self.waiting = b""
        except OSError as error:
            if not before:
                self.say(f"warning: {self.path} cannot be written ({error}); training goes on, the "
                         "rows wait for room")


def cut_log(folder, step):
    """Leave out of the log what came after a step, as it happens again, and what an interrupted
    save has left in the folder."""
    rows = [json.dumps(row) + "\n" for row in read_log(folder) if row["step"] <= step]
    with replacing(folder / "log.jsonl") as file:
        file.write("".join(rows).encode())
    for part in folder.glob("*.part"):
        part.unlink()


def draw_loss(folder):
    """loss.png from log.jsonl: the loss of each step, its running mean, the validation losses."""
    from matplotlib.figure import Figure  # not pyplot: a notebook that trains goes on showing plots
    rows = [row for row in read_log(folder) if row["loss"] is not None]
    if not rows:
        return
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    means = [sum(losses[max(0, n - 20):n]) / min(n, 20) for n in range(1, len(losses) + 1)]
    measured = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss")]
    what, last = ("validation", measured[-1][1]) if measured else ("training", means[-1])
    fig = Figure(figsize=(8, 4.5), dpi=120)
    ax = fig.subplots()
    ax.plot(steps, losses, color="#bbccdd", linewidth=0.8, label="training, each step")
    ax.plot(steps, means, color="#4477aa", linewidth=2, label="training, mean of 20 steps")
    if measured:
        ax.plot(*zip(*measured), color="#cc6633", marker="o", markersize=4, label="validation")
    ax.set(title=f"{Path(folder).name}: {what} loss {last:.3f} after {steps[-1]:,} steps",
           xlabel="step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with replacing(Path(folder) / "loss.png") as file:
        fig.savefig(file, format="png", bbox_inches="tight")


def run_folder(config, shards=None):
    """Where the run is or will be: --out; without it the newest run to resume, or a new folder,
    named as the shards are, with a number if that name is taken."""
    if config.resume:
        folder = Path(config.out) if config.out else newest_run()
        return folder if checkpoints(folder) else pick_checkpoint(folder)  # says what is missing
    folder, n = Path(config.out or f"runs/{shards.name}"), 2
    while not config.out and (folder / "config.json").exists():
        folder, n = Path(f"runs/{shards.name}-{n}"), n + 1
    return folder


# -----------------------------------------------------------------------------
# Before the first step: data, checks, kernels, and what the run will be, in words.


def find_shards(config, rank, say):
    """-> the folder of token shards: --data itself if it is one, else made from it by rank 0."""
    folder = Path(config.data)
    if not (folder / "card.json").exists():
        folder = Path("shards") / folder_name(config.data)
        if rank == 0:
            prepare([config.data], folder, vocab_size=config.vocab_size, say=say)
    if dist.is_initialized():
        dist.barrier()
    return folder


def mixed_shards(config, shards, tokenizer):
    """{folder: share of the batches} of --mix; ValueError for shards of another tokenizer."""
    shares = {}
    for part in filter(None, config.mix.split(",")):
        name, _, share = part.partition("=")
        if not re.fullmatch(r"0?\.\d+", share) or not Path(name, "card.json").exists():
            raise ValueError(f"mix={part} is not a folder of shards and its share, such as "
                             "shards/a=0.2: python data.py TEXT makes one")
        shares[Path(name)] = float(share)
        if Tokenizer.load(Path(name, "tokenizer.json")).hash() != tokenizer.hash():
            raise ValueError(f"{name} was made with another tokenizer than {shards}: "
                             f"python data.py TEXT --tokenizer={shards / 'tokenizer.json'}")
    return shares


def split_batch(config, world_size):
    """-> (sequences in a forward pass on one process, forward passes in a step)."""
    micro = max(1, min(config.micro_batch_size, config.batch_size // world_size))
    if config.batch_size % (micro * world_size):
        raise ValueError(f"batch_size={config.batch_size} is no multiple of {micro * world_size}: "
                         f"micro_batch_size={micro} on {world_size} process(es)")
    return micro, config.batch_size // (micro * world_size)


def last_step(config, n_tokens, tokens_per_step):
    """The step at which the run ends at the latest; infinite if only the clock ends it."""
    limits = [config.max_steps, math.ceil(config.epochs * n_tokens / tokens_per_step),
              math.ceil(config.tokens / tokens_per_step)]
    return min(filter(None, limits), default=math.inf)


def check_run(config, shape, kernels, device, world_size):
    """ValueError for what this loop cannot train, or not as a CUDA graph."""
    if shape.cross or not shape.causal or shape.n_classes:
        raise ValueError(f"architecture={shape.architecture} does not predict the next token: "
                         "take gpt2 or modern; chapters/05_transformer.ipynb trains the others")
    if config.curriculum and shape.block_size % 8:
        raise ValueError(f"block_size={shape.block_size} is no multiple of the 8 parts into which "
                         "curriculum cuts sequences")
    if config.cuda_graph and (not device.startswith("cuda") or world_size > 1 or config.skip_spikes
                              or config.precision == "fp16" or kernels not in ("torch", "cuda")):
        raise ValueError("--cuda_graph works without --skip_spikes, on one GPU in fp32 or bf16 with "
                         f"torch or cuda kernels, not on {world_size} x {device} in "
                         f"{config.precision} with {kernels} kernels: leave it out")


def check_resume(run, shape, fingerprints, say):
    """ValueError with all differences, if model, tokenizer or data are not those of the run until
    now; what else is different is said, and goes on."""
    config, (before, _, data) = run.config, read_config(run.folder / "config.json")
    wrong = [f"{name}={value} (it has {getattr(old, name)})"
             for old, new in ((run.model.config, asdict(shape or run.model.config)),
                              (before, {"vocab_size": config.vocab_size, "size": config.size}))
             for name, value in new.items() if value != getattr(old, name)]
    if Tokenizer.load(run.folder / "tokenizer.json").hash() != run.tokenizer.hash():
        wrong.append("another tokenizer")
    if [*fingerprints.values()] != [*data["fingerprints"].values()]:
        wrong.append(f"another corpus, {' and '.join(fingerprints)}")
    if wrong:
        raise ValueError(f"{run.folder} cannot go on with {'; '.join(wrong)}: start a new run, or "
                         "leave these options out")
    changed = [f"{f.name}={getattr(config, f.name)} (was {getattr(before, f.name)})"
               for f in fields(config) if f.name not in ("data", "out", "config", "resume")
               and getattr(config, f.name) != getattr(before, f.name)]
    if changed:
        say(f"goes on at step {run.step} with {', '.join(changed)}")


def choose_kernels(model, config, dtype, micro):
    """Let the model compute with --kernels, on all ranks with what was the fastest on the first
    -> (their name, and in words why)."""
    names = [model.use(config.kernels, dtype, config.recompute, batch_size=micro)]
    tried = model.trial if config.kernels == "auto" else {}
    if tried and dist.is_initialized():
        dist.broadcast_object_list(names, src=0)
        model.use(names[0], dtype, config.recompute)
    times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in tried.items())
    return names[0], f"{names[0]} kernels" + f" (tried: {times} a block)" * bool(tried)


def seconds_per_step(run, config, micro, accumulate):
    """What the log of a resumed run says; of a new one two trial steps, of which the second counts.
    At a rate of 0 they change no weight."""
    if run.step:
        rates = [row["tokens_per_second"] for row in read_log(run.folder)] or [1e4]
        return config.batch_size * run.model.config.block_size / median(rates)
    ids = torch.randint(run.model.config.vocab_size, (micro, run.model.config.block_size),
                        device=run.model.device)
    set_rate(run.optimizer, 0.0)
    for _ in range(2):
        start = time.perf_counter()
        gradients(run, run.model, [ids], [ids], config.grad_clip)[0].item()
        middle = time.perf_counter()
        update(run)
    run.optimizer.state.clear()
    return accumulate * (middle - start) + time.perf_counter() - middle


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def announce(config, model, n_tokens, n_steps, seconds, how):
    """The lines before the run: how large, how much, how long, on what; and what is odd about it.
    seconds are those of a step."""
    tokens_per_step = config.batch_size * model.config.block_size
    n_steps = min(n_steps, 60 * config.minutes / seconds if config.minutes else math.inf)
    tokens, corpus = n_steps * tokens_per_step, f"its {n_tokens / 1e6:.1f}M tokens"
    epochs = tokens / n_tokens
    yield (f"{model.n_parameters() / 1e6:.1f}M parameters, {tokens / 1e6:.1f}M tokens "
           f"({epochs:.1f} epochs) in about {n_steps:,.0f} steps of {tokens_per_step:,}: about "
           f"{clock(n_steps * seconds)} minutes on {how}")
    if epochs < 0.5:
        yield f"it will see {epochs:.0%} of {corpus}: a smaller --size or more --minutes uses them"
    if epochs > 8:
        yield (f"it will see {corpus} {epochs:.0f} times, and more than 8 times teaches little: "
               "give more text, a shorter run, or --dropout and --patience")


def prepare_run(config, model_config, say, stack):
    """Find data and model, new or resumed, and check that they fit -> Run, ready for the loop. What
    has to be let go at the end is entered in stack, an ExitStack."""
    rank, world_size, device = start_processes(config)
    micro, _ = split_batch(config, world_size)
    shape = model_config or (read_config(run_folder(config) / "config.json")[1] if config.resume
                             else model_shape(config.size, config.vocab_size))
    shards = find_shards(config, rank, say)
    tokenizer, folder = Tokenizer.load(shards / "tokenizer.json"), run_folder(config, shards)
    stack.enter_context(memory_explained(micro, shape.block_size, device))
    if config.resume and rank == 0:
        stack.enter_context(locked(folder))
    precision, dtype = pick_precision(config.precision, device)
    config, asked = replace(config, precision=precision), config.precision
    torch.manual_seed(config.seed)
    if config.resume:
        run = load_run(folder, config, device)
    elif checkpoints(folder):
        raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
    else:
        shape = replace(shape, vocab_size=tokenizer.n_vocab)
        run = new_run(folder, GPT(shape).to(device), config, device)
    kernels, how = choose_kernels(run.model, config, dtype, micro)
    check_run(config, run.model.config, kernels, device, world_size)
    run.config = replace(config, kernels=kernels)  # a resumed run computes in the same way
    run.tokenizer, run.shards = tokenizer, shards
    mixed, T = mixed_shards(config, shards, tokenizer), run.model.config.block_size
    place = dict(rank=rank, world_size=world_size, seed=config.seed,
                 position=run.sequences // (micro * world_size))
    run.batches = (MixedLoader({shards: 1 - sum(mixed.values())} | mixed, micro, T, **place)
                   if mixed else TokenLoader(shards, micro, T, **place))
    if rank == 0:
        slow = precision != "fp32" and device == "cpu" and not has_fast_bf16()
        how = f"{device}, {precision}, {how}" + ", which this CPU has no units for" * slow
        begin_folder(run, model_config, [shards, *mixed], how, say, stack)
    return run


def begin_folder(run, model_config, folders, how, say, stack):
    """Check a resumed run, say what is to come, write config.json and tokenizer.json."""
    config, T = run.config, run.model.config.block_size
    fingerprints = {str(folder): check_shards(folder).fingerprint for folder in folders}
    if config.resume:
        check_resume(run, model_config, fingerprints, say)
    else:
        stack.enter_context(locked(run.folder))
    cut_log(run.folder, run.step)
    seconds = seconds_per_step(run, config, *split_batch(config, run.batches.world_size))
    n_steps = last_step(config, run.batches.n_tokens, config.batch_size * T)
    if peak := peak_memory(str(run.model.device)):
        how += f", with {peak / 1e9:.1f} GB of memory"
    for line in announce(config, run.model, run.batches.n_tokens, n_steps, seconds, how):
        say(line)
    run.tokenizer.save(run.folder / "tokenizer.json")
    data = dict(path=str(run.shards), fingerprints=fingerprints, **asdict(read_card(run.shards)))
    write_json(run.folder / "config.json",
               dict(model=asdict(run.model.config), train=asdict(config), data=data))


# -----------------------------------------------------------------------------
# The loop, and what it asks at each step.


def is_spike(recent, values, deviations):
    """Whether one of values lies so many robust deviations above the median of those before it;
    recent holds rows of them. Medians, as a few wild values move neither of the two."""
    for value, past in zip(values, zip(*recent)):
        middle = median(past)
        spread = 1.4826 * median(abs(x - middle) for x in past)  # a normal's standard deviation
        if value > middle + deviations * max(spread, abs(middle) / 100):
            return True
    return False


def why_skip(run, loss, norm, deviations):
    """Why a step is to be skipped, in words, or "". To be asked once a step, with the same answer
    on all processes. Only finite numbers enter the statistics of spikes."""
    scale = run.scaler.get_scale() if run.scaler.is_enabled() else 0
    if math.isfinite(loss) and not math.isfinite(norm) and scale >= 1:
        return "fp16 overflow"  # the scaler halves what the loss is multiplied with
    if not math.isfinite(loss) or not math.isfinite(norm):
        run.bad += 1
        return "not finite"
    run.bad = 0
    spike = deviations and len(run.recent) >= 20 and is_spike(run.recent, (loss, norm), deviations)
    run.recent = [*run.recent, [loss, norm]][-100:]
    return "spike" if spike else ""


def give_up(run, rate, saver):
    """ValueError after too many bad steps in a row, with the run saved as it was before them."""
    bad, saved = run.bad, "no checkpoint is newer, as the weights are bad, too"
    if run.model.is_finite():
        run.bad, saved = 0, "the weights from before them are saved"
        if saver is not None:
            saver.save(run, last=True)
    raise ValueError(f"the loss or its gradient is not finite at step {run.step}, {bad} in a row; "
                     f"{saved}: go on with --resume and a --learning_rate below {rate:.1e}; python "
                     f"-m chapters.doctor {run.folder} says more")


def sample_lines(model, tokenizer, n_tokens, seed):
    """A few indented lines of what the model writes from nothing."""
    model.eval()
    text = complete(model, tokenizer, max_new_tokens=n_tokens, temperature=0.8, top_k=50, seed=seed)
    model.train()
    return "\n".join("    | " + line for line in text.strip("\n").splitlines())


def warning_signs(run, row):
    """A line if a validation shows what should not be, naming the doctor; or ""."""
    found = ["the loss is above that of guessing"] * (
        row["loss"] > math.log(run.model.config.vocab_size) + 0.1)
    found += [f"validation was better at step {run.best_step}"] * (
        row["val_loss"] > 1.03 * run.best_loss)
    return found and f"{' and '.join(found)}: python -m chapters.doctor {run.folder} looks into it"


def progress_line(row, progress):
    if "skipped" in row:
        return (f"step {row['step']:5d} | skipped: {row['skipped']}, loss {row['loss']}, norm "
                f"{row['grad_norm']}, sequences {row['sequences'][0]} to {row['sequences'][1]}")
    validation = f" | validation {row['val_loss']:.4f}" if "val_loss" in row else ""
    memory = f" | {row['memory'] / 1e9:.1f} GB" if row["memory"] else ""
    return (f"step {row['step']:5d} | loss {row['loss']:.4f}{validation} | lr {row['lr']:.1e} | "
            f"norm {row['grad_norm']:.2f}{memory} | mfu {row['mfu']:.0%} | "
            f"{row['tokens_per_second']:,} tok/s, "
            f"{clock(row['elapsed'] * (1 - progress) / progress)} left")


def train(config, model_config=None, say=tqdm.write):
    """Train as config says; the model is model_config, or that of --size, or of the checkpoint that
    is resumed. say takes the lines to show. -> a summary of the run: folder, step, loss and
    val_loss (nats per token), bits_per_byte, tokens_per_second, seconds, how, stopped (by which
    signal, or 0), skipped (steps); None on all ranks but 0."""
    began = time.perf_counter()
    keep_freed_memory(config.low_memory)
    is_main = int(os.environ.get("RANK", 0)) == 0
    say = say if is_main else lambda text: None
    with contextlib.ExitStack() as stack:
        run = prepare_run(config, model_config, say, stack)
        config, batches, device = run.config, run.batches, str(run.model.device)
        rank, world_size = batches.rank, batches.world_size
        model, (_, accumulate) = parallelize(run.model, world_size, device), split_batch(
            config, world_size)
        whole_step = config.cuda_graph and accelerator().GraphedStep(
            lambda xs, ys: take_step(run, model, xs, ys, config.grad_clip))
        tokens_per_step = config.batch_size * batches.block_size
        n_steps = last_step(config, batches.n_tokens, tokens_per_step)
        peak_rate = matmul_rate(run.model.device, run.model.dtype) * world_size
        before = run.elapsed  # the minutes of this session, preparations included, come on top

        def share_done():
            run.elapsed = before + time.perf_counter() - began
            by_clock = run.elapsed / (60 * config.minutes) if config.minutes else 0.0
            return min(1.0, max(run.step / n_steps, by_clock))

        progress, stopping, said = share_done(), False, 0.0
        if progress == 1:
            say("this run is finished: a larger --max_steps, --epochs or --minutes trains on")
        bar = stack.enter_context(tqdm(
            total=1.0, initial=progress, disable=not (is_main and sys.stderr.isatty()), leave=False,
            bar_format="{percentage:3.0f}% {bar:20} {desc}"))
        asked = stack.enter_context(stop_signals())
        worker = stack.enter_context(ThreadPoolExecutor(1))
        saver = Saver(run.folder, config.keep_last, say, worker) if is_main else None
        log = Log(run.folder / "log.jsonl", say) if is_main else lambda row: None
        while progress < 1 and not stopping:
            start = time.perf_counter()
            torch.manual_seed(1_000_003 * run.step + config.seed + rank)  # dropout: of this step
            rate = learning_rate(run.step, config, progress)
            set_rate(run.optimizer, rate)
            xs, ys = [], []
            for _ in range(accumulate):
                x, y = to_device(next(batches), run.model)                           # (B, T) twice
                xs.append(cut_short(x, progress, config.curriculum))
                ys.append(cut_short(y, progress, config.curriculum))
            loss, norm = (whole_step(xs, ys) if whole_step else
                          gradients(run, model, xs, ys, config.grad_clip))
            run.step, run.sequences = run.step + 1, run.sequences + config.batch_size
            loss, norm, progress, stopping = average(
                [loss.item(), norm.item(), share_done(), len(asked)], device)
            row = dict(step=run.step, loss=loss, lr=rate, grad_norm=norm)
            if why := why_skip(run, loss, norm, config.skip_spikes):
                run.scaler.update()
                run.optimizer.zero_grad()
                run.skipped += 1
                row |= dict(skipped=why, sequences=[run.sequences - config.batch_size,
                                                    run.sequences - 1])
            elif not whole_step:  # which includes it
                update(run)
            speed = tokens_per_step / (time.perf_counter() - start)
            mfu = speed * run.model.flops_per_token() / peak_rate
            share_done()
            row |= dict(tokens_per_second=round(speed), mfu=round(mfu, 3),
                        memory=peak_memory(device), elapsed=round(run.elapsed, 3))

            is_check, run.val_loss = run.step % config.eval_every == 0 or progress == 1, None
            if is_check:
                val_loss = validation_loss(run.model, run.shards, config, rank, world_size)
                row["val_loss"] = val_loss
                run.val_loss = val_loss if math.isfinite(val_loss) else None
                if val_loss < run.best_loss:
                    run.best_loss, run.best_step = val_loss, run.step
                if 0 < config.patience <= (run.step - run.best_step) / config.eval_every:
                    say(f"no lower validation loss since step {run.best_step}: --patience ends it")
                    progress = 1.0
            log(row)
            if run.bad and (run.bad >= config.bad_steps or whole_step):
                give_up(run, rate, saver)
            if not is_main:
                continue
            line = progress_line(row, progress)
            bar.set_description_str(line, refresh=False)
            bar.update(progress - bar.n)
            if is_check or stopping or why or (bar.disable and time.perf_counter() - said > 10):
                say(line)
                said = time.perf_counter()
            if (is_check or stopping) and run.model.is_finite():
                saver.save(run, last=stopping or progress == 1)
                if is_check and progress < 1 and not why:
                    say(warning_signs(run, row) or sample_lines(
                        run.model, run.tokenizer, config.sample_tokens, config.seed))
        if is_main:
            saver.end()
    stopped = stopping and int(asked[0] if asked else signal.SIGTERM)
    return summarize(run, time.perf_counter() - began, stopped) if is_main else None


def summarize(run, seconds, stopped):
    """What train() returns: where the run is, how far it came, how good and how fast it was."""
    rows = [row for row in read_log(run.folder) if row["loss"] is not None]
    val, val_loss = read_card(run.shards).val, rows[-1].get("val_loss")
    bits = val_loss and val_loss / math.log(2) * val["tokens"] / val["bytes"]
    speed = round(median(row["tokens_per_second"] for row in rows))
    how = f"{run.model.device}, {run.config.precision}, {run.config.kernels} kernels"
    return dict(folder=str(run.folder), step=run.step, loss=rows[-1]["loss"], val_loss=val_loss,
                bits_per_byte=bits, tokens_per_second=speed, seconds=seconds, how=how,
                stopped=stopped, skipped=run.skipped)


def report(summary):
    """The last lines of the command: a longer sample, the figures, and what to type next."""
    folder = summary["folder"]
    if summary["stopped"]:
        return print(f"stopped at step {summary['step']}, saved at "
                     f"{max(checkpoints(folder), default=0)}; to go on: python train.py --resume "
                     f"--out={folder}")
    model, tokenizer = load_finished(folder)
    print(sample_lines(model, tokenizer, 200, seed=1))
    print(f"{summary['step']:,} steps in {clock(summary['seconds'])} minutes on {summary['how']}, "
          f"{summary['tokens_per_second']:,} tokens/s: validation loss {summary['val_loss']:.4f}, "
          f"{summary['bits_per_byte']:.3f} bits per byte")
    print(f"{folder} holds the model, its log and its picture {folder}/loss.png")
    print(f'next: python sample.py {folder} --prompt="def "')


def main():
    summary = train(*complete_options(*parse_options(__doc__, TrainConfig, GPTConfig)))
    if summary:
        report(summary)
    if dist.is_initialized():
        dist.barrier()  # all leave together: who goes first takes the others' connections along
        dist.destroy_process_group()
    if summary and summary["stopped"]:
        sys.exit(128 + summary["stopped"])


if __name__ == "__main__":
    run_command(main)
