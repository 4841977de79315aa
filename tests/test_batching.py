"""chapters/batching.py and chapters/paging.py: a text is the same bits alone and among others, and
each block is free, idle or in use."""

import threading
from collections import Counter
from functools import cache
from random import Random

import pytest
import torch
from conftest import tiny

import sample
from chapters import paging
from chapters.batching import Engine, Request, Token
from chapters.paging import Blocks, block_key
from model import TuneConfig, quantize, tune
from sample import SampleConfig, complete

WORDS = "the a cat dog sees likes big red old bird tree on under runs sits".split()


@cache
def sure(tokenizer, architecture="modern", block_size=64, **options):
    """A model that is sure of what it says, so that it repeats itself and ends early or late."""
    model = tiny(architecture, vocab_size=tokenizer.n_vocab, block_size=block_size, **options)
    model.transformer.wte.weight.data *= 3
    model.lm_head.weight.data *= 1 if model.config.tied else 10
    return model


def made(seed, **options):
    """A prompt and how it goes on, of any kind."""
    random = Random(seed)
    start = random.choice(["", "the big red bird sits on the old tree and "])  # shared
    prompt = start + " ".join(random.choices(WORDS, k=random.randint(0, 12)))
    config = dict(seed=seed, max_new_tokens=random.randint(1, 24),
                  temperature=random.choice([0, 0.8, 1.3]), stop=random.choice([[], [], ["at "]]),
                  top_p=random.choice([None, 0.9]), top_k=random.choice([None, 20]),
                  repetition_penalty=random.choice([1.0, 1.3]),
                  frequency_penalty=random.choice([0.0, 0.4]),
                  logit_bias=random.choice([[], ["the=2"]]))
    return prompt + random.choice(["", " "]), SampleConfig(**config | options)


def ask(engine, prompt, config, **options):
    """Submit a request -> it, whose tokens are in .got."""
    got = []
    request = Request(prompt, config, got.append, **options)
    request.got = got
    engine.submit(request)
    return request


def finish(engine):
    while engine.step():
        check(engine)
    check(engine)


def alone(model, tokenizer, seed, **options):
    """What a request gets from an engine of its own."""
    engine = Engine(model, tokenizer, max_rows=4, block_tokens=4)
    request = ask(engine, *made(seed), **options)
    finish(engine)
    return request.got


def check(engine):
    """The invariants of the pool: each block is in one place, with as many users as tables."""
    blocks, users = engine.blocks, Counter()
    for request in engine.rows:
        users.update(request.table)
        assert len(request.table) * blocks.block_tokens >= request.n_read
    assert users == blocks.users and min(users.values(), default=1) > 0
    assert sorted([*blocks.free, *blocks.idle, *users]) == [*range(1, blocks.n_blocks + 1)]
    assert {block: key for key, block in blocks.known.items()} == blocks.keys
    assert {*blocks.idle} <= {*blocks.keys} and not {*blocks.free} & {*blocks.keys}
    counts = engine.counts()
    assert counts["blocks_used"] == len(users) and counts["blocks_cached"] == len(blocks.idle)


def text(tokens):
    return "".join(token.text for token in tokens)


# -----------------------------------------------------------------------------
# The promise: the same text for the same seed, alone or among others.


@pytest.mark.parametrize("n_clients, n_blocks", [
    (8, 0), *[pytest.param(32, n, marks=pytest.mark.slow) for n in (0, 16, 40)]])
def test_many_clients_get_what_each_gets_alone(n_clients, n_blocks, tokenizer):
    model, random = sure(tokenizer), Random(n_clients)
    engine = Engine(model, tokenizer, max_rows=4, n_blocks=n_blocks, block_tokens=4)
    waiting = random.sample(range(n_clients), n_clients)
    requests, gone = {}, set()
    while waiting or engine.rows or engine.waiting:
        for seed in [waiting.pop() for _ in range(random.randint(0, 3)) if waiting]:
            requests[seed] = ask(engine, *made(seed), n_logprobs=2)
        if random.random() < 0.1 and requests:
            gone.add(seed := random.choice([*requests]))
            engine.cancel(requests[seed])
        engine.step()
        check(engine)
    for seed, request in requests.items():
        expected = alone(model, tokenizer, seed, n_logprobs=2)
        if request.got[-1].reason == "cancelled":
            assert seed in gone and request.got[:-1] == expected[:len(request.got) - 1]
        else:
            assert request.got == expected  # the last bit of each log-probability included
    assert not engine.blocks.users and len(requests) == n_clients
    assert engine.counts()["preempted"] > 0 or n_blocks != 16


@pytest.mark.parametrize("architecture, options, change", [
    ("gpt2", {}, None), ("modern", dict(window=5), None), ("modern", {}, "bfloat16"),
    *[pytest.param("modern", {}, name, marks=pytest.mark.slow)
      for name in ("int8", "int4", "prefix", "prompt", "lora")]])
def test_every_kind_of_model_keeps_the_promise(architecture, options, change, tokenizer):
    model = changed(sure.__wrapped__(tokenizer, architecture, **options), change)
    expected = [alone(model, tokenizer, seed) for seed in range(5)]
    engine = Engine(model, tokenizer, max_rows=4, block_tokens=4)
    requests = [ask(engine, *made(seed)) for seed in range(5)]
    finish(engine)
    assert [request.got for request in requests] == expected
    if change not in ("bfloat16", "int8", "int4"):
        for tokens, seed in zip(expected, range(5)):
            assert text(tokens) == complete(model, tokenizer, *made(seed))


def changed(model, change):
    """A model in another precision, or tuned."""
    if change == "bfloat16":
        return model.to(torch.bfloat16)
    if change in ("int8", "int4"):
        quantize(model, change)
    elif change:
        tune(model, TuneConfig(tune=change, rank=4))
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model.eval()


def test_a_text_is_that_of_sample_py(tokenizer):
    model = sure(tokenizer)
    engine = Engine(model, tokenizer, max_rows=4)
    for seed in range(4):
        prompt, config = made(seed)
        request = ask(engine, prompt, config)
        finish(engine)
        pieces = [piece for _, piece in sample.write(model, tokenizer, [prompt], config)]
        assert [(t.id, t.text) for t in request.got] == [(p.token, p.text) for p in pieces]
        torch.testing.assert_close([t.logprob for t in request.got], [p.logprob for p in pieces],
                                   rtol=1e-4, atol=1e-5)


def test_a_found_beginning_changes_no_bit_and_is_read_once(tokenizer):
    model, prompt = sure(tokenizer), "the old tree sees a big red bird and the cat likes it"
    engine = Engine(model, tokenizer, max_rows=4, block_tokens=4)
    requests = []
    for _ in range(2):
        requests.append(ask(engine, prompt, SampleConfig(temperature=0, max_new_tokens=9)))
        finish(engine)
    first, again = requests
    assert first.got == again.got and first.hit_tokens == 0
    assert again.hit_tokens == (first.n_prompt - 1) // 4 * 4 > 0
    chat = ask(engine, first.ids + [5, 6], SampleConfig(max_new_tokens=1))  # what was written, too
    finish(engine)
    assert chat.hit_tokens == (len(first.ids) - 1) // 4 * 4 > first.n_prompt
    assert engine.counts()["hit_tokens"] == again.hit_tokens + chat.hit_tokens


def test_texts_that_begin_alike_share_blocks_at_the_same_time(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=4, block_tokens=4)
    ids = [7] * 21
    ask(engine, ids, SampleConfig(max_new_tokens=20, temperature=0))
    while engine.rows and engine.rows[0].n_read < 21 or engine.waiting:
        engine.step()
    others = [ask(engine, ids + [i], SampleConfig(max_new_tokens=20)) for i in range(3)]
    engine.step()
    check(engine)
    assert {request.hit_tokens for request in others} == {20}
    assert [engine.blocks.users[block] for block in engine.rows[0].table[:5]] == [4] * 5
    finish(engine)


# -----------------------------------------------------------------------------
# The pool.


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_each_block_is_free_idle_or_in_use(seed, tokenizer):
    random, engine, requests = Random(seed), None, []
    engine = Engine(sure(tokenizer, n_layer=1), tokenizer, max_rows=3, n_blocks=17, block_tokens=4)
    for _ in range(60):
        action = random.random()
        if action < 0.3:
            requests.append(ask(engine, *made(random.randrange(9)), echo=random.random() < 0.2))
        elif action < 0.4 and requests:
            engine.cancel(random.choice(requests))
        else:
            engine.step()
        check(engine)
    finish(engine)
    assert not engine.blocks.users
    for request in requests:
        reasons = [token.reason for token in request.got]
        assert reasons[-1] in ("stop", "length", "cancelled") and not any(reasons[:-1])


def test_the_text_unused_for_longest_loses_its_end_first():
    blocks, texts = Blocks(tiny(), 4, 2), ([1, 1, 2, 2], [3, 3, 4, 4])
    for ids in texts:
        table = [blocks.take(), blocks.take()]
        for i, block in enumerate(table):
            blocks.keep(block, block_key(ids, 2 * i + 2))
        blocks.release(table)

    def left():
        """How many blocks of each text are known; the last id is never looked up."""
        tables = [blocks.find(ids + [9]) for ids in texts]
        for table in tables[::-1]:  # now the second has been unused for longer
            blocks.release([*table])
        return [len(table) for table in tables]

    assert left() == [2, 2] and len(blocks.find(texts[0])) == 1
    assert blocks.take() and left() == [2, 1]
    assert blocks.take() and left() == [2, 0]


def test_a_key_depends_on_every_id_before_its_end():
    ids = [5, 6, 7, 8]
    assert block_key(ids, 2) == block_key([5, 6, 0], 2) != block_key(ids, 4)
    others = {block_key([*ids[:i], 9, *ids[i + 1:]], 4) for i in range(4)}
    assert len(others | {block_key(ids, 4)}) == 5


# -----------------------------------------------------------------------------
# The scheduler.


def test_a_long_prompt_holds_nobody_up_and_a_short_one_behind_it_is_not_last(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=4, block_tokens=4)
    first = ask(engine, "the", SampleConfig(max_new_tokens=30, temperature=0, ban=["."]))
    engine.step()
    long = ask(engine, [9] * 50, SampleConfig(max_new_tokens=1))
    n_steps = 0
    while not long.got:
        before = len(first.got)
        engine.step()
        n_steps += 1
        assert len(first.got) == before + 1
    assert n_steps == -(-50 // 7)  # two passes of four tokens, of which the first text has one
    finish(engine)


def test_a_step_reads_two_passes_at_most_and_of_each_text_one_token_at_least(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=4, block_tokens=4)
    for i in range(4):
        ask(engine, [9 + i] * 50, SampleConfig(max_new_tokens=1))
    engine.admit()
    counts = Counter(request.ids[0] for request, _ in engine.schedule())
    assert counts == {9: 5, 10: 1, 11: 1, 12: 1}


def test_the_youngest_gives_its_blocks_back_and_goes_on_later(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=4, n_blocks=16, block_tokens=4)
    config = SampleConfig(max_new_tokens=40, temperature=1.0, seed=3)
    requests = [ask(engine, [5 + i], config) for i in range(4)]
    finish(engine)
    ends = [len(request.ids) for request in requests]
    assert engine.counts()["preempted"] > 0 and max(ends) <= 41
    single = Engine(sure(tokenizer), tokenizer, max_rows=4, block_tokens=4)
    for i, request in enumerate(requests):
        expected = ask(single, [5 + i], config)
        finish(single)
        assert request.got == expected.got


@pytest.mark.parametrize("n_logprobs", [0, 3])
def test_a_prompt_is_scored_as_the_model_scores_it(n_logprobs, tokenizer):
    model, ids = sure(tokenizer), [5, 9, 11, 5, 9, 300, 2]
    engine = Engine(model, tokenizer, max_rows=4, block_tokens=4)
    for _ in range(2):  # what is in the cache is read again
        request = ask(engine, ids, SampleConfig(max_new_tokens=1), n_logprobs=n_logprobs, echo=True)
        finish(engine)
    said = model(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
    assert request.prompt_scores[0] == (5, None, [])
    for i, (id, logprob, top) in enumerate(request.prompt_scores[1:]):
        assert id == ids[i + 1] and abs(logprob - said[i, id].item()) < 1e-4
        assert [id for id, _ in top] == said[i].topk(n_logprobs).indices.tolist()
    token, = request.got
    assert len(request.prompt_scores) == 7 and len(token.top) == n_logprobs
    assert abs(token.logprob - said[-1, token.id].item()) < 1e-4


def test_a_text_ends_for_a_reason(tokenizer):
    model = sure(tokenizer)
    engine = Engine(model, tokenizer, max_rows=4)
    plain = complete(model, tokenizer, "the cat", temperature=0, max_new_tokens=20)
    rows = {"length": dict(max_new_tokens=20), "stop": dict(stop=[plain[4:7]])}
    requests = {reason: ask(engine, "the cat", SampleConfig(temperature=0, **options))
                for reason, options in rows.items()}
    full = ask(engine, [5] * 60, SampleConfig(temperature=0))
    end = tokenizer.special["<|end|>"]
    ended = ask(engine, "the cat", SampleConfig(logit_bias=[(end, 100.0)]))
    finish(engine)
    for reason, request in requests.items():
        assert request.got[-1].reason == reason
    assert text(requests["length"].got) == plain and text(requests["stop"].got) == plain[:4]
    assert len(full.got) == 4 and full.got[-1].reason == "length"
    assert ended.got[-1].reason == "stop" and text(ended.got) == "" and len(ended.got) == 1


def test_a_cancelled_request_ends_within_a_step_and_is_told_once(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=2)
    running, waiting, other = (ask(engine, "the", SampleConfig(max_new_tokens=30, seed=seed))
                               for seed in range(3))
    engine.step()
    for request in running, other, other:
        engine.cancel(request)
    engine.step()
    for request in running, other:
        assert request.got[-1] == Token(None, "", None, [], "cancelled") and not request.table
    finish(engine)
    engine.cancel(waiting)  # after its end: nothing
    engine.step()
    assert [len([t for t in r.got if t.reason]) for r in (running, waiting, other)] == [1, 1, 1]


def test_one_whose_emit_fails_ends_alone(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=4)

    def fail(token):
        raise KeyError("gone")

    bad = Request("the", SampleConfig(), fail)
    engine.submit(bad)
    good = ask(engine, *made(1))
    finish(engine)
    assert bad.error == "'gone'" and good.got == alone(sure(tokenizer), tokenizer, 1)


def test_logits_that_are_not_finite_end_a_text_with_an_error(tokenizer):
    model = sure.__wrapped__(tokenizer)
    model.transformer.wte.weight.data[7] = torch.nan
    engine = Engine(model, tokenizer, max_rows=4)
    bad, good = ask(engine, [7], SampleConfig()), ask(engine, *made(1))
    finish(engine)
    assert bad.got == [Token(None, "", None, [], "error")] and "are not finite" in bad.error
    assert good.got[-1].reason != "error"


def test_a_pass_that_fails_ends_those_that_are_in_it_alone(tokenizer):
    engine, passes = Engine(sure(tokenizer), tokenizer, max_rows=4), []

    def forward(tokens):
        passes.append(tokens)
        if len(passes) == 1:
            raise MemoryError("no memory left")
        return Engine.forward(engine, tokens)

    engine.forward = forward
    bad = ask(engine, [9] * 6, SampleConfig())  # four tokens in the first pass, two in the second
    good = ask(engine, *made(1))
    finish(engine)
    assert bad.got == [Token(None, "", None, [], "error")] and bad.error == "no memory left"
    assert good.got == alone(sure(tokenizer), tokenizer, 1)


def test_a_prompt_that_fails_in_the_middle_of_a_pass_is_over(tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=8)
    bad = ask(engine, [9] * 6, SampleConfig(max_new_tokens=3), echo=True)

    def score(logits, id):
        del bad.score  # only once
        raise ArithmeticError

    bad.score = score
    finish(engine)
    assert bad.got == [Token(None, "", None, [], "error")] and bad.error == "ArithmeticError"


@pytest.mark.parametrize("cancel", [False, True])
def test_an_engine_in_a_thread_serves_what_came_before_it_was_closed(cancel, tokenizer):
    engine = Engine(sure(tokenizer), tokenizer, max_rows=4, block_tokens=4)
    thread = threading.Thread(target=engine.run)
    thread.start()
    early = ask(engine, *made(3))
    while not early.got or early.got[-1].reason is None:
        thread.join(0.001)
    late = [ask(engine, *made(seed)) for seed in range(4, 7)]
    engine.close(cancel)
    thread.join(30)
    assert not thread.is_alive() and not engine.blocks.users
    with pytest.raises(RuntimeError, match="takes no more requests"):
        ask(engine, *made(0))
    for seed, request in enumerate(late, 4):
        assert cancel or request.got == alone(sure(tokenizer), tokenizer, seed)
        assert request.got[-1].reason


@pytest.mark.parametrize("prompt, options, said", [
    ([5] * 64, {}, "the prompt has 64 tokens, this model takes 1 to 63"),
    ([], {}, "the prompt has 0 tokens"), ([5, 999], {}, "token id 999 is not from 0 to"),
    ([-1], {}, "token id -1 is not from 0"), ("the", dict(overflow="slide"), "is not served"),
    ("the", dict(logit_bias=["the cat sees=1"]), "must be one token and a number")])
def test_what_cannot_be_continued_is_refused_at_once(prompt, options, said, tokenizer):
    engine = Engine(sure(tokenizer), tokenizer)
    with pytest.raises(ValueError, match=said):
        ask(engine, prompt, SampleConfig(**options))
    assert not engine.waiting and not engine.step()


@pytest.mark.parametrize("architecture, options", [
    ("modern", dict(n_classes=2)), ("transformer", {}), ("bert", {})])
def test_a_model_that_continues_no_text_is_refused(architecture, options, tokenizer):
    model = tiny(architecture, vocab_size=tokenizer.n_vocab, **options)
    with pytest.raises(ValueError, match="only a model that continues a text can be served"):
        Engine(model, tokenizer)


def test_a_pool_holds_all_texts_or_what_memory_allows_but_one_at_least(tokenizer, monkeypatch):
    model = sure(tokenizer)
    kv = Engine(model, tokenizer, max_rows=3, block_tokens=4).blocks.kv
    assert kv.size(1) == 1 + 3 * 16
    for n_blocks, expected in (20.5, 20), (3, 16):
        monkeypatch.setattr(paging, "POOL_BYTES", int(n_blocks * kv[:, 0].nbytes))
        assert Engine(model, tokenizer, block_tokens=4).blocks.n_blocks == expected
    with pytest.raises(ValueError, match="take at least 16"):
        Engine(model, tokenizer, n_blocks=15, block_tokens=4)
