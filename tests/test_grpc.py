"""chapters/grpc_serve.py: a real channel to a real server gets what the engine writes, and a code
for each thing that goes wrong."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest
from conftest import ROOT, keep, tiny

grpc = pytest.importorskip("grpc", reason="pip install grpcio grpcio-tools")
pytest.importorskip("grpc_tools", reason="pip install grpcio-tools")
pytest.importorskip("fastapi", reason="pip install fastapi")

from asking import ask, serve
from chapters.batching import Engine
from chapters.grpc_serve import compiled, serving
from chapters.replies import Watch
from chapters.serve import Served, ServeConfig
from sample import complete

CODE = grpc.StatusCode


@contextmanager
def channel(engine, **options):
    """A stub that calls a server of this engine."""
    with serving(engine, ServeConfig(**dict(port=0) | options)) as port:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield compiled()[1].GeneratorStub(channel)


@pytest.fixture(scope="module")
def engine(tokenizer):
    engine = Engine(tiny(vocab_size=tokenizer.n_vocab, block_size=64), tokenizer, max_rows=4)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine
    engine.close(cancel=True)
    thread.join()


def prompt(text="the cat", **fields):
    return compiled()[0].Prompt(text=text, **dict(seed=1) | fields)


def code_of(call):
    """The code and the words of the error in which a call ends."""
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    return error.value.code(), error.value.details()


def ends(engine):
    """Wait until an engine has no work; an AssertionError after a while."""
    for _ in range(1000):
        counts = engine.counts()
        if not counts["rows"] + counts["waiting"]:
            return
        time.sleep(0.01)
    raise AssertionError(counts)


@pytest.mark.parametrize("options", [
    dict(temperature=0.0), dict(seed=1, temperature=1.5, top_k=20, top_p=0.9),
    dict(seed=0, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.5),
    dict(seed=2, frequency_penalty=0.5, stop=["e", "o"])])
def test_the_text_is_that_of_sample_with_the_same_options(engine, options):
    with channel(engine) as stub:
        tokens = list(stub.Generate(prompt(max_new_tokens=12, **options)))
    expected = complete(engine.model, engine.tokenizer, "the cat", max_new_tokens=12, **options)
    assert "".join(token.text for token in tokens) == expected
    assert [token.finish for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert tokens[-1].finish in ("stop", "length") and all(t.logprob < 0 for t in tokens)


@pytest.mark.slow
def test_http_and_grpc_write_the_same_out_of_one_engine(tokenizer, tmp_path):
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64)
    with closing(Served(tmp_path / "run", model, tokenizer, 4)) as served:
        options = dict(temperature=1.0, seed=7, top_p=0.9)
        with serve({"run": served}, Watch()) as url:
            status, reply = ask(f"{url}/v1/completions",
                                dict(prompt="the cat", max_tokens=16) | options)
        with channel(served.engine) as stub:
            tokens = list(stub.Generate(prompt(max_new_tokens=16, **options)))
    assert status == 200
    assert reply["choices"][0]["text"] == "".join(token.text for token in tokens) != ""
    assert reply["usage"]["completion_tokens"] == len(tokens)


def test_ids_are_a_prompt_as_well(engine):
    ids = engine.tokenizer.encode("the cat")
    with channel(engine) as stub:
        asked = compiled()[0].Prompt(ids=ids, seed=5, max_new_tokens=9)
        tokens = [list(stub.Generate(asked)), list(stub.Generate(prompt(seed=5, max_new_tokens=9)))]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 9


@pytest.mark.slow
def test_many_streams_at_a_time_are_each_what_they_are_alone(engine):
    with channel(engine) as stub:
        def text(seed):
            asked = prompt("the dog sees", seed=seed, max_new_tokens=12)
            return "".join(token.text for token in stub.Generate(asked))

        found, threads = {}, []
        for seed in range(8):
            threads.append(threading.Thread(target=lambda s=seed: found.update({s: text(s)})))
            threads[-1].start()
        for thread in threads:
            thread.join()
        assert found == {seed: text(seed) for seed in range(8)}


@pytest.mark.parametrize("asked, words", [
    (dict(temperature=-1.0), "temperature=-1.0 must be"), (dict(top_p=2.0), "top_p=2.0"),
    (dict(temperature=float("nan")), "temperature=nan"), (dict(stop=[""]), "is empty"),
    (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(text="cat " * 99), "this model takes 1 to"),
    (dict(text="", ids=[10**6]), "1000000"), (dict(text="", ids=[-5]), "-5")])
def test_a_wrong_option_is_an_invalid_argument_with_its_value(engine, asked, words):
    with channel(engine) as stub:
        code, details = code_of(stub.Generate(prompt(**dict(max_new_tokens=3) | asked)))
        assert code == CODE.INVALID_ARGUMENT and words in details and "Traceback" not in details
        assert len(list(stub.Generate(prompt(max_new_tokens=3)))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_client_that_leaves_gives_its_row_back(engine, how):
    slow, step = threading.Event(), engine.step
    engine.step = lambda: slow.wait(0.02) or step()  # 50 steps a second
    try:
        with channel(engine) as stub:
            asked = prompt(max_new_tokens=55, temperature=2.0, seed=1)
            call = stub.Generate(asked, timeout=None if how == "cancel" else 0.4)
            first = next(call)
            if how == "cancel":
                call.cancel()
            code, _ = code_of(call)
            before = engine.counts()["tokens"]
            ends(engine)
    finally:
        del engine.step
    assert first.text is not None and engine.counts()["tokens"] - before <= 2
    assert code == {"cancel": CODE.CANCELLED, "deadline": CODE.DEADLINE_EXCEEDED}[how]


def test_without_the_key_nothing_is_written(engine):
    key = "correct-horse-battery"
    with channel(engine, key=key) as stub:
        for metadata in (), [("authorization", "Bearer wrong")], [("authorization", key)]:
            code, details = code_of(stub.Generate(prompt(), metadata=metadata))
            assert code == CODE.UNAUTHENTICATED and key not in details
        tokens = stub.Generate(prompt(max_new_tokens=2),
                               metadata=[("authorization", f"Bearer {key}")])
        assert len(list(tokens)) == 2


@pytest.mark.slow
def test_a_message_that_is_too_large_and_streams_that_are_too_many_are_refused(engine):
    with channel(engine, max_body=1000, max_rows=1, max_queue=1) as stub:
        assert code_of(stub.Generate(prompt("x" * 2000)))[0] == CODE.RESOURCE_EXHAUSTED
        slow, step = threading.Event(), engine.step
        engine.step = lambda: slow.wait(0.02) or step()
        calls = [stub.Generate(prompt(max_new_tokens=20)) for _ in range(2)]
        try:
            for call in calls:
                next(call)
            assert code_of(stub.Generate(prompt()))[0] == CODE.RESOURCE_EXHAUSTED
        finally:
            del engine.step
        for call in calls:
            assert [*call][-1].finish


@pytest.mark.slow
def test_an_engine_that_closes_is_unavailable(tokenizer):
    engine = Engine(tiny(vocab_size=tokenizer.n_vocab, block_size=64), tokenizer)
    engine.close()
    with channel(engine) as stub:
        assert code_of(stub.Generate(prompt()))[0] == CODE.UNAVAILABLE


def test_another_host_needs_a_key_and_a_port_in_use_is_one_line(engine):
    with pytest.raises(ValueError, match="SERVE_KEY"):
        ServeConfig(host="0.0.0.0")
    with serving(engine, ServeConfig(port=0)) as port:
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used"):
            with serving(engine, ServeConfig(port=port)):
                pass


@pytest.mark.slow
def test_the_command_finishes_its_streams_when_it_is_stopped(tokenizer, tmp_path):
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=256), tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    command = [sys.executable, str(ROOT / "chapters/grpc_serve.py"), str(tmp_path), "--port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        line = process.stderr.readline()
        assert " by gRPC at 127.0.0.1:" in line, line + process.stderr.read()
        with grpc.insecure_channel(line.split(" at ")[-1].strip()) as channel:
            call = compiled()[1].GeneratorStub(channel).Generate(prompt(max_new_tokens=200, seed=1))
            tokens = [next(call)]
            process.send_signal(signal.SIGTERM)
            tokens += call
        assert tokens[-1].finish and (len(tokens) == 200 or tokens[-1].finish == "stop")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
