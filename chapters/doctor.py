"""
What a training log says: a run folder goes in; out come illnesses, each with the rows that show it
and the option to change; where numbers went bad, also the module in which they did.

    python -m chapters.doctor                 # the newest run
    python -m chapters.doctor runs/stdlib     # a running or a finished one

Medians over several rows are compared, as a single batch may be odd; the bounds stand below with
their reasons. Losses are nats per token.
"""

import math
import sys
from bisect import bisect_left
from collections import namedtuple
from itertools import accumulate
from pathlib import Path
from statistics import median

if __name__ == "__main__":  # `python chapters/doctor.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chapters.nonfinite import bad_numbers, describe, is_bad, read_run, trace, typical
from sample import newest_run
from tokenizer import Parser, run_command

FEW = 20             # rows below which a curve has no shape yet
WINDOW = 5           # rows of a median: what lasts for three of them is no odd batch
OFF_START = 0.5      # nats off ln V; small random weights are off by a tenth, trained ones by more
RISE = 0.25          # nats; odd batches move a median of five by less
NOISES = 6           # a jump is larger than so many usual steps from one row to the next
DEAD_NORM = 1e-3     # a gradient that teaches is 0.1 to 10 long
FREQUENCIES = 0.1    # share of ln V that the frequencies of the tokens alone are worth, or more
STEEP = 1 / 3        # of the fall in the second half of the steps: a line has half, a curve less
SLOW = 0.2           # share of its start that a loss must have lost if it was steep all the way
FLAT = 0.01          # share of the loss; healthy runs gain twice that and more in their last 2/5
WORSE = 1.03         # validation loss over the best: the same sequences each time, so little noise
REPEATS = 8          # epochs; the first four teach almost as new text does (arXiv:2305.16264)
TOO_GOOD = 0.05      # share of ln V; no language is so predictable

Finding = namedtuple("Finding", "illness seen change")  # what it is, in which rows, what to do


class Log:
    """The rows with a finite loss, and what is asked of them again and again."""

    def __init__(self, rows, config):
        self.rows, self.train = rows, config["train"]
        self.n_tokens = config["data"]["train"]["tokens"]
        self.guessing = math.log(config["model"].vocab_size)  # the loss where all tokens are alike
        self.start, self.end = rows[0]["loss"], typical(rows[-2 * WINDOW:])
        self.beginning = f"{describe(rows[:1])} (a guess costs ln V = {self.guessing:.3f})"
        self.ending = describe(rows[-2 * WINDOW:])
        self.off_start = self.start - self.guessing if rows[0]["step"] == 1 else 0.0
        self.is_new = rows[0]["step"] == 1 and self.off_start > -OFF_START
        self.validations = [row for row in rows if math.isfinite(row["val_loss"])]
        self.validation = typical(self.validations[-1:], "val_loss")
        self.best = min(self.validations, key=lambda row: row["val_loss"], default=None)
        self.tokens = rows[-1]["step"] * self.train.batch_size * config["model"].block_size
        self.epochs = self.tokens / self.n_tokens
        changes = [abs(a["loss"] - b["loss"]) for a, b in zip(rows, rows[1:])]
        self.noise = median(changes or [0])  # from one row to the next, in nats
        self.jump = max(RISE, NOISES * self.noise)
        self.curve = [(rows[i]["step"], typical(rows[i:i + WINDOW]))
                      for i in range(len(rows) - WINDOW + 1)]

    def share_done(self):
        """How much of the run is over, from 0 to 1."""
        seconds = max((row["elapsed"] for row in self.rows if row["elapsed"] > 0), default=0)
        done = dict(max_steps=self.rows[-1]["step"], tokens=self.tokens, minutes=seconds / 60,
                    epochs=self.epochs)
        limits = vars(self.train)
        return min(1.0, max(n / limits[name] for name, n in done.items() if limits[name]))

    def progress(self):
        words = f"{self.share_done():.0%} of the run, loss {self.start:.3f} to {self.end:.3f}"
        return words + (f", validation {self.validation:.3f}" if self.best else "")

    def late_share(self):
        """How much of its whole fall the loss made in the second half of all that the optimizer
        went, the sum of the rates: 0.5 if it falls along a line, near 0 if it has flattened."""
        gone = list(accumulate(row["lr"] for row in self.rows))
        middle = bisect_left(gone, gone[-1] / 2)
        halfway = typical(self.rows[max(0, middle - WINDOW):middle + WINDOW])
        return (halfway - self.end) / max(1e-9, self.start - self.end)


# -----------------------------------------------------------------------------
# Illnesses, each under its name: a Log -> None, or (what was seen, what to change).


def bad_start(log):
    """Worse than a guess before anything was learned."""
    if log.off_start > OFF_START:
        return (log.beginning, "the logits are too large: begin with smaller weights or a norm "
                "before lm_head; or --softcap=15")


def low_start(log):
    """The weights know the text before the first step, or see the answer."""
    if log.off_start < -OFF_START:
        return (log.beginning, "nothing, if these weights were trained before; else look for "
                "targets that are not one token ahead, or attention that is not causal")


def too_good_to_be_true(log):
    """Validation is as good as solved: the answer is in the question."""
    if log.best and log.best["val_loss"] < TOO_GOOD * log.guessing:
        return (f"step {log.best['step']} validation {log.best['val_loss']:.4f}",
                "--data: a text that repeats itself? Else the model sees what it is to predict")


def dead_run(log):
    """The loss stands where it began, and no gradient comes back."""
    norm = typical(log.rows, "grad_norm")
    if norm < DEAD_NORM and abs(log.end - log.start) < RISE / 5:
        return (f"{log.beginning}; {log.ending}; gradient norm {norm:.1g}",
                "new weights: layers of zeros or saturated ones pass no gradient back; and "
                "--precision=fp32 if it was fp16")


def learning_rate_too_high(log):
    """The loss rises above its beginning, or leaves its lowest level for good."""
    lowest, *_, highest = sorted(log.curve, key=lambda point: point[1])
    rises = highest[1] > log.start + RISE
    if (rises or log.end > lowest[1] + log.jump) and not spike(log):
        step, loss = highest if rises else lowest
        limit = log.train.grad_clip or math.inf
        clipped = sum(row["grad_norm"] > limit for row in log.rows) / len(log.rows)
        return (f"{log.beginning}; from step {step} on {loss:.3f}; {log.ending}; gradient norm "
                f"{typical(log.rows, 'grad_norm'):.2g}, clipped at {clipped:.0%} of the steps",
                f"--learning_rate={log.train.learning_rate / 5:.2g} (a fifth), or let "
                "chapters.search --find_lr measure one; or a longer --warmup_steps")


def learning_rate_too_low(log):
    """The loss hardly falls, or slowly and along a line."""
    lost, late, train = 1 - log.end / log.start, log.late_share(), log.train
    full_steps = sum(row["lr"] for row in log.rows) / train.learning_rate
    is_long = full_steps > 2 * FEW or log.share_done() > 0.95
    is_slow = abs(lost) < FREQUENCIES or 0 < lost < SLOW and late > STEEP
    if log.is_new and is_long and is_slow and not spike(log):
        change = f"--learning_rate={train.learning_rate * 10:.2g} (ten times)"
        if train.warmup_steps > len(log.rows) / 2:
            change = f"--warmup_steps={len(log.rows) // 20} (it was {train.warmup_steps})"
        return (f"{log.beginning}; {log.ending}: {max(0.0, lost):.1%} lost, {late:.0%} of it in "
                "the second half",
                f"{change}, or let chapters.search --find_lr measure one")


def spike(log):
    """The loss jumps up for several rows: it was thrown off, and may come back."""
    for i in range(FEW, len(log.curve)):
        before = typical(log.rows[i - FEW:i])
        if log.curve[i][1] <= before + log.jump or before > log.start - RISE:
            continue  # no jump, or nothing had been learned that could be lost
        back = next((step for step, loss in log.curve[i + 1:] if loss < before + RISE / 5), None)
        top = max(log.rows[i:i + FEW], key=lambda row: row["loss"])
        seen = f"{describe(log.rows[i - FEW:i])}; {describe([top])}, norm {top['grad_norm']:.2g}"
        then = "nothing, unless it comes again: then" if back else "--resume from before it, with"
        return (f"{seen}; {f'back from step {back} on' if back else 'not back'}",
                f"{then} a lower --learning_rate or --grad_clip; look at the data of that step")


def overfitting(log):
    """Validation gets worse while training gets better."""
    best = log.best
    if len(log.validations) > 2 and log.validation > WORSE * best["val_loss"]:
        i = log.rows.index(best)
        then = typical(log.rows[max(0, i - WINDOW):i + WINDOW])
        if log.end <= then:
            return (f"step {best['step']} validation {best['val_loss']:.3f}, at the end "
                    f"{log.validation:.3f}; training went from {then:.3f} to {log.end:.3f}",
                    f"--patience=3 ends such a run (step {best['step']} is its best checkpoint); "
                    "more --data, --dropout=0.1, or a smaller --size")


def data_repeats(log):
    """The same text too many times."""
    if log.epochs > REPEATS:
        return (f"step {log.rows[-1]['step']}: {log.tokens:,} tokens read of {log.n_tokens:,}, "
                f"{log.epochs:.1f} epochs", f"more --data, or --epochs={REPEATS // 2}")


def plateau(log):
    """Nothing has been gained for two fifths of the run."""
    part = log.rows[-2 * len(log.rows) // 5:]
    then, now = part[:len(part) // 3], part[-(len(part) // 3):]
    blur = 2 * log.noise / math.sqrt(max(1, len(then)))
    if len(log.rows) > 5 * FEW and typical(then) - typical(now) + blur < FLAT * typical(then):
        return (f"{describe(then)}; {describe(now)}, learning rate {typical(now, 'lr'):.1e}",
                "a larger --size; a --schedule that decays, if the rate was high to the end; "
                "--patience=3 ends such a run")


def underfitting(log):
    """The run ended while training and validation, still equal, were both falling steeply."""
    late, is_over = log.late_share(), log.share_done() > 0.95
    if log.is_new and is_over and log.validation < WORSE * log.end and STEEP < late < 1:
        return (f"{log.ending}, validation {log.validation:.3f}; {late:.0%} of the fall came in "
                "the second half of the run",
                f"--max_steps={2 * log.rows[-1]['step']} (with --resume also --rewarm), later a "
                "larger --size")


CAUSES = (bad_start, dead_run, learning_rate_too_high, learning_rate_too_low)  # the first explains
CURVES = (spike, overfitting, plateau, underfitting)  # all; without one, these are what is seen
ALWAYS = (low_start, data_repeats, too_good_to_be_true)


# -----------------------------------------------------------------------------
# The visit.


def diagnose(rows, config):
    """The findings in a log, the worst first; few rows can only show a bad beginning or end."""
    numbers = [row for row in rows if not is_bad(row)]
    bad = [Finding(*words) for words in bad_numbers(rows, config["train"])]
    log = Log(numbers, config) if numbers else None

    def see(*illnesses):
        found = [(illness.__name__.replace("_", " "), illness(log)) for illness in illnesses]
        return [Finding(name, *words) for name, words in found if words]

    if log is None or is_bad(rows[-1]) or len(numbers) < FEW:
        return bad + (see(bad_start, low_start) if log else [])
    return (see(*CAUSES)[:1] or see(*CURVES)) + bad + see(*ALWAYS)


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", help="a run folder (default the newest)")
    folder = Path(parser.parse_args().folder or newest_run())
    rows, config = read_run(folder)
    numbers, found = [row for row in rows if not is_bad(row)], diagnose(rows, config)
    progress = f", {Log(numbers, config).progress()}" if numbers else ""
    print(f"{folder}: {rows[-1]['step']:,} steps{progress}")
    for finding in found:
        print(f"\n{finding.illness}\n  seen    {finding.seen}\n  change  {finding.change}")
    if len(numbers) < len(rows):
        print(f"\nnumbers went bad\n  where   {trace(folder)}")
    elif not found:
        print("healthy: none of the illnesses that this doctor knows" if len(rows) >= FEW else
              f"too few rows to say more: come back after {FEW}")


if __name__ == "__main__":
    run_command(main)
