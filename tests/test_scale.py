"""chapters/scale.py: what a step takes on a cluster, beside what was published."""

from itertools import product
from statistics import median

import pytest
import torch
from conftest import mistake, tiny

from chapters import scale
from chapters.cost import GPUS
from chapters.pipeline import bubble, one_f_one_b
from chapters.scale import (LINKS, MEGATRON, Layout, Shape, all_reduce_bytes, fast_layouts, held,
                            links_of, sent, state_bytes, step_time)

SMALL, LARGE = Shape(7e9, 32, 4096, 4096), Shape(405e9, 126, 16384, 8192)


def published(row, efficiency):
    """The TFLOP/s of each GPU: (by our formulas, as published)."""
    N, L, C, n, tp, pp, micro, chunks, batch, told = row
    layout = Layout(n // tp // pp, tp, pp, micro, chunks=chunks, recompute=True)
    seconds = step_time(Shape(1e9 * N, L, C, 2048), batch, layout, "A100",
                        efficiency=efficiency)["seconds"]
    flops = 96 * batch * 2048 * L * C**2 * (1 + 2048 / 6 / C + 51200 / 16 / L / C)  # as they count
    return flops / n / seconds / 1e12, told


def test_zero_leaves_on_each_gpu_what_its_paper_says():
    found = [state_bytes(7.5e9, 64, zero) / 1e9 for zero in range(4)]
    assert [round(x, 1) for x in found] == [120.0, 31.4, 16.6, 1.9]  # arXiv:1910.02054, figure 1


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_a_ring_sends_as_many_bytes_as_one_that_is_played_through(n):
    chunk, total = 10, 0
    for _ in range(2):              # the sums go round once, then the results
        for _ in range(n - 1):
            total += chunk
    assert all_reduce_bytes(n * chunk, n) == pytest.approx(total)


def test_one_gpu_reaches_its_efficiency_and_sends_nothing():
    assert set(sent(SMALL, 16, Layout()).values()) == {0}
    found = step_time(SMALL, 16, Layout(), efficiency=0.4)
    assert found["mfu"] == pytest.approx(0.4) and found["seconds"] == found["compute"]


@pytest.mark.parametrize("layout", [Layout(8, 1, 1, zero=3), Layout(4, 8, 2), Layout(2, 2, 16)])
def test_a_step_lasts_as_long_as_its_parts_and_no_mfu_is_above_the_efficiency(layout):
    found = step_time(SMALL, 64, layout, efficiency=0.5)
    parts = [found[name] for name in ("compute", "tp", "pp", "bubble", "dp")]
    assert found["seconds"] == pytest.approx(sum(parts)) and 0 < found["mfu"] <= 0.5


@pytest.mark.parametrize("p, m", [(2, 1), (2, 8), (4, 4), (8, 3)])
def test_the_bubble_is_that_of_the_schedule(p, m):
    found = step_time(SMALL, m, Layout(1, 1, p))
    share = found["bubble"] / (found["seconds"])
    assert share == pytest.approx(bubble(one_f_one_b(p, m)))


def test_the_formulas_find_the_published_runs_of_megatron_with_one_fitted_number():
    shares = [ours / told for ours, told in (published(row, 0.51) for row in MEGATRON)]
    assert 0.8 < min(shares) and max(shares) < 1.2 and abs(median(shares) - 1) < 0.02


def test_llama_3_loses_on_twice_the_gpus_what_the_bubble_says():
    layout = Layout(64, 8, 16, zero=2, chunks=8)  # arXiv:2407.21783, table 4: 430, then 400 TFLOP/s
    before, after = (step_time(LARGE, 2048, layout._replace(dp=dp))["mfu"] for dp in (64, 128))
    assert after / before == pytest.approx(400 / 430, abs=0.03)


def test_the_state_of_a_model_is_found_in_its_tensors():
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    N = model.n_parameters()
    assert scale.held_bytes(model, optimizer) == state_bytes(N, 1, 0, (4, 4, 8)) == 16 * N


def test_slower_links_cost_time_and_never_save_any():
    for layout in (Layout(16, 1, 1, zero=3), Layout(2, 8, 2), Layout(1, 2, 8)):
        fast, inside, between = (step_time(SMALL, 64, layout, links=links)["seconds"] for links in (
            LINKS["H100"], (1e9, 50e9), (450e9, 1e6)))
        assert fast <= inside and fast < between


def test_copies_in_one_machine_use_its_links_together():
    assert links_of(Layout(64, 1, 1), (450e9, 50e9))[0] == 400e9
    assert links_of(Layout(64, 8, 1), (450e9, 50e9))[0] == 50e9
    assert links_of(Layout(8, 1, 1), (450e9, 50e9))[0] == 450e9


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_layouts_are_all_that_fit_the_fastest_first(n):
    found = fast_layouts(SMALL, 64, n, room=0.5)
    times = [seconds for seconds, _ in found]
    assert times == sorted(times) and len(found) == len({layout for _, layout in found})
    whole = range(1, n + 1)
    right = {layout for dp, tp, pp in product(whole, repeat=3) for zero in range(4)
             if dp * tp * pp == n and tp <= 8 and 32 % pp == 64 % dp == 0 and (pp == 1 or zero < 2)
             and held(SMALL, layout := Layout(dp, tp, pp, zero=zero)) <= GPUS["H100"][2] / 2}
    assert {layout for _, layout in found} == right


def test_a_batch_that_cannot_be_divided_is_named():
    with pytest.raises(ValueError, match="batch of 12 sequences is no multiple of dp=8 times"):
        step_time(SMALL, 12, Layout(8))


def test_the_command_shows_the_fastest_layout_first(call):
    out, error = call(scale, "--parameters=7e9", "--n_layer=32", "--n_embd=4096", "--gpus=8")
    assert error == "" and out.splitlines()[1].split()[:3] == ["8", "1", "1"]


@pytest.mark.parametrize("words, code, said", [
    (["--gpus=2"], 1, "no layout of 2 H100 fits a batch of 1024 sequences and a state of"),
    (["--gpus=0"], 1, "gpus=0 must be at least 1"), (["--gpu=TPU"], 1, "TPU"),
    (["--model=7B"], 2, "--model")])
def test_a_mistake_is_one_line(words, code, said, monkeypatch, capsys):
    found, (*_, line) = mistake(scale.main, monkeypatch, capsys, *words)
    assert (found, said in line) == (code, True)
