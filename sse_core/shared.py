"""Take events from a log that is shared with other servers, in place of this one's own.

What is published goes to the shared log, and what comes back from it is sent: so every server
sends the same, in one order. All that is known of such a log is SharedLog.
"""
from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from sse_core import frames
from sse_core.broadcast import ID_LENGTH, LOOK, Broadcast, Unavailable
from sse_core.frames import Draft, Id
from sse_core.log import MIN_HISTORY, Log


class Event(NamedTuple):
    """An event from a shared log, which gave it its id; encoded."""
    id: Id
    payload: bytes
    channel: str | None


class SharedLog(Protocol):
    """What a Redis stream and an SQLite file have in common."""
    trouble: str | None     # why it cannot be used now; any thread may read it

    def publish(self, drafts: Sequence[Draft]) -> list[str]:
        """Add events, all or none, and return their ids. Any thread may call it.

        Raises Unavailable while that cannot be.
        """

    def load(self, shared: Shared, now: float) -> None:
        """Preload the newest events, if they can be had. now: seconds since the epoch."""

    def follow(self, shared: Shared, stopping: threading.Event) -> None:
        """Add those that come, in order, until the flag is set, whatever happens to the log."""


class Shared(Broadcast):
    """A Broadcast whose events, and their ids, come from a shared log. Options as there."""

    def __init__(self, stream: SharedLog, *, history: int = 1024, **options: Any) -> None:
        super().__init__(history=history, **options)
        self.stream = stream
        self._log = Log(history)
        self._log.is_loaded, self._log.complete_at = False, -math.inf
        self.newest = self._log.last_id
        # Of those who wait: how many events at once, which fit into the share of who does not wait
        self._piece = max(MIN_HISTORY, history) // 4
        self._own: Id = (0, 0)      # the newest id that they published, and the time after that
        self._own_at = -math.inf
        self._arrived: Id = (0, 0)  # the id that came back last

    def publish_all(self, drafts: Sequence[Draft], wait: bool = False) -> list[str | None]:
        """Publish to the shared log, all or none; with `wait`, in pieces, each when it takes them.

        An event whose answer was lost may then be published twice. Raises what `publish` does.
        """
        for draft in drafts:
            draft.encoded()
        if not wait:
            self.check_running()
            return [*self.stream.publish(drafts)]
        ids: list[str | None] = []
        for start in range(0, len(drafts), self._piece):
            ids += self._publish_piece(drafts[start:start + self._piece])
        return ids

    def _publish_piece(self, drafts: Sequence[Draft]) -> list[str]:
        """Publish when the shared log takes it and slow clients, who hold it back, have room."""
        self.refuse_inside()
        while True:
            with self._mutex:       # what was published before must have come back, to count
                while self._arrived < self._own and self._log.complete_at < self._own_at:
                    self._wait()
                self._make_room(1, wait=True)
                self.check_running()
            try:
                ids = self.stream.publish(drafts)
            except Unavailable:
                time.sleep(LOOK)
            else:
                with self._mutex:
                    self._own = max(self._own, frames.parse_id(ids[-1]) or (0, 0))
                    self._own_at = self.clock()
                return ids

    def trouble(self) -> str | None:
        """Return why no event is taken now, or None."""
        return super().trouble() or self.stream.trouble

    def add(self, event: Event) -> None:
        """Append an event of the shared log. Raises NotRunning after `stop`."""
        self._publish(event.payload, event.channel, event.id)
        self._arrived = event.id

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
