"""Requests of a plain client to a server of tests/serving.py, by its URL."""

import json
import urllib.error
import urllib.request
from contextlib import contextmanager

from serving import listening


@contextmanager
def serve(models, watch, **options):
    """Serve {name: Served} on a free port -> the URL, without a slash at its end."""
    with listening(models, watch, **options) as (port, _):
        yield f"http://127.0.0.1:{port}"


def request(url, body=None, key=None):
    """A GET, or a POST of a body as JSON."""
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {})
    return urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)


def ask(url, body=None, key=None):
    """-> (status, the reply's JSON, or its text)."""
    try:
        with urllib.request.urlopen(request(url, body, key), timeout=60) as reply:
            status, text = reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def events(url, body, key=None):
    """Yield the JSON of each event of a stream, up to [DONE]."""
    with urllib.request.urlopen(request(url, body | dict(stream=True), key), timeout=60) as reply:
        for line in reply:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                yield json.loads(line[6:])
