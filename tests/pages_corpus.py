"""
Web pages whose main text is known, to measure what extracts it.

Seven kinds of page in seven languages and five styles of markup; the markup of every third page is
broken, and the same seed makes the same pages. Menus, cookie lines, links to other pages, comments
on an article and what a forum says of its users are not main text.
"""

import random
import re
from collections import Counter

# Per language: subjects and predicates, of which any two make a sentence; a menu; a cookie line.
LANGUAGES = {
    "en": ("The old harbor|A group of engineers|Her second novel|The city council|The new bridge|"
           "His grandmother's garden|The river below the mill|The last train",
           "changed more in ten years than most people here had expected|needs patience, dry wood "
           "and a fair amount of luck|was described in a letter that nobody answered|cost almost "
           "twice as much as planned|can be seen from the tower when the morning fog has gone",
           "Home|World|Business|Sport|Culture|Contact|About us|Jobs|Archive",
           "We use cookies to improve your experience on our site. Accept all or manage choices."),
    "de": ("Der alte Hafen|Eine Gruppe von Schülern|Das kleine Museum|Die neue Brücke",
           "hat sich in zehn Jahren stärker verändert als erwartet|kostete doppelt so viel wie "
           "geplant|ist bei klarem Wetter vom Turm aus gut zu sehen",
           "Start|Politik|Sport|Kultur|Kontakt", "Wir verwenden Cookies. Alle akzeptieren."),
    "ru": ("Старая гавань|Группа учеников|Каждая зима",
           "за десять лет изменилась сильнее, чем ждали|хорошо видна с башни, когда уходит туман",
           "Главная|Мир|Спорт|Культура|Контакты", "Мы используем файлы cookie. Принять все."),
    "el": ("Το παλιό λιμάνι|Το μικρό μουσείο|Το νέο γεφύρι",
           "άλλαξε μέσα σε δέκα χρόνια περισσότερο από όσο περίμεναν όλοι|κόστισε σχεδόν τα διπλά "
           "από την πρώτη εκτίμηση", "Αρχική|Κόσμος|Αθλητικά|Επικοινωνία",
           "Χρησιμοποιούμε cookies. Αποδοχή όλων."),
    "zh": ("古老的港口|一群年轻的工程师|山脚下的小博物馆|新建的大桥",
           "在十年之间发生了比人们预想的更大的变化|在晨雾散去以后可以从塔上看得很清楚",
           "首页|国际|体育|文化|联系我们", "我们使用Cookie。全部接受。"),
    "ar": ("الميناء القديم|المتحف الصغير|الجسر الجديد",
           "تغير خلال عشر سنوات أكثر مما توقعه الناس هنا|كلف ضعف ما جاء في التقدير الأول",
           "الرئيسية|العالم|رياضة|ثقافة|اتصل بنا", "نستخدم ملفات تعريف الارتباط. قبول الكل."),
    "hi": ("पुराना बंदरगाह|छोटा संग्रहालय|नया बाज़ार",
           "दस वर्षों में लोगों की उम्मीद से अधिक बदल गया है|पहले अनुमान से लगभग दोगुना महंगा पड़ा",
           "मुखपृष्ठ|दुनिया|खेल|संस्कृति|संपर्क", "हम कुकीज़ का उपयोग करते हैं। सभी स्वीकार करें।")}
CODE = "def area(width, height):\n    if width < 0:\n        raise ValueError\n    return width"


class Writer:
    """Pieces of pages, as (main text, HTML), in one language and from one seed."""

    def __init__(self, language, seed):
        self.random = random.Random(seed)
        words = LANGUAGES[language]
        self.subjects, self.predicates, self.menu = (part.split("|") for part in words[:3])
        self.cookies, self.gap = words[3], "" if language == "zh" else " "

    def phrase(self):
        return self.random.choice(self.subjects)

    def sentence(self):
        stop = "." if self.gap else "。"
        return f"{self.phrase()}{self.gap}{self.random.choice(self.predicates)}{stop}"

    def paragraph(self, least=2, most=6):
        text = " ".join(self.sentence() for _ in range(self.random.randint(least, most)))
        words = text.split(" ")
        for i in self.random.sample(range(len(words)), min(len(words), self.random.randint(0, 3))):
            tag = self.random.choice(["<b>{}</b>", "<em>{}</em>", '<a href="/topic">{}</a>'])
            words[i] = tag.format(words[i])
        return text, f"<p>{' '.join(words)}</p>"

    def heading(self, level=2):
        text = f"{self.phrase()} {self.random.randint(1, 99)}"
        return text, f"<h{level}>{text}</h{level}>"

    def items(self, texts):
        return "\n".join(texts), f"<ul>{''.join(f'<li>{text}</li>' for text in texts)}</ul>"

    def table(self, *rows):
        cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
        return ("\n".join(map(" ".join, rows)),
                f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")


# Kinds of pages: each yields pieces of (main text, HTML); one without text is boilerplate.


def article(w):
    yield w.heading(1)
    yield "", "<p>By A. Writer | 3 March | 4 min read</p>"
    for i in range(w.random.randint(4, 9)):
        yield from [w.paragraph()] if i % 3 else [w.paragraph(), w.heading(), w.paragraph(1, 3)]
    yield "", w.items([f'<a href="/{i}">{w.phrase()} {i}</a>' for i in range(5)])[1]


def blog(w):
    yield from article(w)
    comments = "".join(f"<div><b>{name}</b> said: {w.sentence()} <a href='#'>Reply</a></div>"
                       for name in ("kim", "joe42", "ana"))
    name = w.random.choice(["comments", "responses", "c-list"])
    yield "", f'<div class="{name}">{comments}</div>'


def thread(w):
    yield w.heading(1)
    for i in range(w.random.randint(4, 8)):
        yield "", f'<div class="user">user{i}<br>Joined 2014<br>Posts: {i * 37}</div>'
        yield w.paragraph(1, 4)
        yield "", '<div class="tools"><a href="#">Quote</a> <a href="#">Report</a></div>'


def documentation(w):
    yield w.heading(1)
    for _ in range(w.random.randint(2, 5)):
        yield w.heading()
        yield w.paragraph(1, 3)
        yield CODE, "<pre><code>" + CODE.replace("<", "&lt;") + "</code></pre>"
        yield w.table(["name", "meaning"], ["width", w.phrase()], ["height", w.phrase()])
    yield "", '<p><a href="/a">Previous page</a> <a href="/b">Next page</a></p>'


def product(w):
    yield w.heading(1)
    yield "", "<p>4.5 of 5</p><form><input name=n><button>Add to cart</button></form>"
    yield w.paragraph(2, 4)
    yield w.table(["Weight", "3 kg"], ["Color", "green"], ["Made of", w.phrase()])
    yield w.items([w.sentence() for _ in range(3)])
    yield "", "".join(f'<div><a href="/p{i}"><img src=x alt="A product">{w.phrase()}</a> $ {i}9'
                      "</div>" for i in range(4))


def recipe(w):
    yield from [w.heading(1), w.paragraph(1, 3), w.heading()]
    yield w.items(["2 cups of flour", "1 cup of cold milk", "half a cup of brown sugar", "walnuts"])
    yield from [w.heading(), w.paragraph(1, 2), w.paragraph(1, 2)]


def encyclopedia(w):
    yield from [w.heading(1), w.table(["Founded", "1834"], ["Region", w.phrase()])]
    for _ in range(w.random.randint(3, 6)):
        yield from [w.paragraph(3, 7), w.heading()]
    yield w.items([f"{w.phrase()}, p. {w.random.randint(2, 400)}." for _ in range(4)])


KINDS = article, blog, thread, documentation, product, recipe, encyclopedia

# What is around the menu, the main text, the side column, the footer and the cookie line.
STYLES = [("<nav>", "<main><article>", "<aside>", "<footer>", '<div role="dialog">'),
          ('<div id="navbar">', '<div class="entry-content">', '<div class="sidebar">',
           '<div id="footer">', '<div class="cookie-notice">'),
          ('<div class="css-1x9k">', '<div class="css-q0z1">', '<div class="css-77ab">',
           '<div class="css-p3f2">', '<div class="css-0d1e">'),
          ("<div>", "<div>", "<div>", "<div>", "<p>"),
          ("<table><tr><td>", "<table><tr><td width=70%>", "<table><tr><td>", "<center><font>",
           "<center>")]


def around(opening, content):
    ends = [f"</{name}>" for name in re.findall(r"<(\w+)", opening)]
    return opening + content + "".join(ends[::-1])


def broken(page, chance):
    """End tags lost, quotes left out, tags in capitals, an end tag too much."""
    page = re.sub(r"</(?:p|li|td|tr|b)>", lambda tag: tag[0] * (chance.random() < 0.5), page)
    page = re.sub(r"<(/?)(li|ul|table)\b", lambda tag: f"<{tag[1]}{tag[2].upper()}", page)
    return re.sub(r'="(\w+)"', r"=\1", page).replace("</h1>", "</h1></b></span>", 1)[:-14]


def made_page(kind, style, language, seed, is_broken):
    """-> (the bytes of a page, its main text)"""
    w = Writer(language, seed)
    pieces, links = [*kind(w)], [f'<a href="/{i}">{word}</a>' for i, word in enumerate(w.menu)]
    contents = [
        w.items(links)[1], "\n".join(html for _, html in pieces),
        "<h3>Most read</h3>" + "<br>".join(f'<a href="/{i}">{w.phrase()} {w.phrase()}</a>'
                                           for i in range(6)) + f"<p>{w.sentence()}</p>",
        "<p>© 2025 Example. All rights reserved.</p>" + " | ".join(links), w.cookies]
    menu, main, side, footer, cookies = map(around, style, contents)
    page = ("<!DOCTYPE html><html><head><meta charset='utf-8'><title>Page</title><style>p > b {}"
            "</style><script>'<p>'</script></head><body><a href='#main'>Skip to content</a>"
            f"{menu}{cookies}<p>{links[0]} &gt; {links[1]}</p>{main}{side}{footer}</body></html>")
    return ((broken(page, w.random) if is_broken else page).encode(),
            "\n".join(text for text, _ in pieces if text))


def made_pages(n=100, seed=0):
    """n pages as (bytes, main text): each kind in each style, half of them in English."""
    foreign = [*LANGUAGES][1:]
    return [made_page(KINDS[i % len(KINDS)], STYLES[i // len(KINDS) % len(STYLES)],
                      "en" if i % 2 else foreign[i // 2 % len(foreign)], seed * n + i, i % 3 == 0)
            for i in range(n)]


TOKEN = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+")


def score(text, truth):
    """-> (precision, recall, F1) of a text's tokens: words, and Chinese and Japanese characters."""
    found, right = (Counter(TOKEN.findall(t)) for t in (text, truth))
    both = (found & right).total()
    precision, recall = both / max(1, found.total()), both / max(1, right.total())
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)
