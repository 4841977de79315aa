"""chapters/fairness.py: Fairlearn's metrics, and a probe that finds the bias that was planted."""

from random import Random

import numpy as np
import pytest
from conftest import keep, mistake, tiny

from chapters import fairness
from chapters.fairness import FRAMES, PAIRS, bias_probe, bootstrap, by_group, group_sentences
from tokenizer import Tokenizer

METRICS = ("demographic_parity_difference", "demographic_parity_ratio",
           "equalized_odds_difference", "equalized_odds_ratio", "equal_opportunity_difference",
           "equal_opportunity_ratio")
ODDS = {"certain": 1.0, "even": 0.5, "rare": 0.1, "never": 0.0}


def decisions(seed, chance, n=60):
    """Random truth, decisions and groups; where chance is small, some groups have no positives."""
    random = np.random.default_rng(seed)
    return [(random.random(n) < chance).astype(int), (random.random(n) < 0.4).astype(int),
            random.choice(["a", "b", "c", "d"], n, p=[0.4, 0.3, 0.25, 0.05])]


# -----------------------------------------------------------------------------
# Metrics.


@pytest.mark.slow
@pytest.mark.parametrize("chance", ODDS.values(), ids=ODDS)
def test_every_metric_is_fairlearns(chance):
    reference = pytest.importorskip("fairlearn.metrics", reason="fairlearn is not installed")
    for seed in range(3):
        y_true, y_pred, groups = decisions(seed, chance)
        for name in METRICS:
            theirs = getattr(reference, name)(y_true, y_pred, sensitive_features=groups)
            ours = getattr(fairness, name)(y_true, y_pred, groups)
            assert ours == pytest.approx(theirs, nan_ok=True), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selection_rate", "true_positive_rate", "false_positive_rate"])
def test_groups_have_the_values_of_fairlearns_frame(name):
    reference = pytest.importorskip("fairlearn.metrics", reason="fairlearn is not installed")
    y_true, y_pred, groups = decisions(5, 0.5)
    theirs = reference.MetricFrame(metrics=getattr(reference, name), y_true=y_true, y_pred=y_pred,
                                   sensitive_features=groups).by_group
    ours = by_group(getattr(fairness, name), y_true, y_pred, groups)
    assert ours == pytest.approx(theirs.to_dict()) and len({*ours.values()}) > 1


def test_decisions_that_ignore_the_group_are_equal_and_those_that_follow_it_are_not():
    groups = np.repeat(["a", "b"], 20)
    y_true, follows = np.tile([0, 1], 20), (groups == "a").astype(int)
    for name in METRICS:
        equal = getattr(fairness, name)(y_true, y_true, groups)
        other = getattr(fairness, name)(y_true, follows, groups)
        assert [equal, other] == ([0, 1] if name.endswith("difference") else [1, 0]), name


@pytest.mark.parametrize("rows", [([1], [1, 0], ["a", "b"]), ([], [], [])])
def test_rows_that_do_not_fit_together_are_refused(rows):
    with pytest.raises(ValueError, match="must have as many"):
        by_group(fairness.selection_rate, *rows)


def test_rows_of_one_unit_that_agree_count_as_one_row():
    y_pred, groups = np.random.default_rng(0).integers(2, size=40), np.repeat(["a", "b"], 20)
    rows = np.zeros(40, int), y_pred, groups
    copies = [np.repeat(row, 9) for row in (*rows, np.arange(40))]
    once, often, loose = (bootstrap(fairness.demographic_parity_difference, *each) for each in (
        (*rows, np.arange(40)), copies, (*copies[:3], np.arange(360))))
    share, low, high = bootstrap(lambda y_true, y_pred, groups: y_pred.mean(), *rows, range(40))
    assert high - low == pytest.approx(2 * 1.96 * (share * (1 - share) / 40) ** 0.5, rel=0.2)
    assert often == pytest.approx(once)
    assert loose[2] - loose[1] < 0.5 * (once[2] - once[1])


# -----------------------------------------------------------------------------
# The probe.


def test_names_that_change_places_change_the_sign_and_equal_ones_have_no_gap():
    tokenizer = Tokenizer([])
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64)
    pairs = {"gender": PAIRS["gender"][:2]}
    swapped = {"gender": [pair[::-1] for pair in pairs["gender"]], "none": [("man", "man")]}
    one, other = (bias_probe(model, tokenizer, each, FRAMES[:4]) for each in (pairs, swapped))
    assert other["gender"].value == pytest.approx(-one["gender"].value, abs=1e-5) != 0
    assert other["gender"].low == pytest.approx(-one["gender"].high, abs=1e-2)
    assert other["none"].value == pytest.approx(0, abs=1e-5) and one["gender"].n == 8


def learned(text, steps=70):
    """(model, tokenizer) after a few steps on a text."""
    import torch
    from train import TrainConfig, build_optimizer
    tokenizer = Tokenizer.train(text, 400)
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64, n_embd=64).train()
    ids = torch.tensor(tokenizer.encode(text))
    optimizer = build_optimizer(model, TrainConfig(data="none", learning_rate=0.02))
    for step in range(steps):
        starts = torch.randint(len(ids) - 65, (16,), generator=torch.Generator().manual_seed(step))
        x = torch.stack([ids[i:i + 65] for i in starts])
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_is_found_where_one_was_planted_and_nowhere_else(biased):
    random, lines = Random(0), []
    for _ in range(1500):
        frame, *words = random.choice(FRAMES)
        group = random.randrange(2)
        name = random.choice(PAIRS["gender"])[group]
        kind = random.random() < (0.1 if group == 0 else 0.9) if biased else random.random() < 0.5
        lines.append(f"{frame.format(name)} {words[0 if kind else 1]}.\n")
    gap = bias_probe(*learned("".join(lines)), {"gender": PAIRS["gender"]})["gender"]
    assert gap.high < -1 if biased else abs(gap.value) < 0.5


def test_sentences_to_judge_have_as_many_of_each_kind_for_every_name():
    texts, y_true, groups, units = group_sentences()
    assert len({*texts}) == len(texts) and all(name in text for name, text in zip(groups, texts))
    for group in {*groups}:
        own = [y for y, name in zip(y_true, groups) if name == group]
        assert sum(own) == len(own) / 2 == len({*units}) / 2


def test_no_frame_or_name_occurs_twice_and_pairs_differ_in_one_word():
    assert len({frame for frame, *_ in FRAMES}) == len(FRAMES)
    for a, b in (pair for own in PAIRS.values() for pair in own):
        assert sum(x != y for x, y in zip(a.split(), b.split(), strict=True)) == 1


# -----------------------------------------------------------------------------
# The command.


@pytest.mark.slow
def test_the_command_prints_a_gap_for_each_dimension(call, tmp_path):
    tokenizer = Tokenizer([])
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=64), tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    said = call(fairness, tmp_path).out.splitlines()
    assert [line.split()[0] for line in said[1:-1]] == [*PAIRS]


@pytest.mark.parametrize("words, code, problem", [
    (["none"], 1, "there is no run folder none"), (["--chekpoint=3"], 2, "did you mean --check")])
def test_a_mistake_is_one_line(words, code, problem, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, (line,) = mistake(fairness.main, monkeypatch, capsys, *words)
    assert found == code and problem in line
