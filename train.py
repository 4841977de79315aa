"""
Train a model: text or token shards in, a run folder with checkpoints out.

    python train.py                                       # Python's own library, a few minutes
    python train.py --data=mybook.txt --size=small --minutes=60
    python train.py --data=mybook.txt --find_lr           # a sweep and a picture, no run
    python train.py --resume                              # continue the newest run
    torchrun --nproc_per_node=2 train.py --max_steps=500  # the same losses, on two processes

With none of --max_steps, --epochs and --minutes a run ends after 2 epochs or 4 minutes, whichever
comes first. When a run is resumed, all options can be changed but those of its model and its data.

Ctrl-C or SIGTERM: it saves and ends, with exit code 130 or 143; the second Ctrl-C ends it at once.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import importlib.util
import inspect
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from tqdm import tqdm

from data import (MixedLoader, TokenLoader, check_shards, file_hash, folder_name, locked, prepare,
                  read_card)
from tokenizer import (Parser, Tokenizer, read_sealed, replacing, run_command, seal, share_cores,
                       write_json)

if __name__ == "__main__":
    share_cores()
if not {"-h", "--help"} & set(sys.argv):  # torch takes two seconds to import; help need not wait
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from model import (GPT, SIZES, GPTConfig, check_ids, check_known, first_line, free_memory,
                       load_model, pack, training_memory)
    from sample import (MANIFEST, checkpoints, complete, first_whole, has_fast_bf16, newest_run,
                        pick_checkpoint, pick_device, pick_precision, read_manifest, warn)
    from sample import load_run as load_finished


LENGTHS = ("max_steps", "epochs", "tokens", "minutes")
RATES = {"muon": 0.02, "adamw": 3e-3}  # learning rates that suit small models
SCHEDULES = {  # share of the learning rate at a progress from 0 to 1; wsd: arXiv:2404.06395
    "linear": lambda progress, decay_ratio: 1 - progress,
    "cosine": lambda progress, decay_ratio: (1 + math.cos(math.pi * progress)) / 2,
    "wsd": lambda progress, decay_ratio: min(1.0, (1 - progress) / decay_ratio),
    "constant": lambda progress, decay_ratio: 1.0,
}


@dataclass
class TrainConfig:
    """A training run; each field is an option of the command, the comment behind it its help."""
    # data and output
    data: str = "stdlib"            # shards, or what data.py takes: stdlib, a file, folder, URL ...
    out: str = ""                   # run folder; empty: runs/ and the name of the data
    config: str = ""                # a config.json whose options are taken; those typed come first
    resume: bool = False            # continue the run in --out, or the newest one
    vocab_size: int = 4096          # of the tokenizer, when one is trained
    # model
    architecture: str = "modern"    # gpt2 | modern
    size: str = "mini"              # nano | tiny | mini | small | base | gpt2 | gpt2-medium ...
    block_size: int = 0             # longest sequence in tokens; here and below 0: the size's
    n_layer: int = 0                # blocks
    n_head: int = 0                 # query heads
    n_kv_head: int = 0              # key/value heads
    n_embd: int = 0                 # channels
    position: str = ""              # learned | sinusoidal | rope | none; empty: the architecture's
    norm: str = ""                  # layernorm | rmsnorm
    activation: str = ""            # gelu | relu | relu2 | swiglu
    window: int = 0                 # a token sees this many, itself the last; 0: all
    softcap: float = 0.0            # logits stay between -softcap and softcap; 0: free
    dropout: float = 0.0            # share of activations dropped while training
    label_smoothing: float = 0.0    # share of each target that goes to all tokens alike
    z_loss: float = 0.0             # weight of log(sum(exp(logits)))^2 in the loss
    # length and batch
    max_steps: int = 0              # optimizer steps; 0: no limit
    epochs: float = 0.0             # passes over the data; 0: no limit
    tokens: float = 0.0             # tokens read, such as 1e8; 0: no limit
    minutes: float = 0.0            # end after this long, data included; 0: no limit
    batch_size: int = 16            # sequences per step, over all devices
    micro_batch_size: int = 16      # sequences per forward pass on a device; the rest accumulates
    patience: int = 0               # end after so many validations without a lower loss; 0: never
    mix: str = ""                   # further shards and their share of batches: shards/a=0.2,b=0.1
    curriculum: float = 0.0         # share of the run in which sequences are cut into short ones
    # optimizer
    optimizer: str = "muon"         # muon | adamw
    learning_rate: float = 0.0      # the highest, after warm-up; 0: 0.02 for muon, 0.003 for adamw
    min_lr: float = 0.0             # the last
    schedule: str = "linear"        # linear | cosine | wsd | constant
    decay_ratio: float = 0.4        # share of the run, its end, in which wsd falls
    warmup_steps: int = 5           # steps from 0 to the highest
    weight_decay: float = 0.1       # on matrices only; with muon on those of the blocks
    beta1: float = 0.9              # AdamW's memory of gradients
    beta2: float = 0.95             # AdamW's memory of their squares
    grad_clip: float = 1.0          # longest gradient; 0: no limit
    skip_spikes: float = 0.0        # leave out steps so many deviations above the median; 0: none
    bad_steps: int = 10             # end after so many in a row with a loss that is no number
    find_lr: bool = False           # try ever higher rates, draw the losses, suggest one, and end
    # what is seen
    eval_every: int = 100           # steps between validations, each with a sample and a checkpoint
    eval_sequences: int = 64        # sequences in the fixed validation set
    sample_tokens: int = 48         # tokens shown at a validation
    keep_last: int = 2              # how many of the last checkpoints stay, beside the best
    tensorboard: bool = False       # log to TensorBoard, too, in the run folder
    wandb: bool = False             # log to Weights & Biases, too
    # machine
    device: str = "auto"            # auto | cpu | cuda | mps
    precision: str = "auto"         # auto | fp32 | bf16 | fp16 (weights stay float32)
    kernels: str = "auto"           # auto | plain | fused | torch | cuda
    low_memory: bool = False        # on Linux CPUs: hand freed memory back; less of it, some slower
    recompute: bool = False         # make activations again in backward: less memory, more work
    cuda_graph: bool = False        # on one GPU: launch all work of a step at once
    seed: int = 1337                # of weights, batches and dropout

    def __post_init__(self):
        if not any(getattr(self, name) for name in LENGTHS):
            self.epochs, self.minutes = 2, 4
        for name in ("batch_size", "micro_batch_size", "eval_every", "eval_sequences",
                     "keep_last", "bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (*LENGTHS, "learning_rate", "min_lr", "warmup_steps", "grad_clip", "patience",
                     "skip_spikes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, and finite")
        check_known(self.optimizer, RATES, "optimizer")
        check_known(self.schedule, SCHEDULES, "schedule")
        if not 0 < self.decay_ratio <= 1:
            raise ValueError(f"decay_ratio={self.decay_ratio} must be above 0 and at most 1")
        if not 0 <= self.curriculum <= 1:
            raise ValueError(f"curriculum={self.curriculum} must be from 0 to 1")
        self.learning_rate = self.learning_rate or RATES[self.optimizer]
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")


# -----------------------------------------------------------------------------
# Options: the dataclass above is the command line.


def parse_options(config_class):
    """The options that were typed, as a dict. Help and groups are the comments in the dataclass."""
    parser, defaults = Parser(__doc__), {f.name: f for f in dataclasses.fields(config_class)}
    group = parser
    for line in inspect.getsource(config_class).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif option := re.match(r"    (\w+): .*  # (.+)", line):
            f = defaults[option[1]]
            shown = f" (default {f.default})" if f.default != "" else ""
            kind = dict(type=f.type, metavar=f.type.__name__.upper())
            if f.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS,
                               help=option[2].replace("%", "%%") + shown, **kind)
    return vars(parser.parse_args())


def is_number(value):
    """Whether a value that was read from a file can be computed with."""
    return type(value) in (int, float) and abs(value) < 1e100


def check_options(options, path=""):
    """ValueError if a dict of options, or the path of shards, holds values of the wrong kind."""
    kinds = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    for name, value in [*options.items(), ("data", path)]:
        kind = kinds.get(name, object)  # an option of another version is refused later
        if (not isinstance(value, (int, float) if kind is float else kind)
                or kind in (int, float) and not is_number(value)):
            raise ValueError(f"{name}={value!r:.40} is no {kind.__name__}")


def read_config(path):
    """The dict in the config.json of a run: model, train, data. ValueError if it is damaged."""
    try:
        saved = read_sealed(path)
        if ({*saved} != {"model", "train", "data"} or {*map(type, saved.values())} != {dict}
                or not saved["train"].keys() >= {*LENGTHS}):
            raise ValueError("it has other keys")
        check_options(saved["train"], saved["data"].get("path", ""))
        return saved
    except ValueError as error:
        raise ValueError(f"{path} is not the config.json of a run: {error}") from None


def complete_options(given):
    """The options typed, over those of the config.json that --config or --resume point to."""
    config = TrainConfig(**given)
    if config.resume:
        folder = run_folder(config)
        given = given | {"out": str(folder)}
        config.config = str(folder / "config.json")
    if not config.config:
        return config
    saved = read_config(config.config)
    options, data = saved["train"] | dict(out="", config="", resume=False), saved["data"]
    if config.resume and Path(data.get("path", ""), "card.json").exists():
        options["data"] = data["path"]  # the shards themselves, not made again from what may change
    if given.keys() & set(LENGTHS):  # a new length takes the place of all former ones
        options |= dict.fromkeys(LENGTHS, 0)
    if given.get("optimizer", options["optimizer"]) != options["optimizer"]:
        if config.resume:
            raise ValueError(f"{given['out']} was trained with {options['optimizer']}, whose "
                             "memory another optimizer cannot use: leave --optimizer out")
        options["learning_rate"] = 0.0
    try:
        return TrainConfig(**options | given)
    except TypeError as error:
        raise ValueError(f"{config.config} has options of another version: {error}") from None


def shape_of(config, vocab_size):
    """The model that the options ask for: a row of SIZES, with what was given in its place."""
    check_known(config.size, SIZES, "size")
    names = {f.name for f in dataclasses.fields(config)} & {f.name for f in
                                                            dataclasses.fields(GPTConfig)}
    given = {name: getattr(config, name) for name in names - {"vocab_size"}
             if getattr(config, name)}
    shape = GPTConfig(vocab_size=vocab_size, **SIZES[config.size] | given)
    if shape.cross or not shape.causal:
        raise ValueError(f"architecture={config.architecture} does not predict the next token: "
                         "take gpt2 or modern; chapters/05_transformer.ipynb trains the others")
    return shape


# -----------------------------------------------------------------------------
# The machine: processes, memory, the wish to stop.


def start_processes(config):
    """-> (rank, world_size, device). Under torchrun each process takes a GPU of its own, or a
    share of the CPU."""
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
    megabyte back, and takes them in huge pages, which torch asks for if told so before its first
    tensor. Other systems' allocators are left as they are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(*((M_MMAP_THRESHOLD, 2**20) if low_memory else (M_MMAP_MAX, 0)))
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if low_memory:
            os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
            torch.empty(1)  # now torch has read it, and programs that we start do not
            del os.environ["THP_MEM_ALLOC_ENABLE"]


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, SIGTERM and a terminal that closes become a request in the list that is yielded; the
    second acts at once."""
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks the last
            with contextlib.suppress(ValueError, TypeError):  # only a main thread handles signals
                before[number] = signal.getsignal(number)
                if before[number] != signal.SIG_IGN:  # as nohup asks
                    signal.signal(number, note)
        yield asked
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)


# -----------------------------------------------------------------------------
# The pieces of a step.


def learning_rate(step, config, progress=None):
    """Linear warm-up, then the schedule from learning_rate to min_lr over the run.
    progress in [0, 1] is the share of it done: step / max_steps, unless the clock is ahead."""
    progress = step / max(1, config.max_steps) if progress is None else progress
    share = SCHEDULES[config.schedule](min(1.0, progress), config.decay_ratio)
    rate = config.min_lr + (config.learning_rate - config.min_lr) * share
    return rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


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
    if columns < 1.5 * rows:
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
    torch's own Muon takes matrices one by one, in bfloat16; here those of one shape go together."""

    def __init__(self, groups, momentum=0.95, **options):
        self.adamw, self.momentum = torch.optim.AdamW(groups, **options), momentum
        self._step_supports_amp_scaling = False  # a GradScaler is to leave out the whole step

    def __getattr__(self, name):
        return getattr(self.adamw, name)  # param_groups, zero_grad, state_dict ...

    def step(self):
        with torch.no_grad():
            self.turn_matrices()
        self.adamw.step()

    def turn_matrices(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for alike in shapes.values():
                self.turn(alike, group["lr"], group["weight_decay"])

    def turn(self, params, lr, weight_decay):
        """The step of matrices of one shape; AdamW passes over them, as no gradient is left."""
        for p in params:
            if not self.state[p]:  # AdamW looks for a step in each state that it loads
                self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))
        gradients = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum))  # Nesterov's
        rows, columns = params[0].shape
        updates = fast_orthogonal(ahead) * (lr * max(1, rows / columns) ** 0.5)
        for p, update in zip(params, updates):
            p.mul_(1 - lr * weight_decay).sub_(update)
            p.grad = None


def build_optimizer(model, config):
    """AdamW (arXiv:1711.05101), whose weight decay pulls matrices to zero, never gains and biases.
    Or Muon for the matrices of the blocks, and AdamW at half its rate for all else."""
    muon = config.optimizer == "muon"
    chosen = {name: p for name, p in model.named_parameters()
              if p.dim() >= 2 and ("blocks." in name or not muon)}
    rest = [p for name, p in model.named_parameters() if name not in chosen]
    groups = [dict(params=list(chosen.values()), weight_decay=config.weight_decay, muon=muon,
                   share=1.0),
              dict(params=rest, weight_decay=0.0, muon=False, share=0.5 if muon else 1.0)]
    rate = config.learning_rate
    if config.cuda_graph:  # a graph repeats what it saw: only what is in a tensor can change
        rate = torch.tensor(rate, device=model.device)
    return (Muon if muon else torch.optim.AdamW)(
        groups, lr=rate, betas=(config.beta1, config.beta2), fused=True,
        capturable=config.cuda_graph)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        own = rate * group["share"]
        group["lr"] = group["lr"].fill_(own) if torch.is_tensor(group["lr"]) else own


def parallelize(model, world_size, device):
    """The model as it is, or a copy on each process whose gradients are averaged in backward."""
    if world_size == 1:
        return model
    own_gpu = [device] if device.startswith("cuda") else None
    return DistributedDataParallel(model, device_ids=own_gpu)


def clip_gradients(model, grad_clip):
    """Shorten the gradient of all weights to at most grad_clip; -> its length before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)


def to_device(batch, model):
    """A batch of the loader, each (B, T), as tensors on the model's device."""
    batch = [torch.from_numpy(ids) for ids in batch]
    for ids in batch:
        check_ids(ids, model.config.vocab_size)
    return [ids.to(model.device, non_blocking=True) for ids in batch]


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


class GraphedStep:
    """take_step, recorded once as a CUDA graph and then replayed on new batches: the GPU gets all
    kernels of a step at once and never waits for Python. The first calls run as they are, so that
    all is compiled, chosen and allocated when recording begins."""

    def __init__(self, run, model, grad_clip, warm_up=3):
        self.step = lambda xs, ys: take_step(run, model, xs, ys, grad_clip)
        self.graph, self.warm_up, self.stream = None, warm_up, torch.cuda.Stream()

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


def validation_loss(model, shards, config, rank, world_size):
    """Mean loss in nats over eval_sequences sequences of the validation split, always the same."""
    rows = max(1, min(config.micro_batch_size, config.eval_sequences // world_size))
    batches = TokenLoader(shards, rows, model.config.block_size, rank, world_size, split="val")
    n = math.ceil(config.eval_sequences / (rows * world_size))
    model.eval()
    with torch.inference_mode():
        losses = [model(*to_device(next(batches), model))[1].item() for _ in range(n)]
    model.train()
    return average([sum(losses) / n], model.device)[0]


def validate(run, config, shards, rank, world_size):
    """The validation loss of this step, remembered in the run, as is the best so far."""
    loss = validation_loss(run.model, shards, config, rank, world_size)
    run.val_loss = loss if math.isfinite(loss) else None
    if loss < run.best_loss:
        run.best_loss, run.best_step = loss, run.step
    return loss


def seconds_per_step(run, config, micro, accumulate):
    """What the log of the run says, or if there is none a short probe: two steps of which the
    second counts; at a rate of 0 they change no weight, and only a new optimizer takes part."""
    rates = [row["tokens_per_second"] for row in read_log(run.folder)]
    tokens = config.batch_size * run.model.config.block_size
    if rates:
        return tokens / median(rates)
    ids = torch.randint(run.model.config.vocab_size, (micro, run.model.config.block_size),
                        device=run.model.device)
    set_rate(run.optimizer, 0.0)
    for _ in range(2):
        start = time.perf_counter()
        gradients(run, run.model, [ids], [ids], config.grad_clip)[0].item()
        middle = time.perf_counter()
        if run.step == 0:
            update(run)
    if run.step == 0:
        run.optimizer.state.clear()
    run.optimizer.zero_grad()
    return accumulate * (middle - start) + time.perf_counter() - middle


def matmul_rate(device, dtype, size=256):
    """FLOP/s of a large matrix product, one of 5 ms or more: what this device can do at most."""
    x, seconds = torch.ones(size, size, device=device, dtype=dtype), []
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    if min(seconds) < 0.005 and size < 8192:
        return matmul_rate(device, dtype, 2 * size)
    return 2 * size**3 / min(seconds)


def peak_memory(device="cpu"):
    """The most bytes held so far, of the GPU or of this process; None where nobody counts them."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux, whose getrusage begins with what the parent held
    if found := status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
        return 1024 * int(found[1])
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def first_bad(model, xs, ys):
    """Where numbers stop being finite on these batches: the name of the first module whose output
    is not, or else of the parameter nearest to the loss whose gradient is not."""
    found = []

    def look(name):
        def hook(module, inputs, output):
            tensors = [y for y in (output if isinstance(output, tuple) else [output])
                       if torch.is_tensor(y)]
            if not all(y.isfinite().all() for y in tensors):
                found.append(name)
        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    model.zero_grad()
    for x, y in zip(xs, ys):
        model(x, y)[1].backward()
    for hook in hooks:
        hook.remove()
    grads = [name for name, p in reversed(list(model.named_parameters()))
             if p.grad is not None and not p.grad.isfinite().all()]
    return next(iter([*found, *grads]), "the loss") or "the loss"


# -----------------------------------------------------------------------------
# The run folder: config.json, tokenizer.json, step_NNNNNN.pt, log.jsonl, loss.png.


def read_log(folder):
    """log.jsonl as a list of dicts, one a step, each with a step and a loss, which is None where it
    was no number. Lines that are no such row, as one that was cut off, are left out."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line, parse_constant=lambda word: None)  # NaN, for one
            if (isinstance(row, dict) and type(row.get("step")) is int and "loss" in row
                    and all(row.get(name) is None or is_number(row[name]) for name in MEASURED)):
                rows.append(row)
    return rows


def log_until(folder, step):
    """The log up to a step, as bytes."""
    rows = [row for row in read_log(folder) if row["step"] <= step]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def run_folder(config, shards=None):
    """Where the run is or will be: --out; without it the newest run to resume, or a new folder,
    named as the shards are, with a number if that name is taken."""
    if config.resume:
        folder = Path(config.out) if config.out else newest_run()
        return folder if checkpoints(folder) else pick_checkpoint(folder)  # says what is missing
    if config.out:
        return Path(config.out)
    first, n = Path("runs") / shards.name, 2
    folder = first
    while (folder / "config.json").exists():
        folder, n = first.with_name(f"{first.name}-{n}"), n + 1
    return folder


@dataclass
class Run:
    """A run under way: all that a checkpoint holds, and the folder it is in. Random numbers need no
    place here: batches, dropout and samples depend on the seed and the step alone."""
    folder: Path
    model: "GPT"
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler"
    step: int = 0               # optimizer steps, those left out included
    sequences: int = 0          # sequences read, over all processes: where the loader stands
    elapsed: float = 0.0        # seconds trained, over all sessions
    best_step: int = 0          # the step with the lowest validation loss so far
    best_loss: float = math.inf
    val_loss: float | None = None  # measured at this very step
    skipped: int = 0            # steps left out
    bad: int = 0                # those of them with a number gone bad, in a row until now
    recent: list = field(default_factory=list)  # the last [loss, length of the gradient] pairs


MEASURED = ("loss", "lr", "grad_norm", "val_loss", "elapsed", "tokens_per_second")  # in a log
PROGRESS = {"step": int, "sequences": int, "elapsed": float, "best_step": int, "best_loss": float,
            "val_loss": (float, type(None)), "skipped": int, "bad": int, "recent": list}


def copy_to_memory(value):
    """Tensors in dicts and lists, and what else is there, in main memory and for oneself."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_memory(part) for key, part in value.items()}
    return [copy_to_memory(part) for part in value] if isinstance(value, (list, tuple)) else value


def snapshot(run):
    """The dict that a checkpoint of this moment holds; training may go on meanwhile."""
    progress = {name: getattr(run, name) for name in PROGRESS}
    return copy_to_memory(pack(run.model, **progress, optimizer=run.optimizer.state_dict(),
                               scaler=run.scaler.state_dict()))


class Hashing:
    """A file to write to that knows the sha256 of all that went through it."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save_run(folder, state, keep=2):
    """Write a snapshot as step_NNNNNN.pt, read it back, and only if it is as it was meant write its
    manifest and remove older ones: all but the last `keep` and the one with the best validation."""
    path = Path(folder, f"step_{state['step']:06d}.pt")
    with replacing(path) as file:
        hashing = Hashing(file)
        torch.save(state, hashing)
    digest = hashing.sha256.hexdigest()
    if file_hash(path) != digest:
        raise OSError(f"{path} is not on the disk as it was written")
    log = hashlib.sha256(log_until(folder, state["step"])).hexdigest()
    write_json(path.with_suffix(".json"), seal(dict(
        format=MANIFEST, step=state["step"], val_loss=state["val_loss"], digest=digest, log=log)))
    found = checkpoints(folder)
    best, _ = first_whole(reversed(found.values()), by_loss=True)
    for old in list(found.values())[:-keep]:
        if old != best:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)


class Saver:
    """Saves behind the back of training, which only waits until all is copied to memory. What could
    not be saved is said once, and the next save tries again: no full disk ends a run."""

    def __init__(self, folder, keep, say):
        self.folder, self.keep, self.say, self.trouble = folder, keep, say, None
        self.papers = {path: path.read_bytes() for path in
                       (folder / "config.json", folder / "tokenizer.json")}
        self.waiting = queue.Queue(1)
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def save(self, run):
        try:
            state = snapshot(run)
        except (RuntimeError, MemoryError) as error:  # no room for the copy
            return self.note(error)
        with contextlib.suppress(queue.Empty):  # a slow disk: one that still waits gives way
            self.waiting.get_nowait()
        self.waiting.put(state)

    def work(self):
        drawn = -math.inf
        for state in iter(self.waiting.get, None):
            try:
                for path, content in self.papers.items():
                    if not path.exists():  # the folder was moved or removed under our feet
                        with replacing(path) as file:
                            file.write(content)
                save_run(self.folder, state, self.keep)
                self.note(None)
            except Exception as error:  # whatever it is, training must not wait for this thread
                self.note(error)
            state = None  # a checkpoint's worth of memory
            if time.perf_counter() - drawn > 10:  # a picture costs more than a small checkpoint
                self.draw()
                drawn = time.perf_counter()

    def draw(self):
        with contextlib.suppress(OSError):  # all that is in it is in the log
            draw_loss(self.folder)

    def note(self, trouble):
        if trouble and not self.trouble:
            self.say(f"warning: {self.folder} could not be saved ({first_line(trouble)}); training "
                     "goes on, the next save tries again")
        if self.trouble and not trouble:
            self.say(f"{self.folder} could be saved again")
        self.trouble = trouble

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Wait for what is being saved; OSError if the last of it could not be."""
        if kind is KeyboardInterrupt:  # in a hurry; what is half written has no name yet
            return
        self.waiting.put(None)
        self.thread.join()
        self.draw()
        if self.trouble and kind is None:
            raise OSError(f"the end of the run could not be saved in {self.folder}, only what its "
                          f"last checkpoint holds is there ({first_line(self.trouble)})")


def load_run(folder, config, device):
    """The Run in a folder as its newest whole checkpoint left it."""
    path = pick_checkpoint(folder, "last")
    model, state = load_model(path, device)
    run = new_run(folder, model, config, device)
    try:
        for name, kind in PROGRESS.items():
            value = state[name]
            if not isinstance(value, kind) or isinstance(value, (int, float)) and not value >= 0:
                raise TypeError(f"{name} is {value!r:.40}")
            setattr(run, name, value)
        if not all(len(pair) == 2 and all(map(is_number, pair)) for pair in run.recent):
            raise TypeError("recent is not made of pairs of numbers")
        check_memory(run.optimizer, state["optimizer"])
        groups = run.optimizer.state_dict()["param_groups"]  # rates and the like are config's
        run.optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
        if not all(is_number(value) and value >= 0 for value in state["scaler"].values()):
            raise TypeError(f"the scaler holds {state['scaler']!r:.60}")
        run.scaler.load_state_dict(run.scaler.state_dict() | state["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path} is no checkpoint of a run: {error!r:.99}") from None
    return run


def check_memory(optimizer, saved):
    """TypeError unless a saved dict holds what this optimizer remembers of each weight: tensors of
    the weight's shape, and how often it was updated; or nothing of any, before the first update."""
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
        raise TypeError("the optimizer's weights are others")
    weights = {i: (p, group["muon"]) for group, ids in zip(optimizer.param_groups, own)
               for i, p in zip(ids["params"], group["params"])}
    if saved["state"] and saved["state"].keys() != weights.keys():
        raise TypeError("the optimizer does not know all weights")
    for i, state in saved["state"].items():
        p, muon = weights[i]
        shapes = dict(step=(), momentum=p.shape) if muon else dict(step=(), exp_avg=p.shape,
                                                                   exp_avg_sq=p.shape)
        if {name: value.shape for name, value in state.items()} != shapes:
            raise TypeError(f"what the optimizer remembers does not fit a weight {(*p.shape,)}")


def cut_log(run):
    """Leave out of the log what came after the checkpoint, as it happens again, and what an
    interrupted save has left in the folder."""
    path, rows = run.folder / "log.jsonl", log_until(run.folder, run.step)
    known = run.step and read_manifest(run.folder / f"step_{run.step:06d}.pt").get("log")
    if known and hashlib.sha256(rows).hexdigest() != known:
        warn(f"{path} is damaged or was edited: up to step {run.step} it is not what it was when "
             "that step was saved; the run itself goes on unharmed")
    with replacing(path) as file:
        file.write(rows)
    for part in run.folder.glob("*.part"):
        part.unlink()


def new_run(folder, model, config, device):
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.precision == "fp16")
    return Run(Path(folder), model, build_optimizer(model, config), scaler)


def draw_loss(folder):
    """loss.png from log.jsonl: the loss of each step, its running mean, the validation losses."""
    from matplotlib.figure import Figure  # not pyplot: a notebook that trains goes on showing plots
    rows = [row for row in read_log(folder) if row["loss"] is not None]
    if not rows:
        return
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    measured = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss")]
    smooth, mean = [], losses[0]
    for n, loss in enumerate(losses):
        mean += (loss - mean) / min(n + 1, 20)
        smooth.append(mean)
    fig = Figure(figsize=(8, 4.5), dpi=120)
    ax = fig.subplots()
    ax.plot(steps, losses, color="#bbccdd", linewidth=0.8, label="training, each step")
    ax.plot(steps, smooth, color="#4477aa", linewidth=2, label="training, running mean")
    title = f"training loss {smooth[-1]:.3f}"
    if measured:
        ax.plot(*zip(*measured), color="#cc6633", marker="o", markersize=4, label="validation")
        title = f"validation loss {measured[-1][1]:.3f}"
    ax.set(title=f"{Path(folder).name}: {title} after {steps[-1]:,} steps", xlabel="step",
           ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with replacing(Path(folder) / "loss.png") as file:
        fig.savefig(file, format="png", bbox_inches="tight")


def draw_rates(folder, rates, losses, best):
    """find_lr.png: the loss against the rate, and the rate that is suggested."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(8, 4.5), dpi=120)
    ax = fig.subplots()
    ax.semilogx(rates, losses, color="#4477aa", linewidth=2)
    ax.axvline(best, color="#cc6633", label=f"suggested: {best:.1g}")
    ax.set(title="Loss while the learning rate grows", xlabel="learning rate",
           ylabel="loss, running mean (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with replacing(Path(folder) / "find_lr.png") as file:
        fig.savefig(file, format="png", bbox_inches="tight")


# -----------------------------------------------------------------------------
# The run.


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


def open_batches(config, shards, tokenizer, micro, T, rank, world_size, position):
    """The loader of the run; with --mix of several shards, which have to share the tokenizer."""
    options = micro, T, rank, world_size, config.seed, position
    if not config.mix:
        return TokenLoader(shards, *options)
    shares = {}
    for part in config.mix.split(","):
        name, _, share = part.partition("=")
        if not re.fullmatch(r"0?\.\d+", share) or not (Path(name) / "card.json").exists():
            raise ValueError(f"mix={part} is not a folder of shards and its share, such as "
                             "shards/a=0.2: python data.py TEXT makes one")
        shares[Path(name)] = float(share)
        if Tokenizer.load(Path(name) / "tokenizer.json").hash() != tokenizer.hash():
            raise ValueError(f"{name} was made with another tokenizer than {shards}: "
                             f"python data.py TEXT --tokenizer={shards / 'tokenizer.json'}")
    return MixedLoader({shards: 1 - sum(shares.values())} | shares, *options)


def cut_short(ids, progress, curriculum):
    """Rows (B, T) cut into (8 B, T / 8), later 4, then 2, during the first `curriculum` of the run:
    short sequences first, as many tokens (arXiv:2108.06084)."""
    if progress >= curriculum:
        return ids
    parts = 8 >> int(3 * progress / curriculum)
    return ids.reshape(ids.size(0) * parts, -1)


def fingerprints(config, shards):
    """{folder: fingerprint} of the run's shards and of --mix. ValueError if one is damaged."""
    mixed = [part.partition("=")[0] for part in config.mix.split(",") if part]
    return {str(folder): check_shards(folder)["fingerprint"] for folder in (shards, *mixed)}


def check_resume(run, config, model_config, tokenizer, corpora, say):
    """ValueError with all differences, if model, tokenizer or corpus are not those of the run until
    now; what else is different is said, and goes."""
    saved = read_config(run.folder / "config.json")
    try:
        before = TrainConfig(**saved["train"])
        known = [*saved["data"]["fingerprints"].values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.folder} is of another version: {error}") from None
    old = run.model.config if model_config else shape_of(before, run.model.config.vocab_size)
    new = model_config or shape_of(config, run.model.config.vocab_size)
    wrong = [f"{name}={value} (it has {getattr(old, name)})" for name, value in asdict(new).items()
             if value != getattr(old, name)]
    if Tokenizer.load(run.folder / "tokenizer.json").hash() != tokenizer.hash():
        wrong.append("another tokenizer")
    if [*corpora.values()] != known:
        wrong.append(f"another corpus, {' and '.join(corpora)}")
    if wrong:
        raise ValueError(f"{run.folder} cannot go on with {'; '.join(wrong)}: start a new run, or "
                         "leave these options out")
    names = [f.name for f in dataclasses.fields(config) if f.name not in ("data", "out", "resume")]
    changed = [f"{name}={getattr(config, name)} (was {getattr(before, name)})" for name in names
               if getattr(config, name) != getattr(before, name)]
    if changed:
        say(f"goes on at step {run.step} with {', '.join(changed)}")


def open_run(config, shape, shards, device):
    """A new Run in a folder of its own, or with --resume the one that is there."""
    folder = run_folder(config, shards)
    if config.resume:
        return load_run(folder, config, device)
    if checkpoints(folder):
        raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
    return new_run(folder, GPT(shape).to(device), config, device)


def split_batch(config, world_size):
    """-> (sequences in a forward pass on one process, forward passes in a step)."""
    micro = max(1, min(config.micro_batch_size, config.batch_size // world_size))
    if config.batch_size % (micro * world_size):
        raise ValueError(f"batch_size={config.batch_size} is no multiple of {micro * world_size}: "
                         f"micro_batch_size={micro} on {world_size} process(es)")
    return micro, config.batch_size // (micro * world_size)


def is_spike(recent, values, deviations):
    """Whether one of values lies so many robust deviations above the median of those before it;
    recent holds rows of them. Medians, as a few wild values move neither of the two."""
    for value, past in zip(values, zip(*recent)):
        middle = median(past)
        spread = 1.4826 * median(abs(x - middle) for x in past)  # a normal's standard deviation
        if value > middle + deviations * max(spread, abs(middle) / 100):
            return True
    return False


def judge(run, loss, norm, deviations):
    """-> why a step is to be left out, in words, or "". To be asked once a step, with the same
    answer on all processes. Only finite numbers enter the statistics of spikes."""
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


def skip(run, why, xs, ys, batch_size):
    """Leave a step out: gradients are dropped; weights and the optimizer's memory stay. -> what the
    log says of it: why, which sequences of the loader they were, and where numbers went bad."""
    run.scaler.update()
    run.optimizer.zero_grad()
    run.skipped += 1
    said = dict(skipped=why, sequences=[run.sequences - batch_size, run.sequences - 1])
    if why == "not finite":
        said["bad"] = first_bad(run.model, xs, ys)
        run.optimizer.zero_grad()
    return said


def give_up(run, row, saver):
    """ValueError after too many bad steps in a row, with the run saved as it was before them."""
    bad, where = run.bad, "the weights are bad, too, so no newer checkpoint is written"
    if run.model.is_sound():
        run.bad, where = 0, "the weights from before them are saved"
        if saver is not None:
            saver.save(run)
    raise ValueError(f"the loss or its gradient is not finite at step {run.step}, {bad} in a row, "
                     f"first in {row['bad']}; {where}: go on with --resume and a --learning_rate "
                     f"below {row['lr']:.1e}; python -m chapters.doctor {run.folder} says more")


def is_patient_no_more(run, config):
    """Whether `patience` validations have passed since the best one."""
    return config.patience and run.step - run.best_step >= config.patience * config.eval_every


def find_rate(run, config, batches, accumulate, say, n_steps=60, lowest=1e-4, highest=3.0):
    """A sweep on weights that are then thrown away: ever higher rates, until the loss takes off.
    Draws find_lr.png in the run's folder, which gets no run. arXiv:1506.01186"""
    rates, losses, mean = [], [], None
    for step in tqdm(range(n_steps), disable=not sys.stderr.isatty(), leave=False):
        rates.append(lowest * (highest / lowest) ** (step / (n_steps - 1)))
        set_rate(run.optimizer, rates[-1])
        xs, ys = zip(*(to_device(next(batches), run.model) for _ in range(accumulate)))
        loss = take_step(run, run.model, xs, ys, config.grad_clip)[0].item()
        mean = loss if mean is None else 0.8 * mean + 0.2 * loss
        losses.append(mean)
        if not mean < 1.3 * min(losses):
            break
    best = rates[losses.index(min(losses))] / 3
    draw_rates(run.folder, rates, losses, best)
    say(f"loss {losses[0]:.3f}, then {min(losses):.3f}, then {losses[-1]:.3f} at rates from "
        f"{lowest:.0e} to {rates[-1]:.0e}: see {run.folder / 'find_lr.png'}; "
        f"try --learning_rate={best:.1g}")


def check_graph(config, device, world_size, kernels):
    """ValueError where a step cannot be recorded as a CUDA graph."""
    if config.cuda_graph and config.skip_spikes:
        raise ValueError("--cuda_graph takes its steps as a whole: it can leave out none, so leave "
                         "out --skip_spikes")
    if config.cuda_graph and (not device.startswith("cuda") or world_size > 1
                              or config.precision == "fp16" or kernels not in ("torch", "cuda")):
        raise ValueError("--cuda_graph works on one GPU in fp32 or bf16 with torch or cuda "
                         f"kernels, not on {world_size} x {device} in {config.precision} with "
                         f"{kernels} kernels: leave it out")


def last_step(config, n_tokens, tokens_per_step):
    """The step at which the run ends at the latest; infinite if only the clock ends it."""
    limits = [config.max_steps, math.ceil(config.epochs * n_tokens / tokens_per_step),
              math.ceil(config.tokens / tokens_per_step)]
    return min(filter(None, limits), default=math.inf)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def reason(asked, precision, device):
    """Why the run computes in this precision."""
    if asked != "auto":
        slow = device == "cpu" and precision != "fp32" and not has_fast_bf16()
        return f"{precision} as asked" + ", slow: this CPU has no units for it" * slow
    if precision == "bf16":
        return "bf16 with float32 weights, fast here"
    return "fp32, as bf16 is not fast here" if device == "cpu" else "fp32, safe on every device"


def memory_warning(needed, free):
    """A line if a step needs more bytes than are free, or nearly; None free: nobody knows."""
    if free is None or needed < 0.9 * free:
        return ""
    return (f"a step needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} are free: take a "
            "smaller --micro_batch_size or --size, or --recompute")


@contextlib.contextmanager
def memory_explained(shape, micro, config, dtype, device):
    """Where memory runs out: a ValueError that says what used how much, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in said
                or "can't allocate memory" in said):
            raise
        with torch.device("meta"):
            model = GPT(shape)
        model.use("fused" if config.kernels == "auto" else config.kernels, dtype, config.recompute)
        parts = training_memory(model, micro, config.optimizer, device)
        uses = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items())
        raise ValueError(
            f"out of memory: a step of {micro} sequences of {shape.block_size} tokens on {device} "
            f"needs about {sum(parts.values()) / 1e9:.2f} GB ({uses}): take a smaller "
            "--micro_batch_size, or --recompute") from None


def announce(config, model, n_tokens, n_steps, seconds, how):
    """The lines before the run: how large, how much, how long, on what; and what is odd about it.
    seconds are those of a step."""
    tokens_per_step = config.batch_size * model.config.block_size
    n_steps = min(n_steps, 60 * config.minutes / seconds if config.minutes else math.inf)
    tokens = n_steps * tokens_per_step
    epochs = tokens / n_tokens
    yield (f"{model.n_parameters() / 1e6:.1f}M parameters, {tokens / 1e6:.1f}M tokens "
           f"({epochs:.1f} epochs) in about {n_steps:,.0f} steps of "
           f"{tokens_per_step:,}: about {clock(n_steps * seconds)} minutes on {how}")
    if epochs < 0.5:
        yield (f"it will see {epochs:.0%} of its {n_tokens / 1e6:.1f}M tokens: a smaller --size or "
               "more --minutes would use them")
    if epochs > 8:
        yield (f"it will see its {n_tokens / 1e6:.1f}M tokens {epochs:.0f} times, and more than 8 "
               "times teaches little: give more text, a shorter run, or --dropout and --patience")


def sample_lines(model, tokenizer, n_tokens, seed):
    """A few indented lines of what the model writes from nothing."""
    model.eval()
    text = complete(model, tokenizer, max_new_tokens=n_tokens, temperature=0.8, top_k=50, seed=seed)
    model.train()
    return "\n".join("    | " + line for line in text.strip("\n").splitlines())


def progress_line(row, left):
    if "skipped" in row:
        where = f", first in {row['bad']}" if "bad" in row else ""
        first, last = row["sequences"]
        return (f"step {row['step']:5d} | left out: {row['skipped']}{where}, loss {row['loss']}, "
                f"norm {row['grad_norm']}, sequences {first} to {last}")
    validation = f" | validation {row['val_loss']:.4f}" if "val_loss" in row else ""
    memory = f" | {row['memory'] / 1e9:.1f} GB" if row["memory"] else ""
    return (f"step {row['step']:5d} | loss {row['loss']:.4f}{validation} | lr {row['lr']:.1e} | "
            f"norm {row['grad_norm']:.2f}{memory} | mfu {row['mfu']:.0%} | "
            f"{row['tokens_per_second']:,} tok/s, {clock(left)} left")


def summarize(run, card, began, how, stopped):
    """What train() returns: where the run is, how far it came, how good and how fast it was."""
    rows = [row for row in read_log(run.folder) if row["loss"] is not None]
    val_loss = rows[-1].get("val_loss")
    speed = round(median(row["tokens_per_second"] for row in rows))
    bits = val_loss and val_loss / math.log(2) * card["val"]["tokens"] / card["val"]["bytes"]
    return dict(folder=str(run.folder), step=run.step, loss=rows[-1]["loss"], val_loss=val_loss,
                bits_per_byte=bits, tokens_per_second=speed,
                seconds=time.perf_counter() - began, how=how, stopped=stopped,
                skipped=run.skipped)


TRACKERS = ("tensorboard", "wandb")  # packages that a flag of their name asks for


def check_trackers(config):
    for name in TRACKERS:
        if getattr(config, name) and not importlib.util.find_spec(name):
            raise ValueError(f"--{name} needs a package that is not installed: pip install {name}")


def append(path, data):
    """Add bytes to the end of a file, all of them or none."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


class Log:
    """log.jsonl, a JSON object a line. Rows that a full disk refuses wait for the next one."""

    def __init__(self, path, say):
        self.path, self.say, self.waiting = path, say, []

    def __call__(self, row):
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in row.items()}  # JSON has no word for the others
        self.waiting.append(json.dumps(finite) + "\n")
        try:
            append(self.path, "".join(self.waiting).encode())
            self.waiting = []
        except OSError as error:
            if len(self.waiting) == 1:
                self.say(f"warning: {self.path} cannot be written ({error.strerror}); training "
                         "goes on, the rows wait for room")


@contextlib.contextmanager
def open_logs(config, folder, is_main, say):
    """Yields a function that writes a row, a dict, to log.jsonl and to what else was asked for."""
    writers = [Log(folder / "log.jsonl", say)] if is_main else []
    with contextlib.ExitStack() as stack:
        if is_main and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = stack.enter_context(SummaryWriter(folder))
            writers.append(lambda row: [board.add_scalar(name, value, row["step"])
                                        for name, value in row.items()
                                        if name != "step" and isinstance(value, (int, float))])
        if is_main and config.wandb:
            import wandb
            online = stack.enter_context(wandb.init(project="language-model", name=folder.name,
                                                    dir=folder, config=asdict(config)))
            writers.append(lambda row: online.log(row, step=row["step"]))
        yield lambda row: [write(row) for write in writers]


def suspicion(run, row):
    """A line if a validation shows what should not be, naming the doctor; or none."""
    guessing = math.log(run.model.config.vocab_size)
    signs = {"the loss is above that of guessing": row["loss"] > guessing + 0.1,
             f"validation was better at step {run.best_step}":
             row["val_loss"] > 1.03 * run.best_loss}
    found = " and ".join(sign for sign, is_there in signs.items() if is_there)
    return f"{found}: python -m chapters.doctor {run.folder} looks into it" if found else ""


def train(config, model_config=None, say=tqdm.write):
    """Train as config says, the model too unless model_config does; say takes the lines to show.
    -> a summary of the run: folder, step, loss and val_loss (nats per token), bits_per_byte,
    tokens_per_second, seconds, how, stopped (by which signal, or 0), skipped (steps left out); None
    on all ranks but 0, and with find_lr."""
    began = time.perf_counter()
    keep_freed_memory(config.low_memory)
    check_trackers(config)
    rank, world_size, device = start_processes(config)
    is_main, say = rank == 0, say if rank == 0 else lambda text: None
    if model_config is None:
        shape_of(config, config.vocab_size)  # a wrong option is refused before the data is made
    shards = find_shards(config, rank, say)
    card = read_card(shards)
    tokenizer = Tokenizer.load(shards / "tokenizer.json")
    shape = model_config or shape_of(config, tokenizer.n_vocab)
    micro, accumulate = split_batch(config, world_size)
    T = shape.block_size
    if config.curriculum and T % 8:
        raise ValueError(f"curriculum cuts sequences into 8: block_size={T} is no multiple of it")

    torch.manual_seed(config.seed)
    precision, dtype = pick_precision(config.precision, device)
    why, config = (reason(config.precision, precision, device),
                   dataclasses.replace(config, precision=precision))
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_explained(shape, micro, config, dtype, device))
        if is_main and config.resume:
            stack.enter_context(locked(run_folder(config, shards)))
        run = open_run(config, shape, shards, device)
        kernels = run.model.use(config.kernels, dtype, config.recompute)
        how = f"{device}, {precision}, {kernels} kernels"
        check_graph(config, device, world_size, kernels)
        batches = open_batches(config, shards, tokenizer, micro, T, rank, world_size,
                               position=run.sequences // (micro * world_size))
        if config.find_lr:
            if world_size > 1:
                raise ValueError(f"--find_lr works on one process, not on {world_size}")
            return find_rate(run, config, batches, accumulate, say)
        n_steps = last_step(config, batches.n_tokens, config.batch_size * T)
        if is_main:
            corpora = fingerprints(config, shards)
            if config.resume:
                check_resume(run, config, model_config, tokenizer, corpora, say)
            else:
                stack.enter_context(locked(run.folder))
            cut_log(run)
            needed = sum(training_memory(run.model, micro, config.optimizer).values())
            if warning := memory_warning(needed, free_memory(device)):
                say(warning)
            seconds = seconds_per_step(run, config, micro, accumulate)
            how_and_why = f"{device}, {kernels} kernels, {why}"
            for line in announce(config, run.model, batches.n_tokens, n_steps, seconds,
                                 how_and_why):
                say(line)
            tokenizer.save(run.folder / "tokenizer.json")
            data = dict(path=str(shards), fingerprints=corpora, **card)
            write_json(run.folder / "config.json",
                       seal(dict(model=asdict(run.model.config), train=asdict(config), data=data)))
        stopped = run_steps(run, config, batches, shards, tokenizer, n_steps,
                            (rank, world_size, device), began, say)
    return summarize(run, card, began, how, stopped) if is_main else None


def run_steps(run, config, batches, shards, tokenizer, n_steps, place, began, say):
    """The loop: rate, gradients, update, log; now and then validate, save, show. -> the signal that
    asked it to stop before its end, or 0. place is (rank, world_size, device)."""
    rank, world_size, device = place
    _, accumulate = split_batch(config, world_size)
    model, is_main = parallelize(run.model, world_size, device), rank == 0
    graphed = GraphedStep(run, model, config.grad_clip) if config.cuda_graph else None
    tokens_per_step = config.batch_size * batches.block_size
    best_rate = matmul_rate(run.model.device, run.model.dtype) * world_size
    flops = run.model.flops_per_token()
    before = run.elapsed  # the minutes of this session, preparations included, come on top

    def share_done():
        by_clock = run.elapsed / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(run.step / n_steps, by_clock))

    progress, stopping = share_done(), False
    if progress == 1:
        say("this run is finished: a larger --max_steps, --epochs or --minutes trains on")
    ready, started_at, shown = time.perf_counter(), progress, 0.0
    bar = tqdm(total=1.0, initial=progress, disable=not (is_main and sys.stderr.isatty()),
               leave=False, bar_format="{percentage:3.0f}% {bar:20} {desc}")
    saving = Saver(run.folder, config.keep_last, say) if is_main else contextlib.nullcontext()
    with (bar, open_logs(config, run.folder, is_main, say) as log, stop_signals() as asked,
          saving as saver):
        while progress < 1 and not stopping:
            start = time.perf_counter()
            torch.manual_seed(1_000_003 * run.step + config.seed + rank)  # dropout: of this step
            rate = learning_rate(run.step, config, progress)
            set_rate(run.optimizer, rate)
            xs, ys = zip(*(to_device(next(batches), run.model) for _ in range(accumulate)))
            xs, ys = ([cut_short(ids, progress, config.curriculum) for ids in part]
                      for part in (xs, ys))
            loss, norm = (value.item() for value in
                          (graphed(xs, ys) if graphed else
                           gradients(run, model, xs, ys, config.grad_clip)))
            run.step, run.sequences = run.step + 1, run.sequences + config.batch_size
            run.elapsed = before + time.perf_counter() - began
            loss, norm, progress, stopping = average([loss, norm, share_done(), len(asked)], device)
            row = dict(step=run.step, loss=loss, lr=rate, grad_norm=norm)
            if why := judge(run, loss, norm, config.skip_spikes):
                row |= skip(run, why, xs, ys, config.batch_size)
            elif not graphed:  # a graph's step includes it
                update(run)

            now = time.perf_counter()
            run.elapsed = before + now - began
            speed = tokens_per_step / (now - start)
            row |= dict(tokens_per_second=round(speed), mfu=round(speed * flops / best_rate, 3),
                        memory=peak_memory(device), elapsed=round(run.elapsed, 3))
            check = run.step % config.eval_every == 0 or progress == 1
            run.val_loss = None
            if check:
                row["val_loss"] = validate(run, config, shards, rank, world_size)
                if is_patient_no_more(run, config):
                    say(f"no lower validation loss since step {run.best_step}: --patience ends it")
                    progress = 1.0
            log(row)
            if run.bad and (run.bad >= config.bad_steps or graphed):
                give_up(run, row, saver)
            if not is_main:
                continue
            left = (time.perf_counter() - ready) / (progress - started_at) * (1 - progress)
            bar.set_description_str(progress_line(row, left), refresh=False)
            bar.update(progress - bar.n)
            if check or stopping or why or (bar.disable and now - shown > 10):
                say(progress_line(row, left))
                shown = now
            sound = (check or stopping) and run.model.is_sound()
            if sound:
                saver.save(run)
            if sound and check and progress < 1 and not why:
                say(suspicion(run, row) or sample_lines(run.model, tokenizer, config.sample_tokens,
                                                        config.seed))
    return stopping and int(asked[0] if asked else signal.SIGTERM)


def report(summary):
    """The last lines of the command: a longer sample, the figures, and what to type next."""
    folder = summary["folder"]
    if summary["stopped"]:
        print(f"stopped at step {summary['step']}, saved at {max(checkpoints(folder), default=0)}; "
              f"to go on: python train.py --resume --out={folder}")
        return
    model, tokenizer = load_finished(folder)
    print(sample_lines(model, tokenizer, 200, seed=1))
    print(f"{summary['step']:,} steps in {clock(summary['seconds'])} minutes on {summary['how']}, "
          f"{summary['tokens_per_second']:,} tokens/s: validation loss {summary['val_loss']:.4f}, "
          f"{summary['bits_per_byte']:.3f} bits per byte")
    print(f"{folder} holds the model, its log and its picture {folder}/loss.png")
    print(f'next: python sample.py {folder} --prompt="def "')


def main():
    config = complete_options(parse_options(TrainConfig))
    summary = train(config)
    if summary:
        report(summary)
    if dist.is_initialized():
        dist.barrier()  # all leave together: who goes first takes the others' connections along
        dist.destroy_process_group()
    if summary and summary["stopped"]:
        sys.exit(128 + summary["stopped"])


if __name__ == "__main__":
    run_command(main)
