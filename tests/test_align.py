"""chapters/align.py, answers.py, rewards.py: losses by their formulas, rewards, rows, methods."""

import json
import math
import re
from copy import deepcopy
from itertools import islice
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import keep, mistake, tiny
from torch.testing import assert_close

from chapters import align, rewards
from chapters.align import (AlignConfig, Alignment, dpo_loss, gae, group_advantages, measure,
                            policy_loss, reward_loss)
from chapters.answers import (CUT, Pair, Question, batches, by_model, drift, kl, masked_mean, pad,
                              pad_pairs, render, reward_model, scores, sequence_logprobs,
                              token_logprobs, write)
from chapters.rewards import (RULES, TASKS, by_rule, chats, is_closed, is_exact, is_held_out,
                              is_sum, prefer, read, take_pair, take_question)
from sample import complete, load_run
from tokenizer import Tokenizer
from train import read_log

BYTES = Tokenizer([])
EVEN = Tokenizer.train("abababab" * 9, 263)  # one merge: the same texts in other ids


def writer(seed=0, **options):
    """A tiny model of bytes, whose answers are noise."""
    return tiny(seed=seed, **dict(vocab_size=BYTES.n_vocab, block_size=24) | options)


def ask(text, right=None):
    return Question([dict(role="user", content=text)], right)


def pair(text, chosen, rejected):
    return Pair(ask(text).messages, chosen, rejected)


def numbers(*shape, seed=0):
    """Random numbers in float64 that take gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).requires_grad_()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


PAIRS = [pair("1+1", "2", "3, I think"), pair("2+2", "4", "5"), pair("3+30", "33", "3")]

# -----------------------------------------------------------------------------
# Losses.


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("kind, beta, smoothing", [
    ("sigmoid", 0.1, 0.0), ("sigmoid", 0.7, 0.2), ("ipo", 0.3, 0.0), ("ipo", 1.5, 0.1)])
def test_the_loss_of_dpo_and_its_gradients_are_those_of_the_formula(kind, beta, smoothing):
    parts = numbers(4, 5)  # policy and reference, each of the better and the worse answer
    loss = dpo_loss(*parts, beta, smoothing, kind)
    loss.backward()
    losses, slopes = [], []
    for a, b, ref_a, ref_b in parts.detach().T.tolist():
        m = (a - b) - (ref_a - ref_b)
        if kind == "sigmoid":
            losses.append(-(1 - smoothing) * math.log(sigmoid(beta * m))
                          - smoothing * math.log(sigmoid(-beta * m)))
            slopes.append(beta * (sigmoid(beta * m) - 1 + smoothing))
        else:
            losses.append((1 - smoothing) * (m - 0.5 / beta)**2 + smoothing * (m + 0.5 / beta)**2)
            slopes.append(2 * m - (1 - 2 * smoothing) / beta)
    slopes = torch.tensor(slopes, dtype=torch.float64) / 5
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-12)
    assert_close(parts.grad, torch.stack([slopes, -slopes, -slopes, slopes]), rtol=1e-12, atol=0)


def test_the_loss_of_dpo_is_that_of_rewards_which_are_logarithms_of_ratios():
    a, b, ref_a, ref_b = numbers(4, 5)
    assert_close(dpo_loss(a, b, ref_a, ref_b, 0.3),
                 reward_loss(0.3 * (a - ref_a), 0.3 * (b - ref_b)))
    assert dpo_loss(a, b, a, b).item() == pytest.approx(math.log(2))


def test_the_loss_of_rewards_is_the_chance_to_win_that_elo_ratings_give():
    a, b = numbers(2, 1)
    points = 400 / math.log(10) * (b - a).item()
    assert math.exp(-reward_loss(a, b).item()) == pytest.approx(1 / (1 + 10**(points / 400)))


def test_with_a_baseline_of_zero_and_no_clip_the_gradient_of_grpo_is_that_of_reinforce():
    questions, worth = [ask("1+1"), ask("2+2")], [1.0, -1.0, -1.0, 1.0, 3.0, -3.0, 3.0, -3.0]
    config = AlignConfig("grpo", clip=1e9, beta=1e-9, group=4, batch_size=8, max_new_tokens=4)
    it = Alignment(writer(), BYTES, config, lambda questions, answers: worth)
    loss, _ = next(align.learn_answers(it, questions))
    loss.backward()
    again = Alignment(writer(), BYTES, config)
    asked = next(batches(questions, 2, config.seed))
    _, ids, mask = again.write([question for question in asked for _ in range(4)])
    each = torch.tensor(worth) / torch.tensor(worth).view(2, 4).std(1).repeat_interleave(4)
    logprobs = token_logprobs(again.model, ids)
    (-(each[:, None] * logprobs)[mask[:, 1:]].mean()).backward()
    assert gradient(again.model).norm() > 0.01
    assert_close(gradient(it.model), gradient(again.model), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 1.0, False), (1.1, 1.0, True), (0.5, 1.0, True), (1.5, -1.0, True), (0.5, -1.0, False)])
def test_a_probability_moves_until_it_gained_enough_and_is_always_drawn_back(
        ratio, advantage, moves):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    policy_loss(logprobs, torch.zeros(1, 1), advantage, torch.ones(1, 1, dtype=torch.bool),
                0.2).backward()
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if moves else 0)


def test_the_estimate_of_kl_is_never_negative_and_its_mean_is_the_divergence():
    p, q = numbers(2, 9).detach().log_softmax(dim=1)
    estimates = kl(p, q)
    assert (estimates >= 0).all() and (kl(p, p) == 0).all()
    assert_close((p.exp() * estimates).sum(), (p.exp() * (p - q)).sum())
    assert drift(p[None], q[None], torch.ones(1, 9, dtype=torch.bool)) == pytest.approx(
        estimates.sum().item())


def test_advantages_of_a_group_have_mean_zero_and_deviation_one_and_equal_rewards_teach_nothing():
    rewards = torch.tensor([1.0, 0, 0, 1, 7, 7, 7, 7])
    advantages = group_advantages(rewards, 4).view(2, 4)
    assert_close(advantages.mean(1), torch.zeros(2))
    assert_close(advantages.std(1), torch.tensor([1.0, 0.0]), rtol=1e-3, atol=1e-3)
    assert advantages[0, 0] > 0 > advantages[0, 1]


@pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
def test_gae_is_the_weighted_sum_of_all_surprises_to_come(trace):
    rewards, values = numbers(2, 3, 6).detach()
    mask = torch.arange(6) >= torch.tensor([[1], [3], [5]])
    mask[1, 5] = False  # an answer that ends early
    expected = torch.zeros_like(values)
    for i in range(3):
        own = mask[i].nonzero().flatten().tolist()
        for t in own:
            for k in (k for k in own if k >= t):
                after = values[i, k + 1] if k + 1 in own else 0
                expected[i, t] += trace**(k - t) * (rewards[i, k] + after - values[i, k])
    assert_close(gae(rewards, values, mask, trace), expected)


def test_what_is_masked_changes_no_loss_and_where_all_is_the_loss_is_zero_and_its_gradient():
    logprobs, mask = numbers(2, 4), torch.tensor([[True, True, False, False], [True] * 3 + [False]])
    other = torch.where(mask, logprobs, 300.0)
    old, advantages = numbers(2, 4, seed=1).detach(), numbers(2, 1, seed=2).detach()
    assert_close(policy_loss(logprobs, old, advantages, mask),
                 policy_loss(other, old, advantages, mask))
    loss = policy_loss(logprobs, old, advantages, mask & False) + masked_mean(
        kl(logprobs, old), mask & False)
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()


# -----------------------------------------------------------------------------
# Answers.


def test_the_log_probability_of_an_answer_is_minus_its_summed_loss():
    model = writer()
    ids, mask = pad([render(BYTES, ask("1+1").messages, "two")])
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -1)
    _, loss = model(ids[:, :-1], targets)
    assert mask.sum() == 4  # three letters and the end
    assert_close(sequence_logprobs(model, ids, mask), -4 * loss[None])


def test_padding_changes_neither_log_probabilities_nor_rewards():
    model = writer()
    judge = reward_model(model)
    torch.nn.init.normal_(judge.lm_head.weight)
    rendered = [render(BYTES, ask("1+1").messages, text) for text in ("2", "a longer one", "")]
    for function in (lambda ids, mask: sequence_logprobs(model, ids, mask),
                     lambda ids, mask: scores(judge, ids)):
        alone = torch.cat([function(*pad([row])) for row in rendered])
        assert_close(function(*pad(rendered)), alone, rtol=1e-4, atol=1e-5)
        assert alone.std() > 0.01


def test_only_the_last_answer_of_a_chat_is_what_is_learned():
    messages = [dict(role="user", content="a"), dict(role="assistant", content="b"),
                dict(role="user", content="c")]
    ids, mask = render(BYTES, messages, "dd")
    assert BYTES.decode([id for id, own in zip(ids, mask) if own]) == "dd<|end|>"


def test_pairs_are_padded_with_all_better_answers_first():
    ids, mask = pad_pairs(BYTES, PAIRS)
    said = [BYTES.decode(row[own].tolist()).removesuffix("<|end|>") for row, own in zip(ids, mask)]
    assert said == [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS]


def test_written_answers_are_those_of_sample_and_what_has_no_end_is_cut():
    model, questions = writer(), [ask("1"), ask("12+3"), ask("7+7")]
    texts, written = write(model, BYTES, questions, 5, temperature=0)
    alone = [complete(model, BYTES, BYTES.render_prompt(q.messages), temperature=0,
                      max_new_tokens=5) for q in questions]
    assert [text.removesuffix(CUT) for text in texts] == alone
    for text, (ids, mask) in zip(texts, written):
        ends = ids[-1] == BYTES.special["<|end|>"]
        assert text.endswith(CUT) != ends and sum(mask) == len(mask) - mask.index(True)
        assert BYTES.decode(ids[mask.index(True):len(ids) - ends]) == text.removesuffix(CUT)


def test_an_answer_ends_where_the_model_ends_it():
    model = writer()
    model.transformer.final_norm.weight.data.zero_()  # all logits are equal: the bias decides
    end = BYTES.special["<|end|>"]
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x) + torch.eye(BYTES.n_vocab)[end]
    texts, written = write(model, BYTES, [ask("1")], 5, temperature=0)
    assert texts == [""] and written[0][0][-1] == end and sum(written[0][1]) == 1


def test_samples_are_drawn_as_the_log_probabilities_say():
    model, question = writer(), ask("1+1")
    model.lm_head.weight.data.mul_(20)  # far from even
    texts, written = write(model, BYTES, [question] * 2000, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, _ = model(torch.tensor([BYTES.render_prompt(question.messages)]))
    p = logits[0, -1].softmax(dim=0)
    share = torch.bincount(torch.tensor([ids[-1] for ids, _ in written]), minlength=len(p)) / 2000
    assert p.max() > 0.05 and (share - p).abs().max() < 5 * (p.max() / 2000).sqrt()


def test_batches_pass_over_all_rows_each_time_in_another_order():
    found = [*islice(batches([*range(10)], 4, seed=1), 6)]
    first, second = sum(found[:3], []), sum(found[3:], [])
    assert sorted(first) == sorted(second) == [*range(10)] and first != second
    assert found == [*islice(batches([*range(10)], 4, seed=1), 6)]


# -----------------------------------------------------------------------------
# Rewards.


@pytest.mark.parametrize("text, answer, right", [
    ("47+8", "55", True), ("47+8", "55?", True), ("47+8", "5", False), ("47+8", "555", False),
    ("47+8", "", False), ("47+8=", "55", True), ("47+8", "so 55", False), ("0+0", "0", True)])
def test_the_rule_of_sums(text, answer, right):
    assert is_sum(ask(text), answer) == right


def test_the_rule_of_brackets_is_that_pairs_can_be_crossed_out_until_nothing_is_left():
    random, found = Random(0), set()
    for _ in range(2000):
        text = "".join(random.choices("()[]{}<>", k=random.randint(1, 6)))
        left = text
        for _ in text:
            left = re.sub(r"\(\)|\[\]|\{\}|<>", "", left)
        found.add(not left)
        cut = random.randint(0, len(text))
        assert is_closed(ask(text[:cut]), text[cut:]) == (not left)
    assert found == {True, False} and not is_closed(ask("(["), "])" + CUT)


def test_the_exact_rule_compares_with_the_row_and_wants_one():
    assert is_exact(ask("?", "yes"), " yes\n") and not is_exact(ask("?", "yes"), "yes" + CUT)
    with pytest.raises(ValueError, match="these prompts lack"):
        is_exact(ask("?"), "yes")
    with pytest.raises(ValueError, match="prompts such as 47"):
        is_sum(ask("two plus two"), "4")


@pytest.mark.parametrize("answers, best", [
    (["55", "54"], 0), (["5", "55?"], 1), (["55?", "55"], 1), (["54", "5"], None),
    (["55", "55"], None), (["54?", "55?"], 1)])
def test_the_judge_prefers_what_is_right_and_then_what_is_short(answers, best):
    reward = by_rule("sums")
    assert prefer(reward, ask("47+8"), answers) == best
    other = None if best is None else 1 - best
    assert prefer(reward, ask("47+8"), answers[::-1]) == other


@pytest.mark.parametrize("task", TASKS)
def test_chats_of_a_task_are_right_and_none_is_held_out_and_learned(task):
    own = [[*map(take_question, islice(chats(task, seed, held), 150))] for seed, held in (
        (0, False), (1, True), (2, False))]
    assert all(RULES[task](question, question.right) for part in own for question in part)
    learned, tested, more = ({rewards.asked(q) for q in part} for part in own)
    assert len(learned) == len(tested) == 150 and not (learned | more) & tested
    assert all(map(is_held_out, tested)) and own[0] != own[2]


def test_a_reward_model_is_a_reward_of_texts_whose_length_no_odd_byte_can_break():
    judge = reward_model(writer())
    torch.nn.init.normal_(judge.lm_head.weight)
    values = by_model(judge, BYTES)([ask("1+1")] * 3, ["2", "2" + CUT, "\ufffd" * 30])
    assert values[0] == values[1] != values[2] and all(map(math.isfinite, values))


# -----------------------------------------------------------------------------
# Rows.

CHAT = [dict(role="user", content="1+1"), dict(role="assistant", content="2")]


@pytest.mark.parametrize("row, messages", [
    (dict(prompt="1+1", chosen="2", rejected="3"), CHAT[:1]),
    (dict(prompt=CHAT[:1], chosen="2", rejected="3"), CHAT[:1]),
    (dict(instruction="Add.", input="1+1", output="x", chosen="2", rejected="3"),
     [dict(role="user", content="Add.\n\n1+1")]),
    (dict(prompt="1+1", chosen="2", rejected="3", shown=["a", "b"], winner="a", seed=0), CHAT[:1])])
def test_pairs_are_read_from_votes_from_files_of_preferences_and_from_the_judge(row, messages):
    assert take_pair(row) == Pair(messages, "2", "3")


@pytest.mark.parametrize("row, what", [
    (dict(prompt="a", chosen="b", rejected="b"), "chosen and rejected are equal, 'b'"),
    (dict(prompt="a", shown=["x", "y"], winner="tie"), "nobody won"),
    ([], "no chosen and rejected"), (dict(prompt="a", chosen="b"), "no chosen and rejected"),
    (dict(chosen="a", rejected="b"), "it")])
def test_rows_that_are_no_pair_are_refused(row, what):
    with pytest.raises(ValueError, match=what):
        take_pair(row)


def test_questions_are_read_from_chats_instructions_and_prompts():
    assert take_question(dict(messages=CHAT)) == ask("1+1", "2")
    assert take_question(dict(instruction="1+1", output="2")) == ask("1+1", "2")
    assert take_question(dict(prompt="1+1", answer="2")) == ask("1+1", "2")
    assert take_question(dict(prompt="1+1")) == ask("1+1")
    for row in ("1+1", dict(prompt=3), dict(prompt="a", answer=3), {}):
        with pytest.raises(ValueError):
            take_question(row)


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_broken_rows_and_long_ones_are_left_out_and_said(tmp_path, capsys):
    path = rows_of(tmp_path / "a.jsonl", *(p._asdict() | dict(prompt=p.messages) for p in PAIRS),
                   dict(prompt="1", chosen="2", rejected="2"),
                   dict(prompt="1" * 30, chosen="2", rejected="3"))
    config = AlignConfig("dpo", data=str(path), held_out=0.3)
    learned, held = read(config, take_pair, BYTES, 24)
    assert sorted(learned + held, key=str) == sorted(PAIRS, key=str) and len(held) == 1
    assert "2 of 5 rows are left out" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Methods.

SMALL = dict(max_steps=4, batch_size=8, group=4, max_new_tokens=4, learning_rate=1e-2)
QUESTIONS = [ask(f"{i}+{i}", str(2 * i)) for i in range(6)]


def begin(method, **options):
    model = writer()
    return Alignment(reward_model(model) if method == "reward" else model, BYTES,
                     AlignConfig(method, **SMALL | options),
                     lambda questions, answers: [float(len(text)) for text in answers],
                     by_rule("exact"))


@pytest.mark.parametrize("method", ["reward", "dpo", "grpo", "ppo"])
def test_each_method_moves_the_model_and_not_its_reference_and_says_how_far(method):
    it = begin(method)
    before, reference = deepcopy(it.model.state_dict()), deepcopy(it.reference.state_dict())
    history = [*align.align(it, PAIRS if method in ("reward", "dpo") else QUESTIONS)]
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert all(math.isfinite(x) for row in history for x in row.values())
    assert {"loss", "reward"} <= history[0].keys()
    if method != "reward":
        assert history[0]["kl"] == pytest.approx(0, abs=1e-4) and "kl" in history[0]
    assert any(not torch.equal(w, before[name]) for name, w in it.model.state_dict().items())
    assert all(torch.equal(w, reference[name]) for name, w in it.reference.state_dict().items())


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_what_a_reward_wants_is_written_more_often(method):
    it = begin(method, max_steps=25, batch_size=32, beta=0.01)
    it.reward = lambda questions, answers: [
        sum("a" <= char <= "z" for char in text) / 4 for text in answers]
    it.watch = None
    history = [*align.align(it, QUESTIONS)]
    assert history[0]["reward"] < 0.25 and history[-1]["reward"] > 0.6
    assert history[-1]["kl"] > 0.1


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_makes_the_better_answer_gain_more_than_the_worse(kind):
    it = begin("dpo", max_steps=12, kind=kind)
    before = measure(it, PAIRS)
    [*align.align(it, PAIRS)]
    after = measure(it, PAIRS)
    assert before["reward"] == pytest.approx(0, abs=1e-5) and before["accuracy"] < 1
    assert after["accuracy"] == 1 and after["reward"] > 0.05 and after["kl"] > 0.01


def test_a_large_beta_keeps_the_policy_near_its_reference():
    near, far = (begin("grpo", max_steps=12, beta=beta, learning_rate=3e-3) for beta in (30, 0.01))
    drifts = [[*align.align(it, QUESTIONS)][-1]["kl"] for it in (near, far)]
    assert drifts[0] < drifts[1] / 2


@pytest.mark.parametrize("updates, asked", [(1, 4), (2, 2), (3, 2)])
def test_answers_are_written_anew_after_so_many_updates(updates, asked):
    it, calls = begin("grpo", updates=updates), []
    it.reward = lambda questions, answers: calls.append(answers) or [0.0, 1.0] * 4
    rows = [*align.align(it, QUESTIONS)]
    assert len(rows) == 4 and len(calls) == asked


def test_a_reward_model_learns_which_answer_is_better():
    it = begin("reward", max_steps=12)
    [*align.align(it, PAIRS)]
    assert measure(it, PAIRS)["accuracy"] == 1
    better, worse = (by_model(it.model, BYTES)([ask("2+2")], [text])[0] for text in "45")
    assert better > worse


def test_ppo_pays_for_kl_at_each_token_and_for_the_reward_at_the_last():
    it = begin("ppo")
    it.critic.lm_head.weight.data.zero_()
    mask = torch.tensor([[False, True, True, False]])
    ratio = torch.tensor([[9.0, 0.5, -0.2, 9.0]])
    _, targets = align.surprises(it, torch.zeros(1, 5, dtype=torch.long), mask,
                                 torch.tensor([2.0]), ratio)
    own = torch.tensor([-0.1 * 0.5, 2 + 0.1 * 0.2])
    assert_close(targets[mask], torch.stack([own[0] + 0.95 * own[1], own[1]]))


def test_a_gradient_that_is_no_number_ends_it_in_one_line():
    it = begin("dpo")
    it.reference.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite at step 1"):
        [*align.align(it, PAIRS)]


# -----------------------------------------------------------------------------
# The command.


def talker():
    """A writer whose answers come to an end, each token with a chance of a sixth."""
    model = writer(architecture="gpt2")
    end = model.transformer.wte.weight.data[BYTES.special["<|end|>"]]
    model.transformer.final_norm.bias.data = 4 * end / end.square().sum()
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run that answers, one that does not, one that judges, one of another
    tokenizer, and pairs."""
    home = tmp_path_factory.mktemp("align")
    judge, other = reward_model(writer()), writer(vocab_size=EVEN.n_vocab)
    for name, model, tokenizer in (("chat", talker(), BYTES), ("base", writer(), BYTES),
                                   ("judge", judge, BYTES), ("other", other, EVEN)):
        keep(model, home / name)
        tokenizer.save(home / name / "tokenizer.json")
    rows_of(home / "pairs.jsonl", *(dict(prompt=p.messages[0]["content"], chosen=p.chosen,
                                         rejected=p.rejected) for p in PAIRS))
    rows_of(home / "equal.jsonl", dict(prompt="1", chosen="2", rejected="2"))
    rows_of(home / "long.jsonl", dict(prompt="1" * 30, chosen="2", rejected="3"))
    rows_of(home / "none.jsonl")
    rows_of(home / "sums.jsonl", *(dict(prompt=f"{i}+1") for i in range(6)))
    return home


OPTIONS = ["--max_steps=2", "--batch_size=16", "--device=cpu"]


@pytest.mark.parametrize("words", [
    ["reward", "chat", "--data=pairs.jsonl"], ["dpo", "chat", "--data=pairs.jsonl", "--kind=ipo"],
    ["grpo", "chat", "--data=sums.jsonl", "--reward=sums"],
    ["ppo", "chat", "--data=sums.jsonl", "--reward=judge", "--watch=sums"]])
def test_a_command_writes_a_run_that_loads_and_its_log(words, home, call, monkeypatch):
    monkeypatch.chdir(home)
    said, errors = call(align, *words, *OPTIONS, f"--out=new-{words[0]}")
    assert errors == "" and said.startswith("before: ") and "after: " in said
    model, tokenizer = load_run(home / f"new-{words[0]}")
    assert model.config.n_classes == (words[0] == "reward")
    assert [row["step"] for row in read_log(home / f"new-{words[0]}")] == [1, 2]


def test_a_base_model_is_aligned_with_a_warning_that_it_never_learned_to_answer(home, call,
                                                                               monkeypatch):
    monkeypatch.chdir(home)
    said, errors = call(align, "dpo", "base", "--data=pairs.jsonl", *OPTIONS)
    assert errors == ("warning: base never learned to end an answer, or not yet: fine-tune it "
                      "first, python train.py --init=base --data=chats.jsonl\n")
    assert "base-dpo holds the model" in said and load_run("base-dpo")


def test_the_pairs_of_a_judge_are_rows_that_dpo_takes(home, call, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setitem(RULES, "sums", lambda question, answer: True)  # the short one is preferred
    said, errors = call(align, "pairs", "chat", "--data=sums", "--reward=sums", "--out=made.jsonl",
                        "--max_new_tokens=3", "--device=cpu")
    rows = [json.loads(line) for line in (home / "made.jsonl").read_text("utf-8").splitlines()]
    assert errors == "" and f"{len(rows)} pairs" in said and len(rows) > 20
    assert [*map(take_pair, rows)] and not any(is_held_out(row["prompt"]) for row in rows)


@pytest.mark.parametrize("words, what", [
    ("dpo chat --data=equal.jsonl", "row 1: chosen and rejected are equal"),
    ("dpo chat --data=none.jsonl", "none.jsonl has no rows"),
    ("dpo chat --data=long.jsonl", "it takes 36 tokens: block_size=24 is less"),
    ("dpo chat --data=nix.jsonl", "nix.jsonl: no such file"),
    ("dpo judge --data=pairs.jsonl", "judge has n_classes=1, .* it writes no answers"),
    ("dpo chat --data=pairs.jsonl --reference=other", "other has another tokenizer"),
    ("dpo chat --data=pairs.jsonl --reward=sums", "--reward would not act with dpo"),
    ("dpo chat --data=pairs.jsonl --smoothing=0.5", "smoothing=0.5 must be"),
    ("grpo chat --data=sums.jsonl --reward=sum", "did you mean sums"),
    ("grpo chat --data=sums.jsonl --reward=other", "n_classes=0, .* makes a model that judges"),
    ("grpo chat --data=pairs.jsonl", "these prompts lack"),
    ("grpo chat --data=sums --max_new_tokens=30", "30 of them for an answer .*block_size=24"),
    ("grpo nix --data=sums", "no run folder nix"), ("grpo chat", "--data"),
    ("grpq chat --data=sums", "did you mean grpo"),
    ("pairs chat --data=sums.jsonl --reward=sums --out=new.jsonl", "nothing to prefer"),
    ("dpo chat --data=pairs.jsonl --out=judge", "judge already holds a run")])
def test_a_mistake_is_one_line_and_leaves_nothing(words, what, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = {*home.rglob("*")}
    code, lines = mistake(align.main, monkeypatch, capsys, *words.split(), "--device=cpu")
    assert code == 1 and len(lines) == 1 and re.search(what, lines[0]), lines
    assert {*home.rglob("*")} == before


def test_chats_of_a_task_are_written_to_a_file(tmp_path, call):
    said, _ = call(rewards, "sums", "--n=9", f"--out={tmp_path / 'a.jsonl'}", "--held_out")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert "9 chats" in said and all(is_held_out(row["messages"][0]["content"]) for row in rows)
    assert len(rows) == 9


# -----------------------------------------------------------------------------
# Beside trl.


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def theirs(trl, tmp_path, kind, beta, smoothing, policy, reference):
    """trl's trainer of two models of transformers; it wants a tokenizer and some row."""
    import datasets
    import tokenizers
    import transformers
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(16)}, "w0")
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="w0", eos_token="w1")
    rows = datasets.Dataset.from_list([dict(prompt="w2", chosen="w3", rejected="w4")])
    options = dict(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False)
    if kind == "reward":
        return trl.RewardTrainer(policy, trl.RewardConfig(**options), train_dataset=rows,
                                 processing_class=words)
    config = trl.DPOConfig(beta=beta, loss_type=[kind], label_smoothing=smoothing,
                           gradient_checkpointing=False, **options)
    return trl.DPOTrainer(policy, reference, config, train_dataset=rows, processing_class=words)


def gpt2(name, seed, **options):
    import transformers
    torch.manual_seed(seed)
    return getattr(transformers, name)(transformers.GPT2Config(
        vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, pad_token_id=0, **options))


def answers_of(lengths, n_prompt=4):
    """ids (B, T) of these lengths, -1 behind them, and masks of what comes after the prompt."""
    torch.manual_seed(0)
    present = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 16, present.shape).masked_fill(~present, -1)
    return ids, present & (torch.arange(max(lengths)) >= n_prompt)


@pytest.mark.slow
@pytest.mark.parametrize("kind, beta, smoothing, lengths", [
    ("sigmoid", 0.1, 0.0, [10, 8, 9, 7, 10, 6]), ("ipo", 0.2, 0.0, [10, 8, 9, 7, 10, 6]),
    ("aot", 0.5, 0.2, [10, 8])])  # of a single pair, it is the sigmoid's loss with smoothing
def test_the_loss_of_dpo_and_its_gradients_are_those_of_trl(trl, tmp_path, kind, beta, smoothing,
                                                            lengths):
    policy, reference = (gpt2("GPT2LMHeadModel", seed) for seed in (0, 1))
    trainer = theirs(trl, tmp_path, kind, beta, smoothing, policy, reference)
    ids, mask = answers_of(lengths)
    expected = trainer.compute_loss(policy, dict(
        input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), completion_mask=mask.long()))
    expected.backward()
    slopes = gradient(policy)
    policy.zero_grad()
    logprobs = [sequence_logprobs(lambda x: (m(x).logits, None), ids, mask)
                for m in (policy, reference)]
    if kind == "ipo":
        logprobs = [x / mask.sum(1) for x in logprobs]
    parts = [x for both in logprobs for x in both.chunk(2)]
    loss = dpo_loss(*parts, beta, smoothing, "ipo" if kind == "ipo" else "sigmoid")
    loss.backward()
    assert_close(loss, expected)
    assert_close(gradient(policy), slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_loss_of_a_reward_model_is_that_of_trl(trl, tmp_path):
    judge = gpt2("GPT2ForSequenceClassification", 0, num_labels=1)
    trainer = theirs(trl, tmp_path, "reward", 0, 0, judge, None)
    rewards = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    fake = lambda **inputs: SimpleNamespace(logits=rewards)  # noqa: E731
    ids = torch.ones(6, 3, dtype=torch.long)
    expected = trainer.compute_loss(fake, dict(input_ids=ids, attention_mask=ids))
    assert_close(reward_loss(*rewards.squeeze(1).chunk(2)), expected)
