"""Facts about chapters/chats.py: what is learned of a chat, and what shares a block."""

import json

import numpy as np
import pytest
import torch
from conftest import mistake, tiny

from chapters import chats
from chapters.chats import ChatLoader, fit, pack, read_chats, shown
from tokenizer import Tokenizer

TOKENIZER = Tokenizer([])
END = TOKENIZER.special["<|end|>"]


def chat(*texts):
    """Texts of user and assistant in turn, as messages."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


CHATS = [chat("hi", "yes"), chat("a", "b", "cc", "dd"), chat("2+2?", "4"), chat("why", "because"),
         chat("q" * 20, "a" * 5), chat("x", "", "y", "z" * 9)]


def batches(loader, n):
    return [next(loader) for _ in range(n)]


def test_the_examples_in_the_docstrings_are_true():
    assert pack([2, 3, 1], 4) == [[1, 2], [0]]


def test_what_the_assistant_says_and_its_end_are_learned_and_nothing_else():
    answers = {"".join(m["content"] + "<|end|>" for m in c if m["role"] == "assistant")
               for c in CHATS}
    for x, y, segments in batches(ChatLoader(CHATS, TOKENIZER, 1, 64), 9):
        for segment in range(1, segments.max() + 1):
            ids = y[(segments == segment) & (y >= 0)]
            assert TOKENIZER.decode(ids.tolist()) in answers


def test_y_is_x_one_token_on_or_not_learned_and_no_target_crosses_a_chat():
    for x, y, segments in batches(ChatLoader(CHATS, TOKENIZER, 2, 64), 9):
        known = y >= 0
        assert (y[:, :-1][known[:, :-1]] == x[:, 1:][known[:, :-1]])[
            segments[:, 1:][known[:, :-1]] == segments[:, :-1][known[:, :-1]]].all()
        last = np.append(segments[:, 1:] != segments[:, :-1], [[True]] * 2, axis=1)
        assert ((y == END) | ~known)[last].all()  # the last token of a chat predicts its end alone
        assert not known[segments == 0].any() and (x[segments == 0] == TOKENIZER.eot).all()
        assert (x != END)[known].all()  # after an end the user speaks: not learned


def test_each_chat_is_in_one_block_of_each_epoch():
    loader = ChatLoader(CHATS, TOKENIZER, 1, 48)
    for _ in range(3):
        rows = batches(loader, loader.n_blocks)
        starts = sum(int(((x == TOKENIZER.eot) & (s > 0)).sum()) for x, _, s in rows)
        learned = sum(int((y >= 0).sum()) for _, y, _ in rows)
        assert starts == len(CHATS)
        assert learned == sum(TOKENIZER.render_chat(c)[1].count(True) for c in CHATS)


def test_packed_chats_have_the_losses_that_they_have_alone():
    model = tiny(vocab_size=TOKENIZER.n_vocab, block_size=128).eval()
    loader = ChatLoader(CHATS, TOKENIZER, 1, 128)
    x, y, segments = map(torch.from_numpy, next(loader))
    assert segments.max() > 1
    _, together = model(x, y, segments=segments)
    total, n = 0.0, 0
    for i in loader.blocks[0]:
        ids, learned = loader.chats[i]
        targets = torch.from_numpy(np.where(learned[1:], ids[1:], -1))[None]
        _, loss = model(torch.from_numpy(ids[:-1])[None], targets)
        n_learned = (targets >= 0).sum().item()
        total, n = total + loss.item() * n_learned, n + n_learned
    assert together.item() == pytest.approx(total / n, rel=1e-5)


def test_a_long_chat_loses_whole_turns_from_its_end():
    messages = chat("a" * 5, "b" * 5, "c" * 5, "d" * 5)
    n_all, n_first = (len(TOKENIZER.render_chat(part)[0]) for part in (messages, messages[:2]))
    for block_size in range(n_first - 2, n_all + 2):
        fitted = fit(messages, TOKENIZER, block_size)
        if block_size + 1 < n_first:
            assert fitted is None
        else:
            kept = messages if block_size + 1 >= n_all else messages[:2]
            assert fitted[0].tolist() == TOKENIZER.render_chat(kept)[0]


def test_chats_that_do_not_fit_are_counted_and_none_is_refused():
    assert ChatLoader([*CHATS, chat("x" * 99, "y")], TOKENIZER, 1, 48).left_out == 1
    with pytest.raises(ValueError, match="none of 1 chats fits into 8 tokens"):
        ChatLoader([chat("x" * 99, "y")], TOKENIZER, 1, 8)
    with pytest.raises(ValueError, match="chat 2.*message 0"):
        ChatLoader([CHATS[0], [dict(role="nobody", content="x")]], TOKENIZER, 1, 48)


def test_no_block_is_overfull_and_no_chat_is_lost():
    lengths = np.random.RandomState(0).randint(1, 50, 200)
    blocks = pack(lengths, 64)
    assert sorted(i for block in blocks for i in block) == list(range(200))
    assert all(sum(lengths[block]) <= 64 for block in blocks)
    assert len(blocks) <= 1.25 * lengths.sum() / 64 + 1 and pack([], 64) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_reads_the_same_global_batches_and_resumes_anywhere(world_size):
    alone = batches(ChatLoader(CHATS, TOKENIZER, 4, 48, seed=3), 9)
    ranks = [ChatLoader(CHATS, TOKENIZER, 4 // world_size, 48, rank, world_size, 3, position=4)
             for rank in range(world_size)]
    for expected in alone[4:]:
        parts = zip(*map(next, ranks))
        assert all(np.array_equal(np.concatenate(part), whole)
                   for part, whole in zip(parts, expected))


def test_rows_of_messages_and_of_instructions_are_read_and_broken_ones_named(tmp_path):
    path, skipped = tmp_path / "chats.jsonl", []
    rows = [dict(messages=CHATS[0]), dict(instruction="Add.", input="1 1", output="2"),
            dict(instruction="Say a.", output="a"), dict(instruction="x"), ["y"],
            dict(instruction=None, output="a")]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [*read_chats(path, skipped.append)] == [
        CHATS[0], chat("Add.\n\n1 1", "2"), chat("Say a.", "a")]
    assert [line.split(":")[0].rpartition(" ")[2] for line in skipped] == ["4", "5", "6"]


def test_text_of_a_user_makes_no_special_token_and_what_is_learned_stands_out(tmp_path, call):
    row = chat("a <|end|><|assistant|> b", "c <|end|> d")
    ids, learned = TOKENIZER.render_chat(row)
    assert [ids.count(TOKENIZER.special[name]) for name in ("<|end|>", "<|assistant|>")] == [2, 1]
    assert shown(ids, learned, TOKENIZER, colour=False).endswith("[[c <|end|> d<|end|>]]")
    (tmp_path / "chats.jsonl").write_text(json.dumps(dict(messages=row)) + "\n[]")
    out, _ = call(chats, tmp_path / "chats.jsonl", "--block_size=99")
    assert "[[c <|end|> d<|end|>]]" in out and "1 broken rows" in out and "row 2" in out


def test_messages_of_a_wrong_role_are_skipped_with_their_row_and_others_read(tmp_path, call):
    rows = [CHATS[0], [dict(role="king", content="x")], CHATS[1], ["x"], []]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(dict(messages=messages)) for messages in rows))
    output = call(chats, path)[0]
    assert "2 chats of" in output and "3 broken rows" in output
    assert f"skipped: {path}, row 2: message 0 is {{'role': 'king'" in output


@pytest.mark.parametrize("content, words, message", [
    ("[]", [], "row 1: neither messages"), ('{"messages": []}', [], "row 1: a chat is a list"),
    ('{"messages": [{"role": "user"}]}', [], "row 1: message 0 is {"), ("", [], "no chat is in it"),
    (json.dumps(dict(messages=CHATS[0])), ["--block_size=0"], "none of 1 chats fits into 0")])
def test_a_wrong_file_ends_in_one_line(tmp_path, monkeypatch, capsys, content, words, message):
    (tmp_path / "chats.jsonl").write_text(content)
    code, lines = mistake(chats.main, monkeypatch, capsys, tmp_path / "chats.jsonl", *words)
    assert code == 1 and len(lines) == 1 and message in lines[0]
