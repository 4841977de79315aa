"""chapters/track.py: the rows of a log arrive where they are sent, once, while training writes."""

import json
import sys
import types

import pytest

from chapters import track
from chapters.track import TrackConfig, exposition

ROWS = [dict(step=1, loss=5.5, lr=0.01, val_loss=5.25, skipped="spike", memory=None),
        dict(step=2, loss=4.5, lr=0.02, mfu=0.5), dict(step=3, loss=None, lr=0.03)]


def write_log(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture
def sent(monkeypatch):
    """TensorBoard and Weights & Biases that note what they get, [(step, {name: number})]."""
    got = []

    class Writer:
        def __init__(self, *args, **options):
            self.add_scalar = lambda name, value, step: got.append((step, {name: value}))
            self.log = lambda values, step: got.append((step, values))
            self.flush = lambda: None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            got.append("closed")

    modules = {"torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=Writer),
               "wandb": types.SimpleNamespace(init=Writer)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: name)
    return got


def test_each_number_of_a_row_reaches_tensorboard(tmp_path, sent):
    assert track.track(TrackConfig(str(write_log(tmp_path / "run", ROWS)))) == 3
    assert sent == [(1, {"loss": 5.5}), (1, {"lr": 0.01}), (1, {"val_loss": 5.25}),
                    (2, {"loss": 4.5}), (2, {"lr": 0.02}), (2, {"mfu": 0.5}), (3, {"lr": 0.03}),
                    "closed"]


def test_each_row_reaches_weights_and_biases(tmp_path, sent):
    track.track(TrackConfig(str(write_log(tmp_path / "run", ROWS)), to="wandb"))
    assert sent == [(1, dict(loss=5.5, lr=0.01, val_loss=5.25)),
                    (2, dict(loss=4.5, lr=0.02, mfu=0.5)), (3, dict(lr=0.03)), "closed"]


def test_prometheus_reads_the_last_value_of_each_name(tmp_path):
    folder = write_log(tmp_path / "run", ROWS)
    track.track(TrackConfig(str(folder), to="prometheus"))
    lines = (folder / "metrics.prom").read_text("utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'train_step{run="run"} 3', 'train_loss{run="run"} NaN', 'train_val_loss{run="run"} 5.25',
        'train_lr{run="run"} 0.03', 'train_mfu{run="run"} 0.5', 'train_memory{run="run"} NaN']
    assert lines[0].startswith("# HELP train_step ") and lines[1] == "# TYPE train_step gauge"


def test_an_mfu_above_one_is_not_shown(tmp_path, sent):
    folder = write_log(tmp_path / "run", [dict(step=1, loss=5.5, mfu=1.59)])
    track.track(TrackConfig(str(folder), to="wandb"))
    track.track(TrackConfig(str(folder), to="prometheus"))
    assert sent == [(1, dict(loss=5.5)), "closed"]
    assert 'train_mfu{run="run"} NaN' in (folder / "metrics.prom").read_text("utf-8")


def test_a_log_is_sent_up_to_the_line_that_was_cut_off_and_an_empty_one_not_at_all(tmp_path, call):
    folder, words = write_log(tmp_path / "run", ROWS), ("--to=prometheus",)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert "up to step 3" in call(track, folder, *words)[0]
    for text in "", '{"step": 4, "lo':
        (folder / "log.jsonl").write_text(text, "utf-8")
        shown, error = call(track, folder, *words)
        assert not shown and error == (
            f"error: {folder}/log.jsonl has no row yet: come back, or --follow it\n")


def test_the_name_of_a_run_cannot_break_the_format():
    assert r'{run="a\"b\\c\nd"} 1' in exposition(dict(step=1), 'a"b\\c\nd')


def test_a_followed_log_is_sent_once_even_where_steps_happen_again(tmp_path, sent, monkeypatch):
    folder = write_log(tmp_path / "run", ROWS[:2])
    later = [ROWS[:1], ROWS]  # a resumed run cuts its log, and takes a step again

    def sleep(seconds):
        if not later:
            raise KeyboardInterrupt
        write_log(folder, later.pop(0))

    monkeypatch.setattr(track.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        track.track(TrackConfig(str(folder), to="wandb", follow=True))
    assert [step for step, _ in sent[:-1]] == [1, 2, 3] and sent[-1] == "closed"


@pytest.mark.parametrize("words, message", [
    (["--to=wandb"], "needs a package that is not installed: pip install wandb"),
    (["--to=tensorbord"], "did you mean tensorboard?"),
    (["nowhere", "--to=prometheus"], "nowhere is no run, it has no log.jsonl"),
    (["--to=prometheus", "--out=a.txt"], "must end in .prom"),
    (["--to=prometheus", "--interval=0"], "interval=0.0 must be at least 0.1"),
    (["--to=prometheus", "--interval=nan"], "interval=nan must be at least 0.1"),
    (["--to=prometheus", "--interval=9"], "--interval would not act without --follow"),
    (["--to=prometheus"], "no run in runs/")])
def test_a_users_mistake_ends_in_one_line(tmp_path, monkeypatch, call, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    shown, error = call(track, *words)
    assert message in error and not shown and not list(tmp_path.iterdir())
