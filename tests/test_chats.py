"""Facts about chats: what is learned of them, what shares a block, how rows become shards."""

import gzip
import json
from random import Random

import numpy as np
import pytest
import torch
from conftest import mistake, tiny

import data
from chapters import chats
from chapters.chats import shown
from chapters.mix import mix
from data import (ChatLoader, ClassLoader, TokenLoader, clean, learned, pack, prepare, read_card,
                  read_chats, read_split, write_shards)
from tokenizer import Tokenizer

TOKENIZER = Tokenizer([])
EOT, SYSTEM, USER, ASSISTANT, TOOL, END = TOKENIZER.special.values()
quiet = dict(say=lambda line: None)


def chat(*texts):
    """Texts of user and assistant in turn, as messages."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


CHATS = [chat("hi", "yes"), chat("a", "b", "cc", "dd"), chat("2+2?", "4"), chat("why", "because"),
         chat("q" * 20, "a" * 5), chat("x", "", "y", "z" * 9)]
LABELED = [dict(text=f"clause {i}, which {word}s", label=word)
           for i, word in enumerate(["end", "pay", "pay"] * 13)]


def random_chat(random):
    """A chat of any turns that render_chat takes, with words in it that look like special ones."""
    roles = ["system"] * random.randint(0, 1) + ["user"]
    roles += random.choices(["user", "assistant", "tool"], k=random.randint(0, 6)) + ["assistant"]
    words = ["a", "Bc", " ", "\n", "<|end|>", "<|assistant|>", "<|endoftext|>", "7", "é"]
    return [dict(role=role, content="".join(random.choices(words, k=random.randint(0, 6))))
            for role in roles]


MANY = [random_chat(Random(seed)) for seed in range(200)]


def shards_of(folder, documents, shard_tokens=10**8, tokenizer=TOKENIZER):
    """A folder of shards that holds chats, or lists of ids, in this order."""
    rows = [ids if isinstance(ids[0], int) else tokenizer.render_chat(ids)[0] for ids in documents]
    folder.mkdir(exist_ok=True)
    write_shards(map(np.array, rows), folder, "train", tokenizer.n_vocab, shard_tokens)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def batches(loader, n):
    return [next(loader) for _ in range(n)]


def documents_in(folder, split):
    """The documents of a split, as lists of ids, each without its <|endoftext|>."""
    ids = np.concatenate(read_split(folder, split))
    return [part[1:].tolist() for part in np.split(ids, np.flatnonzero(ids == EOT)) if len(part)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shards_of(tmp_path_factory.mktemp("chats") / "a", CHATS, shard_tokens=20)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    write_rows(path / "rows.jsonl", LABELED)
    return prepare(path / "rows.jsonl", path / "shards", tokenizer=TOKENIZER, **quiet)


# -----------------------------------------------------------------------------
# The loss mask.


def test_the_examples_in_the_docstrings_are_true():
    assert pack([2, 3, 1], 4) == [[1, 2], [0]]


def test_the_mask_that_ids_say_is_the_one_of_render_chat_for_chats_alone_and_in_a_row():
    rendered = [TOKENIZER.render_chat(messages) for messages in MANY]
    assert {message["role"] for messages in MANY for message in messages} > {"system", "tool"}
    for ids, mask in rendered:
        assert learned(np.array(ids), TOKENIZER.special).tolist() == mask
    ids, masks = (np.concatenate(parts) for parts in zip(*rendered))
    assert learned(ids, TOKENIZER.special).tolist() == masks.tolist()


def test_a_document_without_roles_is_learned_whole_behind_a_chat_and_without_tokens_for_chats():
    ids = [EOT, *b"one", EOT, *b"two <|end|>"]
    expected = [id != EOT for id in ids]
    assert learned(np.array(ids), TOKENIZER.special).tolist() == expected
    assert learned(np.array(ids), dict([("<|endoftext|>", EOT)])).tolist() == expected
    before, mask = TOKENIZER.render_chat(chat("a", "b"))
    assert learned(np.array(before + ids), TOKENIZER.special).tolist() == mask + expected


def content_of(x, roles):
    """Where in a row x is what these roles say, the token of the role included, not the <|end|>."""
    starts = np.isin(x, [EOT, SYSTEM, USER, ASSISTANT, TOOL])
    last = np.maximum.accumulate(np.where(starts, np.arange(len(x)), 0))
    return np.isin(x[last], roles) & (x != END) & (x != EOT)


def ends_document(segments):
    """Where in a row the last token of a document is."""
    return (segments > 0) & (segments != np.append(segments[1:], 0))


def starts_with_the_answer(x, y, segments):
    """An answer is learned from its first token on, and nothing behind an <|end|>."""
    return (y[x == ASSISTANT] != -1).all() and (y[x == END] == -1).all()


def keeps_the_prompt(x, y, segments):
    """What others than the assistant say is not learned."""
    return (y[content_of(x, [SYSTEM, USER, TOOL])] == -1).all()


def ends_each_answer(x, y, segments):
    """Where the next token is the <|end|> of an answer, something is learned."""
    is_last = np.append(x[1:] == END, True) | ends_document(segments)
    return (y[content_of(x, [ASSISTANT]) & is_last] != -1).all()


def stays_inside(x, y, segments):
    """A document has a segment of its own, and its last token predicts, if anything, an end."""
    is_new = np.diff(segments, prepend=0) > 0
    return (is_new == ((x == EOT) & (segments > 0))).all() and np.isin(
        y[ends_document(segments)], [-1, END]).all() and (y[segments == 0] == -1).all()


CHECKS = {"off by one": starts_with_the_answer, "prompt learned": keeps_the_prompt,
          "end unlearned": ends_each_answer, "border crossed": stays_inside}


def everything(ids, special):
    return ~np.isin(ids, [EOT, SYSTEM, USER, ASSISTANT, TOOL]) & (
        learned(ids, special) | (ids != END))


def crossing(self, number, block=ChatLoader.block):
    """A block in which the last token of a document predicts the first of the next."""
    x, y, segments = rows = block(self, number)
    seams = np.flatnonzero(x[1:] == EOT)[:1]
    y[seams], segments[seams + 1] = EOT, segments[seams]
    return rows


FAULTS = {"off by one": ("learned", lambda ids, special: np.roll(learned(ids, special), 1)),
          "prompt learned": ("learned", everything),
          "end unlearned": ("learned", lambda ids, special: learned(ids, special) & (ids != END)),
          "border crossed": ("ChatLoader.block", crossing)}


def failing(folder):
    """The names of CHECKS that fail for some row of all blocks of an epoch."""
    loader = ChatLoader(folder, 1, 48)
    rows = [[part[0] for part in batch] for batch in batches(loader, loader.n_blocks)]
    return {name for name, holds in CHECKS.items() if not all(holds(*row) for row in rows)}


@pytest.mark.parametrize("fault", CHECKS)
def test_no_mask_is(fault, folder):
    assert fault not in failing(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_by_the_check_of_its_name_and_by_no_other(fault, tmp_path, monkeypatch):
    others = [dict(role="system", content="s"), CHATS[0][0], dict(role="tool", content="t")]
    folder = shards_of(tmp_path / "a", [*CHATS[:5], [*others, CHATS[0][1]]])  # no empty answer
    place, function = FAULTS[fault]
    monkeypatch.setattr(f"data.{place}", function)
    assert failing(folder) == {fault}


def test_a_mask_that_comes_too_early_is_caught_as_well(folder, monkeypatch):
    monkeypatch.setattr(data, "learned", lambda ids, special: np.roll(learned(ids, special), -1))
    assert failing(folder) >= {"off by one"}


# -----------------------------------------------------------------------------
# Blocks of chats.


def test_y_is_what_the_assistant_says_and_x_one_token_on(folder):
    answers = {"".join(m["content"] + "<|end|>" for m in c if m["role"] == "assistant")
               for c in CHATS}
    for x, y, segments in batches(ChatLoader(folder, 1, 64), 9):
        assert x.shape == y.shape == segments.shape == (1, 64)
        assert x.dtype == y.dtype == segments.dtype == np.int64
        for segment in range(1, segments.max() + 1):
            own_x, own_y = x[segments == segment], y[segments == segment]
            assert TOKENIZER.decode(own_y[own_y >= 0].tolist()) in answers
            assert ((own_y[:-1] == own_x[1:]) | (own_y[:-1] < 0)).all()
        assert (x[segments == 0] == EOT).all()


def test_each_chat_is_in_one_block_of_each_epoch_whatever_its_shard(folder, monkeypatch):
    monkeypatch.setattr(data, "GROUP_BYTES", 7)  # marks are found across the parts as well
    loader = ChatLoader(folder, 1, 48)
    assert len(loader.shards) > 3 and loader.n_tokens == sum(map(len, read_split(folder)))
    for _ in range(3):
        rows = batches(loader, loader.n_blocks)
        read = [x[s == i].tolist() for x, _, s in rows for i in range(1, s.max() + 1)]
        assert sorted(read) == sorted(TOKENIZER.render_chat(c)[0][:-1] for c in CHATS)
        n_learned = sum(int((y >= 0).sum()) for _, y, _ in rows)
        assert n_learned == sum(TOKENIZER.render_chat(c)[1].count(True) for c in CHATS)


def test_packed_chats_have_the_losses_that_they_have_alone(folder):
    model = tiny(vocab_size=TOKENIZER.n_vocab, block_size=128)
    x, y, segments = map(torch.from_numpy, next(ChatLoader(folder, 1, 128)))
    assert segments.max() > 1
    _, together = model(x, y, segments=segments)
    total, n = 0.0, 0
    for segment in range(1, segments.max() + 1):
        own = segments == segment
        _, loss = model(x[own][None], y[own][None])
        n_learned = (y[own] >= 0).sum().item()
        total, n = total + loss.item() * n_learned, n + n_learned
    assert together.item() == pytest.approx(total / n, rel=1e-5)


def test_where_all_is_learned_the_loss_is_that_of_pretraining(tmp_path):
    text = [EOT, *b"a text without roles, as many tokens as a block and one more"]
    path, size = shards_of(tmp_path / "a", [text]), len(text) - 1
    x, y, segments = next(ChatLoader(path, 2, size))
    assert np.array_equal(next(TokenLoader(path, 2, size)), (x, y)) and (segments == 1).all()
    model = tiny(vocab_size=TOKENIZER.n_vocab, block_size=64)
    x, y, segments = map(torch.from_numpy, (x, y, segments))
    masked, plain = model(x, y, segments=segments)[1].item(), model(x, y)[1].item()
    assert masked == pytest.approx(plain, rel=1e-6)


def test_a_long_chat_loses_whole_turns_from_its_end(tmp_path):
    messages = [dict(role="system", content="s"), *chat("a" * 5, "b" * 5, "c" * 5),
                dict(role="tool", content="t" * 3), dict(role="assistant", content="d" * 5)]
    path = shards_of(tmp_path / "a", [chat("", ""), messages, chat("", "")])
    n_all, n_first = (len(TOKENIZER.render_chat(part)[0]) for part in (messages, messages[:3]))
    for block_size in range(n_first - 3, n_all + 2):
        loader = ChatLoader(path, 1, block_size)
        read = [row for x, _, s in batches(loader, loader.n_blocks)
                for row in (x[s == i].tolist() for i in range(1, s.max() + 1)) if SYSTEM in row]
        kept = messages if block_size + 1 >= n_all else messages[:3]
        expected = [TOKENIZER.render_chat(kept)[0][:-1]] * (block_size + 1 >= n_first)
        assert read == expected and loader.left_out == 1 - len(expected)


def test_a_chat_whose_first_turn_is_too_long_is_counted_and_where_all_are_refused(tmp_path):
    long = chat("x" * 99, "y", "short", "too")
    assert ChatLoader(shards_of(tmp_path / "a", [*CHATS, long]), 1, 48).left_out == 1
    with pytest.raises(ValueError, match="none of 1 chats in train fits into a block of 8 tokens"):
        ChatLoader(shards_of(tmp_path / "b", [long]), 1, 8)


def test_no_block_is_overfull_and_no_chat_is_lost():
    lengths = np.random.RandomState(0).randint(1, 50, 300)
    blocks = pack(lengths, 64)
    assert sorted(i for block in blocks for i in block) == list(range(300))
    assert all(sum(lengths[block]) <= 64 for block in blocks)
    assert len(blocks) <= 1.05 * lengths.sum() / 64 + 1 and pack([], 64) == []


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("loader", [ChatLoader, ClassLoader])
def test_any_number_of_ranks_reads_the_same_global_batches_and_resumes_anywhere(
        loader, world_size, folder, labeled):
    path = folder if loader is ChatLoader else labeled
    alone = batches(loader(path, 4, 48, seed=3), 20)
    ranks = [loader(path, 4 // world_size, 48, rank, world_size, 3, position=4)
             for rank in range(world_size)]
    for expected in alone[4:]:
        width = expected[0].shape[1]
        for parts, whole in zip(zip(*map(next, ranks)), expected):
            pads = [((0, 0), (0, width - part.shape[1])) if part.ndim > 1 else 0 for part in parts]
            filling = EOT if whole is expected[0] else 0
            parts = [np.pad(part, pad, constant_values=filling) for part, pad in zip(parts, pads)]
            assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_differ_and_without_shuffle_blocks_keep_their_order(tmp_path):
    path = shards_of(tmp_path / "a", MANY)
    first, other = (np.stack([x for x, _, _ in batches(loader, 2 * loader.n_blocks)])
                    for loader in (ChatLoader(path, 1, 64), ChatLoader(path, 1, 64, seed=1)))
    n = len(first) // 2
    assert (first[:n] != first[n:]).any() and (first != other).any()
    plain = np.stack([x for x, _, _ in batches(ChatLoader(path, 1, 64, shuffle=False), 2 * n)])
    assert (plain[:n] == plain[n:]).all() and (plain[:n] != first[:n]).any()


# -----------------------------------------------------------------------------
# Texts and their labels.


def test_a_row_with_a_label_is_a_prompt_and_the_number_of_its_label(labeled):
    loader, classes = ClassLoader(labeled, 3, 64), {row["text"]: row["label"] for row in LABELED}
    assert loader.labels == read_card(labeled).labels == ["end", "pay"]
    assert loader.n_blocks == read_card(labeled).train["documents"]
    for x, y, segments in batches(loader, loader.n_blocks):
        assert x.shape == segments.shape and y.shape == (3,) and segments.all(axis=1).any()
        assert x.dtype == y.dtype == segments.dtype == np.int64
        for ids, answer, used in zip(x, y, segments):
            n = used.sum()
            text = next(text for text in classes if text in TOKENIZER.decode(ids.tolist()))
            prompt = TOKENIZER.render_prompt([dict(role="user", content=text)])
            assert ids[:n].tolist() == prompt and (ids[n:] == EOT).all()
            assert used.tolist() == [1] * n + [0] * (len(ids) - n)
            assert loader.labels[answer] == classes[text]


def test_every_text_is_read_once_an_epoch_and_a_long_one_keeps_its_beginning(labeled):
    loader = ClassLoader(labeled, 1, 9)
    rows = batches(loader, loader.n_blocks)
    assert sorted(x[0].tolist() for x, _, _ in rows) == sorted(
        [EOT, *ids][:9] for ids in documents_in(labeled, "train"))


def test_a_model_with_a_head_for_classes_takes_these_batches(labeled):
    loader = ClassLoader(labeled, 4, 64)
    model = tiny(vocab_size=TOKENIZER.n_vocab, block_size=64, n_classes=2)
    x, y, segments = map(torch.from_numpy, next(loader))
    loss = model(x, y, segments=segments)[1].item()
    alone = [model(x[i:i + 1, :n], y[i:i + 1])[1].item() for i, n in enumerate(segments.sum(1))]
    assert loss == pytest.approx(np.mean(alone), rel=1e-5)


def test_a_label_that_the_card_lacks_and_a_card_without_labels_are_one_line(labeled, shards):
    path = labeled / "card.json"
    card = path.read_text()
    path.write_text(json.dumps(json.loads(card) | dict(labels=["end", "stay"])))
    with pytest.raises(ValueError, match="label 'pay' is not in its card, which has end, stay"):
        ClassLoader(labeled, 1, 64)
    path.write_text(card)
    with pytest.raises(ValueError, match="has no labels: make shards of rows with a text and a la"):
        ClassLoader(shards, 1, 64)


def test_a_whole_number_is_a_label_too(tmp_path):
    rows = [row | dict(label=row["label"] == "end") for row in LABELED[:20]]
    rows += [row | dict(label=7) for row in LABELED[20:]]
    out = prepare(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", 300, **quiet)
    assert read_card(out).labels == ["7", "False", "True"]


# -----------------------------------------------------------------------------
# From rows to shards.


ROWS = [dict(messages=CHATS[0]), dict(instruction="Add.", input="1 1", output="2"),
        dict(instruction="Say a.", output="a"), dict(instruction="b", input=None, output="c"),
        dict(text="fine\r\n", label="good "), dict(messages=CHATS[1], id=7)]
BROKEN = [dict(instruction="x"), dict(output="x"), ["y"], dict(instruction=None, output="a"), {}, 3,
          dict(messages=[]), dict(text="a", label=0.5),
          dict(messages=[dict(role="king", content="x")]),
          dict(messages=CHATS[1][:3]), dict(messages="hello"), dict(messages=["x"]),
          dict(messages=[dict(role="user", content=None), CHATS[0][1]])]
CLEANED = [CHATS[0], chat("Add.\n\n1 1", "2"), chat("Say a.", "a"), chat("b", "c"),
           chat("fine", "good"), CHATS[1]]


@pytest.mark.parametrize("name, pack, form", [
    ("a.jsonl", bytes, "\n".join), ("a.json", bytes, lambda rows: f"[{','.join(rows)}]"),
    ("a.jsonl.gz", gzip.compress, "\n".join)])
def test_rows_of_all_kinds_become_the_documents_that_render_chat_makes(tmp_path, name, pack, form):
    again = dict(messages=[message | dict(name="Ann") for message in CHATS[0]])
    rows = [*ROWS[:2], *BROKEN, *ROWS[2:], again, dict(instruction="", output="")]
    (tmp_path / name).write_bytes(pack(form([*map(json.dumps, rows)]).encode()))
    out = prepare(tmp_path / name, tmp_path / "out", tokenizer=TOKENIZER, **quiet)
    documents = documents_in(out, "train") + documents_in(out, "val")
    assert sorted(documents) == sorted(TOKENIZER.render_chat(c)[0][1:] for c in CLEANED)
    card = read_card(out)
    assert card.options["chats"] is True and card.labels == []
    assert card.counts["skipped documents"] == len(BROKEN)
    assert card.counts["exact duplicates"] == card.counts["empty documents"] == 1
    [source] = card.sources
    places = [int(line.partition(", row ")[2].split(":")[0]) for line in source["skipped"]]
    assert places == [*range(3, 3 + len(BROKEN))]
    text = sum(len(m["content"].encode()) for c in CLEANED for m in c)
    assert card.train["bytes"] + card.val["bytes"] == text
    assert card.train["documents"] + card.val["documents"] == len(CLEANED)


def test_read_chats_gives_the_messages_as_they_are_and_names_broken_rows(tmp_path):
    path, skipped = write_rows(tmp_path / "a.jsonl", [*ROWS, *BROKEN]), []
    read = [*read_chats(path, skipped.append)]
    assert read == [[m | dict(content=m["content"]) for m in c] if i != 4 else
                    chat("fine\r\n", "good ") for i, c in enumerate(CLEANED)]
    assert len(skipped) == len(BROKEN) and all(f"{path}, row " in line for line in skipped)
    with pytest.raises(ValueError, match="a.jsonl, row 7: neither messages"):
        [*read_chats(path)]


def test_text_of_a_user_makes_no_special_token(tmp_path):
    rows = [dict(messages=chat(f"{i} <|end|><|assistant|> b", "c <|end|> d<|endoftext|>"))
            for i in range(30)]
    out = prepare(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", 300, **quiet)
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    ids = np.concatenate([*read_split(out), *read_split(out, "val")])
    n = [int((ids == id).sum()) for id in tokenizer.special.values()]
    assert n == [30, 0, 30, 30, 0, 60]
    assert ChatLoader(out, 1, 256).left_out == 0


def test_a_tokenizer_learns_from_what_is_said_and_not_from_json(tmp_path):
    rows = [dict(messages=c) for c in MANY]
    out = prepare(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", 300, **quiet)
    own = Tokenizer.load(out / "tokenizer.json")
    said = {clean(message["content"]) for messages in MANY for message in messages}
    tokens = [own.token(id).decode("utf-8", "replace") for id in range(256, own.n_vocab - 6)]
    assert len(tokens) > 20 and all(any(token in text for text in said) for token in tokens)


def test_no_chat_is_cut_and_one_alone_is_one_line(tmp_path):
    for n, ratio in (2, None), (2, 0.9), (19, None), (25, 0.001), (100, None):
        path = write_rows(tmp_path / "a.jsonl", [dict(messages=c) for c in MANY[:n]])
        out = prepare(path, tmp_path / f"{n} {ratio}", tokenizer=TOKENIZER, val_ratio=ratio,
                      **quiet)
        parts = [documents_in(out, split) for split in ("train", "val")]
        assert all(parts) and all(ids[-1] == END for part in parts for ids in part)
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=CHATS[0])])
    with pytest.raises(ValueError, match="a single chat cannot both train and validate"):
        prepare(path, tmp_path / "out", 300, **quiet)
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_chat_names_the_first_reason(tmp_path):
    for row, reason in ((dict(messages=CHATS[1][:3]), "row 1: the last message, 2, is of role us"),
                        (dict(messages=[]), "row 1: a chat is a list of messages"),
                        (dict(instruction="a", output=7.5), "row 1: message 1 is .*7.5")):
        path = write_rows(tmp_path / "a.jsonl", [row, BROKEN[0]])
        with pytest.raises(ValueError, match=f"no text in .*a.jsonl: .*{reason}"):
            prepare(path, tmp_path / "out", 300, **quiet)


def test_chats_and_texts_do_not_mix_and_with_a_field_all_are_texts(tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_rows(mixed / "a.jsonl", LABELED)
    (mixed / "b.txt").write_text("A text.")
    (mixed / "none.jsonl").write_text("")
    (mixed / "image.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.jsonl holds chats and .*b.txt does not: prepare them"):
        prepare(mixed, tmp_path / "out", 300, **quiet)
    card = read_card(prepare(mixed, tmp_path / "out", 300, field="text", **quiet))
    assert "chats" not in card.options and card.labels == [] and card.counts["documents"] == 40
    (mixed / "b.txt").unlink()
    assert read_card(prepare(mixed, tmp_path / "out2", 300, **quiet)).options["chats"] is True


def test_a_tokenizer_without_the_tokens_of_chats_is_extended_and_keeps_its_ids(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=c) for c in CHATS])
    short = Tokenizer.train("why because yes " * 9, 262, {"<|endoftext|>": 262})
    out = prepare(path, tmp_path / "out", tokenizer=short, **quiet)
    own = Tokenizer.load(out / "tokenizer.json")
    assert own.merges == short.merges and [*own.special] == [*TOKENIZER.special]
    assert [*own.special.values()] == [*range(262, 268)] and data.for_chats(own) is own
    assert ChatLoader(out, 1, 64).left_out == 0


def test_shards_of_chats_are_used_again_and_those_of_texts_say_nothing_of_chats(tmp_path, shards):
    path, lines = write_rows(tmp_path / "a.jsonl", [dict(messages=c) for c in CHATS]), []
    for _ in range(2):
        out = prepare(path, tmp_path / "out", 300, say=lines.append)
    assert lines[-1] == f"{out}: used again, the content and the options are the same"
    assert "chats" not in read_card(shards).options


def test_a_mixture_of_chats_is_refused_as_it_would_lose_their_masks(labeled, tmp_path):
    with pytest.raises(ValueError, match="shards holds chats, which a mixture would cut"):
        mix({labeled: 1.0}, tmp_path / "mixed", 16)
    assert not (tmp_path / "mixed").exists()


# -----------------------------------------------------------------------------
# The command.


def test_what_is_learned_stands_out(tmp_path, call):
    row = chat("a <|end|><|assistant|> b", "c <|end|> d")
    ids, mask = TOKENIZER.render_chat(row)
    assert shown(ids, mask, TOKENIZER, colour=False).endswith("[[c <|end|> d<|end|>]]")
    assert shown(ids, mask, TOKENIZER).endswith(f"{chats.LEARNED}c <|end|> d<|end|>{chats.PLAIN}")
    (tmp_path / "chats.jsonl").write_text(json.dumps(dict(messages=row)) + "\n[]")
    out, _ = call(chats, tmp_path / "chats.jsonl", "--block_size=9")
    assert "[[c <|end|> d<|end|>]]" in out and "1 broken rows" in out and "row 2" in out
    assert "1 longer than 9" in out


def test_messages_of_a_wrong_role_are_skipped_with_their_row_and_others_read(tmp_path, call):
    rows = [CHATS[0], [dict(role="king", content="x")], CHATS[1], ["x"], []]
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=messages) for messages in rows])
    output = call(chats, path)[0]
    assert "2 chats of" in output and "3 broken rows" in output
    assert f"skipped: {path}, row 2: message 0 is {{'role': 'king'" in output


@pytest.mark.parametrize("content, words, message", [
    ("[]", [], "row 1: neither messages"), ('{"messages": []}', [], "row 1: a chat is a list"),
    ('{"messages": [{"role": "user"}]}', [], "row 1: message 0 is {"), ("", [], "no chat is in it"),
    (json.dumps(dict(messages=CHATS[0])), ["--tokenizer=none"], "No such file")])
def test_a_wrong_file_ends_in_one_line(tmp_path, monkeypatch, capsys, content, words, message):
    (tmp_path / "chats.jsonl").write_text(content)
    code, lines = mistake(chats.main, monkeypatch, capsys, tmp_path / "chats.jsonl", *words)
    assert code == 1 and len(lines) == 1 and message in lines[0]
