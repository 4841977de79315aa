"""
Pictures and words in one model: it describes a picture of 8x8 pixels, or draws what is described.

    python -m chapters.pictures              # trains for seconds, then describes and draws

A picture enters as patches: squares of 2x2 grey pixels, each projected into the stream by a matrix,
as in LLaVA (arXiv:2304.08485). Or as tokens: each patch becomes one of 16 codes, dark or bright in
each pixel, beside the words in one vocabulary, so that the model can write them, too, as in DALL-E
(arXiv:2102.12092). No picture that is trained on shows some pairs of a shape and a place.
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import product, takewhile
from pathlib import Path
from random import Random

if __name__ == "__main__":  # `python chapters/pictures.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn.utils.rnn import pad_sequence

from chapters.rewards import is_held_out
from chapters.solve import learn, share
from model import GPT, GPTConfig, Linear, check_options, option
from tokenizer import parse_options, run_command

SIZE, PATCH, SHIFTS = 8, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]  # in pixels
N_PATCHES, N_CODES = (SIZE // PATCH) ** 2, 2 ** PATCH**2  # 16 and 16
NOISE = 0.25  # standard deviation of what is added to pixels of 0 and 1
SHAPES = {  # rows of 3 pixels
    "square": "### #.# ###", "cross": ".#. ### .#.", "block": "### ### ###",
    "saltire": "#.# .#. #.#", "corner": "#.. #.. ###", "bar": "... ### ..."}
PLACES = {"top left": (0, 0), "top right": (0, 4), "bottom left": (4, 0), "bottom right": (4, 4)}
UNSEEN = {("square", "bottom right"), ("cross", "top left"), ("block", "bottom left")}
VOCABULARY = [*range(N_CODES), "<picture>", "<words>", "<end>",
              *SHAPES, "top", "bottom", "left", "right"]
IDS = {word: id for id, word in enumerate(VOCABULARY)}

# -----------------------------------------------------------------------------
# Scenes, [(shape, place), (shape, place)] in the order of PLACES, and pictures of them.


def words(scene):
    """words([("bar", "top left"), ("cross", "top right")]) == "bar top left cross top right"."""
    return " ".join(f"{shape} {place}" for shape, place in scene)


def kind_of(scene):
    """What a scene is for: "train", or to test with, "new scene" of known pairs or "new pair"."""
    return ("new pair" if UNSEEN & {*scene} else
            "new scene" if is_held_out(words(scene)) else "train")


def scenes(n, seed=0, kind="train"):
    """n random scenes of a kind."""
    random, found = Random(seed), []
    while len(found) < n:
        places = sorted(random.sample([*PLACES], 2), key=[*PLACES].index)
        scene = [(random.choice([*SHAPES]), place) for place in places]
        found += [scene] * (kind_of(scene) == kind)
    return found


def draw(scene, offsets):
    """A picture (8, 8) of 0 and 1, each shape at its offset of 0 or 1 pixel down and right."""
    picture = torch.zeros(SIZE, SIZE)
    for (shape, place), (down, right) in zip(scene, offsets):
        top, left = PLACES[place][0] + down, PLACES[place][1] + right
        picture[top:top + 3, left:left + 3] = torch.tensor(
            [[float(pixel == "#") for pixel in row] for row in SHAPES[shape].split()])
    return picture


def all_pictures(scene):
    """The 16 pictures that a scene can look like, (16, 8, 8)."""
    return torch.stack([draw(scene, offsets) for offsets in product(SHIFTS, repeat=2)])


def photograph(scenes, seed=0, noise=NOISE):
    """A random picture of each scene, with noise: (n, 8, 8)."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    pictures = torch.stack([draw(scene, random.choices(SHIFTS, k=len(scene))) for scene in scenes])
    return pictures + noise * torch.randn(pictures.shape, generator=generator)


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
    """A GPT whose tokens are words and codes, and that can read patches in the place of codes."""

    def __init__(self, config):
        super().__init__(config)
        self.project = Linear(PATCH**2, config.n_embd)

    def forward(self, ids, targets=None, pictures=None):
        """As GPT's; pictures (B, 8, 8) are read instead of the 16 ids behind the first."""
        if pictures is None:
            return super().forward(ids, targets)
        embedded = self.transformer.wte(ids)
        seen = self.project(patches(pictures))                           # (B, 16, C)
        x = torch.cat((embedded[:, :1], seen, embedded[:, 1 + N_PATCHES:]), dim=1)
        x = self.transformer(ids, x=x)                                   # (B, T, C)
        return (self.lm_head(x), None) if targets is None else (None, self.mean_loss(x, targets))


def picture_prompt(picture):
    """The ids before the description of a picture (8, 8)."""
    return [IDS["<picture>"], *codes(patches(picture[None]))[0].tolist(), IDS["<words>"]]


def words_prompt(scene):
    """The ids before a picture of a scene."""
    return [IDS["<words>"], *(IDS[word] for word in words(scene).split()), IDS["<picture>"]]


def describing(scene, picture):
    """A row to learn from: (ids, how many are the prompt, the picture)."""
    prompt = picture_prompt(picture)
    return [*prompt, *words_prompt(scene)[1:-1], IDS["<end>"]], len(prompt), picture


def drawing(scene, picture):
    """The same with the description as the prompt."""
    prompt = words_prompt(scene)
    return prompt + picture_prompt(picture)[1:-1], len(prompt), picture


def row_loss(model, rows, as_patches=False):
    """The mean loss in nats on what follows the prompts of rows."""
    ids = pad_sequence([torch.tensor(row) for row, *_ in rows], True, 0)
    targets = pad_sequence([torch.tensor([-1] * n + row[n:]) for row, n, _ in rows], True, -1)
    pictures = torch.stack([picture for *_, picture in rows]) if as_patches else None
    return model(ids[:, :-1], targets[:, 1:], pictures=pictures)[1]


def train(as_patches, max_steps=250, seed=0, n=6000):
    """A model of 0.1M parameters that learned to describe pictures as patches, or else to describe
    pictures as tokens and to draw ones without noise."""
    own = scenes(n, seed)
    rows = [*map(describing, own, photograph(own, seed))]
    if not as_patches:
        rows += map(drawing, own, photograph(own, seed, noise=0.0))
    torch.manual_seed(seed)
    shape = dict(block_size=32, n_layer=2, n_head=4, n_embd=64)
    model = PictureGPT(GPTConfig(vocab_size=len(VOCABULARY), **shape))
    return learn(model, rows, partial(row_loss, as_patches=as_patches), max_steps, seed=seed)


# -----------------------------------------------------------------------------
# What a model makes of pictures and of words, and how often that is right.


@torch.no_grad()
def write(model, prompts, n, below=None, pictures=None):
    """The n likeliest tokens after prompts (B, T), of those with an id below a limit -> (B, n)."""
    ids = torch.tensor(prompts)
    for _ in range(n):
        logits, _ = model(ids, pictures=pictures)
        ids = torch.cat((ids, logits[:, -1:, :below].argmax(dim=-1)), dim=1)
    return ids[:, -n:]


def describe(model, pictures, as_patches=False):
    """What the model says of each picture (B, 8, 8), in texts such as words() gives."""
    said = write(model, [*map(picture_prompt, pictures)], 7,
                 pictures=pictures if as_patches else None)
    return [" ".join(str(VOCABULARY[id]) for id in takewhile(IDS["<end>"].__ne__, ids))
            for ids in said.tolist()]


def draw_described(model, scenes):
    """What the model draws of each scene, (B, 8, 8)."""
    return join(pixels(write(model, [*map(words_prompt, scenes)], N_PATCHES, below=N_CODES)))


def shows(picture, scene):
    """Whether a picture is, pixel by pixel, one of all_pictures() of the scene."""
    return (all_pictures(scene) == picture).flatten(1).all(dim=1).any().item()


def experiment(n=200, max_steps=250, seed=0):
    """{("patches" | "tokens" | "drawn", kind of scene): (share right, low, high)}: descriptions of
    what is read in either way, and drawings; one wrong word or pixel makes a whole one wrong."""
    found, by_patches = {}, train(True, max_steps, seed)
    by_tokens = train(False, 2 * max_steps, seed)  # it has twice as much to learn
    for kind in "new scene", "new pair":
        tests = scenes(n, seed + 1, kind)
        pictures, expected = photograph(tests, seed + 1), [*map(words, tests)]
        for name, model in ("patches", by_patches), ("tokens", by_tokens):
            said = describe(model, pictures, as_patches=name == "patches")
            found[name, kind] = share([*map(str.__eq__, said, expected)])
        found["drawn", kind] = share([*map(shows, draw_described(by_tokens, tests), tests)])
    return found


@dataclass(frozen=True)
class PicturesConfig:
    """How much is trained and tested."""
    n: int = option(200, "scenes of each kind to test with", low=2, below=10_001)
    max_steps: int = option(250, "of training, twice as many for the model that draws", low=1)
    seed: int = option(0, "of the models and the scenes")

    __post_init__ = check_options


def main():
    config = PicturesConfig(**parse_options(__doc__, PicturesConfig)[0])
    for (what, kind), row in experiment(config.n, config.max_steps, config.seed).items():
        print("{:8} {:9} {:6.1%} right ({:.1%} to {:.1%})".format(what, kind, *row))


if __name__ == "__main__":
    run_command(main)
