"""
Talk to a model: messages go in, the next reply comes out; from a run folder, or from a server.

    python -m chapters.talk                             # the newest run, line by line
    python -m chapters.talk runs/a --system="Be brief." --temperature=0.7
    python -m chapters.talk runs/a --template=question  # as a base model: "Question: ... Answer:"

open_model("runs/a") and open_model("http://127.0.0.1:8000/v1#MODEL") both have .answer(messages):
chapters.judge and chapters.rate take their contestants from here.
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__":  # `python chapters/talk.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.client import Server, parse_keys
from evaluate import score_ends
from model import TINY, check_known, check_options, option
from sample import (SHOWN, RunConfig, SampleConfig, knows_chats, load_run, open_run, pick_device,
                    sampling_config, show_piece, to_ids, warn, write)
from tokenizer import parse_options, refuse_idle, run_command

TEMPLATES = ("chat", "question", "text")
TEMPLATE_HELP = "how runs are asked; auto: as a chat if they know it"

# -----------------------------------------------------------------------------
# Prompts, and a chat with a model. Messages are dicts with a role and a content.


def render(tokenizer, messages, template):
    """What the model continues to answer messages: chat: ids, with the special tokens of a chat;
    question: "Question: ... Answer:"; text: the last message as it is."""
    if template == "chat":
        return tokenizer.render_prompt(messages)
    if template == "text":
        return messages[-1]["content"]
    names = dict(user="Question", assistant="Answer")
    said = [(names.get(m["role"], m["role"].title()), m["content"]) for m in messages]
    return "".join(f"{name}: {content}\n" for name, content in said) + "Answer:"


def pick_template(model, tokenizer, base="question"):
    """chat, if the model learned chats, else the template `base`."""
    return "chat" if knows_chats(model, tokenizer) else base


class Chat:
    """A chat with a model: each reply is written after all that was said, or as much of it as fits:
    the oldest turns, question and answer together, are left out first; `system` stays. Options are
    the fields of SampleConfig; each reply has its own seed, made from that of config."""

    def __init__(self, model, tokenizer, system="", template="chat", config=SampleConfig(),
                 **options):
        check_known(template, TEMPLATES, "template")
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.config = replace(config, **options)
        self.seeds = random.Random(self.config.seed)
        self.system = [dict(role="system", content=system)] if system else []
        render(tokenizer, [dict(role="user", content="")], template)  # ValueError if it cannot
        self.turns = []  # messages, the user's and the assistant's in turn

    def prompt(self):
        """The turns that fit, rendered; room for the reply, up to a quarter of all, is left."""
        block_size = self.model.config.block_size
        limit = block_size - min(self.config.max_new_tokens, block_size // 4)
        while True:
            prompt = render(self.tokenizer, self.system + self.turns, self.template)
            n_tokens = len(to_ids(self.tokenizer, prompt))
            if n_tokens <= limit:
                return prompt
            if len(self.turns) < 3:
                raise ValueError(f"this message makes {n_tokens} tokens with what must stay; at "
                                 f"most {limit} leave room for a reply (block_size={block_size})")
            self.turns = self.turns[2:]

    def stream(self, message, **options):
        """Yield the Pieces of the reply to a message. A message that is refused is not remembered;
        of a reply that nobody listens to any more, what was said is."""
        before, text = self.turns, ""
        self.turns = [*before, dict(role="user", content=message)]
        config = replace(self.config, **dict(seed=self.seeds.getrandbits(62)) | options)
        if self.template == "question":  # a base model would ask the next one itself
            config = replace(config, stop=[*config.stop, "\nQuestion:"])
        try:
            for _, piece in write(self.model, self.tokenizer, [self.prompt()], config):
                text += piece.text
                yield piece
        except Exception:
            self.turns = before
            raise
        finally:
            if self.turns is not before:
                self.turns = [*self.turns, dict(role="assistant", content=text)]

    def reply(self, message, **options):
        """The whole reply to a message."""
        return "".join(piece.text for piece in self.stream(message, **options))


# -----------------------------------------------------------------------------
# Who answers: a run or a server.


class LocalModel:
    """The model of a run folder, as Server answers. template is one of TEMPLATES, or auto: chat if
    it knows chats, else the template `base`."""

    short = True  # as a judge it picks a verdict and explains nothing; its context may be small

    def __init__(self, folder, template="auto", base="question", device="cpu", **options):
        check_known(template, ("auto", *TEMPLATES), "template")
        self.model, self.tokenizer = load_run(folder, device=device)
        self.template = template if template != "auto" else pick_template(
            self.model, self.tokenizer, base)
        self.config = SampleConfig(**dict(temperature=0.7, seed=0) | options)

    def answer(self, messages):
        """The reply to messages."""
        config = replace(self.config, seed=self.config.seed + len(messages))
        chat = Chat(self.model, self.tokenizer, template=self.template, config=config)
        chat.turns = messages[:-1]
        reply = chat.reply(messages[-1]["content"])
        return reply if self.template == "text" else reply.strip()

    def judge(self, text, choices):
        """The likeliest of [[choices]]; "" if the text is longer than the model's context."""
        prompt = render(self.tokenizer, [dict(role="user", content=text)], self.template)
        ids = to_ids(self.tokenizer, prompt) + self.tokenizer.encode(" [[")
        ends = [self.tokenizer.encode(choice + "]]") for choice in choices]
        if len(ids) + max(map(len, ends)) > self.model.config.block_size:
            return ""
        scored = score_ends(self.model, [(ids + end, len(end)) for end in ends])
        scores = [score.sum() for score, _ in scored]
        return f"[[{choices[scores.index(max(scores))]}]]"


@dataclass(frozen=True)
class AnswerConfig:
    """How the models are asked."""
    key: list = option([], "HOST=VARIABLE: the environment variable with the key for a host")
    template: str = option("auto", TEMPLATE_HELP, known=lambda: ("auto", *TEMPLATES))
    max_tokens: int = option(200, "longest answer", low=1)
    temperature: float = option(0.7, "of the answers")
    seed: int = option(0, "of the answers")
    timeout: float = option(60.0, "seconds to wait for a server", low=TINY)
    device: str = option("auto", "auto | cuda | mps | cpu")

    __post_init__ = check_options


def open_model(name, keys=None, config=AnswerConfig(), base="question"):
    """A run folder or URL -> a LocalModel or a Server; a base model is asked with template base."""
    sampling = dict(temperature=config.temperature, seed=config.seed)
    if name.startswith(("http://", "https://")):
        return Server(name, keys, config.timeout, max_tokens=config.max_tokens, **sampling)
    return LocalModel(name, config.template, base, pick_device(config.device),
                      max_new_tokens=config.max_tokens, **sampling)


def open_all(names, config, base="question"):
    """The models of these names."""
    keys = parse_keys(config.key)
    for host in set(keys) - {urlsplit(name).netloc for name in names}:
        raise ValueError(f"--key is for {host[:60]}, but none of the URLs has this host")
    return [open_model(name, keys, config, base) for name in names]


def converse(model, texts):
    """Say one text after the other -> the replies."""
    messages, replies = [], []
    for text in texts:
        messages.append(dict(role="user", content=text))
        replies.append(model.answer(messages))
        messages.append(dict(role="assistant", content=replies[-1]))
    return replies


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class TalkConfig(RunConfig):
    """Who talks."""
    system: str = option("", "what the assistant is told first")
    template: str = option("auto", TEMPLATE_HELP, known=lambda: ("auto", *TEMPLATES))
    show: str = option("text", "a text, or its tokens' log-probabilities", known=lambda: SHOWN)


def talk(chat, show):
    """Read messages line by line and answer each, until the end of the input."""
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if message := line.removeprefix("\ufeff").strip():
            try:
                for piece in chat.stream(message):
                    show_piece(chat.tokenizer, piece, show)
                print(flush=True)
            except ValueError as error:  # a message that is too long: the next one may not be
                warn(error)


def main():
    typed, sampling = parse_options(__doc__, TalkConfig, SampleConfig)
    config, sampling = TalkConfig(**typed), sampling_config(sampling)
    refuse_idle(typed, ["system"] * (config.template == "text"), "beside --template=text")
    if sys.stdin is None:
        raise ValueError("standard input is closed: type your messages, or pipe them in")
    model, tokenizer, where = open_run(config)
    learned = pick_template(model, tokenizer)
    template = learned if config.template == "auto" else config.template
    print(f"{where}, template {template}, seed {sampling.seed}; "
          "the end of the input ends the chat", file=sys.stderr)
    if learned != "chat" and config.template in ("auto", "chat"):
        warn("this model never learned to hold a conversation: it was trained on texts, not chats, "
             "and goes on as they do; --template=text continues your own words")
    talk(Chat(model, tokenizer, config.system, template, sampling), config.show)


if __name__ == "__main__":
    run_command(main)
