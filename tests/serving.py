"""What tests of the server share: models that are served, a server in a thread, a raw client."""

import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from conftest import tiny

import sample
from chapters.gate import Server
from chapters.replies import Watch
from chapters.serve import ServeConfig, Served, build_app


def new_model(tokenizer):
    return tiny(vocab_size=tokenizer.n_vocab, block_size=64)


@contextmanager
def opened(folder, tokenizer):
    """{name: Served} of a model that counts as one that learned chats, and of one that did not."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, likely in ("talks", 0.0), ("base", 1.0):
            patch.setattr(sample, "END_LIKELY", likely)
            found[name] = Served(folder / name, new_model(tokenizer), tokenizer, max_rows=4)
    yield found
    for served in found.values():
        served.close()


class Spy(Watch):
    """Remembers the calls, and how each ended."""

    def __init__(self):
        self.calls, self.ended, self.pieces = [], [], []

    def choose(self, call, models):
        self.calls.append(call)
        return super().choose(call, models)

    async def follow(self, call, pieces):
        async for piece in pieces:
            self.pieces.append(piece)
            yield piece

    def end(self, path, status, seconds, call):
        self.ended.append((path, status, call))


@contextmanager
def listening(models, watch=Watch(), **options):
    """A server in a thread, at a free port of this machine -> (its port, its Gate)."""
    gate = build_app(ServeConfig(**options), models, watch)
    server, listener = Server(gate), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1], gate
    finally:
        gate.stopping = server.should_exit = True
        thread.join(timeout=20)


def until(fact, seconds=20):
    """Wait for what soon becomes true."""
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)


def connect(port, head, body=b"", host="localhost"):
    """A socket that has sent a request."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"{head} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    if body is not None:
        head += f"Content-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + (body or b""))
    return connection


def read_all(connection):
    """What comes until the other side closes, or pauses for a second."""
    connection.settimeout(1)
    data = b""
    with suppress(TimeoutError, ConnectionResetError):
        while part := connection.recv(1 << 16):
            data += part
    return data
