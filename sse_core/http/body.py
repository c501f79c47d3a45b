"""Turn the bytes that follow a head into the body of a POST, in whatever pieces they arrive.

No socket, no thread and no clock in here. Of the chunked coding (RFC 9112 section 7.1) extensions
and trailers are ignored, and bounded. It is strict, as http1.py is, and for the same reason.
"""
from __future__ import annotations

import re

from sse_core.engine.frames import MAX_EVENT
from sse_core.errors import Refusal
from sse_core.http.http1 import TOKEN, VALUE

MAX_IGNORED = 4096          # bytes of extensions and trailers in all, and tiny chunks
TINY = 16                   # bytes: 1 MiB in chunks of one byte took 2.4 s

# Lines, whole or begun: \Z is where one may have been cut
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]+\Z|[ \t]*;%b)?(\r\n?)?" % VALUE)
_DATA_END = re.compile(rb"\r\n?")
_TRAILER = re.compile(rb"(%b(\Z|:%b))?(\r\n?)?" % (TOKEN, VALUE))


class Body:
    """Decode one body: of so many bytes, or chunked if that is None.

    Making one, and `feed`, raise Refusal for what no event can hold, or is not chunked as said.
    """

    def __init__(self, length: int | None) -> None:
        self.data = bytearray()     # what has arrived of it
        self._left = 0              # bytes of data that are due
        self._due = _SIZE if length is None else None   # the line that is due after them, if any
        self._line = b""            # what has arrived of that
        self._ignored = 0           # bytes of extensions and trailers
        self._expect(length or 0)

    def feed(self, piece: bytes) -> bytes | None:
        """Take more of it. Returns the part of `piece` that follows the body; None: more is due."""
        at = 0
        while at < len(piece) and (self._left or self._due):
            begin = at
            if self._left:
                at = min(len(piece), begin + self._left)
                self.data += piece[begin:at]
                self._left -= at - begin
            else:
                at = piece.find(b"\n", begin) + 1 or len(piece)
                self._line += piece[begin:at]
                self._take_line()
        return None if self._left or self._due else piece[at:]

    def _expect(self, length: int) -> None:
        if len(self.data) + length > MAX_EVENT:
            raise Refusal(413, f"The body is longer than {MAX_EVENT} bytes. Send a smaller event, "
                               "or fewer at once.")
        self._left = length

    def _take_line(self) -> None:
        """Look at the line that is due, as far as it is there; act upon it if it is whole."""
        assert self._due
        line, match = self._line, self._due.fullmatch(self._line)
        if not match:
            raise Refusal(400, "The body is not encoded in chunks, as Transfer-Encoding says.")
        if self._ignored + len(line) > MAX_IGNORED:
            raise Refusal(400, f"The chunks have more than {MAX_IGNORED} bytes of extensions and "
                               f"trailers, or too many are shorter than {TINY} bytes.")
        if line.endswith(b"\n"):
            self._line = b""
            self._end_line(line, match)

    def _end_line(self, line: bytes, match: re.Match[bytes]) -> None:
        if self._due is _SIZE:
            size = int(match[1], 16)
            self._ignored += len(line) - match.end(1) - 2 + (0 < size < TINY)
            self._expect(size)
            self._due = _DATA_END if self._left else _TRAILER
        elif self._due is _DATA_END:
            self._due = _SIZE
        else:
            self._ignored += len(line)
            self._due = _TRAILER if match[1] else None
