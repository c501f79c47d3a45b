"""Turn what happens outside into events: the clock, and the lines of a pipe.

A source is a function that is given what publishes, and a stop flag. It runs in the thread
`source`, and returns when it has no more events or when the flag is set. To add one, write such a
function here, and have `_run_source` in sse_server.py call it.

    bytes --> LineSplitter --> lines --> parse --> events --> publish_all
              any pieces                 text or JSON         waits for slow clients
"""
from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
from codecs import BOM_UTF8
from contextlib import suppress
from typing import Callable

from sse_core.engine.frames import MAX_EVENT, Event
from sse_core.errors import Unavailable

# Seconds between two checks of the stop flag while there is nothing to read.
STOP_CHECK = 0.25

# Bytes of a line that can be an event: with a byte order mark before it and the CR of its line end.
MAX_LINE = MAX_EVENT + 4

# Makes an event of a line, or None of one to skip, or raises ValueError, which says what is wrong.
Parse = Callable[[str], "Event | None"]

logger = logging.getLogger("sse_server")


def clock(publish: Callable[..., object], stopping: threading.Event, interval: float) -> None:
    """Publish the local time every `interval` seconds, four times in ten as `custom`.

    Names and format are those of the original. A tick that comes late does not delay the next one.
    """
    due = time.monotonic()
    while True:
        # After a suspend, go on from now. Do not catch up.
        due = max(due + interval, time.monotonic())
        if stopping.wait(max(0.0, due - time.monotonic())):
            return
        event = "custom" if random.randint(0, 9) > 5 else None
        # If the store is away, it has said so, and there are more ticks.
        with suppress(Unavailable):
            publish(time.strftime("%m/%d/%Y %H:%M:%S"), event)


def lines(publish_all: Callable[..., object], stopping: threading.Event, descriptor: int,
          parse: Parse = Event) -> int:
    """Publish each line that comes from a file descriptor, until its end. Return how many.

    All lines that are there are published at once. Slow clients that keep the pace hold them back,
    and so the program that writes to the pipe; see `Hub.publish_all`.

    descriptor: of the pipe, whose reads may block. parse: see Parse. Lines for which it raises
    ValueError are left out, and counted in a warning at the end; see LineSplitter.
    """
    published = 0
    splitter = LineSplitter(parse)
    while not stopping.is_set():
        # A pipe can be silent for ever. So the stop flag is looked at now and then.
        if not select.select([descriptor], [], [], STOP_CHECK)[0]:
            continue
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError as error:
            # It is not open for reading, or a terminal that was hung up.
            logger.warning("standard input: %s; taken for its end", error.strerror)
            data = b""
        events = splitter.feed(data) if data else splitter.end()
        publish_all(events, wait=True)
        published += len(events)
        if not data:
            break
    if splitter.left_out:
        logger.warning("standard input: %d lines were left out", splitter.left_out)
    return published


class LineSplitter:
    """Turn bytes in any pieces into events, holding at most one line of MAX_LINE bytes.

    Lines end in LF or CRLF. A byte order mark at the start is no content. A line that is no event,
    or longer than 1 MiB, is left out, and bytes that are not UTF-8 become U+FFFD. For each of
    these, one warning names the first line: who pipes a million bad lines is told once.
    """

    def __init__(self, parse: Parse) -> None:
        self._parse = parse

        # The beginning of a line whose end is still to come. One byte too many is kept of a line
        # that is too long, to know that it is.
        self._held = bytearray()

        # Number of the line that ended last, from 1 on.
        self._number = 0

        # What was warned of already.
        self._warned: set[str] = set()

        # How many lines were left out. Blank ones that were skipped do not count.
        self.left_out = 0

    def feed(self, data: bytes) -> list[Event]:
        """Return the events of the lines that end in `data`."""
        *ended, rest = data.split(b"\n")
        if ended:
            ended[0] = bytes(self._held) + ended[0]
            self._held.clear()
        self._held += rest
        del self._held[MAX_LINE + 1:]
        return [event for event in map(self._event, ended) if event is not None]

    def end(self) -> list[Event]:
        """Return the event of the last line, if it had no line end. A byte order mark is no line.
        """
        return self.feed(b"\n") if bytes(self._held) not in (b"", BOM_UTF8) else []

    def _event(self, line: bytes) -> Event | None:
        """Return the event of a whole line; None if it is skipped or left out."""
        self._number += 1
        if self._number == 1:
            line = line.removeprefix(BOM_UTF8)
        line = line.removesuffix(b"\r")
        try:
            if len(line) > MAX_EVENT:
                raise ValueError(f"it is longer than {MAX_EVENT} bytes")
            text = line.decode(errors="replace")
            # The character itself may stand in a line, too.
            if "\ufffd" in text and text.encode() != line:
                self._warn("bytes that are not UTF-8 are published as U+FFFD")
            return self._parse(text)
        except ValueError as error:
            self.left_out += 1
            self._warn("lines that are no events are left out", f": {error}")
            return None

    def _warn(self, what: str, why: str = "") -> None:
        if what not in self._warned:
            logger.warning("standard input: %s (first: line %d)%s", what, self._number, why)
        self._warned.add(what)
