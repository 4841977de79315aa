"""chapters/near.py: near-duplicates, repeated lines, questions that a corpus gives away."""

import io
import os
import subprocess
import sys
import tracemalloc
from random import Random

import numpy as np
import pytest
from conftest import ROOT, mistake

from chapters import near
from chapters.near import (add_new, band_keys, bucket_pairs, candidates, clusters, contaminated,
                           gram_hashes, jaccard, leaks, near_clusters, near_duplicates,
                           permutations, probability, repeated_lines, shingles, signature, words)
from data import Documents, split

OPTIONS = dict(threshold=0.8, n=5, hashes=128, bands=16, seed=0)
VOCABULARY = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnprst"]
HANZI = "".join(map(chr, range(0x4e00, 0x4e00 + 600)))


def corpus(n_originals=50, seed=0, n_words=150):
    """Texts of made-up words, each with up to three copies in which some words are others."""
    random, texts = Random(seed), []
    for _ in range(n_originals):
        original = random.choices(VOCABULARY, k=n_words)
        for n_changed in [0, *random.choices(range(1, 9), k=random.randrange(5))]:
            copy = original.copy()
            for at in random.sample(range(n_words), n_changed):
                copy[at] = random.choice(VOCABULARY)
            texts.append(" ".join(copy))
    random.shuffle(texts)
    return texts


def similar_pairs(texts, others, threshold, n=5):
    """{(i, j): Jaccard similarity} by brute force in plain Python, of texts without punctuation."""
    def runs(text):
        found = text.split()
        return {tuple(found[i:i + n]) for i in range(len(found) - n + 1)}
    texts, others = [*map(runs, texts)], [*map(runs, others)]
    return {(i, j): s for j, b in enumerate(others) for i, a in enumerate(texts)
            if (s := len(a & b) / len(a | b)) >= threshold}


def sets_of(similarity, random, size=300):
    """Two sorted arrays of about `size` random numbers in all, with this Jaccard similarity."""
    n_shared = round(similarity * size)
    numbers = random.randint(0, 2**63, size, np.uint64)
    half = n_shared + (size - n_shared) // 2
    return np.sort(numbers[:half]), np.sort(np.append(numbers[:n_shared], numbers[half:]))


def documents_of(texts):
    """Texts as data.Documents, in a file in memory."""
    ends = np.array([len(text.encode()) for text in texts]).cumsum()
    starts = np.append(0, ends[:-1])
    return Documents(io.BytesIO("".join(texts).encode()), starts, ends)


def test_the_examples_in_the_docstrings_are_true():
    assert words("Don't!") == [b"don", b"t"]
    assert clusters([(1, 2), (3, 2)], 5) == [[1, 2, 3]]


# -----------------------------------------------------------------------------
# Words and shingles.


@pytest.mark.parametrize("text, expected", [
    ("_Where_ is IT, then?", "where is it then"), ("naïve  “Don’t”—2nd", "naïve don t 2nd"),
    ("ＦＵＬＬ ｗｉｄｔｈ", "full width"), ("cafe\u0301", "café"), ("हिन्दी में", "हिन्दी में"),
    ("GPT很好，对吗？", "gpt 很 好 对 吗"), ("ひらカナ", "ひ ら カ ナ"), ("한국어 문장", "한국어 문장"),
    ("ไทย", "ไ ท ย"), ("Привет, МИР", "привет мир"), ("!?", "!?"), (" \n", "")])
def test_words_are_free_of_case_and_punctuation_and_characters_where_no_spaces_are(text, expected):
    assert b" ".join(words(text)).decode() == expected


def test_ascii_text_has_the_same_words_on_both_paths():
    for seed in range(200):
        text = "".join(Random(seed).choices([*map(chr, range(128))], k=300))
        assert words(text + " é")[:-1] == words(text)


@pytest.mark.parametrize("n", [1, 2, 5, 13, 250])
def test_shingles_are_as_many_as_the_different_runs_of_words(n):
    for seed in range(20):
        text = Random(seed).choices(VOCABULARY[:4], k=200)
        runs = {tuple(text[i:i + n]) for i in range(max(1, 200 - n + 1))}
        found = shingles(" ".join(text), n)
        assert found.dtype == np.uint64 and len(found) == len(runs) and (np.diff(found) > 0).all()


def test_grams_of_token_ids_of_any_type_have_the_same_hashes():
    ids = np.random.RandomState(0).randint(0, 3, 200)
    found = gram_hashes(ids.astype(np.uint16), 4)
    assert (found == gram_hashes(ids.tolist(), 4)).all() and len(gram_hashes([], 4)) == 0
    assert len({*found.tolist()}) == len({tuple(ids[i:i + 4].tolist()) for i in range(197)})


def test_shingles_depend_on_the_order_of_words_and_on_nothing_beside_words():
    assert set(shingles("a b c d", 2).tolist()) & set(shingles("b a d c", 2).tolist()) == set()
    assert (shingles("A b, c!", 2) == shingles("a\n(B) c", 2)).all()


def test_jaccard_is_that_of_pythons_sets():
    for seed in range(100):
        random = Random(seed)
        a, b = ({random.randrange(50) for _ in range(random.randrange(1, 60))} for _ in range(2))
        arrays = (np.array(sorted(x), np.uint64) for x in (a, b))
        assert jaccard(*arrays) == len(a & b) / len(a | b)


# -----------------------------------------------------------------------------
# MinHash and bands.


@pytest.mark.parametrize("size", [1, 7, near.BLOCK, near.BLOCK + 1, 3 * near.BLOCK + 5])
def test_a_signature_is_the_smallest_behind_each_permutation(size):
    found = np.unique(np.random.RandomState(size).randint(0, 2**63, size, np.uint64))
    both = permutations(16, 3)
    expected = [min((int(a) * int(x) + int(b)) % 2**32 for x in found) for a, b in both[..., 0].T]
    assert signature(found, both).tolist() == expected
    assert (both[0] % 2 == 1).all()  # so that it has an inverse modulo 2**32


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.95])
def test_hashes_agree_with_the_probability_of_the_jaccard_similarity(similarity):
    random, n_trials = np.random.RandomState(0), 400
    shares = []
    for seed in range(n_trials):
        a, b = sets_of(similarity, random)
        both = permutations(128, seed)
        shares.append((signature(a, both) == signature(b, both)).mean())
    variance = similarity * (1 - similarity) / 128
    assert abs(np.mean(shares) - similarity) < 4 * (variance / n_trials) ** 0.5
    assert 0.75 < np.var(shares) / variance < 1.3  # as of hashes that are independent


def test_hashes_of_real_shingles_agree_as_those_of_random_numbers():
    texts = corpus(30)
    sets, both = [shingles(text, 5) for text in texts], permutations(2048, 1)
    signatures = [signature(one, both) for one in sets]
    errors = [(signatures[i] == signatures[j]).mean() - jaccard(sets[i], sets[j])
              for i in range(len(texts)) for j in range(i)]
    assert np.abs(errors).max() < 5 * 0.5 / 2048**0.5


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_pairs_share_a_bucket_as_often_as_the_s_curve_says(similarity):
    random, n_trials = np.random.RandomState(1), 400
    n_found = 0
    for seed in range(n_trials):
        both = permutations(128, seed)
        a, b = (band_keys(signature(x, both), 16) for x in sets_of(similarity, random))
        n_found += (a == b).any()
    expected = probability(similarity, 128, 16)
    assert abs(n_found / n_trials - expected) < 4 * (expected * (1 - expected) / n_trials) ** 0.5


def test_keys_are_equal_where_bands_are_and_no_two_bands_share_one():
    one, other = np.arange(12, dtype=np.uint32), np.arange(12, dtype=np.uint32)
    other[5] = 99
    assert (band_keys(one, 4) == band_keys(other, 4)).tolist() == [True, False, True, True]
    assert len({*band_keys(np.zeros(12, np.uint32), 4).tolist()}) == 4


def test_keys_are_the_same_in_every_process():
    code = ("from chapters.near import *; print(band_keys(signature(shingles('a b c 漢字', 2), "
            "permutations(32, 5)), 4).tolist())")
    said = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert said[0] == said[1] != ""


# -----------------------------------------------------------------------------
# Clusters of near-duplicates.


def test_clusters_are_what_pairs_connect():
    for seed in range(50):
        random = Random(seed)
        pairs = [random.sample(range(30), 2) for _ in range(random.randrange(30))]
        reached = {i: {i} for i in range(30)}
        for _ in range(30):
            for i, j in pairs:
                reached[i] = reached[j] = reached[i] | reached[j]
                for k in reached[i]:
                    reached[k] = reached[i]
        expected = sorted({tuple(sorted(one)) for one in reached.values() if len(one) > 1})
        assert clusters(pairs, 30) == [*map(list, expected)]


@pytest.mark.slow
def test_none_below_the_threshold_is_dropped_and_none_is_missed_beyond_the_s_curve():
    texts = corpus()
    home = {i: cluster[0] for cluster in near_clusters(texts, **OPTIONS) for i in cluster}
    similar = {(i, j): s for (i, j), s in similar_pairs(texts, texts, 0.8).items() if i < j}
    found = [pair for pair in similar if home.get(pair[0], -1) == home.get(pair[1])]
    assert {*home} == {i for pair in found for i in pair}
    chances = [1 - probability(s, 128, 16) for s in similar.values()]
    spread = sum(chance * (1 - chance) for chance in chances) ** 0.5
    assert len(similar) > 40 and len(similar) - len(found) <= sum(chances) + 4 * spread


def test_with_a_hash_a_band_all_is_found_that_brute_force_finds():
    texts = corpus(40, seed=2)
    options = OPTIONS | dict(threshold=0.6, hashes=64, bands=64)
    assert near_clusters(texts, **options) == clusters(
        similar_pairs(texts, texts, 0.6), len(texts)) != []


def test_a_similarity_of_the_threshold_is_enough():
    options = dict(n=1, hashes=64, bands=64)
    assert near_duplicates(["a b c d", "a b c d e", "a b c"], 0.8, **options) == [1]
    assert near_duplicates(["a b c d", "a b c d e", "a b c"], 0.81, **options) == []


def test_the_order_of_texts_decides_only_which_is_first():
    texts = corpus(seed=3)
    found = {frozenset(texts[i] for i in cluster) for cluster in near_clusters(texts, **OPTIONS)}
    for seed in range(3):
        other = Random(seed).sample(texts, len(texts))
        assert found == {frozenset(other[i] for i in cluster)
                         for cluster in near_clusters(other, **OPTIONS)}
        first = {min(cluster) for cluster in near_clusters(other, **OPTIONS)}
        assert first.isdisjoint(near_duplicates(other))


def test_equal_texts_are_duplicates_whatever_they_are():
    texts = ["", "one", "!!!", "one two", "四", "a b c d e f", "", "One", "!!!", "one, two", "四",
             "A b c d e f!", "two", "???"]
    assert near_duplicates(texts) == [6, 7, 8, 9, 10, 11]
    assert near_duplicates([]) == near_duplicates(["alone"]) == []


def test_a_changed_character_does_not_hide_a_duplicate_in_a_script_without_spaces():
    random = Random(0)
    text, other = ("".join(random.choices(HANZI, k=400)) for _ in range(2))
    assert near_duplicates([text, other, text[:200] + "龘" + text[201:], text[:150]]) == [2]


def test_documents_in_a_file_give_what_a_list_gives():
    texts = corpus(20)
    assert near_duplicates(documents_of(texts)) == near_duplicates(texts) != []


def test_a_higher_threshold_drops_fewer_and_a_seed_gives_the_same_again():
    texts = corpus(30)
    assert {*near_duplicates(texts, 0.95)} < {*near_duplicates(texts, 0.7)}
    assert near_duplicates(texts, seed=7) == near_duplicates(texts, seed=7)


@pytest.mark.parametrize("size", [2, near.NEIGHBORS + 1, 500])
def test_the_pairs_of_a_bucket_are_all_of_a_small_one_and_few_of_a_large_one(size):
    pairs = [*bucket_pairs([*range(size)])]
    assert len({*pairs}) == len(pairs) <= near.NEIGHBORS * size
    assert len(pairs) == size * (size - 1) / 2 or size > near.NEIGHBORS + 1
    assert clusters(pairs, size) == [[*range(size)]]


def test_the_members_of_a_bucket_are_compared_in_their_order():
    keys = np.random.RandomState(0).randint(0, 3, (500, 2), np.uint64)
    pairs = [*candidates(keys)]
    assert len(pairs) > 5000 and all(i < j for i, j in pairs)
    assert all((keys[i] == keys[j]).any() for i, j in pairs)


def test_pages_that_share_a_frame_are_compared_with_few_others(monkeypatch):
    random, compared = Random(0), []
    monkeypatch.setattr(near, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    frame = " ".join(random.choices(VOCABULARY, k=150))
    texts = [f"{frame} {' '.join(random.choices(VOCABULARY, k=25))}" for _ in range(300)]
    assert near_duplicates(texts) == []
    assert 300 < len(compared) < 300 * near.NEIGHBORS * 16


@pytest.mark.parametrize("n", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_many_equal_documents_are_one_cluster(n):
    assert near_clusters(["the same few words in every document"] * n, **OPTIONS) == [[*range(n)]]


class Made:
    """A sequence of n different texts, none of which is in memory."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return f"{VOCABULARY[i % 600]} {VOCABULARY[i // 600]}"


def test_memory_is_less_than_two_hundred_bytes_a_document():
    peaks = []
    for n in 10, 500, 1500:  # the first call also fills caches
        tracemalloc.start()
        assert near_duplicates(Made(n)) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 128 <= (peaks[2] - peaks[1]) / 1000 < 200


def test_no_near_duplicate_lies_across_the_split():
    texts = corpus(60, seed=4)
    drop = {*near_duplicates(texts)}
    kept = [text for i, text in enumerate(texts) if i not in drop]

    def across(texts):
        train, val, _ = split(documents_of(texts), 0.3)
        assert len(train) + len(val) == len(texts)
        return similar_pairs(train, val, 0.9)
    assert across(texts) and not across(kept)


@pytest.mark.parametrize("change", [dict(threshold=0), dict(threshold=1.1), dict(n=0),
                                    dict(hashes=0, bands=0), dict(bands=7), dict(bands=256),
                                    dict(hashes=-128), dict(seed=-1), dict(threshold=float("nan")),
                                    dict(hashes=10**9, bands=10)])
def test_wrong_options_are_refused(change):
    with pytest.raises(ValueError):
        near_duplicates(["a", "b"], **change)


@pytest.mark.parametrize("opening", ["a", "a ", "_", "\u0301", "漢", "a漢", "\n", "’", "\u200d"])
def test_hostile_text_ends(opening):
    text = opening * (200_000 // len(opening))
    assert len(shingles(text, 5)) <= 5 and [*leaks([text], ["a b c d e"])] == []
    assert len([*repeated_lines([text])]) == 1


# -----------------------------------------------------------------------------
# Repeated lines.


def test_lines_that_occurred_before_go_unless_short_blank_or_indented():
    a, b = "This is the footer of each page of a site", "This is another line that is long, as well"
    texts = [f"{a}\n\nshort\n{b}", f"short\n\n{a}\nnew\n  {a}", f"\t{a}\n{b}\n\t{a}", a, ""]
    assert [*repeated_lines(texts)] == [
        f"{a}\n\nshort\n{b}", f"short\n\nnew\n  {a}", f"\t{a}\n\t{a}", "", ""]
    assert [*repeated_lines(texts, least=1)][1] == f"\nnew\n  {a}"


def test_a_line_is_long_by_its_bytes():
    assert [*repeated_lines(["漢" * 14] * 2)] == ["漢" * 14, ""]
    assert [*repeated_lines(["h" * 14] * 2)] == ["h" * 14] * 2


def test_repeated_lines_are_those_of_a_plain_set():
    random = Random(0)
    texts = ["\n".join(f"line {random.randrange(900)}" for _ in range(random.randrange(40)))
             for _ in range(100)]
    seen, expected = set(), []
    for text in texts:
        lines = [line for line in text.split("\n")
                 if len(line) < 7 or not (line in seen or seen.add(line))]
        expected.append("\n".join(lines))
    assert [*repeated_lines(iter(texts), least=7)] == expected != texts


def test_known_lines_take_eight_bytes_each():
    random, runs, known = np.random.RandomState(0), [], set()
    for _ in range(200):
        hashes = random.randint(0, 20_000, random.randint(300), np.uint64)
        new = [at for at, x in enumerate(hashes.tolist()) if not (x in known or known.add(x))]
        assert sorted(add_new(hashes, runs).tolist()) == new
    assert sum(run.nbytes for run in runs) == 8 * len(known)
    assert len(runs) <= 15 and all((np.diff(run.astype(float)) > 0).all() for run in runs)


# -----------------------------------------------------------------------------
# Questions of an evaluation.

QUESTION = ("A train leaves the station at nine and travels sixty miles an hour. How far has it "
            "come at noon?")


def test_case_punctuation_and_lines_do_not_hide_a_question():
    hidden = "intro " + QUESTION.upper().replace(" ", " *\n").replace(".", " -- ") + " outro"
    assert contaminated(["nothing here", hidden, "", QUESTION], [QUESTION]) == [1, 3]


def test_thirteen_words_in_a_row_are_a_leak_and_twelve_are_none():
    parts = [" ".join(QUESTION.split()[3:3 + n]) for n in (12, 13)]
    assert [*leaks(parts, ["another one of some words", QUESTION])] == [
        (1, 1, "the station at nine and travels sixty miles an hour how far has")]
    assert contaminated(parts, [QUESTION], n=12) == [0, 1]


def test_a_shorter_question_must_occur_whole_and_a_very_short_one_never_counts():
    texts = ["So what is the capital of France? Paris.", "what is the capital of Spain", "yes"]
    asked = ["What is the capital of France?", "Yes", "the capital of"]
    assert [*leaks(texts, asked)] == [(0, 0, "what is the capital of france")]
    assert contaminated(texts, ["capital"], n=1) == [0, 1]


def test_chinese_questions_are_found_by_their_characters():
    question = "小明有三个苹果，又买了五个，一共有几个苹果？"
    texts = ["题目：小明有三个苹果又买了五个一共有几个苹果", "小明有三个梨，又买了六个，一共有几个苹果？"]
    assert contaminated(texts, [question]) == [0]


def test_leaks_are_those_of_a_plain_search():
    random = Random(1)
    texts, questions = ([" ".join(random.choices(VOCABULARY[:3], k=random.randint(5, longest)))
                         for _ in range(n)] for n, longest in ((200, 60), (20, 20)))
    grams = {" ".join(words[i:i + 8]) for words in map(str.split, questions)
             for i in range(max(1, len(words) - 7))}
    expected = [i for i, text in enumerate(texts) if any(f" {g} " in f" {text} " for g in grams)]
    assert contaminated(texts, questions, n=8) == expected
    assert 0 < len(expected) < 200
    for i, j, passage in leaks(texts, questions, n=8):
        assert f" {passage} " in f" {texts[i]} " and f" {passage} " in f" {questions[j]} "


def test_one_text_instead_of_a_list_of_questions_is_refused():
    for questions, n in (QUESTION, 13), ([QUESTION], 0):
        with pytest.raises(ValueError, match="list of texts"):
            contaminated([QUESTION], questions, n)


# -----------------------------------------------------------------------------
# The command.


def test_the_command_prints_each_cluster_with_its_similarities(call, tmp_path):
    text = " ".join(VOCABULARY[:105])
    (tmp_path / "a.txt").write_text(f"{text}\n<|endoftext|>\n<|endoftext|>another one", "utf-8")
    (tmp_path / "b.txt").write_text(text.replace(VOCABULARY[50], "new"), "utf-8")
    said = call(near, tmp_path / "a.txt", tmp_path / "b.txt").out
    assert said == (f"{tmp_path}/a.txt, document 1\n  0.91  {tmp_path}/b.txt, document 1\n"
                    "3 documents, 1 of them to drop\n")
    said = call(near, tmp_path / "a.txt", tmp_path / "b.txt", "--threshold=0.95").out
    assert said == "3 documents, 0 of them to drop\n"


@pytest.mark.parametrize("words, problem", [
    (["none.txt"], "none.txt: no such file"), ([__file__, "--bands=7"], "a multiple of bands=7"),
    ([__file__, "--threshold=2"], "threshold=2.0 must be above 0 and at most 1")])
def test_a_mistake_is_one_line(words, problem, monkeypatch, capsys):
    code, (line,) = mistake(near.main, monkeypatch, capsys, *words)
    assert code == 1 and problem in line
