"""
Pictures and words in one model: it describes a picture of 8x8 pixels, or draws what is described.

    python -m chapters.pictures              # trains for seconds, then describes and draws

A picture enters in one of two ways. As patches: squares of 2x2 grey pixels, each projected into the
stream by one matrix, as in LLaVA (arXiv:2304.08485). As tokens: each patch becomes one of 16 codes,
dark or bright in each pixel, beside the words in one vocabulary, so that the model can write them
as well, as in DALL-E (arXiv:2102.12092). Some pairs of a shape and a place are held out: no picture
that is trained on shows them.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/pictures.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn.utils.rnn import pad_sequence

from chapters.solve import learn, share
from model import GPT, GPTConfig, Linear, check_options, option
from tokenizer import parse_options, run_command

SIZE, PATCH = 8, 2  # pixels of a side
N_PATCHES, N_CODES = (SIZE // PATCH) ** 2, 2 ** PATCH**2  # 16 and 16
NOISE = 0.25  # standard deviation of what is added to pixels of 0 and 1
SHAPES = {  # rows of 3 pixels
    "square": "### #.# ###", "cross": ".#. ### .#.", "block": "### ### ###",
    "saltire": "#.# .#. #.#", "corner": "#.. #.. ###", "bar": "... ### ..."}
PLACES = {"top left": (0, 0), "top right": (0, 4), "bottom left": (4, 0), "bottom right": (4, 4)}
HELD_OUT = {("square", "bottom right"), ("cross", "top left"), ("block", "top right"),
            ("saltire", "bottom left"), ("corner", "top right"), ("bar", "bottom left")}
VOCABULARY = [*range(N_CODES), "<picture>", "<words>", "<end>",
              *SHAPES, "top", "bottom", "left", "right"]
IDS = {word: id for id, word in enumerate(VOCABULARY)}

# -----------------------------------------------------------------------------
# Scenes, [(shape, place), (shape, place)] in the order of PLACES, and pictures of them.


def scenes(n, seed=0, held_out=False):
    """n random scenes: none of the pairs is held out, or at least one."""
    random, found = Random(seed), []
    while len(found) < n:
        places = sorted(random.sample([*PLACES], 2), key=[*PLACES].index)
        scene = [(random.choice([*SHAPES]), place) for place in places]
        if held_out == any(pair in HELD_OUT for pair in scene):
            found.append(scene)
    return found


def draw(scene, offsets):
    """A picture (8, 8) of 0 and 1: each shape lies in its quarter at an offset of 0 or 1 pixel down
    and to the right, offsets [(0, 1), (1, 1)]."""
    picture = torch.zeros(SIZE, SIZE)
    for (shape, place), (down, right) in zip(scene, offsets):
        rows = torch.tensor([[float(pixel == "#") for pixel in row]
                             for row in SHAPES[shape].split()])
        top, left = PLACES[place][0] + down, PLACES[place][1] + right
        picture[top:top + 3, left:left + 3] = rows
    return picture


SHIFTS = [*product((0, 1), repeat=2)]


def all_pictures(scene):
    """The 16 pictures that a scene can look like, (16, 8, 8)."""
    return torch.stack([draw(scene, offsets) for offsets in product(SHIFTS, repeat=len(scene))])


def photograph(scenes, seed=0, noise=NOISE):
    """A random picture of each scene, with noise: (n, 8, 8)."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    pictures = torch.stack([draw(scene, random.choices(SHIFTS, k=len(scene))) for scene in scenes])
    return pictures + noise * torch.randn(pictures.shape, generator=generator)


def words(scene):
    """words([("bar", "top left"), ("cross", "top right")]) == "bar top left cross top right"."""
    return " ".join(f"{shape} {place}" for shape, place in scene)


# -----------------------------------------------------------------------------
# Pictures as patches and as codes; each function has its inverse below it.


def patches(pictures, size=PATCH):
    """Pictures (B, height, width) -> their squares of size x size pixels, row by row, each flat:
    (B, N, size * size)."""
    B, height, width = pictures.shape
    x = pictures.view(B, height // size, size, width // size, size)
    return x.transpose(2, 3).reshape(B, -1, size * size)


def join(patches, width=SIZE):
    """The pictures (B, height, width) of patches (B, N, size * size)."""
    (B, N, n_pixels), size = patches.shape, round(patches.size(2) ** 0.5)
    x = patches.view(B, N * size // width, width // size, size, size)
    return x.transpose(2, 3).reshape(B, -1, width)


def codes(patches):
    """Each patch (B, N, 4) as a number below 16, a bit for each pixel above one half: (B, N)."""
    bits = 2 ** torch.arange(patches.size(-1)).flip(0)
    return ((patches > 0.5) * bits).sum(dim=-1)


def pixels(codes, n_pixels=PATCH**2):
    """The patches (B, N, 4) of 0 and 1 that numbers (B, N) stand for."""
    return (codes[..., None] >> torch.arange(n_pixels).flip(0) & 1).float()


# -----------------------------------------------------------------------------
# One model for both: <picture> 16 tokens <words> ... <end>, or <words> ... <picture> 16 tokens.


class PictureGPT(GPT):
    """A GPT whose tokens are words and codes, and that can read patches instead of codes."""

    def __init__(self, config):
        super().__init__(config)
        self.project = Linear(PATCH**2, config.n_embd)

    def forward(self, ids, targets=None, pictures=None):
        """As GPT's; pictures (B, 8, 8) take the place of the 16 ids behind the first."""
        if pictures is None:
            return super().forward(ids, targets)
        embedded = self.transformer.wte(ids)
        seen = self.project(patches(pictures))                           # (B, 16, C)
        x = torch.cat((embedded[:, :1], seen, embedded[:, 1 + N_PATCHES:]), dim=1)
        x = self.transformer(ids, x=x)                                   # (B, T, C)
        return (self.lm_head(x), None) if targets is None else (None, self.mean_loss(x, targets))


def new_model(seed=0):
    torch.manual_seed(seed)
    return PictureGPT(GPTConfig(vocab_size=len(VOCABULARY), block_size=32, n_layer=2, n_head=4,
                                n_embd=64))


def to_ids(text):
    return [IDS[word] for word in text.split()]


def picture_ids(picture):
    return codes(patches(picture[None]))[0].tolist()


def describing(scene, picture):
    """A row (ids, how many are the prompt, picture)."""
    begin = [IDS["<picture>"], *picture_ids(picture), IDS["<words>"]]
    return begin + to_ids(words(scene)) + [IDS["<end>"]], len(begin), picture


def drawing(scene, picture):
    begin = [IDS["<words>"], *to_ids(words(scene)), IDS["<picture>"]]
    return begin + picture_ids(picture), len(begin), picture


def row_loss(model, rows, as_patches=False):
    """The mean loss in nats on what follows the prompts of rows."""
    ids = pad_sequence([torch.tensor(row) for row, *_ in rows], True, 0)
    targets = pad_sequence([torch.tensor([-1] * n + row[n:]) for row, n, _ in rows], True, -1)
    pictures = torch.stack([picture for *_, picture in rows]) if as_patches else None
    return model(ids[:, :-1], targets[:, 1:], pictures=pictures)[1]


@torch.no_grad()
def write(model, ids, n, pictures=None):
    """The n likeliest tokens after ids (B, T) -> (B, n)."""
    T = ids.size(1)
    for _ in range(n):
        logits, _ = model(ids, pictures=pictures)
        ids = torch.cat((ids, logits[:, -1:].argmax(dim=-1)), dim=1)
    return ids[:, T:]
