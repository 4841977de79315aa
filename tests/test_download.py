"""Facts about data.download: a hostile server, on this machine, gets nothing past it."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data

TEXT = "".join(f"line {i} of a text to download\n" for i in range(9000)).encode()
SHA256 = hashlib.sha256(TEXT).hexdigest()


class Hostile(BaseHTTPRequestHandler):
    """Each path behaves badly in its own way; server.asked lists (path, first byte asked for)."""

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append((self.path, start))
        times = sum(path == self.path for path, _ in self.server.asked)
        getattr(self, self.path.strip("/").partition(".")[0], self.missing)(start, times)

    def send(self, body, status=206, length=None, type="text/plain"):
        self.send_response(status)
        self.send_header("Content-Length", len(body) if length is None else length)
        self.send_header("Content-Type", type)
        self.end_headers()
        self.wfile.write(body)

    def missing(self, start, times):
        self.send_error(404)

    def truncating(self, start, times):  # 100,000 bytes at a time
        self.send(TEXT[start:start + 100_000], length=len(TEXT) - start)

    def stalling(self, start, times):
        self.send(TEXT[start:start + 100_000], length=len(TEXT) - start)
        if times == 1:
            self.wfile.flush()
            time.sleep(1)

    def too_long(self, start, times):  # says 10 bytes more than it has
        self.send(TEXT[start:], length=len(TEXT) - start + 10)

    def too_short(self, start, times):  # says half of what it has
        self.send(TEXT[start:], length=len(TEXT) // 2)

    def busy(self, start, times):
        if times < 3:
            return self.send_error(503)
        self.send(TEXT[start:])

    def shrunk(self, start, times):
        if start > len(TEXT):
            return self.send_error(416)
        self.send(TEXT[start:])

    def broken(self, start, times):
        self.send_error(500)

    def moved(self, start, times):
        self.send_response(302)
        self.send_header("Location", "/truncating.txt")
        self.end_headers()

    def circle(self, start, times):
        self.send_response(302)
        self.send_header("Location", f"/circle.txt?{times}")
        self.end_headers()

    def to_a_file(self, start, times):
        self.send_response(302)
        self.send_header("Location", "file:///etc/passwd")
        self.end_headers()

    def changing(self, start, times):  # another text after the first part
        body = TEXT if times == 1 else TEXT[::-1]
        self.send(body[start:start + 150_000 if times == 1 else None], length=len(body) - start)

    def from_zero(self, start, times):  # says 206 and begins at the first byte whatever was asked
        self.send(TEXT[:150_000] if times == 1 else TEXT, length=len(TEXT))

    def whole(self, start, times):  # knows no ranges
        self.send(TEXT[:150_000] if times == 1 else TEXT, 200, length=len(TEXT))

    def page(self, start, times):
        self.send(b"<p>not found", 200, type="text/html; charset=utf-8")

    def garbage(self, start, times):
        self.wfile.write(b"\0\1\2 no HTTP at all\r\n\r\n")

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "WAITS", (0, 0, 0))
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", "truncating stalling busy moved from_zero whole".split())
def test_whatever_a_server_does_on_the_way_the_file_is_whole(server, tmp_path, name):
    path = data.download(f"{server.url}/{name}.txt", tmp_path / "a.txt", SHA256)
    assert path.read_bytes() == TEXT and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    if name == "truncating":  # it went on where it had stopped
        assert [start for _, start in server.asked][:2] == [0, 100_000 - 2**16]


def test_a_text_that_changes_on_the_way_is_not_put_together_from_two(server, tmp_path):
    path = data.download(f"{server.url}/changing.txt", tmp_path / "a.txt")
    assert path.read_bytes() == TEXT[::-1]


@pytest.mark.parametrize("name, message, left", [
    ("too_long", "cut off at", ["a.txt.part"]), ("too_short", "sha256", []),
    ("missing", "404", []), ("broken", "500", []), ("circle", "redirect", []),
    ("to_a_file", "redirect|not allowed", []), ("page", "is a web page", []),
    ("garbage", "BadStatusLine|\x00|start again", [])])
def test_what_cannot_be_had_is_one_line_and_no_file(server, tmp_path, name, message, left):
    with pytest.raises(ValueError, match=message) as error:
        data.download(f"{server.url}/{name}.txt", tmp_path / "a.txt", SHA256)
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == left


def test_no_address_leads_out_of_the_folder(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "download", lambda url, path, sha256=None: path)
    for words in ("/../../etc/passwd", "/..%2F..%2Fetc%2Fpasswd", "/a/..\\..\\x.txt", "/", "/..",
                  "/.hidden", "/con.txt?x=/../y", "/" + "long" * 99 + ".txt"):
        [path] = data.find_files(server.url + words, tmp_path)
        assert path.parent == tmp_path and path.suffix == ".txt"
        assert path.name[8] == "-" and not set(path.name) & set("/\\:?*%")
        assert len(path.name) <= 120


def test_a_part_longer_than_the_file_has_become_is_not_asked_for_again_and_again(server, tmp_path):
    for name in "busy", "shrunk":
        (tmp_path / f"{name}.txt.part").write_bytes(TEXT + b"x" * 2**18)
    for name in "busy", "shrunk":
        path = data.download(f"{server.url}/{name}.txt", tmp_path / f"{name}.txt", SHA256)
        assert path.read_bytes() == TEXT


def test_spaces_and_letters_of_all_languages_in_an_address_are_quoted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "fetch", lambda url, part, is_page: [asked.append(url),
                                                                   part.write_bytes(TEXT)])
    data.download("http://a.org/my b\u00e9%20c.txt?q=1&r=[2]#d", tmp_path / "a.txt")
    assert asked == ["http://a.org/my%20b%C3%A9%20c.txt?q=1&r=[2]#d"]
