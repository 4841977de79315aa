"""
Requests in OpenAI's protocol: the bytes of a body go in, prompts and sampling options come out.

    parse(Chat, b'{"messages": [{"role": "user", "content": "Hi"}]}').messages[0].content == "Hi"

A field works, or is refused by name. chapters/serve.py takes these requests, chapters/client.py
makes them; the replies are in chapters/replies.py.
"""

import json
import re
from itertools import chain
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model import TINY
from sample import SampleConfig, to_ids
from tokenizer import nearest, well_formed

MOST_CHOICES = 128       # texts that one request may ask for
# What asks for nothing is taken: many programs send it along with every request.
IDLE = dict(best_of=1, suffix="", tools=[], functions=[], tool_choice="none", store=False,
            response_format=dict(type="text"), modalities=["text"])
FORMS = dict(prompt="a text, a list of texts, a list of token ids, or a list of such lists",
             stop="a text, or a list of texts", content="a text, or a list of parts of type text")

# -----------------------------------------------------------------------------
# What a request may hold.


class Strict(BaseModel):
    """Fields of exactly these types: a number is no text, and none is NaN or infinite."""
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What a text to continue and a chat have in common."""
    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int | None = Field(None, ge=1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stop: str | list[str] = []
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # the only field that changes nothing


class Completion(Sampling):
    """The body of POST /v1/completions."""
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)


class Part(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    tool_call_id: str = ""  # what a tool said comes with one; the order says as much


class Chat(Sampling):
    """The body of POST /v1/chat/completions."""
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class Text(Strict):
    """The body of POST /tokenize; no tokenizer of ours adds special tokens of its own accord."""
    prompt: str
    add_special_tokens: bool = False


class Tokens(Strict):
    """The body of POST /detokenize."""
    tokens: list[int]


class Rating(Strict):
    """The body of POST /feedback, on the answer with this id."""
    id: str
    rating: Literal["up", "down"]
    better: str | None = None


# -----------------------------------------------------------------------------
# From bytes to a checked object; the one form of all errors.

ERRORS = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is an error, in OpenAI's form; further words become headers."""

    def __init__(self, status, message, param=None, code=None, **headers):
        super().__init__(message)
        kind = ERRORS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.error = dict(message=well_formed(message), type=kind, param=param, code=code)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def members(pairs):
    """The dict of a JSON object, without what is null; ValueError for a name that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return {name: value for name, value in found.items() if value is not None}


def refuse_constant(word):
    raise ValueError(f"{word} is no JSON")


def wrong_field(schema, errors):
    """The Refusal of pydantic's errors about one object: it names the first field that is wrong."""
    known = {*schema.model_fields, *Message.model_fields, *Part.model_fields, "include_usage"}
    where, given, said = errors[0]["loc"], errors[0]["input"], errors[0]["msg"]
    path = [part for part in where if isinstance(part, int) or part in known]
    name = ".".join(map(str, path))
    if errors[0]["type"] == "extra_forbidden":
        name = str(where[-1])[:60]
        return Refusal(400, f"{name} is not supported{nearest(name, known)}: leave it out", name)
    forms = [FORMS[part] for part in path if part in FORMS]
    if forms and len(where) > len(path):  # pydantic says what the first of its forms should be
        said = f"Input should be {forms[-1]}"
    if not said.startswith("Input should be "):
        return Refusal(400, f"{name or 'the body'}: {said[0].lower()}{said[1:]}", name or None)
    said = said.removeprefix("Input should be ") if path else "a JSON object"
    return Refusal(400, f"{name or 'the body'}={given!r:.40} must be {said}", name or None)


def parse(schema, data):
    """The object of a schema that a body of bytes holds; Refusal for what is wrong with it."""
    try:
        values = json.loads(data, object_pairs_hook=members, parse_constant=refuse_constant)
        json.dumps(values, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON that can be read: {error!s:.100}") from None
    if isinstance(values, dict):
        values = {name: v for name, v in values.items() if name not in IDLE or v != IDLE[name]}
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise wrong_field(schema, error.errors()) from None


# -----------------------------------------------------------------------------
# From a body to prompts and options.


def listed(value):
    """What may be one or a list of several, as a list; ids are one."""
    one = isinstance(value, str) or value and isinstance(value[0], int)
    return [value] if one else value


def said(message):
    """A Message as tokenizer.render_prompt takes it."""
    parts = [message.content] if isinstance(message.content, str) else [
        part.text for part in message.content]
    role = "system" if message.role == "developer" else message.role
    return dict(role=role, content="\n".join(parts))


def read_prompts(body, tokenizer, block_size):
    """The ids of each prompt of a body; Refusal for one that is wrong, or too long."""
    chat = isinstance(body, Chat)
    name = "messages" if chat else "prompt"
    texts = [m["content"] for m in map(said, body.messages)] if chat else listed(body.prompt)
    longest = block_size * max(map(len, tokenizer.tokens.values()))  # so many bytes may fit
    if any(isinstance(text, str) and len(text) > longest for text in texts):
        raise too_long(name, f"more than {block_size}", block_size)
    try:
        prompts = [tokenizer.render_prompt([*map(said, body.messages)])] if chat else [
            to_ids(tokenizer, text) for text in texts]
        tokenizer.decode(chain.from_iterable(prompts))
    except ValueError as error:
        raise Refusal(400, f"{name}: {error}", name) from None
    if not all(prompts) or not prompts:
        raise Refusal(400, f"{name} is empty: give a text, or at least one id", name)
    if (T := max(map(len, prompts))) >= block_size:
        raise too_long(name, T, block_size)
    return prompts


def too_long(name, n_tokens, block_size):
    return Refusal(400, f"{name}: {n_tokens} tokens are too many; the context of this model has "
                   f"{block_size}, and one must follow: at most {block_size - 1}", name,
                   "context_length_exceeded")


def read_options(body, tokenizer, block_size):
    """The SampleConfig of a body."""
    stop, biases = listed(body.stop), body.logit_bias
    if len(stop) > 4 or "" in stop:
        raise Refusal(400, f"stop={stop!r:.40} must be up to four texts, none empty", "stop")
    for id in biases:
        if not (re.fullmatch("[0-9]{1,9}", id) and int(id) in tokenizer.tokens):
            raise Refusal(400, f"logit_bias: {id!r:.40} is no token id of this model", "logit_bias")
    for name, needed in ("stream_options", "stream"), ("top_logprobs", "logprobs"):
        if name in body.model_fields_set and not getattr(body, needed):
            raise Refusal(400, f"{name} takes {needed}=true beside it", name)
    n_new = body.max_tokens
    if n_new == 0 and not body.echo:
        raise Refusal(400, "max_tokens=0 writes nothing: it takes echo", "max_tokens")
    if isinstance(body, Chat):
        if n_new and body.max_completion_tokens:
            raise Refusal(400, "max_tokens and max_completion_tokens say the same: give one",
                          "max_tokens")
        n_new = n_new or body.max_completion_tokens or block_size
    return SampleConfig(
        temperature=body.temperature, top_p=max(body.top_p, TINY) if body.top_p < 1 else None,
        top_k=body.top_k, min_p=body.min_p, presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty, seed=body.seed, stop=stop,
        logit_bias=[(int(id), bias) for id, bias in biases.items()],
        max_new_tokens=min(max(n_new, 1), block_size))
