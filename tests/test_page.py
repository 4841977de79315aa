"""chapters/chat.html in a real browser: what a reader sees, types and clicks."""

import asyncio
import os
import shutil

import pytest

pytest.importorskip("fastapi", reason="the server is written with fastapi: pip install fastapi")
browsers = pytest.importorskip("playwright.sync_api", reason="it drives the browser: pip install "
                               "playwright")
from serving import Spy, listening, opened, until

from chapters.protocol import Refusal

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LAST = "section:last-of-type "


class Reader(Spy):
    """Gives pieces as slowly as they can be read, and keeps ratings."""

    rates = True

    def __init__(self):
        super().__init__()
        self.ratings, self.pause, self.fails = [], 0, None

    async def follow(self, call, pieces):
        async for piece in super().follow(call, pieces):
            await asyncio.sleep(self.pause)
            if self.fails:
                raise Refusal(500, self.fails)
            yield piece

    def choose(self, call, models):
        name = super().choose(call, models)
        special = models[name].tokenizer.special.values()
        call.body.logit_bias = {str(id): -100 for id in special}  # the answer has no early end
        return name

    def rate(self, rating, client):
        self.ratings.append(rating.model_dump(exclude_none=True))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: playwright's own, or this machine's."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with browsers.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox"] * (os.name == "posix"))
        except browsers.Error:
            pytest.skip("no Chromium here: install one, or run `playwright install chromium`")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    with opened(tmp_path_factory.mktemp("runs"), tokenizer) as models:
        yield models


@pytest.fixture
def reader(models):
    """A Reader of a server whose first model chats; .url is its address, .gate its Gate."""
    watch = Reader()
    with listening(models, watch) as (port, watch.gate):
        watch.url = f"http://127.0.0.1:{port}/"
        yield watch


@pytest.fixture
def visit(browser):
    """visit(url, **options) -> a page; that nothing fails in it unseen is checked at the end."""
    pages, problems, expected = [], [], ("Failed to load resource", "Executing inline script")

    def visit(url, width=1280, **options):
        context = browser.new_context(viewport=dict(width=width, height=720), **options)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(url)
        page.wait_for_selector("#model:not(:empty), #gate:not([hidden]), .error")
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.context.close()
    assert [text for text in problems if not text.startswith(expected)] == []


def limit(page, n_tokens):
    """Set how long an answer may be, so that several fit the context of a small model."""
    page.click("summary")
    page.fill("#max_tokens", str(n_tokens))
    page.click("#input")


def say(page, text, key="Enter"):
    """Type a message, send it, and wait until its answer is complete."""
    page.fill("#input", text)
    page.press("#input", key)
    page.wait_for_selector("#log[aria-busy=false]")


def answer(page):
    """The text of the last answer."""
    return page.text_content(LAST + ".text:last-of-type")


def written(reader):
    """What the server sent last, as text."""
    return "".join(piece.text for piece in reader.pieces)


def test_a_message_is_sent_with_enter_and_its_answer_streams(reader, visit):
    page, reader.pause = visit(reader.url), 0.01
    page.fill("#input", "the cat")
    page.press("#input", "Shift+Enter")
    page.keyboard.type("and the dog")
    page.keyboard.press("Enter")
    page.wait_for_selector("#log[aria-busy=true]")
    lengths = set()
    while page.get_attribute("#log", "aria-busy") == "true":
        lengths.add(len(answer(page)))
    assert len(lengths) > 3 and answer(page) == written(reader) != ""
    assert page.text_content(".user") == "the cat\nand the dog" and page.input_value("#input") == ""
    said, = reader.calls[0].body.messages
    assert (said.role, said.content) == ("user", "the cat\nand the dog")
    assert page.evaluate("document.activeElement.id") == "input"


def test_what_anybody_writes_is_shown_as_text(reader, visit):
    page, evil = visit(reader.url), '<img src=x onerror="document.title = 1"><b>bold</b>&amp;'
    say(page, evil)
    assert page.text_content(".user") == evil and page.locator("#log img, #log b").count() == 0
    policy = page.request.get(reader.url).headers["content-security-policy"]
    assert "unsafe" not in policy and policy.startswith("default-src 'none'")
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'run'";
        try { document.body.append(script); } catch { }
    }""")
    assert page.title() == "Chat with talks"


def test_escape_stops_an_answer_which_stays_and_is_sent_along_next(reader, visit):
    page, reader.pause = visit(reader.url), 0.05
    page.fill("#input", "a")
    page.press("#input", "Enter")
    until(lambda: len(reader.pieces) > 5)
    page.keyboard.press("Escape")
    page.wait_for_selector("#log[aria-busy=false]")
    said = answer(page)
    assert said and "Stopped" in page.text_content(LAST + ".why")
    until(lambda: not reader.gate.n_running)
    assert reader.ended[-1][2] is reader.calls[0] and len(reader.pieces) < 20
    reader.pause = 0
    say(page, "b")
    assert [m.content for m in reader.calls[1].body.messages] == ["a", said, "b"]


def test_the_button_that_sends_stops_while_an_answer_comes(reader, visit):
    page, reader.pause = visit(reader.url), 0.05
    assert page.get_attribute("#send", "aria-label") == "Send"
    page.fill("#input", "a")
    page.click("#send")
    page.wait_for_selector("#send[aria-label=Stop]")
    page.fill("#input", "b")
    page.press("#input", "Enter")  # does not interrupt
    assert page.get_attribute("#log", "aria-busy") == "true" and len(reader.calls) == 1
    page.click("#send")
    page.wait_for_selector("#send[aria-label=Send]")
    assert page.input_value("#input") == "b"


def test_an_answer_is_written_again_in_place_of_the_last(reader, visit):
    page = visit(reader.url)
    limit(page, 9)
    say(page, "a")
    say(page, "b")
    assert page.locator(".again:visible").count() == 1
    reader.pieces.clear()
    page.click(".again:visible")
    until(lambda: len(reader.calls) == 3)
    page.wait_for_selector("#log[aria-busy=false]")
    assert page.locator("section").count() == 2 and answer(page) == written(reader)
    before, after = ([m.content for m in call.body.messages] for call in reader.calls[1:])
    assert before == after and len(before) == 3


def test_thumbs_go_to_the_server_and_a_bad_answer_can_be_bettered(reader, visit):
    page = visit(reader.url)
    say(page, "a")
    up, down = (page.locator(f"[data-rating={name}]") for name in ("up", "down"))
    up.click()
    page.wait_for_selector("[data-rating=up][aria-pressed=true]")
    down.click()
    page.fill(".better input", "a better one")
    page.press(".better input", "Enter")
    page.wait_for_selector("text=Thank you")
    assert up.get_attribute("aria-pressed") == "false"
    id = reader.calls[0].id
    assert reader.ratings == [dict(id=id, rating="up"), dict(id=id, rating="down"),
                              dict(id=id, rating="down", better="a better one")]


def test_where_ratings_are_not_kept_none_are_asked_for(reader, visit):
    reader.rates = False
    page = visit(reader.url)
    say(page, "a")
    assert page.locator(".again").count() == 1 and page.locator("[data-rating]").count() == 0


def test_a_failure_is_told_and_the_message_comes_back(reader, visit):
    page, reader.fails = visit(reader.url), "the model is <b>tired</b>"
    say(page, "a")
    assert page.text_content(".error") == "the model is <b>tired</b>"
    assert page.get_attribute(".error", "role") == "alert" and page.input_value("#input") == "a"
    assert page.locator("section").count() == 0
    reader.fails = None
    page.press("#input", "Enter")
    page.wait_for_selector(".acts")
    assert page.locator(".error").count() == 0 and len(reader.calls[1].body.messages) == 1
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "b")
    assert "cannot be reached" in page.text_content(".error")


def test_the_oldest_messages_make_room_and_that_is_said(reader, visit):
    page = visit(reader.url)
    limit(page, 5)
    for i in range(9):
        say(page, f"cat {i}")
    assert page.locator("section").count() == 9 and page.is_visible("#note")
    assert page.locator(".error").count() == 0
    said = [m.content for m in reader.calls[-1].body.messages]
    assert said[-1] == "cat 8" and len(said) < 12 and len(said) % 2
    say(page, "cat " * 99)
    assert "too many" in page.text_content(".error")
    say(page, "cat 9")  # for one that does not fit nothing was forgotten
    assert [m.content for m in reader.calls[-1].body.messages][:-1][-2] == "cat 8"


def test_settings_reach_the_server_and_a_new_chat_forgets(reader, visit):
    page = visit(reader.url)
    page.click("summary")
    for name, value in ("system", "be good"), ("temperature", "0"), ("max_tokens", "4"):
        page.fill(f"#{name}", value)
    page.click("#input")
    assert not page.is_visible("#system")
    say(page, "a")
    body = reader.calls[0].body
    assert (body.temperature, body.max_tokens, body.stream) == (0, 4, True)
    assert [m.content for m in body.messages] == ["be good", "a"]
    page.click("#fresh")
    assert page.locator("section").count() == 0 and page.is_visible("#hello")
    say(page, "b")
    assert [m.content for m in reader.calls[1].body.messages] == ["be good", "b"]


def test_a_new_chat_ends_the_answer_under_way(reader, visit):
    page, reader.pause = visit(reader.url), 0.05
    page.fill("#input", "a")
    page.press("#input", "Enter")
    until(lambda: len(reader.pieces) > 2)
    page.click("#fresh")
    until(lambda: not reader.gate.n_running)
    assert page.locator("section").count() == 0 and page.input_value("#input") == ""
    assert page.get_attribute("#log", "aria-busy") == "false"


def test_a_base_model_goes_on_with_a_text(models, visit):
    reader = Reader()
    with listening(dict(base=models["base"]), reader) as (port, _):
        page = visit(f"http://127.0.0.1:{port}/")
        assert "never learned" in page.text_content("#hello")
        say(page, "the cat ")
        assert answer(page) == "the cat " + written(reader)
        assert page.locator(".user").count() == 0
        say(page, "a dog")
        assert reader.calls[1].body.prompt == "a dog"


def test_a_locked_server_asks_for_its_key_once(models, visit):
    with listening(models, key="k" * 16) as (port, _):
        page = visit(f"http://127.0.0.1:{port}/")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#gate:not([hidden])")
        page.fill("#key", "k" * 16)
        page.press("#key", "Enter")
        page.wait_for_selector("#model:not(:empty)")
        assert not page.is_visible("#gate")
        say(page, "a")
        page.reload()
        page.wait_for_selector("#model:not(:empty)")


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_all_fits_narrow_and_wide_screens(reader, visit, width):
    page = visit(reader.url, width)
    say(page, "the cat sees a big red dog " * 2 + "x" * 24)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for element in ".user", ".acts", "#composer", ".panel", "#send":
        box = page.locator(element).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= 720 and min(box["width"], box["height"]) >= 36


def test_the_keyboard_reaches_every_control_and_each_has_a_name_and_a_visible_focus(reader, visit):
    page = visit(reader.url)
    say(page, "a")
    reached = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("""() => {
            const at = document.activeElement, style = getComputedStyle(at);
            const ring = style.outlineStyle !== "none" || at.id === "input";
            return [at.getAttribute("aria-label") || at.textContent.trim(), ring];
        }"""))
    names = {name for name, _ in reached}
    assert {"Bad answer", "Good answer", "Write it again", "Settings", "New"} <= names
    assert all(ring for name, ring in reached if len(name) < 30)  # a longer one is the whole page


def test_colors_follow_the_system_and_are_easy_to_read(reader, visit):
    contrast = """() => {
        const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => {
                v /= 255;
                return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const style = getComputedStyle(document.documentElement);
        const probe = document.body.appendChild(document.createElement("i"));
        const value = (name) => {
            probe.style.color = style.getPropertyValue(name);
            return light(getComputedStyle(probe).color);
        };
        return [["--text", "--page"], ["--faint", "--page"], ["--faint", "--soft"],
                ["--bad", "--bad-soft"], ["--on-accent", "--accent"]].map(([a, b]) => {
            const pair = [value(a), value(b)].sort((x, y) => y - x);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
        });
    }"""
    colors = set()
    for scheme in "light", "dark":
        page = visit(reader.url, color_scheme=scheme)
        colors.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert min(page.evaluate(contrast)) >= 4.5
    assert len(colors) == 2
