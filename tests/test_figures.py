"""chapters/figures.py: what it draws can be read."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from chapters.figures import bars, box_size, diagram, grids, heat, lines, panels


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def extent(part, ax):
    return part.get_window_extent(ax.figure.canvas.get_renderer())


@pytest.mark.parametrize("text", ["x", "logits (B, T, V)", "two\nlines of text", "WWWWWWWWWW"])
def test_a_text_stands_inside_its_box_and_the_box_inside_the_picture(text):
    ax = diagram({"a": (0, 0, text), "b": (4, 1, "b")}, [("a", "b", "label", 0.3)], "title")
    box, words = extent(ax.patches[0], ax), extent(ax.texts[0], ax)
    assert box.x0 <= words.x0 and words.x1 <= box.x1 and box.y0 <= words.y0 and words.y1 <= box.y1
    assert ax.figure.bbox.x0 <= box.x0 and box.y1 <= ax.figure.bbox.y1


def test_boxes_that_overlap_and_arrows_to_nowhere_are_refused():
    with pytest.raises(ValueError, match="the boxes a and b overlap"):
        diagram({"a": (0, 0, "one"), "b": (0.2, 0.1, "two")})
    with pytest.raises(ValueError, match="the arrow a -> c needs two of: a, b"):
        diagram({"a": (0, 0, "one"), "b": (3, 0, "two")}, [("a", "c")])
    width, height = box_size("one")
    diagram({"a": (0, 0, "one"), "b": (width, 0, "one"), "c": (0, height, "one")})  # side by side


def test_logarithmic_axes_carry_numbers_as_one_writes_them():
    ax = lines({"loss": ([1, 10, 100], [4, 0.4, 0.04])}, "falls", "step", "nats", log="xy")
    ax.figure.canvas.draw()
    shown = [label.get_text() for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels()]
    assert {"1", "10", "100", "0.1"} <= {*shown} and not [text for text in shown if "times" in text]


def test_a_bar_carries_its_number_a_map_its_values_and_a_grid_its_cells():
    assert [text.get_text().strip() for text in bars({"a": 1, "b": 2.5}).texts] == ["1", "2.5"]
    ax = heat(np.eye(2), "ab", "cd", numbers="{:.0f}", outline=[(0, 1)], bar="weight")
    assert [text.get_text() for text in ax.texts] == ["1", "0", "0", "1"]
    ax = grids([("A", [[1, 2]]), "@", ("B", [[3], [4]]), "=", ("C", [["", None]])])
    assert [text.get_text() for text in ax.texts] == [*"A12@B34=C", ""]


def test_panels_share_a_title_and_the_settings_of_others_stay():
    before = dict(plt.rcParams)
    assert len(panels(3, "three")) == 3 and panels(title="one").get_title() == "one"
    assert dict(plt.rcParams) == before
