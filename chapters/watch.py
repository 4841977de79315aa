"""
What a server says of itself to Prometheus, and a cache of answers that it need not compute twice.

    python -m chapters.serve runs/chat
    curl -s http://127.0.0.1:8000/metrics

A counter only grows; Prometheus computes what a second holds: rate(llm_tokens_total[1m]) are
tokens/s, histogram_quantile(0.95, rate(llm_first_token_seconds_bucket[5m])) is p95 of the first
token. chapters.drift watches the prompts.
"""

import hashlib
import json
import threading
import time
from collections import OrderedDict

from prometheus_client import (CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector,
                               generate_latest)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = [2**i for i in range(15)]
ENTRY_BYTES = 300        # what a cache entry takes beside its key and value

# -----------------------------------------------------------------------------
# A cache of responses: the same request with the same weights has the same answer.


class Recent:
    """A cache of bytes by key that holds max_bytes: what was used last stays."""

    def __init__(self, max_bytes):
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.entries, self.lock = OrderedDict(), threading.Lock()

    def get(self, key):
        """The value of a key, or None."""
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
            return self.entries.get(key)

    def put(self, key, value):
        """Keep a value; those not used for the longest time go where there is no room."""
        with self.lock:
            self.n_bytes -= self.size(key, self.entries.pop(key, None))
            self.entries[key] = value
            self.n_bytes += self.size(key, value)
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self.size(*self.entries.popitem(last=False))

    @staticmethod
    def size(key, value):
        return 0 if value is None else len(key) + len(value) + ENTRY_BYTES


def is_determined(request):
    """Whether a request, a dict, has one answer alone: at temperature 0, or with a seed."""
    return request.get("temperature") == 0 or request.get("seed") is not None


def response_key(weights, request, ignored=("stream", "stream_options", "user", "model")):
    """The key of a request, a dict that JSON can hold, to the model with this checksum; what is
    ignored does not change the text."""
    asked = {name: value for name, value in request.items() if name not in ignored}
    text = json.dumps([weights, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# -----------------------------------------------------------------------------
# Metrics, in a registry of their own, so that a process may have two servers.

GAUGES = dict(rows="Texts that are being written.", waiting="Texts that wait.",
              blocks="Blocks of keys and values.", blocks_used="Blocks that texts under way hold.",
              blocks_cached="Blocks kept for prompts that begin alike.")
COUNTERS = dict(steps="Forward passes.", prompt_tokens="Tokens of prompts.",
                hit_tokens="Tokens of prompts that were found in the prefix cache.",
                preempted="Texts that had to wait again, as blocks ran out.")


class EngineCollector:
    """Asks the engine for its counts, a dict, whenever Prometheus asks."""

    def __init__(self, counts):
        self.counts = counts

    def collect(self):
        found = self.counts()
        yield from (GaugeMetricFamily(f"llm_{name}", text, found[name])
                    for name, text in GAUGES.items())
        yield from (CounterMetricFamily(f"llm_engine_{name}", text, found[name])
                    for name, text in COUNTERS.items())


class Metrics:
    """What Prometheus reads: counters of requests, tokens, ratings and lookups in the cache of
    responses, histograms of latency and of prompts' lengths, drift, and what an engine counts."""

    def __init__(self, counts=None):
        """counts: a function without arguments -> the counts of an engine, or a sum of several."""
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)  # process_resident_memory_bytes and CPU time, on Linux
        if counts:
            own.register(EngineCollector(counts))
        self.requests = Counter("llm_requests", "Requests answered, refused or failed.",
                                ["path", "arm", "status"], registry=own)
        self.tokens = Counter("llm_tokens", "Tokens written.", ["arm"], registry=own)
        self.lookups = Counter("llm_response_lookups", "Lookups in the cache of responses.",
                               ["result"], registry=own)
        self.ratings = Counter("llm_ratings", "Ratings by users.", ["arm", "rating"], registry=own)
        self.first, self.each, self.whole = (
            Histogram(f"llm_{name}_seconds", f"{text}, in seconds.", ["arm"], buckets=SECONDS,
                      registry=own) for name, text in (
                ("first_token", "From a request to its first token"),
                ("token", "From a token to the next of the same text"),
                ("request", "From a request to the end of its answer")))
        self.prompt = Histogram("llm_prompt_tokens", "Tokens in a prompt.", buckets=TOKENS,
                                registry=own)
        self.drift = Gauge("llm_drift", "Kolmogorov-Smirnov distance of prompts to the reference.",
                           ["measure"], registry=own)

    def text(self):
        """All of it in Prometheus's text format, as bytes."""
        return generate_latest(self.registry)


class Stopwatch:
    """The times of one answer: token() at each of its tokens, end() when it is whole."""

    def __init__(self, metrics, arm, start, clock=time.perf_counter):
        self.metrics, self.arm, self.start, self.clock = metrics, arm, start, clock
        self.last = self.first = None

    def token(self, is_timed=True):
        """Count a token; of a request for several texts only one is timed."""
        self.metrics.tokens.labels(self.arm).inc()
        if not is_timed:
            return
        now = self.clock()
        if self.last is None:
            self.first = now - self.start
            self.metrics.first.labels(self.arm).observe(self.first)
        else:
            self.metrics.each.labels(self.arm).observe(now - self.last)
        self.last = now

    def end(self):
        self.metrics.whole.labels(self.arm).observe(self.clock() - self.start)
