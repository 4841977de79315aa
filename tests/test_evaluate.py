"""evaluate.py: likelihoods by their definition, each token scored once, intervals that hold."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import keep, run, tiny

import evaluate
from chapters.prompts import EXAMPLE_ROW, format_row, read_rows
from data import prepare, read_card, read_split
from evaluate import (bits_per_byte, cells, continuation_rows, difference, encode_pair, exp_ratio,
                      interval, loglikelihood, multiple_choice, pairs_of, perplexity, score_choice,
                      spread, surprisal, table, wilson, windows)
from sample import complete
from tokenizer import Tokenizer, write_json

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy, in one process
TEXT = "the cat sees a big red dog. the old bird likes the tree. a dog runs on under the sun. " * 9


@pytest.fixture
def uniform(tokenizer):
    """A model to which all tokens are equally likely."""
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.fixture
def folder(tmp_path, model, shards, tokenizer):
    folder = tmp_path / "runs" / "words"
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    keep(model, folder)
    data = {"path": str(shards), "fingerprint": read_card(shards).fingerprint,
            "sources": [{"name": "words.txt"}]}
    write_json(folder / "config.json", {"data": data})
    return folder


@pytest.fixture
def command(folder, call, monkeypatch):
    """Call the command in the folder that holds runs/; -> (text on stdout, text on stderr)."""
    monkeypatch.chdir(folder.parent.parent)
    return lambda *words: call(evaluate, *words)


def score_by_definition(model, before, after):
    """The log-probability of each id of after, one forward pass for each."""
    ids, scores = list(before), []
    for id in after:
        with torch.inference_mode():
            logits, _ = model(torch.tensor([ids]))
        scores.append(logits[0, -1].double().log_softmax(dim=-1)[id].item())
        ids.append(id)
    return scores


# -----------------------------------------------------------------------------
# The primitive.


def test_a_loglikelihood_is_the_sum_of_the_tokens_log_probabilities(model, tokenizer):
    pairs = [("the cat", " sees a dog"), ("", "a tree"), ("old", " bird likes the big red cat.")]
    for pair, (score, _) in zip(pairs, loglikelihood(model, tokenizer, pairs)):
        before, after = encode_pair(tokenizer, *pair)
        assert score == pytest.approx(sum(score_by_definition(model, before, after)), abs=1e-4)


def test_in_batches_and_one_by_one_likelihoods_are_the_same(model, tokenizer, monkeypatch):
    rng = random.Random(0)
    pairs = [(TEXT[:rng.randrange(60)], TEXT[:rng.randrange(1, 60)]) for _ in range(25)]
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 200)
    monkeypatch.setattr(evaluate, "HEAD_TOKENS", 7)
    scores, greedy = zip(*loglikelihood(model, tokenizer, pairs))
    each = [loglikelihood(model, tokenizer, [pair])[0] for pair in pairs]
    assert scores == pytest.approx([score for score, _ in each], abs=1e-4)
    assert list(greedy) == [likeliest for _, likeliest in each]


def test_what_greedy_sampling_writes_is_greedy(tokenizer):
    # with a tied head it repeats a word, and that is encoded as it was chosen
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=64, tied=True)
    text = complete(model, tokenizer, "the cat", temperature=0, max_new_tokens=5)
    pairs = [("the cat", text), ("the cat", " sees the old dog")]
    assert [greedy for _, greedy in loglikelihood(model, tokenizer, pairs)] == [True, False]


def test_white_space_at_the_end_of_a_context_goes_to_the_continuation(tokenizer):
    assert encode_pair(tokenizer, "the ", "cat") == encode_pair(tokenizer, "the", " cat")
    assert encode_pair(tokenizer, "the\n ", "cat") == encode_pair(tokenizer, "the", "\n cat")
    before, after = encode_pair(tokenizer, "the cat sees ", "a dog")
    assert tokenizer.decode(before) == "the cat sees" and tokenizer.decode(after) == " a dog"


@pytest.mark.parametrize("context", ["", " "])
def test_without_a_context_a_document_begins(tokenizer, context):
    before, after = encode_pair(tokenizer, context, "cat")
    assert before == [tokenizer.eot] and tokenizer.decode(after) == context + "cat"


def test_a_context_that_is_too_long_loses_its_beginning(model, tokenizer):
    before, after = encode_pair(tokenizer, TEXT, " a cat")
    seen = (before + after)[-65:-len(after)]
    score, _ = loglikelihood(model, tokenizer, [(TEXT, " a cat")])[0]
    assert score == pytest.approx(sum(score_by_definition(model, seen, after)), abs=1e-4)


@pytest.mark.parametrize("options", [
    {}, dict(architecture="gpt2"), dict(window=9), dict(softcap=2.0, vocab_size=400)])
def test_continuations_of_one_context_share_its_reading_and_keep_their_numbers(tokenizer, options):
    model = tiny(**dict(vocab_size=tokenizer.n_vocab, block_size=64) | options)
    contexts = [TEXT[:40] + end for end in ("", " the old dog", " a big bird sees", TEXT, " x")]
    ends = [" sees", " a tree. the cat", " q" * 9]
    pairs = [(context, end) for context in ["", *contexts] for end in ends]
    shared = loglikelihood(model, tokenizer, pairs)
    alone = [loglikelihood(model, tokenizer, [pair])[0] for pair in pairs]
    assert [score for score, _ in shared] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in alone]


def test_shared_contexts_may_be_read_in_small_parts(model, tokenizer, monkeypatch):
    pairs = [(TEXT[:n], end) for n in (30, 60, 90) * 4 for end in (" a", " the dog", " cat")]
    expected = loglikelihood(model, tokenizer, pairs)
    monkeypatch.setattr(evaluate, "CACHED_TOKENS", 50)
    found = loglikelihood(model, tokenizer, pairs)
    assert [a for a, _ in found] == pytest.approx([b for b, _ in expected], abs=1e-4)


def test_a_softcap_flattens_the_scores(tokenizer):
    shape = dict(vocab_size=tokenizer.n_vocab, block_size=64)
    capped = tiny(**shape, softcap=0.01)  # all logits within 0.01: all tokens nearly alike
    (score, _), = loglikelihood(capped, tokenizer, [("the", " cat")])
    n = len(encode_pair(tokenizer, "the", " cat")[1])
    assert score == pytest.approx(-n * math.log(tokenizer.n_vocab), abs=0.02 * n)


@pytest.mark.parametrize("continuation", ["", TEXT])
def test_a_continuation_that_does_not_fit_is_refused(model, tokenizer, continuation):
    with pytest.raises(ValueError, match=" has .* tokens, not 1 to 64"):
        loglikelihood(model, tokenizer, [("the", continuation)])


# -----------------------------------------------------------------------------
# Predicting text.


@pytest.mark.parametrize("n", [2, 5, 8, 9, 10, 30])
@pytest.mark.parametrize("block_size, stride", [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1)])
def test_each_token_but_the_first_is_scored_once_with_enough_before_it(n, block_size, stride):
    scored = []
    for ids, n_scored in windows(list(range(n)), block_size, stride):
        assert len(ids) <= block_size + 1
        scored += ids[-n_scored:]
        least = min(ids[-n_scored], block_size - stride)  # ids count from 0: as many stand before
        assert ids[-n_scored] - ids[0] >= max(1, least)
    assert scored == list(range(1, n))


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_surprisal_equals_one_forward_pass_for_each_token(stride):
    model, ids = tiny(), torch.randint(64, (45,)).tolist()
    starts = [max(0, math.ceil((i - 16) / stride)) * stride for i in range(1, 45)]
    starts = [min(start, 45 - 17) for start in starts]  # the last window is full, too
    expected = [-score_by_definition(model, ids[start:i], ids[i:i + 1])[0]
                for i, start in enumerate(starts, 1)]
    assert surprisal(model, np.array(ids), stride) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride} must be 1 to block_size=16"):
        surprisal(tiny(), np.zeros(9, np.int64), stride)


def test_an_untrained_model_guesses_among_all_tokens(uniform, model, tokenizer):
    ids, V = np.array(tokenizer.encode(TEXT)), tokenizer.n_vocab
    assert perplexity(surprisal(uniform, ids)) == pytest.approx(V, rel=1e-5)
    random_ids = np.random.default_rng(0).integers(V, size=2000)
    assert perplexity(surprisal(model, random_ids)) == pytest.approx(V, rel=0.1)


def test_bits_per_byte_and_perplexity_by_hand():
    nats = [math.log(8), math.log(2)]  # 3 bits and 1 bit, for 2 bytes
    assert bits_per_byte(nats, 2) == pytest.approx(2)
    assert perplexity(nats) == pytest.approx(4)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 21])
def test_rolling_windows_are_disjoint_and_the_last_sees_a_full_context(n):
    tokens, scored = list(range(-1, n)), []  # -1: what comes before the text
    rows = windows(tokens, block_size=8, stride=8)
    for ids, n_scored in rows:
        scored += ids[-n_scored:]
    assert scored == list(range(n)) and rows[0][0][0] == -1
    assert len(rows) == 1 or {len(ids) for ids, _ in rows} == {9}


# -----------------------------------------------------------------------------
# Multiple choice.


def test_what_is_said_of_one_question_by_hand():
    question = dict(choices=["ab", "c", "dé"], answer=2)
    found = score_choice(question, [(math.log(0.2), False), (math.log(0.2), False),
                                    (math.log(0.1), True)])
    assert [found[name][0] for name in ("acc", "acc_norm", "acc_bytes")] == [0, 0, 1]


def test_the_likeliest_choice_wins_by_its_sum_and_by_its_mean_per_character(monkeypatch):
    scores = {" no": -2.0, " surely": -3.0, "x": -1.0, "yy": -1.5}
    monkeypatch.setattr(evaluate, "loglikelihood", lambda model, tokenizer, pairs, title: [
        (scores[continuation], False) for _, continuation in pairs])
    rows = [{"context": "is it?", "choices": ["no", "surely"], "answer": 0},
            {"context": "is it?\n", "choices": ["x", "yy"], "answer": 1}]
    assert multiple_choice(None, None, rows) == {"acc": 0.5, "acc_norm": 0.5}
    rows[0]["answer"] = 1  # -3/6 is more than -2/2
    assert multiple_choice(None, None, rows) == {"acc": 0.0, "acc_norm": 1.0}


def test_a_model_that_knows_nothing_answers_as_often_as_chance(uniform, tokenizer, shards):
    text = tokenizer.decode(np.concatenate(read_split(shards, "val")).tolist())
    rows = continuation_rows([text], n_rows=200)
    low, high = wilson(multiple_choice(uniform, tokenizer, rows)["acc"], len(rows))
    assert low <= 0.25 <= high


def test_questions_have_one_true_continuation_among_four_places_of_the_text():
    text = " ".join(f"{n}\n  " if n % 9 == 0 else str(n) for n in range(2000))
    rows = continuation_rows([text], n_rows=50)
    assert len(rows) == 50
    for row in rows:
        assert row["context"] + row["choices"][row["answer"]] in text
        assert len(set(row["choices"])) == 4 and all(choice in text for choice in row["choices"])


def test_the_same_text_and_seed_give_the_same_questions():
    text = " ".join(map(str, range(2000)))
    assert continuation_rows([text], 20, seed=1) == continuation_rows([text], 20, seed=1)
    assert continuation_rows([text], 20, seed=1) != continuation_rows([text], 20, seed=2)


@pytest.mark.parametrize("letters", ["春江潮水连海平，海上明月共生。", "กาบาดีมู่", "ひらがなカタカナ。"])
def test_a_text_without_spaces_is_cut_into_pieces_of_characters(letters):
    text = "".join(random.Random(0).choices(letters, k=9000))
    rows = continuation_rows([text], n_rows=20)
    assert len(rows) == 20
    for row in rows:
        assert row["context"] + row["choices"][row["answer"]] in text
        assert all(16 <= len(choice) <= 100 for choice in row["choices"])


def test_text_with_too_few_questions_says_what_it_lacks():
    with pytest.raises(ValueError, match="8 of them within 100 characters: it has 0, 4 are needed"):
        continuation_rows([" ".join(["long" * 9] * 1000)])


def test_text_that_is_too_short_for_questions_is_refused():
    with pytest.raises(ValueError, match="too short for continuation questions of 48 words"):
        continuation_rows(["some words " * 10, "one " * 100])


def test_rows_are_read_from_lines_of_json(tmp_path):
    rows = [{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1, "between": " "},
            {"context": "a ", "choices": ["a\u2028b", "ä", "c"], "answer": 0, "between": ""}]
    lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(lines.encode("utf-8-sig"))
    assert read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("row, ends", [
    (dict(context="2 + 2 =", choices=["3", " 4"]), [" 3", " 4"]),
    (dict(context="2 + 2 = ", choices=["3", " 4"]), ["3", " 4"]),
    (dict(context="so\n", choices=["a", "b"]), ["a", "b"]),
    (dict(context="", choices=["a", "b"]), ["a", "b"]),
    (dict(context=["a", "b "], choices=["c", "d"]), [" c", "d"]),
    (dict(context="海上明月", choices=["共潮生", "a"]), ["共潮生", "a"]),
    (dict(context="in Chinese:", choices=["水", "water"]), ["水", " water"]),
    (dict(context="ฉันรัก", choices=["เธอ", "แมว"]), ["เธอ", "แมว"]),
    (dict(context="나는", choices=["너를", "물을"]), [" 너를", " 물을"]),
    (dict(context="я", choices=["ты", "мы"]), [" ты", " мы"]),
    (dict(context="海", choices=["上", "a"], between=" "), [" 上", " a"]),
    (dict(context="a", choices=["b", "c"], between=""), ["b", "c"]),
    (dict(context="a", choices=["b", "c"], between=None), [" b", " c"])])
def test_a_space_goes_before_a_choice_where_the_script_has_one(row, ends):
    assert [end for _, end in pairs_of(format_row(row | dict(answer=0)))] == ends


@pytest.mark.parametrize("line", [
    b"{", b"[]", b'{"context": "", "choices": ["a", "b"], "answer": 0, "between": 3}',
    b"3", b"\xff", b'{"choices": ["a", "b"], "answer": 0}',
    b'{"context": 1, "choices": ["a", "b"], "answer": 0}',
    b'{"context": "", "choices": ["a"], "answer": 0}',
    b'{"context": "", "choices": "ab", "answer": 0}',
    b'{"context": "", "choices": ["a", ""], "answer": 0}',
    b'{"context": "", "choices": ["a", "b"], "answer": 2}',
    b'{"context": "", "choices": ["a", "b"], "answer": true}'])
def test_a_row_that_is_wrong_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(EXAMPLE_ROW.encode() + b"\n\n" + line)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3 cannot be read: "):
        read_rows(path)


# -----------------------------------------------------------------------------
# Intervals.


def test_wilsons_interval_solves_its_equation():
    for share, n in (0.5, 100), (0.0, 10), (1.0, 10), (0.3, 1):
        for edge in wilson(share, n):  # its standard error, times 1.96, reaches to the share
            assert (share - edge) ** 2 == pytest.approx(1.96**2 * edge * (1 - edge) / n, abs=1e-9)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), {"wilson": 0, "bootstrap": 0}
    for _ in range(200):
        low, high = wilson(rng.binomial(60, 0.7) / 60, 60)
        held["wilson"] += low <= 0.7 <= high
        units = rng.integers(1, 9, size=60)
        sums = np.stack([rng.normal(2 * units, 3), units], axis=1)
        low, high = spread(sums, n_resamples=200)
        held["bootstrap"] += low <= 2 <= high
    assert all(0.9 <= times / 200 <= 0.99 for times in held.values()), held


def test_of_two_runs_asked_the_same_the_paired_interval_is_far_narrower():
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # of one question both models have much the same view
    a, b = (np.stack([hard + shift + 0.05 * rng.normal(size=300), np.ones(300)], axis=1)
            for shift in (0, 0.02))
    gap, low, high = difference(a, b)
    alone = [interval(x) for x in (a, b)]
    assert 0 < low < gap < high < 0.04 and alone[0][2] > alone[1][1]  # alone they overlap
    assert difference(a, b[:-1]) is None and difference(a, b * 2) is None


def test_intervals_are_those_of_shares_or_of_what_is_summed():
    right = np.array([[1.0, 1], [0, 1], [1, 1]])
    assert interval(right) == (2 / 3, *wilson(2 / 3, 3))
    value, low, high = interval(np.array([[3.0, 2], [1, 2], [2, 1]]), exp_ratio)
    assert value == pytest.approx(math.exp(6 / 5)) and low < value < high


# -----------------------------------------------------------------------------
# The command.


def test_the_command_prints_a_table_and_writes_a_file_and_a_picture(folder):
    done = run("evaluate.py", "--max_tokens=800", "--n_questions=20", cwd=folder.parent.parent)
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads((folder / "scores.json").read_text("utf-8"))
    assert table(cells(report["scores"])) in done.stdout
    assert ["perplexity", "bits per byte", "acc", "acc_norm"] == [
        row["metric"] for row in report["scores"]]
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_scores_written_are_those_of_the_held_out_tokens(command, folder, model, shards):
    tokenizer = Tokenizer.load(shards / "tokenizer.json")
    command("--tasks=perplexity", "--max_tokens=300")
    text = tokenizer.decode(np.concatenate(read_split(shards, "val"))[:300].tolist())
    text = text.replace("<|endoftext|>", "")  # there is one document
    ids = tokenizer.encode(text)
    nats = surprisal(model, np.array([tokenizer.eot, *ids]))
    first, second = json.loads((folder / "scores.json").read_text("utf-8"))["scores"]
    assert first["value"] == pytest.approx(perplexity(nats), rel=1e-6)
    assert second["value"] == pytest.approx(bits_per_byte(nats, len(text.encode())), rel=1e-6)
    assert all(row["low"] < row["value"] < row["high"] for row in (first, second))
    assert (first["n"], first["chance"]) == (len(ids), tokenizer.n_vocab)


def test_rows_of_a_file_need_no_held_out_text(command, folder, tmp_path):
    (folder / "config.json").unlink()
    (tmp_path / "sums.jsonl").write_text(EXAMPLE_ROW, encoding="utf-8")
    shown, _ = command("--tasks=rows", "--rows=sums.jsonl")
    assert "rows  acc                runs/words  " in shown and "1 questions" in shown


@pytest.fixture
def second(folder, tokenizer):
    """A second run beside the first, of another model."""
    place = folder.with_name("other")
    place.mkdir()
    tokenizer.save(place / "tokenizer.json")
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=64, seed=1), place)
    return place


def test_two_runs_are_asked_the_same_and_their_differences_are_paired(command, folder, second):
    shown, _ = command(folder, second, "--max_tokens=900")
    rows = json.loads((folder.parent / "leaderboard.json").read_text("utf-8"))
    assert [row["run"] for row in rows] == [str(folder), str(second)] * 4
    results = [json.loads((place / "scores" / "continuation.json").read_text("utf-8"))
               for place in (folder, second)]
    a, b = (np.array([outcome["acc_norm"] for outcome in result]) for result in results)
    gap, low, high = rows[-1]["difference"]
    assert (gap, low, high) == difference(a, b)
    assert ("may be chance" if low <= 0 <= high else "differs") in shown.splitlines()[-3]
    assert "other seeds of training" in shown.splitlines()[-2]
    assert (folder.parent / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_runs_with_different_tokenizers_are_compared_by_bits_per_byte_alone(
        command, folder, second):
    words = Tokenizer([(b"a", b"t")])
    words.save(second / "tokenizer.json")
    keep(tiny(vocab_size=words.n_vocab, block_size=64), second, step=2)
    command(folder, second, "--tasks=perplexity", "--max_tokens=900", "--checkpoint=last")
    rows = json.loads((folder.parent / "leaderboard.json").read_text("utf-8"))
    assert [row.get("difference") is None for row in rows] == [True, True, True, False]


def test_what_does_not_fit_the_context_is_left_out_and_counted(command, folder, tmp_path):
    rows = [dict(context=f"{i} is", choices=["a cat", TEXT if i < 2 else "red"], answer=0)
            for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    shown, notes = command("--rows=rows.jsonl")
    scores = json.loads((folder / "scores.json").read_text("utf-8"))["scores"]
    assert [(row["n"], row["left_out"]) for row in scores] == [(3, 2)] * 4 and notes == ""
    assert shown.count("3 questions, 2 left out") == 4


def test_a_task_of_which_nothing_fits_is_named_and_ends_no_other(command, tmp_path):
    row = dict(context="", choices=["a", TEXT], answer=0)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    shown, notes = command("--rows=rows.jsonl", "--tasks=rows,perplexity")
    line = "runs/words: none of the questions of rows fits into the context of 64 tokens"
    assert notes == f"warning: {line}\n" and "perplexity  bits per byte" in shown
    _, notes = command("--rows=rows.jsonl")
    assert notes == f"error: {line}\n"


def test_runs_are_compared_only_where_the_same_questions_fit(command, folder, second, tokenizer,
                                                            tmp_path):
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=8), second, step=2)
    rows = [dict(context="", choices=["a", end], answer=0) for end in ("b", "a red dog " * 3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    shown, _ = command(folder, second, "--rows=rows.jsonl", "--checkpoint=last")
    assert "1 questions, 1 left out" in shown and "minus the first run" not in shown


def test_shards_of_another_text_than_the_runs_own_are_refused(command, folder, shards):
    data = {"path": str(shards), "fingerprint": "1" * 64, "sources": [{"name": "book.txt"}]}
    write_json(folder / "config.json", {"data": data})
    _, notes = command()
    assert notes.startswith(f"error: {shards} holds ") and notes.count("\n") == 1
    assert "runs/words was trained on book.txt (11111111): --data=FOLDER" in notes
    shown, notes = command(f"--data={shards}", "--tasks=perplexity", "--max_tokens=300")
    assert "perplexity  bits per byte" in shown and notes == ""
    write_json(folder / "config.json", {"data": data | {"sources": [3]}})
    assert command()[1].startswith("error: runs/words/config.json cannot be read: ")


def test_of_a_run_that_was_trained_on_another_text_it_is_said(command, folder, second):
    write_json(second / "config.json", {"data": {"path": "x", "fingerprint": "0"}})
    shown, _ = command(folder, second, "--max_tokens=300", "--tasks=perplexity")
    assert f"{second}: trained on another text than {folder}, " in shown.splitlines()[0]


def test_all_that_lies_beside_runs_may_be_named(command, folder, second):
    (folder.parent / "leaderboard.json").write_text("[]")
    (folder.parent / "empty").mkdir()
    beside = sorted(folder.parent.iterdir(), reverse=True)
    shown, notes = command(*beside, "--max_tokens=300", "--tasks=perplexity")
    empty = folder.parent / "empty"
    assert notes == f"warning: {empty} is not a run folder with a checkpoint: left out\n"
    assert str(second) in shown and (folder.parent / "leaderboard.png").exists()


@pytest.mark.slow
def test_scores_of_other_tasks_stay_while_weights_and_settings_do(command, folder, tokenizer):
    def tasks(*words):
        command(*words)
        return json.loads((folder / "scores.json").read_text("utf-8"))["tasks"]

    few, more = "--max_tokens=2000", "--max_tokens=2500"
    assert tasks(few, "--tasks=perplexity") == ["perplexity"]
    assert tasks(few, "--tasks=continuation") == ["perplexity", "continuation"]
    assert tasks(few, "--tasks=perplexity") == ["continuation", "perplexity"]
    assert tasks(more, "--tasks=continuation") == ["continuation"]
    assert tasks(more, "--tasks=perplexity") == ["continuation", "perplexity"]
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=64, seed=5), folder)  # of the same name
    assert tasks(more, "--tasks=continuation") == ["continuation"]
    (folder / "scores.json").write_text("[")
    assert tasks(more, "--tasks=perplexity") == ["perplexity"]


@pytest.mark.parametrize("name", ["model.py", "chapters/probes.py"])
def test_scores_of_other_tasks_go_when_the_code_changes(command, folder, tmp_path, monkeypatch,
                                                        name):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    monkeypatch.setattr(evaluate, "EXAMS", tmp_path / "chapters" / "exams.py")
    (tmp_path / "chapters").mkdir()

    def tasks(task, code):
        (tmp_path / name).write_text(code)
        command(f"--tasks={task}", "--max_tokens=2000")
        return json.loads((folder / "scores.json").read_text("utf-8"))["tasks"]

    assert tasks("perplexity", "a = 1") == ["perplexity"]
    assert tasks("continuation", "a = 1") == ["perplexity", "continuation"]
    assert tasks("perplexity", "a = 2") == ["perplexity"]


@pytest.mark.parametrize("words, idle", [
    (["--tasks=perplexity", "--n_questions=9", "--seed=1"], "--n_questions --seed"),
    (["--tasks=continuation", "--stride=9"], "--stride"),
    (["--rows=r.jsonl", "--max_tokens=9", "--data=x"], "--data --max_tokens")])
def test_options_that_would_not_act_are_refused(command, words, idle):
    _, notes = command(*words)
    assert notes.startswith(f"error: {idle} would not act beside --tasks=")


def test_a_task_that_the_text_is_too_short_for_is_left_out_unless_asked_for(command):
    shown, _ = command("--max_tokens=30")
    assert "continuation is left out: the held-out text is too short" in shown
    assert "perplexity  bits per byte" in shown


@pytest.mark.parametrize("options", [dict(architecture="bert"), dict(n_classes=3),
                                     dict(n_classes=1), dict(architecture="transformer")])
def test_a_model_that_does_not_continue_a_text_is_refused(command, folder, tokenizer, options):
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=64, **options), folder)
    shown, notes = command()
    assert shown == "" and "does not continue a text" in notes and notes.count("\n") == 1
    assert "chapters.clauses scores a classifier, chapters.align a reward model" in notes


@pytest.fixture
def chats(folder, tokenizer, tmp_path):
    """Shards of chats, on which the run was trained -> the chats that are held out, without those
    in which somebody types a special token."""
    rng, words = random.Random(0), "the a cat dog sees likes big red old bird tree".split()
    rows = [dict(instruction=" ".join(rng.choices(words, k=3)) + "<|end|>" * (i % 5 == 0),
                 output="".join(rng.choices(words, k=rng.randrange(4)))) for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    path = prepare([tmp_path / "chats.jsonl"], tmp_path / "chats", tokenizer=tokenizer,
                   val_ratio=0.2, say=lambda text: None)
    write_json(folder / "config.json", {"data": {"path": str(path)}})
    held = tokenizer.decode(np.concatenate(read_split(path, "val")).tolist())
    found = [[turn("user", row["instruction"]), turn("assistant", row["output"])] for row in rows]
    assert held.count("<|end|><|end|>")
    return [chat for chat in found if tokenizer.decode(tokenizer.render_chat(chat)[0]) in held
            and "<|end|>" not in chat[0]["content"]]


def turn(role, text):
    return dict(role=role, content=text)


def test_of_chats_what_the_assistant_says_is_scored_each_chat_alone(command, folder, model,
                                                                    tokenizer, chats):
    scores, n_bytes = [], sum(len(chat[-1]["content"]) for chat in chats)
    for ids, loss_mask in map(tokenizer.render_chat, chats):
        said = model(torch.tensor([ids]))[0][0].double().log_softmax(dim=-1)
        scores += [said[i - 1, ids[i]].item() for i, learned in enumerate(loss_mask) if learned]
    shown, notes = command()
    assert notes == "" and "continuation is left out: " in shown and len(chats) > 4
    perplexity, bits = json.loads((folder / "scores.json").read_text("utf-8"))["scores"]
    assert (perplexity["n"], bits["n"]) == (len(scores), n_bytes)
    assert perplexity["value"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
    assert bits["value"] == pytest.approx(-sum(scores) / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("words, line", [
    (["--tasks=continuation"], "holds chats: --tasks=perplexity scores what the assistant says"),
    (["--max_tokens=5"], "no assistant speaks in max_tokens=5: score more")])
def test_of_chats_what_cannot_be_scored_is_refused(command, chats, words, line):
    _, notes = command(*words)
    assert line in notes and notes.count("\n") == 1


@pytest.mark.parametrize("words, line", [
    (["runs/none"], "there is no run folder runs/none with a checkpoint: python train.py "),
    (["--tasks=perplexity,continuaton"], "unknown task 'continuaton': did you mean continuation?"),
    (["--tasks=rows"], "--tasks=TASK and --rows=FILE.jsonl, the rows of that task, go together"),
    (["--data="], "no shards are named by runs/words/config.json or --data=FOLDER"),
    (["--rows=none.jsonl"], "No such file or directory: none.jsonl"),
    (["--tasks=perplexity", "--rows=x"], "--tasks=TASK and --rows=FILE.jsonl, the rows of that "),
    (["--max_tokens=0"], "max_tokens=0 must be at least 1"),
    (["--stride=65"], "stride=65 must be 1 to block_size=64"),
    (["--stride=half"], "stride=half must be a number of tokens, or rolling"),
    (["--stride=0"], "stride=0 must be a number of tokens, or rolling"),
    (["--tasks="], "unknown task '': choose from perplexity, "),
    (["--data=nothing"], "nothing: no val shards"),
    (["--tasks=continuation", "--max_tokens=20"], "the held-out text is too short for ")])
def test_a_wrong_input_ends_in_one_line(command, words, line):
    _, notes = command(*words)
    assert notes.replace("\\", "/").startswith("error: " + line) and notes.count("\n") == 1


@pytest.mark.parametrize("word", ["--tasks=cloze", "--n_shots=1"])
def test_without_chapters_the_tasks_and_options_of_exams_are_refused(command, monkeypatch, word):
    monkeypatch.setattr(evaluate, "EXAMS", Path("nowhere"))
    _, notes = command(word)
    assert "unknown here, and chapters/exams.py" in notes and notes.count("\n") == 1


def test_a_held_out_text_that_is_gone_is_named_with_what_makes_it(command, folder):
    write_json(folder / "config.json", {"data": {"path": "shards/words"}})
    _, notes = command()
    assert notes.replace("\\", "/").startswith("error: shards/words: no val shards; data.py SOURCE")


def test_shards_of_another_tokenizer_are_refused(command, folder):
    Tokenizer([(b"a", b"b")]).save(folder / "tokenizer.json")
    keep(tiny(vocab_size=263, block_size=64), folder)
    _, notes = command()
    assert "was written with another tokenizer than" in notes and notes.count("\n") == 1
