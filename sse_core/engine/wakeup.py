"""Turn a call in any thread into a wake-up of the thread that waits in a selector.

A thread that waits for sockets sees nothing else. So it watches a pipe, too, and whoever has work
for it writes a byte there. How many bytes there are means nothing: the thread reads them all, and
looks what there is to do.
"""
from __future__ import annotations

import os
from contextlib import suppress


class WakeUp:
    """A pipe for one thread's selector. Only that thread calls the methods other than `wake`.

    A pair of sockets would do, too, but costs 15 us more of the 250 of an event to 10 clients.
    """

    def __init__(self) -> None:
        # None before `open` and after `close`. Other threads take a reference of their own before
        # they use it, so it stays open as long as they do.
        self._pipe: _Pipe | None = None

    def open(self) -> int:
        """Return the descriptor that becomes readable. Nothing is open before that."""
        self._pipe = _Pipe()
        return self._pipe.reader

    def wake(self) -> None:
        """Wake the thread, if one waits here. Any thread may call it. Never waits."""
        pipe = self._pipe
        # A full pipe has bytes enough to wake up from.
        with suppress(BlockingIOError):
            if pipe:
                os.write(pipe.writer, b"\0")

    def clear(self) -> None:
        """Read what `wake` has written, once the selector says that there is something."""
        # What is more than that wakes it again at once.
        if self._pipe:
            os.read(self._pipe.reader, 4096)

    def close(self) -> None:
        """Close the pipe once no thread is writing to it."""
        self._pipe = None


class _Pipe:
    """Two descriptors that are closed when nobody has this object any more.

    If `close` closed them while another thread writes, the system could give their numbers to a
    file meanwhile, and the byte would go there.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

        # Whoever wakes must not wait when the pipe is full.
        os.set_blocking(self.writer, False)

    # Without reference counting this comes later, which does no harm.
    def __del__(self) -> None:
        os.close(self.writer)
        os.close(self.reader)
