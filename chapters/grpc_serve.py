"""
A run behind gRPC: a Prompt goes in, a stream of Tokens comes out, as generate.proto says.

    python -m chapters.grpc_serve runs/a                  # 127.0.0.1:50051, for this machine alone
    SERVE_KEY=... python -m chapters.grpc_serve runs/a --host=0.0.0.0

Options and engine are those of chapters/serve.py, and the text of a seed is the same. A key is sent
as metadata, authorization: Bearer KEY. Nothing is encrypted: a proxy in front of it adds that.
"""

import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hmac import compare_digest
from pathlib import Path

if __name__ == "__main__":  # `python chapters/grpc_serve.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import grpc

from chapters.batching import Request
from chapters.serve import ServeConfig, open_served
from model import TINY, option
from sample import SampleConfig
from tokenizer import parse_options, run_command
from train import stop_signals

CODE = grpc.StatusCode


@cache
def compiled():
    """-> (messages, services), the modules that grpcio-tools makes of generate.proto."""
    return grpc.protos_and_services("chapters/generate.proto")


class Generator:
    """Answers each Prompt out of an engine. A client that leaves, or whose deadline has come, gives
    its row of the batch back."""

    def __init__(self, engine, key=""):
        self.engine, self.key = engine, f"Bearer {key}".encode() if key else b""

    def submit(self, prompt, emit):
        """A Request with the fields of a Prompt that are set, in the engine."""
        given = {field.name: value for field, value in prompt.ListFields()}
        text, ids = given.pop("text", ""), [*given.pop("ids", ())]
        request = Request(ids or text, SampleConfig(**given | dict(stop=[*prompt.stop])), emit)
        self.engine.submit(request)
        return request

    def Generate(self, prompt, context):
        """Yield the Tokens that follow a Prompt."""
        sent = dict(context.invocation_metadata()).get("authorization", "")
        if self.key and not compare_digest(sent.encode(), self.key):
            context.abort(CODE.UNAUTHENTICATED, "send the key as authorization: Bearer KEY")
        tokens = queue.SimpleQueue()
        try:
            request = self.submit(prompt, tokens.put)
        except ValueError as error:
            context.abort(CODE.INVALID_ARGUMENT, str(error))
        except RuntimeError:
            context.abort(CODE.UNAVAILABLE, "the server is about to stop")
        if not context.add_callback(lambda: self.engine.cancel(request)):
            self.engine.cancel(request)  # the client has left already
        for token in iter(tokens.get, None):
            if token.reason in ("error", "cancelled"):
                context.abort(CODE.INTERNAL, "the server failed, or stops")
            yield compiled()[0].Token(id=token.id, text=token.text, logprob=token.logprob,
                                      finish=token.reason or "")
            if token.reason:
                return


@contextmanager
def serving(engine, config):
    """Serve an engine, which somebody else runs, as a ServeConfig says -> the port. Streams beyond
    max_rows + max_queue are refused, RESOURCE_EXHAUSTED; at the end all have timeout seconds."""
    held = config.max_rows + config.max_queue
    server = grpc.server(ThreadPoolExecutor(held), maximum_concurrent_rpcs=held, options=[
        ("grpc.max_receive_message_length", config.max_body), ("grpc.so_reuseport", 0)])
    compiled()[1].add_GeneratorServicer_to_server(Generator(engine, config.key), server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.port}")
    except RuntimeError:
        raise ValueError(f"{host}:{config.port} cannot be used: give another --port") from None
    server.start()
    try:
        yield port
    finally:
        server.stop(config.timeout).wait()


@dataclass(frozen=True)
class GrpcConfig(ServeConfig):
    """Who may ask, and for how much."""
    port: int = option(50051, "0 takes a free one", below=2**16)
    timeout: float = option(120.0, "seconds that streams have to end when the server stops", TINY)


def main():
    typed, = parse_options(__doc__, GrpcConfig)
    config = GrpcConfig(**dict(key=os.environ.get("SERVE_KEY", "")) | typed)
    served, where = open_served(config)
    try:
        with stop_signals() as asked, serving(served.engine, config) as port:
            print(f"serving {where} by gRPC at {config.host}:{port}", file=sys.stderr, flush=True)
            while not asked:
                time.sleep(0.1)
    finally:
        served.close()


if __name__ == "__main__":
    run_command(main)
