"""Turn events into bytes: a frame is one event, encoded once, as exactly one HTTP chunk.

No socket, no thread and no clock in here: time and order come from the caller, bytes go back to it.

On the wire a frame is eight lower-case hex digits, CRLF, the event, CRLF (RFC 9112 section 7.1).
The event is the fields `event:`, `data:`, `id:` in this order (WHATWG HTML section 9.2.5). The
length line has a fixed width, so a client of HTTP/1.0, which knows no chunks, is sent a slice.

Every line of an event ends in LF. WHATWG allows CRLF, too, but many clients split the stream at
`\n\n` and find no event in a mix. Only `--history 0` keeps the line ends of the original.
"""
from __future__ import annotations

import json
import random
import re
from typing import NamedTuple

MAX_EVENT = 1 << 20         # bytes of data in an event; a frame has a `data: ` a line more
MAX_NAME = 1024             # bytes of an event's or a channel's name
MAX_QUOTE = 80              # characters of a line that an error quotes
BATCH = 64 << 10            # bytes joined for one send: what a client's kernel buffer takes
END = b"0\r\n\r\n"          # the chunk that ends a stream in order
MAX_RETRY = (1 << 31) - 1   # milliseconds: clients keep `retry:` in a signed 32-bit number

# Names of the events that the server makes itself.
OWN_NAMES = ("welcome", "gap", "busy")

Id = tuple[int, int]        # (milliseconds, counter in that millisecond), ordered as in Redis
_ID = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")
_LINE_END = re.compile("\r\n|\n|\r")        # these only (WHATWG 9.2.5); str.splitlines has more
_NOT_IN_A_NAME = re.compile("[\r\n\0\ud800-\udfff]")


def check_name(kind: str, name: str) -> None:
    """Raise ValueError if a name could not stand on one line; `kind` of name is for the error."""
    if _NOT_IN_A_NAME.search(name):
        raise ValueError(f"the {kind} has a CR, LF, NUL or a lone surrogate")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"the {kind} is longer than {MAX_NAME} bytes")


def check_channel(name: str) -> None:
    """Raise ValueError for what no channel can be called."""
    if not name:
        raise ValueError("the channel has no name; an event that is for everyone has no channel")
    check_name("channel", name)


class Draft(NamedTuple):
    """An event that has no id yet. No channel: it is for everyone."""
    data: str
    event: str | None = None
    channel: str | None = None

    def encoded(self) -> bytes:
        """Return it as the fields of a stream.

        Raises ValueError for what no event can hold, TypeError for what is no text.
        """
        if not isinstance(self.data, str):
            raise TypeError("data is text: use json.dumps for anything else")
        if not isinstance(self.event or "", str) or not isinstance(self.channel or "", str):
            raise TypeError("the names of an event and of a channel are text")
        if self.event:
            check_name("event name", self.event)
        if self.event in OWN_NAMES:
            raise ValueError(f"the event name {self.event} is the server's own")
        if self.channel is not None:
            check_channel(self.channel)
        return encode(self.data, self.event)


def parse_draft(line: str) -> Draft | None:
    """Return the event that `{"data": ..., "event": ..., "channel": ...}` describes.

    A blank line is None. Data that is not a string is sent as the JSON text that stands in the
    line, so numbers keep their digits. Raises ValueError, which says what is wrong and quotes the
    line.
    """
    if not line.strip():
        return None
    try:
        return _parse_members(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg} in column {error.colno}"
    except RecursionError:
        what = "it is nested too deeply"
    except ValueError as error:
        what = str(error)
    quoted = line if len(line) <= MAX_QUOTE else f"{line[:MAX_QUOTE]}..."
    raise ValueError(f"{what}: {quoted!r}")


def _parse_members(line: str) -> Draft:
    members = _JSON.decode(line)
    if not isinstance(members, dict) or "data" not in members:
        raise ValueError('it is not an object with "data"')
    unknown = members.keys() - set(Draft._fields)
    if unknown:
        raise ValueError(f"nothing is known of {min(unknown)!r}")
    data, event, channel = (members.get(name) for name in Draft._fields)
    if not isinstance(event, (str, type(None))) or not isinstance(channel, (str, type(None))):
        raise ValueError("event and channel are strings")
    draft = Draft(data if isinstance(data, str) else _json_text(line, "data"), event, channel)
    draft.encoded()
    return draft


def _json_text(line: str, name: str) -> str:
    """Return the value of a member as it stands in a line that is a JSON object.

    Of members with the same name the last one counts, as for a decoder.
    """
    found, start = "", _skip(line, line.index("{") + 1)
    while line[start] != "}":
        member, end = _JSON.raw_decode(line, start)
        start = _skip(line, end)
        _, end = _JSON.raw_decode(line, start)
        if member == name:
            found = line[start:end]
        start = _skip(line, end)
    return found


def _skip(line: str, at: int) -> int:
    """Return where the next string, value or end of a JSON object begins."""
    while line[at] in " \t\r\n,:":
        at += 1
    return at


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")     # RFC 8259 section 6; Python would take it


# Numbers are not converted: their text is sent, and Python takes no integer over 4,300 digits
_JSON = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse_constant)


def encode(data: str, event: str | None = None) -> bytes:
    """Return data, at most 1 MiB of UTF-8, and a name that was checked as fields of a stream."""
    may_be_long = len(data) > MAX_EVENT // 4        # a character has 4 bytes at most
    if may_be_long and len(data.encode(errors="replace")) > MAX_EVENT:
        raise ValueError(f"the data is longer than {MAX_EVENT} bytes")
    name = f"event: {event}\n" if event else ""
    lines = "\ndata: ".join(_LINE_END.split(data)) if "\n" in data or "\r" in data else data
    try:
        return f"{name}data: {lines}\n\n".encode()
    except UnicodeEncodeError:
        raise ValueError("the data has a lone surrogate and cannot be sent as UTF-8") from None


def with_original_line_ends(payload: bytes) -> bytes:
    """Return an encoded event as the original sends it: CRLF ends all lines but `event:`."""
    payload = payload.replace(b"\n", b"\r\n")
    return payload.replace(b"\r\n", b"\n", 1) if payload.startswith(b"event:") else payload


def with_id(payload: bytes, event_id: Id) -> bytes:
    """Return an encoded event with its id, which comes last.

    Some clients, @microsoft/fetch-event-source and eventsource 2 among them, take an id as soon as
    its line is there. If the connection broke in the middle of the data after that, they would come
    back with the id of an event that they do not have.
    """
    return b"%bid: %d-%d\n\n" % (payload[:-1], *event_id)


def chunk(payload: bytes) -> bytes:
    """Wrap the payload as one HTTP chunk, its length as eight hex digits like the original."""
    return b"%08x\r\n%b\r\n" % (len(payload), payload)


# A comment, and no blank line: that would end a block, of which lax clients make an empty event
HEARTBEAT = chunk(b":\n")


def unchunk(frame: bytes) -> memoryview:
    """Return the payload of a chunk made by `chunk`, without a copy of it."""
    return memoryview(frame)[10:-2]


def retry_after(seconds: float) -> int:
    """Return how many milliseconds a client should wait before it reconnects.

    The time varies by 50 %, so that clients that left together do not come back together.
    """
    return min(MAX_RETRY, round(seconds * 1000 * random.uniform(0.5, 1.5)))


def welcome(newest: Id, retry: float, heartbeat: float) -> bytes:
    """Return the chunk that begins the stream of a client without an id.

    It is an event with data, because Firefox, WebKit and most client libraries ignore the id of a
    block without. `heartbeat`, in seconds, tells HTTP clients which read timeout is safe.
    """
    event = b'event: welcome\nretry: %d\ndata: {"heartbeat": %.10g}\n\n'
    return chunk(with_id(event % (retry_after(retry), heartbeat), newest))


def retry_line(seconds: float) -> bytes:
    """Return the chunk that begins every other stream: a line of the next event's block.

    It is no block of its own: lax clients make an empty event of a block without data.
    """
    return chunk(b"retry: %d\n" % retry_after(seconds))


def busy(seconds: float) -> bytes:
    """Return the chunk of a stream that ends at once: the client should come back later.

    Some clients drop a `retry:` without data at the end of a stream, so this is an event.
    """
    milliseconds = retry_after(seconds)
    return chunk(b'event: busy\nretry: %d\ndata: {"retry": %.10g}\n\n'
                 % (milliseconds, milliseconds / 1000))


def gap_payload(after: str | None, resumed: str | None, reason: str, own: Id | None) -> bytes:
    """Return the event that tells a client what it will not get.

    own: the client's own id, or None. It is repeated, because some clients forget theirs at an
    event without one.
    """
    event = encode(json.dumps({"after": after, "resumed": resumed, "reason": reason}), "gap")
    return with_id(event, own) if own else event


def parse_id(text: str) -> Id | None:
    """Return the id that the text spells in its one canonical way, or None if it spells none."""
    match = _ID.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def format_id(event_id: Id | None) -> str | None:
    """Return the id as text, `MILLISECONDS-N`; None stays None."""
    return event_id and "%d-%d" % event_id
