"""Turn log records and status lines into standard error, whether or not anybody reads that.

A pager, a stopped terminal or a stuck collector takes no bytes for hours. So one thread writes, and
nobody else waits for it: whoever logs adds a line to a bounded queue.

    any thread --> emit --> queue --> thread `log` --> standard error
                     |
                     +--> left out and counted, when the queue is full
"""
from __future__ import annotations

import logging
import os
import select
import threading
from queue import SimpleQueue
from typing import TextIO

# Of a terminal: to the start of the line, and the rest of it is erased.
CLEAR_LINE = "\r\x1b[K"

# Lines that wait to be written: most have about 100 bytes.
MAX_LINES = 1000

# Seconds for the last lines to be written, when the process ends.
LAST_LINES_TIME = 0.5


class LogWriter(logging.Handler):
    """Write to a stream in a thread of its own. On a terminal, over the status line."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        # Not the stream: Python would wait for its lock at exit, which a stuck write holds.
        self._descriptor = stream.fileno()
        self._clear = CLEAR_LINE if stream.isatty() else ""

        # None ends the thread. `_add` bounds it.
        self._queue: SimpleQueue[str | None] = SimpleQueue()

        # Lines left out since that was last said. Guarded by the lock of the handler.
        self._left_out = 0

        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Add a record, or leave it out. Logging calls this, and holds the lock of the handler."""
        try:
            self._add(f"{self._clear}{self.format(record)}\n")
        except Exception:
            self.handleError(record)

    def show_status(self, line: str) -> None:
        """Renew the line at the bottom of the terminal, unless there is still something to write.

        Call it from one thread only.
        """
        if self._queue.empty():
            self._queue.put(self._clear + line)

    def close(self) -> None:
        """Say what was left out, and wait a moment for the last lines. Python calls it at exit."""
        # `logging.shutdown` holds the lock here.
        self._tell_left_out()
        self._queue.put(None)
        self._thread.join(LAST_LINES_TIME)
        super().close()

    def _add(self, line: str) -> None:
        # When lines were left out, half the queue must be free before the next is taken. Else a
        # reader that is only slow would be told after each line that some are missing.
        if self._queue.qsize() >= (MAX_LINES // 2 if self._left_out else MAX_LINES):
            self._left_out += 1
            return
        self._tell_left_out()
        self._queue.put(line)

    def _tell_left_out(self) -> None:
        if self._left_out:
            self._queue.put(f"{self._clear}lines left out, because nobody read what was logged: "
                            f"{self._left_out}\n")
            self._left_out = 0

    # Run by the thread

    def _write_all(self) -> None:
        for line in iter(self._queue.get, None):
            data = line.encode(errors="backslashreplace")
            while data:
                try:
                    data = data[os.write(self._descriptor, data):]
                except BlockingIOError:
                    # Another process has made it non-blocking.
                    select.select([], [self._descriptor], [])
                except OSError:
                    # It is full, or hung up, and there is nowhere to say so.
                    break
