"""
Blind rating by people: two models go in, you say which answer is better without knowing whose it
is; out come rows that preference training can learn from, the win rate, and Elo ratings.

    python -m chapters.rate runs/a runs/b                # in the terminal
    python -m chapters.rate runs/a runs/b --page         # in the browser, on this machine only
    python -m chapters.rate --votes=votes.jsonl          # the report alone, over all votes

A row of votes.jsonl has a prompt, who was shown ("shown", the first on the left), the winner (one
of the two, tie or skip), and if there is one, the answers: {"prompt", "chosen", "rejected"}. The
same command again goes on where it stopped; no question comes twice.
"""

import html
import http.server
import json
import math
import random
import re
import secrets
import shutil
import textwrap
import threading
from itertools import combinations, zip_longest
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from tokenizer import Parser, replacing, run_command, share_cores

if __name__ == "__main__":
    share_cores()

from chapters.dialogue import percent, share
from chapters.judge import is_question, read_jsonl, read_questions, win_rate
from chapters.talk import Run, add_contestants, open_all
from evaluate import held_out
from sample import warn

KEYS = {"a": 0, "b": 1, "t": "tie", "s": "skip"}
LARGEST_VOTE = 4096      # bytes of a form
BEGINNING = 12           # words of a paragraph that a base model goes on from

# -----------------------------------------------------------------------------
# Votes: a .jsonl file, a row for each.


def read_votes(path):
    """The rows of a file of votes; none if there is no file. ValueError for a row that is none."""
    rows = []
    for number, row in read_jsonl(path) if Path(path).exists() else ():
        shown = row.get("shown") if isinstance(row, dict) else None
        whole = (isinstance(shown, list) and len(shown) == 2 and shown[0] != shown[1]
                 and all(isinstance(name, str) for name in [*shown, row.get("prompt")])
                 and row.get("winner") in [*shown, "tie", "skip"])
        if not whole:
            raise ValueError(f"{path}, line {number} is no vote of this command, with prompt, two "
                             f"names in shown, and winner: {row!r:.80}")
        rows.append(row)
    return rows


def make_vote(prompt, shown, answers, vote, seed):
    """A row: shown are the names in the order of the answers, vote is 0, 1, tie or skip."""
    row = dict(prompt=prompt)
    if vote in (0, 1):
        row |= dict(chosen=answers[vote], rejected=answers[1 - vote])
    return row | dict(shown=list(shown), winner=shown[vote] if vote in (0, 1) else vote, seed=seed)


def append_vote(path, row):
    """Add a row to the file. It is written anew: a power cut or a full disk leaves no half row."""
    before = Path(path).read_bytes() if Path(path).exists() else b""
    line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")
    with replacing(path) as file:
        file.write(before + (b"" if before[-1:] in (b"", b"\n") else b"\n") + line + b"\n")


# -----------------------------------------------------------------------------
# Ratings: who wins against whom to one number each.


def count_wins(rows, names):
    """(n, n): how often each of n names, the row, beat each other, the column; ties are half."""
    wins, place = np.zeros((len(names), len(names))), {name: i for i, name in enumerate(names)}
    for row in rows:
        a, b = row["shown"]
        share_a = 0.5 if row["winner"] == "tie" else float(row["winner"] == a)
        wins[place[a], place[b]] += share_a
        wins[place[b], place[a]] += 1 - share_a
    return wins


def bradley_terry(wins, n_steps=1000):
    """-> Elo ratings (n,) of a table of wins (n, n), mean 1000, and how far their 95% intervals
    reach to each side (n,).

    A beats B with chance 1 / (1 + 10^((B - A) / 400)), the Bradley-Terry model, fitted by Hunter's
    steps (doi:10.1214/aos/1079120141); the intervals come from the curvature of its likelihood. One
    tie between each two is added, or who has won all would be rated infinite.
    """
    n = len(wins)
    wins, strength = wins + 0.5 * (1 - np.eye(n)), np.ones(n)
    games = wins + wins.T                                                # (n, n)
    for _ in range(n_steps):
        strength = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    chance = strength[:, None] / (strength[:, None] + strength)
    curvature = -games * chance * chance.T
    curvature -= np.diag(curvature.sum(1))
    errors = np.sqrt(np.diag(np.linalg.pinv(curvature)))
    return 1000 + 400 * np.log10(strength), 1.96 * 400 / math.log(10) * errors


def elo(rows):
    """{name: value, low, high} for votes that are no skips, the best first, as the leaderboard of
    Chatbot Arena rates (arXiv:2403.04132)."""
    names = sorted({name for row in rows for name in row["shown"]})
    values, reach = bradley_terry(count_wins(rows, names))
    return {names[i]: dict(value=values[i], low=values[i] - reach[i], high=values[i] + reach[i])
            for i in np.argsort(-values)}


def report(rows):
    """All that the votes say, as lines."""
    voted = [row for row in rows if row["winner"] != "skip"]
    if not voted:
        return [f"no votes yet, {len(rows)} skipped"]
    lines = [f"{len(voted)} votes, {len(rows) - len(voted)} skipped"]
    for a, b in combinations(sorted({name for row in voted for name in row["shown"]}), 2):
        winners = [{a: "A", b: "B"}.get(row["winner"], "tie") for row in voted
                   if {a, b} == {*row["shown"]}]
        if winners:
            counts = [winners.count(name) for name in ("A", "B", "tie")]
            lines.append("{} against {}: {} wins, {} losses, {} ties, win rate {}".format(
                a, b, *counts, percent(win_rate(winners))))
    lines += [f"  Elo {score['value']:6.0f} [{score['low']:.0f}, {score['high']:.0f}]  {name}"
              for name, score in elo(voted).items()]
    left = [row["winner"] == row["shown"][0] for row in voted if row["winner"] != "tie"]
    return [*lines, f"the first shown was chosen {percent(share(left))}; intervals are of 95%, "
            "ties count half"]


# -----------------------------------------------------------------------------
# A session: which question is next, and what the vote on it is.


class Session:
    """Prompts, two models {name: model}, a file of votes. `now` is (number, prompt, names as shown,
    their answers), or None at the end; vote(number, vote) saves and goes on."""

    def __init__(self, models, prompts, path, seed):
        self.models, self.path, self.seed, self.lock = models, Path(path), seed, threading.Lock()
        done = {row["prompt"] for row in read_votes(path) if {*row["shown"]} == {*models}}
        self.prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
        self.n, self.start = len(done) + len(self.prompts), len(done)
        self.next(0)

    def next(self, number):
        """Ask both the question of this number. Who stands first depends on seed and prompt alone;
        two answers that are equal are a tie that nobody need be asked about."""
        self.now = None
        for number in range(number, len(self.prompts)):
            prompt, shown = self.prompts[number], sorted(self.models)
            random.Random(f"{self.seed} {prompt}").shuffle(shown)
            ask = [dict(role="user", content=prompt)]
            answers = [self.models[name].answer(ask) for name in shown]
            if answers[0] != answers[1]:
                self.now = number, prompt, shown, answers
                return
            append_vote(self.path, make_vote(prompt, shown, answers, "tie", self.seed))

    def vote(self, number, vote):
        """Save a vote, unless it is for another question than that of now, as a second click is."""
        with self.lock:
            if self.now is not None and self.now[0] == number:
                append_vote(self.path, make_vote(*self.now[1:], vote, self.seed))
                self.next(number + 1)


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
        while key not in {*KEYS, "q"}:
            try:
                key = input("\nbetter: a or b, t tie, s skip, q stop > ").strip().lower()[:1]
            except EOFError:
                key = "q"
        if key == "q":
            return
        session.vote(number, KEYS[key])


# -----------------------------------------------------------------------------
# In the browser: a page from this machine for this machine, which loads nothing from elsewhere.

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
BUTTONS = {"a": "A is better", "b": "B is better", "t": "Tie", "s": "Skip", "q": "Stop"}


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


class Handler(http.server.BaseHTTPRequestHandler):
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
            lines = "\n".join(report(read_votes(session.path)))
            body = f"<h2>Thank you</h2><pre>{html.escape(lines)}</pre>"
        self.send(200, body)
        if over:
            threading.Thread(target=self.server.shutdown).start()

    def do_GET(self):
        why = self.refusal()
        if why:
            self.send(403, why)
        elif urlsplit(self.path).path != "/":
            self.send(404, "there is no such page")
        else:
            self.show()

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        why = self.refusal()
        if why or not length.isdecimal() or int(length) > LARGEST_VOTE:
            self.send(403 if why else 400, why or "this is no vote")
            self.close_connection = True
            return
        form = parse_qs(self.rfile.read(int(length)).decode(errors="replace"))
        number, vote = (form.get(name, [""])[0] for name in ("number", "vote"))
        if vote == "q":
            self.server.stopped = True
        elif vote in KEYS and number.isdecimal():
            try:
                self.server.session.vote(int(number), KEYS[vote])
            except ValueError as error:  # the next question cannot be answered
                warn(error)
        self.send(303, "", Location=f"/?token={self.server.token}")


def make_server(session, port=0):
    """A server of the page on 127.0.0.1, with the address to open in .url; port 0 is a free one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True  # a browser keeps connections open
    server.session, server.stopped, server.token = session, False, secrets.token_urlsafe(16)
    server.url = f"http://127.0.0.1:{server.server_port}/?token={server.token}"
    return server


# -----------------------------------------------------------------------------
# The command.


def read_prompts(path):
    """One prompt a line, or a .jsonl with "prompt", or MT-Bench's questions, their first turns."""
    if Path(path).suffix != ".jsonl":
        prompts = Path(path).read_text("utf-8-sig", "replace").splitlines()
    else:
        prompts = [row["turns"][0] if is_question(row) else
                   isinstance(row, dict) and row.get("prompt") for _, row in read_jsonl(path)]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path}: each row must be like {{\"prompt\": \"What is 1 + 1?\"}}")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts, one a line")
    return prompts


def beginnings(folder, tokenizer, n):
    """The first words of n paragraphs, from all over the text that the run's training held out."""
    _, tokens = held_out(folder, tokenizer, None, 1 << 20)
    texts = tokenizer.decode(tokens.tolist()).split(tokenizer.decode([tokenizer.eot]))
    blocks = (block.split(" ") for text in texts for block in re.split(r"\n\s*\n", text.strip()))
    starts = [*dict.fromkeys(" ".join(words[:BEGINNING]) for words in blocks if len(words) > 2)]
    if not starts or n < 1:
        raise ValueError(f"no beginnings to go on from (n_prompts={n}): give --prompts=FILE")
    return starts[::math.ceil(len(starts) / n)]


def pick_prompts(options, models):
    """Those of --prompts; for two base models that go on with a text the beginnings of held-out
    paragraphs, else the questions of the judge."""
    if options.prompts:
        return read_prompts(options.prompts)
    model = models[options.contestants[0]]
    if all(isinstance(model, Run) and model.template == "text" for model in models.values()):
        return beginnings(options.contestants[0], model.tokenizer, options.n_prompts)
    return [question["turns"][0] for question in read_questions()]


def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("contestants", nargs="*", help="two run folders or URLs; none for the report alone")
    add("--prompts", help="a file with one prompt a line, or a .jsonl with \"prompt\" (default: "
        "questions, or for base models beginnings of held-out text)")
    add("--n_prompts", type=int, default=50, help="beginnings to take (default %(default)s)")
    add("--votes", default="votes.jsonl", help="the file of votes (default %(default)s)")
    add("--page", action="store_true", help="rate in the browser, not in the terminal")
    add("--port", type=int, default=0, help="of the page (default: a free one)")
    add_contestants(parser)
    return parser.parse_args()


def main():
    options = parse_options()
    rows, options.contestants = read_votes(options.votes), [
        name.rstrip("/") for name in options.contestants]  # runs/a/ is runs/a
    if len(options.contestants) not in (0, 2) or len({*options.contestants}) == 1:
        raise ValueError(f"two different models are rated, and these are {options.contestants}")
    if not options.contestants and not rows:
        raise ValueError(f"{options.votes} holds no votes: name two runs to rate")
    if options.contestants:
        models = dict(zip(options.contestants, open_all(options.contestants, options, base="text")))
        session = Session(models, pick_prompts(options, models), options.votes, options.seed)
        if options.page and session.now is not None:
            server = make_server(session, options.port)
            print(f"open {server.url}\n(q or Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
            server.server_close()
        else:
            rate_in_terminal(session)
    print("\n".join(report(read_votes(options.votes))))
    if options.contestants:
        print("votes:", options.votes)


if __name__ == "__main__":
    run_command(main)
