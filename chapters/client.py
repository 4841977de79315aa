"""
A model behind a URL that speaks OpenAI's protocol: messages go in, an answer comes out.

    Server("http://127.0.0.1:8000/v1#MODEL").answer([{"role": "user", "content": "Hi"}])

chapters.talk opens runs and servers alike; chapters.judge and chapters.rate compare them.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from sample import warn

PAUSES = (1, 4, 16)        # seconds before a request is made again; after the last it has failed
LONGEST_PAUSE = 60         # seconds, for a server that asks for more
LARGEST_REPLY = 1 << 24    # bytes

# -----------------------------------------------------------------------------
# A request: tried again where that can help, and one clear line where it cannot.


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key and the texts to another host."""

    def redirect_request(self, *args):
        return None


def request_once(request, timeout):
    """-> (the JSON of the reply, None, 0), or (None, what went wrong, the seconds that the server
    asks us to wait; None if the same request can never succeed)."""
    opener = urllib.request.build_opener(NoRedirect)
    try:
        with opener.open(request, timeout=timeout) as reply:
            return json.loads(reply.read(LARGEST_REPLY)), None, 0
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}, {error.read(LARGEST_REPLY).decode(errors='replace')}"
        retry_after = error.headers.get("Retry-After") or ""
        wait = min(int(retry_after), LONGEST_PAUSE) if retry_after.isdecimal() else 0
        busy = error.code in (408, 409, 429) or error.code >= 500
        return None, reason, wait if busy else None
    except (OSError, http.client.HTTPException) as error:
        wait = None if isinstance(error, http.client.InvalidURL) else 0
        return None, f"no connection, {getattr(error, 'reason', error)}", wait
    except (ValueError, RecursionError):
        return None, "it sends what is not JSON", None


def fetch(request, timeout, secret=None):
    """The JSON a server replies with. After what may pass (no connection, too busy) it is asked
    again, after each of PAUSES; all else is a ValueError of one line without the secret in it."""
    for pause in (*PAUSES, None):
        reply, reason, wait = request_once(request, timeout)
        if reason is None:
            return reply
        reason = reason.replace(secret, "...") if secret else reason
        reason = "".join(char if char.isprintable() else " " for char in reason[:300])
        reason = f"{request.full_url}: {' '.join(reason.split())}"
        if wait is None or pause is None:
            raise ValueError(f"{reason} (a URL ends before /chat/completions, "
                             "mostly in /v1; URL#NAME names a model)")
        wait = max(pause, wait)
        warn(f"{reason}; the next try in {wait} s")
        time.sleep(wait)


# -----------------------------------------------------------------------------
# A server and the keys for it.


class Server:
    """A model behind URL or URL#MODEL that speaks OpenAI's protocol; unnamed, the first it lists.
    keys is {host: key}; options go into each request."""

    short = False  # as a judge it is asked at length, and explains its verdict

    def __init__(self, url, keys=None, timeout=60, **options):
        parts = urlsplit(url)
        if not parts.hostname or parts.username or parts.password:
            raise ValueError("a URL is like http://127.0.0.1:8000/v1: a host, and no password")
        self.url, self.model = url.partition("#")[0].rstrip("/"), parts.fragment
        self.key, self.timeout, self.options = (keys or {}).get(parts.netloc), timeout, options
        if self.key and parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost"):
            raise ValueError(f"the key for {parts.netloc} could be read on the way: use https")
        self.model = self.model or self.read("models", None, lambda reply: reply["data"][0]["id"])

    def read(self, path, body, extract):
        """What extract takes out of the reply at a path below the URL; body None is a GET."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        reply = fetch(request, self.timeout, self.key)
        try:
            return extract(reply)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise ValueError(f"{self.url}/{path} does not speak OpenAI's protocol, it sends "
                             f"{reply!r:.80}") from None

    def answer(self, messages, **options):
        """The reply to messages, dicts with a role and a content."""
        body = dict(model=self.model, messages=messages) | self.options | options
        return self.read("chat/completions", body, lambda reply: (
            reply["choices"][0]["message"].get("content") or "").strip())

    def judge(self, text, choices):
        """The judge's words, at the end of which stands one of the [[choices]], or should."""
        return self.answer([dict(role="user", content=text)], temperature=0, max_tokens=1024)


def parse_keys(words):
    """["HOST=VARIABLE"] -> {host: the key in that environment variable}; what is wrong is not
    shown, as it may be a key."""
    keys = {}
    for word in words:
        host, _, name = word.partition("=")
        if not name or not os.environ.get(name, "").strip():
            raise ValueError("--key=HOST=VARIABLE, such as api.openai.com=OPENAI_API_KEY, takes "
                             "the name of an environment variable that holds the key")
        keys[host] = os.environ[name].strip()
        if not keys[host].isascii() or not keys[host].isprintable():
            raise ValueError(f"what the environment variable of --key={host}=... holds is no key")
    return keys
