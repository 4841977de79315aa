"""
Web archives to documents: WARC files (ISO 28500), which hold what servers answered, and WET files,
which hold the text of it (Common Crawl has both: commoncrawl.org/get-started).

read_warc(file) and read_wet(file) take an open binary file, packed by gzip or not, and yield a
document for each page; in place of one that is broken, a ValueError that says where and why. They
unpack .warc.gz themselves: each record is a gzip member of its own, so a damaged member costs only
its record. Memory is bounded: a record of more than MAX_BYTES is skipped.
"""

import re
import zlib

from chapters.pages import decode_web, html_to_text

MAX_BYTES = 1 << 26  # of a record, and of its body when unpacked
HEAD_BYTES = 1 << 16  # of the fields before the content
PACKED_BYTES, UNPACKED_BYTES = 1 << 16, 1 << 20  # read and unpacked at a time
LAST_BYTES = 16  # held back until a member's checksum is right: without them no record is whole
MEMBER = b"\x1f\x8b\x08"  # each gzip member begins with it
RECORD = b"\nWARC/"
BLANK_LINE = re.compile(rb"\r?\n\r?\n")
CHUNK = re.compile(rb"(?:\r\n)?([0-9A-Fa-f]{1,8})[ \t]*+(?:;[^\r\n]{0,1000})?\r\n")
CHARSET = re.compile(r"""(?i)charset\s{0,9}=\s{0,9}["']?([\w.:-]{1,40})""")
TEXTS = {"text/html": html_to_text, "application/xhtml+xml": html_to_text, "text/plain": decode_web}

# -----------------------------------------------------------------------------
# Unpacking: from gzip members to bytes.


def unpack_member(file, packed):
    """Yield the content of a gzip member, whose bytes are `packed` and then the file's; return the
    bytes that were read beyond it. An EOFError or a zlib.error for a damaged one."""
    member, last = zlib.decompressobj(wbits=31), b""
    while not member.eof:
        packed = packed or file.read(PACKED_BYTES)
        if not packed:
            raise EOFError("the file ends in it")
        last += member.decompress(packed, UNPACKED_BYTES)
        packed = member.unconsumed_tail
        yield last[:-LAST_BYTES]
        last = last[-LAST_BYTES:]
    yield last
    return member.unused_data


def find_member(file, at):
    """Find the next gzip member from an offset on -> bytes read from its start on; b"" for none."""
    file.seek(at)
    packed = file.read(PACKED_BYTES)
    while (found := packed.find(MEMBER)) < 0:
        block = file.read(PACKED_BYTES)
        if not block:
            return b""
        packed = packed[1 - len(MEMBER):] + block
    return packed[found:]


def unpack(file):
    """Yield the bytes of a file in blocks, unpacked if it is packed; of a damaged gzip member what
    could be unpacked, then a ValueError. The next member may begin anywhere within it."""
    n_wasted, packed = 0, file.read(PACKED_BYTES)
    if not packed.startswith(MEMBER):
        yield packed
        yield from iter(lambda: file.read(UNPACKED_BYTES), b"")
        return
    while packed or (packed := file.read(PACKED_BYTES)):
        start = file.tell() - len(packed)
        try:
            packed = yield from unpack_member(file, packed)
        except (EOFError, zlib.error) as error:
            yield ValueError(f"byte {start:,}: a damaged gzip member ({error})")
            n_wasted += file.tell() - start
            # Many damaged members must not have the same bytes searched each time: linear time.
            packed = find_member(file, start + 1 if n_wasted <= 4 * file.tell() else file.tell())


# -----------------------------------------------------------------------------
# From bytes to records: a head with fields, an empty line, and as much content as a field says.


def parse_fields(head):
    """The fields of a head, without its first line: parse_fields(b"HTTP/1.1 200\\r\\nA: b")
    == {"a": "b"}."""
    lines = re.sub(rb"\r?\n[ \t]+", b" ", head).decode("utf-8", "replace").split("\n")[1:]
    pairs = [line.partition(":") for line in lines]
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class Records:
    """The records of a file, each (number, fields, content); a ValueError for one that is broken,
    after which reading goes on with the next."""

    def __init__(self, file):
        self.blocks, self.data, self.end = unpack(file), bytearray(), None

    def fill(self, n_bytes):
        """Read until self.data has n_bytes, or the file ends (self.end becomes True), or a damaged
        gzip member comes (self.end becomes its error)."""
        while len(self.data) < n_bytes and not self.end:
            block = next(self.blocks, True)
            if isinstance(block, bytes):
                self.data += block
            else:
                self.end = block

    def __iter__(self):
        number = 0
        while self.end is not True:
            self.end = None
            self.fill(1)
            while self.data:
                number += 1
                try:
                    yield number, *self.read()
                except ValueError as error:
                    self.skip()
                    if self.data or self.end is True:  # otherwise self.end says the cause
                        yield ValueError(f"record {number:,}: {error}")
                self.fill(1)
            if self.end is not True:
                yield self.end

    def read(self):
        """Take the record at the start of self.data; ValueError if there is no whole one."""
        self.fill(HEAD_BYTES)
        next_record = self.data.find(RECORD, 0, HEAD_BYTES)
        blank = BLANK_LINE.search(self.data, 0, next_record if next_record > 0 else HEAD_BYTES)
        if not self.data.startswith(RECORD[1:]) or not blank:
            raise ValueError("no head of a WARC record")
        fields, start = parse_fields(self.data[:blank.start()]), blank.end()
        length = fields.get("content-length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise ValueError(f"Content-Length is {length!r:.40}, not a number of bytes")
        if int(length) > MAX_BYTES:
            raise ValueError(f"{int(length):,} bytes, more than {MAX_BYTES:,}")
        stop = start + int(length)
        self.fill(stop + 16)
        if len(self.data) < stop:
            raise ValueError(f"cut off: {len(self.data) - start:,} of {int(length):,} bytes")
        after = self.data[stop:stop + 16]
        n_line_ends = len(after) - len(after.lstrip(b"\r\n"))
        if not RECORD[1:].startswith(after[n_line_ends:n_line_ends + 5]):  # b"" at the end is right
            raise ValueError(f"no record ends after Content-Length, {int(length):,} bytes")
        content = bytes(self.data[start:stop])
        del self.data[:stop + n_line_ends]  # cheap: a bytearray does not move its other bytes
        return fields, content

    def skip(self):
        """Drop the bytes before the next record, or all up to self.end."""
        while (found := self.data.find(RECORD)) < 0:
            del self.data[:1 - len(RECORD)]
            n_bytes = len(self.data)
            self.fill(n_bytes + 1)
            if len(self.data) == n_bytes:
                self.data.clear()
                return
        del self.data[:found + 1]


# -----------------------------------------------------------------------------
# From records to documents.


def join_chunks(body):
    """Undo Transfer-Encoding: chunked: join_chunks(b"2\\r\\nab\\r\\n0\\r\\n\\r\\n") == b"ab". Some
    crawlers undo it but keep the field: a body that begins with no chunk stays as is."""
    content, chunk = bytearray(), CHUNK.match(body)
    if not chunk:
        return body
    while size := int(chunk[1], 16):
        stop = chunk.end() + size
        content += body[chunk.end():stop]
        chunk = CHUNK.match(body, stop)
        if not chunk:
            if stop < len(body):
                raise ValueError(f"no chunk begins at byte {stop:,} of the body")
            break  # cut off by the crawler
    return bytes(content)


def inflate(body, wbits=31):
    """Undo Content-Encoding: gzip. The body may be cut off; one that is not packed stays as is."""
    if wbits == 31 and not body.startswith(MEMBER):
        return body
    content = zlib.decompressobj(wbits=wbits).decompress(body, MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"unpacks to more than {MAX_BYTES:,} bytes")
    return content


def undo_deflate(body):
    """Undo Content-Encoding: deflate, which servers send with and without the header of zlib."""
    has_header = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    return inflate(body, 15 if has_header else -15)


CODINGS = {"": bytes, "identity": bytes, "gzip": inflate, "x-gzip": inflate,
           "deflate": undo_deflate}


def response_text(response):
    """The text of a server's response, "" if it is no page (an error, an image ...)."""
    blank = BLANK_LINE.search(response, 0, HEAD_BYTES)
    head = response[:blank.start() if blank else 0]
    fields = parse_fields(head)
    kind = fields.get("content-type", "")
    to_text = TEXTS.get(kind.partition(";")[0].strip().lower())
    if head.split(b" ", 2)[1:2] != [b"200"] or not to_text:
        return ""
    body = response[blank.end():]
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = join_chunks(body)
    coding = fields.get("content-encoding", "").lower()
    if coding not in CODINGS:
        raise ValueError(f"Content-Encoding {coding:.40}: can undo only gzip and deflate")
    charset = CHARSET.search(kind)
    return to_text(CODINGS[coding](body), charset and charset[1])


def read_records(file, kind, to_text):
    """Yield the text of each record of one WARC-Type, a ValueError for each that is broken."""
    for record in Records(file):
        if isinstance(record, ValueError):
            yield record
            continue
        number, fields, content = record
        try:
            text = to_text(content) if fields.get("warc-type") == kind else ""
        except (ValueError, zlib.error) as error:
            text = ValueError(f"record {number:,}: {error}")
        if text:
            yield text


def read_warc(file):
    """Yield the text of each page in a WARC file."""
    return read_records(file, "response", response_text)


def read_wet(file):
    """Yield the texts in a WET file. A byte that is not UTF-8 arrives as a lone surrogate."""
    return read_records(file, "conversion", lambda text: text.decode("utf-8", "surrogateescape"))
