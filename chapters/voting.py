"""
How people vote: a session of chapters.rate goes in, and is shown in the terminal or on a page in
the browser, which is from this machine for this machine and loads nothing from elsewhere.

    rate_in_terminal(session)           # until all is rated, or q
    rate_in_browser(session, port=0)    # likewise, or until Ctrl-C
"""

import html
import http.server
import secrets
import shutil
import textwrap
import threading
from itertools import zip_longest
from urllib.parse import parse_qs, urlsplit

from sample import warn

BUTTONS = {"a": "A is better", "b": "B is better", "t": "Tie", "s": "Skip", "q": "Stop"}
LARGEST_VOTE = 4096      # bytes of a form
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
main{display:grid;grid-template-columns:1fr 1fr;gap:1rem}pre{white-space:pre-wrap;margin:0;
overflow-wrap:anywhere;font:inherit}section{border:1px solid #bbb;border-radius:.5rem;padding:1rem}
form{margin:1.5rem 0;display:flex;gap:.75rem;flex-wrap:wrap}
button{font:inherit;padding:.5rem 1.25rem}h2{margin:0 0 .5rem;font-size:1rem;color:#666}
.prompt{font-size:1.15rem;margin-bottom:1.25rem}"""
SCRIPT = """addEventListener("keydown", event => {
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat
  const button = plain && document.querySelector(`button[value="${CSS.escape(event.key)}"]`)
  if (button) button.click() })"""

# -----------------------------------------------------------------------------
# In the terminal.


def printable(text):
    """A model's text without what would steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def side_by_side(left, right, width):
    """Two texts in two columns, together at most width wide."""
    half = max(10, (width - 3) // 2)
    columns = [[piece for line in printable(text).split("\n")
                for piece in textwrap.wrap(line, half, replace_whitespace=False) or [""]]
               for text in (f"A\n\n{left}", f"B\n\n{right}")]
    return "\n".join(f"{a:{half}} | {b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))


def rate_in_terminal(session):
    """Show and ask until all is rated, or q, or the end of the input."""
    while session.now is not None:
        number, prompt, _, answers = session.now
        print(f"\n{session.start + number + 1} of {session.n}: {printable(prompt)}\n")
        print(side_by_side(*answers, shutil.get_terminal_size().columns))
        key = None
        while key not in BUTTONS:
            try:
                key = input("\nbetter: a or b, t tie, s skip, q stop > ").strip().lower()[:1]
            except EOFError:
                key = "q"
        if key == "q":
            return
        session.vote(number, key)


# -----------------------------------------------------------------------------
# In the browser: only who has the address that the command printed sees the page, and votes.


def page(session, token):
    """The HTML of the question of now. Whose answers they are is nowhere in it."""
    number, prompt, _, answers = session.now
    sides = "".join(f"<section><h2>{side}</h2><pre>{html.escape(answer)}</pre></section>"
                    for side, answer in zip("AB", answers))
    buttons = "".join(f'<button name="vote" value="{key}">{label} ({key})</button>'
                      for key, label in BUTTONS.items())
    return (f"<h2>{session.start + number + 1} of {session.n}</h2>"
            f'<pre class="prompt">{html.escape(prompt)}</pre><main>{sides}</main>'
            f'<form method="post" action="/?token={token}">'
            f'<input type="hidden" name="number" value="{number}">{buttons}</form>')


class RatingPage(http.server.BaseHTTPRequestHandler):
    """GET shows the question, POST votes on it, both only for who knows the token. A page of
    another site does not, and its Origin or Host would not be ours."""

    def log_message(self, *args):
        pass

    def refusal(self):
        """Why a request is none of ours, or None."""
        own = f"127.0.0.1:{self.server.server_port}"
        token = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if self.headers.get("Host") != own:
            return "this page is served to 127.0.0.1 only"
        if self.headers.get("Origin", f"http://{own}") != f"http://{own}":
            return "this comes from another site"
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return "open the address that the command has printed, with its token"
        return None

    def send(self, status, body, **headers):
        nonce = secrets.token_urlsafe(16)
        data = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Which is better?'
                f'</title><style nonce="{nonce}">{STYLE}</style><body>{body}'
                f'<script nonce="{nonce}">{SCRIPT}</script></html>').encode(errors="replace")
        policy = (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
                  "form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
        self.send_response(status)
        for name, value in {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store",
                            "Content-Length": len(data), "Content-Security-Policy": policy,
                            "Referrer-Policy": "same-origin", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def show(self):
        """The question, or the report when there is none; after that the server ends."""
        session = self.server.session
        with session.lock:
            over = self.server.stopped or session.now is None
            body = "" if over else page(session, self.server.token)
        if over:
            body = "<h2>Thank you</h2><pre>" + html.escape("\n".join(session.report())) + "</pre>"
        self.send(200, body)
        if over:
            threading.Thread(target=self.server.shutdown).start()

    def do_GET(self):
        reason = self.refusal()
        if reason:
            self.send(403, reason)
        elif urlsplit(self.path).path != "/":
            self.send(404, "there is no such page")
        else:
            self.show()

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        reason = self.refusal()
        if reason or not length.isdecimal() or int(length) > LARGEST_VOTE:
            self.send(403 if reason else 400, reason or "this is no vote")
            self.close_connection = True
            return
        form = parse_qs(self.rfile.read(int(length)).decode(errors="replace"))
        number, key = (form.get(name, [""])[0] for name in ("number", "vote"))
        if key == "q":
            self.server.stopped = True
        elif key in BUTTONS and number.isdecimal():
            try:
                self.server.session.vote(int(number), key)
            except ValueError as error:  # the next question cannot be answered
                warn(error)
        self.send(303, "", Location=f"/?token={self.server.token}")


def make_server(session, port=0):
    """A server of the page on 127.0.0.1, with the address to open in .url; port 0 is a free one."""
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), RatingPage)
    except OSError as error:
        raise ValueError(f"port={port} cannot be used ({error.strerror}): give another --port, or "
                         "0 for a free one") from None
    server.daemon_threads = True  # a browser keeps connections open
    server.session, server.stopped, server.token = session, False, secrets.token_urlsafe(16)
    server.url = f"http://127.0.0.1:{server.server_port}/?token={server.token}"
    return server


def rate_in_browser(session, port=0):
    """Serve the page, whose address is printed, until all is rated, Stop, or Ctrl-C."""
    server = make_server(session, port)
    print(f"open {server.url}\n(q or Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    server.server_close()
