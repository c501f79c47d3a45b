"""Turn bytes into a request or a refusal, and an answer into bytes: what is spoken of HTTP/1.1.

No socket, no thread and no clock in here. `parse` is strict, because requests are smuggled through
what two parsers read differently (RFC 9112 section 11.2). It is small: a head is lines, and a line
is one regular expression.
"""
from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qs, unquote_to_bytes

from sse_core import frames

MAX_LINE = 8000             # bytes of the request line: what RFC 9112 section 3 wants supported
MAX_HEAD = 16 << 10         # bytes of request line and fields
MAX_FIELDS = 100            # as http.client has it
METHODS = ("GET", "HEAD", "OPTIONS", "POST")
KNOWN_METHODS = (*METHODS, "PUT", "DELETE", "PATCH", "TRACE", "CONNECT")

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):(.*)")
_BAD_BYTE = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
_SINGLE = {"host", "content-length", "transfer-encoding", "authorization", "origin",
           "last-event-id", "expect"}


class Refusal(Exception):
    """A request that is answered with an error: status, a text that says what to do, fields."""

    def __init__(self, status: int, text: str, fields: Iterable[str] = ()) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
        self.fields = tuple(fields)


class Request(NamedTuple):
    """The head of one request.

    Names of fields are lower-case. Their values are text, each byte one character (latin-1).
    """
    method: str
    path: str                       # percent-decoded, UTF-8
    query: dict[str, list[str]]     # percent-decoded, in order
    version: tuple[int, int]
    fields: dict[str, str]

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
        scheme, _, token = self.fields.get("authorization", "").partition(" ")
        return token.strip(" ") if scheme.lower() == "bearer" else None

    def has_token(self, tokens: Iterable[bytes]) -> bool:
        """Say whether path or bearer token is one of these.

        How long it takes does not tell which, nor how nearly.
        """
        given = [self.path[1:].encode()]
        if self.bearer is not None:
            given.append(self.bearer.encode("latin-1"))
        return any([hmac.compare_digest(token, each) for token in tokens for each in given])

    @property
    def body_length(self) -> int:
        """The length of a POST's body in bytes. Raises Refusal if it is not given, or too long."""
        if "content-length" not in self.fields:
            raise Refusal(411, "Send a Content-Length: a chunked body is not taken.")
        length = int(self.fields["content-length"])
        if length > frames.MAX_EVENT:
            raise Refusal(413, f"The body is longer than {frames.MAX_EVENT} bytes, the most that "
                               "an event holds.")
        return length

    @property
    def keeps_alive(self) -> bool:
        """Whether the client may send another request here (RFC 9112 section 9.3)."""
        return self.chunked and "close" not in self.fields.get("connection", "").lower()

    @property
    def last_id(self) -> str | None:
        """The id after which the client goes on: Last-Event-ID, else ?lastEventId= of polyfills."""
        header = self.fields.get("last-event-id")
        if header is None:
            return self.parameter("lastEventId")
        return header.encode("latin-1").decode(errors="replace")

    def accepts(self, media_type: str) -> bool:
        """Say whether Accept names this media type."""
        return media_type in self.fields.get("accept", "").lower()


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
    if _BAD_BYTE.search(buffer, max(start, seen - 1), end + 4 if end >= 0 else limit):
        raise Refusal(400, "The request head has a control character, or a line that does not "
                           "end in CRLF.")
    if end >= 0:
        return _parse_head(buffer[start:end]), end + 4
    if len(buffer) < limit:
        return None
    if line_end < 0:
        raise Refusal(414, f"The request line is longer than {MAX_LINE} bytes.")
    raise Refusal(431, f"The request head is longer than {MAX_HEAD} bytes.")


def _parse_head(head: bytes) -> Request:
    request_line, *lines = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(request_line)
    if not match:
        raise Refusal(400, "The request line is not `METHOD TARGET HTTP/1.1`.")
    version = int(match[3]), int(match[4])
    if version[0] != 1:
        raise Refusal(505, "This server speaks HTTP/1.1 and HTTP/1.0 only.")
    method = match[1].decode()
    path, query = _parse_target(match[2].decode(), method)
    request = Request(method, path, query, version, _parse_fields(lines))
    _check(request)
    return request


def _parse_fields(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_FIELDS:
        raise Refusal(431, f"The request has more than {MAX_FIELDS} header fields.")
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if not match:
            raise Refusal(400, "A header field is not `Name: value` (no space before the colon, "
                               "no folded lines).")
        name = match[1].decode().lower()
        if name in fields and name in _SINGLE:
            raise Refusal(400, f"The header field {name} is given more than once.")
        value = match[2].strip(b" \t").decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _parse_target(target: str, method: str) -> tuple[str, dict[str, list[str]]]:
    """Split and decode a target: a path, a URL, or `*` for OPTIONS (RFC 9112 section 3.2)."""
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
    try:
        decoded = unquote_to_bytes(path).decode() if "%" in path else path
        parameters = parse_qs(query, keep_blank_values=True, errors="strict",
                              max_num_fields=MAX_FIELDS) if query else {}
    except UnicodeDecodeError:
        raise Refusal(400, "The request target is not UTF-8.") from None
    except ValueError:
        raise Refusal(400, f"The query has more than {MAX_FIELDS} parameters.") from None
    return decoded, parameters


def _check(request: Request) -> None:
    """Refuse what is well-formed and still not to be served."""
    if request.method not in METHODS:
        if request.method in KNOWN_METHODS:
            raise Refusal(405, "Use GET for events, POST to publish.",
                          [f"Allow: {', '.join(METHODS)}"])
        raise Refusal(501, f"This server knows the methods {', '.join(METHODS)}.")
    if "host" not in request.fields and request.version >= (1, 1):
        raise Refusal(400, "HTTP/1.1 needs the header field Host.")
    length = request.fields.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise Refusal(400, "Content-Length is not a number.")
    has_coding = "transfer-encoding" in request.fields
    if has_coding and "content-length" in request.fields:
        raise Refusal(400, "Content-Length and Transfer-Encoding exclude each other.")
    if request.method != "POST" and (has_coding or length.strip("0")):
        raise Refusal(400, f"A {request.method} request has no body here.")


def answer(status: int, body: bytes = b"", fields: Iterable[str] = (), *,
           content_type: str = "text/plain; charset=utf-8", keep_alive: bool = False,
           head_only: bool = False) -> bytes:
    """Return a whole answer as bytes: status line, length, what becomes of the connection, body."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    if status != 204:           # RFC 9110 section 8.6: no Content-Length there
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    lines += [f"Connection: {'keep-alive' if keep_alive else 'close'}", *fields, "", ""]
    return "\r\n".join(lines).encode() + (b"" if head_only else body)
