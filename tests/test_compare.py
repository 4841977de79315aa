"""chapters/compare.py: what differs between runs is named, and seeds have a mean and a spread."""

import json
import math
import statistics
from dataclasses import asdict

import pytest

from chapters import compare
from model import GPTConfig
from tokenizer import write_json
from train import TrainConfig


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(name, final loss, options...) writes a run of 30 steps of 1,000 tokens a second."""
    monkeypatch.chdir(tmp_path)

    def make(name, loss, fingerprint="ab12cd34ef", path="shards/words", n_layer=2, **options):
        folder = tmp_path / "runs" / name
        card = dict(path=path, fingerprint=fingerprint, train=dict(tokens=10_000),
                    val=dict(tokens=500, bytes=1000))
        write_json(folder / "config.json", dict(
            model=asdict(GPTConfig(vocab_size=300, n_layer=n_layer)), data=card,
            train=asdict(TrainConfig(max_steps=30, out=f"runs/{name}", **options))))
        rows = [dict(step=step, loss=5 - step / 10, lr=0.02, tokens_per_second=1000)
                for step in range(1, 31)]
        rows[-1] |= dict(val_loss=loss)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return f"runs/{name}"
    return make


def test_runs_are_shown_with_what_they_reached_and_the_options_in_which_they_differ(make, call):
    a, b = make("a", 2.0), make("b", 3.0, learning_rate=0.01, n_layer=4, path="elsewhere")
    shown, error = call(compare, a, b)
    header, first, second, last = shown.splitlines()
    bits = 2.0 / math.log(2) / 2
    assert first.split() == ["runs/a", "30", "2.0000", f"{bits:.4f}", "1,000",
                             "--learning_rate=0.02", "--n_layer=2"]
    assert second.split()[2:] == ["3.0000", f"{1.5 * bits:.4f}", "1,000", "--learning_rate=0.01",
                                  "--n_layer=4"]
    assert last == "runs/compare.png shows their losses" and not error


def test_runs_that_differ_in_their_seeds_alone_have_a_mean_and_a_deviation(make, call):
    losses = [2.0, 2.1, 2.4]
    runs = [make(str(seed), loss, seed=seed) for seed, loss in enumerate(losses)]
    shown, _ = call(compare, *runs)
    assert (f"the seeds alone differ; 3 seeds: validation loss {statistics.mean(losses):.4f} on "
            f"average, standard deviation {statistics.stdev(losses):.4f}\n") in shown


def test_seeds_of_each_setting_are_one_line_and_the_same_seed_counts_once(make, call):
    runs = [make(f"{rate}-{n}", loss, learning_rate=rate, seed=seed)
            for rate, losses in ((0.01, (2.0, 2.2, 2.2)), (0.1, (4.0, None, None)))
            for n, (loss, seed) in enumerate(zip(losses, (1, 2, 2)))]
    lines = call(compare, *runs)[0].splitlines()
    assert lines[7] == ("--learning_rate=0.01: 2 seeds: validation loss 2.1000 on average, standard"
                        f" deviation {statistics.stdev([2, 2.2]):.4f}")
    assert lines[8] == ("--learning_rate=0.1: 2 seeds, 1 without a loss: of fewer than two losses "
                        "there is no spread")


def test_the_same_run_twice_differs_in_nothing_and_other_data_in_its_name(make, call):
    a, b, other = make("a", 2.0), make("b", 2.0), make("c", 2.0, fingerprint="99887766ff")
    assert "in no option: it is one run" in call(compare, a, b)[0]
    assert "--data=shards/words#99887766" in call(compare, a, b, other)[0]


def test_the_picture_has_a_line_and_its_validation_dots_for_each_run(make, tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *style, **options: drawn.append(
        (x, y, style)) or plot(self, x, y, *style, **options))
    compare.draw(compare.load_all([make("a", 2.0), make("b", 3.0)]), tmp_path / "x.png")
    (steps, losses, _), dots, _, others = drawn
    assert steps == [*range(1, 31)] and losses == pytest.approx([5 - n / 10 for n in steps])
    assert dots == ([30], [2.0], ("o",)) and others == ([30], [3.0], ("o",))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_left_out_and_named_and_files_are_passed_over(make, tmp_path, call):
    a, b = make("a", 2.0), make("b", 3.0, seed=2)
    write_json(tmp_path / "runs" / "leaderboard.json", [])
    (tmp_path / "runs" / "empty").mkdir()
    make("none", 2.0)
    (tmp_path / "runs" / "none" / "log.jsonl").write_text('{"step": 1, "lo', "utf-8")
    (tmp_path / "runs" / "a" / "log.jsonl").open("a").write('{"step": 31, "lo')
    shown, error = call(compare, *sorted(map(str, (tmp_path / "runs").iterdir())))
    assert len(shown.splitlines()) == 5 and "2 seeds" in shown
    assert [line.partition(" is no run")[0].rpartition("/")[2] for line in error.splitlines()] == [
        "empty", "log.jsonl has no row yet: come back after the first step"]


@pytest.mark.parametrize("words, message", [
    ([], "two runs or more are compared, and these are 0"), (["runs/a", "runs/a/"], "these are 1"),
    (["runs/a", "nowhere"], "left out: nowhere is no run: it lacks the config.json"),
    (["--ouT=x"], "unknown option --ouT, did you mean --out?")])
def test_a_users_mistake_ends_in_one_line(make, tmp_path, call, words, message):
    make("a", 2.0)
    shown, error = call(compare, *words)
    assert message in error and not shown and not [*tmp_path.glob("**/*.png")]
