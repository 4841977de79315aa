"""chapters/watch.py and drift.py: what is counted, which answers are kept, when prompts drift."""

import json
import math
import threading
from random import Random

import pytest
import torch
from conftest import keep, mistake, tiny

from chapters import drift
from chapters.batching import Engine
from chapters.drift import (MOST_WAITING, Drift, PromptWatch, ks_distance, ks_limit, profile,
                            prompt_nats, read_reference, training_prompts)
from data import prepare
from evaluate import held_out
from tokenizer import write_json

prometheus = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus_client")

from chapters.watch import (COUNTERS, ENTRY_BYTES, GAUGES, Metrics, Recent, Stopwatch,
                            is_determined, response_key)


def read(metrics):
    """{name: {labels: value}} of what Prometheus reads."""
    found = {}
    for family in prometheus.text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


# -----------------------------------------------------------------------------
# The cache of responses.


def test_the_cache_keeps_what_was_used_last_and_never_more_bytes_than_it_may():
    random, cache, put, used = Random(0), Recent(20_000), {}, {}
    for now in range(2000):
        key = f"key {random.randrange(60)}"
        if now % 3 == 0:
            put[key] = random.randbytes(random.randrange(1500))
            cache.put(key, put[key])
            used[key] = now
        elif (value := cache.get(key)) is not None:
            assert value == put[key]
            used[key] = now
        sizes = {key: len(key) + len(value) + ENTRY_BYTES for key, value in cache.entries.items()}
        assert cache.n_bytes == sum(sizes.values()) <= 20_000
        gone = used.keys() - sizes.keys()
        assert not gone or max(map(used.get, gone)) < min(map(used.get, sizes))
    assert len(sizes) > 10 and gone


def test_a_value_too_large_for_the_cache_is_not_kept_and_a_cache_of_no_bytes_keeps_nothing():
    cache = Recent(1000)
    cache.put("large", bytes(2000))
    assert cache.get("large") is None and cache.n_bytes == 0
    nothing = Recent(0)
    nothing.put("a", b"")
    assert nothing.get("a") is None and nothing.n_bytes == 0


def test_threads_share_a_cache():
    cache = Recent(50_000)

    def work(seed):
        random = Random(seed)
        for _ in range(300):
            key = str(random.randrange(200))
            assert cache.get(key) in (None, key.encode() * 100)
            cache.put(key, key.encode() * 100)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.n_bytes == sum(cache.size(*entry) for entry in cache.entries.items()) <= 50_000


@pytest.mark.parametrize("request_, expected", [
    (dict(temperature=0), True), (dict(temperature=0.0, seed=None), True), (dict(seed=0), True),
    (dict(temperature=1, seed=-3), True), (dict(temperature=0.7), False), (dict(), False),
    (dict(temperature=None), False)])
def test_only_what_is_determined_may_be_cached(request_, expected):
    assert is_determined(request_) is expected


def test_the_key_depends_on_weights_and_all_that_changes_the_text_and_on_nothing_else():
    request = dict(messages=[dict(role="user", content="Hi")], seed=1, max_tokens=5)
    others = [dict(seed=2), dict(max_tokens=6), dict(messages=[]), dict(stop=["x"]), dict(n=2)]
    keys = [response_key("w", request | other) for other in [{}, *others]]
    assert len({*keys, response_key("v", request)}) == 7
    for same in dict(stream=True), dict(user="me"), dict(model="m"):
        assert response_key("w", request | same) == keys[0]
    assert response_key("w", dict(reversed(request.items()))) == keys[0]


# -----------------------------------------------------------------------------
# Metrics.

COUNTS = {name: n for n, name in enumerate([*GAUGES, *COUNTERS], 1)}


def test_the_times_of_an_answer_are_those_of_the_clock():
    metrics, now = Metrics(), [100.5]
    watch = Stopwatch(metrics, "b", start=100.0, clock=lambda: now[0])
    for seconds, is_timed in (0, True), (0.02, True), (0.01, False), (0.02, True):
        now[0] += seconds
        watch.token(is_timed)
    now[0] += 0.45
    watch.end()
    found, arm = read(metrics), ("b",)
    assert watch.first == found["llm_first_token_seconds_sum"][arm] == 0.5
    assert found["llm_token_seconds_sum"][arm] == pytest.approx(0.05)
    assert found["llm_token_seconds_count"][arm] == 2
    assert found["llm_request_seconds_sum"][arm] == pytest.approx(1.0)
    assert found["llm_tokens_total"] == {arm: 4}


def test_an_engine_is_asked_when_prometheus_asks_and_servers_do_not_share_metrics():
    metrics, other = Metrics(lambda: COUNTS), Metrics()
    COUNTS["waiting"] = 77
    metrics.ratings.labels("a", "up").inc()
    found = read(metrics)
    assert found["llm_waiting"] == {(): 77}
    for name in GAUGES:
        assert found[f"llm_{name}"] == {(): COUNTS[name]}
    for name in COUNTERS:
        assert found[f"llm_engine_{name}_total"] == {(): COUNTS[name]}
    assert found["llm_ratings_total"] == {("a", "up"): 1}
    assert not {"llm_waiting", "llm_ratings_total"} & {*read(other)}


def test_what_is_watched_is_what_the_engine_counts(model, tokenizer):
    assert {*Engine(tiny(vocab_size=tokenizer.n_vocab), tokenizer).counts()} >= {*COUNTS}


def test_the_memory_of_the_process_is_there():
    resource = pytest.importorskip("resource", reason="Windows has no such count of memory")
    found = read(Metrics()).get("process_resident_memory_bytes")
    if found is None:
        pytest.skip("only Linux tells the memory of a process in /proc")
    assert 1 < found[()] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 1.01


# -----------------------------------------------------------------------------
# Drift.


def test_the_distance_is_the_largest_gap_of_the_cumulative_shares():
    random = Random(0)
    assert ks_distance([1, 2], [2, 3]) == 0.5
    for _ in range(50):
        a, b = (sorted(random.randrange(8) for _ in range(random.randint(1, 9))) for _ in range(2))
        expected = max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b))
                       for t in range(8))
        assert ks_distance(a, b) == ks_distance(b, a) == pytest.approx(expected)


@pytest.mark.slow  # it takes scipy a second to be there
def test_distance_and_limit_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="only to compare with")
    random = Random(1)
    a, b = (sorted(random.gauss(mean, 1) for _ in range(150)) for mean in (0, 0.3))
    assert ks_distance(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic)
    limit = stats.kstwobign.isf(0.001) * math.sqrt((150 + 90) / (150 * 90))
    assert ks_limit(150, 90) == pytest.approx(limit, rel=1e-3)


def test_samples_of_one_source_seldom_exceed_the_limit():
    random = Random(2)
    limit, n_above = ks_limit(60, 40, chance=0.1), 0
    for _ in range(400):
        a, b = (sorted(random.random() for _ in range(n)) for n in (60, 40))
        n_above += ks_distance(a, b) > limit
    assert 0 < n_above < 0.15 * 400


def test_a_window_that_drifts_says_one_line_and_one_that_does_not_is_silent():
    random, said = Random(3), []
    watch = Drift("length in tokens", [random.gauss(50, 10) for _ in range(500)], window=100,
                  say=said.append)
    distances = [watch.add(random.gauss(50, 10)) for _ in range(1000)]
    assert [i for i, distance in enumerate(distances) if distance is not None] == [
        *range(99, 1000, 100)]
    assert said == [] and max(filter(None, distances)) < 0.2
    assert watch.add(90) is None and said == []
    distances = [watch.add(random.gauss(90, 10)) for _ in range(199)]
    assert len(said) == 2 and min(filter(None, distances)) > 0.9
    assert "length in tokens of the last 100 prompts" in said[0] and "\n" not in said[0]


def test_without_a_reference_the_first_window_is_it():
    said, watch = [], None
    watch = Drift("x", window=50, say=said.append)
    assert all(watch.add(i % 10) is None for i in range(50))
    assert [watch.add(i % 10) for i in range(50)][-1] == 0
    assert [watch.add(i % 10 + 100) for i in range(50)][-1] == 1 and len(said) == 1


def test_small_windows_need_a_larger_distance():
    said, random = [], Random(4)
    watch = Drift("x", [random.random() for _ in range(10)], window=10, say=said.append)
    assert max(filter(None, (watch.add(random.random()) for _ in range(500)))) > 0.3 and said == []


def test_the_surprisal_of_a_prompt_is_that_of_a_plain_forward_pass(model):
    prompts = [[5, 6, 7], [*range(1, 64)], [3, 3], [*range(1, 64), 9, 9, 9]]
    for ids, nats in zip(prompts, prompt_nats(model, prompts)):
        ids = torch.tensor([ids[:model.config.block_size]])
        with torch.no_grad():
            _, loss = model(ids[:, :-1], ids[:, 1:])
        assert nats == pytest.approx(loss.item(), abs=1e-4)


def test_prompts_unlike_the_reference_raise_an_alarm_and_a_gauge(model):
    random, said, metrics = Random(5), [], Metrics()
    usual, odd = ([[random.choice(ids) for _ in range(8)] for _ in range(60)]
                  for ids in (range(4), range(100, 300)))
    with torch.no_grad():  # a model that expects the ids 0 to 3
        model = tiny(vocab_size=model.config.vocab_size, block_size=64)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:4] = 1.0
        model.transformer.final_norm.weight.fill_(1.0)
        model.transformer.wte.weight.fill_(1.0)
    watch = PromptWatch(model, metrics, profile(model, usual), every=1, window=20,
                        say=said.append)
    for ids in [*usual[:20], *odd[:20]]:
        while watch.waiting.qsize() == MOST_WAITING:
            threading.Event().wait(0.001)
        watch.see(ids)
    watch.close()
    watch.thread.join()
    assert len(said) == 1 and "surprisal of the last 20 prompts is 1.00 away" in said[0]
    assert read(metrics)["llm_drift"] == {("tokens",): 0, ("nats",): 1}


def test_requests_do_not_wait_for_surprisals_and_few_prompts_are_kept(model, monkeypatch):
    release, n_scored = threading.Event(), []
    monkeypatch.setattr(drift, "prompt_nats", lambda model, prompts: [
        n_scored.append(len(prompts)) or release.wait(10) and 1.0])
    watch = PromptWatch(model, Metrics(), every=2, window=10)
    for _ in range(200):
        watch.see([1, 2, 3])
    assert watch.waiting.qsize() <= MOST_WAITING and len(watch.drifts["tokens"].reference) == 10
    release.set()
    watch.close()
    watch.thread.join()
    assert 8 <= sum(n_scored) <= 10


# -----------------------------------------------------------------------------
# The reference of a run.


@pytest.fixture
def trained(model, tokenizer, shards, tmp_path):
    """A run's folder that names its shards."""
    folder = tmp_path / "run"
    keep(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "config.json", dict(data=dict(
        path=str(shards), sources=[], fingerprint=json.loads(
            (shards / "card.json").read_text())["fingerprint"])))
    return folder


@pytest.mark.slow
def test_the_command_writes_a_reference_of_held_out_documents(call, trained, model, tokenizer):
    said = call(drift, trained, "--n_prompts=5").out
    found = read_reference(trained / "prompts.json")
    prompts = [*training_prompts(trained, tokenizer, 64)]  # of one document, which is long
    (text,) = held_out(trained)
    assert [id for ids in prompts for id in ids] == [tokenizer.eot, *tokenizer.encode(text)]
    assert found == profile(model, prompts[:5]) and found["tokens"] == [64] * 5
    assert f"{trained}/prompts.json: 5 prompts, median 64 tokens, perplexity" in said


def test_of_a_chat_the_reference_has_what_comes_before_the_first_answer(tmp_path, tokenizer):
    rows = [dict(messages=[dict(role="user", content=f"the cat {i}"),
                           dict(role="assistant", content="sees a dog " * (i + 1)),
                           dict(role="user", content="the dog"),
                           dict(role="assistant", content="a bird")]) for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = prepare([tmp_path / "chats.jsonl"], tmp_path / "shards", tokenizer=tokenizer,
                     val_ratio=0.3, say=lambda text: None)
    tokenizer.save(tmp_path / "tokenizer.json")
    write_json(tmp_path / "config.json", dict(data=dict(path=str(folder), sources=[])))
    prompts = [*training_prompts(tmp_path, tokenizer, 64)]
    expected = [tokenizer.render_prompt(row["messages"][:1]) for row in rows]
    assert len(prompts) > 3 and all(ids in expected for ids in prompts)


@pytest.mark.parametrize("value", [[], {}, dict(tokens=[1, 2]), dict(tokens=[1, 2], nats=["x"]),
                                   dict(tokens=[1, 2], nats=[1, float("nan")]),
                                   dict(tokens=[], nats=[])])
def test_a_file_that_is_no_reference_is_refused(value, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="x.json cannot be read"):
        read_reference(tmp_path / "x.json")


def test_a_run_without_its_shards_is_one_line(trained, monkeypatch, capsys):
    write_json(trained / "config.json", {})
    code, (line,) = mistake(drift.main, monkeypatch, capsys, trained)
    assert code == 1 and "no shards are named" in line and not (trained / "prompts.json").exists()
