"""
Train a model: text or token shards in, a run folder with checkpoints out.

    python train.py                                       # Python's own library, a few minutes
    python train.py --data=mybook.txt --size=small --max_steps=5000
    python train.py --resume                              # continue the newest run
    torchrun --nproc_per_node=2 train.py --max_steps=500  # the same losses, on two processes

With none of --max_steps, --epochs and --minutes a run ends after 2 epochs or 4 minutes, whichever
comes first. Each option can also be changed when a run is resumed.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data import TokenLoader, folder_name, prepare
from tokenizer import Parser, Tokenizer, replacing, run_command, share_cores

if __name__ == "__main__":
    share_cores()
if not {"-h", "--help"} & set(sys.argv):  # torch takes two seconds to import; help need not wait
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from model import (GPT, SIZES, GPTConfig, check_ids, check_known, load_model,
                       save_model)
    from sample import (checkpoints, complete, newest_run, pick_checkpoint, pick_device,
                        pick_precision)
    from sample import load_run as load_finished


LENGTHS = ("max_steps", "epochs", "minutes")


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
    size: str = "mini"              # tiny | mini | small | base | gpt2 | gpt2-medium ...
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
    minutes: float = 0.0            # end after this long, data included; 0: no limit
    batch_size: int = 8             # sequences per step, over all devices
    micro_batch_size: int = 8       # sequences per forward pass on a device; the rest accumulates
    # optimizer
    learning_rate: float = 1.5e-3   # the highest, after warm-up
    min_lr: float = 1e-4            # the last
    warmup_steps: int = 40          # steps from 0 to the highest
    weight_decay: float = 0.1       # on matrices only
    beta1: float = 0.9              # AdamW's memory of gradients
    beta2: float = 0.98             # AdamW's memory of their squares
    grad_clip: float = 1.0          # longest gradient; 0: no limit
    # what is seen
    eval_every: int = 100           # steps between validations, each with a sample and a checkpoint
    eval_sequences: int = 64        # sequences in the fixed validation set
    sample_tokens: int = 48         # tokens shown at a validation
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
        for name in ("batch_size", "micro_batch_size", "eval_every", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (*LENGTHS, "learning_rate", "min_lr", "warmup_steps", "grad_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


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


def complete_options(given):
    """The options typed, over those of the config.json that --config or --resume point to."""
    config = TrainConfig(**given)
    if config.resume:
        folder = Path(config.out) if config.out else newest_run()
        pick_checkpoint(folder, "last")  # where there is nothing to go on from, this says so
        given = given | {"out": str(folder)}
        config.config = str(folder / "config.json")
    if not config.config:
        return config
    try:
        saved = json.loads(Path(config.config).read_text(encoding="utf-8"))["train"]
        saved.update(out="", config="", resume=False)
        if given.keys() & set(LENGTHS):  # a new length takes the place of all former ones
            saved |= dict.fromkeys(LENGTHS, 0)
        return TrainConfig(**saved | given)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config.config} is not the config.json of a run ({error!r})") from None


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


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM become a request in the list that is yielded; the second acts at once."""
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                before[number] = signal.getsignal(number)
                signal.signal(number, note)
        yield asked
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)


# -----------------------------------------------------------------------------
# The pieces of a step.


def learning_rate(step, config, progress=None):
    """Linear warm-up, then a cosine from learning_rate to min_lr over the run (arXiv:1608.03983).
    progress in [0, 1] is the share of it done: step / max_steps, unless the clock is ahead."""
    progress = step / max(1, config.max_steps) if progress is None else progress
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    rate = config.min_lr + (config.learning_rate - config.min_lr) * cosine
    return rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def build_optimizer(model, config):
    """AdamW (arXiv:1711.05101); weight decay pulls matrices to zero, never gains and biases."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    rate = config.learning_rate
    if config.cuda_graph:  # a graph repeats what it saw: only what is in a tensor can change
        rate = torch.tensor(rate, device=matrices[0].device)
    return torch.optim.AdamW(groups, lr=rate, betas=(config.beta1, config.beta2), fused=True,
                             capturable=config.cuda_graph)


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


def take_step(run, model, xs, ys, grad_clip):
    """One step on xs and ys, lists of batches (B, T): gradients, clip, update -> (mean loss in
    nats, length of the gradient), tensors. Processes exchange gradients once, at the last batch."""
    total = 0.0
    for n, (x, y) in enumerate(zip(xs, ys), 1):
        waits = hasattr(model, "no_sync") and n < len(xs)
        with model.no_sync() if waits else contextlib.nullcontext():
            _, loss = model(x, y)
            # gradients add up over the passes of a step; we want their mean
            run.scaler.scale(loss / len(xs)).backward()
        total += loss.detach() / len(xs)
    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.model, grad_clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return total, norm


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


def seconds_per_sequence(model):
    """A short probe: forward and backward of a few sequences of random ids, the second time."""
    ids = torch.randint(model.config.vocab_size, (4, model.config.block_size), device=model.device)
    for _ in range(2):
        start = time.perf_counter()
        model(ids, ids)[1].backward()
        model.zero_grad()
    return (time.perf_counter() - start) / len(ids)


# -----------------------------------------------------------------------------
# The run folder: config.json, tokenizer.json, step_NNNNNN.pt, log.jsonl, loss.png.


def write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def read_log(folder):
    """log.jsonl as a list of dicts, one a step; a last line that was cut off is left out."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def free_folder(folder):
    """The folder, or if it already holds a run the same name with the first number free."""
    folder, n = Path(folder), 2
    first = folder
    while (folder / "config.json").exists():
        folder, n = first.with_name(f"{first.name}-{n}"), n + 1
    return folder


@dataclass
class Run:
    """A run under way: all that a checkpoint holds, and the folder it is in."""
    folder: Path
    model: "GPT"
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler"
    step: int = 0               # optimizer steps taken
    sequences: int = 0          # sequences read, over all processes: where the loader stands
    elapsed: float = 0.0        # seconds trained, over all sessions
    best_step: int = 0          # the step with the lowest validation loss so far
    best_loss: float = math.inf


PROGRESS = ("step", "sequences", "elapsed", "best_step", "best_loss")


def save_run(run):
    """Write a checkpoint, then remove those that are neither the newest nor the best."""
    state = {name: getattr(run, name) for name in PROGRESS}
    state |= dict(optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict())
    save_model(run.model, run.folder / f"step_{run.step:06d}.pt", **state)
    for step, path in checkpoints(run.folder).items():
        if step not in (run.step, run.best_step):
            path.unlink()


def load_run(folder, config, device):
    """The Run in a folder as its newest checkpoint left it."""
    model, state = load_model(pick_checkpoint(folder, "last"), device)
    run = new_run(folder, model, config, device)
    groups = [{name: group[name] for name in ("lr", "capturable")}
              for group in run.optimizer.param_groups]  # which are this machine's to choose
    run.optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(run.optimizer.param_groups, groups):
        group.update(own)
    run.scaler.load_state_dict(state["scaler"])
    for name in PROGRESS:
        setattr(run, name, state[name])
    rows = [json.dumps(row) for row in read_log(folder) if row["step"] <= run.step]
    with replacing(folder / "log.jsonl") as file:  # what came after the checkpoint happens again
        file.write("".join(row + "\n" for row in rows).encode())
    return run


def new_run(folder, model, config, device):
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.precision == "fp16")
    return Run(Path(folder), model, build_optimizer(model, config), scaler)


def draw_loss(folder):
    """loss.png from log.jsonl: the loss of each step, its running mean, the validation losses."""
    from matplotlib.figure import Figure  # not pyplot: a notebook that trains goes on showing plots
    rows = read_log(folder)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    measured = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
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


def open_run(config, model_config, shards, tokenizer, device):
    """A new Run in a folder of its own, or with --resume the one that is there."""
    if config.resume:
        run = load_run(Path(config.out) if config.out else newest_run(), config, device)
        if Tokenizer.load(run.folder / "tokenizer.json").hash() != tokenizer.hash():
            raise ValueError(f"{run.folder} was trained with another tokenizer than {shards} has: "
                             f"let --data name the text or the shards of that run")
        return run
    folder = Path(config.out) if config.out else free_folder(Path("runs") / shards.name)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
    model = GPT(model_config or shape_of(config, tokenizer.n_vocab))
    return new_run(folder, model.to(device), config, device)


def split_batch(config, world_size):
    """-> (sequences in a forward pass on one process, forward passes in a step)."""
    micro = max(1, min(config.micro_batch_size, config.batch_size // world_size))
    if config.batch_size % (micro * world_size):
        raise ValueError(f"batch_size={config.batch_size} is no multiple of {micro * world_size}: "
                         f"micro_batch_size={micro} on {world_size} process(es)")
    return micro, config.batch_size // (micro * world_size)


def check_graph(config, device, world_size, kernels):
    """ValueError where a step cannot be recorded as a CUDA graph."""
    if config.cuda_graph and (not device.startswith("cuda") or world_size > 1
                              or config.precision == "fp16" or kernels not in ("torch", "cuda")):
        raise ValueError("--cuda_graph works on one GPU in fp32 or bf16 with torch or cuda "
                         f"kernels, not on {world_size} x {device} in {config.precision} with "
                         f"{kernels} kernels: leave it out")


def last_step(config, n_tokens, tokens_per_step):
    """The step at which the run ends at the latest; infinite if only the clock ends it."""
    limits = [config.max_steps, math.ceil(config.epochs * n_tokens / tokens_per_step)]
    return min(filter(None, limits), default=math.inf)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def announce(config, model, n_tokens, n_steps, how):
    """One line before the run: how large, how much, how long, on what."""
    tokens_per_step = config.batch_size * model.config.block_size
    seconds = seconds_per_sequence(model) * config.batch_size
    n_steps = min(n_steps, 60 * config.minutes / seconds if config.minutes else math.inf)
    tokens = n_steps * tokens_per_step
    return (f"{model.n_parameters() / 1e6:.1f}M parameters, {tokens / 1e6:.1f}M tokens "
            f"({tokens / n_tokens:.1f} epochs) in about {n_steps:,.0f} steps of "
            f"{tokens_per_step:,}: about {clock(n_steps * seconds)} minutes on {how}")


def sample_lines(model, tokenizer, n_tokens, seed):
    """A few indented lines of what the model writes from nothing."""
    model.eval()
    text = complete(model, tokenizer, max_new_tokens=n_tokens, temperature=0.8, top_k=50, seed=seed)
    model.train()
    return "\n".join("    | " + line for line in text.strip("\n").splitlines())


def progress_line(row, left):
    validation = f" | validation {row['val_loss']:.4f}" if "val_loss" in row else ""
    return (f"step {row['step']:5d} | loss {row['loss']:.4f}{validation} | lr {row['lr']:.1e} | "
            f"norm {row['grad_norm']:.2f} | {row['tokens_per_second']:,} tok/s, {clock(left)} left")


def summarize(run, card, began, how, stopped):
    """What train() returns: where the run is, how far it came, how good and how fast it was."""
    rows = read_log(run.folder)
    rates = sorted(row["tokens_per_second"] for row in rows)
    val_loss = rows[-1].get("val_loss")
    bits = val_loss and val_loss / math.log(2) * card["val"]["tokens"] / card["val"]["bytes"]
    return dict(folder=str(run.folder), step=run.step, loss=rows[-1]["loss"], val_loss=val_loss,
                bits_per_byte=bits, tokens_per_second=rates[len(rates) // 2],
                seconds=time.perf_counter() - began, how=how, stopped=stopped)


def train(config, model_config=None, say=tqdm.write):
    """Train as config says, the model too unless model_config does; say takes the lines to show.
    -> a summary of the run: folder, step, loss and val_loss (nats per token), bits_per_byte,
    tokens_per_second, seconds, how, stopped; None on all ranks but 0."""
    began = time.perf_counter()
    keep_freed_memory(config.low_memory)
    rank, world_size, device = start_processes(config)
    is_main, say = rank == 0, say if rank == 0 else lambda text: None
    if model_config is None:
        shape_of(config, config.vocab_size)  # a wrong option is refused before the data is made
    shards = find_shards(config, rank, say)
    card = json.loads((shards / "card.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(shards / "tokenizer.json")

    torch.manual_seed(config.seed)
    precision, dtype = pick_precision(config.precision, device)
    config = dataclasses.replace(config, precision=precision)
    run = open_run(config, model_config, shards, tokenizer, device)
    kernels = run.model.use(config.kernels, dtype, config.recompute)
    how = f"{device}, {precision}, {kernels} kernels"
    check_graph(config, device, world_size, kernels)
    micro, accumulate = split_batch(config, world_size)
    T = run.model.config.block_size
    batches = TokenLoader(shards, micro, T, rank, world_size, config.seed,
                          position=run.sequences // (micro * world_size))
    n_steps = last_step(config, batches.n_tokens, config.batch_size * T)
    if is_main:
        say(announce(config, run.model, batches.n_tokens, n_steps, how))
        tokenizer.save(run.folder / "tokenizer.json")
        data = dict(path=str(shards), **card)
        write_json(run.folder / "config.json",
                   dict(model=asdict(run.model.config), train=asdict(config), data=data))
    model = parallelize(run.model, world_size, device)
    step = (GraphedStep(run, model, config.grad_clip) if config.cuda_graph else
            lambda xs, ys: take_step(run, model, xs, ys, config.grad_clip))
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
    log_path = run.folder / "log.jsonl" if is_main else os.devnull
    with bar, stop_signals() as asked, open(log_path, "a", buffering=1, encoding="utf-8") as log:
        while progress < 1 and not stopping:
            start = time.perf_counter()
            torch.manual_seed(1_000_003 * run.step + config.seed + rank)  # dropout: of this step
            rate = learning_rate(run.step, config, progress)
            for group in run.optimizer.param_groups:
                group["lr"] = group["lr"].fill_(rate) if config.cuda_graph else rate
            xs, ys = zip(*(to_device(next(batches), run.model) for _ in range(accumulate)))
            loss, norm = (value.item() for value in step(xs, ys))

            now = time.perf_counter()
            run.step, run.sequences = run.step + 1, run.sequences + config.batch_size
            run.elapsed = before + now - began
            loss, progress, stopping = average([loss, share_done(), len(asked)], device)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {run.step}: go on from the last "
                                 f"checkpoint with --resume and a --learning_rate below {rate:.1e}")
            row = dict(step=run.step, loss=loss, lr=rate, grad_norm=norm,
                       tokens_per_second=round(config.batch_size * T / (now - start)),
                       elapsed=round(run.elapsed, 3))
            check = run.step % config.eval_every == 0 or progress == 1
            if check:
                row["val_loss"] = validation_loss(run.model, shards, config, rank, world_size)
                if row["val_loss"] < run.best_loss:
                    run.best_loss, run.best_step = row["val_loss"], run.step
            if not is_main:
                continue
            log.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - ready) / (progress - started_at) * (1 - progress)
            bar.set_description_str(progress_line(row, left), refresh=False)
            bar.update(progress - bar.n)
            if check or stopping or (bar.disable and now - shown > 10):
                say(progress_line(row, left))
                shown = now
            if check or stopping:
                save_run(run)
                draw_loss(run.folder)
            if check and progress < 1:
                say(sample_lines(run.model, tokenizer, config.sample_tokens, config.seed))
    return summarize(run, card, began, how, bool(stopping)) if is_main else None


def report(summary):
    """The last lines of the command: a longer sample, the figures, and what to type next."""
    folder = summary["folder"]
    if summary["stopped"]:
        print(f"stopped and saved at step {summary['step']}; "
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
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
