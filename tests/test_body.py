"""A table of bodies, decided on purpose; each is decoded whole, a byte at a time, and at random."""
import random
import time

import pytest

from sse_core.http.body import MAX_IGNORED, Body
from sse_core.engine.frames import MAX_EVENT
from sse_core.errors import HTTPError

HELLO = b"5\r\nhello\r\n"
END = b"0\r\n\r\n"


def outcome(length, pieces) -> object:
    """Feed pieces to a decoder; return body and what follows, the status of a refusal, or None."""
    follows = None
    try:
        body = Body(length)
        for piece in pieces:
            if follows is None:
                follows = body.feed(piece)
            else:
                follows += piece
    except HTTPError as http_error:
        assert http_error.text.endswith(".") and len(http_error.text) < 200
        return http_error.status
    return None if follows is None else (bytes(body.data), follows)


def in_bytes(raw: bytes) -> list:
    return [raw[index:index + 1] for index in range(len(raw))]


def ignored(size: int) -> bytes:
    """A chunked body with so many bytes of extensions and trailers."""
    return b"5;" + b"x" * (MAX_IGNORED // 2 - 1) + b"\r\nhello\r\n0\r\na:" + \
        b"y" * (size - MAX_IGNORED // 2 - 6) + b"\r\n\r\n"


TAKEN = [
    ("nothing", END, b""),
    ("one chunk", HELLO + END, b"hello"),
    ("two chunks", HELLO + b"1\r\n!\r\n" + END, b"hello!"),
    ("size in capitals", b"A\r\n0123456789\r\n" + END, b"0123456789"),
    ("size in small letters", b"a\r\n0123456789\r\n" + END, b"0123456789"),
    ("size with zeros before", b"0000000000000005\r\nhello\r\n0000\r\n\r\n", b"hello"),
    ("data that look like chunks", b"a\r\n\r\n0\r\n\r\n\0\n\r\r\n" + END, b"\r\n0\r\n\r\n\0\n\r"),
    ("extension", b"5;a=b;c\r\nhello\r\n0;d\r\n\r\n", b"hello"),
    ("extension with blanks", b"5 \t; a = \"b;\xff\"\r\nhello\r\n" + END, b"hello"),
    ("empty extension", b"5;\r\nhello\r\n" + END, b"hello"),
    ("trailers", HELLO + b"0\r\nA: b\r\nC:\t\xff\r\n\r\n", b"hello"),
    ("trailer that would decide", HELLO + b"0\r\nContent-Length: 9\r\n\r\n", b"hello"),
    ("the longest extensions and trailers", ignored(MAX_IGNORED - 1), b"hello"),
    ("the longest body", b"100000\r\n" + b"x" * MAX_EVENT + b"\r\n" + END, b"x" * MAX_EVENT),
]
REFUSED = [
    ("no size", b"\r\nhello\r\n", 400),
    ("not chunked", b"hello", 400),
    ("JSON", b"{", 400),
    ("size is a word", b"five\r\n", 400),
    ("hexadecimal prefix", b"0x5\r\nhello\r\n", 400),
    ("signed size", b"+5\r\nhello\r\n", 400),
    ("negative size", b"-5\r\nhello\r\n", 400),
    ("size with an underscore", b"1_0\r\n", 400),
    ("size in other digits", "٣\r\n".encode(), 400),
    ("blank before the size", b" 5\r\nhello\r\n", 400),
    ("blank after the size", b"5 \r\nhello\r\n", 400),
    ("two sizes", b"5, 5\r\n", 400),
    ("size of 17 digits", b"0" * 16 + b"5\r\nhello\r\n", 400),
    ("bare LF after the size", b"5\nhello\r\n", 400),
    ("bare CR after the size", b"5\rhello\r\n", 400),
    ("bare LF in an extension", b"5;a\nhello\r\n", 400),
    ("bare CR in an extension", b"5;a\rb\r\nhello\r\n", 400),
    ("CR CR LF", b"5\r\r\n", 400),
    ("NUL in an extension", b"5;\0\r\n", 400),
    ("bare LF after the data", b"5\r\nhello\n" + END, 400),
    ("bare CR after the data", b"5\r\nhello\r" + END, 400),
    ("nothing after the data", b"5\r\nhello" + END, 400),
    ("chunk longer than it says", b"4\r\nhello\r\n" + END, 400),
    ("chunk shorter than it says", b"6\r\nhello\r\n" + END, 400),
    ("a line more", HELLO + b"\r\n" + END, 400),
    ("bare LF at the end", b"0\n\n", 400),
    ("bare LF for the last line", b"0\r\n\n", 400),
    ("trailer without a colon", b"0\r\nhello\r\n\r\n", 400),
    ("trailer without a name", b"0\r\n: x\r\n\r\n", 400),
    ("trailer with a space before the colon", b"0\r\na : x\r\n\r\n", 400),
    ("folded trailer", b"0\r\na: b\r\n c\r\n\r\n", 400),
    ("NUL in a trailer", b"0\r\na: \0\r\n\r\n", 400),
    ("bare LF in a trailer", b"0\r\na: b\n\r\n", 400),
    ("a request for a trailer", b"0\r\nGET / HTTP/1.1\r\n\r\n", 400),
    ("long extensions and trailers", ignored(MAX_IGNORED + 1), 400),
    ("endless extension", b"5;" + b"a" * MAX_IGNORED, 400),
    ("endless trailer", b"0\r\na:" + b"b" * MAX_IGNORED, 400),
    ("many trailers", b"0\r\n" + b"a:\r\n" * MAX_IGNORED, 400),
    ("many extensions", b"1;a\r\nx\r\n" * MAX_IGNORED, 400),
    ("long chunk", b"100001\r\n", 413),
    ("endless chunk", b"f" * 16 + b"\r\n", 413),
    ("many chunks", b"80000\r\n" + b"x" * (MAX_EVENT // 2) + b"\r\n80001\r\n", 413),
]


@pytest.mark.parametrize("raw, data", [case[1:] for case in TAKEN], ids=[case[0] for case in TAKEN])
def test_taken(raw, data):
    wanted = data, b"follows"
    assert outcome(None, [raw + b"follows"]) == outcome(None, [raw, b"follows"]) == wanted
    if len(raw) < 3 * MAX_IGNORED:
        assert outcome(None, in_bytes(raw + b"follows")) == wanted
        assert all(outcome(None, [raw[:cut]]) is None for cut in range(len(raw)))


@pytest.mark.parametrize("raw, status", [case[1:] for case in REFUSED],
                         ids=[case[0] for case in REFUSED])
def test_refused(raw, status):
    assert outcome(None, [raw]) == status
    assert outcome(None, in_bytes(raw)) == status


def test_a_body_of_known_length_ends_there():
    for pieces in ([b"helloPOST"], in_bytes(b"helloPOST"), [b"hello", b"POST"]):
        assert outcome(5, pieces) == (b"hello", b"POST")
        assert outcome(0, pieces) == (b"", b"helloPOST")
        assert outcome(10, pieces) is None
    assert outcome(0, [b""]) == (b"", b"")
    assert outcome(MAX_EVENT, []) is None and outcome(MAX_EVENT + 1, []) == 413


def test_a_chunk_that_does_not_end_where_it_says_is_refused_at_once():
    """And not when the line would be there: its sender may wait for an answer."""
    body = Body(None)
    assert body.feed(b"4\r\nhell") is None
    with pytest.raises(HTTPError):
        body.feed(b"o")


def test_fuzz_of_bodies_in_any_chunks_and_pieces(request):
    """Random data in random chunks arrive as they were; damaged ones are the same in any pieces."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    for _ in range(request.config.getoption("fuzz") * 1000):
        parts = [bytes(draw.choice(b"\r\n0;:a\xff") for _ in range(draw.randrange(1, 30)))
                 for _ in range(draw.randrange(8))]
        raw = bytearray(b"".join(b"%x%b\r\n%b\r\n" % (len(part), draw.choice([b"", b";a=b"]), part)
                                 for part in parts) + draw.choice([END, b"0\r\na: b\r\n\r\n"]))
        wanted = b"".join(parts), b""
        if draw.random() < 0.5:
            at = draw.randrange(len(raw))
            raw[at:at + draw.randrange(3)] = draw.choice([b"", b"\r", b"\n", b";", b"1", b"\r\n"])
            wanted = outcome(None, [bytes(raw)])
        cuts = sorted(draw.randrange(len(raw) + 1) for _ in range(draw.randrange(8)))
        pieces = [bytes(raw[start:end]) for start, end in zip([0, *cuts], [*cuts, len(raw)])]
        assert outcome(None, pieces) == wanted, f"seed {seed}: {bytes(raw)!r} in {pieces!r}"


def test_bodies_made_to_be_slow_are_not():
    """What is left of a piece is not copied for each of its chunks."""
    began = time.process_time()
    chunks = b"10\r\n" + b"x" * 16 + b"\r\n"
    assert outcome(None, [chunks * 60_000 + END]) == (b"x" * 960_000, b"")
    assert outcome(None, [b"1\r\nx\r\n" * 4000 + END]) == (b"x" * 4000, b"")
    assert outcome(None, [b"1\r\nx\r\n" * 4200 + END]) == 400       # 1 MiB of it took 2.4 s
    for raw in (b"5" + b" " * 4000, b"5;" + b" " * 4000, b"0\r\n" + b"a" * 4000):
        assert outcome(None, in_bytes(raw)) is None
    assert time.process_time() - began < 2.0
