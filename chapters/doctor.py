"""
What a training log says: a run folder goes in; out come illnesses, each with the rows that show it
and the option to change.

    python -m chapters.doctor                 # the newest run
    python -m chapters.doctor runs/stdlib     # a running or a finished one

It reads log.jsonl and config.json. Medians over several rows are compared, as a single batch may
be odd; the bounds stand below with their reasons. Losses are nats per token.
"""

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

from sample import newest_run
from tokenizer import Parser, read_sealed, run_command
from train import TrainConfig, check_options, is_number, read_log

FEW = 20             # rows below which a curve has no shape yet
WINDOW = 5           # rows of a median: what lasts for three of them is no odd batch
OFF_START = 0.5      # nats off ln V; small random weights are off by a tenth, trained ones by more
RISE = 0.25          # nats; odd batches move a median of five by less
NOISES = 6           # a jump is larger than so many usual steps from one row to the next
DEAD_NORM = 1e-3     # a gradient that teaches is 0.1 to 10 long
FREQUENCIES = 0.1    # share of ln V that the frequencies of the tokens alone are worth, or more
STEEP = 1 / 3        # of the fall in the last half of all steps taken: a line has half, a bend less
SLOW = 0.2           # share of its start that a loss must have lost if it was steep all the way
FLAT = 0.01          # share of the loss; healthy runs gain twice that and more in their last 2/5
WORSE = 1.03         # validation loss over the best: the same sequences each time, so little noise
REPEATS = 8          # epochs; the first four teach almost as new text does (arXiv:2305.16264)
TOO_GOOD = 0.05      # share of ln V; no language is so predictable


@dataclass
class Finding:
    """An illness, the rows it was seen in, and what to change."""
    illness: str
    seen: str
    change: str


# -----------------------------------------------------------------------------
# Reading a log, and what it says row by row.


def read_run(folder):
    """-> (the rows of a run's log in the order of their steps, its config). What a row lacks is
    nan, what an older config lacks has the default of today."""
    folder = Path(folder)
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).exists():
            near = Path("runs", folder)
            hint = f"did you mean {near}?" if near.is_dir() else "train.py writes one"
            raise ValueError(f"{folder} is no run, it has no {name}: {hint}")
    try:
        config = read_sealed(folder / "config.json")
        check_options(config["train"])
        config["train"] = asdict(TrainConfig()) | config["train"]
        sizes = (config["model"]["vocab_size"], config["model"]["block_size"],
                 config["data"]["train"]["tokens"])
        if not all(is_number(size) and size > 0 for size in sizes):
            raise ValueError("a size is no number above 0")
        found = read_log(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds no config.json and log.jsonl of train.py: {error!r:.80}"
                         ) from None
    rows = {row["step"]: dict(row) for row in found}
    for row in rows.values():
        for name in ("loss", "lr", "grad_norm", "elapsed", "val_loss"):
            row[name] = math.nan if row.get(name) is None else row[name]
    return [rows[step] for step in sorted(rows)], config


def finite(rows, name="loss"):
    return [row for row in rows if math.isfinite(row[name])]


def level(rows, name="loss"):
    """The median of a column, without rows that lack it."""
    return median([row[name] for row in finite(rows, name)] or [math.nan])


def levels(rows):
    """-> [(step, median loss of the WINDOW rows from there on)]"""
    return [(rows[i]["step"], level(rows[i:i + WINDOW])) for i in range(len(rows) - WINDOW + 1)]


def noise(rows):
    """How much the loss usually changes from one row to the next, in nats."""
    return median(abs(a["loss"] - b["loss"]) for a, b in zip(rows, rows[1:]))


def chance(config):
    """ln V: the loss of a model that holds all tokens for alike likely."""
    return math.log(config["model"]["vocab_size"])


def is_fresh(rows, config):
    """Whether the log goes back to the first step of a model that knew nothing."""
    return rows[0]["step"] == 1 and rows[0]["loss"] > chance(config) - OFF_START


def tokens_read(rows, config):
    return rows[-1]["step"] * config["train"]["batch_size"] * config["model"]["block_size"]


def share_done(rows, config):
    """How much of the run is over, from 0 to 1."""
    options, tokens = config["train"], tokens_read(rows, config)
    minutes = max((row["elapsed"] / 60 for row in finite(rows, "elapsed")), default=0)
    done = dict(max_steps=rows[-1]["step"], tokens=tokens, minutes=minutes,
                epochs=tokens / config["data"]["train"]["tokens"])
    return min(1.0, max(done[name] / options[name] for name in done if options.get(name)))


def late_share(rows):
    """How much of its whole fall the loss made in the second half of all that the optimizer went,
    the sum of the learning rates: 0.5 if it falls along a line, near 0 if it has flattened."""
    spent = list(accumulate(row["lr"] for row in rows))
    middle = bisect_left(spent, spent[-1] / 2)
    around = level(rows[max(0, middle - WINDOW):middle + WINDOW])
    end = level(rows[-2 * WINDOW:])
    return (around - end) / max(1e-9, rows[0]["loss"] - end)


def lost(rows):
    """The share of its first loss that a run has got rid of."""
    return 1 - level(rows[-2 * WINDOW:]) / rows[0]["loss"]


def say(row):
    return f"step {row['step']} loss {row['loss']:.3f}"


def say_level(rows):
    return f"steps {rows[0]['step']}-{rows[-1]['step']} loss {level(rows):.3f}"


def validations(rows):
    return finite(rows, "val_loss")


# -----------------------------------------------------------------------------
# Illnesses: rows, config -> a Finding or None.


def not_finite(rows, config):
    """The loss is no number, or infinite, and nothing better followed."""
    sound = max((row["step"] for row in rows if math.isfinite(row["loss"])), default=-1)
    bad = next((row for row in rows if row["step"] > sound), None)
    if bad is None:
        return None
    before = [row for row in rows if row["step"] < bad["step"]][-WINDOW:]
    first = f", first in {bad['bad']}" if bad.get("bad") else ""
    seen = "; ".join(f"{say(row)}, gradient {row['grad_norm']:.2g}" for row in before[-3:])
    change = f"--learning_rate={config['train']['learning_rate'] / 10:.2g} (a tenth)"
    if config["train"]["precision"] == "fp16":
        change += ", or --precision=bf16, whose numbers reach further than fp16's"
    if not config["train"]["grad_clip"]:
        change += ", and --grad_clip=1"
    return Finding("not a number", f"step {bad['step']} loss is not finite{first}; before it "
                   f"{seen or 'nothing'}", change + "; a checkpoint from before is still good")


def left_out(rows, config):
    """Steps whose numbers went bad were left out, and the run went on."""
    bad = [row for row in rows if row.get("skipped") == "not finite"]
    if not bad:
        return None
    places = Counter(row.get("bad") for row in bad).most_common(1)
    return Finding("steps left out", f"{len(bad)} of {len(rows)} steps had no finite loss or "
                   f"gradient, most often first in {places[0][0]}; the last was {bad[-1]['step']}, "
                   f"sequences {bad[-1].get('sequences')}",
                   "a few do no harm, as they changed no weight; look at their text "
                   "(data.TokenLoader.block), and if they become more, at a tenth of the "
                   "--learning_rate")


def bad_start(rows, config):
    """The first loss is far above ln V: worse than a guess before anything was learned."""
    if rows[0]["step"] != 1 or rows[0]["loss"] < chance(config) + OFF_START:
        return None
    return Finding("bad start", f"{say(rows[0])}, where a guess costs ln V = {chance(config):.3f}",
                   "the initialisation: logits are too large, begin with smaller weights or a norm "
                   "before lm_head; or --softcap=15")


def low_start(rows, config):
    """The first loss is far below ln V: the weights know the text, or see the answer."""
    if rows[0]["step"] != 1 or rows[0]["loss"] > chance(config) - OFF_START:
        return None
    return Finding("low start", f"{say(rows[0])}, where a guess costs ln V = {chance(config):.3f}",
                   "nothing, if these weights were trained before; else look for targets that are "
                   "not one token ahead, or attention that is not causal")


def too_good(rows, config):
    """Validation is as good as solved: the answer is in the question."""
    best = min(validations(rows), key=lambda row: row["val_loss"], default=None)
    if best is None or best["val_loss"] > TOO_GOOD * chance(config):
        return None
    return Finding("too good to be true", f"step {best['step']} validation {best['val_loss']:.4f}, "
                   f"a perplexity of {math.exp(best['val_loss']):.2f}",
                   "--data: a text that repeats itself? Else the model sees what it is to predict")


def dead(rows, config):
    """The loss stands where it began, and no gradient comes back."""
    norm, now = level(rows, "grad_norm"), rows[-2 * WINDOW:]
    if not (norm < DEAD_NORM and abs(level(now) - rows[0]["loss"]) < RISE / 5):
        return None
    return Finding("dead run", f"{say(rows[0])}; {say_level(now)}, where ln V is "
                   f"{chance(config):.3f}; gradient norm {norm:.1g} throughout",
                   "the weights: layers that are all zero or saturated pass nothing back; begin "
                   "anew, in --precision=fp32 if it was fp16")


def rate_too_high(rows, config):
    """The loss rises above its beginning, or leaves its lowest level for good."""
    curve, now = levels(rows), rows[-2 * WINDOW:]
    top, low = (pick(curve, key=lambda point: point[1]) for pick in (max, min))
    above_start = top[1] > rows[0]["loss"] + RISE
    margin = max(RISE, NOISES * noise(rows))
    if spike(rows, config) or not (above_start or level(now) > low[1] + margin):
        return None
    options = config["train"]
    clipped = sum(row["grad_norm"] > (options["grad_clip"] or math.inf) for row in rows) / len(rows)
    turn = top if above_start else low
    return Finding("learning rate too high", f"{say(rows[0])}; from step {turn[0]} on "
                   f"{turn[1]:.3f}; {say_level(now)}; gradient norm "
                   f"{level(rows[:WINDOW], 'grad_norm'):.2g}, then {level(rows, 'grad_norm'):.2g}, "
                   f"clipped at {clipped:.0%} of the steps",
                   f"--learning_rate={options['learning_rate'] / 5:.2g} (a fifth), or let "
                   "--find_lr measure one; a longer --warmup_steps helps against a bad beginning")


def rate_too_low(rows, config):
    """The loss hardly falls, or slowly and along a line."""
    options, fell = config["train"], lost(rows)
    steps = sum(row["lr"] for row in rows) / options["learning_rate"]  # at the full rate
    late = late_share(rows)
    slow = abs(fell) < FREQUENCIES or 0 < fell < SLOW and late > STEEP
    enough = steps > 2 * FEW or share_done(rows, config) > 0.95
    if not (is_fresh(rows, config) and enough and slow) or spike(rows, config):
        return None
    change = f"--learning_rate={options['learning_rate'] * 10:.2g} (ten times)"
    if options["warmup_steps"] > len(rows) / 2:
        change = f"--warmup_steps={len(rows) // 20} (it was {options['warmup_steps']})"
    return Finding("learning rate too low", f"{say(rows[0])}; {say_level(rows[-2 * WINDOW:])}: "
                   f"{max(0.0, fell):.1%} lost, {late:.0%} of it in the second half; gradient norm "
                   f"{level(rows, 'grad_norm'):.2g}", f"{change}, or let --find_lr measure one")


def spike(rows, config):
    """The loss jumps up for several rows: it was thrown off, and may come back."""
    margin, curve = max(RISE, NOISES * noise(rows)), levels(rows)
    for i in range(FEW, len(curve)):
        before = level(rows[i - FEW:i])
        if curve[i][1] <= before + margin or before > rows[0]["loss"] - RISE:
            continue  # no jump, or nothing had been learned that could be lost
        back = next((step for step, now in curve[i + 1:] if now < before + RISE / 5), None)
        top = max(rows[i:i + FEW], key=lambda row: row["loss"])
        return Finding("spike", f"{say_level(rows[i - FEW:i])}; {say(top)}, gradient norm "
                       f"{top['grad_norm']:.2g}; "
                       + (f"back from step {back} on" if back else "not back since"),
                       ("nothing, unless it comes again: then " if back else "go on from before it "
                        "with --resume and ") + "a lower --learning_rate or --grad_clip; look at "
                       f"the data of that step (--seed gives other batches)")
    return None


def overfitting(rows, config):
    """Validation gets worse while training gets better."""
    measured = validations(rows)
    best = min(measured, key=lambda row: row["val_loss"], default=None)
    if len(measured) < 3 or measured[-1]["val_loss"] < WORSE * best["val_loss"]:
        return None
    last, at = measured[-1], rows.index(best)
    then, now = rows[max(0, at - WINDOW):at + WINDOW], rows[-2 * WINDOW:]
    if level(now) > level(then):
        return None
    return Finding("overfitting", f"validation {best['val_loss']:.3f} at step {best['step']}, "
                   f"{last['val_loss']:.3f} at step {last['step']}, while training went from "
                   f"{level(then):.3f} to {level(now):.3f}",
                   f"--patience=3 ends such a run (its best checkpoint is step {best['step']}); "
                   "more --data, --dropout=0.1, or a smaller --size")


def repeats(rows, config):
    """The same text too many times."""
    epochs = tokens_read(rows, config) / config["data"]["train"]["tokens"]
    if epochs <= REPEATS or config["train"].get("mix"):
        return None
    return Finding("data repeats", f"step {rows[-1]['step']}: {tokens_read(rows, config):,} tokens "
                   f"read of {config['data']['train']['tokens']:,}, {epochs:.1f} epochs",
                   f"more --data, or --epochs={REPEATS // 2}")


def plateau(rows, config):
    """Nothing has been gained for two fifths of the run."""
    part = rows[-2 * len(rows) // 5:]
    then, now = part[:len(part) // 3], part[-(len(part) // 3):]
    if len(rows) < 5 * FEW:
        return None
    gain, blur = level(then) - level(now), 2 * noise(part) / math.sqrt(len(then))
    if gain + blur > FLAT * level(then):
        return None
    return Finding("plateau", f"{say_level(then)}; {say_level(now)}, "
                   f"learning rate {level(then, 'lr'):.1e}, then {level(now, 'lr'):.1e}",
                   "more steps will not help: a larger --size, or if the rate was high until the "
                   "end, a --schedule that decays; --patience=3 ends such a run")


def underfitting(rows, config):
    """The run ended while training and validation, still equal, were both falling steeply."""
    measured = validations(rows)
    if not measured or share_done(rows, config) < 0.95 or not STEEP < late_share(rows) < 1:
        return None
    now = rows[-2 * WINDOW:]
    if measured[-1]["val_loss"] > WORSE * level(now) or not is_fresh(rows, config):
        return None
    return Finding("underfitting", f"{say_level(now)}, validation {measured[-1]['val_loss']:.3f}; "
                   f"{late_share(rows):.0%} of the fall came in the second half of the run",
                   f"train longer, such as --resume --max_steps={2 * rows[-1]['step']}; when that "
                   "no longer helps, a larger --size")


# -----------------------------------------------------------------------------
# The visit.

CAUSES = (bad_start, dead, rate_too_high, rate_too_low)  # the first of these explains the curve,
CURVES = (spike, overfitting, plateau, underfitting)     # else these say what is to be seen in it
ALWAYS = (low_start, repeats, too_good)


def diagnose(rows, config):
    """The findings in a log, the worst first; few rows can only show a bad beginning or end."""
    numbers, broken = finite(rows), not_finite(rows, config)
    if broken or len(numbers) < FEW:
        starts = [illness(numbers, config) for illness in (bad_start, low_start) if numbers]
        return [finding for finding in (broken, *starts) if finding]
    cause = next(filter(None, (illness(numbers, config) for illness in CAUSES)), None)
    found = [cause] if cause else [illness(numbers, config) for illness in CURVES]
    found += [left_out(rows, config), *(illness(numbers, config) for illness in ALWAYS)]
    return [finding for finding in found if finding]


def summary(rows, config):
    """One line: how far, from which loss to which."""
    numbers, measured = finite(rows), validations(rows)
    text = f"{rows[-1]['step']:,} steps, {share_done(rows, config):.0%} of the run"
    if numbers:
        text += f", loss {numbers[0]['loss']:.3f} to {level(numbers[-WINDOW:]):.3f}"
    return text + (f", validation {measured[-1]['val_loss']:.3f}" if measured else "")


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a run (default the newest)")
    folder = parser.parse_args().folder or newest_run()
    rows, config = read_run(folder)
    if not rows:
        raise ValueError(f"{folder}/log.jsonl has no row yet: come back after the first step")
    print(f"{folder}: {summary(rows, config)}")
    found = diagnose(rows, config)
    for finding in found:
        print(f"\n{finding.illness}\n  seen    {finding.seen}\n  change  {finding.change}")
    if not found and len(rows) < FEW:
        print(f"too few rows to say more: come back after {FEW}")
    elif not found:
        print("healthy: none of the illnesses that this doctor knows")


if __name__ == "__main__":
    run_command(main)
