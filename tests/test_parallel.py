"""chapters/parallel.py, pipeline.py and processes.py: each equal to torch's and to one process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tiny
from torch.nn.parallel import DistributedDataParallel

from chapters.parallel import (BucketedDataParallel, RowLinear, ShardedAdamW, ring_all_reduce,
                               tensor_parallel)
from chapters.pipeline import Pipeline, bubble, gpipe, in_flight, one_f_one_b, timeline
from chapters.processes import counted_bytes, spawn, wire_bytes
from train import Stage

pytestmark = pytest.mark.all_cores
SIZES = [1, 2, 3, 7, 1000, 100_001]
SCHEDULES = gpipe, one_f_one_b
BATCH = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(0))
ADAMW = dict(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def pairs(n, of=BATCH):
    """The batch as n pairs (ids, targets)."""
    return [(ids[:, :-1], ids[:, 1:]) for ids in of.chunk(n)]


def mine():
    """This process's part of the batch, of which there are n."""
    return BATCH.chunk(dist.get_world_size())[dist.get_rank()]


def grads(model):
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()
            if p.grad is not None}


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def alone(steps=0, **options):
    """The gradients of one process on the whole batch, or its weights after steps of AdamW."""
    model = tiny(**options)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for _ in range(max(steps, 1)):
        model.zero_grad()
        model(*pairs(1)[0])[1].backward()
        if steps:
            optimizer.step()
    return weights(model) if steps else grads(model)


def gap(found, expected):
    """The largest difference between two {name: tensor}, each as a share of its largest number; a
    gradient that is zero, as that of a key's bias, may be off by 1e-3 of that share."""
    assert found.keys() == expected.keys()
    return max(((found[name] - expected[name]).abs().max()
                / (expected[name].abs().max() + 1e-3)).item() for name in found)


def sent_by(function, *arguments):
    """-> (what function(*arguments) returns, {operation: bytes that it sends}, bytes over TCP)."""
    dist.barrier()
    before = wire_bytes()
    with counted_bytes() as sent:
        result = function(*arguments)
    dist.barrier()
    return result, dict(sent), (wire_bytes() or 0) - (before or 0)


# -----------------------------------------------------------------------------
# What runs in the processes: a function for each idea, which returns facts.


def ring():
    facts = []
    for size in SIZES:
        x = torch.arange(size) * 0.37 + dist.get_rank()
        expected = x.clone()
        dist.all_reduce(expected)
        _, sent, on_wire = sent_by(ring_all_reduce, x)
        facts.append((torch.allclose(x, expected), sent["send"], on_wire))
    return facts


def data_parallel():
    """Two micro-batches on each process, the first without communication; twice."""
    class Watched(BucketedDataParallel):
        def launch(self):
            events.append("launch")
            super().launch()

    events, model, reference = [], tiny(seed=dist.get_rank()), tiny()
    model.transformer.wte.weight.register_post_accumulate_grad_hook(
        lambda p: events.append("last gradient"))
    ours, theirs = Watched(model, 20_000), DistributedDataParallel(reference)
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        for number, (ids, targets) in enumerate(pairs(2, mine())):
            ours.sync = number == 1
            (model(ids, targets)[1] / 2).backward()
            with nullcontext() if number == 1 else theirs.no_sync():
                (theirs(ids, targets)[1] / 2).backward()
        ours.finish()
    found, sizes = grads(model), [sum(p.nbytes for p in bucket) for bucket in ours.buckets]
    return dict(events=events, sizes=sizes, alone=gap(found, alone()),
                torch=gap(found, grads(reference)))


def said(mistake):
    try:
        return mistake()
    except ValueError as error:
        return str(error)


def misuse():
    """A parameter without a gradient gets zeros, and what cannot be done is refused."""
    model = tiny()
    model.idle = torch.nn.Parameter(torch.ones(3))
    ours, (ids, targets) = BucketedDataParallel(model, 10_000), pairs(1, mine())[0]
    model(ids, targets)[1].backward()
    ours.finish()
    found = grads(model)
    idle = found.pop("idle").tolist()
    mistakes = [lambda: [model(ids, targets)[1].backward() for _ in range(2)],
                lambda: tensor_parallel(tiny(n_kv_head=1)),
                lambda: RowLinear(torch.nn.Linear(5, 4))]
    return dict(idle=idle, alone=gap(found, alone()), said=[*map(said, mistakes)])


def zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer
    model, reference = tiny(), tiny()
    ours = ShardedAdamW(model.parameters(), **ADAMW)
    theirs = DistributedDataParallel(reference)
    optimizer = ZeroRedundancyOptimizer(reference.parameters(), torch.optim.AdamW, **ADAMW)
    for _ in range(3):
        for each, called, step in ((model, model, ours.step), (reference, theirs, optimizer.step)):
            each.zero_grad()
            called(*pairs(1, mine())[0])[1].backward()
            each.sent = sent_by(step)[1]
    found = weights(model)
    return dict(alone=gap(found, alone(steps=3)), torch=gap(found, weights(reference)),
                state=ours.m.numel() + ours.v.numel(), sent=model.sent["send"],
                n_parameters=model.n_parameters())


def part_of(name, grad):
    """This process's part of a gradient of the whole model, if tensor parallelism splits it."""
    layer, kind = name.split(".")[-2:]
    columns = layer in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    if columns or layer in ("o_proj", "down_proj") and kind == "weight":
        return grad.chunk(dist.get_world_size(), 0 if columns else 1)[dist.get_rank()]
    return grad


def tensors(architecture, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (ColwiseParallel, RowwiseParallel,
                                                   parallelize_module)
    options |= dict(architecture=architecture)
    whole, single = tiny(**options), alone(**options)
    model, reference = tensor_parallel(tiny(**options)), tiny(**options)
    plan = dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj",
                          "mlp.up_proj"), ColwiseParallel())
    plan |= dict.fromkeys(("attn.o_proj", "mlp.down_proj"), RowwiseParallel())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in reference.transformer.blocks:
        parts = dict(block.named_modules())
        parallelize_module(block, mesh, {name: plan[name] for name in plan if name in parts})
    losses = [each(*pairs(1)[0])[1] for each in (whole, model, reference)]
    sent = [sent_by(loss.backward)[1] for loss in losses[1:]]
    found = grads(model)
    theirs = {name: p.to_local() if hasattr(p, "to_local") else p
              for name, p in grads(reference).items()}
    expected = {name: part_of(name, p) for name, p in single.items()}
    norms = {name for name in found if "_norm.weight" in name and ".attn." in name}
    return dict(alone=gap(found, expected), losses=[loss.item() for loss in losses], sent=sent,
                torch=gap(*({name: p for name, p in each.items() if name not in norms}
                            for each in (found, theirs))),
                unsummed=[gap({name: theirs[name]}, {name: expected[name]}) for name in norms],
                held=sum(p.numel() for p in model.transformer.blocks.parameters()),
                whole=sum(p.numel() for p in whole.transformer.blocks.parameters()))


def pipeline(architecture, **options):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
    rank, n, facts = dist.get_rank(), dist.get_world_size(), {}
    options |= dict(architecture=architecture, n_layer=4, tied=False)
    (x, y), whole = pairs(1)[0], alone(**options)
    for ours, theirs in ((gpipe, ScheduleGPipe), (one_f_one_b, Schedule1F1B)):
        model, reference = tiny(**options), tiny(**options)
        run = Pipeline(Stage(model, rank, n), model.mean_loss, (2, 16, 32)).run
        loss, sent, on_wire = sent_by(run, pairs(4), ours(n, 4))
        engine = theirs(PipelineStage(Stage(reference, rank, n), rank, n, "cpu"), 4,
                        loss_fn=reference.mean_loss)
        engine.step(*[x] * (rank == 0), ids=x, **dict(target=y) if rank == n - 1 else {})
        found = grads(model)
        facts[ours.__name__] = dict(
            alone=gap(found, {name: whole[name] for name in found}), names={*found}, sent=sent,
            torch=gap(found, grads(reference)), loss=loss if loss is None else loss.item())
    return facts | dict(names={*whole}, loss=tiny(**options)(x, y)[1].item())


def bytes_of_torch():
    """What is counted of torch's own, and by the kernel, in the second step of each."""
    from torch.distributed.fsdp import fully_shard
    def step(model):
        model.zero_grad()
        model(*pairs(1, mine())[0])[1].backward()

    def shard(model):
        for block in model.transformer.blocks:
            fully_shard(block)
        return fully_shard(model)

    facts = {}
    for name, build in dict(ddp=DistributedDataParallel, fsdp=shard).items():
        model = build(tiny(n_embd=256, vocab_size=64))
        for _ in range(3):
            facts[name] = sent_by(step, model)[1:]
    model = tiny(n_embd=256)
    return facts | dict(n_bytes=4 * model.n_parameters(), n_bytes_of_blocks=sum(
        p.nbytes for p in model.transformer.blocks.parameters()))


def facts():
    return dict(ring=ring(), data_parallel=data_parallel(), misuse=misuse(), zero=zero(),
                modern=tensors("modern", n_kv_head=4), gpt2=tensors("gpt2"), torch=bytes_of_torch(),
                pipelines=[pipeline("modern"), pipeline("gpt2")])


@pytest.fixture(scope="session", params=[pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)])
def found(request):
    """What each of so many processes found out."""
    return spawn(request.param, facts)


def wake_and_sleep(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(300)


def fail(rank, what):
    """The process of a rank fails, and another waits for it."""
    if dist.get_rank() == rank:
        what()
    dist.barrier()


def refuse():
    raise ValueError("no\nsuch thing")


# -----------------------------------------------------------------------------
# The ring, data parallel, ZeRO-1, tensor parallel.


def test_a_ring_all_reduce_is_torchs_for_sizes_that_nothing_divides(found):
    assert all(right for each in found for right, _, _ in each["ring"])


def test_a_ring_sends_two_times_n_minus_1_nths_of_the_bytes(found):
    n = len(found)
    for i, size in enumerate(SIZES):
        sent = [each["ring"][i][1] for each in found]
        assert sum(sent) == 2 * (n - 1) * 4 * size and max(sent) - min(sent) <= 8
        assert size % n or {*sent} == {2 * (n - 1) * 4 * size // n}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the bytes of a connection")
def test_the_kernel_counts_as_many_bytes_as_we_do(found):
    for each in found:
        _, sent, on_wire = each["ring"][-1]
        assert sent < on_wire < 1.01 * sent
        counted, on_wire = each["torch"]["ddp"]
        assert counted["allreduce"] < on_wire < 1.01 * counted["allreduce"]
        counted, on_wire = each["torch"]["fsdp"]
        expected = counted["allgather"] + 2 * counted["reducescatter"]  # which gloo all-reduces
        assert expected < on_wire < 1.01 * expected


def test_the_bytes_that_are_counted_of_torchs_ddp_and_fsdp_are_those_of_the_formulas(found):
    n = len(found)
    for each in found:
        n_bytes, blocks = (each["torch"][name] for name in ("n_bytes", "n_bytes_of_blocks"))
        assert each["torch"]["ddp"][0] == {"allreduce": 2 * (n - 1) * n_bytes / n}
        assert each["torch"]["fsdp"][0] == {  # blocks are gathered for backward again
            "allgather": (n - 1) * (n_bytes + blocks) / n, "reducescatter": (n - 1) * n_bytes / n}


def test_data_parallel_has_the_gradients_of_torchs_and_of_one_process(found):
    for each in found:
        assert each["data_parallel"]["torch"] < 1e-5 > each["data_parallel"]["alone"]


def test_buckets_are_sent_before_backward_ends_and_only_in_the_last_micro_batch(found):
    for each in found:
        sizes, events = (each["data_parallel"][name] for name in ("sizes", "events"))
        once = ["last gradient", *["launch"] * (len(sizes) - 1), "last gradient", "launch"]
        assert len(sizes) > 5 and max(sizes) <= 20_000 and events == once * 2


def test_a_parameter_that_is_not_used_holds_nothing_up(found):
    for each in found:
        assert each["misuse"]["idle"] == [0, 0, 0] and each["misuse"]["alone"] < 1e-5


def test_what_cannot_be_done_is_refused_in_a_line(found):
    n = len(found)
    for each in found:
        assert each["misuse"]["said"] == [
            "a second backward before finish(): set sync = False during the first",
            f"n_kv_head=1 is no multiple of {n} processes",
            f"5 channels are no multiple of {n} processes"]


def test_zero_1_takes_the_steps_of_torchs_and_of_one_process(found):
    for each in found:
        assert each["zero"]["torch"] < 1e-4 and each["zero"]["alone"] < 1e-3


def test_zero_1_keeps_its_share_of_the_state_and_sends_no_more_than_an_all_reduce(found):
    n, size = len(found), found[0]["zero"]["n_parameters"]
    states, sent = ([each["zero"][name] for each in found] for name in ("state", "sent"))
    assert sum(states) == 2 * size and max(states) - min(states) <= 2
    assert sum(sent) == 2 * (n - 1) * 4 * size and max(sent) - min(sent) <= 8


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_tensor_parallel_has_the_gradients_and_bytes_of_torchs_and_of_one_process(found, name):
    for each in (each[name] for each in found):
        assert each["alone"] < 1e-5 > each["torch"]
        assert each["losses"] == pytest.approx([each["losses"][0]] * 3, rel=1e-6)
        ours, theirs = (sent["allreduce"] for sent in each["sent"])
        assert 0 <= ours - theirs < 1000  # the sums of the norms' gradients
        assert each["whole"] / len(found) <= each["held"] < each["whole"] / len(found) + 500


def test_without_a_sum_the_norms_of_queries_and_keys_would_have_wrong_gradients(found):
    for each in found:
        assert len(each["modern"]["unsummed"]) == 4 and min(each["modern"]["unsummed"]) > 0.01


# -----------------------------------------------------------------------------
# Pipelines.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("i", [0, 1])
def test_a_pipeline_has_the_gradients_of_torchs_and_of_one_process(found, schedule, i):
    runs = [each["pipelines"][i][schedule.__name__] for each in found]
    for run in runs:
        assert run["alone"] < 1e-5 > run["torch"]
    *others, loss = (run["loss"] for run in runs)
    assert others == [None] * (len(found) - 1)
    assert loss == pytest.approx(found[0]["pipelines"][i]["loss"], rel=1e-6)
    names = [name for run in runs for name in run["names"]]
    assert sorted(names) == sorted(found[0]["pipelines"][i]["names"])


def test_a_stage_sends_activations_forward_and_their_gradients_back(found):
    for rank, each in enumerate(found):
        n_ways, one_way = (rank > 0) + (rank < len(found) - 1), 4 * 2 * 16 * 32 * 4
        assert each["pipelines"][0]["gpipe"]["sent"] == {"send": n_ways * one_way}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p, m", [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (4, 4), (4, 8), (8, 64)])
def test_a_schedule_is_complete_and_in_order_and_its_bubble_is_that_of_the_formula(schedule, p, m):
    grid = timeline(schedule(p, m))
    when = {(*cell, stage): time for stage, row in enumerate(grid)
            for time, cell in enumerate(row) if cell}
    assert when.keys() == {(kind, i, s) for kind in "FB" for i in range(m) for s in range(p)}
    for i in range(m):
        way = [when["F", i, stage] for stage in range(p)]
        way += [when["B", i, stage] for stage in reversed(range(p))]
        assert all(a < b for a, b in pairwise(way))
    assert bubble(schedule(p, m)) == pytest.approx((p - 1) / (m + p - 1), rel=1e-12)


def test_one_forward_one_backward_keeps_no_more_micro_batches_than_stages():
    for p, m in ((2, 3), (4, 2), (4, 16), (8, 64)):
        assert in_flight(gpipe(p, m)) == [m] * p
        assert in_flight(one_f_one_b(p, m)) == [min(m, p - stage) for stage in range(p)]


def test_a_schedule_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="wait for each other after 1 units"):
        timeline([[("F", 0), ("B", 1), ("B", 0)], [("F", 1), ("F", 0), ("B", 0)]])


def test_the_drawing_in_the_docstring_is_the_timeline():
    rows = [[" ".join("".join(map(str, cell)) if cell else ". " for cell in row).strip()
             for row in timeline(schedule(2, 3))] for schedule in SCHEDULES]
    for left, right in zip(*rows):
        assert any(left in line and line.endswith(right)
                   for line in sys.modules["chapters.pipeline"].__doc__.splitlines())


# -----------------------------------------------------------------------------
# Processes.


@pytest.mark.slow
@pytest.mark.parametrize("rank, what, message", [
    (1, refuse, r"^process 1 of 2: ValueError: no\nsuch thing$"),
    (0, sys.exit, "^process 0 of 2: SystemExit: $"),
    (0, partial(os._exit, 7), "^process 0 of 2 died with exit code 7$")])
def test_the_error_of_a_process_is_one_error_and_no_process_stays(rank, what, message):
    with pytest.raises(RuntimeError, match=message) as error:
        spawn(2, fail, rank, what)
    assert multiprocessing.active_children() == []
    assert what is not refuse or "in refuse" in str(error.value.__cause__)


@pytest.mark.slow
def test_processes_that_do_not_end_are_named_and_ended():
    with pytest.raises(RuntimeError, match="^process 0, 1 of 2 did not end within 0.1 seconds$"):
        spawn(2, time.sleep, 300, timeout=0.1)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a signal of POSIX")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
def test_the_processes_end_with_the_one_that_started_them(kind, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from chapters.processes import spawn\nfrom test_parallel import "
                      "wake_and_sleep\nif __name__ == '__main__':\n"
                      f"    spawn(2, wake_and_sleep, {str(tmp_path)!r})")
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL, env=dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])))
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in tmp_path.glob("[0-9]*")]) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(getattr(signal, kind))
    assert parent.wait(30) == -getattr(signal, kind)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.05)


@pytest.mark.slow
def test_a_function_of_a_notebook_runs_in_processes_with_what_it_names():
    nbformat = pytest.importorskip("nbformat", reason="opens notebooks")
    from chapters.checks import execute
    cells = ["import torch\nimport torch.distributed as dist\nfrom chapters.parallel import "
             "ring_all_reduce as add\nfrom chapters.processes import spawn\nSIZE = 3\n"
             "ids = [torch.ones(2)]",
             "def ones(n):\n    return torch.ones(n) * dist.get_world_size()",
             "def total(factor):\n    ids = ones(SIZE)\n"
             "    return factor * sum([add(ids.clone()).sum().item() for _ in range(2)])",
             "spawn(2, total, 10)"]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    output, = execute(notebook, ROOT).cells[-1].outputs
    assert output["data"]["text/plain"] == "[240.0, 240.0]"
