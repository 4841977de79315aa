"""
Distillation: a small student learns what a larger teacher expects of each next token.

    python -m chapters.distill runs/base --size=nano --out=runs/student
    python -m chapters.distill runs/base --size=nano --out=runs/alone --alpha=0    # to compare
    python evaluate.py runs/base runs/student runs/alone

A text says of each place which token came next; a teacher says how likely all of them were, which
is much more to learn from (arXiv:1503.02531). A run folder goes in, and its own shards are read; a
run folder comes out, of any size, and with all options of a model such as --n_layer=2.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python chapters/distill.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from tqdm import tqdm

from chapters.trials import fit, held_out_loss, new_model, sequences
from chapters.weights import new_folder, whole_folder
from data import check_shards
from evaluate import trained_on
from model import GPT, SIZES, TINY, GPTConfig, check_options, option
from sample import generate, load_run, pick_device
from tokenizer import QUIET, parse_options, refuse_idle, run_command, write_json
from train import (TrainConfig, check_model, find_loader, is_shards, model_shape, save_run,
                   to_device, validation_loss)

SMALL = dict(n_layer=1, n_head=2, n_embd=48)  # the students that are compared

# -----------------------------------------------------------------------------
# What a student minimises.


def distillation_loss(student_logits, teacher_logits, T=1.0):
    """T^2 KL(teacher || student) in nats a token, of logits (..., V) at temperature T. A high T
    shows more of the unlikely tokens; the square makes up for gradients that shrink with it."""
    student, teacher = ((x.float() / T).log_softmax(dim=-1) for x in (student_logits,
                                                                      teacher_logits))
    return T * T * (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def taught_loss(teacher, student, x, y, segments=None, T=1.0, alpha=1.0):
    """alpha times the distillation loss of a batch, ids x and targets y (B, T), -1 ignored, plus
    1 - alpha times the loss on the targets."""
    counts = y != -1
    logits = student(x, segments=segments)[0][counts]                    # (N, V)
    with torch.no_grad():
        theirs = teacher(x, segments=segments)[0][counts]
    return (alpha * distillation_loss(logits, theirs, T)
            + (1 - alpha) * F.cross_entropy(logits.float(), y[counts]))


# -----------------------------------------------------------------------------
# Three ways to learn from few bytes, compared.


def write(teacher, starts, T, seed=0):
    """Texts (N, T) that a teacher writes at temperature 1, after one id each, starts (N, 1)."""
    new = [*generate(teacher, starts, T - 1, temperature=1.0, seed=seed)]
    return torch.cat([starts, torch.stack(new, dim=1)], dim=1)


def compare(teacher, ids, held_out, seed=0, n_steps=150, n_texts=1000, **shape):
    """{way: loss in nats on held-out ids (M,)} of a teacher, and of students that saw ids (N,): on
    their own; distilled; or on what the teacher writes itself (arXiv:1606.07947)."""
    T = teacher.config.block_size
    generator = torch.Generator().manual_seed(seed)
    starts = ids[torch.randint(len(ids), (n_texts, 1), generator=generator)]
    written = write(teacher, starts, T, seed)                            # (n_texts, T)

    def draw_written(generator):
        rows = written[torch.randint(n_texts, (16,), generator=generator)]
        return rows[:, :-1], rows[:, 1:]

    own, taught = sequences(ids, T), partial(taught_loss, teacher)
    ways = {"alone": dict(draw=own), "distilled": dict(draw=own, loss_of=taught),
            "on its texts": dict(draw=draw_written)}
    losses = {"teacher": held_out_loss(teacher, held_out)}
    for way, options in ways.items():
        student = new_model(seed, block_size=T, **SMALL | shape)
        losses[way] = held_out_loss(fit(student, n_steps=n_steps, seed=seed, **options), held_out)
    return losses


# -----------------------------------------------------------------------------
# The command.


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches, and how long."""
    teacher: str = option("", "a run folder", positional=True)
    out: str = option("", "the student's run folder; empty: the teacher's name and the size")
    data: str = option("", "shards of the same tokenizer; empty: those of the teacher")
    size: str = option("nano", "a row of the student's defaults", known=lambda: SIZES)
    max_steps: int = option(1000, "optimizer steps", low=1)
    batch_size: int = option(16, "sequences per step", low=1)
    learning_rate: float = option(0.0, "the highest; 0: train.py's")
    temperature: float = option(1.0, "of both models in the loss", low=TINY)
    alpha: float = option(1.0, "weight of the teacher in the loss, the text has the rest",
                          below=1 + TINY)
    seed: int = option(0, "of weights and batches")
    device: str = option("auto", "auto | cuda | mps | cpu")

    def __post_init__(self):
        check_options(self)
        if not self.teacher:
            raise ValueError("name a run folder that teaches: python -m chapters.distill runs/NAME")


def open_teacher(config):
    """-> (model, tokenizer, Path of its shards, their Card); ValueError if it cannot teach, or
    where the shards are lost or another tokenizer's."""
    model, tokenizer = load_run(config.teacher, device=pick_device(config.device))
    c, path = model.config, config.data or trained_on(config.teacher).get("path", "")
    if c.cross or not c.causal or c.n_classes:
        raise ValueError(f"{config.teacher} does not predict the next token: only such a model "
                         "teaches a student to do it")
    if not is_shards(path):
        raise ValueError(f"{path!r} is no folder of shards, on which {config.teacher} was trained: "
                         "--data=FOLDER names another one that was made with its tokenizer")
    if (card := check_shards(path)).tokenizer != tokenizer.hash():
        raise ValueError(f"{path} was written with another tokenizer than {config.teacher}'s: "
                         f"python data.py SOURCE --tokenizer={config.teacher}/tokenizer.json")
    return model, tokenizer, path, card


def student_shape(config, teacher, typed):
    """The GPTConfig of a student: options that were typed, over those of its size; it reads no
    more tokens at a time than its teacher, a GPTConfig."""
    room = min(SIZES[config.size]["block_size"], teacher.block_size)
    shape = model_shape(config.size, teacher.vocab_size, dict(
        architecture=teacher.architecture, block_size=room) | typed)
    if shape.block_size > teacher.block_size:
        raise ValueError(f"block_size={shape.block_size} is above {teacher.block_size}, the most "
                         "that the teacher reads: leave it out")
    return shape


def distill(config, typed={}):
    """Train a student and write its run folder -> (its Path, {who: validation loss in nats})."""
    out = new_folder(config.out or f"{config.teacher.rstrip('/')}-{config.size}")
    teacher, tokenizer, shards, card = open_teacher(config)
    shape, training = student_shape(config, teacher.config, typed), TrainConfig(
        batch_size=config.batch_size, learning_rate=config.learning_rate)
    check_model(shape, training)
    loader = find_loader(shards, shape)(shards, config.batch_size, shape.block_size,
                                        seed=config.seed)
    steps = iter(tqdm(loader, "distilling", config.max_steps, **QUIET))
    torch.manual_seed(config.seed)
    student = fit(GPT(shape).to(teacher.device), lambda generator: to_device(next(steps), teacher),
                  config.max_steps, config.seed, learning_rate=config.learning_rate,
                  loss_of=partial(taught_loss, teacher, T=config.temperature, alpha=config.alpha))
    losses = {name: validation_loss(model, shards, training)
              for name, model in (("teacher", teacher), ("student", student))}
    with whole_folder(out) as part:
        tokenizer.save(part / "tokenizer.json")
        save_run(part, (student, {}, dict(step=config.max_steps, val_loss=losses["student"])))
        write_json(part / "config.json", dict(model=asdict(shape), distill=asdict(config),
                                              data=dict(path=str(shards), **asdict(card))))
    return out, losses


def main():
    typed, shape = parse_options(__doc__, DistillConfig, GPTConfig)
    refuse_idle(shape, ["vocab_size", "n_classes"], "beside a teacher, who has its own")
    config = DistillConfig(**typed)
    refuse_idle(typed, ["temperature"] * (config.alpha == 0), "beside --alpha=0")
    out, losses = distill(config, shape)
    print(", ".join(f"{who} {loss:.4f}" for who, loss in losses.items()), "nats on held-out text")
    print(f"{out} holds the student\nnext: python evaluate.py {config.teacher} {out}")


if __name__ == "__main__":
    run_command(main)
