"""Turn what a request asks for into channels, a beginning, and events: its query and its body.

    GET  ?channel=a&channel=b&since=10m    which events a stream has, and which is the first
    POST ?event=NAME&channel=NAME          the body is the data of one event
    POST, application/x-ndjson             each line of the body is an event: all, or none

A parameter that no stream has is ignored, because pages and proxies add their own, unless it looks
like a slip. One that no event has is refused, so that a publisher learns that it does nothing.

No socket, no thread and no clock in here: `now` is handed in. What cannot be meant is an HTTPError.
"""
from __future__ import annotations

import math
import re
from difflib import get_close_matches

from sse_core.engine import frames
from sse_core.engine.frames import Event
from sse_core.errors import HTTPError
from sse_core.http.access import Grant
from sse_core.http.http1 import Request

NDJSON = "application/x-ndjson"

# Parameters of a stream. `lastEventId` is for polyfills of EventSource, which cannot set a header
# field, and `last_event_id` is what Mercure calls `since`.
WATCHING = {"channel", "since", "lastEventId", "last_event_id"}

# Names of times to begin at, in milliseconds since 1970. `earliest` is Mercure's word for `all`.
BEGINNINGS = {"all": 0.0, "latest": math.inf, "earliest": 0.0}

# Seconds in each unit of a time ago.
AGO = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# A number with a unit is a time ago, and one without is a unix time. Twelve digits reach far beyond
# any calendar, and cannot overflow anything.
_SINCE = re.compile("([0-9]{1,12}(?:[.][0-9]{1,6})?)([smhd]?)", re.ASCII)

# Channels that a client may ask for. One with 100 of its own costs 52 KiB.
MAX_ASKED = 32

# Characters of their names in all.
MAX_NAMES = 1024

# Charsets that are UTF-8. What is ASCII is UTF-8, too.
UTF_8 = {"utf-8", "utf8", "us-ascii"}
_CHARSET = re.compile(r';[ \t]*charset="?([^";, \t]*)')


def is_list(request: Request) -> bool:
    """Return whether the lines of a POST's body are events (RFC 9110 section 8.3.1)."""
    content_type = request.known.get("content-type", "")
    return content_type.partition(";")[0].strip().lower() == NDJSON


def check_encoding(request: Request) -> None:
    """Raise HTTPError if the body of a POST is compressed, or says of itself that it is not UTF-8.

    This needs the head alone, so that a client learns it before it sends the body.
    """
    coding = request.known.get("content-encoding", "").lower()
    charset = _CHARSET.search(request.known.get("content-type", "").lower())
    if coding not in ("", "identity"):
        # The field says which codings would have been accepted (RFC 9110 section 12.5.3).
        raise HTTPError(415, "Send the body uncompressed, without Content-Encoding.",
                        ["Accept-Encoding: identity"])
    if charset and charset[1] not in UTF_8:
        raise HTTPError(415, "Send the body in UTF-8, and with that charset or none in "
                             "Content-Type.")


def events(request: Request, body: bytes, grant: Grant) -> list[Event]:
    """Return the events that a POST makes of its body: one, or those of its lines.

    Raises HTTPError if there is anything in it that is no event, or one on a channel that is not
    granted. So either all are published or none.
    """
    try:
        # A byte order mark before a list is not content. Before data, it is a character of it.
        text = body.decode("utf-8-sig" if is_list(request) else "utf-8")
    except UnicodeDecodeError:
        raise HTTPError(400, "The body is not UTF-8.") from None
    events = _lines(request, text) if is_list(request) else [_one(request, text)]
    grant.check(*(event.channel for event in events))
    return events


def _one(request: Request, text: str) -> Event:
    """Return the event whose data is the body, with the name and the channel of the query.

    Raises HTTPError for a parameter that would have no effect, and for what no event can hold.
    """
    for name, values in request.query.items():
        if name not in ("event", "channel"):
            raise HTTPError(400, f"The parameter {name!r} is not known. Use event and channel.")
        if len(values) > 1:
            raise HTTPError(400, f"An event has one {name}. To publish several events at once, "
                                 f"send them as lines of {NDJSON}.")
    try:
        return Event(text, request.parameter("event"), request.parameter("channel"))
    except ValueError as error:
        raise HTTPError(400, f"This event cannot be published: {error}.") from None


def _lines(request: Request, text: str) -> list[Event]:
    """Return the events that the lines describe, as `parse_event` reads them, without blank lines.

    Raises HTTPError, which names the line by its number, counted from 1 as editors do.
    """
    if request.query:
        raise HTTPError(400, f"With {NDJSON}, put event and channel into the lines, not the query.")
    # `splitlines` would also split at what may stand within a JSON string, such as U+2028.
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            found.append(frames.parse_event(line))
        except ValueError as error:
            raise HTTPError(400, f"Line {number} is not an event, and none was published: {error}."
                            ) from None
    return [event for event in found if event]


def start(request: Request, now: float) -> tuple[str | None, float | None]:
    """Return the id after which a stream begins, and the time if it is one.

        an id                   that id, None
        a time                  the first id of that time, in milliseconds since 1970
        `all`, `latest`         `0-0`, and 0 or inf: see Log.locate_time
        none of these           None, None: the stream begins with the next event

    now: seconds since 1970. An id wins over `since`, so that a client that reconnects goes on, and
    does not start anew. Raises HTTPError for a `since` that means nothing.
    """
    # Of both, an empty `since` is one that means nothing, and not one that is left out.
    since = request.parameter("since" if "since" in request.query else "last_event_id")
    if request.last_id is not None or since is None:
        return request.last_id, None
    if since in BEGINNINGS:
        return "0-0", BEGINNINGS[since]
    if frames.parse_id(since):
        return since, None
    match = _SINCE.fullmatch(since)
    if not match:
        raise HTTPError(400, "The parameter since is all, latest, an id, a unix time in seconds, "
                             "or a time ago as 90s, 10m, 24h or 7d.")
    ago = float(match[1]) * AGO[match[2]] if match[2] else now - float(match[1])
    # At least 1: 0 is `all`, and nothing has an id of before 1970.
    begin = max(1, int((now - ago) * 1000))
    return f"{begin}-0", begin


def channels(request: Request) -> frozenset[str]:
    """Return the channels that a client asks for. An empty set is for events without a channel.

    Raises HTTPError for too many, for what no channel is called, and for a parameter that is nearly
    a known one: a client that misspells `channel` would wait for events that never come.
    """
    unknown = [name for name in request.query if name not in WATCHING and len(name) < 20]
    # A comparison takes some 20 us, so there are few, and only of short names.
    for name in unknown[:3]:
        for meant in get_close_matches(name, WATCHING, 1):
            raise HTTPError(400, f"The parameter {name!r} is not known. Did you mean {meant!r}?")
    channels = request.query.get("channel", [])
    if len(channels) > MAX_ASKED or sum(map(len, channels)) > MAX_NAMES:
        raise HTTPError(400, f"A client may ask for at most {MAX_ASKED} channels, with at most "
                             f"{MAX_NAMES} characters in all their names.")
    try:
        for channel in channels:
            frames.check_name("channel", channel)
    except ValueError as error:
        raise HTTPError(400, f"This is not a channel: {error}.") from None
    return frozenset(channels)
