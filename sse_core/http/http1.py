"""Turn bytes into a request, or a refusal: what is understood of HTTP/1.1.

`parse` is given all bytes of a head that have arrived, each time that some more have:

    nothing is wrong so far      None: it needs more bytes
    a head that can be served    a Request, and how many bytes it took
    anything else                an HTTPError, as soon as it can be seen

It is strict, because requests are smuggled through what two parsers read differently (RFC 9112
section 11.2). What it takes, every other parser reads in the same way: no bare LF or CR, no folded
line, no space before a colon, and one way only to say where the body ends.

It is fast, since it runs for every connection, and takes linear time, whatever a stranger sends.
One regular expression tells whether the bytes up to an empty line are a head. Only when they are
not, it looks for what is wrong. Of a good head, only the fields that this server reads are taken
apart.

No socket, no thread and no clock in here.
"""
from __future__ import annotations

import hmac
import re
from binascii import a2b_qp
from collections.abc import Iterable
from typing import NamedTuple

from sse_core.errors import HTTPError

# Bytes of the request line: as many as RFC 9112 section 3 wants to be supported.
MAX_LINE = 8000

# Bytes of request line and fields together.
MAX_HEAD = 16 << 10

# Header fields, as in http.client; and parameters of a query.
MAX_FIELDS = 100

# Characters of the names of fields that a preflight asks for.
MAX_ASKED = 2048

# Characters of a Last-Event-ID. No id of ours is longer.
MAX_LAST_ID = 64

METHODS = ("GET", "HEAD", "OPTIONS", "POST")

# Those that get 405. A method that nobody knows is 501 (RFC 9110 section 15.6.2).
KNOWN_METHODS = (*METHODS, "PUT", "DELETE", "PATCH", "TRACE", "CONNECT")

# All patterns take linear time: what a star takes, nothing that follows it could take.
#
# A method, a name of a field; and what stands behind its colon (RFC 9110 sections 5.5 and 5.6.2).
# Bytes above ASCII are allowed in a value: tokens in UTF-8 have them.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
VALUE = rb"[\t -~\x80-\xff]*"

# Method, target, version in two digits, and the lines of the fields, each with the LF before it.
_HEAD = re.compile(rb"(%b) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r(\n(?:%b:%b\r\n){0,%d})"
                   % (TOKEN, TOKEN, VALUE, MAX_FIELDS))

# What no head has anywhere. A CR at the end may be the first half of a CRLF.
_BAD_BYTE = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")

# A path, or a whole URL, without a fragment: the authority, the path, the query.
_TARGET = re.compile(r"(?:https?://([^/?#]+)|(?=/))(/[^?#]*)?(?:\?([^#]*))?", re.IGNORECASE)
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")

# A name, or an IPv6 address in brackets, is the first group. Then comes a port, or not (RFC 3986
# section 3.2.2). Nothing in here judges whether there is such a host.
_NAME = r"[\w.~!$&'()*+,;=-]*"
HOST = re.compile(rf"(?!:)({_NAME}(?:%[0-9A-Fa-f]{{2}}{_NAME})*|\[(?:[0-9A-Fa-f]{{0,4}}:){{2,8}}"
                  r"[0-9A-Fa-f.]*\])(?::[0-9]*)?", re.ASCII)

# The fields that this server reads. The first ones are no lists: where a request has two of them,
# another parser may take the other one.
_SINGLE = "host|content-length|transfer-encoding|authorization|origin|last-event-id|expect"
_KNOWN = re.compile(rf"\n({_SINGLE}|accept|connection|content-type|content-encoding|cookie):"
                    r"([^\r]*)", re.ASCII | re.IGNORECASE)

# Any field. These two patterns see only lines that `_HEAD` has matched.
_ANY = re.compile(r"\n([^:]+):([^\r]*)")

# A weight of 0 (RFC 9110 section 12.4.2).
_ZERO = re.compile(r"q=0(\.0*)?")

# At most 64 names of fields.
_NAMES = re.compile("{0}(?:[ \t]*,[ \t]*{0}){{0,63}}".format(TOKEN.decode()))


class Request(NamedTuple):
    """The head of one request, as `authorize` of a program is given it, too.

    Names of fields are in lower case. In values of fields, each byte is a character.
    """

    method: str

    # Percent-decoded, as UTF-8.
    path: str

    # Parameters in the order in which they came, percent-decoded, each with all its values.
    query: dict[str, list[str]]

    version: tuple[int, int]

    # The fields that this server reads. The authority of an absolute target stands as `host`.
    known: dict[str, str]

    # All fields as they came, a LF before each and a CR behind.
    lines: str

    @property
    def fields(self) -> dict[str, str]:
        """All fields. They are taken apart anew each time: this is for a program's `authorize`."""
        return _take_apart(_ANY, self.lines)

    def parameter(self, name: str) -> str | None:
        """Return the last value that the query gives to `name`, or None."""
        return self.query[name][-1] if name in self.query else None

    @property
    def chunked(self) -> bool:
        """Whether the client understands chunks: from HTTP/1.1 on (RFC 9112 section 7.1)."""
        return self.version >= (1, 1)

    @property
    def bearer(self) -> str | None:
        """The token of `Authorization: Bearer TOKEN` (RFC 6750 section 2.1), or None."""
        scheme, _, token = self.known.get("authorization", "").partition(" ")
        return token.strip(" \t") if scheme.lower() == "bearer" else None

    def has_token(self, tokens: Iterable[bytes]) -> bool:
        """Return whether path or bearer token is one of these.

        How long it takes does not tell which, nor how nearly. Each token is in UTF-8.
        """
        # Back to the bytes that came. An empty one is no token, so it equals none.
        given = self.path[1:].encode(), (self.bearer or "").encode("latin-1")
        # A list, and not a generator: `any` would stop at the first one that is equal.
        return any([hmac.compare_digest(token, each) for token in tokens for each in given])

    @property
    def body_length(self) -> int | None:
        """The bytes of a POST's body, or None if it comes in chunks (RFC 9112 section 6.3).

        Raises HTTPError if the head says neither: then nobody knows where the body ends.
        """
        if "transfer-encoding" in self.known:
            return None
        if "content-length" not in self.known:
            raise HTTPError(411, "Send a Content-Length, or Transfer-Encoding: chunked.")
        return int(self.known["content-length"])

    @property
    def keeps_alive(self) -> bool:
        """Whether the client may send another request here (RFC 9112 section 9.3).

        A client of HTTP/1.0 that asks to keep the connection is not granted it.
        """
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
        # Browsers send it in UTF-8 (WHATWG HTML section 9.2.3).
        header = self.known.get("last-event-id", "").encode("latin-1").decode(errors="replace")
        given = header or self.parameter("lastEventId") or None
        return "(too long)" if given and len(given) > MAX_LAST_ID else given

    def accepts(self, media_type: str) -> bool:
        """Return whether Accept names this media type, and not with a weight of 0.

        media_type: in lower case. Wildcards do not count: every client but a browser sends `*/*`
        and wants no page. RFC 9110 section 12.5.1.
        """
        # An item is taken apart only if it can be the one. A head has room for thousands of them.
        accept = self.known.get("accept", "").lower()
        items = _items(accept) if media_type in accept else []
        named = (_items(each, ";") for each in items if each.startswith(media_type))
        return any(name == media_type and not any(map(_ZERO.fullmatch, parameters))
                   for name, *parameters in named)


def _items(text: str, separator: str = ",") -> list[str]:
    """Return the items of a list in a field, in lower case (RFC 9110 section 5.6.1)."""
    return [item.strip(" \t") for item in text.lower().split(separator)]


def parse(buffer: bytes, seen: int = 0) -> tuple[Request, int] | None:
    """Parse the request head at the start of `buffer`; `seen` bytes of it were looked at before.

    Returns the request and the length of its head in bytes, or None if more bytes are needed.
    Raises HTTPError for what is wrong, as soon as it is seen, and with the same status however the
    bytes arrived.
    """
    # One empty line before the request is ignored (RFC 9112 section 2.2).
    start = 2 if buffer.startswith(b"\r\n") else 0

    # Where the request line ends, and where the head; -1 if that is not there yet.
    line_end = buffer.find(b"\r\n", start, start + MAX_LINE + 2)
    limit = start + (MAX_LINE + 2 if line_end < 0 else MAX_HEAD)
    end = buffer.find(b"\r\n\r\n", max(line_end, seen - 3), limit) if line_end >= 0 else -1
    head = _HEAD.match(buffer, start, end + 2) if end >= 0 else None
    # What matched whole has no bad byte, and is not looked through again.
    is_head = head is not None and head.end() == end + 2
    looked_at = limit if end < 0 else end + 4
    if not is_head and _BAD_BYTE.search(buffer, max(start, seen - 1), looked_at):
        raise HTTPError(400, "The head has a control character, or a line that does not end in "
                             "CRLF.")
    if end >= 0:
        return _parse_head(head, is_head), end + 4
    if len(buffer) < limit:
        return None
    if line_end < 0:
        raise HTTPError(414, f"The request line is longer than {MAX_LINE} bytes.")
    raise HTTPError(431, f"The request head is longer than {MAX_HEAD} bytes.")


def _parse_head(head: re.Match[bytes] | None, is_whole: bool) -> Request:
    """Return the request of a head, of which this much matched: all, or up to some field.

    Raises HTTPError for what is malformed, and for what is well-formed and still not to be served.
    """
    if head is None:
        raise HTTPError(400, "The request line is not `METHOD TARGET HTTP/1.1`.")
    # In this encoding each byte is a character, so that nothing is lost.
    method, lines = head[1].decode(), head[5].decode("latin-1")
    if head[3] != b"1":
        raise HTTPError(505, "This server speaks HTTP/1.1 and HTTP/1.0 only.")
    authority, path, query = _parse_target(head[2].decode("latin-1"), method)
    if not is_whole:
        # The pattern has stopped before a line that is no field, or after the last one allowed.
        if lines.count("\n") > MAX_FIELDS:
            raise HTTPError(431, f"The request has more than {MAX_FIELDS} header fields.")
        raise HTTPError(400, "A header field is not `Name: value` (no space before the colon, "
                             "no folded lines).")
    request = Request(method, path, query, (1, int(head[4])), _take_apart(_KNOWN, lines), lines)
    _check(request, authority)
    _check_framing(request)
    if authority:
        # It counts in place of Host, which has to be there all the same (RFC 9112 section 3.2.2).
        request.known["host"] = authority
    return request


def _parse_target(target: str, method: str) -> tuple[str, str, dict[str, list[str]]]:
    """Return authority, path and query of a target (RFC 9112 section 3.2).

    It is a path, a URL, which has an authority, or `*` for OPTIONS. The target of a method that is
    not served does not matter. Raises HTTPError for what is none of these, or cannot be decoded.
    """
    if method not in METHODS or (method, target) == ("OPTIONS", "*"):
        return "", target, {}
    match = _TARGET.fullmatch(target)
    if not match or not target.isascii() or _BAD_PERCENT.search(target):
        raise HTTPError(400, "The request target is not a path that starts with /, "
                             "percent-encoded, with two hex digits after each %.")
    authority, path, query = match.groups("")
    if query.count("&") >= MAX_FIELDS:
        raise HTTPError(400, f"The query has more than {MAX_FIELDS} parameters.")
    try:
        return authority, _decode(path or "/"), _parse_query(query) if query else {}
    except UnicodeDecodeError:
        raise HTTPError(400, "The request target is not UTF-8.") from None


def _parse_query(query: str) -> dict[str, list[str]]:
    """Return the parameters of a query, as urllib.parse.parse_qs does with blank values kept.

    Raises UnicodeDecodeError for what is not UTF-8.
    """
    parameters: dict[str, list[str]] = {}
    for pair in filter(None, query.replace("+", " ").split("&")):
        name, _, value = pair.partition("=")
        parameters.setdefault(_decode(name), []).append(_decode(value))
    return parameters


def _decode(quoted: str) -> str:
    """Return text that is percent-encoded, each % of it with two hex digits.

    urllib.parse takes 0.3 us for each %XX, which is a millisecond for a request line of 8,000
    bytes. Quoted-printable (RFC 2045 section 6.7) is the same with `=`, and is decoded in C. Raises
    UnicodeDecodeError.
    """
    return a2b_qp(quoted.replace("=", "=3D").replace("%", "=")).decode()


def _take_apart(pattern: re.Pattern[str], lines: str) -> dict[str, str]:
    """Return the fields in these lines that the pattern finds, each with all its values.

    Raises HTTPError for a second value of a field that has only one (RFC 9110 section 5.3).
    """
    fields: dict[str, str] = {}
    for name, value in pattern.findall(lines):
        name, value = name.lower(), value.strip(" \t")
        if name in fields and name in _SINGLE.split("|"):
            raise HTTPError(400, f"The header field {name} is given more than once.")
        # Cookies are the one list without commas: HTTP/2 splits them (RFC 9113 section 8.2.3).
        comma = "; " if name == "cookie" else ", "
        fields[name] = fields[name] + comma + value if name in fields else value
    return fields


def _check(request: Request, authority: str) -> None:
    """Raise HTTPError for a method, a Host or an Expect that this server cannot serve.

    authority: of an absolute target, or empty, as a Host may be, too.
    """
    if request.method not in METHODS:
        raise HTTPError(405 if request.method in KNOWN_METHODS else 501,
                        "Use GET to receive events, and POST to publish.",
                        [f"Allow: {', '.join(METHODS)}"])
    # RFC 9112 section 3.2. HTTP/1.0 has no such field.
    if "host" not in request.known and request.chunked:
        raise HTTPError(400, "HTTP/1.1 needs the header field Host.")
    for host in (request.known.get("host", ""), authority):
        if not HOST.fullmatch(host):
            raise HTTPError(400, "The Host is not a name or an address, and perhaps a port.")
    # RFC 9110 section 10.1.1.
    if request.known.get("expect", "100-continue").lower() != "100-continue":
        raise HTTPError(417, "The only Expect that this server supports is 100-continue.")


def _check_framing(request: Request) -> None:
    """Raise HTTPError for a body that another reader of this head could see end elsewhere.

    Such a reader would take the rest of the body for the next request, or the next request for a
    part of the body (RFC 9112 sections 6.3 and 11.2).
    """
    # `isdigit` alone would take digits of other scripts, too.
    length = request.known.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise HTTPError(400, "Content-Length is not a number.")
    coding = request.known.get("transfer-encoding")
    # One reader goes by the one, and another by the other.
    if coding is not None and "content-length" in request.known:
        raise HTTPError(400, "Content-Length and Transfer-Encoding exclude each other.")
    # Many readers expect no body here, whatever the head says.
    if request.method != "POST" and (coding is not None or length.strip("0")):
        raise HTTPError(400, f"A {request.method} request must not have a body.")
    # A proxy of that version hands it on without knowing what it is (RFC 9112 section 6.1).
    if coding is not None and not request.chunked:
        raise HTTPError(400, "HTTP/1.0 has no Transfer-Encoding.")
    if coding is not None and coding.lower() != "chunked":
        raise HTTPError(501, "The only Transfer-Encoding that this server supports is chunked.")
