"""Turn what happens outside into events: where events come from.

A source is a function that is given what publishes, and a stop flag. It runs in the thread
`source`, and returns when it has no more events or the flag is set.
"""
from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Callable

from sse_core.engine.frames import MAX_EVENT, Draft
from sse_core.errors import Unavailable

STOP_CHECK = 0.25       # seconds between two looks at the stop flag while there is nothing to read
MAX_LINE = MAX_EVENT + 4    # bytes, with a byte order mark before it and the CR of its line end

logger = logging.getLogger("sse_server")


def clock(publish: Callable[..., object], stopping: threading.Event, interval: float) -> None:
    """Publish the local time every `interval` seconds, four times in ten as `custom`."""
    due = time.monotonic()
    while True:
        due = max(due + interval, time.monotonic())     # after a suspend: go on, do not catch up
        if stopping.wait(max(0.0, due - time.monotonic())):
            return
        event = "custom" if random.randint(0, 9) > 5 else None
        try:
            publish(time.strftime("%m/%d/%Y %H:%M:%S"), event)
        except Unavailable:     # the shared log is away, and has said so; there are more ticks
            pass


def lines(publish_all: Callable[..., object], stopping: threading.Event, descriptor: int,
          parse: Callable[[str], Draft | None] = Draft) -> int:
    """Publish each line that comes from a file descriptor until there is none; return how many.

    parse: makes an event of a line, or None of one to skip, or raises ValueError. Such a line, or
    one over 1 MiB, is left out, and bytes that are not UTF-8 become U+FFFD: each with one warning,
    which names the first such line. A byte order mark at the start is skipped. Slow clients that
    keep the pace hold the lines back, see `Broadcast.publish_all`.
    """
    published = 0
    splitter = LineSplitter()
    while not stopping.is_set():
        if not select.select([descriptor], [], [], STOP_CHECK)[0]:
            continue
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError as error:        # not open for reading, or a terminal that was hung up
            logger.warning("standard input: %s; taken for its end", error.strerror)
            data = b""
        drafts = splitter.parsed(splitter.feed(data) if data else splitter.end(), parse)
        publish_all(drafts, wait=True)
        published += len(drafts)
        if not data:
            break
    splitter.tell_left_out()
    return published


class LineSplitter:
    """Turn bytes in any pieces into lines of text, holding at most one line of MAX_EVENT bytes."""

    def __init__(self) -> None:
        self._held: list[bytes] = []    # pieces of a line whose end is still to come
        self._length = 0                # bytes of that line so far, held or too many to be
        self._number = 0                # of the line that came last, from 1 on
        self._warned: set[str] = set()
        self._left_out = 0              # lines

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the lines that end in `data`."""
        *ended, rest = data.split(b"\n")
        for line in ended:
            self._hold(line)
            yield from self._finish()
        self._hold(rest)

    def end(self) -> Iterator[str]:
        """Yield the last line, if it had no line end. Nothing but a byte order mark is no line."""
        if self._length:
            yield from filter(None, self._finish())

    def parsed(self, lines: Iterator[str], parse: Callable[[str], Draft | None]) -> list[Draft]:
        """Return the lines that are events."""
        drafts = []
        for line in lines:
            try:
                drafts.append(parse(line))
            except ValueError as error:
                self._left_out += 1
                self._warn("lines that are no events are left out", f": {error}")
        return [draft for draft in drafts if draft]

    def tell_left_out(self) -> None:
        """Say how many lines were left out, if any were."""
        if self._left_out:
            logger.warning("standard input: %d lines were left out", self._left_out)

    def _hold(self, piece: bytes) -> None:
        self._length += len(piece)
        self._held.append(piece)
        if self._length > MAX_LINE:
            self._held.clear()

    def _finish(self) -> Iterator[str]:
        skipping, line = self._length > MAX_LINE, b"".join(self._held)
        self._held, self._length = [], 0
        self._number += 1
        if self._number == 1 and line.startswith(BOM_UTF8):
            line = line[len(BOM_UTF8):]
        text = line[:-1] if line.endswith(b"\r") else line
        decoded = text.decode(errors="replace")
        if "\ufffd" in decoded and decoded.encode() != text:
            self._warn("bytes that are not UTF-8 are published as U+FFFD")
            text = decoded.encode()
        if skipping or len(text) > MAX_EVENT:
            self._left_out += 1
            self._warn(f"lines over {MAX_EVENT} bytes are left out")
        else:
            yield decoded

    def _warn(self, what: str, more: str = "") -> None:
        if what not in self._warned:
            logger.warning("standard input: %s (first: line %d)%s", what, self._number, more)
        self._warned.add(what)
