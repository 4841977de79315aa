"""Facts about tokenizer.py that hold for every text and every vocabulary."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import regex
import tiktoken
from tiktoken_ext import openai_public

import tokenizer as module
from conftest import ROOT, run
from tokenizer import (ASCII_SPLITS, BYTE_TO_CHAR, CL100K_SPLIT, GPT2_BYTES, GPT2_SPLIT, GPT4_SPLIT,
                       O200K_SPLIT, PLAIN, SPECIAL_TOKENS, SPLITS, Tokenizer, check_fields,
                       compile_split, count_chunks, merge, on_all_cores, parse_options, read_files,
                       reading, split_chunks, to_bytes, to_chars, train_fast, train_plain)

NASTY = {
    "empty": "",
    "newlines": "a\r\nb\n\n\r\r\n  c\t\n \x0b\x0c\x85\u2028\u2029 d",
    "scripts": "Größe, naïve, 東京タワー, שלום עולם, مرحبا بالعالم, नमस्ते, Привет, ไทย, 한국어, ελληνικά",
    "right to left": "\u202eabc\u202c \u2067שלום\u2069 ١٢٣٤٥",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺 e\u0301 a\u0308\u0323 \ufeff\u200d\u00ad",
    "numbers": "1234567 3.14159 0x7f 1e-9 ½ ² Ⅷ ٣",
    "contractions": "I'll we've HE'S don'T 'tis it'ſ ''''s",
    "code": "def f(x):\n    return {'a': [x ** 2, None]}  # why?\n\n\n",
    "control": "\0\x01\x7f\x80\x9f\uffff\U0010ffff",
    "special": "a<|endoftext|>b <|user|><|user|> <|endof <|tool|",
    "categories": "".join(chr(code) for code in range(0, 0x11000, 53) if not 0xD800 <= code < 0xE000
                          and unicodedata.category(chr(code)) != "Cn"),
}
COMMON = "the cat sat on the mat; 'tis what it's: 12 345 6789  \n\n    return self.the_cat\n"


# Three engines know three versions of Unicode; what was in version 3.2 is the same in all.
OLD = [chr(code) for code in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(code)) not in
       ("Cn", "Co", "Cs") and code != 0x295]
KINDS = {}
for char in OLD:
    KINDS.setdefault(unicodedata.ucd_3_2_0.category(char), []).append(char)
NESTED = ["<|a|>", "<|a|>b", "|>b<|", "<<", "<|<|a|>|>", "\r\n", "東"]


def random_text(rng, alphabet, length):
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(length)))


def random_kinds(rng, n_runs):
    """Runs of characters of every Unicode category, random bytes, what is hard, special tokens."""
    runs = []
    for _ in range(n_runs):
        runs.append(rng.choice([
            random_text(rng, rng.choice([*KINDS.values()]), 5), rng.choice([*NASTY.values()])[:9],
            rng.randbytes(4).decode("latin-1"), rng.choice(NESTED), rng.choice(SPECIAL_TOKENS),
            rng.choice([" ", "\r\n", "  ", "'S", "it's", "\u200d", "\ufe0f", "\u202e", "12345"])]))
    return "".join(runs)


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train([COMMON * 5, *NASTY.values()], 600)


def gpt2_files(folder, merges, others=("<|endoftext|>",)):
    """vocab.json and merges.txt as GPT-2 wrote them: printable characters, permuted bytes."""
    names = [BYTE_TO_CHAR[byte] for byte in GPT2_BYTES]
    names += [to_chars(left + right) for left, right in merges] + list(others)
    lines = ["#version: 0.2"] + [f"{to_chars(left)} {to_chars(right)}" for left, right in merges]
    (folder / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


# -----------------------------------------------------------------------------
# Training.


def test_merge_replaces_from_the_left():
    assert merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]
    assert merge([1, 1, 1, 1, 1], (1, 1), 2) == [2, 2, 1]


@pytest.mark.parametrize("seed", range(20))
def test_plain_and_fast_training_give_the_same_merges(seed):
    rng = random.Random(seed)
    alphabet = rng.choice(["ab", "a ", "aab \n", "abc'ts 19\r\n", "aé東👍 \u0301", "<|end>"])
    pattern = rng.choice([GPT2_SPLIT, GPT4_SPLIT, r"[\s\S]+", r"\S+|\s+", r"[\s\S]"])
    texts = ["a"] + [random_text(rng, alphabet, rng.choice([20, 300])) for _ in range(3)]
    special = rng.choice([[], SPECIAL_TOKENS, ["<|end|>", "a|", "aa"]])
    assert train_fast(texts, 330, special, pattern) == train_plain(texts, 330, special, pattern)


def test_plain_and_fast_training_agree_on_nasty_texts():
    texts = [*NASTY.values(), COMMON * 3, "\ud800 \udc00\ud83d\ude00"]
    assert train_fast(texts, 500) == train_plain(texts, 500)


def test_ties_go_to_the_greatest_pair_of_bytes():
    assert train_plain("ab cd ab cd ba dc", 264)[:2] == train_fast("ab cd ab cd ba dc", 264)[:2]
    assert train_fast("xy ab xy ab", 263, pattern=r"\S+|\s+") == [(b"x", b"y")]
    assert train_fast("abab aab aab", 264, pattern=r"\S+|\s+")[0] == (b"a", b"b")


def test_training_stops_when_no_pair_occurs_twice():
    assert train_plain("abcab", 300) == train_fast("abcab", 300) == [(b"a", b"b")]
    assert Tokenizer.train("abcab", 4_000_000).n_vocab == 256 + 1 + len(SPECIAL_TOKENS)


def test_special_tokens_are_never_counted_nor_merged_across():
    with_them = "one<|endoftext|>two<|end|>" * 9
    without = ["one", "two"] * 9
    assert train_fast(with_them, 300) == train_plain(with_them, 300) == train_plain(without, 300)


@pytest.mark.parametrize("pattern", SPLITS.values(), ids=SPLITS)
def test_a_file_in_blocks_has_the_chunks_of_the_whole(pattern, monkeypatch, tmp_path):
    rng, words = random.Random(0), [*COMMON.split(" "), " ", "\n", "\r\n", *NASTY.values()]
    text = "".join(rng.choice(words) for _ in range(2000)).replace("\0", "")
    (tmp_path / "text").write_bytes(text.encode())
    monkeypatch.setattr(module, "BLOCK", 10_000)
    blocks = [*read_files([tmp_path / "text"])]
    assert "".join(blocks) == text and len(blocks) > 9
    assert count_chunks(blocks, [], pattern) == count_chunks([text], [], pattern)


def test_a_file_without_line_ends_is_read_in_blocks_too(monkeypatch, tmp_path):
    (tmp_path / "text").write_text("ab " * 5000)
    monkeypatch.setattr(module, "BLOCK", 2000)
    assert max(map(len, read_files([tmp_path / "text"]))) == 2000
    assert Tokenizer.train(read_files([tmp_path / "text"]), 264).merges[0] == (b"a", b"b")


def test_many_processes_count_what_one_counts(monkeypatch):
    texts = [COMMON * 30] * 4
    one = train_fast(texts, 400)
    monkeypatch.setattr(module, "JOB", 1000)
    assert train_fast(texts, 400) == one


@pytest.mark.parametrize("options, problem", [
    (dict(vocab_size=261), "vocab_size=261 must be from 262, the bytes and special tokens"),
    (dict(special_tokens=["a", "a"]), "one is empty or given twice"),
    (dict(special_tokens=["a", ""]), "one is empty or given twice"),
    (dict(texts=""), "the input is empty"),
    (dict(texts=[]), "the input is empty"),
    (dict(pattern="(?:"), "split pattern '(?:' cannot be read: error('missing )"),
    (dict(pattern=r"\p{L}+"), "loses 1 of 10 characters"),
])
def test_training_refuses_what_cannot_work(options, problem):
    for train in train_plain, train_fast:
        with pytest.raises(ValueError, match=regex.escape(problem)) as error:
            train(**(dict(texts="some texts", vocab_size=300) | options))
        assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# Encoding and decoding.


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("pattern", SPLITS.values(), ids=SPLITS)
def test_decode_undoes_encode_and_tiktoken_gives_the_same_ids(trained, name, pattern):
    tokenizer, text = Tokenizer(trained.merges, pattern=pattern), NASTY[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == tokenizer.to_tiktoken().encode_ordinary(text)


def test_texts_join_at_special_tokens(trained):
    rng = random.Random(0)
    for left, right in [(random_kinds(rng, 6), random_kinds(rng, 6)) for _ in range(200)]:
        ids = [trained.encode(part, special=True) for part in (left, right)]
        joined = trained.encode(left + "<|end|>" + right, special=True)
        assert joined == [*ids[0], trained.special["<|end|>"], *ids[1]]


@pytest.mark.parametrize("pattern", [*SPLITS.values(), r"[\s\S]+"])
def test_a_batch_is_encoded_as_its_texts_are_one_by_one(trained, pattern):
    rng, tokenizer = random.Random(0), Tokenizer(trained.merges, pattern=pattern)
    new = "".join(chr(rng.randrange(0x110000)) for _ in range(500))  # with surrogates, unassigned
    texts = [new, "", "\u0295a", "\U00016ea0A", " " * 70_000, *NASTY.values()]
    texts += [random_kinds(rng, 9) + new[i:i + 9] for i in range(100)]
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(iter(texts)) == one_by_one
    assert [*tokenizer.encode_iterable(texts)] == [id for ids in one_by_one for id in ids]


@pytest.mark.parametrize("pattern", [r"\p{L}+", r"(?=a)|b", r"\S+|\s(?=\s)"])
def test_a_pattern_that_loses_characters_is_refused_by_all_that_encode(pattern):
    tokenizer, text = Tokenizer([], pattern=pattern), "one two a"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["", text]),
                   lambda text: [*tokenizer.encode_iterable([text])]):
        with pytest.raises(ValueError, match="loses . of 9 characters"):
            encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", " ", "random bytes", "a giant word"])
def test_twice_as_long_a_chunk_takes_twice_as_long_to_encode(name):
    rng = random.Random(0)
    text = {"random bytes": rng.randbytes(200_000).decode("latin-1"),
            "a giant word": "".join(rng.choices("etaoin", k=200_000))}.get(name, name * 200_000)
    tokenizer, seconds = Tokenizer.train(text[:9999], 400, pattern=r"[\s\S]+"), []
    for part in [text[:len(text) // 8], text] * 3:
        start = time.process_time()
        tokenizer.encode(part)
        seconds.append(time.process_time() - start)
    assert min(seconds[1::2]) < 3 * 8 * min(seconds[::2])  # were it quadratic: 8 * 8


@pytest.mark.slow
def test_encoding_lines_lazily_holds_less_than_a_megabyte(trained):
    rng, tokenizer = random.Random(0), Tokenizer(trained.merges)
    words = [random_text(rng, COMMON, 9) + rng.choice(OLD) for _ in range(30_000)]
    lines = ["".join(words[i:i + 20]) for i in range(0, len(words), 20)]
    tracemalloc.start()
    n = sum(1 for _ in tokenizer.encode_iterable(lines * 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 200_000 and peak < 1_000_000


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_and_random_merges_encode_as_in_tiktoken(seed):
    rng = random.Random(seed)
    alphabet = rng.choice(["ab", "aab \n", "aé東👍 '\u0301s1\r\n", COMMON, *NASTY.values()]) or "a"
    pattern = rng.choice([GPT2_SPLIT, GPT4_SPLIT, r"[\s\S]+"])
    texts = ["a"] + [random_text(rng, alphabet, 400) for _ in range(4)]
    tokenizer = Tokenizer.train(texts[:-1], 340, pattern=pattern)
    twin = tokenizer.to_tiktoken()
    assert [*map(twin.encode_ordinary, texts)] == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_a_token_encodes_to_itself(trained):
    texts = [(id, token.decode()) for id, token in enumerate(trained.token_bytes()[256:], 256)
             if token.decode("utf-8", "ignore").encode() == token]
    assert all(module.apply_merges(text.encode(), trained.merged) == [id]
               for id, text in texts if text not in trained.special)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", " ", "abcdefghijklmnopq"])
def test_a_chunk_of_a_million_characters_is_encoded_as_in_tiktoken(unit):
    tokenizer = Tokenizer.train(unit * 50, 280)
    text = unit * (1_000_000 // len(unit))
    part = text[:300_000] if unit == " " else text  # tiktoken cannot do a million spaces
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 8
    assert tokenizer.encode(part) == tokenizer.to_tiktoken().encode_ordinary(part)


def test_random_bytes_in_one_chunk_encode_as_in_tiktoken():
    text = random.Random(1).randbytes(50_000).decode("latin-1")
    tokenizer = Tokenizer.train(text, 1000, pattern=r"[\s\S]+")
    assert tokenizer.encode(text) == tokenizer.to_tiktoken().encode_ordinary(text)


@pytest.mark.parametrize("text, meaning", [("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "😀"),
                                           ("\udc00\ud800", "\ufffd\ufffd")])
def test_surrogates_are_one_character_in_pairs_and_u_fffd_alone(trained, text, meaning):
    assert trained.encode(text) == trained.encode(meaning) == trained.encode_batch([text])[0]


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|end<|end|>|>", "<<|user|>>", *SPECIAL_TOKENS])
def test_text_never_makes_a_special_id_unless_it_is_asked_for(trained, text):
    special, ids = {*trained.special.values()}, trained.encode(text)
    with_special = trained.encode(text, special=True)
    assert ids == trained.encode_batch([text])[0] and special.isdisjoint(ids)
    assert not special.isdisjoint(with_special)
    assert trained.decode(ids) == trained.decode(with_special) == text


def test_of_two_special_tokens_at_one_place_the_longer_is_taken():
    tokenizer = Tokenizer([], ["<a", "<a>", "<a>b"])
    assert tokenizer.encode("<a>b<a><a", special=True) == [258, 257, 256]


def test_parts_between_special_tokens_are_encoded_as_if_alone(trained):
    parts, ids = ["one two ", " three\n", ""], []
    for part in parts:
        ids += [*trained.encode(part), trained.eot]
    assert trained.encode("<|endoftext|>".join([*parts, ""]), special=True) == ids


def test_encoding_lazily_gives_the_ids_of_one_text_after_the_other(trained):
    drawn = []
    lazy = trained.encode_iterable(drawn.append(text) or text for text in NASTY.values() if text)
    assert next(lazy) == trained.encode(NASTY["newlines"])[0] and len(drawn) == 1
    assert [*lazy] == [id for text in NASTY.values() for id in trained.encode(text)][1:]


@pytest.mark.parametrize("seed", range(10))
def test_a_stream_shows_whole_characters_and_joins_to_decode(trained, seed):
    rng, decode = random.Random(seed), trained.decoder()
    text = random_text(rng, NASTY["emoji"] + NASTY["scripts"], 60)
    ids = trained.encode(text) if seed % 2 else [rng.randrange(trained.n_vocab) for _ in range(99)]
    parts = [decode(id) for id in ids]
    assert "".join(parts) + decode() == trained.decode(ids)
    assert seed % 2 == 0 or "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("id", [-1, 600, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(trained, id):
    for decode in trained.decode, lambda ids: trained.decoder()(ids[0]):
        with pytest.raises(ValueError, match=f"token id {id} is not in this vocabulary"):
            decode([id])


@pytest.mark.parametrize("arguments", [dict(merges=[(b"a", b"b"), (b"a", b"b")]),
                                       dict(merges=[(b"ab", b"c")]), dict(special_tokens={"x": 97}),
                                       dict(special_tokens={"x": 256, "y": 256}),
                                       dict(special_tokens={"x": 300.0}),
                                       dict(byte_order=bytes(256))])
def test_a_vocabulary_that_contradicts_itself_is_refused(arguments):
    with pytest.raises(ValueError):
        Tokenizer(**(dict(merges=[]) | arguments))


def test_the_split_patterns_cut_as_they_do_in_the_papers():
    text = "We'll pay 12345 EUR!!\n\n  now"
    gpt2 = ["We", "'ll", " pay", " 12345", " EUR", "!!", "\n\n ", " now"]
    gpt4 = ["We", "'ll", " pay", " ", "123", "45", " EUR", "!!\n\n", " ", " now"]
    assert split_chunks(text, compile_split(GPT2_SPLIT)) == gpt2
    assert split_chunks(text, compile_split(GPT4_SPLIT)) == gpt4


@pytest.mark.parametrize("pattern", ASCII_SPLITS)
def test_ascii_is_split_by_pythons_own_engine_as_by_the_other(pattern):
    rng, alphabet = random.Random(0), [*map(chr, range(128)), *"  \n\r\t'saLE1." * 8]
    for text in [random_text(rng, alphabet, 16) for _ in range(6000)]:
        assert split_chunks(text, compile_split(pattern)) == regex.findall(pattern, text)


def test_a_pattern_that_tries_all_ways_to_match_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="is too slow: take another"):
        Tokenizer([], pattern=r"(?:a|a)*b|[\s\S]").encode("a" * 60)


# -----------------------------------------------------------------------------
# Chats.


CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="2 + 2?\n"),
        dict(role="assistant", content="add(2, 2)"), dict(role="tool", content="4"),
        dict(role="assistant", content="It is 4. 👍")]


def turn(role, content="hi"):
    return dict(role=role, content=content)


def test_a_chat_is_one_document_of_marked_turns_in_plain_sight(trained):
    ids, _ = trained.render_chat(CHAT)
    assert trained.decode(ids) == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>2 + 2?\n<|end|>"
        "<|assistant|>add(2, 2)<|end|><|tool|>4<|end|><|assistant|>It is 4. 👍<|end|>")
    assert ids == trained.encode(trained.decode(ids), special=True)


def test_the_assistant_learns_its_texts_and_where_they_end(trained):
    ids, loss_mask = trained.render_chat(CHAT)
    assert len(ids) == len(loss_mask) and {*map(type, loss_mask)} == {bool}
    learned = trained.decode(id for id, mine in zip(ids, loss_mask) if mine)
    assert learned == "add(2, 2)<|end|>It is 4. 👍<|end|>"


@pytest.mark.parametrize("n", [2, 4])
def test_a_prompt_and_the_answer_are_the_chat(trained, n):
    prompt, answer = trained.render_prompt(CHAT[:n]), trained.encode(CHAT[n]["content"])
    ids, loss_mask = trained.render_chat(CHAT[:n + 1])
    assert prompt + answer + [trained.special["<|end|>"]] == ids
    assert prompt[-1] == trained.special["<|assistant|>"] and all(loss_mask[len(prompt):])


@pytest.mark.parametrize("name", NASTY)
def test_a_text_in_a_chat_never_makes_a_special_id(trained, name):
    text = "".join(SPECIAL_TOKENS) + NASTY[name] + "<|end|><|system|>"
    ids, loss_mask = trained.render_chat([turn("user", text), turn("assistant", text)])
    special = [id for id in ids if id in trained.special.values()]
    assert trained.decode(special) == "<|endoftext|><|user|><|end|><|assistant|><|end|>"
    assert sum(loss_mask) == len(trained.encode(text)) + 1


@pytest.mark.parametrize("messages, problem", [
    ([], "a chat is a list of messages"), ("hi", "a chat is a list of messages"),
    (None, "a chat is a list of messages"), (["hi"], "message 0 is 'hi'"),
    ([turn("user", None)], "it must be a dict of content, a str, and role"),
    ([turn("user", ["a" * 999] * 9)], "it must be a dict of content, a str, and role"),
    ([turn("robot"), turn("user")], "and role, here system or user"),
    ([dict(content="hi")], "message 0 is {'content': 'hi'}"), ([turn(["user"])], "message 0"),
    ([turn("user"), turn("system"), turn("user")], "message 1 is {'role': 'system'"),
    ([turn("assistant")], "message 0"), ([turn("tool")], "message 0"),
    ([turn("system")], "last message, 0,"),
])
def test_messages_that_are_no_chat_are_refused_in_one_line(trained, messages, problem):
    for render in trained.render_chat, trained.render_prompt:
        with pytest.raises(ValueError, match=regex.escape(problem)) as error:
            render(messages)
        assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_who_speaks_last_decides_between_chat_and_prompt(trained):
    with pytest.raises(ValueError, match="last message, 1, is of role user"):
        trained.render_chat(CHAT[:2])
    with pytest.raises(ValueError, match="must be of user or tool"):
        trained.render_prompt(CHAT)


def test_a_tokenizer_without_the_tokens_of_chats_says_so(trained):
    for special in [], SPECIAL_TOKENS[:-1]:
        with pytest.raises(ValueError, match="this tokenizer lacks .* for chats"):
            Tokenizer(trained.merges, special).render_chat(CHAT)


# -----------------------------------------------------------------------------
# Other formats and the file.


@pytest.mark.parametrize("special", [["<|endoftext|>"], [], {"<|endoftext|>": 700, "<|x|>": 1000}])
def test_from_tiktoken_undoes_to_tiktoken(trained, special):
    tokenizer = Tokenizer(trained.merges, special, GPT2_SPLIT, GPT2_BYTES)
    again = Tokenizer.from_tiktoken(tokenizer.to_tiktoken())
    assert again.definition() == tokenizer.definition()


def test_a_tiktoken_encoding_whose_ids_have_no_order_is_refused():
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    encoding = tiktoken.Encoding("x", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(ValueError, match="token 256 is not the merge of two before it"):
        Tokenizer.from_tiktoken(encoding)


@pytest.mark.parametrize("ranks, special, reason", [  # as p50k_base has it, and o200k_harmony
    ({b"ab": 257}, {"<|endoftext|>": 256}, "x cannot be read: id 256 is no merge, but 257 is one"),
    ({b"ab": 256}, {"<|a|>": 257, "<|b|>": 257},
     r"special token '<\|b\|>' cannot have id 257: it must be a free number")])
def test_a_tiktoken_encoding_that_does_not_fit_is_refused_with_the_reason(ranks, special, reason):
    ranks = {bytes([i]): i for i in range(256)} | ranks
    encoding = SimpleNamespace(name="x", _mergeable_ranks=ranks, _special_tokens=special,
                               _pat_str=GPT2_SPLIT)
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_tiktoken(encoding)


def test_texts_one_by_one_give_the_ids_of_each_with_special_tokens_if_asked_for(trained):
    texts = ["a<|endoftext|>b", "", "c<|end|>"]
    for special in False, True:
        assert list(trained.encode_iterable(texts, special=special)) == [
            id for text in texts for id in trained.encode(text, special=special)]
    assert trained.eot in trained.encode_iterable(texts, special=True)


@pytest.mark.parametrize("term, stream, disable", [
    ("dumb", "sys.stderr", "True"), ("xterm", "None", "True"), ("xterm", "sys.stderr", "None")])
def test_a_dumb_terminal_and_a_closed_stream_get_no_progress_bars(term, stream, disable):
    code = f"import sys; sys.stderr = {stream}; import tokenizer; print(tokenizer.QUIET['disable'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TERM": term},
                          capture_output=True, text=True)
    assert done.stdout == f"{disable}\n"


def test_a_byte_order_mark_is_not_learned(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfab ab ")
    assert "".join(read_files([tmp_path / "text"])) == "ab ab "


@pytest.mark.parametrize("name, pattern", [("gpt2", GPT2_SPLIT), ("cl100k_base", CL100K_SPLIT),
                                           ("o200k_base", O200K_SPLIT)])
def test_from_tiktoken_gives_the_ids_of_openais_encodings(name, pattern):
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        pytest.skip(f"tiktoken cannot load {name}: {error!r:.60}")
    tokenizer, texts = Tokenizer.from_tiktoken(encoding), [COMMON * 9, *NASTY.values()]
    assert tokenizer.pattern == pattern
    assert [*map(tokenizer.encode, texts)] == [*map(encoding.encode_ordinary, texts)]


@pytest.mark.parametrize("name, ours", [("r50k_base", GPT2_SPLIT), ("cl100k_base", CL100K_SPLIT),
                                        ("o200k_base", O200K_SPLIT)])
def test_the_patterns_of_tiktoken_in_plain_quantifiers_split_the_same(name, ours, monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *names, **options: {})
    theirs, rng = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"], random.Random(0)
    assert PLAIN.get(theirs, theirs) == ours
    for text in [random_text(rng, " \t\n\r'aS1é\u0301東.!/\u00a0", 14) for _ in range(3000)]:
        assert regex.findall(theirs, text) == regex.findall(ours, text)


def test_a_vocabulary_in_gpt2s_files_keeps_its_ids(trained, tmp_path):
    files = gpt2_files(tmp_path, trained.merges)
    tokenizer = Tokenizer.from_gpt2(*files, special_tokens=["<|endoftext|>", "<|end|>"])
    vocab, ids = json.loads(files[0].read_text()), tokenizer.encode(COMMON + NASTY["scripts"])
    assert tokenizer.special == {"<|endoftext|>": len(vocab) - 1, "<|end|>": len(vocab)}
    assert [vocab[to_chars(tokenizer.tokens[id])] for id in ids] == ids
    assert tokenizer.decode(ids) == COMMON + NASTY["scripts"] and tokenizer.encode("!") == [0]
    assert tokenizer.to_tiktoken().encode_ordinary(COMMON + NASTY["scripts"]) == ids


def test_files_that_are_not_gpt2s_are_refused(trained, tmp_path):
    vocab, merges = gpt2_files(tmp_path, trained.merges)
    lines = merges.read_text(encoding="utf-8").split("\n")
    for wrong in (lines[::-1], lines[:1] + lines[2:], lines + ["a b c"], lines + ["東 京"]):
        merges.write_text("\n".join(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match="vocab.json"):
            Tokenizer.from_gpt2(vocab, merges)


def test_gpt2s_characters_are_256_that_print():
    assert len({*BYTE_TO_CHAR.values()}) == 256 and "".join(BYTE_TO_CHAR.values()).isprintable()
    assert to_chars(b" a\n") == "ĠaĊ" and to_bytes(to_chars(bytes(range(256)))) == bytes(range(256))


def test_what_is_loaded_is_what_was_saved(trained, tmp_path):
    for tokenizer in trained, Tokenizer(trained.merges, {"<|x|>": 900}, GPT2_SPLIT, GPT2_BYTES):
        tokenizer.save(tmp_path / "new" / "t.json")
        again = Tokenizer.load(tmp_path / "new" / "t.json")
        assert again.definition() == tokenizer.definition() and again.hash() == tokenizer.hash()
        assert again.encode(COMMON) == tokenizer.encode(COMMON)


def test_another_tokenizer_has_another_hash(trained):
    changes = [dict(merges=trained.merges[:-1]), dict(special_tokens=SPECIAL_TOKENS[1:]),
               dict(pattern=GPT2_SPLIT), dict(byte_order=GPT2_BYTES)]
    others = [Tokenizer(**(dict(merges=trained.merges) | change)) for change in changes]
    assert len({tokenizer.hash() for tokenizer in [trained, *others]}) == 5


def test_a_file_names_its_split_or_carries_the_pattern(trained, tmp_path):
    for pattern, written in (GPT2_SPLIT, "gpt2"), (r"\S+|\s+", r"\S+|\s+"):
        Tokenizer(trained.merges, pattern=pattern).save(tmp_path / "t.json")
        assert json.loads((tmp_path / "t.json").read_bytes())["pattern"] == written
        assert Tokenizer.load(tmp_path / "t.json").pattern == pattern


@pytest.mark.parametrize("wrong, problem", [
    (lambda state: json.dumps(state)[:-40], "cannot be read"),
    (lambda state: "\0\1", "cannot be read"), (lambda state: "[" * 10**5, "cannot be read"),
    (lambda state: "\udcff", "cannot be read"), (lambda state: "", "cannot be read"),
    (lambda state: "[]", "no tokenizer of this version of the program"),
    (lambda state: dict(model={"type": "BPE"}), "no tokenizer of this version of the program"),
    (lambda state: state | dict(format="byte-level BPE"), "no tokenizer of this version"),
    (lambda state: state | dict(patern="gpt2"), "unknown field 'patern', did you mean pattern?"),
    (lambda state: {k: v for k, v in state.items() if k != "bytes"}, "'bytes'"),
    (lambda state: state | dict(merges=["Ġ"]), "cannot be read"),
    (lambda state: state | dict(merges=7), "merges=7 must be list"),
    (lambda state: state | dict(merges=["a b" * 10**5]), "cannot be read"),
    (lambda state: state | dict(merges=state["merges"][::-1]), "both must be tokens before it"),
    (lambda state: state | dict(special_tokens={"a": 1e9}), "cannot have id 1000000000.0"),
    (lambda state: state | dict(special_tokens={"a": "b"}), "cannot have id 'b'"),
    (lambda state: state | dict(bytes="a"), "the 256 bytes, in any order"),
    (lambda state: state | dict(pattern="(?:"), "split pattern '(?:' cannot be read"),
    (lambda state: state | dict(pattern=None), "pattern=None must be str"),
    (lambda state: state | dict(special_tokens="ab"), "special_tokens='ab' must be dict"),
])
def test_a_file_that_is_wrong_or_damaged_is_refused_in_one_line(trained, tmp_path, wrong, problem):
    trained.save(tmp_path / "t.json")
    content = wrong(json.loads((tmp_path / "t.json").read_bytes()))
    content = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "t.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="t.json") as error:
        Tokenizer.load(tmp_path / "t.json")
    said = str(error.value)
    assert problem in said and "\n" not in said and len(said) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("seed", range(10))
def test_of_a_file_damaged_anywhere_all_that_can_be_wrong_is_a_value_error(trained, tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "t.json"
    trained.save(path)
    whole = path.read_bytes()
    for start in [rng.randrange(len(whole)) for _ in range(9)]:
        path.write_bytes(whole[:start] + rng.randbytes(2) + whole[start + rng.randrange(9):])
        with contextlib.suppress(ValueError):
            Tokenizer.load(path).encode(COMMON)


# -----------------------------------------------------------------------------
# What every command shares.


def option(default, help, **more):
    metadata = dict(help=help, **more)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class First:
    """The first options."""
    run: str = option("", "a folder", positional=True)
    n_layer: int = option(3, "how many, 100% whole")
    dropout: float | None = option(None, "a share")
    bias: bool = option(True, "whether")
    stop: list = option([], "texts")
    hidden: int = 4


@dataclass(frozen=True)
class Second:
    """The second options."""
    n_layer: int = option(9, "not shown: the first has it")
    seed: int = option(0, "a number")


@pytest.mark.parametrize("words, first, second", [
    ("", {}, {}), ("runs/a", dict(run="runs/a"), {}),
    ("--n_layer=5 runs/a --no-bias --seed 2", dict(run="runs/a", n_layer=5, bias=False),
     dict(seed=2)),
    ("--dropout=1 --stop=a --stop=b", dict(dropout=1.0, stop=["a", "b"]), {}),
])
def test_options_are_the_fields_that_were_typed(monkeypatch, words, first, second):
    monkeypatch.setattr("sys.argv", ["command.py", *words.split()])
    assert parse_options("A command.", First, Second) == [first, second]


@pytest.mark.parametrize("words, said", [
    ("--n-layer=5", "unknown option --n-layer, did you mean --n_layer?"),
    ("--hidden=5", "unknown option --hidden"), ("--n_layer=x", "invalid int value: 'x'"),
    ("--help", "The second options:"), ("--help", "how many, 100% whole (default 3)"),
])
def test_help_and_wrong_options_come_from_the_fields(monkeypatch, capsys, words, said):
    monkeypatch.setattr("sys.argv", ["command.py", words])
    with pytest.raises(SystemExit) as end:
        parse_options("A command.", First, Second)
    out, err = capsys.readouterr()
    assert said in out + err and end.value.code == (2 if err else 0) and err.count("\n") < 2


@pytest.mark.parametrize("values, problem", [
    (dict(n_layer=True), "n_layer=True must be int"), (dict(n_layer=2.0), "2.0 must be int"),
    (dict(n_layer=2**31), "must be int below 2**31"), (dict(n_layr=1), "did you mean n_layer?"),
    (dict(dropout=float("nan")), "dropout=nan must be float below 2**31 or null"),
    (dict(bias=1), "bias=1 must be bool"), (dict(stop="a"), "stop='a' must be list"),
    ([], "it must be a dict of fields"),
])
def test_a_wrong_field_of_a_json_file_is_named(values, problem):
    with pytest.raises(ValueError, match=r"^some/config.json.*" + regex.escape(problem)):
        check_fields(First, values, "some/config.json")


def test_right_fields_of_a_json_file_make_the_dataclass():
    values = dict(n_layer=1, dropout=1, bias=False, stop=["a"])
    assert check_fields(First, values, "some/config.json") == First(**values)
    assert check_fields(First, dict(dropout=None), "some/config.json") == First()


@pytest.mark.parametrize("error, said", [
    (KeyError("a"), "f.json cannot be read: KeyError('a')"),
    (RecursionError("deep"), "RecursionError('deep')"),
    (ValueError("two\nlines"), "f.json cannot be read: two lines"), (EOFError(), "EOFError()"),
    (ValueError("f.json has no end"), "f.json has no end"), (OSError(2, "gone"), "gone"),
])
def test_whatever_goes_wrong_in_reading_a_file_is_one_line_with_its_path(error, said):
    with pytest.raises(OSError if isinstance(error, OSError) else ValueError) as caught:
        with reading("f.json"):
            raise error
    assert str(caught.value).endswith(said)
    assert isinstance(error, OSError) or str(caught.value).startswith("f.json ")


def test_json_is_written_and_read_back_whatever_a_file_name_holds(tmp_path):
    values = {"path": "na\udcffme é 🙂", "n": [1, None, 0.5]}
    module.write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_bytes()) == values


def test_jobs_on_all_cores_come_back_in_order():
    jobs = [(i, 3) for i in range(40)]
    assert [*on_all_cores(pow, iter(jobs))] == [i**3 for i in range(40)]
    assert [*on_all_cores(pow, [])] == [] and [*on_all_cores(pow, [(2, 5)])] == [32]


@pytest.mark.parametrize("words", [["-"], ["-c"], ["script.py"]])
def test_a_script_without_the_main_guard_neither_hangs_nor_starts_ever_more(tmp_path, words):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import tokenizer; tokenizer.JOB = 1000\n"
            "print(len(tokenizer.train_fast(['a few words '] * 300, 270)), flush=True)\n")
    (tmp_path / "script.py").write_text(code)
    words = [*words, code] if words == ["-c"] else words
    done = subprocess.run([sys.executable, *words], input=code, capture_output=True, text=True,
                          cwd=tmp_path, timeout=60)
    assert done.returncode == 0 and {*done.stdout} == {"8", "\n"} and done.stderr == ""


# -----------------------------------------------------------------------------
# The commands.


def test_the_commands_train_encode_decode_and_show(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "t.json"
    text.write_text(COMMON * 40)
    done = run("tokenizer.py", "train", text, "--vocab_size=300", "--pattern=gpt2", f"--out={out}")
    assert done.stdout.startswith("38 merges, 300 tokens") and done.stdout.count("\n") == 1
    ids = run("tokenizer.py", "encode", "the cat é", f"--tokenizer={out}").stdout
    assert run("tokenizer.py", "decode", *ids.split(), f"--tokenizer={out}").stdout == "the cat é\n"
    done = run("tokenizer.py", "decode", "72", "x", f"--tokenizer={out}")
    assert done.returncode == 1 and "the list of ids cannot be read" in done.stderr
    shown = run("tokenizer.py", "show", "the cat é", f"--tokenizer={out}").stdout
    assert shown.rstrip("\n").replace("|", "") == r"the cat \xc3\xa9" and "|" in shown
    few = run("tokenizer.py", "train", text, f"--out={out}")
    assert "tokens (no other pair occurs twice), " in few.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no /dev/stdin")
def test_a_tokenizer_is_trained_on_what_comes_through_a_pipe_as_on_a_file(tmp_path):
    (tmp_path / "text").write_text(COMMON * 40)
    for name in "text", "/dev/stdin":
        words = [sys.executable, ROOT / "tokenizer.py", "train", name, f"--out={name[-4:]}.json"]
        subprocess.run(words, input=(tmp_path / "text").read_bytes(), cwd=tmp_path, check=True)
    hashes = {Tokenizer.load(tmp_path / f"{name}.json").hash() for name in ("text", "tdin")}
    assert len(hashes) == 1


def test_output_may_be_closed_before_its_end(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    words = [sys.executable, ROOT / "tokenizer.py", "decode", *["97"] * 10_000]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize("words, code, problem", [
    (["train", "missing.txt"], 1, "No such file or directory: missing.txt"),
    (["train", "empty"], 1, "the input is empty"),
    (["train", "binary"], 1, "zero byte"),
    (["train", "latin"], 1, "latin cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    (["train", "text", "--vocab_size=9"], 1, "vocab_size=9 must be from 262"),
    (["train", "text", "--vocab_size=99999999999999999999"], 1, "to 4,194,304"),
    (["show", "text", "--vocab_size=300"], 1, "--vocab_size would not act beside show"),
    (["show", "a", "--tokenizer=text"], 1, "text cannot be read"),
    (["train", "text", "--vocab-size=9"], 2, "--vocab-size, did you mean --vocab_size?"),
    (["trian", "text"], 2, "invalid choice: 'trian'"),
    (["show"], 2, "required: input"),
    (["export", "text"], 2, "invalid choice: 'export'"),
    (["train", "text", "--out=."], 1, ". is a folder: give the name of a file to write"),
])
def test_a_mistake_is_one_line_with_the_way_out(tmp_path, words, code, problem):
    files = dict(empty=b"", binary=b"a\0b", latin=b"caf\xe9 ", text=b"some text")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = run("tokenizer.py", *words, cwd=tmp_path)
    assert done.returncode == code and problem in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and {path.name for path in tmp_path.iterdir()} == {*files}


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGTERM")
def test_a_command_that_is_ended_leaves_no_temporary_folder(tmp_path):
    code = ("import os, signal, tempfile; from tokenizer import run_command\n"
            "def main():\n"
            "    with tempfile.TemporaryDirectory(dir='.'):\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "        signal.pause()\n"
            "run_command(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 143 and not list(tmp_path.iterdir())
