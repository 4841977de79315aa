"""chapters/speculative.py: whatever the draft, a text is as likely as the model says."""

from collections import Counter
from shutil import copy

import pytest
import torch
from conftest import keep, mistake, tiny

from chapters import speculative
from chapters.speculative import NgramDraft, RunDraft, accept, speculate, write
from sample import SampleConfig, complete, distribution, generate

V = 5
CONFIGS = [dict(), dict(temperature=0.7, top_k=3), dict(temperature=1.4, top_p=0.8),
           dict(repetition_penalty=3.0, frequency_penalty=2.0), dict(no_repeat_ngram=2, ban=[[1]]),
           dict(min_p=0.1, presence_penalty=0.7, logit_bias=[(3, 1.0)])]


def sure(seed=0, sharp=8.0, **options):
    """A small model with a clear opinion."""
    model = tiny(seed=seed, **options)
    model.lm_head.weight.data *= sharp
    return model


def small(seed=0, sharp=8.0):
    """One as cheap as possible, of a vocabulary whose texts can be counted."""
    return sure(seed, sharp, vocab_size=V, n_layer=1, n_embd=8, n_head=2)


def drafts(model):
    """A draft that is equal to a model, good, bad, and one that looks things up."""
    close = small()
    for p, noise in zip(close.parameters(), model.parameters()):
        p.data += 0.3 * noise.std() * torch.randn_like(p)
    return dict(equal=RunDraft(model), good=RunDraft(close), bad=RunDraft(small(seed=7)),
                ngram=NgramDraft(V))


def exact(model, ids, n, config):
    """The probability of each of the V^n texts of n tokens after ids."""
    texts = torch.cartesian_prod(*[torch.arange(V)] * n).view(-1, n)
    found = torch.ones(len(texts))
    for i in range(n):
        seen = torch.cat((torch.tensor([ids]).expand(len(texts), -1), texts[:, :i]), dim=1)
        p = distribution(model(seen)[0][:, -1], config, seen, len(ids))
        found *= p.gather(1, texts[:, i:i + 1]).squeeze(1)
    return found.detach()


def counted(model, draft, ids, n, config, n_texts, n_draft=3, seed=0):
    """How often each of the V^n texts is written."""
    random, found = torch.Generator().manual_seed(seed), torch.zeros(V**n)
    for _ in range(n_texts):
        text = [id for id, _ in speculate(model, draft, ids, config, random, n_draft)]
        found[sum(id * V**(n - 1 - i) for i, id in enumerate(text))] += 1
    return found


def surprise(found, probabilities):
    """How far counts are from probabilities: chi-square's deviation from what is expected, in its
    standard deviations; above 5 is no chance. Rare texts are counted together."""
    expected = probabilities * found.sum()
    rare = expected < 5
    found, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (found, expected))
    assert (found[expected == 0] == 0).all()
    found, expected = found[expected > 0], expected[expected > 0]
    freedom = max(1, len(found) - 1)
    return (((found - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


# -----------------------------------------------------------------------------
# The distribution.


def test_a_token_is_kept_or_replaced_with_exactly_the_models_probabilities():
    random = torch.Generator().manual_seed(0)
    for _ in range(2):
        p, q = (3 * torch.randn(2, V, generator=random)).softmax(dim=-1)
        drawn = torch.multinomial(q, 2000, replacement=True, generator=random).tolist()
        found = Counter(accept(token, p, q, random) for token in drawn)
        assert surprise(torch.tensor([float(found[i]) for i in range(V)]), p) < 5


def test_equal_probabilities_keep_every_token_and_disjoint_ones_none():
    p = torch.tensor([0.2, 0.3, 0.5, 0.0, 0.0])
    assert [accept(i, p, p) for i in range(3)] == [0, 1, 2]
    assert {accept(3, p, torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])) for _ in range(50)} <= {0, 1, 2}


def slow(name, config):
    return pytest.param(name, config, 500, marks=pytest.mark.slow)


@pytest.mark.parametrize("name, config, n_texts", [
    ("bad", CONFIGS[0], 100), *(slow("bad", config) for config in CONFIGS),
    slow("equal", CONFIGS[0]), slow("good", CONFIGS[3]), slow("ngram", CONFIGS[0])])
def test_texts_are_as_likely_as_the_model_says(name, config, n_texts):
    model, ids, n = small(), [1, 2, 1, 2, 1], 3
    config = SampleConfig(**dict(temperature=1.0, max_new_tokens=n) | config)
    found = counted(model, drafts(model)[name], ids, n, config, n_texts)
    assert surprise(found, exact(model, ids, n, config)) < 5


@pytest.mark.parametrize("name", ["equal", "good", "bad", "ngram"])
def test_the_likeliest_text_is_that_of_plain_decoding(name):
    model = small()
    draft = drafts(model)[name]
    for first in range(V):
        ids, counts = [first, 2], Counter()
        config = SampleConfig(temperature=0, max_new_tokens=10)
        plain = [id.item() for id in generate(model, torch.tensor([ids]), config=config)]
        steps = speculate(model, draft, ids, config, n_draft=first + 1, counts=counts)
        assert [id for id, _ in steps] == plain
        assert counts["accepted"] + counts["passes"] == 10


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]])
def test_logits_are_those_of_the_whole_text(config):
    model, ids = small(), [1, 2, 3]
    config, text = SampleConfig(**config, max_new_tokens=10), [1, 2, 3]
    for id, logits in speculate(model, RunDraft(small(seed=3)), ids, config, n_draft=3):
        torch.testing.assert_close(logits, model(torch.tensor([text]))[0][:, -1], rtol=1e-4,
                                   atol=1e-5)
        text.append(id)
    assert len(text) == 13 and ids == [1, 2, 3]


# -----------------------------------------------------------------------------
# Drafts, and how often they are right.


def test_an_equal_draft_is_always_right_and_one_for_what_never_comes_never():
    model, config = small(), SampleConfig(temperature=1.0, max_new_tokens=10, seed=1)

    class Wrong(NgramDraft):
        def propose(self, ids, n, chances, generator):
            return [2] * n, [torch.eye(V)[2]] * n

    counts = Counter()
    assert len([*speculate(model, RunDraft(model), [1], config, n_draft=4, counts=counts)]) == 10
    assert counts == dict(passes=2, drafted=8, accepted=8)
    never, counts = SampleConfig(temperature=1.0, max_new_tokens=10, ban=[[2]]), Counter()
    text = [id for id, _ in speculate(model, Wrong(V), [1], never, n_draft=4, counts=counts)]
    assert 2 not in text and counts["passes"] == len(text) == 10 and counts["accepted"] == 0


@pytest.mark.parametrize("ids, expected", [
    ([1, 2, 3, 4, 1, 2], [3, 4, 1]), ([1, 2, 3, 9, 2, 4, 1, 2], [3, 9, 2]),
    ([1, 2, 3], []), ([7], []), ([5, 5, 5], [5]), ([8, 2, 1, 3, 2, 1, 4, 3, 2, 1], [4, 3, 2])])
def test_lookup_proposes_what_followed_the_longest_match_that_is_nearest(ids, expected):
    tokens, q = NgramDraft(10).propose(ids, 3, None, None)
    assert tokens == expected and [p.argmax().item() for p in q] == expected
    assert all(p.sum() == 1 == p.max() for p in q)


def test_a_text_ends_with_the_context_of_the_model_whatever_that_of_the_draft():
    model, config = sure(vocab_size=20), SampleConfig(temperature=0)
    plain = [id.item() for id in generate(model, torch.tensor([[3, 1]]), config=config)]
    for size in 6, 32:
        steps = speculate(model, RunDraft(sure(1, vocab_size=20, block_size=size)), [3, 1], config)
        assert [id for id, _ in steps] == plain and len(plain) == 14


# -----------------------------------------------------------------------------
# Text, and the command.


def test_a_text_is_what_sample_py_writes(tokenizer, prompt="sees the cat sees the "):
    model = sure(sharp=30.0, vocab_size=tokenizer.n_vocab, block_size=64)
    for config in (SampleConfig(temperature=0, max_new_tokens=30),
                   SampleConfig(temperature=0, stop=["e"], repetition_penalty=1.3)):
        for draft in NgramDraft(tokenizer.n_vocab), RunDraft(tiny(vocab_size=tokenizer.n_vocab)):
            pieces = [*write(model, tokenizer, prompt, draft, config)]
            assert "".join(p.text for p in pieces) == complete(model, tokenizer, prompt, config)
            assert all(piece.logprob <= 0 for piece in pieces)


@pytest.fixture
def folder(tmp_path, shards, tokenizer):
    """A folder with two runs of one tokenizer."""
    for name, seed in ("target", 0), ("draft", 1):
        model = sure(seed, 30.0, vocab_size=tokenizer.n_vocab, block_size=64)
        keep(model, tmp_path / "runs" / name)
        copy(shards / "tokenizer.json", tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.mark.parametrize("draft", ["ngram", "target"])
def test_the_command_prints_the_text_and_what_the_draft_was_worth(draft, folder, call, tokenizer):
    draft = draft if draft == "ngram" else folder / draft
    text, notes = call(speculative, folder / "target", f"--draft={draft}", "--prompt=the cat",
                       "--temperature=0", "--max_new_tokens=20", "--n_draft=3", "--device=cpu")
    model = sure(0, 30.0, vocab_size=tokenizer.n_vocab, block_size=64)
    assert text == "the cat" + complete(model, tokenizer, "the cat", temperature=0,
                                        max_new_tokens=20) + "\n"
    assert "20 tokens, " in notes and "x of plain decoding" in notes and notes.count("\n") == 1
    assert draft != folder / "target" or "100% of 15 guesses right, 4.00 tokens a pass" in notes


@pytest.mark.parametrize("words, said", [
    (["--draft=nowhere"], "there is no run folder nowhere"),
    (["--draft=DRAFT"], "has another tokenizer than the run"),
    (["--n_draft=0"], "n_draft=0 must be at least 1 and below 65"),
    (["--overflow=slide"], "overflow=slide forgets what a draft would be checked by"),
    (["--prompt=" + "#" * 99], "the prompt has 99 tokens, this model takes 1 to 63"),
    (["--prompt=a", "--file=b"], "--prompt would not act beside --file")])
def test_a_wrong_input_ends_in_one_line(folder, words, said, monkeypatch, capsys, tokenizer):
    other = type(tokenizer)(tokenizer.merges[:-1] + [(b"q", b"q")])
    other.save(folder / "draft" / "tokenizer.json")
    words = [word.replace("DRAFT", str(folder / "draft")) for word in words]
    code, (line,) = mistake(speculative.main, monkeypatch, capsys, folder / "target", *words)
    assert code in (1, 2) and said in line
