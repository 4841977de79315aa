"""Facts about chapters/pages.py: a web page becomes its main text, or all of its visible text."""

import statistics
from html.parser import HTMLParser

import pytest
from pages_corpus import TOKEN, made_pages, score

from chapters.pages import Page, html_to_text, role, visible_text
from data import clean

PARAGRAPH = "The mill by the river has ground no corn since the flood, yet its wheel turns. " * 2


def page(*parts):
    return "".join(parts).encode()


def test_the_examples_in_the_docstrings_are_true():
    assert visible_text(b"<p>a &lt; <b>b</b>") == "a < b"
    assert role("div", ' id="ad-7"') == ("beside", 'div ad-')


def test_the_visible_text_is_what_a_reader_sees():
    markup = """<!DOCTYPE html><html><head><title>T</title><style>p { x }</style></head>
        <body></script><![if IE]><script>if (a < b) "</p>";</script><h1>Fish &amp; chips</h1>
        <p>One <b>bold</b>
        word<br>and&nbsp;&eacute;<ul><li>a<li>b</ul><pre>if x:\n    y</pre>end<img alt="no">"""
    text = visible_text(markup.encode())
    assert clean(text) == "T\nFish & chips\nOne bold word\nand é\na\nb\nif x:\n    y\nend"


def test_the_visible_text_is_that_of_the_standard_librarys_parser():
    class Reader(HTMLParser):
        text, hidden = "", False

        def handle_starttag(self, tag, attributes):
            self.hidden = tag in ("script", "style")
            self.text += "" if tag in ("a", "b", "em") else "\n"

        def handle_endtag(self, tag):
            self.handle_starttag("b" * (tag in ("a", "b", "em")), [])

        def handle_data(self, data):
            self.text += data * (not self.hidden)

    for markup, _ in made_pages(40):
        reader = Reader()
        reader.feed(markup.decode())
        assert TOKEN.findall(visible_text(markup)) == TOKEN.findall(reader.text)


# -----------------------------------------------------------------------------
# The main text.


@pytest.mark.parametrize("opening", [
    "<nav>", "<aside>", "<footer>", "<header>", "<noscript>", "<div class='sidebar left'>",
    "<p class=image-caption>", "<div class='main-nav'>", "<div class='box ad-slot'>",
    "<div class='headerTop topBar'>",
    "<div id=footer>", '<div role="navigation">', '<ul class="siteNav">', "<p class=breadcrumbs>",
    '<div class="cookie-banner">', '<section id="related-posts">', '<div class="share_buttons">',
    '<div style="display: none">', '<table class="navbox">', "<form>", "<DIV CLASS=SIDEBAR>"])
def test_what_is_beside_the_text_by_its_tag_or_name_goes(opening):
    name = opening.strip("<>").split()[0]
    markup = page("<body>", opening, "Some words of no interest that stand here", f"</{name}>",
                  "<p>", PARAGRAPH, "</p>", opening, "and words at the end", f"</{name}></body>")
    assert html_to_text(markup) == PARAGRAPH.strip()
    assert "no interest" in visible_text(markup)


def test_links_and_notices_go_without_any_name():
    links = "".join(f"<li><a href='/{i}'>Another page {i}</a>" for i in range(9))
    markup = page("<a href='#x'>Skip to content</a><ul>", links, "</ul><h1>Mill</h1><p>", PARAGRAPH,
                  "</p><h3>More to read</h3><ul>", links, "</ul><p>Copyright 2025 by Example</p>")
    assert html_to_text(markup) == f"Mill\n\n{PARAGRAPH.strip()}"


def test_a_link_within_a_paragraph_stays_and_one_without_address_is_none():
    for tag in "<a href=/river>", "<a name=river>":
        text = f"<p>{PARAGRAPH}{tag}the river</a> and <b>so</b> on</p>"
        assert html_to_text(text.encode()) == f"{PARAGRAPH}the river and so on"
    assert html_to_text(f"<a name=x>{PARAGRAPH}<p>b".encode()) == f"{PARAGRAPH.strip()}\n\nb"


def test_headings_lists_tables_and_code_keep_their_form():
    markup = page("<main><h1>Mill</h1><p>", PARAGRAPH, "<ul><li>one<li><p>two</p></ul><table>"
                  "<tr><th>wheel<th>turns</tr><tr><td><p>old</p></td><td>7 &lt; 8</td></tr></table>"
                  "<pre><code>\nif x:\n    <b>y</b> = 1  # &amp;</code></pre>a<br>b</main>")
    assert html_to_text(markup) == (
        f"Mill\n\n{PARAGRAPH.strip()}\n\n- one\n- two\n\nwheel | turns\nold | 7 < 8\n\n"
        "if x:\n    y = 1  # &\n\na\nb")


def test_the_paragraphs_of_a_layout_made_of_tables_are_no_rows():
    markup = page("<table><tr><td><h1>Mill</h1><p>", PARAGRAPH, "</p></td></tr></table>")
    assert html_to_text(markup) == f"Mill\n\n{PARAGRAPH.strip()}"


def test_the_header_of_an_article_is_text_and_that_of_a_page_is_not():
    markup = page("<header>Example News</header><article><header><h1>Mill</h1></header><p>",
                  PARAGRAPH, "</article>")
    assert html_to_text(markup) == f"Mill\n\n{PARAGRAPH.strip()}"


@pytest.mark.parametrize("kind", ['<div class="has-sidebar">', "<form>", '<div id="comment">'])
def test_what_holds_most_of_the_text_is_not_beside_it(kind):
    name = kind[1:].split()[0].strip(">")
    markup = page(kind, f"<p>{PARAGRAPH}</p>", '<div class="sidebar">or not</div>', f"</{name}>")
    assert html_to_text(markup) == PARAGRAPH.strip()


def test_the_posts_of_a_thread_are_its_text_and_the_comments_below_an_article_are_not():
    posts = [f'<div class="comment" id="comment-{i}"><p>{PARAGRAPH}{i}</p></div>' for i in range(9)]
    assert html_to_text(page("<h1>Mill</h1>", *posts)).count("flood") == 18
    assert html_to_text(page(f"<p>{PARAGRAPH * 4}</p>", *posts[:2])).count("flood") == 8


def test_the_innermost_element_that_holds_most_of_the_text_is_the_main_one():
    text = f"<p>{PARAGRAPH}</p>"
    for wrap in ("<main>{}</main>", "<div role=main><article>{}</article></div>",
                 '<div class="hentry tag-sidebar">{}</div>', "<article class=cookies>{}</article>",
                 '<main>Teaser<div itemprop="articleBody">{}</div></main>'):
        beside = "<p>Our offices are closed today, call us tomorrow, or write a letter to us.</p>"
        assert html_to_text(page(beside, wrap.format(text), beside)) == PARAGRAPH.strip()
    for markup in f"<article>{text}</article>" * 2, f"<main>{text}<article>{text}</article></main>":
        assert html_to_text(markup.encode()).count("flood") == 4


def test_a_page_of_links_or_of_few_words_is_not_empty():
    assert html_to_text(b"<p>a") == "a"
    links = "".join(f"<li><a href='/{i}'>page {i}</a>" for i in range(3))
    assert html_to_text(f"<ul>{links}</ul>".encode()) == "- page 0\n- page 1\n- page 2"
    assert html_to_text(b"") == html_to_text(b"<p></p><!-- -->") == visible_text(b"") == ""


def test_an_end_tag_that_is_missing_or_too_much_does_not_lose_the_text():
    for broken in ("<ul><li>{}<li>", "</div></p></b>{}", "<div><div>{}", "<p>{}<div>", "<td>{}",
                   "<b><i>{}", "<table><tr><td>{}</table></table>", "<p class=share>x<p>{}"):
        assert PARAGRAPH.strip() in html_to_text(broken.format(PARAGRAPH).encode())


def test_the_main_text_is_found_on_pages_of_many_kinds():
    """Against pages_corpus, of another seed than the figures of tests/benchmark.py."""
    pages = made_pages(70, seed=7)
    ours, everything = ([score(f(markup), text) for markup, text in pages]
                        for f in (html_to_text, visible_text))
    precision, recall, f1 = (statistics.mean(column) for column in zip(*ours))
    assert precision > 0.9 and recall > 0.98 and f1 > 0.94
    assert f1 > statistics.mean(f1 for _, _, f1 in everything) + 0.1
    assert min(recall for _, recall, _ in everything) > 0.99


# -----------------------------------------------------------------------------
# Charsets.

GREEK = "Ο παλιός μύλος δεν έχει αλέσει από την πλημμύρα"


@pytest.mark.parametrize("markup", [
    '<meta charset="{}"><p>{}', "<meta charset={}><p>{}", "<META CHARSET='{}'/><p>{}",
    '<meta http-equiv="Content-Type" content="text/html; charset={}"><p>{}',
    '<?xml version="1.0" encoding="{}"?><p>{}'])
@pytest.mark.parametrize("charset", ["iso-8859-7", "windows-1253", "utf-8"])
def test_a_page_says_its_charset(markup, charset):
    assert html_to_text(markup.format(charset, GREEK).encode(charset)) == GREEK


def test_what_the_server_declares_and_the_mark_come_before_what_the_page_says():
    markup = f"<meta charset=iso-8859-5><p>{GREEK}"
    assert html_to_text(markup.encode("iso-8859-7"), "ISO-8859-7") == GREEK
    for charset in "utf-8-sig", "utf-16":
        assert html_to_text(markup.encode(charset), "iso-8859-5") == GREEK


def test_a_charset_that_is_none_or_does_not_fit_is_not_believed():
    for name in "utf-9", "hex", "a\0b", "", "undefined", "x" * 500:
        assert html_to_text(f"<p>{GREEK}".encode(), name) == GREEK
        markup = f"<meta charset={name}><p>{GREEK}".replace("\0", "")
        assert html_to_text(markup.encode()) == GREEK
    assert html_to_text(f"<p>{GREEK}".encode("cp1253"), "utf-8") == GREEK
    markup = f"<meta charset=iso-8859-7><p>{GREEK}".encode("iso-8859-7")
    assert html_to_text(markup, "utf-9") == html_to_text(markup, "a\0b") == GREEK


def test_latin_1_means_the_windows_charset_as_in_browsers():
    for name in "iso-8859-1", "us-ascii", "Latin-1":
        assert html_to_text(f"<meta charset={name}><p>“mill” – é".encode("cp1252")) == "“mill” – é"


# -----------------------------------------------------------------------------
# Hostile pages: the time is linear in their length.

OPENINGS = ["<!--", "<script>", "<script ", "<pre>", "<pre", '"<a', "<a '", "</script ", "<a \"'",
            '<a="', "<a='", '<a"="', "<a = ", "<a href=x ", "<style/", "<", "</", "&", "&#", "&#9",
            "<div class='nav'>", "<nav>", "<li>", "<table><tr><td>", "<p>", "</p>", "<h1>",
            "<a href>", "<td><li>", "</dd>", "<main>", "<article><aside>", "<form><p>",
            "<div id=a-", "=", "<!", "<![CDATA[", "<?", "we use we use ", "<br>",
            "<div class=" + "aB" * 400 + ">x"]


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_page_of_nothing_but_openings_comes_to_an_end(opening):
    markup = opening.encode() * (100_000 // len(opening) + 1)
    assert len(html_to_text(markup)) <= 2 * len(markup)


@pytest.mark.parametrize("tag", ["div class=nav", "b", "table", "main"])
def test_100_000_elements_within_one_another_are_read(tag):
    markup = f"<{tag}>".encode() * 100_000 + b"deep" + f"</{tag.split()[0]}>".encode() * 100_000
    assert html_to_text(markup) == "deep"


def test_what_is_opened_and_not_closed_goes_to_the_end():
    for f in html_to_text, visible_text:
        assert f(b"<p>a<!-- b <p>c") == f(b"<p>a<script>b</p>c") == "a"
        assert f(b"<p>a <b and c") == "a <b and c"
        assert f(b'<p title="a>b</p>') == "b"
    assert visible_text(b"a<pre>  b\n  c\n") == "a\n  b\n  c"


def test_a_script_of_xhtml_ends_in_its_own_tag():
    assert visible_text(b'<script src="a.js"/><p>a</p><style />b') == "a\nb"


def test_a_number_of_thousands_of_digits_is_no_character():
    assert visible_text(b"<p>a&#" + b"9" * 9999 + b";b") == "a\ufffdb"


def test_what_an_element_is_does_not_take_the_memory_of_its_attributes():
    Page("<div class='%s'>" % ("x" * 10**6))
    assert role.cache_info().maxsize <= 4096
