"""
A run behind a URL that speaks OpenAI's protocol, and a page to chat with it in a browser.

    python -m chapters.serve runs/chat                       # http://127.0.0.1:8000, here alone
    SERVE_KEY=... python -m chapters.serve runs/chat --host=0.0.0.0 --quant=int8

A request passes the Gate (host, key, time), is checked field by field (chapters/protocol.py), waits
in a bounded queue, and is written by the engine of chapters/batching.py beside all others: the text
of a seed is the same alone and among them. chapters/operate.py looks on, as a replies.Watch.
"""

import asyncio
import hashlib
import ipaddress
import os
import re
import sys
import threading
import time
from base64 import b64encode
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # `python chapters/serve.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from chapters.batching import Engine
from chapters.batching import Request as Job
from chapters.gate import FAILED, Gate, Server, listen, read_body, refused, too_slow, unless_gone
from chapters.operate import OperateConfig, Operation
from chapters.protocol import (Chat, Completion, Rating, Refusal, Text, Tokens, listed, parse,
                               read_options, read_prompts)
from chapters.replies import Call, Piece, Watch, event, replay, stream, whole
from model import TINY, check_options, option
from sample import RunConfig, knows_chats, newest_run, open_run
from tokenizer import parse_options, run_command

PAGE = Path(__file__).with_name("chat.html")
LEAST_KEY = 16  # characters of the key with which a server may leave this machine

# -----------------------------------------------------------------------------
# What is served, and to whom.


@dataclass(frozen=True)
class ServeConfig(RunConfig):
    """Who may ask, and for how much."""
    host: str = option("127.0.0.1", "address to listen at; all but this machine need --key")
    port: int = option(8000, "0 takes a free one", below=2**16)
    key: str = option("", "what clients must send; better in the variable SERVE_KEY")
    max_rows: int = option(32, "texts that are written at a time", low=1, below=4096)
    max_queue: int = option(64, "texts that may wait; more are refused with 429")
    max_body: int = option(1 << 20, "bytes of a request", low=1)
    timeout: float = option(120.0, "seconds for a request, from its first byte to its last", TINY)

    def __post_init__(self):
        check_options(self)
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ValueError("the key must be ASCII without spaces")
        if not self.is_local() and len(self.key) < LEAST_KEY:
            raise ValueError(f"host={self.host} can be reached from elsewhere: give a key of "
                             f"{LEAST_KEY} characters or more in SERVE_KEY, or leave --host out")

    def is_local(self):
        """Whether the host is this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Served:
    """A model with its tokenizer, and the engine that writes with it in a thread of its own."""

    def __init__(self, folder, model, tokenizer, max_rows):
        self.folder, self.name = Path(folder), Path(folder).resolve().name
        self.tokenizer, self.created = tokenizer, int(time.time())
        self.engine = Engine(model, tokenizer, max_rows=max_rows)
        self.block_size, self.chats = model.config.block_size, knows_chats(model, tokenizer)
        with torch.inference_mode():  # equal for equal weights and precision
            logits, _ = model(torch.arange(8, device=model.device)[None] % model.config.vocab_size)
        self.fingerprint = f"fp_{hashlib.sha256(str(logits.tolist()).encode()).hexdigest()[:16]}"
        self.thread = threading.Thread(target=self.engine.run, daemon=True)
        self.thread.start()

    def close(self):
        """End what is under way, and the engine."""
        self.engine.close(cancel=True)
        self.thread.join()

    def card(self):
        """The model as GET /v1/models tells it."""
        return dict(id=self.name, object="model", created=self.created, owned_by="you",
                    max_model_len=self.block_size, chat=self.chats)


def open_served(config):
    """-> (the Served of a ServeConfig, in words what it is)."""
    folder = newest_run() if config.run is None else config.run
    model, tokenizer, where = open_run(replace(config, run=str(folder)))
    return Served(folder, model, tokenizer, config.max_rows), where


# -----------------------------------------------------------------------------
# From a request to the pieces of its answer.


def jobs(call, emit):
    """A Job of the engine for each choice of a call; emit(index, token) gets what it writes."""
    body, completes = call.body, isinstance(call.body, Completion)
    n_best = body.logprobs if completes else body.top_logprobs
    echo, found = completes and body.echo, []
    texts = listed(body.prompt) if completes and not echo else call.prompts
    for i in range(call.n_choices):
        text, ids = texts[i // body.n], call.prompts[i // body.n]
        heals = isinstance(text, str) and text.endswith(" ")  # the engine does: sample.Continuation
        seed = None if body.seed is None else (body.seed + i) % 2**63
        found.append(Job(text if heals else ids, replace(call.config, seed=seed),
                         lambda token, i=i: emit((i, token)), n_best or 0, echo))
    return found


def submit(call, config, stack):
    """Have a call written -> its Jobs and an asyncio.Queue of (index, token); Refusal with 429 if
    too many texts wait. When the stack is closed, what is not yet written is cancelled."""
    engine, loop, queue = call.served.engine, asyncio.get_running_loop(), asyncio.Queue()
    counts, limit = engine.counts(), config.max_rows + config.max_queue
    if call.n_choices > limit:
        raise Refusal(400, f"{call.n_choices} texts in one request are more than {limit}", "n")
    if counts["rows"] + counts["waiting"] + call.n_choices > limit:
        raise Refusal(429, f"{limit} texts are under way, no more may be: try again soon",
                      code="queue_full", Retry_After="1")
    found = jobs(call, lambda step: loop.call_soon_threadsafe(queue.put_nowait, step))
    for job in found:
        stack.callback(engine.cancel, job)
        engine.submit(job)
    return found, queue


def echoed(call, index, job):
    """The Pieces of a job's prompt."""
    decode = call.served.tokenizer.decoder()
    texts = [decode(id) for id, *_ in job.prompt_scores]
    texts[-1] += decode()
    for text, (id, logprob, best) in zip(texts, job.prompt_scores):
        yield Piece(index, id, text, logprob, best, None, written=False)


async def written(call, config, jobs, queue):
    """Yield the Pieces of a call from the queue of its jobs, until each choice has ended."""
    begun, n_left, writes = set(), len(jobs), getattr(call.body, "max_tokens", None) != 0
    while n_left:
        try:
            async with asyncio.timeout(call.start + config.timeout - time.perf_counter()):
                i, token = await queue.get()
        except TimeoutError:
            raise too_slow(config) from None
        if token.reason in ("error", "cancelled"):
            raise Refusal(500, FAILED)
        if jobs[i].echo and i not in begun:
            begun.add(i)
            *before, last = echoed(call, i, jobs[i])
            for piece in before:
                yield piece
            yield last if writes else last._replace(finish="length")
        n_left -= token.reason is not None
        if writes:
            yield Piece(i, token.id, token.text, token.logprob, token.top, token.reason)


async def read(request, schema):
    """The schema's object that the body of a request holds."""
    return parse(schema, await read_body(request, request.app.state.config.max_body))


def find(models, name=None):
    """The Served of a name, or the first one."""
    name = next(iter(models)) if name is None else name
    if name not in models:
        raise Refusal(404, f"there is no model {name!r:.60} here, but {', '.join(models)}", "model",
                      "model_not_found")
    return models[name]


async def understand(request, schema):
    """The Call that a request makes; Refusal for what is wrong with it."""
    state, body = request.app.state, await read(request, schema)
    kind = "chatcmpl" if schema is Chat else "cmpl"
    call = Call(f"{kind}-{request.state.id}", body, request.client.host, request.state.start,
                int(time.time()))
    request.state.call = call
    call.served = find(state.models, state.watch.choose(call, state.models))
    if schema is Chat and not call.served.chats:
        raise Refusal(400, f"{call.served.name} never learned to hold a conversation: POST "
                      "/v1/completions continues a text", "messages", "model_without_chats")
    tokenizer, block_size = call.served.tokenizer, call.served.block_size
    call.config = read_options(body, tokenizer, block_size)
    call.prompts = await asyncio.to_thread(read_prompts, body, tokenizer, block_size)
    return call


# -----------------------------------------------------------------------------
# Answers: whole, unless the client leaves; or as a stream of events.


async def events(call, pieces):
    """Yield the bytes of a stream; an error ends it, too."""
    try:
        async for chunk in stream(call, pieces):
            yield event(chunk)
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:
        yield event(dict(error=refusal.error))
    except Exception:
        yield event(dict(error=Refusal(500, FAILED).error))
        raise


async def respond(request, schema):
    """The response to a request for text."""
    state, call = request.app.state, await understand(request, schema)
    if (known := state.watch.lookup(call)) is not None:
        pieces = replay(known)
    else:
        pieces = written(call, state.config, *submit(call, state.config, request.state.stack))
    pieces = state.watch.follow(call, pieces)
    if not call.body.stream:
        return JSONResponse(await unless_gone(request, whole(call, pieces)))
    return StreamingResponse(events(call, pieces), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache"})


# -----------------------------------------------------------------------------
# What is asked for by GET and POST.


def only(html, tag):
    """A page's one script or style, as its content security policy names it."""
    text = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
    return f"{tag}-src 'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


async def show_page(request: Request):
    """The chat page, allowed to run its own script and style, to ask this server, nothing else."""
    html = PAGE.read_text(encoding="utf-8")
    policy = (f"default-src 'none'; {only(html, 'script')}; {only(html, 'style')}; connect-src "
              "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=headers)


async def health(request: Request):
    return dict(status="ok")


async def list_models(request: Request):
    state = request.app.state
    cards = [served.card() for served in state.models.values()]
    return dict(object="list", data=cards, feedback=state.watch.rates)


async def show_model(request: Request, name: str):
    return find(request.app.state.models, name).card()


async def complete(request: Request):
    return await respond(request, Completion)


async def chat(request: Request):
    return await respond(request, Chat)


async def tokenize(request: Request):
    body, served = await read(request, Text), find(request.app.state.models)
    is_special = body.prompt in served.tokenizer.special  # as lm-evaluation-harness asks for ids
    tokens = await asyncio.to_thread(served.tokenizer.encode, body.prompt, is_special)
    return dict(tokens=tokens, count=len(tokens), max_model_len=served.block_size)


async def detokenize(request: Request):
    body = await read(request, Tokens)
    try:
        return dict(prompt=find(request.app.state.models).tokenizer.decode(body.tokens))
    except ValueError as error:
        raise Refusal(400, str(error), "tokens") from None


async def tokenizer_info(request: Request):
    tokenizer = find(request.app.state.models).tokenizer
    return dict.fromkeys(("eos_token", "bos_token", "pad_token"), tokenizer.decode([tokenizer.eot]))


async def feedback(request: Request):
    request.app.state.watch.rate(await read(request, Rating), request.client.host)
    return {}


# -----------------------------------------------------------------------------
# The application, and the Gate before it.

ROUTES = {  # those about the tokenizer are what lm-evaluation-harness asks for
    "GET": {"/": show_page, "/health": health, "/v1/models": list_models,
            "/v1/models/{name}": show_model, "/tokenizer_info": tokenizer_info},
    "POST": {"/v1/completions": complete, "/v1/chat/completions": chat, "/tokenize": tokenize,
             "/detokenize": detokenize, "/feedback": feedback}}


def build_app(config, models, watch=Watch()):
    """The ASGI application, a Gate, that serves {name: Served} by a ServeConfig."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.config, app.state.models, app.state.watch = config, models, watch
    for kind in (Refusal, HTTPException, Exception):
        app.exception_handler(kind)(refused)
    for method, functions in ROUTES.items():
        for path, function in functions.items():
            app.add_api_route(path, function, methods=[method])
    watch.routes(app, models, lambda folder: open_served(replace(config, run=folder))[0])
    return Gate(app, config, watch)


# -----------------------------------------------------------------------------
# The command.


def main():
    typed, operation = parse_options(__doc__, ServeConfig, OperateConfig)
    config = ServeConfig(**dict(key=os.environ.get("SERVE_KEY", "")) | typed)
    with listen(config.host, config.port) as listener:
        served, where = open_served(config)
        models, watch = {served.name: served}, Operation(OperateConfig(**operation), config.key)
        server = Server(build_app(config, models, watch))
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"{where} at http://{host}:{listener.getsockname()[1]}/ (Ctrl-C stops)",
              file=sys.stderr, flush=True)
        server.run([listener])
    for served in models.values():
        served.close()


if __name__ == "__main__":
    run_command(main)
