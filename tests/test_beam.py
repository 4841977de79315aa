"""Facts about chapters/beam.py: the likeliest text is found, and where it ends."""

from functools import partial
from shutil import copy

import pytest
import torch
from conftest import keep, mistake, tiny

import sample
from chapters import beam
from chapters.beam import beam_search
from sample import complete, end_ids, generate


def by_hand(model, ids, n_tokens):
    """The log-probability of every continuation of n tokens."""
    texts = torch.cartesian_prod(*[torch.arange(model.config.vocab_size)] * n_tokens)
    rows = torch.cat((ids.expand(len(texts), -1), texts), dim=1)
    said = model(rows[:, :-1])[0][:, ids.size(1) - 1:].log_softmax(dim=-1)
    return texts, said.gather(-1, texts[..., None]).sum(dim=(1, 2))


@pytest.mark.parametrize("cache", [True, False])
def test_a_beam_as_wide_as_all_texts_finds_the_likeliest(cache):
    model, ids = tiny(vocab_size=6), torch.tensor([[1, 2]])
    texts, sums = by_hand(model, ids, 3)
    found = beam_search(model, ids, n_beams=36, max_new_tokens=3, length_penalty=0.0, cache=cache)
    best = sums.topk(3)
    assert [text for text, _ in found[:3]] == texts[best.indices].tolist()
    torch.testing.assert_close(torch.tensor([score for _, score in found[:3]]), best.values)


def test_beams_over_an_encoder_decoder_read_its_source():
    model = tiny("transformer", vocab_size=6)
    source, ids = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[1, 2]])
    model.forward = partial(model.forward, memory=model.encode(source))
    texts, sums = by_hand(model, ids, 3)
    for cache in True, False:
        found = beam_search(model, ids, 36, 3, 0.0, cache=cache)
        assert [text for text, _ in found[:3]] == texts[sums.topk(3).indices].tolist()


def test_one_beam_is_greedy_and_more_beams_are_no_worse():
    model, ids = tiny(), torch.tensor([[1, 2, 3]])
    greedy = [chosen.item() for chosen in generate(model, ids, 8, temperature=0)]
    one, four = (beam_search(model, ids, n, 8)[0] for n in (1, 4))
    assert one[0] == greedy and four[1] >= one[1] - 1e-6


def test_a_beam_ends_with_an_end_and_a_penalty_of_length_prefers_long_texts():
    model, ids = tiny(vocab_size=8), torch.tensor([[1]])
    lengths = [len(beam_search(model, ids, 4, 10, penalty, ends=[3])[0][0])
               for penalty in (0.0, 5.0)]
    assert lengths[0] < lengths[1]
    for text, _ in beam_search(model, ids, 4, 10, ends=[3]):
        assert 3 not in text[:-1] and (len(text) == 10 or text[-1] == 3)


# -----------------------------------------------------------------------------
# The command.


@pytest.fixture
def folder(tmp_path, shards, tokenizer):
    """A run whose model is sure of what it says."""
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64)
    model.lm_head.weight.data *= 50
    keep(model, tmp_path / "runs" / "words")
    copy(shards / "tokenizer.json", tmp_path / "runs" / "words")
    return tmp_path / "runs" / "words"


def found_by(folder, tokenizer, prompt, *options):
    """The text that beam_search finds best after a prompt of ids, and its score."""
    model, _ = sample.load_run(folder)
    (best, score), *_ = beam_search(model, torch.tensor([prompt]), *options,
                                    ends=end_ids(tokenizer))
    return tokenizer.decode([id for id in best if id not in end_ids(tokenizer)]), score


def test_the_command_prints_the_prompt_and_the_likeliest_text(call, folder, tokenizer):
    text, notes = call(beam, folder, "--prompt=the cat", "--beams=3", "--max_new_tokens=6",
                       "--length_penalty=0.5")
    best, score = found_by(folder, tokenizer, tokenizer.encode("the cat"), 3, 6, 0.5)
    assert text == f"the cat{best}\n" and notes.count("\n") == 1
    assert "step_000001.safetensors on " in notes and f"score {score:.3f} by 3 beams" in notes


def test_one_beam_is_what_sample_py_writes_at_temperature_0(call, folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)  # whose newest run is taken
    text, _ = call(beam, "--beams=1", "--max_new_tokens=9", "--device=cpu")
    model, _ = sample.load_run(folder)
    assert text == complete(model, tokenizer, temperature=0, max_new_tokens=9) + "\n"


def test_a_reply_is_the_likeliest_after_the_turn_of_the_user(call, folder, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "END_LIKELY", 0.0)
    prompt = tokenizer.render_prompt([dict(role="user", content="the")])
    text, _ = call(beam, folder, "--chat", "--prompt=the", "--beams=3", "--max_new_tokens=6")
    assert text == found_by(folder, tokenizer, prompt, 3, 6)[0] + "\n"


@pytest.mark.parametrize("words, said", [
    (["--beams=0"], "beams=0 must be at least 1 and below 65, a whole number"),
    (["--length_penalty=1e9"], "length_penalty=1000000000.0 must be at least 0 and below 11"),
    (["--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
    (["--prompt=" + "#" * 99], "the prompt has 99 tokens, this model takes 1 to 63"),
    (["--chat"], "never learned to hold a conversation"),
    (["--device=tpu"], "unknown device 'tpu': did you mean cpu?"),
    (["--temperature=0.5"], "unknown option --temperature")])
def test_a_wrong_input_ends_in_one_line(folder, words, said, monkeypatch, capsys):
    code, (line,) = mistake(beam.main, monkeypatch, capsys, folder, *words)
    assert code in (1, 2) and said in line


def test_a_classifier_ends_in_the_line_that_says_how_it_is_asked(folder, tokenizer, monkeypatch,
                                                                 capsys):
    keep(tiny(vocab_size=tokenizer.n_vocab, n_classes=3), folder, 2)
    code, (line,) = mistake(beam.main, monkeypatch, capsys, folder, "--checkpoint=2")
    assert code == 1 and "python -m chapters.clauses ask RUN" in line
