"""Turn the bytes that follow a head into the body of a POST, in whatever pieces they arrive.

A body is read as data and lines in turn. What comes next is known from two numbers and a pattern:

    bytes of data left > 0      that many bytes of data
    else, a line that is due    size line --> data --> line end --> size line ...
                                size line of 0 --> trailers --> empty line
    else                        nothing: the body is whole

One whose length is known begins with data and no line. Of the chunked coding (RFC 9112 section 7.1)
extensions and trailers are ignored, and bounded. It is read strictly, as http1.py reads a head, and
for the same reason: a line is refused at the first byte that does not fit.

No socket, no thread and no clock in here.
"""
from __future__ import annotations

import re
from io import BytesIO

from sse_core.engine.frames import MAX_EVENT
from sse_core.errors import HTTPError
from sse_core.http.http1 import TOKEN, VALUE

# Bytes of extensions and trailers in all. Each tiny chunk counts as one, too.
MAX_IGNORED = 4096

# Bytes. A smaller chunk is tiny: 1 MiB in chunks of one byte took 2.4 s.
TINY = 16

# Lines, whole or begun: \Z is where one may have been cut. Sixteen digits are as many as a 64-bit
# number has. Space before the semicolon is taken, as the RFC asks for, and none after the size.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]+\Z|[ \t]*;%b)?(\r\n?)?" % VALUE)
_DATA_END = re.compile(rb"\r\n?")
_TRAILER = re.compile(rb"(%b(\Z|:%b))?(\r\n?)?" % (TOKEN, VALUE))


class Body:
    """Decode one body: of `length` bytes, or chunked if that is None.

    The constructor and `feed` raise HTTPError for more than an event can hold, and for what is not
    chunked as said. After that, the object is of no use.
    """

    def __init__(self, length: int | None) -> None:
        # What has arrived of it, decoded. The caller may look at it at any time.
        self.data = bytearray()

        # The line that is due after the data, if any, and what has arrived of it.
        self._due = _SIZE if length is None else None
        self._line = b""

        # What counts for MAX_IGNORED so far.
        self._ignored = 0

        # This sets `_left`: the bytes of data that are due.
        self._expect(length or 0)

    def feed(self, piece: bytes) -> bytes | None:
        """Take more of the body, in `piece`, which may be empty.

        Returns the part of it that follows the body, or None if more of the body is due. Takes
        linear time, into however many chunks the piece is divided.
        """
        source = BytesIO(piece)
        while self._left or self._due:
            part = source.read(self._left) if self._left else source.readline()
            if not part:
                return None
            if self._left:
                self.data += part
                self._left -= len(part)
            else:
                self._line += part
                self._take_line()
        return source.read()

    def _expect(self, length: int) -> None:
        """Have so many bytes of data read next. Raises HTTPError before any of them is."""
        if len(self.data) + length > MAX_EVENT:
            raise HTTPError(413, f"The body is longer than {MAX_EVENT} bytes. Send less at once.")
        self._left = length

    def _take_line(self) -> None:
        """Look at the line that is due, as far as it is there. Act upon it if it is whole.

        Raises HTTPError for a line that cannot become right any more.
        """
        # For the type checker: `feed` calls this only if there is one.
        assert self._due
        line, match = self._line, self._due.fullmatch(self._line)
        if not match:
            raise HTTPError(400, "The body is not encoded in chunks, as Transfer-Encoding says.")
        if self._ignored + len(line) > MAX_IGNORED:
            raise HTTPError(400, f"The chunks have more than {MAX_IGNORED} bytes of extensions and "
                                 f"trailers, or too many are shorter than {TINY} bytes.")
        if line.endswith(b"\n"):
            self._line = b""
            self._end_line(line, match)

    def _end_line(self, line: bytes, match: re.Match[bytes]) -> None:
        """Decide what is due after this line."""
        if self._due is _SIZE:
            size = int(match[1], 16)
            self._ignored += len(line) - match.end(1) - len(b"\r\n") + (0 < size < TINY)
            self._expect(size)
            self._due = _DATA_END if size else _TRAILER
        elif self._due is _DATA_END:
            self._due = _SIZE
        else:
            self._ignored += len(line)
            # The empty line has no name, and is the last one.
            self._due = _TRAILER if match[1] else None
