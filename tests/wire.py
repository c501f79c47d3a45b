"""Read a stream strictly: an independent parser of what the server writes, sharing no code with it.

`Decoder` takes bytes in any pieces. It raises on every deviation from RFC 9112 section 7.1 and
from this server's own promises (eight lower-case digits, one event a chunk), and interprets
fields as WHATWG HTML section 9.2.6 says.
"""
import re
from typing import List, NamedTuple


class Event(NamedTuple):
    name: str
    data: str
    id: str         # the client's last event id when the event was dispatched


class Decoder:
    """Decode one stream, head included.

    chunked: False for the body of an HTTP/1.0 answer. proxied: a proxy is between, which may cut
    chunks as it likes.
    """

    def __init__(self, chunked: bool = True, last_id: str = "", proxied: bool = False) -> None:
        self.chunked = chunked
        self.proxied = proxied
        self._unchunked = b""
        self.head: List[str] = []
        self.payloads: List[bytes] = []
        self.events: List[Event] = []
        self.comments = 0
        self.retries: List[int] = []
        self.last_id = last_id
        self.ended = False
        self._raw = b""

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
        while b"\r\n\r\n" in self._unchunked or self._unchunked.startswith(b":\n"):
            if self._unchunked.startswith(b":\n"):
                self._unchunked = self._unchunked[2:]
                self._payload(b":\n")
                continue
            block, blank, self._unchunked = self._unchunked.partition(b"\r\n\r\n")
            self._payload(block + blank)
        return not self.ended

    def _take_block(self) -> bool:
        if self._raw.startswith(b":\n"):
            self._raw = self._raw[2:]
            self._payload(b":\n")
            return True
        block, blank, rest = self._raw.partition(b"\r\n\r\n")
        if not blank:
            return False
        self._raw = rest
        self._payload(block + blank)
        return True

    def _payload(self, payload: bytes) -> None:
        """One chunk is a block of lines that ends in a blank one, with one event at most.

        Or it is a comment without a blank line: that would end a block, of which clients that are
        not strict make an event.
        """
        if payload == b":\n":
            self.comments += 1
            return
        self.payloads.append(payload)
        text = payload.decode("utf-8", errors="strict")
        lines = re.split("\r\n|\r|\n", text)
        assert lines[-2:] == ["", ""] and "" not in lines[:-2], f"not one block: {payload!r}"
        name, data = "message", []
        for line in lines[:-2]:
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
        if data:
            self.events.append(Event(name, "\n".join(data), self.last_id))
