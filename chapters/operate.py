"""
A server in operation: it is measured, computes no answer twice, takes feedback, notices when
prompts drift, and changes from one run to another while clients stream.

    python -m chapters.serve runs/chat --feedback=feedback.jsonl
    SERVE_KEY=... python -m chapters.serve runs/chat --run_b=runs/new --canary
    curl http://127.0.0.1:8000/admin/rollout -H "Authorization: Bearer $SERVE_KEY" \\
         --json '{"run": "runs/new", "share": 10}'   # {"share": 0} ends it, {"share": 100} too
"""

import asyncio
import json
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from chapters.drift import PromptWatch, read_reference
from chapters.feedback import FeedbackLog, TooMany
from chapters.gate import read_body
from chapters.protocol import Chat, Refusal, Strict, parse, said
from chapters.replies import Piece, Watch
from chapters.rollout import Canary, Split
from chapters.watch import Metrics, Recent, Stopwatch, is_determined, response_key
from model import TINY, check_options, option
from sample import warn

FAILURES = (408, 429, 500)  # a run that is slow times out, or has its queue full
LARGEST = 4096  # bytes of a change to the roll-out
ENDS = {"promoted": "b", "rolled back": "a"}  # of a canary, and which arm stays
PATHS = ("/", "/health", "/metrics", "/feedback", "/admin/rollout", "/v1/models", "/tokenize",
         "/v1/completions", "/v1/chat/completions")  # what a label may be: others are anybody's


@dataclass(frozen=True)
class OperateConfig:
    """What is watched and kept, and a second run."""
    cache_bytes: int = option(1 << 26, "of answers kept for the same request; 0: none, as a quick "
                              "answer tells that somebody asked before")
    feedback: str | None = option(None, "a .jsonl file for rated answers; without it none is kept")
    reference: str | None = option(None, "prompts.json of chapters.drift, else the run's, else the "
                                   "first prompts")
    run_b: str | None = option(None, "a second run folder, which answers a share of the users")
    share: float = option(10.0, "per cent of them", TINY, 100)
    canary: bool = option(False, "raise the share step by step to 100, or back to 0 if it is worse")

    def __post_init__(self):
        check_options(self)
        if (self.canary or self.share != 10) and not self.run_b:
            raise ValueError("canary and share are of a second run: name it, --run_b=RUN")


class Change(Strict):
    """The body of POST /admin/rollout."""
    run: str | None = None
    share: float | None = Field(None, ge=0, le=100)
    canary: bool = False


@dataclass
class Seen:
    """What is seen of a call under way."""
    name: str                   # of the model that answers
    split: Split | None         # that has chosen it; else the client has
    was_known: bool = False     # its answer comes out of the cache
    has_failed: bool = False    # in the midst of a stream
    first: float | None = None  # seconds to its first token


class Operation(Watch):
    """Looks on for chapters.serve, in the thread of its event loop. key: the server's."""

    def __init__(self, config, key=""):
        self.config, self.key, self.split, self.is_loading = config, key, None, False
        self.cache = Recent(config.cache_bytes)
        self.log = FeedbackLog(config.feedback) if config.feedback else None
        self.rates = self.log is not None  # the page shows thumbs
        self.prompts, self.reference = None, config.reference and read_reference(config.reference)
        self.calls = {}      # {Call: what is Seen of it}
        self.renamed = {}    # {name of a run that left: name of the one that answers for it}
        self.leaving = {}    # {name: Served} that are closed after their last call

    def routes(self, app, models, open_model):
        self.models, self.open_model, self.metrics = models, open_model, Metrics(self.counts)
        self.watch_prompts()
        app.get("/metrics")(self.show_metrics)
        app.get("/admin/rollout")(self.show_rollout)
        app.post("/admin/rollout")(self.change_rollout)
        if self.config.run_b:
            self.begin(self.open(self.config.run_b), self.config.share, self.config.canary)

    def counts(self):
        """The counts of all engines, summed."""
        return sum((Counter(served.engine.counts()) for served in self.models.values()), Counter())

    def watch_prompts(self):
        """From now on watch the prompts for the first model."""
        served, reference = next(iter(self.models.values())), self.reference
        with suppress(ValueError, OSError):  # it has none: the first prompts are the reference
            reference = reference or read_reference(Path(served.folder, "prompts.json"))
        if self.prompts:
            self.prompts.close()
        self.prompts = PromptWatch(served.engine.model, self.metrics, reference)

    # Who answers.

    def choose(self, call, models):
        name = call.body.model or next(iter(models))
        name = self.renamed.get(name, name)
        split = self.split if self.split and name == self.split.arms["a"].name else None
        if split:  # who asks for the new one by its name gets it
            call.arm = split.choose(call.body.user or call.id)
            name = split.arms[call.arm].name
        self.calls[call] = Seen(name, split)
        return name

    def open(self, folder):
        """The Served of a second run."""
        if (name := Path(folder).resolve().name) in self.models:
            raise ValueError(f"{folder}: a run of the name {name} is here already: rename a folder")
        return self.open_model(folder)

    def begin(self, served, share, canary):
        """Let a second run answer a share of the users."""
        old = next(iter(self.models))
        self.models[served.name] = served
        self.split = Canary(old, served.name) if canary else Split(old, served.name, share)
        warn(f"{served.name} answers {self.split.share:g}% of the users of {old}")

    def finish(self, stays):
        """End the split: one arm, "a" or "b", answers all; the other one finishes its calls."""
        kept, gone = (self.split.arms[arm].name for arm in (stays, "b" if stays == "a" else "a"))
        self.renamed = {name: kept for name in (*self.renamed, gone)}
        self.leaving[gone], self.split = self.models.pop(gone), None
        self.watch_prompts()
        self.close_idle()

    def close_idle(self):
        """Close the runs that left and have no more calls."""
        for name in self.leaving.keys() - {seen.name for seen in self.calls.values()}:
            threading.Thread(target=self.leaving.pop(name).close).start()

    # What is seen of a call.

    def key_of(self, call):
        """The key of a call in the cache, or None if its answer is not determined."""
        asked = call.body.model_dump(exclude_unset=True)
        may = self.config.cache_bytes and is_determined(asked)
        return response_key(call.served.fingerprint, asked) if may else None

    def lookup(self, call):
        if (key := self.key_of(call)) is None:
            return None
        value = self.cache.get(key)
        self.metrics.lookups.labels("miss" if value is None else "hit").inc()
        self.calls[call].was_known = value is not None
        return value and [Piece(*values) for values in json.loads(value)]

    async def follow(self, call, pieces):
        seen, watch, found = self.calls[call], Stopwatch(self.metrics, call.arm, call.start), []
        for ids in call.prompts:
            self.metrics.prompt.observe(len(ids))
            self.prompts.see(ids)
        try:
            async for piece in pieces:
                if piece.written and not seen.was_known:
                    watch.token(is_timed=piece.index == 0)
                    seen.first = watch.first
                found.append(piece)
                yield piece
        except Refusal:
            seen.has_failed = True
            raise
        if not seen.was_known:  # and nobody has left, or this generator would have ended above
            watch.end()
            if (key := self.key_of(call)) is not None:
                self.cache.put(key, json.dumps(found).encode())
        if self.log and isinstance(call.body, Chat) and call.body.n == 1:
            text = "".join(piece.text for piece in found)
            self.log.remember(call.id, [*map(said, call.body.messages)], text, call.served.name,
                              call.arm)

    def end(self, path, status, seconds, call):
        arm, seen = call.arm if call else "a", self.calls.pop(call, None)
        path, status = path if path in PATHS else "other", status or 499  # the client has left
        self.metrics.requests.labels(path, arm, str(status)).inc()
        if seen and seen.split and seen.split is self.split:
            self.split.note(arm, seen.has_failed or status in FAILURES, seen.first)
            if self.split.state in ENDS:
                self.finish(ENDS[self.split.state])
        self.close_idle()

    def rate(self, rating, client):
        if not self.log:
            return super().rate(rating, client)
        sign = {"up": 1, "down": -1}[rating.rating]
        try:
            row = self.log.rate(rating.id, client, sign, rating.better)
        except TooMany as error:
            raise Refusal(429, str(error), Retry_After="3600") from None
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        self.metrics.ratings.labels(row["arm"], rating.rating).inc()
        for arm, own in self.split.arms.items() if self.split else ():
            if own.name == row["model"]:  # it may have been written before this split
                self.split.rate(arm, sign, row["client"])

    async def show_metrics(self):
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def check_key(self):
        if not self.key:
            raise Refusal(403, "this needs a server with a key: start it with SERVE_KEY=...")

    async def show_rollout(self):
        """Who answers, and how that goes."""
        self.check_key()
        return self.split.report() if self.split else dict(state="none", models=[*self.models])

    async def change_rollout(self, request: Request):
        """Begin a split with a run, change its share, or end it with a share of 0 or 100."""
        self.check_key()
        change = parse(Change, await read_body(request, LARGEST))
        if change.run:
            await self.load(change)
        elif not self.split or change.share is None:
            raise Refusal(400, "give a run, or to a split that is under way a share")
        elif change.share in (0, 100):
            self.finish("a" if change.share == 0 else "b")
        else:
            self.split.share = change.share
        return await self.show_rollout()

    async def load(self, change):
        """Open a run while others answer, and begin a split with it."""
        if self.split or self.is_loading:
            raise Refusal(409, "a split is under way: a share of 0 or 100 ends it")
        self.is_loading = True
        try:
            served = await asyncio.to_thread(self.open, change.run)
            self.begin(served, change.share or 0, change.canary)
        except (ValueError, OSError) as error:
            raise Refusal(400, str(error), "run") from None
        finally:
            self.is_loading = False
