"""
Answers of a model: written, rendered as a chat, padded to a batch, and how likely they are.

    texts, written = write(model, tokenizer, questions, max_new_tokens=16)
    ids, mask = pad(written)                         # (B, T) each, the mask True in the answers
    logprobs = sequence_logprobs(model, ids, mask)   # (B,)
"""

from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch
from torch.nn.utils.rnn import pad_sequence

from model import merge, save_model, sum_dtype
from sample import end_ids, generate, knows_chats, load_run, warn
from tokenizer import read_json, replacing, write_json
from train import reshaped

CUT = "…"  # ends an answer that did not come to its end, so that no rule takes it for right

# messages: what was said, the user last; right: the right answer, or None where none is known.
Question = namedtuple("Question", "messages right")
# The same messages with two answers, of which the first is the better one.
Pair = namedtuple("Pair", "messages chosen rejected")


def render(tokenizer, messages, answer):
    """-> (the ids of a chat with this answer, a mask: True from its first token to its end)"""
    ids, _ = tokenizer.render_chat([*messages, dict(role="assistant", content=answer)])
    n_prompt = len(tokenizer.render_prompt(messages))
    return ids, [False] * n_prompt + [True] * (len(ids) - n_prompt)


def pad(chats, device="cpu"):
    """[(ids, mask)] -> ids (B, T), -1 behind the shorter ones, and masks (B, T), False there."""
    ids, masks = zip(*chats)
    return (pad_sequence([torch.tensor(row) for row in ids], True, -1).to(device),
            pad_sequence([torch.tensor(row) for row in masks], True, False).to(device))


def pad_pairs(tokenizer, pairs, device="cpu"):
    """The ids and masks (2B, T) of B pairs: all better answers, then all worse ones."""
    chosen, rejected = ([render(tokenizer, pair.messages, getattr(pair, name)) for pair in pairs]
                        for name in ("chosen", "rejected"))
    return pad(chosen + rejected, device)


def batches(rows, n, seed):
    """Yield n rows at a time, over and over, each time in a new order."""
    random = Random(seed)
    while True:
        order = random.sample(rows, len(rows))
        yield from (order[i:i + n] for i in range(0, len(order), n))


def token_logprobs(model, ids):
    """The log-probability of each token of ids (B, T) after those before it -> (B, T - 1)."""
    ids = ids.clamp(min=0)  # no token sees the padding, which is behind it
    logits, _ = model(ids[:, :-1])                                       # (B, T - 1, V)
    logprobs = logits.to(sum_dtype(logits.dtype)).log_softmax(dim=-1)
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def sequence_logprobs(model, ids, mask):
    """The log-probability of the tokens of each row where mask (B, T) is True -> (B,)."""
    return token_logprobs(model, ids).masked_fill(~mask[:, 1:], 0).sum(dim=1)


def masked_mean(values, mask):
    """The mean of values (B, T) where mask (B, T) is True; 0 where it never is."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def kl(logprobs, reference):
    """For each token that the policy wrote, (B, T), an estimate of KL(policy || reference) that is
    right on average and never negative, known as k3: joschu.net/blog/kl-approx.html"""
    return torch.expm1(reference - logprobs) - (reference - logprobs)


def drift(logprobs, reference, mask):
    """The KL divergence to the reference in nats an answer, a float, as kl estimates it."""
    return kl(logprobs, reference).masked_fill(~mask, 0).sum(dim=1).mean().item()


def scores(judge, ids):
    """The reward that a model of one class gives each text of ids (B, T) -> (B,)."""
    return judge(ids.clamp(min=0), segments=(ids >= 0).long())[0].squeeze(1)


def reward_model(model):
    """A model that gives a text a number: the body of one that writes, with a new head."""
    return reshaped(model, replace(model.config, n_classes=1, dropout=0.0))


def write(model, tokenizer, questions, max_new_tokens, generator=None, temperature=1.0):
    """One answer to each question, at temperature 1 as likely as the model finds it -> (texts,
    [(ids, mask)] as render gives); what did not come to its end is CUT."""
    prompts = [tokenizer.render_prompt(question.messages) for question in questions]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, -1, "left")
    new = generate(model, ids.to(model.device), max_new_tokens, temperature=temperature,
                   generator=generator)
    ends, texts, written = end_ids(tokenizer), [], []
    for prompt, row in zip(prompts, torch.stack([*new], dim=1).tolist()):
        n = next((i for i, id in enumerate(row) if id in ends), None)
        texts.append(tokenizer.decode(row[:n]) + CUT * (n is None))
        answer = row if n is None else row[:n + 1]
        written.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return texts, written


def by_model(judge, tokenizer):
    """A reward model as a reward: (questions, answers) -> a list of numbers."""
    def reward(questions, answers):
        ids, _ = pad([render(tokenizer, question.messages, answer.removesuffix(CUT))
                      for question, answer in zip(questions, answers)], judge.device)
        with torch.no_grad():  # odd bytes may make a text longer than what was written
            return scores(judge, ids[:, :judge.config.block_size]).tolist()
    return reward


def load(folder, device, tokenizer=None, judges=False):
    """-> (model, tokenizer) of a run that writes, or that judges; ValueError if it does the other
    thing, or has another tokenizer than this one; a warning if it seems to know no chats."""
    model, own = load_run(folder, device=device)
    c = merge(model).config
    if c.cross or not c.causal or c.n_classes != judges:
        wanted = ("python -m chapters.align reward makes a model that judges answers" if judges else
                  "it writes no answers; take a run that was fine-tuned on chats")
        raise ValueError(f"{folder} has n_classes={c.n_classes}, architecture={c.architecture}: "
                         f"{wanted}")
    if tokenizer and own.hash() != tokenizer.hash():
        raise ValueError(f"{folder} has another tokenizer than the run that learns: their "
                         "probabilities cannot be compared")
    if not (judges or knows_chats(model, own)):
        warn(f"{folder} never learned to end an answer, or not yet: fine-tune it first, python "
             f"train.py --init={folder} --data=chats.jsonl")
    return model, own


def save(folder, model, tokenizer, step, options):
    """Write a run that sample.py reads: a checkpoint, the tokenizer, and how it was made; the data
    are those of the run that it began with, if that says so."""
    before = Path(options["run"], "config.json")
    data = read_json(before).get("data") if before.exists() else None
    with replacing(Path(folder, f"step_{step:06d}.safetensors")) as file:
        save_model(model, file, step=step, val_loss=None)
    tokenizer.save(Path(folder, "tokenizer.json"))
    write_json(Path(folder, "config.json"), dict(model=asdict(model.config), align=options) | (
        dict(data=data) if data else {}))
