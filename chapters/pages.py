"""
A web page's bytes become its main text, or all of its visible text.

    from chapters.pages import html_to_text, visible_text

The tags divide a page into blocks: paragraphs, headings, list items, table rows. A block is dropped
if an element around it is marked as not being the main text (<nav>, class="sidebar"), or if most of
its characters are links; short runs of blocks between dropped ones are dropped, too. Link density
and length are boilerpipe's features (Kohlschütter, Fankhauser and Nejdl, WSDM 2010); to judge short
blocks by their neighbors is jusText's idea (Pomikálek, 2011). Any page takes linear time.
"""

import codecs
import contextlib
import html
import re
from collections import Counter, namedtuple
from functools import lru_cache
from itertools import groupby

from data import DECLARED, decode

# Charsets that are declared, and the larger ones that browsers use in their place.
SUPERSETS = {"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030",
             "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}


def decode_web(raw, declared=None):
    """The text of bytes from the web or a mail: data.decode with the charset that is `declared`, by
    a server, say, or else in the bytes, read as browsers read it. ValueError for a binary file."""
    found, charset = DECLARED.search(raw[:1024]), None
    for name in declared, found and found[1].decode():
        with contextlib.suppress(LookupError, ValueError):  # of names that are no charset
            charset = charset or name and codecs.lookup(name.strip(" \"'")).name
    return decode(raw, SUPERSETS.get(charset, charset)).removeprefix("\ufeff")


# -----------------------------------------------------------------------------
# Blocks: a page as a list of short texts, and what is known about each.

HIDDEN = re.compile(r"(?is)<!--.*?(?:-->|\Z)|<(script|style|template)\b"
                    r"(?:[^<>]*/>|.*?(?:</\1\s*>|\Z))")
# It also matches a tag without its ">", which is text ("if a <b or c"): otherwise its characters
# would be searched for a ">" again and again. The last group tells the two apart.
TAG = re.compile(r"""<(/?)([a-zA-Z!?][^\s/<>]*)((?:[^<>=]|=\s*(?:"[^"]*"|'[^']*')?+)*+)(>?)""")
INLINE = {*"a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark q "
          "ruby s samp small span strike strong sub sup time tt u var wbr".split()}

# An element is not main text by its tag, or by a word in its class, id, role or style.
BESIDE = {*"aside button dialog footer form iframe nav noscript select svg textarea title".split()}
BESIDE_WORDS = re.compile(
    r"(?<![a-z])(?:nav|menu|breadcrumb|side-?bar|masthead|top-?bar|toolbar|banner|cookie|consent|"
    r"gdpr|privacy|shar(?:e|ing)|social|related|recommend|suggest|trending|popular|newsletter|"
    r"subscri|sign-?up|log-?in|promo|advert|sponsor|comment|disqus|skip|paginat|pager|popup|modal|"
    r"overlay|complementary|contentinfo|search|copyright|line-?n|visually|sr-only|print-?only|"
    r"(?:foot|footer|toc|meta|byline|edit|rail|author|bio|caption|credit|date|time)(?![a-z]))"
    r"|(?<![\w-])(?:widget|ads?(?![a-z])|(?:header|tags?)(?![\w-]))|display:\s*none")
MAIN_WORDS = re.compile(r"(?<![a-z-])(?:main(?:-?content)?|hentry|type-post|mw-content-text|"
                        r"(?:article|entry|post|story)-?(?:body|content|text))(?![a-z-])")
# An id of more than three words is most often made from a heading: it says nothing of a role.
NAMES = re.compile(r"""(?i)\b(?:(?:class|role|itemprop|style)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)"""
                   r"""|id\s*=\s*["']?([a-z\d]+(?:[-_][a-z\d]+){,2})(?=["'\s]|$))""")

VOID = {*"area base basefont col embed frame hr input link meta param source track".split()}
# End tags that are often left out: {tag: the open elements that it ends}. Any other tag ends a <p>.
ENDS = {"p": {"p"}, "li": {"p", "li"}, "dt": {"p", "dt", "dd"}, "dd": {"p", "dt", "dd"},
        "td": {"p", "td", "th"}, "th": {"p", "td", "th"}, "tr": {"p", "td", "th", "tr"}}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}

# linked: how many characters are in links; tag: one of HEADINGS, "li", "pre", or "p" for any other;
# row, cell, element: the numbers of the table row, cell and Page.elements around it (0 for none).
Block = namedtuple("Block", "text linked tag row cell element")


@lru_cache(4096)  # the items of a list share their attributes, and so do the pages of a site
def role(tag, attributes):
    """(role, kind) of an element: "main", "beside" or, most often, None; its tag and its names
    without digits. role("div", ' id="ad-7"') == ("beside", "div ad-")"""
    names = " ".join(map("".join, NAMES.findall(attributes)))
    kind = f"{tag} {re.sub('[0-9]+', '', names)}"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", names).lower()
    if tag in ("main", "article") or tag not in BESIDE and MAIN_WORDS.search(words):
        return "main", kind
    return "beside" if tag in BESIDE or BESIDE_WORDS.search(words) else None, kind


class Page:
    """The blocks of a page, and its elements with a role: (number of that around, role, kind)."""

    def __init__(self, text):
        self.blocks, self.elements, self.stack, self.is_open = [], [(0, None, "")], [], Counter()
        self.element = self.row = self.cell = self.n_cells = 0
        self.pieces, self.linked, self.in_link, self.tag = [], 0, False, "p"
        text, *parts = TAG.split(HIDDEN.sub("", text))
        self.add(text)
        for slash, name, attributes, end, text in zip(*(parts[i::5] for i in range(5))):
            tag = name.lower()
            if not end:
                self.add(f"<{slash}{name}{attributes}")
            elif tag == "a":
                self.in_link = not slash and "href" in attributes.lower()
            elif tag == "br":
                self.pieces.append("\n")
            elif tag not in INLINE:
                self.finish()
                (self.close if slash else self.open)(tag, attributes)
            self.add(text)
        self.finish()

    def add(self, text):
        self.pieces.append(text if self.is_open["pre"] else text.replace("\n", " "))
        self.linked += self.in_link and len(text.strip())

    def finish(self):
        """Make a block of the text that was added since the last one."""
        text = "".join(self.pieces)
        if "&" in text:  # html.unescape fails on numbers of thousands of digits
            text = html.unescape(re.sub(r"(&#\d{9})\d+", r"\1", text))
        if not self.is_open["pre"]:
            text = "\n".join([" ".join(line.split()) for line in text.split("\n")]).strip()
        if text.strip():
            self.blocks.append(Block(text.strip("\n"), self.linked, self.tag, self.row, self.cell,
                                     self.element))
            self.tag = "pre" if self.is_open["pre"] else "p"
        self.pieces, self.linked = [], 0

    def open(self, tag, attributes):
        if tag in VOID or attributes.endswith("/") or tag[0] in "!?":
            return
        while self.stack and self.stack[-1][0] in ENDS.get(tag, ENDS["p"]):
            self.leave()
        self.stack.append((tag, self.row, self.cell, self.element))
        self.is_open[tag] += 1
        found, kind = role(tag, attributes[:1000])
        if tag == "header" and not (self.is_open["main"] or self.is_open["article"]):
            found = "beside"  # the header of the page; that of an article has its title
        if found and tag not in ("html", "body"):
            self.elements.append((self.element, found, kind))
            self.element = len(self.elements) - 1
        if tag in ("tr", "td", "th"):
            self.n_cells += 1
            self.row, self.cell = self.n_cells if tag == "tr" else self.row, self.n_cells
        if tag in HEADINGS or tag in ("li", "pre"):
            self.tag = tag

    def close(self, tag, _):
        self.tag = "p"
        if tag in ENDS:  # a stray </p> or </td> must not close the elements around it
            if self.stack and self.stack[-1][0] == tag:
                self.leave()
        elif self.is_open[tag]:
            while self.leave() != tag:
                pass

    def leave(self):
        tag, self.row, self.cell, self.element = self.stack.pop()
        self.is_open[tag] -= 1
        return tag


# -----------------------------------------------------------------------------
# Which blocks are the main text.

NOTICE = re.compile(r"(?i)\W*(?:©|\(c\)|copyright\b|all rights reserved|skip to |share (?:on|this)"
                    r"|(?:we|this (?:web)?site) (?:[\w ]+ )?uses? [^.]*cookies)")


def size(blocks):
    """Bytes of text: a Chinese word has fewer characters than an English one, but as many bytes."""
    return sum(len(block.text.encode("utf-8", "replace")) for block in blocks)


def element_sizes(blocks, elements):
    """The characters outside links in each element, including those in the elements within it."""
    sizes = [0] * len(elements)
    for block in blocks:
        sizes[block.element] += len(block.text) - block.linked
    for i in range(len(sizes) - 1, 0, -1):  # an element comes after the one around it
        sizes[elements[i][0]] += sizes[i]
    return sizes


def main_element(page):
    """(blocks, whether the page marks its main text): those of the innermost main element that has
    most of the text, or else of the whole page, without elements beside it. What has most of the
    text is not beside it, alone or with others of its kind, as the posts of a thread have."""
    sizes, kind_sizes = element_sizes(page.blocks, page.elements), Counter()
    for n, (around, _, kind) in zip(sizes, page.elements):
        kind_sizes[kind] += n * (kind != page.elements[around][2])
    beside = [False]
    for around, found, kind in page.elements[1:]:
        beside.append(beside[around] or found == "beside" and kind_sizes[kind] <= sizes[0] / 2)
    blocks = [block for block in page.blocks if not beside[block.element]]
    sizes, main = element_sizes(blocks, page.elements), 0
    for i, (_, found, _) in enumerate(page.elements):
        if found == "main" and sizes[i] > sizes[0] / 2:  # of several, each is in the one before
            main = i
    within = {main}
    for i, (around, *_) in enumerate(page.elements):
        within.update([i] * (around in within))
    return [block for block in blocks if block.element in within], main > 0


def join_rows(blocks):
    """Join the cells of each table row into one block, unless one is long, or more than a block."""
    joined = []
    for row, cells in groupby(blocks, key=lambda block: block.row):
        cells = [*cells]
        are_single = row and len({block.cell for block in cells}) == len(cells)
        if are_single and all(len(block.text) < 200 and block.tag != "pre" for block in cells):
            cells = [cells[0]._replace(text=" | ".join([block.text for block in cells]),
                                       linked=sum(block.linked for block in cells))]
        joined += cells
    return joined


def is_boilerplate(block):
    """Whether a block is a notice or, unless it is a heading or code, mostly links."""
    is_linked = block.linked > len(block.text) / 2 and block.tag not in HEADINGS | {"pre"}
    return is_linked or len(block.text) < 300 and NOTICE.match(block.text) is not None


def main_blocks(page):
    """The blocks without boilerplate and, unless the page marks its main text, without short runs
    between boilerplate; all blocks where little would be left, as of a table of contents."""
    blocks, is_marked = main_element(page)
    blocks = join_rows(blocks)
    runs = [[*run] for bad, run in groupby(blocks, key=is_boilerplate) if not bad]
    for run in runs:
        while run and run[-1].tag in HEADINGS:  # the text below them was boilerplate
            run.pop()
    least = 0 if is_marked else min(100, max(map(size, runs), default=0))
    kept = [block for run in runs if size(run) >= least for block in run]
    return kept if size(kept) > size(blocks) / 5 else blocks


def html_to_text(page, declared=None):
    """The main text of a page, without menus, footers, cookie lines and the like. List items and
    table rows have a line each; an empty line separates all other blocks."""
    text, last = "", None
    for block in main_blocks(Page(decode_web(page, declared))):
        is_next = last and (block.tag == last.tag == "li" or 0 < last.row != block.row > 0)
        text += ("\n" if is_next else "\n\n") * bool(last) + "- " * (block.tag == "li") + block.text
        last = block
    return text


def visible_text(page, declared=None):
    """All that a reader sees of a page: visible_text(b"<p>a &lt; <b>b</b>") == "a < b"."""
    return "\n".join([block.text for block in Page(decode_web(page, declared)).blocks])
