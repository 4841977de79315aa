"""chapters/engine.py: on a cluster curate keeps what it keeps on one machine, whoever dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, mistake
from test_curate import rows_of, run, story, write

from chapters import curate
from chapters.near import clusters, near_duplicates

pytestmark = pytest.mark.all_cores
SLOW_CURATE = """
import test_engine
from chapters import curate, engine
from tokenizer import run_command
engine.bucket_rows = test_engine.bucket_rows_and_wait
run_command(curate.main)
"""
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@pytest.fixture
def engine(monkeypatch, tmp_path_factory):
    """The module, with parts so small that there are many; $MARKS is a new folder."""
    for package in "distributed", "dask.dataframe":
        pytest.importorskip(package, reason=f"--engine=dask is optional, and here is no {package}")
    from chapters import engine
    monkeypatch.setattr(engine, "PART_BYTES", 20_000)
    monkeypatch.setattr(curate, "BATCH_CHARS", 20_000)
    monkeypatch.setenv("MARKS", str(tmp_path_factory.mktemp("marks")))
    return engine


def corpus(n=200, seed=0):
    """Texts that pass the rules, some with up to 20 copies in which one word or several differ."""
    rng = random.Random(seed)
    texts = [story(seed=seed * 10_000 + i) for i in range(n)]
    for i in range(n // 4):
        for _ in range(20 if i < 5 else rng.randint(1, 3)):
            words = texts[i].split(" ")
            for at in rng.sample(range(len(words)), rng.randint(1, 6)):
                words[at] = "changed"
            texts.append(" ".join(words))
    rng.shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder with some hundred documents, their near-duplicates, copies, and faults."""
    texts = corpus()
    rows = [*texts, *texts[:9], "Too short.", f"lorem ipsum {story(seed=1)}", f"{texts[5]}\u200b\r"]
    lines = [json.dumps(dict(text=text)) for text in rows]
    lines[40:40] = ["broken {", json.dumps(dict(text=7)), json.dumps(dict(other="field"))]
    return write(tmp_path_factory.mktemp("engine") / "raw", rows__jsonl="\n".join(lines),
                 note__png=b"x", page__html=f"<main><p>{story(seed=2)} a@example.org</p></main>")


@pytest.fixture(scope="module")
def alone(raw, tmp_path_factory):
    """What curate says and keeps on one machine: the folder's name does not matter."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return facts(run(raw, out)[0]), rows_of(out)


def facts(card):
    """A card without the options that say where the work was done."""
    return card | dict(options={name: value for name, value in card["options"].items()
                                if name not in ("engine", "workers", "cluster", "out")})


def check_equal(alone, raw, out, **options):
    """Assert that curate keeps and counts the same on a cluster, and leaves nothing else."""
    card, _ = run(raw, out, engine="dask", **options)
    assert (facts(card), rows_of(out)) == alone and os.listdir(out.parent) == [out.name]
    counts = {stage["name"]: stage["dropped"] for stage in card["stages"]}
    assert counts["near-duplicates"] > 60 and counts["copies"] > 8 and counts["rules"] > 1


# -----------------------------------------------------------------------------
# What workers are given to do.


def mark(name):
    """Leave a mark, a file -> whether there was none."""
    try:
        Path(os.environ["MARKS"], name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def marks():
    return sorted(os.listdir(os.environ["MARKS"]))


def die():
    """End this process as a kernel without memory does."""
    import psutil
    psutil.Process().kill()


def die_once(name):
    if mark(name):
        die()


def run_batch_and_die(config, batch):
    from chapters.stages import run_batch
    if int(batch[0][0].split()[-1]) > 100:  # of the documents some are done
        die_once("run_batch")
    return run_batch(config, batch)


def bucket_rows_and_die(part, **options):
    from chapters.engine import bucket_rows
    if part[0] > 100:
        die_once("bucket_rows")
    return bucket_rows(part, **options)


def duplicate_rows_and_die(rows, **options):
    from chapters.engine import duplicate_rows
    die_once("duplicate_rows")
    return duplicate_rows(rows, **options)


def bucket_rows_and_wait(part, **options):
    mark("waits")
    time.sleep(300)


def square(number):
    mark(f"{number:03}")
    return number * number


def fail_at_5(number):
    if number == 5:
        raise ValueError("row 5 is wrong")


def always_die(number):
    die()


# -----------------------------------------------------------------------------
# Near-duplicates, with a shuffle in plain Python in the place of the cluster's.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_of_shuffled_rows_are_those_of_one_machine(engine, tmp_path, seed):
    texts = [*corpus(60, seed), "", "short", *["a page with one frame " * 9] * 30]
    bounds = engine.write_shelf(texts, tmp_path)
    assert len(bounds) > 3 and bounds[0] == 0 and bounds[-1] == len(texts)
    rows = engine.pd.concat([engine.bucket_rows(part, tmp_path, 5, 128, 16, seed)
                             for part in zip(bounds, bounds[1:])]).sample(frac=1, random_state=seed)
    edges = [edge for _, part in rows.groupby(rows.key % 7) for edge in
             engine.duplicate_rows(part, tmp_path, 0.7, 5).itertuples(index=False, name=None)]
    found = [i for _, *others in clusters(edges, len(texts)) for i in others]
    assert sorted(found) == near_duplicates(texts, 0.7, seed=seed) and len(found) > 80


@pytest.mark.slow
def test_a_shelf_gives_the_texts_that_were_put_on_it(engine, tmp_path):
    texts = ["", "naïve", "\ud800 alone", "x" * 50_000, "", "漢字"]
    assert engine.write_shelf(texts, tmp_path) == [0, 3, 6]
    shelf = engine.Shelf(tmp_path)
    assert [shelf[i] for i in (5, 4, 3, 2, 1, 0)] == texts[::-1]


# -----------------------------------------------------------------------------
# On a cluster of two workers.


@pytest.mark.slow
def test_a_cluster_keeps_and_counts_what_one_machine_does(engine, alone, raw, tmp_path):
    check_equal(alone, raw, tmp_path / "out", workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_batch", "bucket_rows", "duplicate_rows"])
def test_a_worker_that_is_killed_midway_changes_nothing(engine, alone, raw, tmp_path, monkeypatch,
                                                        name):
    monkeypatch.setattr(curate if name == "run_batch" else engine, name,
                        globals()[f"{name}_and_die"])
    check_equal(alone, raw, tmp_path / "out", workers=2)
    assert marks() == [name]


@pytest.mark.slow
def test_results_come_in_order_and_few_jobs_are_under_way(engine, tmp_path):
    with engine.cluster(tmp_path, workers=2) as (run_all, _):
        results = run_all(square, ((number,) for number in range(100)))
        assert [next(results) for _ in range(10)] == [number**2 for number in range(10)]
        time.sleep(1)
        assert 10 <= len(marks()) <= 10 + 2 * 2 + 1
        assert [*results] == [number**2 for number in range(10, 100)]
        assert [*run_all(square, [])] == []
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_mistake_on_a_worker_is_that_of_the_caller(engine, tmp_path):
    with (pytest.raises(ValueError, match="^row 5 is wrong$"),
          engine.cluster(tmp_path, workers=2) as (run_all, _)):
        [*run_all(fail_at_5, [(number,) for number in range(9)])]
    with (pytest.raises(ValueError, match="hashes=10.* a multiple of bands=16"),
          engine.cluster(tmp_path, workers=1) as (_, near)):
        near(["a text"], hashes=10)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_job_that_no_worker_survives_ends_in_one_line(engine, tmp_path):
    with (pytest.raises(ValueError, match="^--engine=dask: 4 workers died of the same task"),
          engine.cluster(tmp_path, workers=2) as (run_all, _)):
        [*run_all(always_die, [(1,)])]


@pytest.mark.slow
def test_no_texts_have_no_near_duplicates(engine, tmp_path):
    with engine.cluster(tmp_path, workers=1) as (_, near):
        assert near([]) == near(["one"]) == [] and near(["two words"] * 3) == [1, 2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_the_cluster_and_leaves_no_process_and_no_folder(engine, raw, tmp_path, to_all):
    import psutil
    words = [raw, f"--out={tmp_path / 'out'}", "--engine=dask", "--workers=2"]
    process = subprocess.Popen([sys.executable, "-c", SLOW_CURATE, *map(str, words)],
                               env=os.environ | dict(PYTHONPATH=PATHS, TMPDIR=str(tmp_path)),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while process.poll() is None and not marks():
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2 and len([*tmp_path.iterdir()]) >= 2
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[-1:] == ["interrupted"]
    assert process.returncode == 130 and os.listdir(tmp_path) == []
    assert psutil.wait_procs(children, timeout=10)[1] == []


# -----------------------------------------------------------------------------
# On a cluster that runs already.


@contextmanager
def program(*words, **env):
    """Run a program of distributed until the context ends."""
    words = [sys.executable, "-m", *map(str, words)]
    process = subprocess.Popen(words, env=os.environ | env, cwd=os.environ["MARKS"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def running(n_workers, scheduler=PATHS, workers=PATHS):
    """The address of a cluster of workers, as `dask scheduler` and `dask worker` start it."""
    file = Path(os.environ["MARKS"], "scheduler.json")
    with ExitStack() as stack:
        stack.enter_context(program("distributed.cli.dask_scheduler", "--host=127.0.0.1",
                                    "--port=0", "--no-dashboard", "--scheduler-file", file,
                                    PYTHONPATH=scheduler))
        while not file.exists() or not file.read_text().strip().endswith("}"):
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        for _ in range(n_workers):
            stack.enter_context(program("distributed.cli.dask_worker", address, "--nthreads=1",
                                        "--no-dashboard", "--local-directory", file.parent,
                                        PYTHONPATH=workers))
        yield address


@pytest.mark.slow
def test_a_cluster_that_runs_does_the_same_and_runs_on(engine, alone, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 60)
    with running(2) as address:
        check_equal(alone, raw, tmp_path / "out", cluster=address)
        with engine.cluster(tmp_path, address) as (run_all, _):
            assert [*run_all(square, [(3,)])] == [9]


@pytest.mark.slow
def test_a_scheduler_that_ends_midway_is_one_line(engine, tmp_path, monkeypatch):
    import psutil
    monkeypatch.setattr(engine, "PATIENCE", 60)
    with (running(1) as address, pytest.raises(ValueError, match="its scheduler ended; nothing is"),
          engine.cluster(tmp_path, address) as (run_all, _)):
        for number in run_all(square, ((number,) for number in range(100_000))):
            if number == 25:
                [scheduler] = [process for process in psutil.Process().children()
                               if "distributed.cli.dask_scheduler" in process.cmdline()]
                scheduler.kill()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_cluster_that_cannot_do_it_is_one_line(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 2)
    with running(0) as address:
        with pytest.raises(ValueError, match=f"^--cluster={address}: no worker in 2 seconds; "):
            engine.connect(address, tmp_path)
    monkeypatch.setattr(engine, "PATIENCE", 60)
    for paths in dict(scheduler=""), dict(workers=""):
        with running(1, **paths) as address:
            with pytest.raises(ValueError, match="No module named 'chapters': start its programs"):
                engine.connect(address, tmp_path)
    with running(1) as address:
        with pytest.raises(ValueError, match="has no .*nowhere: --out must be in a folder"):
            engine.connect(address, tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:1", "tcp://127.0.0.1:x",
                                     "http://127.0.0.1:80", "tcp://no.such.host.invalid:8786"])
def test_a_wrong_address_is_one_line(engine, raw, tmp_path, monkeypatch, capsys, address):
    monkeypatch.setattr(engine, "PATIENCE", 1)
    code, lines = mistake(curate.main, monkeypatch, capsys, raw, f"--out={tmp_path / 'out'}",
                          "--engine=dask", f"--cluster={address}")
    assert code == 1 and lines == [f"error: --cluster={address}: no Dask scheduler answers there; "
                                   "`dask scheduler` starts one and prints its address"]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_whoever_listens_and_is_silent_is_no_scheduler(engine, tmp_path, monkeypatch):
    import socket
    monkeypatch.setattr(engine, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ValueError, match="no Dask scheduler answers there"):
            engine.connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", tmp_path)


# -----------------------------------------------------------------------------
# Without a cluster.


@pytest.mark.parametrize("words, message", [
    (["--engine=spark"], "unknown engine 'spark': choose from none, dask"),
    (["--workers=2"], "--workers would not act without --engine"),
    (["--cluster=tcp://host:1"], "--cluster would not act without --engine"),
    (["--engine=dask", "--workers=2", "--cluster=x"], "--workers would not act beside --cluster"),
    (["--engine=dask", "--workers=-1"], "workers=-1 must be at least 0")])
def test_a_wrong_option_is_one_line(raw, tmp_path, monkeypatch, capsys, words, message):
    words = [raw, f"--out={tmp_path / 'out'}", *words]
    code, lines = mistake(curate.main, monkeypatch, capsys, *words)
    assert code == 1 and len(lines) == 1 and message in lines[0] and os.listdir(tmp_path) == []


def test_without_its_packages_the_engine_is_one_line(raw, tmp_path, monkeypatch, capsys):
    from chapters import engine
    monkeypatch.setattr(engine, "dask", None)  # as where its import fails
    words = [raw, f"--out={tmp_path / 'out'}", "--engine=dask"]
    code, lines = mistake(curate.main, monkeypatch, capsys, *words)
    assert lines == ['error: --engine=dask needs more: pip install "dask[dataframe,distributed]"']
    assert code == 1 and os.listdir(tmp_path) == []
