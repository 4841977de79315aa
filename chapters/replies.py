"""
Replies in OpenAI's protocol: what is written of a call goes in, as Pieces; whole replies or the
events of a stream come out.

chapters/serve.py sends them. Watch is how others look on: chapters/operate.py measures, remembers
and decides who answers.
"""

import json
from collections import namedtuple
from dataclasses import dataclass

from chapters.protocol import Chat, Completion, Refusal, Sampling
from sample import SampleConfig

LEAST_LOGPROB = -9999.0  # JSON has no infinity

# -----------------------------------------------------------------------------
# A request that is understood, and whoever looks on.


@dataclass(eq=False)
class Call:
    """A request for text, from its arrival to its last token."""
    id: str               # of the answer
    body: Sampling
    client: str           # its address
    start: float          # time.perf_counter() at its arrival, and
    created: int          # the seconds since 1970
    served: object = None  # the Served that answers, once Watch.choose has named it
    arm: str = "a"        # Watch.choose may set it
    prompts: list = ()    # a list of ids for each prompt
    config: SampleConfig = None

    @property
    def n_choices(self):
        return len(self.prompts) * self.body.n

    @property
    def endpoint(self):
        return "chat/completions" if isinstance(self.body, Chat) else "completions"


# A token of choice `index`: the text that it completes, its log-probability and those of the best
# [(id, logprob)]; finish is "stop" or "length" with the last one, else None; written is False for
# a prompt's token that is echoed. All of it can be JSON.
Piece = namedtuple("Piece", "index token text logprob best finish written", defaults=[True])


class Watch:
    """Looks on and does nothing; a subclass may measure, remember, and choose who answers."""

    rates = False  # whether ratings are kept

    def routes(self, app, models, open_model):
        """Add routes to the FastAPI application. models: {name: Served}, which may change;
        open_model(folder) -> Served takes seconds."""

    def choose(self, call, models):
        """The name of the model that answers a call."""
        return call.body.model or next(iter(models))

    def lookup(self, call):
        """The Pieces of an answer that is known already, or None."""

    def follow(self, call, pieces):
        """The Pieces of an answer, an async iterator, on their way to the client."""
        return pieces

    def end(self, path, status, seconds, call):
        """Called once a request, whatever became of it; call is None where none was understood."""

    def rate(self, rating, client):
        """Keep a Rating from a client's address."""
        raise Refusal(404, "this server keeps no ratings")


# -----------------------------------------------------------------------------
# From pieces of text to replies, whole or in chunks.

Token = namedtuple("Token", "id logprob best start")  # start: where in the choice's text it begins


class Released:
    """Which tokens of a choice can be told of: those that begin in the text that was released."""

    def __init__(self, tokenizer):
        self.decode, self.start, self.shown, self.waiting = tokenizer.decoder(), 0, 0, []

    def take(self, piece):
        """Add a Piece -> the Tokens whose text it released."""
        self.waiting.append(Token(piece.token, piece.logprob, piece.best, self.start))
        self.start += len(self.decode(piece.token))
        self.shown += len(piece.text)
        ready = [token for token in self.waiting if token.start < self.shown]
        self.waiting = self.waiting[len(ready):]
        return ready


def token_name(tokenizer, id):
    """A token as text; where its bytes are no UTF-8, as OpenAI writes them: bytes:\\xe2\\x80."""
    data = tokenizer.token(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def logprob(token):
    return None if token.logprob is None else max(token.logprob, LEAST_LOGPROB)


def text_logprobs(tokenizer, tokens):
    """The logprobs of a completion: lists, with an entry for each of the Tokens."""
    names = [token_name(tokenizer, token.id) for token in tokens]
    best = [{token_name(tokenizer, id): value for id, value in token.best}
            | {name: logprob(token)} for name, token in zip(names, tokens)]
    return dict(tokens=names, token_logprobs=[*map(logprob, tokens)],
                top_logprobs=[None if token.logprob is None else row
                              for token, row in zip(tokens, best)],
                text_offset=[token.start for token in tokens])


def chat_logprobs(tokenizer, tokens):
    """The logprobs of a chat: a dict for each of the Tokens."""
    def told(id, value):
        return dict(token=token_name(tokenizer, id), bytes=[*tokenizer.token(id)],
                    logprob=max(value, LEAST_LOGPROB))
    return dict(content=[told(token.id, token.logprob) | dict(
        top_logprobs=[told(*pair) for pair in token.best]) for token in tokens], refusal=None)


def head(call, chunk=False):
    """What each reply to a call begins with."""
    kind = "text_completion" if isinstance(call.body, Completion) else (
        "chat.completion.chunk" if chunk else "chat.completion")
    return dict(id=call.id, object=kind, created=call.created, model=call.served.name,
                system_fingerprint=call.served.fingerprint)


def choice(call, index, text, tokens, finish, chunk=False):
    """A choice, whole or a chunk of it."""
    chat = isinstance(call.body, Chat)
    tell = chat_logprobs if chat else text_logprobs
    asked = type(call.body.logprobs) is int or call.body.logprobs is True  # 0 asks, too
    told = dict(index=index, finish_reason=finish,
                logprobs=tell(call.served.tokenizer, tokens) if asked and (tokens or not chunk)
                else None)
    if not chat:
        return told | dict(text=text)
    if not chunk:
        return told | dict(message=dict(role="assistant", content=text))
    return told | dict(delta=dict(content=text) if text else {})


def usage(call, n_written):
    n_prompt = sum(map(len, call.prompts))
    return dict(prompt_tokens=n_prompt, completion_tokens=n_written,
                total_tokens=n_prompt + n_written)


async def replay(pieces):
    """Yield Pieces that are known already, as if they were being written."""
    for piece in pieces:
        yield piece


async def parts(call, pieces):
    """Yield (index, text, Tokens, finish, whether it was written) for each Piece."""
    released = [Released(call.served.tokenizer) for _ in range(call.n_choices)]
    async for piece in pieces:
        tokens = released[piece.index].take(piece)
        yield piece.index, piece.text, tokens, piece.finish, piece.written


async def whole(call, pieces):
    """The reply to a call, a dict."""
    n_written, texts, tokens, ends = 0, {}, {}, {}
    async for index, text, released, finish, written in parts(call, pieces):
        n_written += written
        texts[index] = texts.get(index, "") + text
        tokens[index] = tokens.get(index, []) + released
        ends[index] = finish
    choices = [choice(call, i, texts[i], tokens[i], ends[i]) for i in range(call.n_choices)]
    return head(call) | dict(choices=choices, usage=usage(call, n_written))


async def stream(call, pieces):
    """Yield the chunks of the reply to a call, dicts."""
    n_written, tells_usage = 0, call.body.stream_options.include_usage

    def chunk(*choices, **fields):
        return head(call, True) | dict(choices=choices) | (
            dict(usage=None) if tells_usage else {}) | fields

    if isinstance(call.body, Chat):
        for index in range(call.n_choices):
            first = dict(role="assistant", content="")
            yield chunk(dict(index=index, delta=first, logprobs=None, finish_reason=None))
    async for index, text, tokens, finish, written in parts(call, pieces):
        n_written += written
        if text:
            yield chunk(choice(call, index, text, tokens, None, True))
        if finish:
            yield chunk(choice(call, index, "", [], finish, True))
    if tells_usage:
        yield chunk(usage=usage(call, n_written))


def event(data):
    """The bytes of a server-sent event that holds JSON, always one line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
