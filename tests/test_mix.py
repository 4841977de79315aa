"""chapters/mix.py, with curriculum.py and balance.py: which text, how often, in which order."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from conftest import keep, mistake
from test_train import configure

from chapters import balance, mix
from chapters.balance import balanced
from chapters.curriculum import documents_of, from_easy_to_hard, mean_losses, pack
from chapters.mix import mixed_sequences, read_shares, take_turns, tempered_shares
from data import TokenLoader, check_shards, prepare, read_card, read_split, write_shards
from evaluate import loglikelihood
from train import train

QUIET = dict(say=lambda text: None)


@pytest.fixture(scope="module")
def other(shards, tmp_path_factory):
    """Shards of another text, of the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "b.txt").write_text("birds and trees\n" * 200, "utf-8")
    return prepare([folder / "b.txt"], folder / "b", tokenizer=shards / "tokenizer.json", **QUIET)


@pytest.mark.parametrize("parts", [[75, 25], [50, 30, 20], [99, 1]])
def test_of_any_hundred_in_a_row_each_has_its_share_evenly_spread(parts):
    turns = take_turns(parts) * 2
    for i, n in enumerate(parts):
        assert {turns[first:first + 100].count(i) for first in range(100)} == {n}
        gaps = np.diff([at for at, turn in enumerate(turns) if turn == i])
        assert gaps.max() <= 100 / n + len(parts) and gaps.min() >= 100 / n - len(parts)


def test_the_examples_in_the_docstrings_are_true(shards, other):
    assert take_turns([50, 25, 25])[:4] == [0, 1, 2, 0]
    assert read_shares([f"{shards}=0.8", f"{other}=.2"]) == {shards: 0.8, other: 0.2}
    assert balanced(["a", "b", "b"]) in ([0, 1], [0, 2])


def test_each_folder_gives_its_own_sequences_in_the_loaders_order(shards, other):
    mixed, n = [*mixed_sequences({shards: 75, other: 25}, 16)], TokenLoader(shards, 1, 16).n_blocks
    turns = take_turns([n, round(n / 3)])
    assert len(mixed) == len(turns)
    for i, loader in enumerate(TokenLoader(path, 1, 16) for path in (shards, other)):
        own = [ids for ids, turn in zip(mixed, turns) if turn == i]
        assert len(own) == loader.n_blocks if i == 0 else len(own) > loader.n_blocks
        assert all((ids[:16] == next(loader)[0][0]).all() for ids in own)


@pytest.mark.parametrize("n_tokens", [17, 18, 31, 100, 333])
def test_the_first_folder_is_read_to_its_last_token(tmp_path, n_tokens):
    for name, first in ("a", 0), ("b", 1000):
        write_shards([first + np.arange(n_tokens)], tmp_path / name, "train", 2000)
    mixed = np.concatenate([*mixed_sequences({tmp_path / "a": 50, tmp_path / "b": 50}, 16)])
    assert {*mixed.tolist()} >= {*range(n_tokens)}


def test_the_mixture_is_a_folder_of_shards_to_train_on(shards, other, tmp_path, call):
    out = tmp_path / "mixed"
    said = call(mix, f"{shards}=0.8", f"{other}=0.2", f"--out={out}", "--block_size=32")
    assert said[0].splitlines()[-1] == f"next: python train.py --data={out}" and not said[1]
    card, first = check_shards(out, ("train", "val", "token")), check_shards(shards)
    assert [source["name"] for source in card.sources] == [
        str(shards.parent / "words.txt"), str(other.parent / "b.txt")]
    assert card.val == first.val and card.tokenizer == first.tokenizer
    assert (np.concatenate(read_split(out, "val")) ==
            np.concatenate(read_split(shards, "val"))).all()
    assert card.train["tokens"] == pytest.approx(first.train["tokens"] / 0.8, rel=0.05)
    assert train(*configure(out, tmp_path / "run", max_steps=2), **QUIET)["step"] == 2


@pytest.mark.parametrize("words, problem", [
    (["none=0.5", "{a}=0.5"], "none=0.5 is not a folder of shards and its share"),
    (["=0.5", "{b}=0.5"], "=0.5 is not a folder of shards and its share"),
    (["{a}"], "is not a folder of shards and its share, shards/a=0.2"),
    (["{a}=2", "{b}=0.5"], "is not a folder of shards and its share"),
    (["{a}=0.8", "{b}=0.1"], "shares of 0.8, 0.1: each must be above 0, their sum 1"),
    (["{a}=0.5", "{a}=0.5"], "each folder given once"),
    (["{a}=1.0", "{b}=0.0"], "is not a folder of shards and its share"),
    (["{a}=0.9999999", "{b}=0.0000001"], "its share is less than one sequence"),
    (["{a}", "{b}", "--temperature=0.5"], "temperature=0.5 must be at least 1"),
    (["{a}", "{b}", "--temperature=nan"], "temperature=nan must be at least 1"),
    (["{a}", "{a}", "--temperature=2"], "a folder is given twice"),
    (["{a}=0.5", "{b}=0.5", "--temperature=2"], "shares are given, or come from --temperature"),
    (["{a}=0.5", "{b}=0.5", "--order=loss"], "--order=loss needs --run=RUN"),
    (["{a}=0.5", "{b}=0.5", "--run=runs/a"], "--run would not act without --order=loss"),
    (["{a}=0.5", "{b}=0.5", "--order=loss", "--run=none"], "none"),
    (["{a}=0.5", "{c}=0.5"], "has another tokenizer than"),
    (["{a}=0.5", "{b}=0.5", "--block_size=0"], "block_size=0 must be at least 1"),
    (["{a}=0.5", "{b}=0.5", "--block_size=5000"], "a block needs 5,001"),
    (["{a}=0.5", "{b}=0.5", "--out={a}"], "holds other shards or files: choose"),
    (["{a}=0.5", "{b}=0.5", "--out={a}.txt"], "holds other shards or files: choose"),
    (["{a}=0.5", "{b}=0.5", "--block_size=9999999999"], "block_size=9999999999 must be at least 1"),
    (["{a}=0.5", "{b}=0.5", "--seed=-1"], "seed=-1 must be at least 0 and below 2**31")])
def test_what_cannot_be_mixed_is_refused_in_one_line(shards, other, tmp_path, monkeypatch, capsys,
                                                     words, problem):
    (tmp_path / "c.txt").write_text("some more words\n" * 200, "utf-8")
    third = prepare([tmp_path / "c.txt"], tmp_path / "c", vocab_size=300, **QUIET)
    words = [word.format(a=shards, b=other, c=third) for word in words]
    out = tmp_path / "mixed"
    code, (line,) = mistake(mix.main, monkeypatch, capsys, f"--out={out}", *words)
    assert code == 1 and problem in line and not out.exists()


def test_a_mixture_that_fails_leaves_no_folder(shards, other, tmp_path, monkeypatch):
    monkeypatch.setattr(mix, "count_tokens", lambda *words: 1 / 0)
    (tmp_path / "empty").mkdir()
    for name in "new", "empty":
        with pytest.raises(ZeroDivisionError):
            mix.mix({shards: 50, other: 50}, tmp_path / name, 32)
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


# -----------------------------------------------------------------------------
# Shares and epochs.


def epochs_of(folder):
    return read_card(folder).options["epochs"]


@pytest.mark.parametrize("order", ["random", "length"])
@pytest.mark.parametrize("share", [0.5, 0.125, 0.9, 0.333])
def test_each_has_its_share_to_within_a_sequence_everywhere(shards, other, tokenizer, share,
                                                            order):
    parts = {shards: share, other: 1 - share}
    difficulty = None if order == "random" else lambda documents: [*map(len, documents)]
    taken, n = Counter(), 0
    for n, _ in enumerate(mixed_sequences(parts, 32, 0, difficulty, tokenizer.eot, taken), 1):
        assert abs(taken[shards] / 32 - share * n) <= 1.1  # a last block has a token more
    assert n > 400


def test_temperature_goes_from_shares_by_size_to_equal_ones(shards, other):
    sizes = np.array([read_card(folder).train["tokens"] for folder in (shards, other)])
    by_size, warm, equal = ([*tempered_shares([shards, other], temperature).values()]
                            for temperature in (1, 3.3, math.inf))
    assert by_size == pytest.approx(sizes / sizes.sum()) and equal == [0.5, 0.5]
    assert warm == pytest.approx(sizes ** (1 / 3.3) / (sizes ** (1 / 3.3)).sum())
    assert by_size[0] > warm[0] > 0.5
    assert [*tempered_shares([other, shards], 1e9).values()] == pytest.approx([0.5, 0.5])


def test_by_size_each_is_read_once(shards, other, tmp_path, call):
    call(mix, shards, other, "--temperature=1", f"--out={tmp_path / 'a'}", "--block_size=16")
    for row in epochs_of(tmp_path / "a").values():
        assert row["epochs"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("order", ["random", "length"])
def test_epochs_are_what_was_taken_and_add_up_to_the_mixture(shards, other, tmp_path, call, order):
    said, _ = call(mix, f"{shards}=0.4", f"{other}=0.6", f"--out={tmp_path / 'a'}",
                   "--block_size=32", f"--order={order}")
    card, rows = read_card(tmp_path / "a"), epochs_of(tmp_path / "a")
    assert sum(row["tokens"] for row in rows.values()) == card.train["tokens"]
    for folder in shards, other:
        row = rows[str(folder)]
        assert row["of"] == read_card(folder).train["tokens"]
        assert row["epochs"] == row["tokens"] / row["of"]
        assert f"{folder}: {row['tokens'] / card.train['tokens']:.1%} of the text" in said
        assert ("repeated" in said.split(f"{folder}:")[1].split("\n")[0]) == (row["epochs"] > 4.1)
    assert rows[str(shards)]["epochs"] == pytest.approx(1, abs=0.01)
    assert rows[str(other)]["epochs"] > 4.1
    assert said.splitlines()[-1].endswith("--no-shuffle") == (order == "length")


def test_the_same_seed_gives_the_same_mixture(shards, other, tmp_path):
    def tokens(name, **options):
        out = mix.mix({shards: 0.5, other: 0.5}, tmp_path / name, 32, **options, **QUIET)
        return np.concatenate(read_split(out)).tolist()
    for order in "random", "length":
        assert tokens(f"a{order}", order=order) == tokens(f"b{order}", order=order)
    assert tokens("c") != tokens("d", seed=1)


# -----------------------------------------------------------------------------
# Curriculum.


def some_documents(n, seed=0):
    random = np.random.RandomState(seed)
    return [np.array([0, *random.randint(1, 50, size)]) for size in random.randint(1, 30, n)]


@pytest.mark.parametrize("epochs", [0.3, 1, 2.5])
def test_each_epoch_goes_from_easy_to_hard_and_the_last_is_a_choice(epochs):
    documents = some_documents(200)
    total = sum(map(len, documents))
    given = [*from_easy_to_hard(documents, [*map(len, documents)], epochs * total, seed=0)]
    n_taken = sum(map(len, given))
    assert epochs * total <= n_taken < epochs * total + 31
    whole = int(epochs)
    for start in range(0, 200 * whole, 200):
        lengths = [*map(len, given[start:start + 200])]
        assert lengths == sorted(map(len, documents))
    rest = [*map(len, given[200 * whole:])]
    assert rest == sorted(rest) and len({id(ids) for ids in given[200 * whole:]}) == len(rest)
    assert not rest or max(rest) > 25  # not the easy ones alone


@pytest.mark.parametrize("size", [1, 7, 500])
def test_packing_loses_less_than_a_sequence(size):
    documents = some_documents(40)
    sequences, tokens = [*pack(documents, size)], np.concatenate(documents)
    assert {len(ids) for ids in sequences} <= {size}
    joined = np.concatenate([np.empty(0, int), *sequences])
    assert (joined == tokens[:len(joined)]).all() and len(tokens) - len(joined) < size


@pytest.fixture(scope="module")
def stories(tmp_path_factory, tokenizer):
    """Shards of many documents of different length."""
    folder = tmp_path_factory.mktemp("stories")
    lines = [json.dumps("the cat sees a dog. " * (1 + 7 * i % 23) + str(i)) for i in range(200)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return prepare([folder / "a.jsonl"], folder / "a", tokenizer=tokenizer, **QUIET)


def test_a_mixture_in_order_of_length_begins_with_the_shortest(stories, tokenizer, tmp_path):
    out = mix.mix({stories: 1}, tmp_path / "a", 16, order="length", **QUIET)
    documents, found = (documents_of(folder, tokenizer.eot) for folder in (stories, out))
    assert [len(ids) for ids in found[:len(documents)]] == sorted(map(len, documents))


def test_the_loss_of_a_document_is_that_of_evaluate(stories, tokenizer, model):
    documents = [ids for ids in documents_of(stories, tokenizer.eot) if len(ids) <= 64][:20]
    texts = [tokenizer.decode(ids[1:].tolist()) for ids in documents]
    expected = [-logprob / (len(ids) - 1) for ids, (logprob, _) in
                zip(documents, loglikelihood(model, tokenizer, [("", text) for text in texts]))]
    assert mean_losses(model, documents) == pytest.approx(expected, rel=1e-4)
    long = np.concatenate([documents[0], *[ids[1:] for ids in documents]])
    assert mean_losses(model, [long, long[:65], long[:1]])[1:] == [mean_losses(model, [long])[0], 0]


def test_a_mixture_in_order_of_loss_begins_with_what_the_model_knows(stories, tokenizer, model,
                                                                     tmp_path, call):
    keep(model, tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    call(mix, stories, "--temperature=1", f"--out={tmp_path / 'a'}", "--order=loss",
         f"--run={tmp_path / 'run'}", "--block_size=16")
    documents, found = (documents_of(folder, tokenizer.eot) for folder in (stories, tmp_path / "a"))
    losses = mean_losses(model, found[:len(documents)])
    assert losses == pytest.approx(sorted(losses), abs=1e-4) and losses[0] < losses[-1]


def test_a_loader_without_shuffle_reads_the_order_that_was_written(shards):
    loader, tokens = TokenLoader(shards, 2, 16, shuffle=False), np.concatenate(read_split(shards))
    read = np.concatenate([next(loader)[0].flatten() for _ in range(loader.n_blocks // 2)])
    steps = [int(np.flatnonzero((windows == block).all(1))[0]) for block in read.reshape(-1, 16)
             for windows in [np.lib.stride_tricks.sliding_window_view(tokens, 16)]]
    assert steps[2:] == sorted(steps[2:])


# -----------------------------------------------------------------------------
# Balance.


def test_each_label_has_as_many_rows_in_their_order():
    labels = [*"aaaaabbbcc"] * 7
    positions = balanced(labels)
    assert Counter(labels[i] for i in positions) == dict(a=14, b=14, c=14)
    assert positions == sorted({*positions}) == balanced(labels) != balanced(labels, seed=1)
    assert balanced([]) == [] and balanced(range(100_000)) == [*range(100_000)]


def test_a_balanced_file_keeps_whole_rows_and_what_is_known_of_them(tmp_path, call):
    (tmp_path / "in").mkdir()
    rows = [dict(text=f"row {i}", kind=["news", None][i % 3 == 0], n=i) for i in range(30)]
    path, out = tmp_path / "in" / "documents.jsonl", tmp_path / "out"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "in" / "card.json").write_text('{"license": "CC0-1.0", "synthetic": true}')
    said, _ = call(balance, path, "--field=kind", f"--out={out}")
    assert said == ("20 documents, 10 of each of 2 values; left out: 10\n"
                    f"next: python data.py {out} --field=text\n")
    left = [*map(json.loads, (out / "documents.jsonl").read_text().splitlines())]
    assert all(row in rows for row in left) and Counter(row["kind"] for row in left) == {
        "news": 10, None: 10}
    card = json.loads((out / "card.json").read_text())
    assert card["license"] == "CC0-1.0" and card["synthetic"] is True
    assert card["options"]["values"] == {"news": 20, "null": 10}
    assert card["stages"][0]["dropped"] == 10


@pytest.mark.parametrize("words, problem", [
    (["{a}", "--field=x"], "a.jsonl, row 2: no field 'x'"),
    (["{a}", "--field=text"], "give rows with two values or more"),
    (["{b}", "--field=x"], "b.jsonl: no such file"),
    (["{a}", "--field=y", "--out={here}"], "holds other shards or files"),
    (["{a}", "--field=y", "--seed=-1"], "seed=-1 must be at least 0")])
def test_what_cannot_be_balanced_is_refused_in_one_line(tmp_path, monkeypatch, capsys, words,
                                                        problem):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"x": 1, "y": 1, "text": "a"}\n{"y": 2, "text": "a"}\n')
    words = [word.format(a=path, b=tmp_path / "b.jsonl", here=tmp_path) for word in words]
    code, (line,) = mistake(balance.main, monkeypatch, capsys, f"--out={out}", *words)
    assert code == 1 and problem in line and not out.exists()
