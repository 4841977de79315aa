"""Facts about chapters/pictures.py: pictures as patches and as tokens, described and drawn."""

import pytest
import torch
import torch.nn.functional as F
from conftest import mistake
from torch.testing import assert_close

from chapters import pictures
from chapters.pictures import (IDS, N_CODES, N_PATCHES, NOISE, PLACES, SHAPES, UNSEEN, VOCABULARY,
                               PictureGPT, all_pictures, codes, describe, describing,
                               draw_described, drawing, join, kind_of, patches, photograph, pixels,
                               row_loss, scenes, shows, words, write)
from model import GPTConfig


def untrained(seed=0):
    torch.manual_seed(seed)
    shape = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, zero_init=False)
    return PictureGPT(GPTConfig(vocab_size=len(VOCABULARY), **shape)).eval()


def test_the_example_in_the_docstring_is_true():
    assert words([("bar", "top left"), ("cross", "top right")]) == "bar top left cross top right"


# -----------------------------------------------------------------------------
# Scenes and pictures.


def test_scenes_of_each_kind_have_nothing_in_common_and_only_new_pairs_are_never_shown():
    made = {kind: scenes(300, 0, kind) for kind in ("train", "new scene", "new pair")}
    texts = [{*map(words, own)} for own in made.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    pairs = {kind: {pair for scene in own for pair in scene} for kind, own in made.items()}
    everything = {(shape, place) for shape in SHAPES for place in PLACES}
    assert pairs["train"] == everything - UNSEEN == pairs["new scene"] | pairs["train"]
    assert all(UNSEEN & {*scene} for scene in made["new pair"])
    assert all(kind_of(scene) == kind for kind, own in made.items() for scene in own)
    assert scenes(20, 1) == scenes(20, 1) != scenes(20, 2)


def test_the_shapes_of_a_scene_stand_in_their_quarters_and_nothing_else_does():
    for scene in scenes(40):
        for picture in all_pictures(scene):
            quarters = {place: picture[top:top + 4, left:left + 4]
                        for place, (top, left) in PLACES.items()}
            for shape, place in scene:
                rows = torch.tensor([[pixel == "#" for pixel in row] for row in
                                     SHAPES[shape].split()]).float()
                quarter = quarters.pop(place)
                assert any(torch.equal(quarter[i:i + 3, j:j + 3], rows)
                           for i in (0, 1) for j in (0, 1)) and quarter.sum() == rows.sum()
            assert not any(quarter.any() for quarter in quarters.values())


def test_no_picture_shows_two_scenes():
    seen = {}
    for scene in scenes(100) + scenes(100, kind="new pair"):
        for picture in all_pictures(scene):
            assert seen.setdefault(tuple(picture.flatten().tolist()), words(scene)) == words(scene)


def test_a_photograph_is_one_of_a_scenes_pictures_and_noise_of_the_size_that_is_said():
    own = scenes(100)
    clean, noisy = photograph(own, 1, 0.0), photograph(own, 1)
    assert all(map(shows, clean, own)) and not any(map(shows, noisy, own))
    assert (noisy - clean).std().item() == pytest.approx(NOISE, rel=0.02)
    assert len({tuple(x.flatten().tolist()) for x in photograph(own[:1] * 300, 2, 0.0)}) == 16


# -----------------------------------------------------------------------------
# Patches and codes.


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_patches_are_those_of_unfold_and_join_is_their_inverse(size):
    x = torch.randn(3, 8, 8)
    assert torch.equal(patches(x, size), F.unfold(x[:, None], size, stride=size).mT)
    assert torch.equal(join(patches(x, size)), x)


def test_patches_may_be_of_pictures_that_are_not_square():
    x = torch.randn(2, 4, 6)
    assert torch.equal(patches(x, 2), F.unfold(x[:, None], 2, stride=2).mT)
    assert torch.equal(join(patches(x, 2), width=6), x)


def test_a_code_and_a_patch_of_0_and_1_are_each_others_inverse():
    numbers = torch.arange(N_CODES)[None]
    assert torch.equal(codes(pixels(numbers)), numbers)
    clean = photograph(scenes(20), noise=0.0)
    assert torch.equal(join(pixels(codes(patches(clean)))), clean)
    assert codes(torch.tensor([[[0.6, 0.4, -3.0, 9.0]]])).tolist() == [[0b1001]]


# -----------------------------------------------------------------------------
# The model.


def test_rows_say_what_a_picture_shows_or_draw_what_is_said():
    for scene, picture in zip(own := scenes(20), photograph(own, noise=0.0)):
        ids, n, _ = describing(scene, picture)
        assert ids[0] == IDS["<picture>"] and ids[n - 1] == IDS["<words>"]
        assert " ".join(VOCABULARY[id] for id in ids[n:]) == f"{words(scene)} <end>"
        assert shows(join(pixels(torch.tensor([ids[1:n - 1]])))[0], scene)
        ids, n, _ = drawing(scene, picture)
        assert [VOCABULARY[id] for id in ids[:n]] == ["<words>", *words(scene).split(), "<picture>"]
        assert shows(join(pixels(torch.tensor([ids[n:]])))[0], scene)


def test_patches_projected_to_the_embeddings_of_codes_are_read_as_the_codes_are():
    model, own = untrained(), scenes(3)
    clean = photograph(own, noise=0.0)
    rows = [describing(*pair) for pair in zip(own, clean)]
    ids = torch.tensor([row for row, *_ in rows])
    with torch.no_grad():  # an embedding that is linear in the pixels
        model.transformer.wte.weight[:N_CODES] = model.project(pixels(torch.arange(N_CODES)))
        assert_close(model(ids, pictures=clean)[0], model(ids)[0])
        assert_close(row_loss(model, rows, as_patches=True), row_loss(model, rows))
        assert not torch.allclose(model(ids, pictures=clean + 1)[0], model(ids)[0])


def test_the_codes_of_a_picture_do_not_matter_to_a_model_that_reads_its_patches():
    model, own = untrained(), scenes(2)
    seen = photograph(own)
    ids = torch.tensor([describing(*pair)[0] for pair in zip(own, seen)])
    other = ids.clone()
    other[:, 1:1 + N_PATCHES] = 0
    assert torch.equal(model(ids, pictures=seen)[0], model(other, pictures=seen)[0])


def test_the_loss_is_that_of_what_follows_the_prompt():
    model, own = untrained(), scenes(4)
    rows = [*map(describing, own, photograph(own))] + [*map(drawing, own, photograph(own))]
    losses = []
    for ids, n, _ in rows:
        logprobs = model(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
        losses += [-logprobs[i - 1, ids[i]].item() for i in range(n, len(ids))]
    assert row_loss(model, rows).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_what_is_drawn_is_made_of_codes_alone_and_what_is_said_ends_before_its_end():
    model, own = untrained(), scenes(3)
    with torch.no_grad():  # whatever it reads, <end> is the likeliest, and of the codes 9
        model.transformer.final_norm.forward = lambda x: torch.ones_like(x)
        model.lm_head.weight.zero_()
        model.lm_head.weight[IDS["<end>"]], model.lm_head.weight[9] = 2.0, 1.0
    assert describe(model, photograph(own)) == describe(model, photograph(own), True) == [""] * 3
    assert write(model, [[1, 2], [3, 4]], 3).tolist() == [[IDS["<end>"]] * 3] * 2
    assert torch.equal(draw_described(model, own), join(pixels(torch.full((3, 16), 9))))


@pytest.mark.slow
def test_new_scenes_are_described_and_drawn_better_than_shapes_in_places_never_seen():
    found = pictures.experiment(n=80, max_steps=100)
    for what in "patches", "tokens", "drawn":
        assert found[what, "new scene"][0] > found[what, "new pair"][0]
    assert found["drawn", "new scene"][1] > 0.5 and found["tokens", "new scene"][1] > 0.3


def test_the_command_prints_what_the_experiment_finds(monkeypatch, call):
    asked = []
    monkeypatch.setattr(pictures, "experiment", lambda *words: (
        asked.append(words), {("drawn", "new pair"): (0.5, 0.25, 0.75)})[1])
    out, _ = call(pictures, "--n=9", "--max_steps=3", "--seed=7")
    assert asked == [(9, 3, 7)]
    assert out.split() == "drawn new pair 50.0% right (25.0% to 75.0%)".split()


@pytest.mark.parametrize("words, code, message", [
    (["--n=1"], 1, "n=1 must be at least 2"), (["--noise=3"], 2, "--noise")])
def test_a_mistake_is_one_line(monkeypatch, capsys, words, code, message):
    got, lines = mistake(pictures.main, monkeypatch, capsys, *words)
    assert got == code and len(lines) == 1 and message in lines[0]
