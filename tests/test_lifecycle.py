"""The life cycle at the end of chapter 17, and the list of leaves: what they name is there."""

import contextlib
import importlib
import io
import json
import re
import sys
from functools import lru_cache

import pytest
from conftest import ROOT

import chapters

TABLE = ROOT / "chapters/17_frontier.ipynb"
ROW = re.compile(r"^\| (?!row \||---)(.+?) \| (.+?) \|$", re.M)
SECTION = re.compile(r'chapter (\w+) "([^"]+)"(?:: (.+))?')
CODE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:python -m (chapters\.\w+)|(\w+)\.py)((?: \S+)*)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def sections_of(path):
    """{heading: the text up to the next heading of its level or above} of a notebook, of its title
    only up to the next heading; and "#": its number."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = FENCED.sub("", "\n\n".join(prose))
    heads = [*re.finditer(r"^(#+) (.+)$", text, re.M)]
    ends = [next((b.start() for b in heads[i + 1:] if len(b[1]) <= max(2, len(a[1]))), len(text))
            for i, a in enumerate(heads)]
    return {"#": heads[0][2].split()[0]} | {
        head[2]: text[head.end():end] for head, end in zip(heads, ends)}


@lru_cache
def sections():
    """{number of a chapter: {heading: text}}"""
    found = map(sections_of, sorted((ROOT / "chapters").glob("*.ipynb")))
    return {chapter.pop("#"): chapter for chapter in found}


@lru_cache
def help_of(name):
    """{option: what --help says of it} of a command, and "": all that --help says."""
    module, shown = importlib.import_module(name), io.StringIO()
    typed, sys.argv = sys.argv, [name, "--help"]
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = typed
    options = re.split(r"^  (--\w+)", shown.getvalue(), flags=re.M)
    return {"": shown.getvalue()} | dict(zip(options[1::2], options[2::2]))


def said(word, text):
    spaced = r"\s+".join(map(re.escape, word.split()))
    return re.search(rf"(?<!\w){spaced}(?!\w)", text, re.I)


def wrong_name(name):
    """What is missing of module.name, or of module.TABLE["row"]: "" where it is there."""
    dotted, _, row = name.rstrip('"]').partition('["')
    module, *attributes = re.findall(r"^chapters\.\w+|\w+", dotted)
    try:
        found = importlib.import_module(module)
        for attribute in attributes:
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return f"there is no {dotted}"
    return f"{dotted} has no {row}" if row and row not in found else ""


def wrong_command(name, words):
    """What the help of a command does not know of these words: "" where it knows all."""
    if wrong := wrong_name(f"{name}.main"):
        return wrong
    known = help_of(name)
    for word in words:
        option, _, value = word.partition("=")
        if option[:2] != "--":
            if not (word.isupper() or said(word, known[""])):
                return f"{name} has no {word}"
        elif option not in known:
            return f"{name} has no option {option}"
        elif [v for v in re.split("[,:]", value)
              if v and not v.isdigit() and not said(v, known[option])]:
            return f"{name} {option} has no {value}"
    return ""


def wrong_place(place):
    """What is wrong with one place of the table: "" for nothing."""
    if section := SECTION.fullmatch(place):
        number, title, words = section.groups()
        text = sections().get(number, {}).get(title)
        if text is None:
            return f"chapter {number} has no section {title}"
        lost = [word for word in (words or "").split(", ") if word and not said(word, text)]
        return f"{number} {title} does not say {', '.join(lost)}" if lost else ""
    if not (code := CODE.fullmatch(place)):
        return f"{place} is no place"
    if command := COMMAND.fullmatch(code[1]):
        return wrong_command(command[1] or command[2], command[3].split())
    return wrong_name(code[1])


def wrong_row(places):
    """What is wrong with the places of a row: each is there, and prose alone says the words."""
    if places.startswith("missing: "):
        return "" if len(places) > 40 else "missing, for no reason"
    places = places.split(" · ")
    read = [found for found in map(SECTION.fullmatch, places) if found]
    if not read:
        return "no chapter explains it"
    if len(read) == len(places) and not all(found[3] for found in read):
        return "only prose, and not a word to look for"
    return "; ".join(filter(None, map(wrong_place, places)))


def rows_of(text):
    return ROW.findall(text)


def kind(place):
    """What a place is: a function (or class, or table), an option, a command, a section."""
    command = COMMAND.fullmatch(place.strip("`"))
    if SECTION.fullmatch(place) or place.startswith("missing"):
        return place.split()[0].replace("chapter", "section").rstrip(":")
    return "function" if not command else "option" if "--" in command[3] else "command"


@pytest.fixture(scope="module")
def table():
    for package in "fastapi", "prometheus_client", "grpc":
        pytest.importorskip(package, reason=f"the table names a server, which needs {package}")
    text = sections_of(TABLE)["The life cycle, row by row"]
    return rows_of(text)


def test_every_row_of_the_life_cycle_has_a_place_and_each_place_is_there(table):
    assert len(table) == len(dict(table)) == 180
    assert [f"{row}: {wrong}" for row, places in table if (wrong := wrong_row(places))] == []


@pytest.mark.parametrize("places, wrong", [
    ('`model.Attention` · chapter 4 "Heads"', ""),
    ('`model.Atention` · chapter 4 "Heads"', "there is no model.Atention"),
    ('`modle.Attention` · chapter 4 "Heads"', "there is no modle.Attention"),
    ('`model.Attention.forward` · chapter 4 "Heads"', ""),
    ('`model.Attention.split` · chapter 4 "Heads"', "there is no model.Attention.split"),
    ('`model.ARCHITECTURES["bert"]` · chapter 4 "Heads"', ""),
    ('`model.ARCHITECTURES["brt"]` · chapter 4 "Heads"', "model.ARCHITECTURES has no brt"),
    ('`train.py --grad_clip` · chapter 4 "Heads"', ""),
    ('`train.py --grad_clp` · chapter 4 "Heads"', "train has no option --grad_clp"),
    ('`train.py --parallel=fsdp` · chapter 4 "Heads"', ""),
    ('`train.py --parallel=ring` · chapter 4 "Heads"', "train --parallel has no ring"),
    ('`python -m chapters.align dpo RUN` · chapter 4 "Heads"', ""),
    ('`python -m chapters.align dpu RUN` · chapter 4 "Heads"', "chapters.align has no dpu"),
    ('`python -m chapters.aline` · chapter 4 "Heads"', "there is no chapters.aline.main"),
    ('`python -m chapters.cleaning` · chapter 4 "Heads"', "there is no chapters.cleaning.main"),
    ('`model.Attention`', "no chapter explains it"),
    ('chapter 4 "Heads"', "only prose, and not a word to look for"),
    ('chapter 4 "Heads": Multi-Head attention', ""),
    ('chapter 4 "Heads": multi-head, DeepSpeed', "4 Heads does not say DeepSpeed"),
    ('chapter 9 "Heads": heads', "chapter 9 has no section Heads"),
    ('chapter 4 "Head": heads', "chapter 4 has no section Head"),
    ('model.Attention · chapter 4 "Heads"', "model.Attention is no place"),
    ("missing: no time", "missing, for no reason"),
    ("missing: no program can tell what is true of a text that it reads", "")])
def test_a_place_that_is_not_there_is_found(places, wrong):
    assert wrong_row(places) == wrong


def test_the_list_of_leaves_names_each_of_them_once():
    names = " ".join(re.findall(r"^    .{20} (.+)$", chapters.__doc__, re.M)).split()
    assert sorted(names) == sorted(path.stem for path in (ROOT / "chapters").glob("[!_]*.py"))
