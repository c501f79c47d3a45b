"""Run calls that may block in a few threads, and hand out their results as futures.

The pools of `concurrent.futures` would do, but their threads keep a program alive until the last
call has returned, and a program's `authorize` may never return. These are daemons.

    submit      The call waits in line. A thread is begun for it if no other is idle.
    begun       A thread has taken it: nothing can take it back.
    done        The future has a result or an exception. Its callbacks run in that thread.
    cancelled   `Future.cancel` took it back while it was in line. It leaves the line at once, so
                that the line is never longer than the number of those who still wait.

The threads touch no socket: what they return goes back to the thread that asked.
"""
from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any, Callable, TypeVar

T = TypeVar("T")

_numbers = count(1)


class Pool:
    """Run calls in at most `size` daemon threads, called request-N. Any thread may use it."""

    def __init__(self, size: int) -> None:
        # Guards all below; notified when there is a call for an idle thread, or the end.
        self._changed = threading.Condition()

        # The calls in line, the oldest first.
        self._line: dict[Future[Any], Callable[[], Any]] = {}

        self._size = size
        self._threads: list[threading.Thread] = []

        # Threads that wait for a call.
        self._idle = 0

        self._is_stopping = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Return the future of a call, which a thread makes when it has time."""
        future: Future[T] = Future()
        future.add_done_callback(self._leave)
        with self._changed:
            self._line[future] = call
            if len(self._line) > self._idle and len(self._threads) < self._size:
                self._begin_thread()
            self._changed.notify()
        return future

    def stop(self, until: float) -> None:
        """Begin no call any more, and join the threads that end until then, on time.monotonic."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            # A call may be the one that stops all this.
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _leave(self, future: Future[Any]) -> None:
        """Forget a call that was cancelled. One that is done is not in line any more."""
        with self._changed:
            self._line.pop(future, None)

    def _begin_thread(self) -> None:
        """Add a thread. If the system gives none, the calls wait for those that there are."""
        thread = threading.Thread(target=self._run, name=f"request-{next(_numbers)}", daemon=True)
        with suppress(RuntimeError):
            thread.start()
            self._threads.append(thread)

    # Run by the pool's threads

    def _run(self) -> None:
        while self._run_one():
            pass

    def _run_one(self) -> bool:
        """Make one call. Returns False when the pool is stopped.

        Nothing of the call is held here while the thread is idle.
        """
        with self._changed:
            while not (self._line or self._is_stopping):
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            if self._is_stopping:
                return False
            future = next(iter(self._line))
            call = self._line.pop(future)
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            # SystemExit, too: it costs this call alone.
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        return True
