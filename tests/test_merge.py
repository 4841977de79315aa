"""Facts about chapters/merge.py: a tuned run becomes a plain one that gives the same."""

import pytest
import torch
from conftest import mistake, tiny

from chapters import merge
from model import TuneConfig, load_model, read_header, save_model, tune
from sample import checkpoints, load_run
from tokenizer import Tokenizer, read_json, write_json
from train import read_config


@pytest.fixture
def tuned(tmp_path):
    """tuned(tune) -> (a run folder of a tuned model whose trained parts are random, the model)."""
    def make(method, architecture="gpt2"):
        tokenizer, folder = Tokenizer([]), tmp_path / "run"
        folder.mkdir()
        tokenizer.save(folder / "tokenizer.json")
        model = tiny(architecture, vocab_size=tokenizer.n_vocab)
        save_model(model, folder / "base.safetensors")
        tune(model, TuneConfig(tune=method, rank=2))
        model.base = read_header(folder / "base.safetensors")[1]["sha256"]
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        save_model(model, folder / "step_000003.safetensors", step=3, val_loss=1.5)
        return folder, model.eval()
    return make


@pytest.mark.parametrize("method", ["lora", "bias", "head", "last:1"])
def test_the_merged_run_is_plain_and_gives_the_same(tuned, call, method):
    folder, model = tuned(method)
    out, _ = call(merge, folder)
    merged = folder.with_name("run-merged")
    assert f"next: python sample.py {merged}" in out and [*checkpoints(merged)] == [3]
    plain, _ = load_run(merged)
    assert plain.tuning is None and not (merged / "base.safetensors").exists()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    ids = torch.randint(200, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)
    assert load_model(checkpoints(merged)[3])[1]["val_loss"] == 1.5


@pytest.mark.parametrize("method, architecture", [
    ("adapter", "gpt2"), ("prefix", "gpt2"), ("prompt", "modern"), ("bias", "modern")])
def test_what_has_no_place_in_a_plain_model_is_refused_and_nothing_is_written(
        tuned, monkeypatch, capsys, method, architecture):
    folder, _ = tuned(method, architecture)
    code, lines = mistake(merge.main, monkeypatch, capsys, folder)
    assert code == 1 and len(lines) == 1 and f"--tune={method}" in lines[0]
    assert not folder.with_name("run-merged").exists()


def test_a_folder_that_holds_a_run_is_left_alone(tuned, monkeypatch, capsys):
    folder, _ = tuned("lora")
    code, lines = mistake(merge.main, monkeypatch, capsys, folder, f"--out={folder}")
    assert code == 1 and f"{folder} is there already: give another --out" in lines[0]


def test_what_the_config_says_of_an_aligned_run_stays(tuned, call):
    folder, _ = tuned("lora")
    write_json(folder / "config.json", dict(model={}, align=dict(beta=0.5)))
    call(merge, folder)
    saved = read_json(folder.with_name("run-merged") / "config.json")
    assert saved["align"] == dict(beta=0.5) and saved["model"]["n_layer"] > 0
    assert "train" not in saved


def test_a_config_that_is_none_is_refused_and_nothing_is_written(tuned, monkeypatch, capsys):
    folder, _ = tuned("lora")
    for wrong in ([1], dict(train=3)):
        write_json(folder / "config.json", wrong)
        code, lines = mistake(merge.main, monkeypatch, capsys, folder)
        assert code == 1 and len(lines) == 1 and "config.json cannot be read" in lines[0]
        assert not folder.with_name("run-merged").exists()


@pytest.mark.parametrize("n_classes, asks", [(3, "chapters.clauses ask"), (1, "chapters.align")])
def test_of_a_model_that_writes_nothing_it_says_what_asks_it(tuned, call, n_classes, asks):
    folder, model = tuned("lora")
    save_model(tiny("gpt2", vocab_size=model.config.vocab_size, n_classes=n_classes),
               folder / "step_000003.safetensors", step=3, val_loss=1.5)
    assert f"next: python -m {asks}" in call(merge, folder)[0]


@pytest.mark.slow
def test_a_run_that_train_wrote_is_merged_with_its_config(tmp_path, shards, call):
    from train import TrainConfig, train
    small = dict(max_steps=3, batch_size=4, eval_every=3, precision="fp32", kernels="torch",
                 data=str(shards))
    quiet = dict(say=lambda text: None)
    train(TrainConfig(out=str(tmp_path / "base"), **small),
          tiny(vocab_size=320, block_size=16).config, **quiet)
    train(TrainConfig(init=str(tmp_path / "base"), tune="lora", out=str(tmp_path / "run"), **small),
          **quiet)
    call(merge, tmp_path / "run")
    config, shape, data = read_config(tmp_path / "run-merged" / "config.json")
    assert config.tune == "full" and not config.init and data["fingerprint"]
    assert shape == load_run(tmp_path / "run-merged")[0].config
