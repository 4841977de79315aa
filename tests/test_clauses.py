"""Facts about chapters/clauses.py: clauses of templates, and what guesses are worth."""

import json
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from conftest import keep, mistake, tiny

from chapters import clauses as leaf
from chapters.clauses import (NAME, as_prompt, class_probabilities, clauses, guess, guess_by_answer,
                              macro_f1, make, read_labelled, score, worth)
from chapters.classify import read_examples
from chapters.ngrams import Classifier
from data import ClassLoader, prepare
from evaluate import wilson
from tokenizer import Tokenizer, write_json

TEMPLATES = {use: read_examples(NAME, use) for use in ("train", "test")}
LABELS = sorted({row["label"] for row in TEMPLATES["train"]})


def pattern(template):
    """What matches the clauses of a template, without beginning and end."""
    parts = re.split(r"\{\w+\}", template)
    return re.compile(".+".join(map(re.escape, parts)), re.IGNORECASE)


def made_run(folder, tokenizer, n_classes=8, labels=LABELS, block_size=128):
    """An untrained model in a run's folder -> (the model, the folder)."""
    model = tiny(vocab_size=tokenizer.n_vocab, n_classes=n_classes, block_size=block_size)
    torch.nn.init.normal_(model.lm_head.weight)  # else all classes are equally likely
    keep(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "config.json", dict(data=dict(labels=labels)))
    return model, folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([row["text"] for row in clauses(64, "train")], 400)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """A folder with few rows to train and to test on."""
    folder = tmp_path / "clauses"
    folder.mkdir()
    write_rows(folder / "train.jsonl", clauses(64, "train"))
    write_rows(folder / "test.jsonl", clauses(24, "test"))
    return folder


# -----------------------------------------------------------------------------
# Clauses.


def test_there_are_eight_types_with_as_many_templates_each():
    for use, n in ("train", 12), ("test", 5):
        assert Counter(row["label"] for row in TEMPLATES[use]) == dict.fromkeys(LABELS, n)
    assert len(LABELS) == 8


@pytest.mark.parametrize("n", [1, 8, 203])
def test_labels_are_equally_frequent_or_one_behind_and_texts_differ(n):
    rows = clauses(n, "train")
    counts = Counter(row["label"] for row in rows)
    assert len({row["text"] for row in rows}) == n
    assert max(counts.values()) - min(counts[label] for label in LABELS) == (n % 8 > 0)


def test_a_seed_gives_the_same_rows_again_and_another_seed_others():
    assert clauses(50, "train", 3) == clauses(50, "train", 3)
    texts = [{row["text"] for row in clauses(200, "train", seed)} for seed in (3, 4)]
    assert len(texts[0] & texts[1]) < 20


def test_the_order_of_rows_tells_nothing_of_the_labels():
    labels = [row["label"] for row in clauses(800, "test")]
    assert len(Counter(zip(labels, labels[1:]))) == 64


def test_a_text_is_of_the_template_that_it_names_and_no_test_template_is_in_training():
    patterns = {use: [pattern(row["text"]) for row in rows] for use, rows in TEMPLATES.items()}
    for use, other in ("train", "test"), ("test", "train"):
        for row in clauses(400, use):
            named, number = row["template"].split()
            assert named == use and TEMPLATES[use][int(number)]["label"] == row["label"]
            assert patterns[use][int(number)].search(row["text"])
            assert not any(other.search(row["text"]) for other in patterns[other])


def test_all_fields_are_filled_and_sentences_begin_and_end_as_such():
    for row in clauses(2000, "train") + clauses(1000, "test"):
        text = row["text"]
        assert not re.search(r"[{}]|  |\bthe the\b|\.\.", text)
        assert text[0].isupper() and text[-1] == "."
        assert all(part[0].isupper() for part in text.split(". "))


def test_beginnings_and_ends_are_as_frequent_in_every_type():
    rows = clauses(8000, "train")
    for use in "beginning", "end":
        for part in read_examples(NAME, use):
            found = pattern(part["text"])
            counts = Counter(row["label"] for row in rows if found.search(row["text"]))
            mean = sum(counts.values()) / 8
            assert mean > 30 and all(abs(counts[label] - mean) < 5 * mean**0.5 for label in LABELS)


def test_a_beginning_names_any_type_its_own_as_often_as_another():
    named = Counter()
    for row in clauses(8000, "train"):
        found = re.match(r"(?:Subject|Save|Without).*? on (.+?),", row["text"])
        named[found and found[1], row["label"]] += 1
    assert 3000 < sum(named[None, label] for label in LABELS) < 5000
    pairs = [named[one, other] for one in LABELS for other in LABELS]
    assert min(pairs) > 30 and max(pairs) < 130
    assert sum(named[label, label] for label in LABELS) / sum(pairs) == pytest.approx(1 / 8, 0.2)


def test_types_share_words_that_seem_to_tell_them():
    owners = {}
    for row in TEMPLATES["train"]:
        for word in re.findall(r"\w+", row["text"]):
            owners.setdefault(word, set()).add(row["label"])
    for word in "consent third payment damages breach confidential terminate liable notice".split():
        assert len(owners[word]) > 1, word


def test_a_bag_of_words_knows_the_training_templates_and_not_all_of_the_others():
    train, test = clauses(800, "train"), clauses(400, "test")
    classifier = Classifier.train([row["text"] for row in train], [row["label"] for row in train],
                                  characters=1, words=1)
    known, new = (np.mean([LABELS[i] == row["label"] for i, row in zip(classifier.probabilities(
        [row["text"] for row in rows]).argmax(1), rows)]) for rows in (train, test))
    assert known > 0.97 and 0.5 < new < 0.9


def test_make_writes_both_files_and_data_py_prepares_them_with_their_labels(tmp_path, capsys):
    make(tmp_path / "made", 80, seed=1)
    rows = read_labelled(tmp_path / "made" / "train.jsonl")
    assert rows == clauses(80, "train", 1)
    assert read_labelled(tmp_path / "made" / "test.jsonl") == clauses(20, "test", 1)
    assert "next: python train.py --init=RUN --data=" in capsys.readouterr().out
    shards = prepare([tmp_path / "made" / "train.jsonl"], tmp_path / "shards", vocab_size=300,
                     say=lambda text: None)
    loader = ClassLoader(shards, 4, 512)
    assert loader.labels == LABELS
    # what a classifier is asked is what it has learned from
    tokenizer = Tokenizer.load(shards / "tokenizer.json")
    prompts = {tuple(tokenizer.render_prompt([dict(role="user", content=row["text"])])):
               row["label"] for row in rows}
    for x, y, segments in (next(loader) for _ in range(10)):
        for ids, number, own in zip(x, y, segments):
            assert prompts[tuple(ids[own > 0].tolist())] == LABELS[number]


# -----------------------------------------------------------------------------
# Guesses.


def test_a_head_guesses_for_each_text_what_it_guesses_for_it_alone(tmp_path, tokenizer):
    model, folder = made_run(tmp_path, tokenizer)
    rows = clauses(36, "test")
    prompts = [as_prompt(tokenizer, row["text"]) for row in rows]
    parts = torch.cat([model(torch.tensor([ids]))[0].softmax(dim=1) for ids in prompts])
    torch.testing.assert_close(class_probabilities(model, prompts), parts)
    alone = parts.argmax(dim=1).tolist()
    assert len({*alone}) > 2
    assert guess(folder, rows) == ("head", [LABELS[i] for i in alone], LABELS)


def test_of_a_long_text_a_head_reads_what_it_was_trained_on(tokenizer):
    model = tiny(vocab_size=tokenizer.n_vocab, n_classes=8, block_size=16)
    torch.nn.init.normal_(model.lm_head.weight)
    prompts = [Random(i).choices(range(300), k=16) for i in range(20)]
    longer = [ids + Random(7).choices(range(300), k=i) for i, ids in enumerate(prompts)]
    assert class_probabilities(model, longer).equal(class_probabilities(model, prompts))


@pytest.mark.parametrize("by_file", [False, True])
def test_ask_prints_how_likely_each_label_is_the_likeliest_first(by_file, tmp_path, tokenizer,
                                                                 call):
    model, folder = made_run(tmp_path / "run", tokenizer)
    (tmp_path / "clause").write_bytes("\ufeffEither party may \r\nassign.\r\n".encode())
    text = f"--file={tmp_path / 'clause'}" if by_file else "--prompt=Either party may\nassign."
    ids = tokenizer.render_prompt([dict(role="user", content="Either party may\nassign.")])
    chances = model(torch.tensor([ids]))[0][0].softmax(dim=0).tolist()
    best_first = sorted(zip(chances, LABELS), reverse=True)
    assert call(leaf, "ask", folder, text) == (
        "".join(f"{chance:.4f}  {label}\n" for chance, label in best_first), "")
    assert chances != sorted(chances, reverse=True)


def test_ask_says_that_a_long_text_is_cut_and_asks_as_in_training(tmp_path, tokenizer, call):
    _, folder = made_run(tmp_path / "run", tokenizer, block_size=16)
    n = len(tokenizer.render_prompt([dict(role="user", content="#" * 99)]))
    (one, said), (other, _) = (call(leaf, "ask", folder, "--prompt=" + "#" * 20 + end * 79)
                               for end in "#?")
    assert one == other and n > 16
    assert said == f"warning: the text is cut, as in training, to 16 of {n} tokens\n"


@pytest.mark.parametrize("options, words, said", [
    ({}, ["--prompt=a", "--file=b"], "ask takes one text: --prompt=TEXT or --file=FILE"),
    ({}, [], "ask takes one text: --prompt=TEXT or --file=FILE"),
    ({}, ["--file=none.txt"], "No such file or directory: none.txt"),
    (dict(n_classes=0), ["--prompt=a"], "run has no head for classes: python sample.py"),
    (dict(n_classes=1), ["--prompt=a"], "has 8 labels for n_classes=1"),
    (dict(labels=LABELS[:3]), ["--prompt=a"], "has 3 labels for n_classes=8")])
def test_what_cannot_be_asked_is_one_line(options, words, said, tmp_path, tokenizer, monkeypatch,
                                          capsys):
    _, folder = made_run(tmp_path / "run", tokenizer, **options)
    code, (line,) = mistake(leaf.main, monkeypatch, capsys, "ask", folder, *words)
    assert code == 1 and said in line


def likelihood(model, prompt, answer):
    """The log-probability of an answer to a prompt, both of them ids, by its definition."""
    logs = model(torch.tensor([prompt + answer]))[0][0].log_softmax(dim=-1)
    return sum(logs[len(prompt) - 1 + i, id].item() for i, id in enumerate(answer))


def test_an_answer_is_guessed_that_is_likeliest_as_a_whole():
    random, model = Random(0), tiny(block_size=32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    prompts = [random.choices(range(64), k=random.randint(1, 20)) for _ in range(40)]
    answers = [random.choices(range(64), k=k) for k in (2, 2, 2, 3)]
    expected = [int(np.argmax([likelihood(model, prompt, answer) for answer in answers]))
                for prompt in prompts]
    assert guess_by_answer(model, prompts, answers) == expected and len({*expected}) > 2


def test_a_chat_model_is_asked_as_in_a_chat_for_a_label_and_the_end(tmp_path, tokenizer,
                                                                    monkeypatch):
    rows, asked = clauses(4, "test"), []
    monkeypatch.setattr(leaf, "guess_by_answer",
                        lambda model, *ids: asked.extend(ids) or [5, 0, 2, 2])
    _, folder = made_run(tmp_path, tokenizer, n_classes=0)
    assert guess(folder, rows) == ("answer", [LABELS[i] for i in (5, 0, 2, 2)], LABELS)
    assert asked == [
        [tokenizer.render_prompt([dict(role="user", content=row["text"])]) for row in rows],
        [[*tokenizer.encode(label), tokenizer.special["<|end|>"]] for label in LABELS]]


def test_the_end_counts_as_part_of_an_answer():
    model = tiny(vocab_size=8, block_size=8)
    with torch.no_grad():  # the next token is the last one and one: 0 1 2 ...
        for block in model.transformer.blocks:
            block.attn.o_proj.weight.zero_(), block.mlp.down_proj.weight.zero_()
        model.transformer.wte.weight.zero_()[:, :8] = torch.eye(8)
        model.lm_head.weight.zero_()[:, :8] = torch.eye(8).roll(1, 0)
    assert guess_by_answer(model, [[0], [2, 1], [4]], [[1, 7], [1, 2], [5, 6]]) == [1, 1, 2]


def test_classes_have_the_names_that_the_run_gives_them(tmp_path, tokenizer):
    rows = clauses(12, "test")
    (_, first, _), (_, second, _) = (
        guess(made_run(tmp_path / str(i), tokenizer, labels=labels)[1], rows)
        for i, labels in enumerate((LABELS, LABELS[::-1])))
    assert [LABELS.index(label) for label in first] == [7 - LABELS.index(label) for label in second]


# -----------------------------------------------------------------------------
# What they are worth.


def test_macro_f1_is_the_mean_of_the_classes_harmonic_means():
    random = np.random.RandomState(0)
    for _ in range(20):
        truth, guesses = random.randint(0, 4, (2, 30))
        counts = np.zeros((5, 5), int)  # the last class does not occur
        np.add.at(counts, (truth, guesses), 1)
        parts = []
        for c in range(4):
            hits = ((truth == c) & (guesses == c)).sum()
            precision, recall = hits / max(1, (guesses == c).sum()), hits / (truth == c).sum()
            parts.append(2 * precision * recall / (precision + recall) if hits else 0)
        assert macro_f1(counts) == pytest.approx(np.mean(parts))
    assert macro_f1([[1, 0], [0, 3]]) == 1 and macro_f1([[0, 1], [3, 0]]) == 0


def test_the_confusion_matrix_has_the_truth_in_rows():
    rows = [dict(label=label) for label in "aabbb"]
    found = worth(rows, "abbbc", [*"abc"])
    assert found["confusion"].tolist() == [[1, 1, 0], [0, 2, 1], [0, 0, 0]]
    assert found["accuracy"] == (0.6, *wilson(0.6, 5))


def test_rows_of_one_template_make_a_wider_interval_than_as_many_rows():
    rows = [dict(label="a", template=f"test {i // 20}") for i in range(200)]
    guesses = ["a" if i % 40 < 20 else "b" for i in range(200)]  # templates stand or fall as one
    (_, *wide), (_, *narrow) = (worth(found, guesses, ["a", "b"])["accuracy"] for found in (
        rows, [dict(label="a")] * 200))
    assert np.diff(wide) > 3 * np.diff(narrow)


@pytest.mark.parametrize("n_classes", [0, 8])
def test_score_prints_the_run_beside_the_baselines(n_classes, files, tmp_path, tokenizer, call):
    _, folder = made_run(tmp_path / "run", tokenizer, n_classes=n_classes)
    out, _ = call(leaf, "score", folder, files / "test.jsonl")
    scores, names = score(folder, files / "test.jsonl")
    (_, guesses, _), rows = guess(folder, clauses(24, "test")), clauses(24, "test")
    right = sum(label == row["label"] for label, row in zip(guesses, rows))
    run, words, frequent = scores.values()
    assert run["accuracy"][0] == right / 24 and run["confusion"].sum() == 24
    assert frequent["accuracy"][0] == 1 / 8 < words["accuracy"][0] and names == LABELS
    assert [name for name in scores if f"{name}  " in out] == [*scores]
    assert f"{right / 24:.1%}" in out and all(f"{i + 1}  {label}" in out
                                              for i, label in enumerate(LABELS))


def test_the_most_frequent_label_is_that_of_the_training_rows(files, tmp_path, tokenizer):
    _, folder = made_run(tmp_path / "run", tokenizer)
    rows = [row for row in clauses(64, "train") if row["label"] in ("payment", "warranty")]
    train = write_rows(tmp_path / "other.jsonl", rows + [dict(rows[0], label="warranty", text="x")])
    assert "always warranty" in score(folder, files / "test.jsonl", train)[0]


def test_texts_and_labels_are_cleaned_as_data_py_does(tmp_path):
    rows = [dict(text="one\r\ntwo\x07", label="a\r\nb", template=3)]
    assert read_labelled(write_rows(tmp_path / "rows.jsonl", rows)) == [
        dict(text="one\ntwo", label="a\nb", template=3)]


def test_rows_of_others_are_scored_too_and_labels_may_be_numbers(tmp_path, tokenizer):
    _, folder = made_run(tmp_path / "run", tokenizer, n_classes=2, labels=["0", "1"])
    rows = [dict(text=f"number {i}", label=i % 2) for i in range(10)]
    test = write_rows(tmp_path / "rows.jsonl", rows)
    scores, names = score(folder, test, train=test)
    assert names == ["0", "1"] and [*scores.values()][0]["confusion"].sum(axis=1).tolist() == [5, 5]


# -----------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize("options, rows, said", [
    (dict(labels=["payments", *LABELS[1:]]), None, "unknown label, for .*'assignment'"),
    (dict(labels=[*LABELS[:5], "payments", *LABELS[6:]]), None, "did you mean payments"),
    (dict(labels=[]), None, "has 0 labels for n_classes=8: train the run on rows of text and"),
    (dict(labels=None), None, "has 0 labels for n_classes=8"),
    (dict(labels=5), None, "config.json cannot be read"),
    (dict(labels=["a"], n_classes=1), None, "has 1 labels for n_classes=1"),
    (dict(labels=LABELS[:3]), None, "has 3 labels for n_classes=8"),
    (dict(n_classes=0, block_size=16), None, "and this run reads 16: train one with a larger"),
    ({}, [], "is empty: it must have rows of text and label"),
    ({}, [dict(text="without")], "row 1: .* lacks a text or a label"),
    ({}, [dict(text=5, label="payment")], "row 1: .* lacks a text or a label"),
    ({}, [5], "row 1: .* lacks a text or a label"),
    ({}, [dict(messages=[])], "row 1: .* lacks a text or a label")])
def test_a_wrong_run_or_file_is_one_line(options, rows, said, files, tmp_path, tokenizer,
                                         monkeypatch, capsys):
    _, folder = made_run(tmp_path / "run", tokenizer, **options)
    test = write_rows(files / "rows.jsonl", clauses(24, "test") if rows is None else rows)
    code, lines = mistake(leaf.main, monkeypatch, capsys, "score", folder, test)
    assert code == 1 and len(lines) == 1 and re.search(said, lines[0]), lines


def test_a_run_that_cannot_render_chats_is_refused(files, tmp_path, monkeypatch, capsys):
    plain = Tokenizer([], special_tokens=["<|endoftext|>"])
    _, folder = made_run(tmp_path / "run", plain)
    code, lines = mistake(leaf.main, monkeypatch, capsys, "score", folder, files / "test.jsonl")
    assert code == 1 and len(lines) == 1 and "lacks <|system|>" in lines[0]


@pytest.mark.parametrize("words, said", [
    (["make", "--n=31"], "--n=31 must be 32 to 100,000"), (["make", "--n=100001"], "must be 32 to"),
    (["make", "--out=OUT"], "holds other shards or files: choose another --out"),
    (["make", "folder"], "make with 1 paths, not 0"), (["score", "a"], "with 1 paths, not 2"),
    (["ask", "--prompt=a"], "ask with 0 paths, not 1"),
    (["ask", "a", "--n=5"], "--n would not act"),
    (["score", "none", "OUT/test.jsonl"], "there is no run folder none"),
    (["score", "none", "none.jsonl"], "none.jsonl: no such file"),
    (["score", "none", "OUT/test.jsonl", "--train=no.jsonl"], "no.jsonl: no such file"),
    (["score", "a", "b", "--n=5"], "--n would not act beside score"),
    (["make", "--train=a"], "--train would not act beside make"), (["mend"], "invalid choice"),
    (["make", "--count=5"], "unknown option --count")])
def test_a_wrong_command_is_one_line_and_nothing_is_written(words, said, files, tmp_path,
                                                            monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = [word.replace("OUT", str(files)) for word in words]
    code, lines = mistake(leaf.main, monkeypatch, capsys, *words)
    assert code in (1, 2) and len(lines) == 1 and said in lines[0], lines
    assert sorted(tmp_path.rglob("*")) == before
