"""
A data card as a page: what went into a folder of shards or of curated texts, what each stage did to
it, examples of what it took away.

    python -m chapters.curate card shards/web        # writes shards/web/card.html

It shows what card.json says; the page is one file, without scripts, to send or to print.
"""

import base64
import html
import io
import re
from difflib import SequenceMatcher
from pathlib import Path

from chapters.figures import bars, panels, plt
from tokenizer import Parser, read_json, reading, replacing

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem; color: #222 } table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem;
  border-bottom: 1px solid #ddd }
td.n { text-align: right } pre { white-space: pre-wrap; margin: 0; font-size: .8rem }
del { background: #fde2e0; text-decoration: none }
ins { background: #dff2e1; text-decoration: none }
img { max-width: 100% } h2 { margin-top: 2.5rem }
li { font-size: .8rem; overflow-wrap: anywhere }"""


def cell(value):
    """A table's cell; a number stands to the right, with its thousands apart."""
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def table(head, rows):
    """An HTML table of values, which are escaped."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    lines += ["".join(map(cell, row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def picture(ax, words):
    """The figure of some axes as an <img> that carries its own bytes."""
    file = io.BytesIO()
    ax.figure.savefig(file, format="png", dpi=110)
    plt.close(ax.figure)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def funnel(stages):
    """How much each stage leaves, as bars: documents beside megabytes."""
    left, right = panels(2, size=(10, 0.8 + 0.3 * len(stages)), sharey=True)
    bars({stage["name"]: stage["documents"] for stage in stages}, "", "documents left", left,
         "{:,.0f}")
    bars({stage["name"]: stage["bytes"] / 1e6 for stage in stages}, "", "megabytes left", right,
         "{:,.2f}")
    right.invert_yaxis()  # both turn the axis that they share
    return picture(left, "what each stage leaves")


def marked(text, other, tag):
    """A text in <pre>, with a mark around the words that are not in the other one; a line end that
    is marked shows as an arrow."""
    words, others = (re.findall(r"\w+|\W", each) for each in (text, other))
    parts, at = [], 0
    for start, _, n in SequenceMatcher(None, words, others, False).get_matching_blocks():
        alone = html.escape("".join(words[at:start])).replace("\n", "\u21b5\n")
        parts.append(f"<{tag}>{alone}</{tag}>" if alone else "")
        parts.append(html.escape("".join(words[start:start + n])))
        at = start + n
    return f"<td><pre>{''.join(parts)}</pre></td>"


def examples(stage):
    """The examples of a stage, before beside after."""
    rows = [f"<tr>{cell(e['place'])}{cell(e['why'])}{marked(e['before'], e['after'], 'del')}"
            f"{marked(e['after'], e['before'], 'ins')}</tr>" for e in stage["examples"]]
    head = "<tr><th>where</th><th>why</th><th>before</th><th>after</th></tr>"
    return f"<h3>{html.escape(stage['name'])}</h3><table>{head}{''.join(rows)}</table>"


def curated_part(card):
    """The sections about what curate did."""
    stages = card["stages"]
    reasons = [(stage["name"], stage["documents"], stage["bytes"], stage["changed"],
                stage["dropped"], ", ".join(f"{n:,}\xa0{why}" for why, n in sorted(
                    stage["reasons"].items(), key=lambda pair: -pair[1]))) for stage in stages]
    yield "<h2>What each stage leaves</h2>"
    yield funnel(stages)
    yield table(["stage", "documents", "bytes", "changed", "dropped", "why"], reasons)
    yield "<h2>Examples of what each stage takes away</h2>"
    yield from (examples(stage) for stage in stages if stage["examples"])


def skipped_lines(source):
    """The list of what could not be read of a source: the first ten."""
    lines = [html.escape(line) for line in source["skipped"][:10]]
    n_more = source.get("n_skipped", len(source["skipped"])) - len(lines)
    lines += [f"and {n_more:,} more"] if n_more else []
    items = "".join(f"<li>{line}</li>\n" for line in lines)
    return f"<p>Skipped of {html.escape(source['name'])}:</p>\n<ul>{items}</ul>" if lines else ""


def cards_of(card):
    """Yield a card and the cards of its sources, and of their sources."""
    yield card
    for source in card.get("sources", ()):
        yield from cards_of(source.get("curated") or {})


def full_name(source):
    """The name of a source, and whether some of it was written by a program."""
    is_synthetic = any(card.get("synthetic") for card in cards_of(source.get("curated") or {}))
    return source["name"] + " (synthetic)" * is_synthetic


def page(card, name):
    """The card of a folder, a dict, as an HTML page."""
    sources = [(full_name(source), source.get("license") or card.get("license") or "not stated",
                source["files"], source.get("n_skipped", len(source["skipped"])))
               for source in card["sources"]]
    parts = [f"<h1>Data card: {html.escape(name)}</h1>",
             f"<p>Made on {html.escape(card.get('date') or 'an unknown day')}.</p>",
             "<h2>Sources</h2>", table(["source", "license", "files", "skipped"], sources),
             *map(skipped_lines, card["sources"])]
    if "train" in card:
        splits = [(split, *(card[split].get(what, "") for what in ("documents", "bytes", "tokens")))
                  for split in ("train", "val")]
        parts += ["<h2>Splits</h2>", f"<p>{html.escape(card['split'])}</p>",
                  table(["split", "documents", "bytes", "tokens"], splits),
                  "<h2>Lost on the way to shards</h2>", table(["what", "how many"], [
                      (what, n) for what, n in card["counts"].items()
                      if what not in ("documents", "bytes")])]
    for known in cards_of(card):
        parts += curated_part(known) if "stages" in known else []
    return ('<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Data card</title>'
            f"<style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n")


def write_page(folder):
    """Write FOLDER/card.html from FOLDER/card.json -> its path."""
    folder = Path(folder)
    with reading(folder / "card.json"):
        text = page(read_json(folder / "card.json"), folder.resolve().name)
    with replacing(folder / "card.html") as file:
        file.write(text.encode("utf-8", "replace"))
    return folder / "card.html"


def main(words):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with a card.json")
    for folder in parser.parse_args(words).folders:
        print(f"card: {write_page(folder)}")
