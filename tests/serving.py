"""A server for tests: chapters.serve in a thread, and requests to it."""

import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

from chapters.gate import Server
from chapters.serve import ServeConfig, build_app


@contextmanager
def serve(models, watch, **options):
    """Serve {name: Served} on a free port -> the URL, without a slash at its end."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(build_app(ServeConfig(**options), models, watch))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def ask(url, body=None, key=None):
    """-> (status, the reply's JSON, or its text) of a GET, or of a POST of a body."""
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            status, text = reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def events(url, body, key=None):
    """Yield the JSON of each event of a stream, up to [DONE]."""
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body | dict(stream=True)).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                yield json.loads(line[6:])
