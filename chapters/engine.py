"""
curate's work on a Dask cluster: on this machine, or on many that share a folder.

    python -m chapters.curate texts/raw --out=texts/good --engine=dask --workers=8
    PYTHONPATH=. dask scheduler             # in a copy of this folder, for a cluster of several
    PYTHONPATH=. dask worker tcp://HOST:8786 --nthreads=1             # on each machine, likewise
    python -m chapters.curate /shared/raw --out=/shared/good --engine=dask --cluster=tcp://HOST:8786

What is kept is what one machine keeps, also if workers die: Dask does their tasks again. On one
machine it is slower than --engine=none. Whoever reaches a scheduler can run code on all machines:
keep it in a network that you trust. This process reads the files and drops copies; it holds the
texts of a few batches, 24 bytes of each document, and 16 for each partition that finds it to be a
duplicate. While near-duplicates are sought a copy of all texts lies in a folder beside --out.
"""

import asyncio
import contextlib
import logging
import os
import tempfile
from collections import deque
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from pkgutil import resolve_name

import numpy as np

from chapters.near import (NEIGHBORS, band_keys, candidates, clusters, jaccard, near_clusters,
                           permutations, shingles, signature)

try:
    import dask.dataframe
    import pandas as pd
    from distributed import Client, KilledWorker, LocalCluster, comm
except ImportError:  # they are optional
    dask = None

PART_BYTES = 1 << 25  # of the texts that a task reads at a time
PATIENCE = 10  # seconds for a cluster to answer, and for its first worker


# -----------------------------------------------------------------------------
# A cluster.


async def greet(address):
    """Connect to a scheduler and hang up; OSError if none answers in time."""
    scheduler = await asyncio.wait_for(comm.connect(address), PATIENCE)
    await scheduler.close()


def connect(address, folder):
    """A Client of the scheduler at an address, whose workers see a folder; else ValueError."""
    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has a loop already
            thread.submit(asyncio.run, greet(address)).result()
        client = Client(address, timeout=PATIENCE)  # waits for ever for one that never answers
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--cluster={address}: no Dask scheduler answers there; "
                         "`dask scheduler` starts one and prints its address") from error
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
        for ask in client.run_on_scheduler, client.run:  # the scheduler unpacks the tasks, too
            ask(resolve_name, "chapters.engine:pd.DataFrame")
        seen = client.run(os.path.isdir, str(folder))
    except TimeoutError:
        reason = f"no worker in {PATIENCE} seconds; `dask worker {address}` starts one"
    except (ImportError, AttributeError) as error:
        reason = f"{error}: start its programs in this project's folder, with PYTHONPATH=."
    else:
        blind = [worker for worker, sees in seen.items() if not sees]
        if not blind:
            return client
        reason = f"the worker {blind[0]} has no {folder}: --out must be in a folder that all share"
    client.close()
    raise ValueError(f"--cluster={address}: {reason}")


@contextlib.contextmanager
def cluster(folder, address="", workers=0):
    """Two functions that take what tokenizer.on_all_cores and near.near_duplicates take, and do it
    on the cluster at an address, or a local one of so many workers (0: a core each), which ends
    with the context. Temporary files go into `folder`."""
    if dask is None:
        raise ValueError('--engine=dask needs more: pip install "dask[dataframe,distributed]"')
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(
            tempfile.TemporaryDirectory(dir=Path(folder).resolve(), prefix=".dask.")))
        if not address:
            stack.enter_context(dask.config.set({"temporary-directory": str(work)}))
            local = LocalCluster(n_workers=workers or os.cpu_count(), threads_per_worker=1,
                                 host="127.0.0.1", dashboard_address=None,
                                 silence_logs=logging.CRITICAL)
            address = stack.enter_context(local).scheduler_address
        client = stack.enter_context(connect(address, work))
        try:
            yield partial(run_all, client), partial(near_duplicates, client, work)
        except KilledWorker as error:
            raise ValueError(f"--engine=dask: {error.allowed_failures + 1} workers died of the "
                             "same task: give them more memory, or have fewer on a machine") \
                from error
        except (CancelledError, comm.CommClosedError) as error:
            raise ValueError(f"--cluster={address}: its scheduler ended; nothing is written, "
                             "begin again with another one") from error


def run_all(client, function, jobs):
    """tokenizer.on_all_cores, on a cluster: yield function(*job) for each job, in order. Only a few
    jobs are under way; those of a worker that dies are given to others."""
    results, n_threads = deque(), sum(client.nthreads().values())
    for job in jobs:
        results.append(client.submit(partial(function, *job), pure=False))
        if len(results) > 2 * n_threads:
            yield results.popleft().result()
    while results:
        yield results.popleft().result()


# -----------------------------------------------------------------------------
# Near-duplicates: documents become rows (key of a bucket, position), a row for each band. A shuffle
# brings the rows of a bucket together, from all machines.


class Shelf:
    """Texts in a folder that all workers see; of each, 8 bytes are mapped into memory."""

    def __init__(self, folder):
        self.file = open(folder / "texts", "rb")
        self.ends = np.load(folder / "ends.npy", mmap_mode="r")

    def __getitem__(self, i):
        start = int(self.ends[i - 1]) if i else 0
        self.file.seek(start)
        return self.file.read(int(self.ends[i]) - start).decode("utf-8", "surrogatepass")


def write_shelf(texts, folder):
    """Write texts for a Shelf -> the positions at which parts of about PART_BYTES start and end."""
    ends = np.empty(len(texts), np.int64)
    with open(folder / "texts", "wb") as file:
        for i in range(len(texts)):
            file.write(texts[i].encode("utf-8", "surrogatepass"))
            ends[i] = file.tell()
    np.save(folder / "ends.npy", ends)
    inner = np.searchsorted(ends, range(PART_BYTES, int(ends[-1]), PART_BYTES))
    return np.unique([0, *inner, len(ends)]).tolist()


def frame(**columns):
    """A table of columns, numbers of 8 bytes."""
    return pd.DataFrame(columns)


def bucket_rows(part, folder, n, hashes, bands, seed):
    """The rows of the documents first ... last - 1, where part is (first, last)."""
    texts, random, positions = Shelf(folder), permutations(hashes, seed), np.arange(*part)
    keys = [band_keys(signature(shingles(texts[i], n), random), bands) for i in positions]
    return frame(key=np.ravel(keys), position=np.repeat(positions, bands))


def duplicate_rows(rows, folder, threshold, n):
    """Rows (first, other) of what is similar to each other, of the rows of whole buckets."""
    rows, texts = rows.sort_values("position"), Shelf(folder)  # bucket_pairs() goes by positions
    positions, ids = np.unique(rows.position.to_numpy(), return_inverse=True)
    recent = lru_cache(2 * NEIGHBORS)(lambda i: shingles(texts[positions[i]], n))
    pairs = ((ids[i], ids[j]) for i, j in candidates(rows.key.to_numpy()[:, None]))
    found = clusters(pairs, len(positions), lambda i, j: jaccard(recent(i), recent(j)) >= threshold)
    edges = np.array([(first, i) for first, *others in found for i in others], int).reshape(-1, 2)
    return frame(first=positions[edges[:, 0]], other=positions[edges[:, 1]])


def near_duplicates(client, folder, texts, threshold=0.8, n=5, hashes=128, bands=16, seed=0):
    """near.near_duplicates on a cluster whose workers see `folder`: the same positions, sorted."""
    near_clusters([], threshold, n, hashes, bands, seed)  # ValueError for a wrong option
    if not len(texts):
        return []
    bounds = write_shelf(texts, folder)
    rows = dask.dataframe.from_map(
        bucket_rows, [*zip(bounds, bounds[1:])], folder=folder, n=n, hashes=hashes, bands=bands,
        seed=seed, meta=frame(key=np.zeros(0, np.uint64), position=np.zeros(0, int)))
    found = rows.shuffle("key", shuffle_method="p2p").map_partitions(
        duplicate_rows, folder=folder, threshold=threshold, n=n,
        meta=frame(first=np.zeros(0, int), other=np.zeros(0, int)))
    edges = client.compute(found).result()
    connected = clusters(edges.itertuples(index=False, name=None), len(texts))
    return sorted(i for _, *others in connected for i in others)
