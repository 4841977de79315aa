"""Facts about chapters/distill.py: the loss, what students learn, the run that comes out."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import keep, mistake, tiny

from chapters import distill, export
from chapters.distill import compare, distillation_loss, taught_loss, write
from chapters.trials import fit, new_model, sequences, text_ids
from data import read_card, read_split
from evaluate import held_out, trained_on
from sample import complete, load_run
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def teacher_run(shards, tmp_path_factory):
    """The folder of a run with opinions of its own, which says on which shards it was trained."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    tokenizer, card = Tokenizer.load(shards / "tokenizer.json"), read_card(shards)
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=32)
    model.lm_head.weight.data *= 20
    keep(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    data = dict(path=str(shards), fingerprint=card.fingerprint, sources=card.sources)
    (folder / "config.json").write_text(json.dumps(dict(data=data)))
    return folder


# -----------------------------------------------------------------------------
# The loss.


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_the_loss_is_the_kl_divergence_of_torch_times_the_square_of_the_temperature(T):
    student, teacher = torch.randn(2, 3, 5, 7)
    flat = [(x / T).log_softmax(dim=-1).view(-1, 7) for x in (student, teacher)]
    expected = T * T * F.kl_div(*flat, log_target=True, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, T), expected)
    assert distillation_loss(teacher, teacher, T).abs() < 1e-6


def test_at_a_high_temperature_the_gradient_is_the_difference_of_the_logits():
    student, teacher = (x - x.mean() for x in torch.randn(2, 7).double())
    student.requires_grad_()
    distillation_loss(student, teacher, T=1e3).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 7, rtol=0, atol=1e-3)


def test_alpha_goes_from_the_loss_on_the_text_to_the_loss_against_the_teacher():
    teacher, student, ids = tiny(seed=1), tiny(), torch.randint(64, (2, 9))
    x, y = ids[:, :-1], ids[:, 1:].where(torch.rand(2, 8) < 0.6, -1)
    text, both, taught = (taught_loss(teacher, student, x, y, T=2.0, alpha=alpha)
                          for alpha in (0.0, 0.25, 1.0))
    torch.testing.assert_close(text, student(x, y)[1])
    counts = y != -1
    torch.testing.assert_close(taught, distillation_loss(student(x)[0][counts],
                                                         teacher(x)[0][counts], 2.0))
    torch.testing.assert_close(both, 0.75 * text + 0.25 * taught)


def test_only_the_student_gets_gradients_and_texts_of_a_row_do_not_see_each_other():
    teacher, student, ids = tiny(seed=1), tiny(), torch.randint(64, (1, 8))
    y = torch.tensor([[-1, -1, -1, -1, 5, 6, 7, 8]])
    packed = taught_loss(teacher, student, ids, y, torch.tensor([[1] * 4 + [2] * 4]))
    torch.testing.assert_close(packed, taught_loss(teacher, student, ids[:, 4:], y[:, 4:]))
    packed.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.lm_head.weight.grad.abs().sum() > 0


# -----------------------------------------------------------------------------
# What students learn.


def test_a_teachers_texts_begin_as_asked_and_follow_from_the_seed():
    starts = torch.randint(64, (3, 1))
    texts, again, others = (write(tiny(), starts, 16, seed) for seed in (0, 0, 1))
    assert texts.shape == (3, 16) and texts[:, :1].equal(starts)
    assert texts.equal(again) and not texts.equal(others)


@pytest.mark.slow
def test_of_little_text_a_student_learns_more_from_a_teachers_probabilities_or_texts():
    ids = text_ids("stories")
    teacher = fit(new_model(block_size=64), sequences(ids[:-10_000], 64), 200)
    losses = compare(teacher, ids[:5000], ids[-10_000:])
    assert losses["teacher"] < losses["distilled"] < losses["alone"] - 0.05
    assert losses["teacher"] < losses["on its texts"] < losses["alone"] - 0.05


# -----------------------------------------------------------------------------
# The command.


def test_a_student_is_a_run_that_the_other_commands_read(call, teacher_run, tmp_path):
    out = tmp_path / "student"
    shown, error = call(distill, teacher_run, f"--out={out}", "--n_layer=1", "--n_embd=16",
                        "--n_head=2", "--max_steps=3", "--batch_size=2", "--device=cpu")
    assert f"next: python evaluate.py {teacher_run} {out}" in shown and not error
    model, tokenizer = load_run(out)
    assert (model.config.n_layer, model.config.n_embd, model.config.block_size) == (1, 16, 32)
    assert tokenizer.hash() == Tokenizer.load(teacher_run / "tokenizer.json").hash()
    assert complete(model, tokenizer, "the", temperature=0, max_new_tokens=3) != ""
    assert held_out(out) == held_out(teacher_run)
    call(export, "hf", out, f"--out={tmp_path / 'hf'}")
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_a_student_comes_nearer_to_its_teacher_than_one_that_learns_the_text(teacher_run, tmp_path):
    def gap(alpha):
        config = distill.DistillConfig(teacher=str(teacher_run), out=str(tmp_path / str(alpha)),
                                       max_steps=30, batch_size=4, alpha=alpha, device="cpu")
        out, _ = distill.distill(config, dict(n_layer=1, n_embd=16, n_head=2))
        ids = torch.tensor([read_split(shards, "val")[0][:32].tolist()])
        with torch.no_grad():
            return distillation_loss(load_run(out)[0](ids)[0], teacher(ids)[0])
    teacher, shards = load_run(teacher_run)[0], trained_on(teacher_run)["path"]
    assert gap(1.0) < 0.8 * gap(0.0)


@pytest.mark.parametrize("words, message", [
    ([], "name a run folder that teaches"),
    (["nowhere"], "there is no run folder nowhere"),
    (["RUN", "--data=nowhere"], "'nowhere' is no folder of shards"),
    (["RUN", "--block_size=64"], "block_size=64 is above 32, the most that the teacher reads"),
    (["RUN", "--architecture=bert"], "architecture=bert does not predict the next token"),
    (["RUN", "--vocab_size=99"], "--vocab_size would not act beside a teacher"),
    (["RUN", "--alpha=0", "--temperature=2"], "--temperature would not act beside --alpha=0"),
    (["RUN", "--alpha=2"], "alpha=2.0 must be at least 0 and at most 1"),
    (["RUN", "--out=RUN"], "is there already: give another --out"),
    (["JUDGE"], "does not predict the next token: only such a model teaches")])
def test_a_mistake_is_one_line_and_leaves_nothing(words, message, teacher_run, tmp_path,
                                                  monkeypatch, capsys):
    judge, tokenizer = tmp_path / "judge", Tokenizer.load(teacher_run / "tokenizer.json")
    keep(tiny(vocab_size=tokenizer.n_vocab, n_classes=2), judge)
    tokenizer.save(judge / "tokenizer.json")
    before = [*tmp_path.rglob("*")]
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RUN", str(teacher_run)).replace("JUDGE", "judge") for word in words]
    code, lines = mistake(distill.main, monkeypatch, capsys, *words)
    assert code in (1, 2) and len(lines) == 1 and message in lines[0]
    assert [*tmp_path.rglob("*")] == before
