"""Facts about tokenizer.py that hold for every text and every vocabulary."""

import contextlib
import json
import random
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter

import jinja2
import jinja2.sandbox
import pytest
import regex
import tiktoken
import tokenizers
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

import tokenizer as module
from conftest import ROOT, run
from tokenizer import (BYTE_TO_CHAR, CL100K_SPLIT, GPT2_BYTES, GPT2_SPLIT, GPT4_SPLIT, O200K_SPLIT,
                       PLAIN, SPECIAL_TOKENS, SPLITS, Tokenizer, ascii_split, compile_split,
                       count_chunks, gather, merge, on_all_cores, read_files, split, to_bytes,
                       to_chars, train_fast, train_plain)

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


@pytest.mark.parametrize("seed", range(50))
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
    assert Tokenizer.train("abcab", 10**9).n_vocab == 256 + 1 + len(SPECIAL_TOKENS)


def test_special_tokens_are_never_counted_nor_merged_across():
    with_them = "one<|endoftext|>two<|end|>" * 9
    without = ["one", "two"] * 9
    assert train_fast(with_them, 300) == train_plain(with_them, 300) == train_plain(without, 300)


@pytest.mark.parametrize("pattern", [*SPLITS.values(), r"\S+|\s+"])
def test_a_long_text_in_pieces_has_the_chunks_of_the_whole(pattern, monkeypatch, tmp_path):
    rng, words = random.Random(0), [*COMMON.split(" "), " ", "\n", "\r\n", *NASTY.values()]
    text = "".join(rng.choice(words) for _ in range(2000)).replace("\0", "")
    (tmp_path / "text").write_bytes(text.encode())
    whole = count_chunks([text], SPECIAL_TOKENS, pattern)
    monkeypatch.setattr(module, "PIECE", 97)
    jobs = [*gather([text], SPECIAL_TOKENS, pattern)]
    files = [*read_files([tmp_path / "text"], SPECIAL_TOKENS, pattern)]
    assert sum((count_chunks(*job) for job in jobs), Counter()) == whole
    assert count_chunks(files, SPECIAL_TOKENS, pattern) == whole
    assert (len(jobs) > 9 and len(files) > 9) == (pattern in module.SPLITS.values())


def test_many_processes_count_what_one_counts(monkeypatch):
    texts = [COMMON * 30] * 4
    one = train_fast(texts, 400)
    monkeypatch.setattr(module, "PIECE", 1000)
    assert train_fast(texts, 400) == one


def test_processes_do_not_run_the_script_that_started_them():
    code = ("import tokenizer; tokenizer.PIECE = 1000; print('once')\n"
            "print(len(tokenizer.train_fast(['a few words '] * 300, 270)))\n")
    for words in ([sys.executable, "-"], [sys.executable, "-c", code]):
        done = subprocess.run(words, input=code, capture_output=True, text=True, cwd=ROOT)
        assert (done.stdout, done.stderr) == ("once\n8\n", "")


@pytest.mark.parametrize("options, problem", [
    (dict(vocab_size=261), "vocab_size=261 is too small: 256 bytes and 6 special tokens need 262"),
    (dict(special_tokens=["a", "a"]), "special token 'a' is given 2 times"),
    (dict(special_tokens=["a", ""]), "a special token is empty"),
    (dict(texts=""), "the input is empty"),
    (dict(texts=[]), "the input is empty"),
    (dict(pattern="(?:"), "does not compile"),
    (dict(pattern=r"(a)|[\s\S]"), "has a capturing group"),
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


@pytest.mark.parametrize("seed", range(40))
def test_three_libraries_give_the_same_ids_for_any_text(trained, tmp_path, seed):
    rng = random.Random(seed)
    tokenizer = Tokenizer(trained.merges, NESTED, [*SPLITS.values()][seed % 4])
    tokenizer.to_huggingface(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.save(tmp_path / "t.json")
    again, twin = Tokenizer.load(tmp_path / "t.json"), tokenizer.to_tiktoken()
    for text in [random_kinds(rng, 12) for _ in range(12)]:
        ids, marked = tokenizer.encode(text), tokenizer.encode(text, special=True)
        assert tokenizer.decode(ids) == tokenizer.decode(marked) == text
        assert ids == twin.encode_ordinary(text) == again.encode(text)
        assert marked == theirs.encode(text).ids == again.encode(text, special=True)


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
def test_encoding_lazily_holds_less_than_a_megabyte_beside_the_text(trained):
    rng = random.Random(0)
    words = [random_text(rng, COMMON, 9) + rng.choice(OLD) for _ in range(30_000)]
    texts = ["".join(words), " ".join(reversed(words))]
    tokenizer = Tokenizer(trained.merges)
    tracemalloc.start()
    n = sum(1 for _ in tokenizer.encode_iterable(texts))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 200_000 and peak < 1_000_000


@pytest.mark.parametrize("seed", range(40))
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


def test_json_is_written_and_read_back_whatever_a_file_name_holds(tmp_path):
    values = {"path": "na\udcffme é 🙂", "n": [1, None, 0.5]}
    module.write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_bytes()) == values


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


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_shows_whole_characters_and_joins_to_decode(trained, seed):
    rng, decoder = random.Random(seed), trained.decoder()
    text = random_text(rng, NASTY["emoji"] + NASTY["scripts"], 60)
    ids = trained.encode(text) if seed % 2 else [rng.randrange(trained.n_vocab) for _ in range(99)]
    parts = [decoder.push(id) for id in ids]
    assert "".join(parts) + decoder.flush() == trained.decode(ids)
    assert seed % 2 == 0 or "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("id", [-1, 600, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(trained, id):
    for decode in trained.decode, lambda ids: trained.decoder().push(ids[0]):
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
    assert split(text, compile_split(GPT2_SPLIT)) == gpt2
    assert split(text, compile_split(GPT4_SPLIT)) == gpt4


@pytest.mark.parametrize("pattern", SPLITS.values(), ids=SPLITS)
def test_ascii_is_split_by_pythons_own_engine_as_by_the_other(pattern):
    rng, alphabet = random.Random(0), [*map(chr, range(128)), *"  \n\r\t'saLE1." * 8]
    for text in [random_text(rng, alphabet, 16) for _ in range(3000)]:
        assert ascii_split(pattern).findall(text) == regex.findall(pattern, text)
    assert ascii_split(r"\p{L}+|[^\s\p{N}]").pattern == r"[A-Za-z]+|[^\t-\r 0-9]"


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
    ids, learn = trained.render_chat(CHAT)
    assert len(ids) == len(learn) and {*map(type, learn)} == {bool}
    learned = trained.decode(id for id, mine in zip(ids, learn) if mine)
    assert learned == "add(2, 2)<|end|>It is 4. 👍<|end|>"


@pytest.mark.parametrize("n", [2, 4])
def test_a_prompt_and_the_answer_are_the_chat(trained, n):
    prompt, answer = trained.render_prompt(CHAT[:n]), trained.encode(CHAT[n]["content"])
    ids, learn = trained.render_chat(CHAT[:n + 1])
    assert prompt + answer + [trained.special["<|end|>"]] == ids
    assert prompt[-1] == trained.special["<|assistant|>"] and learn[len(prompt):].count(False) == 0


@pytest.mark.parametrize("name", NASTY)
def test_a_text_in_a_chat_never_makes_a_special_id(trained, name):
    text = "".join(SPECIAL_TOKENS) + NASTY[name] + "<|end|><|system|>"
    ids, learn = trained.render_chat([turn("user", text), turn("assistant", text)])
    special = [id for id in ids if id in trained.special.values()]
    assert trained.decode(special) == "<|endoftext|><|user|><|end|><|assistant|><|end|>"
    assert sum(learn) == len(trained.encode(text)) + 1


@pytest.mark.parametrize("messages, problem", [
    ([], "a chat is a list of messages"), ("hi", "a chat is a list of messages"),
    (None, "a chat is a list of messages"), (["hi"], "message 0 is 'hi'"),
    ([turn("user", None)], "a role and a content, which is a str"),
    ([turn("user", ["a" * 10**6] * 99)], "a role and a content, which is a str"),
    ([turn("robot")], "role 'robot': it must be one of system, user, assistant, tool"),
    ([dict(content="hi")], "has role None"), ([turn(["user"])], "has role ['user']"),
    ([turn("user"), turn("system"), turn("user")], "message 1 has role system"),
    ([turn("assistant")], "message 0 has role assistant"), ([turn("tool")], "message 0 has role"),
    ([turn("system")], "the last message has role system"),
])
def test_messages_that_are_no_chat_are_refused_in_one_line(trained, messages, problem):
    for render in trained.render_chat, trained.render_prompt:
        with pytest.raises(ValueError, match=regex.escape(problem)) as error:
            render(messages)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_who_speaks_last_decides_between_chat_and_prompt(trained):
    with pytest.raises(ValueError, match="the last message has role user: it must be assistant"):
        trained.render_chat(CHAT[:2])
    with pytest.raises(ValueError, match="role assistant: it must be user or tool"):
        trained.render_prompt(CHAT)


def test_a_tokenizer_without_the_tokens_of_chats_says_so(trained):
    for special in [], SPECIAL_TOKENS[:-1]:
        with pytest.raises(ValueError, match="cannot render chats: it lacks"):
            Tokenizer(trained.merges, special).render_chat(CHAT)


@pytest.mark.parametrize("n", [2, 5])
def test_the_template_of_hugging_face_renders_the_same(trained, tmp_path, n):
    trained.save(tmp_path / "t.json")
    template = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["chat_template"]
    render = jinja2.sandbox.SandboxedEnvironment().from_string(template).render
    shown = render(messages=CHAT[:n], add_generation_prompt=n == 2)
    ids = trained.render_prompt(CHAT[:n]) if n == 2 else trained.render_chat(CHAT)[0]
    assert shown == trained.decode(ids)
    with pytest.raises(jinja2.UndefinedError, match="raise_exception"):
        render(messages=[turn("user", "a<|end|>b")])


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


@pytest.mark.parametrize("special", [[], SPECIAL_TOKENS, {"<|x|>": 9000, "<|x|>y": 70000}])
@pytest.mark.parametrize("pattern", SPLITS.values(), ids=SPLITS)
def test_in_hugging_faces_library_the_ids_are_equal(trained, tmp_path, special, pattern):
    tokenizer = Tokenizer(trained.merges, special, pattern, GPT2_BYTES)
    tokenizer.to_huggingface(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*NASTY.values(), COMMON, "<|x|>y<|x|> <|x<|x|>|>", *map(str, special)]:
        ids = tokenizer.encode(text, special=True)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert Tokenizer.from_huggingface(tmp_path).definition() == tokenizer.definition()


def test_a_tokenizer_of_gpt2s_kind_is_read_from_hugging_faces_file(trained, tmp_path):
    vocab, merges = map(str, gpt2_files(tmp_path, trained.merges))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<|endoftext|>", "<|new|>"])
    theirs.save(str(tmp_path / "theirs.json"))
    tokenizer = Tokenizer.from_huggingface(tmp_path / "theirs.json")
    assert tokenizer.definition()["merges"] == Tokenizer(trained.merges).definition()["merges"]
    for text in [COMMON, NASTY["scripts"], "a<|new|>b<|endoftext|>"]:
        assert tokenizer.encode(text, special=True) == theirs.encode(text).ids


@pytest.mark.parametrize("name, value", [
    ("normalizer", {"type": "NFC"}), ("model", {"type": "WordPiece"}), ("model", None),
    ("pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer", None), ("added_tokens", [{}]),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
])
def test_what_hugging_face_can_do_and_we_cannot_is_refused(trained, tmp_path, name, value):
    trained.to_huggingface(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read as Hugging Face"):
        Tokenizer.from_huggingface(path)


def test_an_export_overwrites_no_tokenizer_of_ours_and_tells_all_tokens_apart(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="give another folder"):
        trained.to_huggingface(tmp_path)
    with pytest.raises(ValueError, match="special token 'e' is written as token 101 is"):
        Tokenizer(trained.merges, ["e"]).to_huggingface(tmp_path / "new")


@pytest.mark.parametrize("special", [SPECIAL_TOKENS, {"<|x|>": 9000}])
def test_a_rank_file_holds_the_tokens_as_tiktoken_reads_them(trained, tmp_path, special):
    tokenizer = Tokenizer(trained.merges, special, GPT2_SPLIT, GPT2_BYTES)
    tokenizer.to_rank_file(tmp_path / "t.tiktoken")
    ranks = load_tiktoken_bpe(str(tmp_path / "t.tiktoken"))
    assert ranks == tokenizer.to_tiktoken()._mergeable_ranks
    again = Tokenizer.from_rank_file(tmp_path / "t.tiktoken", special, GPT2_SPLIT)
    assert again.definition() == tokenizer.definition()


@pytest.mark.parametrize("wrong, problem", [
    (lambda lines: lines[1:], "the first 256 ids must be the 256 bytes"),
    (lambda lines: lines[:300] + lines[301:], "token 301 is not the merge of two before it"),
    (lambda lines: lines + [b"YQ 700"], "line 595 must be a token in base64"),
    (lambda lines: lines + [b"YWE= x"], "line 595 must be a token in base64"),
    (lambda lines: lines + [b"\xff"], "line 595 must be a token in base64"),
    (lambda lines: [], "the first 256 ids must be the 256 bytes"),
])
def test_a_rank_file_that_is_damaged_is_refused(trained, tmp_path, wrong, problem):
    trained.to_rank_file(tmp_path / "t.tiktoken")
    lines = (tmp_path / "t.tiktoken").read_bytes().splitlines()
    (tmp_path / "t.tiktoken").write_bytes(b"\n".join(wrong(lines)))
    with pytest.raises(ValueError, match=problem):
        Tokenizer.from_rank_file(tmp_path / "t.tiktoken")


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


def test_a_file_without_a_chat_template_still_loads(trained, tmp_path):
    trained.save(tmp_path / "t.json")
    state = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    del state["chat_template"]
    (tmp_path / "t.json").write_text(json.dumps(state))
    assert Tokenizer.load(tmp_path / "t.json").hash() == trained.hash()


def test_another_tokenizer_has_another_hash(trained):
    changes = [dict(merges=trained.merges[:-1]), dict(special_tokens=SPECIAL_TOKENS[1:]),
               dict(pattern=GPT2_SPLIT), dict(byte_order=GPT2_BYTES)]
    others = [Tokenizer(**(dict(merges=trained.merges) | change)) for change in changes]
    assert len({tokenizer.hash() for tokenizer in [trained, *others]}) == 5


def damage(state, **changes):
    return json.dumps({**state, **changes})


@pytest.mark.parametrize("wrong, problem", [
    (lambda state: json.dumps(state)[:-40], "not JSON"),
    (lambda state: "\0\1", "not JSON"), (lambda state: "[" * 10**5, "not JSON"),
    (lambda state: "[]", "not a tokenizer of this program"),
    (lambda state: json.dumps({"model": {"type": "BPE"}}), "not a tokenizer of this program"),
    (lambda state: '{"a":' * 10**5, "not JSON"), (lambda state: "1" * 10**5, "not JSON"),
    (lambda state: "\udcff", "not JSON"), (lambda state: "", "not JSON"),
    (lambda state: damage(state, version=9), "version 9"),
    (lambda state: damage(state, version="9\n" * 10**5), "version '9"),
    (lambda state: damage(state, pattern=GPT2_SPLIT), "is damaged: its sha256"),
    (lambda state: damage(state, merges=state["merges"][:-1]), "is damaged: its sha256"),
    (lambda state: damage(state, merges=["Ġ"]), "is damaged"),
    (lambda state: damage(state, merges=7), "is damaged"),
    (lambda state: damage(state, merges=["a b" * 10**5]), "is damaged"),
    (lambda state: damage(state, special_tokens={"a": 1e9}), "is damaged"),
    (lambda state: damage(state, special_tokens={"a": "b"}), "is damaged"),
    (lambda state: damage(state, bytes="a"), "is damaged"),
    (lambda state: damage(state, chat_template="{{ messages }}"), "its chat_template is another"),
    (lambda state: damage(state, pattern="(?:"), "is damaged"),
    (lambda state: damage(state, pattern=None), "is damaged"),
])
def test_a_file_that_is_wrong_or_damaged_is_refused_in_one_line(trained, tmp_path, wrong, problem):
    trained.save(tmp_path / "t.json")
    state = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    (tmp_path / "t.json").write_bytes(wrong(state).encode("utf-8", "surrogateescape"))
    for load in Tokenizer.load, Tokenizer.from_huggingface:
        with pytest.raises(ValueError) as error:
            load(tmp_path / "t.json")
        said = str(error.value)
        assert "t.json" in said and (problem in said or load != Tokenizer.load)
        assert "\n" not in said and len(said) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("seed", range(20))
def test_of_a_file_damaged_anywhere_all_that_can_be_wrong_is_a_value_error(trained, tmp_path, seed):
    rng, paths = random.Random(seed), (tmp_path / "t.json", tmp_path / "tokenizer.json")
    trained.save(paths[0])
    trained.to_huggingface(tmp_path)
    for path, load in zip(paths, (Tokenizer.load, Tokenizer.from_huggingface)):
        whole = path.read_bytes()
        for start in [rng.randrange(len(whole)) for _ in range(9)]:
            path.write_bytes(whole[:start] + rng.randbytes(2) + whole[start + rng.randrange(9):])
            with contextlib.suppress(ValueError):  # what is not refused is not damaged
                assert load(path).encode(COMMON) == trained.encode(COMMON) or path != paths[0]


# -----------------------------------------------------------------------------
# All cores, and the commands.


def test_jobs_on_all_cores_come_back_in_order():
    jobs = [(i, 3) for i in range(40)]
    assert [*on_all_cores(pow, iter(jobs))] == [i**3 for i in range(40)]
    assert [*on_all_cores(pow, [])] == [] and [*on_all_cores(pow, [(2, 5)])] == [32]


def test_the_commands_train_encode_decode_and_show(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "t.json"
    text.write_text(COMMON * 40)
    done = run("tokenizer.py", "train", text, "--vocab_size=300", "--pattern=gpt2", f"--out={out}")
    assert done.stdout.startswith("38 merges, 300 tokens") and done.stdout.count("\n") == 1
    ids = run("tokenizer.py", "encode", "the cat é", f"--tokenizer={out}").stdout
    assert run("tokenizer.py", "decode", *ids.split(), f"--tokenizer={out}").stdout == "the cat é\n"
    shown = run("tokenizer.py", "show", "the cat é", f"--tokenizer={out}").stdout
    assert shown.rstrip("\n").replace("|", "") == r"the cat \xc3\xa9" and "|" in shown
    few = run("tokenizer.py", "train", text, f"--out={out}")
    assert "(of 4096: no other pair occurs twice)" in few.stdout


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


def test_the_commands_compare_and_export(trained, tmp_path):
    (tmp_path / "text.txt").write_text(COMMON * 40)
    trained.save(tmp_path / "tokenizer.json")
    for form, out in ("huggingface", "hf"), ("tiktoken", "t.tiktoken"):
        done = run("tokenizer.py", "export", f"--format={form}", f"--out={out}", cwd=tmp_path)
        assert out in done.stdout and done.returncode == 0
    words = ["compare", "text.txt", "hf", "cl100k", "o200k_base"]
    header, ours, hf, wrong, openai = run("tokenizer.py", *words, cwd=tmp_path).stdout.splitlines()
    n = len(trained.encode(COMMON * 40))
    assert ours.split()[1:3] == hf.split()[1:3] == [str(trained.n_vocab), f"{n:,}"]
    assert "not loaded: no such file, and none of" in wrong and openai.startswith("o200k_base ")
    assert Tokenizer.from_huggingface(tmp_path / "hf").definition() == trained.definition()
    assert Tokenizer.from_rank_file(tmp_path / "t.tiktoken").definition() == trained.definition()


@pytest.mark.parametrize("words, code, problem", [
    (["train", "missing.txt"], 1, "No such file or directory: missing.txt"),
    (["train", "empty"], 1, "the input is empty"),
    (["train", "binary"], 1, "zero byte"),
    (["train", "latin"], 1, "latin is not text in UTF-8"),
    (["train", "text", "--vocab_size=9"], 1, "vocab_size=9 is too small"),
    (["show", "a", "--tokenizer=text"], 1, "text is damaged or not JSON"),
    (["decode", "x", "--tokenizer=text"], 1, "'x' is not a token id"),
    (["train", "text", "--vocab-size=9"], 2, "--vocab-size, did you mean --vocab_size?"),
    (["trian", "text"], 2, "invalid choice: 'trian'"),
    (["show"], 2, "required: input"),
    (["compare", "empty"], 1, "empty is empty"),
    (["compare", "text", "--tokenizer=text"], 1, "text is damaged or not JSON"),
    (["export", "--tokenizer=missing"], 1, "No such file or directory: missing"),
    (["export", "text"], 2, "export takes no input, but --tokenizer"),
    (["train", "text", "--out=."], 1, ". is a folder: give the name of a file to write"),
])
def test_a_mistake_is_one_line_with_the_way_out(tmp_path, words, code, problem):
    files = dict(empty=b"", binary=b"a\0b", latin=b"caf\xe9 ", text=b"some text")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = run("tokenizer.py", *words, cwd=tmp_path)
    assert done.returncode == code and problem in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and {path.name for path in tmp_path.iterdir()} == {*files}
