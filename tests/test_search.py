"""chapters/search.py, settings.py: within bounds, keeps the best, goes on where interrupted."""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run

import train as train_file
from chapters import search
from chapters.search import rounds
from chapters.settings import parse_values, sample_settings
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
    (["--seeds=3", "--runs=4"], 1, "--runs would not act with nothing to search: leave it out"),
    (["--find_lr", "--seeds=3"], 1, "--seeds would not act beside --find_lr: leave it out"),
    (["--seeds=0"], 1, "seeds=0 must be at least 1"),
    (["--n_layer=1,2", f"--runs={10**19}"], 1, "at least 2 and below 1001"),
    (["--n_layer=1,2", f"--max_steps={10**19}"], 1, "must be at least 1 and below 2^31"),
    (["--n_layer=1..99999999999999999999"], 1, "must be at least 1 and below"),
    (["--learning_rate=nan,0.1"], 1, "learning_rate=nan must be"),
    (["--n_layer=1,2", "--config=nowhere.json"], 1, "nowhere.json"),
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


@pytest.mark.slow
def test_one_setting_with_three_seeds_shows_how_far_they_differ(shards, tmp_path, call):
    words = [f"--data={shards}", "--max_steps=12", f"--out={tmp_path / 'found'}", *SMALL]
    shown, _ = call(search, *words, "--seeds=3", "--seed=5")
    losses = [read_log(tmp_path / "found" / name)[-1]["val_loss"]
              for name in ("round_1_01", "seed_6", "seed_7")]
    assert len({*losses}) == 3 and all(f"{loss:.4f}" in shown for loss in losses)
    assert (f"3 seeds: validation loss {statistics.mean(losses):.4f} on average, standard "
            f"deviation {statistics.stdev(losses):.4f}") in shown
    again, _ = call(search, *words, "--seeds=2", "--seed=5")  # what is there is not made again
    assert "there already: 3" in again and f"{statistics.stdev(losses[:2]):.4f}" in again


@pytest.mark.slow
def test_a_search_over_the_options_of_a_run_takes_them_as_they_stand_in_its_config(
        shards, tmp_path, call):
    assert run("train.py", f"--data={shards}", f"--out={tmp_path / 'a'}", "--max_steps=2",
               *SMALL).returncode == 0
    path, words = tmp_path / "a" / "config.json", ["--n_layer=1,2", "--max_steps=30", "--keep=2"]
    config = json.loads(path.read_text("utf-8"))
    edited = {"train": dict(reversed(config["train"].items())) | dict(learning_rate=0.01)}
    path.write_text(json.dumps(config | edited, indent=3), "utf-8")
    words += [f"--config={path}", f"--out={tmp_path / 'found'}"]
    shown, _ = call(search, *words)
    rows = read_log(tmp_path / "found" / "round_2_01")
    assert max(row["lr"] for row in rows) == 0.01 and f"--config={path}" in shown
    path.write_text(json.dumps(config), "utf-8")
    assert "holds a search with other --config: choose another --out" in call(search, *words)[1]


@pytest.mark.parametrize("option, message", [
    ("--block_size=32,100000", "--block_size=100000: "), ("--n_embd=32,4194304", "with --force")])
def test_a_setting_that_does_not_fit_its_data_or_memory_is_refused_before_the_first_is_trained(
        shards, tmp_path, call, option, message):
    words = [f"--data={shards}", option, "--max_steps=30", f"--out={tmp_path / 'found'}"]
    shown, error = call(search, *words, *[word for word in SMALL if option[:7] not in word])
    assert message in error and not shown and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_another_text_under_the_name_is_another_search(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    words = ["--data=text.txt", "--vocab_size=262", "--seeds=2", "--max_steps=10", "--out=found",
             "--batch_size=2", "--micro_batch_size=2", *SMALL]
    for text, message in (("the cat sees a dog. " * 99, ""), ("a dog runs. " * 99, "fingerprint")):
        (tmp_path / "text.txt").write_text(text, "utf-8")
        assert message in call(search, *words)[1]
    call(search, *words[:4], "--out=other", *words[5:])
    assert "holds a search with other --fingerprint" in call(search, *words)[1]


def test_another_search_and_other_files_are_left_alone(shards, tmp_path, call):
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    words = f"--data={shards}", "--n_layer=1,2", f"--out={tmp_path}", *SMALL[1:]
    assert "choose another --out" in call(search, *words)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place, name, n_ended", [
    (train_file, "gradients", 0), (train_file, "validation_loss", 1), (train_file, "save_run", 1),
    (search, "checkpoints", 1), (search, "write_json", 1)])
def test_a_signal_ends_a_search_at_any_moment_and_what_has_ended_stays(
        shards, tmp_path, monkeypatch, call, number, place, name, n_ended):
    words = f"--data={shards}", "--n_layer=1,2", "--max_steps=30", f"--out={tmp_path}", *SMALL[1:]
    take, trials = getattr(place, name), []

    def press(*args, **options):
        is_plan = name == "write_json" and not args[1]["trials"]
        if not is_plan and not trials:
            trials.append(os.kill(os.getpid(), number))
        return take(*args, **options)

    monkeypatch.setattr(place, name, press)
    _, error = call(search, *words)
    assert error.endswith(f"interrupted: the same command goes on from here\n{128 + number}\n")
    assert f"there already: {n_ended}" in call(search, *words)[0]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.3, 1, 1.6, 2])
def test_ctrl_c_ends_a_search_after_any_time(shards, tmp_path, seconds):
    words = f"--data={shards}", "--n_layer=1,2", "--max_steps=3000", f"--out={tmp_path}", *SMALL[1:]
    begun = subprocess.Popen([sys.executable, "-u", ROOT / "chapters/search.py", *words], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert "there already: 0" in begun.stdout.readline()
    time.sleep(seconds)
    begun.send_signal(signal.SIGINT)
    shown, _ = begun.communicate(timeout=60)
    assert begun.returncode == 130 and "interrupted" in shown and "Traceback" not in shown


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


def test_a_sweep_suggests_a_rate_and_leaves_a_picture_and_no_run(shards, tmp_path, call):
    shown, _ = call(search, "--find_lr", f"--data={shards}", f"--out={tmp_path / 'run'}", *SMALL)
    assert 1e-5 < float(shown.rpartition("=")[2]) < 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["find_lr.png"]
