"""Read a stream strictly: an independent parser of what the server writes, sharing no code with it.

`Decoder` takes bytes in any pieces. It raises on every deviation from RFC 9112 section 7.1 and
from this server's own promises (eight lower-case digits, one event a chunk), and interprets
fields as WHATWG HTML section 9.2.6 says.
"""
import re
from typing import List, NamedTuple, Optional


class Event(NamedTuple):
    name: str
    data: str
    id: str         # the client's last event id when the event was dispatched


class Decoder:
    """Decode one stream, head included.

    chunked: False for the body of an HTTP/1.0 answer. proxied: a proxy is between, which may cut
    chunks as it likes.

    original: the stream has the mixed line ends of the original, which a head without a charset
    says, too. The first event of a client without an id, `welcome`, is kept apart from the events
    that were published.
    """

    def __init__(self, chunked: bool = True, last_id: str = "", proxied: bool = False,
                 original: bool = False) -> None:
        self.chunked = chunked
        self.proxied = proxied
        self._original = original
        self._unchunked = b""
        self.head: List[str] = []
        self.payloads: List[bytes] = []
        self.welcome: Optional[Event] = None
        self.events: List[Event] = []
        self.comments = 0
        self.retries: List[int] = []
        self.last_id = last_id
        self.ended = False
        self._raw = b""

    @property
    def is_original(self) -> bool:
        return self._original or self.fields.get("Content-Type") == "text/event-stream"

    @property
    def status(self) -> int:
        return int(self.head[0].split(" ")[1])

    @property
    def fields(self) -> dict:
        return dict(line.split(": ", 1) for line in self.head[1:])

    @property
    def partial(self) -> bytes:
        """What arrived and is no whole chunk yet."""
        return self._raw

    def feed(self, data: bytes) -> None:
        assert not (self.ended and data), f"bytes after the end chunk: {data!r}"
        self._raw += data
        if not self.head:
            head, blank, rest = self._raw.partition(b"\r\n\r\n")
            if not blank:
                return
            self.head, self._raw = head.decode("ascii").split("\r\n"), rest
        while self._take_chunk() if self.chunked else self._take_block():
            pass

    def _take_chunk(self) -> bool:
        if self.proxied:
            return self._take_any_chunk()
        if self._raw.startswith(b"0\r\n\r\n"):
            assert self._raw == b"0\r\n\r\n", f"bytes after the end chunk: {self._raw!r}"
            self.ended, self._raw = True, b""
            return False
        line, crlf, rest = self._raw.partition(b"\r\n")
        if not crlf:
            assert re.fullmatch(rb"[0-9a-f]{0,8}\r?", line), line
            return False
        assert re.fullmatch(rb"[0-9a-f]{8}", line), f"not a length: {line!r}"
        size = int(line, 16)
        if len(rest) < size + 2:
            return False
        whole = rest[:size + 2]
        assert whole.endswith(b"\r\n"), f"the chunk is not {size} bytes long: {whole!r}"
        self._raw = rest[size + 2:]
        self._payload(rest[:size])
        return True

    def _take_any_chunk(self) -> bool:
        line, crlf, rest = self._raw.partition(b"\r\n")
        if not crlf or len(rest) < int(line, 16) + 2:
            return False
        size = int(line, 16)
        assert rest[size:size + 2] == b"\r\n"
        self.ended, self._raw = not size, rest[size + 2:]
        self._unchunked += rest[:size]
        self._unchunked = self._take_pieces(self._unchunked)
        return not self.ended

    def _take_block(self) -> bool:
        self._raw = self._take_pieces(self._raw)
        return False

    def _take_pieces(self, stream: bytes) -> bytes:
        """Take what is whole of a stream without chunks, and return what is left of it."""
        end = rb"\r\n\r\n" if self.is_original else rb"\n\n"
        pieces = re.compile(rb":\n|retry: [0-9]+\n|[^:r].*?" + end, re.DOTALL)
        while True:
            piece = pieces.match(stream)
            if not piece:
                return stream
            self._payload(piece[0])
            stream = stream[piece.end():]

    def _payload(self, payload: bytes) -> None:
        """One chunk is a block of lines that ends in a blank one, with one event at most.

        Or it is a line without a blank one: a comment, or `retry:` at the beginning. A blank line
        would end a block without data, of which clients that are not strict make an event.
        """
        if payload == b":\n":
            self.comments += 1
            return
        self.payloads.append(payload)
        if re.fullmatch(rb"retry: [0-9]+\n", payload):
            assert len(self.payloads) == 1, f"not at the beginning: {payload!r}"
            self.retries.append(int(payload[7:]))
            return
        text = payload.decode("utf-8", errors="strict")
        if self.is_original:
            text = text.replace("\r\n", "\n")
        assert "\r" not in text, f"a CR: {payload!r}"
        lines = text.split("\n")
        assert lines[-2:] == ["", ""] and "" not in lines[:-2], f"not one block: {payload!r}"
        self._dispatch(lines[:-2])

    def _dispatch(self, lines: List[str]) -> None:
        name, data = "message", []
        for line in lines:
            field, colon, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value or "message"
            elif field == "id":
                assert "\0" not in value
                self.last_id = value
            elif field == "retry":
                assert re.fullmatch("[0-9]+", value)
                self.retries.append(int(value))
            else:
                raise AssertionError(f"unknown field: {line!r}")
        assert data, f"a block without data: {lines}"
        event = Event(name, "\n".join(data), self.last_id)
        if name == "welcome":
            assert len(self.payloads) == 1, f"not at the beginning: {event}"
            self.welcome = event
        else:
            self.events.append(event)
