"""Turn log lines and a status line into standard error, whether or not anybody reads that.

A pager, a terminal held by Ctrl-S or a stuck collector takes no bytes for hours. So one thread
writes, and nobody else waits for it: whoever logs adds a line to a bounded queue.

    any thread --> write --> queue --> thread `log` --> standard error
                     |
                     +--> left out and counted, while the queue is full

LogWriter is a text stream, so logging.StreamHandler can write to it.
"""
from __future__ import annotations

import atexit
import os
import select
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TextIO

# For a terminal: go to the start of the line and erase it.
CLEAR_LINE = "\r\x1b[K"

# Lines that wait to be written. Most have about 100 bytes.
MAX_LINES = 1000

# Seconds for the last lines to be written when the process ends.
LAST_LINES_TIME = 0.5


class LogWriter:
    """Write to a stream in a thread of its own. On a terminal, keep a status line below."""

    def __init__(self, stream: TextIO) -> None:
        # Not the stream itself: Python takes its lock at exit, and a stuck write would hold that.
        self._descriptor = stream.fileno()

        # What goes before each line, so that the line takes the place of the status line.
        self._clear = CLEAR_LINE if stream.isatty() else ""

        # Lines to be written, in order. None ends the thread. `write` sees to the bound.
        self._queue: SimpleQueue[str | None] = SimpleQueue()

        # Lines left out since that was last told. Guarded by the lock of the handler that writes.
        self._left_out = 0

        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()
        atexit.register(self._close)

    def write(self, line: str) -> None:
        """Add a line, or leave it out. Never waits.

        A logging handler calls this from any thread, and holds its lock meanwhile.
        """
        # When lines were left out, half the queue must be free before the next is taken. Else a
        # reader that is only slow would be told after each line that some are missing.
        if self._queue.qsize() >= (MAX_LINES // 2 if self._left_out else MAX_LINES):
            self._left_out += 1
            return
        if self._left_out:
            self._queue.put(f"{self._clear}lines left out, because nobody read: {self._left_out}\n")
            self._left_out = 0
        self._queue.put(self._clear + line)

    def flush(self) -> None:
        """Do nothing, because the thread writes each line as soon as it can."""

    def show_status(self, line: str) -> None:
        """Renew the status line, unless lines still wait. Called from one thread only."""
        if self._queue.empty():
            self._queue.put(self._clear + line)

    def _close(self) -> None:
        """Wait a moment for the last lines. Python calls this at exit, when nobody logs any more.
        """
        # Tells what was left out, if anybody reads that.
        self.write("")
        self._queue.put(None)
        self._thread.join(LAST_LINES_TIME)

    def _write_all(self) -> None:
        """Write line by line, so that lines stay whole beside those of other processes.

        The thread `log` runs this.
        """
        for line in iter(self._queue.get, None):
            data = line.encode(errors="backslashreplace")
            # What is full or hung up takes no line, and there is nowhere to say so.
            with suppress(OSError):
                while data:
                    # Another process that shares it may have made it non-blocking.
                    select.select([], [self._descriptor], [])
                    data = data[os.write(self._descriptor, data):]
