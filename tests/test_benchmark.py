"""tests/benchmark.py: what it measures takes minutes; here is what it says before, and that what
processes send is what the formulas say."""

import pytest

import benchmark
from chapters.processes import spawn
from model import GPTConfig


def test_help_lists_the_parts_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(name in shown for name in benchmark.PARTS)


@pytest.mark.parametrize("words, message", [
    (["foo"], "unknown part 'foo'; the parts are training attention twins"),
    (["twin"], "unknown part 'twin', did you mean twins?"),
    (["learning"], "learning need --nanogpt=DIR"),
    (["--nanogpt=nowhere"], "nowhere has no model.py"),
    (["bpe", "--nanogpt=nowhere"], "--nanogpt would not act without the part nanogpt"),
    (["bpe", "--text=a.txt"], "--text would not act without the part learning"),
    (["--part"], "unknown option --part")])
def test_a_wrong_part_or_option_is_one_line_before_anything_is_measured(call, words, message):
    shown, error = call(benchmark, *words)
    assert message in error and not shown


def test_a_text_that_is_not_there_is_refused_before_the_measuring(call, tmp_path):
    (tmp_path / "model.py").touch()
    shown, error = call(benchmark, "learning", f"--nanogpt={tmp_path}", "--text=nowhere.txt")
    assert "there is no file --text=nowhere.txt" in error and not shown


@pytest.mark.slow
def test_two_processes_send_in_a_step_what_the_formulas_say_and_fsdp_holds_half():
    shape = GPTConfig(vocab_size=320, block_size=32, n_layer=4, n_head=4, n_embd=64)
    for found in spawn(2, benchmark.shared_steps, shape, 8, 1):
        held = {name: n_bytes for name, (_, _, n_bytes) in found.items()}
        assert 0.49 < held["fsdp x 2"] / held["ddp x 2"] < 0.6 and held["tp x 2"] < held["ddp x 2"]
        assert held["fsdp x 2, muon"] < 0.6 * held["ddp x 2, muon"]
        for name, (layout, _, optimizer) in benchmark.SHARED.items():
            on_paper = benchmark.sent_on_paper(shape, 8, layout, optimizer)
            assert found[name][1] == pytest.approx(on_paper, rel=1e-3), name
