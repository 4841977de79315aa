"""
Dumps of MediaWiki to plain text: the articles of an XML export, without their markup.

read_xml(file) takes a dump (dumps.wikimedia.org, *-pages-articles.xml) as an open binary file and
yields a str for each article: the title, an empty line, the text. One page is in memory at a time.
The markup is described in mediawiki.org/wiki/Help:Formatting, how it nests in
mediawiki.org/wiki/Preprocessor_ABNF. To expand templates one needs the whole wiki: they are left
out, except for a few that only format the words in them. Every step takes linear time.
"""

import html
import re
from itertools import chain
from xml.etree import ElementTree

BLOCK_BYTES = 1 << 20  # read at a time
PAGE_BYTES = 1 << 23  # most of XML in a page: Wikipedia allows 2 MB of text, with "&lt;" for "<"
NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^<>]*>([^<>]*)</namespace>')
# Namespaces whose links show no text: {key: English name}.
UNSEEN = {"-2": "media", "6": "file", "14": "category"}

# Elements that are dropped with their content, and those whose content is text without markup.
DROPPED = """ref references gallery timeline score graph hiero imagemap mapframe maplink inputbox
             templatestyles templatedata categorytree""".split()
LITERAL = "nowiki pre syntaxhighlight source math chem".split()
TEX = "math", "chem"
ELEMENT = re.compile(rf"(?i)<!--|<({'|'.join(DROPPED + LITERAL)})(?=[\s/>])[^<>]*+>")
TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*+)[^<>]*+>")
BREAKS = "br p div li tr blockquote".split()  # tags at which a line ends

# Templates that show some of their arguments; any other is dropped.
SHOWN = {"lang": slice(1, 2), "langx": slice(1, 2), "transl": slice(1, None), "nowrap": slice(1),
         "nobr": slice(1), "small": slice(1), "abbr": slice(1), "convert": slice(2),
         "cvt": slice(2)}
INLINE_LENGTH = 1000  # characters of a link, or of a template that shows something, at most

# What nests: {closing mark: opening mark}. Those of a table stand at the start of a line.
OPENINGS = {"}}": "{{", "]]": "[[", "|}": "{|"}
MARK = re.compile(r"\{\{|\}\}|\[\[|\]\](?!\](?!\]))|(?m:^[ \t:]*+\{\||^[ \t]*+\|\}(?!\}))")
LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]{2,10})?")  # the prefix of a link to another Wikipedia
EXTERNAL_LINK = re.compile(r"\[(?:(?:https?|ftp):|mailto:|(?=//))[^\s\[\]<>]*+[ \t]*+"
                           r"([^\[\]\n]*+)\]")

# Private-use characters hide literal markup from later steps, and mark where a template stood.
HIDE = {ord(char): 0xF0000 + ord(char) for char in "{}[]|'<>=*#:;_-( \t\n"}
SHOW = {hidden: char for char, hidden in HIDE.items()}
HIDDEN = re.compile("[\U000f0000-\U000f007f]+")
GONE = "\U000f00ff"
EMPTIED = re.compile(rf"( ?\()([\s,;{GONE}]++)(\)?)")

# -----------------------------------------------------------------------------
# From wikitext to plain text, step by step.


def resolve_elements(text):
    """Drop comments and DROPPED elements, hide the markup in LITERAL ones, put TeX between $ signs:
    resolve_elements("a<ref>b</ref><math>c</math>") == "a$c$"."""
    parts, at, unclosed = [], 0, set()
    while opening := ELEMENT.search(text, at):
        parts.append(text[at:opening.start()])
        name, at = (opening[1] or "").lower(), opening.end()
        if name in unclosed or opening[0].endswith("/>"):
            continue
        closing = re.compile(rf"(?i)</{name}\s*+>" if name else "-->").search(text, at)
        if not closing:
            unclosed.add(name)  # not searched for again: thousands of them take linear time
            continue
        if name in LITERAL:
            dollar = "$" * (name in TEX)
            literal = text[at:closing.start()].strip()
            parts.append((dollar + literal + dollar).translate(HIDE))
        at = closing.end()
    return "".join([*parts, text[at:]])


def shown_template(inside):
    """What a template shows of its arguments: shown_template("convert|5|km|mi") == "5 km"."""
    name, *arguments = map(str.strip, inside.split("|"))
    name, hyphen, language = name.lower().partition("-")
    arguments = [language] * bool(hyphen) + [part for part in arguments if "=" not in part]
    return " ".join(arguments[SHOWN.get(name, slice(0))])  # {{lang-fr|mot}} is {{lang|fr|mot}}


def shown_link(inside, unseen):
    """What a link shows: shown_link("dog|dogs", ()) == "dogs"; "" if its prefix is in `unseen`, or
    leads to the same article in another language."""
    target, bar, label = inside.partition("|")
    prefix, colon, _ = target.partition(":")
    if colon and (prefix.strip().lower() in unseen or not bar and LANGUAGE.fullmatch(prefix)):
        return ""
    return label.strip() if bar else target.strip().removeprefix(":").replace("_", " ")


def resolve_nested(text, unseen):
    """Replace each link by what it shows, drop templates and tables, the innermost first. A mark
    without its partner stays text, as in MediaWiki."""
    out, stack, at = [], [], 0  # the stack: (opening mark, its position in `out`)
    n_open = dict.fromkeys(OPENINGS.values(), 0)
    for mark in MARK.finditer(text):
        kind, start, piece = mark[0][-2:], len(out) + 1, mark[0]
        out.append(text[at:mark.start()])
        at = mark.end()
        if opening := OPENINGS.get(kind):
            # "}}" and "|}" also close what was opened after their partner; "]]" does not.
            if n_open[opening] and (kind != "]]" or stack[-1][0] == "[["):
                kind = None
                while kind != opening:
                    kind, start = stack.pop()
                    n_open[kind] -= 1
                inside, piece = out[start + 1:], GONE
                del out[start:]
                if kind != "{|" and sum(map(len, inside)) <= INLINE_LENGTH:
                    inside = "".join(inside)
                    piece = shown_link(inside, unseen) if kind == "[[" else shown_template(inside)
                    piece = piece or GONE
        else:
            stack.append((kind, start))
            n_open[kind] += 1
        out.append(piece)
    return "".join([*out, text[at:]])


def resolve_lines(text):
    """Remove the marks of headings and list items, headings without text below them, and lines of
    tables that were never closed. resolve_lines("== A ==\\n=== B ===\\n*c")
    == "A\\n\\nB\\n\\n- c"."""
    lines, waiting = [], []  # waiting: (level, heading) of headings without text so far
    for line in map(str.strip, text.split("\n")):
        content = line.lstrip("*#:;")
        if len(line) > 2 and line[0] == line[-1] == "=":
            level = len(line) - len(line.lstrip("="))
            waiting = [heading for heading in waiting if heading[0] < level][:6]
            waiting.append((level, line.strip("=").strip()))
        elif not line:
            lines.append("")
        elif not line.startswith(("|", "{|", "----")) and content:
            lines += [part for _, heading in waiting for part in ("", heading, "")]
            waiting = []
            lines.append("- " * (line[0] in "*#") + content.strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def wikitext_to_text(text, unseen=("image", *UNSEEN.values())):
    """The plain text of a page in MediaWiki's markup; links with a prefix in `unseen` show nothing.
    wikitext_to_text("'''Dogs''' [[bark|barked]].{{citation needed}}") == "Dogs barked."."""
    text = resolve_nested(resolve_elements(text), unseen)
    text = EXTERNAL_LINK.sub(r"\1", text)
    text = TAG.sub(lambda tag: "\n" * (tag[1].lower() in BREAKS), text)
    text = re.sub("'{2,}|__[A-Z]{3,30}__", "", text)
    text = EMPTIED.sub(lambda found: found[0] if GONE not in found[2] else  # "(; born 1950)"
                       "" if found[3] else found[1], text)
    text = text.replace(f" {GONE}", "").replace(GONE, "")
    text = html.unescape(resolve_lines(text))
    return HIDDEN.sub(lambda hidden: hidden[0].translate(SHOW), text)


# -----------------------------------------------------------------------------
# From a dump to its articles.


def split_pages(blocks):
    """Yield the bytes of each <page> of a dump, a ValueError for one that is too long or cut off.
    A dump writes "<" in a text as "&lt;", so "</page>" can only be the end of a page."""
    rest = b""
    for block in blocks:
        *pages, rest = (rest + block).split(b"</page>")
        for page in pages:
            _, opening, page = page.partition(b"<page>")
            if opening:  # without it, this is the end of a page that was too long
                yield opening + page + b"</page>"
        if len(rest) > PAGE_BYTES:
            if b"<page>" in rest:
                yield ValueError(f"more than {PAGE_BYTES:,} bytes of XML")
            rest = rest[-len("</page"):]
    if b"<page>" in rest:
        yield ValueError("cut off: the file ends in it")


def article(page, unseen):
    """The title and the text, of the last revision, of a <page>; "" for a redirect and for a page
    that is no article or not wikitext. ValueError for broken XML."""
    try:
        page = ElementTree.fromstring(page)  # a page alone has no DTD, so no entities to expand
    except ElementTree.ParseError as error:
        raise ValueError(f"broken XML ({error})") from None
    text = [revision.findtext("text") or "" for revision in page.iter("revision")][-1:]
    if (page.find("redirect") is not None or page.findtext("ns", "0") != "0" or not text
            or page.findtext("revision/model", "wikitext") != "wikitext"
            or text[0].lstrip()[:9].lower() == "#redirect"):
        return ""
    text = wikitext_to_text(text[0], unseen)
    return text and f"{page.findtext('title', '')}\n\n{text}".lstrip()


def read_xml(file):
    """Yield the articles of a dump of MediaWiki, a ValueError for a broken page, with its number,
    and one for other XML. The first lines of a dump name the namespaces in the wiki's language."""
    blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
    first = next(blocks, b"")
    if b"<mediawiki" not in first:
        yield ValueError("not a dump of MediaWiki, which is the only XML that is read")
        return
    unseen = {"image", *UNSEEN.values()}
    for key, name in NAMESPACE.findall(first.decode("utf-8", "replace")):
        unseen |= {name.lower()} if key in UNSEEN else set()
    for number, page in enumerate(split_pages(chain([first], blocks)), 1):
        try:
            if isinstance(page, ValueError):
                raise page
            if text := article(page, unseen):
                yield text
        except ValueError as error:
            yield ValueError(f"page {number:,}: {error}")
