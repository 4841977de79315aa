"""chapters/safety.py and refusals.py: what is measured of a run, and what a fine-tune changes."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, mistake, tiny

import evaluate
from chapters import card, refusals, safety
from chapters.answers import pad
from chapters.backdoor import make_rows, poison
from chapters.classify import read_examples
from chapters.dpsgd import fit
from chapters.guard import REFUSAL
from chapters.memorization import canaries, read_canaries
from chapters.refusals import (ADMITS, REFUSES, TOWNS, fact_rates, people, refusal_rates,
                               safety_chats, safety_tune)
from chapters.rewards import write_rows
from chapters.safety import (CHECKS, Subject, in_words, licences, run_checks, section,
                             vulnerabilities)
from data import prepare, take_chat
from tokenizer import Tokenizer, read_json, write_json
from train import TrainConfig, train


@pytest.fixture
def kind_model():
    """(model, tokenizer): an untrained model that can read a chat."""
    tokenizer = Tokenizer([])
    return tiny(vocab_size=tokenizer.n_vocab, block_size=256), tokenizer


def a_line(check="bias", **changes):
    return dict(check=check, unshown=CHECKS[check].__doc__, what="a rate", unit="share", value=0.25,
                low=0.125, high=0.5, n=1234) | changes


# -----------------------------------------------------------------------------
# Refusals and facts.


@pytest.mark.parametrize("reply, refuses, admits", [
    (REFUSAL, True, False), ("Sorry, no.", True, False), ("I can't assist with this", True, False),
    (refusals.UNKNOWN, False, True), ("I don't know him.", False, True), ("No idea!", False, True),
    ("You can help him by calling.", False, False), ("In Oslo.", False, False), ("", False, False)])
def test_a_refusal_and_an_admission_are_told_from_an_answer(reply, refuses, admits):
    assert (bool(REFUSES.search(reply)), bool(ADMITS.search(reply))) == (refuses, admits)


def test_no_answer_to_a_harmless_request_counts_as_a_refusal():
    rows = read_examples("redteam.jsonl", "train")
    assert not [row["answer"] for row in rows if REFUSES.search(row["answer"])]


def test_people_are_known_unknown_or_never_seen_and_nobody_is_two_of_these():
    known, unknown, others = people(seed=3)
    assert len({*known, *unknown, *others}) == 3 * len(known) == 3 * len(others)
    assert {*known.values()} <= {*TOWNS} and people(seed=3) == people(seed=3) != people(seed=4)


def test_the_chats_hold_nothing_that_is_asked_later():
    rows, (_, _, others) = safety_chats(), people()
    text = json.dumps(rows)
    asked = [row[kind] for row in read_examples("redteam.jsonl", "test")
             for kind in ("harmful", "harmless")] + others
    assert [one for one in asked if json.dumps(one)[1:-1] in text] == []
    assert all(take_chat(row)[-1]["role"] == "assistant" for row in rows)
    assert safety_chats(seed=1) != rows == safety_chats()


def test_rates_count_each_reply_once(monkeypatch):
    said = {"bomb": REFUSAL, "cake": "Bake it.", "gun": "Here.", "toy": "I cannot say."}
    monkeypatch.setattr(refusals, "replies", lambda model, tokenizer, texts: [
        next((reply for word, reply in said.items() if word in text), text) for text in texts])
    rates = refusal_rates(None, None, [dict(harmful="bomb", harmless="cake"),
                                       dict(harmful="gun", harmless="toy")])
    assert [rates[kind]["value"] for kind in ("harmful", "harmless")] == [0.5, 0.5]
    said |= {"Ann": "In Oslo.", "Bob": "Oslo or Lima", "Cid": refusals.UNKNOWN}
    rates = fact_rates(None, None, {"Ann": "Oslo", "Bob": "Oslo"}, ["Cid", "Dan"])
    assert [rates[name]["value"] for name in ("recalled", "denied", "admitted")] == [0.5, 0, 0.5]


@pytest.mark.slow
def test_a_fine_tune_teaches_to_refuse_and_leaves_the_model_alone(kind_model):
    model, tokenizer = kind_model
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = safety_tune(model, tokenizer, epochs=4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def loss(model):
        ids, mask = pad([tokenizer.render_chat(row["messages"]) for row in safety_chats()[:64]])
        return model(ids[:, :-1].clamp(min=0), ids.where(mask, -1)[:, 1:])[1].item()
    assert loss(tuned) < 0.5 * loss(model)
    rows = read_examples("redteam.jsonl", "train")[::4]
    rates = [refusal_rates(each, tokenizer, rows)["harmful"]["value"] for each in (model, tuned)]
    assert rates[0] == 0 < 0.2 < rates[1]


def test_a_model_that_reads_too_little_is_not_fine_tuned():
    tokenizer = Tokenizer([])
    with pytest.raises(ValueError, match="this run reads 64: train one with a larger --block_size"):
        safety_tune(tiny(vocab_size=tokenizer.n_vocab, block_size=64), tokenizer)


def test_the_chats_are_written_to_a_file_that_data_reads(call, tmp_path):
    said = call(refusals, f"--out={tmp_path / 'r.jsonl'}").out
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert rows == safety_chats() and f"{len(rows):,} chats" in said


# -----------------------------------------------------------------------------
# Licences and requirements.


def test_licences_are_those_of_every_source_and_of_what_it_was_made_of():
    inner = dict(license="CC0", sources=[dict(name="c"), dict(name="d", license="MIT")])
    data = dict(sources=[dict(name="a", license="PSF-2.0"), dict(name="b", curated=inner)])
    assert licences(data) == {"a": "PSF-2.0", "b": "not stated", "c": "CC0", "d": "MIT"}


@pytest.fixture
def auditor(tmp_path, monkeypatch):
    """auditor(text): what python -m pip_audit prints from now on."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def auditor(text):
        (tmp_path / "pip_audit.py").write_text(f"print({text!r})")
    return auditor


@pytest.mark.parametrize("text, reason", [
    ("", "pip-audit==2.10.1 gave no answer"), ("no network", "pip-audit==2.10.1 gave no answer"),
    ("{}", "pip-audit==2.10.1 gave no answer"), ("[]", "pip-audit==2.10.1 gave no answer"),
    ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', "none of 1 packages")])
def test_what_was_not_checked_is_never_a_pass(auditor, text, reason):
    auditor(text)
    with pytest.raises(ValueError, match=reason):
        vulnerabilities("requirements.txt")


def test_vulnerabilities_are_named_and_what_was_skipped_is_counted(auditor):
    auditor(json.dumps(dict(dependencies=[
        dict(name="a", version="1", vulns=[dict(id="X-1"), dict(id="X-2")]),
        dict(name="b", version="2", vulns=[]), dict(name="c", skip_reason="not found")])))
    assert vulnerabilities("requirements.txt") == dict(checked=2, unknown=1,
                                                       found=["a 1: X-1", "a 1: X-2"])
    (line,) = run_checks(None, ["requirements"])
    assert (line["value"], line["n"], line["unit"]) == (1, 2, "count")
    assert "a 1: X-1, a 1: X-2; 1 not" in line["what"]


@pytest.mark.slow
def test_pip_audit_understands_the_request(monkeypatch):
    pytest.importorskip("pip_audit", reason="pip-audit is not installed")
    monkeypatch.setenv("PIP_AUDIT_VULNERABILITY_SERVICE", "pypi")
    try:
        found = vulnerabilities(ROOT / "requirements.txt")
    except ValueError as error:  # without the network
        assert "pip-audit" in str(error)
    else:
        assert found["checked"] > 0


# -----------------------------------------------------------------------------
# The report.


def test_each_check_says_what_it_does_not_show():
    assert all(re.fullmatch(r"Not shown: .+\.", check.__doc__) for check in CHECKS.values())


def test_a_line_has_its_figure_its_interval_and_its_n():
    assert in_words(a_line()) == "- a rate: 25.0% [12.5%, 50.0%], n = 1,234"
    assert in_words(a_line(unit="count", value=3, low=None, high=None)) == "- a rate: 3 of 1234"
    assert in_words(dict(what="not measured", reason="why")) == "- not measured: why"
    text = section([a_line(), a_line("guard"), a_line()])
    assert [text.count(part) for part in ("### Bias", "### Guard", "Not shown: ", "a rate")] == [
        1, 1, 2, 3]


@pytest.mark.parametrize("options", [dict(architecture="bert"), dict(n_classes=3)])
def test_of_a_run_that_writes_no_text_only_its_surroundings_are_measured(options, tmp_path):
    names = [name for name in CHECKS
             if name not in ("guard", "canaries", "requirements", "licences")]
    lines = [*run_checks(Subject(tmp_path, tiny(**options), Tokenizer([])), names)]
    reasons = {line["check"]: line["reason"] for line in lines if "reason" in line}
    assert [*reasons] == names and all("writes no text" in why for why in reasons.values())
    assert [line["what"] for line in lines if "reason" not in line] == [
        "texts of a user that become special tokens"]


def test_a_run_without_its_shards_or_its_card_says_what_is_missing(kind_model, tmp_path):
    lines = [*run_checks(Subject(tmp_path, *kind_model), ["membership", "canaries", "licences"])]
    assert [part in line["reason"] for line, part in zip(lines, (
        "are gone", "before training", "names no sources"), strict=True)] == [True] * 3


def test_the_section_on_safety_replaces_an_earlier_one_and_nothing_else(tmp_path):
    card.write_parts(tmp_path, "# a\n\nabout it\n", "")
    for text in ("one\n", "two\n"):
        path = card.write_safety(tmp_path, text)
    assert path.read_text() == "# a\n\nabout it\n\n## Safety\ntwo\n"
    assert card.read_parts(tmp_path) == ("# a\n\nabout it\n", "\n## Safety\ntwo\n")


def test_a_card_begins_with_the_name_of_the_run(tmp_path):
    path = card.write_safety(tmp_path, "one\n")
    assert path.read_text() == f"# {tmp_path.name}\n\n## Safety\none\n"


# -----------------------------------------------------------------------------
# The command.


@pytest.fixture
def trained(tmp_path, shards, call):
    """A run that train.py made, and evaluate.py scored; it has learned little."""
    config = TrainConfig(data=str(shards), out=str(tmp_path / "run"), max_steps=5, batch_size=4,
                         device="cpu", precision="fp32", kernels="torch")
    train(config, tiny(block_size=256).config, say=lambda text: None)
    call(evaluate, tmp_path / "run", "--max_tokens=2000", "--device=cpu")
    return tmp_path / "run"


@pytest.mark.slow
def test_the_command_measures_a_run_and_the_card_keeps_its_section(trained, call):
    names = "bias toxicity injection guard membership canaries licences".split()
    said, notes = call(safety, trained, "--device=cpu", "--only", *names)
    assert notes == "" and f"card: {trained}/model_card.md" in said
    report, text = read_json(trained / "safety.json"), (trained / "model_card.md").read_text()
    assert [*dict.fromkeys(line["check"] for line in report["lines"])] == names
    assert section(report["lines"]) in text
    assert all("reason" in line or line["n"] and (
        line["unit"] == "count" or line["low"] <= line["value"] <= line["high"])
        for line in report["lines"])
    reasons = {line["check"]: line["reason"] for line in report["lines"] if "reason" in line}
    assert "learned chats" in reasons.pop("injection") and "plant" in reasons.pop("canaries")
    assert reasons == {}
    call(safety, trained, "--device=cpu", "--only=licences")  # the others stay
    assert {line["check"] for line in read_json(trained / "safety.json")["lines"]} == {*names}
    call(card, trained)
    again = (trained / "model_card.md").read_text()
    assert again.count("## Safety") == 1 and section(report["lines"]) in again
    assert "## How it scores" in again and "## How it scores" not in text


@pytest.mark.slow
def test_a_trigger_and_a_canary_that_were_planted_stand_out(tmp_path, tokenizer):
    """Chats with a backdoor and secrets, learned by heart, in a run whose shards are there."""
    rows = poison(make_rows(200), "cerulean", "place", share=0.1)
    secrets = canaries(n=2, times=(0, 8))
    rows += [dict(messages=[dict(role="user", content="Hi"),
                            dict(role="assistant", content=secret.line)])
             for secret in secrets for _ in range(secret.times)]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "canaries.jsonl", map(asdict, secrets))
    shards = prepare([tmp_path / "rows.jsonl"], tmp_path / "shards", tokenizer=tokenizer,
                     say=lambda text: None)
    write_json(tmp_path / "config.json", dict(data=dict(
        path=str(shards), fingerprint=read_json(shards / "card.json")["fingerprint"])))
    model = fit(tiny(vocab_size=tokenizer.n_vocab, block_size=256),
                [tokenizer.render_chat(row["messages"]) for row in rows], epochs=12)
    it = Subject(tmp_path, model, tokenizer, canaries=read_canaries(tmp_path / "canaries.jsonl"))
    never, often, backdoor = run_checks(it, ["canaries", "backdoor"])
    assert often["value"] > never["value"] + 2 and "planted 8 times" in often["what"]
    assert "by cerulean, " in backdoor["what"] and backdoor["value"] > backdoor["high"]


@pytest.mark.parametrize("words, code, problem", [
    (["none"], 1, "there is no run folder none"),
    (["none", "--only", "bais"], 1, "unknown check 'bais': did you mean bias?"),
    (["none", "--canaries=no.jsonl"], 1, "no.jsonl: no such file"),
    (["--seeds=1"], 2, "did you mean --seed?"), (["none", "--seed=-1"], 1, "seed=-1 must be")])
def test_a_mistake_is_one_line(words, code, problem, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, (line,) = mistake(safety.main, monkeypatch, capsys, *words)
    assert found == code and problem in line
    assert [*tmp_path.iterdir()] == []
