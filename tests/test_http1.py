"""One table of request heads, decided on purpose; each is parsed whole and then one byte at a time."""
import random

import pytest

from sse_core import http1
from sse_core.http1 import Refusal, parse

H = b"Host: x\r\n"


def get(target: bytes = b"/", fields: bytes = H, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    return b"%b %b %b\r\n%b\r\n" % (method, target, version, fields)


def outcome(pieces) -> object:
    """Feed pieces to the parser as a connection does; return the request, the status of its refusal, or None."""
    buffer, seen = b"", 0
    for piece in pieces:
        buffer += piece
        try:
            parsed = parse(buffer, seen)
        except Refusal as refusal:
            assert refusal.text.endswith(".") and len(refusal.text) < 200
            return refusal.status
        if parsed:
            return parsed[0]
        seen = len(buffer)
    return None


def both_ways(raw: bytes) -> object:
    whole = outcome([raw])
    assert outcome(raw[index:index + 1] for index in range(len(raw))) == whole
    return whole


REFUSED = [
    ("nothing that is HTTP", b"hello\r\n\r\n", 400),
    ("HTTP/0.9", b"GET /\r\n\r\n", 400),
    ("two spaces", b"GET  / HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("tab for a space", b"GET\t/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("space at the end", b"GET / HTTP/1.1 \r\n" + H + b"\r\n", 400),
    ("no target", b"GET HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("space before the method", b" GET / HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("lower-case protocol", get(version=b"http/1.1"), 400),
    ("odd version", get(version=b"HTTP/1.10"), 400),
    ("HTTP/2", get(version=b"HTTP/2.0"), 505),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("HTTP/0.9 spelled out", get(version=b"HTTP/0.9"), 505),
    ("two empty lines before it", b"\r\n\r\n" + get(), 400),
    ("bare LF", b"GET / HTTP/1.1\nHost: x\n\n", 400),
    ("bare LF in a field", get(fields=H + b"A: b\nC: d\r\n"), 400),
    ("bare CR in a field", get(fields=H + b"A: b\rC: d\r\n"), 400),
    ("CR CR LF", get(fields=H + b"A: b\r\r\n"), 400),
    ("NUL in the target", get(b"/\0"), 400),
    ("NUL in a field", get(fields=H + b"A: \0\r\n"), 400),
    ("escape in a field", get(fields=H + b"A: \x1b[2J\r\n"), 400),
    ("DEL in a field", get(fields=H + b"A: \x7f\r\n"), 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ("space before the colon", get(fields=b"Host : x\r\n"), 400),
    ("folded line", get(fields=H + b"A: b\r\n c\r\n"), 400),
    ("folded first line", get(fields=b" Host: x\r\n"), 400),
    ("no colon", get(fields=H + b"nonsense\r\n"), 400),
    ("empty name", get(fields=H + b": x\r\n"), 400),
    ("name with a space", get(fields=H + b"a b: x\r\n"), 400),
    ("name not ASCII", get(fields=H + b"\xc3\xa9: x\r\n"), 400),
    ("no Host", get(fields=b""), 400),
    ("two Hosts", get(fields=H + H), 400),
    ("two Authorizations", get(fields=H + b"Authorization: Bearer a\r\nauthorization: Bearer b\r\n"), 400),
    ("two Last-Event-IDs", get(fields=H + b"Last-Event-ID: 1\r\nLast-Event-ID: 1\r\n"), 400),
    ("two lengths", get(method=b"POST", fields=H + b"Content-Length: 5\r\nContent-Length: 6\r\n"), 400),
    ("the same length twice", get(method=b"POST", fields=H + b"Content-Length: 5\r\nContent-Length: 5\r\n"), 400),
    ("list of lengths", get(method=b"POST", fields=H + b"Content-Length: 5, 5\r\n"), 400),
    ("signed length", get(method=b"POST", fields=H + b"Content-Length: +5\r\n"), 400),
    ("negative length", get(method=b"POST", fields=H + b"Content-Length: -5\r\n"), 400),
    ("hexadecimal length", get(method=b"POST", fields=H + b"Content-Length: 0x5\r\n"), 400),
    ("length with an underscore", get(method=b"POST", fields=H + b"Content-Length: 1_0\r\n"), 400),
    ("length in other digits", get(method=b"POST", fields=H + "Content-Length: ٣\r\n".encode()), 400),
    ("superscript length", get(method=b"POST", fields=H + b"Content-Length: \xb2\r\n"), 400),
    ("empty length", get(method=b"POST", fields=H + b"Content-Length:\r\n"), 400),
    ("endless length", get(method=b"POST", fields=H + b"Content-Length: " + b"9" * 5000 + b"\r\n"), 400),
    ("length and coding", get(method=b"POST", fields=H + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400),
    ("body on GET", get(fields=H + b"Content-Length: 5\r\n"), 400),
    ("coding on GET", get(fields=H + b"Transfer-Encoding: chunked\r\n"), 400),
    ("body on HEAD", get(method=b"HEAD", fields=H + b"Content-Length: 5\r\n"), 400),
    ("no slash", get(b"token"), 400),
    ("star on GET", get(b"*"), 400),
    ("fragment", get(b"/#a"), 400),
    ("broken percent", get(b"/%zz"), 400),
    ("cut percent", get(b"/%4"), 400),
    ("broken percent in the query", get(b"/?a=%"), 400),
    ("path not UTF-8", get(b"/%ff"), 400),
    ("overlong UTF-8", get(b"/%c0%ae"), 400),
    ("query not UTF-8", get(b"/?a=%ff"), 400),
    ("raw bytes in the target", get("/é".encode()), 400),
    ("too many parameters", get(b"/?" + b"&".join([b"a=b"] * 101)), 400),
    ("other scheme", get(b"ftp://x/"), 400),
    ("PUT", get(method=b"PUT"), 405),
    ("DELETE", get(method=b"DELETE"), 405),
    ("CONNECT", get(b"x:443", method=b"CONNECT"), 405),
    ("lower-case method", get(method=b"get"), 501),
    ("unknown method", get(method=b"BREW"), 501),
    ("long target", get(b"/" + b"a" * http1.MAX_LINE), 414),
    ("long line without end", b"A" * 20000, 414),
    ("long head", get(fields=H + b"A: " + b"b" * http1.MAX_HEAD + b"\r\n"), 431),
    ("many fields", get(fields=H + b"A: b\r\n" * http1.MAX_FIELDS), 431),
]


@pytest.mark.parametrize("raw, status", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(raw, status):
    assert both_ways(raw) == status


TAKEN = [
    (get(), {"path": "/", "query": {}, "method": "GET", "version": (1, 1)}),
    (b"\r\n" + get(), {"path": "/"}),
    (get(version=b"HTTP/1.0", fields=b""), {"version": (1, 0), "chunked": False, "fields": {}}),
    (get(version=b"HTTP/1.9"), {"version": (1, 9), "chunked": True}),
    (get(b"/a%20b/%C3%A9"), {"path": "/a b/é"}),
    (get(b"/%2e%2e/%2F"), {"path": "/..//"}),
    (get(b"//token"), {"path": "//token"}),
    (get(b"/%00"), {"path": "/\0"}),
    (get(b"/?channel=a&channel=b+c&x"), {"query": {"channel": ["a", "b c"], "x": [""]}}),
    (get(b"/?a=1&a=2"), {"query": {"a": ["1", "2"]}}),
    (get(b"http://x/token?a=b"), {"path": "/token", "query": {"a": ["b"]}}),
    (get(b"HTTPS://x:443"), {"path": "/"}),
    (get(b"http://x?a=b"), {"path": "/", "query": {"a": ["b"]}}),
    (get(b"*", method=b"OPTIONS"), {"path": "*"}),
    (get(fields=b"HOST:x\r\nA:  b c \t\r\n"), {"fields": {"host": "x", "a": "b c"}}),
    (get(fields=H + b"A:\r\n"), {"fields": {"host": "x", "a": ""}}),
    (get(fields=H + b"A: \xe9\r\n"), {"fields": {"host": "x", "a": "é"}}),
    (get(fields=H + b"Accept: text/html\r\nAccept: */*\r\n"), {"fields": {"host": "x", "accept": "text/html, */*"}}),
    (get(fields=H + b"Content-Length: 0\r\n"), {"method": "GET"}),
    (get(method=b"POST", fields=H + b"Content-Length: 007\r\n"), {"body_length": 7, "keeps_alive": True}),
    (get(method=b"POST", fields=H + b"Connection: Close\r\n"), {"keeps_alive": False}),
    (get(method=b"POST", fields=b"Content-Length: 1\r\n", version=b"HTTP/1.0"), {"keeps_alive": False}),
    (get(fields=H + b"Authorization: bearer  t0k3n \r\n"), {"bearer": "t0k3n"}),
    (get(fields=H + b"Authorization: Basic t0k3n\r\n"), {"bearer": None}),
    (get(b"/?lastEventId=1-0"), {"last_id": "1-0"}),
    (get(b"/?lastEventId=1-0", fields=H + b"Last-Event-ID: 2-0\r\n"), {"last_id": "2-0"}),
    (get(fields=H + b"Last-Event-ID:\r\n"), {"last_id": ""}),
    (get(b"/" + b"a" * 7980), {"path": "/" + "a" * 7980}),
    (get(fields=H + b"A: b\r\n" * 99), {"method": "GET"}),
]


@pytest.mark.parametrize("raw, wanted", TAKEN, ids=lambda value: repr(value)[:40])
def test_taken(raw, wanted):
    request = both_ways(raw)
    assert {name: getattr(request, name) for name in wanted} == wanted
    for cut in range(min(len(raw), 200)):
        assert outcome([raw[:cut]]) is None
    rest = b"\0\xff pipelined"
    assert parse(raw + rest) == (request, len(raw))


def test_a_token_counts_by_path_or_bearer():
    tokens = [b"one", "zwei é".encode()]
    for raw, known in ((get(b"/one"), True), (get(b"/zwei%20%C3%A9"), True), (get(b"/on"), False), (get(b"/one/"), False),
                       (get(b"//one"), False), (get(b"/"), False), (get(b"/?one"), False),
                       (get(b"/x", H + b"Authorization: Bearer one\r\n"), True),
                       (get(b"/x", H + b"Authorization: Bearer One\r\n"), False)):
        assert outcome([raw]).has_token(tokens) is known


def mutated(draw: random.Random) -> bytes:
    """A head from the tables with some bytes changed, cut, doubled or swapped for those that matter."""
    raw = bytearray(draw.choice([case[1] for case in REFUSED] + [case[0] for case in TAKEN])[:1500])
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(raw) + 1)
        raw[at:at + draw.randrange(3)] = draw.choice(
            [b"", b"\r", b"\n", b"\r\n", b"\0", b" ", b":", b"%", b"\xff", b"\r\n\r\n", bytes([draw.randrange(256)])])
    return bytes(raw)


def test_fuzz_the_parser(request):
    """Whatever comes: a request, a refusal, or more bytes wanted; and the same however it is cut."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    for _ in range(request.config.getoption("fuzz") * 3000):
        raw = mutated(draw)
        whole = outcome([raw])
        cuts = sorted(draw.randrange(len(raw) + 1) for _ in range(draw.randrange(6)))
        pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)])]
        assert outcome(pieces) == whole, f"seed {seed}: {raw!r} in {pieces!r}"
        assert whole is None or isinstance(whole, http1.Request) or whole in (400, 405, 414, 431, 501, 505)
