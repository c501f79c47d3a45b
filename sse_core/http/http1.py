"""Turn bytes into a request or a refusal, and an answer into bytes: what is spoken of HTTP/1.1.

No socket, no thread and no clock in here. `parse` is strict, because requests are smuggled through
what two parsers read differently (RFC 9112 section 11.2). It is small and fast: one regular
expression tells whether a head is one, and of its fields only what is used is taken apart.
"""
from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

from sse_core.errors import Refusal

MAX_LINE = 8000             # bytes of the request line: what RFC 9112 section 3 wants supported
MAX_HEAD = 16 << 10         # bytes of request line and fields
MAX_FIELDS = 100            # as http.client has it
MAX_ASKED = 2048            # characters of the names of fields that a preflight asks for
MAX_LAST_ID = 64            # characters: no id is longer
METHODS = ("GET", "HEAD", "OPTIONS", "POST")
KNOWN_METHODS = (*METHODS, "PUT", "DELETE", "PATCH", "TRACE", "CONNECT")

# These take linear time: what a star takes, nothing that follows it could take
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
VALUE = rb"[\t -~\x80-\xff]*"
_HEAD = re.compile(rb"(%b) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r(\n(?:%b:%b\r\n){0,%d})"
                   % (TOKEN, TOKEN, VALUE, MAX_FIELDS))
_BAD_BYTE = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
_NAME = r"[\w.~!$&'()*+,;=-]*"          # RFC 3986 section 3.2.2
_HOST = re.compile(rf"(?!:)({_NAME}(%[0-9A-Fa-f]{{2}}{_NAME})*|\[([0-9A-Fa-f]{{0,4}}:){{2,8}}"
                   r"[0-9A-Fa-f.]*\])(:[0-9]*)?", re.ASCII)
_ZERO = re.compile(r"q=0(\.0*)?")
_SINGLE = "host|content-length|transfer-encoding|authorization|origin|last-event-id|expect"
_KNOWN = re.compile(rf"\n({_SINGLE}|accept|connection|content-type|content-encoding|cookie):"
                    r"([^\r]*)", re.ASCII | re.IGNORECASE)
_ANY = re.compile(r"\n([^:]+):([^\r]*)")

# At most 64 names of fields
_NAMES = re.compile("{0}(?:[ \t]*,[ \t]*{0}){{0,63}}".format(TOKEN.decode()))


class Request(NamedTuple):
    """The head of one request. Names of fields are lower-case, values each byte a character."""
    method: str
    path: str                       # percent-decoded, UTF-8
    query: dict[str, list[str]]     # percent-decoded, in order
    version: tuple[int, int]
    known: dict[str, str]           # the fields that this server reads
    lines: str                      # all fields, as they came

    @property
    def fields(self) -> dict[str, str]:
        """All fields, taken apart anew each time: for programs."""
        return _take_apart(_ANY, self.lines)

    def parameter(self, name: str) -> str | None:
        """Return the last value that the query gives to `name`, or None."""
        return self.query[name][-1] if name in self.query else None

    @property
    def chunked(self) -> bool:
        """Whether the client understands the chunked coding: not before HTTP/1.1."""
        return self.version >= (1, 1)

    @property
    def bearer(self) -> str | None:
        """The token of `Authorization: Bearer TOKEN` (RFC 6750), or None."""
        scheme, _, token = self.known.get("authorization", "").partition(" ")
        return token.strip(" \t") if scheme.lower() == "bearer" else None

    def has_token(self, tokens: Iterable[bytes]) -> bool:
        """Say whether path or bearer token is one of these.

        How long it takes does not tell which, nor how nearly.
        """
        given = [self.path[1:].encode()]
        if self.bearer is not None:
            given.append(self.bearer.encode("latin-1"))
        return any([hmac.compare_digest(token, each) for token in tokens for each in given])

    @property
    def body_length(self) -> int | None:
        """The bytes of a POST's body; None: it comes in chunks. Raises Refusal if it has no end."""
        if "transfer-encoding" in self.known:
            return None
        if "content-length" not in self.known:
            raise Refusal(411, "Send a Content-Length, or Transfer-Encoding: chunked.")
        return int(self.known["content-length"])

    @property
    def keeps_alive(self) -> bool:
        """Whether the client may send another request here (RFC 9112 section 9.3)."""
        return self.chunked and "close" not in _items(self.known.get("connection", ""))

    @property
    def asked_fields(self) -> str | None:
        """The names of fields that a preflight asks for (WHATWG Fetch, CORS protocol).

        None if it asks for none, for too many, or for what is no name.
        """
        names = self.fields.get("access-control-request-headers", "")
        return names if len(names) <= MAX_ASKED and _NAMES.fullmatch(names) else None

    @property
    def last_id(self) -> str | None:
        """The id after which the client goes on: Last-Event-ID, else ?lastEventId= of polyfills.

        Empty means none: it is the value that a client begins with (WHATWG HTML section 9.2.2). One
        that is too long for an id is unknown, and is not kept.
        """
        header = self.known.get("last-event-id", "").encode("latin-1").decode(errors="replace")
        given = header or self.parameter("lastEventId") or None
        return "(too long)" if given and len(given) > MAX_LAST_ID else given

    def accepts(self, media_type: str) -> bool:
        """Say whether Accept names this media type, and not with a weight of 0."""
        accept = self.known.get("accept", "").lower()
        if media_type not in accept:
            return False
        named = [_items(each, ";") for each in _items(accept) if each.startswith(media_type)]
        return any(name == media_type and not any(map(_ZERO.fullmatch, parameters))
                   for name, *parameters in named)


def _items(text: str, separator: str = ",") -> list[str]:
    return [item.strip(" \t") for item in text.lower().split(separator)]


def parse(buffer: bytes, seen: int = 0) -> tuple[Request, int] | None:
    """Parse the request head at the start of `buffer`; `seen` bytes of it were looked at before.

    Returns the request and the length of its head in bytes, or None if more bytes are needed.
    Raises Refusal for what is wrong as soon as it is seen, however the bytes arrived. Takes
    linear time.
    """
    # The head goes from `start` to `end`, the request line to `line_end`, each -1 if it is not
    # there yet; `limit` is where the head, or a request line without an end, is too long.
    start = 2 if buffer.startswith(b"\r\n") else 0      # RFC 9112 2.2: ignore one empty line
    line_end = buffer.find(b"\r\n", start, start + MAX_LINE + 2)
    limit = start + (MAX_LINE + 2 if line_end < 0 else MAX_HEAD)
    end = buffer.find(b"\r\n\r\n", max(line_end, seen - 3), limit) if line_end >= 0 else -1
    if end >= 0:
        head = _HEAD.match(buffer, start, end + 2)
        if head and head.end() == end + 2:
            return _parse_head(head), end + 4
        limit = end + 4
    if _BAD_BYTE.search(buffer, max(start, seen - 1), limit):
        raise Refusal(400, "The request head has a control character, or a line that does not "
                           "end in CRLF.")
    if end >= 0:
        raise _not_a_head(head, buffer[start:limit].count(b"\n") - 2)
    if len(buffer) < limit:
        return None
    if line_end < 0:
        raise Refusal(414, f"The request line is longer than {MAX_LINE} bytes.")
    raise Refusal(431, f"The request head is longer than {MAX_HEAD} bytes.")


def _not_a_head(begun: re.Match[bytes] | None, fields: int) -> Refusal:
    """Return what is wrong: with the request line, else with one of so many fields."""
    if begun is None:
        return Refusal(400, "The request line is not `METHOD TARGET HTTP/1.1`.")
    _parse_request_line(begun)
    if fields > MAX_FIELDS:
        return Refusal(431, f"The request has more than {MAX_FIELDS} header fields.")
    return Refusal(400, "A header field is not `Name: value` (no space before the colon, "
                        "no folded lines).")


def _parse_head(head: re.Match[bytes]) -> Request:
    lines = head[5].decode("latin-1")
    request = Request(*_parse_request_line(head), _take_apart(_KNOWN, lines), lines)
    _check(request)
    absolute = _ABSOLUTE.match(head[2].decode("latin-1"))
    if absolute:        # RFC 9112 section 3.2.2: it counts in place of Host
        request.known["host"] = absolute[0].partition("://")[2]
        _check_host(request)
    return request


def _parse_request_line(head: re.Match[bytes]
                        ) -> tuple[str, str, dict[str, list[str]], tuple[int, int]]:
    method, target, major, minor, _ = head.groups()
    if major != b"1":
        raise Refusal(505, "This server speaks HTTP/1.1 and HTTP/1.0 only.")
    path, query = _parse_target(target.decode("latin-1"), method.decode())
    return method.decode(), path, query, (1, int(minor))


def _take_apart(pattern: re.Pattern[str], lines: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in pattern.findall(lines):
        name, value = name.lower(), value.strip(" \t")
        if name in fields and name in _SINGLE.split("|"):
            raise Refusal(400, f"The header field {name} is given more than once.")
        # Cookies are the one list without commas: HTTP/2 splits them (RFC 9113 section 8.2.3)
        comma = "; " if name == "cookie" else ", "
        fields[name] = fields[name] + comma + value if name in fields else value
    return fields


def _parse_target(target: str, method: str) -> tuple[str, dict[str, list[str]]]:
    """Split and decode a target: a path, a URL, or `*` for OPTIONS (RFC 9112 section 3.2)."""
    if not target.isascii():
        raise Refusal(400, "The request target is not ASCII: percent-encode it.")
    absolute = _ABSOLUTE.match(target)
    if absolute:
        target = target[absolute.end():]
        target = target if target.startswith("/") else "/" + target
    elif method not in METHODS or target == "*" and method == "OPTIONS":
        return target, {}
    path, _, query = target.partition("?")
    if not path.startswith("/") or "#" in target:
        raise Refusal(400, "The request target is not a path that starts with /.")
    if _BAD_PERCENT.search(target):
        raise Refusal(400, "The request target has a % that two hex digits do not follow.")
    if query.count("&") >= MAX_FIELDS:
        raise Refusal(400, f"The query has more than {MAX_FIELDS} parameters.")
    try:
        return _text(_unescape(_escape(path))), _parse_query(query) if query else {}
    except UnicodeDecodeError:
        raise Refusal(400, "The request target is not UTF-8.") from None


def _parse_query(query: str) -> dict[str, list[str]]:
    """Return the parameters that a query gives, percent-decoded.

    That is what urllib.parse.parse_qs does, but it takes 0.3 us for each %XX, a millisecond for a
    request line of 8,000 bytes. Here all are decoded at once, which takes a tenth of that.
    """
    parameters: dict[str, list[str]] = {}
    escaped = _escape(query).replace("&", r"\u0100").replace("=", r"\u0101").replace("+", " ")
    for pair in filter(None, _unescape(escaped).split("\u0100")):
        name, _, value = pair.partition("\u0101")
        parameters.setdefault(_text(name), []).append(_text(value.replace("\u0101", "=")))
    return parameters


def _escape(quoted: str) -> str:
    """Turn %XX into the escapes of Python's string literals, which are decoded all at once."""
    return quoted.replace("\\", r"\\").replace("%", r"\x")


def _unescape(escaped: str) -> str:
    """Return what was escaped, each byte as one character; above these there is room for marks."""
    return escaped.encode().decode("unicode_escape")


def _text(decoded: str) -> str:
    return decoded if decoded.isascii() else decoded.encode("latin-1").decode()


def _check(request: Request) -> None:
    """Refuse what is well-formed and still not to be served."""
    if request.method not in METHODS:
        if request.method in KNOWN_METHODS:
            raise Refusal(405, "Use GET to receive events, and POST to publish.",
                          [f"Allow: {', '.join(METHODS)}"])
        raise Refusal(501, f"This server supports the methods {', '.join(METHODS)}.")
    if "host" not in request.known and request.version >= (1, 1):
        raise Refusal(400, "HTTP/1.1 needs the header field Host.")
    _check_host(request)
    _check_framing(request)
    if request.known.get("expect", "100-continue").lower() != "100-continue":
        raise Refusal(417, "The only Expect that this server supports is 100-continue.")


def _check_host(request: Request) -> None:
    if not _HOST.fullmatch(request.known.get("host", "")):
        raise Refusal(400, "The header field Host is not a name or address, and perhaps a port.")


def _check_framing(request: Request) -> None:
    """Refuse a body that another reader of this head could see end elsewhere."""
    length = request.known.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise Refusal(400, "Content-Length is not a number.")
    coding = request.known.get("transfer-encoding")
    if coding is not None and "content-length" in request.known:
        raise Refusal(400, "Content-Length and Transfer-Encoding exclude each other.")
    if request.method != "POST" and (coding is not None or length.strip("0")):
        raise Refusal(400, f"A {request.method} request must not have a body.")
    if coding is not None and not request.chunked:
        raise Refusal(400, "HTTP/1.0 has no Transfer-Encoding.")
    if coding is not None and coding.lower() != "chunked":
        raise Refusal(501, "The only Transfer-Encoding that this server supports is chunked.")


def head(status: int, content_type: str, length: int, fields: Iterable[str],
         keep_alive: bool) -> bytes:
    """Return the head of an answer: status line, length, what becomes of the connection."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    if status != 204:           # RFC 9110 section 8.6: no Content-Length there
        lines += [f"Content-Type: {content_type}", f"Content-Length: {length}"]
    lines += ["Connection: keep-alive", "Keep-Alive: timeout=75"] if keep_alive else [
        "Connection: close"]
    return "\r\n".join([*lines, *fields, "", ""]).encode()
