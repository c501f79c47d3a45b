r"""Turn events into bytes: a frame is one event, encoded once, as exactly one HTTP chunk.

    0000003e\r\n                the length of the event in bytes, always eight hex digits
    event: custom\n             its name, if it has one
    data: first line\n
    data: second line\n
    id: 1764000000000-7\n       always last, see `with_id`
    \n
    \r\n

RFC 9112 section 7.1 defines the chunk, and WHATWG HTML section 9.2.5 the event in it. The length
line has a fixed width, so a client of HTTP/1.0, which knows no chunks, is sent a slice of the
frame.

Every line of an event ends in LF. WHATWG allows CRLF, too, but many clients split the stream at
`\n\n` and find no event in a mix. Only `--history 0` keeps the line ends of the original.

An event that cannot be sent cannot be made: `Event` checks it, and nothing checks it again.

No socket, no thread and no clock in here: time and order come from the caller, bytes go back to it.
"""
from __future__ import annotations

import json
import random
import re
from typing import Any

# Bytes of the data of an event, in UTF-8. A frame is longer by `data: ` for each line.
MAX_EVENT = 1 << 20

# Bytes of the name of an event or of a channel, in UTF-8.
MAX_NAME = 1024

# Characters of a line that an error quotes.
MAX_QUOTE = 80

# Bytes that are joined for one send: as many as the kernel buffers for a client.
BATCH = 64 << 10

# The chunk that ends a stream in order.
END = b"0\r\n\r\n"

# Milliseconds. Clients keep the number of `retry:` in 32 bits, one of them for the sign.
MAX_RETRY = (1 << 31) - 1

# Names of the events that the server makes itself. Nobody else can publish them.
OWN_NAMES = ("welcome", "gap", "busy")

# Milliseconds since 1970, and a counter within that millisecond. Ordered as in a Redis stream.
Id = tuple[int, int]

# An id has one spelling: no leading zeros, and no more digits than 64 bits have.
_ID = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")

# CR and LF would end the line. At NUL, clients in C would end the name. A lone surrogate is no
# character, and UTF-8 cannot encode it.
_NOT_IN_A_NAME = re.compile("[\r\n\0\ud800-\udfff]")


class Event:
    """An event that can be sent, and has no id yet. The log or a store gives it one.

    data      Text of at most MAX_EVENT bytes. Its lines may end in CRLF, LF or CR.
    event     Its name. None or an empty one: clients take it for a `message`.
    channel   Only clients that asked for this channel get the event. None: all clients do.

    Raises ValueError for what no event can hold, TypeError for what is not text.
    """

    def __init__(self, data: str, event: str | None = None, channel: str | None = None) -> None:
        if not (isinstance(data, str) and isinstance(event or "", str)
                and isinstance(channel or "", str)):
            raise TypeError("data, event and channel are strings: use json.dumps for other data")
        if event:
            check_name("event", event)
        if event in OWN_NAMES:
            raise ValueError(f"the event name {event} is the server's own: take another one")
        if channel is not None:
            check_name("channel", channel)
        self.data = data
        self.name = event or None
        self.channel = channel

        # The event as fields of a stream, still without an id.
        self.payload = encode(data, event)


def check_name(kind: str, name: str) -> None:
    """Raise ValueError if a name cannot stand on one line.

    kind: `event` or `channel`, for the message.
    """
    if not name:
        raise ValueError(f"the {kind} has no name: leave it out instead")
    if _NOT_IN_A_NAME.search(name):
        raise ValueError(f"the {kind} name has a CR, LF, NUL or a lone surrogate")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"the {kind} name is longer than {MAX_NAME} bytes")


def encode(data: str, event: str | None = None) -> bytes:
    """Return data and a name as fields of a stream. The name must have been checked.

    CRLF, LF and CR end a line, and nothing else does, although `str.splitlines` knows more (WHATWG
    HTML section 9.2.5). Raises ValueError if the data is too long, or has a lone surrogate, which
    UTF-8 cannot encode.
    """
    encoded = data.encode()
    if len(encoded) > MAX_EVENT:
        raise ValueError(f"the data is longer than {MAX_EVENT} bytes")
    # Most data has no CR. In 1 MiB, that is seen in 8 us, while looking for CRLF takes 750 us.
    if b"\r" in encoded:
        encoded = encoded.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    name = f"event: {event}\n".encode() if event else b""
    return b"".join((name, b"data: ", encoded.replace(b"\n", b"\ndata: "), b"\n\n"))


def parse_event(line: str) -> Event | None:
    """Return the event that `{"data": ..., "event": ..., "channel": ...}` describes.

    A blank line is None. Data that is not a string is sent as the JSON text that stands in the
    line, so that numbers keep their digits. Raises ValueError, which says what is wrong and quotes
    the line.
    """
    if not line.strip():
        return None
    try:
        return _parse_members(line)
    except json.JSONDecodeError as error:
        # Without the number of the line: it is always the first.
        what = f"{error.msg} in column {error.colno}"
    except RecursionError:
        what = "it is nested too deeply"
    except (TypeError, ValueError) as error:
        what = str(error)
    quoted = line if len(line) <= MAX_QUOTE else f"{line[:MAX_QUOTE]}..."
    raise ValueError(f"{what}: {quoted!r}")


def _parse_members(line: str) -> Event:
    members = _JSON.decode(line)
    if not isinstance(members, dict) or "data" not in members:
        raise ValueError('it is not an object with "data"')
    unknown = members.keys() - {"data", "event", "channel"}
    if unknown:
        raise ValueError(f"nothing is known of {min(unknown)!r}")
    if not isinstance(members["data"], str):
        members["data"] = _text_of_data(line)
    return Event(**members)


def _text_of_data(line: str) -> str:
    """Return the value of "data" as it stands in a line that is a JSON object with this member.

    If there are several, the last one counts, as for a decoder.
    """
    # Names and values in turn: what each stands for, and how it stands there.
    items: list[tuple[Any, str]] = []
    at = line.index("{") + 1
    # The line has been decoded once, so between two items there is nothing but this.
    while line[at] != "}":
        if line[at] in " \t\r\n,:":
            at += 1
        else:
            item, end = _JSON.raw_decode(line, at)
            items.append((item, line[at:end]))
            at = end
    pairs = zip(items[::2], items[1::2])
    return [text for (name, _), (_, text) in pairs if name == "data"][-1]


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python would take (RFC 8259 section 6)."""
    raise ValueError(f"{name} is not JSON")


# Numbers are not converted: their text is sent, and Python takes no integer over 4,300 digits.
_JSON = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse_constant)


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


def unchunk(frame: bytes) -> memoryview:
    """Return the payload of a chunk made by `chunk`, without a copy of it."""
    return memoryview(frame)[10:-2]


# A comment without a blank line. That would end a block, and clients that are not strict make an
# empty event of it.
HEARTBEAT = chunk(b":\n")


def retry_after(seconds: float) -> int:
    """Return how many milliseconds a client should wait before it reconnects.

    The time varies by 50 %, so that clients that left together do not come back together.
    """
    return min(MAX_RETRY, round(seconds * 1000 * random.uniform(0.5, 1.5)))


def welcome(newest: Id, retry: float, heartbeat: float) -> bytes:
    """Return the chunk that begins the stream of a client without an id. Both times are in seconds.

    It is an event with data, because Firefox, WebKit and most client libraries ignore the id of a
    block without. The heartbeat tells HTTP clients which read timeout is safe; 0: none is sent.
    """
    event = b'event: welcome\nretry: %d\ndata: {"heartbeat": %.10g}\n\n'
    return chunk(with_id(event % (retry_after(retry), heartbeat), newest))


def retry_line(seconds: float) -> bytes:
    """Return the chunk that begins every other stream: a line of the next event's block.

    It is no block of its own. Clients that are not strict make an empty event of one without data.
    """
    return chunk(b"retry: %d\n" % retry_after(seconds))


def busy(seconds: float) -> bytes:
    """Return the chunk of a stream that ends at once: the client should come back later.

    Some clients drop a `retry:` without data at the end of a stream, so this is an event.
    """
    milliseconds = retry_after(seconds)
    # Clients that do not show `retry:` to their program show the data.
    return chunk(b'event: busy\nretry: %d\ndata: {"retry": %.10g}\n\n'
                 % (milliseconds, milliseconds / 1000))


def gap_payload(after: str | None, resumed: str | None, reason: str, own: Id | None) -> bytes:
    """Return the event that tells a client what it will not get.

    after     The id up to which it has everything, or that it gave.
    resumed   The id of the event with which it goes on. None: there is none yet.
    reason    `evicted`, `unknown` or `lagging`.
    own       The client's own id, if it has one. It is repeated, because some clients forget theirs
              at an event without one.
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
