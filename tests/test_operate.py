"""chapters/operate.py, in front of a real server: what is counted, cached, rated and changed while
clients stream."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import keep, tiny

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
prometheus = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus_client")

from chapters.operate import OperateConfig, Operation
from chapters.protocol import Completion
from chapters.replies import Call
from chapters.serve import Served
from sample import complete
from asking import ask, events, serve

KEY = "a-key-of-sixteen-characters"


@pytest.fixture
def runs(tokenizer, tmp_path):
    """A function: name, seed of the weights -> a Served, which is closed at the end."""
    with ExitStack() as stack:
        def open_run(name, seed=0, **options):
            model = tiny(seed=seed, vocab_size=tokenizer.n_vocab, block_size=64, **options)
            served = Served(tmp_path / name, model, tokenizer, 8)
            served.chats = True  # as if it had learned to hold a conversation
            stack.callback(served.close)
            return served
        yield open_run


def read_metrics(url, key=None):
    """{name: {labels: value}} of what Prometheus reads."""
    status, text = ask(f"{url}/metrics", key=key)
    assert status == 200
    found = {}
    for family in prometheus.text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def body(prompt="the cat", **fields):
    return dict(prompt=prompt, max_tokens=8) | fields


def text_of(reply):
    return reply[1]["choices"][0]["text"]


@contextmanager
def slowly(engine, seconds=0.01):
    """An engine that takes a step in so many seconds, or more."""
    step = engine.step
    engine.step = lambda: time.sleep(seconds) or step()
    yield
    del engine.step


def wait_until(is_so):
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


# -----------------------------------------------------------------------------
# Metrics and the cache.


def test_requests_tokens_and_latencies_are_counted_and_paths_of_attackers_are_no_labels(runs):
    served = runs("old")
    with serve({"old": served}, Operation(OperateConfig())) as url:
        for seed in range(3):
            assert ask(f"{url}/v1/completions", body(seed=seed))[0] == 200
        assert [*events(f"{url}/v1/completions", body(seed=9))]
        ask(f"{url}/v1/completions", body(temperature=-1))
        for i in range(5):
            ask(f"{url}/wp-admin/{i}")
        found = read_metrics(url)
    assert found["llm_requests_total"] == {
        ("a", "/v1/completions", "200"): 4, ("a", "/v1/completions", "400"): 1,
        ("a", "other", "404"): 5}
    assert found["llm_tokens_total"] == {("a",): 32}
    assert found["llm_first_token_seconds_count"] == {("a",): 4}
    assert found["llm_token_seconds_count"] == {("a",): 28}
    assert found["llm_request_seconds_count"] == {("a",): 4}
    assert found["llm_prompt_tokens_sum"] == {(): 4 * len(served.tokenizer.encode("the cat"))}
    assert found["llm_rows"] == found["llm_waiting"] == {(): 0}


@pytest.mark.slow
def test_a_determined_answer_is_computed_once_and_is_the_same_in_every_form(runs):
    served = runs("old")
    with serve({"old": served}, Operation(OperateConfig())) as url:
        for fields in dict(seed=3), dict(temperature=0), dict(seed=1, n=2, logprobs=2, echo=True):
            first = ask(f"{url}/v1/completions", body(**fields))[1]
            n_tokens = served.engine.counts()["tokens"]
            again = ask(f"{url}/v1/completions", body(**fields, user="another"))[1]
            assert again["choices"] == first["choices"] and again["usage"] == first["usage"]
            assert served.engine.counts()["tokens"] == n_tokens and again["id"] != first["id"]
            streamed = [""] * len(first["choices"])
            for chunk in events(f"{url}/v1/completions", body(**fields)):
                for choice in chunk["choices"]:
                    streamed[choice["index"]] += choice["text"]
            assert streamed == [choice["text"] for choice in first["choices"]]
        found = read_metrics(url)
        assert found["llm_response_lookups_total"] == {("miss",): 3, ("hit",): 6}
        assert found["llm_tokens_total"] == {("a",): n_tokens}  # what is known takes no time
        for name in "first_token", "request":
            assert found[f"llm_{name}_seconds_count"] == {("a",): 3}


@pytest.mark.slow
def test_what_chance_decides_is_computed_each_time_and_other_requests_are_others(runs):
    served = runs("old")
    with serve({"old": served}, Operation(OperateConfig())) as url:
        texts = {text_of(ask(f"{url}/v1/completions", body())) for _ in range(4)}
        assert len(texts) > 1
        assert text_of(ask(f"{url}/v1/completions", body(seed=1))) != text_of(
            ask(f"{url}/v1/completions", body(seed=2)))
        assert ("hit",) not in read_metrics(url)["llm_response_lookups_total"]


@pytest.mark.slow
def test_without_bytes_nothing_is_cached(runs):
    served = runs("old")
    with serve({"old": served}, Operation(OperateConfig(cache_bytes=0))) as url:
        for n in 8, 16:
            ask(f"{url}/v1/completions", body(seed=1))
            assert served.engine.counts()["tokens"] == n
        assert "llm_response_lookups_total" not in read_metrics(url)


@pytest.mark.slow
def test_an_answer_whose_client_left_is_not_cached(runs):
    served, watch = runs("old"), Operation(OperateConfig())
    with serve({"old": served}, watch) as url:
        stream = events(f"{url}/v1/completions", body(seed=1, max_tokens=50))
        with slowly(served.engine):
            next(stream)
            stream.close()
            wait_until(lambda: not watch.calls)
        assert not watch.cache.entries
        whole = text_of(ask(f"{url}/v1/completions", body(seed=1, max_tokens=50)))
    assert whole == complete(served.engine.model, served.tokenizer, "the cat", seed=1,
                             temperature=1.0, max_new_tokens=50)


# -----------------------------------------------------------------------------
# Feedback.


def chat(text="the cat", **fields):
    return dict(messages=[dict(role="user", content=text)], max_tokens=6) | fields


def test_a_rated_answer_is_logged_with_its_question_and_counted(runs, tmp_path):
    path = tmp_path / "log.jsonl"
    with serve({"old": runs("old")}, Operation(OperateConfig(feedback=str(path)))) as url:
        first, second = (ask(f"{url}/v1/chat/completions", chat(seed=seed))[1] for seed in (1, 2))
        streamed = [*events(f"{url}/v1/chat/completions", chat(seed=1))]  # out of the cache
        assert path.stat().st_size == 0
        for id, rating, better in ((first["id"], "up", None), (second["id"], "down", "a dog"),
                                   (streamed[0]["id"], "up", None)):
            asked = dict(id=id, rating=rating) | (dict(better=better) if better else {})
            assert ask(f"{url}/feedback", asked) == (200, {})
        assert read_metrics(url)["llm_ratings_total"] == {("a", "up"): 2, ("a", "down"): 1}
        status, error = ask(f"{url}/feedback", dict(id="chatcmpl-x", rating="up"))
        assert status == 400 and "no answer that can still be rated" in error["error"]["message"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [reply["choices"][0]["message"]["content"] for reply in (first, second, first)]
    assert [row["answer"] for row in rows] == texts
    assert [(row["rating"], row["better"]) for row in rows] == [(1, None), (-1, "a dog"), (1, None)]
    assert rows[0]["messages"] == chat()["messages"] and rows[0]["model"] == "old"


@pytest.mark.slow
def test_too_many_ratings_are_429_and_without_a_log_there_are_none(runs, tmp_path):
    served, watch = runs("old"), Operation(OperateConfig(feedback=str(tmp_path / "log.jsonl")))
    watch.log.per_hour = 2
    with serve({"old": served}, watch) as url:
        id = ask(f"{url}/v1/chat/completions", chat(seed=1))[1]["id"]
        statuses = [ask(f"{url}/feedback", dict(id=id, rating="up"))[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
    with serve({"old": served}, Operation(OperateConfig())) as url:
        assert ask(f"{url}/feedback", dict(id=id, rating="up"))[0] == 404


# -----------------------------------------------------------------------------
# Two runs.


def greedy(served, max_tokens=8):
    """What a run alone says to "the cat"."""
    return complete(served.engine.model, served.tokenizer, "the cat", temperature=0,
                    max_new_tokens=max_tokens)


@pytest.mark.slow
def test_a_user_meets_the_same_run_and_the_reply_names_it(runs):
    old, new = runs("old"), runs("new", seed=1)
    watch, texts = Operation(OperateConfig()), {"old": greedy(old), "new": greedy(new)}
    assert texts["old"] != texts["new"]
    models, met = {"old": old}, {}
    with serve(models, watch) as url:
        watch.begin(new, 40, False)
        for _ in range(2):
            for user in range(20):
                reply = ask(f"{url}/v1/completions", body(temperature=0, user=f"u{user}"))
                assert text_of(reply) == texts[reply[1]["model"]]
                assert met.setdefault(user, reply[1]["model"]) == reply[1]["model"]
        assert 3 < [*met.values()].count("new") < 14
        for name in "old", "new":  # who names the new one gets it, and only that
            asked = {text_of(ask(f"{url}/v1/completions", body(temperature=0, model=name, user=str(
                user)))) for user in range(9)}
            assert asked == ({texts["new"]} if name == "new" else {*texts.values()})
        wait_until(lambda: not watch.calls)
        arms = watch.split.arms
        assert arms["a"].n + arms["b"].n == 2 * 20 + 9  # without those that the client chose


@pytest.mark.slow
def test_only_whoever_has_the_key_changes_the_runs(runs):
    watch = Operation(OperateConfig())
    with serve({"old": runs("old")}, watch) as url:
        status, error = ask(f"{url}/admin/rollout", dict(run="x", share=10))
        assert status == 403 and "SERVE_KEY" in error["error"]["message"]
        assert ask(f"{url}/admin/rollout")[0] == 403
    watch = Operation(OperateConfig(), KEY)
    with serve({"old": runs("old")}, watch, key=KEY) as url:
        assert ask(f"{url}/admin/rollout", dict(run="x", share=10))[0] == 401
        assert ask(f"{url}/admin/rollout", dict(run="x", share=10), key=KEY + "x")[0] == 401
        assert ask(f"{url}/metrics")[0] == 401
        assert ask(f"{url}/admin/rollout", key=KEY) == (200, dict(state="none", models=["old"]))
        assert ("a", "/metrics", "401") in read_metrics(url, KEY)["llm_requests_total"]


@pytest.mark.slow
def test_a_run_is_loaded_shared_promoted_and_the_old_one_closed_by_requests_alone(
        runs, tokenizer, tmp_path):
    keep(tiny(seed=1, vocab_size=tokenizer.n_vocab, block_size=64), tmp_path / "new")
    tokenizer.save(tmp_path / "new/tokenizer.json")
    old, watch, models = runs("old"), Operation(OperateConfig(), KEY), {}
    models["old"] = old

    def change(**words):
        return ask(f"{url}/admin/rollout", words, KEY)

    keep(tiny(vocab_size=tokenizer.n_vocab), tmp_path / "other/old")
    with serve(models, watch, key=KEY, max_rows=4) as url:
        for words, problem in ((dict(share=50), "give a run"), (dict(), "give a run"),
                               (dict(run=str(tmp_path / "none"), share=5), "none"),
                               (dict(run="old", share=101), "101"), (dict(runs="x"), "runs is"),
                               (dict(run=str(tmp_path / "other/old")), "name old is here already")):
            status, error = change(**words)
            assert status == 400 and problem in error["error"]["message"], error
        status, state = change(run=str(tmp_path / "new"), share=25)
        assert status == 200 and state["share"] == 25 and state["arms"]["b"]["model"] == "new"
        assert change(run=str(tmp_path / "new"), share=25)[0] == 409
        assert change(share=75)[1]["share"] == 75
        assert change(share=100)[1] == dict(state="none", models=["new"])
        reply = ask(f"{url}/v1/completions", body(temperature=0, model="old"), KEY)
        assert reply[1]["model"] == "new" and text_of(reply) == greedy(models["new"])
        wait_until(lambda: not old.thread.is_alive())
    models["new"].close()


@pytest.mark.slow
@pytest.mark.parametrize("stays", ["a", "b"])
def test_runs_are_switched_while_clients_stream_and_every_answer_is_whole_and_of_one_run(
        runs, stays):
    old, new = runs("old"), runs("new", seed=1)
    texts = {"old": greedy(old, 40), "new": greedy(new, 40)}
    watch, found, enough = Operation(OperateConfig(cache_bytes=0), KEY), [], threading.Event()

    def client(user):
        while not enough.is_set():
            chunks = [*events(f"{url}/v1/completions", body(
                temperature=0, max_tokens=40, user=f"{user} {len(found)}"), KEY)]
            names = {chunk["model"] for chunk in chunks}
            found.append((names, "".join(choice["text"] for chunk in chunks
                                         for choice in chunk["choices"]), chunks[-1]))

    with serve({"old": old}, watch, key=KEY) as url, slowly(old.engine, 0.003), slowly(
            new.engine, 0.003), ThreadPoolExecutor(6) as pool, ExitStack() as last_of_all:
        last_of_all.callback(enough.set)  # whatever fails below
        watch.begin(new, 50, False)
        clients = [pool.submit(client, user) for user in range(6)]
        wait_until(lambda: len(watch.calls) == 6 and len(found) > 6)
        gone, kept = (new, old) if stays == "a" else (old, new)
        share = 0 if stays == "a" else 100
        assert ask(f"{url}/admin/rollout", dict(share=share), KEY)[0] == 200
        n_before = len(found)
        wait_until(lambda: not gone.thread.is_alive() and len(found) > n_before + 12)
        enough.set()
        for done in clients:
            done.result()  # raises what the client ran into
        assert read_metrics(url, KEY)["llm_requests_total"].keys() <= {
            (arm, path, "200") for arm in "ab" for path in ("/v1/completions", "/admin/rollout")}
    for names, text, last in found:
        (name,) = names
        assert text == texts[name] and last["choices"][0]["finish_reason"]
    assert {name for names, _, _ in found for name in names} == {"old", "new"}
    assert {name for names, _, _ in found[-6:] for name in names} == {kept.name}


@pytest.mark.slow
def test_a_canary_that_fails_is_rolled_back_by_itself_and_clients_go_on(runs, capsys):
    old, new = runs("old"), runs("new", seed=1)
    watch, statuses = Operation(OperateConfig(cache_bytes=0)), []
    with serve({"old": old}, watch) as url:
        watch.begin(new, 0, True)
        watch.split.share, watch.split.every = 50, 10
        with torch.no_grad():
            new.engine.model.lm_head.weight.fill_(torch.nan)  # a damaged run
        for user in range(60):
            statuses.append(ask(f"{url}/v1/completions", body(user=f"u{user}"))[0])
        wait_until(lambda: not new.thread.is_alive())
        found = read_metrics(url)
    assert statuses.count(500) == 10 and {*statuses} == {200, 500} and 500 not in statuses[35:]
    assert found["llm_requests_total"]["b", "/v1/completions", "500"] == 10
    said = capsys.readouterr().err
    assert "new is rolled back, old answers all: errors 10 of 10" in said


@pytest.mark.slow
def test_a_rating_goes_to_the_run_that_wrote_the_answer(runs, tmp_path):
    watch = Operation(OperateConfig(feedback=str(tmp_path / "log.jsonl")))
    with serve({"old": runs("old")}, watch) as url:
        ids = [ask(f"{url}/v1/chat/completions", chat())[1]["id"]]  # before the split
        watch.begin(runs("new", seed=1), 100, False)
        ids += [ask(f"{url}/v1/chat/completions", chat())[1]["id"] for _ in range(2)]
        for id, rating in zip(ids, ("down", "up", "up")):
            assert ask(f"{url}/feedback", dict(id=id, rating=rating))[0] == 200
    a, b = watch.split.arms.values()
    assert (a.ups, a.downs, b.ups, b.downs) == (0, 1, 2, 0)


@pytest.mark.slow
def test_what_a_run_is_to_blame_for_counts_against_it_and_nothing_else(runs):
    old, new = runs("old"), runs("new", seed=1)
    watch, errors = Operation(OperateConfig(cache_bytes=0)), {}
    with serve({"old": old}, watch) as url:
        watch.begin(new, 100, False)
        for status in 200, 400, None, 499, 408, 429, 500:
            call = Call("x", Completion(prompt="a"), "1.2.3.4", 0.0, 0)
            assert watch.choose(call, watch.models) == "new" and call.arm == "b"
            before = watch.split.arms["b"].errors
            watch.end("/v1/completions", status, 0.1, call)
            errors[status] = watch.split.arms["b"].errors - before
        assert [status for status, n in errors.items() if n] == [408, 429, 500]
        with torch.no_grad():
            new.engine.model.lm_head.weight.fill_(torch.nan)
        *_, last = events(f"{url}/v1/completions", body())  # its status is 200
        wait_until(lambda: not watch.calls)
        assert "error" in last and watch.split.arms["b"].errors == 4


@pytest.mark.slow
def test_a_canary_that_is_as_good_is_promoted_by_itself(runs, capsys):
    old, new = runs("old"), runs("new", seed=1)
    watch = Operation(OperateConfig(cache_bytes=0))
    models = {"old": old}
    with serve(models, watch) as url:
        watch.begin(new, 0, True)
        watch.split.steps, watch.split.share, watch.split.every = (50, 100), 50, 2
        for user in range(80):
            assert ask(f"{url}/v1/completions", body(user=f"u{user}", max_tokens=1))[0] == 200
        wait_until(lambda: not old.thread.is_alive())
    assert [*models] == ["new"] and watch.split is None
    assert "new now gets 100%" in (said := capsys.readouterr().err) and "new is promoted" in said


# -----------------------------------------------------------------------------
# Prompts.


@pytest.mark.slow
def test_prompts_are_compared_with_the_reference_and_never_written_anywhere(
        runs, tmp_path, capsys):
    served, path = runs("old"), tmp_path / "prompts.json"
    path.write_text(json.dumps(dict(tokens=[3] * 50, nats=[5.8] * 50)))
    secret = "sees big red old bird tree"
    watch = Operation(OperateConfig(reference=str(path)))
    with serve({"old": served}, watch) as url:
        watch.prompts.drifts["tokens"].window = 10
        for seed in range(10):
            ask(f"{url}/v1/completions", body(secret, seed=seed))
            ask(f"{url}/v1/completions", body(secret, temperature=-1))
        found = read_metrics(url)
    assert found["llm_drift"] == {("tokens",): 1}
    said = capsys.readouterr()
    assert said.err.count("drift: the length in tokens of the last 10 prompts is 1.00") == 1
    assert secret not in said.err + said.out + json.dumps([*map(str, found)])
