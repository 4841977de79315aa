"""chapters/ngrams.py and chapters/classify.py: n-grams, logistic regression and what they judge."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import ROOT, mistake
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from chapters import classify, ngrams
from chapters.classify import language, quality_classifier, read_examples, toxicity
from chapters.ngrams import (Classifier, Settings, features, loss_and_gradient,
                             ngram_buckets, only_letters, precision_recall, roc_auc, softmax)

COLOURS = ["red rose", "red wine", "a red car", "blue sky", "blue sea", "so blue"]
NAMES = ["red"] * 3 + ["blue"] * 3


def problem(seed=0, n_texts=7, n_buckets=11, n_classes=3):
    """Random rows of buckets, their truth and weights, in float64; and the rows as a matrix."""
    random = np.random.RandomState(seed)
    rows = [random.randint(n_buckets, size=random.randint(1, 9)) for _ in range(n_texts)]
    labels = random.randint(n_classes, size=n_texts)
    dense = np.stack([np.bincount(row, minlength=n_buckets) / len(row) ** 0.5 for row in rows])
    return rows, np.eye(n_classes)[labels], random.randn(n_buckets, n_classes), dense


def torch_loss(weights, dense, truth, l2):
    logits = torch.from_numpy(dense) @ weights
    return F.cross_entropy(logits, torch.from_numpy(truth)) + l2 / 2 * (weights**2).sum()


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_autograd(seed):
    rows, truth, weights, dense = problem(seed)
    loss, gradient = loss_and_gradient(weights, rows, truth, 0.1)
    variable = torch.tensor(weights, requires_grad=True)
    reference = torch_loss(variable, dense, truth, 0.1)
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, variable.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_training_ends_at_the_optimum():
    options = dict(characters=2, buckets=64)
    classifier = Classifier.train(COLOURS, NAMES, l2=0.01, steps=600, rate=0.5, **options)
    rows = [features(text, classifier.settings) for text in COLOURS]
    truth = np.array(NAMES)[:, None] == np.array(classifier.settings.labels)
    loss, _ = loss_and_gradient(classifier.weights, rows, truth, 0.01)
    dense = np.stack([np.bincount(row, minlength=64) / len(row) ** 0.5 for row in rows])
    best = torch.zeros(128, dtype=torch.float64)
    objective = lambda flat: torch_loss(flat.view(64, 2), dense, truth.astype(float), 0.01)
    for _ in range(8):  # Newton's method: exact within a few steps
        gradient, hessian = (derive(objective, best) for derive in (jacobian, hessian_of))
        best -= torch.linalg.solve(hessian, gradient)
    assert jacobian(objective, best).abs().max() < 1e-9
    assert -1e-6 <= loss - objective(best).item() <= 1e-4


def test_the_bucket_of_an_ngram_is_the_polynomial_of_its_codes():
    codes, n, size = [104, 1 << 20, 7, 104, 1 << 20], 3, 256
    expected = []
    for length in range(1, n + 1):
        for start in range(len(codes) - length + 1):
            value = 5
            for code in codes[start:start + length]:
                value = value * 0x9E3779B1 + code
            expected.append((value * 0x9E3779B1 % 2**32) >> 24)
    found = ngram_buckets(np.array(codes, np.uint32), n, size, np.uint32(5))
    assert found.tolist() == expected


@pytest.mark.parametrize("buckets", [2, 2**10, 2**24])
def test_buckets_are_used_evenly(buckets):
    found = ngram_buckets(np.arange(4000, dtype=np.uint32), 2, buckets, ngrams.CHARACTERS)
    assert 0 <= found.min() and found.max() < buckets
    expected = buckets * (1 - (1 - 1 / buckets) ** len(found))
    assert len({*found.tolist()}) > 0.9 * expected


def test_features_do_not_depend_on_pythons_own_hash():
    code = ("from chapters.ngrams import *; print(features('Two red foxes, 3 мыши',"
            "Settings([0, 1], words=2)).tolist())")
    seen = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                           capture_output=True, env={"PYTHONHASHSEED": seed}).stdout
            for seed in "12"}
    assert len(seen) == 1 and len(json.loads(seen.pop())) > 50


def test_case_digits_and_marks_are_no_features_of_letters():
    assert only_letters("It's 5!") == " it s "
    assert only_letters("हिन्दी, ठीक।") == " हिन्दी ठीक। "
    settings = Settings([0, 1])
    assert (features("Ein HAUS?", settings) == features("«ein»  haus 42", settings)).all()


def test_a_character_and_a_block_of_the_same_number_are_two_features():
    assert ord("む") >> 7 == ord("a")
    settings = Settings([0, 1], characters=1, buckets=2**24)
    a, mu, blank = ({*features(text, settings).tolist()} for text in ("a", "む", ""))
    assert a & mu == blank and len(a - blank) == 1 and len(mu - blank) == 2


def test_a_word_feature_sees_marks_and_order():
    settings = Settings([0, 1], characters=1, words=2)
    counts = [Counter(features(text, settings).tolist()) for text in ("a b", "b a", "a b!")]
    assert counts[0] != counts[1] and counts[0] != counts[2]


@pytest.mark.parametrize("text", ["", " ", "\0", "\ud800", "İ", "\U0010ffff", "!?", "\u200d" * 99])
def test_every_text_has_features_and_probabilities(text):
    classifier = Classifier.train(COLOURS, NAMES, words=2, buckets=256)
    assert len(features(text, classifier.settings)) >= 1
    assert classifier.probabilities([text]).sum() == pytest.approx(1)
    assert language(text)[0] == "und" and 0 <= toxicity(text) <= 1


def test_softmax_of_huge_logits_is_finite():
    assert softmax(np.array([[1e30, 0, -1e30]])).tolist() == [[1, 0, 0]]


def test_what_is_beyond_the_limit_changes_nothing():
    classifier = Classifier.train(COLOURS, NAMES, limit=8)
    one, other = classifier.probabilities(["red rose and so on", "red rose blue sky"])
    assert (one == other).all()


def test_training_twice_gives_the_same_weights_and_another_seed_others():
    options = dict(batch_size=2, buckets=256, steps=7)
    first, again, other = (Classifier.train(COLOURS, NAMES, seed=seed, **options).weights
                           for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_a_classifier_that_is_saved_and_loaded_is_the_same(tmp_path):
    classifier = Classifier.train(COLOURS, NAMES, words=1, buckets=256)
    classifier.save(tmp_path / "colours.npz")
    loaded = Classifier.load(tmp_path / "colours.npz")
    assert loaded.settings == classifier.settings
    assert (loaded.probabilities(COLOURS) == classifier.probabilities(COLOURS)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["colours.npz"]


def damaged(path, settings=None, weights=None, **more):
    good = dict(labels=["a", "b"], characters=2, words=0, buckets=4, limit=9)
    text = json.dumps(good | (settings or {}))
    np.savez(path, settings=text, weights=np.zeros((4, 2), np.float32) if weights is None
             else weights, **more)


@pytest.mark.parametrize("changes, reason", [
    (dict(settings=dict(buckets=8)), "they must be finite, float32 (8, 2)"),
    (dict(settings=dict(buckets=6)), "buckets=6 must be a power of two"),
    (dict(settings=dict(buckets=2**30)), "buckets=1073741824 must be 2 to 16777216"),
    (dict(settings=dict(characters=0)), "characters=0 must be 1 to 8"),
    (dict(settings=dict(words=-1)), "words=-1 must be 0 to 4"),
    (dict(settings=dict(labels=["a"])), "must be two or more"),
    (dict(settings=dict(labels=["a", ["b"]])), "must be two or more"),
    (dict(settings=dict(labels=["a", 1])), "all int or all str"),
    (dict(settings=dict(label=1)), "unknown field 'label', did you mean labels?"),
    (dict(settings=dict(limit="9")), "limit='9' must be int"),
    (dict(weights=np.zeros((4, 3), np.float32)), "its weights are float32 (4, 3)"),
    (dict(weights=np.zeros((4, 2))), "its weights are float64 (4, 2)"),
    (dict(weights=np.full((4, 2), np.nan, np.float32)), "they must be finite"),
    (dict(weights=np.array([[print]])), "allow_pickle=False")])
def test_a_damaged_file_is_refused_with_its_reason(tmp_path, changes, reason):
    damaged(tmp_path / "a.npz")
    assert Classifier.load(tmp_path / "a.npz").weights.shape == (4, 2)
    damaged(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError) as error:
        Classifier.load(tmp_path / "a.npz")
    assert reason in str(error.value) and str(tmp_path / "a.npz") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4" + bytes(99), b"\x93NUMPY" + bytes(9)])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="a.npz cannot be read"):
        Classifier.load(tmp_path / "a.npz")


def test_a_truncated_file_is_refused(tmp_path):
    damaged(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / "a.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.npz"):
            Classifier.load(tmp_path / "a.npz")


@pytest.mark.parametrize("texts, labels, options, reason", [
    (["a"], ["x", "y"], {}, "1 texts have 2 labels"), (["a", "b"], ["x", "x"], {}, "two or more"),
    ([], [], {}, "two or more"), (["a", "b"], [0, 1], dict(buckets=100), "buckets=100 must be a"),
    (["a", "b"], [0.5, 1.5], {}, "all int or all str")])
def test_what_cannot_be_learned_is_refused(texts, labels, options, reason):
    with pytest.raises(ValueError, match=reason):
        Classifier.train(texts, labels, **options)


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_how_often_a_positive_scores_above_a_negative(seed):
    random = Random(seed)
    scores, truth = [random.randrange(5) for _ in range(40)], [0, 1] * 20
    pairs = [(a, b) for a, x in zip(scores, truth) if x for b, y in zip(scores, truth) if not y]
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert roc_auc(scores, truth) == pytest.approx(expected)
    assert roc_auc([0.9, 0.2], [1, 0]) == 1


def test_precision_and_recall_count_hits():
    assert precision_recall([.9, .8, .4, .1], [1, 0, 1, 0], 0.5) == dict(precision=.5, recall=.5)
    assert precision_recall([.1], [0], 0.5) == dict(precision=0, recall=0)


def test_the_examples_are_whole_and_no_text_is_on_both_sides():
    for name, label in ("languages.jsonl", "language"), ("toxic.jsonl", "toxic"):
        train, test = (read_examples(name, use) for use in ("train", "test"))
        assert {*train[0]} == {label, "text", "use"}
        assert {row[label] for row in train} == {row[label] for row in test}
        texts = [row["text"] for row in train + test]
        lines = Path(classify.HERE, name).read_text("utf-8").splitlines()
        assert len(texts) == len({*texts}) == len(lines)
    assert Path(classify.HERE, "languages.jsonl").stat().st_size <= 350_000


def test_nineteen_languages_have_eighty_sentences_to_learn_from_and_thirty_held_out():
    for use, least in ("train", 80), ("test", 30):
        counts = Counter(row["language"] for row in read_examples("languages.jsonl", use))
        assert len(counts) == 19 and min(counts.values()) >= least


def test_held_out_text_is_recognised():
    right = Counter()
    for size, share in (None, 0.97), (100, 0.99), (50, 0.97), (20, 0.85):
        judged = [language(text)[0] == name for name, text in classify.pieces(size)]
        right[size] = sum(judged) / len(judged)
        assert right[size] >= share
    assert right[100] >= right[50] >= right[20]


@pytest.mark.parametrize("text", ["Բարեւ Ձեզ, ինչպես եք այսօր", "สวัสดีครับ วันนี้อากาศดี", "🎉🎉🎉",
                                  "1984 + 17 = ?", "გამარჯობა მეგობრებო", "∀∃ → ∅"])
def test_a_text_without_known_letters_is_undetermined(text):
    assert language(text) == ("und", 0)


def test_a_word_or_two_of_another_script_do_not_hide_a_language():
    assert language("В этой программе есть кнопка OK и поле URL для адреса")[0] == "ru"
    assert language("Guten Morgen, wie geht es dir? 早上好")[0] == "de"


def test_the_probability_of_a_language_is_the_classifiers():
    classifier, _ = classify.language_classifier()
    for _, text in [*classify.pieces()][::29]:
        assert language(text)[1] == classifier.probabilities([text]).max()


def test_a_long_text_is_judged_by_its_beginning():
    start = next(text for name, text in classify.pieces(100) if name == "nl")
    assert language((start + " ") * 20 + "这" * 100_000)[0] == "nl"


@pytest.mark.parametrize("text", ["a" * 100_000, "!" * 100_000, "a!" * 50_000, "\n" * 100_000,
                                  "a\n" * 50_000, "İ" * 100_000, "\u0301" * 100_000])
def test_hostile_texts_are_judged_in_linear_time(text):
    assert 0 <= language(text)[1] <= 1 and 0 <= toxicity(text) <= 1


def test_toxic_lines_rank_above_harmless_twins():
    rows = read_examples("toxic.jsonl", "test")
    scores, truth = [toxicity(row["text"]) for row in rows], [row["toxic"] for row in rows]
    figures = precision_recall(scores, truth, 0.5)
    assert roc_auc(scores, truth) > 0.9 and min(figures.values()) > 0.75


def test_the_toxicity_of_a_text_is_the_mean_of_its_lines():
    bad, good = "You are a stupid liar.", "The harbour was quiet."
    assert toxicity(bad) > 0.5 > toxicity(good)
    assert toxicity(f"{bad}\n\n{good}\n") == pytest.approx((toxicity(bad) + toxicity(good)) / 2)
    assert toxicity("\n".join([bad] * 100 + [good] * 100)) == pytest.approx(
        (toxicity(bad) + toxicity(good)) / 2)
    assert toxicity(f"{bad}\n{good}\n" * 100) == pytest.approx(toxicity(bad))  # each second line
    assert toxicity("") == toxicity("\n \n") == 0


def documents(words, n=60, seed=0):
    random = Random(seed)
    return [" ".join(random.choices(words.split(), k=40)) for _ in range(n)]


GOOD = documents("the cell divides because its membrane grows and proteins fold")
BAD = documents("click here buy now cheap !!! free offer login and the")


def test_a_quality_classifier_tells_unseen_documents_apart():
    classifier, figures = quality_classifier(GOOD, BAD)
    assert figures == dict(AUC=1, precision=1, recall=1)
    new = documents("the cell grows and membrane proteins", seed=9)[0]
    assert classifier.score(new) > 0.5 > classifier.score("free offer !!! click now")


def test_a_quality_classifier_does_not_see_what_is_held_out():
    # Documents without a word in common: only those learned by heart could be told apart.
    random = Random(0)
    texts = [" ".join(str(random.random()) for _ in range(20)) for _ in range(200)]
    _, figures = quality_classifier(texts[::2], texts[1::2])
    assert 0.2 < figures["AUC"] < 0.8


def test_copies_of_a_document_do_not_count_as_held_out():
    with pytest.raises(ValueError, match="9 different good documents are too few"):
        quality_classifier(GOOD[:9] * 5, BAD)


def write_jsonl(path, texts):
    path.write_text("\n".join(json.dumps(dict(text=text)) for text in texts), "utf-8")
    return path


def test_the_commands_print_a_line_for_each_document(tmp_path, call):
    texts = ["Der Zug nach Hause kommt heute wieder zu spät.", "今日はとても寒いですね。"]
    out, err = call(classify, "language", write_jsonl(tmp_path / "a.jsonl", texts))
    assert [line[:2] for line in out.splitlines()] == ["de", "ja"] and err == ""
    good, bad = write_jsonl(tmp_path / "g.jsonl", GOOD), write_jsonl(tmp_path / "b.jsonl", BAD)
    out, err = call(classify, "quality", f"--like={good}", f"--unlike={bad}", good)
    first, *scores = out.splitlines()
    assert first == "held out: AUC 1.000, precision 1.000, recall 1.000" and err == ""
    assert len(scores) == 60 and all(float(line.split()[0]) > 0.5 for line in scores)


def test_without_arguments_the_tables_are_printed(call):
    out, err = call(classify)
    lines = out.splitlines()
    assert err == "" and max(map(len, lines)) <= 100
    assert sum(line.startswith("all ") for line in lines) == 1
    assert sum(line.startswith("zh ") for line in lines) == 2 and "threshold" in lines[-5]


@pytest.mark.parametrize("words, reason", [
    (["quality", "--like=a.txt"], "quality needs both --like=good.txt and --unlike=bad.txt"),
    (["quality"], "quality needs both"), (["language"], "language needs a file to judge"),
    (["table", "a.txt"], "table takes no files"),
    (["language", "a.txt", "--like=b.txt"], "--like would not act beside language"),
    (["language", "none.txt"], "none.txt"), (["quality", "--like=none.txt", "--unlike=b"], "none")])
def test_a_mistake_is_one_line(monkeypatch, capsys, words, reason):
    code, (line,) = mistake(classify.main, monkeypatch, capsys, *words)
    assert code == 1 and reason in line
