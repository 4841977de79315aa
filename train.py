"""
Train a model: text or token shards in, a run folder with checkpoints out.

    python train.py                                       # Python's own library, a few minutes
    python train.py --data=mybook.txt --size=small --minutes=60 --dropout=0.1
    python train.py --resume                              # continue the newest run
    python train.py --init=runs/base --data=chats.jsonl --tune=lora        # fine-tune a run
    torchrun --nproc_per_node=2 train.py --max_steps=500  # the same losses, on two processes
    torchrun --nproc_per_node=8 train.py --parallel=fsdp --tp=2 --pp=2     # and on 2 x 2 x 2

--init begins with the weights of a run, for other data: texts, chats (of which what the assistant
says is learned), or with --n_classes texts and their labels; --tune says what of it is trained.
With none of --max_steps, --tokens, --epochs and --minutes a run ends after 2 epochs or 4 minutes,
whichever comes first. A resumed run can change every option but those of its model and its data.
Ctrl-C or SIGTERM saves and ends it, with exit code 130 or 143; the second Ctrl-C at once.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import contextlib
import copy
import json
import math
import os
import shutil
import sys
import threading
import time
import timeit
import warnings
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, count
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import regex
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (ChatLoader, ClassLoader, TokenLoader, check_shards, for_chats, known_hashes,
                  load_tokenizer, prepare, read_card, read_split)
from model import (GPT, KERNELS, SIZES, GPTConfig, TuneConfig, accelerator, check_ids,
                   from_weights, has_bf16_units, load_model, merge, option, plain_linear,
                   plain_norm, read_header, read_progress, read_safetensors, save_model, tune)
from sample import (PRECISIONS, checkpoints, complete, first_whole, load_run as load_finished,
                    knows_chats, newest_run, pick_checkpoint, pick_device, pick_precision)
from tokenizer import (QUIET, Tokenizer, check_fields, parse_options, read_json, reading,
                       refuse_idle, replacing, run_command, write_json)

LENGTHS = ("max_steps", "epochs", "tokens", "minutes")
SCHEDULES = {  # share of the learning rate at a progress from 0 to 1; wsd: arXiv:2404.06395
    "linear": lambda progress, decay_ratio: 1 - progress,
    "cosine": lambda progress, decay_ratio: (1 + math.cos(math.pi * progress)) / 2,
    "wsd": lambda progress, decay_ratio: min(1.0, (1 - progress) / decay_ratio),
    "constant": lambda progress, decay_ratio: 1.0,
}
# AdamW's learning rate after --init, for models of 128 channels and fewer.
RATES = dict(full=1e-3, last=2e-3, head=1e-2, bias=3e-2, lora=3e-3, adapter=1e-2, prefix=0.1,
             prompt=0.1)
# What may be another in a model than in the run of --init, as no weight depends on it.
FREE = {"block_size", "n_classes", "softcap", "dropout", "label_smoothing", "z_loss", "window"}


@dataclass(frozen=True)
class TrainConfig(TuneConfig):
    """How to train: data, length, optimizer, what is shown, machine."""
    init: str = option("", "a run folder; its tokenizer and weights are what training begins with")
    data: str | list = option("stdlib", "shards, or what data.py takes: files, URLs ...", many=True)
    out: str = option("", "run folder; empty: runs/ and the name of the data")
    config: str = option("", "a config.json whose options are taken; those typed come first")
    resume: bool = option(False, "continue the run in --out, or the newest one")
    vocab_size: int = option(4096, "of the tokenizer, when one is trained", low=1)
    size: str = option("mini", "a row of a model's defaults", known=lambda: SIZES)
    max_steps: int = option(0, "optimizer steps; 0: no limit")
    epochs: float = option(0.0, "passes over the data; 0: no limit")
    tokens: float = option(0.0, "tokens read, such as 1e8; 0: no limit", below=1e15)
    minutes: float = option(0.0, "end after this long, data included; 0: no limit")
    batch_size: int = option(16, "sequences per step, over all devices", low=1)
    micro_batch_size: int = option(16, "sequences per forward pass; the rest accumulates", low=1)
    patience: int = option(0, "end after so many validations without a lower loss; 0: never")
    curriculum: float = option(0.0, "share of the run in which sequences are cut short", below=1)
    optimizer: str | None = option(None, "by default muon, and after --init adamw, which makes a "
                                   "model forget less", known=lambda: OPTIMIZERS)
    learning_rate: float = option(0.0, "the highest; 0: what suits optimizer, --tune and width")
    min_lr: float = option(0.0, "the last")
    schedule: str = option("linear", known=lambda: SCHEDULES)
    decay_ratio: float = option(0.4, "share of the run in which wsd falls", low=0.01, below=1)
    warmup_steps: int = option(5, "steps from 0 to the highest learning rate")
    rewarm: bool = option(False, "with --resume: warm up again, and begin a new schedule there")
    weight_decay: float = option(0.1, "on matrices only; with muon on those of the blocks")
    beta1: float = option(0.9, "decay of AdamW's mean of gradients", below=1)
    beta2: float = option(0.95, "decay of AdamW's mean of squared gradients", below=1)
    grad_clip: float = option(1.0, "longest gradient; 0: no limit")
    skip_spikes: float = option(0.0, "skip steps so many deviations above the median; 0: none")
    bad_steps: int = option(10, "end after so many steps in a row with a loss not finite", low=1)
    eval_every: int = option(100, "steps between validations, each with a checkpoint", low=1)
    eval_sequences: int = option(64, "sequences in the fixed validation set", low=1)
    sample_tokens: int = option(48, "tokens shown at a validation", low=1)
    keep_last: int = option(2, "how many of the last checkpoints stay, beside the best", low=1)
    parallel: str = option("ddp", "over processes: ddp copies the model, fsdp shards it (ZeRO-3)",
                           known=lambda: ("ddp", "fsdp"))
    reshard: bool = option(True, "false: fsdp keeps the weights until backward, as ZeRO-2, which "
                           "sends what ZeRO-1 does and holds less")
    tp: int = option(1, "processes that share each matrix: tensor parallelism", low=1)
    pp: int = option(1, "processes that share the blocks: pipeline stages", low=1)
    pp_schedule: str = option("1f1b", "of the stages", known=lambda: ("1f1b", "gpipe"))
    checkpoint: str = option("plain", "one file, or sharded: a folder, each process its part",
                             known=lambda: ("plain", "sharded"))
    timeout: int = option(1800, "seconds until a process that does not answer is named", low=1)
    device: str = option("auto", "auto | cpu | cuda | mps")
    precision: str = option("auto", "weights stay float32", known=lambda: ("auto", *PRECISIONS))
    kernels: str = option("auto", "auto: the fastest", known=lambda: ("auto", "cuda", *KERNELS))
    low_memory: bool = option(False, "on Linux CPUs: hand freed memory back; a little slower")
    recompute: bool = option(False, "compute activations again in backward: less memory, slower")
    cuda_graph: bool = option(False, "on one GPU: launch all work of a step at once")
    force: bool = option(False, "start although the model does not seem to fit into memory")
    seed: int = option(1337, "of weights, batches and dropout")
    shuffle: bool = option(True, "read in a random order, else in that of the shards")

    def __post_init__(self):
        super().__post_init__()
        own = dict(init=self.init.rstrip("/"),
                   optimizer=self.optimizer or ("adamw" if self.init else "muon"))
        if not self.init:  # else prepare_run knows
            own["learning_rate"] = self.learning_rate or OPTIMIZERS[own["optimizer"]].rate
        if not any(getattr(self, name) for name in LENGTHS):
            own.update(epochs=2.0, minutes=4.0)
        vars(self).update(own)  # the class is frozen for everyone else
        if self.min_lr > self.learning_rate > 0:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")


def model_shape(size, vocab_size, options={}):
    """The GPTConfig of a size, with options, {name: value}, in the place of its own."""
    return GPTConfig(**SIZES[size] | options | dict(vocab_size=vocab_size))


def read_config(path):
    """-> (TrainConfig, GPTConfig, dict of the data) in a run's config.json; ValueError if wrong."""
    if not Path(path).exists():
        raise ValueError(f"{path} is missing: it says how a run goes on; copy the whole folder")
    saved = read_json(path)
    with reading(path):
        if lost := ({"data", "model", "train"} - {*saved}
                    or {"fingerprint", "path"} - {*(saved["data"] or ())}):
            raise ValueError(f"it lacks {', '.join(sorted(lost))}, so this run cannot go on: begin "
                             "another with --init=RUN")
        return (check_fields(TrainConfig, saved["train"], path),
                check_fields(GPTConfig, saved["model"], path), saved["data"])


def first_shape(config):
    """The GPTConfig of the run that is resumed or that --init names, else of --size."""
    if config.resume:
        return read_config(run_folder(config) / "config.json")[1]
    if config.init:
        return read_progress(pick_checkpoint(config.init))["config"]
    return model_shape(config.size, config.vocab_size)


def is_shards(data):
    """Whether --data is a folder of token shards, and no source to make some of."""
    return isinstance(data, str) and data != "" and Path(data, "card.json").exists()


def complete_options(typed, typed_model):
    """The options typed, two dicts, over those of the config.json that --config or --resume point
    to -> (TrainConfig, GPTConfig). With --config a new --size or --architecture is a new model."""
    options, own_shape = {}, {}
    if typed.get("resume"):
        refuse_idle(typed, ["config"], "beside --resume")
        folder = run_folder(TrainConfig(resume=True, out=typed.get("out", "")))
        typed = typed | dict(out=str(folder), config=str(folder / "config.json"))
    if typed.get("config"):
        saved, shape, data = read_config(typed["config"])
        options = asdict(saved) | dict(
            out="", resume=False, rewarm=False, force=False,
            parallel="ddp", tp=1, pp=1, checkpoint="plain")  # a run goes on on any processes
        if typed.get("resume") and is_shards(data["path"]):
            options["data"] = data["path"]  # not made again from what may have changed
        if typed.keys() & set(LENGTHS):  # a new length takes the place of all former ones
            options |= dict.fromkeys(LENGTHS, 0)
        if typed.get("optimizer", saved.optimizer) != saved.optimizer:
            options["learning_rate"] = 0.0
        if typed.get("resume") or not ("size" in typed or "architecture" in typed_model):
            own_shape = asdict(shape)
    config = TrainConfig(**options | typed)
    if config.init and not config.resume:
        own_shape = asdict(first_shape(config))
        for name in sorted(typed_model.keys() - FREE):
            if typed_model[name] != own_shape[name]:
                raise ValueError(f"{name}={typed_model[name]}: {config.init} has {own_shape[name]},"
                                 f" which a model keeps: leave out --{name}")
    shape = model_shape(config.size, config.vocab_size, own_shape | typed_model)
    method, tuning = config.tune.partition(":")[0], [f.name for f in fields(TuneConfig)]
    other = f"beside --tune={method}"
    for act, names, beside in (
            (not config.init, ["size", "vocab_size"], "beside --init"),
            (config.init, [*tuning, "n_classes"], "without --init=RUN"),
            (method in ("lora", "adapter", "prefix", "prompt"), ["rank"], other),
            (method == "lora", ["alpha", "lora_dropout", "targets"], other),
            (config.schedule == "wsd", ["decay_ratio"], "without --schedule=wsd"),
            (config.schedule != "constant", ["min_lr"], "beside --schedule=constant"),
            (config.resume, ["rewarm"], "without --resume"),
            (config.parallel == "fsdp", ["reshard"], "without --parallel=fsdp"),
            (config.pp > 1, ["pp_schedule"], "without --pp=N"),
            (config.resume or not is_shards(config.data), ["vocab_size"], "on shards, as they are"),
            (shape.position == "rope", ["rope_theta"], "without --position=rope")):
        if not act:
            refuse_idle(typed | typed_model, names, beside)
    return config, shape


# -----------------------------------------------------------------------------
# Several processes, as torchrun starts them: what each of them has of the batch and of the model.

MESH = "pp", "dp", "tp"  # the dimensions of the processes; tp's, which speak most, are neighbours


def part(mesh, name):
    """(the number of this process, how many there are) along a dimension of the mesh, or (0, 1)."""
    return (mesh.get_local_rank(name), mesh[name].size()) if mesh else (0, 1)


def from_torchrun(name):
    """RANK, WORLD_SIZE, LOCAL_RANK (on this machine) or LOCAL_WORLD_SIZE, as it numbers processes;
    without it there is one, number 0."""
    with reading("the environment"):
        return int(os.environ.get(name, name.endswith("SIZE")))


def start_processes(config):
    """-> (rank, mesh, device): each process has a GPU of its own, or a share of the cores. The
    mesh, None for one process, has a group of processes for each dimension of MESH."""
    rank, n, local, n_local = map(from_torchrun, ("RANK", "WORLD_SIZE", "LOCAL_RANK",
                                                  "LOCAL_WORLD_SIZE"))
    device = pick_device(config.device)
    if n == 1:
        return 0, None, device
    if device == "mps" or device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine finds no GPU of its own: take as many "
                         "processes as there are GPUs, or --device=cpu")
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # as torchrun sets it: the cores would idle
        torch.set_num_threads(max(1, os.cpu_count() // n_local))
    if not dist.is_initialized():
        where = ":".join(os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.timeout)))
            if n_local == n:  # torchrun keeps what those before a restart have stored
                store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(  # to wait for a day: rank 0 may be making the data
                "nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
                world_size=n, timeout=timedelta(days=1))
        except (RuntimeError, ValueError, OverflowError) as error:
            raise ValueError(f"rank {rank} of {n} does not find the others at {where}: start all "
                             f"with torchrun ({str(error).splitlines()[0]:.200})") from None
    from torch.distributed.device_mesh import init_device_mesh
    sizes = config.pp, n // (config.pp * config.tp), config.tp
    return rank, init_device_mesh(device.partition(":")[0], sizes, mesh_dim_names=MESH), device


def watch(run, timeout):
    """A thread that tells the others, through torch's store, how far this process is. When nothing
    moves for `timeout` seconds it ends the process, and the first that lives says which does not
    answer or is behind. -> the event that ends the thread"""
    rank, n, end = dist.get_rank(), dist.get_world_size(), threading.Event()
    store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store())

    def work():
        last, since, asked = None, time.monotonic(), math.inf
        for beat in count():
            done = run.step + run.batches.position
            store.set(str(rank), json.dumps([beat, done]))
            if end.wait(1):
                return
            if done != last:
                last, since, asked = done, time.monotonic(), math.inf
            if time.monotonic() - since < timeout or asked < beat < asked + 3:
                continue
            now = [json.loads(store.get(other)) if store.check([other]) else [0, 0]
                   for other in map(str, range(n))]
            if beat < asked:  # and again 3 seconds later
                before, asked = now, beat
                continue
            silent = [i for i in range(n) if now[i] == before[i]]
            behind = [i for i in range(n) if now[i][1] < max(far for _, far in now)]
            if rank == min({*range(n)} - {*silent}, default=rank):
                names = " and ".join(f"rank {i}" for i in silent or behind) or "some rank"
                print(f"error: step {run.step + 1} has not ended for {timeout} s, as {names} does "
                      "not answer: the run ends; --resume goes on", file=sys.stderr)
            time.sleep(1)
            os._exit(1)

    threading.Thread(target=work, daemon=True).start()
    return end


def average(values, device):
    """The mean of each value over all processes, the same numbers on each."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def check_layout(config, shape, n):
    """ValueError if n processes cannot share a model of this shape as the options say."""
    tp, pp, fsdp, shards = (config.tp, config.pp, config.parallel == "fsdp",
                            config.checkpoint == "sharded")
    split, alone = tp * pp > 1, ("does not work with this layout: take --parallel={} and neither "
                                 "--tp nor --pp nor --checkpoint=sharded")
    widths = dict(n_kv_head=shape.n_kv_head, block_size=shape.block_size,
                  n_hidden=shape.n_hidden or 64)  # else of a width that 64 divides
    for wrong, line in (
            (n % (tp * pp), f"tp={tp} times pp={pp} needs a multiple of {tp * pp} processes, not "
             f"{n}: torchrun --nproc_per_node={tp * pp} train.py ..."),
            (n > tp * pp > 1 and not fsdp, f"--parallel=ddp copies whole models: on {n} processes "
             "--tp and --pp go with --parallel=fsdp"),
            (n == 1 and (fsdp or shards), "--parallel=fsdp and --checkpoint=sharded are for "
             "several processes: torchrun --nproc_per_node=N train.py ... starts N"),
            *((size % tp, f"tp={tp}: {name}={size} is no multiple of it: take a --{name} that is, "
               "or another --tp") for name, size in widths.items()),
            (pp > shape.n_layer, f"pp={pp}: there are {shape.n_layer} blocks: take no more"),
            (shards and not find_spec("safetensors"),
             "--checkpoint=sharded needs the package safetensors"),
            (split and config.curriculum, f"--curriculum={config.curriculum} {alone}"),
            (split and shape.n_classes, f"--n_classes={shape.n_classes} {alone}"),
            ((split or shards or fsdp) and config.tune != "full", f"--tune={config.tune} {alone}")):
        if wrong:
            raise ValueError(line.format("ddp" if "--tune" in line else "fsdp"))


class Stage(torch.nn.Module):
    """One stage of a pipeline: its blocks of a model, of which the others are taken away; the first
    has the embeddings, too, the last the final norm and the head."""

    def __init__(self, model, number, n_stages):
        super().__init__()
        self.model, body = model, model.transformer
        for i in range(len(body.blocks)):
            if i * n_stages // len(body.blocks) != number:
                body.blocks[i] = None
        if number > 0:
            body.wte = body.wpe = None
        if number < n_stages - 1:
            body.final_norm = model.lm_head = None

    def forward(self, x, ids, segments=None):
        """x (B, T, C) as the stage before left it (the first needs none), ids (B, T) -> x."""
        body, dtype = self.model.transformer, self.model.dtype
        return body(ids, None, dtype, segments=segments, x=None if body.wte else x)


def split_tensors(model, mesh):
    """Tensor parallelism (arXiv:1909.08053) in place: each process has some heads and some hidden
    channels of every block, and between them, where norms are, some tokens of each sequence
    (arXiv:2205.05198), of which the head makes the loss."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput,
                                                   RowwiseParallel, SequenceParallel,
                                                   parallelize_module)
    norm, heads = SequenceParallel(use_local_output=True), SequenceParallel(
        sequence_dim=2, use_local_output=True)  # of q and k (B, T, H, D), of which H is split
    whole = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    rows = RowwiseParallel(output_layouts=Shard(1))
    plan = {"attn_norm": norm, "mlp_norm": norm, "attn": whole, "mlp": whole,
            "attn.q_norm": heads, "attn.k_norm": heads, "attn.o_proj": rows, "mlp.down_proj": rows,
            **{f"{name}_proj": ColwiseParallel()
               for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")}}
    model.set_functions(dict(linear=plain_linear, norm=plain_norm))  # these meet DTensors
    body, head = model.transformer, model.lm_head
    for block in filter(None, body.blocks):
        there = dict(block.named_modules())
        parallelize_module(block, mesh, {name: plan[name] for name in plan if name in there},
                           src_data_rank=None)
    if body.final_norm is not None:
        parallelize_module(body.final_norm, mesh, norm, src_data_rank=None)

    def whole_ids(module, inputs, mesh):
        return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),)

    def own_tokens(module, output, mesh):
        return output.redistribute(placements=[Shard(output.dim() - 2)]).to_local()

    for table in filter(None, (body.wte, body.wpe)):
        distribute_module(table, mesh, None, whole_ids, own_tokens)
    if head is None:
        return

    def own_targets(module, inputs, mesh):
        return inputs[0], inputs[1].chunk(mesh.size(), dim=1)[mesh.get_local_rank()]

    def loss_of_all(x, weight, targets, loss=head.loss, **options):
        counted = (targets != -1).sum()
        dist.all_reduce(total := counted.clone(), group=mesh.get_group())
        mine = loss(x, weight.to_local(grad_placements=[Partial()]), targets, **options)
        mine = mine * (counted / total.clamp(min=1))
        return DTensor.from_local(mine, mesh, [Partial()], run_check=False).full_tensor().clone()

    distribute_module(head, mesh, None, own_targets)
    head.loss = loss_of_all
    if body.wte is not None:
        model.tie()


def parallelize(model, config, mesh):
    """Split a model over a mesh, in place, as the options say -> what is called in its place."""
    (stage, n_stages), (_, n_copies), (_, n_tensor) = (part(mesh, name) for name in MESH)
    called = Stage(model, stage, n_stages) if n_stages > 1 else model
    if n_tensor > 1:
        split_tensors(model, mesh["tp"])
    if n_copies == 1:
        return called
    if config.parallel == "ddp":
        return DistributedDataParallel(  # averages gradients
            called, [model.device] if model.device.type == "cuda" else None)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    options = dict(mesh=mesh["dp"], reshard_after_forward=config.reshard)
    low = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
    for block in filter(None, model.transformer.blocks):
        fully_shard(block, **options, mp_policy=low)
    if n_stages > 1 and model.lm_head is not None:  # the loss calls it
        fully_shard(model.lm_head, **options)
    return fully_shard(called, **options)  # the rest, whose products need float32


def whole(tensor):
    """A tensor of which each process has a part, put together on all of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared(tensor, like):
    """A tensor that all processes have, split as another one is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


# -----------------------------------------------------------------------------
# The machine: memory, speed, the wish to stop.


def peak_memory(device="cpu"):
    """The most bytes held so far, of the GPU or of this process; None where nobody counts them."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux
    found = status.exists() and regex.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else None


def machine_memory(device):
    """Bytes of memory of a GPU, or of this machine or container; infinite where nobody tells."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    sizes = [math.inf]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows, macOS
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)


def check_memory(shape, config, n_sequences, device, n_shares=1):
    """ValueError if weights, gradients and the optimizer's state, in so many shares, and what
    blocks keep of so many sequences for backward need more memory than there is, or the weights
    alone, which each process begins with; or if --tune does not fit the model."""
    n_here = from_torchrun("LOCAL_WORLD_SIZE") if device == "cpu" else 1
    needed, limit = math.inf, machine_memory(device) / n_here
    with contextlib.suppress(RuntimeError), torch.device("meta"):  # no memory; too many to count
        model = GPT(shape)
        whole = 4 * model.n_parameters()
        state = (8 if config.optimizer == "muon" else 12) * tune(model, config)
        needed = max(whole, (whole + state) / n_shares)
    kept = 2 * shape.n_embd * (1 if config.recompute else 8)  # bytes a token, in bfloat16
    needed += kept * shape.n_layer * n_sequences * shape.block_size
    if needed > limit and not config.force:
        raise ValueError(f"this needs {needed / 1e9:,.1f} GB of memory or more, and {device} has "
                         f"{limit / 1e9:,.1f}: take a smaller --size or --micro_batch_size, "
                         "--recompute, --parallel=fsdp on more processes, or insist with --force")


@contextlib.contextmanager
def memory_explained(n_sequences, block_size, device):
    """Where memory runs out: a ValueError that says what was asked, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not regex.search("MemoryError|out of memory|allocate memory", repr(error)):
            raise
        raise ValueError(f"out of memory with {n_sequences} sequences of {block_size} tokens on "
                         f"{device}: take a smaller --micro_batch_size, --recompute, or a smaller "
                         "--size; python -m chapters.plan says what needs how much") from error


def matmul_rate(device, dtype, size=256):
    """FLOP/s of a large matrix product, one of 5 ms or more: what this device can do at most."""
    x = torch.randn(size, size, device=device, dtype=dtype)  # a GPU is faster on ones
    seconds = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=4))
    if seconds < 0.005 and size < 8192:
        return matmul_rate(device, dtype, 2 * size)
    return 2 * size**3 / seconds


@contextlib.contextmanager
def stop_signals():
    """Yield a list that Ctrl-C, SIGTERM or a closed terminal enters; the second acts at once."""
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with contextlib.suppress(ValueError, AttributeError):  # in a thread; on Windows
            number = getattr(signal, name)
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
    """Linear warm-up to learning_rate, then the schedule from there to min_lr at the end. progress
    is the share of the run that is done: step / max_steps, unless the clock is ahead."""
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


def orthogonal(x, low=True):
    """plain_orthogonal of x (n, rows, columns) by its fast twin where possible, if low in bfloat16
    where that is faster."""
    if x.size(-2) > x.size(-1):
        return orthogonal(x.mT, low).mT  # x x^T is smaller
    x = x.bfloat16() if low and has_bf16_units(x.device) else x
    return accelerator().fast_orthogonal(x, NEWTON_SCHULZ) if accelerator() else plain_orthogonal(x)


class Muon(torch.optim.AdamW):
    """Muon for the groups with muon=True: the step is the momentum of a matrix's gradients, made
    orthogonal, so that all its directions move alike (arXiv:2502.16982). AdamW for the others."""

    def __init__(self, groups, momentum=0.95, **options):
        super().__init__(groups, **options)
        self.momentum = momentum
        self._step_supports_amp_scaling = False  # a GradScaler is to leave out the whole step

    def load_state_dict(self, saved):
        """As AdamW's, which asks for a step in each state, where matrices have momentum alone."""
        states = {i: dict(step=torch.zeros(())) | own for i, own in saved["state"].items()}
        super().load_state_dict(saved | dict(state=states))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if group["muon"] and p.grad is not None]
            for shape in {p.shape for p in params}:
                alike = [p for p in params if p.shape == shape]
                self.update_matrices(alike, group["lr"], group["weight_decay"],
                                     group.get("low", True))
        super().step()  # which passes over the matrices, as they have no gradient any more

    def update_matrices(self, params, lr, weight_decay, low):
        """Muon's step for matrices of one shape, all at once."""
        gradients = [p.grad for p in params]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        torch._foreach_lerp_(gradients, momenta, self.momentum)  # Nesterov's step ahead
        ahead = torch.stack([*map(whole, gradients)])
        rows, columns = params[0].shape
        updates = orthogonal(ahead, low) * (lr * max(1, rows / columns) ** 0.5)
        for p, update in zip(params, updates):
            p.mul_(1 - lr * weight_decay).sub_(shared(update, p))
            p.grad = None


# The learning rate that suits small models; what builds it of groups, given options of AdamW.
Optimizer = namedtuple("Optimizer", "rate build")
OPTIMIZERS = {
    "muon": Optimizer(0.02, Muon),
    "adamw": Optimizer(3e-3, torch.optim.AdamW),
}


def build_optimizer(model, config):
    """AdamW (arXiv:1711.05101) for what is trained, its weight decay for matrices alone. Or Muon
    for the matrices of the blocks, and AdamW at half its rate for the rest."""
    muon = config.optimizer == "muon"
    groups = [dict(params=[], muon=muon, share=1.0, weight_decay=config.weight_decay,
                   low=config.precision != "fp32"),
              dict(params=[], muon=False, share=0.5 if muon else 1.0, weight_decay=0.0)]
    for name, p in model.named_parameters():
        is_matrix = p.dim() == 2 and ("blocks." in name or not muon)
        if p.requires_grad:
            groups[0 if is_matrix else 1]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    for group in groups if config.cuda_graph else ():
        # a graph repeats what it saw: only what is in a tensor can change; each group has a rate
        group["lr"] = torch.tensor(config.learning_rate, device=model.device)
    return OPTIMIZERS[config.optimizer].build(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True,
        capturable=config.cuda_graph)


def set_rate(optimizer, rate):
    """Give each group its share of the learning rate."""
    for group in optimizer.param_groups:
        own = rate * group["share"]
        group["lr"] = group["lr"].fill_(own) if torch.is_tensor(group["lr"]) else own


def tuning_rate(config, n_embd):
    """The learning rate that suits what is tuned: wider models want less (arXiv:2203.03466); Muon's
    steps have a length of their own."""
    rate = RATES[config.tune.partition(":")[0]]
    return 3 * rate if config.optimizer == "muon" else rate * min(1.0, 128 / n_embd)


def clip_gradients(model, grad_clip, mesh=None):
    """Shorten the gradient of all weights to at most grad_clip; -> its length before. A pipeline's
    stages each have some of the weights, and the last a tied head, which the first counts."""
    stage, n_stages = part(mesh, "pp")
    norm = whole(torch.nn.utils.get_total_norm([
        p.grad for name, p in model.named_parameters() if p.grad is not None
        and not (stage and model.config.tied and name == "lm_head.weight")]))
    if n_stages > 1:
        dist.all_reduce(norm := norm.square(), group=mesh.get_group("pp"))
        norm = norm.sqrt()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip or math.inf, norm)
    return norm


def to_device(batch, model):
    """A batch of the loader as tensors on the model's device."""
    batch = [torch.from_numpy(ids) for ids in batch]
    for ids, lowest in zip(batch, (0, -1)):
        check_ids(ids, model.config.vocab_size, lowest)
    return [ids.to(model.device, non_blocking=True) for ids in batch]


def micro_batches(batches, n, model, progress=1.0, curriculum=0.0):
    """Yield the next n batches of a loader; in the first `curriculum` of a run with their rows cut
    into 8, 4, then 2: arXiv:2108.06084."""
    parts = 8 >> int(3 * progress / curriculum) if progress < curriculum else 1
    for _ in range(n):
        batch = to_device(next(batches), model)
        yield [ids.reshape(len(ids) * parts, -1) for ids in batch] if parts > 1 else batch


def batch_loss(model, x, y, segments=None):
    """-> (the mean loss of a batch in nats, the share of its targets that count), tensors"""
    _, loss = model(x, y, segments=segments)
    return loss, (y != -1).float().mean()


def add_gradients(run, model, pairs, n):
    """Add up the gradients of n batches; processes exchange them once, at the last."""
    total = counted = 0.0
    for i, batch in enumerate(pairs, 1):
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP's
            model.set_requires_gradient_sync(i == n)
        waits = hasattr(model, "no_sync") and i < n  # DDP's
        with model.no_sync() if waits else contextlib.nullcontext():
            loss, share = batch_loss(model, *batch)
            # gradients add up over the passes of a step; we want their mean over what counts
            run.scaler.scale(loss * share / n).backward()
        total, counted = total + loss.detach() * share / n, counted + share / n
    return total, counted, len(batch) == 3


def through_stages(run, act, x, y, segments=None):
    """Let a batch flow through a pipeline, which act steps or evaluates -> its mean loss."""
    (stage, n_stages), losses = part(run.mesh, "pp"), []
    options = dict(ids=x) if segments is None else dict(ids=x, segments=segments)
    last = dict(target=y, losses=losses) if stage == n_stages - 1 else {}
    act(*[x] * (stage == 0), **options, **last)
    zero = run.scaler.scale(torch.zeros((), device=x.device))  # all stages have a scale then
    total = sum(losses, zero).detach() / run.scaler.get_scale()
    dist.all_reduce(total, group=run.mesh.get_group("pp"))
    return total


def add_gradients_in_stages(run, model, pairs, n):
    """add_gradients() where the model is a stage of a pipeline."""
    x, y, *segments = [torch.cat(rows) for rows in zip(*pairs)]
    total = through_stages(run, run.schedule.step, x, y, *segments)
    return total, (y != -1).float().mean(), bool(segments)


def add_tied(run):
    """Where head and embedding share a matrix that two stages of a pipeline have: its gradient."""
    stage, n_stages = part(run.mesh, "pp")
    if n_stages > 1 and run.model.config.tied and stage in (0, n_stages - 1):
        p = run.model.lm_head.weight if stage else run.model.transformer.wte.weight
        mine = getattr(p.grad, "_local_tensor", p.grad)
        other, peer = torch.empty_like(mine), 0 if stage else n_stages - 1
        for work in dist.batch_isend_irecv([
                dist.P2POp(act, w, group=run.mesh.get_group("pp"), group_peer=peer)
                for act, w in ((dist.isend, mine), (dist.irecv, other))]):
            work.wait()
        mine += other


def build_schedule(run, stage, n):
    """torch's schedule for n micro-batches through the stages of a pipeline. arXiv:1811.06965 and,
    in which fewer of them wait for backward, 2104.04473."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
    kind = ScheduleGPipe if run.config.pp_schedule == "gpipe" else Schedule1F1B

    def loss(x, y):
        return run.scaler.scale(run.model.mean_loss(x, y) * (y != -1).float().mean() / n)

    return kind(PipelineStage(stage, *part(run.mesh, "pp"), run.model.device,
                              group=run.mesh.get_group("pp")), n, loss, scale_grads=False)


def gradients(run, model, pairs, n, grad_clip):
    """Gradients on n batches, (x, y) or (x, y, segments), clipped -> (mean loss in nats, length of
    the gradient), tensors."""
    add_up = add_gradients_in_stages if run.schedule else add_gradients
    total, counted, differs = add_up(run, model, pairs, n)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    unused = [name for name, p in trained.items() if p.grad is None]
    if unused and dist.is_initialized():  # which would wait for them in vain
        raise ValueError(f"{unused[0]} got no gradient: forward must use it, or leave it out")
    for p in trained.values():  # under tensor parallelism each process has a part of the sum
        if getattr(p.grad, "placements", None) != getattr(p, "placements", None):
            p.grad = p.grad.redistribute(placements=p.placements)
    add_tied(run)
    run.scaler.unscale_(run.optimizer)
    if differs:  # from batch to batch in how much counts
        counted, = average([max(float(counted), 1e-9)], run.model.device)
        total = total / counted
        torch._foreach_div_([p.grad for p in trained.values() if p.grad is not None], counted)
    return total, clip_gradients(run.model, grad_clip, run.mesh)


def update(run):
    """Let the optimizer take its step, unless fp16's gradients overflowed."""
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()


def take_step(run, model, xs, ys, grad_clip):
    """A whole step: gradients, clip, update -> (mean loss, length of the gradient)."""
    results = gradients(run, model, zip(xs, ys), len(xs), grad_clip)
    update(run)
    return results


def validation_loss(model, shards, config, rank=0, world_size=1, loss_of=batch_loss):
    """Mean loss in nats over the first eval_sequences sequences of the validation split, or all."""
    loader = find_loader(shards, model.config)(shards, 1, model.config.block_size, split="val")
    rows = config.micro_batch_size if config.pp == 1 else config.batch_size // world_size
    n, total, counted = min(config.eval_sequences, loader.n_blocks), 0.0, 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, n, world_size * rows):  # as many passes on all processes
            own = range(n)[first + rank:first + world_size * rows:world_size]
            batch = to_device(loader.batch([loader.block(i) for i in own or [0]]), model)
            loss, share = loss_of(model, *batch)
            total += len(own) * (loss * share).item()
            counted += len(own) * share.item()
    model.train()
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP's, which may keep what it has put together
            module.reshard()
    total, counted = average([total, counted], model.device)
    return total / counted


def loss_in_stages(run, model, x, y, *segments):
    """batch_loss() by a pipeline, which wants as many rows as in training."""
    more = run.config.batch_size // part(run.mesh, "dp")[1] - len(x)
    x, *segments = [torch.cat((w, w[:1].expand(more, -1))) for w in (x, *segments)]
    share = (y != -1).float().mean()
    y = torch.cat((y, y.new_full((more, y.size(1)), -1)))
    return through_stages(run, run.schedule.eval, x, y, *segments) / (y != -1).float().mean(), share


# -----------------------------------------------------------------------------
# The run folder, and what is done before the first step.


@dataclass
class Progress:
    """How far a run has come. Batches, dropout and samples depend on the seed and step alone."""
    step: int = 0               # optimizer steps, skipped ones included
    sequences: int = 0          # sequences read, over all processes: where the loader stands
    elapsed: float = 0.0        # seconds trained, over all sessions
    start_step: int = 0         # where the learning rate's schedule began: 0, or --rewarm
    start_elapsed: float = 0.0
    best_step: int = 0          # the step with the lowest validation loss so far
    best_loss: float = 1e9      # that loss; before the first one above all
    val_loss: float | None = None  # measured at this very step
    bad: int = 0                # steps with a loss that is not finite, in a row until now
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
    prompt: list = ()               # ids that a sample goes on with
    n_parameters: int = 0           # of the whole model, which processes may share
    flops_per_token: float = 0.0
    mesh: object = None             # the processes, where there are several
    called: torch.nn.Module = None  # what of them is called in the model's place
    schedule: object = None         # of a pipeline's stages


def new_run(folder, model, config, device):
    """A Run that has taken no step."""
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.precision == "fp16")
    return Run(folder=Path(folder), model=model, optimizer=build_optimizer(model, config),
               scaler=scaler, config=config)


def is_split(run):
    """Whether this process has only a part of the model."""
    return run.mesh and (run.config.parallel == "fsdp" or run.config.tp * run.config.pp > 1)


def named_parts(model):
    """{name: parameter} of what this process has of a model, as in a checkpoint: where the head is
    tied, the last stage of a pipeline has a copy of the table."""
    return {"transformer.wte.weight" if model.config.tied and name == "lm_head.weight" else name: p
            for name, p in model.named_parameters()}


def named_state(run):
    """{name: tensor} of what this process has of the weights and of the optimizer's state."""
    found = {}
    for name, p in named_parts(run.model).items():
        found |= {name: p.detach()} | {
            f"optimizer.{name}.{what}": w for what, w in run.optimizer.state[p].items()}
    return found


def gather(run):
    """named_state() of all processes, whole, in the main memory of rank 0; {} elsewhere."""
    stage, n_stages = part(run.mesh, "pp")
    keeps, found = part(run.mesh, "dp")[0] == part(run.mesh, "tp")[0] == 0, {}
    for name, tensor in named_state(run).items():
        tensor = whole(tensor)  # by all processes together, one after another
        if keeps:
            found[name] = tensor.to("cpu", copy=True)
    if keeps and n_stages > 1:
        parts = [None] * n_stages if stage == 0 else None
        dist.gather_object(found, parts, group=run.mesh.get_group("pp"), group_dst=0)
        found = {name: w for state in parts or () for name, w in state.items()}
    return found


def sharded(folder):
    """The checkpoints of a run of which each process wrote its part, {step: folder}."""
    return {int(path.stem[5:]): path for path in sorted(Path(folder).glob("step_*.shards"))}


def saved_steps(folder):
    """The checkpoints of a run, in one file or in shards, {step: path}."""
    return checkpoints(folder) | sharded(folder)


def save_shards(run, keep):
    """Write a checkpoint part by part, as torch's distributed one in safetensors, on all ranks;
    chapters/gather.py makes it the usual file."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    path = run.folder / f"step_{run.step:06d}.shards"
    temporary = path.with_suffix(".unfinished")
    save(named_state(run), storage_writer=HuggingFaceStorageWriter(
        str(temporary), save_distributed=True))
    if dist.get_rank() == 0:
        write_json(temporary / "progress.json", dict(
            config=asdict(run.model.config), progress=progress_of(run),
            files={file.name: file.stat().st_size for file in temporary.glob("*.safetensors")}))
        for old in [path, *[*sharded(run.folder).values()][:1 - keep or None]]:
            shutil.rmtree(old, ignore_errors=True)
        os.replace(temporary, path)
    dist.barrier()


def read_shards(path):
    """-> (GPTConfig, the values of Progress) that save_shards wrote; ValueError unless all files
    are there, in their size."""
    saved = read_json(path / "progress.json")
    with reading(path / "progress.json"):
        config, state, files = saved["config"], saved["progress"], dict(saved["files"])
    for name, size in files.items():
        if not (path / name).exists() or (path / name).stat().st_size != size:
            raise ValueError(f"{path} lacks {name}, or some of it: copy all files of all machines")
    return check_fields(GPTConfig, config, path), state


def progress_of(run):
    """The fields of Progress."""
    return {f.name: getattr(run, f.name) for f in fields(Progress)} | dict(
        loss_scale=run.scaler.state_dict())


def snapshot(run):
    """What a checkpoint holds, copied to main memory: (model, optimizer's tensors, progress). To
    be asked on all ranks; those that gave their parts to rank 0 have no model."""
    if is_split(run):
        found = gather(run)
        weights = {key: found.pop(key) for key in [*found] if not key.startswith("optimizer.")}
        model, tensors = weights and from_weights(run.model.config, weights, "the run"), found
        if model:
            model.use("torch")
    elif dist.is_initialized() and dist.get_rank() > 0:
        model, tensors = None, {}
    else:
        copies = {id(p): torch.nn.Parameter(p.detach().to("cpu", copy=True)) if p.requires_grad
                  else p for p in run.model.parameters()}  # those that are frozen never change
        names = {p: name for name, p in run.model.named_parameters()}
        tensors = {f"optimizer.{names[p]}.{what}": tensor.to("cpu", copy=True)
                   for p, state in run.optimizer.state.items() for what, tensor in state.items()}
        model = copy.deepcopy(run.model, copies)
    return model, tensors, progress_of(run)


def save_run(folder, state, keep=2):
    """Write a snapshot, read it back, then remove older ones: not the last `keep`, nor the best."""
    model, tensors, progress = state
    path = Path(folder, f"step_{progress['step']:06d}.safetensors")
    with replacing(path) as file:
        save_model(model, file, tensors, **progress)
    read_safetensors(path, only_check=True)  # ValueError if it is not on the disk as it was written
    found = list(checkpoints(folder).values())
    best, _ = first_whole(reversed(found), by_loss=True)
    for old in set(found[:-keep]) - {best}:
        old.unlink()


def load_run(folder, config, device, ready=lambda model: None):
    """The Run in a folder as its newest whole checkpoint left it, on any number of processes, over
    which ready(model) splits it; ValueError if it does not fit."""
    shards, tensors = sharded(folder), {}
    in_shards = max(shards, default=-1) > max(checkpoints(folder), default=-1)
    if in_shards:
        path = shards[max(shards)]
        shape, state = read_shards(path)
        model = GPT(shape).to(device)
    else:
        path = pick_checkpoint(folder, "last")
        model, state = load_model(path, device)
        tensors = state.pop("tensors")
        if not model.tuning:
            merge(model)  # ValueError if it is quantized
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ready(model)
    progress, run = check_fields(Progress, state, path), new_run(folder, model, config, device)
    run.__dict__.update(progress.__dict__)
    run.scaler.load_state_dict(run.scaler.state_dict() | progress.loss_scale)
    params, state = named_parts(model), run.optimizer.state
    if in_shards:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load
        reader = HuggingFaceStorageReader(str(path))
        tensors = {key: torch.zeros(found.size) for key, found
                   in reader.read_metadata().state_dict_metadata.items() if "optimizer." in key}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        if name not in shapes or tensor.shape not in ((), shapes[name]):
            raise ValueError(f"{path}: {key} of shape {tuple(tensor.shape)} fits no parameter")
        if name in params:
            tensor = tensor.float()
            state[params[name]][kind] = shared(tensor, params[name]) if tensor.dim() else tensor
    if in_shards:
        with warnings.catch_warnings(action="ignore"):  # one process is told that it is one
            load(named_state(run), storage_reader=reader)
    for group in run.optimizer.param_groups:  # those of a group are treated alike
        if tensors and len({frozenset(state[p]) for p in group["params"]}) > 1:
            raise ValueError(f"{path} lacks a part of the state of optimizer={config.optimizer}: "
                             "leave out --optimizer")
    return run


def read_log(folder):
    """log.jsonl as a list of dicts, one a step, each with a step and a loss, which is None where it
    was not finite. Lines that are no such row, as one that was cut off, are left out."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            row = json.loads(line, parse_constant=lambda word: None)  # NaN, for one
            numbers = [row[name] for name in ("loss", "lr", "grad_norm", "val_loss", "elapsed",
                                              "tokens_per_second") if row.get(name) is not None]
            if type(row["step"]) is int and "loss" in row and all(abs(x) < 1e99 for x in numbers):
                rows.append(row)
    return rows


def smooth(values, n=20):
    """The mean of about n values around each, fewer towards the ends, so that no curve lags."""
    sums, last = [0, *accumulate(values)], len(values) - 1
    reach = [min(n // 2, i, last - i) for i in range(len(values))]
    return [(sums[i + k + 1] - sums[i - k]) / (2 * k + 1) for i, k in enumerate(reach)]


def draw_loss(folder):
    """loss.png from log.jsonl: the loss of each step, its running mean, the validation losses."""
    from matplotlib.figure import Figure  # not pyplot: a notebook that trains goes on showing plots
    rows = [row for row in read_log(folder) if row["loss"] is not None]
    if not rows:
        return
    steps, losses = zip(*[(row["step"], row["loss"]) for row in rows])
    means, checks = smooth(losses), [row for row in rows if row.get("val_loss")]
    axes = Figure(figsize=(8, 4.5), dpi=120).subplots()
    axes.plot(steps, losses, color="#bbccdd", linewidth=0.8, label="training, each step")
    axes.plot(steps, means, color="#4477aa", linewidth=2, label="training, mean of 20 steps")
    axes.plot([row["step"] for row in checks], [row["val_loss"] for row in checks], "o-",
              color="#cc6633", label="validation")
    later = [*means[len(means) // 10:], *(row["val_loss"] for row in checks)]
    space = (max(later) - min(later)) / 10 or 0.1  # the first fall would hide a rise at the end
    axes.set(title=f"{Path(folder).name}: loss {mean(losses[-10:]):.3f} in the last 10 of "
                   f"{steps[-1]:,} steps", xlabel="step", ylabel="loss (nats per token)",
             ylim=(min(later) - space, max(later) + space))
    axes.legend(frameon=False)
    with replacing(Path(folder) / "loss.png") as file:
        axes.figure.savefig(file, format="png", bbox_inches="tight")


class Recorder(contextlib.AbstractContextManager):
    """Writes log and checkpoints of a run, these beside training. What cannot be written is said
    once and tried again with the next: no full disk ends a run."""

    def __init__(self, folder, keep, say):
        self.folder, self.keep, self.say, self.rows, self.troubles = folder, keep, say, b"", {}
        self.worker = ThreadPoolExecutor(1)
        self.waiting = deque(maxlen=1)  # a slow disk: a snapshot that still waits gives way

    def attempt(self, what, write, *arguments):
        try:
            write(*arguments)
        except Exception as error:  # whatever it is, training goes on
            if what not in self.troubles:
                self.say(f"warning: {what} could not be saved in {self.folder} ({error}); training "
                         "goes on, the next save tries again")
            self.troubles[what] = error
        else:
            if self.troubles.pop(what, None):
                self.say(f"{what} could be saved again in {self.folder}")

    def log(self, row):
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in row.items()}  # JSON has no word for the others
        self.rows += json.dumps(finite).encode() + b"\n"
        self.attempt("log.jsonl", self.write_rows)

    def write_rows(self):
        with open(self.folder / "log.jsonl", "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if file.write(self.rows) < len(self.rows):  # all of them or none
                file.truncate(size)
                raise OSError("no room is left")
        self.rows = b""

    def save(self, state):
        self.waiting.append(state)
        self.worker.submit(self.write_waiting)

    def draw(self):
        self.worker.submit(self.attempt, "loss.png", draw_loss, self.folder)

    def write_waiting(self):
        if self.waiting:  # the job before may have taken it
            self.attempt("a checkpoint", save_run, self.folder, self.waiting.pop(), self.keep)
            self.attempt("loss.png", draw_loss, self.folder)

    def __exit__(self, kind, error, trace):
        """Wait for what is being saved; OSError if the last checkpoint could not be."""
        self.worker.shutdown(cancel_futures=kind is KeyboardInterrupt)
        trouble = self.troubles.get("a checkpoint")
        if trouble and kind is None:
            raise OSError(f"the end of the run could not be saved in {self.folder}, only what its "
                          f"last checkpoint holds is there ({trouble})")


def run_folder(config, shards=None):
    """Where the run is or will be: --out, or the newest run to resume, or runs/ and a free name."""
    if config.resume:
        folder = Path(config.out) if config.out else newest_run()
        return folder if saved_steps(folder) else pick_checkpoint(folder)  # says what is missing
    folder, n = Path(config.out or f"runs/{shards.name}"), 2
    while not config.out and (folder / "config.json").exists():
        folder, n = Path(f"runs/{shards.name}-{n}"), n + 1
    return folder


def find_shards(config, rank, say, tokenizer=None):
    """-> the folder of token shards: --data itself if it is one, else made from it by rank 0."""
    folder = [rank == 0 and (Path(config.data) if is_shards(config.data) else prepare(
        config.data, None, config.vocab_size, tokenizer, say=say))]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, src=0)
    return folder[0]


def check_same(what, value):
    """ValueError if the processes differ in a value, as machines do that share no disk."""
    if dist.is_initialized():
        dist.all_gather_object(found := [None] * dist.get_world_size(), value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(f"rank {rank} has {what} {other!s:.12}, rank 0 {found[0]!s:.12}: "
                                 "all machines need the same --data and the same --out")


def find_loader(shards, shape):
    """The class of the loader that reads a folder of shards for a model of this shape."""
    if shape.n_classes:
        return ClassLoader
    return ChatLoader if read_card(shards).options.get("chats") else TokenLoader


def split_batch(config, n_copies):
    """-> (sequences in a forward pass of one copy of the model, forward passes in a step)."""
    micro = max(1, min(config.micro_batch_size, config.batch_size // (n_copies * config.pp)))
    if config.batch_size % (micro * n_copies):
        least = micro * n_copies
        raise ValueError(f"batch_size={config.batch_size} is no multiple of {least}, {micro} "
                         f"sequences on each of {n_copies} processes: take another, such as "
                         f"{math.ceil(config.batch_size / least) * least}")
    n_passes = config.batch_size // (micro * n_copies)
    if n_passes < config.pp:
        raise ValueError(f"batch_size={config.batch_size} gives {n_passes} micro-batches to "
                         f"pp={config.pp} stages, which need one each: take a larger one")
    return micro, n_passes


def last_step(config, n_tokens, tokens_per_step):
    """The step at which the run ends at the latest; infinite if only the clock ends it."""
    limits = [config.max_steps, math.ceil(config.epochs * n_tokens / tokens_per_step),
              math.ceil(config.tokens / tokens_per_step)]
    return min(filter(None, limits), default=math.inf)


def check_model(shape, config):
    """ValueError for a model that this loop cannot train."""
    if shape.cross or not shape.causal:
        raise ValueError(f"architecture={shape.architecture} does not predict the next token: "
                         "take gpt2 or modern; chapters/05_transformer.ipynb trains the others")
    if config.curriculum and shape.block_size % 8:
        raise ValueError(f"curriculum cuts into 8 parts: block_size={shape.block_size} is no "
                         "multiple of 8")


def check_resume(run, shape, card, say):
    """ValueError with all that differs in model, tokenizer or data; other options may change."""
    before, _, data = read_config(run.folder / "config.json")
    old, new = asdict(run.model.config) | asdict(before), asdict(shape) | asdict(run.config)
    changed = {name: f"{name}={value} (it has {old[name]})" for name, value in new.items()
               if value != old[name] and name not in ("data", "out", "config", "resume")}
    fixed = (*asdict(shape), "size", "init", "optimizer", *(f.name for f in fields(TuneConfig)))
    wrong = [changed[n] for n in fixed if n in changed]
    if Tokenizer.load(run.folder / "tokenizer.json").hash() != run.tokenizer.hash():
        wrong.append("another tokenizer")
    if card.fingerprint != data["fingerprint"]:
        wrong.append(f"another corpus, {run.shards}")
    if wrong:
        raise ValueError(f"{run.folder} cannot go on with {'; '.join(wrong)}: leave these out, or "
                         "start a new run")
    if changed:
        say(f"goes on at step {run.step} with {', '.join(changed.values())}")


def reshaped(model, config):
    """A model of another GPTConfig with the same weights. New tokens get embeddings distributed as
    the others are; a head for other classes starts anew."""
    new, weights = GPT(config).to(model.device), dict(model.named_parameters())
    if config.n_classes != model.config.n_classes:
        weights.pop("lm_head.weight", None)
    for name, w in new.named_parameters():
        if name in weights:
            old = weights[name].detach()[:len(w)]
            w.data[:len(old)] = old
            if len(old) < len(w):
                w.data[len(old):] = old.mean(0) + old.std(0) * torch.randn_like(w[len(old):])
    return new


def tell_apart(head, unseen):
    """Draw the rows of a head (V, C) anew that are like the one of a token that no text had: one
    that starts at zero moves them together, and a frozen one could never choose between them."""
    w = head.detach()
    alike = torch.nn.functional.cosine_similarity(w, w[unseen:unseen + 1]) > 0.99     # (V,)
    if 1 < alike.sum() < len(w):
        w[alike] = w[~alike].mean(0) + w[~alike].std(0) * torch.randn_like(w[alike])


def start_model(base, config, shape, tokenizer, loader, folder, say):
    """The model of --init in this shape, tuned as --tune says. What it was before goes to a file of
    the folder, where there is one: checkpoints hold only what is trained."""
    model = base if shape == base.config else reshaped(base, shape)
    if loader is ChatLoader:
        tell_apart(model.lm_head.weight, tokenizer.special["<|tool|>"])
    if folder and config.tune != "full":
        with replacing(folder / "base.safetensors") as file:
            save_model(model, file)
        model.base = read_header(folder / "base.safetensors")[1]["sha256"]
    n_trained = tune(model, config)
    say(f"--tune={config.tune} trains {n_trained:,} of {model.n_parameters():,} parameters")
    return model


def prepare_data(config, shape, known, rank, say):
    """-> (the folder of shards, the same on all machines, its tokenizer, the class of its loader);
    ValueError if a model of this shape, the options or --init's tokenizer do not fit them."""
    shards = find_shards(config, rank, say, known)
    if from_torchrun("LOCAL_RANK") == 0:
        check_shards(shards, known=known_hashes(shards))
    check_same("corpus", read_card(shards).fingerprint)
    tokenizer, loader = load_tokenizer(shards / "tokenizer.json"), find_loader(shards, shape)
    loader(shards, 1, shape.block_size, split="val")  # ValueError if that is too short
    if known and tokenizer.hash() not in (known.hash(), for_chats(known).hash()):
        raise ValueError(f"{shards} was made with another tokenizer than {config.init}'s: make it "
                         f"again, data.py SOURCE --tokenizer={config.init}/tokenizer.json")
    n_labels = len(labels := read_card(shards).labels)
    if shape.n_classes and not shape.n_classes == n_labels > 1:
        raise ValueError(f"n_classes={shape.n_classes}: {shards} has {n_labels} different labels, "
                         f"{', '.join(labels):.200}: a classifier needs two or more, and "
                         "--n_classes=0 trains on what is written")
    if loader is not TokenLoader and (config.curriculum or config.cuda_graph):
        raise ValueError("--curriculum and --cuda_graph are for texts, not chats: leave them out")
    return shards, tokenizer, loader


def prepare_model(model, config, mesh, dtype):
    """Choose a model's kernels and split it over the processes -> fields of its Run."""
    micro, _ = split_batch(config, part(mesh, "dp")[1])
    names = [model.use(config.kernels, dtype, config.recompute, batch_size=micro)]
    if mesh:
        dist.broadcast_object_list(names, src=0)  # what was the fastest there
        model.use(names[0], dtype, config.recompute)
    fits = names[0] in ("torch", "cuda") and config.precision != "fp16" and not config.skip_spikes
    if config.cuda_graph and not (fits and model.device.type == "cuda" and not mesh
                                  and accelerator()):
        raise ValueError("--cuda_graph needs chapters/kernels.py, one GPU, fp32 or bf16, torch or "
                         "cuda kernels, and no --skip_spikes: leave it out")
    return dict(n_parameters=model.n_parameters(), flops_per_token=model.flops_per_token(),
                mesh=mesh, config=replace(config, kernels=names[0]),  # a resumed run takes the same
                called=parallelize(model, config, mesh))


def prepare_run(config, model_config, say, stack):
    """Data and model, new or resumed, that fit -> Run; the ExitStack lets go of it at the end."""
    shape, base, known = model_config or first_shape(config), None, None
    check_model(shape, config)
    check_layout(config, shape, from_torchrun("WORLD_SIZE"))
    rank, mesh, device = start_processes(config)
    copy_rank, n_copies = part(mesh, "dp")
    micro, n_passes = split_batch(config, n_copies)
    if config.init and config.resume:
        known = Tokenizer.load(run_folder(config) / "tokenizer.json")
    elif config.init:
        base, known = load_finished(config.init, device=device)
        merge(base)
    if base and shape.position == "learned" and shape.block_size > base.config.block_size:
        raise ValueError(f"block_size={shape.block_size} is above {base.config.block_size}, for "
                         "which --init has learned positions: leave it out")
    n_shares = config.tp * config.pp * (n_copies if config.parallel == "fsdp" else 1)
    check_memory(shape, config, micro, device, n_shares)  # before the data is made
    shards, tokenizer, loader = prepare_data(config, shape, known, rank, say)
    shape = replace(shape, vocab_size=tokenizer.n_vocab)
    stack.enter_context(memory_explained(micro, shape.block_size, device))
    precision, dtype = pick_precision(config.precision, device)
    config = replace(config, precision=precision, learning_rate=(
        config.learning_rate or tuning_rate(config, shape.n_embd)))
    torch.manual_seed(config.seed)
    folder = claim_folder(config, shards, stack) if rank == 0 else run_folder(config, shards)
    made = dict(tokenizer=tokenizer, shards=shards)

    def ready(model):
        made.update(prepare_model(model, config, mesh, dtype))

    if config.resume:
        run = load_run(folder, config, device, ready)
    else:
        model = (start_model(base, config, shape, tokenizer, loader, rank == 0 and folder, say)
                 if base else GPT(shape).to(device))
        ready(model)
        run = new_run(folder, model, config, device)
    vars(run).update(made)
    check_same("step", run.step)
    if config.rewarm:
        run.start_step, run.start_elapsed = run.step, run.elapsed
    run.schedule = build_schedule(run, run.called, n_passes) if config.pp > 1 else None
    run.batches = loader(shards, micro, shape.block_size, copy_rank, n_copies, config.seed,
                         run.sequences // (micro * n_copies), shuffle=config.shuffle)
    if loader is ChatLoader:  # of the first chat to validate on, up to where the assistant begins
        x, y, _ = loader(shards, 1, shape.block_size, split="val").block(0)
        run.prompt = x[:(y != -1).argmax() + 1].tolist()
    if config.batch_size > max(1024, run.batches.n_blocks):
        raise ValueError(f"batch_size={config.batch_size} is more than the data, which has "
                         f"{run.batches.n_blocks:,} sequences: take at most so many")
    if rank == 0:
        begin_folder(run, shape, say)
    return run


@contextlib.contextmanager
def locked(folder):
    """Keep other processes out of a folder, as long as this one lives; ValueError if one is in."""
    with open(Path(folder, ".lock"), "ab") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder} is in use by another process: wait for its end") from None
        except OSError:  # some network file systems know no locks
            pass
        yield


def claim_folder(config, shards, stack):
    """Make and lock the folder of a run -> its Path."""
    folder = run_folder(config, shards)
    if saved_steps(folder) and not config.resume:
        raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if not (config.resume or config.out):
        try:
            open(folder / "config.json", "x").close()
        except FileExistsError:  # another run took this name at this moment
            return claim_folder(config, shards, stack)
    stack.enter_context(locked(folder))
    stack.callback(leave_nothing, folder)
    return folder


def begin_folder(run, shape, say):
    """Check a run that is resumed, and write the first files of its folder."""
    config, card = run.config, read_card(run.shards)
    n_bytes = 8 * sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    if n_bytes > (n_free := shutil.disk_usage(run.folder).free):
        raise ValueError(f"{run.folder}: a checkpoint takes {n_bytes / 1e9:.1f} GB or more, and "
                         f"{n_free / 1e9:.1f} GB are free: make space, or choose another --out")
    if config.resume:
        check_resume(run, shape, card, say)
    rows = [json.dumps(row) + "\n" for row in read_log(run.folder) if row["step"] <= run.step]
    with replacing(run.folder / "log.jsonl") as file:  # what came after the checkpoint comes again
        file.write("".join(rows).encode())
    for unfinished in run.folder.glob("*.part"):  # of an interrupted save
        unfinished.unlink()
    run.tokenizer.save(run.folder / "tokenizer.json")
    write_json(run.folder / "config.json", dict(
        model=asdict(run.model.config), train=asdict(run.config),
        data=dict(path=str(run.shards), **asdict(card))))


def leave_nothing(folder):
    """Remove what begin_folder wrote for a run that took no step, so that its name is free."""
    if not (saved_steps(folder) or read_log(folder)):
        with contextlib.suppress(OSError):  # Windows keeps what is open; not all files may be ours
            for name in ("config.json", "tokenizer.json", "base.safetensors", "log.jsonl", ".lock"):
                Path(folder, name).unlink(missing_ok=True)
            folder.rmdir()


# -----------------------------------------------------------------------------
# The loop, and what it asks at each step.


def is_spike(value, past, deviations):
    """Whether a value lies so many deviations above past ones; a few wild ones move no median."""
    middle = median(past)
    spread = 1.4826 * median(abs(x - middle) for x in past)  # a normal's standard deviation
    return value > middle + deviations * max(spread, abs(middle) / 100)


def why_skip(run, loss, norm, deviations):
    """Why a step is to be skipped, or ""; to be asked once a step, with the same on all ranks."""
    if math.isfinite(loss) and math.isfinite(norm):
        spike = deviations and len(run.recent) >= 20 and any(
            is_spike(value, past, deviations)
            for value, past in zip((loss, norm), zip(*run.recent)))
        run.bad, run.recent = 0, [*run.recent, [loss, norm]][-100:]
        return "spike" if spike else ""
    if math.isfinite(loss) and run.scaler.is_enabled() and run.scaler.get_scale() >= 1:
        return "fp16 overflow"  # the scaler halves what the loss is multiplied with
    run.bad += 1
    return "not finite"


def give_up(run, rate, recorder):
    """ValueError after too many bad steps in a row, with the run saved as it was before them."""
    bad, run.bad, saved = run.bad, 0, "no checkpoint is newer, as the weights are bad, too"
    state = snapshot(run)
    if recorder and state[0].is_finite():
        saved = "the weights from before them are saved"
        recorder.save(state)
    raise ValueError(f"the loss or its gradient is not finite at step {run.step}, {bad} in a row; "
                     f"{saved}: go on with --resume and a --learning_rate below {rate:.1e}; python "
                     f"-m chapters.doctor {run.folder} says more")


def no_better(run, val_loss, say):
    """Note a validation loss, and say if it is a bad one; -> whether --patience ends the run."""
    config, shape = run.config, run.model.config
    if math.isfinite(val_loss):
        run.val_loss = val_loss
        run.best_loss, run.best_step = min((run.best_loss, run.best_step), (val_loss, run.step))
    high = min(1.03 * run.best_loss, math.log(shape.n_classes or shape.vocab_size) + 0.1)
    if val_loss > high:  # the best, or what guessing costs, and a little more
        say(f"that is worse than {high:.2f}: python -m chapters.doctor {run.folder}")
    ends = 0 < config.patience <= (run.step - run.best_step) / config.eval_every
    if ends:
        say(f"no lower validation loss since step {run.best_step}: --patience ends it")
    return ends


def share_done(config, n_steps, step, elapsed):
    """The share of a run that is done: by its steps or by the clock, whichever is further."""
    by_clock = elapsed / (60 * config.minutes) if config.minutes else 0.0
    return min(1.0, max(step / n_steps, by_clock))


def rate_now(run, n_steps, progress):
    """The learning rate of the next step; --rewarm began the schedule anew at start_step."""
    start = share_done(run.config, n_steps, run.start_step, run.start_elapsed)
    progress = (progress - start) / max(1e-9, 1 - start)
    return learning_rate(run.step - run.start_step, run.config, progress)


def announce_resumed(run, n_steps, progress, say):
    """Say of a resumed run that it is finished, or that its learning rate jumps."""
    rate = rate_now(run, n_steps, progress)
    last = (read_log(run.folder) or [{}])[-1].get("lr")
    if progress == 1:
        say("this run is finished: a larger --max_steps, --epochs or --minutes trains on")
    elif last and rate > 2 * last and not run.config.rewarm:
        say(f"the learning rate jumps from {last:.1e} to {rate:.1e}, as the schedule is longer or "
            "another now: --rewarm begins a new one, with a warm-up")


def announce(run, n_steps, row):
    """What a run is going to be, as a row of its log lets expect."""
    config, model, n_tokens = run.config, run.model, run.batches.n_tokens
    seconds = config.batch_size * run.batches.block_size / max(1, row["tokens_per_second"])
    n_steps = min(n_steps, 60 * config.minutes / seconds if config.minutes else math.inf)
    epochs = n_steps * config.batch_size * run.batches.block_size / n_tokens
    tried = "".join(f", {name} {1000 * s:.0f} ms a block" for name, s in model.trial.items())
    processes = (f", {dist.get_world_size()} processes with {torch.get_num_threads()} of the cores "
                 "each" if run.mesh and model.device.type == "cpu" else "")
    advice = ("; --warmup_steps is longer than that: the learning rate stays below its highest"
              if config.warmup_steps >= n_steps else
              "; a smaller --size or more --minutes would see more of them" if epochs < 0.5 else
              "; more than 8 teach little: give more text, or --dropout" if epochs > 8 else "")
    return (f"{run.n_parameters:,} parameters, in about {n_steps:,.0f} steps of {seconds:.2f} s"
            f" ({duration(n_steps * seconds)}) and {(row['memory'] or 0) / 1e9:.1f} GB\n"
            f"on {model.device}{processes}, {config.precision}, {config.kernels} kernels{tried}\n"
            f"it will see its {n_tokens:,} tokens {epochs:,.1f} times{advice}")


def duration(seconds):
    """Seconds as 12:34, 1:23:45, or days where there are several."""
    return (tqdm.format_interval(seconds) if seconds < 2 * 86400 else
            f"{seconds / 86400:,.0f} days" if seconds < 1e11 else "thousands of years")


def sample_lines(model, tokenizer, n_tokens, seed, prompt=()):
    """A few indented lines of what the model writes from nothing, or after ids."""
    model.eval()
    text = tokenizer.decode(prompt) + complete(model, tokenizer, prompt or "", temperature=0.8,
                                               max_new_tokens=n_tokens, top_k=50, seed=seed)
    model.train()
    return "\n".join("    | " + line for line in text.strip("\n").splitlines())


def progress_line(row, progress):
    """A row of the log, as it is shown in 80 columns; the time left is as the time taken."""
    left = duration(row["elapsed"] * (1 - progress) / progress)
    validation = f" | val {row['val_loss']:.4f}" if "val_loss" in row else ""
    skipped = f" | skipped: {row['skipped']} at {row['sequences']}" if "skipped" in row else ""
    return (f"step {row['step']:5d} | loss {row['loss']:.4f}{validation}{skipped} | lr "
            f"{row['lr']:.1e} | {row['tokens_per_second']:,} tok/s | {left} left")


def train(config, model_config=None, say=tqdm.write):
    """Train as config says; the model is model_config, or that of --size, or of the checkpoint that
    is resumed; say takes the lines to show. -> summarize()'s dict, None on all ranks but 0."""
    began, is_main = time.perf_counter(), from_torchrun("RANK") == 0
    say = say if is_main else lambda text: None
    if accelerator():  # to hand pages back and take them again can cost a third of a step
        accelerator().keep_freed_memory(config.low_memory)
    with contextlib.ExitStack() as stack:
        run = prepare_run(config, model_config, say, stack)
        config, batches, device = run.config, run.batches, str(run.model.device)
        rank, n_copies, T = batches.rank, batches.world_size, batches.block_size
        world_size = dist.get_world_size() if run.mesh else 1
        model, (_, n_passes) = run.called, split_batch(config, n_copies)
        loss_of = partial(loss_in_stages, run) if run.schedule else batch_loss
        validate = partial(validation_loss, run.model, run.shards, config, rank, n_copies, loss_of)
        whole_step = config.cuda_graph and accelerator().GraphedStep(
            lambda xs, ys: take_step(run, model, xs, ys, config.grad_clip))
        n_steps = last_step(config, batches.n_tokens, config.batch_size * T)
        peak_speed = (matmul_rate(run.model.device, run.model.dtype) * world_size
                      / run.flops_per_token)  # tokens per second
        before, first, said = run.elapsed, run.step, began

        progress, stopping = share_done(config, n_steps, run.step, run.elapsed), False
        announce_resumed(run, n_steps, progress, say)
        bar = stack.enter_context(tqdm(
            total=1.0, initial=progress, disable=QUIET["disable"] if is_main else True, leave=False,
            bar_format="{percentage:3.0f}% {bar:5} {desc}"))
        asked = stack.enter_context(stop_signals())
        recorder = is_main and stack.enter_context(Recorder(run.folder, config.keep_last, say))
        if run.mesh:
            stack.callback(watch(run, config.timeout).set)
        while progress < 1 and not stopping:
            start = time.perf_counter()
            torch.manual_seed(1_000_003 * run.step + config.seed + from_torchrun("RANK"))
            rate = rate_now(run, n_steps, progress)
            set_rate(run.optimizer, rate)
            pairs = micro_batches(batches, n_passes, run.model, progress, config.curriculum)
            loss, norm = (whole_step(*zip(*pairs)) if whole_step else
                          gradients(run, model, pairs, n_passes, config.grad_clip))
            run.elapsed = before + time.perf_counter() - began
            run.step, run.sequences = run.step + 1, run.sequences + config.batch_size
            progress = share_done(config, n_steps, run.step, run.elapsed)
            loss, norm, progress, stopping = average(
                [loss.item(), norm.item(), progress, len(asked)], device)
            row = dict(step=run.step, loss=loss, lr=rate, grad_norm=norm)
            if why := why_skip(run, loss, norm, config.skip_spikes):
                row |= dict(skipped=why, sequences=[run.sequences - config.batch_size,
                                                    run.sequences - 1])
                run.scaler.update(None if math.isfinite(norm) else run.scaler.get_scale() / 2)
                run.optimizer.zero_grad()
            elif not whole_step:  # which includes it
                update(run)
            speed = config.batch_size * T / (time.perf_counter() - start)
            peak_speed = max(peak_speed, speed)  # the product was slow: the machine was busy
            row |= dict(tokens_per_second=round(speed), mfu=round(speed / peak_speed, 3),
                        memory=peak_memory(device), elapsed=round(run.elapsed, 3))

            is_check, run.val_loss = run.step % config.eval_every == 0 or progress == 1, None
            if is_check:
                row["val_loss"] = validate()
                if no_better(run, row["val_loss"], say):
                    progress = 1.0
            if recorder:
                recorder.log(row)
            if run.bad and (run.bad >= config.bad_steps or whole_step):
                give_up(run, rate, recorder)
            state = None
            if (is_check or stopping) and config.checkpoint == "plain":
                state = snapshot(run)
            elif (is_check or stopping) and not run.bad:
                save_shards(run, config.keep_last)
            if not is_main:
                continue
            if is_check and not state:
                recorder.draw()
            if run.step == first + 2:  # the first step warms up
                say(announce(run, n_steps, row))
            line = progress_line(row, progress)
            bar.set_description_str(line, refresh=False)
            bar.update(progress - bar.n)
            if is_check or stopping or why or (bar.disable and time.perf_counter() - said > 10):
                say(line)
                said = time.perf_counter()
            if state and state[0].is_finite():
                recorder.save(state)
                if is_check and progress < 1 and not (why or run.model.config.n_classes):
                    shown = state[0] if is_split(run) else run.model
                    say(sample_lines(shown, run.tokenizer, config.sample_tokens, config.seed,
                                     run.prompt))
        if run.step == first and run.val_loss is None:  # it ended between two validations
            run.val_loss = validate()
    stopped = int(asked[0]) if asked else int(signal.SIGTERM) * bool(stopping)
    return summarize(run, time.perf_counter() - began, stopped) if is_main else None


def summarize(run, seconds, stopped):
    """What train() returns: losses in nats a token, None if not finite; the signal that stopped it
    or 0; in words what to ask the model, taken from the validation text."""
    rows, val = read_log(run.folder) or [{}], read_card(run.shards).val
    kind = type(run.batches)
    bits = kind is TokenLoader and run.val_loss and (
        run.val_loss / math.log(2) * val["tokens"] / val["bytes"])
    text = run.tokenizer.decode(run.prompt or read_split(run.shards, "val")[0][1:50].tolist())
    asked = regex.sub(r"<\|\w+\|>", " ", text.partition("<|assistant|>")[0])
    words = regex.findall(r"[^\W_]+" if kind is TokenLoader else r"[^\s\"$`\\!%]+", asked)
    return dict(folder=str(run.folder), step=run.step, loss=rows[-1].get("loss"), stopped=stopped,
                val_loss=run.val_loss, bits_per_byte=bits or None, seconds=seconds, kind=kind,
                device=str(run.model.device),
                tokens_per_second=round(median(row.get("tokens_per_second") or 0 for row in rows)),
                how=f"{run.model.device}, {run.config.precision}, {run.config.kernels} kernels",
                prompt=run.prompt, skipped=sum("skipped" in row for row in rows),
                words=" ".join(words[1:3] if kind is TokenLoader else words[:8])[:50])


def restarted(typed, typed_model):
    """The options typed, two dicts; after a crash, when torchrun starts all processes again, with
    --resume if there is a checkpoint to go on with."""
    env = os.environ.get
    if env("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return typed, typed_model
    if not typed.get("out"):
        raise ValueError("--max-restarts needs --out=FOLDER, so that a restart finds the run")
    many = env("LOCAL_WORLD_SIZE") != env("WORLD_SIZE")  # a healthy node counts no restart
    if many and env("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError("--max-restarts on several nodes needs the environment variable "
                         "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for each torchrun")
    if (many or env("TORCHELASTIC_RESTART_COUNT") != "0") and saved_steps(typed["out"]):
        typed = {name: typed[name] for name in typed if name != "config"} | dict(resume=True)
    return typed, typed_model


@contextlib.contextmanager
def one_voice():
    """Let one process say what all end with; to the others the loss of one is a ValueError."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if from_torchrun("RANK") > 0:
            time.sleep(10)  # if rank 0 has found the same, torchrun ends this process meanwhile
        if isinstance(error, (ValueError, OSError)) or not (
                dist.is_initialized() and regex.search("peer|onnect|NCCL|imed out", str(error))):
            raise
        raise ValueError("another process has ended, so this one does, too; --resume goes on from "
                         "the last checkpoint") from error


def main():
    with one_voice():
        summary = train(*complete_options(*restarted(
            *parse_options(__doc__, TrainConfig, GPTConfig))))
    if dist.is_initialized():
        dist.barrier()  # all leave together: who goes first takes the others' connections along
        dist.destroy_process_group()
    if summary is None:
        return
    end = SimpleNamespace(**summary)
    doctor = f"python -m chapters.doctor {end.folder} says more"
    if end.stopped:
        saved = max(saved_steps(end.folder), default=0)
        again = (f"python train.py --resume --out={end.folder}"
                 if from_torchrun("WORLD_SIZE") == 1 else "the same command with --resume")
        print(f"stopped at step {end.step}, saved at {saved}; to go on: {again}")
        sys.exit(128 + end.stopped)
    if end.val_loss is None:
        raise ValueError(f"the validation loss is not finite at step {end.step}: {doctor}")
    if end.skipped == end.step:
        raise ValueError(f"all {end.step} steps were skipped, so the model learned nothing: "
                         f"{doctor}")
    ask = {ChatLoader: "sample.py {} --chat", TokenLoader: "sample.py {}"}.get(
        end.kind, "-m chapters.clauses ask {}").format(end.folder)
    ask, note = f'{ask} --prompt="{end.words}"', ""
    if not checkpoints(end.folder):
        ask = f"-m chapters.gather {end.folder}"
    elif end.kind is not ClassLoader:
        model, tokenizer = load_finished(end.folder, device=end.device)
        print(sample_lines(model, tokenizer, 200, 1, end.prompt))
        if end.kind is ChatLoader and not knows_chats(model, tokenizer):
            ask = f"train.py --resume --out={end.folder} --max_steps={max(100, 3 * end.step)}"
            note = "its answers have no end yet: it needs more steps\n"
    bits = f", {end.bits_per_byte:.3f} bits per byte" if end.bits_per_byte else ""
    print(f"{end.step:,} steps in {end.seconds:.0f} seconds on {end.how}, "
          f"{end.tokens_per_second:,} tokens/s: validation loss {end.val_loss:.4f}{bits}\n"
          f"{end.folder} holds the model, its log and its picture {end.folder}/loss.png\n"
          f"{note}next: python {ask}")


if __name__ == "__main__":
    run_command(main)
