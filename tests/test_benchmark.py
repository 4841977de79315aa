"""tests/benchmark.py: what it measures takes minutes; here is what it says before."""

import pytest

import benchmark


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
