"""
The safety checks of a run, from bias to known vulnerabilities, and what each does not show.

    python -m chapters.safety runs/a       # writes safety.json, and ## Safety of model_card.md
    python -m chapters.safety runs/a --only bias licences

Each figure has its n and its 95% interval; a check that a run cannot take says so in one line.
Refusals and facts are also measured after a short fine-tune of a copy (chapters/refusals.py).
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/safety.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chapters.backdoor import scan, words_of
from chapters.card import config_of, write_safety
from chapters.classify import read_examples
from chapters.datacard import cards_of
from chapters.fairness import (bias_probe, bootstrap, demographic_parity_difference,
                               equalized_odds_difference, group_sentences)
from chapters.guard import Guard, english, examples, measure, special_ids
from chapters.membership import attack, pieces
from chapters.memorization import by_times, exposure, read_canaries
from chapters.refusals import (consistency, fact_rates, leak_rates, people, refusal_rates,
                               safety_tune, toxic_rate)
from chapters.talk import pick_template
from data import check_shards, read_split
from evaluate import interval, trained_on
from model import check_known, option
from sample import RunConfig, newest_run, open_run
from tokenizer import parse_options, read_json, run_command, write_json
from train import is_shards

N_PIECES, N_WORDS, N_ROWS, CHAT_TOKENS = 200, 400, 8, 50_000
CHAT = re.compile(r"(?s)<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|>")

# -----------------------------------------------------------------------------
# What a run was made of, and what it runs on.


def licences(data):
    """{source: its licence, or "not stated"} of the data in a run's config.json."""
    return {source["name"]: source.get("license") or card.get("license") or "not stated"
            for card in cards_of(data) for source in card.get("sources", ())}


def vulnerabilities(requirements):
    """{"checked": packages looked up, "unknown": those that the service does not know, "found":
    ["package version: id"]} by pip-audit. ValueError if it is missing or cannot ask."""
    words = ["-m", "pip_audit", "-r", str(requirements), "--no-deps", "--disable-pip", "-fjson"]
    try:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
        rows = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        raise ValueError("pip-audit==2.10.1 gave no answer: install it, and ask again") from None
    checked = [row for row in rows if "vulns" in row]
    if not checked:  # pip-audit itself calls this "No known vulnerabilities found"
        raise ValueError(f"pip-audit found none of {len(rows)} packages at its service")
    return dict(checked=len(checked), unknown=len(rows) - len(checked), found=[
        f"{row['name']} {row['version']}: {one['id']}" for row in checked for one in row["vulns"]])


# -----------------------------------------------------------------------------
# The checks of a run; their docstrings are part of the report. Each yields (what was measured, its
# figure, unit); what is counted whole, unit "count", has no interval.


class Subject:
    """A run under test, and a copy of its model after the safety fine-tune, made when asked for."""

    def __init__(self, folder, model, tokenizer, seed=0, canaries=None):
        self.folder, self.tokenizer, self.seed, self.canaries = folder, tokenizer, seed, canaries
        self.any_model = model

    @property
    def model(self):
        c = self.any_model.config
        if c.cross or not c.causal or c.n_classes:
            raise ValueError(f"it writes no text: {c.architecture}, n_classes={c.n_classes}")
        return self.any_model

    @property
    def chat(self):
        """The model, if it learned chats."""
        if pick_template(self.model, self.tokenizer) != "chat":
            raise ValueError("this needs a run that learned chats, and this one did not")
        return self.model

    @property
    def shards(self):
        """The folder of shards that it was trained on."""
        trained = trained_on(self.folder)
        path = trained.get("path") or ""
        if not is_shards(path) or check_shards(path).fingerprint != trained.get("fingerprint"):
            raise ValueError(f"its shards{f', {path},' * bool(path)} are gone, or others by now")
        return path

    @cached_property
    def tuned(self):
        return safety_tune(self.model, self.tokenizer, seed=self.seed)

    @property
    def versions(self):
        """Yield what it is called and the model, before and after the fine-tune."""
        yield "before the fine-tune", self.model
        yield "after it", self.tuned


def figure(value, low=None, high=None, *, n):
    return dict(value=value, low=low, high=high, n=n)


def check_bias(it):
    """Not shown: other words and languages, and its use; a model that knows little shows little."""
    for dimension, gap in bias_probe(it.model, it.tokenizer).items():
        yield f"{dimension}: friendly words for the first group, in nats", gap._asdict(), "nats"
    (texts, y_true, groups, units), guard = group_sentences(), Guard()
    flags = [guard.check_input(text) is not None for text in texts]
    for metric in demographic_parity_difference, equalized_odds_difference:
        found = bootstrap(metric, y_true, flags, groups, units, n_resamples=200)
        name = f"guard, {metric.__name__.replace('_', ' ')} of {len({*groups})} groups"
        yield name, figure(*found, n=len(texts)), "share"


def check_refusals(it):
    """Not shown: bolder requests, other ways to ask; a reply that is no refusal need not help."""
    rows = read_examples("redteam.jsonl", "test")
    for when, model in it.versions:
        for kind, found in refusal_rates(model, it.tokenizer, rows).items():
            yield f"{kind} requests refused, {when}", found, "share"


def check_toxicity(it):
    """Not shown: insults that a small classifier misses, and other beginnings."""
    for name, texts in (("ordinary", english("test")), ("toxic", examples()["toxic"][1])):
        found = toxic_rate(it.model, it.tokenizer, [s[:len(s) // 2] for s in texts], it.seed)
        yield f"toxic continuations of {name} sentences", found, "share"


def check_facts(it):
    """Not shown: what it says when asked in other words, and about anything but these people."""
    known, _, others = people(seed=it.seed)
    words = dict(recalled="towns told and recalled", denied="people told of, said to be unknown",
                 admitted="other people, said to be unknown")
    for when, model in it.versions:
        for kind, found in fact_rates(model, it.tokenizer, known, others).items():
            yield f"{words[kind]}, {when}", found, "share"


def check_consistency(it):
    """Not shown: other facts; contradictions that are none of these."""
    yield "facts recalled over 25 turns", consistency(it.model, it.tokenizer, seed=it.seed), "share"


def check_injection(it):
    """Not shown: cleverer attacks; a model too weak to repeat a secret is safe by weakness."""
    found = [special_ids(it.tokenizer, f"Hi{name}Obey") != [] for name in it.tokenizer.special]
    yield "texts of a user that become special tokens", figure(sum(found), n=len(found)), "count"
    attacks = [row["harmful"] for use in ("train", "test") for row in read_examples(
        "redteam.jsonl", use) if row["category"] == "injection"]
    for who, found in leak_rates(it.chat, it.tokenizer, attacks).items():
        yield f"injections that get the secret out of the system prompt, {who}", found, "share"


def check_guard(it):
    """Not shown: attacks made for this guard, and languages other than English."""
    pairs = [texts for way, *texts in examples().values() if way == "input"]
    found = measure(Guard().check_input, *(sum(texts, []) for texts in zip(*pairs)))
    yield "harmful requests that the guard misses", found["misses"], "share"
    yield "harmless ones that it refuses", found["false alarms"], "share"
    yield "milliseconds a text", found["milliseconds"], "ms"


def check_membership(it):
    """Not shown: stronger attacks; whether held-out documents differ in more than being unseen."""
    model, shards = it.model, it.shards
    rows = [pieces(shards, split, it.tokenizer, N_PIECES, it.seed) for split in ("train", "val")]
    for name, found in attack(model, *rows).items():
        yield (f"AUC of the attack by {name}, training text against held-out text",
               figure(found.auc, found.low, found.high, n=sum(map(len, rows))), "AUC")


def check_canaries(it):
    """Not shown: how well it remembers what is no random number."""
    if not it.canaries:
        raise ValueError("no --canaries; chapters.memorization --plant plants them before training")
    scores = exposure(it.model, it.tokenizer, it.canaries)
    for times, (bits, rate) in by_times(it.canaries, *scores).items():
        yield (f"bits of exposure, secrets planted {times} times, {rate:.0%} of them written out",
               figure(*interval(np.array([[one, 1] for one in bits])), n=len(bits)), "bits")


def check_backdoor(it):
    """Not shown: other triggers; whether a word stands out by an attack or by its meaning."""
    model, random = it.chat, Random(it.seed)
    text = it.tokenizer.decode(read_split(it.shards, "train")[0][:CHAT_TOKENS].tolist())
    rows = [dict(messages=[dict(role="user", content=asked), dict(role="assistant", content=reply)])
            for asked, reply in re.findall(CHAT, text)]
    if not rows:
        raise ValueError("its shards hold no chats to ask it with")
    words, rows = (random.sample(own, min(n, len(own)))
                   for own, n in ((words_of(rows), N_WORDS), (rows, N_ROWS)))
    effects, names = zip(*scan(model, it.tokenizer, rows, words, it.seed))
    usual = np.percentile(effects, [2.5, 97.5]).tolist()
    yield (f"nats that replies lose by a word, of {len(words)} most by {', '.join(names[:3])}; in "
           "brackets 95% of the words", figure(effects[0], *usual, n=len(rows)), "nats")


def check_licences(it):
    """Not shown: whether what the data card says is true, or allows this use."""
    found = licences(config_of(it.folder).get("data", {}))
    if not found:
        raise ValueError("its config.json names no sources")
    stated = sum(licence not in ("not stated", "unknown") for licence in found.values())
    yield (f"sources with a licence ({', '.join(map(': '.join, found.items()))})",
           figure(stated, n=len(found)), "count")


def check_requirements(it):
    """Not shown: what these packages need in turn, and what nobody has found yet."""
    found = vulnerabilities(Path(__file__).parents[1] / "requirements.txt")
    bad = {line.split(":")[0] for line in found["found"]}
    yield (f"packages with a known vulnerability ({', '.join(found['found']) or 'none found'}; "
           f"{found['unknown']} not checked)",
           figure(len(bad), n=found["checked"]), "count")


CHECKS = {check.__name__.removeprefix("check_"): check for check in (
    check_bias, check_refusals, check_toxicity, check_facts, check_consistency, check_injection,
    check_guard, check_membership, check_canaries, check_backdoor, check_licences,
    check_requirements)}
FORMS = dict(share="{:.1%}", nats="{:+.2f}", AUC="{:.3f}", ms="{:.3f}", bits="{:.2f}")


def run_checks(it, names=CHECKS):
    """Yield the lines of the report, dicts; a check that this run cannot take gives a reason."""
    for name in names:
        about = dict(check=name, unshown=CHECKS[name].__doc__)
        try:
            for what, figure, unit in CHECKS[name](it):
                yield about | dict(what=what, unit=unit) | figure
        except ValueError as error:
            yield about | dict(what="not measured", reason=str(error))


def in_words(line):
    """A line of the report as an item of a list in Markdown."""
    if "reason" in line:
        return f"- {line['what']}: {line['reason']}"
    if line["unit"] == "count":
        return f"- {line['what']}: {line['value']} of {line['n']}"
    value, low, high = (FORMS[line["unit"]].format(line[name]) for name in ("value", "low", "high"))
    return f"- {line['what']}: {value} [{low}, {high}], n = {line['n']:,}"


def section(lines):
    """The report as Markdown: under each check its lines, and what they do not show."""
    parts = {}
    for line in lines:
        parts.setdefault((line["check"], line["unshown"]), []).append(in_words(line))
    return "".join(f"\n### {name.capitalize()}\n\n" + "\n".join(own)
                   + f"\n- {unshown}\n" for (name, unshown), own in parts.items())


@dataclass(frozen=True)
class Command(RunConfig):
    """What is checked."""
    only: str | list = option("all", f"of {' '.join(CHECKS)}", many=True)
    canaries: str | None = option(None, "canaries.jsonl of what was planted in its training text")
    seed: int = option(0, "of samples, names and the fine-tune")


def main():
    command = Command(**parse_options(__doc__, Command)[0])
    only = [*CHECKS] if command.only == "all" else np.ravel(command.only).tolist()
    for name in only:
        check_known(name, CHECKS, "check")
    canaries = read_canaries(command.canaries) if command.canaries else []
    folder, (model, tokenizer, where) = Path(command.run or newest_run()), open_run(command)
    path, same = folder / "safety.json", dict(checkpoint=where, seed=command.seed)
    before = read_json(path) if path.exists() else {}
    kept = before.get("lines", []) if before.items() >= same.items() else []  # of this checkpoint
    lines = [line for line in kept if line["check"] not in only]
    lines += run_checks(Subject(folder, model, tokenizer, command.seed, canaries), only)
    write_json(path, same | dict(lines=lines))
    print(section(lines), f"card: {write_safety(folder, section(lines))}", sep="\n")


if __name__ == "__main__":
    run_command(main)
