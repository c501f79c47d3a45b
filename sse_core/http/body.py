"""Turn the bytes that follow a head into the body of a POST, in whatever pieces they arrive.

    length known    so many bytes of data
    chunked         size line, data, line end; again and again, until a size of 0; then trailers

Each is a generator that reads from the piece that was fed last, and yields where it needs the next
one. What they share are the two things there are to read: data of known length, and a line.

Of the chunked coding (RFC 9112 section 7.1) extensions and trailers are ignored, and bounded. It is
read strictly, as http1.py reads a head, and for the same reason.

No socket, no thread and no clock in here.
"""
from __future__ import annotations

import re
from collections.abc import Generator, Iterator

from sse_core.engine.frames import MAX_EVENT
from sse_core.errors import Refusal
from sse_core.http.http1 import TOKEN, VALUE

# Bytes of extensions and trailers in all. Each tiny chunk counts as one, too.
MAX_IGNORED = 4096

# Bytes. A smaller chunk is tiny: 1 MiB in chunks of one byte took 2.4 s.
TINY = 16

# Lines, whole or begun: \Z is where one may have been cut.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]+\Z|[ \t]*;%b)?(\r\n?)?" % VALUE)
_DATA_END = re.compile(rb"\r\n?")
_TRAILER = re.compile(rb"(%b(\Z|:%b))?(\r\n?)?" % (TOKEN, VALUE))


class Body:
    """Decode one body: of `length` bytes, or chunked if that is None."""

    def __init__(self, length: int | None) -> None:
        # What has arrived of it, decoded. The caller may look at it at any time.
        self.data = bytearray()

        self._reader = self._read_chunks() if length is None else self._read(length)

        # The piece that was fed last, and how many bytes of it have been read.
        self._piece, self._at = b"", 0

        # What counts for MAX_IGNORED so far.
        self._ignored = 0

    def feed(self, piece: bytes) -> bytes | None:
        """Take more of it. Returns the part of `piece` that follows the body; None: more is due.

        Raises Refusal, as soon as it is seen, for more than an event can hold, and for what is not
        chunked as said. The first piece may be empty.
        """
        self._piece, self._at = piece, 0
        for _ in self._reader:
            return None
        return piece[self._at:]

    def _read(self, length: int) -> Iterator[None]:
        """Read so many bytes of data."""
        end = len(self.data) + length
        if end > MAX_EVENT:
            raise Refusal(413, f"The body is longer than {MAX_EVENT} bytes. Send less at once.")
        while len(self.data) < end:
            if self._at == len(self._piece):
                yield
            part = self._piece[self._at:self._at + end - len(self.data)]
            self.data += part
            self._at += len(part)

    def _read_line(self, pattern: re.Pattern[bytes]) -> Generator[None, None, re.Match[bytes]]:
        """Read a line, which must fit the pattern from its first byte on."""
        line = b""
        while True:
            while self._at == len(self._piece):
                yield
            end = self._piece.find(b"\n", self._at) + 1 or len(self._piece)
            line += self._piece[self._at:end]
            self._at = end
            match = pattern.fullmatch(line)
            if not match:
                raise Refusal(400, "The body is not encoded in chunks, as Transfer-Encoding says.")
            if self._ignored + len(line) > MAX_IGNORED:
                raise Refusal(400, f"The chunks have more than {MAX_IGNORED} bytes of extensions "
                                   f"and trailers, or too many are shorter than {TINY} bytes.")
            if line.endswith(b"\n"):
                return match

    def _read_chunks(self) -> Iterator[None]:
        size = None
        while size != 0:
            line = yield from self._read_line(_SIZE)
            size = int(line[1], 16)
            self._ignored += len(line[0]) - line.end(1) - len(b"\r\n") + (0 < size < TINY)
            yield from self._read(size)
            if size:
                yield from self._read_line(_DATA_END)
        while line[0] != b"\r\n":
            line = yield from self._read_line(_TRAILER)
            self._ignored += len(line[0])
