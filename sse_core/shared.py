"""Take events from a log that is shared with other servers, in place of this one's own.

What is published goes to the shared log, and what comes back from it is sent. Such a log (a Redis
stream, an SQLite file) has three methods:

    publish(data, event, channel)   adds an event and returns its id; any thread may call it.
                                    Raises Unavailable while that cannot be
    load(shared)                    preloads the newest events, if they can be had
    follow(shared, stopping)        adds those that come, in order, until the flag is set,
                                    whatever happens to the log; it is run in a thread of its own
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sse_core import frames
from sse_core.broadcast import ID_LENGTH, Broadcast
from sse_core.frames import Id
from sse_core.log import Log


class Event(NamedTuple):
    """An event from a shared log, which gave it its id; encoded."""
    id: Id
    payload: bytes
    channel: str | None


class Shared(Broadcast):
    """A Broadcast whose events, and their ids, come from a shared log. Options as there."""

    def __init__(self, *, history: int = 1024, **options: Any) -> None:
        super().__init__(history=history, **options)
        self._log = Log(history)
        self._log.is_loaded, self._log.complete_at = False, -math.inf
        self.newest = self._log.last_id

    def add(self, event: Event) -> None:
        """Append an event of the shared log. Raises NotRunning after `stop`."""
        with self._mutex:
            _, wake = self._append(event.payload, event.channel, event.id, wait=False)
        if wake:
            self.wake()

    def preload(self, events: Sequence[Event]) -> None:
        """Fill the empty log with the newest events of the shared one, as far as they fit.

        Clients that are there already do not get them.
        """
        with self._mutex:
            assert self._log.next == 0, "only an empty log is filled"
            if events and self._ids:
                self._log.begin(events[0].id, -len(events))
            for event in events if self._ids else ():
                while not self._log.fits(len(event.payload) + ID_LENGTH):
                    self._log.evict()
                self._log.append(event.payload, event.id, event.channel, self.clock())
            self.newest = self._log.last_id     # of those before 0, with which the fan-out begins
            self._log.is_loaded = True

    def complete(self, at: float) -> None:
        """Say that the log has all that was in the shared one at that time, on `clock`."""
        with self._mutex:
            self._log.complete_at = at
            self._moved.notify_all()

    def tell_gap(self, after: Id | None, resumed: Id | None) -> None:
        """Tell all clients that the shared log has lost what was between these two ids."""
        ids = frames.format_id(after), frames.format_id(resumed)
        payload = frames.gap_payload(*ids, "evicted")
        with self._mutex:
            self._make_room(len(payload))
            self._log.append(payload, None, None, self.clock())
        self.wake()
