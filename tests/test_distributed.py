"""train.py on several processes: each layout prints the losses of one process, a checkpoint goes on
on any other, and the loss of a process, a signal or a process that hangs end well."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, mistake

from chapters.gather import gather
from chapters.processes import counted_bytes, spawn
from data import prepare
from model import GPT, GPTConfig, load_model, read_safetensors
from sample import checkpoints
from train import (TrainConfig, build_optimizer, check_layout, load_run, main,
                   read_log, set_rate, sharded, split_batch, train)

pytestmark = pytest.mark.all_cores
slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")

# name: processes, options
LAYOUTS = {
    "ddp": (2, dict()),
    "fsdp": (2, dict(parallel="fsdp")),
    "zero-2": (2, dict(parallel="fsdp", reshard=False)),
    "tp": (2, dict(tp=2)),
    "pp": (2, dict(pp=2)),
    "gpipe": (2, dict(pp=2, pp_schedule="gpipe")),
    "fsdp x tp": (4, dict(parallel="fsdp", tp=2)),
    "fsdp x pp": (4, dict(parallel="fsdp", pp=2)),
    "tp x pp": (4, dict(tp=2, pp=2)),
    "fsdp x tp x pp": (8, dict(parallel="fsdp", tp=2, pp=2)),
}
# name: options of training, of the model (beside grouped heads, an untied head, rotary positions)
SETTINGS = {
    "muon": (dict(), dict()),
    "adamw, tied, accumulated, clipped": (
        dict(optimizer="adamw", micro_batch_size=2, grad_clip=0.05),
        dict(architecture="gpt2", n_kv_head=2)),
    "chats, recomputed": (dict(optimizer="adamw", recompute=True, data="chats"), dict(softcap=9.0)),
    "fp16": (dict(optimizer="adamw", precision="fp16"), dict()),
}


def options_of(data, out, **options):
    return TrainConfig(**dict(
        data=str(data), out=str(out), max_steps=30, batch_size=8, eval_every=15, keep_last=9,
        eval_sequences=7, precision="fp32", kernels="torch", device="cpu", warmup_steps=2)
        | options)


def shape_of(**options):
    return GPTConfig(**dict(vocab_size=320, block_size=32, n_layer=3, n_head=4, n_embd=32,
                            zero_init=False) | options)


def train_all(jobs):
    """One process of a group: each job, (TrainConfig, GPTConfig or None), one after another."""
    rank, n = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{n}", LOCAL_RANK="0", LOCAL_WORLD_SIZE=f"{n}")
    for config, shape in jobs:
        train(config, shape, say=lambda line: None)
        dist.barrier()


def on_processes(jobs):
    """Run jobs, (number of processes, TrainConfig, GPTConfig), started together by their number."""
    for n in sorted({n for n, *_ in jobs}):
        own = [job for number, *job in jobs if number == n]
        if n == 1:
            for config, shape in own:
                train(config, shape, say=lambda line: None)
        else:
            spawn(n, train_all, own)


@pytest.fixture(scope="session")
def texts(shards, tmp_path_factory):
    """{"": shards of text, "chats": shards of chats}"""
    folder = tmp_path_factory.mktemp("chats")
    rows = [[dict(role="user", content=f"what is {i} and one?"),
             dict(role="assistant", content=f"it is {i + 1}" + ", I think" * (i % 4))]
            for i in range(200)]
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps(dict(messages=row)) for row in rows))
    return {"": shards, "chats": prepare(path, folder / "shards", tokenizer=None, vocab_size=320,
                                         say=lambda line: None)}


@pytest.fixture(scope="session")
def runs(texts, tmp_path_factory):
    """runs(setting, layouts) -> the folder with a run of each of these layouts, and of "one"."""
    home, done = tmp_path_factory.mktemp("runs"), set()

    def make(setting, layouts):
        options, shape = SETTINGS[setting]
        options = options | dict(data=str(texts[options.get("data", "")]))
        wanted = {"one": (1, {})} | {name: LAYOUTS[name] for name in layouts}
        jobs = [(n, options_of(out=home / setting / name, **options | own), shape_of(
            **shape)) for name, (n, own) in wanted.items() if (setting, name) not in done]
        on_processes(jobs)
        done.update((setting, name) for name in wanted)
        return home / setting
    return make


def numbers(folder, names=("loss", "grad_norm")):
    return torch.tensor([[row[name] for name in names] for row in read_log(folder)],
                        dtype=torch.float64)


def agree(folder, other, setting):
    """Losses to 4 decimals, lengths of gradients to 6 digits, validation losses of the same text;
    with fp16 what its 10 bits leave of that, and the same steps skipped."""
    mine, theirs = numbers(folder), numbers(other)
    assert len(mine) == 30
    loss, norm, val = (3e-3, 2e-2, 3e-3) if setting == "fp16" else (5e-5, 1e-5, 5e-5)
    torch.testing.assert_close(mine[:, 0], theirs[:, 0], rtol=0, atol=loss)
    torch.testing.assert_close(mine[:, 1], theirs[:, 1], rtol=norm, atol=1e-7)
    checks = [[row["val_loss"] for row in read_log(name) if "val_loss" in row]
              for name in (folder, other)]
    assert len(checks[0]) == 2 and checks[0] == pytest.approx(checks[1], abs=val)
    assert [row.get("skipped") for row in read_log(folder)] == [
        row.get("skipped") for row in read_log(other)]


QUICK = "fsdp",


@pytest.mark.parametrize("layout", QUICK)
def test_two_processes_print_the_losses_of_one(runs, layout):
    folder = runs("muon", QUICK)
    agree(folder / layout, folder / "one", "muon")


SOME = "ddp", "fsdp", "tp", "pp"
ALL = "adamw, tied, accumulated, clipped"
PAIRS = [(setting, layout) for setting in SETTINGS for layout in (
    LAYOUTS if setting == ALL else [*SOME, "fsdp x tp"] if setting == "muon" else SOME)]


def all_of(runs, setting):
    """The folder with the runs of a setting on all of its layouts."""
    return runs(setting, [layout for other, layout in PAIRS if other == setting])


@slow
@pytest.mark.parametrize("setting, layout", PAIRS)
def test_all_layouts_print_the_losses_of_one_process(runs, setting, layout):
    folder = all_of(runs, setting)
    agree(folder / layout, folder / "one", setting)


@slow
@pytest.mark.parametrize("setting, layout", PAIRS)
def test_all_layouts_save_the_plain_file_of_one_process(runs, setting, layout):
    folder = all_of(runs, setting)
    mine, one = (read_safetensors(folder / name / "step_000030.safetensors")
                 for name in (layout, "one"))
    assert mine.keys() == one.keys()
    far = 0.05 if setting == "fp16" else 2e-3  # AdamW divides by what can be nearly 0
    for name in one:
        torch.testing.assert_close(mine[name], one[name], rtol=far, atol=far, msg=name)
    model, state = load_model(folder / layout / "step_000030.safetensors")
    assert type(model) is GPT and state["sequences"] == 240


MOVES = [*((ALL, before, after) for before, after in (
    ("one", "fsdp"), ("fsdp", "tp"), ("tp", "pp"), ("pp", "ddp"), ("fsdp x pp", "one"),
    ("fsdp x tp x pp", "tp x pp"))), ("muon", "one", "fsdp x tp"), ("muon", "fsdp", "pp")]


def half(folder, new):
    """A copy of a run as it was after 15 of its 30 steps."""
    shutil.copytree(folder, new)
    (new / "step_000030.safetensors").unlink()
    return new


@slow
@pytest.mark.parametrize("setting, before, after", MOVES)
def test_a_run_goes_on_on_another_layout(runs, tmp_path, setting, before, after):
    folder = all_of(runs, setting)
    n, own = LAYOUTS.get(after, (1, {}))
    config = options_of(read_data(folder), half(folder / before, tmp_path / "run"), resume=True,
                        **SETTINGS[setting][0] | own)
    on_processes([(n, config, None)])
    agree(tmp_path / "run", folder / "one", setting)


@slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp x tp"])
def test_a_run_goes_on_on_the_same_layout_as_if_it_had_never_stopped(runs, tmp_path, layout):
    folder, (n, own) = all_of(runs, "muon"), LAYOUTS[layout]
    config = options_of(read_data(folder), half(folder / layout, tmp_path / "run"), resume=True,
                        **own)
    on_processes([(n, config, None)])
    whole, again = (read_safetensors(x / "step_000030.safetensors")
                    for x in (folder / layout, tmp_path / "run"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def read_data(folder):
    return json.loads((folder / "one/config.json").read_text())["data"]["path"]


@slow
@pytest.mark.parametrize("layout", ["fsdp x tp", "fsdp x pp"])
def test_a_checkpoint_in_shards_becomes_the_plain_file_and_goes_on_anywhere(runs, tmp_path, layout):
    folder, (n, own), (options, shape) = all_of(runs, ALL), LAYOUTS[layout], SETTINGS[ALL]
    config = options_of(read_data(folder), tmp_path / "run", checkpoint="sharded", **options | own)
    on_processes([(n, config, shape_of(**shape))])
    assert not checkpoints(tmp_path / "run") and list(sharded(tmp_path / "run")) == [15, 30]
    shutil.copytree(tmp_path / "run", tmp_path / "plain")
    assert gather(tmp_path / "plain") == 30
    mine, theirs = (read_safetensors(x / "step_000030.safetensors")
                    for x in (tmp_path / "plain", folder / layout))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    shutil.rmtree(tmp_path / "run/step_000030.shards")
    for number, more in (1, {}), (2, dict(pp=2)):
        new = tmp_path / f"{number} {more}"
        shutil.copytree(tmp_path / "run", new)
        on_processes([(number, options_of(config.data, new, resume=True, **options | more), None)])
        agree(new, folder / "one", ALL)
    (tmp_path / "plain/step_000030.safetensors").unlink()
    file = next((tmp_path / "plain/step_000030.shards").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):  # a part is missing, then all of it
        with pytest.raises(ValueError, match=f"lacks {file.name}, or some of it: copy all files"):
            gather(tmp_path / "plain")
        with pytest.raises(ValueError, match=f"lacks {file.name}, or some of it: copy all files"):
            load_run(tmp_path / "plain", config, "cpu")
        file.unlink(missing_ok=True)


def moved_scaler(config, shape):
    """Rank 0 alone has a gradient that is not finite, once; -> the scales of all, and the steps."""
    import train as module
    inner, seen = module.add_gradients, []

    def spoil(run, *rest):
        seen.append(run.scaler.get_scale())
        results = inner(run, *rest)
        if dist.get_rank() == 0 and run.step == 3:
            next(run.model.parameters()).grad.flatten()[0] = math.inf
        return results

    module.add_gradients = spoil
    try:
        train_all([(config, shape)])
    finally:
        module.add_gradients = inner
    return seen


@slow
def test_all_ranks_have_the_state_of_one_scaler(texts, tmp_path):
    config = options_of(texts[""], tmp_path / "run", precision="fp16", max_steps=6, eval_every=6)
    first, second = spawn(2, moved_scaler, config, shape_of())
    assert first == second and first[4] == first[3] / 2
    assert [row["step"] for row in read_log(tmp_path / "run") if "skipped" in row] == [4]


# -----------------------------------------------------------------------------
# The cost: what is sent, and what is held.


def held_and_sent(config, shape):
    """Train; -> bytes of weights, gradients and optimizer's state that this process holds, and
    those that it sent in a step."""
    import train as module
    inner, found = module.update, {}

    def look(run):
        tensors = [x for p in run.model.parameters() for x in (
            p, p.grad, *run.optimizer.state[p].values()) if x is not None and x.dim()]
        found["held"] = sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)
        inner(run)

    module.update = look
    try:
        train_all([(config, shape)])
        with counted_bytes() as sent:
            train_all([(replace(config, resume=True, max_steps=3), None)])
    finally:
        module.update = inner
    return found["held"], sent


@slow
def test_fsdp_holds_half_of_what_ddp_holds(texts, tmp_path):
    shape, held = shape_of(n_embd=64), {}
    for layout in "ddp", "fsdp", "tp":
        options = options_of(texts[""], tmp_path / layout, max_steps=2, eval_every=2,
                             optimizer="adamw", **LAYOUTS[layout][1])
        held[layout] = spawn(2, held_and_sent, options, shape)[0][0]
    assert 0.49 < held["fsdp"] / held["ddp"] < 0.6
    assert held["tp"] < held["ddp"]


# -----------------------------------------------------------------------------
# What is refused, in a line.


@pytest.mark.parametrize("words, line", [
    (["--parallel=fsdp"], "--parallel=fsdp and --checkpoint=sharded are for several processes"),
    (["--tp=2"], "tp=2 times pp=1 needs a multiple of 2 processes, not 1: torchrun"),
    (["--pp_schedule=gpipe"], "--pp_schedule would not act without --pp=N"),
    (["--no-reshard"], "--reshard would not act without --parallel=fsdp"),
    (["--parallel=dpp"], "did you mean ddp?"),
    (["--checkpoint=sharded"], "--parallel=fsdp and --checkpoint=sharded are for several")])
def test_a_layout_that_one_process_cannot_have_is_refused(shards, tmp_path, monkeypatch, capsys,
                                                         words, line):
    monkeypatch.chdir(tmp_path)
    code, said = mistake(main, monkeypatch, capsys, f"--data={shards}", *words)
    assert code == 1 and len(said) == 1 and line in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, shape, line", [
    (dict(tp=3), {}, "tp=3: n_kv_head=2 is no multiple of it"),
    (dict(tp=2), dict(block_size=33), "block_size=33 is no multiple"),
    (dict(pp=4), {}, "pp=4: there are 3 blocks"),
    (dict(tp=2, curriculum=0.5), {}, "--curriculum=0.5 does not work with this layout: take "
     "--parallel=fsdp and neither"),
    (dict(pp=2), dict(n_classes=3), "n_classes=3 does not work with this layout"),
    (dict(parallel="fsdp", tune="lora"), {}, "--tune=lora does not work with this "
     "layout: take --parallel=ddp")])
def test_a_model_that_cannot_be_split_so_is_refused(options, shape, line):
    with pytest.raises(ValueError, match=line):
        config = TrainConfig(**options)
        check_layout(config, shape_of(**shape), max(2, config.tp * config.pp))


def test_each_stage_of_a_pipeline_gets_a_micro_batch():
    assert split_batch(TrainConfig(batch_size=16, pp=4), 1) == (4, 4)
    assert split_batch(TrainConfig(batch_size=16, pp=2), 2) == (4, 2)
    with pytest.raises(ValueError, match="batch_size=2 gives 2 micro-batches to pp=4 stages"):
        split_batch(TrainConfig(batch_size=2, pp=4), 1)


def test_in_a_cuda_graph_each_group_has_a_rate_of_its_own():
    optimizer = build_optimizer(GPT(shape_of()), TrainConfig(cuda_graph=True))
    set_rate(optimizer, 0.2)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.2, 0.1])


# -----------------------------------------------------------------------------
# Faults, under torchrun.


def words_of(data, out, *words):
    """train.py's command, as a small and slow run."""
    return [ROOT / "train.py", f"--data={data}", f"--out={out}", "--n_layer=2", "--n_head=2",
            "--n_embd=32", "--block_size=32", "--batch_size=8", "--precision=fp32", "--device=cpu",
            "--kernels=torch", "--eval_every=10", "--keep_last=9", *words]


def torchrun(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, words)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(path, seconds=100):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


def process_of(rank, out):
    """The id of the process of a rank that trains in a folder: Linux tells."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, env = ((folder / name).read_bytes().split(b"\0") for name in
                            ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        if f"--out={out}".encode() in command and f"RANK={rank}".encode() in env:
            return int(folder.name)
    raise AssertionError(f"no rank {rank} trains in {out}")


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")


@slow
@linux
def test_a_killed_rank_comes_back_and_the_run_ends_with_the_same_weights(shards, tmp_path):
    words = words_of(shards, "run", "--max_steps=60")
    whole = torchrun("--standalone", "--nproc_per_node=2", *words_of(
        shards, "whole", "--max_steps=60"), cwd=tmp_path)
    assert whole.wait(200) == 0, whole.stdout.read()
    job = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=1", *words, cwd=tmp_path)
    wait_for(tmp_path / "run/step_000020.safetensors")
    os.kill(process_of(1, "run"), signal.SIGKILL)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert "error: another process has ended, so this one does, too" in said
    mine, theirs = (read_safetensors(tmp_path / name / "step_000060.safetensors")
                    for name in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@slow
@posix
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_terminated_torchrun_saves_on_all_ranks(shards, tmp_path, layout):
    job = torchrun("--standalone", "--nproc_per_node=2", *words_of(
        shards, "run", "--max_steps=100000", f"--parallel={layout}"), cwd=tmp_path)
    wait_for(tmp_path / "run/step_000010.safetensors")
    began = time.monotonic()
    job.terminate()
    said, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 30 and "stopped at step" in said
    last = max(checkpoints(tmp_path / "run"))
    assert f"saved at {last};" in said and last == len(read_log(tmp_path / "run"))


@slow
@linux
def test_a_rank_that_hangs_is_named(shards, tmp_path):
    job = torchrun("--standalone", "--nproc_per_node=2", *words_of(
        shards, "run", "--max_steps=100000", "--timeout=3"), cwd=tmp_path)
    wait_for(tmp_path / "run/step_000010.safetensors")
    hung = process_of(1, "run")
    os.kill(hung, signal.SIGSTOP)
    said = next(line for line in job.stdout if "has not ended" in line)
    assert "for 3 s, as rank 1 does not answer: the run ends" in said
    os.kill(hung, signal.SIGKILL)  # which torchrun does after 30 seconds
    said, _ = job.communicate(timeout=100)
    assert "does not answer" not in said
    assert job.returncode == 1


@slow
def test_two_nodes_that_meet_at_an_address_train_one_model(shards, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [torchrun("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=course",
                      f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", *words_of(
                          shards, "run", "--max_steps=20", "--parallel=fsdp"), cwd=tmp_path)
             for _ in range(2)]
    for node in nodes:
        said, _ = node.communicate(timeout=200)
        assert node.returncode == 0, said
    assert max(checkpoints(tmp_path / "run")) == 20


@pytest.mark.parametrize("env, line", [
    (dict(WORLD_SIZE="two"), "the environment cannot be read: invalid literal"),
    (dict(WORLD_SIZE="2"), "rank 0 of 2 does not find the others at ?:?"),
    (dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="99999"), "port must have value"),
    pytest.param(dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="FREE"),
                 "1/2 clients joined", marks=slow),
    (dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="USED"), "address already in use"),
    (dict(TORCHELASTIC_MAX_RESTARTS="1"), "--max-restarts needs --out=FOLDER")])
def test_peers_that_are_missing_are_said_in_a_line(shards, tmp_path, monkeypatch, capsys, env,
                                                  line):
    with socket.socket() as used, socket.socket() as free:
        for one in used, free:
            one.bind(("0.0.0.0", 0))
        used.listen()
        ports = dict(USED=str(used.getsockname()[1]), FREE=str(free.getsockname()[1]))
        free.close()
        for name in "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT":
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, ports.get(value, value))
        if "WORLD_SIZE" in env:
            monkeypatch.setenv("RANK", "0")
        monkeypatch.chdir(tmp_path)
        code, said = mistake(main, monkeypatch, capsys, f"--data={shards}", "--device=cpu",
                             "--timeout=1")
    assert code == 1 and len(said) == 1 and line in said[0]
