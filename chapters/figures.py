"""
What the chapters draw with: one style for curves, bars and maps, and diagrams of boxes and arrows.

    from chapters.figures import BLUE, ORANGE, bars, diagram, grids, heat, lines, panels
"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, NullFormatter

BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = (
    "#4477aa", "#cc6633", "#44aa88", "#aa4477", "#ccbb44", "#999999")
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY]
TITLE = dict(fontsize=11, weight="bold")
LINE = 0.185  # inches that a line of text is high

# -----------------------------------------------------------------------------
# Charts: the title says what there is to see, the axes carry their units.


def panels(n=1, title="", size=None, **options):
    """One axes, or n side by side under a common title; options go to plt.subplots."""
    size = size or ((7, 3.3) if n == 1 else (min(10, 3.6 * n), 3.3))
    figure, axes = plt.subplots(1, n, figsize=size, dpi=100, layout="constrained", **options)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    if title:
        (axes.set_title if n == 1 else figure.suptitle)(title, **TITLE)
    return axes


def plain_ticks(ax, log):
    """Numbers as one reads them, 0.04 and not 4 x 10^-2, on the logarithmic axes named in log."""
    for name in log:
        axis = ax.xaxis if name == "x" else ax.yaxis
        getattr(ax, f"set_{name}scale")("log")
        axis.set_major_formatter(FuncFormatter(lambda tick, _: (
            f"{tick:g}" if 1e-4 <= tick < 1e5 else f"$10^{{{len(f'{tick:.0f}') - 1}}}$"
            if tick >= 1 else f"{tick:.0e}")))
        axis.set_minor_formatter(NullFormatter())


def finish(ax, title, **options):
    """Set the title, if one is given, and options such as xlabel and ylim."""
    if title:
        ax.set_title(title, **TITLE)
    ax.set(**options)


def lines(curves, title="", xlabel="", ylabel="", ax=None, log="", style="-", **options):
    """
    Curves {label: (x, y)} or {label: y} on one axes, which is returned; labels stand in a legend.
    log: "x", "y" or "xy" for logarithmic axes. options go to ax.set (ylim=..., xticks=...).
    """
    ax = panels() if ax is None else ax
    for (label, points), colour in zip(curves.items(), COLOURS * len(curves)):
        x, y = points if isinstance(points, tuple) else (range(1, len(points) + 1), points)
        ax.plot(x, y, style, color=colour, label=label, markersize=4)
    plain_ticks(ax, log)
    finish(ax, title, xlabel=xlabel, ylabel=ylabel, **options)
    if [*curves] != [""]:
        ax.legend(fontsize=9, frameon=False)
    return ax


def bars(values, title="", xlabel="", ax=None, form="{:.3g}", errors=None, **options):
    """Horizontal bars {label: value}, each with its number at its end; errors: half widths."""
    ax = panels(size=(7, 0.6 + 0.33 * max(3, len(values)))) if ax is None else ax
    ax.barh([*values], [*values.values()], color=BLUE, height=0.65,
            xerr=errors, error_kw=dict(ecolor="#333333", capsize=3))
    for i, value in enumerate(values.values()):
        end = value + (errors[i] if errors is not None else 0)
        ax.text(end, i, " " + form.format(value), va="center", fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    finish(ax, title, xlabel=xlabel, **options)
    return ax


def heat(matrix, rows=None, columns=None, title="", ax=None, numbers="", outline=(), bar="",
         **options):
    """
    A matrix (n, m) as a map. rows, columns: the labels; numbers: a format such as "{:.2f}" writes
    each value into its cell; outline: cells (row, column) that get a frame; bar: label of a colour
    bar; options (cmap, vmin, vmax) go to imshow.
    """
    n, m = matrix.shape
    ax = panels(size=(1.5 + 0.45 * m, 1 + 0.4 * n)) if ax is None else ax
    image = ax.imshow(matrix, **dict(cmap="Blues", aspect="auto") | options)
    for axis, labels in ((ax.yaxis, rows), (ax.xaxis, columns)):
        if labels is not None:
            axis.set_ticks(range(len(labels)), labels)
    if columns is not None and max(map(len, map(str, columns))) > 2:
        ax.tick_params(axis="x", rotation=60)
    for i in range(n * m if numbers else 0):
        value = float(matrix[i // m, i % m])
        dark = sum(image.cmap(image.norm(value))[:3]) < 1.6
        ax.text(i % m, i // m, numbers.format(value), ha="center", va="center", fontsize=9,
                color="white" if dark else "black")
    for row, column in outline:
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=ORANGE, lw=2))
    if bar:
        ax.figure.colorbar(image, ax=ax, label=bar)
    ax.spines[:].set_visible(False)
    finish(ax, title)
    return ax


# -----------------------------------------------------------------------------
# Diagrams. One unit is one inch; y grows downward, as on a page.


def canvas(left, right, top, bottom, title):
    """An empty axes of these inches, with room for a title."""
    height = bottom - top + (0.35 if title else 0)
    figure, ax = plt.subplots(figsize=(right - left, height), dpi=100)
    figure.subplots_adjust(0, 0, 1, (bottom - top) / height)
    finish(ax, title, xlim=(left, right), ylim=(bottom, top))
    ax.axis("off")
    return ax


def text_width(text):
    """Inches that the widest line of a text takes."""
    rows = [row for row in text.split("\n") if row.strip()]
    return max([TextPath((0, 0), row, size=10).get_extents().width / 72 for row in rows], default=0)


def box_size(text):
    """Inches (width, height) that a box around this text takes."""
    return text_width(text) + 0.3, LINE * (text.count("\n") + 1) + 0.18


def diagram(boxes, arrows=(), title=""):
    """
    Boxes joined by arrows. boxes: {name: (x, y, text)} or (x, y, text, colour), x and y the middle
    in inches; a colour of None writes the text without a box. arrows: (from, to), with a label and
    a bend (0.3 bends to one side, -0.3 to the other) if wanted.
    Returns the axes. Raises ValueError if two boxes overlap or an arrow names no box.
    """
    found = {}
    for name, (x, y, text, *_) in boxes.items():
        width, height = box_size(text)
        found[name] = (x - width / 2, x + width / 2, y - height / 2, y + height / 2)
        for other, (left, right, top, bottom) in [*found.items()][:-1]:
            if (found[name][0] < right and left < found[name][1]
                    and found[name][2] < bottom and top < found[name][3]):
                raise ValueError(f"the boxes {other} and {name} overlap: move one of them")
    left, _, top, _ = map(min, zip(*found.values()))
    _, right, _, bottom = map(max, zip(*found.values()))
    ax, patches = canvas(left - 0.1, right + 0.1, top - 0.1, bottom + 0.1, title), {}
    for name, (x, y, text, *colour) in boxes.items():
        colour, (x0, x1, y0, y1) = (colour or [BLUE])[0], found[name]
        patches[name] = ax.add_patch(FancyBboxPatch(
            (x0 + 0.06, y0 + 0.06), x1 - x0 - 0.12, y1 - y0 - 0.12, ec=colour or "none",
            boxstyle="round,pad=0.06", fc=(colour, 0.13) if colour else "none", lw=1.3))
        ax.text(x, y, text, ha="center", va="center", linespacing=1.15)
    for start, end, label, bend in ((*arrow, *("", 0)[len(arrow) - 2:]) for arrow in arrows):
        if not {start, end} <= {*boxes}:
            raise ValueError(f"the arrow {start} -> {end} needs two of: {', '.join(boxes)}")
        (a, b), (c, d) = boxes[start][:2], boxes[end][:2]
        ax.annotate("", (c, d), (a, b), arrowprops=dict(
            arrowstyle="-|>", color="#555555", lw=1.2, patchA=patches[start], patchB=patches[end],
            shrinkA=1, shrinkB=1, connectionstyle=f"arc3,rad={bend}"))
        x, y = (a + c) / 2 + bend * (b - d) / 2, (b + d) / 2 + bend * (c - a) / 2
        ax.text(x, y, label, ha="center", va="center", fontsize=9, color="#333333",
                bbox=dict(fc="white", ec="none", pad=1) if label else None)
    return ax


def grids(parts, title="", cell=0.3):
    """
    Matrices drawn to scale, side by side: pictures of a product, a sum, a mask. parts: from left
    to right, a string such as "@" or "=", or (name, matrix) or (name, matrix, colour); a matrix is
    a nested list whose cells are numbers or text; "" is an empty cell, None is left out.
    """
    height = max(len(part[1]) for part in parts if not isinstance(part, str)) * cell
    widths = [0.35 if isinstance(part, str) else
              max(len(part[1][0]) * cell, 1.15 * text_width(part[0])) + 0.2 for part in parts]
    ax = canvas(0, sum(widths), -0.35, height + 0.1, title)
    x = 0
    for part, width in zip(parts, widths):
        if isinstance(part, str):
            ax.text(x + width / 2, height / 2, part, ha="center", va="center", fontsize=13)
        else:
            name, matrix, colour = (*part, BLUE)[:3]
            left, top = x + (width - len(matrix[0]) * cell) / 2, (height - len(matrix) * cell) / 2
            ax.text(x + width / 2, top - 0.12, name, ha="center", va="center", weight="bold")
            for i, row in enumerate(matrix):
                for j, value in enumerate(row):
                    if value is not None:
                        corner = left + j * cell, top + i * cell
                        ax.add_patch(Rectangle(corner, cell, cell, fc=(colour, 0.13), ec=colour))
                        ax.text(corner[0] + cell / 2, corner[1] + cell / 2, value, ha="center",
                                va="center", fontsize=9)
        x += width
    return ax
