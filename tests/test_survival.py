"""Runs survive what happens to runs: kills, signals, full disks, bad numbers, a second start."""

import contextlib
import dataclasses
import hashlib
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, tiny
from test_train import command, configure, same, weights

import train as module
from data import TokenLoader, prepare
from sample import checkpoints, first_whole
from train import (Recorder, TrainConfig, is_spike, load_run, new_run, read_log, save_run,
                   snapshot, take_step, train, why_skip)

slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits")
QUIET = dict(say=lambda text: None)
FACTS = ("step", "loss", "lr", "grad_norm", "val_loss", "skipped")  # not how long it took


def facts(folder):
    """What the log of a run says that does not depend on the clock."""
    return [{name: row[name] for name in FACTS if name in row} for row in read_log(folder)]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """undisturbed(options) -> the folder of a run with these options that nothing happened to."""
    done = {}

    def make(**options):
        key = str(sorted(options.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            train(*configure(shards, done[key], **options), **QUIET)
        return done[key]
    return make


def assert_equal_runs(folder, other):
    assert facts(folder) == facts(other)
    assert same(weights(folder), weights(other))


@contextlib.contextmanager
def instead(name, act):
    """train.NAME calls act(inner, n, *arguments) while this lasts, n counting the calls from 1."""
    inner, calls = getattr(module, name), []

    def outer(*arguments, **options):
        calls.append(name)
        return act(inner, len(calls), *arguments, **options)

    setattr(module, name, outer)
    try:
        yield
    finally:
        setattr(module, name, inner)


def press_at(call, number=signal.SIGINT):
    """An act that raises a signal before one call."""
    def act(inner, n, *arguments, **options):
        if n == call:
            signal.raise_signal(number)
        return inner(*arguments, **options)
    return act


# -----------------------------------------------------------------------------
# Resume equals never stopped, wherever the stop comes.


ACCUMULATED = dict(micro_batch_size=2, dropout=0.1)
EPOCHS = dict(batch_size=64, micro_batch_size=64)  # an epoch ends inside the sixth step


@pytest.mark.parametrize("name, call, options", [
    ("to_device", 6, ACCUMULATED), ("validation_loss", 1, ACCUMULATED),
    *(pytest.param(*row, marks=slow) for row in [
        ("gradients", 1, {}), ("clip_gradients", 2, {}), ("save_run", 1, {}),
        ("draw_loss", 1, {}), ("gradients", 8, {}), ("update", 3, ACCUMULATED),
        ("gradients", 6, EPOCHS)])])
def test_a_run_stopped_anywhere_goes_on_as_if_it_never_had(shards, tmp_path, undisturbed, name,
                                                          call, options):
    config, shape = configure(shards, tmp_path / "run", **options)
    with instead(name, press_at(call)):
        stopped = train(config, shape, **QUIET)
    assert (stopped["stopped"], max(checkpoints(config.out))) == (signal.SIGINT, stopped["step"])
    train(dataclasses.replace(config, resume=True), **QUIET)
    assert_equal_runs(config.out, undisturbed(**options))


def test_the_epoch_of_that_test_ends_inside_its_run(shards):
    batches = TokenLoader(shards, 64, 32)
    assert 5 * 64 < batches.n_blocks < 6 * 64


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_goes_on_with_the_same_global_batches(shards, world_size):
    after = 3 * 8  # sequences, of which each step reads 8
    alone = TokenLoader(shards, 8, 16, position=after // 8)
    ranks = [TokenLoader(shards, 8 // world_size, 16, rank, world_size, position=after // 8)
             for rank in range(world_size)]
    together = torch.cat([torch.from_numpy(next(rank)[0]) for rank in ranks])
    assert torch.equal(together, torch.from_numpy(next(alone)[0]))


# -----------------------------------------------------------------------------
# Checkpoints.


def a_run(folder, step=1, val_loss=None, seed=0, **options):
    """A new Run that has taken `step` steps, the last with this validation loss."""
    config = TrainConfig(precision="fp32", **options)
    new = new_run(folder, tiny(seed=seed), config, "cpu")
    new.step, new.val_loss = step, val_loss
    return new


def test_a_snapshot_is_not_what_training_goes_on_with(tmp_path):
    run, ids = a_run(tmp_path), torch.arange(8).view(1, 8)
    take_step(run, run.model, [ids], [ids], 1.0)
    model, tensors, progress = snapshot(run)
    copied = model.state_dict() | tensors
    before = {name: w.clone() for name, w in copied.items()}
    take_step(run, run.model, [ids], [ids], 1.0)
    assert same(before, copied) and {"lm_head.weight", "optimizer.lm_head.weight.step"} <= {*copied}
    assert not torch.equal(before["lm_head.weight"], run.model.lm_head.weight)


def test_the_last_ones_and_the_best_stay_and_others_go(tmp_path):
    for step, loss in enumerate((3.0, 1.0, 2.5, 2.0, 1.5), 1):
        save_run(tmp_path, snapshot(a_run(tmp_path, step, loss)), keep=2)
    assert list(checkpoints(tmp_path)) == [2, 4, 5]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checkpoint_that_the_disk_got_wrong_removes_no_other(tmp_path):
    save_run(tmp_path, snapshot(a_run(tmp_path, 1)), keep=1)

    def damage(inner, n, path, **options):
        path.write_bytes(path.read_bytes()[:-10] + bytes(10))
        return inner(path, **options)

    with instead("read_safetensors", damage), pytest.raises(ValueError, match="is damaged"):
        save_run(tmp_path, snapshot(a_run(tmp_path, 2)), keep=1)
    path, wrong = first_whole(reversed(checkpoints(tmp_path).values()))
    assert path == checkpoints(tmp_path)[1]
    assert "step_000002.safetensors is damaged" in wrong[0]


def test_the_newest_is_taken_even_if_its_date_is_the_oldest(tmp_path):
    for step in 1, 2:
        save_run(tmp_path, snapshot(a_run(tmp_path, step)))
        os.utime(tmp_path / f"step_{step:06d}.safetensors", (10 - step, 10 - step))
    assert load_run(tmp_path, TrainConfig(precision="fp32"), "cpu").step == 2


def test_training_goes_on_while_a_checkpoint_is_written(shards, tmp_path):
    rows_then = []
    config, shape = configure(shards, tmp_path / "run", max_steps=12, eval_every=2)

    def slow_save(inner, n, *arguments):
        began = time.perf_counter()
        while len(read_log(config.out)) < 12 and time.perf_counter() - began < 60:
            time.sleep(0.01)
        rows_then.append(len(read_log(config.out)))
        inner(*arguments)

    with instead("save_run", slow_save):
        train(config, shape, **QUIET)
    assert rows_then[0] == 12 and max(checkpoints(config.out)) == 12


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_goes_on(shards, tmp_path, capsys,
                                                                       undisturbed):
    config, shape = configure(shards, tmp_path / "run")
    train(config, shape, **QUIET)
    path = checkpoints(config.out)[8]
    path.write_bytes(path.read_bytes()[:-1000])
    train(dataclasses.replace(config, resume=True), **QUIET)
    assert "step_000008.safetensors is damaged" in capsys.readouterr().err
    assert_equal_runs(config.out, undisturbed())


# -----------------------------------------------------------------------------
# Kills and signals.


def in_process(target, *arguments):
    """A process of its own that calls target(*arguments), and starts in no time."""
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.figure"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def begin_or_resume(config, shape):
    """Train in the folder, or go on where a run was left in it."""
    config = dataclasses.replace(config, resume=bool(checkpoints(config.out)))
    train(config, None if config.resume else shape, **QUIET)


def kill_at_random(config, shape, kills, seed=0, longest=1.0):
    """Kill a run again and again, each time at a random moment of up to so many seconds after it
    took up its work, and let it end. -> how often it had not come to its end before the kill."""
    moments, undone = random.Random(seed), 0
    for _ in range(kills):
        before = len(read_log(config.out))
        process = in_process(begin_or_resume, config, shape)
        while process.is_alive() and len(read_log(config.out)) == before:
            time.sleep(0.002)
        process.join(longest * moments.random())
        undone += process.exitcode is None
        process.kill()
        process.join()
    process = in_process(begin_or_resume, config, shape)
    process.join(600)
    assert process.exitcode == 0
    return undone


@slow
@posix
def test_a_run_killed_at_ten_random_moments_ends_as_if_nothing_had_happened(shards, tmp_path,
                                                                           undisturbed):
    kills = int(os.environ.get("KILLS", 10))
    options = dict(max_steps=15 * kills, eval_every=2, dropout=0.1)
    config, shape = configure(shards, tmp_path / "run", **options)
    assert kill_at_random(config, shape, kills) > kills / 2
    assert_equal_runs(config.out, undisturbed(**options))
    assert not list(Path(config.out).glob("*.part"))


@slow
@posix
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_exit_code(shards, tmp_path, number, code):
    process = started(shards, tmp_path / "run", "--max_steps=100000")
    process.send_signal(number)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == code and "python train.py --resume --out=" in shown
    step = max(checkpoints(tmp_path / "run"))
    assert read_log(tmp_path / "run")[-1]["step"] == step
    options = "--resume", f"--out={tmp_path / 'run'}", f"--max_steps={step + 3}"
    assert run("train.py", *options, cwd=tmp_path).returncode == 0
    assert read_log(tmp_path / "run")[-1]["step"] == step + 3


@slow
@posix
def test_a_second_ctrl_c_leaves_at_once_and_damages_nothing(shards, tmp_path):
    process = started(shards, tmp_path / "run", "--max_steps=100000", "--eval_every=1")
    while len(checkpoints(tmp_path / "run")) < 2:
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert first_whole(reversed(checkpoints(tmp_path / "run").values()))[0]


def started(shards, folder, *options):
    """A train.py that was typed, and has taken ten steps."""
    words = command(shards, folder, *options)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], cwd=folder.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_log(folder)) < 10:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def test_two_runs_do_not_share_a_folder(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=2)
    train(config, shape, **QUIET)
    resumed, new = (dataclasses.replace(config, **options) for options in
                    (dict(resume=True), dict(out=str(tmp_path / "new"))))
    for second in resumed, new:
        Path(second.out).mkdir(exist_ok=True)
        with module.locked(second.out), pytest.raises(ValueError, match="in use by another"):
            train(second, shape, **QUIET)
        train(second, shape, **QUIET)


@slow
@posix
def test_of_two_runs_started_into_one_folder_one_trains(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=200)
    both = [in_process(train, config, shape) for _ in range(2)]
    for process in both:
        process.join(120)
    assert sorted(process.exitcode for process in both) == [0, 1]
    assert [row["step"] for row in read_log(config.out)] == list(range(1, 201))


# -----------------------------------------------------------------------------
# Two processes.


def as_rank(config, shape, rank, port, stop_at=None, spoiled=None):
    """One of two processes that train together. Of the second's steps one can get a signal, and one
    a loss that is no number."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")

    seen = {}

    def act(inner, n, run, *rest):
        if rank == 1 and run.step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        seen[run.step + 1] = {name: p.clone() for name, p in run.model.state_dict().items()}
        loss, norm = inner(run, *rest)
        return (loss * math.nan if rank == 1 and run.step + 1 == spoiled else loss), norm

    with instead("gradients", act):
        train(config, shape, **QUIET)
    if spoiled:
        assert same(seen[spoiled], seen[spoiled + 1])
        assert not same(seen[spoiled + 1], seen[spoiled + 2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_two(config, shape=None, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    act = partial(as_rank, **options)
    both = [in_process(act, config, shape, rank, port) for rank in (0, 1)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    return config.out


@slow
@posix
def test_two_processes_stopped_go_on_as_if_they_never_had(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "half", dropout=0.1, micro_batch_size=2)
    whole = on_two(dataclasses.replace(config, out=str(tmp_path / "whole")), shape)
    on_two(config, shape, stop_at=5)
    assert max(checkpoints(config.out)) == 5
    on_two(dataclasses.replace(config, resume=True))
    assert_equal_runs(config.out, whole)


@slow
@posix
def test_one_process_goes_on_with_what_two_began(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", optimizer="adamw")
    on_two(config, shape, stop_at=4)
    train(dataclasses.replace(config, resume=True), **QUIET)
    whole = on_two(dataclasses.replace(config, out=str(tmp_path / "two")), shape)
    mixed, two = ([[row["loss"], row["grad_norm"]] for row in read_log(folder)]
                  for folder in (config.out, whole))
    torch.testing.assert_close(torch.tensor(mixed), torch.tensor(two), rtol=1e-4, atol=1e-5)


@slow
@posix
def test_a_loss_that_is_no_number_on_one_process_leaves_the_step_out_on_both(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run")
    on_two(config, shape, spoiled=4)
    assert [row["step"] for row in read_log(config.out) if "skipped" in row] == [4]


# -----------------------------------------------------------------------------
# Disks, folders and clocks.


@contextlib.contextmanager
def files_up_to(n_bytes):
    """No file of this process can grow larger: what a full disk is to one that saves."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
@pytest.mark.slow
def test_a_full_disk_ends_no_run_and_it_saves_again_when_there_is_room(shards, tmp_path,
                                                                      undisturbed):
    said, options = [], dict(max_steps=12, eval_every=2)

    def no_room(inner, n, folder, state, keep):
        full = n <= 2 and state[-1]["step"] < 12
        with files_up_to(10_000) if full else contextlib.nullcontext():
            return inner(folder, state, keep)

    config, shape = configure(shards, tmp_path / "run", **options)
    with instead("save_run", no_room):
        train(config, shape, say=said.append)
    assert max(checkpoints(config.out)) == 12
    assert [sum(words in line for line in said) for words in
            ("could not be saved", "could be saved again")] == [1, 1]
    assert_equal_runs(config.out, undisturbed(**options))


@posix
def test_a_run_whose_end_cannot_be_saved_says_so_with_an_error(shards, tmp_path):
    def no_room(inner, n, *arguments):
        with files_up_to(10_000) if n > 1 else contextlib.nullcontext():
            return inner(*arguments)

    config, shape = configure(shards, tmp_path / "run")
    with instead("save_run", no_room), pytest.raises(OSError, match="end of the run could not be"):
        train(config, shape, **QUIET)
    assert set(checkpoints(config.out)) == {4}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_rows_that_a_full_disk_refuses_wait_for_room(tmp_path):
    said, path = [], tmp_path / "log.jsonl"
    with Recorder(tmp_path, 2, said.append) as recorder:
        recorder.log(dict(step=1, loss=1.0))
        path.rename(tmp_path / "old")
        path.symlink_to("/dev/full")
        recorder.log(dict(step=2, loss=math.nan))
        recorder.log(dict(step=3, loss=1.0))
        path.unlink()
        recorder.log(dict(step=4, loss=1.0))
    assert [row["step"] for row in read_log(tmp_path)] == [2, 3, 4]
    assert len(said) == 2 and "could not be saved" in said[0] and "saved again" in said[1]


@posix
def test_a_row_is_in_the_log_as_a_whole_or_not_at_all(tmp_path):
    said = []
    with Recorder(tmp_path, 2, said.append) as recorder:
        recorder.log(dict(step=1, loss=1.0))
        size = (tmp_path / "log.jsonl").stat().st_size
        with files_up_to(size + 10):
            recorder.log(dict(step=2, loss=1.0))
        assert (tmp_path / "log.jsonl").stat().st_size == size and len(said) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk])


@slow
@posix
def test_a_disk_that_is_really_full_ends_no_run(shards, tmp_path, small_disk, undisturbed):
    said, options = [], dict(max_steps=12, eval_every=2)

    def fill(inner, n, *arguments):
        if n == 3:
            with contextlib.suppress(OSError), open(small_disk / "filler", "wb", 0) as file:
                while file.write(bytes(1000)):
                    pass
        if n == 9:
            (small_disk / "filler").unlink()
        return inner(*arguments)

    config, shape = configure(shards, small_disk / "run", **options)
    with instead("gradients", fill):
        train(config, shape, say=said.append)
    assert sum("a checkpoint" in line and "could not be saved" in line for line in said) == 1
    assert sum("log.jsonl" in line and "could not be saved" in line for line in said) <= 1
    assert_equal_runs(config.out, undisturbed(**options))


@slow
@posix
def test_a_read_only_disk_is_named_in_one_line(shards, tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run("train.py", *command(shards, small_disk / "run"), cwd=tmp_path)
    assert done.returncode == 1 and "Read-only" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_is_named_in_one_line(shards, tmp_path, call):
    (tmp_path / "file").write_text("no folder")
    _, notes = call(module, *command(shards, tmp_path / "file" / "run"))
    assert notes.startswith("error: ") and "file" in notes and notes.count("\n") == 1


def test_a_clock_that_jumps_changes_nothing(shards, tmp_path, undisturbed, monkeypatch):
    jumps, now = random.Random(0), time.time
    monkeypatch.setattr("time.time", lambda: now() + jumps.uniform(-1e6, 1e6))
    train(*configure(shards, tmp_path / "run"), **QUIET)
    assert_equal_runs(tmp_path / "run", undisturbed())


# -----------------------------------------------------------------------------
# Bad numbers, spikes, memory.


def spoil(steps, change):
    """Gradients of these steps, counted from 1, are changed; -> (the act, the weights after each
    step that was spoiled, before and after)."""
    seen = {}

    def act(inner, n, run, model, *rest):
        loss, norm = inner(run, model, *rest)
        seen[n] = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        return change(run, loss, norm) if n in steps else (loss, norm)
    return act, seen


def with_nan(run, loss, norm):
    for p in run.model.parameters():
        p.grad[...] = math.nan
    return loss * math.nan, norm * math.nan


def with_a_spike(run, loss, norm):
    for p in run.model.parameters():
        p.grad *= 1000
    return loss, norm * 1000


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_with_a_bad_number_changes_no_weight_and_is_in_the_log(shards, tmp_path, optimizer):
    act, seen = spoil({3, 5}, with_nan)
    with instead("gradients", act):
        summary = train(*configure(shards, tmp_path / "run", optimizer=optimizer), **QUIET)
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("skipped") == "not finite"] == [3, 5]
    assert rows[2]["loss"] is None and rows[2]["sequences"] == [16, 23]
    assert same(seen[3], seen[4]) and same(seen[5], seen[6]) and not same(seen[4], seen[5])
    assert summary["skipped"] == 2 and summary["step"] == 8


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_end_the_run_saved_as_before_them(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=50, bad_steps=3)
    act, seen = spoil({3, 6, 7, 8}, with_nan)
    words = "3 in a row; .* chapters.doctor"
    with instead("gradients", act), pytest.raises(ValueError, match=words):
        train(config, shape, **QUIET)
    assert same(weights(config.out), {name: seen[6][name] for name in weights(config.out)})
    assert train(dataclasses.replace(config, resume=True), **QUIET)["step"] == 50


def test_weights_gone_bad_are_never_saved(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=50, eval_every=1)

    def burst(inner, n, run):
        inner(run)
        if run.step == 5:
            run.model.lm_head.weight.data[0] = math.inf

    with instead("update", burst), pytest.raises(ValueError, match="the weights are bad, too"):
        train(config, shape, **QUIET)
    assert max(checkpoints(config.out)) == 4


def test_spikes_are_left_out_and_a_number_gone_bad_poisons_no_statistics(shards, tmp_path):
    act, seen = spoil({30, 33}, with_a_spike)
    with instead("gradients", act):
        train(*configure(shards, tmp_path / "run", max_steps=40, skip_spikes=8.0, eval_every=20),
              **QUIET)
    assert [row["step"] for row in read_log(tmp_path / "run") if "skipped" in row] == [30, 33]
    assert same(seen[30], seen[31]) and same(seen[33], seen[34])


def test_statistics_of_spikes_know_finite_numbers_only_and_are_saved(tmp_path):
    run = a_run(tmp_path, optimizer="adamw")
    steps = [(1.0 + i % 3 / 10, 0.5) for i in range(30)]
    assert not any(why_skip(run, *values, 8.0) for values in steps)
    for value in math.nan, math.inf:
        assert why_skip(run, value, 0.5, 8.0) == why_skip(run, 1.0, value, 8.0) == "not finite"
    assert why_skip(run, 9.0, 0.5, 8.0) == why_skip(run, 1.0, 5.0, 8.0) == "spike"
    save_run(tmp_path, snapshot(run))
    again = load_run(tmp_path, TrainConfig(precision="fp32", optimizer="adamw"), "cpu")
    assert again.recent == run.recent and len(again.recent) == 32


def test_a_spike_lies_above_not_below():
    past = [2.0 + i % 5 / 10 for i in range(50)]
    assert is_spike(4.0, past, 6.0) and is_spike(2.0, [1.0] * 50, 6.0)
    assert not any(is_spike(value, past, 6.0) for value in (0.1, 2.5))
    assert not is_spike(1.01, [1.0] * 50, 6.0)


def test_an_overflow_of_fp16_backs_off_and_recovers(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", precision="fp16", max_steps=30,
                              eval_every=30)

    def high(inner, n, *arguments):
        run = inner(*arguments)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return run

    act, seen = spoil((), None)
    with instead("new_run", high), instead("gradients", act):
        train(config, shape, **QUIET)
    rows = read_log(config.out)
    skipped = [row["step"] for row in rows if row.get("skipped") == "fp16 overflow"]
    assert skipped and max(skipped) < 20 and rows[-1]["val_loss"] < 5.7
    assert all(same(seen[step], seen[step + 1]) for step in skipped)


def starve(config, shape):
    """Train with four gigabytes of addresses."""
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    try:
        train(config, shape, **QUIET)
    except ValueError as error:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        Path(config.out, "said").write_text(str(error))


@slow
@posix
def test_memory_that_runs_out_is_explained_in_one_line(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", batch_size=1024, micro_batch_size=1024,
                              n_layer=12, n_embd=512, kernels="plain")
    in_process(starve, config, shape).join(120)
    said = Path(config.out, "said").read_text()
    assert said.startswith("out of memory with 1024 sequences of 32 tokens on cpu: ")
    for words in "--micro_batch_size", "--recompute", "--size", "python -m chapters.plan":
        assert words in said and "\n" not in said


# -----------------------------------------------------------------------------
# What resume refuses, and what it says.


def test_resume_refuses_another_model_and_corpus_with_all_differences(shards, tmp_path):
    config, shape = configure(shards, tmp_path / "run", max_steps=1)
    train(config, shape, **QUIET)
    text = tmp_path / "other.txt"
    text.write_text("another text about other things\n" * 100)
    other = prepare([text], tmp_path / "other", tokenizer=shards / "tokenizer.json", **QUIET)
    with pytest.raises(ValueError) as caught:
        train(dataclasses.replace(config, resume=True, data=str(other)),
              dataclasses.replace(shape, n_layer=3, norm="layernorm"), **QUIET)
    said = str(caught.value)
    for words in ("n_layer=3 (it has 2)", "norm=layernorm (it has rmsnorm)", "another corpus"):
        assert words in said
    assert "another tokenizer" not in said and "\n" not in said


def test_a_start_hashes_no_shard_again_and_one_with_a_changed_byte_is_refused(shards, tmp_path,
                                                                              monkeypatch):
    copy, hashed, digest = shutil.copytree(shards, tmp_path / "copy"), [], hashlib.file_digest

    def named(file, kind):
        hashed.extend([Path(file.name).stem] * str(file.name).endswith(".bin"))
        return digest(file, kind)
    monkeypatch.setattr(hashlib, "file_digest", named)
    config, shape = configure(copy, tmp_path / "run", max_steps=1)
    train(config, shape, **QUIET)  # of a copy nothing is known
    assert sorted(hashed) == ["train_000000", "val_000000"]
    resumed = dataclasses.replace(config, resume=True, max_steps=2)
    assert train(resumed, shape, **QUIET)["step"] == 2 and len(hashed) == 2
    path = copy / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")  # of the same size
    with pytest.raises(ValueError, match="train_000000.bin is damaged"):
        train(dataclasses.replace(resumed, max_steps=3), shape, **QUIET)


def test_resume_says_which_options_changed(shards, tmp_path):
    said, (config, shape) = [], configure(shards, tmp_path / "run", max_steps=1)
    train(config, shape, **QUIET)
    train(dataclasses.replace(config, resume=True, max_steps=2, learning_rate=0.5, batch_size=4,
                              schedule="wsd"), say=said.append)
    line = next(line for line in said if "goes on at step 1 with" in line)
    for words in ("learning_rate=0.5 (it has 0.02)", "batch_size=4 (it has 8)",
                  "max_steps=2 (it has 1)",
                  "schedule=wsd (it has linear)"):
        assert words in line


def test_options_typed_beside_resume_are_compared_with_the_checkpoint(shards, tmp_path):
    train(*configure(shards, tmp_path / "run", max_steps=1), **QUIET)
    typed = dict(resume=True, out=str(tmp_path / "run"), max_steps=2)
    assert train(*module.complete_options(typed, dict(n_layer=2)), **QUIET)["step"] == 2
    for more, model, words in [({}, dict(n_layer=3), "n_layer=3 (it has 2)"),
                               (dict(size="nano"), {}, "size=nano (it has mini)"),
                               (dict(vocab_size=300), {}, "vocab_size=300 (it has 4096)"),
                               (dict(optimizer="adamw"), {}, "leave out --optimizer")]:
        with pytest.raises(ValueError, match=re.escape(words)):
            train(*module.complete_options(typed | more, model), **QUIET)


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path):
    (tmp_path / "step_000001.pt").write_bytes(b"what torch.save wrote")
    with pytest.raises(ValueError, match="step_000001.pt.* an older version"):
        load_run(tmp_path, TrainConfig(precision="fp32"), "cpu")


def test_what_the_optimizer_remembers_is_checked_by_name_and_shape(tmp_path):
    run, ids = a_run(tmp_path), torch.arange(8).view(1, 8)
    take_step(run, run.model, [ids], [ids], 1.0)
    model, tensors, progress = snapshot(run)
    name = "optimizer.transformer.blocks.1.mlp.up_proj.weight.momentum"
    save_run(tmp_path, (model, tensors | {name: torch.zeros(2, 2)}, progress))
    with pytest.raises(ValueError, match=re.escape(f"{name} of shape (2, 2) fits no parameter")):
        load_run(tmp_path, TrainConfig(precision="fp32"), "cpu")
