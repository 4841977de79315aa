"""
Alignment: a run that answers, and what is better or right, in; a run that answers better out.

    python -m chapters.align pairs  runs/chat --data=sums --reward=sums --out=pairs.jsonl
    python -m chapters.align dpo    runs/chat --data=pairs.jsonl --out=runs/dpo
    python -m chapters.align reward runs/chat --data=pairs.jsonl --out=runs/judge
    python -m chapters.align grpo   runs/chat --data=sums --reward=sums --out=runs/grpo
    python -m chapters.align ppo    runs/chat --data=sums --reward=runs/judge --watch=sums

pairs: the run answers twice and a rule chooses; in chapters.rate people do. reward: a model that
gives an answer a number. The others say how far they drift from the run, in nats an answer.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

if __name__ == "__main__":  # `python chapters/align.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from chapters.answers import (batches, drift, kl, load, masked_mean, pad, pad_pairs, reward_model,
                              save, scores, sequence_logprobs, token_logprobs, write)
from chapters.rewards import make_pairs, pick_reward, read, take_pair, take_question
from model import GPT, TINY, check_options, option
from sample import checkpoints, pick_device
from tokenizer import Tokenizer, parse_options, refuse_idle, run_command
from train import Recorder, TrainConfig, build_optimizer, clip_gradients, learning_rate, set_rate

EVERY = 10  # steps between lines that are shown, and for dpo between measures of KL

# -----------------------------------------------------------------------------
# Losses, of rewards or log-probabilities of answers (B,), or of their tokens (B, T).

PREFERENCES = {  # of the margin (B,) by which the better answer gained on the worse one
    "sigmoid": lambda margin, beta: -F.logsigmoid(beta * margin),
    "ipo": lambda margin, beta: (margin - 1 / (2 * beta)).square(),
}


def reward_loss(chosen, rejected):
    """-log of Bradley-Terry's chance that the better answer wins, rewards (B,). arXiv:2203.02155"""
    return -F.logsigmoid(chosen - rejected).mean()


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1,
             smoothing=0.0, kind="sigmoid"):
    """reward_loss of the rewards beta * log(policy / reference), from log-probabilities (B,) each,
    arXiv:2305.18290; smoothing: the share of pairs that are the wrong way round. kind=ipo wants a
    margin of 1 / (2 beta), no more: arXiv:2310.12036"""
    margin = policy_chosen - reference_chosen - (policy_rejected - reference_rejected)
    loss = PREFERENCES[kind]
    return ((1 - smoothing) * loss(margin, beta) + smoothing * loss(-margin, beta)).mean()


def policy_loss(logprobs, old, advantages, mask, clip=0.2):
    """Minus what the policy gains, in a mean over tokens (B, T): their probability by that of the
    policy that wrote them, times the advantage; beyond 1 +- clip no more. arXiv:1707.06347"""
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(gain, mask)


def group_advantages(rewards, group):
    """How much better each of B answers is than its group, those to one question, which stand side
    by side, in standard deviations: (B,) -> (B,). arXiv:2402.03300"""
    rewards = rewards.view(-1, group)
    own = rewards - rewards.mean(dim=1, keepdim=True)
    return (own / (rewards.std(dim=1, keepdim=True) + 1e-4)).flatten()


def gae(rewards, values, mask, trace=0.95):
    """How much better each token was than the critic expected, all (B, T): its reward and the value
    after it, less the value before it; surprises to come count trace a token. arXiv:1506.02438"""
    rewards, values = rewards * mask, values * mask
    advantages = rewards + F.pad(values, (0, 1))[:, 1:] - values
    for t in reversed(range(values.size(1) - 1)):
        advantages[:, t] += trace * advantages[:, t + 1]
    return advantages * mask


# -----------------------------------------------------------------------------
# What a method works with.


@dataclass(frozen=True)
class AlignConfig:
    """What is learned, from what, and how."""
    method: str = option("dpo", positional=True, known=lambda: METHODS)
    run: str | None = option(None, "run folder of a model that answers", positional=True)
    data: str = option("", "rows: pairs; else questions, or a task: sums | brackets")
    out: str = option("", "run folder to write, for pairs a .jsonl; empty: RUN-METHOD")
    reference: str = option("", "run that KL is measured to; empty: the run as it was")
    reward: str = option("exact", "a rule: exact | sums | brackets, or a run of align reward")
    watch: str = option("", "a second reward, logged and not learned from")
    beta: float = option(0.1, "weight of KL to the reference", TINY)
    kind: str = option("sigmoid", "loss of dpo", known=lambda: PREFERENCES)
    smoothing: float = option(0.0, "share of pairs that are the wrong way round", below=0.5)
    clip: float = option(0.2, "how far a probability may move, as a share", TINY)
    group: int = option(8, "answers to each question", low=2)
    updates: int = option(1, "steps on the same answers", low=1)
    max_new_tokens: int = option(16, "longest answer that is written, in tokens", low=1)
    max_steps: int = option(100, "steps of the optimizer", low=1)
    batch_size: int = option(128, "pairs, or answers, in a step, all at once in memory", low=2)
    learning_rate: float = option(2e-4, "of AdamW", TINY)
    held_out: float = option(0.1, "share of the rows to measure with, not to learn from", below=1)
    seed: int = option(1337, "of rows and answers")
    device: str = option("auto", "auto | cpu | cuda | mps")

    __post_init__ = check_options


@dataclass
class Alignment:
    """A model that learns, in place, and all that its method works with. reward and watch are
    functions (questions, answers) -> numbers; without a reference, it is the model as it is now."""
    model: GPT
    tokenizer: Tokenizer
    config: AlignConfig
    reward: Callable | None = None
    watch: Callable | None = None
    reference: GPT | None = None

    def __post_init__(self):
        self.model.requires_grad_().eval()  # no dropout: its noise would look like a drift
        self.reference = (self.reference or copy.deepcopy(self.model)).requires_grad_(False)
        torch.manual_seed(self.config.seed)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.critic = reward_model(self.model) if self.config.method == "ppo" else None

    def write(self, questions):
        """Sampled answers to questions -> (texts, ids (B, T), masks (B, T))."""
        texts, written = write(self.model, self.tokenizer, questions, self.config.max_new_tokens,
                               self.generator)
        return texts, *pad(written, self.model.device)

    def logprobs(self, ids):
        """What policy and reference give each token of ids (B, T), without gradients."""
        with torch.no_grad():
            return token_logprobs(self.model, ids), token_logprobs(self.reference, ids)


# -----------------------------------------------------------------------------
# Four ways to learn: each yields a loss for the next step of the optimizer, and what to log.


def gained(chosen, rejected):
    """What to log of two rewards (B,): how often the better answer has more, and how much more."""
    return dict(accuracy=((chosen > rejected).float() + (chosen >= rejected)).mean().item() / 2,
                reward=(chosen - rejected).mean().item())


def learn_rewards(it, pairs):
    """Bradley-Terry: the better answer is to get the higher number."""
    for own in batches(pairs, it.config.batch_size, it.config.seed):
        ids, _ = pad_pairs(it.tokenizer, own, it.model.device)
        chosen, rejected = scores(it.model, ids).chunk(2)
        yield reward_loss(chosen, rejected), gained(chosen, rejected)


def learn_pairs(it, pairs):
    """DPO: the better answer is to gain more than the worse, both against the reference."""
    c = it.config
    for step, own in enumerate(batches(pairs, c.batch_size, c.seed)):
        ids, mask = pad_pairs(it.tokenizer, own, it.model.device)
        policy = sequence_logprobs(it.model, ids, mask)                  # (2B,)
        with torch.no_grad():
            reference = sequence_logprobs(it.reference, ids, mask)
        if c.kind == "ipo":  # means over tokens, or long answers would weigh more
            policy, reference = policy / mask.sum(dim=1), reference / mask.sum(dim=1)
        loss = dpo_loss(*policy.chunk(2), *reference.chunk(2), c.beta, c.smoothing, c.kind)
        row = gained(*(c.beta * (policy - reference)).chunk(2))
        if step % EVERY == 0:
            _, ids, mask = it.write(own)
            row["kl"] = drift(*it.logprobs(ids), mask[:, 1:])
        yield loss, row


def expected(critic, ids):
    """The reward still to come before each token, as far as the critic can tell: (B, T - 1)."""
    return critic.lm_head(critic.transformer(ids[:, :-1].clamp(min=0))).squeeze(-1)


def surprises(it, ids, mask, rewards, log_ratio):
    """PPO's advantages and the critic's targets, (B, T - 1): each token pays for the KL that it
    adds, and the last one of an answer earns its reward. arXiv:2203.02155"""
    last, values = mask & ~F.pad(mask, (0, 1))[:, 1:], expected(it.critic, ids)
    advantages = gae(rewards[:, None] * last - it.config.beta * log_ratio, values, mask)
    own = advantages[mask]
    return (advantages - own.mean()) / (own.std() + 1e-4), advantages + values


def learn_answers(it, questions):
    """GRPO, or with a critic PPO: what earned more than expected is to become likelier."""
    c = it.config
    for own in batches(questions, max(1, c.batch_size // c.group), c.seed):
        own = [question for question in own for _ in range(c.group)]
        texts, ids, mask = it.write(own)
        rewards = torch.tensor(it.reward(own, texts), device=ids.device)         # (B,)
        (old, reference), mask = it.logprobs(ids), mask[:, 1:]           # (B, T - 1)
        row = dict(reward=rewards.mean().item(), kl=drift(old, reference, mask))
        row |= dict(watch=fmean(it.watch(own, texts))) if it.watch else {}
        with torch.no_grad():
            advantages, targets = (surprises(it, ids, mask, rewards, old - reference) if it.critic
                                   else (group_advantages(rewards, c.group)[:, None], None))
        for _ in range(c.updates):
            logprobs = token_logprobs(it.model, ids)                     # (B, T - 1)
            loss = policy_loss(logprobs, old, advantages, mask, c.clip)
            if it.critic:
                loss = loss + masked_mean((expected(it.critic, ids) - targets).square(), mask) / 2
            else:
                loss = loss + c.beta * masked_mean(kl(logprobs, reference), mask)
            yield loss, row


METHODS = {  # how to learn, and from what a row makes
    "pairs": (None, take_question), "reward": (learn_rewards, take_pair), "dpo": (
        learn_pairs, take_pair), **dict.fromkeys(("grpo", "ppo"), (learn_answers, take_question))}


@torch.no_grad()
def measure(it, rows):
    """What the log would say of all these rows, without a step."""
    n = max(1, it.config.batch_size // it.config.group)
    parts = [rows[i:i + n] for i in range(0, len(rows), n)]
    found = [next(METHODS[it.config.method][0](it, part))[1] for part in parts]
    return {name: fmean((row[name] for row in found), map(len, parts)) for name in found[0]}


def align(it, rows):
    """Take max_steps steps on pairs or questions, yielding a row of the log after each. ValueError
    when the gradient is not finite."""
    config, trained = it.config, nn.ModuleList(filter(None, (it.model, it.critic)))
    rates = TrainConfig(optimizer="adamw", learning_rate=config.learning_rate, weight_decay=0.0,
                        schedule="constant", max_steps=config.max_steps)
    optimizer, losses = build_optimizer(trained, rates), METHODS[config.method][0](it, rows)
    for step in range(config.max_steps):
        set_rate(optimizer, rate := learning_rate(step, rates))
        loss, row = next(losses)
        loss.backward()
        norm = clip_gradients(trained, rates.grad_clip)
        if not norm.isfinite():
            raise ValueError(f"the gradient is not finite at step {step + 1}: take a smaller "
                             f"--learning_rate than {config.learning_rate}")
        optimizer.step()
        optimizer.zero_grad()
        yield dict(step=step + 1, loss=loss.item(), lr=rate, grad_norm=norm.item(), **row)


# -----------------------------------------------------------------------------
# The command.

OF_PAIRS, OF_ANSWERS = ["kind", "smoothing"], ["reward", "watch", "clip", "group", "updates"]
IDLE = {  # options that do nothing with a method
    "pairs": [*OF_PAIRS, *OF_ANSWERS[1:], "beta", "reference", "max_steps", "learning_rate"],
    "reward": [*OF_PAIRS, *OF_ANSWERS, "beta", "reference", "max_new_tokens"],
    "dpo": OF_ANSWERS, "grpo": OF_PAIRS, "ppo": OF_PAIRS}


def shown(row):
    return " | ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "lr")


def main():
    typed, = parse_options(__doc__, AlignConfig)
    config = AlignConfig(**typed)
    refuse_idle(typed, IDLE[config.method], f"with {config.method}")
    if not config.run or not config.data:
        raise ValueError("name a method, a run folder and --data: --help shows five examples")
    out, device = Path(config.out or f"{config.run}-{config.method}"), pick_device(config.device)
    if checkpoints(out):
        raise ValueError(f"{out} already holds a run: choose another --out")
    model, tokenizer = load(config.run, device)
    other = config.reference and load(config.reference, device, tokenizer)[0]
    rows, held = read(config, METHODS[config.method][1], tokenizer, model.config.block_size)
    it = Alignment(reward_model(model) if config.method == "reward" else model, tokenizer, config,
                   *(name and pick_reward(name, tokenizer, device)
                     for name in (config.reward, config.watch)), other or None)
    if config.method == "pairs":
        return make_pairs(it, rows, out)
    print("before:", shown(measure(it, held)))
    out.mkdir(parents=True, exist_ok=True)
    with Recorder(out, 1, tqdm.write) as recorder:
        for row in align(it, rows):
            recorder.log(row)
            if row["step"] % EVERY == 0:
                print(shown(row))
    save(out, it.model, tokenizer, config.max_steps, asdict(config))
    print("after:", shown(measure(it, held)), f"\n{out} holds the model and its log")


if __name__ == "__main__":
    run_command(main)
