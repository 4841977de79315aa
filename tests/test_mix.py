"""chapters/mix.py: several folders of shards become one, each with its share."""

import numpy as np
import pytest
from conftest import mistake
from test_train import configure

from chapters import mix
from chapters.mix import mixed_sequences, read_shares, take_turns
from data import TokenLoader, check_shards, prepare, read_split, write_shards
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
    assert read_shares([f"{shards}=0.8", f"{other}=.2"]) == {shards: 80, other: 20}


def test_each_folder_gives_its_own_sequences_in_the_loaders_order(shards, other):
    mixed = [*mixed_sequences({shards: 75, other: 25}, 16)]
    turns = take_turns([75, 25]) * (len(mixed) // 100 + 1)
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
    assert said == (f"next: python train.py --data={out}\n", "")
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
    (["{a}=0.8", "{b}=0.1"], "shares of 80, 10 hundredths"),
    (["{a}=0.999", "{b}=0.001"], "each must be at least 1, all together 100"),
    (["{a}=0.5", "{c}=0.5"], "has not the tokenizer of"),
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
