"""Turn what a request asks for into channels, a beginning, and events: its query and its body.

No socket, no thread and no clock in here: `now` is handed in. What cannot be meant is a Refusal.
"""
from __future__ import annotations

import math
import re
from difflib import get_close_matches

from sse_core.engine import frames
from sse_core.engine.frames import Draft
from sse_core.errors import Refusal
from sse_core.http.http1 import Request

NDJSON = "application/x-ndjson"
WATCHING = {"channel", "since", "lastEventId", "last_event_id"}     # parameters of a stream
BEGINNINGS = {"all": 0.0, "latest": math.inf, "earliest": 0.0}      # the last as mercure has it
AGO = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CHARSET = re.compile(r';[ \t]*charset="?([^";, \t]*)')
_SINCE = re.compile("([0-9]{1,12}(?:[.][0-9]{1,6})?)([smhd]?)", re.ASCII)
MAX_ASKED = 32              # channels of a client: 100 of its own cost 52 KiB
MAX_NAMES = 1024            # characters of their names

# What a charset may be: ASCII is UTF-8, too
UTF_8 = {"utf-8", "utf8", "us-ascii"}


def is_list(request: Request) -> bool:
    """Say whether the lines of a POST's body are events."""
    content_type = request.known.get("content-type")
    return content_type is not None and content_type.partition(";")[0].strip().lower() == NDJSON


def check_encoding(request: Request) -> None:
    """Raise Refusal if the body of a POST is compressed, or is not UTF-8 by its own account."""
    coding = request.known.get("content-encoding", "").lower()
    charset = _CHARSET.search(request.known.get("content-type", "").lower())
    if coding not in ("", "identity"):
        # RFC 9110 section 12.5.3: the field says which codings would have been accepted
        raise Refusal(415, "Send the body uncompressed, without Content-Encoding.",
                      ["Accept-Encoding: identity"])
    if charset and charset[1] not in UTF_8:
        raise Refusal(415, "Send the body in UTF-8, and with that charset or none in Content-Type.")


def drafts(request: Request, body: bytes) -> list[Draft]:
    """Return the events that a POST makes of its body. Raises Refusal."""
    return _lines(request, body) if is_list(request) else [_one(request, body)]


def _one(request: Request, body: bytes) -> Draft:
    for name, values in request.query.items():
        if name not in ("event", "channel"):
            raise Refusal(400, f"The parameter {name!r} is not known. Use event and channel.")
        if len(values) > 1:
            raise Refusal(400, f"An event has one {name}. To publish several events at once, send "
                               f"them as lines of {NDJSON}.")
    return Draft(_text(body), request.parameter("event"), request.parameter("channel"))


def _lines(request: Request, body: bytes) -> list[Draft]:
    """Return the events that the lines describe. Raises Refusal, which names the line."""
    if request.query:
        raise Refusal(400, f"With {NDJSON}, put event and channel into the lines, not into the "
                           "query.")
    found = []
    # A byte order mark at the start is not content
    for number, line in enumerate(_text(body, "utf-8-sig").split("\n"), 1):
        try:
            found.append(frames.parse_draft(line))
        except ValueError as error:
            raise Refusal(400, f"Line {number} is not an event, and none was published: {error}."
                          ) from None
    return [draft for draft in found if draft]


def _text(body: bytes, encoding: str = "utf-8") -> str:
    try:
        return body.decode(encoding)
    except UnicodeDecodeError:
        raise Refusal(400, "The body is not UTF-8.") from None


def start(request: Request, now: float) -> tuple[str | None, float | None]:
    """Return the id after which a stream begins, and the time if it is one. Raises Refusal.

    An id wins over `since`: so who reconnects goes on, and does not start anew.
    """
    since = request.parameter("since" if "since" in request.query else "last_event_id")
    if request.last_id is not None or since is None:
        return request.last_id, None
    if since in BEGINNINGS:
        return "0-0", BEGINNINGS[since]
    if frames.parse_id(since):
        return since, None
    match = _SINCE.fullmatch(since)
    if not match:
        raise Refusal(400, "The parameter since is all, latest, an id, a unix time in seconds, or "
                           "a time ago as 90s, 10m, 24h or 7d.")
    ago = float(match[1]) * AGO[match[2]] if match[2] else now - float(match[1])
    begin = max(1, int((now - ago) * 1000))
    return f"{begin}-0", begin


def channels(request: Request) -> frozenset[str]:
    """Return the channels that a client asks for. Raises Refusal."""
    unknown = [name for name in request.query if name not in WATCHING and len(name) < 20]
    for name in unknown[:3]:        # a comparison takes some 20 us
        meant = get_close_matches(name, WATCHING, 1)
        if meant:
            raise Refusal(400, f"The parameter {name!r} is not known. Did you mean {meant[0]!r}?")
    channels = request.query.get("channel", [])
    if len(channels) > MAX_ASKED or sum(map(len, channels)) > MAX_NAMES:
        raise Refusal(400, f"A client may ask for at most {MAX_ASKED} channels, with at most "
                           f"{MAX_NAMES} characters in all their names.")
    try:
        for channel in channels:
            frames.check_channel(channel)
    except ValueError as error:
        raise Refusal(400, f"This is not a channel: {error}.") from None
    return frozenset(channels)
