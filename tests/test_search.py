"""chapters/search.py, settings.py: within bounds, keeps the best, goes on where interrupted."""

import json
import shlex

import pytest
from conftest import run

from chapters import search
from chapters.search import rounds
from chapters.settings import parse_values, sample_settings
from chapters.sweep import running_mean
from train import read_log

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--eval_sequences=8",
         "--warmup_steps=2", "--device=cpu", "--precision=fp32", "--kernels=torch", "--no-bias"]


@pytest.mark.parametrize("kind, text, values", [
    (float, "1e-3..1e-1", (0.001, 0.1)), (int, "2..64", (2, 64)), (float, "0..0.3", (0.0, 0.3)),
    (int, "2,4,6", [2, 4, 6]), (str, "muon,adamw", ["muon", "adamw"]), (int, "4", [4])])
def test_values_are_a_range_choices_or_one(kind, text, values):
    assert parse_values("n_layer", kind, text) == values


@pytest.mark.parametrize("kind, text", [
    (float, "0.1..0.001"), (float, "1..1"), (float, "..1"), (float, "-1..1"), (float, "nan..1"),
    (float, "1..inf"), (int, "2,x"), (int, "2,,4"), (int, "1.5"), (str, "a..b")])
def test_values_that_are_none_are_refused(kind, text):
    with pytest.raises(ValueError, match=f"--n_layer={text}"):
        parse_values("n_layer", kind, text)


@pytest.mark.parametrize("n", [2, 9, 50])
def test_settings_cover_a_range_and_all_choices(n):
    spaces = dict(rate=(1e-4, 1e-1), layers=[2, 4], batch=(4, 64), drop=(0.0, 0.5))
    settings = sample_settings(spaces, n, 0)
    rates = sorted(setting["rate"] for setting in settings)
    assert len(settings) == n and 1e-4 <= rates[0] and rates[-1] <= 1e-1
    assert max(b / a for a, b in zip(rates, rates[1:])) < 1000 ** (2 / n) * 1.02
    assert {setting["layers"] for setting in settings} == {2, 4}
    assert all(isinstance(s["batch"], int) and 0 <= s["drop"] <= 0.5 for s in settings)


def test_a_seed_gives_the_same_settings():
    spaces = dict(rate=(1e-4, 1e-1), layers=[2, 4])
    first, again, other = (sample_settings(spaces, 9, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_choices_alone_are_tried_once_each():
    settings = sample_settings(dict(a=[1, 2], b=["x", "y", "y"]), 9, 0)
    assert sorted((s["a"], s["b"]) for s in settings) == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


@pytest.mark.parametrize("n, keep", [(2, 2), (9, 3), (10, 3), (27, 3), (5, 4), (3, 9)])
def test_fewer_settings_train_longer_until_one_has_all_steps(n, keep):
    plan = rounds(n, keep, 900)
    assert plan[0][0] == n and plan[-1] == (1, 900)
    assert all(b[0] == max(1, a[0] // keep) and b[1] >= keep * a[1] > 0
               for a, b in zip(plan, plan[1:]))


@pytest.mark.parametrize("words, code, message", [
    (["--learning_rat=1..2"], 2, "did you mean --learning_rate?"),
    (["--learning_rate=1..0.1"], 1, "up to a higher one"),
    (["--n_layer=2,many"], 1, "--n_layer=2,many is no int"),
    (["--optimizer=muon..adamw"], 1, "words have no range"),
    (["--vocab_size=300,400"], 2, "invalid int value"),
    (["--n_layer=1,2", "--epochs=2"], 2, "unknown option --epochs"),
    (["--learning_rate=0.01"], 1, "nothing to search"),
    (["--find_lr", "--n_layer=1,2"], 1, "give --n_layer one value"),
    (["--architecture=bert", "--n_layer=1,2"], 1, "does not predict the next token"),
    (["--optimizer=muon,adamv"], 1, "did you mean adamw?"),
    (["--n_head=2,3", "--n_embd=32"], 1, "--n_head=3: n_embd=32 is no multiple of n_head=3"),
    (["--n_layer=1,2", "--keep=1"], 1, "keep=1 must be at least 2"),
    (["--n_layer=1,2", "--max_steps=20"], 1, "give at least 30"),
    (["--n_layer=1,2", "--data=nowhere.txt"], 1, "nowhere.txt"),
])
def test_a_users_mistake_ends_in_one_line(tmp_path, monkeypatch, call, words, code, message):
    monkeypatch.chdir(tmp_path)
    shown, error = call(search, *words)
    assert message in error and (code == 2) == (error.splitlines()[-1] == "2")
    assert not list(tmp_path.glob("runs/*/round*"))


@pytest.mark.slow
def test_a_sane_learning_rate_beats_absurd_ones(shards, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    words = [f"--data={shards}", "--learning_rate=1e-9,0.02,1000", "--max_steps=30", *SMALL]
    shown, _ = call(search, *words)
    command = shown.splitlines()[-1]
    assert command.startswith("python train.py") and "--learning_rate=0.02 " in command
    folder, = (tmp_path / "runs").iterdir()
    trials = json.loads((folder / "search.json").read_text("utf-8"))["trials"]
    assert [trial["steps"] for trial in trials] == [10, 10, 10, 30]
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*/step_*.safetensors"))) == 1

    again, _ = call(search, *words)
    assert "there already: 4" in again and again.splitlines()[-1] == command
    assert trials == json.loads((folder / "search.json").read_text("utf-8"))["trials"]


@pytest.mark.slow
def test_the_winning_command_can_be_typed(shards, tmp_path, call):
    words = [f"--data={shards}", "--learning_rate=1e-3..0.1", "--optimizer=muon,adamw", "--runs=4",
             "--keep=4", "--max_steps=40", "--low_memory", f"--out={tmp_path / 'found'}", *SMALL]
    command = shlex.split(call(search, *words)[0].splitlines()[-1])
    assert run(*command[1:], f"--out={tmp_path / 'typed'}").returncode == 0
    trial = read_log(tmp_path / "found" / "round_2_01")
    assert read_log(tmp_path / "typed")[-1]["val_loss"] == trial[-1]["val_loss"]


def test_another_search_and_other_files_are_left_alone(shards, tmp_path, call):
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    words = f"--data={shards}", "--n_layer=1,2", f"--out={tmp_path}", *SMALL[1:]
    assert "choose another --out" in call(search, *words)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_an_interrupted_search_has_lost_no_finished_run(shards, tmp_path, monkeypatch, call):
    words = f"--data={shards}", "--n_layer=1,2", "--max_steps=30", f"--out={tmp_path}", *SMALL[1:]
    train, n_started = search.train, []

    def press_at_the_second(*args, **options):
        n_started.append(args)
        if len(n_started) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(search, "train", press_at_the_second)
    assert "interrupted" in call(search, *words)[1]
    assert "there already: 1" in call(search, *words)[0]
    assert len(n_started) == 4  # the one that was cut off, the other of its round, the last


def test_a_running_mean_begins_with_the_values_and_follows_them():
    assert running_mean([4.0, 2.0, 3.0, 5.0, 4.0], 20) == [4.0, 2.0, 3.0, 4.0, 4.0]
    assert running_mean([1.0] * 9 + [3.0], 2)[-1] == 2.0


def test_a_sweep_suggests_a_rate_and_leaves_a_picture_and_no_run(shards, tmp_path, call):
    shown, _ = call(search, "--find_lr", f"--data={shards}", f"--out={tmp_path / 'run'}", *SMALL)
    assert 1e-5 < float(shown.rpartition("=")[2]) < 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["find_lr.png"]
