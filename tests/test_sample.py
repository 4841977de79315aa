"""sample.py: filters keep what their definition says, the cache changes nothing, text is whole."""

import io
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, keep, mistake, run, tiny

import sample
from sample import (SampleConfig, checkpoints, complete, complete_batch, distribution, generate,
                    keep_min_p, keep_top_k, keep_top_p, keep_typical, load_run, newest_run,
                    penalize_repeats, pick, pick_checkpoint, pick_device, pick_precision, release,
                    write)
from tokenizer import Tokenizer

both = pytest.mark.parametrize("architecture", ["gpt2", "modern"])
SAMPLINGS = [dict(temperature=0), dict(temperature=1.5), dict(temperature=0.8, top_k=5),
             dict(top_p=0.9, min_p=0.01), dict(temperature=0, repetition_penalty=1.3)]


@pytest.fixture
def folder(tmp_path, model, shards):
    """A run with three checkpoints, of which the second is the best."""
    folder = tmp_path / "runs" / "words"
    folder.mkdir(parents=True)
    shutil.copy(shards / "tokenizer.json", folder)
    for step, loss in (10, 2.0), (20, 1.8), (30, 1.9):
        keep(model, folder, step, loss)
    return folder


@pytest.fixture
def command(folder, call, monkeypatch):
    """Call the command in the folder that holds runs/; -> (text on stdout, text on stderr)."""
    monkeypatch.chdir(folder.parent.parent)
    return lambda *words: call(sample, *words)


def logits_of(n_rows=6, V=50):
    return 2 * torch.randn(n_rows, V, generator=torch.Generator().manual_seed(0))


def left(logits):
    """The ids of each row that are left, as sets."""
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# Logits to one token.


def test_top_k_keeps_the_k_likeliest():
    logits = logits_of()
    ranked = [sorted(range(50), key=lambda i: -row[i])[:7] for row in logits.tolist()]
    assert left(keep_top_k(logits, 7)) == [set(ids) for ids in ranked]
    assert left(keep_top_k(logits, 99)) == [set(range(50))] * 6


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_fewest_likeliest_that_sum_to_p(top_p):
    expected = []
    for row in logits_of().double().softmax(dim=-1).tolist():
        expected.append(set())
        for i in sorted(range(50), key=lambda i: -row[i]):
            if sum(row[j] for j in expected[-1]) < top_p:
                expected[-1].add(i)
    assert left(keep_top_p(logits_of(), top_p)) == expected


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest(min_p):
    rows = logits_of().softmax(dim=-1).tolist()
    expected = [{i for i, p in enumerate(row) if p >= min_p * max(row)} for row in rows]
    assert left(keep_min_p(logits_of(), min_p)) == expected


def test_filters_leave_the_logits_that_they_keep_as_they_are():
    logits = logits_of()
    for fewer in keep_top_k(logits, 5), keep_top_p(logits, 0.5), keep_min_p(logits, 0.1):
        assert torch.equal(fewer[fewer.isfinite()], logits[fewer.isfinite()])


def test_a_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_seen():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    penalized = penalize_repeats(logits, torch.tensor([[0, 1, 0]]), 2)
    assert penalized.tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_penalties_of_openai_count_what_was_written_and_not_the_prompt():
    logits, seen = torch.zeros(1, 5), torch.tensor([[0, 1, 2, 2, 3]])
    chances = distribution(logits, frequency_penalty=0.5, presence_penalty=1.0, seen=seen,
                           n_prompt=2)
    expected = torch.tensor([[0.0, 0.0, -2.0, -1.5, 0.0]]).softmax(dim=-1)
    torch.testing.assert_close(chances, expected)


def test_no_run_of_n_tokens_is_written_twice():
    for n in 1, 2, 3:
        written = generate(tiny(block_size=64), torch.ones(1, 1).long(), 60, temperature=0,
                           no_repeat_ngram=n)
        ids = [chosen.item() for chosen in written]
        runs = list(zip(*([1, *ids][i:] for i in range(n))))
        assert len(runs) == len(set(runs))


def test_a_banned_sequence_is_never_completed():
    model, banned = tiny(block_size=64), [[5], [1, 2], [2, 3, 4]]
    for seed in range(5):
        written = generate(model, torch.ones(1, 1).long(), 60, ban=banned, temperature=5.0,
                           generator=seeded(seed))
        ids = [chosen.item() for chosen in written]
        text = " ".join(map(str, ["", 1, *ids, ""]))
        assert not any(" " + " ".join(map(str, run)) + " " in text for run in banned)


@pytest.mark.parametrize("name, options, arguments", [
    ("RepetitionPenaltyLogitsProcessor", dict(repetition_penalty=1.3), (1.3,)),
    ("NoRepeatNGramLogitsProcessor", dict(no_repeat_ngram=2), (2,)),
    ("TypicalLogitsWarper", dict(typical_p=0.7), (0.7,)),
    ("MinPLogitsWarper", dict(min_p=0.1), (0.1,)),
    ("TopPLogitsWarper", dict(top_p=0.8), (0.8,)), ("TopKLogitsWarper", dict(top_k=7), (7,))])
def test_each_step_does_what_hugging_faces_does(name, options, arguments):
    library = pytest.importorskip("transformers.generation.logits_process",
                                  reason="compares with transformers")
    logits, seen = logits_of(), torch.randint(6, (6, 12), generator=seeded())
    theirs = getattr(library, name)(*arguments)(seen, logits.clone()).softmax(dim=-1)
    torch.testing.assert_close(distribution(logits, seen=seen, **options), theirs)


def test_typical_keeps_those_whose_surprise_is_nearest_to_the_entropy():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])  # entropy 1.28; surprises 0.92, 1.20, 1.61, 2.30
    assert left(keep_typical(p.log(), 0.3)) == [{1}]
    assert left(keep_typical(p.log(), 0.6)) == [{0, 1, 2}]


@pytest.mark.parametrize("options", SAMPLINGS[:4])
def test_probabilities_sum_to_one_after_all_filters(options):
    chances = distribution(logits_of(), **options)
    torch.testing.assert_close(chances.sum(dim=-1), torch.ones(6))


def test_a_token_is_drawn_as_often_as_the_distribution_says():
    logits, options = logits_of(1, 6), dict(temperature=0.7, top_k=5)
    drawn = pick(logits.expand(20_000, -1), generator=seeded(), **options)
    shares = torch.bincount(drawn, minlength=6) / 20_000
    torch.testing.assert_close(shares, distribution(logits, **options)[0], rtol=0, atol=0.015)


def test_temperature_divides_the_logits():
    expected = (logits_of() / 0.5).softmax(dim=-1)
    torch.testing.assert_close(distribution(logits_of(), temperature=0.5), expected)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=1), dict(top_p=1e-9),
                                     dict(min_p=1.0), dict(temperature=1e-30)])
def test_each_way_to_leave_one_token_is_greedy(options):
    assert torch.equal(pick(logits_of(), **options), logits_of().argmax(dim=-1))


def test_greedy_takes_the_highest_and_draws_no_random_number():
    generator = seeded()
    chosen = pick(logits_of(), temperature=0, generator=generator)
    assert torch.equal(chosen, logits_of().argmax(dim=-1))
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", float("nan")), ("top_k", 0), ("top_k", 2.5),
    ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2.0), ("typical_p", 3.0),
    ("repetition_penalty", 0.0), ("frequency_penalty", float("inf")), ("no_repeat_ngram", 0),
    ("max_new_tokens", 0), ("stop", "x"), ("seed", True)])
def test_a_value_outside_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}.* must be"):
        SampleConfig(**{name: value})


def test_texts_to_ban_are_refused_where_no_tokenizer_knows_their_ids():
    with pytest.raises(ValueError, match="hold texts: give ids"):
        next(generate(tiny(), torch.ones(1, 1).long(), ban=["cat"]))
    chosen = pick(torch.zeros(1, 5), temperature=0, logit_bias=[(3, 1.0)], ban=[[4]])
    assert chosen.item() == 3


# -----------------------------------------------------------------------------
# Token after token.


@both
@pytest.mark.parametrize("options", SAMPLINGS)
def test_with_and_without_cache_the_same_tokens_are_chosen(architecture, options):
    model, ids = tiny(architecture), torch.randint(64, (3, 4), generator=seeded())
    cached, plain = (list(generate(model, ids, 99, cache=cache, generator=seeded(), **options))
                     for cache in (True, False))
    assert len(plain) == 12 and torch.equal(torch.stack(cached), torch.stack(plain))


def test_greedy_takes_the_argmax_of_what_the_model_says_at_each_step():
    model, ids = tiny(), torch.tensor([[1, 2, 3]])
    for chosen in generate(model, ids, 10, temperature=0):
        assert chosen.item() == model(ids)[0][0, -1].argmax()
        ids = torch.cat((ids, chosen[None]), dim=1)


def test_generation_ends_when_the_context_is_full():
    for T, n_tokens in (1, 15), (10, 6), (15, 1):
        assert len(list(generate(tiny(), torch.ones(1, T, dtype=torch.long), 99))) == n_tokens


@pytest.mark.parametrize("T", [0, 16, 17])
def test_a_prompt_that_does_not_fit_is_refused_with_its_length_and_the_limit(T):
    with pytest.raises(ValueError, match=f"prompt has {T} tokens, this model takes 1 to 15,"):
        next(generate(tiny(), torch.ones(1, T, dtype=torch.long)))


def test_the_weights_stay_out_of_autograd_and_a_caller_stays_out_of_inference_mode():
    for chosen in generate(tiny(), torch.ones(1, 3, dtype=torch.long), 2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not chosen.requires_grad


def test_rows_padded_to_one_length_are_written_as_each_alone():
    for architecture in "gpt2", "modern":
        model, rows = tiny(architecture), [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
        padded = torch.tensor([[-1] * (6 - len(row)) + row for row in rows])
        together = torch.stack([*generate(model, padded, 9, temperature=0)])
        alone = [torch.cat(list(generate(model, torch.tensor([row]), 9, temperature=0)))
                 for row in rows]
        assert torch.equal(together.T, torch.stack(alone))


@pytest.mark.parametrize("cache", [True, False])
def test_a_context_that_slides_goes_on_from_its_younger_half(cache):
    model, ids = tiny(), torch.tensor([[1, 2, 3]])
    written = torch.cat([ids[0], *generate(model, ids, 40, overflow="slide", cache=cache,
                                           temperature=0)])
    assert len(written) == 43
    for end in range(17, 43):  # 16 fit; from then on 8 stay, and 8 more come
        start = 9 + (end - 17) // 9 * 9
        assert written[end] == model(written[None, start:end])[0][0, -1].argmax()


def test_a_seed_makes_each_row_what_it_is_alone_and_a_config_is_as_good_as_options():
    model, config = tiny(), SampleConfig(max_new_tokens=9, seed=3)
    both_rows = torch.stack([*generate(model, torch.tensor([[1], [1]]), config=config)])
    first, second = (torch.stack([*generate(model, torch.tensor([[1]]), 9, seed=seed)])
                     for seed in (3, 4))
    assert torch.equal(both_rows, torch.cat((first, second), dim=1)) and not first.equal(second)


# -----------------------------------------------------------------------------
# Text.


def speak(monkeypatch, *ids):
    """Let the next texts consist of these tokens, whatever the model says."""
    said = [(torch.tensor([id]), torch.zeros(1, 1000)) for id in ids]
    monkeypatch.setattr(sample, "decode", lambda model, ids, config, *_: iter(
        said[:config.max_new_tokens]))


def pieces_of(model, tokenizer, prompt="", **options):
    """What is written after one prompt, piece by piece."""
    return [piece for _, piece in write(model, tokenizer, [prompt], **options)]


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    first, again, other = (complete(model, tokenizer, "the cat", seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_seed_texts_differ(model, tokenizer):
    assert complete(model, tokenizer) != complete(model, tokenizer)


def test_the_pieces_join_to_the_decoded_tokens(model, tokenizer):
    for seed in range(9):
        pieces = pieces_of(model, tokenizer, "the", seed=seed, temperature=1.5)
        ids = [piece.token for piece in pieces
               if piece.token not in (tokenizer.eot, tokenizer.special["<|end|>"])]
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)


def test_a_character_is_shown_only_when_all_its_bytes_are_there(model, tokenizer, monkeypatch):
    text = "aé€😀z"
    speak(monkeypatch, *text.encode(), tokenizer.eot)
    pieces = [piece.text for piece in pieces_of(model, tokenizer)]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_the_end_of_the_document_ends_the_text_and_is_not_in_it(model, tokenizer, monkeypatch):
    speak(monkeypatch, *b"ab", tokenizer.eot, *b"cd")
    assert complete(model, tokenizer) == "ab"


def test_after_a_prompt_that_ends_in_a_space_a_token_begins_with_it(model, tokenizer):
    for seed in range(20):
        piece, *_ = pieces_of(model, tokenizer, "the ", max_new_tokens=5, seed=seed)
        first = tokenizer.token_bytes()[piece.token]
        assert first.startswith(b" ") and first[1:].decode("utf-8", "replace") == piece.text


@pytest.mark.parametrize("stop, shown", [("lo w", "hel"), ("rld!", "hello wo"), ("h", ""),
                                         ("ox", "hello world!"), ("world!?", "hello world!")])
def test_a_stop_string_across_tokens_is_never_shown(model, tokenizer, monkeypatch, stop, shown):
    speak(monkeypatch, *b"hello world!")
    pieces = pieces_of(model, tokenizer, max_new_tokens=12, stop=["never", stop])
    assert "".join(piece.text for piece in pieces) == shown


def test_text_waits_no_longer_than_a_stop_string_may_have_begun():
    assert release("a = 1 #", ["# end"]) == ("a = 1 ", "#", False)
    assert release("a = 1 # e", ["# end", "x"]) == ("a = 1 ", "# e", False)
    assert release("a = 1 # o", ["# end"]) == ("a = 1 # o", "", False)
    assert release("a # end b x", ["x", "# end"]) == ("a ", "", True)
    assert release("a = 1 #", ["# end"], last=True) == ("a = 1 #", "", False)


def test_many_prompts_together_get_the_texts_that_they_get_alone(model, tokenizer):
    prompts = ["the cat sees the big red bird", "", "a", "the old dog likes ", "birds " * 3]
    for options in dict(temperature=0), dict(top_p=0.9), dict(frequency_penalty=1.0), \
            dict(max_new_tokens=7, stop=["t"]), dict(no_repeat_ngram=2):
        alone = [complete(model, tokenizer, prompt, seed=5 + i, **options)
                 for i, prompt in enumerate(prompts)]
        assert complete_batch(model, tokenizer, prompts, seed=5, **options) == alone


def test_texts_written_in_groups_are_those_written_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "ROWS", 3)
    prompts, options = ["the cat", "", "a ", "birds"] * 2, dict(seed=5, max_new_tokens=8)
    numbers = [i for i, _ in write(model, tokenizer, iter(prompts), **options)]
    assert [i // 3 for i in numbers] == sorted(i // 3 for i in numbers)
    alone = [complete(model, tokenizer, prompt, **options | dict(seed=5 + i))
             for i, prompt in enumerate(prompts)]
    assert complete_batch(model, tokenizer, prompts, **options) == alone


def test_the_first_of_a_million_prompts_is_written_before_the_last_is_read(model, tokenizer):
    read = []
    prompts = (read.append(i) or "the" for i in range(10**6))
    next(write(model, tokenizer, prompts, max_new_tokens=2))
    assert len(read) == sample.ROWS


def test_the_log_probability_of_a_piece_is_the_models_own(model, tokenizer):
    ids = tokenizer.encode("the")
    for piece in pieces_of(model, tokenizer, "the", seed=0, temperature=2.0, max_new_tokens=9):
        said = model(torch.tensor([ids]))[0][0, -1].log_softmax(dim=-1)[piece.token]
        assert piece.logprob == pytest.approx(said.item(), abs=1e-4)
        ids.append(piece.token)


# -----------------------------------------------------------------------------
# Runs and the machine.


def test_a_run_is_found_and_loaded_with_its_best_checkpoint(folder, model):
    assert list(checkpoints(folder)) == [10, 20, 30]
    found = {which: pick_checkpoint(folder, which).name for which in ("best", "last", "10", 20)}
    assert found == {"best": "step_000020.safetensors", "last": "step_000030.safetensors",
                     "10": "step_000010.safetensors", 20: "step_000020.safetensors"}
    loaded, tokenizer = load_run(folder)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and not loaded.training


def test_the_base_of_a_tuned_run_is_no_checkpoint_of_it(folder):
    shutil.copy(folder / "step_000010.safetensors", folder / "base.safetensors")
    os.utime(folder / "base.safetensors", (2**31, 2**31))
    assert list(checkpoints(folder)) == [10, 20, 30]
    assert load_run(folder, "last")[0].config == load_run(folder)[0].config


def test_without_validations_the_last_checkpoint_is_the_best(folder, model):
    for step in 10, 20, 30:
        keep(model, folder, step)
    assert pick_checkpoint(folder, "best").name == "step_000030.safetensors"


def test_the_newest_run_is_the_one_written_last(folder):
    older = shutil.copytree(folder, folder.with_name("older"))
    for path in older.iterdir():
        os.utime(path, (1, 1))
    assert newest_run(folder.parent) == folder


def test_a_model_with_another_tokenizer_is_refused(folder):
    Tokenizer([]).save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="has 262 tokens, the model step_000020.safetensors has 3"):
        load_run(folder)


def test_a_model_whose_training_diverged_is_refused(folder, tokenizer):
    broken = tiny(vocab_size=tokenizer.n_vocab)
    broken.lm_head.weight.data[3] = float("nan")
    keep(broken, folder, 20, 1.8)
    with pytest.raises(ValueError, match="diverged"):
        load_run(folder)


def test_a_run_without_its_tokenizer_says_what_to_copy(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="words lacks its tokenizer.json: copy it from where"):
        load_run(folder)


def test_a_device_that_is_there_is_taken_and_others_are_named():
    assert pick_device("cpu") == "cpu" and pick_device() in ("cuda", "mps", "cpu")
    with pytest.raises(ValueError, match="unknown device 'cdua': did you mean cuda"):
        pick_device("cdua")
    with pytest.raises(ValueError, match="device=cuda:99 does not work"):
        pick_device("cuda:99")


def test_a_precision_is_a_name_and_a_dtype():
    assert pick_precision("bf16", "cpu") == ("bf16", torch.bfloat16)
    assert pick_precision("auto", "mps") == ("fp32", torch.float32)
    assert pick_precision("auto", "cpu")[0] in ("fp32", "bf16")
    with pytest.raises(ValueError, match="unknown precision 'bf61': did you mean bf16"):
        pick_precision("bf61", "cpu")


# -----------------------------------------------------------------------------
# The command.


def test_the_command_prints_prompt_text_and_one_line_about_it(folder):
    done = run("sample.py", "--prompt=the cat", "--max_new_tokens=20", cwd=folder.parent.parent)
    assert done.returncode == 0
    assert done.stdout.startswith("the cat") and done.stdout.endswith("\n")
    assert done.stderr.count("\n") == 1 and "step_000020.safetensors on " in done.stderr


def test_n_samples_differ_and_each_can_be_had_again(command):
    both, _ = command("--n_samples=2", "--seed=7")
    alone = [command(f"--seed={seed}")[0] for seed in (7, 8)]
    assert both == f"--- 1 of 2\n{alone[0]}--- 2 of 2\n{alone[1]}" and alone[0] != alone[1]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signal")
def test_n_samples_appear_group_by_group_and_a_signal_ends_them(folder):
    words = [sys.executable, ROOT / "sample.py", folder, "--n_samples=10000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               encoding="utf-8")
    assert process.stdout.readline() == "--- 1 of 10000\n"
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=60)
    assert process.returncode == 130 and notes == "interrupted\n"


def test_a_full_context_is_said(command):
    _, notes = command("--max_new_tokens=100", "--temperature=0", "--prompt=the cat")
    assert notes.startswith("warning: the context of 64 tokens is full; --overflow=slide goes on\n")


def test_help_names_each_option_with_its_default():
    done = run("sample.py", "--help")
    assert done.returncode == 0
    assert "--temperature" in done.stdout and "(default 0.8)" in done.stdout


@pytest.mark.parametrize("words, line", [
    (["runs/none"], "error: there is no run folder runs/none with a checkpoint: "
     "python train.py makes one"),
    (["words"], "error: there is no run folder words with a checkpoint: "
     "did you mean runs/words?"),
    (["words/"], "error: there is no run folder words/ with a checkpoint: "
     "did you mean runs/words?"),
    (["runs/words/step_000010.safetensors"], "error: there is no run folder "
     "runs/words/step_000010.safetensors with a checkpoint: did you mean runs/words?"),
    (["words/tokenizer.json"], "error: there is no run folder words/tokenizer.json with a "
     "checkpoint: did you mean runs/words?"),
    (["runs"], "error: there is no run folder runs with a checkpoint: "
     "python train.py makes one"),
    (["--checkpoint=7"], "error: unknown checkpoint '7': choose from best, last, 10, 20, 30"),
    (["--checkpoint=lst"], "error: unknown checkpoint 'lst': did you mean last?"),
    (["--prompt=" + "#" * 99], "error: the prompt has 99 tokens, this model takes 1 to 63, as one "
     "must follow: shorten it, or let it slide out with overflow=slide"),
    (["--max_new_tokens=0"],
     "error: max_new_tokens=0 must be at least 1 and below 2^31, a whole number"),
    (["--top_p=3"], "error: top_p=3.0 must be above 0 and at most 1"),
    (["--overflow=slid"], "error: unknown overflow 'slid': did you mean slide?"),
    (["--show=logprob"], "error: unknown show 'logprob': did you mean logprobs?"),
    (["--prompt=a", "--prompts=b", "--file=c"],
     "error: --file --prompt would not act beside --prompts: leave it out"),
    (["--prompt=a", "--file=b"], "error: --prompt would not act beside --file: leave it out"),
    (["--temperature=1e-7", "--top_p=0.9", "--seed=1"],
     "error: --top_p --seed would not act beside --temperature=0: leave it out"),
    (["--temperature=0", "--n_samples=3"],
     "error: --n_samples would not act beside --temperature=0: leave it out"),
    (["--logit_bias=a=" + "9" * 400], "error: logit_bias=a=" + "9" * 400 + " must be one token and "
     "a number, such as ' the=-2'; 'a' makes 1 tokens"),
    (["--ban="], "error: a text in stop or ban is empty: leave it out, or give it characters"),
    (["--logit_bias=the"], "error: logit_bias=the must be one token and a number, such as "
     "' the=-2'; '' makes 0 tokens"),
    (["--file=none.txt"], "error: No such file or directory: none.txt"),
    (["--n_samples=0"], "error: n_samples=0 must be at least 1 and below 10001, a whole number"),
    (["--n_samples=1000000"],
     "error: n_samples=1000000 must be at least 1 and below 10001, a whole number"),
    (["--device=tpu"], "error: unknown device 'tpu': did you mean cpu?")])
def test_a_wrong_input_ends_in_one_line(command, words, line):
    text, notes = command(*words)
    assert (text, notes.replace("\\", "/")) == ("", line + "\n")


@pytest.mark.parametrize("name", [*SampleConfig.__dataclass_fields__, "n_samples"])
@pytest.mark.parametrize("value", ["9" * 20, "-" + "9" * 20, "nan", "inf"])
def test_a_number_that_no_option_takes_ends_in_one_line(command, name, value):
    if name in ("cache", "stop", "ban"):
        return
    text, notes = command(f"--{name}={value}")
    assert text == "" and notes.count("\n") <= 2 and name in notes and "Traceback" not in notes


@pytest.mark.parametrize("option", ["--beams=4", "--length_penalty=1"])
def test_an_option_of_beam_search_names_its_command(option, monkeypatch, capsys):
    code, (line,) = mistake(sample.main, monkeypatch, capsys, option)
    assert code == 2 and "; here: python -m chapters.beam RUN --beams=4" in line


def test_a_token_is_shown_with_its_log_probability(command):
    text, _ = command("--prompt=the", "--show=logprobs", "--max_new_tokens=5", "--temperature=0")
    prompt, *lines, end = text.split("\n")
    assert (prompt, end) == ("the", "") and len([line for line in lines if line]) <= 5
    assert all(float(line.split()[0]) <= 0 and line.endswith("'") for line in lines if line)


def test_prompts_come_from_a_line_a_file_or_the_keyboard(command, tmp_path, monkeypatch):
    (tmp_path / "prompts").write_text("the cat\nthe dog\n")
    options = "--seed=3", "--max_new_tokens=6"
    alone, _ = command("--prompt=the cat\nthe dog\n", *options)
    assert command(f"--file={tmp_path / 'prompts'}", *options)[0] == alone
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\nthe dog\n")))
    assert command("--file=-", *options)[0] == alone
    text, notes = command(f"--prompts={tmp_path / 'prompts'}", *options)
    assert text.startswith("--- 1 of 2\nthe cat") and "--- 2 of 2\nthe dog" in text
    (tmp_path / "prompts").write_text("")
    text, notes = command(f"--prompts={tmp_path / 'prompts'}", *options)
    assert text == "" and "error" not in notes


@pytest.mark.parametrize("option", ["file", "prompts"])
def test_a_byte_order_mark_and_the_ends_of_windows_lines_enter_no_prompt(command, tmp_path, option,
                                                                         monkeypatch):
    texts, path = [], tmp_path / "prompt"
    for data in b"the cat\nthe dog\n", b"\xef\xbb\xbfthe cat\r\nthe dog\r\n":
        path.write_bytes(data)
        texts.append(command(f"--{option}={path}", "--seed=3", "--max_new_tokens=6")[0])
        typed = io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="\n")
        monkeypatch.setattr("sys.stdin", typed)
        texts.append(command(f"--{option}=-", "--seed=3", "--max_new_tokens=6")[0])
    assert texts == texts[:1] * 4 and "\ufeff" not in texts[0]


@pytest.mark.parametrize("option", ["file", "prompts"])
def test_a_closed_standard_input_ends_in_one_line(command, monkeypatch, option):
    monkeypatch.setattr("sys.stdin", None)
    assert command(f"--{option}=-") == (
        "", "error: standard input is closed: give a file, or pipe the text in\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_prompt_that_is_not_utf8_is_refused_from_a_file_and_from_a_pipe(command, tmp_path, errors,
                                                                          monkeypatch):
    path, data = tmp_path / "prompt", "café\n".encode("latin-1")
    path.write_bytes(data)
    typed = io.TextIOWrapper(io.BytesIO(data), "utf-8", errors)
    monkeypatch.setattr("sys.stdin", typed)
    for name, said in (path, str(path)), ("-", "standard input"):
        text, notes = command(f"--file={name}")
        assert text == "" and notes.startswith(f"error: {said} cannot be read: 'utf-8' codec can't")


def test_a_prompt_that_does_not_fit_is_left_out_of_a_batch(command, tmp_path):
    path, options = tmp_path / "prompts", ("--seed=3", "--max_new_tokens=6")
    path.write_text("the cat\n" + "#" * 64 + "\nthe dog\n" + "#" * 63)
    text, notes = command(f"--prompts={path}", *options)
    assert notes.splitlines()[0] == (
        "warning: line 2 is left out: its 64 tokens are more than 63, which fit")
    assert [line for line in text.splitlines() if line.startswith("---")] == [
        f"--- {i} of 3" for i in (1, 2, 3)]
    path.write_text("the cat\nthe dog\n" + "#" * 63)
    assert command(f"--prompts={path}", *options)[0] == text
    assert "is left out" not in command(f"--prompts={path}", "--overflow=slide", *options)[1]
    path.write_text("#" * 64 + "\n" + "#" * 70)
    assert command(f"--prompts={path}") == (
        "", "error: the prompt has 64 tokens, this model takes 1 to 63, as one must follow: "
        "shorten it, or let it slide out with overflow=slide\n")


def test_a_banned_text_is_not_written(command, tokenizer):
    words = "--prompt=the", "--temperature=5", "--seed=1", "--max_new_tokens=40"
    assert " cat" in command(*words, "--logit_bias= cat=9")[0]
    assert " cat" not in command(*words, "--logit_bias= cat=9", "--ban= cat")[0]


# -----------------------------------------------------------------------------
# Chats.


def turn(text):
    return [dict(role="user", content=text)]


def decided(tokenizer, folder, **options):
    """A model that is sure of what it says, as the best checkpoint of a run."""
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64, **options)
    model.lm_head.weight.data *= 50
    keep(model, folder, 40, 1.0)
    return model


@pytest.fixture
def chat(command, folder, tokenizer, monkeypatch):
    """The command with --chat for a run that is taken to know chats; .model is its model."""
    monkeypatch.setattr(sample, "END_LIKELY", 0.0)
    chat = partial(command, "--chat")
    chat.model = decided(tokenizer, folder)
    return chat


@pytest.mark.parametrize("options", [dict(seed=3), dict(temperature=0), dict(stop=["e"], seed=5)])
def test_a_reply_is_what_follows_the_rendered_turn_of_the_user(chat, tokenizer, options):
    words = [f"--{name}={value[0] if name == 'stop' else value}" for name, value in options.items()]
    text, _ = chat("--prompt=the <|end|> cat ", "--max_new_tokens=9", *words)
    prompt = tokenizer.render_prompt(turn("the <|end|> cat "))
    assert text == complete(chat.model, tokenizer, prompt, max_new_tokens=9, **options) + "\n"


def test_a_reply_ends_where_the_assistant_ends_it(chat, tokenizer, monkeypatch):
    speak(monkeypatch, *b"Hi", tokenizer.special["<|end|>"], *b"what?")
    text, notes = chat("--prompt=Hello")
    assert text == "Hi\n" and notes.count("\n") == 1
    text, _ = chat("--prompt=Hello", "--show=logprobs")
    assert [line.split()[1] for line in text[:-2].split("\n")] == ["'H'", "'i'", "'<|end|>'"]


def test_each_line_of_a_file_is_a_turn_and_a_whole_file_is_one(chat, tmp_path):
    (tmp_path / "turns").write_text("the cat\nthe dog\n")
    options = "--seed=3", "--max_new_tokens=6"
    alone = [chat(f"--prompt=the {word}", f"--seed={seed}", options[1])[0]
             for word, seed in (("cat", 3), ("cat", 4), ("dog", 5), ("dog", 6))]
    text, _ = chat(f"--prompts={tmp_path / 'turns'}", "--n_samples=2", *options)
    assert text == "".join(f"--- {i + 1} of 4\nthe {'cat' if i < 2 else 'dog'}\n{reply}"
                           for i, reply in enumerate(alone))
    whole, _ = chat(f"--file={tmp_path / 'turns'}", *options)
    assert whole == chat("--prompt=the cat\nthe dog", *options)[0]


def test_a_run_that_never_learned_chats_says_so_and_how_to_teach_it(folder, monkeypatch, capsys):
    code, lines = mistake(sample.main, monkeypatch, capsys, folder, "--chat", "--prompt=Hi")
    assert (code, lines) == (1, [
        "error: this model never learned to hold a conversation, or not yet, as its answers have "
        "no end: python train.py --init=RUN --data=chats.jsonl"])


def test_a_tokenizer_without_the_tokens_of_chats_is_said(folder, monkeypatch, capsys):
    bare = Tokenizer([], ["<|endoftext|>"])
    bare.save(folder / "tokenizer.json")
    keep(tiny(vocab_size=bare.n_vocab), folder, 20, 1.8)
    code, (line,) = mistake(sample.main, monkeypatch, capsys, folder, "--chat")
    assert code == 1 and line.startswith("error: this tokenizer lacks <|system|>, ")
    assert line.endswith("for chats: train another")


@pytest.mark.parametrize("n_classes", [1, 3])
@pytest.mark.parametrize("words", [[], ["--chat", "--prompt=Hi"], ["--overflow=slide"]])
def test_a_classifier_writes_nothing_and_one_line_says_how_it_is_asked(command, folder, tokenizer,
                                                                       n_classes, words):
    decided(tokenizer, folder, n_classes=n_classes)
    assert command(*words) == (
        "", "error: this model judges texts and writes none: python -m chapters.clauses ask RUN "
        "asks a classifier, chapters.align uses a reward model\n")


def test_an_empty_place_says_how_to_make_a_run(command, folder):
    shutil.rmtree(folder)
    assert command() == ("", "error: no run in runs/: python train.py makes one\n")


def other_byte(path):
    """Change one of the weights."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"something else"),
    lambda path: path.write_bytes(path.read_bytes()[:-5000]), other_byte,
    lambda path: path.write_bytes(path.read_bytes().replace(b"progress", b"progrezz", 1))])
def test_a_damaged_checkpoint_is_named_and_the_next_best_is_taken(command, folder, damage):
    damage(folder / "step_000020.safetensors")
    text, notes = command()
    warning, *_, figures = notes.splitlines()
    assert text and "step_000020.safetensors is " in warning
    assert "step_000030.safetensors is taken instead" in warning
    assert "step_000030.safetensors on " in figures
    text, notes = command("--checkpoint=20")
    assert text == "" and notes.count("\n") == 1 and "step_000020.safetensors" in notes


def test_a_run_of_an_older_version_is_refused_with_its_age(command, folder):
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".pt"))
    text, notes = command("runs/words")
    assert text == "" and notes.count("\n") == 1
    assert "written by an older version of this program" in notes and "train again" in notes


def test_where_no_checkpoint_is_whole_one_line_names_them(command, folder):
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")
    text, notes = command()
    assert text == "" and notes.count("\n") == 1 and "no checkpoint that is whole" in notes
