"""
What stands before a server's application: who may ask, for how long, and how the server stops.

    Gate(app, config)       an ASGI application: number, host, key and time limit of each request
    Server(gate).run()      uvicorn, which ends what is under way when it is told to stop

chapters/serve.py has the application and the options.
"""

import asyncio
import re
import socket
import time
from contextlib import ExitStack
from hmac import compare_digest
from uuid import uuid4

import uvicorn
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from chapters.protocol import Refusal

OPEN = {"/", "/health"}  # paths that need no key
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
GRACE = 2                # seconds after the timeout in which a stream can still tell of it
FAILED = "the server failed: its own log says why"


def response(refusal):
    """The response that a Refusal is."""
    return JSONResponse(dict(error=refusal.error), refusal.status, refusal.headers)


def too_slow(config):
    return Refusal(408, f"the request took longer than {config.timeout:g} seconds",
                   code="timeout", x_should_retry="false")


async def refused(request, error):
    """The response for a Refusal, and for what else is raised."""
    if isinstance(error, HTTPException):
        error = Refusal(error.status_code, f"{request.method} {request.url.path:.60}: "
                        f"{error.detail.lower()}", **(error.headers or {}))
    return response(error if isinstance(error, Refusal) else Refusal(500, FAILED))


class Gate:
    """An ASGI application before another: each request gets a number, scope["state"]["id"], and a
    stack of what is undone when it ends, however it does, scope["state"]["stack"]."""

    def __init__(self, app, config, watch):
        self.app, self.config, self.watch = app, config, watch
        self.n_running, self.stopping = 0, False

    def check(self, method, path, headers):
        """Refusal unless a request with these headers may come in."""
        if self.stopping:
            raise Refusal(503, "the server stops", code="stopping", Retry_After="1",
                          Connection="close")
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        # A page on another site can have its own name point to this machine: DNS rebinding.
        if self.config.is_local() and host not in LOCAL | {self.config.host}:
            raise Refusal(403, f"host {host!r:.60} is not this machine's name: ask for localhost")
        key, given = self.config.key, headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if key and path not in OPEN and not compare_digest(given, key.encode()):
            raise Refusal(401, "the key is wrong or missing: send Authorization: Bearer KEY",
                          code="invalid_api_key", WWW_Authenticate="Bearer")
        # Other pages may send forms and plain text here without asking, but not JSON.
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            raise Refusal(400, "send JSON with Content-Type: application/json")

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not spoken here")
        state, status, start = scope.setdefault("state", {}), None, time.perf_counter()
        state |= dict(id=uuid4().hex, start=start, stack=ExitStack())

        async def number(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["id"].encode()),
                                      (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.n_running += 1
        try:
            self.check(scope["method"], scope["path"], dict(scope["headers"]))
            async with asyncio.timeout(self.config.timeout + GRACE):
                await self.app(scope, receive, number)
        except Refusal as refusal:
            await response(refusal)(scope, receive, number)
        except TimeoutError:  # a client that does not read, or is slow to send
            if status is None:
                await response(too_slow(self.config))(scope, receive, number)
        finally:
            self.n_running -= 1
            state["stack"].close()
            self.watch.end(scope["path"], status, time.perf_counter() - start, state.get("call"))


# -----------------------------------------------------------------------------
# A client that sends too much, or leaves.


async def read_body(request, limit):
    """The bytes of a body. Of a larger one a part is read and dropped: most clients listen only
    after they have sent all."""
    data, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > 8 * limit:
                break
            data += chunk if size <= limit else b""
    except ClientDisconnect:
        raise Refusal(499, "the client has left") from None
    if size > limit:
        raise Refusal(413, f"the body has more than {limit:,} bytes", Connection="close")
    return bytes(data)


async def unless_gone(request, work):
    """What the coroutine returns; it is cancelled when the client leaves."""
    work = asyncio.ensure_future(work)

    async def listen():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        work.cancel()

    listener = asyncio.create_task(listen())
    try:
        return await work
    except asyncio.CancelledError:
        if not listener.done():
            raise
        raise Refusal(499, "the client has left") from None
    finally:
        listener.cancel()
        work.cancel()


# -----------------------------------------------------------------------------
# uvicorn, which reads HTTP, and stops.


class Protocol(H11Protocol):
    """A connection; without a whole request soon after it was made it is closed."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.timer = self.loop.call_later(self.timeout_keep_alive, self.close_silent)

    def connection_lost(self, error):
        self.timer.cancel()
        super().connection_lost(error)

    def close_silent(self):
        if self.cycle is None:
            self.transport.abort()


def listen(host, port):
    """A socket that listens at a port of a host; ValueError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be used ({error.strerror}): give another --port or "
                         "--host") from None


class Server(uvicorn.Server):
    """The first SIGTERM or Ctrl-C lets what is under way end and refuses what comes; a second one
    ends at once."""

    def __init__(self, gate):
        self.gate = gate
        super().__init__(uvicorn.Config(
            gate, http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False,
            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=GRACE))

    def handle_exit(self, sig, frame):
        if self.gate.stopping:
            super().handle_exit(sig, frame)
        self.gate.stopping = True

    async def on_tick(self, counter):
        stopped = self.gate.stopping and not self.gate.n_running
        return await super().on_tick(counter) or stopped
