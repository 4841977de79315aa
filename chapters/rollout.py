"""
Two runs behind one server: who is answered by which, whether users like one more, and a canary, a
new run that gets more and more requests as long as it is no worse than the old one.

    python -m chapters.serve runs/chat --run_b=runs/new --share=10     # 10% of users; A/B test
    python -m chapters.serve runs/chat --run_b=runs/new --canary       # 1% ... 100%, or back to 0
    python -m chapters.rollout feedback.jsonl                          # the ratings of both

A user always meets the same run; who has no name is split request by request. Every comparison is
Fisher's exact test of two shares: of errors, of slow answers, of dislikes.
"""

import math
import sys
from collections import Counter, deque
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

if __name__ == "__main__":  # `python chapters/rollout.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.dialogue import percent
from chapters.feedback import last_votes, read_votes
from evaluate import wilson
from model import check_options, option
from sample import warn
from tokenizer import parse_options, run_command

STEPS = (1, 5, 25, 50, 100)  # per cent of requests that a canary gets, one after the other
LOOKS = 5                # at the figures of a step
LEVEL = 0.05             # chance that a canary as good as the old run is rolled back
SLOWER = 1.5             # times the old run's p95, beyond which an answer is slow
MOST = 5                 # ratings of a client that count, so that nobody decides alone

# -----------------------------------------------------------------------------
# Who meets which run.


def arm_of(user, share, salt=""):
    """"b" for a share of all users, in per cent, else "a"; always the same for a user and a salt,
    and who is in "b" stays there when the share grows."""
    number = int.from_bytes(sha256(f"{salt} {user}".encode(errors="replace")).digest()[:8], "big")
    return "b" if number * 100 < share * 2**64 else "a"


# -----------------------------------------------------------------------------
# Two shares: could they be equal?


def chances(n, m, total):
    """-> (the least count, the chances of this count and each that follows) of how many of `total`
    hits fall among n, if each of n + m is as likely to be hit: the hypergeometric distribution."""
    def ways(n, k):
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    low, high = max(0, total - m), min(n, total)
    return low, [math.exp(ways(n, k) + ways(m, total - k) - ways(n + m, total))
                 for k in range(low, high + 1)]


def fisher(a, n, b, m):
    """The p-value of a hits of n against b of m: the chance of a difference as unlikely as this
    one, or more so, if the true shares are equal. Fisher's exact test, two-sided."""
    low, found = chances(n, m, a + b)
    return min(1.0, sum(p for p in found if p <= found[a - low] * (1 + 1e-7)))


def more(a, n, b, m):
    """The one-sided p-value: the chance of a hits of n or more, if shares a / n and b / m are
    equal in truth."""
    low, found = chances(n, m, a + b)
    return min(1.0, sum(found[a - low:]))


def significance(ups_a, n_a, ups_b, n_b, looks=1):
    """One line about how many ratings of two arms are good; looks: how often it was asked for so
    far, as each look is one more chance to take luck for a difference."""
    if not n_a or not n_b:
        return f"{n_a} ratings of a, {n_b} of b: there is nothing to compare"
    shares = [percent(dict(zip(("value", "low", "high"), (up / n, *wilson(up / n, n)))))
              for up, n in ((ups_a, n_a), (ups_b, n_b))]
    p = fisher(ups_a, n_a, ups_b, n_b)
    verdict = "differs" if p < LEVEL / looks else "may be chance"
    peeks = f" / {looks} looks, as each could have been the last" * (looks > 1)
    return (f"liked: a {shares[0]} of {n_a}, b {shares[1]} of {n_b}: p = {p:.2g}, {verdict} "
            f"(below {LEVEL}{peeks}; fix the number of ratings before you look)")


# -----------------------------------------------------------------------------
# What is known of each arm, and a split that stays as it is.


class Arm:
    """The figures of one run: answers, errors among them, seconds to the first token, ratings."""

    def __init__(self, name):
        self.name, self.n, self.errors, self.ups, self.downs = name, 0, 0, 0, 0
        self.seconds, self.raters = deque(maxlen=10_000), Counter()

    def p95(self):
        """Seconds within which 95% of first tokens came."""
        return sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]

    def slow(self, limit):
        return sum(seconds > limit for seconds in self.seconds)


class Split:
    """Two runs by name, the second for a share of users in per cent. choose() an arm for each
    request, note() what came of it, rate() what the user says."""

    def __init__(self, old, new, share, salt=""):
        self.arms, self.share, self.salt = {"a": Arm(old), "b": Arm(new)}, share, salt
        self.looks, self.state = 0, "split"

    def choose(self, user):
        return arm_of(user, self.share, self.salt)

    def note(self, arm, failed, seconds=None):
        """Count a request: whether it failed on our side, and when its first token came."""
        own = self.arms[arm]
        own.n, own.errors = own.n + 1, own.errors + failed
        if seconds is not None:
            own.seconds.append(seconds)

    def rate(self, arm, rating, client):
        """Count a rating, 1 or -1, the first MOST of each client."""
        own = self.arms[arm]
        if own.raters[client] < MOST:
            own.raters[client] += 1
            own.ups, own.downs = own.ups + (rating > 0), own.downs + (rating < 0)

    def ratings(self):
        """What significance() takes, and one look more."""
        self.looks += 1
        a, b = self.arms.values()
        return significance(a.ups, a.ups + a.downs, b.ups, b.ups + b.downs, self.looks)

    def report(self):
        """How it goes, as plain values; that is one look more."""
        arms = {arm: dict(model=own.name, requests=own.n, errors=own.errors, up=own.ups,
                          down=own.downs) for arm, own in self.arms.items()}
        return dict(state=self.state, share=self.share, ratings=self.ratings(), arms=arms)


class Canary(Split):
    """A split whose share grows by STEPS, each after n_requests to the new run that show it no
    worse; where it is, the share is 0 at once, and `state` says so: running, promoted, rolled
    back. All looks together roll back a run that is as good with a chance of LEVEL at most."""

    def __init__(self, old, new, salt="", n_requests=100, steps=STEPS, say=warn):
        super().__init__(old, new, steps[0], salt)
        self.steps, self.say, self.state = steps, say, "running"
        self.every = math.ceil(n_requests / LOOKS)
        self.level = LEVEL / (3 * LOOKS * len(steps))  # three shares, each time

    def note(self, arm, failed, seconds=None):
        super().note(arm, failed, seconds)
        n = self.arms["b"].n
        if self.state == "running" and arm == "b" and n % self.every == 0:
            self.look(n // self.every)

    def worse(self):
        """Why the new run is worse than the old one, or None."""
        a, b = self.arms.values()
        limit = SLOWER * a.p95() if a.seconds else math.inf
        for what, bad_b, n_b, bad_a, n_a in (
                ("errors", b.errors, b.n, a.errors, a.n),
                ("slow answers", b.slow(limit), len(b.seconds), a.slow(limit), len(a.seconds)),
                ("dislikes", b.downs, b.ups + b.downs, a.downs, a.ups + a.downs)):
            if n_a and n_b and more(bad_b, n_b, bad_a, n_a) < self.level:
                return f"{what} {bad_b} of {n_b}, against {bad_a} of {n_a}"
        return None

    def look(self, number):
        """Go on, to the next step, or back, at the look of this number."""
        names = [arm.name for arm in self.arms.values()]
        if reason := self.worse():
            self.share, self.state = 0, "rolled back"
            self.say(f"{names[1]} is rolled back, {names[0]} answers all: {reason}")
        elif number % LOOKS == 0:
            step = number // LOOKS
            if step == len(self.steps):
                self.state = "promoted"
                self.say(f"{names[1]} is promoted: it was no worse than {names[0]} in "
                         f"{self.arms['b'].n:,} answers")
            else:
                self.share = self.steps[step]
                self.say(f"{names[1]} now gets {self.share}% of all requests")


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class RolloutConfig:
    """Whose ratings are compared."""
    log: str | None = option(None, "the server's --feedback file", positional=True)
    looks: int = option(1, "how often you have looked at these ratings, this time included", low=1)

    __post_init__ = check_options


def main():
    config = RolloutConfig(**parse_options(__doc__, RolloutConfig)[0])
    if config.log is None:
        raise ValueError("name the log of a server: python -m chapters.rollout feedback.jsonl")
    votes, n_left_out = last_votes(read_votes(config.log)[0], MOST)
    if not votes:
        raise ValueError(f"{config.log} holds no ratings")
    counts = Counter((vote.arm, vote.rating) for vote in votes)
    figures = [(counts[arm, 1], counts[arm, 1] + counts[arm, -1]) for arm in "ab"]
    print(significance(*figures[0], *figures[1], config.looks))
    if n_left_out:
        print(f"{n_left_out:,} ratings are left out: the last of a client on an answer counts, up "
              f"to {MOST} answers a client")


if __name__ == "__main__":
    run_command(main)
