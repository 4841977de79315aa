"""chapters/rollout.py: a split that is stable, tests of shares that are exact, a canary that turns
back in time; and runs that are switched while clients stream."""

import json
import math
from fractions import Fraction
from itertools import product
from random import Random

import pytest
from conftest import mistake

from chapters import rollout
from chapters.rollout import (LEVEL, LOOKS, STEPS, Arm, Canary, Split, arm_of, chances, fisher,
                              more, significance)

# -----------------------------------------------------------------------------
# Who meets which run.


def test_a_user_stays_where_it_is_when_the_share_grows_and_shares_are_kept():
    users = [f"user {i}" for i in range(4000)]
    before = set()
    for share in 0, 1, 10, 50, 99.9, 100:
        b = {user for user in users if arm_of(user, share) == "b"}
        assert before <= b and len(b) == pytest.approx(4000 * share / 100, abs=100)
        before = b
    assert len(b) == 4000 and arm_of("\ud800", 50) in "ab"


def test_another_salt_splits_the_users_anew():
    arms = [(arm_of(i, 50, "x"), arm_of(i, 50, "y")) for i in range(2000)]
    for pair in product("ab", repeat=2):
        assert arms.count(pair) == pytest.approx(500, abs=90)


# -----------------------------------------------------------------------------
# Two shares.


def exact(a, n, b, m):
    """(two-sided, one-sided) p-values by counting all ways to draw the hits, in fractions."""
    ways = {k: math.comb(n, k) * math.comb(m, a + b - k) for k in range(n + 1) if a + b >= k}
    total = sum(ways.values())
    return (Fraction(sum(w for w in ways.values() if w <= ways[a]), total),
            Fraction(sum(w for k, w in ways.items() if k >= a), total))


def test_p_values_are_those_of_counting_all_ways():
    for n, m in (1, 1), (5, 3), (8, 8), (12, 30):
        for a, b in product(range(n + 1), range(m + 1)):
            two, one = exact(a, n, b, m)
            assert fisher(a, n, b, m) == pytest.approx(float(two), rel=1e-9)
            assert more(a, n, b, m) == pytest.approx(float(one), rel=1e-9)


@pytest.mark.slow  # it takes scipy a second to be there
def test_p_values_are_those_of_scipy_for_large_counts_too():
    stats = pytest.importorskip("scipy.stats", reason="only to compare with")
    random = Random(0)
    for _ in range(30):
        n, m = random.randrange(1, 3000), random.randrange(1, 300)
        a, b = random.randrange(n + 1), random.randrange(m + 1)
        table = [[a, n - a], [b, m - b]]
        assert fisher(a, n, b, m) == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-6)
        expected = stats.fisher_exact(table, alternative="greater").pvalue
        assert more(a, n, b, m) == pytest.approx(expected, rel=1e-6)


def test_chances_are_those_of_a_distribution():
    for n, m, total in (4, 6, 5), (10**5, 10**3, 50), (3, 0, 2), (0, 3, 2):
        low, found = chances(n, m, total)
        assert sum(found) == pytest.approx(1) and low == max(0, total - m)


def test_the_line_says_what_differs_and_counts_looks():
    assert "there is nothing to compare" in significance(0, 0, 3, 4)
    line = significance(60, 100, 80, 100)
    assert "a 60.0% [" in line and "b 80.0% [" in line and "p = 0.0032, differs" in line
    assert "may be chance" in significance(60, 100, 65, 100)
    peeked = significance(60, 100, 80, 100, looks=20)
    assert "may be chance" in peeked and "below 0.05 / 20 looks" in peeked


@pytest.mark.slow
def test_a_look_after_each_rating_finds_a_difference_that_is_not_there():
    """What the warning is about: with equal arms far more than 1 of 20 tests ends "differs"."""
    random, found = Random(1), {True: 0, False: 0}
    for _ in range(200):
        split, seen = Split("old", "new", 50), set()
        for i in range(60):
            for arm in "ab":
                split.rate(arm, random.choice([1, -1]), f"{arm} {i}")
            if i % 4 == 3:
                a, b = split.arms.values()
                seen.add(fisher(a.ups, i + 1, b.ups, i + 1) < LEVEL)
        found[True] += True in seen
        found[False] += fisher(a.ups, 60, b.ups, 60) < LEVEL
    assert found[True] > 0.1 * 200 and found[False] < 0.08 * 200


def test_a_client_that_rates_a_thousand_times_counts_five():
    split = Split("old", "new", 50)
    for _ in range(1000):
        split.rate("b", -1, "spam")
    split.rate("b", 1, "c")
    assert (split.arms["b"].ups, split.arms["b"].downs) == (1, rollout.MOST)
    assert "1 of b" not in split.ratings() and "looks" not in split.ratings().split("/")[0]


# -----------------------------------------------------------------------------
# The canary.


def served(canary, n, fails=0.0, seconds=0.1, liked=0.8, seed=0):
    """Requests to a canary whose new run has these shares of errors and likes, and this latency;
    the old one has 1%, 0.1 s and 80%. -> the shares that the new run had, in order."""
    random, shares = Random(seed), [canary.share]
    for i in range(n):
        arm = canary.choose(f"user {i}")
        own = dict(a=(0.01, 0.1, 0.8), b=(fails, seconds, liked))[arm]
        failed = random.random() < own[0]
        canary.note(arm, failed, None if failed else own[1] * random.uniform(0.5, 1.5))
        if random.random() < 0.3:
            canary.rate(arm, 1 if random.random() < own[2] else -1, f"user {i}")
        if canary.share != shares[-1]:
            shares.append(canary.share)
    return shares


def test_a_run_that_is_as_good_gets_all_requests_step_by_step():
    said = []
    canary = Canary("old", "new", say=said.append)
    assert served(canary, 20_000, fails=0.01) == [*STEPS] and canary.state == "promoted"
    assert len(said) == len(STEPS) and "new is promoted" in said[-1]
    before = canary.arms["b"].n
    served(canary, 100)
    assert canary.arms["b"].n == before + 100 and len(said) == len(STEPS)


@pytest.mark.parametrize("worse, reason", [
    (dict(fails=0.5), "errors"), (dict(fails=1.0), "errors"), (dict(seconds=0.3), "slow answers"),
    (dict(fails=0.01, liked=0.1), "dislikes")])
def test_a_run_that_is_worse_is_rolled_back_before_most_users_meet_it(worse, reason):
    said = []
    canary = Canary("old", "new", say=said.append)
    shares = served(canary, 20_000, **worse)
    assert canary.state == "rolled back" and shares[-1] == 0 and max(shares) <= 25
    assert canary.arms["b"].n < 0.03 * 20_000
    assert said[-1].startswith("new is rolled back, old answers all: " + reason)
    assert canary.choose("anybody") == "a"


def test_a_run_that_always_fails_is_rolled_back_at_the_first_look():
    canary = Canary("old", "new", say=lambda text: None)
    served(canary, 20_000, fails=1.0)
    assert canary.arms["b"].n == 100 // LOOKS


@pytest.mark.slow
def test_a_run_that_is_as_good_is_seldom_rolled_back():
    states = []
    for seed in range(40):
        canary = Canary("old", "new", salt=seed, say=lambda text: None)
        served(canary, 4000, fails=0.01, seed=seed)
        states.append(canary.state)
    assert states.count("rolled back") <= 3


def test_faster_better_and_without_a_rating_is_no_reason_to_turn_back():
    canary = Canary("old", "new", say=lambda text: None)
    served(canary, 15_000, seconds=0.01, liked=1.0)
    assert canary.state == "promoted"


def test_p95_is_what_95_of_100_answers_reach():
    arm = Arm("x")
    arm.seconds.extend(Random(0).sample(range(1, 101), 100))
    assert arm.p95() == 95 and arm.slow(arm.p95()) == 5


# -----------------------------------------------------------------------------
# The command.


def test_the_command_compares_the_arms_of_a_log(call, tmp_path):
    rows = [dict(client=f"c{i}", messages=[dict(role="user", content=f"q{i}")], answer="x",
                 model="m", arm="ab"[i % 2], rating=1 if i % 2 or i % 3 else -1, better=None)
            for i in range(120)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {}, rows[0]]), "utf-8")
    said = call(rollout, path).out
    assert said == significance(40, 60, 60, 60) + "\n" and "differs" in said
    assert "/ 9 looks" in call(rollout, path, "--looks=9").out


@pytest.mark.parametrize("words, problem", [
    ([], "name the log"), (["none.jsonl"], "no such file"), (["x", "--looks=0"], "at least 1")])
def test_a_mistake_is_one_line(words, problem, monkeypatch, capsys):
    code, (line,) = mistake(rollout.main, monkeypatch, capsys, *words)
    assert code == 1 and problem in line
