"""Canaries and membership inference: what a model shows of the texts that it was trained on."""

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import keep, mistake, tiny

from chapters import memorization, membership
from chapters.dpsgd import fit, text_rows
from chapters.membership import ATTACKS, PIECE, attack, log_probs, pieces, roc, run_membership
from chapters.memorization import (DEDUP, Canary, by_times, canaries, canary_experiment, exposure,
                                   membership_experiment, numbers_like, plant, read_canaries,
                                   write_planted)
from data import read_split
from model import GPT, GPTConfig
from sample import complete
from tokenizer import Tokenizer, write_json

BYTES = Tokenizer(())
TEXTS = [f"One sentence, number {i},\nand another line of it, {i * i}." for i in range(40)]


@pytest.fixture(scope="module")
def bytes_model():
    return tiny(vocab_size=BYTES.n_vocab, block_size=160)


@pytest.fixture
def run(shards, model, tokenizer, tmp_path):
    """The folder of a run on the shards, whose model is not trained."""
    keep(model, tmp_path / "run")
    tokenizer.save(tmp_path / "run/tokenizer.json")
    card = json.loads((shards / "card.json").read_text())
    data = dict(path=str(shards), fingerprint=card["fingerprint"], sources=[])
    write_json(tmp_path / "run/config.json", dict(data=data))
    return tmp_path / "run"


# -----------------------------------------------------------------------------
# Canaries.


def test_canaries_have_names_of_their_own_and_random_numbers():
    found = canaries(50, (0, 3), digits=2, seed=1)
    assert Counter(canary.times for canary in found) == {0: 50, 3: 50}
    assert len({canary.prefix for canary in found}) == 100
    assert all(canary.secret in numbers_like("00") for canary in found)
    assert 50 < len({canary.secret for canary in found})
    assert found == canaries(50, (0, 3), digits=2, seed=1) != canaries(50, (0, 3), digits=2)


def test_planting_adds_each_canary_as_often_as_it_says_and_changes_nothing_else():
    found = canaries(3, (0, 1, 30))
    planted = plant(TEXTS, found)
    lines = Counter(line for text in planted for line in text.split("\n"))
    assert all(lines[canary.line] == canary.times for canary in found)
    own = {canary.line for canary in found}
    assert ["\n".join(line for line in text.split("\n") if line not in own)
            for text in planted] == TEXTS
    assert all(text.split("\n")[0] not in own for text in planted)


def test_only_the_deduplication_of_lines_finds_a_canary_in_different_documents():
    canary = Canary("The secret number of the account of somebody is", "123", 9)
    planted = plant(TEXTS, [canary])
    counts = {name: "\n".join(dedup(planted)).count(canary.line) for name, dedup in DEDUP.items()}
    assert counts == dict(none=9, documents=9, lines=1)
    assert DEDUP["documents"]([*TEXTS, *TEXTS[:5]]) == TEXTS


def test_exposure_is_the_rank_by_the_models_own_probabilities(bytes_model):
    prefix, known = "A number is", numbers_like("42")
    ids = torch.tensor([BYTES.encode(f"{prefix} {number}") for number in known])
    logits, _ = bytes_model(ids)
    found = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    scores = found[:, len(prefix) - 1:].sum(dim=1)
    for secret in "00", "42", known[scores.argmax()]:
        rank = int((scores >= scores[int(secret)]).sum())
        (bits,), _ = exposure(bytes_model, BYTES, [Canary(prefix, secret)])
        assert bits == pytest.approx(math.log2(100 / rank))
    assert rank == 1


def test_all_candidates_have_the_exposures_of_all_ranks(bytes_model):
    known = ["red", "green", "blue", "white"]
    bits, _ = exposure(bytes_model, BYTES, [Canary("The color is", one) for one in known], known)
    assert sorted(bits) == pytest.approx([math.log2(4 / rank) for rank in (4, 3, 2, 1)])


def test_a_secret_is_extracted_if_greedy_decoding_writes_it():
    rows = text_rows(BYTES, ["The code is 42."]) * 4
    model = fit(tiny(vocab_size=BYTES.n_vocab), rows, 40)
    assert complete(model, BYTES, "The code is", temperature=0, max_new_tokens=3) == " 42"
    bits, extracted = exposure(model, BYTES, [Canary("The code is", "42"),
                                              Canary("The code is", "17")])
    assert extracted.tolist() == [True, False] and bits[0] == math.log2(100) > bits[1]


def test_a_model_that_knows_nothing_exposes_nothing():
    model = GPT(GPTConfig(vocab_size=BYTES.n_vocab, block_size=64, n_layer=1, n_head=2, n_embd=8))
    bits, extracted = exposure(model.eval(), BYTES, [Canary("It is", "7"), Canary("It is", "07")])
    assert bits.tolist() == [0, 0] and not extracted.any()


def test_a_number_that_was_never_seen_has_1_44_bits_on_average():
    assert np.log2(1000 / np.arange(1, 1001)).mean() == pytest.approx(1.44, abs=0.01)


def test_canaries_are_grouped_by_the_times_that_they_were_planted():
    found = [Canary("a", "1", 4), Canary("b", "2", 0), Canary("c", "3", 4)]
    assert by_times(found, np.array([1.0, 2.0, 3.0]), np.array([True, False, False])) == {
        0: ([2.0], 0.0), 4: ([1.0, 3.0], 0.5)}


@pytest.mark.parametrize("secret", ["", "123456", "12a", "٣"])
def test_a_secret_that_has_no_rank_among_numbers_is_refused(secret, bytes_model):
    with pytest.raises(ValueError, match="1 to 5 digits"):
        exposure(bytes_model, BYTES, [Canary("It is", secret)])


# -----------------------------------------------------------------------------
# Membership.


@pytest.mark.slow
def test_the_curve_and_its_area_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for n, m in (5, 9), (40, 30), (200, 300):
        members, others = rng.integers(3, 15, n) / 4, rng.integers(0, 12, m) / 4  # with ties
        scores, truth = np.append(members, others), np.arange(n + m) < n
        false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
        found = roc(members.tolist(), others.tolist())
        assert found.points == pytest.approx(np.stack([false, true], axis=1))
        assert found.auc == pytest.approx(metrics.roc_auc_score(truth, scores))
        assert found.tpr == true[false <= 0.01].max()


def test_the_interval_holds_the_true_area_nineteen_times_in_twenty():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        found = roc(rng.normal(1, 1, 60), rng.normal(0, 1, 80))
        hits += found.low <= 0.7602 <= found.high  # Phi(1 / sqrt(2))
    assert 0.95 <= hits / 400 < 1


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    members, others = rng.integers(3, 15, 30), rng.integers(0, 12, 40)
    pairs = np.sign(members[:, None] - others) / 2 + 0.5
    found = roc(members, others)
    assert found.auc == pytest.approx(pairs.mean())
    assert np.trapezoid(found.points[:, 1], found.points[:, 0]) == pytest.approx(found.auc)
    assert found.points[[0, -1]].tolist() == [[0, 0], [1, 1]]


def test_one_false_positive_in_a_hundred_is_allowed():
    others = [*range(100)]
    assert roc([98.5, 97.5, 100], others).tpr == pytest.approx(2 / 3)
    assert roc([98.5, 97.5, 100], others[1:]).tpr == pytest.approx(1 / 3)


def test_log_probabilities_are_the_models_own_where_the_mask_says(bytes_model):
    (ids, _), *_ = text_rows(BYTES, ["Some words, and more of them. " * 8])
    mask = [i % 3 == 0 for i in range(len(ids))]
    found, = log_probs(bytes_model, [(ids, mask)])
    logits, _ = bytes_model(torch.tensor([ids[:160]]))
    expected = logits[0].log_softmax(-1)[range(160), ids[1:161]].detach().numpy()
    assert len(ids) > 161 and found == pytest.approx(expected[mask[1:161]], abs=1e-5)


def test_the_attacks_score_likely_texts_higher():
    own, reference = np.log([0.5, 0.1, 0.2, 0.9, 0.01, 0.3]), np.log([0.5] * 6)
    scores = {name: score(own, reference) for name, score in ATTACKS.items()}
    assert scores["loss"] == pytest.approx(own.mean())
    assert scores["min-k"] == pytest.approx(np.log([0.01, 0.1]).mean())
    assert scores["ratio"] == pytest.approx(own.mean() - math.log(0.5))


def test_an_attack_tells_nothing_from_itself_and_the_two_sides_are_mirrored(bytes_model):
    rows, reference = text_rows(BYTES, TEXTS), tiny(vocab_size=BYTES.n_vocab, block_size=160,
                                                    seed=1)
    assert {found.auc for found in attack(bytes_model, rows, rows).values()} == {0.5}
    one, other = (attack(bytes_model, *sides, reference)
                  for sides in ((rows[:25], rows[25:]), (rows[25:], rows[:25])))
    assert [*one] == [*ATTACKS] and "ratio" not in attack(bytes_model, rows, rows)
    for name in ATTACKS:
        assert one[name].auc == pytest.approx(1 - other[name].auc) != 0.5


def test_pieces_are_different_parts_of_a_split(shards, tokenizer):
    train = np.concatenate(read_split(shards, "train"))
    whole = train[:len(train) // PIECE * PIECE].reshape(-1, PIECE)
    found = pieces(shards, "train", tokenizer, 10**6)
    assert sorted(ids for ids, _ in found) == sorted(whole.tolist()) != [ids for ids, _ in found]
    assert all(mask == [id != tokenizer.eot for id in ids] for ids, mask in found)
    some = pieces(shards, "train", tokenizer, 12, seed=3)
    assert len(some) == 12 and some == pieces(shards, "train", tokenizer, 12, seed=3)
    assert some != pieces(shards, "train", tokenizer, 12, seed=4)


def test_pieces_of_several_shards_come_from_all_of_them(tmp_path, tokenizer):
    from data import write_shards
    arrays = np.split(np.repeat(np.arange(20), PIECE), 20)
    write_shards(iter(arrays), tmp_path, "train", tokenizer.n_vocab, shard_tokens=6 * PIECE + 5)
    shards = read_split(tmp_path)
    found = [ids for ids, _ in pieces(tmp_path, "train", tokenizer, 100)]
    assert len(shards) > 2
    assert sorted(found) == sorted(shard[i:i + PIECE].tolist() for shard in shards
                                   for i in range(0, len(shard) - PIECE + 1, PIECE))


# -----------------------------------------------------------------------------
# The experiments: each effect is there, on models that take seconds.


@pytest.fixture(scope="module")
def plain():
    return canary_experiment()


def means(found):
    """{times: mean exposure} of an experiment."""
    return {times: np.mean(bits) for times, (bits, _) in found["found"].items()}


@pytest.mark.slow
def test_exposure_grows_with_copies_unless_lines_are_deduplicated(plain):
    never, once, four, sixteen = means(plain).values()
    assert never < 2 and never + 1 < once < four - 1 < sixteen - 2 and sixteen > 8
    assert plain["found"][16][1] > 0 == plain["found"][0][1]
    found = canary_experiment("lines")
    assert means(found)[16] < sixteen - 3 and found["found"][16][1] == 0


@pytest.mark.slow
def test_noise_hides_canaries_at_a_price(plain):
    private = canary_experiment(clip=1.0, noise=0.1)
    assert all(means(private)[times] < means(plain)[times] - 1 for times in (4, 16))
    assert private["loss"] > plain["loss"] + 0.5
    assert plain["epsilon"] == math.inf > private["epsilon"]


@pytest.mark.slow
def test_membership_shows_after_forty_epochs_and_not_after_one():
    once, often = membership_experiment(1), membership_experiment(40)
    for name in ATTACKS:
        assert once[name].low < 0.5 < once[name].high < often[name].low
    assert often["ratio"].tpr > 5 * 0.01


# -----------------------------------------------------------------------------
# The command.


def test_what_is_planted_can_be_read_back_and_trained_on(call, tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    said = call(memorization, "--plant", tmp_path / "a.txt", "--out", tmp_path / "out").out
    assert f"--canaries={tmp_path}/out/canaries.jsonl" in said
    found = read_canaries(tmp_path / "out/canaries.jsonl")
    assert found == canaries()
    rows = [json.loads(line) for line in (tmp_path / "out/text.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == plant(TEXTS, found)
    with pytest.raises(ValueError, match="there already"):
        write_planted([tmp_path / "a.txt"], tmp_path / "out")


def test_the_command_attacks_a_run_by_its_own_shards(run, call, shards):
    said = call(memorization, run, "--n=12").out.splitlines()
    found = run_membership(run, n=12)
    assert [line.split()[:2] for line in said[1:]] == [
        [name, f"{own.auc:.3f}"] for name, own in found.items()]
    assert [*found] == ["loss", "min-k"] and [*run_membership(run, shards, run, 12)] == [*ATTACKS]
    assert run_membership(run, reference=run, n=12)["ratio"].auc == 0.5


def test_the_command_says_how_exposed_canaries_are(run, call, tmp_path):
    found = [Canary("the cat is", "1", 1), Canary("the dog is", "2", 0), Canary("a dog", "3", 1)]
    lines = [json.dumps(vars(canary)) for canary in found]
    (tmp_path / "canaries.jsonl").write_text("\n".join(lines))
    said = call(memorization, run, "--canaries", tmp_path / "canaries.jsonl").out.splitlines()
    assert [line.split()[:2] for line in said[1:]] == [["0", "1"], ["1", "2"]]
    expected = by_times(found, *exposure(*membership.load_writer(run), found))
    assert [line.split()[2] for line in said[1:]] == [
        f"{np.mean(bits):.2f}" for bits, _ in expected.values()]


@pytest.mark.parametrize("words, problem", [
    (["--plant=a.txt"], "--plant needs --out=FOLDER"),
    (["--out=b"], "--out would not act without --plant=FILE"),
    (["--plant=a.txt", "--out=b", "--n=5"], "--n would not act beside --plant"),
    (["--canaries=a.jsonl", "--seed=1"], "--seed would not act beside --canaries"),
    (["none"], "there is no run folder none"), (["--n=0"], "n=0 must be at least 1")])
def test_a_mistake_is_one_line(words, problem, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, (line,) = mistake(memorization.main, monkeypatch, capsys, *words)
    assert code == 1 and problem in line


def test_shards_that_are_not_the_runs_are_refused(run, shards, tmp_path, tokenizer):
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", dict(data=config["data"] | dict(fingerprint="other")))
    with pytest.raises(ValueError, match="was not trained on"):
        run_membership(run)
    write_json(run / "config.json", dict(data={}))
    with pytest.raises(ValueError, match="names no shards"):
        run_membership(run)
    shutil.copytree(run, tmp_path / "other")
    Tokenizer(tokenizer.merges[:-1] + [(b"q", b"z")]).save(tmp_path / "other/tokenizer.json")
    with pytest.raises(ValueError, match="another tokenizer"):
        run_membership(run, shards, tmp_path / "other")
    with pytest.raises(ValueError, match="was not trained on"):
        run_membership(tmp_path / "other", shards)


def test_too_little_text_to_hide_in_is_refused(tmp_path, tokenizer):
    from data import write_shards
    write_shards(iter([np.arange(3 * PIECE) % 256]), tmp_path, "val", tokenizer.n_vocab)
    with pytest.raises(ValueError, match="val has 3 pieces of 64 tokens"):
        pieces(tmp_path, "val", tokenizer, 100)


@pytest.mark.parametrize("row, problem", [("{}", "lacks|missing"), ('{"prefix": 1}', "prefix=1"),
                                          ('{"prefix": "a", "secret": "1", "x": 1}', "'x'")])
def test_a_file_of_something_else_is_no_file_of_canaries(row, problem, tmp_path):
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(ValueError, match=problem):
        read_canaries(tmp_path / "a.jsonl")
