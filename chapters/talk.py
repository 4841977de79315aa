"""
Who can be talked to: a run folder or a URL of OpenAI's protocol goes in, a model that answers
messages comes out. judge.py and rate.py take their contestants from here.

    open_model("runs/a").answer([{"role": "user", "content": "Hi"}])
    open_model("http://127.0.0.1:8000/v1#MODEL").answer([{"role": "user", "content": "Hi"}])
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from evaluate import score_ends
from sample import Chat, complete, load_run, pick_device, warn

if not {"-h", "--help"} & set(sys.argv):  # torch takes two seconds to import; help need not wait
    from model import check_known

PAUSES = (1, 4, 16)        # seconds before a request is made again; after the last it has failed
LONGEST_PAUSE = 60         # seconds, for a server that asks for more
LARGEST_REPLY = 1 << 24    # bytes
CHAT_SIGN = 0.01           # chance of <|end|> after an answer; a base model has never met it

# -----------------------------------------------------------------------------
# A server, or a run. Messages are dicts with a role and a content.


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key and the texts to another host."""

    def redirect_request(self, *args):
        return None


def fetch(request, timeout, secret=None):
    """The JSON a server replies with. What may pass (no connection, too busy) is tried again after
    each of PAUSES; all else is a ValueError of one line, in which the secret does not stand."""
    opener = urllib.request.build_opener(NoRedirect)
    for pause in (*PAUSES, None):
        passes = True
        try:
            with opener.open(request, timeout=timeout) as reply:
                return json.loads(reply.read(LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}, {error.read(LARGEST_REPLY).decode(errors='replace')}"
            passes = error.code in (408, 409, 429) or error.code >= 500
            wanted = error.headers.get("Retry-After") or ""
            if pause and wanted.isdecimal():
                pause = min(max(pause, int(wanted)), LONGEST_PAUSE)
        except (OSError, http.client.HTTPException) as error:
            why = f"no connection, {getattr(error, 'reason', error)}"
            passes = not isinstance(error, http.client.InvalidURL)
        except (ValueError, RecursionError):
            why, passes = "it sends what is not JSON", False
        why = why.replace(secret, "...") if secret else why
        why = "".join(char if char.isprintable() else " " for char in why[:300])
        why = f"{request.full_url}: {' '.join(why.split())}"
        if not passes or pause is None:
            raise ValueError(f"{why} (a URL ends before /chat/completions, "
                             "mostly in /v1; URL#NAME names a model)")
        warn(f"{why}; the next try in {pause} s")
        time.sleep(pause)


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

    def read(self, path, body, pick):
        """What pick takes out of the reply at a path below the URL; body None is a GET."""
        head = {"Content-Type": "application/json"}
        head |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        reply = fetch(urllib.request.Request(f"{self.url}/{path}", data, head), self.timeout,
                      self.key)
        try:
            return pick(reply)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise ValueError(f"{self.url}/{path} does not speak OpenAI's protocol, it sends "
                             f"{reply!r:.80}") from None

    def answer(self, messages, **options):
        body = dict(model=self.model, messages=messages) | self.options | options
        return self.read("chat/completions", body, lambda reply: (
            reply["choices"][0]["message"].get("content") or "").strip())

    def judge(self, text, choices):
        """The judge's words, at the end of which stands one of the [[choices]], or should."""
        return self.answer([dict(role="user", content=text)], temperature=0, max_tokens=1024)


class Run:
    """The model of a run folder. template is how it is asked: chat, with the special tokens of one;
    question ("Question: ... Answer:"); text, which it goes on from; auto: chat if it knows chats,
    else the template `base`."""

    short = True

    def __init__(self, folder, template="auto", base="question", device="cpu", seed=0,
                 max_new_tokens=200, temperature=0.7):
        check_known(template, ("auto", "chat", "question", "text"), "template")
        self.model, self.tokenizer = load_run(folder, device=device)
        self.template, self.seed = template, seed
        self.options = dict(max_new_tokens=max_new_tokens, temperature=temperature)
        if template == "auto":
            self.template = "chat" if self.knows_chats() else base

    def knows_chats(self):
        """Whether the model ends an answer by itself."""
        chat = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello.")]
        if "<|end|>" not in self.tokenizer.special:
            return False
        ids, _ = self.tokenizer.render_chat(chat)
        score, _ = score_ends(self.model, [(ids[-self.model.config.block_size:], 1)])[0]
        return score.exp().item() > CHAT_SIGN

    def plain(self, messages):
        """A prompt without special tokens."""
        if self.template == "text":
            return messages[-1]["content"]
        names = dict(user="Question", assistant="Answer")
        return "\n".join(f"{names[m['role']]}: {m['content']}" for m in messages) + "\nAnswer:"

    def answer(self, messages):
        # the turns differ in their seed, or each would repeat the luck of the last one
        options = self.options | dict(seed=self.seed + len(messages))
        if self.template == "chat":
            chat = Chat(self.model, self.tokenizer, **options)
            chat.turns = messages[:-1]
            return chat.reply(messages[-1]["content"]).strip()
        if self.template == "text":
            return complete(self.model, self.tokenizer, self.plain(messages), **options)
        block_size = self.model.config.block_size
        limit = block_size - min(options["max_new_tokens"], block_size // 4)
        while len(self.tokenizer.encode(self.plain(messages))) > limit and len(messages) > 2:
            messages = messages[2:]
        return complete(self.model, self.tokenizer, self.plain(messages), stop=["\nQuestion:"],
                        **options).strip()

    def judge(self, text, choices):
        """The likeliest of [[choices]]; "" if the text is longer than the model's context."""
        messages = [dict(role="user", content=text)]
        ids = (self.tokenizer.render_prompt(messages) if self.template == "chat"
               else self.tokenizer.encode(self.plain(messages)))
        ids += self.tokenizer.encode(" [[")
        ends = [self.tokenizer.encode(choice + "]]") for choice in choices]
        if len(ids) + max(map(len, ends)) > self.model.config.block_size:
            return ""
        scores = [score.sum() for score, _ in score_ends(self.model, [
            (ids + end, len(end)) for end in ends])]
        return f"[[{choices[scores.index(max(scores))]}]]"


def parse_keys(words):
    """["HOST=VARIABLE"] -> {host: the key in that environment variable}; what is wrong is not
    shown, as it may be a key."""
    keys = {}
    for word in words:
        host, _, name = word.partition("=")
        if not name or not os.environ.get(name, "").strip():
            raise ValueError("--key=HOST=VARIABLE, such as api.openai.com=OPENAI_API_KEY, wants "
                             "the name of an environment variable that holds the key")
        keys[host] = os.environ[name].strip()
        if not keys[host].isascii() or not keys[host].isprintable():
            raise ValueError(f"what the environment variable of --key={host}=... holds is no key")
    return keys


def open_model(name, keys=None, timeout=60, max_tokens=200, **options):
    """A run folder or URL -> a Run or a Server; options are temperature, seed, and those of Run."""
    if not name.startswith(("http://", "https://")):
        return Run(name, max_new_tokens=max_tokens, **options)
    sent = {option: options[option] for option in ("temperature", "seed") if option in options}
    return Server(name, keys, timeout, max_tokens=max_tokens, **sent)


def converse(model, texts):
    """Say one text after the other -> the replies."""
    messages, replies = [], []
    for text in texts:
        messages.append(dict(role="user", content=text))
        replies.append(model.answer(messages))
        messages.append(dict(role="assistant", content=replies[-1]))
    return replies


# -----------------------------------------------------------------------------
# The options that say who answers, and how.


def add_contestants(parser):
    """The options that say who answers and how; chapters.rate has them, too."""
    add = parser.add_argument
    add("--key", action="append", default=[], metavar="HOST=VARIABLE",
        help="the environment variable with the key for a host")
    add("--template", default="auto", help="auto | chat | question | text: how runs are asked; "
        "auto finds out whether they know chats (default auto)")
    add("--max_tokens", type=int, default=200, help="longest answer (default %(default)s)")
    add("--temperature", type=float, default=0.7, help="of the answers (default %(default)s)")
    add("--seed", type=int, default=0, help="of the answers (default %(default)s)")
    add("--timeout", type=float, default=60, help="seconds for a server (default %(default)s)")
    add("--device", default="auto", help="auto | cuda | mps | cpu (default auto)")


def open_all(names, options, **more):
    """The models of these names; more are options of open_model."""
    if options.max_tokens < 1 or not options.temperature >= 0 or not options.timeout > 0:
        raise ValueError(f"max_tokens={options.max_tokens} must be at least 1, temperature="
                         f"{options.temperature} at least 0, timeout={options.timeout} above 0")
    keys, given = parse_keys(options.key), dict(
        template=options.template, max_tokens=options.max_tokens, seed=options.seed,
        temperature=options.temperature, timeout=options.timeout) | more
    for host in set(keys) - {urlsplit(name).netloc for name in names}:
        raise ValueError(f"--key is for {host[:60]}, but none of the URLs has this host")
    device = pick_device(options.device)
    return [open_model(name, keys, device=device, **given) for name in names]
